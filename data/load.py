"""Read rows from files, folders, the hub, published data sets (published.py) and the embedded task.

`read` yields (where, row); `where` names the file and line in messages about the row. Files are
read here and not by `datasets.load_dataset`, which reads a CSV cell 007 as the number 7 and NA as
nothing, fills in columns that a JSON line does not have, and cannot say which line is broken.
"""

import csv
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from data.kinds import CONVERTIBLE, BadRow, LeftOut
from data.published import SOURCES, Fits, Source, problem_of

LONGEST_LINE = 2**26  # bytes
MODELS = {  # short names for --model
    "gemma-2-2b": "google/gemma-2-2b",
    "gemma-2-2b-it": "google/gemma-2-2b-it",
    "tinyllama": "TinyLlama/TinyLlama_v1.1",
    "tinyllama-chat": "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
    "eurollm-1.7b": "utter-project/EuroLLM-1.7B",
    "eurollm-1.7b-instruct": "utter-project/EuroLLM-1.7B-Instruct",
    "gpt2": "openai-community/gpt2",
    "llama-2-7b": "meta-llama/Llama-2-7b-hf",
    "llama-3.2-1b": "meta-llama/Llama-3.2-1B",
    "mistral-7b": "mistralai/Mistral-7B-v0.1",
    "pythia-1b": "EleutherAI/pythia-1b",
    "qwen2.5-0.5b": "Qwen/Qwen2.5-0.5B",
}


def read(
    dataset: str, split: str, kind: str, fits: Fits = lambda prompt: True
) -> Iterator[tuple[str, Any]]:
    """(where, dict | ValueError | LeftOut) of each row. Published sets use `kind` to choose among
    their sources, and `fits`: is a text short enough for a prompt?
    """
    path = Path(dataset).expanduser()
    if dataset.split(":")[0] == "family":
        from family import task

        yield from task.rows(dataset, split, kind)
    elif published := find_published(dataset, kind):
        yield from _read_published(dataset, *published, split, fits)
    elif path.is_dir():
        files = sorted(file for file in path.iterdir() if _reader_of(file))
        if not files:
            raise ValueError(f"{path}: no {', '.join(READERS)} file in this folder")
        for file in files:
            yield from _read_file(file)
    elif path.is_file():
        yield from _read_file(path)
    elif _reader_of(path) or dataset.startswith((".", "/", "~")):
        raise ValueError(f"{dataset}: there is no such file or folder")
    else:
        yield from _read_hub(dataset, split)


def test_split(dataset: str, kind: str) -> str | None:
    """The name of the data set's own held-out split, if it has one. May ask the hub."""
    if dataset.split(":")[0] == "family":
        return dataset
    if published := find_published(dataset, kind):
        source, copy = published
        if source.test in (None, source.train) or copy and copy.is_file():
            return None
        return dataset if not copy or _files_of(copy, source, source.test) else None
    path = Path(dataset).expanduser()
    if path.exists() or _reader_of(path):
        return None
    import datasets

    name, config, _ = _parts(dataset)
    try:
        splits = datasets.get_dataset_split_names(name, config)
    except Exception:  # `read` fails too and explains
        return None
    split = next((split for split in ("validation", "test") if split in splits), None)
    return split and f"{name}:{config or ''}:{split}"


def _parts(dataset: str) -> tuple[str, str | None, str | None]:
    """name[:config][:split]. A single part after the name is a config; `name::split` has none."""
    name, config, split, *_ = [*dataset.split(":"), None, None]
    return name, config or None, split


# Published sets: name[:folder,folder][:split][=PATH of a copy with the columns as published]


