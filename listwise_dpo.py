"""Listwise DPO: the Plackett-Luce form of DPO. Rafailov et al.; 2023; arXiv 2305.18290, appendix A.3. Also the method that the
thesis at github.com/martimfasantos/MSc-Thesis proposes: DPO's reward in PRO's chain of choices.

    L = - E_(x, y_1 > ... > y_K) [ sum over k < K of log( exp(u_k) / sum over i >= k of exp(u_i) ) ]
    u_k = beta log pi(y_k|x)/ref(y_k|x)

DPO treats a pair as one choice between two answers. A ranking of K answers is a sequence of choices: the best of all, then the
best of the rest, and so on. With the same implicit reward, the likelihood of the ranking is a product of softmaxes; for K = 2 it
is DPO. A list contains more information than its best and worst answer, and all K answers share one prompt.

    paper                    code
    x, y_1 ... y_K           a row: the prompt and its responses, sorted by score, best first; lists may differ in length
    log pi(y|x), log ref     logps, ref_logps: sums over response tokens, end-of-sequence included
    u_k                      rewards
    the ranking              scores: only their order matters; NaN past the end of a shorter list
    E                        mean over the lists of a step, on all processes; the sum over k is a sum

Departures
1. The thesis prints this loss (its equation 20) with u_1 in every numerator: each choice compares later answers with the best
   one. Its own derivation and Plackett-Luce have u_k, the answer chosen at that step, and so does this file.
2. Ties: answers with equal scores are not compared with each other, only with those below. (Plackett-Luce has no ties; a random
   order would add noise.)
3. A list of K has K - 1 terms, so the loss grows with K and long lists weigh more.
4. No settings are published for lists. The defaults are the thesis' for DPO on pairs, except for the data set alma-r, which has
   lists of translations: fine-tune on translations first, or give another --dataset.
5. The reference log-probs are computed once, before the first step, as in dpo.py.

Healthy: the loss starts at the sum over k of log(1 + answers below the k-th): log 4 + log 3 + log 2 = 3.18 for four without
ties (`tiny`, lists of two to four: 2.17). rewards/accuracies (share of a list's ordered pairs in the right order) rises from 0.5
(all ties) to 0.6-0.8. logps/chosen usually falls too, but less than logps/rejected. If greedy quality falls or length
grows while the loss goes to 0, the policy over-optimises: raise beta or lower --lr.

    python listwise_dpo.py                                                  # the embedded task, on a laptop
    torchrun --nproc_per_node=4 listwise_dpo.py --model runs/sft-gemma-2-2b  # after sft.py --model gemma-2-2b
    python listwise_dpo.py --model runs/sft-... --dataset rows.jsonl        # {"prompt", "responses", "scores"}

Copyright (c) 2026 the plainpref authors. MIT licence. Tested with torch 2.13 and transformers 5.23.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

import common


@dataclass
class Args(common.Args):  # defaults: the thesis'; model, data, hardware and output: common.Args
    beta: float = 0.1  # strength of the pull towards the reference, per nat
    ref_model: str | None = None  # reference model, or an average a+b; default: the starting policy
    soup_weight: float = 0.5  # weight of a in a+b
    max_length: int = 2048  # tokens of prompt and response together
    max_prompt_length: int = 256  # tokens kept of the prompt if the row is too long
    lr: float = 1e-7  # peak learning rate
    batch_size: int = 64  # lists per optimizer step, over all processes
    micro_batch_size: int = 2  # lists per forward pass and process; lowered to divide the batch
    epochs: float = 3.0  # passes over the lists
    schedule: Literal["constant", "linear", "cosine", "inverse-sqrt"] = "cosine"  # after warm-up
    optimizer: Literal["adamw", "rmsprop"] = "rmsprop"  # see PRESETS about the thesis' code


# What differs from the defaults, by model (or the model that a checkpoint was trained from). The
# defaults: github.com/martimfasantos/MSc-Thesis (full fine-tuning, a batch of 64 to 128). Its text
# says RMSProp; its code runs AdamW with weight decay 0.05 and 150 warm-up steps.
PRESETS = {
    "tiny": dict(  # tuned here
        beta=0.2, lr=3e-4, batch_size=16, micro_batch_size=16, max_steps=300, schedule="linear",
        warmup_ratio=0.05, optimizer="adamw", max_length=160, max_prompt_length=128,
        dataset="family",
    ),
    "gemma-2-2b": dict(dataset="alma-r"),  # the thesis
    "tinyllama": dict(dataset="alma-r"),
    "eurollm-1.7b": dict(dataset="alma-r"),
}  # fmt: skip


def listwise_dpo_loss(
    logps: torch.Tensor,  # (B, K) log pi(y_k | x), summed over response tokens
    ref_logps: torch.Tensor,  # (B, K) the same under the frozen reference
    scores: torch.Tensor,  # (B, K) best first; NaN past the end of a shorter list
    beta: float,
) -> tuple[torch.Tensor, dict[str, torch.Tensor | tuple[torch.Tensor, torch.Tensor]]]:
    """Plackett-Luce. Returns one loss per list, and the metrics: values, or (values, weights)."""
    rewards = beta * (logps - ref_logps)  # (B, K) u_k
    worse = scores[:, :, None] > scores[:, None, :]  # (B, K, K) r_i < r_k; false where NaN
    margins = rewards[:, :, None] - rewards[:, None, :]  # (B, K, K) u_k - u_i
    # -log of the k-th softmax: logsumexp over k itself (0) and all that are worse (u_i - u_k).
    ahead = (-margins).masked_fill(~worse, -torch.inf)
    losses = torch.logsumexp(F.pad(ahead, (1, 0)), -1).sum(-1)  # (B,) a term is 0 if none is worse
    last = (~scores.isnan()).sum(-1, keepdim=True) - 1  # (B, 1) the worst answer of each list
    metrics = {
        "loss": losses,
        "rewards/chosen": rewards[:, 0],
        "rewards/rejected": rewards.gather(1, last)[:, 0],
        "rewards/margins": margins[:, 0].gather(1, last)[:, 0],
        "rewards/accuracies": ((margins.sign() + 1) / 2 * worse, worse.float()),  # ties: half
        "logps/chosen": logps[:, 0],
        "logps/rejected": logps.gather(1, last)[:, 0],
    }
    return losses, metrics


def main(args: Args) -> None:
    if not args.beta > 0:
        raise common.UserError("--beta must be positive")
    run = common.Run(args)
    tokenizer = common.load_tokenizer(args.model, args.max_length)
    train, held_out = common.load_rows(args, tokenizer, kind="ranked")
    run.plan(train)
    policy = common.load_policy(args, run)
    common.add_reference_logps(policy, args, run, train, held_out)  # before any update
    optimizer, scheduler = common.make_optimizer(policy, args, run)
    run.restore(policy, optimizer, scheduler)

    def losses_of(batch: common.MicroBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        logps = common.response_logps(policy, batch)  # (B, K)
        ref_logps = batch.ref_logps.to(logps.dtype)  # (B, K)
        losses, metrics = listwise_dpo_loss(logps, ref_logps, batch.scores, args.beta)
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
