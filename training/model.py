"""Load a model, trained or frozen, and export it.

What a model needs beyond `from_pretrained`: the right attention, a check that its head is one that
we compute exactly, adapters, sharding, recomputed activations, compiled layers.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import kernels
from data.models import from_hub, resolve_model, short_name
from training import parallel

log = logging.getLogger("plainpref")
# Hugging Face has a package `kernels` too, which hides ours if it is installed.
kernels.__path__.append(str(Path(__file__).resolve().parent.parent / "kernels"))


def load_policy(
    options: dict[str, Any],  # the flags of common.Args
    run: Any,
    name: str,  # in the header
    frozen: bool,  # never trained
    make: type,  # common.Policy or a subclass
    from_main: Callable,
) -> nn.Module:
    """See common.load_policy."""
    dtype = getattr(torch, options["dtype"])
    lm = load_lm(make.auto_class, options, run)
    lm.eval().to(torch.float64 if dtype == torch.float64 else torch.float32)
    policy = make(lm, dtype, options["fused_logps"]).requires_grad_(not frozen)
    prepare(policy, options, run, frozen, from_main)
    if not run.in_step:
        parallel.broadcast(list(state_tensors(policy.to(run.device)).values()))
    size = sum(p.numel() for p in policy.parameters())
    trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    text = f"{options['model']}: {size / 1e6:,.1f} M parameters, "
    text += "" if trained in (0, size) else f"{trained:,} of them trained, "
    text += f"weights {str(lm.dtype).removeprefix('torch.')}, computes in {options['dtype']}, "
    if run.rank == 0:
        print(f"{name:<11}{text}{policy.config._attn_implementation} attention", flush=True)
    slow = options["dtype"] == "float32" and run.device.type == "cpu" and trained > 5e7
    if slow and Path("/proc/cpuinfo").is_file():
        flags = Path("/proc/cpuinfo").read_text()
        if "avx512_bf16" in flags or "amx_bf16" in flags:
            log.info("this processor has bfloat16 units: --dtype bfloat16 is faster")
    return policy


def state_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Weights and saved buffers; tied weights once."""
    once = dict(module.named_parameters())
    tied = {name for name, _ in module.named_parameters(remove_duplicate=False)} - {*once}
    return {name: t for name, t in module.state_dict().items() if name not in tied}


def load_lm(auto_class: str, options: dict[str, Any], run: Any) -> nn.Module:
    """The Transformers model in fp32, on the CPU. With --fsdp only the main process reads it."""
    import transformers

    model = options["model"]
    transformers.utils.logging.disable_progress_bar()
    if model == "tiny-untrained":
        from family.model import untrained_model

        torch.manual_seed(torch.initial_seed())  # whatever was drawn before
        lm = untrained_model()
        if attention := _attention(lm.config, options["attn"], run.device):
            lm.set_attn_implementation(attention)
        return lm
    path, kind = resolve_model(model), getattr(transformers, auto_class)
    never = {"trust_remote_code": False}  # else Transformers asks, on a terminal
    labels = {"num_labels": 1} if "Classification" in auto_class else {}
    config = from_hub(
        lambda: transformers.AutoConfig.from_pretrained(path, **labels, **never), model
    )
    has_head = "SequenceClassification" in str(config.architectures)
    if has_head and not labels:
        raise ValueError(f"--model {model}: a reward model, which writes no text")
    if config.is_encoder_decoder or getattr(config, "quantization_config", None):
        raise ValueError(
            f"--model {model}: only decoder-only models with plain weights can be trained"
        )
    experts = [getattr(config, key, None) or 0 for key in ("num_experts", "num_local_experts")]
    if max(experts) > 1:
        raise ValueError(f"--model {model}: a mixture of experts; only dense models are supported")
    attention = _attention(config, options["attn"], run.device)
    if options["fsdp"] and run.world > 1 and run.rank:
        from training.fsdp import empty_model

        return empty_model(config, attention, kind)
    how = never | {"config": config, "dtype": torch.float32, "use_safetensors": True}
    try:
        lm, report = from_hub(
            lambda: kind.from_pretrained(
                path, attn_implementation=attention, output_loading_info=True, **how
            ),
            model,
        )
    except ValueError as error:
        if "attention" not in str(error):
            raise
        raise ValueError(
            f"--attn {options['attn']}: {model} does not support it ({error})"
        ) from None
    # Transformers would fill missing weights with random numbers. Only a language model that is
    # loaded as a reward model may lack a head: it gets a new one.
    new_head = labels and not has_head
    missing = {
        name for name in report["missing_keys"] if not (new_head and name.startswith("score."))
    }
    if missing or report["mismatched_keys"]:
        names = ", ".join(sorted(map(str, [*missing, *report["mismatched_keys"]]))[:5])
        raise ValueError(f"--model {model}: its files lack weights, or have other shapes: {names}")
    return lm


def _attention(config: Any, attn: str, device: torch.device) -> str | None:
    """Transformers' name for the attention; None: its own choice, sdpa nearly everywhere."""
    if attn == "flex_attention" and device.type != "cuda":
        raise ValueError("--attn flex_attention has no backward pass outside of CUDA")
    if getattr(config, "attn_logit_softcapping", None):  # Gemma 2
        if attn == "sdpa":
            raise ValueError("--attn sdpa would leave out this model's softcap on attention scores")
        return "eager" if attn == "auto" else attn
    return None if attn == "auto" else attn


