"""Every loss against the code of its authors (REFERENCES), value and gradient, in float64.

A `their_...` function computes what that code computes, written anew from the formula: from
log-probs to a loss, as ours. The papers' equations are in test_losses*.py; TRL's own code is called
in test_trl*.py. `pytest -s tests/test_authors.py` prints the table of docs/parity.md.
"""

import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from online import column, mask_of, random_rows, table
from torch import Tensor

import grpo
import ppo
import rloo
from cpo import cpo_loss
from dpo import dpo_loss
from ipo import ipo_loss
from kto import kto_loss
from listwise_dpo import listwise_dpo_loss
from orpo import orpo_loss
from pro import pro_loss
from reward_model import reward_model_loss
from rrhf import rrhf_loss
from rso import rejection_sample
from sampling.rollouts import Rollout
from simpo import simpo_loss
from slic import slic_loss

MITCHELL = "eric-mitchell/direct-preference-optimization, trainers.py, `preference_loss`"
THESIS = "martimfasantos/CustomPOs-for-SLMs, algorithms/custom_po_trainer.py, loss type"
NPLUS = "vwxyzjn/summarize_from_feedback_details, summarize_from_feedback_details"
TRL = "huggingface/trl 1.16, trl/trainer"
REFERENCES = {  # repository, file, function
    "DPO": MITCHELL,
    "cDPO": f"{MITCHELL} with `label_smoothing`",
    "DPO-gamma": f"{THESIS} dpo-gamma",
    "IPO, sums": f"{MITCHELL} with `ipo`",
    "IPO, means": f"{TRL}/dpo_trainer.py, `_compute_loss`, loss type ipo",
    "CPO": "fe1ixxu/CPO_SIMPO, scripts/cpo_trainer.py, `cpo_loss`, `get_batch_loss_metrics`",
    "ORPO": "xfactlab/orpo, src/orpo_trainer.py, `compute_logps`, `compute_loss`",
    "SimPO": "princeton-nlp/SimPO, scripts/simpo_trainer.py, `get_batch_loss_metrics`",
    "SLiC": "ContextualAI/HALOs, trainers.py (a version on sums), `SLiCTrainer.loss`",
    "SLiC-DPO": f"{THESIS} hinge",
    "KTO": "ContextualAI/HALOs, train/trainers.py, `KTOTrainer.loss`",
    "PRO": "AlibabaResearch/DAMO-ConvAI, PRO/train/utils/process_manager.py, `compute_loss`",
    "RRHF, as in its paper": "GanjinZero/RRHF, train.py, `RRHFTrainer`, if its mask were right",
    "RRHF, as in its code": "GanjinZero/RRHF, train.py, `RRHFTrainer`",
    "listwise DPO": "allegro/allRank, allrank/models/losses/listMLE.py, `listMLE`",
    "reward model": f"{NPLUS}/reward.py; margin and centering: {TRL}/reward_trainer.py",
    "PPO, advantages": f"{NPLUS}/ppo.py",
    "PPO, whitening": f"{NPLUS}/ppo.py, `masked_whiten`",
    "PPO, losses": f"{NPLUS}/ppo.py",
    "RLOO": f"{TRL}/rloo_trainer.py, `_generate_and_score_completions`, `_compute_loss`",
    "GRPO, grpo": f"{TRL}/grpo_trainer.py, `_compute_loss` without `use_bias_correction_kl`",
    "GRPO, dapo": "volcengine/verl, verl/trainer/ppo/core_algos.py, `agg_loss` with token-mean",
    "GRPO, dr-grpo": "sail-sg/understand-r1-zero, train_zero_math.py; oat's algorithms/ppo.py",
    "RSO, sampler": "arXiv 2309.06657, Algorithm 1; there is no repository",
}
CLOSE = 1e-12  # relative above 1, absolute below: a handful of float64 operations
FOUND: dict[str, list[float]] = {}  # the largest difference in value and, if there is one, gradient


