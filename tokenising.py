"""Tokens of large sets: made once for all processes of a machine, and kept by content.

common.py asks for it when a set has common.MANY_ROWS rows or more; of smaller ones every process
makes its own tokens, which takes less time than to agree on who does it.

Copyright (c) 2026 the plainpref authors. MIT licence.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import common
from bytelevel import encoder
from common import Found, Row, UserError

TENSORS = ("ids", "lengths", "rows", "scores")  # of a file
PROVEN_ON = 1_000  # rows of the set, on which tiktoken has to give the tokenizer's ids


def find_once(
    raws: Iterable[tuple[str, Any]],  # as common._raw_rows yields them, every prompt taken to fit
    exact: Callable[[Iterable], Iterable],  # the same, with prompts shortened where need be
    find: Callable[..., Found],  # makes tokens of them: (raws, encode, label)
    tokenizer,
    what: list,  # everything else that moves a token
    cache_dir: str | None,
) -> tuple[Found, str]:
    """The tokens of a set, and a word on how they were made: read from where they were kept, else
    made by the first process of each machine, kept, and read by the others. A mistake that one of
    them meets ends all.
    """
    found, mine = None, {}
    if os.environ.get("LOCAL_RANK", "0") == "0":
        try:
            raws = list(raws)
            key = key_of(raws, tokenizer, what)
            file = Path(cache_dir or Path("runs") / ".cache") / f"tokens-{key}.safetensors"
            if found := load(file):
                mine = {"key": key, "file": str(file), "how": f"from {file}"}
            else:
                found, how = find_quickly(list(exact(raws)), find, tokenizer)
                kept = save(file, found)
                mine = {"key": key, "file": kept and str(file), "how": how}
        except UserError as error:
            mine = {"error": str(error)}
    told = tell_all(mine)
    for one in told:
        if "error" in one:
            raise UserError(one["error"])
    told = [one for one in told if one]  # of the processes that made tokens
    if len({one["key"] for one in told}) > 1:
        raise UserError(
            f"{what[0]}: not all machines have the same rows, tokenizer and versions of everything"
        )
    file = next((one["file"] for one in told if one["file"]), None)
    if found is None and file:
        found = load(Path(file))
    if found is None:  # nothing could be kept where this process looks
        found, _ = find_quickly(list(exact(list(raws))), find, tokenizer)
    return found, told[0]["how"]


def tell_all(mine: dict) -> list[dict]:
    """What every process has to tell, by rank."""
    if common.processes() == 1:
        return [mine]
    text = json.dumps(mine).encode()  # not as objects, which would be pickled
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(common.processes())]
    dist.all_gather(sizes, torch.tensor([len(text)]))
    longest = max(int(size) for size in sizes)
    texts = [torch.zeros(longest, dtype=torch.uint8) for _ in sizes]
    dist.all_gather(texts, torch.tensor(list(text.ljust(longest)), dtype=torch.uint8))
    return [json.loads(bytes(text.tolist())) for text in texts]


def key_of(raws: Iterable[tuple[str, Any]], tokenizer, what: list) -> str:
    """Another one for whatever gives other tokens or another report."""
    key = hashlib.sha256()
    for where, raw in raws:
        plain = raw if isinstance(raw, dict) else [type(raw).__name__, str(raw)]
        key.update(json.dumps([where, plain], default=str).encode())
    template = tokenizer.chat_template
    facts = [what, template, tokenizer.bos, sorted(tokenizer.stop_ids), tokenizer.eos_token_id]
    facts += [type(tokenizer).__name__, getattr(tokenizer, "split_special_tokens", None)]
    facts += [str(sorted(tokenizer.special_tokens_map.items()))]  # templates write them
    facts += [tokenizer.backend_tokenizer.to_str()]
    if "strftime" in str(template):  # it writes the day into every prompt
        facts += [str(date.today())]
    facts += [
        common._version(name) for name in ("tokenizers", "transformers", "tiktoken", "jinja2")
    ]
    names = "common tokenising bytelevel sources published family".split()
    sources = [common.HERE / f"{name}.py" for name in names]
    facts += [common.file_hash(source) for source in sources if source.is_file()]
    key.update(json.dumps(facts).encode())
    return key.hexdigest()[:24]


def save(file: Path, found: Found) -> bool:
    """All ids in one long tensor; false where the disk takes nothing."""
    parts, lengths, rows, scores = [], [], [], []
    for row in found.rows:
        own = [] if row.ask is row.prompt else [row.ask]
        mine = [row.prompt, *row.responses, *own]
        parts += mine
        lengths += map(len, mine)
        rows += [len(row.responses), len(own), int(row.scores is not None)]
        scores += [] if row.scores is None else [row.scores]
    tensors = {
        "ids": torch.from_numpy(np.concatenate(parts or [np.zeros(0, np.int32)])),
        "lengths": torch.tensor(lengths, dtype=torch.int32),
        "rows": torch.tensor(rows, dtype=torch.int32),
        "scores": torch.from_numpy(np.concatenate(scores or [np.zeros(0)])),
    }
    facts = json.dumps({"counts": found.counts, "bad": found.bad, "kind": found.kind})
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, temporary, {"facts": facts, "sha256": digest(tensors, facts)})
        os.replace(temporary, file)
    except (OSError, SafetensorError) as error:
        common.say("tokens", f"not kept in {file.parent} ({common.first_line(error)})")
        try:
            temporary.unlink(missing_ok=True)
        except OSError:
            pass
        return False
    return True


def load(file: Path) -> Found | None:
    """None where there is none, or no whole one."""
    if not file.is_file():
        return None
    try:
        with safe_open(file, "pt") as saved:
            tensors = {name: saved.get_tensor(name) for name in TENSORS}
            facts, written = saved.metadata()["facts"], saved.metadata()["sha256"]
        if digest(tensors, facts) != written:
            raise ValueError("it holds something else than was written")
        found = Found([], **json.loads(facts))
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        reason = common.first_line(error)
        common.say("tokens", f"{file} is damaged ({reason}), so they are made again")
        return None
    found.counts = Counter(found.counts)
    ids, ends = tensors["ids"].numpy(), np.cumsum(tensors["lengths"].numpy()).tolist()
    parts = (ids[a:b] for a, b in zip([0, *ends[:-1]], ends, strict=True))  # views, in their order
    scores, at = tensors["scores"].numpy(), 0
    for many, own, scored in tensors["rows"].view(-1, 3).tolist():
        prompt, responses = next(parts), [next(parts) for _ in range(many)]
        row = Row(prompt, responses, next(parts) if own else prompt)
        if scored:
            row.scores, at = scores[at : at + many], at + many
        found.rows.append(row)
    return found


def digest(tensors: dict[str, torch.Tensor], facts: str) -> str:
    state = hashlib.sha256(facts.encode())
    for name in sorted(tensors):
        state.update(tensors[name].numpy().tobytes())
    return state.hexdigest()


def find_quickly(
    raws: list[tuple[str, Any]], find: Callable[..., Found], tokenizer
) -> tuple[Found, str]:
    """`find` with the quicker of the two, and a word on it."""
    sample: dict[str, list[int]] = {}
    by_tokenizer = common.by_tokenizer(tokenizer)

    def noting(texts: list[str]) -> list[list[int]]:
        ids = by_tokenizer(texts)
        sample.update(zip(texts, ids, strict=True))
        return ids

    spread = raws[:: max(1, len(raws) // PROVEN_ON)][:PROVEN_ON]
    find(spread, noting)
    encode, how = encoder(tokenizer, sample)
    return find(raws, encode, "tokens"), how.format(rows=f"{len(spread):,} rows")
