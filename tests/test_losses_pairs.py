"""CPO, SimPO and SLiC, losses on pairs like DPO's: value and gradient against the equations."""

import inspect
import math
import random

import pytest
import torch
from test_losses import F64, called, dpo, log_sigmoid, sigmoid, slopes

from cpo import cpo_loss
from sft import sft_loss
from simpo import simpo_loss
from slic import slic_loss

# -- helpers


def cpo_equation(chosen, rejected, mean_length, beta, nll_weight):
    """For one pair, in plain floats: (loss, its gradient by the two log-probs)."""
    margin = beta * chosen - beta * rejected
    loss = -log_sigmoid(margin) - nll_weight * chosen / mean_length
    slope = -sigmoid(-margin) * beta
    return loss, [slope - nll_weight / mean_length, -slope]


def simpo_equation(chosen, rejected, len_w, len_l, mean_length, beta, gamma, nll_weight=0.0):
    """Equation 6, with the paper's absolute gamma: (loss, its gradient by the two log-probs)."""
    margin = beta / len_w * chosen - beta / len_l * rejected
    loss = -log_sigmoid(margin - gamma) - nll_weight * chosen / mean_length
    slope = -sigmoid(-(margin - gamma)) * beta
    return loss, [slope / len_w - nll_weight / mean_length, -slope / len_l]


def slic_equation(chosen, rejected, target, ref_chosen, ref_rejected, beta, delta, target_weight):
    """Both terms: (loss, its gradient by the five log-probs)."""
    margin = beta * (chosen - ref_chosen) - beta * (rejected - ref_rejected)
    loss = max(0.0, delta - margin) - target_weight * target
    slope = -beta if margin < delta else 0.0
    return loss, [slope, -slope, -target_weight, -slope, slope]


def random_pairs(n: int, count: int = 2) -> list[list[float]]:
    """Log-probs of `count` texts a row: as long texts have them, and near misses."""
    rng = random.Random(0)
    rows = [[rng.uniform(-200, -1) for _ in range(count)] for _ in range(n)]
    return rows + [[rng.gauss(-40, 2) for _ in range(count)] for _ in range(n)]


def cpo(pairs: list[tuple[float, float]], *rest, dtype=torch.float64):
    """(losses, gradients by row, metrics)."""
    losses, gradients, metrics = called(
        cpo_loss, list(zip(*pairs, strict=True)), *rest, dtype=dtype
    )
    return losses, list(zip(*gradients, strict=True)), metrics


def simpo(pairs: list[tuple[float, float]], lengths: list[tuple[int, int]], *rest, **more):
    """(losses, gradients by row, metrics)."""
    counts = torch.tensor(lengths).unbind(1)
    columns = list(zip(*pairs, strict=True))
    losses, gradients, metrics = called(simpo_loss, columns, *counts, *rest, **more)
    return losses, list(zip(*gradients, strict=True)), metrics


def slic(rows: list[tuple[float, ...]], *rest, dtype=torch.float64):
    """(losses, gradients by row, metrics); a row is all five log-probs."""
    losses, gradients, metrics = called(
        slic_loss, list(zip(*rows, strict=True)), *rest, dtype=dtype
    )
    return losses, list(zip(*gradients, strict=True)), metrics


def close_to(expected, size: float = 0.0):
    """Rounding of log-probs of 200 is absolute: it stays when a margin of them is near 0."""
    return pytest.approx(expected, rel=F64, abs=size)


# -- CPO


