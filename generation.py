"""Sampling: batched, with a key-value cache, imported only where something is generated.

What a row gets does not depend on its batch mates, on the number of processes or on what was drawn
before: token t of row i is found with the one uniform number that belongs to (seed, i, t), by
inverting the cumulative distribution.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import numpy as np
import torch
from torch import Tensor, nn

import common


@torch.no_grad()
def generate(
    policy: nn.Module,
    prompts: list[np.ndarray],  # token ids, BOS included
    stop_ids: frozenset[int],
    max_new_tokens: int,
    temperature: float,  # 0: greedy
    seed: int,
    run: "common.Run",
    batch_size: int = 256,
    label: str = "sampling",
) -> list[np.ndarray]:
    """One response a prompt, on every process; a response that reached its end has the stop token
    at its end.
    """
    softcap = getattr(policy.config, "attn_logit_softcapping", None)
    eager = policy.config._attn_implementation == "eager" or softcap
    if policy.dtype == torch.float64 and eager:
        batch_size = 1  # Transformers' eager softmax is fp32: there a row of padding alone is NaN
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    parts = [order[at : at + batch_size] for at in range(0, len(order), batch_size)]
    found = torch.full((len(prompts), max_new_tokens), -1, dtype=torch.int64)
    with _attention_for_sampling(policy), common.weights_together(policy):
        for part, _ in run.share(parts, label):
            # One stream of uniforms a row: not moved by who else is in the batch.
            streams = [np.random.default_rng([seed, i]).random(max_new_tokens) for i in part]
            new = _generate_batch(
                policy,
                [prompts[i] for i in part],
                stop_ids,
                max_new_tokens,
                temperature,
                torch.from_numpy(np.stack(streams)),
            )
            found[part, : new.shape[1]] = new.cpu()
    if run.world > 1:  # every row was made by one process; elsewhere it is -1
        torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
    return [row[row >= 0].numpy().astype(np.int32) for row in found]


@contextmanager
def _attention_for_sampling(policy: nn.Module) -> Iterator[None]:
    """flex_attention would be compiled again for every length of the cache; and so would compiled
    layers, each for itself, until no graph is left for training.
    """
    asked, compiled = policy.config._attn_implementation, getattr(policy, "compiled", False)
    flex = asked == "flex_attention"
    if flex:
        softcap = getattr(policy.config, "attn_logit_softcapping", None)
        policy.set_attn_implementation("eager" if softcap else "sdpa")
    try:
        with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
            yield
    finally:
        if flex:
            policy.set_attn_implementation(asked)


def _generate_batch(
    policy: nn.Module,
    prompts: list[np.ndarray],
    stop_ids: frozenset[int],
    max_new_tokens: int,
    temperature: float,
    uniforms: Tensor,  # (B, max_new_tokens) in [0, 1)
) -> Tensor:
    """(B, T) new tokens, -1 after the end of a row."""
    device, width = policy.device, max(map(len, prompts))
    ids = torch.zeros(len(prompts), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, prompt in enumerate(
        prompts
    ):  # padded on the left, so that all rows grow on the right together
        ids[i, width - len(prompt) :] = torch.from_numpy(prompt.astype(np.int64))
        mask[i, width - len(prompt) :] = 1
    ids, mask, uniforms = ids.to(device), mask.to(device), uniforms.to(device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)  # a row's first real token is at position 0
    stops = torch.tensor(sorted(stop_ids), device=device)
    found = torch.full((len(prompts), max_new_tokens), -1, device=device)
    rows = torch.arange(len(prompts), device=device)  # which row of `found` a row of the batch is
    running = torch.ones_like(rows, dtype=torch.bool)
    cache = None
    for t in range(max_new_tokens):
        with common.autocast(policy):
            out = policy(
                input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache,
                use_cache=True, logits_to_keep=1,
            )  # fmt: skip
        cache, logits = out.past_key_values, out.logits[:, -1].double()  # (B, V)
        if temperature == 0:
            token = logits.argmax(-1)
        else:
            # The uniform is scaled to the last entry, not to 1: rounding never steps past the end.
            # CUDA's cumsum is not the same bit for bit, so --deterministic would refuse it there.
            exact = torch.are_deterministic_algorithms_enabled()
            cumulative = (
                (logits / temperature).softmax(-1).to("cpu" if exact else device).cumsum(-1)
            )
            at = uniforms[rows, t, None].to(cumulative) * cumulative[:, -1:]
            token = torch.searchsorted(cumulative, at, right=True)[:, 0].to(device)
            token = token.clamp(max=logits.shape[-1] - 1)
        found[rows[running], t] = token[running]
        running = running & ~torch.isin(token, stops)
        if not running.any():
            break
        ids, positions = token[:, None], positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], 1)
        if running.sum() <= len(rows) // 2:  # most have ended: go on with the others alone
            left = running.nonzero()[:, 0]
            cache.batch_select_indices(left)
            ids, positions, mask = ids[left], positions[left], mask[left]
            rows, running = rows[left], running[left]
    return found


def text_of(ids: np.ndarray, tokenizer) -> str:
    """A response as text, without its end."""
    return tokenizer.decode([int(i) for i in ids if int(i) not in tokenizer.stop_ids])
