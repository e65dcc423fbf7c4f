"""RLOO: REINFORCE with a leave-one-out baseline. Ahmadian, Cremer, Gallé, Fadaee, Kreutzer, Pietquin, Üstün, Hooker; 2024; arXiv 2402.14740.

    R_i  = score(x, y_i) - beta ( log pi_old(y_i|x) - log ref(y_i|x) )                       what a whole answer earns
    A_i  = R_i - 1/(k-1) sum over j != i of R_j                                              beyond the k - 1 others to the same prompt
    L    = - E_i [ A_i log pi(y_i|x) ]                                                       REINFORCE; with one update a batch, this is it
    here - E_i [ min( rho_i A_i, clip(rho_i, 1 - eps, 1 + eps) A_i ) ],    rho_i = pi(y_i|x) / pi_old(y_i|x)       for all updates

Sample k answers to a prompt, score them, and raise the probability of each in proportion to how much more than the others it
earned. PPO asks a second network what was to be expected; here the other answers say it. They were drawn without
knowing this one, so as a baseline they leave the gradient what it is on average, and only make it less noisy. A whole answer
is one action: all of its tokens share one advantage, and its KL is one number. There is no value network, discount, GAE or
whitening: the paper finds that policies which begin at a fine-tuned model do not need them.

    paper                    here
    x, y_i, k                a prompt, an answer sampled by the policy, samples: answers to one prompt, a group
    pi, pi_old, ref          logps, old_logps, ref_logps: (N, T), one a token, all at the temperature of sampling
    score                    scores, (N,): what --reward gives to the whole answer. R: objective/rlhf_reward
    beta                     kl_coef
    A                        advantages, (N,): leave_one_out()
    eps                      clip_range
    E_i                      mean over the answers of a minibatch, on all processes

The baseline is that of Kool, van Hoof, Welling 2019, "Buy 4 REINFORCE samples, get a baseline for free!".
As in ppo.py, `--ref-model a+b` makes the reference the weight average of two models (SALSA, arXiv 2411.01798).

Options and departures
1. The ratio rho is 1 in the first update of a batch, where both losses have one gradient, A_i grad log pi, and nothing is clipped.
   In further ones (--minibatches, --batch-epochs) REINFORCE would take its old answers for new ones; the ratio corrects
   that, and an answer whose probability went as far as the clip gets no more gradient, as in TRL. The paper takes two steps
   a batch, finds that clipping makes little difference in PPO, and has none here: --clip-range 1e9 comes near to that.
2. As leave-one-out advantages of a group sum to 0, so does the loss of one update: watch objective/scores instead.
3. An answer ends where its end-of-sequence was sampled. One that has no end after --max-length - --max-prompt-length tokens
   gets the score -missing_eos_value instead of its own ("subtract" takes it off), as in ppo.py; the paper has no such rule.
4. pi_old is asked for by the forward pass of training, in the very micro-batches of the first epoch, not kept from sampling:
   in the first minibatch the ratio is 1, in fp32 exactly. A warning comes above 0.01 a token.
5. --batch-size counts prompts, so a step has samples times as many answers. --micro-batch-size counts answers, and divides a
   process's share of the prompts: the answers of a group may be learned from apart, their advantages are found before.

Healthy: objective/scores rises and objective/kl with it (`tiny`: to 2 nats an answer, of 4 tokens, in the first 10 of 30 steps), then
both stay; objective/entropy falls (`tiny`: from 2.6 to 1.1 nats an answer); the loss is 0 and policy/clipfrac too, with one update
a batch. With several, clipfrac counts whole answers, and grows with their length: above 0.3, take fewer. An alarm is printed when the KL exceeds one nat
a token, when answers get twice or half as long, when entropy falls to a fifth or doubles: then read rollouts.jsonl, where groups
stand together. Scores that rise while objective/gold falls are over-optimisation: raise --kl-coef, or stop earlier.

    python rloo.py                                                           # the embedded task and its learned reward, on a laptop
    torchrun --nproc_per_node=4 rloo.py --fsdp --model runs/sft-model-gemma-2-2b --reward runs/reward_model-...   # after sft.py, reward_model.py
    python rloo.py --model runs/sft-... --dataset rows.jsonl --reward judge.py:score    # {"prompt"}; score(prompts, responses) -> numbers

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
        "reward": "tiny-preferred@tiny", "gold_reward": "family", "samples": 4, "kl_coef": 0.1, "batch_epochs": 1, "minibatches": 1,
        "temperature": 1.0, "adam_eps": 1e-8,
        "lr": 1e-3, "batch_size": 32, "micro_batch_size": 32, "max_steps": 30,
        "schedule": "linear", "warmup_ratio": 0.05, "optimizer": "adamw", "max_grad_norm": 1.0,
        "max_length": 176, "max_prompt_length": 160, "dataset": "family", "source": "tuned here",
    },
    "pythia-6.9b": {  # 512 answers a batch, 256 an update
        "samples": 4, "kl_coef": 0.03, "batch_epochs": 1, "minibatches": 2, "temperature": 1.0, "adam_eps": 1e-8,
        "lr": 1e-6, "batch_size": 128, "micro_batch_size": 8, "max_steps": 600,
        "schedule": "constant", "warmup_ratio": 0.03, "optimizer": "adamw", "max_grad_norm": 1.0,
        "max_length": 512, "max_prompt_length": 448, "dataset": "tldr",
        "source": "Ahmadian et al. 2024, section 4 (512 taken to be answers); temperature, adam_eps and gradient norm are ours",
    },
    "pythia-1b": {  # a million answers, 512 a batch
        "samples": 2, "kl_coef": 0.03, "batch_epochs": 2, "minibatches": 2, "temperature": 0.7, "adam_eps": 1e-5,
        "lr": 3e-6, "batch_size": 256, "micro_batch_size": 8, "max_steps": 1953,
        "schedule": "linear", "warmup_ratio": 0.0, "optimizer": "adamw", "max_grad_norm": 1.0,
        "max_length": 565, "max_prompt_length": 512, "dataset": "tldr",
        "source": "Putting RL back in RLHF, huggingface.co/blog, June 2024: its command for this model; the rest as in ppo.py",
    },
}  # fmt: skip
EVALUATED = 256  # held-out prompts that an evaluation samples answers to
SHOWN = 4  # rollouts of a step that go to rollouts.jsonl


# fmt: off
@dataclass
class Args:
    # RLOO
    reward: str | None = None  # what scores answers: a reward model's folder or hub id, two language models a@b, family (the true reward), or file.py:function; default: SETTINGS
    gold_reward: str | None = None  # another one, only measured, on held-out prompts: shows when the reward is being cheated; default: SETTINGS, else none
    samples: int | None = None  # k, answers to a prompt, 2 or more; default: SETTINGS
    kl_coef: float | None = None  # beta, per nat; default: the model's row in SETTINGS
    temperature: float | None = None  # of sampling, and of every log-prob; default: SETTINGS
    missing_eos: Literal["replace", "subtract", "keep"] = "replace"  # what becomes of the score of an answer without an end
    missing_eos_value: float = 1.0  # it is -1 with replace, 1 lower with subtract
    batch_epochs: int | None = None  # how often a batch is learned from; default: SETTINGS
    minibatches: int | None = None  # optimizer steps in each of these epochs; default: SETTINGS
    clip_range: float = 0.2  # how far the ratio of a whole answer may go from 1, after the first update of a batch
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


def leave_one_out(rewards: Tensor, samples: int) -> Tensor:
    """(N,) each less the mean of the others of its group; a group is `samples` in a row."""
    groups = rewards.view(-1, samples)
    others = (groups.sum(1, keepdim=True) - groups) / (samples - 1)
    return (groups - others).flatten()


def rloo_loss(
    logps: Tensor,  # (N, T) log pi of every answer token
    old_logps: Tensor,  # (N, T) the same when the answers were sampled
    advantages: Tensor,  # (N,)
    mask: Tensor,  # (N, T) bool
    clip_range: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns one loss per answer, and what to plot (one value per answer)."""
    inside = lambda x: x.masked_fill(~mask, 0.0)  # noqa: E731
    advantages = advantages.detach()
    log_ratios = (inside(logps) - inside(old_logps.detach())).sum(1)  # (N,) of whole answers
    ratios = torch.exp(log_ratios)
    clipped = ratios.clamp(1 - clip_range, 1 + clip_range)
    losses = torch.max(-advantages * ratios, -advantages * clipped)
    metrics = {
        "loss": losses,
        "policy/clipfrac": (-advantages * clipped > -advantages * ratios).to(logps.dtype),
        "policy/approxkl": 0.5 * log_ratios**2,
        "val/ratio": ratios,
    }
    return losses, metrics


