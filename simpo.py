"""SimPO: Simple Preference Optimization with a Reference-Free Reward. Meng, Xia, Chen; 2024; arXiv 2405.14734.

    L = - E_(x, y_w, y_l) [ log sigmoid( beta/|y_w| log pi(y_w|x)  -  beta/|y_l| log pi(y_l|x)  -  gamma ) ]      (eq. 6)

The reward is what length-normalised beam search ranks by: the mean log-prob of an answer's tokens, times beta. SimPO needs no
reference model, and a long answer gains nothing by its length. gamma is the target margin, where a pair's gradient is half of the
maximum. --gamma-beta-ratio is in nats per token, as in the authors' code; TRL's simpo_gamma and dpo.py's --gamma are absolute.

    paper                    code
    x, y_w, y_l              a row: the prompt, its first response (chosen), its second (rejected)
    log pi(y|x)              chosen_logps, rejected_logps: sums over response tokens, EOS included
    |y_w|, |y_l|             chosen_lengths, rejected_lengths: the number of these tokens
    gamma                    beta * gamma_beta_ratio: 2.0 * 0.5 = 1.0
    E                        mean over the pairs of a step, on all processes

Options and departures
1. --nll-weight (CPO-SimPO: github.com/fe1ixxu/CPO_SIMPO) adds the mean NLL of the step's chosen tokens. Their setting is
   --beta 10 --gamma-beta-ratio 0.54 --nll-weight 0.05.
2. The authors' code counts the chat template's header of an answer as answer tokens. Here it belongs to the prompt.
3. The thesis has gamma 0.5 at beta 0.1: 5 nats per token. Few pairs reach this, so all get about the same pull.
4. The presets of instruct models use sets that the authors sampled from the model itself. All their sets need a chat template.

Healthy: rewards/accuracies starts at the share of pairs that the model already ranks correctly and rises (`tiny`: 0.63 to 0.70),
as do margins (0.9 to 2.1). logps/chosen usually falls, less than logps/rejected. Repetition or worse greedy answers: lower --lr.

    python simpo.py                                                         # the embedded task, on a laptop
    torchrun --nproc_per_node=4 simpo.py --model runs/sft-gemma-2-2b  # after sft.py --model gemma-2-2b
    python simpo.py --model runs/sft --dataset rows.jsonl                   # {"prompt", "chosen", "rejected"}

Copyright (c) 2026 the plainpref authors. MIT licence. Tested with torch 2.13 and transformers 5.23.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

import common


@dataclass
class Args(common.Args):  # defaults: the paper's; model, data and hardware flags: common.Args
    beta: float = 2.0  # factor on the mean log-probs
    gamma_beta_ratio: float = 0.5  # target margin in nats per token: gamma / beta
    nll_weight: float = 0.0  # CPO-SimPO: weight of the mean NLL of the chosen answers' tokens
    pairs: Literal["best-worst", "adjacent", "all"] = "best-worst"  # how ranked lists become pairs
    max_length: int = 2048  # tokens of prompt and response together
    max_prompt_length: int = 1800  # tokens kept of the prompt if the row is too long
    lr: float = 6e-7  # peak learning rate
    batch_size: int = 128  # pairs per optimizer step, over all processes
    micro_batch_size: int = 2  # pairs per forward pass and process; lowered to divide the batch
    schedule: Literal["constant", "linear", "cosine", "inverse-sqrt"] = "cosine"  # after warm-up


# What differs from the defaults, by model (or the model that a checkpoint was trained from).
THESIS = dict(  # github.com/martimfasantos/MSc-Thesis; its text says RMSprop, its code runs AdamW (dpo.py, 4)
    beta=0.1, gamma_beta_ratio=5.0, lr=1e-7, batch_size=64, micro_batch_size=4, epochs=3.0, optimizer="rmsprop",
    max_prompt_length=256, dataset="tldr",
)  # fmt: skip
PRESETS = {
    "tiny": dict(  # tuned here
        gamma_beta_ratio=2.0, lr=4e-4, batch_size=16, micro_batch_size=16, max_steps=300, schedule="linear",
        warmup_ratio=0.05, max_length=160, max_prompt_length=128, dataset="family",
    ),
    # github.com/princeton-nlp/SimPO
    "llama-3-base-8b-sft": dict(dataset="ultrafeedback"),
    "zephyr-7b-sft-full": dict(gamma_beta_ratio=0.8, lr=3e-7, max_length=1024, max_prompt_length=512, dataset="ultrafeedback"),
    "mistral-7b-instruct-v0.2": dict(
        beta=2.5, gamma_beta_ratio=0.1, lr=5e-7, dataset="princeton-nlp/mistral-instruct-ultrafeedback",
    ),
    "meta-llama-3-8b-instruct": dict(beta=2.5, gamma_beta_ratio=0.55, lr=1e-6, dataset="princeton-nlp/llama3-ultrafeedback"),
    "gemma-2-9b-it": dict(beta=10.0, lr=8e-7, dataset="princeton-nlp/gemma2-ultrafeedback-armorm"),
    "gemma-2-2b": THESIS, "tinyllama": THESIS, "eurollm-1.7b": THESIS,
}  # fmt: skip


def simpo_loss(
    chosen_logps: torch.Tensor,  # (B,) log pi(y_w | x), summed over response tokens
    rejected_logps: torch.Tensor,  # (B,) log pi(y_l | x)
    chosen_lengths: torch.Tensor,  # (B,) number of response tokens
    rejected_lengths: torch.Tensor,  # (B,)
    beta: float,
    gamma_beta_ratio: float,
    nll_weight: float = 0.0,
    mean_length: float | None = None,  # for the NLL: mean tokens of a chosen answer, over the step
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Equation 6. Returns one loss per pair, and metrics (one value per pair)."""
    chosen_rewards = beta * chosen_logps / chosen_lengths  # (B,)
    rejected_rewards = beta * rejected_logps / rejected_lengths  # (B,)
    margins = chosen_rewards - rejected_rewards  # (B,)
    losses = -F.logsigmoid(margins - beta * gamma_beta_ratio)
    if nll_weight and mean_length is None:
        raise ValueError("nll_weight needs mean_length")
    metrics = {
        "rewards/chosen": chosen_rewards,
        "rewards/rejected": rejected_rewards,
        "rewards/margins": margins,
        "rewards/accuracies": (margins.sign() + 1) / 2,  # a tie counts half
        "logps/chosen": chosen_logps,
        "logps/rejected": rejected_logps,
    }
    if mean_length is not None:
        metrics["nll_loss"] = -chosen_logps / mean_length  # (B,) its mean is a mean over tokens
    if nll_weight:
        losses = losses + nll_weight * metrics["nll_loss"]
    metrics["loss"] = losses
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
        losses, metrics = simpo_loss(
            *logps.unbind(1), *batch.lengths.unbind(1),
            args.beta, args.gamma_beta_ratio, args.nll_weight, batch.mean_length,
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
