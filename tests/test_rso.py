"""RSO: the rejection step against direct simulation and exact probabilities, the games that make
pairs, the loss, and whole runs.
"""

import itertools
import json
import math
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import pair_rows, run_script, write_jsonl
from safetensors.torch import load_file
from test_losses import F64, called, log_sigmoid, sigmoid, slopes
from test_train import (
    HOT,
    OWN,
    SMALL,
    Broken,
    _as_in_a_fresh_process,  # noqa: F401 (used by its name)
    as_flags,
    assert_same_log,
    assert_same_run,
    assert_same_weights,
    at_loss_call,
    break_down,
    checkpoints_in,
    in_step,
    plain,  # noqa: F401
    steps_of,
    train,
)

import common
import generation
import rso
import samples
from dpo import dpo_loss
from rso import pair_up, rejection_sample, rso_loss

LOSSES = ("sigmoid-norm", "hinge-norm", "hinge")

# -- the rejection step

# A policy of six answers, and what they score: the likeliest is not the best.
PI = np.array([0.30, 0.22, 0.18, 0.15, 0.10, 0.05])
SCORES = np.array([0.1, 0.8, 1.3, -0.5, 1.0, 0.4])


def total_variation(counts: np.ndarray, probabilities: np.ndarray) -> float:
    return abs(counts / counts.sum() - probabilities).sum() / 2


def tilted(beta: float) -> np.ndarray:
    """Equation 4: pi exp(r / beta) / Z."""
    weights = PI * np.exp(SCORES / beta)
    return weights / weights.sum()


def pools(draws: int, size: int, seed: int = 0) -> np.ndarray:
    """(draws, size) answers that the policy wrote, each a candidate of its own."""
    return np.random.default_rng(seed).choice(len(PI), (draws, size), p=PI)


def first_accepted(pools: np.ndarray, beta: float) -> np.ndarray:
    """How often each answer is the first one accepted from its pool."""
    rng, counts = np.random.default_rng(1), np.zeros(len(PI))
    for pool, scores in zip(pools.tolist(), SCORES[pools].tolist(), strict=True):
        (first,) = rejection_sample(scores, 1, beta, rng)
        counts[pool[first]] += 1
    return counts


@pytest.mark.parametrize("beta, draws", [(0.5, 200_000), (0.2, 20_000), (2.0, 20_000)])
def test_the_first_accepted_follows_the_best_policy(beta, draws):
    """Pools of 24 hold the best answer but for 0.82^24 = 1 % of them."""
    counts = first_accepted(pools(draws, 24), beta)
    assert total_variation(counts, tilted(beta)) < 0.03
    # And follows neither the policy itself nor the best one for another beta.
    assert total_variation(counts, PI) > 0.1
    assert total_variation(counts, tilted(2 * beta)) > 0.05


@pytest.mark.parametrize("size", (2, 5, 24))
@pytest.mark.parametrize("beta", (0.2, 2.0))
def test_the_first_accepted_is_what_direct_simulation_says(size, beta):
    """Of small pools too, where the best answer is often missing and the maximum is the pool's."""
    counts = first_accepted(pools(20_000, size), beta)
    # All candidates at once, other draws: the first whose uniform number is low enough.
    pool = pools(200_000, size, seed=2)
    height = np.exp((SCORES[pool] - SCORES[pool].max(1, keepdims=True)) / beta)
    first = (np.random.default_rng(3).random(pool.shape) < height).argmax(1)
    simulated = np.bincount(pool[np.arange(len(pool)), first], minlength=len(PI)) / len(pool)
    assert total_variation(counts, simulated) < 0.02
    if (size, beta) == (2, 0.2):  # too few to follow the best policy
        assert total_variation(counts, tilted(beta)) > 0.2


def chi_square(counts: list[float], expected: list[float]) -> tuple[float, float]:
    """Pearson's statistic and its mean plus five standard deviations; what is expected fewer than
    five times is left out.
    """
    often = [(n, e) for n, e in zip(counts, expected, strict=True) if e >= 5]
    free = len(often) - 1
    return sum((n - e) ** 2 / e for n, e in often), free + 5 * math.sqrt(2 * free)


