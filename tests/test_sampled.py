"""Samples and their scores in the cache: made once, read again, the same after any break."""

import json
import math
import os
import re
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, run_script

import common
import generation
from generation import text_of
from samples import Sampled, facts_of, sample_and_score
from scoring import contents_of

SAMPLES, CHUNK = 3, 4
FACTS = {"model": "tiny random", "attn": "sdpa", "range": (0, 1), "files": {"a.bin": "0a"}}


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


def sample(model, run, folder, reward=None, prompts=None, facts=FACTS, **more) -> list[Sampled]:
    """With the cache in a folder, and the run's own folder in it."""
    policy, tokenizer = model
    prompts = prompts_of(tokenizer) if prompts is None else prompts
    how = {"samples": SAMPLES, "max_new_tokens": 12, "temperature": 1.0, "top_k": 40, "seed": 7}
    how |= {"chunk": CHUNK} | more
    run.folder = Path(folder) / "run"
    if common.MAIN_PROCESS:
        run.folder.mkdir(parents=True, exist_ok=True)
    return sample_and_score(
        policy, prompts, tokenizer, reward or Reward(), run, folder, facts=facts, **how
    )


def file_in(folder: Path) -> Path:
    """Of samples, where the cache has only one."""
    (file,) = folder.glob("sampled-*.jsonl")
    return file


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
    """(what an unbroken run returns, the file that it leaves in the cache)."""
    folder = tmp_path / "whole"
    return sample(model, run, folder), file_in(folder)


# -- the file


def test_what_the_file_holds(model, whole):
    """Texts as they stand in a data set, ids as they were drawn, scores to the last digit."""
    tokenizer, (made, file) = model[1], whole
    own = file.parent / "run"
    assert sorted(x.name for x in own.iterdir()) == ["sampled.json", "sampled.jsonl"]
    assert (own / "sampled.jsonl").samefile(file)
    facts = json.loads(file.with_suffix(".json").read_text())
    assert json.loads((own / "sampled.json").read_text()) == facts
    more = {"samples": 3, "max_new_tokens": 12, "top_k": 40, "temperature": 1.0, "seed": 7}
    assert facts == FACTS | {"range": [0, 1]} | more | {"prompts": facts["prompts"]}
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
    for chunk in (1, 10, 0):
        folder, reward = tmp_path / f"{chunk}", Reward()
        assert_same(sample(model, run, folder, reward, chunk=chunk), whole[0])
        assert len(reward.asked) == (10 if chunk == 1 else 1)
        assert file_in(folder).name == whole[1].name
        assert file_in(folder).read_bytes() == whole[1].read_bytes()


def test_a_chunk_is_4096_answers(model, run, tmp_path, monkeypatch):
    """Of however many prompts, but of one at least."""
    asked = []

    def generate(policy, prompts, *args, samples, **more):
        asked.append(len(prompts))
        return [np.array([1], np.int32)] * (len(prompts) * samples)

    monkeypatch.setattr(generation, "generate", generate)
    score = lambda prompts, responses: torch.zeros(len(responses), dtype=torch.float64)  # noqa: E731
    for samples, expected in ((2000, [2, 2, 1]), (1000, [4, 1]), (5000, [1] * 5)):
        prompts = prompts_of(model[1], 5)
        sample(model, run, tmp_path, score, prompts, samples=samples, chunk=0)
        assert asked == expected
        asked.clear()


def test_a_copy_where_links_are_not_there(model, run, whole, tmp_path, monkeypatch):
    """As between two disks."""

    def link(*args):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", link)
    for _ in range(2):
        assert_same(sample(model, run, tmp_path / "other"), whole[0])
        own = tmp_path / "other" / "run" / "sampled.jsonl"
        assert own.read_bytes() == whole[1].read_bytes()
        assert not own.samefile(file_in(tmp_path / "other"))
        assert len(list(own.parent.iterdir())) == 2  # nothing half made beside it


