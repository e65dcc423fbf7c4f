"""The arithmetic of PPO, piece by piece, against slow loops over plain floats.

The loops go over lists of the lengths that the answers have: they know of no padding, so that
whatever reaches a real token from beyond the end of an answer is seen.
"""

import math
import random

import pytest
import torch
from test_losses import F64, slopes
from torch import Tensor

import ppo

LENGTHS = (1, 4, 7, 3, 7, 2)  # one token alone, and all of the room
T = max(LENGTHS)
GARBAGE = (1e4, -1e4)  # beyond the end; exp of it is infinite

Ragged = list[list[float]]


# -- helpers


def random_rows(seed: int, mean: float = 0.0, spread: float = 1.0, lengths=LENGTHS) -> Ragged:
    rng = random.Random(seed)
    return [[rng.gauss(mean, spread) for _ in range(n)] for n in lengths]


def table(rows: Ragged, fill: float = 0.0, dtype=torch.float64, room: int = 0) -> Tensor:
    """(N, T), with `fill` beyond the ends."""
    width = room or max(map(len, rows))
    return torch.tensor([row + [fill] * (width - len(row)) for row in rows], dtype=dtype)


def mask_of(rows: Ragged, room: int = 0) -> Tensor:
    width = room or max(map(len, rows))
    return torch.tensor([[t < len(row) for t in range(width)] for row in rows])


def inside(found: Tensor, rows: Ragged) -> Ragged:
    """What was found for real tokens; there is nothing but 0 for others."""
    cut = [x[: len(row)] for x, row in zip(found.tolist(), rows, strict=True)]
    rest = [y for x, row in zip(found.tolist(), rows, strict=True) for y in x[len(row) :]]
    assert rest == [0.0] * len(rest)
    return cut


def flat(rows: Ragged) -> list[float]:
    return [x for row in rows for x in row]


def column(values: list, dtype=torch.float64) -> Tensor:
    return torch.tensor(values, dtype=dtype)


# -- rewards: what a token costs in KL, and the score


def rewards_by_loop(logps: Ragged, ref_logps: Ragged, scores, kl_coef, estimator) -> Ragged:
    rewards = []
    for row, ref_row, score in zip(logps, ref_logps, scores, strict=True):
        out = []
        for t in range(len(row)):
            d = row[t] - ref_row[t]
            k = d if estimator == "k1" else math.expm1(-d) + d
            out.append(-kl_coef * k + (score if t == len(row) - 1 else 0.0))
        rewards.append(out)
    return rewards


def test_rewards_by_hand():
    """Two tokens, twice and half as likely as under the reference, and a score of 5."""
    logps, ref = [[math.log(1 / 2), math.log(1 / 8)]], [[math.log(1 / 4), math.log(1 / 4)]]
    given = (table(logps), table(ref), column([5.0]), mask_of(logps))
    # d is ln 2 and -ln 2: what has become likelier costs something, what has become rarer pays.
    found = ppo.token_rewards(*given, 0.1).tolist()[0]
    assert found == pytest.approx([-0.1 * math.log(2), 5 + 0.1 * math.log(2)], rel=F64)
    # k3 = exp(-d) - 1 + d: 1/2 - 1 + ln 2, and 2 - 1 - ln 2; it costs both ways.
    found = ppo.token_rewards(*given, 0.1, "k3").tolist()[0]
    assert found == pytest.approx(
        [-0.1 * (math.log(2) - 0.5), 5 - 0.1 * (1 - math.log(2))], rel=F64
    )
    # k1 unless something else is asked for.
    assert torch.equal(ppo.token_rewards(*given, 0.1), ppo.token_rewards(*given, 0.1, "k1"))


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("kl_coef", (0.0, 0.05, 1.5))
@pytest.mark.parametrize("estimator", ("k1", "k3"))
def test_rewards_are_the_equation(estimator, kl_coef, dtype):
    logps, ref = random_rows(1, -3.0), random_rows(2, -3.0)
    scores = [2.0, -1.0, 0.5, 0.0, 3.0, -2.5]
    found = ppo.token_rewards(
        table(logps, dtype=dtype), table(ref, dtype=dtype), column(scores, dtype), mask_of(logps),
        kl_coef, estimator,
    )  # fmt: skip
    expected = rewards_by_loop(logps, ref, scores, kl_coef, estimator)
    assert found.dtype == dtype
    # Log-probs of size 3 and k3 of size 10 are rounded at a few times their own size.
    assert flat(inside(found, logps)) == pytest.approx(
        flat(expected), rel=1e-14, abs=64 * torch.finfo(dtype).eps
    )


