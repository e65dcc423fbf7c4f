"""Errors that the user can fix, as one line without a traceback, printed once."""

import errno
import json
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable
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
        text = "stopped by Ctrl-C"
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

    frames = traceback.walk_tb(trace)
    files = [Path(frame.f_code.co_filename).resolve() for frame, _ in frames]
    ours = files and files[-1].is_relative_to(HOME)
    if running and memory.is_out_of_memory(error):
        if any(file.is_relative_to(HOME / "data") for file in files):
            return "out of memory while reading rows, which are all kept in memory: use fewer"
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


def printable(text: str, keep: str = "") -> str:
    """Escape characters that control the terminal, except those in `keep`."""
    return "".join(c if c.isprintable() or c in keep else repr(c)[1:-1] for c in text)


def escaped(text: str) -> str:
    """Printable. A message has one line, or a list under it."""
    first, *more = map(printable, text.split("\n"))
    return "\n".join([first, *(f"  {line.strip()}" for line in more)])


class Output:
    """stdout or stderr. A run continues if nobody reads it: `| head`, a terminal that is closed."""

    def __init__(self, stream: Any, keep: str):
        self.stream, self.keep = stream, keep

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> None:
        self.attempt(self.stream.write, printable(text, self.keep))

    def flush(self) -> None:
        self.attempt(self.stream.flush)

    def attempt(self, call: Callable, *text: str) -> None:
        try:
            call(*text)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


def guard_output() -> None:
    """stdout shows texts from data sets and models; stderr moves the cursor for progress bars."""
    if not isinstance(sys.stdout, Output):
        sys.stdout = Output(sys.stdout, "\n\t")
    if not isinstance(sys.stderr, Output):
        sys.stderr = Output(sys.stderr, "\n\t\r\x1b")


def install() -> None:
    sys.excepthook = show
