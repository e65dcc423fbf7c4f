"""What takes part in bench.py: a short DPO run of ours, and one of TRL's DPOTrainer.

Both start from the same checkpoint of random weights and go through the same rows in the same
batches.

Copyright (c) 2026 the plainpref authors. MIT licence.
"""

from __future__ import annotations

import contextlib
import io
import statistics
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from statistics import NormalDist
from types import SimpleNamespace
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

import common
import dpo
from benchmarking.measure import Watch
from memory import SHAPES

BETA, LR, CLIP = 0.1, 1e-4, 1.0
SPREAD = 0.4  # of the logarithm of lengths
PROFILES = {"tldr": (360, 38), "ultrafeedback": (160, 280), "family": (50, 16)}  # medians
MODELS = {
    "cpu-small": dict(
        model_type="llama", hidden_size=288, intermediate_size=768, num_hidden_layers=6,
        num_attention_heads=6, vocab_size=32_000,
    ),
    "toy": dict(
        model_type="llama", hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, vocab_size=500,
    ),
    **SHAPES,
    "gpt2": SHAPES["gpt2"] | {"n_positions": 2048},  # for longer rows
}  # fmt: skip


@dataclass
class Options:
    profiles: tuple[Literal[*PROFILES], ...] = tuple(PROFILES)  # lengths of prompts and responses
    model: Literal[*MODELS] | None = None  # default: cpu-small, on CUDA gemma-2-2b
    rounds: int = 3  # of which medians are taken
    steps: int = 3  # timed ones in each run
    pairs: int | None = None  # prompts a step, in one forward; default: 4, on CUDA 8
    dtype: Literal["float32", "bfloat16"] | None = None  # default: float32, bfloat16 on CUDA
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # cpu or cuda
    attn: str = "auto"  # attention of ours, as in dpo.py
    trl_attn: str | None = None  # attn_implementation of TRL's; default: Transformers' choice
    only: Literal["trl", "switches", "ranked"] | None = None  # one of the three parts
    markdown: str | None = None  # also write what is printed to this file


# -- the same weights and rows for all


