"""A study's rows in words. Each function makes the sentences of one kind from the numbers alone.

A sentence is there only where all that it needs was measured, names every method that shares a
place, and carries the numbers that it rests on. Numbers are compared as they are shown: a
difference that the tables do not show is none. What two or three seeds cannot tell is not told.

Copyright (c) 2026 the plainpref authors. MIT licence.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import numpy as np

from study import (
    COLUMNS,
    Seeds,
    at,
    by_method,
    interval,
    joined,
    seeds_of,
    swept,
    trained,
    untrained,
    value,
)

SHUFFLES = 10_000


def all_of(rows: list[dict]) -> list[str]:
    said: list[str] = []
    has_reward = any(value(row, "sampled/reward") is not None for row in rows)
    for key, name in (
        ("sampled/reward", "sampled reward"),
        ("greedy/reward", "greedy reward"),
        *([] if has_reward else [("sampled/win_rate", "win rate against the start")]),
    ):
        said += best(rows, key, name) + against_dpo(rows, key, name)
        said += against_start(rows, key, name) + against_baselines(rows, key, name)
    said += chance(rows, "sampled/reward" if has_reward else "sampled/win_rate")
    for saying in (a_nat, lengths, length_and_reward, ranking_and_reward, length_controlled):
        said += saying(rows)
    return said + over_optimised(rows) + better_strengths(rows) + cost(rows) + incomplete(rows)


def listed(found: dict[str, Seeds], names: Iterable[str]) -> str:
    """Names with their numbers; how many seeds once where it is the same for all."""
    names = list(names)
    same = len(names) > 1 and len({(found[m].count, found[m].of) for m in names}) == 1
    text = joined(f"{name} {found[name].shown(seeds=not same)}" for name in names)
    return f"{text}, {found[names[0]].seeds} each" if same else text


def at_end(found: dict[str, Seeds], end: Callable = max) -> list[str]:
    """Whose mean is the largest (or the smallest), all that share it."""
    last = end(seeds.mean for seeds in found.values())
    return [method for method in found if found[method].mean == last]


def span(found: dict[str, Seeds], base: float) -> str:
    """From the smallest difference to `base` to the largest."""
    texts = []
    for end in dict.fromkeys(tuple(at_end(found, end)) for end in (min, max)):
        away = found[end[0]].mean - base
        texts.append(f"{away:+.{found[end[0]].digits}f} by {listed(found, end)}")
    return " to ".join(texts)


def best(rows: list[dict], key: str, name: str) -> list[str]:
    found = trained(rows, key)
    if len(found) < 2:
        return []
    order = sorted(found, key=lambda method: -found[method].mean)
    first = [method for method in order if found[method].mean == found[order[0]].mean]
    if len(first) > 1:
        return [f"The highest {name} is shared by {listed(found, first)}."]
    second = [method for method in order if found[method].mean == found[order[1]].mean]
    top = found[order[0]]
    text = f"The highest {name} is that of {listed(found, first)}; next {listed(found, second)}."
    several = [method for method in order[1:] if found[method].count > 1]
    near = [method for method in several if found[method].overlaps(top)]
    if top.count < 2 or not several:
        return [text + " One seed cannot tell how much of that is chance."]
    if near:
        return [text + f" Its seeds are not told apart from those of {listed(found, near)}."]
    others = len(several) == len(order) - 1 > 1
    those = f"the other {len(several)} methods" if others else joined(several)
    return [text + f" All its seeds lie above all those of {those}."]


def against_dpo(rows: list[dict], key: str, name: str) -> list[str]:
    found = {method: seeds for method, seeds in trained(rows, key).items() if seeds.count > 1}
    dpo = found.pop("dpo", None)
    if not dpo or not found:
        return []
    above = [method for method, seeds in found.items() if seeds.low > dpo.high]
    below = [method for method, seeds in found.items() if seeds.high < dpo.low]
    near = [method for method, seeds in found.items() if seeds.overlaps(dpo)]
    parts = [
        f"{how} {listed(found, methods)}"
        for how, methods in (
            ("all seeds lie above all of dpo's for", above),
            ("all seeds lie below all of dpo's for", below),
            ("not told apart from dpo:", near),
        )
        if methods
    ]
    return [f"Against dpo's {name}, {dpo}: {'; '.join(parts)}."]


def chance(rows: list[dict], key: str) -> list[str]:
    """How often "told apart" is said of two that are the same: all orders of seeds as likely."""
    counts = sorted(seeds.count for seeds in trained(rows, key).values() if seeds.count > 1)
    if len(counts) < 2:
        return []
    a, b = counts[:2]
    return [
        f"Of two methods that do not differ, with {f'{a} seeds each' if a == b else f'{a} and {b}'}"
        f"{'' if a == b else ' seeds'}, all seeds of one lie above all of the other by chance in "
        f"up to 1 case of {math.comb(a + b, a) / 2:g}; {len(counts)} methods stand side by side "
        "here."
    ]


def against_start(rows: list[dict], key: str, name: str) -> list[str]:
    """Both what rose and, plainly, what did not. A win rate's start is 0.5 by definition."""
    found, start = trained(rows, key), untrained(rows, key).get("start")
    if not found or not (start or key == "sampled/win_rate"):
        return []
    base, shown = (round(value(start, key), 3), interval(start, key)) if start else (0.5, "0.500")
    high = value(start, key, "high") if start else None
    reach = base if high is None else round(high, 3)
    up = [method for method in found if found[method].mean > base]
    flat = [method for method in found if found[method].mean <= base]
    close = [method for method in up if found[method].low <= reach]
    said = []
    if up:
        said.append(
            f"{len(up)} of {len(found)} trained methods end above the start's {name} of {shown} on "
            f"the mean: {span({method: found[method] for method in up}, base)}."
        )
    if close:
        where = "within the start's 95 % interval" if high is not None else "as low as the start's"
        said.append(
            f"By {name} at least one seed lies {where} or below for {listed(found, close)}."
        )
    if flat:
        said.append(f"No better than the start's {name} of {shown}: {listed(found, flat)}.")
    return said


