"""PRO: Preference Ranking Optimization. Song, Yu, Li, Yu, Huang, Li, Wang; 2023; arXiv 2306.17492.

    L   = E_(x, y_1 > ... > y_n) [ sum over k < n of L_k  +  w (n-1)^2 (- log pi(y_1|x)) ]
    L_k = - log( exp(T_k s_k) / ( exp(T_k s_k) + sum over i > k of exp(T_ki s_i) ) )
    s_i = log pi(y_i|x) / |y_i|,        T_ki = r_k - r_i,        T_k = max over i > k of T_ki

A ranking is a chain of choices: the best answer against all others, then the second against those below it, and so on. Each
choice is a softmax over mean log-probs per token, s, times differences of scores, T (inverse temperatures). A worse answer y_i is
pushed down with weight T exp(T s_i), which is largest at T |s_i| = 1: a larger T pushes less, and the choice counts as learned
sooner. So the unit of the scores matters: by default the median r_1 - r_n is scaled to 1. The last term is SFT on y_1.

    paper                    code
    x, y_1 ... y_n           a row: the prompt and its responses, sorted by score, best first; lists may differ in length
    r_i                      scores; NaN past the end of a shorter list
    s_i                      mean_logps: means over response tokens, end-of-sequence included
    T_ki, T_k                temperatures[k, i]; own[k]. The paper writes 1/T: its temperatures divide
    w                        sft_weight; its log pi(y_1|x) is a sum over tokens, as in the authors' code
    E                        mean over the lists of a step, on all processes; the sum over k is a sum

Departures
1. Equal scores are not compared. In the authors' code a tied answer has temperature 0: a constant exp(0) in the sum, no gradient.
2. L_k is logsumexp(0, T_ki s_i - T_k s_k). The authors' log(1e-10 + ...) of plain exponentials is constant for T s below -23:
   worse answers then get no gradient, and the better one all of T_k, even if they are well ordered.
3. --no-score-temperatures sets all temperatures to 1, the paper's variant without scores; pairs (scores 1 and 0) have T = 1 too.
4. The authors score the end of a sequence only if padding follows. Here every answer that was not cut ends with it.
5. The authors rank hh and other models' answers with a reward model; here `hh` has human pairs. Their weight decay is 0.01, ours 0.

Healthy: chain_loss starts near log n! (equal s, temperatures 1 or small) and falls; rewards/accuracies (share of a list's ordered
pairs in the right order) rises (`tiny`: 0.58 to 0.63). rewards/chosen and /rejected are s of the best and the worst answer. On
long answers `loss` is mostly the SFT term, a sum. If logps/chosen falls far, raise --sft-weight.

    python pro.py                                                           # the embedded task, on a laptop
    torchrun --nproc_per_node=4 pro.py --model runs/sft-gemma-2-2b --dataset tldr   # after sft.py --model gemma-2-2b
    python pro.py --model runs/sft-... --dataset rows.jsonl                 # {"prompt", "responses", "scores"}

Copyright (c) 2026 the plainpref authors. MIT licence. Tested with torch 2.13 and transformers 5.23.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

import common


@dataclass
class Args(common.Args):  # defaults: the authors'; model, data, hardware and output: common.Args
    sft_weight: float = 0.05  # w: weight of the SFT term
    score_temperatures: bool = True  # score differences are the temperatures; off: all are 1
    score_scale: float | None = None  # factor on the scores; default: 1 / the median gap
    max_length: int = 512  # tokens of prompt and response together
    max_prompt_length: int = 384  # tokens kept of the prompt if the row is too long
    lr: float = 5e-6  # peak learning rate
    batch_size: int = 112  # lists per optimizer step, over all processes
    micro_batch_size: int = 2  # lists per forward pass and process; lowered to divide the batch
    epochs: float = 2.0  # passes over the lists
    schedule: Literal["constant", "linear", "cosine", "inverse-sqrt"] = "constant"  # after warm-up
    warmup_ratio: float = 0.0  # share of the steps during which the learning rate rises from 0


# What differs, by model. The defaults: github.com/AlibabaResearch/DAMO-ConvAI (7 GPUs x 2 lists x 8).
PRESETS = {
    "tiny": dict(  # tuned here; its scores differ by up to 18: unscaled, the reward did not rise
        sft_weight=0.002, score_scale=0.03, lr=3e-4, batch_size=16, micro_batch_size=16,
        max_steps=300, schedule="linear", warmup_ratio=0.05, max_length=160, max_prompt_length=128,
        dataset="family",
    ),
    "llama-7b": dict(score_scale=1.0, dataset="hh"),  # the authors'
}  # fmt: skip


def pro_loss(
    logps: torch.Tensor,  # (B, K) log pi(y_i | x), summed over response tokens
    lengths: torch.Tensor,  # (B, K) number of response tokens
    scores: torch.Tensor,  # (B, K) best first; NaN past the end of a shorter list
    sft_weight: float,
    score_temperatures: bool = True,
) -> tuple[torch.Tensor, dict[str, torch.Tensor | tuple[torch.Tensor, torch.Tensor]]]:
    """Both terms. Returns one loss per list, and the metrics: values, or (values, weights)."""
    mean_logps = logps / lengths.clamp(min=1)  # (B, K) s_i
    gaps = scores[:, :, None] - scores[:, None, :]  # (B, K, K) r_k - r_i
    worse = gaps > 0  # (B, K, K) r_i < r_k; false where a score is NaN
    temperatures = torch.where(worse, gaps if score_temperatures else 1.0, 0.0).to(logps)  # T_ki
    own = temperatures.amax(-1)  # (B, K) T_k
    # (B, K, K) how far a worse answer is ahead of the k-th: T_ki s_i - T_k s_k
    ahead = temperatures * mean_logps[:, None, :] - (own * mean_logps)[:, :, None]
    ahead = ahead.masked_fill(~worse, -torch.inf)
    chain = torch.logsumexp(F.pad(ahead, (1, 0)), -1).sum(-1)  # (B,) L_k is 0 if nothing is worse
    last = (~scores.isnan()).sum(-1, keepdim=True) - 1  # (B, 1) n - 1: index of the worst answer
    losses = chain - sft_weight * (last[:, 0] ** 2 * logps[:, 0])
    margins = mean_logps[:, :, None] - mean_logps[:, None, :]  # (B, K, K) s_k - s_i
    metrics = {
        "loss": losses,
        "chain_loss": chain,
        "rewards/chosen": mean_logps[:, 0],
        "rewards/rejected": mean_logps.gather(1, last)[:, 0],
        "rewards/margins": margins[:, 0].gather(1, last)[:, 0],
        "rewards/accuracies": ((margins.sign() + 1) / 2 * worse, worse.float()),  # ties: half
        "logps/chosen": logps[:, 0],
        "logps/rejected": logps.gather(1, last)[:, 0],
    }
    return losses, metrics


def main(args: Args) -> None:
    if not args.sft_weight >= 0 or not (args.score_scale is None or args.score_scale > 0):
        raise common.UserError("--sft-weight must be 0 or more, --score-scale positive")
    run = common.Run(args)
    tokenizer = common.load_tokenizer(args.model, args.max_length)
    train, held_out = common.load_rows(args, tokenizer, kind="ranked")
    gaps = torch.tensor([row.scores[0] - row.scores[-1] for row in train])  # best to worst
    score_scale = args.score_scale or 1 / gaps.quantile(0.5).item()
    common.say("scores", f"times {score_scale:.3g}, for a median gap of {gaps.quantile(0.5):.3g}")
    run.plan(train)
    policy = common.load_policy(args, run)
    optimizer, scheduler = common.make_optimizer(policy, args, run)
    run.restore(policy, optimizer, scheduler)

    def losses_of(batch: common.MicroBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        logps = common.response_logps(policy, batch)  # (B, K)
        losses, metrics = pro_loss(
            logps, batch.lengths, score_scale * batch.scores, args.sft_weight,
            score_temperatures=args.score_temperatures,
        )  # fmt: skip
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
