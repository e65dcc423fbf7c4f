"""Held-out metrics and greedy samples during a run."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from sampling.generate import generate, text_of
from training.parallel import from_main

SAMPLED_PROMPTS = 4
SAMPLE_TOKENS = 128
SHOWN = (
    "loss", "rewards/accuracies", "rewards/margins", "objective/scores", "objective/gold",
    "objective/kl",
)  # fmt: skip


def evaluate(
    run: Any, losses_of: Callable, held_out: list, tokenizer: Any, collate_for: Callable
) -> None:
    """The method's own loss and metrics on held-out rows, and greedy samples, if they are due."""
    run.num_held_out = len(held_out)
    if held_out and run.due(run.args.eval_every):
        training, run.sums = run.sums, {}
        mean = float(np.mean([len(row.responses[0]) for row in held_out]))
        with torch.no_grad():
            for indexes, mine in run.share(run.held_out_rows(held_out), "held-out rows"):
                metrics = losses_of(collate_for(run.policy, held_out, indexes, mean))[1]
                run.record(metrics if mine else {})
        for name in from_main(lambda: list(run.sums)):  # another process may have had no rows
            run.sums.setdefault(name, [0.0, 0.0])
        log_held_out(run, run.reduce_metrics()[0])
        run.sums = training
    greedy_samples(run, held_out, tokenizer)


def log_held_out(run: Any, metrics: dict[str, float]) -> None:
    run.log({"step": run.step} | {f"eval/{name}": x for name, x in metrics.items()})
    shown = [f"{name} {metrics[name]:.4f}" for name in SHOWN if name in metrics]
    run.print(f"step {run.step:<6}held-out {', '.join(shown)}")


def greedy_samples(run: Any, rows: list, tokenizer: Any) -> None:
    """Greedy answers to the same few held-out prompts, to samples.jsonl and to the screen."""
    rows, policy = [row for row in rows if len(row.question)][:SAMPLED_PROMPTS], run.policy
    if not rows or tokenizer is None or not run.due(run.args.sample_every):
        return
    policy = policy["policy"] if isinstance(policy, torch.nn.ModuleDict) else policy
    longest = max(len(row.question) for row in rows)
    room = (getattr(policy.config, "max_position_embeddings", None) or 10**9) - longest
    tokens = min(SAMPLE_TOKENS, run.args.max_length, room)
    if tokens < 1:
        return
    questions, stops = [row.question for row in rows], tokenizer.stop_ids
    answers = generate(policy, questions, stops, tokens, 0.0, 0, run, label="samples")
    shown = [
        {
            "step": run.step,
            "prompt": tokenizer.decode(question),
            "response": text_of(ids, tokenizer),
            "ended": bool(len(ids)) and int(ids[-1]) in stops,
        }
        for question, ids in zip(questions, answers, strict=True)
    ]
    run.append("samples.jsonl", shown)
    question, answer = shown[0]["prompt"][-60:], shown[0]["response"][:100]
    run.print(f"            sample: ...{question!r} -> {answer!r}")
