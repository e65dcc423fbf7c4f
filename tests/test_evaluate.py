"""A model beside another: every number against plain Transformers and plain loops, or against all
that can be sampled, enumerated; the cache of answers; and whatever else can go wrong.
"""

import ast
import json
import math
import random
import re
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
import tyro
from conftest import (
    ROOT,
    labelled_rows,
    make_checkpoint,
    pair_rows,
    ranked_rows,
    run_script,
    text,
    write_jsonl,
)
from test_sources import comparison, post
from test_train import _as_in_a_fresh_process, plain, train  # noqa: F401

import common
import dpo
import estimates
import evaluate
import generation
import ppo
import sft
from estimates import Estimate

SCORES = """
def words(prompts, responses):
    return [len(set(answer.split())) - 0.1 * len(answer) for answer in responses]

def letters(prompts, responses):
    return [sum(c.isalpha() for c in answer) / max(1, len(answer)) for answer in responses]
"""


# -- helpers


def noisy(folder: Path, to: Path, noise: float) -> Path:
    """The same model, gone a little way somewhere."""
    shutil.copytree(folder, to)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(noise * torch.randn_like(p))
    model.save_pretrained(to)
    return to


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """a and b, whose answers often end; 40 pairs; a file of rewards."""
    folder = tmp_path_factory.mktemp("evaluate")
    make_checkpoint("llama", folder / "b")
    settings = {"eos_token_id": [1, *range(30, 60)], "bos_token_id": 0}
    (folder / "b" / "generation_config.json").write_text(json.dumps(settings))
    noisy(folder / "b", folder / "a", 0.02)
    write_jsonl(folder / "pairs.jsonl", pair_rows(40))
    (folder / "score.py").write_text(SCORES)
    return folder


@pytest.fixture
def ev(made, _as_in_a_fresh_process):  # noqa: F811
    """ev(**flags) -> what was measured, by a whole run in this process."""

    def go(**flags) -> dict:
        usual = {
            "model": str(made / "a"), "baseline": str(made / "b"), "dtype": "float32",
            "dataset": str(made / "pairs.jsonl"), "eval_dataset": str(made / "pairs.jsonl"),
            "reward": f"{made / 'score.py'}:words", "max_length": 64, "max_prompt_length": 50,
            "max_new_tokens": 6, "cache_dir": "cache",
        }  # fmt: skip
        return evaluate.main(evaluate.Args(**usual | flags))

    return go


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """How many prompts were sampled for, of every call."""
    seen, generate = [], generation.generate

    def counted(policy, prompts, *how, **more):
        seen.append(len(prompts))
        return generate(policy, prompts, *how, **more)

    monkeypatch.setattr(generation, "generate", counted)
    return seen


def args_of(made: Path, **flags) -> evaluate.Args:
    usual = {
        "model": str(made / "a"),
        "max_new_tokens": 6,
        "dtype": "float32",
        "cache_dir": "cache",
    }
    return evaluate.Args(**usual | flags)


def plain_model(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def plain_logp(model, prompt, answer, temperature: float = 1.0) -> float:
    """One text, alone in its batch, from the logits of plain Transformers."""
    ids = torch.tensor([[*map(int, prompt), *map(int, answer)]])
    logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].double() / temperature
    found = logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None])
    return found.sum().item()


def kept(folder: str = "cache") -> list[list[dict]]:
    """The files of answers, in the order in which they were made."""
    files = sorted(Path(folder).glob("answers-*.jsonl"), key=lambda p: p.stat().st_mtime_ns)
    return [[json.loads(line) for line in file.read_text().splitlines()] for file in files]


def value(record: dict, key: str, side: str = "measured") -> float:
    return record[side][key]["value"]


# -- what is measured


def test_a_model_beside_itself(ev, made):
    found = ev(model=str(made / "a"), baseline=str(made / "a"))
    assert value(found, "sampled/kl") == pytest.approx(0, abs=1e-6)
    assert value(found, "greedy/win_rate") == 0.5
    assert value(found, "greedy/win_rate/length_controlled") == 0.5
    for name in ("reward", "length", "ended", "repetition-4"):
        assert value(found, f"greedy/{name}", "difference") == 0
        assert found["measured"][f"greedy/{name}"] == found["baseline"][f"greedy/{name}"]
    # Drawn independently: half of them, within 4 standard errors of at most 0.5 / sqrt(n).
    n = found["facts"]["questions"]
    assert n == 40 and value(found, "sampled/win_rate") != 0.5
    assert abs(value(found, "sampled/win_rate") - 0.5) < 4 * 0.5 / n**0.5
    assert value(found, "ranking/sum", "difference") == 0
    assert value(found, "ranking/reference_normalised") == 0.5
    assert value(found, "ranking/mended") == value(found, "ranking/spoiled") == 0


