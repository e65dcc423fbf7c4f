"""The thesis' reward of a summary: OpenAssistant/reward-model-deberta-v3-large, in percent.

    python evaluate.py ... --dataset tldr --reward results/thesis/deberta_reward.py:score

An encoder that reads the prompt and the answer as a pair of texts, as its model card shows, and
gives one number; its sigmoid is the chance that it wins against an answer of score 0. REWARD_MODEL
names another id or folder. Weights are read from safetensors alone, because a pickle can run code.
It is loaded when the first answers come, on a GPU if there is one.

A text that is too long loses tokens of its longer part, which is the prompt, so that the answer
stays whole. How the thesis cut them is not known to us.
"""

import os
from functools import cache
from typing import Any

import torch

MODEL = os.environ.get("REWARD_MODEL", "OpenAssistant/reward-model-deberta-v3-large")
MAX_TOKENS = 512  # of both texts: the limit in DeBERTa v3's configuration
AT_ONCE = 32


@cache
def load() -> tuple[Any, Any]:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    # fp32: a sigmoid near 1 leaves little to tell good answers apart by.
    model = AutoModelForSequenceClassification.from_pretrained(
        MODEL, dtype=torch.float32, use_safetensors=True
    )
    if model.config.num_labels != 1:
        raise ValueError(f"{MODEL} has {model.config.num_labels} labels, a reward model has one")
    return model.to(device).eval(), AutoTokenizer.from_pretrained(MODEL)


@torch.no_grad()
def score(prompts: list[str], responses: list[str]) -> list[float]:
    model, tokenizer = load()
    pairs = [(p.strip(), r.strip()) for p, r in zip(prompts, responses, strict=True)]
    scores = [0.0] * len(pairs)
    order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0]) + len(pairs[i][1]))
    for start in range(0, len(order), AT_ONCE):  # of like length, so that little is padding
        part = order[start : start + AT_ONCE]
        batch = tokenizer(
            [pairs[i][0] for i in part], [pairs[i][1] for i in part],
            padding=True, truncation="longest_first", max_length=MAX_TOKENS, return_tensors="pt",
        )  # fmt: skip
        logits = model(**batch.to(model.device)).logits[:, 0]  # (B,)
        for i, chance in zip(part, logits.double().sigmoid().tolist(), strict=True):
            scores[i] = 100 * chance
    return scores
