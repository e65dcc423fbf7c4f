"""Whole runs of the scripts on tiny models: they learn, split, stop, go on and export."""

import json
import math
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import psutil
import pytest
import torch
from conftest import ARCHITECTURES, ROOT, pair_rows, run_script, start_script, write_jsonl
from safetensors.torch import load_file, save_file

import common
import dpo
import sft

METHODS = {"dpo": dpo, "sft": sft}  # the others: test_methods.py
LN_2 = math.log(2)
TIMINGS = {"tokens_per_second", "seconds_per_step", "peak_memory_gib"}
SMALL = {
    "batch_size": 8, "micro_batch_size": 4, "max_steps": 6, "epochs": 1.0, "lr": 1e-3,
    "schedule": "constant", "warmup_ratio": 0.0, "optimizer": "adamw", "dtype": "float32",
    "max_length": 64, "max_prompt_length": 40, "eval_every": 3, "save_every": 2,
}  # fmt: skip
OWN = {  # each method's own flags in these runs: no term of a loss is off
    "dpo": {"beta": 0.5},
    "sft": {"train_on_prompt": False},
    "cpo": {"beta": 0.3, "nll_weight": 0.5},
    "simpo": {"beta": 2.0, "gamma_beta_ratio": 0.5, "nll_weight": 0.3},
    "slic": {"beta": 0.5, "delta": 2.0, "target_weight": 0.2},
    "ipo": {"beta": 0.5},
    "orpo": {"odds_weight": 2.0},
    "kto": {"beta": 0.5, "desirable_weight": 1.5},
    "pro": {"sft_weight": 0.1, "score_scale": 0.5},
    "listwise_dpo": {"beta": 0.5},
    "rrhf": {"sft_weight": 0.1, "margin": 0.5},
}


# -- helpers


@pytest.fixture(autouse=True)
def _as_in_a_fresh_process(tmp_path, monkeypatch):
    """Caches of the run go to an empty folder, and pytest gets its signal handlers back."""
    monkeypatch.chdir(tmp_path)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def plain(monkeypatch):
    """Without report.py: curves and samples take longer than these runs."""
    beside = common.beside
    monkeypatch.setattr(common, "beside", lambda name: None if name == "report" else beside(name))


@pytest.fixture(scope="session")
def pairs(tmp_path_factory) -> Path:
    """sft.py takes the chosen answers. 3 rows are held out, 7 steps are an epoch."""
    return write_jsonl(tmp_path_factory.mktemp("rows") / "pairs.jsonl", pair_rows(60))


def train(method: ModuleType, model: Path, dataset: Path, folder: str | Path, **flags) -> int:
    """A whole run in this process. Its exit status, as the shell would see it."""
    values = SMALL | OWN[method.__name__]
    values |= {"model": str(model), "dataset": str(dataset), "output_dir": str(folder)} | flags
    locked, lock = [], common.Run._lock
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common.Run, "_lock", lambda run: (locked.append(run), lock(run)))
        try:
            method.main(method.Args(**values))
        except SystemExit as stop:
            return stop.code
        finally:
            for run in locked:
                run.lock.close()  # as when a process ends
    return 0


def as_flags(**values) -> list[str]:
    named = [[f"--{name.replace('_', '-')}", str(value)] for name, value in values.items()]
    return [word for pair in named for word in pair]


def lines_of(folder: str | Path) -> list[dict]:
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def without_timings(folder: str | Path) -> list[dict]:
    return [{k: v for k, v in line.items() if k not in TIMINGS} for line in lines_of(folder)]


def steps_of(folder: str | Path) -> list[dict]:
    return [line for line in lines_of(folder) if "lr" in line]


def checkpoints_in(folder: str | Path) -> list[int]:
    return sorted(int(p.name.split("-")[1]) for p in Path(folder).glob("checkpoint-*"))


def assert_same_run(one: str | Path, other: str | Path) -> None:
    """The same trained weights to the last bit, and the same log, line by line."""
    files = [Path(folder) / "model.safetensors" for folder in (one, other)]
    assert common.file_hash(files[0]) == common.file_hash(files[1])
    assert without_timings(one) == without_timings(other)


def assert_same_log(one: str | Path, other: str | Path) -> None:
    """Line by line, but for rounding; padding is a matter of how a step is dealt."""
    for line, there in zip(lines_of(one), lines_of(other), strict=True):
        assert line.keys() == there.keys()
        for key in line.keys() - {*TIMINGS, "padding"}:
            assert there[key] == pytest.approx(line[key], rel=1e-7, abs=1e-9), key


def farthest(one: Path, other: Path) -> float:
    """The largest difference between any two weights of two checkpoints."""
    a, b = load_file(one), load_file(other)
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


class Broken(Exception):
    """What ends a run in the middle, in place of a power cut."""


def at_loss_call(monkeypatch, method: ModuleType, number: int, act: Callable[[], None]) -> None:
    """Call `act` when the loss is computed for the `number`-th time (held-out rows count)."""
    name = f"{method.__name__}_loss"
    original, calls = getattr(method, name), []

    def wrapped(*args, **more):
        calls.append(None)
        if len(calls) == number:
            act()
        return original(*args, **more)

    monkeypatch.setattr(method, name, wrapped)


