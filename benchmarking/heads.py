"""Who takes part in kernels/bench.py: ours, the plain ways, other people's heads where installed.

All are asked for the same: a DPO loss (without a reference) of S sequences whose last R tokens are
scored, and through it the gradient of hidden states and weight. `truth_of` has the same in float64.

Copyright (c) 2026 the plainpref authors. MIT licence.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from importlib import import_module
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

BETA = 0.1
MODELS = {  # hidden size, vocabulary, softcap of the logits
    "gpt2": (768, 50_257, None),
    "gemma-2-2b": (2304, 256_000, 30.0),
    "tinyllama": (2048, 32_000, None),
    "eurollm-1.7b": (2048, 128_000, None),
    "llama-3.2-1b": (2048, 128_256, None),
    # The same vocabularies with a softcap where there is none, and without where there is one.
    "gpt2-capped": (768, 50_257, 30.0),
    "gemma-2-2b-uncapped": (2304, 256_000, None),
    "tinyllama-capped": (2048, 32_000, 30.0),
    "llama-3.2-1b-capped": (2048, 128_256, 30.0),
    "toy": (64, 1000, None),
    "toy-capped": (64, 1000, 5.0),
}


# -- what is asked


@dataclass
class Problem:
    """S sequences, the first half chosen, the second rejected; the last R tokens of each answer."""

    hidden: Tensor  # (S, L, H)
    weight: Tensor  # (V, H)
    ids: Tensor  # (S, L)
    response: int  # R
    softcap: float | None

    @cached_property
    def labels(self) -> Tensor:  # (S, L), -100 where a token is not scored
        labels = self.ids.clone()
        labels[:, : -self.response] = -100
        return labels

    @cached_property
    def picked(self) -> Tensor:  # (T,) index into (S * L) of the position before each scored token
        many, length = self.ids.shape
        first = torch.arange(many)[:, None] * length + length - self.response - 1
        return (first + torch.arange(self.response)).flatten().to(self.ids.device)

    @cached_property
    def targets(self) -> Tensor:  # (T,)
        return self.ids[:, -self.response :].flatten()

    def packed(self) -> Tensor:  # (T, H)
        return self.hidden.flatten(0, 1)[self.picked]

    def cap(self, logits: Tensor) -> Tensor:
        return self.softcap * torch.tanh(logits / self.softcap) if self.softcap else logits

    def detached(self) -> Problem:
        hidden, weight = self.hidden.detach(), self.weight.detach()
        return dataclasses.replace(self, hidden=hidden, weight=weight)

    @cached_property
    def trl_model(self) -> SimpleNamespace:
        """What TRL's add_fused_lm_head asks of a model; its backbone returns `hidden` at once."""
        config = SimpleNamespace(final_logit_softcapping=self.softcap)
        config.get_text_config = lambda: config
        head = SimpleNamespace(weight=self.weight, bias=None)
        backbone = lambda **_: SimpleNamespace(last_hidden_state=self.hidden)  # noqa: E731

        class Model(SimpleNamespace):
            def forward(self): ...

        model = Model(config=config, base_model=backbone, get_output_embeddings=lambda: head)
        # As in DPOTrainer.__init__: four outputs a token, three of them for the log.
        import_module("trl.trainer.utils").add_fused_lm_head(
            model, outputs=("log_probs", "entropy", "mean_logits", "is_top1")
        )
        return model


def make_problems(
    name: str, size: tuple[int, int, int], dtype: str, device: str, centre: float = 0.0, n: int = 3
) -> list[Problem]:
    """Other hidden states and tokens in each, the same weight. All logits lie around `centre`: one
    coordinate is the same in all hidden states and in all rows of the weight.
    """
    (width, vocab, softcap), (many, length, response) = MODELS[name], size
    generator = torch.Generator(device).manual_seed(0)
    draw = partial(torch.randn, generator=generator, device=device)
    weight = draw(vocab, width).mul_(3 / width**0.5)  # logits spread by 3
    weight[:, 0] = centre / 4
    weight = weight.to(getattr(torch, dtype)).requires_grad_()
    problems = []
    for _ in range(n):
        hidden = draw(many, length, width)
        hidden[..., 0] = 4.0 if centre else hidden[..., 0]
        ids = torch.randint(vocab, (many, length), generator=generator, device=device)
        hidden = hidden.to(weight.dtype).requires_grad_()
        problems.append(Problem(hidden, weight, ids, response, softcap))
    return problems


