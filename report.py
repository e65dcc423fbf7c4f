"""What a run shows of itself: greedy samples, curves, the closing block. Imported where it is
wanted.
"""

import json
from typing import Any

import numpy as np
import torch

import common
import generation

SAMPLED_PROMPTS = 4
SAMPLE_TOKENS = 128
FAMILY_PROMPTS = 1024


def sample(run: "common.Run", held_out: "common.Rows", policy: Any, tokenizer: Any) -> None:
    """Greedy answers to the same few held-out prompts, to samples.jsonl and to the screen; of a
    reward model the scores that it gives to the rows' own answers.
    """
    if hasattr(policy, "score"):
        return scored(run, held_out, policy, tokenizer)
    rows = [row for row in held_out.rows if len(row.ask)][:SAMPLED_PROMPTS]
    if not rows:
        return
    room = getattr(policy.config, "max_position_embeddings", None) or 10**9
    tokens = min(SAMPLE_TOKENS, run.args.max_length, room - max(len(row.ask) for row in rows))
    if tokens < 1:
        return
    made = generation.generate(
        policy, [row.ask for row in rows], tokenizer.stop_ids, tokens, 0.0, 0, run, label="samples"
    )
    if not common.MAIN_PROCESS:
        return
    with open(run.folder / "samples.jsonl", "a", encoding="utf-8") as f:
        for row, ids in zip(rows, made, strict=True):
            answer = generation.text_of(ids, tokenizer)
            record = {"step": run.step, "prompt": tokenizer.decode(row.ask), "response": answer}
            f.write(
                json.dumps(
                    record | {"ended": bool(len(ids)) and int(ids[-1]) in tokenizer.stop_ids}
                )
                + "\n"
            )
    question, answer = tokenizer.decode(rows[0].ask), generation.text_of(made[0], tokenizer)
    run.print(f"            sample: ...{question[-60:]!r} -> {answer[:100]!r}")


@torch.no_grad()
def scored(run: "common.Run", held_out: "common.Rows", model: Any, tokenizer: Any) -> None:
    import scoring

    if not (chosen := list(range(len(held_out)))[:SAMPLED_PROMPTS]):
        return
    micro = common.collate(held_out, chosen, run.device)
    scores = scoring.response_scores(model, micro).tolist()  # (B, K)
    if not common.MAIN_PROCESS:
        return
    with open(run.folder / "samples.jsonl", "a", encoding="utf-8") as f:
        for i, given in zip(chosen, scores, strict=True):
            row = held_out.rows[i]
            texts = [generation.text_of(ids, tokenizer) for ids in row.responses]
            record = {"step": run.step, "prompt": tokenizer.decode(row.prompt), "responses": texts}
            f.write(json.dumps(record | {"scores": given[: len(texts)]}) + "\n")
    told = ", ".join(
        f"{score:+.2f} {generation.text_of(ids, tokenizer)[:40]!r}"
        for score, ids in zip(scores[0], held_out.rows[chosen[0]].responses, strict=False)
    )
    run.print(f"            scores, best answer first: {told}")


def read_metrics(run: "common.Run") -> tuple[list[dict], list[dict]]:
    """(training steps, evaluations)."""
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    return [x for x in lines if "lr" in x], [x for x in lines if "lr" not in x]


PANELS = (
    ("loss", ("loss",)),
    ("score of an answer", ("objective/scores",)),
    ("KL from the reference, nats an answer", ("objective/kl",)),
    ("weight of the KL", ("objective/kl_coef",)),
    ("entropy, nats an answer", ("objective/entropy",)),
    ("loss of the policy", ("loss/policy",)),
    ("loss of the value network", ("loss/value",)),
    ("value: share of the returns explained", ("val/explained_variance",)),
    ("share of ratios that are clipped", ("policy/clipfrac",)),
    ("NLL of chosen answers, nats a token", ("nll_loss",)),
    ("the loss without its regulariser", ("hinge_loss", "chain_loss")),
    ("estimate of the KL", ("kl",)),
    ("implicit rewards", ("rewards/chosen", "rewards/rejected")),
    ("reward margin", ("rewards/margins",)),
    ("pairs told apart", ("rewards/accuracies",)),
    ("log-probs", ("logps/chosen", "logps/rejected")),
    ("response tokens", ("length/chosen", "length/rejected", "length/response")),
    ("gradient norm", ("grad_norm",)),
    ("learning rate", ("lr",)),
)


