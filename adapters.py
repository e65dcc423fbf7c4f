"""--lora-rank: small matrices are trained beside frozen linear layers (LoRA: Hu et al. 2021, arXiv
2106.09685), through peft.

    W x  becomes  W x + alpha / rank * B (A x),     A: (rank, in), B: (out, rank), alpha = 2 * rank

on every linear layer between the embeddings and the head. B starts at 0, so the policy before its
first step is the model it was made from, and so is its reference. No dropout, for the same reason.
A learning rate that was published for all weights is usually too low for adapters: Schulman et al.
("LoRA Without Regret", 2025) found about ten times as much to be best.

Imported only with --lora-rank.
"""

import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import common


def check(rank: int) -> None:
    """Named before anything is loaded."""
    if rank < 0:
        raise common.UserError(f"--lora-rank must be 0 or more, got {rank}")
    try:
        import peft  # noqa: F401
    except ImportError:
        raise common.UserError("--lora-rank needs peft: pip install peft") from None


def add(
    policy: nn.Module,
    rank: int,
    base_dtype: torch.dtype,
    dtype: torch.dtype,  # of the adapters
    empty: bool = False,  # there are no weights yet (--fsdp), so they are not to be touched
) -> None:
    """In place: freeze what there is, put the adapters beside it."""
    from peft import LoraConfig, inject_adapter_in_model
    from transformers.pytorch_utils import Conv1D

    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        lora_dropout=0.0,
        target_modules="all-linear",  # but for the head
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in policy.modules()),  # GPT-2
        task_type="SEQ_CLS" if hasattr(policy, "score") else "CAUSAL_LM",  # leaves the head out
    )
    for name, p in policy.named_parameters():
        p.requires_grad_(False)
        # Norms, rotary frequencies (buffers) and a head that scores cost nothing and stay exact.
        if p.dim() > 1 and name != "score.weight":
            p.data = torch.empty_like(p, dtype=base_dtype) if empty else p.data.to(base_dtype)
    policy.frozen_digest = digest(policy) if common.MAIN_PROCESS else None
    inject_adapter_in_model(config, policy)
    config.target_modules = sorted(config.target_modules)  # a set is written in any order
    if hasattr(policy, "score"):  # a head that began as random numbers is trained whole
        policy.score.requires_grad_(True)
        config.modules_to_save = ["score"]
    policy.adapter_config = config
    for p in trained(policy).values():
        p.data = p.data.to(dtype)


@contextmanager
def off(policy: nn.Module) -> Iterator[None]:
    """For a while the model is what it was made from."""
    layers = [module for module in policy.modules() if hasattr(module, "_disable_adapters")]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def digest(policy: nn.Module) -> str | None:
    """Tells one frozen model from another, by some numbers of every tensor: a checkpoint of
    adapters is of no use beside another.
    """
    state = hashlib.sha256()
    for name, p in policy.named_parameters():
        if p.is_meta:
            return None
        some = p.detach().flatten()[:: max(1, p.numel() // 1024)]
        state.update(name.encode() + some.double().cpu().numpy().tobytes())
    return state.hexdigest()[:24]


def trained(policy: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in policy.named_parameters() if p.requires_grad}


@torch.no_grad()
def merged(policy: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of the model that plain Transformers knows, each weight with its adapter added
    to it, in fp32 or better. Every process takes part where the weights are spread.
    """
    layers = dict(policy.named_modules())
    for name, tensor in common._state_tensors(policy).items():
        if ".lora_" in name:
            continue
        layer = layers[name.rpartition(".base_layer.")[0]] if ".base_layer." in name else None
        if layer is not None and name.endswith(".weight"):
            a, b = (common.whole(m["default"].weight) for m in (layer.lora_A, layer.lora_B))
            tensor = common.whole(tensor).to(a.dtype)
            change = layer.scaling["default"] * (b @ a)  # (out, in)
            tensor = tensor + (change.T if layer.fan_in_fan_out else change)
        yield name.replace(".base_layer.", "."), tensor


@torch.no_grad()
def state(policy: nn.Module) -> dict[str, Tensor]:
    """The adapters alone, under PEFT's names. Every process takes part."""
    return {
        f"base_model.model.{name}".replace(".default.", "."): common.whole(p.detach()).cpu()
        for name, p in trained(policy).items()
    }


def save(policy: nn.Module, tensors: dict[str, Tensor], folder: Path, base: str) -> None:
    """A folder that peft loads onto the model that was trained."""
    temporary = folder.with_name("tmp-adapter")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    config = policy.adapter_config
    config.base_model_name_or_path, config.inference_mode = base, True
    config.save_pretrained(temporary)
    save_file(tensors, temporary / "adapter_model.safetensors", {"format": "pt"})
    common.sync_folder(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
