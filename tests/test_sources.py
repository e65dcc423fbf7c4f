"""Published data sets, by short name and by hub id: rows with the columns as published, which the
tests write, become exactly these prompts and answers. And what is told when the hub says no.
"""

import ast
import dataclasses
import gzip
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from pathlib import Path

import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest
from conftest import ROOT, make_config, make_tokenizer, write_jsonl

import common
import published
import sources

TURNS = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    """<s> at the beginning, </s> at the end, and a chat template."""
    made = make_tokenizer("bos")
    made.chat_template = "{{ bos_token }}" + TURNS
    folder = tmp_path_factory.mktemp("tokenizer")
    make_config("llama", made).save_pretrained(folder)
    made.save_pretrained(folder)
    return common.load_tokenizer(str(folder), max_length=100)


def write_parquet(path: Path, rows: list[dict]) -> Path:
    """Nested values become structs and lists, as in the published files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def load(dataset: str, kind: str, tokenizer, max_prompt_length: int = 900, **more):
    """[(prompt, [answer, ...])] as decoded text, without <s> and </s>."""
    rows, _ = common.load_rows(dataset, None, kind, tokenizer, 1000, max_prompt_length, **more)
    for row in rows.rows:
        assert row.prompt[0] == tokenizer.bos_token_id
        assert all(answer[-1] == tokenizer.eos_token_id for answer in row.responses)
    return [
        (tokenizer.decode(row.prompt[1:]), [tokenizer.decode(a[:-1]) for a in row.responses])
        for row in rows.rows
    ]


def load_scored(dataset: str, kind: str, tokenizer) -> list[tuple[str, list[str], list[float]]]:
    """The same with each answer's score."""
    rows, _ = common.load_rows(dataset, None, kind, tokenizer, 1000, 900)
    scores = [row.scores.tolist() for row in rows.rows]
    texts = load(dataset, kind, tokenizer)
    return [(*text, numbers) for text, numbers in zip(texts, scores, strict=True)]


def left_out(capsys) -> str:
    """What the report says of the training rows."""
    lines = capsys.readouterr().out.splitlines()
    return next(line for line in lines if line.startswith("train ")).split("left out: ")[1]


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


# -- rows as published, and the prompts and answers that they become


def post(text: str = "My cat ran off.", **more) -> dict:
    return {"subreddit": "cats", "title": "Help", "post": text, **more}


def comparison(choice: int, one: str = " Cat ran.", other: str = " A cat.", **more) -> dict:
    info = {"id": "t3_1", "article": None, "site": None, **post()}
    return {
        "info": info,
        "summaries": [
            {"text": one, "policy": "ref", "note": None},
            {"text": other, "policy": "sup2", "note": "short"},
        ],
        "choice": choice,
        "worker": "w",
        "batch": "batch3",
        "split": "train",
        "extra": {"confidence": 7},
        **more,
    }


ARTICLE = {"id": "1", "article": "News.", "site": "cnn", **dict.fromkeys(post())}
TLDR = "SUBREDDIT: r/cats\n\nTITLE: Help\n\nPOST: My cat ran off.\n\nTL;DR:"


def scored(chosen: str, rejected: str, better: float, worse: float, asked=()) -> dict:
    opening = [*asked, user("Why?")]
    return {
        "prompt": "Why?",
        "prompt_id": "f0",
        "chosen": [*opening, assistant(chosen)],
        "rejected": [*opening, assistant(rejected)],
        "messages": [*opening, assistant(chosen)],
        "score_chosen": better,
        "score_rejected": worse,
    }


def hh(chosen: str, rejected: str, turns: str = "\n\nHuman: Why?") -> dict:
    return {
        "chosen": f"{turns}\n\nAssistant:{chosen}",
        "rejected": f"{turns}\n\nAssistant:{rejected}",
    }


def shp(a: str, b: str, label: int, votes: tuple[int, int]) -> dict:
    return {
        "post_id": "q",
        "domain": "askbaking_train",
        "history": "Why?",
        "human_ref_A": a,
        "human_ref_B": b,
        "labels": label,
        "score_A": votes[0],
        "score_B": votes[1],
        "score_ratio": max(votes) / min(votes),
    }


ALMA = {  # both directions: the reference best and ALMA worst in German, GPT-4 best in English
    "language_pair": "de-en",
    "de": "Ja.",
    "en": "Yes.",
    "gpt4_de": "Jawohl.",
    "alma_de": "Jo.",
    "gpt4_en": "Aye.",
    "alma_en": "Yeah.",
    **{"ref_de_kiwi": 0.1, "gpt4_de_kiwi": 0.9, "alma_de_kiwi": 0.9},  # the mean decides
    **{"ref_de_kiwi_xcomet": 0.9, "gpt4_de_kiwi_xcomet": 0.8, "alma_de_kiwi_xcomet": 0.7},
    **{"ref_en_kiwi_xcomet": 0.6, "gpt4_en_kiwi_xcomet": 0.9, "alma_en_kiwi_xcomet": 0.7},
    "required_directions": "",
    "Delta": 0.0,
}
TO_ENGLISH = "Translate this from German to English:\nGerman: Ja.\nEnglish:"
TO_GERMAN = "Translate this from English to German:\nEnglish: Yes.\nGerman:"


def alma(**more) -> dict:
    return {"translation": {**ALMA, **more}}


def judged(delta: float) -> dict:
    """People compared the two systems, in one direction; scores play no part."""
    return alma(Delta=delta, required_directions="en-de")