def exactly(answers: str, scores: list[float], n: int, beta: float) -> dict[tuple, float]:
    """The probability of every outcome, by going through all that can happen. Where no two of the
    answers (letters) are equal, this is Algorithm 1.
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
        ("abcd", [4.0, 0.2, 0.5, 3.9], 2, 0.7),
        ("abcd", [1.0, 0.0, 1.0, 0.5], 3, 0.4),  # two best
        ("abc", [0.3, 0.1, 0.2], 3, 0.2),
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
    outcomes = sorted(expected)
    statistic, most = chi_square(
        [found[outcome] for outcome in outcomes], [many * expected[x] for x in outcomes]
    )
    assert statistic < most


def accepted_in_order(pools: np.ndarray, n: int, beta: float, copies: bool) -> Counter[tuple]:
    """How often which answers were accepted, in which order."""
    rng, found = np.random.default_rng(1), Counter()
    for pool in pools.tolist():
        pool = pool if copies else list(dict.fromkeys(pool))
        found[
            tuple(pool[i] for i in rejection_sample(SCORES[pool].tolist(), n, beta, rng, pool))
        ] += 1
    return found


def test_the_accepted_are_a_sample_without_replacement():
    """Step by step as section 3.2 has it: each from equation 4 among those not accepted yet.
    Without the copies, they are not.
    """
    best, expected = tilted(0.5), {}
    for order in itertools.permutations(range(len(PI)), 2):
        one, two = best[list(order)]
        expected[order] = one * two / (1 - one)
    for copies in (True, False):
        found = accepted_in_order(pools(20_000, 48), 2, 0.5, copies)
        assert all(len(set(order)) == 2 for order in found)
        counts = np.array([found[order] for order in expected], float)
        distance = total_variation(counts, np.array(list(expected.values())))
        assert distance < 0.03 if copies else distance > 0.08


def test_a_large_beta_takes_anyone():
    """The scores play no part; of exchangeable candidates every set is taken equally often."""
    rng, sets = np.random.default_rng(0), Counter()
    for _ in range(20_000):
        order = rng.permutation(6)
        taken = rejection_sample(SCORES[order].tolist(), 2, 1e9, rng)
        sets[frozenset(order[taken].tolist())] += 1
    assert len(sets) == math.comb(6, 2)
    statistic, most = chi_square(list(sets.values()), [20_000 / len(sets)] * len(sets))
    assert statistic < most
    assert rejection_sample(SCORES.tolist(), 4, math.inf, rng) == [0, 1, 2, 3]


@pytest.mark.parametrize("beta", (0.0, 5e-324, 1e-300, 1e-3))
def test_a_small_beta_takes_the_best(beta):
    """Best of n, best first; of equal ones the first."""
    rng = random.Random(0)
    for size in (1, 2, 7, 64):
        scores = [round(rng.gauss(0, 5), 1) for _ in range(size)]
        best = sorted(range(size), key=lambda i: -scores[i])
        for n in (1, 3, size):
            taken = rejection_sample(scores, n, beta, np.random.default_rng(0))
            assert taken == best[:n]
            answers = [f"{score}" for score in scores]  # equal where the scores are
            different = list({answers[i]: i for i in reversed(best)}.values())[::-1]
            taken = rejection_sample(scores, n, beta, np.random.default_rng(0), answers)
            assert taken == different[:n]


@pytest.mark.parametrize("beta", (0.0, 1e-300, 0.5, 1e300, math.inf))
@pytest.mark.parametrize(
    "scores",
    [[], [3.0], [0.5] * 5, [1e308, -1e308, 0.0], [-1e300, 1e300], [5e-324, 0.0, -0.0]],
)
def test_it_ends_for_any_scores(scores, beta):
    """Each once, and all of them where as many or more are asked for."""
    for n in range(len(scores) + 3):
        taken = rejection_sample(scores, n, beta, np.random.default_rng(n))
        assert len(taken) == len(set(taken)) == min(n, len(scores))
        assert set(taken) <= set(range(len(scores)))
        for answers in ([7] * len(scores), [i % 2 for i in range(len(scores))]):
            taken = rejection_sample(scores, n, beta, np.random.default_rng(n), answers)
            assert len({answers[i] for i in taken}) == len(taken) == min(n, len(set(answers)))


def test_only_differences_of_scores_count():
    """Numbers that are exact in binary: the very same candidates are taken, not only as often."""
    scores = [0.25, 1.5, -0.75, 1.25, 0.5]
    for seed in range(50):
        one = rejection_sample(scores, 3, 0.5, np.random.default_rng(seed))
        two = rejection_sample([s + 1024 for s in scores], 3, 0.5, np.random.default_rng(seed))
        three = rejection_sample([4 * s for s in scores], 3, 2.0, np.random.default_rng(seed))
        assert one == two == three


# -- the games


def test_a_first_round_is_disjoint():
    for n in range(10):
        scores = [float(i) for i in range(n)]
        pairs = pair_up(scores, "first-round", np.random.default_rng(n))
        assert len(pairs) == n // 2
        played = [player for pair in pairs for player in pair]
        assert len(played) == len(set(played))
        assert all(scores[winner] > scores[loser] for winner, loser in pairs)


def test_a_first_round_is_random():
    """Of four players every one of the six games takes place equally often."""
    rng, games = np.random.default_rng(0), Counter()
    for _ in range(6_000):
        games.update(pair_up([0.0, 1.0, 2.0, 3.0], "first-round", rng))
    assert len(games) == 6
    # Two games a round, of which one says the other: a third of the rounds each.
    statistic, most = chi_square([games[1, 0], games[2, 0], games[3, 0]], [2_000] * 3)
    assert statistic < most


def test_a_tournament_has_one_winner():
    """Whoever has lost is out, the best has not; sorting and pairing neighbours would differ."""
    for n in range(1, 18):
        for seed in range(20):
            scores = np.random.default_rng(seed).permutation(n).astype(float).tolist()
            pairs = pair_up(scores, "tournament", np.random.default_rng([seed, 1]))
            assert len(pairs) == n - 1
            losers = [loser for _, loser in pairs]
            assert len(set(losers)) == n - 1 and scores.index(n - 1) not in losers
            for at, (winner, loser) in enumerate(pairs):
                assert scores[winner] > scores[loser]
                assert winner not in losers[:at]
            games = Counter(winner for winner, _ in pairs) + Counter(losers)
            assert n == 1 or max(games.values()) <= math.ceil(math.log2(n))


def test_an_odd_one_does_not_wait_twice():
    """Five players: whoever had no game in the first round has one in the second."""
    for seed in range(50):
        pairs = pair_up([float(i) for i in range(5)], "tournament", np.random.default_rng(seed))
        (alone,) = set(range(5)).difference(*pairs[:2])
        assert alone in pairs[2]


def test_a_tournament_is_random():
    """The best of four meets the second best in the first round or in the last: always. The third
    meets the worst in the first round only if the two best do: one time in three.
    """
    rng = np.random.default_rng(0)
    games = Counter()
    for _ in range(3_000):
        games.update(pair_up([0.0, 1.0, 2.0, 3.0], "tournament", rng))
    assert games[3, 2] == 3_000 and abs(games[1, 0] - 1_000) < 130  # 5 standard deviations


def test_equal_scores_make_no_pair():
    rng = np.random.default_rng(0)
    for ranking in ("first-round", "tournament"):
        assert pair_up([1.0] * 7, ranking, rng) == []
        assert pair_up([], ranking, rng) == pair_up([1.0], ranking, rng) == []
    # In a tournament one of the two goes on: each is as likely to meet the third.
    met = Counter()
    for _ in range(3_000):
        met.update(pair_up([1.0, 1.0, 0.0], "tournament", rng))
    assert met.keys() == {(0, 2), (1, 2)}
    assert abs(met[0, 2] - met[1, 2]) < 300
    assert sum(met.values()) == 3_000  # after a game without a pair, or before one


# -- the loss


def rso_equation(chosen, rejected, ref_chosen, ref_rejected, gamma, loss):
    """Equations 8 to 10 for one pair: (loss, its gradient by the four log-probs)."""
    if loss == "hinge":
        margin, by_ref = gamma * chosen - gamma * rejected, 0.0
    else:
        margin, by_ref = gamma * (chosen - ref_chosen) - gamma * (rejected - ref_rejected), 1.0
    if loss == "sigmoid-norm":
        value, slope = -log_sigmoid(margin), -sigmoid(-margin) * gamma
    else:
        value, slope = max(0.0, 1 - margin), -gamma if margin < 1 else 0.0
    return value, [slope, -slope, -by_ref * slope, by_ref * slope]


def called_rso(pairs: list[tuple[float, ...]], gamma: float, loss: str, dtype=torch.float64):
    """(losses, gradients by pair, metrics). The hinge asks no reference, so none has a gradient."""
    columns = list(zip(*pairs, strict=True))
    if loss == "hinge":
        refs = [torch.tensor(x, dtype=dtype) for x in columns[2:]]
        losses, gradients, metrics = called(rso_loss, columns[:2], *refs, gamma, loss, dtype=dtype)
        gradients += [[0.0] * len(pairs)] * 2
    else:
        losses, gradients, metrics = called(rso_loss, columns, gamma, loss, dtype=dtype)
    return losses, list(zip(*gradients, strict=True)), metrics


def test_rso_by_hand():
    """The chosen answer twice as likely as under the reference, the rejected one half as likely."""
    pair = (math.log(2 / 100), math.log(1 / 200), math.log(1 / 100), math.log(1 / 100))
    # The margin is ln 4, so that sigmoid(ln 4) = 4 / 5; as log-probs alone it is ln 4 too.
    (loss,), (gradient,), metrics = called_rso([pair], 1.0, "sigmoid-norm")
    assert loss == pytest.approx(math.log(5 / 4), rel=F64)
    assert gradient == pytest.approx([-1 / 5, 1 / 5, 1 / 5, -1 / 5], rel=F64)
    assert metrics["rewards/chosen"] == pytest.approx([math.log(2)], rel=F64)
    # ln 4 is more than 1: the hinges are closed. At gamma 1/2, ln 2 is not.
    for loss in ("hinge-norm", "hinge"):
        assert called_rso([pair], 1.0, loss)[:2] == ([0.0], [(0.0, 0.0, 0.0, 0.0)])
        (value,), (gradient,), _ = called_rso([pair], 0.5, loss)
        assert value == pytest.approx(1 - math.log(2), rel=F64)
        by_ref = 0.5 if loss == "hinge-norm" else 0.0
        assert gradient == pytest.approx([-0.5, 0.5, by_ref, -by_ref], rel=F64)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("gamma", (0.005, 0.05, 0.5, 3.0))
def test_rso_is_the_equation(gamma, loss):
    rng = random.Random(0)
    pairs = [tuple(rng.uniform(-200, -1) for _ in range(4)) for _ in range(50)]
    pairs += [tuple(rng.gauss(-40, 2) for _ in range(4)) for _ in range(50)]  # and near misses
    losses, gradients, _ = called_rso(pairs, gamma, loss)
    for pair, value, gradient in zip(pairs, losses, gradients, strict=True):
        expected, by_input = rso_equation(*pair, gamma, loss)
        # Log-probs of 200 carry rounding of 200 * 2^-53 into a margin, absolutely.
        assert value == pytest.approx(expected, rel=F64, abs=F64)
        assert gradient == pytest.approx(by_input, rel=1e-10, abs=1e-15)


@pytest.mark.parametrize("loss", LOSSES)
def test_gradient_of_rso_equation(loss):
    pair = [-12.0, -9.5, -11.0, -10.0]
    _, gradient = rso_equation(*pair, 0.3, loss)
    found = slopes(lambda *x: rso_equation(*x, 0.3, loss)[0], pair)
    assert found == pytest.approx(gradient, rel=1e-8)


@pytest.mark.parametrize("gamma", (0.05, 0.5))
def test_sigmoid_norm_is_dpo(gamma):
    rng = random.Random(1)
    columns = [[rng.uniform(-200, -1) for _ in range(50)] for _ in range(4)]
    losses, gradients, metrics = called(rso_loss, columns, gamma)  # it is the default
    theirs, by_theirs, their_metrics = called(dpo_loss, columns, gamma)
    assert losses == pytest.approx(theirs, rel=1e-12)
    for gradient, expected in zip(gradients, by_theirs, strict=True):
        assert gradient == pytest.approx(expected, rel=1e-12)
    assert metrics == their_metrics  # the same names too


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_where_the_losses_start(dtype):
    """The policy is its reference: ln 2, 1, and for the hinge whatever the policy is."""
    pair = (-17.0, -18.0, -17.0, -18.0)
    for loss, value in (("sigmoid-norm", math.log(2)), ("hinge-norm", 1.0), ("hinge", 0.5)):
        losses, _, metrics = called_rso([pair], 0.5, loss, dtype)
        assert losses == pytest.approx([value], rel=2 * torch.finfo(dtype).eps)
        assert metrics["rewards/margins"] == metrics["rewards/accuracies"] == [0.0]


@pytest.mark.parametrize("loss", ("hinge-norm", "hinge"))
def test_a_hinge_closes_at_one_over_gamma(loss):
    """Nats of log-ratio; before it the slope is gamma wherever the pair stands, behind it 0."""
    gamma, tiny = 0.25, 2.0**-30
    for difference, open_ in ((-400.0, 1), (0.0, 1), (4 - tiny, 1), (4 + tiny, 0), (400.0, 0)):
        pair = (-500.0 + difference, -500.0, -7.0, -7.0)
        (value,), (gradient,), _ = called_rso([pair], gamma, loss)
        assert value == pytest.approx(open_ * (1 - gamma * difference), abs=1e-12)
        assert gradient[:2] == (-gamma * open_, gamma * open_)
    # At the kink itself there is nothing left to gain.
    assert called_rso([(-3.0, -7.0, -5.0, -5.0)], gamma, loss)[0] == [0.0]


def test_the_hinge_sees_no_reference_and_reports_it():
    """Its rewards are those of the others: gamma times log-ratios."""
    near, far = (-10.0, -12.0, -11.0, -11.0), (-10.0, -12.0, -90.0, -30.0)
    losses, _, metrics = called_rso([near, far], 0.5, "hinge")
    assert losses == [0.0, 0.0] and metrics["loss"] == losses
    assert metrics["rewards/chosen"] == [0.5, 40.0]
    assert metrics["rewards/rejected"] == [-0.5, 9.0]
    assert metrics["rewards/margins"] == [1.0, 31.0]
    _, _, metrics = called_rso([(-10.0, -12.0, -9.0, -13.0)], 0.5, "hinge")
    assert metrics["rewards/margins"] == [-1.0] and metrics["rewards/accuracies"] == [0.0]


def test_far_margins_stay_finite():
    """All numbers here are exact in fp32 too."""
    for margin in (1000.0, -1000.0):
        pair = (-2000.0 + margin, -2000.0, -50.0, -50.0)
        losses, (gradient,), _ = called_rso([pair], 1.0, "sigmoid-norm", torch.float32)
        assert losses == [max(0.0, -margin)]
        assert gradient[0] == (-1.0 if margin < 0 else 0.0)


def test_a_loss_that_is_none():
    with pytest.raises(KeyError):
        rso_loss(*[torch.zeros(1)] * 4, 0.05, "hinge-nrom")


# -- from samples to pairs


class Letters:
    """A tokenizer: 0 ends, 1 begins; 2, 3, ... are a, b, ..., and so are 28, 29, ..."""

    stop_ids, bos = frozenset([0]), [1]

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(ord("a") + (i - 2) % 26) for i in ids)


def sampled(text: str, scores: list[float], prompt: int = 5) -> samples.Sampled:
    """Answers of a letter each; a capital one is the same letter by another id, without an end."""
    ids = [[ord(x) - 95, 0] if x.islower() else [ord(x) - 37] for x in text]
    answers = [np.array(x, np.int32) for x in ids]
    return samples.Sampled(np.array([1, prompt], np.int32), answers, np.array(scores))


def letters(rows: list[common.Row]) -> list[str]:
    return ["".join(generation.text_of(y, Letters()) for y in row.responses) for row in rows]


@pytest.mark.parametrize("ranking", ("first-round", "tournament"))
def test_pairs_are_of_different_texts(ranking):
    """Also where their ids differ: other methods read the texts."""
    assert Letters().decode([2, 28]) == "aa"
    made = sampled("abAaBb", [1.0, 0.0, 1.0, 1.0, 0.0, 0.0])
    for i in range(20):
        rows = rso.pairs_of([made] * 3, 6, 0.5, ranking, (i, 1), Letters(), "")
        assert letters(rows) == ["ab"] * 3
        assert all(row.scores.tolist() == [1.0, 0.0] for row in rows)
        assert all(row.prompt is row.ask is made.prompt for row in rows)
    alike = sampled("aAaaA", [1.0, 0.9, 1.0, 1.0, 0.9])
    assert rso.pairs_of([alike], 4, 0.5, ranking, (0, 1), Letters(), "") == []
    assert rso.pairs_of([], 4, 0.5, ranking, (0, 1), Letters(), "") == []


def test_what_is_drawn_for_a_prompt_depends_on_its_number_alone():
    made = [sampled("abcdefgh", [0.1 * i for i in range(8)], prompt) for prompt in range(2, 12)]
    named = (4, 0.3, "first-round", (3, 1), Letters(), "")
    rows = rso.pairs_of(made, *named)
    assert len(rows) == 20
    # The first pairs of all prompts, then the second ones.
    assert [int(row.prompt[1]) for row in rows] == [*range(2, 12)] * 2
    few = rso.pairs_of(made[:6], *named)
    assert letters(few) == letters(rows)[:6] + letters(rows)[10:16]
    # Nor is it the same for all: of these answers six pairs and more would be equal.
    assert len(set(letters(rows)[:10])) > 5
    for seed in ((3, 2), (4, 1)):
        other = rso.pairs_of(made, 4, 0.3, "first-round", seed, Letters(), "")
        assert letters(other) != letters(rows)


def test_pairs_in_a_file(tmp_path):
    """A prompt without a BOS in front loses nothing; scores are numbers that JSON has."""
    rows = rso.pairs_of(
        [sampled("ab", [0.1, 0.7])], 2, math.inf, "first-round", (0, 1), Letters(), ""
    )
    whole = np.array([7, 8], np.int32)
    rows.append(common.Row(whole, rows[0].responses, whole, np.array([2.0, 1.0])))
    samples.write_pairs(tmp_path / "pairs.jsonl", rows, Letters())
    sides = {"chosen_ids": [3, 0], "rejected_ids": [2, 0], "chosen": "b", "rejected": "a"}
    assert json_lines(tmp_path / "pairs.jsonl") == [
        sides | {"prompt": "d", "prompt_ids": [1, 5], "chosen_score": 0.7, "rejected_score": 0.1},
        sides | {"prompt": "fg", "prompt_ids": [7, 8], "chosen_score": 2.0, "rejected_score": 1.0},
    ]


# -- whole runs


LENGTHS = """
def score(prompts, responses):
    return [len(response) % 11 / 3 for response in responses]


