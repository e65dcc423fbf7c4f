"""RSO: the rejection step against direct simulation and exact probabilities, the games that make
pairs, the loss, and whole runs.
"""

import itertools
import json
import math
import random
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import pair_rows, run_script, write_jsonl
from online import as_in_a_process_of_its_own, json_lines, steps_of
from safetensors.torch import load_file
from test_losses import F64, called, log_sigmoid, sigmoid

import common
import rso
from dpo import dpo_loss
from rso import pair_up, rejection_sample, rso_loss
from sampling import stored
from sampling.generate import text_of

# -- the rejection step


@pytest.mark.parametrize("beta, draws", [(0.5, 40_000), (0.2, 20_000), (2.0, 20_000)])
def test_the_accepted_follow_the_optimal_policy(beta, draws):
    """In total variation: the first one follows equation 4, the second one equation 4 without the
    first. The likeliest of six answers is not the best; pools of 48 samples have them all.
    """
    policy = np.array([0.30, 0.22, 0.18, 0.15, 0.10, 0.05])
    scores = np.array([0.1, 0.8, 1.3, -0.5, 1.0, 0.4])

    def in_order(weights: np.ndarray) -> np.ndarray:
        """(6, 6) probabilities of a first and a second answer."""
        first = weights / weights.sum()
        both = first[:, None] * first[None, :] / (1 - first[:, None])
        return both * (1 - np.eye(6))

    def distance(weights: np.ndarray) -> float:
        return abs(counts / draws - in_order(weights)).sum() / 2

    rng, counts = np.random.default_rng(1), np.zeros((6, 6))
    for pool in np.random.default_rng(0).choice(6, (draws, 48), p=policy).tolist():
        taken = rejection_sample(scores[pool].tolist(), 2, beta, rng, pool)
        counts[tuple(pool[i] for i in taken)] += 1
    assert distance(policy * np.exp(scores / beta)) < 0.03
    assert distance(policy) > 0.1 and distance(policy * np.exp(scores / (2 * beta))) > 0.05


@pytest.mark.parametrize("beta", (0.0, 5e-324, 1e-3, 0.5, 1e300, math.inf))
@pytest.mark.parametrize("scores", [[], [3.0], [0.5] * 5, [1e307, -1e307, 0.0], [3, 1, 2, 5, 4]])
def test_any_scores_and_any_beta(scores, beta):
    """Each answer once, and all of them if as many or more are asked for. A tiny beta takes the
    best first (of equal ones the first), an infinite one takes them as they come.
    """
    for n in range(len(scores) + 3):
        taken = rejection_sample(scores, n, beta, np.random.default_rng(n))
        assert len(taken) == len(set(taken)) == min(n, len(scores))
        if beta <= 1e-3:
            assert taken == sorted(range(len(scores)), key=lambda i: -scores[i])[:n]
        elif beta == math.inf:
            assert taken == list(range(len(scores)))[:n]
        for answers in ([7] * len(scores), [i % 2 for i in range(len(scores))]):
            taken = rejection_sample(scores, n, beta, np.random.default_rng(n), answers)
            assert len({answers[i] for i in taken}) == len(taken) == min(n, len(set(answers)))


# -- the games


def test_a_first_round_is_disjoint_and_random():
    games, rng = Counter(), np.random.default_rng(0)
    for n in range(10):
        pairs = pair_up([float(i) for i in range(n)], "first-round", rng)
        assert len(pairs) == n // 2 == len({player for pair in pairs for player in pair}) / 2
        assert all(winner > loser for winner, loser in pairs)
    for _ in range(6_000):
        games.update(pair_up([0.0, 1.0, 2.0, 3.0], "first-round", rng))
    assert len(games) == 6 and all(abs(n - 2_000) < 200 for n in games.values())


def test_a_tournament_has_one_winner():
    """Who has lost is out; the best never loses. Sorting and pairing neighbours would differ."""
    for n, seed in itertools.product(range(1, 18), range(10)):
        scores = np.random.default_rng(seed).permutation(n).astype(float).tolist()
        pairs = pair_up(scores, "tournament", np.random.default_rng([seed, 1]))
        losers = [loser for _, loser in pairs]
        assert len(pairs) == len(set(losers)) == n - 1 and scores.index(n - 1) not in losers
        for at, (winner, loser) in enumerate(pairs):
            assert scores[winner] > scores[loser] and winner not in losers[:at]
        games = Counter(winner for winner, _ in pairs) + Counter(losers)
        assert n == 1 or max(games.values()) <= math.ceil(math.log2(n))