TOWER = (
    "<|im_start|>user\nTranslate the following German source text to English:\n"
    "German: Ja.\nEnglish: <|im_end|>\n<|im_start|>assistant\n"
)
TOWER_WORDS = "Translate the following German source text to English:\nGerman: Ja.\nEnglish:"
YES = {"chosen": "Yes.", "rejected": "Yeah."}

PAIRS = {
    "tldr: choice is an index": (
        "tldr",
        [comparison(0), comparison(1)],
        [(TLDR, [" Cat ran.", " A cat."]), (TLDR, [" A cat.", " Cat ran."])],
        "none",
    ),
    "tldr: news articles, equal and empty summaries": (
        "tldr",
        [
            comparison(0, info=ARTICLE),
            comparison(0, batch="cnndm2"),
            comparison(0, batch="batch0_cnndm"),
            comparison(0, " Same.", " Same."),
            comparison(1, "", " Good."),
            comparison(1, " ", " Good."),
            comparison(1),
        ],
        [(TLDR, [" A cat.", " Cat ran."])],
        "3 about CNN/DM articles, 1 with equal answers, 2 with an empty answer",
    ),
    "ultrafeedback: ties, system turns, several turns": (
        "ultrafeedback",
        [
            scored("So.", "No.", 8.5, 7),
            scored("So.", "No.", 8, 8),
            scored("So.", "", 8, 2),
            scored("So.", "No.", 9, 1, [{"role": "system", "content": "Be kind."}]),
            scored("So.", "No.", 9, 1, [user("Hello"), assistant("Hi")]),
        ],
        [
            ("[user]Why?[assistant]", ["So.", "No."]),
            ("[system]Be kind.[user]Why?[assistant]", ["So.", "No."]),
            ("[user]Hello[assistant]Hi</s>[user]Why?[assistant]", ["So.", "No."]),
        ],
        "1 ties, 1 with an empty answer",
    ),
    "hh: one turn and several, equal answers, other dialogues, no answer": (
        "hh",
        [
            hh(" So.", " No."),
            hh(" So.", " No.", "\n\nHuman: Hello\n\nAssistant: Hi\n\nHuman: Why?"),
            hh(" So.", " So."),
            hh(" So.", ""),
            {
                "chosen": "\n\nHuman: Why?\n\nAssistant: So.",
                "rejected": "\n\nHuman: Who?\n\nAssistant: No.",
            },
            {"chosen": "\n\nHuman: Why?", "rejected": "\n\nHuman: Why?"},
        ],
        [
            ("\n\nHuman: Why?\n\nAssistant:", [" So.", " No."]),
            (
                "\n\nHuman: Hello\n\nAssistant: Hi\n\nHuman: Why?\n\nAssistant:",
                [" So.", " No."],
            ),
        ],
        "1 with equal answers, 1 with an empty answer, "
        "2 with different dialogues before the answer",
    ),
    "shp: labels, and votes that are too close": (
        "shp",
        [
            shp("So.", "No.", 1, (10, 5)),
            shp("So.", "No.", 0, (3, 12)),
            shp("So.", "No.", 1, (9, 5)),
            shp("So.", "No.", 1, (5, 5)),
        ],
        [
            ("\n\nHuman: Why?\n\nAssistant:", [" So.", " No."]),
            ("\n\nHuman: Why?\n\nAssistant:", [" No.", " So."]),
        ],
        "2 with less than twice the votes",
    ),
    "alma-r: both directions of a row, best against worst": (
        "alma-r",
        [alma()],
        [(TO_ENGLISH, [" Aye.", " Yes."]), (TO_GERMAN, [" Ja.", " Jo."])],
        "none",
    ),
    "alma-r: one direction, ties, and what people said": (
        "alma-r",
        [
            alma(required_directions="de-en"),
            alma(
                required_directions="en-de",
                **dict.fromkeys([f"{s}_de_kiwi_xcomet" for s in ("ref", "gpt4", "alma")], 0.5),
            ),
            judged(1.5),
            judged(-0.5),
        ],
        [
            (TO_ENGLISH, [" Aye.", " Yes."]),
            (TO_GERMAN, [" Jawohl.", " Jo."]),
            (TO_GERMAN, [" Jo.", " Jawohl."]),
        ],
        "1 ties",
    ),
    "mt-pref: source and languages": (
        "mt-pref",
        [{"source": "Ja.", "lp": "de-en", "best_response": "Yes.", "chosen_score": 0.9, **YES}],
        [(TOWER_WORDS, [" Yes.", " Yeah."])],
        "none",
    ),
    "mt-pref: a prompt with Tower's chat marks": (
        "mt-pref",
        [{"prompt": TOWER, **YES}, {"prompt": TOWER, "chosen": "Yes.", "rejected": "Yes."}],
        [(TOWER_WORDS, [" Yes.", " Yeah."])],
        "1 with equal answers",
    ),
}
DEMONSTRATIONS = {
    "tldr: its own source": (
        "tldr",
        [post(id="t3_1", summary="Cat ran."), post(id="t3_2", summary=" ")],
        [(TLDR, [" Cat ran."])],
        "1 with an empty answer",
    ),
    "ultrafeedback: messages, ties or not": (
        "ultrafeedback",
        [scored("So.", "No.", 8, 8)],
        [("[user]Why?[assistant]", ["So."])],
        "none",
    ),
    "ultrachat: a system turn, several turns": (
        "ultrachat",
        [
            {"prompt": "Why?", "prompt_id": "f0", "messages": [user("Why?"), assistant("So.")]},
            {
                "prompt": "Hello",
                "prompt_id": "f1",
                "messages": [
                    {"role": "system", "content": "Be kind."},
                    *(user("Hello"), assistant("Hi"), user("Why?"), assistant("So.")),
                ],
            },
        ],
        [
            ("[user]Why?[assistant]", ["So."]),
            ("[system]Be kind.[user]Hello[assistant]Hi</s>[user]Why?[assistant]", ["So."]),
        ],
        "none",
    ),
    "kto-mix: the desirable ones": (
        "kto-mix",
        [
            {"prompt": [user("Why?")], "completion": [assistant("So.")], "label": True},
            {"prompt": [user("Why?")], "completion": [assistant("No.")], "label": False},
        ],
        [("[user]Why?[assistant]", ["So."])],
        "1 labelled false",
    ),
    "hh: the chosen": (
        "hh",
        [hh(" So.", " No.")],
        [("\n\nHuman: Why?\n\nAssistant:", [" So."])],
        "none",
    ),
    "shp: the better": (
        "shp",
        [shp("So.", "No.", 0, (1, 9))],
        [("\n\nHuman: Why?\n\nAssistant:", [" No."])],
        "none",
    ),
    "alma-r: the best": (
        "alma-r",
        [alma(required_directions="en-de")],
        [(TO_GERMAN, [" Ja."])],
        "none",
    ),
    "mt-pref: the chosen": (
        "mt-pref",
        [{"source": "Ja.", "lp": "de-en", **YES}],
        [(TOWER_WORDS, [" Yes."])],
        "none",
    ),
}
LABELLED = {
    "kto-mix: both labels, several turns": (
        "kto-mix",
        [
            {"prompt": [user("Why?")], "completion": [assistant("So.")], "label": True},
            {
                "prompt": [user("Hello"), assistant("Hi"), user("Why?")],
                "completion": [assistant("No.")],
                "label": False,
            },
            {"prompt": [user("Why?")], "completion": [assistant(" ")], "label": True},
        ],
        [
            ("[user]Why?[assistant]", ["So."], [1.0]),
            ("[user]Hello[assistant]Hi</s>[user]Why?[assistant]", ["No."], [0.0]),
        ],
        "1 with an empty answer",
    ),
}
LISTS = {
    "alma-r: three answers, the reference not always the best": (
        "alma-r",
        [alma()],
        [
            (TO_ENGLISH, [" Aye.", " Yeah.", " Yes."], [0.9, 0.7, 0.6]),
            (TO_GERMAN, [" Ja.", " Jawohl.", " Jo."], [0.9, 0.8, 0.7]),
        ],
        "none",
    ),
    "alma-r: ties among three, all alike, two that people compared": (
        "alma-r",
        [
            alma(required_directions="en-de", gpt4_de_kiwi_xcomet=0.7),
            alma(
                required_directions="en-de",
                **dict.fromkeys([f"{s}_de_kiwi_xcomet" for s in ("ref", "gpt4", "alma")], 0.5),
            ),
            alma(required_directions="en-de", alma_de="Ja."),  # a text twice, with its best score
            judged(1.5),
            judged(-0.5),
        ],
        [
            (TO_GERMAN, [" Ja.", " Jawohl.", " Jo."], [0.9, 0.7, 0.7]),
            (TO_GERMAN, [" Ja.", " Jawohl."], [0.9, 0.8]),
            (TO_GERMAN, [" Jawohl.", " Jo."], [1.5, 0.0]),
            (TO_GERMAN, [" Jo.", " Jawohl."], [0.0, -0.5]),
        ],
        "1 ties",
    ),
}


