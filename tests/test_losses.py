"""Each loss against its paper's equation, value and gradient.

What is expected is worked out here with `math` alone, so that nothing of torch stands on both
sides. This file has DPO and SFT; beside it test_losses_pairs.py (CPO, SimPO, SLiC),
test_losses_ipo_orpo.py, test_losses_kto.py and test_losses_lists.py (PRO, listwise DPO) go on with
its helpers.
"""

import ast
import importlib
import inspect
import math
import random
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from torch import Tensor

from dpo import dpo_loss
from sft import sft_loss

F64 = 1e-12  # relative: a handful of float64 operations


# -- helpers


def log_sigmoid(x: float) -> float:
    """Without overflow for x far below 0, where log sigmoid(x) = x - log(1 + e^x)."""
    return -math.log1p(math.exp(-x)) if x >= 0 else x - math.log1p(math.exp(x))


def sigmoid(x: float) -> float:
    return math.exp(log_sigmoid(x))


def slopes(equation: Callable[..., float], at: list[float], step: float = 1e-5) -> list[float]:
    """The gradient by central differences; their error is of the order step^2 and 1e-16 / step."""
    found = []
    for i in range(len(at)):
        up, down = list(at), list(at)
        up[i], down[i] = at[i] + step, at[i] - step
        found.append((equation(*up) - equation(*down)) / (2 * step))
    return found


def called(loss: Callable, inputs: list, *rest, dtype=torch.float64):
    """(losses, gradients of their sum by each of `inputs`, metrics), as lists of floats."""
    tensors = [torch.tensor(x, dtype=dtype, requires_grad=True) for x in inputs]
    losses, metrics = loss(*tensors, *rest)
    assert losses.dtype == dtype
    losses.sum().backward()
    plain = {
        name: tuple(part.tolist() for part in x) if isinstance(x, tuple) else x.tolist()
        for name, x in metrics.items()
    }
    return losses.tolist(), [x.grad.tolist() for x in tensors], plain


def dpo_equation(chosen, rejected, ref_chosen, ref_rejected, beta, e, gamma):
    """Equation 7 for one pair, in plain floats: (loss, its gradient by each of the four)."""
    margin = beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
    loss = -(1 - e) * log_sigmoid(margin - gamma) - e * log_sigmoid(-margin - gamma)
    # d(-log sigmoid(z)) / dz = -sigmoid(-z); then the chain rule, margin by each log-prob.
    slope = -(1 - e) * sigmoid(-(margin - gamma)) + e * sigmoid(margin + gamma)
    return loss, [slope * beta, -slope * beta, -slope * beta, slope * beta]


def dpo(pairs: list[tuple[float, ...]], *knobs: float, dtype=torch.float64):
    """(losses, gradients of their sum by the four log-probs, metrics), as floats."""
    losses, gradients, metrics = called(
        dpo_loss, list(zip(*pairs, strict=True)), *knobs, dtype=dtype
    )
    return losses, list(zip(*gradients, strict=True)), metrics


def pair_with_margin(margin: float, beta: float) -> tuple[float, float, float, float]:
    """Log-probs whose reward difference is `margin`: half from each of the two answers."""
    return (-20.0 + margin / beta / 2, -30.0 - margin / beta / 2, -20.0, -30.0)


# -- DPO: the equation


def test_dpo_by_hand():
    """The chosen answer twice as likely as under the reference, the rejected one half as likely."""
    pair = (math.log(2 / 100), math.log(1 / 200), math.log(1 / 100), math.log(1 / 100))
    (loss,), (gradient,), metrics = dpo([pair], 1.0)
    # Rewards are ln 2 and -ln 2, the margin is ln 4, sigmoid(ln 4) = 4 / (4 + 1).
    assert loss == pytest.approx(math.log(5 / 4), rel=F64)
    assert gradient == pytest.approx([-1 / 5, 1 / 5, 1 / 5, -1 / 5], rel=F64)
    assert metrics["rewards/chosen"] == pytest.approx([math.log(2)], rel=F64)
    assert metrics["rewards/rejected"] == pytest.approx([-math.log(2)], rel=F64)
    assert metrics["rewards/margins"] == pytest.approx([math.log(4)], rel=F64)
    # Half the beta takes the root of the ratio: sigmoid(ln 2) = 2 / (2 + 1); the slope is halved.
    (loss,), (gradient,), _ = dpo([pair], 0.5)
    assert loss == pytest.approx(math.log(3 / 2), rel=F64)
    assert gradient == pytest.approx([-1 / 6, 1 / 6, 1 / 6, -1 / 6], rel=F64)


