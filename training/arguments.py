"""The command line: presets, which flags were given, and one line about a wrong flag."""

import argparse
import contextlib
import dataclasses
import difflib
import io
import re
import sys
import time
from pathlib import Path
from typing import Any

from data.load import READERS
from data.models import short_name
from data.published import SOURCES
from training.parallel import MAIN_PROCESS

THEIRS = {  # flags of TRL and Transformers: what to use instead, or why there is none
    "adam_beta1 adam_beta2 adam_epsilon": "PyTorch's defaults are used",
    "attn_implementation": "--attn",
    "beta": "--kl-coef",
    "bf16 fp16 torch_dtype": "--dtype bfloat16",
    "cpo_alpha rpo_alpha": "--nll-weight",
    "dataset_name train_file": "--dataset",
    "dataset_config dataset_train_split": "--dataset NAME:CONFIG:SPLIT",
    "dataset_test_split validation_file": "--eval-dataset",
    "deepspeed fsdp_config": "--fsdp",
    "eval_steps eval_strategy": "--eval-every",
    "gradient_accumulation_steps": "--batch-size, which counts all rows of an optimizer step",
    "learning_rate": "--lr",
    "load_in_4bit load_in_8bit": "weights are not quantised",
    "logging_steps logging_strategy": "every step is logged, in metrics.jsonl",
    "lora_alpha lora_dropout lora_target_modules": "alpha is 2r, no dropout, all linear layers",
    "lora_r use_peft": "--lora-rank 16",
    "loss_type": "every loss is a script (ls *.py)",
    "lr_scheduler_type": "--schedule",
    "max_completion_length max_new_tokens": "--max-length, minus --max-prompt-length",
    "model_name_or_path model_name": "--model",
    "num_generations": "--samples",
    "num_train_epochs": "--epochs",
    "optim": "--optimizer",
    "overwrite_output_dir": "--resume never",
    "per_device_train_batch_size": "--micro-batch-size (and --batch-size: of all processes)",
    "push_to_hub hub_model_id": "upload the folder of the run with `hf upload`",
    "report_to": "--track",
    "resume_from_checkpoint": "the same command continues its run",
    "reward_funcs reward_model_path": "--reward",
    "save_steps save_strategy": "--save-every",
    "save_total_limit": "--keep-last",
    "trust_remote_code": "code from the hub is never run",
    "use_vllm": "the policy itself samples",
    "warmup_steps": "--warmup-ratio, a share of the steps",
}


def parse(args_class: type, presets: dict[str, dict], about: str, argv: list | None = None) -> Any:
    """The preset of --model becomes the defaults that --help shows.

    Sets `args.preset` (the values) and `args.given` (names of the flags on the command line).
    """
    import tyro

    argv = sys.argv[1:] if argv is None else argv
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--model", nargs="?", const="", default=getattr(args_class, "model", ""))
    preset = presets.get(short_name(early.parse_known_args(argv)[0].model), {})
    flags = {word.split("=")[0][2:].replace("-", "_") for word in argv if word.startswith("--")}
    defaults = {field.name: field.default for field in dataclasses.fields(args_class)}
    given = defaults.keys() & (flags | {name.removeprefix("no_") for name in flags})
    if "epochs" in given:
        preset = {name: value for name, value in preset.items() if name != "max_steps"}
    how = {"args": argv, "description": about, "default": args_class(**preset)}
    how |= {"console_outputs": MAIN_PROCESS, "return_unknown_args": True}
    problems = io.StringIO()
    try:
        with contextlib.redirect_stderr(problems):
            args, unknown = tyro.cli(args_class, **how)
    except SystemExit as stop:
        if stop.code:
            fail(in_one_line(problems.getvalue()))
        raise
    if unknown:
        script = Path(sys.modules[args_class.__module__].__file__).name
        fail(f"{explain(unknown[0], argv, defaults)} (python {script} --help lists all flags)")
    args.preset, args.given = preset, given
    return args


def fail(text: str) -> None:
    """Exit with status 2, for a wrong command line. Only the main process prints why."""
    if MAIN_PROCESS:
        print(f"error: {text}", file=sys.stderr, flush=True)
    else:
        time.sleep(20)  # torchrun ends all processes as soon as one has left
    raise SystemExit(2)


def in_one_line(box: str) -> str:
    """tyro draws a box: a title, what is wrong, a rule, the flag's help."""
    lines = [line.strip(" │") for line in re.sub(r"\x1b\[[\d;]*m", "", box).splitlines()[1:]]
    text = re.split("[─-]{5,}", " ".join(lines).lstrip(" -"))[0].strip()
    return text.removeprefix("Error parsing ")


def explain(word: str, argv: list[str], defaults: dict[str, Any]) -> str:
    """What to write instead of a word that is no flag."""
    switches = {name for name, default in defaults.items() if isinstance(default, bool)}
    names = [*defaults, *(f"no_{name}" for name in switches)]
    if not word.startswith("-"):
        before = re.search(rf"--([\w-]+)[= ]{re.escape(word)}( |$)", " ".join(argv))
        if before and before[1].replace("-", "_") in switches:
            return f"{word}: --{before[1]} takes no value, --no-{before[1]} turns it off"
        files = Path(word).is_dir() and not (Path(word) / "config.json").is_file()
        sets = {"family", *(source.name for source in SOURCES)}
        is_data = files or word.endswith(tuple(READERS)) or word.split(":")[0] in sets
        use = "dataset" if is_data else "model"
        if use not in names or f"--{use}" in argv or re.fullmatch("[\\d.e+-]+", word):
            return f"{word}: belongs to no flag"
        return f"{word}: use --{use} {word}"
    flag, name = word.split("=")[0], word.split("=")[0].lstrip("-").replace("-", "_").lower()
    hint = next((hint for theirs, hint in THEIRS.items() if name in theirs.split()), None)
    ours = re.findall(r"--([\w-]+)", hint or "")
    if hint and not ours:
        return f"{flag}: there is no such flag: {hint}"
    if hint and all(other.replace("-", "_") in names for other in ours):
        return f"{flag}: use {hint}"
    near = [x for x in names if x.endswith(f"_{name}") or x.startswith(f"{name}_")]
    near = near[:1] or difflib.get_close_matches(name, names, 1)
    also = f"; did you mean --{near[0].replace('_', '-')}?" if near else ""
    return f"{flag}: there is no such flag{also}"
