"""Which is better? Every method from the same start, on the same questions, several seeds each.

    python compare.py                                          # the embedded task; hours on two cores
    python compare.py --quick                                  # the same with a third of the steps and one seed
    python compare.py --methods dpo simpo --seeds 0 1 --sweep simpo
    python compare.py --model runs/sft-model-gemma-2-2b --dataset tldr --reward runs/reward --nproc 4

A study is a list of runs: each method at its default strength with each seed, and for the methods of
--sweep the strengths of the table below with the first seed. A run is two commands, a method file and
then evaluate.py, both printed by --dry-run; what comes of it is a small row, results/<name>/rows/<run>.json.
A run that has its row is not repeated, one that was killed goes on from its checkpoint, and the same
command makes the rest, today or next week. results/<name>/README.md and its pictures are made from the
rows alone (study.py); what rows cannot know, results/<name>/note.md if there is one, stands above them.

Budgets on the embedded task are the files' own settings for `tiny`: 300 steps of 16 rows (900 for ORPO); for PPO 30 steps
of 128 prompts, for RLOO of 32 with 4 samples each, for GRPO of 16 with 8, for RAFT 20 stages of 64 prompts with
16 samples each, for RSO 16 samples to each of 2,000 prompts and then 300 steps of 16 pairs. What these five are
rewarded by, tiny-preferred@tiny, was learned from the same noisy comparisons by listwise_dpo.py in 700
steps, which is not counted in their seconds. `sft` is fine-tuned further on the chosen answers ("preferred-FT"),
`best-of-4` keeps of four samples of the start the one which that reward likes most: no training at all.

With another --model each method has its published settings for it (the run says which), --dataset serves
all, and the strengths are a third and three times the published one. Methods that sample want --train-reward.

Copyright (c) 2026 the plainpref authors. MIT licence. Tested with torch 2.13 and transformers 5.23.
"""

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from datetime import date
from importlib import import_module
from pathlib import Path
from typing import Any

import common
import study


@dataclass
class Method:
    knob: str | None = (
        None  # how strongly it holds on to the start, or how far a pair has to be driven apart
    )
    strengths: tuple[float, ...] = ()  # on the embedded task, beside the default
    steps: int = 300  # on the embedded task
    tiny: dict[str, Any] = field(
        default_factory=dict
    )  # flags there, where the file's own settings will not do
    quick: dict[str, Any] = field(default_factory=dict)  # more flags with --quick
    samples: bool = False  # scores answers of its own: wants a reward


# Fine-tuned on chosen answers: sft.py's settings for `tiny` make it from random weights instead. Of 2e-4 and 5e-4
# the learning rate with the lower held-out loss (0.838 and 0.871; the start 0.841).
PREFERRED_FT = {
    "train_on_prompt": False, "lr": 2e-4, "max_steps": 300, "schedule": "linear", "warmup_ratio": 0.05,
    "max_length": 160, "max_prompt_length": 128,
}  # fmt: skip
METHODS = {
    "sft": Method(tiny=PREFERRED_FT),
    "dpo": Method("beta", (0.1, 1.0)),
    "ipo": Method("beta", (0.08, 0.8)),
    "cpo": Method("beta", (0.03, 0.3)),
    "orpo": Method("odds_weight", (1.3, 12.0), steps=900),
    "simpo": Method("beta", (0.7, 6.0)),
    "slic": Method("delta", (1.5, 15.0)),
    "kto": Method("beta", (0.1, 1.0)),
    "pro": Method("sft_weight", (0.0005, 0.01)),
    "listwise_dpo": Method("beta", (0.07, 0.6)),
    "rrhf": Method("sft_weight", (0.03, 0.3)),
    "raft": Method("samples", (4, 32), steps=20, samples=True),
    "rso": Method("gamma", (0.3, 3.0), quick={"prompts": 600}, samples=True),
    "ppo": Method("kl_coef", (0.03, 0.3), steps=30, samples=True),
    "rloo": Method("kl_coef", (0.03, 0.3), steps=30, samples=True),
    "grpo": Method("kl_coef", (0.03, 0.3), steps=30, samples=True),
}
LEARNED_REWARD = "tiny-preferred@tiny"
BEST_OF = 4
CURVE_POINTS = 6  # checkpoints that are kept on the embedded task, and measured for the first seed
QUICK = 3  # times fewer steps
REPORT_EVERY = 600  # seconds, while runs are going on


