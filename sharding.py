"""--fsdp: weights, gradients and optimizer state spread over the processes (PyTorch's FSDP2).

Each process keeps a part of every tensor. A decoder layer's weights are put together when its turn
comes, in the forward pass and again in the backward pass; what is left (embeddings, the last norm,
the head) forms one more part, put together for a whole forward and backward pass. Gradients are
summed over processes and cut up again as they come. Nothing is divided by the number of processes:
losses are divided by counts of the whole step already.

Imported only with --fsdp.
"""

from collections.abc import Callable, Iterator
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

import common


def empty_policy(config: Any, attention: str | None, kind: type) -> nn.Module:
    """A model whose weights are not there yet: memory that nobody has written to costs nothing.
    Only the main process reads the file; the others are sent their parts.
    """
    with torch.device("meta"):
        policy = kind.from_config(config, dtype=torch.float32, attn_implementation=attention)
    policy.to_empty(device="cpu")
    policy.tie_weights()
    return policy


def shard(policy: nn.Module, device: torch.device) -> None:
    """Cut up the main process's weights, in place on every process."""
    tensors = {}
    if common.MAIN_PROCESS:
        named = [*policy.named_parameters(), *policy.named_buffers()]
        tensors = {name: tensor.detach() for name, tensor in named}
    # Under autocast a linear layer would keep a low copy of its weights until the backward pass.
    # Weights that are low while they are put together need no copy, and half the traffic. Hidden
    # states stay as they are without sharding: in fp32 between the layers.
    low = policy.compute_dtype if policy.compute_dtype.itemsize < 4 else None
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    precision = MixedPrecisionPolicy(
        param_dtype=low, reduce_dtype=torch.float32 if low else None, cast_forward_inputs=False
    )
    for module in policy.modules() if low else ():
        if isinstance(module, nn.LayerNorm):
            module.forward = partial(_layer_norm, module)
    for part in [*common.layers_of(policy), policy]:
        fully_shard(part, mesh=mesh, mp_policy=precision)
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)  # gloo knows no sum with a factor
    register_fsdp_forward_method(policy, "during_forward")
    forward = policy.during_forward

    def during_forward(compute: Callable[[], Tensor]) -> Tensor:
        result = forward(compute)
        if not torch.is_grad_enabled():  # what no backward pass will cut up again
            policy.reshard()
        return result

    policy.during_forward = during_forward
    # One at a time: no process but the main one ever holds all.
    for name, tensor in [*policy.named_parameters(), *policy.named_buffers()]:
        whole = tensors.pop(name, None)
        if whole is None:
            whole = torch.empty(tensor.shape, dtype=tensor.dtype)
        whole = whole.cpu().contiguous()
        for piece in whole.view(-1).view(torch.uint8).split(2**28):  # no message beyond 2 GiB
            dist.broadcast(piece, 0)
        with torch.no_grad():
            put(tensor, whole)


def _layer_norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """In the hidden states' precision, which autocast sees to on GPUs alone."""
    weight, bias = (None if p is None else p.to(x.dtype) for p in (norm.weight, norm.bias))
    return F.layer_norm(x, norm.normalized_shape, weight, bias, norm.eps)


def rows_here(tensor: Tensor) -> slice:
    """Which rows of a spread tensor lie on this process."""
    each = -(-tensor.shape[0] // dist.get_world_size())
    start = min(dist.get_rank() * each, tensor.shape[0])
    return slice(start, min(start + each, tensor.shape[0]))


def put(tensor: Tensor, whole: Any) -> None:
    """This process's part of `whole` (or of something that can be cut like it) into its place; all
    of it, where every process keeps all.
    """
    if isinstance(tensor, DTensor):
        tensor.to_local().copy_(whole[rows_here(tensor)])
    else:
        tensor.copy_(whole)


def apart(policy: nn.Module) -> None:
    """Every part of the model is cut up, wherever the run was."""
    for part in policy.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


@contextmanager
def gathered(policy: nn.Module) -> Iterator[None]:
    """All weights together on every process, in the dtype they are computed with: for sampling,
    which would else put them together for every token.
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
        apart(policy)
