"""Rewards: a reward model, two language models a@b, the embedded task's true reward, or your own
function.

A language model that learned from preferences is a reward model too (Rafailov et al. 2023, section
5): `--reward a@b` scores a response with beta (log a(y|x) - log b(y|x)), where b is the reference
that a was trained against and beta is that of a's training, if its config.json has it (else 1).
Such a score is known up to a constant per prompt.
"""

import sys
from collections.abc import Callable
from functools import partial
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import common
from data.models import model_folder, resolve_model
from family import task
from sampling.generate import text_of
from sampling.score_model import labels_of, load_score_model, score_rows
from training.checkpoint import file_hash
from training.parallel import Stopped

Ids = list[np.ndarray]  # token ids of prompts or of responses
RESPONSES_PER_ROW = 8  # that share one copy of their prompt, at most


class Reward:
    """Call it with the token ids of all prompts and responses, on every process. It returns (N,)
    float64 scores on the CPU, the same on every process, or ends the run if one is not finite.
    """

    def __init__(self, name: str, tokenizer: Any, run: common.Processes, flag: str = "--reward"):
        self.named, self.tokenizer, self.run = f"{flag} {name}", tokenizer, run
        self.function: Callable[[list[str], list[str]], list[float]] | None = None
        self.model: common.Policy | None = None  # a ScoreModel, or a of a@b
        self.other: common.Policy | None = None  # b of a@b
        self.beta = 1.0
        self.its_tokenizer: Any = None  # the model's, if it is not the policy's
        self.values_from: str | None = None  # what a value network can start from

    def __call__(self, prompts: Ids, responses: Ids) -> Tensor:
        if self.model is None:  # the main process calls the function: it need not know of others
            texts = self.texts(prompts, responses)
            scores = common.from_main(partial(self.ask_function, *texts))
            return torch.tensor(scores, dtype=torch.float64)
        scores = self.ask_model(prompts, responses)
        for i in (~scores.isfinite()).nonzero()[:1, 0].tolist():
            self.refuse(float(scores[i]), i, *self.texts(prompts, responses))
        return scores

    def texts(self, prompts: Ids, responses: Ids) -> tuple[list[str], list[str]]:
        """Return what the policy saw and wrote, without the first BOS and without the end."""
        start = len(self.tokenizer.bos)
        asked = [self.tokenizer.decode(prompt[start:]) for prompt in prompts]
        return asked, [text_of(response, self.tokenizer) for response in responses]

    def ask_model(self, prompts: Ids, responses: Ids) -> Tensor:
        if self.its_tokenizer:
            prompts, responses = self.as_its_tokens(prompts, responses)
        rows: list[common.Row] = []  # consecutive responses to a prompt share one copy of it
        for prompt, response in zip(prompts, responses, strict=True):
            full = not rows or len(rows[-1].responses) == RESPONSES_PER_ROW
            if full or not np.array_equal(rows[-1].prompt, prompt):
                rows.append(common.Row(prompt, [], prompt))
            rows[-1].responses.append(response)
        if not self.other:
            return score_rows(self.model, rows, self.run)
        logps = [
            score_rows(m, rows, self.run, common.response_logps) for m in (self.model, self.other)
        ]
        return self.beta * (logps[0] - logps[1])

    def as_its_tokens(self, prompts: Ids, responses: Ids) -> tuple[Ids, Ids]:
        """Encode the texts with the model's own tokenizer, for scoring only."""
        theirs, texts = self.its_tokenizer, self.texts(prompts, responses)
        asked, answers = (theirs(side, add_special_tokens=False).input_ids for side in texts)
        for answer, response in zip(answers, responses, strict=True):
            if not answer or int(response[-1]) in self.tokenizer.stop_ids:
                answer.append(theirs.eos_token_id)
        prompts = [np.array(theirs.bos + ids, np.int32) for ids in asked]
        return prompts, [np.array(ids, np.int32) for ids in answers]

    def ask_function(self, prompts: list[str], responses: list[str]) -> list[float]:
        try:
            answer = self.function(prompts, responses)
        except Stopped:  # by a signal
            raise
        except (Exception, SystemExit) as error:
            where = self.where_it_fails(prompts, responses)
            why = f"{type(error).__name__}: {error}"
            raise common.UserError(f"{self.named} raised {why}, {where}") from error
        try:
            scores = [float(score) for score in answer]
        except (TypeError, ValueError, OverflowError, RuntimeError):
            kind = type(answer).__name__
            message = f"{self.named} must return a list of numbers, this is a {kind}"
            raise common.UserError(message) from None
        if len(scores) != len(prompts):
            message = f"{self.named} returned {len(scores):,} scores for {len(prompts):,} rows"
            raise common.UserError(message)
        for i in (~np.isfinite(scores)).nonzero()[0][:1].tolist():
            self.refuse(scores[i], i, prompts, responses)
        return scores

    def where_it_fails(self, prompts: list[str], responses: list[str]) -> str:
        for i in range(len(prompts)):
            try:
                self.function(prompts[i : i + 1], responses[i : i + 1])
            except (Exception, SystemExit):
                return f"at {_row(i, prompts, responses)}"
        return f"on {len(prompts):,} rows together, on none of them alone"

    def refuse(self, score: float, i: int, prompts: list[str], responses: list[str]) -> None:
        row = _row(i, prompts, responses)
        raise common.UserError(f"{self.named} gave {score}, which is not finite, for {row}")


