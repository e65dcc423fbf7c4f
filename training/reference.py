"""The reference model: --ref-model (one model, or an average of two), and its cached log-probs."""

import hashlib
import json
import logging
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from data.models import parts_of_soup, resolve_model
from training.model import state_tensors
from training.parallel import from_main
from training.run_folder import package_version, rows_digest

log = logging.getLogger("plainpref")
HOME = Path(__file__).resolve().parent.parent


def check(ref_model: str | None, soup_weight: float) -> None:
    """Raise before the policy is loaded."""
    if not 0 <= soup_weight <= 1:
        raise ValueError(f"--soup-weight must be in [0, 1], got {soup_weight}")
    parts = parts_of_soup(ref_model) if ref_model else []
    if len(parts) > 2:
        raise ValueError(f"--ref-model {ref_model}: a soup is of two models, a+b")
    for part in parts:
        resolve_model(part, "--ref-model")


def load(args: Any, run: Any, load_policy: Callable, policy_config: Any) -> Any:
    """A model, or a soup `a+b`: soup_weight * a + (1 - soup_weight) * b, weight by weight."""
    ref_model, soup_weight = args.ref_model, args.soup_weight
    load_model = partial(load_policy, args, run, name="reference", frozen=True)
    first, *second = parts_of_soup(ref_model)
    reference = load_model(first)
    if second:
        other = load_model(second[0])
        theirs = state_tensors(other)
        with torch.no_grad():
            for name, tensor in state_tensors(reference).items():
                if name not in theirs or theirs[name].shape != tensor.shape:
                    raise ValueError(f"--ref-model {ref_model}: {name} differs in shape")
                tensor.lerp_(theirs[name], 1 - soup_weight)  # also where both are sharded
        reference.digest = f"{reference.digest}+{other.digest} {soup_weight}"
    if reference.config.vocab_size != policy_config.vocab_size:
        raise ValueError(f"--ref-model {ref_model} has another vocabulary than the policy")
    return reference


def cached(
    compute: Callable[[], Tensor],
    reference: Any,
    rows: list,
    parts: list[list[int]],
    args: Any,
    run: Any,
) -> Tensor:
    """The reference's log-probs, from the cache if they are there."""
    run.made_from["--ref-model"] = reference.digest
    options = [args.dtype, args.attn, args.share_prompt, args.fused_logps, args.fsdp, args.compile]
    facts = {"reference": reference.digest, "rows": rows_digest(rows), "parts": parts}
    facts |= {"options": options, "lora": args.lora_rank, "world": run.world}
    facts |= {"device": run.device.type, "transformers": package_version("transformers")}
    facts = facts | {"torch": torch.__version__, "threads": torch.get_num_threads()}
    for source in (HOME / "common.py", HOME / "kernels" / "token_logps.py"):
        facts[source.name] = hashlib.sha256(source.read_bytes()).hexdigest()
    key = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:24]
    folder = Path(args.cache_dir or "runs/.cache").expanduser()
    file = folder / f"ref-{key}.safetensors"

    def read() -> Tensor | None:
        try:
            found = load_file(file)
            if torch.equal(found["checksum"], _checksum(found["logps"])):
                return found["logps"]
            raise OSError("its contents have changed")
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError, KeyError) as error:
            log.info(f"{file} cannot be read ({error}): computed again")
            return None

    found = from_main(read)
    if found is not None:
        log.info(f"reference: log-probs from {file}")
        return found
    found = compute()

    def write() -> None:
        temporary = file.with_name(f".{file.name}.{os.getpid()}")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            save_file({"logps": found, "checksum": _checksum(found)}, temporary)
            os.replace(temporary, file)
        except (SafetensorError, OSError) as error:
            log.info(f"reference: log-probs are not cached ({error})")

    from_main(write)
    return found


def _checksum(logps: Tensor) -> Tensor:
    digest = hashlib.sha256(logps.numpy().tobytes()).digest()
    return torch.tensor(list(digest), dtype=torch.uint8)