@dataclass
class Answers:
    """Sampled by the policy, on every process all of them, those to a prompt in a row."""

    rows: common.Rows  # a prompt and its answer, as token ids
    mask: Tensor  # (N, T) bool
    logps: Tensor  # (N, T) float64, which holds fp32 exactly
    ref_logps: Tensor  # (N, T)
    scores: Tensor  # (N,) of the reward, after --missing-eos
    ended: Tensor  # (N,) bool

    def metrics(self, kl_coef: float) -> dict[str, Tensor]:
        """One value an answer."""
        kl = (self.logps - self.ref_logps).sum(1)  # (N,)
        return {
            "objective/scores": self.scores,
            "objective/kl": kl,
            "objective/rlhf_reward": self.scores - kl_coef * kl,
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
    for name in "temperature batch_epochs minibatches clip_range adam_eps".split():
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
    ) -> tuple[Answers, list]:
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
        known = torch.zeros(2, *mask.shape, dtype=torch.float64)
        micros = deal([row.length() for row in rows.rows])
        for part, mine in run.share([micro for mini in micros for micro in mini], "log-probs"):
            micro = common.collate(rows, part, run.device)
            logps = common.response_token_logps(policy, micro, args.temperature)  # (B, 1, T)
            with as_reference():
                ref_logps = common.response_token_logps(ref, micro, args.temperature)
            found = torch.cat([logps, ref_logps], 1)
            if mine:
                known[:, part, : found.shape[2]] = found.transpose(0, 1).double().cpu()
        known = common.over_processes(known)
        return Answers(rows, mask, *known, scores, ended), micros

    def evaluate() -> None:
        if len(held_out) and run.held_out_due:
            questions = [row.prompt for row in held_out.rows[:EVALUATED]]
            deal = lambda lengths: [run.deal(lengths, list(range(len(lengths))))]  # noqa: E731
            seen, _ = roll_out(questions, common.hash_of(args.seed, -1), 1, deal)
            told = {name: float(x.mean()) for name, x in seen.metrics(args.kl_coef).items()}
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
        answers, first_epoch = roll_out(
            prompts, seed, args.samples, lambda lengths: minibatches(lengths, 0)
        )
        rows, mask = answers.rows, answers.mask

        # 4. Rewards and advantages.
        metrics = answers.metrics(args.kl_coef)
        advantages = leave_one_out(metrics["objective/rlhf_reward"], args.samples)
        run.add(metrics)
        means = {name: float(x.mean()) for name, x in metrics.items()}
        told = {"score": answers.scores, "kl": metrics["objective/kl"], "advantage": advantages}
        show_groups(run, rows, told | {"ended": answers.ended}, tokenizer)
        found = alarms(means, kept.setdefault("first", means))
        for alarm in found:
            if alarm.split()[0] not in kept.get("alarmed", []):  # said once, until it is over
                run.print(f"step {run.step + 1}: alarm: {alarm}")
        kept["alarmed"] = [alarm.split()[0] for alarm in found]

        # 5. Learn from the batch, once or several times.
        lengths = [row.length() for row in rows.rows]
        for epoch in range(args.batch_epochs):
            for at, micros in enumerate(minibatches(lengths, epoch) if epoch else first_epoch):
                count = sum(map(len, micros))  # answers, over all processes
                for part in micros[run.rank :: run.world]:
                    micro = run.count(common.collate(rows, part, run.device))
                    logps = common.response_token_logps(policy, micro, args.temperature)[:, 0]
                    old_logps = answers.logps[part, : logps.shape[1]].to(logps)
                    here = mask[part, : logps.shape[1]].to(run.device)
                    losses, metrics = rloo_loss(
                        logps, old_logps, advantages[part].to(logps), here, args.clip_range
                    )
                    (losses.sum() / count).backward()
                    run.add(metrics)
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
