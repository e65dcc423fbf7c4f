"""Sampling: batched, with a key-value cache, imported only where something is generated.

What a row gets does not depend on its batch mates, on the number of processes or on what was drawn
before: token t of sample k of prompt i is found with the one uniform number that belongs to
(seed, i, k, t), by inverting the cumulative distribution.

How a batch goes: its prompts, padded on the left, go through the model once; what the cache then
holds of each is copied for each of its K samples; from there on every row adds a token a pass. Rows
that have ended leave the batch, and nothing more is computed for them.

A model that is spread over processes (--fsdp) is put together on each of them while it samples, for
else all weights would travel for every token. That costs each process the memory of one whole model
in the dtype that it computes with, and is said when it happens; in return no process waits for
another within a batch.

`sample_and_score` keeps what it has made in the cache (`--cache-dir`), in a file named by all that
samples and scores depend on: a run that was killed goes on with the same ones, to the last token,
and so does another run that only learns from them in another way.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import numpy as np
import torch
from torch import Tensor, nn

import common

GIB = 2**30


@torch.no_grad()
def generate(
    policy: nn.Module,
    prompts: list[np.ndarray],  # token ids, BOS included
    stop_ids: frozenset[int],
    max_new_tokens: int,
    temperature: float,  # 0: greedy
    seed: int,
    run: "common.Processes",
    batch_size: int = 256,  # sequences; all samples of a prompt are in one batch
    label: str = "sampling",
    samples: int = 1,  # K, a prompt
    top_k: int = 0,  # only so many of the likeliest tokens are drawn; 0: all
    first: int = 0,  # the number of the first prompt, where these are a part of a list
) -> list[np.ndarray]:
    """K responses a prompt, one prompt's after another's, on every process; a response that reached
    its end has the stop token at its end.
    """
    if temperature == 0 and samples > 1:
        raise ValueError(f"greedy (temperature 0) gives {samples} equal samples: ask for one")
    softcap = getattr(policy.config, "attn_logit_softcapping", None)
    eager = policy.config._attn_implementation == "eager" or softcap
    each = -(-len(prompts) // run.world)  # so that no process is without work
    size = max(1, min(batch_size // samples, each))  # prompts
    if policy.dtype == torch.float64 and eager:
        size = 1  # Transformers' eager softmax is fp32: there a row of padding alone is NaN
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    parts = [order[at : at + size] for at in range(0, len(order), size)]
    found = torch.full((len(prompts), samples, max_new_tokens), -1, dtype=torch.int32)
    drawn, begin = 0, time.perf_counter()
    _say_what_spread_costs(policy)
    with _attention_for_sampling(policy), common.weights_together(policy):
        for part, mine in run.share(parts, label):
            # One stream of uniforms a row: not moved by who else is in the batch. For numpy
            # [seed, i, 0] is [seed, i], so the first sample of many is that of one alone.
            streams = [
                np.random.default_rng([seed, first + i, k]).random(max_new_tokens)
                for i in part
                for k in range(samples)
            ]
            with common.autocast(policy):  # around all tokens: the low weights are made once
                new = _generate_batch(
                    policy,
                    [prompts[i] for i in part],
                    stop_ids,
                    max_new_tokens,
                    temperature,
                    torch.from_numpy(np.stack(streams)),
                    samples,
                    top_k,
                )
            if not mine:
                continue
            found[part] = new.view(len(part), samples, -1).to("cpu", torch.int32)
            drawn += int((new >= 0).sum())
            if bar := getattr(run, "inner_bar", None):
                speed = drawn * run.world / (time.perf_counter() - begin)  # the others do as much
                bar.set_postfix_str(f"{speed:,.0f} tok/s", refresh=False)
    if run.world > 1:  # every row was made by one process; elsewhere it is -1
        torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
    return [row[row >= 0].numpy() for row in found.flatten(0, 1)]


def _say_what_spread_costs(policy: nn.Module) -> None:
    spread = hasattr(next(policy.parameters()), "full_tensor")
    if spread and not getattr(policy, "sampling_cost_said", False):
        policy.sampling_cost_said = True
        held = sum(p.numel() for p in policy.parameters()) * policy.compute_dtype.itemsize / GIB
        common.say("sampling", f"all weights together on each process: {held:.2f} GiB more there")


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
    uniforms: Tensor,  # (B * K, max_new_tokens) in [0, 1)
    samples: int = 1,  # K
    top_k: int = 0,
) -> Tensor:
    """(B * K, max_new_tokens) new tokens, -1 after the end of a row."""
    device, width = policy.device, max(map(len, prompts))
    ids = torch.zeros(len(prompts), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    # Padded on the left, so that all rows grow on the right together.
    for i, prompt in enumerate(prompts):
        ids[i, width - len(prompt) :] = torch.from_numpy(prompt.astype(np.int64))
        mask[i, width - len(prompt) :] = 1
    ids, mask, uniforms = ids.to(device), mask.to(device), uniforms.to(device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)  # a row's first real token is at position 0
    stops = torch.tensor(sorted(stop_ids), device=device)
    found = torch.full(uniforms.shape, -1, device=device)
    rows = torch.arange(len(found), device=device)  # which row of `found` a row of the batch is
    cache = None
    for t in range(max_new_tokens):
        out = policy(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache,
            use_cache=True, logits_to_keep=1,
        )  # fmt: skip
        cache, logits, positions = out.past_key_values, out.logits[:, -1], positions[:, -1:]
        if t == 0 and samples > 1:  # the prompts are done: from B rows to B * K
            cache.batch_repeat_interleave(samples)
            logits, mask, positions = (
                x.repeat_interleave(samples, 0) for x in (logits, mask, positions)
            )
        token = _draw(logits, temperature, top_k, uniforms[rows, t, None])
        found[rows, t] = token
        left = (~torch.isin(token, stops)).nonzero()[:, 0]
        if not len(left):
            break
        if len(left) < len(rows):  # the others have ended: go on without them
            cache.batch_select_indices(left)
            token, mask, positions, rows = (x[left] for x in (token, mask, positions, rows))
        ids, positions = token[:, None], positions + 1
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], 1)
    return found


def _draw(logits: Tensor, temperature: float, top_k: int, uniforms: Tensor) -> Tensor:
    """(R,) tokens: of each row of logits (R, V) the one that its uniform number (R, 1) is for."""
    device, logits = logits.device, logits.double()
    if temperature == 0:
        return logits.argmax(-1)
    among = None
    if 0 < top_k < logits.shape[-1]:
        # Of those level with the last that may be drawn, the lower ids: always exactly so many.
        least = logits.topk(top_k).values[:, -1:]
        above, level = logits > least, logits == least
        kept = above | (level & (level.cumsum(-1) <= top_k - above.sum(-1, keepdim=True)))
        among = kept.nonzero()[:, 1].view(-1, top_k)  # (R, top_k) ids, in their order
        logits = logits.gather(-1, among)
    # The uniform is scaled to the last entry, not to 1: rounding never steps past the end.
    # CUDA's cumsum is not the same bit for bit, so --deterministic would refuse it there.
    exact = torch.are_deterministic_algorithms_enabled()
    probabilities = logits.div_(temperature).softmax(-1)  # a vocabulary wide, in float64
    del logits
    cumulative = probabilities.to("cpu" if exact else device).cumsum_(-1)
    at = uniforms.to(cumulative) * cumulative[:, -1:]
    place = torch.searchsorted(cumulative, at, right=True).to(device)
    place = place.clamp(max=cumulative.shape[-1] - 1)
    return (place if among is None else among.gather(-1, place))[:, 0]


def text_of(ids: np.ndarray, tokenizer) -> str:
    """A response as text, without its end."""
    return tokenizer.decode([int(i) for i in ids if int(i) not in tokenizer.stop_ids])
