"""log softmax(logits / temperature)[target], for whoever already holds the logits.

    logp_t    = (z_y - m) / tau - log s        m = max_v z_v,   s = sum_v exp((z_v - m) / tau)
    dz_v      = g_t (1[v = y] - p_v) / tau     p_v = exp((z_v - m) / tau) / s

For bf16 logits, `logits.float().log_softmax(-1).gather(...)` takes 8 bytes a logit in forward (a
copy in fp32 and the log-probs), keeps 4 of them for backward, and holds 12 there. Here forward
reads the logits once and keeps nothing of their size but the logits, which the caller holds anyway;
backward reads them once more and writes their gradient once, 2 bytes a logit.

The maximum is taken off before the temperature divides, so that logits around -100 lose no more
than logits around 0. A confident target keeps its digits: o, the sum over all others, is taken
apart, so that logp = -log1p(o) where the target is the maximum, and 1 - p_y = o / s in its gradient
(-expm1(logp), were logp exact). With its 1 in the sum both would be 0 from p_y = 1 - 2^-24 on, and
mostly rounding long before.

A target of -100 gives 0 and no gradient, and its logits are not read. Logits of -inf are entries
without probability; a row with nothing else gives NaN, as log_softmax does. Sums are taken in a
fixed order, without atomics: the same input gives the same bits. No second derivative.

Where there is no CUDA or no Triton, and for float64, the same in plain torch, a few rows at a time.
Tested with torch 2.13 and the interpreter of Triton 3.7.1 (tests/test_gather.py); compiled for
sm_80 and sm_90 with Triton 3.7.1 and 3.6.0.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # not Linux
    triton = None

IGNORED = -100  # as in F.cross_entropy; the kernels spell it out, they see no globals
BLOCK, WARPS = 4096, 8  # logits in registers at once: 16 a thread
PROGRAMS = 2048  # enough to fill any present GPU; fewer rows than that are split over V
MOST_SPLITS = 64
CHUNK = 2**18  # logits that plain torch works on at once: 1 MB in fp32, which stays in cache
INTERPRETED = triton is not None and triton.knobs.runtime.interpret  # the kernels, on CPU tensors


def reference(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """What is meant: logits (..., V), targets (...,) -> (...,)."""
    logps = (logits.to(at_least_fp32(logits)) / temperature).log_softmax(-1)  # (..., V)
    picked = logps.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return picked.masked_fill(targets == IGNORED, 0.0)


def at_least_fp32(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


# The kernels see the logits as (A, B, V) with two strides, which covers logits[:, :-1] without a
# copy. Row numbers become int64 before they meet a stride: rows * V may exceed 2^31. Loads are cast
# to fp32 at once. exp2 instead of exp saves a multiplication a logit. `cooling` is 1 / tau.
COMPILED = []  # for tests/test_compiled.py: the kernels as they are launched, GPU or not

if triton is not None:

    @triton.jit
    def row_of(logits, row, B, stride_a, stride_b):
        return logits + (row // B).to(tl.int64) * stride_a + (row % B).to(tl.int64) * stride_b

    @triton.jit
    def forward_kernel(
        logits,  # (A, B, V)
        targets,  # (A*B,)
        part_max,  # (A*B, SPLITS) fp32, out
        part_sum,  # (A*B, SPLITS) fp32, out; without the target
        B, V, stride_a, stride_b,
        span,  # of V for each split, a multiple of BLOCK
        cooling,
        SPLITS: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        row, split = tl.program_id(0) // SPLITS, tl.program_id(0) % SPLITS
        scale = cooling * 1.4426950408889634  # log2(e)
        start = split * span
        target = tl.load(targets + row).to(tl.int32)
        # An ignored row is a loop of no rounds.
        end = tl.where(target == -100, start, tl.minimum(start + span, V))
        pointer = row_of(logits, row, B, stride_a, stride_b)
        most = tl.full((), float("-inf"), tl.float32)
        sums = tl.zeros((BLOCK,), tl.float32)  # a lane each; added up once, after the loop
        for first in range(start, end, BLOCK):
            v = first + tl.arange(0, BLOCK)
            z = tl.load(pointer + v, mask=v < V, other=float("-inf")).to(tl.float32)
            new = tl.maximum(most, tl.max(z, 0))
            base = tl.where(new == float("-inf"), 0.0, new)  # -inf - -inf would be NaN
            terms = tl.where(v == target, 0.0, tl.exp2((z - base) * scale))
            sums = sums * tl.exp2((most - base) * scale) + terms
            most = new
        at = row.to(tl.int64) * SPLITS + split
        tl.store(part_max + at, most)
        tl.store(part_sum + at, tl.sum(sums, 0))

    @triton.jit
    def combine_kernel(
        logits,  # (A, B, V)
        targets,  # (A*B,)
        part_max,  # (A*B, SPLITS)
        part_sum,  # (A*B, SPLITS)
        logps,  # (A*B,) fp32, out
        row_max,  # (A*B,) fp32, out
        row_sum,  # (A*B,) fp32, out
        misses,  # (A*B,) fp32, out: 1 - p_y
        B, V, stride_a, stride_b, cooling, SPLITS: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0)
        splits = row.to(tl.int64) * SPLITS + tl.arange(0, SPLITS)
        maxima = tl.load(part_max + splits)
        most = tl.max(maxima, 0)
        base = tl.where(most == float("-inf"), 0.0, most)
        others = tl.sum(tl.load(part_sum + splits) * tl.exp((maxima - base) * cooling), 0)
        target = tl.load(targets + row)
        # A target outside the vocabulary is not read but gives NaN, which no loss survives.
        known = (target >= 0) & (target < V)
        pointer = row_of(logits, row, B, stride_a, stride_b)
        z = tl.load(pointer + target, mask=known, other=float("nan")).to(tl.float32)
        total = tl.where(target == -100, 1.0, others + tl.exp((z - base) * cooling))
        # log1p, for which Triton has no function of its own: the series where log(1 + u) loses u.
        series = others * (1.0 - others * (0.5 - others * (1.0 / 3.0 - others * 0.25)))
        log_total = tl.where((z == base) & (others < 0.01), series, tl.log(total))
        logp = (z - base) * cooling - log_total
        tl.store(logps + row, tl.where(target == -100, 0.0, logp))
        tl.store(row_max + row, base)
        tl.store(row_sum + row, total)
        tl.store(misses + row, others / total)

    @triton.jit
    def backward_kernel(
        grad_logps,  # (A*B,)
        logits,  # (A, B, V)
        targets,  # (A*B,)
        row_max,  # (A*B,)
        row_sum,  # (A*B,)
        misses,  # (A*B,)
        grads,  # (A*B, V) out
        B, V, stride_a, stride_b,
        blocks,  # programs per row
        cooling, BLOCK: tl.constexpr,
    ):  # fmt: skip
        row, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
        target = tl.load(targets + row).to(tl.int32)
        g = tl.where(target == -100, 0.0, tl.load(grad_logps + row) * cooling)
        # A row without weight (ignored, or masked by the loss) is written but not read, and its
        # sums, which may be NaN, are not used.
        end = tl.where(g == 0, 0, V)
        weight = tl.where(g == 0, 0.0, g / tl.load(row_sum + row))
        at_target = tl.where(g == 0, 0.0, g * tl.load(misses + row))
        v = block * BLOCK + tl.arange(0, BLOCK)
        pointer = row_of(logits, row, B, stride_a, stride_b)
        z = tl.load(pointer + v, mask=v < end, other=float("-inf")).to(tl.float32)
        p = tl.exp2((z - tl.load(row_max + row)) * (cooling * 1.4426950408889634))
        grad = tl.where(v == target, at_target, -weight * p)
        tl.store(grads + row.to(tl.int64) * V + v, grad.to(grads.dtype.element_ty), mask=v < V)

    def variant(kernel: Any, dtype: str, even: bool, warps: int, **constants: int) -> dict:
        """`even`: every row begins at a 16-byte address, so that loads are wide. V = 50,257 not."""
        types = dict.fromkeys(("B", "V", "span", "blocks", "stride_a", "stride_b"), "i32")
        types |= {"logits": dtype, "grads": dtype, "targets": "*i64", "cooling": "fp32"}
        names = [name for name in kernel.arg_names if name not in constants]
        aligned = {"logits", "grads", "span"} | ({"V", "stride_a", "stride_b"} if even else set())
        return {
            "kernel": kernel, "types": {name: types.get(name, "*fp32") for name in names},
            "constants": constants, "aligned": [name for name in names if name in aligned],
            "num_warps": warps, "num_stages": 1,
        }  # fmt: skip

    for how in (("*bf16", True, WARPS), ("*bf16", False, WARPS), ("*fp32", True, WARPS)):
        COMPILED.append(variant(forward_kernel, *how, SPLITS=1, BLOCK=BLOCK))
        COMPILED.append(variant(backward_kernel, *how, BLOCK=BLOCK))
    COMPILED.append(variant(combine_kernel, "*bf16", False, 1, SPLITS=MOST_SPLITS))


def on_triton(logits: Tensor) -> bool:
    here = triton is not None and (logits.is_cuda or INTERPRETED)
    return here and logits.dtype != torch.float64 and logits.numel() > 0


def as_rows(logits: Tensor) -> Tensor:
    """(..., V) as (A, B, V): a view up to three dimensions, and wherever strides allow it."""
    logits = logits[(None,) * max(0, 3 - logits.dim())]
    return logits.flatten(0, logits.dim() - 3)


def tiles(logits: Tensor) -> Iterator[tuple[slice, slice]]:
    """What of (A, B, V) plain torch takes at once: about CHUNK logits, at least a row."""
    many_a, many_b, vocab = logits.shape
    step_b = max(1, min(many_b, CHUNK // vocab))
    step_a = max(1, CHUNK // (vocab * step_b)) if step_b >= many_b else 1
    for a in range(0, many_a, step_a):
        for b in range(0, many_b, step_b):
            yield slice(a, a + step_a), slice(b, b + step_b)


def per_row(targets: Tensor, logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Room for what forward returns."""
    return tuple(targets.new_empty(targets.shape, dtype=at_least_fp32(logits)) for _ in range(4))


