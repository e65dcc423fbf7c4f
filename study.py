"""A study's report from its rows alone: tables, sentences, pictures.

`compare.py` leaves one row a finished run: what it was (method, seed, strength), what it cost, what
was measured. This file reads rows and nothing else, so that a report can be made again, and no
sentence in it can say what the rows do not. Sentences are chosen by comparing numbers as they are
shown, rounded: whoever has the tables can check each. What a row lacks (a real model has no true
reward) is left out, column, sentence or picture.

A method's numbers are those of its runs at the default strength: mean, and smallest to largest
seed. Runs at other strengths are its sweep, shown one by one with the evaluation's own 95 %
interval. Two methods are told apart where all seeds of one lie above all of the other, and there
are two or more of each: of a few seeds that is all that one should say.

study_sentences.py makes the sentences, study_pictures.py the pictures.

Copyright (c) 2026 the plainpref authors. MIT licence.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import common

METHODS = "start sft dpo ipo cpo orpo simpo slic kto pro listwise_dpo rrhf raft rso ppo rloo grpo"
ORDER = METHODS.split()  # of tables
COLUMNS = (  # heading, key of what was measured or of the row, digits
    ("reward, sampled", "sampled/reward", 3),
    ("reward, greedy", "greedy/reward", 3),
    ("win rate against the start", "sampled/win_rate", 3),
    ("pairs ranked right, against the reference", "ranking/reference_normalised", 3),
    ("pairs ranked right, by the sum", "ranking/sum", 3),
    ("KL from the start, nats an answer", "sampled/kl", 2),
    ("tokens an answer", "sampled/length", 2),
    ("seconds", "seconds", 0),
    ("peak memory, GiB", "peak_memory_gib", 2),
)
DIGITS = {key: digits for _, key, digits in COLUMNS}


# -- rows


def read_rows(folder: Path) -> list[dict]:
    """rows/*.json, by name of the file."""
    rows = []
    for path in sorted((folder / "rows").glob("*.json")):
        try:
            row = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:  # JSON or UTF-8
            raise common.UserError(f"{path}: {error}") from None
        if wrong := what_is_wrong(row):
            raise common.UserError(f"{path}: {wrong}")
        rows.append(row)
    return rows


def what_is_wrong(row: object) -> str:
    if not isinstance(row, dict):
        return "a row is an object"
    for key in ("name", "method"):
        if not isinstance(row.get(key), str):
            return f"{key} should be a text"
    measured, lists = row.get("measured"), [row.get(key) or [] for key in ("by_length", "curve")]
    if not isinstance(measured, dict):
        return "measured should be an object"
    inside = [x for x in measured.values() if x is not None]
    if not all(isinstance(x, dict) for x in inside):
        return "measured should hold objects, each with a value"
    if not all(isinstance(x, list) and all(isinstance(y, dict) for y in x) for x in lists):
        return "by_length and curve should be lists of objects"
    if not all(isinstance(point.get("step"), int | float) for point in lists[1]):
        return "each point of curve should have its step"
    numbers = [x.get(part) for x in inside for part in ("value", "low", "high", "n")]
    numbers += [row.get(key) for key in "seed strength steps seconds peak_memory_gib".split()]
    numbers += [x for point in lists[0] + lists[1] for x in point.values()]
    wrong = [x for x in numbers if x is not None and not isinstance(x, int | float)]
    return f"{wrong[0]!r} should be a number" if wrong else ""


def number(where: dict, key: str) -> float | None:
    """None for what is missing, and for what is not finite: a run may diverge."""
    x = where.get(key)
    return None if x is None or not math.isfinite(x) else float(x)


def value(row: dict, key: str, part: str = "value") -> float | None:
    inside = row["measured"].get(key)
    if inside is None:  # what a run cost stands outside, without an interval
        return number(row, key) if part == "value" else None
    return number(inside, part)


def by_method(rows: list[dict]) -> dict[str, list[dict]]:
    """Runs at the default strength of each method, methods in the order of the tables."""
    found: dict[str, list[dict]] = {}
    for row in sorted(rows, key=lambda row: (rank(row["method"]), row.get("seed") or 0)):
        if row.get("default") is not False:
            found.setdefault(row["method"], []).append(row)
    return found


def rank(method: str) -> tuple[int, str]:
    return (ORDER.index(method) if method in ORDER else len(ORDER), method)


def swept(rows: list[dict]) -> dict[tuple, list[dict]]:
    """(method, seed, knob) -> its runs by strength, that at the default among them."""
    found: dict[tuple, list[dict]] = {}
    for row in sorted(rows, key=lambda row: rank(row["method"])):
        if number(row, "strength") is not None:
            found.setdefault((row["method"], row.get("seed"), row.get("knob")), []).append(row)
    return {
        key: sorted(runs, key=lambda row: row["strength"])
        for key, runs in found.items()
        if len(runs) > 1 and any(row.get("default") is False for row in runs)
    }


@dataclass(frozen=True)
class Seeds:
    """Mean, smallest and largest over the runs that have the number, as shown: rounded."""

    mean: float
    low: float
    high: float
    count: int
    of: int
    digits: int

    @property
    def seeds(self) -> str:
        some = f"{self.count} of " if self.count < self.of else ""
        return f"{some}{self.of} seed{'s' * (self.of > 1)}"

    def shown(self, seeds: bool) -> str:
        mean, low, high = (f"{x:,.{self.digits}f}" for x in (self.mean, self.low, self.high))
        inside = [f"{low} to {high}"] * (self.count > 1)
        inside += [self.seeds] * (seeds or self.count < self.of)
        return f"{mean} ({'; '.join(inside)})" if inside else mean

    def __str__(self) -> str:
        return self.shown(seeds=True)

    def overlaps(self, other: Seeds) -> bool:
        return self.low <= other.high and other.low <= self.high


def seeds_of(numbers: Iterable[float | None], digits: int) -> Seeds | None:
    numbers = list(numbers)
    if not (there := [x for x in numbers if x is not None]):
        return None
    mean, low, high = math.fsum(there) / len(there), min(there), max(there)
    shown = (round(x, digits) + 0.0 for x in (mean, low, high))  # + 0.0: no "-0.00"
    return Seeds(*shown, len(there), len(numbers), digits)


def trained(rows: list[dict], key: str) -> dict[str, Seeds]:
    """What has a seed was trained; the start and best-of-n have none."""
    found = {
        method: seeds_of([value(row, key) for row in runs], DIGITS.get(key, 3))
        for method, runs in by_method(rows).items()
        if all(row.get("seed") is not None for row in runs)
    }
    return {method: seeds for method, seeds in found.items() if seeds}


def untrained(rows: list[dict], key: str) -> dict[str, dict]:
    methods = by_method(rows).items()
    only = {method: runs[0] for method, runs in methods if runs[0].get("seed") is None}
    return {method: row for method, row in only.items() if value(row, key) is not None}


def interval(row: dict, key: str) -> str:
    """One run's number with the evaluation's 95 % interval, where there is one."""
    digits = DIGITS.get(key, 3)
    found = [value(row, key, part) for part in ("value", "low", "high")]
    mean, *ends = ("-" if x is None else f"{round(x, digits) + 0.0:,.{digits}f}" for x in found)
    return mean if "-" in ends else f"{mean} ({ends[0]} to {ends[1]})"


# -- tables


def table(rows: list[dict]) -> str:
    """A line a method, at its default strength."""
    methods = by_method(rows)
    keys = [
        c for c in COLUMNS if any(value(r, c[1]) is not None for x in methods.values() for r in x)
    ]
    lines = [["method", "", *(heading for heading, _, _ in keys)]]
    for method, runs in methods.items():
        count = len(runs)
        seeds = f"{count} seed{'s' * (count > 1)}" if runs[0].get("seed") is not None else ""
        cells = [seeds_of([value(row, key) for row in runs], digits) for _, key, digits in keys]
        lines.append([method, seeds, *(cell.shown(seeds=False) if cell else "-" for cell in cells)])
    return markdown(lines)


def sweeps(rows: list[dict]) -> str:
    """A line a run, with the evaluation's own interval: there is one seed of most. "" for none."""
    groups = swept(rows)
    keys = [c for c in COLUMNS if c[1].split("/")[0] in ("sampled", "greedy")]
    keys = [c for c in keys if any(value(r, c[1]) is not None for x in groups.values() for r in x)]
    lines = [["method", "strength", "seed", *(heading for heading, _, _ in keys)]]
    for (method, seed, _), runs in groups.items():
        for row in runs:
            default = "" if row.get("default") is False else " (default)"
            cells = [interval(row, key) for _, key, _ in keys]
            lines.append([method, at(row) + default, "-" if seed is None else str(seed), *cells])
    return markdown(lines) if groups else ""


def at(row: dict) -> str:
    return f"{row.get('knob') or 'strength'}={row['strength']:g}"


def joined(names: Iterable[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last


def markdown(lines: list[list[str]]) -> str:
    lines = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def sentences(rows: list[dict]) -> list[str]:
    """What the rows say, in words."""
    import study_sentences  # which reads rows as this file does

    return study_sentences.all_of(rows)


# -- the report


def write(folder: Path, rows: list[dict], about: dict) -> list[Path]:
    """README.md and its pictures. `about` may have a `title`, `text` (Markdown, what was asked and
    how it was measured) and `command` (what makes it again); all else is listed as it is. The
    report comes last: what it links is there.
    """
    import study_pictures  # which reads rows as this file does

    folder.mkdir(parents=True, exist_ok=True)
    pictures = study_pictures.save(folder, rows)
    text = [f"# {about.get('title', folder.name)}\n"]
    if about.get("text"):
        text += [f"{about['text'].strip()}\n"]
    if about.get("command"):
        text += [f"```\n{about['command'].strip()}\n```\n"]
    if told := [key for key in about if key not in ("title", "text", "command")]:
        text += ["".join(f"- {key}: {about[key]}\n" for key in told)]
    text += [f"{where(rows)}\n"]
    text += [
        'Mean over seeds; in brackets the smallest and the largest seed. "-": not measured. The '
        "start and what needs no training have no seeds.\n",
        table(rows),
    ]
    if strengths := sweeps(rows):
        text += ["## Strengths\n"]
        text += ["One run a line; in brackets the evaluation's 95 % interval.\n", strengths]
    if said := sentences(rows):
        text += ["## What the numbers say\n", "Each sentence is made from the rows by study.py.\n"]
        text += ["".join(f"- {sentence}\n" for sentence in said)]
    for path, caption in pictures.items():
        text += [f"![{caption.split('. ')[0]}]({path.name})\n", f"{caption}\n"]
    if commands := [row["command"] for row in rows if row.get("command")]:
        text += ["## Runs\n", "```\n" + "\n".join(dict.fromkeys(commands)) + "\n```\n"]
    common.write_atomically(folder / "README.md", "\n".join(text))
    return [folder / "README.md", *pictures]


def where(rows: list[dict]) -> str:
    """Commit, machine, versions, dates: all that occur."""
    said = []
    for key, form in (
        ("commit", "commit {}"),
        ("hardware", "{}"),
        ("threads", "threads a run: {}"),
        ("jobs", "runs at once: {}"),
        ("date", "{}"),
    ):
        if found := sorted({str(row[key]) for row in rows if row.get(key) is not None}):
            said.append(form.format(joined(found)))
    packages: dict[str, set] = {}
    for row in rows:
        for package, version in (row.get("versions") or {}).items():
            packages.setdefault(package, set()).add(str(version))
    said += [f"{package} {joined(sorted(found))}" for package, found in sorted(packages.items())]
    answers = {value(row, "sampled/reward", "n") for row in rows} - {None}
    if len(answers) == 1:
        said.insert(0, f"reward on {answers.pop():,.0f} sampled answers each")
    trainings = sum(row.get("seed") is not None for row in rows)
    return f"{trainings} trained run{'s' * (trainings != 1)}; {', '.join(said)}." if said else ""
