"""Shared prompts: the responses of a prompt follow one copy of it, so it is computed only once.

A shared sequence is [prompt | y_1 | ... | y_K | padding]. A response attends to the prompt and to
itself, and its positions continue the prompt's. The log-probs equal those of K separate sequences
[prompt | y_k] up to rounding. `segments` is 0 in the prompt, k in y_k, K + 1 in the padding.
"""

import numpy as np
import torch
from torch import Tensor, nn

FLEX_BLOCK = 128  # flex_attention would compile again for lengths that its blocks do not divide


def sharing_pays(rows: list, config) -> bool:
    """Whether one sequence per prompt is cheaper than one per response, for these rows.

    Per token, a layer costs about 12 hidden^2 for its weights and 2 hidden per key. A shared
    sequence also pays for the keys of the other responses, unless flex_attention skips them. So
    long responses to a short prompt are cheaper separately.
    """
    shared_tokens, plain_tokens = max(r.tokens() for r in rows), max(r.length() for r in rows)
    sequences, hidden = max(len(r.responses) for r in rows), config.hidden_size
    skips = config._attn_implementation == "flex_attention"
    shared_cost = 6 * hidden + (shared_tokens / 2 if skips else shared_tokens)
    plain_cost = 6 * hidden + plain_tokens / 2
    return sequences > 1 and shared_tokens * shared_cost <= sequences * plain_tokens * plain_cost


def layout(rows: list, K: int, width: int, config) -> tuple:
    """input_ids, segments, positions, target_positions and ends of common.MicroBatch."""
    if config._attn_implementation == "flex_attention":
        width += -width % FLEX_BLOCK
    ids, segments, positions = np.zeros((3, len(rows), width), np.int64)
    segments += K + 1
    target_positions, ends = [], np.zeros((len(rows), K), np.int64)
    for b, row in enumerate(rows):
        start = prompt = len(row.prompt)
        ids[b, :prompt], segments[b, :prompt] = row.prompt, 0
        positions[b, :prompt] = np.arange(prompt)
        for k, response in enumerate(row.responses):
            end = start + len(response)
            ids[b, start:end], segments[b, start:end] = response, k + 1
            positions[b, start:end] = prompt + np.arange(len(response))
            # The prompt's last token predicts the first token of every response.
            before = np.array([prompt - 1, *range(start, end - 1)], np.int64)
            target_positions.append(b * width + before)
            ends[b, k] = b * width + end - 1
            start = end
    return ids, segments, positions, np.concatenate(target_positions), ends


def windows(config) -> dict[str, int | None]:
    """The kinds of attention layers, and how many positions each kind looks back (None: all)."""
    window = getattr(config, "sliding_window", None)
    default = ["sliding_attention" if window else "full_attention"]
    kinds = dict.fromkeys(getattr(config, "layer_types", None) or default)
    return {kind: window if kind == "sliding_attention" else None for kind in kinds}


def mask_and_positions(batch, lm: nn.Module, compute_dtype: torch.dtype) -> dict:
    """Inputs for a batch in the shared layout."""
    low = torch.is_autocast_enabled(batch.segments.device.type)
    dtype = compute_dtype if low else lm.dtype
    mask = attention_mask(batch.segments, batch.positions, lm.config, dtype)
    return {"attention_mask": mask, "position_ids": batch.positions}


def attention_mask(
    segments: Tensor,  # (B, L)
    positions: Tensor,  # (B, L)
    config,  # of the Transformers model
    dtype: torch.dtype,  # of the attention scores: sdpa requires the same dtype for the mask
):
    """The model's `attention_mask`: one mask, or a dict if there are several kinds of layers."""
    attention, kinds = config._attn_implementation, windows(config)
    masks = {kind: _mask(segments, positions, kinds[kind], attention, dtype) for kind in kinds}
    return masks if len(masks) > 1 else next(iter(masks.values()))


