"""Rows from files, published sets and the hub; what is said if there are none; cached tokens."""

import csv
import gzip
import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock, call

import datasets
import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest
from conftest import make_tokenizer

from data import load, published, tokens
from data.kinds import LeftOut, convert

WHY, SO = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}
NO, SYSTEM = SO | {"content": "No."}, {"role": "system", "content": "Be kind."}
CUT_GZIP = gzip.compress(b"[" * 9999, mtime=0)[:-9]


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(path: Path | str, rows: list[dict]) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        cells = [[v if isinstance(v, str) else json.dumps(v) for v in r.values()] for r in rows]
        with open(path, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([rows[0], *cells])
    else:
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        text = json.dumps(rows, indent=1) if ".json" in path.suffixes else lines
        path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def rows_of(dataset, split="train", kind="pair", **how) -> list:
    return [row for _, row in load.read(str(dataset), split, kind, **how)]


def refused(dataset, split="train", kind="pair") -> str:
    with pytest.raises(ValueError) as caught:
        rows_of(dataset, split, kind)
    return str(caught.value)


FILES = [
    [{"prompt": 'a "b",\nc\tä 漢\u2028', "chosen": " 'x', \r\n y", "rejected": " {}[]"}] * 2,
    [{"prompt": "007", "completion": "NA"}, {"prompt": "", "completion": "1"}],
    [{"prompt": "Why?", "responses": ["a", "b"], "scores": [1.0, 2.5]}] * 2,
    [{"prompt": "a", "completion": "b", "label": label} for label in (True, False)],
    [{"messages": [WHY, SO]}, {"messages": [SYSTEM, WHY, SO]}],
]


@pytest.mark.parametrize("ending", load.READERS)
@pytest.mark.parametrize("rows", FILES)
def test_files_give_the_rows_that_were_written(rows, ending):
    path = write(f"rows{ending}", rows)
    if ending == ".csv":  # kinds.py reads lists and labels
        rows = [{k: v if isinstance(v, str) else json.dumps(v) for k, v in r.items()} for r in rows]
    assert rows_of(path) == rows


def test_a_folder_is_read_in_the_order_of_names():
    for name in ("a.json", "b.parquet", "c.csv", "d.jsonl.gz"):
        write(f"folder/{name}", [{"text": name}])
    Path("folder/README.md").write_text("no rows")
    assert "".join(row["text"][0] for row in rows_of("folder")) == "abcd"


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "b.json", "c.csv"])
def test_a_byte_order_mark_blank_lines_and_another_name(name):
    text = {"a": b'{"text": "a"}\r\n\n{"text": "b"}', "b": b'\n[{"text": "a"}, {"text": "b"}]'}
    Path(name).write_bytes(b"\xef\xbb\xbf" + text.get(name[0], b"text\na\nb\n"))
    assert rows_of(name) == [{"text": "a"}, {"text": "b"}]


