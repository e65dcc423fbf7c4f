"""Sampling from a policy: batched, with a key-value cache.

Token t of sample k of prompt i is found by inverting the cumulative distribution at the one uniform
number that belongs to (seed, i, k, t). So in fp32 a sample does not depend on the other rows of its
batch or on the number of processes, up to rounding; bfloat16 products change with the batch size.

Prompts, padded on the left, go through the model once. The cache is then copied for each of the K
samples, and every row grows by one token per forward pass. Rows that have ended leave the batch.
With --fsdp, each process holds all weights in the compute dtype while it samples.
"""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from training.parallel import progress_bar

MOST = 256  # sequences in a batch: more are hardly faster
EXTRA_TOKENS = 64  # that a cache has room for


@torch.no_grad()
def generate(
    policy: nn.Module,  # common.Policy
    prompts: list[np.ndarray],  # token ids, BOS included
    stop_ids: frozenset[int],
    max_new_tokens: int,
    temperature: float,  # 0: greedy
    seed: int,
    run: Any,  # common.Processes
    batch_size: int | None = None,  # sequences; all samples of a prompt are in one batch
    label: str = "sampling",  # of the progress bar
    samples: int = 1,  # K responses per prompt
    top_k: int = 0,  # draw from the k most likely tokens only; 0: from all
    first: int = 0,  # number of the first prompt, if these are part of a longer list
    masking: nn.Module | None = None,  # draw from the most likely tokens of this policy only (NLPO)
    top_p: float = 1.0,  # which have this probability together
) -> list[np.ndarray]:
    """Return K responses per prompt, prompt by prompt, on every process.

    A response that was finished ends with its stop token.
    """
    policies = [policy, masking] if masking else [policy]
    if temperature == 0 and samples > 1:
        raise ValueError(f"greedy decoding gives {samples} equal samples: ask for one")
    config = policy.lm.config
    softcap = getattr(config, "attn_logit_softcapping", None)
    eager = config._attn_implementation == "eager" or softcap
    per_process = -(-len(prompts) // run.world)  # so that no process is left without work
    longest = max(map(len, prompts), default=0) + max_new_tokens
    batch_size = batch_size or fitting(policy, longest, len(policies))
    size = max(1, min(batch_size // samples, per_process))  # prompts in a batch
    if policy.lm.dtype == torch.float64 and eager:
        size = 1  # Transformers computes this softmax in fp32, where a row of padding is NaN
    longest_first = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    parts = [longest_first[at : at + size] for at in range(0, len(prompts), size)]
    found = torch.full((len(prompts), samples, max_new_tokens), -1, dtype=torch.int32)
    with ExitStack() as stack:
        for each in policies:
            stack.enter_context(_ready_to_sample(each))
        for part, mine in run.share(parts, label):
            # NumPy seeds [seed, i] and [seed, i, 0] alike: one sample is the first of many.
            uniforms = [
                np.random.default_rng([seed, first + i, k]).random(max_new_tokens)
                for i in part
                for k in range(samples)
            ]
            with policy.autocast():  # around all tokens, so that weights are cast once
                new = _generate_batch(
                    policies,
                    [prompts[i] for i in part],
                    stop_ids,
                    temperature,
                    torch.from_numpy(np.stack(uniforms)),
                    samples,
                    top_k,
                    top_p,
                    label,
                )
            if mine:
                found[part] = new.view(len(part), samples, -1).to("cpu", torch.int32)
    if run.world > 1:  # each row was made by one process and is -1 on the others
        torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
    return [row[row >= 0].numpy() for row in found.flatten(0, 1)]


def bytes_of(policy: nn.Module, length: int) -> int:
    """Memory for a sequence of `length` tokens: its cache, and what drawing a token needs."""
    config = policy.lm.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cache = 2 * config.num_hidden_layers * heads * size * policy.compute_dtype.itemsize  # a token
    drawing = 20 * config.vocab_size  # logits, probabilities, their sums in float64
    return cache * (length + EXTRA_TOKENS) + drawing


def fitting(policy: nn.Module, length: int, caches: int = 1) -> int:
    """How many sequences of `length` tokens take a third of the device's memory.

    Not of the free memory: a run that continues must sample in the same batches.
    """
    device = policy.lm.device
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    elif hasattr(os, "sysconf"):
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    else:
        return MOST
    return max(1, min(MOST, memory // 3 // (caches * bytes_of(policy, length))))


def new_cache(policy: nn.Module) -> Any:
    """Keys and values in the compute dtype. Rotary embeddings would make keys fp32, and attention
    converts them back under autocast: twice the memory for the same numbers.

    Layers without a window keep room for the next tokens. Transformers' own copy all keys and
    values for every token.
    """
    from transformers.cache_utils import DynamicCache, DynamicLayer

    class Cache(DynamicCache):
        def update(self, keys: Tensor, values: Tensor, *args: Any, **more: Any) -> tuple:
            low = policy.compute_dtype
            return super().update(keys.to(low), values.to(low), *args, **more)

    class RoomyLayer(DynamicLayer):
        room: tuple[Tensor, Tensor] | None = None  # keys and values, with space for more tokens

        def update(self, keys: Tensor, values: Tensor, *args: Any, **more: Any) -> tuple:
            if not self.is_initialized:
                self.lazy_initialization(keys, values)
            before = self.get_seq_length()
            after = before + keys.shape[-2]
            if self.room is None or after > self.room[0].shape[-2]:
                self.room = tuple(
                    x.new_empty(*x.shape[:-2], after + EXTRA_TOKENS, x.shape[-1])
                    for x in (keys, values)
                )
                for room, old in zip(self.room, (self.keys, self.values), strict=True):
                    if before:
                        room[..., :before, :] = old
            for room, new in zip(self.room, (keys, values), strict=True):
                room[..., before:after, :] = new
            self.keys, self.values = (room[..., :after, :] for room in self.room)
            return self.keys, self.values

        def batch_repeat_interleave(self, repeats: int) -> None:
            self.room = None  # frees it before the next layer is copied
            super().batch_repeat_interleave(repeats)

        def batch_select_indices(self, indices: Tensor) -> None:
            self.room = None
            super().batch_select_indices(indices)

    cache = Cache(config=policy.lm.config)
    own = [type(layer) is DynamicLayer for layer in cache.layers]
    cache.layers = [RoomyLayer() if x else y for x, y in zip(own, cache.layers, strict=True)]
    return cache


@contextmanager
def _ready_to_sample(policy: nn.Module) -> Iterator[None]:
    """Gather sharded weights, and avoid recompilation: the cache grows with every token, and
    flex_attention and compiled layers would be compiled again for each length.
    """
    lm, attention = policy.lm, policy.lm.config._attn_implementation
    with ExitStack() as stack:
        if hasattr(next(policy.parameters()), "full_tensor"):  # sharded
            from training.fsdp import gathered

            stack.enter_context(gathered(policy))
        if getattr(policy, "compiled", False):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        if attention == "flex_attention":
            softcap = getattr(lm.config, "attn_logit_softcapping", None)
            lm.set_attn_implementation("eager" if softcap else "sdpa")
            stack.callback(lm.set_attn_implementation, attention)
        yield


def _generate_batch(
    policies: list[nn.Module],  # the policy; and the masking policy, if there is one
    prompts: list[np.ndarray],
    stop_ids: frozenset[int],
    temperature: float,
    uniforms: Tensor,  # (B * K, max_new_tokens) in [0, 1)
    samples: int,  # K
    top_k: int,
    top_p: float,
    label: str,
) -> Tensor:
    """Return (B * K, max_new_tokens) new tokens, -1 after the end of a row."""
    device, width = policies[0].lm.device, max(map(len, prompts))
    ids = torch.zeros(len(prompts), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, prompt in enumerate(prompts):  # padded on the left: all rows grow on the right
        ids[i, width - len(prompt) :] = torch.from_numpy(prompt.astype(np.int64))
        mask[i, width - len(prompt) :] = 1
    ids, mask, uniforms = ids.to(device), mask.to(device), uniforms.to(device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)  # a row's first real token has position 0
    stops = torch.tensor(sorted(stop_ids), device=device)
    found = torch.full(uniforms.shape, -1, device=device)
    rows = torch.arange(len(found), device=device)  # the row of `found` of each row of the batch
    caches = [new_cache(policy) for policy in policies]
    for t in progress_bar(range(uniforms.shape[1]), f"{label}, tokens"):
        logits, *of_mask = [
            policy.next_logits(
                input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache,
                use_cache=True, logits_to_keep=1,
            ).logits[:, -1]
            for policy, cache in zip(policies, caches, strict=True)
        ]  # fmt: skip
        positions = positions[:, -1:]
        if of_mask:
            allowed = top_p_tokens(of_mask[0], top_p, temperature or 1.0)
            logits = logits.masked_fill(~allowed, -torch.inf)
        if t == 0 and samples > 1:  # from B prompts to B * K rows
            for cache in caches:
                cache.batch_repeat_interleave(samples)
            logits, mask, positions = (
                x.repeat_interleave(samples, 0) for x in (logits, mask, positions)
            )
        token = _draw(logits, temperature, top_k, uniforms[rows, t, None])
        found[rows, t] = token
        unfinished = (~torch.isin(token, stops)).nonzero()[:, 0]
        if not len(unfinished):
            break
        if len(unfinished) < len(rows):
            for cache in caches:
                cache.batch_select_indices(unfinished)
            token, mask, positions, rows = (x[unfinished] for x in (token, mask, positions, rows))
        ids, positions = token[:, None], positions + 1
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], 1)
    return found


def _draw(logits: Tensor, temperature: float, top_k: int, uniforms: Tensor) -> Tensor:
    """Return (R,) tokens: of each row of logits (R, V), the one at its uniform number (R, 1)."""
    device = logits.device
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if temperature == 0:
        return logits.argmax(-1)
    if 0 < top_k < logits.shape[-1]:  # tokens that tie with the k-th stay, as in Transformers
        kth = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    cumulative = _cumulative((logits / temperature).softmax(-1))
    # The uniform is scaled to the last entry, not to 1: rounding never steps past the end.
    target = uniforms.to(cumulative) * cumulative[:, -1:]
    place = torch.searchsorted(cumulative, target, right=True)[:, 0].to(device)
    return place.clamp(max=logits.shape[-1] - 1)


def top_p_tokens(logits: Tensor, top_p: float, temperature: float = 1.0) -> Tensor:
    """(R, V) bool: of each row of logits, the smallest set of tokens with this probability.

    Tokens that tie with its last one belong to it.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    probabilities = (logits / temperature).softmax(-1)
    ordered = probabilities.sort(-1, descending=True).values
    cumulative = _cumulative(ordered).to(logits.device)
    size = (cumulative < top_p).sum(-1, keepdim=True) + 1  # the token that reaches top_p is in
    last = ordered.gather(-1, size.clamp(max=logits.shape[-1]) - 1)
    return probabilities >= last


def _cumulative(probabilities: Tensor) -> Tensor:
    # CUDA's cumsum is not bit for bit reproducible, so --deterministic would refuse it.
    if torch.are_deterministic_algorithms_enabled():
        probabilities = probabilities.cpu()
    return probabilities.cumsum(-1, dtype=torch.float64)


def text_of(ids: np.ndarray, tokenizer: Any) -> str:
    """Return a response as text, without its end."""
    return tokenizer.decode([int(i) for i in ids if int(i) not in tokenizer.stop_ids])