@pytest.mark.parametrize("ranking", ("first-round", "tournament"))
def test_equal_scores_make_no_pair(ranking):
    for scores in ([1.0] * 7, [1.0], []):
        assert pair_up(scores, ranking, np.random.default_rng(0)) == []


# -- the loss


def rso_equation(chosen, rejected, ref_chosen, ref_rejected, gamma, loss):
    """Equations 8 to 10 for one pair: (loss, its gradient by the policy's two log-probs)."""
    margin = gamma * (chosen - rejected)
    if loss != "hinge":
        margin -= gamma * (ref_chosen - ref_rejected)
    if loss == "sigmoid-norm":
        value, slope = -log_sigmoid(margin), -sigmoid(-margin) * gamma
    else:
        value, slope = max(0.0, 1 - margin), -gamma if margin < 1 else 0.0
    return value, [slope, -slope]


@pytest.mark.parametrize("loss", ("sigmoid-norm", "hinge-norm", "hinge"))
@pytest.mark.parametrize("gamma", (0.05, 0.5, 3.0))
def test_rso_is_the_equation(gamma, loss):
    """With far margins too. sigmoid-norm is DPO, and all three report DPO's metrics."""
    rng = random.Random(0)
    pairs = [tuple(rng.uniform(-2000, -1) for _ in range(4)) for _ in range(50)]
    pairs += [tuple(rng.gauss(-40, 2) for _ in range(4)) for _ in range(50)]  # and near misses
    pairs += [(-17.0, -18.0, -17.0, -18.0)]  # the policy is its reference
    columns = list(zip(*pairs, strict=True))
    refs = [torch.tensor(x, dtype=torch.float64) for x in columns[2:]]
    losses, gradients, metrics = called(rso_loss, columns[:2], *refs, gamma, loss)
    for pair, value, gradient in zip(pairs, losses, zip(*gradients, strict=True), strict=True):
        expected, by_input = rso_equation(*pair, gamma, loss)
        assert value == pytest.approx(expected, rel=F64, abs=1e-11)
        assert gradient == pytest.approx(by_input, rel=1e-9, abs=1e-15)
    start = {"sigmoid-norm": math.log(2), "hinge-norm": 1.0, "hinge": max(0.0, 1 - gamma)}[loss]
    assert losses[-1] == pytest.approx(start, rel=F64)
    theirs, _, their_metrics = called(dpo_loss, columns, gamma)
    assert loss != "sigmoid-norm" or losses == pytest.approx(theirs, rel=1e-12)
    assert metrics.keys() == their_metrics.keys()
    for name in metrics.keys() - {"loss"}:
        assert metrics[name] == pytest.approx(their_metrics[name], rel=1e-12, abs=1e-12)


# -- from samples to pairs


class Letters:
    """A tokenizer: 0 ends, 1 begins; 2, 3, ... are a, b, ..., and so are 28, 29, ..."""

    stop_ids, bos = frozenset([0]), [1]

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(ord("a") + (i - 2) % 26) for i in ids)


def sampled(text: str, scores: list[float], prompt: int = 5) -> common.Row:
    """Answers of a letter each; a capital one is the same letter by another id, without an end."""
    ids = [[ord(x) - 95, 0] if x.islower() else [ord(x) - 37] for x in text]
    asked, answers = np.array([1, prompt], np.int32), [np.array(x, np.int32) for x in ids]
    return common.Row(asked, answers, asked, np.array(scores))


def paired(rows: list[common.Row], seed=(0, 1), **flags) -> list[common.Row]:
    args = rso.Args(**{"accepted": 4, "sampling_beta": 0.5} | flags)
    return rso.accept_and_pair(rows, args, seed, Letters(), "")


def letters(rows: list[common.Row]) -> list[str]:
    return ["".join(text_of(y, Letters()) for y in row.responses) for row in rows]