def curves(run: "common.Run") -> None:
    """curves.png: training thin and pale, its moving average solid, held-out rows as dots."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    steps, evaluations = read_metrics(run)
    panels = [(t, [n for n in names if any(n in s for s in steps)]) for t, names in PANELS]
    panels = [(title, names) for title, names in panels if names]
    columns = min(4, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(3.6 * columns, 2.6 * lines), squeeze=False)
    for axis, (title, names) in zip(axes.flat, panels, strict=False):
        for name, style, colour in zip(
            names, ("-", "--", ":"), ("#0072b2", "#d55e00", "#444444"), strict=False
        ):
            points = [(s["step"], s[name]) for s in steps if s.get(name) is not None]
            if not points:
                continue
            x, y = np.array(points, float).T
            width = max(1, len(y) // 30)
            smooth = np.convolve(y, np.ones(width) / width, "valid")
            axis.plot(x, y, color=colour, alpha=0.25, linewidth=0.7)
            axis.plot(x[width - 1 :], smooth, style, color=colour, label=name.split("/")[-1])
            held = [(e["step"], e[f"eval/{name}"]) for e in evaluations if f"eval/{name}" in e]
            if held:
                axis.plot(*zip(*held, strict=True), "o", color=colour, markersize=3.5)
        axis.set_title(title, fontsize=9)
        axis.tick_params(labelsize=7)
        axis.set_xlabel("step (dots: held-out rows)", fontsize=7)
        if len(names) > 1:
            axis.legend(fontsize=7, frameon=False)
    for axis in list(axes.flat)[len(panels) :]:
        axis.axis("off")
    figure.suptitle(run.folder.name, fontsize=9)
    figure.tight_layout()
    figure.savefig(run.folder / "curves.png", dpi=110)
    plt.close(figure)


def closing(run: "common.Run", policy: Any, tokenizer: Any) -> str:
    """What improved, where the files lie, what to type next."""
    measured, reward_model = {}, hasattr(policy, "score")
    family_task = run.args.dataset.split(":")[0] == "family"
    if family_task and not (reward_model and common.beside("scoring").labels_of(run.args.model)):
        import family

        torch.manual_seed(run.args.seed)  # `tiny-untrained` is made again: with the same weights
        start = common.load_policy(
            run.args.model, run.args.dtype, run, fsdp=run.args.fsdp, name="start"
        )
        measure = family.measure_scores if reward_model else family.measure
        measured = measure(run, policy, start, tokenizer, FAMILY_PROMPTS)
    if not common.MAIN_PROCESS:
        return ""
    curves(run)
    steps, evaluations = read_metrics(run)
    seconds = sum(s["seconds_per_step"] for s in steps)
    speed = np.median([s["tokens_per_second"] for s in steps])
    peak = max(s["peak_memory_gib"] for s in steps)
    text = [
        f"{run.script.stem}: {run.step:,} steps in {seconds:,.0f} s "
        f"({speed:,.0f} tokens/s, {peak:.1f} GiB at most), "
        f"seed {run.args.seed}",
        f"{'':44}{'before':>9}{'after':>9}",
    ]

    def line(name: str, before: float | None, after: float | None, digits: int = 3) -> None:
        shown = ["" if x is None else f"{x:.{digits}f}" for x in (before, after)]
        change = "" if None in (before, after) else f"{after - before:+.{digits}f}"
        text.append(f"  {name:<42}{shown[0]:>9}{shown[1]:>9}{change:>9}".rstrip())

    if len(evaluations) > 1:
        names = "loss objective/scores objective/gold objective/kl".split()
        names += "kl rewards/accuracies rewards/margins rewards/chosen rewards/rejected".split()
        names += ["logps/chosen", "logps/rejected"]
        if "eval/rewards/margins" in evaluations[0]:  # which says it of both
            names = [name for name in names if name not in ("rewards/chosen", "rewards/rejected")]
        for name in names:
            if all(f"eval/{name}" in evaluations[i] for i in (0, -1)):
                line(f"{name}, held-out rows", *(evaluations[i][f"eval/{name}"] for i in (0, -1)))
    if measured and reward_model:
        text.append(
            f"on {measured['pairs']:,} noisily judged pairs of four answers each to "
            f"{measured['prompts']:,} unseen test questions"
        )
        line("accuracy (0.5 by chance)", None, measured["accuracy"])
        line("accuracy of the true reward itself", None, measured["ceiling"])
        line("share of what can be learned", None, measured["share"])
        line("accuracy against the true reward", None, measured["true_accuracy"])
        line("mean score of those answers", None, measured["mean_score"])
    elif measured:
        text.append(f"on {measured['prompts']:,} unseen test questions")
        line(
            "true reward, sampled at temperature 1",
            measured["sampled/before"],
            measured["sampled/after"],
        )
        line("true reward, greedy", measured["greedy/before"], measured["greedy/after"])
        line("win rate against the start, ties halved", 0.5, measured["win_rate"])
        line("KL from the start, nats an answer", 0.0, measured["kl"])
        line("length of an answer, tokens", measured["length/before"], measured["length/after"], 2)
        line(
            "control: the start at temperature 0.5",
            measured["sampled/before"],
            measured["cooled/before"],
        )
    folder = run.folder
    if measured:
        common.write_atomically(folder / "measured.json", json.dumps(measured, indent=1) + "\n")
    text += [
        f"files       {folder}: a model that plain Transformers loads,",
        "            curves.png, samples.jsonl, metrics.jsonl, run.json, checkpoint-*",
        f"next        {next_command(run)}",
    ]
    return "\n".join(text) + "\n"


def next_command(run: "common.Run") -> str:
    if run.script.stem == "sft":
        return f"python dpo.py --model {run.folder}"
    if run.script.stem == "reward_model":
        return f"python ppo.py --model {run.args.model} --reward {run.folder}"
    return f"python {run.script.name} --help, and {run.folder / 'curves.png'}"
