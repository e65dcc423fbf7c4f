"""KTO's mismatched rows: each prompt with an answer to another prompt, the same in all epochs."""

import json
import random
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import labelled_rows, make_tokenizer, write_jsonl

import common
import kto

ROOM = 40  # --max-length


# -- helpers: an answer is known by its first token, a prompt by its last


def rows_of(prompts: list[int], first: int = 0) -> list[common.Row]:
    """One row per number of a prompt; answers are numbered from `first`."""
    made = []
    for i, number in enumerate(prompts):
        prompt = np.array([0] * (number % 4) + [number], np.int32)
        answer, label = np.array([first + i, 7, 7], np.int32), np.array([float(i % 2)])
        made.append(common.Row(prompt, [answer], prompt, label, key=str(number).encode()))
    return made


def sizes(*groups: int, seed: int = 0) -> list[int]:
    """That many rows of prompt 0, of prompt 1, ..., in random order."""
    prompts = [number for number, count in enumerate(groups) for _ in range(count)]
    random.Random(seed).shuffle(prompts)
    return prompts


def givers_of(rows: list[common.Row]) -> list[int]:
    return [int(row.responses[0][0]) for row in rows]


def mismatched(prompts: list[int], seed: int = 0) -> list[int]:
    """Which row's answer each row gets."""
    rows = rows_of(prompts)
    got = kto.mismatch(rows, rows, seed, ROOM)
    assert givers_of(rows) == list(range(len(prompts)))  # unchanged
    for row, other in zip(rows, got, strict=True):
        assert other.prompt is row.prompt and other.key == row.key and len(other.responses) == 1
    return givers_of(got)


# -- never an answer to the same prompt, every answer once


EDGES = [(1,) * 12, (1, 1), (2,) * 8, (5, 1, 3, 2, 4, 1), (6, 1, 1, 1, 1, 1, 1), (6, 6), (7, 4, 3)]


def test_every_answer_goes_to_one_other_prompt():
    """Never to the row's own prompt, and a permutation if there is one."""
    rng = random.Random(1)
    for seed in range(300):
        groups = [rng.choice((1, 1, 1, 2, 3, 8)) for _ in range(rng.randint(2, 9))]
        groups[0] = rng.randint(1, 30) if seed % 3 == 0 else groups[0]
        groups = EDGES[seed] if seed < len(EDGES) else groups
        prompts = sizes(*groups, seed=seed)
        got = mismatched(prompts, seed)
        assert all(prompts[i] != prompts[giver] for i, giver in enumerate(got)), groups
        if 2 * max(groups) <= len(prompts):
            assert sorted(got) == list(range(len(prompts))), groups


@pytest.mark.parametrize("groups", [(9, 1, 1), (30, 2, 3, 5), (12, 11), (5, 1)])
def test_a_prompt_with_more_than_half_of_the_rows_gets_all_others_equally_often(groups):
    """z0 is a mean over these answers: one answer should not dominate it."""
    prompts = sizes(*groups)
    got = mismatched(prompts)
    used = Counter(got[i] for i, number in enumerate(prompts) if number == 0)
    assert len(used) == sum(groups[1:])
    assert max(used.values()) - min(used.values()) <= 1


def test_one_prompt_alone_is_refused():
    rows = rows_of([3] * 8)
    for others in (rows, rows_of([3], first=50)):
        with pytest.raises(common.UserError, match="all rows have the same prompt"):
            kto.mismatch(others, rows, 0, ROOM)
    others = rows_of([4, 5], first=50)  # held-out rows with other prompts
    assert all(giver < 8 for giver in givers_of(kto.mismatch(others, rows, 0, ROOM)))


def test_only_the_seed_decides():
    prompts = sizes(*(2,) * 30)
    first = mismatched(prompts, 3)
    np.random.seed(5)
    torch.manual_seed(5)
    random.seed(5)
    assert mismatched(prompts, 3) == first
    assert len({tuple(mismatched(prompts, seed)) for seed in range(20)}) == 20


class CountedKey(bytes):
    comparisons = 0

    def __eq__(self, other):
        CountedKey.comparisons += 1
        return bytes.__eq__(self, other)

    __hash__ = bytes.__hash__


@pytest.mark.parametrize("largest", [1, 500, 1500, 1999])
def test_large_sets(largest):
    """The work is linear in the rows, of which one prompt has `largest`. Answers come from the
    whole set, not from neighbours in the file, which are often about the same.
    """
    rows = rows_of(sizes(largest, *[1] * (2000 - largest)))
    for row in rows:
        row.key = CountedKey(row.key)
    CountedKey.comparisons = 0
    got = givers_of(kto.mismatch(rows, rows, 0, ROOM))
    assert CountedKey.comparisons <= 20 * len(rows)
    assert sum(abs(i - giver) > 100 for i, giver in enumerate(got)) > 1500


class Policy:
    """What collate_for reads of a policy."""

    share_prompt, lm, config = False, SimpleNamespace(device=torch.device("cpu")), None


def a_run(rows: list[common.Row], tmp_path: Path, **flags) -> common.Run:
    values = {"batch_size": 8, "micro_batch_size": 4, "epochs": 3.0, "dataset": "made"}
    args = kto.Args(output_dir=str(tmp_path / "out"), resume="never", **(values | flags))
    args.preset, args.given = {}, set()
    run = common.Run(args)
    run.plan(rows)
    run.policy = Policy()
    return run


