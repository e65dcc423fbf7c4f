"""NLPO: PPO that chooses among the top-p tokens of a masking policy, an older copy of the policy.

    M(s)     = the smallest set of tokens with   sum over a in M(s) of psi(a|s) >= p         Ramamurthy et al.
    m(a|s)   = pi(a|s) / sum over b in M(s) of pi(b|s)   if a is in M(s), else 0;   y_t is drawn from m_old
    R_t  = [t = T] score(x, y) - beta (log pi_old(y_t|s_t) - log ref(y_t|s_t))         Ramamurthy et al.
    A_t  = sum over k of (gamma lambda)^k delta_(t+k),   delta_t = R_t + gamma V(s_(t+1)) - V(s_t)     GAE, eq. 16
    L    = - E_t [ min( rho_t A_t, clip(rho_t, 1 - eps, 1 + eps) A_t ) ],    rho_t = m(y_t|s_t) / m_old(y_t|s_t)        PPO, eq. 7
           + c 1/2 E_t [ max( (V - G_t)^2, (clip(V, V_old - eps_v, V_old + eps_v) - G_t)^2 ) ],    G_t = A_t + V_old(s_t)

    Ramamurthy et al. 2023, arXiv 2210.01241; their code: allenai/RL4LMs. The rest: see ppo.py.

Of tens of thousands of tokens few make sense at any place. A masking policy psi, a copy of the
policy that is renewed every mu steps, says which: those with the top p of its probability. The
policy samples from these only, and learns to choose among them. It never tries a token that was
unlikely when psi was copied, be it bad or better than all others.

    paper                    here
    psi, p, mu               masking; top_p; mask_every
    M                        allowed: as bits of (N, V), for each response token
    m, m_old                 logps, old_logps: (B, T), renormalised over M
    pi_old, ref              rollout.logps, rollout.ref_logps: (N, T), without the mask
    score, R, beta           scores, (N,): what --reward gives; rewards, (N, T); kl_coef
    A, V, eps, c, ...        as in ppo.py

Departures: those of ppo.py, and
1. The KL in R is that of pi without the mask, as in the paper and in RL4LMs (`raw_log_probs`): 0
   before the first step. The KL of what is sampled is larger, by -log pi(M) a token.
2. The ratio is that of masked probabilities, from which the tokens came, as in RL4LMs. Algorithm 1
   in the paper writes it without the mask.
3. M is the top p and nothing else. RL4LMs adds special tokens and fills it up to 100 tokens, a
   quarter of the vocabulary of `tiny`.
4. psi is renewed after the update of every mu-th step, as in Algorithm 1. RL4LMs renews it before
   that update, so its psi is never the newest policy.
5. M is computed again in training, where rounding may move its edge: a sampled token is always in
   it. RL4LMs stores all of M.
6. psi has the sampling temperature. Evaluation samples with the mask; the exported model has none.

Healthy: as in ppo.py, and nlpo/allowed_tokens is above 1, else there is nothing to choose;
nlpo/masked_mass, the share of pi outside M, stays below 1 - p or falls after a renewal.

    python nlpo.py                          # the embedded task and its learned reward, on a laptop
    torchrun --nproc_per_node=4 nlpo.py --fsdp --model runs/sft-gemma-2-2b --reward runs/reward_model-...
    python nlpo.py --top-p 1                # without a mask: the same run as ppo.py

Copyright (c) 2026 the plainpref authors. MIT licence. Tested with torch 2.13 and transformers 5.23.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import nn

import common
from sampling.rollouts import Online, Rollout, check_args


@dataclass
class Args(common.Args):
    reward: str | None = None  # a reward model, a@b (log-ratio of two), family, or file.py:function
    gold_reward: str | None = None  # another, only measured on held-out prompts; none: off
    value_model: str | None = None  # start of the value network; default: the reward, or the policy
    kl_coef: float = 0.05  # beta, per nat
    kl_target: float = 0.0  # KL per response that kl_coef adapts to reach; 0: constant kl_coef
    kl_horizon: int = 10_000  # responses in which it adapts
    kl_estimator: Literal["k1", "k3"] = "k1"  # of a token's KL in the reward
    top_p: float = 0.9  # probability of the allowed tokens by the masking policy; 1: no mask
    mask_every: int = 20  # mu: steps until the masking policy becomes the policy again
    temperature: float = 0.7  # of sampling, and of all log-probs
    sample_batch_size: int | None = None  # answers sampled at once; default: what memory allows
    missing_eos: Literal["replace", "subtract", "keep"] = "replace"  # score of an unended response
    missing_eos_value: float = 1.0  # replace: it scores minus this; subtract: its own less this
    ppo_epochs: int = 4  # passes over the responses of a step
    minibatches: int = 1  # optimizer updates in each of these passes
    gamma: float = 1.0  # discount per token, in (0, 1]
    gae_lambda: float = 0.95  # 1: plain returns; 0: one step, then the value
    clip_range: float = 0.2  # how far a ratio may go from 1
    value_clip_range: float = 0.2  # how far a value may go from its old value
    value_weight: float = 0.1  # weight of the value loss
    whiten_rewards: bool = False  # scale rewards to variance 1 over the batch; their mean stays
    adam_eps: float = 1e-5  # AdamW's epsilon
    ref_model: str | None = None  # reference, or a soup a+b of two; default: the initial policy
    soup_weight: float = 0.5  # weight of the first model of a soup
    dataset: str | None = "tldr"  # family, a short name, a file, a folder, or a hub id
    batch_size: int = 512  # prompts per step, over all processes: one response each
    max_steps: int | None = 1953  # each with several updates
    lr: float = 3e-6  # peak learning rate
    warmup_ratio: float = 0.0  # share of the steps during which the learning rate rises
    weight_decay: float = 0.01  # on matrices only; N+ uses AdamW's default, on all weights
    max_grad_norm: float = 0.0  # no clipping
    max_length: int = 565  # tokens of prompt and response together
    max_prompt_length: int = 512  # tokens kept of the prompt; the others are the response's


PRESETS = {
    "tiny": dict(  # as in ppo.py; mask_every as RL4LMs has it for 50 iterations on IMDB
        dataset="family", reward="tiny-preferred@tiny", gold_reward="family", kl_coef=0.1,
        ppo_epochs=2, minibatches=2, temperature=1.0, adam_eps=1e-8, lr=3e-4, warmup_ratio=0.05,
        weight_decay=0.0, max_grad_norm=1.0, batch_size=128, micro_batch_size=32, max_steps=30,
        max_length=176, max_prompt_length=160, mask_every=5,
    ),
    "pythia-1b": dict(),  # the defaults: as in ppo.py; top_p, mask_every: RL4LMs on CNN/DailyMail
}  # fmt: skip


def token_rewards(
    logps: torch.Tensor,  # (N, T) log pi_old of every response token
    ref_logps: torch.Tensor,  # (N, T)
    scores: torch.Tensor,  # (N,)
    mask: torch.Tensor,  # (N, T) bool: the response's tokens, on the left
    kl_coef: float,
    estimator: str = "k1",
) -> torch.Tensor:
    """(N, T) minus the KL cost of every token, plus the score at the last one."""
    log_ratios = (logps - ref_logps).masked_fill(~mask, 0.0)
    kl = log_ratios if estimator == "k1" else torch.exp(-log_ratios) - 1 + log_ratios
    rows, last = torch.arange(len(mask), device=mask.device), mask.sum(1) - 1
    return (-kl_coef * kl).index_put((rows, last), scores, accumulate=True)


def whiten(values: torch.Tensor, mask: torch.Tensor, shift_mean: bool = True) -> torch.Tensor:
    """(N, T) of variance 1 over the mask, and of mean 0 if `shift_mean`; 0 outside."""
    values, n = values.masked_fill(~mask, 0.0), mask.sum()
    mean = values.sum() / n
    centered = (values - mean).masked_fill(~mask, 0.0)
    scaled = centered * torch.rsqrt((centered**2).sum() / n + 1e-8)
    return scaled if shift_mean else (scaled + mean).masked_fill(~mask, 0.0)


def advantages_of(
    rewards: torch.Tensor,  # (N, T)
    values: torch.Tensor,  # (N, T) before each token
    mask: torch.Tensor,  # (N, T) bool
    gamma: float,
    gae_lambda: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, T) advantages and returns, from the last token to the first. After the last all is 0."""
    rewards, values = rewards.masked_fill(~mask, 0.0), values.masked_fill(~mask, 0.0)
    advantages, following, next_value = torch.zeros_like(rewards), 0.0, 0.0
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]  # (N,)
        advantages[:, t] = following = (delta + gamma * gae_lambda * following) * mask[:, t]
        next_value = values[:, t]
    return advantages, advantages + values


