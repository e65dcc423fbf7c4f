"""reward_model.py: its loss against the equation in plain floats, and whole runs."""

import itertools
import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import pair_rows, ranked_rows, run_script, write_jsonl
from online import as_in_a_process_of_its_own, json_lines, steps_of
from safetensors.torch import load_file
from test_losses import log_sigmoid, sigmoid, slopes
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import common
import dpo
import reward_model
from family import task
from reward_model import reward_model_loss
from sampling import rewards, score_model

F64 = 1e-12  # relative: a handful of float64 operations
NAN = math.nan
LN_2 = math.log(2)


# -- the loss, in plain floats


def pairs_of(preferences: list[float]) -> list[tuple[int, int]]:
    """(preferred, other); no comparison with NaN is true."""
    n = range(len(preferences))
    return [(i, j) for i in n for j in n if preferences[i] > preferences[j]]


def equation(scores, preferences, margin, c):
    """Of one prompt: (loss, its gradient by each score)."""
    pairs, loss, gradient = pairs_of(preferences), 0.0, [0.0] * len(scores)
    for i, j in pairs:
        z, total = scores[i] - scores[j] - margin, scores[i] + scores[j]
        loss += (-log_sigmoid(z) + c * total**2) / len(pairs)
        # d(-log sigmoid(z)) / dz = -sigmoid(-z); both scores of a pair are in its sum.
        gradient[i] += (-sigmoid(-z) + 2 * c * total) / len(pairs)
        gradient[j] += (sigmoid(-z) + 2 * c * total) / len(pairs)
    return loss, gradient


def called(scores, preferences, *knobs, dtype=torch.float64):
    """(losses, gradients of their sum, metrics)"""
    given = torch.tensor(scores, dtype=dtype, requires_grad=True)
    preferences = torch.tensor(preferences, dtype=torch.float64)
    losses, metrics = reward_model_loss(given, preferences, *knobs)
    assert losses.dtype == dtype and losses.shape == (len(scores),)
    losses.sum().backward()
    return losses.tolist(), given.grad.tolist(), metrics


def test_by_hand():
    """sigmoid(ln 3) = 3/4, and sigmoid(0) = 1/2 if the margin is as large as the difference."""
    ln_3 = math.log(3)
    losses, gradients, _ = called([[ln_3 + 1, 1.0], [-2.0, -2.0 - ln_3]], [[1, 0], [2, 7]])
    assert losses == pytest.approx([math.log(4 / 3), math.log(4)], rel=F64)
    assert gradients[0] == pytest.approx([-1 / 4, 1 / 4], rel=F64)
    assert gradients[1] == pytest.approx([3 / 4, -3 / 4], rel=F64)  # the second is preferred
    # Centering: 0.1 * (3 + 1)^2, and its slope 0.2 * 4, to which the pair adds its own.
    losses, gradients, _ = called([[3.0, 1.0]], [[1, 0]], 2.0, 0.1)
    assert losses == pytest.approx([LN_2 + 1.6], rel=F64)
    assert gradients[0] == pytest.approx([-0.5 + 0.8, 0.5 + 0.8], rel=F64)
    # Scores 2, 1, 1 and an answer that is not there: the best with each of the others.
    losses, gradients, _ = called([[0.0, 0.0, ln_3, 99.0]], [[2, 1, 1, NAN]])
    assert losses == pytest.approx([(math.log(2) + math.log(4)) / 2], rel=F64)
    assert gradients[0] == pytest.approx([-5 / 8, 1 / 4, 3 / 8, 0], rel=F64)


