"""Where models and rows come from, beyond a folder and a .jsonl file: short names, other kinds of
files, the hub. published.py knows the named data sets and turns their rows into ours.

Imported only when one of them is asked for.
"""

import csv
import gzip
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
from published import DATASETS, Source, blemish

MODELS = {
    "gemma-2-2b": "google/gemma-2-2b",
    "gemma-2-2b-it": "google/gemma-2-2b-it",
    "tinyllama": "TinyLlama/TinyLlama_v1.1",
    "tinyllama-chat": "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
    "eurollm-1.7b": "utter-project/EuroLLM-1.7B",
    "eurollm-1.7b-instruct": "utter-project/EuroLLM-1.7B-Instruct",
    "gpt2": "openai-community/gpt2",
    "gpt2-medium": "openai-community/gpt2-medium",
    "gpt2-large": "openai-community/gpt2-large",
    "gpt2-xl": "openai-community/gpt2-xl",
    "llama-2-7b": "meta-llama/Llama-2-7b-hf",
    "llama-2-7b-chat": "meta-llama/Llama-2-7b-chat-hf",
    "llama-3.2-1b": "meta-llama/Llama-3.2-1B",
    "llama-3.2-1b-instruct": "meta-llama/Llama-3.2-1B-Instruct",
    "mistral-7b": "mistralai/Mistral-7B-v0.1",
    "mistral-7b-sft": "HuggingFaceH4/mistral-7b-sft-beta",
    "zephyr-7b": "HuggingFaceH4/zephyr-7b-beta",
    "pythia-160m": "EleutherAI/pythia-160m",
    "pythia-410m": "EleutherAI/pythia-410m",
    "pythia-1b": "EleutherAI/pythia-1b",
    "pythia-2.8b": "EleutherAI/pythia-2.8b",
    "qwen2.5-0.5b": "Qwen/Qwen2.5-0.5B",
    "qwen2.5-0.5b-instruct": "Qwen/Qwen2.5-0.5B-Instruct",
    "qwen2.5-1.5b": "Qwen/Qwen2.5-1.5B",
    "qwen2.5-1.5b-instruct": "Qwen/Qwen2.5-1.5B-Instruct",
}
SPLITS = ("validation", "test")  # held-out rows, the first that a data set has
RICHER = {  # what can be turned into a kind, the nearest first
    "demonstration": ("demonstration", "pair", "ranked", "labelled"),
    "pair": ("pair", "ranked"),
    "ranked": ("ranked", "pair"),
    "labelled": ("labelled", "pair", "ranked"),
    "prompt": ("demonstration", "pair", "ranked", "labelled"),
}


def _parts(dataset: str) -> tuple[str, str | None, str | None]:
    """owner/name[:config][:split]; a lone part after the name is a config, `::split` names the
    split alone.
    """
    name, *rest = dataset.split(":")
    config, split = (rest + [None, None])[:2]
    return name, config or None, split


@dataclass
class Named:
    """A data set that published.py knows, as asked for: `name[:part,part][:split][=path]`."""

    asked: str
    name: str
    source: Source
    parts: list[str]  # of source.folders
    split: str | None
    path: Path | None  # a copy on this machine, with the columns as published


def find_named(dataset: str, kind: str) -> Named | None:
    """By its short name, or by the hub id of one of its sources."""
    head, equals, path = dataset.partition("=")
    name, part, split = _parts(head)
    parts = part.split(",") if part else []
    offered = DATASETS.get(name)
    if offered is None and (path or not Path(dataset).expanduser().exists()):
        offered = {
            has: source
            for sources in DATASETS.values()
            for has, source in sources.items()
            if source.repo.lower() == name.lower() and {*parts} <= {source.folder, *source.folders}
        }
    if not offered:
        return None
    source = next((offered[has] for has in RICHER.get(kind, (kind,)) if has in offered), None)
    if source is None:
        others = [
            key for key, sources in DATASETS.items() if {*RICHER.get(kind, (kind,))} & {*sources}
        ]
        raise common.UserError(
            f"{dataset}: holds {' and '.join(offered)} rows, and {kind} rows are needed; "
            f"{', '.join(others)} have such"
        )
    if unknown := [part for part in parts if part not in (source.folder, *source.folders)]:
        known = f"there are {', '.join(source.folders)}" if source.folders else "it has no parts"
        raise common.UserError(f"{dataset}: there is no part {unknown[0]!r}; {known}")
    file = Path(path).expanduser() if path else None
    if equals and not (file and file.exists()):
        raise common.UserError(f"{dataset}: there is no file or folder {path!r}")
    return Named(dataset, name, source, parts, split, file)


def rows(
    dataset: str, split: str, kind: str, fits: Callable[[str], bool] = lambda prompt: True
) -> Iterator[tuple[str, Any]]:
    """(file:line, row) from a file, a folder of files, the hub, or a published set. Only the last
    asks what `kind` is needed, and whether a prompt `fits`.
    """
    path = Path(dataset).expanduser()
    if named := find_named(dataset, kind):
        yield from _formatted(named, split, fits)
    elif path.is_dir():
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


