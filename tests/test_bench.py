"""The benchmarks run, what they compare is the same work, and what they count is right."""

import io
import math
import platform
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from conftest import run_script

import bench
import common
from benchmarking import heads
from benchmarking import runs as bench_runs
from benchmarking.measure import Peak, Report, Watch, ratios, shown
from kernels import bench as head_bench

LINUX = platform.system() == "Linux"


@pytest.fixture(autouse=True)
def _as_quiet_as_before():
    before = transformers.logging.get_verbosity()
    yield
    transformers.logging.set_verbosity(before)
    transformers.logging.enable_progress_bar()


# -- measure.py


def test_a_ratio_is_of_two_times_of_one_round():
    # The machine was twice as slow in the second round: the ratios do not see it.
    ours, theirs = [1.0, 2.0, 1.0], [3.0, 6.0, 4.0]
    assert ratios(theirs, ours) == (3.0, 3.0, 4.0)
    assert shown(theirs, ours) == "3.00 (3.00-4.00)"
    with pytest.raises(ValueError):
        ratios(theirs, ours[:2])


def test_a_table_is_aligned_and_kept(tmp_path, capsys):
    report = Report(str(tmp_path / "kept.md"))
    report.table(["", "s"], [["ours", "1.5"], ["theirs", "12"]])
    report.weak.append("there")
    report.close()
    printed = capsys.readouterr().out
    assert printed == (tmp_path / "kept.md").read_text()
    assert printed.splitlines()[:4] == [
        "|        |   s |",
        "| ------ | --: |",
        "| ours   | 1.5 |",
        "| theirs |  12 |",
    ]
    assert printed.endswith("- there\n")


@pytest.mark.skipif(not LINUX, reason="reads /proc")
def test_peak_sees_what_was_freed_again():
    with Peak("cpu") as peak:
        torch.ones(16, 2**20)  # 67 MB
    assert 60 < peak.mb < 90
    with Peak("cpu") as peak:
        pass
    assert peak.mb < 10


def test_watch_times_neither_the_first_nor_the_last_step(monkeypatch):
    clock = iter([0, 100, 200, 202, 300, 303, 400, 500])
    watch = Watch(3, "cpu")
    monkeypatch.setattr(watch, "now", lambda: next(clock), raising=False)
    for _ in range(4):
        watch.begin()
        watch.end()
    assert watch.seconds == [2, 3]
    assert watch.peak.mb < 10 or not LINUX


# -- the head


@pytest.mark.parametrize("name", ["toy", "toy-capped"])
def test_truth_is_what_autograd_says_in_float64(name):
    (p,) = heads.make_problems(name, (4, 9, 3), "float32", "cpu", n=1)
    truth = heads.truth_of(p, step=300)  # 1,000 are not a multiple
    hidden, weight = (x.detach().double().requires_grad_() for x in (p.hidden, p.weight))
    logits = hidden[:, -4:-1] @ weight.T  # (4, 3, V): before the last three tokens
    if p.softcap:
        logits = p.softcap * torch.tanh(logits / p.softcap)
    logps = logits.log_softmax(-1).gather(-1, p.ids[:, -3:, None])[..., 0].sum(-1)
    margins = heads.BETA * (logps[:2] - logps[2:])
    (-torch.log(torch.sigmoid(margins))).mean().backward()
    torch.testing.assert_close(truth.logps, logps.detach())
    torch.testing.assert_close(truth.hidden_grad, hidden.grad[:, -4:-1].flatten(0, 1))
    torch.testing.assert_close(truth.weight_grad, weight.grad[truth.rows])
    assert set(p.targets.tolist()) <= set(truth.rows.tolist())


def test_a_centre_moves_all_logits():
    (p,) = heads.make_problems("toy", (2, 9, 3), "bfloat16", "cpu", centre=-60.0, n=1)
    logits = p.hidden.detach().double() @ p.weight.detach().double().T
    assert float(logits.mean()) == pytest.approx(-60, abs=0.5) and 2 < float(logits.std()) < 4


@pytest.mark.parametrize("name", ["toy", "toy-capped"])
def test_all_heads_give_the_true_gradient(name):
    (p,) = heads.make_problems(name, (4, 24, 8), "float32", "cpu", n=1)
    runs, absent = heads.contestants("cpu", p.softcap)
    ours = {"ours", "ours, keep_bytes=0", "ours, gather_log_softmax"}
    trl = {"TRL as in DPOTrainer", "TRL, packed, log-probs only"}
    assert runs.keys() >= ours | trl | {"packed logits", "all logits"}
    names, left_out = set(runs), []
    wrong = head_bench.against_truth(runs, p, "float32", left_out)
    assert set(wrong) == set(runs) == names and not left_out
    for who, (logps, hidden, weight) in wrong.items():
        assert logps < 1e-4 and max(hidden, weight) < 1e-5, who


def test_a_head_that_fails_or_is_wrong_is_not_timed():
    (p,) = heads.make_problems("toy", (4, 24, 8), "float32", "cpu", n=1)
    right = heads.contestants("cpu", None)[0]["packed logits"]

    def fails(p):
        raise RuntimeError("no such device")

    def wrong(p):
        loss, logps = right(p)
        return 1.1 * loss, logps

    runs, absent = {"right": right, "fails": fails, "wrong": wrong}, []
    head_bench.against_truth(runs, p, "float32", absent)
    assert list(runs) == ["right"]
    assert "no such device" in absent[0] and "not the truth" in absent[1]
    with pytest.raises(SystemExit):
        head_bench.against_truth({"ours": wrong}, p, "float32", [])


