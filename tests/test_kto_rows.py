"""The rows of kto.py: each has an answer to another prompt, the same in all epochs, and its two
answers go through the model in passes of their own.
"""

import random
import signal
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import make_tokenizer, write_jsonl
from test_logps import PAIRS, RAGGED, all_float64, load, random_rows

import common
import kto

CPU = torch.device("cpu")
ROOM = 40  # --max-length


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    """pytest gets its signal handlers back from every Run."""
    monkeypatch.chdir(tmp_path)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


# -- helpers: an answer is known by its first token, a prompt by its last


def rows_of(prompts: list[int], first: int = 0, length: int = 3) -> common.Rows:
    """A row for each number of a prompt; answers are numbered from `first`."""
    made = []
    for i, number in enumerate(prompts):
        prompt = np.array([0] * (number % 4) + [number], np.int32)
        answer = np.array([first + i, *[7] * (length - 1)], np.int32)
        made.append(common.Row(prompt, [answer], prompt, np.array([float(i % 2)])))
    return common.Rows("made", made)


def sizes(*groups: int, seed: int = 0) -> list[int]:
    """So many rows of prompt 0, of prompt 1, ..., in a random order."""
    prompts = [number for number, many in enumerate(groups) for _ in range(many)]
    random.Random(seed).shuffle(prompts)
    return prompts


def given(rows: common.Rows) -> list[int]:
    return [int(row.responses[1][0]) for row in rows.rows]


def mismatched(prompts: list[int], seed: int = 0) -> list[int]:
    """Which row's answer each row got."""
    rows = rows_of(prompts)
    kto.add_mismatched(rows, rows, seed, ROOM)
    assert [int(row.responses[0][0]) for row in rows.rows] == list(range(len(prompts)))
    return given(rows)


# -- never an answer to the same prompt, every answer once


GROUPS = {
    "one row a prompt": (1,) * 12,
    "two": (1, 1),
    "pairs": (2,) * 8,
    "uneven": (5, 1, 3, 2, 4, 1),
    "half of all": (6, 1, 1, 1, 1, 1, 1),
    "two halves": (6, 6),
    "half, and a large rest": (7, 4, 3),
}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", GROUPS)
def test_every_answer_goes_to_one_other_prompt(name, seed):
    prompts = sizes(*GROUPS[name], seed=seed)
    got = mismatched(prompts, seed)
    assert sorted(got) == list(range(len(prompts)))  # a permutation
    assert all(prompts[i] != prompts[giver] for i, giver in enumerate(got))


def test_random_sets():
    """Of any sizes: no answer to the row's own prompt, and a permutation where there can be one."""
    rng = random.Random(1)
    for seed in range(300):
        groups = [rng.choice((1, 1, 1, 2, 3, 8)) for _ in range(rng.randint(2, 9))]
        if seed % 3 == 0:
            groups[0] = rng.randint(1, 30)
        prompts = sizes(*groups, seed=seed)
        got = mismatched(prompts, seed)
        assert all(prompts[i] != prompts[giver] for i, giver in enumerate(got)), groups
        if 2 * max(groups) <= len(prompts):
            assert sorted(got) == list(range(len(prompts))), groups
        else:  # then all answers of the others are used, for there are too few of them
            largest = groups.index(max(groups))
            others = {i for i, number in enumerate(prompts) if number != largest}
            assert {got[i] for i in range(len(got)) if i not in others} == others, groups


@pytest.mark.parametrize("groups", [(9, 1, 1), (30, 2, 3, 5), (12, 11), (5, 1)])
def test_a_prompt_with_more_than_half_of_the_rows_gets_all_the_others_about_equally_often(groups):
    """z0 is a mean over these answers: of one that stands for many, it would be that answer's."""
    prompts = sizes(*groups)
    got = mismatched(prompts)
    assert all(prompts[i] != prompts[giver] for i, giver in enumerate(got))
    others = sum(groups[1:])
    used = Counter(got[i] for i, number in enumerate(prompts) if number == 0)
    assert len(used) == others
    assert max(used.values()) - min(used.values()) <= 1


def test_one_prompt_has_no_stranger():
    rows = rows_of([3] * 8)
    with pytest.raises(common.UserError) as error:
        kto.add_mismatched(rows, rows, 0, ROOM)
    assert str(error.value) == (
        "all rows have the same prompt, and KTO's z0 needs an answer to another one"
    )
    with pytest.raises(common.UserError, match="the same prompt"):
        kto.add_mismatched(rows_of([3], first=50), rows, 0, ROOM)
    other = rows_of([4, 5], first=50)  # held-out rows of other prompts are no problem
    kto.add_mismatched(other, rows, 0, ROOM)
    assert all(giver < 8 for giver in given(other))


# -- a function of the rows and the seed


