"""What every method file shares: arguments, rows, batches, log-probs, the run.

A row is a prompt and its K responses; a method is a loss on the (B, K) log-probs of responses.
What a paper specifies is in the method files; what only some runs need is in a folder. This file
and a method file for pairs are enough to train a local model on a .jsonl of texts.

Copyright (c) 2026 the plainpref authors. MIT licence. Tested with torch 2.13, transformers 5.23.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
MAIN_PROCESS = os.environ.get("RANK", "0") == "0"  # the process that prints and writes files
UserError = ValueError  # training/errors.py shows it as one line


def say(label: str, text: str) -> None:
    """Print an aligned line, on the main process only."""
    if MAIN_PROCESS:
        print(f"{label:<11}{text}", flush=True)


def optional_module(name: str) -> Any:
    """A module from a folder next to this file, or None if the folder was not copied."""
    found = (HERE / f"{name.replace('.', '/')}.py").is_file()
    return import_module(name) if found else None


if (parallel := optional_module("training.parallel")) or "WORLD_SIZE" in os.environ:
    from training.parallel import Processes, from_main, sum_over_processes
else:  # one process; several need the folder training/
    from_main, sum_over_processes = (lambda make: make()), (lambda tensor: tensor)

    class Processes:
        rank, world, in_step, default_dtype = 0, 1, False, "float32"
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        stop_if_asked = peak_memory = lambda self: 0.0
        share = lambda self, items, label: ((item, True) for item in items)  # noqa: E731


# -------------------- Arguments
@dataclass
class Args:
    """Flags of every method. A method file adds its own, and the defaults that its paper names."""

    model: str = "tiny"  # tiny, a short name (gemma-2-2b), a hub id, or a folder (runs/sft)
    dataset: str | None = None  # family, a short name (tldr), a file, a folder, or a hub id
    eval_dataset: str | None = None  # held-out rows; default: the test split, else 5 % of the rows
    columns: str | None = None  # rename columns of the rows: prompt=question,chosen=good
    chat_template: Literal["auto", "none"] = "auto"  # auto: texts become chat turns if there is one
    skip_bad_rows: bool = False  # leave out rows that cannot be used, instead of stopping
    max_length: int = 1024  # tokens of prompt and response together
    max_prompt_length: int = 512  # tokens kept of the prompt if the row is too long
    batch_size: int = 64  # rows per optimizer step, over all processes
    micro_batch_size: int = 8  # rows per forward pass and process; lowered to divide the batch
    epochs: float = 1.0  # passes over the rows
    max_steps: int | None = None  # optimizer steps, instead of --epochs
    lr: float = 1e-6  # peak learning rate
    schedule: Literal["constant", "linear", "cosine", "inverse-sqrt"] = "linear"  # after warm-up
    warmup_ratio: float = 0.1  # share of the steps during which the learning rate rises from 0
    optimizer: Literal["adamw", "rmsprop"] = "adamw"  # PyTorch's, with their default betas
    weight_decay: float = 0.0  # on matrices only
    max_grad_norm: float = 1.0  # clip gradients to this norm; 0: never
    dtype: Literal["bfloat16", "float32", "float64"] | None = None  # default: bfloat16 on GPUs
    attn: Literal["auto", "eager", "sdpa", "flex_attention"] = "auto"  # attention implementation
    share_prompt: bool = True  # encode a prompt once for all its responses, where that is cheaper
    fused_logps: bool = True  # compute log-probs with kernels/, without storing the logits
    fsdp: bool = False  # shard weights, gradients and optimizer state over the processes
    gradient_checkpointing: bool = False  # recompute activations in the backward pass: less memory
    compile: bool = False  # torch.compile the layers
    lora_rank: int = 0  # train adapters of this rank (LoRA) instead of all weights; 0: all weights
    output_dir: str | None = None  # default: runs/<script> plus the flags that were set
    resume: Literal["auto", "never"] = "auto"  # auto: continue the folder's run; never: a new one
    eval_every: int = 100  # steps between evaluations; 0: only at the start and the end
    sample_every: int = 0  # steps between greedy samples; 0: only at the start and the end
    save_every: int = 100  # steps between checkpoints; 0: only at the end
    keep_last: int = 1  # number of checkpoints to keep
    export_dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of the exported model
    cache_dir: str | None = None  # tokens, samples and reference log-probs; default: runs/.cache
    track: Literal["none", "wandb", "tensorboard"] = "none"  # also log metrics there
    seed: int = 0  # of the row order and of sampling
    deterministic: bool = False  # use only operations that are reproducible bit for bit


def parse(args_class: type, presets: dict[str, dict], about: str, argv: list | None = None) -> Any:
    """Read the command line. The preset of --model becomes the defaults that --help shows."""
    if arguments := optional_module("training.arguments"):
        return arguments.parse(args_class, presets, about, argv)
    import tyro

    return tyro.cli(args_class, args=argv, description=about)


# -------------------- Rows: a prompt and its responses as token ids
@dataclass
class Row:
    prompt: np.ndarray  # int32; begins with BOS if the tokenizer adds one
    responses: list[np.ndarray]  # K of them (none: to be sampled); EOS at the end unless cut
    question: np.ndarray  # the prompt to sample from; not `prompt` if its tokens are targets too
    scores: np.ndarray | None = None  # float64, one per response; of a labelled row 1 or 0
    key: bytes = b""  # equal for equal prompts
    ref_logps: np.ndarray | None = None  # float64, one per response

    def length(self) -> int:
        return len(self.prompt) + max(map(len, self.responses), default=0)

    def tokens(self) -> int:
        return len(self.prompt) + sum(map(len, self.responses))


def load_rows(args: Any, tokenizer: Any, kind: str, **how: bool) -> tuple[list[Row], list[Row]]:
    """Training and held-out rows of one kind: pair, ranked, labelled, demonstration or prompt."""
    if reader := optional_module("data.rows"):
        return reader.load(args, tokenizer, kind, Row, from_main, **how)
    # Without the folder data/: a .jsonl of texts that fit into --max-length.
    columns = {"pair": ["chosen", "rejected"], "demonstration": ["completion"], "prompt": []}[kind]
    ids, rows = lambda text: tokenizer(text, add_special_tokens=False).input_ids, []
    for line in open(args.dataset, encoding="utf-8"):
        first, *texts = [json.loads(line)[column] for column in ("prompt", *columns)]
        prompt = np.array(tokenizer.bos + ids(first), np.int32)
        assert 0 < len(prompt) < args.max_length, f"empty or too long: {first[:60]!r}"
        responses = [np.array([*ids(text), tokenizer.eos_token_id], np.int32) for text in texts]
        responses = [response[: args.max_length - len(prompt)] for response in responses]
        rows.append(Row(prompt, responses, prompt))
    return rows, []


# -------------------- Tokenizer and policy
def load_tokenizer(model: str, max_length: int = 1) -> Any:
    """The model's tokenizer, with `stop_ids` (all ids that end a response) and `bos`."""
    if models := optional_module("data.models"):
        return models.load_tokenizer(model, max_length)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.stop_ids, first = frozenset({tokenizer.eos_token_id}), tokenizer("a").input_ids[:1]
    tokenizer.bos = first if first == [tokenizer.bos_token_id] else []
    return tokenizer


