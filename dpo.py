"""DPO: Direct Preference Optimization. Rafailov, Sharma, Mitchell, Ermon, Manning, Finn; 2023; arXiv 2305.18290.

    L = - E_(x, y_w, y_l) [ log sigmoid( beta log pi(y_w|x)/ref(y_w|x)  -  beta log pi(y_l|x)/ref(y_l|x) ) ]      (eq. 7)

The best policy under "reward minus beta times KL from ref" has the reward beta log pi/ref, up to a term that depends on
x alone (eq. 5). Put that into the Bradley-Terry model of which answer people prefer, and the reward model is the policy
itself: what is left is a classification loss on pairs. beta is not a factor on the loss: it sets how far log pi/ref
has to move (about 1/beta nats) before a pair counts as learnt, so a small beta allows a large KL.

    paper                    here
    x, y_w, y_l              a row: the prompt, its first response (chosen), its second (rejected)
    log pi(y|x)              chosen_logps, rejected_logps: sums over response tokens, end-of-sequence included
    log ref(y|x)             ref_chosen_logps, ref_rejected_logps
    beta log pi(y|x)/ref     chosen_rewards, rejected_rewards: the implicit reward
    E                        mean over the pairs of a step, on all processes

Options and departures
1. --label-smoothing e (cDPO: Mitchell, "A note on DPO with noisy preferences", 2023): each label is taken to be wrong
   with probability e, so the loss is (1-e) * loss + e * (loss with the two answers exchanged).
2. --gamma (DPO-gamma): a target margin, log sigmoid(reward difference - gamma), as in SimPO's eq. 5. 0 is the paper.
3. The paper keeps the reference model in memory. Here it is asked once, before the first step, for the log-probs that
   the run will use: the same numbers, one forward pass in the loop instead of two, and no second model.

Healthy: the loss starts at ln 2 = 0.6931 (at gamma 0) and ends between 0.3 and 0.65; rewards/accuracies rises from 0 (no
margin yet) to 0.6-0.8. logps/chosen usually falls too, less than logps/rejected: that is normal. Falling greedy quality
or growing length with a loss near 0 is over-optimisation: raise beta, lower --lr.

    python dpo.py                                                           # the embedded task, on a laptop
    torchrun --nproc_per_node=4 dpo.py --model runs/sft-model-gemma-2-2b    # after sft.py --model gemma-2-2b
    python dpo.py --model runs/sft-... --dataset rows.jsonl                 # {"prompt", "chosen", "rejected"}

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
    "beta": 0.1, "lr": 1e-7, "batch_size": 64, "micro_batch_size": 4, "epochs": 3.0,
    "schedule": "cosine", "warmup_ratio": 0.1, "optimizer": "rmsprop", "max_grad_norm": 1.0,
    "max_length": 2048, "max_prompt_length": 1024, "dataset": "tldr",
    "source": "the MSc thesis at github.com/martimfasantos/MSc-Thesis",
}  # fmt: skip
SETTINGS = {
    "tiny": {
        "beta": 0.3, "lr": 2e-4, "batch_size": 16, "micro_batch_size": 16, "max_steps": 300,
        "schedule": "linear", "warmup_ratio": 0.05, "optimizer": "adamw", "max_grad_norm": 1.0,
        "max_length": 160, "max_prompt_length": 128, "dataset": "family", "source": "tuned here",
    },
    "gpt-j-6b": {  # TL;DR; 150 warm-up steps are a tenth of its epoch
        "beta": 0.5, "lr": 1e-6, "batch_size": 64, "micro_batch_size": 8, "epochs": 1.0,
        "schedule": "constant", "warmup_ratio": 0.1, "optimizer": "rmsprop", "max_grad_norm": 10.0,
        "max_length": 512, "max_prompt_length": 256, "dataset": "tldr",
        "source": "Rafailov et al. 2023, appendix B, and their code",
    },
    "gemma-2-2b": THESIS, "tinyllama": THESIS, "eurollm-1.7b": THESIS,
}  # fmt: skip


# fmt: off
@dataclass
class Args:
    # DPO
    beta: float | None = None  # strength of the pull to the reference, per nat; default: the model's row in SETTINGS
    label_smoothing: float = 0.0  # cDPO: the probability that a label is wrong, in [0, 0.5)
    gamma: float = 0.0  # DPO-gamma: target margin between the two rewards, 0 or more
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


def dpo_loss(
    chosen_logps: Tensor,  # (B,) log pi(y_w | x), summed over response tokens
    rejected_logps: Tensor,  # (B,) log pi(y_l | x)
    ref_chosen_logps: Tensor,  # (B,) the same under the frozen reference
    ref_rejected_logps: Tensor,  # (B,)
    beta: float,
    label_smoothing: float = 0.0,
    gamma: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Equation 7. Returns one loss per pair, and what to plot (one value per pair)."""
    chosen_rewards = beta * (chosen_logps - ref_chosen_logps)  # (B,)
    rejected_rewards = beta * (rejected_logps - ref_rejected_logps)  # (B,)
    margins = chosen_rewards - rejected_rewards  # (B,)
    losses = -F.logsigmoid(margins - gamma)
    if label_smoothing:
        losses = (1 - label_smoothing) * losses - label_smoothing * F.logsigmoid(-margins - gamma)
    metrics = {
        "loss": losses,
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
    if not args.beta > 0 or not 0 <= args.label_smoothing < 0.5 or not args.gamma >= 0:
        raise common.UserError(
            "--beta must be positive, --label-smoothing in [0, 0.5), --gamma 0 or more"
        )
    common.check_reference(args.ref_model, args.soup_weight)
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
    common.add_reference_logps(
        run, train, held_out, policy, args.ref_model, args.soup_weight, args.cache_dir
    )
    optimizer = common.make_optimizer(policy, args.optimizer, args.lr, args.weight_decay)
    run.restore(policy, optimizer)

    # For training and for evaluation.
    def losses_of(micro: common.Micro) -> tuple[Tensor, dict[str, Tensor]]:
        logps, lengths = common.response_logps(policy, micro)  # (B, 2), (B, 2)
        ref_logps = micro.ref_logps.to(logps.dtype)  # (B, 2)
        losses, metrics = dpo_loss(
            *logps.unbind(1), *ref_logps.unbind(1), args.beta, args.label_smoothing, args.gamma
        )
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
