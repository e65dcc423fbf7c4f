"""What every method file shares, in the order in which its `main` uses it.

Processes and the run folder; rows of data; the model; batches; response log-probs; reference
log-probs; the optimizer step; metrics, checkpoints, resume and export. No paper has an opinion
about any of it: what one has an opinion about (a loss, a KL, a normalisation, a default) stands in
that method's file.

A row of data is always the same thing: a prompt and its K responses. A method is a function of the
(B, K) matrix of response log-probs. With this file, one method file, a JSONL and a local model,
training works; `kernels/` (fused log-probs), `report.py` (curves, samples, the closing block),
`generation.py`, `scoring.py` (rewards), `sources.py` (short names, hubs), `tokenising.py` (large
sets), `memory.py` (the plan) and `family.py` are used where they are; `sharding.py`, `adapters.py`
and `tracking.py` where a flag asks for them.

Copyright (c) 2026 the plainpref authors. MIT licence. Tested with torch 2.13 and transformers
5.23.
"""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import wraps
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.utils import logging as hf_logging

HERE = Path(__file__).resolve().parent
MAIN_PROCESS = os.environ.get("RANK", "0") == "0"  # the one that prints and writes


class UserError(Exception):
    """Something the person at the keyboard can mend. Shown as one message, without a traceback."""


def _show_user_errors(kind, error, trace, default=sys.excepthook) -> None:
    memory = beside("memory") if issubclass(kind, MemoryError | RuntimeError) else None
    if memory and memory.is_out_of_memory(error) and Run.current:
        default(kind, error, trace)
        advice = memory.next_flag(Run.current.args, Run.current.world)
        print(f"error: out of memory on process {Run.current.rank}: {advice}", file=sys.stderr)
    elif not issubclass(kind, UserError):
        default(kind, error, trace)
    elif MAIN_PROCESS:
        print(f"error: {error}", file=sys.stderr, flush=True)
    else:
        let_main_go_first()
        # Still here: the main process knows nothing of it. Another machine may lack a file.
        where = f"process {os.environ.get('RANK')} ({platform.node()})"
        print(f"error on {where}: {error}", file=sys.stderr, flush=True)


sys.excepthook = _show_user_errors


def let_main_go_first() -> None:
    """torchrun ends all when one has failed, and the one that prints may not be so far."""
    time.sleep(20)  # it is ended, and so is this sleep, as soon as that one has printed


def command_line(arguments: type, description: str) -> Any:
    """An instance of `arguments`. A wrong flag is told once, by the main process."""
    import tyro

    try:
        return tyro.cli(arguments, description=description, console_outputs=MAIN_PROCESS)
    except SystemExit as stop:
        if stop.code and not MAIN_PROCESS:
            let_main_go_first()
        raise


def say(label: str, text: str) -> None:
    """One aligned line of the header, from the main process only."""
    if MAIN_PROCESS:
        print(f"{label:<11}{text}", flush=True)


# --------------------------------------------------------------------------------------------------
# 1. Start: arguments, processes, the run folder


def short_name(model: str) -> str:
    """The name under which a method's table knows a model: what a checkpoint of ours was trained
    from, through any number of runs, else the last part of a hub id or path.
    """
    config = model_folder(model) / "config.json"
    if model == "tiny-untrained":
        return "tiny"
    if config.is_file():
        try:
            ours = json.loads(config.read_text(encoding="utf-8")).get("plainpref")
        except ValueError:
            raise UserError(f"--model {model}: {config} is not JSON") from None
        if ours:
            return ours["base_model"]
    return Path(model).name.lower()


def model_folder(model: str) -> Path:
    """The folder that `tiny`, `tiny-preferred` or a path stands for. (A hub id gives one that is
    not there.)
    """
    embedded = {"tiny": HERE / "tiny", "tiny-preferred": HERE / "tiny" / "preferred"}
    return embedded.get(model) or Path(model).expanduser()


def fill_in(args: Any, settings: dict[str, dict]) -> tuple[dict[str, str], dict]:
    """Give every argument left out the value of its model's row in the table. Returns where each
    argument came from, and the row.
    """
    name = short_name(args.model)
    other = next(key for key in settings if key != "tiny")  # for models that have no row
    published = name if name in settings else other
    row, origin, taken = settings[published], {}, []
    for f in dataclasses.fields(args):
        value = getattr(args, f.name)
        if f.name == "max_steps" and args.epochs and origin["epochs"] == "command line":
            row = {key: x for key, x in row.items() if key != "max_steps"}  # epochs were asked for
        if value is None and f.name in row:
            setattr(args, f.name, row[f.name])
            taken.append(f"{f.name} {row[f.name]}")
            origin[f.name] = f"{published}: {row['source']}"
        else:
            origin[f.name] = "default" if value == f.default else "command line"
    if not args.lora_rank:  # left out, or 0
        args.lora_rank = 0
        origin["lora_rank"] = origin["lora_rank"] if "lora_rank" in row else "default"
    say("settings", ", ".join(taken) or "all from the command line")
    untested = "" if published == name else f", untested on {name}"
    published = row["source"] if published == "tiny" else f"published for {published}{untested}"
    say("", published if published == row["source"] else f"{published} ({row['source']})")
    return origin, row


def check_shared(args: Any) -> None:
    """Values that no script can work with, named before anything is loaded."""
    positive = "batch_size micro_batch_size max_length max_prompt_length max_steps".split()
    not_negative = "eval_every sample_every save_every keep_last weight_decay max_grad_norm seed"
    for name in positive + not_negative.split():
        value, least = getattr(args, name), int(name in positive)
        if value is not None and value < least:
            raise UserError(f"{flag(name)} must be {least} or more, got {value}")
    if not args.max_steps and not (args.epochs and 0 < args.epochs < float("inf")):
        raise UserError(f"--epochs must be positive, got {args.epochs}")
    if args.lr is None or not 0 < args.lr < float("inf"):  # nan is neither
        raise UserError(f"--lr must be positive, got {args.lr}")
    if args.lora_rank:
        needed("adapters", "--lora-rank").check(args.lora_rank)
    if args.fsdp:
        needed("sharding", "--fsdp")
    if args.track != "none" and MAIN_PROCESS:
        needed("tracking", "--track").check(args.track)
    if not 0 <= args.warmup_ratio < 1:
        raise UserError(f"--warmup-ratio must be in [0, 1), got {args.warmup_ratio}")
    if args.max_prompt_length >= args.max_length:
        raise UserError(
            f"--max-prompt-length {args.max_prompt_length} leaves no room for a response in "
            f"--max-length {args.max_length}"
        )


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


# Arguments that leave the trained weights as they are but for rounding: a resumed run may change
# them.
BOOKKEEPING = """output_dir resume eval_every sample_every save_every keep_last
cache_dir export_dtype micro_batch_size deterministic attn share_prompt fused_logps fsdp
gradient_checkpointing compile track""".split()


def start(args: Any, settings: dict[str, dict], script: str) -> Run:
    """Fill in what was left out of `args`, start the processes, open the run folder. The first line
    of every main.
    """
    origin, row = fill_in(args, settings)
    check_shared(args)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if args.dtype is None:
        bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
        args.dtype = "bfloat16" if bf16 else "float32"
    hf_logging.disable_progress_bar()  # a bar a file says nothing here
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    torch.manual_seed(args.seed)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        # Long, because one process may tokenise or write a checkpoint while the others wait.
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=2))
    run = Run(args, origin, row, Path(script).resolve())
    run.open_folder()
    return run


def processes() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def from_main(make: Callable[[], dict]) -> dict:
    """What `make` returns on the main process, on every process; a UserError there is one
    everywhere.
    """
    result = {}
    if MAIN_PROCESS:
        try:
            result = make()
        except UserError as error:
            result = {"error": str(error)}
    if processes() > 1:
        text = json.dumps(result).encode()
        size = torch.tensor([len(text)])
        dist.broadcast(size, 0)
        data = torch.zeros(int(size), dtype=torch.uint8)
        if MAIN_PROCESS:
            data = torch.tensor(list(text), dtype=torch.uint8)
        dist.broadcast(data, 0)
        result = json.loads(bytes(data.tolist()))
    if "error" in result:
        raise UserError(result["error"])
    return result


def any_process(this_one: bool) -> bool:
    """Whether it is so on any process."""
    found = torch.tensor(float(this_one))
    if processes() > 1:
        dist.all_reduce(found, dist.ReduceOp.MAX)
    return bool(found)


def over_processes(tensor: Tensor) -> Tensor:
    """The sum of what each process has."""
    if processes() > 1:
        dist.all_reduce(tensor)
    return tensor


class Processes:
    """This process among its peers, and the signals that ask it to stop."""

    def __init__(self):
        self.rank, self.world = int(os.environ.get("RANK", "0")), processes()
        local = int(os.environ.get("LOCAL_RANK", "0"))
        cuda = torch.cuda.is_available()
        self.device = torch.device("cuda", local) if cuda else torch.device("cpu")
        self.signal = (
            0  # the number of a SIGTERM or SIGINT that came while there is something to save
        )
        self.to_save = False
        self.in_step = False  # every process takes part in every forward pass (--fsdp)
        self.inner_bar = None  # of the loop that `share` is in
        numbers = (signal.SIGTERM, signal.SIGINT)
        self.handlers = {number: signal.signal(number, self._on_signal) for number in numbers}

    def _on_signal(self, number: int, frame: Any) -> None:
        again = self.signal and time.monotonic() - self.signalled_at > 3  # a launcher may echo it
        if again or not self.to_save:  # asked twice, or nothing to lose: now
            raise SystemExit(128 + number)
        if not self.signal:
            self.signal, self.signalled_at = number, time.monotonic()

    def share(self, micros: list[Any], label: str) -> Iterator[tuple[Any, bool]]:
        """This process's part of a list, with a progress bar; every process goes round equally
        often, so that all agree on a stop asked for with a signal. (item, False) is another
        process's item: only to be in step with a model that is spread over all of them.
        """
        self.inner_bar = progress_bar(range(0, len(micros), self.world), label)
        for at in self.inner_bar:
            mine = at + self.rank < len(micros)
            if mine or self.in_step:
                yield micros[at + self.rank if mine else at], mine
            self.stop_if_asked()

    def stop_if_asked(self) -> None:
        """For loops outside of an optimizer step: all processes stop, if one was asked to."""
        asked = torch.tensor(float(self.signal), device=self.device)
        if self.world > 1:
            dist.all_reduce(asked, dist.ReduceOp.MAX)
        if asked:
            self.stop(int(asked))

    def stop(self, number: int) -> None:
        raise SystemExit(128 + number)