@pytest.mark.parametrize("ranking", ("first-round", "tournament"))
def test_pairs_are_of_different_texts(ranking):
    """Also if their ids differ: other methods read the texts."""
    made = sampled("abAaBb", [1.0, 0.0, 1.0, 1.0, 0.0, 0.0])
    for i in range(20):
        rows = paired([made] * 3, (i, 1), accepted=6, ranking=ranking)
        assert letters(rows) == ["ab"] * 3
        assert all(row.scores.tolist() == [1.0, 0.0] for row in rows)
        assert all(row.prompt is row.question is made.prompt for row in rows)
    alike = sampled("aAaaA", [1.0, 0.9, 1.0, 1.0, 0.9])
    assert paired([alike], ranking=ranking) == paired([], ranking=ranking) == []


def test_the_draws_for_a_prompt_depend_on_its_number_alone():
    made = [sampled("abcdefgh", [0.1 * i for i in range(8)], prompt) for prompt in range(2, 12)]
    rows = letters(paired(made, (3, 1)))  # every prompt's first pair, then the second ones
    assert letters(paired(made[:6], (3, 1))) == rows[:6] + rows[10:16]
    assert len(set(rows[:10])) > 5  # not the same for all prompts
    assert all(letters(paired(made, seed)) != rows for seed in ((3, 2), (4, 1)))


# -- whole runs

LENGTHS = """
def score(prompts, responses):
    return [len(response) % 11 / 3 for response in responses]

def constant(prompts, responses):
    return [0.5] * len(responses)
"""
FLAGS = {
    "sampling_beta": 0.5, "gamma": 0.5, "samples": 6, "accepted": 4, "temperature": 1.0,
    "top_k": 0, "max_length": 52, "max_prompt_length": 40, "batch_size": 8, "micro_batch_size": 4,
    "max_steps": 4, "lr": 1e-3, "warmup_ratio": 0.0, "max_grad_norm": 1.0, "dtype": "float32",
    "eval_every": 2, "save_every": 2,
}  # fmt: skip


@pytest.fixture
def run(checkpoints, tmp_path, fresh_process):
    """run(folder, **flags): a whole run in this process."""
    (tmp_path / "lengths.py").write_text(LENGTHS)
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": r["prompt"]} for r in pair_rows(60)])

    def go(folder: str, reward: str = "lengths.py:score", model: str = "llama", **more) -> None:
        values = FLAGS | {"dataset": "prompts.jsonl", "reward": reward, "output_dir": folder}
        with as_in_a_process_of_its_own():
            rso.main(rso.Args(model=str(checkpoints(model)), **values | more))

    return go


def assert_same_run(one: str, other: str, exact: bool = True) -> None:
    """Weights, metrics, samples and pairs."""
    for name in ("sampled.jsonl", "sampled-held-out.jsonl", "accepted.jsonl"):
        assert Path(one, name).read_bytes() == Path(other, name).read_bytes()
    weights = [load_file(f"{folder}/model.safetensors") for folder in (one, other)]
    distance = max((w - weights[1][name]).abs().max() for name, w in weights[0].items())
    assert distance == 0 if exact else distance < 1e-7  # of fp32 numbers
    for a, b in zip(*(json_lines(f"{x}/metrics.jsonl") for x in (one, other)), strict=True):
        for key in a.keys() - {"tokens_per_second", "seconds_per_step", "peak_memory_gib"}:
            assert b[key] == (a[key] if exact else pytest.approx(a[key], rel=1e-7, abs=1e-9)), key


