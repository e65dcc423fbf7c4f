"""Numbers and their intervals against brute force: every resample enumerated, truths planted and
found again, another optimiser, counting by hand.
"""

import itertools
import json
import math

import numpy as np
import pytest

import estimates
from estimates import Estimate


def exact_quantiles(values: list[float], sizes: list[float] | None = None) -> np.ndarray:
    """Of the mean over all n^n resamples, each as likely as the others."""
    sizes = sizes or [1.0] * len(values)
    means = []
    for drawn in itertools.product(range(len(values)), repeat=len(values)):
        means.append(sum(values[i] for i in drawn) / sum(sizes[i] for i in drawn))
    return np.quantile(means, (0.025, 0.975))


# -- means


@pytest.mark.parametrize("values", [[0.0, 1.0, 4.0, 10.0], [0.1, 0.5, -2.0, 3.0, 7.0]])
def test_an_interval_is_that_of_all_resamples(values, monkeypatch):
    """256 or 3,125 of them; with many draws the quantiles can only be one possible mean away."""
    monkeypatch.setattr(estimates, "RESAMPLES", 40_000)
    found = estimates.mean(np.array(values))
    assert (found.value, found.n) == (pytest.approx(np.mean(values)), len(values))
    np.testing.assert_allclose((found.low, found.high), exact_quantiles(values), atol=0.15)
    apart = np.array(values) - np.array([1.0, -1.0, 2.0, 0.0, 0.5])[: len(values)]
    paired = estimates.mean(apart)
    np.testing.assert_allclose((paired.low, paired.high), exact_quantiles([*apart]), atol=0.15)


def test_numbers_of_one_question_are_drawn_together(monkeypatch):
    monkeypatch.setattr(estimates, "RESAMPLES", 40_000)
    values = np.array([1.0, 0.0, 1.0, 1.0, 5.0, 2.0, np.nan, 3.0, 0.5, 0.2])
    found = estimates.mean(values, questions=np.array([7, 7, 3, 3, 3, 9, 9, 1, 4, 4]))
    assert (found.value, found.n) == (pytest.approx(13.7 / 9), 5)
    expected = exact_quantiles([1.0, 7.0, 2.0, 3.0, 0.7], [2.0, 3.0, 1.0, 1.0, 2.0])
    np.testing.assert_allclose((found.low, found.high), expected, atol=0.03)
    # Copies of a question tell nothing new: the interval is that of the questions.
    once = np.random.default_rng(0).random(50)
    assert estimates.mean(np.repeat(once, 4), questions=np.repeat(np.arange(50), 4)) == Estimate(
        pytest.approx(once.mean()), *map(pytest.approx, (lambda e: (e.low, e.high))(
            estimates.mean(once))), 50)  # fmt: skip
    own = estimates.mean(np.repeat(once, 4))
    both = estimates.mean(once)
    assert (own.high - own.low) == pytest.approx((both.high - both.low) / 2, rel=0.15)


@pytest.mark.parametrize("kind", ("normal", "bernoulli"))
def test_intervals_cover(kind):
    """Of 300 samples of 60, about 95 % have the truth in their interval."""
    rng, inside = np.random.default_rng(1), 0
    for _ in range(300):
        sample = rng.normal(2.0, 3.0, 60) if kind == "normal" else rng.random(60) < 0.3
        found = estimates.mean(sample)
        inside += found.low <= (2.0 if kind == "normal" else 0.3) <= found.high
    assert 0.90 <= inside / 300 <= 0.99


