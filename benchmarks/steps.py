"""Whole DPO steps: ours and TRL's DPOTrainer, with the same random weights, rows and batches.

    python -m benchmarks.steps --rounds 3 --steps 2                 # minutes on a laptop
    python -m benchmarks.steps --part ranked --profiles tldr --rounds 5 --steps 2
    python -m benchmarks.steps --device cuda --model gemma-2-2b --pairs 8 > steps.md

A step is forward, backward, clipping and AdamW. Ours computes reference log-probs once, before
training; the time of that pass is added to the row's step, as in a run of one epoch. TRL computes
them within the step. TRL pads a batch before its clock starts; ours does it within. TRL runs as it
comes, without truncation or gradient checkpointing, and with a constant learning rate.

Each round has a short run of each side from the same weights. Its first step is thrown away, the
last measures memory, the others are timed. Without equal losses in all steps there is no table.
`rises` is how far memory rises during a step, `tokens` what goes through the model.

Copyright (c) 2026 the plainpref authors. MIT licence.
"""

import contextlib
import gc
import io
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import NormalDist
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import common
from benchmarks.measure import Peak, print_header, print_table, ratio

BETA, LR, CLIP = 0.1, 1e-4, 1.0
PROFILES = {"tldr": (360, 38), "ultrafeedback": (160, 280), "family": (50, 16)}  # median lengths
MODELS = {
    "cpu-small": dict(
        model_type="llama", hidden_size=288, intermediate_size=768, num_hidden_layers=6,
        num_attention_heads=6, vocab_size=32_000,
    ),
    "toy": dict(
        model_type="llama", hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, vocab_size=500,
    ),
    "llama-135m": dict(  # the shape of SmolLM2-135M
        model_type="llama", hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, vocab_size=49_152, tie_word_embeddings=True,
    ),
    "gemma-2-2b": dict(
        model_type="gemma2", hidden_size=2304, intermediate_size=9216, num_hidden_layers=26,
        num_attention_heads=8, num_key_value_heads=4, head_dim=256, vocab_size=256_000,
    ),
}  # fmt: skip
AGREE = {"float32": 1e-4, "bfloat16": 0.05}  # losses may differ by this


@dataclass
class Args:
    profiles: tuple[Literal[*PROFILES], ...] = tuple(PROFILES)  # lengths of prompts and responses
    part: Literal["trl", "pairs", "ranked"] = (
        "trl"  # the last two: ours with and without its switches
    )
    model: Literal[*MODELS] = "cpu-small"
    rounds: int = 3
    steps: int = 3  # timed steps of a run
    pairs: int = 4  # prompts per step, in one forward pass
    dtype: Literal["float32", "bfloat16"] | None = None  # default: float32, on CUDA bfloat16
    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass
class Steps:
    """A short run. Call `begin` and `end` around each step."""

    device: str
    last: int  # step that measures memory
    times: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    rises: float = 0.0  # MB
    tokens: float = 0.0

    def now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def begin(self) -> None:
        self.peak = Peak(self.device) if len(self.times) == self.last else None
        self.start = self.now()

    def end(self) -> None:
        self.times.append(self.now() - self.start)
        self.rises = self.peak.rise() if self.peak else 0.0


