"""A study's report says what its rows say: tables, sentences and pictures from made-up rows."""

import copy
import itertools
import json
import math
import random
import re
import statistics
import struct
from pathlib import Path

import numpy as np
import pytest
from matplotlib.text import Text

import common
import study
import study_pictures

ALL = [m for m in study.ORDER if m != "start"]
TRUE = {  # method -> sampled, greedy, KL, tokens, seconds, GiB: about what they reach on `tiny`
    "sft": (0.352, 0.42, 0.6, 3.41, 61, 0.74),
    "dpo": (0.480, 0.536, 1.1, 3.79, 71, 0.81),
    "ipo": (0.470, 0.53, 1.0, 3.7, 71, 0.81),
    "cpo": (0.460, 0.526, 1.64, 3.93, 66, 0.8),
    "orpo": (0.44, 0.52, 1.2, 3.6, 66, 0.8),
    "simpo": (0.465, 0.514, 2.48, 4.01, 64, 0.8),
    "slic": (0.445, 0.531, 1.73, 4.2, 67, 0.8),
    "kto": (0.492, 0.533, 1.51, 3.9, 105, 0.8),
    "pro": (0.467, 0.528, 0.89, 3.54, 66, 0.83),
    "listwise_dpo": (0.478, 0.537, 1.3, 3.92, 81, 0.84),
    "rrhf": (0.458, 0.52, 1.4, 3.8, 70, 0.83),
    "raft": (0.47, 0.52, 1.2, 3.7, 120, 0.85),
    "rso": (0.497, 0.539, 1.78, 4.15, 117, 0.85),
    "ppo": (0.515, 0.542, 2.0, 4.05, 164, 1.31),
    "rloo": (0.505, 0.54, 1.7, 3.9, 130, 1.0),
    "grpo": (0.50, 0.54, 1.8, 3.95, 140, 1.0),
}


def of(x: float, around: float = 0.0) -> dict:
    return {"value": x, "low": x - around, "high": x + around, "n": 1024}


def make_row(method: str, seed: int | None = 0, **changes) -> dict:
    """A row of round numbers. A change of "sampled/reward" and the like is a value, or None."""
    row = {
        "name": f"{method}-s{seed}",
        "method": method,
        "seed": seed,
        "knob": "beta",
        "strength": 0.1,
        "default": True,
        "command": f"python {method}.py --seed {seed}",
        "commit": "abc1234",
        "date": "2026-11-27",
        "hardware": "x86_64, 2 cores",
        "versions": {"torch": "2.13.0+cpu"},
        "threads": 1,
        "jobs": 1,
        "steps": 300,
        "seconds": 70.0,
        "peak_memory_gib": 0.8,
        "measured": {
            "sampled/reward": of(0.45, 0.02),
            "greedy/reward": of(0.5, 0.02),
            "sampled/win_rate": of(0.6, 0.02),
            "sampled/kl": of(1.0, 0.05),
            "sampled/length": of(3.5, 0.05),
        },
        "by_length": [],
        "curve": [],
    }
    for key, x in changes.items():
        if "/" not in key:
            row[key] = x
        elif x is None:
            row["measured"].pop(key, None)
        else:
            around = 0.05 if key == "sampled/kl" else 0.02
            row["measured"][key] = of(x, around)
    return row


def start_row(**changes) -> dict:
    changes = {"sampled/reward": 0.319, "greedy/reward": 0.367, "sampled/kl": 0.0} | changes
    changes = {"sampled/win_rate": 0.5, "sampled/length": 3.33} | changes
    costs = {"seconds": None, "peak_memory_gib": None, "command": None, "strength": None}
    return make_row("start", None, name="start", knob=None, **costs, **changes)


def make_rows(
    methods=tuple(TRUE), seeds=(0, 1, 2), swept=("dpo", "simpo", "kto", "ppo"), seed: int = 0
) -> list[dict]:
    """A study as it may come out. The same `seed` gives the same rows."""
    rng, rows = random.Random(seed), [start_row()]
    rows[0]["by_length"] = by_length(0.319, 3.33, rng)
    rows.append(
        make_row("best-of-4", None, name="best-of-4", strength=None, **{"sampled/reward": 0.455})
        | {"seconds": None, "peak_memory_gib": None}
    )
    rows[1]["measured"].pop("sampled/kl")
    for method in methods:
        for s in seeds:
            rows.append(likely_row(method, s, 1.0, rng))
        for times in (0.2, 0.5, 2, 5) if method in swept else ():
            rows.append(likely_row(method, seeds[0], times, rng))
    return rows


