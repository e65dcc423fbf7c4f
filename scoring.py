"""What gives an answer a number: a reward model, the embedded task's true reward, a function of
yours. And what a reward model and a value network are: a decoder with a linear head that gives one
number, Transformers' AutoModelForSequenceClassification with one label.

    score of an answer      the head at its last token (its end-of-sequence, unless it was cut):
                            found from lengths, never by looking for padding
    value of a token        the head at the token before it: what was known when it was chosen

Transformers' head has no bias. What is subtracted so that the starting model's answers score 0 on
average stands in config.json (plainpref.score_bias) and is used here; other libraries read the same
scores without it, which moves no comparison of two answers.

Imported by what scores: reward_model.py, ppo.py, rso.py.
"""

import sys
from collections.abc import Callable, Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import common
import generation

Prompts = list[np.ndarray]  # of token ids
SCORED_AT_ONCE = 32  # answers of a micro-batch that is only scored: no gradients, so more fit

# --------------------------------------------------------------------------------------------------
# Models with a head that gives one number


def load_score_model(model: str, dtype: str, run: common.Processes, *how: Any, name: str) -> Any:
    """As common.load_policy, from a reward model or from a language model; `score` is the head."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()  # a language model has no such head: that is as it should be
    try:
        found = common.load_policy(model, dtype, run, *how, name=name, scores=True)
    finally:
        logging.set_verbosity(level)
    found.score_bias = float((getattr(found.config, "plainpref", None) or {}).get("score_bias", 0))
    return found


def labels_of(model: str, named: str = "--model") -> int:
    """How many numbers a model gives; 0: it is a language model."""
    if model == "tiny-untrained":
        return 0
    from transformers import AutoConfig

    load = AutoConfig.from_pretrained
    config = common._from_hub(lambda: load(common.resolve_model(model, named)), model, named)
    return config.num_labels if "SequenceClassification" in str(config.architectures) else 0


def response_scores(model: nn.Module, micro: common.Micro) -> Tensor:
    """(B, K) the score of every response; of those that are not there, any number."""
    return _through_head(model, micro, micro.ends.flatten()).view(micro.ends.shape)


def token_values(model: nn.Module, micro: common.Micro) -> Tensor:
    """(B, K, T) the value before every response token, 0 past the end of a response."""
    return common.by_response(_through_head(model, micro, micro.picked), micro)


def _through_head(model: nn.Module, micro: common.Micro, at: Tensor) -> Tensor:
    """(N,) in fp32 or better: 8 bits would make many answers equal."""

    def scores_of() -> Tensor:
        hidden = common.hidden_before_responses(model, micro, at)  # (N, H)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        with torch.autocast(model.device.type, enabled=False):
            return F.linear(hidden.to(wide), model.score.weight.to(wide))[:, 0] - model.score_bias

    with common.autocast(model):
        return model.during_forward(scores_of)


@torch.no_grad()
def fresh_head(model: nn.Module, std: float, seed: int) -> None:
    """Random numbers that depend on the seed alone (0: none), on every process the same."""
    weight, draw = model.score.weight, torch.Generator().manual_seed(seed)
    values = std * torch.randn(common.whole(weight).shape, generator=draw, dtype=torch.float64)
    if hasattr(weight, "full_tensor"):
        common.beside("sharding").put(weight, values)
    else:
        weight.copy_(values)
    model.score_bias = 0.0


def set_score_bias(model: nn.Module, bias: float, base_model: str) -> None:
    """What is subtracted from every score, kept in the model's config."""
    known = getattr(model.config, "plainpref", None) or {"base_model": base_model, "history": []}
    model.config.plainpref = {**known, "score_bias": bias}
    model.score_bias = bias


def give_pad_token(model: nn.Module, tokenizer: Any) -> None:
    """Other libraries find an answer's end by looking for what is not padding, so padding must not
    be what an answer ends with.
    """
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id in tokenizer.stop_ids:
        tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
        new = tokenizer.pad_token_id
        if new >= model.config.vocab_size:
            if hasattr(next(model.parameters()), "full_tensor"):
                raise common.UserError(
                    "--fsdp: this model has no padding token and no room for one, which a reward "
                    "model needs; without --fsdp it gets one"
                )
            model.resize_token_embeddings(new + 1, mean_resizing=False)
            with torch.no_grad():
                model.get_input_embeddings().weight[new] = 0
    model.config.pad_token_id = tokenizer.pad_token_id


