"""RRHF: Rank Responses to align language models with Human Feedback. Yuan, Yuan, Tan, Wang, Huang, Huang; 2023; arXiv 2304.05302.

    L      = E_(x, y_1 ... y_n) [ L_rank  +  w L_ft ]
    L_rank = sum over r_i < r_j of max(0, p_i - p_j),        p_i = log pi(y_i|x) / |y_i|
    L_ft   = - log pi(y_best|x)

The policy itself scores the answers to a prompt, whoever wrote them: with what it thinks of each, its mean log-prob a token.
These scores shall stand in the order of the rewards, and a pair that does not costs as much as it is wrong by. L_ft is SFT on
the best answer. There is no reference model, no temperature, no margin: of the rewards only the order counts.

    paper                    here
    x, y_1 ... y_n           a row: the prompt and its responses, sorted best first by their scores; lists may differ in length
    r_i                      scores; NaN where a list is shorter than the longest one beside it
    p_i                      mean_logps: means over response tokens, end-of-sequence included
    w                        sft_weight, 1 in the paper; its log pi(y_best|x) is a sum over tokens
    E                        mean over the lists of a step, on all processes; the sum over pairs is a sum

Options and departures
1. --margin m: a pair costs max(0, m + p_i - p_j). The paper has none, and its row of SETTINGS neither. Equal is in order, and
   a flat policy finds all answers equal: down there the hinge leads, and only L_ft holds against it. On `tiny` (sampled reward
   0.319, greedy 0.367 at the start) without a margin w = 0.02 flattens it (0.009, 0.269), the paper's w = 1 leaves samples as
   they are (0.318, 0.450). With margins of 1, 2, 4 nats a token, and w = 0.1, 0.3, 0.1: 0.352, 0.439, 0.502 (0.533, 0.529, 0.522).
2. Ties are no pair. Of equal best ones the first is learned.
3. The authors' code has L_ft as a mean over the places of the padded rows, the prompt's included, and a weight on L_rank, 1 in
   its train.sh: there w is one over the number of places, which may be 192. In the paper's equation L_ft is a sum.
4. The authors rank six answers, four of them sampled, with a reward model. The set `hh` here has its human pairs: lists of two,
   scores 1 and 0. alma-r has lists of three; your own file may have any.

Healthy: rank_loss falls while rewards/chosen (p of the best answer) falls no further than rewards/rejected; `tiny`: from -0.9 and -1.3 to
-2.1 and -3.4. rewards/accuracies (the share of a list's ordered pairs in the right order) rises; `tiny`: 0.58 to 0.63. A rank_loss
that falls while rewards/margins shrinks is the flat policy of departure 1: raise --sft-weight, or give a --margin.

    python rrhf.py                                                          # the embedded task, on a laptop
    torchrun --nproc_per_node=4 rrhf.py --model runs/sft-model-gemma-2-2b --dataset tldr  # after sft.py --model gemma-2-2b
    python rrhf.py --model runs/sft-... --dataset rows.jsonl                # {"prompt", "responses", "scores"}

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
SETTINGS = {
    "tiny": {
        "sft_weight": 0.1, "margin": 4.0, "lr": 3e-4, "batch_size": 16, "micro_batch_size": 16, "max_steps": 300,
        "schedule": "linear", "warmup_ratio": 0.05, "optimizer": "adamw", "max_grad_norm": 1.0,
        "max_length": 160, "max_prompt_length": 128, "dataset": "family", "source": "tuned here",
    },
    "llama-7b": {  # 8 GPUs x 1 x 8 steps of accumulation
        "sft_weight": 1.0, "margin": 0.0, "lr": 2e-5, "batch_size": 64, "micro_batch_size": 1, "epochs": 3.0,
        "schedule": "cosine", "warmup_ratio": 0.03, "optimizer": "adamw", "max_grad_norm": 1.0,
        "max_length": 192, "max_prompt_length": 128, "dataset": "hh",
        "source": "Yuan et al. 2023 and their code, github.com/GanjinZero/RRHF; their lists of six are scored by a reward model",
    },
}  # fmt: skip


# fmt: off
@dataclass
class Args:
    # RRHF
    sft_weight: float | None = None  # w, weight of the SFT term, 0 or more; default: the model's row in SETTINGS
    margin: float | None = None  # nats a token by which a better answer shall lead, 0 or more; the paper: 0; default: SETTINGS
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


def rrhf_loss(
    logps: Tensor,  # (B, K) log pi(y_i | x), summed over response tokens
    lengths: Tensor,  # (B, K) how many tokens that were
    scores: Tensor,  # (B, K) higher is better, best first; NaN: the list is shorter
    sft_weight: float,
    margin: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor | tuple[Tensor, Tensor]]]:
    """The ranking and the SFT term. Returns one loss per list, and what to plot: (values, weights) is a weighted mean."""
    mean_logps = logps / lengths.clamp(min=1)  # (B, K) p_i
    # r_i < r_j, for j down and i across; never so where a score is NaN.
    worse = scores[:, :, None] > scores[:, None, :]  # (B, K, K)
    margins = mean_logps[:, :, None] - mean_logps[:, None, :]  # (B, K, K) p_j - p_i
    ranking = torch.where(worse, F.relu(margin - margins), 0.0).sum((1, 2))  # (B,) L_rank
    losses = ranking - sft_weight * logps[:, 0]
    last = ((~scores.isnan()).sum(-1) - 1)[:, None]  # (B, 1) the worst answer of each list
    metrics = {
        "loss": losses,
        "rank_loss": ranking,
        "rewards/chosen": mean_logps[:, 0],
        "rewards/rejected": mean_logps.gather(1, last)[:, 0],
        "rewards/margins": margins[:, 0].gather(1, last)[:, 0],
        "rewards/accuracies": (((margins > 0) & worse).float(), worse.float()),
        "logps/chosen": logps[:, 0],
        "logps/rejected": logps.gather(1, last)[:, 0],
    }
    return losses, metrics


def main(args: Args) -> None:
    run = common.start(args, SETTINGS, __file__)
    if not args.sft_weight >= 0 or not args.margin >= 0:
        raise common.UserError("--sft-weight and --margin must be 0 or more")
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
    optimizer = common.make_optimizer(policy, args.optimizer, args.lr, args.weight_decay)
    run.restore(policy, optimizer)

    # For training and for evaluation.
    def losses_of(micro: common.Micro) -> tuple[Tensor, dict[str, Tensor]]:
        logps, lengths = common.response_logps(policy, micro)  # (B, K), (B, K)
        losses, metrics = rrhf_loss(logps, lengths, micro.scores, args.sft_weight, args.margin)
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
