"""Estimates and intervals against brute force: all resamples, planted truths, another optimizer."""

import itertools
import json
import math

import numpy as np
import pytest

from evaluation import estimates
from evaluation.estimates import Estimate, mean, win_rate_at_equal_length


def exact_quantiles(values: list[float], sizes: list[float]) -> np.ndarray:
    """Of the mean over all n^n resamples."""
    draws = itertools.product(range(len(values)), repeat=len(values))
    means = [sum(values[i] for i in draw) / sum(sizes[i] for i in draw) for draw in draws]
    return np.quantile(means, (0.025, 0.975))


def test_an_interval_is_that_of_all_resamples(monkeypatch):
    """With many draws the quantiles are at most one possible mean away."""
    monkeypatch.setattr(estimates, "RESAMPLES", 40_000)
    values = [0.1, 0.5, -2.0, 3.0, 7.0]
    found = mean(np.array(values))
    assert (found.value, found.n) == (pytest.approx(np.mean(values)), 5)
    np.testing.assert_allclose((found.low, found.high), exact_quantiles(values, [1] * 5), atol=0.15)
    # Several values of one question are drawn together; NaN is no value.
    values = np.array([1.0, 0.0, 1.0, 1.0, 5.0, 2.0, np.nan, 3.0, 0.5, 0.2])
    found = mean(values, np.array([7, 7, 3, 3, 3, 9, 9, 1, 4, 4]))
    assert (found.value, found.n) == (pytest.approx(13.7 / 9), 5)
    expected = exact_quantiles([1.0, 7.0, 2.0, 3.0, 0.7], [2.0, 3.0, 1.0, 1.0, 2.0])
    np.testing.assert_allclose((found.low, found.high), expected, atol=0.03)


def test_intervals_cover():
    """About 95 % of the samples have the truth in their interval."""
    rng, inside, fair = np.random.default_rng(1), 0, 0
    for _ in range(300):
        found = mean(rng.random(60) < 0.3)
        inside += found.low <= 0.3 <= found.high
    for seed in range(60):
        found = win_rate_at_equal_length(*simulated(0.3, 1.0, 150, seed), many=100)
        fair += found.low <= sigmoid(0.3) <= found.high
    assert 0.90 <= inside / 300 <= 0.99 and fair >= 51  # 3 standard deviations below 57


def test_paired_differences_are_drawn_together():
    """What both models have in common cancels: the interval is narrower than their own."""
    rng = np.random.default_rng(2)
    hard = rng.normal(0, 5, 200)
    a, b = hard + rng.normal(0.5, 0.5, 200), hard + rng.normal(0, 0.5, 200)
    change = mean(a - b)
    assert change.value == pytest.approx(mean(a).value - mean(b).value)
    assert 0 < change.low < change.high < 1
    draws = estimates.resamples(200, estimates.RESAMPLES)
    assert (draws.sum(1) == 200).all() and abs(draws.mean(0) - 1).max() < 0.15
    low, high = np.quantile(draws @ a / 200 - draws @ b / 200, (0.025, 0.975))
    assert (change.low, change.high) == (pytest.approx(low), pytest.approx(high))


def test_without_an_interval():
    """40 of 40 won: the truth may be 0.95, and no resample would show it."""
    assert math.isnan(mean(np.array([])).value)
    assert mean(np.array([np.nan, 3.0])) == Estimate(3.0, n=1)
    assert mean(np.ones(40)) == Estimate(1.0, n=40)
    assert mean(np.array([1.0] * 39 + [0.0])).low < 0.95
    assert mean(np.arange(60_000) % 2.0).low == pytest.approx(0.496, abs=0.001)  # fewer resamples
    shown = {"value": None, "low": None, "high": 1.0, "n": 3}
    assert json.loads(json.dumps(Estimate(math.nan, math.inf, 1.0, 3).as_dict())) == shown
    assert f"{Estimate(0.25, -0.5, 1.0):+}" == "+0.250 [-0.500, +1.000]"


