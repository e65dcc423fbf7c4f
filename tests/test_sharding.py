"""--fsdp, --gradient-checkpointing, --compile and several machines: the same steps as without."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import (
    ROOT,
    labelled_rows,
    make_checkpoint,
    make_config,
    make_tokenizer,
    run_script,
    start_script,
    write_jsonl,
)
from safetensors.torch import load_file
from test_train import (
    HOT,
    OWN,
    SMALL,
    _as_in_a_fresh_process,  # noqa: F401 (used by its name)
    as_flags,
    assert_same_log,
    assert_same_run,
    assert_same_weights,
    checkpoints_in,
    farthest,
    kill_all,
    long_run,
    pairs,  # noqa: F401
    plain,  # noqa: F401
    steps_of,
    train,
    wait_for,
)

import common
import dpo
import kto
import sft

METHODS = {"dpo": dpo, "sft": sft}


# -- gradient checkpointing, in one process


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2", "qwen3"])
def test_checkpointing_changes_nothing(checkpoints, pairs, plain, architecture):  # noqa: F811
    start = checkpoints(architecture)
    for on in (False, True):
        flags = HOT | {"micro_batch_size": 4, "gradient_checkpointing": on}
        assert train(dpo, start, pairs, f"again-{on}", **flags) == 0
    assert_same_weights("again-False", "again-True", start)


class OneProcess:
    rank, world, device, lengths = 0, 1, torch.device("cpu"), [64]


def kept_for_backward(policy, micro) -> int:
    """Bytes of activations, each counted once; weights are not."""
    weights = {p.untyped_storage().data_ptr() for p in policy.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logps = common.response_logps(policy, micro)[0]
    logps.sum().backward()
    return sum(kept.values())


def test_checkpointing_keeps_less(checkpoints):
    rng = torch.Generator().manual_seed(0)
    ids = lambda n: torch.randint(3, 300, (n,), generator=rng).int().numpy()  # noqa: E731
    rows = common.Rows("", [common.Row(ids(30), [ids(20), ids(20)], ids(1)) for _ in range(4)])
    kept = {}
    for on in (False, True):
        policy = common.load_policy(
            str(checkpoints("llama")), "float32", OneProcess(), gradient_checkpointing=on
        )
        kept[on] = kept_for_backward(policy, common.collate_for(policy, rows, [0, 1, 2, 3]))
    assert kept[True] < 0.4 * kept[False]


def test_dropout_stays_off_where_activations_are_made_again(tmp_path):
    """Transformers' own checkpointing would want training mode."""
    import transformers as hf

    tokenizer = make_tokenizer("pad-eos")
    config = make_config("gpt2", tokenizer)
    config.attn_pdrop = config.resid_pdrop = config.embd_pdrop = 0.5
    hf.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    policy = common.load_policy(str(tmp_path), "float32", OneProcess(), gradient_checkpointing=True)
    assert not any(module.training for module in policy.modules())
    ids = torch.arange(3, 30).int().numpy()
    rows = common.Rows("", [common.Row(ids, [ids[:7], ids[:5]], ids)])
    once, again = (
        common.response_logps(policy, common.collate_for(policy, rows, [0]))[0] for _ in range(2)
    )
    assert once.requires_grad and torch.equal(once, again)


# -- spread over processes


def run(script: str, folder: Path, start: Path, rows: Path, processes: int, **flags) -> str:
    """What a real run prints; its folder is `folder`."""
    values = SMALL | {"model": start, "dataset": rows, "output_dir": folder}
    values |= OWN[script]
    values |= {"cache_dir": folder.parent / "cache"} | flags
    words = as_flags(**{k: v for k, v in values.items() if not isinstance(v, bool)})
    words += [f"--{k.replace('_', '-')}" for k, v in values.items() if v is True]
    status, out, err = run_script(f"{script}.py", *words, processes=processes)
    assert status == 0, err
    return out


TIED = {"llama": False, "llama-tied": True, "gemma2": True, "gemma2-untied": False}


@pytest.fixture(scope="session")
def heads(tmp_path_factory):
    """heads(name) -> a checkpoint of that architecture, with its head tied or not."""
    import transformers as hf

    made = {}

    def get(name: str) -> Path:
        if name not in made:
            architecture = name.split("-")[0]
            folder = make_checkpoint(architecture, tmp_path_factory.mktemp("heads") / name)
            tokenizer = hf.AutoTokenizer.from_pretrained(folder)
            config = make_config(architecture, tokenizer)
            config.tie_word_embeddings = TIED[name]
            torch.manual_seed(3)
            hf.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
            made[name] = folder
        stored = load_file(made[name] / "model.safetensors")
        assert ("lm_head.weight" in stored) != TIED[name]
        return made[name]

    return get


