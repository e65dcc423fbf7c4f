"""The folder of a run: a new one, one to continue, or a refusal that names what differs.

run.json records the command, all arguments, the source files that compute the weights, versions and
hardware; copies of these files are kept next to it.
"""

import atexit
import dataclasses
import hashlib
import json
import logging
import os
import platform
import re
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from data.models import model_folder
from training import checkpoint, errors, gradients, memory, parallel
from training.parallel import from_main

log = logging.getLogger("plainpref")
HOME = Path(__file__).resolve().parent.parent
LOGS = ("metrics.jsonl", "samples.jsonl", "rollouts.jsonl")
# Flags that change the weights by rounding at most. A resumed run may set them differently.
BOOKKEEPING = set(
    "output_dir resume eval_every sample_every save_every keep_last cache_dir export_dtype "
    "micro_batch_size deterministic attn share_prompt fused_logps fsdp gradient_checkpointing "
    "compile track sample_batch_size".split()
)


def say(label: str, text: str) -> None:
    if parallel.MAIN_PROCESS:
        print(f"{label:<11}{text}", flush=True)


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def check_arguments(args: Any) -> None:
    """Refuse values that no run can use, before anything is loaded."""
    positive = (
        "batch_size micro_batch_size max_length max_prompt_length max_steps epochs lr".split()
    )
    for name, value in vars(args).items():
        if isinstance(value, int | float) and not 0 <= value < float("inf"):  # true for nan
            raise ValueError(f"{flag(name)} must be a finite number and not negative, got {value}")
        if name in positive and value == 0:
            raise ValueError(f"{flag(name)} must be positive, got {value}")
    if args.warmup_ratio >= 1:
        raise ValueError(f"--warmup-ratio must be in [0, 1), got {args.warmup_ratio}")
    if args.max_prompt_length >= args.max_length:
        raise ValueError(
            f"--max-prompt-length {args.max_prompt_length} leaves no room for a response in "
            f"--max-length {args.max_length}"
        )
    if not args.dataset:
        raise ValueError("--dataset is required: a .jsonl file, a short name or a hub id")
    if hasattr(args, "ref_model"):
        from training import reference

        reference.check(args.ref_model, args.soup_weight)
    if args.lora_rank:
        from training import lora

        lora.check(args.lora_rank)
    if args.track != "none":
        from training import tracking

        tracking.check(args.track)


def describe_settings(args: Any) -> str:
    """Which values come from the preset, and which from the command line."""
    preset, given = getattr(args, "preset", {}), getattr(args, "given", set())
    parts = [f"{name} {value}" for name, value in preset.items() if name not in given]
    text = f"preset: {', '.join(parts)}" if parts else "no preset: the method's defaults"
    if parts and args.dataset != preset.get("dataset", args.dataset):
        text += f" (made for {preset['dataset']}: a guess for {args.dataset})"
    set_here = [f"{name} {getattr(args, name)}" for name in sorted(given)]
    return text + (f"; command line: {', '.join(set_here)}" if set_here else "")


def default_name(args: Any, script: Path) -> str:
    """The script, and the flags that differ from their defaults:
    dpo-smollm2-pairs-beta0.2 of --model ~/smollm2 --dataset pairs.jsonl --beta 0.2.
    """
    preset, parts = getattr(args, "preset", {}), [script.stem]
    for field in dataclasses.fields(args):
        value = getattr(args, field.name)
        usual = preset.get(field.name, field.default)
        if field.name in getattr(args, "given", set()) - BOOKKEEPING and value != usual:
            if field.name in ("model", "dataset"):
                parts.append(re.sub(r"[^\w.+-]+", "_", Path(value).name.removesuffix(".jsonl")))
                continue
            text = re.sub(r"[^\w.+-]+", "_", _short(value)).strip("_")
            name = field.name.replace("_", "")
            parts.append(f"{name}{'' if text[:1].isdigit() else '-'}{text}")
    name = "-".join(parts)
    if len(name) > 100:
        name = f"{name[:80]}-{hashlib.sha256(name.encode()).hexdigest()[:12]}"
    return name