def likely_row(method: str, seed: int, times: float, rng: random.Random) -> dict:
    """`times` the default strength: weaker holds go farther, and may go too far."""
    reward, greedy, kl, length, seconds, memory = TRUE.get(method, TRUE["dpo"])
    kl = kl * times**-0.7 * rng.gauss(1, 0.06)
    gone = math.sqrt(kl / 1.3)
    shift = 0.08 * (math.tanh(gone) - math.tanh(1)) - 0.035 * max(0, gone - 1.5) ** 2
    far = 0 if times == 1 else shift
    reward, greedy = reward + far + rng.gauss(0, 0.008), greedy + far + rng.gauss(0, 0.006)
    length += rng.gauss(0, 0.07) + 0.3 * (times**-0.5 - 1)
    steps = 30 if method == "ppo" else 300
    row = make_row(
        method,
        seed,
        strength=0.1 * times,
        default=times == 1,
        name=f"{method}-beta{0.1 * times:g}-s{seed}",
        command=f"python {method}.py --seed {seed} --beta {0.1 * times:g}",
        steps=steps,
        seconds=seconds * rng.gauss(1, 0.03),
        peak_memory_gib=memory + rng.gauss(0, 0.01),
        **{
            "sampled/reward": reward,
            "greedy/reward": greedy,
            "sampled/win_rate": 0.5 + 0.7 * (reward - 0.319),
            "sampled/win_rate/length_controlled": 0.5 + 0.65 * (reward - 0.319),
            "ranking/sum": 0.55 + rng.gauss(0, 0.01),
            "ranking/reference_normalised": 0.6 + 0.4 * (reward - 0.4) + rng.gauss(0, 0.01),
            "sampled/kl": kl,
            "sampled/length": length,
        },
    )
    row["by_length"] = by_length(reward, length, rng)
    for i in range(1, 7):
        share = (i / 6) ** 0.6
        row["curve"].append(
            {
                "step": steps * i // 6,
                "reward": 0.319 + (reward - 0.319) * share + rng.gauss(0, 0.012),
                "kl": kl * (i / 6),
                "length": 3.33 + (length - 3.33) * share,
            }
        )
    return row


def by_length(reward: float, length: float, rng: random.Random) -> list[dict]:
    weights = {n: math.exp(-(((n - length) / 1.4) ** 2)) for n in range(1, 10)}
    counts = {n: round(1024 * w / sum(weights.values())) for n, w in weights.items()}
    return [
        {"length": n, "n": c, "reward": reward + 0.05 * math.sin(n) + rng.gauss(0, 0.01)}
        for n, c in counts.items()
        if c
    ]


def said(rows: list[dict], *phrases: str) -> str:
    """The one sentence that has all of the phrases."""
    found = [s for s in study.sentences(rows) if all(phrase in s for phrase in phrases)]
    assert len(found) == 1, (phrases, found)
    return found[0]


def unsaid(rows: list[dict], phrase: str) -> bool:
    return not any(phrase in s for s in study.sentences(rows))


def cells(table: str) -> list[dict[str, str]]:
    lines = [[x.strip() for x in line.strip("| ").split("|")] for line in table.splitlines()]
    assert len({len(line) for line in lines}) == 1
    return [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]


def of_method(rows: list[dict], method: str, key: str) -> list[float]:
    """As in the rows, by another way than study.py's."""
    runs = [r for r in rows if r["method"] == method and r["default"]]
    return [r["measured"][key]["value"] if key in r["measured"] else r[key] for r in runs]


def seeds(method: str, numbers, key: str = "sampled/reward", **changes) -> list[dict]:
    return [make_row(method, i, **{key: x}, **changes) for i, x in enumerate(numbers)]


# -- rows


def test_rows_come_back_in_the_order_of_their_names(tmp_path):
    rows = make_rows(["dpo"], swept=())
    (tmp_path / "rows").mkdir()
    for row in rows:
        (tmp_path / "rows" / f"{row['name']}.json").write_text(json.dumps(row))
    (tmp_path / "rows" / ".dpo.json.tmp").write_text("{")  # a run was just killed
    assert study.read_rows(tmp_path) == sorted(rows, key=lambda row: row["name"])
    assert study.read_rows(tmp_path / "rows") == []


@pytest.mark.parametrize(
    "change",
    [
        "{",
        "[]",
        b"\xff\xfe",
        {"method": None},
        {"measured": []},
        {"measured": {"sampled/reward": 0.4}},
        {"measured": {"sampled/reward": {"value": "0.4"}}},
        {"seconds": "fast"},
        {"curve": [{"reward": 0.1}]},
        {"by_length": {"3": 0.4}},
    ],
)
def test_a_file_that_is_no_row_is_named(tmp_path, change):
    (tmp_path / "rows").mkdir()
    path = tmp_path / "rows" / "odd.json"
    good = make_row("dpo") | {"measured": {"sampled/reward": of(0.4), "ranking/sum": None}}
    path.write_text(json.dumps(good))
    assert study.read_rows(tmp_path) == [good]
    if isinstance(change, dict):
        change = json.dumps(make_row("dpo") | change)
    path.write_bytes(change if isinstance(change, bytes) else change.encode())
    with pytest.raises(common.UserError, match=re.escape(str(path))):
        study.read_rows(tmp_path)


# -- tables