def test_ranked_rows_to_train_on(checkpoints, run, tmp_path):
    """What another script reads is what was sampled: distinct answers, best first."""
    folder = str(checkpoints("llama"))
    tokenizer = common.load_tokenizer(folder, 64)
    policy = common.load_policy(folder, "float32", run)
    answers = [" yes it ran", " no it sat", " the cat"]
    made = sample((policy, tokenizer), run, tmp_path, prompts=prompts_of(tokenizer, 40))
    file = file_in(tmp_path)
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
    assert_same(sample(model, run, file.parent, reward), made)
    assert reward.asked == [] and file.read_bytes() == before
    assert f"sampling   30 answers to 10 prompts: from {file}\n" in capsys.readouterr().out


def test_only_a_chunk_of_lines_is_in_memory(model, run, whole, monkeypatch):
    """And other processes learn no texts."""
    made, file = whole
    from_main, sent = common.from_main, []

    def listen(make):
        sent.append(from_main(make))
        return sent[-1]

    monkeypatch.setattr(common, "from_main", listen)
    assert_same(sample(model, run, file.parent), made)
    assert sent[0] == {"prompts": 10, "file": str(file)}
    assert [sorted(x) for x in sent[1:]] == [["ids", "scores"]] * 3
    assert [len(x["ids"]) for x in sent[1:]] == [len(x["scores"]) for x in sent[1:]] == [4, 4, 2]


@pytest.mark.parametrize("torn", (b"", b'{"prompt": " the c', b'{"prompt": 3}\n', b"\n\xff\n"))
def test_broken_and_gone_on_with(model, run, whole, tmp_path, torn, capsys):
    """In the second chunk, and with the beginning of a line behind the first."""
    made, file = whole
    with pytest.raises(Broken):
        sample(model, run, tmp_path / "again", Reward(breaks_at=2))
    capsys.readouterr()
    again = file_in(tmp_path / "again")
    assert list((tmp_path / "again" / "run").iterdir()) == []
    assert again.read_bytes() == b"".join(file.read_bytes().splitlines(keepends=True)[:CHUNK])
    with open(again, "ab") as f:
        f.write(torn)
    reward = Reward()
    assert_same(sample(model, run, again.parent, reward), made)
    assert reward.asked == [CHUNK * SAMPLES, 2 * SAMPLES]  # of the three chunks the last two
    assert again.read_bytes() == file.read_bytes()
    assert (again.parent / "run" / "sampled.jsonl").samefile(again)
    said = r"sampling   30 answers to 10 prompts: [\d,]+ tokens/s, those to 4 prompts were there"
    assert re.match(f"{said}, in " + re.escape(f"{again}\n"), capsys.readouterr().out)


def test_cut_anywhere(model, run, whole, tmp_path):
    """Whole chunks are kept, and all that comes after them is made again."""
    made, file = whole
    lines = file.read_bytes().splitlines(keepends=True)
    for kept, of_the_next, chunks_left in (
        (0, 0, 3), (0, 10, 3), (3, 0, 3), (3, 20, 3), (4, 0, 2), (7, 30, 2), (8, 1, 1), (9, 0, 1),
        (9, len(lines[9]) - 1, 1),  # all but the last line break
    ):  # fmt: skip
        cut = tmp_path / "cut" / file.name
        cut.parent.mkdir(exist_ok=True)
        cut.write_bytes(b"".join(lines[:kept]) + lines[kept][:of_the_next])
        reward = Reward()
        assert_same(sample(model, run, cut.parent, reward), made)
        assert len(reward.asked) == chunks_left, (kept, of_the_next)
        assert cut.read_bytes() == file.read_bytes()