@pytest.mark.parametrize(
    "name, content, where, reason",
    [
        ("a.jsonl", b'{"text": "a"}\n{\n', "a.jsonl:2", "not JSON (Expecting property"),
        ("a.json", b'{"text": "a"}\n\xff\n', "a.json:2", "not UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n\n3\n', "a.jsonl:3", "must be an object, this is a int"),
        ("a.json", b'[{"text": "a"}, 3]', "a.json:row 2", "a row must be an object"),
        ("a.csv", b"text,x\na,b\nc,d,e\n", "a.csv:3", "another number of cells than the header"),
        ("a.json", b'{"text": "a"}\n{"x":' + b"[" * 100_000, "a.json:2", "nested too deeply"),
    ],
)
def test_a_bad_row_is_named_and_the_others_are_read(name, content, where, reason):
    Path(name).write_bytes(content)
    (_, first), (at, second) = load.read(name, "train", "pair")
    assert first["text"] == "a"
    assert at == where and isinstance(second, ValueError) and reason in str(second)


@pytest.mark.parametrize(
    "name, content, reason",
    [
        ("a.parquet", b"no", "a.parquet: cannot be read (Parquet file size is 2 bytes"),
        ("a.jsonl.gz", b"no", "a.jsonl.gz: cannot be read (Not a gzipped file"),
        ("a.json.gz", CUT_GZIP, "a.json.gz: cannot be read (Compressed"),
        ("a.json", b"[" * 100_000, "a.json: cannot be read (maximum recursion depth exceeded"),
        ("a.csv", b"text\n\xff\n", "a.csv: cannot be read ('utf-8' codec"),
        ("a.txt", b"a", "a.txt: the name must end with one of .jsonl, .json, "),
        ("b/a.jsonl", None, "b/a.jsonl: there is no such file or folder"),
    ],
)
def test_a_file_that_cannot_be_read(name, content, reason):
    if content is not None:
        Path(name).write_bytes(content)
    assert refused(name).startswith(reason)


TLDR = "SUBREDDIT: r/cats\n\nTITLE: Help\n\nPOST: My cat ran off.\n\nTL;DR:"
POST = {"subreddit": "cats", "title": "Help", "post": "My cat ran off."}
ARTICLE = {"article": "News.", **dict.fromkeys(POST)}
HUMAN = "\n\nHuman: Why?\n\nAssistant:"
TO_ENGLISH = "Translate this from German to English:\nGerman: Ja.\nEnglish:"
TO_GERMAN = "Translate this from English to German:\nEnglish: Yes.\nGerman:"
TOWER = "Translate the following German source text to English:\nGerman: Ja.\nEnglish:"
MARKED = f"<|im_start|>user\n{TOWER} <|im_end|>\n<|im_start|>assistant\n"
YES = {"chosen": "Yes.", "rejected": "Yeah."}


def tldr(choice, one=" Cat ran.", other=" A cat.", **more) -> dict:
    summaries = [{"text": one, "note": None}, {"text": other, "note": "short"}]
    row = {"info": POST, "choice": choice, "summaries": summaries, "batch": "batch3"}
    return row | more


def ultrafeedback(chosen, rejected, better, worse, asked=(WHY,)) -> dict:
    dialogues = {"chosen": [*asked, SO | {"content": chosen}]}
    dialogues |= {"rejected": [*asked, SO | {"content": rejected}], "messages": [*asked, SO]}
    return {"prompt": "Why?", "score_chosen": better, "score_rejected": worse, **dialogues}


def hh(chosen, rejected, dialogue=HUMAN) -> dict:
    return {"chosen": dialogue + chosen, "rejected": dialogue + rejected}


def shp(label, votes) -> dict:
    row = {"history": "Why?", "human_ref_A": "So.", "human_ref_B": "No.", "domain": "askbaking"}
    return row | {"labels": label, "score_A": votes[0], "score_B": votes[1]}


def alma(**more) -> dict:
    """The reference is best and ALMA worst in German; GPT-4 is best in English."""
    row = {"language_pair": "de-en", "de": "Ja.", "en": "Yes.", "gpt4_de": "Jawohl."}
    row |= {"alma_de": "Jo.", "gpt4_en": "Aye.", "alma_en": "Yeah.", "Delta": 0.0}
    row |= {f"{who}_de_kiwi_xcomet": x for who, x in (("ref", 0.9), ("gpt4", 0.8), ("alma", 0.7))}
    row |= {f"{who}_en_kiwi_xcomet": x for who, x in (("ref", 0.6), ("gpt4", 0.9), ("alma", 0.7))}
    return {"translation": row | {"required_directions": ""} | more}


TO_DE = {"required_directions": "en-de"}
TIED = {f"{who}_de_kiwi_xcomet": 0.5 for who in ("ref", "gpt4", "alma")} | TO_DE
DIALOGUE = [WHY, SO, WHY]
EMPTY, EQUAL = "with an empty answer", "with equal answers"
PUBLISHED = [
    # name, kind, rows as published, (prompt, response, ...) of each row, what is left out
    ("tldr", "pair",
     [tldr(0), tldr(1), tldr(0, info=ARTICLE), tldr(0, batch="batch0_cnndm"),
      tldr(0, " Same.", " Same."), tldr(1, "", " Good."), tldr(1, " ", " Good.")],
     [(TLDR, " Cat ran.", " A cat."), (TLDR, " A cat.", " Cat ran.")],
     {"about CNN/DM articles": 2, EQUAL: 1, EMPTY: 2}),
    ("tldr", "demonstration", [POST | {"summary": "Cat ran."}, POST | {"summary": " "}],
     [(TLDR, " Cat ran.")], {EMPTY: 1}),
    ("ultrafeedback", "pair",
     [ultrafeedback("So.", "No.", 8.5, 7), ultrafeedback("So.", "No.", 8, 8),
      ultrafeedback("So.", "", 8, 2), ultrafeedback("So.", "No.", 9, 1, [SYSTEM, *DIALOGUE])],
     [([WHY], [SO], [NO]), ([SYSTEM, *DIALOGUE], [SO], [NO])], {"ties": 1, EMPTY: 1}),
    ("ultrafeedback", "demonstration", [ultrafeedback("a", "b", 8, 8)], [([WHY], [SO])], {}),
    ("ultrachat", "demonstration",
     [{"prompt": "Why?", "messages": [WHY, SO]}, {"prompt": "Why?", "messages": [*DIALOGUE, SO]}],
     [([WHY], [SO]), (DIALOGUE, [SO])], {}),
    ("hh", "pair",
     [hh(" So.", " No."), hh(" So.", " No.", HUMAN + " Hi" + HUMAN), hh(" So.", " So."),
      hh(" So.", ""), hh("", "", "\n\nHuman: Why?"),
      hh(" So.", "") | {"rejected": "\n\nHuman: Who?\n\nAssistant: No."}],
     [(HUMAN, " So.", " No."), (HUMAN + " Hi" + HUMAN, " So.", " No.")],
     {EQUAL: 1, EMPTY: 1, "with different dialogues before the answer": 2}),
    ("shp", "pair", [shp(1, (10, 5)), shp(0, (3, 12)), shp(1, (9, 5)), shp(1, (5, 5))],
     [(HUMAN, " So.", " No."), (HUMAN, " No.", " So.")], {"with less than twice the votes": 2}),
    ("kto-mix", "labelled",
     [{"prompt": DIALOGUE, "completion": [NO], "label": False, "id": 1},
      {"prompt": [WHY], "completion": [SO | {"content": " "}], "label": True, "id": 2}],
     [(DIALOGUE, [NO], False)], {EMPTY: 1}),
    ("alma-r", "ranked",  # with Delta people compared two, and the scores do not count
     [alma(), alma(alma_de="Ja.", **TO_DE), alma(Delta=-0.5, **TO_DE), alma(**TIED)],
     [(TO_ENGLISH, [" Aye.", " Yeah.", " Yes."], [0.9, 0.7, 0.6]),
      (TO_GERMAN, [" Ja.", " Jawohl.", " Jo."], [0.9, 0.8, 0.7]),
      (TO_GERMAN, [" Ja.", " Jawohl."], [0.9, 0.8]),
      (TO_GERMAN, [" Jo.", " Jawohl."], [0.0, -0.5])], {"ties": 1}),
    ("alma-r", "pair", [alma(required_directions="de-en"), alma(Delta=1.5, **TO_DE)],
     [(TO_ENGLISH, " Aye.", " Yes."), (TO_GERMAN, " Jawohl.", " Jo.")], {}),
    ("mt-pref", "pair",
     [{"source": "Ja.", "lp": "de-en", "prompt": None, **YES}, {"prompt": MARKED, **YES},
      {"prompt": MARKED, "chosen": "Yes.", "rejected": "Yes."}],
     [(TOWER, " Yes.", " Yeah.")] * 2, {EQUAL: 1}),
]  # fmt: skip


@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
@pytest.mark.parametrize("name, kind, raw, expected, lost", PUBLISHED)
def test_published_rows(name, kind, raw, expected, lost, ending):
    rows = rows_of(f"{name}={write(f'rows{ending}', raw)}", kind=kind)
    made = [n for row in rows for n in ([row] if isinstance(row, LeftOut) else convert(row, kind))]
    assert [tuple(new.values()) for new in made if isinstance(new, dict)] == expected
    assert Counter(str(new) for new in made if isinstance(new, LeftOut)) == lost


@pytest.mark.parametrize(
    "name, row, reason",
    [
        ("tldr", tldr(2), "'choice' must be 0 or 1, this is 2"),
        ("tldr", tldr(0, summaries=[{"text": "a"}]), "(IndexError: list index out of range)"),
        (
            "tldr",
            {"a": 1},
            "not as openai/summarize_from_feedback was published (KeyError: 'info')",
        ),
        ("shp", shp(2, (9, 1)), "'labels' must be 0 or 1, this is 2"),
        ("alma-r", alma(alma_en=None), "(TypeError: can only concatenate str"),
        ("mt-pref", {"source": "a", "lp": "de-xx", **YES}, "published (KeyError: 'xx')"),
    ],
)
def test_a_row_that_is_not_as_published(name, row, reason):
    path = write("rows.jsonl", [row])
    path.write_text(path.read_text() + "{\n")
    (where, bad), (second, broken) = load.read(f"{name}=rows.jsonl", "train", "pair")
    assert (where, second) == ("rows.jsonl:1", "rows.jsonl:2") and reason in str(bad)
    assert isinstance(bad, ValueError) and str(broken).startswith("not JSON")


@pytest.mark.parametrize(
    "limit, kept", [(18, "one\ntwo two\nfour"), (15, "one\ntwo two"), (10, "one"), (3, "one")]
    + [(2, "on"), (0, ""), (-1, "")],  # -1: the rest is too long too, and is cut like any prompt
)  # fmt: skip
def test_a_post_loses_lines_then_letters(limit, kept):
    limit += len(TLDR) - len(POST["post"])
    write("rows.jsonl", [tldr(0, info=POST | {"post": "one\ntwo two\nfour"})])
    (row,) = rows_of("tldr=rows.jsonl", fits=lambda prompt: len(prompt) <= limit)
    assert row["prompt"] == TLDR.replace(POST["post"], kept)


def as_on_the_hub(folder: Path) -> Path:
    """Files of several sets, under the names that they have in their repositories."""
    trained = {"harmless-base/train": "a", "helpful-base/train": "b", "helpful-base/train_x": "d"}
    for name, answer in (trained | {"helpful-base/test": "c"}).items():
        write(folder / f"hh/{name}.jsonl.gz", [hh(answer, " no")])
    for name, answer in {"train_prefs": "a", "test_prefs": "b", "train_sft": "c"}.items():
        row = ultrafeedback(answer, "no", 2, 1)
        write(folder / f"ultrafeedback/data/{name}-00000-of-00001.parquet", [row])
    for name in ("comparisons/train", "comparisons/validation", "axis/validation"):
        write(folder / f"tldr/{name}/0000.parquet", [tldr(0, f"{name[0]}{name[-1]}")])
    for pair in ("cs-en", "de-en"):
        row = alma(language_pair=pair, cs="Ano.", required_directions=pair)
        write(folder / f"alma-r/{pair}/train-00000-of-00001-5d846e.parquet", [row])
    return folder


@pytest.mark.parametrize(
    "dataset, copy, split, answers, has_test",
    [
        ("hh", "hh", "train", "ab", True),
        ("hh", "hh", "test", "c", True),
        ("hh:helpful-base:test", "hh", "train", "c", False),
        ("hh:harmless-base", "hh", "train", "a", False),  # its test split was not downloaded
        ("hh:harmless-base,helpful-base", "hh", "train", "ab", True),
        ("anthropic/HH-RLHF:helpful-base", "hh", "train", "b", True),
        ("ultrafeedback", "ultrafeedback", "train", "a", True),
        ("ultrafeedback::test_prefs", "ultrafeedback", "train", "b", False),
        ("tldr", "tldr", "test", "cn", True),
        ("alma-r:cs-en", "alma-r", "train", "Aye.", False),  # none was published
    ],
)
def test_files_of_a_copy(dataset, copy, split, answers, has_test, tmp_path):
    named = f"{dataset}={as_on_the_hub(tmp_path) / copy}"
    best = [convert(row, "demonstration")[0]["completion"] for row in rows_of(named, split)]
    texts = [text if isinstance(text, str) else text[0]["content"] for text in best]
    assert "".join(texts).strip() == answers
    assert load.test_split(named, "pair") == (named if has_test else None)


def test_names_that_are_refused(tmp_path):
    folder = as_on_the_hub(tmp_path) / "hh"
    others = "these have: tldr, ultrafeedback, hh, shp, alma-r, mt-pref"
    assert refused("ultrachat") == f"ultrachat: has no pair rows; {others}"
    assert refused("trl-lib/kto-mix-14k", kind="ranked").endswith(f"no ranked rows; {others}")
    assert refused("tldr=nowhere") == "tldr=nowhere: there is no file or folder 'nowhere'"
    assert refused("tldr=") == "tldr=: there is no file or folder ''"
    asked = f"hh:harmless-base,typo={folder}"
    assert refused(asked) == f"{asked}: no file of the split train in {folder}/typo"
    assert refused(f"shp={folder}", "test").endswith(f"of the split validation in {folder}")


@pytest.mark.parametrize("name", ["Anthropic/hh-rlhf", "x=1"])
def test_paths_that_look_like_names(name):
    write(f"{name}/rows.jsonl", [{"text": "a"}])
    assert rows_of(name) == [{"text": "a"}] and load.test_split(name, "pair") is None


@pytest.mark.parametrize(
    "dataset, split, name, revision, patterns",
    [
        ("tldr", "test", "tldr", "refs/convert/parquet", ["comparisons/*validation*"]),
        ("anthropic/HH-RLHF", "test", "hh", None, ["*test*"]),
        ("hh:helpful-base", "train", "hh", None, ["helpful-base/*train*"]),
        ("alma-r:de-en,cs-en", "train", "alma-r", None, ["de-en/*train*", "cs-en/*train*"]),
    ],
)
def test_what_is_downloaded(dataset, split, name, revision, patterns, tmp_path, monkeypatch):
    repo = next(s.repo for s in published.SOURCES if s.name == name and s.kind != "demonstration")
    patterns = [start + ending for start in patterns for ending in load.READERS]

    download = Mock(return_value=as_on_the_hub(tmp_path) / name)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert rows_of(dataset, split)
    how = {"revision": revision, "allow_patterns": patterns}
    download.assert_called_once_with(repo, repo_type="dataset", **how)
    assert load.test_split(dataset, "pair") == (None if "alma" in dataset else dataset)


def test_other_hub_ids_go_through_datasets(monkeypatch):
    load_dataset = Mock(return_value=[{"text": "a"}])
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda *_: ["train", "test"])
    assert list(load.read("o/n:part", "train", "pair")) == [("o/n:part:row 1", {"text": "a"})]
    assert rows_of("o/n::dev") == rows_of("o/n:part:dev", "test") == [{"text": "a"}]
    asked = [("part", "train"), (None, "dev"), ("part", "dev")]
    assert load_dataset.mock_calls == [call("o/n", part, split=split) for part, split in asked]
    assert load.test_split("o/n:part", "pair") == "o/n:part:test"


