"""KTO: value and gradient against the equation, the sign of the pull, and what z0 may not do."""

import math
import random

import pytest
import torch
from test_losses import F64, called, log_sigmoid, sigmoid, slopes

from kto import kto_loss

# -- helpers


def kto_equation(logp, ref_logp, good, kl, beta, desirable_weight=1.0, undesirable_weight=1.0):
    """For one answer, in plain floats: (loss, its gradient by the two log-probs)."""
    z0 = max(0.0, kl)
    sign, weight = (1, desirable_weight) if good else (-1, undesirable_weight)
    x = sign * beta * (logp - ref_logp - z0)
    loss = weight - weight * sigmoid(x)
    # d sigmoid(x) / dx = sigmoid(x) sigmoid(-x)
    slope = -weight * math.exp(log_sigmoid(x) + log_sigmoid(-x)) * sign * beta
    return loss, [slope, -slope]


def kto(answers: list[tuple[float, float]], labels: list[bool], kl, *knobs, dtype=torch.float64):
    """(losses, gradients by answer, metrics); an answer is its log-prob and the reference's."""
    columns = list(zip(*answers, strict=True))
    kl = torch.tensor(kl, dtype=dtype)
    losses, gradients, metrics = called(
        kto_loss, columns, torch.tensor(labels), kl, *knobs, dtype=dtype
    )
    return losses, list(zip(*gradients, strict=True)), metrics


def random_answers(n: int) -> tuple[list[tuple[float, float]], list[bool]]:
    rng = random.Random(0)
    answers = [(rng.uniform(-200, -1), rng.uniform(-200, -1)) for _ in range(n)]
    answers += [(rng.gauss(-40, 2), rng.gauss(-40, 2)) for _ in range(n)]
    return answers, [rng.random() < 0.5 for _ in answers]


# -- the equation


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
    # Where answers gained ln 2 on the whole, this one is neither better nor worse than expected.
    losses, gradients, metrics = kto(answers, labels, math.log(2), 1.0)
    assert losses == pytest.approx([1 / 2, 1 / 2], rel=F64)
    assert gradients[0] == pytest.approx([-1 / 4, 1 / 4], rel=F64)
    assert gradients[1] == pytest.approx([1 / 4, -1 / 4], rel=F64)
    assert metrics["rewards/chosen"][0] == pytest.approx([math.log(2), 0.0], rel=F64)  # without z0
    # Each side has its weight.
    losses, gradients, _ = kto(answers, labels, 0.0, 1.0, 3.0, 0.5)
    assert losses == pytest.approx([1, 1 / 3], rel=F64)
    assert gradients[0] == pytest.approx([-2 / 3, 2 / 3], rel=F64)
    assert gradients[1] == pytest.approx([1 / 9, -1 / 9], rel=F64)


@pytest.mark.parametrize("weights", ((), (1.0, 1.0), (10.0, 0.75)))
@pytest.mark.parametrize("kl", (-3.0, 0.0, 0.8, 25.0))
@pytest.mark.parametrize("beta", (0.01, 0.1, 0.5, 3.0))
def test_kto_is_the_equation(beta, kl, weights):
    answers, labels = random_answers(50)
    losses, gradients, _ = kto(answers, labels, kl, beta, *weights)
    for answer, good, loss, gradient in zip(answers, labels, losses, gradients, strict=True):
        expected, by_input = kto_equation(*answer, good, kl, beta, *weights)
        # 1 - sigmoid is rounded at 2^-53, not at its own size; so is the slope, sigmoid's
        # difference from 1 times sigmoid. With weight 10 that is 1e-15.
        assert loss == pytest.approx(expected, rel=F64, abs=3e-15)
        assert list(gradient) == pytest.approx(by_input, rel=F64, abs=3e-15)


@pytest.mark.parametrize("good", (True, False))
@pytest.mark.parametrize("kl", (-0.7, 1.3))
def test_gradient_of_kto_equation(kl, good):
    answer, knobs = [-12.0, -13.5], (good, kl, 0.3, 1.5, 0.7)
    _, gradient = kto_equation(*answer, *knobs)
    found = slopes(lambda *x: kto_equation(*x, *knobs)[0], answer)
    assert found == pytest.approx(gradient, rel=1e-8)


# -- the sign


