"""The shape of the repository: its top level, the length of files, imports that only point down.

Floors: 0 kernels/ data/ training/ family/ sampling/generate.py, 1 common.py, 2 sampling/,
3 evaluation/, 4 everything that is run.
"""

import ast
import builtins
import subprocess
import sys

import pytest
from conftest import ROOT

ONLINE = ["ppo", "nlpo", "rloo", "grpo", "raft", "rso"]  # they sample
OFFLINE = "sft reward_model dpo ipo cpo orpo simpo slic kto pro listwise_dpo rrhf".split()
METHODS = OFFLINE + ONLINE
LIMITS = {"common.py": 600, "training/memory.py": 120}
LIMITS |= {f"{name}.py": 150 for name in OFFLINE} | {f"{name}.py": 300 for name in ONLINE}
LIMITS["kto.py"] = 200

FOLDERS = "kernels data training sampling evaluation family benchmarks docs results tests".split()
TEXTS = ["README.md", "CHANGELOG.md", "LICENSE", "pyproject.toml"]
TEXTS += ["requirements.txt", "requirements-dev.txt"]
SCRIPTS = [f"{name}.py" for name in (*METHODS, "chat", "evaluate", "compare", "common")]
TOP_LEVEL = {*FOLDERS, *TEXTS, *SCRIPTS}

FLOOR_OF_FOLDER = dict.fromkeys(("kernels", "data", "training", "family"), 0)
FLOOR_OF_FOLDER |= {"sampling": 2, "evaluation": 3}
FLOOR_OF_FILE = {"common.py": 1, "sampling/generate.py": 0, "family/build.py": 4}


def floor(path: str) -> int:
    return FLOOR_OF_FILE.get(path, FLOOR_OF_FOLDER.get(path.split("/")[0], 4))


def sources() -> dict[str, str]:
    """Path from the root -> source of every Python file except results and tests."""
    folders = [ROOT / name for name in FOLDERS if name not in ("results", "tests")]
    files = [*ROOT.glob("*.py"), *(file for folder in folders for file in folder.rglob("*.py"))]
    return {str(file.relative_to(ROOT)): file.read_text(encoding="utf-8") for file in files}


def names_imported(source: str, path: str) -> set[str]:
    """Dotted names of all imports, lazy ones and `optional_module("training.fsdp")` included."""
    found, folder = set(), path.rpartition("/")[0]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = [folder] * node.level + [node.module] * bool(node.module)
            found |= {".".join([*base, alias.name]) for alias in node.names}
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if function in ("optional_module", "required_module", "import_module"):
                found.add(node.args[0].value)
    return found


def file_of(name: str, ours: set[str]) -> str | None:
    """Path of the module that a dotted name is, or is in, if it is in this repository."""
    module = name.replace(".", "/")
    for path in (f"{module}.py", f"{module}/__init__.py"):
        if path in ours:
            return path
    return file_of(name.rpartition(".")[0], ours) if "." in name else None


def wrong_imports(files: dict[str, str]) -> list[str]:
    wrong, methods = [], {f"{name}.py" for name in METHODS}
    for path, source in files.items():
        for used in {file_of(name, files) for name in names_imported(source, path)} - {None}:
            upward = floor(used) > floor(path)
            offline = path.removesuffix(".py") in OFFLINE and used.startswith("sampling/")
            allowed = (path, used) == ("reward_model.py", "sampling/score_model.py")
            if upward or used in methods or (offline and not allowed):
                wrong.append(f"{path} imports {used}")
    return wrong


def test_imports_only_point_down():
    """Nothing imports a method file, and offline methods do not import sampling/."""
    assert wrong_imports(sources()) == []


def test_a_script_starts_quickly():
    """--help and a wrong flag need torch, and none of the other slow imports."""
    slow = {"transformers", "datasets", "triton", "matplotlib", "torch.distributed.fsdp"}
    code = f"import sys, dpo, grpo, rso, reward_model, evaluate; print({slow} & {{*sys.modules}})"
    command = [sys.executable, "-c", code]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert found.strip() == "set()"


@pytest.mark.parametrize(
    "path, line",
    [
        ("data/load.py", "import common"),
        ("kernels/token_logps.py", "from sampling import rewards"),
        ("sampling/generate.py", "def f():\n    from .rewards import score"),
        ("common.py", 'optional_module("evaluation.judge")'),
        ("benchmarks/steps.py", "from dpo import dpo_loss"),
        ("dpo.py", "import sampling.generate"),
        ("reward_model.py", "from sampling.rewards import score"),
    ],
)
def test_a_wrong_import_is_found(path, line):
    files = dict.fromkeys(("dpo.py", "evaluation/judge.py", "sampling/rewards.py"), "import common")
    files |= {"common.py": 'optional_module("sampling.generate")', "sampling/generate.py": ""}
    assert wrong_imports(files) == []
    assert wrong_imports(files | {path: line})


@pytest.mark.parametrize("name", METHODS)
def test_a_pasted_loss_needs_only_torch(name):
    """`import torch`, `import torch.nn.functional as F`, and the function."""
    body = ast.parse(sources()[f"{name}.py"]).body
    loss = next(x for x in body if isinstance(x, ast.FunctionDef) and x.name == f"{name}_loss")
    names = [node for node in ast.walk(loss) if isinstance(node, ast.Name)]
    known = {node.arg for node in ast.walk(loss) if isinstance(node, ast.arg)}
    known |= {node.id for node in names if isinstance(node.ctx, ast.Store)} | {*dir(builtins)}
    known |= {node.name for node in ast.walk(loss) if isinstance(node, ast.FunctionDef)}
    assert {node.id for node in names} - known <= {"torch", "F"}


@pytest.mark.parametrize("path", LIMITS)
def test_a_file_is_short(path):
    """If this fails, move something out; do not compress lines."""
    assert len(sources()[path].splitlines()) <= LIMITS[path]


def test_evaluation_is_short():
    parts = ("evaluate.py", "compare.py", "evaluation/")
    found = [text for path, text in sources().items() if path.startswith(parts)]
    assert sum(len(text.splitlines()) for text in found) <= 1500


def test_the_top_level():
    """`ls` shows the methods, one shared file, three commands and a few folders."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", ":!.*"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    found = {line.split("/")[0] for line in listed.splitlines() if (ROOT / line).exists()}
    assert found | {"docs", "chat.py"} == TOP_LEVEL  # these two may be missing
