"""Rollouts: what online methods share and no paper has an opinion about.

A method file shows its stages: sample, score, log-probs, advantages, update. Here are the parts
that are the same in all of them: models and their checks, sampled responses and what is known of
their tokens, the order of minibatches, alarms, evaluation on held-out prompts.
"""

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

import common
from data.models import resolve_model
from sampling.generate import bytes_of, fitting, generate, text_of
from sampling.masked import MaskedPolicy, MaskingPolicy
from sampling.rewards import check_reward, load_reward, reads_tokens_of
from sampling.score_model import ScoreModel, fresh_head, labels_of, load_score_model
from training import evaluation, gradients, lora, reference
from training.parallel import hash_of, snake_order

EVALUATED = 256  # held-out prompts that an evaluation samples a response to
SHOWN = 4  # responses of a step that go to rollouts.jsonl
RATIO_ERROR = 0.01  # before any update; rounding in bfloat16 stays below it


def check_args(args: common.Args, positive: str) -> None:
    """Refuse values that cannot work, before anything is loaded. (Run refuses negative ones.)"""
    if not args.reward:
        kinds = "a reward model (reward_model.py makes one), a@b, family, or file.py:function"
        raise common.UserError(f"--reward is needed: {kinds}")
    for name in positive.split():
        if not getattr(args, name):
            raise common.UserError(f"--{name.replace('_', '-')} must be positive")
    if getattr(args, "samples", 2) < 2:
        raise common.UserError(f"--samples must be 2 or more, got {args.samples}")
    check_reward(args.reward)
    # `none` turns off the gold reward of a preset, which is that of the embedded task.
    other_task = args.gold_reward == "family" and (args.dataset or "").split(":")[0] != "family"
    of_preset = "gold_reward" not in getattr(args, "given", ["gold_reward"])
    if args.gold_reward == "none" or (other_task and of_preset):
        args.gold_reward = None
    if args.gold_reward:
        check_reward(args.gold_reward, "--gold-reward")
    if getattr(args, "value_model", None):
        resolve_model(args.value_model, "--value-model")


@dataclass
class Rollout:
    """Sampled responses, all of them on every process; those to one prompt are consecutive."""

    rows: list[common.Row]  # a prompt and its response, as token ids
    mask: Tensor  # (N, T) bool: the tokens of each response
    ended: Tensor  # (N,) bool: the response has an end-of-sequence token
    scores: Tensor | None = None  # (N,) float64
    logps: Tensor | None = None  # (N, T) float64
    ref_logps: Tensor | None = None  # (N, T)
    values: Tensor | None = None  # (N, T)
    masked_logps: Tensor | None = None  # (N, T) if they were sampled with a mask (nlpo.py)

    @property
    def prompts(self) -> list[np.ndarray]:
        return [row.prompt for row in self.rows]

    @property
    def responses(self) -> list[np.ndarray]:
        return [row.responses[0] for row in self.rows]

    @property
    def sampled_logps(self) -> Tensor:
        return self.logps if self.masked_logps is None else self.masked_logps

    def metrics(self, kl_coef: float | None = None) -> dict[str, Tensor]:
        """One value per response. With `kl_coef` also the score less the weighted KL."""
        metrics = {
            "objective/scores": self.scores,
            "length/response": self.mask.sum(1).double(),
            "val/ended": self.ended.double(),
        }
        if self.logps is not None:
            # An estimate, from these samples.
            metrics["objective/entropy"] = -self.sampled_logps.sum(1)
        if self.ref_logps is not None:
            metrics["objective/kl"] = (self.logps - self.ref_logps).sum(1)
        if kl_coef is not None:
            metrics["objective/rlhf_reward"] = self.scores - kl_coef * metrics["objective/kl"]
        return metrics

    def part(self, indexes: list[int], like: Tensor, *tensors: Tensor) -> list[Tensor]:
        """The mask and `tensors` ((N,) or (N, T)) of some responses, cut to the T of `like`."""
        cut = lambda x: x[indexes] if x.dim() == 1 else x[indexes, : like.shape[1]]  # noqa: E731
        return [cut(self.mask).to(like.device), *(cut(x).to(like) for x in tensors)]