@pytest.mark.parametrize("world", [1, 2])
def test_a_row_has_the_same_answer_in_every_epoch_and_process(world, tmp_path):
    rows = rows_of(sizes(*(2,) * 16))
    others, met = kto.mismatch(rows, rows, 0, ROOM), Counter()
    for rank in range(world):
        run = a_run(rows, tmp_path / str(rank))
        run.rank, run.world = rank, world
        for step in run.steps(rows):
            for batch in step.micro_batches:
                second = common.collate_for(Policy(), others, batch.indexes)
                firsts = [x.targets[::3].tolist() for x in (batch, second)]
                met.update(zip(*firsts, strict=True))
            run.step += 1
    assert met == {pair: 3 for pair in zip(range(32), givers_of(others), strict=True)}


def test_the_permutation_is_not_an_epochs_order(tmp_path):
    """From the same random stream, the batches of one epoch would contain each other's answers."""
    rows = rows_of(list(range(64)))
    run, got = a_run(rows, tmp_path, epochs=4.0), givers_of(kto.mismatch(rows, rows, 0, ROOM))
    for epoch in range(4):
        batches = [sum(run.step_rows(8 * epoch + at), []) for at in range(8)]
        within = sum(got[i] in batch for batch in batches for i in batch)
        assert within < 24, epoch  # 7 of 64 are expected


def test_an_answer_is_cut_to_the_room_after_the_prompt():
    rng = random.Random(2)
    rows = []
    for i in range(100):
        prompt = np.array([i] * rng.randint(1, ROOM - 1), np.int32)
        answer = np.array([i] + [7] * rng.randint(0, ROOM - 1 - len(prompt)), np.int32)
        rows.append(common.Row(prompt, [answer], prompt, np.array([1.0]), bytes([i])))
    for row, other in zip(rows, kto.mismatch(rows, rows, 0, ROOM), strict=True):
        (answer,) = other.responses
        assert len(answer) >= 1 and other.length() <= ROOM
        whole = rows[int(answer[0])].responses[0]
        assert answer.tolist() == whole[: ROOM - len(row.prompt)].tolist()


def test_held_out_rows_get_answers_of_training_rows():
    train, prompts = rows_of(sizes(3, 1, 2, 2)), sizes(3, 1, 2, 2)
    # Some prompts of the training rows and some others; more rows than there are in training.
    held_out = rows_of([0, 1, 2, 3, 9, 10, 11] * 4, first=100)
    got = givers_of(kto.mismatch(held_out, train, 0, ROOM))
    for row, giver in zip(held_out, got, strict=True):
        assert giver < len(train) and train[giver].key != row.key
    assert len(set(got)) == len(train)  # not one answer for all
    assert kto.mismatch([], train, 0, ROOM) == []
    # --eval-dataset may be the training file.
    got = givers_of(kto.mismatch(rows_of(prompts), train, 0, ROOM))
    assert all(prompts[i] != prompts[giver] for i, giver in enumerate(got))


@pytest.mark.parametrize("form", ["pair", "labelled"])
def test_rows_of_a_file(form, tmp_path):
    """The other answer to a prompt is never y', even if the prompt was cut for one of the two."""
    tokenizer = make_tokenizer("bos")
    tokenizer.stop_ids = frozenset([tokenizer.eos_token_id])
    tokenizer.bos = [tokenizer.bos_token_id]
    raws = []
    for i in range(4):
        prompt, answers = "zyxw" * 8 + f" {i}?", (f" {i}a", f" {i}b" + " de" * 12)
        if form == "pair":
            raws.append({"prompt": prompt, "chosen": answers[0], "rejected": answers[1]})
        else:
            raws += [{"prompt": prompt, "completion": a, "label": a is answers[0]} for a in answers]
    file = str(write_jsonl(tmp_path / "rows.jsonl", raws))
    args = kto.Args(dataset=file, eval_dataset=file, max_length=60, max_prompt_length=35)
    args.cache_dir = str(tmp_path / "cache")
    rows, _ = common.load_rows(args, tokenizer, kind="labelled")
    assert len(rows) == 8 and (form == "pair" or len({len(row.prompt) for row in rows}) > 1)
    assert sorted(row.scores.tolist() for row in rows) == [[0.0]] * 4 + [[1.0]] * 4
    for seed in range(20):
        others = kto.mismatch(rows, rows, seed, 60)
        for row, other in zip(rows, others, strict=True):
            own, given = (tokenizer.decode(x.responses[0])[:2] for x in (row, other))
            assert own in [f" {i}" for i in range(4)] and own != given


def test_kto_starts_at_exactly_zero(checkpoints, fresh_process, tmp_path):
    """y' goes through the policy in the micro-batches of its reference. A rounding difference would
    make z0 positive, and half of the held-out answers right before the first step.
    """
    train, test = (str(write_jsonl(tmp_path / f"{n}.jsonl", labelled_rows(n, n))) for n in (32, 48))
    args = kto.Args(str(checkpoints("llama")), train, test, max_length=128, max_prompt_length=64)
    args.batch_size, args.micro_batch_size, args.max_steps, args.output_dir = 16, 4, 1, "out"
    args.preset, args.given = {}, set()
    kto.main(args)
    held_out, step, _ = map(json.loads, Path("out/metrics.jsonl").read_text().splitlines())
    for metrics in ({name.removeprefix("eval/"): x for name, x in held_out.items()}, step):
        assert (metrics["loss"], metrics["kl"], metrics["rewards/accuracies"]) == (0.5, 0.0, 0.5)
