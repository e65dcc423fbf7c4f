"""reward_model.py: its loss against the equation in plain floats, and whole runs."""

import itertools
import json
import math
import random
from pathlib import Path

import pytest
import torch
from conftest import ROOT, pair_rows, ranked_rows, run_script, write_jsonl
from safetensors.torch import load_file
from test_losses import log_sigmoid, sigmoid, slopes
from test_methods import SEVERAL, as_dialogue
from test_train import (
    HOT,
    OWN,
    SMALL,
    Broken,
    _as_in_a_fresh_process,  # noqa: F401 (used by its name)
    assert_same_log,
    assert_same_run,
    at_loss_call,
    break_down,
    checkpoints_in,
    in_step,
    lines_of,
    plain,  # noqa: F401
    steps_of,
    train,
)
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import common
import dpo
import generation
import reward_model
import scoring
from reward_model import reward_model_loss

F64 = 1e-12  # relative: a handful of float64 operations
NAN = math.nan
LN_2 = math.log(2)
OWN.setdefault("reward_model", {"margin": 0.2, "center_weight": 0.05, "zero_on": 8})


# -- the loss, in plain floats


def pairs_of(preferences: list[float]) -> list[tuple[int, int]]:
    """(preferred, other); NaN is more than nothing."""
    n = range(len(preferences))
    return [(i, j) for i in n for j in n if preferences[i] > preferences[j]]


def equation(scores, preferences, margin, c):
    """Of one prompt: (loss, its gradient by each score)."""
    pairs, loss, gradient = pairs_of(preferences), 0.0, [0.0] * len(scores)
    for i, j in pairs:
        margin_, total = scores[i] - scores[j] - margin, scores[i] + scores[j]
        loss += (-log_sigmoid(margin_) + c * total**2) / len(pairs)
        # d(-log sigmoid(z)) / dz = -sigmoid(-z); both scores of a pair are in its sum.
        gradient[i] += (-sigmoid(-margin_) + 2 * c * total) / len(pairs)
        gradient[j] += (sigmoid(-margin_) + 2 * c * total) / len(pairs)
    return loss, gradient


def called(scores, preferences, *knobs, dtype=torch.float64):
    """(losses, gradients of their sum, metrics)."""
    given = torch.tensor(scores, dtype=dtype, requires_grad=True)
    losses, metrics = reward_model_loss(
        given, torch.tensor(preferences, dtype=torch.float64), *knobs
    )
    assert losses.dtype == dtype and losses.shape == (len(scores),)
    losses.sum().backward()
    return losses.tolist(), given.grad.tolist(), metrics


def test_by_hand():
    """sigmoid(ln 3) = 3/4, and sigmoid(0) = 1/2 where the margin is as large as the difference."""
    ln_3 = math.log(3)
    losses, gradients, _ = called([[ln_3 + 1, 1.0], [-2.0, -2.0 - ln_3]], [[1, 0], [2, 7]])
    assert losses == pytest.approx([math.log(4 / 3), math.log(4)], rel=F64)
    assert gradients[0] == pytest.approx([-1 / 4, 1 / 4], rel=F64)
    assert gradients[1] == pytest.approx([3 / 4, -3 / 4], rel=F64)  # the second is preferred
    losses, gradients, _ = called([[ln_3 + 1, 1.0]], [[1, 0]], ln_3)
    assert losses == pytest.approx([LN_2], rel=F64)
    assert gradients[0] == pytest.approx([-1 / 2, 1 / 2], rel=F64)
    # Centring: 0.1 * (3 + 1)^2, and its slope 0.2 * 4, to which the pair adds its own.
    losses, gradients, _ = called([[3.0, 1.0]], [[1, 0]], 2.0, 0.1)
    assert losses == pytest.approx([LN_2 + 1.6], rel=F64)
    assert gradients[0] == pytest.approx([-0.5 + 0.8, 0.5 + 0.8], rel=F64)


