"""What gives an answer a number: a reward model, the embedded task's true reward, a function of
yours. And what a reward model and a value network are: a decoder with a linear head that gives one
number, Transformers' AutoModelForSequenceClassification with one label.

    score of an answer      the head at its last token (its end-of-sequence, unless it was cut):
                            found from lengths, never by looking for padding
    value of a token        the head at the token before it: what was known when it was chosen

A language model that has learned from preferences is a reward model too, without any head (Rafailov
et al. 2023, section 5): `--reward a@b` scores an answer with beta (log a(y|x) - log b(y|x)), where
b is the reference that a was trained against, and beta that of a's training, where its config.json
knows it. With b as the KL's reference too, kl_coef = beta would give a back, a smaller one goes
further; and such a reward is known only up to a constant a prompt.

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
ANSWERS_A_ROW = 8  # to one prompt that are scored behind one copy of it
SCORED_AT_ONCE = 32  # answers of a micro-batch that is only scored: no gradients, so more fit

# --------------------------------------------------------------------------------------------------
# Models with a head that gives one number


def load_score_model(
    model: str, dtype: str, run: common.Processes, *how: Any, name: str, **more: Any
) -> Any:
    """As common.load_policy, from a reward model or from a language model; `score` is the head."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()  # a language model has no such head: that is as it should be
    try:
        found = common.load_policy(model, dtype, run, *how, name=name, scores=True, **more)
    finally:
        logging.set_verbosity(level)
    if not hasattr(found, "score"):  # encoders have heads of many kinds
        raise common.UserError(
            f"{model}: {type(found).__name__} is no decoder with a linear head; as a reward, a "
            "function of yours can ask it: --reward file.py:function"
        )
    found.score_bias = float((getattr(found.config, "plainpref", None) or {}).get("score_bias", 0))
    return found


