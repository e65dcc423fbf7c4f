"""Large sets as tokens: many texts at once, by tiktoken where it gives the same ids, made by one
process and kept. Whatever the way, the rows are those of one text after another.
"""

import json
import random
import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, make_tokenizer, pair_rows, run_script, write_jsonl
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import PreTrainedTokenizerFast

import bytelevel
import common
import tokenising

KINDS = ("bos", "chat", "pad-eos")
MANY = 30  # rows that are a large set here


@pytest.fixture(autouse=True)
def _small_is_large(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common, "MANY_ROWS", MANY)
    monkeypatch.setattr(common, "CHUNK", 7)
    monkeypatch.setattr(tokenising, "PROVEN_ON", 10)


def as_loaded(tokenizer):
    """What common.load_tokenizer adds."""
    tokenizer.stop_ids = frozenset([tokenizer.eos_token_id])
    first = tokenizer("a").input_ids[:1]
    tokenizer.bos = first if first == [tokenizer.bos_token_id] else []
    return tokenizer


def load(rows: list[dict] | Path, tokenizer, kind: str = "pair", most=(60, 40), **more):
    """The training rows; none is held out."""
    file = rows if isinstance(rows, Path) else write_jsonl(Path("rows.jsonl"), rows)
    few = [row | {"target": " a"} for row in pair_rows(1, seed=9)]
    few = write_jsonl(Path("few.jsonl"), few)
    return common.load_rows(str(file), str(few), kind, tokenizer, *most, **more)[0]


def ids_of(rows: common.Rows) -> list[list[list[int]]]:
    return [[part.tolist() for part in (r.prompt, *r.responses, r.ask)] for r in rows.rows]


def messages(row: dict) -> dict:
    said = {name: [{"role": "assistant", "content": row[name]}] for name in ("chosen", "rejected")}
    return {"prompt": [{"role": "user", "content": row["prompt"]}], **said}


def kept() -> list[Path]:
    return sorted(Path("runs/.cache").glob("*"))


# -- many texts at once


def one_by_one(tokenizer) -> Callable:
    return lambda texts: [tokenizer(t, add_special_tokens=False).input_ids for t in texts]