def prepare(
    policy: nn.Module, options: dict[str, Any], run: Any, frozen: bool, from_main: Callable
) -> None:
    """Check, add adapters, freeze, shard or move to the device, compile: in place."""
    lm, rank = policy.lm, 0 if frozen else options["lora_rank"]
    sharded = options["fsdp"] and run.world > 1
    stored, compute = lm.dtype, policy.compute_dtype
    low = compute if compute.itemsize < 4 else stored
    empty = sharded and run.rank > 0  # the main process will send the weights
    # On the CPU and in fp32, before anything is converted. Every process needs the answer.
    facts = from_main(lambda: _facts(policy, options, getattr(run, "lengths", None) or [64]))
    policy.digest, refusal = facts["digest"], facts["refusal"]
    if rank:
        from training import lora

        lora.add(lm, rank, low, stored, empty)
    elif frozen and not sharded:  # FSDP converts weights as it gathers them
        # Autocast rounds a policy's matrices in the same way. Embeddings, norms and heads stay
        # exact: a policy that has learned nothing and its reference give equal numbers.
        for p in layers_of(lm).parameters():
            if p.dim() > 1:
                p.data = p.data.to(low)
    if low != stored and (rank or sharded):
        # Low-precision embeddings would make the hidden states between the layers low too.
        lm.get_input_embeddings().register_forward_hook(lambda _, ids, out: out.to(stored))
    if sharded:
        from training.fsdp import shard

        shard(policy, layers_of(lm), run.device)
        run.in_step = True
    else:
        policy.to(run.device)
    policy.share_prompt = options["share_prompt"] and not refusal
    if refusal:
        log.info(f"the prompt goes through the model once for every response: {refusal}")
    checkpointing = options["gradient_checkpointing"] and not frozen
    for layer in layers_of(lm) if options["compile"] or checkpointing else ():
        if options["compile"]:
            layer.forward = torch.compile(layer.forward, dynamic=True)
        if checkpointing:
            layer.forward = _checkpointed(layer.forward)
    policy.compiled = options["compile"]
    if options["compile"] or policy.config._attn_implementation == "flex_attention":
        # One graph per batch size, window and layout. Past the usual limit of 8, it would run
        # uncompiled, and flex_attention would store all scores.
        torch._dynamo.config.recompile_limit = 64


def _facts(policy: nn.Module, options: dict[str, Any], lengths: list[int]) -> dict[str, Any]:
    from kernels import head

    refusal = None
    if policy.auto_class == "AutoModelForCausalLM":
        head.check(policy)
    if options["share_prompt"]:
        from kernels import shared_prompt

        refusal = shared_prompt.refusal(policy.lm, max(lengths))
    return {"digest": weights_digest(policy.lm), "refusal": refusal}


def layers_of(lm: nn.Module) -> nn.ModuleList:
    """The decoder layers: the list with as many modules as the config says."""
    number = lm.config.num_hidden_layers
    lists = (m for m in lm.base_model.modules() if isinstance(m, nn.ModuleList))
    return next(layers for layers in lists if len(layers) == number)


def weights_digest(lm: nn.Module) -> str:
    """A digest of every weight: the sum of its bits, and some of its numbers."""
    digest = hashlib.sha256()
    for name, p in lm.named_parameters():
        integer = {8: torch.int64, 4: torch.int32, 2: torch.int16}[p.element_size()]
        bits = p.detach().contiguous().flatten().view(integer)
        some = bits[:: max(1, bits.numel() // 1024)].cpu().numpy().tobytes()
        digest.update(f"{name} {tuple(p.shape)} {bits.sum(dtype=torch.int64)}".encode() + some)
    return digest.hexdigest()[:24]


def _checkpointed(forward: Callable) -> Callable:
    """A layer that stores its input only and recomputes the rest in the backward pass.

    (Transformers' own gradient checkpointing needs training mode, which switches dropout on.)
    """
    from torch.utils.checkpoint import checkpoint

    @wraps(forward)
    def again(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return again


def export(policy: nn.Module, tokenizer: Any, run: Any) -> None:
    """Write a folder that plain Transformers loads."""
    args, dtype, lm = run.args, getattr(torch, run.args.export_dtype), policy.lm
    state: dict[str, Tensor] = {}
    named, adapters = state_tensors(lm).items(), {}
    if args.lora_rank:
        from training import lora

        named, adapters = lora.merged(lm), lora.state(lm)
    for name, tensor in named:  # one at a time: only the main process stores them all
        whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        if run.rank == 0:
            state[name] = whole.detach().to("cpu", dtype, copy=True)
    if run.rank:
        return
    temporary = run.folder / "tmp-export"
    shutil.rmtree(temporary, ignore_errors=True)
    before = getattr(lm.config, "plainpref", None) or {"base_model": short_name(args.model)}
    ours = {key: value for key, value in before.items() if key != "beta"}
    if hasattr(args, "ref_model") and getattr(args, "beta", None):  # makes a reward of log-ratios
        ours["beta"] = args.beta
    lm.config.plainpref = ours | {"history": [*before.get("history", []), run.script.stem]}
    lm.save_pretrained(temporary, state_dict=state)
    tokenizer.save_pretrained(temporary)
    config = json.loads((temporary / "config.json").read_text())
    config["dtype"] = str(dtype).removeprefix("torch.")
    (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if args.lora_rank:
        lora.save(lm, adapters, run.folder / "adapter", resolve_model(args.model))
    for file in temporary.iterdir():
        file.chmod(0o644)  # Transformers makes the weights private
        os.replace(file, run.folder / Path(file).name)
    temporary.rmdir()
