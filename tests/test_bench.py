"""The benchmarks compare the same work, and measure what they say."""

import platform
import statistics

import pytest
import torch
import transformers

from benchmarks import head, measure, steps


@pytest.fixture(autouse=True)
def restore_transformers_logging():
    before = transformers.logging.get_verbosity()
    yield
    transformers.logging.set_verbosity(before)
    transformers.logging.enable_progress_bar()


def test_a_ratio_is_of_two_numbers_of_one_round():
    # In the second round the machine was twice as slow: the ratios do not see it.
    assert measure.ratio([3.0, 6.0, 4.0], [1.0, 2.0, 1.0]) == "3.00 (3.00-4.00)"


@pytest.mark.skipif(platform.system() != "Linux", reason="reads /proc")
def test_peak_sees_what_was_freed_again():
    peak = measure.Peak("cpu")
    torch.ones(16, 2**20)  # 67 MB
    assert 60 < peak.rise() < 90
    assert measure.Peak("cpu").rise() < 10


def test_rows_have_the_medians_of_their_profile():
    rows = steps.make_rows("tldr", 21, 3, vocab=500)
    assert statistics.median(len(row.prompt) for row in rows) == 360
    assert statistics.median(len(y) for row in rows for y in row.responses) == 38
    assert all(y[-1] == 2 and 2 not in y[:-1] for row in rows for y in row.responses)


def test_list_losses_of_a_pair_are_dpos():
    logps, ref_logps = torch.randn(2, 5, 2, dtype=torch.float64)
    expected = steps.pair_losses(logps, ref_logps)
    torch.testing.assert_close(steps.list_losses(logps, ref_logps), expected)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("part", ["trl", "pairs", "ranked"])
def test_steps(part, capsys):
    small = {"profiles": ("family",), "model": "toy", "rounds": 1, "steps": 1, "pairs": 2}
    steps.main(steps.Args(part=part, device="cpu", **small))
    out = capsys.readouterr().out
    assert " cores, " in out and "commit " in out
    tables = {"trl": ["ours", "TRL"]}.get(part, ["ours", "--no-share-prompt", "--no-fused-logps"])
    names = [line.split("|")[1].strip() for line in out.splitlines() if line.startswith("| ")]
    names = [name for name in names if name not in ("", "---")]
    assert names == tables * (2 if part == "ranked" else 1)


def test_other_work_is_not_compared(monkeypatch):
    made = {
        name: steps.Steps("cpu", 2, [1.0] * 3, [0.69, x, 0.6])
        for name, x in (("ours", 0.6), ("TRL", 0.61))
    }
    with pytest.raises(SystemExit, match="not the same work"):
        args = steps.Args(rounds=1, dtype="float32")
        steps.compare({name: lambda name=name: made[name] for name in made}, args)


def test_head(capsys, monkeypatch):
    small = {"shapes": ("toy",), "responses": 4, "length": 24, "answer": 8, "rounds": 1}
    head.main(head.Args(device="cpu", **small))
    out = capsys.readouterr().out
    for name in ("ours", "packed_logits", "all_logits", "trl"):
        assert f"| {name} | " in out
    monkeypatch.setattr(head, "ours", lambda p: 1.1 * head.packed_logits(p))
    with pytest.raises(SystemExit, match="is wrong"):
        head.main(head.Args(device="cpu", **small))
