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
from family import measure, task
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
    """Also over micro-batches with other numbers of pairs: sums and counts are added up."""
    rng = random.Random(3)
    scores = [[rng.gauss(0, 1) for _ in range(4)] for _ in range(12)]
    preferences = [[rng.choice([0.0, 1.0, 2.0]) for _ in range(4)] for _ in scores]
    preferences[5][2:], preferences[6] = [NAN, NAN], [1.0] * 4
    scores[0][1], preferences[0][:2] = scores[0][0], [1.0, 0.0]  # a tie
    sums: dict[str, np.ndarray] = {}
    for rows in (slice(0, 2), slice(2, 9), slice(9, 12)):
        for name, value in called(scores[rows], preferences[rows], 0.3, 0.1)[2].items():
            values, weights = value if isinstance(value, tuple) else (value, torch.ones_like(value))
            sums[name] = sums.get(name, 0) + np.array([float(values.sum()), float(weights.sum())])
    wanted = list(zip(scores, preferences, strict=True))
    pairs = [(row[i], row[j]) for row, order in wanted for i, j in pairs_of(order)]
    mean = lambda values: math.fsum(values) / len(pairs)  # noqa: E731
    expected = {
        "loss": math.fsum(equation(row, order, 0.3, 0.1)[0] for row, order in wanted) / 12,
        "rewards/chosen": mean(a for a, _ in pairs),
        "rewards/rejected": mean(b for _, b in pairs),
        "rewards/margins": mean(a - b for a, b in pairs),  # without --margin
        "rewards/accuracies": mean((a > b) + (a == b) / 2 for a, b in pairs),
    }
    found = {name: total / count for name, (total, count) in sums.items()}
    assert found == pytest.approx(expected, rel=F64)


# -- whole runs

FLAGS = {
    "batch_size": 8, "micro_batch_size": 4, "max_steps": 4, "lr": 1e-3, "schedule": "constant",
    "weight_decay": 0.0, "adam_eps": 1e-8, "max_grad_norm": 1.0, "dtype": "float32",
    "max_length": 96, "max_prompt_length": 64, "eval_every": 2, "save_every": 2,
    "margin": 0.2, "center_weight": 0.05, "zero_on": 8,
}  # fmt: skip
pytestmark = pytest.mark.usefixtures("fresh_process")


def as_dialogue(row: dict) -> dict:
    says = lambda text: [{"role": "assistant", "content": text.strip()}]  # noqa: E731
    ask = [{"role": "user", "content": row["prompt"]}]
    if "chosen" in row:
        return {side: ask + says(row[side]) for side in ("chosen", "rejected")}
    return row | {"prompt": ask, "responses": [says(text) for text in row["responses"]]}


def rows_of(kind: str) -> str:
    """A file of 60, of which about 3 are held out."""
    rows = ranked_rows(60) if "ranked" in kind else pair_rows(60)
    rows = [as_dialogue(row) for row in rows] if "dialogues" in kind else rows
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
    ("llama", "pairs"), ("gemma2", "ranked"), ("gpt2", "pairs"), ("qwen2", "dialogues"),
    ("qwen2", "ranked-dialogues"),
]  # fmt: skip


@pytest.mark.parametrize("architecture, kind", RUNS)
def test_a_run(checkpoints, architecture, kind, monkeypatch, capsys):
    """All weights move, and the level is set on answers that the starting model samples to prompts
    of training, at temperature 1.
    """
    asked, generate = [], score_model.generate
    monkeypatch.setattr(
        score_model,
        "generate",
        lambda *args, **more: asked.append((args, more, generate(*args, **more))) or asked[0][2],
    )
    start = checkpoints(architecture)
    model = train(start, kind, "out", max_steps=2, max_prompt_length=40)
    steps = steps_of("out")
    assert [step["step"] for step in steps] == [1, 2]
    assert all(math.isfinite(step["loss"]) and step["grad_norm"] > 0 for step in steps)
    assert len(held_out_losses("out")) == 2 and all(map(math.isfinite, held_out_losses("out")))
    before, after = load_file(start / "model.safetensors"), load_file("out/model.safetensors")
    name_in = lambda name: next(n for n in after if n.endswith(name))  # noqa: E731
    body = {name: w for name, w in before.items() if not name.startswith("lm_head")}
    assert [n for n, w in body.items() if torch.equal(w, after[name_in(n)])] == []
    assert after["score.weight"].shape == (1, 32)
    assert plainpref_of("out")["history"] == ["reward_model"]
    assert_plain_transformers_reads_it("out", model)

    assert f"level      {model.score_bias:.4f} is subtracted" in capsys.readouterr().out
    (policy, prompts, _, room), more, answers = asked[0]
    assert len(prompts) == 8 and max(map(len, prompts)) <= 40 and room == 56
    assert more["temperature"] == 1.0
    weights = policy.lm.state_dict()
    assert all(torch.equal(weights[name], w) for name, w in before.items())
    tokenizer = common.load_tokenizer(str(start))
    scores = load_reward("out", tokenizer)(prompts, answers)
    assert scores.mean().item() == pytest.approx(0, abs=1e-5) and scores.std() > 1e-3


