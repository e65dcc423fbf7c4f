"""The losses on ranked lists (PRO, RRHF, listwise DPO): value and gradient against the equations,
and what each equation says in its limits.
"""

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

# -- the equations for one list, in plain floats


def log_sum_exp(values: list[float]) -> float:
    most = max(values)
    return most + math.log(math.fsum(math.exp(x - most) for x in values))


def worse_than(k: int, scores: list[float]) -> list[int]:
    return [i for i in range(len(scores)) if scores[i] < scores[k]]


def pro_equation(logps, lengths, scores, sft_weight, temperatures=True):
    s = [logp / length for logp, length in zip(logps, lengths, strict=True)]
    loss = -sft_weight * (len(logps) - 1) ** 2 * logps[0]
    for k in range(len(s)):
        if below := worse_than(k, scores):
            T = {i: scores[k] - scores[i] if temperatures else 1.0 for i in below}
            own = max(T.values()) * s[k]
            loss += log_sum_exp([own, *(T[i] * s[i] for i in below)]) - own
    return loss


def rrhf_equation(logps, lengths, scores, sft_weight, margin=0.0):
    p = [logp / length for logp, length in zip(logps, lengths, strict=True)]
    costs = [max(0.0, margin + p[i] - p[j]) for j in range(len(p)) for i in worse_than(j, scores)]
    return math.fsum(costs) - sft_weight * logps[0]


def listwise_equation(logps, ref_logps, scores, beta):
    u = [beta * (logp - ref) for logp, ref in zip(logps, ref_logps, strict=True)]
    terms = [
        log_sum_exp([u[k], *(u[i] for i in worse_than(k, scores))]) - u[k] for k in range(len(u))
    ]
    return math.fsum(terms)


# -- the losses, called with lists of floats: (losses, gradients by list, metrics)


def pro(logps, lengths, scores, *knobs, dtype=torch.float64, loss=pro_loss):
    given = torch.tensor(lengths), torch.tensor(scores, dtype=torch.float64)
    losses, (gradients,), metrics = called(loss, [logps], *given, *knobs, dtype=dtype)
    return losses, gradients, metrics


def rrhf(*given, dtype=torch.float64):
    return pro(*given, dtype=dtype, loss=rrhf_loss)


def listwise(logps, ref_logps, scores, beta, dtype=torch.float64):
    given = torch.tensor(scores, dtype=torch.float64), beta
    losses, (gradients, by_ref), metrics = called(
        listwise_dpo_loss, [logps, ref_logps], *given, dtype=dtype
    )
    assert by_ref == [[-g for g in row] for row in gradients]
    return losses, gradients, metrics


METHODS = {  # loss, equation, knobs
    "pro": (pro, pro_equation, ((0.0,), (0.05,), (1.0, False))),
    "rrhf": (rrhf, rrhf_equation, ((0.0,), (1.0,), (0.1, 0.7))),
    "listwise": (listwise, listwise_equation, ((0.01,), (0.1,), (3.0,))),
}


def random_lists(count: int, n: int, ties: bool = False, seed: int = 0):
    """(log-probs, lengths, scores) of lists of n, best first: long texts, and near misses."""
    rng = random.Random(seed)
    lengths = [[rng.randint(1, 60) for _ in range(n)] for _ in range(count)]
    logps = [[-rng.uniform(0.05, 3.0) * length for length in row] for row in lengths[::2]]
    logps += [[rng.gauss(-40, 2) for _ in row] for row in lengths[1::2]]
    lengths = lengths[::2] + lengths[1::2]
    # Scores as reward models give them; with ties, those of a coarse scale.
    draw = (lambda: float(rng.randint(0, 2))) if ties else (lambda: rng.gauss(0, 1.5))
    scores = [sorted((draw() for _ in range(n)), reverse=True) for _ in range(count)]
    return logps, lengths, scores


def rows_of(method: str, count: int, n: int, ties: bool = False, seed: int = 0):
    """Log-probs, lengths (or log-probs of the reference), scores."""
    logps, lengths, scores = random_lists(count, n, ties, seed)
    reference = random_lists(count, n, seed=seed + 100)[0]
    return logps, reference if method == "listwise" else lengths, scores


# -- all three


