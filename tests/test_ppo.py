"""Whole runs of ppo.py on tiny models: what a step starts from, soups, any split, broken runs."""

import json
import math
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, labelled_rows, pair_rows, run_script, write_jsonl
from safetensors.torch import load_file, save_file
from test_train import (
    OWN,
    SMALL,
    Broken,
    _as_in_a_fresh_process,  # noqa: F401 (used by its name)
    assert_same_log,
    assert_same_run,
    at_loss_call,
    break_down,
    checkpoints_in,
    farthest,
    lines_of,
    plain,  # noqa: F401
    steps_of,
    train,
    without_timings,
)

import common
import generation
import kto
import ppo
import scoring

JUDGE = '''
from pathlib import Path


def letters(prompts, responses):
    """The share of letters in an answer."""
    return [sum(c.isalpha() for c in text) / max(1, len(text)) for text in responses]


def length(prompts, responses):
    return [float(len(text)) for text in responses]


def watched(prompts, responses):
    """The same as `letters`. In the third step, if a file says so, something is wrong with one row
    (the call before the first step is the evaluation's).
    """
    calls.append(None)
    scores, told = letters(prompts, responses), Path(__file__).with_name("fault")
    if told.is_file() and len(calls) == 4:
        fault = told.read_text()
        if fault == "nan":
            scores[2] = float("nan")
        if fault == "short":
            scores.pop()
        if fault == "raise":
            bad.append(responses[2])
    if any(text in bad for text in responses):
        raise RuntimeError("no answer from the judge")
    return scores


calls, bad = [], []
'''


def letters(text: str) -> float:
    return sum(c.isalpha() for c in text) / max(1, len(text))


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder: 60 prompts, of which about 3 are held out, and a file of rewards."""
    folder = tmp_path_factory.mktemp("ppo")
    write_jsonl(folder / "prompts.jsonl", [{"prompt": row["prompt"]} for row in pair_rows(60)])
    (folder / "judge.py").write_text(JUDGE)
    return folder


@pytest.fixture(scope="module")
def start_of(checkpoints, made):
    """start_of(architecture) -> a copy of a checkpoint with many tokens that end an answer, so that
    answers of random models end, and differ in length.
    """

    def get(architecture: str) -> Path:
        folder = made / architecture
        if not folder.is_dir():
            shutil.copytree(checkpoints(architecture), folder)
            file = folder / "generation_config.json"
            settings = json.loads(file.read_text()) if file.is_file() else {}
            settings["eos_token_id"] = list(range(30, 60))
            file.write_text(json.dumps(settings))
        return folder

    return get


PPO = {
    "kl_coef": 0.1, "ppo_epochs": 2, "minibatches": 1, "temperature": 1.0, "adam_eps": 1e-8,
    "max_grad_norm": 1.0, "max_length": 52,
}  # fmt: skip


def values_of(made: Path, reward: str = "letters", **flags) -> dict:
    named = f"{made / 'judge.py'}:{reward}" if reward.isidentifier() else reward
    return SMALL | PPO | {"dataset": str(made / "prompts.jsonl"), "reward": named} | flags


@pytest.fixture
def run(made, start_of, plain, monkeypatch, _as_in_a_fresh_process):  # noqa: F811
    """run(folder, **flags) -> the exit status of a whole run in this process."""
    monkeypatch.setitem(OWN, "ppo", PPO)

    def go(folder: str | Path, model: str | Path = "llama", **flags) -> int:
        start = start_of(model) if isinstance(model, str) else model
        values = values_of(made, **flags)
        return train(ppo, start, values.pop("dataset"), folder, **values)

    return go


@pytest.fixture
def rollouts(monkeypatch) -> list[ppo.Rollouts]:
    """Of every step, as they come."""
    seen, show = [], ppo.show
    monkeypatch.setattr(
        ppo, "show", lambda run, found, *a: (seen.append(found), show(run, found, *a))
    )
    return seen


@pytest.fixture
def asked(monkeypatch) -> list[dict]:
    """The log-probs of every micro-batch that is trained on, new and old."""
    seen, loss = [], ppo.ppo_loss

    def wrapped(logps, old_logps, *rest):
        mask = rest[4]
        seen.append({"new": logps.detach()[mask], "old": old_logps[mask]})
        return loss(logps, old_logps, *rest)

    monkeypatch.setattr(ppo, "ppo_loss", wrapped)
    return seen


def json_lines(file: str | Path) -> list[dict]:
    return [json.loads(line) for line in Path(file).read_text().splitlines()]


def weights_of(folder: str | Path, part: str, step: int) -> dict[str, torch.Tensor]:
    """Of the policy or of the value network, from a checkpoint."""
    saved = load_file(Path(folder) / f"checkpoint-{step}" / "policy.safetensors")
    mine = [name for name in saved if name.startswith(f"{part}.")]
    return {name.removeprefix(f"{part}."): saved[name] for name in mine}


# -- two steps, and the folder that they leave

LOGGED = {
    "objective/scores", "objective/kl", "objective/rlhf_reward", "objective/entropy",
    "objective/kl_coef", "length/response", "val/ended", "val/explained_variance", "val/clipfrac",
    "val/ratio", "policy/clipfrac", "policy/approxkl", "loss", "loss/policy", "loss/value",
}  # fmt: skip
EVALUATED = {
    f"eval/{name}"
    for name in (
        "objective/scores objective/kl objective/rlhf_reward objective/entropy length/response "
        "val/ended"
    ).split()
}


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "qwen2"])
def test_two_steps(run, made, start_of, rollouts, monkeypatch, tmp_path, architecture):
    """Both networks have moved, and plain Transformers computes with the policy's weights."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded, load = {}, common.load_policy

    def keep(*args, **more):
        model = load(*args, **more)
        loaded[more.get("name") or args[-1]] = model
        return model

    monkeypatch.setattr(common, "load_policy", keep)
    start, flags = start_of(architecture), {}
    if architecture == "qwen2":  # a chat template
        read = json_lines(made / "prompts.jsonl")
        ask = [{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in read]
        flags = {"dataset": str(write_jsonl(tmp_path / "asked.jsonl", ask))}
        flags |= {"max_length": 92, "max_prompt_length": 80}
    if architecture == "gemma2":  # with its curves and closing block
        monkeypatch.setattr(common, "beside", beside)
    assert run("out", architecture, max_steps=2, **flags) == 0

    steps = steps_of("out")
    assert [step["step"] for step in steps] == [1, 2]
    for step in steps:
        assert step.keys() >= LOGGED and all(math.isfinite(step[name]) for name in LOGGED)
        assert step["grad_norm"] > 0 and step["objective/kl_coef"] == pytest.approx(0.1)
    evaluations = [line for line in lines_of("out") if "eval/objective/scores" in line]
    assert [line["step"] for line in evaluations] == [0, 2]
    assert all(line.keys() == EVALUATED | {"step"} for line in evaluations)

    before, after = load_file(start / "model.safetensors"), load_file("out/model.safetensors")
    assert before.keys() == after.keys()
    assert [name for name in before if torch.equal(before[name], after[name])] == []
    values = weights_of("out", "value_model", 2)
    assert values.pop("score.weight").abs().max() > 0  # began at 0
    shared = {n: w for n, w in before.items() if n in values}
    assert len(shared) >= len(before) - 1
    assert [name for name in shared if torch.equal(before[name], values[name])] == []

    model = AutoModelForCausalLM.from_pretrained("out")
    ids = torch.arange(3, 63).view(2, 30)  # longer than the sliding windows
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, loaded["policy"](input_ids=ids).logits)
    tokenizer = AutoTokenizer.from_pretrained("out")
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(start).chat_template
    assert json.loads(Path("out/config.json").read_text())["plainpref"]["history"] == ["ppo"]

    lines = json_lines("out/rollouts.jsonl")
    assert [line["step"] for line in lines] == [1] * ppo.SHOWN + [2] * ppo.SHOWN
    for line in lines:
        expected = letters(line["response"]) if line["ended"] else -1
        assert line["score"] == pytest.approx(expected)
    assert {line["ended"] for line in lines} == {True, False}
    for found, step in zip(rollouts, steps, strict=True):
        assert step["objective/scores"] == pytest.approx(float(found.scores.mean()))
        assert step["objective/kl"] == pytest.approx(
            float((found.logps - found.ref_logps).sum(1).mean()), abs=1e-9
        )
    assert steps[1]["objective/kl"] != 0
    if architecture == "qwen2":
        assert lines[0]["prompt"].endswith("<|im_start|>assistant\n")
    if architecture == "gemma2":
        assert "objective/scores, held-out rows" in Path("out/summary.txt").read_text()
        assert Path("out/curves.png").is_file()