@pytest.mark.parametrize("room", (T, T + 3))
@pytest.mark.parametrize("length", (1, 2, T - 1, T))
def test_score_stands_at_the_last_token(length, room):
    """Of an answer of one token, too, and of one that fills all of the room."""
    rows = [[-2.0] * length, [-2.0] * T]
    found = ppo.token_rewards(
        table(rows, room=room),
        table(rows, room=room),
        column([7.0, -3.0]),
        mask_of(rows, room),
        0.1,
    )
    expected = [[0.0] * room, [0.0] * room]
    expected[0][length - 1], expected[1][T - 1] = 7.0, -3.0
    assert found.tolist() == expected


@pytest.mark.parametrize("estimator", ("k1", "k3"))
def test_rewards_add_up_to_the_score_less_the_kl(estimator):
    """Of each answer: sum of rewards = score - kl_coef KL, where KL is the sum over its tokens."""
    logps, ref, scores = random_rows(3, -3.0), random_rows(4, -3.0), [1.0, -2.0, 3.0, 0.0, 9.0, 4.0]
    found = ppo.token_rewards(
        table(logps), table(ref), column(scores), mask_of(logps), 0.3, estimator
    )
    for row, a, b, score in zip(found.tolist(), logps, ref, scores, strict=True):
        d = [x - y for x, y in zip(a, b, strict=True)]
        kl = math.fsum(d if estimator == "k1" else [math.exp(-x) - 1 + x for x in d])
        assert math.fsum(row) == pytest.approx(score - 0.3 * kl, rel=F64, abs=1e-13)


def test_k3_never_pays():
    """Each k3 is at least 0, and 0 only where the models agree; a k1 may be of either sign."""
    logps, ref = random_rows(5, -3.0), random_rows(6, -3.0)
    given = (table(logps), table(ref), column([0.0] * len(LENGTHS)), mask_of(logps), 1.0)
    assert max(flat(inside(ppo.token_rewards(*given, "k3"), logps))) < 0
    signed = flat(inside(ppo.token_rewards(*given, "k1"), logps))
    assert min(signed) < 0 < max(signed)
    same = ppo.token_rewards(table(logps), table(logps), *given[2:], "k3")
    assert same.tolist() == [[0.0] * T] * len(LENGTHS)


@pytest.mark.parametrize("fill", GARBAGE)
@pytest.mark.parametrize("estimator", ("k1", "k3"))
def test_rewards_beyond_the_end(estimator, fill):
    logps, ref, scores = random_rows(1, -3.0), random_rows(2, -3.0), column([1.0] * len(LENGTHS))
    clean = ppo.token_rewards(table(logps), table(ref), scores, mask_of(logps), 0.1, estimator)
    for a, b in ((fill, 0.0), (0.0, fill)):
        found = ppo.token_rewards(
            table(logps, a), table(ref, b), scores, mask_of(logps), 0.1, estimator
        )
        assert torch.equal(found, clean)


# -- whitening


def whitened_by_loop(values: Ragged, shift_mean: bool) -> Ragged:
    every = flat(values)
    mean = math.fsum(every) / len(every)
    variance = math.fsum((x - mean) ** 2 for x in every) / len(every)
    scale = math.sqrt(variance + 1e-8)
    return [[(x - mean) / scale + (0.0 if shift_mean else mean) for x in row] for row in values]


def test_whiten_by_hand():
    """1, 3 and 8: the mean is 4, the variance (9 + 1 + 16) / 3, not divided by 2."""
    values, scale = [[1.0], [3.0, 8.0]], math.sqrt(26 / 3 + 1e-8)
    found = ppo.whiten(table(values), mask_of(values))
    assert flat(inside(found, values)) == pytest.approx(
        [-3 / scale, -1 / scale, 4 / scale], rel=F64
    )
    found = ppo.whiten(table(values), mask_of(values), False)
    assert flat(inside(found, values)) == pytest.approx(
        [4 - 3 / scale, 4 - 1 / scale, 4 + 4 / scale], rel=F64
    )


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("shift_mean", (True, False))
@pytest.mark.parametrize("mean, spread", ((0.0, 1.0), (-5.0, 3.0), (40.0, 0.1)))
def test_whiten_is_the_equation(mean, spread, shift_mean, dtype):
    values = random_rows(7, mean, spread)
    found = ppo.whiten(table(values, dtype=dtype), mask_of(values), shift_mean)
    assert found.dtype == dtype
    # A value is rounded at its own size before the mean is taken away and the rest magnified.
    rounding = 8 * torch.finfo(dtype).eps * (1 + (abs(mean) + spread) / spread)
    assert flat(inside(found, values)) == pytest.approx(
        flat(whitened_by_loop(values, shift_mean)), rel=0, abs=rounding + abs(mean) * rounding
    )


