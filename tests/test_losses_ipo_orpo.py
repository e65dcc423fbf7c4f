"""IPO and ORPO, losses on pairs that compare means over tokens: value and gradient against the
equations.
"""

import inspect
import math
import random
from decimal import Decimal, localcontext

import pytest
import torch
from test_losses import F64, called, dpo, log_sigmoid, sigmoid, slopes
from test_losses_pairs import PLOTTED, random_pairs

from ipo import ipo_loss
from orpo import orpo_loss
from sft import sft_loss
from simpo import simpo_loss

# -- helpers


def ipo_equation(chosen, rejected, ref_chosen, ref_rejected, len_w, len_l, beta):
    """Equation 17 for one pair, in plain floats: (loss, its gradient by the four log-probs).
    Lengths of 1 make it the form with sums.
    """
    gap = (chosen - ref_chosen) / len_w - (rejected - ref_rejected) / len_l - 1 / (2 * beta)
    return gap * gap, [
        2 * gap * sign / n for sign, n in zip((1, -1, -1, 1), (len_w, len_l) * 2, strict=True)
    ]


def orpo_equation(chosen, rejected, len_w, len_l, weight):
    """Equation 6 for one pair: (loss, its gradient by the two log-probs)."""
    means = chosen / len_w, rejected / len_l
    log_odds = [mean - math.log(1 - math.exp(mean)) for mean in means]
    margin = log_odds[0] - log_odds[1]
    slope = -weight * sigmoid(-margin)
    by_means = [slope / (1 - math.exp(means[0])) - 1, -slope / (1 - math.exp(means[1]))]
    loss = -means[0] - weight * log_sigmoid(margin)
    return loss, [by_means[0] / len_w, by_means[1] / len_l]


def ipo(rows: list[tuple[float, ...]], lengths: list[tuple[int, int]], *rest, **more):
    """(losses, gradients by row, metrics); a row is all four log-probs."""
    counts = torch.tensor(lengths).unbind(1)
    columns = list(zip(*rows, strict=True))
    losses, gradients, metrics = called(ipo_loss, columns, *counts, *rest, **more)
    return losses, list(zip(*gradients, strict=True)), metrics


def orpo(pairs: list[tuple[float, float]], lengths: list[tuple[int, int]], *rest, **more):
    """(losses, gradients by row, metrics)."""
    counts = torch.tensor(lengths).unbind(1)
    columns = list(zip(*pairs, strict=True))
    losses, gradients, metrics = called(orpo_loss, columns, *counts, *rest, **more)
    return losses, list(zip(*gradients, strict=True)), metrics


def random_lengths(n: int) -> list[tuple[int, int]]:
    rng = random.Random(1)
    return [(rng.randint(1, 60), rng.randint(1, 60)) for _ in range(n)]


# -- IPO


def test_ipo_by_hand():
    """Two chosen tokens, twice as likely as under the reference; one rejected, half as likely."""
    row, lengths = (math.log(4), math.log(1 / 2), 0.0, 0.0), [(2, 1)]
    # The log-ratios are ln 2 and -ln 2 a token: h is ln 4. beta 1/2 asks for 1.
    (loss,), (gradient,), metrics = ipo([row], lengths, 0.5)
    gap = math.log(4) - 1
    assert loss == pytest.approx(gap**2, rel=F64)
    assert gradient == pytest.approx([gap, -2 * gap, -gap, 2 * gap], rel=F64)
    assert metrics["rewards/margins"] == pytest.approx([math.log(4) / 2], rel=F64)
    # As sums they are ln 4 and -ln 2: h is ln 8.
    (loss,), (gradient,), metrics = ipo([row], lengths, 0.5, False)
    gap = math.log(8) - 1
    assert loss == pytest.approx(gap**2, rel=F64)
    assert gradient == pytest.approx([2 * gap, -2 * gap, -2 * gap, 2 * gap], rel=F64)
    assert metrics["rewards/chosen"] == pytest.approx([math.log(4) / 2], rel=F64)


@pytest.mark.parametrize("per_token", (True, False))
@pytest.mark.parametrize("beta", (0.01, 0.1, 0.5, 3.0))
def test_ipo_is_the_equation(beta, per_token):
    rows = random_pairs(50, 4)
    lengths = random_lengths(len(rows))
    losses, gradients, _ = ipo(rows, lengths, beta, per_token)
    for row, counts, loss, gradient in zip(rows, lengths, losses, gradients, strict=True):
        expected, by_input = ipo_equation(*row, *(counts if per_token else (1, 1)), beta)
        # A gap of log-probs of 200 is rounded at 200 * 2^-53; the square doubles what is relative.
        assert loss == pytest.approx(expected, rel=1e-11, abs=1e-11)
        assert gradient == pytest.approx(by_input, rel=1e-11, abs=1e-12)


