"""SLiC-HF: Sequence Likelihood Calibration with Human Feedback. Zhao, Joshi, Liu, Khalman, Saleh, Liu; 2023; arXiv 2305.10425.

    L = E_(x, y_w, y_l) [ max(0, delta - log pi(y_w|x) + log pi(y_l|x)) ]  -  lambda E [ log pi(y_ref|x) ]

The first term is a hinge: a pair has no gradient once the better answer is delta nats more likely than the worse one. The second
term keeps the model near y_ref, which is either a demonstration or the best answer. There is no reference model.

    paper                    code
    x, y_w, y_l              a row: the prompt, its first response (chosen), its second (rejected)
    log pi(y|x)              chosen_logps, rejected_logps: sums over response tokens, EOS included
    y_ref, log pi(y_ref|x)   target_logps, a sum too; --regularise-on best: the chosen answer; target: the row's column `target`
    lambda                   target_weight
    E                        mean over the pairs of a step, on all processes

Options and departures
1. Training on given pairs is the paper's SLiC-HF-direct. Its better variant, SLiC-HF-sample-rank, samples the pairs from the
   fine-tuned model and ranks them with a learned reward; the embedded task's pairs are of this kind.
2. --beta scales the log-probs inside the hinge (1 in the paper): the margin is delta/beta nats, and lambda counts 1/beta times as
   much. The thesis has beta 0.1 and weight 1 on a mean over tokens, which is 1/27 of our sum for its summaries of 27 tokens.
3. --reference-normalised (SLiC-DPO in the thesis, hinge-norm in RSO, arXiv 2309.06657): the hinge compares beta log pi/ref.
4. For a ranked list, y_ref is the better answer of each pair that --pairs makes of it.

Healthy: active (the share of pairs within the margin) falls (`tiny`: 0.86 to 0.70); rewards/accuracies rises from the share of
pairs that the starting model ranks correctly (0.61 to 0.69). Growing length is -direct's known failure: lower --lr.

    python slic.py                                                          # the embedded task, on a laptop
    torchrun --nproc_per_node=4 slic.py --model runs/sft-gemma-2-2b   # after sft.py --model gemma-2-2b
    python slic.py --model runs/sft --dataset rows.jsonl                    # {"prompt", "chosen", "rejected"[, "target"]}

Copyright (c) 2026 the plainpref authors. MIT licence. Tested with torch 2.13 and transformers 5.23.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

import common


@dataclass
class Args(common.Args):  # delta, lr, batch: the paper's, from memory; lambda: HALOs'; else ours
    beta: float = 1.0  # factor on the log-probs inside the hinge
    delta: float = 1.0  # margin of the hinge
    target_weight: float = 0.1  # lambda: weight of the regulariser
    regularise_on: Literal["best", "target"] = "best"  # the chosen answer, or the column `target`
    reference_normalised: bool = False  # SLiC-DPO: the hinge compares log-ratios to the reference
    ref_model: str | None = None  # reference, or an average a+b of two; default: the initial policy
    soup_weight: float = 0.5  # weight of a in a+b
    pairs: Literal["best-worst", "adjacent", "all"] = "best-worst"  # how ranked lists become pairs
    max_length: int = 512  # tokens of prompt and response together
    max_prompt_length: int = 256  # tokens kept of the prompt if the row is too long
    lr: float = 1e-5  # peak learning rate
    batch_size: int = 32  # pairs per optimizer step, over all processes
    schedule: Literal["constant", "linear", "cosine", "inverse-sqrt"] = "constant"  # after warm-up
    max_grad_norm: float = 10.0  # clip gradients to this norm; 0: never


# What differs from the defaults, by model (or the model that a checkpoint was trained from).
THESIS = dict(  # github.com/martimfasantos/MSc-Thesis; its text says RMSprop, its code runs AdamW (dpo.py, 4)
    beta=0.1, target_weight=0.04, lr=1e-7, batch_size=64, micro_batch_size=4, epochs=3.0, schedule="cosine",
    optimizer="rmsprop", max_grad_norm=1.0, max_length=2048, dataset="tldr",
)  # fmt: skip
PRESETS = {
    "tiny": dict(  # tuned here
        delta=5.0, lr=4e-4, batch_size=16, micro_batch_size=16, max_steps=300, schedule="linear", warmup_ratio=0.05,
        max_grad_norm=1.0, max_length=160, max_prompt_length=128, dataset="family",
    ),
    "gemma-2-2b": THESIS, "tinyllama": THESIS, "eurollm-1.7b": THESIS,
}  # fmt: skip


def slic_loss(
    chosen_logps: torch.Tensor,  # (B,) log pi(y_w | x), summed over response tokens
    rejected_logps: torch.Tensor,  # (B,) log pi(y_l | x)
    target_logps: torch.Tensor,  # (B,) log pi(y_ref | x)
    ref_chosen_logps: torch.Tensor | float,  # (B,) under the frozen reference; 0 in the paper
    ref_rejected_logps: torch.Tensor | float,  # (B,)
    beta: float,
    delta: float,
    target_weight: float,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Both terms. Returns one loss per pair, and metrics (one value per pair)."""
    chosen_rewards = beta * (chosen_logps - ref_chosen_logps)  # (B,)
    rejected_rewards = beta * (rejected_logps - ref_rejected_logps)  # (B,)
    margins = chosen_rewards - rejected_rewards  # (B,)
    hinges = F.relu(delta - margins)
    losses = hinges - target_weight * target_logps
    metrics = {
        "loss": losses,
        "hinge_loss": hinges,
        "active": (margins < delta).float(),
        "rewards/chosen": chosen_rewards,
        "rewards/rejected": rejected_rewards,
        "rewards/margins": margins,
        "rewards/accuracies": (margins.sign() + 1) / 2,  # a tie counts half
        "logps/chosen": chosen_logps,
        "logps/rejected": rejected_logps,
        "logps/target": target_logps,
    }
    return losses, metrics


