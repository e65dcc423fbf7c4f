"""Whole runs of dpo.py with the flags that save memory or time: what each costs, and what it saves.

Every run is the script itself, started as a user starts it, on random weights of a real shape and
random rows of TL;DR-like lengths. From its metrics.jsonl, over all steps but the first: seconds a
step and tokens/s (medians; a prompt counts once), the largest peak_memory_gib, beside what the run
itself had planned. Rounds are interleaved; x is a time over that of the first line in the same
round, median (smallest-largest). On a CPU the peak is of the whole process, so the table gives what
it is above the smallest run of `--model toy`.

MFU, on CUDA: useful operations (see bench.py's docstring: a prompt once, the head on response
tokens) of forward and backward, 3 forwards' worth, with adapters 2, since frozen weights have no
gradients; recomputing is not useful. Of 989 TFLOP/s (bf16, H100 and H200) for each process.

    python -m benchmarking.whole                                    # minutes on a laptop
    python -m benchmarking.whole --model gemma-2-2b --device cuda --markdown whole.md
    python -m benchmarking.whole --model gemma-2-2b --device cuda --processes 4 --fsdp

Copyright (c) 2026 the plainpref authors. MIT licence.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

import common
from benchmarking.measure import ROOT, Report, header, shown
from benchmarking.runs import MODELS, as_text, make_rows, save_checkpoint, useful_flops

PEAK_FLOPS = 989e12
RUNS = {
    "all weights": "",
    "... --gradient-checkpointing": "--gradient-checkpointing",
    "... --compile": "--compile",
    "--lora-rank 16": "--lora-rank 16",
    "... --gradient-checkpointing ": "--lora-rank 16 --gradient-checkpointing",
}


@dataclass
class Options:
    model: Literal[*MODELS] | None = None  # default: cpu-small, on CUDA gemma-2-2b
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # cpu or cuda
    processes: int = 1  # of torchrun
    fsdp: bool = False  # every run with it
    steps: int = 20  # of a run
    rounds: int = 1  # of which medians are taken
    pairs: int = 8  # prompts a step and process, in one forward
    attn: str = "auto"  # as in dpo.py
    compile: bool = True  # the run with --compile too
    markdown: str | None = None  # also write what is printed to this file


@dataclass
class Result:
    seconds: list[float]
    tokens: float  # a second
    peak: float  # GiB
    planned: float | None  # GiB


def one_run(args: Options, folder: Path, flags: list[str], model: Path | None = None) -> Result:
    launch = [sys.executable]
    if args.processes > 1:
        launch += ["-m", "torch.distributed.run", "--standalone"]
        launch += [f"--nproc_per_node={args.processes}"]
    with tempfile.TemporaryDirectory() as out:
        batch = args.pairs * args.processes
        command = [
            *launch, str(ROOT / "dpo.py"), "--model", str(model or folder),
            "--dataset", str(folder / "rows.jsonl"), "--eval-dataset", str(folder / "held.jsonl"),
            "--output-dir", f"{out}/run", "--cache-dir", f"{out}/cache", "--attn", args.attn,
            "--batch-size", str(batch), "--micro-batch-size", str(args.pairs),
            "--max-steps", str(args.steps), "--lr", "1e-6", "--max-length", "2048",
            "--max-prompt-length", "1024", "--eval-every", "0", "--save-every", "0",
            "--optimizer", "adamw", *flags, *(["--fsdp"] if args.fsdp else []),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
        if done.returncode:
            raise common.UserError(f"{' '.join(flags)}: {done.stderr.strip()[-600:]}")
        lines = (Path(out) / "run" / "metrics.jsonl").read_text().splitlines()
    steps = [step for step in map(json.loads, lines) if "lr" in step][1:]
    planned = re.search(r"needs about ([\d.]+)", done.stdout)
    return Result(
        [step["seconds_per_step"] for step in steps],
        statistics.median(step["tokens_per_second"] for step in steps),
        max(step["peak_memory_gib"] for step in steps),
        float(planned[1]) if planned else None,
    )


def main(args: Options) -> None:
    cuda = args.device.startswith("cuda")
    args.model = args.model or ("gemma-2-2b" if cuda else "cpu-small")
    args.dtype = "bfloat16" if cuda else "float32"
    report = Report(args.markdown)
    command = " ".join(x for x in sys.argv[1:] if "markdown" not in x and not x.endswith(".md"))
    header(report, args.device, f"python -m benchmarking.whole {command}".strip())
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        vocab = save_checkpoint(args, folder)
        many = args.steps * args.pairs * args.processes
        for name, n in (("rows", many), ("held", 4)):
            lines = "".join(
                json.dumps(row) + "\n" for row in as_text(make_rows("tldr", n, 2, vocab))
            )
            (folder / f"{name}.jsonl").write_text(lines)
        from transformers import AutoConfig, AutoModelForCausalLM

        with torch.device("meta"):
            policy = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
        forward = useful_flops(policy, make_rows("tldr", many, 2, vocab)) / 4 / args.steps
        base = 0.0
        if not cuda:  # what Python and its packages take
            toy = Options("toy", args.device, 1, False, 2, 1, 1)
            toy.dtype = args.dtype
            small = folder / "toy"
            save_checkpoint(toy, small)
            for name in ("rows", "held"):
                (small / f"{name}.jsonl").write_text(
                    "".join(json.dumps(x) + "\n" for x in as_text(make_rows("tldr", 4, 2, 500)))
                )
            base = one_run(toy, small, []).peak
        runs = {
            name: flags for name, flags in RUNS.items() if args.compile or "compile" not in name
        }
        found: dict[str, list[Result]] = {name: [] for name in runs}
        for _ in range(args.rounds):
            for name, flags in runs.items():
                found[name].append(one_run(args, folder, flags.split()))
    report.say(
        f"{args.model}, {sum(p.numel() for p in policy.parameters()) / 1e6:,.0f} M parameters, "
        f"{args.dtype}; {args.processes} process(es){', --fsdp' if args.fsdp else ''}, "
        f"{args.pairs} pairs each a step (prompts around 360, answers around 38 tokens), "
        f"{args.steps} steps, {args.rounds} round(s)\n"
    )
    first, table = next(iter(found.values())), []
    for name, results in found.items():
        seconds = [statistics.median(result.seconds) for result in results]
        speed = forward * (2 if "--lora" in runs[name] else 3) / statistics.median(seconds)
        planned = results[0].planned
        table.append([
            name.strip(), f"{statistics.median(seconds):.3g}",
            shown(seconds, [statistics.median(r.seconds) for r in first]),
            f"{statistics.median(result.tokens for result in results):,.0f}",
            f"{max(result.peak for result in results) - base:.2f}",
            "" if planned is None else f"{planned:.1f}",
            f"{speed / PEAK_FLOPS / args.processes:.1%}" if cuda else f"{speed / 1e9:.1f}",
        ])  # fmt: skip
    rate = "MFU" if cuda else "useful GFLOP/s"
    report.table(["dpo.py", "s a step", "x", "tokens/s", "peak GiB", "planned GiB", rate], table)


if __name__ == "__main__":
    try:
        main(common.command_line(Options, __doc__))
    except common.UserError as error:
        raise SystemExit(f"error: {error}") from None