def taken_apart(pairs: list) -> list:
    """Of pairs, and of the best and the worst of lists."""
    return [
        (prompt, [answer], [label])
        for prompt, answers in pairs
        for answer, label in zip(answers, (1.0, 0.0), strict=True)
    ]


# What pairs are for kto.py, and for pro.py and listwise_dpo.py.
LABELLED |= {
    case: (name, rows, taken_apart(pairs), lost)
    for case, (name, rows, pairs, lost) in PAIRS.items()
}
LISTS |= {
    case: (name, rows, [(*pair, [1.0, 0.0]) for pair in pairs], lost)
    for case, (name, rows, pairs, lost) in PAIRS.items()
    if name != "alma-r"
}
CASES = [("pair", name) for name in PAIRS] + [("demonstration", name) for name in DEMONSTRATIONS]


def test_every_source_has_a_case():
    tested = {"pair": {x[0] for x in PAIRS.values()}}
    tested["demonstration"] = {x[0] for x in DEMONSTRATIONS.values()}
    tested |= {"labelled": {x[0] for x in LABELLED.values()}}
    tested |= {"ranked": {x[0] for x in LISTS.values()}}
    for kind, names in tested.items():
        has = {n for n, of in published.DATASETS.items() if {*sources.RICHER[kind]} & {*of}}
        assert has == names


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
@pytest.mark.parametrize("kind, case", CASES)
def test_published_rows_become_ours(kind, case, ending, tokenizer, capsys):
    name, rows, expected, lost = {"pair": PAIRS, "demonstration": DEMONSTRATIONS}[kind][case]
    write = write_jsonl if ending == "jsonl" else write_parquet
    file = write(Path(f"rows.{ending}"), rows)
    assert load(f"{name}={file}", kind, tokenizer) == expected
    assert left_out(capsys) == lost


@pytest.mark.parametrize(
    "kind, case", [("labelled", case) for case in LABELLED] + [("ranked", case) for case in LISTS]
)
def test_published_rows_become_labels_and_lists(kind, case, tokenizer, capsys):
    name, rows, expected, lost = {"labelled": LABELLED, "ranked": LISTS}[kind][case]
    found = load_scored(f"{name}={write_jsonl(Path('rows.jsonl'), rows)}", kind, tokenizer)
    assert found == expected
    assert left_out(capsys) == lost