def test_a_list_by_hand():
    """Scores 2, 1, 1 and one that is not there: two pairs, of the best with each of the others."""
    losses, gradients, _ = called([[0.0, 0.0, math.log(3), 99.0]], [[2, 1, 1, NAN]])
    # -log sigmoid(0) = ln 2 and -log sigmoid(-ln 3) = ln 4; the slopes are 1/2 and 3/4.
    assert losses == pytest.approx([(math.log(2) + math.log(4)) / 2], rel=F64)
    assert gradients[0] == pytest.approx([-5 / 8, 1 / 4, 3 / 8, 0], rel=F64)


@pytest.mark.parametrize("c", (0.0, 0.01, 2.0))
@pytest.mark.parametrize("margin", (0.0, 0.7))
@pytest.mark.parametrize("most", (2, 5))
def test_the_loss_is_the_equation(most, margin, c):
    """Of lists in any order, with ties, and with places where no answer is."""
    rng = random.Random(most)
    scores = [[rng.gauss(0, 3) for _ in range(most)] for _ in range(60)]
    preferences = [[rng.choice([0.0, 1.0, 2.5, -1.0]) for _ in range(most)] for _ in scores]
    for row in preferences[::3]:
        for k in range(rng.randint(2, most), most):
            row[k] = NAN
    preferences[0] = [1.0] * most
    losses, gradients, _ = called(scores, preferences, margin, c)
    kinds = set()
    for row, wanted, loss, gradient in zip(scores, preferences, losses, gradients, strict=True):
        expected, by_score = equation(row, wanted, margin, c)
        kinds.add(len(pairs_of(wanted)))
        assert loss == pytest.approx(expected, rel=F64, abs=F64)
        assert gradient == pytest.approx(by_score, rel=1e-10, abs=1e-13)
        if not c:  # only differences count
            assert sum(gradient) == pytest.approx(0, abs=1e-14)
    assert losses[0] == 0 and gradients[0] == [0.0] * most
    assert kinds == {0, 1} if most == 2 else len(kinds) > 6


def test_gradient_of_the_equation():
    """The gradients expected above are right: they agree with differences of the loss."""
    scores, preferences = [0.3, -1.2, 0.9, 2.0], [1.0, 0.0, 2.0, 1.0]
    _, gradient = equation(scores, preferences, 0.4, 0.3)
    found = slopes(lambda *x: equation(x, preferences, 0.4, 0.3)[0], scores)
    assert found == pytest.approx(gradient, rel=1e-8)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_equal_scores_cost_ln_2(dtype):
    """Whatever the level and the number of pairs."""
    preferences = [[3.0, 2.0, 1.0, 0.0], [1.0, 1.0, 0.0, NAN], [0.0, 1.0, NAN, NAN]]
    losses, gradients, metrics = called([[7.25] * 4] * 3, preferences, dtype=dtype)
    assert losses == pytest.approx([LN_2] * 3, rel=4 * torch.finfo(dtype).eps)
    assert gradients[2] == [0.5, -0.5, 0, 0]
    accuracies, pairs = metrics["rewards/accuracies"]
    assert accuracies.sum() == pairs.sum() / 2  # not told apart: half


@pytest.mark.parametrize("c", (0.01, 1.5))
def test_centring_alone_pulls_the_sum_to_0(c):
    """Where a pair is told apart so far that its own slope is nothing."""
    (loss,), (gradient,), _ = called([[700.0, -680.0]], [[1, 0]], 0.0, c)
    assert loss == pytest.approx(c * 400, rel=F64)
    assert gradient == pytest.approx([2 * c * 20] * 2, rel=F64)
    (loss,), (gradient,), _ = called([[700.0, -700.0]], [[1, 0]], 0.0, c)
    assert (loss, gradient) == (0, [0, 0])


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_far_scores_stay_finite(dtype):
    """A straight line where exp would be infinite; an answer that is not there may have any."""
    scores = [[1000.0, -500.0, math.inf], [-1000.0, 500.0, NAN]]
    losses, gradients, metrics = called(scores, [[1, 0, NAN]] * 2, 0.5, dtype=dtype)
    assert losses == [0, 1500.5]
    assert gradients == [[0, 0, 0], [-1, 1, 0]]
    for value in metrics.values():
        for part in value if isinstance(value, tuple) else (value,):
            assert part.isfinite().all()


