"""PRO, RRHF and listwise DPO, losses on ranked lists: value and gradient against the equations."""

import itertools
import math
import random

import pytest
import torch
from test_losses import F64, called, dpo, log_sigmoid, slopes

from listwise_dpo import listwise_dpo_loss
from pro import pro_loss
from rrhf import rrhf_loss

NAN = math.nan

# -- helpers


def log_sum_exp(values: list[float]) -> float:
    most = max(values)
    return most + math.log(math.fsum(math.exp(x - most) for x in values))


def choice(first: float, others: list[float]) -> tuple[float, list[float]]:
    """- log of the first one's share in a softmax over all, and the gradient of that by each."""
    ahead = [0.0, *(x - first for x in others)]
    loss = log_sum_exp(ahead)
    shares = [math.exp(x - loss) for x in ahead]
    return loss, [-math.fsum(shares[1:]), *shares[1:]]


def pro_equation(logps, lengths, scores, sft_weight, temperatures=True):
    """For one list, in plain floats: (loss, its gradient by the log-probs).

    Answers that tie are left out of each other's term of the chain.
    """
    n = len(logps)
    s = [logp / length for logp, length in zip(logps, lengths, strict=True)]
    loss, by_s = 0.0, [0.0] * n
    for k in range(n):
        below = [i for i in range(n) if scores[i] < scores[k]]
        if not below:
            continue
        T = {i: scores[k] - scores[i] if temperatures else 1.0 for i in below}
        T[k] = max(T.values())
        term, by_each = choice(T[k] * s[k], [T[i] * s[i] for i in below])
        loss += term
        for i, slope in zip([k, *below], by_each, strict=True):
            by_s[i] += T[i] * slope
    gradient = [g / length for g, length in zip(by_s, lengths, strict=True)]
    gradient[0] -= sft_weight * (n - 1) ** 2
    return loss - sft_weight * (n - 1) ** 2 * logps[0], gradient


def rrhf_equation(logps, lengths, scores, sft_weight, margin=0.0):
    """For one list, in plain floats: (loss, its gradient by the log-probs)."""
    n = len(logps)
    p = [logp / length for logp, length in zip(logps, lengths, strict=True)]
    gradient = [-sft_weight] + [0.0] * (n - 1)
    costs = [-sft_weight * logps[0]]
    for i, j in itertools.permutations(range(n), 2):
        if scores[i] < scores[j] and p[i] - p[j] + margin > 0:
            costs.append(p[i] - p[j] + margin)
            gradient[i] += 1 / lengths[i]
            gradient[j] -= 1 / lengths[j]
    return math.fsum(costs), gradient


def listwise_equation(logps, ref_logps, scores, beta):
    """For one list: (loss, its gradient by the log-probs of the policy)."""
    n = len(logps)
    u = [beta * (logp - ref) for logp, ref in zip(logps, ref_logps, strict=True)]
    loss, by_u = 0.0, [0.0] * n
    for k in range(n):
        below = [i for i in range(n) if scores[i] < scores[k]]
        term, by_each = choice(u[k], [u[i] for i in below])
        loss += term
        for i, slope in zip([k, *below], by_each, strict=True):
            by_u[i] += slope
    return loss, [beta * g for g in by_u]


def pro(logps, lengths, scores, *knobs, dtype=torch.float64):
    """(losses, gradients by list, metrics)."""
    given = torch.tensor(lengths), torch.tensor(scores, dtype=torch.float64)
    losses, (gradients,), metrics = called(pro_loss, [logps], *given, *knobs, dtype=dtype)
    return losses, gradients, metrics


def rrhf(logps, lengths, scores, *knobs, dtype=torch.float64):
    """(losses, gradients by list, metrics)."""
    given = torch.tensor(lengths), torch.tensor(scores, dtype=torch.float64)
    losses, (gradients,), metrics = called(rrhf_loss, [logps], *given, *knobs, dtype=dtype)
    return losses, gradients, metrics


def listwise(logps, ref_logps, scores, beta, dtype=torch.float64):
    """(losses, gradients by list, by policy and by reference, metrics)."""
    given = torch.tensor(scores, dtype=torch.float64), beta
    losses, gradients, metrics = called(listwise_dpo_loss, [logps, ref_logps], *given, dtype=dtype)
    return losses, gradients, metrics


def random_lists(count: int, n: int, ties: bool = False, seed: int = 0):
    """(log-probs, lengths, scores) of lists of n, best first: long texts, and near misses."""
    rng = random.Random(seed)
    lengths = [[rng.randint(1, 60) for _ in range(n)] for _ in range(count)]
    logps = [[-rng.uniform(0.05, 3.0) * length for length in row] for row in lengths[::2]]
    logps += [[rng.gauss(-40, 2) for _ in row] for row in lengths[1::2]]
    lengths = lengths[::2] + lengths[1::2]
    # Scores as reward models have them; with ties, those of a coarse scale.
    draw = (lambda: float(rng.randint(0, 2))) if ties else (lambda: rng.gauss(0, 1.5))
    scores = [sorted((draw() for _ in range(n)), reverse=True) for _ in range(count)]
    return logps, lengths, scores


