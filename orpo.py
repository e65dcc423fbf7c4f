"""ORPO: Odds Ratio Preference Optimization. Hong, Lee, Thorne; 2024; arXiv 2403.07691.

    L     = E_(x, y_w, y_l) [ L_SFT  +  lambda L_OR ],      L_SFT = - log P(y_w|x)                            (eq. 6)
    L_OR  = - log sigmoid( log odds(y_w|x) - log odds(y_l|x) ),      odds = P / (1 - P)                       (eq. 7, 4)
    log P(y|x) = 1/|y| log pi(y|x)                                                                            (eq. 3)

ORPO needs one stage instead of two, and no reference model. A base model learns to answer from y_w. Plain fine-tuning also makes
y_l likelier where the two answers are alike; the weak second term prevents this. P is the geometric mean of an answer's token
probabilities. For small P the odds are about P, and L_OR is simpo.py's loss with beta 1 and no margin. As P nears 1, the odds
grow without bound.

    paper                    code
    x, y_w, y_l              a row: the prompt, its first response (chosen), its second (rejected)
    log pi(y|x), |y|         chosen_logps, rejected_logps: sums over response tokens, EOS included;
                             chosen_lengths, rejected_lengths: the number of these tokens
    log P(y|x)               chosen_means, rejected_means
    log odds(y|x)            chosen_rewards, rejected_rewards
    lambda                   odds_weight; alpha in the authors' code, beta in TRL
    E                        mean over the pairs of a step, on all processes

Options and departures
1. L_SFT is the paper's: a mean over each answer's tokens, then over pairs. The authors' code and TRL take one mean over all tokens
   of a micro-batch, prompts included (TRL's pull request 1516 reports a better MT-Bench with prompts). Long answers then count
   more, and answers to long prompts count little. The authors' padding token is EOS, so their NLL also skips EOS.
2. The authors' mask counts one padding token as part of each answer (2 % of the odds term at 20 tokens). Ours does not. Their
   code drops rows with a prompt of 1,792 tokens or more; ours cuts the prompt.
3. Most base models have no chat template, which the presets' dialogues need: save one with the tokenizer, or use tldr.
4. In the odds, a mean log-prob above -1e-6 counts as -1e-6 (odds of a million) and has gradient 0: at P = 1 the odds are
   infinite, and fp32 log-probs do not resolve 1 - P. L_SFT is not clamped.
5. rewards/... are log odds. TRL plots lambda times log P, and our rewards/margins as log_odds_chosen.
6. `tiny` can already answer and its pairs are its own samples, so L_SFT has little to teach (weight 0.2, 600 steps: sampled reward
   +0.03, greedy +0.09). Weight 4 and three times dpo.py's steps give +0.06 and +0.15.

Healthy: from a base model nll_loss falls as in sft.py (`tiny-untrained`, weight 0.1, 150 steps: 6.2 to 2.7) and the odds follow
later. `tiny` trades nll_loss (0.88 to 1.00) for odds: odds_ratio_loss falls (0.69 to 0.59), rewards/accuracies starts at the
share of pairs that the model already ranks correctly and rises (0.63 to 0.67), as do the margins (0.67 to 0.86). If log P is near
0 for chosen and -5 to -10 for rejected answers, it over-fits: lower --odds-weight or --lr. The authors advise weights of 0.05 to
0.1 for 7B models and 0.5 to 1 for small ones.

    python orpo.py                                                          # the embedded task, on a laptop
    torchrun --nproc_per_node=4 orpo.py --model gemma-2-2b --dataset tldr   # the base model, without sft.py
    python orpo.py --model gemma-2-2b --dataset rows.jsonl                  # {"prompt", "chosen", "rejected"}

Copyright (c) 2026 the plainpref authors. MIT licence. Tested with torch 2.13 and transformers 5.23.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

import common


@dataclass
class Args(common.Args):  # defaults: the paper's; model, data and hardware flags: common.Args
    odds_weight: float = 0.1  # lambda: weight of the odds-ratio term
    pairs: Literal["best-worst", "adjacent", "all"] = "best-worst"  # how ranked lists become pairs
    max_length: int = 2048  # tokens of prompt and response together
    max_prompt_length: int = 1792  # tokens kept of the prompt if the row is too long
    lr: float = 5e-6  # peak learning rate
    batch_size: int = 32  # pairs per optimizer step, over all processes
    micro_batch_size: int = 4  # pairs per forward pass and process; lowered to divide the batch
    epochs: float = 5.0  # passes over the pairs
    schedule: Literal["constant", "linear", "cosine", "inverse-sqrt"] = "inverse-sqrt"  # decay
    warmup_ratio: float = 0.021  # share of the steps during which the learning rate rises from 0


# What differs from the defaults, by model (or the model that a checkpoint was trained from).
# Mistral's: github.com/xfactlab/orpo. For Llama and Phi only lambda is the paper's.
CLEANED = "argilla/ultrafeedback-binarized-preferences-cleaned"
PRESETS = {
    "tiny": dict(  # tuned here
        odds_weight=4.0, lr=2e-4, batch_size=16, micro_batch_size=16, max_steps=900, schedule="linear",
        warmup_ratio=0.05, max_length=160, max_prompt_length=128, dataset="family",
    ),
    "mistral-7b": dict(dataset=CLEANED), "mistral-7b-v0.1": dict(dataset=CLEANED),
    "llama-2-7b": dict(odds_weight=0.2, dataset="ultrafeedback"),
    "llama-2-7b-hf": dict(odds_weight=0.2, dataset="ultrafeedback"),
    "phi-2": dict(odds_weight=0.25, dataset="ultrafeedback"),
}  # fmt: skip


def orpo_loss(
    chosen_logps: torch.Tensor,  # (B,) log pi(y_w | x), summed over response tokens
    rejected_logps: torch.Tensor,  # (B,) log pi(y_l | x)
    chosen_lengths: torch.Tensor,  # (B,) number of response tokens
    rejected_lengths: torch.Tensor,  # (B,)
    odds_weight: float,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Equation 6. Returns one loss per pair, and metrics (one value per pair)."""
    chosen_means = chosen_logps / chosen_lengths  # (B,) log P, a mean over tokens
    rejected_means = rejected_logps / rejected_lengths  # (B,)
    # log odds = log P - log(1 - P); expm1 keeps the digits of 1 - P when P is near 1.
    log_p = torch.stack([chosen_means, rejected_means]).clamp(max=-1e-6)  # (2, B), P < 1
    chosen_rewards, rejected_rewards = log_p - torch.log(-torch.expm1(log_p))  # (B,) each
    margins = chosen_rewards - rejected_rewards  # (B,)
    odds_losses = -F.logsigmoid(margins)
    losses = -chosen_means + odds_weight * odds_losses
    metrics = {
        "loss": losses,
        "nll_loss": -chosen_means,
        "odds_ratio_loss": odds_losses,
        "rewards/chosen": chosen_rewards,
        "rewards/rejected": rejected_rewards,
        "rewards/margins": margins,
        "rewards/accuracies": (margins.sign() + 1) / 2,  # a tie counts half
        "logps/chosen": chosen_logps,
        "logps/rejected": rejected_logps,
    }
    return losses, metrics


def main(args: Args) -> None:
    run = common.Run(args)
    tokenizer = common.load_tokenizer(args.model, args.max_length)
    train, held_out = common.load_rows(args, tokenizer, kind="pair")
    run.plan(train)
    policy = common.load_policy(args, run)
    optimizer, scheduler = common.make_optimizer(policy, args, run)
    run.restore(policy, optimizer, scheduler)

    def losses_of(batch: common.MicroBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        logps = common.response_logps(policy, batch)  # (B, 2): chosen, rejected
        losses, metrics = orpo_loss(*logps.unbind(1), *batch.lengths.unbind(1), args.odds_weight)
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
