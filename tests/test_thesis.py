"""results/thesis/: the scripts' commands are valid and follow the recipe; the reward function; the
lines of its README.
"""

import json
import math
import os
import re
import shlex
import subprocess
import sys
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from types import SimpleNamespace

import pytest
import torch
import tyro
from conftest import ROOT
from transformers import BatchEncoding

import common
import evaluate
from data.published import mt_pref_pair

THESIS = ROOT / "results" / "thesis"
BASES = {
    ("summarisation", "tinyllama"): "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T",
    ("summarisation", "gemma"): "google/gemma-2-2b",
    ("translation", "tinyllama"): "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T",
    ("translation", "gemma"): "google/gemma-2-2b-it",
    ("translation", "eurollm"): "utter-project/EuroLLM-1.7B-Instruct",
}
SHARED = {"schedule": "cosine", "warmup_ratio": 0.1, "max_grad_norm": 1.0, "max_length": 2048}
SHARED |= {"max_prompt_length": 256, "max_steps": None, "weight_decay": 0.0, "lora_rank": 0}
PAIRS = SHARED | {"epochs": 3.0, "lr": 1e-7, "optimizer": "rmsprop", "beta": 0.1}
SFT = SHARED | {"epochs": 1.0, "lr": 1e-5, "optimizer": "adamw", "train_on_prompt": False}
DPO = PAIRS | {"label_smoothing": 0.0, "ref_model": None}
METHODS = {  # name: script, whether it begins with the SFT model, settings
    "sft": ("sft", False, SFT),
    "dpo": ("dpo", True, DPO | {"gamma": 0.0}),
    "dpo-gamma": ("dpo", True, DPO | {"gamma": 0.5}),
    "simpo": ("simpo", True, PAIRS | {"gamma_beta_ratio": 5.0, "nll_weight": 0.0}),
    "slic-dpo": ("slic", True, PAIRS | {"target_weight": 0.0, "reference_normalised": True}),
    "cpo": ("cpo", False, PAIRS | {"nll_weight": 1.0}),
    "slic": ("slic", False, PAIRS | {"target_weight": 0.04, "reference_normalised": False}),
    "sft-cpo": ("cpo", True, PAIRS | {"nll_weight": 1.0}),
}


def dry_run(task: str, *args: str) -> list[list[str]]:
    env = os.environ | {"DRY_RUN": "1"}
    command = [THESIS / f"{task}.sh", *args]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    return [shlex.split(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("task, model", BASES)
def test_every_command_is_valid_and_follows_the_recipe(task, model):
    runs, data = f"runs/thesis/{task}/{model}", {"summarisation": "tldr"}.get(task, "mt-pref")
    base, names, measured = BASES[task, model], [], []
    for launcher, *words in dry_run(task, model, "4", "--fsdp"):
        if launcher == "python":
            args = tyro.cli(evaluate.Args, args=words[1:])
            assert (words[0], args.baseline, args.temperature) == (
                "evaluate.py",
                f"{runs}/sft",
                (0,),
            )
            assert (args.dataset, args.text_metrics) == (data, True)
            measured.append(args.model)
            continue
        module = import_module(words[1].removesuffix(".py"))
        args = common.parse(module.Args, module.PRESETS, "", words[2:])
        names.append(args.output_dir.removeprefix(f"{runs}/"))
        script, after_sft, settings = METHODS[names[-1]]
        settings = settings | {"dataset": data, "batch_size": 128 if model == "eurollm" else 64}
        assert {name: getattr(args, name) for name in settings} == settings
        assert (module.__name__, args.fsdp) == (script, True)
        assert args.model == (f"{runs}/sft" if after_sft else base)
        # Nothing that trains is left to the preset of another model.
        assert set(args.preset) - args.given <= {"micro_batch_size", "gamma", "delta"}
    assert names[0] == "sft" and set(names) | {"sft-cpo"} == set(METHODS)
    assert set(measured) == {base, *(f"{runs}/{name}" for name in names[1:])}


def test_the_script_of_the_readme_makes_rows(tmp_path):
    """With files as sacrebleu would fetch them, and without fetching."""
    blocks = re.findall(r"^```\n(.*?)^```$", (THESIS / "README.md").read_text(), re.M | re.S)
    script = re.search(r"^ *python - .*?^END\n", blocks[1], re.M | re.S)[0]
    (tmp_path / "de-en.src").write_text("Hund: ä\nB\n")
    (tmp_path / "de-en.ref").write_text("Dog: a\nC\n")
    row = {"source": "Hund: ä", "lp": "de-en", "chosen": "Dog: a", "rejected": "x"}
    prompt = mt_pref_pair(row, len)["prompt"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    env["PATH"] = f"{os.path.dirname(sys.executable)}:{env['PATH']}"
    words = ["bash", "-euc", f"pair=de-en\n{script}"]
    subprocess.run(words, cwd=tmp_path, env=env, check=True)
    line = (tmp_path / "wmt23-de-en.jsonl").read_text().splitlines()[0]
    # What evaluate.py --export lines reads.
    expected = {"prompt": prompt, "completion": " Dog: a", "source": "Hund: ä"}
    assert json.loads(line) == expected


def test_the_reward_is_the_sigmoid_of_each_pair(monkeypatch):
    """In batches of similar length, in the order of the pairs."""
    spec = spec_from_file_location("deberta_reward", THESIS / "deberta_reward.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)

    def model(x: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=x[:, None])

    def tokenizer(prompts: list[str], answers: list[str], truncation: str, **how) -> BatchEncoding:
        assert truncation == "longest_first"  # the prompt is cut, the answer stays
        lengths = [len(p) - len(a) for p, a in zip(prompts, answers, strict=True)]
        return BatchEncoding({"x": torch.tensor(lengths)})

    model.device = "cpu"
    monkeypatch.setattr(module, "load", lambda: (model, tokenizer))
    monkeypatch.setattr(module, "AT_ONCE", 3)
    found = module.score(["four", " one ", "a", "ab", "abc"], ["abc", "a", "ab", "a", "abcde"])
    assert found == pytest.approx([100 / (1 + math.exp(-x)) for x in (1, 2, -1, 1, -2)])