def test_numbers_of_samples_are_those_of_plain_loops(ev, made):
    """KL, entropy, reward, length, what ended, who won; at temperature 1 and at 0.7."""
    found = ev(temperature=(1.0, 0.7), prompts=30)
    models = [plain_model(made / name) for name in "ab"]
    stops, score = {1, *range(30, 60)}, _scores_of(made, "words")
    for at, temperature in enumerate((1.0, 0.7)):
        mode, (ours, theirs) = evaluate.mode_of(temperature), kept()[2 * at : 2 * at + 2]
        rows = [(row["prompt_ids"], row["response_ids"][0]) for row in ours]
        assert len({tuple(prompt) for prompt, _ in rows}) == 30
        logps = np.array([[plain_logp(m, *row, temperature) for m in models] for row in rows])
        assert value(found, f"{mode}/kl") == pytest.approx(
            (logps[:, 0] - logps[:, 1]).mean(), abs=1e-4
        )
        assert value(found, f"{mode}/entropy") == pytest.approx(-logps[:, 0].mean(), abs=1e-4)
        for side, answers in (("measured", ours), ("baseline", theirs)):
            ids = [row["response_ids"][0] for row in answers]
            assert value(found, f"{mode}/length", side) == pytest.approx(np.mean([*map(len, ids)]))
            assert value(found, f"{mode}/ended", side) == np.mean([y[-1] in stops for y in ids])
            assert value(found, f"{mode}/length/longest", side) == max(map(len, ids))
            rewards = [score(row["responses"][0]) for row in answers]
            assert value(found, f"{mode}/reward", side) == pytest.approx(np.mean(rewards))
        won = [
            (x > y) + (x == y) / 2
            for x, y in zip(*([score(row["responses"][0]) for row in side]
                              for side in (ours, theirs)), strict=True)
        ]  # fmt: skip
        assert value(found, f"{mode}/win_rate") == pytest.approx(np.mean(won))
        assert 0 < value(found, f"{mode}/ended") < 1  # so that this could have failed
    assert value(found, "sampled/kl") > 0.05


def _scores_of(made: Path, name: str):
    space = {}
    exec((made / "score.py").read_text(), space)
    return lambda answer: space[name]([""], [answer])[0]


@pytest.mark.parametrize("temperature", (1.0, pytest.param(0.7, marks=pytest.mark.slow)))
def test_kl_is_that_of_all_sequences(temperature, made, _as_in_a_fresh_process):  # noqa: F811
    """Answers of at most two tokens: all 320 * 320 of them can be looked at."""
    run, args = common.Processes(), args_of(made, max_new_tokens=2)
    tokenizer = common.load_tokenizer(args.model, 64)
    policy, base = (evaluate.load(str(made / name), args, run, name) for name in "ab")
    prompt = np.array(tokenizer("the cat sat?").input_ids, np.int32)
    prompts = [prompt] * 4_000
    answers = evaluate.answers_of(policy, args.model, prompts, tokenizer, args, run, temperature, 1)
    rows = [common.Row(prompt, [y], prompt) for y in answers]
    logps, base_logps = (
        evaluate.logps_of(m, rows, run, 1_024, "", temperature)[:, 0] for m in (policy, base)
    )
    found = estimates.mean(logps - base_logps)

    def next_logps(model, texts: list[list[int]]) -> torch.Tensor:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor(texts)).logits[:, -1].double()
        return (logits / temperature).log_softmax(-1)

    models, start = [plain_model(made / name) for name in "ab"], prompt.tolist()
    first = [next_logps(m, [start])[0] for m in models]
    second = [next_logps(m, [[*start, token] for token in range(320)]) for m in models]
    exact = 0.0
    goes_on = torch.tensor([token not in tokenizer.stop_ids for token in range(320)])
    for token in range(320):
        apart = first[0][token] - first[1][token]
        if goes_on[token]:
            there = second[0][token].exp() * (second[0][token] - second[1][token])
            exact += (first[0][token].exp() * (there + second[0][token].exp() * apart).sum()).item()
        else:
            exact += (first[0][token].exp() * apart).item()
    error = (logps - base_logps).std() / len(prompts) ** 0.5
    assert abs(found.value - exact) < 4 * error < 0.3 * exact
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.1)


