"""--lora-rank: only adapters are trained, and what is saved is what was trained."""

import json
import math
import random
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import pair_rows, run_script, write_jsonl
from safetensors.torch import load_file, save_file
from test_train import (
    HOT,
    Broken,
    _as_in_a_fresh_process,  # noqa: F401 (used by its name)
    as_flags,
    assert_same_run,
    at_loss_call,
    break_down,
    farthest,
    in_step,
    pairs,  # noqa: F401
    plain,  # noqa: F401
    steps_of,
    train,
)

import adapters
import common
import dpo
import listwise_dpo
import sft

ARCHITECTURES = ("llama", "gemma2", "gpt2", "qwen2")  # gpt2: Conv1D, whose weight is transposed
LORA = {"lora_rank": 4, "lr": 1e-2}


@pytest.fixture
def kept(monkeypatch):
    """kept["policy"]: the policy of the last run; kept["base"]: its weights before it trained."""
    found, load = {}, common.load_policy

    def keep(*args, **more):
        policy = load(*args, **more)
        found["policy"] = policy
        found["base"] = {n: p.detach().clone() for n, p in policy.named_parameters()}
        return policy

    monkeypatch.setattr(common, "load_policy", keep)
    return found


def logits_of(model) -> torch.Tensor:
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_only_adapters_change(checkpoints, pairs, plain, kept, architecture):  # noqa: F811
    assert train(dpo, checkpoints(architecture), pairs, "out", **LORA) == 0
    assert steps_of("out")[0]["loss"] == pytest.approx(0.6931471805599453, abs=1e-7)
    assert steps_of("out")[-1]["loss"] < 0.6
    changed = {
        name for name, p in kept["policy"].named_parameters() if (p != kept["base"][name]).any()
    }
    assert changed == {name for name in kept["base"] if ".lora_" in name}
    start = load_file(checkpoints(architecture) / "model.safetensors")
    for name, tensor in kept["base"].items():
        if ".base_layer." in name:  # and those began as what the file has
            there = start.get(name.replace(".base_layer.", "."))
            assert there is None or torch.equal(there, tensor)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_is_saved_is_what_was_trained(checkpoints, pairs, plain, kept, architecture):  # noqa: F811
    """The merged folder in Transformers and the adapter in peft: the trained policy's logits."""
    import peft
    import transformers as hf

    start = checkpoints(architecture)
    assert train(dpo, start, pairs, "out", **LORA) == 0
    trained = logits_of(kept["policy"])
    before = logits_of(hf.AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32))
    assert (trained - before).abs().max() > 0.05
    merged = hf.AutoModelForCausalLM.from_pretrained("out", dtype=torch.float32)
    torch.testing.assert_close(logits_of(merged), trained, rtol=1e-4, atol=1e-4)
    assert not any("lora" in name for name, _ in merged.named_parameters())
    base = hf.AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32)
    loaded = peft.PeftModel.from_pretrained(base, "out/adapter")
    torch.testing.assert_close(logits_of(loaded), trained, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits_of(loaded.merge_and_unload()), trained, rtol=1e-4, atol=1e-4)
    config = json.loads(Path("out/adapter/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 8)
    assert config["base_model_name_or_path"] == str(start)


def test_ranked_lists(checkpoints, plain, kept, tmp_path):  # noqa: F811
    """Four answers with the scores 2, 1, 1 and 0, in any order: at the start all are as likely, and
    the first has three below it, the two in the middle have one each: ln 4 + 2 ln 2.
    """
    import transformers as hf

    rng = random.Random(0)
    lists = []
    for row in pair_rows(60):
        answers = [(2, row["chosen"]), (1, row["rejected"]), (1, " so"), (0, " or not")]
        rng.shuffle(answers)
        scores, responses = zip(*answers, strict=True)
        lists.append({"prompt": row["prompt"], "responses": responses, "scores": scores})
    rows = write_jsonl(tmp_path / "ranked.jsonl", lists)
    start = checkpoints("gemma2")
    assert train(listwise_dpo, start, rows, "out", **LORA) == 0
    losses = [step["loss"] for step in steps_of("out")]
    assert losses[0] == pytest.approx(4 * math.log(2), abs=1e-6) and losses[-1] < losses[0] - 0.5
    changed = {
        name for name, p in kept["policy"].named_parameters() if (p != kept["base"][name]).any()
    }
    assert changed == {name for name in kept["base"] if ".lora_" in name}
    merged = hf.AutoModelForCausalLM.from_pretrained("out", dtype=torch.float32)
    torch.testing.assert_close(logits_of(merged), logits_of(kept["policy"]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("optimizer, copies", [("adamw", 2), ("rmsprop", 1)])
def test_memory_shrinks(checkpoints, pairs, plain, kept, optimizer, copies):  # noqa: F811
    """Rank 4: A has 4 * in, B 4 * out numbers; the optimizer knows no others."""
    assert train(dpo, checkpoints("llama"), pairs, "out", optimizer=optimizer, **LORA) == 0
    # Two layers; hidden 32, 2 of 4 heads shared (keys and values 16 wide), MLP 48.
    shapes = [(32, 32), (32, 16), (32, 16), (32, 32), (32, 48), (32, 48), (48, 32)]
    expected = 2 * sum(4 * (i + o) for i, o in shapes)
    policy = kept["policy"]
    assert sum(p.numel() for p in policy.parameters() if p.requires_grad) == expected
    state = load_file("out/checkpoint-6/optimizer.safetensors")
    moments = [t for name, t in state.items() if not name.startswith("step|")]
    assert sum(t.numel() for t in moments) == copies * expected
    saved = load_file("out/checkpoint-6/policy.safetensors")
    assert sum(t.numel() for t in saved.values()) == expected
    grads = [p.grad for p in policy.parameters()]
    assert all(g is None for g in grads)  # set to none after the step, and never on the base


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox"])
def test_the_base_is_frozen_in_the_compute_dtype(checkpoints, pairs, plain, kept, architecture):  # noqa: F811
    start = checkpoints(architecture)
    assert train(dpo, start, pairs, "out", dtype="bfloat16", **LORA) == 0
    for name, p in kept["policy"].named_parameters():
        exact = ".lora_" in name or p.dim() == 1
        assert p.dtype == (torch.float32 if exact else torch.bfloat16), name
    # Rounded, they would turn every position by a wrong angle.
    buffers = [b for b in kept["policy"].buffers() if b.is_floating_point()]
    assert all(b.dtype == torch.float32 for b in buffers)
    assert steps_of("out")[0]["loss"] == pytest.approx(0.6931471805599453, abs=1e-7)
    assert steps_of("out")[-1]["loss"] < 0.6
    # What was rounded to train beside it is what is exported with it.
    saved = load_file("out/model.safetensors")
    if architecture == "llama":
        untouched = kept["base"]["model.embed_tokens.weight"]
        assert torch.equal(saved["model.embed_tokens.weight"], untouched.float())


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_same_weights_with_other_micro_batches(checkpoints, pairs, plain, architecture):  # noqa: F811
    for size in (8, 2):
        flags = HOT | LORA | {"micro_batch_size": size, "gradient_checkpointing": size == 2}
        assert train(sft, checkpoints(architecture), pairs, f"of-{size}", **flags) == 0
    files = [Path(f"of-{size}/checkpoint-5/policy.safetensors") for size in (8, 2)]
    assert farthest(*files) < 1e-9
    assert max(t.abs().max() for n, t in load_file(files[0]).items() if "lora_B" in n) > 0.01


def test_broken_run_goes_on_to_the_same_end(checkpoints, pairs, plain, monkeypatch):  # noqa: F811
    start = checkpoints("llama")
    assert train(dpo, start, pairs, "whole", **LORA) == 0
    with monkeypatch.context() as patch:
        at_loss_call(patch, dpo, in_step(4), break_down)
        with pytest.raises(Broken):
            train(dpo, start, pairs, "broken", **LORA)
    assert train(dpo, start, pairs, "broken", **LORA) == 0
    assert_same_run("whole", "broken")


@pytest.mark.parametrize("what", ["rows", "weights"])
def test_other_rows_or_weights_are_refused(checkpoints, pairs, plain, monkeypatch, what):  # noqa: F811
    """The flags are the same, what stands behind them is not."""
    start, rows = Path("start"), Path("rows.jsonl")
    shutil.copytree(checkpoints("llama"), start)
    shutil.copyfile(pairs, rows)
    with monkeypatch.context() as patch:
        at_loss_call(patch, dpo, in_step(4), break_down)
        with pytest.raises(Broken):
            train(dpo, start, rows, "out", **LORA)
    if what == "rows":
        rows.write_text(rows.read_text().replace("yes", "yet"))
    else:
        weights = load_file(start / "model.safetensors")
        weights["model.layers.0.mlp.up_proj.weight"].add_(1e-3)
        save_file(weights, start / "model.safetensors", {"format": "pt"})
    named = {"rows": "--dataset", "weights": "--model"}[what]
    with pytest.raises(common.UserError, match=f"what {named} stands for has changed since"):
        train(dpo, start, rows, "out", **LORA)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["gemma2", "gpt2"])
def test_spread_over_processes(checkpoints, pairs, tmp_path, architecture):  # noqa: F811
    """float64, hot: the same adapters, the same merged model."""
    start = checkpoints(architecture)
    for processes in (1, 2, 4):
        flags = HOT | LORA | {"batch_size": 8, "micro_batch_size": 2, "schedule": "constant"}
        flags |= {"warmup_ratio": 0.0, "optimizer": "adamw", "max_length": 64, "beta": 0.5}
        flags |= {"max_prompt_length": 40, "model": start, "dataset": pairs}
        flags |= {"output_dir": tmp_path / f"by-{processes}", "cache_dir": tmp_path / "cache"}
        spread = ["--fsdp"] if processes > 1 else []
        status, _, err = run_script("dpo.py", *as_flags(**flags), *spread, processes=processes)
        assert status == 0, err
    for processes in (2, 4):
        for name in ("checkpoint-5/policy.safetensors", "model.safetensors"):
            assert farthest(Path("by-1", name), Path(f"by-{processes}", name)) < 1e-9
        one, other = (Path(f"by-{n}/adapter/adapter_model.safetensors") for n in (1, processes))
        assert farthest(one, other) < 1e-9


def test_reference_of_an_adapter_is_the_model_it_started_from(
    checkpoints,
    pairs,  # noqa: F811
    plain,  # noqa: F811
    tmp_path,
):
    """Trained once, merged, trained again: the second run's loss begins at ln 2 too."""
    assert train(dpo, checkpoints("llama"), pairs, "first", **LORA) == 0
    assert train(dpo, tmp_path / "first", pairs, "second", **LORA) == 0
    assert steps_of("second")[0]["loss"] == pytest.approx(0.6931471805599453, abs=1e-7)
    assert steps_of("first")[-1]["loss"] < 0.6


def test_negative_rank(checkpoints, pairs):  # noqa: F811
    with pytest.raises(common.UserError, match="--lora-rank must be 0 or more, got -1"):
        train(dpo, checkpoints("llama"), pairs, "out", lora_rank=-1)


def test_without_peft(checkpoints, pairs, monkeypatch):  # noqa: F811
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(common.UserError, match="--lora-rank needs peft: pip install peft"):
        train(dpo, checkpoints("llama"), pairs, "out", lora_rank=4)
    assert not Path("out").exists()


def test_without_adapters_py(checkpoints, pairs, monkeypatch):  # noqa: F811
    beside = common.beside
    monkeypatch.setattr(common, "beside", lambda name: None if name == "adapters" else beside(name))
    with pytest.raises(common.UserError, match="--lora-rank needs adapters.py beside common.py"):
        train(dpo, checkpoints("llama"), pairs, "out", lora_rank=4)


def test_merging_is_what_peft_does(checkpoints):
    """W + alpha / rank * B A, weight by weight, transposed for GPT-2."""
    for architecture in ("llama", "gpt2"):
        run = type("OneProcess", (), {"rank": 0, "world": 1, "device": torch.device("cpu")})()
        policy = common.load_policy(str(checkpoints(architecture)), "float64", run, lora_rank=3)
        torch.manual_seed(1)
        for p in adapters.trained(policy).values():
            torch.nn.init.normal_(p)
        merged = dict(adapters.merged(policy))
        seen = 0
        for name, module in policy.named_modules():
            if hasattr(module, "get_delta_weight"):
                expected = module.base_layer.weight + module.get_delta_weight("default")
                torch.testing.assert_close(merged[f"{name}.weight"], expected)
                seen += 1
        assert seen == (14 if architecture == "llama" else 8)
        assert not any("lora" in name or "base_layer" in name for name in merged)
