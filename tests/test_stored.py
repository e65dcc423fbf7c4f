"""Samples and their scores in files: made once, read again, the same after any break."""

import json
import math
import re
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, run_script

import common
from sampling import stored
from sampling.generate import text_of
from sampling.rewards import contents_of
from training.checkpoint import file_hash

SAMPLES, CHUNK = 3, 4
FACTS = {"model": "tiny random", "attn": "sdpa", "a.bin": 64 * "a"}


# -- helpers


@pytest.fixture(scope="module")
def run():
    """One process; pytest gets its signal handlers back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield common.Processes()
    for number, handler in before.items():
        signal.signal(number, handler)


def load(folder: Path | str, run, fsdp: bool = False):
    args = common.Args(model=str(folder), dtype="float32", fsdp=fsdp)
    return common.load_policy(args, run), common.load_tokenizer(str(folder), 64)


@pytest.fixture(scope="module", params=("llama", "gpt2"))
def model(request, checkpoints, run):
    """(policy, tokenizer); GPT-2's tokenizer pads with its EOS and has no BOS."""
    return load(checkpoints(request.param), run)


def prompts_of(tokenizer, n: int = 10) -> list[np.ndarray]:
    texts = [f" the cat sat on {i} mats" + " and ran" * (i % 4) + "?" for i in range(n)]
    return [np.array(tokenizer(text).input_ids, np.int32) for text in texts]


class Broken(Exception):
    pass


class Reward:
    """Numbers that need all their digits. It counts how often it is called, and can break."""

    def __init__(self, breaks_at: int = 0):
        self.calls, self.breaks_at = [], breaks_at

    def __call__(self, prompts, responses):
        assert len(prompts) == len(responses)
        self.calls.append(len(prompts))
        if len(self.calls) == self.breaks_at:
            raise Broken
        ids = [np.concatenate(pair).tolist() for pair in zip(prompts, responses, strict=True)]
        scores = [math.sin(sum((i + 1) * token for i, token in enumerate(x))) for x in ids]
        return torch.tensor(scores, dtype=torch.float64)


def sample(model, run, folder, reward=None, prompts=None, facts=FACTS, name="run", **more):
    """With the cache in a folder, and the run's own folder in it."""
    policy, tokenizer = model
    prompts = prompts_of(tokenizer) if prompts is None else prompts
    how = {"samples": SAMPLES, "max_new_tokens": 12, "temperature": 1.0, "top_k": 40, "seed": 7}
    run.args, run.folder = SimpleNamespace(cache_dir=str(folder)), Path(folder) / name
    if common.MAIN_PROCESS:
        run.folder.mkdir(parents=True, exist_ok=True)
    return stored.sample_and_score(
        policy, prompts, tokenizer, reward or Reward(), run, facts,
        **how | {"chunk": CHUNK} | more,
    )  # fmt: skip


def plain(rows: list[common.Row]) -> list[list]:
    for row in rows:
        assert row.scores.dtype == np.float64 and row.scores.shape == (len(row.responses),)
        assert {ids.dtype for ids in row.responses} == {np.dtype(np.int32)}
    return [
        [row.prompt.tolist(), [ids.tolist() for ids in row.responses], row.scores.tolist()]
        for row in rows
    ]


@pytest.fixture
def made(model, run, tmp_path):
    """(what an unbroken run returns, the file in its folder)."""
    rows = sample(model, run, tmp_path / "made")
    return plain(rows), tmp_path / "made" / "run" / "sampled.jsonl"


# -- the files


def test_what_the_file_holds(model, made):
    """Texts as a data set has them, ids as they were drawn, scores to the last digit."""
    tokenizer, (rows, file) = model[1], made
    assert sorted(x.name for x in file.parent.iterdir()) == ["sampled.json", "sampled.jsonl"]
    facts = json.loads(file.with_suffix(".json").read_text())
    more = {"samples": 3, "max_new_tokens": 12, "top_k": 40, "temperature": 1.0, "seed": 7}
    assert (FACTS | more).items() < facts.items() and len(facts) == len(FACTS) + len(more) + 1
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    for i, (line, (prompt, ids, scores)) in enumerate(zip(lines, rows, strict=True)):
        assert prompt == prompts_of(tokenizer)[i].tolist()
        assert line == {
            "prompt": f" the cat sat on {i} mats" + " and ran" * (i % 4) + "?",
            "responses": [text_of(np.array(x), tokenizer) for x in ids],
            "scores": Reward()([prompt] * SAMPLES, ids).tolist(),
            "prompt_ids": prompt,
            "response_ids": ids,
        }
        assert scores == line["scores"]


@pytest.mark.parametrize("chunk, calls", [(1, 10), (10, 1), (0, 1)])
def test_samples_do_not_depend_on_chunks(model, run, made, tmp_path, chunk, calls):
    reward = Reward()
    assert plain(sample(model, run, tmp_path, reward, chunk=chunk)) == made[0]
    assert len(reward.calls) == calls
    assert (run.folder / "sampled.jsonl").read_bytes() == made[1].read_bytes()


# -- read again


