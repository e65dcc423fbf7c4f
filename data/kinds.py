"""Kinds of rows, and how a row of one kind is converted to another.

A prompt or response is a text or a list of messages {"role", "content"}, or {"from", "value"}.
Next to a list of messages, a text is the assistant's message (of a prompt, the user's).
"""

import json
import sys
from itertools import combinations, pairwise
from reprlib import repr as short  # of any value, however long or deep
from typing import Any

KINDS = {  # and their columns
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
SCRIPTS = {"labelled": "kto.py", "prompt": "ppo.py, nlpo.py, rloo.py, grpo.py, rso.py and raft.py"}
SCRIPTS |= dict.fromkeys(("demonstration", "messages", "text"), "sft.py")
LABELS = dict.fromkeys(("true", "yes", "1", "1.0"), True)
LABELS |= dict.fromkeys(("false", "no", "0", "0.0"), False)
ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's names


class BadRow(ValueError):
    """Why a row cannot be used."""


class LeftOut(str):
    """Why a correct row is not used, in words that follow a count ("3 ties")."""


def rename(row: dict, theirs: dict[str, str]) -> dict:
    """Give columns our names: {ours: theirs} of --columns, then those of ShareGPT and Alpaca."""
    for name in theirs.values():
        if name not in row:
            raise BadRow(f"--columns: no column {name!r} (columns: {_columns(row)})")
    if theirs:
        kept = {name: value for name, value in row.items() if name not in theirs.values()}
        row = kept | {ours: row[name] for ours, name in theirs.items()}
    if "conversations" in row:
        row = {"messages": row["conversations"]} | row
    if "instruction" in row and "prompt" not in row:
        parts = [row["instruction"], row.get("input") or ""]
        if not all(isinstance(part, str) for part in parts):
            raise BadRow("'instruction' and 'input' must be texts")
        row = row | {"prompt": "\n\n".join(part for part in parts if part.strip())}
        row = {"completion": row["output"]} | row if "output" in row else row
    return row


def kind_of(row: dict, wanted: str) -> str | None:
    """The first kind whose columns a row has; one that can be converted to what is wanted first."""
    found = [kind for kind, names in KINDS.items() if row.keys() >= {*names}]
    return next((kind for kind in found if kind in CONVERTIBLE[wanted]), [*found, None][0])


def _columns(row: dict) -> str:
    return ", ".join([*row][:20]) + ", ..." * (len(row) > 20) or "none"


def _refusal(row: dict, found: str | None, kind: str) -> str:
    """Which columns the row lacks of the nearest usable kind, or which script takes its kind."""

    def shared(kind: str) -> int:
        return sum(name in row for name in KINDS[kind] if name != "prompt")

    nearest = max(CONVERTIBLE[kind], key=shared)
    missing = [name for name in KINDS[nearest] if name not in row]
    why = f"no column {' and '.join(map(repr, missing))} (columns: {_columns(row)})"
    if found in SCRIPTS and (found != "prompt" or len(row) == 1):
        return f"{why}; {found} rows are for {SCRIPTS[found]}"
    return f"{why}; --columns {','.join(f'{name}=NAME' for name in missing)} renames"


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
    found = kind_of(row, kind)
    if found not in CONVERTIBLE[kind]:
        raise BadRow(_refusal(row, found, kind))
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
        messages = _response(_list(row["messages"]), "messages")
        if isinstance(messages, str) or len(messages) < 2:
            raise BadRow("'messages' must be a list of two messages or more")
        row = {"prompt": messages[:-1], "completion": messages[-1:]}
    if found == "labelled" and kind != "prompt":
        label = _label(row["label"])
        if kind == "demonstration" and not label:
            return [LeftOut("labelled false")]
    new: dict[str, Any] = {"prompt": _content(row["prompt"], "prompt")}
    if kind != "prompt":
        new["completion"] = _response(row["completion"], "completion")
    if kind == "labelled":
        new["label"] = label
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
        if high > low  # no preference between equally good responses
    ]


def _from_ranked(row: dict) -> tuple[Any, list[tuple[float, Any]]]:
    """The prompt, and distinct (score, response), best first; ties keep their order."""
    responses, scores = _list(row["responses"]), _list(row["scores"])
    if not isinstance(responses, list) or not isinstance(scores, list):
        raise BadRow("'responses' and 'scores' must be lists (in a CSV cell: JSON)")
    if len(responses) != len(scores) or not responses:
        raise BadRow(f"{len(responses)} responses but {len(scores)} scores")
    for score in scores:
        is_number = isinstance(score, int | float) and not isinstance(score, bool)
        if not is_number or not abs(score) <= sys.float_info.max:
            raise BadRow(f"a score must be a finite number, this is {short(score)}")
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


def _label(value: Any) -> bool:
    label = LABELS.get(str(value).strip().lower()) if isinstance(value, str | int | float) else None
    if label is None:
        text = "'label' must be true or false (or 1 or 0, yes or no), this is"
        raise BadRow(f"{text} {short(value)}")
    return label


def _list(value: Any) -> Any:
    """A cell of a CSV file holds a list as JSON."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value


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
        content, texts = value, [value]
        if not value.strip():
            raise BadRow(f"{column!r} is empty")
    else:
        try:
            content = [_message(message) for message in value]
        except (TypeError, KeyError):
            content = []
        texts = [text for message in content for text in message.values()]
        if not texts or not all(isinstance(text, str) for text in texts):
            raise BadRow(
                f"{column!r} must be a text or a list of messages with 'role' and 'content'"
            )
    try:
        for text in texts:
            text.encode()
    except UnicodeEncodeError:
        raise BadRow(f"{column!r} has half a character (a lone surrogate)") from None
    return content


def _message(message: dict) -> dict:
    if "role" in message:
        return {"role": message["role"], "content": message["content"]}
    role = message["from"]  # ShareGPT
    return {"role": ROLES.get(role, role), "content": message["value"]}
