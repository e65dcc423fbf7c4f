"""Byte-level BPE (GPT-2, Pythia, Llama 3, Qwen) by tiktoken, where it gives the very same ids.

Copyright (c) 2026 the plainpref authors. MIT licence.
"""

from __future__ import annotations

import json
import re
import unicodedata

import numpy as np

import common
from common import Encode

LONG = 50_000  # characters, and the tokenizer takes over: a million spaces kill tiktoken


class Refused(Exception):
    """Why tiktoken cannot stand in for a tokenizer."""


# What may be split in two ways, and letters repeated until the order of merges tells.
HARD = """
I'm you're he's we've she'll I'd 'S 'LL it\u2019s don't'
0 12 345 6789 1234567890 3.14 1,000 \u00bd \u0663\u0664 \u2167
   three\t\ttabs  \r\n \n\n\n  lines \u00a0\u2003\u3000 \x85 \u2028\u200b\ufeff\x00\x1f
 aaaaaaa aaaaaaaaaaaaaaaa       -------- ======== \\\\//__ ... \u2026\u2026 !!?!
na\u00efve A\u030a \u212b e\u0301 \u01c6 \u00df \u0130 \u0131 \ufb01 \ufdfa \uff21 x\u00b2
中文字 日本語 ไทย हिन्दी العربية
\U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea \u270a\U0001f3fd
\U000e0041 \u0301
snake_case camelCase <tag/> {"a": [1]} https://a.b/c?d=e#f #!$%^&*() end """
HARD_TEXTS = [HARD, *HARD.split("\n"), *"| |  |\n| \n|\n |a\n| a|a |\t\t a".split("|")]


def encoder(tokenizer, sample: dict[str, list[int]]) -> tuple[Encode, str]:
    """tiktoken where it gives the tokenizer's ids of all texts of the sample, of hard ones and of
    every token written as text; else the tokenizer. And a word on it.
    """
    by_tokenizer = common.by_tokenizer(tokenizer)
    try:
        encode, tokens = by_tiktoken(tokenizer)
        more = [*HARD_TEXTS, *tokens]
        expected = sample | dict(zip(more, by_tokenizer(more), strict=True))
        for text, ids in zip(expected, encode(list(expected)), strict=True):
            if ids != expected[text]:
                raise Refused(f"tiktoken gives other ids of {text[:40]!r}")
    except Refused as reason:
        return by_tokenizer, f"by the tokenizer; {reason}"
    return encode, "by tiktoken, which gives the tokenizer's ids of {rows}"


# The pattern of GPT-2, that a ByteLevel pre-tokenizer has where it is given no other.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def by_tiktoken(tokenizer) -> tuple[Encode, list[str]]:
    """The same byte-level BPE as a tiktoken encoding, and its tokens as texts.

    The two differ in more than can be read off their tables. tiktoken splits with another regex
    engine, drops what the pattern leaves between its matches, joins any two neighbours that are a
    token together (the tokenizer: those that were merged so in training) and takes a word that is a
    token whole. `encoder` compares results; what no compared text shows remains unproven.
    """
    try:
        import tiktoken
    except ImportError:
        raise Refused("tiktoken is not installed") from None
    facts = json.loads(tokenizer.backend_tokenizer.to_str())
    pattern = _pattern(facts["pre_tokenizer"])
    if facts["normalizer"] not in (None, {"type": "NFC"}):
        raise Refused(f"a normalizer that is not NFC ({facts['normalizer']['type']})")
    composed = facts["normalizer"] is not None
    added, passes = _added_tokens(facts["added_tokens"])
    ranks, ids = _ranks(facts["model"], added)
    ordinary = tiktoken.Encoding(
        "like the tokenizer", pat_str=pattern, mergeable_ranks=ranks, special_tokens={}
    ).encode_ordinary
    by_tokenizer = common.by_tokenizer(tokenizer)

    def encode_with(text: str, passes: list[re.Pattern]) -> list[int]:
        if not passes:
            return ordinary(text) if ids is None else ids[ordinary(text)].tolist()
        found: list[int] = []
        for i, piece in enumerate(passes[0].split(text)):
            if i % 2:
                found.append(added[piece])
            elif piece:
                found += encode_with(piece, passes[1:])
        return found

    def easy(text: str) -> bool:  # where NFC changes a text, it matters when it is applied
        return len(text) <= LONG and (not composed or unicodedata.is_normalized("NFC", text))

    def encode(texts: list[str]) -> list[list[int]]:
        left = [text for text in texts if not easy(text)]  # few
        others = dict(zip(left, by_tokenizer(left), strict=True))
        return [others[t] if t in others else encode_with(t, passes) for t in texts]

    words = [word.decode(errors="ignore") for word in ranks]
    return encode, words + [f"a {token} b{token}{token}\n{token}c" for token in added]