def test_metrics_are_means_over_pairs():
    """Also over micro-batches that have other numbers of them: sums and counts are added up."""
    rng = random.Random(3)
    scores = [[rng.gauss(0, 1) for _ in range(4)] for _ in range(12)]
    preferences = [[rng.choice([0.0, 1.0, 2.0]) for _ in range(4)] for _ in scores]
    preferences[5][2:], preferences[6] = [NAN, NAN], [1.0] * 4
    scores[0][1] = scores[0][0]  # a pair that is not told apart
    preferences[0][:2] = [1.0, 0.0]
    run = common.Run.__new__(common.Run)
    run.sums = {}
    for rows in (slice(0, 2), slice(2, 9), slice(9, 12)):
        _, _, metrics = called(scores[rows], preferences[rows], 0.3, 0.1)
        assert metrics.keys() == {
            "loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies",
        }  # fmt: skip
        run.add(metrics)
    found = {name: float(total / count) for name, (total, count) in run.sums.items()}
    pairs = [
        (row[i], row[j])
        for row, wanted in zip(scores, preferences, strict=True)
        for i, j in pairs_of(wanted)
    ]
    mean = lambda values: math.fsum(values) / len(pairs)  # noqa: E731
    losses = [
        equation(row, wanted, 0.3, 0.1)[0] for row, wanted in zip(scores, preferences, strict=True)
    ]
    assert found == pytest.approx(
        {
            "loss": math.fsum(losses) / 12,
            "rewards/chosen": mean(a for a, _ in pairs),
            "rewards/rejected": mean(b for _, b in pairs),
            "rewards/margins": mean(a - b for a, b in pairs),  # reported without the margin
            "rewards/accuracies": mean((a > b) + (a == b) / 2 for a, b in pairs),
        },
        rel=F64,
    )


# -- whole runs


@pytest.fixture(scope="session")
def rows(tmp_path_factory):
    """rows(kind) -> a file of 60 of which 3 are held out."""
    folder = tmp_path_factory.mktemp("reward-rows")
    made = {
        "pairs": pair_rows(60),
        "ranked": ranked_rows(60),
        "dialogues": [as_dialogue(row) for row in pair_rows(60)],
        "ranked dialogues": [as_dialogue(row) for row in ranked_rows(60)],
    }
    files = {kind: write_jsonl(folder / f"{kind}.jsonl", made[kind]) for kind in made}
    return files.__getitem__


@pytest.fixture
def kept(monkeypatch):
    """Of the last run: kept["model"], and the (prompts, answers) that its level was set on."""
    found, load, draw = {}, scoring.load_score_model, generation.generate

    def keep(*args, **more):
        found["model"] = load(*args, **more)
        found["before"] = {n: p.detach().clone() for n, p in found["model"].named_parameters()}
        return found["model"]

    def keep_answers(policy, prompts, *args, **more):
        answers = draw(policy, prompts, *args, **more)
        if more.get("label") == "answers to zero on":
            found["asked"] = prompts, answers
        return answers

    monkeypatch.setattr(scoring, "load_score_model", keep)
    monkeypatch.setattr(generation, "generate", keep_answers)
    return found


