"""GRPO: Group Relative Policy Optimization. Shao et al. 2024, arXiv 2402.03300 (DeepSeekMath).
With the changes of DAPO (Yu et al. 2025, arXiv 2503.14476) and Dr. GRPO (Liu et al. 2025, arXiv
2503.20783): --clip-high, --normalise.

    A_i    = ( r_i - mean of r_1 ... r_G ) / ( their standard deviation )                 section 4.1.2
    L      = - E_i [ 1/|o_i| sum_t ( min( rho_it A_i, clip(rho_it, 1 - eps, 1 + eps) A_i ) - beta D_it ) ]   eq. 3
    rho_it = pi(o_it|s_it) / pi_old(o_it|s_it)
    D_it   = ref/pi - log(ref/pi) - 1,  both of o_it given s_it                            equation 4

Sample a group of G responses to a question and score them. Push the probability of each token of a
response up or down, in proportion to how many standard deviations its score is above or below the
mean of its group. PPO predicts the expected score with a value network; here it is the group's mean.
The KL is not part of the reward but a term of the loss, D (k3): a one-token estimate that is never
negative. Its gradient is, on average over sampled tokens, that of KL(ref || pi), not of
KL(pi || ref). From a group with equal scores only this term learns; val/equal_groups is the share
of such groups.

    paper                    here
    q, o_i, s_it, G          prompt; response; prompt and the tokens before o_it; samples (group size)
    pi, pi_old, ref          logps, old_logps, ref_logps: (B, T), at the sampling temperature
    r                        scores, (N,): what --reward gives to a whole response
    A                        advantages, (N,), the same for all tokens of a response: group_advantages()
    eps                      clip_low and clip_high: 0.2 and 0.28 in DAPO, so that rare tokens can rise
    beta, D                  kl_coef, loss/kl
    E_i, 1/|o_i|             token_weights(): means over a minibatch, over all processes

--normalise chooses (a) what divides an advantage, (b) the weight of a token in an update of N responses:
    grpo       (a) the group's deviation: groups count alike whether scores differ much or little
               (b) 1 / (N |o_i|): each response counts once, so tokens of long bad responses are pushed down less
    dapo       (a) the same   (b) 1 / (tokens of all N): each token counts once
    dr-grpo    (a) nothing    (b) 1 / (N T_max), T_max the longest allowed response: a constant. Apart from
               constants and the KL, this is the gradient of rloo.py: no bias by length or difficulty

Departures
1. The paper does not say which deviation. We divide by G - 1 (as TRL and verl do) and add 1e-4, so
   that rounding gives no advantage. DAPO resamples until no group of a batch is equal; we keep them.
2. --kl-coef 0, as in DAPO and Dr. GRPO, loads no reference and logs no KL (unless --ref-model is
   given). Their reward is a rule, which is hard to cheat. With a reward model, keep a KL.
3. DAPO's equation averages over the tokens of a group, its code over those of a minibatch; we
   follow the code. Left out: dual clip 10 of DAPO's script (its 10 warm-up steps are 20 in the
   paper and here), Adam's beta2 0.95 of Dr. GRPO's.
4. A response without an end after --max-length - --max-prompt-length tokens scores
   -missing_eos_value: keep that below the reward's usual scores, or never ending is best.
   DeepSeekMath has no such rule. DAPO (section 3.4, eq. 13) subtracts 1, and up to 1 from long
   finished responses: for that, put a penalty into your --reward and use --missing-eos keep (with
   `replace` the reward of a cut response is discarded). Dr. GRPO's script gives 0.
5. pi_old is computed by the forward pass of training, not kept from sampling: ratios of the first
   minibatch are 1. A warning appears if one is more than 0.01 off. The reference is fixed: each of
   the paper's outer iterations, which start from a new reference, is a new run.
6. The KL is the paper's. TRL 1.16 by default multiplies it by the ratio.
7. --batch-size counts prompts; a step has `samples` times as many responses. --micro-batch-size
   counts responses: a group may be split, its advantages are computed before.

Healthy: objective/scores and objective/kl rise (`tiny`: to 3.5 nats a response, 2.5 in the first 15
of 30 steps); policy/clipfrac is 0 with one update a batch; val/equal_groups stays low (`tiny`:
below 0.2): at 1 there is nothing left to learn. If an alarm is printed (KL, length, entropy), read
rollouts.jsonl. If scores rise while objective/gold falls, the reward is being cheated: raise
--kl-coef or stop earlier. Growing length may be the bias of `grpo` (`tiny`: 3.3 to 4.9 tokens;
dr-grpo: 3.9).

    python grpo.py                         # the embedded task and its learned reward, on a laptop
    torchrun --nproc_per_node=4 grpo.py --fsdp --model runs/sft-... --dataset tldr --reward runs/reward_model-...
    python grpo.py --model runs/sft-... --dataset rows.jsonl --reward judge.py:score   # {"prompt"}; score(prompts, responses) -> numbers

Copyright (c) 2026 the plainpref authors. MIT licence. Tested with torch 2.13 and transformers 5.23.
"""