def padded(rows: list[list[float]], n: int, filling: float) -> list[list[float]]:
    return [row + [filling] * (n - len(row)) for row in rows]


def close_to(expected):
    """Terms of a chain cancel and leave their rounding; a term below 2^-53 is 0 there."""
    return pytest.approx(expected, rel=F64, abs=1e-14)


# -- PRO: the equation


def test_pro_by_hand():
    """Three answers, whose mean probabilities a token are 1/2, 1/4 and 1/8."""
    lengths, scores = [1, 2, 3], [2.0, 1.0, 0.0]
    logps = [math.log(1 / 2), math.log(1 / 4**2), math.log(1 / 8**3)]
    # k = 1: T_12 = 1 and T_13 = T_1 = 2, so (1/2)^2, 1/4, (1/8)^2: 16, 16 and 1 of 33.
    # k = 2: T_23 = T_2 = 1, so 1/4 and 1/8: 2 and 1 of 3.
    (loss,), (gradient,), metrics = pro([logps], [lengths], [scores], 0.0)
    assert loss == pytest.approx(math.log(33 / 16) + math.log(3 / 2), rel=F64)
    by_s = [2 * (16 / 33 - 1), 16 / 33 + (2 / 3 - 1), 2 * 1 / 33 + 1 / 3]
    assert gradient == pytest.approx([by_s[0], by_s[1] / 2, by_s[2] / 3], rel=F64)
    assert metrics["rewards/margins"] == pytest.approx([math.log(4)], rel=F64)
    # SFT: (3 - 1)^2 times its weight, on the sum over the best answer's tokens.
    (loss,), (gradient,), metrics = pro([logps], [lengths], [scores], 0.25)
    assert loss == pytest.approx(math.log(99 / 32) + math.log(2), rel=F64)
    assert gradient == pytest.approx([by_s[0] - 1, by_s[1] / 2, by_s[2] / 3], rel=F64)
    assert metrics["chain_loss"] == pytest.approx([math.log(99 / 32)], rel=F64)
    # All temperatures 1: 4, 2 and 1 of 7, then 2 and 1 of 3.
    (loss,), (gradient,), _ = pro([logps], [lengths], [scores], 0.0, False)
    assert loss == pytest.approx(math.log(7 / 4) + math.log(3 / 2), rel=F64)
    by_s = [4 / 7 - 1, 2 / 7 + (2 / 3 - 1), 1 / 7 + 1 / 3]
    assert gradient == pytest.approx([by_s[0], by_s[1] / 2, by_s[2] / 3], rel=F64)


@pytest.mark.parametrize("ties", (False, True))
@pytest.mark.parametrize("n", range(1, 9))
@pytest.mark.parametrize("knobs", ((0.0,), (0.05,), (1.0, False)))
def test_pro_is_the_equation(knobs, n, ties):
    logps, lengths, scores = random_lists(20, n, ties)
    losses, gradients, _ = pro(logps, lengths, scores, *knobs)
    for row, loss, gradient in zip(
        zip(logps, lengths, scores, strict=True), losses, gradients, strict=True
    ):
        expected, by_logp = pro_equation(*row, *knobs)
        assert loss == close_to(expected)
        assert gradient == close_to(by_logp)


@pytest.mark.parametrize("scores", ([1.2, 0.7, -0.4, -0.5], [1.0, 1.0, 0.5, 0.5]))
def test_gradient_of_pro_equation(scores):
    logps, knobs = [-6.0, -4.5, -9.0, -3.0], ([4, 3, 7, 2], scores, 0.05)
    _, gradient = pro_equation(logps, *knobs)
    found = slopes(lambda *x: pro_equation(list(x), *knobs)[0], logps)
    assert found == pytest.approx(gradient, rel=1e-8)


# -- PRO: limits


@pytest.mark.parametrize("gap", (1.0, 0.25, 3.0))
def test_pro_of_two_is_a_logistic_loss(gap):
    """- log sigmoid(s_1 - s_2) where the scores are 1 apart: the gap multiplies the difference."""
    for one, two in ((-0.5, -2.0), (-2.0, -0.5), (-1.0, -1.0)):
        (loss,), _, _ = pro([[4 * one, 6 * two]], [[4, 6]], [[gap - 1.0, -1.0]], 0.0)
        assert loss == pytest.approx(-log_sigmoid(gap * (one - two)), rel=F64)
        (loss,), _, _ = pro([[4 * one, 6 * two]], [[4, 6]], [[gap - 1.0, -1.0]], 0.0, False)
        assert loss == pytest.approx(-log_sigmoid(one - two), rel=F64)


def as_written(s: list[float], scores: list[float], within: float = 1e-10) -> float:
    """L_1 as the authors' code has it: plain exponentials, and a little something in the log."""
    T = [scores[0] - score for score in scores]
    T[0] = max(T[1:])
    total = sum(math.exp(t * x) for t, x in zip(T, s, strict=True))
    return math.log(within + total) - T[0] * s[0]


