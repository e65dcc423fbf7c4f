"""Answers on the terminal: next to each other if it is wide, else one under the other."""

import shutil
import textwrap
import unicodedata
from itertools import zip_longest

from training.errors import printable

NARROWEST = 48  # characters of a column
DOUBLE = "WF"  # what Unicode calls characters that are two columns wide (Chinese, ...)


def end_of(text: str, most: int = 400) -> str:
    """A long prompt ends with its question."""
    return printable(text if len(text) <= most else f"... {text[-most:]}", "\n\t")


def show(answers: list[tuple[str, str, str]]) -> None:
    """Print (model, facts, answer) for one model or several."""
    answers = [
        (title, facts, printable(text, "\n\t").expandtabs(4)) for title, facts, text in answers
    ]
    width = shutil.get_terminal_size().columns // len(answers) - 3
    double = any(unicodedata.east_asian_width(c) in DOUBLE for *_, text in answers for c in text)
    if len(answers) == 1 or width < NARROWEST or double:
        for title, facts, text in answers:
            print(f"-- {title}: {facts}\n{text}", flush=True)
        return
    columns, wrap = [], textwrap.TextWrapper(width, break_on_hyphens=False).wrap
    for title, facts, text in answers:
        lines = [f"-- {title}", facts, *text.split("\n")]
        columns.append([part for line in lines for part in wrap(line) or [""]])
    for cells in zip_longest(*columns, fillvalue=""):
        print(" | ".join(f"{cell:<{width}}" for cell in cells).rstrip(), flush=True)
