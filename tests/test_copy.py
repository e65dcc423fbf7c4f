"""Take one file with you: a method file, common.py, a .jsonl and a model are enough to train."""

import json
import math
import shutil
import time
from pathlib import Path

import pytest
from conftest import ROOT, pair_rows, run_script, start_script, write_jsonl

FLAGS = """
--model model --dataset rows.jsonl --max-length 64 --max-prompt-length 40 --lr 3e-4
--schedule linear --batch-size 8 --micro-batch-size 4 --save-every 8
""".split()


@pytest.fixture
def kit(checkpoints, tmp_path):
    """kit(script) -> a folder with the script, common.py, rows and a model."""

    def make(script: str) -> Path:
        folder = tmp_path / "kit"
        folder.mkdir()
        for name in (script, "common.py"):
            shutil.copy(ROOT / name, folder)
        shutil.copytree(checkpoints("llama"), folder / "model")
        rows = pair_rows(60)
        if script == "sft.py":
            rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
        write_jsonl(folder / "rows.jsonl", rows)
        return folder

    return make


def steps_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").open()]


def test_two_files_train_resume_and_export(kit):
    folder = kit("dpo.py")
    words = [*FLAGS, "--beta", "0.5", "--max-steps", "60"]
    status, _, err = run_script("dpo.py", *words, "--output-dir", "whole", cwd=folder)
    assert status == 0, err
    process = start_script("dpo.py", *words, "--output-dir", "killed", cwd=folder)
    limit = time.monotonic() + 300
    while not list((folder / "killed").glob("checkpoint-*")):
        assert process.poll() is None and time.monotonic() < limit, process.communicate()
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert not (folder / "killed" / "model.safetensors").exists(), "too late: it had finished"
    status, out, err = run_script("dpo.py", *words, "--output-dir", "killed", cwd=folder)
    assert status == 0 and "resume" in out, err
    weights = [(folder / name / "model.safetensors").read_bytes() for name in ("whole", "killed")]
    assert weights[0] == weights[1]
    steps = steps_of(folder / "whole")
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-5) and steps[-1]["loss"] < 0.5

    from transformers import AutoModelForCausalLM, AutoTokenizer

    policy = AutoModelForCausalLM.from_pretrained(folder / "killed")
    ids = AutoTokenizer.from_pretrained(folder / "killed")("the cat sat?", return_tensors="pt")
    assert policy(ids.input_ids).logits.isfinite().all()
    made, given = {"whole", "killed"}, {"dpo.py", "common.py", "model", "rows.jsonl"}
    assert {path.name for path in folder.iterdir()} - {"__pycache__"} == made | given


@pytest.mark.slow
@pytest.mark.parametrize("script", ["sft.py", "simpo.py", "ipo.py"])
def test_the_same_losses_as_with_the_folders(kit, script, tmp_path):
    """All rows are used alone (nothing is held out), so an eval set is named for the other run."""
    folder = kit(script)
    words = [*FLAGS, "--max-steps", "3", "--output-dir", "out"]
    status, _, err = run_script(script, *words, cwd=folder)
    assert status == 0, err
    shutil.copytree(folder, tmp_path / "full")
    for name in ("data", "training", "kernels", "sampling", "family"):
        shutil.copytree(ROOT / name, tmp_path / "full" / name)
    words[-1] = "full"
    status, _, err = run_script(
        script, *words, "--eval-dataset", "rows.jsonl", cwd=tmp_path / "full"
    )
    assert status == 0, err
    alone = steps_of(folder / "out")
    full = [line for line in steps_of(tmp_path / "full" / "full") if "lr" in line]
    for a, b in zip(alone, full, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)


def test_what_was_not_copied_is_said_to_be_missing(kit):
    folder = kit("dpo.py")
    words = [*FLAGS, "--lora-rank", "4", "--max-steps", "1"]
    status, _, err = run_script("dpo.py", *words, cwd=folder)
    assert status != 0 and "needs the folder training/" in err