def constant(prompts, responses):
    return [0.5] * len(responses)


def half(prompts, responses):
    raise_after.append(None)
    if len(raise_after) > 1:
        raise RuntimeError("gone")
    return score(prompts, responses)


raise_after = []
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A file of 60 prompts, of which about 3 are held out, and one of rewards."""
    folder = tmp_path_factory.mktemp("rso")
    (folder / "lengths.py").write_text(LENGTHS)
    return write_jsonl(folder / "prompts.jsonl", [{"prompt": r["prompt"]} for r in pair_rows(60)])


@pytest.fixture
def run(checkpoints, made, plain, monkeypatch, _as_in_a_fresh_process):  # noqa: F811
    """run(folder, **flags) -> the exit status of a whole run in this process."""
    flags = {
        "sampling_beta": 0.5, "gamma": 0.5, "samples": 6, "accepted": 4, "temperature": 1.0,
        "top_k": 0, "max_length": 52,
    }  # fmt: skip
    monkeypatch.setitem(OWN, "rso", flags)

    def go(folder: str, reward: str = "score", data: Path = made, model="llama", **more) -> int:
        named = f"{made.parent / 'lengths.py'}:{reward}" if reward.isidentifier() else reward
        return train(rso, checkpoints(model), data, folder, reward=named, **more)

    return go


def json_lines(file: str) -> list[dict]:
    return [json.loads(line) for line in Path(file).read_text().splitlines()]


@pytest.mark.parametrize("model", ("llama", "qwen2"))
def test_a_run_leaves_samples_and_pairs(run, made, checkpoints, tmp_path, model):
    """Pairs are of answers that were sampled, with their scores; what is trained on are the ids."""
    data = made
    if model == "qwen2":
        asked = [[{"role": "user", "content": row["prompt"]}] for row in json_lines(made)]
        data = write_jsonl(tmp_path / "asked.jsonl", [{"prompt": ask} for ask in asked])
    assert run("out", data=data, model=model, max_steps=2) == 0
    before = load_file(checkpoints(model) / "model.safetensors")
    after = load_file("out/model.safetensors")
    assert [name for name in before if torch.equal(before[name], after[name])] == []
    steps = steps_of("out")
    assert [step["step"] for step in steps] == [1, 2]
    # gamma: what the log-ratio is multiplied with, where the model scores answers.
    assert json.loads(Path("out/config.json").read_text())["plainpref"]["beta"] == 0.5
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)

    tokenizer = common.load_tokenizer(str(checkpoints(model)), 64)
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
    assert set(taken.values()) == {1}  # games of a first round are disjoint, answers are different
    first = [tuple(pair["prompt_ids"]) for pair in pairs[:10]]
    assert len(set(first)) == 10
    held_out = json_lines("out/sampled-held-out.jsonl")
    assert held_out and not {tuple(row["prompt_ids"]) for row in held_out} & sampled.keys()
    # The pairs are rows for the other methods.
    rows, more = common.load_rows(
        "out/accepted.jsonl", None, "pair", tokenizer, 64, 40, skip_bad_rows=True
    )
    assert len(rows) + len(more) > len(pairs) / 2


def test_a_run_trains_on_what_it_accepted(run, monkeypatch):
    """The first step's log-probs are those of pairs in the file, under the model that sampled."""
    planned, plan = [], common.Run.plan
    monkeypatch.setattr(
        common.Run, "plan", lambda run, rows: planned.append(rows) or plan(run, rows)
    )
    assert run("out", max_steps=2) == 0
    pairs = json_lines("out/accepted.jsonl")
    assert [[r.tolist() for r in row.responses] for row in planned[0].rows] == [
        [pair["chosen_ids"], pair["rejected_ids"]] for pair in pairs
    ]
    assert [row.prompt.tolist() for row in planned[0].rows] == [p["prompt_ids"] for p in pairs]
    step = steps_of("out")[0]
    expected = planned[0].ref_logps[[i for micro in step_one(planned[0]) for i in micro]].mean(0)
    found = [step["logps/chosen"], step["logps/rejected"]]
    assert found == pytest.approx(expected.tolist(), rel=1e-5)


