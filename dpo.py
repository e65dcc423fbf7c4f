"""DPO: Direct Preference Optimization. Rafailov, Sharma, Mitchell, Ermon, Manning, Finn; 2023; arXiv 2305.18290.

    L = - E_(x, y_w, y_l) [ log sigmoid( beta log pi(y_w|x)/ref(y_w|x)  -  beta log pi(y_l|x)/ref(y_l|x) ) ]      (eq. 7)

If pi maximises a reward minus beta times the KL from ref, that reward is beta log pi/ref, up to a term that depends on x only
(eq. 5). With the Bradley-Terry model of preferences, this turns reward learning into a classification loss on the policy itself.
beta does not scale the loss: it sets how far log pi/ref has to move (about 1/beta nats) before a pair counts as learned. A small
beta allows a large KL. Start from a fine-tuned model (sft.py), as the paper does.

    paper                    code
    x, y_w, y_l              a row: the prompt, its first response (chosen), its second (rejected)
    log pi(y|x)              chosen_logps, rejected_logps: sums over response tokens, EOS included
    log ref(y|x)             ref_chosen_logps, ref_rejected_logps; ref is the policy before its first step, or --ref-model
    beta log pi(y|x)/ref     chosen_rewards, rejected_rewards: the implicit reward
    E                        mean over the pairs of a step, across all processes

Options and departures
1. --label-smoothing e (cDPO: Mitchell, "A note on DPO with noisy preferences", 2023): a label is wrong with probability e,
   so the loss is (1-e) * loss + e * (loss with the two answers exchanged).
2. --gamma (DPO-gamma): a target margin as in SimPO's eq. 5, log sigmoid(reward difference - gamma). 0 is the paper. With
   label smoothing, the exchanged term has the margin too: log sigmoid(-difference - gamma). The code of CPO_SIMPO and of the thesis
   behind the gemma, tinyllama and eurollm presets has +gamma there, which changes the loss of a pair by up to 2 e gamma.
3. The paper keeps the reference in memory. Here its log-probs are computed once, before the first step: the same numbers,
   one forward pass per step instead of two, and no second model.
4. The text of that thesis says RMSprop; its code runs AdamW with weight decay 0.05 and 150 warm-up steps. The presets follow
   the text. Without a preset: AdamW with linear decay; the paper's RMSprop and constant rate are the preset gpt-j-6b.

Healthy: the loss starts at ln 2 = 0.6931 (gamma 0) and ends between 0.3 and 0.65; rewards/accuracies rises from 0.5 (all
ties) to 0.6-0.8. logps/chosen usually falls, but less than logps/rejected. Worse greedy answers or growing length while the loss
nears 0 mean over-optimisation: raise --beta or lower --lr.

    python dpo.py                                                           # the embedded task, on a laptop
    torchrun --nproc_per_node=4 dpo.py --model runs/sft-gemma-2-2b    # after sft.py --model gemma-2-2b
    python dpo.py --model runs/sft --dataset rows.jsonl                     # {"prompt", "chosen", "rejected"}

Copyright (c) 2026 the plainpref authors. MIT licence. Tested with torch 2.13 and transformers 5.23.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

import common


@dataclass
class Args(common.Args):  # model, data, hardware and output flags: common.Args
    beta: float = 0.1  # strength of the pull towards the reference model
    label_smoothing: float = 0.0  # cDPO: assumed probability that a label is wrong, in [0, 0.5)
    gamma: float = 0.0  # DPO-gamma: target margin between the two rewards
    ref_model: str | None = None  # reference model, or an average a+b; default: the starting policy
    soup_weight: float = 0.5  # weight of a in a+b
    pairs: Literal["best-worst", "adjacent", "all"] = "best-worst"  # pairs of a ranked list
    lr: float = 1e-6  # peak learning rate
    batch_size: int = 64  # pairs per optimizer step, over all processes
    max_length: int = 512  # tokens of prompt and response together
    max_prompt_length: int = 256  # tokens kept of the prompt if the row is too long


# What differs from the defaults, by model (or the model that a checkpoint was trained from).
THESIS = dict(  # github.com/martimfasantos/MSc-Thesis; micro-batches are ours
    lr=1e-7, epochs=3.0, schedule="cosine", optimizer="rmsprop", micro_batch_size=4, max_length=2048, dataset="tldr",
)  # fmt: skip
PRESETS = {
    "tiny": dict(  # tuned here
        beta=0.3, lr=2e-4, batch_size=16, micro_batch_size=16, max_steps=300, warmup_ratio=0.05,
        max_length=160, max_prompt_length=128, dataset="family",
    ),
    "gpt-j-6b": dict(  # appendix B and the authors' code; --warmup-ratio 0.1 is about their 150 steps
        beta=0.5, schedule="constant", optimizer="rmsprop", max_grad_norm=10.0, dataset="tldr",
    ),
    "gemma-2-2b": THESIS, "tinyllama": THESIS, "eurollm-1.7b": THESIS,
}  # fmt: skip


def dpo_loss(
    chosen_logps: torch.Tensor,  # (B,) log pi(y_w | x), summed over response tokens
    rejected_logps: torch.Tensor,  # (B,) log pi(y_l | x)
    ref_chosen_logps: torch.Tensor,  # (B,) the same under the frozen reference
    ref_rejected_logps: torch.Tensor,  # (B,)
    beta: float,
    label_smoothing: float = 0.0,
    gamma: float = 0.0,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Equation 7. Returns one loss per pair, and metrics (one value per pair)."""
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
        "rewards/accuracies": (margins.sign() + 1) / 2,  # a tie counts half
        "logps/chosen": chosen_logps,
        "logps/rejected": rejected_logps,
    }
    return losses, metrics


def main(args: Args) -> None:
    if not args.beta > 0 or not 0 <= args.label_smoothing < 0.5:
        raise common.UserError("--beta must be positive, --label-smoothing in [0, 0.5)")
    run = common.Run(args)
    tokenizer = common.load_tokenizer(args.model, args.max_length)
    train, held_out = common.load_rows(args, tokenizer, kind="pair")
    run.plan(train)
    policy = common.load_policy(args, run)
    common.add_reference_logps(policy, args, run, train, held_out)  # before any update
    optimizer, scheduler = common.make_optimizer(policy, args, run)
    run.restore(policy, optimizer, scheduler)

    def losses_of(batch: common.MicroBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        logps = common.response_logps(policy, batch)  # (B, 2): chosen, rejected
        ref_logps = batch.ref_logps.to(logps.dtype)  # (B, 2)
        losses, metrics = dpo_loss(
            *logps.unbind(1), *ref_logps.unbind(1), args.beta, args.label_smoothing, args.gamma
        )
        metrics |= {"length/chosen": batch.lengths[:, 0], "length/rejected": batch.lengths[:, 1]}
        return losses, metrics

    for step in run.steps(train):  # continues from the last checkpoint
        if run.evaluation_due:
            run.evaluate(losses_of, held_out, tokenizer)
        for batch in step.micro_batches:
            losses, metrics = losses_of(batch)
            (losses.sum() / step.num_rows).backward()  # num_rows: over all processes
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
