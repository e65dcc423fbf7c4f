"""The study: its plan, and what becomes of runs that are finished, killed, broken or of another
study. Scripts that take minutes are replaced by one that leaves the same files at once; the slow
test runs the real ones.
"""

import json
import os
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import pytest
import tyro

import common
import compare
import evaluate
import study

FAKE = """
import json, os, sys, time
from pathlib import Path
argv = sys.argv[1:]
flags = {a[2:]: b for a, b in zip(argv, argv[1:]) if a.startswith("--")}
with open("calls.txt", "a") as f:
    f.write(" ".join([Path(sys.argv[0]).name, *argv]) + "\\n")
if Path(sys.argv[0]).name == "evaluate.py":
    value = lambda x: {"value": x, "low": x - 0.02, "high": x + 0.02, "n": 64}
    measured = {"sampled/reward": value(0.4), "greedy/reward": value(0.5), "sampled/kl": value(1.0),
                "sampled/length": value(3.5), "sampled/win_rate": value(0.6)}
    lengths = {"sampled": [{"length": 3, "n": 64, "reward": 0.4}]}
    record = {"measured": measured, "by_length": lengths, "curve": [],
              "facts": {"commit": "abc", "versions": {"torch": "x"}}}
    Path(flags["json"]).write_text(json.dumps(record))
    sys.exit(0)
folder = Path(flags["output-dir"])
name = folder.name
folder.mkdir(parents=True, exist_ok=True)
if Path("broken").is_file() and Path("broken").read_text() in name:
    print("error: this one breaks")
    sys.exit(1)
(folder / "gpus").write_text(os.environ.get("CUDA_VISIBLE_DEVICES", "none"))
time.sleep(float(os.environ.get("FAKE_SECONDS", "0")))
command = " ".join([Path(sys.argv[0]).name, *argv])
(folder / "run.json").write_text(json.dumps({"command": command, "commit": "abc", "source": {}}))
step = {"step": 1, "lr": 0.1, "peak_memory_gib": 0.5}
(folder / "metrics.jsonl").write_text(json.dumps(step) + "\\n" + json.dumps({"step": 1}) + "\\n")
(folder / "checkpoint-1").mkdir(exist_ok=True)
(folder / "checkpoint-1" / "manifest.json").write_text("{}")
(folder / "summary.txt").write_text("done")
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A folder with scripts of the same names that are done at once; what they were asked."""
    for name in (*compare.METHODS, "evaluate"):
        (tmp_path / f"{name}.py").write_text(FAKE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common, "HERE", tmp_path)
    monkeypatch.setattr(compare, "_gpus", lambda: [])
    monkeypatch.setattr(study, "write", lambda folder, rows, about: [])
    handler = signal.getsignal(signal.SIGTERM)
    yield tmp_path
    signal.signal(signal.SIGTERM, handler)


def calls(folder: Path) -> list[str]:
    file = folder / "calls.txt"
    return file.read_text().splitlines() if file.is_file() else []


def args(**changed) -> compare.Args:
    usual = {"methods": ("dpo", "ppo"), "seeds": (0, 1), "sweep": ("none",), "jobs": 2}
    return compare.Args(**usual | changed)


# -- the plan


def test_the_full_study_has_every_method_seed_and_strength():
    cells = compare.plan(compare.Args())
    assert len({cell.name for cell in cells}) == len(cells)
    for method in compare.METHODS:
        own = [cell for cell in cells if cell.method == method]
        assert [cell.seed for cell in own if cell.default] == [0, 1, 2]
        swept = [cell for cell in own if not cell.default]
        assert len(swept) == (2 if method in ("dpo", "simpo", "kto", "ppo") else 0)
        assert all(cell.seed == 0 for cell in swept)
        strengths = [cell.strength for cell in own if cell.seed == 0]
        assert len(set(strengths)) == len(strengths)  # three with the default's
    assert [cell.name for cell in cells if not cell.train] == ["start", "best-of-4"]


