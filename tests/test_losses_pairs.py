"""The losses on pairs (DPO, CPO, SimPO, SLiC, IPO, ORPO) against their equations, value and
gradient, and what each equation says in its limits.
"""

import math
import random
from decimal import Decimal, localcontext
from itertools import product

import pytest
import torch
from test_losses import F64, by_row, called, dpo, log_sigmoid, slopes

from cpo import cpo_loss
from dpo import dpo_loss
from ipo import ipo_loss
from orpo import orpo_loss
from sft import sft_loss
from simpo import simpo_loss
from slic import slic_loss

# -- the equations for one pair, in plain floats: log-probs, lengths, knobs


def dpo_equation(chosen, rejected, ref_chosen, ref_rejected, beta, e, gamma):
    margin = beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
    return -(1 - e) * log_sigmoid(margin - gamma) - e * log_sigmoid(-margin - gamma)


def cpo_equation(chosen, rejected, mean_length, beta, nll_weight):
    return -log_sigmoid(beta * chosen - beta * rejected) - nll_weight * chosen / mean_length


def simpo_equation(chosen, rejected, len_w, len_l, beta, ratio, nll_weight, mean_length):
    margin = beta / len_w * chosen - beta / len_l * rejected - beta * ratio
    return -log_sigmoid(margin) - nll_weight * chosen / mean_length


def slic_equation(chosen, rejected, target, ref_chosen, ref_rejected, beta, delta, weight):
    margin = beta * (chosen - ref_chosen) - beta * (rejected - ref_rejected)
    return max(0.0, delta - margin) - weight * target


def ipo_equation(chosen, rejected, ref_chosen, ref_rejected, len_w, len_l, beta, per_token):
    len_w, len_l = (len_w, len_l) if per_token else (1, 1)
    return ((chosen - ref_chosen) / len_w - (rejected - ref_rejected) / len_l - 0.5 / beta) ** 2


def orpo_equation(chosen, rejected, len_w, len_l, weight):
    means = chosen / len_w, rejected / len_l
    log_odds = [mean - math.log(1 - math.exp(mean)) for mean in means]
    return -means[0] - weight * log_sigmoid(log_odds[0] - log_odds[1])


# name: (loss, equation, log-probs of a row, whether lengths follow them, knobs)
CASES = {
    "dpo": (
        dpo_loss, dpo_equation, 4, False,
        product((0.01, 0.1, 0.5, 3.0), (0.0, 0.1, 0.49), (0.0, 0.7)),
    ),
    "cpo": (
        cpo_loss, cpo_equation, 2, False, product((23.7,), (0.01, 0.1, 3.0), (0.0, 0.05, 7.0)),
    ),
    "simpo": (
        simpo_loss, simpo_equation, 2, True,
        product((0.1, 2.0, 10.0), (0.0, 0.3, 5.0), (0.0, 0.05, 1.0), (23.7,)),
    ),
    "slic": (slic_loss, slic_equation, 5, False, product((0.1, 1.0, 3.0), (0.0, 5.0), (0.0, 0.1))),
    "ipo": (ipo_loss, ipo_equation, 4, True, product((0.01, 0.1, 3.0), (True, False))),
    "orpo": (orpo_loss, orpo_equation, 2, True, product((0.0, 0.1, 30.0))),
}  # fmt: skip
KNOBS = [(name, knobs) for name, case in CASES.items() for knobs in case[4]]


def random_rows(count: int) -> tuple[list[tuple[float, ...]], list[tuple[int, int]]]:
    """Rows of `count` log-probs (long texts, nearly equal ones, two far apart), and lengths."""
    rng = random.Random(0)
    rows = [tuple(rng.uniform(-200, -1) for _ in range(count)) for _ in range(50)]
    rows += [tuple(rng.gauss(-40, 2) for _ in range(count)) for _ in range(50)]
    rows += [(*far, *[-30.0] * (count - 2)) for far in ((-8.0, -4000.0), (-4000.0, -8.0))]
    return rows, [(rng.randint(1, 60), rng.randint(1, 60)) for _ in rows]