class Policy(nn.Module):
    """A language model as a function from a batch to the log-probs of its response tokens."""

    auto_class = "AutoModelForCausalLM"

    def __init__(self, lm: nn.Module, compute_dtype: torch.dtype, fused_logps: bool = True):
        super().__init__()
        self.lm, self.config = lm, lm.config
        self.compute_dtype, self.fused_logps, self.share_prompt = compute_dtype, fused_logps, False

    def forward(self, batch: MicroBatch, temperature: float = 1.0) -> Tensor:
        """(B, K, T) log pi of every response token, 0 past the end of a response."""
        with self.autocast():
            if head := optional_module("kernels.head"):  # logits of response tokens only
                hidden = self.hidden_states(batch, batch.target_positions)  # (N, H)
                logps = head.token_logps(self, hidden, batch.targets, temperature)  # (N,)
            else:  # logits of all positions: much memory if the vocabulary is large
                logits = self.lm(input_ids=batch.input_ids, use_cache=False).logits.flatten(0, 1)
                logits = logits[batch.target_positions].float() / temperature  # (N, V)
                logps = -F.cross_entropy(logits, batch.targets, reduction="none")  # (N,)
        return scatter_to_responses(logps, batch)

    def hidden_states(self, batch: MicroBatch, positions: Tensor) -> Tensor:
        """(N, H) last hidden states at these positions of the flattened input_ids."""
        inputs = {"input_ids": batch.input_ids, "use_cache": False}
        if batch.segments is not None:  # else attention is causal and never sees the padding
            shared = optional_module("kernels.shared_prompt")
            inputs |= shared.mask_and_positions(batch, self.lm, self.compute_dtype)
        return self.lm.base_model(**inputs).last_hidden_state.flatten(0, 1)[positions]

    def next_logits(self, **inputs: Any) -> Any:
        """Transformers' own forward pass, for sampling."""
        return self.lm(**inputs)

    def autocast(self) -> Any:
        low = self.compute_dtype.itemsize < 4
        return torch.autocast(self.lm.device.type, self.compute_dtype, enabled=low)