def test_gradient_of_ipo_equation():
    row, knobs = [-12.0, -9.5, -11.0, -10.0], (4, 3, 0.3)
    _, gradient = ipo_equation(*row, *knobs)
    assert slopes(lambda *x: ipo_equation(*x, *knobs)[0], row) == pytest.approx(gradient, rel=1e-8)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("beta", (0.125, 0.5, 4.0))
def test_ipo_starts_at_a_quarter_of_beta_squared(beta, dtype):
    """1/(4 beta^2), where the policy is its reference; the pull on an answer is 1/beta in all."""
    losses, (gradient,), metrics = ipo([(-17.0, -170.0) * 2], [(4, 16)], beta, dtype=dtype)
    assert losses == [1 / (4 * beta**2)]
    assert gradient == (-1 / beta / 4, 1 / beta / 16, 1 / beta / 4, -1 / beta / 16)
    assert metrics["rewards/margins"] == metrics["rewards/accuracies"] == [0.0]


@pytest.mark.parametrize("per_token", (True, False))
def test_ipo_pulls_back_what_is_past_its_target(per_token):
    """At a margin of 1/2 there is no pull; elsewhere it is as strong as the way that is left."""
    beta, n = 0.25, 8 if per_token else 1
    rows = [(-20.0 + h * n, -30.0, -20.0, -30.0) for h in (-1e6, 1.0, 2.0, 3.0, 1e6)]
    losses, gradients, metrics = ipo(rows, [(8, 2)] * 5, beta, per_token)
    gaps = [-1e6 - 2, -1.0, 0.0, 1.0, 1e6 - 2]
    assert losses == [gap**2 for gap in gaps]
    assert [by_chosen for by_chosen, *_ in gradients] == [2 * gap / n for gap in gaps]
    assert metrics["rewards/margins"][1:4] == [0.25, 0.5, 0.75]


@pytest.mark.parametrize("p", (0.5, 0.6, 0.75, 1.0))
def test_ipo_settles_where_the_labels_are_as_sure(p):
    """Ranked this way with probability p, and the other way else: h = (p - 1/2) / beta; DPO's h has
    no such end at p = 1.
    """
    beta = 0.2
    h = (p - 0.5) / beta
    one, other = (-5.0 + h, -7.0, -5.0, -7.0), (-7.0, -5.0 + h, -7.0, -5.0)
    _, (by, exchanged), _ = ipo([one, other], [(1, 1)] * 2, beta)
    assert p * by[0] + (1 - p) * exchanged[1] == pytest.approx(0.0, abs=1e-14)
    assert dpo([one], beta)[1][0][0] < 0  # on and on


def test_a_beta_for_sums_is_none_for_means():
    """With answers of n tokens, sums under beta are means under n * beta, times n^2."""
    rows, n = random_pairs(20, 4), 5
    sums, by_sums, _ = ipo(rows, [(n, n)] * 40, 0.1, False)
    means, by_means, _ = ipo(rows, [(n, n)] * 40, 0.1 * n)
    assert sums == pytest.approx([x * n**2 for x in means], rel=1e-11, abs=1e-11)
    for one, two in zip(by_sums, by_means, strict=True):
        assert one == pytest.approx([x * n**2 for x in two], rel=1e-11, abs=1e-11)


def test_ipo_metrics():
    """One value a pair, of the log-ratios that are compared; a tie is not told apart."""
    rows = [(-10.0, -20.0, -12.0, -16.0), (-7.0, -4.0, -6.0, -5.0), (-3.0, -3.0, -3.0, -3.0)]
    lengths = [(4, 8), (2, 1), (3, 6)]
    losses, _, metrics = ipo(rows, lengths, 0.5)
    assert metrics.keys() == PLOTTED - {"nll_loss"}
    assert metrics["loss"] == losses == [0.0, 6.25, 1.0]
    assert metrics["rewards/chosen"] == [0.25, -0.25, 0.0]
    assert metrics["rewards/rejected"] == [-0.25, 0.5, 0.0]
    assert metrics["rewards/margins"] == [0.5, -0.75, 0.0]
    assert metrics["rewards/accuracies"] == [1.0, 0.0, 0.0]
    assert metrics["logps/chosen"] == [-10.0, -7.0, -3.0]
    assert metrics["logps/rejected"] == [-20.0, -4.0, -3.0]
    _, _, metrics = ipo(rows, lengths, 0.5, False)
    assert metrics["rewards/margins"] == [3.0, -1.0, 0.0]