@pytest.mark.parametrize("gamma", (0.0, 0.7))
@pytest.mark.parametrize("e", (0.0, 0.1, 0.49))
@pytest.mark.parametrize("beta", (0.01, 0.1, 0.5, 3.0))
def test_dpo_is_the_equation(beta, e, gamma):
    """Random pairs, with log-probs as long texts have them."""
    rng = random.Random(0)
    pairs = [tuple(rng.uniform(-200, -1) for _ in range(4)) for _ in range(50)]
    pairs += [tuple(rng.gauss(-40, 2) for _ in range(4)) for _ in range(50)]  # and near misses
    losses, gradients, _ = dpo(pairs, beta, e, gamma)
    for pair, loss, gradient in zip(pairs, losses, gradients, strict=True):
        expected, by_input = dpo_equation(*pair, beta, e, gamma)
        # Log-probs of 200 carry rounding of 200 * 2^-53 into a margin, absolutely.
        assert loss == pytest.approx(expected, rel=F64, abs=F64)
        assert gradient == pytest.approx(by_input, rel=1e-10, abs=1e-15)


def test_gradient_of_the_equation():
    """The gradients expected above are right: they agree with differences of the loss."""
    pair, knobs = [-12.0, -9.5, -11.0, -10.0], (0.3, 0.1, 0.7)
    _, gradient = dpo_equation(*pair, *knobs)
    found = slopes(lambda *x: dpo_equation(*x, *knobs)[0], pair)
    assert found == pytest.approx(gradient, rel=1e-8)


# -- DPO: limits


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("e", (0.0, 0.2))
@pytest.mark.parametrize("beta", (0.1, 0.5, 10.0))
def test_dpo_starts_at_ln_2(beta, e, dtype):
    """Where the policy is its reference, whatever beta and label smoothing."""
    losses, gradients, metrics = dpo([(-17.3, -170.1, -17.3, -170.1)] * 2, beta, e, dtype=dtype)
    rounding = 2 * torch.finfo(dtype).eps
    assert losses == pytest.approx([math.log(2)] * 2, rel=rounding)
    slope = beta / 2 * (1 - 2 * e)  # smoothing shares the pull out between the two answers
    for gradient in gradients:
        assert gradient == pytest.approx([-slope, slope, slope, -slope], rel=4 * rounding)
    assert metrics["rewards/margins"] == [0.0, 0.0]


def test_beta_is_not_a_factor_on_the_loss():
    """It scales log-ratios: twice the beta with half the log-ratios is the same loss."""
    one, _, _ = dpo([(-8.0, -11.0, -10.0, -10.0)], 0.2)
    two, _, _ = dpo([(-9.0, -10.5, -10.0, -10.0)], 0.4)
    assert one == pytest.approx(two, rel=F64)


def test_only_log_ratios_count():
    """A constant added to a text's log-prob under both models changes nothing."""
    one, by_one, _ = dpo([(-8.0, -11.0, -10.0, -10.0)], 0.2, 0.1, 0.3)
    two, by_two, _ = dpo([(-40.0, -11.5, -42.0, -10.5)], 0.2, 0.1, 0.3)
    assert one == pytest.approx(two, rel=F64)
    assert by_one[0] == pytest.approx(by_two[0], rel=F64)