def test_it_learns(checkpoints):
    """An answer whose first word is "yes" is better."""
    flags = {"max_steps": 24, "lr": 3e-3, "margin": 0.0, "center_weight": 0.0, "zero_on": 0}
    model = train(checkpoints("llama"), "pairs", "out", **flags, eval_every=0, save_every=0)
    first, *_, last = [x for x in json_lines("out/metrics.jsonl") if "eval/loss" in x]
    assert first["eval/loss"] == pytest.approx(LN_2, abs=0.25)
    assert last["eval/rewards/accuracies"] > 0.9 and last["eval/loss"] < 0.5
    assert last["eval/rewards/chosen"] > last["eval/rewards/rejected"] + 1
    assert model.score_bias == plainpref_of("out")["score_bias"] == 0  # --zero-on 0
    assert "next        python ppo.py --model" in Path("out/summary.txt").read_text()
    # It writes no text, so it can be neither trained by another method nor its reference.
    for more in ({"model": "out"}, {"model": str(checkpoints("llama")), "ref_model": "out"}):
        values = {"dataset": rows_of("pairs"), "batch_size": 8, "max_length": 96}
        values |= {"max_prompt_length": 64, "output_dir": "next", "resume": "never"}
        with pytest.raises(common.UserError, match="out: a reward model, which writes no text"):
            with as_in_a_process_of_its_own():
                dpo.main(dpo.Args(**values | more))


@pytest.mark.parametrize("architecture, kind", [("llama", "pairs"), ("gpt2", "ranked")])
def test_adapters(checkpoints, architecture, kind):
    """The head is trained; the merged folder and the adapter score like the trained model."""
    import peft

    start = checkpoints(architecture)
    model = train(start, kind, "out", lora_rank=4, lr=1e-2)
    trained = {name for name, p in model.lm.named_parameters() if p.requires_grad}
    adapters = {name for name, _ in model.lm.named_parameters() if ".lora_" in name}
    assert adapters and trained == adapters | {"score.weight"}
    assert_plain_transformers_reads_it("out", model)
    saved = load_file("out/model.safetensors")
    assert not any("lora" in name or "base_layer" in name for name in saved)

    ids = torch.arange(3, 40)[None]
    base = AutoModelForSequenceClassification.from_pretrained(start, num_labels=1)
    loaded = peft.PeftModel.from_pretrained(base, "out/adapter").eval()
    merged = AutoModelForSequenceClassification.from_pretrained("out").eval()
    base.config.pad_token_id = merged.config.pad_token_id
    with torch.no_grad():
        by_adapter, by_folder = loaded(input_ids=ids).logits, merged(input_ids=ids).logits
    torch.testing.assert_close(by_adapter, by_folder, rtol=1e-4, atol=1e-4)


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
        (score_model, "mean_sample_score", broken_level, 4),
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


@pytest.mark.parametrize("kind", ["pairs", "ranked"])
def test_same_steps_with_other_micro_batches(checkpoints, kind):
    for size in (8, 2):
        train(checkpoints("llama"), kind, f"of-{size}", **HOT, micro_batch_size=size)
    assert_same_training("of-8", "of-2")


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