def assert_plain_transformers_reads_it(folder: str | Path, model, file: Path) -> None:
    """A padded batch of two answers of other lengths: our scores, plus what we subtract."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    other = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    assert other.config.num_labels == 1 and other.config.architectures[0].endswith(
        "ForSequenceClassification"
    )
    pad = tokenizer.pad_token_id
    assert pad == other.config.pad_token_id != tokenizer.eos_token_id
    ours = common.load_tokenizer(str(folder), 96)
    assert pad not in ours.stop_ids
    held_out = common.load_rows(str(file), None, "ranked", ours, 96, 64)[1]
    lengths = [len(row.prompt) + len(row.responses[0]) for row in held_out.rows]
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    chosen = [held_out.rows[i] for i in (order[0], order[-1])]
    texts = [[*row.prompt.tolist(), *row.responses[0].tolist()] for row in chosen]
    assert len(texts[0]) < len(texts[1])
    batch = tokenizer.pad({"input_ids": texts}, padding_side="right", return_tensors="pt")
    with torch.no_grad():
        logits = other(**batch).logits[:, 0]
        micro = common.collate(common.Rows("two", chosen), [0, 1], torch.device("cpu"))
        scores = scoring.response_scores(model, micro)[:, 0]
    saved = json.loads((Path(folder) / "config.json").read_text())["plainpref"]["score_bias"]
    assert saved == model.score_bias != 0
    torch.testing.assert_close(logits, scores + saved, rtol=0, atol=1e-5)
    assert (logits[0] - logits[1]).abs() > 1e-3


RUNS = [
    ("llama", "pairs"),
    ("llama", "ranked"),
    ("gemma2", "ranked"),
    ("gpt2", "pairs"),
    ("gpt2", "ranked"),
    ("qwen2", "dialogues"),
    ("qwen2", "ranked dialogues"),
]


@pytest.mark.parametrize("architecture, kind", RUNS)
def test_two_steps(checkpoints, rows, plain, kept, capsys, architecture, kind):  # noqa: F811
    start = checkpoints(architecture)
    flags = {"max_steps": 2, "max_length": 96, "max_prompt_length": 64}
    assert train(reward_model, start, rows(kind), "out", **flags) == 0
    steps = steps_of("out")
    assert [step["step"] for step in steps] == [1, 2]
    assert all(math.isfinite(step["loss"]) and step["grad_norm"] > 0 for step in steps)
    assert all(0 <= step["rewards/accuracies"] <= 1 for step in steps)
    evaluations = [line["eval/loss"] for line in lines_of("out") if "eval/loss" in line]
    assert len(evaluations) == 2 and all(map(math.isfinite, evaluations))
    before, after = load_file(start / "model.safetensors"), load_file("out/model.safetensors")
    name_in = lambda name: next((n for n in after if n.endswith(name)), None)  # noqa: E731
    body = {name: w for name, w in before.items() if not name.startswith("lm_head")}
    assert [n for n, w in body.items() if torch.equal(w, after[name_in(n)])] == []
    assert after["score.weight"].shape == (1, 32) and "score.bias" not in after
    assert json.loads(Path("out/config.json").read_text())["plainpref"]["history"] == [
        "reward_model"
    ]
    assert_plain_transformers_reads_it("out", kept["model"], rows(kind))

    # Its level: what it began from scores 0, as far as it was asked.
    prompts, answers = kept["asked"]
    assert len(prompts) == len(answers) == 8
    told = capsys.readouterr().out
    assert f"level      {kept['model'].score_bias:.4f} is subtracted: answers of" in told
    run = common.Processes()
    tokenizer = common.load_tokenizer(str(start), 96)  # the policy's
    reward = scoring.load_reward("out", tokenizer, run, "float32")
    assert reward.same_tokens
    scores = reward(prompts, answers)
    assert scores.mean().item() == pytest.approx(0, abs=1e-5) and scores.std() > 1e-3


def test_the_samples_to_zero_on_are_the_starting_models(checkpoints, rows, plain, kept):  # noqa: F811
    """Not the trained weights', at temperature 1, to prompts of training, no longer than asked."""
    start = checkpoints("llama")
    flags = {"max_steps": 2, "lr": 1e-2, "max_prompt_length": 12, "zero_on": 20, "seed": 3}
    assert train(reward_model, start, rows("pairs"), "out", **flags) == 0
    prompts, answers = kept["asked"]
    assert len(prompts) == 20 and max(map(len, prompts)) == 12 and min(map(len, prompts)) < 12
    run, tokenizer = common.Processes(), common.load_tokenizer(str(start), 64)
    assert {int(prompt[0]) for prompt in prompts} == set(tokenizer.bos)
    policy = common.load_policy(str(start), "float32", run)
    again = generation.generate(policy, prompts, tokenizer.stop_ids, 64 - 12, 1.0, 3, run)
    assert [y.tolist() for y in again] == [y.tolist() for y in answers]


