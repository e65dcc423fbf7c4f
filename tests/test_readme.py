"""README and docs tell the truth: links, files and flags exist; the first command does as shown."""

import ast
import json
import re
import sys

import pytest
from conftest import ROOT, run_script

README = (ROOT / "README.md").read_text()
PAGES = {path: path.read_text() for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]}
TEXT = "\n".join(PAGES.values())
SCRIPTS = sorted(p.name for p in ROOT.glob("*.py") if "class Args" in p.read_text())
METHODS = [p for p in SCRIPTS if re.search(r"^def \w+_loss\(", (ROOT / p).read_text(), re.M)]
FOLDERS = "data training kernels sampling evaluation family benchmarks".split()


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_link_leads_somewhere(page):
    links = re.findall(r"\]\(([^)#]+)\)", PAGES[page])
    missing = [x for x in links if not x.startswith("https://") and not (page.parent / x).exists()]
    assert not missing


def test_the_readme_is_one_page():
    assert len(README.splitlines()) <= 200 and len(README.split()) <= 1800
    named = re.findall(r"\(docs/(\w+[\w-]*\.md)\)", README)
    assert {path.name for path in PAGES} - {"README.md"} <= {*named}  # every page can be found


def test_every_method_is_in_the_table():
    assert set(METHODS) <= set(re.findall(r"^\| \[(\w+\.py)\]", README, re.M))


def test_every_flag_that_is_named_exists():
    known = set()
    for script in [*SCRIPTS, "benchmarks/steps.py"]:
        fields = re.findall(r"^    (\w+): .* = ", (ROOT / script).read_text(), re.M)
        known |= {"--" + name.replace("_", "-") for name in fields}
    # of torchrun, pip, rewardbench and lm_eval
    others = "--nproc_per_node --shutdown-timeout --index-url --model_args --tasks --help".split()
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", TEXT)) - {*others}
    named = {name.replace("--no-", "--") for name in named}  # how a switch is turned off
    assert named and not named - known


def test_every_command_names_a_file_that_exists():
    for script in re.findall(r"(?:python|\d) (\w+\.py)", TEXT):
        assert (ROOT / script).is_file(), script
    for module in re.findall(r"python -m (\w+\.\w+)", TEXT):
        assert (ROOT / f"{module.replace('.', '/')}.py").is_file(), module


def test_requirements_cover_what_is_imported():
    wanted, folders = set(), [f for f in FOLDERS if f != "benchmarks"]  # these import TRL
    for path in [*ROOT.glob("*.py"), *(p for f in folders for p in (ROOT / f).glob("*.py"))]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                wanted |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                wanted.add(node.module.split(".")[0])
    ours = {*FOLDERS, *(p.stem for p in ROOT.glob("*.py"))}
    brought = {"pyarrow": "datasets", "tokenizers": "transformers", "huggingface_hub": "datasets"}
    by_flag = {"peft", "wandb", "sacrebleu", "rouge_score"}  # the flag says what to install
    wanted = {brought.get(x, x) for x in wanted - ours - by_flag - set(sys.stdlib_module_names)}
    required = set(re.findall(r"^[a-z]+", (ROOT / "requirements.txt").read_text(), re.M))
    assert wanted == required


@pytest.mark.slow
def test_the_first_command_makes_a_model_better(tmp_path):
    status, out, err = run_script("dpo.py", "--output-dir", tmp_path / "dpo", threads=2)
    assert status == 0, err
    shown = re.search(r"```\ndpo: .*?```", README, re.DOTALL)[0]
    for line in ("true reward, sampled at temperature 1", "true reward, greedy"):
        before, after = (float(x) for x in re.search(f"{line} +([\\d.]+) +([\\d.]+)", out).groups())
        told = [float(x) for x in re.search(f"{line} +([\\d.]+) +([\\d.]+)", shown).groups()]
        assert [before, after] == pytest.approx(told, abs=0.03) and after > before + 0.1
    assert json.loads((tmp_path / "dpo" / "measured.json").read_text())["prompts"] == 1024