def freeze(model: nn.Module) -> nn.Module:
    """To be asked only: no gradients, and matrices in the compute dtype. (Norms stay as they are,
    and so does the head of a reward model.) Autocast would leave embeddings as they are too: in
    bf16, the same model frozen and not frozen differ by up to 0.02 nats a token.
    """
    model.requires_grad_(False)
    spread = hasattr(next(model.parameters()), "full_tensor")  # put together low already
    if model.compute_dtype.itemsize < 4 and not spread:
        for name, p in model.named_parameters():
            if p.dim() > 1 and name != "score.weight":
                p.data = p.data.to(model.compute_dtype)
        # Hidden states between the layers stay fp32.
        model.get_input_embeddings().register_forward_hook(lambda _, ids, out: out.float())
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return model


# --------------------------------------------------------------------------------------------------
# Rewards


class Reward:
    """Called with token ids of prompts and answers on every process, with all rows; gives (N,)
    float64 on the CPU, the same on every process. A score that is none ends the run.
    """

    def __init__(self, name: str, tokenizer: Any, run: common.Processes):
        self.name, self.tokenizer, self.run, self.named = name, tokenizer, run, "--reward"
        self.model: nn.Module | None = None  # of a reward model
        self.same_tokens = True  # the reward model's tokenizer is the policy's
        self.function: Callable[[list[str], list[str]], list[float]] | None = None

    def __call__(self, prompts: Prompts, responses: Prompts) -> Tensor:
        if self.model is None:
            # By the main process alone: a function of yours need not know of the others.
            texts = self.texts(prompts, responses)
            scores = common.from_main(lambda: {"scores": self.ask_function(*texts)})["scores"]
            return torch.tensor(scores, dtype=torch.float64)
        scores = self.ask_model(prompts, responses)
        for i in (~scores.isfinite()).nonzero()[:1, 0].tolist():
            texts = self.texts(prompts[i : i + 1], responses[i : i + 1])
            raise common.UserError(self.refusal(float(scores[i]), i, len(scores), *texts))
        return scores

    def texts(self, prompts: Prompts, responses: Prompts) -> tuple[list[str], list[str]]:
        """As the policy saw and wrote them, without the first BOS and without the end."""
        start = len(self.tokenizer.bos)
        asked = [self.tokenizer.decode(prompt[start:]) for prompt in prompts]
        return asked, [generation.text_of(response, self.tokenizer) for response in responses]

    @torch.no_grad()
    def ask_model(self, prompts: Prompts, responses: Prompts) -> Tensor:
        if not self.same_tokens:
            prompts, responses = self.as_its_tokens(prompts, responses)
        pairs = zip(prompts, responses, strict=True)
        rows = common.Rows("scored", [common.Row(p, [y], p) for p, y in pairs])
        lengths = [row.length() for row in rows.rows]
        scores = torch.zeros(len(lengths), dtype=torch.float64)
        parts = common.micro_batches(lengths, list(range(len(lengths))), SCORED_AT_ONCE)
        for part, mine in self.run.share(parts, "scores"):
            micro = common.collate(rows, part, self.model.device)
            found = response_scores(self.model, micro)[:, 0].double().cpu()
            if mine:
                scores[part] = found
        if self.run.world > 1:
            torch.distributed.all_reduce(scores)
        return scores

    def as_its_tokens(self, prompts: Prompts, responses: Prompts) -> tuple[Prompts, Prompts]:
        """Only for scoring: what is trained on stays the ids that were sampled."""
        theirs, texts = self.its_tokenizer, self.texts(prompts, responses)
        ids = [theirs(side, add_special_tokens=False).input_ids if side else [] for side in texts]
        most = getattr(self.model.config, "max_position_embeddings", None) or sys.maxsize
        rows = ([], [])
        for prompt, answer, response in zip(*ids, responses, strict=True):
            ended = len(response) and int(response[-1]) in self.tokenizer.stop_ids
            answer = (answer + [theirs.eos_token_id] * bool(ended))[: most - 1]
            room = most - len(answer) - len(theirs.bos)
            prompt = theirs.bos + prompt[max(0, len(prompt) - room) :]
            rows[0].append(np.array(prompt, np.int32))
            rows[1].append(np.array(answer or [theirs.eos_token_id], np.int32))
        return rows

    def ask_function(self, prompts: list[str], responses: list[str]) -> list[float]:
        try:
            answer = self.function(prompts, responses)
            if isinstance(answer, Iterator):
                answer = list(answer)
        except Exception as error:
            raise common.UserError(self.where_it_fails(error, prompts, responses)) from error
        try:
            scores = [float(score) for score in answer]
        except (TypeError, ValueError, OverflowError, RuntimeError):
            found = type(answer).__name__
            raise common.UserError(
                f"{self.named} {self.name} must give a list of numbers, this is a {found}"
            ) from None
        if len(scores) != len(prompts):
            raise common.UserError(
                f"{self.named} {self.name} gave {len(scores):,} scores for {len(prompts):,} rows"
            )
        for i, score in enumerate(scores):
            if not np.isfinite(score):
                here = slice(i, i + 1)
                raise common.UserError(
                    self.refusal(score, i, len(scores), prompts[here], responses[here])
                )
        return scores

    def where_it_fails(self, error: Exception, prompts: list[str], responses: list[str]) -> str:
        """The first row that fails alone, if one does."""
        told = f"{self.named} {self.name} raised {type(error).__name__}: {common.first_line(error)}"
        for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            try:
                answer = self.function([prompt], [response])
                if isinstance(answer, Iterator):
                    list(answer)
            except Exception:
                return f"{told}, at {_row(i, len(prompts), prompt, response)}"
        return f"{told}, on {len(prompts):,} rows together, on none of them alone"

    def refusal(self, score: float, i: int, n: int, prompts: list[str], answers: list[str]) -> str:
        told = _row(i, n, prompts[0], answers[0])
        return f"{self.named} {self.name} gave {score}, which is no finite number, for {told}"