# fmt: off
@dataclass
class Args:
    methods: tuple[str, ...] = tuple(METHODS)  # which of them
    seeds: tuple[int, ...] = (0, 1, 2)  # of the training
    sweep: tuple[str, ...] = ("dpo", "simpo", "kto", "ppo")  # methods with other strengths too, with the first seed; "none": no method
    quick: bool = False  # a third of the steps, the first seed alone, no sweep, half of the questions: to see that all runs, not which is better
    model: str = "tiny"  # what all begin from: tiny, a Hugging Face id, or better a folder that sft.py saved
    dataset: str | None = None  # what all learn from, as the method files take it; default: the embedded task's judged samples
    eval_dataset: str | None = None  # held-out rows; default: as in the method files
    reward: str | None = None  # what answers are measured by, as in evaluate.py; default: the true one on the embedded task
    train_reward: str | None = None  # what methods that sample learn from (raft.py, rso.py, ppo.py, rloo.py, grpo.py); default: on the embedded task tiny-preferred@tiny, else they are left out
    max_steps: int | None = None  # of every method, instead of its settings
    prompts: int = 1024  # questions that are measured on
    name: str | None = None  # of results/<name> and runs/<name>; default: tiny, tiny-quick, or model and dataset
    jobs: int | None = None  # runs at once; default: as many as there are GPUs for, or one for each two GiB of memory and CPU core
    nproc: int = 1  # processes of a run, through torchrun: its GPUs
    dry_run: bool = False  # print the commands
    report: bool = False  # make the report from the rows that are there, and run nothing
# fmt: on


@dataclass
class Cell:
    """One run: what it is called, what trains it (nothing: the start itself) and what measures it."""

    name: str
    method: str
    seed: int | None
    knob: str | None
    strength: float | None
    default: bool
    train: list[str]
    measure: list[str]


# --------------------------------------------------------------------------------------------------
# The plan


