"""IPO: Identity Preference Optimization. Azar, Rowland, Piot, Guo, Calandriello, Valko, Munos; 2023; arXiv 2310.12036.

    L = E_(x, y_w, y_l) [ ( h - 1/(2 tau) )^2 ],       h = log pi(y_w|x)/ref(y_w|x)  -  log pi(y_l|x)/ref(y_l|x)      (eq. 17)

DPO's loss falls for ever as h grows: of two answers that were always ranked alike, its best policy never writes the worse
one, whatever beta, and the pull to the reference is gone. IPO wants a policy whose answers are preferred most often, less
tau times KL from ref, with no model of rewards in between. Pairs ranked this way with probability p then ask for
h = (p - 1/2)/tau, never more than 1/(2 tau), and that is what the square settles on when each pair aims at 1/(2 tau).
A pair that is past its target is pulled back, and every pull is as strong as the way that is left: it has no bound.

    paper                    here
    x, y_w, y_l              a row: the prompt, its first response (chosen), its second (rejected)
    log pi(y|x)              chosen_logps, rejected_logps: sums over response tokens, end-of-sequence included
    log ref(y|x)             ref_chosen_logps, ref_rejected_logps
    tau                      beta, as in TRL and for the same part in dpo.py; its values there are no guide for here
    h                        h, of log-ratios that are divided by the answers' tokens; with --no-per-token as it stands
    E                        mean over the pairs of a step, on all processes

Options and departures
1. --per-token, the default: each log-ratio is a mean over its answer's tokens. In the paper an answer is one of a few actions;
   for text the equation reads as a sum (--no-per-token, the first published code). A sum gives long answers, whose log-ratios
   spread more, most of the squared error, and one target to all lengths. The authors told TRL to take means (its pull request
   1265; issue 1677 asks why), HALOs does too, and the rows of SETTINGS are for means. A beta for one is none for the other:
   1/(2 beta) is in nats a token here, in nats an answer there.
2. rewards/... are beta times the log-ratios that are compared, so rewards/margins aims at 1/2 whatever beta and whichever
   form. TRL plots beta times the sums.
3. The published beta 0.01, the best of ten, asks for 50 nats a token, which no pair comes near: the square is a straight line
   there, all pairs are pulled alike, and what holds the model is one epoch at a small learning rate.
4. The reference is asked once, before the first step, as in dpo.py.

Healthy: the loss starts at 1/(4 beta^2) (`tiny`: 4.0) and falls little where choices are noisy (3.5): the rest is that noise.
rewards/margins rises from 0 and stays far below 1/2 (0.07), rewards/accuracies from 0 to 0.66. grad_norm follows the way left,
about 23 from first to last (12 to 59); --max-grad-norm 1 scales each step down, so --lr alone says how far it goes. A held-out
loss above its start is overshooting: lower --lr. A larger beta is a nearer target and a smaller KL.

    python ipo.py                                                           # the embedded task, on a laptop
    torchrun --nproc_per_node=4 ipo.py --model runs/sft-model-gemma-2-2b --dataset tldr   # after sft.py --model gemma-2-2b
    python ipo.py --model runs/sft-... --dataset rows.jsonl                 # {"prompt", "chosen", "rejected"}

Copyright (c) 2026 the plainpref authors. MIT licence. Tested with torch 2.13 and transformers 5.23.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

import common

# What a flag that was left out becomes, and where the numbers are from (micro-batches are ours): by
# the last part of the model's name, in small letters; a folder that a run of ours saved has the row of
# the model it began from. A model without a row takes the first one after `tiny`, and the run says so.
HANDBOOK = {  # a scan of beta, of which this was the best; its max_length is not given: Zephyr's
    "beta": 0.01, "lr": 5e-7, "batch_size": 128, "micro_batch_size": 4, "epochs": 1.0,
    "schedule": "cosine", "warmup_ratio": 0.1, "optimizer": "adamw", "max_grad_norm": 1.0,
    "max_length": 1024, "max_prompt_length": 512, "dataset": "ultrafeedback",
    "source": "huggingface.co/blog/pref-tuning, and recipes/pref_align_scan in github.com/huggingface/alignment-handbook",
}  # fmt: skip
SETTINGS = {
    "tiny": {
        "beta": 0.25, "lr": 2e-4, "batch_size": 16, "micro_batch_size": 16, "max_steps": 300,
        "schedule": "linear", "warmup_ratio": 0.05, "optimizer": "adamw", "max_grad_norm": 1.0,
        "max_length": 160, "max_prompt_length": 128, "dataset": "family", "source": "tuned here",
    },
    "zephyr-7b-sft-full": HANDBOOK,
    "openhermes-2.5-mistral-7b": HANDBOOK | {"dataset": "HuggingFaceH4/orca_dpo_pairs::train_prefs"},
}  # fmt: skip


# fmt: off
@dataclass
class Args:
    # IPO
    beta: float | None = None  # the paper's tau: 1/(2 beta) is the difference of log-ratios aimed at; default: the model's row in SETTINGS
    per_token: bool = True  # log-ratios are means over an answer's tokens, as the authors advise; off: sums, as the paper writes them
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


def ipo_loss(
    chosen_logps: Tensor,  # (B,) log pi(y_w | x), summed over response tokens
    rejected_logps: Tensor,  # (B,) log pi(y_l | x)
    ref_chosen_logps: Tensor,  # (B,) the same under the frozen reference
    ref_rejected_logps: Tensor,  # (B,)
    chosen_lengths: Tensor,  # (B,) how many tokens that were
    rejected_lengths: Tensor,  # (B,)
    beta: float,
    per_token: bool = True,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Equation 17. Returns one loss per pair, and what to plot (one value per pair)."""
    chosen_ratios = chosen_logps - ref_chosen_logps  # (B,) log pi/ref
    rejected_ratios = rejected_logps - ref_rejected_logps  # (B,)
    if per_token:
        chosen_ratios = chosen_ratios / chosen_lengths
        rejected_ratios = rejected_ratios / rejected_lengths
    h = chosen_ratios - rejected_ratios  # (B,)
    losses = (h - 1 / (2 * beta)) ** 2
    metrics = {
        "loss": losses,
        "rewards/chosen": beta * chosen_ratios,
        "rewards/rejected": beta * rejected_ratios,
        "rewards/margins": beta * h,
        "rewards/accuracies": (h > 0).float(),
        "logps/chosen": chosen_logps,
        "logps/rejected": rejected_logps,
    }
    return losses, metrics


def main(args: Args) -> None:
    run = common.start(args, SETTINGS, __file__)
    if not args.beta > 0:
        raise common.UserError("--beta must be positive")
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
        losses, metrics = ipo_loss(
            *logps.unbind(1), *ref_logps.unbind(1), *lengths.unbind(1), args.beta, args.per_token
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
