"""What a run wrote about itself into run.json, for the commands that use its model later."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from data.models import model_folder

ROWS = "dataset eval_dataset columns chat_template skip_bad_rows max_length max_prompt_length"


def run_of(model: str | None) -> dict[str, Any]:
    """The arguments of the run that saved a folder, and its `script`; {} for other models."""
    try:
        record = json.loads((model_folder(model or "") / "run.json").read_text(encoding="utf-8"))
        return record["arguments"] | {"script": Path(next(iter(record["source"]))).stem}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, StopIteration):
        return {}


def follow(args: Any, run: dict[str, Any]) -> dict[str, Any]:
    """Give flags that were not set the values of a run, and return these. Without --dataset, those
    are the rows, the lengths and the reward; with it, only whether texts become chat turns.
    """
    usual = {field.name: field.default for field in dataclasses.fields(args)}
    given = {name for name, value in usual.items() if getattr(args, name) != value}
    given = getattr(args, "given", given)
    if not run.get("dataset"):
        return {}
    by_preset = args.dataset == run["dataset"]  # the preset has its lengths and its reward
    names = "chat_template" if "dataset" in given else "dataset" if by_preset else ROWS
    taken = {name: run[name] for name in names.split() if name in run}
    if names == ROWS:
        rewards = [run.get("gold_reward"), run.get("reward")]  # the gold one was only measured
        taken["reward"] = next((name for name in rewards if name not in (None, "none")), None)
        room = taken["max_length"] - taken["max_prompt_length"]
        taken["max_new_tokens"] = min(usual["max_new_tokens"], room)
    taken = {name: value for name, value in taken.items() if name not in given}
    changed = {name: value for name, value in taken.items() if value != getattr(args, name)}
    vars(args).update(changed)
    return changed | ({} if "dataset" in given else {"dataset": run["dataset"]})
