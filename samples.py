"""Samples and their scores, kept in a file: what rso.py learns from, and what a run that was killed
goes on with, to the last token.

The file lies in the cache under the digest of everything that moves a token or a score, so runs
that differ in what they do with the samples share them. Imported by what samples once, before
training.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

import common
import generation
import scoring


@dataclass
class Sampled:
    prompt: np.ndarray  # token ids
    responses: list[np.ndarray]  # K, token ids; the stop token at the end of those that reached it
    scores: np.ndarray  # (K,) float64


def facts_of(model: str, reward: str, dtype: str, attn: str, lora_rank: int) -> dict[str, Any]:
    """What samples and scores depend on, but for what `sample_and_score` is given: as JSON knows
    it, hashes under `files`. For the main process: it reads all weights.
    """
    versions = {name: common._version(name) for name in ("torch", "transformers")}
    ours = [common.HERE / f"{name}.py" for name in ("common", "generation", "samples", "scoring")]
    files = {file.name: common.file_hash(file) for file in ours if file.is_file()}
    files |= scoring.contents_of(model) | scoring.contents_of(reward)
    named = {"model": model, "reward": reward, "dtype": dtype, "attn": attn}
    return named | {"lora_rank": lora_rank} | versions | {"files": files}


def sample_and_score(
    policy: nn.Module,
    prompts: list[np.ndarray],
    tokenizer,
    reward: Callable[[list[np.ndarray], list[np.ndarray]], Tensor],  # (N,), equal everywhere
    run: "common.Run",
    cache_dir: str | None,  # default: runs/.cache
    facts: dict[str, Any],  # of facts_of()
    samples: int,  # K, a prompt
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    seed: int,
    chunk: int = 0,  # prompts sampled, scored and written at a time; 0: those of 4096 answers
    label: str = "sampled",  # what the file is called in the run's folder
) -> list[Sampled]:
    """K scored responses a prompt, on every process. What the cache holds already is read, the rest
    is made. The file is a data set of ranked rows too, for scripts that learn from them.
    """
    if not prompts:
        raise common.UserError("there is no prompt to sample an answer to")
    chunk = chunk or max(1, 4096 // samples)
    facts = facts | {"samples": samples, "max_new_tokens": max_new_tokens, "top_k": top_k}
    facts |= {"temperature": temperature, "seed": seed, "prompts": _digest(prompts)}
    # For the main process alone: other machines have other disks.
    kept = _Kept(run.folder, label, Path(cache_dir or "runs/.cache"), facts, prompts, samples)
    result: list[Sampled] = []
    made, seconds, chunks = 0, 0.0, -(-len(prompts) // chunk)
    try:
        there = common.from_main(lambda: kept.open(chunk))
        done = there["prompts"]
        for at in range(0, len(prompts), chunk):
            run.stop_if_asked()  # what is in the file by now is not lost
            asked = prompts[at : at + chunk]
            if at < done:
                part = common.from_main(lambda at=at: kept.read(at, chunk))
                for prompt, ids, scores in zip(asked, part["ids"], part["scores"], strict=True):
                    responses = [np.array(response, np.int32) for response in ids]
                    result.append(Sampled(prompt, responses, np.array(scores, np.float64)))
                continue
            begin = time.perf_counter()
            responses = generation.generate(
                policy, asked, tokenizer.stop_ids, max_new_tokens, temperature, seed, run,
                label=f"{label} {at // chunk + 1}/{chunks}", samples=samples, top_k=top_k, first=at,
            )  # fmt: skip
            seconds += time.perf_counter() - begin
            made += sum(map(len, responses))
            scores = reward([prompt for prompt in asked for _ in range(samples)], responses)
            new = [
                Sampled(prompt, responses[k : k + samples], scores[k : k + samples].numpy())
                for prompt, k in zip(asked, range(0, len(responses), samples), strict=True)
            ]
            if common.MAIN_PROCESS:
                _append(kept.file, new, tokenizer)
            result += new
        if common.MAIN_PROCESS:
            kept.leave_in_run()
    finally:
        kept.unlock()
    told = f"{len(result) * samples:,} answers to {len(result):,} prompts: "
    if done < len(prompts):
        told += f"{made / seconds:,.0f} tokens/s, "
        told += f"those to {done:,} prompts were there, in " if done else "in "
    else:
        told += "from "
    common.say("sampling", told + there["file"])
    return result


def _digest(prompts: list[np.ndarray]) -> str:
    state = hashlib.sha256()
    for ids in prompts:
        state.update(len(ids).to_bytes(4, "little") + ids.astype("<i4").tobytes())
    return state.hexdigest()


# What moves samples by rounding alone. A run that has a checkpoint may go on with other ones of
# these: then with the samples in its folder.
ROUNDING = ("attn", "torch", "transformers")


class _Kept:
    """A file of samples in the cache, a JSON line a prompt, its facts beside it; once it is whole,
    both are in the run's folder too.
    """

    def __init__(
        self,
        folder: Path,
        label: str,
        cache: Path,
        facts: dict[str, Any],
        prompts: list[np.ndarray],
        samples: int,
    ):
        self.own, self.facts = folder / f"{label}.jsonl", json.loads(json.dumps(facts))
        text = json.dumps(self.facts, sort_keys=True)
        self.file = cache / f"sampled-{hashlib.sha256(text.encode()).hexdigest()[:24]}.jsonl"
        self.prompts, self.samples = prompts, samples
        self.ends = [0]  # where each row ends, in bytes
        self.lock: Any = None

    def open(self, chunk: int) -> dict:
        """Find the rows that are there. Of a file that is not whole, whole chunks stay, and nobody
        else may write to it until `unlock`.
        """
        self.compare_with_run()
        self.ends = self.find_ends()
        if len(self.ends) <= len(self.prompts):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.take_lock()
            self.ends = self.find_ends()  # again: another run may have written until now
            there = len(self.ends) - 1
            if there < len(self.prompts):
                del self.ends[there // chunk * chunk + 1 :]
            _write_facts(self.file, self.facts)
            with open(self.file, "ab") as f:
                f.truncate(self.ends[-1])
                os.fsync(f.fileno())
        return {"prompts": len(self.ends) - 1, "file": str(self.file)}

    def compare_with_run(self) -> None:
        """A run with a checkpoint has begun to learn from other samples than these, if the facts in
        its folder are others.
        """
        try:
            known = json.loads(self.own.with_suffix(".json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return
        differ = self.differences(known)
        if not differ or not any(self.own.parent.glob("checkpoint-*")):
            return
        if names := [name for name in differ if name not in ROUNDING]:
            raise common.UserError(
                f"{self.own.parent} holds another run: since its {self.own.name} was made, "
                f"{'; '.join(differ[name] for name in names)}. "
                "--resume never starts a new folder beside it"
            )
        cached, self.file = self.file, self.own
        if len(self.find_ends()) <= len(self.prompts):
            self.file = cached
            return
        self.facts = known
        common.say("resume", f"{'; '.join(differ.values())}: with the samples of before")

    def differences(self, known: dict[str, Any]) -> dict[str, str]:
        """Name of a fact -> how it was and is."""
        told = {}
        for name, now in self.facts.items():
            if name != "files" and known.get(name) != now:
                told[name] = f"{name} was {known.get(name)}, now {now}"
        if "prompts" in told:
            told["prompts"] = "the prompts have changed (--dataset, --eval-dataset)"
        was, now = known.get("files", {}), self.facts.get("files", {})
        for name in sorted({*was, *now}):
            if was.get(name) != now.get(name):
                told[name] = f"{name} has changed"
        return told

    def find_ends(self) -> list[int]:
        ends = [0]
        if self.file.is_file():
            with open(self.file, "rb") as f:
                for line, prompt in zip(f, self.prompts, strict=False):
                    row = common.parse_json(line)
                    if not line.endswith(b"\n") or not _is_of(row, prompt, self.samples):
                        break
                    ends.append(ends[-1] + len(line))
        return ends

    def read(self, at: int, n: int) -> dict:
        """Of n rows, or as many as are left, what other processes do not know."""
        with open(self.file, "rb") as f:
            f.seek(self.ends[at])
            rows = [common.parse_json(f.readline()) for _ in self.prompts[at : at + n]]
        return {
            "ids": [row["response_ids"] for row in rows],
            "scores": [row["scores"] for row in rows],
        }

    def leave_in_run(self) -> None:
        """The same file under two names where the disk can do that, else a copy."""
        if not (self.own.is_file() and self.own.samefile(self.file)):
            new = self.own.with_name(f".{self.own.name}.tmp")
            new.unlink(missing_ok=True)
            try:
                os.link(self.file, new)
            except OSError:  # another disk, or one without links
                shutil.copyfile(self.file, new)
            os.replace(new, self.own)
        _write_facts(self.own, self.facts)

    def take_lock(self) -> None:
        """Two runs would write into each other's lines. As common.Run._lock."""
        try:
            import fcntl

            self.lock = open(self.file.with_suffix(".lock"), "w")
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise common.UserError(
                f"another run is sampling the same answers, into {self.file}: start this one when "
                "that is done; it will read them"
            ) from None
        except (ImportError, OSError):  # no such locks here (Windows, some network disks)
            pass

    def unlock(self) -> None:
        if self.lock:
            self.lock.close()