def test_ranking_is_that_of_a_plain_loop(ev, made):
    found = ev(temperature=(0.0,))
    models = [plain_model(made / name) for name in "ab"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(made / "a")
    sums, lengths = [], []
    for row in pair_rows(40):
        prompt = tokenizer(row["prompt"]).input_ids
        answers = [
            [*tokenizer(row[k], add_special_tokens=False).input_ids, tokenizer.eos_token_id]
            for k in ("chosen", "rejected")
        ]
        sums.append([[plain_logp(m, prompt, y) for y in answers] for m in models])
        lengths.append([len(y) for y in answers])
    sums, lengths = np.array(sums), np.array(lengths)  # (N, model, answer), (N, answer)
    right = sums[:, :, 0] > sums[:, :, 1]
    by_mean = (sums / lengths[:, None])[:, :, 0] > (sums / lengths[:, None])[:, :, 1]
    for side, of in (("measured", 0), ("baseline", 1)):
        assert value(found, "ranking/sum", side) == pytest.approx(right[:, of].mean())
        assert value(found, "ranking/mean", side) == pytest.approx(by_mean[:, of].mean())
    apart = sums[:, 0] - sums[:, 1]
    assert value(found, "ranking/reference_normalised") == pytest.approx(
        (apart[:, 0] > apart[:, 1]).mean()
    )
    assert value(found, "ranking/mended") == pytest.approx((right[:, 0] & ~right[:, 1]).mean())
    assert value(found, "ranking/spoiled") == pytest.approx((~right[:, 0] & right[:, 1]).mean())
    assert found["facts"]["pairs"] == 40
    assert ev(temperature=(0.0,), rank=False)["facts"]["pairs"] == 0


def test_rankings_by_hand():
    logps = np.array([[-1.0, -2.0], [-3.0, -3.0], [-5.0, -2.0], [-4.0, -1.0]])
    base = np.array([[-2.0, -1.0], [-3.0, -4.0], [-5.0, -1.0], [-4.0, -6.0]])
    table = evaluate.rankings(logps, np.array([[1, 4], [1, 1], [5, 1], [8, 1.0]]), base)
    ours = {key.removeprefix("ranking/"): line.ours.value for key, line in table.items()}
    assert ours == {"sum": 1.5 / 4, "mean": 2.5 / 4, "reference_normalised": 2 / 4,
                    "mended": 1 / 4, "spoiled": 1 / 4}  # fmt: skip
    assert table["ranking/sum"].theirs.value == 2 / 4
    assert {*evaluate.rankings(logps, np.ones((4, 2)), None)} == {"ranking/sum", "ranking/mean"}
    two = evaluate.rankings(logps, np.ones((4, 2)), base, np.array([0, 0, 1, 1]))
    assert two["ranking/sum"].ours.n == 2 and two["ranking/sum"].ours.value == 1.5 / 4


def test_answers_by_hand():
    side = lambda lengths, scores: evaluate.Side(  # noqa: E731
        [np.array([5] * (n - 1) + [9]) for n in lengths], np.array(scores, float)
    )
    ours, theirs = side([2, 3, 4, 5], [1, 2, 3, 0]), side([2, 2, 3, 3], [1, 1, 4, -1])
    table = evaluate.compare_answers("sampled", ours, theirs, frozenset([9]))
    assert table["sampled/reward"].ours.value == 1.5
    assert table["sampled/reward"].change.value == 0.25
    assert table["sampled/win_rate"].ours.value == 2.5 / 4
    assert table["sampled/length"].theirs.value == 2.5
    assert table["sampled/length/median"].ours.value == 3.5
    assert table["sampled/ended"].ours == Estimate(1.0, n=4)
    assert table["sampled/distinct-1"].ours.value == 2 / 14
    assert table["sampled/repetition-4"].ours.n == 2  # 4 and 5 tokens
    alone = evaluate.compare_answers("greedy", evaluate.Side(ours.answers, None), None, frozenset())
    assert alone["greedy/ended"].ours.value == 0 and "greedy/reward" not in alone


def test_rewards_by_length():
    lengths = [1, 1, 1, 2, 7, 7]
    points = evaluate.by_length(
        evaluate.Side([np.zeros(n) for n in lengths], np.array([0, 3, 6, 1, 2, 4.0]))
    )
    assert sum(p["n"] for p in points) == 6
    assert points[0] == {"length": 1.0, "n": 3, "reward": 3.0}
    assert points[-1] == {"length": 7.0, "n": 2, "reward": 3.0}


# -- the cache


def test_nothing_is_sampled_twice(ev, calls, made):
    first = ev(prompts=20)
    assert calls == [20] * 4
    again = ev(prompts=20, reward=f"{made / 'score.py'}:letters")
    assert calls == [20] * 4
    assert first["measured"]["sampled/kl"] == again["measured"]["sampled/kl"]
    assert first["measured"]["sampled/reward"] != again["measured"]["sampled/reward"]
    ev(prompts=20, seed=5)  # greedy answers draw nothing
    assert calls == [20] * 6
    others = [{"temperature": (0.5,)}, {"max_new_tokens": 5}, {"prompts": 19}, {"top_k": 3}]
    for n, other in enumerate(others, 1):
        ev(**{"prompts": 20, "temperature": (1.0,)} | other)
        assert len(calls) == 6 + 2 * n
    assert len(kept()) == 6 + 2 * len(others)


@pytest.mark.parametrize("damage", ("torn", "half a character", "another prompt's"))
def test_only_what_is_missing_is_made_again(damage, ev, calls, monkeypatch):
    monkeypatch.setattr(evaluate, "CHUNK", 8)
    flags = {"prompts": 20, "temperature": (1.0,), "baseline": "none", "rank": False}
    first = ev(**flags)
    assert calls == [8, 8, 4]
    (file,) = Path("cache").glob("answers-*.jsonl")
    whole = file.read_bytes()
    lines = whole.splitlines(keepends=True)
    left = {
        "torn": lines[:10] + [lines[10][:-30]],
        "half a character": lines[:10] + [lines[10][:9] + b"\xf0\x9f\n"],
        "another prompt's": lines[:10] + lines[11:],
    }[damage]
    file.write_bytes(b"".join(left))
    calls.clear()
    assert ev(**flags)["measured"] == first["measured"]
    assert calls == [8, 2] and file.read_bytes() == whole


def test_another_model_has_other_answers(made, ev, calls, tmp_path):
    """Also under the same name: its weights are looked at."""
    shutil.copytree(made / "a", tmp_path / "m")
    flags = {"model": "./m", "baseline": "none", "temperature": (1.0,), "rank": False, "prompts": 8}
    one = ev(**flags)
    shutil.rmtree(tmp_path / "m")
    noisy(made / "b", tmp_path / "m", 0.3)
    other = ev(**flags)
    assert calls == [8, 8] and one["measured"] != other["measured"]


def test_who_asks_for_the_same_answers_waits_for_them(made, calls, _as_in_a_fresh_process):  # noqa: F811
    """Two at once, here as threads: the lock is the file's."""
    run, args = common.Processes(), args_of(made)
    tokenizer = common.load_tokenizer(args.model, 64)
    policy = evaluate.load(args.model, args, run, "a")
    prompts = [np.array([0, 9, 10 + i], np.int32) for i in range(12)]
    made_by = {}

    def ask(name: str) -> None:
        made_by[name] = evaluate.answers_of(
            policy, args.model, prompts, tokenizer, args, run, 1.0, 1
        )

    ask("before")
    (file,) = Path("cache").glob("answers-*.jsonl")
    file.unlink()
    lock = evaluate._locked(file)
    threads = [threading.Thread(target=ask, args=(name,)) for name in ("one", "two")]
    for thread in threads:
        thread.start()
    time.sleep(0.5)
    assert calls == [12] and len(made_by) == 1
    lock.close()
    for thread in threads:
        thread.join(60)
    assert calls == [12, 12]
    lists = [[y.tolist() for y in answers] for answers in made_by.values()]
    assert lists[0] == lists[1] == lists[2]


# -- best of N


def test_best_of_n_is_the_best_by_a_plain_loop(ev, made):
    found = ev(best_of=4, temperature=(1.0,), prompts=20)
    ours, theirs = kept()
    score = _scores_of(made, "words")
    scores = np.array([[score(y) for y in row["responses"]] for row in ours])  # (20, 4)
    assert scores.shape == (20, 4) and len(theirs[0]["responses"]) == 1
    assert value(found, "sampled/reward") == pytest.approx(scores.max(1).mean())
    assert value(found, "sampled/reward") > scores.mean()
    best = [row["response_ids"][i] for row, i in zip(ours, scores.argmax(1), strict=True)]
    assert value(found, "sampled/length") == pytest.approx(np.mean([*map(len, best)]))
    # Its log-prob under a is not that of the best of 4: neither KL nor entropy is known.
    assert not [key for key in found["measured"] if "kl" in key or "entropy" in key]
    alone = ev(temperature=(1.0,), prompts=20, baseline="none")
    assert value(alone, "sampled/reward") <= value(found, "sampled/reward")
    # The first sample of many is that of one alone.
    assert [row["response_ids"][0] for row in kept()[-1]] == [
        row["response_ids"][0] for row in ours
    ]


def test_best_of_n_by_another_reward(ev, made):
    found = ev(best_of=3, temperature=(0.7,), prompts=12, select_by=f"{made / 'score.py'}:letters")
    by, score = _scores_of(made, "letters"), _scores_of(made, "words")
    best = [max(row["responses"], key=by) for row in kept()[0]]
    assert value(found, "sampled at 0.7/reward") == pytest.approx(np.mean([*map(score, best)]))


def test_how_far_best_of_n_can_go(ev, made):
    a = str(made / "a")
    found = ev(best_of=4, temperature=(1.0,), prompts=8, model=a, baseline=a)
    assert value(found, "sampled/kl/at_most") == pytest.approx(math.log(4) - 3 / 4)
    assert "sampled/kl" not in found["measured"]


# -- export


def test_export_is_what_sft_learns_from(ev, made, plain, capsys):  # noqa: F811
    ev(export="out.jsonl", temperature=(1.0,), baseline="none", rank=False)
    (ours,), stops = kept(), {1, *range(30, 60)}
    ended = [row for row in ours if row["response_ids"][0][-1] in stops]
    whole = [row for row in ended if row["responses"][0].strip()]
    rows = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in whole]
    assert 0 < len(rows) < len(ours) == 40
    told = f"{len(rows)} rows; left out: {40 - len(ended)} cut, {len(ended) - len(whole)} empty"
    assert told in capsys.readouterr().out
    # As ids again, an answer ends as it did: an end that is not the usual one stands in its text.
    tokenizer = common.load_tokenizer(str(made / "a"), 64)
    for row, was in zip(rows, whole, strict=True):
        text = tokenizer.decode([i for i in was["response_ids"][0] if i != 1])
        assert row["completion"] == text and "<s>" not in row["prompt"]
    status = train(
        sft, made / "a", Path("out.jsonl"), "sft", max_steps=2, batch_size=4, skip_bad_rows=True
    )
    assert status == 0 and Path("sft/model.safetensors").is_file()