@pytest.mark.parametrize("shift_mean", (True, False))
def test_whiten_mean_and_variance(shift_mean):
    """Over the tokens of all answers together: mean 0 (or as it was) and variance 1."""
    values = random_rows(8, 3.0, 2.0)
    found = flat(inside(ppo.whiten(table(values), mask_of(values), shift_mean), values))
    mean = math.fsum(found) / len(found)
    before = math.fsum(flat(values)) / len(found)
    assert mean == pytest.approx(0.0 if shift_mean else before, abs=1e-14)
    variance = math.fsum((x - mean) ** 2 for x in found) / len(found)
    assert variance == pytest.approx(1.0, abs=1e-8)  # 1e-8 / 4 less than 1, by the epsilon
    # Tokens count, not answers: the mean of the answers' means is another one.
    rows = inside(ppo.whiten(table(values), mask_of(values)), values)
    assert abs(sum(sum(row) / len(row) for row in rows)) > 0.01


@pytest.mark.parametrize("fill", GARBAGE)
@pytest.mark.parametrize("shift_mean", (True, False))
def test_whiten_beyond_the_end(shift_mean, fill):
    """Padding neither counts, as 0 or as anything else, nor comes out as anything but 0."""
    values = random_rows(9, 2.0)
    clean = ppo.whiten(table(values), mask_of(values), shift_mean)
    assert torch.equal(ppo.whiten(table(values, fill), mask_of(values), shift_mean), clean)
    wide = ppo.whiten(table(values, fill, room=3 * T), mask_of(values, 3 * T), shift_mean)
    assert flat(inside(wide, values)) == pytest.approx(
        flat(inside(clean, values)), rel=F64, abs=F64
    )


def test_whiten_epsilon():
    """1e-8 beside the variance, under the root: a spread of 1e-4 comes out as sqrt(1/2)."""
    values = [[1e-4], [-1e-4, 1e-4, -1e-4]]
    found = flat(inside(ppo.whiten(table(values), mask_of(values)), values))
    assert found == pytest.approx([x * math.sqrt(0.5) for x in (1, -1, 1, -1)], rel=1e-11)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_whiten_without_a_spread(dtype):
    """One token alone, or values that are all the same: finite, and not magnified."""
    for values in ([[3.0]], [[3.0], [3.0, 3.0]], [[0.0, 0.0]]):
        given = (table(values, dtype=dtype, room=4), mask_of(values, 4))
        assert flat(inside(ppo.whiten(*given), values)) == [0.0] * len(flat(values))
        assert flat(inside(ppo.whiten(*given, False), values)) == flat(values)


def test_whiten_values_far_from_0():
    """A variance is of differences from the mean: E x^2 - (E x)^2 has no digits left here."""
    values = [[1e8], [1e8 + 1, 1e8 + 2]]
    found = flat(inside(ppo.whiten(table(values), mask_of(values)), values))
    scale = math.sqrt(2 / 3 + 1e-8)
    assert found == pytest.approx([-1 / scale, 0.0, 1 / scale], rel=F64)


# -- advantages


def deltas_by_loop(rewards: Ragged, values: Ragged, gamma: float) -> Ragged:
    return [
        [r[t] + gamma * (v[t + 1] if t + 1 < len(v) else 0.0) - v[t] for t in range(len(v))]
        for r, v in zip(rewards, values, strict=True)
    ]


def advantages_by_definition(rewards: Ragged, values: Ragged, gamma: float, lam: float) -> Ragged:
    """Each as a sum over all that follows: no recursion."""
    return [
        [
            math.fsum((gamma * lam) ** k * delta for k, delta in enumerate(row[t:]))
            for t in range(len(row))
        ]
        for row in deltas_by_loop(rewards, values, gamma)
    ]


def advantages(rewards: Ragged, values: Ragged, gamma: float, lam: float) -> tuple[Ragged, Ragged]:
    """(advantages, returns) as lists without padding."""
    found, returns = ppo.advantages_of(table(rewards), table(values), mask_of(values), gamma, lam)
    return inside(found, values), inside(returns, values)


def test_advantages_by_hand():
    """Two answers: a reward of 8 at the end of three tokens, and one token alone."""
    rewards, values = [[0.0, 0.0, 8.0], [-1.0]], [[1.0, 2.0, 4.0], [3.0]]
    found, returns = advantages(rewards, values, 0.5, 0.5)
    # delta: 0 + 2/2 - 1, 0 + 4/2 - 2, 8 + 0 - 4; then A = delta + a quarter of the next A.
    assert found == [[0.25, 1.0, 4.0], [-4.0]]
    assert returns == [[1.25, 3.0, 8.0], [-1.0]]


