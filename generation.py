"""Sampling: batched, with a key-value cache, imported only where something is generated.

What a row gets does not depend on its batch mates, on the number of processes or on what was drawn
before: token t of sample k of prompt i is found with the one uniform number that belongs to
(seed, i, k, t), by inverting the cumulative distribution.

How a batch goes: its prompts, padded on the left, go through the model once; what the cache then
holds of each is copied for each of its K samples; from there on every row adds a token a pass. Rows
that have ended leave the batch, and nothing more is computed for them.

A model that is spread over processes (--fsdp) is put together on each of them while it samples, for
else all weights would travel for every token. That costs each process the memory of one whole model
in the dtype that it computes with, and is said when it happens; in return no process waits for
another within a batch.

`sample_and_score` keeps what it has made in the cache (`--cache-dir`), in a file named by all that
samples and scores depend on: a run that was killed goes on with the same ones, to the last token,
and so does another run that only learns from them in another way.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import common

GIB = 2**30


@torch.no_grad()
def generate(
    policy: nn.Module,
    prompts: list[np.ndarray],  # token ids, BOS included
    stop_ids: frozenset[int],
    max_new_tokens: int,
    temperature: float,  # 0: greedy
    seed: int,
    run: "common.Processes",
    batch_size: int = 256,  # sequences; all samples of a prompt are in one batch
    label: str = "sampling",
    samples: int = 1,  # K, a prompt
    top_k: int = 0,  # only so many of the likeliest tokens are drawn; 0: all
    first: int = 0,  # the number of the first prompt, where these are a part of a list
) -> list[np.ndarray]:
    """K responses a prompt, one prompt's after another's, on every process; a response that reached
    its end has the stop token at its end.
    """
    if temperature == 0 and samples > 1:
        raise ValueError(f"greedy (temperature 0) gives {samples} equal samples: ask for one")
    softcap = getattr(policy.config, "attn_logit_softcapping", None)
    eager = policy.config._attn_implementation == "eager" or softcap
    each = -(-len(prompts) // run.world)  # so that no process is without work
    size = max(1, min(batch_size // samples, each))  # prompts
    if policy.dtype == torch.float64 and eager:
        size = 1  # Transformers' eager softmax is fp32: there a row of padding alone is NaN
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    parts = [order[at : at + size] for at in range(0, len(order), size)]
    found = torch.full((len(prompts), samples, max_new_tokens), -1, dtype=torch.int32)
    drawn, begin = 0, time.perf_counter()
    _say_what_spread_costs(policy)
    with _attention_for_sampling(policy), common.weights_together(policy):
        for part, mine in run.share(parts, label):
            # One stream of uniforms a row: not moved by who else is in the batch. For numpy
            # [seed, i, 0] is [seed, i], so the first sample of many is that of one alone.
            streams = [
                np.random.default_rng([seed, first + i, k]).random(max_new_tokens)
                for i in part
                for k in range(samples)
            ]
            with common.autocast(policy):  # around all tokens: the low weights are made once
                new = _generate_batch(
                    policy,
                    [prompts[i] for i in part],
                    stop_ids,
                    max_new_tokens,
                    temperature,
                    torch.from_numpy(np.stack(streams)),
                    samples,
                    top_k,
                )
            if not mine:
                continue
            found[part] = new.view(len(part), samples, -1).to("cpu", torch.int32)
            drawn += int((new >= 0).sum())
            if bar := getattr(run, "inner_bar", None):
                speed = drawn * run.world / (time.perf_counter() - begin)  # the others do as much
                bar.set_postfix_str(f"{speed:,.0f} tok/s", refresh=False)
    if run.world > 1:  # every row was made by one process; elsewhere it is -1
        torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
    return [row[row >= 0].numpy() for row in found.flatten(0, 1)]


def _say_what_spread_costs(policy: nn.Module) -> None:
    spread = hasattr(next(policy.parameters()), "full_tensor")
    if spread and not getattr(policy, "sampling_cost_said", False):
        policy.sampling_cost_said = True
        held = sum(p.numel() for p in policy.parameters()) * policy.compute_dtype.itemsize / GIB
        common.say("sampling", f"all weights together on each process: {held:.2f} GiB more there")


@contextmanager
def _attention_for_sampling(policy: nn.Module) -> Iterator[None]:
    """flex_attention would be compiled again for every length of the cache; and so would compiled
    layers, each for itself, until no graph is left for training.
    """
    asked, compiled = policy.config._attn_implementation, getattr(policy, "compiled", False)
    flex = asked == "flex_attention"
    if flex:
        softcap = getattr(policy.config, "attn_logit_softcapping", None)
        policy.set_attn_implementation("eager" if softcap else "sdpa")
    try:
        with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
            yield
    finally:
        if flex:
            policy.set_attn_implementation(asked)


def _generate_batch(
    policy: nn.Module,
    prompts: list[np.ndarray],
    stop_ids: frozenset[int],
    max_new_tokens: int,
    temperature: float,
    uniforms: Tensor,  # (B * K, max_new_tokens) in [0, 1)
    samples: int = 1,  # K
    top_k: int = 0,
) -> Tensor:
    """(B * K, max_new_tokens) new tokens, -1 after the end of a row."""
    device, width = policy.device, max(map(len, prompts))
    ids = torch.zeros(len(prompts), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    # Padded on the left, so that all rows grow on the right together.
    for i, prompt in enumerate(prompts):
        ids[i, width - len(prompt) :] = torch.from_numpy(prompt.astype(np.int64))
        mask[i, width - len(prompt) :] = 1
    ids, mask, uniforms = ids.to(device), mask.to(device), uniforms.to(device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)  # a row's first real token is at position 0
    stops = torch.tensor(sorted(stop_ids), device=device)
    found = torch.full(uniforms.shape, -1, device=device)
    rows = torch.arange(len(found), device=device)  # which row of `found` a row of the batch is
    cache = None
    for t in range(max_new_tokens):
        out = policy(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache,
            use_cache=True, logits_to_keep=1,
        )  # fmt: skip
        cache, logits, positions = out.past_key_values, out.logits[:, -1], positions[:, -1:]
        if t == 0 and samples > 1:  # the prompts are done: from B rows to B * K
            cache.batch_repeat_interleave(samples)
            logits, mask, positions = (
                x.repeat_interleave(samples, 0) for x in (logits, mask, positions)
            )
        token = _draw(logits, temperature, top_k, uniforms[rows, t, None])
        found[rows, t] = token
        left = (~torch.isin(token, stops)).nonzero()[:, 0]
        if not len(left):
            break
        if len(left) < len(rows):  # the others have ended: go on without them
            cache.batch_select_indices(left)
            token, mask, positions, rows = (x[left] for x in (token, mask, positions, rows))
        ids, positions = token[:, None], positions + 1
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], 1)
    return found


def _draw(logits: Tensor, temperature: float, top_k: int, uniforms: Tensor) -> Tensor:
    """(R,) tokens: of each row of logits (R, V) the one that its uniform number (R, 1) is for."""
    device, logits = logits.device, logits.double()
    if temperature == 0:
        return logits.argmax(-1)
    among = None
    if 0 < top_k < logits.shape[-1]:
        # Of those level with the last that may be drawn, the lower ids: always exactly so many.
        least = logits.topk(top_k).values[:, -1:]
        above, level = logits > least, logits == least
        kept = above | (level & (level.cumsum(-1) <= top_k - above.sum(-1, keepdim=True)))
        among = kept.nonzero()[:, 1].view(-1, top_k)  # (R, top_k) ids, in their order
        logits = logits.gather(-1, among)
    # The uniform is scaled to the last entry, not to 1: rounding never steps past the end.
    # CUDA's cumsum is not the same bit for bit, so --deterministic would refuse it there.
    exact = torch.are_deterministic_algorithms_enabled()
    probabilities = logits.div_(temperature).softmax(-1)  # a vocabulary wide, in float64
    del logits
    cumulative = probabilities.to("cpu" if exact else device).cumsum_(-1)
    at = uniforms.to(cumulative) * cumulative[:, -1:]
    place = torch.searchsorted(cumulative, at, right=True).to(device)
    place = place.clamp(max=cumulative.shape[-1] - 1)
    return (place if among is None else among.gather(-1, place))[:, 0]


def text_of(ids: np.ndarray, tokenizer) -> str:
    """A response as text, without its end."""
    return tokenizer.decode([int(i) for i in ids if int(i) not in tokenizer.stop_ids])


# --------------------------------------------------------------------------------------------------
# Samples and their scores, kept


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
    ours = [common.HERE / f"{name}.py" for name in ("common", "generation", "scoring")]
    files = {file.name: common.file_hash(file) for file in ours if file.is_file()}
    files |= contents_of(model) | contents_of(reward)
    named = {"model": model, "reward": reward, "dtype": dtype, "attn": attn}
    return named | {"lora_rank": lora_rank} | versions | {"files": files}


def contents_of(name: str) -> dict[str, str]:
    """File -> hash: the weights, settings and tokenizer of a model's folder, of both of a@b, or the
    file of a function. A hub id stands for itself: it has none.
    """
    file = common.HERE / "family.py" if name == "family" else Path(name.rpartition(":")[0])
    found = {file.expanduser()} if file.suffix == ".py" else set()
    for part in (name, *name.split("@")):  # a folder may have such a name itself
        path = common.model_folder(part)
        for pattern in ("*.safetensors", "*config.json", "tokenizer.json"):
            found.update(path.glob(pattern))
    return {str(file): common.file_hash(file) for file in sorted(found) if file.is_file()}


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
            responses = generate(
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
                "responses": [text_of(response, tokenizer) for response in row.responses],
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
            record |= {side: text_of(ids, tokenizer), f"{side}_score": float(score)}
            record |= {f"{side}_ids": ids.tolist()}
        lines.append(json.dumps(record | {"prompt_ids": row.prompt.tolist()}) + "\n")
    common.write_atomically(file, "".join(lines))
