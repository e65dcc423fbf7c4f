"""Samples and their scores in a file: made once, read again, the same after any break."""

import json
import math
import os
import re
import signal

import numpy as np
import pytest
import torch
from conftest import ROOT, run_script

import common
from generation import Sampled, sample_and_score, text_of

SAMPLES, CHUNK = 3, 4
FACTS = {"model": "tiny random", "seed": 7, "range": (0, 1)}  # a tuple is a list for JSON


# -- helpers


@pytest.fixture(scope="module")
def run():
    """One process; pytest gets its signal handlers back."""
    run = common.Processes()
    yield run
    for number, handler in run.handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module", params=("llama", "gpt2"))
def model(request, checkpoints, run):
    """(policy, tokenizer); GPT-2's pads with its EOS, and begins with no BOS."""
    folder = str(checkpoints(request.param))
    return common.load_policy(folder, "float32", run), common.load_tokenizer(folder, 64)


def prompts_of(tokenizer, n: int = 10) -> list[np.ndarray]:
    texts = [f" the cat sat on {i} mats" + " and ran" * (i % 4) + "?" for i in range(n)]
    return [np.array(tokenizer(text).input_ids, np.int32) for text in texts]


class Broken(Exception):
    pass


class Reward:
    """Numbers that need all their digits; counts how often it is asked, and can break."""

    def __init__(self, breaks_at: int = 0):
        self.asked, self.breaks_at = [], breaks_at

    def __call__(self, prompts, responses):
        assert len(prompts) == len(responses)
        self.asked.append(len(prompts))
        if len(self.asked) == self.breaks_at:
            raise Broken
        ids = [np.concatenate(pair).tolist() for pair in zip(prompts, responses, strict=True)]
        scores = [math.sin(sum((i + 1) * token for i, token in enumerate(x))) for x in ids]
        return torch.tensor(scores, dtype=torch.float64)


def sample(model, run, file, reward=None, prompts=None, facts=FACTS, **more) -> list[Sampled]:
    policy, tokenizer = model
    prompts = prompts_of(tokenizer) if prompts is None else prompts
    how = {"samples": SAMPLES, "max_new_tokens": 12, "temperature": 1.0, "top_k": 40, "seed": 7}
    how |= {"chunk": CHUNK} | more
    return sample_and_score(
        policy, prompts, tokenizer, reward or Reward(), run, file, facts=facts, **how
    )


def assert_same(some: list[Sampled], others: list[Sampled]) -> None:
    assert len(some) == len(others)
    for a, b in zip(some, others, strict=True):
        assert a.prompt.tolist() == b.prompt.tolist()
        assert [x.tolist() for x in a.responses] == [x.tolist() for x in b.responses]
        assert a.scores.tolist() == b.scores.tolist()
        for x in (a, b):
            assert x.scores.dtype == np.float64 and x.scores.shape == (SAMPLES,)
            assert {response.dtype for response in x.responses} == {np.dtype(np.int32)}


@pytest.fixture
def whole(model, run, tmp_path):
    """(what an unbroken run returns, its file)."""
    file = tmp_path / "whole" / "sampled.jsonl"
    return sample(model, run, file), file


# -- the file


def test_what_the_file_holds(model, whole):
    """Texts as they stand in a data set, ids as they were drawn, scores to the last digit."""
    tokenizer, (made, file) = model[1], whole
    assert sorted(x.name for x in file.parent.iterdir()) == ["sampled.json", "sampled.jsonl"]
    beside = json.loads(file.with_suffix(".json").read_text())
    assert beside == {"facts": FACTS | {"range": [0, 1]}}
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    prompts = prompts_of(tokenizer)
    assert len(rows) == len(made) == len(prompts)
    for i, (row, one, prompt) in enumerate(zip(rows, made, prompts, strict=True)):
        assert list(row) == ["prompt", "responses", "scores", "prompt_ids", "response_ids"]
        assert row["prompt"] == f" the cat sat on {i} mats" + " and ran" * (i % 4) + "?"
        assert row["prompt_ids"] == one.prompt.tolist() == prompt.tolist()
        assert row["response_ids"] == [response.tolist() for response in one.responses]
        assert row["responses"] == [text_of(response, tokenizer) for response in one.responses]
        assert row["scores"] == one.scores.tolist()
        again = Reward()([prompt] * SAMPLES, one.responses).tolist()
        assert row["scores"] == again


def test_the_chunk_is_only_where_it_is_cut(model, run, whole, tmp_path):
    """Prompts have the numbers of the whole list, so their samples are those of one chunk."""
    for chunk in (1, 10, 256):
        assert_same(sample(model, run, tmp_path / f"{chunk}.jsonl", chunk=chunk), whole[0])
        assert (tmp_path / f"{chunk}.jsonl").read_bytes() == whole[1].read_bytes()