def test_paired_differences_are_drawn_together():
    """What both have in common goes: the interval is narrower than two of their own."""
    rng = np.random.default_rng(2)
    hard = rng.normal(0, 5, 200)
    a, b = hard + rng.normal(0.5, 0.5, 200), hard + rng.normal(0, 0.5, 200)
    change = estimates.mean(a - b)
    assert change.value == pytest.approx(estimates.mean(a).value - estimates.mean(b).value)
    assert 0 < change.low < change.value < change.high < 1
    assert estimates.mean(a).low < estimates.mean(b).high  # which alone would tell nothing
    # Equal n, equal draws: the same as resampling both and subtracting.
    draws = estimates.resamples(200, estimates.RESAMPLES)
    low, high = np.quantile(draws @ a / 200 - draws @ b / 200, (0.025, 0.975))
    assert (change.low, change.high) == (pytest.approx(low), pytest.approx(high))


def test_resamples():
    draws = estimates.resamples(7, 500, seed=3)
    assert draws.shape == (500, 7) and (draws.sum(1) == 7).all()
    assert abs(draws.mean(0) - 1).max() < 0.25  # no question is preferred
    assert draws[:, 0].var() == pytest.approx(6 / 7, abs=0.2)  # a binomial's: 7 * 1/7 * 6/7
    assert (draws == estimates.resamples(7, 500, seed=3)).all()
    assert (draws != estimates.resamples(7, 500, seed=4)).any()


def test_many_questions_are_resampled_in_parts(monkeypatch):
    """No part is a copy of another."""
    parts = list(estimates._in_parts(10, 0, size=4_000))
    assert [len(part) for part in parts] == [400] * 5
    assert len({part.tobytes() for part in parts}) == 5


def test_nothing_and_one():
    assert math.isnan(estimates.mean(np.array([])).value)
    assert estimates.mean(np.array([np.nan, 3.0])) == Estimate(3.0, n=1)
    assert estimates.mean(np.array([np.nan, 1.0, 2.0])).n == 2
    none = estimates.mean(np.array([np.nan])).as_dict()
    assert none == {"value": None, "low": None, "high": None, "n": 0}
    assert json.loads(json.dumps(Estimate(1.0, float("nan"), np.inf, 3).as_dict())) == {
        "value": 1.0, "low": None, "high": None, "n": 3}  # fmt: skip


def test_no_interval_where_all_are_alike():
    """40 of 40 won: the truth may well be 0.95, and no resample would tell."""
    assert estimates.mean(np.ones(40)) == Estimate(1.0, n=40)
    assert estimates.mean(np.full(9, 0.1)).low is None
    assert estimates.mean(np.array([1.0] * 39 + [0.0])).low < 0.95


def test_a_statistic_of_question_numbers():
    values = np.random.default_rng(3).exponential(1.0, 100)
    found = estimates.statistic(lambda at: float(values[at].mean()), 100, many=4_000)
    mean = estimates.mean(values)
    assert found.value == pytest.approx(mean.value)
    assert (found.low, found.high) == (pytest.approx(mean.low, abs=0.03),
                                       pytest.approx(mean.high, abs=0.03))  # fmt: skip
    median = estimates.statistic(lambda at: float(np.median(values[at])), 100)
    assert median.low < math.log(2) < median.high and median.value == np.median(values)
    assert estimates.statistic(lambda at: 4.0, 1) == Estimate(4.0, n=1)


# -- win rates


def test_outcomes():
    assert estimates.outcomes([1, 2, 3, 0.5], [2, 2, 1, 0.5]).tolist() == [0, 0.5, 1, 0.5]
    assert estimates.outcomes([True], [False]).tolist() == [1]


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def simulated(u: float, v: float, n: int, seed: int, longer: float = 5.0):
    """Outcomes of a model whose answers are so much longer, lengths of both sides."""
    rng = np.random.default_rng(seed)
    other = rng.integers(20, 60, n).astype(float)
    ours = np.maximum(1, other + np.rint(rng.normal(longer, 12, n)))
    d = ours - other
    wins = rng.random(n) < sigmoid(u + v * np.tanh(d / np.sqrt((d**2).mean())))
    return wins.astype(float), ours, other


