"""KTO: Kahneman-Tversky Optimization. Ethayarajh, Xu, Muennighoff, Jurafsky, Kiela; 2024; arXiv 2402.01306.

    L   = E_(x, y) [ lambda_y - v(x, y) ]                                                                            (eq. 8)
    v   = lambda_D sigmoid( beta (r - z0) )  if y is desirable,   lambda_U sigmoid( beta (z0 - r) )  if it is not
    r   = log pi(y|x)/ref(y|x),      z0 = max(0, mean over the batch of log pi(y'|x)/ref(y'|x)),  y' from another prompt

KTO needs no pairs, only labels. People judge an outcome relative to a reference point and feel each further gain or loss
less. Here that point is z0, an estimate of KL(pi || ref) from answers y' to other prompts. These y' are not samples
of pi, so the mean may be negative; it is then clamped to 0. If r is far from z0 there is almost no gradient: wrong labels are
ignored, and so are hard examples.

    paper                    code
    x, y                     a row: the prompt and its response
    y'                       the response of the same row of `mismatched`, an answer to another prompt
    desirable                the row's label, (B,) bool
    r                        log_ratios: sums over response tokens, EOS included
    z0                       z0; the metric `kl` is the mean before it is clamped
    lambda_D, lambda_U       desirable_weight, undesirable_weight; lambda_y is that of y
    E                        mean over the rows of a step, across all processes

Departures
1. z0 is the mean over the whole optimizer step, so a step first computes log pi(y'|x), without gradients. The authors' code
   takes the mean over a micro-batch, which is noisier and depends on how the step is divided.
2. y' is fixed: a seeded permutation of the training answers, cut to fit. The authors' code shifts the answers of a micro-batch.
3. The paper advises lambda_D n_D / (lambda_U n_U) between 1 and 4/3 (later 3/2), where n counts rows: one desirable row in ten
   needs --desirable-weight 9 to 13.5. The run prints the ratio.
4. A pair becomes a desirable and an undesirable row, a ranked list its best and worst; the two are rarely in the same step.

Healthy: the loss starts at half the mean weight (0.5 if both are 1) and falls slowly (`tiny`: to 0.46). rewards/accuracies is the
share of answers on the right side of z0: 0.5 at the start, where all are at z0, then above. rewards/chosen (desirable) rises
above rewards/rejected; both may fall. kl starts at 0 and may be negative, where z0 stays 0 (`tiny`: -3.5); tens of nats in
either direction are drift: raise beta or lower --lr.

    python kto.py                                                           # the embedded task, on a laptop
    torchrun --nproc_per_node=4 kto.py --model runs/sft-gemma-2-2b --dataset tldr   # after sft.py --model gemma-2-2b
    python kto.py --model runs/sft-... --dataset rows.jsonl                 # {"prompt", "completion", "label"}

Copyright (c) 2026 the plainpref authors. MIT licence. Tested with torch 2.13 and transformers 5.23.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

import common


@dataclass
class Args(common.Args):  # model, data, hardware and output flags: common.Args
    beta: float = 0.1  # how fast the value saturates, per nat
    desirable_weight: float = 1.0  # lambda_D
    undesirable_weight: float = 1.0  # lambda_U
    ref_model: str | None = None  # reference model, or an average a+b; default: the starting policy
    soup_weight: float = 0.5  # weight of a in a+b
    max_length: int = 2048  # tokens of prompt and response together
    max_prompt_length: int = 1024  # tokens kept of the prompt if the row is too long
    lr: float = 5e-6  # peak learning rate
    batch_size: int = 32  # rows per optimizer step, over all processes
    schedule: Literal["constant", "linear", "cosine", "inverse-sqrt"] = "constant"  # after warm-up


# What differs from the defaults, by model (or the model that a checkpoint was trained from). The
# defaults: github.com/ContextualAI/HALOs, except weight decay (0.01 there) and lengths (ours).
PRESETS = {
    "tiny": dict(  # tuned here
        beta=0.3, lr=1e-4, batch_size=16, micro_batch_size=16, max_steps=300, schedule="linear",
        warmup_ratio=0.05, max_length=160, max_prompt_length=128, dataset="family",
    ),
    "llama-7b": dict(dataset="hh"),  # one of the paper's three data sets
}  # fmt: skip


def kto_loss(
    logps: torch.Tensor,  # (B,) log pi(y | x), summed over response tokens
    ref_logps: torch.Tensor,  # (B,) the same under the frozen reference
    desirable: torch.Tensor,  # (B,) bool
    kl: torch.Tensor,  # () mean of log pi(y'|x)/ref(y'|x) over the step, not clamped
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> tuple[torch.Tensor, dict[str, torch.Tensor | tuple[torch.Tensor, torch.Tensor]]]:
    """Equation 8. Returns one loss per answer, and the metrics: values, or (values, weights)."""
    z0 = kl.detach().clamp(min=0)  # ()
    log_ratios = logps - ref_logps  # (B,) r
    good = desirable.to(logps.dtype)  # (B,) 1 or 0
    weights = good * desirable_weight + (1 - good) * undesirable_weight  # (B,) lambda_y
    gains = (2 * good - 1) * (log_ratios - z0)  # (B,) positive on the right side of z0
    values = torch.sigmoid(beta * gains)  # (B,) v / lambda_y
    losses = weights * (1 - values)
    rewards = beta * log_ratios
    metrics = {
        "loss": losses,
        "kl": kl.detach().expand_as(losses),
        "rewards/chosen": (rewards * good, good),
        "rewards/rejected": (rewards * (1 - good), 1 - good),
        "rewards/accuracies": (gains.sign() + 1) / 2,  # a tie counts half
        "logps/chosen": (logps * good, good),
        "logps/rejected": (logps * (1 - good), 1 - good),
    }
    return losses, metrics


def mismatch(rows: list, givers: list, seed: int, max_length: int) -> list[common.Row]:
    """(x, y') for every row: its prompt with the answer of a giver that has another prompt.

    The givers form a circle in random order, equal prompts next to each other. The row at place p
    gets the answer at p + (size of the largest group): a permutation, unless one group has over half.
    """
    order = np.random.default_rng([seed, 0, 1]).permutation(len(givers))  # epochs: [seed, epoch]
    groups: dict[bytes, list[int]] = {}
    for i in order:
        groups.setdefault(givers[i].key, []).append(i)
    circle = [i for group in groups.values() for i in group]
    starts = dict(zip(groups, np.cumsum([0, *map(len, groups.values())]), strict=False))
    place = {i: at for at, i in enumerate(circle)}
    shift = max(map(len, groups.values()))
    mismatched = []
    for i, row in enumerate(rows):
        start, size = int(starts.get(row.key, 0)), len(groups.get(row.key, ()))  # its own group
        others = len(circle) - size
        if not others:
            raise common.UserError("all rows have the same prompt; KTO needs answers to others")
        # The places after its group are numbered 0 ... others - 1, around the circle.
        within = place[i] - start if rows is givers else i  # a held-out row is not in the circle
        at = start + size + (within + shift - size) % others
        answer = givers[circle[at % len(circle)]].responses[0][: max_length - len(row.prompt)]
        mismatched.append(common.Row(row.prompt, [answer], row.question, key=row.key))
    return mismatched


def main(args: Args) -> None:
    if not args.beta > 0 or not args.desirable_weight >= 0 or not args.undesirable_weight >= 0:
        raise common.UserError("--beta must be positive, the weights 0 or more")
    run = common.Run(args)
    tokenizer = common.load_tokenizer(args.model, args.max_length)
    train, held_out = common.load_rows(args, tokenizer, kind="labelled")
    desirable_total = args.desirable_weight * sum(row.scores[0] > 0 for row in train)
    undesirable_total = args.undesirable_weight * sum(row.scores[0] <= 0 for row in train)
    ratio = desirable_total / undesirable_total if undesirable_total else float("inf")
    common.say("weights", f"desirable / undesirable, with counts: {ratio:.2f} (advised: 1-1.5)")
    mismatched = mismatch(train, train, args.seed, args.max_length)
    held_out_mismatched = mismatch(held_out, train, args.seed, args.max_length)
    run.plan(train)
    policy = common.load_policy(args, run)
    common.add_reference_logps(policy, args, run, train, held_out)  # before any update
    common.add_reference_logps(policy, args, run, mismatched, held_out_mismatched)
    optimizer, scheduler = common.make_optimizer(policy, args, run)
    run.restore(policy, optimizer, scheduler)

    @torch.no_grad()
    def kl_of(rows: list, parts: Iterable[tuple[list[int], bool]], num_rows: int) -> torch.Tensor:
        """Mean over all rows of all processes; (part, False) is a dummy forward pass for FSDP."""
        total = torch.zeros((), dtype=torch.float64, device=run.device)
        for indexes, mine in parts:
            batch = common.collate_for(policy, rows, indexes)
            log_ratios = common.response_logps(policy, batch).double() - batch.ref_logps  # (B, 1)
            if mine:
                total += log_ratios.sum()
        return common.sum_over_processes(total) / max(1, num_rows)

    def losses_of(batch: common.MicroBatch, kl: torch.Tensor) -> tuple[torch.Tensor, dict]:
        logps = common.response_logps(policy, batch)[:, 0]  # (B,)
        ref_logps = batch.ref_logps[:, 0].to(logps.dtype)  # (B,)
        losses, metrics = kto_loss(
            logps, ref_logps, batch.scores[:, 0] > 0, kl.to(logps.dtype), beta=args.beta,
            desirable_weight=args.desirable_weight, undesirable_weight=args.undesirable_weight,
        )  # fmt: skip
        metrics |= {"length/response": batch.lengths[:, 0]}
        return losses, metrics

    def evaluate() -> None:
        parts = run.held_out_rows(held_out_mismatched) if run.due(args.eval_every) else []
        kl = kl_of(held_out_mismatched, run.share(parts, "held-out KL"), len(held_out))
        run.evaluate(lambda batch: losses_of(batch, kl), held_out, tokenizer)

    for step in run.steps(train):  # continues from the last checkpoint
        if run.evaluation_due:
            evaluate()
        batches = list(step.micro_batches)  # for z0, then for the loss
        kl = kl_of(mismatched, [(batch.indexes, True) for batch in batches], step.num_rows)
        for batch in batches:
            losses, metrics = losses_of(batch, kl)
            (losses.sum() / step.num_rows).backward()  # num_rows: over all processes
            run.record(metrics)
        common.sum_gradients(policy)  # a sum, not a mean: the loss is already divided
        grad_norm = common.clip_gradients(policy, args.max_grad_norm)
        if grad_norm.isfinite():  # the same on every process
            optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        run.end_step(grad_norm)  # logs; saves when it is due
    evaluate()
    run.finish(policy, tokenizer)


if __name__ == "__main__":
    main(common.parse(Args, PRESETS, __doc__))
