"""Where models and rows come from, beyond a folder and a .jsonl file: short names, other kinds of
files, the hub.

Imported only when one of them is asked for.
"""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import common

MODELS = {
    "gemma-2-2b": "google/gemma-2-2b",
    "gemma-2-2b-it": "google/gemma-2-2b-it",
    "tinyllama": "TinyLlama/TinyLlama_v1.1",
    "eurollm-1.7b": "utter-project/EuroLLM-1.7B",
    "gpt2": "openai-community/gpt2",
    "llama-2-7b": "meta-llama/Llama-2-7b-hf",
    "mistral-7b": "mistralai/Mistral-7B-v0.1",
    "zephyr-7b": "HuggingFaceH4/zephyr-7b-beta",
    "pythia-1b": "EleutherAI/pythia-1b",
    "pythia-2.8b": "EleutherAI/pythia-2.8b",
}
SPLITS = ("validation", "test")  # held-out rows, the first that a data set has


def _parts(dataset: str) -> tuple[str, str | None, str | None]:
    """owner/name[:config][:split]; a lone part after the name is a config, `::split` names the
    split alone.
    """
    name, *rest = dataset.split(":")
    config, split = (rest + [None, None])[:2]
    return name, config or None, split


def rows(dataset: str, split: str) -> Iterator[tuple[str, Any]]:
    """(file:line, row) from a file, a folder of files, or the hub."""
    path = Path(dataset).expanduser()
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.suffix in READERS)
        if not files:
            raise common.UserError(f"{path}: no {', '.join(READERS)} file in this folder")
        for file in files:
            yield from READERS[file.suffix](file)
    elif path.is_file():
        if path.suffix not in READERS:
            raise common.UserError(f"{path}: the name must end with one of {', '.join(READERS)}")
        yield from READERS[path.suffix](path)
    elif path.suffix in READERS or dataset.startswith((".", "/", "~")):
        raise common.UserError(f"{dataset}: there is no such file or folder")
    else:
        yield from hub_rows(dataset, split)


def _json_list(path: Path) -> Iterator[tuple[str, Any]]:
    text = path.read_bytes().removeprefix(b"\xef\xbb\xbf")  # a byte order mark
    if not text.lstrip().startswith(b"["):  # JSON lines under another name
        yield from common.json_lines(path)
        return
    try:
        rows = json.loads(text)
    except ValueError as error:
        raise common.UserError(f"{path}: not JSON ({error})") from None
    for number, row in enumerate(rows, 1):
        yield (
            f"{path}:row {number}",
            row
            if isinstance(row, dict)
            else common.BadRow(f"a row must be an object, this is a {type(row).__name__}"),
        )


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path)
    except Exception as error:  # pyarrow has several kinds
        raise common.UserError(f"{path}: not a Parquet file ({common.first_line(error)})") from None
    number = 0
    for batch in table.iter_batches(8192):
        for row in batch.to_pylist():
            number += 1
            yield f"{path}:row {number}", row


def _csv(path: Path) -> Iterator[tuple[str, Any]]:
    """Lists (responses, scores) are written as JSON in their cell; a label as true/false or 1/0."""
    try:
        yield from _csv_rows(path)
    except UnicodeDecodeError as error:
        raise common.UserError(f"{path}: not UTF-8 ({error.reason})") from None
    except csv.Error as error:
        raise common.UserError(f"{path}: not CSV ({error})") from None


def _csv_rows(path: Path) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(2**31 - 1)  # the default refuses long texts
    with open(path, newline="", encoding="utf-8-sig") as f:
        reader = csv.DictReader(f)
        for raw in reader:
            row: Any = {key: value for key, value in raw.items() if key is not None}
            if None in raw or None in row.values():
                row = common.BadRow(
                    f"another number of cells than the header's {len(reader.fieldnames or [])}"
                )
            else:
                for name in ("responses", "scores", "messages"):
                    if name in row:
                        parsed = common.parse_json(b'{"x": %s}' % row[name].encode())
                        row = (
                            parsed
                            if isinstance(parsed, common.BadRow)
                            else {**row, name: parsed["x"]}
                        )
                        if isinstance(parsed, common.BadRow):
                            break
                if not isinstance(row, common.BadRow) and "label" in row:
                    row["label"] = {"true": True, "1": True, "false": False, "0": False}.get(
                        row["label"].lower()
                    )
            yield f"{path}:{reader.line_num}", row


READERS = {".jsonl": common.json_lines, ".json": _json_list, ".parquet": _parquet, ".csv": _csv}


def hub_rows(dataset: str, split: str) -> Iterator[tuple[str, dict]]:
    """(where, row) of a hub data set, from the cache if it is there."""
    import datasets

    name, config, named = _parts(dataset)
    try:
        data = datasets.load_dataset(name, config, split=named or split)
    except Exception as error:  # the hub, the network and the cache each have their own
        raise common.UserError(
            f"{dataset}: looked for a file or folder of that name, and for the data set "
            f"{name} on the Hugging Face hub and in its cache, in vain ({type(error).__name__}: "
            f"{common.first_line(error)}). Offline, give a .jsonl, .json, .parquet or .csv file, "
            "or a folder of them; README.md lists the columns"
        ) from None
    for i, row in enumerate(data, 1):
        yield f"{name} {named or split}:row {i}", row


def test_split(dataset: str) -> str | None:
    """The data set's name with its own held-out split, if it has one."""
    if Path(dataset).expanduser().exists() or Path(dataset).suffix in READERS:
        return None
    import datasets

    name, config, _ = _parts(dataset)
    try:
        splits = datasets.get_dataset_split_names(name, config)
    except Exception:  # told by hub_rows, which needs more than the names
        return None
    return next((f"{name}:{config or ''}:{split}" for split in SPLITS if split in splits), None)