def hub(name: str, status: int) -> Exception:
    answer = SimpleNamespace(status_code=status, headers={}, request=None)
    return getattr(huggingface_hub.errors, name)("", response=answer)


GATED, ABSENT, AWAY = "is gated: accept its licence at", "the hub has no", "cannot be reached"


@pytest.mark.parametrize(  # the hub's client, datasets and transformers say this, or raise it
    "text, cause, reason",
    [
        ("You are trying to access a gated repo.", hub("GatedRepoError", 403), GATED),
        ("Dataset 'o/n' is a gated dataset on the Hub.", None, GATED),
        ("", hub("RepositoryNotFoundError", 404), ABSENT),
        ("Dataset 'o/n' doesn't exist on the Hub or cannot be accessed.", None, ABSENT),
        ("o/n is not a local folder and is not a valid model identifier", None, ABSENT),
        ("We couldn't connect to", hub("HfHubHTTPError", 403), "the hub refuses o/n: see https"),
        ("", huggingface_hub.errors.LocalEntryNotFoundError(""), AWAY),
        ("Couldn't reach 'o/n' on the Hub (OfflineModeIsEnabled)", None, AWAY),
        ("no split hf_abcDEF123 of\nthese: a, b", None, "o/n: no split hf_... of these: a, b."),
    ],
)
@pytest.mark.parametrize("what, option", [("dataset", " --repo-type dataset"), ("model", "")])
def test_why_the_hub_gave_nothing(text, cause, reason, what, option):
    error = OSError(text)
    error.__cause__ = cause
    said = load.hub_failure(error, "o/n", what)
    assert reason in said
    assert said.endswith(f" `hf download o/n{option} --local-dir DIR` on a machine with access")
    assert reason != GATED or ("co/datasets/o/n, then" in said) == (what == "dataset")


