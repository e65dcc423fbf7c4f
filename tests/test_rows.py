"""From a data set to rows of ids and batches; flags and models that are refused before training.

Expected rows are written as they decode, with special tokens: ("<s>Why?", [" So.</s>"]). Which
column becomes what is in test_kinds.py, file formats and published sets are in test_data_load.py.
"""

import json
import random
import re
import shutil
from collections import Counter
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import make_config, make_tokenizer, pair_rows, write_jsonl
from test_shape import METHODS
from transformers import GenerationConfig

import common
import dpo
from data import load as data_load
from data import models
from data import rows as data_rows
from data import tokens as data_tokens

TURN = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
TEMPLATES = {
    "turns": ("bos", TURN),  # writes no BOS, and nothing after the end of an answer
    "turns-bos": ("bos", "{{ bos_token }}" + TURN),
    "turns-no-end": ("bos", TURN.replace("</s>", "")),
    "turns-tail": ("bos", TURN.replace("</s>", "</s>\n\n")),
    "turns-strict": ("bos", "{{ raise_exception('No system messages') }}"),
    "turns-other": ("bos", TURN.replace("[assistant]{% endif", "[answer]{% endif")),
}
pytestmark = pytest.mark.usefixtures("fresh_process")


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory):
    """tokenizers(name): bos, chat, pad-eos or one of TEMPLATES, as a run loads it."""
    made = {}

    def get(name: str, *stops: str):
        if (name, *stops) not in made:
            kind, template = TEMPLATES.get(name, (name, None))
            tokenizer = make_tokenizer(kind)
            tokenizer.chat_template = template or tokenizer.chat_template
            folder = tmp_path_factory.mktemp("tokenizers")
            make_config("llama", tokenizer).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            if stops:
                ids = tokenizer.convert_tokens_to_ids(list(stops))
                GenerationConfig(eos_token_id=ids).save_pretrained(folder)
            made[name, *stops] = common.load_tokenizer(str(folder), 100)
        return made[name, *stops]

    return get


def both(source, tokenizer, kind: str = "pair", **flags) -> tuple[list, list]:
    """Training and held-out rows of a file or of these rows."""
    if isinstance(source, list):
        source = write_jsonl(Path("rows.jsonl"), source)
    how = {name: flags.pop(name) for name in ("whole_text", "with_target") if name in flags}
    args = {"dataset": str(source), "eval_dataset": None, "skip_bad_rows": False}
    args |= {"max_length": 1000, "max_prompt_length": 900, "cache_dir": "cache"} | flags
    return common.load_rows(SimpleNamespace(**args), tokenizer, kind, **how)


def load(*args, **flags) -> list[common.Row]:
    """The training rows: of fewer than 20 rows none is held out."""
    return both(*args, **flags)[0]


def decoded(rows: list[common.Row], tokenizer) -> list[tuple]:
    """(prompt, responses), and the scores if there are some."""
    found = []
    for row in rows:
        texts = (tokenizer.decode(row.prompt), [tokenizer.decode(r) for r in row.responses])
        found.append(texts if row.scores is None else (*texts, row.scores.tolist()))
    return found


def ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def says(text: str) -> dict:
    return {"role": "assistant", "content": text}


PAIR = {"prompt": "Why?", "chosen": " So.", "rejected": " No."}
RANKED = {"prompt": "Why?", "responses": [" b", " d", " a", " c"], "scores": [3, 1.5, 4, 2]}
LABELLED = {"prompt": "Why?", "completion": " So.", "label": False}
ASKED = [user("Hello"), says("Hi"), user("Why?")]
DIALOGUES = {"chosen": [*ASKED, says("So.")], "rejected": [*ASKED, says("Some.")]}
TURNS = {x: [user("Why?"), says(x), user("And?"), says("Yes.")] for x in ("chosen", "rejected")}

# -- rows of every kind