def test_the_quick_study_has_every_method():
    cells = compare.plan(compare.Args(quick=True))
    assert {cell.method for cell in cells} == {"start", "best-of-4", *compare.METHODS}
    assert all(cell.default and cell.seed in (0, None) for cell in cells)
    for cell in cells:
        if cell.train:
            usual = 300  # for sft.py, whose settings for `tiny` make it from random weights
            if cell.method != "sft":
                usual = import_module(cell.method).SETTINGS["tiny"]["max_steps"]
            assert cell.train[cell.train.index("--max-steps") + 1] == str(usual // 3)


@pytest.mark.parametrize("quick", [False, True])
def test_every_command_is_understood_by_its_script(quick):
    """Flags exist, and say what the cell says."""
    for cell in compare.plan(compare.Args(quick=quick)):
        measured = tyro.cli(evaluate.Args, args=cell.measure[2:])
        assert measured.baseline == "tiny" and measured.dataset == "family"
        if not cell.train:
            continue
        module = import_module(cell.method)
        asked = tyro.cli(module.Args, args=cell.train[2:])
        assert asked.seed == cell.seed and asked.output_dir == measured.model
        common.fill_in(asked, module.SETTINGS)
        common.check_shared(asked)
        if cell.knob:
            assert getattr(asked, cell.knob) == cell.strength


def test_strengths_of_another_model_are_a_third_and_three_times_its_own():
    asked = compare.Args(
        methods=("dpo", "ppo"), seeds=(5,), sweep=("dpo",), model="gemma-2-2b", dataset="tldr"
    )
    cells = compare.plan(asked)
    assert [cell.name for cell in cells] == [
        "start",
        "dpo-s5",
        "dpo-beta0.033-s5",
        "dpo-beta0.3-s5",
    ]
    assert [cell.strength for cell in cells[1:]] == [
        0.1,
        0.033,
        0.3,
    ]  # no PPO: nothing to learn from
    assert asked.name == "gemma-2-2b-tldr"
    with_reward = compare.plan(
        compare.Args(
            methods=("ppo",), seeds=(5,), sweep=("none",), model="gemma-2-2b", dataset="tldr",
            train_reward="runs/reward", nproc=4,
        )
    )  # fmt: skip
    ppo = with_reward[-1]
    assert ppo.train[ppo.train.index("--reward") + 1] == "runs/reward"
    assert compare.shown(ppo.train).startswith("torchrun --nproc_per_node=4 ppo.py --model gemma")


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"methods": ("dop",)}, "no method 'dop'"),
        ({"sweep": ("all",)}, "no method 'all'"),
        ({"methods": ()}, "at least one"),
        ({"jobs": 0}, "--jobs must be 1 or more"),
        ({"model": "gpt2"}, "belong together"),
        ({"dataset": "tldr"}, "belong together"),
        ({"quick": True, "model": "gpt2", "dataset": "tldr"}, "--max-steps"),
    ],
)
def test_what_cannot_be_planned_is_told(changed, told):
    with pytest.raises(common.UserError, match=told):
        compare.plan(args(**changed))


# -- running it


def test_a_row_a_run_and_none_twice(fake, capsys):
    assert compare.main(args()) == 0
    names = {"start", "best-of-4", "dpo-s0", "ppo-s0", "dpo-s1", "ppo-s1"}
    rows = {row["name"]: row for row in study.read_rows(Path("results/tiny"))}
    assert set(rows) == names
    first = calls(fake)
    assert len(first) == 2 + 4 * 2
    assert rows["ppo-s1"]["strength"] == 0.1 and rows["ppo-s1"]["knob"] == "kl_coef"
    assert rows["ppo-s1"]["peak_memory_gib"] == 0.5 and rows["ppo-s1"]["steps"] == 1
    assert rows["start"]["seed"] is None and "seconds" not in rows["start"]
    assert "[6/6]" in capsys.readouterr().out
    assert not list(Path("runs/tiny").glob("*.cache"))

    assert compare.main(args()) == 0  # everything has its row
    assert calls(fake) == first
    assert compare.main(args(seeds=(0, 1, 2))) == 0  # only what is new
    assert len(calls(fake)) == len(first) + 4


def test_a_finished_training_without_a_row_is_only_measured(fake):
    compare.main(args(methods=("dpo",), seeds=(0,)))
    Path("results/tiny/rows/dpo-s0.json").unlink()
    Path("calls.txt").unlink()
    compare.main(args(methods=("dpo",), seeds=(0,)))
    assert [call.split()[0] for call in calls(fake)] == ["evaluate.py"]


