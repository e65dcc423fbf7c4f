"""Reward models and value networks: a decoder with a linear head that gives one number
(Transformers' AutoModelForSequenceClassification with one label).

    score of a response     the head at its last token: its EOS, unless it was cut
    value of a token        the head at the token before it: what was known when it was chosen

Both are found from lengths, never by looking for padding. Transformers' head has no bias: what is
subtracted from every score is plainpref.score_bias in config.json. Other libraries do not subtract
it, which changes no comparison of two responses.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import common
from data.models import from_hub, resolve_model, short_name
from data.rows import cut_prompt
from family import measure
from sampling.generate import generate, text_of

SCORED_AT_ONCE = 32  # responses in a micro-batch without gradients
FAMILY_PROMPTS = 1024  # unseen questions of the embedded task


class ScoreModel(common.Policy):
    auto_class = "AutoModelForSequenceClassification"

    @property
    def score_bias(self) -> float:
        return float((getattr(self.config, "plainpref", None) or {}).get("score_bias", 0))

    @score_bias.setter
    def score_bias(self, bias: float) -> None:
        known = getattr(self.config, "plainpref", None)
        known = known or {"base_model": short_name(self.config.name_or_path), "history": []}
        self.config.plainpref = {**known, "score_bias": bias}

    def forward(self, batch: common.MicroBatch, per_token: bool = False) -> Tensor:
        """Return (B, K) scores, any number where a row has fewer responses; or with `per_token`
        (B, K, T) values before each response token, 0 past the end of a response.
        """
        positions = batch.target_positions if per_token else batch.ends.flatten()
        with self.autocast():
            hidden = self.hidden_states(batch, positions)  # (N, H)
        # In fp32 or better: in 8 bits many responses would have equal scores.
        wide = torch.promote_types(hidden.dtype, torch.float32)
        values = F.linear(hidden.to(wide), self.lm.score.weight.to(wide))[:, 0] - self.score_bias
        if per_token:
            return common.scatter_to_responses(values, batch)
        return values.view(batch.ends.shape).clone()  # no view: FSDP


def load_score_model(
    args: Any, run: common.Processes, model: str | None = None, *, name: str, frozen: bool = False
) -> ScoreModel:
    """As common.load_policy, from a reward model or a language model (its head is then random)."""
    from transformers.utils import logging

    model = model or args.model
    if (labels := labels_of(model)) > 1:
        raise common.UserError(f"--model {model}: has {labels} labels, a reward model has one")
    if model == "tiny-untrained":
        raise common.UserError(f"--model {model}: it has learned nothing that could be scored")
    logging.set_verbosity_error()  # no warning that a language model lacks such a head
    loaded = common.load_policy(args, run, model, name=name, frozen=frozen, make=ScoreModel)
    if not isinstance(getattr(loaded.lm, "score", None), nn.Linear):
        what = f"{model}: {type(loaded.lm).__name__} is not a decoder with a linear head"
        raise common.UserError(
            f"{what}; a function of yours can call it: --reward file.py:function"
        )
    return loaded


def labels_of(model: str, named: str = "--model") -> int:
    """Return the number of outputs of a model; 0 for a language model."""
    if model == "tiny-untrained":
        return 0
    from transformers import AutoConfig

    path = resolve_model(model, named)
    config = from_hub(
        lambda: AutoConfig.from_pretrained(path, trust_remote_code=False), model, named
    )
    return config.num_labels if "SequenceClassification" in str(config.architectures) else 0


@torch.no_grad()
def fresh_head(model: ScoreModel, std: float, seed: int) -> None:
    """Fill the head with random numbers that depend on the seed only, equal on every process."""
    from training.fsdp import copy_into

    weight, generator = model.lm.score.weight, torch.Generator().manual_seed(seed)
    values = std * torch.randn(weight.shape, generator=generator, dtype=torch.float64)
    copy_into(weight, values)
    model.score_bias = 0.0


def give_pad_token(model: ScoreModel, tokenizer: Any) -> None:
    """Make sure that the padding token ends no response: other libraries read the score at the last
    token that is not padding.
    """
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id in tokenizer.stop_ids:
        tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    if tokenizer.pad_token_id >= model.config.vocab_size:
        if hasattr(next(model.parameters()), "full_tensor"):
            raise common.UserError("--fsdp: this model has no room for the padding token it needs")
        model.lm.resize_token_embeddings(tokenizer.pad_token_id + 1, mean_resizing=False)
    model.config.pad_token_id = tokenizer.pad_token_id


@torch.no_grad()
def score_rows(
    model: common.Policy, rows: list[common.Row], run: common.Processes, forward: Any = None
) -> Tensor:
    """Return (N,) float64 scores of all responses, row by row, on the CPU and on every process.

    `forward(model, batch)` gives (B, K) numbers; default: `model(batch)`.
    """
    lengths = [row.tokens() for row in rows]
    longest = max((len(row.responses) for row in rows), default=1)  # K
    scores = torch.zeros(len(rows), longest, dtype=torch.float64)
    size = max(1, min(SCORED_AT_ONCE // longest, -(-len(rows) // run.world)))
    for part, mine in run.share(common.micro_batches(lengths, range(len(rows)), size), "scores"):
        batch = common.collate_for(model, rows, part)
        found = forward(model, batch) if forward else model(batch)  # (B, K)
        if mine:
            scores[part, : found.shape[1]] = found.double().cpu()
    counts = torch.tensor([len(row.responses) for row in rows], dtype=torch.int64)
    return common.sum_over_processes(scores)[torch.arange(longest) < counts[:, None]]


def sample_rows(
    start: common.Policy, rows: list[common.Row], tokenizer: Any, run: common.Run
) -> list[common.Row]:
    """Return rows with the same prompts, and one answer each that the starting model samples."""
    most, room = run.args.max_prompt_length, run.args.max_length - run.args.max_prompt_length
    prompts = [cut_prompt(row.prompt, most, tokenizer) for row in rows]
    answers = generate(start, prompts, tokenizer.stop_ids, room, 1.0, run.args.seed, run)
    return [common.Row(x, [y], x) for x, y in zip(prompts, answers, strict=True)]


def measure_on_family(
    model: ScoreModel, start: common.Policy, tokenizer: Any, run: common.Run
) -> dict[str, float]:
    """Measure a reward model on unseen questions of the embedded task."""

    def prompts_of(texts: list[str]) -> list[np.ndarray]:
        return [np.array(tokenizer(text).input_ids, np.int32) for text in texts]

    def sample(which, texts, temperature, seed, label, samples=1) -> tuple[list, list[str]]:
        answers = generate(
            start, prompts_of(texts), tokenizer.stop_ids, measure.MAX_NEW_TOKENS, temperature,
            seed, run, label=label, samples=samples,
        )  # fmt: skip
        return answers, [text_of(ids, tokenizer) for ids in answers]

    def score(texts: list[str], answers: list[np.ndarray]) -> list[float]:
        rows = [common.Row(x, [y], x) for x, y in zip(prompts_of(texts), answers, strict=True)]
        return score_rows(model, rows, run).tolist()

    return measure.measure_scores(sample, score, FAMILY_PROMPTS)
