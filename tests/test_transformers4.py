"""A trained folder in the hands of Transformers 4, as evaluation tools still run it.

What version 5 writes, version 4 may refuse or, worse, read as something else without a word.
Here both load the same folders and must see the same model and the same tokenizer.

    python tests/test_transformers4.py OUT FOLDER ...      # writes what the installed version sees
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

TEXTS = [
    "the cat sat on the mat?",
    " and then another big red dog ran far off",
    "Family: Ada: partner of Ben.",
    "  two spaces,\ttab\r\nline , and . stop 's",
    "é 中文 \U0001f469\u200d\U0001f467 e\u0301",
    "</s><|endoftext|> <|im_end|>\n",
    "<start_of_turn>user\nthe cat<end_of_turn>\n",
    "",
]
DIALOGUE = [
    {"role": "user", "content": "the cat?"},
    {"role": "assistant", "content": " yes the cat"},
    {"role": "user", "content": " and the dog?"},
]


def look(folder: str) -> tuple[dict, dict[str, np.ndarray]]:
    """What the Transformers that is installed makes of a folder: (facts, logits)."""
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    # Eager attention: the definition, with Gemma 2's softcap in both versions.
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, torch_dtype=torch.float32, attn_implementation="eager"
    ).eval()
    generation = transformers.GenerationConfig.from_pretrained(folder)
    facts = {
        "ids": [tokenizer(text).input_ids for text in TEXTS],
        "given": sorted(tokenizer("a")),
        "plain ids": [tokenizer(text, add_special_tokens=False).input_ids for text in TEXTS],
        "names": [tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token],
        "numbers": [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id],
        "stops": generation.eos_token_id,
        "dtype": str(transformers.AutoConfig.from_pretrained(folder).torch_dtype),
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    facts["decoded"] = [tokenizer.decode(ids) for ids in facts["ids"]]
    facts["decoded plain"] = [tokenizer.decode(x, skip_special_tokens=True) for x in facts["ids"]]
    for ask in (False, True):
        if tokenizer.chat_template:
            facts[f"dialogue {ask}"] = tokenizer.apply_chat_template(
                DIALOGUE, tokenize=False, add_generation_prompt=ask
            )
    logits, greedy = {}, []
    for i, ids in enumerate(facts["ids"]):
        if not ids:
            continue
        batch = torch.tensor([ids])
        with torch.no_grad():
            logits[str(i)] = model(input_ids=batch).logits[0].numpy()
            given = tokenizer(TEXTS[i], return_tensors="pt")  # as people do it
            made = model.generate(**given, do_sample=False, max_new_tokens=20)
        greedy.append(tokenizer.decode(made[0]))
    return facts | {"greedy": greedy}, logits


def write_what_is_seen(out: Path, folders: list[str]) -> None:
    import transformers

    seen = {"version": transformers.__version__}
    for number, folder in enumerate(folders):
        try:
            facts, logits = look(folder)
        except Exception as error:  # told by the test of this folder, so that it sees the others
            facts, logits = {"error": f"{type(error).__name__}: {error}"}, {}
        seen[folder] = facts
        np.savez(out / f"{number}.npz", **logits)
    (out / "seen.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    write_what_is_seen(Path(sys.argv[1]), sys.argv[2:])
    raise SystemExit


from conftest import ARCHITECTURES, ROOT, make_tokenizer, pair_rows, write_jsonl  # noqa: E402

pytestmark = pytest.mark.slow
OLD = ("transformers==4.57.*", "tokenizers>=0.22,<0.23", "huggingface_hub>=0.34,<1")
# What version 5 writes under other names, besides the architectures of the other tests.
MORE = ("llama-scaled", "llama-turns", "family", "gemma3", "phi", "phi3")


def make_more(name: str, folder: Path) -> Path:
    import torch
    import transformers as hf

    import family

    torch.manual_seed(7)
    tokenizer = family.hf_tokenizer() if name == "family" else make_tokenizer("bos")
    ids = {f"{x}_token_id": getattr(tokenizer, f"{x}_token_id") for x in ("bos", "eos", "pad")}
    shared = ids | {
        "vocab_size": 320,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.1,
        "max_position_embeddings": 128,
    }
    rope = {"rope_type": "default", "rope_theta": 50_000.0}
    if name == "family":
        model = family.untrained_model()
    elif name == "llama-scaled":  # as Llama 3.1 and later
        rope = {
            "rope_type": "llama3", "rope_theta": 50_000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
        }  # fmt: skip
        model = hf.LlamaForCausalLM(hf.LlamaConfig(rope_parameters=rope, **shared))
    elif name == "gemma3":  # two ropes, one for each kind of layer
        rope = {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 60_000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
        }
        config = hf.Gemma3TextConfig(
            head_dim=8, sliding_window=8, query_pre_attn_scalar=8, rope_parameters=rope,
            layer_types=["sliding_attention", "full_attention"], **shared,
        )  # fmt: skip
        model = hf.Gemma3ForCausalLM(config)
    elif name == "llama-turns":  # special tokens that have no role, as in most chat models
        turns = ["<start_of_turn>", "<end_of_turn>"]
        tokenizer.add_special_tokens({"extra_special_tokens": turns})
        model = hf.LlamaForCausalLM(hf.LlamaConfig(rope_parameters=rope, **shared))
    elif name == "phi":  # turns only a part of each head
        rope |= {"partial_rotary_factor": 0.25}
        model = hf.PhiForCausalLM(hf.PhiConfig(rope_parameters=rope, **shared))
    elif name == "phi3":  # for texts longer than 64 tokens other factors
        rope |= {
            "rope_type": "longrope", "original_max_position_embeddings": 64,
            "short_factor": [1.0, 1.5, 2.0, 2.5], "long_factor": [2.0, 3.0, 4.0, 5.0],
        }  # fmt: skip
        config = hf.Phi3Config(original_max_position_embeddings=64, rope_parameters=rope, **shared)
        model = hf.Phi3ForCausalLM(config)
    else:
        raise AssertionError(name)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory, checkpoints):
    """Name -> (a model, the folder that one step of dpo.py on it exported)."""
    import common
    import dpo

    home = tmp_path_factory.mktemp("trained")
    rows = write_jsonl(home / "pairs.jsonl", pair_rows(40))
    folders = {}
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        patch.setattr(common, "beside", lambda module: None)  # no curves, no samples
        for name in (*ARCHITECTURES, *MORE):
            base = make_more(name, home / "base" / name) if name in MORE else checkpoints(name)
            folders[name] = (base, home / name)
            dpo.main(
                dpo.Args(
                    model=str(base),
                    dataset=str(rows),
                    output_dir=str(home / name),
                    beta=0.5,
                    batch_size=8,
                    micro_batch_size=8,
                    max_steps=1,
                    lr=1e-2,
                    schedule="constant",
                    warmup_ratio=0.0,
                    optimizer="adamw",
                    max_length=64,
                    max_prompt_length=40,
                    dtype="float32",
                )  # fmt: skip
            )
    for number, handler in handlers.items():
        signal.signal(number, handler)
    return folders


@pytest.fixture(scope="module")
def seen(trained, tmp_path_factory):
    """What each version sees: [(facts by folder, logits by folder) of version 5, of version 4]."""
    old = tmp_path_factory.mktemp("transformers4")
    # Without their dependencies, which are those of version 5: torch is not installed twice.
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(old)]
    subprocess.run([*install, *OLD], check=True, env=os.environ | {"PIP_CONSTRAINT": ""})
    found = []
    folders = [str(folder) for _, folder in trained.values()]
    for path in ("", str(old)):
        out = tmp_path_factory.mktemp("seen")
        env = os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        subprocess.run(
            [sys.executable, __file__, str(out), *folders], check=True, env=env, cwd=ROOT
        )
        facts = json.loads((out / "seen.json").read_text())
        logits = {f: dict(np.load(out / f"{i}.npz")) for i, f in enumerate(folders)}
        found.append((facts, logits))
    shutil.rmtree(old)  # a hundred megabytes
    return found


def test_two_versions_were_asked(seen):
    new, old = (facts["version"] for facts, _ in seen)
    assert (new.split(".")[0], old.split(".")[:2]) == ("5", ["4", "57"])


@pytest.mark.parametrize("name", (*ARCHITECTURES, *MORE))
def test_same_model_and_same_tokenizer(name, trained, seen):
    (new, new_logits), (old, old_logits) = seen
    folder = str(trained[name][1])
    assert "error" not in new[folder] and "error" not in old[folder], old[folder]
    for fact in new[folder]:
        assert old[folder][fact] == new[folder][fact], fact
    assert len(new_logits[folder]) >= len(TEXTS) - 1
    for text, logits in new_logits[folder].items():
        # fp32 rounding of a two-layer model is far below that.
        np.testing.assert_allclose(old_logits[folder][text], logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", (*ARCHITECTURES, *MORE))
def test_it_is_the_trained_model(name, trained, seen):
    """Also in version 5, which reads the names written for version 4 too: the model it started
    from, with the weights of the last checkpoint.
    """
    import torch
    import transformers
    from safetensors.torch import load_file

    (facts, logits), _ = seen
    base, folder = trained[name]
    model = transformers.AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    weights = load_file(folder / "checkpoint-1" / "policy.safetensors")
    loaded = model.load_state_dict(weights, strict=False)  # tied weights are saved once
    assert not loaded.unexpected_keys
    model.tie_weights()
    assert any(not torch.equal(tensor, before[key]) for key, tensor in weights.items())
    for text, expected in logits[str(folder)].items():
        with torch.no_grad():
            ids = torch.tensor([facts[str(folder)]["ids"][int(text)]])
            found = model(input_ids=ids).logits[0].numpy()
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