ASKED_TEXT = "<s>[user]Hello[assistant]Hi</s>[user]Why?[assistant]"
CHAT = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
AGAIN = "</s>[user]And?[assistant]Yes.</s>"
KINDS = [
    ("pair", "bos", PAIR, [("<s>Why?", [" So.</s>", " No.</s>"])]),
    ("pair", "turns", DIALOGUES, [(ASKED_TEXT, ["So.</s>", "Some.</s>"])]),
    # Several turns are one response, which ends where the last of them ends.
    ("pair", "turns", TURNS,
     [("<s>[user]Why?[assistant]", ["chosen" + AGAIN, "rejected" + AGAIN])]),
    ("pair", "turns-tail", TURNS,
     [("<s>[user]Why?[assistant]", [f"{x}</s>\n\n{AGAIN[4:]}" for x in TURNS])]),
    # A template that begins an answer in another way than one that is to be generated.
    ("pair", "turns-other", DIALOGUES,
     [(ASKED_TEXT[:-11], ["[assistant]So.</s>", "[assistant]Some.</s>"])]),
    ("pair", "chat", {"prompt": "Why?", "chosen": [says("at")], "rejected": [says("ar")]},
     [(CHAT, ["at<|im_end|>", "ar<|im_end|>"])]),
    ("demonstration", "chat", {"prompt": "Why?", "completion": [says("at")]},
     [(CHAT, ["at<|im_end|>"])]),
    ("pair", "bos", RANKED, [("<s>Why?", [" a</s>", " d</s>"])]),
    # With a target, which may be one of the other responses, or a whole dialogue.
    ("pair", "bos", PAIR | {"target": " So."}, [("<s>Why?", [" So.</s>", " No.</s>", " So.</s>"])]),
    ("pair", "turns", DIALOGUES | {"target": [*ASKED, says("Yes.")]},
     [(ASKED_TEXT, ["So.</s>", "Some.</s>", "Yes.</s>"])]),
    ("labelled", "bos", LABELLED, [("<s>Why?", [" So.</s>"], [0.0])]),
    ("labelled", "bos", PAIR,
     [("<s>Why?", [" So.</s>"], [1.0]), ("<s>Why?", [" No.</s>"], [0.0])]),
    ("labelled", "turns", DIALOGUES,
     [(ASKED_TEXT, ["So.</s>"], [1.0]), (ASKED_TEXT, ["Some.</s>"], [0.0])]),
    ("ranked", "bos", RANKED,
     [("<s>Why?", [" a</s>", " b</s>", " c</s>", " d</s>"], [4.0, 3.0, 2.0, 1.5])]),
    ("demonstration", "turns", {"messages": [*ASKED, says("So.")]}, [(ASKED_TEXT, ["So.</s>"])]),
    ("demonstration", "bos", {"text": "Why? So."}, [("<s>", ["Why? So.</s>"])]),
    ("demonstration", "pad-eos", {"text": "Why?"}, [("W", ["hy?<|endoftext|>"])]),
    ("prompt", "chat", {"prompt": [user("Why?")]}, [(CHAT, [])]),
    ("prompt", "turns-bos", {"messages": [*ASKED, says("So.")]}, [(ASKED_TEXT, [])]),
]  # fmt: skip


@pytest.mark.parametrize("kind, name, raw, expected", KINDS)
def test_a_row(kind, name, raw, expected, tokenizers):
    tokenizer = tokenizers(name)
    rows = load([raw], tokenizer, kind, with_target="target" in raw)
    assert decoded(rows, tokenizer) == expected
    for row in rows:
        assert all(part.dtype == np.int32 for part in (row.prompt, *row.responses, row.question))
        assert row.scores is None or row.scores.dtype == np.float64
        if "text" not in raw:  # sampling begins where the response does
            assert row.question.tolist() == row.prompt.tolist()


def test_prompt_and_responses_are_joined_as_ids(tokenizers):
    """'the c' + 'at' does not become 'the' + ' cat': every response has the same prompt."""
    tokenizer, (prompt, chosen, rejected) = tokenizers("bos"), ("the c", "at sat", "ar")
    separate = ids(tokenizer, prompt) + ids(tokenizer, chosen)
    assert ids(tokenizer, prompt + chosen) != separate, "the texts must merge to test anything"
    (row,) = load([{"prompt": prompt, "chosen": chosen, "rejected": rejected}], tokenizer)
    assert row.prompt.tolist() == tokenizer.bos + ids(tokenizer, prompt)
    for text, response in zip((chosen, rejected), row.responses, strict=True):
        assert response.tolist() == ids(tokenizer, text) + [tokenizer.eos_token_id]


# -- one BOS, one EOS


@pytest.mark.parametrize(
    "name, raw, end",
    [
        ("bos", PAIR, ".</s>"),
        ("bos", PAIR | {"prompt": "<s>Why?"}, ".</s>"),  # written out
        ("bos", PAIR | {"prompt": "<s><s>Why?"}, ".</s>"),
        ("bos", {"prompt": "Why?", "chosen": " So.</s>", "rejected": " No.</s>\n"}, ".</s>"),
        ("turns", DIALOGUES, ".</s>"),
        ("turns-bos", DIALOGUES, ".</s>"),
        ("turns-tail", DIALOGUES, ".</s>"),  # what the template writes after the end is cut
        ("turns-no-end", DIALOGUES, ".</s>"),
        ("pad-eos", PAIR, ".<|endoftext|>"),  # padding has the same id; its BOS is never written
        ("chat", DIALOGUES, ".<|im_end|>"),
    ],
)
def test_one_bos_and_one_eos(name, raw, end, tokenizers, caplog):
    tokenizer, how = tokenizers(name), {}
    if "<s>" in str(raw):
        how = {"chat_template": "none"}
    bos = [tokenizer.bos_token_id] * (name not in ("pad-eos", "chat"))
    assert tokenizer.bos == bos
    (row,) = load([raw], tokenizer, **how)
    for response in row.responses:
        assert tokenizer.decode(response).endswith(end)
        assert (response == response[-1]).sum() == 1
    assert row.prompt.tolist()[: len(bos)] == bos
    assert np.isin([*row.prompt, *row.responses[0]], bos).sum() == len(bos)
    assert "100.0% of responses end with EOS" in caplog.text
    # If the prompt is trained on too, only the first token has nothing that predicts it.
    (whole,) = load([raw], tokenizer, "demonstration", whole_text=True, **how)
    assert [*whole.prompt, *whole.responses[0]] == [*row.prompt, *row.responses[0]]
    assert len(whole.prompt) == 1 and whole.question.tolist() == row.prompt.tolist()


