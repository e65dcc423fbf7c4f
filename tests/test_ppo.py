"""The arithmetic of PPO, piece by piece, against slow loops over plain floats.

Whole runs of ppo.py are in test_online.py.
"""

import math

import pytest
import torch
from online import (
    F64,
    GARBAGE,
    LENGTHS,
    Ragged,
    T,
    column,
    flat,
    inside,
    mask_of,
    mean_of,
    moved,
    random_rows,
    table,
)
from test_losses import slopes

import ppo

# -- rewards: what a token costs in KL, and the score


def rewards_by_loop(logps: Ragged, ref_logps: Ragged, scores, kl_coef, estimator) -> Ragged:
    rewards = []
    for row, ref_row, score in zip(logps, ref_logps, scores, strict=True):
        d = [a - b for a, b in zip(row, ref_row, strict=True)]
        rewards.append([-kl_coef * (x if estimator == "k1" else math.expm1(-x) + x) for x in d])
        rewards[-1][-1] += score
    return rewards


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("kl_coef", (0.0, 0.05, 1.5))
@pytest.mark.parametrize("estimator", ("k1", "k3"))
def test_rewards_are_the_equation(estimator, kl_coef, dtype):
    """The score is at the last token of each response, also of one token and of all of the room;
    what is past the end changes nothing.
    """
    logps, ref = random_rows(1, -3.0), random_rows(2, -3.0)
    scores = [2.0, -1.0, 0.5, 0.0, 3.0, -2.5]
    given = (column(scores, dtype), mask_of(logps), kl_coef, estimator)
    found = ppo.token_rewards(table(logps, dtype=dtype), table(ref, dtype=dtype), *given)
    expected = rewards_by_loop(logps, ref, scores, kl_coef, estimator)
    assert found.dtype == dtype
    # Log-probs of size 3 and k3 of size 10 are rounded at a few times their own size.
    assert flat(inside(found, logps)) == pytest.approx(
        flat(expected), rel=1e-14, abs=64 * torch.finfo(dtype).eps
    )
    for fill in GARBAGE:
        dirty = ppo.token_rewards(table(logps, fill, dtype), table(ref, 0.0, dtype), *given)
        assert torch.equal(dirty, found)


# -- whitening


def whitened_by_loop(values: Ragged, shift_mean: bool) -> Ragged:
    every = flat(values)
    mean = math.fsum(every) / len(every)
    scale = math.sqrt(math.fsum((x - mean) ** 2 for x in every) / len(every) + 1e-8)
    return [[(x - mean) / scale + (0.0 if shift_mean else mean) for x in row] for row in values]


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("shift_mean", (True, False))
@pytest.mark.parametrize("mean, spread", ((0.0, 1.0), (-5.0, 3.0), (40.0, 0.1), (0.0, 1e-4)))
def test_whiten_is_the_equation(mean, spread, shift_mean, dtype):
    """Over the tokens of all responses together, however much padding there is. The epsilon of 1e-8
    is under the root.
    """
    values = random_rows(7, mean, spread)
    expected = flat(whitened_by_loop(values, shift_mean))
    # A value is rounded at its own size before the mean is taken away and the rest magnified.
    rounding = 8 * torch.finfo(dtype).eps * (1 + (abs(mean) + spread) / spread) * (1 + abs(mean))
    for fill, room in ((0.0, T), (1e4, T), (-1e4, 3 * T)):
        found = ppo.whiten(table(values, fill, dtype, room), mask_of(values, room), shift_mean)
        assert found.dtype == dtype
        assert flat(inside(found, values)) == pytest.approx(expected, rel=0, abs=rounding)
    assert math.fsum(expected) == pytest.approx(0 if shift_mean else math.fsum(flat(values)))


# -- advantages