def test_a_run_that_fails_does_not_stop_the_others(fake, capsys):
    Path("broken").write_text("dpo-s0")
    assert compare.main(args()) == 1
    told = capsys.readouterr().out
    assert "dpo-s0: failed: exit code 1: error: this one breaks" in told
    assert "1 failed: dpo-s0" in told
    assert not Path("results/tiny/rows/dpo-s0.json").exists()
    assert len(study.read_rows(Path("results/tiny"))) == 5
    Path("broken").unlink()
    assert compare.main(args()) == 0
    assert len(study.read_rows(Path("results/tiny"))) == 6


def test_a_row_of_another_study_is_refused(fake):
    compare.main(args(methods=("dpo",), seeds=(0,)))
    with pytest.raises(common.UserError, match="another study"):
        compare.main(args(methods=("dpo",), seeds=(0,), prompts=64))
    Path("results/tiny/rows/dpo-s0.json").write_text("{")
    with pytest.raises(common.UserError, match="no row of a study"):
        compare.main(args(methods=("dpo",), seeds=(0,)))


def test_seconds_are_those_of_all_attempts_until_the_last_checkpoint(tmp_path):
    folder = tmp_path / "run"
    (folder / "checkpoint-2").mkdir(parents=True)
    saved = folder / "checkpoint-2" / "manifest.json"
    saved.write_text("{}")
    os.utime(saved, (1_000, 1_000))
    attempts = tmp_path / "attempts.json"
    # 30 s until it was killed, then 40 s until the checkpoint; 25 s of measuring do not count.
    attempts.write_text(json.dumps([{"began": 900, "ended": 930}, {"began": 960, "ended": 1_025}]))
    assert compare.seconds_of(attempts, folder) == 70


def test_an_attempt_that_was_killed_counts_until_what_it_had_saved(fake):
    asked = args(methods=("dpo",), seeds=(0,))
    cells = compare.plan(asked)
    runner = compare.Study(asked, cells)
    folder = Path("runs/tiny/dpo-s0")
    (folder / "checkpoint-1").mkdir(parents=True)
    saved = folder / "checkpoint-1" / "manifest.json"
    saved.write_text("{}")
    os.utime(saved, (500, 500))
    Path("runs/tiny/dpo-s0.attempts.json").write_text(json.dumps([{"began": 480}]))
    assert runner.train(next(cell for cell in cells if cell.train), 0) is None
    attempts = json.loads(Path("runs/tiny/dpo-s0.attempts.json").read_text())
    assert attempts[0] == {"began": 480, "ended": 500} and len(attempts) == 2


def test_the_commit_is_that_of_the_files_that_ran(tmp_path, monkeypatch):
    def git(*words: str) -> str:
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *words]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True).stdout.strip()

    monkeypatch.setattr(common, "HERE", tmp_path)
    (tmp_path / "kernels").mkdir()
    git("init", "-q")
    for name in ("dpo.py", "kernels/token_logps.py"):
        (tmp_path / name).write_text(name)
    git("add", ".")
    git("commit", "-qm", "one")
    first = git("log", "-1", "--format=%h")
    (tmp_path / "README.md").write_text("what has nothing to do with it")
    git("add", ".")
    git("commit", "-qm", "two")
    files = (tmp_path / "dpo.py", tmp_path / "kernels" / "token_logps.py")
    source = {file.name: common.file_hash(file) for file in files}
    assert first and compare.commit_of(source) == first
    assert compare.commit_of(source | {"dpo.py": "another"}) is None  # changed since it ran
    (tmp_path / "dpo.py").write_text("not committed")
    source["dpo.py"] = common.file_hash(tmp_path / "dpo.py")
    assert compare.commit_of(source) is None


def test_each_run_has_gpus_of_its_own(fake, monkeypatch):
    monkeypatch.setattr(compare, "_gpus", lambda: ["0", "1", "2", "3"])
    monkeypatch.setattr(compare, "_hardware", lambda gpus: "four")
    monkeypatch.setattr(compare, "_launched", lambda script, nproc: [sys.executable, script])
    monkeypatch.setenv("FAKE_SECONDS", "0.4")
    asked = args(jobs=None, nproc=2)
    assert compare.main(asked) == 0
    seen = {(run.parent.name, run.read_text()) for run in Path("runs/tiny").glob("*/gpus")}
    assert {gpus for _, gpus in seen} == {"0,1", "2,3"}