def against_baselines(rows: list[dict], key: str, name: str) -> list[str]:
    """Further fine-tuning on chosen answers, and what needs no training at all."""
    found, said = trained(rows, key), []
    bars = {
        f"{bar} without training, {interval(row, key)}": (value(row, key), list(found))
        for bar, row in untrained(rows, key).items()
        if bar != "start"
    }
    if "sft" in found:
        others = [method for method in found if method != "sft"]
        bars[listed(found, ["sft"])] = (found["sft"].mean, others)
    for bar, (mean, methods) in bars.items():
        low = [method for method in methods if found[method].mean <= round(mean, 3)]
        if low:
            said.append(f"By {name} no better than {bar}, on the mean: {listed(found, low)}.")
        elif methods:
            least = at_end({method: found[method] for method in methods}, min)
            said.append(
                f"By {name} better than {bar}, on the mean: all of {len(methods)} trained methods, "
                f"the least {listed(found, least)}."
            )
    return said


def a_nat(rows: list[dict]) -> list[str]:
    """Gain over KL, run by run. A KL that is shown as 0.00 would divide by noise."""
    if not (start := untrained(rows, "sampled/reward").get("start")):
        return []
    base, found = value(start, "sampled/reward"), {}
    for method in trained(rows, "sampled/kl"):
        ratios = [
            (reward - base) / kl if reward is not None and round(kl or 0, 2) > 0 else None
            for run in by_method(rows)[method]
            for reward, kl in [(value(run, "sampled/reward"), value(run, "sampled/kl"))]
        ]
        if seeds := seeds_of(ratios, 3):
            found[method] = seeds
    if len(found) < 2:
        return []
    most, least = at_end(found), at_end(found, min)
    if most == least:  # all the same
        return []
    return [
        f"Sampled reward gained a nat of KL: most by {listed(found, most)}, least by "
        f"{listed(found, least)}. Where gains level off, this favours those that moved little."
    ]


