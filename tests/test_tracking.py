"""--track: what TensorBoard and W&B receive, and that their failures never end a run."""

import logging
import math
import sys
from types import ModuleType, SimpleNamespace

import pytest

from training import tracking


class FakeWandb(ModuleType):
    """Records calls. `failures`: messages of the exceptions that init and log raise, in turn."""

    url = "https://wandb.test/run"

    def __init__(self):
        super().__init__("wandb")
        self.__file__ = "wandb.py"
        self.starts, self.logged, self.axes, self.failures = [], [], [], []
        self.has_key, self.finished = True, 0

    def Settings(self, **how):
        return SimpleNamespace(**how)

    def login(self, prompt, verify):
        assert not prompt and not verify  # no question, no network
        return self.has_key

    def init(self, **how):
        self.starts.append(how)
        if self.failures:
            raise OSError(self.failures.pop(0))
        return self

    def define_metric(self, name, step_metric):
        self.axes.append((name, step_metric))

    def log(self, record):
        if self.failures:
            raise BrokenPipeError(self.failures.pop(0))
        self.logged.append(record)

    def finish(self):
        self.finished += 1


@pytest.fixture
def wandb(monkeypatch):
    for name in ("MODE", "PROJECT"):
        monkeypatch.delenv(f"WANDB_{name}", raising=False)
    monkeypatch.setitem(sys.modules, "wandb", fake := FakeWandb())
    return fake


@pytest.mark.parametrize("kind", ["wandb", "tensorboard"])
def test_a_missing_package_is_refused(kind, monkeypatch):
    module = {"wandb": "wandb", "tensorboard": "torch.utils.tensorboard"}[kind]
    for there in (None, ModuleType(module)):  # nothing, or a folder of that name
        monkeypatch.setitem(sys.modules, module, there)
        with pytest.raises(ValueError, match=f"pip install {kind}"):
            tracking.check(kind)


def test_wandb_without_a_key_is_refused_unless_offline(wandb, monkeypatch):
    tracking.check("wandb")
    wandb.has_key = False
    with pytest.raises(ValueError, match="wandb login.*WANDB_API_KEY.*WANDB_MODE=offline"):
        tracking.check("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    tracking.check("wandb")
    assert not wandb.starts


def test_wandb_gets_the_run_and_its_numbers(wandb, monkeypatch, tmp_path):
    """A resumed run is the same run there."""
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    for step in (0, 3):
        tracker = tracking.start("wandb", tmp_path, {"lr": 1e-4}, step)
        tracker.log({"step": step + 1, "loss": 0.5, "kl": None, "grad_norm": math.nan}, step + 1)
        tracker.close()
        tracker.log({"loss": 1.0}, 9)  # does nothing after close()
    first, second = wandb.starts
    assert first["id"] == second["id"] == (tmp_path / "wandb-id").read_text().strip()
    assert (first["project"], first["name"], first["resume"]) == ("mine", tmp_path.name, "allow")
    assert (first["dir"], first["config"]) == (str(tmp_path), {"lr": 1e-4})
    assert not first["settings"].save_code and first["settings"].console == "off"
    assert wandb.axes[0] == ("*", "step")  # else steps that are logged twice would be dropped
    assert wandb.logged == [{"step": 1, "loss": 0.5}, {"step": 4, "loss": 0.5}]
    assert wandb.finished == 2


def test_a_failure_warns_once_and_stops_nothing(wandb, tmp_path, caplog):
    for at_start in (True, False):
        caplog.clear()
        wandb.failures = ["no route to host"] if at_start else []
        tracker = tracking.start("wandb", tmp_path, {}, 0)
        wandb.failures = ["no route to host", "still none"]
        tracker.log({"loss": 1.0}, 1)
        tracker.log({"loss": 1.0}, 2)
        tracker.close()
        (record,) = [r for r in caplog.records if r.levelno >= logging.WARNING]
        assert "no route to host" in record.message


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracking.check("tensorboard")
    for start, sign in ((0, 1.0), (3, -1.0)):  # the checkpoint was at step 3
        tracker = tracking.start("tensorboard", tmp_path, {"lr": 0.1}, start)
        for step in range(start + 1, start + 6):
            tracker.log({"loss": sign * step, "kl": None, "x": math.inf}, step)
        tracker.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    seen = [(event.step, event.value) for event in events.Scalars("loss")]
    assert seen == [(1, 1), (2, 2), (3, 3), (4, -4), (5, -5), (6, -6), (7, -7), (8, -8)]
    assert events.Tags()["scalars"] == ["loss"]