def in_step(step: int, held_out_calls: int = 1, eval_every: int = SMALL["eval_every"]) -> int:
    """The number of the first loss call in optimizer step `step` (from 1) of a SMALL run."""
    evaluations = 1 + (step - 1) // eval_every
    return evaluations * held_out_calls + (step - 1) * 2 + 1


def break_down() -> None:
    raise Broken


# -- two steps of each script on each architecture, and the folder that they leave


class Finished:
    """What a run left: its folder, and the policy as it was when the run ended."""

    def __init__(self, script: str, start: Path, rows: Path, folder: Path):
        self.start, self.folder = start, folder
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder.parent)
            load = common.load_policy

            def keep(*args, **more):
                self.policy = load(*args, **more)
                return self.policy

            patch.setattr(common, "load_policy", keep)
            short = {"max_steps": 2, "max_length": 96, "max_prompt_length": 64}
            assert train(METHODS[script], start, rows, folder, **short) == 0


def rows_for(architecture: str, script: str, folder: Path) -> Path:
    """Dialogues for the model with a chat template, else texts; some files are Parquet."""
    rows = pair_rows(24)
    if architecture == "qwen2":
        ask = [[{"role": "user", "content": row["prompt"]}] for row in rows]
        say = lambda text: [{"role": "assistant", "content": text.strip()}]  # noqa: E731
        both = zip(ask, rows, strict=True)
        if script == "sft":
            return write_jsonl(
                folder / "dialogues.jsonl",
                [{"messages": asked + say(row["chosen"])} for asked, row in both],
            )
        sides = ("chosen", "rejected")
        return write_jsonl(
            folder / "dialogues.jsonl",
            [{side: asked + say(row[side]) for side in sides} for asked, row in both],
        )
    if script == "sft":
        rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
    if architecture not in ("gemma2", "mistral"):
        return write_jsonl(folder / "texts.jsonl", rows)
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "texts.parquet")
    return folder / "texts.parquet"


@pytest.fixture(scope="module")
def finished(checkpoints, tmp_path_factory):
    """finished(script, architecture) -> a Finished run of two steps, made once."""
    made: dict[tuple[str, str], Finished] = {}

    def get(script: str, architecture: str) -> Finished:
        if (script, architecture) not in made:
            folder = tmp_path_factory.mktemp(f"{script}-{architecture}")
            rows = rows_for(architecture, script, folder)
            start = checkpoints(architecture)
            made[script, architecture] = Finished(script, start, rows, folder / "run")
        return made[script, architecture]

    return get


each_run = lambda test: pytest.mark.parametrize("script", METHODS)(  # noqa: E731
    pytest.mark.parametrize("architecture", ARCHITECTURES)(test)
)


@each_run
def test_two_steps(finished, script, architecture):
    run = finished(script, architecture)
    steps = steps_of(run.folder)
    assert [step["step"] for step in steps] == [1, 2]
    assert all(math.isfinite(step["loss"]) and step["grad_norm"] > 0 for step in steps)
    before = load_file(run.start / "model.safetensors")
    after = load_file(run.folder / "model.safetensors")
    assert [name for name in before if torch.equal(before[name], after[name])] == []
    files = {"samples.jsonl", "curves.png", "run.json", f"{script}.py", "common.py", "summary.txt"}
    files.add("token_logps.py")
    assert files <= {p.name for p in run.folder.iterdir()}
    left_over = [p.name for p in run.folder.iterdir() if "tmp" in p.name]
    assert left_over == []


@each_run
def test_plain_transformers_loads_the_folder(finished, script, architecture):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = finished(script, architecture)
    model = AutoModelForCausalLM.from_pretrained(run.folder)
    assert next(model.parameters()).dtype == torch.float32
    ids = torch.arange(3, 63).view(2, 30)  # longer than the sliding windows
    # Plain loading picks the attention by itself; what we computed with must be what it picks.
    with torch.no_grad():
        ours, plain = run.policy(input_ids=ids).logits, model(input_ids=ids).logits
    assert torch.equal(ours, plain)

    tied = AutoModelForCausalLM.from_pretrained(run.start).config.tie_word_embeddings
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    assert (head is embedding) == tied
    weights = load_file(run.folder / "model.safetensors")
    assert weights.keys() == load_file(run.start / "model.safetensors").keys()

    tokenizer = AutoTokenizer.from_pretrained(run.folder)
    original = AutoTokenizer.from_pretrained(run.start)
    texts = ["the cat sat", "  two spaces, ünïcode 猫\n", "a</s><s>b<|im_end|>", ""]
    for text in texts:
        assert tokenizer(text).input_ids == original(text).input_ids
        assert tokenizer.decode(tokenizer(text).input_ids) == original.decode(
            original(text).input_ids
        )
    assert tokenizer.special_tokens_map == original.special_tokens_map
    assert tokenizer.chat_template == original.chat_template
    if original.chat_template:
        dialogue = [
            {"role": "user", "content": "the cat?"},
            {"role": "assistant", "content": "yes"},
        ]
        rendered = [t.apply_chat_template(dialogue).input_ids for t in (tokenizer, original)]
        assert rendered[0] == rendered[1]