def step_one(rows: common.Rows) -> list[list[int]]:
    return common.Run.current.step_rows(0)


@pytest.mark.parametrize("flags", [{}, {"ranking": "tournament", "loss": "hinge"}])
def test_same_steps_with_other_micro_batches(run, checkpoints, flags):
    for size in (8, 2):
        assert run(f"of-{size}", **HOT | flags | {"micro_batch_size": size}) == 0
    assert_same_weights("of-8", "of-2", checkpoints("llama"))
    assert_same_log("of-8", "of-2")
    for name in ("sampled.jsonl", "accepted.jsonl"):
        assert Path("of-8", name).read_bytes() == Path("of-2", name).read_bytes()


def test_a_run_that_broke_goes_on_with_its_samples(run, monkeypatch):
    """Nothing is sampled again; and if it has to be, it is by the model that the run began with."""
    run("whole")
    generate = generation.generate
    for lost in (False, True):
        folder, cache = f"broken-{lost}", {"cache_dir": f"cache-{lost}"}
        with monkeypatch.context() as patch:
            at_loss_call(patch, rso, in_step(4) + 1, break_down)
            with pytest.raises(Broken):
                run(folder, **cache)
        assert checkpoints_in(folder) == [2]
        with monkeypatch.context() as patch:
            patch.setattr(generation, "generate", generate if lost else None)
            if lost:
                for file in (*Path(folder).glob("sampled*"), *Path(f"cache-{lost}").iterdir()):
                    file.unlink()
                Path(folder, "accepted.jsonl").unlink()
            assert run(folder, **cache) == 0
        assert_same_run("whole", folder)
        for name in ("sampled.jsonl", "sampled-held-out.jsonl", "accepted.jsonl"):
            assert Path("whole", name).read_bytes() == Path(folder, name).read_bytes()


