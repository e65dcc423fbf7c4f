"""The memory plan against the memory that training really takes, and what it says and advises."""

import contextlib
import ctypes
import dataclasses
import gc
import io
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # this file is also what the measured processes run

import common  # noqa: E402
import memory  # noqa: E402

GIB = 2**30


@dataclass
class Flags:
    """As in the method files."""

    model: str = "none"
    dtype: str = "float32"
    optimizer: str = "adamw"
    weight_decay: float = 0.0
    attn: str = "auto"
    share_prompt: bool = True
    fused_logps: bool = True
    fsdp: bool = False
    gradient_checkpointing: bool = False
    compile: bool = False
    lora_rank: int = 0
    micro_batch_size: int = 2
    batch_size: int = 4
    max_length: int = 512
    ref_model: str | None = None
    keep_last: int = 1
    export_dtype: str = "float32"


def rows(many: int = 4, prompt: int = 200, response: int = 40) -> list[common.Row]:
    ids = lambda n: np.arange(n, dtype=np.int32) % 90 + 3  # noqa: E731
    return [common.Row(ids(prompt), [ids(response)] * 2, ids(1)) for _ in range(many)]


# -- a process that trains and measures itself

SHAPES = {
    "llama": dict(
        model_type="llama", hidden_size=512, intermediate_size=1408, num_hidden_layers=6,
        num_attention_heads=8, num_key_value_heads=4, vocab_size=16_000,
    ),
    "gemma2": dict(
        model_type="gemma2", hidden_size=384, intermediate_size=1152, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=96, vocab_size=64_000,
    ),
    "gpt2": dict(model_type="gpt2", n_embd=512, n_layer=6, n_head=8, vocab_size=24_000),
}  # fmt: skip
SMALL = dict(hidden_size=32, intermediate_size=64, vocab_size=200, head_dim=16, n_embd=32)


def config_of(name: str, **more):
    from transformers import AutoConfig

    kept = {k: v for k, v in SHAPES[name].items() if not k.startswith("num_key") or not more}
    return AutoConfig.for_model(**kept | {k: v for k, v in more.items() if k in kept})