def test_other_facts_are_another_file(model, run, whole):
    """Those that a caller names, and those that are known here; nothing is lost."""
    made, file = whole
    before = file.read_bytes()
    moved = [
        {"seed": 8}, {"temperature": 0.9}, {"top_k": 0}, {"max_new_tokens": 11}, {"samples": 2},
        {"facts": FACTS | {"model": "another"}}, {"facts": FACTS | {"files": {"a.bin": "0b"}}},
        {"prompts": prompts_of(model[1])[:9]},
    ]  # fmt: skip
    own = file.parent / "run"
    for n, flags in enumerate(moved, 2):
        reward = Reward()
        made_then = sample(model, run, file.parent, reward, **flags)
        assert len(reward.asked) == 3
        files = {*file.parent.glob("sampled-*.jsonl")}
        assert len(files) == n and file.read_bytes() == before
        (last,) = (x for x in files if x.samefile(own / "sampled.jsonl"))
        assert last != file
        assert len(made_then) == len(last.read_bytes().splitlines())
        facts = json.loads(last.with_suffix(".json").read_text())
        assert facts == json.loads((own / "sampled.json").read_text())
        if "seed" in flags:
            assert facts["seed"] == 8
            assert all(
                a.responses[k].tolist() != b.responses[k].tolist()
                for a, b in zip(made, made_then, strict=True)
                for k in range(SAMPLES)
            )
    reward = Reward()
    assert_same(sample(model, run, file.parent, reward), made)
    assert reward.asked == [] and (own / "sampled.jsonl").samefile(file)


@pytest.mark.parametrize(
    "flags, told",
    [
        ({"seed": 8}, "seed was 7, now 8"),
        ({"facts": FACTS | {"files": {"a.bin": "0b"}}}, "a.bin has changed"),
        ({"facts": FACTS | {"files": {}, "attn": "eager"}}, "made, a.bin has changed. --resume"),
        ({"short": 2}, "the prompts have changed (--dataset, --eval-dataset)"),
        ({"seed": 8, "top_k": 5}, "top_k was 40, now 5; seed was 7, now 8"),
    ],
)
def test_a_run_that_learns_refuses_other_samples(model, run, whole, flags, told):
    """Before anything is sampled; a run without a checkpoint has nothing to lose."""
    file = whole[1]
    flags = dict(flags)
    if flags.pop("short", 0):
        flags["prompts"] = prompts_of(model[1])[:-2]
    (file.parent / "run" / "checkpoint-2").mkdir()
    reward = Reward()
    with pytest.raises(common.UserError, match=re.escape(told)) as error:
        sample(model, run, file.parent, reward, **flags)
    assert "since its sampled.jsonl was made" in str(error.value)
    assert reward.asked == [] and file_in(file.parent) == file
    (file.parent / "run" / "checkpoint-2").rmdir()
    sample(model, run, file.parent, reward, **flags)
    assert len(reward.asked) > 0


def test_a_run_that_learns_keeps_its_samples(model, run, whole, capsys):
    """Where only rounding would move them, it reads its own, also with an empty cache."""
    made, file = whole
    own = file.parent / "run"
    facts = json.loads((own / "sampled.json").read_text())
    (own / "checkpoint-2").mkdir()
    for name in (file, file.with_suffix(".json")):
        name.unlink()
    reward = Reward()
    assert_same(sample(model, run, file.parent, reward, facts=FACTS | {"attn": "eager"}), made)
    assert reward.asked == [] and not list(file.parent.glob("sampled-*.jsonl"))
    assert json.loads((own / "sampled.json").read_text()) == facts
    out = capsys.readouterr().out
    assert "resume     attn was sdpa, now eager: with the samples of before" in out
    assert f"from {own / 'sampled.jsonl'}\n" in out
    # Without them it samples anew; the rows are compared with the checkpoint's later.
    (own / "sampled.jsonl").unlink()
    sample(model, run, file.parent, reward, facts=FACTS | {"attn": "eager"})
    assert len(reward.asked) == 3 and (own / "sampled.jsonl").samefile(file_in(file.parent))


def test_other_lines_are_not_taken_for_these(model, run, whole):
    """Also where somebody has written into the file."""
    made, file = whole
    before = file.read_bytes()
    lines = before.splitlines(keepends=True)
    lines[5] = lines[6]
    file.write_bytes(b"".join(lines))
    reward = Reward()
    assert_same(sample(model, run, file.parent, reward), made)
    assert len(reward.asked) == 2 and file.read_bytes() == before  # the first chunk is the same