def test_a_mended_reward_is_another_run(run, made, monkeypatch, tmp_path):
    """It would go on with other pairs than the checkpoint has learned from. Which file, is said."""
    mine = tmp_path / "mine.py"
    mine.write_text(LENGTHS)
    with monkeypatch.context() as patch:
        at_loss_call(patch, rso, in_step(4) + 1, break_down)
        with pytest.raises(Broken):
            run("out", reward=f"{mine}:score")
    before = Path("out/sampled.jsonl").read_bytes()
    mine.write_text(LENGTHS.replace("% 11", "% 12"))
    with monkeypatch.context() as patch:
        patch.setattr(generation, "generate", None)
        with pytest.raises(common.UserError, match=f"out holds another run: .*{mine} has changed"):
            run("out", reward=f"{mine}:score")
        assert Path("out/sampled.jsonl").read_bytes() == before
        mine.write_text(LENGTHS)
        assert run("out", reward=f"{mine}:score") == 0


def test_other_settings_of_the_rest_find_the_samples(run, monkeypatch, capsys):
    """Sampled once, learned from in several ways."""
    assert run("out", max_steps=1) == 0
    samples = [Path("out", name) for name in ("sampled.jsonl", "sampled-held-out.jsonl")]
    cached = sorted(Path("runs/.cache").glob("sampled-*.jsonl"))
    assert len(cached) == 2 and all(any(x.samefile(y) for y in cached) for x in samples)
    said = capsys.readouterr().out
    assert all(f"tokens/s, in {file}\n" in said for file in cached)
    monkeypatch.setattr(generation, "generate", None)
    for name, value in (
        ("sampling_beta", 0.1), ("gamma", 0.3), ("accepted", 2), ("ranking", "tournament"),
    ):  # fmt: skip
        assert run(name, max_steps=1, **{name: value}) == 0
        assert all(file.samefile(Path(name, file.name)) for file in samples)
        same = [Path(folder, "accepted.jsonl").read_bytes() for folder in ("out", name)]
        assert (same[0] == same[1]) == (name == "gamma")


