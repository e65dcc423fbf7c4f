"""README and docs tell the truth: links, files and flags exist, and the commands run."""

import ast
import io
import json
import re
import shlex
import shutil
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, run_script

import common

README = (ROOT / "README.md").read_text()
PAGES = {path: path.read_text() for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]}
TEXT = "\n".join(PAGES.values())
SCRIPTS = sorted(p.name for p in ROOT.glob("*.py") if "class Args" in p.read_text())
METHODS = [p for p in SCRIPTS if re.search(r"^def \w+_loss\(", (ROOT / p).read_text(), re.M)]
DOCSTRINGS = {
    ROOT / name: ast.get_docstring(ast.parse((ROOT / name).read_text()))
    for name in SCRIPTS
    if name != "common.py"
}
COMMAND = re.compile(r"(?:python|torchrun(?: --\S+)*) (\w+)\.py((?: [^`#\n]*)?)")
ROWS = dict(re.findall(r"^\| (\w+) \| `(\{.*\})` \|$", README, re.M))
FOLDERS = "data training kernels sampling evaluation family benchmarks".split()


def anchors(page: Path) -> set[str]:
    """What GitHub makes of a page's headings."""
    titles = re.findall(r"^#+ (.+)", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_link_leads_somewhere(page):
    for link in re.findall(r"\]\(([^)]+)\)", PAGES[page]):
        path, _, anchor = link.partition("#")
        if not link.startswith("https://"):
            target = page.parent / path if path else page
            assert target.exists() and (not anchor or anchor in anchors(target)), link


def test_the_readme_is_one_page():
    assert len(README.splitlines()) <= 200 and len(README.split()) <= 1800
    named = re.findall(r"\(docs/(\w+[\w-]*\.md)\)", README)
    assert {path.name for path in PAGES} - {"README.md"} <= {*named}  # every page can be found


def test_every_method_is_in_the_table():
    assert set(METHODS) <= set(re.findall(r"^\| \[(\w+\.py)\]", README, re.M))


def test_the_table_has_the_results():
    """The column "reward here" is the mean over the seeds of results/tiny."""
    rows = [json.loads(path.read_text()) for path in (ROOT / "results/tiny/rows").glob("*.json")]
    for method in {row["method"] for row in rows if row["default"]} & {x[:-3] for x in METHODS}:
        runs = [row["measured"] for row in rows if row["method"] == method and row["default"]]
        mean = sum(run["sampled/reward"]["value"] for run in runs) / len(runs)
        assert re.search(rf"^\| \[{method}\.py\].* \| {mean:.3f} \| [^|]+ \|$", README, re.M), (
            method
        )


def parsed(script: str, words: str, **small):
    """(module, its arguments) for a command line. A wrong flag leaves with status 2."""
    module = import_module(script)
    presets = getattr(module, "PRESETS", {"tiny": getattr(module, "TINY", {})})
    args = common.parse(module.Args, presets, "", shlex.split(words))
    for name in small.keys() & vars(args).keys():
        setattr(args, name, small[name])
    return module, args


@pytest.mark.parametrize("page", [*PAGES, *DOCSTRINGS], ids=lambda path: path.name)
def test_every_command_is_understood(page):
    text = re.sub(r"\\\n\s*", "", (PAGES | DOCSTRINGS)[page])
    found = COMMAND.findall(text)
    assert found or page.parent.name == "docs"
    for script, words in found:
        if (ROOT / f"{script}.py").exists():  # not docs/build.py
            assert parsed(script, words)


@pytest.mark.usefixtures("fresh_process")
def test_your_own_model_and_data(checkpoints, monkeypatch, capsys):
    """README's rows and commands, with a small random model and one step."""
    shutil.copytree(checkpoints("qwen2"), "path/to/model")
    Path("judge.py").write_text("def score(prompts, responses): return [0.0] * len(prompts)")
    small = dict(max_steps=1, batch_size=4, max_length=96, max_prompt_length=80, samples=2)
    commands = re.search(r"## My model, my data(.*?)## ", README, re.S)[1]
    commands = re.sub("torchrun.*", "", commands)  # these need a published model
    kinds = {"rows.jsonl": "pair", "prompts.jsonl": "prompt"}
    for name, kind in kinds.items():
        lines = [ROWS[kind].replace("sky", f"sky {number}") for number in range(40)]
        Path(name).write_text("\n".join(lines))
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=bool, buffer=io.BytesIO(b"Why?")))
    done = []
    for script, words in COMMAND.findall(commands):
        module, args = parsed(script, words, max_new_tokens=4, **small)
        module.main(args)
        done.append(script)
    assert done == ["dpo", "chat", "evaluate", "grpo"]
    assert "log-ratio to" in capsys.readouterr().out


@pytest.mark.parametrize(
    "kind, script",
    [("pair", "dpo"), ("ranked", "pro"), ("labelled", "kto"), ("demonstration", "sft")],
)
@pytest.mark.usefixtures("fresh_process")
def test_every_row_is_read(checkpoints, kind, script):
    """The rows of the README's table."""
    words = f"--dataset rows.jsonl --model {checkpoints('qwen2')} --max-length 128"
    module, args = parsed(script, words)
    lines = [ROWS[kind].replace("sky", f"sky {number}") for number in range(40)]
    Path("rows.jsonl").write_text("\n".join(lines))
    tokenizer = common.load_tokenizer(args.model, args.max_length)
    train, held_out = common.load_rows(args, tokenizer, kind)
    assert len(train) + len(held_out) == 40 and all(len(row.responses) for row in train)


def test_every_flag_that_is_named_exists():
    known = set()
    for script in [*SCRIPTS, "benchmarks/steps.py"]:
        fields = re.findall(r"^    (\w+): .* = ", (ROOT / script).read_text(), re.M)
        known |= {"--" + name.replace("_", "-") for name in fields}
    # of torchrun, pip, rewardbench, hf, lm_eval, alpaca_eval, FastChat and comet-score
    others = "--nproc_per_node --shutdown-timeout --index-url --model_args --tasks --help".split()
    others += "--repo-type --local-dir --batch_size --include_path --output_path".split()
    others += "--model_outputs --model-list --to_json".split()
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