def _formatted(named: Named, split: str, fits: Callable[[str], bool]) -> Iterator[tuple[str, Any]]:
    """Published rows, each as the rows of ours that it gives, or as why it gives none."""
    source = named.source
    alternatives = [columns.split() for columns in source.columns.split("|")]
    for number, (where, raw) in enumerate(_as_published(named, split)):
        if isinstance(raw, common.BadRow):
            yield where, raw
            continue
        if number == 0 and not any(all(c in raw for c in columns) for columns in alternatives):
            wanted = ", or ".join(", ".join(columns) for columns in alternatives)
            raise common.UserError(
                f"{named.asked}: {where} has the columns {', '.join(raw) or '(none)'}; "
                f"{source.repo} was published with {wanted}"
            )
        try:
            made = source.format(raw, fits)
            made = made if isinstance(made, list) else [made]
            made = [row if isinstance(row, common.LeftOut) else blemish(row) or row for row in made]
        except common.BadRow as reason:
            made = [reason]
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            problem = f"{type(error).__name__}: {common.first_line(error)}"
            made = [common.BadRow(f"not as {source.repo} was published ({problem})")]
        for row in made:
            yield where, row


def _as_published(named: Named, split: str) -> Iterator[tuple[str, Any]]:
    """From a file with all the rows that are wanted, or a folder as the hub has it: a copy, or what
    is downloaded into the hub's cache. (`datasets` would find some sets there only when online.)
    """
    if named.path and named.path.is_file():
        yield from _reader_of(named.path)(named.path)
        return
    folder = named.path or _download(named, split)
    for file in _files_of(named, folder, split):
        for where, row in _reader_of(file)(file):
            yield where if named.path else where.replace(f"{folder}/", f"{named.name} ", 1), row


def _download(named: Named, split: str) -> Path:
    from huggingface_hub import snapshot_download

    source, split = named.source, _split_of(named, split)
    if split is None:
        raise common.UserError(f"{named.asked}: has no held-out split; --eval-dataset can name one")
    within = named.parts or ([source.folder] if source.folder else [])
    starts = [f"{folder}/*{split}*" for folder in within] or [f"*{split}*"]
    wanted = [start + ending for start in starts for ending in (*READERS, *ZIPPED)]
    try:
        return Path(
            snapshot_download(
                source.repo, repo_type="dataset", revision=source.revision, allow_patterns=wanted
            )
        )
    except Exception as error:  # the hub's own and the network's
        why = hub_failure(error, source.repo, "dataset")
        revision = f" --revision {source.revision}" if source.revision else ""
        raise common.UserError(
            f"{named.asked}: {why}; a copy serves too: `hf download --repo-type dataset "
            f"{source.repo}{revision} --local-dir DIR` where there is a network, then "
            f"{named.name}=DIR"
        ) from None


def _split_of(named: Named, split: str) -> str | None:
    return named.split or named.source.splits[split != "train"]


def _files_of(named: Named, folder: Path, split: str) -> list[Path]:
    """The files of a split, known by a name such as data/train_sft-00000-of-00003.parquet or
    helpful-base/train.jsonl.gz. Where no file is named after a split, all are for training.
    """
    there = sorted(
        file.relative_to(folder)
        for ending in (*READERS, *ZIPPED)
        for file in folder.rglob(f"*{ending}")
    )
    for part in named.parts:
        if not any(part in file.parts[:-1] for file in there):
            raise common.UserError(f"{named.asked}: no folder {part} with rows in {folder}")
    within = {*named.parts} or {named.source.folder}
    there = [file for file in there if within & {*file.parts[:-1]}] or there
    wanted = _split_of(named, split)
    of_split = [file for file in there if wanted and _is_of(file, wanted)]
    if not of_split and split == "train" and not named.split:
        of_split = [] if any(_is_of(file, "train", *SPLITS) for file in there) else there
    if not of_split:
        what = f"file of the split {wanted}" if wanted else "held-out file"
        raise common.UserError(f"{named.asked}: no {what} in {folder}")
    return [folder / file for file in of_split]


def _is_of(file: Path, *splits: str) -> bool:
    names = "|".join(map(re.escape, splits))
    return bool(re.search(rf"(^|[/-])({names})(?![A-Za-z_])", file.as_posix()))


def _reader_of(file: Path) -> Callable[[Path], Iterator[tuple[str, Any]]]:
    read = READERS.get(file.suffix) or (_gzip_lines if file.name.endswith(ZIPPED) else None)
    if not read:
        endings = ", ".join([*READERS, *ZIPPED])
        raise common.UserError(f"{file}: the name must end with one of {endings}")
    return read


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


