"""A study's report, made from its rows alone: a table and pictures."""

import json
import math
from pathlib import Path

ORDER = """start sft dpo ipo cpo orpo simpo slic kto pro listwise_dpo rrhf raft rso ppo nlpo rloo
grpo best-of""".split()
COLUMNS = {  # heading: key, digits
    "reward, sampled": ("sampled/reward", 3),
    "reward, greedy": ("greedy/reward", 3),
    "win rate against the start": ("sampled/win_rate", 3),
    "pairs ranked right, against the reference": ("ranking/reference_normalised", 3),
    "pairs ranked right, by the sum": ("ranking/sum", 3),
    "pairs ranked right, by the mean": ("ranking/mean", 3),
    "margin against the reference, nats": ("ranking/margin", 2),
    "KL from the start, nats per answer": ("sampled/kl", 2),
    "tokens per answer": ("sampled/length", 2),
    "tokens per greedy answer": ("greedy/length", 2),
    "answers that end": ("sampled/ended", 2),
    "seconds": ("seconds", 0),
    "CPU seconds": ("cpu_seconds", 0),
    "peak memory, GiB": ("peak_memory_gib", 2),
}


def read_rows(folder: Path) -> list[dict]:
    files = sorted((folder / "rows").glob("*.json"))
    return [json.loads(file.read_text(encoding="utf-8")) for file in files]


def value(row: dict, key: str, part: str = "value") -> float | None:
    """A number that was measured, or that the run cost. None if missing or not finite."""
    found = row["measured"].get(key) or {} if "/" in key else {"value": row.get(key)}
    if key == "sampled/kl" and (n := row.get("best_of")):  # Stiennon et al. 2020, appendix G.3
        found = {"value": math.log(n) - (n - 1) / n}
    number = found.get(part)
    return None if number is None or not math.isfinite(number) else float(number)


def groups(rows: list[dict]) -> dict[str, list[dict]]:
    """Runs that differ only in their seed: each method at its default strength, then its sweep."""

    def place(row: dict) -> tuple:
        rest = (row.get("strength") or 0, row.get("seed") or 0)
        method = row["method"].rstrip("0123456789").rstrip("-")  # best-of-16
        known = ORDER.index(method) if method in ORDER else len(ORDER)  # of another tool
        return known, not row["default"], row.get("best_of", 0), *rest

    found: dict[str, list[dict]] = {}
    for row in sorted(rows, key=place):
        sweep = "" if row["default"] else f", {row['knob']}={row['strength']:g}"
        found.setdefault(row["method"] + sweep, []).append(row)
    return found


def cell(runs: list[dict], key: str, digits: int) -> str:
    found = [x for run in runs if (x := value(run, key)) is not None]
    if not found:
        return "-"
    ends = (min(found), max(found))
    if len(runs) == 1:
        ends = (value(runs[0], key, "low"), value(runs[0], key, "high"))
    numbers = (math.fsum(found) / len(found), *ends)
    mean, low, high = ("" if x is None else f"{x:,.{digits}f}" for x in numbers)
    lost = f"; {len(found)} of {len(runs)} runs" if len(found) < len(runs) else ""
    return f"{mean} ({low} to {high}{lost})" if low else mean


def write(folder: Path, rows: list[dict], command: str) -> None:
    """README.md and its pictures. note.md, if there is one, is what a person has to say."""
    from evaluation import pictures

    facts, note = [], folder / "note.md"
    for key in ("commit", "date", "hardware", "torch", "transformers"):
        found = {(row | row.get("versions", {})).get(key) for row in rows} - {None}
        facts.append(f"{key} {', '.join(sorted(found))}")
    columns = {h: c for h, c in COLUMNS.items() if any(value(x, c[0]) is not None for x in rows)}
    measures = {name: None for row in rows for name in row.get("measures", ())}
    columns |= {name: (f"sampled/{name}", 3) for name in measures}
    lines = [["method", "runs", *columns], ["---"] * (2 + len(columns))]
    for label, runs in groups(rows).items():
        lines.append([label, str(len(runs)), *(cell(runs, *column) for column in columns.values())])
    text = [f"# Methods compared: {folder.name}\n"]
    text += [note.read_text(encoding="utf-8")] if note.is_file() else []
    text += [f"`{command}`; {'; '.join(facts)}.\n"]
    text += ["Mean over seeds (smallest to largest); of a single run its value (95 % interval).\n"]
    text += ["".join(f"| {' | '.join(line)} |\n" for line in lines)]
    for name, caption in pictures.save(folder, rows).items():
        text += [f"![{caption.split('.')[0]}]({name})\n\n{caption}\n"]
    (folder / "README.md").write_text("\n".join(text), encoding="utf-8")