def find_published(dataset: str, kind: str) -> tuple[Source, Path | None] | None:
    """A published set by its short name or hub id, narrowed to the wanted parts, and a copy."""
    head, equals, path = dataset.partition("=")
    name, config, split = _parts(head)
    offered = [source for source in SOURCES if name.lower() in (source.name, source.repo.lower())]
    if not offered or Path(dataset).exists() and "/" in dataset:
        return None
    wanted = CONVERTIBLE[kind]
    source = next((s for kind in wanted for s in offered if s.kind == kind), None)
    if source is None:
        others = ", ".join(dict.fromkeys(s.name for s in SOURCES if s.kind in wanted))
        raise ValueError(f"{dataset}: has no {kind} rows; these have: {others}")
    if equals and not (path and Path(path).expanduser().exists()):
        raise ValueError(f"{dataset}: there is no file or folder {path!r}")
    if config:
        source = replace(source, folders=tuple(config.split(",")))
    if split:
        source = replace(source, train=split, test=split)
    return source, Path(path).expanduser() if path else None


def _read_published(
    dataset: str, source: Source, copy: Path | None, split: str, fits: Fits
) -> Iterator[tuple[str, Any]]:
    split = source.train if split == "train" else source.test or "test"
    if copy and copy.is_file():
        files = [copy]
    else:
        folder = copy or _download(dataset, source, split)
        files = _files_of(folder, source, split)
        for part in source.folders or [""]:
            if not any(part in ("", *file.parts) for file in files):
                raise ValueError(f"{dataset}: no file of the split {split} in {folder / part}")
    for file in files:
        for where, row in _read_file(file):
            for made in [row] if isinstance(row, ValueError) else _format(source, row, fits):
                yield where, made


def _format(source: Source, row: dict, fits: Fits) -> list:
    """The rows that a published row gives, or why it gives none."""
    try:
        made = source.format(row, fits)
        made = made if isinstance(made, list) else [made]
        return [one if isinstance(one, LeftOut) else problem_of(one) or one for one in made]
    except BadRow as reason:
        return [reason]
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        return [BadRow(f"not as {source.repo} was published ({type(error).__name__}: {error})")]


def _download(dataset: str, source: Source, split: str) -> Path:
    """A folder of the hub's cache. `load_dataset` would find some sets there only when online."""
    from huggingface_hub import snapshot_download

    starts = [f"{folder}/*{split}*" for folder in source.folders] or [f"*{split}*"]
    patterns = [start + ending for start in starts for ending in READERS]
    how = {"revision": source.revision, "allow_patterns": patterns}
    try:
        return Path(snapshot_download(source.repo, repo_type="dataset", **how))
    except Exception as error:  # of the hub's client or of the network
        why = hub_failure(error, source.repo, "dataset", source.revision)
        raise ValueError(f"{dataset}: {why} (use it as {source.name}=DIR)") from None


def _files_of(folder: Path, source: Source, split: str) -> list[Path]:
    """Files whose path has the split: data/train_sft-00000-of-00003.parquet, askhr/train.json."""
    named = re.compile(rf"(^|[/-]){re.escape(split)}(?![A-Za-z_])")
    files = sorted(file.relative_to(folder) for file in folder.rglob("*") if _reader_of(file))
    if source.folders:
        files = [file for file in files if {*source.folders} & {*file.parts}]
    return [folder / file for file in files if named.search(file.as_posix())]


# Files


def _read_file(path: Path) -> Iterator[tuple[str, Any]]:
    reader = _reader_of(path)
    if not reader:
        raise ValueError(f"{path}: the name must end with one of {', '.join(READERS)}")
    try:
        yield from reader(path)
    except (OSError, EOFError, ValueError, RecursionError, csv.Error, zlib.error) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from None


def _read_json(path: Path) -> Iterator[tuple[str, Any]]:
    """A row per line; in a .json perhaps a list of rows."""
    with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
        start = file.read(100).removeprefix(b"\xef\xbb\xbf")  # a byte order mark
        file.seek(0)
        if not start.lstrip().startswith(b"["):
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"{path}:{number}", _parse_json(line)
        elif ".jsonl" in path.suffixes:
            raise ValueError("a JSON array, not a row per line: name it .json")
        else:
            for number, row in enumerate(json.load(file), 1):
                bad = None if isinstance(row, dict) else BadRow("a row must be an object")
                yield f"{path}:row {number}", bad or row


