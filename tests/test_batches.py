"""From rows to micro-batches: their layout by hand, and which rows a step learns from."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import common
import dpo
from training import transfer

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("fresh_process")


def made(*rows: tuple[list[int], ...]) -> list[common.Row]:
    """Rows of (prompt, response, response, ...) as ids."""
    arrays = [[np.array(part, np.int32) for part in row] for row in rows]
    return [common.Row(prompt, responses, prompt) for prompt, *responses in arrays]


CONFIG = SimpleNamespace(_attn_implementation="sdpa", hidden_size=8)
ROWS = ([1, 2], [3, 4], [5]), ([6], [7], [8, 9, 10])


def test_collate_by_hand():
    batch = common.collate(made(*ROWS), [0, 1], CPU)
    assert batch.input_ids.tolist() == [[1, 2, 3, 4], [1, 2, 5, 0], [6, 7, 0, 0], [6, 8, 9, 10]]
    assert batch.targets.tolist() == [3, 4, 5, 7, 8, 9, 10]
    assert batch.target_positions.tolist() == [1, 2, 5, 8, 12, 13, 14]
    assert batch.output_index.tolist() == [0, 1, 3, 6, 9, 10, 11]
    assert batch.ends.tolist() == [[3, 6], [9, 15]]
    assert batch.lengths.tolist() == [[2, 1], [1, 3]] and batch.shape == (2, 2, 3)
    assert batch.segments is batch.positions is None
    assert batch.scores.isnan().all() and batch.ref_logps.isnan().all()
    values = torch.arange(7.0)
    assert common.scatter_to_responses(values, batch).tolist() == [
        [[0, 1, 0], [2, 0, 0]], [[3, 0, 0], [4, 5, 6]],
    ]  # fmt: skip


@pytest.mark.parametrize("attention, width", [("sdpa", 5), ("flex_attention", 128)])
def test_collate_with_a_shared_prompt_by_hand(attention, width):
    config = SimpleNamespace(_attn_implementation=attention)
    batch = common.collate(made(*ROWS), [0, 1], CPU, config)
    assert batch.input_ids.shape == (2, width)
    assert batch.input_ids[:, :5].tolist() == [[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]]
    assert batch.segments[:, :5].tolist() == [[0, 0, 1, 1, 2], [0, 1, 2, 2, 2]]
    assert batch.positions[:, :5].tolist() == [[0, 1, 2, 3, 2], [0, 1, 1, 2, 3]]
    assert (batch.segments[:, 5:] == 3).all()  # padding
    before = [1, 2, 1, width, width, width + 2, width + 3]  # the prompt's end before both
    assert batch.target_positions.tolist() == before
    assert batch.ends.tolist() == [[3, 4], [width + 1, width + 4]]


def test_rows_with_different_numbers_of_responses():
    """NaN where there is no response; the shape is that of these rows, not of the data set."""
    rows = made(([1, 2], [3], [4, 5], [6]), ([7], [8, 9]), ([1], [2], [3]))
    for row, scores in zip(rows, ([3.5, 2.0, -1.0], [0.0], [1e300, 0.0]), strict=True):
        row.scores, row.ref_logps = np.array(scores), -np.array(scores)
    for config in (None, CONFIG):
        batch = common.collate(rows, [1, 0], CPU, config)
        assert batch.lengths.tolist() == [[2, 0, 0], [1, 2, 1]]
        assert batch.targets.tolist() == [8, 9, 3, 4, 5, 6]
        flat = batch.input_ids.flatten()
        assert torch.equal(flat[batch.ends[batch.lengths > 0]], torch.tensor([9, 3, 5, 6]))
        expected = torch.tensor([[0.0, torch.nan, torch.nan], [3.5, 2.0, -1.0]]).double()
        torch.testing.assert_close(batch.scores, expected, equal_nan=True)
        torch.testing.assert_close(batch.ref_logps, -expected, equal_nan=True)
        assert common.collate(rows, [1, 2], CPU, config).scores[1].tolist() == [1e300, 0.0]


# -- on a GPU (tests/test_pretend_cuda.py counts copies)


def test_one_buffer_holds_all_arrays(monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: pinned.append(x) or x.clone())
    arrays = (np.arange(3), None, np.array([[0.5, np.nan]]), np.arange(6).reshape(2, 3))
    first, none, *rest = transfer.to_device(arrays, CPU)
    assert len(pinned) == 1 and none is None and first.tolist() == [0, 1, 2]
    for found, expected in zip(rest, arrays[2:], strict=True):
        torch.testing.assert_close(found, torch.from_numpy(expected), equal_nan=True)
    assert [x.data_ptr() - first.data_ptr() for x in rest] == [32, 48]  # multiples of 16 bytes


@pytest.mark.parametrize("config", (None, CONFIG))
def test_few_widths_on_a_gpu(config, monkeypatch):
    """At most 40 in 100 steps, because kernels are set up for each. Only padding is added."""
    to_tensors = lambda arrays, _: [x if x is None else torch.from_numpy(x) for x in arrays]  # noqa: E731
    monkeypatch.setattr(transfer, "to_device", to_tensors)
    rng, widths, exact = np.random.default_rng(2), set(), set()
    for _ in range(100):
        lengths = rng.integers(1, 342, (4, 3))  # of a prompt and two responses: up to 1,023
        rows = made(*([[i + 1] * n for i, n in enumerate(row)] for row in lengths))
        on_cpu = common.collate(rows, [0, 1, 2, 3], CPU, config)
        on_gpu = common.collate(rows, [0, 1, 2, 3], torch.device("cuda"), config)
        exact.add(width := on_cpu.input_ids.shape[1])
        widths.add(on_gpu.input_ids.shape[1])
        assert torch.equal(on_gpu.input_ids[:, :width], on_cpu.input_ids)
        assert not on_gpu.input_ids[:, width:].any() and torch.equal(on_gpu.targets, on_cpu.targets)
        before = on_gpu.input_ids.flatten()[on_gpu.target_positions]
        assert torch.equal(before, on_cpu.input_ids.flatten()[on_cpu.target_positions])
    assert len(widths) <= 40 < len(exact)


# -- which rows, when


@pytest.fixture(scope="module")
def thirty() -> list[common.Row]:
    rng = np.random.default_rng(1)
    lengths = rng.integers(1, 20, (30, 2))
    return made(*(([i, i], [i] * a, [i] * b) for i, (a, b) in enumerate(lengths, 1)))


def planned(rows: list[common.Row], world: int = 1, rank: int = 0, **flags) -> common.Run:
    flags = {"batch_size": 8, "micro_batch_size": 2, "epochs": 3.0} | flags
    run = common.Run(dpo.Args(dataset="rows.jsonl", output_dir=None, resume="never", **flags))
    run.rank, run.world = rank, world
    run.plan(rows)
    run.policy = SimpleNamespace(share_prompt=False, lm=SimpleNamespace(device=CPU), config=CONFIG)
    return run


def test_the_order_of_rows(thirty):
    """Each row once per epoch; a function of seed, epoch and step; a short batch is dropped."""
    run = planned(thirty)
    assert (run.steps_per_epoch, run.total_steps) == (3, 9)
    steps = [sum(run.step_rows(step), []) for step in range(9)]
    epochs = [sum(steps[3 * e : 3 * e + 3], []) for e in range(3)]
    assert all(len(epoch) == len({*epoch}) == 24 for epoch in epochs)
    assert len({frozenset(epoch) for epoch in epochs}) == 3  # each drops other rows
    longer, other = planned(thirty, epochs=5.0), planned(thirty, seed=1)
    assert [sum(longer.step_rows(step), []) for step in range(8, -1, -1)] == steps[::-1]
    assert [sum(other.step_rows(step), []) for step in range(9)] != steps
    used = run.used_rows(thirty)  # what the reference needs, in the micro-batches of training
    assert used[:12] == sum((run.step_rows(step) for step in range(3)), [])
    assert sorted(sum(used, [])) == list(range(30))
    short = planned(thirty, max_steps=2)
    assert short.used_rows(thirty) == short.step_rows(0) + short.step_rows(1)
    assert planned(thirty, epochs=0.5, batch_size=2).total_steps == 7


@pytest.mark.parametrize("world, micro", [(1, 8), (1, 1), (2, 4), (2, 1), (4, 2), (8, 1)])
def test_processes_share_the_rows_of_a_step(world, micro, thirty):
    """Counts and means are those of the whole step, which a loss is divided by."""
    alone, seen = planned(thirty), {}
    for rank in range(world):
        run = planned(thirty, world, rank, micro_batch_size=micro)
        for step in run.steps(thirty):
            rows = [thirty[i] for i in sum(alone.step_rows(run.step), [])]
            assert (step.num_rows, sorted(step.rows)) == (
                8,
                sorted(sum(alone.step_rows(run.step), [])),
            )
            assert step.num_response_tokens == sum(row.tokens() - 2 for row in rows)
            for batch in step.micro_batches:
                assert batch.mean_length == sum(len(row.responses[0]) for row in rows) / 8
                assert batch.shape[0] == micro
                seen.setdefault(run.step, []).extend(batch.indexes)
            run.step += 1
    assert {at: sorted(rows) for at, rows in seen.items()} == {
        at: sorted(sum(alone.step_rows(at), [])) for at in range(9)
    }


def test_processes_get_similar_work(thirty):
    """Long rows are together, and in snake order no process gets the longer of every round."""
    run = planned(thirty, world=2, micro_batch_size=1)
    parts = run.step_rows(0)
    work = [sum(run.lengths[i] for i in sum(parts[rank::2], [])) for rank in range(2)]
    assert max(work) < 1.1 * sum(work) / 2
    lengths = [5, 9, 2, 9, 7, 1, 5]
    assert common.micro_batches(lengths, range(7), 3) == [[1, 3, 4], [0, 6, 2], [5]]
    assert common.micro_batches(lengths, [6, 3, 0, 1], 2) == [[3, 1], [6, 0]]  # ties: as given
