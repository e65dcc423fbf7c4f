"""Samples and their scores in files: made once, read again, the same after any break."""

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import common
from sampling import stored
from sampling.generate import text_of
from sampling.rewards import contents_of
from training.checkpoint import file_hash

FLAGS = {
    "samples": 3, "temperature": 1.0, "top_k": 40, "max_length": 52, "max_prompt_length": 40,
    "seed": 7, "model": "a model", "reward": "mine.py:score", "dtype": "float32", "attn": "sdpa",
    "lora_rank": 0,
}  # fmt: skip
CHUNK = 4  # prompts in a file
pytestmark = pytest.mark.usefixtures("chunks_of_4")


@pytest.fixture
def chunks_of_4(monkeypatch, tmp_path):
    """And a file of the user's, in the current folder."""
    monkeypatch.setattr(stored, "RESPONSES_PER_FILE", 3 * CHUNK)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("")


# -- helpers


@pytest.fixture(scope="module")
def run():
    run = common.Processes()
    yield run
    run.stop_request.uninstall()  # pytest gets its signal handlers back


@pytest.fixture(scope="module", params=("llama", "gpt2"))
def model(request, checkpoints, run):
    """(policy, tokenizer); GPT-2's tokenizer pads with its EOS and has no BOS."""
    folder = str(checkpoints(request.param))
    args = common.Args(model=folder, dtype="float32")
    return common.load_policy(args, run), common.load_tokenizer(folder)


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


def sample(model, run, folder, reward=None, prompts=None, name="run", **flags):
    """With the cache in a folder, and the run's own folder in it."""
    policy, tokenizer = model
    prompts = prompts_of(tokenizer) if prompts is None else prompts
    more = {"cache_dir": folder, "sample_batch_size": None}
    run.args, run.folder = SimpleNamespace(**FLAGS | more | flags), folder / name
    run.folder.mkdir(parents=True, exist_ok=True)
    return stored.sample_and_score(
        policy, prompts, tokenizer, reward or Reward(), run, run.args.seed
    )


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
    assert facts["max_new_tokens"] == 12 and facts["mine.py"] == file_hash(Path("mine.py"))
    assert FLAGS.items() - {("max_length", 52), ("max_prompt_length", 40)} < facts.items()
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    for i, (line, (prompt, ids, scores)) in enumerate(zip(lines, rows, strict=True)):
        assert prompt == prompts_of(tokenizer)[i].tolist()
        assert line == {
            "prompt": f" the cat sat on {i} mats" + " and ran" * (i % 4) + "?",
            "responses": [text_of(np.array(x), tokenizer) for x in ids],
            "scores": Reward()([prompt] * 3, ids).tolist(),
            "prompt_ids": prompt,
            "response_ids": ids,
        }
        assert scores == line["scores"]


@pytest.mark.parametrize("size, calls", [(1, 10), (30, 1), (4096, 1)])
def test_samples_do_not_depend_on_the_files(model, run, made, tmp_path, monkeypatch, size, calls):
    monkeypatch.setattr(stored, "RESPONSES_PER_FILE", size)
    reward = Reward()
    assert plain(sample(model, run, tmp_path, reward)) == made[0]
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
    assert reward.calls == [12, 6]  # the last two of three files
    assert (run.folder / "sampled.jsonl").read_bytes() == before
    assert re.search(r"30 answers to 10 prompts \([\d,]+ tokens/s\)", capsys.readouterr().out)


HARMS = {
    "ids": lambda text: text.replace('"response_ids": [[', '"response_ids": [[5, ', 1),
    "nan": lambda text: re.sub(r'"scores": \[[^,]+', '"scores": [NaN', text, count=1),
    "scores": lambda text: re.sub(r'"scores": \[[^,]+', '"scores": [0.5', text, count=1),
    "cut": lambda text: text[: len(text) // 2],
    "nothing": lambda text: "",
}


@pytest.mark.parametrize("harm", HARMS)
def test_a_file_that_was_changed_is_drawn_again(model, run, made, capsys, harm):
    rows, file = made
    cache = file.parent.parent
    cached = next(cache.glob("sampled-*/4-8.jsonl"))
    before, reward = cached.read_text(), Reward()
    cached.write_text(HARMS[harm](before))
    assert cached.read_text() != before
    assert plain(sample(model, run, cache, reward)) == rows
    assert reward.calls == [12] and cached.read_text() == before
    assert capsys.readouterr().out.count("was changed since it was written: drawn again") == 1


MOVED = [
    ({"seed": 8}, "seed was 7, now 8"),
    ({"temperature": 0.9}, "temperature was 1.0, now 0.9"),
    ({"samples": 2, "top_k": 0}, "samples was 3, now 2; top_k was 40, now 0"),
    ({"max_length": 51}, "max_new_tokens was 12, now 11"),
    ({"dtype": "float64", "lora_rank": 2}, "dtype was float32, now float64; lora_rank was 0, now"),
    ({"prompts": 9}, "the list of prompts has changed"),
    ({"source": "1"}, "mine.py has changed"),
]


@pytest.mark.parametrize("flags, text", MOVED)
def test_other_facts_are_other_samples(model, run, made, tmp_path, flags, text):
    """A run without a checkpoint draws them anew. One that has learned refuses, before anything is
    sampled.
    """
    (rows, file), flags, reward = made, dict(flags), Reward()
    if "prompts" in flags:
        flags["prompts"] = prompts_of(model[1])[: flags["prompts"]]
    (tmp_path / "mine.py").write_text(flags.pop("source", ""))
    cache = file.parent.parent
    (file.parent / "checkpoint-2").mkdir()
    with pytest.raises(common.UserError, match=re.escape(f"drew its samples, {text}")):
        sample(model, run, cache, reward, **flags)
    assert reward.calls == []
    (file.parent / "checkpoint-2").rmdir()
    sample(model, run, cache, reward, **flags)
    assert len(reward.calls) in (2, 3) and len({*cache.glob("sampled-*")}) == 2
    (tmp_path / "mine.py").write_text("")
    calls = len(reward.calls)
    assert plain(sample(model, run, cache, reward)) == rows  # nothing was lost
    assert len(reward.calls) == calls


def test_a_run_keeps_its_samples_when_only_rounding_would_move_them(model, run, made, monkeypatch):
    """Another version of torch, or another attention."""
    rows, file = made
    (file.parent / "checkpoint-2").mkdir()
    monkeypatch.setattr(stored, "package_version", lambda name: "9.0")
    reward = Reward()
    assert plain(sample(model, run, file.parent.parent, reward, attn="eager")) == rows
    assert reward.calls == []


def test_what_a_model_and_a_reward_hold(checkpoints, tmp_path):
    folder, other = checkpoints("llama"), checkpoints("gpt2")
    files = {str(file): file_hash(file) for file in folder.iterdir()}
    assert contents_of(str(folder)).items() <= files.items()
    both = contents_of(f"{other}@{folder}")
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        assert {str(folder / name), str(other / name)} <= both.keys()
    assert contents_of("mine.py:score") == {"mine.py": file_hash(tmp_path / "mine.py")}
    assert [Path(name).name for name in contents_of("family")] == ["task.py"]
    assert contents_of("EleutherAI/pythia-160m") == {}
