"""KTO's loss: value and gradient against the equation, the direction of a step, and z0."""

import math
import random

import pytest
import torch
from test_losses import F64, called, sigmoid, slopes

from kto import kto_loss


def kto_equation(logp, ref_logp, good, kl, beta, desirable_weight=1.0, undesirable_weight=1.0):
    """lambda - v for one answer, in plain floats."""
    ratio, z0 = logp - ref_logp, max(0.0, kl)
    if good:
        return desirable_weight - desirable_weight * sigmoid(beta * (ratio - z0))
    return undesirable_weight - undesirable_weight * sigmoid(beta * (z0 - ratio))


def kto(answers: list[tuple[float, float]], labels: list[bool], kl, *knobs, dtype=torch.float64):
    """(losses, gradients by answer, metrics); an answer is its log-prob and the reference's."""
    columns = list(zip(*answers, strict=True))
    given = torch.tensor(labels), torch.tensor(kl, dtype=dtype)
    losses, gradients, metrics = called(kto_loss, columns, *given, *knobs, dtype=dtype)
    return losses, list(zip(*gradients, strict=True)), metrics


def random_answers(n: int) -> tuple[list[tuple[float, float]], list[bool]]:
    rng = random.Random(0)
    answers = [(rng.uniform(-200, -1), rng.uniform(-200, -1)) for _ in range(n)]
    answers += [(rng.gauss(-40, 2), rng.gauss(-40, 2)) for _ in range(n)]
    return answers, [rng.random() < 0.5 for _ in answers]


def test_kto_by_hand():
    """An answer twice as likely as under the reference, once desirable and once not."""
    answers, labels = [(math.log(2 / 100), math.log(1 / 100))] * 2, [True, False]
    # sigmoid(ln 2) = 2/3: a desirable answer has that value, an undesirable one 1/3. Either way
    # the slope of the sigmoid is 2/3 * 1/3.
    losses, gradients, metrics = kto(answers, labels, 0.0, 1.0)
    assert losses == pytest.approx([1 / 3, 2 / 3], rel=F64)
    assert gradients[0] == pytest.approx([-2 / 9, 2 / 9], rel=F64)
    assert gradients[1] == pytest.approx([2 / 9, -2 / 9], rel=F64)
    assert metrics["rewards/chosen"][0] == pytest.approx([math.log(2), 0.0], rel=F64)
    # Twice the beta squares the ratio: sigmoid(ln 4) = 4/5; the slope is 4/25, twice.
    losses, gradients, _ = kto(answers, labels, 0.0, 2.0)
    assert losses == pytest.approx([1 / 5, 4 / 5], rel=F64)
    assert gradients[0] == pytest.approx([-8 / 25, 8 / 25], rel=F64)
    # If answers gained ln 2 on average, this one is neither better nor worse than expected.
    losses, gradients, metrics = kto(answers, labels, math.log(2), 1.0)
    assert losses == pytest.approx([1 / 2, 1 / 2], rel=F64)
    assert gradients[1] == pytest.approx([1 / 4, -1 / 4], rel=F64)
    assert metrics["rewards/chosen"][0] == pytest.approx([math.log(2), 0.0], rel=F64)  # without z0
    # Each side has its weight.
    losses, gradients, _ = kto(answers, labels, 0.0, 1.0, 3.0, 0.5)
    assert losses == pytest.approx([1, 1 / 3], rel=F64)
    assert gradients[0] == pytest.approx([-2 / 3, 2 / 3], rel=F64)
    assert gradients[1] == pytest.approx([1 / 9, -1 / 9], rel=F64)


@pytest.mark.parametrize("weights", ((), (10.0, 0.75)))
@pytest.mark.parametrize("kl", (-3.0, 0.0, 0.8, 25.0))
@pytest.mark.parametrize("beta", (0.01, 0.1, 0.5, 3.0))
def test_kto_is_the_equation(beta, kl, weights):
    answers, labels = random_answers(50)
    losses, gradients, _ = kto(answers, labels, kl, beta, *weights)
    for answer, good, loss, gradient in zip(answers, labels, losses, gradients, strict=True):
        # 1 - sigmoid is rounded at 2^-53, not at its own size; with weight 10 that is 1e-15.
        knobs = (good, kl, beta, *weights)
        assert loss == pytest.approx(kto_equation(*answer, *knobs), rel=F64, abs=3e-15)
        by_input = slopes(lambda *x, knobs=knobs: kto_equation(*x, *knobs), list(answer))
        assert list(gradient) == pytest.approx(by_input, rel=1e-5, abs=1e-8)
    # A batch of one label has no mean of nothing, and equals those answers in the mixed batch.
    for label in (True, False):
        at = [i for i, good in enumerate(labels) if good == label]
        alone, by_input, _ = kto([answers[i] for i in at], [label] * len(at), kl, beta, *weights)
        assert alone == [losses[i] for i in at] and by_input == [gradients[i] for i in at]


