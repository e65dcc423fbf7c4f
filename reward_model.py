"""A reward model: which of two answers people prefer, as a number for each (Bradley-Terry).

    L(phi) = - E_(x, y_w, y_l) [ log sigmoid( r(x, y_w) - r(x, y_l) - m ) ]      Ouyang et al., equation 1, with m = 0
             + c E_(x, y_w, y_l) [ (r(x, y_w) + r(x, y_l))^2 ]                   Eisenstein et al.: centring

    Bradley and Terry 1952. Stiennon et al. 2020, arXiv 2009.01325. Ouyang et al. 2022, arXiv 2203.02155. Huang et al. 2024,
    arXiv 2403.17031 (called N+ below). Eisenstein et al. 2023, arXiv 2312.09244 (centring).

A comparison is taken for a draw: y_w wins with probability sigmoid(r_w - r_l). The model that makes this likeliest for all
comparisons is the one fine-tuned on demonstrations, with its output layer replaced by one row: r is read at the last token
of an answer, where it has all been seen. Only differences of r within a prompt are learned: the level is free, and is set
after training so that the answers of the model it began from score 0 on average.

    paper                    here
    x, (y_w, y_l)            a row: the prompt and its answers, best first; every pair of them whose scores differ
    r(x, y)                  scores, (B, K): the head at an answer's last token, less score_bias
    m                        margin
    c                        center_weight
    E                        mean over a prompt's pairs, then over the prompts of a step, on all processes

Options and departures
1. A ranked list of K answers gives all its pairs, K (K - 1) / 2 less the ties, in one row: their loss is averaged before
   the mean over prompts, as in InstructGPT, where pairs dealt to different steps made the model overfit. All K answers
   stand behind one copy of the prompt.
2. The head begins as N+ has it, normal with deviation 1 / sqrt(hidden size + 1). It has no bias, because Transformers'
   class has none; score_bias stands in config.json.
3. The level: N+ lets demonstrations average 0, here it is answers that the starting model samples (at temperature 1), to
   --zero-on prompts (where --model is a reward model, the rows' own answers): what PPO begins with then scores 0.
   --zero-on 0 sets none. Accuracy does not depend on it, PPO does.
4. An answer that was cut has no end and is scored at its last token all the same.

Healthy: the loss starts near ln 2 (0.693; above, where the fresh head's scores differ much) and falls; accuracy on held-out pairs
rises above 0.5, and what it can reach is what people agree on: 0.62 to 0.69 is published for TL;DR (1B to 6.9B), 0.7 to
0.8 elsewhere. `tiny` reaches 0.52 of 0.76: see the README. Training accuracy far above held-out accuracy is overfitting: one epoch is usual.

    python reward_model.py                                                  # the embedded task, on a laptop
    torchrun --nproc_per_node=4 reward_model.py --model runs/sft-model-gemma-2-2b   # after sft.py --model gemma-2-2b
    python reward_model.py --model runs/sft-... --dataset rows.jsonl        # {"prompt", "chosen", "rejected"}

Copyright (c) 2026 the plainpref authors. MIT licence. Tested with torch 2.13 and transformers 5.23.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

import common
import generation
import scoring

# What a flag that was left out becomes, and where the numbers are from (micro-batches are ours): by
# the last part of the model's name, in small letters; a folder that a run of ours saved has the row of
# the model it began from. A model without a row takes the first one after `tiny`, and the run says so.
SETTINGS = {
    "tiny": {
        "adam_eps": 1e-8, "lr": 5e-4, "batch_size": 16, "micro_batch_size": 16, "epochs": 1.0,
        "schedule": "cosine", "warmup_ratio": 0.05, "optimizer": "adamw", "max_grad_norm": 1.0,
        "max_length": 176, "max_prompt_length": 160, "dataset": "family", "source": "tuned here",
    },
    "pythia-1b": {  # 638 tokens are theirs, 512 of them for the prompt; they clip no gradients
        "adam_eps": 1e-5, "lr": 3e-6, "batch_size": 64, "micro_batch_size": 8, "epochs": 1.0,
        "schedule": "cosine", "warmup_ratio": 0.0, "optimizer": "adamw", "max_grad_norm": 0.0,
        "max_length": 638, "max_prompt_length": 512, "dataset": "tldr",
        "source": "Huang et al. 2024, arXiv 2403.17031",
    },
}  # fmt: skip


# fmt: off
@dataclass
class Args:
    # Reward model
    margin: float = 0.0  # by how much a preferred answer's score should be higher, 0 or more
    center_weight: float = 0.0  # weight of the squared sum of a pair's scores, which keeps them near 0; 0.01 is published
    zero_on: int = 512  # prompts whose sampled answers score 0 on average after training; 0: no level is set, one that --model had goes
    adam_eps: float | None = None  # AdamW's epsilon; default: the model's row in SETTINGS
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


def reward_model_loss(
    scores: Tensor,  # (B, K) r(x, y) of every answer
    preferences: Tensor,  # (B, K) what they are to be ordered by, higher is better; NaN: no such answer
    margin: float = 0.0,
    center_weight: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor | tuple[Tensor, Tensor]]]:
    """Returns one loss per prompt, the mean over its pairs, and what to plot: (values, weights) is a weighted mean."""
    # (B, K, K) whether i is preferred to j. No comparison with NaN is true.
    pairs = preferences[:, :, None] > preferences[:, None, :]
    share = 1 / pairs.sum((1, 2), keepdim=True).clamp(min=1).to(scores.dtype)  # (B, 1, 1)
    scores = scores.masked_fill(preferences.isnan(), 0.0)
    margins = scores[:, :, None] - scores[:, None, :]  # (B, K, K)
    sums = scores[:, :, None] + scores[:, None, :]
    each = center_weight * sums**2 - F.logsigmoid(margins - margin)  # (B, K, K)
    losses = (share * pairs * each).sum((1, 2))  # (B,)
    right = (margins > 0).to(scores.dtype) + 0.5 * (margins == 0)
    weighted = lambda x: (x * pairs, pairs)  # noqa: E731
    metrics = {
        "loss": losses,
        "rewards/chosen": weighted(scores[:, :, None].expand_as(margins)),
        "rewards/rejected": weighted(scores[:, None, :].expand_as(margins)),
        "rewards/margins": weighted(margins),
        "rewards/accuracies": weighted(right),
    }
    return losses, metrics


@torch.no_grad()
def mean_score_of_samples(
    model: torch.nn.Module, args: Args, train: common.Rows, tokenizer, run: common.Run
) -> float:
    """Of answers that the starting model gives to some of the prompts; of the rows' own, if that is a reward model."""
    reward = scoring.Reward("the model in training", tokenizer, run)
    reward.model = model
    if scoring.labels_of(args.model):
        rows = train.rows[: args.zero_on]
        prompts = [row.prompt for row in rows for _ in row.responses]
        return float(reward(prompts, [y for row in rows for y in row.responses]).mean())
    start = common.load_policy(args.model, args.dtype, run, args.attn, fsdp=args.fsdp, name="start")
    room = args.max_length - args.max_prompt_length
    most, prompts = args.max_prompt_length, [row.prompt for row in train.rows[: args.zero_on]]
    prompts = [p if len(p) <= most else common.end_of(p, most, tokenizer) for p in prompts]
    answers = generation.generate(
        start, prompts, tokenizer.stop_ids, room, 1.0, args.seed, run, label="answers to zero on"
    )
    return float(reward(prompts, answers).mean())


