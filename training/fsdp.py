"""--fsdp: weights, gradients and optimizer state are sharded over the processes (PyTorch's FSDP2).

Each decoder layer is gathered for its forward pass and again for its backward pass. The rest
(embeddings, last norm, head) is gathered once for a forward and backward pass. Gradients are summed
over processes, not averaged: the losses are already divided by counts of the whole step.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from training import gradients


def empty_model(config: Any, attention: str | None, kind: type) -> nn.Module:
    """A model with uninitialised weights, for processes that receive them from the main process.

    Memory that is never written costs nothing. `kind` is an Auto class of Transformers.
    """
    with torch.device("meta"):
        model = kind.from_config(config, dtype=torch.float32, attn_implementation=attention)
    model.to_empty(device="cpu")
    model.tie_weights()
    return model


def shard(policy: nn.Module, layers: nn.ModuleList, device: torch.device) -> None:
    """Shard the main process's weights, in place on every process.

    `layers` are its decoder layers. `policy` has compute_dtype and optionally next_logits(), which
    is called inside gathered(). Its forward() must not return a view.
    """
    tensors = {}
    if dist.get_rank() == 0:
        named = [*policy.named_parameters(), *policy.named_buffers()]
        tensors = {name: tensor.detach() for name, tensor in named}
    # Under autocast, a linear layer keeps a low-precision copy of its weights until the backward
    # pass. Gathering weights in low precision needs no copy, and half the traffic. Hidden states
    # between the layers stay in fp32, as without sharding.
    low = policy.compute_dtype if policy.compute_dtype.itemsize < 4 else None
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    precision = MixedPrecisionPolicy(
        param_dtype=low, reduce_dtype=torch.float32 if low else None, cast_forward_inputs=False
    )
    for module in policy.modules() if low else ():
        if isinstance(module, nn.LayerNorm):
            module.forward = partial(_layer_norm, module)
    for part in [*layers, policy]:
        fully_shard(part, mesh=mesh, mp_policy=precision)
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)  # gloo cannot sum with a factor
    policy.register_forward_pre_hook(gradients.sum_in_last_pass)
    # After fully_shard, so that it runs after FSDP's own hook.
    policy.register_forward_hook(_reshard_without_gradients)
    if hasattr(policy, "next_logits"):
        register_fsdp_forward_method(policy, "next_logits")
    # One tensor at a time: only the main process ever holds all of them.
    for name, tensor in [*policy.named_parameters(), *policy.named_buffers()]:
        source = tensors.pop(name, None)
        if source is None:
            source = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        source = source.to(device).contiguous()  # NCCL sends it from GPU to GPU
        for piece in source.view(-1).view(torch.uint8).split(2**28):  # gloo: at most 2 GiB
            dist.broadcast(piece, 0)
        copy_into(tensor, source)


def _reshard_without_gradients(policy: nn.Module, inputs: Any, output: Any) -> None:
    """With gradients, the backward pass reshards the policy. Without, nothing else would."""
    if not torch.is_grad_enabled():
        policy.reshard()


def _layer_norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """Compute in the hidden states' precision. Autocast ensures that on GPUs only."""
    weight, bias = (None if p is None else p.to(x.dtype) for p in (norm.weight, norm.bias))
    return F.layer_norm(x, norm.normalized_shape, weight, bias, norm.eps)


@torch.no_grad()
def copy_into(tensor: Tensor, source: Any) -> None:
    """Copy this process's rows of `source` (a tensor or a safetensors slice) into a sharded tensor;
    all of them if the tensor is not sharded.
    """
    if isinstance(tensor, DTensor):
        rows_each = -(-tensor.shape[0] // dist.get_world_size())
        first = min(dist.get_rank() * rows_each, tensor.shape[0])
        tensor.to_local().copy_(source[first : min(first + rows_each, tensor.shape[0])])
    else:
        tensor.copy_(source)


def full_tensor(tensor: Tensor) -> Tensor:
    """The full tensor, on every process."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def reshard(module: nn.Module) -> None:
    """Shard every part of the module again, wherever the run was interrupted."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


@contextmanager
def gathered(policy: nn.Module) -> Iterator[None]:
    """Hold all weights on every process, in the compute dtype.

    For sampling, which would otherwise gather every layer again for every token.
    """
    parts = [part for part in policy.modules() if isinstance(part, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(part is not policy, recurse=False)
        reshard(policy)