@pytest.mark.parametrize("large", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_those_of_one_text_after_another(kind, large, monkeypatch, capsys):
    tokenizer = as_loaded(make_tokenizer(kind))
    monkeypatch.setattr(common, "MANY_ROWS", MANY if large else 1000)
    rows = pair_rows(40)
    if kind == "chat":
        rows[::2] = map(messages, rows[::2])
    rows[3]["chosen"] = rows[3]["chosen"] * 9  # cut
    rows[11] = rows[12] = rows[10]  # the same texts in one chunk
    found = load(rows, tokenizer)
    report = capsys.readouterr().out
    assert ("tokens     by tiktoken, which gives the tokenizer's ids of 10 rows" in report) == large

    monkeypatch.setattr(common, "MANY_ROWS", 1000)
    monkeypatch.setattr(common, "CHUNK", 1)
    monkeypatch.setattr(common, "by_tokenizer", one_by_one)
    assert ids_of(found) == ids_of(load(rows, tokenizer))
    assert [x for x in report.splitlines() if x[:6] != "tokens"] == (
        capsys.readouterr().out.splitlines()
    )
    plain = lambda text: tokenizer(text, add_special_tokens=False).input_ids  # noqa: E731
    assert found.rows[1].prompt.tolist() == tokenizer.bos + plain(rows[1]["prompt"])
    said = [[*plain(rows[1][name]), tokenizer.eos_token_id] for name in ("chosen", "rejected")]
    assert [r.tolist() for r in found.rows[1].responses] == said


BAD = {
    2: '{"prompt": "a", "chosen": "b \\ud800", "rejected": "c"}',  # known before the tokenizer
    4: '{"prompt": "a", "chosen": "b</s> c", "rejected": "c"}',  # known behind it
    5: '{"prompt": "a"',
    6: '{"prompt": "a", "chosen": "b", "rejected": "b"}',
    25: '{"prompt": "a \\udfff", "chosen": "b", "rejected": "c"}',
}


def with_bad_rows(n: int) -> Path:
    lines = [BAD.get(i, json.dumps(row)) for i, row in enumerate(pair_rows(n), 1)]
    file = Path("bad.jsonl")
    file.write_text("\n".join(lines) + "\n")
    return file


@pytest.mark.parametrize("n", [28, 40])
def test_bad_rows_are_told_in_their_order_and_the_others_of_their_chunk_stay(n, capsys):
    tokenizer = as_loaded(make_tokenizer("bos"))
    with pytest.raises(common.UserError) as error:
        load(with_bad_rows(n), tokenizer)
    places = [line.split(":")[1] for line in str(error.value).splitlines()[1:]]
    assert places == [str(number) for number in BAD]
    assert "half a character" in str(error.value) and "in the middle of a" in str(error.value)
    assert len(load(with_bad_rows(n), tokenizer, skip_bad_rows=True)) == n - len(BAD)
    assert f"5 bad ({Path('bad.jsonl')}:2: a text holds half" in capsys.readouterr().out


def test_what_a_row_gave_before_it_proved_bad_is_kept_as_ever(capsys):
    """A ranked list gives several pairs, and only the last of these holds an early end."""
    tokenizer = as_loaded(make_tokenizer("bos"))
    ranked = {"prompt": "a", "responses": ["b", "c", "d</s> e"], "scores": [3, 2, 1]}
    rows = load([ranked], tokenizer, pairs="adjacent", skip_bad_rows=True)
    assert len(rows) == 1 and "1 bad" in capsys.readouterr().out


def test_no_text_is_tokenised_twice_in_a_chunk(monkeypatch):
    seen, by_tokenizer = [], common.by_tokenizer
    noting = lambda tok: lambda texts: seen.extend(texts) or by_tokenizer(tok)(texts)  # noqa: E731
    monkeypatch.setattr(common, "by_tokenizer", noting)
    ranked = {"prompt": "a", "responses": ["b", "c", "d", "e"], "scores": [4, 3, 2, 1]}
    few = common._read(  # noqa: SLF001
        str(write_jsonl(Path("r.jsonl"), [ranked])), "train", "pair",
        as_loaded(make_tokenizer("bos")), (60, 40), "all", False, False, None, False,
    )  # fmt: skip
    assert len(few) == 6 and sorted(seen) == ["a", "b", "c", "d", "e"]


@pytest.mark.parametrize("n", [MANY - 5, MANY + 10])
def test_published_sets_ask_whether_a_prompt_fits(n, monkeypatch, capsys):
    """The tokenizer is asked when the tokens are new; to look them up, every prompt is taken to."""
    tokenizer = as_loaded(make_tokenizer("bos"))
    asked, exactly = [], common.Fits.exactly
    monkeypatch.setattr(
        common.Fits, "exactly", lambda fits, text: asked.append(text) or exactly(fits, text)
    )

    def rows(dataset, split, kind, fits):
        for i, row in enumerate(pair_rows(n)):
            text = "mat " * i
            while not fits(text):
                text = text[:-4]
            yield f"row {i}", row | {"prompt": text or "a"}
            if i % 10 == 0:
                yield f"row {i}", common.LeftOut("ties")

    monkeypatch.setattr(common, "_raw_rows", rows)
    many = load([], tokenizer, most=(60, 20))
    longest = max(len(row.prompt) for row in many.rows)
    assert len(many) == n and longest == 20 and asked  # none cut here, none shortened too far
    out = capsys.readouterr().out
    assert f"{-(-n // 10)} ties" in out and "; 0 prompts and" in out
    asked.clear()
    again = load([], tokenizer, most=(60, 20))
    assert ids_of(again) == ids_of(many)
    assert bool(asked) == (n < MANY)


def test_a_prompt_fits_by_its_tokens():
    tokenizer = as_loaded(make_tokenizer("bos"))
    fits = common.Fits(tokenizer, 5)  # BOS and four more
    for text in ("abcd", "xyzw", "é\u0301", "中", "中文", "xyzwv", "a\ud800"):
        half = "\ud800" in text  # told of later
        count = 0 if half else len(tokenizer(text).input_ids)
        assert fits.exactly(text) == (count <= 5), text
    assert fits("abc") and not fits.doubtful
    assert fits("a" * 99) and fits.doubtful


# -- tiktoken

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
ALPHABET = (
    [" "] * 40
    + list("etaoinshrdlu" * 3 + "bcfgjkmpqvwxyzETAIN0123456789'.,;!?-_#/()\n\n\t\r")
    + list("éüßñçåÅı中文字日本語한글ไทยعربי\u0301\u0308\u212b\u00a0\u3000\u200d\ufeff½Ⅷ٣²ﬁ’…—")
    + ["\U0001f469", "\U0001f1e9", "\U0001f600", "'s", "'LL", "<|end|>", "<|e", "<s>", "  ", "the"]
)


def noise(rng: random.Random, n: int) -> list[str]:
    return ["".join(rng.choices(ALPHABET, k=rng.randint(0, 60))) for _ in range(n)]


def byte_level(pattern: str | None, composed: bool = False, special=("<|end|>",)) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    split = pattern and pre_tokenizers.Split(Regex(pattern), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, level]) if pattern else level
    tokenizer.normalizer = normalizers.NFC() if composed else None
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=list(special), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    texts = [text for text in noise(random.Random(1), 400)]
    tokenizer.train_from_iterator([*texts, Path(__file__).read_text(encoding="utf-8")], trainer)
    return tokenizer


