"""Scores that other tools wrote: AlpacaEval's leaderboard.csv (win rates in percent), FastChat's
*_single.jsonl (1 to 10, without judgments that failed), comet-score's --to_json, and lm_eval's
results_*.json. Intervals: over the scores of items, or 1.96 standard errors that the tool wrote.
"""

import csv
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.estimates import Estimate, Table, as_json, mean

ALPACA_EVAL = {"win_rate": "standard_error", "length_controlled_winrate": "lc_standard_error"}


def read_scores(file: str) -> dict[str, dict[str, Estimate]]:  # model -> name -> estimate
    path, found, items = Path(file).expanduser(), defaultdict(dict), defaultdict(list)
    try:
        text = path.read_text("utf-8")
        if path.suffix == ".csv":
            for row in csv.DictReader(text.splitlines()):
                for name in [x for x in ALPACA_EVAL if row["win_rate"] and row.get(x)]:
                    score = with_error(row[name], row[ALPACA_EVAL[name]], row["n_total"])
                    found[row[""]][f"alpaca_eval/{name.removesuffix('_winrate')}"] = score
        elif path.suffix == ".jsonl":
            for row in map(json.loads, text.splitlines()):
                for name in ("score", f"turn_{row['turn']}") if row["score"] != -1 else ():
                    value = (row["score"], str(row["question_id"]))
                    items[row["model"], f"mt_bench/{name}"].append(value)
        elif "results" in (record := json.loads(text)):
            for task, numbers in record["results"].items():
                n = record.get("n-samples", {}).get(task, {}).get("effective")
                for key, value in numbers.items():
                    error = numbers.get(key.replace(",", "_stderr,"))
                    if "," in key and "_stderr," not in key:
                        name = f"{task}/{key.removesuffix(',none')}"
                        found[record["model_name"]][name] = with_error(value, error, n)
        else:
            for name, rows in record.items():
                values = [(row["COMET"], i) for i, row in enumerate(rows)]
                items[name.removesuffix("/hyp.txt"), "comet"] = values
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"--scores {file}: not of a tool that is known ({error!r})") from None
    for (model, name), values in items.items():
        found[model][name] = mean(*map(np.array, zip(*values, strict=True)))
    return found


def with_error(value: Any, error: Any, n: Any) -> Estimate:
    value, n = float(value), int(float(n or 0))
    if error in (None, "", "N/A") or not float(error):  # as in estimates.py
        return Estimate(value, n=n)
    return Estimate(value, value - 1.96 * float(error), value + 1.96 * float(error), n)


def collect(args: Any) -> tuple[Table, dict]:
    """The scores of --model: a table, and added to the record in --json."""
    model, old = Path(args.model).expanduser().resolve().name, Path(args.json or "").expanduser()
    table: Table = {}
    for file in args.scores:
        found = {Path(name).name: scores for name, scores in read_scores(file).items()}
        mine = found.get(model) or (len(found) == 1 and found.popitem()[1])
        if not mine:
            raise ValueError(f"--scores {file}: has {', '.join([*found][:9])}, not --model {model}")
        table |= {key: [score] for key, score in mine.items()}
    record = json.loads(old.read_text("utf-8")) if old.is_file() else {}
    return table, record | {"measured": record.get("measured", {}) | as_json(table)["measured"]}