def test_pro_agrees_with_plain_exponentials_where_these_can_be_taken():
    """The best answer above three equals: one term. The 1e-10 in it is of no account."""
    scores = [1.5, 0.5, 0.5, 0.5]
    for s in ([-0.5, -1.0, -1.5, -2.0], [-2.0, -0.25, -0.5, -3.0]):
        logps = [x * length for x, length in zip(s, (4, 2, 8, 6), strict=True)]
        (loss,), _, _ = pro([logps], [[4, 2, 8, 6]], [scores], 0.0)
        assert loss == pytest.approx(as_written(s, scores, within=0.0), rel=F64)
        assert loss == pytest.approx(as_written(s, scores), rel=1e-8)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_pro_where_plain_exponentials_vanish(dtype):
    """T s of -60 and -62: next to 1e-10 exp of that is nothing, and the log around it a constant.

    What is left of the authors' loss there pulls the better answer up with all of T, right or
    wrong, and leaves the worse one alone.
    """
    scores = [2.0, 0.0]
    for worse in (-31.0, -25.0):
        expected = 60 + math.log(1e-10)
        assert as_written([-30.0, worse], scores) == pytest.approx(expected, rel=F64)
    (loss,), (gradient,), _ = pro([[-30.0, -31.0]], [[1, 1]], [scores], 0.0, dtype=dtype)
    rounding = 16 * torch.finfo(dtype).eps
    share = 1 / (1 + math.exp(2))  # of the worse answer
    assert loss == pytest.approx(math.log1p(math.exp(-2)), rel=rounding)
    assert gradient == pytest.approx([-2 * share, 2 * share], rel=rounding)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_pro_stays_finite(dtype):
    """At gaps and log-probs that no exponential can take. All numbers are exact in fp32 too."""
    scores = [[64.0, 32.0, 0.0]] * 2
    rows = [[-1.0, -500.0, -1000.0], [-1000.0, -500.0, -1.0]]
    losses, (right, wrong), _ = pro(rows, [[1, 1, 1]] * 2, scores, 0.0, dtype=dtype)
    # Wrong: k = 1 has -64000 against -16000 and -64, k = 2 -16000 against -32.
    assert losses == [0.0, (64000 - 64) + (16000 - 32)]
    assert right == [0.0, 0.0, 0.0]
    assert wrong == [-64.0, -32.0, 64.0 + 32.0]


def test_pro_starts_anywhere():
    """Equal answers are no fixed number: T_k s_k and T_ki s_i differ by their temperatures."""
    (loss,), _, _ = pro([[-1.0] * 3], [[1] * 3], [[2.0, 1.0, 0.0]], 0.0)
    assert loss == pytest.approx(math.log(2 + math.e) + math.log(2), rel=F64)
    (loss,), _, _ = pro([[-1.0] * 3], [[1] * 3], [[2.0, 1.0, 0.0]], 0.0, False)
    assert loss == pytest.approx(math.log(3) + math.log(2), rel=F64)


@pytest.mark.parametrize("s, harder", ((-0.25, 2), (-2.0, 1)))
def test_which_worse_answer_pro_pushes_harder(s, harder):
    """Three alike answers, scores 2, 1, 0, the best one's own term. A temperature is a factor on
    the push, but also on a mean log-prob, which is negative: it takes from the answer's share in
    the softmax. So the much worse answer is pushed harder while tokens are likely (here above
    exp(-ln 2), as 2 exp(2s) > exp(s)), and the nearly as good one where they are not.
    """
    _, (gradient,), _ = pro([[s] * 3], [[1] * 3], [[2.0, 1.0, 0.0]], 0.0)
    _, (second,), _ = pro([[s] * 2], [[1] * 2], [[1.0, 0.0]], 0.0)  # the chain's other term
    push = [gradient[0], gradient[1] - second[0], gradient[2] - second[1]]
    _, by_each = choice(2 * s, [s, 2 * s])
    assert push == pytest.approx([2 * by_each[0], by_each[1], 2 * by_each[2]], rel=F64)
    assert max((1, 2), key=lambda i: push[i]) == harder


def test_score_scale_is_a_factor_on_the_means():
    """Scores twice as far apart do what twice the log-probs would."""
    logps, lengths, scores = random_lists(6, 4)
    one, by_one, _ = pro(logps, lengths, [[2 * x for x in row] for row in scores], 0.0)
    two, by_two, _ = pro([[2 * x for x in row] for row in logps], lengths, scores, 0.0)
    assert one == two
    assert by_one == [[2 * g for g in row] for row in by_two]
    # Without temperatures there is nothing to scale, and only the order counts.
    one, by_one, _ = pro(logps, lengths, [[9 * x - 3 for x in row] for row in scores], 0.1, False)
    two, by_two, _ = pro(logps, lengths, scores, 0.1, False)
    assert (one, by_one) == (two, by_two)