def changed(tokenizer: Tokenizer, change: Callable[[dict], None]) -> Tokenizer:
    facts = json.loads(tokenizer.to_str())
    change(facts)
    return Tokenizer.from_str(json.dumps(facts))


def shuffle_ids(facts: dict) -> None:
    """As where a vocabulary was sorted by something else: ids that say nothing of the order."""
    vocab, added = facts["model"]["vocab"], {t["content"] for t in facts["added_tokens"]}
    ids = [i for token, i in vocab.items() if token not in added]
    random.Random(3).shuffle(ids)
    facts["model"]["vocab"] = {t: i if t in added else ids.pop() for t, i in vocab.items()}


def whole_words(facts: dict) -> None:
    facts["model"]["ignore_merges"] = True


def add_tokens(*tokens: AddedToken) -> Callable[[Tokenizer], None]:
    return lambda tokenizer: tokenizer.add_tokens(list(tokens))


def wrapped(tokenizer: Tokenizer):
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")
    return as_loaded(fast)


def spaces(tokenizer: Tokenizer) -> Tokenizer:
    """As in Pythia: runs of spaces, each the beginning of the next."""
    tokenizer.add_tokens([AddedToken(" " * n, normalized=True) for n in (4, 3, 2)])
    return tokenizer


LIKE = {
    "GPT-2": lambda: byte_level(None),
    "GPT-2, ids in another order": lambda: changed(byte_level(None), shuffle_ids),
    "Pythia": lambda: spaces(byte_level(None, composed=True)),
    "Llama 3": lambda: changed(byte_level(LLAMA3), whole_words),
    "Qwen 2": lambda: byte_level(QWEN2, composed=True),
    "Qwen 2, ids in another order": lambda: changed(byte_level(QWEN2, True), shuffle_ids),
}


@pytest.mark.parametrize("name", LIKE)
def test_tiktoken_gives_the_ids_of_the_tokenizer(name, monkeypatch):
    tokenizer = wrapped(LIKE[name]())
    encode, how = bytelevel.encoder(tokenizer, {})
    assert how.startswith("by tiktoken")
    texts = noise(random.Random(2), 3000)
    texts += [unicodedata.normalize("NFD", text) for text in texts[:300]]
    expected = one_by_one(tokenizer)(texts)
    given = {}  # to the tokenizer itself
    by_tokenizer = common.by_tokenizer
    monkeypatch.setattr(
        common,
        "by_tokenizer",
        lambda tok: lambda texts: given.update(dict.fromkeys(texts)) or by_tokenizer(tok)(texts),
    )
    encode, _ = bytelevel.by_tiktoken(tokenizer)
    assert encode(texts) == expected
    assert sum(len(set(ids)) for ids in expected[:3000]) > 20_000  # texts of many tokens
    if tokenizer.backend_tokenizer.normalizer is None:
        assert not given
    else:
        assert given and all(not unicodedata.is_normalized("NFC", text) for text in given)


def test_a_very_long_text_is_left_to_the_tokenizer():
    tokenizer = wrapped(byte_level(None))
    encode, _ = bytelevel.by_tiktoken(tokenizer)
    text = " " * 1_500_000 + "a"  # tiktoken's regex engine runs out of stack
    assert encode(["the", text]) == one_by_one(tokenizer)(["the", text])