def save_checkpoint(args: Options, folder: Path) -> int:
    """Random weights, and a tokenizer that reads `w7 w9` as 7 9, because TRL wants text. Returns
    the size of the vocabulary.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast, logging

    logging.disable_progress_bar()
    config = AutoConfig.for_model(**MODELS[args.model])
    torch.manual_seed(0)
    with torch.device(args.device):
        policy = AutoModelForCausalLM.from_config(config)
    policy.to(getattr(torch, args.dtype)).save_pretrained(folder)  # all load it in float32
    words = {"<pad>": 0, "<unk>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, config.vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(folder)
    return config.vocab_size


def make_rows(profile: str, many: int, responses: int, vocab: int) -> common.Rows:
    """Random ids. The lengths are quantiles of a log-normal distribution, evenly spaced and
    shuffled, so that a few rows have the profile's medians too.
    """
    rng, spread = np.random.default_rng(0), NormalDist(0, SPREAD)

    def draw(median: int, n: int) -> list[np.ndarray]:
        lengths = [median * np.exp(spread.inv_cdf((i + 0.5) / n)) for i in range(n)]
        return [rng.integers(3, vocab, round(x)).astype(np.int32) for x in rng.permutation(lengths)]

    prompts, answers = draw(PROFILES[profile][0], many), []
    for answer in draw(PROFILES[profile][1], many * responses):
        answer[-1] = 2  # EOS
        answers.append(answer)
    return common.Rows(
        profile,
        [common.Row(x, answers[i * responses :][:responses], x) for i, x in enumerate(prompts)],
    )


def as_text(rows: common.Rows) -> list[dict[str, str]]:
    def text(ids: np.ndarray) -> str:
        return " ".join("</s>" if i == 2 else f"w{i}" for i in ids)

    return [
        {"prompt": text(row.prompt)}
        | {k: " " + text(y) for k, y in zip(("chosen", "rejected"), row.responses, strict=True)}
        for row in rows.rows
    ]


# -- one short run of each


@dataclass
class Steps:
    """What a short run gave. Sizes are means of its steps."""

    attention: str
    losses: list[float]
    chosen: list[float]  # log-prob of the first response, mean of a step
    seconds: float  # a timed step
    rise: float  # MB, in the last step
    held: float  # MB
    places: float  # positions that went through the model, of which
    filled: float  # were no padding, and
    useful: float  # were needed: each prompt once, and its responses
    flops: float = 0.0  # useful ones, of a timed step


def megabytes(models: list[nn.Module], optimizer: torch.optim.Optimizer) -> float:
    tensors = [p for model in models for p in model.parameters()]
    tensors += [x for state in optimizer.state.values() for x in state.values()]
    return sum(x.nbytes for x in tensors if isinstance(x, Tensor)) / 1e6


def pair_losses(logps: Tensor, ref_logps: Tensor) -> Tensor:
    return dpo.dpo_loss(*logps.unbind(1), *ref_logps.unbind(1), beta=BETA)[0]


def list_losses(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """-log probability of the given order under Plackett-Luce, best first."""
    rewards = BETA * (logps - ref_logps)  # (B, K)
    rest = rewards.flip(1).logcumsumexp(1).flip(1)  # (B, K) of this one and all worse ones
    return (rest - rewards).sum(1)


def run_ours(
    folder: Path,
    rows: common.Rows,
    args: Options,
    losses_of: Callable[[Tensor, Tensor], Tensor] = pair_losses,
    share: bool = True,
    fused: bool = True,
) -> Steps:
    place = SimpleNamespace(
        device=torch.device(args.device), world=1, lengths=[row.tokens() for row in rows.rows]
    )
    with contextlib.redirect_stdout(io.StringIO()):
        policy = common.load_policy(str(folder), args.dtype, place, args.attn, share, fused)
    assert policy.share_prompt == share  # else the model refused, and "shared" would be a lie
    optimizer = common.make_optimizer(policy, "adamw", LR, 0.0)
    parameters = list(policy.parameters())
    batches = [list(range(at, at + args.pairs)) for at in range(0, len(rows), args.pairs)]
    asked, trained = (Watch(len(batches) - 1, args.device) for _ in range(2))
    rows.ref_logps = torch.zeros(len(rows), len(rows.rows[0].responses), dtype=torch.float64)
    for indexes in batches:
        asked.begin()
        with torch.no_grad():
            logps, _ = common.response_logps(policy, common.collate_for(policy, rows, indexes))
        rows.ref_logps[indexes] = logps.double().cpu()
        asked.end()
    losses, chosen, places, filled = [], [], 0, 0
    for indexes in batches:
        trained.begin()
        micro = common.collate_for(policy, rows, indexes)
        logps, _ = common.response_logps(policy, micro)
        step = losses_of(logps, micro.ref_logps.to(logps.dtype)).mean()
        step.backward()
        norm = nn.utils.get_total_norm([p.grad for p in parameters])
        nn.utils.clip_grads_with_norm_(parameters, CLIP, norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(step.item())
        chosen.append(logps[:, 0].mean().item())
        trained.end()
        places, filled = places + micro.input_ids.numel(), filled + micro.filled
    n, timed = len(batches), common.Rows("", rows.rows[args.pairs : -args.pairs])
    return Steps(
        policy.config._attn_implementation,
        losses,
        chosen,
        statistics.mean(asked.seconds) + statistics.mean(trained.seconds),
        max(asked.peak.mb, trained.peak.mb),
        megabytes([policy], optimizer),
        places / n,
        filled / n,
        sum(row.tokens() for row in rows.rows) / n,
        useful_flops(policy, timed) / (n - 2),
    )


def run_trl(folder: Path, rows: common.Rows, args: Options, checkpointing: bool = False) -> Steps:
    import transformers
    from datasets import Dataset, disable_progress_bars

    try:
        trl = import_module("trl")
        DPOTrainer = trl.DPOTrainer  # TRL imports it now
    except (ImportError, RuntimeError) as error:
        line = "pip install 'trl>=1.16,<2' accelerate (or --only ranked)"
        raise common.UserError(f"TRL's DPOTrainer cannot be imported ({error}): {line}") from None
    disable_progress_bars()
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore", FutureWarning)  # names of TRL's that Transformers will drop
    batches = [rows.rows[at : at + args.pairs] for at in range(0, len(rows), args.pairs)]
    watch = Watch(len(batches) - 1, args.device)

    class Timer(transformers.TrainerCallback):
        def on_step_begin(self, *_, **__) -> None:
            watch.begin()

        def on_step_end(self, *_, **__) -> None:
            watch.end()

    with contextlib.redirect_stdout(io.StringIO()), tempfile.TemporaryDirectory() as scratch:
        config = trl.DPOConfig(
            output_dir=scratch, per_device_train_batch_size=args.pairs, max_steps=len(batches),
            train_sampling_strategy="sequential", max_length=None, beta=BETA, learning_rate=LR,
            lr_scheduler_type="constant", warmup_steps=0, weight_decay=0.0, max_grad_norm=CLIP,
            bf16=args.dtype == "bfloat16", use_cpu=args.device == "cpu", logging_steps=1,
            gradient_checkpointing=checkpointing, save_strategy="no", report_to="none",
            disable_tqdm=True,
            model_init_kwargs={"attn_implementation": args.trl_attn} if args.trl_attn else None,
        )  # fmt: skip
        trainer = DPOTrainer(
            model=str(folder), args=config, train_dataset=Dataset.from_list(as_text(rows)),
            processing_class=transformers.AutoTokenizer.from_pretrained(folder),
            callbacks=[Timer()],
        )  # fmt: skip
        for row, theirs in zip(rows.rows, trainer.train_dataset, strict=True):
            ids = [row.prompt.tolist(), *(y.tolist() for y in row.responses)]
            assert ids == [theirs[k] for k in ("prompt_ids", "chosen_ids", "rejected_ids")]
        trainer.train()
    n, per_batch = len(batches), [2 * len(b) * max(row.length() for row in b) for b in batches]
    logged = [entry for entry in trainer.state.log_history if "rewards/margins" in entry]
    return Steps(
        trainer.model.config._attn_implementation,
        *([entry[name] for entry in logged] for name in ("loss", "logps/chosen")),
        statistics.mean(watch.seconds),
        watch.peak.mb,
        megabytes([trainer.model, trainer.ref_model], trainer.optimizer),
        sum(per_batch) / n,
        sum(len(row.prompt) + len(y) for row in rows.rows for y in row.responses) / n,
        sum(row.tokens() for row in rows.rows) / n,
    )


def useful_flops(policy: nn.Module, rows: common.Rows) -> float:
    """2 for each weight of the body and each token (a prompt once), 2 V H for each scored token, 4
    for each dimension, layer and pair of tokens of which one sees the other: that is a forward.
    Times 4: the reference's, the policy's, and twice as much backward.
    """
    head, config = policy.get_output_embeddings().weight, policy.config
    tables = {id(m.weight) for m in policy.modules() if isinstance(m, nn.Embedding)} | {id(head)}
    body = sum(p.numel() for p in policy.parameters() if id(p) not in tables)
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    scored = sum(len(y) for row in rows.rows for y in row.responses)
    seen = 0
    for row in rows.rows:
        prompt = len(row.prompt)
        seen += prompt * (prompt + 1) / 2
        seen += sum(len(y) * prompt + len(y) * (len(y) + 1) / 2 for y in row.responses)
    tokens = sum(row.tokens() for row in rows.rows)
    layers = config.num_hidden_layers
    return 4 * (2 * body * tokens + 2 * head.numel() * scored + 4 * width * layers * seen)