def test_sft_term_of_pro_grows_with_its_own_list():
    """(n - 1)^2 of each list, not of the longest one beside it."""
    sizes = (1, 2, 3, 5)
    scores = padded([[float(-i) for i in range(n)] for n in sizes], 5, NAN)
    logps = padded([[-8.0] * n for n in sizes], 5, 0.0)
    lengths = padded([[4] * n for n in sizes], 5, 0)
    losses, gradients, metrics = pro(logps, lengths, scores, 0.5)
    _, by_chain, _ = pro(logps, lengths, scores, 0.0)
    for b, n in enumerate(sizes):
        expected = 0.5 * (n - 1) ** 2
        assert losses[b] - metrics["chain_loss"][b] == pytest.approx(8 * expected, rel=F64)
        assert by_chain[b][0] - gradients[b][0] == pytest.approx(expected, rel=F64)
        assert gradients[b][1:] == by_chain[b][1:]


# -- PRO: ragged lists and ties


@pytest.mark.parametrize("nothing", (0.0, -77.0))  # 0 is what common.py fills with
def test_ragged_lists_of_pro(nothing):
    """A shorter list is what it is alone; nothing flows to where it has no answer."""
    sizes = (3, 5, 1, 2)
    alone = [[x[0] for x in random_lists(2, n, seed=n)] for n in sizes]
    logps, lengths, scores = (
        padded(list(column), 5, filling)
        for column, filling in zip(zip(*alone, strict=True), (nothing, 0, NAN), strict=True)
    )
    losses, gradients, metrics = pro(logps, lengths, scores, 0.05)
    for b, (row, n) in enumerate(zip(alone, sizes, strict=True)):
        expected, by_logp, expected_metrics = pro(*([x] for x in row), 0.05)
        assert losses[b] == pytest.approx(expected[0], rel=F64)
        assert gradients[b][:n] == pytest.approx(by_logp[0], rel=F64)
        assert gradients[b][n:] == [0.0] * (5 - n)
        for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "logps/rejected"):
            assert metrics[name][b] == pytest.approx(expected_metrics[name][0], rel=F64)
        for part, expected_part in zip(
            metrics["rewards/accuracies"], expected_metrics["rewards/accuracies"], strict=True
        ):
            assert sum(map(sum, part[b])) == sum(map(sum, expected_part[0]))


def test_ties_of_pro():
    """Equals are not compared; each is compared with those below it."""
    logps, lengths = [-2.0, -6.0, -9.0, -1.0], [2, 3, 6, 1]
    (loss,), (gradient,), _ = pro([logps], [lengths], [[3.0, 3.0, 1.0, 1.0]], 0.0)
    # So there are two choices among three: each of the first two with both below it, T = 2.
    s = [-1.0, -2.0, -1.5, -1.0]
    expected = [log_sum_exp([2 * s[k], 2 * s[2], 2 * s[3]]) - 2 * s[k] for k in (0, 1)]
    assert loss == pytest.approx(sum(expected), rel=F64)
    # Which of two equals stands first says nothing, but for the SFT term, which has one answer.
    order = [1, 0, 3, 2]
    (same,), (by_order,), _ = pro(
        [[logps[i] for i in order]], [[lengths[i] for i in order]], [[3.0, 3.0, 1.0, 1.0]], 0.0
    )
    assert same == pytest.approx(loss, rel=F64)
    assert by_order == pytest.approx([gradient[i] for i in order], rel=F64)


@pytest.mark.parametrize("temperatures", (True, False))
def test_all_tied_in_pro(temperatures):
    """Nothing to choose: 0, without a gradient. The SFT term does not ask for scores."""
    row = [[-2.0, -6.0, -9.0]], [[2, 3, 6]], [[0.3, 0.3, 0.3]]
    losses, (gradient,), metrics = pro(*row, 0.0, temperatures)
    assert losses == metrics["chain_loss"] == [0.0]
    assert gradient == [0.0, 0.0, 0.0]
    assert sum(map(sum, metrics["rewards/accuracies"][1][0])) == 0.0
    losses, (gradient,), _ = pro(*row, 0.25, temperatures)
    assert (losses, gradient) == ([2.0], [-1.0, 0.0, 0.0])


# -- PRO: what is plotted


RANKED = {
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
}