def test_cpo_by_hand():
    """The chosen answer has probability 1/2, the rejected one 1/4."""
    pair = (math.log(1 / 2), math.log(1 / 4))
    (loss,), (gradient,), _ = cpo([pair], 2.0, 1.0, 0.0)
    # The margin is ln 2, and sigmoid(ln 2) = 2 / (2 + 1).
    assert loss == pytest.approx(math.log(3 / 2), rel=F64)
    assert gradient == pytest.approx([-1 / 3, 1 / 3], rel=F64)
    # Two tokens an answer: the second term is half of ln 2, and pulls with 1/2.
    (loss,), (gradient,), metrics = cpo([pair], 2.0, 1.0, 1.0)
    assert loss == pytest.approx(math.log(3 / 2) + math.log(2) / 2, rel=F64)
    assert gradient == pytest.approx([-1 / 3 - 1 / 2, 1 / 3], rel=F64)
    assert metrics["nll_loss"] == pytest.approx([math.log(2) / 2], rel=F64)
    assert metrics["rewards/margins"] == pytest.approx([math.log(2)], rel=F64)
    # Twice the beta squares the ratio: sigmoid(ln 4) = 4 / (4 + 1); the second term knows no beta.
    (loss,), (gradient,), _ = cpo([pair], 2.0, 2.0, 1.0)
    assert loss == pytest.approx(math.log(5 / 4) + math.log(2) / 2, rel=F64)
    assert gradient == pytest.approx([-2 / 5 - 1 / 2, 2 / 5], rel=F64)


@pytest.mark.parametrize("nll_weight", (0.0, 0.05, 1.0, 7.0))
@pytest.mark.parametrize("beta", (0.01, 0.1, 0.5, 3.0))
def test_cpo_is_the_equation(beta, nll_weight):
    pairs = random_pairs(50)
    losses, gradients, _ = cpo(pairs, 23.7, beta, nll_weight)
    for pair, loss, gradient in zip(pairs, losses, gradients, strict=True):
        expected, by_input = cpo_equation(*pair, 23.7, beta, nll_weight)
        assert loss == close_to(expected, 1e-15)
        assert list(gradient) == close_to(by_input, 1e-15)


def test_gradient_of_cpo_equation():
    pair, knobs = [-12.0, -11.5], (4.5, 0.3, 0.7)
    _, gradient = cpo_equation(*pair, *knobs)
    assert slopes(lambda *x: cpo_equation(*x, *knobs)[0], pair) == pytest.approx(gradient, rel=1e-8)


def test_cpo_asks_no_reference():
    assert not [name for name in inspect.signature(cpo_loss).parameters if "ref" in name]


@pytest.mark.parametrize("beta", (0.1, 0.5))
def test_cpo_is_dpo_with_a_uniform_reference(beta):
    """One that gives all answers the same probability, whatever that is."""
    pairs = random_pairs(20)
    losses, gradients, metrics = cpo(pairs, 9.0, beta, 0.0)
    for constant in (0.0, -32.0):
        same, by_input, same_metrics = dpo([(*x, constant, constant) for x in pairs], beta)
        assert losses == pytest.approx(same, rel=F64, abs=1e-13)
        for gradient, expected in zip(gradients, by_input, strict=True):
            assert gradient == pytest.approx(expected[:2], rel=1e-11)
        assert metrics["rewards/margins"] == pytest.approx(
            same_metrics["rewards/margins"], rel=1e-11, abs=1e-12
        )


def test_the_preference_term_of_cpo_does_not_hold_the_model():
    """Both answers may lose any probability: only the second term minds."""
    near, by_near, one = cpo([(-8.0, -11.0)], 4.0, 0.5, 0.0)
    far, by_far, two = cpo([(-88.0, -91.0)], 4.0, 0.5, 0.0)
    assert (near, by_near) == (far, by_far)
    assert (one["nll_loss"], two["nll_loss"]) == ([2.0], [22.0])


