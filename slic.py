"""SLiC-HF: Sequence Likelihood Calibration with Human Feedback. Zhao, Joshi, Liu, Khalman, Saleh, Liu; 2023; arXiv 2305.10425.

    L = E_(x, y_w, y_l) [ max(0, delta - log pi(y_w|x) + log pi(y_l|x)) ]  -  lambda E [ log pi(y_ref|x) ]

A hinge: a pair teaches nothing any more once the better answer is delta nats more likely than the worse one. The second
term keeps the model near y_ref, either a demonstration or the best answer. There is no reference model.

    paper                    here
    x, y_w, y_l              a row: the prompt, its first response (chosen), its second (rejected)
    log pi(y|x)              chosen_logps, rejected_logps: sums over response tokens, end-of-sequence included
    y_ref, log pi(y_ref|x)   target_logps, a sum too; --regularise-on best: the chosen answer; target: the row's column `target`
    lambda                   target_weight
    E                        mean over the pairs of a step, on all processes

Options and departures
1. Pairs as they are given are the paper's SLiC-HF-direct. Its better SLiC-HF-sample-rank draws them from the fine-tuned
   model and ranks them with a model of human feedback; such are the embedded task's.
2. --beta: a factor on the log-probs inside the hinge, which then closes at delta/beta nats and pulls beta times as hard, so
   that lambda weighs 1/beta as much again beside it. The paper has 1. The master's thesis of SETTINGS has 0.1 (10 nats),
   and weight 1 on a mean over tokens, which is 1/27 of our sum for its summaries of 27 tokens.
3. --reference-normalised (SLiC-DPO, in the thesis): the hinge compares implicit rewards, beta log pi/ref, instead of
   beta log pi. RSO (arXiv 2309.06657) calls this hinge-norm. The regulariser stays as it is.
4. Of a ranked list, y_ref is the better one of each pair that --pairs makes of it: the best of the list with best-worst.

Healthy: active (the share of pairs inside the margin) falls (`tiny`: 0.86 to 0.70); at 0 the regulariser alone would train.
rewards/accuracies begins at the share of pairs that the model ranks right already and rises (0.61 to 0.69). Without a
reference, rewards/chosen is beta log pi. Growing length is the known failure of -direct: lower --lr, raise --target-weight.

    python slic.py                                                          # the embedded task, on a laptop
    torchrun --nproc_per_node=4 slic.py --model runs/sft-model-gemma-2-2b   # after sft.py --model gemma-2-2b
    python slic.py --model runs/sft-... --dataset rows.jsonl                # {"prompt", "chosen", "rejected"}, and "target" where asked for

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
THESIS = {  # a batch of 64 to 128; target_weight is converted, see 2 above
    "beta": 0.1, "delta": 1.0, "target_weight": 0.04, "lr": 1e-7, "batch_size": 64, "micro_batch_size": 4, "epochs": 3.0,
    "schedule": "cosine", "warmup_ratio": 0.1, "optimizer": "rmsprop", "max_grad_norm": 1.0,
    "max_length": 2048, "max_prompt_length": 1024, "dataset": "tldr",
    "source": "the MSc thesis at github.com/martimfasantos/MSc-Thesis",
}  # fmt: skip
SETTINGS = {
    "tiny": {
        "beta": 1.0, "delta": 5.0, "target_weight": 0.1, "lr": 4e-4, "batch_size": 16, "micro_batch_size": 16, "max_steps": 300,
        "schedule": "linear", "warmup_ratio": 0.05, "optimizer": "adamw", "max_grad_norm": 1.0,
        "max_length": 160, "max_prompt_length": 128, "dataset": "family", "source": "tuned here",
    },
    "t5-large": {  # an encoder-decoder, which does not run here: for models without a row. delta, lr and batch are the
        # paper's, lambda that of HALOs, the rest ours, as for TL;DR in dpo.py
        "beta": 1.0, "delta": 1.0, "target_weight": 0.1, "lr": 1e-5, "batch_size": 32, "micro_batch_size": 8, "epochs": 1.0,
        "schedule": "constant", "warmup_ratio": 0.1, "optimizer": "adamw", "max_grad_norm": 10.0,
        "max_length": 512, "max_prompt_length": 256, "dataset": "tldr",
        "source": "delta, lr, batch: Zhao et al. 2023; lambda: github.com/ContextualAI/HALOs; the rest is ours",
    },
    "gemma-2-2b": THESIS, "tinyllama": THESIS, "eurollm-1.7b": THESIS,
}  # fmt: skip


# fmt: off
@dataclass
class Args:
    # SLiC
    beta: float | None = None  # factor on the log-probs inside the hinge, per nat; default: the model's row in SETTINGS
    delta: float | None = None  # margin of the hinge, 0 or more; default: SETTINGS
    target_weight: float | None = None  # lambda, weight of the regulariser, 0 or more; default: SETTINGS
    regularise_on: Literal["best", "target"] = "best"  # y_ref: the chosen answer, or the row's column `target`
    reference_normalised: bool = False  # SLiC-DPO: the hinge compares log-probs less those of the reference
    # The reference
    ref_model: str | None = None  # reference model, or a soup a+b of two; default: the policy before its first step
    soup_weight: float = 0.5  # weight of the first model of a soup, in [0, 1]
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


def slic_loss(
    chosen_logps: Tensor,  # (B,) log pi(y_w | x), summed over response tokens
    rejected_logps: Tensor,  # (B,) log pi(y_l | x)
    target_logps: Tensor,  # (B,) log pi(y_ref | x)
    ref_chosen_logps: Tensor | float,  # (B,) under the frozen reference; 0 in the paper
    ref_rejected_logps: Tensor | float,  # (B,)
    beta: float,
    delta: float,
    target_weight: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Both terms. Returns one loss per pair, and what to plot (one value per pair)."""
    chosen_rewards = beta * (chosen_logps - ref_chosen_logps)  # (B,)
    rejected_rewards = beta * (rejected_logps - ref_rejected_logps)  # (B,)
    margins = chosen_rewards - rejected_rewards  # (B,)
    hinges = F.relu(delta - margins)
    losses = hinges - target_weight * target_logps
    metrics = {
        "loss": losses,
        "hinge_loss": hinges,
        "active": (margins < delta).float(),
        "rewards/chosen": chosen_rewards,
        "rewards/rejected": rejected_rewards,
        "rewards/margins": margins,
        "rewards/accuracies": (margins > 0).float(),
        "logps/chosen": chosen_logps,
        "logps/rejected": rejected_logps,
        "logps/target": target_logps,
    }
    return losses, metrics


