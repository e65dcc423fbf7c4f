"""PPO with a KL penalty: reinforcement learning from a reward model. And SALSA: the same against a souped reference.

    R_t  = [t = T] score(x, y) - beta (log pi_old(y_t|s_t) - log ref(y_t|s_t))                  Ziegler et al., section 2
    A_t  = sum over k of (gamma lambda)^k delta_(t+k),   delta_t = R_t + gamma V(s_(t+1)) - V(s_t)      GAE, equation 16
    L    = - E_t [ min( rho_t A_t, clip(rho_t, 1 - eps, 1 + eps) A_t ) ],    rho_t = pi(y_t|s_t) / pi_old(y_t|s_t)   PPO, equation 7
           + c 1/2 E_t [ max( (V - G_t)^2, (clip(V, V_old - eps_v, V_old + eps_v) - G_t)^2 ) ],    G_t = A_t + V_old(s_t)

    Schulman et al. 2017, arXiv 1707.06347 (PPO); 2015, arXiv 1506.02438 (GAE). For language models: Ziegler et al. 2019, arXiv
    1909.08593; Stiennon et al. 2020, arXiv 2009.01325; Ouyang et al. 2022, arXiv 2203.02155. The details that matter: Huang
    et al. 2024, arXiv 2403.17031 (called N+ below). SALSA: Chegini et al. 2024, arXiv 2411.01798.

Sample an answer to each of a batch of prompts; score them; raise the probability of every token in proportion to how much
better than expected things went from there on. What was expected is a second network's guess V. The score comes once, at
the end; every token pays for leaving the reference, or the policy would find out what the reward model mistakes for
quality. The ratio's clip lets one batch be learned from several times: once a token's probability has changed by the
factor 1 + eps or 1 - eps, whichever A wants, it gets no more gradient.

    paper                    here
    x, y, s_t                a prompt, an answer sampled by the policy, the prompt and what precedes y_t
    pi, pi_old, ref          logps, old_logps, ref_logps: (N, T), one a token, all at the temperature of sampling
    score                    scores, (N,): what --reward gives to the whole answer. R: rewards
    beta                     kl_coef
    V, V_old, G              values, old_values, returns: the value before y_t is chosen
    A, gamma, lambda         advantages (whitened for the loss), gamma, gae_lambda
    eps, eps_v, c            clip_range, value_clip_range, value_weight
    E_t                      mean over all answer tokens of a minibatch, on all processes

SALSA is `--ref-model a+b`: the reference is the weight average of two models fine-tuned from the same start with different
seeds. It lies off the policy's start, so the KL is positive in the first step already.

Options and departures
1. An answer ends where its end-of-sequence was sampled. N+ samples a fixed number of tokens and discards what follows.
   One that has no end after --max-length - --max-prompt-length tokens gets the score -missing_eos_value instead of its own
   (N+; "subtract" takes it off, as TRL does).
2. The score is added at an answer's last token. N+ adds it one place later, and keeps the value of that place.
3. pi_old and V_old are asked for by the forward pass of training, in the very micro-batches of the first epoch, not kept from
   sampling: in the first minibatch the ratio is 1, in fp32 exactly. A warning comes above 0.01.
4. Means are over all tokens of a minibatch and advantages are whitened over all answers of a step, on all processes. N+ has
   them per micro-batch, and whitens on each process.
5. --kl-estimator k3 takes exp(-d) - 1 + d, d being the log-ratio, instead of d: never negative and less noisy, but near the
   reference it hardly pulls: as a reward, its gradient is that of KL(pi || ref) - KL(ref || pi).
6. --kl-target steers beta, as Ziegler et al. did (their code: 0.15 at first, target 6, horizon 10,000), and so they whitened
   rewards (--whiten-rewards). N+ uses neither.
7. The value network is one of its own, begun from the reward model, its level included; or from the policy, with a head of
   zeros, where no model reads the policy's tokens and gives a score (a function, a@b, another tokenizer). As it shares
   nothing with the policy, --value-weight acts through the joint gradient norm and Adam's epsilon alone.

Healthy: objective/scores rises and objective/kl with it (`tiny`: to 2 nats an answer, of 4 tokens, most of it in 10 of 30 steps), val/ratio stays
near 1, policy/clipfrac below 0.3 (`tiny`: 0.12 in the first step, then below 0.05), val/explained_variance rises from 0 (`tiny`: to 0.2;
below 0 for a while is usual). An alarm is printed when the KL exceeds one nat a token, when answers get twice or half as long,
when entropy falls to a fifth or doubles: then read rollouts.jsonl. Scores that rise while objective/gold falls are
over-optimisation: raise --kl-coef, or stop earlier.

    python ppo.py                                                           # the embedded task and its learned reward, on a laptop
    torchrun --nproc_per_node=4 ppo.py --fsdp --model runs/sft-model-gemma-2-2b --reward runs/reward_model-...   # after sft.py, reward_model.py
    python ppo.py --model runs/sft-... --dataset rows.jsonl --reward judge.py:score    # {"prompt"}; score(prompts, responses) -> numbers

Copyright (c) 2026 the plainpref authors. MIT licence. Tested with torch 2.13 and transformers 5.23.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

import common
import generation
import scoring

# What a flag that was left out becomes, and where the numbers are from (micro-batches are ours): by
# the last part of the model's name, in small letters; a folder that a run of ours saved has the row of
# the model it began from. A model without a row takes the first one after `tiny`, and the run says so.
SETTINGS = {
    "tiny": {
        "reward": "tiny-preferred@tiny", "gold_reward": "family", "kl_coef": 0.1, "ppo_epochs": 2, "minibatches": 2,
        "temperature": 1.0, "adam_eps": 1e-8,
        "lr": 3e-4, "batch_size": 128, "micro_batch_size": 32, "max_steps": 30,
        "schedule": "linear", "warmup_ratio": 0.05, "optimizer": "adamw", "max_grad_norm": 1.0,
        "max_length": 176, "max_prompt_length": 160, "dataset": "family", "source": "tuned here",
    },
    "pythia-1b": {  # a million answers; they clip no gradients
        "kl_coef": 0.05, "ppo_epochs": 4, "minibatches": 1, "temperature": 0.7, "adam_eps": 1e-5,
        "lr": 3e-6, "batch_size": 512, "micro_batch_size": 8, "max_steps": 1953,
        "schedule": "linear", "warmup_ratio": 0.0, "optimizer": "adamw", "max_grad_norm": 0.0,
        "max_length": 565, "max_prompt_length": 512, "dataset": "tldr",
        "source": "Huang et al. 2024, arXiv 2403.17031",
    },
}  # fmt: skip
EVALUATED = 256  # held-out prompts that an evaluation samples answers to
SHOWN = 4  # rollouts of a step that go to rollouts.jsonl


# fmt: off
@dataclass
class Args:
    # PPO
    reward: str | None = None  # what scores answers: a reward model's folder or hub id, two language models a@b, family (the true reward), or file.py:function; default: SETTINGS
    gold_reward: str | None = None  # another one, only measured, on held-out prompts: shows when the reward is being cheated; default: SETTINGS, else none
    value_model: str | None = None  # what the value network begins from; default: the reward model, or the policy where there is none that reads its tokens
    kl_coef: float | None = None  # beta, per nat; default: the model's row in SETTINGS
    kl_target: float = 0.0  # nats an answer that kl_coef is steered to; 0: kl_coef stays as it is
    kl_horizon: int = 10_000  # answers in which it is steered
    kl_estimator: Literal["k1", "k3"] = "k1"  # of a token's KL in the reward
    temperature: float | None = None  # of sampling, and of every log-prob; default: SETTINGS
    missing_eos: Literal["replace", "subtract", "keep"] = "replace"  # what becomes of the score of an answer without an end
    missing_eos_value: float = 1.0  # it is -1 with replace, 1 lower with subtract
    ppo_epochs: int | None = None  # how often a batch is learned from; default: SETTINGS
    minibatches: int | None = None  # optimizer steps in each of these epochs; default: SETTINGS
    gamma: float = 1.0  # discount a token, in (0, 1]
    gae_lambda: float = 0.95  # 1: returns as they were; 0: one step, then the value; in [0, 1]
    clip_range: float = 0.2  # how far a ratio may go from 1
    value_clip_range: float = 0.2  # how far a value may go from what it was
    value_weight: float = 0.1  # of the value loss, in the joint gradient norm
    whiten_rewards: bool = False  # scale the rewards to deviation 1 over the batch; their mean stays
    adam_eps: float | None = None  # AdamW's epsilon; default: SETTINGS
    # The reference
    ref_model: str | None = None  # reference model, or a soup a+b of two; default: the policy before its first step
    soup_weight: float = 0.5  # weight of the first model of a soup, in [0, 1]
    # Model and data
    model: str = "tiny"  # tiny, a short name (gemma-2-2b, ...), a Hugging Face id, or a folder such as runs/sft
    dataset: str | None = None  # family, a short name (tldr, ultrafeedback, hh, ...), a file or folder (.jsonl .json .parquet .csv), a hub id[:config][:split], or name=PATH for a copy; default: SETTINGS
    eval_dataset: str | None = None  # held-out rows; default: the dataset's own test split, else a twentieth of it
    skip_bad_rows: bool = False  # go on without rows that cannot be used, instead of stopping
    max_length: int | None = None  # tokens of prompt and response together; default: SETTINGS
    max_prompt_length: int | None = None  # tokens kept of a prompt whose row is too long; default: SETTINGS
    # Optimization
    batch_size: int | None = None  # prompts per step, over all processes: one answer is sampled to each; default: SETTINGS
    micro_batch_size: int | None = None  # rows per forward pass and process; default: the largest that fits SETTINGS
    epochs: float | None = None  # passes over the rows; default: SETTINGS
    max_steps: int | None = None  # batches of samples, instead of epochs; each is learned from in several optimizer steps; default: SETTINGS
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


def final_scores(
    scores: Tensor,  # (N,)
    ended: Tensor,  # (N,) bool: the answer has an end-of-sequence
    replacement: float | None,  # what an answer without one scores instead; None: its own score
    penalty: float,  # taken off it
) -> Tensor:
    """(N,)"""
    without = scores if replacement is None else torch.full_like(scores, replacement)
    return torch.where(ended, scores, without - penalty)


def token_rewards(
    logps: Tensor,  # (N, T) log pi_old of every answer token
    ref_logps: Tensor,  # (N, T)
    scores: Tensor,  # (N,)
    mask: Tensor,  # (N, T) bool: the answer's tokens, which stand on the left
    kl_coef: float,
    estimator: str = "k1",
) -> Tensor:
    """(N, T) what every token costs in KL, and at the last one the score."""
    log_ratios = (logps - ref_logps).masked_fill(~mask, 0.0)
    kl = log_ratios if estimator == "k1" else torch.exp(-log_ratios) - 1 + log_ratios
    rewards = -kl_coef * kl
    last = mask.sum(1) - 1  # (N,)
    return rewards.index_put(
        (torch.arange(len(mask), device=mask.device), last), scores, accumulate=True
    )


def whiten(values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """(N, T) of variance 1 over the mask, and of mean 0 if `shift_mean`; 0 outside."""
    values, n = values.masked_fill(~mask, 0.0), mask.sum()
    mean = values.sum() / n
    centered = (values - mean).masked_fill(~mask, 0.0)
    scaled = centered * torch.rsqrt((centered**2).sum() / n + 1e-8)
    return scaled if shift_mean else (scaled + mean).masked_fill(~mask, 0.0)


def advantages_of(
    rewards: Tensor,  # (N, T)
    values: Tensor,  # (N, T) before each token
    mask: Tensor,  # (N, T) bool
    gamma: float,
    gae_lambda: float,
) -> tuple[Tensor, Tensor]:
    """(N, T) advantages and returns, from the last token to the first. After the last one all is 0."""
    rewards, values = rewards.masked_fill(~mask, 0.0), values.masked_fill(~mask, 0.0)
    advantages, following, next_value = torch.zeros_like(rewards), 0.0, 0.0
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]  # (N,)
        advantages[:, t] = following = (delta + gamma * gae_lambda * following) * mask[:, t]
        next_value = values[:, t]
    return advantages, advantages + values


def next_kl_coef(kl_coef: float, kl: float, target: float, horizon: int, answers: int) -> float:
    """Ziegler et al., section 2.2: the error is clipped, not the factor."""
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * answers / horizon)


def ppo_loss(
    logps: Tensor,  # (N, T) log pi of every answer token
    old_logps: Tensor,  # (N, T) the same when the answers were sampled
    advantages: Tensor,  # (N, T)
    values: Tensor,  # (N, T)
    old_values: Tensor,  # (N, T)
    returns: Tensor,  # (N, T)
    mask: Tensor,  # (N, T) bool
    clip_range: float,
    value_clip_range: float,
    value_weight: float,
) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
    """Returns one loss per answer token, and what to plot: (values, weights) is a weighted mean."""
    inside = lambda x: x.masked_fill(~mask, 0.0)  # noqa: E731
    advantages, returns, old_values = (
        inside(x.detach()) for x in (advantages, returns, old_values)
    )
    log_ratios = inside(logps) - inside(old_logps.detach())
    ratios = torch.exp(log_ratios)
    clipped = ratios.clamp(1 - clip_range, 1 + clip_range)
    policy_losses = torch.max(-advantages * ratios, -advantages * clipped)
    values = inside(values)
    near = values.clamp(old_values - value_clip_range, old_values + value_clip_range)
    errors, near_errors = (values - returns) ** 2, (near - returns) ** 2
    value_losses = 0.5 * torch.max(errors, near_errors)
    losses = policy_losses + value_weight * value_losses
    of = lambda x: (inside(x.to(logps.dtype)), mask)  # noqa: E731
    metrics = {
        "loss": of(losses),
        "loss/policy": of(policy_losses),
        "loss/value": of(value_losses),
        "policy/clipfrac": of(-advantages * clipped > -advantages * ratios),
        "policy/approxkl": of(0.5 * log_ratios**2),
        "val/clipfrac": of(near_errors > errors),
        "val/ratio": of(ratios),
    }
    return losses, metrics


@dataclass
class Rollouts:
    """Answers sampled by the policy, on every process all of them."""

    rows: common.Rows  # a prompt and its answer, as token ids
    mask: Tensor  # (N, T) bool
    logps: Tensor  # (N, T) float64, which holds fp32 exactly
    ref_logps: Tensor  # (N, T)
    values: Tensor  # (N, T)
    scores: Tensor  # (N,) of the reward, after --missing-eos
    ended: Tensor  # (N,) bool

    def metrics(self, kl_coef: float) -> dict[str, Tensor]:
        """One value an answer."""
        kl = (self.logps - self.ref_logps).sum(1)  # (N,)
        return {
            "objective/scores": self.scores,
            "objective/kl": kl,
            "objective/rlhf_reward": self.scores - kl_coef * kl,  # with k1, whatever was trained on
            "objective/entropy": -self.logps.sum(1),  # an estimate: of what was sampled
            "length/response": self.mask.sum(1).double(),
            "val/ended": self.ended.double(),
        }


def alarms(now: dict[str, float], first: dict[str, float]) -> list[str]:
    """What looks like the beginning of a collapse, in means over a step's answers."""
    length, start = now["length/response"], first["length/response"]
    kl, entropy = (now[f"objective/{name}"] / length for name in ("kl", "entropy"))
    usual = max(first["objective/entropy"] / start, 1e-3)
    found = [f"KL {kl:.2f} nats a token: the policy is far from its reference"] * (kl > 1)
    if not start / 2 <= length <= start * 2:
        found.append(f"answers of {length:.1f} tokens, {start:.1f} in the first step")
    if not usual / 5 <= entropy <= usual * 2:
        found.append(f"entropy {entropy:.2f} nats a token, {usual:.2f} in the first step")
    return found