def dpo(logps: Tensor) -> tuple[Tensor, Tensor]:
    """(loss, log-prob of each sequence) from the log-probs of tokens, S sequences in a row."""
    chosen, rejected = logps.chunk(2)
    return -F.logsigmoid(BETA * (chosen - rejected)).mean(), logps


# -- who is asked: each returns (loss, (S,) log-probs)

Contestant = Callable[[Problem], tuple[Tensor, Tensor]]


def contestants(device: str, softcap: float | None) -> tuple[dict[str, Contestant], list[str]]:
    """By name, ours first; and who could not come."""
    from kernels.gather_log_softmax import gather_log_softmax
    from kernels.token_logps import token_logps

    found: dict[str, Contestant] = {}
    absent: list[str] = []

    def enter(name: str, token_logps_of: Callable[[Problem], Tensor]) -> None:
        found[name] = lambda p: dpo(token_logps_of(p).view(len(p.ids), -1).sum(-1))

    def installed(module: str) -> bool:
        try:
            import_module(module)
        except ImportError as error:
            absent.append(f"{module.split('.')[0]}: not installed ({error})")
            return False
        return True

    def ours(p: Problem, **more: int) -> Tensor:
        return token_logps(p.packed(), p.weight, p.targets, softcap=p.softcap, **more)

    def gathered(p: Problem) -> Tensor:
        return gather_log_softmax(p.cap(F.linear(p.packed(), p.weight)), p.targets)

    def full(p: Problem) -> Tensor:
        logps = p.cap(F.linear(p.hidden[:, :-1], p.weight).float()).log_softmax(-1)  # (S, L-1, V)
        labels = p.labels[:, 1:]
        picked = logps.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        return picked.masked_fill(labels < 0, 0.0)

    def packed_full(p: Problem) -> Tensor:
        logits = p.cap(F.linear(p.packed(), p.weight).float())  # (T, V)
        return -F.cross_entropy(logits, p.targets, reduction="none")

    enter("ours", ours)
    enter("ours, keep_bytes=0", partial(ours, keep_bytes=0))
    enter("ours, gather_log_softmax", gathered)
    enter("packed logits", packed_full)
    enter("all logits", full)
    if installed("trl.kernels.chunked_logprob"):
        function = import_module("trl.kernels.chunked_logprob").ChunkedLogProbFunction
        chunk = import_module("trl.trainer.utils")._CHUNKED_LOGPROB_CHUNK_SIZE

        def trl_packed(p: Problem) -> Tensor:
            asked = ("log_probs",)
            given = (p.packed(), p.weight, None, p.targets, 1.0, chunk, p.softcap, 1.0, asked)
            return function.apply(*given)[0]

        def trl(p: Problem) -> Tensor:
            return p.trl_model.forward(labels=p.labels, fused_lm_head=True).log_probs

        enter("TRL as in DPOTrainer", trl)
        enter("TRL, packed, log-probs only", trl_packed)
    if installed("cut_cross_entropy"):
        apple = import_module("cut_cross_entropy").linear_cross_entropy

        def cut(p: Problem, **more: str | None) -> Tensor:
            given = (p.packed(), p.weight, p.targets)
            return -apple(*given, softcap=p.softcap, reduction="none", **more)

        newer = "accum_e_fp32" in inspect.signature(apple).parameters
        if device.startswith("cuda"):
            enter("cut-cross-entropy", cut)
            exact = {"impl": "cce_exact"} if newer else {"filter_eps": None}
            enter("cut-cross-entropy, exact", partial(cut, **exact))
        else:
            enter("cut-cross-entropy, torch_compile", partial(cut, impl="torch_compile"))
    if softcap:
        absent.append("Liger, torch's linear_cross_entropy: they know no softcap")
        return found, absent
    if installed("liger_kernel.chunked_loss"):
        loss = import_module("liger_kernel.chunked_loss").LigerFusedLinearDPOLoss(
            beta=BETA, use_ref_model=False
        )

        def liger(p: Problem) -> tuple[Tensor, Tensor]:
            value, (chosen, rejected, *_) = loss(p.weight, p.hidden[:, :-1], p.labels[:, 1:])
            return value, torch.cat([chosen, rejected])

        found["Liger DPO loss"] = liger
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        options = torch.nn.LinearCrossEntropyOptions()

        def chunked(p: Problem) -> Tensor:
            given = (p.packed(), p.weight, p.targets)
            return -F.linear_cross_entropy(*given, reduction="none", options=options)

        enter("torch linear_cross_entropy", chunked)
    return found, absent