def test_an_end_of_a_chat_template_stays_in_the_text(made, tmp_path):
    tokenizer = common.load_tokenizer(str(made / "a"), 64)
    tokenizer.stop_ids = frozenset([1, 2])  # </s>, and <pad> in the place of an <end_of_turn>
    answers = [np.array(ids) for ids in ([50, 51, 1], [50, 51, 2], [50, 51], [2], [1])]
    args = evaluate.Args(export=str(tmp_path / "out.jsonl"))
    evaluate.export(args, [np.array([0, 40])] * 5, answers, tokenizer)
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    usual = tokenizer.decode([50, 51])
    assert [row["completion"] for row in rows] == [usual, usual + "<pad>"]
    assert rows[0]["prompt"] == tokenizer.decode([40])


def test_export_of_the_sets_own_answers(ev, made, calls):
    assert ev(export="out.jsonl", export_chosen=True, baseline="none") == {}
    rows = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    expected = {(row["prompt"], row["chosen"]) for row in pair_rows(40)}
    assert {(row["prompt"], row["completion"]) for row in rows} == expected and calls == []


def test_export_of_training_questions(ev, made, calls):
    """Questions of --dataset, not of --eval-dataset; nothing is measured."""
    write_jsonl(Path("train.jsonl"), pair_rows(30, seed=9))
    assert ev(split="train", dataset="train.jsonl", export="out.jsonl", json="out.json") == {}
    asked = {row["prompt"] for row in kept()[0]}
    assert asked == {row["prompt"] for row in pair_rows(30, seed=9)}
    assert calls == [30] and not Path("out.json").exists()


# -- questions and baselines