def lengths(rows: list[dict]) -> list[str]:
    found, start = trained(rows, "sampled/length"), untrained(rows, "sampled/length").get("start")
    if not found or not start:
        return []
    base = round(value(start, "sampled/length"), 2)
    longer = [method for method in found if found[method].mean > base]
    return [
        f"{len(longer)} of {len(found)} trained methods write longer answers than the start's "
        f"{base:.2f} tokens on the mean: {span(found, base)}."
    ]


def length_and_reward(rows: list[dict]) -> list[str]:
    points, methods = [], set()
    for method in trained(rows, "sampled/reward"):
        for run in by_method(rows)[method]:
            pair = (value(run, "sampled/length"), value(run, "sampled/reward"))
            if None not in pair:
                points.append(pair)
                methods.add(method)
    few = len(points) < 5 or len(methods) < 3
    if few or (r := correlation(*zip(*points, strict=True))) is None:
        return []
    alike = f" Seeds of a method are alike: these are fewer than {len(points)} independent points."
    return [
        f"Length and sampled reward correlate at r = {r:+.2f} over {len(points)} runs of "
        f"{len(methods)} methods.{alike if len(points) > len(methods) else ''}"
    ]


def correlation(x: Iterable[float], y: Iterable[float]) -> float | None:
    x, y = np.array(list(x), float), np.array(list(y), float)
    # Equal numbers leave a standard deviation of rounding errors, not of exactly 0.
    constant = any(np.ptp(a) <= 1e-12 * np.abs(a).max() for a in (x, y))
    return None if constant else float(np.corrcoef(x, y)[0, 1])


def ranks(x: Iterable[float]) -> np.ndarray:
    """From 1; those of equals are averaged."""
    x = np.array(list(x), float)
    return (x[:, None] > x).sum(1) + ((x[:, None] == x).sum(1) + 1) / 2


def ranking_and_reward(rows: list[dict]) -> list[str]:
    """Do methods that rank held-out pairs best also write best?"""
    said, reward = [], trained(rows, "sampled/reward")
    for key, name in (
        ("ranking/reference_normalised", "against the reference"),
        ("ranking/sum", "by the sum of log-probs"),
    ):
        found = {m: seeds for m, seeds in trained(rows, key).items() if m in reward}
        x, y = ranks(s.mean for s in found.values()), ranks(reward[m].mean for m in found)
        if len(found) < 4 or (rho := correlation(x, y)) is None:
            continue
        shuffled = np.random.default_rng(0).permuted(np.tile(x, (SHUFFLES, 1)), axis=1)
        products = (shuffled - x.mean()) @ (y - y.mean()) / (len(x) * x.std() * y.std())
        as_far = int((np.abs(products) >= abs(rho) - 1e-9).sum())
        first = at_end(found)
        places = [1 + sum(reward[o].mean > reward[m].mean for o in found) for m in first]
        said.append(
            f"Ranking held-out pairs ({name}) and sampled reward: Spearman's rho {rho:+.2f} over "
            f"{len(found)} methods; {as_far:,} of {SHUFFLES:,} random orders are as far from 0. "
            f"Best at ranking: {listed(found, first)}; place by reward: {joined(map(str, places))}."
        )
    return said


def length_controlled(rows: list[dict]) -> list[str]:
    key = "sampled/win_rate/length_controlled"
    plain, fair = trained(rows, "sampled/win_rate"), trained(rows, key)
    both = [method for method in fair if method in plain]
    if not both:
        return []
    moved = {method: abs(fair[method].mean - plain[method].mean) for method in both}
    most = max(both, key=moved.get)
    if round(moved[most], 3) == 0:
        return ["Holding length equal moves no method's mean win rate."]
    return [
        f"Holding length equal moves the win rate by up to {moved[most]:.3f}: {most}'s is "
        f"{fair[most]} then, {plain[most]} before."
    ]


