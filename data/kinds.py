"""Kinds of rows, and how a row of one kind is converted to another.

A prompt or response is a text or a list of messages {"role", "content"}.
"""

import json
import sys
from itertools import combinations, pairwise
from typing import Any

KINDS = {  # a row's kind is the first whose columns it has
    "ranked": ("prompt", "responses", "scores"),
    "pair": ("chosen", "rejected"),
    "labelled": ("prompt", "completion", "label"),
    "demonstration": ("prompt", "completion"),
    "messages": ("messages",),
    "text": ("text",),
    "prompt": ("prompt",),
}
CONVERTIBLE = {  # for each kind that a method takes: which kinds of rows serve, best first
    "demonstration": ("demonstration", "messages", "text", "pair", "ranked", "labelled"),
    "pair": ("pair", "ranked"),
    "ranked": ("ranked", "pair"),
    "labelled": ("labelled", "pair", "ranked"),
    "prompt": ("prompt", "demonstration", "messages", "pair", "ranked", "labelled"),
}


class BadRow(ValueError):
    """Why a row cannot be used."""


class LeftOut(str):
    """Why a correct row is not used, in words that follow a count ("3 ties")."""


def kind_of(row: dict) -> str:
    for kind, columns in KINDS.items():
        if all(column in row for column in columns):
            return kind
    known = "; ".join(", ".join(columns) for columns in KINDS.values())
    raise BadRow(f"has the columns {', '.join(row) or '(none)'}; known rows have: {known}")


def convert(
    row: dict,
    kind: str,  # what the method takes: a key of CONVERTIBLE
    pairs: str = "best-worst",  # how a ranked list becomes pairs: best-worst, adjacent or all
    with_target: bool = False,  # a pair also needs the row's `target`, a third response
) -> list[dict | LeftOut]:
    """Check a row and convert it to rows with exactly these columns:

    pair: prompt, chosen, rejected (, target); labelled: prompt, completion, label;
    demonstration: prompt, completion; prompt: prompt;
    ranked: prompt, responses, scores (distinct responses, best first).

    A pair or list for a method that takes labels becomes a ranked row of two, which the caller
    separates after it has cut both: they keep the same prompt.
    """
    found = kind_of(row)
    if found not in CONVERTIBLE[kind]:
        needed = f"{kind} rows are needed ({', '.join(KINDS[kind])})"
        others = " or ".join(other for other in CONVERTIBLE[kind] if other != kind)
        raise BadRow(f"holds {found} rows, and {needed}; {others} rows can be converted")
    for column in (*KINDS[found], *["target"] * with_target):
        if row.get(column) is None:
            raise BadRow(f"no {column!r}")
    if found == "pair" or found == "ranked" and kind != "prompt":
        prompt, ranked = _from_pair(row) if found == "pair" else _from_ranked(row)
        target = {"target": _target(row["target"], prompt)} if with_target else {}
        made = _from_best(ranked, kind, pairs)
        return [
            new if isinstance(new, LeftOut) else {"prompt": prompt} | new | target for new in made
        ]
    if found == "text":
        return [{"prompt": "", "completion": _content(row["text"], "text")}]
    if found == "messages":
        messages = _response(row["messages"], "messages")
        if isinstance(messages, str) or len(messages) < 2:
            raise BadRow("'messages' must be a list of two messages or more")
        row = {"prompt": messages[:-1], "completion": messages[-1:]}
    if found == "labelled" and kind != "prompt":
        if not isinstance(row["label"], bool):
            raise BadRow(f"'label' must be true or false, this is {row['label']!r}")
        if kind == "demonstration" and not row["label"]:
            return [LeftOut("labelled false")]
    new: dict[str, Any] = {"prompt": _content(row["prompt"], "prompt")}
    if kind != "prompt":
        new["completion"] = _response(row["completion"], "completion")
    if kind == "labelled":
        new["label"] = row["label"]
    return [new]


