"""Build the annotated methods: python docs/build.py [--output site]

Each method file becomes a page: its prose on the left, the code that it belongs to on the right.
Equations and exercises are in docs/methods.txt, numbers and curves in results/.
"""

import argparse
import ast
import difflib
import json
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

HTML = HtmlFormatter()
PAPER = r'<a href="https://arxiv.org/abs/\1">arXiv \1</a>'
SYMBOLS = (
    "log exp sigmoid pi ref beta gamma lambda tau eps rho delta max min clip odds score".split()
)

TABLE = (ROOT / "docs/methods.txt").read_text(encoding="utf-8")
METHODS = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", TABLE, re.M | re.S))

RUNS = sorted((ROOT / "results/tiny/rows").glob("*.json"))
ROWS = [json.loads(path.read_text(encoding="utf-8")) for path in RUNS]
COLUMNS = {"sampled/reward": "reward, sampled", "greedy/reward": "reward, greedy"}
COLUMNS |= {"sampled/kl": "KL, nats per answer", "seconds": "seconds"}
SPECIAL = {"reward_model": ("sample-score-learn-tiny.md", "`python reward_model.py --")}
BASE = {"nlpo": "ppo", "grpo": "rloo"}  # else dpo


def symbols(text: str) -> Counter:
    """How often an equation contains each of SYMBOLS, in TeX or in plain text."""
    found = re.findall(rf"(?<![a-z])({'|'.join(SYMBOLS)})(?![a-z])", text.replace("epsilon", "eps"))
    return Counter(found)


def section(name: str, mark: str = "") -> list[str]:
    """A method's equations in docs/methods.txt, or its lines that begin with this mark."""
    lines = METHODS[name].strip().replace("\n  ", " ").split("\n")
    if not mark:
        return [line for line in lines if line[:2] not in ("* ", "- ")]
    return [line[2:] for line in lines if line.startswith(f"{mark} ")]


def equations(name: str, plain: str) -> str:
    """The method's TeX as MathML, if it has the symbols of the docstring's equation."""
    tex = "\n".join(section(name))
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
    linked = re.sub(r"arXiv\s+(\d{4}\.\d{5})", PAPER, "\n".join(html).replace(" %", "&nbsp;%"))
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
    wanted = f"{name}_loss", "main"
    nodes = [node for node in ast.parse(source).body if getattr(node, "name", "") in wanted]
    return "\n\n".join(ast.get_source_segment(source, node) for node in nodes).splitlines()


def table(lines: list[list[str]]) -> str:
    cells = ["<tr><td>" + "<td>".join(escape(cell) for cell in line) for line in lines]
    return f'<div class="wide"><table>{"".join(cells)}</table></div>'


def mean(runs: list[dict], key: str) -> str:
    """The mean (smallest to largest), or of a single run the value (95 % interval)."""
    found = [run["measured"].get(key, {"value": run.get(key)}) for run in runs]
    values = [x["value"] for x in found]
    if None in values:
        return "-"
    low, high = (min(values), max(values)) if len(runs) > 1 else map(found[0].get, ("low", "high"))
    digits = 0 if key == "seconds" else 3
    text = f"{sum(values) / len(values):,.{digits}f}"
    return text if low is None else f"{text} ({low:,.{digits}f} to {high:,.{digits}f})"


def chart(title: str, key: str, ticks: list[float], curves: list[list[dict]]) -> str:
    """An SVG of these curves. docs/style.css colours the last one."""
    scale = 150 / (ticks[-1] - ticks[0])
    svg = f'<text x="40" y="12">{title}</text><text x="40" y="190">0</text>'
    svg += f'<text x="320" y="190" text-anchor="end">step {curves[-1][-1]["step"]}</text>'
    for tick in ticks:
        y = 172 - scale * (tick - ticks[0])
        svg += f'<path d="M40 {y:.0f}h280"/><text x="12" y="{y + 4:.0f}">{tick}</text>'
    for points in curves:
        xs = [40 + 280 * point["step"] / points[-1]["step"] for point in points]
        ys = [172 - scale * (point[key] - ticks[0]) for point in points]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(xs, ys, strict=True))
        svg += f'<polyline points="{line}"/>'
    return f'<svg viewBox="0 0 330 196" role="img" aria-label="{title}">{svg}</svg>'