@pytest.mark.parametrize("e", (0.05, 0.1, 0.3))
@pytest.mark.parametrize("beta", (0.1, 0.5))
def test_cdpo_pulls_to_a_margin_and_no_further(beta, e):
    """The gradient is 0 where the policy is as sure as the labels are right: sigmoid(m) = 1 - e."""
    best = math.log((1 - e) / e)
    _, (below, at, above), _ = dpo(
        [pair_with_margin(m, beta) for m in (best - 0.1, best, best + 0.1)], beta, e
    )
    assert at == pytest.approx([0.0] * 4, abs=1e-14)
    assert below[0] < 0 < above[0]  # descent raises the chosen answer before it, lowers it after
    # What is left of the loss there is the entropy of a label that is wrong with probability e.
    losses, _, _ = dpo([pair_with_margin(best, beta)], beta, e)
    assert losses[0] == pytest.approx(-(1 - e) * math.log(1 - e) - e * math.log(e), rel=F64)


def test_label_smoothing_of_a_half_would_not_know_which_is_chosen():
    """L(m) - L(-m) = -(1 - 2e) m: the nearer e to 1/2, the less the order of a pair says."""
    for e in (0.0, 0.25, 0.5 - 1e-9):
        for margin in (0.5, 3.0, 40.0):
            (loss, exchanged), (by, by_exchanged), _ = dpo(
                [pair_with_margin(margin, 0.1), pair_with_margin(-margin, 0.1)], 0.1, e
            )
            assert loss - exchanged == pytest.approx(-(1 - 2 * e) * margin, abs=1e-12)
            assert by[0] + by_exchanged[0] == pytest.approx(-0.1 * (1 - 2 * e), abs=1e-13)


@pytest.mark.parametrize("gamma", (0.5, 2.0))
def test_gamma_shifts_the_margin(gamma):
    """A pair counts as even where its margin is gamma, not 0."""
    for margin in (-3.0, 0.0, gamma, 5.0):
        shifted, by_shifted, _ = dpo([pair_with_margin(margin, 0.5)], 0.5, 0.0, gamma)
        plain, by_plain, _ = dpo([pair_with_margin(margin - gamma, 0.5)], 0.5)
        assert shifted == pytest.approx(plain, rel=F64)
        assert by_shifted[0] == pytest.approx(by_plain[0], rel=F64)
    losses, gradients, metrics = dpo([pair_with_margin(gamma, 0.5)], 0.5, 0.0, gamma)
    assert losses == pytest.approx([math.log(2)], rel=F64)
    assert gradients[0][0] == pytest.approx(-0.25, rel=F64)
    assert metrics["rewards/margins"] == pytest.approx([gamma], rel=F64)  # reported without gamma


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("e", (0.0, 0.125))
def test_far_margins_stay_finite(e, dtype):
    """exp(1000) is infinite, exp(-1000) is 0: the loss is a straight line there, not inf or NaN.

    All numbers here are exact in fp32 too.
    """
    far = [pair_with_margin(margin, 0.5) for margin in (1000.0, -1000.0)]
    losses, (right, wrong), _ = dpo(far, 0.5, e, dtype=dtype)
    assert losses == [1000 * e, 1000 * (1 - e)]
    # Slopes of the two lines, e and -(1 - e), times beta.
    assert right == (0.5 * e, -0.5 * e, -0.5 * e, 0.5 * e)
    assert wrong == (-0.5 * (1 - e), 0.5 * (1 - e), 0.5 * (1 - e), -0.5 * (1 - e))


# -- DPO: what is plotted


