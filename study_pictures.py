"""A study's pictures: reward against KL, against length, and along the run. Rows as in study.py.

Each method has one colour, line style and marker in all of them, and its name stands beside its
line: a box of ten entries sends the eye to and fro. Colours are those that the colour-blind tell
apart; style and marker alone do in black and white.

Copyright (c) 2026 the plainpref authors. MIT licence.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from study import by_method, number, swept, value

LISTS_OR_OWN_SAMPLES = "pro listwise_dpo rrhf raft rso ppo rloo grpo".split()
# A method's place here is its look: new ones at the end, so that no other changes.
LOOKS = (
    "start sft dpo cpo simpo slic kto pro listwise_dpo rso ppo ipo orpo rrhf raft rloo grpo".split()
)
# Those of Okabe and Ito without yellow, which is faint on white.
COLOURS = "#000000 #009e73 #0072b2 #d55e00 #cc79a7 #56b4e9 #e69f00".split()
STYLES = ("-", "--", "-.", ":")
MARKERS = "osD^vPX<>"  # 4 and 9 have no common divisor: 36 methods differ in style or marker
GREY = "#737373"
SIZE = 10  # of names
FEW = 30  # answers: a mean reward of fewer is not drawn
REWARD, KL, LENGTH = "sampled/reward", "sampled/kl", "sampled/length"


def save(folder: Path, rows: list[dict]) -> dict[Path, str]:
    """Those that the rows have numbers for -> what stands below each."""
    saved = {}
    for name, make, caption in (
        ("frontier", frontier_figure, FRONTIER_CAPTION),
        ("length", length_figure, LENGTH_CAPTION),
        ("curves", curves_figure, CURVES_CAPTION),
    ):
        if figure := make(rows):
            path = folder / f"{name}.png"
            temporary = folder / f".{name}.png.tmp"
            # No version of matplotlib inside: the same rows give the same bytes.
            figure.savefig(temporary, format="png", metadata={"Software": None})
            os.replace(temporary, path)
            saved[path] = caption
    return saved


def look(method: str, rows: list[dict]) -> dict:
    others = sorted({row["method"] for row in rows} - set(LOOKS))
    i = (LOOKS + others).index(method)
    return {
        "color": COLOURS[i % len(COLOURS)],
        "linestyle": STYLES[i % len(STYLES)],
        "marker": MARKERS[i % len(MARKERS)],
    }


def new_figure(lines: int, columns: int, height: float, **shared) -> tuple[Figure, np.ndarray]:
    """Without pyplot, which would keep it. As wide as a README shows it with its type readable."""
    figure = Figure(figsize=(9, height), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(lines, columns, squeeze=False, **shared)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25, linewidth=0.6)
    return figure, axes


def points_of(runs: list[dict], *keys: str) -> list[tuple[float, ...]]:
    """The runs that have all of the numbers."""
    points = [tuple(value(run, key) for key in keys) for run in runs]
    return [point for point in points if None not in point]


def mean_curve(runs: list[dict], *keys: str) -> list[tuple[float, ...]]:
    """(step, keys...) where every run that has a curve has the numbers, averaged."""
    curves = [
        {p["step"]: [number(p, key) for key in keys] for p in run.get("curve") or []}
        for run in runs
    ]
    curves = [curve for curve in curves if curve]
    shared = sorted(set.intersection(*map(set, curves))) if curves else []
    found = [(step, np.array([curve[step] for curve in curves], float)) for step in shared]
    return [(step, *x.mean(axis=0)) for step, x in found if np.isfinite(x).all()]


def steps_of(runs: list[dict]) -> float:
    """Of the longest; where a row does not say, its curve is taken to reach the end."""
    ends = [p["step"] for run in runs for p in run.get("curve") or []]
    return max([number(run, "steps") or 0 for run in runs] + [max(ends, default=0) * 1.0])


# -- reward against KL

FRONTIER_CAPTION = (
    "Reward of sampled answers against the KL from the start. Where a method was run at "
    "several strengths its line joins those of one seed; otherwise it is the way that its runs "
    "went, mean over seeds, on fewer questions than the points, to their mean at the end. Small "
    "points: each seed at the default strength. Dotted across: without training. Pale: dpo again."
)


def frontier_figure(rows: list[dict]) -> Figure | None:
    methods = by_method(rows)
    sweeps = {key[0]: runs for key, runs in reversed(swept(rows).items())}  # of the first seed
    drawn = [m for m in methods if m != "start" and points_of(methods[m], KL, REWARD)]
    if not drawn:
        return None
    dpo = sorted(points_of(sweeps.get("dpo") or methods.get("dpo", []), KL, REWARD))
    later = [method for method in drawn if method in LISTS_OR_OWN_SAMPLES]
    panels = [[method for method in drawn if method not in later], later]
    panels = [panel for panel in panels if panel] if len(drawn) > 5 else [drawn]
    figure, axes = new_figure(1, len(panels), 5.4, sharex=True, sharey=True)
    start = points_of(methods.get("start", []), REWARD)
    bars = {m: points_of(methods[m], REWARD) for m in methods if m not in (*drawn, "start")}
    bars = {method: points[0][0] for method, points in bars.items() if points}
    places: list[list[Name]] = []
    for axis, panel in zip(axes.flat, panels, strict=True):
        # The square root, because most runs lie where KL is small. An estimate may be below 0.
        axis.set_xscale("function", functions=(lambda x: np.sqrt(np.maximum(x, 0)), np.square))
        axis.set_xlabel("KL from the start, nats an answer (root scale)")
        if len(panels) > 1:
            axis.set_title("lists, own samples" if panel == later else "pairs, single answers")
        names: list[Name] = []
        if dpo and "dpo" not in panel:  # pale, to compare with
            join = (
                look("dpo", rows)
                | {"color": "0.8"}
                | ({} if "dpo" in sweeps else {"linestyle": "none"})
            )
            axis.plot(*zip(*dpo, strict=True), **join, markersize=5, zorder=1)
            names.append(("dpo", GREY, dpo))
        if start:
            axis.plot(0, *start[0], "o", color="black", markersize=8, clip_on=False, label="start")
            names.append(("start", "#000000", [(0, *start[0])]))
        for method in panel:
            style, ends = look(method, rows), points_of(methods[method], KL, REWARD)
            axis.plot(*zip(*ends, strict=True), **style | {"linestyle": "none"}, markersize=4)
            if method in sweeps:
                line = sorted(points_of(sweeps[method], KL, REWARD))
                stand_at, wide = line, {"linewidth": 1.4}
            else:
                curve = mean_curve(methods[method], "kl", "reward")
                # The end of the run is among the points, measured on more questions.
                way = [x[1:] for x in curve if x[0] < steps_of(methods[method])]
                line = [(0, *x) for x in start if way] + way + [tuple(np.mean(ends, axis=0))]
                stand_at, wide = [line[-1], *ends], {"linewidth": 0.8, "markevery": [len(line) - 1]}
            axis.plot(*zip(*line, strict=True), **style, **wide, markersize=6.5, label=method)
            names.append((method, style["color"], stand_at))
        for bar, reward in bars.items():
            axis.axhline(reward, color=GREY, linestyle=(0, (1, 3)), linewidth=1, label=bar)
        places.append(names)
    axes[0, 0].set_ylabel("reward, sampled")
    axes[0, 0].set_xlim(left=0)
    right = axes[0, 0].get_xlim()[1]
    ticks = [x for x in (0, 0.1, 0.5, 1, 2, 3, 5, 8, 12, 20, 30, 50, 100) if x <= right]
    for axis, names in zip(axes.flat, places, strict=True):
        axis.set_xticks(ticks, [f"{x:g}" for x in ticks])
        axis.minorticks_off()
        along = np.linspace(0, right, 24)
        label(axis, names + [(bar, GREY, [(x, y) for x in along]) for bar, y in bars.items()])
    return figure


# -- length

LENGTH_CAPTION = (
    "Length and reward of sampled answers. Left: a point a run at the default strength. "
    f"Right: answers of one length, all seeds together; lengths with fewer than {FEW} answers are "
    "left out."
)


def length_figure(rows: list[dict]) -> Figure | None:
    methods = by_method(rows)
    points = {m: p for m, runs in methods.items() if (p := points_of(runs, LENGTH, REWARD))}
    lines = {m: p for m, runs in methods.items() if len(p := reward_by_length(runs)) > 1}
    if not points:
        return None
    figure, axes = new_figure(1, 1 + bool(lines), 4.8)
    axes[0, 0].set(xlabel="tokens an answer, mean of a run", ylabel="reward, mean of a run")
    for method, found in points.items():
        style = look(method, rows) | {"linestyle": "none"}
        axes[0, 0].plot(*zip(*found, strict=True), **style, markersize=6, label=method)
    if lines:
        axis = axes[0, 1]
        axis.set(xlabel="tokens of the answer", ylabel="mean reward of such answers")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        for method, found in lines.items():
            wide = 2.5 if method == "start" else 1.2
            style = look(method, rows)
            axis.plot(
                *zip(*found, strict=True), **style, linewidth=wide, markersize=4, label=method
            )
    for axis, drawn in zip(axes.flat, (points, lines), strict=False):
        label(axis, [(m, look(m, rows)["color"], found) for m, found in drawn.items()])
    return figure


def reward_by_length(runs: list[dict]) -> list[tuple[float, float]]:
    """Runs cut their lengths into bins of their own: bins of nearly the same length are one."""
    points = []
    for point in [point for run in runs for point in run.get("by_length") or []]:
        length, n, reward = (number(point, key) for key in ("length", "n", "reward"))
        if None not in (length, n, reward) and n > 0:
            points.append((length, n, reward))
    bins: list[list[tuple[float, float, float]]] = []
    for point in sorted(points):
        near = bins and point[0] - bins[-1][0][0] < max(0.75, 0.05 * point[0])
        bins[-1].append(point) if near else bins.append([point])
    found = []
    for bin in bins:
        count = math.fsum(n for _, n, _ in bin)
        if count >= FEW:
            total = [math.fsum(n * x for x, n, _ in bin), math.fsum(n * y for _, n, y in bin)]
            found.append((total[0] / count, total[1] / count))
    return found


# -- along the run

CURVES_CAPTION = (
    "Reward of sampled answers along the run, on fewer questions than in the table. Thick: "
    "mean over seeds; thin: each seed; grey: dpo's mean."
)


def curves_figure(rows: list[dict]) -> Figure | None:
    methods = {m: r for m, r in by_method(rows).items() if len(mean_curve(r, "reward")) > 1}
    if not methods:
        return None
    columns = min(4, len(methods))
    lines = -(-len(methods) // columns)
    figure, axes = new_figure(lines, columns, 0.8 + 2.0 * lines, sharex=True, sharey=True)

    def shares(runs: list[dict]) -> tuple[list[float], list[float]]:
        curve, steps = mean_curve(runs, "reward"), steps_of(runs)
        return [step / steps for step, _ in curve], [reward for _, reward in curve]

    for axis, (method, runs) in zip(axes.flat, methods.items(), strict=False):
        style = look(method, rows)
        if "dpo" in methods and method != "dpo":
            axis.plot(*shares(methods["dpo"]), color="0.75", linewidth=3, label="_dpo")
        for run in runs if len(runs) > 1 else ():
            if len(mean_curve([run], "reward")) > 1:
                axis.plot(*shares([run]), color=style["color"], linewidth=0.6, alpha=0.7)
        axis.plot(*shares(runs), **style, linewidth=1.8, markersize=4, label=method)
        axis.set_title(method, fontsize=10)
    for axis in list(axes.flat)[len(methods) :]:
        axis.axis("off")
    for axis in list(axes.flat)[max(0, len(methods) - columns) : len(methods)]:
        axis.xaxis.set_tick_params(labelbottom=True)  # below the last one of each column
    axes[0, 0].set_xlim(0, 1.05)
    figure.supxlabel("share of the run's steps", fontsize=10)
    figure.supylabel("reward, sampled", fontsize=10)
    return figure


# -- names at lines

Name = tuple[str, str, list[tuple[float, float]]]  # what, colour, points of it to stand at
NEAR = 9  # pixels from a point; a name that stands farther off has a line to it
FAR = np.repeat([NEAR, 15, 27, 42, 60, 85, 120], 24)
TURNS = np.tile(np.linspace(0, 2 * np.pi, 24, endpoint=False), 7)
WAYS = np.stack([np.cos(TURNS), np.sin(TURNS)], 1)


def label(axis: Axes, names: list[Name]) -> None:
    """Each name takes the place near one of its points that hides the least of points and lines,
    and never one that is taken.
    """
    figure = axis.figure
    figure.draw_without_rendering()  # the layout settles: places are in pixels
    figure.set_layout_engine("none")
    bounds, drawn = axis.get_window_extent(), drawn_until(axis)
    taken = np.zeros((0, 4))  # left, bottom, right, top of each name
    for name, colour, points in names:
        half = size_of(axis, name) / 2 + 2
        offset = WAYS * (FAR[:, None] + half * np.abs(WAYS))  # (C, 2) from a point to the middle
        spots = axis.transData.transform(points)  # (P, 2)
        low = (spots[:, None] + offset - half).reshape(-1, 2)  # (P * C, 2)
        high = low + 2 * half
        a, b = (np.clip(x, 0, np.array(drawn.shape) - 1).astype(int) for x in (low, high))
        hides = drawn[tuple(b.T)] - drawn[a[:, 0], b[:, 1]] - drawn[b[:, 0], a[:, 1]]
        hides += drawn[tuple(a.T)]
        outside = (low < bounds.min).any(1) | (high > bounds.max).any(1)
        clash = ((low[:, None] < taken[:, 2:]) & (taken[:, :2] < high[:, None])).all(2).any(1)
        price = np.tile(FAR, len(spots)) + 10 * hides + 1e4 * outside + 1e6 * clash
        best = int(price.argmin())
        taken = np.vstack([taken, [*low[best], *high[best]]])
        dark = tuple(0.7 * int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
        leader = {"arrowstyle": "-", "color": dark, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 2}
        axis.annotate(
            name,
            points[best // len(offset)],
            offset[best % len(offset)],
            textcoords="offset pixels",
            ha="center",
            va="center",
            color=dark,
            fontsize=SIZE,
            gid="name",
            arrowprops=leader if FAR[best % len(offset)] > NEAR else None,
        )


def drawn_until(axis: Axes) -> np.ndarray:
    """[x, y] -> how many spots of lines and points lie left of and below that pixel."""
    spots = np.concatenate([on_the_way(line) for line in axis.lines] or [np.zeros((0, 2))])
    width, height = axis.figure.canvas.get_width_height()
    edges = [np.arange(width + 1), np.arange(height + 1)]
    return np.histogram2d(*spots.T, bins=edges)[0].cumsum(0).cumsum(1)


def size_of(axis: Axes, name: str) -> np.ndarray:
    text = axis.text(0, 0, name, fontsize=SIZE)
    extent = text.get_window_extent()
    text.remove()
    return np.array([extent.width, extent.height])


def on_the_way(line: Line2D) -> np.ndarray:
    """(N, 2) pixels: a line's points, and what lies between them where it is drawn."""
    path = line.get_transform().transform(line.get_xydata().astype(float))
    if line.get_linestyle() == "None":
        return path
    pairs = zip(path, path[1:], strict=False)
    return np.concatenate(
        [path[:1]] + [np.linspace(a, b, 2 + int(np.hypot(*(b - a)) // 4)) for a, b in pairs]
    )