def _from_best(ranked: list[tuple[float, Any]], kind: str, pairs: str) -> list[dict | LeftOut]:
    """What a pair or a ranked list becomes, without its prompt. `ranked`: (score, response)."""
    scores, responses = ([entry[i] for entry in ranked] for i in (0, 1))
    if kind == "prompt":
        return [{}]
    if kind == "demonstration":
        return [{"completion": responses[0]}]
    if scores[0] == scores[-1]:  # also if there is only one
        return [LeftOut("all responses equal")]
    if kind == "ranked":
        return [{"responses": responses, "scores": scores}]
    if kind == "labelled":
        return [{"responses": [responses[0], responses[-1]], "scores": [1.0, 0.0]}]
    chosen = {
        "best-worst": [(ranked[0], ranked[-1])],
        "adjacent": pairwise(ranked),
        "all": combinations(ranked, 2),
    }[pairs]
    return [
        {"chosen": better, "rejected": worse}
        for (high, better), (low, worse) in chosen
        if high > low  # of equally good responses none was preferred
    ]


def _from_ranked(row: dict) -> tuple[Any, list[tuple[float, Any]]]:
    """The prompt, and distinct (score, response), best first; ties keep their order."""
    responses, scores = row["responses"], row["scores"]
    if not isinstance(responses, list) or not isinstance(scores, list):
        raise BadRow("'responses' and 'scores' must be lists")
    if len(responses) != len(scores) or not responses:
        raise BadRow(f"{len(responses)} responses but {len(scores)} scores")
    for score in scores:
        is_number = isinstance(score, int | float) and not isinstance(score, bool)
        if not is_number or not abs(score) <= sys.float_info.max:
            raise BadRow(f"a score must be a finite number, this is {score!r}")
    distinct: dict[str, tuple[float, Any]] = {}
    for score, response in sorted(zip(scores, responses, strict=True), key=lambda e: -e[0]):
        response = _response(response, "responses")
        distinct.setdefault(json.dumps(response), (score, response))
    return _content(row["prompt"], "prompt"), list(distinct.values())


def _from_pair(row: dict) -> tuple[Any, list[tuple[float, Any]]]:
    """The same of a pair. The messages that two dialogues begin with are their prompt."""
    chosen, rejected = (_response(row[column], column) for column in ("chosen", "rejected"))
    if chosen == rejected:
        raise BadRow("'chosen' and 'rejected' are the same")
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise BadRow("'chosen' and 'rejected' must both be texts or both be lists of messages")
    has_prompt = row.get("prompt") is not None
    if isinstance(chosen, str):
        if not has_prompt:
            raise BadRow("'chosen' and 'rejected' are texts, so there must be a 'prompt'")
        return _content(row["prompt"], "prompt"), [(1.0, chosen), (0.0, rejected)]
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    opening = chosen[:shared]
    if not has_prompt and not shared:
        raise BadRow("'chosen' and 'rejected' begin with other messages, and have no 'prompt'")
    if has_prompt and (not shared or opening[0]["role"] == "assistant"):  # they continue it
        prompt = _content(row["prompt"], "prompt")
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        opening = prompt + opening
    return opening, [(1.0, chosen[shared:]), (0.0, rejected[shared:])]


def _target(value: Any, prompt: Any) -> Any:
    """A third response to the prompt. Of a whole dialogue, only what continues the prompt."""
    target = _response(value, "target")
    if isinstance(target, list) and isinstance(prompt, list):
        if target[: len(prompt)] == prompt:
            target = target[len(prompt) :]
        if not target or target[0]["role"] != "assistant":
            raise BadRow("'target' does not continue the prompt")
    return target


def _response(value: Any, column: str) -> Any:
    content = _content(value, column)
    if isinstance(content, list):
        if content[-1]["role"] != "assistant" or not content[-1]["content"].strip():
            raise BadRow(f"{column!r} must end with an assistant message that is not empty")
    return content


def _content(value: Any, column: str) -> Any:
    """A text that is not empty, or messages without other keys."""
    if isinstance(value, str):
        if not value.strip():
            raise BadRow(f"{column!r} is empty")
        return value
    try:
        messages = [{"role": m["role"], "content": m["content"]} for m in value]
    except (TypeError, KeyError):
        messages = []
    if not messages or not all(isinstance(text, str) for m in messages for text in m.values()):
        raise BadRow(f"{column!r} must be a text or a list of messages with 'role' and 'content'")
    return messages
