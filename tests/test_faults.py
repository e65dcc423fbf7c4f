"""Attacks on a run: damaged files, odd models, updates that are not finite, hostile texts, signals.

None of them may change a result silently, and each ends in one line. Kills are in kills.py, bad
rows in test_rows.py and test_messages.py, the judge in test_judge.py, cached samples in
test_stored.py, rewards in test_rewards.py.
"""

import errno
import json
import math
import os
import shutil
import signal
from argparse import Namespace
from importlib import import_module
from pathlib import Path

import pytest
from conftest import (
    labelled_rows,
    make_config,
    make_tokenizer,
    pair_rows,
    ranked_rows,
    write_jsonl,
)  # fmt: skip
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification
from whole_runs import assert_same_run, crash, stop_after, train, without_timings

import common
from data import rows as data_rows
from sampling.score_model import load_score_model
from training import errors, parallel

KINDS = {"kto": labelled_rows, "listwise_dpo": ranked_rows}
pytestmark = pytest.mark.usefixtures("fresh_process")


@pytest.fixture
def run(checkpoints):
    """run(script, folder, **flags) -> exit status, with 60 rows. The model is in ./model."""
    shutil.copytree(checkpoints("llama"), "model")

    def start(script: str, folder: str, **flags) -> int:
        rows = Path(f"{script}.jsonl")
        if not rows.exists():
            write_jsonl(rows, KINDS.get(script, pair_rows)(60))
        flags = {"model": "model", "dataset": rows, "cache_dir": "cache"} | flags
        method = import_module(script)
        return train(method, flags.pop("model"), flags.pop("dataset"), folder, **flags)

    return start


@pytest.fixture
def processes():
    made = common.Processes()
    yield made
    made.stop_request.uninstall()


def stop_early(run, monkeypatch, script: str, **flags) -> None:
    with monkeypatch.context() as patch:
        stop_after(patch, 5, crash)
        with pytest.raises(RuntimeError):
            run(script, "out", **flags)


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-9])


def change_weights(folder: Path, act) -> None:
    file = folder / "model.safetensors"
    weights = load_file(file)
    act(weights)
    save_file(weights, file, {"format": "pt"})


# -- models


@pytest.fixture
def reward_model():
    """In ./reward."""
    tokenizer = make_tokenizer("bos")
    config = make_config("llama", tokenizer)
    config.num_labels = 1
    AutoModelForSequenceClassification.from_config(config).save_pretrained("reward")
    tokenizer.save_pretrained("reward")


@pytest.mark.parametrize("missing", ["score.weight", "model.norm.weight", None])
def test_a_reward_model_that_lacks_weights(processes, reward_model, missing):
    """Else Transformers fills them with random numbers."""
    args = common.Args(model="reward", dtype="float32")
    change_weights(Path("reward"), lambda weights: weights.pop(missing, None))
    if not missing:
        load_score_model(args, processes, name="reward")
        return
    with pytest.raises(ValueError, match=f"--model reward: its files lack weights, .*: {missing}"):
        load_score_model(args, processes, name="reward")


@pytest.mark.parametrize("missing", ["model.norm.weight", "lm_head.weight"])
def test_a_language_model_that_lacks_weights(processes, checkpoints, missing):
    shutil.copytree(checkpoints("llama"), "model")
    args = common.Args(model="model", dtype="float32")
    load_score_model(args, processes, name="reward")  # only this one may get a new head
    change_weights(Path("model"), lambda weights: weights.pop(missing))
    with pytest.raises(ValueError, match=f"--model model: its files lack weights, .*: {missing}"):
        common.load_policy(args, processes)