@pytest.mark.parametrize("gamma", (1.0, 0.9, 0.0))
@pytest.mark.parametrize("lam", (1.0, 0.95, 0.5, 0.0))
def test_advantages_are_the_definition(lam, gamma):
    rewards, values = random_rows(10), random_rows(11, 2.0)
    found, returns = advantages(rewards, values, gamma, lam)
    expected = advantages_by_definition(rewards, values, gamma, lam)
    assert flat(found) == pytest.approx(flat(expected), rel=F64, abs=1e-14)
    expected = [a + v for a, v in zip(flat(expected), flat(values), strict=True)]
    assert flat(returns) == pytest.approx(expected, rel=F64, abs=1e-14)


def test_advantages_of_lambda_1():
    """All rewards to come, less what was expected: what is expected on the way cancels."""
    rewards, values = random_rows(12), random_rows(13, 2.0)
    found, returns = advantages(rewards, values, 1.0, 1.0)
    for r, v, a, g in zip(rewards, values, found, returns, strict=True):
        to_come = [math.fsum(r[t:]) for t in range(len(r))]
        assert g == pytest.approx(to_come, rel=F64, abs=1e-14)
        assert a == pytest.approx([x - y for x, y in zip(to_come, v, strict=True)], abs=1e-13)
    # With a discount, a reward k tokens later counts gamma^k of it.
    _, returns = advantages(rewards, values, 0.7, 1.0)
    for r, g in zip(rewards, returns, strict=True):
        to_come = [math.fsum(0.7**k * x for k, x in enumerate(r[t:])) for t in range(len(r))]
        assert g == pytest.approx(to_come, rel=F64, abs=1e-14)


@pytest.mark.parametrize("gamma", (1.0, 0.8))
def test_advantages_of_lambda_0(gamma):
    """One token's surprise and no more: delta."""
    rewards, values = random_rows(14), random_rows(15, 2.0)
    found, _ = advantages(rewards, values, gamma, 0.0)
    assert flat(found) == pytest.approx(flat(deltas_by_loop(rewards, values, gamma)), abs=1e-14)


@pytest.mark.parametrize("lam", (1.0, 0.95, 0.0))
def test_advantages_where_values_are_right(lam):
    """Nothing is better than expected where each value is the sum of the rewards to come."""
    rewards = random_rows(16)
    values = [[math.fsum(r[t:]) for t in range(len(r))] for r in rewards]
    found, returns = advantages(rewards, values, 1.0, lam)
    assert flat(found) == pytest.approx([0.0] * sum(LENGTHS), abs=1e-14)
    assert flat(returns) == pytest.approx(flat(values), abs=1e-14)


@pytest.mark.parametrize("fill", GARBAGE)
@pytest.mark.parametrize("which", ("rewards", "values"))
def test_advantages_beyond_the_end(which, fill):
    """A value network says something about padding, too; nobody asked it."""
    rewards, values = random_rows(17), random_rows(18, 2.0)
    fills = [fill * (which == "rewards"), fill * (which == "values")]
    mask = mask_of(values)
    clean = ppo.advantages_of(table(rewards), table(values), mask, 0.9, 0.8)
    found = ppo.advantages_of(table(rewards, fills[0]), table(values, fills[1]), mask, 0.9, 0.8)
    for a, b in zip(found, clean, strict=True):
        assert torch.equal(a, b)
        inside(a, values)


def test_advantages_dtype():
    for dtype in (torch.float32, torch.float64):
        values = table(random_rows(19), dtype=dtype)
        found = ppo.advantages_of(values, values, mask_of(random_rows(19)), 1.0, 0.95)
        assert [x.dtype for x in found] == [dtype, dtype]


def test_from_scores_to_returns():
    """With gamma = lambda = 1 the first token's return is all there is: the score less the KL."""
    logps, ref, values = random_rows(20, -3.0), random_rows(21, -3.0), random_rows(22)
    scores, mask = [1.0, -2.0, 3.0, 0.0, 9.0, 4.0], mask_of(logps)
    rewards = ppo.token_rewards(table(logps), table(ref), column(scores), mask, 0.2)
    _, returns = ppo.advantages_of(rewards, table(values), mask, 1.0, 1.0)
    kls = [math.fsum(a) - math.fsum(b) for a, b in zip(logps, ref, strict=True)]
    expected = [score - 0.2 * kl for score, kl in zip(scores, kls, strict=True)]
    assert returns[:, 0].tolist() == pytest.approx(expected, rel=F64, abs=1e-13)


# -- answers without an end