beside = common.beside


def test_gold_is_only_measured(run, made):
    gold = f"{made / 'judge.py'}:length"
    assert run("with", gold_reward=gold, max_steps=1) == 0
    assert run("without", max_steps=1) == 0
    assert common.file_hash(Path("with/model.safetensors")) == common.file_hash(
        Path("without/model.safetensors")
    )
    with_gold, without = without_timings("with"), without_timings("without")
    found = [line.pop("eval/objective/gold") for line in with_gold if "lr" not in line]
    assert len(found) == 2 and all(value > 1 for value in found)
    assert with_gold == without


@pytest.fixture(scope="module")
def reward_model(start_of, made) -> Path:
    """A reward model with a level, 0.7."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(5)
    start, folder = start_of("llama"), made / "reward-model"
    model = AutoModelForSequenceClassification.from_pretrained(start, num_labels=1)
    torch.nn.init.normal_(model.score.weight)
    model.config.plainpref = {"base_model": "llama", "history": [], "score_bias": 0.7}
    with torch.no_grad():
        for p in model.model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(start).save_pretrained(folder)
    return folder


@torch.no_grad()
def heads_along(folder: Path, row: common.Row) -> torch.Tensor:
    """(length,) the head at every token, by plain Transformers."""
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(folder)
    ids = torch.tensor(np.concatenate([row.prompt, row.responses[0]]).astype(int))[None]
    return model.score(model.model(ids).last_hidden_state)[0, :, 0]


def test_reward_model_scores_and_is_where_values_begin(run, reward_model, rollouts):
    assert run("out", reward=str(reward_model), max_steps=1) == 0
    found = rollouts[0]
    assert {True, False} == set(found.ended.tolist())
    for i, row in enumerate(found.rows.rows):
        heads, n = heads_along(reward_model, row) - 0.7, len(row.responses[0])
        expected = float(heads[-1]) if found.ended[i] else -1.0
        assert float(found.scores[i]) == pytest.approx(expected, abs=1e-5)
        assert found.values[i, :n].tolist() == pytest.approx(heads[-n - 1 : -1].tolist(), abs=1e-5)
        assert not found.values[i, n:].any()
    before = load_file(reward_model / "model.safetensors")
    after = weights_of("out", "value_model", 1)
    assert before.keys() == after.keys()
    moved = [(before[name] - after[name]).abs().max().item() for name in before]
    assert 0 < min(moved) and max(moved) < 0.01  # of --lr 1e-3: from there, and not from elsewhere


def test_value_model_of_ones_own(run, start_of, reward_model, rollouts):
    assert run("out", value_model=str(reward_model), max_steps=1) == 0
    row = rollouts[0].rows.rows[0]
    first = float(heads_along(reward_model, row)[len(row.prompt) - 1]) - 0.7
    assert float(rollouts[0].values[0, 0]) == pytest.approx(first, abs=1e-5)
    assert (
        run("zeros", reward=str(reward_model), value_model=str(start_of("llama")), max_steps=1) == 0
    )
    assert not rollouts[1].values.any()


# -- what the first update starts from


@pytest.fixture
def drawn(monkeypatch) -> list[torch.Tensor]:
    """Of every pass of sampling, (rows that have not ended,) the log-prob of what was drawn."""
    seen, draw = [], generation._draw

    def wrapped(logits, temperature, *rest):
        tokens = draw(logits, temperature, *rest)
        logps = (logits.double() / temperature).log_softmax(-1)
        seen.append(logps.gather(1, tokens[:, None])[:, 0])
        return tokens

    monkeypatch.setattr(generation, "_draw", wrapped)
    return seen


def sampled_logps(drawn: list[torch.Tensor], rows: list[common.Row]) -> list[list[float]]:
    """Per answer. A batch has its longest prompts first, and rows leave it when they have ended."""
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i].prompt))
    found = [[] for _ in rows]
    for t in range(max(len(row.responses[0]) for row in rows)):
        there = [i for i in order if len(rows[i].responses[0]) > t]
        for i, logp in zip(there, drawn[t].tolist(), strict=True):
            found[i].append(logp)
    return found


@pytest.mark.parametrize(
    "architecture, flags",
    [
        ("llama", {"minibatches": 2, "micro_batch_size": 2}),
        ("gpt2", {"micro_batch_size": 2}),
        ("gemma2", {"minibatches": 2, "micro_batch_size": 4}),
    ],
)
def test_ratio_is_1_and_kl_is_0(run, rollouts, asked, drawn, architecture, flags):
    """To the last bit, at another temperature than 1; and the sampling of a padded batch saw the
    same log-probs as training does.
    """
    assert run("out", architecture, max_steps=1, temperature=0.7, **flags) == 0
    found, step = rollouts[0], steps_of("out")[0]
    rows, parts = found.rows.rows, flags.get("minibatches", 1)
    assert len({len(row.prompt) for row in rows}) > 3  # much padding
    assert torch.equal(found.logps, found.ref_logps) and step["objective/kl"] == 0
    each = 8 // parts // flags["micro_batch_size"]  # micro-batches of an update
    assert len(asked) == 2 * parts * each  # two epochs
    same = [torch.equal(seen["new"], seen["old"]) for seen in asked]
    assert same == [True] * each + [False] * (len(asked) - each)

    # The evaluation before the step has a batch of fewer rows, and rows only leave a batch: the
    # first pass that has more is the step's own.
    begin = next(i for i, logps in enumerate(drawn) if len(logps) == len(rows))
    for i, logps in enumerate(sampled_logps(drawn[begin:], rows)):
        assert found.logps[i, : len(logps)].tolist() == pytest.approx(logps, abs=1e-5)
        assert len(logps) == len(rows[i].responses[0]) and not found.logps[i, len(logps) :].any()


@pytest.mark.parametrize("forgotten", ["update", "rollout", "reference"])
def test_a_forgotten_temperature_would_be_seen(
    run, rollouts, asked, monkeypatch, capsys, forgotten
):
    """In the update: ratios off 1, which the run says itself. In the rollout: the same. In the
    reference alone: a KL where there is none.
    """
    logps_of, models = common.response_token_logps, []

    def wrapped(model, micro, temperature=1.0):
        models.append(model)
        updating = torch.is_grad_enabled()
        where = "update" if updating else "rollout" if model is models[0] else "reference"
        return logps_of(model, micro, 1.0 if where == forgotten else temperature)

    monkeypatch.setattr(common, "response_token_logps", wrapped)
    assert run("out", temperature=0.7, max_steps=1) == 0
    ratio = (asked[0]["new"] - asked[0]["old"]).exp()
    warned = "off 1 before any update" in capsys.readouterr().out
    if forgotten == "reference":
        assert torch.all(ratio == 1) and not warned
        assert abs(steps_of("out")[0]["objective/kl"]) > 0.1
    else:
        assert (ratio - 1).abs().max() > 0.1 and warned


# -- from what was sampled to what is learned from


def whitened(rows: list[list[float]], shift_mean: bool) -> list[list[float]]:
    numbers = [x for row in rows for x in row]
    mean = sum(numbers) / len(numbers)
    spread = math.sqrt(sum((x - mean) ** 2 for x in numbers) / len(numbers) + 1e-8)
    return [[(x - mean) / spread + (0 if shift_mean else mean) for x in row] for row in rows]


def learned_from(found: ppo.Rollouts, kl_coef, k3, whiten, gamma, lam) -> list[tuple]:
    """Per answer its log-probs, whitened advantages, values and returns: by hand, in floats."""
    answers = []
    for i, row in enumerate(found.rows.rows):
        n = len(row.responses[0])
        of = lambda x, i=i, n=n: x[i, :n].tolist()  # noqa: E731
        answers.append((of(found.logps), of(found.ref_logps), of(found.values)))
    rewards = []
    for (logps, ref_logps, _), score in zip(answers, found.scores.tolist(), strict=True):
        d = [a - b for a, b in zip(logps, ref_logps, strict=True)]
        rewards.append([-kl_coef * (math.exp(-x) - 1 + x if k3 else x) for x in d])
        rewards[-1][-1] += score
    rewards = whitened(rewards, shift_mean=False) if whiten else rewards
    advantages = []
    for (_, _, values), paid in zip(answers, rewards, strict=True):
        after, made = [*values[1:], 0.0], [0.0]
        for t in reversed(range(len(paid))):
            made.insert(0, paid[t] + gamma * after[t] - values[t] + gamma * lam * made[0])
        advantages.append(made[:-1])
    returns = [
        [a + v for a, v in zip(row, values, strict=True)]
        for row, (_, _, values) in zip(advantages, answers, strict=True)
    ]
    white = whitened(advantages, shift_mean=True)
    logps, _, values = zip(*answers, strict=True)
    return list(zip(logps, white, values, returns, strict=True))


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"kl_estimator": "k3", "whiten_rewards": True, "gamma": 0.9, "gae_lambda": 0.7},
    ],
)
def test_what_a_step_learns_from(run, start_of, rollouts, monkeypatch, tmp_path, flags):
    """Everything on its way from the samples into the loss, by a KL that is not 0."""
    learned, loss = [], ppo.ppo_loss

    def wrapped(logps, *given):
        learned.append(given)
        return loss(logps, *given)

    monkeypatch.setattr(ppo, "ppo_loss", wrapped)
    other = moved_copy(start_of("llama"), tmp_path / "other", 0.05)
    knobs = {"clip_range": 0.15, "value_clip_range": 0.25, "value_weight": 0.35, "kl_coef": 0.3}
    knobs |= {"ref_model": str(other), "dtype": "float64", "max_steps": 2, "ppo_epochs": 1}
    assert run("out", **knobs | flags) == 0
    assert len(learned) == 4  # two steps of two micro-batches
    for step, found in enumerate(rollouts):
        assert float((found.logps - found.ref_logps).abs().max()) > 0.1
        assert found.values.any() == (step > 0)  # of the first step they are 0
        expected = learned_from(
            found, 0.3, "kl_estimator" in flags, "whiten_rewards" in flags,
            flags.get("gamma", 1.0), flags.get("gae_lambda", 0.95),
        )  # fmt: skip
        made = []
        for old_logps, advantages, values, old_values, returns, mask, *limits in learned[
            2 * step : 2 * step + 2
        ]:
            assert limits == [0.15, 0.25, 0.35]
            assert values.requires_grad and torch.allclose(values, old_values, atol=1e-9)
            for i, there in enumerate(mask):
                given = (old_logps, advantages, old_values, returns)
                made.append(tuple(x[i][there].tolist() for x in given))
        made.sort(key=lambda answer: answer[0])
        for one, other in zip(made, sorted(expected, key=lambda x: x[0]), strict=True):
            for a, b in zip(one, other, strict=True):
                assert a == pytest.approx(b, rel=1e-9, abs=1e-9)


# -- soups


def moved_copy(start: Path, folder: Path, far: float) -> Path:
    """The same architecture and tokenizer, every weight a bit elsewhere."""
    shutil.copytree(start, folder)
    draw = torch.Generator().manual_seed(11)
    weights = load_file(start / "model.safetensors")
    weights = {n: w + far * torch.randn(w.shape, generator=draw) for n, w in weights.items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_soup_of_two_is_far_from_the_start(run, start_of, tmp_path):
    start = start_of("llama")
    other = moved_copy(start, tmp_path / "other", 0.3)
    many = {"batch_size": 32, "micro_batch_size": 32, "max_steps": 1}  # a KL of few is mostly noise
    kls = []
    for weight in (0.5, 0.9):
        folder = f"of-{weight}"
        assert run(folder, ref_model=f"{start}+{other}", soup_weight=weight, **many) == 0
        kls.append(steps_of(folder)[0]["objective/kl"])
    # The policy is the first parent, and nearer to a soup that is mostly itself.
    assert kls[0] > 2 and 0.1 < kls[1] < kls[0] - 1


def test_soup_of_equal_parents_is_plain_ppo(run, start_of, tmp_path):
    start = start_of("llama")
    copy = shutil.copytree(start, tmp_path / "copy")
    assert run("plain", max_steps=2) == 0
    assert steps_of("plain")[1]["objective/kl"] != 0
    for number, reference in enumerate((f"{start}", f"{start}+{start}", f"{start}+{copy}")):
        assert run(f"soup-{number}", ref_model=reference, max_steps=2) == 0
        assert_same_run("plain", f"soup-{number}")


def test_soup_is_averaged_in_fp32_and_tied_weights_once(run, start_of, tmp_path, monkeypatch):
    """Also for bfloat16, which would lose what two models differ in."""
    start = start_of("gemma2")
    other = moved_copy(start, tmp_path / "other", 0.001)
    seen, freeze = [], scoring.freeze

    def look(model):
        if not seen:  # the reference is the first
            head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
            assert head.weight is embedding.weight
            named = common._state_tensors(model).items()
            seen.append({name: tensor.clone() for name, tensor in named})
        return freeze(model)

    monkeypatch.setattr(scoring, "freeze", look)
    more = {"dtype": "bfloat16", "soup_weight": 0.25, "max_steps": 1}
    assert run("out", "gemma2", ref_model=f"{start}+{other}", **more) == 0
    a, b = (load_file(folder / "model.safetensors") for folder in (start, other))
    assert "lm_head.weight" not in a and seen[0].keys() >= a.keys()
    for name in a:
        mixed = 0.25 * a[name].double() + 0.75 * b[name].double()
        assert seen[0][name].dtype == torch.float32
        torch.testing.assert_close(seen[0][name].double(), mixed, rtol=1e-6, atol=1e-8)


def test_kto_takes_a_soup(checkpoints, made, plain, tmp_path):  # noqa: F811
    """Of the policy and a copy it is the policy: every implicit reward of the first step is 0."""
    start, data = checkpoints("llama"), write_jsonl(tmp_path / "rows.jsonl", labelled_rows(24))
    copy = shutil.copytree(start, tmp_path / "copy")
    other = moved_copy(start, tmp_path / "other", 0.05)
    first = []
    for second in (copy, other):
        flags = {"ref_model": f"{start}+{second}", "max_steps": 1, "eval_every": 0}
        assert train(kto, start, data, f"to {second.name}", **flags) == 0
        first.append(steps_of(f"to {second.name}")[0]["rewards/chosen"])
    assert first[0] == pytest.approx(0, abs=1e-6) and abs(first[1]) > 0.1


# -- the same steps for any split over micro-batches and processes

HOT = {"dtype": "float64", "lr": 1e-2, "max_steps": 3, "save_every": 0, "eval_every": 0}
CASES = {
    "one minibatch": {},
    "two minibatches": {
        "minibatches": 2, "whiten_rewards": True, "kl_target": 0.5, "kl_horizon": 30,
        "kl_estimator": "k3", "max_grad_norm": 0.0,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def alone(made, start_of, tmp_path_factory):
    """alone(case) -> the folder of the hot run by one process, in the largest micro-batches."""
    found: dict[str, Path] = {}

    def get(case: str) -> Path:
        if case not in found:
            folder = tmp_path_factory.mktemp("alone") / "run"
            size = 8 // CASES[case].get("minibatches", 1)
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(folder.parent)
                patch.setitem(OWN, "ppo", PPO)
                patch.setattr(common, "beside", lambda n: None if n == "report" else beside(n))
                flags = HOT | {"micro_batch_size": size} | CASES[case]
                values = values_of(made, **flags)
                assert train(ppo, start_of("llama"), values.pop("dataset"), folder, **values) == 0
            found[case] = folder
        return found[case]

    return get


def trained(folder: str | Path, step: int = 3) -> Path:
    return Path(folder) / f"checkpoint-{step}" / "policy.safetensors"


def assert_same_steps(one: Path, other: str | Path, start: Path) -> None:
    """Both networks, the log, and the answers that were sampled."""
    begun, ended = load_file(start / "model.safetensors"), weights_of(one, "policy", 3)
    assert all(w.dtype == torch.float64 for w in load_file(trained(one)).values())
    assert max((begun[n] - ended[n]).abs().max().item() for n in begun) > 0.01  # hot
    assert farthest(trained(one), trained(other)) < 1e-9
    assert_same_log(one, other)
    texts = [[line["response"] for line in json_lines(f"{f}/rollouts.jsonl")] for f in (one, other)]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("case, size", [("one minibatch", 2), ("two minibatches", 1)])
def test_same_steps_with_other_micro_batches(run, alone, start_of, case, size):
    assert run("dealt", **HOT | CASES[case] | {"micro_batch_size": size}) == 0
    assert_same_steps(alone(case), "dealt", start_of("llama"))


def test_the_hot_runs_meet_what_they_are_for(alone):
    """Ratios and values are clipped, the KL's weight moves, answers end and do not."""
    for case in CASES:
        steps = steps_of(alone(case))
        assert any(0 < step["policy/clipfrac"] < 1 for step in steps)
        assert any(0 < step["val/clipfrac"] < 1 for step in steps)
        assert all(0 < step["val/ended"] < 1 for step in steps[:1])
        assert len({step["objective/kl_coef"] for step in steps}) == (1 if case in WHOLE else 3)