def test_a_run_that_broke_while_it_sampled(run, monkeypatch):
    """Before there is anything to train on: other settings may follow, and are sampled anew."""
    sample = samples.sample_and_score

    def a_few(*args, **more):
        return sample(*args, **more, chunk=16)

    monkeypatch.setattr(samples, "sample_and_score", a_few)
    run("whole")
    with pytest.raises(common.UserError, match="gone"):
        run("broken", reward="half", cache_dir="cache")
    (half,) = Path("cache").glob("sampled-*.jsonl")
    assert len(json_lines(half)) == 16 and not Path("broken/sampled.jsonl").exists()
    assert run("broken", cache_dir="cache") == 0
    assert_same_run("whole", "broken")
    assert run("other seed", seed=1) == 0
    assert run("other half", accepted=2) == 0
    texts = [Path(folder, "sampled.jsonl").read_text() for folder in ("whole", "other seed")]
    assert texts[0] != texts[1]
    assert Path("other half/sampled.jsonl").read_text() == texts[0]
    assert len(json_lines("other half/accepted.jsonl")) < len(json_lines("whole/accepted.jsonl"))


@pytest.mark.parametrize(
    "flags, told",
    [
        ({"sampling_beta": -0.1}, "--sampling-beta"),
        ({"sampling_beta": math.nan}, "--sampling-beta"),
        ({"gamma": 0.0}, "--gamma"),
        ({"temperature": 0.0}, "--temperature"),
        ({"top_k": -1}, "--top-k"),
        ({"accepted": 1}, "--accepted"),
        ({"samples": 3}, "--samples"),
        ({"prompts": 0}, "--prompts"),
        ({"reward": ""}, "--reward"),
        ({"reward": "nowhere.py:score"}, "nowhere.py"),
        ({"micro_batch_size": 3}, "--micro-batch-size 3 does not divide a process's 8 rows"),
    ],
)
def test_what_cannot_work_is_said(run, monkeypatch, flags, told):
    """Before hours of sampling; before the model is there."""
    monkeypatch.setattr(common, "load_policy", None)
    with pytest.raises(common.UserError, match=told):
        run("out", **flags)