def load_policy(
    args: Any,
    run: Processes,
    model: str | None = None,  # default: args.model
    name: str = "model",
    frozen: bool = False,  # never trained: no gradients, matrices in the compute dtype
    make: type[Policy] = Policy,
) -> Policy:
    """A decoder-only model with fp32 weights (float64 for tests). It is never in training mode:
    with dropout, the policy before its first step would differ from its own reference.
    """
    options = {f.name: getattr(args, f.name, f.default) for f in dataclasses.fields(Args)}
    options |= {"model": model or args.model, "dtype": options["dtype"] or run.default_dtype}
    if loader := optional_module("training.model"):
        return loader.load_policy(options, run, name, frozen, make, from_main)
    if any(options[name] for name in ("lora_rank", "fsdp", "compile", "gradient_checkpointing")):
        raise UserError("--lora-rank, --fsdp, --compile, ... needs the folder training/")
    from transformers import AutoModelForCausalLM

    lm = AutoModelForCausalLM.from_pretrained(options["model"], dtype=torch.float32).eval()
    return make(lm, getattr(torch, options["dtype"])).to(run.device)


# -------------------- Batches and log-probs
@dataclass
class MicroBatch:
    """B prompts with K responses each. One sequence per response, [prompt | y_k | padding]; or with
    a shared prompt (kernels/shared_prompt.py) one per prompt, [prompt | y_1 | ... | y_K | padding].
    """

    input_ids: Tensor  # (B*K, L), or (B, L) with a shared prompt
    segments: Tensor | None  # (B, L) with a shared prompt: 0 in the prompt, k in y_k
    positions: Tensor | None  # (B, L) with a shared prompt
    target_positions: Tensor  # (N,) positions in the flattened input_ids that predict a target
    ends: Tensor  # (B, K) position in the flattened input_ids of a response's last token
    targets: Tensor  # (N,) the response tokens
    output_index: Tensor  # (N,) where each target's value belongs in the flattened (B, K, T)
    lengths: Tensor  # (B, K) response tokens, EOS included; 0: the row has fewer responses
    scores: Tensor  # (B, K) float64; NaN: no such response, or rows without scores
    ref_logps: Tensor  # (B, K) float64; NaN where not computed
    shape: tuple[int, int, int]  # B, K, T: T is the longest response
    indexes: list[int]  # the rows of the data set
    mean_length: float = 0.0  # of the first responses of the whole step, to divide token sums by


@dataclass
class Step:
    """One optimizer step. Counts are over all processes."""

    micro_batches: Iterable[MicroBatch]
    num_rows: int
    num_response_tokens: int
    rows: list[int]  # of all processes


def collate(rows: list[Row], indexes: list[int], device: torch.device, shared_for: Any = None):
    """`shared_for`: the config of a model that gets the layout with a shared prompt."""
    chosen = [rows[i] for i in indexes]
    B, K = len(chosen), max(len(row.responses) for row in chosen)
    T = max(len(response) for row in chosen for response in row.responses)
    lengths, scores, ref_logps = np.zeros((B, K), np.int64), *np.full((2, B, K), np.nan)
    for b, row in enumerate(chosen):
        lengths[b, : len(row.responses)] = [len(response) for response in row.responses]
        for values, into in ((row.scores, scores), (row.ref_logps, ref_logps)):
            if values is not None:
                into[b, : len(values)] = values
    shared = shared_for and optional_module("kernels.shared_prompt")
    width = max(row.tokens() if shared else row.length() for row in chosen)
    width += -width % 64 if device.type == "cuda" else 0  # few widths: kernels are set up for each
    layout = partial(shared.layout, config=shared_for) if shared else plain_layout
    targets = np.concatenate(sum((row.responses for row in chosen), [])).astype(np.int64)
    output_index = np.flatnonzero(np.arange(T) < lengths[..., None])
    arrays = *layout(chosen, K, width), targets, output_index, lengths, scores, ref_logps
    tensors = (None if x is None else torch.from_numpy(x).to(device) for x in arrays)
    if device.type == "cuda" and (transfer := optional_module("training.transfer")):
        tensors = transfer.to_device(arrays, device)
    return MicroBatch(*tensors, (B, K, T), indexes)