@pytest.mark.parametrize("start", (-3.0, 0.0, 3.0))  # log-ratio before the step
@pytest.mark.parametrize("good", (True, False))
def test_a_step_makes_a_desirable_answer_likelier(good, start):
    """And an undesirable one less likely: minimising the value, not what is missing of it, would do
    the opposite. The policy is a table here, of three answers to one prompt.
    """
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


def test_the_loss_is_what_is_missing_of_the_value():
    """lambda - v: from all of the weight down to nothing, as the answer gets better."""
    ratios = [-1000.0, -20.0, -1.0, 0.0, 1.0, 20.0, 1000.0]
    answers = [(-1000.0 + r, -1000.0) for r in ratios]
    losses, _, _ = kto(answers, [True] * 7, 0.0, 0.5, 3.0, 7.0)
    assert losses[0] == 3.0 and losses[3] == 1.5 and losses[-1] == 0.0
    assert losses == sorted(losses, reverse=True) and len(set(losses)) == 7
    # An undesirable answer is the same thing seen from the other side.
    mirrored, _, _ = kto(answers, [False] * 7, 0.0, 0.5, 7.0, 3.0)
    assert [a + b for a, b in zip(losses, mirrored, strict=True)] == pytest.approx([3.0] * 7)
    assert mirrored == pytest.approx(losses[::-1], abs=1e-15)


# -- limits


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("beta", (0.1, 3.0))
def test_kto_starts_at_half_the_weight(beta, dtype):
    """Where the policy is its reference, whatever beta; the pull is beta/4, by weight."""
    losses, gradients, _ = kto(
        [(-17.3, -17.3)] * 2, [True, False], 0.0, beta, 1.5, 0.5, dtype=dtype
    )
    assert losses == [0.75, 0.25]
    rounding = 4 * torch.finfo(dtype).eps
    assert gradients[0] == pytest.approx([-1.5 * beta / 4, 1.5 * beta / 4], rel=rounding)
    assert gradients[1] == pytest.approx([0.5 * beta / 4, -0.5 * beta / 4], rel=rounding)
    losses, _, _ = kto([(-17.3, -17.3)] * 2, [True, False], 0.0, beta, dtype=dtype)
    assert losses == [0.5, 0.5]


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("good", (True, False))
def test_very_good_and_very_bad_answers_no_longer_pull(good, dtype):
    """The loss is bounded: its gradient vanishes at both ends, and is largest where r = z0."""
    answers = [(-4000.0 + r, -4000.0) for r in (-2000.0, -20.0, 2.0, 24.0, 2000.0)]
    losses, gradients, _ = kto(answers, [good] * 5, 2.0, 0.5, 2.0, 2.0, dtype=dtype)
    assert losses[:: 4 if good else -4] == [2.0, 0.0]
    assert gradients[0] == gradients[4] == (0.0, 0.0)
    sizes = [abs(by_logp) for by_logp, _ in gradients]
    assert sizes[2] == 2.0 * 0.5 / 4
    assert 0 < sizes[1] < 1e-4 and 0 < sizes[3] < 1e-4
    assert sizes[1] == pytest.approx(sizes[3], rel=1e-2)  # fp32: 1 - sigmoid(11) has few digits


def test_weights_of_nothing():
    """A side of weight 0 is not learnt from."""
    answers, labels = [(-8.0, -10.0)] * 2, [True, False]
    losses, gradients, _ = kto(answers, labels, 0.5, 0.3, 0.0, 1.0)
    assert losses[0] == 0.0 < losses[1]
    assert gradients[0] == (0.0, 0.0) < gradients[1]
    losses, gradients, _ = kto(answers, labels, 0.5, 0.3, 1.0, 0.0)
    assert losses[1] == 0.0 < losses[0]
    assert gradients[1] == (0.0, 0.0)


@pytest.mark.parametrize("label", (True, False))
def test_a_batch_of_one_label(label):
    """One vector of losses, and no mean of nothing; the other side's metrics weigh nothing."""
    answers, _ = random_answers(4)
    losses, gradients, metrics = kto(answers, [label] * 8, 0.5, 0.1)
    for answer, loss, gradient in zip(answers, losses, gradients, strict=True):
        expected, by_input = kto_equation(*answer, label, 0.5, 0.1)
        assert loss == pytest.approx(expected, rel=F64, abs=1e-15)
        assert list(gradient) == pytest.approx(by_input, rel=F64, abs=1e-15)
    for side, there in (("chosen", label), ("rejected", not label)):
        for name in (f"rewards/{side}", f"logps/{side}"):
            values, weights = metrics[name]
            assert weights == [float(there)] * 8
            assert there or values == [0.0] * 8  # -0.0 too