@each_run
def test_exported_settings_are_the_models_own(finished, script, architecture):
    run = finished(script, architecture)
    before, after = (
        json.loads((folder / "config.json").read_text()) for folder in (run.start, run.folder)
    )
    assert {key: after.get(key) for key in before} == before
    assert after["plainpref"]["history"] == [script]
    if "rope_parameters" in before:  # where Transformers 4 looks for it
        theta = before["rope_parameters"]["rope_theta"]
        assert after["rope_theta"] == theta
        asked = architecture in ("llama", "qwen2", "qwen3", "mistral")
        assert theta == (50_000 if asked else 10_000)
    if architecture == "gpt_neox":
        assert (after["rotary_emb_base"], after["rotary_pct"]) == (10_000, 0.25)
    settings = json.loads((run.folder / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert settings["model_input_names"] == ["input_ids", "attention_mask"]


@each_run
def test_nothing_is_pickled(finished, script, architecture):
    """Pickles, and the zip archives that torch.save makes of them, run code when they are read."""
    folder = finished(script, architecture).folder
    for file in [p for p in folder.parent.rglob("*") if p.is_file()]:
        assert file.suffix not in (".bin", ".pt", ".pth", ".pkl", ".ckpt", ".npy", ".npz")
        if (
            file.suffix != ".safetensors"
        ):  # which begins with a length, and may so begin with any byte
            assert not file.read_bytes().startswith((b"\x80", b"PK"))


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_export_dtype(checkpoints, pairs, plain, name):
    """The saved model is rounded, the checkpoint is not."""
    assert train(dpo, checkpoints("llama"), pairs, "out", max_steps=2, export_dtype=name) == 0
    dtype = getattr(torch, name)
    weights, kept = (
        load_file("out/model.safetensors"),
        load_file("out/checkpoint-2/policy.safetensors"),
    )
    for key, weight in weights.items():
        assert weight.dtype == dtype and kept[key].dtype == torch.float32
        assert torch.equal(weight, kept[key].to(dtype))
    assert json.loads(Path("out/config.json").read_text())["dtype"] == name


# -- DPO's first loss is ln 2


def test_first_loss_is_ln_2_also_from_the_cache(checkpoints, pairs, plain, capsys):
    for resume, folder in (("auto", "out"), ("never", "out-2")):
        assert train(dpo, checkpoints("llama"), pairs, "out", max_steps=2, resume=resume) == 0
        evaluation, first = lines_of(folder)[:2]
        assert first["loss"] == pytest.approx(LN_2, abs=1e-6, rel=0)
        assert evaluation["eval/loss"] == pytest.approx(LN_2, abs=1e-6, rel=0)
        assert first["rewards/margins"] == pytest.approx(0, abs=1e-6)
        from_cache = "log-probs from runs/.cache/ref-" in capsys.readouterr().out
        assert from_cache == (resume == "never")
    assert without_timings("out") == without_timings("out-2")


def test_cache_is_not_used_for_other_rows_or_weights(checkpoints, pairs, plain, tmp_path):
    train(dpo, checkpoints("llama"), pairs, "first", max_steps=2)
    other_rows = write_jsonl(tmp_path / "other.jsonl", pair_rows(60, seed=1))
    train(dpo, checkpoints("llama"), other_rows, "other-rows", max_steps=2)
    train(dpo, tmp_path / "first", pairs, "other-weights", max_steps=2)
    assert len(list(Path("runs/.cache").iterdir())) == 3
    for folder in ("other-rows", "other-weights"):
        assert lines_of(folder)[1]["loss"] == pytest.approx(LN_2, abs=1e-6, rel=0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_first_loss_is_ln_2_with_the_same_model_as_reference(
    checkpoints, pairs, plain, architecture
):
    model = checkpoints(architecture)
    for number, reference in enumerate((f"{model}", f"{model}+{model}")):
        train(dpo, model, pairs, f"out{number}", max_steps=1, ref_model=reference)
        assert lines_of(f"out{number}")[1]["loss"] == pytest.approx(LN_2, abs=1e-6, rel=0)


def test_soup_is_the_weighted_mean_of_weights(checkpoints, pairs, plain, tmp_path):
    """A quarter of one model and three quarters of another, mixed by the flag and mixed by hand."""
    start = checkpoints("llama")
    train(sft, start, pairs, "tuned", lr=1e-2)  # somewhere else in weight space
    train(dpo, start, pairs, "flag", ref_model=f"{start}+{tmp_path / 'tuned'}", soup_weight=0.25)
    import shutil

    a, b = load_file(start / "model.safetensors"), load_file("tuned/model.safetensors")
    shutil.copytree(start, "mixed")
    mixed = {name: 0.25 * a[name] + 0.75 * b[name] for name in a}
    save_file(mixed, "mixed/model.safetensors", {"format": "pt"})
    train(dpo, start, pairs, "hand", ref_model=str(tmp_path / "mixed"))
    by_flag, by_hand = ([step["loss"] for step in steps_of(folder)] for folder in ("flag", "hand"))
    assert abs(by_hand[0] - LN_2) > 0.01  # another reference than the policy
    assert by_flag == pytest.approx(by_hand, rel=1e-4)


# -- the same steps for any split over micro-batches and processes


HOT = {"dtype": "float64", "lr": 1e-2, "max_steps": 5, "save_every": 0, "eval_every": 0}


def assert_same_weights(one: str | Path, other: str | Path, start: Path) -> None:
    files = [Path(folder) / "checkpoint-5" / "policy.safetensors" for folder in (one, other)]
    assert all(w.dtype == torch.float64 for file in files for w in load_file(file).values())
    assert farthest(files[0], start / "model.safetensors") > 0.01  # hot: the weights have moved
    assert farthest(*files) < 1e-9


@pytest.mark.parametrize("script", METHODS)
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen2"])  # gpt2, qwen2: key biases
def test_same_weights_with_other_micro_batches(checkpoints, pairs, plain, script, architecture):
    """A token mean per micro-batch would show here: the rows differ in length."""
    start = checkpoints(architecture)
    for size in (8, 4, 1):
        flags = HOT | {"micro_batch_size": size, "max_length": 96}
        assert train(METHODS[script], start, pairs, f"of-{size}", **flags) == 0
    assert_same_weights("of-8", "of-4", start)
    assert_same_weights("of-8", "of-1", start)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2"])
def test_sharing_and_fusion_change_nothing_but_the_speed(
    checkpoints, pairs, plain, architecture, monkeypatch
):
    """20 steps in fp32, each on and off: the losses agree to 1e-5."""
    laid_out, collate = [], common.collate

    def look(data, indexes, device, share_prompt=False, *more):
        if len(indexes) > 1:  # not the probe
            laid_out.append(share_prompt)
        return collate(data, indexes, device, share_prompt, *more)

    monkeypatch.setattr(common, "collate", look)
    monkeypatch.setattr(common, "_sharing_pays", lambda *_: True)
    same = {"max_steps": 20, "epochs": None, "eval_every": 0, "save_every": 0, "lr": 2e-4}
    losses = {}
    for share in (True, False):
        for fused in (True, False):
            folder = f"share-{share}-fused-{fused}"
            how = {"share_prompt": share, "fused_logps": fused, "cache_dir": folder + "-cache"}
            laid_out.clear()
            assert train(dpo, checkpoints(architecture), pairs, folder, **how, **same) == 0
            losses[share, fused] = [step["loss"] for step in steps_of(folder)]
            assert laid_out and set(laid_out) == {share}
    first = losses[False, False]
    assert len(first) == 20 and first[-1] < first[0] - 0.01
    for other in losses.values():
        assert max(abs(a - b) for a, b in zip(first, other, strict=True)) < 1e-5
    # None of the four is another by accident.
    assert len({tuple(x) for x in losses.values()}) == 4


def test_padding_is_logged_and_small(checkpoints, pairs, plain):
    """Rows of like length go together, so that less is padding than by chance."""
    shares = {}
    for micro in (8, 2):
        train(dpo, checkpoints("llama"), pairs, f"micro-{micro}", micro_batch_size=micro)
        shares[micro] = [step["padding"] for step in steps_of(f"micro-{micro}")]
        assert all(0 <= share < 0.5 for share in shares[micro])
    assert sum(shares[2]) < 0.5 * sum(shares[8])
    train(dpo, checkpoints("llama"), pairs, "alone", batch_size=1, micro_batch_size=1)
    assert all(step["padding"] == 0 for step in steps_of("alone"))


@pytest.mark.slow
@pytest.mark.parametrize("script", METHODS)
def test_same_weights_with_other_numbers_of_processes(checkpoints, pairs, tmp_path, script):
    start = checkpoints("llama")
    numbers = (1, 2, 4) if script == "dpo" else (1, 2)
    for processes in numbers:
        flags = SMALL | HOT | {"micro_batch_size": 2, "model": start, "dataset": pairs}
        flags |= {"output_dir": tmp_path / f"by-{processes}"}
        if script == "dpo":
            flags |= {"beta": 0.5, "cache_dir": tmp_path / "cache"}
        status, _, err = run_script(f"{script}.py", *as_flags(**flags), processes=processes)
        assert status == 0, err
    # What is measured is about all rows too, not about those of the main process.
    for processes in numbers[1:]:
        assert_same_weights("by-1", f"by-{processes}", start)
        for one, other in zip(lines_of("by-1"), lines_of(f"by-{processes}"), strict=True):
            skip = {*TIMINGS, "grad_norm"}
            assert one.keys() == other.keys()
            for key in one.keys() - skip:
                assert other[key] == pytest.approx(one[key], rel=1e-8, abs=1e-9), key


# -- stopped and started again: the same run as if nothing had happened


@pytest.mark.parametrize("script", METHODS)
@pytest.mark.parametrize(
    "step", [1, 3, 4, 6]
)  # before the first checkpoint; after one; in the last
def test_run_that_broke_goes_on_to_the_same_end(
    checkpoints, pairs, plain, monkeypatch, script, step
):
    method, start = METHODS[script], checkpoints("llama")
    train(method, start, pairs, "whole")
    with monkeypatch.context() as patch:
        at_loss_call(patch, method, in_step(step) + 1, break_down)  # between two micro-batches
        with pytest.raises(Broken):
            train(method, start, pairs, "broken")
    assert checkpoints_in("broken") == {1: [], 3: [2], 4: [2], 6: [4]}[step]
    assert train(method, start, pairs, "broken") == 0
    assert_same_run("whole", "broken")


@pytest.mark.parametrize(
    ("optimizer", "schedule"),
    [("adamw", "constant"), ("adamw", "cosine"), ("rmsprop", "linear")],
)
def test_optimizer_and_schedule_go_on(checkpoints, pairs, plain, monkeypatch, optimizer, schedule):
    """Over the end of an epoch, too: 7 steps make one, with another order of rows in the next."""
    flags = {"max_steps": 10, "optimizer": optimizer, "schedule": schedule, "warmup_ratio": 0.5}
    start = checkpoints("gpt2")
    train(dpo, start, pairs, "whole", **flags)
    with monkeypatch.context() as patch:
        at_loss_call(patch, dpo, in_step(8), break_down)
        with pytest.raises(Broken):
            train(dpo, start, pairs, "broken", **flags)
    train(dpo, start, pairs, "broken", **flags)
    assert_same_run("whole", "broken")
    lrs = [step["lr"] for step in steps_of("broken")]
    assert lrs[:5] == pytest.approx([1e-3 * n / 5 for n in (1, 2, 3, 4, 5)])
    after = {
        "constant": [1.0] * 5,
        "linear": [1 - n / 5 for n in range(5)],
        "cosine": [0.5 + 0.5 * math.cos(math.pi * n / 5) for n in range(5)],
    }
    assert lrs[5:] == pytest.approx([1e-3 * factor for factor in after[schedule]])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("script", METHODS)
def test_signal_saves_the_step_and_leaves(
    checkpoints, pairs, plain, monkeypatch, capsys, script, number
):
    """The step is finished first; 3 is no multiple of --save-every."""
    method, start = METHODS[script], checkpoints("llama")
    train(method, start, pairs, "whole")
    with monkeypatch.context() as patch:
        at_loss_call(patch, method, in_step(3), lambda: os.kill(os.getpid(), number))
        assert train(method, start, pairs, "stopped") == 128 + number
    assert checkpoints_in("stopped") == [3]
    assert "step 3 is saved in stopped" in capsys.readouterr().out
    assert train(method, start, pairs, "stopped") == 0
    assert_same_run("whole", "stopped")


def test_signal_in_the_first_evaluation(checkpoints, pairs, plain, monkeypatch):
    start = checkpoints("llama")
    train(dpo, start, pairs, "whole")
    with monkeypatch.context() as patch:
        at_loss_call(patch, dpo, 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert train(dpo, start, pairs, "stopped") == 143
    train(dpo, start, pairs, "stopped")
    assert_same_run("whole", "stopped")


def test_signal_while_the_reference_is_asked(checkpoints, pairs, plain, monkeypatch):
    """There is nothing to save yet, so the run leaves at once, and nothing is left half done."""
    start = checkpoints("llama")
    train(dpo, start, pairs, "whole", cache_dir="one")
    with monkeypatch.context() as patch:
        original = common.response_logps

        def asked(*args):
            os.kill(os.getpid(), signal.SIGTERM)
            return original(*args)

        patch.setattr(common, "response_logps", asked)
        assert train(dpo, start, pairs, "stopped", cache_dir="two") == 143
    assert checkpoints_in("stopped") == [] and not Path("two").exists()
    train(dpo, start, pairs, "stopped", cache_dir="two")
    assert_same_run("whole", "stopped")


def test_broken_while_a_checkpoint_is_written(checkpoints, pairs, plain, monkeypatch):
    start = checkpoints("llama")
    train(dpo, start, pairs, "whole")
    with monkeypatch.context() as patch:
        original = common.sync_folder

        def fail(folder):
            return break_down() if folder.name.endswith("-4") else original(folder)

        patch.setattr(common, "sync_folder", fail)
        with pytest.raises(Broken):
            train(dpo, start, pairs, "broken")
    assert checkpoints_in("broken") == [2]  # 4 was not whole, so it does not have its name yet
    train(dpo, start, pairs, "broken")
    assert not list(Path("broken").glob("tmp-*"))
    assert_same_run("whole", "broken")


@pytest.mark.parametrize("where", ["evaluate", "export"])
def test_broken_after_the_last_step(checkpoints, pairs, plain, monkeypatch, where):
    start = checkpoints("llama")
    train(dpo, start, pairs, "whole")
    with monkeypatch.context() as patch:
        original = getattr(common.Run, where)

        def fail(run, *args):
            return break_down() if run.step == 6 else original(run, *args)

        patch.setattr(common.Run, where, fail)
        with pytest.raises(Broken):
            train(dpo, start, pairs, "broken")
    assert not Path("broken/summary.txt").exists()
    assert train(dpo, start, pairs, "broken") == 0
    assert_same_run("whole", "broken")


def test_samples_are_not_written_twice(checkpoints, pairs, monkeypatch):
    start, flags = checkpoints("llama"), {"sample_every": 1, "max_length": 44}
    train(dpo, start, pairs, "whole", **flags)
    with monkeypatch.context() as patch:
        at_loss_call(patch, dpo, in_step(6), break_down)
        with pytest.raises(Broken):
            train(dpo, start, pairs, "broken", **flags)
    train(dpo, start, pairs, "broken", **flags)
    texts = [Path(folder, "samples.jsonl").read_text() for folder in ("whole", "broken")]
    assert texts[0] == texts[1]
    assert [json.loads(line)["step"] for line in texts[0].splitlines()][::3] == list(range(7))


# -- the same with real processes


def wait_for(process, condition: Callable[[], bool]) -> None:
    limit = time.monotonic() + 300
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < limit, "never came"
        time.sleep(0.01)


def kill_all(process) -> None:
    """SIGKILL for the process and its children, which torchrun puts into sessions of their own."""
    parent = psutil.Process(process.pid)
    family = [parent, *parent.children(recursive=True)]
    for member in family:
        member.kill()
    psutil.wait_procs(family, timeout=60)
    process.communicate()


LONG = {"max_steps": 70, "save_every": 7, "eval_every": 5, "micro_batch_size": 2, "lr": 3e-4}


def long_run(start: Path, pairs: Path, folder: Path) -> list[str]:
    flags = SMALL | LONG | {"beta": 0.5, "model": start, "dataset": pairs, "output_dir": folder}
    return [*as_flags(**flags, cache_dir=folder.parent / "cache"), "--deterministic"]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 4])
def test_killed_run_goes_on_to_the_same_end(checkpoints, pairs, tmp_path, processes):
    start = checkpoints("llama")
    status, _, err = run_script(
        "dpo.py", *long_run(start, pairs, tmp_path / "whole"), processes=processes
    )
    assert status == 0, err
    flags = long_run(start, pairs, tmp_path / "killed")
    for least in (7, 35) if processes == 1 else (21,):  # the first is killed twice
        process = start_script("dpo.py", *flags, processes=processes)
        wait_for(process, lambda least=least: max(checkpoints_in("killed"), default=0) >= least)
        kill_all(process)
        assert not Path("killed/summary.txt").exists(), "too late: it had finished"
    status, out, err = run_script("dpo.py", *flags, processes=processes)
    assert status == 0, err
    assert "resume" in out
    assert [step["step"] for step in steps_of("killed")] == list(range(1, 71))
    assert_same_run("whole", "killed")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_to_a_real_process(checkpoints, pairs, tmp_path, number):
    flags = long_run(checkpoints("llama"), pairs, tmp_path / "out")
    process = start_script("dpo.py", *flags)
    wait_for(process, lambda: checkpoints_in("out") != [])
    process.send_signal(number)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 128 + number
    assert "Traceback" not in err
    (saved,) = checkpoints_in("out")
    assert steps_of("out")[-1]["step"] == saved < 70
    assert f"step {saved} is saved" in out


@pytest.mark.slow
def test_signal_to_torchrun(checkpoints, pairs, tmp_path):
    """As a cluster does it: SIGTERM to the launcher, which hands it on to its processes."""
    start = checkpoints("llama")
    run_script("dpo.py", *long_run(start, pairs, tmp_path / "whole"), processes=2)
    flags = long_run(start, pairs, tmp_path / "out")
    process = start_script("dpo.py", *flags, processes=2)
    wait_for(process, lambda: checkpoints_in("out") != [])
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=300)
    assert process.returncode != 0
    (saved,) = checkpoints_in("out")
    assert steps_of("out")[-1]["step"] == saved < 70
    assert f"step {saved} is saved" in out
    assert run_script("dpo.py", *flags, processes=2)[0] == 0
    assert_same_run("whole", "out")


# -- folders of finished runs and of other runs


def test_finished_run_shows_its_closing_block_again(checkpoints, pairs, capsys):
    start = checkpoints("llama")
    train(dpo, start, pairs, "out", max_steps=2)
    before = {p.name: p.read_bytes() for p in Path("out").iterdir() if p.is_file()}
    capsys.readouterr()
    assert train(dpo, start, pairs, "out", max_steps=2) == 0
    out = capsys.readouterr().out
    assert before["summary.txt"].decode() in out
    assert "held-out loss" not in out and "--resume never" in out
    assert {p.name: p.read_bytes() for p in Path("out").iterdir() if p.is_file()} == before


def test_resume_never_starts_a_new_numbered_folder(checkpoints, pairs, plain):
    start = checkpoints("llama")
    for _ in range(3):
        train(dpo, start, pairs, "runs/dpo", max_steps=1, resume="never")
    made = sorted(p.name for p in Path("runs").iterdir() if p.name != ".cache")
    assert made == ["dpo", "dpo-2", "dpo-3"]
    assert all(len(steps_of(Path("runs", name))) == 1 for name in made)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"lr": 2e-3}, "--lr was 0.001, now 0.002"),
        ({"beta": 0.2}, "--beta was 0.5, now 0.2"),
        ({"seed": 1}, "--seed was 0, now 1"),
        ({"batch_size": 4}, "--batch-size was 8, now 4"),
        ({"max_steps": 2}, "--max-steps was 4, now 2"),
        ({"max_steps": 8, "schedule": "linear"}, "--schedule was constant, now linear"),
    ],
)
def test_folder_of_another_run_is_refused(checkpoints, pairs, plain, changed, named):
    start = checkpoints("llama")
    train(dpo, start, pairs, "out", max_steps=4)
    before = {p.name: p.read_bytes() for p in Path("out").iterdir() if p.is_file()}
    with pytest.raises(common.UserError) as refusal:
        train(dpo, start, pairs, "out", **{"max_steps": 4} | changed)
    for part in (named, "out", "--resume never", "--output-dir"):
        assert part in str(refusal.value)
    assert {p.name: p.read_bytes() for p in Path("out").iterdir() if p.is_file()} == before


