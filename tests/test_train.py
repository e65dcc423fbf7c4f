"""Whole runs of the scripts on tiny models: they learn, they split, they stop and go on, they export."""

import gc
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

METHODS = {"dpo": dpo, "sft": sft}
LN_2 = math.log(2)
TIMINGS = {"tokens_per_second", "seconds_per_step", "peak_memory_gib"}
SMALL = {
    "batch_size": 8, "micro_batch_size": 4, "max_steps": 6, "epochs": 1.0, "lr": 1e-3, "schedule": "constant",
    "warmup_ratio": 0.0, "optimizer": "adamw", "max_length": 64, "max_prompt_length": 40, "dtype": "float32",
    "eval_every": 3, "save_every": 2,
}  # fmt: skip


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
    """Without report.py, as where it was not copied: curves and samples take longer than these runs."""
    monkeypatch.setattr(common, "beside", lambda module: None)


@pytest.fixture(scope="session")
def pairs(tmp_path_factory) -> Path:
    """Also demonstrations: of a pair, sft.py takes the chosen answer. 3 are held out, 7 steps an epoch."""
    return write_jsonl(tmp_path_factory.mktemp("rows") / "pairs.jsonl", pair_rows(60))


def train(method: ModuleType, model: Path, dataset: Path, folder: str | Path, **flags) -> int:
    """A whole run in this process. Its exit status, as the shell would see it."""
    values = SMALL | {"beta": 0.5} if method is dpo else SMALL | {"train_on_prompt": False}
    values |= {"model": str(model), "dataset": str(dataset), "output_dir": str(folder)} | flags
    try:
        method.main(method.Args(**values))
    except SystemExit as stop:
        return stop.code
    finally:
        gc.collect()  # the run's lock on its folder goes with it, as when a process ends
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


def farthest(one: Path, other: Path) -> float:
    """The largest difference between any two weights of two checkpoints."""
    a, b = load_file(one), load_file(other)
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


class Broken(Exception):
    """What ends a run in the middle, in place of a power cut."""


def at_loss_call(monkeypatch, method: ModuleType, number: int, act: Callable[[], None]) -> None:
    """Call `act` when the method's loss is computed for the `number`-th time (held-out rows count)."""
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