def main(args: Args) -> None:
    run = common.start(args, SETTINGS, __file__)
    if not args.reward:
        raise common.UserError(
            "--reward is needed: a reward model (reward_model.py makes one), a@b, family, or file.py:function"
        )
    for name in (
        "temperature ppo_epochs minibatches clip_range value_clip_range adam_eps kl_horizon".split()
    ):
        if not 0 < getattr(args, name) < float("inf"):
            raise common.UserError(
                f"{common.flag(name)} must be positive, got {getattr(args, name)}"
            )
    for name in "kl_coef kl_target value_weight missing_eos_value".split():
        if not 0 <= getattr(args, name) < float("inf"):
            raise common.UserError(
                f"{common.flag(name)} must be 0 or more, got {getattr(args, name)}"
            )
    if not 0 < args.gamma <= 1 or not 0 <= args.gae_lambda <= 1:
        raise common.UserError("--gamma must be in (0, 1], --gae-lambda in [0, 1]")
    common.check_reference(args.ref_model, args.soup_weight)
    scoring.check_reward(args.reward)
    if args.gold_reward:
        scoring.check_reward(args.gold_reward, "--gold-reward")
    if args.value_model:
        common.resolve_model(args.value_model, "--value-model")
    tokenizer = common.load_tokenizer(args.model, args.max_length)
    train, held_out = common.load_rows(
        args.dataset, args.eval_dataset, "prompt", tokenizer, args.max_length,
        args.max_prompt_length, skip_bad_rows=args.skip_bad_rows, cache_dir=args.cache_dir,
    )  # fmt: skip
    room = args.max_length - args.max_prompt_length  # tokens of an answer
    run.plan(train, args.minibatches)

    # Four models. Two are trained: fp32 weights, gradients, optimizer state. Two are only asked.
    asked = dict(
        attn=args.attn, share_prompt=False, fused_logps=args.fused_logps, fsdp=args.fsdp,
        compile=args.compile,
    )  # fmt: skip
    trained = asked | dict(
        gradient_checkpointing=args.gradient_checkpointing, lora_rank=args.lora_rank
    )
    policy = common.load_policy(args.model, args.dtype, run, **trained, name="policy")
    common.warn_if_not_fine_tuned(policy, tokenizer)
    as_reference = nullcontext  # what `ref` is asked in
    if args.ref_model:
        ref = scoring.freeze(common.load_reference(args.ref_model, args.soup_weight, policy, run))
    elif args.lora_rank:
        common.say("reference", "the policy without its adapters")
        ref, as_reference = policy, lambda: common.beside("adapters").off(policy)
    else:
        ref = scoring.freeze(
            common.load_policy(args.model, args.dtype, run, **asked, name="reference")
        )
    reward = scoring.load_reward(args.reward, tokenizer, run, args.dtype, args.attn, args.fsdp)
    gold = args.gold_reward and scoring.load_reward(
        args.gold_reward, tokenizer, run, args.dtype, args.attn, args.fsdp, "gold"
    )
    begin = args.value_model or reward.values_from or args.model
    if args.value_model:
        theirs = common.load_tokenizer(begin, 1)
        if not scoring.reads_tokens_of(theirs, tokenizer):
            raise common.UserError(f"--value-model {begin} has another tokenizer than the policy")
    value_model = scoring.load_score_model(begin, args.dtype, run, **trained, name="value")
    if value_model.get_input_embeddings().weight.shape[0] < len(tokenizer):
        raise common.UserError(f"--value-model {begin} has a smaller vocabulary than the policy")
    if not scoring.labels_of(begin):
        scoring.fresh_head(value_model, std=0.0, seed=args.seed)
    models = nn.ModuleDict({"policy": policy, "value_model": value_model})
    optimizer = common.make_optimizer(
        models, args.optimizer, args.lr, args.weight_decay, args.adam_eps
    )
    run.restore(models, optimizer)
    kept = run.kept  # what a resumed run goes on with
    kept.setdefault("kl_coef", args.kl_coef)
    used = {args.model, begin, *common.parts_of_soup(args.ref_model or args.model)}
    used |= {args.reward} - {"family"} if ".py:" not in args.reward else set()
    contents = common.from_main(lambda: {name: scoring.contents_of(name) for name in used})
    changed = [
        name
        for name, files in kept.setdefault("models", contents).items()
        if files != contents[name]
    ]
    if changed:
        raise common.UserError(
            f"{run.folder} holds another run: {' and '.join(sorted(changed))} changed since. "
            "--resume never starts a new folder beside it"
        )

    @torch.no_grad()
    def roll_out(prompts: list[np.ndarray], seed: int, deal: Callable) -> tuple[Rollouts, list]:
        """`deal` makes of the answers' lengths a list of minibatches, each a list of micro-batches."""
        # 1. Sample an answer to every prompt, at the temperature of all log-probs below.
        answers = generation.generate(
            policy, prompts, tokenizer.stop_ids, room, args.temperature, seed, run
        )
        pairs = zip(prompts, answers, strict=True)
        rows = common.Rows("rollouts", [common.Row(x, [y], x) for x, y in pairs])
        # 2. Score them. An answer without an end is a bad one, whatever the reward model says of it.
        ended = torch.tensor([int(y[-1]) in tokenizer.stop_ids for y in answers])
        replacement = -args.missing_eos_value if args.missing_eos == "replace" else None
        penalty = args.missing_eos_value if args.missing_eos == "subtract" else 0.0
        scores = final_scores(reward(prompts, answers), ended, replacement, penalty)
        # 3. Ask policy, reference and value network for every token: by the forward pass of training.
        lengths = torch.tensor([len(y) for y in answers])
        mask = torch.arange(int(lengths.max())) < lengths[:, None]  # (N, T)
        known = torch.zeros(3, *mask.shape, dtype=torch.float64)
        micros = deal([row.length() for row in rows.rows])
        for part, mine in run.share([micro for mini in micros for micro in mini], "log-probs"):
            micro = common.collate(rows, part, run.device)
            logps = common.response_token_logps(policy, micro, args.temperature)  # (B, 1, T)
            with as_reference():
                ref_logps = common.response_token_logps(ref, micro, args.temperature)
            found = torch.cat([logps, ref_logps, scoring.token_values(value_model, micro)], 1)
            if mine:
                known[:, part, : found.shape[2]] = found.transpose(0, 1).double().cpu()
        known = common.over_processes(known)
        return Rollouts(rows, mask, *known, scores, ended), micros

    def evaluate() -> None:
        if len(held_out) and run.held_out_due:
            questions = [row.prompt for row in held_out.rows[:EVALUATED]]
            deal = lambda lengths: [run.deal(lengths, list(range(len(lengths))))]  # noqa: E731
            seen, _ = roll_out(questions, common.hash_of(args.seed, -1), deal)
            told = {name: float(x.mean()) for name, x in seen.metrics(kept["kl_coef"]).items()}
            if gold:
                answers = [row.responses[0] for row in seen.rows.rows]
                told["objective/gold"] = float(gold(questions, answers).mean())
            run.tell_held_out(told)
        run.sample(held_out, policy, tokenizer)

    for batch in run.batches(train):  # from where the run stands
        if run.evaluation_due:
            evaluate()

        def minibatches(lengths: list[int], epoch: int, step: int = batch.step) -> list:
            """Micro-batches of every minibatch, over all processes: another order each epoch."""
            draw = np.random.default_rng([args.seed, step, epoch])
            parts = np.split(draw.permutation(len(lengths)), args.minibatches)
            return [run.deal(lengths, part.tolist()) for part in parts]

        kl_coef = kept["kl_coef"]
        prompts = [train.rows[i].prompt for i in sorted(batch.rows)]
        seed = common.hash_of(args.seed, batch.step)
        rollouts, first_epoch = roll_out(prompts, seed, lambda lengths: minibatches(lengths, 0))
        rows, mask = rollouts.rows, rollouts.mask

        # 4. Rewards, advantages, returns.
        rewards = token_rewards(
            rollouts.logps, rollouts.ref_logps, rollouts.scores, mask, kl_coef, args.kl_estimator
        )
        if args.whiten_rewards:
            rewards = whiten(rewards, mask, shift_mean=False)
        advantages, returns = advantages_of(
            rewards, rollouts.values, mask, args.gamma, args.gae_lambda
        )
        spread = returns[mask].var(correction=0).clamp(min=1e-12)
        unexplained = (returns - rollouts.values)[mask].var(correction=0) / spread
        advantages = whiten(advantages, mask)
        metrics = rollouts.metrics(kl_coef)
        run.add(metrics | {"val/explained_variance": 1 - unexplained[None]})
        run.add({"objective/kl_coef": torch.tensor([kl_coef], dtype=torch.float64)})
        means = {name: float(x.mean()) for name, x in metrics.items()}
        show(run, rollouts, tokenizer)
        found = alarms(means, kept.setdefault("first", means))
        for alarm in found:
            if alarm.split()[0] not in kept.get("alarmed", []):  # said once, until it is over
                run.print(f"step {run.step + 1}: alarm: {alarm}")
        kept["alarmed"] = [alarm.split()[0] for alarm in found]
        if args.kl_target:
            kept["kl_coef"] = next_kl_coef(
                kl_coef, means["objective/kl"], args.kl_target, args.kl_horizon, len(prompts)
            )

        # 5. Learn from the batch several times.
        lengths = [row.length() for row in rows.rows]
        for epoch in range(args.ppo_epochs):
            for at, micros in enumerate(minibatches(lengths, epoch) if epoch else first_epoch):
                tokens = sum(int(mask[part].sum()) for part in micros)  # over all processes
                for part in micros[run.rank :: run.world]:
                    micro = run.count(common.collate(rows, part, run.device))
                    logps = common.response_token_logps(policy, micro, args.temperature)[:, 0]
                    values = scoring.token_values(value_model, micro)[:, 0]  # (B, T)
                    old_logps, here_advantages, old_values, here_returns = (
                        x[part, : logps.shape[1]].to(logps)
                        for x in (rollouts.logps, advantages, rollouts.values, returns)
                    )
                    here = mask[part, : logps.shape[1]].to(run.device)
                    losses, metrics = ppo_loss(
                        logps, old_logps, here_advantages, values, old_values, here_returns, here,
                        args.clip_range, args.value_clip_range, args.value_weight,
                    )  # fmt: skip
                    (losses.sum() / tokens).backward()
                    run.add(metrics)
                    if epoch == at == 0:
                        off = (logps.detach() - old_logps).expm1().abs()[here].max().item()
                        if off > 0.01:  # of the main process's answers
                            run.print(
                                f"step {run.step + 1}: ratios {off:.3f} off 1 before any update"
                            )
                last = epoch == args.ppo_epochs - 1 and at == args.minibatches - 1
                run.update(models, optimizer, last)
    evaluate()
    run.finish(policy, tokenizer)


def show(run: common.Run, rollouts: Rollouts, tokenizer) -> None:
    """A few answers of every step, to rollouts.jsonl: what the scores do not say."""
    kl = (rollouts.logps - rollouts.ref_logps).sum(1)
    records = [
        {
            "step": run.step + 1,
            "prompt": tokenizer.decode(row.prompt),
            "response": generation.text_of(row.responses[0], tokenizer),
            "score": float(rollouts.scores[i]),
            "kl": float(kl[i]),
            "ended": bool(rollouts.ended[i]),
        }
        for i, row in enumerate(rollouts.rows.rows[:SHOWN])
    ]
    run.append("rollouts.jsonl", records)


if __name__ == "__main__":
    main(common.command_line(Args, __doc__))