def test_any_end_of_the_model_ends_a_response(tokenizers):
    """Llama 3 and Gemma end a turn with another token than their tokenizer's EOS."""
    tokenizer = tokenizers("chat", "<|endoftext|>", "<|im_end|>")
    assert tokenizer.stop_ids == {*tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])}
    raw = PAIR | {"rejected": " No.<|endoftext|>"}
    rows = load([raw], tokenizer, chat_template="none")
    assert decoded(rows, tokenizer) == [("Why?", [" So.<|im_end|>", " No.<|endoftext|>"])]


# -- cutting, to 20 tokens of which 12 are the prompt's. Each of z, y, x and w is a token.

CUT = {"max_length": 20, "max_prompt_length": 12}
LONG = "zyxw" * 10


@pytest.mark.parametrize(
    "kind, raw, prompt, responses, cut",
    [
        # A prompt keeps its BOS and its end, a response its start; it has not ended there.
        ("pair", {"prompt": LONG, "chosen": "abc", "rejected": "de"},
         LONG[-11:], ["abc</s>", "de</s>"], "1 prompts and 0 responses cut; 100.0%"),
        ("pair", {"prompt": "zyxw", "chosen": LONG, "rejected": "zx"},
         "zyxw", [LONG[:15], "zx</s>"], "0 prompts and 1 responses cut; 50.0%"),
        ("pair", {"prompt": LONG, "chosen": LONG, "rejected": LONG[1:]},
         LONG[-11:], [LONG[:8], LONG[1:9]], "1 prompts and 2 responses cut; 0.0%"),
        # A row that fits is not cut, however long its prompt.
        ("pair", {"prompt": LONG[:16], "chosen": "zy", "rejected": "x"},
         LONG[:16], ["zy</s>", "x</s>"], "0 prompts and 0 responses cut"),
        ("prompt", {"prompt": LONG[:16]}, LONG[5:16], [], "1 prompts cut"),  # room for an answer
    ],
)  # fmt: skip
def test_cutting(kind, raw, prompt, responses, cut, tokenizers, caplog):
    tokenizer = tokenizers("bos")
    rows = load([raw], tokenizer, kind, **CUT)
    assert decoded(rows, tokenizer) == [("<s>" + prompt, responses)]
    assert cut in caplog.text


Z, X = "zyxw" * 9 + "z", "zyxw" * 9 + "x"  # of both, the same 15 tokens stay after <s>zyxw
ONE = "1 responses equal after cutting"


@pytest.mark.parametrize(
    "kind, texts, scores, kept, lost",
    [
        ("ranked", [Z, X, "ab"], [3, 2, 1], [("Z", 3.0), ("ab", 1.0)], ONE),  # the better stays
        ("ranked", [X, "ab", Z], [1, 2, 3], [("Z", 3.0), ("ab", 2.0)], ONE),
        ("ranked", ["ab", "de", Z], [2, 2, 3], [("Z", 3.0), ("ab", 2.0), ("de", 2.0)], "none"),
        ("ranked", [Z, X, "ab"], [2, 1, 2], [], "1 equal after cutting"),  # two equally good
        ("ranked", [Z, X], [2, 1], [], "1 equal after cutting"),
        ("pair", [Z, X], [2, 1], [], "1 equal after cutting"),
        ("labelled", [Z, X], [2, 1], [], "1 equal after cutting"),
    ],
)
def test_responses_that_cutting_makes_equal(kind, texts, scores, kept, lost, tokenizers, caplog):
    raw = {"prompt": "zyxw", "responses": texts, "scores": scores}
    other = {"prompt": "b", "responses": ["d", "e"], "scores": [1, 0]}  # a row that stays
    found = decoded(load([raw, other], tokenizers("bos"), kind, **CUT), tokenizers("bos"))
    cut = {"Z": LONG[:15], "ab": "ab</s>", "de": "de</s>"}
    row = ("<s>zyxw", [cut[name] for name, _ in kept], [score for _, score in kept])
    assert [x for x in found if x[0] == "<s>zyxw"] == [row] * bool(kept)
    assert found[-1][0] == "<s>b"
    assert caplog.messages[0].endswith(lost)


def test_the_report(tokenizers, caplog):
    load([RANKED, RANKED | {"scores": [1, 1, 1, 1]}, RANKED], tokenizers("bos"))
    assert caplog.messages[:3] == [
        "train: rows.jsonl: 3 ranked rows -> 2 pair rows; left out: 1 all responses equal",
        "tokens (median/95 %/max): prompt 5/5/5, response 3/3/3; 0 prompts and 0 responses cut; "
        "100.0% of responses end with EOS",
        "first row: '<s>Why?' | ' a</s>' | ' d</s>'",
    ]


