"""Whole runs of the other methods: two steps, any split of a step, broken runs, special cases."""

import json
import math
import os
import signal
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import ROOT, labelled_rows, pair_rows, ranked_rows, run_script, write_jsonl
from safetensors.torch import load_file
from test_train import (
    HOT,
    OWN,
    SMALL,
    Broken,
    _as_in_a_fresh_process,  # noqa: F401 (used by its name)
    assert_same_log,
    assert_same_run,
    assert_same_weights,
    at_loss_call,
    break_down,
    checkpoints_in,
    farthest,
    in_step,
    lines_of,
    plain,  # noqa: F401
    steps_of,
    train,
)

import common
import cpo
import dpo
import ipo
import kto
import listwise_dpo
import orpo
import pro
import rrhf
import simpo
import slic

METHODS = {
    "cpo": cpo,
    "simpo": simpo,
    "slic": slic,
    "ipo": ipo,
    "orpo": orpo,
    "kto": kto,
    "pro": pro,
    "listwise_dpo": listwise_dpo,
    "rrhf": rrhf,
}
# The others: pairs.
KIND = {"kto": "labelled", "pro": "ranked", "listwise_dpo": "ranked", "rrhf": "ranked"}


def with_targets(rows: list[dict]) -> list[dict]:
    return [
        row | {"target": " perhaps " + row["prompt"][: 3 + i % 20]} for i, row in enumerate(rows)
    ]


@pytest.fixture(scope="session")
def rows(tmp_path_factory):
    """rows(kind) -> a file of 60, of which about 3 are held out."""
    folder = tmp_path_factory.mktemp("rows")
    made = {
        "pairs": pair_rows(60),
        "pairs as lists": [
            {
                "prompt": row["prompt"],
                "responses": [row["rejected"], row["chosen"]],
                "scores": [0, 1],
            }
            for row in pair_rows(60)
        ],
        "targets": with_targets(pair_rows(60)),
        "ranked": ranked_rows(60),
        "labelled": labelled_rows(60),
        "hardly undesirable": labelled_rows(60, good=0.9),
    }
    files = {kind: write_jsonl(folder / f"{kind}.jsonl", made[kind]) for kind in made}
    return files.__getitem__


def kind_of(script: str) -> str:
    return KIND.get(script, "pairs")


# -- two steps of each script, and the folder that they leave


def say(text: str) -> list[dict]:
    return [{"role": "assistant", "content": text.strip()}]


def as_dialogue(row: dict) -> dict:
    """The same row in messages, in the form that its kind is usually published in."""
    ask = [{"role": "user", "content": row["prompt"]}]
    if "chosen" in row:
        return {side: ask + say(row[side]) for side in ("chosen", "rejected")}
    answers = (
        {"responses": [say(answer) for answer in row["responses"]]}
        if "responses" in row
        else {"completion": say(row["completion"])}
    )
    return row | {"prompt": ask} | answers