def test_pro_metrics():
    """Means a token, best and worst; accuracy over ordered pairs, where a tie is not told apart."""
    logps = [[-2.0, -9.0, -3.0, -8.0], [-6.0, -4.0, 0.0, 0.0]]
    lengths = [[2, 3, 3, 2], [2, 4, 0, 0]]
    scores = [[3.0, 2.0, 2.0, 1.0], [1.0, 0.0, NAN, NAN]]
    losses, _, metrics = pro(logps, lengths, scores, 0.05)
    assert metrics.keys() == RANKED | {"chain_loss"}
    assert metrics["loss"] == losses
    assert metrics["rewards/chosen"] == [-1.0, -3.0]
    assert metrics["rewards/rejected"] == [-4.0, -1.0]
    assert metrics["rewards/margins"] == [3.0, -2.0]
    assert metrics["logps/chosen"] == [-2.0, -6.0]
    assert metrics["logps/rejected"] == [-8.0, -4.0]
    # Means of the first list: -1, -3, -1, -4. Its ordered pairs are 12, 13 (equal means: not told
    # apart), 14, 24, 34; that of the second list is in the wrong order.
    right, asked = metrics["rewards/accuracies"]
    none = [0.0] * 4
    first = [[0.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 1.0], none]
    assert asked == [first, [[0.0, 1.0, 0.0, 0.0], none, none, none]]
    first = [[0.0, 1.0, 0.0, 1.0], *first[1:]]
    assert right == [first, [none] * 4]


# -- RRHF


def test_rrhf_by_hand():
    """Means a token of -2, -1, -3 and -1, of which the first answer should have the highest."""
    row = [[-4.0, -3.0, -3.0, -2.0]], [[2, 3, 1, 2]], [[3.0, 2.0, 2.0, 1.0]]
    # Wrong: 2 and 4 above 1, by 1 each, and 4 above 3, by 2. 2 and 3 tie, 2 and 4 are level.
    (loss,), (gradient,), metrics = rrhf(*row, 0.0)
    assert loss == 4.0 and metrics["rank_loss"] == [4.0]
    assert gradient == pytest.approx([-2 / 2, 1 / 3, -1.0, 2 / 2], rel=F64)
    # SFT: a sum over the best answer's tokens.
    (loss,), (gradient,), metrics = rrhf(*row, 0.25)
    assert loss == 5.0 and metrics["rank_loss"] == [4.0]
    assert gradient == pytest.approx([-2 / 2 - 0.25, 1 / 3, -1.0, 2 / 2], rel=F64)
    # By half a nat each pair shall lead: 2 and 4 are no longer far enough apart, 1 and 3 are.
    (loss,), (gradient,), _ = rrhf(*row, 0.0, 0.5)
    assert loss == 4.0 + 3 * 0.5 + 0.5
    assert gradient == pytest.approx([-2 / 2, 1 / 3 - 1 / 3, -1.0, 2 / 2 + 1 / 2], rel=F64)


@pytest.mark.parametrize("ties", (False, True))
@pytest.mark.parametrize("n", range(1, 8))
@pytest.mark.parametrize("knobs", ((0.0,), (1.0,), (0.1, 0.7)))
def test_rrhf_is_the_equation(knobs, n, ties):
    rows = random_lists(20, n, ties)
    losses, gradients, _ = rrhf(*rows, *knobs)
    for row, loss, gradient in zip(zip(*rows, strict=True), losses, gradients, strict=True):
        expected, by_logp = rrhf_equation(*row, *knobs)
        assert loss == close_to(expected)
        assert gradient == close_to(by_logp)


@pytest.mark.parametrize("scores", ([1.2, 0.7, -0.4, -0.5], [1.0, 1.0, 0.5, 0.5]))
def test_gradient_of_rrhf_equation(scores):
    logps, knobs = [-6.0, -4.5, -9.0, -3.0], ([4, 3, 7, 2], scores, 0.05, 0.3)
    _, gradient = rrhf_equation(logps, *knobs)
    found = slopes(lambda *x: rrhf_equation(list(x), *knobs)[0], logps)
    assert found == pytest.approx(gradient, rel=1e-8)


def test_rrhf_asks_for_the_order_alone():
    """In order: 0, however near; a flat policy too. Other scores in the same order: the same."""
    ordered = [[-1.0, -1.0 - 1e-9, -7.0]], [[1, 1, 1]]
    (loss,), (gradient,), _ = rrhf(*ordered, [[3.0, 2.0, 1.0]], 0.0)
    assert (loss, gradient) == (0.0, [0.0, 0.0, 0.0])
    (loss,), (gradient,), _ = rrhf([[-2.0, -4.0, -6.0]], [[1, 2, 3]], [[3.0, 2.0, 1.0]], 0.0)
    assert (loss, gradient) == (0.0, [0.0, 0.0, 0.0])
    logps, lengths, scores = random_lists(6, 5)
    one, by_one, _ = rrhf(logps, lengths, scores, 0.3)
    two, by_two, _ = rrhf(logps, lengths, [[9 * x - 3 for x in row] for row in scores], 0.3)
    assert (one, by_one) == (two, by_two)