def test_at_equal_length_without_a_difference():
    wins = np.array([1, 0, 0.5, 1, 1, 0])
    same = np.arange(6) + 3
    assert estimates.win_rate_at_equal_length(wins, same, same) == estimates.mean(wins)


@pytest.mark.parametrize("u, v", [(0.0, 1.5), (0.8, -1.0), (-0.5, 2.0), (0.4, 0.0)])
def test_a_planted_truth_is_found(u, v):
    wins, ours, other = simulated(u, v, 4_000, seed=5)
    found = estimates.win_rate_at_equal_length(wins, ours, other)
    assert found.value == pytest.approx(sigmoid(u), abs=0.04)
    assert found.low <= found.value <= found.high < found.low + 0.08
    if v:  # the raw rate has the length in it: its sign tells on which side
        assert (wins.mean() - found.value) * v > 0


def test_its_interval_covers():
    inside = 0
    for seed in range(60):
        found = estimates.win_rate_at_equal_length(*simulated(0.3, 1.0, 150, seed), many=300)
        inside += found.low <= sigmoid(0.3) <= found.high
    assert inside >= 51  # of 57 expected: 3 standard deviations of a binomial are 5


def test_who_only_likes_length_likes_neither_at_equal_length():
    rng = np.random.default_rng(7)
    other = rng.integers(20, 60, 1_000)
    ours = other + np.rint(rng.normal(8, 12, 1_000))
    found = estimates.win_rate_at_equal_length(estimates.outcomes(ours, other), ours, other)
    assert estimates.outcomes(ours, other).mean() > 0.7
    assert found.value == pytest.approx(0.5, abs=0.06)


def test_the_other_side_has_the_rest():
    wins, ours, other = simulated(0.6, 1.2, 300, seed=8)
    wins[::7] = 0.5
    one = estimates.win_rate_at_equal_length(wins, ours, other)
    back = estimates.win_rate_at_equal_length(1 - wins, other, ours)
    assert one.value + back.value == pytest.approx(1, abs=1e-9)
    assert one.low + back.high == pytest.approx(1, abs=1e-9)
    assert one.high + back.low == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("wins", (np.ones(40), np.zeros(40), (np.arange(40) >= 20) * 1.0))
def test_all_won_or_told_apart_by_length_stays_finite(wins):
    """The last one: won exactly where longer."""
    found = estimates.win_rate_at_equal_length(wins, np.arange(40) + 10.0, np.full(40, 29.5))
    assert 0 < found.value < 1
    if 0 < wins.mean() < 1:
        assert 0 < found.low <= found.value <= found.high < 1
    else:  # resamples would all be alike, and say that it is certain
        assert found.low is None and found.high is None
    assert found.value == pytest.approx(wins.mean(), abs=0.05)


def test_length_that_always_differs_by_as_much_cannot_be_told_from_quality():
    found = estimates.win_rate_at_equal_length(np.array([1.0, 0, 1]), np.full(3, 9), np.full(3, 4))
    assert math.isnan(found.value) and found.low is None and found.as_dict()["value"] is None


def test_rows_without_a_verdict_are_left_out():
    wins, ours, other = simulated(0.5, 1.0, 100, seed=9)
    more = np.insert(wins, 50, [np.nan] * 3)
    # Their lengths would move the scale.
    lengths = [np.insert(side, 50, [1.0, 999.0, 5.0]) for side in (ours, other + 1)]
    lengths[1] = np.insert(other, 50, [500.0, 1.0, 80.0])
    assert estimates.win_rate_at_equal_length(more, *lengths) == (
        estimates.win_rate_at_equal_length(wins, ours, other)
    )
    assert math.isnan(estimates.win_rate_at_equal_length(np.full(3, np.nan), ours[:3], 0).value)