@pytest.mark.parametrize("name, knobs", KNOBS)
def test_loss_is_the_equation(name, knobs):
    loss, equation, count, has_lengths, _ = CASES[name]
    rows, lengths = random_rows(count)
    counts = torch.tensor(lengths).unbind(1) if has_lengths else ()
    losses, gradients, _ = by_row(loss, rows, *counts, *knobs)
    for row, pair, value, gradient in zip(rows, lengths, losses, gradients, strict=True):
        rest = (*pair, *knobs) if has_lengths else knobs
        # Log-probs of 200 carry rounding of 200 * 2^-53 into a margin, absolutely.
        assert value == pytest.approx(equation(*row, *rest), rel=1e-11, abs=1e-11)
        found = slopes(lambda *x: equation(*x, *rest), list(row))  # noqa: B023 (used here)
        largest = max(map(abs, found))
        assert gradient == pytest.approx(found, rel=1e-5, abs=1e-6 + 1e-6 * largest)


LENGTHS = torch.tensor([[10, 7, 3], [3, 16, 6]])
ZEROS = [0.0] * 3
MEANS = [[-1.0, -1.0, -1.0], [-3.0, -0.5, -1.0]]
ODDS = [[x - math.log(1 - math.exp(x)) for x in means] for means in MEANS]
NLL = {"nll_loss": [2.5, 1.75, 0.75]}
TARGETS = [-2.0, -3.0, -4.0]
HINGE = {"hinge_loss": [3.0, 1.0, 0.0], "active": [1.0, 1.0, 0.0], "logps/target": TARGETS}


@pytest.mark.parametrize(
    "loss, columns, rest, chosen, rejected, more",
    [
        (cpo_loss, [], (4.0, 2.0, 0.5), [-20, -14, -6], [-18, -16, -12], NLL),
        (simpo_loss, [], (*LENGTHS, 2.0, 5.0, 0.0, 4.0), [-2, -2, -2], [-6, -1, -2], NLL),
        (slic_loss, [TARGETS, ZEROS, ZEROS], (1.0, 2.0, 0.5), [-10, -7, -3], [-9, -8, -6], HINGE),
        (ipo_loss, [ZEROS, ZEROS], (*LENGTHS, 0.5), [-0.5] * 3, [-1.5, -0.25, -0.5], {}),
        (orpo_loss, [], (*LENGTHS, 2.0), *ODDS, {"nll_loss": [1.0, 1.0, 1.0]}),
    ],
)
def test_metrics(loss, columns, rest, chosen, rejected, more):
    """One value per pair, named as in TRL. A tie counts half. Margins are without gamma."""
    logps = [[-10.0, -7.0, -3.0], [-9.0, -8.0, -6.0]]
    losses, _, metrics = called(loss, logps + columns, *rest)
    assert metrics["loss"] == losses
    assert [metrics["logps/chosen"], metrics["logps/rejected"]] == logps
    assert metrics["rewards/chosen"] == pytest.approx(chosen, rel=F64)
    assert metrics["rewards/rejected"] == pytest.approx(rejected, rel=F64)
    margins = [a - b for a, b in zip(chosen, rejected, strict=True)]
    assert metrics["rewards/margins"] == pytest.approx(margins, rel=F64)
    assert metrics["rewards/accuracies"] == [(1 + (m > 0) - (m < 0)) / 2 for m in margins]
    assert {name: metrics[name] for name in more} == more


# -- CPO


@pytest.mark.parametrize("cut", ([5], [2, 3], [1, 4], [1, 1, 1, 1, 1]))
def test_nll_of_cpo_is_the_loss_of_sft(cut):
    """A mean over all chosen tokens of the step, for any split into micro-batches."""
    lengths, chosen = [1, 2, 3, 4, 90], [-3.0, -1.0, -8.5, -2.25, -100.0]
    pairs = list(zip(chosen, [-2.0, -4.0, -4.5, -9.0, -70.0], strict=True))
    demonstrations, _ = sft_loss(torch.tensor(chosen, dtype=torch.float64), torch.tensor(lengths))
    expected = (demonstrations.sum() / sum(lengths)).item()

    def step(nll_weight):
        """As main does: the losses of each micro-batch, divided by the rows of the step."""
        total, gradients, nll = 0.0, [], 0.0
        for size in cut:
            rows = pairs[len(gradients) : len(gradients) + size]
            losses, by_pair, metrics = by_row(cpo_loss, rows, sum(lengths) / 5, 0.1, nll_weight)
            total += sum(losses) / 5
            nll += sum(metrics["nll_loss"]) / 5
            gradients += [g / 5 for g, _ in by_pair]
        return total, gradients, nll

    total, gradients, nll = step(1.0)
    without, by_preference, _ = step(0.0)
    assert total - without == pytest.approx(expected, rel=F64)
    assert nll == pytest.approx(expected, rel=F64)  # the logged mean, too
    by_nll = [a - b for a, b in zip(gradients, by_preference, strict=True)]
    assert by_nll == pytest.approx([-1 / sum(lengths)] * 5, rel=1e-11)