def sentencepiece(**more) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", **more))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(special_tokens=["<unk>", "<|end|>"], show_progress=False)
    tokenizer.train_from_iterator(["the cat sat on the mat"], trainer)
    return tokenizer


def unigram() -> Tokenizer:
    pieces = [("<unk>", 0.0), ("<|end|>", 0.0), ("a", -1.0), ("b", -2.0), ("▁", -1.0)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


def with_(tokenizer: Tokenizer, **parts) -> Tokenizer:
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    return tokenizer


def with_token(**more) -> Tokenizer:
    tokenizer = byte_level(None)
    tokenizer.add_tokens([AddedToken("<x>", **more)])
    return tokenizer


def never_merged(facts: dict) -> None:
    facts["model"]["vocab"]["thecat"] = 5000
    facts["model"]["ignore_merges"] = True


def early_and_late(facts: dict) -> None:
    """In training `ab` + `c` came first; `a` + `bc` would make the same token much later."""
    merges, vocab = facts["model"]["merges"], facts["model"]["vocab"]
    token, split = next(
        (a + b, [a[0], a[1:] + b])
        for a, b in merges
        if len(a) > 1 and a[1:] + b in vocab and [a[0], a[1:] + b] not in merges
    )
    assert token in vocab
    merges.append(split)


def in_any_case(facts: dict) -> None:
    """A pair that training would have merged is not: only results tell."""
    facts["model"]["merges"] = facts["model"]["merges"][::-1]


LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False)
REFUSED = {
    "not a plain byte-level": lambda: sentencepiece(byte_fallback=True),
    "not a plain byte-level BPE": unigram,
    "it is not a plain byte-level one": lambda: with_(
        byte_level(None), pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)
    ),
    "it splits texts in a way of its own": lambda: with_(
        byte_level(None), pre_tokenizer=pre_tokenizers.Sequence([pre_tokenizers.Digits(), LEVEL])
    ),
    "a normalizer that is not NFC (NFKC)": lambda: with_(
        byte_level(None), normalizer=normalizers.NFKC()
    ),
    "its token '<x>' takes in more": lambda: with_token(lstrip=True),
    "its token '<x>' takes": lambda: with_token(rstrip=True),
    "its token '<x>'": lambda: with_token(single_word=True),
    "its token 'thecat' is never merged": lambda: changed(byte_level(LLAMA3), never_merged),
    "merges to one token early and late": lambda: changed(byte_level(None), early_and_late),
    "it marks parts of words": lambda: changed(
        byte_level(None), lambda facts: facts["model"].update(end_of_word_suffix="</w>")
    ),
    "its vocabulary is not one of bytes": lambda: changed(
        byte_level(None), lambda facts: facts["model"]["vocab"].pop("Ā")
    ),
    # What only the results show.
    "tiktoken gives other ids": lambda: byte_level(r"\p{L}+"),  # between its matches: nothing
    "tiktoken gives other": lambda: changed(byte_level(None), in_any_case),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_is_not_understood_or_differs_is_left_to_the_tokenizer(reason):
    tokenizer = wrapped(REFUSED[reason]())
    encode, how = bytelevel.encoder(tokenizer, {})
    assert how.startswith("by the tokenizer; ") and reason in how
    texts = ["the cat<x> 12", " a\n"]
    assert encode(texts) == one_by_one(tokenizer)(texts)


def test_one_other_id_in_the_sample_is_enough():
    tokenizer = wrapped(byte_level(None))
    ids = one_by_one(tokenizer)(["the cat"])[0]
    assert bytelevel.encoder(tokenizer, {"the cat": ids})[1].startswith("by tiktoken")
    encode, how = bytelevel.encoder(tokenizer, {"the cat": [*ids[:-1], ids[-1] + 1]})
    assert how == "by the tokenizer; tiktoken gives other ids of 'the cat'"


def test_special_tokens_that_are_not_looked_for_in_texts():
    """A setting of Transformers, which tokenizer.json says nothing of."""
    tokenizer = wrapped(byte_level(None))
    tokenizer.split_special_tokens = True
    encode, how = bytelevel.encoder(tokenizer, {})
    assert "tiktoken gives other ids of 'a <|end|>" in how
    assert encode(["<|end|>"]) != [[tokenizer.eos_token_id]]


# -- kept by content


def lines(out: str) -> tuple[list[str], str]:
    """The report, and how the tokens were made."""
    every = out.splitlines()
    return [x for x in every if x[:6] != "tokens"], "".join(x for x in every if x[:6] == "tokens")