@pytest.mark.parametrize(
    "replacement, penalty, expected",
    (
        (None, 0.0, [2.0, -3.0, 0.5, 4.0]),
        (-1.0, 0.0, [2.0, -1.0, 0.5, -1.0]),
        (None, 1.5, [2.0, -4.5, 0.5, 2.5]),
        (-1.0, 1.5, [2.0, -2.5, 0.5, -2.5]),  # replaced, then less the penalty
        (0.0, 0.0, [2.0, 0.0, 0.5, 0.0]),  # 0 is a score, None is not
    ),
)
def test_final_scores(replacement, penalty, expected):
    scores, ended = column([2.0, -3.0, 0.5, 4.0]), torch.tensor([True, False, True, False])
    assert ppo.final_scores(scores, ended, replacement, penalty).tolist() == expected
    # Where all have ended nothing is touched.
    found = ppo.final_scores(scores, torch.ones(4, dtype=torch.bool), replacement, penalty)
    assert found.tolist() == [2.0, -3.0, 0.5, 4.0]
    for dtype in (torch.float32, torch.float64):
        assert ppo.final_scores(scores.to(dtype), ended, replacement, penalty).dtype == dtype


# -- the KL coefficient's controller


@pytest.mark.parametrize(
    "kl, episodes, factor",
    (
        (6.0, 512, 1.0),  # on target
        (6.6, 512, 1 + 0.1 * 0.0512),  # a tenth above it
        (5.4, 512, 1 - 0.1 * 0.0512),
        (60.0, 512, 1 + 0.2 * 0.0512),  # nine times above it counts as a fifth
        (0.0, 512, 1 - 0.2 * 0.0512),
        (-3.0, 512, 1 - 0.2 * 0.0512),  # an estimate of a KL may be below 0
        # The error is clipped, not the factor: here it goes further than 1.2.
        (60.0, 20_000, 1.4),
        (0.0, 20_000, 0.6),
        (6.6, 20_000, 1.2),
    ),
)
def test_next_kl_coef(kl, episodes, factor):
    """Target 6, horizon 10,000 episodes."""
    for kl_coef in (0.15, 2.0):
        found = ppo.next_kl_coef(kl_coef, kl, 6.0, 10_000, episodes)
        assert isinstance(found, float)
        assert found == pytest.approx(kl_coef * factor, rel=F64)
    if factor == 1.0:
        assert ppo.next_kl_coef(0.15, kl, 6.0, 10_000, episodes) == 0.15


def test_kl_coef_settles():
    """Where a KL falls as its coefficient grows, the two come to rest at the target."""
    kl_coef = 0.01
    for _ in range(2000):
        kl_coef = ppo.next_kl_coef(kl_coef, 0.9 / kl_coef, 6.0, 10_000, 512)
    assert kl_coef == pytest.approx(0.15, rel=1e-3)


# -- the loss

INPUTS = ("logps", "old_logps", "advantages", "values", "old_values", "returns")
METRICS = (
    "loss",
    "loss/policy",
    "loss/value",
    "policy/clipfrac",
    "policy/approxkl",
    "val/clipfrac",
    "val/ratio",
)


def token_loss(logp, old_logp, A, V, old_V, R, e, c, value_weight):
    """One token, in plain floats: (what is plotted, gradient by logp, gradient by V)."""
    ratio = math.exp(logp - old_logp)
    plain, bounded = -A * ratio, -A * min(max(ratio, 1 - e), 1 + e)
    near = min(max(V, old_V - c), old_V + c)
    square, bounded_square = (V - R) ** 2, (near - R) ** 2
    policy, value = max(plain, bounded), 0.5 * max(square, bounded_square)
    metrics = {
        "loss": policy + value_weight * value,
        "loss/policy": policy,
        "loss/value": value,
        "policy/clipfrac": float(bounded > plain),
        "policy/approxkl": 0.5 * (logp - old_logp) ** 2,
        "val/clipfrac": float(bounded_square > square),
        "val/ratio": ratio,
    }
    # Where the bound is what counts, the loss does not change with what it bounds.
    by_logp = 0.0 if bounded > plain else -A * ratio
    by_value = 0.0 if bounded_square > square else value_weight * (V - R)
    return metrics, by_logp, by_value


def ppo_inputs(seed: int, spread: float = 0.3) -> dict[str, Ragged]:
    """Ratios and values on both sides of their clips, advantages of both signs."""

    def moved(rows: Ragged, seed: int) -> Ragged:
        rng = random.Random(seed)
        return [[x + rng.gauss(0.0, spread) for x in row] for row in rows]

    old_logps, old_values = random_rows(seed, -3.0), random_rows(seed + 1, 1.0)
    return {
        "logps": moved(old_logps, seed + 2),
        "old_logps": old_logps,
        "advantages": random_rows(seed + 3),
        "values": moved(old_values, seed + 4),
        "old_values": old_values,
        "returns": random_rows(seed + 5, 1.0),
    }


def one_token(**inputs: float) -> dict[str, Ragged]:
    """An answer of one token about which nothing is to be learnt, but for what is given."""
    return {name: [[inputs.get(name, 0.0)]] for name in INPUTS}