class Run(Processes):
    """One training run: where it stands, what it has measured, and its folder."""

    current: Run | None = None  # the latest one, for what is said when memory runs out

    def __init__(self, args: Any, origin: dict[str, str], row: dict, script: Path):
        super().__init__()
        Run.current = self
        self.args, self.origin, self.row, self.script = args, origin, row, script
        self.folder = Path(args.output_dir or Path("runs") / self._default_name())
        self.step = 0  # optimizer steps done
        self.total_steps = 0  # known when the rows are
        self.policy = self.optimizer = None  # bound by `restore`
        self.sums: dict[str, list] = {}  # metric -> [sum, count], since the last step
        self.kept: dict[str, Any] = {}  # what else a method needs after a resume, as JSON
        self.skipped_in_a_row, self.spoiled = 0, False
        # What makes a reward of the log-ratio of policy and reference, where the method says so.
        self.reward_scale = getattr(args, "beta", None) if hasattr(args, "ref_model") else None
        self.bar = self.tracker = None

    # -- the folder

    def _default_name(self) -> str:
        parts = [self.script.stem]
        for name, where in self.origin.items():
            value = getattr(self.args, name)
            usual = where != "command line" or value == self.row.get(name)
            if not usual and name not in BOOKKEEPING:
                text = re.sub(r"[^\w.+-]+", "_", _short_number(value)).strip("_")
                parts.append(f"{name.replace('_', '')}{'' if text[:1].isdigit() else '-'}{text}")
        name = "-".join(parts)
        if len(name) > 120:
            name = f"{name[:100]}-{hashlib.sha256(name.encode()).hexdigest()[:12]}"
        return name

    def open_folder(self) -> None:
        """Take the folder for this run: a new one, one to continue, or the closing block of a
        finished one.
        """
        answer = from_main(self._open_folder)
        self.folder = Path(answer["folder"])
        if answer["finished"]:
            if MAIN_PROCESS:
                print((self.folder / "summary.txt").read_text(), end="")
                print("\nThis run is finished. To run it again beside the old one: --resume never")
            raise SystemExit(0)

    def _open_folder(self) -> dict:
        if self.folder.is_file():
            raise UserError(f"--output-dir {self.folder} is a file")
        old = self._record_there()
        if self.args.resume == "never":
            old = None
            first, n = self.folder, 1
            while self.folder.exists() and any(self.folder.iterdir()):
                n += 1
                self.folder = first.with_name(f"{first.name}-{n}")
        elif old:
            if self._begun():
                self._refuse_other_run(old)
        elif self.folder.exists() and any(p.name != ".lock" for p in self.folder.iterdir()):
            raise UserError(
                f"{self.folder} is not empty and holds no run of ours. Choose another --output-dir"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock()
        record = self._describe()
        same = old is not None and old["arguments"] == record["arguments"]
        if (self.folder / "summary.txt").is_file() and same:
            return {"folder": str(self.folder), "finished": True}
        (self.folder / "summary.txt").unlink(missing_ok=True)
        write_atomically(self.folder / "run.json", json.dumps(record, indent=1) + "\n")
        for name, source in self._sources().items():
            write_atomically(self.folder / name, source.read_text())
        say("run", f"{self.folder}, {self.world} process(es) on {self.device.type}")
        return {"folder": str(self.folder), "finished": False}

    def _record_there(self) -> dict | None:
        """run.json, if it is one of ours."""
        try:
            record = json.loads((self.folder / "run.json").read_text(encoding="utf-8"))
            return record if {"arguments", "source", "processes"} <= record.keys() else None
        except (OSError, ValueError, AttributeError):
            return None

    def _begun(self) -> bool:
        """Whether there is anything to lose: a run stopped by a mistake in its input left none."""
        logs = any(_size(self.folder / name) for name in LOGS)
        return logs or bool(self._checkpoints())

    def _lock(self) -> None:
        """Two runs in one folder would write over each other."""
        try:
            import fcntl

            self.lock = open(self.folder / ".lock", "w")
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is training in {self.folder}") from None
        except (ImportError, OSError):  # no such locks here (Windows, some network disks)
            pass

    def _refuse_other_run(self, old: dict) -> None:
        new = self._describe()
        if self.script.name not in old["source"]:
            theirs = next(iter(old["source"]))
            raise UserError(f"{self.folder} holds a run of {theirs}; --output-dir names another")
        differ = []
        for name in sorted({*old["arguments"], *new["arguments"]}.difference(BOOKKEEPING)):
            was, now = (record["arguments"].get(name, "(no such flag)") for record in (old, new))
            if was != now and not (name == "max_steps" and self._may_grow(was, now)):
                differ.append(f"{flag(name)} was {was}, now {now}")
        for name, hash in new["source"].items():  # what only one of them used moves nothing
            if old["source"].get(name, hash) == hash:
                continue
            if name.startswith("reward-"):  # perhaps because it had stopped the run
                say(
                    "resume", f"{name.removeprefix('reward-')} has changed since: used as it is now"
                )
            else:
                differ.append(f"{name} has changed since")
        if differ:
            raise UserError(
                f"{self.folder} holds another run: {'; '.join(differ)}. "
                "--resume never starts a new folder beside it, --output-dir names another one"
            )
        if old["processes"] != self.world:
            before = f"{self.world} processes now, {old['processes']} before"
            say("resume", f"{before}: the same steps but for rounding")

    def _may_grow(self, was: int | None, now: int | None) -> bool:
        steady = self.args.schedule == "constant" and not self.args.warmup_ratio
        return steady and was is not None and now is not None and was <= now

    def _sources(self) -> dict[str, Path]:
        """What computes the weights: the script first. A reward's file may be called like ours."""
        used = {"sharding.py": self.args.fsdp, "adapters.py": self.args.lora_rank}
        for name in re.findall(
            r"^import (generation|samples|scoring)$", self.script.read_text(), re.M
        ):
            used[f"{name}.py"] = True
        found = [HERE / "kernels" / "token_logps.py", *(HERE / n for n in used if used[n])]
        found = [self.script, HERE / "common.py", *(file for file in found if file.is_file())]
        sources = {file.name: file for file in found}
        scores = Path((getattr(self.args, "reward", None) or "").rpartition(":")[0])  # FILE.py:name
        if scores.suffix == ".py" and scores.expanduser().is_file():
            sources[f"reward-{scores.name}"] = scores.expanduser()
        return sources

    def _describe(self) -> dict:
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
        return {
            "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            "arguments": dataclasses.asdict(self.args),
            "from": self.origin,
            "processes": self.world,
            "source": {name: file_hash(file) for name, file in self._sources().items()},
            "commit": _git_commit(),
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": _version("transformers"),
                "triton": _version("triton"),
            },
            "hardware": gpu or f"{platform.machine()}, {os.cpu_count()} cores",
        }

    # -- which rows, when: a function of seed, epoch and step alone

    def plan(self, train: Rows, parts: int = 1) -> None:
        """How many steps there are, and how a step is dealt to processes and micro-batches."""
        args = self.args
        if len(train) < args.batch_size:
            raise UserError(
                f"{len(train):,} training rows are less than one --batch-size {args.batch_size}"
            )
        self.check_batch(parts)
        self.steps_per_epoch = len(train) // args.batch_size  # a last short batch is dropped
        self.total_steps = args.max_steps or int(args.epochs * self.steps_per_epoch)
        if self.total_steps < 1:
            raise UserError(
                f"--epochs {args.epochs} of {self.steps_per_epoch} steps each is less than one step"
            )
        self.lengths = [row.tokens() for row in train.rows]
        self.rows = train.digest()
        theirs = from_main(lambda: {"rows": self.rows})["rows"]
        if any_process(theirs != self.rows):
            raise UserError(f"{args.dataset}: not all machines have the same rows of it")
        epochs = self.total_steps / self.steps_per_epoch
        say(
            "steps",
            f"{self.total_steps:,} of {args.batch_size} rows ({epochs:.2f} epochs), "
            f"in micro-batches of {args.micro_batch_size}",
        )
        published = bool(self.row.get("lora_rank"))  # for adapters
        if published != bool(args.lora_rank) and self.origin["lr"] != "command line":
            what = ("all weights; adapters usually want more", "adapters; all weights want less")
            say("", f"--lr {_short_number(args.lr)} was published for {what[published]}")
        if memory := beside("memory"):
            memory.tell(self, train)

    def check_batch(self, parts: int = 1) -> None:
        """That a step can be dealt to processes and micro-batches; in `parts` optimizer steps
        (PPO's minibatches), each of which has its share of the rows.
        """
        args = self.args
        shares = self.world * parts
        each, rest = divmod(args.batch_size, shares)
        if rest:
            near = [n for n in (args.batch_size - rest, args.batch_size - rest + shares) if n]
            of = f" in {parts} minibatches" if parts > 1 else ""
            raise UserError(
                f"--batch-size {args.batch_size} cannot be dealt to {self.world} processes{of}; "
                f"{' or '.join(map(str, near))} can"
            )
        if self.origin["micro_batch_size"] != "command line":
            fits = [n for n in range(1, args.micro_batch_size + 1) if each % n == 0]
            args.micro_batch_size = max(fits)
        elif each % args.micro_batch_size:
            fits = [str(n) for n in range(1, each + 1) if each % n == 0]
            raise UserError(
                f"--micro-batch-size {args.micro_batch_size} does not divide a process's {each} "
                f"rows of a step; {', '.join(fits)} do"
            )

    def step_rows(self, step: int) -> list[list[int]]:
        """The micro-batches of a step."""
        epoch, at = divmod(step, self.steps_per_epoch)
        rng, size = np.random.default_rng([self.args.seed, epoch]), self.args.batch_size
        order = rng.permutation(len(self.lengths)).tolist()[at * size : (at + 1) * size]
        return self.deal(self.lengths, order)

    def deal(self, lengths: list[int], indexes: list[int]) -> list[list[int]]:
        """Micro-batches of these rows; process r takes every world-th of them, from the r-th on.

        They come sorted by length. Dealt to and fro (1 2 3 4, 4 3 2 1, ...) no process gets the
        longest of every round, so none waits long for the others.
        """
        micros = micro_batches(lengths, indexes, self.args.micro_batch_size)
        rounds = [micros[i : i + self.world] for i in range(0, len(micros), self.world)]
        return [m for i, dealt in enumerate(rounds) for m in (dealt[::-1] if i % 2 else dealt)]

    def used_rows(self, train: Rows) -> list[list[int]]:
        """Every row of the run once: the first epoch's micro-batches, then what they left out."""
        first = min(self.total_steps, self.steps_per_epoch)
        micros = [micro for step in range(first) for micro in self.step_rows(step)]
        if self.total_steps > self.steps_per_epoch:
            left = sorted(set(range(len(train))).difference(i for micro in micros for i in micro))
            micros += micro_batches(self.lengths, left, self.args.micro_batch_size)
        return micros

    def held_out_rows(self, held_out: Rows) -> list[list[int]]:
        lengths = [row.tokens() for row in held_out.rows]
        return micro_batches(lengths, list(range(len(held_out))), self.args.micro_batch_size)

    def batches(self, data: Rows) -> Iterator[Batch]:
        """The optimizer steps still to do, from where the run stands."""
        self.bar = progress_bar(range(self.total_steps), self.script.stem, initial=self.step)
        while self.step < self.total_steps:
            # Whatever is drawn in a step depends on (seed, step, process) alone: there is no state
            # to save.
            torch.manual_seed(hash_of(self.args.seed, self.step, self.rank))
            micros = self.step_rows(self.step)
            rows = [data.rows[i] for micro in micros for i in micro]
            mean = mean_length(rows)
            self.clock, self.tokens, self.places, self.filled = time.perf_counter(), 0, 0, 0
            yield Batch(
                (self.collate(data, i, mean) for i in micros[self.rank :: self.world]),
                prompts=len(rows),
                response_tokens=sum(len(r) for row in rows for r in row.responses),
                step=self.step,
                rows=[i for micro in micros for i in micro],
            )
        self.bar.close()

    def collate(self, data: Rows, indexes: list[int], mean: float = 0.0) -> Micro:
        return self.count(collate_for(self.policy, data, indexes, mean))

    def count(self, micro: Micro) -> Micro:
        """What is trained on, for tokens_per_second."""
        self.tokens += micro.tokens
        self.places += micro.input_ids.numel()
        self.filled += micro.filled
        return micro

    # -- metrics are sums and counts, so that they are right over micro-batches and processes

    def add(self, metrics: dict[str, Tensor | tuple[Tensor, Tensor]]) -> None:
        """Values to average at the end of the step; (values, weights) for a weighted mean."""
        for name, value in metrics.items():
            values, weights = value if isinstance(value, tuple) else (value, torch.ones_like(value))
            entry = self.sums.setdefault(name, [0.0, 0.0])
            entry[0] += values.detach().double().sum()
            entry[1] += weights.detach().double().sum()

    def _reduce(self, *more: float) -> tuple[dict[str, float], list[float]]:
        """The metrics over all processes, and the sums of `more` over them, in one exchange."""
        names = sorted(self.sums)
        flat = [x for name in names for x in self.sums[name]] + list(more)
        to = {"dtype": torch.float64, "device": self.device}
        sums = torch.stack([torch.as_tensor(x, **to) for x in flat])
        if self.world > 1:
            dist.all_reduce(sums)
        values = sums.tolist()
        self.sums = {}
        pairs = zip(names, values[0::2], values[1::2], strict=False)
        return {name: s / n for name, s, n in pairs if n}, values[2 * len(names) :]

    def log(self, record: dict[str, Any], **more: Any) -> None:
        if MAIN_PROCESS:
            whole = {k: v if np.isfinite(v) else None for k, v in (record | more).items()}
            with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as f:
                f.write(json.dumps(whole) + "\n")  # NaN is not JSON, so null
            if self.tracker:
                self.tracker.log(whole, self.step)

    def append(self, name: str, records: Iterable[dict]) -> None:
        """Lines of one of LOGS."""
        if MAIN_PROCESS:
            with open(self.folder / name, "a", encoding="utf-8") as f:
                f.writelines(json.dumps(record) + "\n" for record in records)

    # -- one optimizer step

    def update(
        self, policy: nn.Module, optimizer: torch.optim.Optimizer, last: bool = True
    ) -> None:
        """Sum gradients over processes, clip, step, log, save when due. (The loss is already
        divided by counts of the whole step, so gradients are summed, never averaged.) A step that
        has several updates (PPO's) ends with the last one: metrics are averaged over all,
        but grad_norm is the last one's.
        """
        args = self.args
        parameters = [p for p in policy.parameters() if p.requires_grad]
        sum_gradients(parameters)
        norm = whole(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
        factor = schedule_factor(args.schedule, args.warmup_ratio, self.step, self.total_steps)
        metrics, finite = {}, bool(norm.isfinite())
        if last:
            metrics, (tokens, places, filled, signalled) = self._reduce(
                self.tokens, self.places, self.filled, self.signal
            )
            finite = finite and np.isfinite(metrics.get("loss", 0.0))
        if finite:
            if args.max_grad_norm:
                nn.utils.clip_grads_with_norm_(parameters, args.max_grad_norm, norm)
            for group in optimizer.param_groups:
                group["lr"] = args.lr * factor
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        self.spoiled = self.spoiled or not finite
        if not last:
            return
        finite, self.spoiled = not self.spoiled, False
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        self.step += 1
        seconds = time.perf_counter() - self.clock
        self.log(
            {"step": self.step, "epoch": self.step / self.steps_per_epoch, **metrics},
            grad_norm=float(norm),
            lr=args.lr * factor,
            skipped=int(not finite),
            tokens_per_second=tokens / seconds,
            padding=1 - filled / places,
            seconds_per_step=seconds,
            peak_memory_gib=peak_memory(),
        )
        shown = ("loss", "rewards/accuracies", "objective/scores", "objective/kl")
        shown = {n: f"{metrics[n]:.3f}" for n in shown if n in metrics}
        self.bar.set_postfix(shown | {"tok/s": f"{tokens / seconds:,.0f}"}, refresh=False)
        self.bar.update()
        if self.skipped_in_a_row >= 3:
            raise UserError(
                f"loss or gradient was not finite in steps {self.step - 2} to {self.step}; no such "
                f"update touched the weights. A lower --lr is the usual cure; the last good "
                f"checkpoint is in {self.folder}"
            )
        self.log_sizes = {name: _size(self.folder / name) for name in LOGS}
        every = args.save_every
        if self.step == self.total_steps or (finite and every and self.step % every == 0):
            self.save()
        if signalled:  # the sum over processes; each knows its own number, or takes SIGTERM's
            self.stop(self.signal or signal.SIGTERM)

    # -- evaluation

    @property
    def evaluation_due(self) -> bool:
        every = [n for n in (self.args.eval_every, self.args.sample_every) if n]
        return self.step == 0 or any(self.step % n == 0 for n in every)

    @property
    def held_out_due(self) -> bool:
        every = self.args.eval_every
        return self.step in (0, self.total_steps) or bool(every and self.step % every == 0)

    def evaluate(
        self,
        losses_of: Callable[[Micro], tuple[Tensor, dict]],
        held_out: Rows,
        policy: nn.Module,
        tokenizer: Any,
    ) -> None:
        """The method's own loss and metrics on held-out rows, and greedy samples; at step 0 and at
        the end too.
        """
        if len(held_out) and self.held_out_due:
            (training, self.sums), mean = (self.sums, {}), mean_length(held_out.rows)
            with torch.no_grad():
                for indexes, mine in self.share(self.held_out_rows(held_out), "held-out rows"):
                    metrics = losses_of(collate_for(policy, held_out, indexes, mean))[1]
                    self.add(metrics if mine else {})
            # A process may have had no rows; the main one always has some.
            names = from_main(lambda: {"names": list(self.sums)})["names"]
            self.sums = {name: self.sums.get(name, [0.0, 0.0]) for name in names}
            metrics, _ = self._reduce()
            self.sums = training
            self.tell_held_out(metrics)
        self.sample(held_out, policy, tokenizer)

    def tell_held_out(self, metrics: dict[str, float]) -> None:
        self.log({"step": self.step} | {f"eval/{name}": x for name, x in metrics.items()})
        shown = (
            "loss rewards/accuracies rewards/margins objective/scores objective/gold objective/kl"
        )
        told = ", ".join(f"{n} {metrics[n]:.4f}" for n in shown.split() if n in metrics)
        self.print(f"step {self.step:<6}held-out {told}")

    def sample(self, held_out: Rows, policy: nn.Module, tokenizer: Any) -> None:
        """Greedy answers to a few held-out prompts, when due."""
        ends, every = self.step in (0, self.total_steps), self.args.sample_every
        if ends or (every and self.step % every == 0):
            if report := beside("report"):
                report.sample(self, held_out, policy, tokenizer)
        self.clock = time.perf_counter()  # a step's time is without its evaluation

    def print(self, text: str) -> None:
        """A line that does not tear the progress bar."""
        if MAIN_PROCESS:
            self.bar.write(text) if self.bar is not None else print(text, flush=True)

    def stop(self, number: int) -> None:
        """Save what there is and leave, as a signal asked."""
        self.save()
        if self.tracker:
            self.tracker.close()
        if self.world > 1:
            dist.barrier()  # torchrun ends all as soon as one has left
        self.print(f"stopped: step {self.step} is saved in {self.folder}; the same command goes on")
        raise SystemExit(128 + number)

    # -- checkpoints: everything an exact continuation needs, as safetensors and JSON

    def save(self) -> None:
        """Written beside, flushed to disk, then renamed: a checkpoint is whole or not there. Only
        the main process writes; the others wait for it at the next exchange, or hand it their parts
        of a model that is spread over them.
        """
        if self.in_step:  # a signal may have come while they were together
            beside("sharding").apart(self.policy)
        weights = trained_tensors(self.policy)
        state = optimizer_tensors(self.policy, self.optimizer)
        temporary = self.folder / f"tmp-checkpoint-{self.step}"

        def make_room() -> dict:
            if (self.folder / f"checkpoint-{self.step}").exists():
                return {"there": True}
            need = sum(t.numel() * t.element_size() for t in (*weights.values(), *state.values()))
            free = shutil.disk_usage(self.folder).free
            if free < need * 1.05:
                gib = f"{need / 2**30:.2f} GiB, and {free / 2**30:.2f} are free"
                raise UserError(f"a checkpoint in {self.folder} takes {gib}")
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            return {"there": False}

        if from_main(make_room)["there"]:
            return
        for name, tensors in (("policy", weights), ("optimizer", state)):
            write_tensors(temporary / f"{name}.safetensors", tensors)
        if not MAIN_PROCESS:
            return
        facts = {"step": self.step, "skipped": self.skipped_in_a_row, "logs": self.log_sizes}
        facts["kept"] = self.kept
        facts |= self._made_from()
        (temporary / "state.json").write_text(json.dumps(facts))
        files = sorted(temporary.iterdir())
        manifest = {p.name: {"bytes": _size(p), "sha256": file_hash(p)} for p in files}
        (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1))
        sync_folder(temporary)
        temporary.rename(self.folder / f"checkpoint-{self.step}")
        sync_folder(self.folder)
        for old in self._checkpoints()[max(1, self.args.keep_last) :]:
            shutil.rmtree(old)

    def _checkpoints(self) -> list[Path]:
        """Newest first."""
        numbers = [p.name.removeprefix("checkpoint-") for p in self.folder.glob("checkpoint-*")]
        newest_first = sorted((int(n) for n in numbers if n.isdigit()), reverse=True)
        return [self.folder / f"checkpoint-{n}" for n in newest_first]

    def _newest_whole(self) -> dict:
        for folder in self._checkpoints():
            if not (damage := damage_of(folder)):
                return {"folder": str(folder)}
            say(
                "resume",
                f"{folder.name} is damaged ({damage}): put aside, going back to the one before",
            )
            folder.rename(folder.with_name(f"damaged-{folder.name}-{time.time_ns()}"))
        return {"folder": None}

    def _made_from(self) -> dict:
        """What a checkpoint does not hold, but makes sense with alone."""
        digests = [getattr(module, "frozen_digest", None) for module in self.policy.modules()]
        return {"rows": self.rows, "frozen": "+".join(d for d in digests if d) or None}

    def _refuse_other_data(self, facts: dict) -> dict:
        now, names = self._made_from(), {"rows": "--dataset", "frozen": "--model"}
        changed = [names[key] for key in now if facts.get(key, now[key]) != now[key]]
        if changed:
            raise UserError(
                f"{self.folder} holds another run: what {' and '.join(changed)} stands for has "
                "changed since. --resume never starts a new folder beside it"
            )
        return {}

    def restore(self, policy: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Go on from the newest whole checkpoint, if there is one."""
        self.policy, self.optimizer, self.to_save = policy, optimizer, True
        facts = {"step": 0, "skipped": 0, "logs": dict.fromkeys(LOGS, 0)}
        if newest := from_main(self._newest_whole)["folder"]:
            folder = Path(newest)
            if not folder.is_dir():
                raise UserError(
                    f"{platform.node()} sees no {folder}: on several machines, "
                    "--output-dir must lie on a disk that all of them share"
                )
            facts = json.loads((folder / "state.json").read_text())
            from_main(lambda: self._refuse_other_data(facts))
            with safe_open(folder / "policy.safetensors", "pt") as saved:
                for name, tensor in trained_tensors(policy).items():
                    put(tensor, saved, name)
            with safe_open(folder / "optimizer.safetensors", "pt") as saved:
                set_optimizer_tensors(policy, optimizer, saved)
            say("resume", f"step {facts['step']} of {self.total_steps}, from {folder}")
        self.step, self.skipped_in_a_row = facts["step"], facts["skipped"]
        self.log_sizes, self.kept = facts["logs"], facts.get("kept", {})
        if MAIN_PROCESS:  # what was logged after the checkpoint will be logged again
            for name, size in self.log_sizes.items():
                if _size(self.folder / name) > size:
                    os.truncate(self.folder / name, size)
            for left in self.folder.glob("tmp-*"):
                shutil.rmtree(left)
            if self.args.track != "none":
                about = dataclasses.asdict(self.args)
                self.tracker = beside("tracking").start(
                    self.args.track, self.folder, about, self.step
                )

    # -- the end

    def finish(self, policy: nn.Module, tokenizer: Any) -> None:
        """Save the trained model, then say what improved."""
        self.export(policy, tokenizer)
        report = beside("report")
        text = report.closing(self, policy, tokenizer) if report else f"trained: {self.folder}\n"
        if MAIN_PROCESS:
            print("\n" + text, end="", flush=True)
            write_atomically(self.folder / "summary.txt", text)
            if self.tracker:
                self.tracker.close()
        if self.world > 1:
            dist.barrier()
            dist.destroy_process_group()
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def export(self, policy: nn.Module, tokenizer: Any) -> None:
        """A folder that plain Transformers loads, version 5 or 4."""
        dtype = getattr(torch, self.args.export_dtype)
        adapters = beside("adapters") if self.args.lora_rank else None
        state: dict[str, Tensor] = {}
        merged = adapters.merged(policy) if adapters else _state_tensors(policy).items()
        for name, tensor in merged:  # one at a time, so that only the main process holds them all
            together = whole(tensor.detach())
            if MAIN_PROCESS:
                state[name] = together.to("cpu", dtype, copy=True)
        lora = adapters.state(policy) if adapters else {}
        if not MAIN_PROCESS:
            return
        temporary = self.folder / "tmp-export"
        shutil.rmtree(temporary, ignore_errors=True)
        new = {"base_model": short_name(self.args.model), "history": []}
        before = getattr(policy.config, "plainpref", None) or new
        now = {k: v for k, v in before.items() if k != "beta"}
        if self.reward_scale:
            now["beta"] = self.reward_scale
        policy.config.plainpref = now | {"history": [*before["history"], self.script.stem]}
        policy.save_pretrained(temporary, state_dict=state)
        tokenizer.save_pretrained(temporary)
        mend_for_transformers_4(temporary, dtype)
        if adapters:
            base = resolve_model(self.args.model)
            adapters.save(policy, lora, self.folder / "adapter", base)
        sync_folder(temporary)
        for file in temporary.iterdir():
            file.chmod(0o644)  # Transformers makes the weights private
            os.replace(file, self.folder / file.name)
        temporary.rmdir()
        sync_folder(self.folder)


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _git_commit() -> str | None:
    command = ["git", "-C", str(HERE), "describe", "--always", "--dirty"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None


def _short_number(value: Any) -> str:
    """0.0001 as 1e-4; other things as they are."""
    if not isinstance(value, float):
        return str(value)
    short = re.sub(r"\.?0*e([-+])0*", r"e\1", f"{value:e}")
    return f"{value:g}" if 0.001 <= abs(value) < 1e4 or value == 0 else short


def file_hash(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def write_atomically(path: Path, text: str) -> None:
    """The old text or the new one, whatever happens in between."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)


def sync_folder(folder: Path) -> None:
    """Make names and contents in a folder survive a power cut."""
    for path in [*folder.iterdir(), folder]:
        if path.is_file() or path == folder:
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)


