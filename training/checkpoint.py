"""Checkpoints that survive a power cut: flushed to disk, and verified before they are used."""

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import Tensor

log = logging.getLogger("plainpref")


class BackgroundWriter:
    """Calls `write` in a thread, so that training continues. The tensors must be copies. An error
    is raised by the next call, or by wait(). Python ends only after the last write.
    """

    def __init__(self, write: Callable[..., None]):
        self.write, self.pool = write, ThreadPoolExecutor(1)
        self.pending: Future | None = None

    def __call__(self, tensors: dict[str, Tensor], *facts: Any) -> None:
        self.wait()
        # The optimizer's step counters may be on the CPU: then they are no copies.
        tensors = {name: x.clone() if x.numel() == 1 else x for name, x in tensors.items()}
        self.pending = self.pool.submit(self.write, tensors, *facts)

    def wait(self) -> None:
        pending, self.pending = self.pending, None
        if pending:
            pending.result()


def seal(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Record the checksum of every file, and flush names and contents to disk. Weights that are
    not finite are refused: the last checkpoint stays the newest.
    """
    weights = {name: tensor for name, tensor in tensors.items() if name.startswith("weight|")}
    if not_finite := [name[7:] for name, tensor in weights.items() if not tensor.isfinite().all()]:
        step = json.loads((folder / "state.json").read_text())["step"]
        shutil.rmtree(folder)
        good = [path.name for path in folder.parent.glob("checkpoint-*")]
        last = max(good, key=lambda name: int(name[11:]), default="there is none")
        raise ValueError(
            f"step {step} is not saved, its weights are not finite ({not_finite[0]}, ...): lower "
            f"--lr. The last checkpoint in {folder.parent}: {last}"
        )
    sums = {file.name: file_hash(file) for file in folder.iterdir()}
    (folder / "sha256.json").write_text(json.dumps(sums, indent=1))
    for path in [*folder.iterdir(), folder]:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def damage_of(folder: Path) -> str | None:
    """What is wrong with a checkpoint, if anything."""
    try:
        sums = json.loads((folder / "sha256.json").read_text())
        changed = [name for name, digest in sums.items() if file_hash(folder / name) != digest]
        return f"{', '.join(changed)} changed since it was written" if changed else None
    except (OSError, ValueError, AttributeError) as error:
        return str(error)


def newest_whole(folders: list[Path]) -> Path | None:
    """The first undamaged checkpoint of a list, the newest first. Damaged ones before it get
    another name, so that the run can write these steps again.
    """
    damaged = []
    for folder in folders:
        if not (damage := damage_of(folder)):
            for other in damaged:
                other.rename(other.with_name(f"damaged-{time.time_ns()}-{other.name}"))
            return folder
        log.info(f"{folder.name} is damaged ({damage}); trying the one before it")
        damaged.append(folder)
    if folders:
        raise ValueError(
            f"every checkpoint in {folders[0].parent} is damaged; --resume never starts a new run"
        )
    return None


def quick_hash(path: Path) -> str:
    """Of a large file 1,024 pieces only: enough to see that weights were replaced."""
    size = path.stat().st_size
    if size < 2**28:
        return file_hash(path)
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        for piece in range(1024):
            file.seek(size // 1024 * piece)
            digest.update(file.read(2**16))
    return digest.hexdigest()


def file_hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
