"""Whole DPO steps: ours and TRL's DPOTrainer, on the same random weights, rows and batches.

A step is forward, backward, clipping and AdamW. What is counted: ours computes the reference
log-probs of a row before training, once; that pass is measured and added to the row's step, as in a
run of one epoch. TRL asks its reference model within the step (its default). TRL joins and pads a
batch before its clock starts, and logs after it has stopped; ours makes its batch within. TRL runs
as it comes, fused AdamW included, but for gradient checkpointing off (on CUDA: off and on), no
truncation and a constant learning rate. A step is one forward of all its rows: no accumulation, so
no sorting by length, which would spare ours padding.

Every round is a short run of each from the same weights, in turn: the first step is thrown away,
the last is not timed but measures memory, and those between are. Ratios are of two times of one
round: median (smallest-largest). The losses of all steps must agree, or there is no table. `rises`
is how far memory goes above where it stands between steps, `held` what stands there: weights,
optimizer states and, at TRL, the reference model. Lengths lie around the profile's medians.

MFU, on CUDA, is of 989 TFLOP/s (bf16, H100 and H200) and counts what is useful: a prompt once, the
head on response tokens, no padding, nothing twice. With N tokens, R of them in responses, W weights
without embeddings, A pairs of a token and one it sees, D = heads * head size, of one step:
4 (2 W N + 2 V H R + 4 D layers A), a forward of the reference and three times that of the policy.

Then the same for ours alone: its two switches off and on (one copy of a prompt for all its
responses; the fused head), and ranked lists of 4 and 8 responses.

    python bench.py                                             # minutes on a laptop
    python bench.py --profiles tldr --rounds 5 --markdown step.md
    python bench.py --device cuda --model gemma-2-2b

Copyright (c) 2026 the plainpref authors. MIT licence.
"""

from __future__ import annotations

import gc
import statistics
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

import common
from benchmarking.measure import Report, header, mb, ratios, shown
from benchmarking.runs import (
    Options,
    Steps,
    list_losses,
    make_rows,
    pair_losses,
    run_ours,
    run_trl,
    save_checkpoint,
)

PEAK_FLOPS = 989e12
AGREE = {  # what two may differ by in a step: loss, and log-prob of the first response in nats
    "float32": {"losses": 1e-4, "chosen": 1e-2},
    "bfloat16": {"losses": 0.05, "chosen": 2.0},
}