def called(inputs: dict[str, Ragged], *knobs, fills=None, dtype=torch.float64, room: int = 0):
    """(losses, gradients of their sum by log-probs and by values, metrics), as tensors."""
    fills = fills or {}
    given = [table(inputs[name], fills.get(name, 0.0), dtype, room) for name in INPUTS]
    for x in given:
        x.requires_grad_()
    mask = mask_of(inputs["logps"], room)
    losses, metrics = ppo.ppo_loss(*given, mask, *knobs)
    assert losses.shape == mask.shape and losses.dtype == dtype
    losses.sum().backward()
    by = dict(zip(INPUTS, (x.grad for x in given), strict=True))
    for name in ("old_logps", "advantages", "old_values", "returns"):
        assert by[name] is None, f"a gradient by {name}"
    return losses.detach(), (by["logps"], by["values"]), metrics


def mean_of(metric: tuple[Tensor, Tensor]) -> float:
    """As a run plots it: a sum over a sum."""
    values, weights = metric
    return (values.detach().double().sum() / weights.double().sum()).item()


@pytest.mark.parametrize("e", (0.2, 0.1))
@pytest.mark.parametrize(
    "A, ratio, clipped",
    (
        (2.0, 1.5, True),  # good, and made likely enough already
        (2.0, 0.5, False),  # good, but less likely than it was: all the pull there is
        (-2.0, 1.5, False),  # bad and likelier
        (-2.0, 0.5, True),  # bad, and rare enough already
        (2.0, 1.05, False),
        (-2.0, 1.05, False),
        (2.0, 0.95, False),
        (-2.0, 0.95, False),
    ),
)
def test_ratio_clip(A, ratio, clipped, e):
    inputs = one_token(logps=math.log(ratio) - 3.0, old_logps=-3.0, advantages=A)
    losses, (by_logp, _), metrics = called(inputs, e, 0.2, 0.1)
    bound = (1 + e) if ratio > 1 else (1 - e)
    assert losses.item() == pytest.approx(-A * (bound if clipped else ratio), rel=F64)
    assert by_logp.item() == (0.0 if clipped else pytest.approx(-A * ratio, rel=F64))
    assert mean_of(metrics["policy/clipfrac"]) == float(clipped)
    assert mean_of(metrics["val/ratio"]) == pytest.approx(ratio, rel=F64)
    assert mean_of(metrics["policy/approxkl"]) == pytest.approx(math.log(ratio) ** 2 / 2, rel=F64)


@pytest.mark.parametrize(
    "V, R, loss, slope, clipped",
    (
        # Old value 1, clip 0.25; loss = half the larger square, slope = V - R or nothing.
        (2.0, 4.0, 2.75**2 / 2, 0.0, True),  # moved up, to its target, as far as it may
        (2.0, 0.0, 2.0, 2.0, False),  # up, away from its target
        (0.0, -2.0, 2.75**2 / 2, 0.0, True),  # down, to its target
        (0.0, 2.0, 2.0, -2.0, False),  # down, away from it
        (2.0, 1.5, 0.125, 0.5, False),  # past its target, and further from it than the bound
        (2.0, 1.75, 0.125, 0.0, True),  # past it, and nearer to it than the bound
        (1.125, 4.0, 2.875**2 / 2, -2.875, False),  # as near as that there is no bound
        (0.875, -2.0, 2.875**2 / 2, 2.875, False),
    ),
)
def test_value_clip(V, R, loss, slope, clipped):
    for weight in (0.1, 1.0):
        inputs = one_token(values=V, old_values=1.0, returns=R)
        losses, (by_logp, by_value), metrics = called(inputs, 0.2, 0.25, weight)
        assert losses.item() == pytest.approx(weight * loss, rel=F64)
        assert by_value.item() == (0.0 if not slope else pytest.approx(weight * slope, rel=F64))
        assert by_logp.item() == 0.0
        assert mean_of(metrics["loss/value"]) == pytest.approx(loss, rel=F64)
        assert mean_of(metrics["val/clipfrac"]) == float(clipped)
        assert mean_of(metrics["loss/policy"]) == 0.0


