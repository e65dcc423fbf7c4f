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
from test_losses import F64, by_row, called, log_sigmoid, sigmoid

import common
import rso
from dpo import dpo_loss
from rso import pair_up, rejection_sample, rso_loss
from sampling import stored
from sampling.generate import text_of

# A policy of six answers, and their scores: the likeliest is not the best.
PI = np.array([0.30, 0.22, 0.18, 0.15, 0.10, 0.05])
SCORES = np.array([0.1, 0.8, 1.3, -0.5, 1.0, 0.4])


# -- the rejection step


def total_variation(counts: np.ndarray, probabilities: np.ndarray) -> float:
    return abs(counts / counts.sum() - probabilities).sum() / 2


def tilted(beta: float) -> np.ndarray:
    """Equation 4: pi exp(r / beta) / Z."""
    weights = PI * np.exp(SCORES / beta)
    return weights / weights.sum()


def pools(draws: int, size: int, seed: int = 0) -> np.ndarray:
    """(draws, size) answers of the policy, each a candidate."""
    return np.random.default_rng(seed).choice(len(PI), (draws, size), p=PI)


def first_accepted(pools: np.ndarray, beta: float) -> np.ndarray:
    """How often each answer is the first one accepted from its pool."""
    rng, counts = np.random.default_rng(1), np.zeros(len(PI))
    for pool, scores in zip(pools.tolist(), SCORES[pools].tolist(), strict=True):
        (first,) = rejection_sample(scores, 1, beta, rng)
        counts[pool[first]] += 1
    return counts


@pytest.mark.parametrize("beta, draws", [(0.5, 100_000), (0.2, 20_000), (2.0, 20_000)])
def test_the_first_accepted_follows_the_optimal_policy(beta, draws):
    """Pools of 24 lack the best answer in 0.82^24 = 1 % of the cases."""
    counts = first_accepted(pools(draws, 24), beta)
    assert total_variation(counts, tilted(beta)) < 0.03
    # It follows neither the policy itself nor the optimal one for another beta.
    assert total_variation(counts, PI) > 0.1
    assert total_variation(counts, tilted(2 * beta)) > 0.05


@pytest.mark.parametrize("size, beta", [(2, 0.2), (5, 0.2), (5, 2.0)])
def test_the_first_accepted_of_a_small_pool(size, beta):
    """As in direct simulation: the best answer is often missing, the maximum is the pool's."""
    counts = first_accepted(pools(20_000, size), beta)
    # All candidates at once, other draws: the first whose uniform number is low enough.
    pool = pools(200_000, size, seed=2)
    height = np.exp((SCORES[pool] - SCORES[pool].max(1, keepdims=True)) / beta)
    first = (np.random.default_rng(3).random(pool.shape) < height).argmax(1)
    simulated = np.bincount(pool[np.arange(len(pool)), first], minlength=len(PI)) / len(pool)
    assert total_variation(counts, simulated) < 0.02
    if (size, beta) == (2, 0.2):  # too few to follow the optimal policy
        assert total_variation(counts, tilted(beta)) > 0.2


def exactly(answers: str, scores: list[float], n: int, beta: float) -> dict[tuple, float]:
    """The probability of every outcome, by enumeration. If no two answers (letters) are equal, this
    is Algorithm 1.
    """
    found: Counter[tuple] = Counter()

    def go_on(remaining: list[int], at: int, accepted: tuple, chance: float) -> None:
        gone = {answers[i] for i in accepted}
        if len(accepted) == n or not remaining:
            found[accepted] += chance
        elif at == len(remaining):  # a pass ends
            go_on([i for i in remaining if answers[i] not in gone], 0, accepted, chance)
        else:
            highest = max(scores[i] for i in remaining)
            taken = math.exp((scores[remaining[at]] - highest) / beta)
            taken = 0.0 if answers[remaining[at]] in gone else taken
            if taken > 0:
                go_on(remaining, at + 1, (*accepted, remaining[at]), chance * taken)
            if taken < 1:
                go_on(remaining, at + 1, accepted, chance * (1 - taken))

    go_on(list(range(len(scores))), 0, (), 1.0)
    return dict(found)