def test_the_table_has_mean_and_range_of_the_seeds():
    rows = make_rows()
    random.Random(1).shuffle(rows)
    lines = {line["method"]: line for line in cells(study.table(rows))}
    assert list(lines) == [*study.ORDER, "best-of-4"]  # unknown ones after
    for method in TRUE:
        for heading, key, digits in study.COLUMNS:
            x = of_method(rows, method, key)
            mean, low, high = (f"{f(x):.{digits}f}" for f in (statistics.fmean, min, max))
            assert len(x) == 3 and lines[method][heading] == f"{mean} ({low} to {high})"
        assert lines[method][""] == "3 seeds"
    assert lines["start"]["reward, sampled"] == "0.319" and lines["start"]["seconds"] == "-"
    assert lines["best-of-4"]["KL from the start, nats an answer"] == "-"


def test_one_seed_has_no_range_and_a_lost_number_is_counted():
    rows = [*seeds("dpo", [0.41, float("nan"), 0.45]), make_row("kto", **{"sampled/reward": 0.5})]
    dpo, kto = cells(study.table(rows))
    assert (kto[""], kto["reward, sampled"]) == ("1 seed", "0.500")
    assert (dpo[""], dpo["reward, sampled"]) == ("3 seeds", "0.430 (0.410 to 0.450; 2 of 3 seeds)")
    assert "dpo 1" in said(rows, "Runs without a number for reward, sampled")
    assert unsaid(rows, "Runs without a number for reward, greedy")


def test_a_column_without_numbers_is_left_out():
    rows = [make_row("dpo", s, **{"sampled/reward": None, "greedy/reward": None}) for s in (0, 1)]
    assert "reward" not in study.table(rows) and "win rate" in study.table(rows)


def test_sweeps_have_each_strength_of_the_seed_with_the_default_among_them():
    rows = make_rows(["dpo", "kto"], swept=("dpo",))
    lines = cells(study.sweeps(rows))
    found = sorted(
        (r for r in rows if r["method"] == "dpo" and r["seed"] == 0), key=lambda r: r["strength"]
    )
    assert [line["strength"] for line in lines] == [
        "beta=0.02",
        "beta=0.05",
        "beta=0.1 (default)",
        "beta=0.2",
        "beta=0.5",
    ]
    for line, row in zip(lines, found, strict=True):
        kl = row["measured"]["sampled/kl"]
        shown = f"{kl['value']:.2f} ({kl['low']:.2f} to {kl['high']:.2f})"
        assert line["KL from the start, nats an answer"] == shown
        reward = row["measured"]["greedy/reward"]
        shown = f"{reward['value']:.3f} ({reward['low']:.3f} to {reward['high']:.3f})"
        assert line["reward, greedy"] == shown
    assert study.sweeps(make_rows(["dpo", "kto"], swept=())) == ""


# -- sentences: who is best


def test_the_best_is_named_with_what_it_is_not_told_apart_from():
    rows = [
        *seeds("dpo", [0.47, 0.48, 0.49]),
        *seeds("kto", [0.488, 0.50, 0.505]),
        *seeds("ppo", [0.40, 0.41, 0.42]),
    ]
    text = said(rows, "The highest sampled reward")
    assert "that of kto 0.498 (0.488 to 0.505; 3 seeds); next dpo 0.480 (0.470 to 0.490; 3" in text
    assert text.endswith("not told apart from those of dpo 0.480 (0.470 to 0.490; 3 seeds).")
    apart = [*seeds("kto", [0.491, 0.50, 0.505]), *rows[:3], *rows[6:]]
    assert said(apart, "The highest sampled").endswith("above all those of the other 2 methods.")
    # The next one is told apart, a third with a wide range is not.
    wide = [*seeds("kto", [0.50, 0.51]), *seeds("dpo", [0.48, 0.49]), *seeds("ppo", [0.3, 0.502])]
    text = said(wide, "The highest sampled")
    assert "next dpo" in text and text.endswith("those of ppo 0.401 (0.300 to 0.502; 2 seeds).")


def test_of_equals_none_is_best():
    rows = [*seeds("dpo", [0.48, 0.49]), *seeds("kto", [0.4849, 0.4852]), *seeds("ppo", [0.3, 0.4])]
    assert said(rows, "The highest sampled") == (  # 0.48505 is shown as 0.485
        "The highest sampled reward is shared by dpo 0.485 (0.480 to 0.490) and kto 0.485 "
        "(0.485 to 0.485), 2 seeds each."
    )


def test_one_seed_does_not_tell_methods_apart():
    rows = [make_row("dpo", **{"sampled/reward": 0.4}), make_row("kto", **{"sampled/reward": 0.5})]
    text = said(rows, "The highest sampled reward", "kto 0.500 (1 seed)", "dpo 0.400 (1 seed)")
    assert text.endswith("One seed cannot tell how much of that is chance.")
    assert unsaid(rows, "lie above") and unsaid(rows, "told apart")
    assert unsaid(rows, "by chance in")