# -- ORPO


def test_orpo_by_hand():
    """Two chosen tokens of probability 1/2, three rejected ones of 1/4."""
    pair, lengths = (math.log(1 / 2**2), math.log(1 / 4**3)), [(2, 3)]
    (loss,), (gradient,), metrics = orpo([pair], lengths, 3.0)
    # The odds are 1 and 1/3, so the margin is ln 3, and sigmoid(ln 3) = 3 / (3 + 1).
    assert metrics["rewards/chosen"] == pytest.approx([0.0], abs=F64)
    assert metrics["rewards/margins"] == pytest.approx([math.log(3)], rel=F64)
    assert metrics["odds_ratio_loss"] == pytest.approx([math.log(4 / 3)], rel=F64)
    assert loss == pytest.approx(math.log(2) + 3 * math.log(4 / 3), rel=F64)
    # A quarter is missing; 1 / (1 - P) is 2 and 4/3; three times that; and the NLL's own 1.
    assert gradient == pytest.approx([(-3 / 4 * 2 - 1) / 2, 3 / 4 * 4 / 3 / 3], rel=F64)


@pytest.mark.parametrize("weight", (0.0, 0.1, 1.0, 30.0))
def test_orpo_is_the_equation(weight):
    pairs = random_pairs(50)
    lengths = random_lengths(len(pairs))
    losses, gradients, _ = orpo(pairs, lengths, weight)
    for pair, counts, loss, gradient in zip(pairs, lengths, losses, gradients, strict=True):
        expected, by_input = orpo_equation(*pair, *counts, weight)
        assert loss == pytest.approx(expected, rel=1e-11)
        assert gradient == pytest.approx(by_input, rel=1e-10, abs=1e-15)


def test_gradient_of_orpo_equation():
    pair, knobs = [-2.0, -11.5], (4, 3, 0.7)
    _, gradient = orpo_equation(*pair, *knobs)
    found = slopes(lambda *x: orpo_equation(*x, *knobs)[0], pair)
    assert found == pytest.approx(gradient, rel=1e-8)


def test_orpo_asks_no_reference():
    assert not [name for name in inspect.signature(orpo_loss).parameters if "ref" in name]


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_log_odds_keep_their_digits(dtype):
    """Near a probability of 1, where 1 - exp(a) would lose them, and far from it: value and slope
    against 60 digits.
    """
    means = [-2e-6, -1e-5, -3e-4, -0.01, -0.5, -math.log(2), -3.0, -30.0, -87.0, -200.0, -1e4]
    pairs = [(mean, -5.0) for mean in torch.tensor(means, dtype=dtype).tolist()]
    _, _, metrics = orpo(pairs, [(1, 1)] * len(pairs), 1.0, dtype=dtype)
    rounding = 4 * torch.finfo(dtype).eps
    # Beside a chosen answer that is so unlikely, the slope is that of the log-odds alone.
    _, swapped, _ = orpo(
        [(-1e6, mean) for mean, _ in pairs], [(1, 1)] * len(pairs), 1.0, dtype=dtype
    )
    for (mean, _), found, (_, slope) in zip(pairs, metrics["rewards/chosen"], swapped, strict=True):
        with localcontext() as context:
            context.prec = 60
            p = Decimal(mean).exp()
            log_odds, by = float(Decimal(mean) - (1 - p).ln()), float(1 / (1 - p))
        assert found == pytest.approx(log_odds, rel=rounding, abs=rounding)
        assert slope == pytest.approx(by, rel=rounding)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("certain", (0.0, -1e-9, -9e-7, 3e-7))  # rounding can put it above 0
def test_an_answer_that_is_certain_has_finite_odds(certain, dtype):
    """Those of a mean log-prob of -1e-6, and they do not pull any more. The NLL does."""
    highest = math.log(1e6)
    pairs = [(certain, -1.0), (-1.0, certain), (certain, certain)]
    losses, gradients, metrics = orpo(pairs, [(1, 1)] * 3, 0.5, dtype=dtype)
    assert metrics["rewards/chosen"][0] == pytest.approx(highest, rel=1e-6)
    assert metrics["rewards/rejected"][1] == pytest.approx(highest, rel=1e-6)
    assert metrics["rewards/margins"][2] == 0.0
    assert losses[2] == pytest.approx(math.log(2) / 2, abs=2e-6)
    assert (gradients[0][0], gradients[1][1], gradients[2]) == (-1.0, 0.0, (-1.0, 0.0))
    assert all(math.isfinite(x) for x in losses + [g for pair in gradients for g in pair])
    assert gradients[0][1] > 0 > gradients[1][0] + 1  # the other answer is pulled as before


