"""--fsdp on two processes: the same weights as without, resume, sampling, low precision, LoRA."""

import os
import signal
import subprocess
import time

import pytest
from conftest import labelled_rows, pair_rows, run_script, start_script, write_jsonl
from whole_runs import OWN, SMALL, as_flags, assert_close, assert_same_run, lines_of

pytestmark = pytest.mark.slow
ROWS = {"kto": labelled_rows}


@pytest.fixture
def start(checkpoints, tmp_path):
    """start(script, folder, processes, *words, **flags) -> (status, stdout, stderr)."""

    def run(script, folder, processes=2, *words, launch=run_script, architecture="llama", **flags):
        rows = write_jsonl(tmp_path / f"{script}.jsonl", ROWS.get(script, pair_rows)(60))
        values = SMALL | OWN.get(script, {}) | {"max_steps": 3, "micro_batch_size": 2}
        values |= {"model": checkpoints(architecture), "dataset": rows, "lr": 1e-4}
        values |= {"output_dir": tmp_path / folder, "cache_dir": tmp_path / "cache"} | flags
        return launch(f"{script}.py", *as_flags(**values), *words, processes=processes)

    return run


@pytest.mark.parametrize(
    "script, architecture", [("dpo", "gemma2"), ("kto", "llama"), ("sft", "gpt2")]
)
def test_the_same_weights(start, tmp_path, script, architecture):
    """Also with a tied head, and with samples before the first step."""
    exact = {"dtype": "float64", "architecture": architecture}
    for folder, processes, words in (("one", 1, ()), ("two", 2, ("--fsdp",))):
        status, _, err = start(script, folder, processes, *words, **exact)
        assert status == 0, err
    assert_close(tmp_path / "one", tmp_path / "two")


def test_resume_and_another_number_of_processes(start, tmp_path):
    flags = {"dtype": "float64", "max_steps": 40, "eval_every": 0}
    status, _, err = start("dpo", "whole", 2, "--fsdp", "--deterministic", **flags)
    assert status == 0, err

    def interrupted(*words, processes):
        process = start_script(*words, processes=processes, start_new_session=True)
        while not list((tmp_path / "killed").glob("checkpoint-*")):
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
        subprocess.run(["pkill", "-9", "-f", str(tmp_path / "killed")])  # torchrun's children
        time.sleep(1)
        return process.communicate()

    start("dpo", "killed", 2, "--fsdp", "--deterministic", launch=interrupted, **flags)
    assert not (tmp_path / "killed" / "model.safetensors").exists()
    status, out, err = start("dpo", "killed", 2, "--fsdp", "--deterministic", **flags)
    assert status == 0 and "resume" in out, err
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


def test_a_sharded_run_continues_in_one_process(start, tmp_path):
    flags = {"dtype": "float64", "optimizer": "rmsprop"}
    assert start("dpo", "one", 1, max_steps=5, **flags)[0] == 0
    assert start("dpo", "two", 2, "--fsdp", max_steps=4, **flags)[0] == 0
    status, out, err = start("dpo", "two", 1, max_steps=5, **flags)
    assert status == 0 and "resume" in out, err
    assert_close(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize("lora", [0, 4])
def test_low_precision_and_adapters(start, tmp_path, lora):
    flags = {"dtype": "bfloat16", "lora_rank": lora}
    for folder, processes, words in (("one", 1, ()), ("two", 2, ("--fsdp",))):
        status, _, err = start("dpo", folder, processes, *words, **flags)
        assert status == 0, err
    losses = [[x["loss"] for x in lines_of(tmp_path / f) if "lr" in x] for f in ("one", "two")]
    assert losses[1] == pytest.approx(losses[0], abs=0.02)
    assert (tmp_path / "two" / "adapter").is_dir() == bool(lora)


def test_an_online_method(start, tmp_path):
    """Sampling gathers the weights; rewards come from a function."""
    (tmp_path / "my.py").write_text(
        "def score(prompts, answers):\n    return [len(a) for a in answers]\n"
    )
    flags = {"reward": f"{tmp_path}/my.py:score", "dtype": "float64", "samples": 2, "max_steps": 2}
    flags |= {"max_length": 60, "max_prompt_length": 50}
    for folder, processes, words in (("one", 1, ()), ("two", 2, ("--fsdp",))):
        status, _, err = start("rloo", folder, processes, *words, **flags)
        assert status == 0, err
    assert_close(tmp_path / "one", tmp_path / "two")