def reads_tokens_of(theirs: Any, tokenizer: Any) -> bool:
    """Whether a model with the tokenizer `theirs` can be given ids of `tokenizer`."""
    known = tokenizer.get_vocab().items() <= theirs.get_vocab().items()
    return known and theirs.bos == tokenizer.bos


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
    and so does the head of a reward model. Where a model is spread over processes its parts stay
    wide: they are made low as they are put together, all of them.) Autocast would leave embeddings
    as they are too: in bf16, the same model frozen and not frozen differ by up to 0.02 nats a
    token.
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
        self.other: nn.Module | None = None  # b of a@b
        self.beta = 1.0
        self.values_from: str | None = None  # what a value network may begin from
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
        # Answers to one prompt that follow each other stand behind one copy of it.
        rows, places = common.Rows("scored", []), []  # places[row]: indexes of its answers
        for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            full = not rows.rows or len(places[-1]) == ANSWERS_A_ROW
            if full or not np.array_equal(rows.rows[-1].prompt, prompt):
                rows.rows.append(common.Row(prompt, [], prompt))
                places.append([])
            rows.rows[-1].responses.append(response)
            places[-1].append(i)
        lengths = [row.tokens() for row in rows.rows]
        scores = torch.zeros(len(prompts), dtype=torch.float64)
        many = max(map(len, places), default=1)
        size = max(1, min(SCORED_AT_ONCE // many, -(-len(lengths) // self.run.world)))
        parts = common.micro_batches(lengths, list(range(len(lengths))), size)
        for part, mine in self.run.share(parts, "scores"):
            micro = common.collate_for(self.model, rows, part)  # (B, K)
            if self.other is None:
                found = response_scores(self.model, micro)
            else:
                both = [common.response_logps(m, micro)[0] for m in (self.model, self.other)]
                found = self.beta * (both[0] - both[1])  # (B, K)
            for b, row in enumerate(part if mine else ()):
                scores[places[row]] = found[b, : len(places[row])].double().cpu()
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
        """A row that fails alone, if halving the rows finds one."""

        def fails(part: slice) -> bool:
            try:
                answer = self.function(prompts[part], responses[part])
                list(answer) if isinstance(answer, Iterator) else None
            except Exception:
                return True
            return False

        told = f"{self.named} {self.name} raised {type(error).__name__}: {common.first_line(error)}"
        low, high = 0, len(prompts)
        while high - low > 1:  # a few calls, not one a row: each may take its time
            middle = (low + high) // 2
            low, high = (low, middle) if fails(slice(low, middle)) else (middle, high)
        if fails(slice(low, high)):
            return f"{told}, at {_row(low, len(prompts), prompts[low], responses[low])}"
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
    """A reward model's folder or hub id, two language models a@b, `family`, or file.py:function."""
    found = Reward(reward, tokenizer, run)
    found.named = named = "--reward" if name == "reward" else f"--{name}-reward"
    file, _, function = reward.rpartition(":")
    if reward == "family":
        family = common.needed("family", f"{named} family")
        found.function = family.reward
        common.say(name, "family: the true reward of the embedded task")
    elif file.endswith(".py"):
        check_reward(reward, named)

        def load() -> dict:
            found.function = _function_of(file, function, named)
            return {}

        common.from_main(load)
        common.say(name, f"{function} of {file}, called by the main process")
    else:
        how = (attn, True, True, fsdp)
        model, _, other = reward.partition("@")
        if other:
            load = lambda part: common.load_policy(part, dtype, run, *how, name=name)  # noqa: E731
            found.model, found.other = freeze(load(model)), freeze(load(other))
            known = getattr(found.model.config, "plainpref", None) or {}
            found.beta = float(known.get("beta", 1.0))
            unknown = "" if "beta" in known else " (its beta is not known)"
            common.say("", f"{found.beta} times the log-ratio of {model} to {other}{unknown}")
        elif (labels := labels_of(model, named)) != 1:
            more = "; or two language models a@b" if labels == 0 else ""
            raise common.UserError(
                f"{named} {reward}: not a reward model, which is an AutoModelForSequence"
                f"Classification with one label (this has {labels}); "
                f"reward_model.py makes one{more}"
            )
        else:
            found.model = freeze(load_score_model(model, dtype, run, *how, name=name))
        theirs = common.load_tokenizer(model, 1)
        found.its_tokenizer = theirs
        if other:
            second, sizes = (
                common.load_tokenizer(other, 1),
                [m.config.vocab_size for m in (found.model, found.other)],
            )
            if (
                second.get_vocab() != theirs.get_vocab()
                or second.bos != theirs.bos
                or len(set(sizes)) > 1
            ):
                raise common.UserError(f"{named} {reward}: the two models have other tokenizers")
        found.same_tokens = reads_tokens_of(theirs, tokenizer)
        if found.same_tokens and not other:
            found.values_from = model
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
        for model in reward.split("@", 1):
            common.resolve_model(model, named)


def _function_of(file: str, name: str, named: str) -> Callable[[list[str], list[str]], list[float]]:
    path = Path(file).expanduser().resolve()
    spec = spec_from_file_location(f"reward:{path.stem}", path)  # not the name of one of ours
    module = sys.modules[spec.name] = module_from_spec(spec)  # data classes look there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        why = f"{type(error).__name__}: {common.first_line(error)}"
        raise common.UserError(f"{named} {file}:{name}: importing it raised {why}") from error
    found = getattr(module, name, None)
    if not callable(found):
        raise common.UserError(f"{named} {file}:{name}: there is no function {name} in {file}")
    return found


def contents_of(name: str) -> dict[str, str]:
    """File -> hash: the weights, settings and tokenizer of a model's folder, of both of a@b, or the
    file of a function. A hub id stands for itself: it has none.
    """
    file = common.HERE / "family.py" if name == "family" else Path(name.rpartition(":")[0])
    found = {file.expanduser()} if file.suffix == ".py" else set()
    for part in (name, *name.split("@")):  # a folder may have such a name itself
        path = common.model_folder(part)
        for pattern in ("*.safetensors", "*config.json", "tokenizer.json"):
            found.update(path.glob(pattern))
    return {str(file): common.file_hash(file) for file in sorted(found) if file.is_file()}