def test_published_rows_have_no_target(tokenizer):
    """slic.py --regularise-on target asks for a column that no published set has."""
    file = write_jsonl(Path("rows.jsonl"), [hh(" So.", " No.")])
    with pytest.raises(common.UserError, match="rows.jsonl:1: no 'target'"):
        load(f"hh={file}", "pair", tokenizer, targets=True)


def test_ranked_and_labelled_rows_are_there_for_the_methods_that_take_them():
    write_jsonl(Path("alma.jsonl"), [alma(required_directions="en-de")])
    ((where, row),) = sources.rows("alma-r=alma.jsonl", "train", "ranked")
    assert where == "alma.jsonl:1"
    assert row == {
        "prompt": TO_GERMAN,
        "responses": [" Ja.", " Jawohl.", " Jo."],
        "scores": [0.9, 0.8, 0.7],
    }
    labelled = {"prompt": [user("Why?")], "completion": [assistant("So.")], "label": False}
    write_jsonl(Path("kto.jsonl"), [labelled])
    assert list(sources.rows("kto-mix=kto.jsonl", "train", "labelled")) == [
        ("kto.jsonl:1", labelled)
    ]


def test_a_csv_of_texts_will_do(tokenizer):
    Path("rows.csv").write_text(
        "subreddit,title,post,summary\ncats,Help,My cat ran off.,Cat ran.\n"
    )
    assert load("tldr=rows.csv", "demonstration", tokenizer) == [(TLDR, [" Cat ran."])]


# -- the post of a TL;DR prompt is shortened at its end, by lines

LONG = "one\ntwo two\nthree three three\nfour"


@pytest.mark.parametrize(
    "limit, kept",
    [
        (34, LONG),
        (33, "one\ntwo two\nthree three three"),
        (28, "one\ntwo two"),
        (10, "one"),
        (3, "one"),
        (2, "on"),
        (0, ""),
        (-1, ""),  # not even the rest of the prompt fits: common.py cuts it as any other
    ],
)
def test_a_post_loses_lines_then_letters(limit, kept):
    around = len(published.tldr_prompt(post(""), lambda text: True))
    prompt = published.tldr_prompt(post(LONG), lambda text: len(text) <= around + limit)
    assert prompt == f"SUBREDDIT: r/cats\n\nTITLE: Help\n\nPOST: {kept}\n\nTL;DR:"


@pytest.mark.parametrize("kind", ["demonstration", "pair"])
def test_the_limit_is_in_tokens_and_counts_the_first(kind, tokenizer):
    row = {
        "demonstration": post(LONG, summary="Cat."),
        "pair": comparison(0, info={"id": "", **post(LONG)}),
    }[kind]
    write_jsonl(Path("rows.jsonl"), [row])
    two = TLDR.replace("My cat ran off.", "one\ntwo two")
    tokens = len(tokenizer(two).input_ids)  # <s> among them
    for limit, kept in ((tokens, two), (tokens - 1, two.replace("\ntwo two", ""))):
        ((prompt, _),) = load("tldr=rows.jsonl", kind, tokenizer, max_prompt_length=limit)
        assert prompt == kept


# -- what is asked for: kinds, parts, splits, copies


def refused(dataset: str, kind: str = "pair", split: str = "train") -> str:
    with pytest.raises(common.UserError) as caught:
        list(sources.rows(dataset, split, kind))
    return str(caught.value)


def test_a_kind_that_a_set_has_not():
    expected = "holds demonstration rows, and pair rows are needed; "
    others = "tldr, ultrafeedback, hh, shp, alma-r, mt-pref have such"
    assert refused("ultrachat") == f"ultrachat: {expected}{others}"
    assert refused("HuggingFaceH4/ultrachat_200k").startswith("HuggingFaceH4/ultrachat_200k: holds")
    assert refused("kto-mix").startswith("kto-mix: holds labelled rows, and pair rows are needed")
    assert refused("kto-mix", "ranked") == (
        f"kto-mix: holds labelled rows, and ranked rows are needed; {others}"
    )
    assert refused("trl-lib/kto-mix-14k", "ranked").endswith(f"rows are needed; {others}")
    assert refused("ultrachat", "labelled") == (
        "ultrachat: holds demonstration rows, and labelled rows are needed; "
        "tldr, ultrafeedback, hh, shp, kto-mix, alma-r, mt-pref have such"
    )


@pytest.mark.parametrize(
    "name, kind, repo",
    [
        ("hh", "labelled", "Anthropic/hh-rlhf"),
        ("hh", "ranked", "Anthropic/hh-rlhf"),
        ("tldr", "labelled", "openai/summarize_from_feedback"),  # not its demonstrations
        ("tldr", "ranked", "openai/summarize_from_feedback"),
        ("kto-mix", "labelled", "trl-lib/kto-mix-14k"),
        ("alma-r", "labelled", "haoranxu/ALMA-R-Preference"),
        ("alma-r", "ranked", "haoranxu/ALMA-R-Preference"),
        ("mt-pref", "labelled", "sardinelab/MT-pref"),
    ],
)
def test_where_labels_and_lists_are_from(name, kind, repo):
    source = sources.find_named(name, kind).source
    assert source.repo == repo
    assert sources.test_split(name, kind) == (name if source.splits[1] else None)


def test_a_part_that_a_set_has_not():
    pairs = "cs-en, de-en, is-en, ru-en, zh-en"
    assert refused("alma-r:fr-en") == f"alma-r:fr-en: there is no part 'fr-en'; there are {pairs}"
    assert refused("alma-r:cs-en,x").startswith("alma-r:cs-en,x: there is no part 'x'; there are")
    assert refused("mt-pref:x") == "mt-pref:x: there is no part 'x'; it has no parts"


