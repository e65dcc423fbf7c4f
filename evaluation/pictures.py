"""A study's pictures, a panel per method: reward against KL, against length, along the run."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from evaluation.study import groups, value

TRADE_OFF = """Reward of sampled answers against {}. Blue: the method's runs; a line joins the
strengths of a sweep, given as numbers; bars: 95 % intervals over questions. Grey: the other
methods. Black: the start, and dotted from there best-of-N, whose KL is log N - (N - 1) / N."""
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


def panels(titles: list[str], xlabel: str) -> tuple[Figure, list[Axes]]:
    """Up to four in a line, all with the same axes."""
    shape = -(-len(titles) // 4), min(4, len(titles))
    figure = Figure((max(4, 2.5 * shape[1]), 0.8 + 2 * shape[0]), dpi=120, layout="constrained")
    axes = list(figure.subplots(*shape, squeeze=False, sharex=True, sharey=True).flat)
    for axis, title in zip(axes, titles, strict=False):
        axis.set_title(title, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25, linewidth=0.6)
    for axis in axes[len(titles) :]:
        axis.axis("off")
    figure.supxlabel(xlabel)
    figure.supylabel("reward, sampled")
    return figure, axes


def draw(axis: Axes, points: list[tuple], color: str = "#0072b2", style: str = "o", **more) -> None:
    if points:
        axis.plot(*zip(*points, strict=True), style, color=color, markersize=3, **more)


def trade_off(rows: list[dict], key: str) -> Figure | None:
    def points_of(runs: list[dict]) -> list[tuple]:
        points = [(value(run, key), value(run, "sampled/reward")) for run in runs]
        return [point for point in points if None not in point]

    found = {name: runs for name, runs in groups(rows).items() if runs[0]["default"]}
    trained = [name for name, runs in found.items() if points_of(runs)]
    trained = [name for name in trained if name != "start" and not name.startswith("best-of")]
    if not trained:
        return None
    figure, axes = panels(trained, "tokens per answer")
    best = [row for row in rows if "best_of" in row or row["method"] == "start"]
    best.sort(key=lambda row: row.get("best_of", 1))
    for axis, method in zip(axes, trained, strict=False):
        draw(axis, points_of(best), "black", ".:", linewidth=1)
        draw(axis, [point for name in trained for point in points_of(found[name])], "0.8")
        draw(axis, points_of(found.get("start", [])), "black", "s", clip_on=False)
        draw(axis, points_of(found[method]))
        seed = found[method][0].get("seed")  # the first one, which a sweep has
        sweep = [row for row in rows if (row["method"], row.get("seed")) == (method, seed)]
        sweep.sort(key=lambda row: row.get("strength") or 0)
        draw(axis, points_of(sweep), style="o-", linewidth=1)
        for row in sweep:
            if points_of([row]) and value(row, "sampled/reward", "low") is not None:
                ends = [value(row, "sampled/reward", end) for end in ("low", "high")]
                axis.plot([points_of([row])[0][0]] * 2, ends, color="#0072b2", linewidth=0.8)
        for row in sweep if len(sweep) > 1 else ():
            axis.set_title(f"{method}, by {row['knob']}", fontsize=10)
            for point in points_of([row]):
                how = {"xytext": (3, -9), "textcoords": "offset points", "fontsize": 7}
                axis.annotate(f"{row['strength']:g}", point, **how)
        # A square root, because most runs are where the KL is small. Estimates may be below 0.
        axes[0].set_xscale("function", functions=(lambda x: np.sqrt(np.maximum(x, 0)), np.square))
        axes[0].set(xlim=(0, None))
        figure.supxlabel("KL from the start, nats per answer")
    return figure


def curves(rows: list[dict]) -> Figure | None:
    found = {}
    for method, runs in groups(rows).items():
        curve = next((run["curve"] for run in runs if run.get("curve")), [])
        if curve := [point for point in curve if "reward" in point]:
            found[method] = [(p["step"] / curve[-1]["step"], p["reward"]) for p in curve]
    if not found:
        return None
    figure, axes = panels([*found], "share of the steps")
    for axis, method in zip(axes, found, strict=False):
        draw(axis, found.get("dpo", []), "0.8", "o-")
        draw(axis, found[method], style="o-")
    return figure
