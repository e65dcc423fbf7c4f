"""RAFT: the loss, which answer is the best, and whole runs of raft.py on tiny models."""

import json
import math
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run_script, write_jsonl
from safetensors.torch import load_file
from test_losses import F64
from test_ppo import at_draw, json_lines, letters, made, start_of, trained  # noqa: F401
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
    plain,  # noqa: F401
    steps_of,
    train,
)

import common
import generation
import raft

# -- the pieces


def test_raft_by_hand():
    """Two answers, of 2 and of 3 tokens, each of probability 1/2."""
    logps = torch.tensor([2 * math.log(1 / 2), 3 * math.log(1 / 2)], dtype=torch.float64)
    losses, metrics = raft.raft_loss(logps.requires_grad_(), torch.tensor([2, 3]))
    assert losses.tolist() == pytest.approx([2 * math.log(2), 3 * math.log(2)], rel=F64)
    # Divided by all tokens of an optimizer step, each token of either answer counts the same.
    (losses.sum() / 5).backward()
    assert logps.grad.tolist() == pytest.approx([-1 / 5, -1 / 5], rel=F64)
    values, weights = (x.detach() for x in metrics["loss"])
    assert float(values.sum() / weights.sum()) == pytest.approx(math.log(2), rel=F64)
    assert metrics["logps/best"].tolist() == logps.tolist()


@pytest.mark.parametrize(
    "scores, ended, expected",
    [
        ([1.0, 3.0, 2.0], [1, 1, 1], 1),
        ([1.0, 3.0, 3.0], [1, 1, 1], 1),  # of equals the first
        ([1.0, 3.0, 2.0], [1, 0, 1], 2),  # a cut one is behind all that ended
        ([-9.0, 3.0, 2.0], [1, 0, 0], 0),
        ([1.0, 3.0, 2.0], [0, 0, 0], 1),  # none has ended: the best beginning
        ([-1e30, -2e30, 0.0], [1, 1, 0], 0),
    ],
)
def test_best_of(scores, ended, expected):
    others = (
        [[0.0, 1.0, 0.0]],
        [[True, True, True]],
    )  # what another prompt's answers are is no matter
    found = raft.best_of(
        torch.tensor([scores, *others[0]], dtype=torch.float64),
        torch.tensor([[bool(x) for x in ended], *others[1]]),
    )
    assert found.tolist() == [expected, 1]


# -- whole runs

RAFT = {
    "samples": 4, "kl_coef": 0.0, "temperature": 1.0, "batch_epochs": 2, "minibatches": 2,
    "micro_batch_size": 2, "max_grad_norm": 1.0, "max_length": 52,
}  # fmt: skip
KEPT = 8  # prompts of a stage
UPDATES = 2 * 2 * 2  # micro-batches in a stage: epochs, minibatches, each of two


def values_of(made: Path, **flags) -> dict:  # noqa: F811
    reward = f"{made / 'judge.py'}:letters"
    return SMALL | RAFT | {"dataset": str(made / "prompts.jsonl"), "reward": reward} | flags


@pytest.fixture
def run(made, start_of, plain, monkeypatch, _as_in_a_fresh_process):  # noqa: F811
    """run(folder, **flags) -> the exit status of a whole run in this process."""
    monkeypatch.setitem(OWN, "raft", RAFT)

    def go(folder: str | Path, model: str = "llama", **flags) -> int:
        values = values_of(made, **flags)
        return train(raft, start_of(model), values.pop("dataset"), folder, **values)

    return go


@pytest.fixture
def stages(monkeypatch) -> list[dict]:
    """Of every stage: all answers, what is known of them, the best."""
    seen, show = [], raft.show_stage

    def wrapped(run, everything, known, best, tokenizer):
        seen.append({"rows": everything.rows, "best": best.tolist(), **known})
        show(run, everything, known, best, tokenizer)

    monkeypatch.setattr(raft, "show_stage", wrapped)
    return seen