@pytest.mark.parametrize(
    "answers, scores, n, beta",
    [
        ("abcde", [0.2, 1.0, 0.5, -0.3, 0.8], 3, 0.5),
        ("abcde", [0.2, 4.0, 0.5, -0.3, 0.8], 3, 1.0),  # a stale maximum would take few others
        ("abcd", [1.0, 0.0, 1.0, 0.5], 3, 0.4),  # two best
        ("ababc", [0.5, 1.0, 0.5, 1.0, 0.2], 2, 0.5),
        ("aabbca", [0.2, 0.2, 0.6, 0.6, 1.0, 0.2], 3, 0.4),
    ],
)
def test_several_passes_are_algorithm_1(answers, scores, n, beta):
    """Who is accepted, and in which order."""
    expected = exactly(answers, scores, n, beta)
    assert sum(expected.values()) == pytest.approx(1)
    rng, many = np.random.default_rng(0), 20_000
    given = [list(answers)] if len(set(answers)) < len(answers) else []
    found = Counter(tuple(rejection_sample(scores, n, beta, rng, *given)) for _ in range(many))
    assert found.keys() <= expected.keys()
    often = [(found[x], many * p) for x, p in expected.items() if many * p >= 5]
    statistic, free = sum((count - e) ** 2 / e for count, e in often), len(often) - 1
    assert statistic < free + 5 * math.sqrt(2 * free)  # five standard deviations


def test_the_accepted_are_a_sample_without_replacement():
    """As section 3.2 has it: each from equation 4 among those not accepted yet. If copies are
    dropped first (Algorithm 1), they are not.
    """
    best, expected = tilted(0.5), {}
    for order in itertools.permutations(range(len(PI)), 2):
        one, two = best[list(order)]
        expected[order] = one * two / (1 - one)
    for copies in (True, False):
        rng, found = np.random.default_rng(1), Counter()
        for pool in pools(20_000, 48).tolist():
            pool = pool if copies else list(dict.fromkeys(pool))
            taken = rejection_sample(SCORES[pool].tolist(), 2, 0.5, rng, pool)
            found[tuple(pool[i] for i in taken)] += 1
        assert all(len(set(order)) == 2 for order in found)
        counts = np.array([found[order] for order in expected], float)
        distance = total_variation(counts, np.array(list(expected.values())))
        assert distance < 0.03 if copies else distance > 0.08


@pytest.mark.parametrize("beta", (0.0, 5e-324, 1e-300, 1e-3))
def test_a_small_beta_takes_the_best(beta):
    """Best first, and of equal ones the first; an infinite beta takes anyone."""
    rng = random.Random(0)
    for size in (1, 2, 7, 64):
        scores = [round(rng.gauss(0, 5), 1) for _ in range(size)]
        best = sorted(range(size), key=lambda i: -scores[i])
        for n in (1, 3, size):
            taken = rejection_sample(scores, n, beta, np.random.default_rng(0))
            assert taken == best[:n]
            anyone = rejection_sample(scores, n, math.inf, np.random.default_rng(0))
            assert anyone == list(range(min(n, size)))


@pytest.mark.parametrize("beta", (0.0, 1e-300, 0.5, 1e300, math.inf))
@pytest.mark.parametrize(
    "scores", [[], [3.0], [0.5] * 5, [1e308, -1e308, 0.0], [5e-324, 0.0, -0.0]]
)
def test_it_ends_for_any_scores(scores, beta):
    """Each once, and all of them if as many or more are asked for."""
    for n in range(len(scores) + 3):
        taken = rejection_sample(scores, n, beta, np.random.default_rng(n))
        assert len(taken) == len(set(taken)) == min(n, len(scores))
        for answers in ([7] * len(scores), [i % 2 for i in range(len(scores))]):
            taken = rejection_sample(scores, n, beta, np.random.default_rng(n), answers)
            assert len({answers[i] for i in taken}) == len(taken) == min(n, len(set(answers)))