@pytest.mark.parametrize("script", METHODS)
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "qwen2"])
def test_two_steps(checkpoints, rows, plain, monkeypatch, tmp_path, script, architecture):  # noqa: F811
    """Every weight has moved, and plain Transformers computes with them what was trained."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    policies, load = [], common.load_policy
    monkeypatch.setattr(common, "load_policy", lambda *a: policies.append(load(*a)) or policies[0])
    start, data = checkpoints(architecture), rows(kind_of(script))
    if architecture == "qwen2":
        read = [json.loads(line) for line in data.read_text().splitlines()]
        data = write_jsonl(tmp_path / "dialogues.jsonl", [as_dialogue(row) for row in read])
    flags = {"max_steps": 2, "max_length": 96, "max_prompt_length": 64}
    assert train(METHODS[script], start, data, "out", **flags) == 0

    steps = steps_of("out")
    assert [step["step"] for step in steps] == [1, 2]
    assert all(math.isfinite(step["loss"]) and step["grad_norm"] > 0 for step in steps)
    evaluations = [line["eval/loss"] for line in lines_of("out") if "eval/loss" in line]
    assert len(evaluations) == 2 and all(map(math.isfinite, evaluations))
    before, after = load_file(start / "model.safetensors"), load_file("out/model.safetensors")
    assert before.keys() == after.keys()
    assert [name for name in before if torch.equal(before[name], after[name])] == []

    model = AutoModelForCausalLM.from_pretrained("out")
    ids = torch.arange(3, 63).view(2, 30)  # longer than the sliding windows
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, policies[0](input_ids=ids).logits)
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (start, "out")]
    assert tokenizers[0]("the cat").input_ids == tokenizers[1]("the cat").input_ids
    assert tokenizers[0].chat_template == tokenizers[1].chat_template
    assert json.loads(Path("out/config.json").read_text())["plainpref"]["history"] == [script]


# -- the same steps for any split over micro-batches and processes

CASES = {  # name -> the script, its rows, flags beside OWN
    "cpo": ("cpo", "pairs", {}),
    "simpo": ("simpo", "pairs", {}),
    "slic": ("slic", "pairs", {}),
    "slic against the reference": ("slic", "pairs", {"reference_normalised": True}),
    "slic on targets": ("slic", "targets", {"regularise_on": "target"}),
    "slic on targets, against the reference": (
        "slic",
        "targets",
        {"regularise_on": "target", "reference_normalised": True},
    ),
    "ipo": ("ipo", "pairs", {}),
    "orpo": ("orpo", "pairs", {}),
    "kto": ("kto", "labelled", {}),
    "kto on pairs": ("kto", "pairs", {}),
    "kto with steps of one label": ("kto", "hardly undesirable", {}),
    "pro": ("pro", "ranked", {}),
    "listwise_dpo": ("listwise_dpo", "ranked", {}),
    "rrhf": ("rrhf", "ranked", {}),
}


@pytest.fixture(scope="module")
def alone(checkpoints, rows, tmp_path_factory):
    """alone(case) -> the folder of the hot run by one process with whole steps as micro-batches."""
    made: dict[str, Path] = {}

    def get(case: str) -> Path:
        if case not in made:
            script, kind, flags = CASES[case]
            folder = tmp_path_factory.mktemp("alone") / script
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(folder.parent)
                beside = common.beside
                patch.setattr(common, "beside", lambda n: None if n == "report" else beside(n))
                flags = HOT | {"micro_batch_size": 8} | flags
                assert (
                    train(METHODS[script], checkpoints("llama"), rows(kind), folder, **flags) == 0
                )
            made[case] = folder
        return made[case]

    return get


@pytest.mark.parametrize("case", CASES)
def test_same_steps_with_other_micro_batches(checkpoints, rows, alone, plain, case):  # noqa: F811
    """A z0, a mean length or a list's width that were a micro-batch's own would show here."""
    script, kind, flags = CASES[case]
    start = checkpoints("llama")
    for size in (2, 1) if kind == "ranked" else (2,):  # of one list alone, nothing is padding
        more = HOT | {"micro_batch_size": size} | flags
        assert train(METHODS[script], start, rows(kind), f"of-{size}", **more) == 0
        assert_same_weights(alone(case), f"of-{size}", start)
        assert_same_log(alone(case), f"of-{size}")


def test_the_hot_runs_meet_what_they_are_for(alone):
    """z0 is not clamped to 0 all the time, and steps with and without undesirable rows occur."""
    for case in CASES:
        if case.startswith("kto"):
            assert sum(step["kl"] > 0.01 for step in steps_of(alone(case))) >= 2, case
    both = ["rewards/rejected" in step for step in steps_of(alone("kto with steps of one label"))]
    assert True in both and False in both
    active = [step["active"] for step in steps_of(alone("slic"))]
    assert any(0 < share < 1 for share in active)  # pairs on both sides of the hinge


LOCAL = {  # script -> a line, and what it would be if a micro-batch were all there is
    "kto": (
        "losses, metrics = losses_of(micro, kl)\n            # Divided",
        "losses, metrics = losses_of(micro, kl_of([(micro, True)]))\n            # Divided",
    ),
    "cpo": ("micro.mean_length", "lengths[:, 0].double().mean().item()"),
    "simpo": ("micro.mean_length", "lengths[:, 0].double().mean().item()"),
}


@pytest.mark.parametrize("script", LOCAL)
def test_a_local_mean_would_be_seen(
    checkpoints,
    rows,
    alone,
    plain,  # noqa: F811
    monkeypatch,
    tmp_path,
    script,
):
    """With the mistake put in, whole steps stay as they are and smaller micro-batches do not."""
    right, wrong = LOCAL[script]
    source = (ROOT / f"{script}.py").read_text()
    assert source.count(right) == 1
    file = tmp_path / f"{script}.py"
    file.write_text(source.replace(right, wrong))
    method, start = load_script(file, monkeypatch), checkpoints("llama")
    for size in (8, 2):
        flags = HOT | {"micro_batch_size": size}
        assert train(method, start, rows(kind_of(script)), f"of-{size}", **flags) == 0
    assert_same_weights(alone(script), "of-8", start)
    whole, dealt = (Path(f"of-{size}/checkpoint-5/policy.safetensors") for size in (8, 2))
    assert farthest(whole, dealt) > 1e-4


def load_script(file: Path, monkeypatch) -> ModuleType:
    """A file as a module of its name."""
    spec = spec_from_file_location(file.stem, file)
    module = module_from_spec(spec)
    monkeypatch.setitem(sys.modules, file.stem, module)  # dataclasses look there
    spec.loader.exec_module(module)
    return module


SEVERAL = """
import importlib, json, sys
sys.path.insert(0, {root!r})
import torch.distributed as dist
import common
dist.destroy_process_group = lambda: None  # one group for all of these runs
beside = common.beside
common.beside = lambda name: None if name == "report" else beside(name)
for script, values in json.load(open(sys.argv[1])):
    method = importlib.import_module(script)
    method.main(method.Args(**values))