def test_against_dpo_each_method_stands_where_its_seeds_do():
    rows = [
        *seeds("dpo", [0.47, 0.48, 0.49]),
        *seeds("kto", [0.491, 0.50, 0.505]),
        *seeds("slic", [0.44, 0.45, 0.469]),
        *seeds("pro", [0.40, 0.43, 0.47]),  # touches
        *seeds("ppo", [0.6]),
    ]
    text = said(rows, "Against dpo's sampled reward, 0.480 (0.470 to 0.490; 3 seeds)")
    above, below, near = re.fullmatch(
        r".*: all seeds lie above all of dpo's for (.*); all seeds lie below all of dpo's for "
        r"(.*); not told apart from dpo: (.*)\.",
        text,
    ).groups()
    assert above == "kto 0.499 (0.491 to 0.505; 3 seeds)"
    assert below == "slic 0.453 (0.440 to 0.469; 3 seeds)"
    assert near == "pro 0.433 (0.400 to 0.470; 3 seeds)"
    assert "ppo" not in text  # one seed says nothing
    assert unsaid(rows[3:], "Against dpo") and unsaid(rows[:3], "Against dpo")


@pytest.mark.parametrize("seed", range(25))
def test_whatever_the_numbers_told_apart_is_true(seed):
    rng = random.Random(seed)
    rows = make_rows(rng.sample(ALL, 7) + ["dpo"] * (seed % 2), seeds=(0, 1, 2)[: 2 + seed % 2])
    for key, name in (("sampled/reward", "sampled reward"), ("greedy/reward", "greedy reward")):
        x = {m: [round(v, 3) for v in of_method(rows, m, key)] for m in {r["method"] for r in rows}}
        mine = {m: x[m] for m in TRUE if m in x}
        (text,) = [s for s in study.sentences(rows) if f"The highest {name}" in s]
        mean = {m: round(statistics.fmean(of_method(rows, m, key)), 3) for m in mine}
        first = [m for m in mine if mean[m] == max(mean.values())]
        named = re.sub(r"\(.*?\)|[.0-9,;]", "", text)
        head, *tail = re.split(r"Its seeds|All its seeds", named)
        assert set(first) <= set(head.split())
        if tail and "not told apart" in text:
            top = mine[first[0]]
            near = {m for m in mine if m not in first and max(mine[m]) >= min(top)}
            assert near == set(tail[0].split()) & set(mine)
        elif tail:
            assert all(min(mine[first[0]]) > max(mine[m]) for m in mine if m not in first)
        if "dpo" not in mine:
            continue
        (text,) = [s for s in study.sentences(rows) if f"Against dpo's {name}" in s]
        places = {"above": set(), "below": set(), "apart": set()}
        for part in re.sub(r"\(.*?\)|[.0-9]", "", text).split(": ", 1)[1].split(";"):
            (where,) = [w for w in places if w in part.split("dpo")[0].split()]
            places[where] = set(part.replace(",", " ").split()) & set(mine) - {"dpo"}
        dpo = mine.pop("dpo")
        assert places["above"] == {m for m in mine if min(mine[m]) > max(dpo)}
        assert places["below"] == {m for m in mine if max(mine[m]) < min(dpo)}
        assert places["apart"] == set(mine) - places["above"] - places["below"]


@pytest.mark.parametrize("a,b", [(2, 2), (2, 3), (3, 3), (4, 3)])
def test_how_often_chance_tells_two_apart(a, b):
    orders = list(itertools.combinations(range(a + b), a))  # the places of the first one's seeds
    apart = sum(order in (tuple(range(a)), tuple(range(b, a + b))) for order in orders)
    rows = [*seeds("dpo", [0.4] * a), *seeds("kto", [0.5] * b), *seeds("ppo", [0.5] * 4)]
    text = said(rows, "of the other by chance", f"up to 1 case of {len(orders) / apart:g};")
    assert f"with {a} seeds each" in text if a == b else f"with {min(a, b)} and {max(a, b)}" in text
    assert "3 methods" in text


# -- sentences: against the start and the baselines


def test_no_better_than_the_start_is_said_plainly():
    rows = [
        start_row(),  # 0.319, up to 0.339
        *seeds("dpo", [0.33, 0.36]),
        *seeds("kto", [0.31, 0.328]),  # 0.319 on the mean
        *seeds("slic", [0.29, 0.30]),
        *seeds("ppo", [0.45, 0.47]),
    ]
    text = said(rows, "2 of 4 trained methods end above the start's sampled reward of 0.319 (0.299")
    assert "+0.026 by dpo 0.345 (0.330 to 0.360; 2 seeds)" in text
    assert "to +0.141 by ppo 0.460 (0.450 to 0.470; 2 seeds)." in text
    assert said(rows, "By sampled reward at least one seed lies within the start's").endswith(
        "or below for dpo 0.345 (0.330 to 0.360; 2 seeds)."
    )
    assert said(rows, "No better than the start's sampled reward").endswith(
        ": slic 0.295 (0.290 to 0.300) and kto 0.319 (0.310 to 0.328), 2 seeds each."
    )
    assert unsaid(rows[1:], "than the start") and unsaid(rows[:1] + rows[-2:], "No better than")


