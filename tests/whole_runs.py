"""Whole runs of the method files, in this process or as a user starts them."""

import hashlib
import json
from pathlib import Path
from types import ModuleType

import pytest

import common
from training import report, run_folder

TIMINGS = {"tokens_per_second", "seconds_per_step", "peak_memory_gib"}
SMALL = {
    "batch_size": 8, "micro_batch_size": 4, "max_steps": 6, "lr": 1e-3, "schedule": "constant",
    "warmup_ratio": 0.0, "optimizer": "adamw", "dtype": "float32", "max_length": 64,
    "max_prompt_length": 40, "eval_every": 3, "save_every": 2,
}  # fmt: skip
OWN = {  # flags of each method that turn on every term of its loss
    "dpo": {"beta": 0.5},
    "sft": {},
    "ipo": {"beta": 0.5},
    "cpo": {"beta": 0.3, "nll_weight": 0.5},
    "orpo": {"odds_weight": 2.0},
    "simpo": {"beta": 2.0, "gamma_beta_ratio": 0.5, "nll_weight": 0.3},
    "slic": {"beta": 0.5, "delta": 2.0, "target_weight": 0.2},
    "kto": {"beta": 0.5, "desirable_weight": 1.5},
    "pro": {"sft_weight": 0.1, "score_scale": 0.5},
    "listwise_dpo": {"beta": 0.5},
    "rrhf": {"sft_weight": 0.1, "margin": 0.5},
}


def train(method: ModuleType, model: Path, dataset: Path, folder: str | Path, **flags) -> int:
    """A run in this process, without curves. Returns the exit status that a shell would see."""
    values = SMALL | OWN[method.__name__]
    values |= {"model": str(model), "dataset": str(dataset), "output_dir": str(folder)} | flags
    locks, lock = [], run_folder._lock
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_folder, "_lock", lambda path: locks.append(lock(path)) or locks[-1])
        patch.setattr(report, "curves", lambda *_: None)
        try:
            method.main(method.Args(**values))
        except SystemExit as stop:
            return stop.code
        finally:
            for file in locks:
                file.close()  # as when a process ends
    return 0


def stop_after(monkeypatch, step: int, act) -> None:
    """Call `act` right before step number `step` ends."""
    end_step = common.Run.end_step

    def hook(self, grad_norm):
        if self.step == step:
            act(self)
        end_step(self, grad_norm)

    monkeypatch.setattr(common.Run, "end_step", hook)


def crash(run) -> None:
    raise RuntimeError("as if the machine had failed")


def as_flags(**values) -> list[str]:
    named = [[f"--{name.replace('_', '-')}", str(value)] for name, value in values.items()]
    return [word for pair in named for word in pair]


def lines_of(folder: str | Path) -> list[dict]:
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def steps_of(folder: str | Path) -> list[dict]:
    return [line for line in lines_of(folder) if "lr" in line]


def without_timings(folder: str | Path) -> list[dict]:
    return [{k: v for k, v in line.items() if k not in TIMINGS} for line in lines_of(folder)]


def weights_of(folder: str | Path) -> str:
    return hashlib.sha256((Path(folder) / "model.safetensors").read_bytes()).hexdigest()


def assert_same_run(one: str | Path, other: str | Path) -> None:
    """The same weights bit for bit, and the same log line by line."""
    assert weights_of(one) == weights_of(other)
    assert without_timings(one) == without_timings(other)


def assert_close(one: str | Path, other: str | Path, tolerance: float = 1e-9) -> None:
    """The same weights and metrics up to rounding in float64."""
    from safetensors.torch import load_file

    a, b = (load_file(Path(folder) / "model.safetensors") for folder in (one, other))
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name].double() - b[name].double()).abs().max() <= tolerance, name
    for line, there in zip(without_timings(one), without_timings(other), strict=True):
        assert line == pytest.approx(there, rel=1e-7, abs=1e-9)
