"""Copy tensors to a GPU without making the host wait."""

import numpy as np
import torch
from torch import Tensor


def to_device(arrays: tuple[np.ndarray | None, ...], device: torch.device) -> list[Tensor | None]:
    """Tensors of these int64 and float64 arrays: views of one buffer, which is copied once.

    Memory is pinned, because the host waits for every copy of other memory, non_blocking or not.
    """
    sizes = [0 if x is None else x.size + x.size % 2 for x in arrays]  # views begin at 16 bytes
    buffer = torch.empty(sum(sizes), dtype=torch.int64)
    for x, piece in zip(arrays, buffer.split(sizes), strict=True):
        if x is not None:
            piece[: x.size] = torch.from_numpy(x.view(np.int64).ravel())
    pieces = buffer.pin_memory().to(device, non_blocking=True).split(sizes)
    return [
        None if x is None else piece[: x.size].view(torch.from_numpy(x).dtype).view(x.shape)
        for x, piece in zip(arrays, pieces, strict=True)
    ]