def _write_facts(file: Path, facts: dict[str, Any]) -> None:
    common.write_atomically(file.with_suffix(".json"), json.dumps(facts, indent=1) + "\n")


def _is_of(row: Any, prompt: np.ndarray, samples: int) -> bool:
    if not isinstance(row, dict) or row.get("prompt_ids") != prompt.tolist():
        return False
    return len(row.get("response_ids", ())) == len(row.get("scores", ())) == samples


def _append(file: Path, rows: list[Sampled], tokenizer) -> None:
    with open(file, "a", encoding="utf-8") as f:
        for row in rows:
            record = {
                "prompt": _prompt_text(row.prompt, tokenizer),
                "responses": [
                    generation.text_of(response, tokenizer) for response in row.responses
                ],
                "scores": row.scores.tolist(),
                "prompt_ids": row.prompt.tolist(),
                "response_ids": [response.tolist() for response in row.responses],
            }
            f.write(json.dumps(record) + "\n")
        f.flush()
        os.fsync(f.fileno())


def _prompt_text(prompt: np.ndarray, tokenizer) -> str:
    """As it stands in a data set: without the BOS in front, where there is one."""
    ids, bos = prompt.tolist(), tokenizer.bos
    return tokenizer.decode(ids[len(bos) :] if ids[: len(bos)] == bos else ids)


def write_pairs(file: Path, rows: list["common.Row"], tokenizer) -> None:
    """Rows of a chosen and a rejected response with their scores, a JSON line each: the texts, for
    other methods, and the ids that are trained on here.
    """
    lines = []
    for row in rows:
        record: dict[str, Any] = {"prompt": _prompt_text(row.prompt, tokenizer)}
        for side, ids, score in zip(("chosen", "rejected"), row.responses, row.scores, strict=True):
            record |= {side: generation.text_of(ids, tokenizer), f"{side}_score": float(score)}
            record |= {f"{side}_ids": ids.tolist()}
        lines.append(json.dumps(record | {"prompt_ids": row.prompt.tolist()}) + "\n")
    common.write_atomically(file, "".join(lines))