def steps(folder: str, flags: Flags, world: int, measured: bool) -> float:
    """Bytes that the resident set grew by."""

    def status(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(x for x in lines if x.startswith(name)).split()[1])

    data = common.Rows("", rows())
    data.ref_logps = torch.zeros(4, 2, dtype=torch.float64)
    place = SimpleNamespace(
        device=torch.device("cpu"), world=world, lengths=[row.tokens() for row in data.rows],
        rank=int(os.environ.get("RANK", "0")), args=flags,
    )  # fmt: skip
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    start = status("VmRSS")
    with contextlib.redirect_stdout(io.StringIO()):
        policy = common.load_policy(
            folder, flags.dtype, place, flags.attn, flags.share_prompt, flags.fused_logps,
            flags.fsdp, flags.gradient_checkpointing, flags.compile, flags.lora_rank,
        )  # fmt: skip
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # pages of the file are not the training's
    optimizer = common.make_optimizer(policy, flags.optimizer, 1e-5, flags.weight_decay)
    trained = [p for p in policy.parameters() if p.requires_grad]
    for _ in range(3):
        for at in range(0, flags.batch_size // world, flags.micro_batch_size):
            picked = list(range(at, at + flags.micro_batch_size))
            logps, _ = common.response_logps(policy, common.collate_for(policy, data, picked))
            logps.sum().backward()
        common.sum_gradients(trained)
        norm = common.whole(nn.utils.get_total_norm([p.grad for p in trained]))
        nn.utils.clip_grads_with_norm_(trained, 1.0, norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return status("VmHWM") - start


def measure(folder: str, text: str) -> None:
    flags, world = Flags(**json.loads(text)), int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1:
        torch.distributed.init_process_group("gloo")
    steps(f"{folder}/small", flags, world, False)  # what is loaded and set up once
    rise = steps(f"{folder}/large", flags, world, True)
    rises = [rise]
    if world > 1:
        rises = [None] * world
        torch.distributed.all_gather_object(rises, rise)
        torch.distributed.barrier()  # as Run.finish: else gloo's threads may end who leaves
        torch.distributed.destroy_process_group()
    if common.MAIN_PROCESS:
        print(json.dumps(rises))


def measured(name: str, flags: Flags, world: int, folder: Path) -> float:
    """Of the fullest process."""
    from transformers import AutoModelForCausalLM

    for size, more in (("large", {}), ("small", SMALL)):
        AutoModelForCausalLM.from_config(config_of(name, **more)).save_pretrained(folder / size)
    launch = [sys.executable]
    if world > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}"]
    # What is freed goes back to the system, so that the next thing is seen to come.
    heap = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(
        [*launch, __file__, str(folder), json.dumps(dataclasses.asdict(flags))],
        env=os.environ | heap | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return max(json.loads(done.stdout.splitlines()[-1]))


# -- planned against measured


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux measures this")
@pytest.mark.parametrize(
    "name, flags, world",
    [
        ("llama", {}, 1),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("llama", {"gradient_checkpointing": True}, 1),
                ("llama", {"optimizer": "rmsprop"}, 1),
                ("llama", {"micro_batch_size": 4}, 1),  # no gradients stand while it goes forward
                ("llama", {"dtype": "bfloat16"}, 1),
                ("llama", {"lora_rank": 8}, 1),
                ("llama", {}, 2),
                ("llama", {"fsdp": True, "lora_rank": 8}, 2),
                ("gemma2", {}, 1),
                ("gemma2", {"fused_logps": False}, 1),
                ("gemma2", {"fsdp": True}, 2),
                ("gemma2", {"fsdp": True, "dtype": "bfloat16"}, 2),
                ("gpt2", {"share_prompt": False}, 1),
            )
        ),
    ],
)
def test_the_plan_is_within_15_percent_of_what_is_measured(name, flags, world, tmp_path):
    if flags.get("lora_rank"):
        pytest.importorskip("peft")
    flags = Flags(**flags)
    real = measured(name, flags, world, tmp_path)
    planned = memory.plan(config_of(name), flags, rows(), world)
    print(f"{name} {world}: measured {real / 2**20:.0f} MiB, planned {planned.total / 2**20:.0f}")
    assert real >= 200 * 2**20  # else it is no longer tensors that count
    assert abs(planned.total - real) <= 0.15 * real


# -- the arithmetic, by hand


def tiny_config(**more):
    return config_of("llama", **dict(SMALL, num_hidden_layers=2) | more)


def parameters_by_hand() -> int:
    h, m, v = 32, 64, 200
    layer = 4 * h * h + 3 * h * m + 2 * h  # q k v o, gate up down, two norms
    return 2 * v * h + 2 * layer + h  # embeddings and head, the last norm


def test_weights_gradients_and_state_are_counted_to_the_byte():
    n = parameters_by_hand()
    for optimizer, states in (("adamw", 2), ("rmsprop", 1)):
        found = memory.plan(tiny_config(), Flags(optimizer=optimizer), rows())
        buffers = found.weights - 4 * n  # inverse frequencies
        counters = found.optimizer - states * 4 * n  # of steps, one a tensor
        assert 0 <= buffers <= 256 and 0 <= counters <= 1024
        assert found.gradients == 4 * n
        assert found.disk == 2 * (1 + states) * 4 * n + 4 * n
        assert found.total == sum(getattr(found, part) for part in memory.Plan.PARTS)


def test_float64_is_twice_as_much():
    one, two = (memory.plan(tiny_config(), Flags(dtype=d), rows()) for d in ("float32", "float64"))
    assert two.gradients == 2 * one.gradients


def test_spread_over_processes_it_is_a_part_each():
    n, world = parameters_by_hand(), 4
    found = memory.plan(tiny_config(), Flags(fsdp=True, batch_size=16), rows(), world)
    assert 4 * n / world <= found.weights <= 4 * n / world + 2048
    assert found.optimizer >= 8 * n / world
    alone = memory.plan(tiny_config(), Flags(), rows())
    assert found.weights + found.optimizer < 0.4 * (alone.weights + alone.optimizer)
    one = memory.plan(tiny_config(), Flags(fsdp=True), rows(), 1)  # nothing to spread over
    assert one.total == alone.total


