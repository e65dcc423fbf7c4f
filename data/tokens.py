"""Token ids of large data sets, computed once and cached on disk."""

import hashlib
from pathlib import Path
from typing import Any


def encode(texts: list[str], tokenizer: Any, cache_dir: Path) -> list[list[int]]:
    """Token ids of each text, without special tokens, from the cache if they are there.

    With several processes, call this on the main process first; the others then read its file.
    """
    import datasets
    import tokenizers

    if not tokenizer.is_fast:
        return tokenizer(texts, add_special_tokens=False).input_ids
    facts = (tokenizers.__version__, tokenizer.backend_tokenizer.to_str())
    digest = hashlib.sha256(str(tokenizer.split_special_tokens).encode())
    for text in (*facts, *texts):
        digest.update(f"{len(text)} {text}".encode())
    key = digest.hexdigest()[:24]
    ids = datasets.Sequence(datasets.Value("int32"))
    data = datasets.Dataset.from_dict({"text": texts}).map(
        lambda batch: {"ids": tokenizer(batch["text"], add_special_tokens=False).input_ids},
        batched=True,
        remove_columns="text",
        features=datasets.Features({"ids": ids}),
        cache_file_name=str(cache_dir / f"tokens-{key}.arrow"),
        new_fingerprint=key,
        desc="tokens",
    )
    return data["ids"][:]
