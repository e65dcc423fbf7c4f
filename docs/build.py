"""Build the annotated methods: python docs/build.py [--output site]

Each method file becomes a page: its prose on the left, the code that it belongs to on the right.
Equations and exercises are in docs/methods.txt, numbers and curves in results/.
"""

import argparse
import ast
import difflib
import re
import shutil
from collections import Counter
from html import escape
from itertools import groupby
from pathlib import Path

from latex2mathml.converter import convert
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import DiffLexer, PythonLexer

ROOT = Path(__file__).resolve().parent.parent

PAPER = r'<a href="https://arxiv.org/abs/\1">arXiv \1</a>'
SYMBOLS = (
    "log exp sigmoid pi ref beta gamma lambda tau eps rho delta max min clip odds score".split()
)

TABLE = (ROOT / "docs/methods.txt").read_text(encoding="utf-8")
METHODS = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", TABLE, re.M | re.S))


def symbols(text: str) -> Counter:
    """How often an equation contains each of SYMBOLS, in TeX or in plain text."""
    found = re.findall(rf"(?<![a-z])({'|'.join(SYMBOLS)})(?![a-z])", text.replace("epsilon", "eps"))
    return Counter(found)


def equations(name: str, plain: str) -> str:
    """The method's TeX as MathML, if it has the symbols of the docstring's equation."""
    tex = METHODS[name].split("\n- ")[0].replace("\n  ", " ")
    tex = re.sub(r"@\{(.*?)\}", r"\\log \\frac{\\pi(\1|x)}{\\ref(\1|x)}", tex)
    tex = re.sub(r"#\{(.*?)\}", r"\\log \\pi(\1|x)", tex)
    differ = symbols(plain) - symbols(tex) + (symbols(tex) - symbols(plain))
    if differ:
        raise SystemExit(
            f"docs/methods.txt and {name}.py differ in {', '.join(differ)}: edit docs/methods.txt"
        )
    tex = re.sub(r"\\(sigmoid|clip|max|min)\b", r"\\operatorname{\1}", tex)
    tex = re.sub(r"\\(ref|odds|score)\b", r"\\text{\1}", tex).replace(r"\log", r"\log\,")
    lines = [
        f'<div class="math">{convert(line, display="block")}</div>' for line in tex.split("\n")
    ]
    return "\n".join(lines)


def prose(text: str) -> str:
    """HTML of docstring paragraphs or comments. Indented lines are a table or stay as they are."""
    html = []
    for indented, lines in groupby(text.splitlines(), lambda line: line.startswith("    ")):
        block = escape("\n".join(lines), quote=False)
        if block.startswith("    paper  "):
            cells = re.findall(r"^ {4}(\S.*?) {2,}(.*(?:\n {8,}.*)*)", block, re.M)
            html += [
                "<dl>",
                *(f"<dt>{symbol}</dt>\n<dd>{code}</dd>" for symbol, code in cells),
                "</dl>",
            ]
        elif indented:
            html.append(f"<pre>{block}</pre>")
        else:
            html += [f"<p>{p}</p>" for p in re.split(r"\n\n|\n(?=\d+\. )", block) if p.strip()]
    linked = re.sub(r"arXiv\s+(\d{4}\.\d{5})", PAPER, "\n".join(html))
    return re.sub(r"`([^`]+)`|(?<![\w-])(--[a-z][\w-]*)", r"<code>\1\2</code>", linked)


def pieces(part: str) -> list[tuple[list[str], list[str]]]:
    """(comment lines, code lines). Functions are divided at their comments."""
    is_function, found = part.startswith("def "), [([], [])]
    for line in part.splitlines():
        is_comment = line.strip().startswith("#")
        if is_function and is_comment and found[-1][1]:
            found.append(([], []))
        if is_comment and not found[-1][1]:
            found[-1][0].append(line.strip("# "))
        else:
            found[-1][1].append(line)
    return found


def core(name: str) -> list[str]:
    """Source lines of the loss and of main."""
    source = (ROOT / f"{name}.py").read_text(encoding="utf-8")
    nodes = [
        n for n in ast.parse(source).body if getattr(n, "name", "") in (f"{name}_loss", "main")
    ]
    return "\n\n".join(ast.get_source_segment(source, node) for node in nodes).splitlines()