def test_ranked_rows_to_train_on(checkpoints, run, tmp_path):
    """What another script reads is what was sampled: distinct answers, best first."""
    folder = str(checkpoints("llama"))
    tokenizer = common.load_tokenizer(folder, 64)
    policy = common.load_policy(folder, "float32", run)
    file = tmp_path / "sampled.jsonl"
    answers = [" yes it ran", " no it sat", " the cat"]
    made = sample((policy, tokenizer), run, file, prompts=prompts_of(tokenizer, 40))
    # A random model draws what is no text: so texts are put in their place, under the same scores.
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    readable = tmp_path / "readable.jsonl"
    readable.write_text("".join(json.dumps(row | {"responses": answers}) + "\n" for row in rows))
    train, held_out = common.load_rows(str(readable), None, "ranked", tokenizer, 64, 40)
    assert len(train) + len(held_out) == 40 and len(held_out) > 0
    scores = {tuple(one.prompt.tolist()): one.scores for one in made}
    ids = [tokenizer(x, add_special_tokens=False).input_ids for x in answers]
    for row in train.rows + held_out.rows:
        best_first = np.argsort(-scores[tuple(row.prompt.tolist())])
        assert [r[:-1].tolist() for r in row.responses] == [ids[k] for k in best_first]
    # The file itself, as it is, where its answers are answers.
    train, held_out = common.load_rows(
        str(file), None, "ranked", tokenizer, 64, 40, skip_bad_rows=True
    )
    assert len(train) + len(held_out) > 30


# -- read again


def test_what_is_there_is_read(model, run, whole, capsys):
    made, file = whole
    before, reward = file.read_bytes(), Reward()
    assert_same(sample(model, run, file, reward), made)
    assert reward.asked == [] and file.read_bytes() == before
    assert f"sampling   30 answers to 10 prompts: from {file}\n" in capsys.readouterr().out


@pytest.mark.parametrize("torn", (b"", b'{"prompt": " the c', b'{"prompt": 3}\n', b"\n\xff\n"))
def test_broken_and_gone_on_with(model, run, whole, tmp_path, torn, capsys):
    """In the second chunk, and with the beginning of a line behind the first."""
    made, file = whole
    again = tmp_path / "again.jsonl"
    with pytest.raises(Broken):
        sample(model, run, again, Reward(breaks_at=2))
    capsys.readouterr()
    assert again.read_bytes() == b"".join(file.read_bytes().splitlines(keepends=True)[:CHUNK])
    with open(again, "ab") as f:
        f.write(torn)
    reward = Reward()
    assert_same(sample(model, run, again, reward), made)
    assert reward.asked == [CHUNK * SAMPLES, 2 * SAMPLES]  # of the three chunks the last two
    assert again.read_bytes() == file.read_bytes()
    said = r"sampling   30 answers to 10 prompts: [\d,]+ tokens/s, those to 4 prompts from "
    assert re.match(said + re.escape(f"{again}\n"), capsys.readouterr().out)


def test_cut_anywhere(model, run, whole, tmp_path):
    """Whole chunks are kept, and all that comes after them is made again."""
    made, file = whole
    lines = file.read_bytes().splitlines(keepends=True)
    for kept, of_the_next, chunks_left in (
        (0, 0, 3), (0, 10, 3), (3, 0, 3), (3, 20, 3), (4, 0, 2), (7, 30, 2), (8, 1, 1), (9, 0, 1),
        (9, len(lines[9]) - 1, 1),  # all but the last line break
    ):  # fmt: skip
        cut = tmp_path / "cut.jsonl"
        cut.write_bytes(b"".join(lines[:kept]) + lines[kept][:of_the_next])
        cut.with_suffix(".json").write_bytes(file.with_suffix(".json").read_bytes())
        reward = Reward()
        assert_same(sample(model, run, cut, reward), made)
        assert len(reward.asked) == chunks_left, (kept, of_the_next)
        assert cut.read_bytes() == file.read_bytes()


def test_other_facts_start_anew(model, run, whole, capsys):
    made, file = whole
    before = file.read_bytes()
    other = sample(model, run, file, facts=FACTS | {"seed": 8}, seed=8)
    assert f"{file} was made under other settings: started anew" in capsys.readouterr().out
    assert file.read_bytes() != before and len(file.read_bytes().splitlines()) == len(made)
    assert json.loads(file.with_suffix(".json").read_text())["facts"]["seed"] == 8
    assert all(
        a.responses[k].tolist() != b.responses[k].tolist()
        for a, b in zip(made, other, strict=True)
        for k in range(SAMPLES)
    )
    file.with_suffix(".json").write_text("{")  # nobody knows what made it
    reward = Reward()
    assert_same(sample(model, run, file, reward), made)
    assert len(reward.asked) == 3 and file.read_bytes() == before


def test_broken_after_other_facts(model, run, whole, monkeypatch):
    """Between emptying the file and writing the new facts: the old samples never pass for new."""
    made, file = whole

    def broken(path, text):
        raise Broken

    with monkeypatch.context() as patch:
        patch.setattr(common, "write_atomically", broken)
        with pytest.raises(Broken):
            sample(model, run, file, facts={"seed": 8}, seed=8)
    assert file.read_bytes() == b""
    reward = Reward()
    assert_same(sample(model, run, file, reward), made)  # under the old facts, which stand there
    assert len(reward.asked) == 3