def test_what_is_cached_is_read(model, run, made, capsys):
    """By the same run and by another one; a run that broke goes on where it was."""
    rows, file = made
    before, reward, cache = file.read_bytes(), Reward(), file.parent.parent
    for name in ("run", "another"):
        assert plain(sample(model, run, cache, reward, name=name)) == rows
        assert (run.folder / "sampled.jsonl").read_bytes() == before
        assert "30 answers to 10 prompts (cached)" in capsys.readouterr().out
    assert reward.calls == []
    with pytest.raises(Broken):
        sample(model, run, cache / "new", Reward(breaks_at=2))
    assert not (run.folder / "sampled.jsonl").exists()
    assert plain(sample(model, run, cache / "new", reward)) == rows
    assert reward.calls == [CHUNK * SAMPLES, 2 * SAMPLES]  # the last two of three chunks
    assert (run.folder / "sampled.jsonl").read_bytes() == before
    assert re.search(r"30 answers to 10 prompts \([\d,]+ tokens/s\)", capsys.readouterr().out)


MOVED = [
    ({"seed": 8}, "seed was 7, now 8"),
    ({"temperature": 0.9}, "temperature was 1.0, now 0.9"),
    ({"samples": 2, "top_k": 0}, "samples was 3, now 2; top_k was 40, now 0"),
    ({"max_new_tokens": 11}, "max_new_tokens was 12, now 11"),
    ({"facts": FACTS | {"a.bin": 64 * "b"}}, "a.bin has changed"),
    ({"facts": {"model": "tiny random", "attn": "sdpa"}}, "a.bin has changed"),
    ({"prompts": 9}, "the list of prompts has changed"),
]


@pytest.mark.parametrize("flags, text", MOVED)
def test_other_facts_are_other_samples(model, run, made, flags, text):
    """A run without a checkpoint draws them anew. One that has learned refuses, before anything is
    sampled.
    """
    (rows, file), flags, reward = made, dict(flags), Reward()
    if "prompts" in flags:
        flags["prompts"] = prompts_of(model[1])[: flags["prompts"]]
    cache = file.parent.parent
    (file.parent / "checkpoint-2").mkdir()
    with pytest.raises(common.UserError, match=re.escape(f"drew its samples, {text}. --resume")):
        sample(model, run, cache, reward, **flags)
    assert reward.calls == []
    (file.parent / "checkpoint-2").rmdir()
    sample(model, run, cache, reward, **flags)
    assert len(reward.calls) == 3 and len({*cache.glob("sampled-*")}) == 2
    assert plain(sample(model, run, cache, reward)) == rows  # nothing was lost
    assert len(reward.calls) == 3


def test_a_run_keeps_its_samples_when_only_rounding_would_move_them(model, run, made):
    """Another version of torch, or another attention."""
    rows, file = made
    (file.parent / "checkpoint-2").mkdir()
    reward, facts = Reward(), FACTS | {"attn": "eager", "torch": "9.0"}
    assert plain(sample(model, run, file.parent.parent, reward, facts=facts)) == rows
    assert reward.calls == []


def test_what_a_model_and_a_reward_hold(checkpoints, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder, other = checkpoints("llama"), checkpoints("gpt2")
    names = ["config.json", "generation_config.json", "model.safetensors"]
    names += ["tokenizer.json", "tokenizer_config.json"]
    expected = {str(folder / name): file_hash(folder / name) for name in names}
    assert contents_of(str(folder)) == expected
    (tmp_path / "mine.py").write_text("def score(prompts, responses): ...\n")
    mine = {"mine.py": file_hash(tmp_path / "mine.py")}
    assert contents_of("mine.py:score") == mine
    both = contents_of(f"{other}@{folder}")
    assert expected.items() < both.items() and str(other / "model.safetensors") in both
    assert [Path(name).name for name in contents_of("family")] == ["task.py"]
    assert contents_of("EleutherAI/pythia-160m") == {}


# -- several processes

SEVERAL = """
import json, sys
from pathlib import Path
sys.path[:0] = [{root!r}, {tests!r}]
import common, test_stored
import torch.distributed as dist
run = common.Processes()
for fsdp in (False, True):
    model = test_stored.load(sys.argv[1], run, fsdp)
    folder = Path(f"fsdp-{{fsdp}}")
    if run.rank:  # another machine's disk
        folder = Path("nowhere")
    for reward in (test_stored.Reward(breaks_at=2), test_stored.Reward(), test_stored.Reward()):
        try:
            rows = test_stored.sample(model, run, folder, reward)
        except test_stored.Broken:
            continue
        with open(f"found-{{run.rank}}-{{fsdp}}.jsonl", "a") as f:
            f.write(json.dumps([test_stored.plain(rows), reward.calls]) + "\\n")
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_make_the_file_of_one(checkpoints, run, tmp_path):
    """Broken in the second chunk, continued, and read; with and without --fsdp."""
    rows = plain(sample(load(checkpoints("llama"), run), run, tmp_path / "one"))
    source = SEVERAL.format(root=str(ROOT), tests=str(ROOT / "tests"))
    (tmp_path / "several.py").write_text(source)
    start = str(checkpoints("llama"))
    status, _, err = run_script("several.py", start, processes=2, cwd=tmp_path)
    assert status == 0, err
    for fsdp in (False, True):
        own = tmp_path / f"fsdp-{fsdp}" / "run" / "sampled.jsonl"
        assert own.read_bytes() == (tmp_path / "one" / "run" / "sampled.jsonl").read_bytes()
        for rank in (0, 1):
            lines = (tmp_path / f"found-{rank}-{fsdp}.jsonl").read_text().splitlines()
            calls = [[CHUNK * SAMPLES, 2 * SAMPLES], []]
            assert [json.loads(line) for line in lines] == [[rows, x] for x in calls]
    assert not (tmp_path / "nowhere").exists()
