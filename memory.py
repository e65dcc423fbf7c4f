"""The memory plan: what a process will hold at its fullest, told before anything is loaded.

Nothing is estimated by rules of thumb. A step (forward, backward, sum of gradients, optimizer) goes
through the model that the config describes and through the code of training, with tensors that have
shapes and no contents; every storage is followed from its first tensor to its last one, and the
fullest moment is kept. What only the device knows is added: the inner tiles of kernels/, the
buffers of collectives. Checked against measured peaks in tests/test_memory.py.

    python memory.py                                     # a table: four models, three machines
    python memory.py --model runs/sft --memory-gib 24 --processes 4 --fsdp

Copyright (c) 2026 the plainpref authors. MIT licence. Tested with torch 2.13 and transformers 5.23.
"""

from __future__ import annotations

import copy
import dataclasses
import os
import shutil
import weakref
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import common

GIB = 2**30
TOO_SMALL = 10e6  # parameters of a model that fits everywhere
SPARE = 0.95  # of what is free may be planned away: allocators leave gaps


@dataclass
class Plan:
    """Bytes of one process at its fullest moment, and on disk."""

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    head: int = 0  # from the last hidden states to log-probs, and back
    working: int = 0  # low copies of weights, weights put together (--fsdp), buffers of exchanges
    moment: str = ""
    disk: int = 0  # of the run's folder: checkpoints, one more while it is written, the model

    PARTS = ("weights", "gradients", "optimizer", "activations", "head", "working")

    @property
    def total(self) -> int:
        return sum(getattr(self, part) for part in self.PARTS)

    def fits(self, have: int | None) -> bool:
        return have is None or self.total <= SPARE * have

    def lines(self, have: int | None, name: str, free_disk: int | None = None) -> list[str]:
        parts = [f"{part} {_gib(getattr(self, part))}" for part in self.PARTS if self._told(part)]
        of = f"of {_gib(have)} GiB ({name})" if have is not None else "GiB"
        disk = f"the run's folder about {_gib(self.disk)} GiB"
        if free_disk is not None:
            disk += f" of {_gib(free_disk)} free" + ": too little" * (free_disk < self.disk)
        return [f"a process needs about {_gib(self.total)} {of}, most in the {self.moment}:",
                ", ".join(parts), disk]  # fmt: skip

    def _told(self, part: str) -> bool:
        return getattr(self, part) >= self.total / 200


def _gib(size: int) -> str:
    return f"{size / GIB:.1f}" if size >= GIB / 10 else f"{size / GIB:.2g}"


# -- a step without contents