@pytest.mark.parametrize("ties", (False, True))
@pytest.mark.parametrize("method", METHODS)
def test_the_equation(method, ties):
    loss_of, equation, all_knobs = METHODS[method]
    for n, knobs in itertools.product(range(1, 8), all_knobs):
        rows = rows_of(method, 12, n, ties)
        losses, gradients, _ = loss_of(*rows, *knobs)
        for row, loss, gradient in zip(zip(*rows, strict=True), losses, gradients, strict=True):
            # Terms of a chain cancel and leave their rounding; a term below 2^-53 is 0 there.
            assert loss == pytest.approx(equation(*row, *knobs), rel=F64, abs=1e-13)
            logps, *given = row
            found = slopes(lambda *x, g=given, k=knobs: equation(list(x), *g, *k), logps)
            assert gradient == pytest.approx(found, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("nothing", (0.0, -77.0))  # 0 is what common.py fills with
@pytest.mark.parametrize("method", METHODS)
def test_ragged_lists(method, nothing):
    """A shorter list is what it is alone, and gradients past its end are 0."""
    loss_of, _, (*_, knobs) = METHODS[method]
    sizes, filling = (3, 5, 1, 2), (nothing, 0, NAN)
    alone = [[x[0] for x in rows_of(method, 2, n, seed=n)] for n in sizes]
    together = [
        [[*row[column], *[filling[column]] * (5 - len(row[column]))] for row in alone]
        for column in range(3)
    ]
    losses, gradients, metrics = loss_of(*together, *knobs)
    for b, (row, n) in enumerate(zip(alone, sizes, strict=True)):
        (expected,), (by_logp,), expected_metrics = loss_of(*([x] for x in row), *knobs)
        assert losses[b] == pytest.approx(expected, rel=F64)
        assert gradients[b][:n] == pytest.approx(by_logp, rel=F64)
        assert gradients[b][n:] == [0.0] * (5 - n)
        for name, values in expected_metrics.items():
            if name == "rewards/accuracies":
                for part, expected_part in zip(metrics[name], values, strict=True):
                    assert sum(map(sum, part[b])) == sum(map(sum, expected_part[0]))
            else:
                assert metrics[name][b] == pytest.approx(values[0], rel=F64)


@pytest.mark.parametrize("method", METHODS)
def test_ties(method):
    """The order of equals does not matter, and a list of equals has nothing to learn from."""
    loss_of, _, _ = METHODS[method]
    knobs = (0.3,) if method == "listwise" else (0.0,)
    logps, lengths, scores = [-2.0, -6.0, -9.0, -1.0], [2, 3, 6, 1], [3.0, 3.0, 1.0, 1.0]
    order = [1, 0, 3, 2]
    (loss,), (gradient,), _ = loss_of([logps], [lengths], [scores], *knobs)
    swapped = [[[column[i] for i in order]] for column in (logps, lengths, scores)]
    (same,), (by_order,), _ = loss_of(*swapped, *knobs)
    assert same == pytest.approx(loss, rel=F64)
    assert by_order == pytest.approx([gradient[i] for i in order], rel=F64)
    losses, gradients, metrics = loss_of([logps], [lengths], [[0.3] * 4], *knobs)
    assert (losses, gradients) == ([0.0], [[0.0] * 4])
    assert sum(map(sum, metrics["rewards/accuracies"][1][0])) == 0.0


@pytest.mark.parametrize("method", METHODS)
def test_metrics(method):
    """Rewards of best and worst; accuracy over ordered pairs, where equal rewards count half."""
    logps = [[-2.0, -9.0, -3.0, -8.0], [-6.0, -4.0, 0.0, 0.0]]
    lengths = [[2, 3, 3, 2], [2, 4, 0, 0]]  # means -1, -3, -1, -4 and -3, -1
    ref_logps = [[-4.0, -3.0, -5.0, 0.0], [0.0, -6.0, 0.0, 0.0]]  # half: 1, -3, 1, -4 and -3, 1
    scores = [[3.0, 2.0, 2.0, 1.0], [1.0, 0.0, NAN, NAN]]
    loss_of, _, _ = METHODS[method]
    second = ref_logps if method == "listwise" else lengths
    losses, _, metrics = loss_of(logps, second, scores, 0.5)
    best = [1.0, -3.0] if method == "listwise" else [-1.0, -3.0]
    worst = [-4.0, 1.0] if method == "listwise" else [-4.0, -1.0]
    own_term = {"pro": {"chain_loss"}, "rrhf": {"rank_loss"}, "listwise": set()}[method]
    none = [0.0] * 4
    compared = [[0.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 1.0], none]
    right = [[0.0, 1.0, 0.5, 1.0], *compared[1:]]  # the third is as good as the first
    expected = {
        "loss": losses,
        "rewards/chosen": best,
        "rewards/rejected": worst,
        "rewards/margins": [a - b for a, b in zip(best, worst, strict=True)],
        "rewards/accuracies": (
            [right, [none] * 4],
            [compared, [[0.0, 1.0, 0.0, 0.0], *[none] * 3]],
        ),
        "logps/chosen": [-2.0, -6.0],
        "logps/rejected": [-8.0, -4.0],
    }
    assert metrics == expected | {name: metrics[name] for name in own_term}


# -- PRO


def test_pro_by_hand():
    """Three answers, whose mean probabilities per token are 1/2, 1/4 and 1/8."""
    lengths, scores = [1, 2, 3], [2.0, 1.0, 0.0]
    logps = [math.log(1 / 2), math.log(1 / 4**2), math.log(1 / 8**3)]
    # k = 1: T_12 = 1 and T_13 = T_1 = 2, so (1/2)^2, 1/4, (1/8)^2: 16, 16 and 1 of 33.
    # k = 2: T_23 = T_2 = 1, so 1/4 and 1/8: 2 and 1 of 3.
    (loss,), (gradient,), metrics = pro([logps], [lengths], [scores], 0.0)
    assert loss == pytest.approx(math.log(33 / 16) + math.log(3 / 2), rel=F64)
    by_s = [2 * (16 / 33 - 1), 16 / 33 + (2 / 3 - 1), 2 * 1 / 33 + 1 / 3]
    assert gradient == pytest.approx([by_s[0], by_s[1] / 2, by_s[2] / 3], rel=F64)
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


def test_pro_of_two_is_a_logistic_loss():
    """- log sigmoid of the difference, times the difference of the scores."""
    for gap, (one, two) in itertools.product((1.0, 0.25, 3.0), ((-0.5, -2.0), (-2.0, -0.5))):
        row = [[4 * one, 6 * two]], [[4, 6]], [[gap - 1.0, -1.0]], 0.0
        assert pro(*row)[0] == pytest.approx([-log_sigmoid(gap * (one - two))], rel=F64)
        assert pro(*row, False)[0] == pytest.approx([-log_sigmoid(one - two)], rel=F64)


def as_written(s: list[float], scores: list[float], within: float = 1e-10) -> float:
    """L_1 as in the authors' code: plain exponentials, and a small constant in the log."""
    T = [scores[0] - score for score in scores]
    T[0] = max(T[1:])
    total = sum(math.exp(t * x) for t, x in zip(T, s, strict=True))
    return math.log(within + total) - T[0] * s[0]


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_pro_against_plain_exponentials(dtype):
    """Equal where these can be computed. At T s = -60 the authors' constant dominates: their loss
    pulls the better answer up with all of T and leaves the worse one alone.
    """
    scores, s, lengths = [1.5, 0.5, 0.5, 0.5], [-0.5, -1.0, -1.5, -2.0], [4, 2, 8, 6]
    logps = [x * length for x, length in zip(s, lengths, strict=True)]
    (loss,), _, _ = pro([logps], [lengths], [scores], 0.0, dtype=dtype)
    rounding = 16 * torch.finfo(dtype).eps
    assert loss == pytest.approx(as_written(s, scores, within=0.0), rel=rounding)
    assert loss == pytest.approx(as_written(s, scores), rel=1e-6)
    for worse in (-31.0, -25.0):
        expected = 60 + math.log(1e-10)
        assert as_written([-30.0, worse], [2.0, 0.0]) == pytest.approx(expected, rel=F64)
    (loss,), (gradient,), _ = pro([[-30.0, -31.0]], [[1, 1]], [[2.0, 0.0]], 0.0, dtype=dtype)
    share = 1 / (1 + math.exp(2))  # of the worse answer
    assert loss == pytest.approx(math.log1p(math.exp(-2)), rel=rounding)
    assert gradient == pytest.approx([-2 * share, 2 * share], rel=rounding)
    # Where no exponential can be computed. k = 1 has -64000 against -16000 and -64.
    rows = [[-1.0, -500.0, -1000.0], [-1000.0, -500.0, -1.0]]
    losses, (right, wrong), _ = pro(rows, [[1] * 3] * 2, [[64.0, 32.0, 0.0]] * 2, 0.0, dtype=dtype)
    assert losses == [0.0, (64000 - 64) + (16000 - 32)]
    assert (right, wrong) == ([0.0] * 3, [-64.0, -32.0, 64.0 + 32.0])


@pytest.mark.parametrize("s, harder", ((-0.25, 2), (-2.0, 1)))
def test_which_worse_answer_pro_pushes_harder(s, harder):
    """Three equal answers with scores 2, 1, 0; the push of the best one's own choice. A temperature
    multiplies the push, but also a negative mean log-prob, which lowers the share in the softmax:
    the much worse answer is pushed harder only while tokens are likely.
    """
    _, (gradient,), _ = pro([[s] * 3], [[1] * 3], [[2.0, 1.0, 0.0]], 0.0)
    _, (second,), _ = pro([[s] * 2], [[1] * 2], [[1.0, 0.0]], 0.0)  # the chain's other choice
    push = [gradient[0], gradient[1] - second[0], gradient[2] - second[1]]
    shares = [math.exp(t * s - log_sum_exp([2 * s, s, 2 * s])) for t in (2, 1, 2)]
    expected = [2 * (shares[0] - 1), shares[1], 2 * shares[2]]
    assert push == pytest.approx(expected, rel=F64)
    assert max((1, 2), key=lambda i: push[i]) == harder


def test_score_scale_is_a_factor_on_the_means():
    """Scores twice as far apart do what twice the log-probs would."""
    logps, lengths, scores = random_lists(6, 4)
    one, by_one, _ = pro(logps, lengths, [[2 * x for x in row] for row in scores], 0.0)
    two, by_two, _ = pro([[2 * x for x in row] for row in logps], lengths, scores, 0.0)
    assert one == two
    assert by_one == [[2 * g for g in row] for row in by_two]


# -- RRHF


def test_rrhf_by_hand():
    """Means per token of -2, -1, -3 and -1; the first answer should have the highest."""
    row = [[-4.0, -3.0, -3.0, -2.0]], [[2, 3, 1, 2]], [[3.0, 2.0, 2.0, 1.0]]
    # Wrong: 2 and 4 above 1, by 1 each, and 4 above 3, by 2. 2 and 3 tie, 2 and 4 are equal.
    (loss,), (gradient,), metrics = rrhf(*row, 0.0)
    assert loss == 4.0 and metrics["rank_loss"] == [4.0]
    assert gradient == pytest.approx([-2 / 2, 1 / 3, -1.0, 2 / 2], rel=F64)
    # SFT: a sum over the best answer's tokens.
    (loss,), (gradient,), metrics = rrhf(*row, 0.25)
    assert loss == 5.0 and metrics["rank_loss"] == [4.0]
    assert gradient == pytest.approx([-2 / 2 - 0.25, 1 / 3, -1.0, 2 / 2], rel=F64)
    # With a margin of half a nat, 2 and 4 are no longer far enough apart, 1 and 3 are.
    (loss,), (gradient,), _ = rrhf(*row, 0.0, 0.5)
    assert loss == 4.0 + 3 * 0.5 + 0.5
    assert gradient == pytest.approx([-2 / 2, 1 / 3 - 1 / 3, -1.0, 2 / 2 + 1 / 2], rel=F64)


def test_a_right_order_costs_nothing():
    """However near the answers are, and for a flat policy too."""
    for logps, lengths in (([-1.0, -1.0 - 1e-9, -7.0], [1, 1, 1]), ([-2.0, -4.0, -6.0], [1, 2, 3])):
        losses, gradients, _ = rrhf([logps], [lengths], [[3.0, 2.0, 1.0]], 0.0)
        assert (losses, gradients) == ([0.0], [[0.0] * 3])


@pytest.mark.parametrize("method", ("rrhf", "listwise", "pro without temperatures"))
def test_only_the_order_of_scores_matters(method):
    """Except to PRO, which uses the differences."""
    rows, knobs = rows_of(method, 6, 5), (0.3, False) if "pro" in method else (0.3,)
    loss_of, _, _ = METHODS[method.split()[0]]
    losses, gradients, _ = loss_of(*rows, *knobs)
    scaled = [[9 * x - 3 for x in row] for row in rows[2]]
    same, by_same, _ = loss_of(*rows[:2], scaled, *knobs)
    assert (losses, gradients) == (same, by_same)


# -- listwise DPO


def test_listwise_by_hand():
    """Answers 4, 2 and 1 times as likely as under the reference: 4 of 7, then 2 of 3."""
    logps = [math.log(4 / 100), math.log(2 / 50), math.log(1 / 10)]
    ref_logps = [math.log(1 / 100), math.log(1 / 50), math.log(1 / 10)]
    (loss,), (gradient,), metrics = listwise([logps], [ref_logps], [[3.0, 2.0, 1.0]], 1.0)
    assert loss == pytest.approx(math.log(7 / 4) + math.log(3 / 2), rel=F64)
    # An answer's share in each choice, less 1 where it is the one chosen.
    expected = [4 / 7 - 1, 2 / 7 + (2 / 3 - 1), 1 / 7 + 1 / 3]
    assert gradient == pytest.approx(expected, rel=F64)
    assert metrics["rewards/chosen"] == pytest.approx([math.log(4)], rel=F64)


@pytest.mark.parametrize("beta", (0.01, 0.5, 3.0))
def test_listwise_of_two_is_dpo(beta):
    """Value, gradients and metrics."""
    logps, ref_logps, scores = rows_of("listwise", 60, 2)
    losses, gradients, metrics = listwise(logps, ref_logps, scores, beta)
    pairs = [(*row, *ref) for row, ref in zip(logps, ref_logps, strict=True)]
    expected, by_pair, expected_metrics = dpo(pairs, beta)
    assert losses == pytest.approx(expected, rel=F64, abs=1e-15)
    for gradient, by_input in zip(gradients, by_pair, strict=True):
        assert gradient == pytest.approx(by_input[:2], rel=F64)
    right, compared = (torch.tensor(x).sum((1, 2)).tolist() for x in metrics["rewards/accuracies"])
    assert (right, compared) == (expected_metrics["rewards/accuracies"], [1.0] * 60)
    for name in metrics.keys() - {"rewards/accuracies"}:
        assert metrics[name] == pytest.approx(expected_metrics[name], rel=F64, abs=1e-15)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_listwise_starts_at_the_log_of_all_orders(dtype):
    """If the policy is its reference, each of n! orders is equally likely: 3.18 for four."""
    rounding = 8 * torch.finfo(dtype).eps
    for n in range(1, 9):
        logps, scores = [[-17.3 - i for i in range(n)]], [[float(-i) for i in range(n)]]
        (loss,), (gradient,), _ = listwise(logps, logps, scores, 0.3, dtype=dtype)
        assert loss == pytest.approx(math.log(math.factorial(n)), rel=rounding, abs=rounding)
        # The k-th choice gives 1/m to each of the m answers left, and takes 1 from its own.
        expected = [0.3 * (sum(1 / (n - j) for j in range(k + 1)) - 1) for k in range(n)]
        assert gradient == pytest.approx(expected, rel=rounding, abs=rounding)
    # With ties, a term is the log of 1 and the answers below: here three times log 2.
    (loss,), _, _ = listwise([[-9.0] * 4], [[-9.0] * 4], [[5.0, 5.0, 5.0, 1.0]], 0.3, dtype=dtype)
    assert loss == pytest.approx(3 * math.log(2), rel=rounding)
    # Far rewards stay finite and, with these numbers, exact.
    rows = [[0.0, -2000.0, -4000.0], [-4000.0, -2000.0, 0.0]]
    losses, gradients, _ = listwise(rows, [[0.0] * 3] * 2, [[3.0, 2.0, 1.0]] * 2, 0.5, dtype=dtype)
    assert losses == [0.0, 2000.0 + 1000.0]
    assert gradients == [[0.0] * 3, [-0.5, -0.5, 1.0]]


def test_listwise_is_a_distribution_over_orders():
    """The likelihoods exp(-loss) of all 4! orders sum to 1. With u_1 in every numerator, as the
    thesis prints it, they would not.
    """

    def as_printed(u: tuple[float, ...]) -> float:
        return sum(log_sum_exp(list(u[k:])) - u[0] for k in range(len(u) - 1))

    orders = list(itertools.permutations([0.7, -1.2, 0.1, 2.0]))
    logps = [[2 * x - 20 for x in order] for order in orders]
    losses, _, _ = listwise(logps, [[-20.0] * 4] * 24, [[4.0, 3.0, 2.0, 1.0]] * 24, 0.5)
    assert math.fsum(math.exp(-loss) for loss in losses) == pytest.approx(1, rel=F64)
    assert min(losses) == losses[orders.index((2.0, 0.7, 0.1, -1.2))]
    assert len({round(loss, 9) for loss in losses}) == 24  # the order of the tail counts too
    assert abs(math.fsum(math.exp(-as_printed(u)) for u in orders) - 1) > 0.1


def test_listwise_is_pros_chain_with_dpos_reward():
    """PRO without temperatures, lengths and SFT, on rewards instead of mean log-probs."""
    logps, _, scores = random_lists(6, 5, ties=True)
    chain, by_chain, _ = pro(logps, [[1] * 5] * 6, scores, 0.0, False)
    losses, gradients, _ = listwise(logps, [[0.0] * 5] * 6, scores, 1.0)
    assert losses == pytest.approx(chain, rel=F64)
    for one, two in zip(gradients, by_chain, strict=True):
        assert one == pytest.approx(two, rel=F64, abs=1e-15)
