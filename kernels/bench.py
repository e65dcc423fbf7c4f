"""The head alone: response log-probs from hidden states, forward and forward + backward.

Ours is token_logps.py, as it decides itself what to keep, and with `keep_bytes=0`. Against it, side
by side in one process: the logits of all positions, as classic code makes them; those of the
response tokens only; TRL's fused head, called by TRL's own code as its DPOTrainer does (on a CPU it
scores every position), and its function on response tokens and log-probs alone; and, where they can
be imported, Liger's DPO loss, Apple's cut-cross-entropy and torch's own linear_cross_entropy.

A DPO loss on top (no reference) makes all give one gradient. Each is first held against float64;
one that disagrees is not timed. Then come rounds, in which all are asked in turn; order and inputs
change from round to round, the first round is thrown away, and a ratio is of two times of one
round: median (smallest-largest). `extra MB` is how far memory rises in a forward and backward, the
gradients of hidden states and weight, which all must make, with it. On CUDA the floor is three
products of 2 T H V operations (forward alone: one) at the rate of an 8192^3 bf16 product of the
same run, and one pass over T V numbers of 2 bytes, read and written, at the rate of a copy.

    python -m kernels.bench                                     # minutes on a laptop
    python -m kernels.bench --quick                             # seconds
    python -m kernels.bench --device cuda --markdown head.md

Copyright (c) 2026 the plainpref authors. MIT licence.
"""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for: python kernels/bench.py

import common  # noqa: E402
from benchmarking.heads import (  # noqa: E402
    MODELS,
    Contestant,
    Problem,
    contestants,
    errors,
    make_problems,
    true_logps,
    truth_of,
)
from benchmarking.measure import Peak, Report, header, mb, ratios, shown  # noqa: E402

Size = tuple[int, int, int]  # sequences, tokens of each, response tokens of those
Rates = tuple[float, float]  # operations and bytes a second
ON_CPU: dict[str, Size] = {
    "gpt2": (8, 400, 40), "gemma-2-2b": (2, 200, 32),
    "tinyllama": (4, 200, 32), "llama-3.2-1b": (2, 100, 32),
}  # fmt: skip
QUICK = {"gpt2": (2, 60, 16), "toy": (4, 24, 8), "toy-capped": (4, 24, 8)}
CPU_SHAPES = tuple(ON_CPU)  # the rest is run where it is asked for
ON_CPU |= {f"{name}-capped": ON_CPU[name] for name in ("gpt2", "tinyllama", "llama-3.2-1b")}
ON_CPU["gemma-2-2b-uncapped"] = ON_CPU["gemma-2-2b"]
ON_CUDA = "gemma-2-2b tinyllama eurollm-1.7b gpt2 llama-3.2-1b".split()
ON_CUDA += "gemma-2-2b-uncapped llama-3.2-1b-capped tinyllama-capped gpt2-capped".split()
TOKENS = (64, 128, 256, 512, 2048, 8192)
# What float64 may differ by: log-prob of a sequence (nats), gradients (relative). In bf16 whoever
# rounds the logits is off by tenths of a nat, and that is measured, not refused.
ROUNDING = "ours|ours, gather_log_softmax|packed logits|TRL, packed, log-probs only".split("|")
LEEWAY = {"float32": (1e-2, 1e-3), "bfloat16": (2.0, 0.1)}


@dataclass
class Options:
    shapes: tuple[Literal[*MODELS], ...] = ()  # default: four on a CPU, five on CUDA
    tokens: tuple[int, ...] = ()  # scored tokens, without a prompt; default: 64 to 8192 on CUDA
    rounds: int = 3  # of which medians are taken, after one that is thrown away
    dtype: Literal["float32", "bfloat16"] | None = None  # default: float32 on a CPU, else bfloat16
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # cpu or cuda
    quick: bool = False  # small shapes, two rounds
    markdown: str | None = None  # also write what is printed to this file


