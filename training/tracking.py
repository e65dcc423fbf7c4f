"""--track: send metrics to TensorBoard or W&B too. It never prompts, and never ends a run."""

# Tested with tensorboard 2.21 and wandb 0.31.
import logging
import math
import os
import secrets
from importlib import import_module
from pathlib import Path

log = logging.getLogger("plainpref")


def check(kind: str) -> None:
    """Check, before anything is loaded, that the package is installed and that W&B has a key."""
    if kind == "none":
        return
    try:
        module = import_module({"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}[kind])
    except ImportError:
        module = None
    if getattr(module, "__file__", None) is None:  # a folder called wandb imports too
        raise ValueError(f"--track {kind}: pip install {kind}")
    offline = os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun")
    if kind == "wandb" and not offline and not module.login(prompt=False, verify=False):
        ways = "run `wandb login`, or set WANDB_API_KEY or WANDB_MODE=offline"
        raise ValueError(f"--track wandb: no key was found: {ways}")


def start(kind: str, folder: Path, config: dict, step: int) -> "Tracker":
    """A tracker for the run in `folder`, which continues after `step`."""
    tracker = Tracker()
    if kind != "none":
        make = {"tensorboard": TensorBoard, "wandb": Wandb}[kind]
        tracker.attempt(lambda: setattr(tracker, "target", make(folder, config, step)))
    return tracker


class Tracker:
    """After the first failure it warns once and the run continues without tracking."""

    target = None  # a TensorBoard or a Wandb

    def log(self, record: dict[str, float | None], step: int) -> None:
        numbers = {k: v for k, v in record.items() if v is not None and math.isfinite(v)}
        self.attempt(lambda: self.target and self.target.log(numbers, step))

    def close(self) -> None:
        self.attempt(lambda: self.target and self.target.close())
        self.target = None

    def attempt(self, action) -> None:
        try:
            action()
        except Exception as error:
            self.target = None
            log.warning("tracking stops, the run continues: %s", str(error)[:200])


class TensorBoard:
    def __init__(self, folder: Path, config: dict, step: int):
        from torch.utils.tensorboard import SummaryWriter

        # purge_step hides what was logged after the checkpoint, because it will be logged again.
        self.writer = SummaryWriter(folder / "tensorboard", purge_step=step + 1, flush_secs=10)
        lines = [f"| {name} | {value} |" for name, value in config.items()]
        self.writer.add_text("arguments", "\n".join(["| | |", "|-|-|", *lines]), step)
        self.close = self.writer.close
        log.info("track: tensorboard --logdir %s", folder)

    def log(self, record: dict[str, float], step: int) -> None:
        for name, value in record.items():
            self.writer.add_scalar(name, value, step)


class Wandb:
    def __init__(self, folder: Path, config: dict, step: int):
        import wandb

        id_file = folder / "wandb-id"
        if not id_file.is_file():
            id_file.write_text(secrets.token_hex(4) + "\n")
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "plainpref"),
            name=folder.resolve().name,
            id=id_file.read_text().strip(), resume="allow",
            dir=str(folder), config=config,
            settings=wandb.Settings(
                quiet=True, console="off", save_code=False, disable_code=True, disable_git=True,
                login_timeout=1, init_timeout=60, finish_timeout=60,
            ),
        )  # fmt: skip
        # W&B's own step counter only grows: steps that a resumed run repeats would be dropped.
        self.run.define_metric("*", step_metric="step")
        self.close = self.run.finish
        log.info("track: %s", self.run.url or f"{folder}/wandb")

    def log(self, record: dict[str, float], step: int) -> None:
        self.run.log(record | {"step": step})