@pytest.fixture(scope="session")
def alone(heads, tmp_path_factory, pairs):  # noqa: F811
    """alone(name) -> the folder of the hot run by one process, made once."""
    made = {}

    def get(name: str) -> Path:
        if name not in made:
            folder = tmp_path_factory.mktemp("alone") / name
            run("dpo", folder, heads(name), pairs, 1, **HOT | {"micro_batch_size": 2})
            made[name] = folder
        return made[name]

    return get


def assert_same_export(one: Path, other: Path) -> None:
    """To Transformers they are the same model."""
    import transformers as hf

    assert farthest(one / "model.safetensors", other / "model.safetensors") < 1e-6
    ids = torch.arange(3, 40)[None]
    logits = []
    for folder in (one, other):
        model = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        logits.append(model(input_ids=ids).logits)
        config = json.loads((folder / "config.json").read_text())
        assert not config["architectures"][0].startswith("FSDP")
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)


def test_same_weights_spread_over_two(heads, alone, pairs, tmp_path):  # noqa: F811
    """Also: three held-out rows for two processes, so one of them has a stand-in."""
    flags = HOT | {"micro_batch_size": 2, "fsdp": True, "gradient_checkpointing": True}
    out = run("dpo", tmp_path / "spread", heads("gemma2"), pairs, 2, **flags)
    assert "spread over 2 processes, activations made again in the backward pass" in out
    assert_same_weights(alone("gemma2"), tmp_path / "spread", heads("gemma2"))
    assert_same_log(alone("gemma2"), tmp_path / "spread")
    assert_same_export(alone("gemma2"), tmp_path / "spread")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, processes, again",
    [
        ("llama", 2, True),
        ("llama-tied", 2, False),
        ("gemma2-untied", 2, False),
    ],
)
def test_same_weights_spread(heads, alone, pairs, tmp_path, name, processes, again):  # noqa: F811
    flags = HOT | {"micro_batch_size": 2, "fsdp": True, "gradient_checkpointing": again}
    run("dpo", tmp_path / "spread", heads(name), pairs, processes, **flags)
    assert_same_weights(alone(name), tmp_path / "spread", heads(name))
    assert_same_log(alone(name), tmp_path / "spread")
    assert_same_export(alone(name), tmp_path / "spread")


@pytest.mark.slow
def test_kto_spread(checkpoints, plain, tmp_path):  # noqa: F811
    """Passes without a gradient come before those with one, over as many rows on every process."""
    rows = write_jsonl(tmp_path / "labelled.jsonl", labelled_rows(60))
    # Not Gemma 2: its eager softmax is fp32, where another number of threads is enough for 2e-7.
    start, flags = checkpoints("llama"), HOT | {"micro_batch_size": 2, "eval_every": 2}
    assert train(kto, start, rows, tmp_path / "one", **flags) == 0
    run("kto", tmp_path / "two", start, rows, 2, fsdp=True, **flags)
    assert_same_weights(tmp_path / "one", tmp_path / "two", start)
    assert_same_log(tmp_path / "one", tmp_path / "two")
    assert_same_export(tmp_path / "one", tmp_path / "two")
    assert max(step["kl"] for step in steps_of(tmp_path / "one")) > 0.01  # z0 is not always 0


@pytest.mark.slow
@pytest.mark.parametrize("optimizer, processes", [("adamw", 2), ("rmsprop", 2)])
def test_sft_spread(checkpoints, pairs, tmp_path, optimizer, processes):  # noqa: F811
    flags = HOT | {"micro_batch_size": 2, "optimizer": optimizer, "max_grad_norm": 0.5}
    run("sft", tmp_path / "one", checkpoints("gpt2"), pairs, 1, **flags)
    run("sft", tmp_path / "many", checkpoints("gpt2"), pairs, processes, fsdp=True, **flags)
    assert_same_weights(tmp_path / "one", tmp_path / "many", checkpoints("gpt2"))