def test_two_runs_at_once(model, run, whole, tmp_path):
    """The second one is told, and what the first one has made is left alone."""
    made, file = whole
    folder = tmp_path / "both"
    second = Reward()

    class While(Reward):
        def __call__(self, *rows):
            if len(self.asked) == 1:
                before = file_in(folder).read_bytes()
                first = run.folder
                with pytest.raises(common.UserError, match="another run is sampling"):
                    sample(model, run, folder, second)
                assert file_in(folder).read_bytes() == before != b""
                # Another file is not in the way, and a whole one is read.
                assert len(sample(model, run, folder, seed=8)) == 10
                run.folder = first
            return super().__call__(*rows)

    assert_same(sample(model, run, folder, While()), made)
    assert second.asked == []
    assert (folder / file.name).read_bytes() == file.read_bytes()
    # Who only reads needs no lock.
    import fcntl

    with open((folder / file.name).with_suffix(".lock"), "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert_same(sample(model, run, folder, second), made)
    assert second.asked == []


# -- what they depend on


def test_what_a_model_and_a_reward_hold(checkpoints, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = checkpoints("llama")
    names = ["config.json", "generation_config.json", "model.safetensors"]
    names += ["tokenizer.json", "tokenizer_config.json"]
    expected = {str(folder / name): common.file_hash(folder / name) for name in names}
    assert contents_of(str(folder)) == expected
    (tmp_path / "mine.py").write_text("def score(prompts, responses): ...\n")
    mine = {"mine.py": common.file_hash(tmp_path / "mine.py")}
    assert contents_of("mine.py:score") == mine
    other = checkpoints("gpt2")
    both = contents_of(f"{other}@{folder}")
    assert expected.items() < both.items() and str(other / "model.safetensors") in both
    (tmp_path / "a@b").mkdir()  # may be a folder's name
    (tmp_path / "a@b" / "config.json").write_text("{}")
    assert list(contents_of("a@b")) == ["a@b/config.json"]
    assert contents_of("EleutherAI/pythia-160m") == {}
    source = ROOT / "family.py"
    assert contents_of("family") == {str(source): common.file_hash(source)}

    facts = facts_of(str(folder), "mine.py:score", "float32", "eager", 4)
    files = facts.pop("files")
    sources = {f"{name}.py" for name in ("common", "generation", "samples", "scoring")}
    assert {name for name in files if name not in expected | mine} == sources
    assert files["scoring.py"] == common.file_hash(ROOT / "scoring.py")
    assert facts == {
        "model": str(folder), "reward": "mine.py:score", "dtype": "float32", "attn": "eager",
        "lora_rank": 4, "torch": torch.__version__, "transformers": common._version("transformers"),
    }  # fmt: skip


# -- asked to stop


def test_a_signal_between_chunks(model, run, whole, tmp_path):
    """Asked to stop while there is something to save: after the chunk, whose rows are kept."""
    made, file = whole

    class Asked(Reward):
        def __call__(self, *rows):
            if len(self.asked) == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().__call__(*rows)

    run.to_save = True
    try:
        with pytest.raises(SystemExit) as stopped:
            sample(model, run, tmp_path / "again", Asked())
    finally:
        run.to_save, run.signal = False, 0
    assert stopped.value.code == 128 + signal.SIGTERM
    again = file_in(tmp_path / "again")
    assert len(again.read_bytes().splitlines()) == 2 * CHUNK
    assert_same(sample(model, run, again.parent), made)
    assert again.read_bytes() == file.read_bytes()


def test_no_prompts(model, run, tmp_path):
    with pytest.raises(common.UserError, match="no prompt"):
        sample(model, run, tmp_path, prompts=[])


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
            made = test_sampled.sample((policy, tokenizer), run, folder, reward)
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
    made = sample(model, run, tmp_path / "one")
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
        file = file_in(tmp_path / folder)
        assert file.read_bytes() == file_in(tmp_path / "one").read_bytes()
        assert (tmp_path / folder / "run" / "sampled.jsonl").samefile(file)
        for rank in (0, 1):
            lines = (tmp_path / f"found-{rank}-{spread}.jsonl").read_text().splitlines()
            found = [json.loads(line) for line in lines]
            assert [x[:3] for x in found] == [expected, expected]
            assert [x[3] for x in found] == [[CHUNK * SAMPLES, 2 * SAMPLES], []]
    assert not (tmp_path / "nowhere").exists()
