"""The end of a run: the exported model, and what training changed."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sampling.generate import generate, text_of
from training import model, parallel, report

FAMILY_PROMPTS = 1024  # unseen questions of the embedded task


def finish(
    run: Any,
    policy: Any,
    tokenizer: Any,
    measured: dict[str, float] | None,  # by the method itself; else on the embedded task
    load_policy: Callable,
    compute_logps: Callable,
    make_row: Callable,
) -> None:
    if wait := getattr(run.write_checkpoint, "wait", None):
        wait()  # for the last checkpoint
    model.export(policy, tokenizer, run)
    if run.args.dataset.split(":")[0] == "family" and measured is None:
        torch.manual_seed(run.args.seed)  # tiny-untrained is made again, with the same weights
        start = load_policy(run.args, run, name="start", frozen=True)

        def log_probs(lm: Any, prompts: list, answers: list) -> Tensor:
            rows = [make_row(x, [y], x) for x, y in zip(prompts, answers, strict=True)]
            order = sorted(range(len(rows)), key=lambda i: -rows[i].length())
            parts = [order[at : at + 256] for at in range(0, len(rows), 256)]
            return compute_logps(lm, rows, parts, run, "KL")[:, 0]

        measured = measure_family(run, policy, tokenizer, start, log_probs)
    if run.rank == 0:
        rows = getattr(run, "num_held_out", 0)
        report.curves(run.folder, run.folder.name, rows)
        if measured:
            (run.folder / "measured.json").write_text(json.dumps(measured, indent=1) + "\n")
        args = run.args
        script = run.script.stem
        text = report.closing(run.folder, script, args.model, run.step, args.seed, measured, rows)
        run.print(f"\n{text}".rstrip())
        (run.folder / "summary.txt").write_text(text)
    if run.tracker:
        run.tracker.close()
    parallel.stop()
    run.stop_request.uninstall()


def measure_family(
    run: Any,
    policy: Any,
    tokenizer: Any,
    start: Any,  # the policy before training
    log_probs: Callable[[Any, list, list], Tensor],  # (model, prompts, answers) -> (n,)
) -> dict[str, float]:
    """The embedded task's true reward, before and after training."""
    from family import measure

    models = {"start": start, "policy": policy}

    def ids_of(texts: list[str]) -> list[np.ndarray]:
        return [np.array(tokenizer(text).input_ids, np.int32) for text in texts]

    def sample(which, texts, temperature, seed, label, samples=1) -> tuple[list, list[str]]:
        answers = generate(
            models[which], ids_of(texts), tokenizer.stop_ids, measure.MAX_NEW_TOKENS, temperature,
            seed, run, label=label, samples=samples,
        )  # fmt: skip
        return answers, [text_of(ids, tokenizer) for ids in answers]

    def log_ratios(texts: list[str], answers: list[np.ndarray]) -> Tensor:
        prompts = ids_of(texts)
        return log_probs(policy, prompts, answers) - log_probs(start, prompts, answers)

    return measure.measure(sample, log_ratios, FAMILY_PROMPTS)
