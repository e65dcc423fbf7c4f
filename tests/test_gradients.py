"""Gradients are summed over processes during the last backward pass of an update."""

import json

import pytest
from conftest import ROOT, pair_rows, run_script, write_jsonl
from whole_runs import SMALL, as_flags, assert_close

HEADER = f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n"

SUMS = """
import json, torch, torch.distributed as dist
from torch import nn
from training import gradients

dist.init_process_group("gloo")
rank, gradients.BUCKET_BYTES = dist.get_rank(), 4 * 20 * 20
torch.manual_seed(0)
layers = nn.ModuleList(nn.Linear(20, 20) for _ in range(6))
layers.append(nn.Linear(20, 20).double())
rare, unused = nn.Parameter(torch.ones(20)), nn.Parameter(torch.ones(20))  # `rare`: by process 1
parameters = [unused, *layers[:3].parameters(), rare, *layers[3:].parameters()]
early, equal = [], True

def backward(update, number):
    torch.manual_seed(100 * update + 10 * number + rank)
    x = torch.randn(5, 20)
    for i, layer in enumerate(layers):
        x = layer(x.to(layer.weight.dtype)).tanh()
        if i == 3 and rank and number != 1:
            x = x * rare
    x.square().sum().backward()

def update(number, passes):
    for p in parameters:
        p.grad = None
    for i in range(passes):
        backward(number, i)

for number, passes in enumerate((3, 3, 1, 3)):
    gradients.backwards = 0  # the sums to expect: nothing is sent early
    update(number, passes)
    expected = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    for g in expected:
        dist.all_reduce(g)
    gradients.backwards = passes
    if gradients._current:
        gradients._current.start()
    update(number, passes)
    early.append(gradients._current.sent if gradients._current else 0)
    gradients.sum_over_processes(nn.ParameterList(parameters))
    equal &= all(torch.equal(p.grad, g) for p, g in zip(parameters, expected))

gradients.backwards = 2
try:
    update(9, 3)
    error = ""
except RuntimeError as caught:
    error = str(caught)
with open(sys.argv[1] + f"/{rank}.json", "w") as file:
    json.dump([early, equal, error, len(gradients._current.buckets)], file)
dist.destroy_process_group()
"""


def test_buckets_are_sent_early_and_the_sums_are_exact(tmp_path):
    """Also of parameters that one process does not use, or none; in the order of the buckets."""
    (tmp_path / "sums.py").write_text(HEADER + SUMS)
    status, _, err = run_script("sums.py", str(tmp_path), processes=2, cwd=tmp_path)
    assert status == 0, err
    for rank in (0, 1):
        early, equal, error, buckets = json.loads((tmp_path / f"{rank}.json").read_text())
        assert equal and buckets == 8
        # The first update finds the buckets. Later, all before that of `rare` go early.
        assert early[0] == 0 and min(early[1:]) >= 3 and max(early[1:]) < buckets
        assert error == "more than 2 backward passes before sum_gradients"


SHARDED = """
import common, dpo
from training import gradients, parallel

hook, passes = gradients.sum_in_last_pass, []

def watched(policy, inputs):
    hook(policy, inputs)
    passes.append(gradients._passes[policy])

gradients.sum_in_last_pass, gradients.fit_whole = watched, lambda needed, run: True
dpo.main(common.parse(dpo.Args, dpo.PRESETS, "", sys.argv[1:]))
assert max(passes) == gradients.backwards == 4, passes
parallel.stop()
"""


@pytest.mark.slow
def test_fsdp_sums_in_the_last_pass(checkpoints, tmp_path):
    """Where whole gradients fit: the same weights as one process."""
    (tmp_path / "sharded.py").write_text(HEADER + SHARDED)
    rows = write_jsonl(tmp_path / "rows.jsonl", pair_rows(40))
    flags = SMALL | {"model": checkpoints("llama"), "dataset": rows, "dtype": "float64"}
    flags |= {"micro_batch_size": 1, "max_steps": 3, "cache_dir": tmp_path / "cache"}
    start = ("dpo.py", *as_flags(**flags, output_dir=tmp_path / "one"))
    assert run_script(*start)[0] == 0
    flags = as_flags(**flags, output_dir=tmp_path / "two")
    status, _, err = run_script("sharded.py", "--fsdp", *flags, processes=2, cwd=tmp_path)
    assert status == 0, err
    assert_close(tmp_path / "one", tmp_path / "two")