@pytest.mark.parametrize("flags", ({}, {"lora_rank": 4, "dtype": "bfloat16"}), ids=str)
def test_a_reward_model_can_go_on(checkpoints, flags):
    """With its own head. It writes no answers, so those of the rows score 0 on average."""
    first = train(checkpoints("gpt2"), "pairs", "first", lr=1e-2)
    train("first", "pairs", "next", max_steps=2, **flags)
    losses = held_out_losses("first")[-1], held_out_losses("next")[0]
    assert losses[1] == pytest.approx(losses[0], rel=2e-2 if flags else 1e-6)
    tokenizer = common.load_tokenizer("next", 96)
    args = common.Args(dataset="pairs.jsonl", max_length=96, max_prompt_length=64)
    rows = common.load_rows(args, tokenizer, "ranked")[0][:8]
    prompts = [row.prompt for row in rows for _ in row.responses]
    scores = load_reward("next", tokenizer)(prompts, [y for row in rows for y in row.responses])
    assert scores.mean().item() == pytest.approx(0, abs=0.1 if flags else 1e-5)
    known = plainpref_of("next")
    assert known["history"] == ["reward_model"] * 2 and known["score_bias"] != first.score_bias
    train("first", "pairs", "no-level", max_steps=1, zero_on=0)
    assert plainpref_of("no-level")["score_bias"] == 0  # not that of the model before


@pytest.mark.parametrize("margin, eps", [(-0.1, 1e-8), (NAN, 1e-8), (0.0, 0.0)])
def test_flags_that_mean_nothing(checkpoints, margin, eps):
    with pytest.raises(common.UserError, match="--margin|--adam-eps"):
        train(checkpoints("llama"), "pairs", "out", margin=margin, adam_eps=eps)


# -- the embedded task


@pytest.mark.parametrize("sign", (1, -1, 0))
def test_measured_on_the_embedded_task(sign):
    """The true reward reaches the ceiling; a constant is right half the time."""

    def sample(which, texts, temperature, seed, label, samples=1):
        rng = random.Random(seed)
        right = [task.write(task.right_answer(text)) for text in texts for _ in range(samples)]
        written = [rng.choice([x, x + ", Zoe", " Zoe", " Ada"]) for x in right]
        return written, written

    def score(prompts, answers):
        return [sign * x for x in task.reward(prompts, answers)]

    found = measure.measure_scores(sample, score, 24)
    assert found["prompts"] == 24 and 24 < found["pairs"] < 6 * 24 and 0.6 < found["ceiling"] <= 1
    assert found["share"] == pytest.approx(sign, abs=1e-12)
    assert found["accuracy"] == pytest.approx(0.5 + sign * (found["ceiling"] - 0.5))
    assert found["true_accuracy"] == pytest.approx((1 + sign) / 2)


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


# -- TRL


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("margin, c", [(None, None), (0.4, 0.07)])
def test_the_loss_is_that_of_trl(checkpoints, margin, c):
    """TRL's RewardTrainer tokenises, pads and reads the score with its own code."""
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    model = train(checkpoints("llama"), "pairs", "out", zero_on=0)
    raws = pair_rows(9, seed=4)
    tokenizer = common.load_tokenizer("out", 96)
    args = common.Args(dataset=str(write_jsonl(Path("p.jsonl"), raws)), max_length=96)
    rows = common.load_rows(args, tokenizer, "ranked")[0]
    batch = common.collate(rows, list(range(9)), torch.device("cpu"))
    with torch.no_grad():
        losses, metrics = reward_model_loss(model(batch), batch.scores, margin or 0.0, c or 0.0)
    config = RewardConfig(
        output_dir="trl", report_to="none", bf16=False, use_cpu=True, disable_tqdm=True,
        gradient_checkpointing=False, center_rewards_coefficient=c, max_length=96,
    )  # fmt: skip
    data = [row | ({} if margin is None else {"margin": margin}) for row in raws]
    trainer = RewardTrainer(
        model="out",
        args=config,
        train_dataset=Dataset.from_list(data),
        processing_class=AutoTokenizer.from_pretrained("out"),
    )
    examples = [trainer.train_dataset[i] for i in range(9)]
    for example, row in zip(examples, rows, strict=True):
        both = [example["chosen_ids"], example["rejected_ids"]]
        assert both == [[*row.prompt.tolist(), *y.tolist()] for y in row.responses]
    theirs = trainer.compute_loss(trainer.model.eval().float(), trainer.data_collator(examples))
    assert losses.mean().item() == pytest.approx(theirs.item(), rel=0, abs=1e-6)
    right, pairs = metrics["rewards/accuracies"]
    logged = trainer._metrics["eval"]["accuracy"][0]
    assert float(right.sum() / pairs.sum()) == pytest.approx(logged)
