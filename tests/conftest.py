"""What the tests stand on: tiny random checkpoints with tokenizers, and small files of rows."""

import json
import os
import random
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # -n: a process a core, each with one thread
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
ARCHITECTURES = ("llama", "gemma2", "gpt2", "qwen2", "qwen3", "mistral", "gpt_neox")
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer(kind: str):
    """A byte-level BPE. `bos`: begins with one; `chat`: a template, no BOS; `pad-eos`: one
    special token for all.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = {
        "bos": ["<s>", "</s>", "<pad>"],
        "chat": ["<|im_start|>", "<|im_end|>", "<|endoftext|>"],
        "pad-eos": ["<|endoftext|>"],
    }[kind]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the cat sat on the mat and the other cat ran"] * 4, trainer)
    if kind == "bos":
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
        )
        names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    elif kind == "chat":
        names = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "chat_template": CHAT}
    else:
        names = dict.fromkeys(("bos_token", "eos_token", "pad_token"), "<|endoftext|>")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **names
    )


TOKENIZER_OF = {
    "llama": "bos",
    "gemma2": "bos",
    "gpt2": "pad-eos",
    "qwen2": "chat",
    "qwen3": "chat",
    "mistral": "bos",
    "gpt_neox": "pad-eos",
}


def make_config(architecture: str, tokenizer):
    import transformers as hf

    shared = {
        "vocab_size": 320,  # more than the tokenizer has, as in many published models
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "initializer_range": 0.1,
    }
    grouped = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
    }
    if architecture == "gpt2":
        return hf.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=128, **shared)
    if architecture == "gpt_neox":
        alone = {k: v for k, v in grouped.items() if k != "num_key_value_heads"}
        return hf.GPTNeoXConfig(rotary_pct=0.25, **alone, **shared)
    if architecture == "gemma2":
        return hf.Gemma2Config(
            head_dim=8, sliding_window=8, final_logit_softcapping=5.0, attn_logit_softcapping=5.0,
            query_pre_attn_scalar=8, **grouped, **shared,
        )  # fmt: skip
    config = {
        "llama": hf.LlamaConfig,
        "qwen2": hf.Qwen2Config,
        "qwen3": hf.Qwen3Config,
        "mistral": hf.MistralConfig,
    }
    more = {"mistral": {"sliding_window": 8}, "qwen3": {"head_dim": 8}}.get(architecture, {})
    return config[architecture](rope_theta=50_000.0, **grouped, **shared, **more)


def make_checkpoint(architecture: str, folder: Path, tokenizer_kind: str | None = None) -> Path:
    from transformers import AutoModelForCausalLM

    tokenizer = make_tokenizer(tokenizer_kind or TOKENIZER_OF[architecture])
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(make_config(architecture, tokenizer))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def fresh_process(tmp_path, monkeypatch):
    """An empty current folder; pytest gets its signal handlers back after a run."""
    monkeypatch.chdir(tmp_path)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """checkpoints(architecture) -> a folder, made once."""
    made: dict[str, Path] = {}

    def get(architecture: str) -> Path:
        if architecture not in made:
            folder = tmp_path_factory.mktemp("models") / architecture
            made[architecture] = make_checkpoint(architecture, folder)
        return made[architecture]

    return get


@contextmanager
def all_float64():
    """Transformers computes norms and the eager softmax in fp32 even in a float64 model, so
    differences below 1e-7 could not be seen. In here float64 stays float64.
    """
    to, softmax = torch.Tensor.to, F.softmax

    def stays(tensor: torch.Tensor, dtype: torch.dtype | None) -> bool:
        return tensor.dtype == torch.float64 and dtype == torch.float32

    def new_to(self, *args, **more):
        wanted = more.get("dtype", args[0] if args else None)
        return self if stays(self, wanted) else to(self, *args, **more)

    def new_softmax(input, dim=None, dtype=None, **more):
        return softmax(input, dim=dim, dtype=None if stays(input, dtype) else dtype, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "to", new_to)
        patch.setattr(torch.Tensor, "float", lambda self: new_to(self, torch.float32))
        patch.setattr(F, "softmax", new_softmax)
        yield


WORDS = "the cat sat on a mat and then another big red dog ran far off into some warm wood".split()


def text(rng: random.Random, least: int, most: int) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(least, most)))


def pair_rows(n: int, seed: int = 0) -> list[dict]:
    """Pairs with a rule to learn: the chosen answer begins with "yes"."""
    rng = random.Random(seed)
    return [
        {
            "prompt": text(rng, 3, 9) + "?",
            "chosen": " yes " + text(rng, 1, 6),
            "rejected": " no " + text(rng, 1, 6),
        }
        for _ in range(n)
    ]


def ranked_rows(n: int, seed: int = 0) -> list[dict]:
    """Lists of 2 to 5 answers, in no order, with ties among the scores 0, 1 and 2, which their
    first words show.
    """
    rng = random.Random(seed)
    rows = []
    for _ in range(n):
        scores = [0, 2, *rng.choices([0, 1, 2], k=rng.randint(0, 3))]
        rng.shuffle(scores)
        words = [("no", "maybe", "yes")[score] for score in scores]
        answers = [f" {word} {WORDS[k]} " + text(rng, 0, 5) for k, word in enumerate(words)]
        rows.append({"prompt": text(rng, 3, 9) + "?", "responses": answers, "scores": scores})
    return rows


def labelled_rows(n: int, seed: int = 0, good: float = 0.5) -> list[dict]:
    """One answer a prompt; `good`: the share of desirable ones."""
    rng = random.Random(seed)
    rows = []
    for _ in range(n):
        label = rng.random() < good
        answer = (" yes " if label else " no ") + text(rng, 1, 6)
        rows.append({"prompt": text(rng, 3, 9) + "?", "completion": answer, "label": label})
    return rows


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def start_script(
    script: str, *flags: str, processes: int = 1, cwd: Path = ROOT, threads: int = 1, **more
) -> subprocess.Popen:
    """A script as a user starts it, with one process or several."""
    launch = [sys.executable]
    if processes > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    env = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    return subprocess.Popen(
        [*launch, str(cwd / script), *map(str, flags)],
        cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more,
    )  # fmt: skip


def run_script(script: str, *flags: str, processes: int = 1, cwd: Path = ROOT, threads: int = 1):
    """(exit status, stdout, stderr) of a whole run."""
    process = start_script(script, *flags, processes=processes, cwd=cwd, threads=threads)
    out, err = process.communicate(timeout=600)
    return process.returncode, out, err
