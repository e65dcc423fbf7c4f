"""Method files are near-copies on purpose; this holds them together.

What two of them share must be the same to the letter, and diffs/<method>.diff shows what is not:
each method against its base. After a change to a method file, write the diffs again:

    python tests/test_siblings.py
"""

import ast
import builtins
import difflib
import re
import runpy
import symtable
import sys
from importlib import import_module
from pathlib import Path

import pytest
import tyro

ROOT = Path(__file__).resolve().parent.parent
DIFFS = ROOT / "diffs"
BASE = "dpo"
BASE_OF = {  # methods that are nearer to another file than to dpo.py
    "rloo": "ppo",
    "grpo": "rloo",
    "rrhf": "pro",
    "orpo": "cpo",
    "raft": "rloo",
}
# Headings of Args whose fields are the same in all files; a method's own knobs come before them.
SHARED = ("# The reference", "# Model and data", "# Optimization", "# The run")
# Fields that say something else in one file: (method, field) -> why.
OWN_LINE = {
    ("sft", "model"): "it starts from a model that cannot answer yet",
    ("ppo", "batch_size"): "its rows are prompts, a step's answers are sampled",
    ("ppo", "max_steps"): "a step has several optimizer steps",
    ("rloo", "batch_size"): "its rows are prompts, several answers are sampled to each",
    ("rloo", "max_steps"): "a step may have several optimizer steps",
    ("grpo", "batch_size"): "as in rloo.py",
    ("grpo", "max_steps"): "as in rloo.py",
    ("raft", "batch_size"): "its rows are prompts, several answers are sampled to each",
    ("raft", "max_steps"): "a step is a stage",
}


def method_files() -> dict[str, str]:
    """Name -> source of every script with an Args and a loss."""
    sources = {path.stem: path.read_text() for path in sorted(ROOT.glob("*.py"))}
    pattern = re.compile(r"^class Args\b.*^def \w+_loss\(", re.DOTALL | re.MULTILINE)
    return {name: source for name, source in sources.items() if pattern.search(source)}


METHODS = method_files()
COMMON = (ROOT / "common.py").read_text()


# -- what a method file consists of


def top_level(source: str) -> dict[str, ast.stmt]:
    kinds = (ast.FunctionDef, ast.ClassDef)
    return {node.name: node for node in ast.parse(source).body if isinstance(node, kinds)}


def fields(source: str) -> dict[str, str]:
    """Field of Args -> all of its lines, in their order."""
    lines = source.splitlines()
    return {
        node.target.id: "\n".join(lines[node.lineno - 1 : node.end_lineno])
        for node in top_level(source)["Args"].body
        if isinstance(node, ast.AnnAssign)
    }


def comments(source: str) -> dict[str, str]:
    """Field of Args -> what its lines say of it."""
    return {name: re.findall(r"  # (.*)", text)[-1] for name, text in fields(source).items()}


def groups(source: str) -> dict[str, str]:
    """Field of Args -> the heading (a comment on a line of its own) that it stands under."""
    args, heading, found = top_level(source)["Args"], "", {}
    at = {n.lineno: n.target.id for n in args.body if isinstance(n, ast.AnnAssign)}
    for number, line in enumerate(source.splitlines(), 1):
        if args.lineno < number <= args.end_lineno and line.startswith("    # "):
            if not line.startswith("    # fmt:"):
                heading = line.strip()
        if number in at:
            found[at[number]] = heading
    return found