def test_the_seed_decides_and_nothing_else():
    prompts = sizes(*(2,) * 30)
    first = mismatched(prompts, 3)
    np.random.seed(5)
    torch.manual_seed(5)
    random.seed(5)
    assert mismatched(prompts, 3) == first
    assert len({tuple(mismatched(prompts, seed)) for seed in range(20)}) == 20
    assert sum(a == b for a, b in zip(first, mismatched(prompts, 4), strict=True)) < 15


def test_asked_again_it_says_the_same():
    """A run that goes on makes its rows anew; the second answer is never taken for the first."""
    prompts = sizes(5, 1, 3, 2, 4, 1)
    rows = rows_of(prompts)
    kto.add_mismatched(rows, rows, 1, ROOM)
    once = given(rows)
    kto.add_mismatched(rows, rows, 1, ROOM)
    assert given(rows) == once and all(len(row.responses) == 2 for row in rows.rows)


def test_answers_of_strangers_are_spread_over_the_whole_set():
    """Not the neighbours in the file, which often are about the same."""
    got = mismatched(list(range(400)))
    far = [abs(i - giver) for i, giver in enumerate(got)]
    assert sum(d > 20 for d in far) > 300  # of two random places, 361 are that far apart


def a_run(rows: common.Rows, world: int = 1, rank: int = 0, **flags) -> common.Run:
    values = {"batch_size": 8, "micro_batch_size": 4, "epochs": 3.0, "max_steps": None}
    args = kto.Args(output_dir="out", **(values | flags))
    run = common.Run(args, {"micro_batch_size": "command line"}, {}, Path(kto.__file__))
    run.rank, run.world = rank, world
    run.plan(rows)
    return run


class Policy:
    """What a batch is laid out for: behind one prompt, wherever that is allowed."""

    share_prompt, device = True, CPU
    config = SimpleNamespace(_attn_implementation="sdpa", hidden_size=8)


def steps(run: common.Run, rows: common.Rows) -> list[list[common.Micro]]:
    run.step, run.policy, seen = 0, Policy(), []
    for batch in run.batches(rows):
        seen.append(list(batch))
        run.step += 1
    return seen


@pytest.mark.parametrize("world", [1, 2])
def test_a_row_has_the_same_stranger_in_every_epoch_and_process(world):
    rows = rows_of(sizes(*(2,) * 16))
    kto.add_mismatched(rows, rows, 0, ROOM)
    expected = {int(row.responses[0][0]): int(row.responses[1][0]) for row in rows.rows}
    met = Counter()
    for rank in range(world):
        for step in steps(a_run(rows, world, rank), rows):
            for micro in step:
                firsts = [micro.column(k).targets[::3].tolist() for k in (0, 1)]
                met.update(zip(*firsts, strict=True))
    assert met == {pair: 3 for pair in expected.items()}  # 32 rows, 3 epochs


def test_the_permutation_is_not_an_epochs_order():
    """Drawn from the same stream, one epoch's batches would hold each other's answers and the
    others' would not.
    """
    rows = rows_of(list(range(64)))
    kto.add_mismatched(rows, rows, 0, ROOM)
    run, giver = a_run(rows, epochs=4.0), given(rows)
    for epoch in range(4):
        batches = [sum(run.step_rows(8 * epoch + at), []) for at in range(8)]
        within = sum(giver[i] in batch for batch in batches for i in batch)
        assert within < 24, epoch  # 7 of 64 are to be expected


# -- room


def test_an_answer_is_cut_to_the_room_behind_the_prompt():
    rng = random.Random(2)
    for seed in range(50):
        rows = []
        for i in range(12):
            prompt = np.array([i] * rng.randint(1, ROOM - 1), np.int32)
            answer = np.array([i] + [7] * rng.randint(0, ROOM - 1 - len(prompt)), np.int32)
            rows.append(common.Row(prompt, [answer], prompt, np.array([1.0])))
        rows = common.Rows("", rows)
        whole = {int(row.responses[0][0]): row.responses[0] for row in rows.rows}
        kto.add_mismatched(rows, rows, seed, ROOM)
        for i, row in enumerate(rows.rows):
            own, other = row.responses
            assert own is whole[i] and row.length() <= ROOM
            room = ROOM - len(row.prompt)
            assert 1 <= len(other) == min(room, len(whole[int(other[0])]))
            assert other.tolist() == whole[int(other[0])][:room].tolist()


# -- held-out rows


