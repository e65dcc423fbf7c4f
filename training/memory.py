"""Estimate the memory that training needs, and say what to change when it runs out.

A formula for what one process holds early in a backward pass. results/memory-plan.md compares it
with measurements on a CPU; it was not compared on a GPU.

    weights, gradients   4 bytes per parameter; frozen weights (LoRA) are in the compute dtype
    optimizer            AdamW 8, RMSprop 4 bytes per trained parameter
    copies               autocast's bfloat16 weights; with --fsdp the weights that are gathered
    activations          what layers keep for the backward pass, or their inputs; one layer more
    head                 the gradient of its weight, and what the log-probs need
    other                frozen models; on a CPU also Python's libraries, and gaps in the heap
"""

from dataclasses import dataclass
from typing import Any

import torch

GIB = 2**30


@dataclass
class Estimate:
    parts: dict[str, float]  # bytes of one process at its peak

    @property
    def total_gib(self) -> float:
        return sum(self.parts.values()) / GIB

    def __str__(self) -> str:
        parts = [f"{name} {size / GIB:.1f}" for name, size in self.parts.items() if size > GIB / 20]
        return f"about {self.total_gib:.1f} GiB per process ({', '.join(parts)})"


def estimate(
    config: Any,  # of the Transformers model
    args: Any,  # dtype, optimizer, attn, lora_rank, fsdp, fused_logps, gradient_checkpointing
    *,
    sequences: int,  # in a micro-batch
    length: int,  # tokens of a sequence
    targets: int,  # response tokens of a micro-batch
    world: int = 1,
    trained_models: int = 1,  # 2 if a value model is trained too
    frozen_models: int = 0,  # reference and reward models, each as large as the policy
    cuda: bool = False,
) -> Estimate:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(config)
    hidden, layers, heads = config.hidden_size, config.num_hidden_layers, config.num_attention_heads
    layer = {name: p for name, p in lm.named_parameters() if ".0." in name}
    matrices = [p for p in layer.values() if p.dim() == 2]
    body = layers * sum(p.numel() for p in layer.values())
    size = sum(p.numel() for p in lm.parameters())
    vocabulary = lm.get_output_embeddings().weight.shape[0]

    dtype = args.dtype or ("bfloat16" if cuda else "float32")  # as common chooses
    low = dtype == "bfloat16"
    full, computed = (8, 8) if dtype == "float64" else (4, 2 if low else 4)  # bytes
    shards = world if args.fsdp else 1
    adapters = layers * args.lora_rank * sum(sum(p.shape) for p in matrices)
    trained, frozen = (adapters, size) if args.lora_rank else (size, 0)
    copies = 2 * body if low and not args.lora_rank else 0
    if shards > 1:  # embeddings, head and two layers, with their gradients
        copies = 2 * computed * (size - body + 2 * body / layers)

    # Values per token that a layer keeps. RMSNorm keeps its input and the normed input, LayerNorm
    # (it has a bias) only its input. Under autocast each linear layer keeps a cast of its input.
    norms = [name for name, p in layer.items() if p.shape == (hidden,) and "bias" not in name]
    normed = sum(1 if name.replace("weight", "bias") in layer else 2 for name in norms)
    inputs = len(matrices) - 2 if low else 2
    attention = 4 * heads * (getattr(config, "head_dim", None) or hidden // heads)
    inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None)
    python_gelu = getattr(config, "activation_function", None) == "gelu_new"
    gated = any("gate" in name for name in layer)
    mlp = (4 if gated else 5 if python_gelu else 2) * (inner or 4 * hidden)
    per_token = full * normed * hidden + computed * (inputs * hidden + attention + mlp)
    softcap = getattr(config, "attn_logit_softcapping", None)
    if args.attn == "eager" or (args.attn == "auto" and softcap):  # attention scores
        per_token += heads * length * (full + (2 if low else 0) + (computed if softcap else 0))
    kept = full * hidden if args.gradient_checkpointing else per_token
    activations = sequences * length * (layers * kept + per_token)

    logits = full * targets * vocabulary
    head = 4 * logits
    if args.fused_logps:  # exponentials that kernels/token_logps.py keeps
        head = min(logits, max(logits / 5, full * vocabulary * hidden / 32))
    head += 0 if args.lora_rank else full * vocabulary * hidden
    gradients = trained_models * full * trained / shards
    activations *= trained_models
    gaps = activations * (1.5 if args.gradient_checkpointing else 0.5 if args.lora_rank else 0.1)
    parts = {
        "weights": trained_models * (full * trained + computed * frozen) / shards,
        "gradients": gradients,
        "optimizer": gradients * {"adamw": 2, "rmsprop": 1}[args.optimizer],
        "copies": copies,
        "activations": activations,
        "head": head,
        "other": frozen_models * computed * size / shards + (0 if cuda else 0.4 * GIB + gaps),
    }
    return Estimate(parts)


def hint(args: Any, world: int) -> str:
    """What to try next when memory runs out: cheap changes first."""
    changes = (
        (args.micro_batch_size > 1, f"--micro-batch-size {args.micro_batch_size // 2}"),
        (not args.gradient_checkpointing, "--gradient-checkpointing"),
        (world > 1 and not args.fsdp, "--fsdp"),
        (not args.lora_rank, "--lora-rank 16, or more processes with --fsdp"),
        (True, "a smaller --max-length"),
    )
    return "try " + next(flag for applies, flag in changes if applies)


def is_out_of_memory(error: BaseException) -> bool:
    words = ("can't allocate memory", "not enough memory", "out of memory")
    allocator = isinstance(error, RuntimeError) and any(w in str(error).lower() for w in words)
    return allocator or isinstance(error, torch.OutOfMemoryError | MemoryError)
