"""GRPO: Group Relative Policy Optimization. Shao et al. 2024, arXiv 2402.03300 (DeepSeekMath). And what DAPO (Yu et al. 2025, arXiv
2503.14476) and Dr. GRPO (Liu et al. 2025, arXiv 2503.20783) changed in it: --clip-high, --normalise.

    A_i    = ( r_i - mean of r_1 ... r_G ) / ( their standard deviation )                                           section 4.1.2
    L      = - E_i [ 1/|o_i| sum over t of ( min( rho_it A_i, clip(rho_it, 1 - eps, 1 + eps) A_i ) - beta D_it ) ]         eq. 3
    rho_it = pi(o_it|s_it) / pi_old(o_it|s_it),     D_it = ref/pi - log(ref/pi) - 1,  of o_it given s_it                   eq. 4

Sample a group of G answers to a question, score them, and raise the probability of every token of an answer by how many
standard deviations its score lies above the mean of its group. PPO asks a second network, token by token, what was to be
expected; here that mean says it. The KL is not in the reward but a term of the loss, D (k3): an estimate from one token that
is never negative. Its gradient goes through the policy of now and sees only the token that it is of: on average over these, it is that of
KL(ref || pi), not of KL(pi || ref). Where all scores of a group are equal, nothing but that is learned from it: val/equal_groups is their
share.

    paper                    here
    q, o_i, s_it, G          a prompt, an answer, the prompt and what precedes o_it, samples: answers to one prompt, a group
    pi, pi_old, ref          logps, old_logps, ref_logps: (N, T), one a token, all at the temperature of sampling
    r                        scores, (N,): what --reward gives to the whole answer
    A                        advantages, (N,), the same for all tokens of an answer: group_advantages()
    eps                      clip_low and clip_high: 0.2 and 0.28 in DAPO, so that rare tokens may become likelier
    beta, D                  kl_coef, loss/kl
    E_i, 1/|o_i|             token_weights(): means over a minibatch, on all processes

--normalise says (a) what advantages are divided by, (b) what a token weighs, where an update has N answers; people argue about both.
    grpo       (a) the group's deviation, so that groups count alike whether scores differ much or hardly;
               (b) 1 / (N |o_i|): an answer counts once, a token of a long one less, so that long bad answers get off lightly
    dapo       (a) the same;   (b) 1 / (tokens of all N): a token counts once, a long answer more than a short one
    dr-grpo    (a) nothing;    (b) 1 / (N L), L the tokens that an answer may have: a constant. But for constants, and but for the
               KL, this is the gradient of rloo.py: it has no bias by length or by difficulty

Options and departures
1. The paper does not say which deviation: here it is that of a sample, over G - 1, as in TRL and verl, and 1e-4 is added, so that
   scores that differ by rounding are no advantage. A group with less counts as equal; it stays in the batch (DAPO samples
   until no group of a batch is).
2. --kl-coef 0, as in DAPO and Dr. GRPO, loads no reference and plots no KL (with --ref-model it does): their reward is a rule,
   which can hardly be cheated. With a reward model keep a KL. Advantages being in deviations, its weight has no unit
   of the reward; and where scores are nearly equal the KL gives way to them.
3. DAPO's equation averages over the tokens of a group, its code over those of a minibatch: so does this. Its soft penalty for
   overlong answers belongs into a --reward of yours. Dr. GRPO's L is --max-length - --max-prompt-length.
4. An answer ends where its end-of-sequence was sampled. One that has no end after --max-length - --max-prompt-length tokens
   gets the score -missing_eos_value instead of its own ("subtract" takes it off), as in ppo.py; the papers have no such rule.
5. pi_old is asked for by the forward pass of training, in the very micro-batches of the first epoch, not kept from sampling:
   in the first minibatch the ratio is 1, in fp32 exactly. A warning comes above 0.01. The reference stays fixed: the paper's
   outer iterations, each with the last policy as its reference, are further runs.
6. --batch-size counts prompts, so a step has samples times as many answers. --micro-batch-size counts answers, and divides a
   process's share of the prompts: the answers of a group may be learned from apart, their advantages are found before.

Healthy: objective/scores rises and objective/kl with it (`tiny`: to 3.5 nats an answer, of 5 tokens, 2.5 of them in 15 of 30 steps);
policy/clipfrac is 0 with one update a batch; val/equal_groups stays low (`tiny`: below 0.2; with --reward family about 0.3): at 1
there is nothing left to learn. loss/policy is a mean over tokens, near 0. An alarm
is printed when the KL exceeds one nat a token, when answers get twice or half as long, when entropy falls to a fifth or doubles:
then read rollouts.jsonl, where groups stand together. Scores that rise while objective/gold falls are over-optimisation: raise
--kl-coef, or stop earlier. Answers that only get longer may be the length bias of `grpo` (`tiny`: from 3.3 to 4.9 tokens; with
--normalise dr-grpo to 3.9, for the same true reward, and less than half the KL).

    python grpo.py                                                           # the embedded task and its learned reward, on a laptop
    torchrun --nproc_per_node=4 grpo.py --fsdp --model runs/sft-model-gemma-2-2b --dataset tldr --reward runs/reward_model-...   # after sft.py, reward_model.py
    python grpo.py --model runs/sft-... --dataset rows.jsonl --reward judge.py:score    # {"prompt"}; score(prompts, responses) -> numbers

Copyright (c) 2026 the plainpref authors. MIT licence. Tested with torch 2.13 and transformers 5.23.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

import common
import generation
import scoring

# What a flag that was left out becomes, and where the numbers are from (micro-batches are ours): by
# the last part of the model's name, in small letters; a folder that a run of ours saved has the row of
# the model it began from. A model without a row takes the first one after `tiny`, and the run says so.
SETTINGS = {
    "tiny": {
        "reward": "tiny-preferred@tiny", "gold_reward": "family", "samples": 8, "kl_coef": 0.1, "normalise": "grpo", "clip_high": 0.2,
        "batch_epochs": 1, "minibatches": 1, "temperature": 1.0, "adam_eps": 1e-8,
        "lr": 4e-4, "batch_size": 16, "micro_batch_size": 16, "max_steps": 30,
        "schedule": "linear", "warmup_ratio": 0.05, "optimizer": "adamw", "max_grad_norm": 1.0,
        "max_length": 176, "max_prompt_length": 160, "dataset": "family", "source": "tuned here",
    },
    "deepseek-math-7b-instruct": {  # 1024 answers a batch, one update
        "samples": 64, "kl_coef": 0.04, "normalise": "grpo", "clip_high": 0.2,
        "batch_epochs": 1, "minibatches": 1, "temperature": 1.0, "adam_eps": 1e-8,
        "lr": 1e-6, "batch_size": 16, "micro_batch_size": 4, "epochs": 1.0,
        "schedule": "constant", "warmup_ratio": 0.0, "optimizer": "adamw", "max_grad_norm": 1.0,
        "max_length": 1024, "max_prompt_length": 512,
        "source": "samples, KL, lr, batch, length: Shao et al. 2024, section 4.2; the rest is ours",
    },
    "qwen2.5-32b": {  # DAPO: 8192 answers a batch, 512 an update
        "samples": 16, "kl_coef": 0.0, "normalise": "dapo", "clip_high": 0.28,
        "batch_epochs": 1, "minibatches": 16, "temperature": 1.0, "adam_eps": 1e-8,
        "lr": 1e-6, "batch_size": 512, "micro_batch_size": 1, "max_steps": 320,
        "schedule": "constant", "warmup_ratio": 0.0625, "optimizer": "adamw", "max_grad_norm": 1.0,
        "max_length": 22528, "max_prompt_length": 2048,
        "source": "Yu et al. 2025, arXiv 2503.14476, section 4.1 and their script; the number of steps is ours",
    },
    "qwen2.5-math-7b": {  # Dr. GRPO: 1024 answers a batch, 128 an update
        "samples": 8, "kl_coef": 0.0, "normalise": "dr-grpo", "clip_high": 0.2,
        "batch_epochs": 1, "minibatches": 8, "temperature": 1.0, "adam_eps": 1e-8,
        "lr": 1e-6, "batch_size": 128, "micro_batch_size": 1, "epochs": 20.0,
        "schedule": "constant", "warmup_ratio": 0.0, "optimizer": "adamw", "max_grad_norm": 1.0,
        "max_length": 4024, "max_prompt_length": 1024,
        "source": "Liu et al. 2025, arXiv 2503.20783: their script; warm-up, adam_eps and gradient norm are ours",
    },
}  # fmt: skip
EVALUATED = 256  # held-out prompts that an evaluation samples answers to
SHOWN = 4  # rollouts of a step that go to rollouts.jsonl


# fmt: off
@dataclass
class Args:
    # GRPO
    reward: str | None = None  # what scores answers: a reward model's folder or hub id, two language models a@b, family (the true reward), or file.py:function; default: SETTINGS
    gold_reward: str | None = None  # another one, only measured, on held-out prompts: shows when the reward is being cheated; default: SETTINGS, else none
    samples: int | None = None  # G, answers to a prompt, 2 or more; default: SETTINGS
    normalise: Literal["grpo", "dapo", "dr-grpo"] | None = None  # grpo: by the group's deviation, every answer weighs the same; dapo: by it, every token; dr-grpo: not by it, every token, by a constant; default: SETTINGS
    kl_coef: float | None = None  # beta, of the KL in the loss; 0: no reference is loaded, unless --ref-model is given: then it is measured; default: the model's row in SETTINGS
    temperature: float | None = None  # of sampling, and of every log-prob; default: SETTINGS
    missing_eos: Literal["replace", "subtract", "keep"] = "replace"  # what becomes of the score of an answer without an end
    missing_eos_value: float = 1.0  # it is -1 with replace, 1 lower with subtract
    batch_epochs: int | None = None  # how often a batch is learned from; default: SETTINGS
    minibatches: int | None = None  # optimizer steps in each of these epochs; default: SETTINGS
    clip_low: float = 0.2  # how far a token's ratio may go below 1
    clip_high: float | None = None  # how far above it (DAPO: 0.28); default: SETTINGS
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
    batch_size: int | None = None  # prompts per step, over all processes: --samples answers are sampled to each; default: SETTINGS
    micro_batch_size: int | None = None  # rows per forward pass and process; default: the largest that fits SETTINGS
    epochs: float | None = None  # passes over the rows; default: SETTINGS
    max_steps: int | None = None  # batches of samples, instead of epochs; each is learned from in one optimizer step or more; default: SETTINGS
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


def group_advantages(
    scores: Tensor,  # (N,) a group is `samples` in a row
    samples: int,
    normalise: str,
    eps: float = 1e-4,
) -> tuple[Tensor, Tensor]:
    """(N,) each less the mean of its group, in deviations; (groups,) bool: there is nothing to learn."""
    groups = scores.view(-1, samples)
    centered = groups - groups.mean(1, keepdim=True)
    deviations = groups.std(1, correction=1, keepdim=True)
    advantages = centered if normalise == "dr-grpo" else centered / (deviations + eps)
    return advantages.flatten(), deviations[:, 0] < eps


def token_weights(
    lengths: Tensor,  # (N,) tokens of some answers
    normalise: str,
    answers: int,  # of the whole update, over all processes
    tokens: int,  # of these
    longest: int,  # tokens that an answer may have
) -> Tensor:
    """(N,) what each token of these answers weighs in the update's loss."""
    one_in = {
        "grpo": answers * lengths,  # a mean over an answer's tokens, then over answers
        "dapo": torch.full_like(lengths, tokens),
        "dr-grpo": torch.full_like(lengths, answers * longest),
    }
    return 1 / one_in[normalise].double()