def test_other_prompts_are_not_taken_for_these(model, run, whole):
    """Also where somebody forgot to name them among the facts."""
    made, file = whole
    prompts = prompts_of(model[1])
    prompts[5] = prompts[5][:-2]
    reward = Reward()
    changed = sample(model, run, file, reward, prompts)
    assert len(reward.asked) == 2  # the first chunk is the same
    assert_same(changed[:4], made[:4])
    assert changed[5].prompt.tolist() == prompts[5].tolist()
    more = Reward()
    assert len(sample(model, run, file, more, samples=2)[0].responses) == 2
    assert len(more.asked) == 3


def test_fewer_prompts_and_more(model, run, whole):
    """A beginning of the list is read; what comes after it is made."""
    made, file = whole
    before = file.read_bytes()
    reward, prompts = Reward(), prompts_of(model[1])
    assert_same(sample(model, run, file, reward, prompts[:6]), made[:6])
    assert reward.asked == []
    assert_same(sample(model, run, file, reward, prompts), made)
    assert reward.asked == [CHUNK * SAMPLES, 2 * SAMPLES] and file.read_bytes() == before


def test_a_signal_between_chunks(model, run, whole, tmp_path):
    """Asked to stop while there is something to save: after the chunk, whose rows are kept."""
    made, file = whole
    again = tmp_path / "again.jsonl"

    class Asked(Reward):
        def __call__(self, *rows):
            if len(self.asked) == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().__call__(*rows)

    run.to_save = True
    try:
        with pytest.raises(SystemExit) as stopped:
            sample(model, run, again, Asked())
    finally:
        run.to_save, run.signal = False, 0
    assert stopped.value.code == 128 + signal.SIGTERM
    assert len(again.read_bytes().splitlines()) == 2 * CHUNK
    assert_same(sample(model, run, again), made)
    assert again.read_bytes() == file.read_bytes()


def test_no_prompts(model, run, tmp_path):
    with pytest.raises(common.UserError, match="no prompt"):
        sample(model, run, tmp_path / "sampled.jsonl", prompts=[])


# -- several processes

SEVERAL = """
import json, sys
from pathlib import Path
sys.path[:0] = [{root!r}, {tests!r}]
import torch.distributed as dist
dist.init_process_group("gloo")
import common, test_sampled
run = common.Processes()
start = sys.argv[1]
tokenizer = common.load_tokenizer(start, 64)
for spread in (False, True):
    policy = common.load_policy(start, "float32", run, fsdp=spread)
    folder = Path("spread" if spread else "dealt")
    if run.rank:  # another machine's disk
        folder = Path("nowhere")
    for reward in (test_sampled.Reward(breaks_at=2), test_sampled.Reward(), test_sampled.Reward()):
        try:
            made = test_sampled.sample((policy, tokenizer), run, folder / "sampled.jsonl", reward)
        except test_sampled.Broken:
            continue
        ids = [[x.tolist() for x in one.responses] for one in made]
        scores = [one.scores.tolist() for one in made]
        prompts = [one.prompt.tolist() for one in made]
        found = [prompts, ids, scores, reward.asked]
        with open(f"found-{{run.rank}}-{{spread}}.jsonl", "a") as f:
            f.write(json.dumps(found) + "\\n")
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_make_the_file_of_one(checkpoints, run, tmp_path):
    """Dealt and spread, broken in the second chunk, gone on with and read: on both processes."""
    start = str(checkpoints("llama"))
    model = common.load_policy(start, "float32", run), common.load_tokenizer(start, 64)
    made = sample(model, run, tmp_path / "one.jsonl")
    expected = [
        [one.prompt.tolist() for one in made],
        [[x.tolist() for x in one.responses] for one in made],
        [one.scores.tolist() for one in made],
    ]
    script = SEVERAL.format(root=str(ROOT), tests=str(ROOT / "tests"))
    (tmp_path / "several.py").write_text(script)
    status, out, err = run_script("several.py", start, processes=2, cwd=tmp_path)
    assert status == 0, err
    assert out.count("all weights together on each process: 0.00 GiB more there") == 1
    for folder, spread in (("dealt", False), ("spread", True)):
        file = tmp_path / folder / "sampled.jsonl"
        assert file.read_bytes() == (tmp_path / "one.jsonl").read_bytes()
        for rank in (0, 1):
            lines = (tmp_path / f"found-{rank}-{spread}.jsonl").read_text().splitlines()
            found = [json.loads(line) for line in lines]
            assert [x[:3] for x in found] == [expected, expected]
            assert [x[3] for x in found] == [[CHUNK * SAMPLES, 2 * SAMPLES], []]
    assert not (tmp_path / "nowhere").exists()