def names_read(source: str) -> set[str]:
    """x of every args.x, run.args.x and self.args.x whose value is used."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            of = node.value
            owner = of.attr if isinstance(of, ast.Attribute) else getattr(of, "id", "")
            if owner == "args":
                found.add(node.attr)
    return found


# -- what must hold, as functions from sources to a list of what is wrong


def uncommented(source: str) -> list[str]:
    """A field is one line with its comment: tyro shows it as help only from there."""
    wrong = []
    for name, text in fields(source).items():
        if "\n" in text:
            wrong.append(f"{name} is on several lines, so --help loses its comment")
        elif not re.search(r"\S {2}# \S", text):
            wrong.append(f"{name} has no comment behind it")
    return wrong


def unread(source: str, common: str) -> list[str]:
    read = names_read(source) | names_read(common)
    return [f"{name} is never read" for name in fields(source) if name not in read]


def drifted_fields(one: str, other: str, names: tuple[str, str] = ("", "")) -> list[str]:
    a, b, under = fields(one), fields(other), (groups(one), groups(other))
    shared = [name for name in a if name in b]
    wrong = []
    for field in shared:
        knob = not any(found[field] in SHARED for found in under)  # beta: each equation has its own
        own = knob or any((name, field) in OWN_LINE for name in names)
        if a[field] != b[field] and not own:
            wrong.append(f"{field} differs")
        if under[0][field] != under[1][field] and not knob:
            wrong.append(f"{field} stands under another heading")
    if shared != [name for name in b if name in a]:
        wrong.append("shared fields are in another order")
    return wrong


def drifted_functions(one: str, other: str) -> list[str]:
    """`main` is the method; what else has the same name must be the same text."""
    a, b = top_level(one), top_level(other)
    text = ast.get_source_segment
    return [
        f"{name} differs"
        for name in a
        if name in b and name not in ("main", "Args") and text(one, a[name]) != text(other, b[name])
    ]


def impure_losses(source: str) -> list[str]:
    """Globals of a loss (annotations too) other than torch, F, Tensor and Python's own."""
    allowed = {"torch", "F", "Tensor", *dir(builtins)}
    wrong = []
    for name, node in top_level(source).items():
        if not name.endswith("_loss"):
            continue
        used = _globals_of(symtable.symtable(ast.get_source_segment(source, node), name, "exec"))
        wrong += [f"{name} uses {x}" for x in sorted(used - allowed - {name})]
        wrong += [f"{name} takes args" for x in ast.walk(node) if getattr(x, "arg", "") == "args"]
    return wrong


def _globals_of(table: symtable.SymbolTable) -> set[str]:
    at_top = table.get_type() == "module"
    own = {
        symbol.get_name()
        for symbol in table.get_symbols()
        if symbol.is_referenced() and (at_top or symbol.is_global())
    }
    return own.union(*map(_globals_of, table.get_children()))


def does_something_on_import(source: str) -> list[str]:
    """Only definitions, imports and constants stand at the top; the last line calls main."""
    wrong, body = [], ast.parse(source).body
    for node in body:
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        define = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)
        constant = isinstance(node, ast.Assign | ast.AnnAssign) and not any(
            isinstance(x, ast.Call) for x in ast.walk(node)
        )
        guard = isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"
        if not (docstring or constant or guard or isinstance(node, define)):
            wrong.append(f"line {node.lineno}: {ast.unparse(node)[:60]}")
    if not ast.unparse(body[-1]).startswith("if __name__ == '__main__':\n    main("):
        wrong.append("does not end by calling main")
    return wrong


def diff_of(method: str) -> str:
    """The unified diff from a method's base to it."""
    base = BASE_OF.get(method, BASE)
    lines = [METHODS[name].splitlines(keepends=True) for name in (base, method)]
    return "".join(difflib.unified_diff(*lines, f"{base}.py", f"{method}.py"))


def changed_lines(method: str) -> tuple[int, int]:
    """(gone, come): lines of the base that are not in the method's file, and those of the method's
    that are not in the base.
    """
    lines = [line for line in diff_of(method).splitlines()[2:] if line[:1] in "-+"]
    return sum(line[0] == "-" for line in lines), sum(line[0] == "+" for line in lines)


# -- the files as they are

PAIRS = [(a, b) for a in METHODS for b in METHODS if a < b]


@pytest.mark.parametrize("method", METHODS)
def test_every_argument_is_commented(method):
    assert uncommented(METHODS[method]) == []


@pytest.mark.parametrize("method", METHODS)
def test_help_shows_every_comment(method, monkeypatch, capsys):
    """What stands behind a field is what `--help` says of it."""
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit):
        tyro.cli(import_module(method).Args, args=["--help"], console_outputs=True)
    shown = re.sub(r"[\s│|]+", " ", capsys.readouterr().out)
    missing = [name for name, text in comments(METHODS[method]).items() if text not in shown]
    assert missing == []


@pytest.mark.parametrize("method", METHODS)
def test_every_argument_is_read(method):
    assert unread(METHODS[method], COMMON) == []


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_shared_arguments_are_the_same(pair):
    one, other = (METHODS[name] for name in pair)
    assert drifted_fields(one, other, pair) == []


def test_own_lines_are_needed():
    """An exception that is none any more goes."""
    for method, field in OWN_LINE:
        assert fields(METHODS[method])[field] != fields(METHODS[BASE])[field]


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_shared_functions_are_the_same(pair):
    one, other = (METHODS[name] for name in pair)
    assert drifted_functions(one, other) == []


@pytest.mark.parametrize("method", METHODS)
def test_losses_are_pure(method):
    assert impure_losses(METHODS[method]) == []


@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_left_to_fill_in(method):
    assert not re.search(r"\b[A-Z]+_TINY\b|\bTODO\b|\bXXX\b", METHODS[method])