@pytest.mark.parametrize("cut", ([5], [2, 3], [1, 4], [1, 1, 1, 1, 1], [3, 1, 1]))
def test_nll_of_cpo_is_the_loss_of_sft(cut):
    """On the chosen answers, a mean over all tokens of the step, however it is cut up."""
    lengths = [1, 2, 3, 4, 90]
    chosen = [-3.0, -1.0, -8.5, -2.25, -100.0]
    rejected = [-2.0, -4.0, -4.5, -9.0, -70.0]
    logps = torch.tensor(chosen, dtype=torch.float64, requires_grad=True)
    demonstrations, _ = sft_loss(logps, torch.tensor(lengths))
    expected = demonstrations.sum() / sum(lengths)
    expected.backward()
    assert expected.item() == pytest.approx(114.75 / 100, rel=F64)

    def step(nll_weight):
        """As main does: the losses of each micro-batch over the prompts of the whole step."""
        total, gradients, nll = 0.0, [], 0.0
        for size in cut:
            at = len(gradients)
            pairs = list(zip(chosen, rejected, strict=True))[at : at + size]
            losses, by_pair, metrics = cpo(pairs, sum(lengths) / 5, 0.1, nll_weight)
            total += sum(losses) / 5
            nll += sum(metrics["nll_loss"]) / 5
            gradients += [g / 5 for g, _ in by_pair]
        return total, gradients, nll

    total, gradients, nll = step(1.0)
    without, by_preference, _ = step(0.0)
    assert total - without == pytest.approx(expected.item(), rel=F64)
    assert nll == pytest.approx(expected.item(), rel=F64)  # what is plotted is that mean too
    by_nll = [a - b for a, b in zip(gradients, by_preference, strict=True)]
    assert by_nll == pytest.approx(logps.grad.tolist(), rel=1e-11)


def test_cpo_without_nll():
    """Weight 0 leaves the preference term alone; what it would have been is still logged."""
    losses, (gradient,), metrics = cpo([(-6.0, -9.0)], 3.0, 0.5, 0.0)
    assert losses == pytest.approx([math.log1p(math.exp(-1.5))], rel=F64)
    assert gradient[0] == -gradient[1] < 0
    assert metrics["nll_loss"] == [2.0]


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_far_margins_of_cpo_stay_finite(dtype):
    """All numbers here are exact in fp32 too."""
    far = [(-1000.0, -3000.0), (-3000.0, -1000.0)]
    losses, gradients, _ = cpo(far, 1.0, 0.5, 0.0, dtype=dtype)
    assert losses == [0.0, 1000.0]
    assert gradients == [(0.0, 0.0), (-0.5, 0.5)]


PLOTTED = {
    "loss",
    "nll_loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
}


def test_cpo_metrics():
    """One value a pair; a tie is not told apart."""
    pairs = [(-10.0, -20.0), (-7.0, -4.0), (-3.0, -3.0)]
    losses, _, metrics = cpo(pairs, 4.0, 0.1, 0.5)
    assert metrics.keys() == PLOTTED
    assert metrics["loss"] == losses
    assert metrics["nll_loss"] == [2.5, 1.75, 0.75]  # without its weight
    assert metrics["rewards/chosen"] == pytest.approx([-1.0, -0.7, -0.3], rel=F64)
    assert metrics["rewards/rejected"] == pytest.approx([-2.0, -0.4, -0.3], rel=F64)
    assert metrics["rewards/margins"] == pytest.approx([1.0, -0.3, 0.0], rel=F64)
    assert metrics["rewards/accuracies"] == [1.0, 0.0, 0.0]
    assert metrics["logps/chosen"] == [-10.0, -7.0, -3.0]
    assert metrics["logps/rejected"] == [-20.0, -4.0, -3.0]


# -- SimPO