def test_only_differences_of_scores_count():
    """These numbers are exact in binary: the very same candidates are taken."""
    scores = [0.25, 1.5, -0.75, 1.25, 0.5]
    for seed in range(50):
        one = rejection_sample(scores, 3, 0.5, np.random.default_rng(seed))
        two = rejection_sample([s + 1024 for s in scores], 3, 0.5, np.random.default_rng(seed))
        three = rejection_sample([4 * s for s in scores], 3, 2.0, np.random.default_rng(seed))
        assert one == two == three


# -- the games


def test_a_first_round_is_disjoint_and_random():
    games, rng = Counter(), np.random.default_rng(0)
    for n in range(10):
        scores = [float(i) for i in range(n)]
        pairs = pair_up(scores, "first-round", np.random.default_rng(n))
        assert len(pairs) == n // 2 == len({player for pair in pairs for player in pair}) / 2
        assert all(scores[winner] > scores[loser] for winner, loser in pairs)
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
        if n == 5:  # the odd one of the first round plays first in the second
            (alone,) = set(range(5)).difference(*pairs[:2])
            assert alone in pairs[2]


def test_equal_scores_make_no_pair():
    rng, met = np.random.default_rng(0), Counter()
    for ranking in ("first-round", "tournament"):
        assert pair_up([1.0] * 7, ranking, rng) == []
        assert pair_up([], ranking, rng) == pair_up([1.0], ranking, rng) == []
    # In a tournament one of the two goes on: each is as likely to meet the third.
    for _ in range(3_000):
        met.update(pair_up([1.0, 1.0, 0.0], "tournament", rng))
    assert met.keys() == {(0, 2), (1, 2)} and sum(met.values()) == 3_000
    assert abs(met[0, 2] - met[1, 2]) < 300


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


def called_rso(pairs: list[tuple[float, ...]], gamma: float, loss: str, dtype=torch.float64):
    """(losses, gradients by pair, metrics)"""
    refs = [torch.tensor(x, dtype=dtype) for x in list(zip(*pairs, strict=True))[2:]]
    return by_row(rso_loss, [pair[:2] for pair in pairs], *refs, gamma, loss, dtype=dtype)


def test_rso_by_hand():
    """The chosen answer is twice as likely as under the reference, the rejected one half as."""
    pair = (math.log(2 / 100), math.log(1 / 200), math.log(1 / 100), math.log(1 / 100))
    # The margin is ln 4, so that sigmoid(ln 4) = 4 / 5; it is ln 4 without the reference too.
    (loss,), (gradient,), metrics = called_rso([pair], 1.0, "sigmoid-norm")
    assert loss == pytest.approx(math.log(5 / 4), rel=F64)
    assert gradient == pytest.approx([-1 / 5, 1 / 5], rel=F64)
    assert metrics["rewards/chosen"] == pytest.approx([math.log(2)], rel=F64)
    # ln 4 is more than 1, and the hinges are closed; with gamma 1/2, ln 2 is not.
    for loss in ("hinge-norm", "hinge"):
        assert called_rso([pair], 1.0, loss)[:2] == ([0.0], [(0.0, 0.0)])
        (value,), (gradient,), _ = called_rso([pair], 0.5, loss)
        assert value == pytest.approx(1 - math.log(2), rel=F64) and gradient == (-0.5, 0.5)