def race(
    report: Report,
    title: str,
    runs: dict[str, Callable[[], Steps]],
    rows: common.Rows,
    args: Options,
) -> None:
    """The first of `runs` is what the others are compared with."""
    found: dict[str, list[Steps]] = {name: [] for name in runs}
    names, cuda = list(runs), args.device.startswith("cuda")
    for turn in range(args.rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            try:
                if name in found:
                    found[name].append(runs[name]())
            except torch.OutOfMemoryError:
                del found[name]
            gc.collect()
            if cuda:
                torch.cuda.empty_cache()
    if names[0] not in found:
        raise SystemExit(f"{title}: {names[0]} ran out of memory; fewer --pairs")
    first = found[names[0]]
    prompts = [len(row.prompt) for row in rows.rows]
    answers = [len(y) for row in rows.rows for y in row.responses]
    report.say(f"### {title}")
    report.say()
    report.say(
        f"{args.pairs} prompts a step, {len(rows.rows[0].responses)} responses each; prompts of "
        f"{min(prompts)}-{max(prompts)} tokens (median {statistics.median(prompts):.0f}), "
        f"responses of {min(answers)}-{max(answers)} ({statistics.median(answers):.0f})"
    )
    rate = "MFU" if cuda else "useful GFLOP/s"
    head = f"|s a step|prompts/s|x|rises MB|x|held MB|tokens|padding|prompt again|{rate}".split("|")
    cells, apart = [], {"losses": 0.0, "chosen": 0.0}
    for name in runs:
        if not (steps := found.get(name)):
            cells.append([name, "out of memory"] + [""] * (len(head) - 2))
            continue
        mine, its = ([s.seconds for s in who] for who in (first, steps))
        seconds, rise = statistics.median(its), statistics.median(s.rise for s in steps)
        more = rise / max(statistics.median(s.rise for s in first), 1e-3)
        one, speed = steps[0], first[0].flops / seconds
        cells.append([
            name, f"{seconds:.3g}", f"{args.pairs / seconds:.3g}", shown(its, mine),
            mb(rise), f"{more:.2f}", mb(one.held), f"{one.places:,.0f}",
            f"{1 - one.filled / one.places:.0%}", f"{(one.filled - one.useful) / one.places:.0%}",
            f"{speed / PEAK_FLOPS:.1%}" if cuda else f"{speed / 1e9:.1f}",
        ])  # fmt: skip
        for values in ("losses", "chosen"):
            pairs = zip(getattr(one, values), getattr(first[0], values), strict=True)
            apart[values] = max(apart[values], *(abs(a - b) for a, b in pairs))
        if ratios(its, mine)[0] < 1:
            report.weak.append(f"{title}: {name} takes {ratios(its, mine)[0]:.2f} of the time")
        if more < 1:
            report.weak.append(f"{title}: {name} rises by {more:.2f} of the memory")
    for name, steps in found.items():
        losses = " ".join(f"{x:.6f}" for x in steps[0].losses)
        report.say(f"- losses of {name} ({steps[0].attention} attention): {losses}")
    report.say(
        f"- they differ by up to {apart['losses']:.1e}, log-probs of the first response (mean of a "
        f"step: {first[0].chosen[0]:.3f}) by {apart['chosen']:.1e}"
    )
    report.say()
    if any(apart[values] > most for values, most in AGREE[args.dtype].items()):
        raise SystemExit("they differ: that is not the same work")
    report.table(head, cells)


def main(args: Options) -> None:
    cuda = args.device.startswith("cuda")
    args.model = args.model or ("gemma-2-2b" if cuda else "cpu-small")
    args.dtype = args.dtype or ("bfloat16" if cuda else "float32")
    args.pairs = args.pairs or (8 if cuda else 4)
    report = Report(args.markdown)
    header(report, args.device, " ".join(["python bench.py", *sys.argv[1:]]))
    report.say(f"{args.model} with random weights, {args.dtype}")
    report.say()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        vocab = save_checkpoint(args, folder)
        for profile in args.profiles if args.only in (None, "trl") else ():
            rows = make_rows(profile, (args.steps + 2) * args.pairs, 2, vocab)
            runs = {
                "ours": partial(run_ours, folder, rows, args),
                "TRL": partial(run_trl, folder, rows, args),
            }
            if cuda:
                runs["TRL, checkpointing"] = partial(run_trl, folder, rows, args, True)
            race(report, f"{profile}: DPO against TRL", runs, rows, args)
        if args.only in (None, "switches"):
            for profile in args.profiles:
                rows = make_rows(profile, (args.steps + 2) * args.pairs, 2, vocab)
                runs = {
                    f"{'shared' if share else 'each its own'} prompt, {head} head": partial(
                        run_ours, folder, rows, args, pair_losses, share, head == "fused"
                    )
                    for share in (True, False)
                    for head in ("fused", "plain")
                }
                race(report, f"{profile}: the switches of ours", runs, rows, args)
        for many in (4, 8) if args.only in (None, "ranked") else ():
            rows = make_rows("tldr", (args.steps + 2) * args.pairs, many, vocab)
            runs = {
                f"{'shared' if share else 'each its own'} prompt": partial(
                    run_ours, folder, rows, args, list_losses, share
                )
                for share in (True, False)
            }
            race(report, f"tldr: ranked lists of {many}", runs, rows, args)
    report.close()


if __name__ == "__main__":
    main(common.command_line(Options, __doc__))
