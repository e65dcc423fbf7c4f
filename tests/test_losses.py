"""The losses of DPO and SFT in cases that can be worked out by hand, and checks of every loss.

The expected numbers are computed with `math` alone, without torch. The other test_losses_*.py use
this file's helpers; test_losses_pairs.py has DPO's equation.
"""

import ast
import importlib
import inspect
import math
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


def called(loss: Callable, inputs: list, *rest, dtype=torch.float64, **knobs):
    """(losses, gradients of their sum by each of `inputs`, metrics), as lists of floats."""
    tensors = [torch.tensor(x, dtype=dtype, requires_grad=True) for x in inputs]
    losses, metrics = loss(*tensors, *rest, **knobs)
    assert losses.dtype == dtype
    losses.sum().backward()
    plain = {
        name: tuple(part.tolist() for part in x) if isinstance(x, tuple) else x.tolist()
        for name, x in metrics.items()
    }
    return losses.tolist(), [x.grad.tolist() for x in tensors], plain


def by_row(loss: Callable, rows: list[tuple[float, ...]], *rest, **knobs):
    """(losses, gradients of each row, metrics); a row is one value of each differentiable input."""
    columns = list(zip(*rows, strict=True))
    losses, gradients, metrics = called(loss, columns, *rest, **knobs)
    return losses, list(zip(*gradients, strict=True)), metrics


def dpo(pairs: list[tuple[float, ...]], *knobs: float, dtype=torch.float64):
    """(losses, gradients by the four log-probs, metrics), as floats."""
    return by_row(dpo_loss, pairs, *knobs, dtype=dtype)


def pair_with_margin(margin: float, beta: float) -> tuple[float, float, float, float]:
    """Log-probs whose reward difference is `margin`: half from each of the two answers."""
    return (-20.0 + margin / beta / 2, -30.0 - margin / beta / 2, -20.0, -30.0)


# -- DPO


def test_dpo_by_hand():
    """The chosen answer is twice as likely as under the reference, the rejected one half as."""
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


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("e", (0.0, 0.2))
@pytest.mark.parametrize("beta", (0.1, 0.5, 10.0))
def test_dpo_starts_at_ln_2(beta, e, dtype):
    """If the policy is its reference, for any beta and label smoothing."""
    losses, gradients, metrics = dpo([(-17.3, -170.1, -17.3, -170.1)] * 2, beta, e, dtype=dtype)
    rounding = 2 * torch.finfo(dtype).eps
    assert losses == pytest.approx([math.log(2)] * 2, rel=rounding)
    slope = beta / 2 * (1 - 2 * e)  # label smoothing moves part of the pull to the other answer
    for gradient in gradients:
        assert gradient == pytest.approx([-slope, slope, slope, -slope], rel=4 * rounding)
    assert metrics["rewards/margins"] == [0.0, 0.0]


@pytest.mark.parametrize("e", (0.05, 0.1, 0.3))
@pytest.mark.parametrize("beta", (0.1, 0.5))
def test_cdpo_pulls_to_a_margin_and_no_further(beta, e):
    """The gradient is 0 at sigmoid(margin) = 1 - e, the probability that a label is right."""
    best = math.log((1 - e) / e)
    pairs = [pair_with_margin(m, beta) for m in (best - 0.1, best, best + 0.1)]
    losses, (below, at, above), _ = dpo(pairs, beta, e)
    assert at == pytest.approx([0.0] * 4, abs=1e-14)
    assert below[0] < 0 < above[0]  # descent raises the chosen answer before it, lowers it after
    # The loss that remains is the entropy of a label that is wrong with probability e.
    assert losses[1] == pytest.approx(-(1 - e) * math.log(1 - e) - e * math.log(e), rel=F64)


def test_dpo_metrics():
    """One value per pair, so that the mean does not depend on the split into micro-batches."""
    pairs = [(-10.0, -20.0, -11.0, -19.0), (-7.0, -4.0, -6.0, -5.0), (-3.0, -3.0, -3.0, -3.0)]
    losses, _, metrics = dpo(pairs, 0.1)
    assert metrics["loss"] == losses
    assert metrics["logps/chosen"] == [-10.0, -7.0, -3.0]
    assert metrics["logps/rejected"] == [-20.0, -4.0, -3.0]
    assert metrics["rewards/chosen"] == pytest.approx([0.1, -0.1, 0.0], rel=F64)
    assert metrics["rewards/rejected"] == pytest.approx([-0.1, 0.1, 0.0], rel=F64)
    assert metrics["rewards/margins"] == pytest.approx([0.2, -0.2, 0.0], rel=F64)
    # A tie counts half: before the first step every margin is 0, and the accuracy is 0.5.
    # A target margin or label smoothing does not change it.
    for knobs in ((0.1,), (0.1, 0.4, 2.0)):
        assert dpo(pairs, *knobs)[2]["rewards/accuracies"] == [1.0, 0.0, 0.5]


