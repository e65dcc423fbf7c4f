"""Estimates with 95 % intervals over questions, and the tables that evaluate.py makes of them.

An interval says how far the number would move on other questions of the same kind, with the same
trained model. Another training seed often moves it more; measuring that takes several runs.

    interval            percentile bootstrap (Efron and Tibshirani 1993, chapter 13). There is none
                        if all values are equal: the bootstrap would claim certainty
    win rate            share of questions on which a's answer is better than b's; a tie counts 1/2
    at equal length     logistic fit P(win) = sigmoid(u + v tanh(d / s)), with d the difference of
                        the lengths and s its root mean square; sigmoid(u) is the win rate at d = 0.
                        As in AlpacaEval 2 (Dubois et al. 2024, arXiv 2404.04475), but without the
                        difficulty of each question, which takes many models to fit
"""

from dataclasses import asdict, dataclass
from functools import lru_cache

import numpy as np

RESAMPLES = 2_000


@dataclass
class Estimate:
    value: float
    low: float | None = None  # of the 95 % interval; None: no interval
    high: float | None = None
    n: int = 0  # questions

    def as_dict(self) -> dict:
        """For JSON: None if a number is not finite."""
        return {k: v if v is not None and np.isfinite(v) else None for k, v in asdict(self).items()}

    def __format__(self, sign: str) -> str:
        text = f"{self.value:{sign}.3f}"
        return text if self.low is None else f"{text} [{self.low:{sign}.3f}, {self.high:{sign}.3f}]"


@lru_cache(maxsize=4)  # a table has many means over the same number of questions
def resamples(n: int, many: int, seed: int = 0) -> np.ndarray:
    """Return (many, n) counts: how often each question is drawn in each resample.

    Equal n gives equal draws, so two models on the same questions are resampled together.
    """
    drawn = np.random.default_rng(seed).integers(0, n, (many, n))
    drawn += n * np.arange(many)[:, None]  # one bincount for all rows
    return np.bincount(drawn.ravel(), minlength=many * n).reshape(many, n).astype(np.float32)