def test_equal_prompts_are_sampled_from_once(tokenizers, caplog):
    raws = [{"prompt": p, "chosen": f" {i}", "rejected": " no"} for i, p in enumerate("abacab")]
    rows = load(raws, tokenizers("bos"), "prompt")
    assert decoded(rows, tokenizers("bos")) == [("<s>a", []), ("<s>b", []), ("<s>c", [])]
    report = "6 pair rows -> 3 prompt rows; left out: 3 repeated prompts"
    assert caplog.messages[0].endswith(report)


@pytest.mark.parametrize("lines", [0, 1, 2])
def test_a_post_is_shortened_until_its_tokens_fit(lines, tokenizers):
    """TL;DR's prompts lose lines until they have --max-prompt-length tokens, BOS included."""
    tokenizer, posts = tokenizers("bos"), ["one", "one\ntwo é", "one\ntwo é\n漢 four"]
    text = "SUBREDDIT: r/cats\n\nTITLE: Help\n\nPOST: {}\n\nTL;DR:"
    raw = {"info": {"subreddit": "cats", "title": "Help", "post": posts[-1]}, "choice": 0}
    raw["summaries"] = [{"text": " A cat."}, {"text": " No."}]
    expected = tokenizer.bos + ids(tokenizer, text.format(posts[lines]))
    file = write_jsonl(Path("rows.jsonl"), [raw])
    for more in (0, 1):  # one token more is not enough for another line
        flags = {"max_length": 300, "max_prompt_length": len(expected) + more}
        (row,) = load(f"tldr={file}", tokenizer, **flags)
        assert row.prompt.tolist() == expected


def test_tokens_of_many_texts_are_cached(tokenizers, monkeypatch):
    def compared(rows):
        return [[x.tolist() for x in (row.prompt, *row.responses)] for row in rows]

    expected = compared(load(pair_rows(30), tokenizers("bos")))
    monkeypatch.setattr(data_tokens, "MANY_TEXTS", 30)
    for _ in range(2):
        assert compared(load(Path("rows.jsonl"), tokenizers("bos"))) == expected
        assert len([*Path("cache").glob("tokens-*.arrow")]) == 1


# -- texts and the chat template


def as_messages(row: dict, answers: bool) -> dict:
    """The same row with messages: only the prompt, or the answers too."""
    made = {name: [says(x)] if answers and isinstance(x, str) else x for name, x in row.items()}
    if answers and "responses" in row:
        made["responses"] = [[says(x)] for x in row["responses"]]
    return made | {"prompt": [user(row["prompt"])]}


TEXTS = [
    ("pair", PAIR | {"target": " Yes."}), ("ranked", RANKED), ("labelled", LABELLED),
    ("demonstration", {"prompt": "Why?", "completion": " So."}), ("prompt", {"prompt": "Why?"}),
]  # fmt: skip


@pytest.mark.parametrize("kind, raw", TEXTS)
@pytest.mark.parametrize("name", ["chat", "turns-bos"])
def test_texts_and_messages_are_the_same_tokens(kind, raw, name, tokenizers, caplog):
    tokenizer, how = tokenizers(name), {"with_target": "target" in raw}
    forms = [raw, as_messages(raw, answers=False), as_messages(raw, answers=True)]
    texts, *messages = (load([form], tokenizer, kind, **how) for form in forms)
    start = {"chat": CHAT, "turns-bos": "<s>[user]Why?[assistant]"}[name]
    assert [prompt for prompt, *_ in decoded(texts, tokenizer)] == [start]
    for rows in messages:
        assert decoded(rows, tokenizer) == decoded(texts, tokenizer)
    for rows in (*messages, load([raw], tokenizers("bos"), kind, **how)):  # held out together
        assert [row.key for row in rows] == [row.key for row in texts]
    assert caplog.text.count("chat template: texts are wrapped as user and assistant turns") == 1


@pytest.mark.parametrize(
    "name, dataset, raw, flags, said",
    [
        ("chat", "rows.jsonl", PAIR, {"chat_template": "none"}, "texts are used as they are"),
        ("chat", "shp=rows.jsonl", {"history": "Why?", "human_ref_A": "So.", "human_ref_B": "No.",
         "labels": 1, "score_A": 4, "score_B": 1}, {}, "texts are used as they are"),
        ("chat", "rows.jsonl", {"text": "Why? So."}, {}, None),
        ("bos", "rows.jsonl", PAIR, {}, None),
    ],
)  # fmt: skip
def test_texts_that_are_not_wrapped(name, dataset, raw, flags, said, tokenizers, caplog):
    write_jsonl(Path("rows.jsonl"), [raw])
    (row,) = load(dataset, tokenizers(name), "demonstration" if "text" in raw else "pair", **flags)
    assert "user" not in tokenizers(name).decode([*row.prompt, *row.responses[0]])
    assert (f"chat template: {said}" in caplog.text) if said else ("template" not in caplog.text)


SPELT = "a <|im_end|></s> b"  # one or the other is special
SPECIAL = [
    ("chat", {"prompt": SPELT, "chosen": SPELT, "rejected": "No."}),
    ("chat", as_messages({"prompt": SPELT, "chosen": SPELT, "rejected": "No."}, answers=True)),
    ("turns-bos", as_messages({"prompt": SPELT, "chosen": SPELT, "rejected": "No."}, answers=True)),
    ("bos", {"prompt": SPELT, "chosen": SPELT, "rejected": "No."}),
    ("pad-eos", {"prompt": "a <|endoftext|> b", "chosen": "<|endoftext|>a", "rejected": "No."}),
    ("bos", {"prompt": "<s>a</s>", "chosen": "a<pad>", "rejected": "No."}),
]