# --------------------------------------------------------------------------------------------------
# 2. Tokenizer and rows


def load_tokenizer(model: str, max_length: int):
    """The model's own, with `stop_ids`: all ids that end a response (chat models have several)."""
    if model == "tiny-untrained":
        import family

        tokenizer, config, generation = family.hf_tokenizer(), None, None
    else:
        from transformers import AutoConfig, AutoTokenizer, GenerationConfig

        path = resolve_model(model)
        config = _from_hub(lambda: AutoConfig.from_pretrained(path), model)
        tokenizer = _from_hub(lambda: AutoTokenizer.from_pretrained(path), model)
        try:
            generation = GenerationConfig.from_pretrained(path)
        except OSError:  # many base models have none
            generation = None
    limit = getattr(config, "max_position_embeddings", None)
    if limit and max_length > limit:
        raise UserError(f"--max-length {max_length}: {model} takes {limit} tokens at most")
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {model} has no end-of-sequence token")
    more = getattr(generation, "eos_token_id", None)
    more = more if isinstance(more, list) else [] if more is None else [more]
    tokenizer.stop_ids = frozenset([tokenizer.eos_token_id, *more])
    # Whether a sequence begins with BOS is the tokenizer's own habit: GPT-2's has one, unused.
    first = tokenizer("a").input_ids[:1]
    tokenizer.bos = first if first == [tokenizer.bos_token_id] else []
    return tokenizer


def check_reference(ref_model: str | None, soup_weight: float) -> None:
    """Named before the policy is loaded."""
    if not 0 <= soup_weight <= 1:
        raise UserError(f"--soup-weight must be in [0, 1], got {soup_weight}")
    parts = parts_of_soup(ref_model) if ref_model else []
    if len(parts) > 2:
        raise UserError(f"--ref-model {ref_model}: a soup is of two models, a+b")
    for part in parts:
        resolve_model(part, "--ref-model")


def parts_of_soup(ref_model: str) -> list[str]:
    """a and b of a+b; a folder may have such a name itself."""
    return [ref_model] if model_folder(ref_model).is_dir() else ref_model.split("+")