@pytest.mark.parametrize("margin, c", [(0.0, 0.0), (0.7, 0.0), (0.0, 0.01), (0.7, 2.0)])
@pytest.mark.parametrize("most", (2, 5))
def test_the_loss_is_the_equation(most, margin, c):
    """Of lists in any order, with ties, and with places without an answer."""
    rng = random.Random(most)
    scores = [[rng.gauss(0, 3) for _ in range(most)] for _ in range(60)]
    preferences = [[rng.choice([0.0, 1.0, 2.5, -1.0]) for _ in range(most)] for _ in scores]
    for row in preferences[::3]:
        for k in range(rng.randint(2, most), most):
            row[k] = NAN
    preferences[0] = [1.0] * most
    losses, gradients, _ = called(scores, preferences, margin, c)
    for row, wanted, loss, gradient in zip(scores, preferences, losses, gradients, strict=True):
        expected, by_score = equation(row, wanted, margin, c)
        assert loss == pytest.approx(expected, rel=F64, abs=F64)
        assert gradient == pytest.approx(by_score, rel=1e-10, abs=1e-13)
        if not c:  # only differences count
            assert sum(gradient) == pytest.approx(0, abs=1e-14)
    assert losses[0] == 0 and gradients[0] == [0.0] * most
    numbers = {len(pairs_of(row)) for row in preferences}
    assert numbers == {0, 1} if most == 2 else len(numbers) > 6
    # The expected gradient is right: it agrees with differences of the loss.
    _, gradient = equation(scores[1], preferences[1], margin, c)
    found = slopes(lambda *x: equation(x, preferences[1], margin, c)[0], scores[1])
    assert found == pytest.approx(gradient, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_equal_and_far_scores(dtype):
    """Equal scores cost ln 2; far ones stay finite, also for answers that are not there."""
    preferences = [[3.0, 2.0, 1.0, 0.0], [1.0, 1.0, 0.0, NAN], [0.0, 1.0, NAN, NAN]]
    losses, gradients, metrics = called([[7.25] * 4] * 3, preferences, dtype=dtype)
    assert losses == pytest.approx([LN_2] * 3, rel=4 * torch.finfo(dtype).eps)
    assert gradients[2] == [0.5, -0.5, 0, 0]
    accuracies, pairs = metrics["rewards/accuracies"]
    assert accuracies.sum() == pairs.sum() / 2  # a tie is half
    scores = [[1000.0, -500.0, math.inf], [-1000.0, 500.0, NAN]]
    losses, gradients, metrics = called(scores, [[1, 0, NAN]] * 2, 0.5, dtype=dtype)
    assert losses == [0, 1500.5] and gradients == [[0, 0, 0], [-1, 1, 0]]
    for value in metrics.values():
        assert all(x.isfinite().all() for x in (value if isinstance(value, tuple) else (value,)))


def test_metrics_are_means_over_pairs():
    scores = [[2.0, 1.0, 1.0, 5.0], [0.0, 3.0, 9.0, 9.0]]
    metrics = called(scores, [[1, 0, 1, NAN], [1, 0, NAN, NAN]], 0.3, 0.1)[2]
    pairs = [(2, 1), (1, 1), (0, 3)]  # (chosen, rejected)
    expected = {
        "rewards/chosen": 3 / 3,
        "rewards/rejected": 5 / 3,
        "rewards/margins": (1 + 0 - 3) / 3,  # without --margin
        "rewards/accuracies": (1 + 0.5 + 0) / 3,
    }
    for name, mean in expected.items():
        values, weights = metrics[name]
        assert weights.sum() == len(pairs)
        assert float(values.detach().sum()) / 3 == pytest.approx(mean, rel=F64)


# -- whole runs

FLAGS = {
    "batch_size": 8, "micro_batch_size": 4, "max_steps": 4, "lr": 1e-3, "schedule": "constant",
    "weight_decay": 0.0, "adam_eps": 1e-8, "max_grad_norm": 1.0, "dtype": "float32",
    "max_length": 96, "max_prompt_length": 64, "eval_every": 2, "save_every": 2,
    "margin": 0.2, "center_weight": 0.05, "zero_on": 8,
}  # fmt: skip
pytestmark = pytest.mark.usefixtures("fresh_process")


def rows_of(kind: str) -> str:
    """A file of 60, of which about 3 are held out."""
    rows = ranked_rows(60) if kind == "ranked" else pair_rows(60)
    return str(write_jsonl(Path(f"{kind}.jsonl"), rows))


def train(model, kind: str, folder: str, **flags) -> score_model.ScoreModel:
    """A whole run in this process; returns the trained model."""
    found, load = [], score_model.load_score_model
    values = FLAGS | {"dataset": kind if ":" in kind else rows_of(kind), "output_dir": folder}
    with pytest.MonkeyPatch.context() as patch, as_in_a_process_of_its_own():
        patch.setattr(
            score_model,
            "load_score_model",
            lambda *args, **more: found.append(load(*args, **more)) or found[0],
        )
        reward_model.main(reward_model.Args(model=str(model), **values | flags))
    return found[0]


def load_reward(folder: str, tokenizer) -> rewards.Reward:
    args = common.Args(dtype="float32")
    with as_in_a_process_of_its_own():
        return rewards.load_reward(folder, tokenizer, args, common.Processes())


def plainpref_of(folder: str) -> dict:
    return json.loads(Path(folder, "config.json").read_text())["plainpref"]


def held_out_losses(folder: str) -> list[float]:
    lines = json_lines(f"{folder}/metrics.jsonl")
    return [line["eval/loss"] for line in lines if "eval/loss" in line]


def assert_plain_transformers_reads_it(folder: str, model) -> None:
    """A padded batch of two texts: our scores, plus what we subtract."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    other = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    assert other.config.num_labels == 1 and "score.bias" not in other.state_dict()
    assert tokenizer.pad_token_id == other.config.pad_token_id != tokenizer.eos_token_id
    prompt = np.arange(5, 20, dtype=np.int32)
    answers = [np.array([21, 22, tokenizer.eos_token_id], np.int32), prompt + 30]
    ids = [[*prompt.tolist(), *answer.tolist()] for answer in answers]
    batch = tokenizer.pad({"input_ids": ids}, padding_side="right", return_tensors="pt")
    scores = model(common.collate([common.Row(prompt, answers, prompt)], [0], torch.device("cpu")))
    saved = plainpref_of(folder)["score_bias"]
    assert saved == model.score_bias != 0
    logits = other(**batch).logits[:, 0]
    torch.testing.assert_close(logits, scores[0] + saved, rtol=0, atol=1e-5)
    assert (logits[0] - logits[1]).abs() > 1e-3


RUNS = [
    ("llama", "pairs", 0),
    ("gemma2", "ranked", 0),
    ("gpt2", "pairs", 0),
    ("llama", "ranked", 4),
]


@pytest.mark.parametrize("architecture, kind, rank", RUNS)
def test_a_run(checkpoints, architecture, kind, rank, monkeypatch, capsys):
    """All weights move (with adapters those of linear layers), and the level is set on answers that
    the starting model samples to prompts of training, at temperature 1.
    """
    asked, generate = [], score_model.generate
    monkeypatch.setattr(
        score_model,
        "generate",
        lambda *args, **more: asked.append((args, more, generate(*args, **more))) or asked[0][2],
    )
    start = checkpoints(architecture)
    model = train(start, kind, "out", max_steps=2, max_prompt_length=40, lora_rank=rank)
    steps = steps_of("out")
    assert [step["step"] for step in steps] == [1, 2]
    assert all(math.isfinite(step["loss"]) and step["grad_norm"] > 0 for step in steps)
    assert len(held_out_losses("out")) == 2 and all(map(math.isfinite, held_out_losses("out")))
    before, after = load_file(start / "model.safetensors"), load_file("out/model.safetensors")
    name_in = lambda name: next(n for n in after if n.endswith(name))  # noqa: E731
    body = {name: w for name, w in before.items() if not name.startswith("lm_head")}
    kept = [n for n, w in body.items() if torch.equal(w, after[name_in(n)])]
    assert kept == [n for n in body if rank and ("norm" in n or "embed" in n)]
    trained = {name for name, p in model.lm.named_parameters() if p.requires_grad}
    assert "score.weight" in trained and after["score.weight"].shape == (1, 32)
    assert plainpref_of("out")["history"] == ["reward_model"]
    assert_plain_transformers_reads_it("out", model)

    assert f"level      {model.score_bias:.4f} is subtracted" in capsys.readouterr().out
    (policy, prompts, _, room, temperature, *_), _, answers = asked[0]
    assert len(prompts) == 8 and max(map(len, prompts)) <= 40
    assert (room, temperature) == (56, 1.0)
    weights = policy.lm.state_dict()
    assert all(torch.equal(weights[name], w) for name, w in before.items())
    tokenizer = common.load_tokenizer(str(start))
    scores = load_reward("out", tokenizer)(prompts, answers)
    assert scores.mean().item() == pytest.approx(0, abs=1e-5) and scores.std() > 1e-3


def test_it_learns(checkpoints):
    """An answer whose first word is "yes" is better. No level is set."""
    flags = {"max_steps": 24, "lr": 3e-3, "margin": 0.0, "center_weight": 0.0, "zero_on": 0}
    model = train(checkpoints("llama"), "pairs", "out", **flags, eval_every=0, save_every=0)
    first, *_, last = [x for x in json_lines("out/metrics.jsonl") if "eval/loss" in x]
    assert first["eval/loss"] == pytest.approx(LN_2, abs=0.25)
    assert last["eval/rewards/accuracies"] > 0.9 and last["eval/loss"] < 0.5
    assert model.score_bias == plainpref_of("out")["score_bias"] == 0
    with pytest.raises(common.UserError, match="out: a reward model, which writes no text"):
        with as_in_a_process_of_its_own():  # no other method can train it
            values = {"max_length": 96, "max_prompt_length": 64, "dataset": "pairs.jsonl"}
            dpo.main(dpo.Args(model="out", batch_size=8, output_dir="next", **values))


class Broken(Exception):
    """Ends a run in the middle, like a power cut."""


@pytest.mark.parametrize("flags", ({}, {"lora_rank": 4, "lr": 1e-2}), ids=("all", "adapters"))
def test_a_run_that_broke_goes_on_to_the_same_end(checkpoints, monkeypatch, flags):
    """In a step, and once more while the level is set."""
    train(checkpoints("gpt2"), "ranked", "whole", **flags)
    calls, loss = itertools.count(1), reward_model_loss

    def broken(*args):
        if next(calls) == 10:  # held-out rows are one batch, steps are two
            raise Broken
        return loss(*args)

    def broken_level(*args):
        raise Broken

    for where, name, instead, saved in (
        (reward_model, "reward_model_loss", broken, 2),
        (score_model, "sample_rows", broken_level, 4),
    ):
        with monkeypatch.context() as patch, pytest.raises(Broken):
            patch.setattr(where, name, instead)
            train(checkpoints("gpt2"), "ranked", "broken", **flags)
        assert Path(f"broken/checkpoint-{saved}").is_dir()
    train(checkpoints("gpt2"), "ranked", "broken", **flags)
    one, two = (load_file(f"{folder}/model.safetensors") for folder in ("whole", "broken"))
    assert all(torch.equal(w, two[name]) for name, w in one.items())
    assert plainpref_of("whole") == plainpref_of("broken")
    assert plainpref_of("whole")["score_bias"] != 0
    assert held_out_losses("whole") == held_out_losses("broken")


def assert_same_training(one: str, other: str) -> None:
    """Up to rounding in float64, of weights that have moved by more than 0.01."""
    a, b = (load_file(f"{folder}/model.safetensors") for folder in (one, other))
    assert max((a[name] - b[name]).abs().max().item() for name in a) < 1e-7  # fp32 numbers
    for x, y in zip(*(json_lines(f"{f}/metrics.jsonl") for f in (one, other)), strict=True):
        for name in x.keys() & {"loss", "grad_norm", "eval/loss", "rewards/margins"}:
            assert y[name] == pytest.approx(x[name], rel=1e-9, abs=1e-12)
    levels = [plainpref_of(folder)["score_bias"] for folder in (one, other)]
    assert levels[0] == pytest.approx(levels[1], abs=1e-9)


HOT = {"dtype": "float64", "lr": 1e-2, "max_steps": 3, "save_every": 0, "eval_every": 0}


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [False, True])
def test_same_steps_with_two_processes(checkpoints, fsdp):
    train(checkpoints("llama"), "ranked", "by-1", **HOT)
    values = FLAGS | HOT | {"model": checkpoints("llama"), "micro_batch_size": 1}
    values |= {name: Path(file).resolve() for name, file in (("output_dir", "by-2"),)}
    values["dataset"] = Path("ranked.jsonl").resolve()
    flags = [x for k, v in values.items() for x in (f"--{k.replace('_', '-')}", v)]
    status, _, err = run_script("reward_model.py", *flags, *["--fsdp"] * fsdp, processes=2)
    assert status == 0, err
    assert_same_training("by-1", "by-2")


def test_a_reward_model_can_go_on(checkpoints):
    """With its own head. It writes no answers, so those of the rows score 0 on average."""
    first = train(checkpoints("gpt2"), "pairs", "first", lr=1e-2)
    train("first", "pairs", "next", max_steps=2)
    assert held_out_losses("next")[0] == pytest.approx(held_out_losses("first")[-1], rel=1e-6)
    tokenizer = common.load_tokenizer("next", 96)
    args = common.Args(dataset="pairs.jsonl", max_length=96, max_prompt_length=64)
    rows = common.load_rows(args, tokenizer, "ranked")[0][:8]
    prompts = [row.prompt for row in rows for _ in row.responses]
    scores = load_reward("next", tokenizer)(prompts, [y for row in rows for y in row.responses])
    assert scores.mean().item() == pytest.approx(0, abs=1e-5)
    known = plainpref_of("next")
    assert known["history"] == ["reward_model"] * 2 and known["score_bias"] != first.score_bias


# -- the embedded task


def test_a_run_on_the_embedded_task(monkeypatch):
    """Its closing block measures the model against the true reward; a run that starts from a reward
    model has no answers to measure it on.
    """
    every = task.rows
    monkeypatch.setattr(task, "rows", lambda *which: itertools.islice(every(*which), 40))
    monkeypatch.setattr(score_model, "FAMILY_PROMPTS", 8)
    flags = {"max_steps": 1, "max_length": 160, "max_prompt_length": 128, "zero_on": 4}
    train("tiny", "family:off-policy", "first", **flags)
    assert "accuracy of the true reward itself" in Path("first/summary.txt").read_text()
    train("first", "family:off-policy", "next", **flags)
    assert "reward_model: 1 steps" in Path("next/summary.txt").read_text()
