"""grpo.py and rloo.py against Hugging Face TRL's GRPOTrainer and RLOOTrainer: the same prompts in
the same order, the same answers and rewards; five batches, each of them for two updates.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import all_float64, pair_rows, write_jsonl
from test_trl import plain_head_in_trl, runs, show  # noqa: F401

import grpo
import rloo
from sampling import rollouts

BATCHES, PROMPTS, SAMPLES, ROOM = 5, 4, 4, 8
# TRL's knobs. By default it multiplies the KL of GRPO by the ratio.
GRPO = {"epsilon_high": 0.05, "use_bias_correction_kl": False}
CASES = {
    "grpo": GRPO | {"loss_type": "grpo"},
    "dapo": GRPO | {"loss_type": "dapo"},
    "dr-grpo": GRPO | {"loss_type": "dr_grpo", "scale_rewards": "none"},
    "rloo": {},
}


def answers(prompt) -> list[list[int]]:
    """To a prompt's ids: of 1 to 8 tokens."""
    rng = np.random.default_rng([int(x) for x in prompt])
    return [rng.integers(10, 200, rng.integers(1, ROOM + 1)).tolist() for _ in range(SAMPLES)]


def reward_of(answer) -> float:
    return float(sum(int(x) for x in answer) % 7)


@pytest.fixture(autouse=True)
def given(runs, monkeypatch) -> None:  # noqa: F811 - a fixture of test_trl.py
    """Our answers and rewards."""

    def sampled(_, prompts, *rest, **more):
        return [np.array(y) for prompt in prompts for y in answers(prompt)]

    def scored(_, rollout):
        return torch.tensor([reward_of(y) for y in rollout.responses], dtype=torch.float64)

    monkeypatch.setattr(rollouts, "generate", sampled)
    monkeypatch.setattr(rollouts.Online, "final_scores", scored)
    monkeypatch.setattr(rollouts.Online, "evaluate", lambda *_: None)


def steps_here(case: str, start, rows: list[dict], started) -> tuple[list[dict], list[dict]]:
    """What is logged after each batch, and the rows in the order in which they were used."""
    write_jsonl(Path("rows.jsonl"), rows)
    write_jsonl(Path("held-out.jsonl"), [{"prompt": "another"}])
    Path("judge.py").write_text("def score(prompts, responses):\n    return [0.0] * len(prompts)\n")
    method, knobs = grpo, {"normalise": case, "clip_low": 0.02, "clip_high": 0.05}
    if case == "rloo":
        method, knobs = rloo, {"clip_range": 0.02}
    method.main(
        method.Args(
            model=str(start), dataset="rows.jsonl", eval_dataset="held-out.jsonl",
            output_dir="here", reward="judge.py:score", lr=1e-3, schedule="constant",
            warmup_ratio=0.0, weight_decay=0.0, max_grad_norm=1.0, dtype="float64",
            batch_size=PROMPTS, micro_batch_size=6, max_steps=BATCHES, samples=SAMPLES,
            kl_coef=0.1, batch_epochs=2, minibatches=1, temperature=1.0,
            max_length=40 + ROOM, max_prompt_length=40, **knobs,
        )
    )  # fmt: skip
    order = [sorted(i for part in started[0].step_rows(n) for i in part) for n in range(BATCHES)]
    return [x for x in started[0].logged if "lr" in x], [rows[i] for part in order for i in part]


def steps_of_trl(case: str, start, rows: list[dict]) -> list[dict]:
    """Of each batch: the mean loss of its two updates, and the second one's gradient norm."""
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    name = "RLOO" if case == "rloo" else "GRPO"

    class Trainer(getattr(trl, f"{name}Trainer")):
        losses = []

        def _generate_single_turn(self, prompt_ids, *_):
            found = [answers(ids)[i % SAMPLES] for i, ids in enumerate(prompt_ids)]
            return found if name == "RLOO" else (found, None)

        def _calculate_rewards(self, *args):  # in fp32 there
            return super()._calculate_rewards(*args).double()

        def compute_loss(self, *args, **more):
            loss = super().compute_loss(*args, **more)
            self.losses.append(float(loss.detach()))
            return loss

    config = getattr(trl, f"{name}Config")(
        output_dir="trl", report_to="none", logging_steps=1, save_strategy="no", disable_tqdm=True,
        learning_rate=1e-3, lr_scheduler_type="constant", warmup_steps=0, optim="adamw_torch",
        weight_decay=0.0, max_grad_norm=1.0, bf16=False, use_cpu=True, gradient_checkpointing=False,
        per_device_train_batch_size=PROMPTS * SAMPLES, gradient_accumulation_steps=1,
        max_steps=2 * BATCHES, max_completion_length=ROOM, num_generations=SAMPLES,
        num_iterations=2, shuffle_dataset=False, temperature=1.0, beta=0.1, epsilon=0.02,
        **CASES[case],
    )  # fmt: skip
    trainer = Trainer(
        model=AutoModelForCausalLM.from_pretrained(start).to(torch.float64),
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(start),
        reward_funcs=lambda completion_ids, **_: [reward_of(y) for y in completion_ids],
    )
    trainer.train()
    norms = [x["grad_norm"] for x in trainer.state.log_history if "loss" in x][1::2]
    losses = np.array(trainer.losses).reshape(BATCHES, 2).mean(1).tolist()
    return [{"loss": x, "grad_norm": y} for x, y in zip(losses, norms, strict=True)]


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("case", CASES)
def test_five_batches(case, checkpoints, runs, plain_head_in_trl):  # noqa: F811
    """In float64. TRL still computes something in fp32: 2e-8 was seen in a loss, 1e-6 in a norm."""
    rows = [{"prompt": row["prompt"]} for row in pair_rows(BATCHES * PROMPTS)]
    with all_float64():
        ours, rows = steps_here(case, checkpoints("llama"), rows, runs)
        theirs = steps_of_trl(case, checkpoints("llama"), rows)
    show(ours, theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=0, abs=1e-7)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-5, abs=1e-6)
    if case != "rloo":
        assert 0 < ours[0]["policy/clipfrac"] < 1 and ours[-1]["loss/kl"] > 1e-3