def test_the_level_can_be_left(checkpoints, rows, plain, kept, capsys):  # noqa: F811
    assert train(reward_model, checkpoints("llama"), rows("pairs"), "out", zero_on=0) == 0
    assert "level " not in capsys.readouterr().out and "asked" not in kept
    assert json.loads(Path("out/config.json").read_text())["plainpref"].get("score_bias", 0) == 0
    assert kept["model"].score_bias == 0


def test_it_learns(checkpoints, rows, kept):
    """Whose first word is "yes" is better; with curves and samples, as a run has them."""
    flags = {"max_steps": 24, "lr": 3e-3, "epochs": None, "eval_every": 0, "save_every": 0}
    flags |= {"margin": 0.0, "center_weight": 0.0}
    assert train(reward_model, checkpoints("llama"), rows("pairs"), "out", **flags) == 0
    first, *_, last = [line for line in lines_of("out") if "eval/loss" in line]
    assert first["eval/loss"] == pytest.approx(LN_2, abs=0.25)
    steps = steps_of("out")[-5:]
    assert sum(step["rewards/accuracies"] for step in steps) / len(steps) > 0.9
    assert last["eval/rewards/accuracies"] > 0.9 and last["eval/loss"] < 0.5
    assert last["eval/rewards/chosen"] > last["eval/rewards/rejected"] + 1
    samples = [json.loads(line) for line in Path("out/samples.jsonl").read_text().splitlines()]
    assert {sample["step"] for sample in samples} == {0, 24}
    for sample in samples[-3:]:
        yes, no = sample["responses"]
        assert yes.startswith(" yes ") and no.startswith(" no ")
        assert sample["scores"][0] > sample["scores"][1]
    files = {p.name for p in Path("out").iterdir()}
    assert {"curves.png", "summary.txt", "reward_model.py", "scoring.py", "generation.py"} <= files
    summary = Path("out/summary.txt").read_text()
    assert "rewards/accuracies, held-out rows" in summary
    assert "next        python ppo.py --model " in summary and "--reward out" in summary


@pytest.mark.parametrize("architecture, kind", [("llama", "pairs"), ("gpt2", "ranked")])
def test_adapters(checkpoints, rows, plain, kept, architecture, kind):  # noqa: F811
    """The head is trained whole; the merged folder and the adapter score as what was trained."""
    import peft

    start = checkpoints(architecture)
    flags = {"lora_rank": 4, "lr": 1e-2, "max_length": 96, "max_prompt_length": 64}
    assert train(reward_model, start, rows(kind), "out", **flags) == 0
    model, before = kept["model"], kept["before"]
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name in before if ".lora_" in name} | {"score.weight"}
    changed = {name for name, p in model.named_parameters() if (p != before[name]).any()}
    assert changed == trained
    assert_plain_transformers_reads_it("out", model, rows(kind))
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
    assert torch.equal(loaded.base_model.model.score.weight, merged.score.weight)