WHOLE = ("one minibatch",)  # in which kl_coef stays


def test_a_local_whitening_would_be_seen(run, monkeypatch):
    """Over the answers of a micro-batch instead of a step's. (Of a whole step they are white
    already, so there nothing changes.)
    """
    loss, whiten = ppo.ppo_loss, ppo.whiten

    def local(logps, old_logps, advantages, *rest):
        return loss(logps, old_logps, whiten(advantages, rest[3]), *rest)

    monkeypatch.setattr(ppo, "ppo_loss", local)
    for size in (8, 2):
        assert run(f"of-{size}", **HOT | {"micro_batch_size": size, "max_steps": 1}) == 0
    assert farthest(trained("of-8", 1), trained("of-2", 1)) > 1e-3


SEVERAL = """
import json, sys
sys.path.insert(0, {root!r})
import torch.distributed as dist
import common, ppo
dist.destroy_process_group = lambda: None  # one group for all of these runs
beside, whiten = common.beside, ppo.whiten
common.beside = lambda name: None if name == "report" else beside(name)


def of_this_process(values, mask, shift_mean=True):
    here = mask.clone()
    here[:] = False
    here[dist.get_rank() :: dist.get_world_size()] = mask[dist.get_rank() :: dist.get_world_size()]
    return whiten(values, here, shift_mean) + whiten(values, mask & ~here, shift_mean)


for local, values in json.load(open(sys.argv[1])):
    ppo.whiten = of_this_process if local else whiten
    ppo.main(ppo.Args(**values))
"""


