"""The losses on pairs and labels against the code of TRL's trainers: the same log-probs give the
same value and gradient, in float64.

TRL's losses are methods that call a model. Here the model returns given tensors, and the trainer is
made without its __init__, with only the attributes that the method reads.
"""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from cpo import cpo_loss
from dpo import dpo_loss
from ipo import ipo_loss
from kto import kto_loss
from orpo import orpo_loss
from simpo import simpo_loss
from slic import slic_loss

CLOSE = {"rtol": 1e-12, "atol": 1e-13}  # some ten float64 operations on numbers up to a hundred
ACCELERATOR = SimpleNamespace(device="cpu", gather_for_metrics=lambda tensor: tensor)
pytestmark = pytest.mark.filterwarnings("ignore:You are importing from 'trl.experimental'")


def close(ours: Tensor, theirs: Tensor) -> None:
    assert theirs.dtype == torch.float64
    torch.testing.assert_close(ours, theirs, **CLOSE)


# -- CPO and SimPO

VOCABULARY = 13
PROMPTS = (3, 1, 5, 2, 4, 2)  # tokens of each
CHOSEN = (4, 9, 1, 6, 2, 12)
REJECTED = (7, 2, 5, 6, 1, 3)


def answers(generator: torch.Generator, lengths: tuple[int, ...], longest: int) -> dict:
    """Collated as in TRL: prompt, answer, padding; labels are -100 outside the answer."""
    ids = torch.zeros(len(lengths), longest, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for b, (prompt, answer) in enumerate(zip(PROMPTS, lengths, strict=True)):
        row = torch.randint(1, VOCABULARY, (prompt + answer,), generator=generator)
        ids[b, : len(row)], labels[b, prompt : len(row)] = row, row[prompt:]
    return {"input_ids": ids, "labels": labels, "attention_mask": (ids > 0).long()}


def pairs(scale: float) -> tuple[dict, Tensor]:
    """A batch, and (2B, L, V) logits for its chosen, then its rejected answers."""
    generator = torch.Generator().manual_seed(5)
    longest = [max(p + n for p, n in zip(PROMPTS, t, strict=True)) for t in (CHOSEN, REJECTED)]
    batch = {}
    for name, lengths, width in zip(
        ("chosen", "rejected"), (CHOSEN, REJECTED), longest, strict=True
    ):
        batch |= {f"{name}_{k}": v for k, v in answers(generator, lengths, width).items()}
    shape = (2 * len(PROMPTS), max(longest), VOCABULARY)
    logits = scale * torch.randn(shape, generator=generator, dtype=torch.float64)
    return batch, logits.requires_grad_()


def summed_logps(batch: dict, logits: Tensor) -> Tensor:
    """(2, B): the log-prob of each answer, summed token by token."""
    logps, found = logits.log_softmax(-1), []
    for part, (name, lengths) in enumerate((("chosen", CHOSEN), ("rejected", REJECTED))):
        for b, (start, n) in enumerate(zip(PROMPTS, lengths, strict=True)):
            ids = batch[f"{name}_input_ids"][b]
            line = logps[part * len(PROMPTS) + b]
            found.append(sum(line[t - 1, ids[t]] for t in range(start, start + n)))
    return torch.stack(found).view(2, -1)


def cpo_of_trl(batch: dict, logits: Tensor, **knobs) -> tuple[Tensor, dict]:
    from trl.experimental.cpo import CPOTrainer

    trainer = object.__new__(CPOTrainer)
    known = {
        "accelerator": ACCELERATOR, "is_encoder_decoder": False, "pad_token_id": 0,
        "aux_loss_enabled": False, "label_smoothing": 0.0, "alpha": 0.0,
    }  # fmt: skip
    for name, value in (known | knobs).items():
        setattr(trainer, name, value)
    return trainer.get_batch_loss_metrics(lambda *_, **__: SimpleNamespace(logits=logits), batch)


@pytest.mark.parametrize("scale", (0.3, 2.0, 8.0))  # of logits; 8: losses from 0 to 243
@pytest.mark.parametrize("weight", (0.0, 0.4, 1.0))
@pytest.mark.parametrize("beta", (0.1, 2.0))
@pytest.mark.parametrize("ratio", (None, 0.0, 0.55))  # None: CPO, else SimPO's gamma / beta
def test_pairwise(ratio, beta, weight, scale):
    batch, logits = pairs(scale)
    knobs = {"beta": beta, "cpo_alpha": weight, "loss_type": "sigmoid"}
    if ratio is not None:
        knobs |= {"loss_type": "simpo", "simpo_gamma": beta * ratio}
    theirs, logged = cpo_of_trl(batch, logits, **knobs)
    (slope,) = torch.autograd.grad(theirs, logits)

    logps = summed_logps(batch, logits)
    mean_length = sum(CHOSEN) / len(CHOSEN)
    if ratio is None:
        losses, metrics = cpo_loss(*logps, mean_length, beta, weight)
    else:
        lengths = torch.tensor([CHOSEN, REJECTED])
        losses, metrics = simpo_loss(*logps, *lengths, beta, ratio, weight, mean_length)
    close(losses.mean(), theirs)
    close(torch.autograd.grad(losses.mean(), logits)[0], slope)
    assert slope.abs().max() > 1e-3
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"):
        digits = 1e-6 if name == "rewards/accuracies" else 1e-12  # TRL's is in fp32
        assert metrics[name].mean().item() == pytest.approx(logged[name], rel=digits), name
    if weight:  # without, TRL logs 0
        assert metrics["nll_loss"].mean().item() == pytest.approx(logged["nll_loss"], rel=1e-12)


# -- ORPO, and DPOTrainer: DPO, IPO and SLiC's hinge


@pytest.mark.parametrize("scale", (0.3, 2.0, 8.0))
@pytest.mark.parametrize("weight", (0.1, 5.0))
def test_orpo(weight, scale):
    """TRL computes the odds in fp32, and its NLL is a mean over all tokens of the batch, prompts
    included. Only the odds-ratio terms are compared.
    """
    from trl.experimental.orpo import ORPOTrainer

    batch, logits = pairs(scale)
    trainer = object.__new__(ORPOTrainer)
    known = {
        "accelerator": ACCELERATOR, "is_encoder_decoder": False, "padding_value": 0,
        "aux_loss_enabled": False, "beta": weight,
    }  # fmt: skip
    for name, value in known.items():
        setattr(trainer, name, value)
    model = lambda *_, **__: SimpleNamespace(logits=logits)  # noqa: E731
    theirs, logged = trainer.get_batch_loss_metrics(model, batch)
    nll = trainer.concatenated_forward(model, batch)[4]
    (slope,) = torch.autograd.grad(theirs - nll, logits)

    logps, lengths = summed_logps(batch, logits), torch.tensor([CHOSEN, REJECTED])
    losses, metrics = orpo_loss(*logps, *lengths, weight)
    ours = (losses - metrics["nll_loss"]).mean()
    single = {"rtol": 1e-5, "atol": 1e-7}
    torch.testing.assert_close(ours.item(), (theirs - nll).item(), **single)
    torch.testing.assert_close(torch.autograd.grad(ours, logits)[0], slope, **single)
    assert slope.abs().max() > 1e-3
    means = logps / lengths  # TRL logs these: of chosen answers, then of rejected ones
    for name, mean in zip(("chosen", "rejected"), means, strict=True):
        assert logged[f"logps/{name}"] == pytest.approx(mean.mean().item(), rel=1e-6)
    assert logged["log_odds_chosen"] == pytest.approx(
        metrics["rewards/margins"].mean().item(), rel=1e-5
    )
    right = metrics["rewards/accuracies"].mean().item()
    assert logged["rewards/accuracies"] == pytest.approx(right, rel=1e-6)  # TRL's is in fp32


# TRL's name -> our loss of the same log-probs
OURS = {
    "sigmoid": lambda logps, ref, lengths, beta: dpo_loss(*logps, *ref, beta),
    "ipo": lambda logps, ref, lengths, beta: ipo_loss(*logps, *ref, *lengths, beta),
    "hinge": lambda logps, ref, lengths, beta: slic_loss(*logps, logps[0], *ref, beta, 1.0, 0.0),
}


@pytest.mark.parametrize("loss_type", OURS)
@pytest.mark.parametrize("beta", (0.01, 0.3, 5.0))
def test_with_a_reference(beta, loss_type):
    from trl import DPOTrainer

    generator = torch.Generator().manual_seed(3)
    rows, tokens = len(CHOSEN), max(CHOSEN + REJECTED)
    lengths = torch.tensor(CHOSEN + REJECTED)
    mask = torch.arange(tokens) < lengths[:, None]  # (2B, T) chosen, then rejected
    draw = torch.randn(2, *mask.shape, generator=generator, dtype=torch.float64)
    token_logps = (2 * draw[0] - 3).requires_grad_()
    ref_logps = ((2 * draw[1] - 3) * mask).sum(1).view(2, rows)
    unused = torch.zeros(mask.shape)

    def model(**_) -> SimpleNamespace:  # log-probs outside the answer are 0
        is_top1 = torch.zeros(mask.shape, dtype=torch.bool)
        found = {"entropy": unused, "mean_logits": unused, "is_top1": is_top1}
        return SimpleNamespace(log_probs=token_logps * mask, **found)

    model.training = True
    behind_a_prompt = torch.cat([torch.zeros(2 * rows, 1), mask], 1).long()
    batch = {
        "input_ids": torch.ones_like(behind_a_prompt), "completion_mask": behind_a_prompt,
        "attention_mask": torch.ones_like(behind_a_prompt),
        "ref_chosen_logps": ref_logps[0], "ref_rejected_logps": ref_logps[1],
    }  # fmt: skip
    trainer = object.__new__(DPOTrainer)
    known = {
        "accelerator": SimpleNamespace(gather=lambda tensor: tensor, **vars(ACCELERATOR)),
        "model": model, "loss_types": [loss_type], "loss_weights": [1.0], "beta": beta,
        "f_divergence_type": "reverse_kl", "ld_alpha": None, "precompute_ref_logps": True,
        "use_weighting": False, "aux_loss_enabled": False, "_tp_size": 1, "_total_train_tokens": 0,
        "_metrics": {"train": defaultdict(list)},
    }  # fmt: skip
    for name, value in known.items():
        setattr(trainer, name, value)
    theirs = trainer._compute_loss(model, batch, return_outputs=False)
    (slope,) = torch.autograd.grad(theirs, token_logps)

    logps = (token_logps * mask).sum(1).view(2, rows)
    losses, _ = OURS[loss_type](logps, ref_logps, lengths.view(2, rows), beta)
    close(losses.mean(), theirs)
    close(torch.autograd.grad(losses.mean(), token_logps)[0], slope)
    assert slope.abs().max() > 1e-4
    _, sums = dpo_loss(*logps.detach(), *ref_logps, beta)  # TRL's rewards are sums for any loss
    for key in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
        assert trainer._metrics["train"][key] == pytest.approx([sums[key].mean().item()])


# -- KTO


def kto_of_trl(
    token_logps: Tensor,  # (B, T) of the answers
    ref_logps: Tensor,  # (B,)
    others: Tensor,  # (B, T) of the mismatched ones
    ref_others: Tensor,  # (B,)
    desirable: Tensor,
    **knobs: float,
) -> tuple[Tensor, dict]:
    """(loss, what it logs)"""
    from trl import KTOTrainer

    rows, tokens = token_logps.shape
    answers_of = {"": token_logps, "KL_": others}
    batch = {"label": desirable, "ref_logps": ref_logps, "ref_KL_logps": ref_others}
    for at, name in enumerate(
        answers_of
    ):  # the first token is the prompt; its id selects the answer
        batch[f"{name}input_ids"] = torch.full((rows, tokens + 1), at)
        batch[f"{name}attention_mask"] = torch.ones(rows, tokens + 1, dtype=torch.long)
        batch[f"{name}completion_mask"] = torch.ones(rows, tokens + 1, dtype=torch.long)
        batch[f"{name}completion_mask"][:, 0] = 0

    def model(input_ids: Tensor, **_) -> SimpleNamespace:
        logps = list(answers_of.values())[int(input_ids[0, 0])]
        unused = torch.zeros(rows, tokens)
        return SimpleNamespace(log_probs=logps, entropy=unused, mean_logits=unused)

    model.training = True
    trainer = object.__new__(KTOTrainer)
    known = {
        "accelerator": ACCELERATOR, "model": model, "loss_type": "kto", "calculate_KL": True,
        "precompute_ref_logps": True, "aux_loss_enabled": False, "_tp_size": 1,
        "_total_train_tokens": 0, "_metrics": {"train": defaultdict(list)},
    }  # fmt: skip
    for name, value in (known | knobs).items():
        setattr(trainer, name, value)
    loss = trainer._compute_loss(model, batch, return_outputs=False)
    return loss, {name: values[-1] for name, values in trainer._metrics["train"].items()}


LABELS = {
    "mixed": (True, False, False, True, True, False, True),
    "desirable only": (True,) * 7,
    "undesirable only": (False,) * 7,
}


@pytest.mark.parametrize(
    "drift", (-3.0, 0.0, 3.0)
)  # of the mismatched answers: z0 is clamped or not
@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("weights", ((1.0, 1.0), (1.33, 0.75), (0.5, 2.0)))
@pytest.mark.parametrize("beta", (0.1, 1.0, 5.0))
def test_kto(beta, weights, labels, drift):
    generator = torch.Generator().manual_seed(9)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    token_logps, others = draw(7, 6) - 3, draw(7, 6) - 3
    ref_logps = token_logps.sum(1) + 4 * draw(7)  # log-ratios of some nats, either way
    ref_others = others.sum(1) + draw(7) - drift
    desirable = torch.tensor(LABELS[labels])
    token_logps.requires_grad_()
    others.requires_grad_()
    knobs = {"beta": beta, "desirable_weight": weights[0], "undesirable_weight": weights[1]}

    theirs, logged = kto_of_trl(token_logps, ref_logps, others, ref_others, desirable, **knobs)
    inputs = (token_logps, others)
    slope, of_others = torch.autograd.grad(theirs, inputs, allow_unused=True)
    assert of_others is None
    kl = (others.sum(1) - ref_others).mean()
    losses, metrics = kto_loss(token_logps.sum(1), ref_logps, desirable, kl, **knobs)
    close(losses.mean(), theirs)
    our_slope, of_others = torch.autograd.grad(losses.mean(), inputs, allow_unused=True)
    close(our_slope, slope)
    assert of_others is None  # z0 is a constant
    assert slope.abs().max() > 1e-4

    assert max(0.0, kl.item()) == pytest.approx(logged.pop("kl"), rel=1e-12, abs=1e-12)
    if drift:
        assert (kl > 0) == (drift > 0)
    # If a batch has no such answer, TRL does not log the metric; ours has weight 0.
    for name in ("rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected"):
        values, counts = metrics[name]
        assert (name in logged) == bool(counts.sum() > 0)
        if name in logged:
            mean = values.sum().item() / counts.sum().item()
            assert mean == pytest.approx(logged[name], rel=1e-12), name