# -- SimPO


@pytest.mark.parametrize("beta, ratio", ((2.0, 0.5), (2.5, 0.55), (10.0, 0.3)))
def test_gamma_of_simpo_is_in_nats_per_token(beta, ratio):
    """If the mean log-probs differ by the ratio, the loss is ln 2 for any beta."""
    counts = torch.tensor([[8], [12]])
    pair = (-12.0, 12 * (-1.5 - ratio))
    (loss,), (gradient,), _ = by_row(simpo_loss, [pair], *counts, beta, ratio)
    assert loss == pytest.approx(math.log(2), rel=F64)
    assert gradient == pytest.approx([-beta / 2 / 8, beta / 2 / 12], rel=F64)


def test_simpo_needs_mean_length_only_for_the_nll():
    counts = torch.tensor([[3], [2]])
    plain, _, metrics = by_row(simpo_loss, [(-6.0, -9.0)], *counts, 2.0, 0.5)
    assert "nll_loss" not in metrics
    logged, _, metrics = by_row(simpo_loss, [(-6.0, -9.0)], *counts, 2.0, 0.5, mean_length=5.0)
    assert (logged, metrics["nll_loss"]) == (plain, [1.2])
    with pytest.raises(ValueError, match="mean_length"):
        by_row(simpo_loss, [(-6.0, -9.0)], *counts, 2.0, 0.5, nll_weight=0.1)


# -- SLiC


def test_slic_has_no_gradient_past_the_margin():
    """Without the regulariser, loss and gradient are exactly 0, also at the margin itself."""
    rows = [(-2.0, -2.0 - margin, -5.0, 0.0, 0.0) for margin in (1.0, 1.5, 400.0, 1 - 2**-30)]
    losses, gradients, metrics = by_row(slic_loss, rows, 1.0, 1.0, 0.0)
    assert losses == [0.0, 0.0, 0.0, 2**-30]
    assert [x for row in gradients[:3] for x in row] == [0.0] * 15
    assert gradients[3][:2] == (-1.0, 1.0)  # just before the margin the gradient is not smaller
    assert metrics["active"] == [0.0, 0.0, 0.0, 1.0]
    _, gradients, _ = by_row(slic_loss, rows, 1.0, 1.0, 0.25)
    assert [by_target for _, _, by_target, _, _ in gradients] == [-0.25] * 4


def test_slic_on_the_best_answer():
    """As main calls it: the chosen answer as y_ref gets both gradients, without a reference."""
    chosen = torch.tensor([-4.0, -2.0], dtype=torch.float64, requires_grad=True)
    rejected = torch.tensor([-3.0, -9.0], dtype=torch.float64)
    losses, _ = slic_loss(chosen, rejected, chosen, 0.0, 0.0, 1.0, 1.0, 0.25)
    losses.sum().backward()
    assert losses.tolist() == [2.0 + 1.0, 0.5]
    assert chosen.grad.tolist() == [-1.25, -0.25]


# -- IPO


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("beta", (0.125, 0.5, 4.0))
def test_ipo_starts_at_a_quarter_of_beta_squared(beta, dtype):
    """1/(4 beta^2), if the policy is its reference."""
    counts = torch.tensor([[4], [16]])
    losses, (gradient,), _ = by_row(ipo_loss, [(-17.0, -170.0) * 2], *counts, beta, dtype=dtype)
    assert losses == [1 / (4 * beta**2)]
    assert gradient == (-1 / beta / 4, 1 / beta / 16, 1 / beta / 4, -1 / beta / 16)