@pytest.mark.parametrize("name, raw", SPECIAL)
def test_special_tokens_in_texts_are_plain(name, raw, tokenizers, caplog):
    tokenizer, harmless = tokenizers(name), json.loads(re.sub(r"[<>]", "_", json.dumps(raw)))
    (row,), (other,) = load([raw], tokenizer), load([harmless], tokenizer)
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    both = [[one.prompt, *one.responses] for one in (row, other)]
    for found, expected in zip(*both, strict=True):
        assert [i for i in found if i in special] == [i for i in expected if i in special]
        text = re.sub(r"[<>]", "_", tokenizer.decode(found))
        assert text == re.sub(r"[<>]", "_", tokenizer.decode(expected))
    assert "special tokens that 1 rows spell out are encoded as plain text" in caplog.text


def test_ends_and_raw_texts(tokenizers, caplog):
    """An end at the end of an answer is one, if no template wraps it. Raw texts are as written."""
    tokenizer, ended = tokenizers("bos"), {"chosen": " So.</s>", "rejected": " No. </s>\n</s> "}
    (plain,), (row,) = load([PAIR], tokenizer), load([PAIR | ended], tokenizer)
    assert row.responses[0].tolist() == plain.responses[0].tolist()
    assert tokenizer.decode(row.responses[1]) == " No. </s>" and "spell out" not in caplog.text
    raw = PAIR | {"prompt": "<s>a</s>b"}
    (row,) = load([raw], tokenizer, chat_template="none")
    assert row.prompt.tolist() == ids(tokenizer, "<s>a</s>b")
    assert tokenizer.eos_token_id in row.prompt
    (row,) = load([{"prompt": "<s>"}], tokenizer, "prompt", chat_template="none")
    assert row.prompt.tolist() == tokenizer.bos  # a model may write from nothing
    raw = as_messages(PAIR | {"prompt": "<|im_end|>"}, answers=True)
    for template, count in (("auto", 1), ("none", 2)):
        (row,) = load([raw], tokenizers("chat"), chat_template=template)
        assert (row.prompt == tokenizers("chat").eos_token_id).sum() == count


def test_an_end_alone(tokenizers):
    with pytest.raises(ValueError, match="rows.jsonl:1: an answer without tokens"):
        load([{"text": "<|endoftext|>"}], tokenizers("pad-eos"), "demonstration")


def test_columns(tokenizers):
    raw = {"q": "Why?", "good": " So.", "bad": " No.", "prompt": "other"}
    rows = load([raw], tokenizers("bos"), columns="prompt=q, chosen=good,rejected=bad")
    assert decoded(rows, tokenizers("bos")) == [("<s>Why?", [" So.</s>", " No.</s>"])]
    with pytest.raises(ValueError, match=r"--columns: no column 'x' \(columns: q, good, bad, prom"):
        load([raw], tokenizers("bos"), columns="prompt=x")


WARNINGS = [
    ("pair", "bos", {"prompt": "zyxw", "chosen": LONG, "rejected": "zx"}, "100% of the chosen"),
    ("pair", "bos", {"prompt": "zyxw", "chosen": "zx", "rejected": LONG}, None),
    ("demonstration", "bos", {"prompt": "zyxw", "completion": LONG}, "100% of the answers are cut"),
    ("pair", "turns", TURNS, "1 rows hold dialogues that differ before the last answer"),
    ("pair", "turns", DIALOGUES, None),
    ("labelled", "bos", LABELLED, "all labels are false; answers of both kinds are needed"),
    ("labelled", "bos", PAIR, None),
    ("prompt", "bos", {"prompt": "zyxw"}, None),
]


@pytest.mark.parametrize("kind, name, raw, expected", WARNINGS)
def test_warnings(kind, name, raw, expected, tokenizers, caplog):
    load([raw], tokenizers(name), kind, **(CUT if name == "bos" else {}))
    said = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert len(said) == bool(expected) and f"warning: {expected}" in "".join(said) + "warning: None"


# -- held-out rows


def numbered(n: int) -> list[dict]:
    return [PAIR | {"prompt": f"{i}?"} for i in range(n)]


def prompts_of(rows: list[common.Row]) -> set[bytes]:
    return {row.question.tobytes() for row in rows}