def test_simpo_by_hand():
    """Two chosen tokens of probability 1/2, three rejected ones of 1/4."""
    pair, lengths = (math.log(1 / 2**2), math.log(1 / 4**3)), [(2, 3)]
    (loss,), (gradient,), metrics = simpo([pair], lengths, 2.0, 1.0, 0.0)
    # The mean log-probs are -ln 2 and -ln 4, so the margin is ln 2, and sigmoid(ln 2) = 2/3.
    assert loss == pytest.approx(math.log(3 / 2), rel=F64)
    assert gradient == pytest.approx([-1 / 3 / 2, 1 / 3 / 3], rel=F64)
    assert metrics["rewards/chosen"] == pytest.approx([-math.log(2)], rel=F64)
    assert metrics["rewards/rejected"] == pytest.approx([-math.log(4)], rel=F64)
    # beta 2 makes the margin ln 4, and a gamma of 2 * (ln 2)/2 = ln 2 takes it back to ln 2.
    (loss,), (gradient,), metrics = simpo([pair], lengths, 2.0, 2.0, math.log(2) / 2)
    assert loss == pytest.approx(math.log(3 / 2), rel=F64)
    assert gradient == pytest.approx([-2 / 3 / 2, 2 / 3 / 3], rel=F64)
    assert metrics["rewards/margins"] == pytest.approx([math.log(4)], rel=F64)  # without gamma
    # Half an NLL over 4 tokens a chosen answer: half of ln(4)/4 more, and 1/8 more pull.
    (loss,), (gradient,), metrics = simpo([pair], lengths, 4.0, 2.0, math.log(2) / 2, 0.5)
    assert loss == pytest.approx(math.log(3 / 2) + math.log(4) / 8, rel=F64)
    assert gradient == pytest.approx([-1 / 3 - 1 / 8, 2 / 9], rel=F64)
    assert metrics["nll_loss"] == pytest.approx([math.log(4) / 4], rel=F64)


@pytest.mark.parametrize("nll_weight", (0.0, 0.05, 1.0))
@pytest.mark.parametrize("ratio", (0.0, 0.3, 5.0))
@pytest.mark.parametrize("beta", (0.1, 2.0, 10.0))
def test_simpo_is_the_equation(beta, ratio, nll_weight):
    rng = random.Random(1)
    pairs = random_pairs(50)
    lengths = [(rng.randint(1, 60), rng.randint(1, 60)) for _ in pairs]
    losses, gradients, _ = simpo(pairs, lengths, 23.7, beta, ratio, nll_weight)
    for pair, counts, loss, gradient in zip(pairs, lengths, losses, gradients, strict=True):
        gamma = beta * ratio
        expected, by_input = simpo_equation(*pair, *counts, 23.7, beta, gamma, nll_weight)
        # A single token of -200 nats with beta 10: the margin is rounded at 2000 * 2^-53.
        assert loss == close_to(expected, 1e-14)
        assert list(gradient) == pytest.approx(by_input, rel=1e-11, abs=1e-15)


def test_gradient_of_simpo_equation():
    pair, knobs = [-12.0, -11.5], (4, 3, 4.5, 2.0, 0.6, 0.7)
    _, gradient = simpo_equation(*pair, *knobs)
    found = slopes(lambda *x: simpo_equation(*x, *knobs)[0], pair)
    assert found == pytest.approx(gradient, rel=1e-8)


@pytest.mark.parametrize("beta, ratio, gamma", ((2.0, 0.5, 1.0), (2.5, 0.55, 1.375), (10, 0.3, 3)))
def test_gamma_is_beta_times_the_ratio(beta, ratio, gamma):
    """Published pairs of numbers. The ratio is in nats a token: where the mean log-probs are that
    far apart the margin left is 0, and the loss ln 2, whatever beta.
    """
    pair, lengths = (-12.0, -30.0), (8, 12)
    (loss,), (gradient,), _ = simpo([pair], [lengths], 8.0, beta, ratio)
    expected, by_input = simpo_equation(*pair, *lengths, 8.0, beta, gamma)
    assert loss == pytest.approx(expected, rel=F64)
    assert gradient == pytest.approx(by_input, rel=F64)
    (loss,), (gradient,), _ = simpo([(-12.0, 12 * (-1.5 - ratio))], [lengths], 8.0, beta, ratio)
    assert loss == pytest.approx(math.log(2), rel=F64)
    assert gradient == pytest.approx([-beta / 2 / 8, beta / 2 / 12], rel=F64)


