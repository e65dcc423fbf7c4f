"""log p(target) from hidden states: linear, log-softmax and gather without (T, V) logits in fp32.

    logits    z = softcap · tanh(scale · (h Wᵀ + b) / softcap) / temperature     or without tanh
    log-prob  log p_t = z_t - lse,  lse = log Σ_j exp z_j;    entropy  H = -Σ_j p_j log p_j
    gradient  dz_j = g · (1[j = t] - p_j) - g_H · p_j (log p_j + H), times the derivative of what
              precedes: (1 - tanh²) · scale / temperature; dh = dz W, dW = dzᵀ h, db = Σ_rows dz

The plain computation holds logits, log-softmax and their gradients in fp32: 8.4 GB each at
V = 256,000 and T = 8192. This file reuses one fp32 tile of 32 MB. At that shape and H = 2304 it
also holds a maximum and a sum per 1024 columns (25 MB), dh in fp32 (75 MB), a slice of dz in bf16
(134 MB), and at most `keep_bytes` of bf16 exponentials for the backward pass.

Design decisions:

1.  The outer loop runs over slices of the vocabulary, the inner one over tokens. A slice of dW is
    then one product over all tokens, accumulated in fp32 and written once in the weight's dtype. No
    (V, H) buffer in fp32 is needed. Only dh accumulates over slices: it is small, and in fp32.
2.  Matrix products call the vendor's library. They take nine tenths of the time, and a kernel of
    our own would have to match them on every chip. The rest is a light pass over a tile that is
    still in the cache. Products of bf16 operands are written in fp32: a logit near -100 rounded to
    bf16 is off by up to 0.25 nats, and a response's log-prob adds up dozens of them.
3.  Each program handles one row and one block of columns and writes a maximum and a sum. These are
    combined afterwards in a fixed order, without atomics, so results are reproducible bit for bit,
    and a few tokens are enough to fill a chip.
4.  What is kept for the backward pass is E = exp(z - m), where m is the maximum of the block. Then
    p = E · exp(m - lse) has the relative error of E (2⁻⁹ in bf16) wherever the logits are; a kept z
    would not. Slices that are kept need three products (forward, dh, dW). The others need a fourth
    one to recompute the logits.
5.  For the target, 1 - p is computed as -expm1(log p) from the fp32 log-prob. Computed from E in
    bf16 it would be pure rounding error from p = 0.998 on, where trained targets end up.

Without Triton, or on a CPU, the same two passes use PyTorch operations, in place on a tile; bf16 is
then multiplied in fp32. There is no second derivative. An invalid target id gives NaN.
Tests: python -m pytest tests/test_kernels.py. Tested with torch 2.13 on CPUs; the Triton kernels
with Triton 3.6.0 and 3.7.1, interpreted and compiled for sm_80 and sm_90, but not yet on a GPU.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # not Linux
    triton = None

IGNORED = -100  # as in F.cross_entropy
SLICE = 8192  # columns of the vocabulary at a time
TILE = 2**23  # elements of the fp32 tile: 32 MB, which fit into the cache of an A100 or H100
BLOCK, WARPS = 1024, 4  # columns per program: 8 per thread, which stay in registers
PAD = 16  # rows of tiles begin at multiples of this, else rows are unaligned at V = 50,257


def reference(
    hidden: Tensor,  # (T, H)
    weight: Tensor,  # (V, H)
    targets: Tensor,  # (T,) int64
    bias: Tensor | None = None,  # (V,)
    softcap: float | None = None,
    scale: float = 1.0,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """(T,) log-probs and (T,) entropies, the plain way. Tests compare with this."""
    logits = F.linear(hidden, weight, bias)  # (T, V)
    logits = logits.to(at_least_fp32(logits.dtype)) * scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    logps = torch.log_softmax(logits / temperature, -1)  # (T, V)
    target_logps = -F.nll_loss(logps, targets, reduction="none", ignore_index=IGNORED)
    entropies = torch.special.entr(logps.exp()).sum(-1)
    return target_logps, entropies.masked_fill(targets == IGNORED, 0.0)


# Each program handles one row and BLOCK of its columns. All arithmetic is in fp32, whatever is
# loaded. Row numbers become int64 before they are multiplied by a stride: T * V may exceed 2^31.

if triton is not None:

    @triton.jit
    def finish(
        z,  # (BLOCK,) products
        bias,  # (V,)
        columns, at, width,  # columns: (BLOCK,) within the slice, which begins at column `at` of V
        scale, softcap, inverse_temperature,
        BIAS: tl.constexpr, SOFTCAP: tl.constexpr,
    ):  # fmt: skip
        if BIAS:
            z += tl.load(bias + at + columns, mask=columns < width, other=0.0).to(tl.float32)
        z = z * scale
        if SOFTCAP:
            # tanh from exp, because the interpreter has no tanh. The series is for small x, where
            # 1 - t loses digits to cancellation.
            x = z / softcap
            t = tl.exp(-2.0 * tl.abs(x))
            tanh = tl.where(x < 0.0, t - 1.0, 1.0 - t) / (1.0 + t)
            series = x * (1.0 + x * x * (-1.0 / 3.0 + x * x * (2.0 / 15.0 - x * x * 17.0 / 315.0)))
            z = softcap * tl.where(tl.abs(x) < 0.2, series, tanh)
        return tl.where(columns < width, z * inverse_temperature, float("-inf"))

    @triton.jit
    def fold_kernel(
        tile,  # (rows, width) fp32 products; row stride `stride`, also in kept
        bias,  # (V,) fp32
        targets,  # (T,)
        kept,  # out: (T, width) exponentials, from element kept_at on
        parts,  # out: (3, T, blocks) fp32 m, Σ exp(z - m), and for the entropy Σ (z - m) exp(z - m)
        z_target,  # out: (T,) fp32
        # keep: number of columns to keep, width or 0. Not a compile-time constant: the store
        # influences how the compiler splits sums over threads, and then scoring and training would
        # differ in the last bits. first: the row of T at which the tile begins.
        kept_at, first, tokens, at, width, stride, blocks, keep,
        scale, softcap, inverse_temperature,
        BLOCK: tl.constexpr, BIAS: tl.constexpr, SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr,
    ):  # fmt: skip
        in_tile, begin = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK
        row = first + in_tile
        columns = begin + tl.arange(0, BLOCK)
        z = tl.load(tile + in_tile * stride + columns, mask=columns < width, other=0.0)
        z = finish(z, bias, columns, at, width, scale, softcap, inverse_temperature, BIAS, SOFTCAP)

        m = tl.max(z, 0)
        # If all of a block is -inf (a bias that forbids tokens), E must be 0, not NaN.
        shifted = z - tl.where(m == float("-inf"), 0.0, m)
        e = tl.exp(shifted)
        column = (at + begin) // BLOCK
        tl.store(parts + row * blocks + column, m)
        tl.store(parts + (row + tokens) * blocks + column, tl.sum(e, 0))
        if ENTROPY:
            tilt = tl.sum(tl.where(e > 0.0, shifted * e, 0.0), 0)
            tl.store(parts + (row + tokens * 2) * blocks + column, tilt)

        target = tl.load(targets + row) - at
        mine = (target >= begin) & (target < tl.minimum(begin + BLOCK, width))
        tl.store(z_target + row, tl.sum(tl.where(columns == target, z, 0.0), 0), mask=mine)
        kept += kept_at + row * stride
        tl.store(kept + columns, e.to(kept.dtype.element_ty), mask=columns < keep)

    @triton.jit
    def dlogits_kernel(
        source,  # if KEPT the exponentials, from element source_at on, else the fp32 tile
        out,  # out: (T, width) dz of the slice; row stride `stride`, also in source
        bias,  # (V,) fp32
        targets,  # (T,)
        row_stats,  # (7, T) fp32: g, g_H; log p and 1 - p of the target; H; top, log_sum (lse)
        parts,  # (3, T, blocks) fp32, as in fold_kernel
        source_at, first, tokens, at, width, stride, blocks,
        scale, softcap, inverse_temperature,
        BLOCK: tl.constexpr, BIAS: tl.constexpr, SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr,
        KEPT: tl.constexpr,
    ):  # fmt: skip
        in_source, begin = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK
        row = first + in_source
        columns = begin + tl.arange(0, BLOCK)
        x = tl.load(source + source_at + in_source * stride + columns, columns < width, other=0.0)
        x = x.to(tl.float32)
        top, log_sum = tl.load(row_stats + row + tokens * 5), tl.load(row_stats + row + tokens * 6)
        if KEPT:
            shift = tl.load(parts + row * blocks + (at + begin) // BLOCK) - top - log_sum
            p = x * tl.exp(shift)
            logp = tl.where(x > 0.0, tl.log(x) + shift, 0.0)
        else:
            z = finish(
                x, bias, columns, at, width, scale, softcap, inverse_temperature, BIAS, SOFTCAP
            )
            logp = z - top - log_sum
            p = tl.exp(logp)
            logp = tl.where(p > 0.0, logp, 0.0)

        # The target's entry comes from its exact log-prob, not from the rounded exponential.
        hit = columns == tl.load(targets + row) - at
        logp = tl.where(hit, tl.load(row_stats + row + tokens * 2), logp)
        dz = tl.load(row_stats + row) * tl.where(hit, tl.load(row_stats + row + tokens * 3), -p)
        if ENTROPY:
            entropy = tl.load(row_stats + row + tokens * 4)
            dz -= tl.load(row_stats + row + tokens) * p * (logp + entropy)
        if SOFTCAP:
            tanh = (logp + log_sum + top) / (inverse_temperature * softcap)
            dz *= tl.maximum(1.0 - tanh * tanh, 0.0)  # rounding may push |tanh| over 1
        tl.store(out + row * stride + columns, dz.to(out.dtype.element_ty), mask=columns < width)


# TRITON_INTERPRET=1: the kernels run on CPU tensors.
INTERPRETED = triton is not None and triton.knobs.runtime.interpret


# The same in plain torch, in place, with as few passes over a tile as possible.


def finish_(
    z: Tensor,  # (rows, v) products, overwritten
    bias: Tensor | None,  # (v,)
    scale: float, softcap: float, temperature: float,
) -> None:  # fmt: skip
    if bias is not None:
        z.add_(bias)
    if softcap:
        z.mul_(scale / softcap).tanh_().mul_(softcap / temperature)
    elif scale != temperature:
        z.mul_(scale / temperature)


def fold_(
    z: Tensor,  # (rows, v) logits; overwritten with exponentials
    columns: Tensor,  # (rows,) columns of the targets, relative to the slice
    z_target: Tensor,  # (rows,) logits of the targets, written where the slice has the target
    entropy: bool,
) -> Tensor:
    """(3, rows): the same as `parts` of fold_kernel."""
    inside = (columns >= 0) & (columns < z.shape[1])
    found = z.gather(1, columns.clamp(0, z.shape[1] - 1)[:, None])[:, 0]
    z_target.copy_(torch.where(inside, found, z_target))
    m = z.amax(1)
    z.sub_(m.clamp(min=torch.finfo(z.dtype).min)[:, None]).exp_()  # all -inf: 0, not NaN
    return torch.stack([m, z.sum(1), -torch.special.entr(z).sum(1) if entropy else m])


def dlogits_(
    out: Tensor,  # (rows, v) logits, or anything if `kept` is given; overwritten with dz
    kept: Tensor | None,  # (rows, v) exponentials
    m: Tensor,  # (rows,)
    columns: Tensor,  # (rows,) as in fold_
    row_stats: Tensor,  # (7, rows) as in dlogits_kernel
    softcap: float, temperature: float, entropy: bool,
) -> None:  # fmt: skip
    grads, entropy_grads, target_logps, misses, entropies, top, log_sum = row_stats[:, :, None]
    logp, limits = None, torch.finfo(out.dtype)
    if kept is None:
        out.sub_(top).sub_(log_sum)
        if softcap or entropy:
            logp = out.clamp(min=limits.min)  # 0 * -inf would be NaN
        out.exp_().mul_(-grads)
    else:
        shift = m[:, None] - top - log_sum  # (rows, 1)
        if softcap or entropy:
            logp = kept.clamp(min=limits.tiny).log_().add_(shift)
        torch.mul(kept, -grads * shift.exp(), out=out)

    inside = ((columns >= 0) & (columns < out.shape[1]))[:, None]
    column = columns.clamp(0, out.shape[1] - 1)[:, None]

    def set_targets(matrix: Tensor, value: Tensor) -> None:
        matrix.scatter_(1, column, torch.where(inside, value, matrix.gather(1, column)))

    set_targets(out, grads * misses)
    if logp is not None:
        set_targets(logp, target_logps)
    if entropy:
        out.sub_((logp + entropies).mul_(logp.exp()).mul_(entropy_grads))
    if softcap:
        tanh = logp.add_(log_sum).add_(top).mul_(temperature / softcap)
        out.mul_(tanh.square_().neg_().add_(1.0))


# Shared by both passes.


def at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def on_triton(hidden: Tensor) -> bool:
    available = triton is not None and (hidden.is_cuda or INTERPRETED)
    return available and hidden.dtype != torch.float64


def compute_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype of product operands and of kept exponentials. Statistics are fp32 or better."""
    return hidden.dtype if on_triton(hidden) else at_least_fp32(hidden.dtype)