def test_sizes_for_a_number_of_tokens():
    for tokens in head_bench.TOKENS:
        many, length, response = head_bench.size_of(tokens)
        assert many % 2 == 0 and many * response == tokens and length == response + 1
    assert head_bench.size_of(8192) == (32, 257, 256)


def test_the_bench_of_the_head_prints_its_tables(tmp_path, capsys):
    file = tmp_path / "head.md"
    options = head_bench.Options(
        shapes=("toy", "toy-capped"), rounds=2, device="cpu", markdown=str(file)
    )
    head_bench.main(options)
    out = capsys.readouterr().out
    assert out == file.read_text()
    assert out.count("| TRL as in DPOTrainer ") == 2 and "commit " in out and " threads" in out
    row = next(x for x in out.splitlines() if x.startswith("| ours "))
    assert "1.00 (1.00-1.00)" in row
    assert "toy in bf16" in out and "logits around -110" in out
    assert "Where ours is not ahead:" in out


def test_the_bench_of_the_head_starts_as_a_script():
    status, out, err = run_script(
        "kernels/bench.py", "--shapes", "toy", "--tokens", 16, "--rounds", 1
    )
    assert status == 0, err[-2000:]
    assert "16 tokens scored" in out and "| all logits" not in out


# -- whole steps


def test_rows_have_the_medians_of_their_profile():
    rows = bench_runs.make_rows("tldr", 21, 3, 500).rows
    assert np.median([len(row.prompt) for row in rows]) == 360
    assert np.median([len(y) for row in rows for y in row.responses]) == 38
    assert {len(row.responses) for row in rows} == {3}
    for row in rows:
        assert all(y[-1] == 2 and 2 not in y[:-1] for y in row.responses)
        assert min(row.prompt) >= 3 and max(row.prompt) < 500
    again = bench_runs.make_rows("tldr", 21, 3, 500)
    assert again.digest() == common.Rows("", rows).digest()


def test_list_losses_of_a_pair_are_dpos():
    logps, ref_logps = torch.randn(2, 5, 2, dtype=torch.float64, generator=torch.Generator())
    pair = bench_runs.pair_losses(logps, ref_logps)
    torch.testing.assert_close(bench_runs.list_losses(logps, ref_logps), pair)
    equal = torch.zeros(1, 4)  # 4! orders, all as likely
    assert float(bench_runs.list_losses(equal, equal)) == pytest.approx(math.log(24), abs=1e-6)


def test_useful_flops_by_hand():
    config = transformers.AutoConfig.for_model(**bench_runs.MODELS["toy"])
    policy = transformers.AutoModelForCausalLM.from_config(config)
    ids = lambda n: np.zeros(n, np.int32)  # noqa: E731
    rows = common.Rows("", [common.Row(ids(3), [ids(2), ids(1)], ids(3))])
    # Two layers: four 32 x 32, three 32 x 64 and two norms; one more norm. Six tokens, the prompt's
    # once. In the prompt 1 + 2 + 3 are seen, in the responses 4 + 5 and 4. V is 500.
    body = 2 * (4 * 32 * 32 + 3 * 32 * 64 + 2 * 32) + 32
    forward = 2 * body * 6 + 2 * 500 * 32 * 3 + 4 * 32 * 2 * (6 + 9 + 4)
    assert bench_runs.useful_flops(policy, rows) == 4 * forward


def bench_steps(only: str, tmp_path: Path, **more) -> str:
    out = io.StringIO()
    options = bench.Options(
        profiles=("family",), model="toy", rounds=1, steps=1, pairs=2, device="cpu", only=only,
        markdown=str(tmp_path / "step.md"), **more,
    )  # fmt: skip
    with redirect_stdout(out), redirect_stderr(io.StringIO()):
        bench.main(options)
    assert out.getvalue() == (tmp_path / "step.md").read_text()
    return out.getvalue()


@pytest.mark.filterwarnings("ignore::FutureWarning")  # names of TRL's that Transformers will drop
def test_a_step_of_ours_against_a_step_of_trl(tmp_path):
    out = bench_steps("trl", tmp_path)
    losses = [x.split(": ")[1].split() for x in out.splitlines() if x.startswith("- losses of")]
    assert len(losses) == 2 and len(losses[0]) == len(losses[1]) == 3
    assert losses[0][0] == losses[1][0] == "0.693147" != losses[0][2]
    ours, trl = (x.split("|") for x in out.splitlines() if x.startswith(("| ours ", "| TRL ")))
    assert float(trl[7]) > float(ours[7])  # held: a reference model
    again = [float(x[10].strip(" %")) for x in (ours, trl)]  # prompts that go through again
    assert again[0] <= again[1] > 0


def test_the_switches_and_ranked_lists_of_ours(tmp_path):
    out = bench_steps("switches", tmp_path)
    for prompt in ("shared", "each its own"):
        assert f"| {prompt} prompt, fused head " in out and f"| {prompt} prompt, plain head " in out
    out = bench_steps("ranked", tmp_path)
    assert "ranked lists of 4" in out and "ranked lists of 8" in out


def test_without_trl_the_line_to_install_it_is_named(tmp_path, monkeypatch):
    def missing(name):
        raise ImportError("No module named 'trl'")

    monkeypatch.setattr(bench_runs, "import_module", missing)
    with pytest.raises(common.UserError, match="pip install 'trl"):
        bench_steps("trl", tmp_path)


def test_other_work_is_not_compared(tmp_path, monkeypatch):
    plain = bench_runs.run_ours

    def other(*given):
        steps = plain(*given)
        if len(given) > 4 and not given[4]:  # without sharing
            steps.losses[-1] += 0.01
        return steps

    monkeypatch.setattr(bench, "run_ours", other)
    with pytest.raises(SystemExit, match="not the same work"):
        bench_steps("switches", tmp_path)