@pytest.mark.parametrize("knobs", ((0.2, 0.2, 0.1), (0.1, 0.25, 1.0), (0.4, 0.05, 0.0)))
@pytest.mark.parametrize("spread", (0.5, 1.0))
def test_ppo_is_the_equation(spread, knobs):
    inputs = ppo_inputs(30, spread)
    losses, (by_logps, by_values), metrics = called(inputs, *knobs)
    columns = [flat(inputs[name]) for name in INPUTS]
    expected = [token_loss(*token, *knobs) for token in zip(*columns, strict=True)]
    parts, by_logp, by_value = zip(*expected, strict=True)
    for found, wanted in (
        (losses, [x["loss"] for x in parts]),
        (by_logps, by_logp),
        (by_values, by_value),
    ):
        found = flat(inside(found, inputs["logps"]))
        # exp of a difference of log-probs of size 3: rounded at a few times 2^-53, absolutely.
        assert found == pytest.approx(list(wanted), rel=F64, abs=1e-14)
    # Both ways of both clips are there, or the test says little.
    for name in ("policy/clipfrac", "val/clipfrac"):
        assert 0 < sum(x[name] for x in parts) < len(parts)
    # What is plotted is the mean over tokens, those of long answers and of short ones alike.
    assert set(metrics) == set(METRICS)
    for name in METRICS:
        mean = math.fsum(x[name] for x in parts) / len(parts)
        assert mean_of(metrics[name]) == pytest.approx(mean, rel=F64, abs=1e-14)
        values, weights = metrics[name]
        assert torch.equal(weights.bool(), mask_of(inputs["logps"]))
        assert weights.double().sum().item() == sum(LENGTHS)
        found = flat(inside(values, inputs["logps"]))
        assert found == pytest.approx([x[name] for x in parts], rel=F64, abs=1e-14)


@pytest.mark.parametrize("A", (1.5, -1.5))
@pytest.mark.parametrize("ratio", (0.5, 0.9, 1.1, 1.5))
@pytest.mark.parametrize("V, R", ((2.0, 4.0), (2.0, 0.0), (0.0, -2.0), (0.0, 2.0), (1.1, 4.0)))
def test_gradient_of_ppo_equation(V, R, ratio, A):
    """The gradients expected above are right: they agree with differences of the loss."""
    logp, knobs = math.log(ratio) - 3.0, (0.2, 0.25, 0.3)

    def equation(logp, V):
        return token_loss(logp, -3.0, A, V, 1.0, R, *knobs)[0]["loss"]

    _, by_logp, by_value = token_loss(logp, -3.0, A, V, 1.0, R, *knobs)
    assert slopes(equation, [logp, V]) == pytest.approx([by_logp, by_value], rel=1e-8, abs=1e-9)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_ppo_before_the_first_step(dtype):
    """The ratio is 1, not about 1; the pull is that of the plain policy gradient, -A."""
    inputs = ppo_inputs(40)
    inputs["logps"], inputs["values"] = inputs["old_logps"], inputs["old_values"]
    losses, (by_logps, by_values), metrics = called(inputs, 0.2, 0.2, 0.1, dtype=dtype)
    A, V, R = (table(inputs[name], dtype=dtype) for name in ("advantages", "values", "returns"))
    assert torch.equal(by_logps, -A)
    values, _ = metrics["val/ratio"]
    assert flat(inside(values, inputs["logps"])) == [1.0] * sum(LENGTHS)
    for name in ("policy/clipfrac", "policy/approxkl", "val/clipfrac"):
        assert mean_of(metrics[name]) == 0.0
    assert mean_of(metrics["val/ratio"]) == 1.0
    assert torch.equal(metrics["loss/policy"][0].detach(), -A)
    # And that of a regression on the returns.
    misses = flat((V - R).tolist())
    rounding = 4 * torch.finfo(dtype).eps
    expected = [0.1 * x for x in misses]
    assert flat(by_values.tolist()) == pytest.approx(expected, rel=rounding, abs=rounding)
    expected = [-a + 0.05 * x**2 for a, x in zip(flat(A.tolist()), misses, strict=True)]
    assert flat(losses.tolist()) == pytest.approx(expected, rel=rounding, abs=rounding)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_values_within_the_clip_are_not_clipped(dtype):
    """Not even by rounding: where a value is of another size than the old one, old + (new - old) is
    not quite the new one, and half of what is not quite the same is further from the return.
    """
    inputs, lengths = {}, (100, 60)
    for name, seed in (("values", 51), ("old_values", 52), ("returns", 53)):
        rng = random.Random(seed)
        inputs[name] = [[rng.uniform(-0.09, 0.09) for _ in range(n)] for n in lengths]
    for name in ("logps", "old_logps", "advantages"):
        inputs[name] = [[0.0] * n for n in lengths]
    _, (_, by_values), metrics = called(inputs, 0.2, 0.2, 0.1, dtype=dtype)
    assert mean_of(metrics["val/clipfrac"]) == mean_of(metrics["policy/clipfrac"]) == 0.0
    assert all(flat(inside(by_values, inputs["values"])))


