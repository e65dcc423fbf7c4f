"""--track: what TensorBoard and W&B are given, and what no trouble with them may do."""

import math
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

import common
import tracking

KEY = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def no_account(monkeypatch, tmp_path):
    for name in ("API_KEY", "IDENTITY_TOKEN_FILE", "MODE", "PROJECT", "BASE_URL"):
        monkeypatch.delenv(f"WANDB_{name}", raising=False)
    monkeypatch.delenv("NETRC", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


class FakeWandb(ModuleType):
    """Keeps what it was asked for. `trouble`: the words with which it fails, in turn."""

    def __init__(self, trouble=()):
        super().__init__("wandb")
        self.__file__ = "wandb.py"
        self.starts, self.logged, self.axes, self.trouble = [], [], [], list(trouble)
        self.finished = self.torn_down = False

    def Settings(self, **how):
        return SimpleNamespace(base_url="https://wandb.test", **how)

    def init(self, **how):
        self.starts.append(how)
        if self.trouble:
            raise OSError(self.trouble.pop(0))
        return self

    url = "https://wandb.test/run"

    def define_metric(self, name, step_metric):
        self.axes.append((name, step_metric))

    def log(self, record):
        if self.trouble:
            raise BrokenPipeError(self.trouble.pop(0))
        self.logged.append(record)

    def finish(self):
        self.finished = True

    def teardown(self):
        self.torn_down = True


@pytest.fixture
def wandb(monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


# -- before anything is loaded


@pytest.mark.parametrize(
    "kind, module", [("wandb", "wandb"), ("tensorboard", "torch.utils.tensorboard")]
)
def test_a_missing_package_is_told_with_its_pip_line(kind, module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(common.UserError, match=f"pip install {kind}"):
        tracking.check(kind)


def test_a_folder_called_wandb_is_not_the_package(monkeypatch, tmp_path):
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    for name in [n for n in sys.modules if n.split(".")[0] == "wandb"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(common.UserError, match="pip install wandb"):
        tracking.check("wandb")
    sys.modules.pop("wandb", None)


def test_none_needs_nothing(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    tracking.check("none")
    tracker = tracking.start("none", tmp_path, {}, 0)
    tracker.log({"loss": 1.0}, 1)
    tracker.close()
    assert not list(tmp_path.iterdir())


def test_without_a_key_wandb_is_refused_and_not_asked(wandb):
    with pytest.raises(common.UserError) as error:
        tracking.check("wandb")
    for way in ("wandb login", "WANDB_API_KEY", "WANDB_MODE=offline"):
        assert way in str(error.value)
    assert not wandb.starts


@pytest.mark.parametrize("mode", ["offline", "disabled"])
def test_without_a_network_no_key_is_needed(wandb, mode, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", mode)
    tracking.check("wandb")


def test_a_key_may_stand_in_the_environment_or_in_netrc(wandb, monkeypatch, tmp_path):
    with monkeypatch.context() as here:
        here.setenv("WANDB_API_KEY", KEY)
        tracking.check("wandb")
    netrc = tmp_path / "netrc"
    monkeypatch.setenv("NETRC", str(netrc))
    for host, known in (("api.wandb.ai", True), ("wandb.test", True), ("other.test", False)):
        netrc.write_text(f"machine {host}\n  login user\n  password {KEY}\n")
        if known:
            tracking.check("wandb")
        else:
            with pytest.raises(common.UserError):
                tracking.check("wandb")


# -- what they get


def test_wandb_gets_the_run_and_its_numbers(wandb, monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    folder = tmp_path / "dpo-lr1e-4"
    folder.mkdir()
    tracker = tracking.start("wandb", folder, {"lr": 1e-4}, 0)
    record = {"step": 1, "loss": 0.5, "kl": None, "grad_norm": math.nan, "lr": 0.1}
    tracker.log(record, 1)
    tracker.close()
    (how,) = wandb.starts
    assert (how["project"], how["name"]) == ("plainpref", "dpo-lr1e-4")
    assert (how["dir"], how["config"], how["resume"]) == (str(folder), {"lr": 1e-4}, "allow")
    settings = vars(how["settings"])
    assert settings["console"] == "off" and settings["save_code"] is False
    assert settings["disable_code"] and settings["disable_git"]
    assert wandb.axes == [("*", "step")]
    assert wandb.logged == [{"step": 1, "loss": 0.5, "lr": 0.1}]  # null and nan are left out
    assert wandb.finished
    tracker.log(record, 2)  # closed is closed
    assert len(wandb.logged) == 1


def test_a_resumed_run_is_the_same_one_in_wandb(wandb, monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    for step in (0, 3):
        tracker = tracking.start("wandb", tmp_path, {}, step)
        tracker.log({"loss": 1.0}, step + 1)
        tracker.close()
    first, second = wandb.starts
    assert first["id"] == second["id"] == (tmp_path / "wandb-id").read_text().strip()
    assert first["project"] == "mine"
    # Their own axis is `step`, so that a step logged twice is not dropped.
    assert [record["step"] for record in wandb.logged] == [1, 4]
    assert KEY not in "".join(p.read_text() for p in tmp_path.rglob("*") if p.is_file())


def test_offline_there_is_nothing_to_resume(wandb, monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "offline")
    tracking.start("wandb", tmp_path, {}, 0)
    assert "resume" not in wandb.starts[0]


def test_no_network_at_the_start_means_offline(wandb, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    wandb.trouble = ["no route to host"]
    tracker = tracking.start("wandb", tmp_path, {}, 0)
    tracker.log({"loss": 1.0}, 1)
    assert wandb.torn_down and wandb.starts[1]["mode"] == "offline"
    assert wandb.logged == [{"loss": 1.0, "step": 1}]
    shown = capsys.readouterr().out
    assert "no route to host" in shown and "wandb sync" in shown


def test_trouble_later_is_told_once_and_stops_nothing(wandb, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    tracker = tracking.start("wandb", tmp_path, {}, 0)
    wandb.trouble = ["the service is gone", "and still is"]
    for step in (1, 2, 3):
        tracker.log({"loss": 1.0}, step)
    tracker.close()
    shown = capsys.readouterr().out
    assert shown.count("no more tracking") == 1 and "the service is gone" in shown


def test_tensorboard_shows_a_step_once_after_a_resume(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracking.check("tensorboard")
    tracker = tracking.start("tensorboard", tmp_path, {"lr": 0.1}, 0)
    for step in range(1, 6):
        tracker.log({"step": step, "loss": float(step), "kl": None, "x": math.inf}, step)
    tracker.close()
    tracker = tracking.start("tensorboard", tmp_path, {"lr": 0.1}, 3)  # the checkpoint was at 3
    for step in range(4, 8):
        tracker.log({"step": step, "loss": -float(step)}, step)
    tracker.close()
    files = list((tmp_path / "tensorboard").iterdir())
    assert len(files) == 2 and all(isinstance(f, Path) for f in files)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    seen = {event.step: event.value for event in events.Scalars("loss")}
    assert seen == {1: 1, 2: 2, 3: 3, 4: -4, 5: -5, 6: -6, 7: -7}
    assert len(events.Scalars("loss")) == 7
    assert set(events.Tags()["scalars"]) == {"loss", "step"}
    (text,) = [tag for tag in events.Tags()["tensors"] if "arguments" in tag]
    assert b"| lr | 0.1 |" in events.Tensors(text)[0].tensor_proto.string_val[0]


def test_a_disk_that_is_full_stops_nothing(tmp_path, capsys):
    pytest.importorskip("tensorboard")
    (tmp_path / "tensorboard").write_text("a file where the folder should be")
    tracking.start("tensorboard", tmp_path, {}, 0).log({"loss": 1.0}, 1)
    assert "no more tracking" in capsys.readouterr().out
