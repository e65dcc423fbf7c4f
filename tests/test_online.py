"""Whole runs of ppo.py, nlpo.py, rloo.py, grpo.py and raft.py on tiny models."""

import json
import math
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import online
import pytest
import torch
from conftest import ROOT, all_float64, run_script
from online import METHODS, json_lines, letters, moved_copy, steps_of, train
from safetensors.torch import load_file, save_file

import common
import grpo
from sampling import rollouts
from sampling.generate import text_of
from sampling.rollouts import Online, Rollout

made, start_of, reward_model = online.made, online.start_of, online.reward_model  # fixtures
LOSSES = {name: f"{name}_loss" for name in METHODS}


@pytest.fixture
def run(made, start_of, tmp_path, monkeypatch):
    """run(method, folder, **flags) -> the exit status of a run in this process."""
    monkeypatch.chdir(tmp_path)

    def go(method: str, folder: str, model: str = "llama", **flags) -> int:
        return train(method, made, start_of(model), folder, **flags)

    return go


@pytest.fixture
def seen(monkeypatch) -> list[Rollout]:
    """The rollout of each step."""
    found, watch = [], Online.watch
    monkeypatch.setattr(
        Online, "watch", lambda self, x, **more: (found.append(x), watch(self, x, **more))
    )
    return found


def losses_of(monkeypatch, method: str) -> list[tuple]:
    """What every micro-batch passes to the loss."""
    given, module = [], METHODS[method]
    loss = getattr(module, LOSSES[method])

    def wrapped(*args):
        given.append(args)
        return loss(*args)

    monkeypatch.setattr(module, LOSSES[method], wrapped)
    return given


def trained(folder: str | Path, step: int = 3) -> Path:
    return Path(folder) / f"checkpoint-{step}" / "state.safetensors"


def farthest(one: Path, other: Path) -> float:
    """The largest difference between any two weights."""
    a, b = load_file(one), load_file(other)
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


def plain_logps(model, row: common.Row, temperature: float) -> list[float]:
    """Of every response token, by plain Transformers."""
    prompt, response = (torch.from_numpy(x).long() for x in (row.prompt, row.responses[0]))
    logits = model(torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1]
    logps = (logits / temperature).log_softmax(-1).gather(1, response[:, None])
    return logps[:, 0].tolist()


# -- two steps, and what they leave


@pytest.mark.parametrize(
    "method, architecture",
    [("ppo", "gemma2"), ("nlpo", "qwen2"), ("rloo", "gpt2"), ("grpo", "llama"), ("raft", "llama")],
)
def test_two_steps(run, made, start_of, method, architecture):
    flags = {"max_steps": 2, "gold_reward": f"{made / 'judge.py'}:length"}
    assert run(method, "out", architecture, **flags) == 0
    steps = steps_of("out")
    assert [step["step"] for step in steps] == [1, 2]
    assert all(math.isfinite(x) for step in steps for x in step.values())
    assert all(step["grad_norm"] > 0 and step["objective/scores"] > -1 for step in steps)
    evaluations = [x for x in json_lines("out/metrics.jsonl") if "eval/objective/scores" in x]
    assert [line["step"] for line in evaluations] == [0, 2]
    assert all(line["eval/objective/gold"] > 1 for line in evaluations)
    after = load_file("out/model.safetensors")
    before = load_file(start_of(architecture) / "model.safetensors")
    assert [name for name in before if torch.equal(before[name], after[name])] == []
    assert json.loads(Path("out/config.json").read_text())["plainpref"]["history"] == [method]
    lines = json_lines("out/rollouts.jsonl")
    assert [line["step"] for line in lines] == [1] * rollouts.SHOWN + [2] * rollouts.SHOWN
    for line in lines:
        if method == "raft":
            assert line["best_score"] == pytest.approx(letters(line["best"]))
        else:
            expected = letters(line["response"]) if line["ended"] else -1
            assert line["score"] == pytest.approx(expected)