def _mask(
    segments: Tensor, positions: Tensor, window: int | None, attention: str, dtype: torch.dtype
):
    """A query sees earlier keys of the prompt and its own response, `window` positions back."""
    batch, length = segments.shape
    # A tensor even without a window, so that flex_attention compiles once for both kinds of layers.
    limit = torch.full((), window or length, device=segments.device)  # filled without a host sync

    def sees(b: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        key_segment = segments[b, k]
        visible = (k <= q) & ((key_segment == 0) | (key_segment == segments[b, q]))
        return visible & (positions[b, q] - positions[b, k] < limit)

    if attention == "flex_attention":
        from torch.nn.attention.flex_attention import create_block_mask

        return create_block_mask(sees, batch, None, length, length, segments.device)
    index = torch.arange(length, device=segments.device)
    row = torch.arange(batch, device=segments.device)[:, None, None]
    visible = sees(row, None, index[:, None], index)  # (B, L, L)
    # An additive mask works for sdpa and eager. It is finite, so that no row becomes NaN.
    mask = torch.zeros(visible.shape, dtype=dtype, device=segments.device)
    return mask.masked_fill_(~visible, torch.finfo(dtype).min)[:, None]  # (B, 1, L, L)


@torch.no_grad()
def refusal(lm: nn.Module, longest: int) -> str | None:
    """The reason why this model cannot share prompts, or None if it can.

    Found by trying at the length of the longest row, with as few layers as include every kind: a
    model may derive positions or a window from the index in the sequence.
    """
    if other := {*windows(lm.config)} - {"full_attention", "sliding_attention"}:
        return f"the model has {', '.join(sorted(other))} layers"
    attention, name = lm.config._attn_implementation, type(lm).__name__
    if attention not in ("eager", "sdpa", "flex_attention"):
        return f"{attention} does not accept a custom mask"
    n = max(2, longest // 3)  # tokens of the prompt and of each of two responses
    ids = torch.randint(lm.config.vocab_size, (3, n), generator=torch.Generator().manual_seed(0))
    prompt, first, second = ids.to(lm.device)
    segments = torch.arange(3, device=lm.device).repeat_interleave(n)[None]  # (1, 3n)
    index = torch.arange(2 * n, device=lm.device)
    positions = torch.cat([index, index[n:]])[None]  # (1, 3n)
    shared = torch.cat([prompt, first, second])[None]  # (1, 3n)
    plain = torch.stack([torch.cat([prompt, first]), torch.cat([prompt, second])])  # (2, 2n)
    kinds = getattr(lm.config, "layer_types", None) or [None]
    enough = max(2, 1 + max(kinds.index(kind) for kind in kinds))
    lists = [module for module in lm.base_model.modules() if isinstance(module, nn.ModuleList)]
    layers = next(module for module in lists if len(module) == lm.config.num_hidden_layers)
    all_layers = layers._modules
    try:
        layers._modules = dict(list(all_layers.items())[:enough])
        if attention == "flex_attention":  # it would be compiled for shapes that training never has
            lm.set_attn_implementation("eager")
        mask = attention_mask(segments, positions, lm.config, lm.dtype)
        inputs = {"attention_mask": mask, "position_ids": positions, "use_cache": False}
        found = lm.base_model(input_ids=shared, **inputs).last_hidden_state[0, n:]  # (2n, H)
        states = lm.base_model(input_ids=plain, use_cache=False).last_hidden_state  # (2, 2n, H)
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, RuntimeError, NotImplementedError, AttributeError) as error:
        return f"{name} does not accept a mask and positions ({error})"[:300].split("\n")[0]
    finally:
        layers._modules = all_layers
        if attention == "flex_attention":
            lm.set_attn_implementation(attention)
    expected = states[:, n:].flatten(0, 1)  # (2n, H)
    # Rounding is about 1e-6 of the largest state; a wrong mask or position changes 0.1 or more.
    if not (found - expected).abs().max() <= 1e-3 * expected.abs().max():
        return f"{name} ignores the mask or the positions that it is given"
    return None
