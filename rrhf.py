"""RRHF: Rank Responses to align language models with Human Feedback. Yuan, Yuan, Tan, Wang, Huang, Huang; 2023; arXiv 2304.05302.

    L      = E_(x, y_1 ... y_n) [ L_rank  +  w L_ft ]
    L_rank = sum over r_i < r_j of max(0, p_i - p_j),        p_i = log pi(y_i|x) / |y_i|
    L_ft   = - log pi(y_best|x)

The policy scores the answers to a prompt itself, with its mean log-prob per token, p. These scores should be in the order of the
rewards; a pair in the wrong order costs the difference of its scores. L_ft is SFT on the best answer. There is no reference
model, no temperature and no margin, and only the order of the rewards matters.

    paper                    code
    x, y_1 ... y_n           a row: the prompt and its responses, sorted by score, best first; lists may differ in length
    r_i                      scores; NaN past the end of a shorter list
    p_i                      mean_logps: means over response tokens, end-of-sequence included
    w                        sft_weight, 1 in the paper; its log pi(y_best|x) is a sum over tokens
    E                        mean over the lists of a step, on all processes; the sum over pairs is a sum

Departures
1. --margin m: a pair costs max(0, m + p_i - p_j); 0 in the paper and in its preset. Without a margin, equal scores cost nothing,
   so the hinge is satisfied by a flat policy, and only L_ft opposes that. On `tiny` (sampled reward 0.319, greedy 0.367 at the
   start) w = 0.02 without a margin flattens the policy (0.009, 0.269); the paper's w = 1 does not change the samples (0.318,
   0.450). Margins of 1, 2, 4 nats per token with w = 0.1, 0.3, 0.1 give 0.352, 0.439, 0.502 (greedy 0.533, 0.529, 0.522).
2. Ties are not compared. Of several best answers, the first is the target of L_ft.
3. In the authors' code p_i is the sum of log-probs divided by the padded length of the batch, not by |y_i|: labels of -100 are
   overwritten with 0 before the mask for the lengths is built. L_ft is a mean over the same places. Apart from a common factor,
   they therefore rank sums, with w = 1 on an SFT sum. This file follows the paper.
4. The authors rank six answers, four of them sampled, with a reward model; here `hh` has its human pairs, lists of two. alma-r
   has lists of three.

Healthy: rank_loss falls while rewards/chosen (p of the best answer) falls no further than rewards/rejected (`tiny`: from -0.9 and
-1.3 to -2.1 and -3.4). rewards/accuracies (share of a list's ordered pairs in the right order) rises (`tiny`: 0.58 to 0.63). If
rank_loss falls while rewards/margins shrinks, the policy becomes flat: raise --sft-weight or set a --margin.

    python rrhf.py                                                          # the embedded task, on a laptop
    torchrun --nproc_per_node=4 rrhf.py --model runs/sft-gemma-2-2b --dataset tldr  # after sft.py --model gemma-2-2b
    python rrhf.py --model runs/sft-... --dataset rows.jsonl                # {"prompt", "responses", "scores"}

Copyright (c) 2026 the plainpref authors. MIT licence. Tested with torch 2.13 and transformers 5.23.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

import common


@dataclass
class Args(common.Args):  # defaults: the authors'; model, data, hardware and output: common.Args
    sft_weight: float = 1.0  # w: weight of the SFT term
    margin: float = 0.0  # nats per token by which a better answer should lead
    max_length: int = 192  # tokens of prompt and response together
    max_prompt_length: int = 128  # tokens kept of the prompt if the row is too long
    lr: float = 2e-5  # peak learning rate
    batch_size: int = 64  # lists per optimizer step, over all processes
    micro_batch_size: int = 1  # lists per forward pass and process; lowered to divide the batch
    epochs: float = 3.0  # passes over the lists
    schedule: Literal["constant", "linear", "cosine", "inverse-sqrt"] = "cosine"  # after warm-up
    warmup_ratio: float = 0.03  # share of the steps during which the learning rate rises from 0


# What differs from the defaults, by model (or the model that a checkpoint was trained from). The
# defaults: train.sh of github.com/GanjinZero/RRHF (8 GPUs x 1 list x 8 steps of accumulation). The
# paper says linear decay, not cosine. max_prompt_length is ours: they cut prompts at max_length.
PRESETS = {
    "tiny": dict(  # tuned here
        sft_weight=0.1, margin=4.0, lr=3e-4, batch_size=16, micro_batch_size=16, max_steps=300,
        schedule="linear", warmup_ratio=0.05, max_length=160,
        dataset="family",
    ),
    "llama-7b": dict(dataset="hh"),  # the authors'
}  # fmt: skip


def rrhf_loss(
    logps: torch.Tensor,  # (B, K) log pi(y_i | x), summed over response tokens
    lengths: torch.Tensor,  # (B, K) number of response tokens
    scores: torch.Tensor,  # (B, K) best first; NaN past the end of a shorter list
    sft_weight: float,
    margin: float = 0.0,
) -> tuple[torch.Tensor, dict[str, torch.Tensor | tuple[torch.Tensor, torch.Tensor]]]:
    """Both terms. Returns one loss per list, and the metrics: values, or (values, weights)."""
    mean_logps = logps / lengths.clamp(min=1)  # (B, K) p_i
    worse = scores[:, :, None] > scores[:, None, :]  # (B, K, K) r_i < r_j; false where NaN
    margins = mean_logps[:, :, None] - mean_logps[:, None, :]  # (B, K, K) p_j - p_i
    ranking = torch.where(worse, F.relu(margin - margins), 0.0).sum((1, 2))  # (B,) L_rank
    losses = ranking - sft_weight * logps[:, 0]
    last = (~scores.isnan()).sum(-1, keepdim=True) - 1  # (B, 1) the worst answer of each list
    metrics = {
        "loss": losses,
        "rank_loss": ranking,
        "rewards/chosen": mean_logps[:, 0],
        "rewards/rejected": mean_logps.gather(1, last)[:, 0],
        "rewards/margins": margins[:, 0].gather(1, last)[:, 0],
        "rewards/accuracies": ((margins.sign() + 1) / 2 * worse, worse.float()),  # ties: half
        "logps/chosen": logps[:, 0],
        "logps/rejected": logps.gather(1, last)[:, 0],
    }
    return losses, metrics


def main(args: Args) -> None:
    if not args.sft_weight >= 0 or not args.margin >= 0:
        raise common.UserError("--sft-weight and --margin must be 0 or more")
    run = common.Run(args)
    tokenizer = common.load_tokenizer(args.model, args.max_length)
    train, held_out = common.load_rows(args, tokenizer, kind="ranked")
    run.plan(train)
    policy = common.load_policy(args, run)
    optimizer, scheduler = common.make_optimizer(policy, args, run)
    run.restore(policy, optimizer, scheduler)

    def losses_of(batch: common.MicroBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        logps = common.response_logps(policy, batch)  # (B, K)
        losses, metrics = rrhf_loss(
            logps, batch.lengths, batch.scores, args.sft_weight, margin=args.margin
        )
        metrics |= {"length/chosen": batch.lengths[:, 0]}
        metrics |= {"length/response": (batch.lengths, batch.lengths > 0)}
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