@pytest.mark.parametrize("nothing", (0.0, -77.0))  # 0 is what common.py fills with
def test_ragged_lists_of_rrhf(nothing):
    """A shorter list is what it is alone; nothing flows to where it has no answer."""
    sizes = (3, 5, 1, 2)
    alone = [[x[0] for x in random_lists(2, n, seed=n)] for n in sizes]
    logps, lengths, scores = (
        padded(list(column), 5, filling)
        for column, filling in zip(zip(*alone, strict=True), (nothing, 0, NAN), strict=True)
    )
    losses, gradients, metrics = rrhf(logps, lengths, scores, 0.05, 0.2)
    assert metrics.keys() == RANKED | {"rank_loss"} and metrics["loss"] == losses
    for b, (row, n) in enumerate(zip(alone, sizes, strict=True)):
        expected, by_logp, expected_metrics = rrhf(*([x] for x in row), 0.05, 0.2)
        assert losses[b] == pytest.approx(expected[0], rel=F64)
        assert gradients[b][:n] == pytest.approx(by_logp[0], rel=F64)
        assert gradients[b][n:] == [0.0] * (5 - n)
        for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "logps/rejected"):
            assert metrics[name][b] == pytest.approx(expected_metrics[name][0], rel=F64)


# -- listwise DPO: the equation


def test_listwise_by_hand():
    """Answers 4, 2 and 1 times as likely as under the reference: 4 of 7, then 2 of 3."""
    logps = [math.log(4 / 100), math.log(2 / 50), math.log(1 / 10)]
    ref_logps = [math.log(1 / 100), math.log(1 / 50), math.log(1 / 10)]
    (loss,), ((gradient,), (by_ref,)), metrics = listwise(
        [logps], [ref_logps], [[3.0, 2.0, 1.0]], 1.0
    )
    assert loss == pytest.approx(math.log(7 / 4) + math.log(3 / 2), rel=F64)
    # An answer's share of each choice, less 1 where it was the one chosen.
    expected = [4 / 7 - 1, 2 / 7 + (2 / 3 - 1), 1 / 7 + 1 / 3]
    assert gradient == pytest.approx(expected, rel=F64)
    assert by_ref == pytest.approx([-x for x in expected], rel=F64)
    assert metrics["rewards/chosen"] == pytest.approx([math.log(4)], rel=F64)
    # Half the beta takes roots: the ratios 4 and 1 become 2 and 1.
    (loss,), ((gradient,), _), _ = listwise(
        [logps[::2]], [ref_logps[::2]], [[3.0, 1.0]], 0.5
    )  # fmt: skip
    assert loss == pytest.approx(math.log(3 / 2), rel=F64)
    assert gradient == pytest.approx([-1 / 6, 1 / 6], rel=F64)


@pytest.mark.parametrize("ties", (False, True))
@pytest.mark.parametrize("n", range(1, 9))
@pytest.mark.parametrize("beta", (0.01, 0.1, 0.5, 3.0))
def test_listwise_is_the_equation(beta, n, ties):
    logps, _, scores = random_lists(20, n, ties)
    ref_logps, _, _ = random_lists(20, n, seed=1)
    losses, (gradients, by_ref), _ = listwise(logps, ref_logps, scores, beta)
    for row, loss, gradient, reference in zip(
        zip(logps, ref_logps, scores, strict=True), losses, gradients, by_ref, strict=True
    ):
        expected, by_logp = listwise_equation(*row, beta)
        assert loss == close_to(expected)
        assert gradient == close_to(by_logp)
        assert reference == [-g for g in gradient]


@pytest.mark.parametrize("scores", ([1.2, 0.7, -0.4, -0.5], [1.0, 1.0, 0.5, 0.5]))
def test_gradient_of_listwise_equation(scores):
    logps, knobs = [-6.0, -4.5, -9.0, -3.0], ([-5.0, -5.0, -8.0, -4.0], scores, 0.3)
    _, gradient = listwise_equation(logps, *knobs)
    found = slopes(lambda *x: listwise_equation(list(x), *knobs)[0], logps)
    assert found == pytest.approx(gradient, rel=1e-8)


# -- listwise DPO: limits


@pytest.mark.parametrize("beta", (0.01, 0.1, 0.5, 3.0))
def test_listwise_of_two_is_dpo(beta):
    """Value, gradients and what is plotted."""
    logps, _, scores = random_lists(60, 2)
    ref_logps, _, _ = random_lists(60, 2, seed=1)
    losses, gradients, metrics = listwise(logps, ref_logps, scores, beta)
    pairs = [(*row, *ref) for row, ref in zip(logps, ref_logps, strict=True)]
    expected, by_pair, expected_metrics = dpo(pairs, beta)
    assert losses == pytest.approx(expected, rel=F64, abs=1e-15)
    for b, by_input in enumerate(by_pair):
        assert gradients[0][b] + gradients[1][b] == pytest.approx(by_input, rel=F64)
    for name, values in metrics.items():
        if name == "rewards/accuracies":
            right, asked = (torch.tensor(part).sum((1, 2)).tolist() for part in values)
            assert (right, asked) == (expected_metrics[name], [1.0] * 60)
        else:
            assert values == pytest.approx(expected_metrics[name], rel=F64, abs=1e-15)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("n", range(1, 9))