def plain_layout(rows: list[Row], K: int, width: int) -> tuple:
    """One sequence per response. Attention is causal, so it never sees the padding on the right."""
    ids = np.zeros((len(rows) * K, width), np.int64)
    target_positions, ends = [], np.zeros((len(rows), K), np.int64)
    for b, row in enumerate(rows):
        for k, response in enumerate(row.responses):
            line, start, end = b * K + k, len(row.prompt), len(row.prompt) + len(response)
            ids[line, :start], ids[line, start:end] = row.prompt, response
            # The token before a response token predicts it.
            target_positions.append(line * width + np.arange(start - 1, end - 1))
            ends[b, k] = line * width + end - 1
    return ids, None, None, np.concatenate(target_positions), ends


def collate_for(policy: Policy, rows: list[Row], indexes: list[int], mean_length: float = 0.0):
    """Collate rows in the layout that is cheaper for this policy."""
    shared = policy.share_prompt and optional_module("kernels.shared_prompt")
    share = shared and shared.sharing_pays([rows[i] for i in indexes], policy.config)
    batch = collate(rows, indexes, policy.lm.device, policy.config if share else None)
    return dataclasses.replace(batch, mean_length=mean_length)


def micro_batches(lengths: list[int], indexes: Iterable[int], size: int) -> list[list[int]]:
    """Group rows of similar length, so that there is little padding."""
    ordered = sorted(indexes, key=lambda i: -lengths[i])
    return [ordered[start : start + size] for start in range(0, len(ordered), size)]


def response_logps(policy: Policy, batch: MicroBatch, temperature: float = 1.0) -> Tensor:
    """(B, K) log pi(y_k | x): sums over response tokens."""
    return policy(batch, temperature).sum(-1)


def scatter_to_responses(values: Tensor, batch: MicroBatch) -> Tensor:
    """(B, K, T) from one value per response token (N,); 0 past the end of a response."""
    flat = values.new_zeros(batch.lengths.numel() * batch.shape[2])
    return flat.index_copy(0, batch.output_index, values).view(batch.shape).clone()  # FSDP: no view


@torch.no_grad()
def compute_logps(policy: Policy, rows: list, parts: list, run: Processes, label: str) -> Tensor:
    """(N, K) float64, on every process: log-probs of the responses of these parts of the rows."""
    found = torch.zeros(len(rows), max([1, *(len(x.responses) for x in rows)])).double()
    for indexes, mine in run.share(parts, label):
        logps = response_logps(policy, collate_for(policy, rows, indexes))  # (B, K)
        if mine:
            found[indexes, : logps.shape[1]] = logps.double().cpu()
    return sum_over_processes(found)


def add_reference_logps(policy: Policy, args: Any, run: Run, *row_sets: list[Row]) -> None:
    """Fill `ref_logps` of the rows (training rows first) that the run will use.

    The reference is the policy before its first step, or --ref-model. It is evaluated once, in the
    micro-batches of training, so that the first loss is what the equation says to the last digit.
    """
    details, reference = optional_module("training.reference"), policy
    if args.ref_model:
        reference = import_module("training.reference").load(args, run, load_policy, policy.config)
    for number, rows in enumerate(row_sets):
        parts = run.held_out_rows(rows) if number else run.used_rows(rows)
        compute = partial(compute_logps, reference, rows, parts, run, "reference")
        logps = details.cached(compute, reference, rows, parts, args, run) if details else compute()
        for i in (i for part in parts for i in part):
            rows[i].ref_logps = logps[i, : len(rows[i].responses)].numpy()