def test_a_copy_that_is_not_there():
    assert refused("tldr=nowhere") == "tldr=nowhere: there is no file or folder 'nowhere'"
    assert refused("tldr=") == "tldr=: there is no file or folder ''"
    Path("rows.txt").write_text("x")
    assert "rows.txt: the name must end with one of .jsonl, .json, .parquet" in refused(
        "tldr=rows.txt"
    )


def test_other_paths_may_have_an_equals_sign(tmp_path):
    (tmp_path / "x=1").mkdir()
    write_jsonl(tmp_path / "x=1/rows.jsonl", [{"text": "a"}])
    ((_, row),) = sources.rows(str(tmp_path / "x=1"), "train", "pair")
    assert row == {"text": "a"}


def test_other_columns_are_named(tokenizer):
    write_jsonl(Path("rows.jsonl"), [{"text": "a", "label": 1}])
    assert refused("tldr=rows.jsonl") == (
        "tldr=rows.jsonl: rows.jsonl:1 has the columns text, label; "
        "openai/summarize_from_feedback was published with info, summaries, choice"
    )
    assert refused("mt-pref=rows.jsonl").endswith(
        "was published with chosen, rejected, source, lp, or chosen, rejected, prompt"
    )


@pytest.mark.parametrize(
    "name, row, reason",
    [
        ("tldr", comparison(2), "'choice' must be 0 or 1, this is 2"),
        ("tldr", comparison(True), "'choice' must be 0 or 1, this is True"),
        (
            "tldr",
            comparison(0, summaries=[{"text": " One."}]),
            "not as openai/summarize_from_feedback was published "
            "(IndexError: list index out of range)",
        ),
        ("shp", shp("a", "b", 2, (9, 1)), "'labels' must be 0 or 1, this is 2"),
        (
            "alma-r",
            alma(alma_en=None),
            'not as haoranxu/ALMA-R-Preference was published (TypeError: can only concatenate '
            'str (not "NoneType") to str)',
        ),
        ("mt-pref", {"source": "a", "lp": "de-xx", **YES}, "'de-xx' is no pair of cs, de, en"),
    ],
)  # fmt: skip
def test_a_row_that_is_not_as_published_is_named(name, row, reason, tokenizer):
    write_jsonl(Path("rows.jsonl"), [row])
    with pytest.raises(common.UserError) as caught:
        load(f"{name}=rows.jsonl", "pair", tokenizer)
    assert f"\n  rows.jsonl:1: {reason}" in str(caught.value)


def test_a_part_that_a_copy_has_not(tmp_path):
    asked = f"hh:harmless-base,helpful-online={as_on_the_hub(tmp_path) / 'hh'}"
    assert refused(asked) == f"{asked}: no folder helpful-online with rows in {tmp_path / 'hh'}"


def test_broken_lines_of_a_copy_are_named(tokenizer):
    Path("rows.jsonl").write_text(json.dumps(comparison(0)) + "\n{\n")
    with pytest.raises(common.UserError, match="rows.jsonl:2: not JSON"):
        load("tldr=rows.jsonl", "pair", tokenizer)
    found = load("tldr=rows.jsonl", "pair", tokenizer, skip_bad_rows=True)
    assert found == [(TLDR, [" Cat ran.", " A cat."])]


# -- a folder as the hub has it


def as_on_the_hub(folder: Path) -> Path:
    """Files of several sets, under the names that they have in their repositories."""
    zipped = {"harmless-base/train": "a", "helpful-base/train": "b", "helpful-base/test": "c"}
    zipped["helpful-base/train_more"] = "another split"
    for name, answer in zipped.items():
        file = folder / "hh" / f"{name}.jsonl.gz"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(gzip.compress(json.dumps(hh(f" {answer}", " no")).encode()))
    for name, answer in {"train_prefs": "a", "test_prefs": "b", "train_sft": "c"}.items():
        rows = [scored(answer, "no", 2, 1)]
        write_parquet(folder / f"ultrafeedback/data/{name}-00000-of-00001.parquet", rows)
    for name, answer in {"comparisons/train": " a", "comparisons/validation": " b"}.items():
        write_parquet(folder / f"tldr/{name}/0000.parquet", [comparison(0, answer)])
    write_parquet(folder / "tldr/axis/validation/0000.parquet", [{"info": 1}])
    for pair in ("cs-en", "de-en"):
        row = alma(language_pair=pair, cs="Ano.", required_directions=pair)
        write_parquet(folder / f"alma-r/{pair}/train-00000-of-00001-5d846e.parquet", [row])
    (folder / "shp/askhr").mkdir(parents=True)
    write_jsonl(folder / "shp/askhr/train.json", [shp("a", "no", 1, (9, 1))])
    write_jsonl(folder / "shp/askhr/validation.json", [shp("b", "no", 1, (9, 1))])
    return folder