def test_listwise_starts_at_the_log_of_all_orders(n, dtype):
    """Where the policy is its reference, each of n! orders is as likely: 3.18 for four answers."""
    logps = [[-17.3 - i for i in range(n)]]
    scores = [[float(-i) for i in range(n)]]
    (loss,), ((gradient,), _), metrics = listwise(logps, logps, scores, 0.3, dtype=dtype)
    rounding = 8 * torch.finfo(dtype).eps
    assert loss == pytest.approx(math.log(math.factorial(n)), rel=rounding, abs=rounding)
    if n == 4:
        assert round(loss, 2) == 3.18
    # The k-th choice gives 1/m to each of the m answers left, and takes 1 from its own.
    left = [n - k for k in range(n)]
    expected = [0.3 * (sum(1 / m for m in left[: k + 1]) - 1) for k in range(n)]
    assert gradient == pytest.approx(expected, rel=rounding, abs=rounding)
    assert metrics["rewards/margins"] == [0.0]
    assert not torch.tensor(metrics["rewards/accuracies"][0]).any()


def test_start_of_listwise_with_ties():
    """A term is the log of 1 and the answers below: those that tie do not count."""
    row = [[-17.3, -9.0, -8.0, -11.0]]
    (loss,), _, _ = listwise(row, row, [[5.0, 5.0, 5.0, 1.0]], 0.3)
    assert loss == pytest.approx(3 * math.log(2), rel=F64)
    (loss,), _, _ = listwise(row, row, [[5.0, 4.0, 4.0, 1.0]], 0.3)
    assert loss == pytest.approx(math.log(4) + 2 * math.log(2), rel=F64)


def test_listwise_is_a_distribution_over_orders():
    """exp(-loss) of all 4! orders of the same answers adds up to 1: it is the likelihood of a
    ranking, as Plackett-Luce has it.
    """
    u = [0.7, -1.2, 0.1, 2.0]
    orders = list(itertools.permutations(u))
    losses, _, _ = listwise(
        [[2 * x - 20 for x in order] for order in orders],
        [[-20.0] * 4] * 24, [[4.0, 3.0, 2.0, 1.0]] * 24, 0.5,
    )  # fmt: skip
    assert math.fsum(math.exp(-loss) for loss in losses) == pytest.approx(1, rel=F64)
    assert min(losses) == losses[orders.index(tuple(sorted(u, reverse=True)))]


def test_the_first_answer_is_not_in_every_numerator():
    """The thesis's printed equation 20. It is something else from three answers on, and no
    likelihood of a ranking; with two answers there is but one choice.
    """

    def as_printed(u: list[float]) -> float:
        return sum(log_sum_exp(u[k:]) - u[0] for k in range(len(u) - 1))

    for u in ([0.7, -1.2], [0.7, -1.2, 0.1], [0.7, -1.2, 0.1, 2.0]):
        scores = [[float(-i) for i in range(len(u))]]
        (loss,), _, _ = listwise([u], [[0.0] * len(u)], scores, 1.0)
        assert (abs(loss - as_printed(u)) < 1e-12) == (len(u) == 2)
        # They differ by how far the answers chosen later are from the first one.
        apart = sum(u[k] - u[0] for k in range(len(u) - 1))
        assert loss == pytest.approx(as_printed(u) - apart, rel=F64)
    likelihoods = [math.exp(-as_printed(u)) for u in itertools.permutations([0.7, -1.2, 0.1])]
    assert abs(math.fsum(likelihoods) - 1) > 0.1


def test_order_of_the_tail_counts():
    """Not only which answer is the best. (The last one has no term, but is in all others.)"""
    u, zeros, scores = [2.0, 0.5, -0.3, -1.0], [0.0] * 4, [4.0, 3.0, 2.0, 1.0]
    tails = [[u[0], *tail] for tail in itertools.permutations(u[1:])]
    losses, _, _ = listwise(tails, [zeros] * 6, [scores] * 6, 1.0)
    assert len({round(loss, 9) for loss in losses}) == 6
    assert min(losses) == losses[tails.index(u)]


def test_only_the_order_of_scores_counts():
    """Unlike PRO, which takes gaps; and a constant on all rewards is of no account."""
    logps, _, scores = random_lists(6, 5)
    ref_logps, _, _ = random_lists(6, 5, seed=1)
    losses, gradients, _ = listwise(logps, ref_logps, scores, 0.3)
    same, by_same, _ = listwise(logps, ref_logps, [[4.0, 3.0, 2.0, 1.0, 0.0]] * 6, 0.3)
    assert (losses, gradients) == (same, by_same)
    moved, _, _ = listwise([[x - 8 for x in row] for row in logps], ref_logps, scores, 0.3)
    assert moved == pytest.approx(losses, rel=1e-11)
    for row in gradients[0]:
        assert sum(row) == pytest.approx(0, abs=1e-15)


