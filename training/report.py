"""The end of a run: curves.png and the closing block, made from the files in the run's folder."""

import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np

from training.record import run_of

HOME = Path(__file__).resolve().parent.parent
PANELS = (  # what it is, metrics
    ("loss", ("loss",)),
    ("mean score", ("objective/scores",)),
    ("KL, nats per answer", ("objective/kl",)),
    ("KL coefficient", ("objective/kl_coef",)),
    ("entropy, nats per answer", ("objective/entropy",)),
    ("policy loss", ("loss/policy",)),
    ("value loss", ("loss/value",)),
    ("explained variance of the returns", ("val/explained_variance",)),
    ("share of clipped ratios", ("policy/clipfrac",)),
    ("nats per chosen token", ("nll_loss",)),
    ("loss without its regulariser", ("hinge_loss", "chain_loss")),
    ("estimate of the KL", ("kl",)),
    ("implicit rewards", ("rewards/chosen", "rewards/rejected")),
    ("reward margin", ("rewards/margins",)),
    ("pairs ranked correctly", ("rewards/accuracies",)),
    ("log-probs", ("logps/chosen", "logps/rejected")),
    ("response tokens", ("length/chosen", "length/rejected", "length/response")),
    ("gradient norm", ("grad_norm",)),
    ("learning rate", ("lr",)),
)
EXACT = ("lr", "objective/kl_coef")  # set, not measured, so they are not smoothed
HELD_OUT = (  # metrics of held-out rows in the closing block
    "loss", "objective/scores", "objective/gold", "objective/kl", "kl", "rewards/accuracies",
    "rewards/margins", "rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected",
)  # fmt: skip


def read_metrics(folder: Path) -> tuple[list[dict], list[dict]]:
    """(training steps, evaluations)"""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [x for x in lines if "lr" in x], [x for x in lines if "lr" not in x]