def test_baselines_are_not_passed_over():
    rows = [
        *seeds("sft", [0.35, 0.37]),
        *seeds("dpo", [0.45, 0.47]),
        *seeds("slic", [0.34, 0.36]),
        make_row("best-of-4", None, **{"sampled/reward": 0.46}),
    ]
    by = "By sampled reward no better than"
    text = said(rows, f"{by} best-of-4 without training, 0.460 (0.440 to 0.480), on the mean:")
    assert "sft 0.360" in text and "dpo 0.460" in text and "slic 0.350" in text  # a tie is no win
    assert said(rows, f"{by} sft 0.360 (0.350 to 0.370; 2 seeds), on the mean:").endswith(
        ": slic 0.350 (0.340 to 0.360; 2 seeds)."
    )
    better = said(rows[:4], "By sampled reward better than sft", "all of 1 trained methods")
    assert better.endswith("the least dpo 0.460 (0.450 to 0.470; 2 seeds).")
    assert unsaid(rows[:2], "than sft") and unsaid(rows[:4], "best-of-4")


# -- sentences: what it took


def test_reward_a_nat_is_of_each_run():
    rows = [start_row(**{"sampled/reward": 0.3})]
    for method, pairs in {
        "dpo": [(0.5, 1.0), (0.4, 2.0)],
        "kto": [(0.4, 4.0), (0.9, 0.004)],
    }.items():
        for i, (reward, kl) in enumerate(pairs):
            rows.append(make_row(method, i, **{"sampled/reward": reward, "sampled/kl": kl}))
    text = said(rows, "gained a nat of KL")
    assert "most by dpo 0.125 (0.050 to 0.200; 2 seeds)" in text  # not 0.15 / 1.5
    assert "least by kto 0.025 (1 of 2 seeds)" in text  # a KL of 0.00 divides nothing
    assert unsaid(rows[1:], "a nat of KL") and unsaid(rows[:3], "a nat of KL")


def test_who_writes_longer_answers_and_by_how_much():
    rows = [start_row(), *seeds("dpo", [3.4, 3.6], "sampled/length")]
    rows += [*seeds("kto", [3.1, 3.3], "sampled/length"), *seeds("ppo", [4, 4.2], "sampled/length")]
    assert said(rows, "longer answers") == (
        "2 of 3 trained methods write longer answers than the start's 3.33 tokens on the mean: "
        "-0.13 by kto 3.20 (3.10 to 3.30; 2 seeds) to +0.77 by ppo 4.10 (4.00 to 4.20; 2 seeds)."
    )
    assert unsaid(rows[1:], "longer answers")


def test_correlations_are_those_of_the_rows():
    rows = make_rows(["dpo", "kto", "slic", "pro", "ppo"])
    x, y = [], []
    for method in ("dpo", "kto", "slic", "pro", "ppo"):  # other strengths do not count
        x += of_method(rows, method, "sampled/length")
        y += of_method(rows, method, "sampled/reward")
    r = statistics.correlation(x, y)
    text = said(rows, f"correlate at r = {r:+.2f} over 15 runs of 5 methods")
    assert "fewer than 15 independent points" in text
    assert unsaid(make_rows(["dpo", "kto"]), "correlate")
    same = [make_row(m, s, **{"sampled/reward": 0.3 + s / 7}) for m in TRUE for s in (0, 1)]
    assert unsaid(same, "correlate")  # all answers equally long


def test_spearman_and_its_random_orders():
    reward = {"dpo": 0.48, "kto": 0.49, "slic": 0.44, "pro": 0.46, "ppo": 0.52}
    ranking = {"dpo": 0.70, "kto": 0.66, "slic": 0.61, "pro": 0.68, "ppo": 0.65}
    rows = [
        make_row(
            m, s, **{"sampled/reward": reward[m], "ranking/sum": ranking[m] + s / 1000 - 0.001}
        )
        for m in reward
        for s in range(3)
    ]
    places = {m: sorted(reward.values()).index(reward[m]) for m in reward}
    by_pairs = {m: sorted(ranking.values()).index(ranking[m]) for m in reward}

    def rho(order) -> float:
        d = sum((places[m] - i) ** 2 for m, i in zip(reward, order, strict=True))
        return 1 - 6 * d / (5 * 24)  # for five without ties

    real = rho([by_pairs[m] for m in reward])
    text = said(rows, "by the sum of log-probs", f"Spearman's rho {real:+.2f} over 5 methods")
    far = [abs(rho(order)) >= abs(real) - 1e-9 for order in itertools.permutations(range(5))]
    share = float(re.search(r"([\d,]+) of 10,000", text)[1].replace(",", "")) / 10_000
    assert abs(share - statistics.fmean(far)) < 0.02
    assert text.endswith("dpo 0.700 (0.699 to 0.701; 3 seeds); place by reward: 3.")
    assert unsaid(rows, "against the reference") and unsaid(rows[:9], "Spearman")
    # Equals share a rank, and the one who ranks best is all who do.
    for row in rows:
        if row["method"] == "pro":
            row["measured"]["ranking/sum"] = of(0.70)
    rho = statistics.correlation([4.5, 3, 1, 4.5, 2], [3, 4, 1, 2, 5])
    text = said(rows, f"Spearman's rho {rho:+.2f} over 5 methods")
    assert text.endswith("and pro 0.700 (0.700 to 0.700), 3 seeds each; place by reward: 3 and 4.")