def test_answers_do_not_see_each_other():
    """But for z0, which is given: a batch is its answers, one by one."""
    answers, labels = random_answers(5)
    together = kto(answers, labels, 0.5, 0.1, 1.5, 0.5)[:2]
    alone = [kto([a], [y], 0.5, 0.1, 1.5, 0.5)[:2] for a, y in zip(answers, labels, strict=True)]
    assert together[0] == pytest.approx([losses[0] for losses, _ in alone], rel=F64)
    for gradient, (_, (by_input,)) in zip(together[1], alone, strict=True):
        assert gradient == pytest.approx(by_input, rel=F64)


# -- z0


def test_z0_is_clamped_after_the_mean():
    """A mean below 0 is z0 = 0, but is plotted as it is. Were each log-ratio clamped first, the
    mean of -2 and 1 would be 0.5.
    """
    answers, labels = [(-8.0, -9.0), (-8.0, -9.0)], [True, False]
    losses, gradients, metrics = kto(answers, labels, (-2.0 + 1.0) / 2, 0.3)
    at_zero, by_zero, _ = kto(answers, labels, 0.0, 0.3)
    assert (losses, gradients) == (at_zero, by_zero)
    assert metrics["kl"] == [-0.5, -0.5]
    clamped_first, _, _ = kto(answers, labels, (0.0 + 1.0) / 2, 0.3)
    assert losses[0] < clamped_first[0] and losses[1] > clamped_first[1]


def test_z0_moves_what_counts_as_a_gain():
    """A log-ratio and a z0 that are both larger by the same change nothing."""
    one, by_one, _ = kto([(-8.0, -9.0)] * 2, [True, False], 0.25, 0.3)
    two, by_two, _ = kto([(-4.0, -9.0)] * 2, [True, False], 4.25, 0.3)
    assert one == pytest.approx(two, rel=F64)
    assert by_one[0] == pytest.approx(by_two[0], rel=F64)


def test_no_gradient_through_z0():
    """Not to a kl that would take one, and none back to the log-probs that it was made of."""
    answers, labels = random_answers(3)
    logps, ref_logps = torch.tensor(answers, dtype=torch.float64).unbind(1)
    kl = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    logps = logps.clone().requires_grad_()
    losses, metrics = kto_loss(logps, ref_logps, torch.tensor(labels), kl, 0.1)
    losses.sum().backward()
    assert kl.grad is None and not metrics["kl"].requires_grad
    _, constant, _ = kto(answers, labels, 0.8, 0.1)
    assert logps.grad.tolist() == [by_logp for by_logp, _ in constant]

    own = logps.detach().clone().requires_grad_()
    kl = ((own - ref_logps) / 6).sum().abs()
    assert kl > 0.1  # past the clamp, where a gradient could flow
    kto_loss(own, ref_logps, torch.tensor(labels), kl, 0.1)[0].sum().backward()
    _, constant, _ = kto(answers, labels, kl.item(), 0.1)
    assert own.grad.tolist() == [by_logp for by_logp, _ in constant]


# -- what is plotted


def test_kto_metrics():
    """Desirable and undesirable answers apart, as weighted means; an answer is told right that
    stands on its side of z0.
    """
    answers = [(-10.0, -14.0), (-7.0, -6.0), (-3.0, -4.0), (-9.0, -1.0)]
    labels = [True, True, False, False]
    losses, _, metrics = kto(answers, labels, 2.0, 0.5)
    assert metrics.keys() == {
        "loss",
        "kl",
        "rewards/chosen",
        "rewards/rejected",
        "rewards/accuracies",
        "logps/chosen",
        "logps/rejected",
    }
    assert metrics["loss"] == losses
    assert metrics["kl"] == [2.0] * 4
    assert metrics["rewards/chosen"] == ([2.0, -0.5, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0])
    assert metrics["rewards/rejected"] == ([0.0, 0.0, 0.5, -4.0], [0.0, 0.0, 1.0, 1.0])
    assert metrics["logps/chosen"] == ([-10.0, -7.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0])
    assert metrics["logps/rejected"] == ([0.0, 0.0, -3.0, -9.0], [0.0, 0.0, 1.0, 1.0])
    # Log-ratios 4, -1, 1, -8 against 2: the third gained, but less than answers do.
    assert metrics["rewards/accuracies"] == [1.0, 0.0, 1.0, 1.0]