@pytest.mark.parametrize("fill", GARBAGE)
@pytest.mark.parametrize("which", (*INPUTS, "all"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_ppo_beyond_the_end(dtype, which, fill):
    """Neither value nor gradient nor what is plotted: 0 times exp(10,000) would be NaN."""
    inputs, knobs = ppo_inputs(60), (0.2, 0.2, 0.1)
    losses, gradients, metrics = called(inputs, *knobs, dtype=dtype)
    fills = {name: fill * (-1) ** i for i, name in enumerate(INPUTS)}
    if which != "all":
        fills = {which: fill}
    found, by, plotted = called(inputs, *knobs, dtype=dtype, fills=fills)
    assert torch.equal(found, losses)
    inside(found, inputs["logps"])
    for a, b in zip(by, gradients, strict=True):
        assert torch.equal(a, b)
        inside(a, inputs["logps"])
    for name in METRICS:
        assert mean_of(plotted[name]) == mean_of(metrics[name])


def test_room_does_not_count():
    """More padding is more of nothing."""
    inputs, knobs = ppo_inputs(60), (0.2, 0.2, 0.1)
    losses, gradients, _ = called(inputs, *knobs)
    wide, wide_gradients, metrics = called(inputs, *knobs, room=3 * T)
    assert torch.equal(wide[:, :T], losses) and not wide[:, T:].any()
    for a, b in zip(wide_gradients, gradients, strict=True):
        assert torch.equal(a[:, :T], b) and not a[:, T:].any()
    assert mean_of(metrics["loss"]) == pytest.approx(losses.sum().item() / sum(LENGTHS), rel=F64)


def test_no_gradient_through_what_was_recorded():
    """Were the advantages and returns still attached to the log-probs and values that they come
    from, the pull would be the same: that of constants.
    """
    inputs, knobs, mask = ppo_inputs(70), (0.2, 0.2, 0.1), mask_of(ppo_inputs(70)["logps"])
    logps, values = (table(inputs[name]).requires_grad_() for name in ("logps", "values"))
    old_logps = logps - 0.1 * mask
    old_values = values + table(random_rows(76, 0.0, 0.5))  # clipped on both sides
    rewards = ppo.token_rewards(logps, table(inputs["old_logps"]), column([1.0] * 6), mask, 0.1)
    A, returns = ppo.advantages_of(rewards, values, mask, 1.0, 0.95)
    recorded = (old_logps, A, old_values, returns)
    first, second = (
        ppo.ppo_loss(logps, old, a, values, old_v, r, mask, *knobs)[0].sum()
        for old, a, old_v, r in (recorded, [x.detach() for x in recorded])
    )
    found = torch.autograd.grad(first, (logps, values))
    expected = torch.autograd.grad(second, (logps, values))
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b) and b.any()


@pytest.mark.parametrize("A", (1.0, -1.0))
def test_a_step_follows_the_advantage(A):
    """A token that did better than expected becomes likelier, a worse one less likely; the value
    comes nearer to its return. The policy is a table here, of three tokens.
    """
    policy = torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64, requires_grad=True)
    value = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    before, mask = policy.log_softmax(0)[1], torch.tensor([[True]])
    given = [torch.full((1, 1), x, dtype=torch.float64) for x in (A, 0.5, 0.5 + A)]
    losses, _ = ppo.ppo_loss(
        before[None, None], before.detach()[None, None], given[0], value[None, None], *given[1:],
        mask, 0.2, 0.2, 0.1,
    )  # fmt: skip
    losses.sum().backward()
    with torch.no_grad():
        policy -= 0.1 * policy.grad
        value -= 0.1 * value.grad
    assert ((policy.log_softmax(0)[1] - before) * A).item() > 1e-3
    assert (value.item() - 0.5) * A > 1e-3


# -- all of them


def test_arguments_are_left_as_they_are():
    """The same rollout is gone through in several epochs."""
    inputs = {name: table(rows) for name, rows in ppo_inputs(80).items()}
    mask, scores = mask_of(ppo_inputs(80)["logps"]), column([1.0] * 6)
    ended = torch.tensor([True, False] * 3)
    tensors = [*inputs.values(), mask, scores, ended]
    before = [x.clone() for x in tensors]
    logps, old_logps, A, values, old_values, returns = inputs.values()
    ppo.token_rewards(logps, old_logps, scores, mask, 0.1)
    ppo.token_rewards(logps, old_logps, scores, mask, 0.0, "k3")
    ppo.whiten(values, mask)
    ppo.whiten(values, mask, False)
    ppo.advantages_of(returns, values, mask, 1.0, 0.95)
    ppo.final_scores(scores, ended, -1.0, 1.0)
    ppo.ppo_loss(logps, old_logps, A, values, old_values, returns, mask, 0.2, 0.2, 0.1)
    for x, y in zip(tensors, before, strict=True):
        assert torch.equal(x, y)