def resolve_model(model: str, named: str = "--model") -> str:
    """A folder if there is one, else a hub id (short names are looked up in sources.py)."""
    folder = model_folder(model)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(
                f"{named} {model}: no config.json in {folder}. Is this a folder that a run saved?"
            )
        return str(folder)
    if model.startswith((".", "/", "~")) or model.count("/") > 1 or model.startswith("runs/"):
        raise UserError(f"{named} {model}: there is no such folder")
    sources = beside("sources")
    return sources.MODELS.get(model, model) if sources else model


def _from_hub(load: Callable, model: str, named: str = "--model") -> Any:
    try:
        return load()
    except (OSError, ValueError) as error:
        no_tokenizer = "backend tokenizer" in str(error)
        if isinstance(error, ValueError) and not (no_tokenizer or "Unrecognized" in str(error)):
            raise
        if model_folder(model).is_dir():
            why = "it has no tokenizer that can be read" if no_tokenizer else first_line(error)
            raise UserError(f"{named} {model}: {why}") from None
        repo, sources = resolve_model(model), beside("sources")
        why = sources.hub_failure(error, repo, "model") if sources else first_line(error)
        raise UserError(
            f"{named} {model}: there is no such folder, and {why}; a folder with config.json, "
            f"*.safetensors and tokenizer files serves too (`hf download {repo} --local-dir DIR` "
            "makes one where there is a network)"
        ) from None


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


@dataclass
class Row:
    """A prompt and its responses as token ids. `prompt` begins with BOS where the model has one."""

    prompt: np.ndarray  # int32
    responses: list[np.ndarray]  # K of them (none: to be sampled); EOS at the end unless cut
    ask: (
        np.ndarray
    )  # what to generate from for a sample: the prompt, also where it counts as response
    scores: np.ndarray | None = None  # float64, one a response; of a labelled row 1 or 0

    def length(self) -> int:
        return len(self.prompt) + max(map(len, self.responses), default=0)

    def tokens(self) -> int:
        """The prompt counted once."""
        return len(self.prompt) + sum(map(len, self.responses))


@dataclass
class Rows:
    """A data set, ready to train on."""

    name: str
    rows: list[Row]
    ref_logps: Tensor | None = None  # (N, K) float64, NaN where not computed
    apart: bool = False  # a row's responses go through the model in passes of their own
    tail: int = 0  # tokens of a prompt that stay however it is cut; 0: all

    def __len__(self) -> int:
        return len(self.rows)

    def question(self, i: int) -> bytes:
        """The same for a prompt that was cut and for the same one that was not."""
        return self.rows[i].prompt[-self.tail :].tobytes()

    def digest(self) -> str:
        """Of all token ids and scores: other rows, tokenizer, template or lengths give another
        digest.
        """
        state = hashlib.sha256()
        for row in self.rows:
            for ids in (row.prompt, *row.responses):
                state.update(len(ids).to_bytes(4, "little") + ids.tobytes())
            state.update(b"" if row.scores is None else row.scores.tobytes())
        return state.hexdigest()


class BadRow(Exception):
    """Why a row cannot be used."""


class LeftOut(str):
    """Why a row of a published data set is not used, in words that go after a count."""


