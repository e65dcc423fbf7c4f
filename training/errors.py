"""Errors that the user can fix, as one line without a traceback, printed once."""

import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

HOME = Path(__file__).resolve().parent.parent
running: dict[str, Any] = {}  # "args" and "world" of the run, for the advice when memory runs out


def show(kind: type, error: BaseException, trace: Any) -> None:
    """A ValueError or OSError that this project raised itself is for the user."""
    from training import memory

    while trace and trace.tb_next:
        trace = trace.tb_next
    ours = trace and Path(trace.tb_frame.f_code.co_filename).resolve().is_relative_to(HOME)
    text = str(error)
    if running and memory.is_out_of_memory(error):
        sys.__excepthook__(kind, error, error.__traceback__)
        text = f"out of memory: {memory.hint(running['args'], running['world'])}"
    elif not (ours and isinstance(error, ValueError | OSError)):
        sys.__excepthook__(kind, error, error.__traceback__)
        return
    rank = int(os.environ.get("RANK", "0"))
    if rank:  # usually the main process fails too: it prints, and torchrun ends this one
        time.sleep(20)
    where = f" on process {rank} ({platform.node()})" if rank else ""
    print(f"error{where}: {text}", file=sys.stderr, flush=True)


def install() -> None:
    sys.excepthook = show