def agree(method: str, ours, theirs, *inputs: Tensor, gradient: bool = True) -> None:
    """Two functions of the same inputs have the same values, and gradients of their sum."""
    results = []
    for function in (ours, theirs):
        given = [x.detach().clone().requires_grad_(gradient) for x in inputs]
        results.append([values := function(*given)])
        if gradient:
            results[-1] += torch.autograd.grad(values.sum(), given, materialize_grads=True)
    largest = FOUND.setdefault(method, [0.0] * (1 + gradient))
    for part, (a, b) in enumerate(zip(*results, strict=True)):
        assert a.shape == b.shape and a.dtype == b.dtype == torch.float64 and b.isfinite().all()
        difference = ((a - b).abs() / b.abs().clamp(min=1)).max().item()
        largest[min(part, 1)] = max(largest[min(part, 1)], difference)
        assert difference <= CLOSE


@pytest.fixture(scope="module", autouse=True)
def print_the_table():
    yield
    for method in [name for name in REFERENCES if name in FOUND]:
        value, slope = (*(f"{x:.0e}" if x else "0" for x in FOUND[method]), "-")[:2]
        print(f"\n| {method} | {REFERENCES[method]} | {value} | {slope} | agrees |", end="")


def uniform(seed: int, *shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


EDGES = column([  # chosen, rejected, the same under the reference, lengths
    (-20, -20, -20, -20, 7, 7),  # equal answers, before the first step
    (-20, -20, -35, -35, 7, 7),  # and later
    (-5, -2000, -1000, -20, 9, 300),  # very large margins
    (-2000, -5, -20, -1000, 300, 9),
    (-0.7, -3.1, -0.9, -2.5, 1, 1),  # one token
    (-1e-3, -4, -1e-2, -3, 1, 2),  # nearly certain
]).T  # fmt: skip
LENGTHS = torch.cat([1 + 59 * uniform(0, 2, 40), EDGES[4:]], 1).long()  # (2, B)
LOGPS = torch.cat([-3 * uniform(1, 4, 40) * LENGTHS[:, :40].repeat(2, 1), EDGES[:4]], 1)  # (4, B)
CHOSEN = LENGTHS[0].sum()  # tokens; the batch is a whole step
MEAN = CHOSEN.item() / LENGTHS.shape[1]


def their_sigmoid(logits: Tensor, beta: float, e: float = 0.0) -> Tensor:
    return -(1 - e) * F.logsigmoid(beta * logits) - e * F.logsigmoid(-beta * logits)


def gaps(w, r, ref_w=0.0, ref_r=0.0) -> Tensor:
    return (w - r) - (ref_w - ref_r)


def mean_gaps(w, r, ref_w=0.0, ref_r=0.0) -> Tensor:
    return (w - ref_w) / LENGTHS[0] - (r - ref_r) / LENGTHS[1]


PAIRS = {  # inputs, ours, theirs
    "DPO": (4, lambda *x: dpo_loss(*x, 0.1)[0], lambda *x: their_sigmoid(gaps(*x), 0.1)),
    "cDPO": (4, lambda *x: dpo_loss(*x, 0.5, 0.2)[0], lambda *x: their_sigmoid(gaps(*x), 0.5, 0.2)),
    "DPO-gamma": (4, lambda *x: dpo_loss(*x, 0.1, gamma=0.5)[0],
                  lambda *x: their_sigmoid(gaps(*x) - 0.5 / 0.1, 0.1)),
    "IPO, sums": (4, lambda *x: ipo_loss(*x, *LENGTHS, 0.1, per_token=False)[0],
                  lambda *x: (gaps(*x) - 1 / (2 * 0.1)) ** 2),
    "IPO, means": (4, lambda *x: ipo_loss(*x, *LENGTHS, 0.3)[0],
                   lambda *x: (mean_gaps(*x) - 1 / (2 * 0.3)) ** 2),
    "CPO": (2, lambda *x: cpo_loss(*x, MEAN, 0.1, 0.7)[0].mean(),
            lambda *x: their_sigmoid(gaps(*x), 0.1).mean() - 0.7 * x[0].sum() / CHOSEN),
    "SimPO": (2, lambda *x: simpo_loss(*x, *LENGTHS, 2.0, 0.8, 0.3, MEAN)[0].mean(),
              lambda *x: their_sigmoid(mean_gaps(*x) - 0.8, 2).mean() - 0.3 * x[0].sum() / CHOSEN),
    "SLiC": (2, lambda w, r: slic_loss(w, r, w, 0.0, 0.0, 1.0, 1.5, 0.1)[0],
             lambda w, r: torch.clamp(1.5 - w + r, min=0) - 0.1 * w),
    "SLiC-DPO": (4, lambda w, r, *ref: slic_loss(w, r, w, *ref, 0.1, 1.0, 0.0)[0],
                 lambda *x: torch.relu(1 - 0.1 * gaps(*x))),
}  # fmt: skip


@pytest.mark.parametrize("method", PAIRS)
def test_pairs(method):
    agree(method, *PAIRS[method][1:], *LOGPS[: PAIRS[method][0]])


def test_gamma_with_label_smoothing_departs():
    """With the answers exchanged, we ask for the margin too. In THESIS it helps them."""
    pair, gamma, e = column([[-10.0], [-20.0], [-12.0], [-16.0]]), 0.5, 0.2  # a margin of 0.6
    found = dpo_loss(*pair, 0.1, e, gamma)[0], their_sigmoid(gaps(*pair) - gamma / 0.1, 0.1, e)
    right, *wrong = (math.log1p(math.exp(x)) for x in (gamma - 0.6, gamma + 0.6, 0.6 - gamma))
    assert [x.item() for x in found] == pytest.approx([(1 - e) * right + e * x for x in wrong])


def their_orpo(logps: Tensor, spans: list, weight: float, pad_is_eos: bool) -> Tensor:
    """`logps`: (2, B, W) of each token given those before; `spans`: prompt and end of each row.

    The odds also cover the first place after the end. The NLL is a mean over the batch's tokens,
    prompts included, except those that are the padding token.
    """
    nll = -torch.cat([x[1 : z - pad_is_eos] for x, (_, z) in zip(logps[0], spans, strict=True)])
    odds = []
    for side in logps:
        mean = torch.stack([x[a : z + 1].mean() for x, (a, z) in zip(side, spans, strict=True)])
        odds.append(mean - torch.log1p(-torch.exp(mean)))
    return nll.mean() - weight * torch.log(torch.sigmoid(odds[0] - odds[1])).mean()


def test_orpo():
    def ours(logps, spans, extra=0):
        inside = [[x[a : z + extra] for x, (a, z) in zip(y, spans, strict=True)] for y in logps]
        sums = [torch.stack([x.sum() for x in side]) for side in inside]
        losses, metrics = orpo_loss(*sums, *[torch.tensor([*map(len, inside[0])])] * 2, 0.5)
        return losses.mean(), metrics["odds_ratio_loss"].mean() / 2

    logps = -3 * uniform(2, 2, 5, 12)
    # The same loss if no row has padding, prompts are one token, and EOS is not the padding token.
    spans = [(1, 12)] * 5
    agree("ORPO", lambda x: ours(x, spans)[0],
          lambda x: their_orpo(x, spans, 0.5, pad_is_eos=False), logps)  # fmt: skip
    # Else it departs twice. Their odds are those of answers that are one place longer ...
    spans = [(3, 5), (1, 2), (6, 12), (2, 9), (4, 8)]
    agree("ORPO", lambda x: ours(x, spans, extra=1)[1],
          lambda x: their_orpo(x, spans, 0.5, True) - their_orpo(x, spans, 0.0, True),
          logps)  # fmt: skip
    assert not torch.isclose(ours(logps, spans)[1], ours(logps, spans, extra=1)[1], rtol=0.01)
    # ... and their NLL has the prompt (0 and 3 nats here) but, if it is used as padding, no EOS.
    logps, spans = -column([[[0.0, 3.0, 1.0, 1.0]]] * 2), [(2, 4)]
    nll = ours(logps, spans)[0] - ours(logps, spans)[1]
    found = [their_orpo(logps, spans, 0.0, pad_is_eos).item() for pad_is_eos in (False, True)]
    assert [nll.item(), *found] == pytest.approx([1.0, 5 / 3, 2.0])


def their_kto(logps, ref_logps, desirable, others, beta: float, weights=(1.0, 1.0)) -> Tensor:
    """Desirable rows first. `others` are log-ratios of mismatched answers; zeros do not count."""
    z0 = (others.sum() / (others != 0).sum().clamp(min=1)).clamp(min=0)
    h = logps - ref_logps
    good = weights[0] * (1 - torch.sigmoid(beta * (h[desirable] - z0)))
    return torch.cat([good, weights[1] * (1 - torch.sigmoid(beta * (z0 - h[~desirable])))])


@pytest.mark.parametrize("good", (20, 46, 0))  # of 46: mixed, all, none
@pytest.mark.parametrize("beta, drift", ((0.1, -3.0), (0.1, 3.0), (5.0, 3.0)))  # below 0: clamped
def test_kto(beta, drift, good):
    others = torch.linspace(-1, 1, 46, dtype=torch.float64) ** 3 + drift
    desirable, weights = torch.arange(46) < good, (1.3, 0.7)
    agree("KTO", lambda *x: kto_loss(*x, desirable, others.mean(), beta, *weights)[0],
          lambda *x: their_kto(*x, desirable, others, beta, weights), *LOGPS[::2])  # fmt: skip


def test_kto_departs():
    """Our z0 is a mean over the step. Theirs is one over a micro-batch, without zeros."""
    h, good, others = column([0.0]), torch.tensor([True]), column([-3.0, 0.0, 0.0, 5.0])
    ours = kto_loss(h, h, good, others.mean(), 1.0)[0].item()
    theirs = [their_kto(h, h, good, x, 1.0).item() for x in (others, others[:2], others[2:])]
    assert [ours, *theirs] == pytest.approx([1 / (1 + math.exp(-z0)) for z0 in (0.5, 1, 0, 5)])


def lists(ties: bool) -> tuple[Tensor, ...]:
    """(B, K) log-probs, the reference's, lengths, scores: lists of 2 to 5, best first."""
    lengths = (1 + 39 * uniform(3, 20, 5)).long()
    lengths[:4] = 1  # one token each
    logps, ref = -3 * uniform(4, 2, 20, 5) * lengths
    scores = (4 * uniform(5, 20, 5)).sort(descending=True).values
    missing = torch.arange(5) >= torch.tensor([2, 3, 4, 5] * 5)[:, None]
    return logps, ref, lengths, (scores.round() if ties else scores).masked_fill(missing, math.nan)


def one_by_one(theirs, *columns: Tensor, knobs: tuple = ()) -> Tensor:
    """`theirs` of each list, cut where scores, the last column, end."""
    rows = [[x[~row[-1].isnan()] for x in row] for row in zip(*columns, strict=True)]
    return torch.stack([theirs(*row, *knobs) for row in rows])


def their_pro(logps, lengths, scores, weight: float, eps: float = 0.0) -> Tensor:
    s, loss = logps / lengths, -weight * (len(logps) - 1) ** 2 * logps[0]
    for k in range(len(s) - 1):
        T = scores[k] - scores[k + 1 :]
        total = torch.exp(T.max() * s[k]) + torch.exp(T * s[k + 1 :]).sum()
        loss = loss + torch.log(eps + total) - T.max() * s[k]
    return loss


def their_rrhf(logps, divisors, scores, sft_divisor: float = 1.0) -> Tensor:
    p = logps / divisors
    ahead = p[:, None] - p[None]
    wrong = (scores[:, None] < scores[None]) & (ahead > 0)
    return ahead[wrong].sum() - logps[scores.argmax()] / sft_divisor


def their_list_mle(ref, logps, scores, beta: float, eps: float = 0.0) -> Tensor:
    """The sum over a list; they divide it by the longest list's length."""
    u = beta * (logps - ref)
    u = u - u.max()
    return (torch.log(u.exp().flip(0).cumsum(0).flip(0) + eps) - u).sum()


def test_lists():
    logps, ref, n, scores = lists(ties=False)
    agree("PRO", lambda x: pro_loss(x, n, scores, 0.05)[0],
          lambda x: one_by_one(their_pro, x, n, scores, knobs=(0.05,)), logps)  # fmt: skip
    agree("listwise DPO", lambda x: listwise_dpo_loss(x, ref, scores, 0.1)[0],
          lambda x: one_by_one(their_list_mle, ref, x, scores, knobs=(0.1,)), logps)  # fmt: skip
    for logps, _, n, scores in (lists(ties=False), lists(ties=True)):
        agree("RRHF, as in its paper", lambda x, n=n, r=scores: rrhf_loss(x, n, r, 1.0)[0],
              lambda x, n=n, r=scores: one_by_one(their_rrhf, x, n, r), logps)  # fmt: skip
    # The code divides all sums by the padded width W. This is our loss of lengths 1, over W.
    ones, W = torch.ones_like(n), 77.0
    agree("RRHF, as in its code", lambda x: rrhf_loss(x, ones, scores, 1.0)[0] / W,
          lambda x: one_by_one(their_rrhf, x, W * ones, scores, knobs=(W,)), logps)  # fmt: skip
    either = [rrhf_loss(logps, x, scores, 0.0)[0].sum().item() for x in (n, ones)]
    assert either[1] > 2 * either[0] > 0


def test_lists_depart():
    """Ties: PRO's sum gets a constant 1, listMLE takes one of two orders, ours has no term. The
    1e-10 in their logs counts where exponentials are smaller.
    """
    x, n, ones = column([-2.0, -6.0]), column([2.0, 3.0]), column([1.0, 1.0])
    equal = x[None], n[None], ones[None]
    assert (pro_loss(*equal, 0.0)[0].item(), listwise_dpo_loss(*equal, 0.5)[0].item()) == (0.0, 0.0)
    assert their_pro(x, n, ones, 0.0).item() == pytest.approx(math.log(2), rel=CLOSE)
    orders = [their_list_mle(b, a, ones, 0.5).item() for a, b in ((x, n), (x.flip(0), n.flip(0)))]
    assert orders == pytest.approx([math.log1p(math.exp(y)) for y in (-2.5, 2.5)], rel=CLOSE)
    best_first, u, s = column([1.0, 0.0]), column([-3.0, -400.0]), column([-60.0, -62.0])
    ours = pro_loss(s[None], ones[None], best_first[None], 0.0)[0].item()
    theirs = their_pro(s, ones, best_first, 0.0, 1e-10).item()
    expected = [math.log1p(math.exp(-2)), 60 + math.log(1e-10)]
    assert [ours, theirs] == pytest.approx(expected, rel=CLOSE)
    ours = listwise_dpo_loss(u[None], 0 * ones[None], best_first[None], 1.0)[0].item()
    theirs = their_list_mle(0 * ones, u, best_first, 1.0, 1e-10).item()
    assert [ours, theirs] == pytest.approx([0.0, 397 + math.log(1e-10)], rel=CLOSE)


def test_reward_model():
    """A pair of theirs is a list of two of ours; a longer list is the mean over its pairs."""
    scores, order = 6 * uniform(6, 40, 2), column([[1.0, 0.0]] * 40)
    scores[:3] = column([[2.0, 2.0], [900.0, -900.0], [-900.0, 900.0]])

    def theirs(x, m=0.0, c=0.0):
        return c * (x[:, 0] + x[:, 1]) ** 2 - F.logsigmoid(x[:, 0] - x[:, 1] - m)

    agree("reward model", lambda x: reward_model_loss(x, order, 0.3, 0.01)[0],
          lambda x: theirs(x, 0.3, 0.01), scores)  # fmt: skip
    agree("reward model", lambda x: reward_model_loss(x, column([[2, 1, 1, math.nan]] * 20))[0],
          lambda x: (theirs(x[:, :2]) + theirs(x[:, ::2])) / 2, scores.view(20, 4))  # fmt: skip


T, FULL, RAGGED = 7, (7,) * 5, (1, 4, 7, 3, 6)  # places for a response, tokens of five


def ppo_inputs(lengths: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Log-probs, the reference's, values; scores; mask."""
    rows = [random_rows(seed, -2.0, 1.0, lengths) for seed in (1, 2, 3)]
    scores = column([2.0, -1.0, 0.0, 5.0, -300.0])
    return *(table(x, room=T) for x in rows), scores, mask_of(rows[0], T)


def their_gae(logps, ref, values, scores, mask, gamma: float, lam: float) -> Tensor:
    """(2, N, T) advantages, returns. A score is one place after the end, if there is one."""
    found = torch.zeros(2, *logps.shape, dtype=torch.float64)
    for row, n in enumerate(mask.sum(1).tolist()):
        reward = [0.1 * float(ref[row, t] - logps[row, t]) * (t < n) for t in range(T)]
        reward[min(n, T - 1)] += float(scores[row])
        value = [float(values[row, t]) * (t <= n) for t in range(T)] + [0.0]
        A = 0.0
        for t in reversed(range(T)):
            A = reward[t] + gamma * value[t + 1] - value[t] + gamma * lam * A
            found[:, row, t] = column([A, A + value[t]])
    return found


def test_ppo_advantages():
    def ours(logps, ref, values, scores, gamma, lam):
        rewards = ppo.token_rewards(logps, ref, scores, mask, kl_coef=0.1)
        return torch.stack(ppo.advantages_of(rewards, values, mask, gamma, lam))

    *given, mask = ppo_inputs(FULL)
    for knobs in ((1.0, 0.95), (0.9, 0.0), (0.9, 1.0)):
        agree("PPO, advantages", lambda *x, k=knobs: ours(*x, *k),
              lambda *x, k=knobs: their_gae(*x, mask, *k), *given, gradient=False)  # fmt: skip
    # If there is room after the end, an advantage departs by 1 - lambda of what that place expects.
    *given, mask = ppo_inputs(RAGGED)
    given[2] = given[2].masked_fill(~mask, 0.7)
    differences = (ours(*given, 1.0, 0.95) - their_gae(*given, mask, 1.0, 0.95))[0]
    for found, score, n in zip(differences.tolist(), given[3].tolist(), RAGGED, strict=True):
        left = 0.05 * (score - 0.7) * (n < T)
        expected = [left * 0.95 ** (n - 1 - t) for t in range(n)]
        assert found[:n] == pytest.approx(expected, abs=1e-12)


def test_ppo_whitening():
    def theirs(x, mask, shift_mean=True):
        inside = x[mask]
        found = (x - inside.mean()) * torch.rsqrt(inside.var(correction=0) + 1e-8)
        return (found if shift_mean else found + inside.mean()) * mask

    x, *_, mask = ppo_inputs(RAGGED)
    for shift in (True, False):
        agree("PPO, whitening", lambda y, s=shift: ppo.whiten(y, mask, s),
              lambda y, s=shift: theirs(y, mask, s), 5 * x + 3, gradient=False)  # fmt: skip
    # It departs in its scope: ours is over the responses of all processes.
    assert (ppo.whiten(x, mask)[:2] - theirs(x[:2], mask[:2])).abs().max() > 0.1


def test_ppo_losses():
    def ours(logps, values, old, A, old_values, G, mask):
        losses, _ = ppo.ppo_loss(logps, old, A, values, old_values, G, mask, 0.2, 0.3, 0.1)
        return losses.sum() / mask.sum()

    def theirs(logps, values, old, A, old_values, G, mask, value_mask):
        ratio, near = torch.exp(logps - old), values.clamp(old_values - 0.3, old_values + 0.3)
        policy = torch.max(-A * ratio, -A * ratio.clamp(0.8, 1.2))[mask].mean()
        return policy + 0.1 * 0.5 * torch.max((values - G) ** 2, (near - G) ** 2)[value_mask].mean()

    for lengths in (FULL, RAGGED):
        logps, x, values, _, mask = ppo_inputs(lengths)
        rest = (logps + 0.3 * x.cos(), logps.cos(), values + 0.5 * x.sin(), values.sin(), mask)
        agree("PPO, losses", lambda *y, r=rest: ours(*y, *r),
              lambda *y, r=rest: theirs(*y, *r, r[4]), logps, values)  # fmt: skip
    # It departs by a place: of value 0.6 after a token of value 1, it counts in their value loss.
    mask, zero, values = torch.tensor([[True, False]]), column([[0.0, 0.0]]), column([[1.0, 0.6]])
    given = (zero, values, zero, zero, values, zero, mask)
    found = [ours(*given).item(), theirs(*given, mask | True).item()]
    assert found == pytest.approx([0.05 * 1.0, 0.05 * (1 + 0.36) / 2])


SAMPLES, ROOM = 4, 9
SCORES = column([1.0, 3.0, 3.0, -2.0, 0.5, 0.5, 0.5, 0.5])
ROWS = random_rows(5, -2.0, 1.0, (1, 4, 7, 3, 7, 2, 5, 1))
NEW, INSIDE = table(ROWS), mask_of(ROWS)  # (N, T)
NOISE = 1.2 * uniform(7, 2, *NEW.shape) - 0.6
OLD, REF = NEW + NOISE * INSIDE  # ratios are on both sides of the clip


def their_clip(ratio: Tensor, A: Tensor, low: float, high: float) -> Tensor:
    return -torch.min(ratio * A, ratio.clamp(1 - low, 1 + high) * A)


def test_rloo():
    def our_advantages(scores):
        rollout = Rollout([], INSIDE, INSIDE[:, 0], scores, OLD, REF)
        return rloo.leave_one_out(rollout.metrics(0.05)["objective/rlhf_reward"], SAMPLES)

    def their_advantages(scores):
        R = (scores - 0.05 * ((OLD - REF) * INSIDE).sum(1)).view(-1, SAMPLES)
        return (R - (R.sum(1, keepdim=True) - R) / (SAMPLES - 1)).flatten()

    agree("RLOO", our_advantages, their_advantages, SCORES)
    A = their_advantages(SCORES)
    agree("RLOO", lambda x: rloo.rloo_loss(x, OLD, A, INSIDE, 0.2)[0].mean(),
          lambda x: their_clip(torch.exp(((x - OLD) * INSIDE).sum(1)), A, 0.2, 0.2).mean(),
          NEW)  # fmt: skip


def their_advantages(scores: Tensor, eps: float | None) -> Tensor:
    centred = scores.view(-1, SAMPLES) - scores.view(-1, SAMPLES).mean(1, keepdim=True)
    return (centred / (centred.std(1, keepdim=True) + eps) if eps else centred).flatten()


def their_k3(logps: Tensor, ref: Tensor) -> Tensor:
    return torch.expm1(ref - logps) - (ref - logps)


GRPO = {  # what is added to the deviation, and how the losses of tokens become one
    "grpo": (1e-4, lambda x: ((x * INSIDE).sum(1) / INSIDE.sum(1)).mean()),
    "dapo": (1e-4, lambda x: (x * INSIDE).sum() / INSIDE.sum()),
    "dr-grpo": (None, lambda x: ((x * INSIDE).sum(1) / ROOM).mean()),
}


@pytest.mark.parametrize("normalise", GRPO)
@pytest.mark.parametrize("kl_coef", (0.0, 0.1))
def test_grpo(normalise, kl_coef):
    def ours(x):
        n, (A, _) = INSIDE.sum(1), grpo.group_advantages(SCORES, SAMPLES, normalise)
        losses, _ = grpo.grpo_loss(x, OLD, REF, A, INSIDE, kl_coef, 0.2, 0.28)
        weights = grpo.token_weights(n, normalise, len(n), int(n.sum()), ROOM)
        return (losses * weights[:, None]).sum()

    def theirs(x):
        eps, aggregated = GRPO[normalise]
        losses = their_clip(torch.exp(x - OLD), their_advantages(SCORES, eps)[:, None], 0.2, 0.28)
        return aggregated(losses + kl_coef * their_k3(x, REF))

    agree(f"GRPO, {normalise}", ours, theirs, NEW)


def test_grpo_departs():
    """Added to the deviation: 1e-4 here and in TRL, 1e-6 in verl, 1e-8 in oat."""
    scores = column([0.0, 0.0, 0.0, 1e-3])  # their deviation is 5e-4
    ours = grpo.group_advantages(scores, 4, "grpo")[0][3].item()
    theirs = [their_advantages(scores, eps)[3].item() for eps in (1e-6, 1e-8)]
    assert [ours, *theirs] == pytest.approx([0.75e-3 / (5e-4 + x) for x in (1e-4, 1e-6, 1e-8)])
    x, old, ref = (column([[y]]) for y in (0.0, -0.1, 0.5))  # TRL's default: k3 times the ratio
    kl = grpo.grpo_loss(x, old, ref, x[0], x == 0, 1.0, 0.2, 0.2)[1]["loss/kl"][0].item()
    assert [kl, their_k3(x, ref).item() * math.exp(0.1)] == pytest.approx([0.14872, 0.16436], 1e-4)


def their_sampler(answers: list, scores: list[float], n: int, beta: float, rng) -> list:
    """Candidates are texts: of copies, the first counts. Each pass has a new highest reward."""
    candidates, accepted = dict(zip(answers, scores, strict=True)), []
    while len(accepted) < n:
        best, before = max(candidates.values()), len(accepted)
        for answer, score in candidates.items():
            if len(accepted) < n and rng.random() < math.exp((score - best) / beta):
                accepted.append(answer)
        for answer in accepted[before:]:
            del candidates[answer]
    return accepted


@pytest.mark.parametrize("beta", (0.05, 0.5, 5.0))
def test_rso_sampler(beta):
    """From the same random numbers, the same answers in the same order, if all are different."""
    for seed in range(300):
        scores = np.random.default_rng(1000 + seed).normal(size=24).round(1).tolist()  # with ties
        ours = rejection_sample(scores, 8, beta, np.random.default_rng(seed))
        assert ours == their_sampler([*range(24)], scores, 8, beta, np.random.default_rng(seed))
    FOUND["RSO, sampler"] = [0.0]


def test_rso_duplicates_depart():
    """Of the draws 3/4 are A (score 0), 1/4 B (score 1); beta is 1, one answer is accepted. The
    optimal policy has 3/4 A to e/4 B. Without copies, A must be drawn first and pass with 1/e.
    """
    draws, rng, ours, theirs = np.random.default_rng(0), np.random.default_rng(1), 0, 0
    for pool in (draws.random((4000, 32)) < 0.25).astype(int).tolist():
        ours += pool[rejection_sample(pool, 1, 1.0, rng, pool)[0]] == 0
        theirs += their_sampler(pool, pool, 1, 1.0, rng) == [0]
    expected = [0.75 / (0.75 + 0.25 * math.e), 0.75 / math.e]  # 0.52, 0.28
    assert [ours / 4000, theirs / 4000] == pytest.approx(expected, abs=0.03)


def test_the_page_names_every_method():
    page = (ROOT / "docs/parity.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \|[^|]+\|[^|]+\| agrees", page, re.M)
    assert dict(rows) == REFERENCES