def grpo_loss(
    logps: Tensor,  # (N, T) log pi of every answer token
    old_logps: Tensor,  # (N, T) the same when the answers were sampled
    ref_logps: Tensor | None,  # (N, T) under the reference; None: there is no KL
    advantages: Tensor,  # (N,)
    mask: Tensor,  # (N, T) bool
    kl_coef: float,
    clip_low: float,
    clip_high: float,
) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
    """Returns one loss per answer token, and what to plot: (values, weights) is a weighted mean."""
    inside = lambda x: x.masked_fill(~mask, 0.0)  # noqa: E731
    advantages = inside(advantages.detach()[:, None].expand_as(logps))  # (N, T)
    log_ratios = inside(logps) - inside(old_logps.detach())
    ratios = torch.exp(log_ratios)
    clipped = ratios.clamp(1 - clip_low, 1 + clip_high)
    policy_losses = torch.max(-advantages * ratios, -advantages * clipped)
    losses, of = policy_losses, lambda x: (inside(x.to(logps.dtype)), mask)
    metrics = {
        "loss/policy": of(policy_losses),
        "policy/clipfrac": of(-advantages * clipped > -advantages * ratios),
        "policy/approxkl": of(0.5 * log_ratios**2),
        "val/ratio": of(ratios),
    }
    if ref_logps is not None:
        from_ref = inside(logps) - inside(ref_logps.detach())
        kl = torch.exp(-from_ref) - 1 + from_ref  # k3; its gradient is the policy's of now
        losses = policy_losses + kl_coef * kl
        metrics["loss/kl"] = of(kl)
    return losses, metrics