def _parse_json(line: bytes) -> dict | ValueError:
    if len(line) > LONGEST_LINE:
        return ValueError(f"a line of {len(line):,} bytes, at most {LONGEST_LINE:,} are read")
    try:
        row = json.loads(line)
    except UnicodeDecodeError as error:
        return ValueError(f"not UTF-8 ({error.reason} at byte {error.start})")
    except RecursionError:
        return ValueError("nested too deeply")
    except ValueError as error:
        return ValueError(f"not JSON ({error})")
    if not isinstance(row, dict):
        return ValueError(f"a row must be an object, this is a {type(row).__name__}")
    return row


def _read_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow.parquet

    number = 0
    for batch in pyarrow.parquet.ParquetFile(path).iter_batches(8192):
        for row in batch.to_pylist():
            number += 1
            yield f"{path}:row {number}", row


def _read_csv(path: Path) -> Iterator[tuple[str, Any]]:
    """Lists (responses, scores, messages) are JSON in their cell."""
    csv.field_size_limit(2**31 - 1)  # the default refuses long texts
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        for row in reader:
            broken = None in row or None in row.values()
            bad = BadRow("has another number of cells than the header") if broken else None
            yield f"{path}:{reader.line_num}", bad or row


READERS = {
    ".jsonl": _read_json,
    ".json": _read_json,
    ".jsonl.gz": _read_json,
    ".json.gz": _read_json,
    ".parquet": _read_parquet,
    ".csv": _read_csv,
}


def _reader_of(path: Path) -> Callable[[Path], Iterator[tuple[str, Any]]] | None:
    return next((read for ending, read in READERS.items() if path.name.endswith(ending)), None)


def _read_hub(dataset: str, split: str) -> Iterator[tuple[str, dict]]:
    import datasets

    name, config, named_split = _parts(dataset)
    try:
        rows = datasets.load_dataset(name, config, split=named_split or split)
    except Exception as error:  # of the hub's client, the network or the cache
        why = hub_failure(error, name, "dataset")
        raise ValueError(f"{dataset}: there is no such file or folder, and {why}") from None
    for number, row in enumerate(rows, 1):
        yield f"{dataset}:row {number}", row


def hub_failure(error: BaseException, repo: str, what: str, revision: str | None = None) -> str:
    """Why a "model" or "dataset" could not be downloaded, and what to do about it."""
    shown = re.sub(r"hf_\w+", "hf_...", " ".join(str(error).split()))[:300]  # no access tokens
    text = ""
    while error is not None:  # libraries wrap the hub's errors
        status = getattr(getattr(error, "response", None), "status_code", "")
        text += f"{[kind.__name__ for kind in type(error).__mro__]} status {status} {error}\n"
        error = error.__cause__ or error.__context__
    page = f"https://huggingface.co/{'datasets/' if what == 'dataset' else ''}{repo}"
    names = ", ".join(MODELS if what == "model" else dict.fromkeys(s.name for s in SOURCES))
    short = "" if "/" in repo else f" (short names: {names})"
    reasons = {
        "GatedRepoError|is a gated dataset|access a gated repo": (
            f"{repo} is gated: accept its licence at {page}, then run `hf auth login`"
        ),
        "RepositoryNotFoundError|doesn't exist on the Hub|is not a valid model identifier": (
            f"the hub has no {what} {repo}, or it is private (`hf auth login` if yours){short}"
        ),
        "status 40[13]": f"the hub refuses {repo}: see {page}, then run `hf auth login`",
        "OfflineMode|LocalEntryNotFound|Connect(ion)?Error|Timeout|[Cc]ouldn't (reach|connect)": (
            f"{repo} is not in the cache, and the hub cannot be reached{short}"
        ),
    }
    known = (reason for pattern, reason in reasons.items() if re.search(pattern, text))
    command = f"hf download {repo}" + " --repo-type dataset" * (what == "dataset")
    command += f" --revision {revision}" if revision else ""
    why = next(known, f"{repo}: {shown}")
    return f"{why}. A copy works too: `{command} --local-dir DIR` on a machine with access"
