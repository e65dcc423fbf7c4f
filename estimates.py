"""Numbers from samples, each with a 95 % interval: means, win rates at equal length, and how well a
model's log-probs order pairs.

Every number here is a mean over questions, and questions are what an interval is about: it tells
how far the mean would move on other questions of the same kind, with the same trained model. It
says nothing of another seed of the training, which often moves more: that takes several runs.

    interval            percentile bootstrap over questions (Efron and Tibshirani 1993, chapter 13);
                        none where all are alike (every answer won), which it would take for certain
    win rate            share of questions on which a's answer is better than b's, ties halved
    at equal length     P(win) = sigmoid(u + v tanh(d / s)), d the difference of the two lengths and
                        s its root mean square; sigmoid(u) is the win rate where d = 0. That is the
                        idea of AlpacaEval 2 (Dubois et al. 2024, arXiv 2404.04475) without its term
                        for the difficulty of a question, which takes many models to fit

numpy alone, nothing else of this project: to be copied.
"""

from dataclasses import asdict, dataclass
from functools import lru_cache

import numpy as np

RESAMPLES = 2_000


@dataclass
class Estimate:
    value: float
    low: float | None = None  # of the 95 % interval; None: it has none
    high: float | None = None
    n: int = 0  # questions

    def as_dict(self) -> dict:
        """None (JSON's null) where a number is not finite."""
        return {k: v if v is not None and np.isfinite(v) else None for k, v in asdict(self).items()}


@lru_cache(maxsize=4)  # a table has a hundred means over as many questions
def resamples(n: int, many: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """(many, n) how often each of n questions is drawn in each resample. Equal n, equal draws:
    what is compared on the same questions is resampled together.
    """
    drawn = np.random.default_rng(seed).integers(0, n, (many, n))
    drawn += n * np.arange(many)[:, None]  # faster than a multinomial
    return np.bincount(drawn.ravel(), minlength=many * n).reshape(many, n).astype(np.float32)


def mean(values: np.ndarray, seed: int = 0, questions: np.ndarray | None = None) -> Estimate:
    """Of one number a question; NaN: this question has none. `questions` tells of which question
    each number is, where one may have several (pairs): these are drawn together.
    """
    values = np.asarray(values, np.float64)
    there = ~np.isnan(values)
    values, sizes = values[there], np.ones(int(there.sum()))
    value = float(values.mean()) if len(values) else float("nan")
    if questions is not None:
        of = np.unique(np.asarray(questions)[there], return_inverse=True)[1]
        values, sizes = np.bincount(of, values), np.bincount(of).astype(np.float64)
    n = len(values)
    if n < 2 or np.ptp(values / sizes) == 0:
        return Estimate(value, n=n)
    means = [(counts @ values) / (counts @ sizes) for counts in _in_parts(n, seed)]
    low, high = np.quantile(np.concatenate(means), (0.025, 0.975))
    return Estimate(value, float(low), float(high), n)


def statistic(of, n: int, seed: int = 0, many: int = 500) -> Estimate:
    """Of any function of question numbers, such as a corpus score, which is no mean."""
    draw = np.random.default_rng(seed)
    found = [of(draw.integers(0, n, n)) for _ in range(many)] if n > 1 else []
    low, high = map(float, np.quantile(found, (0.025, 0.975))) if found else (None, None)
    return Estimate(float(of(np.arange(n))), low, high, n)


def _in_parts(n: int, seed: int, size: int = 2**24):
    """The resamples of n questions, as many at a time as fit into a little memory."""
    rows = max(1, size // n)
    for part, at in enumerate(range(0, RESAMPLES, rows)):
        yield resamples(n, min(rows, RESAMPLES - at), seed + 7919 * part)


def outcomes(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """(N,) 1 where ours is higher, 0.5 where they are equal, 0 where it is lower."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    return (ours > theirs) + 0.5 * (ours == theirs)


def win_rate_at_equal_length(
    wins: np.ndarray,  # (N,) 1, 0.5 or 0; NaN: no verdict
    lengths: np.ndarray,  # (N,) of our answers
    other_lengths: np.ndarray,  # (N,)
    seed: int = 0,
    many: int = 500,
) -> Estimate:
    """Where all differences are equal, longer cannot be told from better: then NaN, unless they are
    all 0, which is equal length already.
    """
    there = ~np.isnan(wins)
    wins = np.asarray(wins, np.float64)[there]
    d = (np.asarray(lengths, np.float64) - other_lengths)[there]
    n, scale = len(d), np.sqrt((d**2).mean()) if len(d) else 0.0
    if n < 2 or scale == 0:
        return mean(wins, seed)
    if (d == d[0]).all():
        return Estimate(float("nan"), n=n)
    x = np.tanh(d / scale)
    value = _intercepts(wins, x, np.ones((1, n)))[0]
    if np.ptp(wins) == 0:
        return Estimate(float(value), n=n)
    low, high = np.quantile(_intercepts(wins, x, resamples(n, many, seed)), (0.025, 0.975))
    return Estimate(float(value), float(low), float(high), n)


# Half a win and half a loss are added, at no difference, so that a fit exists where one side has
# won all. And the slope has a normal prior this wide: of wins that a difference tells apart without
# an exception it would run away.
SLOPE_DEVIATION = 5.0


def _intercepts(wins: np.ndarray, x: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """(R,) sigmoid(u) of the logistic fit to each row of counts (R, N), by Newton's method."""
    counts = counts.astype(np.float64)
    u, v = np.zeros(len(counts)), np.zeros(len(counts))
    for _ in range(50):
        p = _sigmoid(u[:, None] + v[:, None] * x)  # (R, N)
        at_zero = _sigmoid(u)
        gradient_u = (counts * (wins - p)).sum(1) + (0.5 - at_zero)
        gradient_v = (counts * (wins - p)) @ x - v / SLOPE_DEVIATION**2
        weight = counts * p * (1 - p)
        uu = weight.sum(1) + at_zero * (1 - at_zero) + 1e-12
        uv, vv = weight @ x, weight @ x**2 + 1 / SLOPE_DEVIATION**2
        determinant = uu * vv - uv**2
        step_u = (vv * gradient_u - uv * gradient_v) / determinant
        step_v = (uu * gradient_v - uv * gradient_u) / determinant
        far = np.maximum(1, np.maximum(abs(step_u), abs(step_v)) / 2)  # no step leaps past the top
        u, v = u + step_u / far, v + step_v / far
        if max(abs(step_u).max(), abs(step_v).max()) < 1e-9:
            break
    return _sigmoid(u)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(0.5 * x))


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's: Pearson's of the ranks, equal values sharing the mean of theirs."""
    ranks = [_ranks(np.asarray(x, np.float64)) for x in (a, b)]
    if len(ranks[0]) < 2 or min(x.std() for x in ranks) == 0:
        return float("nan")
    return float(np.corrcoef(*ranks)[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    return (last - (count - 1) / 2)[place]


def distinct(answers: list[np.ndarray], n: int) -> float:
    """Distinct n-grams of tokens over all n-grams of all answers (Li et al. 2016): falls as answers
    become alike, and with the number of answers, so that only equally many can be compared.
    """
    grams = [tuple(a[i : i + n].tolist()) for a in answers for i in range(len(a) - n + 1)]
    return len(set(grams)) / len(grams) if grams else float("nan")


def repetition(answer: np.ndarray, n: int = 4) -> float:
    """The share of an answer's n-grams that stood in it before; NaN: it is shorter than that."""
    grams = [tuple(answer[i : i + n].tolist()) for i in range(len(answer) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else float("nan")