def set_config(**values) -> None:
    file = Path("model/config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


FOREIGN = {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}
NOT_ONE = "config.json is not JSON, or not as a model has it"
ODD = {  # what is done to ./model -> what the message says
    "weights cut": (lambda: cut(Path("model/model.safetensors")), "SafetensorError: "),
    "no weights": (lambda: Path("model/model.safetensors").write_bytes(b""), "SafetensorError: "),
    "text": (lambda: Path("model/config.json").write_text("x"), NOT_ONE),
    "list": (lambda: Path("model/config.json").write_text("[]"), NOT_ONE),
    "number": (lambda: Path("model/config.json").write_text("7"), NOT_ONE),
    "empty": (lambda: Path("model/config.json").write_text("{}"), "Unrecognized model in model"),
    "layers": (lambda: set_config(num_hidden_layers="two"), "num_hidden_layers"),
    "heads": (lambda: set_config(num_attention_heads=None), "num_attention_heads"),
    "name": (lambda: set_config(plainpref=["dpo"]), NOT_ONE),
    "base": (lambda: set_config(plainpref={"beta": 1}), NOT_ONE),
    "code": (lambda: set_config(model_type="mine", auto_map=FOREIGN), "contains custom code"),
}


@pytest.mark.parametrize("odd", ODD)
def test_an_odd_model(odd, run, capsys, monkeypatch):
    """One line, and no question on the terminal: code of a model is never run."""
    damage, message = ODD[odd]
    damage()
    Path("model/mine.py").write_text("raise SystemExit('it ran')")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question"))
    write_jsonl(Path("rows.jsonl"), pair_rows(60))
    argv = "--model model --dataset rows.jsonl --max-length 64 --max-prompt-length 40".split()
    dpo = import_module("dpo")
    with pytest.raises(ValueError, match=message) as error:
        dpo.main(common.parse(dpo.Args, dpo.PRESETS, "", argv))
    assert "--model model: " in str(error.value) and "\n" not in str(error.value)
    assert errors.explain(error.value, error.tb) == str(error.value)  # no traceback


@pytest.mark.parametrize("script", ["dpo", "kto", "ipo", "listwise_dpo"])
@pytest.mark.parametrize("flag", ["model", "ref_model"])
def test_a_model_that_was_replaced(run, monkeypatch, script, flag):
    """A resumed run would continue against another reference."""
    shutil.copytree("model", "other")
    flags = {flag: "other"}
    stop_early(run, monkeypatch, script, **flags)
    change_weights(Path("other"), lambda weights: weights["model.norm.weight"].mul_(1.5))
    with pytest.raises(ValueError, match=f"out holds another run: what --{flag.replace('_', '-')}"):
        run(script, "out", **flags)


# -- files of a run


@pytest.mark.parametrize("harm", [flip, cut, lambda file: file.write_bytes(b"")])
def test_cached_log_probs_that_were_changed(run, capsys, harm):
    run("dpo", "one")
    for file in Path("cache").glob("ref-*"):  # of training and of held-out rows
        harm(file)
    capsys.readouterr()
    run("dpo", "two")
    assert capsys.readouterr().out.count("computed again") == 2
    assert_same_run("one", "two")


def test_a_cache_that_cannot_be_written(run, capsys, monkeypatch):
    run("dpo", "one", cache_dir="first")
    Path("cache").touch()  # a file: as root, every folder can be written
    assert run("dpo", "two") == 0
    assert "log-probs are not cached" in capsys.readouterr().out
    assert_same_run("one", "two")


@pytest.mark.parametrize("harm", [flip, cut])
def test_no_checkpoint_is_left_whole(run, monkeypatch, harm):
    """It stops, and keeps what is there."""
    stop_early(run, monkeypatch, "dpo", keep_last=3)
    before = without_timings("out")
    for folder in Path("out").glob("checkpoint-*"):
        harm(folder / "state.safetensors")
    with pytest.raises(ValueError, match="every checkpoint in out is damaged"):
        run("dpo", "out", keep_last=3)
    assert without_timings("out") == before
    assert {p.name for p in Path("out").glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}


@pytest.mark.parametrize("left", [[], ["run.json"], ["run.json", "dpo.py", "common.py"]])
def test_a_run_that_was_killed_while_it_made_its_folder(run, left):
    Path("out").mkdir()
    for name in (".lock", *left):
        Path("out", name).write_text('{"arguments": {')
    assert run("dpo", "out", max_steps=1) == 0


# -- numbers that are not finite


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
@pytest.mark.parametrize("flag", ["weight_decay", "max_grad_norm", "lr", "epochs"])
def test_arguments_that_are_not_finite(run, flag, value):
    with pytest.raises(ValueError, match=f"--{flag.replace('_', '-')}"):
        run("dpo", "out", **{flag: value})
    assert not Path("out").exists()


def test_an_update_that_is_not_finite(run, monkeypatch):
    """The run stops before it saves or exports. Its last good checkpoint stays, and continues."""

    def fill_with_nan(run) -> None:
        run.policy.lm.lm_head.weight.data[3, 5:] = math.nan

    def spoil(step: int) -> None:
        with monkeypatch.context() as patch:
            stop_after(patch, step, fill_with_nan)
            message = f"step {step + 1} is not saved, .* [(]lm.lm_head.weight, ...[)]: lower --lr"
            with pytest.raises(ValueError, match=message) as error:
                run("dpo", "out", max_steps=4)
        last = "checkpoint-2" if step > 1 else "there is none"
        assert str(error.value).endswith(f"The last checkpoint in out: {last}")
        assert {p.name for p in Path("out").glob("*-[0-9]")} == ({last} if step > 1 else set())
        assert not list(Path("out").glob("tmp-*")) + list(Path("out").glob("*.safetensors"))

    spoil(1)
    assert run("dpo", "whole", max_steps=4) == 0
    spoil(3)
    assert run("dpo", "out", max_steps=4) == 0
    assert_same_run("whole", "out")


def test_a_learning_rate_that_is_far_too_large(run):
    with pytest.raises(ValueError, match="lower --lr"):
        run("dpo", "out", lr=1e39, save_every=1)
    assert not list(Path("out").glob("*.safetensors")) + list(Path("out").glob("checkpoint-*"))


# -- texts on the terminal

HOSTILE = "\x1b]0;title\x07\x1b[2J\rerror: forged\u202e tab\t\u00e9"
ESCAPED = "\\x1b]0;title\\x07\\x1b[2J\\rerror: forged\\u202e tab"


def test_foreign_text_is_escaped(capsys, processes):
    errors.guard_output()  # again: between a fixture and its test, pytest sets sys.stdout
    common.say("label", HOSTILE)
    common.say("label", "half \ud800")  # not logged: pytest -n cannot send it
    processes.print(HOSTILE)
    import_module("logging").getLogger("plainpref").info("two\nerror: forged\n" + HOSTILE)
    out = capsys.readouterr().out
    assert "half \\ud800" in out
    assert out.count(ESCAPED) == 3 and all(c.isprintable() or c in "\n\t" for c in out)
    assert [line for line in out.splitlines() if line.startswith("error")] == []
    assert errors.escaped(f"one\n{HOSTILE}") == f"one\n  {ESCAPED}\\t\u00e9"


def test_output_that_nobody_reads():
    """As after `| head -1`: the run continues. A full disk is another matter."""

    def full_disk(text):
        raise OSError(errno.ENOSPC, "full")

    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as stream:
        for _ in range(3):
            print("line", file=errors.Output(stream, "\n"), flush=True)
    with pytest.raises(OSError, match="full"):
        print("line", file=errors.Output(Namespace(write=full_disk), "\n"))


# -- signals and memory


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no such signal")
def test_a_closed_terminal_saves(run, monkeypatch, capsys):
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
    try:
        assert run("dpo", "whole") == 0
        with monkeypatch.context() as patch:
            stop_after(patch, 3, lambda self: os.kill(os.getpid(), signal.SIGHUP))
            assert run("dpo", "out") == 128 + signal.SIGHUP
        assert "step 4 is saved in out" in capsys.readouterr().out
        assert run("dpo", "out") == 0
        assert_same_run("whole", "out")
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
        assert signal.SIGHUP not in parallel.StopRequest().old_handlers
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("reading", [True, False])
def test_memory_that_runs_out(monkeypatch, reading):
    """While rows are read, smaller micro-batches would not help."""

    def fail(*_, **__):
        raise MemoryError

    monkeypatch.setattr(errors, "running", {"args": common.Args(), "world": 1})
    monkeypatch.setattr(data_rows, "read" if reading else "load", fail)
    tokenizer = common.load_tokenizer("tiny")
    with pytest.raises(MemoryError) as error:
        common.load_rows(common.Args(dataset="family"), tokenizer, "pair")
    hint = "reading rows, which are all kept in memory" if reading else "try --micro-batch-size 4"
    assert hint in errors.explain(error.value, error.tb)
