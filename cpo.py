"""CPO: Contrastive Preference Optimization. Xu, Sharaf, Chen, Tan, Shen, Van Durme, Murray, Kim; 2024; arXiv 2401.08417.

    L = - E_(x, y_w, y_l) [ log sigmoid( beta log pi(y_w|x)  -  beta log pi(y_l|x) ) ]  +  nll_weight * NLL(y_w)

DPO's loss with a uniform reference model, which cancels: no second model, and no second forward pass. Nothing then says how
far the policy may drift, so the second term keeps it writing what was preferred: NLL is the mean over response tokens of
-log pi(token | everything before it), on the chosen answers. The paper gives the two terms equal weight.

    paper                    here
    x, y_w, y_l              a row: the prompt, its first response (chosen), its second (rejected)
    log pi(y|x)              chosen_logps, rejected_logps: sums over response tokens, end-of-sequence included
    NLL(y_w)                 nll: -chosen_logps divided by mean_length, the mean number of tokens of a chosen answer
    E                        mean over the pairs of a step, on all processes

Options and departures
1. The paper writes NLL as -log pi(y_w|x), a sum; its code takes the mean over tokens, and so do we. The mean is over all
   chosen tokens of the optimizer step: a mean of micro-batch means would give a short answer's tokens more weight.
2. The paper went on training ALMA-13B's own adapters, of rank 16 on down_proj alone, with weight decay 0.01. The row
   alma-13b makes new ones on every linear layer; add --weight-decay 0.01, which a row cannot set.
3. `tiny` weighs NLL with 0.05: with 1, its choices being noisy, the sampled reward rose by 0.03 instead of 0.14.

Healthy: rewards/accuracies begins at the share of pairs that the model ranks right already and rises (`tiny`: 0.61 to 0.70);
margins rise. nll_loss falls or stays with weight 1, and rises with a small one (`tiny`: 0.86 to 1.5); much more is drift:
raise --nll-weight, lower --lr. A long answer has a large sum, and so a large say in the first term.

    python cpo.py                                                           # the embedded task, on a laptop
    torchrun --nproc_per_node=4 cpo.py --model runs/sft-model-gemma-2-2b    # after sft.py --model gemma-2-2b
    python cpo.py --model runs/sft-... --dataset rows.jsonl                 # {"prompt", "chosen", "rejected"}

Copyright (c) 2026 the plainpref authors. MIT licence. Tested with torch 2.13 and transformers 5.23.
"""

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

import common

# What a flag that was left out becomes, and where the numbers are from (micro-batches are ours): by
# the last part of the model's name, in small letters; a folder that a run of ours saved has the row of
# the model it began from. A model without a row takes the first one after `tiny`, and the run says so.
THESIS = {  # a batch of 64 to 128
    "beta": 0.1, "nll_weight": 1.0, "lr": 1e-7, "batch_size": 64, "micro_batch_size": 4, "epochs": 3.0,
    "schedule": "cosine", "warmup_ratio": 0.1, "optimizer": "rmsprop", "max_grad_norm": 1.0,
    "max_length": 2048, "max_prompt_length": 1024, "dataset": "tldr",
    "source": "the MSc thesis at github.com/martimfasantos/MSc-Thesis",
}  # fmt: skip
SETTINGS = {
    "tiny": {
        "beta": 0.1, "nll_weight": 0.05, "lr": 6e-4, "batch_size": 16, "micro_batch_size": 16, "max_steps": 300,
        "schedule": "linear", "warmup_ratio": 0.05, "optimizer": "adamw", "max_grad_norm": 1.0,
        "max_length": 160, "max_prompt_length": 128, "dataset": "family", "source": "tuned here",
    },
    "gemma-2-2b": THESIS, "tinyllama": THESIS, "eurollm-1.7b": THESIS,
    "alma-13b": {
        "beta": 0.1, "nll_weight": 1.0, "lr": 1e-4, "batch_size": 128, "micro_batch_size": 4, "epochs": 1.0,
        "schedule": "inverse-sqrt", "warmup_ratio": 0.01, "optimizer": "adamw", "max_grad_norm": 1.0,
        "max_length": 512, "max_prompt_length": 256, "lora_rank": 16, "dataset": "alma-r",
        "source": "Xu et al. 2024 and their code, github.com/fe1ixxu/ALMA",
    },
}  # fmt: skip


# fmt: off
@dataclass
class Args:
    # CPO
    beta: float | None = None  # factor on the log-probs in the preference term, per nat; default: the model's row in SETTINGS
    nll_weight: float | None = None  # weight of the mean NLL of the chosen answers' tokens, 0 or more; default: SETTINGS
    # Model and data
    model: str = "tiny"  # tiny, a short name (gemma-2-2b, ...), a Hugging Face id, or a folder such as runs/sft
    dataset: str | None = None  # family, a short name (tldr, ultrafeedback, hh, ...), a file or folder (.jsonl .json .parquet .csv), a hub id[:config][:split], or name=PATH for a copy; default: SETTINGS
    eval_dataset: str | None = None  # held-out rows; default: the dataset's own test split, else a twentieth of it
    pairs: Literal["best-worst", "adjacent", "all"] = "best-worst"  # how a ranked list becomes pairs
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


def cpo_loss(
    chosen_logps: Tensor,  # (B,) log pi(y_w | x), summed over response tokens
    rejected_logps: Tensor,  # (B,) log pi(y_l | x)
    mean_length: float,  # tokens of a chosen answer, mean over the whole step (or all held-out rows)
    beta: float,
    nll_weight: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The sum of both terms. Returns one loss per pair, and what to plot (one value per pair)."""
    chosen_rewards = beta * chosen_logps  # (B,)
    rejected_rewards = beta * rejected_logps  # (B,)
    margins = chosen_rewards - rejected_rewards  # (B,)
    nll = -chosen_logps / mean_length  # (B,) its mean over pairs is the step's mean over tokens
    losses = -F.logsigmoid(margins) + nll_weight * nll
    metrics = {
        "loss": losses,
        "nll_loss": nll,
        "rewards/chosen": chosen_rewards,
        "rewards/rejected": rejected_rewards,
        "rewards/margins": margins,
        "rewards/accuracies": (margins > 0).float(),
        "logps/chosen": chosen_logps,
        "logps/rejected": rejected_logps,
    }
    return losses, metrics


def main(args: Args) -> None:
    run = common.start(args, SETTINGS, __file__)
    if not args.beta > 0 or not args.nll_weight >= 0:
        raise common.UserError("--beta must be positive, --nll-weight 0 or more")
    tokenizer = common.load_tokenizer(args.model, args.max_length)
    train, held_out = common.load_rows(
        args.dataset, args.eval_dataset, "pair", tokenizer, args.max_length,
        args.max_prompt_length, args.pairs, args.skip_bad_rows, cache_dir=args.cache_dir,
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
        logps, lengths = common.response_logps(policy, micro)  # (B, 2), (B, 2)
        losses, metrics = cpo_loss(*logps.unbind(1), micro.mean_length, args.beta, args.nll_weight)
        metrics |= {"length/chosen": lengths[:, 0], "length/rejected": lengths[:, 1]}
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
