"""What bench.py and kernels/bench.py share: what is printed, how memory and ratios are taken.

Copyright (c) 2026 the plainpref authors. MIT licence.
"""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import statistics
import subprocess
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent


class Report:
    """Prints lines and tables as they come, and keeps them for a file."""

    def __init__(self, file: str | None = None):
        self.file, self.lines, self.weak = file, [], []

    def say(self, text: str = "") -> None:
        print(text, flush=True)
        self.lines.append(text)
        if self.file:
            Path(self.file).write_text("\n".join(self.lines) + "\n", encoding="utf-8")

    def table(self, head: list[str], rows: list[list[str]]) -> None:
        widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
        rule = ["-" * widths[0]] + ["-" * (n - 1) + ":" for n in widths[1:]]
        for row in (head, rule, *rows):
            cells = [row[0].ljust(widths[0])]
            cells += [x.rjust(n) for x, n in zip(row[1:], widths[1:], strict=True)]
            self.say(f"| {' | '.join(cells)} |")
        self.say()

    def close(self) -> None:
        """The weak spots, so that nobody has to look for them."""
        self.say("Where ours is not ahead: " + ("nowhere above" if not self.weak else ""))
        for spot in self.weak:
            self.say(f"- {spot}")


def header(report: Report, device: str, command: str) -> None:
    def version(package: str) -> str:
        try:
            return f"{package} {metadata.version(package)}"
        except metadata.PackageNotFoundError:
            return f"{package} not installed"

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip()

    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        facts = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((x.split(": ")[1] for x in facts if x.startswith("model name")), cpu)
    packages = "torch transformers trl triton liger-kernel cut-cross-entropy".split()
    changed = " with changes" if git("status", "--porcelain", "--untracked-files=no") else ""
    report.say(f"`{command}`")
    report.say()
    gpu = f"{torch.cuda.get_device_name()}; " if device.startswith("cuda") else ""
    report.say(f"- {gpu}{cpu}, {os.cpu_count()} cores, {torch.get_num_threads()} threads")
    report.say(f"- Python {platform.python_version()}, {', '.join(map(version, packages))}")
    commit = git("rev-parse", "--short", "HEAD") or "unknown"
    report.say(f"- commit {commit}{changed}, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC")
    report.say()


class Peak:
    """`with Peak(device) as peak: ...`, then `peak.mb`: how far memory rose above where it stood.

    On a CPU the kernel's own high-water mark of this process, reset at the start (Linux; else nan).
    """

    def __init__(self, device: str):
        self.cuda = device.startswith("cuda")

    def __enter__(self) -> Peak:
        gc.collect()
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.start = torch.cuda.memory_allocated()
            return self
        try:
            ctypes.CDLL(None).malloc_trim(
                0
            )  # what was freed, but not given back, would hide a rise
            Path("/proc/self/clear_refs").write_text("5")
            self.start = self._status("VmRSS")
        except (OSError, AttributeError):
            self.start = float("nan")
        return self

    def __exit__(self, *_) -> None:
        if self.cuda:
            torch.cuda.synchronize()
            self.mb = (torch.cuda.max_memory_allocated() - self.start) / 1e6
        else:
            known = self.start == self.start
            self.mb = (self._status("VmHWM") - self.start) / 1e6 if known else self.start

    @staticmethod
    def _status(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(x for x in lines if x.startswith(name)).split()[1])


def ratios(theirs: list[float], ours: list[float]) -> tuple[float, float, float]:
    """Median, smallest and largest of the ratios of one round each."""
    found = [a / b for a, b in zip(theirs, ours, strict=True)]
    return statistics.median(found), min(found), max(found)


def mb(megabytes: float) -> str:
    return f"{megabytes:,.0f}" if megabytes >= 10 else f"{megabytes:.2g}"


def shown(theirs: list[float], ours: list[float]) -> str:
    return "{:.2f} ({:.2f}-{:.2f})".format(*ratios(theirs, ours))


@dataclass
class Watch:
    """Of a run's steps the first is thrown away, the last measures memory, the others are timed."""

    last: int
    device: str
    done: int = 0
    seconds: list[float] = field(default_factory=list)

    def begin(self) -> None:
        if self.done == self.last:
            self.peak = Peak(self.device).__enter__()
        self.start = self.now()

    def end(self) -> None:
        seconds = self.now() - self.start
        if self.done == self.last:
            self.peak.__exit__()
        elif self.done:
            self.seconds.append(seconds)
        self.done += 1

    def now(self) -> float:
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()
        return time.perf_counter()
