"""The command line: presets, and which flags were given."""

import argparse
import dataclasses
import sys
import time
from typing import Any

from data.models import short_name
from training.parallel import MAIN_PROCESS


def parse(args_class: type, presets: dict[str, dict], about: str, argv: list | None = None) -> Any:
    """The preset of --model becomes the defaults that --help shows.

    Sets `args.preset` (the values) and `args.given` (names of the flags on the command line).
    """
    import tyro

    argv = sys.argv[1:] if argv is None else argv
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--model", default=getattr(args_class, "model", ""))
    preset = presets.get(short_name(early.parse_known_args(argv)[0].model), {})
    flags = {word.split("=")[0][2:].replace("-", "_") for word in argv if word.startswith("--")}
    names = {field.name for field in dataclasses.fields(args_class)}
    given = names & (flags | {name.removeprefix("no_") for name in flags})
    if "epochs" in given:
        preset = {name: value for name, value in preset.items() if name != "max_steps"}
    how = {"args": argv, "description": about, "default": args_class(**preset)}
    try:
        args = tyro.cli(args_class, console_outputs=MAIN_PROCESS, **how)
    except SystemExit as stop:
        time.sleep(0 if MAIN_PROCESS or not stop.code else 20)  # the main process prints why
        raise
    args.preset, args.given = preset, given
    return args
