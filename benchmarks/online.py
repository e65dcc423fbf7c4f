"""Steps of grpo.py and rloo.py against TRL's trainers, sampling against Transformers' generate().

    python -m benchmarks.online                     # GRPO, RLOO, sampling: half an hour on a laptop
    python -m benchmarks.online --parts grpo --model path/to/model --dtype bfloat16

Every side of a round is a process of its own, with the same model, prompts, number of samples and
tokens. Rewards are the lengths of answers, and an answer of random weights never ends early, so all
answers have the same length. The first step is thrown away. Times are those that a run logs; `GiB`
is the peak of the whole process, of the GPU if there is one. TRL runs without gradient
checkpointing, and with as many sequences in a forward pass as we have.

Copyright (c) 2026 the plainpref authors. MIT licence.
"""

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

import common
from benchmarks.measure import print_header, print_table, ratio
from benchmarks.steps import MODELS, save_checkpoint
from sampling.generate import generate

HOME = Path(__file__).resolve().parent.parent
LR, KL = 1e-6, 0.05


@dataclass
class Args:
    parts: tuple[Literal["grpo", "rloo", "sampling"], ...] = ("grpo", "rloo", "sampling")
    model: str = (
        "llama-135m"  # that shape with random weights, another of benchmarks/steps.py, or a folder
    )
    prompts: int = 4  # per step
    samples: int = 4  # answers to each
    prompt_tokens: int = 70
    tokens: int = 32  # of an answer
    rounds: int = 3
    steps: int = 3  # timed steps of a run
    dtype: Literal["float32", "bfloat16"] | None = None  # default: float32, on CUDA bfloat16
    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"
    side: str | None = None  # internal: what a process of its own measures
    folder: str = ""  # internal: the model, the prompts and the reward