def test_length_alone_does_nothing_in_simpo():
    """Answers whose tokens are all alike: a longer one is as good, and its tokens share the pull.

    The same sums in cpo.py's loss, to compare with, are another matter.
    """
    many = [(1, 1), (1, 64), (64, 1), (16, 4)]
    pairs = [(-0.5 * w, -0.75 * k) for w, k in many]
    losses, gradients, metrics = simpo(pairs, many, 8.0, 2.0, 0.5)
    assert losses == [losses[0]] * 4
    assert metrics["rewards/margins"] == [0.5] * 4
    for (chosen, rejected), (w, k) in zip(gradients, many, strict=True):
        assert (chosen * w, rejected * k) == gradients[0]
    sums, _, _ = cpo(pairs, 8.0, 2.0, 0.0)
    assert len(set(sums)) == 4


def test_nll_weight_makes_simpo_cpo_simpo():
    """Plus weight times the NLL of cpo.py, value and gradient."""
    pairs, lengths = [(-6.0, -9.0), (-20.0, -10.0)], [(3, 2), (7, 9)]
    losses, gradients, metrics = simpo(pairs, lengths, 5.0, 10.0, 0.54, 0.05)
    plain, by_plain, same = simpo(pairs, lengths, 5.0, 10.0, 0.54)
    nll = cpo(pairs, 5.0, 0.1, 1.0)[2]["nll_loss"]
    assert metrics["nll_loss"] == same["nll_loss"] == nll == [1.2, 4.0]
    for i in range(2):
        assert losses[i] - plain[i] == pytest.approx(0.05 * nll[i], rel=1e-11)
        assert gradients[i][0] - by_plain[i][0] == pytest.approx(-0.05 / 5, rel=1e-11)
        assert gradients[i][1] == by_plain[i][1]


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_far_margins_of_simpo_stay_finite(dtype):
    far = [(-8.0, -4000.0), (-4000.0, -8.0)]
    losses, gradients, _ = simpo(far, [(8, 4)] * 2, 1.0, 2.0, 0.5, dtype=dtype)
    assert losses == [0.0, 997.0]  # -2 * (-4000/8 + 8/4) + 1
    assert gradients == [(0.0, 0.0), (-1 / 4, 1 / 2)]


def test_simpo_metrics():
    """One value a pair. Which is the likelier one is about means, a tie is not told apart, and
    gamma is not in it.
    """
    pairs, lengths = [(-10.0, -9.0), (-7.0, -8.0), (-3.0, -6.0)], [(10, 3), (7, 16), (3, 6)]
    losses, _, metrics = simpo(pairs, lengths, 4.0, 2.0, 5.0)
    assert metrics.keys() == PLOTTED
    assert metrics["loss"] == losses
    assert metrics["rewards/chosen"] == [-2.0, -2.0, -2.0]
    assert metrics["rewards/rejected"] == [-6.0, -1.0, -2.0]
    assert metrics["rewards/margins"] == [4.0, -1.0, 0.0]
    assert metrics["rewards/accuracies"] == [1.0, 0.0, 0.0]
    assert metrics["logps/chosen"] == [-10.0, -7.0, -3.0]
    assert metrics["logps/rejected"] == [-9.0, -8.0, -6.0]
    assert metrics["nll_loss"] == [2.5, 1.75, 0.75]


# -- SLiC


def test_slic_by_hand():
    """The rejected answer is twice as likely as the chosen one: one nat and ln 2 are missing."""
    row = (math.log(1 / 4), math.log(1 / 2), math.log(1 / 8), 0.0, 0.0)
    (loss,), (gradient,), metrics = slic([row], 1.0, 1.0, 0.0)
    assert loss == pytest.approx(1 + math.log(2), rel=F64)
    assert gradient == (-1.0, 1.0, 0.0, 1.0, -1.0)
    assert metrics["rewards/margins"] == pytest.approx([-math.log(2)], rel=F64)
    # The regulariser: half of -ln(1/8).
    (loss,), (gradient,), metrics = slic([row], 1.0, 1.0, 0.5)
    assert loss == pytest.approx(1 + math.log(2) + math.log(8) / 2, rel=F64)
    assert gradient == (-1.0, 1.0, -0.5, 1.0, -1.0)
    assert metrics["hinge_loss"] == pytest.approx([1 + math.log(2)], rel=F64)
    # Beside a reference that has them at 1/8 and 1/2, the chosen one gained ln 2 and the rejected
    # one nothing: 1 - ln 2 are missing.
    (loss,), _, metrics = slic([(*row[:3], math.log(1 / 8), math.log(1 / 2))], 1.0, 1.0, 0.0)
    assert loss == pytest.approx(1 - math.log(2), rel=F64)
    assert metrics["rewards/chosen"] == pytest.approx([math.log(2)], rel=F64)