def climbed(wins, x, counts) -> float:
    """The top of the penalised likelihood, found slowly: golden sections of u, for each of v."""

    def height(u: float, v: float) -> float:
        log = lambda p: np.log(np.maximum(p, 1e-300))  # noqa: E731
        p = sigmoid(u + v * x)
        likely = (counts * (wins * log(p) + (1 - wins) * log(1 - p))).sum()
        half = 0.5 * log(sigmoid(u)) + 0.5 * log(1 - sigmoid(u))
        return likely + half - v**2 / (2 * estimates.SLOPE_DEVIATION**2)

    def top(of, low: float, high: float) -> float:
        ratio = (5**0.5 - 1) / 2
        for _ in range(60):
            one, two = high - ratio * (high - low), low + ratio * (high - low)
            low, high = (low, two) if of(one) > of(two) else (one, high)
        return (low + high) / 2

    best_u = lambda v: top(lambda u: height(u, v), -12.0, 12.0)  # noqa: E731
    v = top(lambda v: height(best_u(v), v), -20.0, 20.0)
    return sigmoid(best_u(v))


@pytest.mark.parametrize("case", ("usual", "all won", "told apart", "rare", "counted"))
def test_the_fit_is_that_of_another_optimiser(case):
    """Golden sections know the top to about the square root of a double's rounding."""
    wins, ours, other = simulated(0.7, 1.3, 40, seed=11)
    d = ours - other
    x, counts = np.tanh(d / np.sqrt((d**2).mean())), np.ones((1, 40))
    wins = {"all won": np.ones(40), "told apart": (d > 0) * 1.0, "rare": np.eye(40)[3]}.get(
        case, wins
    )
    if case == "counted":
        counts = estimates.resamples(40, 1, seed=2)
        wins[:5] = 0.5
    found = estimates._intercepts(wins, x, counts)[0]
    assert found == pytest.approx(climbed(wins, x, counts[0].astype(float)), abs=1e-6)


# -- the rest


def spearman(a, b) -> float:
    """By its definition: a rank is 1 + how many are smaller + half of how many others are equal."""
    ranks = [
        [1 + sum(y < x for y in side) + (sum(y == x for y in side) - 1) / 2 for x in side]
        for side in (a, b)
    ]
    middle = (len(a) + 1) / 2
    apart = [[rank - middle for rank in side] for side in ranks]
    spread = math.prod(sum(r * r for r in side) for side in apart) ** 0.5
    return sum(x * y for x, y in zip(*apart, strict=True)) / spread


def test_rank_correlation():
    rng = np.random.default_rng(12)
    for n in (2, 3, 10, 40):
        a, b = rng.integers(0, 6, n) + np.arange(n) % 2, rng.normal(size=n).round(1)
        if len({*a}) > 1 and len({*b}) > 1:
            assert estimates.rank_correlation(a, b) == pytest.approx(spearman([*a], [*b]))
    assert estimates.rank_correlation([1, 2, 3], [10, 200, 3_000]) == pytest.approx(1)
    assert estimates.rank_correlation([1, 2, 2], [3, 1, 1]) == pytest.approx(-1)
    assert math.isnan(estimates.rank_correlation([1, 1], [1, 2]))
    assert math.isnan(estimates.rank_correlation([1], [1]))


def test_distinct():
    answers = [np.array([1, 2, 1, 2]), np.array([2, 1]), np.array([7]), np.array([], int)]
    assert estimates.distinct(answers, 1) == pytest.approx(3 / 7)  # 1, 2, 7
    assert estimates.distinct(answers, 2) == pytest.approx(2 / 4)  # (1, 2), (2, 1): 12 21 12, 21
    assert math.isnan(estimates.distinct([np.array([1])], 2))


def test_repetition():
    assert estimates.repetition(np.array([1, 2, 1, 2, 1, 2]), 2) == pytest.approx(3 / 5)
    assert estimates.repetition(np.array([5, 5, 5, 5, 5])) == pytest.approx(1 / 2)
    assert estimates.repetition(np.arange(9)) == 0
    assert math.isnan(estimates.repetition(np.array([1, 2, 3])))