def test_a_win_rate_at_equal_length():
    key = "sampled/win_rate/length_controlled"
    rows = [make_row("dpo", **{key: 0.59}), make_row("kto", **{key: 0.62}), make_row("ppo")]
    text = said(rows, "Holding length equal moves the win rate by up to 0.020: kto's is 0.620")
    assert text.endswith("0.600 (1 seed) before.")
    assert said([make_row("dpo", **{key: 0.6})], "moves no method's")
    assert unsaid(rows[2:], "Holding length equal")


def sweep(*points: tuple[float, float, float], default: float = 0.1) -> list[dict]:
    """(strength, KL, reward), each reward +- 0.02."""
    return [
        make_row("dpo", strength=s, default=s == default, **{"sampled/kl": k, "sampled/reward": r})
        for s, k, r in points
    ]


def test_over_optimisation_is_said_where_the_intervals_allow():
    text = said(sweep((0.2, 0.5, 0.44), (0.1, 1, 0.48), (0.05, 3, 0.5), (0.01, 9, 0.4)), "KL rises")
    assert "dpo at seed 0: from beta=0.05 to beta=0.01 the KL rises from 3.00 to 9.00" in text
    assert "falls from 0.500 (0.480 to 0.520) to 0.400 (0.380 to 0.420): over-optim" in text
    within = sweep((0.2, 0.5, 0.44), (0.1, 1, 0.48), (0.01, 9, 0.45))
    assert said(within, "KL rises").endswith("the 95 % intervals overlap: it may be chance.")
    assert unsaid(within, "over-optimisation") and unsaid(within, "the highest KL has")
    rising = sweep((0.2, 0.5, 0.44), (0.1, 1, 0.48), (0.01, 9, 0.48))  # the highest, if shared
    assert said(rising, "highest KL has the highest sampled reward too: dpo (beta=0.01: 0.480")
    assert unsaid(rising, "KL rises")
    bare = copy.deepcopy(sweep((0.1, 1, 0.48), (0.01, 9, 0.3)))
    bare[1]["measured"]["sampled/reward"] = {"value": 0.3}
    assert said(bare, "KL rises").endswith("to 0.300: it may be chance.")
    assert unsaid(make_rows(["dpo"], swept=()), "KL rises")
    # Seeds are no strengths: three runs at the default are no sweep.
    assert unsaid(seeds("dpo", [0.5, 0.3, 0.2]), "KL rises")


def test_a_default_that_another_strength_beats():
    text = said(sweep((0.2, 0.5, 0.44), (0.1, 1, 0.48), (0.05, 3, 0.5)), "Another strength")
    assert text.endswith(
        "dpo (beta=0.05: 0.500 (0.480 to 0.520), default beta=0.1: 0.480 (0.460 to 0.500))."
    )
    assert unsaid(sweep((0.1, 1, 0.48), (0.05, 3, 0.4803)), "Another strength")
    assert unsaid(sweep((0.2, 1, 0.48), (0.05, 3, 0.5)), "Another strength")  # no default


def test_cost_names_all_who_share_it():
    rows = [
        make_row("dpo", seconds=70.2),
        make_row("kto", seconds=69.9),
        make_row("ppo", seconds=160),
    ]
    assert said(rows, "Time of a run") == (
        "Time of a run, in seconds: least dpo 70 and kto 70, 1 seed each; most ppo 160 (1 seed)."
    )
    assert unsaid(rows, "Memory of a run")  # all the same
    rows[0]["threads"] = 2
    assert said(rows, "Time of a run").endswith("the same machine, threads and neighbours.")
    rows[0]["jobs"] = 2  # some run had a neighbour, which takes of its time
    assert unsaid(rows, "Time of a run")


GONE = {
    "sampled/reward": ("sampled reward", "Another strength", "KL rises", "a nat of KL"),
    "greedy/reward": ("greedy reward",),
    "sampled/kl": ("a nat of KL", "KL rises", "highest KL"),
    "sampled/length": ("longer answers", "correlate"),
    "ranking/sum": ("by the sum of log-probs",),
    "ranking/reference_normalised": ("Ranking held-out pairs (against the reference)",),
    "sampled/win_rate/length_controlled": ("Holding length equal",),
    "seconds": ("Time of a run",),
    "peak_memory_gib": ("Memory of a run",),
}