from dataclasses import dataclass
from typing import Literal

import torch

import common
from sampling.rollouts import Online, Rollout, check_args, per_response


@dataclass
class Args(common.Args):
    reward: str | None = None  # a reward model, a@b (log-ratio of two), family, or file.py:function
    gold_reward: str | None = None  # another, only measured on held-out prompts; none: off
    samples: int = 64  # G, responses to a prompt
    normalise: Literal["grpo", "dapo", "dr-grpo"] = "grpo"  # see the docstring
    kl_coef: float = 0.04  # beta, weight of the KL in the loss; 0: no reference is loaded
    temperature: float = 1.0  # of sampling, and of all log-probs
    sample_batch_size: int | None = None  # answers sampled at once; default: what memory allows
    missing_eos: Literal["replace", "subtract", "keep"] = "replace"  # score of an unended response
    missing_eos_value: float = 1.0  # replace: it scores minus this; subtract: its own less this
    batch_epochs: int = 1  # passes over the responses of a step
    minibatches: int = 1  # optimizer updates in each of these passes
    clip_low: float = 0.2  # how far a token's ratio may fall below 1
    clip_high: float = 0.2  # how far it may rise above 1
    adam_eps: float = 1e-8  # AdamW's epsilon
    ref_model: str | None = None  # reference, or a soup a+b of two; default: the initial policy
    soup_weight: float = 0.5  # weight of the first model of a soup
    batch_size: int = 16  # prompts per step, over all processes
    micro_batch_size: int = 4  # responses per forward pass and process
    lr: float = 1e-6  # peak learning rate
    schedule: Literal["constant", "linear", "cosine", "inverse-sqrt"] = "constant"  # after warm-up
    warmup_ratio: float = 0.0  # share of the steps during which the learning rate rises
    max_length: int = 1024  # tokens of prompt and response together
    max_prompt_length: int = 512  # tokens kept of the prompt; the rest is for the response


PRESETS = {
    "tiny": dict(  # tuned here
        dataset="family", reward="tiny-preferred@tiny", gold_reward="family", samples=8,
        kl_coef=0.1, lr=4e-4, schedule="linear", warmup_ratio=0.05,
        micro_batch_size=16, max_steps=30, max_length=176, max_prompt_length=160,
    ),
    # The defaults: samples, KL, lr, batch (1,024 responses, one update) and length as reported in
    # Shao et al. 2024, section 4.2; the rest is ours.
    "deepseek-math-7b-instruct": dict(),
    # DAPO, Yu et al. 2025, section 4.1 and their script: 8,192 responses a batch, 512 an update.
    # The number of steps is ours.
    "qwen2.5-32b": dict(
        samples=16, kl_coef=0.0, normalise="dapo", clip_high=0.28, minibatches=16,
        missing_eos="subtract", weight_decay=0.1, warmup_ratio=0.0625, batch_size=512,
        micro_batch_size=1, max_steps=320, max_length=22528, max_prompt_length=2048,
    ),
    # Dr. GRPO, Liu et al. 2025: their script. 1,024 responses a batch, 128 an update. Warm-up,
    # Adam's epsilon and gradient norm are ours.
    "qwen2.5-math-7b": dict(
        samples=8, kl_coef=0.0, normalise="dr-grpo", minibatches=8, missing_eos_value=0.0,
        batch_size=128, micro_batch_size=1, epochs=20.0, max_length=4024, max_prompt_length=1024,
    ),
}  # fmt: skip