def _gzip_lines(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        with gzip.open(path, "rb") as f:
            for number, line in enumerate(f, 1):
                if line.strip():
                    yield f"{path}:{number}", common.parse_json(line)
    except (OSError, EOFError) as error:
        raise common.UserError(f"{path}: not gzip ({common.first_line(error)})") from None


READERS = {".jsonl": common.json_lines, ".json": _json_list, ".parquet": _parquet, ".csv": _csv}
ZIPPED = (".jsonl.gz", ".json.gz")  # how some published sets come


def hub_rows(dataset: str, split: str) -> Iterator[tuple[str, dict]]:
    """(where, row) of a hub data set, from the cache if it is there."""
    import datasets

    name, config, named = _parts(dataset)
    try:
        data = datasets.load_dataset(name, config, split=named or split)
    except Exception as error:  # the hub, the network and the cache each have their own
        if parts := _parts_there(error):
            raise common.UserError(f"{dataset}: {name} has no such {parts}") from None
        raise common.UserError(
            f"{dataset}: there is no such file or folder, and "
            f"{hub_failure(error, name, 'dataset')}; a file serves too: .jsonl, .json, .parquet "
            "or .csv, or a folder of them (README.md lists the columns)"
        ) from None
    for i, row in enumerate(data, 1):
        yield f"{name} {named or split}:row {i}", row


def test_split(dataset: str, kind: str) -> str | None:
    """The data set's name with its own held-out split, if it has one."""
    if named := find_named(dataset, kind):
        if not named.path:
            return dataset if named.source.splits[1] and not named.split else None
        if not named.path.is_dir() or named.split:
            return None
        try:
            return dataset if _files_of(named, named.path, "test") else None
        except common.UserError:
            return None
    if Path(dataset).expanduser().exists() or Path(dataset).suffix in READERS:
        return None
    import datasets

    name, config, _ = _parts(dataset)
    try:
        splits = datasets.get_dataset_split_names(name, config)
    except Exception:  # told by hub_rows, which needs more than the names
        return None
    return next((f"{name}:{config or ''}:{split}" for split in SPLITS if split in splits), None)


def _parts_there(error: Exception) -> str | None:
    """ "config; there are a, b" where another config or split was asked for, or none of several."""
    pattern = r"(BuilderConfig|Config name is missing|Unknown split).*?\[(.*?)\]"
    if not (found := re.search(pattern, str(error), re.DOTALL)):
        return None
    part = "split" if found[1] == "Unknown split" else "config"
    return f"{part}; there are {found[2].replace(chr(39), '')}"


def hub_failure(error: BaseException, repo: str, what: str) -> str:
    """Why a `what` ("model" or "dataset") could not be had from the hub, and what to do about it.
    transformers and datasets wrap the hub's errors, and datasets loses some of them on the way: so
    the kinds of all errors of the chain count, and their words.
    """
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    kinds = {kind.__name__ for e in chain for kind in type(e).__mro__}
    said = " ".join(map(str, chain))
    codes = {getattr(getattr(e, "response", None), "status_code", None) for e in chain}
    page = f"https://huggingface.co/{'datasets/' if what == 'dataset' else ''}{repo}"

    def one_of(*words: str) -> bool:
        return any(word in kinds or word in said for word in words)

    if one_of("GatedRepoError", "is a gated dataset", "access a gated repo"):
        return (
            f"{repo} on the Hugging Face hub is gated: accept its licence at {page}, "
            "then `hf auth login` on this machine"
        )
    names = ", ".join(MODELS if what == "model" else DATASETS)
    short = "" if "/" in repo else f" (the short names are {names})"
    if one_of("RevisionNotFoundError", "Revision '"):
        return f"{repo} is on the Hugging Face hub, without the branch that is needed; see {page}"
    if one_of(
        "RepositoryNotFoundError",
        "doesn't exist on the Hub or cannot be accessed",
        "is not a valid model identifier",
    ):
        return (
            f"the Hugging Face hub has no {what} {repo}, or it is private (`hf auth login` if it "
            f"is yours){short}"
        )
    if one_of("Dataset scripts are no longer supported"):
        return (
            f"{repo} is a script, which `datasets` no longer runs; the hub may have its rows: "
            f"`hf download --repo-type dataset {repo} --revision refs/convert/parquet "
            "--local-dir DIR`"
        )
    # An answer with a status is wrapped in the same errors as no answer, so the status comes first.
    for code in codes & {401, 403}:
        return f"the Hugging Face hub refuses {repo} ({code}): see {page}, then `hf auth login`"
    for code in codes - {None, 404}:
        return f"the Hugging Face hub answers {code} for {repo}; try again later"
    if one_of(
        "OfflineModeIsEnabled", "LocalEntryNotFoundError", "ConnectionError", "ConnectError",
        "TimeoutException", "Couldn't reach", "couldn't connect to",
    ):  # fmt: skip
        return f"{repo} is not in the cache, and the Hugging Face hub is out of reach{short}"
    return f"{repo}: {_without_tokens(common.first_line(chain[0]))}"


def _without_tokens(text: str) -> str:
    return re.sub(r"hf_\w+", "hf_...", text)