"""


@pytest.fixture(scope="module")
def spread(checkpoints, rows, tmp_path_factory):
    """spread(processes) -> where that many processes have made the hot run of every case, with one
    start of them all: it takes longer than their runs.
    """
    made: dict[int, Path] = {}

    def get(processes: int) -> Path:
        if processes not in made:
            folder = tmp_path_factory.mktemp(f"by-{processes}")
            runs = []
            for case, (script, kind, flags) in CASES.items():
                values = SMALL | OWN[script] | HOT | {"micro_batch_size": 1} | flags
                values |= {"model": str(checkpoints("llama")), "dataset": str(rows(kind))}
                values |= {"output_dir": str(folder / case), "cache_dir": str(folder / "cache")}
                runs.append([script, values])
            (folder / "several.py").write_text(SEVERAL.format(root=str(ROOT)))
            (folder / "runs.json").write_text(json.dumps(runs))
            status, _, err = run_script(
                "several.py", folder / "runs.json", processes=processes, cwd=folder
            )
            assert status == 0, err
            made[processes] = folder
        return made[processes]

    return get


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2])  # test_train.py and test_ppo.py have four
@pytest.mark.parametrize("case", CASES)
def test_same_steps_with_other_numbers_of_processes(checkpoints, alone, spread, case, processes):
    folder = spread(processes) / case
    assert json.loads((folder / "run.json").read_text())["processes"] == processes
    assert_same_weights(alone(case), folder, checkpoints("llama"))
    assert_same_log(alone(case), folder)


# -- stopped and started again: the same run as if nothing had happened

BREAKS = {  # step, flags, checkpoints that are there then
    # From step 2, over the evaluation at 3 once more.
    "before an evaluation": (4, {}, [2]),
    # From step 3, which was evaluated before the run broke, and is evaluated again.
    "at an evaluation": (4, {"save_every": 3}, [3]),
    # From step 4, with no evaluation before the last.
    "after an evaluation": (6, {}, [4]),
}


@pytest.mark.parametrize(
    "script, when",
    [*((script, "before an evaluation") for script in METHODS)]
    + [("kto", "at an evaluation"), ("kto", "after an evaluation")],
)
def test_run_that_broke_goes_on_to_the_same_end(
    checkpoints,
    rows,
    plain,  # noqa: F811
    monkeypatch,
    script,
    when,
):
    method, start, data = METHODS[script], checkpoints("llama"), rows(kind_of(script))
    step, flags, there = BREAKS[when]
    train(method, start, data, "whole", **flags)
    with monkeypatch.context() as patch:
        at_loss_call(patch, method, in_step(step) + 1, break_down)  # between two micro-batches
        with pytest.raises(Broken):
            train(method, start, data, "broken", **flags)
    assert checkpoints_in("broken") == there
    assert train(method, start, data, "broken", **flags) == 0
    assert_same_run("whole", "broken")


def test_signal_while_kto_asks_for_its_kl(checkpoints, rows, plain, monkeypatch, capsys):  # noqa: F811
    """In the pass over the mismatched answers: of a step, and of the evaluation after it."""
    start, data = checkpoints("llama"), rows("labelled")
    train(kto, start, data, "whole")
    # Evaluations have a pass too: that of step 0 is the first, that of step 3 the fifth.
    for number, saved in ((4, 3), (5, 3), (6, 4)):
        with monkeypatch.context() as patch:
            original, calls = common.over_processes, []

            def asked(tensor, number=number, original=original, calls=calls):
                calls.append(None)
                if len(calls) == number:
                    os.kill(os.getpid(), signal.SIGTERM)
                return original(tensor)

            patch.setattr(common, "over_processes", asked)
            assert train(kto, start, data, f"stopped-{number}") == 128 + signal.SIGTERM
        assert saved in checkpoints_in(f"stopped-{number}")
        assert f"step {saved} is saved in stopped-{number}" in capsys.readouterr().out
        assert train(kto, start, data, f"stopped-{number}") == 0
        assert_same_run("whole", f"stopped-{number}")


# -- one method is another one's special case


def losses_of(folder: str) -> list[float]:
    return [line.get("loss", line.get("eval/loss")) for line in lines_of(folder)]


def test_listwise_dpo_on_pairs_is_dpo(checkpoints, rows, plain):  # noqa: F811
    start, flags = checkpoints("llama"), HOT | {"max_grad_norm": 1.0}  # their tables differ in it
    assert train(dpo, start, rows("pairs"), "pairs", **flags) == 0
    for kind in ("pairs", "pairs as lists"):
        assert train(listwise_dpo, start, rows(kind), f"lists of {kind}", **flags) == 0
        assert_same_weights("pairs", f"lists of {kind}", start)
        assert losses_of(f"lists of {kind}") == pytest.approx(losses_of("pairs"), rel=1e-9)


def test_pro_takes_a_pair_for_a_list_with_scores_1_and_0(checkpoints, rows, plain):  # noqa: F811
    start = checkpoints("llama")
    for kind in ("pairs", "pairs as lists"):
        assert train(pro, start, rows(kind), kind, **HOT) == 0
    assert_same_weights("pairs", "pairs as lists", start)
    assert_same_log("pairs", "pairs as lists")


def test_temperatures_come_from_the_scores(checkpoints, rows, plain):  # noqa: F811
    """Scores 1 and 0 give the temperature 1, as if there were none; half of them give another."""
    start = checkpoints("llama")
    for name, flags in {
        "gaps of 1": {"score_scale": 1.0},
        "none": {"score_temperatures": False, "score_scale": 0.5},
        "gaps of a half": {"score_scale": 0.5},
    }.items():
        assert train(pro, start, rows("pairs"), name, **HOT | flags) == 0
    assert_same_weights("gaps of 1", "none", start)
    assert abs(losses_of("gaps of a half")[0] - losses_of("none")[0]) > 1e-3


def test_orpo_is_for_base_models(checkpoints, rows, plain, monkeypatch):  # noqa: F811
    """Every other method on pairs warns of one."""
    warned = []
    monkeypatch.setattr(common, "warn_if_not_fine_tuned", lambda *_: warned.append(True))
    for method, times in ((orpo, 0), (ipo, 1)):
        name = method.__name__
        assert train(method, checkpoints("llama"), rows("pairs"), name, max_steps=1) == 0
        assert len(warned) == times