@pytest.fixture
def learned(monkeypatch) -> list[tuple]:
    """Every answer that a gradient came from, in order: (prompt and targets, its log-prob)."""
    seen, count, loss, micros = [], common.Run.count, raft.raft_loss, []
    monkeypatch.setattr(common.Run, "count", lambda run, m: micros.append(m) or count(run, m))

    def wrapped(logps, lengths):
        micro = micros[-1]
        targets = micro.targets.split(micro.lengths[:, 0].tolist())
        prompts = [
            micro.input_ids[i, : int(end) % micro.input_ids.shape[1] + 1].tolist()
            for i, end in enumerate(micro.ends[:, 0])
        ]
        for whole, target, logp in zip(prompts, targets, logps.tolist(), strict=True):
            seen.append((tuple(whole), tuple(target.tolist()), logp))
        return loss(logps, lengths)

    monkeypatch.setattr(raft, "raft_loss", wrapped)
    return seen


LOGGED = {"loss", "logps/best", "val/different"} | {
    f"{name}{of}"
    for name in ("objective/scores", "length/response", "val/ended")
    for of in ("", "/best")
}


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "qwen2"])
def test_two_stages(run, made, start_of, stages, learned, tmp_path, architecture):  # noqa: F811
    """The best answer of each prompt is what gradients come from, token for token: to one that was
    cut no end is added. Every weight has moved.
    """
    from transformers import AutoModelForCausalLM

    tokenizer, flags = common.load_tokenizer(str(start_of(architecture)), 64), {}
    if architecture == "qwen2":  # a chat template
        read = json_lines(made / "prompts.jsonl")
        ask = [{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in read]
        flags = {"dataset": str(write_jsonl(tmp_path / "asked.jsonl", ask))}
        flags |= {"max_length": 92, "max_prompt_length": 80}
    assert run("out", architecture, max_steps=2, **flags) == 0

    steps = steps_of("out")
    assert [step["step"] for step in steps] == [1, 2]
    assert all(step.keys() >= LOGGED and step["grad_norm"] > 0 for step in steps)
    assert len(learned) == 2 * 2 * KEPT
    for n, (stage, step) in enumerate(zip(stages, steps, strict=True)):
        kept = []
        for i, k in enumerate(stage["best"]):
            own = stage["rows"][4 * i : 4 * i + 4]
            ends = [int(row.responses[0][-1]) in tokenizer.stop_ids for row in own]
            texts = [generation.text_of(row.responses[0], tokenizer) for row in own]
            scores = [letters(text) for text in texts]
            assert stage["objective/scores"][4 * i : 4 * i + 4].tolist() == pytest.approx(scores)
            among = [j for j in range(4) if ends[j]] or range(4)
            assert k == max(among, key=lambda j: (scores[j], -j))
            kept.append(own[k])
        # Each of them once in both epochs, as it was sampled.
        sampled = [tuple(row.responses[0].tolist()) for row in kept]
        whole = [tuple(row.prompt.tolist()) + y for row, y in zip(kept, sampled, strict=True)]
        for epoch in range(2):
            at = (2 * n + epoch) * KEPT
            found = learned[at : at + KEPT]
            assert sorted(x[:2] for x in found) == sorted(zip(whole, sampled, strict=True))
        lengths = [len(y) for y in sampled]
        assert step["length/response/best"] == pytest.approx(sum(lengths) / KEPT)
        scores = stage["objective/scores"]
        assert step["objective/scores"] == pytest.approx(float(scores.mean()))
        best = [4 * i + k for i, k in enumerate(stage["best"])]
        assert step["objective/scores/best"] == pytest.approx(float(scores[best].mean()))
        assert step["objective/scores/best"] > step["objective/scores"]

    before, after = (
        load_file(f / "model.safetensors") for f in (start_of(architecture), Path("out"))
    )
    assert [name for name in before if torch.equal(before[name], after[name])] == []
    model = AutoModelForCausalLM.from_pretrained(start_of(architecture))
    whole, targets, logp = learned[0]  # the first forward pass was the start's
    with torch.no_grad():
        logps = model(torch.tensor([whole])).logits[0].log_softmax(-1)
    expected = sum(logps[-len(targets) - 1 + t, y] for t, y in enumerate(targets))
    assert logp == pytest.approx(float(expected), abs=1e-4)
    lines = json_lines("out/rollouts.jsonl")
    assert [line["step"] for line in lines] == [1] * raft.SHOWN + [2] * raft.SHOWN
    assert all(line["best_score"] == pytest.approx(letters(line["best"])) for line in lines)


beside = common.beside


def test_a_cut_answer_never_gets_an_end(run, start_of, stages, learned):  # noqa: F811
    """With room for two tokens most are cut, and of some prompts all."""
    stop_ids = common.load_tokenizer(str(start_of("llama")), 64).stop_ids
    assert run("out", max_steps=1, max_length=42, max_prompt_length=40) == 0
    (step,), (stage,) = steps_of("out"), stages
    assert 0 < step["val/ended"] < step["val/ended/best"] < 1
    cut = [y for _, y, _ in learned if y[-1] not in stop_ids]
    assert 0 < len(cut) < len(learned) == 2 * KEPT
    assert all(len(y) == 2 and not stop_ids.intersection(y) for y in cut)
    sampled = {tuple(row.responses[0].tolist()) for row in stage["rows"]}
    assert {y for _, y, _ in learned} <= sampled


def test_rank_by_kl(run, stages, start_of):  # noqa: F811
    """From the second stage on; what the policy has come to like ranks lower."""
    assert run("out", max_steps=2, kl_coef=1.0, lr=1e-2) == 0
    steps = steps_of("out")
    assert steps[0]["objective/kl"] == 0 and abs(steps[1]["objective/kl"]) > 0.1
    stage = stages[1]
    scores, ended = stage["objective/scores"].view(KEPT, 4), stage["val/ended"].view(KEPT, 4) > 0
    expected = raft.best_of(scores - stage["objective/kl"].view(KEPT, 4), ended)
    assert stage["best"] == expected.tolist() != raft.best_of(scores, ended).tolist()


@pytest.mark.slow
def test_adapters(run, monkeypatch):
    """The reference is the policy without them: no second language model."""
    loaded, load = [], common.load_policy
    keep = lambda *a, **more: (loaded.append(more["name"]), load(*a, **more))[1]  # noqa: E731
    monkeypatch.setattr(common, "load_policy", keep)
    assert run("out", lora_rank=4, max_steps=2, kl_coef=0.1, lr=1e-2) == 0
    assert loaded == ["policy"]
    steps = steps_of("out")
    assert steps[0]["objective/kl"] == 0 != steps[1]["objective/kl"]
    assert Path("out/adapter/adapter_model.safetensors").is_file()


# -- the same steps for any split over micro-batches and processes

HOT = {"dtype": "float64", "lr": 1e-2, "max_steps": 3, "save_every": 0, "eval_every": 0}
CASES = {"by reward": {"minibatches": 1}, "by reward and KL": {"kl_coef": 0.3}}


@pytest.fixture(scope="module")
def alone(made, start_of, tmp_path_factory):  # noqa: F811
    """alone(case) -> the folder of the hot run by one process, in the largest micro-batches."""
    found: dict[str, Path] = {}

    def get(case: str) -> Path:
        if case not in found:
            folder = tmp_path_factory.mktemp("alone") / "run"
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(folder.parent)
                patch.setitem(OWN, "raft", RAFT)
                patch.setattr(common, "beside", lambda n: None if n == "report" else beside(n))
                flags = HOT | CASES[case]
                flags |= {"micro_batch_size": KEPT // flags.get("minibatches", 2)}
                values = values_of(made, **flags)
                assert train(raft, start_of("llama"), values.pop("dataset"), folder, **values) == 0
            found[case] = folder
        return found[case]

    return get


def assert_same_stages(one: Path, other: str | Path, start: Path) -> None:
    """The weights, the log, and the answers that were shown."""
    begun, ended = load_file(start / "model.safetensors"), load_file(trained(one))
    assert max((begun[n] - ended[n]).abs().max().item() for n in begun) > 0.01  # hot
    assert farthest(trained(one), trained(other)) < 1e-9
    assert_same_log(one, other)
    texts = [[line["best"] for line in json_lines(f"{f}/rollouts.jsonl")] for f in (one, other)]
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    "case", [pytest.param("by reward", marks=pytest.mark.slow), "by reward and KL"]
)
def test_same_stages_with_other_micro_batches(run, alone, start_of, case):  # noqa: F811
    assert run("dealt", **HOT | CASES[case] | {"micro_batch_size": 1}) == 0
    assert_same_stages(alone(case), "dealt", start_of("llama"))


def test_a_local_mean_would_be_seen(run, monkeypatch):
    """Over the tokens of a micro-batch instead of an optimizer step's."""
    loss = raft.raft_loss

    def local(logps, lengths):
        losses, metrics = loss(logps, lengths)
        return losses / lengths.sum() * 10, metrics

    monkeypatch.setattr(raft, "raft_loss", local)
    flags = HOT | {"max_steps": 1, "max_grad_norm": 0.0, "lr": 1e-3}
    for size in (4, 1):
        assert run(f"of-{size}", **flags | {"micro_batch_size": size}) == 0
    assert farthest(trained("of-4", 1), trained("of-1", 1)) > 1e-5


SEVERAL = """
import json, sys
sys.path.insert(0, {root!r})
import torch.distributed as dist
import common, raft
dist.destroy_process_group = lambda: None  # one group for all of these runs
beside = common.beside
common.beside = lambda name: None if name == "report" else beside(name)
for values in json.load(open(sys.argv[1])):
    raft.main(raft.Args(**values))
"""


@pytest.mark.slow
def test_same_stages_with_two_processes(made, start_of, alone, tmp_path):  # noqa: F811
    runs, cases = [], CASES | {"spread": {"fsdp": True, **CASES["by reward"]}}
    for case, flags in cases.items():
        values = values_of(made, **HOT | flags | {"micro_batch_size": 1})
        values |= {"model": str(start_of("llama")), "output_dir": str(tmp_path / case)}
        runs.append(values | {"cache_dir": str(tmp_path / "cache")})
    (tmp_path / "several.py").write_text(SEVERAL.format(root=str(ROOT)))
    (tmp_path / "runs.json").write_text(json.dumps(runs))
    status, _, err = run_script(
        "several.py", str(tmp_path / "runs.json"), processes=2, cwd=tmp_path
    )
    assert status == 0, err
    for case in cases:
        expected = alone(case if case in CASES else "by reward")
        assert_same_stages(expected, tmp_path / case, start_of("llama"))


# -- stopped and started again: the same run as if nothing had happened

GOING_ON = {"max_steps": 4, "eval_every": 0, "kl_coef": 0.1}


@pytest.mark.parametrize("where", ["update", pytest.param("sampling", marks=pytest.mark.slow)])
def test_run_that_broke_goes_on_to_the_same_end(run, monkeypatch, where):
    """In the middle of the third stage, which begins again from the end of the second."""
    assert run("whole", **GOING_ON) == 0
    with monkeypatch.context() as patch:
        if where == "update":
            at_loss_call(patch, raft, 2 * UPDATES + 4, break_down)
        else:
            at_draw(patch, KEPT, 3, break_down)
        with pytest.raises(Broken):
            run("broken", **GOING_ON)
    assert checkpoints_in("broken") == [2]
    assert run("broken", **GOING_ON) == 0
    assert_same_run("whole", "broken")
    lines = [Path(folder, "rollouts.jsonl").read_bytes() for folder in ("whole", "broken")]
    assert lines[0] == lines[1]


# -- what cannot work is said before anything is loaded


@pytest.mark.parametrize(
    "flags, told",
    [
        ({"temperature": 0.0}, "--temperature must be positive"),
        ({"batch_epochs": 0}, "--batch-epochs must be positive"),
        ({"minibatches": -1}, "--minibatches must be positive"),
        ({"kl_coef": math.nan}, "--kl-coef must be 0 or more"),
        ({"samples": 1}, "--samples must be 2 or more"),
        ({"reward": ""}, "--reward is needed"),
        ({"gold_reward": "nowhere.py:score"}, "--gold-reward .* there is no file nowhere.py"),
    ],
)
def test_wrong_flags(run, monkeypatch, flags, told):
    monkeypatch.setattr(common, "load_tokenizer", lambda *_: pytest.fail("loaded"))
    with pytest.raises(common.UserError, match=told):
        run("out", **flags)