def _short(value: Any) -> str:
    """0.0001 as 1e-4; other values as they are."""
    if not isinstance(value, float):
        return str(value)
    short = re.sub(r"\.?0*e([-+])0*", r"e\1", f"{value:e}")
    return f"{value:g}" if 0.001 <= abs(value) < 1e4 or value == 0 else short


def start(run: Any) -> None:
    """Check the arguments, and set run.folder; leave if its run is finished."""
    args = run.args
    errors.running.update(args=args, world=run.world)
    from_main(lambda: check_arguments(args))
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    say("settings", describe_settings(args))
    run.folder, finished = from_main(lambda: open_for(run))
    if finished:
        summary = (run.folder / "summary.txt").read_text()
        say("finished", f"{run.folder}. To run it again next to the old one: --resume never")
        run.print(summary.rstrip())
        raise SystemExit(0)
    say("run", f"{run.folder}, {run.world} process(es) on {run.device.type}")


def fit_batch_size(args: Any, rows: int, shares: int) -> None:
    """Refuse a batch larger than the data set; lower it if it is only the default."""
    if rows < args.batch_size and "batch_size" not in getattr(args, "given", ["batch_size"]):
        args.batch_size = max(1, rows // 8 // shares) * shares
        say("", f"only {rows:,} training rows: --batch-size {args.batch_size}")
    if rows < args.batch_size or args.batch_size % shares:
        raise ValueError(
            f"--batch-size must be a multiple of {shares} (processes times minibatches) and at "
            f"most {rows:,} (training rows), got {args.batch_size}"
        )


def planned(run: Any, train: list) -> None:
    """Say how long the run is and how much memory it may need; remember its rows."""
    args = run.args
    how = f"{args.batch_size} rows in micro-batches of {args.micro_batch_size}"
    say("steps", f"{run.total_steps:,} of {how}, {run.steps_per_epoch:,} per epoch")
    gradients.backwards = args.batch_size // args.micro_batch_size // run.world
    run.made_from["--dataset"] = rows_digest(train)
    many = args.micro_batch_size * max(len(row.responses) for row in train)
    tokens = [sum(map(len, row.responses)) for row in train]
    length = max(row.length() for row in train)
    run.largest = {
        "sequences": many, "length": length, "targets": max(tokens) * args.micro_batch_size,
    }  # fmt: skip
    theirs = from_main(lambda: run.made_from["--dataset"])
    if parallel.sum_over_processes(torch.tensor(float(theirs != run.made_from["--dataset"]))):
        raise ValueError(f"{args.dataset}: not all machines have the same rows of it")


def rows_digest(rows: list) -> str:
    digest = hashlib.sha256()
    for row in rows:
        for array in (row.prompt, *row.responses, *([] if row.scores is None else [row.scores])):
            digest.update(len(array).to_bytes(4, "little") + array.tobytes())
    return digest.hexdigest()


def newest(run: Any) -> Path | None:
    """The newest undamaged checkpoint. It must be made from the same rows and models."""
    for module in run.policy.modules():
        if digest := getattr(module, "digest", None):
            run.made_from.setdefault(f"--model ({type(module).__name__})", digest)
    if folder := checkpoint.newest_whole(run.checkpoints()):
        before = json.loads((folder / "state.json").read_text())["made_from"]
        now = run.made_from
        changed = [name for name in before if now.get(name, before[name]) != before[name]]
        if changed:
            raise ValueError(
                f"{run.folder} holds another run: what {' and '.join(changed)} names has "
                "changed. --resume never starts a new folder"
            )
    return folder


def ready(run: Any) -> None:
    """Before the first step: cut the logs to the checkpoint, show progress, save on signals."""
    for name in LOGS if run.rank == 0 else ():  # what was logged later will be logged again
        if (run.folder / name).exists():
            os.truncate(run.folder / name, run.log_sizes.get(name, 0))
    if run.step and not (run.folder / f"checkpoint-{run.step}").exists():
        raise ValueError(f"{platform.node()} has no {run.folder}: --output-dir must be shared")
    run.tracker = Progress(run)
    if hasattr(run.policy, "config") and run.largest["targets"]:
        how = run.largest | {"world": run.world, "cuda": run.device.type == "cuda"}
        needed = from_main(lambda: memory.estimate(run.policy.config, run.args, **how))
        say("memory", f"{needed} at the longest rows")
        gradients.fsdp_once = run.in_step and from_main(lambda: gradients.fit_whole(needed, run))

    writer = None
    if run.device.type != "cpu":  # there the checkpoint's tensors are copies
        writer = run.write_checkpoint = checkpoint.BackgroundWriter(run.write_checkpoint)

    def save() -> None:
        if writer:
            writer.wait()  # perhaps this step is being written
        if run.in_step:  # the signal may have come while weights were gathered
            from training import fsdp

            fsdp.reshard(run.policy)
        run.save()
        text = f"step {run.step} is saved in {run.folder}; the same command continues"
        run.print(f"stopped: {text}")

    run.stop_request.save = save


class Progress:
    """The progress bar, and --track."""

    def __init__(self, run: Any) -> None:
        name, args = run.script.stem, run.args
        self.bar = parallel.progress_bar(range(run.total_steps), name, initial=run.step)
        self.tracker = None
        if args.track != "none" and run.rank == 0:
            from training import tracking

            facts = dataclasses.asdict(args)
            self.tracker = tracking.start(args.track, run.folder, facts, run.step)

    def log(self, record: dict[str, Any], step: int) -> None:
        if "tokens_per_second" in record:
            names = ("loss", "rewards/accuracies", "objective/scores", "objective/kl")
            shown = {name: f"{record[name]:.3f}" for name in names if record.get(name) is not None}
            speed = f"{record['tokens_per_second']:,.0f}"
            self.bar.set_postfix(shown | {"tok/s": speed}, refresh=False)
            self.bar.update()
        if self.tracker:
            self.tracker.log(record, step)

    def close(self) -> None:
        self.bar.close()
        if self.tracker:
            self.tracker.close()


def open_for(run: Any) -> tuple[Path, bool]:
    """The folder to use, and whether its run is finished already."""
    args = run.args
    folder = Path(args.output_dir or Path("runs") / default_name(args, run.script)).expanduser()
    if folder.is_file():
        raise ValueError(f"--output-dir {folder} is a file")
    if args.resume == "never":
        first, number = folder, 1
        while folder.exists() and any(folder.iterdir()):
            number += 1
            folder = first.with_name(f"{first.name}-{number}")
    record, old = describe(run), _read_record(folder)
    begun = any(folder.glob("checkpoint-*")) or any(
        file.stat().st_size for file in folder.glob("*.jsonl")
    )
    if old and begun:
        _refuse_another(folder, old, record)
    elif not old and folder.exists() and not _unused(folder, run):
        raise ValueError(f"{folder} is not empty and holds no run: choose another --output-dir")
    folder.mkdir(parents=True, exist_ok=True)
    run.lock = _lock(folder)
    summary, exported = folder / "summary.txt", any(folder.glob("*.safetensors"))
    if summary.is_file() and exported and old and old["arguments"] == record["arguments"]:
        return folder, True
    summary.unlink(missing_ok=True)
    atexit.register(_remove_unused, folder, run)
    (folder / "run.json").write_text(json.dumps(record, indent=1) + "\n")
    for source in sources(run):
        (folder / source.name).write_text(source.read_text())
    return folder, False


def _unused(folder: Path, run: Any) -> bool:
    """Whether a run failed or was killed here before its first result."""
    ours = {".lock", "run.json", *(file.name for file in sources(run))}
    return folder.is_dir() and {path.name for path in folder.iterdir()} <= ours


def _remove_unused(folder: Path, run: Any) -> None:
    if _unused(folder, run):
        shutil.rmtree(folder, ignore_errors=True)
        if folder.parent == Path("runs") and not any(folder.parent.iterdir()):
            folder.parent.rmdir()


def _read_record(folder: Path) -> dict | None:
    try:
        record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        return record if {"arguments", "source", "processes"} <= record.keys() else None
    except (OSError, ValueError, AttributeError):
        return None


def _lock(folder: Path) -> Any:
    """Lock the folder: two runs in it would overwrite each other's files."""
    try:
        import fcntl

        lock = open(folder / ".lock", "w")
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return lock
    except BlockingIOError:
        raise ValueError(f"another process is training in {folder}") from None
    except (ImportError, OSError):  # no such locks here (Windows, some network disks)
        return None


def _refuse_another(folder: Path, old: dict, new: dict) -> None:
    differ = []
    for name in sorted({*old["arguments"], *new["arguments"]} - BOOKKEEPING):
        was, now = (record["arguments"].get(name, "(no such flag)") for record in (old, new))
        if was != now and not (name == "max_steps" and _may_grow(new["arguments"], was, now)):
            differ.append(f"{flag(name)} was {was}, now {now}")
    for name, digest in new["inputs"].items():
        if old.get("inputs", {}).get(name, digest) != digest:
            differ.append(f"what {flag(name)} names has changed")
    for name, digest in new["source"].items():
        if old["source"].get(name, digest) == digest:
            continue
        if name.startswith("reward-"):  # perhaps because it had stopped the run
            log.info(
                f"{name.removeprefix('reward-')} has changed; the run continues with the new one"
            )
        else:
            differ.append(f"{name} has changed")
    if next(iter(old["source"])) != next(iter(new["source"])):
        differ = [f"it is a run of {next(iter(old['source']))}"]
    if differ:
        raise ValueError(
            f"{folder} holds another run: {'; '.join(differ)}. "
            "--resume never starts a new folder, --output-dir names another one"
        )
    if old["processes"] != new["processes"]:
        log.info(f"{new['processes']} processes, {old['processes']} before: equal up to rounding")


def _may_grow(arguments: dict, was: Any, now: Any) -> bool:
    """With a constant learning rate, more steps continue the same run."""
    steady = arguments["schedule"] == "constant" and not arguments["warmup_ratio"]
    return steady and was is not None and now is not None and was <= now


def sources(run: Any) -> list[Path]:
    """The files that compute the weights: the script first."""
    used = ["common.py", "kernels/token_logps.py", "kernels/shared_prompt.py"]
    used += ["training/fsdp.py"] if run.args.fsdp else []
    used += ["training/lora.py"] if run.args.lora_rank else []
    if "sampling" in run.script.read_text():
        names = ("generate", "rewards", "rollouts", "score_model", "stored")
        used += [f"sampling/{name}.py" for name in names]
    return [run.script, *(HOME / name for name in used if (HOME / name).is_file())]


def describe(run: Any) -> dict[str, Any]:
    files = {file.name: file for file in sources(run)}
    # --reward FILE.py:function is the user's own file.
    reward = Path((getattr(run.args, "reward", None) or "").rpartition(":")[0]).expanduser()
    if reward.suffix == ".py" and reward.is_file():
        files[f"reward-{reward.name}"] = reward
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "arguments": dataclasses.asdict(run.args),
        "from": {name: "command line" for name in sorted(getattr(run.args, "given", ()))},
        "processes": run.world,
        "source": {n: hashlib.sha256(f.read_bytes()).hexdigest() for n, f in files.items()},
        "inputs": inputs(run.args),
        "commit": git_commit(),
        "versions": {"python": platform.python_version()}
        | {name: package_version(name) for name in ("torch", "transformers", "triton")},
        "hardware": gpu or f"{platform.machine()}, {os.cpu_count()} cores",
    }


def inputs(args: Any) -> dict[str, str]:
    """Flag -> digest of the files that it names, to notice that they were replaced."""
    found = {}
    kinds = ("*.safetensors", "*config.json", "tokenizer.json", "*.jsonl*", "*.parquet")
    for name in ("model", "ref_model", "value_model", "reward", "dataset", "eval_dataset"):
        value, files = getattr(args, name, None), []
        for path in map(model_folder, re.split("[+@]", value) if value else ()):
            files += [path] if path.is_file() else [f for kind in kinds for f in path.glob(kind)]
        if files:
            digests = [checkpoint.quick_hash(file) for file in sorted(files)]
            found[name] = hashlib.sha256("".join(digests).encode()).hexdigest()
    return found


def package_version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def git_commit() -> str | None:
    command = ["git", "-C", str(HOME), "describe", "--always", "--dirty"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None
