"""IPO: Identity Preference Optimization. Azar, Rowland, Piot, Guo, Calandriello, Valko, Munos; 2023; arXiv 2310.12036.

    L = E_(x, y_w, y_l) [ ( h - 1/(2 tau) )^2 ],       h = log pi(y_w|x)/ref(y_w|x)  -  log pi(y_l|x)/ref(y_l|x)      (eq. 17)

DPO's loss keeps falling as h grows. If one of two answers always wins, DPO's optimum never writes the other, whatever beta is,
and the pull to the reference is lost. IPO maximises the probability that an answer is preferred, minus tau times the KL from ref,
and assumes no reward model. If y_w wins with probability p, the optimum is h = (p - 1/2)/tau, at most 1/(2 tau). Regressing every
labelled pair to 1/(2 tau) has the same optimum. A pair past its target is pulled back, and the gradient grows with the distance
to the target, without a bound.

    paper                    code
    x, y_w, y_l              a row: the prompt, its first response (chosen), its second (rejected)
    log pi(y|x)              chosen_logps, rejected_logps: sums over response tokens, EOS included
    log ref(y|x)             ref_chosen_logps, ref_rejected_logps
    tau                      beta, as in TRL. It has the role of dpo.py's beta, but not its scale
    h                        h: a difference of means over tokens, or of sums with --no-per-token
    E                        mean over the pairs of a step, on all processes

Options and departures
1. --per-token (the default) divides each log-ratio by its answer's length. For text the paper's equation reads as a sum
   (--no-per-token, and the first published code). With sums, long answers have wider log-ratios and dominate the squared error.
   The authors advised TRL to use means (pull request 1265, issue 1677), HALOs uses means too, and all presets are for means.
   A beta for means does not suit sums: 1/(2 beta) is in nats per token here, in nats per answer there.
2. rewards/... are beta times the compared log-ratios, so the target of rewards/margins is 1/2. TRL plots beta times the sums.
3. beta 0.01, the best of ten that the handbook tried, sets a target of 50 nats per token. No pair comes near it, so the square
   is almost a straight line and all pairs get the same pull. One epoch at a small learning rate limits the KL.
4. The reference log-probs are computed once, before the first step, as in dpo.py.

Healthy: the loss starts at 1/(4 beta^2) (`tiny`: 4.0) and falls little if labels are noisy (to 3.5). rewards/margins rises from 0
and stays far below 1/2 (0.07); rewards/accuracies rises from 0.5 to 0.66. grad_norm stays near 23 (12 to 59), so clipping to 1
scales every step and --lr alone sets the step size. If the held-out loss rises above its start, lower --lr. A larger beta sets
a nearer target and gives a smaller KL.

    python ipo.py                                                           # the embedded task, on a laptop
    torchrun --nproc_per_node=4 ipo.py --model runs/sft-gemma-2-2b --dataset tldr   # after sft.py --model gemma-2-2b
    python ipo.py --model runs/sft --dataset rows.jsonl                     # {"prompt", "chosen", "rejected"}

Copyright (c) 2026 the plainpref authors. MIT licence. Tested with torch 2.13 and transformers 5.23.
"""

from dataclasses import dataclass
from typing import Literal

import torch

import common


@dataclass
class Args(common.Args):  # defaults: the handbook's; model, data and hardware flags: common.Args
    beta: float = 0.01  # the paper's tau: the target difference of log-ratios is 1/(2 beta)
    per_token: bool = True  # compare means over an answer's tokens; off: sums, as in the paper
    ref_model: str | None = None  # reference, or an average a+b of two; default: the initial policy
    soup_weight: float = 0.5  # weight of a in a+b
    pairs: Literal["best-worst", "adjacent", "all"] = "best-worst"  # how ranked lists become pairs
    lr: float = 5e-7  # peak learning rate
    batch_size: int = 128  # pairs per optimizer step, over all processes
    micro_batch_size: int = 4  # pairs per forward pass and process; lowered to divide the batch
    schedule: Literal["constant", "linear", "cosine", "inverse-sqrt"] = "cosine"  # after warm-up


# What differs from the defaults, by model (or the model that a checkpoint was trained from).
# Published: huggingface.co/blog/pref-tuning and recipes/pref_align_scan in
# github.com/huggingface/alignment-handbook. It gives no max_length; the defaults are Zephyr's.
PRESETS = {
    "tiny": dict(  # tuned here
        beta=0.25, lr=2e-4, batch_size=16, micro_batch_size=16, max_steps=300, schedule="linear",
        warmup_ratio=0.05, max_length=160, max_prompt_length=128, dataset="family",
    ),
    "zephyr-7b-sft-full": dict(dataset="ultrafeedback"),
    "openhermes-2.5-mistral-7b": dict(dataset="HuggingFaceH4/orca_dpo_pairs::train_prefs"),
}  # fmt: skip


def ipo_loss(
    chosen_logps: torch.Tensor,  # (B,) log pi(y_w | x), summed over response tokens
    rejected_logps: torch.Tensor,  # (B,) log pi(y_l | x)
    ref_chosen_logps: torch.Tensor,  # (B,) the same under the frozen reference
    ref_rejected_logps: torch.Tensor,  # (B,)
    chosen_lengths: torch.Tensor,  # (B,) number of response tokens
    rejected_lengths: torch.Tensor,  # (B,)
    beta: float,
    per_token: bool = True,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Equation 17. Returns one loss per pair, and metrics (one value per pair)."""
    chosen_ratios = chosen_logps - ref_chosen_logps  # (B,) log pi/ref
    rejected_ratios = rejected_logps - ref_rejected_logps  # (B,)
    if per_token:
        chosen_ratios = chosen_ratios / chosen_lengths
        rejected_ratios = rejected_ratios / rejected_lengths
    h = chosen_ratios - rejected_ratios  # (B,)
    losses = (h - 1 / (2 * beta)) ** 2
    metrics = {
        "loss": losses,
        "rewards/chosen": beta * chosen_ratios,
        "rewards/rejected": beta * rejected_ratios,
        "rewards/margins": beta * h,
        "rewards/accuracies": (h.sign() + 1) / 2,  # a tie counts half
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
    common.add_reference_logps(policy, args, run, train, held_out)  # before any update
    optimizer, scheduler = common.make_optimizer(policy, args, run)
    run.restore(policy, optimizer, scheduler)

    def losses_of(batch: common.MicroBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        logps = common.response_logps(policy, batch)  # (B, 2): chosen, rejected
        ref_logps = batch.ref_logps.to(logps.dtype)  # (B, 2)
        losses, metrics = ipo_loss(
            *logps.unbind(1), *ref_logps.unbind(1), *batch.lengths.unbind(1),
            args.beta, args.per_token,
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
