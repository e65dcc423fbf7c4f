"""results/thesis/: every command of its scripts is accepted by the script it starts and resolves to
the thesis' recipe; its reward function; what its README does with files.
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
from pathlib import Path

import pytest
import torch
import tyro
from conftest import ROOT, write_jsonl

import common
import published
import scoring

THESIS = ROOT / "results" / "thesis"
BASES = {
    ("summarisation", "tinyllama"): "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T",
    ("summarisation", "gemma"): "google/gemma-2-2b",
    ("translation", "tinyllama"): "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T",
    ("translation", "gemma"): "google/gemma-2-2b-it",
    ("translation", "eurollm"): "utter-project/EuroLLM-1.7B-Instruct",
}
METHODS = {  # name: script, begins with, what it has beside the recipe
    "sft": ("sft", "base", {"train_on_prompt": False}),
    "dpo": ("dpo", "sft", {"gamma": 0.0, "label_smoothing": 0.0, "ref_model": None}),
    "dpo-gamma": ("dpo", "sft", {"gamma": 0.5, "label_smoothing": 0.0, "ref_model": None}),
    "simpo": ("simpo", "sft", {"gamma_beta_ratio": 5.0, "nll_weight": 0.0}),
    "slic-dpo": (
        "slic",
        "sft",
        {"delta": 1.0, "target_weight": 0.0, "reference_normalised": True, "ref_model": None},
    ),
    "cpo": ("cpo", "base", {"nll_weight": 1.0}),
    "slic": (
        "slic",
        "base",
        {"delta": 1.0, "target_weight": 0.04, "reference_normalised": False},
    ),
    "sft-cpo": ("cpo", "sft", {"nll_weight": 1.0}),
}


def recipe(task: str, model: str, script: str) -> dict:
    """What the thesis says, of all methods."""
    found = {
        "dataset": {"summarisation": "tldr", "translation": "mt-pref"}[task],
        "batch_size": 128 if model == "eurollm" else 64,
        "schedule": "cosine",
        "warmup_ratio": 0.1,
        "max_grad_norm": 1.0,
        "max_length": 2048,
        "max_prompt_length": 1024,
        "max_steps": None,
        "weight_decay": 0.0,
        "lora_rank": 0,
        "epochs": 3.0,
        "lr": 1e-7,
        "optimizer": "rmsprop",
        "beta": 0.1,
    }
    if script == "sft":
        del found["beta"]
        found |= {"epochs": 1.0, "lr": 1e-5, "optimizer": "adamw"}
    return found


def dry_run(task: str, *args: str, **env: str) -> list[list[str]]:
    done = subprocess.run(
        [THESIS / f"{task}.sh", *args],
        env=os.environ | {"DRY_RUN": "1"} | env, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("task, model", BASES)
def test_every_command_is_accepted_and_is_the_recipe(task, model):
    runs, seen = f"runs/thesis/{task}/{model}", []
    begins = {"base": BASES[task, model], "sft": f"{runs}/sft"}
    commands = [c for c in dry_run(task, model, "4") if c[0] == "torchrun"]
    for launcher, processes, script, *flags in commands:
        assert (launcher, processes) == ("torchrun", "--nproc_per_node=4")
        module = import_module(script.removesuffix(".py"))
        args = tyro.cli(module.Args, args=flags)
        name = args.output_dir.removeprefix(runs + "/")
        expected_script, start, more = METHODS[name]
        assert (script, args.model) == (f"{expected_script}.py", begins[start])
        assert args.model == begins["base"] or f"{runs}/sft" in {c[4] for c in commands}
        origin, _ = common.fill_in(args, module.SETTINGS)
        common.check_shared(args)
        expected = recipe(task, model, expected_script) | more
        assert {key: getattr(args, key) for key in expected} == expected
        # Nothing that trains is left to the row of some other model.
        taken = {key for key, where in origin.items() if where not in ("default", "command line")}
        assert taken <= {"micro_batch_size"}
        seen.append(name)
    wanted = set(METHODS) - ({"sft-cpo"} if task == "summarisation" else set())
    assert seen[0] == "sft" and set(seen) == wanted and len(seen) == len(wanted)


@pytest.mark.parametrize("task, model", BASES)
def test_every_model_is_evaluated(task, model, tmp_path):
    import evaluate

    runs = f"runs/thesis/{task}/{model}"
    rows = write_jsonl(tmp_path / "wmt 23.jsonl", [{"prompt": "a", "completion": "b"}])
    for test in ("", str(rows)) if task == "translation" else ("",):
        commands = dry_run(task, model, "4", **({"TEST": test} if test else {}))
        trained = [c[4] for c in commands if c[0] == "torchrun"]
        found = [tyro.cli(evaluate.Args, args=c[2:]) for c in commands if c[0] == "python"]
        assert {c[1] for c in commands if c[0] == "python"} == {"evaluate.py"}
        models = [args.model for args in found]
        assert models == [BASES[task, model], *(set_aside(trained, models))]
        assert set(models[1:]) == set(trained) - {f"{runs}/sft"}
        files = [file for args in found for file in (args.json, args.markdown, args.export) if file]
        assert len(set(files)) == len(files)
        for args in found:
            assert args.baseline == f"{runs}/sft" and args.text_metrics
            assert args.temperature == (0.0,)  # greedy, as in the thesis
            if test:
                assert (args.dataset, args.eval_dataset) == (test, test)
            else:
                assert args.dataset == recipe(task, model, "dpo")["dataset"]
            assert str(Path(args.json).parent) == runs  # which the first run has made
            if task == "summarisation":
                scoring.check_reward(args.reward)
                assert args.reward.endswith("deberta_reward.py:score")


def set_aside(trained: list[str], models: list[str]) -> list[str]:
    """The trained ones in the order in which they are evaluated."""
    return [model for model in models if model in trained]


def test_flags_that_follow_go_to_training():
    commands = dry_run("summarisation", "gemma", "8", "--fsdp", "--micro-batch-size", "2")
    for command in commands:
        trains = command[0] == "torchrun"
        assert trains == ("--fsdp" in command)
        if trains:
            assert command[1] == "--nproc_per_node=8"
            module = import_module(command[2].removesuffix(".py"))
            args = tyro.cli(module.Args, args=command[3:])
            assert args.fsdp and args.micro_batch_size == 2


@pytest.mark.parametrize("task", ["summarisation", "translation"])
def test_what_is_wrong_is_told_before_anything_runs(task, tmp_path):
    wrong = {
        (): "MODEL must be tinyllama",
        ("llama", "4"): "MODEL must be tinyllama.*, got 'llama'",
        ("gemma",): "GPUS must be a number, 1 or more, got ''",
        ("gemma", "0"): "GPUS must be a number, 1 or more, got '0'",
        ("gemma", "four"): "GPUS must be a number, 1 or more, got 'four'",
        ("gemma", "3"): "a batch of 64 rows cannot be dealt to 3 GPUs",
    }
    for args, message in wrong.items():
        done = subprocess.run([THESIS / f"{task}.sh", *args], capture_output=True, text=True)
        assert done.returncode == 2 and done.stdout == ""
        first, usage = done.stderr.splitlines()
        assert re.fullmatch(f"error: {message}.*", first), first
        assert usage.startswith(f"usage: results/thesis/{task}.sh tinyllama|gemma")
    if task == "translation":
        env = os.environ | {"TEST": "nosuch.jsonl"}
        line = [THESIS / "translation.sh", "gemma", "4"]
        done = subprocess.run(line, env=env, capture_output=True, text=True)
        assert done.returncode == 2 and "TEST: there is no file nosuch.jsonl" in done.stderr


@pytest.mark.parametrize("task", ["summarisation", "translation"])
def test_a_command_that_fails_ends_the_script(task, tmp_path):
    """Not one of the later ones starts; and bash reads the file."""
    script = THESIS / f"{task}.sh"
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    fake = tmp_path / "torchrun"
    fake.write_text(f'#!/bin/sh\necho "$2" >> {tmp_path}/log\ntest "$2" != simpo.py\n')
    fake.chmod(0o755)
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "DRY_RUN": ""}
    done = subprocess.run([script, "tinyllama", "2"], env=env, capture_output=True, text=True)
    assert done.returncode != 0
    assert (tmp_path / "log").read_text().split() == ["sft.py", "dpo.py", "dpo.py", "simpo.py"]


# --------------------------------------------------------------------------------------------------
# The README's lines


def blocks() -> list[str]:
    return re.findall(r"^```\n(.*?)^```$", (THESIS / "README.md").read_text(), re.M | re.S)


def test_its_links_lead_somewhere():
    links = re.findall(r"\]\(([^)#]+)\)", (THESIS / "README.md").read_text())
    assert [x for x in links if not x.startswith("https://") and not (THESIS / x).exists()] == []


def test_wmt23_becomes_prompts_of_training(tmp_path):
    """With files as sacrebleu would fetch them, and without fetching."""
    (block,) = [b for b in blocks() if "sacrebleu -t wmt23" in b]
    block = re.sub(r"^  for side in .*\n", "", block, flags=re.M)
    block = re.sub(r"^TEST=.*\n", "", block, flags=re.M).replace("en-de de-en", "de-en")
    (tmp_path / "de-en.src").write_text("Hund: ä\nB\n", encoding="utf-8")
    (tmp_path / "de-en.ref").write_text("Dog: a\nC\n", encoding="utf-8")
    bash(block, tmp_path)
    lines = (tmp_path / "wmt23-de-en.jsonl").read_text().splitlines()
    assert len(lines) == 2
    trained_on = published.mt_pref_pair(
        {"source": "Hund: ä", "lp": "de-en", "chosen": "Dog: a", "rejected": "x"}, len
    )
    assert json.loads(lines[0]) == {
        "prompt": trained_on["prompt"],
        "completion": trained_on["chosen"],
    }

    # An answer is missing, for it was cut.
    made = {"prompt": trained_on["prompt"], "completion": " A dog:\n a"}
    write_jsonl(tmp_path / "made.jsonl", [made])
    (block,) = [b for b in blocks() if "comet.{side}" in b]
    block = block[: block.index("python3 -m venv")]
    block = re.sub(r"^python - .* <<", "python - wmt23-de-en.jsonl made.jsonl <<", block)
    bash(block, tmp_path)
    sides = {side: (tmp_path / f"comet.{side}").read_text() for side in ("src", "mt", "ref")}
    assert sides == {"src": "Hund: ä\nB\n", "mt": "A dog: a\n\n", "ref": "Dog: a\nC\n"}
    write_jsonl(tmp_path / "made.jsonl", [made | {"prompt": "another"}])
    with pytest.raises(subprocess.CalledProcessError):
        bash(block, tmp_path)


def bash(block: str, home: Path) -> None:
    paths = {"PYTHONPATH": str(ROOT), "PYTHONUTF8": "1"}
    paths["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    subprocess.run(["bash", "-eu", "-c", block], cwd=home, env=os.environ | paths, check=True)


# --------------------------------------------------------------------------------------------------
# The reward


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    """A random DeBERTa v2 with one label, and a tokenizer of words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import (
        DebertaV2Config,
        DebertaV2ForSequenceClassification,
        PreTrainedTokenizerFast,
    )

    words = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *"the cat sat on a mat and then ran off".split()]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 1), ("[SEP]", 2)],
    )
    names = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
    torch.manual_seed(3)
    config = DebertaV2Config(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=48, max_position_embeddings=512, relative_attention=True,
        position_buckets=16, norm_rel_ebd="layer_norm", share_att_key=True, pos_att_type="p2c|c2p",
        position_biased_input=False, type_vocab_size=0, pooler_hidden_size=32, num_labels=1,
        initializer_range=0.6, pad_token_id=0,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("encoder")
    DebertaV2ForSequenceClassification(config).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    return folder


def reward_module(folder: Path | str, monkeypatch):
    monkeypatch.setenv("REWARD_MODEL", str(folder))
    spec = spec_from_file_location("deberta_reward", THESIS / "deberta_reward.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PROMPTS = ["the cat", " the cat sat on a mat and then ran ", "a mat", "a", ""]
ANSWERS = [" sat on a mat", "off", "the cat ran off and then sat", "", " then"]


def test_the_reward_is_the_sigmoid_of_the_pair_alone(encoder, monkeypatch):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    module = reward_module(encoder, monkeypatch)
    monkeypatch.setattr(module, "AT_ONCE", 3)
    assert module.load.cache_info().currsize == 0  # not before it is asked
    scores = module.score(PROMPTS, ANSWERS)
    model = AutoModelForSequenceClassification.from_pretrained(encoder).eval()
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    for prompt, answer, found in zip(PROMPTS, ANSWERS, scores, strict=True):
        # In lists: alone, an empty answer would be none at all, without its separator.
        given = tokenizer([prompt.strip()], [answer.strip()], return_tensors="pt")
        with torch.no_grad():
            (logit,) = model(**given).logits[0].tolist()
        assert found == pytest.approx(100 / (1 + math.exp(-logit)), abs=1e-4)
    assert max(scores) - min(scores) > 1 and module.load.cache_info().currsize == 1
    assert module.score([], []) == []
    with pytest.raises(ValueError):
        module.score(["a"], [])


def test_an_answer_stays_whole_behind_a_long_prompt(encoder, monkeypatch):
    module = reward_module(encoder, monkeypatch)
    monkeypatch.setattr(module, "MAX_TOKENS", 16)  # three of them are special
    long = "the cat sat on a mat and then ran off the cat"
    answers = ["a mat and then", "a mat and the"]
    cut = module.score([long, long], answers)
    assert cut[0] != cut[1]  # the last word is read
    assert cut == pytest.approx(module.score(["the cat sat on a mat and then ran"] * 2, answers))


def test_through_the_door_of_evaluate(encoder, monkeypatch):
    monkeypatch.setenv("REWARD_MODEL", str(encoder))
    tokenizer = common.load_tokenizer("tiny", 128)
    name = f"{THESIS / 'deberta_reward.py'}:score"
    reward = scoring.load_reward(name, tokenizer, common.Processes(), "float32")
    texts = ["Family: Ada: partner of Ben. Who is the partner of Ada?"]
    prompts = [tokenizer(texts[0], return_tensors="np").input_ids[0]]
    answers = [tokenizer(" Ben", add_special_tokens=False, return_tensors="np").input_ids[0]]
    found = reward(prompts, answers)
    assert found.shape == (1,) and 0 <= float(found) <= 100


def test_pickles_and_other_heads_are_refused(encoder, monkeypatch, tmp_path):
    from shutil import copytree

    from safetensors.torch import load_file

    folder = copytree(encoder, tmp_path / "pickle")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(OSError, match="safetensors"):
        reward_module(folder, monkeypatch).score(["a"], ["a"])

    folder = copytree(encoder, tmp_path / "labels")
    config = json.loads((folder / "config.json").read_text())
    config["id2label"] = {"0": "a", "1": "b"}
    config["label2id"] = {"a": 0, "b": 1}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises((ValueError, RuntimeError), match="2 labels|size mismatch|mismatched"):
        reward_module(folder, monkeypatch).score(["a"], ["a"])