class Live(TorchDispatchMode):
    """Sees every operation, and keeps how much was alive at the fullest moment, by kind."""

    def __init__(self, gpu: int):
        super().__init__()
        self.gpu, self.kind, self.moment, self.in_place = gpu, "activations", "", False
        self.known: dict[int, tuple[int, str]] = {}  # of a storage: bytes, kind
        self.now, self.peak, self.kept = Counter(), (0, {}, ""), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out, kind = func(*args, **(kwargs or {})), self.kind
        if func is torch.ops.aten._to_copy.default:
            of_weight = self.known.get(id(args[0].untyped_storage()), (0, ""))[1] == "weights"
            kind = "working" if of_weight else kind  # autocast's copies
        # Two gradients of one tensor: added up in place, but for tensors without contents.
        joined = func is torch.ops.aten.add.Tensor and not torch.is_grad_enabled()
        self.in_place = joined and self.moment == "backward pass"
        self.know((x for x in tree_leaves(out) if isinstance(x, Tensor)), kind, False)
        self.in_place = False
        if func.namespace == "plainpref":
            self.inside_head(func is torch.ops.plainpref.token_logps.default, args, out)
        return out

    def know(self, tensors: Any, kind: str, again: bool = True, nbytes: int | None = None) -> None:
        """From now on, or if `again` as another kind than so far."""
        for storage in (tensor.untyped_storage() for tensor in tensors):
            key = id(storage)
            if key not in self.known:
                weakref.finalize(storage, self.gone, key)
            elif not again:
                continue
            else:
                self.gone(key)
            self.known[key] = (storage.nbytes() if nbytes is None else nbytes, kind)
            self.hold(kind, self.known[key][0])

    def gone(self, key: int) -> None:
        size, kind = self.known.pop(key)
        self.now[kind] -= size

    def hold(self, kind: str, size: int) -> None:
        self.now[kind] += size
        if (total := self.now.total()) > self.peak[0] and not self.in_place:
            self.peak = (total, dict(self.now), self.moment)

    def pass_by(self, kind: str, size: int) -> None:
        self.hold(kind, size)
        self.hold(kind, -size)

    def inside_head(self, forward: bool, args: tuple, out: Any) -> None:
        """What kernels/token_logps.py holds while it runs, and on a GPU what else it keeps."""
        kernels = common.beside("kernels.token_logps")
        hidden, weight = args[:2] if forward else args[2:4]
        (tokens, width), cap = hidden.shape, args[5 if forward else 7]
        rows, columns = kernels.tile_shape(tokens, SimpleNamespace(is_cuda=bool(self.gpu)))
        columns, low = min(columns, len(weight)), hidden.itemsize < 4
        inside = 0 if forward else tokens * columns * (hidden.itemsize if self.gpu else 4)
        if self.gpu or forward:
            inside += rows * columns * 4
        if not forward:
            inside += tokens * width * 4  # dh
            inside += 0 if self.gpu or not cap else tokens * columns * 4  # log p
        if low and not self.gpu:  # products in fp32
            inside += (tokens + columns * (1 if forward else 2)) * width * 4
        self.pass_by("head", inside)
        if self.gpu and forward and args[8] is None:
            room = min(self.gpu // 16, tokens * len(weight) * hidden.itemsize)
            self.kept = room - out[4].nbytes
            self.hold("head", self.kept)
        elif self.gpu and not forward:
            self.hold("head", -self.kept)
            self.kept = 0


class Spread:
    """What --fsdp puts together, hands on and cuts up again, as far as it takes memory."""

    def __init__(self, live: Live, policy: nn.Module, world: int, stored: dict):
        self.live, self.world = live, world
        layers = common.layers_of(policy)
        inner = {p for layer in layers for p in layer.parameters()}
        rest = [p for p in policy.parameters() if p not in inner]
        self.parts = [*(list(layer.parameters()) for layer in layers), rest]
        self.sizes = [sum(p.nbytes for p in part) for part in self.parts]
        self.here, self.gathered, self.reduced = set(), 0, 0
        self.shards = {}
        for p in policy.parameters():
            shape = (-(-p.shape[0] // world), *p.shape[1:])
            shard = torch.empty(shape, dtype=stored[p])
            self.shards[p] = nn.Parameter(shard, requires_grad=p.requires_grad)
        for i, layer in enumerate(layers):
            layer.register_forward_pre_hook(lambda *_, i=i: self.gather(i))
            layer.register_forward_hook(lambda _, x, out, i=i: self.leave(i, out))

    def gather(self, i: int) -> None:
        if i in self.here:
            return
        self.live.hold("working", self.sizes[i])  # as it comes, beside the one before
        self.live.hold("working", -self.gathered)
        self.live.hold("working", self.sizes[i])  # as it is used
        self.gathered = self.sizes[i]
        self.here.add(i)

    def release(self, i: int) -> None:
        if i in self.here:
            self.live.hold("working", -self.sizes[i])
            self.here.remove(i)

    def leave(self, i: int, out: Any) -> None:
        self.release(i)
        out = out[0] if isinstance(out, tuple) else out
        if out.requires_grad:
            out.register_hook(lambda _: self.back(i))

    def back(self, i: int) -> None:
        """The gradient has come to the end of layer i."""
        if i + 2 < len(self.parts):
            self.reduce(i + 1)
        self.gather(i)

    def reduce(self, i: int) -> None:
        """Unsharded gradients become this process's part of their sum."""
        self.release(i)
        trained = [p for p in self.parts[i] if p.grad is not None]
        self.live.hold("working", -self.reduced)
        self.reduced = sum(p.numel() * self.shards[p].itemsize for p in trained)
        self.live.hold("working", self.reduced)
        if not self.live.gpu:  # gloo sums in a copy
            self.live.pass_by("working", self.reduced)
        for p in trained:
            shard, p.grad, kind = self.shards[p], None, self.live.kind
            self.live.kind = "gradients"
            part = torch.empty_like(shard)
            shard.grad = part if shard.grad is None else shard.grad
            self.live.kind = kind

    def done(self) -> None:
        for i in (0, len(self.parts) - 1):
            self.reduce(i)
        self.live.hold("working", -self.reduced - self.gathered)
        self.reduced = self.gathered = 0


def empty_policy(
    config: Any, args: Any, gpu: int, spread: bool, fake: FakeTensorMode
) -> tuple[nn.Module, dict]:
    """As common.load_policy leaves it, and the dtypes in which its parameters are kept."""
    from transformers import AutoModelForCausalLM

    stored = torch.float64 if args.dtype == "float64" else torch.float32
    compute = getattr(torch, args.dtype)
    low = compute.itemsize < 4
    attention = common._attention_for(config, args.attn, torch.device("cuda" if gpu else "cpu"))
    # flex_attention keeps what sdpa keeps.
    attention = "sdpa" if attention == "flex_attention" else attention
    with torch.device("meta"):
        policy = AutoModelForCausalLM.from_config(
            copy.deepcopy(config),
            dtype=compute if low and (spread or args.lora_rank) else stored,
            attn_implementation=attention,
        ).eval()
        if args.lora_rank:
            base = compute if low else stored
            common.needed("adapters", "--lora-rank").add(policy, args.lora_rank, base, stored)
    made, kept_in = {}, {}
    with fake:
        for module in policy.modules():
            for own in (module._parameters, module._buffers):
                for name, tensor in own.items():
                    if tensor is not None and tensor not in made:
                        dtype = compute if spread and tensor.is_floating_point() else tensor.dtype
                        made[tensor] = torch.empty(tensor.shape, dtype=dtype)
                        if isinstance(tensor, nn.Parameter):
                            p = made[tensor] = nn.Parameter(made[tensor], tensor.requires_grad)
                            kept_in[p] = tensor.dtype if args.lora_rank else stored
                    own[name] = made.get(tensor)  # a tied weight stays one
    policy.base_model.warn_if_padding_and_no_attention_mask = lambda *_: None
    policy.compute_dtype, policy.fused_logps = compute, args.fused_logps
    policy.share_prompt = getattr(args, "share_prompt", False)
    if low and (spread or args.lora_rank):
        policy.get_input_embeddings().register_forward_hook(lambda _, ids, out: out.to(stored))
    for layer in common.layers_of(policy) if args.gradient_checkpointing else ():
        layer.forward = common._checkpointed(layer.forward)
    return policy, kept_in


def plan(config: Any, args: Any, rows: list, world: int = 1, gpu: int = 0) -> Plan:
    """Of training on micro-batches like `rows`, with the flags of a method file. `gpu`: its memory
    in bytes; 0 plans for a CPU.
    """
    rows = rows[: args.micro_batch_size]
    spread = args.fsdp and world > 1
    fake, live = FakeTensorMode(), Live(gpu)
    state = torch.get_rng_state()
    try:
        policy, kept_in = empty_policy(config, args, gpu, spread, fake)
        micro = common.collate_for(policy, common.Rows("", rows), list(range(len(rows))))
        found = {f.name: getattr(micro, f.name) for f in dataclasses.fields(micro)}
        tensors = {k: fake.from_tensor(v) for k, v in found.items() if isinstance(v, Tensor)}
        micro = dataclasses.replace(micro, **tensors)
        with fake, live:
            _step(live, policy, kept_in, micro, args, world, spread)
    finally:
        torch.set_rng_state(state)
    _, parts, moment = live.peak
    made = Plan(**{k: v for k, v in parts.items() if k in Plan.PARTS}, moment=moment)
    size = {p: p.numel() for p in kept_in}
    wide = 8 if args.dtype == "float64" else 4
    trained = wide * sum(n for p, n in size.items() if p.requires_grad)
    if not gpu and (spread or args.lora_rank):  # the main process begins with all of it
        base = (n for p, n in size.items() if not (args.lora_rank and p.requires_grad))
        loaded = wide * sum(base)
        if loaded > made.total:
            made = Plan(weights=loaded, moment="loading")
    if hasattr(args, "missing_eos") or hasattr(args, "batch_epochs"):  # it samples as it learns
        beside_policy(made, args, sum(size.values()), world if spread else 1)
        trained *= 1 + hasattr(args, "value_model")
    saved = trained * (2 if args.optimizer == "rmsprop" else 3)
    exported = sum(size.values()) * getattr(torch, args.export_dtype).itemsize
    made.disk = saved * (max(1, args.keep_last) + 1) + exported
    return made


def beside_policy(made: Plan, args: Any, size: int, parts: int) -> None:
    """The other models of a method that samples as it learns, taken to be as large as the policy: a
    reference (LoRA has none) and a reward model, which are asked only; PPO's value network, trained
    like the policy, of which both activations are held at once.
    """
    scored_by = [args.reward, args.gold_reward or "family"]
    models = [name for name in scored_by if ":" not in name and name != "family"]
    always = hasattr(args, "clip_range")  # ppo.py and rloo.py ask one without a KL too
    frozen = int(bool(getattr(args, "ref_model", None)))
    frozen = frozen or int(not args.lora_rank and (always or args.kl_coef > 0))
    frozen += sum(len(name.split("@")) for name in models)
    wide = 8 if args.dtype == "float64" else 4
    each = wide if parts > 1 else getattr(torch, args.dtype).itemsize  # spread ones stay wide
    if hasattr(args, "value_model"):
        made.weights, made.gradients = 2 * made.weights, 2 * made.gradients
        made.optimizer, made.activations = 2 * made.optimizer, 2 * made.activations
    made.weights += frozen * size * each // parts


def _step(
    live: Live, policy: nn.Module, kept_in: dict, micro: Any, args: Any, world: int, spread: bool
) -> None:
    """One that is not the first: the optimizer has its state."""
    parameters = list(policy.parameters())
    live.kind = "weights"
    live.know(policy.buffers(), "weights")
    sharded = Spread(live, policy, world, kept_in) if spread else None
    live.know(parameters, "together" if spread else "weights", nbytes=0 if spread else None)
    held = list(sharded.shards.values()) if spread else parameters
    trained = [p for p in held if p.requires_grad]
    if getattr(args, "ref_model", None):
        whole = sum(p.numel() for p in parameters) * (8 if args.dtype == "float64" else 4)
        whole = (1 + ("+" in args.ref_model)) * (whole // (world if spread else 1))
        live.kind, live.moment = "activations", "reference model's pass"
        live.hold("weights", whole)
        with torch.no_grad():
            _forward(policy, micro, live, sharded)
        live.hold("weights", -whole)
        if sharded:
            sharded.done()

    live.kind, live.moment = "gradients", "optimizer step"
    for p in trained:
        p.grad = torch.zeros_like(p)
    live.kind = "optimizer"
    optimizer = common.make_optimizer(
        SimpleNamespace(parameters=lambda: held), args.optimizer, 1e-4, args.weight_decay
    )
    for group in optimizer.param_groups if live.gpu and args.optimizer == "rmsprop" else ():
        group["foreach"] = True  # as torch does it there
    optimizer.step()
    several = args.batch_size // world > args.micro_batch_size
    if not several:
        optimizer.zero_grad(set_to_none=True)

    live.kind, live.moment = "activations", "forward pass"
    for p in trained if not spread else ():
        p.register_post_accumulate_grad_hook(lambda p: live.know([p.grad], "gradients"))
    logps = _forward(policy, micro, live, sharded)
    live.moment = "backward pass"
    logps.sum().backward()
    if sharded:
        sharded.done()
    elif world > 1:
        live.moment = "sum of gradients"
        copies = 1 if live.gpu else 2  # gloo sums in one of its own
        live.pass_by("working", copies * _largest_bucket(trained))
    live.kind, live.moment = "optimizer", "optimizer step"
    nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()


def _forward(policy: nn.Module, micro: Any, live: Live, sharded: Spread | None) -> Tensor:
    if sharded:
        sharded.gather(len(sharded.parts) - 1)
    with common.autocast(policy):
        hidden = common.hidden_before_responses(policy, micro)
        live.kind = "head"
        if hidden.requires_grad:
            hidden.register_hook(lambda _: setattr(live, "kind", "activations"))
        head = common.head_of(policy)
        return common.token_logps(hidden, head, micro.targets, fused=policy.fused_logps)


def _largest_bucket(parameters: list[nn.Parameter], bucket_bytes: int = 2**26) -> int:
    """Of common.sum_gradients."""
    largest = bucket = 0
    for p in parameters:
        bucket += p.nbytes
        largest = max(largest, bucket)
        bucket = 0 if bucket >= bucket_bytes else bucket
    return largest


# -- what the machine has, and which flag would make it fit


def tell(run: common.Run, train: common.Rows) -> None:
    """The header's lines on memory, after run.plan(train). A warning never stops a run: the plan
    may be wrong.
    """
    if not common.MAIN_PROCESS:
        return
    try:
        have, name, gpu = machine(run.device)
        args, config = run.args, config_of(run.args.model)
        if _size(config) < TOO_SMALL:
            return
        rows = largest_micro(run, train)
        found = plan(config, args, rows, run.world, gpu)
        free = shutil.disk_usage(_there(run.folder)).free
        for label, line in zip(("memory", "", ""), found.lines(have, name, free), strict=True):
            common.say(label, line)
        if not found.fits(have):
            found = advice(config, args, rows, run.world, gpu, have)
            common.say("warning", "more than there is. The run goes on, and may run out of memory;")
            common.say("", found[0] if found else next_flag(args, run.world))
    except Exception as error:
        common.say("memory", f"could not be planned: {common.first_line(error)}")


def _there(folder: Path) -> Path:
    return next(p for p in (folder.resolve(), *folder.resolve().parents) if p.exists())


def machine(device: torch.device) -> tuple[int | None, str, int]:
    """(bytes free for this process, where, a GPU's whole memory or 0)"""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        free += torch.cuda.memory_reserved(device)  # ours already: a model may be loaded
        return free, torch.cuda.get_device_name(device), total
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = 1024 * int(next(x for x in lines if x.startswith("MemAvailable")).split()[1])
    except (OSError, StopIteration):
        return None, "", 0
    try:  # a container's limit
        limit, used = (Path(f"/sys/fs/cgroup/memory.{x}").read_text() for x in ("max", "current"))
        free = min(free, int(limit) - int(used))
    except (OSError, ValueError):  # none, or "max"
        pass
    many = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return free // many, f"main memory{f' for each of {many}' if many > 1 else ''}", 0


def config_of(model: str) -> Any:
    from transformers import AutoConfig

    if model == "tiny-untrained":
        import family

        return family.untrained_model().config
    return AutoConfig.from_pretrained(common.resolve_model(model))


def largest_micro(run: common.Run, train: common.Rows, most: int = 20_000_000) -> list:
    """Rows: those with the longest one among the first steps, and in front the longest of all,
    which comes some day.
    """
    # Taken apart, what is long is a pass, not a row.
    lengths = [row.length() for row in train.rows] if train.apart else run.lengths
    steps = min(run.total_steps, max(1, most // len(train)))  # each shuffles all rows
    micros = (micro for step in range(steps) for micro in run.step_rows(step))
    widest = max(micros, key=lambda micro: max(lengths[i] for i in micro))
    longest = int(np.argmax(lengths))
    widest = sorted(widest, key=lambda i: -lengths[i])
    widest = widest if longest in widest else [longest, *widest[: len(widest) - 1]]
    rows = [train.rows[i] for i in widest]
    if not rows[0].responses:  # to be sampled: as long as they may get
        room = np.zeros(run.args.max_length - run.args.max_prompt_length, np.int32)
        rows = [common.Row(row.prompt, [room], row.ask) for row in rows]
    if train.apart:  # one response at a time
        rows = [common.Row(row.prompt, [max(row.responses, key=len)], row.ask) for row in rows]
    return rows


def advice(
    config: Any, args: Any, rows: list, world: int, gpu: int, have: int
) -> tuple[str, Plan] | None:
    """The first change, from harmless to costly, whose plan fits."""
    small = {"micro_batch_size": 1, "gradient_checkpointing": True}
    micros, n = [], args.micro_batch_size
    each = args.batch_size // world
    while n > 1:
        n = max(m for m in range(1, n // 2 + 1) if each % m == 0)
        micros.append(({"micro_batch_size": n}, world))
    more = [n for n in (2 * world, 4 * world, 8 * world) if args.batch_size % n == 0]
    worlds = [world] * (world > 1) + more * bool(gpu)  # on a CPU all share one memory
    spread, both = {"fsdp": True}, {"fsdp": args.fsdp or world > 1, "lora_rank": 16}
    tries = [*micros, ({"gradient_checkpointing": True}, world), (small, world)]
    tries += [(spread | rest, w) for w in worlds for rest in ({}, small)]
    tries += [] if args.lora_rank else [(both, world), (both | small, world)]
    last = tries[-1][0] if not args.lora_rank else both | small | {"lora_rank": args.lora_rank}
    length = args.max_length // 2
    while length >= 128:
        tries.append((last | {"max_length": length}, world))
        length //= 2

    def fitting(changes: dict, w: int) -> Plan | None:
        asked = copy.copy(args)
        for name, value in changes.items():
            setattr(asked, name, value)
        asked.micro_batch_size = min(asked.micro_batch_size, asked.batch_size // w)
        size = _size(config) * (4 if args.optimizer == "adamw" else 3) * 4
        if not asked.lora_rank and size // (w if asked.fsdp else 1) > have:
            return None  # before any activation
        found = plan(config, asked, _cut(rows, asked.max_length), w, gpu)
        return found if found.fits(have) else None

    if micros and not fitting(*micros[-1]):
        tries = tries[len(micros) :]
    for changes, w in tries:
        news = {k: v for k, v in changes.items() if getattr(args, k) != v}
        if (news or w != world) and (found := fitting(changes, w)):
            flags = [common.flag(k) + ("" if v is True else f" {v}") for k, v in news.items()]
            many = [f"torchrun --nproc_per_node={w}"] * (w != world)
            return f"{_gib(found.total)} GiB with {' '.join(many + flags)}", found
    return None


def _cut(rows: list, length: int) -> list:
    """Prompts lose what is too long, as they do when rows are read."""
    return [
        common.Row(
            row.prompt[: max(1, length - max(map(len, row.responses)))],
            [r[: length - 1] for r in row.responses],
            row.ask,
        )
        for row in rows
    ]


def _size(config: Any) -> int:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        policy = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    return sum(p.numel() for p in policy.parameters())


def next_flag(args: Any, world: int) -> str:
    """For the end of an out-of-memory error: the next thing to try, from the flags alone."""
    if (args.micro_batch_size or 1) > 1:
        return f"--micro-batch-size {args.micro_batch_size // 2} is the next thing to try"
    if not args.gradient_checkpointing:
        return "--gradient-checkpointing is the next thing to try"
    if world > 1 and not args.fsdp:
        return "--fsdp is the next thing to try"
    if not args.lora_rank:
        return "more processes with --fsdp, or --lora-rank 16, are the next things to try"
    return "a shorter --max-length is the next thing to try"


def is_out_of_memory(error: BaseException) -> bool:
    words = ("can't allocate memory", "not enough memory", "out of memory")
    of_allocator = isinstance(error, RuntimeError) and any(w in str(error).lower() for w in words)
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or of_allocator


# -- on its own

SHAPES = {  # as published; of EuroLLM's only the key-value heads were looked up
    "gemma-2-2b": dict(
        model_type="gemma2", hidden_size=2304, intermediate_size=9216, num_hidden_layers=26,
        num_attention_heads=8, num_key_value_heads=4, head_dim=256, vocab_size=256_000,
    ),
    "tinyllama": dict(
        model_type="llama", hidden_size=2048, intermediate_size=5632, num_hidden_layers=22,
        num_attention_heads=32, num_key_value_heads=4, vocab_size=32_000,
    ),
    "eurollm-1.7b": dict(
        model_type="llama", hidden_size=2048, intermediate_size=5632, num_hidden_layers=24,
        num_attention_heads=16, num_key_value_heads=8, vocab_size=128_000,
    ),
    "gpt2": dict(
        model_type="gpt2", n_embd=768, n_layer=12, n_head=12, n_positions=1024, vocab_size=50_257
    ),
}  # fmt: skip
MACHINES = ((1, 24), (4, 48), (1, 141))  # GPUs, GiB each


@dataclass
class Options:
    model: str | None = None  # a name in the table, a hub id or a folder; default: the whole table
    memory_gib: float = 24.0  # of each GPU; with --cpu: for each process
    processes: int = 1
    cpu: bool = False  # a CPU instead of GPUs
    prompt: int = 360  # tokens
    response: int = 38  # tokens of each
    responses: int = 2  # to a prompt
    markdown: str | None = None  # also write what is printed to this file
    # As in the method files
    micro_batch_size: int = 4
    batch_size: int = 64
    max_length: int = 2048
    optimizer: Literal["adamw", "rmsprop"] = "adamw"
    weight_decay: float = 0.0
    dtype: Literal["bfloat16", "float32", "float64"] = "bfloat16"
    attn: Literal["auto", "eager", "sdpa", "flex_attention"] = "auto"
    share_prompt: bool = True
    fused_logps: bool = True
    fsdp: bool = False
    gradient_checkpointing: bool = False
    lora_rank: int = 0
    ref_model: str | None = None
    keep_last: int = 1
    export_dtype: Literal["float32", "bfloat16", "float16"] = "float32"


def shape_of(model: str) -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model(**SHAPES[model]) if model in SHAPES else config_of(model)


def main(args: Options) -> None:
    ids = lambda n: np.zeros(n, np.int32)  # noqa: E731
    row = common.Row(ids(args.prompt), [ids(args.response)] * args.responses, ids(args.prompt))
    rows = [row] * args.micro_batch_size
    have = int(args.memory_gib * GIB)
    if args.model:
        config, gpu = shape_of(args.model), 0 if args.cpu else have
        found = plan(config, args, rows, args.processes, gpu)
        print("\n".join(found.lines(have, "--memory-gib")))
        if not found.fits(have):
            change = advice(config, args, rows, args.processes, gpu, have)
            print(f"too much; {change[0] if change else 'and no flag known here helps'}")
        return
    from benchmarking.measure import Report, header

    report = Report(args.markdown)
    report.say("# What training needs, planned\n")
    header(report, "cpu", "python memory.py")
    report.say(
        f"Planned, not measured, in GiB a GPU. DPO, prompts of {args.prompt} tokens, "
        f"{args.responses} answers of {args.response}, micro-batches of {args.micro_batch_size}, "
        f"{args.optimizer}, {args.dtype} (what is trained is kept in float32), Gemma 2 with eager "
        f"attention. It fits when {SPARE:.0%} of the memory is enough.\n"
    )
    table = []
    for model in SHAPES:
        for trained, rank in (("all weights", 0), ("LoRA 16", 16)):
            asked, config = dataclasses.replace(args, lora_rank=rank), shape_of(model)
            found, verdicts = None, []
            for many, gib in MACHINES:
                here = plan(config, asked, rows, many, gib * GIB)
                found = found or here  # of the first machine; the others' differ by little
                if here.fits(gib * GIB):
                    verdicts.append("fits")
                else:
                    change = advice(config, asked, rows, many, gib * GIB, gib * GIB)
                    verdicts.append(change[0] if change else "no")
            sizes = [found.total, *(getattr(found, part) for part in Plan.PARTS), found.disk]
            table.append([model, trained, *(f"{size / GIB:.1f}" for size in sizes), *verdicts])
    machines = [f"{many} x {gib} GB" for many, gib in MACHINES]
    report.table(["model", "trained", "needs", *Plan.PARTS, "disk", *machines], table)


if __name__ == "__main__":
    main(common.command_line(Options, __doc__))