@pytest.mark.parametrize("flags", ({}, {"lora_rank": 4, "lr": 1e-2}), ids=("all", "adapters"))
def test_run_that_broke_goes_on_to_the_same_end(checkpoints, rows, plain, monkeypatch, flags):  # noqa: F811
    start, data = checkpoints("gpt2"), rows("ranked")
    flags = flags | {"max_length": 96, "max_prompt_length": 64, "zero_on": 4}
    assert train(reward_model, start, data, "whole", **flags) == 0
    with monkeypatch.context() as patch:
        at_loss_call(patch, reward_model, in_step(4) + 1, break_down)  # between two micro-batches
        with pytest.raises(Broken):
            train(reward_model, start, data, "broken", **flags)
    assert checkpoints_in("broken") == [2]
    with monkeypatch.context() as patch:  # and once more, where the level is being set
        patch.setattr(reward_model, "mean_score_of_samples", lambda *_: break_down())
        with pytest.raises(Broken):
            train(reward_model, start, data, "broken", **flags)
    assert checkpoints_in("broken") == [6] and not Path("broken/model.safetensors").exists()
    assert train(reward_model, start, data, "broken", **flags) == 0
    biases = [
        json.loads(Path(folder, "config.json").read_text())["plainpref"]["score_bias"]
        for folder in ("whole", "broken")
    ]
    assert biases[0] == biases[1] != 0
    if flags.get("lora_rank"):
        files = [f"{folder}/adapter/adapter_model.safetensors" for folder in ("whole", "broken")]
        assert common.file_hash(Path(files[0])) == common.file_hash(Path(files[1]))
    assert_same_run("whole", "broken")


@pytest.mark.parametrize("kind", ["pairs", "ranked"])
def test_same_steps_with_other_micro_batches(checkpoints, rows, plain, kind):  # noqa: F811
    start, flags = checkpoints("llama"), HOT | {"zero_on": 4}
    for size in (8, 2):
        more = flags | {"micro_batch_size": size}
        assert train(reward_model, start, rows(kind), f"of-{size}", **more) == 0
    assert_same_weights_of_scores("of-8", "of-2", start)
    assert_same_log("of-8", "of-2")


def assert_same_weights_of_scores(one: str | Path, other: str | Path, start: Path) -> None:
    """As assert_same_weights; the starting model has no head to compare with."""
    a, b = (load_file(Path(f) / "checkpoint-5/policy.safetensors") for f in (one, other))
    assert a.keys() == b.keys() and {w.dtype for w in a.values()} == {torch.float64}
    assert max((a[name] - b[name]).abs().max().item() for name in a) < 1e-9
    before = load_file(start / "model.safetensors")
    assert max((a[n] - before[n]).abs().max().item() for n in a if n in before) > 0.01
    levels = [
        json.loads((Path(f) / "config.json").read_text())["plainpref"]["score_bias"]
        for f in (one, other)
    ]
    assert levels[0] == pytest.approx(levels[1], abs=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2])
def test_same_steps_with_other_numbers_of_processes(
    checkpoints,
    rows,
    plain,  # noqa: F811
    tmp_path,
    processes,
):
    start, runs = checkpoints("llama"), []
    for kind in ("pairs", "ranked"):
        flags = HOT | {"zero_on": 5}
        assert train(reward_model, start, rows(kind), tmp_path / f"alone-{kind}", **flags) == 0
        values = SMALL | OWN["reward_model"] | flags | {"micro_batch_size": 1}
        values |= {"model": str(start), "dataset": str(rows(kind))}
        runs.append(["reward_model", values | {"output_dir": str(tmp_path / f"by-{kind}")}])
    (tmp_path / "several.py").write_text(SEVERAL.format(root=str(ROOT)))
    (tmp_path / "runs.json").write_text(json.dumps(runs))
    status, _, err = run_script(
        "several.py", tmp_path / "runs.json", processes=processes, cwd=tmp_path
    )
    assert status == 0, err
    for kind in ("pairs", "ranked"):
        assert_same_weights_of_scores(tmp_path / f"alone-{kind}", tmp_path / f"by-{kind}", start)
        assert_same_log(tmp_path / f"alone-{kind}", tmp_path / f"by-{kind}")


# -- what the embedded task says of it