@pytest.mark.parametrize(
    "more", [{}, {"skip_bad_rows": True}, {"kind": "demonstration", "prompt_too": True}]
)
def test_rows_and_report_come_back_from_where_they_were_kept(more, monkeypatch, capsys):
    tokenizer = as_loaded(make_tokenizer("bos"))
    rows = with_bad_rows(40) if "skip_bad_rows" in more else pair_rows(40)
    first = load(rows, tokenizer, **more)
    report, how = lines(capsys.readouterr().out)
    assert "by tiktoken" in how and len(kept()) == 1

    def refuse(*_):
        raise AssertionError("tokenised again")

    monkeypatch.setattr(common, "_texts", refuse)
    monkeypatch.setattr(common, "_own_test_split", lambda *_: None)
    file = rows if isinstance(rows, Path) else Path("rows.jsonl")
    kind = more.pop("kind", "pair")
    monkeypatch.setattr(common, "_choose", lambda rows, most, *_: ([], rows))
    again, _ = common.load_rows(str(file), None, kind, tokenizer, 60, 40, **more)
    assert ids_of(again) == ids_of(first)
    assert again.digest() == first.digest()
    both, how = lines(capsys.readouterr().out)
    both = [line for line in both if not line.startswith("held out")]
    assert both == report[: len(both)] and len(both) == 3
    assert how == f"tokens     from {kept()[0]}"


def ranked_rows(n: int) -> list[dict]:
    """Lists of two to five answers, some scores alike, in no order."""
    rng, rows = random.Random(4), []
    for i, row in enumerate(pair_rows(n)):
        responses = [f" {word} {i}" for word in "one two three four five".split()[: 2 + i % 4]]
        scores = [round(rng.uniform(-1, 1), 1) / 3 for _ in responses]
        scores[-1] = 2.0
        rows.append({"prompt": row["prompt"], "responses": responses, "scores": scores})
    return rows


SCORED = {
    "labels": ("labelled", lambda: [labelled(row, i) for i, row in enumerate(pair_rows(40))], {}),
    "pairs as labels": ("labelled", lambda: pair_rows(40), {}),
    "lists as labels": ("labelled", lambda: ranked_rows(40), {}),
    "lists": ("ranked", lambda: ranked_rows(40), {}),
    "pairs as lists": ("ranked", lambda: pair_rows(40), {}),
    "pairs and targets": (
        "pair", lambda: [row | {"target": " a"} for row in pair_rows(40)], {"targets": True}
    ),
}  # fmt: skip


def labelled(row: dict, i: int) -> dict:
    return {"prompt": row["prompt"], "completion": row["chosen"], "label": i % 3 == 0}


def scores_of(rows: common.Rows) -> list[list[float] | None]:
    return [None if row.scores is None else row.scores.tolist() for row in rows.rows]


@pytest.mark.parametrize("name", SCORED)
def test_scores_and_targets_come_back_too(name, monkeypatch, capsys):
    kind, rows, more = SCORED[name]
    tokenizer = as_loaded(make_tokenizer("bos"))
    monkeypatch.setattr(common, "_own_test_split", lambda *_: None)
    monkeypatch.setattr(common, "_choose", lambda rows, most, *_: ([], rows))

    def read() -> common.Rows:
        return common.load_rows("rows.jsonl", None, kind, tokenizer, 60, 40, **more)[0]

    write_jsonl(Path("rows.jsonl"), rows())
    first = read()
    report, how = lines(capsys.readouterr().out)
    assert "by tiktoken" in how and len(kept()) == 1
    monkeypatch.setattr(common, "_texts", None)  # nothing is tokenised again
    again = read()
    both, how = lines(capsys.readouterr().out)
    assert how == f"tokens     from {kept()[0]}" and both == report
    assert ids_of(again) == ids_of(first)
    assert scores_of(again) == scores_of(first) and again.digest() == first.digest()
    if kind == "pair":
        assert scores_of(first) == [None] * 40
        assert {len(row.responses) for row in first.rows} == {3}
    else:
        assert all(row.scores.dtype == float for row in again.rows)
    if name == "lists":
        assert scores_of(again) == [sorted(row["scores"], reverse=True) for row in rows()]
    if name == "labels":
        assert scores_of(again) == [[float(row["label"])] for row in rows()]