@pytest.mark.parametrize("method", METHODS)
def test_import_trains_nothing(method, tmp_path, monkeypatch):
    assert does_something_on_import(METHODS[method]) == []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{method}.py"])
    names = runpy.run_path(str(ROOT / f"{method}.py"), run_name=method)
    assert callable(names["main"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("method", [m for m in METHODS if m != BASE])
def test_diff_is_up_to_date(method):
    committed = (DIFFS / f"{method}.diff").read_text()
    assert committed == diff_of(method), "python tests/test_siblings.py writes the diffs again"


@pytest.mark.parametrize("method", ["cpo", "simpo", "ipo"])
def test_the_nearest_siblings_stay_near(method):
    """What is not about the method does not get in: less than 60 lines of dpo.py go and less than
    60 come; below docstring and settings, which are a method's own, less than 60 in all.
    """
    assert max(changed_lines(method)) < 60
    code = [METHODS[name][METHODS[name].index("class Args") :] for name in (BASE, method)]
    diff = difflib.ndiff(*(text.splitlines() for text in code))
    assert 0 < sum(line[0] in "-+" for line in diff) < 60


def test_the_readme_says_how_large_the_diffs_are():
    readme = (ROOT / "README.md").read_text()
    for method in METHODS.keys() - {BASE}:
        gone, come = changed_lines(method)
        assert f"[−{gone} +{come}](diffs/{method}.diff)" in readme, f"{method}: −{gone} +{come}"


def test_no_other_diffs():
    assert {path.stem for path in DIFFS.iterdir()} == METHODS.keys() - {BASE}


# -- and the checks see what they are for: drifted copies of dpo.py


def test_the_methods_are_found():
    assert {"dpo", "sft"} <= METHODS.keys()


def _toy(
    body: str = "    lr: float = 0.1  # of the first step\n    seed: int = 0  # of all\n",
) -> str:
    return (
        f'"""Toy."""\n\nimport torch\n\n\nclass Args:\n    # Optimization\n{body}\n\n'
        "def toy_loss(x: torch.Tensor, beta: float):\n    y = beta * x\n    return y, {}\n\n\n"
        "def twin(x):\n    return x + 1\n\n\n"
        "def main(args):\n    print(args.lr, args.seed)\n\n\n"
        'if __name__ == "__main__":\n    main(Args())\n'
    )


TOY = _toy()


def drift(old: str, new: str) -> str:
    assert TOY.count(old) == 1
    return TOY.replace(old, new)


def test_a_clean_copy_is_clean():
    assert not uncommented(TOY) and not unread(TOY, "") and not drifted_fields(TOY, TOY)
    assert not drifted_functions(TOY, TOY) and not impure_losses(TOY)
    assert not does_something_on_import(TOY)


@pytest.mark.parametrize(
    "wrong, check",
    [
        (drift("  # of all", ""), uncommented),
        (drift("0.1  # of the first step", "(\n        0.1  # of the first\n    )"), uncommented),
        (drift(", args.seed", ""), lambda source: unread(source, "")),
        (drift("print(args.lr,", "args.lr = 1\n    print("), lambda source: unread(source, "")),
        (drift("0.1", "0.2"), lambda source: drifted_fields(TOY, source)),
        (drift("# of all", "# of al"), lambda source: drifted_fields(TOY, source)),
        (drift("# Optimization", "# The run"), lambda source: drifted_fields(TOY, source)),
        (
            _toy("    seed: int = 0  # of all\n    lr: float = 0.1  # of the first step\n"),
            lambda source: drifted_fields(TOY, source),
        ),
        (drift("x + 1", "x + 2"), lambda source: drifted_functions(TOY, source)),
        (drift("beta * x", "common.beta * x"), impure_losses),
        (drift("beta * x", "args.beta * x"), impure_losses),
        (drift("beta: float", "args: float"), impure_losses),
        (drift("x: torch.Tensor", "x: Args"), impure_losses),
        (drift("class Args", "main(1)\n\n\nclass Args"), does_something_on_import),
        (drift("class Args", "x = main(1)\n\n\nclass Args"), does_something_on_import),
        (
            drift('if __name__ == "__main__":\n    main', "if True:\n    main"),
            does_something_on_import,
        ),
    ],
)
def test_drift_is_seen(wrong, check):
    assert check(wrong)


if __name__ == "__main__":
    DIFFS.mkdir(exist_ok=True)
    for name in METHODS:
        if name != BASE:
            (DIFFS / f"{name}.diff").write_text(diff_of(name))
            gone, come = changed_lines(name)
            print(f"diffs/{name}.diff: −{gone} +{come}")
