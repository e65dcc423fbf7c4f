"""Listwise DPO: the Plackett-Luce form of DPO. Rafailov et al.; 2023; arXiv 2305.18290, appendix A.3. Here also as the method
that a thesis (github.com/martimfasantos/MSc-Thesis) proposes: DPO's reward in PRO's chain of choices.

    L = - E_(x, y_1 > ... > y_K) [ sum over k < K of log( exp(u_k) / sum over i >= k of exp(u_i) ) ]
    u_k = beta log pi(y_k|x)/ref(y_k|x)

DPO takes a pair as one choice between two answers. A ranked list is several choices: the best of all, then the best of
what is left, and so on. With the same implicit reward the likelihood of the whole ranking is a product of softmaxes; for
K = 2 it is DPO. Lists tell more than their best and worst do, for the price of K answers behind one prompt.

    paper                    here
    x, y_1 ... y_K           a row: the prompt and its responses, sorted best first by their scores; lists may differ in length
    log pi(y|x), log ref     logps, ref_logps: sums over response tokens, end-of-sequence included
    u_k                      rewards
    the ranking              scores: only their order counts; NaN where a list is shorter than the longest one beside it
    E                        mean over the lists of a step, on all processes; the sum over k is a sum

Options and departures
1. The thesis prints this loss (its equation 20) with u_1 in every numerator: each choice compares later answers with the
   best one. Its own derivation, and Plackett-Luce, have u_k, the answer chosen at that step; so has this file.
2. Ties: answers with equal scores are not compared; each is compared with those below it. (Plackett-Luce knows no ties;
   to choose between equals at random would teach noise.)
3. A list of K has K - 1 terms, so long lists weigh more and the loss grows with K. Nothing is published for lists: the
   settings of real models are those of the thesis for DPO on pairs, but for the data set, which has lists (translations:
   fine-tune on such first, or give your own --dataset).
4. The reference is asked once, before the first step, for the log-probs that the run will use: the same numbers as with
   two models in memory, and one forward pass in the loop instead of two.

Healthy: the loss starts at the sum over k of log(1 + answers below the k-th): log 4 + log 3 + log 2 = 3.18 for four without
ties (`tiny`, lists of two to four: 2.17). rewards/accuracies (the share of a list's ordered pairs in the right order)
rises from 0 (no margin yet) to 0.6-0.8. logps/chosen usually falls too, less than logps/rejected. Falling greedy quality or
growing length with a loss near 0 is over-optimisation: raise beta, lower --lr.

    python listwise_dpo.py                                                  # the embedded task, on a laptop
    torchrun --nproc_per_node=4 listwise_dpo.py --model runs/sft-model-gemma-2-2b  # after sft.py --model gemma-2-2b
    python listwise_dpo.py --model runs/sft-... --dataset rows.jsonl        # {"prompt", "responses", "scores"}

Copyright (c) 2026 the plainpref authors. MIT licence. Tested with torch 2.13 and transformers 5.23.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

import common

# What a flag that was left out becomes, and where the numbers are from (micro-batches are ours): by
# the last part of the model's name, in small letters; a folder that a run of ours saved has the row of
# the model it began from. A model without a row takes the first one after `tiny`, and the run says so.
THESIS = {  # a batch of 64 to 128
    "beta": 0.1, "lr": 1e-7, "batch_size": 64, "micro_batch_size": 2, "epochs": 3.0,
    "schedule": "cosine", "warmup_ratio": 0.1, "optimizer": "rmsprop", "max_grad_norm": 1.0,
    "max_length": 2048, "max_prompt_length": 1024, "dataset": "alma-r",
    "source": "for DPO on pairs, the MSc thesis at github.com/martimfasantos/MSc-Thesis; nothing for lists",
}  # fmt: skip
SETTINGS = {
    "tiny": {
        "beta": 0.2, "lr": 3e-4, "batch_size": 16, "micro_batch_size": 16, "max_steps": 300,
        "schedule": "linear", "warmup_ratio": 0.05, "optimizer": "adamw", "max_grad_norm": 1.0,
        "max_length": 160, "max_prompt_length": 128, "dataset": "family", "source": "tuned here",
    },
    "gemma-2-2b": THESIS, "tinyllama": THESIS, "eurollm-1.7b": THESIS,
}  # fmt: skip


# fmt: off
@dataclass
class Args:
    # Listwise DPO
    beta: float | None = None  # strength of the pull to the reference, per nat; default: the model's row in SETTINGS
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


def listwise_dpo_loss(
    logps: Tensor,  # (B, K) log pi(y_k | x), summed over response tokens
    ref_logps: Tensor,  # (B, K) the same under the frozen reference
    scores: Tensor,  # (B, K) higher is better, best first; NaN: the list is shorter
    beta: float,
) -> tuple[Tensor, dict[str, Tensor | tuple[Tensor, Tensor]]]:
    """Plackett-Luce. Returns one loss per list, and what to plot: (values, weights) is a weighted mean."""
    rewards = beta * (logps - ref_logps)  # (B, K) u_k
    # r_i < r_k; never so where a score is NaN.
    worse = scores[:, :, None] > scores[:, None, :]  # (B, K, K)
    margins = rewards[:, :, None] - rewards[:, None, :]  # (B, K, K) u_k - u_i
    # -log of the k-th softmax: logsumexp over k itself (0) and all that are worse (u_i - u_k).
    ahead = (-margins).masked_fill(~worse, -torch.inf)
    losses = torch.logsumexp(F.pad(ahead, (1, 0)), -1).sum(-1)  # (B,) 0 where nothing is worse
    last = (~scores.isnan()).sum(-1, keepdim=True) - 1  # (B, 1) the worst answer of each list
    metrics = {
        "loss": losses,
        "rewards/chosen": rewards[:, 0],
        "rewards/rejected": rewards.gather(1, last)[:, 0],
        "rewards/margins": margins[:, 0].gather(1, last)[:, 0],
        "rewards/accuracies": (((margins > 0) & worse).float(), worse.float()),
        "logps/chosen": logps[:, 0],
        "logps/rejected": logps.gather(1, last)[:, 0],
    }
    return losses, metrics


def main(args: Args) -> None:
    run = common.start(args, SETTINGS, __file__)
    if not args.beta > 0:
        raise common.UserError("--beta must be positive")
    common.check_reference(args.ref_model, args.soup_weight)
    tokenizer = common.load_tokenizer(args.model, args.max_length)
    train, held_out = common.load_rows(
        args.dataset, args.eval_dataset, "ranked", tokenizer, args.max_length,
        args.max_prompt_length, skip_bad_rows=args.skip_bad_rows, cache_dir=args.cache_dir,
    )  # fmt: skip
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

    # For training and for evaluation.
    def losses_of(micro: common.Micro) -> tuple[Tensor, dict[str, Tensor]]:
        logps, lengths = common.response_logps(policy, micro)  # (B, K), (B, K)
        ref_logps = micro.ref_logps.to(logps.dtype)  # (B, K)
        losses, metrics = listwise_dpo_loss(logps, ref_logps, micro.scores, args.beta)
        metrics |= {"length/chosen": lengths[:, 0], "length/response": (lengths, lengths > 0)}
        return losses, metrics

    for batch in run.batches(train):  # from where the run stands
        if run.evaluation_due:
            run.evaluate(losses_of, held_out, policy, tokenizer)
        for micro in batch:
            losses, metrics = losses_of(micro)
            # Divided by the whole step's count, over all processes.
            (losses.sum() / batch.prompts).backward()
            run.add(metrics)
        # Sums gradients over processes, clips, steps, logs, saves when due.
        run.update(policy, optimizer)
    run.evaluate(losses_of, held_out, policy, tokenizer)
    run.finish(policy, tokenizer)


if __name__ == "__main__":
    main(common.command_line(Args, __doc__))
