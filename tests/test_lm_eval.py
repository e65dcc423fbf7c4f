"""The log-likelihoods of lm_eval (EleutherAI's harness) on our folders are our log-probs.

What could differ is the beginning of a text (one BOS, none, two) and its end: a response of ours
ends with an end-of-sequence token, a choice of lm_eval does not. So every response is a choice
twice, without that token and with it.
"""

import json
import os
import re
import subprocess
import sys
import zipfile
from itertools import islice

import pytest
from conftest import ROOT, pair_rows

import common
from family import task

pytestmark = pytest.mark.network
# Without the dependencies that are ours too: torch is not installed twice.
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
    pip, env = [sys.executable, "-m", "pip", "-q"], os.environ | {"PIP_CONSTRAINT": ""}
    install = [*pip, "install", "--no-deps", "--target", folder, *NEEDS]
    subprocess.run(install, check=True, env=env)
    subprocess.run([*pip, "download", "--no-deps", LM_EVAL], check=True, env=env, cwd=folder)
    (wheel,) = folder.glob("lm_eval-*.whl")
    with zipfile.ZipFile(wheel) as file:  # without its own tasks, 16,000 files
        file.extractall(
            folder, [n for n in file.namelist() if not re.match("lm_eval/tasks/.*/", n)]
        )
    return folder


# `tiny` begins a text with BOS, Qwen's tokenizer has none.
@pytest.mark.parametrize("name", ["tiny", "qwen2"])
def test_its_log_likelihoods_are_our_log_probs(name, harness, checkpoints, tmp_path):
    folder, rows = ROOT / "family" / "tiny", pair_rows(64, seed=1)
    if name == "tiny":
        rows = [row for _, row in islice(task.rows("family:off-policy", "test", "pair"), 64)]
    else:
        folder = checkpoints(name)
    tokenizer, run = common.load_tokenizer(str(folder)), common.Processes()
    ids_of = lambda text: tokenizer(text, add_special_tokens=False).input_ids  # noqa: E731
    docs, data = [], []
    for row in rows:
        texts = [row["chosen"], row["rejected"]]
        choices = [*texts, *(text + tokenizer.eos_token for text in texts)]
        docs.append(json.dumps({"prompt": row["prompt"], "choices": choices}) + "\n")
        prompt, *ids = (ids_of(text) for text in (row["prompt"], *texts))
        ended = [[*y, tokenizer.eos_token_id] for y in ids]
        data.append(common.Row(tokenizer.bos + prompt, ids + ended, prompt))
    policy = common.load_policy(common.Args(dtype="float32"), run, str(folder))
    ours = common.compute_logps(policy, data, [[i] for i in range(64)], run, "").tolist()

    (tmp_path / "rows.jsonl").write_text("".join(docs))
    (tmp_path / "answers.yaml").write_text(TASK.format(rows=tmp_path / "rows.jsonl"))
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--device", "cpu"]
    command += ["--model_args", f"pretrained={folder},dtype=float32", "--tasks", "answers"]
    command += ["--include_path", tmp_path, "--batch_size", "8", "--log_samples"]
    env = {"PYTHONPATH": str(harness), "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    command += ["--output_path", tmp_path / "out"]
    subprocess.run(command, check=True, cwd=tmp_path, env=os.environ | env)
    (samples,) = (tmp_path / "out").rglob("samples_answers_*.jsonl")
    seen = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda doc: doc["doc_id"])
    theirs = [[float(choice[0][0]) for choice in doc["resps"]] for doc in seen]
    assert len(theirs) == 64
    for row, expected in zip(ours, theirs, strict=True):
        assert row == pytest.approx(expected, abs=1e-4)
    assert max(row[k] - row[k + 2] for row in ours for k in (0, 1)) > 0.1  # the end counts