def test_adapters_alone_have_gradients_and_state():
    pytest.importorskip("peft")
    found = memory.plan(tiny_config(), Flags(lora_rank=4), rows())
    h, m, r = 32, 64, 4
    adapters = 2 * r * (4 * 2 * h + 3 * (h + m))
    assert found.gradients == 4 * adapters
    assert found.weights >= 4 * (parameters_by_hand() + adapters)
    # The exported model has them merged; it is counted beside them, which is next to nothing.
    exported = 4 * (parameters_by_hand() + adapters)
    assert found.disk == 2 * 3 * 4 * adapters + exported


def test_checkpoints_kept_and_the_exported_dtype_count_on_disk():
    n = parameters_by_hand()
    found = memory.plan(tiny_config(), Flags(keep_last=3, export_dtype="bfloat16"), rows())
    assert found.disk == 4 * 12 * n + 2 * n


@pytest.mark.parametrize(
    "script, flags, weights, trained",
    [
        ("ppo", {}, 4, 2),  # policy and value network; reference and reward model
        ("ppo", {"kl_coef": 0.0}, 4, 2),
        ("rloo", {}, 3, 1),
        ("rloo", {"gold_reward": "runs/gold"}, 4, 1),
        ("grpo", {}, 3, 1),
        ("grpo", {"kl_coef": 0.0}, 2, 1),
        ("raft", {}, 3, 1),
        ("raft", {"kl_coef": 0.0, "reward": "family"}, 1, 1),
        ("rso", {}, 1, 1),  # what scores has gone before the first step
    ],
)
def test_models_beside_the_policy_are_counted(script, flags, weights, trained):
    own = {"reward": "runs/reward", "kl_coef": 0.1}
    args = vars(import_module(script).Args()) | dataclasses.asdict(Flags()) | own | flags
    plain = memory.plan(tiny_config(), Flags(), rows())
    found = memory.plan(tiny_config(), SimpleNamespace(**args), rows())
    n = 4 * parameters_by_hand()
    assert found.weights - plain.weights == pytest.approx((weights - 1) * n, abs=512)
    assert found.gradients == trained * plain.gradients
    assert found.optimizer == trained * plain.optimizer


def test_a_reference_model_is_there_before_the_optimizer_is():
    plain = memory.plan(tiny_config(), Flags(), rows())
    asked = memory.plan(tiny_config(), Flags(ref_model="other"), rows())
    assert asked.total >= plain.total
    n = 4 * parameters_by_hand()
    soup = memory.plan(
        tiny_config(), Flags(ref_model="a+b", micro_batch_size=1), rows(1, 2, 1)
    )  # three models and hardly a token: still less than weights, gradients and two states
    assert soup.total >= 4 * n


def test_each_flag_takes_less_than_none():
    plain = memory.plan(tiny_config(), Flags(), rows())
    for less in (
        {"gradient_checkpointing": True},
        {"micro_batch_size": 1},
        {"optimizer": "rmsprop"},
    ):
        assert memory.plan(tiny_config(), Flags(**less), rows()).total < plain.total
    assert memory.plan(tiny_config(), Flags(fused_logps=False), rows()).total > plain.total
    assert memory.plan(tiny_config(), Flags(share_prompt=False), rows()).total > plain.total


def test_on_a_gpu_rmsprop_makes_a_copy_of_all_at_its_step():
    flags = Flags(optimizer="rmsprop", micro_batch_size=1)
    cpu, gpu = (memory.plan(tiny_config(), flags, rows(1, 4, 2), 1, n) for n in (0, 8 * GIB))
    assert gpu.moment == "optimizer step"
    assert gpu.optimizer >= 1.9 * 4 * parameters_by_hand() > cpu.optimizer