@dataclass
class Groups:
    """Answers sampled by the policy, on every process all of them, those to a prompt in a row."""

    rows: common.Rows  # a prompt and its answer, as token ids
    mask: Tensor  # (N, T) bool
    logps: Tensor  # (N, T) float64, which holds fp32 exactly
    ref_logps: Tensor | None  # (N, T)
    scores: Tensor  # (N,) of the reward, after --missing-eos
    ended: Tensor  # (N,) bool

    def metrics(self) -> dict[str, Tensor]:
        """One value an answer."""
        found = {
            "objective/scores": self.scores,
            "objective/entropy": -self.logps.sum(1),  # an estimate: of what was sampled
            "length/response": self.mask.sum(1).double(),
            "val/ended": self.ended.double(),
        }
        if self.ref_logps is not None:
            found["objective/kl"] = (self.logps - self.ref_logps).sum(1)
        return found


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
    for name in "temperature batch_epochs minibatches clip_low clip_high adam_eps".split():
        if not 0 < getattr(args, name) < float("inf"):
            raise common.UserError(
                f"{common.flag(name)} must be positive, got {getattr(args, name)}"
            )
    for name in "kl_coef missing_eos_value".split():
        if not 0 <= getattr(args, name) < float("inf"):
            raise common.UserError(
                f"{common.flag(name)} must be 0 or more, got {getattr(args, name)}"
            )
    if args.samples < 2:
        raise common.UserError(
            f"--samples must be 2 or more, got {args.samples}: one has no others"
        )
    if not args.dataset:
        raise common.UserError(
            "--dataset is needed: rows with a prompt, such as questions of GSM8K"
        )
    common.check_reference(args.ref_model, args.soup_weight)
    scoring.check_reward(args.reward)
    if args.gold_reward:
        scoring.check_reward(args.gold_reward, "--gold-reward")
    tokenizer = common.load_tokenizer(args.model, args.max_length)
    train, held_out = common.load_rows(
        args.dataset, args.eval_dataset, "prompt", tokenizer, args.max_length,
        args.max_prompt_length, skip_bad_rows=args.skip_bad_rows, cache_dir=args.cache_dir,
    )  # fmt: skip
    room = args.max_length - args.max_prompt_length  # tokens of an answer
    run.plan(train, args.minibatches)

    # Three models. One is trained: fp32 weights, gradients, optimizer state. Two are only asked.
    asked = dict(
        attn=args.attn, share_prompt=False, fused_logps=args.fused_logps, fsdp=args.fsdp,
        compile=args.compile,
    )  # fmt: skip
    trained = asked | dict(
        gradient_checkpointing=args.gradient_checkpointing, lora_rank=args.lora_rank
    )
    policy = common.load_policy(args.model, args.dtype, run, **trained, name="policy")
    common.warn_if_not_fine_tuned(policy, tokenizer)
    ref, as_reference = None, nullcontext  # what `ref` is asked in
    if args.ref_model:
        ref = scoring.freeze(common.load_reference(args.ref_model, args.soup_weight, policy, run))
    elif args.kl_coef and args.lora_rank:
        common.say("reference", "the policy without its adapters")
        ref, as_reference = policy, lambda: common.beside("adapters").off(policy)
    elif args.kl_coef:
        ref = scoring.freeze(
            common.load_policy(args.model, args.dtype, run, **asked, name="reference")
        )
    reward = scoring.load_reward(args.reward, tokenizer, run, args.dtype, args.attn, args.fsdp)
    gold = args.gold_reward and scoring.load_reward(
        args.gold_reward, tokenizer, run, args.dtype, args.attn, args.fsdp, "gold"
    )
    optimizer = common.make_optimizer(
        policy, args.optimizer, args.lr, args.weight_decay, args.adam_eps
    )
    run.restore(policy, optimizer)
    kept = run.kept  # what a resumed run goes on with
    used = {args.model, *common.parts_of_soup(args.ref_model or args.model)}
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
    def roll_out(
        prompts: list[np.ndarray], seed: int, samples: int, deal: Callable
    ) -> tuple[Groups, list]:
        """`deal` makes of the answers' lengths a list of minibatches, each a list of micro-batches."""
        # 1. Sample answers to every prompt, at the temperature of all log-probs below.
        answers = generation.generate(
            policy, prompts, tokenizer.stop_ids, room, args.temperature, seed, run, samples=samples
        )
        prompts = [x for x in prompts for _ in range(samples)]
        pairs = zip(prompts, answers, strict=True)
        rows = common.Rows("rollouts", [common.Row(x, [y], x) for x, y in pairs])
        # 2. Score them. An answer without an end is a bad one, whatever the reward model says of it.
        ended = torch.tensor([int(y[-1]) in tokenizer.stop_ids for y in answers])
        replacement = -args.missing_eos_value if args.missing_eos == "replace" else None
        penalty = args.missing_eos_value if args.missing_eos == "subtract" else 0.0
        scores = final_scores(reward(prompts, answers), ended, replacement, penalty)
        # 3. Ask policy and reference for every token: by the forward pass of training.
        lengths = torch.tensor([len(y) for y in answers])
        mask = torch.arange(int(lengths.max())) < lengths[:, None]  # (N, T)
        known = torch.zeros(1 if ref is None else 2, *mask.shape, dtype=torch.float64)
        micros = deal([row.length() for row in rows.rows])
        for part, mine in run.share([micro for mini in micros for micro in mini], "log-probs"):
            micro = common.collate(rows, part, run.device)
            found = common.response_token_logps(policy, micro, args.temperature)  # (B, 1, T)
            if ref is not None:
                with as_reference():
                    ref_logps = common.response_token_logps(ref, micro, args.temperature)
                found = torch.cat([found, ref_logps], 1)
            if mine:
                known[:, part, : found.shape[2]] = found.transpose(0, 1).double().cpu()
        known = common.over_processes(known)
        logps, ref_logps = known if ref is not None else (known[0], None)
        return Groups(rows, mask, logps, ref_logps, scores, ended), micros

    def evaluate() -> None:
        if len(held_out) and run.held_out_due:
            questions = [row.prompt for row in held_out.rows[:EVALUATED]]
            deal = lambda lengths: [run.deal(lengths, list(range(len(lengths))))]  # noqa: E731
            seen, _ = roll_out(questions, common.hash_of(args.seed, -1), 1, deal)
            told = {name: float(x.mean()) for name, x in seen.metrics().items()}
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

        prompts = [train.rows[i].prompt for i in sorted(batch.rows)]
        seed = common.hash_of(args.seed, batch.step)
        groups, first_epoch = roll_out(
            prompts, seed, args.samples, lambda lengths: minibatches(lengths, 0)
        )
        rows, mask = groups.rows, groups.mask

        # 4. Advantages.
        metrics = groups.metrics()
        advantages, equal = group_advantages(groups.scores, args.samples, args.normalise)
        run.add(metrics | {"val/equal_groups": equal.double()})
        means = {"objective/kl": 0.0} | {name: float(x.mean()) for name, x in metrics.items()}
        told = {"score": groups.scores, "advantage": advantages, "ended": groups.ended}
        if ref is not None:
            told["kl"] = metrics["objective/kl"]
        show_groups(run, rows, told, tokenizer)
        found = alarms(means, kept.setdefault("first", means))
        for alarm in found:
            if alarm.split()[0] not in kept.get("alarmed", []):  # said once, until it is over
                run.print(f"step {run.step + 1}: alarm: {alarm}")
        kept["alarmed"] = [alarm.split()[0] for alarm in found]

        # 5. Learn from the batch, once or several times.
        lengths, tokens = [row.length() for row in rows.rows], mask.sum(1)
        for epoch in range(args.batch_epochs):
            for at, micros in enumerate(minibatches(lengths, epoch) if epoch else first_epoch):
                count = sum(map(len, micros))  # answers, over all processes
                total = sum(int(tokens[part].sum()) for part in micros)
                for part in micros[run.rank :: run.world]:
                    micro = run.count(common.collate(rows, part, run.device))
                    logps = common.response_token_logps(policy, micro, args.temperature)[:, 0]
                    old_logps = groups.logps[part, : logps.shape[1]].to(logps)
                    ref_logps = None
                    if ref is not None:
                        ref_logps = groups.ref_logps[part, : logps.shape[1]].to(logps)
                    here = mask[part, : logps.shape[1]].to(run.device)
                    losses, metrics = grpo_loss(
                        logps, old_logps, ref_logps, advantages[part].to(logps), here,
                        args.kl_coef, args.clip_low, args.clip_high,
                    )  # fmt: skip
                    weights = token_weights(tokens[part], args.normalise, count, total, room)
                    loss = (losses * weights[:, None].to(logps)).sum()
                    loss.backward()
                    run.add(metrics | {"loss": (loss, torch.tensor(len(part) / count))})
                    if epoch == at == 0:
                        off = (logps.detach() - old_logps).expm1().abs()[here].max().item()
                        if off > 0.01:  # of the main process's answers
                            run.print(
                                f"step {run.step + 1}: ratios {off:.3f} off 1 before any update"
                            )
                last = epoch == args.batch_epochs - 1 and at == args.minibatches - 1
                run.update(policy, optimizer, last)
    evaluate()
    run.finish(policy, tokenizer)


def show_groups(run: common.Run, rows: common.Rows, told: dict[str, Tensor], tokenizer) -> None:
    """A few answers of every step, to rollouts.jsonl: what the scores do not say."""
    records = [
        {
            "step": run.step + 1,
            "prompt": tokenizer.decode(row.prompt),
            "response": generation.text_of(row.responses[0], tokenizer),
        }
        | {name: values[i].item() for name, values in told.items()}
        for i, row in enumerate(rows.rows[:SHOWN])
    ]
    run.append("rollouts.jsonl", records)


if __name__ == "__main__":
    main(common.command_line(Args, __doc__))