def test_held_out_rows_are_given_answers_of_training_rows():
    train = rows_of(sizes(3, 1, 2, 2))
    # The same prompts as in training, and others; more rows than there are to train on.
    held_out = rows_of([0, 1, 2, 3, 9, 10, 11] * 4, first=100)
    kto.add_mismatched(held_out, train, 0, ROOM)
    prompts = [int(row.prompt[-1]) for row in train.rows]
    for row, giver in zip(held_out.rows, given(held_out), strict=True):
        assert giver < len(train) and prompts[giver] != int(row.prompt[-1])
    assert len(set(given(held_out))) == len(train)  # not one answer for all
    assert all(len(row.responses) == 1 for row in train.rows)


def test_held_out_rows_get_the_same_whichever_is_done_first():
    made = []
    for order in (0, 1):
        train, held_out = rows_of(sizes(3, 1, 2, 2)), rows_of([0, 5, 1, 6, 2], first=100)
        for rows in [(train, held_out), (held_out, train)][order]:
            kto.add_mismatched(rows, train, 7, ROOM)
        made.append((given(train), given(held_out)))
    assert made[0] == made[1]


def test_no_held_out_rows_are_no_trouble():
    held_out = common.Rows("none", [])
    kto.add_mismatched(held_out, rows_of([1, 2]), 0, ROOM)
    assert held_out.apart and len(held_out) == 0


def test_held_out_rows_that_are_the_training_rows():
    """--eval-dataset may name the file that is trained on."""
    prompts = sizes(2, 2, 1, 3)
    train, held_out = rows_of(prompts), rows_of(prompts)
    kto.add_mismatched(held_out, train, 0, ROOM)
    got = given(held_out)
    assert all(prompts[i] != prompts[giver] for i, giver in enumerate(got))


# -- large sets


class Told(bytes):
    """A prompt's tokens that count how often two of them are compared."""

    count = 0

    def __eq__(self, other):
        Told.count += 1
        return bytes.__eq__(self, other)

    __hash__ = bytes.__hash__


class Prompt(np.ndarray):
    def tobytes(self) -> bytes:
        return Told(super().tobytes())


@pytest.mark.parametrize("largest", [1, 500, 1001, 1500, 1999])
@pytest.mark.parametrize("held_out", [False, True], ids=["training", "held-out"])
def test_the_work_grows_with_the_rows_and_no_faster(largest, held_out):
    """2,000 rows, of which one prompt has so many. To look for a stranger one place after another
    takes the square of that.
    """
    prompts = sizes(largest, *[1] * (2000 - largest))
    train = rows_of(prompts)
    rows = rows_of(prompts[:1000] if largest > 1 else prompts, first=5000) if held_out else train
    for row in (*train.rows, *rows.rows):
        row.prompt = row.prompt.view(Prompt)
    Told.count = 0
    kto.add_mismatched(rows, train, 0, ROOM)
    assert Told.count <= 20 * len(prompts)
    assert all(len(row.responses) == 2 for row in rows.rows)


# -- from a file: pairs taken apart, one answer cut


@pytest.mark.parametrize("form", ["pair", "labelled"])
def test_the_other_answer_to_a_question_is_never_its_stranger(form):
    """Also where a prompt was cut to make room for one of its two answers."""
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
    file = str(write_jsonl(Path("rows.jsonl"), raws))
    for seed in range(20):
        rows, _ = common.load_rows(file, file, "labelled", tokenizer, 60, 35)
        kto.add_mismatched(rows, rows, seed, 60)
        for row in rows.rows:
            own, other = (tokenizer.decode(r)[:2] for r in row.responses)
            assert own in [f" {i}" for i in range(4)] and own != other


# -- one column of a micro-batch


def test_rows_taken_apart_never_share_their_prompt():
    rows = common.Rows("", random_rows([(30, (3, 3)), (30, (2, 4))]))
    assert common.collate_for(Policy(), rows, [0, 1]).segments is not None  # it would pay
    rows.apart = True
    micro = common.collate_for(Policy(), rows, [0, 1], 2.5)
    assert micro.segments is None and micro.positions is None
    assert micro.input_ids.shape == (4, 34) and micro.mean_length == 2.5
    kto_rows = rows_of([1, 2])
    assert not kto_rows.apart
    kto.add_mismatched(kto_rows, kto_rows, 0, ROOM)
    assert kto_rows.apart


def alone(rows: common.Rows, k: int) -> common.Rows:
    """The rows that have a k-th response, with that one alone."""
    made = [
        common.Row(row.prompt, [row.responses[k]], row.ask, None)
        for row in rows.rows
        if k < len(row.responses)
    ]
    return common.Rows("", made)


