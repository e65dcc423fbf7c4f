"""The memory estimate against real trainings, and the hint after an out-of-memory error.

`PYTHONPATH=. python tests/test_memory.py 0` prints the peak memory of the first of RUNS, in GiB.
"""

import os
import resource
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM

from kernels import token_logps
from training import lora, memory

CONFIGS = {
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
GPT2 = 124_439_808  # parameters


def arguments(**flags) -> SimpleNamespace:
    defaults = dict(dtype="float32", optimizer="adamw", attn="auto", lora_rank=0, fsdp=False)
    defaults |= dict(fused_logps=True, gradient_checkpointing=False, micro_batch_size=4)
    return SimpleNamespace(**defaults | flags)


def estimate(shape="GPT-2", sequences=2, length=64, n=16, flags=None, **more) -> memory.Estimate:
    sizes = dict(sequences=sequences, length=length, targets=sequences * n)
    config = AutoConfig.for_model(**CONFIGS[shape])
    return memory.estimate(config, arguments(**flags or {}), **sizes, **more)


def train(shape: str, sequences: int, length: int, n: int, flags: dict) -> float:
    """Two steps as the policy takes them, the last micro-batch large; GiB at the peak."""
    args, config = arguments(**flags), AutoConfig.for_model(**CONFIGS[shape])
    lm = AutoModelForCausalLM.from_config(config).eval()
    if args.lora_rank:
        lora.add(lm, args.lora_rank, getattr(torch, args.dtype), torch.float32)
        lm.get_input_embeddings().register_forward_hook(lambda module, ids, out: out.float())
    for layer in lm.model.layers if args.gradient_checkpointing else ():
        layer.forward = lambda *inputs, forward=layer.forward, **more: checkpoint(
            forward, *inputs, use_reentrant=False, preserve_rng_state=False, **more
        )
    trained = [p for p in lm.parameters() if p.requires_grad]
    rmsprop = args.optimizer == "rmsprop"
    optimizer = torch.optim.RMSprop(trained) if rmsprop else torch.optim.AdamW(trained, fused=True)
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
    command, env = [sys.executable, "tests/test_memory.py", str(number)], {"OMP_NUM_THREADS": "1"}
    how = dict(cwd=ROOT, env=os.environ | env | {"PYTHONPATH": "."}, check=True)
    measured = float(subprocess.run(command, stdout=subprocess.PIPE, **how).stdout)
    found = estimate(*RUNS[number])
    print(f"measured {measured:.2f} GiB, estimated {found}")
    assert abs(found.total_gib - measured) <= 0.2 * measured


def test_parts_by_hand():
    """A layer of GPT-2 has matrices of 3, 1, 4 and 4 times 768^2."""
    parts = estimate().parts
    assert parts["weights"] == parts["gradients"] == 4 * GPT2 == parts["optimizer"] / 2
    parts = estimate(flags={"lora_rank": 8, "dtype": "bfloat16"}).parts
    adapters = 12 * 8 * 768 * (4 + 2 + 5 + 5)
    assert parts["weights"] == 4 * adapters + 2 * GPT2 and parts["gradients"] == 4 * adapters
    assert estimate(flags={"fsdp": True}, world=4).parts["optimizer"] == 8 * GPT2 / 4
    two = estimate(trained_models=2, frozen_models=2)
    assert two.parts["weights"] == 8 * GPT2 and two.parts["other"] > 8 * GPT2
    assert str(two).startswith(f"about {two.total_gib:.1f} GiB per process (weights 0.9, gradients")
    for less in ({"optimizer": "rmsprop"}, {"gradient_checkpointing": True}, {"lora_rank": 8}):
        assert estimate(flags=less).total_gib < estimate().total_gib
    for more in ({"fused_logps": False}, {"attn": "eager"}, {"dtype": "float64"}):
        assert estimate(flags=more).total_gib > estimate().total_gib


def test_the_hint_names_the_next_flag():
    args, settings = arguments(), dict(micro_batch_size=1, gradient_checkpointing=True, fsdp=True)
    words = ["--micro-batch-size 2", "--gradient-checkpointing", "--fsdp", "--lora-rank 16"]
    for word, setting in zip(words, (settings | {"lora_rank": 16}).items(), strict=True):
        assert word in memory.hint(args, world=2)
        setattr(args, *setting)
    assert "--max-length" in memory.hint(args, world=2)


def test_out_of_memory_errors_are_recognised():
    with pytest.raises(RuntimeError) as real:
        torch.empty(2**50, dtype=torch.uint8)
    for error in (real.value, torch.OutOfMemoryError("CUDA out of memory"), MemoryError()):
        assert memory.is_out_of_memory(error)
    assert not memory.is_out_of_memory(RuntimeError("shapes cannot be multiplied"))


if __name__ == "__main__":
    print(train(*RUNS[int(sys.argv[1])]))