def test_folder_of_another_script_is_refused(checkpoints, pairs, plain):
    train(sft, checkpoints("llama"), pairs, "out", max_steps=2)
    with pytest.raises(common.UserError, match="holds a run of sft.py"):
        train(dpo, checkpoints("llama"), pairs, "out", max_steps=2)


def test_folder_that_is_no_run_is_refused(checkpoints, pairs, plain):
    Path("mine").mkdir()
    Path("mine/thesis.tex").write_text("years of work")
    with pytest.raises(common.UserError, match="mine is not empty"):
        train(dpo, checkpoints("llama"), pairs, "mine", max_steps=2)
    assert [p.name for p in Path("mine").iterdir()] == ["thesis.tex"]


def test_changed_source_is_refused(checkpoints, pairs, plain, tmp_path):
    from importlib.util import module_from_spec, spec_from_file_location

    def the_script() -> ModuleType:
        spec = spec_from_file_location("dpo_of_mine", tmp_path / "dpo_of_mine.py")
        module = module_from_spec(spec)
        sys_modules = pytest.MonkeyPatch()
        sys_modules.setitem(__import__("sys").modules, "dpo_of_mine", module)  # for dataclasses
        spec.loader.exec_module(module)
        sys_modules.undo()
        return module

    flags = SMALL | {"beta": 0.5, "max_steps": 2, "output_dir": "out"}
    flags |= {"model": str(checkpoints("llama")), "dataset": str(pairs)}
    source = (ROOT / "dpo.py").read_text()
    (tmp_path / "dpo_of_mine.py").write_text(source)
    mine = the_script()
    mine.main(mine.Args(**flags))
    (tmp_path / "dpo_of_mine.py").write_text(
        source.replace("-F.logsigmoid(margins - gamma)", "F.relu(1 - margins)")
    )
    mine = the_script()
    with pytest.raises(common.UserError, match="dpo_of_mine.py has changed since"):
        mine.main(mine.Args(**flags))


