"""--lora-rank: train small matrices next to frozen linear layers (LoRA: Hu et al. 2021, arXiv
2106.09685), through peft.

    W x  becomes  W x + alpha / rank * B (A x),     A: (rank, in), B: (out, rank), alpha = 2 * rank

on every linear layer except the head. B starts at 0, so the policy before its first step is the
model that it was made from, and so is its reference. There is no dropout, for the same reason.
A learning rate published for full training is usually too low for LoRA: Schulman et al. ("LoRA
Without Regret", 2025) found a tenfold rate to be best.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn


def check(rank: int) -> None:
    """Raise before anything is loaded if LoRA cannot be used."""
    if rank < 0:
        raise ValueError(f"--lora-rank must be 0 or more, got {rank}")
    try:
        import peft  # noqa: F401
    except ImportError:
        raise ValueError("--lora-rank needs peft: pip install peft") from None


def add(
    lm: nn.Module,
    rank: int,
    base_dtype: torch.dtype,  # of the frozen matrices
    dtype: torch.dtype,  # of the adapters
    empty: bool = False,  # the weights are uninitialised (--fsdp), so do not read them
) -> None:
    """Freeze the model and add adapters, in place."""
    from peft import LoraConfig, inject_adapter_in_model
    from transformers.pytorch_utils import Conv1D

    has_score = hasattr(lm, "score")  # the head of a reward or value model
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        lora_dropout=0.0,
        target_modules="all-linear",  # except for the head
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in lm.modules()),  # GPT-2
        task_type="SEQ_CLS" if has_score else "CAUSAL_LM",  # tells peft which head to leave out
    )
    for name, p in lm.named_parameters():
        p.requires_grad_(False)
        # Norms, rotary frequencies (buffers) and the score head are small and stay exact.
        if p.dim() > 1 and name != "score.weight":
            p.data = torch.empty_like(p, dtype=base_dtype) if empty else p.data.to(base_dtype)
    inject_adapter_in_model(config, lm)
    config.target_modules = sorted(config.target_modules)  # a set would be saved in random order
    if has_score:  # it starts from random numbers, so it is trained in full
        lm.score.requires_grad_(True)
        config.modules_to_save = ["score"]
    lm.adapter_config = config
    for p in _trained(lm).values():
        p.data = p.data.to(dtype)


@contextmanager
def off(lm: nn.Module) -> Iterator[None]:
    """Inside this context the adapters are off: the model is its own reference."""
    layers = [module for module in lm.modules() if hasattr(module, "_disable_adapters")]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


@torch.no_grad()
def merged(lm: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, full tensor) of the model as plain Transformers knows it, adapters added to the
    weights, in fp32 or better. With --fsdp every process must take part.
    """
    layers = dict(lm.named_modules())
    parameters = dict(lm.named_parameters())
    tied = {name for name, _ in lm.named_parameters(remove_duplicate=False)} - {*parameters}
    for name, tensor in lm.state_dict().items():
        if ".lora_" in name or name in tied:
            continue
        tensor = _full(tensor)
        layer = layers[name.rpartition(".base_layer.")[0]] if ".base_layer." in name else None
        if layer is not None and name.endswith(".weight"):
            a, b = (_full(matrix["default"].weight) for matrix in (layer.lora_A, layer.lora_B))
            update = layer.scaling["default"] * (b @ a)  # (out, in)
            tensor = tensor.to(a.dtype) + (update.T if layer.fan_in_fan_out else update)
        yield name.replace(".base_layer.", "."), tensor


@torch.no_grad()
def state(lm: nn.Module) -> dict[str, Tensor]:
    """Only the adapters, with peft's names. With --fsdp every process must take part."""
    return {
        f"base_model.model.{name}".replace(".default.", "."): _full(p.detach()).cpu()
        for name, p in _trained(lm).items()
    }


def save(lm: nn.Module, tensors: dict[str, Tensor], folder: Path, base: str) -> None:
    """Write a folder that peft loads onto the `base` model. `tensors` come from state()."""
    temporary = folder.with_name("tmp-adapter")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    config = lm.adapter_config
    config.base_model_name_or_path, config.inference_mode = base, True
    config.save_pretrained(temporary)
    save_file(tensors, temporary / "adapter_model.safetensors", {"format": "pt"})
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def _trained(lm: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in lm.named_parameters() if p.requires_grad}


def _full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
