"""PRO: Preference Ranking Optimization. Song, Yu, Li, Yu, Huang, Li, Wang; 2023; arXiv 2306.17492.

    L   = E_(x, y_1 > ... > y_n) [ sum over k < n of L_k  +  w (n-1)^2 (- log pi(y_1|x)) ]
    L_k = - log( exp(T_k s_k) / ( exp(T_k s_k) + sum over i > k of exp(T_ki s_i) ) )
    s_i = log pi(y_i|x) / |y_i|,        T_ki = r_k - r_i,        T_k = max over i > k of T_ki

A chain of choices: the best answer against all others, then the second against those below it, and so on, each a softmax
over what the policy thinks of an answer, its mean log-prob a token. The gap of two scores (r) multiplies what is compared,
an inverse temperature. Within a choice, y_i is pushed down with a weight of T exp(T s_i), which is largest where T|s| is 1,
so a wider gap pushes less, and a choice counts as learnt the sooner the larger T is. The unit of the scores matters:
see --score-scale. The last term is SFT on the best answer, with (n-1)^2 as the chain grows. There is no reference model.

    paper                    here
    x, y_1 ... y_n           a row: the prompt and its responses, sorted best first by their scores; lists may differ in length
    r_i                      scores; NaN where a list is shorter than the longest one beside it
    s_i                      mean_logps: means over response tokens, end-of-sequence included
    T_ki, T_k                temperatures[k, i]; own[k]. The paper writes 1/T: its temperatures divide
    w                        sft_weight; its log pi(y_1|x) is a sum over tokens, as in the authors' code
    E                        mean over the lists of a step, on all processes; the sum over k is a sum

Options and departures
1. Ties: answers with equal scores are not compared; each is compared with those below. In the authors' code a tied
   answer has temperature 0, so that it adds a constant exp(0) to the sum and gets no gradient.
2. L_k is computed as logsumexp(0, T_ki s_i - T_k s_k). The authors' log(1e-10 + ...) of plain exponentials is a constant when
   T s falls below -23: worse answers then get no gradient, and the better one all of T_k, however well they are ordered.
3. --no-score-temperatures: all temperatures 1, the paper's variant without scores. Pairs become lists of two with the
   scores 1 and 0: the same, at --score-scale 1. `tiny` scales scores by 0.03 (its gaps are up to 18) and has a small w: with
   w 0.05 and the scores as they are, its sampled reward did not rise (0.304 from 0.319), greedy by 0.08.
4. The authors score the end of a sequence only where padding follows. Here every answer that was not cut ends with it.
5. The authors rank hh, and answers of other models to it, with a reward model. The set `hh` here has its human pairs: lists of
   two, scores 1 and 0. alma-r has lists of three; your own file may have any. Their AdamW also decays weights by 0.01.

Healthy: watch chain_loss, which begins near log n! (equal s, temperatures 1 or small) and falls, and rewards/accuracies (the share of a list's ordered
pairs in the right order; `tiny`: 0.58 to 0.63). On long answers `loss` is mostly the SFT term, a sum over tokens.
rewards/chosen and /rejected are s of the best and of the worst. Where logps/chosen falls far, raise --sft-weight.

    python pro.py                                                           # the embedded task, on a laptop
    torchrun --nproc_per_node=4 pro.py --model runs/sft-model-gemma-2-2b --dataset tldr   # after sft.py --model gemma-2-2b
    python pro.py --model runs/sft-... --dataset rows.jsonl                 # {"prompt", "responses", "scores"}

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
        "sft_weight": 0.002, "score_scale": 0.03, "lr": 3e-4, "batch_size": 16, "micro_batch_size": 16, "max_steps": 300,
        "schedule": "linear", "warmup_ratio": 0.05, "optimizer": "adamw", "max_grad_norm": 1.0,
        "max_length": 160, "max_prompt_length": 128, "dataset": "family", "source": "tuned here",
    },
    "llama-7b": {  # 7 GPUs x 2 x 8 steps of accumulation
        "sft_weight": 0.05, "score_scale": 1.0, "lr": 5e-6, "batch_size": 112, "micro_batch_size": 2, "epochs": 2.0,
        "schedule": "constant", "warmup_ratio": 0.0, "optimizer": "adamw", "max_grad_norm": 1.0,
        "max_length": 512, "max_prompt_length": 384, "dataset": "hh",
        "source": "Song et al. 2023 and their code, github.com/AlibabaResearch/DAMO-ConvAI; their lists are scored by a reward model",
    },
}  # fmt: skip


# fmt: off
@dataclass
class Args:
    # PRO
    sft_weight: float | None = None  # w, weight of the SFT term, 0 or more; default: the model's row in SETTINGS
    score_temperatures: bool = True  # gaps of the scores are the temperatures; off: all are 1
    score_scale: float | None = None  # scores are multiplied by this before temperatures are made of them; default: SETTINGS
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


def pro_loss(
    logps: Tensor,  # (B, K) log pi(y_i | x), summed over response tokens
    lengths: Tensor,  # (B, K) how many tokens that were
    scores: Tensor,  # (B, K) higher is better, best first; NaN: the list is shorter
    sft_weight: float,
    score_temperatures: bool = True,
) -> tuple[Tensor, dict[str, Tensor | tuple[Tensor, Tensor]]]:
    """The chain and the SFT term. Returns one loss per list, and what to plot: (values, weights) is a weighted mean."""
    mean_logps = logps / lengths.clamp(min=1)  # (B, K) s_i
    gaps = scores[:, :, None] - scores[:, None, :]  # (B, K, K) r_k - r_i
    worse = gaps > 0  # (B, K, K) r_i < r_k; never so where a score is NaN
    temperatures = torch.where(worse, gaps if score_temperatures else 1.0, 0.0)  # (B, K, K) T_ki
    temperatures = temperatures.to(logps.dtype)
    own = temperatures.amax(-1)  # (B, K) T_k
    # What each worse answer has over the k-th one: T_ki s_i - T_k s_k.
    ahead = temperatures * mean_logps[:, None, :] - (own * mean_logps)[:, :, None]  # (B, K, K)
    ahead = ahead.masked_fill(~worse, -torch.inf)
    chain = torch.logsumexp(F.pad(ahead, (1, 0)), -1).sum(-1)  # (B,) L_k, 0 where nothing is worse
    many = (~scores.isnan()).sum(-1)  # (B,) n
    losses = chain - sft_weight * ((many - 1) ** 2 * logps[:, 0])
    margins = mean_logps[:, :, None] - mean_logps[:, None, :]  # (B, K, K) s_k - s_i
    last = (many - 1)[:, None]  # (B, 1) the worst answer of each list
    metrics = {
        "loss": losses,
        "chain_loss": chain,
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
    if not args.sft_weight >= 0 or not args.score_scale > 0:
        raise common.UserError("--sft-weight must be 0 or more, --score-scale positive")
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
        losses, metrics = pro_loss(
            logps,
            lengths,
            args.score_scale * micro.scores,
            args.sft_weight,
            args.score_temperatures,
        )
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
