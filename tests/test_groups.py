"""RLOO and GRPO: their equations in plain floats, and whole runs on tiny models. What they share
with ppo.py to the letter (rewards, alarms, soups, what a run is refused for) is tested there.
"""

import json
import math
import random

import pytest
import torch
from conftest import ROOT, run_script
from safetensors.torch import load_file
from test_losses import F64, slopes
from test_ppo import (  # noqa: F401 (fixtures, used by their names)
    HOT,
    PPO,
    _as_in_a_fresh_process,
    json_lines,
    made,
    plain,
    start_of,
    values_of,
)
from test_ppo_pieces import GARBAGE, column, flat, inside, mask_of, random_rows, table
from test_train import (
    OWN,
    Broken,
    assert_same_log,
    assert_same_run,
    at_loss_call,
    break_down,
    checkpoints_in,
    farthest,
    steps_of,
    train,
)

import common
import grpo
import rloo

METHODS = {"rloo": rloo, "grpo": grpo}

# -- advantages


@pytest.mark.parametrize("samples", (2, 3, 4))
def test_leave_one_out_is_the_equation(samples):
    rng = random.Random(samples)
    rewards = [rng.gauss(1.0, 2.0) for _ in range(12)]
    expected = []
    for i, reward in enumerate(rewards):
        first = i // samples * samples
        others = [rewards[j] for j in range(first, first + samples) if j != i]
        expected.append(reward - math.fsum(others) / (samples - 1))
    found = rloo.leave_one_out(column(rewards), samples).tolist()
    assert found == pytest.approx(expected, rel=F64, abs=1e-13)
    # A constant a prompt changes nothing: a reward is known only up to that.
    shifted = [reward + 7.0 * (i // samples) for i, reward in enumerate(rewards)]
    again = rloo.leave_one_out(column(shifted), samples).tolist()
    assert again == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_leave_one_out_by_hand():
    """1, 2 and 6: less the means of (2, 6), (1, 6) and (1, 2)."""
    assert rloo.leave_one_out(column([1.0, 2.0, 6.0]), 3).tolist() == [-3.0, -1.5, 4.5]
    assert rloo.leave_one_out(column([1.0, 4.0, 5.0, 5.0]), 2).tolist() == [-3.0, 3.0, 0.0, 0.0]


def test_group_advantages_by_hand():
    """1, 2 and 6 have the mean 3 and the variance (4 + 1 + 9) / 2 = 7; 5, 5 and 5 have none."""
    scores = column([1.0, 2.0, 6.0, 5.0, 5.0, 5.0])
    for normalise in ("grpo", "dapo"):
        found, equal = grpo.group_advantages(scores, 3, normalise)
        scale = math.sqrt(7) + 1e-4
        expected = [-2 / scale, -1 / scale, 3 / scale, 0.0, 0.0, 0.0]
        assert found.tolist() == pytest.approx(expected, rel=F64)
        assert equal.tolist() == [False, True]
    found, equal = grpo.group_advantages(scores, 3, "dr-grpo")
    assert found.tolist() == [-2.0, -1.0, 3.0, 0.0, 0.0, 0.0] and equal.tolist() == [False, True]


def test_rounding_is_no_advantage():
    """Equal answers, scored in batches of other widths."""
    found, equal = grpo.group_advantages(column([3.0, 3.0 + 1e-7, 3.0, 3.0]), 4, "grpo")
    assert found.abs().max() < 1e-3 and equal.tolist() == [True]


def test_dr_grpo_is_leave_one_out_but_for_a_factor():
    scores = column([random.Random(i).gauss(0.0, 1.0) for i in range(12)])
    found, _ = grpo.group_advantages(scores, 4, "dr-grpo")
    torch.testing.assert_close(found, rloo.leave_one_out(scores, 4) * 3 / 4)


# -- what a token weighs

LENGTHS = torch.tensor([1, 4, 7, 3])


@pytest.mark.parametrize(
    "normalise, expected",
    [
        ("grpo", [1 / 4, 1 / 16, 1 / 28, 1 / 12]),  # 4 answers
        ("dapo", [1 / 15] * 4),  # 15 tokens
        ("dr-grpo", [1 / 40] * 4),  # 4 answers of at most 10 tokens
    ],
)
def test_token_weights(normalise, expected):
    found = grpo.token_weights(LENGTHS, normalise, 4, 15, 10)
    assert found.dtype == torch.float64 and found.tolist() == pytest.approx(expected, rel=F64)
    # Of a part of the update they are the same.
    assert torch.equal(grpo.token_weights(LENGTHS[1:3], normalise, 4, 15, 10), found[1:3])
    total = float((found * LENGTHS).sum())  # all answers, all tokens; and the mean length of 3.75
    assert total == pytest.approx({"grpo": 1.0, "dapo": 1.0, "dr-grpo": 0.375}[normalise])


# -- the losses


def moved(rows, seed: int, spread: float):
    rng = random.Random(seed)
    return [[x + rng.gauss(0.0, spread) for x in row] for row in rows]


def inputs(seed: int, spread: float):
    """Ratios on both sides of the clip, advantages of both signs; and a reference elsewhere."""
    old, rng = random_rows(seed, -3.0), random.Random(seed + 3)
    advantages = [rng.choice((-1, 1)) * rng.uniform(0.3, 2.0) for _ in old]
    return moved(old, seed + 1, spread), old, moved(old, seed + 2, 0.5), advantages


def clipped(A, ratio, low, high):
    """(loss, slope by the ratio's log, clipped?)"""
    free, bounded = -A * ratio, -A * min(max(ratio, 1 - low), 1 + high)
    return max(free, bounded), 0.0 if bounded > free else free, bounded > free


def mean_of(metric) -> float:
    values, weights = metric if isinstance(metric, tuple) else (metric, torch.ones_like(metric))
    return float(values.detach().double().sum() / weights.double().sum())


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("clip", (0.2, 0.5))
def test_rloo_is_the_equation(seed, clip):
    """One ratio an answer: its log is a sum over the tokens, all of which have the same slope."""
    new, old, _, advantages = inputs(10 * seed, 0.2)
    logps, before = table(new).requires_grad_(), table(old).requires_grad_()
    A = column(advantages).requires_grad_()
    losses, metrics = rloo.rloo_loss(logps, before, A, mask_of(new), clip)
    losses.sum().backward()
    assert before.grad is None and A.grad is None
    logs = [math.fsum(a) - math.fsum(b) for a, b in zip(new, old, strict=True)]
    parts = [clipped(a, math.exp(x), clip, clip) for a, x in zip(advantages, logs, strict=True)]
    assert losses.tolist() == pytest.approx([part[0] for part in parts], rel=1e-13)
    for found, part in zip(inside(logps.grad, new), parts, strict=True):
        assert found == pytest.approx([part[1]] * len(found), rel=1e-13)
    n = len(logs)
    assert mean_of(metrics["loss"]) == pytest.approx(math.fsum(p[0] for p in parts) / n)
    assert mean_of(metrics["policy/clipfrac"]) == pytest.approx(sum(p[2] for p in parts) / n)
    assert mean_of(metrics["val/ratio"]) == pytest.approx(sum(map(math.exp, logs)) / n)
    assert mean_of(metrics["policy/approxkl"]) == pytest.approx(sum(x * x for x in logs) / 2 / n)


def test_the_cases_of_rloo_meet_the_clip():
    """Both ways, or the test above says little."""
    found = [rloo.rloo_loss(table(a), table(b), column(d), mask_of(a), 0.2)[1]["policy/clipfrac"]
             for a, b, _, d in (inputs(10 * seed, 0.2) for seed in range(4))]  # fmt: skip
    assert 0 < torch.cat(found).sum() < 24


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_first_update_of_rloo_is_reinforce(dtype):
    """The gradient of -A log pi, to the last bit, however small the clip."""
    _, old, _, advantages = inputs(50, 0.0)
    A, gradients = column(advantages, dtype), []
    for loss in (
        lambda logps: rloo.rloo_loss(logps, table(old, dtype=dtype), A, mask_of(old), 1e-6)[0],
        lambda logps: -A * logps.sum(1),
    ):
        logps = table(old, dtype=dtype).requires_grad_()
        loss(logps).sum().backward()
        gradients.append(logps.grad.masked_fill(~mask_of(old), 0.0))
    assert torch.equal(*gradients)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(
    "kl_coef, low, high", ((0.0, 0.2, 0.2), (0.04, 0.2, 0.28), (0.5, 0.1, 0.6))
)
def test_grpo_is_the_equation(seed, kl_coef, low, high):
    """A ratio a token; k3 = exp(-d) - 1 + d has the slope 1 - exp(-d) in log pi."""
    new, old, ref, advantages = inputs(10 * seed + 100, 0.3)
    logps = table(new).requires_grad_()
    others = [table(old).requires_grad_(), table(ref).requires_grad_(), column(advantages)]
    losses, metrics = grpo.grpo_loss(logps, *others, mask_of(new), kl_coef, low, high)
    losses.sum().backward()
    assert others[0].grad is None and others[1].grad is None
    parts = []
    for a, *rows in zip(advantages, new, old, ref, strict=True):
        for x, y, z in zip(*rows, strict=True):
            k3, by_k3 = math.exp(z - x) - 1 + x - z, 1 - math.exp(z - x)
            loss, slope, over = clipped(a, math.exp(x - y), low, high)
            parts.append((loss + kl_coef * k3, slope + kl_coef * by_k3, loss, k3, over))
    whole, slope, policy, k3, over = zip(*parts, strict=True)
    assert flat(inside(losses, new)) == pytest.approx(whole, rel=1e-12, abs=1e-14)
    assert flat(inside(logps.grad, new)) == pytest.approx(slope, rel=1e-12, abs=1e-14)
    for name, expected in (("policy", policy), ("kl", k3)):
        mean = math.fsum(expected) / len(parts)
        assert mean_of(metrics[f"loss/{name}"]) == pytest.approx(mean, rel=1e-12)
    assert mean_of(metrics["policy/clipfrac"]) == pytest.approx(sum(over) / len(parts))
    assert 0 < sum(over) < len(parts)
    # Without a reference: no KL, and the rest.
    alone, metrics = grpo.grpo_loss(
        logps, others[0], None, others[2], mask_of(new), kl_coef, low, high
    )
    assert flat(inside(alone, new)) == pytest.approx(policy, rel=1e-12) and "loss/kl" not in metrics


def test_slopes_of_grpo_are_differences():
    """What is expected above, in plain floats, too."""
    for A, x in ((1.5, -2.9), (-1.5, -2.9), (1.5, -3.05), (-1.5, -3.05)):

        def equation(x, A=A):
            return clipped(A, math.exp(x + 3), 0.2, 0.28)[0] + 0.3 * (math.exp(-2.5 - x) + x + 1.5)

        slope = clipped(A, math.exp(x + 3), 0.2, 0.28)[1] + 0.3 * (1 - math.exp(-2.5 - x))
        assert slopes(equation, [x]) == pytest.approx([slope], rel=1e-7)


def test_the_higher_clip_is_for_what_becomes_likelier():
    """A ratio of 1.25 has gradient with DAPO's 0.28, none with 0.2; one of 0.75 is not helped."""
    for ratio, A, high, learns in (
        (1.25, 1.0, 0.2, False), (1.25, 1.0, 0.28, True), (0.75, -1.0, 0.28, False),
        (1.25, -1.0, 0.2, True), (0.75, 1.0, 0.2, True),
    ):  # fmt: skip
        logps = column([[math.log(ratio)]]).requires_grad_()
        zero, mask = torch.zeros(1, 1, dtype=torch.float64), torch.tensor([[True]])
        losses, _ = grpo.grpo_loss(logps, zero, None, column([A]), mask, 0.0, 0.2, high)
        losses.sum().backward()
        assert bool(logps.grad.any()) == learns


@pytest.mark.parametrize("fill", GARBAGE)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_beyond_the_end(dtype, fill):
    """Neither value nor gradient nor what is plotted."""
    new, old, ref, advantages = inputs(70, 0.3)
    A, mask = column(advantages, dtype), mask_of(new)

    def found(loss, *rows, fill):
        given = [table(x, (-1) ** i * fill, dtype).requires_grad_() for i, x in enumerate(rows)]
        losses, metrics = loss(*given)
        losses.sum().backward()
        assert losses.isfinite().all() and not given[0].grad.masked_fill(mask, 0.0).any()
        return losses, given[0].grad, *(torch.tensor(mean_of(x)) for x in metrics.values())

    for loss, rows in (
        (lambda a, b: rloo.rloo_loss(a, b, A, mask, 0.2), (new, old)),
        (lambda a, b, c: grpo.grpo_loss(a, b, c, A, mask, 0.1, 0.2, 0.28), (new, old, ref)),
    ):
        for a, b in zip(found(loss, *rows, fill=0.0), found(loss, *rows, fill=fill), strict=True):
            assert torch.equal(a, b)


# -- whole runs

FLAGS = {
    "samples": 2, "kl_coef": 0.1, "batch_epochs": 2, "minibatches": 1, "temperature": 1.0,
    "adam_eps": 1e-8, "max_grad_norm": 1.0, "max_length": 52, "batch_size": 4,
    "micro_batch_size": 4,
}  # fmt: skip
KNOBS = {"rloo": FLAGS, "grpo": FLAGS | {"normalise": "grpo", "clip_high": 0.28}}


def values_for(method: str, made, **flags) -> dict:  # noqa: F811
    values = values_of(made, **KNOBS[method] | flags)
    return {name: x for name, x in values.items() if name not in PPO or name in FLAGS}


@pytest.fixture
def run(made, start_of, plain, monkeypatch, _as_in_a_fresh_process):  # noqa: F811
    """run(method, folder, **flags) -> the exit status of a whole run in this process."""
    for method in METHODS:
        monkeypatch.setitem(OWN, method, {})

    def go(method: str, folder, model: str = "llama", **flags) -> int:
        values = values_for(method, made, **flags)
        return train(METHODS[method], start_of(model), values.pop("dataset"), folder, **values)

    return go


def seen_by(monkeypatch, method: str) -> list[tuple]:
    """What every micro-batch gives to the loss."""
    seen, loss = [], getattr(METHODS[method], f"{method}_loss")

    def wrapped(*given):
        seen.append(given)
        return loss(*given)

    monkeypatch.setattr(METHODS[method], f"{method}_loss", wrapped)
    return seen


@pytest.mark.parametrize(
    "method, architecture", [("rloo", "gemma2"), ("rloo", "gpt2"), ("grpo", "llama")]
)
def test_a_step(run, monkeypatch, method, architecture):
    """The ratio is 1 to the last bit in the first update, at another temperature than 1; groups
    have one prompt and answers that differ; and what is learned from is what rollouts.jsonl says.
    """
    seen = seen_by(monkeypatch, method)
    flags = {"samples": 4, "temperature": 0.7, "max_steps": 1}
    assert run(method, "out", architecture, **flags) == 0
    [step], lines = steps_of("out"), json_lines("out/rollouts.jsonl")
    assert len({line["prompt"] for line in lines}) == 1 < len({line["response"] for line in lines})
    assert len(lines) == METHODS[method].SHOWN == 4
    assert step["objective/kl"] == 0 and step["grad_norm"] > 0 and math.isfinite(step["loss"])
    assert len(seen) == 8  # two epochs of four micro-batches
    mask = 3 if method == "rloo" else 4
    same = [torch.equal(x[0][x[mask]], x[1][x[mask]]) for x in seen]
    assert same == [True] * 4 + [False] * 4
    scores = column([line["score"] for line in lines])
    expected = (
        rloo.leave_one_out(scores, 4) if method == "rloo"
        else grpo.group_advantages(scores, 4, "grpo")[0]
    )  # fmt: skip
    assert [line["advantage"] for line in lines] == pytest.approx(expected.tolist(), rel=1e-6)
    learned = torch.cat([x[mask - 1] for x in seen[:4]]).tolist()
    for line in lines:
        assert any(a == pytest.approx(line["advantage"], rel=1e-5, abs=1e-7) for a in learned)
    assert math.fsum(learned) == pytest.approx(0, abs=1e-4)


def test_without_kl_there_is_no_reference(run, start_of, monkeypatch):  # noqa: F811
    """Unless one is named: then it is measured, and moves nothing."""
    loaded, load = [], common.load_policy

    def keep(*args, **more):
        loaded.append(more.get("name") or args[-1])
        return load(*args, **more)

    monkeypatch.setattr(common, "load_policy", keep)
    flags = {"kl_coef": 0.0, "max_steps": 1, "batch_epochs": 1, "normalise": "dapo"}
    assert run("grpo", "without", **flags) == 0
    assert loaded == ["policy"] and "objective/kl" not in steps_of("without")[0]
    assert run("grpo", "named", ref_model=str(start_of("llama")), **flags) == 0
    assert steps_of("named")[0]["objective/kl"] == 0
    assert farthest("without/model.safetensors", "named/model.safetensors") == 0


@pytest.mark.parametrize("method", METHODS)
def test_one_sample_is_refused(run, method):
    with pytest.raises(common.UserError, match="--samples must be 2 or more, got 1"):
        run(method, "out", samples=1)


def test_published_rows_have_no_dataset_of_grpo(run):
    with pytest.raises(common.UserError, match="--dataset is needed"):
        grpo.main(grpo.Args(model="deepseek-math-7b-instruct", reward="family"))


# -- the same steps for any split over micro-batches and processes

CASES = {
    "rloo": {},
    "rloo, minibatches": {"minibatches": 2, "max_grad_norm": 0.0, "clip_range": 0.5},
    "grpo": {},
    "grpo, dapo": {"normalise": "dapo", "minibatches": 2, "max_grad_norm": 0.0},
    "grpo, dr-grpo": {"normalise": "dr-grpo", "kl_coef": 0.0},
}


def trained(folder, step: int = 3):
    return f"{folder}/checkpoint-{step}/policy.safetensors"


def assert_same_steps(one, other) -> None:
    assert farthest(trained(one), trained(other)) < 1e-9
    assert_same_log(one, other)
    texts = [[line["response"] for line in json_lines(f"{f}/rollouts.jsonl")] for f in (one, other)]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("case", CASES)
def test_same_steps_with_other_micro_batches(run, start_of, case):  # noqa: F811
    method, flags = case.split(",")[0], HOT | CASES[case]
    for size in (4 // flags.get("minibatches", 1), 1):
        assert run(method, f"of-{size}", **flags | {"micro_batch_size": size}) == 0
    whole = f"of-{4 // flags.get('minibatches', 1)}"
    assert_same_steps(whole, "of-1")
    begun, ended = load_file(start_of("llama") / "model.safetensors"), load_file(trained(whole))
    assert max((begun[n] - ended[n]).abs().max().item() for n in begun) > 0.01  # hot
    assert any(0 < step["policy/clipfrac"] < 1 for step in steps_of(whole))


SEVERAL = """
import json, sys
sys.path.insert(0, {root!r})
import torch.distributed as dist
import common, grpo, rloo
dist.destroy_process_group = lambda: None  # one group for all of these runs
beside = common.beside
common.beside = lambda name: None if name == "report" else beside(name)
for method, values in json.load(open(sys.argv[1])):
    module = dict(grpo=grpo, rloo=rloo)[method]
    module.main(module.Args(**values))
"""


@pytest.mark.slow
def test_same_steps_with_two_processes(run, made, start_of, tmp_path):  # noqa: F811
    """And with weights that are spread over them."""
    runs = []
    named = CASES | {"rloo, fsdp": {"fsdp": True}, "grpo, fsdp": {"fsdp": True}}
    for case, flags in named.items():
        values = values_for(case.split(",")[0], made, **HOT | {"micro_batch_size": 1} | flags)
        values |= {"model": str(start_of("llama")), "output_dir": str(tmp_path / f"two {case}")}
        runs.append([case.split(",")[0], values | {"cache_dir": str(tmp_path / "cache")}])
    (tmp_path / "several.py").write_text(SEVERAL.format(root=str(ROOT)))
    (tmp_path / "runs.json").write_text(json.dumps(runs))
    status, _, err = run_script(
        "several.py", str(tmp_path / "runs.json"), processes=2, cwd=tmp_path
    )
    assert status == 0, err
    for case, flags in CASES.items():
        method = case.split(",")[0]
        size = 4 // flags.get("minibatches", 1)
        assert run(method, f"one {case}", **HOT | flags | {"micro_batch_size": size}) == 0
        assert_same_steps(f"one {case}", tmp_path / f"two {case}")
    for method in METHODS:
        assert_same_steps(f"one {method}", tmp_path / f"two {method}, fsdp")


# -- stopped and started again


@pytest.mark.parametrize("method", METHODS)
def test_run_that_broke_goes_on_to_the_same_end(run, monkeypatch, method):
    flags = {"max_steps": 3, "save_every": 1, "minibatches": 2, "micro_batch_size": 2}
    flags |= {"eval_every": 0, "batch_epochs": 1}
    assert run(method, "whole", **flags) == 0
    with monkeypatch.context() as patch:  # in the second minibatch of step 3: 4 micro-batches each
        at_loss_call(patch, METHODS[method], 2 * 4 + 3, break_down)
        with pytest.raises(Broken):
            run(method, "out", **flags)
    assert checkpoints_in("out") == [2]
    assert run(method, "out", **flags) == 0
    assert_same_run("whole", "out")
    for file in ("rollouts.jsonl", "checkpoint-3/policy.safetensors"):
        assert open(f"whole/{file}", "rb").read() == open(f"out/{file}", "rb").read()
