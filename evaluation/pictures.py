"""A study's three pictures: reward against KL, against length, and along the run.

Copyright (c) 2026 the plainpref authors. MIT licence.
"""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from evaluation.study import ORDER, groups, value

# Okabe and Ito's colours for colour-blind people. Style and marker suffice in black and white.
COLOURS = "#000000 #009e73 #0072b2 #d55e00 #cc79a7 #56b4e9 #e69f00".split()
STYLES, MARKERS = ("-", "--", "-.", ":"), "osD^vPX<>"  # 36 combinations
TRADE_OFF = """Reward of sampled answers against {}. A small point per run at the default strength;
a line joins the strengths of a sweep. Across: without training."""
CURVES = "Reward of sampled answers along one run of each method, on fewer questions. Grey: dpo."


def save(folder: Path, rows: list[dict]) -> dict[str, str]:
    """Draw what there are numbers for. Returns the captions by file name."""
    captions = {}
    for name, figure, caption in (
        ("frontier.png", trade_off(rows, "sampled/kl"), TRADE_OFF.format("the KL from the start")),
        ("length.png", trade_off(rows, "sampled/length"), TRADE_OFF.format("their length")),
        ("curves.png", curves(rows), CURVES),
    ):
        if figure:
            figure.savefig(folder / name, metadata={"Software": None})  # equal rows: equal bytes
            captions[name] = caption.replace("\n", " ")
    return captions


def new_figure(height: float, lines: int, columns: int, **shared) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(10, height), dpi=120, layout="constrained")
    axes = list(figure.subplots(lines, columns, squeeze=False, **shared).flat)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25, linewidth=0.6)
    return figure, axes


def draw(axis: Axes, method: str, points: list[tuple], **changes) -> None:
    i = ORDER.index(method)
    style = {"color": COLOURS[i % 7], "linestyle": STYLES[i % 4], "marker": MARKERS[i % 9]}
    if points:
        axis.plot(*zip(*points, strict=True), **style | {"label": method} | changes)


def trade_off(rows: list[dict], key: str) -> Figure | None:
    figure, (axis,) = new_figure(6, 1, 1)

    def points_of(runs: list[dict]) -> list[tuple]:
        points = [(value(run, key), value(run, "sampled/reward")) for run in runs]
        return [point for point in points if None not in point]

    for method, runs in groups(rows).items():
        if not runs[0]["default"]:
            continue
        seed = runs[0].get("seed")  # the first one, which a sweep has
        sweep = [row for row in rows if (row["method"], row.get("seed")) == (method, seed)]
        sweep.sort(key=lambda row: row.get("strength") or 0)
        draw(axis, method, points_of(runs), linestyle="none", markersize=4, label="_")
        draw(axis, method, points_of(sweep))
        if not points_of(runs) and (reward := value(runs[0], "sampled/reward")) is not None:
            axis.axhline(reward, color="0.5", linestyle=":", label=method)
    axis.set(xlabel="tokens per answer", ylabel="reward, sampled")
    if key == "sampled/kl":
        # A square root, because most runs are where the KL is small. Estimates may be below 0.
        axis.set_xscale("function", functions=(lambda x: np.sqrt(np.maximum(x, 0)), np.square))
        axis.set(xlabel="KL from the start, nats per answer", xlim=(0, None))
    figure.legend(*axis.get_legend_handles_labels(), loc="outside right upper")
    return figure if axis.lines else None


def curves(rows: list[dict]) -> Figure | None:
    found = {}
    for method, runs in groups(rows).items():
        curve = next((run["curve"] for run in runs if run.get("curve")), [])
        if curve := [point for point in curve if "reward" in point]:
            found[method] = [(p["step"] / curve[-1]["step"], p["reward"]) for p in curve]
    if not found:
        return None
    lines = -(-len(found) // 4)
    figure, axes = new_figure(0.8 + 2 * lines, lines, 4, sharex=True, sharey=True)
    for axis, method in zip(axes, found, strict=False):
        draw(axis, "dpo", found.get("dpo", []), color="0.8")
        draw(axis, method, found[method])
        axis.set_title(method)
    for axis in axes[len(found) :]:
        axis.axis("off")
    figure.supxlabel("share of the steps")
    figure.supylabel("reward, sampled")
    return figure