@pytest.mark.parametrize("start", (-3.0, 0.0, 3.0))  # log-ratio before the step
@pytest.mark.parametrize("good", (True, False))
def test_a_step_makes_a_desirable_answer_likelier(good, start):
    """And an undesirable one less likely. The policy is a table of three answers to one prompt."""
    table = torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64, requires_grad=True)
    logp = table.log_softmax(0)[1]
    losses, _ = kto_loss(
        logp[None], logp.detach()[None] - start, torch.tensor([good]), torch.tensor(0.4), 0.5
    )
    losses.sum().backward()
    with torch.no_grad():
        table -= 0.1 * table.grad
        change = (table.log_softmax(0)[1] - logp).item()
    assert (change > 0) == good and abs(change) > 1e-4


def test_the_loss_is_bounded_and_falls_with_the_value():
    ratios = [-1000.0, -20.0, -1.0, 0.0, 1.0, 20.0, 1000.0]
    answers = [(-1000.0 + r, -1000.0) for r in ratios]
    losses, gradients, _ = kto(answers, [True] * 7, 0.0, 0.5, 3.0, 7.0)
    assert losses[0] == 3.0 and losses[3] == 1.5 and losses[-1] == 0.0
    assert losses == sorted(losses, reverse=True) and len(set(losses)) == 7
    # An undesirable answer is its mirror image.
    mirrored, _, _ = kto(answers, [False] * 7, 0.0, 0.5, 7.0, 3.0)
    assert mirrored == pytest.approx(losses[::-1], abs=1e-15)
    # The gradient is largest at r = z0 and vanishes on both sides.
    sizes = [abs(by_logp) for by_logp, _ in gradients]
    assert sizes[0] < 1e-99 and sizes[-1] == 0.0 and max(sizes) == sizes[3] == 3.0 * 0.5 / 4
    assert 0 < sizes[1] < 1e-4 and 0 < sizes[5] < 1e-4


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("beta", (0.1, 3.0))
def test_kto_starts_at_half_the_weight(beta, dtype):
    """If the policy is its reference, for any beta; the gradient is beta/4 times the weight."""
    answers, rounding = [(-17.3, -17.3)] * 2, 4 * torch.finfo(dtype).eps
    losses, gradients, _ = kto(answers, [True, False], 0.0, beta, 1.5, 0.5, dtype=dtype)
    assert losses == [0.75, 0.25]
    assert gradients[0] == pytest.approx([-1.5 * beta / 4, 1.5 * beta / 4], rel=rounding)
    assert gradients[1] == pytest.approx([0.5 * beta / 4, -0.5 * beta / 4], rel=rounding)
    # A side with weight 0 is not learned from.
    losses, gradients, _ = kto(answers, [True, False], 0.0, beta, 0.0, 1.0, dtype=dtype)
    assert losses == [0.0, 0.5] and gradients[0] == (0.0, 0.0) < gradients[1]


def test_z0_is_clamped_after_the_mean():
    """A negative mean is z0 = 0, but is logged as it is. If each log-ratio was clamped first, the
    mean of -2 and 1 would be 0.5.
    """
    answers, labels = [(-8.0, -9.0), (-8.0, -9.0)], [True, False]
    losses, gradients, metrics = kto(answers, labels, (-2.0 + 1.0) / 2, 0.3)
    assert (losses, gradients) == kto(answers, labels, 0.0, 0.3)[:2]
    assert metrics["kl"] == [-0.5, -0.5]
    clamped_first, _, _ = kto(answers, labels, 0.5, 0.3)
    assert losses[0] < clamped_first[0] and losses[1] > clamped_first[1]


def test_no_gradient_through_z0():
    answers, labels = random_answers(3)
    logps, ref_logps = torch.tensor(answers, dtype=torch.float64).unbind(1)
    logps = logps.clone().requires_grad_()
    kl = ((logps - ref_logps) / 6).sum().abs()  # of the same log-probs
    assert kl > 0.1  # past the clamp, where a gradient could flow
    losses, metrics = kto_loss(logps, ref_logps, torch.tensor(labels), kl, 0.1)
    losses.sum().backward()
    assert not metrics["kl"].requires_grad
    _, constant, _ = kto(answers, labels, kl.item(), 0.1)
    assert logps.grad.tolist() == [by_logp for by_logp, _ in constant]


def test_kto_metrics():
    """Weighted means of desirable and undesirable answers. An answer is correct if it is on its
    side of z0.
    """
    answers = [(-10.0, -14.0), (-7.0, -6.0), (-3.0, -4.0), (-9.0, -1.0)]
    losses, _, metrics = kto(answers, [True, True, False, False], 2.0, 0.5)
    assert metrics == {
        "loss": losses,
        "kl": [2.0] * 4,
        "rewards/chosen": ([2.0, -0.5, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0]),
        "rewards/rejected": ([0.0, 0.0, 0.5, -4.0], [0.0, 0.0, 1.0, 1.0]),
        "logps/chosen": ([-10.0, -7.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0]),
        "logps/rejected": ([0.0, 0.0, -3.0, -9.0], [0.0, 0.0, 1.0, 1.0]),
        # Log-ratios 4, -1, 1, -8 against 2: the third gained, but less than answers do.
        "rewards/accuracies": [1.0, 0.0, 1.0, 1.0],
    }