def save_checkpoint(args: Args, folder: Path) -> int:
    """Random weights, and a tokenizer that reads `w7 w9` as 7 9. Returns the vocabulary's size."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast, logging

    logging.disable_progress_bar()
    config = AutoConfig.for_model(**MODELS[args.model])
    torch.manual_seed(0)
    with torch.device(args.device):
        lm = AutoModelForCausalLM.from_config(config)
    lm.to(getattr(torch, args.dtype)).save_pretrained(folder)  # both sides load it in float32
    words = {"<pad>": 0, "<unk>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, config.vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return config.vocab_size


def make_rows(profile: str, count: int, K: int, vocab: int) -> list[common.Row]:
    """Random ids. Lengths are quantiles of a log-normal distribution, evenly spaced and shuffled,
    so that a few rows have the medians of the profile too.
    """
    rng, spread = np.random.default_rng(0), NormalDist(0, 0.4)

    def draw(median: int, n: int) -> list[np.ndarray]:
        lengths = [median * np.exp(spread.inv_cdf((i + 0.5) / n)) for i in range(n)]
        return [rng.integers(3, vocab, round(x)).astype(np.int32) for x in rng.permutation(lengths)]

    prompts, responses = draw(PROFILES[profile][0], count), draw(PROFILES[profile][1], count * K)
    for response in responses:
        response[-1] = 2  # EOS
    return [common.Row(x, responses[i * K :][:K], x) for i, x in enumerate(prompts)]


def pair_losses(logps: Tensor, ref_logps: Tensor) -> Tensor:
    rewards = BETA * (logps - ref_logps)  # (B, 2)
    return -F.logsigmoid(rewards[:, 0] - rewards[:, 1])


def list_losses(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """-log probability of the given order under Plackett-Luce, best first."""
    rewards = BETA * (logps - ref_logps)  # (B, K)
    rest = rewards.flip(1).logcumsumexp(1).flip(1)  # of each response and all worse ones
    return (rest - rewards).sum(1)


def run_ours(
    folder: Path, rows: list[common.Row], args: Args, losses_of: Callable = pair_losses, **switches
) -> Steps:
    batches = [list(range(at, at + args.pairs)) for at in range(0, len(rows), args.pairs)]
    how = {"lr": LR, "schedule": "constant", "warmup_ratio": 0.0, **switches}
    settings = common.Args(model=str(folder), dtype=args.dtype, **how)
    run = common.Processes()
    run.device, run.total_steps = torch.device(args.device), len(batches)
    run.lengths = [row.tokens() for row in rows]
    with contextlib.redirect_stdout(io.StringIO()):
        policy = common.load_policy(settings, run)
    assert policy.share_prompt == settings.share_prompt  # the model did not refuse it
    optimizer, scheduler = common.make_optimizer(policy, settings, run)
    reference, steps = (Steps(args.device, len(batches) - 1) for _ in range(2))
    for indexes in batches:
        reference.begin()
        with torch.no_grad():
            logps = common.response_logps(policy, common.collate_for(policy, rows, indexes))
        for i, values in zip(indexes, logps.double().cpu().numpy(), strict=True):
            rows[i].ref_logps = values
        reference.end()
    for indexes in batches:
        steps.begin()
        batch = common.collate_for(policy, rows, indexes)
        logps = common.response_logps(policy, batch)  # (B, K)
        loss = losses_of(logps, batch.ref_logps.to(logps.dtype)).mean()
        loss.backward()
        common.sum_gradients(policy)
        if common.clip_gradients(policy, CLIP).isfinite():
            optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        steps.losses.append(loss.item())
        steps.end()
        steps.tokens += batch.input_ids.numel() / len(batches)
    steps.times = [a + b for a, b in zip(steps.times, reference.times, strict=True)]
    steps.rises = max(steps.rises, reference.rises)
    return steps


def run_trl(folder: Path, rows: list[common.Row], args: Args) -> Steps:
    import transformers
    from datasets import Dataset, disable_progress_bars
    from trl import DPOConfig, DPOTrainer  # pip install 'trl>=1.16,<2' accelerate

    disable_progress_bars()
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore", FutureWarning)
    names = ("prompt", "chosen", "rejected")
    ids = [[row.prompt.tolist(), *(y.tolist() for y in row.responses)] for row in rows]
    text = lambda tokens: " " + " ".join("</s>" if i == 2 else f"w{i}" for i in tokens)  # noqa: E731
    texts = [dict(zip(names, map(text, row), strict=True)) for row in ids]
    batches = [rows[at : at + args.pairs] for at in range(0, len(rows), args.pairs)]
    steps = Steps(args.device, len(batches) - 1)

    class Timer(transformers.TrainerCallback):
        def on_step_begin(self, *_, **__) -> None:
            steps.begin()

        def on_step_end(self, *_, **__) -> None:
            steps.end()

    with contextlib.redirect_stdout(io.StringIO()), tempfile.TemporaryDirectory() as scratch:
        config = DPOConfig(
            output_dir=scratch, per_device_train_batch_size=args.pairs, max_steps=len(batches),
            train_sampling_strategy="sequential", max_length=None, beta=BETA, learning_rate=LR,
            lr_scheduler_type="constant", warmup_steps=0, weight_decay=0.0, max_grad_norm=CLIP,
            bf16=args.dtype == "bfloat16", use_cpu=args.device == "cpu", logging_steps=1,
            gradient_checkpointing=False, save_strategy="no", report_to="none",
            disable_tqdm=True,
        )  # fmt: skip
        trainer = DPOTrainer(
            model=str(folder), args=config, train_dataset=Dataset.from_list(texts),
            processing_class=transformers.AutoTokenizer.from_pretrained(folder),
            callbacks=[Timer()],
        )  # fmt: skip
        for row, theirs in zip(ids, trainer.train_dataset, strict=True):
            assert row == [theirs[f"{name}_ids"] for name in names]
        trainer.train()
    steps.losses = [x["loss"] for x in trainer.state.log_history if "rewards/margins" in x]
    steps.tokens = statistics.mean(2 * len(x) * max(row.length() for row in x) for x in batches)
    return steps


def compare(runs: dict[str, Callable[[], Steps]], args: Args) -> None:
    """Each run in turn, and a table."""
    found: dict[str, list[Steps]] = {name: [] for name in runs}
    for _ in range(args.rounds):
        for name, run in runs.items():
            found[name].append(run())
            gc.collect()
            torch.cuda.empty_cache()
    times = {n: [statistics.mean(x.times[1:-1]) for x in steps] for n, steps in found.items()}
    memory = {name: [run.rises for run in steps] for name, steps in found.items()}
    lines = [["", "s per step", "x", "rises MB", "x", "tokens"]]
    for name, steps in found.items():
        difference = np.abs(np.subtract(steps[0].losses, found["ours"][0].losses)).max()
        print(f"- losses of {name} differ from ours by at most {difference:.1e}")
        if not difference <= AGREE[args.dtype]:
            raise SystemExit("they differ: that is not the same work")
        seconds, rises = times[name], memory[name]
        cells = [f"{statistics.median(seconds):.3g}", ratio(seconds, times["ours"])]
        cells += [f"{statistics.median(rises):,.0f}", ratio(rises, memory["ours"])]
        lines.append([name, *cells, f"{steps[0].tokens:,.0f}"])
    print_table(lines)


def main(args: Args) -> None:
    args.dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    print_header(args.device)
    print(f"{args.model} with random weights, {args.dtype}, {args.pairs} prompts per step\n")
    with tempfile.TemporaryDirectory() as scratch:
        vocab = save_checkpoint(args, Path(scratch))
        for profile in args.profiles:
            for K in (4, 8) if args.part == "ranked" else (2,):
                rows = make_rows(profile, (args.steps + 2) * args.pairs, K, vocab)
                losses_of = list_losses if args.part == "ranked" else pair_losses
                runs = {"ours": partial(run_ours, Path(scratch), rows, args, losses_of)}
                if args.part == "trl":
                    runs["TRL"] = partial(run_trl, Path(scratch), rows, args)
                else:
                    runs["--no-share-prompt"] = partial(runs["ours"], share_prompt=False)
                    runs["--no-fused-logps"] = partial(runs["ours"], fused_logps=False)
                prompt, response = PROFILES[profile]
                print(f"### {profile}: {K} responses of {response} tokens, prompts of {prompt}\n")
                compare(runs, args)


if __name__ == "__main__":
    main(common.parse(Args, {}, __doc__))