# -- what is true


@dataclass
class Truth:
    """In float64, from the problem's own inputs; of dW some rows, among them all targets'."""

    logps: Tensor  # (S,)
    hidden_grad: Tensor  # (T, H)
    rows: Tensor
    weight_grad: Tensor  # (rows, H)


def slices_of(vocab: int, step: int) -> list[slice]:
    return [slice(at, at + step) for at in range(0, vocab, step)]


@torch.no_grad()
def true_logps(p: Problem, step: int = 4096) -> tuple[Tensor, Tensor]:
    """(S,) log-probs and, of each token, (T,) log-sum-exp. In float64, a slice of V at a time."""
    hidden, parts = p.packed().double(), []
    for rows in slices_of(len(p.weight), step):
        parts.append(p.cap(hidden @ p.weight[rows].double().T).logsumexp(-1))
    lse = torch.stack(parts).logsumexp(0)
    picked = p.cap((hidden * p.weight[p.targets].double()).sum(-1))  # (T,)
    return (picked - lse).view(len(p.ids), -1).sum(-1), lse


@torch.no_grad()
def truth_of(p: Problem, step: int = 4096) -> Truth:
    hidden, vocab = p.packed().double(), len(p.weight)
    sums, lse = true_logps(p, step)
    with torch.enable_grad():
        leaf = sums.clone().requires_grad_()
        dpo(leaf)[0].backward()
    pull = leaf.grad.repeat_interleave(p.response)[:, None]  # (T, 1)

    def logits_grad(rows: Tensor | slice) -> Tensor:
        z = p.cap(hidden @ p.weight[rows].double().T)
        hit = p.targets[:, None] == torch.arange(vocab, device=z.device)[rows]
        slope = 1 - (z / p.softcap) ** 2 if p.softcap else 1.0
        return pull * (hit.double() - (z - lse[:, None]).exp()) * slope

    hidden_grad = sum(logits_grad(x) @ p.weight[x].double() for x in slices_of(vocab, step))
    some = torch.randperm(vocab, device=hidden.device)[:256]
    rows = torch.cat([p.targets, some]).unique()
    return Truth(sums, hidden_grad, rows, logits_grad(rows).T @ hidden)


def errors(run: Contestant, p: Problem, truth: Truth) -> tuple[float, float, float]:
    """Of the log-prob of a sequence, the largest in nats; of dH and dW, relative."""
    p.hidden.grad = p.weight.grad = None
    loss, logps = run(p)
    loss.backward()
    hidden = p.hidden.grad.flatten(0, 1)[p.picked]
    pairs = ((hidden, truth.hidden_grad), (p.weight.grad[truth.rows], truth.weight_grad))
    far = [float((a.double() - b).norm() / b.norm()) for a, b in pairs]
    p.hidden.grad = p.weight.grad = None
    return float((logps.detach().double() - truth.logps).abs().max()), *far
