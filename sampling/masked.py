"""Policies of nlpo.py: one says which tokens are allowed, the other chooses among them.

Which tokens are allowed is stored as bits, and logits are computed for a few positions at a time:
with 256,000 tokens, all logits of a micro-batch would take gigabytes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import common
from sampling.generate import top_p_tokens

MOST = 2**23  # logits at a time


class MaskingPolicy(common.Policy):
    """As a function from a batch to its top-p tokens at each response token."""

    def forward(
        self, batch: common.MicroBatch, temperature: float, top_p: float
    ) -> tuple[Tensor, Tensor]:
        """(N, V / 8) the allowed tokens as bits; and (B, K, T) how many they are."""
        with self.autocast():
            hidden, found = self.hidden_states(batch, batch.target_positions), []
            for h, targets in in_parts(self, hidden, batch.targets):
                allowed = top_p_tokens(logits_of(self, h), top_p, temperature)
                # Sampling rounds differently: a token at the edge of the set may have been in it.
                allowed.scatter_(1, targets[:, None], True)
                found.append((packed(allowed), allowed.sum(1)))
        bits, counts = (torch.cat(parts) for parts in zip(*found, strict=True))
        return bits, common.scatter_to_responses(counts, batch)

    @torch.no_grad()
    def copy_weights(self, policy: common.Policy) -> None:
        for ours, theirs in zip(self.parameters(), policy.parameters(), strict=True):
            ours.copy_(theirs)


class MaskedPolicy(common.Policy):
    """With a mask, a function from a batch to log-probs among the allowed tokens."""

    def forward(
        self, batch: common.MicroBatch, temperature: float = 1.0, allowed: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """With `allowed`: (B, K, T) log-probs that are renormalised over these tokens; and the
        probability of all other tokens together.
        """
        if allowed is None:
            return super().forward(batch, temperature)

        def logps_of(h: Tensor, targets: Tensor, bits: Tensor) -> Tensor:
            logits = logits_of(self, h) / temperature  # (n, V)
            total = logits.masked_fill(~unpacked(bits, logits.shape[1]), -torch.inf).logsumexp(1)
            logps = logits.gather(1, targets[:, None])[:, 0] - total
            masked = -torch.expm1(total - logits.logsumexp(1)).detach()
            return torch.stack([logps, masked])

        with self.autocast():
            hidden = self.hidden_states(batch, batch.target_positions)  # (N, H)
            found = [  # the backward pass computes the logits again
                checkpoint(logps_of, *part, use_reentrant=False, preserve_rng_state=False)
                for part in in_parts(self, hidden, batch.targets, allowed)
            ]
        return tuple(common.scatter_to_responses(x, batch) for x in torch.cat(found, 1))


def in_parts(policy: common.Policy, *tensors: Tensor) -> zip:
    """The tensors (N, ...) cut into few positions at a time."""
    size = max(1, MOST // policy.lm.get_output_embeddings().weight.shape[0])
    return zip(*(x.split(size) for x in tensors), strict=True)


def logits_of(policy: common.Policy, hidden: Tensor) -> Tensor:
    """(n, V) in fp32 or better, from (n, H); as kernels/head.py computes them."""
    head, config = policy.lm.get_output_embeddings(), policy.config
    softcap = getattr(config, "final_logit_softcapping", None)
    scale = getattr(config, "logit_scale", None)
    logits = F.linear(hidden, head.weight, head.bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logits = logits * float(scale or 1.0 / (getattr(config, "logits_scaling", None) or 1.0))
    return softcap * torch.tanh(logits / softcap) if softcap else logits


def packed(allowed: Tensor) -> Tensor:
    """(n, ceil(V / 8)) uint8 from (n, V) bool."""
    eights = F.pad(allowed, (0, -allowed.shape[1] % 8)).unflatten(1, (-1, 8))
    return (eights * weights_of_bits(allowed)).sum(-1, dtype=torch.uint8)


def unpacked(bits: Tensor, size: int) -> Tensor:
    """(n, size) bool."""
    return ((bits[..., None] & weights_of_bits(bits)) > 0).flatten(1)[:, :size]


def weights_of_bits(like: Tensor) -> Tensor:
    return 2 ** torch.arange(8, dtype=torch.uint8, device=like.device)