@pytest.mark.parametrize(
    "dataset, split, kind, answers",
    [
        ("hh", "train", "pair", " a, b"),
        ("hh", "test", "pair", " c"),
        ("hh:helpful-base", "train", "pair", " b"),
        ("hh:helpful-base:test", "train", "pair", " c"),
        ("ultrafeedback", "train", "pair", "a"),
        ("ultrafeedback", "test", "pair", "b"),
        ("ultrafeedback", "train", "demonstration", "c"),
        ("ultrafeedback::test_prefs", "train", "pair", "b"),
        ("tldr", "train", "pair", " a"),
        ("tldr", "test", "pair", " b"),
        ("alma-r", "train", "ranked", " Yes., Yes."),
        ("alma-r:cs-en", "train", "ranked", " Yes."),
        ("hh:harmless-base,helpful-base", "train", "pair", " a, b"),
        ("hh:harmless-base,helpful-base:test", "train", "pair", " c"),
        ("shp:askhr", "test", "pair", " b"),
    ],
)
def test_files_of_a_folder(dataset, split, kind, answers, tmp_path):
    folder = as_on_the_hub(tmp_path) / dataset.split(":")[0]
    rows = [row for _, row in sources.rows(f"{dataset}={folder}", split, kind)]
    first = {"pair": "chosen", "ranked": "responses", "demonstration": "messages"}[kind]
    said = [row[first] for row in rows]
    said = [
        x if isinstance(x, str) else x[0] if kind == "ranked" else x[-1]["content"] for x in said
    ]
    assert ",".join(said) == answers


@pytest.mark.parametrize(
    "dataset, kind, held_out",
    [
        ("hh", "pair", True),
        ("hh:harmless-base", "pair", False),  # its test.jsonl.gz was not downloaded
        ("hh::train", "pair", False),
        ("ultrafeedback", "demonstration", False),
        ("alma-r", "pair", False),  # none was published
    ],
)
def test_the_held_out_split_of_a_folder(dataset, kind, held_out, tmp_path):
    named = f"{dataset}={as_on_the_hub(tmp_path) / dataset.split(':')[0]}"
    assert sources.test_split(named, kind) == (named if held_out else None)


def test_a_folder_without_split_names_is_for_training(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [hh(" a", " no")])
    write_parquet(tmp_path / "b.parquet", [hh(" b", " no")])
    rows = sources.rows(f"hh={tmp_path}", "train", "pair")
    assert [row["chosen"] for _, row in rows] == [" a", " b"]
    assert sources.test_split(f"hh={tmp_path}", "pair") is None
    assert f"no file of the split test in {tmp_path}" in refused(f"hh={tmp_path}", split="test")


def test_a_folder_with_other_splits_is_not_taken_for_training(tmp_path):
    write_parquet(tmp_path / "data/train_sft-0.parquet", [scored("a", "b", 2, 1)])
    write_parquet(tmp_path / "data/test_sft-0.parquet", [scored("a", "b", 2, 1)])
    (tmp_path / "data/train_sft-0.parquet").rename(tmp_path / "data/train-0.parquet")
    asked = f"ultrafeedback={tmp_path}"
    assert refused(asked) == f"{asked}: no file of the split train_prefs in {tmp_path}"


# -- the hub


ENDINGS = {".jsonl", ".json", ".parquet", ".csv", ".jsonl.gz", ".json.gz"}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """What is asked of the hub, which gives the folders of `as_on_the_hub`."""
    asked = []
    folder = as_on_the_hub(tmp_path / "hub")

    def download(repo, *, repo_type, revision, allow_patterns):
        starts = [x.removesuffix(".jsonl") for x in allow_patterns if x.endswith(".jsonl")]
        assert {x.removeprefix(starts[0]) for x in allow_patterns} >= ENDINGS
        asked.append((repo, repo_type, revision, " ".join(starts)))
        name = next(
            n for n, of in published.DATASETS.items() for s in of.values() if s.repo == repo
        )
        return str(folder / name)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return asked


@pytest.mark.parametrize(
    "dataset, split, kind, repo, revision, pattern",
    [
        (
            "tldr", "train", "pair", "openai/summarize_from_feedback", "refs/convert/parquet",
            "comparisons/*train*",
        ),
        (
            "openai/summarize_from_feedback:comparisons", "test", "pair",
            "openai/summarize_from_feedback", "refs/convert/parquet",
            "comparisons/*validation*",
        ),
        ("hh", "train", "demonstration", "Anthropic/hh-rlhf", None, "*train*"),
        ("anthropic/HH-RLHF", "test", "pair", "Anthropic/hh-rlhf", None, "*test*"),
        (
            "hh:helpful-base", "train", "pair", "Anthropic/hh-rlhf", None,
            "helpful-base/*train*",
        ),
        (
            "ultrafeedback", "train", "pair", "HuggingFaceH4/ultrafeedback_binarized", None,
            "*train_prefs*",
        ),
        (
            "alma-r:de-en", "train", "pair", "haoranxu/ALMA-R-Preference", None,
            "de-en/*train*",
        ),
        (
            "alma-r:de-en,cs-en", "train", "pair", "haoranxu/ALMA-R-Preference", None,
            "de-en/*train* cs-en/*train*",
        ),
        ("shp:askhr", "test", "pair", "stanfordnlp/SHP", None, "askhr/*validation*"),
    ],
)  # fmt: skip
def test_what_is_asked_of_the_hub(dataset, split, kind, repo, revision, pattern, hub):
    rows = list(sources.rows(dataset, split, kind))
    assert rows and all(isinstance(row, dict) for _, row in rows)
    assert hub == [(repo, "dataset", revision, pattern)]


def test_rows_of_the_hub_are_named_by_set_and_file(hub):
    ((where, _),) = sources.rows("hh:helpful-base", "test", "pair")
    assert where == "hh helpful-base/test.jsonl.gz:1"


def test_a_set_brings_its_held_out_rows(hub, tokenizer):
    train, held_out = common.load_rows("hh:helpful-base", None, "pair", tokenizer, 1000, 900)
    chosen = [tokenizer.decode(rows.rows[0].responses[0][:-1]) for rows in (train, held_out)]
    assert chosen == [" b", " c"]
    assert sources.test_split("alma-r", "pair") is None
    assert refused("alma-r", split="test") == (
        "alma-r: has no held-out split; --eval-dataset can name one"
    )