# -------------------- The optimizer step
def make_optimizer(module: nn.Module, args: Any, run: Run, adam_eps: float = 1e-8) -> tuple:
    """The optimizer, with weight decay on matrices only, and its learning rate schedule."""
    trained = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": args.weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]
    if args.optimizer == "rmsprop":
        optimizer = torch.optim.RMSprop(groups, lr=args.lr)
    else:
        optimizer = torch.optim.AdamW(groups, lr=args.lr, eps=adam_eps, fused=True)
    factor = partial(lr_factor, args.schedule, args.warmup_ratio, run.total_steps)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def lr_factor(schedule: str, warmup_ratio: float, total: int, step: int) -> float:
    """The learning rate at `step` (from 0), as a share of the peak."""
    warmup = int(np.ceil(warmup_ratio * total))
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    scale = warmup or 10_000  # as in Transformers: without warm-up, as if after 10,000 steps
    return {
        "constant": 1.0,
        "linear": 1.0 - progress,
        "cosine": 0.5 + 0.5 * float(np.cos(np.pi * progress)),
        "inverse-sqrt": float(np.sqrt(scale / (step + 1 + scale - warmup))),
    }[schedule]


def sum_gradients(module: nn.Module) -> None:
    """Sum over all processes, in a fixed order. (With --fsdp the backward pass has done it.)"""
    if parallel:  # then a missing file must be an error, not a step without a sum
        import_module("training.gradients").sum_over_processes(module)


def clip_gradients(module: nn.Module, max_norm: float) -> Tensor:
    """Scale gradients down to `max_norm` (0: never). Returns the norm before."""
    trained = [p for p in module.parameters() if p.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in trained])
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # with --fsdp
    if max_norm:  # whatever the norm is: the method skips an update that is not finite
        nn.utils.clip_grads_with_norm_(trained, max_norm, norm)
    return norm


