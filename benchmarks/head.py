"""The output layer alone: response log-probs from hidden states, forward and backward.

    python -m benchmarks.head --shapes gpt2 --rounds 5        # minutes on a laptop
    python -m benchmarks.head --device cuda --dtype bfloat16 --responses 64 > head.md

Ours (kernels/token_logps.py) next to plain logits of the response tokens and of all positions, and
TRL's fused head as its DPOTrainer calls it. A DPO loss without a reference makes all of them give
the same gradients. Each is compared with float64; a wrong one ends the benchmark. Then all run in
turn, without the first round. `rises MB`: how far memory rises, the gradients included.

Copyright (c) 2026 the plainpref authors. MIT licence.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from types import SimpleNamespace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

import common
from benchmarks.measure import Peak, print_header, print_table, ratio
from kernels.token_logps import token_logps

SHAPES = {  # hidden size, vocabulary, softcap of the logits
    "gpt2": (768, 50_257, None),
    "gemma-2-2b": (2304, 256_000, 30.0),
    "toy": (64, 1000, 5.0),
}
AGREE = {"float32": (1e-2, 1e-3), "bfloat16": (2.0, 0.1)}  # log-prob of a response; gradients


@dataclass
class Args:
    shapes: tuple[Literal[*SHAPES], ...] = ("gpt2",)
    responses: int = 8  # half of them chosen, half rejected
    length: int = 400  # tokens of prompt and response
    answer: int = 40  # tokens of the response
    rounds: int = 3
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass
class Problem:
    hidden: Tensor  # (S, L, H)
    weight: Tensor  # (V, H)
    ids: Tensor  # (S, L)
    answer: int  # tokens at the end that are scored
    softcap: float | None

    def packed(self) -> tuple[Tensor, Tensor, Tensor]:
        """(N, H) hidden states before the response tokens, the weight, (N,) response tokens."""
        hidden = self.hidden[:, -self.answer - 1 : -1].flatten(0, 1)
        return hidden, self.weight, self.ids[:, -self.answer :].flatten()


# The contestants: log-probs of the response tokens, (N,) or (S, answer)


def ours(p: Problem) -> Tensor:
    return token_logps(*p.packed(), softcap=p.softcap)


def packed_logits(p: Problem) -> Tensor:
    hidden, weight, targets = p.packed()
    logits = F.linear(hidden, weight)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # (N, V)
    logits = p.softcap * torch.tanh(logits / p.softcap) if p.softcap else logits
    return -F.cross_entropy(logits, targets, reduction="none")


def all_logits(p: Problem) -> Tensor:
    whole = Problem(p.hidden, p.weight, p.ids, p.ids.shape[1] - 1, p.softcap)
    return packed_logits(whole).view(len(p.ids), -1)[:, -p.answer :]


def trl(p: Problem) -> Tensor:
    """With a model whose backbone returns `hidden`; outputs as in DPOTrainer."""
    config = SimpleNamespace(final_logit_softcapping=p.softcap)
    config.get_text_config = lambda: config
    model = type("Model", (SimpleNamespace,), {"forward": None})(
        config=config,
        base_model=lambda **_: SimpleNamespace(last_hidden_state=p.hidden),
        get_output_embeddings=lambda: SimpleNamespace(weight=p.weight, bias=None),
    )
    outputs = ("log_probs", "entropy", "mean_logits", "is_top1")
    import_module("trl.trainer.utils").add_fused_lm_head(model, outputs=outputs)
    labels = p.ids.clone()
    labels[:, : -p.answer] = -100
    return model.forward(labels=labels, fused_lm_head=True).log_probs


def run(contestant: Callable[[Problem], Tensor], p: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """(S,) log-probs, and the gradients of the hidden states and of the weight."""
    p.hidden.grad = p.weight.grad = None
    logps = contestant(p).view(len(p.ids), -1).sum(-1)
    chosen, rejected = logps.chunk(2)
    (-F.logsigmoid(0.1 * (chosen - rejected)).mean()).backward()
    return logps.detach(), p.hidden.grad, p.weight.grad


def compare(shape: str, args: Args) -> None:
    H, V, softcap = SHAPES[shape]
    torch.manual_seed(0)
    with torch.device(args.device):
        tensors = torch.randn(args.responses, args.length, H), torch.randn(V, H) * 3 / H**0.5
        ids = torch.randint(V, (args.responses, args.length))
    tensors = [x.to(getattr(torch, args.dtype)) for x in tensors]
    p = Problem(*(x.requires_grad_() for x in tensors), ids, args.answer, softcap)
    exact = (x.detach().double().requires_grad_() for x in tensors)
    truth = run(packed_logits, Problem(*exact, ids, args.answer, softcap))
    print(f"### {shape}: {H} x {V:,}, {args.responses * args.answer} tokens scored, {args.dtype}\n")
    errors, rises, times = {}, {}, {}
    for contestant in (ours, packed_logits, all_logits, trl):
        logps, *gradients = run(contestant, p)
        wrong = [(logps - truth[0]).abs().max()]
        wrong += [(a - b).norm() / b.norm() for a, b in zip(gradients, truth[1:], strict=True)]
        if not (wrong[0] < AGREE[args.dtype][0] and max(wrong[1:]) < AGREE[args.dtype][1]):
            raise SystemExit(f"{contestant.__name__} is wrong: {wrong}")
        del logps, gradients
        peak = Peak(args.device)
        run(contestant, p)
        errors[contestant], rises[contestant], times[contestant] = wrong, peak.rise(), []
    for _ in range(args.rounds + 1):
        for contestant, seconds in times.items():
            start = time.perf_counter()
            run(contestant, p)[1].sum().item()  # waits for a GPU
            seconds.append(time.perf_counter() - start)
    lines = [["", "ms", "x ours", "rises MB", "log-prob off by, nats", "dH", "dW"]]
    for contestant, (_, *seconds) in times.items():
        cells = [f"{1e3 * statistics.median(seconds):.4g}", ratio(seconds, times[ours][1:])]
        cells += [f"{rises[contestant]:,.0f}", *(f"{x:.1e}" for x in errors[contestant])]
        lines.append([contestant.__name__, *cells])
    print_table(lines)


def main(args: Args) -> None:
    print_header(args.device)
    for shape in args.shapes:
        compare(shape, args)


if __name__ == "__main__":
    main(common.parse(Args, {}, __doc__))
