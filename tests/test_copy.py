"""Take one file with you: dpo.py, common.py, rows and a model are all it takes to train."""

import inspect
import json
import math
import shutil
import sys
import time
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    ROOT,
    labelled_rows,
    pair_rows,
    ranked_rows,
    run_script,
    start_script,
    write_jsonl,
)
from torch import Tensor

import dpo
import sft

FLAGS = """
--model model --dataset pairs.jsonl --max-length 64 --max-prompt-length 40
--beta 0.5 --lr 3e-4 --schedule linear --warmup-ratio 0.1 --optimizer adamw
--batch-size 8 --micro-batch-size 4 --max-steps 60 --eval-every 9 --save-every 8
""".split()


@pytest.fixture
def kit(checkpoints, tmp_path) -> Path:
    """An empty folder with four things in it."""
    folder = tmp_path / "kit"
    folder.mkdir()
    for name in ("dpo.py", "common.py"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(checkpoints("llama"), folder / "model")
    write_jsonl(folder / "pairs.jsonl", pair_rows(60))
    return folder


def test_two_files_train_resume_and_export(kit):
    status, _, err = run_script("dpo.py", *FLAGS, "--output-dir", "whole", cwd=kit)
    assert status == 0, err

    process = start_script("dpo.py", *FLAGS, "--output-dir", "killed", cwd=kit)
    limit = time.monotonic() + 300
    while not list((kit / "killed").glob("checkpoint-*")):
        assert process.poll() is None and time.monotonic() < limit, process.communicate()
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert not (kit / "killed" / "model.safetensors").exists(), "too late: it had finished"
    status, out, err = run_script("dpo.py", *FLAGS, "--output-dir", "killed", cwd=kit)
    assert status == 0, err
    assert "resume" in out and "killed/checkpoint-" in out

    weights = [(kit / name / "model.safetensors").read_bytes() for name in ("whole", "killed")]
    assert weights[0] == weights[1]
    lines = [json.loads(line) for line in (kit / "killed" / "metrics.jsonl").open()]
    assert [line["step"] for line in lines if "lr" in line] == list(range(1, 61))
    assert lines[0]["eval/loss"] == pytest.approx(math.log(2), abs=1e-6, rel=0)
    assert lines[-1]["eval/loss"] < 0.5

    from transformers import AutoModelForCausalLM, AutoTokenizer

    policy = AutoModelForCausalLM.from_pretrained(kit / "killed")
    tokenizer = AutoTokenizer.from_pretrained(kit / "killed")
    ids = tokenizer("the cat sat?", return_tensors="pt").input_ids
    assert policy(ids).logits.isfinite().all()
    # Nothing outside of the folder was needed, and nothing else was written into it.
    made, given = {"whole", "killed", "runs"}, {"dpo.py", "common.py", "model", "pairs.jsonl"}
    assert {p.name for p in kit.iterdir()} - {"__pycache__"} == made | given


PAIRS = dict.fromkeys(["cpo", "simpo", "slic", "ipo", "orpo"], pair_rows)
ROWS = PAIRS | {
    "kto": labelled_rows,
    "pro": ranked_rows,
    "rrhf": ranked_rows,
    "listwise_dpo": ranked_rows,
}


def load_copy(file: Path, monkeypatch) -> ModuleType:
    """What `import` finds in a process that was started there, until the test ends."""
    spec = spec_from_file_location(file.stem, file)
    module = module_from_spec(spec)
    monkeypatch.setitem(sys.modules, file.stem, module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("script", ROWS)
def test_two_files_of_each_method_train(checkpoints, tmp_path, monkeypatch, script):
    """Nothing else can be imported: neither the path nor what is loaded holds another of ours."""
    for name in (f"{script}.py", "common.py"):
        shutil.copy(ROOT / name, tmp_path)
    write_jsonl(tmp_path / "rows.jsonl", ROWS[script](60))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if Path(p or ".").resolve() != ROOT])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    for name, module in list(sys.modules.items()):
        if ROOT in Path(getattr(module, "__file__", None) or "/").parents:
            if not name.startswith(("test_", "conftest")):
                monkeypatch.delitem(sys.modules, name)
    copied = load_copy(tmp_path / "common.py", monkeypatch)
    method = load_copy(tmp_path / f"{script}.py", monkeypatch)
    assert method.common is copied and copied.HERE == tmp_path
    method.main(
        method.Args(
            model=str(checkpoints("llama")), dataset="rows.jsonl", output_dir="out", lr=1e-3,
            max_length=64, max_prompt_length=40, batch_size=8, micro_batch_size=4, max_steps=4,
            schedule="constant", warmup_ratio=0.0, optimizer="adamw", save_every=3,
        )
    )  # fmt: skip

    lines = [json.loads(line) for line in Path("out/metrics.jsonl").open()]
    steps = [line for line in lines if "lr" in line]
    assert [step["step"] for step in steps] == [1, 2, 3, 4]
    assert lines[-1]["eval/loss"] < lines[0]["eval/loss"]
    assert {p.name for p in Path("out").glob("checkpoint-*")} == {"checkpoint-4"}
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = AutoTokenizer.from_pretrained("out")("the cat sat?", return_tensors="pt").input_ids
    assert AutoModelForCausalLM.from_pretrained("out")(ids).logits.isfinite().all()
    given = {f"{script}.py", "common.py", "rows.jsonl"}
    assert {p.name for p in Path().iterdir()} - {"__pycache__", "runs"} == given | {"out"}