@pytest.mark.slow
def test_a_signal_stops_the_runs_and_the_same_command_goes_on(fake):
    """In a process of its own, with real signals."""
    script = fake / "start.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(Path(compare.__file__).parent)!r})\n"
        "import common, compare, study\n"
        "from pathlib import Path\n"
        "common.HERE = Path.cwd()\n"
        "compare._gpus = lambda: []\n"
        "study.write = lambda *_: []\n"
        "raise SystemExit(compare.main(compare.Args(methods=('dpo',), seeds=(0, 1, 2),"
        " sweep=('none',), jobs=1)))\n"
    )
    env = os.environ | {"FAKE_SECONDS": "60"}
    process = subprocess.Popen([sys.executable, script], env=env, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not any("dpo.py" in call for call in calls(fake)) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    told, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "stopped" in told
    assert sum("dpo.py" in call for call in calls(fake)) == 1  # no other was begun
    assert {row["name"] for row in study.read_rows(Path("results/tiny"))} == {"start", "best-of-4"}
    again = subprocess.run([sys.executable, script], env=os.environ | {"FAKE_SECONDS": "0"})
    assert again.returncode == 0
    assert len(study.read_rows(Path("results/tiny"))) == 5


def test_the_report_can_be_made_again_from_the_rows(fake, monkeypatch):
    with pytest.raises(common.UserError, match="no row yet"):
        compare.main(args(report=True))
    compare.main(args(methods=("dpo",), seeds=(0,)))
    before, seen = calls(fake), {}
    monkeypatch.setattr(study, "write", lambda folder, rows, about: seen.update(about))
    compare.main(args(methods=("dpo",), seeds=(0,), report=True))
    assert calls(fake) == before
    assert seen["command"] == "python compare.py --methods dpo --seeds 0 --sweep none"
    assert "0.0 hours of training" in seen["wall-clock"] and "still to come" not in seen
    compare.main(args(methods=("dpo",), seeds=(0, 3), report=True))
    assert seen["still to come"] == "dpo-s3"


def test_it_is_started_where_its_scripts_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(common.UserError, match="start it in"):
        compare.main(args())


@pytest.mark.slow
def test_the_real_scripts(tmp_path):
    """Two steps of two methods on a few questions, in a copy of the tree, and the report."""
    root = Path(compare.__file__).parent
    for path in root.iterdir():
        if path.suffix == ".py" or path.name in ("tiny", "kernels"):
            (tmp_path / path.name).symlink_to(path)
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "compare.py", "--methods", "simpo", "rso", "--seeds", "3"]
    command += ["--sweep", "simpo", "--max-steps", "2", "--prompts", "16", "--jobs", "2"]
    copy = "import common, runpy, sys, pathlib; common.HERE = pathlib.Path.cwd(); "
    copy += "sys.argv = sys.argv[1:]; runpy.run_path('compare.py', run_name='__main__')"
    # rso.py samples to 2,000 prompts: too long for a test.
    started = [sys.executable, "-c", copy, *command[1:]]
    (tmp_path / "rso.py").unlink()
    text = (root / "rso.py").read_text().replace('"prompts": 2000', '"prompts": 16')
    (tmp_path / "rso.py").write_text(text)
    done = subprocess.run(started, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = study.read_rows(tmp_path / "results" / "tiny")
    assert {row["name"] for row in rows} == {
        "start", "best-of-4", "simpo-s3", "simpo-beta0.7-s3", "simpo-beta6-s3", "rso-s3",
    }  # fmt: skip
    for row in rows:
        assert 0 <= row["measured"]["sampled/reward"]["value"] <= 1
        if row["method"] in ("simpo", "rso"):
            assert [point["step"] for point in row["curve"]] == [1, 2] * row["default"]
            assert 0 < row["seconds"] < 600
    start = next(row for row in rows if row["name"] == "start")
    assert abs(start["measured"]["sampled/kl"]["value"]) < 1e-6
    report = (tmp_path / "results" / "tiny" / "README.md").read_text()
    assert "simpo" in report and "frontier.png" in report
    assert (tmp_path / "results" / "tiny" / "frontier.png").stat().st_size > 10_000
