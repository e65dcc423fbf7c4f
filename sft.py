"""SFT: supervised fine-tuning on demonstrations, what preference learning starts from.

    L = - (1/N) sum over target tokens  log pi(token | everything before it),     N: target tokens of the whole step

Targets are the tokens of the response, end-of-sequence included; the prompt is read but not learnt. N is counted over
all micro-batches and processes: a mean of micro-batch means would give a short response's tokens more weight
(Hugging Face TRL, issue 2175).

    paper                    here
    log pi(token | ...)      response_logps sums it over a response
    N                        batch.response_tokens

Options and departures
1. --train-on-prompt counts the prompt's tokens as targets too (all but the first), as the TL;DR models of Huang et al.
   2024 (arXiv 2403.17031) do. `tiny` needs it: names recur all over a description, which teaches to look them up.
2. In a dialogue (`messages`) the last answer is the response, all before it the prompt.

Healthy: the loss falls fast, then slowly; held-out rows a little above; below 0.5 on real text is memory, not skill.

    python sft.py                                                           # makes `tiny` again from random weights
    torchrun --nproc_per_node=4 sft.py --model gemma-2-2b                   # a base model, on 4 GPUs
    python sft.py --model gemma-2-2b --dataset rows.jsonl                   # {"prompt", "completion"}

Copyright (c) 2026 the plainpref authors. MIT licence. Tested with torch 2.13 and transformers 5.23.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

import common

# What a flag that was left out becomes, and where the numbers are from (micro-batches are ours): by
# the last part of the model's name, in small letters; a folder that a run of ours saved has the row of
# the model it began from. A model without a row takes the first one after `tiny`, and the run says so.
THESIS = {  # 32 of "1 a device, 16 to 32 times"
    "train_on_prompt": False, "lr": 1e-5, "batch_size": 32, "micro_batch_size": 4, "epochs": 1.0,
    "schedule": "cosine", "warmup_ratio": 0.1, "optimizer": "adamw", "max_grad_norm": 1.0,
    "max_length": 2048, "max_prompt_length": 1024, "dataset": "tldr",
    "source": "the MSc thesis at github.com/martimfasantos/MSc-Thesis",
}  # fmt: skip
SETTINGS = {
    "tiny": {
        "train_on_prompt": True, "lr": 2e-3, "batch_size": 16, "micro_batch_size": 16, "epochs": 3.0,
        "schedule": "cosine", "warmup_ratio": 0.02, "optimizer": "adamw", "max_grad_norm": 1.0,
        "max_length": 320, "max_prompt_length": 240, "dataset": "family", "source": "tuned here",
    },
    "pythia-1b": {
        "train_on_prompt": True, "lr": 3e-6, "batch_size": 128, "micro_batch_size": 8, "epochs": 1.0,
        "schedule": "cosine", "warmup_ratio": 0.0, "optimizer": "adamw", "max_grad_norm": 1.0,
        "max_length": 565, "max_prompt_length": 512, "dataset": "tldr",
        "source": "Huang et al. 2024, arXiv 2403.17031",
    },
    "gemma-2-2b": THESIS, "tinyllama": THESIS, "eurollm-1.7b": THESIS,
}  # fmt: skip


# fmt: off
@dataclass
class Args:
    # SFT
    train_on_prompt: bool | None = None  # the prompt's tokens are targets too; default: the model's row in SETTINGS
    # Model and data
    model: str = "tiny-untrained"  # tiny-untrained, a short name (gemma-2-2b, ...), a Hugging Face id, or a folder
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


def sft_loss(
    response_logps: Tensor,  # (B,) log pi(y | x), summed over response tokens
    response_lengths: Tensor,  # (B,) how many tokens that were
) -> tuple[Tensor, dict[str, Tensor | tuple[Tensor, Tensor]]]:
    """One sum of negative log-probs per demonstration, and what to plot: (values, weights) is a weighted mean."""
    losses = -response_logps  # (B,) nats a response
    metrics = {
        "loss": (losses, response_lengths),  # nats a token
        "logps/response": response_logps,
        "length/response": response_lengths,
    }
    return losses, metrics


def main(args: Args) -> None:
    run = common.start(args, SETTINGS, __file__)
    tokenizer = common.load_tokenizer(args.model, args.max_length)
    train, held_out = common.load_rows(
        args.dataset, args.eval_dataset, "demonstration", tokenizer, args.max_length,
        args.max_prompt_length, skip_bad_rows=args.skip_bad_rows, prompt_too=args.train_on_prompt,
        cache_dir=args.cache_dir,
    )  # fmt: skip
    run.plan(train)
    policy = common.load_policy(
        args.model, args.dtype, run, args.attn, False, args.fused_logps,
        args.fsdp, args.gradient_checkpointing, args.compile, args.lora_rank,
    )  # fmt: skip
    optimizer = common.make_optimizer(policy, args.optimizer, args.lr, args.weight_decay)
    run.restore(policy, optimizer)

    # For training and for evaluation.
    def losses_of(micro: common.Micro) -> tuple[Tensor, dict[str, Tensor]]:
        logps, lengths = common.response_logps(policy, micro)  # (B, 1), (B, 1)
        return sft_loss(logps[:, 0], lengths[:, 0])

    for batch in run.batches(train):  # from where the run stands
        if run.evaluation_due:
            run.evaluate(losses_of, held_out, policy, tokenizer)
        for micro in batch:
            losses, metrics = losses_of(micro)
            # Divided by the whole step's count, over all processes.
            (losses.sum() / batch.response_tokens).backward()
            run.add(metrics)
        # Sums gradients over processes, clips, steps, logs, saves when due.
        run.update(policy, optimizer)
    run.evaluate(losses_of, held_out, policy, tokenizer)
    run.finish(policy, tokenizer)


if __name__ == "__main__":
    main(common.command_line(Args, __doc__))