def test_offline(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    said = refused("tldr")
    assert said.startswith("tldr: openai/summarize_from_feedback is not in the cache, and the hub")
    command = "openai/summarize_from_feedback --repo-type dataset --revision refs/convert/parquet"
    assert said.endswith(
        f"{command} --local-dir DIR` on a machine with access (use it as tldr=DIR)"
    )
    assert refused("hhh").startswith("hhh: there is no such file or folder, and hhh is not in the")
    assert "(short names: tldr, ultrafeedback, ultrachat, " in refused("hhh")
    assert load.test_split("o/n", "pair") is None


def test_tokens_are_those_of_the_tokenizer_and_are_kept(tmp_path):
    tokenizer, texts = make_tokenizer("bos"), ["the cat", "", " é漢<s>\n", *map(str, range(3000))]
    expected = tokenizer(texts, add_special_tokens=False).input_ids
    folder = tmp_path / "new" / "folder"
    assert tokens.encode(texts, tokenizer, folder) == expected
    (file,) = folder.iterdir()
    written = file.stat().st_mtime_ns
    assert tokens.encode(texts, tokenizer, folder) == expected
    assert file.stat().st_mtime_ns == written
    others = [*texts[:-2], "29982999", ""]  # joined, they are the same text
    assert tokens.encode(others, tokenizer, folder)[:-2] == expected[:-2]
    other = make_tokenizer("chat")
    assert tokens.encode(texts, other, folder) == other(texts, add_special_tokens=False).input_ids
    assert len([*folder.iterdir()]) == 3