def _row(i: int, prompts: list[str], responses: list[str]) -> str:
    texts = f"prompt ...{prompts[i][-80:]!r}, response {responses[i][:80]!r}"
    return f"row {i + 1} of {len(prompts):,}: {texts}"


def load_reward(
    reward: str, tokenizer: Any, args: Any, run: common.Processes, name: str = "reward"
) -> Reward:
    """Load what `--reward` or `--{name}-reward` names; `tokenizer` is the policy's."""
    flag = "--reward" if name == "reward" else f"--{name}-reward"
    check_reward(reward, flag)
    found = Reward(reward, tokenizer, run, flag)
    file, _, function = reward.rpartition(":")
    if reward == "family" or file.endswith(".py"):

        def load() -> None:  # only on the main process, which calls it
            found.function = _function_of(file, function, found.named)

        common.from_main(load)
        common.say(name, "the true reward of the embedded task" if reward == "family" else reward)
        return found
    model, _, other = reward.partition("@")
    theirs = common.load_tokenizer(model)
    if other:
        both = [common.load_policy(args, run, x, name=name, frozen=True) for x in (model, other)]
        found.model, found.other = both
        second, sizes = common.load_tokenizer(other), {m.lm.config.vocab_size for m in both}
        if not reads_tokens_of(second, theirs) or len(second) != len(theirs) or len(sizes) > 1:
            raise common.UserError(f"{found.named}: the two models have different tokenizers")
        known = getattr(found.model.lm.config, "plainpref", None) or {}
        found.beta = float(known.get("beta", 1.0))
        unknown = "" if "beta" in known else " (its beta is not known)"
        common.say("", f"{found.beta} times the log-ratio of {model} to {other}{unknown}")
    elif (labels := labels_of(model, flag)) != 1:
        raise common.UserError(
            f"{found.named}: not a reward model, which is an AutoModelForSequenceClassification "
            f"with one label (this has {labels}). reward_model.py makes one; two language models "
            "a@b can score too"
        )
    else:
        found.model = load_score_model(args, run, model, name=name, frozen=True)
    if not reads_tokens_of(theirs, tokenizer):
        found.its_tokenizer = theirs
        common.say("", "has another tokenizer: it reads the texts, special tokens included")
    elif not other:
        found.values_from = model
    return found


def reads_tokens_of(theirs: Any, tokenizer: Any) -> bool:
    """Whether a model with the tokenizer `theirs` understands the ids of `tokenizer`."""
    known = tokenizer.get_vocab().items() <= theirs.get_vocab().items()
    return known and theirs.bos == tokenizer.bos


def check_reward(reward: str, named: str = "--reward") -> None:
    """Refuse what cannot be a reward, before anything is loaded."""
    file = reward.rpartition(":")[0]
    if file.endswith(".py"):
        if not Path(file).expanduser().is_file():
            raise common.UserError(f"{named} {reward}: there is no file {file}")
    elif reward.endswith(".py"):
        raise common.UserError(f"{named} {reward}: which function of it? {reward}:NAME")
    elif reward != "family":
        for model in reward.split("@", 1):
            resolve_model(model, named)


def _function_of(file: str, name: str, named: str) -> Callable[[list[str], list[str]], list[float]]:
    if not file:
        return task.reward
    spec = spec_from_file_location(f"reward:{Path(file).stem}", Path(file).expanduser())
    module = sys.modules[spec.name] = module_from_spec(spec)  # where data classes look
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        why = f"{type(error).__name__}: {error}"
        raise common.UserError(f"{named}: importing it raised {why}") from error
    if not callable(found := getattr(module, name, None)):
        raise common.UserError(f"{named}: there is no function {name} in {file}")
    return found


def contents_of(name: str) -> dict[str, str]:
    """Return file -> hash for all files of a model or reward; empty for a hub id."""
    found = {Path(task.__file__ if name == "family" else name.rpartition(":")[0]).expanduser()}
    for part in (name, *name.split("@")):
        for pattern in ("*.safetensors", "*config.json", "tokenizer.json"):
            found.update(model_folder(part).glob(pattern))
    return {str(file): file_hash(file) for file in sorted(found) if file.is_file()}
