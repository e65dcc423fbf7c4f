"""lm_eval (EleutherAI's evaluation harness) on folders that a run saved: its log-likelihoods are
our log-probs.

What could differ without a word is the beginning (one BOS, none, two) and the end: a choice of
lm_eval's ends where its text ends, a response of ours with an end-of-sequence token, which counts.
So every answer is a choice twice, without that token and with it.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import zipfile
from itertools import islice
from pathlib import Path

import pytest
import torch
from conftest import ROOT, pair_rows, write_jsonl

import common
import dpo
import family

pytestmark = pytest.mark.slow
# With what it needs besides our own requirements; it is asked for no more than it uses here.
LM_EVAL = "lm_eval==0.4.13"
NEEDS = """evaluate==0.4.6 sqlitedict==2.1.0 word2number==1.1 more-itertools==11.2.1
pytablewriter==1.2.1 DataProperty==1.1.1 mbstrdecoder==1.1.5 pathvalidate==3.3.1 tabledata==1.3.5
tcolorpy==0.1.7 typepy==1.3.5 chardet==6.0.0.post1 pytz==2026.6""".split()
TASK = """
task: answers
dataset_path: json
dataset_kwargs:
  data_files:
    test: {rows}
test_split: test
output_type: multiple_choice
doc_to_text: prompt
doc_to_choice: choices
doc_to_target: 0
target_delimiter: ""
metric_list:
  - metric: acc
"""


@pytest.fixture(scope="module")
def harness(tmp_path_factory):
    """A folder for PYTHONPATH."""
    folder = tmp_path_factory.mktemp("lm_eval")
    # Without their dependencies, which are ours where they overlap: torch is not installed twice.
    pip, env = [sys.executable, "-m", "pip", "-q"], os.environ | {"PIP_CONSTRAINT": ""}
    install = [*pip, "install", "--no-deps", "--target", str(folder), *NEEDS]
    subprocess.run(install, check=True, env=env)
    subprocess.run([*pip, "download", "--no-deps", LM_EVAL], check=True, env=env, cwd=folder)
    (wheel,) = folder.glob("lm_eval-*.whl")
    with zipfile.ZipFile(wheel) as file:  # but for its own tasks, 16,000 files
        tasks = "lm_eval/tasks/"
        own = [name for name in file.namelist() if re.match(tasks + ".*/", name)]
        file.extractall(folder, set(file.namelist()) - {*own})
    yield folder
    shutil.rmtree(folder)


def trained(home: Path, base: Path) -> Path:
    """The folder that one step of dpo.py exported."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        patch.setattr(common, "beside", lambda module: None)  # no curves, no samples
        dpo.main(
            dpo.Args(
                model=str(base),
                dataset=str(write_jsonl(home / "pairs.jsonl", pair_rows(40))),
                output_dir=str(home / "trained"),
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
    return home / "trained"


def family_rows(n: int) -> list[dict]:
    """Right answers, and such as were spoiled."""
    return [row for _, row in islice(family.rows("family:off-policy", "test", "pair"), n)]


def our_logps(folder: Path, rows: list[dict], at: Path) -> list[list[float]]:
    """A row: of chosen and of rejected, without the end-of-sequence token, then with it."""

    class OneProcess:
        device, world = torch.device("cpu"), 1

    tokenizer = common.load_tokenizer(str(folder), 128)
    policy = common.load_policy(str(folder), "float32", OneProcess())
    file = str(write_jsonl(at, rows))
    data, _ = common.load_rows(file, file, "pair", tokenizer, 512, 400)  # held out are others
    assert len(data) == len(rows)
    found = []
    for start in range(0, len(rows), 8):
        micro = common.collate_for(policy, data, list(range(start, min(start + 8, len(rows)))))
        with torch.no_grad():
            each = common.response_token_logps(policy, micro)  # (B, 2, T)
        last = each.gather(2, micro.lengths[..., None].long() - 1)[..., 0]  # (B, 2)
        whole = each.sum(-1)
        found += torch.cat([whole - last, whole], 1).tolist()
    return found


def their_logps(
    folder: Path, rows: list[dict], end: str, home: Path, harness: Path
) -> tuple[list[list[float]], float]:
    """The same by the command line of the README, and its accuracy."""
    home.mkdir()
    docs = [
        {
            "prompt": row["prompt"],
            "choices": [row[c] + e for e in ("", end) for c in ("chosen", "rejected")],
        }
        for row in rows
    ]
    (home / "answers.yaml").write_text(TASK.format(rows=write_jsonl(home / "rows.jsonl", docs)))
    paths = {"PYTHONPATH": str(harness), "HF_HOME": str(home / "cache")}
    # fmt: off
    subprocess.run(
        [
            sys.executable, "-m", "lm_eval", "--model", "hf",
            "--model_args", f"pretrained={folder},dtype=float32",
            "--tasks", "answers", "--include_path", str(home), "--device", "cpu",
            "--batch_size", "8", "--output_path", str(home / "out"), "--log_samples",
        ],
        check=True, cwd=home,
        env=os.environ | paths | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    # fmt: on
    (samples,) = (home / "out").rglob("samples_answers_*.jsonl")
    (results,) = (home / "out").rglob("results_*.json")
    seen = [json.loads(line) for line in samples.read_text().splitlines()]
    seen.sort(key=lambda sample: sample["doc_id"])
    logps = [[float(choice[0][0]) for choice in sample["resps"]] for sample in seen]
    accuracy = json.loads(results.read_text())["results"]["answers"]["acc,none"]
    return logps, accuracy


def apart(ours: list[list[float]], theirs: list[list[float]]) -> float:
    """The largest difference."""
    pairs = zip(ours, theirs, strict=True)
    return max(abs(a - b) for row in pairs for a, b in zip(*row, strict=True))


# `tiny` begins a text with BOS, Qwen's tokenizer has none.
@pytest.mark.parametrize("name", ["tiny", "qwen2"])
def test_its_log_likelihoods_are_our_log_probs(name, harness, checkpoints, tmp_path):
    folder = ROOT / "tiny" if name == "tiny" else trained(tmp_path, checkpoints(name))
    rows = family_rows(64) if name == "tiny" else pair_rows(64, seed=1)
    ours = our_logps(folder, rows, tmp_path / "rows.jsonl")
    end = common.load_tokenizer(str(folder), 128).eos_token
    theirs, accuracy = their_logps(folder, rows, end, tmp_path / "task", harness)
    print(f"{name}: the largest difference is {apart(ours, theirs):.1e}, accuracy {accuracy:.4f}")
    assert len(theirs) == 64
    assert apart(ours, theirs) < 1e-4
    ends = [row[k + 2] - row[k] for row in ours for k in (0, 1)]
    assert min(ends) < -0.1  # worth something, so comparing it shows something
    assert accuracy == sum(max(row) == row[0] for row in ours) / 64