def main(args: Args) -> None:
    run = common.start(args, SETTINGS, __file__)
    not_negative = args.margin >= 0 and args.center_weight >= 0 and args.zero_on >= 0
    if not not_negative or not args.adam_eps > 0:
        raise common.UserError(
            "--margin, --center-weight and --zero-on must be 0 or more, --adam-eps positive"
        )
    if (labels := scoring.labels_of(args.model)) > 1:
        raise common.UserError(f"--model {args.model}: has {labels} labels, a reward model has one")
    tokenizer = common.load_tokenizer(args.model, args.max_length)
    train, held_out = common.load_rows(
        args.dataset, args.eval_dataset, "ranked", tokenizer, args.max_length,
        args.max_prompt_length, skip_bad_rows=args.skip_bad_rows, cache_dir=args.cache_dir,
    )  # fmt: skip
    run.plan(train)
    model = scoring.load_score_model(
        args.model, args.dtype, run, args.attn, args.share_prompt, args.fused_logps,
        args.fsdp, args.gradient_checkpointing, args.compile, args.lora_rank, name="model",
    )  # fmt: skip
    if not labels:
        common.warn_if_not_fine_tuned(model, tokenizer)
    scoring.give_pad_token(model, tokenizer)
    if not labels:  # a reward model goes on with its own head
        scoring.fresh_head(model, std=(model.config.hidden_size + 1) ** -0.5, seed=args.seed)
    scoring.set_score_bias(model, 0.0, common.short_name(args.model))
    optimizer = common.make_optimizer(
        model, args.optimizer, args.lr, args.weight_decay, args.adam_eps
    )
    run.restore(model, optimizer)

    # For training and for evaluation.
    def losses_of(micro: common.Micro) -> tuple[Tensor, dict[str, Tensor]]:
        scores = scoring.response_scores(model, micro)  # (B, K)
        losses, metrics = reward_model_loss(scores, micro.scores, args.margin, args.center_weight)
        answers = micro.lengths > 0
        metrics |= {"length/response": (micro.lengths, answers)}
        return losses, metrics

    for batch in run.batches(train):  # from where the run stands
        if run.evaluation_due:
            run.evaluate(losses_of, held_out, model, tokenizer)
        for micro in batch:
            losses, metrics = losses_of(micro)
            # Divided by the whole step's count, over all processes.
            (losses.sum() / batch.prompts).backward()
            run.add(metrics)
        # Sums gradients over processes, clips, steps, logs, saves when due.
        run.update(model, optimizer)
    run.evaluate(losses_of, held_out, model, tokenizer)
    if args.zero_on:
        bias = mean_score_of_samples(model, args, train, tokenizer, run)
        scoring.set_score_bias(model, bias, common.short_name(args.model))
        common.say("level", f"{bias:.4f} is subtracted: answers of the starting model score 0 now")
    run.finish(model, tokenizer)


if __name__ == "__main__":
    main(common.command_line(Args, __doc__))