def test_a_score_a_label_and_a_target_give_another_key_and_digest():
    lists, labels = ranked_rows(40), [labelled(row, i) for i, row in enumerate(ROWS)]
    target = [row | {"target": " a"} for row in ROWS]
    pairs = {
        "a score": (lists, [*lists[:-1], lists[-1] | {"scores": [9, 8, 7, 6, 5]}], "ranked"),
        "a label": (labels, [*labels[:-1], labels[-1] | {"label": not labels[-1]["label"]}],
                    "labelled"),
        "a target": (target, [*target[:-1], target[-1] | {"target": " b"}], "pair"),
    }  # fmt: skip
    for name, (one, other, kind) in pairs.items():
        more = {"targets": True} if name == "a target" else {}
        seen = set(kept())
        digests = [load(rows, chat(), kind, **more).digest() for rows in (one, other, one)]
        assert digests[0] == digests[2] != digests[1], name
        assert len(set(kept()) - seen) == 2, name
    seen = set(kept())
    without = load(target, chat())
    assert len(set(kept()) - seen) == 1 and len(without.rows[0].responses) == 2


def test_a_file_of_another_layout_is_made_again(capsys):
    """As files were before rows had scores: whole by its own digest, two numbers a row."""
    tokenizer = as_loaded(make_tokenizer("bos"))
    first = load(ROWS, tokenizer)
    (file,) = kept()
    with safe_open(file, "pt") as saved:
        tensors = {name: saved.get_tensor(name) for name in ("ids", "lengths", "rows")}
        facts = saved.metadata()["facts"]
    tensors["rows"] = tensors["rows"].view(-1, 3)[:, :2].flatten()
    sha256 = tokenising.digest(tensors, facts)
    save_file(tensors, file, {"facts": facts, "sha256": sha256})
    capsys.readouterr()
    assert ids_of(load(ROWS, tokenizer)) == ids_of(first)
    _, how = lines(capsys.readouterr().out)
    assert how.count("is damaged (") == 1 and "scores" in how
    assert "so they are made again" in how and "by tiktoken" in how
    assert ids_of(tokenising.load(file)) == ids_of(first)


def test_rows_without_scores_stand_beside_rows_with(tmp_path):
    """Whatever a method may come to keep: each row gets its own back."""
    ids = lambda *n: np.array(n, np.int32)  # noqa: E731
    rows = [
        common.Row(ids(1, 2), [ids(3), ids(4, 5)], ids(1), np.array([2.5, -1.0])),
        common.Row(ids(1), [ids(3)], ids(1)),
        common.Row(ids(6), [ids(3), ids(4), ids(5)], ids(6), np.array([1e-300, 0.0, -1e300])),
        common.Row(ids(7), [ids(8)], ids(7), np.array([1.0])),
    ]
    found = common.Found(rows, common.Counter(read=4), [], "ranked")
    assert tokenising.save(tmp_path / "tokens", found)
    again = tokenising.load(tmp_path / "tokens")
    assert (again.counts, again.bad, again.kind) == (found.counts, [], "ranked")
    assert ids_of(again) == ids_of(found) and scores_of(again) == scores_of(found)
    assert common.Rows("", again.rows).digest() == common.Rows("", rows).digest()


def chat(template_end: str = ""):
    tokenizer = as_loaded(make_tokenizer("chat"))
    tokenizer.chat_template += template_end
    return tokenizer


def other_stop():
    tokenizer = chat()
    tokenizer.stop_ids |= {5}
    return tokenizer


def one_merge_less():
    tokenizer = make_tokenizer("chat")
    changes = lambda facts: facts["model"]["merges"].pop()  # noqa: E731
    tokenizer._tokenizer = changed(tokenizer.backend_tokenizer, changes)
    return as_loaded(tokenizer)


ROWS = pair_rows(40)
OTHERS = {
    "a row": {"rows": [*ROWS[:-1], ROWS[0]]},
    "their order": {"rows": ROWS[::-1]},
    "the length": {"most": (59, 40)},
    "the prompt's length": {"most": (60, 39)},
    "the template": {"tokenizer": lambda: chat(" ")},
    "the tokenizer": {"tokenizer": one_merge_less},
    "what ends a response": {"tokenizer": other_stop},
    "the kind": {"kind": "demonstration"},
    "what is learnt": {"kind": "demonstration", "prompt_too": True},
    "the pairs": {"pairs": "all"},
    "the file's name": {"rows": "other.jsonl"},  # it stands in the report
}


