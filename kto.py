"""KTO: Kahneman-Tversky Optimization. Ethayarajh, Xu, Muennighoff, Jurafsky, Kiela; 2024; arXiv 2402.01306.

    L   = E_(x, y) [ lambda_y - v(x, y) ]
    v   = lambda_D sigmoid( beta (r - z0) )  if y is desirable,   lambda_U sigmoid( beta (z0 - r) )  if it is not
    r   = log pi(y|x)/ref(y|x),      z0 = max(0, mean over the batch of log pi(y'|x)/ref(y'|x)),  y' from another prompt

No pairs: an answer is known to be desirable or not. People judge what they get against a reference point, and feel each
further gain or loss less. z0 is that point: KL(pi || ref), estimated on answers y' to other prompts. They are not drawn
from pi, so the estimate may be negative, and is clamped. An answer whose r is far above or far below z0 hardly pulls any
more: wrong labels are given up, and so are answers that are merely hard. beta says how fast that happens.

    paper                    here
    x, y                     a row: the prompt, its first response; y' is the second response of the same row
    desirable                the row's label, (B,) bool
    r                        log_ratios: sums over response tokens, end-of-sequence included
    z0                       z0; `kl` is the mean before it is clamped
    lambda_D, lambda_U       desirable_weight, undesirable_weight; lambda_y is that of y
    E                        mean over the rows (answers) of a step, on all processes

Options and departures
1. z0 is a constant to the optimizer: no gradient flows through it. It is the mean over the whole optimizer step, on all
   processes and micro-batches, clamped after. So a step asks for log pi(y'|x) first, in a pass without gradients, and then
   for log pi(y|x): each has the model to itself, and --share-prompt does nothing here. The mean of a micro-batch, which
   other trainers take, is noisier and depends on how the step is split.
2. y' is fixed once for all epochs, by a seeded permutation of the training rows (where no prompt has more than half of
   them) that pairs no prompt with an answer to itself; it is cut to the room there is. The authors' code shifts the answers
   within a micro-batch. Held-out rows take theirs from training rows.
3. Weights: the paper wants lambda_D n_D / (lambda_U n_U) between 1 and 4/3 (later 3/2), where n_D desirable and n_U
   undesirable rows are given: one desirable in ten needs --desirable-weight 9 to 13.5. The run prints the ratio.
4. Pairs are taken apart into a desirable and an undesirable answer, ranked lists into their best and worst. The two seldom
   meet in a step.

Healthy: the loss starts at half the mean weight (0.5 with both 1) and falls slowly (`tiny`: to 0.46). rewards/accuracies is the
share of answers on the right side of z0: 0 at the start, where none is on a side, then above 0.5. rewards/chosen (desirable)
rises above rewards/rejected, and both may fall. kl starts at 0 and may well go below, where z0 stays 0 (`tiny`: -3.5);
tens of nats either way are drift: raise beta, lower --lr.

    python kto.py                                                           # the embedded task, on a laptop
    torchrun --nproc_per_node=4 kto.py --model runs/sft-model-gemma-2-2b --dataset tldr   # after sft.py --model gemma-2-2b
    python kto.py --model runs/sft-... --dataset rows.jsonl                 # {"prompt", "completion", "label"}

Copyright (c) 2026 the plainpref authors. MIT licence. Tested with torch 2.13 and transformers 5.23.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

import common

# What a flag that was left out becomes, and where the numbers are from (micro-batches are ours): by
# the last part of the model's name, in small letters; a folder that a run of ours saved has the row of
# the model it began from. A model without a row takes the first one after `tiny`, and the run says so.
SETTINGS = {
    "tiny": {
        "beta": 0.3, "lr": 1e-4, "batch_size": 16, "micro_batch_size": 16, "max_steps": 300,
        "schedule": "linear", "warmup_ratio": 0.05, "optimizer": "adamw", "max_grad_norm": 1.0,
        "max_length": 160, "max_prompt_length": 128, "dataset": "family", "source": "tuned here",
    },
    "llama-7b": {  # the authors' defaults; hh is one of the paper's three sets. Clipping, lengths and 0.1 for 150 steps are ours
        "beta": 0.1, "lr": 5e-6, "batch_size": 32, "micro_batch_size": 8, "epochs": 1.0,
        "schedule": "constant", "warmup_ratio": 0.1, "optimizer": "adamw", "max_grad_norm": 1.0,
        "max_length": 2048, "max_prompt_length": 1024, "dataset": "hh",
        "source": "Ethayarajh et al. 2024 and their code, github.com/ContextualAI/HALOs",
    },
}  # fmt: skip


# fmt: off
@dataclass
class Args:
    # KTO
    beta: float | None = None  # how fast the value saturates, per nat; default: the model's row in SETTINGS
    desirable_weight: float = 1.0  # lambda_D, 0 or more
    undesirable_weight: float = 1.0  # lambda_U, 0 or more
    # The reference
    ref_model: str | None = None  # reference model, or a soup a+b of two; default: the policy before its first step
    soup_weight: float = 0.5  # weight of the first model of a soup, in [0, 1]
    # Model and data
    model: str = "tiny"  # tiny, a short name (gemma-2-2b, ...), a Hugging Face id, or a folder such as runs/sft
    dataset: str | None = None  # family, a short name (tldr, ultrafeedback, hh, ...), a file or folder (.jsonl .json .parquet .csv), a hub id[:config][:split], or name=PATH for a copy; default: SETTINGS
    eval_dataset: str | None = None  # held-out rows; default: the dataset's own test split, else a twentieth of it
    skip_bad_rows: bool = False  # go on without rows that cannot be used, instead of stopping
    max_length: int | None = None  # tokens of prompt and response together; default: SETTINGS
    max_prompt_length: int | None = None  # tokens kept of a prompt whose row is too long; default: SETTINGS
    # Optimization
    batch_size: int | None = None  # rows (a prompt and its responses) per optimizer step, over all processes; default: SETTINGS
    micro_batch_size: int | None = None  # rows per forward pass and process; default: the largest that fits SETTINGS
    epochs: float | None = None  # passes over the rows; default: SETTINGS
    max_steps: int | None = None  # optimizer steps, instead of epochs; default: SETTINGS
    lr: float | None = None  # peak learning rate; default: SETTINGS
    schedule: Literal["constant", "linear", "cosine", "inverse-sqrt"] | None = None  # after the warm-up; default: SETTINGS
    warmup_ratio: float | None = None  # share of the steps in which the learning rate rises from 0; default: SETTINGS
    optimizer: Literal["adamw", "rmsprop"] | None = None  # default: SETTINGS
    weight_decay: float = 0.0  # on matrices only
    max_grad_norm: float | None = None  # gradients are scaled down to this norm; 0: never; default: SETTINGS
    dtype: Literal["bfloat16", "float32", "float64"] | None = None  # to compute in; default: bfloat16 on GPUs that have it, else float32
    attn: Literal["auto", "eager", "sdpa", "flex_attention"] = "auto"  # attention; auto: sdpa, or eager where sdpa would leave something out
    share_prompt: bool = True  # the responses of a prompt stand behind one copy of it, where that costs less
    fused_logps: bool = True  # log-probs through kernels/, which never hold the logits; off: the plain lines in common.py
    fsdp: bool = False  # weights, gradients and optimizer state are spread over the processes
    gradient_checkpointing: bool = False  # activations are made again in the backward pass: less memory, one more forward pass
    compile: bool = False  # torch.compile of the layers: the first steps take long, what the others gain is not measured yet
    lora_rank: int | None = None  # train adapters of this rank beside the frozen linear layers (LoRA, alpha twice the rank); 0: train all weights; default: SETTINGS, else 0
    # The run
    output_dir: str | None = None  # default: runs/<script> plus the flags that differ from their defaults
    resume: Literal["auto", "never"] = "auto"  # auto: go on where the folder's run stopped; never: a new numbered folder
    eval_every: int = 100  # steps between evaluations on held-out rows; 0: only at the start and the end
    sample_every: int = 0  # steps between greedy samples on fixed prompts; 0: only at the start and the end
    save_every: int = 100  # steps between checkpoints; 0: only at the end
    keep_last: int = 1  # checkpoints kept
    export_dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of the saved model
    cache_dir: str | None = None  # where tokens, samples and log-probs of a reference are kept for the next run; default: runs/.cache
    track: Literal["none", "wandb", "tensorboard"] = "none"  # send the metrics there too
    seed: int = 0  # of the order of rows, and of whatever is sampled
    deterministic: bool = False  # refuse operations that are not bit for bit reproducible (slower on GPUs)
# fmt: on


def kto_loss(
    logps: Tensor,  # (B,) log pi(y | x), summed over response tokens
    ref_logps: Tensor,  # (B,) the same under the frozen reference
    desirable: Tensor,  # (B,) bool
    kl: Tensor,  # () mean of log pi(y'|x)/ref(y'|x) over the whole step, not clamped
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> tuple[Tensor, dict[str, Tensor | tuple[Tensor, Tensor]]]:
    """Returns one loss per answer, and what to plot: (values, weights) is a weighted mean."""
    z0 = kl.detach().clamp(min=0)  # ()
    log_ratios = logps - ref_logps  # (B,)
    good = desirable.to(logps.dtype)  # (B,) 1 or 0
    weights = good * desirable_weight + (1 - good) * undesirable_weight  # (B,)
    gains = (2 * good - 1) * (log_ratios - z0)  # (B,) to the right side of z0
    values = torch.sigmoid(beta * gains)  # (B,) v / lambda_y
    losses = weights * (1 - values)
    rewards = beta * log_ratios
    metrics = {
        "loss": losses,
        "kl": kl.detach().expand_as(losses),
        "rewards/chosen": (rewards * good, good),
        "rewards/rejected": (rewards * (1 - good), 1 - good),
        "rewards/accuracies": (gains > 0).float(),
        "logps/chosen": (logps * good, good),
        "logps/rejected": (logps * (1 - good), 1 - good),
    }
    return losses, metrics


def add_mismatched(rows: common.Rows, givers: common.Rows, seed: int, max_length: int) -> None:
    """Give every row a second response, y': an answer to another prompt, cut to the room that there is.

    `givers` stand in a circle, in a random order but with equal prompts side by side. The row at place p takes the answer at
    place p + (size of the largest such group): a permutation, unless a prompt has more than half of the rows.
    """
    draws = np.random.default_rng([seed, 0, 1]).permutation(len(givers))  # epochs are [seed, epoch]
    groups: dict[bytes, list[int]] = {}
    for i in draws:
        groups.setdefault(givers.question(i), []).append(i)
    circle = [i for group in groups.values() for i in group]
    answers = [givers.rows[i].responses[0] for i in circle]
    first = dict(zip(groups, np.cumsum([0, *map(len, groups.values())]), strict=False))
    place = {i: at for at, i in enumerate(circle)}
    step = max(map(len, groups.values()))
    for i, row in enumerate(rows.rows):
        own = rows.question(i)
        start, many = int(first.get(own, 0)), len(groups.get(own, ()))  # where its group stands
        if many == len(circle):
            raise common.UserError(
                "all rows have the same prompt, and KTO's z0 needs an answer to another one"
            )
        # So many places behind its group, round the circle without the group.
        here = place[i] - start if rows is givers else i  # a held-out row may stand anywhere
        ahead = (here + step - many) % (len(circle) - many)
        at = (start + many + ahead) % len(circle)
        row.responses = [row.responses[0], answers[at][: max_length - len(row.prompt)]]
    rows.apart = True  # y and y' go through the model in passes of their own


def main(args: Args) -> None:
    run = common.start(args, SETTINGS, __file__)
    if not args.beta > 0 or not args.desirable_weight >= 0 or not args.undesirable_weight >= 0:
        raise common.UserError("--beta must be positive, the two weights 0 or more")
    common.check_reference(args.ref_model, args.soup_weight)
    tokenizer = common.load_tokenizer(args.model, args.max_length)
    train, held_out = common.load_rows(
        args.dataset, args.eval_dataset, "labelled", tokenizer, args.max_length,
        args.max_prompt_length, skip_bad_rows=args.skip_bad_rows, cache_dir=args.cache_dir,
    )  # fmt: skip
    good = sum(bool(row.scores[0]) for row in train.rows)
    sides = args.desirable_weight * good, args.undesirable_weight * (len(train) - good)
    ratio = f"{sides[0] / sides[1]:.2f}" if sides[1] else "infinite: nothing undesirable counts"
    common.say(
        "weights", f"desirable to undesirable, by weight times count: {ratio} (advised: 1 to 1.5)"
    )
    for rows in (held_out, train):
        add_mismatched(rows, train, args.seed, args.max_length)
    run.plan(train)
    policy = common.load_policy(
        args.model, args.dtype, run, args.attn, args.share_prompt, args.fused_logps,
        args.fsdp, args.gradient_checkpointing, args.compile, args.lora_rank,
    )  # fmt: skip
    common.warn_if_not_fine_tuned(policy, tokenizer)
    common.add_reference_logps(
        run, train, held_out, policy, args.ref_model, args.soup_weight, args.cache_dir
    )
    optimizer = common.make_optimizer(policy, args.optimizer, args.lr, args.weight_decay)
    run.restore(policy, optimizer)

    @torch.no_grad()
    def kl_of(micros: Iterable[tuple[common.Micro, bool]]) -> Tensor:
        """The mean over all rows of all processes. (micro, False) is another process's, gone through
        only to keep step with a model that is spread over all (--fsdp).
        """
        total = torch.zeros(2, dtype=torch.float64, device=policy.device)
        for micro, mine in micros:
            others = micro.column(1)
            logps, _ = common.response_logps(policy, others)  # (B, 1) log pi(y'|x)
            if mine:
                log_ratios = logps.double() - others.ref_logps
                total += torch.stack([log_ratios.sum(), total.new_tensor(len(log_ratios))])
        total = common.over_processes(total)
        return total[0] / total[1].clamp(min=1)

    # For training and for evaluation.
    def losses_of(micro: common.Micro, kl: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        answers = micro.column(0)
        logps, lengths = common.response_logps(policy, answers)  # (B, 1), (B, 1)
        ref_logps = answers.ref_logps.to(logps.dtype)  # (B, 1)
        desirable = answers.scores[:, 0] > 0  # (B,)
        losses, metrics = kto_loss(
            logps[:, 0], ref_logps[:, 0], desirable, kl.to(logps.dtype),
            args.beta, args.desirable_weight, args.undesirable_weight,
        )  # fmt: skip
        metrics |= {"length/response": lengths[:, 0]}
        return losses, metrics

    def evaluate() -> None:
        micros = run.held_out_rows(held_out) if run.held_out_due else []
        parts = run.share(micros, "held-out KL")
        kl = kl_of((common.collate_for(policy, held_out, i), mine) for i, mine in parts)
        run.evaluate(lambda micro: losses_of(micro, kl), held_out, policy, tokenizer)

    for batch in run.batches(train):  # from where the run stands
        if run.evaluation_due:
            evaluate()
        micros = list(batch)  # gone through twice; every process has equally many
        kl = kl_of((micro, True) for micro in micros)
        for micro in micros:
            losses, metrics = losses_of(micro, kl)
            # Divided by the whole step's count, over all processes.
            (losses.sum() / batch.prompts).backward()
            run.add(metrics)
        # Sums gradients over processes, clips, steps, logs, saves when due.
        run.update(policy, optimizer)
    evaluate()
    run.finish(policy, tokenizer)


if __name__ == "__main__":
    main(common.command_line(Args, __doc__))
