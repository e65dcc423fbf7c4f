"""Samples and their scores, kept in the cache: a killed run goes on with the same ones, to the last
token, and runs that learn from the same samples in different ways draw them only once.

A cached file holds some prompts, a JSON line each. Its folder is named by a digest of everything
that the samples depend on. The run's folder gets a copy of all lines, and the facts behind the
digest.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

import common
from sampling.generate import generate, text_of
from sampling.rewards import contents_of
from training.checkpoint import file_hash
from training.run_folder import package_version, rows_digest

ROUNDING = {"attn", "torch", "transformers"}  # these facts move samples by rounding only


def facts_of(args: Any) -> dict[str, Any]:
    """Return what samples and scores depend on, besides the arguments of `sample_and_score`. Only
    for the main process: it hashes all weights.
    """
    named = ("model", "reward", "dtype", "attn", "lora_rank")
    facts = {name: getattr(args, name) for name in named}
    facts |= {name: package_version(name) for name in ("torch", "transformers")}
    ours = [common.HERE / "common.py", *sorted((common.HERE / "sampling").glob("*.py"))]
    facts |= {file.name: file_hash(file) for file in ours}
    return facts | contents_of(args.model) | contents_of(args.reward)


def sample_and_score(
    policy: common.Policy,
    prompts: list[np.ndarray],
    tokenizer: Any,
    reward: Callable[[list[np.ndarray], list[np.ndarray]], Tensor],  # -> (N,)
    run: common.Run,
    facts: dict[str, Any],  # from facts_of
    *,
    samples: int,  # K responses per prompt
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    seed: int,
    label: str = "sampled",  # name of the file in the run's folder
    chunk: int = 0,  # prompts in a cached file; 0: those of 4096 responses
) -> list[common.Row]:
    """Return K scored responses per prompt, on every process: the cached ones, and new ones. The
    file in the run's folder is also a data set of ranked rows.
    """
    chunk = chunk or max(1, 4096 // samples)
    digest = rows_digest([common.Row(ids, [], ids) for ids in prompts])
    facts = facts | {"samples": samples, "max_new_tokens": max_new_tokens, "top_k": top_k}
    facts |= {"temperature": temperature, "seed": seed, "the list of prompts": digest}
    facts = common.from_main(lambda: _settle(run.folder / f"{label}.json", facts))
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]
    folder = Path(run.args.cache_dir or "runs/.cache").expanduser() / f"sampled-{key}"
    rows: list[common.Row] = []
    files, made, seconds = [], 0, 0.0
    for at in range(0, len(prompts), chunk):
        part = prompts[at : at + chunk]
        files.append(folder / f"{at}-{at + len(part)}.jsonl")
        # Only the main process touches files: other machines have other disks.
        new = common.from_main(partial(_read, files[-1]))
        if new is None:
            begin = time.perf_counter()
            responses = generate(
                policy, part, tokenizer.stop_ids, max_new_tokens, temperature, seed, run,
                label=f"{label} {at + len(part):,}/{len(prompts):,}", samples=samples, top_k=top_k,
                first=at,
            )  # fmt: skip
            seconds += time.perf_counter() - begin
            made += sum(map(len, responses))
            scores = reward([x for x in part for _ in range(samples)], responses).numpy()
            slices = [slice(k * samples, (k + 1) * samples) for k in range(len(part))]
            each = zip(part, slices, strict=True)
            new = [common.Row(prompt, responses[k], prompt, scores[k]) for prompt, k in each]
            if common.MAIN_PROCESS:
                _write(files[-1], new, tokenizer)
        rows += new
    if common.MAIN_PROCESS:
        with open(run.folder / f"{label}.jsonl", "wb") as complete:
            for file in files:
                complete.write(file.read_bytes())
    speed = f"{made / seconds:,.0f} tokens/s" if made else "cached"
    many = f"{len(rows) * samples:,} answers to {len(rows):,} prompts"
    common.say("sampling", f"{many} ({speed}), in {folder}")
    return rows


def _settle(file: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """Return the facts behind the run's samples. A run that has learned from them keeps them."""
    if not file.is_file() or not any(file.parent.glob("checkpoint-*")):
        file.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        return facts
    known, changes = json.loads(file.read_text(encoding="utf-8")), []
    for name in sorted({*known, *facts} - ROUNDING):
        was, now = known.get(name), facts.get(name)
        is_hash = any(isinstance(value, str) and len(value) == 64 for value in (was, now))
        if was != now:
            changes.append(f"{name} has changed" if is_hash else f"{name} was {was}, now {now}")
    if changes:
        raise common.UserError(
            f"{file.parent} holds another run: since it drew its samples, {'; '.join(changes)}. "
            "--resume never starts a new folder, --output-dir names another one"
        )
    return known


def _write(file: Path, rows: list[common.Row], tokenizer: Any) -> None:
    lines = []
    for row in rows:
        record = {
            "prompt": prompt_text(row.prompt, tokenizer),
            "responses": [text_of(ids, tokenizer) for ids in row.responses],
            "scores": row.scores.tolist(),
            "prompt_ids": row.prompt.tolist(),
            "response_ids": [ids.tolist() for ids in row.responses],
        }
        lines.append(json.dumps(record) + "\n")
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    temporary.write_text("".join(lines), encoding="utf-8")
    os.replace(temporary, file)


def _read(file: Path) -> list[common.Row] | None:
    if not file.is_file():
        return None
    rows = []
    for record in map(json.loads, file.read_text(encoding="utf-8").splitlines()):
        prompt = np.array(record["prompt_ids"], np.int32)
        responses = [np.array(ids, np.int32) for ids in record["response_ids"]]
        rows.append(common.Row(prompt, responses, prompt, np.array(record["scores"], np.float64)))
    return rows


def prompt_text(prompt: np.ndarray, tokenizer: Any) -> str:
    """Return a prompt as it is in a data set: without the BOS that was put before it."""
    ids, bos = prompt.tolist(), tokenizer.bos
    return tokenizer.decode(ids[len(bos) :] if ids[: len(bos)] == bos else ids)