def group_advantages(
    scores: torch.Tensor,  # (N,) each group is `samples` consecutive scores
    samples: int,
    normalise: str,
    eps: float = 1e-4,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(N,) advantages, and (groups,) bool: all scores are equal, there is nothing to learn."""
    groups = scores.view(-1, samples)
    centered = groups - groups.mean(1, keepdim=True)
    deviations = groups.std(1, correction=1, keepdim=True)
    advantages = centered if normalise == "dr-grpo" else centered / (deviations + eps)
    return advantages.flatten(), deviations[:, 0] < eps


def token_weights(
    lengths: torch.Tensor,  # (B,) tokens of some responses of an update
    normalise: str,
    num_responses: int,  # of the whole update, over all processes
    num_tokens: int,  # of these
    max_tokens: int,  # that a response may have
) -> torch.Tensor:
    """(B,) what each token of these responses weighs in the update's loss."""
    divisors = {
        "grpo": num_responses * lengths,  # a mean over a response's tokens, then over responses
        "dapo": torch.full_like(lengths, num_tokens),
        "dr-grpo": torch.full_like(lengths, num_responses * max_tokens),
    }
    return 1 / divisors[normalise].double()


def grpo_loss(
    logps: torch.Tensor,  # (B, T) log pi of every response token
    old_logps: torch.Tensor,  # (B, T) the same when the responses were sampled
    ref_logps: torch.Tensor | None,  # (B, T) under the reference; None: there is no KL
    advantages: torch.Tensor,  # (B,)
    mask: torch.Tensor,  # (B, T) bool
    kl_coef: float,
    clip_low: float,
    clip_high: float,
) -> tuple[torch.Tensor, dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    """One loss per response token, and metrics as (values, weights)."""

    def inside(values):
        return values.masked_fill(~mask, 0.0)

    advantages = inside(advantages.detach()[:, None].expand_as(logps))  # (B, T)
    log_ratios = inside(logps) - inside(old_logps.detach())
    ratios = torch.exp(log_ratios)
    clipped = ratios.clamp(1 - clip_low, 1 + clip_high)
    losses = policy_losses = torch.max(-advantages * ratios, -advantages * clipped)
    metrics = {
        "loss/policy": policy_losses,
        "policy/clipfrac": (-advantages * clipped > -advantages * ratios).to(logps),
        "policy/approxkl": 0.5 * log_ratios**2,
        "val/ratio": ratios,
    }
    if ref_logps is not None:
        ref_log_ratios = inside(logps) - inside(ref_logps.detach())
        metrics["loss/kl"] = kl = torch.exp(-ref_log_ratios) - 1 + ref_log_ratios  # k3
        losses = policy_losses + kl_coef * kl
    return losses, {name: (inside(values), mask) for name, values in metrics.items()}


def main(args: Args) -> None:
    check_args(args, positive="temperature batch_epochs minibatches clip_low clip_high adam_eps")
    run = common.Run(args)
    tokenizer = common.load_tokenizer(args.model, args.max_length)
    train, held_out = common.load_rows(args, tokenizer, kind="prompt")
    run.plan(train, args.minibatches, args.samples)
    online = Online(args, run, tokenizer, with_reference=args.kl_coef > 0)
    policy = online.policy
    optimizer, scheduler = common.make_optimizer(policy, args, run, args.adam_eps)
    run.restore(policy, optimizer, scheduler)

    used_once = args.batch_epochs * args.minibatches == 1  # then pi_old is pi: ratios are 1

    def roll_out(prompts: list, samples: int, step: int) -> Rollout:
        rollout = online.sample(prompts, samples, step)  # 1. Sample
        rollout.scores = online.final_scores(rollout)  # 2. Score
        rollout.ref_logps = online.reference_logps(rollout, args.temperature)  # 3. Log-probs
        if step < 0 or not used_once:
            rollout.logps = online.policy_logps(rollout, args.temperature)
        return rollout

    for step in run.steps(train):  # continues from the last checkpoint
        if run.evaluation_due:
            online.evaluate(held_out, roll_out, Rollout.metrics)
        prompts = [train[i].prompt for i in sorted(step.rows)]
        rollout = roll_out(prompts, args.samples, run.step)

        # 4. Advantages.
        advantages, equal = group_advantages(rollout.scores, args.samples, args.normalise)

        # 5. Update, once or several times.
        if used_once:
            rollout.logps = torch.zeros(rollout.mask.shape, dtype=torch.float64)
        lengths, max_tokens = rollout.mask.sum(1), args.max_length - args.max_prompt_length
        for number, micro_batches in enumerate(online.minibatches(rollout, args.batch_epochs)):
            num_responses = sum(map(len, micro_batches))  # over all processes
            num_tokens = sum(int(lengths[indexes].sum()) for indexes in micro_batches)
            for indexes in micro_batches[run.rank :: run.world]:
                batch = online.collate(rollout.rows, indexes)
                logps = per_response(policy(batch, args.temperature), batch)  # (B, T)
                if used_once:
                    rollout.logps[indexes, : logps.shape[1]] = logps.detach().double().cpu()
                mask, old_logps, A = rollout.part(indexes, logps, rollout.logps, advantages)
                ref_logps = None
                if online.reference is not None:
                    _, ref_logps = rollout.part(indexes, logps, rollout.ref_logps)
                losses, metrics = grpo_loss(
                    logps, old_logps, ref_logps, A, mask,
                    args.kl_coef, args.clip_low, args.clip_high,
                )  # fmt: skip
                weights = token_weights(
                    lengths[indexes], args.normalise, num_responses, num_tokens, max_tokens
                )
                loss = (losses * weights[:, None].to(logps)).sum()
                loss.backward()
                share = torch.tensor(len(indexes) / num_responses)
                run.record(metrics | {"loss": (loss, share)})
                if number == 0 and not used_once:
                    online.check_ratios(logps, old_logps, mask)
            common.sum_gradients(policy)  # a sum, not a mean: the loss is already divided
            grad_norm = common.clip_gradients(policy, args.max_grad_norm)
            if grad_norm.isfinite():  # equal on all processes
                optimizer.step()
            else:
                run.saw_nonfinite = True  # one update of the step is skipped
            optimizer.zero_grad()
        if used_once:
            rollout.logps = common.sum_over_processes(rollout.logps)
        run.record(rollout.metrics() | {"val/equal_groups": equal.double()})
        online.watch(rollout, advantage=advantages)
        scheduler.step()
        run.end_step(grad_norm)
    online.evaluate(held_out, roll_out, Rollout.metrics)
    run.finish(policy, tokenizer)


if __name__ == "__main__":
    main(common.parse(Args, PRESETS, __doc__))