def test_listwise_is_pros_chain_with_dpos_reward():
    """PRO without temperatures, lengths and SFT, on rewards in place of mean log-probs."""
    logps, lengths, scores = random_lists(6, 5, ties=True)
    chain, by_chain, _ = pro(logps, [[1] * 5] * 6, scores, 0.0, False)
    losses, (gradients, _), _ = listwise(logps, [[0.0] * 5] * 6, scores, 1.0)
    assert losses == pytest.approx(chain, rel=F64)
    for one, two in zip(gradients, by_chain, strict=True):
        assert one == pytest.approx(two, rel=F64, abs=1e-15)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_far_rewards_of_listwise_stay_finite(dtype):
    """All numbers here are exact in fp32 too."""
    rows = [[0.0, -2000.0, -4000.0], [-4000.0, -2000.0, 0.0]]
    losses, ((right, wrong), _), _ = listwise(
        rows, [[0.0] * 3] * 2, [[3.0, 2.0, 1.0]] * 2, 0.5, dtype=dtype
    )
    assert losses == [0.0, 2000.0 + 1000.0]
    assert right == [0.0, 0.0, 0.0]
    assert wrong == [-0.5, -0.5, 1.0]


# -- listwise DPO: ragged lists and ties


@pytest.mark.parametrize("nothing", (0.0, -77.0))
def test_ragged_lists_of_listwise(nothing):
    """A shorter list is what it is alone; nothing flows to where it has no answer."""
    sizes = (3, 5, 1, 2)
    alone = []
    for n in sizes:
        logps, _, scores = random_lists(2, n, seed=n)
        alone.append((logps[0], random_lists(2, n, seed=n + 9)[0][0], scores[0]))
    columns = zip(zip(*alone, strict=True), (nothing, 0.0, NAN), strict=True)
    together = [padded(list(column), 5, filling) for column, filling in columns]
    losses, gradients, metrics = listwise(*together, 0.3)
    for b, (row, n) in enumerate(zip(alone, sizes, strict=True)):
        expected, by_input, expected_metrics = listwise(*([x] for x in row), 0.3)
        assert losses[b] == pytest.approx(expected[0], rel=F64)
        for one, two in zip(gradients, by_input, strict=True):
            assert one[b][:n] == pytest.approx(two[0], rel=F64)
            assert one[b][n:] == [0.0] * (5 - n)
        for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "logps/rejected"):
            assert metrics[name][b] == pytest.approx(expected_metrics[name][0], rel=F64)
        for part, expected_part in zip(
            metrics["rewards/accuracies"], expected_metrics["rewards/accuracies"], strict=True
        ):
            assert sum(map(sum, part[b])) == sum(map(sum, expected_part[0]))


def test_ties_of_listwise():
    """Equals are not compared; each is compared with those below it."""
    u, zeros = [1.0, -0.5, 0.25, 2.0], [0.0] * 4
    (loss,), ((gradient,), _), _ = listwise([u], [zeros], [[3.0, 3.0, 1.0, 1.0]], 1.0)
    expected = [log_sum_exp([u[k], u[2], u[3]]) - u[k] for k in (0, 1)]
    assert loss == pytest.approx(sum(expected), rel=F64)
    order = [1, 0, 3, 2]  # which of two equals stands first says nothing
    (same,), ((by_order,), _), _ = listwise(
        [[u[i] for i in order]], [zeros], [[3.0, 3.0, 1.0, 1.0]], 1.0
    )
    assert same == pytest.approx(loss, rel=F64)
    assert by_order == pytest.approx([gradient[i] for i in order], rel=F64)
    losses, gradients, metrics = listwise([u], [zeros], [[3.0] * 4], 1.0)
    assert (losses, gradients) == ([0.0], [[zeros], [zeros]])
    assert sum(map(sum, metrics["rewards/accuracies"][1][0])) == 0.0


# -- listwise DPO: what is plotted


def test_listwise_metrics():
    """Rewards of best and worst; accuracy over ordered pairs, where a tie is not told apart."""
    logps = [[-2.0, -9.0, -3.0, -8.0], [-6.0, -4.0, 0.0, 0.0]]
    ref_logps = [[-4.0, -7.0, -5.0, -4.0], [-4.0, -5.0, 0.0, 0.0]]
    scores = [[3.0, 2.0, 2.0, 1.0], [1.0, 0.0, NAN, NAN]]
    losses, _, metrics = listwise(logps, ref_logps, scores, 0.5)
    assert metrics.keys() == RANKED
    assert metrics["loss"] == losses
    assert metrics["rewards/chosen"] == [1.0, -1.0]
    assert metrics["rewards/rejected"] == [-2.0, 0.5]
    assert metrics["rewards/margins"] == [3.0, -1.5]
    assert metrics["logps/chosen"] == [-2.0, -6.0]
    assert metrics["logps/rejected"] == [-8.0, -4.0]
    # Rewards of the first list: 1, -1, 1, -2.
    right, asked = metrics["rewards/accuracies"]
    none = [0.0] * 4
    first = [[0.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 1.0], none]
    assert asked == [first, [[0.0, 1.0, 0.0, 0.0], none, none, none]]
    first = [[0.0, 1.0, 0.0, 1.0], *first[1:]]
    assert right == [first, [none] * 4]