def test_changed_kernel_is_refused(checkpoints, pairs, plain, monkeypatch):
    """It moves digits too, so it is among the sources of the run, and its copy in the folder."""
    train(dpo, checkpoints("llama"), pairs, "out")
    assert Path("out/token_logps.py").read_text() == (ROOT / "kernels/token_logps.py").read_text()
    hash_of_file = common.file_hash
    monkeypatch.setattr(
        common, "file_hash", lambda p: "other" if p.name == "token_logps.py" else hash_of_file(p)
    )
    with pytest.raises(common.UserError, match="token_logps.py has changed since"):
        train(dpo, checkpoints("llama"), pairs, "out")


@pytest.mark.parametrize("script", METHODS)
def test_longer_constant_run_goes_on(checkpoints, pairs, plain, script):
    """From 4 steps to 10, over the end of an epoch: as if 10 had been asked for at once."""
    method, start = METHODS[script], checkpoints("llama")
    train(method, start, pairs, "whole", max_steps=10)
    train(method, start, pairs, "longer", max_steps=4)
    assert train(method, start, pairs, "longer", max_steps=10) == 0
    assert_same_run("whole", "longer")


def test_longer_run_is_refused_where_the_schedule_would_change(checkpoints, pairs, plain):
    start = checkpoints("llama")
    for flags in ({"schedule": "linear"}, {"schedule": "constant", "warmup_ratio": 0.5}):
        folder = "-".join(map(str, flags.values()))
        train(dpo, start, pairs, folder, max_steps=2, **flags)
        with pytest.raises(common.UserError, match="--max-steps was 2, now 4"):
            train(dpo, start, pairs, folder, max_steps=4, **flags)