def test_the_sets_own_answers_as_baseline(ev, made):
    found = ev(baseline="chosen", temperature=(0.0,))
    score, rows = _scores_of(made, "words"), pair_rows(40)
    assert value(found, "greedy/reward", "baseline") == pytest.approx(
        np.mean([score(row["chosen"]) for row in rows])
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(made / "a")
    lengths = [len(tokenizer(row["chosen"], add_special_tokens=False).input_ids) for row in rows]
    assert value(found, "greedy/length", "baseline") == pytest.approx(np.mean(lengths) + 1)
    assert value(found, "greedy/ended", "baseline") == 1
    assert "greedy/kl" not in found["measured"] and "ranking/mended" not in found["measured"]


def test_questions_are_asked_once(ev):
    rows = pair_rows(6)
    write_jsonl(Path("twice.jsonl"), rows + [row | {"chosen": " other"} for row in rows[:4]])
    found = ev(eval_dataset="twice.jsonl", temperature=(0.0,), baseline="none")
    assert (found["facts"]["questions"], found["facts"]["pairs"]) == (6, 10)
    assert found["measured"]["ranking/sum"]["n"] == 6  # what an interval is about


def test_a_question_that_is_too_long_keeps_its_end(ev, made):
    rng = random.Random(0)
    asks = [text(rng, 30, 40) + f" number {i}?" for i in range(4)]
    rows = [{"prompt": ask, "chosen": " a", "rejected": " b"} for ask in asks]
    write_jsonl(Path("long.jsonl"), rows)
    tokenizer = transformers.AutoTokenizer.from_pretrained(made / "a")
    for length in (120, 64):  # rows that fit are not cut, but their questions are
        ev(eval_dataset="long.jsonl", baseline="none", temperature=(0.0,), max_length=length,
           max_prompt_length=20)  # fmt: skip
        asked = {tuple(row["prompt_ids"]) for row in kept()[-1]}
        whole = [tokenizer(row["prompt"]).input_ids for row in rows]
        assert min(map(len, whole)) > 30
        assert asked == {(0, *ids[-19:]) for ids in whole}


def test_lengths_that_are_left_out_fit_the_model(ev):
    """The model takes 128 tokens: 122 of a question, 6 of an answer."""
    found = ev(max_length=None, max_prompt_length=None, temperature=(0.0,), baseline="none")
    told = found["arguments"]
    assert (told["max_length"], told["max_prompt_length"]) == (128, 122)


def test_what_a_run_tells_of_itself(ev, made, tmp_path):
    """What it began from, and on which rows it was measured."""
    record = {"arguments": {"model": str(made / "b"), "dataset": "rows.jsonl",
                            "eval_dataset": str(made / "pairs.jsonl")},
              "source": {"dpo.py": "..."}, "processes": 1}  # fmt: skip
    shutil.copytree(made / "a", tmp_path / "run")
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    write_jsonl(tmp_path / "rows.jsonl", pair_rows(25, seed=4))
    found = ev(model="./run", baseline=None, dataset="rows.jsonl", eval_dataset=None,
               temperature=(0.0,))  # fmt: skip
    assert found["arguments"]["baseline"] == str(made / "b")
    assert found["arguments"]["eval_dataset"] == str(made / "pairs.jsonl")
    assert found["facts"]["questions"] == 40
    for change in ({"model": "runs/gone"}, {"model": "tiny-untrained"}):
        record["arguments"] |= change
        (tmp_path / "run" / "run.json").write_text(json.dumps(record))
        assert evaluate.trained_from("./run") == "none"
    for broken in ("[]", "{", '{"arguments": 3, "source": {}}'):
        (tmp_path / "run" / "run.json").write_text(broken)
        assert evaluate.of_run("./run") == {} and evaluate.trained_from("./run") == "none"


def test_it_knows_what_each_method_reads():
    """Else a run's own questions could be among those that it is asked."""
    read = {
        file.stem: found[1]
        for file in ROOT.glob("*.py")
        if (found := re.search(r'args\.eval_dataset, "(\w+)"', file.read_text()))
    }
    del read["reward_model"]  # it writes nothing
    assert read == evaluate.READ_AS


@pytest.mark.parametrize("script, kind", [("kto", "labelled"), ("sft", "demonstration"),
                                          ("dpo", "pair"), ("ppo", "prompt")])  # fmt: skip
def test_nothing_that_was_learned_is_asked(script, kind, made, tmp_path, _as_in_a_fresh_process):  # noqa: F811
    """A part of the training rows is held out, and another kind of them holds out other ones: with
    two labelled answers a prompt, half as many prompts.
    """
    rows = ranked_rows(300, seed=2)
    if script == "sft":  # who reads demonstrations has none of the answers that are labelled bad
        rows = labelled_rows(300, seed=2)
    for i, row in enumerate(rows):
        row["prompt"] = f"{row['prompt']} {i:03}"
    rows = write_jsonl(tmp_path / "rows.jsonl", rows)
    tokenizer = common.load_tokenizer(str(made / "a"), 64)
    learned = common.load_rows(str(rows), None, kind, tokenizer, 60, 18)[0]
    shutil.copytree(made / "a", tmp_path / "run")
    arguments = {"max_length": 60, "max_prompt_length": 18}
    record = {"arguments": arguments, "source": {f"{script}.py": "..."}}
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    args = evaluate.Args(model=str(tmp_path / "run"), baseline="none", dataset=str(rows))
    args.max_length, args.max_prompt_length = 64, 50
    end = lambda ids: ids[1:][-17:].tobytes()  # noqa: E731  (what is left where a prompt is cut)
    seen = {end(row.ask) for row in learned.rows}
    asked = evaluate.read_questions(args, tokenizer).prompts
    assert len(asked) >= 2 and not [prompt for prompt in asked if end(prompt) in seen]
    if script != "sft":
        pairs = evaluate.read_pairs(args, tokenizer).rows
        assert len(pairs) >= 4 and not [row for row in pairs if end(row.ask) in seen]


ROWS = {  # a row, and what it can become
    "ranked": (
        {"prompt": "q", "responses": [" a", " b"], "scores": [1, 0]},
        "pair",
        "demonstration",
    ),
    "pair": ({"prompt": "q", "chosen": " a", "rejected": " b"}, "pair", "demonstration"),
    "labelled": ({"prompt": "q", "completion": " a", "label": True}, "demonstration"),
    "demonstration": ({"prompt": "q", "completion": " a"}, "demonstration"),
    "prompt": ({"prompt": "q"},),
    "text": ({"text": "q"},),
}


@pytest.mark.parametrize("kind", ROWS)
def test_what_rows_offer(kind, made, ev):
    row, *expected = ROWS[kind]
    expected += ["prompt"] * (kind != "text")
    write_jsonl(Path("rows.jsonl"), [row])
    offered = [k for k in ("pair", "demonstration", "prompt") if evaluate.offers("rows.jsonl", k)]
    assert offered == expected
    flags = {"eval_dataset": "rows.jsonl", "temperature": (0.0,), "baseline": "none"}
    if kind == "text":
        with pytest.raises(common.UserError, match="there are no prompts in it"):
            ev(**flags)
        return
    found = ev(**flags)
    assert found["facts"]["questions"] == 1 and found["facts"]["pairs"] == ("pair" in offered)
    if kind == "prompt":
        with pytest.raises(common.UserError, match="its rows have no answers"):
            ev(**flags | {"baseline": "chosen"})


@pytest.mark.parametrize("rows", ("comparisons", "posts"))
def test_a_copy_of_a_published_set(rows, ev, checkpoints):
    """What a run was given is enough: comparisons without demonstrations, and the other way."""
    texts = [f"My cat number {i} ran off." for i in range(6)]
    info = {"id": "t3_1", "article": None, "site": None}
    published = {
        "comparisons": [comparison(0, info=info | post(text)) for text in texts],
        "posts": [post(text, summary=" Cat ran.") for text in texts],
    }
    write_jsonl(Path("rows.jsonl"), published[rows])
    found = ev(
        model=str(checkpoints("llama")), eval_dataset="tldr=rows.jsonl", temperature=(0.0,),
        baseline="chosen", max_length=110, max_prompt_length=100,
    )  # fmt: skip
    assert found["facts"]["questions"] == 6
    assert found["facts"]["pairs"] == (6 if rows == "comparisons" else 0)


def test_rows_that_cannot_be_used_are_told(ev):
    write_jsonl(Path("rows.jsonl"), [{"question": "q"}])
    with pytest.raises(common.UserError, match="cannot be used"):
        ev(eval_dataset="rows.jsonl")


def test_the_embedded_task(_as_in_a_fresh_process):  # noqa: F811
    """Everything left out: the true reward, unseen questions, no baseline."""
    found = evaluate.main(evaluate.Args(prompts=16, temperature=(0.0,)))
    told = found["arguments"]
    assert (told["dataset"], told["reward"], told["baseline"]) == ("family", "family", "none")
    assert 0 < value(found, "greedy/reward") <= 1 and value(found, "greedy/ended") > 0.9
    assert found["facts"]["questions"] == found["facts"]["pairs"] == 16


# -- checkpoints


@pytest.mark.parametrize(
    "method", (pytest.param(dpo, id="dpo"), pytest.param(ppo, id="ppo", marks=pytest.mark.slow))
)
def test_along_a_run(method, ev, made, plain, monkeypatch):  # noqa: F811
    """The last checkpoint is the exported model."""
    flags = {"max_steps": 4, "keep_last": 9, "eval_dataset": str(made / "pairs.jsonl"), "lr": 0.01}
    if method is ppo:
        from test_train import OWN

        monkeypatch.setitem(OWN, "ppo", {"kl_coef": 0.1, "minibatches": 1})
        flags |= {"reward": f"{made / 'score.py'}:words", "max_length": 52}
    assert train(method, made / "b", made / "pairs.jsonl", "run", **flags) == 0
    found = ev(model="run", baseline=None, checkpoints=True, temperature=(1.0,))
    assert found["arguments"]["baseline"] == str(made / "b")
    assert [point["step"] for point in found["curve"]] == [2, 4]
    last = found["curve"][-1]
    for key in ("length", "reward", "kl"):
        assert last[key] == pytest.approx(value(found, f"sampled/{key}"), abs=1e-5)
    assert last["kl"] > 0.01 and found["curve"][0]["kl"] != last["kl"]
    if method is dpo:
        with open("run/checkpoint-2/policy.safetensors", "ab") as file:
            file.write(b"x")
        with pytest.raises(common.UserError, match="checkpoint-2 is damaged"):
            ev(model="run", checkpoints=True)
        shutil.rmtree("run/checkpoint-2")
        shutil.rmtree("run/checkpoint-4")
        with pytest.raises(common.UserError, match="there is no checkpoint"):
            ev(model="run", checkpoints=True)


def test_adapters_are_told(made, ev, monkeypatch):
    from safetensors.torch import save_file

    shutil.copytree(made / "a", "run")
    folder = Path("run/checkpoint-2")
    folder.mkdir()
    save_file({"model.q.lora_A.default.weight": torch.zeros(1)}, folder / "policy.safetensors")
    monkeypatch.setattr(common, "damage_of", lambda path: None)
    with pytest.raises(common.UserError, match="holds adapters"):
        ev(model="run", checkpoints=True)


# -- text metrics and the judge


def test_text_metrics(ev, made):
    pytest.importorskip("sacrebleu")
    pytest.importorskip("rouge_score")
    import textmetrics

    found = ev(text_metrics=True, temperature=(0.0,), prompts=15)
    own = {row["prompt"]: row["chosen"].strip() for row in pair_rows(40)}
    for side, rows in zip(("measured", "baseline"), kept(), strict=True):
        texts = [row["responses"][0].strip() for row in rows]
        answers = [own[row["prompt"]] for row in rows]
        for name in ("chrf", "bleu", "rouge_l"):
            score = getattr(textmetrics, name)(texts, answers)[0]
            assert value(found, f"greedy/{name}", side) == pytest.approx(score)
    change = found["difference"]["greedy/chrf"]
    assert change["value"] == pytest.approx(
        value(found, "greedy/chrf") - value(found, "greedy/chrf", "baseline")
    )
    assert change["low"] < change["high"]
    only = ev(text_metrics=True, temperature=(0.0,), prompts=15, baseline="chosen")
    assert "greedy/chrf" not in only["baseline"] and "greedy/chrf" in only["measured"]


class Judge:
    """Takes the answer with more words; cannot read the third."""

    asked = []

    def __init__(self, url, model, template, cache, workers, max_tokens):
        self.about = {"judge": url, "model": model, "template": template, "cache": str(cache)}

    def compare(self, prompts, first, second):
        import judging

        Judge.asked.append((prompts, first, second))
        better = [
            (len(x) > len(y)) + (len(x) == len(y)) / 2 for x, y in zip(first, second, strict=True)
        ]
        return judging.Verdicts([None if i == 2 else x for i, x in enumerate(better)], self.about)


def test_the_judge(ev, monkeypatch):
    judging = pytest.importorskip("judging")
    monkeypatch.setattr(judging, "Judge", Judge)
    monkeypatch.setattr(Judge, "asked", [])
    found = ev(judge="http://localhost:1/v1", judge_model="m", prompts=12)
    ((prompts, first, second),) = Judge.asked  # greedy answers alone, on the main process
    ours, theirs = kept()[2:]
    assert prompts == [row["prompt"] for row in ours] and not prompts[0].startswith("<s>")
    assert first == [row["responses"][0].strip() for row in ours]
    assert second == [row["responses"][0].strip() for row in theirs]
    won = [(len(x) > len(y)) + (len(x) == len(y)) / 2 for x, y in zip(first, second, strict=True)]
    del won[2]
    assert value(found, "greedy/judge") == pytest.approx(np.mean(won))
    assert found["measured"]["greedy/judge"]["n"] == 11
    assert found["measured"]["greedy/judge/length_controlled"]["n"] == 11
    assert found["facts"]["judge"]["cache"] == "cache/verdicts.jsonl"
    assert "sampled/judge" not in found["measured"]


# -- where it goes


def test_files(ev, capsys):
    found = ev(json="out.json", markdown="out.md", plot="out.png", prompts=12)
    screen = capsys.readouterr().out

    def refuse(name: str):
        raise ValueError(f"{name} is no JSON")

    saved = json.loads(Path("out.json").read_text(), parse_constant=refuse)
    assert saved == json.loads(json.dumps(found))
    assert saved["facts"]["questions"] == 12 and saved["arguments"]["prompts"] == 12
    assert Path("out.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    lines = Path("out.md").read_text().splitlines()
    table = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines if line.startswith("|")]
    assert {len(row) for row in table} == {4}  # KL(a || b) too
    numbers = {}
    mode = ""
    for row in table[2:]:
        label, *cells = (cell.strip() for cell in row)
        mode = label if label.endswith(":") else mode
        numbers[mode + label] = cells
    for key, label, digits in (
        ("sampled/reward", "sampled:reward", 3), ("greedy/length", "greedy:length, tokens", 2),
        ("sampled/kl", r"sampled:KL(a \|\| b), nats an answer", 3),
        ("ranking/sum", "ranking:pairs ranked right, by sum", 3),
        ("greedy/win_rate", "greedy:win rate against b", 3),
    ):  # fmt: skip
        for side, cell in zip(("measured", "baseline", "difference"), numbers[label], strict=True):
            sign = "+" if side == "difference" else ""
            estimate = saved[side].get(key, {})
            parts = [estimate[k] for k in ("value", "low", "high") if estimate.get(k) is not None]
            shown = [f"{number:{sign}.{digits}f}" for number in parts]
            assert re.findall(r"[-+.\d]+", cell) == shown, (key, side)
            assert cell in screen
    assert len(saved["by_length"]) == 4  # two modes, two sides


def test_numbers_that_are_none():
    nan = evaluate.Measured("x", Estimate(float("nan"), n=3), None, None)
    assert evaluate.shown(nan.ours, 3) == "" == evaluate.shown(None, 3)
    assert evaluate.shown(Estimate(0.5), 1) == "0.5"
    assert evaluate.shown(Estimate(0.25, -0.5, 1.0), 2, True) == "+0.25 [-0.50, +1.00]"
    table = {"a": evaluate.Measured("x", Estimate(1.0, 0.5, 2.0, 4), None, Estimate(0.5))}
    assert evaluate.from_json(json.loads(json.dumps(evaluate.as_json(table)))) == table


JUDGED = {"judge": "http://localhost:1/v1", "judge_model": "m"}
WRONG = [
    ({"dataset": None}, "on which questions"),
    ({"prompts": 0}, "--prompts must be 1"),
    ({"max_new_tokens": 0}, "--max-new-tokens must be 1"),
    ({"batch_size": 0}, "--batch-size must be 1"),
    ({"best_of": 0}, "--best-of must be 1"),
    ({"judge_workers": 0}, "--judge-workers must be 1"),
    ({"top_k": -1}, "--top-k must be 0"),
    ({"seed": -1}, "--seed must be 0"),
    ({"max_length": 0}, "--max-length must be 2"),
    ({"max_prompt_length": -4}, "--max-prompt-length must be 1"),
    ({"max_length": 200}, "takes 128 tokens at most"),
    ({"max_new_tokens": 90}, "takes 128 tokens together"),
    ({"temperature": ()}, "must be 0"),
    ({"temperature": (-1.0,)}, "must be 0"),
    ({"temperature": (float("nan"),)}, "must be 0"),
    ({"temperature": (0.5, 0.5)}, "each one once"),
    ({"best_of": 2, "reward": None}, "best by what"),
    ({"best_of": 2}, "are all the same"),
    ({"best_of": 300, "temperature": (1.0,)}, "in one --batch-size"),
    ({"split": "train"}, "it is for --export"),
    ({"export_chosen": True}, "needs --export FILE"),
    ({"judge": "http://localhost:1/v1"}, "belong together"),
    ({"judge_model": "m"}, "belong together"),
    (JUDGED | {"baseline": "none"}, "needs a --baseline"),
    (JUDGED | {"judge": "localhost"}, "takes a URL"),
    (JUDGED | {"judge_template": "no"}, "--judge-template no"),
    ({"reward": "runs/gone"}, "--reward runs/gone"),
    ({"select_by": "gone.py:f"}, "--select-by gone.py:f"),
    ({"baseline": "runs/gone"}, "--baseline runs/gone"),
    ({"json": "gone/out.json"}, "--json gone/out.json: there is no such folder"),
    ({"markdown": "gone/out.md"}, "--markdown gone/out.md: there is no such folder"),
    ({"plot": "gone/out.png"}, "--plot gone/out.png: there is no such folder"),
    ({"export": "gone/out.jsonl"}, "--export gone/out.jsonl: there is no such folder"),
    ({"plot": "out.png", "reward": None}, "needs a --reward"),
    ({"text_metrics": True, "bleu_tokenize": "no"}, "no is no tokenizer"),
    ({"checkpoints": True}, "there is no checkpoint"),
]


@pytest.mark.parametrize("flags, told", WRONG, ids=[" ".join(flags) for flags, _ in WRONG])
def test_what_cannot_be_is_refused(flags, told, ev, calls, monkeypatch):
    """Before any model is loaded."""
    if "text_metrics" in flags:
        pytest.importorskip("sacrebleu")
        pytest.importorskip("rouge_score")
    monkeypatch.setattr(common, "load_policy", lambda *a, **k: pytest.fail("too late"))
    with pytest.raises(common.UserError, match=re.escape(told)):
        ev(**flags)
    assert not calls


def test_a_baseline_with_another_tokenizer(ev, checkpoints):
    with pytest.raises(common.UserError, match="has another tokenizer"):
        ev(baseline=str(checkpoints("gpt2")))


def test_no_bos(ev, checkpoints):
    """A tokenizer with a chat template, and one without BOS: their prompts are whole."""
    for architecture in ("gpt2", "qwen2"):
        found = ev(model=str(checkpoints(architecture)), baseline="none", prompts=4,
                   temperature=(0.0,))  # fmt: skip
        assert found["facts"]["questions"] == 4
        assert {row["prompt"] for row in kept()[-1]} <= {row["prompt"] for row in pair_rows(40)}


def test_every_argument_is_commented_and_shown(monkeypatch, capsys):
    lines = (ROOT / "evaluate.py").read_text().splitlines()
    tree = ast.parse("\n".join(lines))
    fields = [
        node for cls in tree.body if isinstance(cls, ast.ClassDef) and cls.name == "Args"
        for node in cls.body
    ]  # fmt: skip
    comments = {f.target.id: lines[f.lineno - 1].partition("  # ")[2] for f in fields}
    assert [name for name, comment in comments.items() if not comment] == []
    read = (ROOT / "evaluate.py").read_text()
    listed = re.findall(r'"(\w+)"', read)  # those that are validated by name count once more
    assert [n for n in comments if f"args.{n}" not in read and listed.count(n) < 2] == []
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit):
        tyro.cli(evaluate.Args, args=["--help"], console_outputs=True)
    shown = re.sub(r"[\s│|]+", " ", capsys.readouterr().out)
    squeezed = {name: re.sub(r"[\s│|]+", " ", comment) for name, comment in comments.items()}
    assert [name for name, comment in squeezed.items() if comment not in shown] == []