def plan(args: Args) -> list[Cell]:
    """Seed by seed, so that a study that is stopped early has something of every method."""
    for name in {*args.methods, *args.sweep} - {*METHODS, "none"}:
        raise common.UserError(f"there is no method {name!r}; there are {', '.join(METHODS)}")
    if not args.methods or not args.seeds:
        raise common.UserError("--methods and --seeds: at least one of each")
    for name in ("prompts", "jobs", "nproc", "max_steps"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise common.UserError(f"{common.flag(name)} must be 1 or more, got {value}")
    embedded = args.model == "tiny" and args.dataset is None
    if args.quick and not embedded:
        raise common.UserError("--quick is for the embedded task; --max-steps shortens other runs")
    if not embedded and not (args.dataset and args.model != "tiny"):
        raise common.UserError("--model and --dataset belong together: both, or neither")
    args.name = args.name or _default_name(args)
    seeds = args.seeds[:1] if args.quick else args.seeds
    prompts = max(1, args.prompts // 2) if args.quick else args.prompts
    shared = ["--prompts", str(prompts), "--cache-dir", f"runs/{args.name}/.cache"]
    if embedded:
        shared += ["--dataset", "family", "--reward", args.reward or "family"]
    else:
        shared += ["--dataset", args.dataset]
        shared += ["--eval-dataset", args.eval_dataset] if args.eval_dataset else []
        shared += ["--reward", args.reward] if args.reward else []

    def measured(name: str, model: str, *more: str) -> list[str]:
        result = f"runs/{args.name}/{name}.measured.json"
        told = ["--model", model, "--baseline", args.model, *shared, *more, "--json", result]
        return _launched("evaluate.py", args.nproc) + told

    def without_training(name: str, *more: str) -> Cell:
        return Cell(name, name, None, None, None, True, [], measured(name, args.model, *more))

    learned = args.train_reward or (LEARNED_REWARD if embedded else None)
    cells = [without_training("start")]
    if learned:
        best = ("--best-of", str(BEST_OF), "--select-by", learned, "--temperature", "1")
        cells.append(without_training(f"best-of-{BEST_OF}", *best))
    for seed in seeds:
        for method in (m for m in METHODS if m in args.methods):
            if METHODS[method].samples and not learned:
                continue
            sweep = method in args.sweep and seed == seeds[0] and not args.quick
            for strength in (None, *(_strengths(method, args.model, embedded) if sweep else ())):
                cells.append(_cell(args, method, seed, strength, embedded, learned, measured))
    return cells


def _cell(args, method, seed, strength, embedded, learned, measured) -> Cell:
    about, script = METHODS[method], f"{method}.py"
    name = f"{method}-s{seed}"
    if strength is not None:
        name = f"{method}-{about.knob}{strength:g}-s{seed}"
    dataset, eval_dataset = args.dataset, args.eval_dataset
    flags: dict[str, Any] = dict(about.tiny) if embedded else {}
    if embedded:  # as files: a run on `family` would measure itself at its end, as evaluate.py does
        dataset, eval_dataset = "tiny/judged-train.parquet", "tiny/judged-test.parquet"
    steps = about.steps
    if args.quick:
        flags |= about.quick | {"max_steps": steps // QUICK}
        steps //= QUICK
    if args.max_steps:
        flags["max_steps"], steps = args.max_steps, args.max_steps
    if about.samples and learned != LEARNED_REWARD:
        flags["reward"] = learned
    if strength is not None:
        flags[about.knob] = strength
    command = ["--model", args.model, "--dataset", dataset]
    command += ["--eval-dataset", eval_dataset] if eval_dataset else []
    command += ["--seed", str(seed)]
    for flag, value in flags.items():
        command += [common.flag(flag), f"{value:g}" if isinstance(value, float) else str(value)]
    command += ["--eval-every", "0"]
    if embedded:
        command += ["--save-every", str(max(1, steps // CURVE_POINTS)), "--keep-last", "100"]
    folder = f"runs/{args.name}/{name}"
    along = embedded and strength is None and seed == args.seeds[0]  # takes as long as all the rest
    # A cache of its own, so that its seconds have everything in them.
    command += ["--output-dir", folder, "--cache-dir", f"{folder}.cache"]
    usual = settings_of(method, args.model).get(about.knob) if about.knob else None
    return Cell(
        name, method, seed, about.knob, usual if strength is None else strength, strength is None,
        _launched(script, args.nproc) + command,
        measured(name, folder, *(["--checkpoints"] if along else [])),
    )  # fmt: skip


def settings_of(method: str, model: str) -> dict:
    """The row of its table that a method file will take for this model."""
    settings = import_module(method).SETTINGS
    other = next(key for key in settings if key != "tiny")
    return settings.get(common.short_name(model), settings[other])


def _strengths(method: str, model: str, embedded: bool) -> tuple[float, ...]:
    if embedded:
        return METHODS[method].strengths
    knob = METHODS[method].knob
    usual = settings_of(method, model).get(knob) if knob else None
    return (float(f"{usual / 3:.2g}"), float(f"{usual * 3:.2g}")) if usual else ()


def _default_name(args: Args) -> str:
    if args.dataset is None:
        return "tiny-quick" if args.quick else "tiny"
    parts = [Path(args.model).name, Path(args.dataset).stem]
    return "-".join("".join(c if c.isalnum() or c in ".-_" else "_" for c in p) for p in parts)


def _launched(script: str, nproc: int) -> list[str]:
    if nproc == 1:
        return [sys.executable, script]
    return [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={nproc}", script]


def shown(command: list[str]) -> str:
    """As one would type it."""
    words = " ".join(command).replace(f"{sys.executable} -m torch.distributed.run", "torchrun")
    return words.replace(sys.executable, "python")


# --------------------------------------------------------------------------------------------------
# Running it


class Study:
    """The runs of a plan, some of them at once."""

    def __init__(self, args: Args, cells: list[Cell]):
        self.args, self.cells = args, cells
        self.results, self.runs = Path("results") / args.name, Path("runs") / args.name
        self.gpus = _gpus()
        self.jobs = args.jobs or self._default_jobs()
        self.threads = max(1, (os.cpu_count() or 1) // (self.jobs * args.nproc))
        self.slots = list(range(self.jobs))  # which GPUs are free
        self.children: set[subprocess.Popen] = set()
        self.stopping, self.guard = False, threading.Lock()
        self.took: dict[str, list[float]] = {}  # method -> seconds of its runs, measuring included

    def _default_jobs(self) -> int:
        if self.gpus:
            return max(1, len(self.gpus) // self.args.nproc)
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
        return max(1, min(os.cpu_count() or 1, int(memory // 2)) // self.args.nproc)

    def row_of(self, cell: Cell) -> Path:
        return self.results / "rows" / f"{cell.name}.json"

    def left(self) -> list[Cell]:
        """Cells without a row. A row of another command is none of this study."""
        missing = []
        for cell in self.cells:
            file = self.row_of(cell)
            if not file.is_file():
                missing.append(cell)
                continue
            try:
                row = json.loads(file.read_text(encoding="utf-8"))
                theirs = (row["command"], row["measured_by"])
            except (ValueError, KeyError, TypeError):
                raise common.UserError(f"{file} is no row of a study: remove it") from None
            ours = (shown(cell.train), shown(cell.measure))
            if theirs != ours:
                differ = next((a, b) for a, b in zip(theirs, ours, strict=True) if a != b)
                raise common.UserError(
                    f"{file} is of another study:\n  it was  {differ[0]}\n  now it is {differ[1]}\n"
                    "--name begins another one, removing the row makes it again"
                )
        return missing

    def go(self) -> list[str]:
        """Run what is left. Returns the names of runs that failed."""
        (self.results / "rows").mkdir(parents=True, exist_ok=True)
        self.runs.mkdir(parents=True, exist_ok=True)
        left, failed = self.left(), []
        done = len(self.cells) - len(left)
        print(
            f"{self.args.name}: {len(self.cells)} runs, {done} of them done; {self.jobs} at once, "
            f"{self.threads} thread(s) each process",
            flush=True,
        )
        begun = reported = time.monotonic()
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
        pool = ThreadPoolExecutor(self.jobs)
        waiting: dict[Future, Cell] = {pool.submit(self.run, cell): cell for cell in left}
        try:
            while waiting:
                for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                    cell = waiting.pop(future)
                    done += 1
                    if error := future.result():
                        failed.append(cell.name)
                        told = f"failed: {error}"
                    else:
                        told = self.told(cell)
                        if time.monotonic() - reported > REPORT_EVERY:  # pictures take seconds
                            self.report()
                            reported = time.monotonic()
                    eta = self.eta([*waiting.values()], time.monotonic() - begun)
                    print(f"[{done}/{len(self.cells)}] {cell.name}: {told}{eta}", flush=True)
        except (KeyboardInterrupt, SystemExit):
            self.stop(pool)
            print("stopped: what has a row stays, the same command goes on", flush=True)
            raise SystemExit(130) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
        return failed

    def stop(self, pool: ThreadPoolExecutor) -> None:
        """The children save what they have and leave."""
        with self.guard:
            self.stopping = True
            for child in self.children:
                child.send_signal(signal.SIGTERM)
        pool.shutdown(wait=True, cancel_futures=True)

    def eta(self, left: list[Cell], so_far: float) -> str:
        known = [s for seconds in self.took.values() for s in seconds]
        if not left or not known:
            return ""
        mean = sum(known) / len(known)
        own = lambda method: self.took.get(method) or [mean]  # noqa: E731
        total = sum(sum(own(cell.method)) / len(own(cell.method)) for cell in left)
        minutes = total / self.jobs / 60
        return f" | {so_far / 60:.0f} min so far, about {minutes:.0f} min left"

    def told(self, cell: Cell) -> str:
        measured = json.loads(self.row_of(cell).read_text(encoding="utf-8"))["measured"]
        names = ("sampled/reward", "greedy/reward", "sampled/win_rate", "sampled/kl")
        parts = [
            f"{name} {measured[name]['value']:.3f}"
            for name in names
            if (measured.get(name) or {}).get("value") is not None
        ]
        return ", ".join(parts) or "done"

    def run(self, cell: Cell) -> str | None:
        """Train, measure, leave a row. Returns what went wrong."""
        begun = time.monotonic()
        with self.guard:
            slot = self.slots.pop()
        try:
            if cell.train and (wrong := self.train(cell, slot)):
                return wrong
            result, measuring = self.runs / f"{cell.name}.measured.json", time.monotonic()
            if wrong := self.child(cell, cell.measure, slot):
                return wrong
            row = self.row(cell, json.loads(result.read_text(encoding="utf-8")))
            row["measuring_seconds"] = round(time.monotonic() - measuring, 1)
            common.write_atomically(self.row_of(cell), json.dumps(row, indent=1) + "\n")
            shutil.rmtree(self.runs / f"{cell.name}.cache", ignore_errors=True)
            with self.guard:
                self.took.setdefault(cell.method, []).append(time.monotonic() - begun)
            return None
        except Exception as error:  # of one run: the others go on
            return f"{type(error).__name__}: {error}"
        finally:
            with self.guard:
                self.slots.append(slot)

    def train(self, cell: Cell, slot: int) -> str | None:
        """Each attempt's times are kept, so that a run that was killed has all its seconds."""
        file = self.runs / f"{cell.name}.attempts.json"
        folder = self.runs / cell.name
        attempts = json.loads(file.read_text()) if file.is_file() else []
        if finished(folder, cell.train):
            return None
        if attempts and "ended" not in attempts[-1]:  # killed: it has what it had saved
            attempts[-1]["ended"] = max(last_saved(folder), attempts[-1]["began"])
        attempts.append({"began": time.time()})
        common.write_atomically(file, json.dumps(attempts) + "\n")
        wrong = self.child(cell, cell.train, slot)
        attempts[-1]["ended"] = time.time()
        common.write_atomically(file, json.dumps(attempts) + "\n")
        return wrong

    def child(self, cell: Cell, command: list[str], slot: int) -> str | None:
        log = self.runs / f"{cell.name}.log"
        env = os.environ | {"OMP_NUM_THREADS": str(self.threads), "TOKENIZERS_PARALLELISM": "false"}
        if self.gpus:
            mine = self.gpus[slot * self.args.nproc : (slot + 1) * self.args.nproc]
            env["CUDA_VISIBLE_DEVICES"] = ",".join(mine)
        with open(log, "a", encoding="utf-8") as f:
            f.write(f"$ {shown(command)}\n")
            f.flush()
            with self.guard:
                if self.stopping:
                    return "stopped"
                child = subprocess.Popen(command, stdout=f, stderr=subprocess.STDOUT, env=env)
                self.children.add(child)
            code = child.wait()
            with self.guard:
                self.children.discard(child)
        if code == 0:
            return None
        tail = [line for line in log.read_text(encoding="utf-8").splitlines() if line.strip()]
        return f"exit code {code}: {(tail or [''])[-1].split(chr(13))[-1][:300]} (see {log})"

    def row(self, cell: Cell, record: dict) -> dict:
        row = {
            "name": cell.name, "method": cell.method, "seed": cell.seed, "knob": cell.knob,
            "strength": cell.strength, "default": cell.default,
            "command": shown(cell.train), "measured_by": shown(cell.measure),
            "commit": commit_of(measuring()) or record["facts"]["commit"],
            "date": date.today().isoformat(),
            "hardware": _hardware(self.gpus), "jobs": self.jobs, "threads": self.threads,
            "versions": record["facts"]["versions"],
        }  # fmt: skip
        if cell.train:
            folder = self.runs / cell.name
            ran = json.loads((folder / "run.json").read_text(encoding="utf-8"))
            lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
            steps = [x for x in map(json.loads, lines) if "lr" in x]
            row |= {
                "commit": commit_of(ran["source"]) or ran["commit"],
                "source": ran["source"],
                "steps": len(steps),
                "seconds": round(seconds_of(self.runs / f"{cell.name}.attempts.json", folder), 1),
                "peak_memory_gib": round(max(x["peak_memory_gib"] for x in steps), 3),
            }
        lengthwise = record["by_length"]
        return row | {
            "measured": record["measured"],
            "by_length": lengthwise.get("sampled", []),
            "curve": record["curve"],
        }

    def report(self) -> None:
        rows = study.read_rows(self.results)
        if rows:
            study.write(self.results, rows, about(self.args, self.cells, rows))


def finished(folder: Path, command: list[str]) -> bool:
    """Whether this very command has ended in that folder: starting it again would only say so."""
    try:
        record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    at = next(i for i, word in enumerate(command) if word.endswith(".py"))
    same = record.get("command") == " ".join(command[at:])
    return same and (folder / "summary.txt").is_file()


def last_saved(folder: Path) -> float:
    saved = [p.stat().st_mtime for p in folder.glob("checkpoint-*/manifest.json")]
    return max(saved, default=0.0)


def seconds_of(attempts: Path, folder: Path) -> float:
    """From the start of the process until the last checkpoint lies there: imports, tokenising,
    reference, sampling and scores are in it, what a run measures at its end is not.
    """
    total, saved = 0.0, last_saved(folder)
    for attempt in json.loads(attempts.read_text(encoding="utf-8")):
        total += max(0.0, min(attempt.get("ended", saved), saved) - attempt["began"])
    return total


def measuring() -> dict[str, str]:
    """The files that measure, as a run's record lists those that train."""
    names = ("evaluate.py", "estimates.py", "common.py", "generation.py", "scoring.py", "family.py")
    files = [common.HERE / name for name in names]
    return {file.name: common.file_hash(file) for file in files if file.is_file()}


def commit_of(source: dict[str, str]) -> str | None:
    """The last commit that changed a file which that run used, if these are still its files."""
    files = [common.HERE / name for name in source]
    files = [file if file.is_file() else common.HERE / "kernels" / file.name for file in files]
    if any(not file.is_file() or common.file_hash(file) != source[file.name] for file in files):
        return None

    def git(*words: str) -> str:
        command = ["git", "-C", str(common.HERE), *words, "--", *map(str, files)]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()

    return None if git("status", "--porcelain") else git("log", "-1", "--format=%h") or None


def about(args: Args, cells: list[Cell], rows: list[dict]) -> dict:
    """What the report says above its tables."""
    budget = "each method's published settings for the model"
    if args.dataset is None:
        part = f"a {['', '', 'half', 'third'][QUICK]} of " if args.quick else ""
        budget = (
            f"{part}300 steps of 16 rows (ORPO: {part}900); PPO {part}30 steps of 128 prompts; RLOO {part}30 "
            f"steps of 32 prompts, 4 samples each; GRPO {part}30 steps of 16 prompts, 8 samples each; RAFT {part}20 "
            "stages of 64 prompts, 16 samples each; RSO "
            f"{'600' if args.quick else '2,000'} prompts of 16 samples, then {part}300 steps of 16 pairs. The reward of "
            "these five and of best-of-4 was learned from the same comparisons in 700 steps more"
        )
    if args.max_steps:
        budget = f"{args.max_steps} steps of each method's own batch"
    hours = {
        what: sum(row.get(key) or 0 for row in rows) / 3600
        for what, key in (("training", "seconds"), ("measuring", "measuring_seconds"))
    }
    words = ["python compare.py"]
    for name, value in vars(args).items():
        usual = Args.__dataclass_fields__[name].default
        automatic = name == "name" and value == _default_name(args)
        if value != usual and not automatic and name not in ("jobs", "report", "dry_run"):
            values = value if isinstance(value, tuple) else () if value is True else (value,)
            words.append(" ".join([common.flag(name), *map(str, values)]))
    missing = {cell.name for cell in cells} - {row["name"] for row in rows}
    told = {
        "command": " ".join(words),
        "start": args.model,
        "reward": args.reward or ("none" if args.dataset else "family, the true one"),
        "budget": budget,
        "wall-clock": f"{hours['training']:.1f} hours of training and {hours['measuring']:.1f} of "
        "measuring, all runs added up (several run at once)",
    }
    if missing:
        told["still to come"] = ", ".join(sorted(missing))
    note = Path("results") / args.name / "note.md"  # what the rows cannot know
    told |= {"text": note.read_text(encoding="utf-8")} if note.is_file() else {}
    return {"title": f"Methods compared: {args.name}"} | told


def _gpus() -> list[str]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [part for part in visible.split(",") if part.strip()]
    import torch

    return [str(i) for i in range(torch.cuda.device_count())]


def _hardware(gpus: list[str]) -> str:
    if gpus:
        import torch

        return f"{torch.cuda.get_device_name()} x {len(gpus)}"
    return f"{platform.machine()}, {os.cpu_count()} cores"


def main(args: Args) -> int:
    if Path.cwd() != common.HERE:
        raise common.UserError(f"start it in {common.HERE}: scripts and runs/ are found from there")
    cells = plan(args)
    if args.dry_run:
        for cell in cells:
            print("\n".join(shown(command) for command in (cell.train, cell.measure) if command))
        return 0
    runner = Study(args, cells)
    left_out = [m for m in args.methods if not any(cell.method == m for cell in cells)]
    if left_out:
        print(f"left out: {', '.join(left_out)} (no --train-reward)", flush=True)
    if args.report:
        if not study.read_rows(runner.results):
            raise common.UserError(f"{runner.results}/rows: there is no row yet")
        failed = []
    else:
        failed = runner.go()
    runner.report()
    print(f"report: {runner.results / 'README.md'}", flush=True)
    if failed:
        print(
            f"{len(failed)} failed: {', '.join(failed)}; the same command tries again", flush=True
        )
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main(common.command_line(Args, __doc__)))
