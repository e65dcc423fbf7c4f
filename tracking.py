"""--track: what a run measures, in TensorBoard or Weights & Biases too. From the main process only,
imported only then, with no question at the keyboard; and no trouble with it ends a run.

Copyright (c) 2026 the plainpref authors. MIT licence. Tested with tensorboard 2.21 and wandb 0.31.
"""

import math
import netrc
import os
import secrets
from importlib import import_module
from pathlib import Path
from urllib.parse import urlsplit

import common


def check(kind: str) -> None:
    """Before anything is loaded: the package is there, and W&B would know who is asking."""
    modules = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}
    try:
        # A folder that is called wandb imports too, as an empty package.
        there = kind == "none" or import_module(modules[kind]).__file__
    except ImportError:
        there = False
    if not there:
        raise common.UserError(f"--track {kind}: pip install {kind}")
    if kind == "wandb" and _online() and not _has_key():
        raise common.UserError(
            "--track wandb: no key for W&B was found. Run `wandb login` once, or set "
            "WANDB_API_KEY, or keep the run on this machine with WANDB_MODE=offline"
        )


def _online() -> bool:
    return os.environ.get("WANDB_MODE", "online") not in ("offline", "disabled", "dryrun")


def _has_key() -> bool:
    import wandb

    # What `wandb login` wrote, under the server's name or the one it used to have.
    hosts = {urlsplit(wandb.Settings().base_url).netloc, "api.wandb.ai"}
    for name in (os.environ.get("NETRC"), "~/.netrc", "~/_netrc"):
        try:
            if name and hosts & {*netrc.netrc(Path(name).expanduser()).hosts}:
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return any(os.environ.get(f"WANDB_{x}") for x in ("API_KEY", "IDENTITY_TOKEN_FILE"))


def start(kind: str, folder: Path, config: dict, step: int) -> "Tracker":
    """For the run in `folder`, which stands at `step`."""
    tracker = Tracker()
    make = {"none": lambda *_: None, "tensorboard": TensorBoard, "wandb": Wandb}[kind]
    tracker.guard(lambda: setattr(tracker, "to", make(folder, config, step)))
    return tracker


class Tracker:
    """What a run talks to. The first trouble is told, and the run goes on without."""

    to = None

    def log(self, record: dict[str, float | None], step: int) -> None:
        numbers = {k: v for k, v in record.items() if v is not None and math.isfinite(v)}
        self.guard(lambda: self.to and self.to.log(numbers, step))

    def close(self) -> None:
        self.guard(lambda: self.to and self.to.close())
        self.to = None

    def guard(self, act) -> None:
        try:
            act()
        except Exception as error:
            self.to = None
            common.say("warning", f"no more tracking: {common.first_line(error)}")


class TensorBoard:
    def __init__(self, folder: Path, config: dict, step: int):
        from torch.utils.tensorboard import SummaryWriter

        # What was logged after the checkpoint is hidden, for it will be logged again.
        self.writer = SummaryWriter(folder / "tensorboard", purge_step=step + 1, flush_secs=10)
        lines = [f"| {name} | {value} |" for name, value in config.items()]
        self.writer.add_text("arguments", "\n".join(["| | |", "|-|-|", *lines]), step)
        self.close = self.writer.close
        common.say("track", f"tensorboard --logdir {folder}")

    def log(self, record: dict[str, float], step: int) -> None:
        for name, value in record.items():
            self.writer.add_scalar(name, value, step)


class Wandb:
    def __init__(self, folder: Path, config: dict, step: int):
        import wandb

        known = folder / "wandb-id"
        if not known.is_file():
            known.write_text(secrets.token_hex(4) + "\n")
        quiet = {"console": "off", "save_code": False, "disable_code": True, "disable_git": True}
        # Should it ask after all, it gives up; so it does when the network is away.
        quiet |= {"quiet": True, "login_timeout": 1, "init_timeout": 60, "finish_timeout": 60}
        fields = getattr(wandb.Settings, "model_fields", quiet)  # of this version
        how = {
            "project": os.environ.get("WANDB_PROJECT", "plainpref"), "name": folder.resolve().name,
            "id": known.read_text().strip(), "dir": str(folder), "config": config,
            "settings": wandb.Settings(**{k: v for k, v in quiet.items() if k in fields}),
        }  # fmt: skip
        online = _online()
        try:
            self.run = wandb.init(**how, **({"resume": "allow"} if online else {}))
        except Exception as error:
            if not online:
                raise
            online = False
            common.say("warning", f"W&B cannot be reached ({common.first_line(error)}); later:")
            common.say("", f"wandb sync {folder}/wandb/offline-*")
            wandb.teardown()  # it would still hold the id
            self.run = wandb.init(**how, mode="offline")
        # Its own count only grows: steps that a resumed run makes again would be dropped.
        self.run.define_metric("*", step_metric="step")
        self.close = self.run.finish
        common.say("track", (online and self.run.url) or f"{folder}/wandb")

    def log(self, record: dict[str, float], step: int) -> None:
        self.run.log(record | {"step": step})