@pytest.fixture(scope="module")
def spread(made, start_of, reward_model, tmp_path_factory):
    """spread(processes) -> where so many processes have made the hot runs, all with one start."""
    found: dict[int, Path] = {}

    def get(processes: int) -> Path:
        if processes in found:
            return found[processes]
        folder, runs = tmp_path_factory.mktemp(f"by-{processes}"), []
        named = {case: (False, flags) for case, flags in CASES.items()}
        if processes == 2:
            named["whitened apart"] = (True, {})
            named["fsdp"] = (False, {"fsdp": True, "micro_batch_size": 2})
            named["by a model"] = (False, {"reward": str(reward_model)})
        for case, (local, flags) in named.items():
            values = values_of(made, **HOT | {"micro_batch_size": 1} | flags)
            values |= {"model": str(start_of("llama")), "output_dir": str(folder / case)}
            runs.append([local, values | {"cache_dir": str(folder / "cache")}])
        (folder / "several.py").write_text(SEVERAL.format(root=str(ROOT)))
        (folder / "runs.json").write_text(json.dumps(runs))
        status, _, err = run_script(
            "several.py", str(folder / "runs.json"), processes=processes, cwd=folder
        )
        assert status == 0, err
        found[processes] = folder
        return folder

    return get


@pytest.mark.slow
@pytest.mark.parametrize("processes, case", [(2, case) for case in CASES] + [(4, "one minibatch")])
def test_same_steps_with_other_numbers_of_processes(alone, spread, start_of, processes, case):
    folder = spread(processes) / case
    assert json.loads((folder / "run.json").read_text())["processes"] == processes
    assert_same_steps(alone(case), folder, start_of("llama"))