# -- the measurement


def forward(run: Contestant, p: Problem) -> None:
    with torch.no_grad():
        run(p)


def both(run: Contestant, p: Problem) -> None:
    run(p)[0].backward()
    p.hidden.grad = p.weight.grad = None


def seconds_of(call: Callable[[int], None], device: str, repeats: int) -> float:
    if not device.startswith("cuda"):
        start = time.perf_counter()
        call(0)
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for i in range(repeats):
        call(i)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / repeats


def race(
    runs: dict[str, Contestant], problems: list[Problem], rounds: int, device: str, repeats: int
) -> dict[str, tuple[list[float], list[float]]]:
    """Name -> seconds forward and forward + backward, one of each a round."""
    frozen = [p.detached() for p in problems]  # Liger makes gradients if a leaf asks for them
    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in runs}
    names = list(runs)
    for turn in range(rounds + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            for kind, (work, given) in enumerate(((forward, frozen), (both, problems))):
                call = lambda i: work(runs[name], given[(turn + i) % len(given)])  # noqa: B023, E731
                seconds = seconds_of(call, device, repeats)
                if turn:  # the first round is for compilers, caches and clocks to settle
                    times[name][kind].append(seconds)
    return times


def rates() -> Rates:
    """Operations and bytes a second of this GPU: an 8192^3 product in bf16, and a copy."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out, big = torch.empty_like(a), torch.empty(2**30, device="cuda", dtype=torch.bfloat16)
    other = torch.empty_like(big)
    for _ in range(2):  # the second time counts
        product = seconds_of(lambda _: torch.mm(a, b, out=out), "cuda", 50)
        copy = seconds_of(lambda _: other.copy_(big), "cuda", 20)
    return 2 * 8192**3 / product, 2 * big.nbytes / copy


def size_of(tokens: int) -> Size:
    """Sequences of up to 256 response tokens, and one more to predict the first from."""
    many = max(2, tokens // 256)
    return many, tokens // many + 1, tokens // many


def against_truth(
    runs: dict[str, Contestant], p: Problem, dtype: str, absent: list[str]
) -> dict[str, tuple[float, float, float]]:
    """Who is how far off. One that fails, or is not near the truth, is struck from `runs`."""
    truth, wrong = truth_of(p), {}
    for who, run in list(runs.items()):
        try:
            wrong[who] = errors(run, p, truth)
            nats, relative = LEEWAY[dtype]
            why = "" if wrong[who][0] < nats and max(wrong[who][1:]) < relative else "not the truth"
        except Exception as error:  # whatever a compiler or an allocator may raise
            why = f"{type(error).__name__}: {common.first_line(error)}"
            gc.collect()
            torch.cuda.empty_cache()
        if why and who.startswith("ours"):
            raise SystemExit(f"{who}: {why} {wrong.get(who)}")
        if why:
            absent.append(f"{who}: {why} {wrong.get(who, '')}")
            del runs[who]
    return wrong


def bench_head(report: Report, args: Options, name: str, size: Size, floor: Rates | None) -> None:
    width, vocab, softcap = MODELS[name]
    many, length, response = size
    scored = many * response
    report.say(
        f"### {name}: {width} x {vocab:,}{f', softcap {softcap:g}' if softcap else ''}; "
        f"{many} sequences of {length}, {scored} tokens scored, {args.dtype}"
    )
    report.say()
    torch.compiler.reset()  # after 8 other shapes torch.compile would give up on this one
    problems = make_problems(name, size, args.dtype, args.device)
    runs, absent = contestants(args.device, softcap)
    if length == response + 1:
        del runs["all logits"]  # all are response tokens
    wrong = against_truth(runs, problems[0], args.dtype, absent)
    rises = {}
    for who, run in runs.items():
        with Peak(args.device) as peak:
            both(run, problems[1])
        rises[who] = peak.mb
    times = race(runs, problems, args.rounds, args.device, 10 if scored <= 512 else 3)

    head = "|forward ms|x ours|fwd+bwd ms|x ours|extra MB|x ours|log-prob off by, nats|dH|dW"
    head, rows = head.split("|"), []
    if floor:
        head[3:3], head[6:6] = ["x floor"], ["x floor"]
    product = 2 * scored * width * vocab
    for who in runs:
        cells = [who]
        for kind, title in enumerate(("forward", "forward + backward")):
            mine, its = times["ours"][kind], times[who][kind]
            cells += [f"{1e3 * statistics.median(its):.4g}", shown(its, mine)]
            if floor:
                least = (1, 3)[kind] * product / floor[0] + 4 * scored * vocab / floor[1]
                cells.append(f"{statistics.median(its) / least:.2f}")
            if not who.startswith("ours") and ratios(its, mine)[0] < 1:
                times_ours = f"{ratios(its, mine)[0]:.2f} of our time, {title}"
                report.weak.append(f"{name}, {scored} tokens, {args.dtype}: {who}, {times_ours}")
        more = rises[who] / max(rises["ours"], 1e-3)
        if not who.startswith("ours") and more < 0.99:
            where = f"{name}, {scored} tokens, {args.dtype}"
            report.weak.append(f"{where}: {who}, {more:.2f} of our extra memory")
        cells += [mb(rises[who]), f"{more:.2f}"]
        rows.append(cells + [f"{x:.1e}" for x in wrong[who]])
    report.table(head, rows)
    for line in absent:
        report.say(f"- {line}")
    report.say()


def accuracy(report: Report, name: str, device: str) -> None:
    """Hidden states and weight in bf16; how far off is the log-prob of a response of 40 tokens?"""
    centres = (0.0,) if MODELS[name][2] else (0.0, -60.0, -110.0)
    rows: dict[str, list[str]] = {}
    for centre in centres:
        (p,) = make_problems(name, (8, 41, 40), "bfloat16", device, centre, n=1)
        truth, (runs, _) = true_logps(p)[0], contestants(device, p.softcap)
        for who, run in runs.items():
            if who not in ROUNDING and not device.startswith("cuda"):
                continue  # the others' torch.compile would take longer than all the rest
            try:
                with torch.no_grad():
                    off = (run(p.detached())[1].double() - truth).abs()
                cell = f"{off.mean():.2g} (max {off.max():.2g})"
            except Exception as error:
                cell = type(error).__name__
            rows.setdefault(who, [who]).append(cell)
    report.say(f"### {name} in bf16: |log-prob of 40 tokens - float64|, nats, mean of 8 sequences")
    report.say()
    report.table([""] + [f"logits around {x:g}" for x in centres], list(rows.values()))


def main(args: Options) -> None:
    cuda = args.device.startswith("cuda")
    args.dtype = args.dtype or ("bfloat16" if cuda else "float32")
    args.rounds = min(args.rounds, 2) if args.quick else args.rounds
    sizes = QUICK if args.quick else ON_CPU
    usual = tuple(QUICK) if args.quick else tuple(ON_CUDA) if cuda else CPU_SHAPES
    names = args.shapes or usual
    report = Report(args.markdown)
    header(report, args.device, "python -m kernels.bench " + " ".join(sys.argv[1:]))
    floor = rates() if cuda else None
    if floor:
        report.say(
            f"- 8192^3 bf16 product {floor[0] / 1e12:.0f} TFLOP/s, copy {floor[1] / 1e12:.2f} TB/s"
        )
        report.say()
    for name in names:
        tokens = args.tokens or (TOKENS if cuda and not args.quick else ())
        for size in map(size_of, tokens) if tokens else [sizes.get(name) or QUICK["toy"]]:
            bench_head(report, args, name, size, floor)
    for name in names:
        accuracy(report, name, args.device)
    report.close()


if __name__ == "__main__":
    main(common.command_line(Options, __doc__))