SCORERS = (
    "generation.py",
    "samples.py",
    "scoring.py",
)  # what the scripts that sample and score need besides
GROUPS = (
    "--reward mine.py:length --samples 2 --batch-epochs 1 --minibatches 1 --temperature 1".split()
)
LENGTH = "def length(prompts, responses):\n    return [len(r) / 9 for r in responses]\n"


@pytest.mark.parametrize("script", ["reward_model", "ppo", "rso", "rloo", "grpo", "raft"])
def test_four_files_sample_score_and_learn(checkpoints, tmp_path, script):
    """As a user starts them, with nothing else of ours in the folder."""
    for name in (f"{script}.py", "common.py", *SCORERS):
        shutil.copy(ROOT / name, tmp_path)
    write_jsonl(tmp_path / "rows.jsonl", pair_rows(60))
    (tmp_path / "mine.py").write_text(LENGTH)
    own = {
        "reward_model": ["--adam-eps", "1e-8", "--zero-on", "8"],
        "ppo": [*"--reward mine.py:length --kl-coef 0.1 --ppo-epochs 2 --minibatches 1".split()]
        + ["--temperature", "1", "--adam-eps", "1e-8"],
        "rloo": [*GROUPS, *"--kl-coef 0.1 --adam-eps 1e-8".split()],
        "grpo": [
            *GROUPS,
            *"--kl-coef 0.1 --adam-eps 1e-8 --normalise grpo --clip-high 0.2".split(),
        ],
        "raft": [*GROUPS, *"--kl-coef 0.1".split()],
        "rso": [*"--reward mine.py:length --samples 4 --accepted 4 --sampling-beta 1".split()]
        + [*"--gamma 0.3 --temperature 1 --top-k 0 --prompts 32".split()],
    }[script]
    flags = [*"--model model --dataset rows.jsonl --output-dir out --max-steps 2".split()]
    flags += [*"--max-length 52 --max-prompt-length 40 --batch-size 8 --micro-batch-size 4".split()]
    flags += [*"--lr 1e-3 --schedule constant --warmup-ratio 0 --optimizer adamw".split()]
    shutil.copytree(checkpoints("llama"), tmp_path / "model")
    status, out, err = run_script(f"{script}.py", *flags, *own, cwd=tmp_path)
    assert status == 0, err
    steps = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").open()]
    assert [step["step"] for step in steps if "lr" in step] == [1, 2]
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_what_was_not_copied_is_said_to_be_missing(kit):
    """Other files than .jsonl, hub ids and short names are sources.py's business."""
    (kit / "pairs.csv").write_text("prompt,chosen,rejected\na,b,c\n")
    flags = ["pairs.csv" if flag == "pairs.jsonl" else flag for flag in FLAGS]
    status, _, err = run_script("dpo.py", *flags, cwd=kit)
    assert status == 1
    assert "sources.py" in err and "pairs.csv" in err
    assert "Traceback" not in err


def pasted(function) -> object:
    """The function's source in a notebook that has imported torch and three names."""
    names = {"torch": torch, "F": F, "Tensor": Tensor}
    exec(inspect.getsource(function), names)  # noqa: S102
    return names[function.__name__]


def test_dpo_loss_can_be_pasted():
    loss = pasted(dpo.dpo_loss)
    logps = torch.tensor([[-3.0, -1.0], [-4.0, -6.0], [-2.0, -2.0], [-5.0, -2.0]])  # 4 x (B,)
    losses, metrics = loss(*logps, beta=0.5)
    # margins: 0.5 * ((-3 + 2) - (-4 + 5)) = -1, and 0.5 * ((-1 + 2) - (-6 + 2)) = 2.5
    expected = [math.log1p(math.exp(1)), math.log1p(math.exp(-2.5))]
    assert losses.tolist() == pytest.approx(expected, rel=1e-6)
    assert metrics["rewards/margins"].tolist() == [-1.0, 2.5]


def test_sft_loss_can_be_pasted():
    losses, metrics = pasted(sft.sft_loss)(torch.tensor([-3.0, -1.0]), torch.tensor([3, 2]))
    assert losses.tolist() == [3.0, 1.0]
    values, weights = metrics["loss"]
    assert values.sum() / weights.sum() == pytest.approx(4 / 5)