@pytest.mark.parametrize("key", GONE)
def test_what_was_not_measured_is_not_said(key):
    rows = make_rows(seed=1)
    for phrase in GONE[key]:
        assert not unsaid(rows, phrase), phrase
    for row in rows:
        row["measured"].pop(key, None)
        row.pop(key, None)
    for phrase in GONE[key]:
        assert unsaid(rows, phrase), phrase


def test_without_a_true_reward_the_win_rate_speaks():
    rows = make_rows()
    assert unsaid(rows, "The highest win rate")
    for row in rows:
        for key in ("sampled/reward", "greedy/reward"):
            row["measured"].pop(key)
    assert said(rows, "The highest win rate against the start is that of")
    assert said([r for r in rows if r["method"] != "start"], "above the start's win rate", "0.500")


@pytest.mark.parametrize("seed", range(24))
def test_any_rows_with_holes_are_told(seed):
    rng = random.Random(seed)
    rows = make_rows(rng.sample(ALL, rng.randint(1, 6)), range(rng.randint(1, 3)), seed=seed)
    rows = rng.sample(rows, rng.randint(0, len(rows)))
    for row in rows:
        for key in list(row["measured"]):
            hole = rng.random()
            if hole < 0.15:
                row["measured"][key] = rng.choice([None, {"value": None}, of(float("nan")), {}])
            elif hole < 0.3:
                del row["measured"][key]
        for key in ("seconds", "peak_memory_gib", "strength", "command", "curve", "steps", "knob"):
            if rng.random() < 0.2:
                row[key] = None
    text = "\n".join([study.table(rows), study.sweeps(rows), *study.sentences(rows)])
    assert not re.search(r"nan|inf\b|None|-0\.00\b", text), text
    list(FIGURES.values())[seed % 3](rows)


# -- pictures

FIGURES = {
    "frontier": study_pictures.frontier_figure,
    "length": study_pictures.length_figure,
    "curves": study_pictures.curves_figure,
}
TEN = "sft dpo cpo simpo slic kto pro listwise_dpo rso ppo".split()


def by_name(figure) -> dict:
    """Method -> its labelled lines."""
    found: dict = {}
    for axis in figure.axes:
        for line in axis.lines:
            if not line.get_label().startswith("_"):
                found.setdefault(line.get_label(), []).append(line)
    return found


def boxes(axis) -> dict[str, tuple]:
    """Without the line that leads to a name's point."""
    renderer = axis.figure.canvas.get_renderer()
    names = [text for text in axis.texts if text.get_gid() == "name"]
    assert len({text.get_text() for text in names}) == len(names)
    return {text.get_text(): Text.get_window_extent(text, renderer) for text in names}


@pytest.fixture(scope="module", params=["ten", "all"])
def rows(request):
    return make_rows(TEN) if request.param == "ten" else make_rows()


@pytest.mark.parametrize("name", FIGURES)
def test_each_method_has_its_line_and_name(rows, name):
    figure = FIGURES[name](rows)
    found, methods = by_name(figure), {row["method"] for row in rows} & set(TRUE)
    assert methods <= set(found)
    looks = set()
    for method in methods:
        panels = 2 if name == "length" else 1  # runs, and lengths
        assert len(found[method]) == panels, method
        line = found[method][-1]
        looks.add((line.get_color(), line.get_linestyle(), line.get_marker()))
    assert len(looks) == len(methods)
    assert len({look[1:] for look in looks}) == len(methods)  # in black and white too
    figure.draw_without_rendering()
    if name == "curves":
        assert methods == {axis.get_title() for axis in figure.axes if axis.lines}
        return
    for axis in figure.axes:
        named = {line.get_label() for line in axis.lines if line.get_label()[0] != "_"}
        names = boxes(axis)
        assert named <= set(names)
        for box in names.values():
            inside = axis.get_window_extent()
            assert inside.x0 <= box.x0 and box.x1 <= inside.x1 and inside.y0 <= box.y0
            assert box.y1 <= inside.y1
        for a, b in itertools.combinations(names, 2):
            assert not names[a].overlaps(names[b]), (a, b)


def test_names_keep_apart_where_all_points_are_one():
    rows = [make_row(method) for method in TRUE]  # 16 names for one place
    figure = FIGURES["frontier"](rows)
    figure.draw_without_rendering()
    for axis in figure.axes:
        for (a, x), (b, y) in itertools.combinations(boxes(axis).items(), 2):
            assert not x.overlaps(y), (a, b)