def test_dpo_metrics():
    """One value a pair, so that a mean over any split into micro-batches is the same mean."""
    pairs = [(-10.0, -20.0, -11.0, -19.0), (-7.0, -4.0, -6.0, -5.0), (-3.0, -3.0, -3.0, -3.0)]
    losses, _, metrics = dpo(pairs, 0.1)
    assert {name: len(values) for name, values in metrics.items()} == dict.fromkeys(
        (
            "loss",
            "rewards/chosen",
            "rewards/rejected",
            "rewards/margins",
            "rewards/accuracies",
            "logps/chosen",
            "logps/rejected",
        ),
        3,
    )
    assert metrics["loss"] == losses
    assert metrics["logps/chosen"] == [-10.0, -7.0, -3.0]
    assert metrics["logps/rejected"] == [-20.0, -4.0, -3.0]
    assert metrics["rewards/chosen"] == pytest.approx([0.1, -0.1, 0.0], rel=F64)
    assert metrics["rewards/rejected"] == pytest.approx([-0.1, 0.1, 0.0], rel=F64)
    assert metrics["rewards/margins"] == pytest.approx([0.2, -0.2, 0.0], rel=F64)


def test_accuracy_is_strict():
    """A tie is not told apart: before the first step every margin is 0, and so is the accuracy."""
    tiny = 2.0**-40
    pairs = [
        (-5.0, -5.0, -5.0, -5.0),
        (-5.0 + tiny, -5.0, -5.0, -5.0),
        (-5.0 - tiny, -5.0, -5.0, -5.0),
    ]
    assert dpo(pairs, 1.0)[2]["rewards/accuracies"] == [0.0, 1.0, 0.0]
    # It is about the rewards, so a target margin or label smoothing does not move it.
    assert dpo(pairs, 1.0, 0.4, 2.0)[2]["rewards/accuracies"] == [0.0, 1.0, 0.0]


# -- SFT

# Two demonstrations: the probabilities of their tokens.
DEMONSTRATIONS = ((1 / 2, 1 / 4, 1 / 8), (1 / 5,))


def test_sft_is_the_equation():
    """The mean over tokens of the whole step, not the mean of two means."""
    logps = torch.tensor(
        [sum(map(math.log, y)) for y in DEMONSTRATIONS], dtype=torch.float64, requires_grad=True
    )
    lengths = torch.tensor([len(y) for y in DEMONSTRATIONS])
    losses, _ = sft_loss(logps, lengths)
    assert losses.tolist() == pytest.approx([math.log(2 * 4 * 8), math.log(5)], rel=F64)
    (losses.sum() / lengths.sum()).backward()  # as main does
    assert (losses.sum() / lengths.sum()).item() == pytest.approx(math.log(320) / 4, rel=F64)
    # Every token weighs 1/N, those of the short answer too.
    assert logps.grad.tolist() == pytest.approx([-1 / 4, -1 / 4], rel=F64)


def test_sft_metrics():
    """The plotted loss is a mean over tokens: values that are sums, weighted by their lengths."""
    logps = torch.tensor([sum(map(math.log, y)) for y in DEMONSTRATIONS], dtype=torch.float64)
    _, metrics = sft_loss(logps, torch.tensor([3, 1]))
    values, weights = metrics["loss"]
    assert values.tolist() == pytest.approx([math.log(64), math.log(5)], rel=F64)
    assert weights.tolist() == [3, 1]
    assert metrics["logps/response"].tolist() == logps.tolist()
    assert metrics["length/response"].tolist() == [3, 1]


def test_sft_limits():
    """A certain answer costs nothing; an impossible one is finite and has the same slope."""
    logps = torch.tensor([0.0, -1000.0], requires_grad=True)
    losses, _ = sft_loss(logps, torch.tensor([4, 4]))
    losses.sum().backward()
    assert losses.tolist() == [0.0, 1000.0]
    assert logps.grad.tolist() == [-1.0, -1.0]


# -- a loss is a unit that can be taken along


def columns(n: int) -> list[Tensor]:
    """n inputs for two rows, no two alike."""
    return [torch.tensor([-9.0 - i, -4.0]) for i in range(n)]


def lists() -> list[Tensor]:
    """Log-probs and scores of a list of three with a tie, and of a list of two."""
    logps = torch.tensor([[-9.0, -4.0, -7.0], [-5.0, -3.0, 0.0]])
    return [logps, torch.tensor([[2.0, 0.5, 0.5], [1.0, -1.0, torch.nan]], dtype=torch.float64)]