@pytest.mark.parametrize("loss", ("sigmoid-norm", "hinge-norm", "hinge"))
@pytest.mark.parametrize("gamma", (0.05, 0.5, 3.0))
def test_rso_is_the_equation(gamma, loss):
    """With far margins too; the hinge's rewards are those of the others."""
    rng = random.Random(0)
    pairs = [tuple(rng.uniform(-2000, -1) for _ in range(4)) for _ in range(50)]
    pairs += [tuple(rng.gauss(-40, 2) for _ in range(4)) for _ in range(50)]  # and near misses
    losses, gradients, metrics = called_rso(pairs, gamma, loss)
    for pair, value, gradient in zip(pairs, losses, gradients, strict=True):
        expected, by_input = rso_equation(*pair, gamma, loss)
        assert value == pytest.approx(expected, rel=F64, abs=1e-11)
        assert gradient == pytest.approx(by_input, rel=1e-9, abs=1e-15)
    columns = list(zip(*pairs, strict=True))
    theirs, _, their_metrics = called(dpo_loss, columns, gamma)
    assert metrics.keys() == their_metrics.keys()
    for name in metrics.keys() - {"loss"}:
        assert metrics[name] == pytest.approx(their_metrics[name], rel=1e-12, abs=1e-12)
    assert loss != "sigmoid-norm" or losses == pytest.approx(theirs, rel=1e-12)
    same = [(-17.0, -18.0, -17.0, -18.0)]  # the policy is its reference
    start = {"sigmoid-norm": math.log(2), "hinge-norm": 1.0, "hinge": max(0.0, 1 - gamma)}[loss]
    assert called_rso(same, gamma, loss, torch.float32)[0] == pytest.approx([start], rel=1e-6)


def test_an_unknown_loss():
    with pytest.raises(KeyError):
        rso_loss(*[torch.zeros(1)] * 4, 0.05, "hinge-nrom")


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
    rows = paired(made, (3, 1))
    assert [int(row.prompt[1]) for row in rows] == [*range(2, 12)] * 2  # first pairs, then second
    assert letters(paired(made[:6], (3, 1))) == letters(rows)[:6] + letters(rows)[10:16]
    assert len(set(letters(rows)[:10])) > 5  # not the same for all prompts
    for seed in ((3, 2), (4, 1)):
        assert letters(paired(made, seed)) != letters(rows)


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
    data = "prompts.jsonl"
    if model == "qwen2":
        asked = [[{"role": "user", "content": row["prompt"]}] for row in json_lines(data)]
        data = str(write_jsonl(Path("asked.jsonl"), [{"prompt": ask} for ask in asked]))
    run("out", dataset=data, model=model, max_steps=2, max_length=72, max_prompt_length=60)
    before = load_file(checkpoints(model) / "model.safetensors")
    after = load_file("out/model.safetensors")
    assert [name for name in before if torch.equal(before[name], after[name])] == []
    steps = steps_of("out")
    assert [step["step"] for step in steps] == [1, 2]
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    # gamma is the scale of the exported model as a reward a@b.
    assert json.loads(Path("out/config.json").read_text())["plainpref"]["beta"] == 0.5

    sampled = {tuple(row["prompt_ids"]): row for row in json_lines("out/sampled.jsonl")}
    pairs, taken = json_lines("out/accepted.jsonl"), Counter()
    assert 40 < len(sampled) <= 60 and len(pairs) > len(sampled)
    for pair in pairs:
        row = sampled[tuple(pair["prompt_ids"])]
        assert pair["prompt"] == row["prompt"]
        for side in ("chosen", "rejected"):
            at = row["response_ids"].index(pair[f"{side}_ids"])
            assert row["scores"][at] == pair[f"{side}_score"] == len(pair[side]) % 11 / 3
            assert row["responses"][at] == pair[side]
            taken[*pair["prompt_ids"], pair[side]] += 1
        assert pair["chosen_score"] > pair["rejected_score"]
    assert set(taken.values()) == {1}  # games of a first round are disjoint, answers are distinct
    held_out = json_lines("out/sampled-held-out.jsonl")
    assert held_out and not {tuple(row["prompt_ids"]) for row in held_out} & sampled.keys()
    # The pairs are rows for the other methods.
    tokenizer = common.load_tokenizer(str(checkpoints(model)), 72)
    args = common.Args(dataset="out/accepted.jsonl", max_length=72, skip_bad_rows=True)
    train, more = common.load_rows(args, tokenizer, "pair")
    assert len(train) + len(more) > len(pairs) / 2


@pytest.mark.parametrize("flags", [{}, {"ranking": "tournament", "loss": "hinge"}])
def test_same_steps_with_other_micro_batches(run, flags):
    for size in (8, 2):
        run(f"of-{size}", **flags, dtype="float64", lr=1e-2, micro_batch_size=size)
    assert_same_run("of-8", "of-2", exact=False)


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


