"""RLOO, GRPO and RAFT: their equations in plain floats. Whole runs are in test_online.py."""

import math
import random

import pytest
import torch
from online import (
    F64,
    GARBAGE,
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

import grpo
import raft
import rloo

# -- advantages


def test_leave_one_out_by_hand():
    """1, 2 and 6: less the means of (2, 6), (1, 6) and (1, 2). A constant has no effect."""
    found = rloo.leave_one_out(column([1.0, 2.0, 6.0, 8.0, 9.0, 13.0]), 3)
    assert found.tolist() == [-3.0, -1.5, 4.5] * 2
    assert rloo.leave_one_out(column([1.0, 4.0]), 2).tolist() == [-3.0, 3.0]


def test_group_advantages_by_hand():
    """1, 2 and 6 have the mean 3 and the variance (4 + 1 + 9) / 2 = 7; 5, 5 and 5 have none."""
    scores, scale = column([1.0, 2.0, 6.0, 5.0, 5.0, 5.0]), math.sqrt(7) + 1e-4
    for normalise, divisor in (("grpo", scale), ("dapo", scale), ("dr-grpo", 1.0)):
        found, equal = grpo.group_advantages(scores, 3, normalise)
        expected = [x / divisor for x in (-2, -1, 3, 0, 0, 0)]
        assert found.tolist() == pytest.approx(expected, rel=F64)
        assert equal.tolist() == [False, True]
    # Without the division it is leave-one-out, but for a factor.
    torch.testing.assert_close(found, rloo.leave_one_out(scores, 3) * 2 / 3)
    # Rounding, as from batches of another width, is no advantage.
    found, equal = grpo.group_advantages(column([3.0, 3.0 + 1e-7, 3.0, 3.0]), 4, "grpo")
    assert found.abs().max() < 1e-3 and equal.tolist() == [True]


@pytest.mark.parametrize(
    "normalise, expected",
    [
        ("grpo", [1 / 4, 1 / 16, 1 / 28, 1 / 12]),  # 4 responses
        ("dapo", [1 / 15] * 4),  # 15 tokens
        ("dr-grpo", [1 / 40] * 4),  # 4 responses of at most 10 tokens
    ],
)
def test_token_weights(normalise, expected):
    lengths = torch.tensor([1, 4, 7, 3])
    found = grpo.token_weights(lengths, normalise, 4, 15, 10)
    assert found.dtype == torch.float64 and found.tolist() == pytest.approx(expected, rel=F64)
    # They do not depend on the micro-batch.
    assert torch.equal(grpo.token_weights(lengths[1:3], normalise, 4, 15, 10), found[1:3])


@pytest.mark.parametrize(
    "scores, ended, expected",
    [
        ([1.0, 3.0, 2.0], [1, 1, 1], 1),
        ([1.0, 3.0, 3.0], [1, 1, 1], 1),  # the first of equals
        ([1.0, 3.0, 2.0], [1, 0, 1], 2),  # a cut one ranks behind all that ended
        ([-9.0, 3.0, 2.0], [1, 0, 0], 0),
        ([1.0, 3.0, 2.0], [0, 0, 0], 1),  # none ended: the best beginning
        ([-1e30, -2e30, 0.0], [1, 1, 0], 0),
    ],
)
def test_best_of(scores, ended, expected):
    """Responses to another prompt do not matter."""
    both = column([scores, [0.0, 1.0, 0.0]]), torch.tensor([ended, [1, 1, 1]]).bool()
    assert raft.best_of(*both).tolist() == [expected, 1]


# -- the losses


def inputs(seed: int, spread: float):
    """Ratios on both sides of the clip, advantages of both signs; and another reference."""
    old, rng = random_rows(seed, -3.0), random.Random(seed + 3)
    advantages = [rng.choice((-1, 1)) * rng.uniform(0.3, 2.0) for _ in old]
    return moved(old, seed + 1, spread), old, moved(old, seed + 2, 0.5), advantages


def clipped(A, ratio, low, high) -> tuple[float, bool]:
    """(loss, clipped?)"""
    free, bounded = -A * ratio, -A * min(max(ratio, 1 - low), 1 + high)
    return max(free, bounded), bounded > free


def test_rloo_is_the_equation():
    """One ratio per response: its log is a sum over tokens, all of which have the same slope."""
    num_clipped = 0
    for seed in range(4):
        new, old, _, advantages = inputs(10 * seed, 0.2)
        logps, before = table(new).requires_grad_(), table(old).requires_grad_()
        A = column(advantages).requires_grad_()
        losses, metrics = rloo.rloo_loss(logps, before, A, mask_of(new), 0.2)
        losses.sum().backward()
        assert before.grad is None and A.grad is None
        logs = [math.fsum(a) - math.fsum(b) for a, b in zip(new, old, strict=True)]
        parts = [clipped(a, math.exp(x), 0.2, 0.2) for a, x in zip(advantages, logs, strict=True)]
        assert losses.tolist() == pytest.approx([part[0] for part in parts], rel=1e-13)
        for found, (loss, over) in zip(inside(logps.grad, new), parts, strict=True):
            assert found == pytest.approx([0.0 if over else loss] * len(found), rel=1e-13)
        n = len(logs)
        assert mean_of(metrics["loss"]) == pytest.approx(math.fsum(p[0] for p in parts) / n)
        assert mean_of(metrics["policy/clipfrac"]) == pytest.approx(sum(p[1] for p in parts) / n)
        assert mean_of(metrics["val/ratio"]) == pytest.approx(sum(map(math.exp, logs)) / n)
        assert mean_of(metrics["policy/approxkl"]) == pytest.approx(
            sum(x * x for x in logs) / 2 / n
        )
        num_clipped += sum(p[1] for p in parts)
    assert 0 < num_clipped < 24


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_first_update_of_rloo_is_reinforce(dtype):
    """The gradient of -A log pi, to the last bit, however small the clip."""
    _, old, _, advantages = inputs(50, 0.0)
    A, gradients = column(advantages, dtype), []
    for loss in (
        lambda logps: rloo.rloo_loss(logps, table(old, dtype=dtype), A, mask_of(old), 1e-6)[0],
        lambda logps: -A * logps.sum(1),
    ):
        logps = table(old, dtype=dtype).requires_grad_()
        loss(logps).sum().backward()
        gradients.append(logps.grad.masked_fill(~mask_of(old), 0.0))
    assert torch.equal(*gradients)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(
    "kl_coef, low, high", ((0.0, 0.2, 0.2), (0.04, 0.2, 0.28), (0.5, 0.1, 0.6))
)
def test_grpo_is_the_equation(seed, kl_coef, low, high):
    """A ratio per token, and k3 = exp(-d) - 1 + d."""
    new, old, ref, advantages = inputs(10 * seed + 100, 0.3)
    logps = table(new).requires_grad_()
    others = [table(old).requires_grad_(), table(ref).requires_grad_(), column(advantages)]
    losses, metrics = grpo.grpo_loss(logps, *others, mask_of(new), kl_coef, low, high)
    losses.sum().backward()
    assert others[0].grad is None and others[1].grad is None
    parts, slope = [], []
    for A, *rows in zip(advantages, new, old, ref, strict=True):
        for x, y, z in zip(*rows, strict=True):

            def token_loss(x, A=A, y=y, z=z):
                loss, over = clipped(A, math.exp(x - y), low, high)
                k3 = math.exp(z - x) - 1 + x - z
                return loss + kl_coef * k3, loss, k3, over

            parts.append(token_loss(x))
            slope += slopes(lambda x: token_loss(x)[0], [x])  # noqa: B023
    total, policy, k3, over = zip(*parts, strict=True)
    assert flat(inside(losses, new)) == pytest.approx(total, rel=1e-12, abs=1e-14)
    assert flat(inside(logps.grad, new)) == pytest.approx(slope, rel=1e-7, abs=1e-9)
    for name, expected in (("loss/policy", policy), ("loss/kl", k3), ("policy/clipfrac", over)):
        assert mean_of(metrics[name]) == pytest.approx(math.fsum(expected) / len(parts))
    assert 0 < sum(over) < len(parts)
    # Without a reference there is no KL, and the rest is the same.
    alone, metrics = grpo.grpo_loss(
        logps, others[0], None, others[2], mask_of(new), kl_coef, low, high
    )
    assert flat(inside(alone, new)) == pytest.approx(policy, rel=1e-12) and "loss/kl" not in metrics


@pytest.mark.parametrize("fill", GARBAGE)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_past_the_end(dtype, fill):
    """Neither value nor gradient nor metrics."""
    new, old, ref, advantages = inputs(70, 0.3)
    A, mask = column(advantages, dtype), mask_of(new)

    def found(loss, *rows, fill):
        given = [table(x, (-1) ** i * fill, dtype).requires_grad_() for i, x in enumerate(rows)]
        losses, metrics = loss(*given)
        losses.sum().backward()
        assert losses.isfinite().all() and not given[0].grad.masked_fill(mask, 0.0).any()
        return losses, given[0].grad, *(torch.tensor(mean_of(x)) for x in metrics.values())

    for loss, rows in (
        (lambda a, b: rloo.rloo_loss(a, b, A, mask, 0.2), (new, old)),
        (lambda a, b, c: grpo.grpo_loss(a, b, c, A, mask, 0.1, 0.2, 0.28), (new, old, ref)),
    ):
        for a, b in zip(found(loss, *rows, fill=0.0), found(loss, *rows, fill=fill), strict=True):
            assert torch.equal(a, b)


def test_raft_by_hand():
    """Two responses, of 2 and of 3 tokens, each token of probability 1/2."""
    logps = column([2 * math.log(1 / 2), 3 * math.log(1 / 2)])
    losses, metrics = raft.raft_loss(logps.requires_grad_(), torch.tensor([2, 3]))
    assert losses.tolist() == pytest.approx([2 * math.log(2), 3 * math.log(2)], rel=F64)
    # Divided by all tokens of an optimizer update, each token of either response counts the same.
    (losses.sum() / 5).backward()
    assert logps.grad.tolist() == pytest.approx([-1 / 5, -1 / 5], rel=F64)
    assert mean_of(metrics["loss"]) == pytest.approx(math.log(2), rel=F64)
    assert metrics["logps/best"].tolist() == logps.tolist()