def test_gold_only_measures_and_can_be_turned_off(run, made):
    gold = f"{made / 'judge.py'}:length"
    for name, reward in (("with", gold), ("none", "none"), ("without", None)):
        assert run("grpo", name, gold_reward=reward, max_steps=1) == 0
        assert farthest("with/model.safetensors", f"{name}/model.safetensors") == 0
        logged = any("eval/objective/gold" in line for line in json_lines(f"{name}/metrics.jsonl"))
        assert logged == (name == "with")


# -- what the first update starts from


@pytest.mark.parametrize(
    "method, architecture, flags",
    [
        ("ppo", "llama", {"minibatches": 2, "micro_batch_size": 2}),
        ("ppo", "gemma2", {"minibatches": 2}),
        ("rloo", "gpt2", {"micro_batch_size": 2}),
        ("grpo", "llama", {"micro_batch_size": 2, "samples": 4}),
    ],
)
def test_ratio_is_1_and_kl_is_0(run, start_of, seen, monkeypatch, method, architecture, flags):
    """To the last bit, at another temperature than 1; log-probs are those of Transformers."""
    from transformers import AutoModelForCausalLM

    given = losses_of(monkeypatch, method)
    assert run(method, "out", architecture, max_steps=1, temperature=0.7, **flags) == 0
    [rollout], [step] = seen, steps_of("out")
    assert torch.equal(rollout.logps, rollout.ref_logps) and step["objective/kl"] == 0
    first = len(rollout.rows) // flags.get("minibatches", 1) // flags.get("micro_batch_size", 4)
    masks = [next(x for x in args if x is not None and x.dtype == torch.bool) for args in given]
    same = [torch.equal(x[0][mask], x[1][mask]) for x, mask in zip(given, masks, strict=True)]
    assert same == [True] * first + [False] * (len(given) - first) and len(given) > first
    model = AutoModelForCausalLM.from_pretrained(start_of(architecture))
    with torch.no_grad():
        for logps, row in zip(rollout.logps, rollout.rows, strict=True):
            expected = plain_logps(model, row, 0.7)
            assert logps[: len(expected)].tolist() == pytest.approx(expected, abs=1e-4)
            assert not logps[len(expected) :].any()
    if method != "ppo":  # groups have one prompt; advantages are those of rollouts.jsonl
        samples = flags.get("samples", 2)
        shown = json_lines("out/rollouts.jsonl")[:samples]
        assert len({line["prompt"] for line in shown}) == 1
        assert math.fsum(line["advantage"] for line in shown) == pytest.approx(0, abs=1e-9)
        learned = torch.cat([args[2 if method == "rloo" else 3] for args in given[:first]])
        for line in shown:
            assert (learned - line["advantage"]).abs().min() < 1e-6


def test_a_forgotten_temperature_is_reported(run, monkeypatch, capsys):
    """Ratios that are not 1 before the first update get a warning."""
    forward = common.Policy.forward

    def forgetful(self, batch, temperature=1.0):
        return forward(self, batch, 1.0 if torch.is_grad_enabled() else temperature)

    monkeypatch.setattr(common.Policy, "forward", forgetful)
    assert run("rloo", "out", temperature=0.7, max_steps=1) == 0
    assert "off 1 before any update" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [{}, {"lora_rank": 4}], ids=["all weights", "adapters"])