@pytest.mark.slow
@pytest.mark.parametrize("architecture, lora", [("gemma2", 4)])
def test_low_precision_spread(checkpoints, pairs, tmp_path, architecture, lora):  # noqa: F811
    """bf16 rounds embeddings and norms too where weights are spread; the steps stay close, and the
    first loss is ln 2 to the last digit.
    """
    flags = {"dtype": "bfloat16", "lora_rank": lora, "micro_batch_size": 2, "lr": 1e-3}
    start = checkpoints(architecture)
    run("dpo", tmp_path / "one", start, pairs, 1, **flags)
    run("dpo", tmp_path / "two", start, pairs, 2, fsdp=True, **flags)
    one, two = ([s["loss"] for s in steps_of(tmp_path / folder)] for folder in ("one", "two"))
    assert one[0] == two[0] == pytest.approx(0.6931471805599453, abs=1e-7)
    assert one[-1] < 0.6 and one == pytest.approx(two, abs=0.03)
    weights = load_file(tmp_path / "two" / "checkpoint-6" / "policy.safetensors")
    assert {w.dtype for w in weights.values()} == {torch.float32}
    assert farthest(*(tmp_path / f / "model.safetensors" for f in ("one", "two"))) < 0.02


@pytest.mark.slow
def test_soup_as_reference_spread(checkpoints, heads, pairs, tmp_path):  # noqa: F811
    """A second model that is spread too, and mixed part by part."""
    soup = f"{checkpoints('llama')}+{heads('llama')}"
    flags = HOT | {"micro_batch_size": 2, "ref_model": soup, "soup_weight": 0.25, "lr": 1e-3}
    run("dpo", tmp_path / "one", checkpoints("llama"), pairs, 1, **flags)
    run("dpo", tmp_path / "two", checkpoints("llama"), pairs, 2, fsdp=True, **flags)
    assert abs(steps_of(tmp_path / "one")[0]["loss"] - 0.6931472) > 0.01
    assert_same_log(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
@pytest.mark.parametrize("architecture, processes", [("gemma2", 2)])
def test_killed_spread_run_goes_on_to_the_same_end(
    checkpoints,
    pairs,  # noqa: F811
    tmp_path,
    architecture,
    processes,
):
    start = checkpoints(architecture)
    more = ["--fsdp", *(["--gradient-checkpointing"] if architecture == "gemma2" else [])]
    flags = [*long_run(start, pairs, tmp_path / "whole"), *more]
    status, _, err = run_script("dpo.py", *flags, processes=processes)
    assert status == 0, err
    flags = [*long_run(start, pairs, tmp_path / "killed"), *more]
    process = start_script("dpo.py", *flags, processes=processes)
    wait_for(process, lambda: max(checkpoints_in("killed"), default=0) >= 21)
    kill_all(process)
    assert not Path("killed/summary.txt").exists(), "too late: it had finished"
    status, out, err = run_script("dpo.py", *flags, processes=processes)
    assert status == 0, err
    assert "resume" in out
    assert_same_run("whole", "killed")


@pytest.mark.slow
def test_spread_run_goes_on_in_one_process(checkpoints, pairs, tmp_path):  # noqa: F811
    """A checkpoint holds whole tensors: who goes on with it may be another number."""
    start, flags = checkpoints("llama"), HOT | {"micro_batch_size": 2}
    run("dpo", tmp_path / "whole", start, pairs, 1, **flags)
    for processes, steps, spread in ((4, 2, True), (1, 4, False), (2, 5, True)):
        more = flags | {"max_steps": steps, "fsdp": spread}
        out = run("dpo", tmp_path / "moved", start, pairs, processes, **more)
    assert "step 4 of 5" in out
    assert_same_weights(tmp_path / "whole", tmp_path / "moved", start)


@pytest.mark.slow
def test_signal_to_a_spread_run(checkpoints, pairs, tmp_path):  # noqa: F811
    """Every process hands its parts over before it leaves."""
    flags = [*long_run(checkpoints("llama"), pairs, tmp_path / "out"), "--fsdp"]
    process = start_script("dpo.py", *flags, processes=2)
    wait_for(process, lambda: checkpoints_in("out") != [])
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=300)
    (saved,) = checkpoints_in("out")
    assert common.damage_of(Path(f"out/checkpoint-{saved}")) is None
    assert steps_of("out")[-1]["step"] == saved < 70