def test_the_frontier_shows_the_rows():
    rows = make_rows(TEN, swept=("dpo",))
    found = by_name(FIGURES["frontier"](rows))
    points = [
        (r["measured"]["sampled/kl"]["value"], r["measured"]["sampled/reward"]["value"])
        for r in rows
        if r["method"] == "dpo" and r["seed"] == 0
    ]
    assert len(points) == 5 and np.allclose(found["dpo"][0].get_xydata(), sorted(points))
    way = found["kto"][0].get_xydata()  # start, five steps before the last, the mean of the seeds
    keys = ("sampled/kl", "sampled/reward")
    assert np.allclose(way[0], [0, 0.319]) and len(way) == 7
    assert np.allclose(way[-1], [statistics.fmean(of_method(rows, "kto", k)) for k in keys])
    curves = [r["curve"][2] for r in rows if r["method"] == "kto"]
    assert np.allclose(way[3], [statistics.fmean(c[k] for c in curves) for k in ("kl", "reward")])
    (bar,) = {tuple(line.get_ydata()) for line in found["best-of-4"]}  # no KL: a line across
    assert bar == (0.455, 0.455)
    assert np.allclose(found["start"][0].get_xydata(), [[0, 0.319]])


def test_curves_are_means_over_seeds_by_share_of_the_steps():
    rows = make_rows(["dpo", "ppo"], swept=())
    found = by_name(FIGURES["curves"](rows))
    for method in ("dpo", "ppo"):  # 300 steps, and 30
        x, y = found[method][0].get_data()
        assert np.allclose(x, np.arange(1, 7) / 6)
        curves = [[p["reward"] for p in r["curve"]] for r in rows if r["method"] == method]
        assert np.allclose(y, np.mean(curves, axis=0))


def test_reward_by_length_weighs_answers_and_leaves_few_out():
    rows = [make_row("dpo", 0), make_row("dpo", 1)]
    rows[0]["by_length"] = [
        {"length": 2, "n": 30, "reward": 0.3},
        {"length": 3.2, "n": 10, "reward": 0.4},  # its bin and that of 3 are cut otherwise
        {"length": 4, "n": 29, "reward": 1},
    ]
    rows[1]["by_length"] = [
        {"length": 2, "n": 10, "reward": 0.7},
        {"length": 3, "n": 30, "reward": 0},
    ]
    line = by_name(FIGURES["length"](rows))["dpo"][1]
    assert np.allclose(line.get_xydata(), [[2, 0.4], [3.05, 0.1]])


def test_pictures_that_lack_their_numbers_are_not_made():
    one = [make_row("dpo")]  # one run, no curve, no lengths, no start
    assert FIGURES["curves"](one) is None
    assert list(by_name(FIGURES["frontier"](one))) == ["dpo"]
    assert len(FIGURES["length"](one).axes) == 1
    no_reward = make_rows(["dpo"])
    for row in no_reward:
        row["measured"].pop("sampled/reward")
        row["curve"] = [{"step": p["step"], "kl": p["kl"]} for p in row["curve"]]
    assert [make(no_reward) for make in FIGURES.values()] == [None] * 3
    assert [make([]) for make in FIGURES.values()] == [None] * 3


# -- the report


def test_the_report_is_written_with_its_pictures(tmp_path):
    about = {"title": "Ten methods", "text": "What was asked.", "command": "python compare.py"}
    rows = make_rows(TEN[:4])
    written = study.write(tmp_path / "new", rows, about | {"questions": 1024})
    names = ["README.md", "frontier.png", "length.png", "curves.png"]
    assert [path.name for path in written] == names
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == sorted(names)
    for path in written[1:]:
        head = path.read_bytes()[:24]
        width, height = struct.unpack(">II", head[16:])
        assert head[:8] == b"\x89PNG\r\n\x1a\n" and 10_000 < path.stat().st_size < 400_000
        assert 900 < width < 1400 and 300 < height < 1400
    text = written[0].read_text()
    assert text.startswith("# Ten methods\n\nWhat was asked.\n") and "questions: 1024" in text
    assert study.table(rows) in text and study.sweeps(rows) in text
    assert all(f"- {sentence}\n" in text for sentence in study.sentences(rows))
    assert re.findall(r"\]\((.*?)\)", text) == names[1:]
    for part in (
        "commit abc1234",
        "torch 2.13.0+cpu",
        "python dpo.py --seed 1 --beta 0.1",
        "1,024",
    ):
        assert part in text
    before = [path.read_bytes() for path in written]
    study.write(tmp_path / "new", rows, about | {"questions": 1024})
    assert before == [path.read_bytes() for path in written]  # nothing to commit again


def test_a_report_that_fails_leaves_the_old_one(tmp_path, monkeypatch):
    rows = make_rows(["dpo"], seeds=(0,), swept=())
    study.write(tmp_path, rows, {})
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}

    def fails(self, where, **_):
        Path(where).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(study_pictures.Figure, "savefig", fails)
    with pytest.raises(OSError):
        study.write(tmp_path, rows[:1], {})
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize("rows", [[], [start_row()], [make_row("dpo")], [make_row("new-one", 3)]])
def test_little_is_reported_too(tmp_path, rows):
    text = study.write(tmp_path, rows, {})[0].read_text()
    assert f"# {tmp_path.name}" in text and "None" not in text
