"""A study: its plan, and what happens to runs that finish, fail or are stopped. Scripts that take
minutes are replaced by one that leaves the same files at once; the slow test runs the real ones.
"""

import json
import shlex
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import pytest
import tyro
from conftest import ROOT

import common
import compare
import evaluate
from evaluation import study

FAKE = """
import json, sys, time
from pathlib import Path
flags = {a[2:]: b for a, b in zip(sys.argv, sys.argv[1:])}
print(*sys.argv, file=open("calls.txt", "a"))
if sys.argv[0] == "evaluate.py":
    facts = {"commit": "abc", "versions": {"torch": "x"}}
    record = {"measured": {"sampled/reward": {"value": 0.4}}, "arguments": {"measure": []}}
    record["curve"] = []
    Path(flags["json"]).write_text(json.dumps(record | {"facts": facts}))
    sys.exit()
folder = Path(flags["output-dir"])
if Path("broken").is_file() and Path("broken").read_text() in folder.name:
    sys.exit("error: this one breaks")
folder.mkdir(parents=True, exist_ok=True)
time.sleep(60 if Path("slow").is_file() else 0)
(folder / "run.json").write_text(json.dumps({"commit": "abc", "source": {}, "hardware": "x"}))
(folder / "metrics.jsonl").write_text(json.dumps({"lr": 0.1, "peak_memory_gib": 0.5}) + "\\n")
"""
SMALL = {"methods": ("dpo", "ppo"), "seeds": (0, 1), "sweep": ("none",)}


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A folder with fake scripts. Returns a function that reads their calls."""
    for name in (*compare.METHODS, "evaluate"):
        (tmp_path / f"{name}.py").write_text(FAKE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["compare.py"])
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    return lambda: Path("calls.txt").read_text().splitlines()


def test_the_committed_rows_are_those_of_the_full_study(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(study, "write", lambda folder, rows, command: None)
    monkeypatch.setattr(compare, "make", None)  # nothing is left to run
    compare.main(compare.Args())
    rows = {row["name"]: row for row in study.read_rows(ROOT / "results" / "tiny")}
    for planned in compare.plan(compare.Args()):
        row = rows.pop(planned["name"])
        assert row | planned | {k: row[k] for k in ("command", "measured_by")} == row
    assert not rows


@pytest.mark.parametrize("quick", [False, True])
def test_every_command_is_valid(quick):
    for row in compare.plan(compare.Args(quick=quick)):
        measured = tyro.cli(evaluate.Args, args=shlex.split(row["measured_by"])[2:])
        assert (measured.baseline, measured.dataset) == ("tiny", "family")
        if "command" in row:
            module = import_module(row["method"])
            args = common.parse(module.Args, module.PRESETS, "", shlex.split(row["command"])[2:])
            assert (args.seed, args.output_dir) == (row["seed"], measured.model)
            usual = vars(module.Args()) | module.PRESETS["tiny"]
            steps = usual["max_steps"] or 300  # sft.py has epochs
            assert args.max_steps == (steps // 3 if quick else steps)
            assert not row["knob"] or getattr(args, row["knob"]) == row["strength"]


def test_another_model():
    args = SMALL | {"seeds": (5,), "model": "gemma-2-2b", "dataset": "tldr"}
    rows = compare.plan(compare.Args(**args | {"sweep": ("dpo",)}))
    assert [row["name"][:10] for row in rows] == ["start", "dpo-s5", "dpo-beta0.", "dpo-beta0."]
    *_, ppo = compare.plan(compare.Args(**args, train_reward="runs/reward", nproc=4))
    start = "torchrun --nproc_per_node=4 ppo.py --model gemma-2-2b --dataset tldr"
    assert ppo["command"].startswith(start) and "--reward runs/reward" in ppo["command"]
    for wrong in ({"model": "gpt2"}, {"dataset": "tldr"}, {"model": "gpt2", "quick": True}):
        with pytest.raises(common.UserError, match="belong together"):
            compare.plan(compare.Args(**wrong))


def test_settings(tmp_path):
    file = tmp_path / "study.json"
    settings = {
        "all": {"lr": 2e-5, "optimizer": "adamw"},
        "online": {"lr": 1e-5},
        "best_of": [2, 8],
    }
    settings |= {"dpo": {"beta": [0.2, 0.5]}, "ppo": {"temperature": 1.0}}
    settings["evaluate"] = {"temperature": 1, "measure": ["a.py:f", "b.py:g"]}
    file.write_text(json.dumps(settings))
    args = SMALL | {"seeds": (0,), "sweep": ("dpo",), "model": "m", "dataset": "d.jsonl"}
    rows = compare.plan(compare.Args(**args, settings=str(file), train_reward="runs/r"))
    assert [row.get("strength", row.get("best_of")) for row in rows] == [None, 2, 8, 0.2, 0.5, 0.05]
    for row, lr, beta in ((rows[3], 2e-5, 0.2), (rows[4], 2e-5, 0.5), (rows[5], 1e-5, None)):
        module = import_module(row["method"])
        words = shlex.split(row["command"])[2:]
        found = common.parse(module.Args, module.PRESETS, "", words)
        assert (found.lr, getattr(found, "beta", None), found.optimizer) == (lr, beta, "adamw")
        measured = tyro.cli(evaluate.Args, args=shlex.split(row["measured_by"])[2:])
        assert measured.temperature == (1.0,) and measured.measure == ("a.py:f", "b.py:g")
    for text, message in (("{", "settings"), ("[]", "object"), ('{"dqo": {}}', "'dqo' is not one")):
        file.write_text(text)
        with pytest.raises(common.UserError, match=message):
            compare.plan(compare.Args(**args, settings=str(file)))


def test_a_row_per_run_and_none_twice(fake, capsys):
    Path("broken").write_text("dpo-s0")
    with pytest.raises(SystemExit, match="1 failed: dpo-s0"):
        compare.main(compare.Args(**SMALL))
    assert "exit code 1: error: this one breaks" in capsys.readouterr().out
    assert len(study.read_rows(Path("results/tiny"))) == 5  # the others went on
    Path("broken").unlink()
    compare.main(compare.Args(**SMALL))
    rows = {row["name"]: row for row in study.read_rows(Path("results/tiny"))}
    assert set(rows) == {"start", "best-of-4", "dpo-s0", "ppo-s0", "dpo-s1", "ppo-s1"}
    ppo = rows["ppo-s1"]
    assert (ppo["knob"], ppo["strength"], ppo["peak_memory_gib"]) == ("kl_coef", 0.1, 0.5)
    assert ppo["seconds"] is not None and "seconds" not in rows["start"]
    first = fake()
    compare.main(compare.Args(**SMALL))
    compare.main(compare.Args(report=True))
    assert fake() == first
    assert "| dpo | 2 | 0.400 (0.400 to 0.400) |" in Path("results/tiny/README.md").read_text()
    with pytest.raises(common.UserError, match="is of another command"):
        compare.main(compare.Args(**SMALL, prompts=64))


@pytest.mark.slow
def test_a_signal_stops_a_study_and_the_same_command_continues(fake):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import compare; compare.main("
    command = [sys.executable, "-c", f"{code}compare.Args(methods=('dpo',), sweep=()))"]
    Path("slow").touch()
    process, deadline = subprocess.Popen(command), time.monotonic() + 120
    while not Path("runs/tiny/dpo-s0").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.terminate()
    assert process.wait(50) == 1  # the run of 60 seconds was stopped too
    assert {row["name"] for row in study.read_rows(Path("results/tiny"))} == {"start", "best-of-4"}
    Path("slow").unlink()
    subprocess.run(command, check=True)
    rows = {row["name"]: row for row in study.read_rows(Path("results/tiny"))}
    assert len(rows) == 5 and rows["dpo-s0"]["seconds"] is None  # resumed: not all of its seconds


@pytest.mark.slow
def test_the_real_scripts(tmp_path):
    """Two steps and a few questions, in a copy of the tree."""
    for path in ROOT.iterdir():
        if path.name not in ("results", "runs"):
            (tmp_path / path.name).symlink_to(path)
    flags = "--methods rloo --seeds 3 --max-steps 2 --prompts 16".split()
    subprocess.run([sys.executable, "compare.py", *flags], cwd=tmp_path, check=True)
    rows = {row["name"]: row for row in study.read_rows(tmp_path / "results" / "tiny")}
    assert set(rows) == {"start", "best-of-4", "rloo-s3"}
    assert all(0 <= study.value(row, "sampled/reward") <= 1 for row in rows.values())
    assert [point["step"] for point in rows["rloo-s3"]["curve"]] == [1, 2]
    assert abs(study.value(rows["start"], "sampled/kl")) < 1e-6
    assert (tmp_path / "results" / "tiny" / "frontier.png").stat().st_size > 10_000