def test_bookkeeping_may_change(checkpoints, pairs, plain, monkeypatch):
    start = checkpoints("llama")
    train(dpo, start, pairs, "whole")
    with monkeypatch.context() as patch:
        at_loss_call(patch, dpo, in_step(4), break_down)
        with pytest.raises(Broken):
            train(dpo, start, pairs, "broken")
    train(dpo, start, pairs, "broken", save_every=1, keep_last=3, eval_every=0)
    assert checkpoints_in("broken") == [4, 5, 6]
    files = [Path(folder, "model.safetensors") for folder in ("whole", "broken")]
    assert common.file_hash(files[0]) == common.file_hash(files[1])


def test_second_run_in_the_same_folder_is_refused(checkpoints, pairs, plain, monkeypatch):
    start, refused = checkpoints("llama"), []
    train(dpo, start, pairs, "whole")
    with monkeypatch.context() as patch:

        def start_another() -> None:
            with pytest.raises(common.UserError, match="another process is training in shared"):
                train(dpo, start, pairs, "shared")
            refused.append(True)

        at_loss_call(patch, dpo, in_step(3), start_another)
        train(dpo, start, pairs, "shared")
    assert refused
    assert_same_run("whole", "shared")


# -- damage


def cut_short(checkpoint: Path) -> None:
    file = checkpoint / "policy.safetensors"
    os.truncate(file, file.stat().st_size // 2)


def flip_a_byte(checkpoint: Path) -> None:
    file = checkpoint / "optimizer.safetensors"
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)