@pytest.mark.parametrize("per_token", (True, False))
def test_ipo_pulls_back_a_pair_past_its_target(per_token):
    """At a margin of 1/2 the gradient is 0; elsewhere it grows with the distance."""
    n, counts = 8 if per_token else 1, torch.tensor([[8] * 5, [2] * 5])
    rows = [(-20.0 + h * n, -30.0, -20.0, -30.0) for h in (-1e6, 1.0, 2.0, 3.0, 1e6)]
    losses, gradients, metrics = by_row(ipo_loss, rows, *counts, 0.25, per_token)
    gaps = [-1e6 - 2, -1.0, 0.0, 1.0, 1e6 - 2]
    assert losses == [gap**2 for gap in gaps]
    assert [by_chosen for by_chosen, *_ in gradients] == [2 * gap / n for gap in gaps]
    assert metrics["rewards/margins"][1:4] == [0.25, 0.5, 0.75]


@pytest.mark.parametrize("p", (0.5, 0.6, 0.75, 1.0))
def test_ipo_has_its_optimum_where_the_labels_are_as_sure(p):
    """h = (p - 1/2) / beta for a label of probability p; DPO still has a gradient there."""
    beta = 0.2
    h, one_token = (p - 0.5) / beta, torch.ones(2, 2)
    rows = [(-5.0 + h, -7.0, -5.0, -7.0), (-7.0, -5.0 + h, -7.0, -5.0)]
    _, (by, exchanged), _ = by_row(ipo_loss, rows, *one_token, beta)
    assert p * by[0] + (1 - p) * exchanged[1] == pytest.approx(0.0, abs=1e-14)
    assert dpo(rows[:1], beta)[1][0][0] < 0


# -- ORPO


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_log_odds_keep_their_digits(dtype):
    """Near a probability of 1, where 1 - exp(a) loses them, and far from it: against 60 digits."""
    means = [-2e-6, -1e-5, -3e-4, -0.01, -0.5, -math.log(2), -3.0, -30.0, -87.0, -200.0, -1e4]
    means = torch.tensor(means, dtype=dtype).tolist()
    ones = torch.ones(2, len(means))
    _, _, metrics = by_row(orpo_loss, [(x, -5.0) for x in means], *ones, 1.0, dtype=dtype)
    rounding = 4 * torch.finfo(dtype).eps
    # Beside a chosen answer that is so unlikely, the slope is that of the log odds alone.
    _, gradients, _ = by_row(orpo_loss, [(-1e6, x) for x in means], *ones, 1.0, dtype=dtype)
    for mean, found, (_, slope) in zip(means, metrics["rewards/chosen"], gradients, strict=True):
        with localcontext() as context:
            context.prec = 60
            p = Decimal(mean).exp()
            log_odds, by = float(Decimal(mean) - (1 - p).ln()), float(1 / (1 - p))
        assert found == pytest.approx(log_odds, rel=rounding, abs=rounding)
        assert slope == pytest.approx(by, rel=rounding)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("certain", (0.0, -1e-9, -9e-7, 3e-7))  # rounding can put it above 0
def test_a_certain_answer_has_finite_odds(certain, dtype):
    """Those of a mean log-prob of -1e-6, without a gradient. The NLL has its gradient."""
    pairs = [(certain, -1.0), (-1.0, certain), (certain, certain)]
    ones = torch.ones(2, 3)
    losses, gradients, metrics = by_row(orpo_loss, pairs, *ones, 0.5, dtype=dtype)
    assert metrics["rewards/chosen"][0] == pytest.approx(math.log(1e6), rel=1e-6)
    assert metrics["rewards/rejected"][1] == pytest.approx(math.log(1e6), rel=1e-6)
    assert metrics["rewards/margins"][2] == 0.0
    assert losses[2] == pytest.approx(math.log(2) / 2, abs=2e-6)
    assert (gradients[0][0], gradients[1][1], gradients[2]) == (-1.0, 0.0, (-1.0, 0.0))
    assert all(math.isfinite(x) for x in losses + [g for pair in gradients for g in pair])
    assert gradients[0][1] > 0 > gradients[1][0] + 1  # the other answer keeps its gradient