def test_other_data_sets_go_through_datasets(monkeypatch):
    import datasets

    asked = []

    def load_dataset(*args, **more):
        asked.append((args, more))
        return [{"text": "a"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda *_: ["train", "test"])
    assert list(sources.rows("owner/name:part", "train", "pair")) == [
        ("owner/name train:row 1", {"text": "a"})
    ]
    list(sources.rows("owner/name::dev", "train", "pair"))
    list(sources.rows("openai/summarize_from_feedback:axis", "test", "pair"))
    assert asked == [
        (("owner/name", "part"), {"split": "train"}),
        (("owner/name", None), {"split": "dev"}),
        (("openai/summarize_from_feedback", "axis"), {"split": "test"}),
    ]
    assert sources.test_split("owner/name:part", "pair") == "owner/name:part:test"


def test_a_folder_with_the_name_of_a_hub_id_is_the_folder(tmp_path):
    (tmp_path / "Anthropic/hh-rlhf").mkdir(parents=True)
    write_jsonl(tmp_path / "Anthropic/hh-rlhf/rows.jsonl", [{"text": "a"}])
    ((_, row),) = sources.rows("Anthropic/hh-rlhf", "train", "pair")
    assert row == {"text": "a"}


# -- what is told when there is nothing to load


def failure(message: str, what: str = "dataset") -> str:
    return sources.hub_failure(RuntimeError(message), "owner/name", what)


@pytest.mark.parametrize("what, page", [("model", ""), ("dataset", "datasets/")])
def test_the_licence_page_of_a_model_and_of_a_data_set(what, page):
    told = failure("You are trying to access a gated repo.\nMake sure ...", what)
    assert f"its licence at https://huggingface.co/{page}owner/name, then `hf auth login`" in told


def test_errors_are_found_behind_others():
    try:
        try:
            raise huggingface_hub.errors.OfflineModeIsEnabled("offline")
        except Exception as error:
            raise OSError("could not load") from error
    except OSError as error:
        assert "out of reach" in sources.hub_failure(error, "owner/name", "model")


def test_an_error_that_is_not_known_is_shown_without_tokens():
    assert failure("bad token hf_abcDEF123 here\nmore") == "owner/name: bad token hf_... here"


def test_a_script_and_a_missing_branch():
    told = failure("Dataset scripts are no longer supported, but found name.py")
    assert "--repo-type dataset owner/name --revision refs/convert/parquet --local-dir DIR" in told
    assert "without the branch" in failure("Revision 'x' doesn't exist for dataset 'owner/name'")


@pytest.mark.parametrize(
    "said, told",
    [
        (
            "BuilderConfig 'x' not found. Available: ['a', 'b']",
            "owner/name: owner/name has no such config; there are a, b",
        ),
        (
            "Config name is missing.\nPlease pick one among the available configs: ['a', 'b']",
            "owner/name: owner/name has no such config; there are a, b",
        ),
        (
            "Unknown split \"x\". Should be one of ['train', 'dev'].",
            "owner/name: owner/name has no such split; there are train, dev",
        ),
    ],
)
def test_another_config_or_split(said, told, monkeypatch):
    import datasets

    def load_dataset(*args, **more):
        raise ValueError(said)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert refused("owner/name") == told


class NoHub(BaseHTTPRequestHandler):
    """A hub that refuses: how is said by the repository's name."""

    ANSWERS = {
        "gated-401": (401, "GatedRepo"),
        "gated-403": (403, "GatedRepo"),
        "refused": (403, None),
        "token": (401, None),
        "nothing": (404, "RepoNotFound"),
        "unknown": (401, "RepoNotFound"),
    }

    def do_HEAD(self):
        known = [answer for name, answer in self.ANSWERS.items() if f"/{name}" in self.path]
        status, code = known[0] if known else (404, "RepoNotFound")
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_POST = do_HEAD

    def log_message(self, *_):
        pass


@pytest.fixture
def no_hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), NoHub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


ASK = """
import common, sources
for asked in {asked!r}:
    for ask in (lambda: list(sources.rows(asked, "train", "pair")),
                lambda: common.load_tokenizer(asked, 10)):
        try:
            ask()
        except common.UserError as error:
            print(error)
"""
FOLDER = "a folder with config.json, *.safetensors and tokenizer files serves too (`hf download "
FILE = "a file serves too: .jsonl, .json, .parquet or .csv, or a folder of them"
ALL_FORMS = {
    "o/gated-401": "is gated: accept its licence at https://huggingface.co/{}o/gated-401, then `hf",
    "o/gated-403": "is gated: accept its licence at https://huggingface.co/{}o/gated-403, then `hf",
    "o/refused": "refuses o/refused (403): see https://huggingface.co/{}o/refused, then `hf auth",
    "o/token": "refuses o/token (401): see https://huggingface.co/{}o/token, then `hf auth login`",
    "o/nothing": "has no {} o/nothing, or it is private (`hf auth login` if it is yours)",
    "o/unknown": "has no {} o/unknown, or it is private (`hf auth login` if it is yours)",
}