@pytest.mark.parametrize("model", ("llama", "qwen2"))
def test_a_run_leaves_samples_and_pairs(run, checkpoints, model):
    """Pairs are of answers that were sampled, with their scores; the ids are trained on."""
    if model == "qwen2":
        asked = [
            [{"role": "user", "content": row["prompt"]}] for row in json_lines("prompts.jsonl")
        ]
        write_jsonl(Path("prompts.jsonl"), [{"prompt": ask} for ask in asked])
    run("out", model=model, max_steps=2, max_length=72, max_prompt_length=60)
    before = load_file(checkpoints(model) / "model.safetensors")
    after = load_file("out/model.safetensors")
    assert [name for name in before if torch.equal(before[name], after[name])] == []
    assert steps_of("out")[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    # gamma is the scale of the exported model as a reward a@b.
    assert json.loads(Path("out/config.json").read_text())["plainpref"]["beta"] == 0.5

    sampled = {tuple(row["prompt_ids"]): row for row in json_lines("out/sampled.jsonl")}
    pairs, taken = json_lines("out/accepted.jsonl"), Counter()
    assert 40 < len(sampled) <= 60 and len(pairs) > len(sampled)
    for pair in pairs:
        row = sampled[tuple(pair["prompt_ids"])]
        assert pair["prompt"] == row["prompt"] and pair["chosen_score"] > pair["rejected_score"]
        for side in ("chosen", "rejected"):
            at = row["response_ids"].index(pair[f"{side}_ids"])
            assert row["scores"][at] == pair[f"{side}_score"] == len(pair[side]) % 11 / 3
            assert row["responses"][at] == pair[side]
            taken[*pair["prompt_ids"], pair[side]] += 1
    assert set(taken.values()) == {1}  # games of a first round are disjoint, answers are distinct
    held_out = json_lines("out/sampled-held-out.jsonl")
    assert held_out and not {tuple(row["prompt_ids"]) for row in held_out} & sampled.keys()
    # The pairs are rows for the other methods.
    how = {"max_length": 72, "skip_bad_rows": True, "chat_template": "none"}
    args = common.Args(dataset="out/accepted.jsonl", **how)
    train, more = common.load_rows(args, common.load_tokenizer(str(checkpoints(model))), "pair")
    assert len(train) + len(more) > len(pairs) / 2


class Broken(Exception):
    """Ends a run in the middle, like a power cut."""


def break_in_step_4(patch) -> None:
    calls = itertools.count(1)

    def broken(*args, loss=rso.rso_loss):
        if next(calls) == 10:  # held-out rows are one batch, steps are two; between the two
            raise Broken
        return loss(*args)

    patch.setattr(rso, "rso_loss", broken)


def test_a_run_that_broke_goes_on_with_its_samples(run, monkeypatch):
    """Nothing is sampled again; or if it has to be, by the model that the run started from."""
    run("whole")
    generate = stored.generate
    for cache_lost in (False, True):
        folder, cache = f"broken-{cache_lost}", {"cache_dir": f"cache-{cache_lost}"}
        with monkeypatch.context() as patch, pytest.raises(Broken):
            break_in_step_4(patch)
            run(folder, **cache)
        assert Path(folder, "checkpoint-2").is_dir()
        with monkeypatch.context() as patch:
            patch.setattr(stored, "generate", generate if cache_lost else None)
            if cache_lost:
                shutil.rmtree(cache["cache_dir"])
            run(folder, **cache)
        assert_same_run("whole", folder)


def test_other_flags_learn_from_the_same_samples(run, monkeypatch):
    run("out", max_steps=1)
    monkeypatch.setattr(stored, "generate", None)
    for name, value in (("sampling_beta", 0.1), ("accepted", 2), ("ranking", "tournament")):
        run(name, max_steps=1, **{name: value})
        one, other = (Path(folder, "accepted.jsonl").read_bytes() for folder in ("out", name))
        assert one != other


WRONG = {"gamma": 0.0, "temperature": 0.0, "accepted": 1, "samples": 3, "reward": "none.py:score"}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_work_is_said(run, monkeypatch, name):
    """Before the model is loaded; but only the samples tell if there are no pairs."""
    with monkeypatch.context() as patch, pytest.raises(common.UserError, match=f"--{name}"):
        patch.setattr(common, "load_policy", None)
        run("out", **{name: WRONG[name]})
    with pytest.raises(common.UserError, match="has a higher score than another"):
        run("out", reward="lengths.py:constant")


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [False, True])
def test_two_processes_sample_and_train_as_one(run, checkpoints, fsdp):
    hot = {"dtype": "float64", "lr": 1e-2}
    run("by-1", **hot)
    values = FLAGS | hot | {"model": checkpoints("llama"), "dataset": Path("prompts.jsonl")}
    values |= {"output_dir": Path("by-2"), "cache_dir": Path("cache")}
    values = {k: v.resolve() if isinstance(v, Path) else v for k, v in values.items()}
    values["reward"] = f"{Path('lengths.py').resolve()}:score"
    flags = [x for k, v in values.items() for x in (f"--{k.replace('_', '-')}", v)]
    status, _, err = run_script("rso.py", *flags, *["--fsdp"] * fsdp, processes=2)
    assert status == 0, err
    assert_same_run("by-1", "by-2", exact=False)
