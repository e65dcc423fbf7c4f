"""--lora-rank: only adapters are trained, and what is saved is what was trained."""

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import pair_rows, write_jsonl
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import common
import dpo
import listwise_dpo
import sft
from training import lora

ARCHITECTURES = ("llama", "gemma2", "gpt2", "qwen2")  # gpt2: Conv1D, whose weight is transposed
pytestmark = pytest.mark.usefixtures("fresh_process")


@pytest.fixture
def train(monkeypatch, tmp_path):
    """train(method, model, folder, **flags) -> (policy, its parameters before training)"""
    write_jsonl(tmp_path / "pairs.jsonl", pair_rows(60))
    optional, load, found = common.optional_module, common.load_policy, []
    without = ("training.evaluation", "training.finish")  # curves and samples take longer

    def keep(*args, **more):
        policy = load(*args, **more)
        found[:] = policy, {n: p.detach().clone() for n, p in policy.named_parameters()}
        return policy

    monkeypatch.setattr(common, "load_policy", keep)

    def call(method, model, folder: str = "out", **flags):
        from training.model import export

        flags = {
            "dataset": "pairs.jsonl", "batch_size": 8, "max_steps": 6, "lr": 1e-2, "lora_rank": 4,
            "schedule": "constant", "warmup_ratio": 0.0, "dtype": "float32", "max_length": 64,
            "max_prompt_length": 40, "model": str(model), "output_dir": folder,
        } | flags  # fmt: skip
        with monkeypatch.context() as patch:
            patch.setattr(
                common, "optional_module", lambda n: None if n in without else optional(n)
            )
            patch.setattr(common.Run, "finish", lambda run, policy, tok: export(policy, tok, run))
            method.main(method.Args(**flags))
        return found

    return call


def losses_in(folder: str) -> list[float]:
    lines = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "lr" in line]


def logits_of(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 40)[None]).logits


def plain(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_is_saved_is_what_was_trained(architecture, checkpoints, train):
    """The merged folder in Transformers and the adapter in peft have the trained policy's logits;
    before the first step these are the base's.
    """
    import peft

    base = checkpoints(architecture)
    policy, before = train(dpo, base)
    losses = losses_in("out")
    assert losses[0] == pytest.approx(0.6931471805599453, abs=1e-7) and losses[-1] < 0.6
    changed = {n for n, p in policy.named_parameters() if (p != before[n]).any()}
    assert changed == {name for name in before if ".lora_" in name}
    trained = logits_of(policy.lm)
    with lora.off(policy.lm):
        torch.testing.assert_close(logits_of(policy.lm), logits_of(plain(base)))
    assert (trained - logits_of(plain(base))).abs().max() > 0.05
    torch.testing.assert_close(logits_of(policy.lm), trained)

    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(logits_of(plain("out")), trained, **close)
    loaded = peft.PeftModel.from_pretrained(plain(base), "out/adapter")
    torch.testing.assert_close(logits_of(loaded), trained, **close)
    config = json.loads(Path("out/adapter/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 8)
    assert config["base_model_name_or_path"] == str(base)
    # Merged and trained again: the reference is the merged model.
    train(dpo, "out", "again", max_steps=1)
    assert losses_in("again")[0] == pytest.approx(0.6931471805599453, abs=1e-7)


@pytest.mark.parametrize("optimizer, copies", [("adamw", 2), ("rmsprop", 1)])
def test_a_checkpoint_holds_adapters_only(optimizer, copies, checkpoints, train):
    """Rank 4: A has 4 * in, B 4 * out numbers; the optimizer knows no others."""
    policy, _ = train(dpo, checkpoints("llama"), optimizer=optimizer)
    # Two layers; hidden 32, keys and values 16, MLP 48.
    shapes = [(32, 32), (32, 16), (32, 16), (32, 32), (32, 48), (32, 48), (48, 32)]
    expected = 2 * sum(4 * (i + o) for i, o in shapes)
    assert sum(p.numel() for p in policy.parameters() if p.requires_grad) == expected
    assert all(p.grad is None for p in policy.parameters())
    sizes = {"weight": 0, "moments": 0}
    for name, tensor in load_file("out/checkpoint-6/state.safetensors").items():
        key = name.split("|")[0]
        if key != "step":
            sizes["weight" if key == "weight" else "moments"] += tensor.numel()
    assert sizes == {"weight": expected, "moments": copies * expected}


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox"])
def test_the_base_is_frozen_in_the_compute_dtype(architecture, checkpoints, train):
    policy, before = train(dpo, checkpoints(architecture), dtype="bfloat16")
    for name, p in policy.named_parameters():
        exact = ".lora_" in name or p.dim() == 1
        assert p.dtype == (torch.float32 if exact else torch.bfloat16), name
    # Rounded rotary frequencies would turn every position by a wrong angle.
    assert all(b.dtype == torch.float32 for b in policy.buffers() if b.is_floating_point())
    losses = losses_in("out")
    assert losses[0] == pytest.approx(0.6931471805599453, abs=1e-7) and losses[-1] < 0.6
    if architecture == "llama":  # the export has the rounded weights that it was trained with
        name = "model.embed_tokens.weight"
        assert torch.equal(load_file("out/model.safetensors")[name], before[f"lm.{name}"].float())


@pytest.mark.parametrize("method", [sft, listwise_dpo])
def test_other_micro_batches_and_a_resume_give_the_same_adapters(method, checkpoints, train):
    """In float64; the second run recomputes activations, the third stops after 3 steps."""
    for folder, changes in (
        ("one", {}),
        ("two", {"micro_batch_size": 2, "gradient_checkpointing": True}),
        ("three", {"max_steps": 3}),
        ("three", {}),
    ):
        train(method, checkpoints("llama"), folder, dtype="float64", **changes)
    one, *others = (
        load_file(f"{n}/checkpoint-6/state.safetensors") for n in ("one", "two", "three")
    )
    assert max(tensor.abs().max() for name, tensor in one.items() if "lora_B" in name) > 0.01
    for other in others:
        assert one.keys() == other.keys()
        for name, tensor in one.items():
            torch.testing.assert_close(other[name], tensor, rtol=0, atol=1e-9, msg=name)


def test_another_base_is_refused(checkpoints, train):
    """The flags are the same, and the checkpoint has no weights of the base."""
    shutil.copytree(checkpoints("llama"), "start")
    train(dpo, "start", max_steps=3)
    weights = load_file("start/model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"].add_(1e-3)
    save_file(weights, "start/model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="what .*--model.* stands for has changed"):
        train(dpo, "start")


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


def test_what_is_refused(checkpoints, train, monkeypatch):
    with pytest.raises(ValueError, match="--lora-rank must be"):
        train(dpo, checkpoints("llama"), lora_rank=-1)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match="--lora-rank needs peft: pip install peft"):
        train(dpo, checkpoints("llama"))
    assert not Path("out").exists()