PUBLISHED = {
    "gemma-2-2b": 2_614_341_888,
    "tinyllama": 1_100_048_384,
    "eurollm-1.7b": 1_656_850_432,
    "gpt2": 124_439_808,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_written_shapes_have_the_published_sizes(name):
    assert memory._size(memory.shape_of(name)) == PUBLISHED[name]


# -- nothing else is touched


def test_a_plan_leaves_no_trace():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    config = tiny_config()
    before = config.to_dict()
    memory.plan(config, Flags(gradient_checkpointing=True), rows())
    assert torch.equal(torch.rand(2), expected)
    assert config.to_dict() == before
    assert (torch.ones(2) + 1).tolist() == [2.0, 2.0]  # no mode is left on


class Place(SimpleNamespace):
    """As much of a run as the plan looks at."""

    def step_rows(self, step: int) -> list[list[int]]:
        return [[2 * step, 2 * step + 1]]


def place(folder: Path, flags: Flags, data: list[common.Row]) -> tuple[Place, common.Rows]:
    run = Place(
        args=flags, world=1, device=torch.device("cpu"), folder=folder / "runs" / "new",
        lengths=[row.tokens() for row in data], total_steps=len(data) // 2,
    )  # fmt: skip
    return run, common.Rows("", data)


@pytest.fixture
def model(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "TOO_SMALL", 0)
    folder = tmp_path / "model"
    tiny_config().save_pretrained(folder)  # the plan needs no weights
    return str(folder)


def test_what_it_says(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(memory, "machine", lambda _: (22 * GIB, "a GPU", 0))
    memory.tell(*place(tmp_path, Flags(model=model), rows()))
    first, second, third = capsys.readouterr().out.splitlines()
    assert (
        first.startswith("memory     a process needs about 0.0") and "of 22.0 GiB (a GPU)" in first
    )
    assert first.endswith("most in the backward pass:")
    for part in ("weights 0.0", "gradients 0.0", "optimizer 0.0", "activations 0.0"):
        assert part in second
    assert "the run's folder about 0.0" in third and "free" in third


def test_too_little_is_a_warning_with_a_flag(model, tmp_path, capsys, monkeypatch):
    plain = memory.plan(tiny_config(), Flags(), rows()).total
    monkeypatch.setattr(memory, "machine", lambda _: (int(plain * 0.9), "a GPU", 0))
    memory.tell(*place(tmp_path, Flags(model=model), rows()))
    told = capsys.readouterr().out
    assert "warning    more than there is" in told
    assert "GiB with --micro-batch-size 1" in told


def test_of_a_tiny_model_nothing_is_said(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(memory, "TOO_SMALL", 10e6)
    memory.tell(*place(tmp_path, Flags(model=model), rows()))
    assert capsys.readouterr().out == ""


def test_a_plan_that_fails_stops_nothing(tmp_path, capsys):
    memory.tell(*place(tmp_path, Flags(model=str(tmp_path)), rows()))
    assert "memory     could not be planned: " in capsys.readouterr().out


def test_the_longest_row_is_planned_for(tmp_path):
    data = [*rows(6), *rows(1, 400)]  # the last one is in no step
    run, train = place(tmp_path, Flags(), data)
    widest = memory.largest_micro(run, train)
    assert [row.tokens() for row in widest] == [480, 280]
    assert widest[0] is data[-1]


# -- rows of which one response at a time goes through the model, and lists


def row_of(prompt: int, *responses: int) -> common.Row:
    ids = lambda n: np.arange(n, dtype=np.int32) % 90 + 3  # noqa: E731
    return common.Row(ids(prompt), [ids(n) for n in responses], ids(1))


def widest_of(folder: Path, data: list[common.Row], apart: bool) -> list[common.Row]:
    run, train = place(folder, Flags(), data)
    train.apart = apart
    return memory.largest_micro(run, train)


def shape(rows: list[common.Row]) -> list[tuple[int, ...]]:
    return [(len(row.prompt), *map(len, row.responses)) for row in rows]


def test_rows_taken_apart_are_planned_one_response_at_a_time(tmp_path):
    data = [row_of(200, 40, 90), row_of(200, 80, 30), row_of(20, 4, 4), row_of(20, 4, 4)]
    assert shape(widest_of(tmp_path, data, apart=True)) == [(200, 90), (200, 80)]
    assert shape(widest_of(tmp_path, data, apart=False)) == [(200, 40, 90), (200, 80, 30)]
    assert shape(data) == [(200, 40, 90), (200, 80, 30), (20, 4, 4), (20, 4, 4)]  # left as they are


def test_the_longest_of_rows_taken_apart_is_the_longest_pass(tmp_path):
    """Not the row with the most tokens: its two responses are never in memory together."""
    longest, most_tokens = row_of(10, 250, 5), row_of(100, 100, 100)
    assert longest.tokens() < most_tokens.tokens() and longest.length() > most_tokens.length()
    short = row_of(9, 9, 9)
    for data in (
        [longest, most_tokens],
        [most_tokens, short, longest, short],
        [most_tokens, short, short, short, longest],  # in no step that is looked at
    ):
        assert max(row.length() for row in widest_of(tmp_path, data, apart=True)) == 260


def test_one_response_at_a_time_takes_what_rows_of_one_take(tmp_path):
    flags, config = Flags(share_prompt=True), tiny_config()
    two = [row_of(100, 60, 60) for _ in range(4)]
    one = [row_of(100, 60) for _ in range(4)]
    apart = memory.plan(config, flags, widest_of(tmp_path, two, apart=True))
    assert apart == memory.plan(config, flags, one)
    together = memory.plan(config, flags, widest_of(tmp_path, two, apart=False))
    assert apart.activations < together.activations and apart.head < together.head


def test_of_a_list_all_responses_are_in_memory_at_once():
    config, flags = tiny_config(), Flags(share_prompt=False)
    two, eight = (memory.plan(config, flags, [row_of(100, *[40] * k)] * 2) for k in (2, 8))
    assert eight.activations + eight.head > 3 * (two.activations + two.head)
    assert eight.weights == two.weights
    # Where a row is shorter than the longest list, its lines are there all the same.
    ragged = memory.plan(config, flags, [row_of(100, *[40] * 8), row_of(100, 40, 40)])
    assert 3 * two.activations < ragged.activations <= eight.activations


@pytest.mark.parametrize("method", ["kto", "listwise_dpo", "slic"])
def test_every_method_is_told_what_it_takes(method, model, tmp_path, capsys, monkeypatch):
    """With its own flags, and rows as it has them: labels and strangers' answers, lists of two to
    four with scores, pairs with a target.
    """
    module = import_module(method)
    args = module.Args(
        model=model, dtype="float32", optimizer="adamw", micro_batch_size=2, batch_size=4,
        max_length=512, lora_rank=0,
    )  # fmt: skip
    data = {
        "kto": [row_of(60, 20, 30), row_of(50, 9, 40)],
        "listwise_dpo": [row_of(60, 20, 30, 9, 8), row_of(50, 9, 40)],
        "slic": [row_of(60, 20, 30, 9), row_of(50, 9, 40, 9)],
    }[method]
    data = [*data, *rows(2, 9, 9)]
    for row in data:
        row.scores = np.arange(len(row.responses), dtype=float)[::-1]
    monkeypatch.setattr(memory, "machine", lambda _: (22 * GIB, "a GPU", 0))
    run, train = place(tmp_path, args, data)
    train.apart = method == "kto"
    memory.tell(run, train)
    told = capsys.readouterr().out
    assert told.startswith("memory     a process needs about 0.0") and "could not be" not in told
    found = memory.plan(tiny_config(), args, memory.largest_micro(run, train))
    assert f"about {memory._gib(found.total)} of 22.0 GiB" in told
    # For advice, rows are planned again with other flags.
    monkeypatch.setattr(memory, "machine", lambda _: (int(found.total * 0.9), "a GPU", 0))
    memory.tell(run, train)
    told = capsys.readouterr().out
    assert "warning    more than there is" in told and "could not be" not in told


# -- the advice


@pytest.mark.parametrize("share", [0.95, 0.7, 0.5, 0.35])
def test_what_is_advised_fits_when_it_is_planned(share):
    config, flags = tiny_config(), Flags(micro_batch_size=4, batch_size=8, max_length=280)
    have = int(memory.plan(config, flags, rows()).total * share)
    words, found = memory.advice(config, flags, rows(), 1, 0, have)
    given, words = {}, words.split()
    for at, word in enumerate(words):
        if word.startswith("--"):
            value = words[at + 1 :][:1]
            number = bool(value) and value[0].isdigit()
            given[word[2:].replace("-", "_")] = int(value[0]) if number else True
    changed = dataclasses.replace(flags, **given)
    cut = memory._cut(rows(), changed.max_length)
    assert memory.plan(config, changed, cut) == found and found.fits(have)


def test_the_smallest_change_is_named():
    config, flags = tiny_config(), Flags(micro_batch_size=4, batch_size=8)
    total = memory.plan(config, flags, rows()).total
    words, _ = memory.advice(config, flags, rows(), 1, 0, total)
    assert words.endswith(" GiB with --micro-batch-size 2")
    assert memory.advice(config, flags, rows(), 1, 0, 1000) is None


def test_more_gpus_are_named_with_their_launcher():
    # Weights, gradients and state alone are more than there is.
    flags = Flags(micro_batch_size=1, batch_size=8, gradient_checkpointing=True)
    config, data, have = tiny_config(), rows(1, 8, 2), 12 * parameters_by_hand()
    words, _ = memory.advice(config, flags, data, 1, have, have)
    assert "with torchrun --nproc_per_node=" in words and words.endswith(" --fsdp")
    many = int(words.split("=")[1].split()[0])
    spread = dataclasses.replace(flags, fsdp=True)
    assert memory.plan(config, spread, data, many, have).fits(have)
    assert not memory.plan(config, spread, data, many // 2, have).fits(have)


def test_the_next_flag_to_try():
    flags, seen = Flags(micro_batch_size=4), []
    for world, changes in (
        (2, {}),
        (2, {"micro_batch_size": 1}),
        (2, {"gradient_checkpointing": True}),
        (2, {"fsdp": True}),
        (2, {"lora_rank": 16}),
    ):
        flags = dataclasses.replace(flags, **changes)
        seen.append(memory.next_flag(flags, world))
    names = [
        "--micro-batch-size 2",
        "--gradient-checkpointing",
        "--fsdp",
        "--lora-rank",
        "--max-length",
    ]
    assert all(name in text for name, text in zip(names, seen, strict=True))


@pytest.mark.parametrize(
    "error, known",
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (MemoryError(), True),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
            True,
        ),
        (
            RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes"),
            True,
        ),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_counts_as_out_of_memory(error, known):
    assert memory.is_out_of_memory(error) == known


def test_a_real_allocation_that_fails_is_known():
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**50, dtype=torch.uint8)
    assert memory.is_out_of_memory(error.value)


def test_the_script_plans_a_model(model, capsys):
    memory.main(memory.Options(model=model, memory_gib=1.0, cpu=True, dtype="float32"))
    assert "of 1.0 GiB" in capsys.readouterr().out


if __name__ == "__main__":
    measure(*sys.argv[1:])


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried ..."),
        MemoryError(),
    ],
)
@pytest.mark.parametrize("rank", [0, 3])
def test_out_of_memory_ends_with_the_next_flag(error, rank, monkeypatch, capsys):
    """Whichever process it was: that one knows."""
    place = SimpleNamespace(args=Flags(micro_batch_size=4), world=4, rank=rank)
    monkeypatch.setattr(common.Run, "current", place)
    monkeypatch.setattr(common, "MAIN_PROCESS", rank == 0)
    common._show_user_errors(type(error), error, None)
    last = capsys.readouterr().err.splitlines()[-1]
    advice = "--micro-batch-size 2 is the next thing to try"
    assert last == f"error: out of memory on process {rank}: {advice}"


def test_other_errors_do_not_speak_of_memory(monkeypatch, capsys):
    place = SimpleNamespace(args=Flags(), world=1, rank=0)
    monkeypatch.setattr(common.Run, "current", place)
    common._show_user_errors(RuntimeError, RuntimeError("shapes differ"), None)
    told = capsys.readouterr().err
    assert "shapes differ" in told and "memory" not in told