def advantages_by_definition(rewards: Ragged, values: Ragged, gamma: float, lam: float) -> Ragged:
    """Each as a sum over all that follows: no recursion."""
    found = []
    for r, v in zip(rewards, values, strict=True):
        following = [*v[1:], 0.0]
        deltas = [r[t] + gamma * following[t] - v[t] for t in range(len(v))]
        found.append(
            [
                math.fsum((gamma * lam) ** k * delta for k, delta in enumerate(deltas[t:]))
                for t in range(len(v))
            ]
        )
    return found


def advantages(rewards: Ragged, values: Ragged, gamma: float, lam: float, fills=(0.0, 0.0)):
    """(advantages, returns) as lists without padding."""
    given = table(rewards, fills[0]), table(values, fills[1]), mask_of(values)
    return [inside(x, values) for x in ppo.advantages_of(*given, gamma, lam)]


def test_advantages_by_hand():
    """A reward of 8 at the end of three tokens, and one token alone."""
    found, returns = advantages([[0.0, 0.0, 8.0], [-1.0]], [[1.0, 2.0, 4.0], [3.0]], 0.5, 0.5)
    # delta: 0 + 2/2 - 1, 0 + 4/2 - 2, 8 + 0 - 4; then A = delta + a quarter of the next A.
    assert found == [[0.25, 1.0, 4.0], [-4.0]]
    assert returns == [[1.25, 3.0, 8.0], [-1.0]]


@pytest.mark.parametrize("gamma", (1.0, 0.9, 0.0))
@pytest.mark.parametrize("lam", (1.0, 0.95, 0.0))
def test_advantages_are_the_definition(lam, gamma):
    """A value network has values for padding too; they must not matter."""
    rewards, values = random_rows(10), random_rows(11, 2.0)
    expected = flat(advantages_by_definition(rewards, values, gamma, lam))
    for fills in ((0.0, 0.0), (1e4, -1e4), (-1e4, 1e4)):
        found, returns = advantages(rewards, values, gamma, lam, fills)
        assert flat(found) == pytest.approx(expected, rel=F64, abs=1e-14)
        sums = [a + v for a, v in zip(expected, flat(values), strict=True)]
        assert flat(returns) == pytest.approx(sums, rel=F64, abs=1e-14)


# -- the KL coefficient's controller


@pytest.mark.parametrize(
    "kl, responses, factor",
    (
        (6.0, 512, 1.0),  # on target
        (6.6, 512, 1 + 0.1 * 0.0512),  # a tenth above it
        (60.0, 512, 1 + 0.2 * 0.0512),  # nine times above it counts as a fifth
        (-3.0, 512, 1 - 0.2 * 0.0512),  # an estimate of a KL may be below 0
        (60.0, 20_000, 1.4),  # the error is clipped, not the factor
        (0.0, 20_000, 0.6),
    ),
)
def test_next_kl_coef(kl, responses, factor):
    """Target 6, horizon 10,000 responses."""
    for kl_coef in (0.15, 2.0):
        found = ppo.next_kl_coef(kl_coef, kl, 6.0, 10_000, responses)
        assert found == pytest.approx(kl_coef * factor, rel=F64)


# -- the loss

INPUTS = ("logps", "old_logps", "advantages", "values", "old_values", "returns")


def token_loss(logp, V, old_logp, A, old_V, R, e, c, value_weight) -> dict[str, float]:
    """One token, in plain floats: the metrics, of which one is the loss."""
    ratio = math.exp(logp - old_logp)
    plain, bounded = -A * ratio, -A * min(max(ratio, 1 - e), 1 + e)
    near = min(max(V, old_V - c), old_V + c)
    square, bounded_square = (V - R) ** 2, (near - R) ** 2
    policy, value = max(plain, bounded), 0.5 * max(square, bounded_square)
    return {
        "loss": policy + value_weight * value,
        "loss/policy": policy,
        "loss/value": value,
        "policy/clipfrac": float(bounded > plain),
        "policy/approxkl": 0.5 * (logp - old_logp) ** 2,
        "val/clipfrac": float(bounded_square > square),
        "val/ratio": ratio,
    }