def mean(values: np.ndarray, questions: np.ndarray | None = None) -> Estimate:
    """Mean of those of (N,) values that are not NaN. `questions` (N,) says to which question each
    value belongs, if a question has several (pairs).
    """
    values = np.asarray(values, np.float64)
    known = ~np.isnan(values)
    values, sizes = values[known], np.ones(int(known.sum()))
    value = float(values.mean()) if len(values) else float("nan")
    if questions is not None:
        question = np.unique(np.asarray(questions)[known], return_inverse=True)[1]
        values, sizes = np.bincount(question, values), np.bincount(question).astype(np.float64)
    n = len(values)
    if n < 2 or np.ptp(values / sizes) == 0:
        return Estimate(value, n=n)
    counts = resamples(n, max(200, min(RESAMPLES, 2**24 // n)))  # fewer if n is huge: memory
    low, high = np.quantile((counts @ values) / (counts @ sizes), (0.025, 0.975))
    return Estimate(value, float(low), float(high), n)


def outcomes(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Return 1 where ours is higher, 0.5 where both are equal, 0 where ours is lower."""
    return (ours > theirs) + 0.5 * (ours == theirs)


def win_rate_at_equal_length(
    wins: np.ndarray,  # (N,) 1, 0.5 or 0; NaN: no verdict
    lengths: np.ndarray,  # (N,) of our answers
    other_lengths: np.ndarray,  # (N,)
    many: int = 500,
) -> Estimate:
    """Win rate if both answers were equally long. NaN if all differences are the same (but not 0):
    then longer cannot be told from better.
    """
    known = ~np.isnan(wins)
    wins, d = wins[known], (lengths - other_lengths)[known].astype(np.float64)
    n, scale = len(d), np.sqrt((d**2).mean()) if len(d) else 0.0
    if n < 2 or scale == 0:
        return mean(wins)
    if np.ptp(d) == 0:
        return Estimate(float("nan"), n=n)
    x = np.tanh(d / scale)
    value = fit_at_zero(wins, x, np.ones(n))
    if np.ptp(wins) == 0:
        return Estimate(value, n=n)
    found = [fit_at_zero(wins, x, counts) for counts in resamples(n, many)]
    low, high = np.quantile(found, (0.025, 0.975))
    return Estimate(value, float(low), float(high), n)


SLOPE_DEVIATION = 5.0  # of v's normal prior; without it v is infinite if x separates the wins


def fit_at_zero(wins: np.ndarray, x: np.ndarray, counts: np.ndarray) -> float:
    """Fit P(win) = sigmoid(u + v x), each question weighted by its count; return sigmoid(u)."""
    # Half a win and half a loss at x = 0 keep u finite if one side won every question.
    wins, counts = np.append(wins, 0.5), np.append(counts, 1.0)
    inputs = np.stack([np.ones(len(wins)), np.append(x, 0.0)], 1)  # (N + 1, 2)
    prior = np.diag([0.0, SLOPE_DEVIATION**-2])
    weights = np.zeros(2)  # u, v
    for _ in range(50):  # Newton's method
        p = 1 / (1 + np.exp(-inputs @ weights))
        gradient = inputs.T @ (counts * (wins - p)) - prior @ weights
        hessian = inputs.T @ (inputs * (counts * p * (1 - p))[:, None]) + prior
        step = np.linalg.solve(hessian + 1e-12 * np.eye(2), gradient)
        weights += step / max(1, abs(step).max() / 2)  # no step leaps too far
        if abs(step).max() < 1e-9:
            break
    return float(1 / (1 + np.exp(-weights[0])))


Table = dict[str, list[Estimate]]  # key -> estimates of a, of b and of a - b (or fewer)


@dataclass
class Answers:
    """One model's answers to all questions, at one temperature."""

    ids: list[np.ndarray]
    scores: np.ndarray | None = None  # (N,)

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(ids) for ids in self.ids], float)

    def note(self, i: int) -> str:
        reward = "" if self.scores is None else f", reward {self.scores[i]:.3f}"
        return f"{len(self.ids[i])} tokens{reward}"


def means(a: np.ndarray, b: np.ndarray | None = None, questions=None) -> list[Estimate]:
    """Of (N,) values, on the same questions for a and b."""
    sides = [a] if b is None else [a, b, a - b]
    return [mean(values, questions) for values in sides]


def measure_name(reward: str) -> str:
    """A short name for a table: the function of file.py:function, or a model's last part."""
    return reward.rpartition(":")[2] if ".py:" in reward else reward.rstrip("/").split("/")[-1]


def add_wins(table: Table, key: str, wins: np.ndarray, a: Answers, b: Answers) -> None:
    table[key] = means(wins)
    table[f"{key}/length_controlled"] = [win_rate_at_equal_length(wins, a.lengths, b.lengths)]


def compare_answers(
    table: Table, mode: str, a: Answers, b: Answers | None, stop_ids: frozenset[int]
) -> None:
    sides = [a] if b is None else [a, b]
    if a.scores is not None:
        table[f"{mode}/reward"] = means(*(side.scores for side in sides))
        if b is not None:
            add_wins(table, f"{mode}/win_rate", outcomes(a.scores, b.scores), a, b)
    table[f"{mode}/length"] = means(*(side.lengths for side in sides))
    ended = [np.array([int(ids[-1]) in stop_ids for ids in side.ids], float) for side in sides]
    table[f"{mode}/ended"] = means(*ended)


def compare_rankings(
    table: Table,
    pairs: list,  # common.Row: chosen and rejected responses
    logps: np.ndarray,  # (N, 2) sums over tokens
    base_logps: np.ndarray | None,  # (N, 2) of the baseline
) -> None:
    """Share of pairs whose chosen response has the higher log-prob, or the higher implicit reward
    log a(y|x) - log b(y|x). A tie counts 1/2: the implicit rewards of an untrained model are all 0.
    """
    lengths = np.array([[len(ids) for ids in row.responses] for row in pairs])  # (N, 2)
    last = {row.key: i for i, row in enumerate(pairs)}
    questions = np.array([last[row.key] for row in pairs])
    models = [logps] if base_logps is None else [logps, base_logps]
    rows = {"sum": [outcomes(*x.T) for x in models]}
    rows["mean"] = [outcomes(*(x / lengths).T) for x in models]
    if base_logps is not None:
        rows["reference_normalised"] = [outcomes(*(logps - base_logps).T)]
        rows["margin"] = [(logps - base_logps) @ [1, -1]]
    for key, values in rows.items():
        table[f"ranking/{key}"] = means(*values, questions=questions)


def as_json(table: Table) -> dict[str, dict[str, dict]]:
    return {
        side: {key: row[i].as_dict() for key, row in table.items() if i < len(row)}
        for i, side in enumerate(("measured", "baseline", "difference"))
    }


def as_markdown(table: Table) -> str:
    lines = [("", "a [95 %]", "b [95 %]", "a - b [95 %]"), ("---",) * 4]
    for key, row in table.items():
        shown = [f"{row[i]:{sign}}" if i < len(row) else "" for i, sign in enumerate("--+")]
        lines.append((key, *shown))
    return "".join(f"| {a:<34} | {b:<24} | {c:<24} | {d:<25} |\n" for a, b, c, d in lines)