def ask(asked: list[str], home: Path, **more: str) -> list[str]:
    """What a process of its own is told, in turn of each as a data set and as a model: the hub's
    address is read when its library is imported.
    """
    env = os.environ | {"HF_HOME": str(home), "HF_TOKEN": "hf_secretsecretsecret", **more}
    env.pop("HF_HUB_OFFLINE", None) if "HF_HUB_OFFLINE" not in more else None
    done = subprocess.run(
        [sys.executable, "-c", ASK.format(asked=asked)],
        cwd=ROOT, env=env, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "secret" not in done.stdout + done.stderr
    return done.stdout.splitlines()


def test_what_a_hub_that_refuses_makes_us_say(no_hub, tmp_path):
    told = ask([*ALL_FORMS, "tldr", "hhh"], tmp_path, HF_ENDPOINT=no_hub)
    for (repo, why), data, model in zip(ALL_FORMS.items(), told[::2], told[1::2], strict=False):
        places = ("dataset", "model") if "has no" in why else ("datasets/", "")
        assert data.startswith(f"{repo}: ") and model.startswith(f"--model {repo}: ")
        assert why.format(places[0]) in data and FILE in data
        assert why.format(places[1]) in model and f"{FOLDER}{repo} --local-dir DIR`" in model
    assert told[-4] == (
        "tldr: the Hugging Face hub has no dataset openai/summarize_from_feedback, or it is "
        "private (`hf auth login` if it is yours); a copy serves too: `hf download --repo-type "
        "dataset openai/summarize_from_feedback --revision refs/convert/parquet --local-dir DIR` "
        "where there is a network, then tldr=DIR"
    )
    assert "(the short names are tldr, ultrafeedback, " in told[-2]
    assert "(the short names are gemma-2-2b, " in told[-1]


def test_what_we_say_offline(tmp_path):
    told = ask(["hh", "o/name", "gpt2"], tmp_path, HF_HUB_OFFLINE="1")
    away = "is not in the cache, and the Hugging Face hub is out of reach"
    assert told[0] == (
        f"hh: Anthropic/hh-rlhf {away}; a copy serves too: `hf download --repo-type dataset "
        "Anthropic/hh-rlhf --local-dir DIR` where there is a network, then hh=DIR"
    )
    assert told[2] == (
        f"o/name: there is no such file or folder, and o/name {away}; {FILE} (README.md lists the "
        "columns)"
    )
    assert told[5] == (
        f"--model gpt2: there is no such folder, and openai-community/gpt2 {away}; "
        f"{FOLDER}openai-community/gpt2 --local-dir DIR` makes one where there is a network)"
    )


def test_a_model_folder_that_cannot_be_read_says_so_itself(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(common.UserError) as caught:
        common.load_tokenizer(str(tmp_path), 10)
    assert str(caught.value) == f"--model {tmp_path}: it has no tokenizer that can be read"
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(common.UserError) as caught:
        common.load_tokenizer(str(tmp_path), 10)
    assert str(caught.value).startswith(f"--model {tmp_path}: Unrecognized model in {tmp_path}")


# -- what the methods ask for when nothing is said


METHODS = {
    path.stem: path.read_text()
    for path in sorted(ROOT.glob("*.py"))
    if "\nSETTINGS = {" in path.read_text()
}


def test_all_methods_are_looked_at():
    assert {*"sft dpo cpo simpo slic kto pro listwise_dpo".split()} <= METHODS.keys()


def kinds_asked_for(source: str) -> set[str]:
    """What the file gives to common.load_rows as its third argument."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    of_rows = [c for c in calls if getattr(c.func, "attr", "") == "load_rows"]
    return {call.args[2].value for call in of_rows}


def rows_of_settings() -> list[tuple[str, str]]:
    return [(name, row) for name in METHODS for row in import_module(name).SETTINGS]


@pytest.mark.parametrize("method, model", rows_of_settings())
def test_a_row_of_settings_leaves_nothing_open(method, model):
    """A run with --model alone must start, on a data set of the kind that the method takes."""
    module = import_module(method)
    row = module.SETTINGS[model]
    fields = {f.name: f.default for f in dataclasses.fields(module.Args)}
    open_to_all = {"ref_model", "eval_dataset", "dtype", "output_dir", "cache_dir", "lora_rank"}
    open_to_all |= {"gold_reward", "value_model", "prompts"}  # nothing, the reward model, all
    if model != "tiny":
        open_to_all.add("reward")  # asked for: somebody has to train it first
    if method == "grpo" and model != "tiny":
        open_to_all.add("dataset")  # asked for: their questions are no preference sets
    needed = {name for name, default in fields.items() if default is None} - open_to_all
    assert len({"epochs", "max_steps"} & row.keys()) == 1  # else one of them would say nothing
    assert needed - {"epochs", "max_steps"} <= row.keys()
    assert {name for name in row if name != "source"} <= {n for n in fields if fields[n] is None}
    assert row["source"].strip()

    (kind,) = kinds_asked_for(METHODS[method])
    if "dataset" not in row:
        pass
    elif row["dataset"] == "family":
        assert model == "tiny"
        assert next(common._raw_rows("family", "train", kind))[1]
    elif "/" in row["dataset"]:  # a hub id, whose columns are ours
        assert re.fullmatch(r"[\w-]+/[\w.-]+(::\w+)?", row["dataset"])  # and perhaps a split
        assert sources.find_named(row["dataset"], kind) is None
    else:
        assert {*sources.RICHER[kind]} & published.DATASETS[row["dataset"]].keys()
        assert sources.find_named(row["dataset"], kind).source.repo

    args = module.Args(model=model)
    origin, _ = common.fill_in(args, module.SETTINGS)
    common.check_shared(args)
    assert {name for name, where in origin.items() if where == "command line"} <= {"model"}
    assert args.batch_size % args.micro_batch_size == 0
    assert (args.lora_rank or 0) == row.get("lora_rank", 0)


def test_short_names_of_models():
    assert common.resolve_model("gemma-2-2b") == "google/gemma-2-2b"
    assert common.resolve_model("owner/name") == "owner/name"
    assert all(repo.count("/") == 1 for repo in sources.MODELS.values())
    assert all(name == name.lower() and "/" not in name for name in sources.MODELS)