def results(name: str) -> str:
    """Tables and curves of the method's runs on the embedded task."""
    if not any(row["method"] == name for row in ROWS):  # it has a table in a page of its own
        page, start = SPECIAL.get(name, (f"{name}-tiny.md", ""))
        if not (ROOT / "results" / page).exists():
            return "<p>Not run yet.</p>"
        text = (ROOT / "results" / page).read_text(encoding="utf-8")
        before, rows = re.search(r"((?:.+\n)+)\n((?:\|.*\n)+)", text[text.index(start) :]).groups()
        cells = [row.strip("| ").split(" | ") for row in rows.splitlines() if row[2] != "-"]
        return table(cells) + prose(before)
    lines, curves = [["", "runs", *COLUMNS.values()]], []
    start = next(row["measured"] for row in ROWS if row["method"] == "start")
    origin = {"step": 0, "kl": 0.0, "reward": start["sampled/reward"]["value"]}
    for method in dict.fromkeys(["start", "dpo", name]):
        rows = [r for r in ROWS if r["method"] == method and (r["default"] or method == name)]
        for strength in sorted({row["strength"] or 0 for row in rows}):
            runs = [row for row in rows if (row["strength"] or 0) == strength]
            knob = f", {runs[0]['knob']} {strength:g}" if strength else ""
            knob += " (default)" if method == name and runs[0]["default"] else ""
            lines.append([f"{method}{knob}", str(len(runs)), *(mean(runs, key) for key in COLUMNS)])
        curves += [[origin, *row["curve"]] for row in rows if row["curve"] and row["default"]]
    commits = ", ".join(sorted({row["commit"] for row in rows}))
    caption = (
        "Mean over seeds (smallest to largest); of a single run its value (95 % interval). Runs of "
        f"compare.py, commit {commits}, {rows[0]['date']}, {rows[0]['hardware']}; seconds say "
        "little, because two ran at a time. Commands: results/tiny/rows in the repository."
    )
    about = "Curves: seed 0, on fewer questions." + " Grey: dpo.py." * (name != "dpo")
    reward = chart("reward, sampled", "reward", [0.3, 0.4, 0.5, 0.6], curves)
    kl = chart("KL from the start, nats per answer", "kl", [0, 1, 2, 3, 4], curves)
    return table(lines) + prose(caption) + reward + kl + prose(about)


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
            right = highlight("\n".join(lines).rstrip(), PythonLexer(stripnl=False), HTML)
            rows.append(f'<div class="prose">{left}</div>\n{right}')

    maths = equations(name, plain)
    runs, base = results(name), BASE.get(name, "dpo")
    picture = f"{name}-tiny.png"
    if (ROOT / "results" / picture).exists():
        shutil.copy(ROOT / "results" / picture, output)
        runs += f'<img src="{picture}" alt="Metrics of a run">'
    diff = difflib.unified_diff(core(base), core(name), f"{base}.py", f"{name}.py", lineterm="")
    diff = highlight("\n".join(diff) or "This is the base.", DiffLexer(), HTML)
    published = "".join(f"<li>{prose(text)[3:-4]}" for text in section(name, "*"))
    if published:
        published = f"<h2>Published numbers</h2>\n<ul>{published}</ul>"
    body = f"""<nav><a href="index.html">All methods</a></nav>
<h1>{name}.py</h1>
{prose(title)}
{maths}
<details><summary>As in the file</summary>{prose(plain)}</details>
{prose((chr(10) * 2).join(intro))}
<h2>The file</h2>
<div class="grid">{chr(10).join(rows)}</div>
<h2>Its run on the embedded task</h2>
{runs}
{published}
<h2>What differs from {base}.py, in the loss and in main</h2>
{diff}
<h2>Exercises</h2>
{prose(chr(10).join(f"{i}. {text}" for i, text in enumerate(section(name, "-"), 1)))}"""
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
    body = "<h1>Annotated methods</h1>\n<p>For each method: its prose next to its "
    body += "code, its runs on the embedded task, published numbers, and exercises.</p>"
    for name in METHODS:
        title, maths = write_method(name, output)
        body += f'\n<h2><a href="{name}.html">{name}.py</a></h2>\n{prose(title)}\n{maths}'
    write_page(output / "index.html", "Annotated methods", body)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "site")
    build(parser.parse_args().output)