def test_too_few_pairs(run):
    """Which only the samples tell."""
    with pytest.raises(common.UserError, match="less than one --batch-size"):
        run("out", reward="constant")


def test_fewer_prompts(run, capsys):
    assert run("out", prompts=20, max_steps=1, samples=4) == 0
    assert len(json_lines("out/sampled.jsonl")) == 20
    assert "pairs of 20 prompts" in capsys.readouterr().out


@pytest.mark.slow
def test_two_processes_sample_and_train_as_one(run, made, checkpoints):
    """Other machines than the first learn the samples and the scores from it."""
    assert run("by-1", **HOT) == 0
    flags = SMALL | OWN["rso"] | HOT | {"model": checkpoints("llama"), "dataset": made}
    flags |= {"reward": f"{made.parent / 'lengths.py'}:score", "output_dir": Path("by-2").resolve()}
    flags |= {"cache_dir": Path("cache").resolve()}
    status, _, err = run_script("rso.py", *as_flags(**flags), processes=2)
    assert status == 0, err
    for name in ("sampled.jsonl", "sampled-held-out.jsonl", "accepted.jsonl"):
        assert Path("by-1", name).read_bytes() == Path("by-2", name).read_bytes()
    assert_same_weights("by-1", "by-2", checkpoints("llama"))
    assert_same_log("by-1", "by-2")