def main(args: Args) -> None:
    run = common.start(args, SETTINGS, __file__)
    if not args.beta > 0 or not args.delta >= 0 or not args.target_weight >= 0:
        raise common.UserError("--beta must be positive, --delta and --target-weight 0 or more")
    if args.ref_model and not args.reference_normalised:
        raise common.UserError("--ref-model needs --reference-normalised")
    common.check_reference(args.ref_model, args.soup_weight)
    tokenizer = common.load_tokenizer(args.model, args.max_length)
    train, held_out = common.load_rows(
        args.dataset, args.eval_dataset, "pair", tokenizer, args.max_length,
        args.max_prompt_length, args.pairs, args.skip_bad_rows, cache_dir=args.cache_dir,
        targets=args.regularise_on == "target",
    )  # fmt: skip
    run.plan(train)
    policy = common.load_policy(
        args.model, args.dtype, run, args.attn, args.share_prompt, args.fused_logps,
        args.fsdp, args.gradient_checkpointing, args.compile, args.lora_rank,
    )  # fmt: skip
    common.warn_if_not_fine_tuned(policy, tokenizer)
    if args.reference_normalised:
        common.add_reference_logps(
            run, train, held_out, policy, args.ref_model, args.soup_weight, args.cache_dir
        )
    optimizer = common.make_optimizer(policy, args.optimizer, args.lr, args.weight_decay)
    run.restore(policy, optimizer)

    # For training and for evaluation.
    def losses_of(micro: common.Micro) -> tuple[Tensor, dict[str, Tensor]]:
        logps, lengths = common.response_logps(policy, micro)  # (B, K), (B, K): K is 3 with targets
        target_logps = logps[:, -1 if args.regularise_on == "target" else 0]  # (B,)
        ref_logps = (0.0, 0.0)
        if args.reference_normalised:
            ref_logps = micro.ref_logps[:, :2].to(logps.dtype).unbind(1)
        losses, metrics = slic_loss(
            logps[:, 0], logps[:, 1], target_logps, *ref_logps,
            args.beta, args.delta, args.target_weight,
        )  # fmt: skip
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
