"""Runs of the offline methods on tiny models: they train, divide, stop, continue and export."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace
from functools import partial
from importlib import import_module
from pathlib import Path

import pytest
import torch
from conftest import (
    ROOT,
    all_float64,
    labelled_rows,
    pair_rows,
    ranked_rows,
    run_script,
    start_script,
    write_jsonl,
)
from whole_runs import (
    OWN,
    SMALL,
    as_flags,
    assert_close,
    assert_same_run,
    crash,
    lines_of,
    steps_of,
    stop_after,
    train,
    weights_of,
    without_timings,
)

import common
import dpo
import kto
import sft
from training import checkpoint, parallel, run_folder

KINDS = {"kto": labelled_rows, "pro": ranked_rows, "listwise_dpo": ranked_rows, "rrhf": ranked_rows}
WITH_REFERENCE = ("dpo", "ipo", "kto", "listwise_dpo")
pytestmark = pytest.mark.usefixtures("fresh_process")


@pytest.fixture(scope="session")
def rows(tmp_path_factory):
    """rows(script) -> 60 rows of the kind that it needs: 3 are held out, an epoch has 7 steps."""
    folder = tmp_path_factory.mktemp("rows")

    def get(script: str) -> Path:
        make = KINDS.get(script, pair_rows)
        file = folder / f"{make.__name__}.jsonl"
        return file if file.is_file() else write_jsonl(file, make(60))

    return get


@pytest.fixture
def run(checkpoints, rows):
    """run(script, folder, **flags) -> exit status."""

    def start(script: str, folder: str, architecture: str = "llama", **flags) -> int:
        method = import_module(script)
        return train(method, checkpoints(architecture), rows(script), folder, **flags)

    return start


# -- what a run leaves


@pytest.mark.parametrize("script", OWN)
def test_every_method_trains_and_exports(run, script, capsys):
    assert run(script, "out", max_steps=2, eval_every=0) == 0
    folder, steps = Path("out"), steps_of("out")
    assert [line["step"] for line in steps] == [1, 2]
    assert all(math.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in steps)
    names = {path.name for path in folder.iterdir()}
    assert {"run.json", f"{script}.py", "common.py", "samples.jsonl", "summary.txt"} <= names
    record = json.loads((folder / "run.json").read_text())
    assert record["arguments"]["lr"] == 1e-3 and record["processes"] == 1
    assert {p.name for p in (folder / "checkpoint-2").iterdir()} == {
        "state.safetensors", "state.json", "sha256.json",
    }  # fmt: skip
    held_out = [line for line in lines_of("out") if "eval/loss" in line]
    assert [line["step"] for line in held_out] == [0, 2]

    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, loaded = AutoTokenizer.from_pretrained("out"), common.load_tokenizer("out")
    ids = tokenizer("the cat sat?", return_tensors="pt").input_ids
    assert loaded.stop_ids == {tokenizer.eos_token_id}
    assert AutoModelForCausalLM.from_pretrained("out")(ids).logits.isfinite().all()
    assert "held-out loss" in capsys.readouterr().out
    assert not list(folder.rglob("*.pt")) + list(folder.rglob("*.bin"))  # nothing is pickled


@pytest.mark.parametrize("architecture", ["gpt2", "gemma2", "qwen2"])
def test_other_architectures(run, architecture):
    assert run("dpo", "out", architecture, max_steps=2, export_dtype="bfloat16") == 0
    assert json.loads(Path("out/config.json").read_text())["dtype"] == "bfloat16"


def test_first_loss_is_ln_2_also_from_the_cache(run, checkpoints, capsys):
    for folder, words in (("one", ()), ("two", ("log-probs from",))):
        assert run("dpo", folder, max_steps=1) == 0
        out = capsys.readouterr().out
        assert all(word in out for word in words)
        assert steps_of(folder)[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert run("dpo", "same", ref_model=str(checkpoints("llama")), max_steps=1) == 0
    assert steps_of("same")[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    for file in Path("runs/.cache").glob("ref-*"):  # a damaged cache is computed again
        data = bytearray(file.read_bytes())
        data[-3] ^= 1
        file.write_bytes(data)
    assert run("dpo", "three", max_steps=1) == 0
    assert "computed again" in capsys.readouterr().out
    assert steps_of("three")[0] | {"step": 1} and weights_of("three") == weights_of("one")


def test_a_soup_is_the_weighted_mean(run, checkpoints):
    assert run("sft", "other", max_steps=2) == 0
    base = str(checkpoints("llama"))
    assert run("dpo", "soup", ref_model=f"{base}+other", soup_weight=1.0, max_steps=1) == 0
    assert steps_of("soup")[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert run("dpo", "half", ref_model=f"{base}+other", max_steps=1) == 0
    assert abs(steps_of("half")[0]["loss"] - math.log(2)) > 1e-5


# -- dividing a step changes nothing


@pytest.mark.parametrize("script", OWN)
def test_micro_batches_and_optimisations_change_nothing(run, script):
    exact = {"dtype": "float64", "max_steps": 3, "lr": 1e-4}
    plain = {"share_prompt": False, "fused_logps": False, "gradient_checkpointing": True}
    with all_float64():
        assert run(script, "whole", micro_batch_size=8, **exact) == 0
        assert run(script, "parts", micro_batch_size=2, **exact, **plain) == 0
    assert_close("whole", "parts", 1e-7)  # exported in fp32


@pytest.mark.slow
@pytest.mark.parametrize("script, several", [("dpo", (2, 4)), ("kto", (2,)), ("sft", (2,))])
def test_processes_change_nothing(checkpoints, rows, tmp_path, script, several):
    flags = SMALL | OWN[script] | {"dtype": "float64", "max_steps": 3, "micro_batch_size": 2}
    flags |= {"model": checkpoints("llama"), "dataset": rows(script), "lr": 1e-4}
    for processes in (1, *several):
        where = {"output_dir": tmp_path / str(processes), "cache_dir": tmp_path / "cache"}
        status, _, err = run_script(f"{script}.py", *as_flags(**flags | where), processes=processes)
        assert status == 0, err
    for processes in several:
        assert_close(tmp_path / "1", tmp_path / str(processes))


# -- resume


@pytest.mark.parametrize("script", ["dpo", "kto", "sft"])
@pytest.mark.parametrize("optimizer, schedule", [("adamw", "cosine"), ("rmsprop", "inverse-sqrt")])
def test_a_crashed_run_continues_to_the_same_end(run, monkeypatch, script, optimizer, schedule):
    flags = {"optimizer": optimizer, "schedule": schedule, "warmup_ratio": 0.3}
    assert run(script, "whole", **flags) == 0
    with monkeypatch.context() as patch:
        stop_after(patch, 3, crash)
        with pytest.raises(RuntimeError):
            run(script, "broken", **flags)
    assert run(script, "broken", **flags) == 0
    assert_same_run("whole", "broken")


@pytest.mark.parametrize("moment", ["first evaluation", "step 3", "last step"])
def test_a_signal_saves_and_the_run_continues(run, monkeypatch, capsys, moment):
    assert run("dpo", "whole") == 0
    send = lambda *_: os.kill(os.getpid(), signal.SIGTERM)  # noqa: E731
    with monkeypatch.context() as patch:
        if moment == "first evaluation":
            record = common.Run.record
            patch.setattr(common.Run, "record", lambda self, m: (send(), record(self, m)))
        else:
            stop_after(patch, 3 if moment == "step 3" else 5, send)
        assert run("dpo", "stopped") == 128 + signal.SIGTERM
    assert "is saved in stopped" in capsys.readouterr().out
    assert run("dpo", "stopped") == 0
    assert_same_run("whole", "stopped")


def test_a_signal_before_there_is_something_to_save(run, monkeypatch):
    compute = common.compute_logps

    def interrupted(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return compute(*args)

    with monkeypatch.context() as patch:
        patch.setattr(common, "compute_logps", interrupted)
        assert run("dpo", "out") == 128 + signal.SIGTERM
    assert not list(Path("out").glob("checkpoint-*"))
    assert run("dpo", "out") == 0


def test_a_crash_while_a_checkpoint_is_written(run, monkeypatch):
    assert run("dpo", "whole") == 0
    with monkeypatch.context() as patch:
        seal, count = checkpoint.seal, []

        def fails(*what):
            count.append(1)
            if len(count) == 2:
                raise RuntimeError("the disk failed")
            seal(*what)

        patch.setattr(checkpoint, "seal", fails)
        with pytest.raises(RuntimeError):
            run("dpo", "broken")
    assert [p.name for p in Path("broken").glob("checkpoint-*")] == ["checkpoint-2"]
    assert run("dpo", "broken") == 0
    assert_same_run("whole", "broken")


@pytest.mark.parametrize("damage", ["flipped", "truncated", "no state", "no sums"])
def test_a_damaged_checkpoint(run, monkeypatch, capsys, damage):
    assert run("dpo", "whole", keep_last=3) == 0
    with monkeypatch.context() as patch:
        stop_after(patch, 5, crash)
        with pytest.raises(RuntimeError):
            run("dpo", "broken", keep_last=3)

    def harm(folder: Path) -> None:
        file = folder / "state.safetensors"
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        if damage == "no sums":
            (folder / "sha256.json").unlink(missing_ok=True)
        elif damage == "no state":
            (folder / "state.json").write_text("{")
        else:
            file.write_bytes(data if damage == "flipped" else data[:-9])

    harm(Path("broken/checkpoint-4"))
    assert run("dpo", "broken", keep_last=3) == 0
    assert "checkpoint-4 is damaged" in capsys.readouterr().out
    assert_same_run("whole", "broken")
    (Path("broken") / "summary.txt").unlink()
    assert len(list(Path("broken").glob("damaged-*-checkpoint-4"))) == 1
    for folder in Path("broken").glob("checkpoint-*"):
        harm(folder)
    with pytest.raises(ValueError, match="every checkpoint in broken is damaged"):
        run("dpo", "broken", keep_last=3)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_kill_9(checkpoints, rows, tmp_path, processes):
    flags = SMALL | {"model": checkpoints("llama"), "dataset": rows("dpo"), "max_steps": 40}
    flags |= {"eval_every": 10, "save_every": 3}
    flags |= {"cache_dir": tmp_path / "cache"}

    def words(folder: str) -> list[str]:
        return [*as_flags(**flags, output_dir=tmp_path / folder), "--deterministic"]

    assert run_script("dpo.py", *words("whole"), processes=processes)[0] == 0
    process = start_script("dpo.py", *words("killed"), processes=processes, start_new_session=True)
    while not list((tmp_path / "killed").glob("checkpoint-*")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    subprocess.run(["pkill", "-9", "-f", str(tmp_path / "killed")])  # torchrun's children
    process.communicate()
    time.sleep(1)
    assert not (tmp_path / "killed" / "model.safetensors").exists(), "it had finished already"
    status, out, err = run_script("dpo.py", *words("killed"), processes=processes)
    assert status == 0 and "resume" in out, err
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_signal_to_real_processes(checkpoints, rows, tmp_path, processes):
    flags = SMALL | {"model": checkpoints("llama"), "dataset": rows("dpo"), "max_steps": 4000}
    words = as_flags(**flags, output_dir=tmp_path / "out", cache_dir=tmp_path / "cache")
    process = start_script("dpo.py", *words, processes=processes)
    while not list((tmp_path / "out").glob("checkpoint-*")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode != 0 and "is saved in" in out, err
    step = int(out.rpartition("stopped: step ")[2].split()[0])
    assert (tmp_path / "out" / f"checkpoint-{step}").is_dir()


# -- whose folder it is


@pytest.mark.parametrize(
    "changed, named",
    [
        ({"lr": 2e-3}, "--lr was 0.001, now 0.002"),
        ({"seed": 1}, "--seed was 0, now 1"),
        ({"beta": 0.4}, "--beta was 0.5, now 0.4"),
        ({"max_steps": 3}, "--max-steps was 6, now 3"),
    ],
)
def test_another_run_is_refused(run, changed, named):
    assert run("dpo", "out") == 0
    with pytest.raises(ValueError, match=named):
        run("dpo", "out", **changed)


def test_changed_rows_models_scripts_and_sources_are_refused(
    run, checkpoints, rows, tmp_path, monkeypatch
):
    import shutil

    model, data = tmp_path / "model", tmp_path / "rows.jsonl"
    shutil.copytree(checkpoints("llama"), model)
    shutil.copy(rows("dpo"), data)
    with monkeypatch.context() as patch:
        stop_after(patch, 3, crash)
        with pytest.raises(RuntimeError):
            train(dpo, model, data, "out")
    text = data.read_text()
    data.write_text(text.replace(" yes ", " yes yes ", 1))
    with pytest.raises(ValueError, match="--dataset"):
        train(dpo, model, data, "out")
    data.write_text(text)
    assert run("sft", "trained", max_steps=1) == 0
    shutil.copy("trained/model.safetensors", model)
    with pytest.raises(ValueError, match="--model|--ref-model"):
        train(dpo, model, data, "out")
    with pytest.raises(ValueError, match="a run of dpo.py"):
        run("sft", "out")
    record = json.loads(Path("out/run.json").read_text())
    record["source"]["common.py"] = "0" * 64
    Path("out/run.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="common.py has changed"):
        run("dpo", "out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("do not touch")
    with pytest.raises(ValueError, match="is not empty and holds no run"):
        run("dpo", "mine")


def test_finished_longer_and_never(run, capsys):
    assert run("dpo", "out", max_steps=4) == 0
    before = without_timings("out")
    capsys.readouterr()
    assert run("dpo", "out", max_steps=4) == 0  # prints its result again
    out = capsys.readouterr().out
    assert "4 steps in" in out and "--resume never" in out and without_timings("out") == before
    assert run("dpo", "out", max_steps=4, resume="never") == 0
    assert without_timings("out-2") == before
    assert run("dpo", "out") == 0  # constant learning rate: more steps continue the run
    assert run("dpo", "whole") == 0
    assert weights_of("out") == weights_of("whole")
    assert run("dpo", "out", micro_batch_size=2, save_every=1, eval_every=0) == 0  # bookkeeping


def test_a_finished_run_whose_rows_or_model_changed_is_refused(checkpoints, rows, capsys):
    """It must not print the old result. If only its exported model is gone, it exports again."""
    own = Path("rows.jsonl")
    own.write_bytes(rows("dpo").read_bytes())
    model = Path(shutil.copytree(checkpoints("llama"), "start"))
    again = partial(train, dpo, model, own, "out", max_steps=2)
    assert again() == 0
    weights = weights_of("out")
    (Path("out") / "model.safetensors").unlink()
    assert again() == 0
    assert weights_of("out") == weights
    capsys.readouterr()
    assert again() == 0
    assert "finished" in capsys.readouterr().out
    with pytest.raises(ValueError, match="out holds another run: what --dataset names has changed"):
        own.write_text(own.read_text().replace("cat", "dog"))
        again()
    own.write_bytes(rows("dpo").read_bytes())
    with pytest.raises(ValueError, match="out holds another run: what --model names has changed"):
        config = json.loads((model / "config.json").read_text()) | {"rms_norm_eps": 1e-3}
        (model / "config.json").write_text(json.dumps(config))
        again()


def test_a_batch_that_was_not_asked_for_is_lowered(run, capsys):
    """60 rows, 57 of them for training."""
    lowered = Namespace(batch_size=64, given=set())
    run_folder.fit_batch_size(lowered, 57, 2)
    assert lowered.batch_size == 6 and "--batch-size 6" in capsys.readouterr().out
    with pytest.raises(ValueError, match="at most 57"):
        run("dpo", "out", batch_size=64)


def test_a_second_run_in_the_same_folder_is_refused(run, monkeypatch):
    def start_another(first) -> None:
        with pytest.raises(ValueError, match="another process is training in out"):
            run("dpo", "out")

    stop_after(monkeypatch, 1, start_another)
    assert run("dpo", "out", max_steps=2) == 0


# -- updates that are not finite


def spoil(monkeypatch, steps: set[int]) -> None:
    clip = common.clip_gradients
    count = []

    def spoiled(module, max_norm):
        count.append(1)
        norm = clip(module, max_norm)
        return norm * math.nan if len(count) in steps else norm

    monkeypatch.setattr(common, "clip_gradients", spoiled)


def test_an_update_that_is_not_finite_is_skipped(run, monkeypatch):
    spoil(monkeypatch, {2})
    assert run("dpo", "out") == 0
    assert [line["skipped"] for line in steps_of("out")] == [0, 1, 0, 0, 0, 0]
    assert all(math.isfinite(line["loss"]) for line in steps_of("out"))


def test_three_in_a_row_stop_the_run(run, monkeypatch):
    spoil(monkeypatch, {3, 4, 5})
    with pytest.raises(ValueError, match="no finite gradient in steps 3 to 5"):
        run("dpo", "out")
    assert [p.name for p in Path("out").glob("checkpoint-*")] == ["checkpoint-2"]


def test_gradients_are_clipped(run):
    assert run("dpo", "free", max_grad_norm=0.0, optimizer="rmsprop", max_steps=2) == 0
    assert run("dpo", "same", max_grad_norm=1e9, optimizer="rmsprop", max_steps=2) == 0
    assert weights_of("free") == weights_of("same")
    grads = torch.nn.Linear(3, 2)
    for p in grads.parameters():
        p.grad = torch.full_like(p, 2.0)
    assert common.clip_gradients(grads, 1.0) == pytest.approx(math.sqrt(8 * 4))
    norm = math.sqrt(sum(float((p.grad**2).sum()) for p in grads.parameters()))
    assert norm == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "inverse-sqrt"])
def test_learning_rates(schedule):
    factor = [common.lr_factor(schedule, 0.2, 10, step) for step in range(10)]
    assert factor[:2] == [0.5, 1.0]
    after = {
        "constant": [1.0] * 8,
        "linear": [1 - k / 8 for k in range(8)],
        "cosine": [(1 + math.cos(math.pi * k / 8)) / 2 for k in range(8)],
        "inverse-sqrt": [math.sqrt(2 / (k + 3)) for k in range(8)],
    }
    assert factor[2:] == pytest.approx(after[schedule])


# -- the command line


def test_help_shows_the_numbers_of_the_preset(capsys):
    for words, shown in (
        (["--help"], ["--beta FLOAT", "(default: 0.3)", "default: 300"]),
        (["--model", "gemma-2-2b", "--help"], ["(default: tldr)", "(default: 1e-07)"]),
        (["--model=some/other", "--help"], ["(default: 0.1)", "(default: 1e-06)"]),
    ):
        with pytest.raises(SystemExit):
            common.parse(dpo.Args, dpo.PRESETS, dpo.__doc__, words)
        out = " ".join(capsys.readouterr().out.replace("│", " ").split())
        assert all(text in out for text in shown), (words, shown)


def test_flags_override_presets():
    args = common.parse(kto.Args, kto.PRESETS, "", ["--beta", "2", "--no-share-prompt"])
    assert (args.beta, args.share_prompt, args.lr, args.max_steps) == (2.0, False, 1e-4, 300)
    assert args.given == {"beta", "share_prompt"} and args.preset["lr"] == 1e-4
    args = common.parse(dpo.Args, dpo.PRESETS, "", ["--epochs", "2", "--lr=1e-5"])
    assert args.max_steps is None and args.epochs == 2 and args.given == {"epochs", "lr"}
    args = common.parse(sft.Args, sft.PRESETS, "", ["--max_steps", "4"])
    assert args.max_steps == 4


def test_errors_are_one_line(tmp_path):
    (tmp_path / "file").touch()
    for words, text in (
        (["--lr", "nan"], "--lr must be a finite number"),
        (["--dataset", "no.jsonl"], "no.jsonl: there is no such file"),
        (["--model", "./none", "--dataset", "family"], "there is no such folder"),
        (["--output-dir", "file/out"], "Not a directory: file/out"),
    ):
        command = [sys.executable, str(ROOT / "dpo.py"), *words]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert done.returncode and "Traceback" not in done.stderr, done.stderr
        assert done.stderr.count("error") == 1 and text in done.stderr, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["file"]  # no folder of a failed run


def test_progress_in_a_log_file_is_whole_lines(capsys):
    for _ in parallel.progress_bar(range(2), "samples", mininterval=0.0, delay=1e-9):
        for _ in parallel.progress_bar(range(1), "a long label", mininterval=0.0, delay=1e-9):
            pass
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines] == [
        "a long label 1 of 1", "samples    1 of 2", "a long label 1 of 1", "samples    2 of 2",
    ]  # fmt: skip
    assert all(line.isprintable() for line in lines)  # no carriage returns, no cursor movements


def test_snake_order():
    assert parallel.snake_order([1, 2, 3, 4, 5, 6, 7], 2) == [1, 2, 4, 3, 5, 6, 7]
    assert parallel.snake_order([1, 2, 3], 1) == [1, 2, 3]