@pytest.mark.parametrize("scores", ["the true reward", "its opposite", "one number"])
def test_measured_on_the_embedded_task(scores, monkeypatch, tmp_path):
    """What knows the true reward reaches the ceiling; what knows nothing is right half the time."""
    import family

    monkeypatch.chdir(tmp_path)

    def score(reward, prompts, answers):
        if scores == "one number":
            return torch.full((len(prompts),), 0.25, dtype=torch.float64)
        true = torch.tensor(family.reward(*reward.texts(prompts, answers)), dtype=torch.float64)
        return true if scores == "the true reward" else -true

    monkeypatch.setattr(scoring.Reward, "__call__", score)
    run, tokenizer = common.Processes(), common.load_tokenizer("tiny", 160)
    start = common.load_policy("tiny", "float32", run)
    found = family.measure_scores(run, None, start, tokenizer, 24)
    assert found["prompts"] == 24 and 24 < found["pairs"] < 6 * 24
    assert 0.6 < found["ceiling"] < 1
    expected = {"the true reward": 1, "its opposite": -1, "one number": 0}[scores]
    assert found["share"] == pytest.approx(expected, abs=1e-12)
    assert found["accuracy"] == pytest.approx(0.5 + expected * (found["ceiling"] - 0.5))
    assert found["true_accuracy"] == pytest.approx((1 + expected) / 2)
    if scores == "one number":
        assert found["mean_score"] == 0.25


# -- what it is not


def test_a_reward_model_writes_no_text(checkpoints, rows, plain):  # noqa: F811
    train(reward_model, checkpoints("llama"), rows("pairs"), "out", max_steps=1)
    with pytest.raises(common.UserError) as error:
        train(dpo, Path("out"), rows("pairs"), "next")
    assert str(error.value) == "--model out: a reward model, which writes no text"
    with pytest.raises(common.UserError, match="out: a reward model, which writes no text"):
        train(dpo, checkpoints("llama"), rows("pairs"), "other", ref_model="out")


@pytest.mark.parametrize(
    "flags", ({}, {"lora_rank": 4, "dtype": "bfloat16"}), ids=("all", "adapters")
)
def test_a_reward_model_can_go_on(checkpoints, rows, plain, kept, flags):  # noqa: F811
    """With its own head. It writes no answers, so those of the rows score 0 on average."""
    assert train(reward_model, checkpoints("gpt2"), rows("pairs"), "first", lr=1e-2) == 0
    first, level = kept["model"], kept["model"].score_bias
    head = first.score.weight.detach().clone()
    asked = kept.pop("asked")
    assert train(reward_model, Path("first"), rows("pairs"), "next", max_steps=2, **flags) == 0
    assert "asked" not in kept
    assert torch.equal(kept["before"]["score.weight"], head)
    evaluations = [
        [line["eval/loss"] for line in lines_of(folder) if "eval/loss" in line]
        for folder in ("first", "next")
    ]
    assert evaluations[1][0] == pytest.approx(evaluations[0][-1], rel=2e-2 if flags else 1e-6)
    tokenizer = common.load_tokenizer("next", 64)
    data = common.load_rows(str(rows("pairs")), None, "ranked", tokenizer, 64, 40)[0].rows[:8]
    reward = scoring.load_reward("next", tokenizer, common.Processes(), "float32")
    scores = reward(
        [row.prompt for row in data for _ in "ab"], [y for r in data for y in r.responses]
    )
    assert scores.mean().item() == pytest.approx(0, abs=0.1 if flags else 1e-5)
    assert len(asked[0]) == 8 and kept["model"].score_bias != level
    config = json.loads(Path("next/config.json").read_text())
    assert config["plainpref"]["history"] == ["reward_model"] * 2


def test_a_level_that_is_left_is_not_that_of_the_model_before(checkpoints, rows, plain, kept):  # noqa: F811
    """What the folder says is what the run counted with: nothing was subtracted."""
    train(reward_model, checkpoints("llama"), rows("pairs"), "first", max_steps=1)
    assert kept["model"].score_bias != 0
    train(reward_model, Path("first"), rows("pairs"), "next", max_steps=1, zero_on=0)
    assert kept["model"].score_bias == 0
    run = common.Processes()
    saved = scoring.load_score_model("next", "float32", run, name="saved")
    assert saved.score_bias == 0


