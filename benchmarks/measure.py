"""What the benchmarks share: the header, peak memory, ratios, tables.

A ratio is of two numbers of the same round, shown as median (smallest-largest).

Copyright (c) 2026 the plainpref authors. MIT licence.
"""

import ctypes
import gc
import os
import platform
import statistics
import sys
from datetime import UTC, datetime
from pathlib import Path

import torch

from training.run_folder import git_commit, package_version


def print_header(device: str) -> None:
    """The command, and what its numbers depend on."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((x.split(": ")[1] for x in lines if x.startswith("model name")), cpu)
    gpu = f"{torch.cuda.get_device_name()}; " if device == "cuda" else ""
    packages = ("torch", "transformers", "trl", "triton")
    versions = ", ".join(f"{name} {package_version(name)}" for name in packages)
    name = Path(sys.argv[0]).stem
    print(f"`{' '.join(['python -m', f'benchmarks.{name}', *sys.argv[1:]])}`\n")
    print(f"- {gpu}{cpu}, {os.cpu_count()} cores, {torch.get_num_threads()} threads")
    print(f"- Python {platform.python_version()}, {versions}")
    print(f"- commit {git_commit()}, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC\n", flush=True)


class Peak:
    """Memory from here on: `rise()` is how far its peak went above where it was, in MB.

    On a CPU it is read from the kernel's high-water mark of this process (Linux; elsewhere nan).
    """

    def __init__(self, device: str):
        self.cuda = device == "cuda"
        gc.collect()
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.start = torch.cuda.memory_allocated() / 1e6
        elif platform.system() == "Linux":
            ctypes.CDLL(None).malloc_trim(0)  # memory that was freed but kept would hide a rise
            Path("/proc/self/clear_refs").write_text("5")  # resets the mark
            self.start = status_mb("VmRSS")

    def rise(self) -> float:
        if self.cuda:
            return torch.cuda.max_memory_allocated() / 1e6 - self.start
        return status_mb("VmHWM") - self.start if platform.system() == "Linux" else float("nan")


def status_mb(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024 / 1e6


def ratio(theirs: list[float], ours: list[float]) -> str:
    found = [a / max(b, 1e-9) for a, b in zip(theirs, ours, strict=True)]
    return f"{statistics.median(found):.2f} ({min(found):.2f}-{max(found):.2f})"


def print_table(lines: list[list[str]]) -> None:
    lines = [lines[0], ["---", *["---:"] * (len(lines[0]) - 1)], *lines[1:]]
    print("\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines), flush=True)
