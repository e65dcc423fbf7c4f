"""Log-probs of tokens from hidden states, without the logits of prompts and padding."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def token_logps(policy: Any, hidden: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """(N,) in fp32 or better, from the hidden states (N, H) before the target tokens (N,)."""
    head, config = policy.lm.get_output_embeddings(), policy.config
    softcap = getattr(config, "final_logit_softcapping", None)  # Gemma 2
    scale = getattr(config, "logit_scale", None)  # Cohere; Granite divides
    scale = float(scale or 1.0 / (getattr(config, "logits_scaling", None) or 1.0))
    if policy.fused_logps:
        from kernels import token_logps as kernel

        return kernel.token_logps(
            hidden, head.weight, targets, head.bias, softcap, scale, temperature
        )
    logits = F.linear(hidden, head.weight, head.bias)  # (N, V)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    return -F.cross_entropy(logits / temperature, targets, reduction="none")


@torch.no_grad()
def check(policy: Any) -> None:
    """Raise if our log-probs are not the model's own: its head does more than we know."""
    lm = policy.lm
    if type(head := lm.get_output_embeddings()) is not nn.Linear:
        raise ValueError(f"the output layer is a {type(head).__name__}, not a plain linear layer")
    ids = torch.arange(1, 5, device=lm.device)[None]  # (1, 4)
    own = lm(input_ids=ids, use_cache=False).logits[0].double().log_softmax(-1)  # (4, V)
    hidden = lm.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]  # (4, H)
    # The most and the least likely token: a softcap or a scale changes them most.
    targets = torch.cat([own.argmax(-1), own.argmin(-1)])
    ours = token_logps(policy, torch.cat([hidden, hidden]), targets).double()
    theirs = torch.cat([own, own]).gather(1, targets[:, None])[:, 0]
    if not torch.allclose(theirs, ours, atol=1e-3, rtol=0):
        raise ValueError(f"the output layer of {type(lm).__name__} does more than we know")