def over_optimised(rows: list[dict]) -> list[str]:
    """In a sweep: the run that moved farthest, beside that with the highest reward."""
    said, rising = [], []
    for (method, seed, _), runs in swept(rows).items():
        points = [
            (round(kl, 2), round(reward, 3), run)
            for run in runs
            for kl, reward in [(value(run, "sampled/kl"), value(run, "sampled/reward"))]
            if kl is not None and reward is not None
        ]
        if len(points) < 2:
            continue
        peak, far = max(points, key=lambda p: (p[1], p[0])), max(points, key=lambda p: p[:2])
        if peak is far:
            rising.append(f"{method} ({at(far[2])}: {interval(far[2], 'sampled/reward')})")
        else:  # farther, and lower: of equal rewards the peak is the farthest
            low = value(peak[2], "sampled/reward", "low")
            high = value(far[2], "sampled/reward", "high")
            known = None not in (low, high)
            apart = known and round(high, 3) < round(low, 3)
            why = "the 95 % intervals overlap: it may be chance" if known else "it may be chance"
            said.append(
                f"{method} at seed {seed}: from {at(peak[2])} to {at(far[2])} the KL rises from "
                f"{peak[0]:.2f} to {far[0]:.2f} while the sampled reward falls from "
                f"{interval(peak[2], 'sampled/reward')} to {interval(far[2], 'sampled/reward')}: "
                f"{'over-optimisation' if apart else why}."
            )
    if rising:
        said.append(
            "In these sweeps the run with the highest KL has the highest sampled reward too: "
            f"{joined(rising)}."
        )
    return said


def better_strengths(rows: list[dict]) -> list[str]:
    """A default that was not the best is said, and that the best was picked by these numbers."""
    better = []
    for (method, _, _), runs in swept(rows).items():
        known = [run for run in runs if value(run, "sampled/reward") is not None]
        default = [run for run in known if run.get("default") is not False]
        top = max(known, key=lambda run: value(run, "sampled/reward"), default=None)
        shown = [round(value(x, "sampled/reward"), 3) for x in (top, *default[:1]) if x]
        if default and shown[0] > shown[1]:
            texts = [f"{at(x)}: {interval(x, 'sampled/reward')}" for x in (top, default[0])]
            better.append(f"{method} ({texts[0]}, default {texts[1]})")
    if not better:
        return []
    return [
        "Another strength than the default has a higher sampled reward, picked on the very "
        f"questions it is measured on: {joined(better)}."
    ]


def cost(rows: list[dict]) -> list[str]:
    said = []
    for key, what, unit in (("seconds", "Time", "seconds"), ("peak_memory_gib", "Memory", "GiB")):
        if not (found := trained(rows, key)):
            continue
        if key == "seconds" and any((row.get("jobs") or 1) > 1 for row in rows):
            continue  # neighbours move them: which runs stood beside which is chance
        least, most = at_end(found, min), at_end(found)
        if least != most:
            runs = [run for method in found for run in by_method(rows)[method]]
            places = {str([run.get(k) for k in ("hardware", "threads", "jobs")]) for run in runs}
            unlike = " Not all runs had the same machine, threads and neighbours."
            said.append(
                f"{what} of a run, in {unit}: least {listed(found, least)}; most "
                f"{listed(found, most)}.{unlike if len(places) > 1 else ''}"
            )
    return said


def incomplete(rows: list[dict]) -> list[str]:
    """A run that diverged, or was not measured, must not vanish in a mean."""
    said = []
    for heading, key, _ in COLUMNS:
        runs = [run for runs in by_method(rows).values() for run in runs]
        trained_runs = [run for run in runs if run.get("seed") is not None]
        lacking = [run["method"] for run in trained_runs if value(run, key) is None]
        if 0 < len(lacking) < len(trained_runs):
            counts = [f"{method} {lacking.count(method)}" for method in dict.fromkeys(lacking)]
            said.append(f"Runs without a number for {heading}: {joined(counts)}.")
    return said