# -- win rates


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def simulated(u: float, v: float, n: int, seed: int):
    """Outcomes of a model whose answers are longer, and the lengths of both sides."""
    rng = np.random.default_rng(seed)
    other = rng.integers(20, 60, n).astype(float)
    ours = np.maximum(1, other + np.rint(rng.normal(5.0, 12, n)))
    d = ours - other
    wins = rng.random(n) < sigmoid(u + v * np.tanh(d / np.sqrt((d**2).mean())))
    return wins.astype(float), ours, other


def test_outcomes():
    ours, theirs = np.array([1, 2, 3, 0.5]), np.array([2, 2, 1, 0.5])
    assert estimates.outcomes(ours, theirs).tolist() == [0, 0.5, 1, 0.5]


@pytest.mark.parametrize("u, v", [(0.0, 1.5), (0.8, -1.0), (0.4, 0.0)])
def test_a_planted_truth_is_found(u, v):
    wins, ours, other = simulated(u, v, 4_000, seed=5)
    found = win_rate_at_equal_length(wins, ours, other, many=200)
    assert found.value == pytest.approx(sigmoid(u), abs=0.04)
    assert found.low <= found.value <= found.high < found.low + 0.08
    if v:  # the raw rate contains the length
        assert (wins.mean() - found.value) * v > 0


def test_the_other_side_has_the_rest_and_rows_without_a_verdict_are_left_out():
    wins, ours, other = simulated(0.6, 1.2, 300, seed=8)
    wins[::7] = 0.5
    one = win_rate_at_equal_length(wins, ours, other)
    back = win_rate_at_equal_length(1 - wins, other, ours)
    sums = [one.value + back.value, one.low + back.high, one.high + back.low]
    assert sums == pytest.approx([1, 1, 1], abs=1e-9)
    more = np.insert(wins, 50, [np.nan] * 3)  # their lengths would move the scale
    lengths = np.insert(ours, 50, [1.0, 999.0, 5.0]), np.insert(other, 50, [500.0, 1.0, 80.0])
    assert win_rate_at_equal_length(more, *lengths) == one


def test_equal_lengths_constant_differences_and_all_won():
    wins, same = np.array([1, 0, 0.5, 1, 1, 0]), np.arange(6) + 3
    assert win_rate_at_equal_length(wins, same, same) == mean(wins)
    found = win_rate_at_equal_length(wins, same + 2, same)  # longer or better?
    assert math.isnan(found.value) and found.low is None
    found = win_rate_at_equal_length(np.ones(40), np.arange(40) + 10, np.full(40, 29.5))
    assert 0.95 < found.value < 1 and found.low is None


def climbed(wins, x, counts) -> float:
    """The top of the penalized likelihood by golden sections of u, for each of v."""

    def height(u: float, v: float) -> float:
        p, at_zero = (np.clip(sigmoid(z), 1e-300, 1 - 1e-16) for z in (u + v * x, u))
        likely = (counts * (wins * np.log(p) + (1 - wins) * np.log(1 - p))).sum()
        half = 0.5 * np.log(at_zero) + 0.5 * np.log(1 - at_zero)
        return likely + half - v**2 / (2 * estimates.SLOPE_DEVIATION**2)

    def top(of, low: float, high: float) -> float:
        ratio = (5**0.5 - 1) / 2
        for _ in range(60):
            one, two = high - ratio * (high - low), low + ratio * (high - low)
            low, high = (low, two) if of(one) > of(two) else (one, high)
        return (low + high) / 2

    best_u = lambda v: top(lambda u: height(u, v), -12.0, 12.0)  # noqa: E731
    return sigmoid(best_u(top(lambda v: height(best_u(v), v), -20.0, 20.0)))


@pytest.mark.parametrize("case", ("usual", "all won", "separated", "counted"))
def test_the_fit_is_that_of_another_optimizer(case):
    wins, ours, other = simulated(0.7, 1.3, 40, seed=11)
    d = ours - other
    x, counts = np.tanh(d / np.sqrt((d**2).mean())), np.ones(40)
    wins = {"all won": np.ones(40), "separated": (d > 0) * 1.0}.get(case, wins)
    if case == "counted":
        counts = estimates.resamples(40, 1, seed=2)[0]
        wins[:5] = 0.5
    found = estimates.fit_at_zero(wins, x, counts)
    assert found == pytest.approx(climbed(wins, x, counts.astype(float)), abs=1e-6)