def curves(folder: Path, title: str, held_out: int | None = None) -> None:
    """Write curves.png: training pale, its moving average solid, `held_out` rows as dots."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import MaxNLocator

    steps, evaluations = read_metrics(folder)
    logged = {name for step in steps for name, x in step.items() if x is not None}
    panels = [(t, [n for n in names if n in logged]) for t, names in PANELS]
    panels = [(t, names) for t, names in panels if names]
    columns = min(4, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(3.6 * columns, 2.6 * lines), squeeze=False)
    rows = "held-out" if held_out is None else f"{held_out:,} held-out"
    styles = (("-", "#0072b2"), ("--", "#d55e00"), (":", "#444444"))
    for axis, (heading, names) in zip(axes.flat, panels, strict=False):
        for name, (style, colour) in zip(names, styles, strict=False):
            points = [(s["step"], s[name]) for s in steps if s.get(name) is not None]
            x, y = np.array(points, float).T
            width = 1 if name in EXACT else max(1, len(y) // 30)
            smooth = np.convolve(y, np.ones(width) / width, "valid")
            axis.plot(x, y, color=colour, alpha=0.25, linewidth=0.7)
            axis.plot(x[width - 1 :], smooth, style, color=colour, label=name)
            dots = [(e["step"], e[f"eval/{name}"]) for e in evaluations if f"eval/{name}" in e]
            if dots:
                axis.plot(*zip(*dots, strict=True), "o", color=colour, markersize=3.5)
        axis.set_title(", ".join(names), fontsize=8)
        axis.set_ylabel(heading, fontsize=7)
        axis.tick_params(labelsize=7)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set_xlabel(f"step (dots: {rows} rows)" if evaluations else "step", fontsize=7)
        if len(names) > 1:
            axis.legend(fontsize=7, frameon=False)
    for axis in list(axes.flat)[len(panels) :]:
        axis.axis("off")
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    figure.savefig(folder / "curves.png", dpi=110)
    plt.close(figure)


def closing(
    folder: Path,
    script: str,
    model: str,
    step: int,
    seed: int,
    measured: dict | None = None,
    held_out: int | None = None,
) -> str:
    """What improved, where the files are, what to run next.

    `script` is the name of the method file without .py; `measured` comes from family/measure.py;
    `held_out` is the number of rows.
    """
    steps, evaluations = read_metrics(folder)
    seconds = sum(s["seconds_per_step"] for s in steps)
    speed = np.median([s["tokens_per_second"] for s in steps])
    peak = max(s["peak_memory_gib"] for s in steps)
    rows = f"on {held_out:,} held-out rows" if held_out else ""
    rows += " (too few to mean much)" if held_out and held_out < 30 else ""
    text = [
        f"{script}: {step:,} steps in {seconds:,.0f} s "
        f"({speed:,.0f} tokens/s, peak memory {peak:.1f} GiB), seed {seed}",
        f"{rows:44}{'before':>9}{'after':>9}",
    ]
    if len(evaluations) > 1:
        first, last = evaluations[0], evaluations[-1]
        redundant = (
            ("rewards/chosen", "rewards/rejected") if "eval/rewards/margins" in first else ()
        )
        for name in HELD_OUT:
            key = f"eval/{name}"
            if key in first and key in last and name not in redundant:
                text.append(_line(f"{name}, held-out rows", first[key], last[key]))
    text += _measured_lines(measured) if measured else []
    text += [
        f"files       {folder}: a model that plain Transformers loads,",
        "            curves.png, samples.jsonl, metrics.jsonl, run.json, checkpoint-*",
        "next        " + f"\n{'':12}".join(next_commands(folder, script, model)),
    ]
    return "\n".join(text) + "\n"


def _line(label: str, before: float | None, after: float | None, digits: int = 3) -> str:
    shown = ["" if x is None else f"{x:.{digits}f}" for x in (before, after)]
    change = "" if None in (before, after) else f"{after - before:+.{digits}f}"
    return f"  {label:<42}" + "".join(f"  {x:>7}" for x in (*shown, change)).rstrip()


def _measured_lines(m: dict) -> list[str]:
    if "accuracy" in m:  # of a reward model
        return [
            f"on {m['pairs']:,} noisily judged pairs, {m['prompts']:,} unseen test questions",
            _line("accuracy (chance: 0.5)", None, m["accuracy"]),
            _line("accuracy of the true reward itself", None, m["ceiling"]),
            _line("share of what can be learned", None, m["share"]),
            _line("accuracy against the true reward", None, m["true_accuracy"]),
            _line("mean score of those answers", None, m["mean_score"]),
        ]
    return [
        f"on {m['prompts']:,} unseen test questions",
        _line("true reward, sampled at temperature 1", m["sampled/before"], m["sampled/after"]),
        _line("true reward, greedy", m["greedy/before"], m["greedy/after"]),
        _line("win rate against the start (a tie is half)", 0.5, m["win_rate"]),
        _line("KL from the start, nats per answer", 0.0, m["kl"]),
        _line("answer length, tokens", m["length/before"], m["length/after"], 2),
        _line("control: the start at temperature 0.5", m["sampled/before"], m["cooled/before"]),
    ]


def next_commands(folder: Path, script: str, model: str) -> list[str]:
    """Commands to paste into the same shell."""
    scripts = Path() if Path.cwd() == HOME else HOME

    def command(script: str, *words: Any) -> str:
        return shlex.join(["python", str(scripts / f"{script}.py"), *map(str, words)])

    record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    given = record["from"]  # flags of the command line
    if script == "reward_model":
        while (before := run_of(model)).get("script") == "reward_model":
            model = before["model"]  # a reward model writes no answers
        start = ["--model", model, "--reward", folder]
        names = "dataset columns chat_template max_length max_prompt_length".split()
        same = [f"--{x.replace('_', '-')}={record['arguments'][x]}" for x in names if x in given]
        return [command("evaluate", *start), command("ppo", *start, *same)]
    local = model == "tiny" or Path(model).expanduser().is_dir()
    found = [command("chat", "--model", folder, *(["--against", model] if local else []))]
    found.append(command("evaluate", "--model", folder))
    if script == "sft":
        pairs = ["--dataset", "PAIRS.jsonl"] if "dataset" in given else []
        found.append(command("dpo", "--model", folder, *pairs))
    return found