def lose_the_manifest(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").unlink()


def lose_a_file(checkpoint: Path) -> None:
    (checkpoint / "optimizer.safetensors").unlink()


def break_the_manifest(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").write_text('{"state.json": ')


@pytest.mark.parametrize(
    "damage", [cut_short, flip_a_byte, lose_the_manifest, lose_a_file, break_the_manifest]
)
def test_damaged_checkpoint_is_named_and_the_one_before_used(
    checkpoints, pairs, plain, monkeypatch, capsys, damage
):
    start, flags = checkpoints("llama"), {"keep_last": 2}
    train(dpo, start, pairs, "whole", **flags)
    with monkeypatch.context() as patch:
        at_loss_call(patch, dpo, in_step(5), break_down)
        with pytest.raises(Broken):
            train(dpo, start, pairs, "broken", **flags)
    assert checkpoints_in("broken") == [2, 4]
    damage(Path("broken/checkpoint-4"))
    capsys.readouterr()
    assert train(dpo, start, pairs, "broken", **flags) == 0
    out = capsys.readouterr().out
    assert "checkpoint-4 is damaged" in out
    assert "step 2 of 6, from broken/checkpoint-2" in out
    assert_same_run("whole", "broken")
    # The damaged one has not kept its place: a whole one was written at the same step.
    assert checkpoints_in("broken") == [4, 6]
    assert [common.damage_of(Path(f"broken/checkpoint-{step}")) for step in (4, 6)] == [None, None]


# -- steps that are not finite


def spoil(monkeypatch, method: ModuleType, steps: set[int], what: str) -> None:
    """Make the loss, or only its gradient, NaN in some optimizer steps (of two micro-batches)."""
    name = f"{method.__name__}_loss"
    original, calls = getattr(method, name), []

    def wrapped(*args, **more):
        losses, metrics = original(*args, **more)
        if losses.requires_grad:  # not for held-out rows
            calls.append(None)
            if (len(calls) + 1) // 2 in steps:
                if what == "loss":
                    losses = losses * math.nan
                    metrics = metrics | {"loss": losses}
                else:
                    losses.register_hook(lambda gradient: gradient * math.nan)
        return losses, metrics

    monkeypatch.setattr(method, name, wrapped)


def watch_weights(monkeypatch) -> dict[int, bool]:
    """step -> whether it changed any weight or any state of the optimizer."""
    changed, original = {}, common.Run.update

    def values(policy, optimizer) -> dict:
        return {
            **{name: p.detach().clone() for name, p in policy.named_parameters()},
            **{k: v.clone() for k, v in common.optimizer_tensors(policy, optimizer).items()},
        }

    def update(run, policy, optimizer):
        before = values(policy, optimizer)
        try:
            original(run, policy, optimizer)
        finally:
            after = values(policy, optimizer)
            same = before.keys() == after.keys()
            changed[run.step] = not (same and all(torch.equal(before[k], after[k]) for k in before))

    monkeypatch.setattr(common.Run, "update", update)
    return changed


@pytest.mark.parametrize("script", METHODS)
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_step_that_is_not_finite_is_skipped(checkpoints, pairs, plain, monkeypatch, script, what):
    spoil(monkeypatch, METHODS[script], {2, 5}, what)
    changed = watch_weights(monkeypatch)
    assert train(METHODS[script], checkpoints("llama"), pairs, "out") == 0
    assert changed == {1: True, 2: False, 3: True, 4: True, 5: False, 6: True}
    steps = steps_of("out")
    assert [step["skipped"] for step in steps] == [0, 1, 0, 0, 1, 0]
    assert steps[1]["grad_norm"] is None  # null: NaN is not JSON
    assert (steps[1]["loss"] is None) == (what == "loss")
    weights = load_file("out/model.safetensors")
    assert all(weight.isfinite().all() for weight in weights.values())


def test_three_steps_that_are_not_finite_end_the_run(checkpoints, pairs, plain, monkeypatch):
    start, flags = checkpoints("llama"), {"max_steps": 8, "save_every": 1}
    train(dpo, start, pairs, "whole", **flags)
    with monkeypatch.context() as patch:
        spoil(patch, dpo, {4, 5, 6}, "gradient")
        changed = watch_weights(patch)
        with pytest.raises(common.UserError, match="steps 4 to 6.*--lr") as error:
            train(dpo, start, pairs, "out", **flags)
    assert changed == {1: True, 2: True, 3: True, 4: False, 5: False, 6: False}
    assert checkpoints_in("out") == [3] and "out" in str(error.value)
    assert not Path("out/model.safetensors").exists()
    # Had the cause been outside (a faulty machine), the same command would go on from there.
    train(dpo, start, pairs, "out", **flags)
    assert_same_run("whole", "out")