def write_files(args: Args, folder: Path) -> None:
    rng, count = np.random.default_rng(0), args.prompts * (args.steps + 1)
    vocab = save_checkpoint(args, folder / "model") if args.model in MODELS else 0
    words = [f"w{i}" for i in range(3, vocab)] or "the cat saw a dog and went home".split()
    rows = [{"prompt": " ".join(rng.choice(words, args.prompt_tokens))} for _ in range(count)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    reward = "def length(prompts, responses):\n    return [float(len(x)) for x in responses]\n"
    (folder / "reward.py").write_text(reward)


def run_side(args: Args, side: str) -> dict[str, Any]:
    """One side of a round, in a process of its own."""
    folder, total = Path(args.folder), args.prompts * args.samples
    model = folder / "model" if args.model in MODELS else args.model
    if side in ("ours grpo", "ours rloo"):
        method = side.split()[1]
        values = {
            "model": model, "dataset": folder / "rows.jsonl", "eval-dataset": folder / "rows.jsonl",
            "reward": f"{folder / 'reward.py'}:length", "samples": args.samples, "kl-coef": KL,
            "batch-size": args.prompts, "micro-batch-size": total, "max-steps": args.steps + 1,
            "lr": LR, "schedule": "constant", "warmup-ratio": 0.0, "dtype": args.dtype,
            "max-length": 512 + args.tokens, "max-prompt-length": 512, "missing-eos": "keep",
            "eval-every": 10**6, "save-every": 0, "output-dir": folder / "run", "resume": "never",
        }  # fmt: skip
        words = [word for name, x in values.items() for word in (f"--{name}", str(x))]
        words += ["--chat-template", "none"]
        subprocess.run(
            [sys.executable, HOME / f"{method}.py", *words], check=True, stdout=subprocess.DEVNULL
        )
        newest = max(folder.glob("run*"), key=lambda path: path.stat().st_mtime)
        lines = map(json.loads, (newest / "metrics.jsonl").read_text().splitlines())
        steps = [line for line in lines if "lr" in line]
        return {
            "seconds": statistics.mean(x["seconds_per_step"] for x in steps[1:]),
            "gib": max(x["peak_memory_gib"] for x in steps),
            "tokens": total * statistics.mean(x["length/response"] for x in steps[1:]),
        }
    command = [sys.executable, "-m", "benchmarks.online", "--side", side]
    for name, value in asdict(args).items():
        if name not in ("side", "parts") and value is not None:
            command += [f"--{name.replace('_', '-')}", str(value)]
    done = subprocess.run(command, cwd=HOME, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure_trl(args: Args, method: str) -> dict[str, Any]:
    import transformers
    import trl  # pip install 'trl>=1.16,<2' accelerate
    from datasets import load_dataset

    folder, total, times = Path(args.folder), args.prompts * args.samples, []

    class Timer(transformers.TrainerCallback):
        def on_step_begin(self, *_, **__) -> None:
            times.append(-time.perf_counter())

        def on_step_end(self, *_, **__) -> None:
            times[-1] += time.perf_counter()

    config, trainer = {
        "grpo": (trl.GRPOConfig, trl.GRPOTrainer), "rloo": (trl.RLOOConfig, trl.RLOOTrainer),
    }[method]  # fmt: skip
    settings = config(
        output_dir=str(folder / "trl"), per_device_train_batch_size=total,
        num_generations=args.samples, max_completion_length=args.tokens, beta=KL,
        learning_rate=LR, lr_scheduler_type="constant", max_steps=args.steps + 1,
        bf16=args.dtype == "bfloat16", use_cpu=args.device == "cpu", logging_steps=1,
        gradient_checkpointing=False, save_strategy="no", report_to="none", disable_tqdm=True,
    )  # fmt: skip
    model = str(folder / "model") if args.model in MODELS else args.model
    run = trainer(
        model=model, args=settings, callbacks=[Timer()],
        reward_funcs=lambda completions, **_: [float(len(x)) for x in completions],
        train_dataset=load_dataset("json", data_files=str(folder / "rows.jsonl"), split="train"),
        processing_class=transformers.AutoTokenizer.from_pretrained(model),
    )  # fmt: skip
    run.train()
    logged = [x for x in run.state.log_history if "completions/mean_length" in x]
    tokens = total * statistics.mean(x["completions/mean_length"] for x in logged[1:])
    return {"seconds": statistics.mean(times[1:]), "gib": peak_gib(), "tokens": tokens}


def measure_sampling(args: Args, side: str) -> dict[str, Any]:
    """Seconds for all tokens; `first`: for one token of each answer."""
    run = common.Processes()
    folder = Path(args.folder)
    settings = common.Args(
        model=str(folder / "model") if args.model in MODELS else args.model, dtype=args.dtype
    )
    policy = common.load_policy(settings, run, frozen=True)
    tokenizer = common.load_tokenizer(settings.model)
    texts = [json.loads(line)["prompt"] for line in open(folder / "rows.jsonl")][: args.prompts]
    prompts = [np.array(tokenizer(text).input_ids, np.int32) for text in texts]

    def ours(tokens: int) -> int:
        made = generate(
            policy, prompts, frozenset(), tokens, 1.0, 0, run, samples=args.samples
        )  # fmt: skip
        return sum(map(len, made))

    def theirs(tokens: int) -> int:
        tokenizer.padding_side = "left"
        inputs = tokenizer(texts, return_tensors="pt", padding=True).to(run.device)
        with policy.autocast():
            made = policy.lm.generate(
                **inputs, do_sample=True, max_new_tokens=tokens, min_new_tokens=tokens, top_k=0,
                num_return_sequences=args.samples, pad_token_id=tokenizer.pad_token_id,
            )  # fmt: skip
        return made[:, inputs.input_ids.shape[1] :].numel()

    sample, found = {"ours": ours, "Transformers": theirs}[side], {}
    sample(2)
    for name, tokens in (("first", 1), ("seconds", args.tokens)):
        start = time.perf_counter()
        found["tokens"] = sample(tokens)
        found[name] = time.perf_counter() - start
    return found | {"gib": peak_gib()}


def peak_gib() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def compare(args: Args, part: str) -> None:
    sides = ["ours", "Transformers"] if part == "sampling" else [f"ours {part}", f"TRL {part}"]
    found: dict[str, list[dict]] = {side: [] for side in sides}
    for _ in range(args.rounds):
        for side in sides:
            found[side].append(run_side(args, side))
    what = "s for all tokens" if part == "sampling" else "s per step"
    lines = [["", what, "x", "GiB", "x", "tokens/s", "s to the first token"]]
    for side, runs in found.items():
        cells = []
        for name in ("seconds", "gib"):
            numbers, base = ([run[name] for run in r] for r in (runs, found[sides[0]]))
            cells += [f"{statistics.median(numbers):.3g}", ratio(numbers, base)]
        cells.append(f"{statistics.median(x['tokens'] / x['seconds'] for x in runs):,.0f}")
        first = [x["first"] for x in runs if "first" in x]
        lines.append([side, *cells, f"{statistics.median(first):.2f}" if first else ""])
    print(f"### {part}")
    print_table(lines)


def main(args: Args) -> None:
    args.dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    if args.side:
        name, _, method = args.side.partition(" ")
        print(json.dumps(measure_trl(args, method) if method else measure_sampling(args, name)))
        return
    print_header(args.device)
    shape = f"{args.prompts} prompts of {args.prompt_tokens} tokens x {args.samples} answers"
    print(f"{args.model}, {args.dtype}, {shape} of {args.tokens} tokens per step\n")
    with tempfile.TemporaryDirectory() as scratch:
        args.folder = scratch
        write_files(args, Path(scratch))
        for part in args.parts:
            compare(args, part)


if __name__ == "__main__":
    main(common.parse(Args, {}, __doc__))
