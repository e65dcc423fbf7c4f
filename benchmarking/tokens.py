"""How long a large set takes to become tokens: one text after another, many at once, by tiktoken,
and from where they were kept.

    python -m benchmarking.tokens --markdown results/bench-tokens-cpu.md

Rows are pairs of TL;DR lengths (a prompt of some 360 tokens, two answers of some 40), put together
from sentences of Python's own documentation, which every machine has; the tokenizer is a byte-level
BPE trained on it. Every way reads the file, checks the rows and makes the same ids, which is
checked. A `round` is every way once; `x` is a ratio of two times of one round.

Copyright (c) 2026 the plainpref authors. MIT licence.
"""

from __future__ import annotations

import ast
import json
import random
import re
import statistics
import sys
import sysconfig
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import bytelevel
import common
import tokenising
from benchmarking.measure import Report, header, shown

CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass
class Options:
    rows: int = 6_000  # pairs
    rounds: int = 4  # the first is thrown away
    vocabulary: int = 50_000  # tokens at most: as many as the documentation gives
    markdown: str | None = None  # a file for what is printed


def sentences() -> list[str]:
    """Of all docstrings of the standard library."""
    found = []
    for file in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        if "site-packages" in file.parts:
            continue
        try:
            with warnings.catch_warnings(action="ignore"):
                tree = ast.parse(file.read_bytes())
        except (SyntaxError, ValueError):  # there are files that are wrong on purpose
            continue
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        for node in ast.walk(tree):
            text = ast.get_docstring(node) if isinstance(node, kinds) else None
            found += re.split(r"(?<=[.!?])\s+|\n\n+", text) if text else []
    return [text for text in found if len(text) > 20]


def tokenizer_of(texts: list[str], size: int, pattern: str | None, chat: bool):
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(ignore_merges=pattern is not None))
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    split = pattern and pre_tokenizers.Split(Regex(pattern), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, level]) if pattern else level
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>" if chat else "<|endoftext|>",
        chat_template=CHAT if chat else None,
    )
    fast.stop_ids, fast.bos = frozenset([fast.eos_token_id]), []
    return fast


def write_rows(file: Path, texts: list[str], n: int, chat: bool) -> None:
    rng = random.Random(0)

    def text(middle: int) -> str:
        least = middle * rng.lognormvariate(0, 0.4)
        found, long = [], 0
        while long < least:
            found.append(rng.choice(texts))
            long += len(found[-1]) + 1
        return " ".join(found)

    with open(file, "w", encoding="utf-8") as f:
        for _ in range(n):
            row = {"prompt": text(1500), "chosen": " " + text(120), "rejected": " " + text(120)}
            if chat:
                roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
                row = {k: [{"role": roles[k], "content": v}] for k, v in row.items()}
            f.write(json.dumps(row) + "\n")


def one_by_one(tokenizer) -> common.Encode:
    return lambda texts: [tokenizer(text, add_special_tokens=False).input_ids for text in texts]


def ways(file: Path, tokenizer, cache: Path) -> dict[str, Callable[[], common.Found]]:
    """Name -> reads the file and makes tokens of its rows."""
    what = ("pair", "best-worst", tokenizer, (600, 512), False)
    raws = lambda: common.json_lines(file)  # noqa: E731
    find = lambda raws, encode, label="": common._find(raws, *what, encode)  # noqa: E731

    def through(cache_dir: Path) -> common.Found:
        return tokenising.find_once(raws(), list, find, tokenizer, ["bench"], str(cache_dir))[0]

    def new() -> common.Found:
        with tempfile.TemporaryDirectory(dir=cache) as empty:
            return through(Path(empty))

    return {
        "one text after another": lambda: find(raws(), one_by_one(tokenizer)),
        "many at once": lambda: find(raws(), common.by_tokenizer(tokenizer)),
        "tiktoken, not proven": lambda: find(raws(), bytelevel.by_tiktoken(tokenizer)[0]),
        "as it is done: proven and kept": new,
        "as it is done: from the disk": partial(through, cache),
        "(reading and checking alone)": lambda: find(raws(), lambda texts: [[0]] * len(texts)),
    }


def digest(found: common.Found) -> str:
    return common.Rows("", found.rows).digest()


def race(report: Report, title: str, file: Path, tokenizer, args: Options, cache: Path) -> None:
    report.say(f"### {title}")
    report.say()
    runs = ways(file, tokenizer, cache)
    expected, tokens = None, 0
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(args.rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            found = run()
            took = time.perf_counter() - start
            if number:
                seconds[name].append(took)
            elif not name.startswith("("):
                expected = expected or digest(found)
                tokens = sum(row.tokens() for row in found.rows)
                if digest(found) != expected:
                    raise SystemExit(f"{name}: other ids")
            del found
    _, how = bytelevel.encoder(tokenizer, {})
    report.say(
        f"- {args.rows:,} pairs, {tokens:,} tokens, {file.stat().st_size / 1e6:,.0f} MB of JSON; "
        f"vocabulary {len(tokenizer):,}; {how.split(',')[0]}"
    )
    report.say(f"- {args.rounds - 1} rounds; all ways give the same ids")
    report.say()
    base = seconds["one text after another"]
    table = []
    for name, took in seconds.items():
        middle = statistics.median(took)
        table.append([name, f"{middle:.2f}", f"{tokens / middle / 1e6:.2f}", shown(base, took)])
    report.table(["", "s", "million tokens/s", "x one after another"], table)


def cases() -> Iterator[tuple[str, str | None, bool]]:
    yield "texts, splitting as GPT-2 does", None, False
    yield "messages through a chat template, splitting as Llama 3 does", LLAMA3, True


def main(args: Options) -> None:
    report = Report(args.markdown)
    header(report, "cpu", " ".join(["python -m benchmarking.tokens", *sys.argv[1:]]))
    texts = sentences()
    with tempfile.TemporaryDirectory() as scratch:
        for number, (title, pattern, chat) in enumerate(cases()):
            file, cache = Path(scratch) / f"{number}.jsonl", Path(scratch) / f"cache-{number}"
            cache.mkdir()
            write_rows(file, texts, args.rows, chat)
            tokenizer = tokenizer_of(texts, args.vocabulary, pattern, chat)
            race(report, title, file, tokenizer, args, cache)
    report.close()


if __name__ == "__main__":
    main(common.command_line(Options, __doc__))
