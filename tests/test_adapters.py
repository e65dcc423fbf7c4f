"""--lora-rank: only adapters are trained, and what is saved is what was trained."""

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import pair_rows, write_jsonl
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from whole_runs import steps_of, train

import common
import dpo
import listwise_dpo
import sft
from training import lora

ARCHITECTURES = ("llama", "gemma2", "gpt2", "qwen2")  # gpt2: Conv1D, whose weight is transposed
LN_2 = pytest.approx(math.log(2), abs=1e-7)
pytestmark = pytest.mark.usefixtures("fresh_process")


@pytest.fixture
def run(monkeypatch, tmp_path):
    """run(method, model, folder, **flags) -> (policy, its parameters before training)"""
    rows = write_jsonl(tmp_path / "pairs.jsonl", pair_rows(60))
    optional, load, found = common.optional_module, common.load_policy, []

    def keep(*args, **more):
        policy = load(*args, **more)
        found[:] = policy, {n: p.detach().clone() for n, p in policy.named_parameters()}
        return policy

    def without_samples(name: str):
        return None if name == "training.evaluation" else optional(name)

    def call(method, model, folder: str = "out", **flags):
        with monkeypatch.context() as patch:
            patch.setattr(common, "load_policy", keep)
            patch.setattr(common, "optional_module", without_samples)
            assert train(method, model, rows, folder, **{"lora_rank": 4, "lr": 1e-2, **flags}) == 0
        return found

    return call


def logits_of(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 40)[None]).logits


def plain(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_is_saved_is_what_was_trained(architecture, checkpoints, run):
    """The merged folder in Transformers and the adapter in peft have the trained policy's logits;
    before the first step these are the base's.
    """
    import peft

    base = checkpoints(architecture)
    policy, before = run(dpo, base)
    assert steps_of("out")[0]["loss"] == LN_2 and steps_of("out")[-1]["loss"] < 0.6
    changed = {n for n, p in policy.named_parameters() if (p != before[n]).any()}
    assert changed == {name for name in before if ".lora_" in name}
    trained = logits_of(policy.lm)
    with lora.off(policy.lm):
        torch.testing.assert_close(logits_of(policy.lm), logits_of(plain(base)))
    assert (trained - logits_of(plain(base))).abs().max() > 0.05
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(logits_of(plain("out")), trained, **close)
    loaded = peft.PeftModel.from_pretrained(plain(base), "out/adapter")
    torch.testing.assert_close(logits_of(loaded), trained, **close)
    config = json.loads(Path("out/adapter/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (
        4,
        8,
        str(base),
    )
    # Merged and trained again: the reference is the merged model.
    run(dpo, "out", "again", max_steps=1)
    assert steps_of("again")[0]["loss"] == LN_2


@pytest.mark.parametrize("optimizer, copies", [("adamw", 2), ("rmsprop", 1)])
def test_a_checkpoint_holds_adapters_only(optimizer, copies, checkpoints, run):
    """Rank 4: A has 4 * in, B 4 * out numbers; the optimizer knows no others."""
    policy, _ = run(dpo, checkpoints("llama"), optimizer=optimizer)
    # Two layers; hidden 32, keys and values 16, MLP 48.
    shapes = [(32, 32), (32, 16), (32, 16), (32, 32), (32, 48), (32, 48), (48, 32)]
    expected = 2 * sum(4 * (i + o) for i, o in shapes)
    assert sum(p.numel() for p in policy.parameters() if p.requires_grad) == expected
    assert all(p.grad is None for p in policy.parameters())
    saved = load_file("out/checkpoint-6/state.safetensors")
    sizes = [tensor.numel() for name, tensor in saved.items() if not name.startswith("step|")]
    assert sum(sizes) == (1 + copies) * expected


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox"])
def test_the_base_is_frozen_in_the_compute_dtype(architecture, checkpoints, run):
    policy, before = run(dpo, checkpoints(architecture), dtype="bfloat16")
    for name, p in policy.named_parameters():
        exact = ".lora_" in name or p.dim() == 1
        assert p.dtype == (torch.float32 if exact else torch.bfloat16), name
    # Rounded rotary frequencies would turn every position by a wrong angle.
    assert all(b.dtype == torch.float32 for b in policy.buffers() if b.is_floating_point())
    assert steps_of("out")[0]["loss"] == LN_2 and steps_of("out")[-1]["loss"] < 0.6
    if architecture == "llama":  # the export has the rounded weights that it was trained with
        name = "model.embed_tokens.weight"
        assert torch.equal(load_file("out/model.safetensors")[name], before[f"lm.{name}"].float())


@pytest.mark.parametrize("method", [sft, listwise_dpo])
def test_other_micro_batches_and_a_resume_give_the_same_adapters(method, checkpoints, run):
    """In float64; the second run recomputes activations, the third stops after 3 steps."""
    recompute = {"micro_batch_size": 2, "gradient_checkpointing": True}
    half = {"max_steps": 3}
    for folder, flags in (("one", {}), ("two", recompute), ("three", half), ("three", {})):
        run(method, checkpoints("llama"), folder, dtype="float64", **flags)
    names = ("one", "two", "three")
    one, *others = (load_file(f"{name}/checkpoint-6/state.safetensors") for name in names)
    assert max(tensor.abs().max() for name, tensor in one.items() if "lora_B" in name) > 0.01
    for other in others:
        assert one.keys() == other.keys()
        for name, tensor in one.items():
            torch.testing.assert_close(other[name], tensor, rtol=0, atol=1e-9, msg=name)


@pytest.mark.parametrize("architecture, layers", [("llama", 14), ("gpt2", 8)])
def test_merging_is_what_peft_does(architecture, layers, checkpoints):
    """W + alpha / rank * B A, weight by weight, transposed for GPT-2."""
    run = SimpleNamespace(rank=0, world=1, in_step=False, device=torch.device("cpu"))
    args = SimpleNamespace(model=str(checkpoints(architecture)), dtype="float64", lora_rank=3)
    lm = common.load_policy(args, run).lm
    torch.manual_seed(1)
    for p in lm.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p)
    merged = dict(lora.merged(lm))
    adapted = {n: m for n, m in lm.named_modules() if hasattr(m, "get_delta_weight")}
    assert len(adapted) == layers and not any("lora" in n or "base_layer" in n for n in merged)
    for name, module in adapted.items():
        expected = module.base_layer.weight + module.get_delta_weight("default")
        torch.testing.assert_close(merged[f"{name}.weight"], expected)


def test_what_is_refused(checkpoints, run, monkeypatch):
    with pytest.raises(ValueError, match="--lora-rank must be"):
        run(dpo, checkpoints("llama"), lora_rank=-1)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match="--lora-rank needs peft: pip install peft"):
        run(dpo, checkpoints("llama"))
    assert not Path("out").exists()
