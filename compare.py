"""Compare methods: all from the same start, on the same questions, several seeds each.

    python compare.py                    # the embedded task; hours on two cores
    python compare.py --quick            # a third of the steps, one seed: shows that all of it runs
    python compare.py --methods dpo simpo --seeds 0 1 --sweep simpo
    python compare.py --model runs/sft-gemma-2-2b --dataset tldr --reward runs/reward --nproc 4
    python compare.py --model path/to/model --dataset rows.jsonl --settings study.json

A run is two commands, a method file and then evaluate.py, and leaves one row in
results/<name>/rows/. The same command continues a study that was stopped. The report,
results/<name>/README.md, is made from the rows (--report makes it again) and from note.md, which a
person writes. To use several GPUs, start one command per seed.

--settings is a JSON file of flags: {"all": {...}, "online": {...}, "dpo": {...}, "evaluate": {...}}.
Those of "all" are for every method, "online" for methods that sample, "evaluate" for evaluate.py. A
list of values of a method's own knob (see METHODS) are its strengths: the first one runs with every
seed, the others with the first seed if the method is in --sweep.

On the embedded task `sft` is fine-tuned further on the chosen answers, and `best-of-4` picks from
four samples by tiny-preferred@tiny, a learned reward from which methods that sample learn too. With
another --model these methods need --train-reward.

Copyright (c) 2026 the plainpref authors. MIT licence.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import date
from importlib import import_module
from pathlib import Path
from typing import Literal

import common
from data.models import short_name
from evaluation import study
from evaluation.estimates import measure_name
from training.run_folder import flag

METHODS = {  # the knob that keeps a method near its start, and the strengths of a sweep on `tiny`
    "sft": (None,), "dpo": ("beta", 0.1, 1.0), "ipo": ("beta", 0.08, 0.8),
    "cpo": ("beta", 0.03, 0.3), "orpo": ("odds_weight", 1.3, 12.0), "simpo": ("beta", 0.7, 6.0),
    "slic": ("delta", 1.5, 15.0), "kto": ("beta", 0.1, 1.0), "pro": ("sft_weight", 0.0005, 0.01),
    "listwise_dpo": ("beta", 0.07, 0.6), "rrhf": ("sft_weight", 0.03, 0.3),
    "raft": ("samples", 4, 32), "rso": ("gamma", 0.3, 3.0), "ppo": ("kl_coef", 0.03, 0.3),
    "nlpo": ("kl_coef", 0.03, 0.3), "rloo": ("kl_coef", 0.03, 0.3), "grpo": ("kl_coef", 0.03, 0.3),
}  # fmt: skip
SAMPLING = ("raft", "rso", "ppo", "nlpo", "rloo", "grpo")  # need a reward to learn from
USUAL = tuple(name for name in METHODS if name != "nlpo")  # the study of results/tiny is older
# sft.py's preset for `tiny` is for random weights. lr: 2e-4 and 5e-4 were tried (by held-out loss).
TINY_SFT = {
    "train_on_prompt": False, "lr": 2e-4, "max_steps": 300, "schedule": "linear",
    "warmup_ratio": 0.05, "max_length": 160, "max_prompt_length": 128,
}  # fmt: skip
DATA, LEARNED_REWARD = "family/tiny/judged", "tiny-preferred@tiny"


# fmt: off
@dataclass
class Args:
    methods: tuple[Literal[*METHODS], ...] = USUAL  # methods to compare; default: all but nlpo
    seeds: tuple[int, ...] = (0, 1, 2)  # of the training
    sweep: tuple[Literal[*METHODS, "none"], ...] = ("dpo", "simpo", "kto", "ppo")  # methods that also run at other strengths, with the first seed: on `tiny` see METHODS, else a third and three times the default
    quick: bool = False  # a third of the steps, the first seed, no sweep, half of the questions
    model: str = "tiny"  # start of all methods: tiny, a Hugging Face id, or better a folder that sft.py saved
    dataset: str | None = None  # what all methods learn from; default: the judged samples of the embedded task
    eval_dataset: str | None = None  # held-out rows; default: as in the method files
    reward: str | None = None  # what answers are measured by, as in evaluate.py; default: the true reward of the embedded task
    train_reward: str | None = None  # what methods that sample learn from; default: tiny-preferred@tiny on the embedded task, else they are left out
    settings: str | None = None  # JSON file of flags for the methods and for evaluate.py
    max_steps: int | None = None  # of every method, instead of its preset's
    prompts: int = 1024  # questions to measure on
    name: str | None = None  # of results/<name> and runs/<name>; default: tiny, tiny-quick, or model and dataset
    nproc: int = 1  # processes per run, through torchrun: its GPUs
    report: bool = False  # only write the report
# fmt: on


def plan(args: Args) -> list[dict]:
    """The beginnings of the rows, seed by seed: a study that is stopped early has all methods."""
    embedded = args.model == "tiny" and args.dataset is None
    if not embedded and (args.model == "tiny" or args.dataset is None or args.quick):
        raise common.UserError("--model and --dataset belong together; --quick needs neither")
    if embedded:
        args.name = args.name or ("tiny-quick" if args.quick else "tiny")
        args.reward = args.reward or "family"
        args.train_reward = args.train_reward or LEARNED_REWARD
    args.name = args.name or f"{Path(args.model).name}-{Path(args.dataset).stem}"
    if args.quick:
        args.seeds, args.sweep, args.prompts = args.seeds[:1], (), max(1, args.prompts // 2)
    settings = read_settings(args.settings)
    rows = [measured(args, {"name": "start"})]
    for n in settings.get("best_of", (4,)) if args.train_reward else ():
        best = {"best_of": n, "select_by": args.train_reward, "temperature": 1}
        rows.append(measured(args, {"name": f"best-of-{n}", "best_of": n}, **best))
    for seed in args.seeds:
        for method, (knob, *strengths) in METHODS.items():
            if method not in args.methods or (method in SAMPLING and not args.train_reward):
                continue
            module = import_module(method)
            usual = vars(module.Args()) | module.PRESETS.get(short_name(args.model), {})
            own = dict(TINY_SFT) if embedded and method == "sft" else {}
            for key in ("all", "online" if method in SAMPLING else "offline", method):
                own |= settings.get(key, {})
            default = own.pop(knob, usual.get(knob))
            if isinstance(default, list):
                default, *strengths = default
            elif default and not embedded:
                strengths = [float(f"{default / 3:.2g}"), float(f"{default * 3:.2g}")]
            own |= {} if default == usual.get(knob) else {knob: default}
            if method not in args.sweep or seed != args.seeds[0]:
                strengths = []
            rows.append(trained(args, method, seed, default, usual, own))
            for strength in strengths:
                flags = own | {knob: strength}
                rows.append(trained(args, method, seed, strength, usual, flags, default=False))
    return rows


def read_settings(file: str | None) -> dict[str, dict]:
    try:
        settings = json.loads(Path(file).expanduser().read_text(encoding="utf-8")) if file else {}
    except (OSError, ValueError) as error:
        raise common.UserError(f"--settings {file}: {error}") from None
    known = {"all", "online", "offline", "evaluate", "best_of", *METHODS}
    if not isinstance(settings, dict) or (wrong := sorted(settings.keys() - known)):
        what = f"{wrong[0]!r} is not one of" if isinstance(settings, dict) else "must be an object:"
        raise common.UserError(f"--settings {file}: {what} {', '.join(sorted(known))}")
    return settings


def trained(
    args: Args, method: str, seed: int, strength: float | None, usual: dict, own: dict, default=True
) -> dict:
    embedded, knob = args.dataset is None, METHODS[method][0]
    name = f"{method}-s{seed}" if default else f"{method}-{knob}{strength:g}-s{seed}"
    flags = {"model": args.model, "dataset": args.dataset, "eval_dataset": args.eval_dataset}
    if embedded:  # files, because with `family` each run would also measure itself
        flags |= {"dataset": f"{DATA}-train.parquet", "eval_dataset": f"{DATA}-test.parquet"}
    steps = args.max_steps or (embedded and (usual | own)["max_steps"] // (3 if args.quick else 1))
    flags |= {"seed": seed} | {name: x for name, x in own.items() if name != knob}
    flags |= {"max_steps": steps} if args.quick or args.max_steps else {}
    other_reward = method in SAMPLING and args.train_reward != LEARNED_REWARD
    flags |= {"reward": args.train_reward} if other_reward else {}
    flags |= ({knob: own[knob]} if knob in own else {}) | {"eval_every": 0}
    flags |= {"save_every": max(1, steps // 6), "keep_last": 100} if embedded else {}
    folder = f"runs/{args.name}/{name}"
    # A cache per run, so that its seconds contain everything.
    flags |= {"output_dir": folder, "cache_dir": f"{folder}.cache"}
    row = {"name": name, "method": method, "seed": seed, "knob": knob, "strength": strength}
    row |= {"default": default, "command": written(args, f"{method}.py", flags)}
    curve = embedded and default and seed == args.seeds[0]
    return measured(args, row, **({"checkpoints": True} if curve else {}))


def measured(args: Args, row: dict, **more) -> dict:
    folder = f"runs/{args.name}/{row['name']}"
    flags = {"model": folder if "command" in row else args.model, "baseline": args.model}
    flags |= {"prompts": args.prompts, "cache_dir": f"runs/{args.name}/.cache"}
    flags |= {"dataset": args.dataset or "family", "eval_dataset": args.eval_dataset}
    flags |= {"reward": args.reward} | read_settings(args.settings).get("evaluate", {}) | more
    flags |= {"json": f"{folder}.measured.json"}
    row = {"method": row["name"], "default": True} | row
    return row | {"measured_by": written(args, "evaluate.py", flags)}


def written(args: Args, script: str, flags: dict) -> str:
    """A command as a person types it."""
    words = ["python"] if args.nproc == 1 else ["torchrun", f"--nproc_per_node={args.nproc}"]
    words.append(script)
    for name, value in flags.items():
        if isinstance(value, bool):
            words.append(flag(name if value else f"no_{name}"))
        elif value is not None:
            values = value if isinstance(value, list) else [value]
            words += [flag(name), *(f"{x:g}" if isinstance(x, float) else str(x) for x in values)]
    return shlex.join(words)


def launch(command: str, log: Path) -> None:
    torchrun = ["-m", "torch.distributed.run"] if command.startswith("torchrun") else []
    words = [sys.executable, *torchrun, *shlex.split(command)[1:]]
    with open(log, "a", encoding="utf-8") as out:
        # In a session of its own, so that Ctrl-C reaches it once: from here.
        child = subprocess.Popen(words, stdout=out, stderr=out, start_new_session=True)
        try:
            child.wait()
        except SystemExit:
            child.terminate()  # it saves a checkpoint first
            child.wait()
            raise
    if child.returncode:
        last = log.read_text(encoding="utf-8").strip().splitlines()[-1]
        raise RuntimeError(f"exit code {child.returncode}: {last[-300:]} (see {log})")


def make(row: dict, results: Path, runs: Path) -> None:
    """Train, measure, write the whole row."""
    folder, log, begun = runs / row["name"], runs / f"{row['name']}.log", time.monotonic()
    resumed, row = folder.exists(), row | {"date": date.today().isoformat()}
    if "command" in row:
        before = os.times()
        launch(row["command"], log)
        row["seconds"] = None if resumed else round(time.monotonic() - begun, 1)
        used = [b - a for a, b in zip(before, os.times(), strict=True)]
        row["cpu_seconds"] = None if resumed else round(sum(used[2:4]), 1)  # of children
        ran = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        row |= {key: ran[key] for key in ("commit", "source", "hardware")}
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        row["peak_memory_gib"] = max(json.loads(x).get("peak_memory_gib", 0.0) for x in lines)
    launch(row["measured_by"], log)
    record = json.loads((runs / f"{row['name']}.measured.json").read_text(encoding="utf-8"))
    row = {key: record["facts"][key] for key in ("commit", "versions")} | row
    row |= {key: record[key] for key in ("measured", "curve")}
    row["measures"] = [measure_name(name) for name in record["arguments"]["measure"]]
    temporary = results / f"{row['name']}.json"  # a row is whole or absent
    temporary.write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")
    temporary.rename(results / "rows" / temporary.name)


def main(args: Args) -> None:
    planned, failed = plan(args), []
    results, runs = Path("results", args.name), Path("runs", args.name)
    rows = {row["name"]: row for row in study.read_rows(results)}
    for row in planned:
        for key in ("command", "measured_by") if row["name"] in rows else ():
            # Committed rows have file names and flags of their time.
            was = (rows[row["name"]].get(key) or "").replace(" tiny/judged", f" {DATA}")
            if was.replace("--train-on-prompt False", "--no-train-on-prompt") != row.get(key, ""):
                where = f"{results}/rows/{row['name']}.json"
                raise common.UserError(f"{where} is of another command; choose another --name")
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit("stopped; the same command continues"))
    for i, row in enumerate(() if args.report else planned, 1):
        if row["name"] in rows:
            continue
        print(f"[{i}/{len(planned)}] {row['name']}", flush=True)
        (results / "rows").mkdir(parents=True, exist_ok=True)
        runs.mkdir(parents=True, exist_ok=True)
        try:
            make(row, results, runs)
        except RuntimeError as error:
            failed.append(row["name"])
            print(f"failed: {error}", flush=True)
    if not (rows := study.read_rows(results)):
        raise common.UserError(f"{results}/rows: there is no row yet")
    words = [word for word in sys.argv[1:] if word != "--report"]
    study.write(results, rows, shlex.join(["python", "compare.py", *words]))
    if failed:
        sys.exit(f"{len(failed)} failed: {', '.join(failed)}; the same command tries again")


if __name__ == "__main__":
    main(common.parse(Args, {}, __doc__))