EXAMPLES = {  # what each loss is called with below
    "cpo_loss": lambda: (*columns(2), 3.5, 0.3, 0.7),
    "dpo_loss": lambda: (*columns(4), 0.3, 0.1, 0.2),
    "ipo_loss": lambda: (
        *columns(4), torch.tensor([3, 1]), torch.tensor([4, 2]), 0.3,
    ),
    "grpo_loss": lambda: (
        *(x[:, None] * torch.tensor([1.0, 0.5]) for x in columns(3)), torch.tensor([1.0, -1.0]),
        torch.tensor([[True, True], [True, False]]), 0.1, 0.2, 0.28,
    ),
    "kto_loss": lambda: (
        *columns(2), torch.tensor([True, False]), torch.tensor(0.4), 0.3, 1.5, 0.5,
    ),
    "listwise_dpo_loss": lambda: (lists()[0], lists()[0].flip(0), lists()[1], 0.3),
    "orpo_loss": lambda: (*columns(2), torch.tensor([3, 1]), torch.tensor([4, 2]), 0.7),
    "ppo_loss": lambda: (
        *(x[:, None] * torch.tensor([1.0, 0.5]) for x in columns(6)),
        torch.tensor([[True, True], [True, False]]), 0.2, 0.3, 0.1,
    ),
    "pro_loss": lambda: (lists()[0], torch.tensor([[3, 1, 2], [2, 2, 0]]), lists()[1], 0.05),
    "reward_model_loss": lambda: (lists()[0], lists()[1], 0.2, 0.01),
    "raft_loss": lambda: (torch.tensor([-9.0, -4.0]), torch.tensor([3, 1])),
    "rrhf_loss": lambda: (lists()[0], torch.tensor([[3, 1, 2], [2, 2, 0]]), lists()[1], 0.05, 0.3),
    "rso_loss": lambda: (*columns(4), 0.05, "hinge-norm"),
    "rloo_loss": lambda: (
        *(x[:, None] * torch.tensor([1.0, 0.5]) for x in columns(2)), torch.tensor([1.0, -1.0]),
        torch.tensor([[True, True], [True, False]]), 0.2,
    ),
    "sft_loss": lambda: (torch.tensor([-9.0, -4.0]), torch.tensor([3, 1])),
    "simpo_loss": lambda: (
        *columns(2), torch.tensor([3, 1]), torch.tensor([4, 2]), 2.0, 0.3, 0.5, 0.7,
    ),
    "slic_loss": lambda: (*columns(5), 0.3, 1.0, 0.1),
}  # fmt: skip


def losses_of_methods() -> list[tuple[str, str, str]]:
    """(name, module, source) of every top-level *_loss in every script beside common.py."""
    found = []
    for file in sorted(ROOT.glob("*.py")):
        source = file.read_text()
        for node in ast.parse(source).body:
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_loss"):
                found.append((node.name, file.stem, ast.get_source_segment(source, node)))
    return found


@pytest.mark.parametrize(
    "name, module, source", [pytest.param(*x, id=x[0]) for x in losses_of_methods()]
)
def test_pasted_into_a_notebook(name, module, source):
    """With torch, F and Tensor alone, the loss does the same."""
    notebook = {"torch": torch, "F": F, "Tensor": Tensor}
    exec(source, notebook)
    original = getattr(importlib.import_module(module), name)
    losses, metrics = notebook[name](*EXAMPLES[name]())
    expected, expected_metrics = original(*EXAMPLES[name]())
    assert torch.equal(losses, expected) and losses.isfinite().all()
    assert metrics.keys() == expected_metrics.keys()
    assert inspect.signature(notebook[name]) == inspect.signature(original)


def test_every_loss_is_tested():
    assert {name for name, _, _ in losses_of_methods()} == EXAMPLES.keys()