def test_whatever_moves_a_token_gives_another_key():
    seen = {}
    for name, change in ({"nothing": {}, "nothing else": {}} | OTHERS).items():
        change = {"rows": ROWS, "tokenizer": chat} | change
        if isinstance(change["rows"], str):
            change["rows"] = write_jsonl(Path(change["rows"]), ROWS)
        before = set(kept())
        load(change.pop("rows"), change.pop("tokenizer")(), **change)
        seen[name] = set(kept()) - before
    assert [name for name, new in seen.items() if len(new) != 1] == ["nothing else"]


def test_the_code_and_the_day_that_a_template_writes_are_in_the_key(monkeypatch, tmp_path):
    tokenizer = chat()
    key = tokenising.key_of([("a:1", ROWS[0])], tokenizer, [])
    for day in ("2026-01-01", "2026-01-02"):
        monkeypatch.setattr(tokenising, "date", type("Day", (), {"today": lambda day=day: day}))
        assert tokenising.key_of([("a:1", ROWS[0])], tokenizer, []) == key
    tokenizer.chat_template += "{{ strftime_now('%d') }}"
    late = tokenising.key_of([("a:1", ROWS[0])], tokenizer, [])
    monkeypatch.setattr(tokenising, "date", type("Day", (), {"today": lambda: "2026-01-03"}))
    assert tokenising.key_of([("a:1", ROWS[0])], tokenizer, []) != late
    for name in ("common.py", "tokenising.py"):
        (tmp_path / name).write_text("x")
    here = [tokenising.key_of([], tokenizer, []) for _ in range(2)]
    monkeypatch.setattr(common, "HERE", tmp_path)
    assert tokenising.key_of([], tokenizer, []) not in here and here[0] == here[1]