@pytest.mark.parametrize("shapes", (PAIRS, RAGGED), ids=("pairs", "ragged"))
def test_a_column_holds_what_rows_of_that_response_alone_hold(shapes):
    rows = common.Rows("", random_rows(shapes))
    many = max(len(lengths) for _, lengths in shapes)
    rows.ref_logps = torch.arange(len(rows) * many, dtype=torch.float64).view(-1, many)
    rows.apart = True
    order = [2, 0, 3, 1]
    micro = common.collate(rows, order, CPU)
    for k in range(many):
        there = [i for i in order if k < len(rows.rows[i].responses)]
        only = common.Rows("", [alone(common.Rows("", [rows.rows[i]]), k).rows[0] for i in there])
        single = common.collate(only, list(range(len(there))), CPU)
        column = micro.column(k)
        assert column.shape == (len(order), 1, micro.shape[2])
        assert torch.equal(column.targets, single.targets)
        has = [at for at, i in enumerate(order) if i in there]
        width = single.input_ids.shape[1]
        assert torch.equal(column.input_ids[has, :width], single.input_ids)
        assert not column.input_ids[has, width:].any()  # more padding, and nothing else
        # The same places, in sequences and lines of another length.
        line, place = (
            column.picked // micro.input_ids.shape[1],
            column.picked % micro.input_ids.shape[1],
        )
        assert torch.equal(place, single.picked % width)
        assert [has.index(at) for at in line.tolist()] == (single.picked // width).tolist()
        longest = single.shape[2]
        assert torch.equal(column.slots % micro.shape[2], single.slots % longest)
        lines = (column.slots // micro.shape[2]).tolist()
        assert [has.index(at) for at in lines] == (single.slots // longest).tolist()
        lengths = [len(rows.rows[i].responses[k]) if i in there else 0 for i in order]
        assert column.lengths.tolist() == [[n] for n in lengths]
        assert column.ref_logps.tolist() == [[float(i * many + k)] for i in order]
        assert column.segments is None and column.positions is None
        assert torch.equal(column.input_ids.flatten()[column.picked + 1], column.targets)


def test_all_columns_together_are_the_micro_batch():
    rows = common.Rows("", random_rows(RAGGED))
    micro = common.collate(rows, [0, 1, 2, 3], CPU)
    columns = [micro.column(k) for k in range(4)]
    assert sum(len(column.targets) for column in columns) == len(micro.targets)
    assert torch.equal(torch.cat([column.lengths for column in columns], 1), micro.lengths)
    assert torch.equal(
        torch.stack([c.input_ids for c in columns], 1).flatten(0, 1), micro.input_ids
    )
    assert all(column.ref_logps is None for column in columns)
    # The micro-batch itself is as it was.
    again = common.collate(rows, [0, 1, 2, 3], CPU)
    assert torch.equal(micro.picked, again.picked) and micro.shape == again.shape


@pytest.mark.parametrize("architecture", ("llama", "gemma2", "gpt2"))
def test_log_probs_of_a_column_are_those_of_the_whole(architecture, checkpoints):
    """Gemma 2's window is shorter than these texts; padding is not the same in the two."""
    for shapes in (PAIRS, RAGGED):
        rows = common.Rows("", random_rows(shapes))
        micro = common.collate(rows, [3, 1, 0, 2], CPU)
        policy = load(checkpoints(architecture))
        with all_float64(), torch.no_grad():
            whole, lengths = common.response_logps(policy, micro)
            for k in range(micro.shape[1]):
                logps, of_column = common.response_logps(policy, micro.column(k))
                assert logps.shape == of_column.shape == (4, 1) and logps.dtype == torch.float64
                assert torch.equal(of_column[:, 0], lengths[:, k])
                assert (logps[:, 0] - whole[:, k]).abs().max() <= 1e-12
                single = alone(common.Rows("", [rows.rows[i] for i in (3, 1, 0, 2)]), k)
                expected, _ = common.response_logps(
                    policy, common.collate(single, list(range(len(single))), CPU)
                )
                there = of_column[:, 0] > 0
                assert (logps[there] - expected).abs().max() <= 1e-12
                assert not logps[~there].any()


def test_a_column_of_labels_and_references_as_the_loss_takes_them():
    """The label is the first answer's; the stranger's place in the scores is empty."""
    rows = rows_of([1, 2, 3])
    kto.add_mismatched(rows, rows, 0, ROOM)
    rows.ref_logps = torch.tensor([[-1.0, -10.0], [-2.0, -20.0], [-3.0, -30.0]])
    micro = common.collate_for(Policy(), rows, [2, 0, 1])
    assert micro.scores.shape == (3, 2) and micro.scores[:, 1].isnan().all()
    assert (micro.scores[:, 0] > 0).tolist() == [False, False, True]
    assert micro.column(0).ref_logps.tolist() == [[-3.0], [-1.0], [-2.0]]
    assert micro.column(1).ref_logps.tolist() == [[-30.0], [-10.0], [-20.0]]
    assert [int(t) for t in micro.column(0).targets[::3]] == [2, 0, 1]
    assert [int(t) for t in micro.column(1).targets[::3]] == [given(rows)[i] for i in (2, 0, 1)]