# -- several processes


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(made, tmp_path):
    words = [
        "--model", made / "a", "--baseline", made / "b", "--dataset", made / "pairs.jsonl",
        "--eval-dataset", made / "pairs.jsonl", "--reward", f"{made / 'score.py'}:words",
        "--max-length", 64, "--max-prompt-length", 50, "--max-new-tokens", 6, "--dtype", "float64",
        "--text-metrics",
    ]  # fmt: skip
    records = []
    for processes in (1, 2):
        out = tmp_path / f"{processes}.json"
        more = ["--json", out, "--cache-dir", tmp_path / str(processes)]
        status, _, err = run_script("evaluate.py", *words, *more, processes=processes)
        assert status == 0, err
        records.append(json.loads(out.read_text()))
    for side in ("measured", "baseline", "difference"):
        one, two = (record[side] for record in records)
        assert one.keys() == two.keys()
        for key in one:
            for part, number in one[key].items():  # None: no interval
                if number is not None:
                    number = pytest.approx(number, rel=1e-9, abs=1e-9)
                assert two[key][part] == number, (key, part)
    files = [sorted((tmp_path / n).glob("answers-*.jsonl")) for n in "12"]
    assert len(files[0]) == 4
    for one, two in zip(*files, strict=True):
        assert one.name == two.name and one.read_bytes() == two.read_bytes()
    # A mistake that only the main process can see ends all of them.
    status, _, err = run_script("evaluate.py", *words, "--checkpoints", processes=2)
    assert status == 1 and "there is no checkpoint" in err
