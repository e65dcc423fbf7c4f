"""The memory estimate against real trainings, and the hint after an out-of-memory error.

`python tests/test_memory.py 0` trains the first of RUNS and prints its peak memory in GiB.
"""

import os
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for the measured processes

from kernels import token_logps  # noqa: E402
from training import lora, memory  # noqa: E402

SHAPES = {
    "SmolLM2-135M": dict(
        model_type="llama", hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, vocab_size=49152, tie_word_embeddings=True,
    ),
    "GPT-2": dict(model_type="gpt2"),
}  # fmt: skip
RUNS = [  # shape, sequences, their length, response tokens of each, flags
    ("SmolLM2-135M", 4, 512, 128, {}),
    ("SmolLM2-135M", 4, 512, 128, {"dtype": "bfloat16"}),
    ("SmolLM2-135M", 8, 512, 64, {"gradient_checkpointing": True}),
    ("SmolLM2-135M", 4, 512, 128, {"dtype": "bfloat16", "lora_rank": 16}),
    ("GPT-2", 4, 512, 256, {"fused_logps": False, "optimizer": "rmsprop"}),
]
GPT2, SMALL = 124_439_808, dict(sequences=2, length=64, targets=32)


def arguments(**flags) -> SimpleNamespace:
    defaults = dict(dtype="float32", optimizer="adamw", attn="auto", lora_rank=0, fsdp=False)
    defaults |= dict(fused_logps=True, gradient_checkpointing=False, micro_batch_size=4)
    return SimpleNamespace(**defaults | flags)


def estimate(shape: str, sizes: dict, **flags) -> memory.Estimate:
    from transformers import AutoConfig

    world = 4 if flags.get("fsdp") else 1
    config = AutoConfig.for_model(**SHAPES[shape])
    return memory.estimate(config, arguments(**flags), world=world, **sizes)


def train(shape: str, sequences: int, length: int, n: int, flags: dict) -> float:
    """Two steps as the policy takes them, the last micro-batch large; GiB at the peak."""
    from torch.utils.checkpoint import checkpoint
    from transformers import AutoConfig, AutoModelForCausalLM

    args, config = arguments(**flags), AutoConfig.for_model(**SHAPES[shape])
    lm = AutoModelForCausalLM.from_config(config).eval()
    if args.lora_rank:
        lora.add(lm, args.lora_rank, getattr(torch, args.dtype), torch.float32)
        lm.get_input_embeddings().register_forward_hook(lambda module, ids, out: out.float())
    for layer in lm.model.layers if args.gradient_checkpointing else ():
        layer.forward = lambda *inputs, forward=layer.forward, **more: checkpoint(
            forward, *inputs, use_reentrant=False, preserve_rng_state=False, **more
        )
    trained = [p for p in lm.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
    if args.optimizer == "rmsprop":
        optimizer = torch.optim.RMSprop(trained, lr=1e-5)
    for micro_batches in ([(1, 32)], [(1, 32), (sequences, length)]):
        for size in micro_batches:
            ids, tokens = torch.randint(config.vocab_size, size), min(n, size[1] // 2)
            with torch.autocast("cpu", torch.bfloat16, enabled=args.dtype == "bfloat16"):
                states = lm.base_model(input_ids=ids, use_cache=False).last_hidden_state
                hidden = states[:, -tokens - 1 : -1].flatten(0, 1)
                targets, weight = ids[:, -tokens:].flatten(), lm.get_output_embeddings().weight
                if args.fused_logps:
                    logps = token_logps.token_logps(hidden, weight, targets)
                else:
                    logits = F.linear(hidden, weight).float() * 1.0 / 1.0  # scale, temperature
                    logps = -F.cross_entropy(logits, targets, reduction="none")
            logps.sum().backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 4])
def test_the_estimate_is_within_20_percent(number):
    shape, sequences, length, n, flags = RUNS[number]
    command, env = [sys.executable, __file__, str(number)], os.environ | {"OMP_NUM_THREADS": "1"}
    measured = float(subprocess.run(command, env=env, capture_output=True, check=True).stdout)
    sizes = dict(sequences=sequences, length=length, targets=sequences * n)
    found = estimate(shape, sizes, **flags)
    print(f"measured {measured:.2f} GiB, estimated {found}")
    assert abs(found.total_gib - measured) <= 0.2 * measured


def test_parts_by_hand():
    """A layer of GPT-2 has matrices of 3, 1, 4 and 4 times 768^2."""
    parts = estimate("GPT-2", SMALL).parts
    assert parts["weights"] == parts["gradients"] == 4 * GPT2 == parts["optimizer"] / 2
    parts = estimate("GPT-2", SMALL, lora_rank=8, dtype="bfloat16").parts
    adapters = 12 * 8 * 768 * (4 + 2 + 5 + 5)
    assert parts["weights"] == 4 * adapters + 2 * GPT2 and parts["gradients"] == 4 * adapters
    assert estimate("GPT-2", SMALL, fsdp=True).parts["optimizer"] == 8 * GPT2 / 4
    two = estimate("GPT-2", SMALL | dict(trained_models=2, frozen_models=2))
    assert two.parts["weights"] == 8 * GPT2 and two.parts["other"] > 8 * GPT2
    assert str(two).startswith(f"about {two.total_gib:.1f} GiB per process (weights 0.9, gradients")


def test_every_flag_changes_the_estimate():
    total = lambda **flags: estimate("SmolLM2-135M", SMALL, **flags).total_gib  # noqa: E731
    for less in ({"optimizer": "rmsprop"}, {"gradient_checkpointing": True}, {"lora_rank": 8}):
        assert total(**less) < total()
    for more in ({"fused_logps": False}, {"attn": "eager"}, {"dtype": "float64"}):
        assert total(**more) > total()


def test_the_hint_names_the_next_flag():
    args = arguments()
    for flag, name, value in (
        ("--micro-batch-size 2", "micro_batch_size", 1),
        ("--gradient-checkpointing", "gradient_checkpointing", True),
        ("--fsdp", "fsdp", True),
        ("--lora-rank 16", "lora_rank", 16),
        ("--max-length", "max_length", 256),
    ):
        assert flag in memory.hint(args, world=2)
        setattr(args, name, value)


def test_out_of_memory_errors_are_recognised():
    with pytest.raises(RuntimeError) as real:
        torch.empty(2**50, dtype=torch.uint8)
    for error in (real.value, torch.OutOfMemoryError("CUDA out of memory"), MemoryError()):
        assert memory.is_out_of_memory(error)
    for error in (RuntimeError("shapes cannot be multiplied"), ValueError("out of memory")):
        assert not memory.is_out_of_memory(error)


if __name__ == "__main__":
    print(train(*RUNS[int(sys.argv[1])]))
