"""Models by name: the embedded ones, short names, folders and hub ids."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data.load import MODELS, hub_failure

HOME = Path(__file__).resolve().parent.parent
EMBEDDED = {"tiny": "family/tiny", "tiny-preferred": "family/preferred"}


def model_folder(model: str) -> Path:
    """The folder of an embedded model, or the path. (A hub id gives a folder that is not there.)"""
    return HOME / EMBEDDED[model] if model in EMBEDDED else Path(model).expanduser()


def short_name(model: str) -> str:
    """The name under which presets know a model; an exported model has the name of its base."""
    config = model_folder(model) / "config.json"
    if model == "tiny-untrained":
        return "tiny"
    if config.is_file():
        try:
            exported = json.loads(config.read_text(encoding="utf-8")).get("plainpref")
            if exported:
                return exported["base_model"]
        except (ValueError, AttributeError, LookupError, TypeError):
            why = f"{config} is not JSON, or not as a model has it"
            raise ValueError(f"--model {model}: {why}") from None
    return Path(model).name.lower()


def parts_of_soup(ref_model: str) -> list[str]:
    """a and b of a+b; a folder may have a + in its name."""
    return [ref_model] if model_folder(ref_model).is_dir() else ref_model.split("+")


def resolve_model(model: str, named: str = "--model") -> str:
    """A folder if there is one, else a hub id."""
    folder = model_folder(model)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ValueError(f"{named} {model}: no config.json in {folder}. Did a run save it?")
        return str(folder)
    if model.startswith((".", "/", "~", "runs/")) or model.count("/") > 1:
        raise ValueError(f"{named} {model}: there is no such folder")
    return MODELS.get(model, model)


def from_hub(load: Callable[[], Any], model: str, named: str = "--model") -> Any:
    """Call Transformers' loading function; if it fails, say in one sentence why."""
    try:
        return load()
    except Exception as error:  # of any kind, if a file is broken
        about_attention = isinstance(error, ValueError) and "attention" in str(error)
        if about_attention or isinstance(error, MemoryError | RuntimeError):
            raise  # the caller explains it; memory ran out
        no_tokenizer = "backend tokenizer" in str(error)
        if model_folder(model).is_dir():
            kind = "" if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: "
            first_line = f"{kind}{error}".strip().partition("\n")[0][:200]
            why = "it has no tokenizer that can be read" if no_tokenizer else first_line
        else:
            repo = resolve_model(model)
            why = f"there is no such folder, and {hub_failure(error, repo, 'model')}"
        raise ValueError(f"{named} {model}: {why}") from None


def load_tokenizer(model: str, max_length: int) -> Any:
    """The tokenizer, with `stop_ids` (all ids that end a response) and `bos`."""
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    stops, limit = None, None
    if model == "tiny-untrained":
        from family.model import hf_tokenizer

        tokenizer = hf_tokenizer()
    else:
        path, never = resolve_model(model), {"trust_remote_code": False}
        config = from_hub(lambda: AutoConfig.from_pretrained(path, **never), model)
        tokenizer = from_hub(lambda: AutoTokenizer.from_pretrained(path, **never), model)
        limit = getattr(config, "max_position_embeddings", None)
        try:
            stops = GenerationConfig.from_pretrained(path).eos_token_id
        except OSError:  # many base models have no generation_config.json
            pass
    if limit and max_length > limit:
        raise ValueError(f"--max-length {max_length}: {model} takes at most {limit} tokens")
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer of {model} has no end-of-sequence token")
    stops = stops if isinstance(stops, list) else [stops]
    tokenizer.stop_ids = frozenset({tokenizer.eos_token_id, *stops} - {None})
    first = tokenizer("a").input_ids[:1]  # GPT-2 has a BOS that its tokenizer does not write
    tokenizer.bos = first if first == [tokenizer.bos_token_id] else []
    return tokenizer
