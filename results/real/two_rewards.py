"""results/real/learned/two-rewards.png: the learned and the true reward of each run over its KL.

    python -m results.real.two_rewards

Copyright (c) 2026 the plainpref authors. MIT licence.
"""

from pathlib import Path

from matplotlib.figure import Figure

from evaluation.study import read_rows, value

FOLDER = Path("results/real/learned")
LINES = (  # name, key of the rows, colour
    ("true (VADER)", "sampled/reward", "#0072b2"),
    ("learned", "sampled/real-reward", "#d55e00"),
)


def main() -> None:
    rows = read_rows(FOLDER)
    start = next(row for row in rows if row["name"] == "start")
    runs = [row for row in rows if row["method"] == "rloo"]
    best = [row for row in rows if row.get("best_of")]
    figure = Figure((5, 3.2), dpi=120, layout="constrained")
    axis = figure.subplots()
    for label, key, color in LINES:
        for group, style in (([start, *runs], "o-"), ([start, *best], "s:")):
            points = []
            for row in group:
                ends = [value(row, key, part) for part in ("value", "low", "high")]
                points.append((value(row, "sampled/kl") or 0.0, *ends))
            x, y, low, high = zip(*sorted(points), strict=True)
            rest = {"label": f"{label}, {'best-of-8' if 's' in style else 'rloo'}"}
            axis.plot(x, y, style, color=color, markersize=4, linewidth=1.2, **rest)
            axis.vlines(x, low, high, color=color, linewidth=0.8)
    for row in runs:
        where = (value(row, "sampled/kl"), value(row, "sampled/reward"))
        how = {"xytext": (-16, 12), "textcoords": "offset points", "fontsize": 7}
        axis.annotate(f"kl_coef {row['strength']:g}", where, **how)
    axis.set(
        xlabel="KL from the start, nats per answer", ylabel="reward, sampled", xlim=(-0.1, 3.8)
    )
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.legend(fontsize=7, frameon=False)
    figure.savefig(FOLDER / "two-rewards.png", metadata={"Software": None})


if __name__ == "__main__":
    main()