class Online:
    """The models of an online method. The policy is trained, the others are frozen.

    A reference is loaded if `with_reference` or --ref-model asks for one. With adapters it is the
    policy without them.
    """

    def __init__(self, args: common.Args, run: common.Run, tokenizer, *, with_reference=True):
        self.args, self.run, self.tokenizer = args, run, tokenizer
        masks = getattr(args, "top_p", 1.0) < 1  # nlpo.py
        make = MaskedPolicy if masks else common.Policy
        self.policy, self.masking = common.load_policy(args, run, name="policy", make=make), None
        if masks:
            self.masking = common.load_policy(args, run, name="masking", make=MaskingPolicy)
        self.reference, self._as_reference = None, nullcontext  # around its forward pass
        if getattr(args, "ref_model", None):
            self.reference = reference.load(args, run, common.load_policy, self.policy.config)
        elif with_reference and args.lora_rank:
            common.say("reference", "the policy without its adapters")
            self.reference, self._as_reference = self.policy, lambda: lora.off(self.policy.lm)
        elif with_reference:
            self.reference = common.load_policy(args, run, name="reference", frozen=True)
        self.reward, self.gold = load_reward(args.reward, tokenizer, args, run), None
        if args.gold_reward:
            self.gold = load_reward(args.gold_reward, tokenizer, args, run, "gold")
        caches = 1 + bool(self.masking)
        at_once = args.sample_batch_size or fitting(self.policy, args.max_length, caches)
        at_once = max(at_once, getattr(args, "samples", 1))  # those to a prompt are together
        most = at_once * caches * bytes_of(self.policy, args.max_length) / 2**30
        common.say("sampling", f"at most {at_once} answers at once, {most:.2f} GiB")
        # A checkpoint is refused if one of these has changed since. (A function may be corrected.)
        if getattr(args, "ref_model", None):
            run.made_from["--ref-model"] = self.reference.digest
        scorers = [model for model in (self.reward.model, self.reward.other) if model]
        run.made_from["--reward"] = " ".join(model.digest for model in scorers)

    def load_value_model(self, start: str) -> ScoreModel:
        """A value network, from a reward model or from a language model with a head of zeros."""
        if self.args.value_model:
            theirs = common.load_tokenizer(start)
            if not reads_tokens_of(theirs, self.tokenizer):
                raise common.UserError(f"--value-model {start} has another tokenizer than --model")
        value_model = load_score_model(self.args, self.run, start, name="value")
        if value_model.lm.get_input_embeddings().weight.shape[0] < len(self.tokenizer):
            raise common.UserError(f"--value-model {start} has a smaller vocabulary than --model")
        if not labels_of(start):
            fresh_head(value_model, std=0.0, seed=self.args.seed)
        return value_model

    @torch.no_grad()
    def sample(self, prompts: list[np.ndarray], samples: int, step: int) -> Rollout:
        """Responses at --temperature, of at most --max-length minus --max-prompt-length tokens."""
        args, stop_ids, seed = self.args, self.tokenizer.stop_ids, hash_of(self.args.seed, step)
        self.run.tokens = 0  # `collate` counts what is learned from
        room = args.max_length - args.max_prompt_length
        responses = generate(
            self.policy, prompts, stop_ids, room, args.temperature, seed, self.run,
            args.sample_batch_size, samples=samples, masking=self.masking,
            top_p=getattr(args, "top_p", 1.0),
        )  # fmt: skip
        prompts = [prompt for prompt in prompts for _ in range(samples)]
        pairs = zip(prompts, responses, strict=True)
        rows = [common.Row(x, [y], x) for x, y in pairs]
        lengths = torch.tensor([len(y) for y in responses])
        mask = torch.arange(int(lengths.max())) < lengths[:, None]  # (N, T)
        return Rollout(rows, mask, torch.tensor([int(y[-1]) in stop_ids for y in responses]))

    def final_scores(self, rollout: Rollout) -> Tensor:
        """(N,) what --reward gives, and for a response without an end what --missing-eos says."""
        scores = self.reward(rollout.prompts, rollout.responses)
        value = self.args.missing_eos_value
        without_end = {"replace": torch.full_like(scores, -value), "subtract": scores - value}
        without_end = without_end.get(self.args.missing_eos, scores)
        return torch.where(rollout.ended, scores, without_end)

    def logps(self, rollout: Rollout, temperature: float) -> tuple[Tensor, Tensor | None]:
        """(N, T) log-probs of every token by the policy and by the reference, if there is one."""
        return self.policy_logps(rollout, temperature), self.reference_logps(rollout, temperature)

    def policy_logps(self, rollout: Rollout, temperature: float) -> Tensor:
        forward = partial(self.policy, temperature=temperature)
        return self.per_token(rollout, self.policy, forward)

    def reference_logps(self, rollout: Rollout, temperature: float) -> Tensor | None:
        if self.reference is None:
            return None
        forward = partial(self.reference, temperature=temperature)
        with self._as_reference():
            return self.per_token(rollout, self.reference, forward, "reference")

    @torch.no_grad()
    def per_token(
        self,
        rollout: Rollout,
        model: common.Policy,
        forward: Callable[[common.MicroBatch], Tensor],  # returns (B, K, T)
        label: str = "log-probs",
    ) -> Tensor:
        """(N, T) in float64, which holds float32 exactly.

        Micro-batches are those of the first epoch, so that the first update computes the very same
        numbers: its ratios are exactly 1 in float32.
        """
        found = torch.zeros(rollout.mask.shape, dtype=torch.float64)
        micro_batches = [one for several in self.minibatches(rollout) for one in several]
        for indexes, mine in self.run.share(micro_batches, label):
            batch = self.collate(rollout.rows, indexes, model)
            values = per_response(forward(batch), batch)  # (N, T)
            if mine:
                found[indexes, : values.shape[1]] = values.double().cpu()
        return common.sum_over_processes(found)

    def minibatches(self, rollout: Rollout, epochs: int = 1) -> list[list[list[int]]]:
        """The micro-batches of each minibatch, over all processes; in a new order each epoch.
        Responses to one prompt are next to each other, prompts with long responses come first.
        """
        args, found, prompts, longest = self.args, [], {}, {}
        for row in rollout.rows:
            prompts.setdefault(id(row.prompt), len(prompts))
            longest[id(row.prompt)] = max(longest.get(id(row.prompt), 0), row.length())
        names = [id(row.prompt) for row in rollout.rows]
        order = sorted(range(len(names)), key=lambda i: (-longest[names[i]], prompts[names[i]], i))
        place = {i: at for at, i in enumerate(order)}
        for epoch in range(epochs):
            random = np.random.default_rng([args.seed, self.run.step, epoch])
            # No rest in training (run.plan checks it); held-out prompts may have one.
            for part in np.array_split(random.permutation(len(names)), args.minibatches):
                ordered, size = sorted(part.tolist(), key=place.get), args.micro_batch_size
                parts = [ordered[at : at + size] for at in range(0, len(ordered), size)]
                found.append(snake_order(parts, self.run.world))
        gradients.backwards = len(found[0][self.run.rank :: self.run.world])
        return found

    def collate(
        self, rows: list[common.Row], indexes: list[int], model: common.Policy | None = None
    ) -> common.MicroBatch:
        """A micro-batch in which responses to one prompt share a copy of it, where that is cheaper.
        Without a `model` it is to learn from, and its tokens count for tokens_per_second.
        """
        groups: list[common.Row] = []
        for row in (rows[i] for i in indexes):
            if not groups or groups[-1].prompt is not row.prompt:
                groups.append(common.Row(row.prompt, [], row.question))
            groups[-1].responses.append(row.responses[0])
        if model is None:
            self.run.tokens += sum(row.tokens() for row in groups)
        return common.collate_for(model or self.policy, groups, list(range(len(groups))))

    def check_ratios(self, logps: Tensor, old_logps: Tensor, mask: Tensor) -> None:
        """Warn if ratios (B, T) of the first minibatch are not 1. Only the main process prints."""
        error = (logps.detach() - old_logps).expm1().abs()[mask].max().item()
        if error > RATIO_ERROR:
            self.run.print(f"step {self.run.step + 1}: ratios {error:.3f} off 1 before any update")

    def watch(self, rollout: Rollout, **values: Tensor) -> None:
        """Append a few responses with their (N,) values to rollouts.jsonl. Print new alarms."""
        run, metrics = self.run, rollout.metrics()
        values = {"score": rollout.scores, "ended": rollout.ended, **values}
        if "objective/kl" in metrics:
            values["kl"] = metrics["objective/kl"]
        records = []
        for i, row in enumerate(rollout.rows[:SHOWN]):
            response = text_of(row.responses[0], self.tokenizer)
            shown = {"prompt": self.tokenizer.decode(row.prompt), "response": response}
            shown |= {name: x[i].item() for name, x in values.items()}
            records.append({"step": run.step + 1, **shown})
        run.append("rollouts.jsonl", records)
        means = {name: float(x.mean()) for name, x in metrics.items()}
        found = alarms(means, run.state.setdefault("first", means))
        self.warn(found | nothing_to_learn(rollout, self.args))

    def warn(self, alarms: dict[str, str]) -> None:
        run = self.run
        for name, text in alarms.items():
            if name not in run.state.get("alarmed", []):  # once, until it is over
                run.print(f"step {run.step + 1}: alarm: {text}")
        run.state["alarmed"] = list(alarms)

    def evaluate(self, held_out: list, roll_out: Callable, metrics_of: Callable) -> None:
        """Sample a response to some held-out prompts and log metrics_of(roll_out(...))."""
        run = self.run
        run.num_held_out = min(len(held_out), EVALUATED)
        if held_out and run.due(self.args.eval_every):
            prompts = [row.prompt for row in held_out[:EVALUATED]]
            rollout = roll_out(prompts, samples=1, step=-1)
            metrics = {name: float(x.mean()) for name, x in metrics_of(rollout).items()}
            if self.gold:
                metrics["objective/gold"] = float(self.gold(prompts, rollout.responses).mean())
            evaluation.log_held_out(run, metrics)
        evaluation.greedy_samples(run, held_out, self.tokenizer)
        run.clock = time.perf_counter()  # the time of a step is without its evaluation