# -------------------- The run
class Run(Processes):
    """The order of the rows, metrics, checkpoints, and the exported model."""

    def __init__(self, args: Args):
        super().__init__()
        self.args, self.script = args, Path(sys.modules[type(args).__module__].__file__)
        args.dtype = args.dtype or self.default_dtype
        torch.manual_seed(args.seed)
        self.folder = Path(args.output_dir or f"runs/{self.script.stem}")
        self.step = self.total_steps = self.skipped = 0
        self.saw_nonfinite = False  # an update of this step was skipped
        self.log_sizes: dict[str, int] = {}  # bytes after the last step; a resume removes the rest
        self.sums: dict[str, list] = {}  # metric -> [sum, count] since the last step
        self.state: dict[str, Any] = {}  # what else a method needs after a resume, as JSON
        self.made_from: dict[str, str] = {}  # flag -> digest of what it names: a resume checks it
        self.policy = self.tracker = None
        folders = optional_module("training.run_folder")
        assert folders or args.resume == "auto", "--resume never needs the folder training/"
        if folders:
            folders.start(self)  # checks the arguments, and refuses another run's folder
        self.folder.mkdir(parents=True, exist_ok=True)

    def plan(self, train: list[Row], updates_per_step: int = 1, samples: int = 1) -> None:
        """Set the number of steps. `samples` responses to a row, `updates_per_step` minibatches."""
        args, shares = self.args, self.world * updates_per_step
        if folders := optional_module("training.run_folder"):
            folders.fit_batch_size(args, len(train), shares)
        elif args.batch_size > len(train):
            raise UserError(f"--batch-size {args.batch_size}: there are {len(train)} rows")
        share, most = args.batch_size // shares * samples, args.micro_batch_size
        args.micro_batch_size = max(n for n in range(1, most + 1) if share % n == 0)
        self.steps_per_epoch = len(train) // args.batch_size  # the last, short batch is dropped
        self.total_steps = args.max_steps or max(1, int(args.epochs * self.steps_per_epoch))
        self.lengths = [row.tokens() for row in train]
        if folders:
            folders.planned(self, train)

    def step_rows(self, step: int) -> list[list[int]]:
        """A step's micro-batches. Process r takes those at r, r + world, r + 2 world, ..."""
        epoch, at = divmod(step, self.steps_per_epoch)
        order = np.random.default_rng([self.args.seed, epoch]).permutation(len(self.lengths))
        size = self.args.batch_size
        rows = order[at * size : (at + 1) * size].tolist()
        parts = micro_batches(self.lengths, rows, self.args.micro_batch_size)
        return parallel.snake_order(parts, self.world) if parallel else parts

    def used_rows(self, train: list[Row]) -> list[list[int]]:
        """Every row of the run once, in the micro-batches of the first epoch."""
        first = min(self.total_steps, self.steps_per_epoch)
        parts = [part for step in range(first) for part in self.step_rows(step)]
        if self.total_steps > first:
            rest = sorted({*range(len(train))}.difference(*parts))
            parts += micro_batches(self.lengths, rest, self.args.micro_batch_size)
        return parts

    def held_out_rows(self, held_out: list[Row]) -> list[list[int]]:
        lengths = [row.tokens() for row in held_out]
        return micro_batches(lengths, range(len(held_out)), self.args.micro_batch_size)

    def steps(self, train: list[Row]) -> Iterator[Step]:
        """The optimizer steps that are still to do."""
        while self.step < self.total_steps:
            torch.manual_seed(hash((self.args.seed, self.step, self.rank)))  # no state to save
            parts = self.step_rows(self.step)
            indexes = [i for part in parts for i in part]
            rows = [train[i] for i in indexes]
            mine = parts[self.rank :: self.world]
            mean = float(np.mean([len(row.responses[0]) for row in rows if row.responses] or [0]))
            self.clock = time.perf_counter()
            self.tokens = sum(self.lengths[i] for part in mine for i in part)
            batches = (collate_for(self.policy, train, i, mean) for i in mine)
            tokens = sum(row.tokens() - len(row.prompt) for row in rows)
            yield Step(batches, len(rows), tokens, indexes)

    def record(self, metrics: dict[str, Tensor | tuple[Tensor, Tensor]]) -> None:
        """Values to average over the step; (values, weights) for a weighted mean."""
        for name, value in metrics.items():
            values, weights = value if isinstance(value, tuple) else (value, torch.ones_like(value))
            for i, x in enumerate((values, weights)):  # they stay on the device until the log line
                self.sums.setdefault(name, [0.0, 0.0])[i] += x.detach().double().sum()

    def reduce_metrics(self, *more: float) -> tuple[dict[str, float], list[float]]:
        """Means over all processes, and the sums of `more` over them, in one exchange."""
        names, to = sorted(self.sums), {"dtype": torch.float64, "device": self.device}
        flat = [x for name in names for x in self.sums[name]] + list(more)
        sums = sum_over_processes(torch.stack([torch.as_tensor(x, **to) for x in flat])).tolist()
        self.sums, pairs = {}, zip(names, sums[0::2], sums[1::2], strict=False)
        return {name: total / n for name, total, n in pairs if n}, sums[2 * len(names) :]

    def log(self, record: dict[str, float]) -> None:
        record = {key: x if np.isfinite(x) else None for key, x in record.items()}  # no NaN in JSON
        self.append("metrics.jsonl", [record])
        if self.tracker:
            self.tracker.log(record, self.step)

    def append(self, name: str, records: Iterable[dict]) -> None:
        """Write lines to metrics.jsonl, samples.jsonl or rollouts.jsonl."""
        if MAIN_PROCESS:
            with open(self.folder / name, "a", encoding="utf-8") as file:
                file.writelines(json.dumps(record) + "\n" for record in records)

    def end_step(self, grad_norm: Tensor) -> None:
        """Log; save if it is due; stop after a signal, or if the gradient does not stay finite."""
        metrics, (tokens,) = self.reduce_metrics(self.tokens)
        finite = bool(np.isfinite(norm := float(grad_norm))) and not self.saw_nonfinite
        self.skipped, self.saw_nonfinite = 0 if finite else self.skipped + 1, False
        self.step += 1
        seconds = time.perf_counter() - self.clock
        lr = self.args.lr * self.scheduler.lr_lambdas[0](self.step - 1)
        record = {"step": self.step, "epoch": self.step / self.steps_per_epoch, **metrics}
        record |= {"grad_norm": norm, "lr": lr, "skipped": int(not finite)}
        record |= {"tokens_per_second": tokens / seconds, "seconds_per_step": seconds}
        self.log(record | {"peak_memory_gib": self.peak_memory()})
        if self.skipped == 3:
            steps = f"steps {self.step - 2} to {self.step}"
            raise UserError(f"no finite gradient in {steps}: lower --lr ({self.folder})")
        self.log_sizes = {file.name: file.stat().st_size for file in self.folder.glob("*.jsonl")}
        if self.step == self.total_steps or (finite and self.due(self.args.save_every)):
            self.save()
        self.stop_if_asked()  # after a signal

    def due(self, every: int) -> bool:
        return self.step in (0, self.total_steps) or bool(every and self.step % every == 0)

    @property
    def evaluation_due(self) -> bool:
        return self.due(self.args.eval_every) or self.due(self.args.sample_every)

    def evaluate(self, losses_of: Callable, held_out: list[Row], tokenizer: Any) -> None:
        """The method's own loss and metrics on held-out rows, and greedy samples."""
        if evaluation := optional_module("training.evaluation"):
            evaluation.evaluate(self, losses_of, held_out, tokenizer, collate_for)
        self.clock = time.perf_counter()  # the time of a step is without its evaluation

    def checkpoint_tensors(self) -> dict[str, Tensor]:
        """Trained weights (tied ones once), and the optimizer's state for each of them."""
        names = {p: name for name, p in self.policy.named_parameters()}
        tensors = {f"weight|{name}": p for p, name in names.items() if p.requires_grad}
        for p, state in self.optimizer.state.items():
            tensors |= {f"{key}|{names[p]}": value for key, value in state.items()}
        return tensors

    def save(self) -> None:
        if from_main((self.folder / f"checkpoint-{self.step}").exists):
            return
        full = {}
        for name, tensor in self.checkpoint_tensors().items():  # with --fsdp all take part
            tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
            full |= {name: tensor.detach().cpu().contiguous()} if MAIN_PROCESS else {}
        facts = {"step": self.step, "skipped": self.skipped, "state": self.state}
        facts |= {"logs": self.log_sizes, "made_from": self.made_from}
        if MAIN_PROCESS:
            self.write_checkpoint(full, self.step, json.dumps(facts))  # on GPUs in the background

    def write_checkpoint(self, full: dict[str, Tensor], step: int, facts: str) -> None:
        """Write to a temporary folder and rename it: a checkpoint is complete or absent."""
        temporary = self.folder / "tmp-checkpoint"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        save_file(full, temporary / "state.safetensors")
        (temporary / "state.json").write_text(facts)
        if details := optional_module("training.checkpoint"):
            details.seal(temporary, full)  # checks, checksums, fsync
        temporary.rename(self.folder / f"checkpoint-{step}")
        for old in self.checkpoints()[max(1, self.args.keep_last) :]:
            shutil.rmtree(old)

    def checkpoints(self) -> list[Path]:
        """Newest first."""
        return sorted(self.folder.glob("checkpoint-*"), key=lambda path: -int(path.name[11:]))

    @torch.no_grad()
    def restore(self, policy: nn.Module, optimizer: Any, scheduler: Any) -> None:
        """Continue from the newest checkpoint, if there is one."""
        self.policy, self.optimizer, self.scheduler = policy, optimizer, scheduler
        folders = optional_module("training.run_folder")
        newest = folders.newest if folders else lambda run: next(iter(run.checkpoints()), None)
        if folder := from_main(lambda: newest(self)):  # refuses if made_from differs
            facts = json.loads((folder / "state.json").read_text())
            parameters = dict(policy.named_parameters())
            fsdp = optional_module("training.fsdp") if self.in_step else None
            with safe_open(folder / "state.safetensors", "pt") as saved:
                for key, name in (full_name.split("|", 1) for full_name in saved.keys()):
                    target = p = parameters[name]
                    if key == "step":  # a counter; on the device if the fused kernel counts
                        device = p.device if optimizer.defaults.get("fused") else "cpu"
                        target = optimizer.state[p][key] = torch.zeros((), device=device)
                    elif key != "weight":
                        target = optimizer.state[p][key] = torch.zeros_like(p)
                    value = saved.get_tensor(f"{key}|{name}")
                    fsdp.copy_into(target, value) if fsdp else target.copy_(value)
            self.step, self.skipped, self.state = facts["step"], facts["skipped"], facts["state"]
            self.log_sizes = facts["logs"]
            scheduler.last_epoch = self.step
            for group, factor in zip(optimizer.param_groups, scheduler.lr_lambdas, strict=True):
                group["lr"] = self.args.lr * factor(self.step)
            say("resume", f"step {self.step} of {self.total_steps}, from {folder}")
        if folders:
            folders.ready(self)  # cuts logs, shows progress; a signal now saves

    def finish(self, policy: Policy, tokenizer: Any, measured: dict | None = None) -> None:
        """Export the model, so that plain Transformers loads it, and say what improved."""
        if details := optional_module("training.finish"):
            details.finish(self, policy, tokenizer, measured, load_policy, compute_logps, Row)
        else:
            policy.lm.save_pretrained(self.folder)
            tokenizer.save_pretrained(self.folder)