def main(args: Args) -> None:
    if not args.beta > 0:
        raise common.UserError("--beta must be positive")
    normalised, with_target = args.reference_normalised, args.regularise_on == "target"
    if args.ref_model and not normalised:
        raise common.UserError("--ref-model needs --reference-normalised")
    run = common.Run(args)
    tokenizer = common.load_tokenizer(args.model, args.max_length)
    train, held_out = common.load_rows(args, tokenizer, kind="pair", with_target=with_target)
    run.plan(train)
    policy = common.load_policy(args, run)
    if normalised:
        common.add_reference_logps(policy, args, run, train, held_out)  # before any update
    optimizer, scheduler = common.make_optimizer(policy, args, run)
    run.restore(policy, optimizer, scheduler)

    def losses_of(batch: common.MicroBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        logps = common.response_logps(policy, batch)  # (B, K): chosen, rejected[, target]
        ref_logps = batch.ref_logps[:, :2].to(logps.dtype).unbind(1) if normalised else (0.0, 0.0)
        losses, metrics = slic_loss(
            *logps[:, :2].unbind(1), logps[:, 2 if with_target else 0], *ref_logps,
            args.beta, args.delta, args.target_weight,
        )  # fmt: skip
        metrics |= {"length/chosen": batch.lengths[:, 0], "length/rejected": batch.lengths[:, 1]}
        return losses, metrics

    for step in run.steps(train):  # continues from the last checkpoint
        if run.evaluation_due:
            run.evaluate(losses_of, held_out, tokenizer)
        for batch in step.micro_batches:
            losses, metrics = losses_of(batch)
            (losses.sum() / step.num_rows).backward()  # num_rows: over all processes
            run.record(metrics)
        common.sum_gradients(policy)  # a sum, not a mean: the loss is already divided
        grad_norm = common.clip_gradients(policy, args.max_grad_norm)
        if grad_norm.isfinite():  # the same on every process
            optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        run.end_step(grad_norm)  # logs; saves when it is due
    run.evaluate(losses_of, held_out, tokenizer)
    run.finish(policy, tokenizer)


if __name__ == "__main__":
    main(common.parse(Args, PRESETS, __doc__))
