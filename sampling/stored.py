"""Samples and their scores, kept in the cache: a killed run continues with the same ones, to the
last token, and runs that learn from the same samples in different ways draw them only once.

A cached file holds some prompts, a JSON line each, and its checksum is next to it. Its folder is
named by a digest of everything that the samples depend on. The run's folder gets a copy of all
lines, which is also a data set of ranked rows, and the facts behind the digest.
"""

import hashlib
import json
import os
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import common
from sampling.generate import generate, text_of
from sampling.rewards import Reward, contents_of
from training.checkpoint import file_hash
from training.run_folder import package_version, rows_digest

ROUNDING = {"attn", "torch", "transformers"}  # these facts move samples by rounding only
RESPONSES_PER_FILE = 4096


def facts_of(args: Any, prompts: list[np.ndarray], seed: int) -> dict[str, Any]:
    """Return what samples and scores depend on. It hashes all weights."""
    flags = "model reward dtype attn lora_rank samples temperature top_k".split()
    facts = {name: getattr(args, name) for name in flags} | {"seed": seed}
    facts["max_new_tokens"] = args.max_length - args.max_prompt_length
    facts["the list of prompts"] = rows_digest([common.Row(ids, [], ids) for ids in prompts])
    facts |= {name: package_version(name) for name in ("torch", "transformers")}
    ours = [common.HERE / "common.py", *sorted((common.HERE / "sampling").glob("*.py"))]
    facts |= {file.name: file_hash(file) for file in ours}
    return facts | contents_of(args.model) | contents_of(args.reward)


def sample_and_score(
    policy: common.Policy,
    prompts: list[np.ndarray],
    tokenizer: Any,
    reward: Reward,
    run: common.Run,
    seed: int,
    label: str = "sampled",  # name of the file in the run's folder
) -> list[common.Row]:
    """Return --samples scored responses per prompt, on every process."""
    args, K = run.args, run.args.samples
    facts = partial(settle, run.folder / f"{label}.json", lambda: facts_of(args, prompts, seed))
    digest = hashlib.sha256(json.dumps(common.from_main(facts), sort_keys=True).encode())
    folder = Path(args.cache_dir or "runs/.cache").expanduser()
    folder /= f"sampled-{digest.hexdigest()[:24]}"
    rows: list[common.Row] = []
    files, made, seconds = [], 0, 0.0
    size = max(1, RESPONSES_PER_FILE // K)  # prompts in a file
    for at in range(0, len(prompts), size):
        part = prompts[at : at + size]
        files.append(folder / f"{at}-{at + len(part)}.jsonl")
        # Only the main process touches files: other machines have other disks.
        new = common.from_main(partial(_read, files[-1]))
        if new is None:
            begin = time.perf_counter()
            responses = generate(
                policy, part, tokenizer.stop_ids, args.max_length - args.max_prompt_length,
                args.temperature, seed, run, args.sample_batch_size, samples=K, top_k=args.top_k,
                first=at, label=f"{label} {at + len(part):,}/{len(prompts):,}",
            )  # fmt: skip
            seconds += time.perf_counter() - begin
            made += sum(map(len, responses))
            scores = reward([prompt for prompt in part for _ in range(K)], responses).numpy()
            slices = [slice(k * K, (k + 1) * K) for k in range(len(part))]
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
    many = f"{len(rows) * K:,} answers to {len(rows):,} prompts"
    common.say("sampling", f"{many} ({speed}), in {folder}")
    return rows


def settle(file: Path, make_facts: Any) -> dict[str, Any]:
    """Return the facts behind the run's samples. A run that has begun to learn keeps them."""
    facts = json.loads(json.dumps(make_facts()))
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
    file.with_suffix(".sha256").write_text(file_hash(temporary))
    os.replace(temporary, file)


def _read(file: Path) -> list[common.Row] | None:
    if not file.is_file():
        return None
    checksum = file.with_suffix(".sha256")
    if not checksum.is_file() or checksum.read_text() != file_hash(file):
        common.say("", f"{file} was changed since it was written: drawn again")
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
