"""Errors that the user can fix, as one line without a traceback, printed once."""

import errno
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

HOME = Path(__file__).resolve().parent.parent
running: dict[str, Any] = {}  # "args" and "world" of the run, for the advice when memory runs out
OF_THE_SYSTEM = {  # errors of files and disks; elsewhere they would be bugs of ours
    getattr(errno, name, None)
    for name in "EACCES EPERM EROFS ENOENT ENOTDIR EISDIR ENOSPC EDQUOT ENAMETOOLONG ELOOP".split()
} - {None}


def show(kind: type, error: BaseException, trace: Any) -> None:
    """A ValueError that this project raised itself is for the user; so is an error of a disk."""
    text = explain(error, trace)
    if isinstance(error, KeyboardInterrupt):
        text = "stopped"
    elif text is None or text.startswith("out of memory"):
        sys.__excepthook__(kind, error, trace)
    rank = int(os.environ.get("RANK", "0"))
    if rank:  # usually the main process fails too: it prints, and torchrun ends this one
        time.sleep(20)
    where = f" on process {rank} ({platform.node()})" if rank else ""
    if text:
        print(f"error{where}: {escaped(text)}", file=sys.stderr, flush=True)
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):  # torchrun repeats it at its end
        text = escaped(text or f"{kind.__name__}: {error}")
        Path(file).write_text(json.dumps({"message": text, "timestamp": str(int(time.time()))}))


def explain(error: BaseException, trace: Any) -> str | None:
    """The message for an error that the user can fix; None if it is a bug."""
    from training import memory

    while trace and trace.tb_next:
        trace = trace.tb_next
    ours = trace and Path(trace.tb_frame.f_code.co_filename).resolve().is_relative_to(HOME)
    if running and memory.is_out_of_memory(error):
        args = running["args"]
        sampling = (
            ", or a smaller --sample-batch-size" if hasattr(args, "sample_batch_size") else ""
        )
        return f"out of memory: {memory.hint(args, running['world'])}{sampling}"
    if isinstance(error, OSError) and error.errno in OF_THE_SYSTEM:
        return message_of(error)
    if isinstance(error, ModuleNotFoundError) and ours:
        folder = (error.name or "").split(".")[0]
        if folder in ("data", "evaluation", "family", "kernels", "sampling", "training"):
            return f"the folder {folder}/ is needed next to {Path(sys.argv[0]).name}: copy it too"
    return message_of(error) if ours and isinstance(error, ValueError | OSError) else None


def message_of(error: ValueError | OSError) -> str:
    system = getattr(error, "strerror", None)
    return f"{system}: {error.filename or 'writing a file'}" if system else str(error)


def escaped(text: str) -> str:
    """Without characters that control the terminal. A message has one line, or a list under it."""
    lines = text.split("\n")
    lines = ["".join(c if c.isprintable() else repr(c)[1:-1] for c in line) for line in lines]
    return "\n".join([lines[0], *(f"  {line.strip()}" for line in lines[1:])])


def install() -> None:
    sys.excepthook = show