@pytest.mark.slow
def test_same_steps_where_weights_are_spread(alone, spread, start_of):
    assert_same_steps(alone("one minibatch"), spread(2) / "fsdp", start_of("llama"))


@pytest.mark.slow
def test_same_steps_with_scores_of_a_model(run, spread, reward_model, start_of, tmp_path):
    assert run("one", reward=str(reward_model), **HOT) == 0
    assert_same_steps(tmp_path / "one", spread(2) / "by a model", start_of("llama"))


@pytest.mark.slow
def test_whitening_by_process_would_be_seen(alone, spread):
    one, other = alone("one minibatch"), spread(2) / "whitened apart"
    assert farthest(trained(one), trained(other)) > 1e-3


# -- stopped and started again: the same run as if nothing had happened

GOING_ON = {
    "reward": "watched", "max_steps": 4, "minibatches": 2, "micro_batch_size": 2,
    "kl_target": 0.5, "kl_horizon": 30, "eval_every": 0,
}  # fmt: skip
UPDATES = 2 * 2 * 2  # micro-batches in a step: epochs, minibatches, each of two


@pytest.fixture(scope="module")
def whole(made, start_of, tmp_path_factory) -> Path:
    """The run that nothing happens to."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder.parent)
        patch.setitem(OWN, "ppo", PPO)
        patch.setattr(common, "beside", lambda n: None if n == "report" else beside(n))
        values = values_of(made, **GOING_ON)
        assert train(ppo, start_of("llama"), values.pop("dataset"), folder, **values) == 0
    return folder


def assert_went_on(whole: Path, folder: str) -> None:
    """Weights of both networks, log, rollouts, and what is kept for later, to the last bit."""
    assert_same_run(whole, folder)
    for file in ("rollouts.jsonl", "checkpoint-4/policy.safetensors"):
        assert (whole / file).read_bytes() == (Path(folder) / file).read_bytes()
    kept = [json.loads((f / "checkpoint-4/state.json").read_text()) for f in (whole, Path(folder))]
    assert kept[0]["kept"] == kept[1]["kept"]


def kept_by(whole: Path) -> dict:
    return json.loads((whole / "checkpoint-4/state.json").read_text())["kept"]


def test_what_the_alarms_compare_with_is_kept(whole):
    """The first step, also after the fourth."""
    first, kept = steps_of(whole)[0], kept_by(whole)["first"]
    for name in ("length/response", "objective/kl", "objective/entropy"):
        assert kept[name] == pytest.approx(first[name], rel=1e-9)


def test_kl_coef_is_steered_and_kept(whole):
    """From step to step as the equation says, of what is logged."""
    steps, coef = steps_of(whole), PPO["kl_coef"]
    for step in steps:
        assert step["objective/kl_coef"] == pytest.approx(coef, rel=1e-9)
        error = min(max(step["objective/kl"] / 0.5 - 1, -0.2), 0.2)
        coef *= 1 + error * 8 / 30  # answers of a step, and the horizon
    assert kept_by(whole)["kl_coef"] == pytest.approx(coef, rel=1e-9)
    assert len({step["objective/kl_coef"] for step in steps}) == 4


def at_draw(patch, prompts: int, number: int, act) -> None:
    """Call `act` in the third pass of the `number`-th sampling of so many answers."""
    draw, generate, seen = generation._draw, generation.generate, {"times": 0, "passes": 0}

    def counted(policy, asked, *rest, **more):
        seen["times"] += len(asked) == prompts
        seen["passes"] = 0
        return generate(policy, asked, *rest, **more)

    def drawing(*args):
        seen["passes"] += 1
        if (seen["times"], seen["passes"]) == (number, 3):
            act()
        return draw(*args)

    patch.setattr(generation, "generate", counted)
    patch.setattr(generation, "_draw", drawing)


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(
    "where, act, saved",
    [
        ("update", break_down, 2),
        ("sampling", break_down, 2),
        ("between steps", break_down, 2),
        ("update", terminate, 3),  # the step is finished first
        ("sampling", terminate, 2),  # what is sampled is thrown away: step 3 is not begun
        ("the last evaluation", terminate, 4),
    ],
)
def test_run_that_broke_goes_on_to_the_same_end(run, whole, monkeypatch, where, act, saved):
    with monkeypatch.context() as patch:
        if where == "update":  # the second minibatch of the first epoch of step 3
            at_loss_call(patch, ppo, 2 * UPDATES + 3, act)
        elif where == "sampling":
            at_draw(patch, 8, 3, act)
        elif where == "the last evaluation":  # of 3 held-out rows; the first is before step 1
            at_draw(patch, 3, 2, act)
        else:  # step 4 has begun, nothing of it is done
            step_rows = common.Run.step_rows
            patch.setattr(
                common.Run, "step_rows", lambda run, n: act() if n == 3 else step_rows(run, n)
            )
        if act is terminate:
            assert run("out", **GOING_ON) == 128 + signal.SIGTERM
        else:
            with pytest.raises(Broken):
                run("out", **GOING_ON)
    assert checkpoints_in("out") == [saved]
    assert run("out", **GOING_ON) == 0
    assert_went_on(whole, "out")


# -- rewards that go wrong


@pytest.mark.parametrize(
    "fault, told",
    [
        ("nan", r"judge\.py:watched gave nan, .* row 3 of 8: prompt .*, response '"),
        ("short", r"judge\.py:watched gave 7 scores for 8 rows"),
        (
            "raise",
            r"judge\.py:watched raised RuntimeError: no answer from the judge, at row 3 of 8",
        ),
    ],
)
def test_reward_that_goes_wrong_in_step_3(run, whole, made, fault, told):
    """The run says where; what was saved is whole, and goes on when the reward is well again."""
    try:
        (made / "fault").write_text(fault)
        with pytest.raises(common.UserError, match=told):
            run("out", **GOING_ON)
    finally:
        (made / "fault").unlink()
    assert checkpoints_in("out") == [2]
    assert common.damage_of(Path("out/checkpoint-2")) is None
    assert [step["step"] for step in steps_of("out")] == [1, 2]
    assert run("out", **GOING_ON) == 0
    assert_went_on(whole, "out")


def broken_in_step_3(run, monkeypatch, **flags) -> None:
    with monkeypatch.context() as patch:
        at_loss_call(patch, ppo, 2 * UPDATES + 1, break_down)
        with pytest.raises(Broken):
            run("out", **GOING_ON | flags)
    assert checkpoints_in("out") == [2]


def test_a_mended_reward_goes_on(run, made, tmp_path, monkeypatch, capsys):
    """Else a checkpoint would be of no use to who had to mend what had stopped the run."""
    judge = Path(shutil.copy(made / "judge.py", tmp_path / "mine.py"))
    broken_in_step_3(run, monkeypatch, reward=f"{judge}:letters")
    judge.write_text(judge.read_text() + "# mended\n")
    assert run("out", **GOING_ON | {"reward": f"{judge}:letters"}) == 0
    assert "mine.py has changed since: used as it is now" in capsys.readouterr().out
    assert (Path("out") / "reward-mine.py").read_text() == judge.read_text()


@pytest.mark.parametrize("which", ("reward", "value_model"))
def test_a_model_that_changed_is_refused(run, reward_model, tmp_path, monkeypatch, which):
    """Half of the run would have been scored by another one than the rest."""
    folder = shutil.copytree(reward_model, tmp_path / "mine")
    broken_in_step_3(run, monkeypatch, **{which: str(folder)})
    weights = load_file(folder / "model.safetensors")
    weights["score.weight"] = weights["score.weight"] + 1
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(common.UserError, match="mine changed since"):
        run("out", **GOING_ON | {which: str(folder)})
    assert checkpoints_in("out") == [2]


def test_reward_model_that_goes_wrong(run, reward_model):
    broken = Path(shutil.copytree(reward_model, "broken-reward"))
    weights = load_file(broken / "model.safetensors")
    weights["score.weight"][:] = math.nan
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(common.UserError, match="broken-reward gave nan, .* row 1 of "):
        run("out", reward="./broken-reward", max_steps=1)


@pytest.mark.slow
def test_a_wrong_reward_ends_the_script_with_1(made, start_of, tmp_path):
    file = tmp_path / "judge.py"
    file.write_text("def nothing(prompts, responses):\n    return [None] * len(responses)\n")
    values = values_of(made, reward=f"{file}:nothing", max_steps=1)
    values |= {"model": start_of("llama"), "output_dir": tmp_path / "out"}
    words = [w for name, x in values.items() for w in (f"--{name.replace('_', '-')}", str(x))]
    status, _, err = run_script("ppo.py", *words)
    assert status == 1
    assert f"--reward {file}:nothing must give a list of numbers" in err
    assert "Traceback" not in err


# -- adapters, low precision


def test_adapters(run, start_of, rollouts, monkeypatch):
    """The reference is the policy without them; what is beneath them stays as it is."""
    loaded, load = {}, common.load_policy

    def keep(*args, **more):
        model = load(*args, **more)
        loaded[more.get("name") or args[-1]] = model
        return model

    monkeypatch.setattr(common, "load_policy", keep)
    assert run("out", lora_rank=4, max_steps=2, lr=1e-2, save_every=1) == 0
    assert set(loaded) == {"policy", "value"}  # no third model
    steps = steps_of("out")
    assert steps[0]["objective/kl"] == 0 and torch.equal(rollouts[0].logps, rollouts[0].ref_logps)
    assert steps[1]["objective/kl"] != 0

    start = load_file(start_of("llama") / "model.safetensors")
    for model in loaded.values():
        named = {n.replace(".base_layer", ""): w for n, w in model.named_parameters()}
        beneath = {n: w for n, w in named.items() if n in start}
        assert len(beneath) >= len(start) - 1
        assert all(torch.equal(w.detach(), start[n]) for n, w in beneath.items())
    saved = load_file(trained("out", 2))
    assert all(".lora_" in name or name.endswith("score.weight") for name in saved)
    assert sum(name.startswith("policy.") for name in saved) > 10
    assert all(tensor.abs().max() > 0 for tensor in saved.values())
    assert Path("out/adapter/adapter_model.safetensors").is_file()
    after = load_file("out/model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(after[name], start[name])


@pytest.mark.parametrize("flags", [{}, {"lora_rank": 4}], ids=["all weights", "adapters"])
def test_low_precision(run, asked, rollouts, flags):
    """Ratios and the KL begin where they should, but for rounding: a reference that is a model of
    its own keeps bfloat16 weights.
    """
    assert run("out", "gemma2", dtype="bfloat16", max_steps=1, **flags) == 0
    first = asked[: len(asked) // 2]  # the first epoch is one minibatch
    assert max(float((seen["new"] - seen["old"]).exp().sub(1).abs().max()) for seen in first) < 0.01
    assert abs(steps_of("out")[0]["objective/kl"]) < 0.05
    weights = load_file(trained("out", 1))
    assert {w.dtype for w in weights.values()} == {torch.float32}


# -- knobs, alarms

NONE = {"objective/kl": 0.0, "objective/entropy": 20.0, "length/response": 10.0}  # 2 nats a token


@pytest.mark.parametrize(
    "now, told",
    [
        ({}, []),
        ({"objective/kl": 10.0}, []),  # just one nat a token
        ({"objective/kl": 10.1}, ["KL 1.01 nats a token: the policy is far from its reference"]),
        ({"objective/kl": -30.0}, []),
        # 20 tokens are just twice as many; of as much entropy a token.
        ({"length/response": 20.0, "objective/entropy": 40.0}, []),
        (
            {"length/response": 20.5, "objective/entropy": 41.0},
            ["answers of 20.5 tokens, 10.0 in the first step"],
        ),
        ({"length/response": 5.0, "objective/entropy": 10.0}, []),
        (
            {"length/response": 4.5, "objective/entropy": 9.0},
            ["answers of 4.5 tokens, 10.0 in the first step"],
        ),
        # A token has 4 nats just twice, and 0.4 just a fifth of the 2 at first.
        ({"objective/entropy": 40.0}, []),
        ({"objective/entropy": 41.0}, ["entropy 4.10 nats a token, 2.00 in the first step"]),
        ({"objective/entropy": 4.1}, []),
        ({"objective/entropy": 3.9}, ["entropy 0.39 nats a token, 2.00 in the first step"]),
        # Of a KL over 10 tokens what it is over 5: twice as much a token.
        ({"objective/kl": 6.0, "length/response": 5.0, "objective/entropy": 10.0}, ["KL 1.20"]),
        (
            {"objective/kl": 90.0, "length/response": 30.0, "objective/entropy": 3.0},
            ["KL 3.00", "answers of 30.0", "entropy 0.10"],
        ),
    ],
)
def test_alarms(now, told):
    found = ppo.alarms(NONE | now, NONE)
    assert len(found) == len(told)
    assert all(line.startswith(part) for line, part in zip(found, told, strict=True))


def test_alarms_of_a_policy_that_was_certain_at_first():
    """Its entropy was nothing, to which a thousandth of a nat compares."""
    first = NONE | {"objective/entropy": 0.0}
    assert ppo.alarms(first | {"objective/entropy": 0.019}, first) == []
    assert len(ppo.alarms(first | {"objective/entropy": 0.021}, first)) == 1


def test_an_alarm_is_printed(run, start_of, tmp_path, capsys):
    """The policy lies far from this reference."""
    far = moved_copy(start_of("llama"), tmp_path / "far", 0.5)
    assert run("out", ref_model=str(far), max_steps=1) == 0
    assert "step 1: alarm: KL " in capsys.readouterr().out


def test_an_alarm_is_said_once_until_it_is_over(run, monkeypatch, capsys):
    each = iter([["KL 1.1"], ["KL 1.2", "answers of 9"], ["answers of 8"], ["KL 1.3"]])
    monkeypatch.setattr(ppo, "alarms", lambda now, first: next(each))
    assert run("out", max_steps=4) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if "alarm: " in line]
    assert said == ["step 1: alarm: KL 1.1", "step 2: alarm: answers of 9", "step 4: alarm: KL 1.3"]


@pytest.mark.parametrize(
    "flags, without_end",
    [
        ({"missing_eos": "replace", "missing_eos_value": 2.5}, lambda score: -2.5),
        ({"missing_eos": "subtract", "missing_eos_value": 2.5}, lambda score: score - 2.5),
        ({"missing_eos": "keep", "missing_eos_value": 2.5}, lambda score: score),
    ],
)
def test_answers_without_an_end(run, start_of, rollouts, flags, without_end):
    tokenizer = common.load_tokenizer(str(start_of("llama")), 64)
    assert run("out", max_steps=1, ppo_epochs=1, **flags) == 0
    expected = []
    for row, ended in zip(rollouts[0].rows.rows, rollouts[0].ended.tolist(), strict=True):
        answer = row.responses[0].tolist()
        assert ended == (answer[-1] in tokenizer.stop_ids)
        assert ended or len(answer) == 12
        assert not tokenizer.stop_ids.intersection(answer[:-1])
        score = letters(generation.text_of(row.responses[0], tokenizer))
        expected.append(score if ended else without_end(score))
    assert {True, False} == set(rollouts[0].ended.tolist())
    assert rollouts[0].scores.tolist() == pytest.approx(expected)
    mean = sum(expected) / len(expected)
    assert steps_of("out")[0]["objective/scores"] == pytest.approx(mean)


KNOBS = [
    *(
        ({name: value}, common.flag(name) + " must be positive")
        for name in ("temperature", "clip_range", "value_clip_range", "adam_eps")
        for value in (0.0, -1.0, math.nan, math.inf)
    ),
    *(
        ({name: value}, common.flag(name) + " must be positive")
        for name in ("ppo_epochs", "minibatches", "kl_horizon")
        for value in (0, -1)
    ),
    *(
        ({name: value}, common.flag(name) + " must be 0 or more")
        for name in ("kl_coef", "kl_target", "value_weight", "missing_eos_value")
        for value in (-0.1, math.nan, math.inf)
    ),
    *(({"gamma": value}, "--gamma must be in") for value in (0.0, -0.1, 1.1, math.nan)),
    *(({"gae_lambda": value}, "--gae-lambda in") for value in (-0.1, 1.1, math.nan)),
    *(({"soup_weight": value}, "--soup-weight must be in") for value in (-0.1, 1.1, math.nan)),
    ({"reward": ""}, "--reward is needed"),
    ({"reward": "nowhere.py:score"}, "there is no file nowhere.py"),
    ({"reward": "judge.py"}, r"which function of it\? judge.py:NAME"),
    ({"reward": "./nowhere"}, "--reward ./nowhere: there is no such folder"),
    ({"gold_reward": "nowhere.py:score"}, "--gold-reward .* there is no file nowhere.py"),
    ({"ref_model": "./nowhere"}, "--ref-model ./nowhere: there is no such folder"),
    ({"value_model": "./nowhere"}, "--value-model ./nowhere: there is no such folder"),
]


@pytest.mark.parametrize("flags, told", KNOBS, ids=lambda x: str(x) if isinstance(x, dict) else "")
def test_what_cannot_work_is_said_before_anything_is_loaded(run, monkeypatch, flags, told):
    monkeypatch.setattr(common, "load_tokenizer", lambda *_: pytest.fail("loaded"))
    with pytest.raises(common.UserError, match=told):
        run("out", **flags)


@pytest.mark.parametrize("third", ["", "+llama"])
def test_a_soup_of_other_than_two_is_refused(run, start_of, third):
    """A third parent that were left out in silence would be worse than none."""
    start = start_of("llama")
    with pytest.raises(common.UserError, match="--ref-model"):
        run("out", ref_model=f"{start}+{start}{third and f'+{start}'}" if third else f"{start}+")


def test_minibatches_that_do_not_divide(run, monkeypatch):
    monkeypatch.setattr(common, "load_policy", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(common.UserError, match="1 processes in 3 minibatches; 6 or 9 can"):
        run("out", minibatches=3)
    with pytest.raises(common.UserError, match="micro-batch-size 8 does not divide"):
        run("out", minibatches=2, micro_batch_size=8)


def test_no_reward_where_the_table_has_none(checkpoints, made, plain):  # noqa: F811
    """Nor a guess of one: only the embedded task brings its own."""
    args = ppo.Args(model=str(checkpoints("llama")), dataset=str(made / "prompts.jsonl"))
    with pytest.raises(common.UserError, match="--reward is needed: a reward model .*, family, or"):
        ppo.main(args)
    assert ppo.SETTINGS["tiny"]["reward"] and "reward" not in ppo.SETTINGS["pythia-1b"]


def test_value_model_of_another_vocabulary_is_refused(run, reward_model, tmp_path):
    """Ids of the policy would mean nothing to it, or not be there at all."""
    from transformers import AutoModelForSequenceClassification

    folder = shutil.copytree(reward_model, tmp_path / "small")
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    model.resize_token_embeddings(100)
    model.save_pretrained(folder)
    with pytest.raises(common.UserError, match="--value-model"):
        run("out", value_model=str(folder), max_steps=1)


def test_language_model_as_reward_is_refused(run, start_of):
    with pytest.raises(common.UserError, match="not a reward model"):
        run("out", reward=str(start_of("llama")))
    assert checkpoints_in("out") == []