def next_kl_coef(kl_coef: float, kl: float, target: float, horizon: int, responses: int) -> float:
    """Ziegler et al., section 2.2: the error is clipped, not the factor."""
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * responses / horizon)


def nlpo_loss(
    logps: torch.Tensor,  # (B, T) log m of every response token
    old_logps: torch.Tensor,  # (B, T) the same when the responses were sampled
    advantages: torch.Tensor,  # (B, T)
    values: torch.Tensor,  # (B, T)
    old_values: torch.Tensor,  # (B, T)
    returns: torch.Tensor,  # (B, T)
    mask: torch.Tensor,  # (B, T) bool
    clip_range: float,
    value_clip_range: float,
    value_weight: float,
) -> tuple[torch.Tensor, dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    """One loss per response token, and metrics as (values, weights)."""

    def inside(x):
        return x.masked_fill(~mask, 0.0)

    A, G, old_values = (inside(x.detach()) for x in (advantages, returns, old_values))
    log_ratios = inside(logps) - inside(old_logps.detach())
    ratios = torch.exp(log_ratios)
    clipped = ratios.clamp(1 - clip_range, 1 + clip_range)
    policy_losses = torch.max(-A * ratios, -A * clipped)
    values = inside(values)
    near = values.clamp(old_values - value_clip_range, old_values + value_clip_range)
    errors, near_errors = (values - G) ** 2, (near - G) ** 2
    value_losses = 0.5 * torch.max(errors, near_errors)
    losses = policy_losses + value_weight * value_losses
    metrics = {
        "loss": losses,
        "loss/policy": policy_losses,
        "loss/value": value_losses,
        "policy/clipfrac": (-A * clipped > -A * ratios).to(logps),
        "policy/approxkl": 0.5 * log_ratios**2,
        "val/clipfrac": (near_errors > errors).to(logps),
        "val/ratio": ratios,
    }
    return losses, {name: (inside(x), mask) for name, x in metrics.items()}


def main(args: Args) -> None:
    positive = "temperature ppo_epochs minibatches clip_range value_clip_range adam_eps kl_horizon"
    check_args(args, f"{positive} top_p mask_every")
    if args.top_p > 1 or not 0 < args.gamma <= 1 or not 0 <= args.gae_lambda <= 1:
        raise common.UserError("--top-p and --gamma must be in (0, 1], --gae-lambda in [0, 1]")
    run = common.Run(args)
    tokenizer = common.load_tokenizer(args.model, args.max_length)
    train, held_out = common.load_rows(args, tokenizer, kind="prompt")
    run.plan(train, args.minibatches)
    # Policy and value network are trained; reference, reward model and masking policy are not.
    online = Online(args, run, tokenizer)
    policy, masking = online.policy, online.masking  # with --top-p 1 there is no masking policy
    value_start = args.value_model or online.reward.values_from or args.model
    value_model = online.load_value_model(value_start)
    trained = nn.ModuleDict({"policy": policy, "value_model": value_model})
    optimizer, scheduler = common.make_optimizer(trained, args, run, args.adam_eps)
    saved = nn.ModuleDict({**trained, "masking": masking}) if masking else trained
    run.restore(saved, optimizer, scheduler)
    run.state.setdefault("kl_coef", args.kl_coef)

    values_of = partial(value_model, per_token=True)  # of a micro-batch: (B, 1, T)

    def masked_logps(batch: common.MicroBatch) -> tuple:
        """(B, 1, T) log-probs among the allowed tokens, and what the mask does."""
        if not masking:
            return policy(batch, args.temperature), {}
        with torch.no_grad():
            allowed, counts = masking(batch, args.temperature, args.top_p)
        logps, mass = policy(batch, args.temperature, allowed)
        return logps, {"nlpo/allowed_tokens": counts[:, 0], "nlpo/masked_mass": mass[:, 0]}

    def roll_out(prompts: list, samples: int, step: int) -> Rollout:
        rollout = online.sample(prompts, samples, step)  # 1. Sample
        rollout.scores = online.final_scores(rollout)  # 2. Score
        rollout.logps, rollout.ref_logps = online.logps(rollout, args.temperature)  # 3. Log-probs
        if masking:
            rollout.masked_logps = online.per_token(rollout, policy, lambda x: masked_logps(x)[0])
        rollout.values = online.per_token(rollout, value_model, values_of, "values")
        return rollout

    def metrics_of(rollout: Rollout) -> dict[str, torch.Tensor]:
        return rollout.metrics(run.state["kl_coef"])

    for step in run.steps(train):  # continues from the last checkpoint
        if run.evaluation_due:
            online.evaluate(held_out, roll_out, metrics_of)
        prompts = [train[i].prompt for i in sorted(step.rows)]
        rollout = roll_out(prompts, 1, run.step)

        # 4. Rewards, advantages, returns.
        kl_coef, mask = run.state["kl_coef"], rollout.mask
        rewards = token_rewards(
            rollout.logps, rollout.ref_logps, rollout.scores, mask, kl_coef, args.kl_estimator
        )
        if args.whiten_rewards:
            rewards = whiten(rewards, mask, shift_mean=False)
        advantages, returns = advantages_of(
            rewards, rollout.values, mask, args.gamma, args.gae_lambda
        )
        advantages = whiten(advantages, mask)
        unexplained = (returns - rollout.values)[mask].var(correction=0)
        unexplained /= returns[mask].var(correction=0).clamp(min=1e-12)
        metrics = metrics_of(rollout)
        metrics["val/explained_variance"] = 1 - unexplained
        metrics["objective/kl_coef"] = torch.full_like(unexplained, kl_coef)
        run.record(metrics)
        online.watch(rollout)
        if args.kl_target:
            kl = float(metrics["objective/kl"].mean())
            how = (args.kl_target, args.kl_horizon, len(prompts))
            run.state["kl_coef"] = next_kl_coef(kl_coef, kl, *how)

        # 5. Update several times.
        for number, micro_batches in enumerate(online.minibatches(rollout, args.ppo_epochs)):
            num_tokens = sum(int(mask[indexes].sum()) for indexes in micro_batches)
            for indexes in micro_batches[run.rank :: run.world]:
                batch = online.collate(rollout.rows, indexes)
                logps, of_mask = masked_logps(batch)
                logps = logps[:, 0]  # (B, T)
                values = values_of(batch)[:, 0]  # (B, T)
                inside, old_logps, A, old_values, G = rollout.part(
                    indexes, logps, rollout.sampled_logps, advantages, rollout.values, returns
                )
                losses, metrics = nlpo_loss(
                    logps, old_logps, A, values, old_values, G, inside,
                    args.clip_range, args.value_clip_range, args.value_weight,
                )  # fmt: skip
                (losses.sum() / num_tokens).backward()  # num_tokens: over all processes
                run.record(metrics | {name: (x, inside) for name, x in of_mask.items()})
                if number == 0:
                    online.check_ratios(logps, old_logps, inside)
            common.sum_gradients(trained)  # a sum, not a mean: the loss is already divided
            grad_norm = common.clip_gradients(trained, args.max_grad_norm)
            if grad_norm.isfinite():  # equal on all processes
                optimizer.step()
            else:
                run.saw_nonfinite = True  # one update of the step is skipped
            optimizer.zero_grad()
        scheduler.step()
        if masking and (run.step + 1) % args.mask_every == 0:
            masking.copy_weights(policy)
        run.end_step(grad_norm)
    online.evaluate(held_out, roll_out, metrics_of)
    run.finish(policy, tokenizer)


if __name__ == "__main__":
    main(common.parse(Args, PRESETS, __doc__))
