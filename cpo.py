"""CPO: Contrastive Preference Optimization. Xu, Sharaf, Chen, Tan, Shen, Van Durme, Murray, Kim; 2024; arXiv 2401.08417.

    L = - E_(x, y_w, y_l) [ log sigmoid( beta log pi(y_w|x)  -  beta log pi(y_l|x) ) ]  +  nll_weight * NLL(y_w)

The first term is DPO's loss with a uniform reference model, which cancels: CPO needs no second model and no second forward
pass. But this term alone does not limit how far the policy drifts, so the second term keeps the chosen answers likely. NLL is the
mean over the chosen answers' tokens of -log pi(token | everything before it). The paper gives both terms the same weight.

    paper                    code
    x, y_w, y_l              a row: the prompt, its first response (chosen), its second (rejected)
    log pi(y|x)              chosen_logps, rejected_logps: sums over response tokens, EOS included
    NLL(y_w)                 nll: -chosen_logps divided by mean_length, the mean number of tokens of a chosen answer
    E                        mean over the pairs of a step, on all processes

Options and departures
1. The paper writes NLL as the sum -log pi(y_w|x). Its code takes the mean over tokens, and so does this file: the mean over all
   chosen tokens of the optimizer step, because a mean of micro-batch means would weigh the tokens of short answers more.
2. The paper trains ALMA-13B's existing adapters (rank 16, on down_proj only) with weight decay 0.01. The preset alma-13b adds new
   adapters to every linear layer and has no weight decay; add --weight-decay 0.01.
3. `tiny` has nll_weight 0.05. Its labels are noisy: with weight 1 the sampled reward rose by 0.03 instead of 0.14.

Healthy: rewards/accuracies starts at the share of pairs that the model already ranks correctly and rises (`tiny`: 0.61 to 0.70);
rewards/margins rises. With weight 1 nll_loss falls or stays; with a small weight it rises (`tiny`: 0.86 to 1.5). If it rises
much more, the policy drifts: raise --nll-weight or lower --lr. Long answers have large sums and dominate the first term.

    python cpo.py                                                           # the embedded task, on a laptop
    torchrun --nproc_per_node=4 cpo.py --model runs/sft-gemma-2-2b    # after sft.py --model gemma-2-2b
    python cpo.py --model runs/sft --dataset rows.jsonl                     # {"prompt", "chosen", "rejected"}

Copyright (c) 2026 the plainpref authors. MIT licence. Tested with torch 2.13 and transformers 5.23.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

import common


@dataclass
class Args(common.Args):  # defaults: the thesis' (the paper trains adapters: alma-13b)
    beta: float = 0.1  # factor on the log-probs in the preference term
    nll_weight: float = 1.0  # weight of the mean NLL of the chosen answers' tokens
    pairs: Literal["best-worst", "adjacent", "all"] = "best-worst"  # how ranked lists become pairs
    max_length: int = 2048  # tokens of prompt and response together
    max_prompt_length: int = 256  # tokens kept of the prompt if the row is too long
    lr: float = 1e-7  # peak learning rate
    batch_size: int = 64  # pairs per optimizer step, over all processes
    micro_batch_size: int = 4  # pairs per forward pass and process; lowered to divide the batch
    epochs: float = 3.0  # passes over the pairs
    schedule: Literal["constant", "linear", "cosine", "inverse-sqrt"] = "cosine"  # after warm-up
    optimizer: Literal["adamw", "rmsprop"] = "rmsprop"  # as the thesis' text says


# What differs from the defaults, by model (or the model that a checkpoint was trained from).
PRESETS = {
    "tiny": dict(  # tuned here
        nll_weight=0.05, lr=6e-4, batch_size=16, micro_batch_size=16, max_steps=300, schedule="linear",
        warmup_ratio=0.05, optimizer="adamw", max_length=160, max_prompt_length=128, dataset="family",
    ),
    "alma-13b": dict(  # github.com/fe1ixxu/ALMA; batch 128: the paper, from memory (their script has 16)
        lr=1e-4, batch_size=128, epochs=1.0, schedule="inverse-sqrt", warmup_ratio=0.01, optimizer="adamw",
        max_length=512, lora_rank=16, dataset="alma-r",
    ),
    # github.com/martimfasantos/MSc-Thesis; its text says RMSprop, its code runs AdamW (dpo.py, 4)
    "gemma-2-2b": dict(dataset="tldr"), "tinyllama": dict(dataset="tldr"), "eurollm-1.7b": dict(dataset="tldr"),
}  # fmt: skip


def cpo_loss(
    chosen_logps: torch.Tensor,  # (B,) log pi(y_w | x), summed over response tokens
    rejected_logps: torch.Tensor,  # (B,) log pi(y_l | x)
    mean_length: float,  # mean tokens of a chosen answer, over the step (or all held-out rows)
    beta: float,
    nll_weight: float,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Both terms. Returns one loss per pair, and metrics (one value per pair)."""
    chosen_rewards = beta * chosen_logps  # (B,)
    rejected_rewards = beta * rejected_logps  # (B,)
    margins = chosen_rewards - rejected_rewards  # (B,)
    nll = -chosen_logps / mean_length  # (B,) its mean over pairs is the step's mean over tokens
    losses = -F.logsigmoid(margins) + nll_weight * nll
    metrics = {
        "loss": losses,
        "nll_loss": nll,
        "rewards/chosen": chosen_rewards,
        "rewards/rejected": rejected_rewards,
        "rewards/margins": margins,
        "rewards/accuracies": (margins.sign() + 1) / 2,  # a tie counts half
        "logps/chosen": chosen_logps,
        "logps/rejected": rejected_logps,
    }
    return losses, metrics


def main(args: Args) -> None:
    if not args.beta > 0:
        raise common.UserError("--beta must be positive")
    run = common.Run(args)
    tokenizer = common.load_tokenizer(args.model, args.max_length)
    train, held_out = common.load_rows(args, tokenizer, kind="pair")
    run.plan(train)
    policy = common.load_policy(args, run)
    optimizer, scheduler = common.make_optimizer(policy, args, run)
    run.restore(policy, optimizer, scheduler)

    def losses_of(batch: common.MicroBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        logps = common.response_logps(policy, batch)  # (B, 2): chosen, rejected
        losses, metrics = cpo_loss(*logps.unbind(1), batch.mean_length, args.beta, args.nll_weight)
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