def per_response(values: Tensor, batch: common.MicroBatch) -> Tensor:
    """(N, ...) from (B, K, ...): the responses of a micro-batch in the order of its indexes."""
    return values.flatten(0, 1)[batch.lengths.flatten() > 0]


def nothing_to_learn(rollout: Rollout, args: common.Args) -> dict[str, str]:
    """Reasons why a step teaches nothing, by name, each with the flag to change."""
    found, samples = {}, getattr(args, "samples", 1)
    groups = rollout.scores.view(-1, samples)
    if not rollout.ended.any():
        room = args.max_length - args.max_prompt_length
        found["end"] = f"no response ended within {room} tokens: raise --max-length, or start from "
        found["end"] += "a model that was fine-tuned on answers (sft.py)"
    elif not (rollout.scores - rollout.scores[0]).any():
        found["reward"] = f"all {len(rollout.rows):,} scores are {rollout.scores[0]:g}, so that no "
        found["reward"] += f"response is better than another: look at --reward {args.reward}"
    elif samples > 1 and not (groups - groups[:, :1]).any():
        found["groups"] = "all responses to a prompt have equal scores: raise --temperature or "
        found["groups"] += "--samples, or use a --reward that tells them apart"
    return found


def alarms(now: dict[str, float], first: dict[str, float]) -> dict[str, str]:
    """Signs of a collapse, by name, in means over the responses of a step and of the first step."""
    length, start = now["length/response"], first["length/response"]
    kl, entropy = now.get("objective/kl", 0.0) / length, now["objective/entropy"] / length
    usual = max(first["objective/entropy"] / start, 1e-3)
    found = {}
    if kl > 1:
        found["KL"] = f"KL {kl:.2f} nats a token: the policy is far from its reference"
    if not start / 2 <= length <= start * 2:
        found["length"] = f"responses of {length:.1f} tokens, {start:.1f} in the first step"
    if not usual / 5 <= entropy <= usual * 2:
        found["entropy"] = f"entropy {entropy:.2f} nats a token, {usual:.2f} in the first step"
    return found