def product(a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> None:
    """out (+)= a @ b, accumulated in fp32 or better and rounded once to the dtype of `out`."""
    if not a.is_cuda:  # CPUs have no half-precision product with an fp32 result
        a, b = a.to(at_least_fp32(a.dtype)), b.to(at_least_fp32(b.dtype))
    wider = {"out_dtype": out.dtype} if a.itemsize == 2 and out.dtype == torch.float32 else {}
    if a.dtype != out.dtype and not wider:
        out.copy_(a @ b)
    elif add:
        torch.addmm(out, a, b, out=out, **wider)
    else:
        torch.mm(a, b, out=out, **wider)


def tile_shape(tokens: int, hidden: Tensor) -> tuple[int, int]:
    """(rows, columns). With few tokens slices are wider, or launching kernels and waking threads
    would dominate. With very many they are narrower, so that a slice of dz has at most 2²⁶
    elements. On a CPU everything is smaller, because caches are.
    """
    tokens = max(tokens, 1)
    tile, columns = (TILE, SLICE) if hidden.is_cuda else (TILE // 8, SLICE // 2)
    columns = min(max(tile // tokens, columns), 4 * columns, max(2**26 // tokens, BLOCK))
    columns -= columns % BLOCK
    return min(tokens, max(TILE // columns, 1)), columns


def padded(columns: int) -> int:
    return -(-columns // PAD) * PAD


def matrix(buffer: Tensor, at: int, rows: int, columns: int) -> Tensor:
    """View (rows, columns) of a flat buffer from element `at` on; row stride padded(columns)."""
    wide = padded(columns)
    return buffer[at : at + rows * wide].view(rows, wide)[:, :columns]


def room_to_keep(hidden: Tensor, weight: Tensor, keep_bytes: int | None) -> int:
    """Number of exponentials to keep. It depends on shapes and hardware only, never on free memory,
    so that a resumed run computes the same bits as an uninterrupted one.
    """
    logits = hidden.shape[0] * padded(weight.shape[0])
    itemsize = compute_dtype(hidden).itemsize
    if keep_bytes is None and weight.is_cuda:
        keep_bytes = torch.cuda.get_device_properties(weight.device).total_memory // 16
    elif keep_bytes is None:
        # Keeping a fifth of the logits leaves the peak a fifth below the plain computation's even
        # where dW dominates both (GPT-2's head, 320 tokens). Keeping all would save a tenth of the
        # time; that is done where they are small compared with dW (Gemma 2's head, few tokens).
        small = weight.shape[0] * weight.shape[1] * weight.element_size() // 32
        keep_bytes = torch.sym_max(logits * itemsize // 5, small)
    return torch.sym_min(keep_bytes // itemsize, logits)


def slices(
    hidden: Tensor, weight: Tensor, kept: Tensor, columns: int
) -> Iterator[tuple[int, Tensor, bool]]:
    """Yield (first column, (v, H) weight in the compute dtype, whether kept) per slice. Casting
    slice by slice never copies the full weight. The first slices are kept, as many as fit.
    """
    for at in range(0, weight.shape[0], columns):
        w = weight[at : at + columns].to(compute_dtype(hidden))
        yield at, w, hidden.shape[0] * (at + padded(w.shape[0])) <= kept.numel()


def prepared(hidden: Tensor, targets: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Contiguous hidden states, targets and bias. Targets are copied, because an int64 view may
    start at an address that is not a multiple of 16. Kernels need a pointer even without a bias.
    """
    h = hidden.to(compute_dtype(hidden)).contiguous()
    y = targets.to(torch.int64, copy=True, memory_format=torch.contiguous_format)
    fp32 = at_least_fp32(hidden.dtype)
    return h, y, h.new_empty(1, dtype=fp32) if bias is None else bias.to(fp32).contiguous()


# The two passes. torch.compile sees each of them as one operation.


@torch.library.custom_op("plainpref::token_logps", mutates_args=())
def forward(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None,  # as in token_logps
    scale: float, softcap: float, temperature: float, entropy: bool, keep_bytes: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(T,) log-probs; (T,) entropies; (2, T) lse; (3, T, blocks) parts; kept exponentials."""
    tokens, vocab, fp32 = len(hidden), len(weight), at_least_fp32(hidden.dtype)
    (rows, columns), use_triton = tile_shape(tokens, hidden), on_triton(hidden)
    block = BLOCK if use_triton else columns
    h, y, b = prepared(hidden, targets, bias)
    kept = h.new_empty(room_to_keep(hidden, weight, keep_bytes))
    buffer = h.new_empty(rows * padded(min(columns, vocab)), dtype=fp32)
    parts = h.new_empty(3, tokens, -(-vocab // block), dtype=fp32)
    z_target = h.new_full((tokens,), torch.nan, dtype=fp32)  # NaN stays if it is no token

    with torch.autocast(hidden.device.type, enabled=False), torch.cuda.device_of(hidden):
        for at, w, keep in slices(hidden, weight, kept, columns):
            width = len(w)
            for first in range(0, tokens, rows):
                span = slice(first, min(first + rows, tokens))
                num_rows = span.stop - first
                if keep and not use_triton:  # compute the exponentials where they are kept
                    tile = matrix(kept, tokens * at, tokens, width)[span]
                else:
                    tile = matrix(buffer, 0, num_rows, width)
                product(h[span], w.T, tile)  # (t, v)
                if use_triton:
                    fold_kernel[(num_rows, -(-width // block))](
                        tile, b, y, kept, parts, z_target,
                        tokens * at, first, tokens, at, width, padded(width), parts.shape[2],
                        width if keep else 0, scale, softcap, 1 / temperature, BLOCK=block,
                        BIAS=bias is not None, SOFTCAP=softcap > 0, ENTROPY=entropy,
                        num_warps=WARPS,
                    )  # fmt: skip
                else:
                    slice_bias = None if bias is None else b[at : at + width]
                    finish_(tile, slice_bias, scale, softcap, temperature)
                    part = fold_(tile, y[span] - at, z_target[span], entropy)
                    parts[:, span, at // columns] = part

    m, sums, tilts = parts
    # lse stays split into top + log_sum. Near -100 their fp32 sum would be off by up to 4e-6, which
    # would move all p of a row in the same direction.
    top = m.amax(1)
    log_sum = (sums * (m - top[:, None]).exp()).sum(1).log()
    logps = torch.where(y == IGNORED, 0.0, z_target - top - log_sum)
    entropies = torch.zeros_like(logps)
    if entropy:
        # Σ p (lse - z), computed relative to the maxima so that only non-negative terms are added.
        # A block of -inf has a sum of 0; clamping avoids 0 * inf = NaN.
        shift = (m.clamp(min=torch.finfo(fp32).min) - top[:, None]) - log_sum[:, None]
        entropies -= (shift.exp() * (tilts + shift * sums)).sum(1).masked_fill(y == IGNORED, 0.0)
    return logps, entropies, torch.stack([top, log_sum]), parts, kept


@torch.library.custom_op("plainpref::token_logps_backward", mutates_args=())
def backward(
    grads: Tensor, entropy_grads: Tensor,  # (T,) of the log-probs and entropies
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None,
    scale: float, softcap: float, temperature: float, entropy: bool,
    logps: Tensor, entropies: Tensor, lse: Tensor, parts: Tensor, kept: Tensor,  # from forward
    want_hidden: bool, want_weight: bool, want_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of hidden, weight and bias; empty tensors where not wanted."""
    tokens, vocab, fp32 = len(hidden), len(weight), lse.dtype
    (rows, columns), use_triton = tile_shape(tokens, hidden), on_triton(hidden)
    block = BLOCK if use_triton else columns
    h, y, b = prepared(hidden, targets, bias)
    dhidden = hidden.new_zeros(hidden.shape if want_hidden else 0, dtype=fp32)
    dweight = weight.new_empty(weight.shape if want_weight else 0)
    dbias = hidden.new_empty(vocab if want_bias else 0, dtype=b.dtype)
    # dz is linear in g and g_H, so factors that are constant in a row are applied to them.
    factor = torch.full_like(logps, scale / temperature).masked_fill(y == IGNORED, 0.0)
    stats = (grads * factor, entropy_grads * factor, logps, -logps.expm1(), entropies, *lse)
    row_stats = torch.stack(stats)  # (7, T)
    elements = padded(min(columns, vocab))
    buffer = h.new_empty(rows * elements if use_triton else 0, dtype=fp32)
    out = h.new_empty(tokens * elements)  # not over `kept`: backward may run twice

    with torch.autocast(hidden.device.type, enabled=False), torch.cuda.device_of(hidden):
        for at, w, is_kept in slices(hidden, weight, kept, columns):
            width = len(w)
            dz = matrix(out, 0, tokens, width)  # (T, v)
            step = max(tokens, 1) if is_kept else rows
            for first in range(0, tokens, step):
                span = slice(first, min(first + step, tokens))
                num_rows = span.stop - first
                if not is_kept:
                    tile = matrix(buffer, 0, num_rows, width) if use_triton else dz[span]
                    product(h[span], w.T, tile)
                if use_triton:
                    dlogits_kernel[(num_rows, -(-width // block))](
                        kept if is_kept else tile, out, b, y, row_stats, parts,
                        tokens * at if is_kept else 0, first, tokens, at, width, padded(width),
                        parts.shape[2], scale, softcap, 1 / temperature, BLOCK=block,
                        BIAS=bias is not None, SOFTCAP=softcap > 0, ENTROPY=entropy, KEPT=is_kept,
                        num_warps=WARPS,
                    )  # fmt: skip
                    continue
                if not is_kept:
                    slice_bias = None if bias is None else b[at : at + width]
                    finish_(tile, slice_bias, scale, softcap, temperature)
                exponentials = matrix(kept, tokens * at, tokens, width) if is_kept else None
                dlogits_(
                    dz[span], exponentials, parts[0, span, at // columns], y[span] - at,
                    row_stats[:, span], softcap, temperature, entropy,
                )  # fmt: skip
            if want_weight:
                product(dz.T, h, dweight[at : at + width])
            if want_hidden:
                product(dz, w, dhidden, add=True)
            if want_bias:
                dbias[at : at + width] = dz.sum(0, dtype=fp32)
    return dhidden.to(hidden.dtype), dweight, dbias if bias is None else dbias.to(bias.dtype)


@forward.register_fake
def _(hidden, weight, targets, bias, scale, softcap, temperature, entropy, keep_bytes):
    tokens, vocab = hidden.shape[0], weight.shape[0]
    block = BLOCK if on_triton(hidden) else tile_shape(tokens, hidden)[1]
    rows = hidden.new_empty(tokens, dtype=at_least_fp32(hidden.dtype))
    kept = hidden.new_empty(room_to_keep(hidden, weight, keep_bytes), dtype=compute_dtype(hidden))
    parts = rows.new_empty(3, tokens, -(-vocab // block))
    return rows, torch.empty_like(rows), rows.new_empty(2, tokens), parts, kept


@backward.register_fake
def _(grads, entropy_grads, hidden, weight, targets, bias, *rest):
    given, wanted = (hidden, weight, hidden if bias is None else bias), rest[-3:]
    return tuple(
        torch.empty_like(tensor) if want else tensor.new_empty(0)
        for tensor, want in zip(given, wanted, strict=True)
    )


def save(ctx, inputs, output) -> None:
    hidden, weight, targets, bias, *ctx.settings, _ = inputs
    ctx.save_for_backward(hidden, weight, targets, bias, *output)
    ctx.set_materialize_grads(False)  # else torch makes zeros as large as `kept`


def differentiate(ctx, grads, entropy_grads, *_):
    hidden, weight, targets, bias, logps, *rest = ctx.saved_tensors
    zeros = torch.zeros_like(logps)
    wanted = [ctx.needs_input_grad[i] for i in (0, 1, 3)]
    found = torch.ops.plainpref.token_logps_backward(
        zeros if grads is None else grads, zeros if entropy_grads is None else entropy_grads,
        hidden, weight, targets, bias, *ctx.settings, logps, *rest, *wanted,
    )  # fmt: skip
    dhidden, dweight, dbias = (g if want else None for g, want in zip(found, wanted, strict=True))
    return dhidden, dweight, None, dbias, None, None, None, None, None


forward.register_autograd(differentiate, setup_context=save)


def token_logps(
    hidden: Tensor,  # (T, H) states from which the targets are predicted
    weight: Tensor,  # (V, H)
    targets: Tensor,  # (T,) token ids; -100: log-prob 0, entropy 0, no gradient
    bias: Tensor | None = None,  # (V,)
    softcap: float | None = None,  # Gemma 2: logits = softcap * tanh(logits / softcap)
    scale: float = 1.0,  # Cohere, Granite: multiplies the logits before the softcap
    temperature: float = 1.0,  # divides them after the softcap
    entropy: bool = False,
    keep_bytes: int | None = None,  # None: 1/16 of a GPU's memory; CPU: see room_to_keep
) -> Tensor | tuple[Tensor, Tensor]:
    """(T,) log p(target) in fp32, or float64 for float64; with `entropy` also (T,) entropies."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        hidden = hidden.to(torch.get_autocast_dtype(device))
    given = (hidden, weight) if bias is None else (hidden, weight, bias)
    if not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given)):
        keep_bytes = 0  # scoring only: there will be no backward pass
    logps, entropies, *_ = torch.ops.plainpref.token_logps(
        hidden, weight, targets, bias, float(scale), float(softcap or 0.0), float(temperature),
        entropy, keep_bytes,
    )  # fmt: skip
    return (logps, entropies) if entropy else logps