@pytest.mark.parametrize("sure", (-20.0, 0.0, 3.0, 12.0))
def test_odds_of_one_token_are_its_logit(sure):
    """log(P / (1 - P)) is the logit less the log-sum-exp of the others: however steep by log P, the
    term has a gradient of at most its weight by a logit.
    """
    logits = torch.tensor([sure, 0.0, -1.0], dtype=torch.float64, requires_grad=True)
    logp = logits.log_softmax(0)[0].view(1)
    one = torch.ones(1, dtype=torch.long)
    losses, metrics = orpo_loss(torch.full_like(logp, -1.0), logp, one, one, 7.0)
    others = math.log(1 + math.exp(-1))
    assert metrics["rewards/rejected"].item() == pytest.approx(sure - others, rel=1e-9)
    losses.sum().backward()
    margin = metrics["rewards/margins"].item()
    assert logits.grad[0].item() == pytest.approx(7 * sigmoid(-margin), rel=1e-9)


def test_orpo_of_unlikely_answers_is_simpo():
    """1 - P is nearly 1 there: beta 1, no target margin, and the NLL beside it."""
    pairs, lengths = [(-200.0, -260.0), (-350.0, -240.0)], [(10, 8), (9, 11)]
    losses, gradients, metrics = orpo(pairs, lengths, 1.0)
    columns = list(zip(*pairs, strict=True))
    counts = torch.tensor(lengths).unbind(1)
    same, by_input, same_metrics = called(simpo_loss, columns, *counts, 1.0, 1.0, 0.0)
    for i, (n, _) in enumerate(lengths):
        assert losses[i] + pairs[i][0] / n == pytest.approx(same[i], rel=1e-6)
        assert gradients[i][0] + 1 / n == pytest.approx(by_input[0][i], rel=1e-6)
        assert gradients[i][1] == pytest.approx(by_input[1][i], rel=1e-6)
    assert metrics["rewards/margins"] == pytest.approx(same_metrics["rewards/margins"], rel=1e-7)


def test_orpo_without_odds_is_fine_tuning():
    """On chosen answers, a mean over each one's tokens: sft.py's loss where all are as long."""
    chosen = [-3.0, -1.0, -8.5]
    losses, gradients, _ = orpo([(x, -4.0) for x in chosen], [(4, 9)] * 3, 0.0)
    sums, _ = sft_loss(torch.tensor(chosen, dtype=torch.float64), torch.tensor([4] * 3))
    assert losses == [x / 4 for x in sums.tolist()]
    assert gradients == [(-0.25, 0.0)] * 3
    # A short answer weighs as much as a long one.
    losses, _, metrics = orpo([(-2.0, -4.0), (-50.0, -4.0)], [(1, 9), (100, 9)], 0.0)
    assert losses == metrics["nll_loss"] == [2.0, 0.5]


def test_orpo_metrics():
    """One value a pair; a tie is not told apart."""
    pairs, lengths = [(-10.0, -9.0), (-7.0, -8.0), (-3.0, -6.0)], [(10, 3), (7, 16), (3, 6)]
    losses, _, metrics = orpo(pairs, lengths, 2.0)
    assert metrics.keys() == PLOTTED | {"odds_ratio_loss"}
    assert metrics["loss"] == losses
    odds = [x - math.log(1 - math.exp(x)) for x in (-1.0, -3.0, -0.5)]
    assert metrics["rewards/chosen"] == pytest.approx([odds[0]] * 3, rel=F64)
    assert metrics["rewards/rejected"] == pytest.approx([odds[1], odds[2], odds[0]], rel=F64)
    assert metrics["rewards/accuracies"] == [1.0, 0.0, 0.0]
    assert metrics["rewards/margins"][2] == 0.0
    assert metrics["odds_ratio_loss"][2] == pytest.approx(math.log(2), rel=F64)
    assert metrics["nll_loss"] == [1.0, 1.0, 1.0]
    assert metrics["logps/chosen"] == [-10.0, -7.0, -3.0]
    assert metrics["logps/rejected"] == [-9.0, -8.0, -6.0]