def test_a_changed_reward_is_another_run(run, monkeypatch):
    """It would go on with other pairs than the checkpoint has learned from."""
    with monkeypatch.context() as patch, pytest.raises(Broken):
        break_in_step_4(patch)
        run("out")
    Path("lengths.py").write_text(LENGTHS.replace("% 11", "% 12"))
    monkeypatch.setattr(stored, "generate", None)
    with pytest.raises(common.UserError, match="out holds another run: .*lengths.py has changed"):
        run("out")
    Path("lengths.py").write_text(LENGTHS)
    run("out")


def test_what_samples_depend_on(run, monkeypatch):
    """Other flags learn from the same samples, and have other pairs."""
    run("out", max_steps=1)
    cached = set(Path("runs/.cache").glob("sampled-*"))
    assert len(cached) == 2
    with monkeypatch.context() as patch:
        patch.setattr(stored, "generate", None)
        for name, value in (
            ("sampling_beta", 0.1), ("gamma", 0.3), ("accepted", 2), ("ranking", "tournament"),
        ):  # fmt: skip
            run(name, max_steps=1, **{name: value})
            same = [Path(folder, "accepted.jsonl").read_bytes() for folder in ("out", name)]
            assert (same[0] == same[1]) == (name == "gamma")
    Path("other.py").write_text(LENGTHS.replace("% 11", "% 12"))

    def stop(rows, args, *rest):
        raise Broken

    monkeypatch.setattr(rso, "accept_and_pair", stop)  # the training prompts are sampled
    moved = [
        {"seed": 1}, {"temperature": 0.9}, {"top_k": 5}, {"samples": 7}, {"prompts": 30},
        {"max_length": 50}, {"max_prompt_length": 39}, {"dtype": "float64"}, {"model": "qwen2"},
        {"reward": "other.py:score"}, {"attn": "eager"}, {"lora_rank": 2},
    ]  # fmt: skip
    for number, flags in enumerate(moved, 1):
        with pytest.raises(Broken):
            run(f"moved-{number}", **flags)
        assert len(set(Path("runs/.cache").glob("sampled-*"))) == len(cached) + number


@pytest.mark.parametrize(
    "flags, text",
    [
        ({"sampling_beta": -0.1}, "--sampling-beta"),
        ({"gamma": 0.0}, "--gamma"),
        ({"temperature": 0.0}, "--temperature"),
        ({"accepted": 1}, "--accepted"),
        ({"samples": 3}, "--samples"),
        ({"prompts": 0}, "--prompts"),
        ({"reward": ""}, "--reward"),
        ({"reward": "nowhere.py:score"}, "nowhere.py"),
    ],
)
def test_what_cannot_work_is_said(run, monkeypatch, flags, text):
    """Before the model is loaded."""
    monkeypatch.setattr(common, "load_policy", None)
    with pytest.raises(common.UserError, match=text):
        run("out", **flags)


def test_too_few_pairs(run):
    """Only the samples tell."""
    with pytest.raises(common.UserError, match="--batch-size"):
        run("out", reward="lengths.py:constant")


@pytest.mark.slow
def test_two_processes_sample_and_train_as_one(run, checkpoints):
    """Other machines learn the samples and the scores from the first."""
    hot = {"dtype": "float64", "lr": 1e-2}
    run("by-1", **hot)
    values = FLAGS | hot | {"model": checkpoints("llama"), "dataset": Path("prompts.jsonl")}
    values |= {"output_dir": Path("by-2"), "cache_dir": Path("cache")}
    values = {k: v.resolve() if isinstance(v, Path) else v for k, v in values.items()}
    values["reward"] = f"{Path('lengths.py').resolve()}:score"
    flags = [x for k, v in values.items() for x in (f"--{k.replace('_', '-')}", v)]
    status, _, err = run_script("rso.py", *flags, processes=2)
    assert status == 0, err
    assert_same_run("by-1", "by-2", exact=False)