@pytest.mark.slow
def test_signal_while_a_spread_model_samples(checkpoints, pairs, tmp_path):  # noqa: F811
    """Its weights are together then, and have to come apart again before they are saved."""
    flags = SMALL | {"lora_rank": 4, "dtype": "bfloat16", "sample_every": 2, "beta": 0.5}
    flags |= {"model": checkpoints("gpt2"), "dataset": pairs, "output_dir": tmp_path / "out"}
    script = tmp_path / "signalled.py"
    script.write_text(
        "import os, signal, sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "import common, dpo, generation\n"
        "whole = generation._generate_batch\n"
        "def signalled(*args):\n"
        "    if common.Run.current.step == 4:\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return whole(*args)\n"
        "generation._generate_batch = signalled\n"
        "dpo.main(common.command_line(dpo.Args, ''))\n"
    )
    words = [*as_flags(**flags), "--fsdp"]
    _, out, err = run_script(script.name, *words, processes=2, cwd=tmp_path)
    assert "stopped: step 4 is saved" in out and 'signalled.py", line' not in err, err
    assert 4 in checkpoints_in(tmp_path / "out")
    assert common.damage_of(tmp_path / "out" / "checkpoint-4") is None
    weights = load_file(tmp_path / "out" / "checkpoint-4" / "policy.safetensors")
    assert {w.dtype for w in weights.values()} == {torch.float32}


def test_mistake_of_another_machine_is_told(monkeypatch, capsys):
    """The main process knows nothing of it."""
    monkeypatch.setattr(common, "MAIN_PROCESS", False)
    monkeypatch.setattr(common.time, "sleep", lambda _: None)
    monkeypatch.setenv("RANK", "3")
    common._show_user_errors(common.UserError, common.UserError("no such folder"), None)
    assert "error on process 3 (" in (told := capsys.readouterr().err)
    assert told.endswith("): no such folder\n")


def test_one_process_has_nothing_to_spread(checkpoints, pairs, plain, capsys):  # noqa: F811
    assert train(dpo, checkpoints("llama"), pairs, "out", fsdp=True, max_steps=1) == 0
    assert "--fsdp: one process, so there is nothing to spread" in capsys.readouterr().out


# -- compiled layers


def test_sampling_uses_up_no_graph(checkpoints, monkeypatch):
    """Else layers would be compiled for every cache of every layer, and training not any more."""
    import generation

    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **more: compiled(f, backend="eager", **more))
    torch._dynamo.reset()
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 64)
    graphs = torch._dynamo.utils.counters["stats"]
    graphs.clear()
    policy = common.load_policy(str(checkpoints("llama")), "float32", OneProcess(), compile=True)
    ids = torch.arange(3, 30).int().numpy()

    class Alone(OneProcess):
        share = staticmethod(lambda parts, label: ((part, True) for part in parts))

    generation.generate(policy, [ids, ids[:9]], frozenset([1]), 6, 0.0, 0, Alone())
    assert graphs["unique_graphs"] == 0
    rows = common.Rows("", [common.Row(ids, [ids[:7], ids[:5]], ids)])
    common.response_logps(policy, common.collate_for(policy, rows, [0]))[0].sum().backward()
    assert graphs["unique_graphs"] >= 1
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["gemma2"])
def test_compiled_layers(checkpoints, pairs, plain, architecture):  # noqa: F811
    start = checkpoints(architecture)
    for on in (False, True):
        flags = {"compile": on, "gradient_checkpointing": on, "max_steps": 4, "save_every": 0}
        assert train(dpo, start, pairs, f"compiled-{on}", **flags) == 0
    losses = [[s["loss"] for s in steps_of(f"compiled-{on}")] for on in (False, True)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4) and losses[0] != losses[1]


# -- several machines


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.mark.slow
@pytest.mark.parametrize("spread", [True])
def test_two_machines_take_the_same_steps_as_one(
    heads,
    alone,
    pairs,  # noqa: F811
    tmp_path,
    spread,
):
    """Two launchers, as on two machines that share a disk."""
    port, start = free_port(), heads("llama")
    values = SMALL | HOT | {"micro_batch_size": 2, "model": start, "dataset": pairs, "beta": 0.5}
    values |= {"output_dir": tmp_path / "both", "cache_dir": tmp_path / "cache"}
    launch = "-m torch.distributed.run --nnodes=2 --nproc_per_node=1".split()
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    started = [
        subprocess.Popen(
            [
                sys.executable, *launch, "--master_addr=127.0.0.1", f"--master_port={port}",
                f"--node_rank={rank}", str(ROOT / "dpo.py"), *as_flags(**values),
                *(["--fsdp"] if spread else []),
            ],
            env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=600) for process in started]
    assert [process.returncode for process in started] == [0, 0], outputs
    assert "run " in outputs[0][0] and outputs[1][0] == ""  # one of them speaks
    assert_same_weights(alone("llama"), tmp_path / "both", start)
    assert_same_log(alone("llama"), tmp_path / "both")
