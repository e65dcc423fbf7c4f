"""Sum gradients over processes, most of them while the last backward pass still runs.

Gradients travel in buckets, those of the last layers first, because a backward pass begins there.
Every process sends all buckets in this order, each as early as it can, so that a run repeats bit
for bit. With --fsdp, each layer's backward pass sums that layer's gradients.
"""

from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

BUCKET_BYTES = 2**26
IN_FLIGHT = 2  # buckets at once; each is a copy of its gradients

backwards = 0  # backward passes of an update on this process; 0: unknown, nothing is sent early
fsdp_once = False  # --fsdp: sum in the last backward pass only; until then gradients are whole


class GradientSum:
    """The sum for some parameters. Their hooks stay until remove()."""

    def __init__(self, parameters: list[nn.Parameter]):
        self.parameters, self.buckets, size = parameters, [], BUCKET_BYTES
        for p in reversed(parameters):
            if size >= BUCKET_BYTES or p.dtype != self.buckets[-1][0].dtype:
                self.buckets.append([])
                size = 0
            self.buckets[-1].append(p)
            size += p.nbytes
        self.bucket_of = {p: i for i, bucket in enumerate(self.buckets) for p in bucket}
        self.hooks = [p.register_post_accumulate_grad_hook(self.accumulated) for p in parameters]
        self.start()

    def start(self) -> None:
        self.passes: Counter[nn.Parameter] = Counter()
        self.missing = [len(bucket) for bucket in self.buckets]  # gradients that are not complete
        self.sent, self.flying = 0, []

    def accumulated(self, p: nn.Parameter) -> None:
        """After every backward pass: send the buckets that are complete, in their order."""
        self.passes[p] += 1
        if self.passes[p] == backwards:
            self.missing[self.bucket_of[p]] -= 1
            while self.sent < len(self.buckets) and not self.missing[self.sent]:
                self.send()
        elif self.bucket_of[p] < self.sent:
            raise RuntimeError(f"more than {backwards} backward passes before sum_gradients")

    def send(self) -> None:
        if len(self.flying) == IN_FLIGHT:
            self.receive()
        gradients = [p.grad for p in self.buckets[self.sent]]
        flat = torch.cat([g.flatten() for g in gradients])
        self.flying.append((dist.all_reduce(flat, async_op=True), flat, gradients))
        self.sent += 1

    def receive(self) -> None:
        work, flat, gradients = self.flying.pop(0)
        work.wait()
        for g, summed in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            g.copy_(summed.view_as(g))

    def finish(self) -> None:
        """After the last backward pass: send the other buckets, wait for all."""
        while self.sent < len(self.buckets):
            self.send()
        while self.flying:
            self.receive()
        self.start()

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()


_current: GradientSum | None = None
_passes: Counter[nn.Module] = Counter()


def fit_whole(needed: Any, run: Any) -> bool:
    """Whether whole gradients and `needed` (an estimate) take less than 60 % of the GPU."""
    if run.device.type != "cuda":
        return False
    parts, memory = needed.parts, torch.cuda.get_device_properties(run.device).total_memory
    return sum(parts.values()) + run.world * parts["gradients"] < 0.6 * memory


def sum_in_last_pass(policy: nn.Module, inputs: Any) -> None:
    """A hook before every forward pass of a policy that FSDP shards."""
    if fsdp_once and torch.is_grad_enabled():
        _passes[policy] += 1
        policy.set_requires_gradient_sync(_passes[policy] == backwards)


@torch.no_grad()
def sum_over_processes(module: nn.Module) -> None:
    """Every gradient of the trained parameters becomes its sum over all processes."""
    global _current
    parameters = [p for p in module.parameters() if p.requires_grad]
    if any(passes != backwards for passes in _passes.values()):
        raise RuntimeError(
            f"{[*_passes.values()]} forward passes before sum_gradients, not {backwards}"
        )
    _passes.clear()
    for p in parameters:
        if p.grad is None:  # not used on this process, perhaps on another
            p.grad = torch.zeros_like(p)
    parameters = [p for p in parameters if not hasattr(p, "full_tensor")]
    if not dist.is_initialized() or not parameters:
        return
    if _current is None or [*map(id, _current.parameters)] != [*map(id, parameters)]:
        if _current:
            _current.remove()
        _current = GradientSum(parameters)
    _current.finish()