def ppo_inputs(seed: int, spread: float = 0.3) -> dict[str, Ragged]:
    """Ratios and values on both sides of their clips, advantages of both signs."""
    old_logps, old_values = random_rows(seed, -3.0), random_rows(seed + 1, 1.0)
    return {
        "logps": moved(old_logps, seed + 2, spread),
        "old_logps": old_logps,
        "advantages": random_rows(seed + 3),
        "values": moved(old_values, seed + 4, spread),
        "old_values": old_values,
        "returns": random_rows(seed + 5, 1.0),
    }


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


@pytest.mark.parametrize("knobs", ((0.2, 0.2, 0.1), (0.1, 0.25, 1.0), (0.4, 0.05, 0.0)))
@pytest.mark.parametrize("spread", (0.5, 1.0))
def test_ppo_is_the_equation(spread, knobs):
    inputs = ppo_inputs(30, spread)
    losses, (by_logps, by_values), metrics = called(inputs, *knobs)
    parts, by = [], []
    for logp, old_logp, A, V, *more in zip(*(flat(inputs[name]) for name in INPUTS), strict=True):
        rest = (old_logp, A, *more, *knobs)
        parts.append(token_loss(logp, V, *rest))
        by.append(slopes(lambda x, v, rest=rest: token_loss(x, v, *rest)["loss"], [logp, V]))
    # exp of a difference of log-probs of size 3: rounded at a few times 2^-53, absolutely.
    found = flat(inside(losses, inputs["logps"]))
    assert found == pytest.approx([x["loss"] for x in parts], rel=F64, abs=1e-14)
    for gradient, expected in zip((by_logps, by_values), zip(*by, strict=True), strict=True):
        assert flat(inside(gradient, inputs["logps"])) == pytest.approx(
            expected, rel=1e-7, abs=1e-9
        )
    # Both sides of both clips occur, or the test says little.
    for name in ("policy/clipfrac", "val/clipfrac"):
        assert 0 < sum(x[name] for x in parts) < len(parts)
    # Metrics are means over tokens, those of long and of short responses alike.
    assert set(metrics) == set(parts[0])
    for name, metric in metrics.items():
        mean = math.fsum(x[name] for x in parts) / len(parts)
        assert mean_of(metric) == pytest.approx(mean, rel=F64, abs=1e-14)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_ppo_before_the_first_step(dtype):
    """The ratio is 1, not about 1; the gradient is that of the plain policy gradient, -A."""
    inputs = ppo_inputs(40)
    inputs["logps"], inputs["values"] = inputs["old_logps"], inputs["old_values"]
    _, (by_logps, by_values), metrics = called(inputs, 0.2, 0.2, 0.1, dtype=dtype)
    A, V, R = (table(inputs[name], dtype=dtype) for name in ("advantages", "values", "returns"))
    assert torch.equal(by_logps, -A) and torch.equal(metrics["loss/policy"][0].detach(), -A)
    assert flat(inside(metrics["val/ratio"][0], inputs["logps"])) == [1.0] * sum(LENGTHS)
    for name in ("policy/clipfrac", "policy/approxkl", "val/clipfrac"):
        assert mean_of(metrics[name]) == 0.0
    torch.testing.assert_close(by_values, 0.1 * (V - R))


@pytest.mark.parametrize("fill", GARBAGE)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_ppo_past_the_end(dtype, fill):
    """Neither value nor gradient nor metrics: 0 times exp(10,000) would be NaN."""
    inputs, knobs = ppo_inputs(60), (0.2, 0.2, 0.1)
    losses, gradients, metrics = called(inputs, *knobs, dtype=dtype, room=2 * T)
    for which in (*INPUTS, "all"):
        fills = {n: fill * (-1) ** i for i, n in enumerate(INPUTS) if which in (n, "all")}
        found, by, dirty = called(inputs, *knobs, dtype=dtype, fills=fills, room=2 * T)
        for a, b in zip((found, *by), (losses, *gradients), strict=True):
            assert torch.equal(a, b)
            inside(a, inputs["logps"])
        assert all(mean_of(dirty[name]) == mean_of(metrics[name]) for name in metrics)