def load_rows(
    dataset: str,
    eval_dataset: str | None,
    kind: str,  # what the method takes: "pair", "ranked", "labelled", "demonstration" or "prompt"
    tokenizer,
    max_length: int,  # tokens of prompt and response together
    max_prompt_length: int,  # tokens kept of a prompt whose row is too long
    pairs: str = "best-worst",  # how a ranked list becomes pairs
    skip_bad_rows: bool = False,
    prompt_too: bool = False,  # demonstrations: the prompt is response too, but for its first token
    cache_dir: str | None = None,  # where the tokens of large sets are kept; default runs/.cache
    targets: bool = False,  # pairs: a row's `target` is its third response
) -> tuple[Rows, Rows]:
    """Training rows and held-out rows; prints the data report; bad rows end the run here."""
    cut = (max_length, max_prompt_length)
    how = (kind, tokenizer, cut, pairs, skip_bad_rows, prompt_too, cache_dir, targets)
    train = _read(dataset, "train", *how)
    if eval_dataset:
        held_out = _read(eval_dataset, "test", *how)
    elif own_test := _own_test_split(dataset, kind):
        held_out = _read(own_test, "test", *how)
        if len(held_out) > HELD_OUT_ROWS:  # TL;DR has as many as for training
            held_out.rows, _ = _choose(held_out.rows, HELD_OUT_ROWS, tokenizer, held_out.tail)
            say("held out", f"{len(held_out):,} of them (--eval-dataset names all or others)")
    else:
        most = min(512, len(train) // 20)
        chosen, train.rows = _choose(train.rows, most, tokenizer, train.tail)
        held_out = Rows(train.name, chosen, tail=train.tail)
        say("held out", f"{len(held_out):,} of these rows (--eval-dataset names others)")
    return train, held_out


def _own_test_split(dataset: str, kind: str) -> str | None:
    if dataset.split(":")[0] == "family":
        return dataset
    if not (sources := beside("sources")):
        return None
    # One answer for all, for it may hang on the network.
    return from_main(lambda: {"name": sources.test_split(dataset, kind)})["name"]


def _choose(rows: list[Row], most: int, tokenizer, tail: int) -> tuple[list[Row], list[Row]]:
    """So many and the others, chosen by a hash of what is asked (of a text, which asks nothing, by
    its own): all rows of a prompt are on one side.
    """
    asks = len(tokenizer.bos)
    asked = [len(row.ask) > asks or not row.responses for row in rows]
    keys = [r.ask[-tail:] if of else r.responses[0] for r, of in zip(rows, asked, strict=True)]
    scored = [hashlib.sha256(key.tobytes()).digest()[:8] for key in keys]
    border = sorted(scored)[most] if most else b""
    chosen = [row for row, score in zip(rows, scored, strict=True) if score < border]
    return chosen, [row for row, score in zip(rows, scored, strict=True) if score >= border]


HELD_OUT_ROWS = 2_048  # of a data set's own test split: more would take longer than the training
MANY_ROWS = 5_000  # a set from here on is large: tokenised once for all, and kept
CHUNK = 2_000  # rows whose texts the tokenizer is given at once: it works on them in parallel


@dataclass
class Found:
    """What a data set holds for a method, and all that the report says of it."""

    rows: list[Row]
    counts: Counter[str]  # "read", and how many were left out or cut for which reason
    bad: list[str]  # file:line: reason
    kind: str | None = None  # of its rows


def _read(
    dataset, split, kind, tokenizer, cut, pairs, skip_bad_rows, prompt_too, cache_dir, targets
) -> Rows:
    fits = Fits(tokenizer, cut[1])
    raws = _raw_rows(dataset, split, kind, fits)
    first = list(islice(raws, MANY_ROWS))

    def again() -> Iterator[tuple[str, Any]]:
        return _raw_rows(dataset, split, kind, fits.exactly)

    def find(raws: Iterable[tuple[str, Any]], encode: Encode, label: str = "") -> Found:
        raws = progress_bar(raws, label, unit=" rows") if label else raws
        return _find(raws, kind, pairs, targets, tokenizer, cut, prompt_too, encode)

    many, how = len(first) == MANY_ROWS, ""
    tokenising = beside("tokenising") if many and tokenizer.is_fast else None
    if tokenising:
        what = [dataset, split, kind, pairs, targets, cut, prompt_too]
        raws = chain(first, raws)
        exact = lambda raws: again() if fits.doubtful else raws  # noqa: E731
        found, how = tokenising.find_once(raws, exact, find, tokenizer, what, cache_dir)
    else:
        raws = again() if many or fits.doubtful else first
        found = find(raws, by_tokenizer(tokenizer), f"{split} rows" if many else "")
    counts, bad = found.counts, found.bad
    if bad and not skip_bad_rows:
        more = f"\n  ... and {len(bad) - 10:,} more" if len(bad) > 10 else ""
        raise UserError(
            f"{len(bad):,} of {counts['read']:,} rows of {dataset} cannot be used "
            "(--skip-bad-rows goes on without them):\n  " + "\n  ".join(bad[:10]) + more
        )
    if not found.rows:
        raise UserError(
            f"{dataset}: no usable row ({counts['read']:,} read, {len(bad):,} of them bad)"
        )
    _report(dataset, split, kind, pairs, found, how, tokenizer)
    return Rows(dataset, found.rows, tail=cut[1] - 1)  # without BOS, which a cut prompt has again


class Fits:
    """Whether a prompt has at most so many tokens, BOS among them.

    That can only be told by the tokenizer, one text after another, which would take longer than to
    look up the tokens of a large set that has been seen before. So a set is first read with every
    prompt taken to fit, and read again `exactly` where one was `doubtful` and its tokens are new.
    """

    def __init__(self, tokenizer, most: int):
        self.tokenizer, self.most, self.doubtful = tokenizer, most - len(tokenizer.bos), False

    def __call__(self, text: str) -> bool:
        self.doubtful = self.doubtful or not self._short(text)
        return True

    def exactly(self, text: str) -> bool:
        return self._short(text) or len(by_tokenizer(self.tokenizer)([text])[0]) <= self.most

    def _short(self, text: str) -> bool:
        """An ASCII character is one token at most (others may be several), and SentencePiece sets a
        space before the text. Half a character is told of later.
        """
        short = text.isascii() and len(text) < self.most
        return short or _half_a_character(text)


Encode = Callable[[list[str]], list[list[int]]]


def by_tokenizer(tokenizer) -> Encode:
    """The tokenizer's own ids of many texts, no special tokens added."""
    return lambda texts: tokenizer(texts, add_special_tokens=False).input_ids if texts else []


def _find(raws, kind, pairs, targets, tokenizer, cut, prompt_too, encode: Encode) -> Found:
    """Rows as token ids. Their texts are encoded a chunk at a time, each text of a chunk once."""
    found = Found([], Counter(), [])
    raws, asked = iter(raws), set()
    while chunk := list(islice(raws, CHUNK)):
        ready = [_texts_of(raw, found, kind, pairs, targets, tokenizer) for _, raw in chunk]
        records = [record for records, _ in ready for record in records]
        texts = list(dict.fromkeys(t for r in records for t in (r.prompt, *r.responses)))
        ids = dict(zip(texts, encode(texts), strict=True))
        for (where, _), (records, reason) in zip(chunk, ready, strict=True):
            try:
                for record in records:
                    row = _tokenise(record, ids, tokenizer, cut, prompt_too, found.counts)
                    if kind == "prompt":
                        if (key := row.prompt.tobytes()) in asked:
                            found.counts["with a prompt that was there before"] += 1
                        else:
                            found.rows.append(row)
                        asked.add(key)
                    elif row is not None:
                        found.rows += _taken_apart(row) if kind == "labelled" else [row]
                if reason is not None:
                    raise reason
            except BadRow as why:
                found.bad.append(f"{where}: {why}")
    return found


def _taken_apart(row: Row) -> list[Row]:
    """Cut and compared together, so that both answers have the same prompt and are not the same."""
    many = range(len(row.responses))
    return [Row(row.prompt, [row.responses[k]], row.ask, row.scores[k : k + 1]) for k in many]


def _texts_of(
    raw: Any, found: Found, kind: str, pairs: str, targets: bool, tokenizer
) -> tuple[list[Texts], BadRow | None]:
    """What a row gives to the tokenizer; what is wrong with the row, and everything before it."""
    ready: list[Texts] = []
    found.counts["read"] += 1
    try:
        if isinstance(raw, BadRow):
            raise raw
        if isinstance(raw, LeftOut):
            found.counts[str(raw)] += 1
            return ready, None
        found.kind = found.kind or _kind_of(raw)
        for record in _records(raw, found.kind, kind, pairs, targets, found.counts):
            ready.append(_texts(record, tokenizer))
    except BadRow as reason:
        return ready, reason
    return ready, None


def _raw_rows(
    dataset: str, split: str, kind: str, fits: Callable[[str], bool] = lambda prompt: True
) -> Iterator[tuple[str, Any]]:
    """(file:line, row) from the embedded task, a file, a folder of files, or the hub. `fits` tells
    whether a prompt is short enough, for published data sets that shorten theirs in their own way.
    """
    path = Path(dataset).expanduser()
    if dataset.split(":")[0] == "family":
        import family

        try:
            yield from family.rows(dataset, split, kind)
        except ValueError as error:
            raise UserError(str(error)) from None
    elif path.suffix == ".jsonl" and path.is_file():
        yield from json_lines(path)
    elif sources := beside("sources"):
        yield from sources.rows(dataset, split, kind, fits)
    else:
        raise UserError(
            f"{dataset}: there is no such .jsonl file, and sources.py, which knows other "
            "kinds of files and the hub, does not stand beside common.py"
        )


def json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    with open(path, "rb") as f:  # bytes: a line that is not UTF-8 is one bad row, not the end
        for number, line in enumerate(f, 1):
            if line.strip():
                yield f"{path}:{number}", parse_json(line)


def parse_json(text: bytes) -> Any:
    try:
        row = json.loads(text)
    except UnicodeDecodeError as error:
        return BadRow(f"not UTF-8 ({error.reason} at byte {error.start})")
    except ValueError as error:
        return BadRow(f"not JSON ({error})")
    if not isinstance(row, dict):
        return BadRow(f"a row must be an object, this is a {type(row).__name__}")
    return row


KINDS = {  # a row's kind is the first whose columns it has
    "ranked": ("prompt", "responses", "scores"),
    "pair": ("chosen", "rejected"),
    "labelled": ("prompt", "completion", "label"),
    "demonstration": ("prompt", "completion"),
    "messages": ("messages",),
    "text": ("text",),
    "prompt": ("prompt",),
}


def _kind_of(raw: dict) -> str:
    for kind, columns in KINDS.items():
        if all(column in raw for column in columns):
            return kind
    known = "; ".join(", ".join(columns) for columns in KINDS.values())
    raise BadRow(f"has the columns {', '.join(raw) or '(none)'}; known rows have: {known}")


@dataclass
class Record:
    """A checked row, before the tokenizer."""

    prompt: str | list[dict]
    responses: list[str] | list[list[dict]]
    scores: list[float] | None = None


def _records(
    raw: dict, found: str, kind: str, pairs: str, targets: bool, counts: Counter
) -> Iterator[Record]:
    """What a row gives to a method that takes `kind`: itself, or what a richer row can be turned
    into.
    """
    for column in (*KINDS[found], *["target"] * targets):
        if raw.get(column) is None:
            raise BadRow(f"no {column!r}")
    if kind == "prompt" and found == "messages":
        yield Record(_dialogue(raw["messages"], "messages").prompt, [])
    elif kind == "prompt" and found == "pair":
        yield Record(_pair(raw).prompt, [])
    elif kind == "prompt" and found != "text":
        yield Record(_prompt(raw), [])
    elif (kind, found) == ("demonstration", "messages"):
        yield _dialogue(raw["messages"], "messages")
    elif (kind, found) == ("demonstration", "text"):
        yield Record("", [_text(raw, "text")])
    elif (kind, found) == ("demonstration", "demonstration"):
        yield Record(_prompt(raw), [_response(raw["completion"], "completion")])
    elif found == "labelled" and kind in ("demonstration", "labelled"):
        if not isinstance(raw["label"], bool):
            raise BadRow(f"'label' must be true or false, this is {raw['label']!r}")
        if kind == "demonstration" and not raw["label"]:
            counts["labelled false"] += 1
            return
        completion = _response(raw["completion"], "completion")
        scores = [float(raw["label"])] if kind == "labelled" else None
        yield Record(_prompt(raw), [completion], scores)
    elif found == "pair":
        pair = _pair(raw)
        if kind in ("ranked", "labelled"):
            yield Record(pair.prompt, pair.responses, [1.0, 0.0])
        else:
            target = [_target(raw, pair.prompt)] if targets else []
            wanted = pair.responses + target if kind == "pair" else pair.responses[:1]
            yield Record(pair.prompt, wanted)
    elif found == "ranked":
        prompt, ranked = _ranked(raw)
        scores, responses = ([entry[i] for entry in ranked] for i in (0, 1))
        if kind == "demonstration":
            yield Record(prompt, responses[:1])
        elif scores[0] == scores[-1]:  # also where there is but one
            counts["all responses equal"] += 1
        elif kind == "ranked":
            yield Record(prompt, responses, scores)
        elif kind == "labelled":
            yield Record(prompt, [responses[0], responses[-1]], [1.0, 0.0])
        else:
            chosen = {  # distinct texts: a policy often gives the same answer twice
                "best-worst": [(ranked[0], ranked[-1])],
                "adjacent": list(zip(ranked, ranked[1:])),  # noqa: B905 (one shorter by design)
                "all": [(a, b) for i, a in enumerate(ranked) for b in ranked[i + 1 :]],
            }[pairs]
            target = [_target(raw, prompt)] if targets else []
            for (score_a, a), (score_b, b) in chosen:
                if score_a > score_b:
                    yield Record(prompt, [a, b, *target])
    else:
        richer = {
            "pair": " or ranked ones",
            "ranked": " or pairs",
            "labelled": ", pairs or ranked ones",
            "prompt": " or any others that have one",
        }
        raise BadRow(
            f"holds {found} rows; needed are {kind} rows ({', '.join(KINDS[kind])})"
            f"{richer.get(kind, ' or ranked ones')}"
        )


def _text(raw: dict, column: str) -> str:
    if not isinstance(raw[column], str):
        raise BadRow(f"{column!r} must be a text, this is a {type(raw[column]).__name__}")
    if not raw[column].strip():
        raise BadRow(f"{column!r} is empty")
    return raw[column]


def _messages(value: Any, column: str) -> list[dict]:
    well_formed = isinstance(value, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
        for m in value
    )
    if not well_formed or not value:
        raise BadRow(f"{column!r} must be a text or a list of messages with 'role' and 'content'")
    return [{"role": m["role"], "content": m["content"]} for m in value]


def _prompt(raw: dict) -> str | list[dict]:
    return (
        _text(raw, "prompt")
        if isinstance(raw["prompt"], str)
        else _messages(raw["prompt"], "prompt")
    )


def _response(value: Any, column: str) -> str | list[dict]:
    if isinstance(value, str):
        return _text({column: value}, column)
    messages = _messages(value, column)
    if messages[-1]["role"] != "assistant" or not messages[-1]["content"].strip():
        raise BadRow(f"{column!r} must end with an assistant message that is not empty")
    return messages


def _dialogue(value: Any, column: str) -> Record:
    messages = _response(value, column)
    if isinstance(messages, str) or len(messages) < 2:
        raise BadRow(
            f"{column!r} must be a list of two messages or more, the last by the assistant"
        )
    return Record(messages[:-1], [messages[-1:]])


def _pair(raw: dict) -> Record:
    both = [_response(raw[column], column) for column in ("chosen", "rejected")]
    if both[0] == both[1]:
        raise BadRow("'chosen' and 'rejected' are the same")
    if isinstance(both[0], str) != isinstance(both[1], str):
        raise BadRow("'chosen' and 'rejected' must both be texts or both be lists of messages")
    if isinstance(both[0], str):
        if raw.get("prompt") is None:
            raise BadRow("'chosen' and 'rejected' are texts, so there must be a 'prompt'")
        return Record(_prompt(raw), both)
    shared = 0  # whole dialogues: the prompt is what the two have in common, message by message
    while shared < min(map(len, both)) - 1 and both[0][shared] == both[1][shared]:
        shared += 1
    opening, sides = both[0][:shared], [side[shared:] for side in both]
    if raw.get("prompt") is None:
        if not shared:
            raise BadRow("'chosen' and 'rejected' begin with other messages, and have no 'prompt'")
    elif not shared or opening[0]["role"] == "assistant":  # not whole: they go on from the prompt
        prompt = _prompt(raw)
        asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        opening = asked + opening
    return Record(opening, sides)


def _target(raw: dict, prompt: str | list[dict]) -> str | list[dict]:
    """What answers the prompt; of a whole dialogue, what goes on from it."""
    target = _response(raw["target"], "target")
    if isinstance(target, list) and isinstance(prompt, list):
        target = target[len(prompt) :] if target[: len(prompt)] == prompt else target
        if target[0]["role"] != "assistant":
            raise BadRow("'target' does not go on from the prompt")
    return target


def _ranked(raw: dict) -> tuple[str | list[dict], list[tuple[float, Any]]]:
    """The prompt and its distinct (score, response), best first; ties in the order of the file."""
    responses, scores = raw["responses"], raw["scores"]
    if not isinstance(responses, list) or not isinstance(scores, list):
        raise BadRow("'responses' and 'scores' must be lists")
    if len(responses) != len(scores) or not responses:
        raise BadRow(f"{len(responses)} responses but {len(scores)} scores")
    for score in scores:
        number = isinstance(score, int | float) and not isinstance(score, bool)
        if not number or not abs(score) <= sys.float_info.max:
            raise BadRow(f"a score must be a finite number, this is {score!r}")
    ranked = sorted(zip(scores, responses, strict=True), key=lambda pair: -pair[0])
    distinct: dict[str, tuple[float, Any]] = {}
    for score, response in ranked:
        distinct.setdefault(json.dumps(_response(response, "responses")), (score, response))
    return _prompt(raw), list(distinct.values())


@dataclass
class Texts:
    """A record as the tokenizer is given it."""

    prompt: str
    responses: list[str]
    scores: list[float] | None
    templated: bool


def _texts(record: Record, tokenizer) -> Texts:
    templated = isinstance(record.prompt, list)
    if {isinstance(response, list) for response in record.responses} - {templated}:
        raise BadRow("prompt and responses must all be texts or all be lists of messages")
    prompt, responses = record.prompt, record.responses
    if templated:
        prompt, responses = _render(record, tokenizer)
    if any(map(_half_a_character, (prompt, *responses))):
        raise BadRow("a text holds half a character (a lone surrogate)")
    return Texts(prompt, responses, record.scores, templated)


def _half_a_character(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can write it, UTF-8 cannot
        return True
    return False


def _tokenise(
    record: Texts,
    ids: dict[str, list[int]],
    tokenizer,
    cut: tuple[int, int],
    prompt_too: bool,
    counts: Counter,
) -> Row | None:
    """Each part tokenised once and joined as ids, so the prompt is the same for every response."""
    max_length, max_prompt_length = cut
    prompt = ids[record.prompt]
    while tokenizer.bos and prompt[:1] == tokenizer.bos:  # written out in the text, once or twice
        prompt = prompt[1:]
    prompt = tokenizer.bos + prompt
    responses = [_with_eos(ids[text], tokenizer, record.templated) for text in record.responses]

    if not responses:  # to sample from
        if not prompt:
            raise BadRow("the prompt is empty, and this tokenizer has no BOS to begin with")
        if len(prompt) > max_prompt_length:
            prompt = end_of(prompt, max_prompt_length, tokenizer)
            counts["prompts cut"] += 1
        beginning = np.array(prompt, np.int32)
        return Row(beginning, [], beginning)
    if not prompt and len(responses) > 1:
        raise BadRow("the prompt is empty, and this tokenizer has no BOS to begin with")
    if len(prompt) + max(map(len, responses)) > max_length:
        if len(prompt) > max_prompt_length:
            prompt = end_of(prompt, max_prompt_length, tokenizer)
            counts["prompts cut"] += 1
        room = max_length - len(prompt)
        counts["responses cut"] += sum(len(r) > room for r in responses)
        responses = [r[:room] for r in responses]  # a cut response has no EOS: it did not end there
    asked = prompt
    if prompt_too or not prompt:  # the first token has nothing before it to be predicted from
        whole = prompt + responses[0]
        prompt, responses = whole[:1], [whole[1:]]
    scores = record.scores
    if scores and len(responses) > 1:  # of those that cutting made equal, the best stays
        first = {tuple(r): i for i, r in reversed(list(enumerate(responses)))}
        kept = sorted(first.values())
        lost = len(responses) - len(kept)
        responses, scores = [responses[i] for i in kept], [scores[i] for i in kept]
        told_apart = scores[0] > scores[-1]
        counts["responses equal after cutting"] += lost * told_apart
    else:
        told_apart = len(responses) < 2 or responses[0] != responses[1]
    if not told_apart:
        counts["equal after cutting"] += 1
        return None
    beginning = np.array(prompt, np.int32)
    ask = beginning if asked is prompt else np.array(asked, np.int32)
    numbers = None if scores is None else np.array(scores, np.float64)
    return Row(beginning, [np.array(r, np.int32) for r in responses], ask, numbers)


def end_of(prompt: Any, length: int, tokenizer) -> Any:
    """A prompt that is too long, list or array: BOS and the end stay; the end is the question."""
    start, rest = len(tokenizer.bos), len(prompt) - length + len(tokenizer.bos)
    if isinstance(prompt, list):
        return prompt[:start] + prompt[rest:]
    return np.concatenate([prompt[:start], prompt[rest:]])


def _render(record: Record, tokenizer) -> tuple[str, list[str]]:
    """Messages through the chat template: the text before the answer, and what an answer adds."""
    if not tokenizer.chat_template:
        raise BadRow("a list of messages, but this model's tokenizer has no chat template")

    def render(messages, **more):
        try:
            return tokenizer.apply_chat_template(messages, tokenize=False, **more)
        except Exception as error:  # a template raises what it likes ("System role not supported")
            raise BadRow(f"the chat template refuses it: {first_line(error)}") from None

    whole = [render(record.prompt + response) for response in record.responses]
    for prompt in (render(record.prompt, add_generation_prompt=True), render(record.prompt)):
        if all(text.startswith(prompt) for text in whole):
            return prompt, [text[len(prompt) :] for text in whole]
    raise BadRow("the chat template does not begin an answer as it begins one to be generated")


def _with_eos(ids: list[int], tokenizer, templated: bool) -> list[int]:
    """Exactly one end: a template's own, else EOS. What a template writes after it goes."""
    ends = [i for i, token in enumerate(ids) if token in tokenizer.stop_ids]
    if not ends:
        return [*ids, tokenizer.eos_token_id]
    rest = [token for token in ids[ends[0] :] if token not in tokenizer.stop_ids]
    goes_on = bool(rest) and bool(tokenizer.decode(rest).strip())
    if goes_on and not templated:
        raise BadRow("an end-of-sequence token stands in the middle of a response")
    last = ends[-1] if goes_on else ends[0]  # several turns: all ends but the last are inside
    return ids[: last + 1]


def _report(dataset, split, kind, pairs, found: Found, how: str, tokenizer) -> None:
    """`how` says how a large set became tokens."""
    if not MAIN_PROCESS:
        return
    rows, counts, bad = found.rows, found.counts, found.bad
    became = ""
    if found.kind != kind:
        how_many = {"pair": pairs, "labelled": "best and worst"}.get(kind)
        named = {"ranked": "ranked lists", "labelled": "labelled responses"}.get(kind, f"{kind}s")
        became = f" -> {len(rows):,} {named}"
        became += f" ({how_many})" if found.kind == "ranked" and how_many else ""
    if kind == "labelled":
        became += f", {sum(bool(row.scores[0]) for row in rows):,} of them desirable"
    if kind == "ranked":
        sizes = [len(row.responses) for row in rows]
        most = max(sizes)
        became += (
            f", of {most} responses"
            if min(sizes) == most
            else f", of {min(sizes)} to {most} responses"
        )
    lost = [
        f"{n:,} {what}"
        for what, n in counts.items()
        if n and what not in ("read", "prompts cut", "responses cut")
    ]
    if bad:
        lost.append(f"{len(bad):,} bad ({bad[0]}{', ...' if len(bad) > 1 else ''})")
    say(
        split,
        f"{dataset}: {counts['read']:,} {found.kind} rows{became}; "
        f"left out: {', '.join(lost) or 'none'}",
    )
    quantiles = lambda lengths: "/".join(f"{q:.0f}" for q in np.quantile(lengths, (0.5, 0.95, 1)))  # noqa: E731
    told = f"tokens (median/95 %/max): prompt {quantiles([len(row.prompt) for row in rows])}"
    if kind == "prompt":
        told += f"; {counts['prompts cut']:,} cut"
    else:
        responses = [r for row in rows for r in row.responses]
        ended = sum(int(r[-1]) in tokenizer.stop_ids for r in responses) / len(responses)
        told += f", response {quantiles([len(r) for r in responses])}; "
        told += f"{counts['prompts cut']:,} prompts and {counts['responses cut']:,} responses cut; "
        told += f"{ended:.1%} of responses end with EOS"
    say("", told)
    if split == "train":
        row = rows[0]
        shown = " | ".join(f"«{tokenizer.decode(r)}»" for r in row.responses)
        say("", f"first row: {_short(tokenizer.decode(row.prompt))} {_short(shown)}")
    if how:
        say("tokens", how)


def _short(text: str, most: int = 300) -> str:
    text = text.replace("\n", "\\n")
    return text if len(text) <= most else f"{text[: most // 2]} ... {text[-most // 2 :]}"


# --------------------------------------------------------------------------------------------------
# 3. The policy


def load_policy(
    model: str,
    dtype: str,
    run: Processes,
    attn: str = "auto",
    share_prompt: bool = True,
    fused_logps: bool = True,
    fsdp: bool = False,
    gradient_checkpointing: bool = False,
    compile: bool = False,
    lora_rank: int = 0,
    name: str = "model",
    scores: bool = False,  # instead of an output layer, a head that gives one number (scoring.py)
) -> nn.Module:
    """A decoder-only model with fp32 weights (float64 for tests), on this process's device or
    spread over all, dropout off. How it is to be asked for log-probs goes with it: `compute_dtype`,
    `share_prompt`, `fused_logps`, `during_forward`.
    """
    spread = fsdp and run.world > 1
    say(name, f"{model}, {resolve_model(model)}" if resolve_model(model) != model else model)
    if model == "tiny-untrained":
        if scores:
            raise UserError("--model tiny-untrained: it has learned nothing that could be scored")
        import family

        torch.manual_seed(torch.initial_seed())  # whatever was drawn before
        policy = family.untrained_model()
        if attention := _attention_for(policy.config, attn, run.device):
            policy.set_attn_implementation(attention)
    else:
        import transformers

        kind = "AutoModelForSequenceClassification" if scores else "AutoModelForCausalLM"
        kind, labels = getattr(transformers, kind), {"num_labels": 1} if scores else {}
        load_config = transformers.AutoConfig.from_pretrained
        config = _from_hub(lambda: load_config(resolve_model(model), **labels), model)
        if not scores and "SequenceClassification" in str(config.architectures):
            raise UserError(f"--model {model}: a reward model, which writes no text")
        if config.is_encoder_decoder or getattr(config, "quantization_config", None):
            raise UserError(
                f"--model {model}: only decoder-only models with plain weights can be trained here"
            )
        experts = [getattr(config, key, None) for key in ("num_experts", "num_local_experts")]
        if any(n and n > 1 for n in experts):
            raise UserError(f"--model {model}: a mixture of experts; only dense models are known")
        attention = _attention_for(config, attn, run.device)

        def load() -> nn.Module:
            if spread and not MAIN_PROCESS:  # it will be sent its parts
                return needed("sharding", "--fsdp").empty_policy(config, attention, kind)
            return kind.from_pretrained(
                resolve_model(model),
                config=config,
                dtype=torch.float32,
                use_safetensors=True,
                attn_implementation=attention,
            )

        try:
            policy = _from_hub(load, model)
        except ValueError as error:
            if "attention" not in str(error):
                raise
            raise UserError(f"--attn {attn}: {model} cannot take it ({error})") from None
    policy.eval()  # for good: with dropout, the untrained policy would not be its own reference
    # GPT-2 would look for padding, on the GPU in every step; attention is causal, so all is well.
    policy.base_model.warn_if_padding_and_no_attention_mask = lambda *_: None
    policy.compute_dtype = getattr(torch, dtype)
    policy.fused_logps = fused_logps
    policy.during_forward = lambda compute: compute()
    stored = torch.float64 if dtype == "float64" else torch.float32  # trained weights
    policy.to(stored)
    longest = max(getattr(run, "lengths", None) or [64])

    def probe() -> dict:
        if not scores:
            _check_head(policy, model)
        return {"refusal": _refusal_to_share(policy, longest) if share_prompt else None}

    if spread or lora_rank:  # in fp32 and on the CPU, before parts or bf16 are made of it
        with _few_layers(policy):
            refusal = from_main(probe)["refusal"]
    if lora_rank:
        low = policy.compute_dtype if policy.compute_dtype.itemsize < 4 else stored
        empty = spread and not MAIN_PROCESS
        needed("adapters", "--lora-rank").add(policy, lora_rank, low, stored, empty)
    if spread:
        needed("sharding", "--fsdp").shard(policy, run.device)
        run.in_step = True
    else:
        policy.to(run.device)
        for tensor in _state_tensors(policy).values() if run.world > 1 else ():
            dist.broadcast(tensor, 0)
    if not (spread or lora_rank):
        refusal = probe()["refusal"]
    policy.share_prompt = share_prompt and not refusal
    if policy.compute_dtype.itemsize < 4 and (spread or lora_rank):
        # Low embeddings would make the hidden states between the layers low too.
        policy.get_input_embeddings().register_forward_hook(lambda _, ids, out: out.to(stored))
    policy.compiled = compile
    for layer in layers_of(policy) if compile or gradient_checkpointing else ():
        if compile:
            layer.forward = torch.compile(layer.forward, dynamic=True)
        if gradient_checkpointing:
            layer.forward = _checkpointed(layer.forward)
    if compile or policy.config._attn_implementation == "flex_attention":
        # Compiled for each batch size, window and layout, with gradients and without. Past the
        # usual limit of 8 it would go on uncompiled: flex_attention would hold all scores.
        torch._dynamo.config.recompile_limit = 64
    size = sum(p.numel() for p in policy.parameters())
    trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    attention, weights = policy.config._attn_implementation, next(policy.parameters()).dtype
    say(
        "",
        f"{size / 1e6:,.1f} M parameters, weights {weights}, computes in {dtype}, "
        f"{attention} attention",
    )
    told = [f"spread over {run.world} processes"] if spread else []
    told += ["activations made again in the backward pass"] if gradient_checkpointing else []
    told += ["layers compiled"] if compile else []
    told += [f"adapters of rank {lora_rank}: {trained:,} trained"] if lora_rank else []
    if told:
        say("", ", ".join(told))
    if fsdp and not spread:
        say("", "--fsdp: one process, so there is nothing to spread the model over")
    if refusal:
        say("", f"a prompt goes through the model once for every response: {refusal}")
    return policy


def weights_together(policy: nn.Module):
    """Where a model is spread over the processes, all of its weights on each, for a while."""
    spread = hasattr(next(policy.parameters()), "full_tensor")
    return beside("sharding").gathered(policy) if spread else nullcontext()


def layers_of(policy: nn.Module) -> nn.ModuleList:
    """The decoder layers: the list that has as many modules as the config says."""
    for module in policy.base_model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == policy.config.num_hidden_layers:
            return module
    raise UserError(f"{type(policy).__name__}: the list of its layers was not found")


@contextmanager
def _few_layers(policy: nn.Module) -> Iterator[None]:
    """Enough to feel every kind of attention layer, at a fraction of the time."""
    layers, attention = layers_of(policy), policy.config._attn_implementation
    kinds = getattr(policy.config, "layer_types", None) or [None]
    enough = 1 + max(kinds.index(kind) for kind in set(kinds))
    for parent in policy.base_model.modules():
        for name, child in parent.named_children():
            if child is layers:
                setattr(parent, name, layers[: max(2, enough)])
                if attention == "flex_attention":  # of use on a GPU alone
                    policy.set_attn_implementation("eager")
                try:
                    yield
                finally:
                    setattr(parent, name, layers)
                    policy.set_attn_implementation(attention)
                return


def _checkpointed(forward: Callable) -> Callable:
    """A layer that keeps its input alone, and makes the rest again in the backward pass.
    (Transformers' own needs training mode, which would switch dropout on.)
    """
    from torch.utils.checkpoint import checkpoint

    @wraps(forward)
    def again(*args, **kwargs):
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return again


def _attention_for(config: Any, attn: str, device: torch.device) -> str | None:
    """Transformers' name for it; None is its own choice, sdpa nearly everywhere."""
    if attn == "flex_attention" and device.type != "cuda":
        raise UserError("--attn flex_attention: it has no backward pass outside of CUDA")
    if getattr(config, "attn_logit_softcapping", None):  # Gemma 2
        if attn == "sdpa":
            raise UserError("--attn sdpa would leave out this model's softcap on attention scores")
        return "eager" if attn == "auto" else attn
    return None if attn == "auto" else attn


def _state_tensors(policy: nn.Module) -> dict[str, Tensor]:
    """Weights and saved buffers, tied ones once, in a fixed order."""
    tensors = dict(policy.named_parameters())
    tied = {name for name, _ in policy.named_parameters(remove_duplicate=False)}
    return {n: t for n, t in policy.state_dict().items() if n in tensors or n not in tied}


def trained_tensors(policy: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint has to hold: adapters alone, where the rest is frozen."""
    frozen = {name for name, p in policy.named_parameters() if not p.requires_grad}
    if not frozen:
        return _state_tensors(policy)
    return {name: p.detach() for name, p in policy.named_parameters() if name not in frozen}


def whole(tensor: Tensor) -> Tensor:
    """A tensor that is spread over the processes (--fsdp), put together on all of them."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


@torch.no_grad()
def put(tensor: Tensor, saved: Any, name: str) -> None:
    """What an opened safetensors file has under this name into a tensor, spread or not."""
    if hasattr(tensor, "full_tensor"):
        beside("sharding").put(tensor, saved.get_slice(name))
    else:
        tensor.copy_(saved.get_tensor(name))


@dataclass
class Head:
    """Everything between the last hidden state and the logits."""

    weight: Tensor  # (V, H)
    bias: Tensor | None
    softcap: float | None  # Gemma 2: logits = softcap * tanh(logits / softcap)
    scale: float  # Cohere, Granite


def head_of(policy: nn.Module) -> Head:
    linear, config = policy.get_output_embeddings(), policy.config
    if type(linear) is not nn.Linear:  # an adapter's wrapper shows the weight without the adapter
        raise UserError(
            f"the output layer is a {type(linear).__name__}: log-probs are made from a plain "
            "linear layer. Leave the head out of the adapter's target modules, or merge it first"
        )
    scale = getattr(config, "logit_scale", None) or 1.0 / (
        getattr(config, "logits_scaling", None) or 1.0
    )
    return Head(
        linear.weight, linear.bias, getattr(config, "final_logit_softcapping", None), float(scale)
    )


@torch.no_grad()
def _check_head(policy: nn.Module, model: str) -> None:
    """Our logits are the model's own; if not, its head does more than `head_of` knows."""
    ids = torch.arange(4, device=policy.device)[None] + 1  # (1, 4)
    own = policy(input_ids=ids, use_cache=False).logits[0].double().log_softmax(-1)  # (4, V)
    hidden = policy.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
    # The likeliest and the least likely token: there a softcap or a scale does most. No autocast,
    # so that the two differ by fp32 rounding alone.
    targets = torch.cat([own.argmax(-1), own.argmin(-1)])
    ours = token_logps(torch.cat([hidden, hidden]), head_of(policy), targets, fused=False)
    theirs = torch.cat([own, own]).gather(1, targets[:, None])[:, 0]
    if not torch.allclose(theirs, ours.double(), atol=1e-3, rtol=0):
        raise UserError(
            f"--model {model}: the output layer of {type(policy).__name__} does more than we know"
        )


@torch.no_grad()
def _refusal_to_share(policy: nn.Module, longest: int) -> str | None:
    """Why the responses of a prompt cannot stand behind one copy of it, if so. Found by trying, at
    the length of the longest row: a model may read its positions or its window off the index.
    """
    if other := {*_windows(policy.config)} - {"full_attention", "sliding_attention"}:
        return f"the model has {', '.join(sorted(other))} layers"
    attention = policy.config._attn_implementation
    if attention not in ("eager", "sdpa", "flex_attention"):
        return f"{attention} takes no mask of its own"
    rng, third = np.random.default_rng(0), max(2, longest // 3)
    draw = lambda n: rng.integers(0, policy.config.vocab_size, n).astype(np.int32)  # noqa: E731
    # Far behind the first response, so that an index taken for a position is felt.
    rows = Rows("", [Row(draw(third), [draw(third), draw(third - 1)], draw(1))])
    try:
        if attention == "flex_attention":  # what it would be compiled for here is used nowhere else
            policy.set_attn_implementation("eager")
        one, two = (
            hidden_before_responses(policy, collate(rows, [0], policy.device, share))
            for share in (True, False)
        )
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, RuntimeError, NotImplementedError, AttributeError) as error:
        return f"{type(policy).__name__} does not take a mask and positions ({first_line(error)})"
    finally:
        if attention == "flex_attention":
            policy.set_attn_implementation(attention)
    # fp32 rounding is 1e-6 of that; a wrong mask or position 0.1 and more.
    if not (one - two).abs().max() <= 1e-3 * two.abs().max():
        return f"{type(policy).__name__} does not use the mask and positions that it is given"
    return None


def warn_if_not_fine_tuned(policy: nn.Module, tokenizer) -> None:
    """Preference learning starts from a model that already answers."""
    known = getattr(policy.config, "plainpref", None) or {}
    if not known.get("history") and not tokenizer.chat_template:
        say(
            "warning",
            "this looks like a base model (no chat template, not trained by sft.py). It should",
        )
        say("", "first learn to answer: python sft.py --model ..., then --model runs/sft-...")


def autocast(policy: nn.Module):
    if policy.compute_dtype in (torch.float32, torch.float64):
        return nullcontext()
    return torch.autocast(policy.device.type, policy.compute_dtype)


# --------------------------------------------------------------------------------------------------
# 4. Batches: the same steps whatever the number of processes and the micro-batches


@dataclass
class Micro:
    """What goes through the model at once: B prompts with K responses each.

    Plain: a sequence a response, [prompt | y_k | padding]. Shared: a sequence a prompt,
    [prompt | y_1 | ... | y_K | padding], where a response sees the prompt and itself and its
    positions go on from the prompt's: the same log-probs, the prompt computed once.
    """

    input_ids: Tensor  # (B*K, L) plain, (B, L) shared
    segments: Tensor | None  # (B, L) shared: 0 in the prompt, k in y_k, K + 1 in padding
    positions: Tensor | None  # (B, L) shared
    picked: Tensor  # (N,) index into input_ids, flattened, of what stands before a response token
    targets: Tensor  # (N,) the response tokens
    slots: Tensor  # (N,) where each of them belongs in (B*K*T)
    shape: tuple[int, int, int]  # B, K, T: T is the longest response
    lengths: Tensor  # (B, K) response tokens, EOS included; 0: a row with fewer than K responses
    ends: Tensor  # (B, K) index into input_ids, flattened, of a response's last token
    ref_logps: Tensor | None  # (B, K)
    tokens: int  # of prompts and responses, each counted once in either layout
    filled: int  # places of input_ids that are not padding
    scores: Tensor  # (B, K) float64; NaN: no such response, or rows without scores
    # Tokens of a row's first response (chosen, best), mean over the whole step, or over all
    # held-out rows: what a mean over tokens is normalised with.
    mean_length: float = 0.0

    def column(self, k: int) -> Micro:
        """The k-th responses alone, of rows in the plain layout (Rows.apart)."""
        assert self.segments is None
        batch, many, longest = self.shape
        width = self.input_ids.shape[1]
        line, at = self.picked // width, self.picked % width
        own, at_end = line % many == k, self.ends % width
        return dataclasses.replace(
            self,
            input_ids=self.input_ids[k::many],
            picked=(line // many * width + at)[own],
            targets=self.targets[own],
            slots=(self.slots // (many * longest) * longest + self.slots % longest)[own],
            shape=(batch, 1, longest),
            lengths=self.lengths[:, k : k + 1],
            ends=(at_end + self.ends // (many * width) * width)[:, k : k + 1],
            ref_logps=None if self.ref_logps is None else self.ref_logps[:, k : k + 1],
            scores=self.scores[:, k : k + 1],
        )


def mean_length(rows: list[Row]) -> float:
    """Of the first responses."""
    return sum(len(r) for row in rows for r in row.responses[:1]) / max(1, len(rows))


@dataclass
class Batch:
    """One optimizer step: this process's micro-batches, and counts over all processes to normalise
    by.
    """

    micros: Iterable[Micro]
    prompts: int
    response_tokens: int
    step: int = 0
    rows: list[int] = dataclasses.field(default_factory=list)  # of all processes

    def __iter__(self) -> Iterator[Micro]:
        return iter(self.micros)


def collate_for(policy: nn.Module, data: Rows, indexes: list[int], mean: float = 0.0) -> Micro:
    """In the layout that costs this policy less. `mean` is Micro.mean_length."""
    flex = policy.config._attn_implementation == "flex_attention"
    share = policy.share_prompt and not data.apart
    share = share and _sharing_pays(
        [data.rows[i] for i in indexes], policy.config.hidden_size, flex
    )
    # Lengths that flex_attention's blocks divide: else it compiles for ever new ones.
    micro = collate(data, indexes, policy.device, share, 128 if flex and share else 1)
    micro.mean_length = mean
    return micro


def _sharing_pays(rows: list[Row], hidden: int, skips: bool) -> bool:
    """A layer multiplies about 12 hidden^2 weights with a token, and 2 hidden * (how many keys it
    looks at). Behind one prompt every token has the keys of all K responses to look at (or skip, if
    the attention can): long responses to a short prompt are better off alone.
    """
    shared = max(row.tokens() for row in rows)
    plain = max(row.length() for row in rows)
    sequences = max(len(row.responses) for row in rows)
    cost = 6 * hidden + (shared / 2 if skips else shared)
    return sequences > 1 and shared * cost <= sequences * plain * (6 * hidden + plain / 2)


def collate(
    data: Rows,
    indexes: list[int],
    device: torch.device,
    share_prompt: bool = False,
    multiple_of: int = 1,  # of the length of a sequence
) -> Micro:
    rows = [data.rows[i] for i in indexes]
    many = max(len(row.responses) for row in rows)  # K
    longest = max(len(r) for row in rows for r in row.responses)  # T
    width = max(row.tokens() if share_prompt else row.length() for row in rows)
    width += -width % multiple_of  # L
    lines = len(rows) if share_prompt else len(rows) * many
    # Padding is never looked at, so any id and position will do.
    ids, positions = np.zeros((2, lines, width), np.int64)
    segments = np.full((lines, width), many + 1)
    picked, targets, slots = [], [], []
    lengths, ends = np.zeros((2, len(rows), many), np.int64)
    scores = np.full((len(rows), many), np.nan)
    filled = 0
    for b, row in enumerate(rows):
        start = len(row.prompt)
        if row.scores is not None:
            scores[b, : len(row.scores)] = row.scores
        for k, response in enumerate(row.responses):
            line = b if share_prompt else b * many + k
            if k == 0 or not share_prompt:
                ids[line, : len(row.prompt)], segments[line, : len(row.prompt)] = row.prompt, 0
                positions[line, : len(row.prompt)] = np.arange(len(row.prompt))
                start, filled = len(row.prompt), filled + len(row.prompt)
            place = np.arange(start, start + len(response))
            ids[line, place], segments[line, place] = response, k + 1
            positions[line, place] = len(row.prompt) + np.arange(len(response))
            before = place - 1
            before[0] = len(row.prompt) - 1  # the prompt's last token is before every first one
            picked.append(line * width + before)
            slots.append((b * many + k) * longest + np.arange(len(response)))
            targets.append(response)
            lengths[b, k], ends[b, k] = len(response), line * width + place[-1]
            start, filled = start + len(response), filled + len(response)
    to = lambda array: torch.from_numpy(np.ascontiguousarray(array, np.int64)).to(device)  # noqa: E731
    return Micro(
        to(ids),
        to(segments) if share_prompt else None,
        to(positions) if share_prompt else None,
        *(to(np.concatenate(parts)) for parts in (picked, targets, slots)),
        (len(rows), many, longest),
        to(lengths),
        to(ends),
        None if data.ref_logps is None else data.ref_logps[indexes, :many].to(device),
        sum(row.tokens() for row in rows),
        filled,
        torch.from_numpy(scores).to(device),
    )


def micro_batches(lengths: list[int], indexes: list[int], size: int) -> list[list[int]]:
    """Cut into micro-batches, rows of like length together, so that little is padding. Ties keep
    their order.
    """
    ordered = sorted(indexes, key=lambda i: -lengths[i])
    return [ordered[at : at + size] for at in range(0, len(ordered), size)]


# --------------------------------------------------------------------------------------------------
# 5. Log-probs of responses


def response_logps(
    policy: nn.Module, micro: Micro, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """(B, K) log pi(y_k | x), summed over response tokens, and (B, K) how many tokens that were."""
    return response_token_logps(policy, micro, temperature).sum(-1), micro.lengths


def response_token_logps(policy: nn.Module, micro: Micro, temperature: float = 1.0) -> Tensor:
    """(B, K, T) log pi of every response token, 0 past the end of a response."""

    def logps_of() -> Tensor:
        hidden = hidden_before_responses(policy, micro)  # (N, H)
        head, fused = head_of(policy), policy.fused_logps
        return token_logps(hidden, head, micro.targets, temperature, fused)

    with autocast(policy):
        # With --fsdp the weights, the head's among them, are whole only in here.
        logps = policy.during_forward(logps_of)
    return by_response(logps, micro)


def by_response(values: Tensor, micro: Micro) -> Tensor:
    """(B, K, T) from one (N,) for every response token; 0 past the end of a response."""
    places = values.new_zeros(int(np.prod(micro.shape)))
    return places.index_copy(0, micro.slots, values).view(micro.shape)


def hidden_before_responses(policy: nn.Module, micro: Micro, at: Tensor | None = None) -> Tensor:
    """(N, H) what each response token is predicted from, or what stands `at` other indexes into
    input_ids, flattened. The logits of prompt and padding are never made.
    """
    more = {}  # plain: attention is causal, so padding on the right is never seen
    if micro.segments is not None:
        masks = {
            kind: _shared_mask(policy, micro, window)
            for kind, window in _windows(policy.config).items()
        }
        mask = masks if len(masks) > 1 else next(iter(masks.values()))
        more = {"attention_mask": mask, "position_ids": micro.positions}
    states = policy.base_model(input_ids=micro.input_ids, use_cache=False, **more).last_hidden_state
    return states.flatten(0, 1)[micro.picked if at is None else at]


def _windows(config: Any) -> dict[str, int | None]:
    """The kinds of attention layers, and how many positions back each kind sees."""
    window = getattr(config, "sliding_window", None)
    usual = ["sliding_attention" if window else "full_attention"]
    kinds = dict.fromkeys(getattr(config, "layer_types", None) or usual)
    return {kind: window if kind == "sliding_attention" else None for kind in kinds}


def _shared_mask(policy: nn.Module, micro: Micro, window: int | None) -> Any:
    """Which key a query sees: one before it, in the prompt or in its own response, and less than a
    window of *positions* back (of indexes, the second response would be too far from the prompt).
    """
    segments, positions = micro.segments, micro.positions  # (B, L)
    # A tensor also where there is none, so that flex_attention compiles once for both kinds.
    most = torch.tensor(window or segments.shape[1], device=segments.device)

    def sees(b: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        of_key = segments[b, k]
        seen = (k <= q) & ((of_key == 0) | (of_key == segments[b, q]))
        return seen & (positions[b, q] - positions[b, k] < most)

    batch, length = segments.shape
    if policy.config._attn_implementation == "flex_attention":
        from torch.nn.attention.flex_attention import create_block_mask

        return create_block_mask(sees, batch, None, length, length, segments.device)
    index = torch.arange(length, device=segments.device)
    seen = sees(torch.arange(batch, device=index.device)[:, None, None], 0, index[:, None], index)
    # Added to the scores, so that one mask does for sdpa and eager. Finite, so that no row is NaN.
    low = torch.is_autocast_enabled(index.device.type)  # of the scores' dtype: sdpa takes no other
    mask = torch.zeros(
        seen.shape, dtype=policy.compute_dtype if low else policy.dtype, device=index.device
    )
    return mask.masked_fill_(~seen, torch.finfo(mask.dtype).min)[:, None]  # (B, 1, L, L)


def token_logps(
    hidden: Tensor,  # (N, H)
    head: Head,
    targets: Tensor,  # (N,)
    temperature: float = 1.0,
    fused: bool = True,
) -> Tensor:
    """(N,) log-probs in fp32 or better, from the hidden states that stand before the targets.

    Through kernels/token_logps.py, if it is there: the same without the (N, V) logits.
    """
    if fused and (kernels := beside("kernels.token_logps")):
        return kernels.token_logps(
            hidden, head.weight, targets, head.bias, head.softcap, head.scale, temperature
        )
    logits = F.linear(hidden, head.weight, head.bias)  # (N, V)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * head.scale
    if head.softcap:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return -F.cross_entropy(logits / temperature, targets, reduction="none")


# --------------------------------------------------------------------------------------------------
# 6. Reference log-probs: the policy before its first step, asked once


@torch.no_grad()
def add_reference_logps(
    run: Run,
    train: Rows,
    held_out: Rows,
    policy: nn.Module,
    ref_model: str | None,
    soup_weight: float,
    cache_dir: str,
) -> None:
    """Fill `ref_logps` of the rows that the run will use.

    In the micro-batches of the first epoch and through the code of training, because batch mates
    move a log-prob by rounding: so the loss of the first step is what the equation says to the last
    digit. Kept under `cache_dir` by everything that can move a digit. Without `ref_model` no second
    model is ever in memory.
    """
    reference = policy if ref_model is None else load_reference(ref_model, soup_weight, policy, run)
    parts = {
        "train": (train, run.used_rows(train)),
        "held_out": (held_out, run.held_out_rows(held_out)),
    }
    key = hashlib.sha256()
    for name, tensor in _state_tensors(reference).items():
        there = whole(tensor.detach())
        if MAIN_PROCESS:  # the others follow it
            there = there.cpu().contiguous().flatten()
            key.update(name.encode() + there.view(torch.uint8).numpy().tobytes())
    facts = [
        str(reference.compute_dtype),
        reference.config._attn_implementation,
        reference.share_prompt,
        reference.fused_logps,
        run.device.type,
        run.world,
        run.in_step,
        [run.args.gradient_checkpointing, run.args.compile, run.args.lora_rank],
    ]
    facts += [torch.__version__, torch.get_num_threads()]
    sources = [Path(__file__).resolve(), HERE / "kernels" / "token_logps.py"]
    facts += [file_hash(source) for source in sources if source.is_file()]
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    facts += [_version("transformers"), gpu, torch.are_deterministic_algorithms_enabled()]
    names = ("_name_or_path", "transformers_version", "plainpref")
    facts += [{k: v for k, v in reference.config.to_dict().items() if k not in names}]
    facts += [_version("triton")]
    facts += [[rows.digest(), micros] for rows, micros in parts.values()]
    key.update(json.dumps(facts, default=str).encode())
    file = Path(cache_dir or Path("runs") / ".cache") / f"ref-{key.hexdigest()[:24]}.safetensors"

    for rows, _ in parts.values():
        many = max((len(row.responses) for row in rows.rows), default=1)
        rows.ref_logps = torch.full((len(rows), many), torch.nan, dtype=torch.float64)
    if from_main(lambda: {"there": file.is_file()})["there"]:
        with safe_open(file, "pt") if MAIN_PROCESS else nullcontext() as tensors:
            for name, (rows, _) in parts.items():
                if MAIN_PROCESS:
                    rows.ref_logps = tensors.get_tensor(name)
                if run.world > 1:
                    dist.broadcast(rows.ref_logps, 0)  # other machines have other disks
        say("reference", f"log-probs from {file}")
        return
    for name, (rows, micros) in parts.items():
        many = rows.ref_logps.shape[1]
        mine = torch.zeros(len(rows), many, dtype=torch.float64)
        for indexes, counts in run.share(micros, f"reference ({name})"):
            micro = collate_for(reference, rows, indexes)
            passes = [micro.column(k) for k in range(many)] if rows.apart else [micro]
            logps = torch.cat([response_logps(reference, part)[0] for part in passes], 1)
            if counts:
                mine[indexes, : logps.shape[1]] = logps.double().cpu()
        if run.world > 1:
            dist.all_reduce(mine)
        used = [i for micro in micros for i in micro]
        rows.ref_logps[used] = mine[used]
    if MAIN_PROCESS:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(f".{file.name}.{os.getpid()}")
        save_file({name: rows.ref_logps for name, (rows, _) in parts.items()}, temporary)
        os.replace(temporary, file)
    of = "the policy before its first step" if ref_model is None else ref_model
    say("reference", f"log-probs of {of}")
    del reference
    gc.collect()  # a second model would lie in memory for a while: it refers to itself


def load_reference(ref_model: str, soup_weight: float, policy: nn.Module, run: Run) -> nn.Module:
    """A model, or a soup `a+b`: soup_weight * a + (1 - soup_weight) * b, weight by weight."""
    first, *second = parts_of_soup(ref_model)
    asked = (policy.share_prompt, policy.fused_logps, run.args.fsdp, False, run.args.compile, 0)
    asked += ("reference",)
    dtype = str(policy.compute_dtype).removeprefix("torch.")
    reference = load_policy(first, dtype, run, run.args.attn, *asked)
    if second:
        other = _state_tensors(load_policy(second[0], dtype, run, run.args.attn, *asked))
        with torch.no_grad():
            for name, tensor in _state_tensors(reference).items():
                if name not in other or other[name].shape != tensor.shape:
                    raise UserError(
                        f"--ref-model {ref_model}: {name} differs in shape between the two models"
                    )
                tensor.lerp_(other[name], 1 - soup_weight)  # also where both are spread
        del other
        gc.collect()
    if reference.config.vocab_size != policy.config.vocab_size:
        raise UserError(f"--ref-model {ref_model} has another vocabulary than the policy")
    return reference


# --------------------------------------------------------------------------------------------------
# 7. The optimizer


def make_optimizer(
    policy: nn.Module, name: str, lr: float, weight_decay: float, adam_eps: float = 1e-8
) -> torch.optim.Optimizer:
    """AdamW (0.9, 0.999, adam_eps) or RMSprop (PyTorch's defaults). Weight decay on matrices only,
    as is usual.
    """
    matrices = [p for p in policy.parameters() if p.requires_grad and p.dim() > 1]
    vectors = [p for p in policy.parameters() if p.requires_grad and p.dim() <= 1]
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if name == "rmsprop":
        return torch.optim.RMSprop(groups, lr=lr)
    # One pass, no copies of all parameters.
    return torch.optim.AdamW(groups, lr=lr, eps=adam_eps, fused=True)


def schedule_factor(schedule: str, warmup_ratio: float, step: int, total: int) -> float:
    """What the learning rate is multiplied with at `step` (from 0)."""
    warmup = int(np.ceil(warmup_ratio * total))
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return {
        "constant": 1.0,
        "linear": 1.0 - progress,
        "cosine": 0.5 + 0.5 * float(np.cos(np.pi * progress)),
        # As in Transformers: without a warm-up it falls as if one of 10,000 steps lay behind.
        "inverse-sqrt": float(np.sqrt((scale := warmup or 10_000) / (step + 1 + scale - warmup))),
    }[schedule]


def sum_gradients(parameters: list[nn.Parameter], bucket_bytes: int = 2**26) -> None:
    """Over all processes, in one fixed order, in buckets so that little extra memory is held."""
    for p in parameters:
        if p.grad is None:  # not touched on this process; perhaps on another
            p.grad = torch.zeros_like(p)
    if processes() == 1 or hasattr(parameters[0], "full_tensor"):  # --fsdp has summed them
        return
    bucket: list[Tensor] = []
    for i, p in enumerate(parameters):
        bucket.append(p.grad)
        last = i + 1 == len(parameters) or parameters[i + 1].dtype != p.dtype
        if last or sum(g.numel() * g.element_size() for g in bucket) >= bucket_bytes:
            flat = torch.cat([g.flatten() for g in bucket])
            dist.all_reduce(flat)
            for g, summed in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                g.copy_(summed.view_as(g))
            bucket = []


# --------------------------------------------------------------------------------------------------
# 8. Small things that the run needs

# They grow during a run, and are cut back to the checkpoint on resume.
LOGS = ("metrics.jsonl", "samples.jsonl", "rollouts.jsonl")


def optimizer_tensors(policy: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state, a tensor per (state, parameter name)."""
    names = {p: name for name, p in policy.named_parameters()}
    return {
        f"{key}|{names[p]}": value
        for p, state in optimizer.state.items()
        for key, value in state.items()
    }


def set_optimizer_tensors(policy: nn.Module, optimizer: torch.optim.Optimizer, saved: Any) -> None:
    """From an opened safetensors file."""
    parameters = dict(policy.named_parameters())
    for full_name in saved.keys():
        key, name = full_name.split("|", 1)
        p = parameters[name]
        if key == "step":  # a counter, on the CPU unless the optimizer's own kernel counts
            device = p.device if optimizer.defaults.get("fused") else "cpu"
            optimizer.state[p][key] = saved.get_tensor(full_name).to(device)
        else:
            optimizer.state[p][key] = torch.zeros_like(p, requires_grad=False)
            put(optimizer.state[p][key], saved, full_name)


def write_tensors(file: Path, tensors: dict[str, Tensor]) -> None:
    """A safetensors file, a tensor at a time, so that memory never holds a copy of all of them.
    Every process takes part in putting spread tensors together; the main one writes.
    """
    names = {v: k for k, v in SAFETENSORS_DTYPES.items()}
    header, at = {}, 0
    for name, tensor in tensors.items():
        end = at + tensor.numel() * tensor.element_size()
        about = {"dtype": names[tensor.dtype], "shape": list(tensor.shape)}
        header[name], at = about | {"data_offsets": [at, end]}, end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin aligned
    with open(file, "wb") if MAIN_PROCESS else nullcontext() as f:
        if f:
            f.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            together = whole(tensor.detach())
            if f:
                f.write(together.cpu().contiguous().flatten().view(torch.uint8).numpy().data)


SAFETENSORS_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def damage_of(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, if anything."""
    try:
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        for name, facts in manifest.items():
            if (checkpoint / name).stat().st_size != facts["bytes"]:
                return f"{name} has another size than when it was written"
            if file_hash(checkpoint / name) != facts["sha256"]:
                return f"{name} has other contents than when it was written"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return first_line(error)
    return None if "state.json" in manifest else "manifest.json is not complete"


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def beside(module: str) -> Any:
    """A module that stands beside this file, or None where only this file was copied."""
    from importlib import import_module
    from importlib.util import module_from_spec, spec_from_file_location

    file = HERE / f"{module.replace('.', '/')}.py"
    if not file.is_file():
        return None
    if "." not in module or module in sys.modules:
        return import_module(module)
    # By its path: Transformers may have installed a package that is called `kernels` too.
    spec = spec_from_file_location(module, file)
    loaded = module_from_spec(spec)
    spec.loader.exec_module(loaded)
    sys.modules[module] = loaded
    return loaded


def needed(module: str, asked_by: str) -> Any:
    if not (found := beside(module)):
        raise UserError(f"{asked_by} needs {module}.py beside common.py")
    return found


def progress_bar(over: Any, label: str, **more: Any):
    from tqdm import tqdm

    # A log file wants neither five lines a second nor the short loops.
    screen = sys.stderr.isatty()
    hidden = not MAIN_PROCESS or not (screen or more)
    interval = 0.2 if screen else 20.0
    return tqdm(
        over, label, disable=hidden, mininterval=interval, leave=False, dynamic_ncols=True, **more
    )


def hash_of(*numbers: int) -> int:
    """One seed from several numbers, so that seeds of different (seed, step, process) have nothing
    in common.
    """
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:6], "little")


def peak_memory() -> float:
    """GiB: of the GPU where there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
        2**30 if sys.platform == "darwin" else 2**20
    )


def mend_for_transformers_4(folder: Path, dtype: torch.dtype) -> None:
    """Version 5 writes names that version 4 does not know, or reads as something else without a
    word.
    """
    path = folder / "config.json"
    config = json.loads(path.read_text())
    rope = config.get("rope_parameters") or {}
    if "full_attention" in rope:  # Gemma 3 has one for each kind of layer
        config["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    if "rope_theta" in rope:
        config["rope_theta"] = rope["rope_theta"]
        if rope.get("rope_type", "default") != "default":
            config["rope_scaling"] = rope
        if rope.get("rope_type") == "longrope":  # Phi-3 refuses all but these
            factors = {key: rope[key] for key in ("short_factor", "long_factor")}
            config["rope_scaling"] = {"type": "longrope", **factors}
        if "partial_rotary_factor" in rope:  # Phi, StableLM: only a part of each head turns
            config["partial_rotary_factor"] = rope["partial_rotary_factor"]
        if config["model_type"] == "gpt_neox":
            config["rotary_emb_base"] = rope["rope_theta"]
            config["rotary_pct"] = rope.get("partial_rotary_factor", 1.0)
    config["dtype"] = config["torch_dtype"] = str(dtype).removeprefix("torch.")
    path.write_text(json.dumps(config, indent=2) + "\n")
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["tokenizer_class"] = "PreTrainedTokenizerFast"  # tokenizer.json says all there is to say
    # Or version 4 gives token_type_ids too, which generate() and a decoder with a head refuse.
    config.setdefault("model_input_names", ["input_ids", "attention_mask"])
    if isinstance(config.get("extra_special_tokens"), list):  # version 4: that name is of a dict
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")