def results(name: str) -> tuple[str, str]:
    """The method's rows of the table of results with their source, and the path of its picture."""
    text = (ROOT / "results/tiny/README.md").read_text(encoding="utf-8")
    rows = re.findall(rf"^\| (?:method|start|{name}(?:, \S+)?) \|.*", text, re.M)
    caption = "\n\n".join(re.findall(r"^(?:`python compare.py`|Mean over seeds).*", text, re.M))
    picture = f"results/{name}-tiny.png"
    if not (ROOT / picture).exists():
        picture, caption = "results/tiny/curves.png", f"{caption} In the picture, DPO is grey."
    if name == "reward_model":  # no policy: it has a table of its own
        text = (ROOT / "results/sample-score-learn-tiny.md").read_text(encoding="utf-8")
        caption, table = text[text.index("`python reward_model.py --seed S`") :].split("\n\n")[:2]
        rows, picture = re.findall(r"^\| [^-].*", table, re.M), ""
    cells = [escape(row.strip("| ")).replace(" | ", "<td>") for row in rows]
    html = (
        f'<div class="wide"><table><tr><td>{"<tr><td>".join(cells)}</table></div>{prose(caption)}'
    )
    if picture:
        html += f'<img src="{Path(picture).name}" alt="Curves of the run">'
    return html, picture


def write_page(file: Path, title: str, body: str) -> None:
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    head += f'<title>{title}</title><link rel="stylesheet" href="style.css">'
    html = f'<!doctype html>\n<html lang="en">{head}\n<main>\n{body}\n</main></html>\n'
    file.write_text(html, encoding="utf-8")


def write_method(name: str, output: Path) -> tuple[str, str]:
    """Write a method's page. Return its title and its equations."""
    source = (ROOT / f"{name}.py").read_text(encoding="utf-8")
    doc = ast.get_docstring(ast.parse(source))
    title, plain, *paragraphs = doc.split("\n\n")
    prose_of = {"@dataclass": [], f"def {name}_loss": [], "def main": []}
    kinds = {"Options": "@dataclass", "Departures": "@dataclass", "Healthy": "def main"}
    kinds["    paper  "] = f"def {name}_loss"
    intro = []
    for paragraph in paragraphs:
        place = [kinds[start] for start in kinds if paragraph.startswith(start)]
        (prose_of[place[0]] if place else intro).append(paragraph)

    rows = []
    code = source.split('"""', 2)[2].strip()
    for part in re.split(r"\n\n+(?=\S)(?!import |from )", code):
        added = [text for start, text in prose_of.items() if part.startswith(start)]
        for comments, lines in pieces(part):
            left = prose("\n\n".join(["\n".join(comments), *(added.pop() if added else [])]))
            right = highlight(
                "\n".join(lines).rstrip(), PythonLexer(stripnl=False), HtmlFormatter()
            )
            rows.append(f'<div class="prose">{left}</div>\n{right}')

    maths = equations(name, plain)
    table, picture = results(name)
    if picture:
        shutil.copy(ROOT / picture, output)
    diff = difflib.unified_diff(core("dpo"), core(name), "dpo.py", f"{name}.py", lineterm="")
    diff = highlight("\n".join(diff) or "This is the base.", DiffLexer(), HtmlFormatter())
    exercises = METHODS[name].strip().split("\n- ")[1:]
    body = f"""<nav><a href="index.html">All methods</a></nav>
<h1>{name}.py</h1>
{prose(title)}
{maths}
<details><summary>As in the file</summary>{prose(plain)}</details>
{prose((chr(10) * 2).join(intro))}
<h2>The file</h2>
<div class="grid">{chr(10).join(rows)}</div>
<h2>Its run on the embedded task</h2>
{table}
<h2>What differs from dpo.py, in the loss and in main</h2>
{diff}
<h2>Exercises</h2>
{prose(chr(10).join(f"{i}. {text}" for i, text in enumerate(exercises, 1)))}"""
    write_page(output / f"{name}.html", f"{name}.py", body)
    return title, maths


def build(output: Path) -> None:
    files = {path.stem: path.read_text(encoding="utf-8") for path in ROOT.glob("*.py")}
    names = {name for name, source in files.items() if f"\ndef {name}_loss(" in source}
    if names != {*METHODS}:
        wrong = ", ".join(sorted(names ^ {*METHODS}))
        raise SystemExit(f"docs/methods.txt needs one section per method file: see {wrong}")
    output.mkdir(parents=True, exist_ok=True)
    light = HtmlFormatter(style="default").get_style_defs(".highlight")
    dark = HtmlFormatter(style="github-dark").get_style_defs(".highlight")
    style = (ROOT / "docs/style.css").read_text(encoding="utf-8")
    colours = f"{light}\n@media (prefers-color-scheme: dark) {{\n{dark}\n}}\n"
    (output / "style.css").write_text(colours + style, encoding="utf-8")
    body = "<h1>Annotated methods</h1>\n<p>The prose of each file next to its code.</p>"
    for name in METHODS:
        title, maths = write_method(name, output)
        body += f'\n<h2><a href="{name}.html">{name}.py</a></h2>\n{prose(title)}\n{maths}'
    write_page(output / "index.html", "Annotated methods", body)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "site")
    build(parser.parse_args().output)