@pytest.mark.parametrize("kind", ["pair", "ranked", "labelled", "demonstration", "prompt", "text"])
def test_a_twentieth_is_held_out_by_a_hash_of_the_prompt(kind, tokenizers):
    """The same prompts for every method and order of the file; equal prompts on one side."""
    tokenizer, raws = tokenizers("bos"), numbered(200)
    pairs = both(raws, tokenizer)
    if kind == "text":
        rows = both([{"text": f"{i}?"} for i in range(200)], tokenizer, "demonstration")
    else:
        rows = both(random.Random(0).sample(raws, 200), tokenizer, kind)
        assert list(map(prompts_of, rows)) == list(map(prompts_of, pairs))
    assert [len(part) // (1 + (kind == "labelled")) for part in rows] == [190, 10]


@pytest.mark.parametrize("kind, how", [("labelled", {}), ("demonstration", {"whole_text": True})])
def test_equal_prompts_are_on_one_side(kind, how, tokenizers):
    """Also if one of two responses is so long that a prompt is cut: it is cut for both."""
    raws = []
    for i in range(100):
        row = {"prompt": LONG[:32] + f" {i}?", "chosen": " ab", "rejected": " de" * 12}
        prompt, *texts = row.values()
        raws += [{"prompt": prompt, "completion": text} for text in texts] if how else [row]
    flags = {"max_length": 60, "max_prompt_length": 35}
    parts = both(raws, tokenizers("bos"), kind, **flags, **how)
    keys = [Counter(row.key for row in rows) for rows in parts]
    assert not keys[0].keys() & keys[1].keys()
    assert sum(map(len, parts)) == 200 and 0 < len(parts[1]) <= 10
    assert {*keys[0].values()} == {*keys[1].values()} == {2}
    if kind == "labelled":
        assert {*Counter(row.prompt.tobytes() for row in parts[0]).values()} == {2}
        assert max(row.length() for row in parts[0]) <= 60


def test_how_many_rows_are_held_out(tokenizers, monkeypatch):
    few = str(write_jsonl(Path("few.jsonl"), numbered(19)))
    for raws, named, expected in (
        (numbered(19), None, (19, 0)),  # of a handful, none
        (numbered(100), few, (100, 19)),
        (numbered(10_300), None, (10_300 - 512, 512)),
    ):
        assert tuple(map(len, both(raws, tokenizers("bos"), eval_dataset=named))) == expected
    monkeypatch.setattr(data_load, "test_split", lambda dataset, kind: few)
    monkeypatch.setattr(data_rows, "TEST_ROWS", 10)  # of the data set's own test split
    assert tuple(map(len, both(numbered(100), tokenizers("bos")))) == (100, 10)


# -- rows that cannot be used

MISSING = "no column 'chosen' and 'rejected' (columns: "
OTHER = {"chosen": [user("Why?"), says("So.")], "rejected": [user("Who?"), says("No.")]}
BAD = [
    ("bos", b'{"prompt": "Why?", "chosen" " So."}', "not JSON (Expecting ':' delimiter"),
    ("bos", '{"prompt": "Où"}'.encode("latin-1"), "not UTF-8 (invalid start byte at byte 13)"),
    ("bos", [PAIR], "a row must be an object, this is a list"),
    ("bos", PAIR | {"rejected": " \n"}, "'rejected' is empty"),
    ("bos", PAIR | {"prompt": 7}, "'prompt' must be a text or a list of messages"),
    ("bos", LABELLED, MISSING + "prompt, completion, label); labelled rows are for kto.py"),
    ("bos", {"a\n\ud83d error: x": 1}, MISSING + "a\\n\\ud83d error: x)"),
    ("bos", b'{"prompt": ' + b"[" * 100_000, "nested too deeply"),
    ("bos", PAIR | {"chosen": "a" * 200_000}, "a line of 200,052 bytes, at most 200,000 are read"),
    ("bos", PAIR | {"chosen": " So.</s> And."}, "an end-of-sequence token in the middle of a"),
    ("bos", PAIR | {"chosen": " \ud83d"}, "'chosen' has half a character (a lone surrogate)"),
    ("bos", DIALOGUES, "a list of messages, but this model's tokenizer has no chat template"),
    ("turns", OTHER, "'chosen' and 'rejected' begin with other messages, and have no 'prompt'"),
    ("turns-strict", DIALOGUES, "the chat template refuses it: No system messages"),
]


@pytest.mark.parametrize("name, bad, reason", BAD)
def test_a_bad_row(name, bad, reason, tokenizers, caplog, monkeypatch):
    """The error names file, line and reason; --skip-bad-rows leaves the row out."""
    monkeypatch.setattr(data_load, "LONGEST_LINE", 200_000)
    good = DIALOGUES if name.startswith("turns") and bad != DIALOGUES else PAIR
    bad = bad if isinstance(bad, bytes) else json.dumps(bad).encode()
    Path("rows.jsonl").write_bytes(json.dumps(good).encode() + b"\n\n" + bad)
    with pytest.raises(ValueError) as error:
        load(Path("rows.jsonl"), tokenizers(name), chat_template="none")
    first, second = str(error.value).splitlines()
    assert first.startswith("1 of 2 rows of rows.jsonl cannot be used (--skip-bad-rows leaves")
    assert second.startswith(f"  rows.jsonl:3: {reason}")
    flags = {"chat_template": "none", "skip_bad_rows": True}
    assert len(load(Path("rows.jsonl"), tokenizers(name), **flags)) == 1
    assert f"left out: 1 bad (rows.jsonl:3: {reason}" in caplog.messages[0]


def test_many_bad_rows(tokenizers):
    """Equal reasons are one line. If all rows are bad, --skip-bad-rows is no advice."""
    for skip in (False, True):
        with pytest.raises(ValueError) as error:
            load([LABELLED] * 1013, tokenizers("bos"), skip_bad_rows=skip)
        first, second = str(error.value).splitlines()
        assert first == "1,013 of 1,013 rows of rows.jsonl cannot be used:"
        assert second.startswith("  1,013 of 1,013 rows: " + MISSING)
        assert second.endswith("; first: rows.jsonl:1, rows.jsonl:2, rows.jsonl:3")
    empty = [PAIR | {"chosen": ""}, PAIR, PAIR | {"chosen": " "}, LABELLED]
    with pytest.raises(ValueError) as error:
        load(empty + [PAIR | {f"x{i}": 1, "chosen": i} for i in range(20)], tokenizers("bos"))
    first, second, third, fourth = str(error.value).splitlines()
    assert first == "23 of 24 rows of rows.jsonl cannot be used (--skip-bad-rows leaves them out):"
    assert second.startswith("  20 of 24 rows: 'chosen' must be a text")
    assert third == "  2 of 24 rows: 'chosen' is empty; first: rows.jsonl:1, rows.jsonl:3"
    assert fourth.startswith("  rows.jsonl:4: no column")
    with pytest.raises(ValueError, match=r"no usable row \(0 read; left out: none\)"):
        load([], tokenizers("bos"))
    tied = RANKED | {"scores": [1, 1, 1, 1]}
    with pytest.raises(ValueError, match=r"\(1 read; left out: 1 all responses equal\)"):
        load([tied], tokenizers("bos"))


def test_an_array_in_a_jsonl(tokenizers):
    for text in ("[\n{}\n]", json.dumps([PAIR])):
        Path("rows.jsonl").write_text(text)
        with pytest.raises(ValueError, match="a JSON array, not a row per line: name it .json"):
            load(Path("rows.jsonl"), tokenizers("bos"))
    Path("rows.jsonl").rename("rows.json")
    assert len(load(Path("rows.json"), tokenizers("bos"))) == 1


# -- flags and models: every mistake is reported before a model is loaded


class ModelLoaded(AssertionError):
    pass


@pytest.fixture
def main(monkeypatch, checkpoints):
    """main(script, **flags): a method up to the moment when it loads the model."""
    import datasets
    import huggingface_hub

    def refuse(*args, **more):
        raise ModelLoaded

    monkeypatch.setattr(common, "load_policy", refuse)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    Path("model").symlink_to(checkpoints("llama"))
    write_jsonl(Path("rows.jsonl"), pair_rows(40))

    def call(script: str, **flags) -> None:
        method = import_module(script)
        usual = {"model": "model", "dataset": "rows.jsonl", "output_dir": "out", "max_steps": 2}
        usual |= {"batch_size": 4, "max_length": 64, "max_prompt_length": 40}
        named = [(f"--{name.replace('_', '-')}", str(x)) for name, x in (usual | flags).items()]
        words = [word for pair in named for word in pair]
        method.main(common.parse(method.Args, method.PRESETS, method.__doc__, words))

    return call


MISTAKES = [
    ("dpo", {"beta": 0}, "--beta must be positive"),
    ("dpo", {"label_smoothing": 0.5}, "--label-smoothing in [0, 0.5)"),
    ("dpo", {"batch_size": 0}, "--batch-size must be positive, got 0"),
    ("dpo", {"batch_size": 64}, "--batch-size must be a multiple of 1"),
    ("dpo", {"lr": 0}, "--lr must be positive, got 0.0"),
    ("dpo", {"lr": "nan"}, "--lr must be a finite number and not negative, got nan"),
    ("dpo", {"warmup_ratio": 1}, "--warmup-ratio must be in [0, 1), got 1.0"),
    ("dpo", {"soup_weight": 2}, "--soup-weight must be in [0, 1], got 2.0"),
    ("dpo", {"ref_model": "./nowhere"}, "--ref-model ./nowhere: there is no such folder"),
    ("dpo", {"ref_model": "model+./no"}, "--ref-model ./no: there is no such folder"),
    ("dpo", {"ref_model": "a+b+c"}, "--ref-model a+b+c: a soup is of two models"),
    ("dpo", {"max_prompt_length": 64}, "--max-prompt-length 64 leaves no room for a response"),
    ("dpo", {"max_length": 512}, "--max-length 512: model takes at most 128 tokens"),
    ("dpo", {"lora_rank": -1}, "--lora-rank must be"),
    ("dpo", {"output_dir": "rows.jsonl"}, "--output-dir rows.jsonl is a file"),
    ("dpo", {"dataset": "no.jsonl"}, "no.jsonl: there is no such file or folder"),
    ("dpo", {"eval_dataset": "no.jsonl"}, "no.jsonl: there is no such file or folder"),
    ("dpo", {"dataset": "bad.jsonl"}, "bad.jsonl:1: not JSON"),
    ("dpo", {"columns": "prompt"}, "--columns prompt: must be OURS=THEIRS,..."),
    ("dpo", {"columns": "question=prompt"}, "where OURS is of chosen, completion, label"),
    ("dpo", {"dataset": "nobody/nothing"}, "nobody/nothing is not in the cache, and the hub"),
    ("dpo", {"model": "runs/sft"}, "--model runs/sft: there is no such folder"),
    ("dpo", {"model": "empty"}, "--model empty: no config.json in empty. Did a run save it?"),
    ("dpo", {"model": "broken"}, "--model broken: broken/config.json is not JSON"),
    (
        "dpo",
        {"model": "other"},
        "--model other: The checkpoint you are trying to load has model type `unheard-of`",
    ),
    ("dpo", {"model": "untokenised"}, "--model untokenised: it has no tokenizer that can be"),
    ("dpo", {"model": "endless"}, "the tokenizer of endless has no end-of-sequence token"),
    ("dpo", {"model": "nobody/nothing"}, "--model nobody/nothing: there is no such folder, and"),
    ("dpo", {"model": "gemma-2-2b"}, "google/gemma-2-2b is not in the cache, and the hub"),
    ("cpo", {"nll_weight": -1}, "--nll-weight must be a finite number and not negative"),
    ("slic", {"ref_model": "model"}, "--ref-model needs --reference-normalised"),
    ("slic", {"regularise_on": "target"}, "40 of 40 rows: no 'target'; first: rows.jsonl:1, "),
    ("kto", {"desirable_weight": -1}, "the weights 0 or more"),
    ("kto", {"dataset": "one.jsonl", "batch_size": 2}, "all rows have the same prompt"),
    ("pro", {"score_scale": 0}, "--score-scale positive"),
    ("pro", {"dataset": "ultrachat"}, "ultrachat: has no ranked rows"),
    ("sft", {"dataset": "empty.jsonl"}, "empty.jsonl: no usable row (0 read"),
]


@pytest.mark.parametrize("script, flags, reason", MISTAKES)
def test_a_mistake(script, flags, reason, main, checkpoints):
    for name, text in (("bad.jsonl", "{\n"), ("empty.jsonl", "")):
        Path(name).write_text(text)
    write_jsonl(Path("one.jsonl"), [PAIR] * 5)
    for name in ("empty", "broken", "other"):
        Path(name).mkdir()
    Path("broken/config.json").write_text("{")
    Path("other/config.json").write_text('{"model_type": "unheard-of"}')
    for name in ("untokenised", "endless"):
        shutil.copytree(checkpoints("llama"), name)
    for file in Path("untokenised").glob("tokenizer*"):
        file.unlink()
    tokenizer = make_tokenizer("bos")
    tokenizer.eos_token = None
    tokenizer.save_pretrained("endless")
    with pytest.raises(ValueError) as error:
        main(script, **flags)
    assert reason in str(error.value)


def test_a_mistake_does_not_occupy_the_folder(main):
    with pytest.raises(ValueError, match="--lr"):
        main("dpo", lr=0)
    with pytest.raises(ModelLoaded):
        main("dpo", batch_size=12, micro_batch_size=5)  # lowered to 4


@pytest.mark.parametrize("flags, factor", [({}, "0.4"), ({"score_scale": 3}, "3")])
def test_pro_scales_scores(flags, factor, main, capsys):
    write_jsonl(Path("rows.jsonl"), [RANKED | {"prompt": f"{i}?"} for i in range(19)])
    with pytest.raises(ModelLoaded):
        main("pro", **flags)
    said = capsys.readouterr().out
    assert f"times {factor}, for a median gap of 2.5" in said
    assert "the median gap between best and worst is 2.5" in said


@pytest.mark.parametrize("flag", [["--learning-rate", "1"], ["--schedule", "warm"], ["--lr"]])
def test_a_flag_that_there_is_not(flag, capsys):
    with pytest.raises(SystemExit) as stop:
        common.parse(dpo.Args, dpo.PRESETS, dpo.__doc__, flag)
    assert stop.value.code == 2 and flag[0] in capsys.readouterr().err


def test_names_of_models():
    assert models.resolve_model("gemma-2-2b") == "google/gemma-2-2b"
    assert models.resolve_model("o/n") == "o/n"
    assert Path(models.resolve_model("tiny")).joinpath("config.json").is_file()
    names = ["tiny", "tiny-untrained", "o/Gemma-2-2B", "runs/sft/"]
    assert list(map(models.short_name, names)) == ["tiny", "tiny", "gemma-2-2b", "sft"]
    Path("run").mkdir()
    Path("run/config.json").write_text('{"plainpref": {"base_model": "gemma-2-2b"}}')
    assert models.short_name("run") == "gemma-2-2b"
    assert models.parts_of_soup("run+o/n") == ["run", "o/n"]
    Path("run").rename("run+1")
    assert models.parts_of_soup("run+1") == ["run+1"]


@pytest.mark.parametrize("method", METHODS)
def test_presets_name_data_sets_of_their_kind(method):
    module = import_module(method)
    (kind,) = set(re.findall(r'kind="(\w+)"', Path(module.__file__).read_text()))
    for preset in module.PRESETS.values():
        dataset = preset.get("dataset", "family")
        published = data_load.find_published(dataset, kind)  # raises if it has no such rows
        assert published or dataset.split(":")[0] == "family" or "/" in dataset
