"""SFT: supervised fine-tuning on demonstrations, the starting point of preference learning.

    L = - (1/N) sum over target tokens  log pi(token | everything before it),     N: target tokens of the whole step

The targets are the tokens of the response, end-of-sequence included; the prompt is only read. N is counted over all
micro-batches and processes: a mean of micro-batch means would give the tokens of short responses more weight
(Hugging Face TRL, issue 2175).

    paper                    code
    log pi(token | ...)      response_logps has its sum over a response
    N                        step.num_response_tokens

Options
1. --train-on-prompt makes the prompt's tokens targets too (all but the first), like the TL;DR models of Huang et al. 2024 (arXiv
   2403.17031). `tiny` needs it: names recur throughout a description, so reading it teaches the model to look names up.
2. In a dialogue (`messages`) the last answer is the response, and everything before it is the prompt.

Healthy: the loss falls fast, then slowly, with held-out rows slightly above. Below 0.5 on real text the model memorises.

    python sft.py                                                           # trains `tiny` again from random weights
    torchrun --nproc_per_node=4 sft.py --model gemma-2-2b                   # a base model, on 4 GPUs
    python sft.py --model gemma-2-2b --dataset rows.jsonl                   # {"prompt", "completion"}

Copyright (c) 2026 the plainpref authors. MIT licence. Tested with torch 2.13 and transformers 5.23.
"""

from dataclasses import dataclass
from typing import Literal

import torch

import common


@dataclass
class Args(common.Args):  # defaults: the thesis'; data, hardware and output: common.Args
    model: str = "tiny-untrained"  # tiny-untrained, a short name, a Hugging Face id, or a folder
    train_on_prompt: bool = False  # the prompt's tokens are targets too
    max_length: int = 2048  # tokens of prompt and response together
    max_prompt_length: int = 1024  # tokens kept of the prompt if the row is too long
    lr: float = 1e-5  # peak learning rate
    batch_size: int = 32  # demonstrations per optimizer step, over all processes
    micro_batch_size: int = 4  # demonstrations per forward pass; lowered to divide the batch
    schedule: Literal["constant", "linear", "cosine", "inverse-sqrt"] = "cosine"  # after warm-up


# What differs from the defaults, by model (or the model that a checkpoint was trained from). The
# defaults: github.com/martimfasantos/MSc-Thesis (per GPU 1 row, 16 to 32 steps of accumulation).
PRESETS = {
    "tiny": dict(  # tuned here
        train_on_prompt=True, lr=2e-3, batch_size=16, micro_batch_size=16, epochs=3.0,
        warmup_ratio=0.02, max_length=320, max_prompt_length=240, dataset="family",
    ),
    "pythia-1b": dict(  # Huang et al. 2024, arXiv 2403.17031
        train_on_prompt=True, lr=3e-6, batch_size=128, micro_batch_size=8, warmup_ratio=0.0,
        max_length=565, max_prompt_length=512, dataset="tldr",
    ),
    "gemma-2-2b": dict(dataset="tldr"),  # the thesis
    "tinyllama": dict(dataset="tldr"),
    "eurollm-1.7b": dict(dataset="tldr"),
}  # fmt: skip


def sft_loss(
    response_logps: torch.Tensor,  # (B,) log pi(y | x), summed over response tokens
    response_lengths: torch.Tensor,  # (B,) number of response tokens
) -> tuple[torch.Tensor, dict[str, torch.Tensor | tuple[torch.Tensor, torch.Tensor]]]:
    """Returns one loss per demonstration, a sum, and the metrics: values, or (values, weights)."""
    losses = -response_logps  # (B,) nats per response
    metrics = {
        "loss": (losses, response_lengths),  # nats per token
        "logps/response": response_logps,
        "length/response": response_lengths,
    }
    return losses, metrics


def main(args: Args) -> None:
    run = common.Run(args)
    tokenizer = common.load_tokenizer(args.model, args.max_length)
    train, held_out = common.load_rows(
        args, tokenizer, kind="demonstration", whole_text=args.train_on_prompt
    )
    run.plan(train)
    policy = common.load_policy(args, run)
    optimizer, scheduler = common.make_optimizer(policy, args, run)
    run.restore(policy, optimizer, scheduler)

    def losses_of(batch: common.MicroBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        logps = common.response_logps(policy, batch)  # (B, 1)
        return sft_loss(logps[:, 0], batch.lengths[:, 0])

    for step in run.steps(train):  # continues from the last checkpoint
        if run.evaluation_due:
            run.evaluate(losses_of, held_out, tokenizer)
        for batch in step.micro_batches:
            losses, metrics = losses_of(batch)
            (losses.sum() / step.num_response_tokens).backward()  # over all processes
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