@pytest.mark.parametrize("target_weight", (0.0, 0.1, 1.0))
@pytest.mark.parametrize("delta", (0.0, 1.0, 10.0))
@pytest.mark.parametrize("beta", (0.1, 1.0, 3.0))
def test_slic_is_the_equation(beta, delta, target_weight):
    rows = random_pairs(50, 5)
    losses, gradients, _ = slic(rows, beta, delta, target_weight)
    active = 0
    for row, loss, gradient in zip(rows, losses, gradients, strict=True):
        expected, by_input = slic_equation(*row, beta, delta, target_weight)
        assert loss == close_to(expected, F64)
        assert list(gradient) == close_to(by_input)
        active += gradient[0] != 0
    assert 0 < active < 100  # both sides of the hinge were there


@pytest.mark.parametrize("chosen", (-11.0, -15.0))  # outside the margin, inside it
def test_gradient_of_slic_equation(chosen):
    row, knobs = [chosen, -12.5, -9.0, -10.0, -11.0], (0.7, 0.3, 0.2)
    _, gradient = slic_equation(*row, *knobs)
    assert (gradient[0] == 0) == (chosen == -11.0)
    found = slopes(lambda *x: slic_equation(*x, *knobs)[0], row)
    assert found == pytest.approx(gradient, rel=1e-8)


def test_slic_teaches_nothing_past_the_margin():
    """Without the regulariser loss and gradient are exactly 0, at the margin itself too."""
    rows = [(-2.0, -2.0 - margin, -5.0, 0.0, 0.0) for margin in (1.0, 1.5, 400.0)]
    losses, gradients, metrics = slic(rows, 1.0, 1.0, 0.0)
    assert losses == [0.0] * 3
    assert [x for row in gradients for x in row] == [0.0] * 15
    assert metrics["active"] == [0.0] * 3
    # A little before it the pull is whole, not little.
    (loss,), (gradient,), metrics = slic([(-2.0, -3.0 + 2**-30, -5.0, 0.0, 0.0)], 1.0, 1.0, 0.0)
    assert (loss, gradient[:2], metrics["active"]) == (2**-30, (-1.0, 1.0), [1.0])


def test_regulariser_of_slic_pulls_past_the_margin_too():
    """Along one slope for every pair, whatever else: it is a plain sum over the target's tokens."""
    rows = [(-2.0, -2.0 - margin, -5.0, 0.0, 0.0) for margin in (-7.0, 0.0, 400.0)]
    losses, gradients, metrics = slic(rows, 1.0, 1.0, 0.25)
    assert losses == [8.0 + 1.25, 1.0 + 1.25, 1.25]
    assert [by_target for _, _, by_target, _, _ in gradients] == [-0.25] * 3
    assert metrics["hinge_loss"] == [8.0, 1.0, 0.0]


def test_slic_on_the_best_answer():
    """The chosen answer as y_ref gets both pulls."""
    chosen = torch.tensor([-4.0, -2.0], dtype=torch.float64, requires_grad=True)
    rejected = torch.tensor([-3.0, -9.0], dtype=torch.float64)
    losses, _ = slic_loss(chosen, rejected, chosen, 0.0, 0.0, 1.0, 1.0, 0.25)
    losses.sum().backward()
    assert losses.tolist() == [2.0 + 1.0, 0.5]
    assert chosen.grad.tolist() == [-1.25, -0.25]


