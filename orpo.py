"""ORPO: Odds Ratio Preference Optimization. Hong, Lee, Thorne; 2024; arXiv 2403.07691.

    L     = E_(x, y_w, y_l) [ L_SFT  +  lambda L_OR ],      L_SFT = - log P(y_w|x)                            (eq. 6)
    L_OR  = - log sigmoid( log odds(y_w|x) - log odds(y_l|x) ),      odds = P / (1 - P)                       (eq. 7, 4)
    log P(y|x) = 1/|y| log pi(y|x)                                                                            (eq. 3)

One stage instead of two: a base model learns to answer from y_w, and a weak second term keeps it from learning y_l on the
way, which plain fine-tuning does where both answer alike. No reference model. P is the geometric mean of the probabilities
of an answer's tokens. While it is small its odds are P itself, and L_OR is simpo.py's loss with beta 1 and no margin; where
an answer gets likely its odds grow without bound, and so does their slope by log P, 1/(1 - P), but not that by a logit.

    paper                    here
    x, y_w, y_l              a row: the prompt, its first response (chosen), its second (rejected)
    log pi(y|x), |y|         chosen_logps, rejected_logps and chosen_lengths, rejected_lengths: sums over response tokens,
                             end-of-sequence included, and their number
    log P(y|x)               chosen_means, rejected_means
    log odds(y|x)            chosen_rewards, rejected_rewards
    lambda                   odds_weight; in the authors' code alpha, in TRL beta
    E                        mean over the pairs of a step, on all processes

Options and departures
1. L_SFT is the paper's, a mean over each answer's tokens and then over pairs: a loss of one pair alone. The authors' code takes
   the mean over all tokens of a micro-batch, prompts included, and so does TRL (its pull request 1516 tells of a better
   MT-Bench with them): a long answer then counts for more than a short one, and for little behind a long prompt.
2. A base model is what the method is for, so there is no warning about one here. Dialogues (the rows of SETTINGS have such) need
   a chat template, which most base tokenizers lack: save one with the tokenizer, or take plain text such as tldr.
3. A mean log-prob above -1e-6, with odds of a million, counts as -1e-6 in the odds, not in L_SFT: at P = 1 they would be
   infinite, and fp32 log-probs do not say how far from 1 P is. The odds of such an answer stand still, with gradient 0.
4. rewards/... are log-odds; TRL plots lambda times log P, and our rewards/margins as log_odds_chosen.
5. `tiny` has learned to answer already, and its pairs are its own samples: L_SFT has little to teach it (weight 0.2, 600 steps:
   sampled reward +0.03, greedy +0.09). L_OR asks for log-odds as far apart as the labels are sure, and there is no beta to ask
   for more. Weight 4 and three times dpo.py's steps give +0.06 and +0.15 (2: +0.06 and +0.13); weight 10 in 300 steps up to
   +0.04 and +0.16, not both in one run.

Healthy: from a base model nll_loss falls, as in sft.py (`tiny-untrained`, weight 0.1, 150 steps: 6.2 to 2.7), and the odds
come later. `tiny` pays for the odds with nll_loss (0.88 to 1.00): odds_ratio_loss falls (0.69 to 0.59), rewards/accuracies
begins at the share of pairs that the model ranks right already and rises (0.63 to 0.67), so do the margins (0.67 to 0.86).
The authors look at log P: chosen near 0 and rejected at -5 to -10 is over-fitting: lower --odds-weight or --lr. They found
weights of 0.05 to 0.1 right for 7B models and of 0.5 to 1 for small ones.

    python orpo.py                                                          # the embedded task, on a laptop
    torchrun --nproc_per_node=4 orpo.py --model gemma-2-2b --dataset tldr   # the base model, with no sft.py before
    python orpo.py --model gemma-2-2b --dataset rows.jsonl                  # {"prompt", "chosen", "rejected"}

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
PAPER = {  # Mistral's: of Llama's and Phi's, lambda is known alone. 200 warm-up steps are 0.021 of five epochs
    "lr": 5e-6, "batch_size": 32, "micro_batch_size": 4, "epochs": 5.0,
    "schedule": "inverse-sqrt", "warmup_ratio": 0.021, "optimizer": "adamw", "max_grad_norm": 1.0,
    "max_length": 2048, "max_prompt_length": 1792, "dataset": "ultrafeedback",
    "source": "Hong et al. 2024 and their code, github.com/xfactlab/orpo",
}  # fmt: skip
SETTINGS = {
    "tiny": {
        "odds_weight": 4.0, "lr": 2e-4, "batch_size": 16, "micro_batch_size": 16, "max_steps": 900,
        "schedule": "linear", "warmup_ratio": 0.05, "optimizer": "adamw", "max_grad_norm": 1.0,
        "max_length": 160, "max_prompt_length": 128, "dataset": "family", "source": "tuned here",
    },
    "mistral-7b": PAPER | {"odds_weight": 0.1}, "mistral-7b-v0.1": PAPER | {"odds_weight": 0.1},
    "llama-2-7b": PAPER | {"odds_weight": 0.2}, "llama-2-7b-hf": PAPER | {"odds_weight": 0.2},
    "phi-2": PAPER | {"odds_weight": 0.25},
}  # fmt: skip


# fmt: off
@dataclass
class Args:
    # ORPO
    odds_weight: float | None = None  # lambda: weight of the odds-ratio term beside the NLL, 0 or more; default: the model's row in SETTINGS
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


def orpo_loss(
    chosen_logps: Tensor,  # (B,) log pi(y_w | x), summed over response tokens
    rejected_logps: Tensor,  # (B,) log pi(y_l | x)
    chosen_lengths: Tensor,  # (B,) how many tokens that were
    rejected_lengths: Tensor,  # (B,)
    odds_weight: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Equation 6. Returns one loss per pair, and what to plot (one value per pair)."""
    chosen_means = chosen_logps / chosen_lengths  # (B,) log P, a mean over tokens
    rejected_means = rejected_logps / rejected_lengths  # (B,)
    # log odds = log P - log(1 - P), and 1 - P = -expm1(log P) keeps its digits where P is near 1.
    likely = torch.stack([chosen_means, rejected_means]).clamp(max=-1e-6)  # (2, B), P < 1
    chosen_rewards, rejected_rewards = likely - torch.log(-torch.expm1(likely))  # (B,) each
    margins = chosen_rewards - rejected_rewards  # (B,)
    odds_losses = -F.logsigmoid(margins)
    losses = -chosen_means + odds_weight * odds_losses
    metrics = {
        "loss": losses,
        "nll_loss": -chosen_means,
        "odds_ratio_loss": odds_losses,
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
    if not args.odds_weight >= 0:
        raise common.UserError("--odds-weight must be 0 or more")
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
    optimizer = common.make_optimizer(policy, args.optimizer, args.lr, args.weight_decay)
    run.restore(policy, optimizer)

    # For training and for evaluation.
    def losses_of(micro: common.Micro) -> tuple[Tensor, dict[str, Tensor]]:
        logps, lengths = common.response_logps(policy, micro)  # (B, 2), (B, 2)
        losses, metrics = orpo_loss(*logps.unbind(1), *lengths.unbind(1), args.odds_weight)
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