def test_what_samples_depend_on(run, made, monkeypatch):
    """All of that is in the facts that a file of samples is called by, and nothing else."""
    known, lengths = [], str(made.parent / "lengths.py")

    class Stop:
        def __init__(self, folder, label, cache, facts, prompts, samples):
            known.append(json.dumps(facts))
            assert cache == Path("runs/.cache") and lengths[:-3] in json.dumps(facts["files"])
            raise Broken

    monkeypatch.setattr(samples, "_Kept", Stop)
    other = made.parent / "lengths-2.py"
    other.write_text(LENGTHS.replace("% 11", "% 12"))
    moved = [
        {"seed": 1}, {"temperature": 0.9}, {"top_k": 5}, {"samples": 7}, {"prompts": 30},
        {"max_length": 50}, {"max_prompt_length": 39}, {"dtype": "float64"}, {"model": "qwen2"},
        {"reward": f"{other}:score"}, {"attn": "eager"}, {"lora_rank": 2},
    ]  # fmt: skip
    same = [
        {"gamma": 0.3},
        {"sampling_beta": 0.1},
        {"accepted": 2},
        {"loss": "hinge"},
        {"lr": 1e-4},
    ]
    for flags in [{}, *moved, *same]:
        with pytest.raises(Broken):
            run(f"out-{len(known)}", **flags)
    other.write_text(LENGTHS.replace("% 11", "% 13"))  # the same name
    with pytest.raises(Broken):
        run("out-again", reward=f"{other}:score")
    assert len(set(known)) == len(known) - len(same)
    assert len({known[0], *known[len(moved) + 1 : -1]}) == 1