def _pattern(pre: dict | None) -> str:
    """Where words are split."""
    parts = pre["pretokenizers"] if pre and pre["type"] == "Sequence" else [pre]
    *splits, last = parts
    if not last or last["type"] != "ByteLevel" or last["add_prefix_space"]:
        raise Refused("it is not a plain byte-level one")
    if last["use_regex"] and not splits:
        return GPT2
    if not last["use_regex"] and len(splits) == 1:
        split = splits[0]
        regex = split["type"] == "Split" and split["pattern"].get("Regex")
        if regex and split["behavior"] == "Isolated" and not split["invert"]:
            return regex
    raise Refused("it splits texts in a way of its own")


def _added_tokens(tokens: list[dict]) -> tuple[dict[str, int], list[re.Pattern]]:
    """Token -> id, and what finds them: first those that are looked for in the text as it is, then,
    between them, those that are looked for after normalizing. The longest at a place is meant.
    """
    for token in tokens:
        if token["lstrip"] or token["rstrip"] or token["single_word"] or not token["content"]:
            raise Refused(f"its token {token['content']!r} takes in more than itself")
    passes = []
    for normalized in (False, True):
        texts = [t["content"] for t in tokens if t["normalized"] == normalized]
        if texts:
            longest_first = sorted(texts, key=len, reverse=True)
            passes.append(re.compile(f"({'|'.join(map(re.escape, longest_first))})"))
    return {token["content"]: token["id"] for token in tokens}, passes


def _ranks(model: dict, added: dict[str, int]) -> tuple[dict[bytes, int], np.ndarray | None]:
    """Bytes -> rank, and the ids by rank where ranks are not the ids themselves. What was merged
    first has the lower rank, whatever its id.
    """
    if model["type"] != "BPE" or model.get("byte_fallback") or model.get("dropout"):
        raise Refused("it is not a plain byte-level BPE")
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise Refused("it marks parts of words")
    vocab, letters = model["vocab"], byte_letters()
    merged = [a + b for a, b in model["merges"]]
    order = list(dict.fromkeys(merged))
    if sum(a != b for a, b in zip(merged, [None, *merged], strict=False)) != len(order):
        raise Refused("it merges to one token early and late")
    if not vocab.keys() >= {*letters, *order} or not {*"".join(order)} <= letters.keys():
        raise Refused("its vocabulary is not one of bytes")
    never = vocab.keys() - letters.keys() - set(order) - added.keys()
    if never and model.get("ignore_merges"):
        raise Refused(f"its token {min(never)!r} is never merged")
    tokens = [*sorted(letters, key=vocab.get), *order]
    ids = [vocab[token] for token in tokens]
    in_order = all(a < b for a, b in zip(ids[256:], ids[257:], strict=False))
    ranks = ids if in_order else range(len(ids))  # single bytes are never merged to: any will do
    as_bytes = (bytes(letters[letter] for letter in token) for token in tokens)
    return dict(zip(as_bytes, ranks, strict=True)), None if in_order else np.array(ids)


def byte_letters() -> dict[str, int]:
    """The letter that stands for each byte in the vocabulary of a byte-level BPE: itself where it
    can be printed, else the next of those from 256 on.
    """
    printed = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = (byte for byte in range(256) if byte not in printed)
    return {chr(b): b for b in printed} | {chr(256 + n): byte for n, byte in enumerate(others)}