def test_a_reward_model_can_go_on_with_the_embedded_task(monkeypatch, kept):
    """Which asks the model that a run began from for answers."""
    import family
    import report

    every = family.rows
    monkeypatch.setattr(family, "rows", lambda *which: itertools.islice(every(*which), 40))
    monkeypatch.setattr(report, "FAMILY_PROMPTS", 8)
    flags = {"max_steps": 1, "max_length": 160, "max_prompt_length": 128, "zero_on": 4}
    for model, folder in (("tiny", "first"), ("first", "next")):
        assert train(reward_model, Path(model), "family:off-policy", folder, **flags) == 0
        text = (Path(folder) / "summary.txt").read_text()
        assert "reward_model: 1 steps in " in text
    assert "accuracy of the true reward itself" in Path("first/summary.txt").read_text()


@pytest.mark.parametrize(
    "flags",
    [
        {"margin": -0.1},
        {"margin": NAN},
        {"center_weight": -1.0},
        {"zero_on": -1},
        {"adam_eps": 0.0},
    ],
    ids=str,
)
def test_flags_that_mean_nothing(checkpoints, rows, plain, flags):  # noqa: F811
    with pytest.raises(common.UserError) as error:
        train(reward_model, checkpoints("llama"), rows("pairs"), "out", **flags)
    assert str(error.value) == (
        "--margin, --center-weight and --zero-on must be 0 or more, --adam-eps positive"
    )


# -- TRL


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("margin, c", [(None, None), (0.4, None), (0.4, 0.07)])
def test_the_loss_is_that_of_trl(checkpoints, rows, plain, margin, c, tmp_path):  # noqa: F811
    """The folder, its tokenizer and pairs as texts to TRL's RewardTrainer, which tokenises, pads
    and reads the score by its own code.
    """
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    assert train(reward_model, checkpoints("llama"), rows("pairs"), "out", zero_on=0) == 0
    raws = pair_rows(9, seed=4)
    tokenizer = common.load_tokenizer("out", 96)
    data = common.load_rows(
        str(write_jsonl(tmp_path / "p.jsonl", raws)), None, "ranked", tokenizer, 96, 64
    )[0]
    run = common.Processes()
    model = scoring.load_score_model("out", "float32", run, name="model")
    micro = common.collate(data, list(range(9)), run.device)
    with torch.no_grad():
        scores = scoring.response_scores(model, micro)
        losses, metrics = reward_model_loss(scores, micro.scores, margin or 0.0, c or 0.0)

    config = RewardConfig(
        output_dir="trl", report_to="none", bf16=False, use_cpu=True, disable_tqdm=True,
        gradient_checkpointing=False, center_rewards_coefficient=c, max_length=96,
    )  # fmt: skip
    trainer = RewardTrainer(
        model="out",
        args=config,
        train_dataset=Dataset.from_list(
            [row | ({} if margin is None else {"margin": margin}) for row in raws]
        ),
        processing_class=AutoTokenizer.from_pretrained("out"),
    )
    examples = [trainer.train_dataset[i] for i in range(9)]
    for example, row in zip(examples, data.rows, strict=True):
        both = [example["chosen_ids"], example["rejected_ids"]]
        assert both == [[*row.prompt.tolist(), *y.tolist()] for y in row.responses]
    theirs = trainer.compute_loss(trainer.model.eval().float(), trainer.data_collator(examples))
    assert losses.mean().item() == pytest.approx(theirs.item(), rel=0, abs=1e-6)
    right, pairs = metrics["rewards/accuracies"]
    logged = trainer._metrics["eval"]
    assert float(right.sum() / pairs.sum()) == pytest.approx(logged["accuracy"][0])
    assert float(metrics["rewards/margins"][0].sum() / 9) == pytest.approx(
        logged["margin"][0], abs=1e-6
    )