def test_low_precision(run, monkeypatch, flags):
    """Ratios and the KL start where they should, but for rounding."""
    given = losses_of(monkeypatch, "ppo")
    assert run("ppo", "out", "gemma2", dtype="bfloat16", max_steps=1, **flags) == 0
    for logps, old_logps, *rest in given[: len(given) // 2]:
        assert (logps.detach() - old_logps)[rest[4]].exp().sub(1).abs().max() < 0.01
    assert abs(steps_of("out")[0]["objective/kl"]) < 0.05
    assert {w.dtype for w in load_file(trained("out", 1)).values()} == {torch.float32}


# -- from what was sampled to what is learned


@pytest.mark.parametrize("k3", [False, True])
def test_what_ppo_learns(run, start_of, seen, monkeypatch, tmp_path, k3):
    """The loss gets every token's numbers, as the tested pieces make them of the rollout."""
    ppo, given = METHODS["ppo"], losses_of(monkeypatch, "ppo")
    other = moved_copy(start_of("llama"), tmp_path / "other", 0.05)
    flags = {"clip_range": 0.15, "value_clip_range": 0.25, "value_weight": 0.35, "kl_coef": 0.3}
    flags |= {"ref_model": str(other), "dtype": "float64", "max_steps": 2, "ppo_epochs": 1}
    more = {"kl_estimator": "k3", "whiten_rewards": True, "gamma": 0.9, "gae_lambda": 0.7}
    assert run("ppo", "out", **flags | (more if k3 else {})) == 0
    assert len(given) == 4 and {args[7:] for args in given} == {(0.15, 0.25, 0.35)}
    for step, rollout in enumerate(seen):
        assert float((rollout.logps - rollout.ref_logps).abs().max()) > 0.1
        assert rollout.values.any() == (step > 0)  # the head starts at 0
        of, mask = (rollout.logps, rollout.ref_logps, rollout.scores), rollout.mask
        rewards = ppo.token_rewards(*of, mask, 0.3, "k3" if k3 else "k1")
        rewards = ppo.whiten(rewards, mask, shift_mean=False) if k3 else rewards
        knobs = (0.9, 0.7) if k3 else (1.0, 0.95)
        advantages, returns = ppo.advantages_of(rewards, rollout.values, mask, *knobs)
        advantages = ppo.whiten(advantages, mask)
        expected = (rollout.logps, advantages, rollout.values, rollout.values, returns)
        rows = []
        for args in given[2 * step : 2 * step + 2]:
            for i, there in enumerate(args[6]):
                rows.append([x[i][there].tolist() for x in args[1:6]])
        wanted = [[x[i][mask[i]].tolist() for x in expected] for i in range(len(mask))]
        for row, numbers in zip(sorted(rows), sorted(wanted), strict=True):
            for a, b in zip(row, numbers, strict=True):
                assert a == pytest.approx(b, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("missing_eos", ["replace", "subtract", "keep"])
def test_responses_without_an_end(run, start_of, seen, missing_eos):
    tokenizer = common.load_tokenizer(str(start_of("llama")), 64)
    flags = {"missing_eos": missing_eos, "missing_eos_value": 2.5, "max_steps": 1}
    assert run("rloo", "out", batch_size=8, **flags) == 0
    assert {True, False} == set(seen[0].ended.tolist())
    for i, (response, score) in enumerate(zip(seen[0].responses, seen[0].scores, strict=True)):
        ended = bool(seen[0].ended[i])
        assert ended == (int(response[-1]) in tokenizer.stop_ids)
        assert ended or len(response) == 12
        own = letters(text_of(response, tokenizer))
        without = {"replace": -2.5, "subtract": own - 2.5, "keep": own}[missing_eos]
        assert float(score) == pytest.approx(own if ended else without)


def test_values_start_at_the_reward_model(run, reward_model, start_of, seen):
    from transformers import AutoModelForSequenceClassification

    assert run("ppo", "out", reward=str(reward_model), max_steps=1) == 0
    model = AutoModelForSequenceClassification.from_pretrained(reward_model)
    for i, row in enumerate(seen[0].rows):
        ids, n = (
            torch.from_numpy(np.concatenate([row.prompt, *row.responses])),
            len(row.responses[0]),
        )
        with torch.no_grad():
            heads = model.score(model.model(ids[None].long()).last_hidden_state)[0, :, 0] - 0.7
        score = heads[-1] if seen[0].ended[i] else -1.0
        assert float(seen[0].scores[i]) == pytest.approx(float(score), abs=1e-5)
        found, expected = seen[0].values[i, :n].tolist(), heads[-n - 1 : -1].tolist()
        assert found == pytest.approx(expected, abs=1e-5)
    start = str(start_of("llama"))  # a language model has no head: its values are 0
    assert run("ppo", "zeros", reward=str(reward_model), value_model=start, max_steps=1) == 0
    assert not seen[1].values.any()


def test_raft_learns_the_best(run, start_of, seen, monkeypatch):
    """With room for two tokens most responses are cut: none of them gets an end. With --kl-coef,
    what the policy has come to like ranks lower.
    """
    stop_ids = common.load_tokenizer(str(start_of("llama")), 64).stop_ids
    stages, learned, show, collate = [], [], METHODS["raft"].show_stage, Online.collate

    def watch(run, rollout, metrics, best, tokenizer):
        stages.append((rollout, metrics, best))
        show(run, rollout, metrics, best, tokenizer)

    monkeypatch.setattr(METHODS["raft"], "show_stage", watch)
    monkeypatch.setattr(
        Online,
        "collate",
        lambda *args: (learned if len(args) == 3 else []).append(made := collate(*args)) or made,
    )
    for flags in ({"max_length": 42, "max_steps": 1}, {"kl_coef": 1.0, "lr": 1e-2, "max_steps": 2}):
        learned.clear()
        assert run("raft", f"with {len(flags)}", **flags) == 0
        expected = []
        for rollout, metrics, best in stages[-flags["max_steps"] :]:
            kl = metrics.get("objective/kl", torch.zeros(32))
            ranked = (rollout.scores - flags.get("kl_coef", 0.0) * kl).tolist()
            for i, k in enumerate(best.tolist()):
                own = range(4 * i, 4 * i + 4)
                among = [j for j in own if rollout.ended[j]] or own
                assert 4 * i + k == max(among, key=lambda j: (ranked[j], -j))
                expected += 2 * [tuple(rollout.responses[4 * i + k].tolist())]  # two epochs
        targets = [t for b in learned for t in b.targets.split(b.lengths[:, 0].tolist())]
        assert sorted(tuple(t.tolist()) for t in targets) == sorted(expected)
        if "max_length" in flags:
            cut = [t for t in targets if int(t[-1]) not in stop_ids]
            assert 0 < len(cut) < len(targets) and all(len(t) == 2 for t in cut)
    kls = [float(metrics["objective/kl"].abs().max()) for _, metrics, _ in stages[1:]]
    assert kls[0] == 0 and kls[1] > 0.1


# -- references


def test_soups(run, start_of, tmp_path):
    """A soup of equal parents is the plain run; one of two lies between them."""
    start = start_of("llama")
    other, kls = moved_copy(start, tmp_path / "other", 0.3), []
    for folder, soup in (("plain", None), ("soup", f"{start}+{start}")):
        assert run("ppo", folder, ref_model=soup, max_steps=2) == 0
        assert farthest("plain/model.safetensors", f"{folder}/model.safetensors") == 0
    for weight in (0.5, 0.9):  # the policy is the first parent
        flags = {"ref_model": f"{start}+{other}", "soup_weight": weight, "batch_size": 32}
        assert run("ppo", f"of-{weight}", max_steps=1, **flags) == 0
        kls.append(steps_of(f"of-{weight}")[0]["objective/kl"])
    assert kls[0] > 2 and 0.1 < kls[1] < kls[0] - 1


@pytest.mark.parametrize("method", ["grpo", "raft"])
def test_without_kl_there_is_no_reference(run, monkeypatch, method):
    loaded, load = [], common.load_policy
    monkeypatch.setattr(
        common, "load_policy", lambda *a, **more: (loaded.append(more["name"]), load(*a, **more))[1]
    )
    assert run(method, "without", kl_coef=0.0, max_steps=1) == 0
    assert loaded == ["policy"] and "objective/kl" not in steps_of("without")[0]
    # With adapters the reference is the policy without them.
    assert run(method, "adapters", kl_coef=0.1, max_steps=2, lora_rank=4, lr=1e-2) == 0
    assert loaded == ["policy"] * 2 and Path("adapters/adapter/adapter_model.safetensors").is_file()
    first, second = steps_of("adapters")
    assert first["objective/kl"] == 0 != second["objective/kl"]


# -- the same steps for any split over micro-batches and processes

CASES = {
    "ppo": {},
    "ppo, minibatches": {
        "minibatches": 2, "whiten_rewards": True, "kl_target": 0.5, "kl_horizon": 30,
        "kl_estimator": "k3", "max_grad_norm": 0.0,
    },
    "nlpo": {},
    "rloo": {"minibatches": 2, "max_grad_norm": 0.0, "clip_range": 0.5},
    "grpo": {},
    "grpo, dapo": {"normalise": "dapo", "minibatches": 2, "max_grad_norm": 0.0},
    "grpo, dr-grpo": {"normalise": "dr-grpo", "kl_coef": 0.0},
    "raft": {"kl_coef": 0.3},
}  # fmt: skip
TIMINGS = {"tokens_per_second", "seconds_per_step", "peak_memory_gib"}


def flags_of(case: str) -> dict:
    """With the largest micro-batches that one process can have."""
    flags = online.HOT | online.OWN[case.split(",")[0]] | CASES[case]
    size = flags.get("batch_size", online.SMALL["batch_size"]) // flags.get("minibatches", 1)
    return flags | {"micro_batch_size": size}


def log_of(folder: str | Path) -> list[dict]:
    lines = json_lines(Path(folder) / "metrics.jsonl")
    return [{key: x for key, x in line.items() if key not in TIMINGS} for line in lines]


def assert_same_steps(one: str | Path, other: str | Path) -> None:
    assert farthest(trained(one), trained(other)) < 1e-9
    for a, b in zip(log_of(one), log_of(other), strict=True):
        assert b == pytest.approx(a, rel=1e-7, abs=1e-9)


@pytest.mark.parametrize("case", CASES)
def test_same_steps_with_other_micro_batches(run, start_of, case):
    method, flags = case.split(",")[0], flags_of(case)
    for size in (flags["micro_batch_size"], 1):  # one response: no prompt is shared
        with all_float64():
            assert run(method, f"of-{size}", **flags | {"micro_batch_size": size}) == 0
    big = f"of-{flags['micro_batch_size']}"
    assert_same_steps(big, "of-1")
    assert farthest(start_of("llama") / "model.safetensors", Path(big) / "model.safetensors") > 0.01
    for name in ("policy/clipfrac", "val/clipfrac"):  # the clips matter
        steps = [step[name] for step in steps_of(big) if name in step]
        assert not steps or any(0 < x < 1 for x in steps)


SEVERAL = """
import json, sys
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
from importlib import import_module
from training import evaluation, parallel, report
from conftest import all_float64
exact = all_float64()
exact.__enter__()
parallel.stop = report.curves = evaluation.greedy_samples = lambda *_: None  # one process group
for method, values in json.load(open(sys.argv[1])):
    module = import_module(method)
    module.main(module.Args(**values))
"""


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_same_steps_with_several_processes(run, made, start_of, reward_model, tmp_path, processes):
    """And with weights that are sharded, and with scores of a model."""
    cases = {case: flags_of(case) for case in (CASES if processes == 2 else ["ppo", "grpo"])}
    if processes == 2:
        cases |= {f"{method}, fsdp": flags_of(method) | {"fsdp": True} for method in METHODS}
        cases["ppo, model"] = flags_of("ppo") | {"reward": str(reward_model)}
    runs = []
    for case, flags in cases.items():
        method = case.split(",")[0]
        values = online.values_of(method, made, **flags | {"micro_batch_size": 1})
        values |= {"model": str(start_of("llama")), "output_dir": str(tmp_path / f"two {case}")}
        runs.append([method, values | {"cache_dir": str(tmp_path / "cache")}])
    (tmp_path / "several.py").write_text(SEVERAL.format(root=str(ROOT)))
    (tmp_path / "runs.json").write_text(json.dumps(runs))
    status, _, err = run_script(
        "several.py", tmp_path / "runs.json", processes=processes, cwd=tmp_path
    )
    assert status == 0, err
    for case, flags in cases.items():
        with all_float64():
            assert run(case.split(",")[0], f"one {case}", **flags | {"fsdp": False}) == 0
        assert_same_steps(f"one {case}", f"two {case}")


# -- stopped and started again: the same run as if nothing had happened


GOING_ON = {"max_steps": 4, "eval_every": 0, "save_every": 2}
STEERED = {"minibatches": 2, "micro_batch_size": 2, "kl_target": 0.5, "kl_horizon": 30}


@pytest.mark.parametrize(
    "method, where, act, saved",
    [
        ("ppo", "update", "break", 2),
        ("ppo", "update", "terminate", 3),  # the step is finished first
        ("ppo", "sampling", "terminate", 2),  # what was sampled is thrown away
        ("nlpo", "update", "break", 2),
        pytest.param("rloo", "update", "break", 2, marks=pytest.mark.slow),
        pytest.param("grpo", "sampling", "break", 2, marks=pytest.mark.slow),
        pytest.param("raft", "update", "break", 2, marks=pytest.mark.slow),
    ],
)
def test_run_that_broke_continues_to_the_same_end(run, monkeypatch, method, where, act, saved):
    flags = GOING_ON | (STEERED if method == "ppo" else {})
    assert run(method, "whole", **flags) == 0
    target, name = (METHODS[method], LOSSES[method]) if where == "update" else (Online, "sample")
    original, calls = getattr(target, name), []

    def in_step_3(*args, **more):
        found = original(*args, **more)
        calls.append(None)
        # One sampling is the first evaluation's. All steps have equally many micro-batches.
        if len(calls) == (2 * per_step + 2 if where == "update" else 4):
            if act == "break":
                raise RuntimeError("power cut")
            os.kill(os.getpid(), signal.SIGTERM)
        return found

    with monkeypatch.context() as patch:
        per_step = 8 if method in ("ppo", "raft") else 4
        patch.setattr(target, name, in_step_3)
        if act == "break":
            with pytest.raises(RuntimeError, match="power cut"):
                run(method, "out", **flags)
        else:
            assert run(method, "out", **flags) == 128 + signal.SIGTERM
    assert [path.name for path in Path("out").glob("checkpoint-*")] == [f"checkpoint-{saved}"]
    assert run(method, "out", **flags) == 0
    for file in ("rollouts.jsonl", "model.safetensors", trained("whole", 4).relative_to("whole")):
        assert (Path("whole") / file).read_bytes() == (Path("out") / file).read_bytes(), file
    assert log_of("whole") == log_of("out")
    if method == "ppo":  # beta follows its equation across the break
        coef = online.OWN["ppo"]["kl_coef"]
        for step in steps_of("out"):
            assert step["objective/kl_coef"] == pytest.approx(coef, rel=1e-9)
            coef *= 1 + min(max(step["objective/kl"] / 0.5 - 1, -0.2), 0.2) * 8 / 30


def test_a_model_that_changed_is_refused(run, reward_model, tmp_path, monkeypatch):
    """Else half of the run would have been scored by another one than the rest."""
    folder = shutil.copytree(reward_model, tmp_path / "mine")
    monkeypatch.setattr(Online, "watch", lambda self, *_: self.run.step == 1 and 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run("ppo", "out", reward=str(folder), save_every=1)
    weights = load_file(folder / "model.safetensors")
    weights["score.weight"] = weights["score.weight"] + 1
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="--reward .*has changed"):
        run("ppo", "out", reward=str(folder), save_every=1)


# -- alarms, and what cannot work

FIRST = {"objective/kl": 0.0, "objective/entropy": 20.0, "length/response": 10.0}  # 2 nats a token


@pytest.mark.parametrize(
    "kl, length, entropy, names",
    [
        (10.0, 10.0, 20.0, []),  # just one nat a token
        (10.1, 10.0, 20.0, ["KL"]),
        (-30.0, 20.0, 40.0, []),  # just twice as long
        (0.0, 20.5, 41.0, ["length"]),
        (0.0, 10.0, 41.0, ["entropy"]),  # more than twice the 2 nats a token
        (0.0, 10.0, 3.9, ["entropy"]),  # less than a fifth
        (90.0, 30.0, 3.0, ["KL", "length", "entropy"]),
    ],
)
def test_alarms(kl, length, entropy, names):
    now = {"objective/kl": kl, "length/response": length, "objective/entropy": entropy}
    assert list(rollouts.alarms(now, FIRST)) == names


def test_an_alarm_is_printed_once_until_it_is_over(run, monkeypatch, capsys):
    each = iter([{"KL": "1.1"}, {"KL": "1.2", "length": "9"}, {"length": "8"}, {"KL": "1.3"}])
    monkeypatch.setattr(rollouts, "alarms", lambda now, first: next(each))
    assert run("grpo", "out", max_steps=4, eval_every=0) == 0
    printed = [line for line in capsys.readouterr().out.splitlines() if "alarm: " in line]
    assert printed == ["step 1: alarm: 1.1", "step 2: alarm: 9", "step 4: alarm: 1.3"]


@pytest.mark.parametrize(
    "scores, ended, named",
    [
        ([1.0, 2.0, 3.0, 3.0], [True, False, False, False], []),
        ([1.0, 2.0, 3.0, 3.0], [False] * 4, ["end"]),
        ([3.0] * 4, [True] * 4, ["reward"]),
        ([1.0, 1.0, 3.0, 3.0], [True] * 4, ["groups"]),
    ],
)
def test_a_step_that_teaches_nothing(scores, ended, named):
    mask = torch.ones(4, 2, dtype=torch.bool)
    rollout = rollouts.Rollout([None] * 4, mask, torch.tensor(ended), torch.tensor(scores))
    args = grpo.Args(samples=2, reward="mine.py:score")
    assert list(rollouts.nothing_to_learn(rollout, args)) == named


REFUSED = [
    *(("ppo", {name: 0}, "must be positive") for name in "ppo_epochs minibatches".split()),
    *(("ppo", {"clip_range": x}, "--clip-range must be a finite") for x in (-1.0, math.inf)),
    *(("ppo", {"gamma": x}, "--gamma must be in") for x in (0.0, 1.1)),
    ("ppo", {"value_model": "./nowhere"}, "--value-model ./nowhere: there is no such folder"),
    ("ppo", {"reward": ""}, "--reward is needed"),
    ("rloo", {"soup_weight": 1.1}, "--soup-weight must be in"),
    ("rloo", {"ref_model": "a+b+c"}, "--ref-model a.b.c: a soup is of two models"),
    ("rloo", {"samples": 1}, "--samples must be 2 or more, got 1"),
    ("grpo", {"clip_high": 0.0}, "--clip-high must be positive"),
    ("grpo", {"gold_reward": "nowhere.py:score"}, "--gold-reward .*there is no file nowhere.py"),
    ("raft", {"kl_coef": math.nan}, "--kl-coef must be a finite"),
    ("raft", {"batch_epochs": 0}, "--batch-epochs must be positive"),
]


@pytest.mark.parametrize("method, flags, message", REFUSED, ids=str)
def test_what_cannot_work_is_refused_before_anything_is_loaded(
    run, monkeypatch, method, flags, message
):
    monkeypatch.setattr(common, "load_tokenizer", lambda *_: pytest.fail("loaded"))
    with pytest.raises(ValueError, match=message):
        run(method, "out", **flags)