@torch.library.custom_op("plainpref::gather_log_softmax", mutates_args=())
def forward(
    logits: Tensor,  # (..., V)
    targets: Tensor,  # (...,) int64
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logp of the target, m, s, 1 - p of the target: all (...,), fp32 or float64."""
    z, y = as_rows(logits), targets.contiguous()  # (A, B, V), (...,)
    out = per_row(y, logits)
    if on_triton(z):
        sizes, rows = (z.shape[1], z.shape[2], z.stride(0), z.stride(1)), y.numel()
        blocks = triton.cdiv(z.shape[2], BLOCK)
        splits = min(triton.next_power_of_2(min(triton.cdiv(PROGRAMS, rows), blocks)), MOST_SPLITS)
        span = triton.cdiv(blocks, splits) * BLOCK
        parts = torch.empty((2, rows, splits), dtype=torch.float32, device=z.device)
        with torch.cuda.device_of(z):  # Triton launches on the current device
            forward_kernel[(rows * splits,)](
                z, y, *parts, *sizes, span, 1 / temperature, splits, BLOCK,
                num_warps=WARPS, num_stages=1,
            )  # fmt: skip
            combine_kernel[(rows,)](
                z, y, *parts, *out, *sizes, 1 / temperature, splits, num_warps=1, num_stages=1
            )
        return out
    y, *out_rows = (x.view(z.shape[:2]) for x in (y, *out))  # (A, B) each
    for at in tiles(z):
        ignored = y[at] == IGNORED  # (a, b)
        index = y[at].masked_fill(ignored, 0)[..., None]  # (a, b, 1)
        tile = z[at].to(out[0].dtype, copy=True)  # (a, b, V), the only temporary of that shape
        target = tile.gather(2, index)[..., 0]
        most = tile.amax(2)
        most.masked_fill_((most == -torch.inf) | ignored, 0.0)  # -inf - -inf would be NaN
        tile.sub_(most[..., None]).div_(temperature).exp_()
        others = tile.scatter_(2, index, 0.0).sum(2)
        target = (target - most) / temperature
        total = others + target.exp()
        logp = target - torch.where(target == 0, others.log1p(), total.log())
        found = (logp, most, total, others / total)
        for whole, part, unread in zip(out_rows, found, (0.0, 0.0, 1.0, 0.0), strict=True):
            whole[at] = part.masked_fill_(ignored, unread)
    return out


@torch.library.custom_op("plainpref::gather_log_softmax_backward", mutates_args=())
def backward(
    grad_logps: Tensor,  # (...,)
    logits: Tensor,  # (..., V)
    targets: Tensor,  # (...,)
    row_max: Tensor,  # (...,)
    row_sum: Tensor,  # (...,)
    misses: Tensor,  # (...,)
    temperature: float,
) -> Tensor:
    """d logits (..., V), in their dtype."""
    z, y, g = as_rows(logits), targets.contiguous(), grad_logps.contiguous()  # .sum() expands it
    grads = torch.empty_like(logits, memory_format=torch.contiguous_format)
    if on_triton(z):
        blocks = triton.cdiv(z.shape[2], BLOCK)
        with torch.cuda.device_of(z):
            backward_kernel[(y.numel() * blocks,)](
                g, z, y, row_max, row_sum, misses, grads,
                z.shape[1], z.shape[2], z.stride(0), z.stride(1), blocks,
                1 / temperature, BLOCK, num_warps=WARPS, num_stages=1,
            )  # fmt: skip
        return grads
    out = grads.view(z.shape)
    g = g.masked_fill(y == IGNORED, 0.0) / temperature
    at_target = (g * misses).masked_fill_(g == 0, 0.0)
    weights = (-g / row_sum).masked_fill_(g == 0, 0.0)
    y, row_max, weights, at_target = (
        x.view(*z.shape[:2], 1) for x in (y.clamp(min=0), row_max, weights, at_target)
    )
    for at in tiles(z):
        tile = z[at].to(row_max.dtype, copy=True).sub_(row_max[at]).div_(temperature).exp_()
        tile.mul_(weights[at]).masked_fill_(weights[at] == 0, 0.0)  # 0 * NaN is NaN
        out[at] = tile.scatter_(2, y[at], at_target[at])
    return grads


@forward.register_fake
def _(logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, ...]:
    return per_row(targets, logits)


@backward.register_fake
def _(grad_logps: Tensor, logits: Tensor, *rest: Tensor | float) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def keep(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    logits, targets, ctx.temperature = inputs
    ctx.save_for_backward(logits, targets, *output[1:])  # of (..., V) only what the caller holds


def pull(ctx: Any, grad_logps: Tensor, *_: None) -> tuple[Tensor, None, None]:
    return backward(grad_logps, *ctx.saved_tensors, ctx.temperature), None, None


forward.register_autograd(pull, setup_context=keep)


def gather_log_softmax(
    logits: Tensor,  # (..., V) fp32, bf16, fp16 or float64; any strides, the last one dense
    targets: Tensor,  # (...,) integers; -100: 0 and no gradient
    temperature: float = 1.0,
) -> Tensor:
    """(...,) log-probs of the targets in fp32 (float64 for float64 logits), differentiable in the
    logits.
    """
    if logits.shape[:-1] != targets.shape:
        raise ValueError(f"logits {tuple(logits.shape)} and targets {tuple(targets.shape)}")
    if not temperature > 0:
        raise ValueError(f"temperature {temperature}: must be above 0")
    if logits.stride(-1) != 1:
        logits = logits.contiguous()  # a transposed matrix: reading down its columns costs more
    return forward(logits, targets.long(), float(temperature))[0]