def _row(i: int, n: int, prompt: str, response: str) -> str:
    return f"row {i + 1} of {n:,}: prompt ...{prompt[-80:]!r}, response {response[:80]!r}"


def load_reward(
    reward: str,
    tokenizer: Any,  # the policy's
    run: common.Processes,
    dtype: str,
    attn: str = "auto",
    fsdp: bool = False,
    name: str = "reward",
) -> Reward:
    """A reward model's folder or hub id, `family`, or file.py:function."""
    found = Reward(reward, tokenizer, run)
    found.named = named = "--reward" if name == "reward" else f"--{name}-reward"
    file, _, function = reward.rpartition(":")
    if reward == "family":
        import family

        found.function = family.reward
        common.say(name, "family: the true reward of the embedded task")
    elif file.endswith(".py"):
        check_reward(reward, named)

        def load() -> dict:
            found.function = _function_of(file, function)
            return {}

        common.from_main(load)
        common.say(name, f"{function} of {file}, called by the main process")
    else:
        if (labels := labels_of(reward, named)) != 1:
            raise common.UserError(
                f"{named} {reward}: not a reward model, which is an AutoModelForSequence"
                f"Classification with one label (this has {labels}); reward_model.py makes one"
            )
        model = load_score_model(reward, dtype, run, attn, False, True, fsdp, name=name)
        found.model = freeze(model)
        theirs = common.load_tokenizer(reward, 1)
        found.its_tokenizer = theirs
        same = tokenizer.get_vocab().items() <= theirs.get_vocab().items()
        found.same_tokens = same and theirs.bos == tokenizer.bos
        if not found.same_tokens:
            common.say("", "has another tokenizer: reads the text of prompts and answers")
            if tokenizer.chat_template:
                common.say("", "as the policy's chat template wrote it, special tokens included")
    return found


def check_reward(reward: str, named: str = "--reward") -> None:
    """Named before anything is loaded."""
    file, _, function = reward.rpartition(":")
    if reward == "family":
        return
    if file.endswith(".py"):
        if not Path(file).expanduser().is_file():
            raise common.UserError(f"{named} {reward}: there is no file {file}")
        if not function.isidentifier():
            raise common.UserError(f"{named} {reward}: {function!r} is no name of a function")
    elif reward.endswith(".py"):
        raise common.UserError(f"{named} {reward}: which function of it? {reward}:NAME")
    else:
        common.resolve_model(reward, named)


def _function_of(file: str, name: str) -> Callable[[list[str], list[str]], list[float]]:
    path = Path(file).expanduser().resolve()
    spec = spec_from_file_location(f"reward:{path.stem}", path)  # not the name of one of ours
    module = sys.modules[spec.name] = module_from_spec(spec)  # data classes look there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        why = f"{type(error).__name__}: {common.first_line(error)}"
        raise common.UserError(f"--reward {file}:{name}: importing it raised {why}") from error
    found = getattr(module, name, None)
    if not callable(found):
        raise common.UserError(f"--reward {file}:{name}: there is no function {name} in {file}")
    return found