# -- SFT

# Two demonstrations: the probabilities of their tokens.
DEMONSTRATIONS = ((1 / 2, 1 / 4, 1 / 8), (1 / 5,))


def test_sft_is_the_equation():
    """The mean over tokens of the step, not the mean of two means."""
    logps = torch.tensor(
        [sum(map(math.log, y)) for y in DEMONSTRATIONS], dtype=torch.float64, requires_grad=True
    )
    lengths = torch.tensor([len(y) for y in DEMONSTRATIONS])
    losses, metrics = sft_loss(logps, lengths)
    assert losses.tolist() == pytest.approx([math.log(2 * 4 * 8), math.log(5)], rel=F64)
    (losses.sum() / lengths.sum()).backward()  # as main does
    assert (losses.sum() / lengths.sum()).item() == pytest.approx(math.log(320) / 4, rel=F64)
    # Every token weighs 1/N, those of the short answer too.
    assert logps.grad.tolist() == pytest.approx([-1 / 4, -1 / 4], rel=F64)
    # The logged loss is a mean over tokens: sums, weighted by lengths.
    values, weights = metrics["loss"]
    assert (values.tolist(), weights.tolist()) == (losses.tolist(), [3, 1])
    assert metrics["logps/response"].tolist() == logps.tolist()
    assert metrics["length/response"].tolist() == [3, 1]


# -- every loss is a unit that can be copied


def columns(n: int) -> list[Tensor]:
    """n inputs for two rows, no two alike."""
    return [torch.tensor([-9.0 - i, -4.0]) for i in range(n)]


def tokens(n: int) -> list[Tensor]:
    """n inputs of (2, 2), and a mask."""
    values = [x[:, None] * torch.tensor([1.0, 0.5]) for x in columns(n)]
    return [*values, torch.tensor([[True, True], [True, False]])]


def lists() -> list[Tensor]:
    """Log-probs and scores of a list of three with a tie, and of a list of two."""
    logps = torch.tensor([[-9.0, -4.0, -7.0], [-5.0, -3.0, 0.0]])
    return [logps, torch.tensor([[2.0, 0.5, 0.5], [1.0, -1.0, torch.nan]], dtype=torch.float64)]


LENGTHS = (torch.tensor([3, 1]), torch.tensor([4, 2]))
LIST_LENGTHS = torch.tensor([[3, 1, 2], [2, 2, 0]])
ADVANTAGES = torch.tensor([1.0, -1.0])
EXAMPLES = {  # the arguments that each loss is called with below
    "cpo_loss": lambda: (*columns(2), 3.5, 0.3, 0.7),
    "dpo_loss": lambda: (*columns(4), 0.3, 0.1, 0.2),
    "ipo_loss": lambda: (*columns(4), *LENGTHS, 0.3),
    "grpo_loss": lambda: (*tokens(3)[:3], ADVANTAGES, tokens(3)[3], 0.1, 0.2, 0.28),
    "kto_loss": lambda: (*columns(2), ADVANTAGES > 0, torch.tensor(0.4), 0.3, 1.5, 0.5),
    "listwise_dpo_loss": lambda: (lists()[0], lists()[0].flip(0), lists()[1], 0.3),
    "orpo_loss": lambda: (*columns(2), *LENGTHS, 0.7),
    "nlpo_loss": lambda: (*tokens(6), 0.2, 0.3, 0.1),
    "ppo_loss": lambda: (*tokens(6), 0.2, 0.3, 0.1),
    "pro_loss": lambda: (lists()[0], LIST_LENGTHS, lists()[1], 0.05),
    "reward_model_loss": lambda: (lists()[0], lists()[1], 0.2, 0.01),
    "raft_loss": lambda: (columns(1)[0], LENGTHS[0]),
    "rrhf_loss": lambda: (lists()[0], LIST_LENGTHS, lists()[1], 0.05, 0.3),
    "rso_loss": lambda: (*columns(4), 0.05, "hinge-norm"),
    "rloo_loss": lambda: (*tokens(2)[:2], ADVANTAGES, tokens(2)[2], 0.2),
    "sft_loss": lambda: (columns(1)[0], LENGTHS[0]),
    "simpo_loss": lambda: (*columns(2), *LENGTHS, 0.3, 0.5, 0.7, 2.0),
    "slic_loss": lambda: (*columns(5), 0.3, 1.0, 0.1),
}


def losses_of_methods() -> list[tuple[str, str, str]]:
    """(name, module, source) of every top-level *_loss in every script next to common.py."""
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
    """With only torch, F and Tensor, the loss gives the same values."""
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
