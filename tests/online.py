"""Helpers of the tests of online methods: ragged tables, and whole runs on tiny models."""

import contextlib
import json
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import pair_rows, write_jsonl
from safetensors.torch import load_file, save_file
from torch import Tensor

import grpo
import nlpo
import ppo
import raft
import rloo
from training import evaluation, report, run_folder

# -- ragged tables: the plain loops of the tests go over lists that know of no padding

LENGTHS = (1, 4, 7, 3, 7, 2)  # one token alone, and all of the room
T = max(LENGTHS)
F64 = 1e-12  # relative: a handful of float64 operations
GARBAGE = (1e4, -1e4)  # past the end; exp of it is infinite
Ragged = list[list[float]]


def random_rows(seed: int, mean: float = 0.0, spread: float = 1.0, lengths=LENGTHS) -> Ragged:
    rng = random.Random(seed)
    return [[rng.gauss(mean, spread) for _ in range(n)] for n in lengths]


def moved(rows: Ragged, seed: int, spread: float) -> Ragged:
    rng = random.Random(seed)
    return [[x + rng.gauss(0.0, spread) for x in row] for row in rows]


def table(rows: Ragged, fill: float = 0.0, dtype=torch.float64, room: int = 0) -> Tensor:
    """(N, T), with `fill` past the ends."""
    width = room or max(map(len, rows))
    return torch.tensor([row + [fill] * (width - len(row)) for row in rows], dtype=dtype)


def mask_of(rows: Ragged, room: int = 0) -> Tensor:
    width = room or max(map(len, rows))
    return torch.tensor([[t < len(row) for t in range(width)] for row in rows])


def inside(found: Tensor, rows: Ragged) -> Ragged:
    """The values of real tokens; all others must be 0."""
    cut = [x[: len(row)] for x, row in zip(found.tolist(), rows, strict=True)]
    rest = [y for x, row in zip(found.tolist(), rows, strict=True) for y in x[len(row) :]]
    assert rest == [0.0] * len(rest)
    return cut


def flat(rows: Ragged) -> list[float]:
    return [x for row in rows for x in row]


def column(values: list, dtype=torch.float64) -> Tensor:
    return torch.tensor(values, dtype=dtype)


def mean_of(metric: Tensor | tuple[Tensor, Tensor]) -> float:
    """As a run logs it: a sum over a sum."""
    values, weights = metric if isinstance(metric, tuple) else (metric, torch.ones_like(metric))
    return float(values.detach().double().sum() / weights.double().sum())


# -- whole runs

METHODS = {"ppo": ppo, "nlpo": nlpo, "rloo": rloo, "grpo": grpo, "raft": raft}
SMALL = {
    "batch_size": 8, "micro_batch_size": 4, "max_steps": 6, "epochs": 1.0, "lr": 1e-3,
    "schedule": "constant", "warmup_ratio": 0.0, "dtype": "float32", "max_length": 52,
    "max_prompt_length": 40, "eval_every": 3, "save_every": 2, "temperature": 1.0,
    "max_grad_norm": 1.0, "weight_decay": 0.0,
}  # fmt: skip
OWN = {
    "ppo": {"kl_coef": 0.1, "ppo_epochs": 2, "minibatches": 1, "adam_eps": 1e-8},
    "nlpo": {"kl_coef": 0.1, "ppo_epochs": 2, "adam_eps": 1e-8, "top_p": 0.8, "mask_every": 2},
    "rloo": {"batch_size": 4, "samples": 2, "kl_coef": 0.1, "batch_epochs": 2, "minibatches": 1},
    "grpo": {"batch_size": 4, "samples": 2, "kl_coef": 0.1, "batch_epochs": 2, "clip_high": 0.28},
    "raft": {"samples": 4, "kl_coef": 0.0, "minibatches": 2, "micro_batch_size": 2},
}
# float64 and a large step: differences between two ways to compute a step are seen.
HOT = {"dtype": "float64", "lr": 1e-2, "max_steps": 3, "save_every": 0, "eval_every": 0}
JUDGE = '''
def letters(prompts, responses):
    """The share of letters in a response."""
    return [sum(c.isalpha() for c in text) / max(1, len(text)) for text in responses]


def length(prompts, responses):
    return [float(len(text)) for text in responses]
'''


def letters(text: str) -> float:
    return sum(c.isalpha() for c in text) / max(1, len(text))


@pytest.fixture(scope="session")
def made(tmp_path_factory) -> Path:
    """A folder with 60 prompts, of which about 3 are held out, and a file of rewards."""
    folder = tmp_path_factory.mktemp("online")
    write_jsonl(folder / "prompts.jsonl", [{"prompt": row["prompt"]} for row in pair_rows(60)])
    (folder / "judge.py").write_text(JUDGE)
    return folder


@pytest.fixture(scope="session")
def start_of(checkpoints, made) -> Callable[[str], Path]:
    """start_of(architecture) -> a copy of a checkpoint with many tokens that end a response, so
    that responses of random models end, and differ in length.
    """

    def get(architecture: str) -> Path:
        folder = made / architecture
        if not folder.is_dir():
            shutil.copytree(checkpoints(architecture), folder)
            file = folder / "generation_config.json"
            settings = json.loads(file.read_text()) if file.is_file() else {}
            file.write_text(json.dumps(settings | {"eos_token_id": list(range(30, 60))}))
        return folder

    return get


@pytest.fixture(scope="session")
def reward_model(start_of, made) -> Path:
    """A reward model with a score bias of 0.7."""
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


def moved_copy(start: Path, folder: Path, spread: float) -> Path:
    """The same architecture and tokenizer, with noise on every weight."""
    shutil.copytree(start, folder)
    draw = torch.Generator().manual_seed(11)
    weights = load_file(start / "model.safetensors")
    weights = {n: w + spread * torch.randn(w.shape, generator=draw) for n, w in weights.items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def values_of(method: str, made: Path, **flags) -> dict:
    values = SMALL | OWN[method] | {"dataset": str(made / "prompts.jsonl")}
    return values | {"reward": f"{made / 'judge.py'}:letters"} | flags


@contextlib.contextmanager
def as_in_a_process_of_its_own() -> Iterator[None]:
    """Without curves and greedy samples, which take longer than these runs. Afterwards the folder
    is not locked and signals have their old handlers.
    """
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    lock, locks = run_folder._lock, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "curves", lambda *_: None)
        patch.setattr(evaluation, "greedy_samples", lambda *_: None)
        patch.setattr(run_folder, "_lock", lambda folder: locks.append(lock(folder)) or locks[-1])
        try:
            yield
        finally:
            for file in locks:
                file.close()
            for number, handler in handlers.items():
                signal.signal(number, handler)


def train(method: str, made: Path, model: Path, folder: str | Path, **flags) -> int:
    """A whole run in this process. Its exit status, as the shell would see it."""
    module: ModuleType = METHODS[method]
    values = values_of(method, made, **flags)
    with as_in_a_process_of_its_own():
        try:
            module.main(module.Args(model=str(model), output_dir=str(folder), **values))
        except SystemExit as stop:
            return stop.code
    return 0


def json_lines(file: str | Path) -> list[dict]:
    return [json.loads(line) for line in Path(file).read_text().splitlines()]


def steps_of(folder: str | Path) -> list[dict]:
    return [line for line in json_lines(Path(folder) / "metrics.jsonl") if "lr" in line]