def test_slic_without_a_reference_is_a_reference_of_zeros():
    """What main hands over, the numbers 0.0, and what the gradients above are taken with."""
    columns = [list(x) for x in zip(*random_pairs(10, 3), strict=True)]
    losses, gradients, metrics = called(slic_loss, columns, 0.0, 0.0, 0.3, 1.0, 0.1)
    zeros = [[0.0] * 20] * 2
    expected, by_input, expected_metrics = called(slic_loss, columns + zeros, 0.3, 1.0, 0.1)
    assert (losses, gradients, metrics) == (expected, by_input[:3], expected_metrics)


def test_normalised_slic_is_a_hinge_on_dpos_rewards():
    """The margin is that of dpo.py, and where the policy is its reference every pair is active."""
    rows = random_pairs(20, 4)
    margins = dpo(rows, 0.1)[2]["rewards/margins"]
    losses, _, metrics = slic([(w, k, -5.0, *refs) for w, k, *refs in rows], 0.1, 1.0, 0.0)
    assert losses == pytest.approx([max(0.0, 1 - m) for m in margins], rel=1e-11)
    assert metrics["rewards/margins"] == margins
    same = [(w, k, -5.0, w, k) for w, k, *_ in rows]
    losses, gradients, metrics = slic(same, 0.1, 1.0, 0.0)
    assert losses == metrics["active"] == [1.0] * 40
    assert {gradient[:2] for gradient in gradients} == {(-0.1, 0.1)}


def test_beta_of_slic_is_a_margin_of_delta_over_beta_nats():
    """beta 0.1 and delta 1: a tenth of the paper's hinge with a margin of 10 nats."""
    rows = [(w, k, -5.0, 0.0, 0.0) for w, k in random_pairs(30)]
    rows += [(-20.0, -29.9, -5.0, 0.0, 0.0), (-20.0, -30.1, -5.0, 0.0, 0.0)]
    losses, gradients, metrics = slic(rows, 0.1, 1.0, 0.0)
    wide, by_wide, wide_metrics = slic(rows, 1.0, 10.0, 0.0)
    assert losses == pytest.approx([x / 10 for x in wide], rel=1e-11, abs=1e-14)
    for gradient, expected in zip(gradients, by_wide, strict=True):
        assert gradient == pytest.approx([x / 10 for x in expected], rel=F64)
    assert metrics["active"] == wide_metrics["active"]
    assert metrics["active"][-2:] == [1.0, 0.0]


def test_slic_metrics():
    """One value a pair. Being right and being past the margin are two things."""
    rows = [(-9.0, -9.0, -2.0, 0.0, 0.0), (-9.0, -9.5, -3.0, 0.0, 0.0)]
    rows += [(-9.0, -11.0, -4.0, 0.0, 0.0), (-9.0, -8.0, -5.0, -1.0, -2.0)]
    losses, _, metrics = slic(rows, 2.0, 2.0, 0.5)
    assert metrics.keys() == PLOTTED - {"nll_loss"} | {"hinge_loss", "active", "logps/target"}
    assert metrics["loss"] == losses == [3.0, 2.5, 2.0, 8.5]
    assert metrics["hinge_loss"] == [2.0, 1.0, 0.0, 6.0]
    assert metrics["active"] == [1.0, 1.0, 0.0, 1.0]
    assert metrics["rewards/accuracies"] == [0.0, 1.0, 1.0, 0.0]
    assert metrics["rewards/chosen"] == [-18.0, -18.0, -18.0, -16.0]
    assert metrics["rewards/rejected"] == [-18.0, -19.0, -22.0, -12.0]
    assert metrics["rewards/margins"] == [0.0, 1.0, 4.0, -4.0]
    assert metrics["logps/chosen"] == [-9.0] * 4
    assert metrics["logps/rejected"] == [-9.0, -9.5, -11.0, -8.0]
    assert metrics["logps/target"] == [-2.0, -3.0, -4.0, -5.0]