def cut_short(data: bytes) -> bytes:
    return data[: len(data) // 2]


def flip_an_id(data: bytes) -> bytes:
    return data[:-700] + bytes([data[-700] ^ 1]) + data[-699:]


def count_otherwise(data: bytes) -> bytes:
    assert data.count(b'\\"read\\": 40') == 1
    return data.replace(b'\\"read\\": 40', b'\\"read\\": 41')


DAMAGE = [cut_short, flip_an_id, count_otherwise, lambda data: b"", lambda data: b"x" * 500]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_noticed_and_made_again(damage, capsys):
    tokenizer = as_loaded(make_tokenizer("bos"))
    first = load(ROWS, tokenizer)
    (file,) = kept()
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    capsys.readouterr()
    assert ids_of(load(ROWS, tokenizer)) == ids_of(first)
    _, how = lines(capsys.readouterr().out)
    assert how.count("is damaged (") == 1 and "so they are made again" in how
    assert kept() == [file] and ids_of(tokenising.load(file)) == ids_of(first)


@pytest.mark.parametrize("where", ["a file in the way", "a full disk"])
def test_a_disk_that_takes_nothing_is_said_and_the_run_goes_on(where, monkeypatch, capsys):
    tokenizer = as_loaded(make_tokenizer("bos"))
    first = load(ROWS, tokenizer)
    Path("in-the-way").write_text("")
    folder = "in-the-way/cache" if where == "a file in the way" else "full"
    if where == "a full disk":

        def no_space(tensors, path, facts):
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(tokenising, "save_file", no_space)
    capsys.readouterr()
    assert ids_of(load(ROWS, tokenizer, cache_dir=folder)) == ids_of(first)
    _, how = lines(capsys.readouterr().out)
    assert f"tokens     not kept in {folder} (" in how and "by tiktoken" in how
    assert where == "a file in the way" or list(Path(folder).iterdir()) == []


def test_small_sets_and_a_lone_common_py_keep_nothing(monkeypatch, capsys):
    tokenizer = as_loaded(make_tokenizer("bos"))
    found = load(ROWS, tokenizer)
    assert len(kept()) == 1
    monkeypatch.setattr(common, "beside", lambda module: None)
    kept()[0].unlink()
    assert ids_of(load(ROWS, tokenizer)) == ids_of(found)
    load(pair_rows(MANY - 1), tokenizer)
    assert not kept()


# -- several processes

SCRIPT = """
import json, os, sys
sys.path[:0] = [{root!r}, {tests!r}]
import torch.distributed as dist
import common, tokenising
from test_tokenising import as_loaded, ids_of, make_tokenizer

common.MANY_ROWS = 30
dist.init_process_group("gloo")
tokenizer, rank = as_loaded(make_tokenizer("bos")), os.environ["RANK"]
texts, by_tokenizer = [], common.by_tokenizer
common.by_tokenizer = lambda tok: lambda batch: texts.extend(batch) or by_tokenizer(tok)(batch)
raw_rows, told = common._raw_rows, {{}}

def late_mistake(*asked):
    for n, row in enumerate(raw_rows(*asked)):
        if n == 35:
            raise common.UserError("row 35 cannot be read")
        yield row

def load(name, file="rows.jsonl", kind="pair", **more):
    texts.clear()
    try:
        rows = common._read(
            file, "train", kind, tokenizer, (60, 40), "all", False, False, targets=False, **more
        )
        told[name] = [len(texts), rows.digest()]
    except common.UserError as error:
        told[name] = [len(texts), str(error)]

load("new", cache_dir="cache")
load("kept", cache_dir="cache")
load("no disk", cache_dir="rows.jsonl/cache")
load("bad rows", file="bad.jsonl", cache_dir="cache")
load("few", file="few.jsonl", cache_dir="cache")
load("labels", kind="labelled", cache_dir="cache")
common._raw_rows = late_mistake
load("late", cache_dir="other")
open(f"told-{{rank}}.json", "w").write(json.dumps(told))
dist.barrier()
dist.destroy_process_group()  # threads of gloo that are left may end the process with an error
"""


def test_one_process_tokenises_and_a_mistake_is_one_of_all(tmp_path):
    script = SCRIPT.format(root=str(ROOT), tests=str(ROOT / "tests"))
    Path("two.py").write_text(script)
    write_jsonl(Path("rows.jsonl"), ROWS)
    write_jsonl(Path("few.jsonl"), ROWS[:5])
    with_bad_rows(40)
    status, out, err = run_script("two.py", processes=2, cwd=tmp_path)
    assert status == 0, err
    main, other = (json.loads(Path(f"told-{rank}.json").read_text()) for rank in (0, 1))
    digest = main["new"][1]
    assert {name: x[1] for name, x in main.items()} == {name: x[1] for name, x in other.items()}
    assert digest == main["kept"][1] == main["no disk"][1] and len(digest) == 64
    assert main["new"][0] > 0 and other["new"][0] == 0  # texts given to the tokenizer
    assert main["kept"][0] == other["kept"][0] == 0
    assert main["no disk"][0] == other["no disk"][0] > 0
    assert main["few"][0] == other["few"][0] == 15
    assert main["labels"][0] > 0 and other["labels"][0] == 0
    assert main["labels"][1] == load(ROWS, as_loaded(make_tokenizer("bos")), "labelled").digest()
    assert main["bad rows"][1].startswith("5 of 40 rows of bad.jsonl cannot be used")
    assert main["bad rows"][0] > 0 and other["bad rows"][0] == 0
    assert main["late"][1] == "row 35 cannot be read" and other["late"][0] == 0
    assert out.count("tokens     by tiktoken") == 3 and out.count("tokens     from ") == 1


@pytest.mark.slow
@pytest.mark.parametrize("bad", [True, False])
def test_two_processes_train_on_a_large_set_or_say_once_what_is_wrong(bad, checkpoints, tmp_path):
    rows = pair_rows(5000)
    if bad:
        rows[4711] = {"prompt": "a", "chosen": "b"}
    file = write_jsonl(tmp_path / "large.jsonl", rows)
    flags = f"""--model {checkpoints("llama")} --dataset {file} --output-dir {tmp_path / "out"}
        --max-length 64 --max-prompt-length 40 --batch-size 8 --max-steps 1 --eval-every 0
        --cache-dir {tmp_path / "cache"}"""
    status, out, err = run_script("dpo.py", *flags.split(), processes=2)
    printed = out + err
    if bad:
        assert status != 0 and "UserError" not in printed
        assert printed.count("1 of 5,000 rows") == 1 and "large.jsonl:4712: " in printed
    else:
        assert status == 0, err
        assert printed.count("tokens     by tiktoken, which gives the tokenizer's ids of") == 1
