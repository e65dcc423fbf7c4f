"""From a file to batches: every kind of row, the prompt's end, BOS and EOS, what is cut, what is
held out, and which row is learnt from when.

Expected rows are written as they would be decoded, with special tokens: ("<s>Why?", [" So.</s>"]).
"""

import csv
import json
import signal
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import make_config, make_tokenizer, pair_rows, write_jsonl
from transformers import GenerationConfig

import common
import dpo

CPU = torch.device("cpu")
TURN = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)  # ends an answer with EOS, and writes nothing after it
TEMPLATES = {
    "bos-template": ("bos", "{{ bos_token }}" + TURN),
    "bare-template": ("bos", TURN),
    "no-end": ("bos", TURN.replace("</s>", "")),
    "tail": ("bos", TURN.replace("</s>", "</s>\n\n")),
}


# -- helpers


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    """Paths in the tests are short, and pytest gets its signal handlers back from every Run."""
    monkeypatch.chdir(tmp_path)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory):
    """tokenizers(name), as a run loads it: bos, chat, pad-eos, or one of TEMPLATES."""
    made = {}

    def get(name: str, stop_ids: tuple[str, ...] = ()):
        if (name, stop_ids) not in made:
            kind, template = TEMPLATES.get(name, (name, None))
            tokenizer = make_tokenizer(kind)
            if template:
                tokenizer.chat_template = template
            folder = tmp_path_factory.mktemp("tokenizers") / name
            make_config("llama", tokenizer).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            if stop_ids:
                ids = tokenizer.convert_tokens_to_ids(list(stop_ids))
                GenerationConfig(eos_token_id=ids).save_pretrained(folder)
            made[name, stop_ids] = common.load_tokenizer(str(folder), max_length=100)
        return made[name, stop_ids]

    return get


def load(
    source: list[dict] | Path | str,
    tokenizer,
    kind: str = "pair",
    max_length: int = 1000,
    max_prompt_length: int = 900,
    **more,
) -> common.Rows:
    """The training rows; with fewer than 20 of them, none is held out."""
    if isinstance(source, list):
        source = write_jsonl(Path("rows.jsonl"), source)
    return common.load_rows(
        str(source), None, kind, tokenizer, max_length, max_prompt_length, **more
    )[0]


def decoded(rows: common.Rows, tokenizer) -> list[tuple[str, list[str]]]:
    decode = tokenizer.decode
    return [(decode(row.prompt), [decode(r) for r in row.responses]) for row in rows.rows]


def scored(rows: common.Rows, tokenizer) -> list[tuple[str, list[str], list[float]]]:
    pairs = zip(decoded(rows, tokenizer), scores_of(rows), strict=True)
    return [(*texts, scores) for texts, scores in pairs]


def scores_of(rows: common.Rows) -> list[list[float] | None]:
    return [None if row.scores is None else row.scores.tolist() for row in rows.rows]


def ids_of(rows: common.Rows) -> list[tuple[list[int], ...]]:
    return [tuple(part.tolist() for part in (r.prompt, *r.responses, r.ask)) for r in rows.rows]


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


def plain(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


# -- every kind of row, for a method that takes pairs

ASKED = [user("Hello"), assistant("Hi"), user("Why?")]
ASKED_TEXT = "<s>[user]Hello[assistant]Hi</s>[user]Why?[assistant]"
WHY = "<s>[user]Why?[assistant]"
TEXT_PAIR = {"prompt": "Why?", "chosen": " So.", "rejected": " No."}
RANKED = {"prompt": "Why?", "responses": [" b", " d", " a", " c"], "scores": [3, 1.5, 4, 2]}

PAIRS = {
    "texts": (TEXT_PAIR, ("<s>Why?", [" So.</s>", " No.</s>"])),
    "whole dialogues: the prompt is what they share, by messages": (
        {"chosen": [*ASKED, assistant("So.")], "rejected": [*ASKED, assistant("Some.")]},
        (ASKED_TEXT, ["So.</s>", "Some.</s>"]),  # not "[assistant]So" and "." against "me."
    ),
    "dialogues that part early: several messages are the response": (
        {
            "chosen": [user("Why?"), assistant("So."), user("And?"), assistant("Yes.")],
            "rejected": [user("Why?"), assistant("No."), user("And?"), assistant("Yes.")],
        },
        (WHY, ["So.</s>[user]And?[assistant]Yes.</s>", "No.</s>[user]And?[assistant]Yes.</s>"]),
    ),
    "a prompt of messages and one answer each": (
        {"prompt": ASKED, "chosen": [assistant("So.")], "rejected": [assistant("No.")]},
        (ASKED_TEXT, ["So.</s>", "No.</s>"]),
    ),
    "a prompt of messages and answers that begin alike": (
        {
            "prompt": [user("Why?")],
            "chosen": [assistant("Hm."), user("Well?"), assistant("So.")],
            "rejected": [assistant("Hm."), user("Well?"), assistant("No.")],
        },
        (WHY + "Hm.</s>[user]Well?[assistant]", ["So.</s>", "No.</s>"]),
    ),
    "UltraFeedback: the prompt as text beside whole dialogues": (
        {
            "prompt": "Why?",
            "chosen": [user("Why?"), assistant("So.")],
            "rejected": [user("Why?"), assistant("No.")],
            "messages": [user("Why?"), assistant("So.")],
            "score_chosen": 8.0,
        },
        (WHY, ["So.</s>", "No.</s>"]),
    ),
    "a prompt as text and answers as messages": (
        {"prompt": "Why?", "chosen": [assistant("So.")], "rejected": [assistant("No.")]},
        (WHY, ["So.</s>", "No.</s>"]),
    ),
    "ranked: the best and the worst": (RANKED, ("<s>Why?", [" a</s>", " d</s>"])),
}


@pytest.mark.parametrize("name", PAIRS)
def test_a_row_for_a_method_of_pairs(name, tokenizers):
    raw, expected = PAIRS[name]
    tokenizer = tokenizers("bare-template")
    assert decoded(load([raw], tokenizer), tokenizer) == [expected]


DEMONSTRATIONS = {
    "prompt and completion": (
        {"prompt": "Why?", "completion": " So."},
        [("<s>Why?", [" So.</s>"])],
    ),
    "prompt and completion as messages": (
        {"prompt": ASKED, "completion": [assistant("So.")]},
        [(ASKED_TEXT, ["So.</s>"])],
    ),
    "messages: the last answer": (
        {"messages": [*ASKED, assistant("So.")]},
        [(ASKED_TEXT, ["So.</s>"])],
    ),
    "text: all of it": ({"text": "Why? So."}, [("<s>", ["Why? So.</s>"])]),
    "labelled true": (
        {"prompt": "Why?", "completion": " So.", "label": True},
        [("<s>Why?", [" So.</s>"])],
    ),
    "labelled false: not one to copy": (
        {"prompt": "Why?", "completion": " No.", "label": False},
        [],
    ),
    "a pair's chosen answer": (TEXT_PAIR, [("<s>Why?", [" So.</s>"])]),
    "a ranked list's best answer": (RANKED, [("<s>Why?", [" a</s>"])]),
    "the first of equally good answers": (
        RANKED | {"scores": [4, 1, 4, 4]},
        [("<s>Why?", [" b</s>"])],
    ),
}


@pytest.mark.parametrize("name", DEMONSTRATIONS)
def test_a_row_for_a_method_of_demonstrations(name, tokenizers):
    raw, expected = DEMONSTRATIONS[name]
    tokenizer = tokenizers("bare-template")
    other = raw | ({"label": True} if "label" in raw else {})  # so that one row is left
    rows = load([raw, other], tokenizer, "demonstration")
    if not expected:
        assert len(rows) == 1
    else:
        assert decoded(rows, tokenizer) == expected * 2


@pytest.mark.parametrize(
    "pairs, responses, scores, expected",
    [
        ("best-worst", "abcd", [4, 3, 2, 1], ["ad"]),
        ("adjacent", "abcd", [4, 3, 2, 1], ["ab", "bc", "cd"]),
        ("all", "abcd", [4, 3, 2, 1], ["ab", "ac", "ad", "bc", "bd", "cd"]),
        # Of equally good answers none was preferred.
        ("best-worst", "abcd", [1, 1, 0, 0], ["ad"]),
        ("adjacent", "abcd", [1, 1, 0, 0], ["bc"]),
        ("all", "abcd", [1, 1, 0, 0], ["ac", "ad", "bc", "bd"]),
        # A text that was given twice counts once, with its best score.
        ("best-worst", "abca", [4, 3, 2, 1], ["ac"]),
        ("adjacent", "abca", [1, 3, 2, 4], ["ab", "bc"]),
        ("all", "abba", [4, 3, 2, 1], ["ab"]),
        # The order in the file does not matter where scores tell answers apart.
        ("adjacent", "dbca", [1, 3, 2, 4], ["ab", "bc", "cd"]),
        ("all", "ab", [-2.5, -1], ["ba"]),
    ],
)
def test_ranked_lists_become_pairs(pairs, responses, scores, expected, tokenizers):
    tokenizer = tokenizers("bos")
    raw = {"prompt": "Why?", "responses": [" " + r for r in responses], "scores": scores}
    rows = load([raw], tokenizer, pairs=pairs)
    made = ["".join(r.removesuffix("</s>").strip() for r in k) for _, k in decoded(rows, tokenizer)]
    assert made == expected


@pytest.mark.parametrize("pairs", ["best-worst", "adjacent", "all"])
def test_a_ranked_list_of_equals_is_left_out_and_counted(pairs, tokenizers, capsys):
    same_text = RANKED | {"responses": [" a"] * 4}
    same_score = RANKED | {"scores": [2, 2, 2, 2]}
    single = RANKED | {"responses": [" a"], "scores": [1]}
    rows = load([same_text, same_score, single, RANKED], tokenizers("bos"), pairs=pairs)
    assert len(rows) == {"best-worst": 1, "adjacent": 3, "all": 6}[pairs]
    printed = capsys.readouterr().out
    assert f"4 ranked rows -> {len(rows)} pairs ({pairs}); " in printed
    assert "left out: 3 all responses equal" in printed


def test_the_report_says_what_was_read_and_what_became_of_it(tokenizers, capsys):
    load([RANKED, RANKED | {"scores": [1, 1, 1, 1]}, RANKED], tokenizers("bos"))
    first, second, third, *_ = capsys.readouterr().out.splitlines()
    assert first == (
        "train      rows.jsonl: 3 ranked rows -> 2 pairs (best-worst); "
        "left out: 1 all responses equal"
    )
    # <s> W h y ? is 5 tokens; a space, a letter and </s> at most 3.
    assert second.strip() == (
        "tokens (median/95 %/max): prompt 5/5/5, response 3/3/3; 0 prompts and 0 responses cut; "
        "100.0% of responses end with EOS"
    )
    assert third.strip() == "first row: <s>Why? « a</s>» | « d</s>»"

    load([{"prompt": "Why?", "completion": " So.", "label": label} for label in (True, False)],
         tokenizers("bos"), "demonstration")  # fmt: skip
    assert "2 labelled rows -> 1 demonstrations; left out: 1 labelled false" in (
        capsys.readouterr().out
    )


# -- every kind of row, for a method that takes labels, and for one that takes lists


DIALOGUE_PAIR = {
    "chosen": [*ASKED, assistant("So.")],
    "rejected": [*ASKED, assistant("No.")],
}
RANKED_DIALOGUES = {
    "prompt": [user("Why?")],
    "responses": [[assistant(letter)] for letter in "bda"],
    "scores": [3, 1.5, 4],
}
LABELLED = {
    "desirable": (
        {"prompt": "Why?", "completion": " So.", "label": True},
        [("<s>Why?", [" So.</s>"], [1.0])],
    ),
    "undesirable": (
        {"prompt": "Why?", "completion": " No.", "label": False},
        [("<s>Why?", [" No.</s>"], [0.0])],
    ),
    "messages": (
        {"prompt": ASKED, "completion": [assistant("No.")], "label": False},
        [(ASKED_TEXT, ["No.</s>"], [0.0])],
    ),
    "a pair, taken apart": (
        TEXT_PAIR,
        [("<s>Why?", [" So.</s>"], [1.0]), ("<s>Why?", [" No.</s>"], [0.0])],
    ),
    "a pair of whole dialogues": (
        DIALOGUE_PAIR,
        [(ASKED_TEXT, ["So.</s>"], [1.0]), (ASKED_TEXT, ["No.</s>"], [0.0])],
    ),
    "a ranked list: its best and its worst": (
        RANKED,
        [("<s>Why?", [" a</s>"], [1.0]), ("<s>Why?", [" d</s>"], [0.0])],
    ),
    "the first of the best, the last of the worst": (
        RANKED | {"scores": [-4, -9, -4, -9]},
        [("<s>Why?", [" b</s>"], [1.0]), ("<s>Why?", [" c</s>"], [0.0])],
    ),
    "a ranked list of messages": (
        RANKED_DIALOGUES,
        [(WHY, ["a</s>"], [1.0]), (WHY, ["d</s>"], [0.0])],
    ),
}
LISTS = {
    "the best first": (RANKED, [("<s>Why?", [" a", " b", " c", " d"], [4.0, 3.0, 2.0, 1.5])]),
    "ties in the order of the file": (
        RANKED | {"scores": [2, -1, 2, 2]},
        [("<s>Why?", [" b", " a", " c", " d"], [2.0, 2.0, 2.0, -1.0])],
    ),
    "a text that was given twice counts once, with its best score": (
        RANKED | {"responses": [" b", " a", " c", " b"], "scores": [1, 3, 2, 4]},
        [("<s>Why?", [" b", " a", " c"], [4.0, 3.0, 2.0])],
    ),
    "two, the better one last": (
        RANKED | {"responses": [" a", " b"], "scores": [0, 0.25]},
        [("<s>Why?", [" b", " a"], [0.25, 0.0])],
    ),
    "messages": (RANKED_DIALOGUES, [(WHY, ["a", "b", "d"], [4.0, 3.0, 1.5])]),
    "a pair": (TEXT_PAIR, [("<s>Why?", [" So.", " No."], [1.0, 0.0])]),
    "a pair of whole dialogues": (
        DIALOGUE_PAIR,
        [(ASKED_TEXT, ["So.", "No."], [1.0, 0.0])],
    ),
}


@pytest.mark.parametrize("name", LABELLED)
def test_a_row_for_a_method_of_labels(name, tokenizers):
    raw, expected = LABELLED[name]
    tokenizer = tokenizers("bare-template")
    rows = load([raw], tokenizer, "labelled")
    assert scored(rows, tokenizer) == expected
    assert all(row.scores.dtype == np.float64 for row in rows.rows)


@pytest.mark.parametrize("name", LISTS)
def test_a_row_for_a_method_of_lists(name, tokenizers):
    raw, expected = LISTS[name]
    tokenizer = tokenizers("bare-template")
    rows = load([raw], tokenizer, "ranked")
    ended = [(prompt, [f"{r}</s>" for r in said], scores) for prompt, said, scores in expected]
    assert scored(rows, tokenizer) == ended
    assert all(row.scores.dtype == np.float64 for row in rows.rows)


@pytest.mark.parametrize(
    "kind, raw, expected",
    [
        (
            "labelled",
            {"prompt": [user("Why?")], "completion": [assistant("at")], "label": True},
            [(["at<|im_end|>"], [1.0])],
        ),
        ("labelled", RANKED_DIALOGUES, [(["a<|im_end|>"], [1.0]), (["d<|im_end|>"], [0.0])]),
        (
            "ranked",
            RANKED_DIALOGUES,
            [(["a<|im_end|>", "b<|im_end|>", "d<|im_end|>"], [4.0, 3.0, 1.5])],
        ),
    ],
)
def test_a_template_ends_every_answer_once(kind, raw, expected, tokenizers):
    tokenizer = tokenizers("chat")
    prompt = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    assert scored(load([raw], tokenizer, kind), tokenizer) == [(prompt, *x) for x in expected]


def test_methods_of_pairs_and_demonstrations_get_no_scores(tokenizers):
    for kind in ("pair", "demonstration"):
        assert scores_of(load([RANKED, RANKED], tokenizers("bos"), kind)) == [None, None]


DEMONSTRATION = {"prompt": "Why?", "completion": " So."}
LABEL_COLUMNS = "needed are labelled rows (prompt, completion, label), pairs or ranked ones"
LIST_COLUMNS = "needed are ranked rows (prompt, responses, scores) or pairs"
REFUSED = {
    "demonstrations have no label": (
        "labelled", DEMONSTRATION, f"holds demonstration rows; {LABEL_COLUMNS}"
    ),
    "nor have messages": (
        "labelled",
        {"messages": [*ASKED, assistant("So.")]},
        f"holds messages rows; {LABEL_COLUMNS}",
    ),
    "nor has a text": ("labelled", {"text": "So."}, f"holds text rows; {LABEL_COLUMNS}"),
    "labels are no list": (
        "ranked", DEMONSTRATION | {"label": True}, f"holds labelled rows; {LIST_COLUMNS}"
    ),
    "nor are demonstrations": (
        "ranked", DEMONSTRATION, f"holds demonstration rows; {LIST_COLUMNS}"
    ),
    "nor a pair": (
        "pair",
        DEMONSTRATION | {"label": True},
        "holds labelled rows; needed are pair rows (chosen, rejected) or ranked ones",
    ),
    "a label in numbers": (
        "labelled", DEMONSTRATION | {"label": 1}, "'label' must be true or false, this is 1"
    ),
    "a label in words": (
        "labelled",
        DEMONSTRATION | {"label": "false"},
        "'label' must be true or false, this is 'false'",
    ),
    "no label": ("labelled", DEMONSTRATION | {"label": None}, "no 'label'"),
    "an empty completion": (
        "labelled", {"prompt": "Why?", "completion": " ", "label": True}, "'completion' is empty"
    ),
    "a pair of equals, as labels": (
        "labelled", TEXT_PAIR | {"rejected": " So."}, "'chosen' and 'rejected' are the same"
    ),
    "a pair of equals, as a list": (
        "ranked", TEXT_PAIR | {"rejected": " So."}, "'chosen' and 'rejected' are the same"
    ),
    "a score too few": ("ranked", RANKED | {"scores": [1, 2]}, "4 responses but 2 scores"),
    "a score of true": (
        "labelled",
        RANKED | {"scores": [1, 2, 3, True]},
        "a score must be a finite number, this is True",
    ),
    "a score without end": (
        "ranked",
        RANKED | {"scores": [1, 2, 3, float("inf")]},
        "a score must be a finite number, this is inf",
    ),
    "an empty answer in a list": (
        "ranked", RANKED | {"responses": [" a", " ", " b", " c"]}, "'responses' is empty"
    ),
    "texts and messages in a list": (
        "ranked",
        RANKED | {"responses": [" a", [assistant("b")], " c", " d"]},
        "prompt and responses must all be texts or all be lists of messages",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_labels_and_lists_cannot_be_made_of(name, tokenizers):
    kind, raw, reason = REFUSED[name]
    with pytest.raises(common.UserError) as error:
        load([raw], tokenizers("bos"), kind)
    assert str(error.value).endswith(f"\n  rows.jsonl:1: {reason}")


@pytest.mark.parametrize("score", [10**25, 10**400], ids=["26 digits", "401 digits"])
def test_a_score_beyond_64_bits_is_a_number_or_a_bad_row(score, tokenizers):
    """JSON has integers of any length; none of them may end in a traceback."""
    raw = RANKED | {"scores": [score, 1, 2, 3]}
    try:
        rows = load([raw], tokenizers("bos"), "ranked")
    except common.UserError as error:
        assert "a score must be a finite number" in str(error)
    else:
        assert scores_of(rows) == [[1e25, 3.0, 2.0, 1.0]]


@pytest.mark.parametrize(
    "kind, read", [("labelled", "-> 2 labelled responses (best and worst), 1 of them desirable"),
                   ("ranked", ", of 4 responses")],
)  # fmt: skip
def test_lists_in_which_all_are_equal_are_left_out_and_counted(kind, read, tokenizers, capsys):
    same_text = RANKED | {"responses": [" a"] * 4}
    same_score = RANKED | {"scores": [2, 2, 2, 2]}
    single = RANKED | {"responses": [" a"], "scores": [1]}
    rows = load([same_text, same_score, single, RANKED], tokenizers("bos"), kind)
    assert len(rows) == {"labelled": 2, "ranked": 1}[kind]
    told = capsys.readouterr().out.splitlines()[0]
    assert read in told and told.startswith("train      rows.jsonl: 4 ranked rows")
    assert told.endswith("; left out: 3 all responses equal")


@pytest.mark.parametrize(
    "kind, raws, told",
    [
        ("labelled", ["yes", "no", "no"], "3 labelled rows, 1 of them desirable"),
        ("labelled", [TEXT_PAIR] * 3, "3 pair rows -> 6 labelled responses, 3 of them desirable"),
        (
            "labelled",
            [RANKED] * 3,
            "3 ranked rows -> 6 labelled responses (best and worst), 3 of them desirable",
        ),
        ("ranked", [TEXT_PAIR] * 3, "3 pair rows -> 3 ranked lists, of 2 responses"),
        ("ranked", [RANKED], "1 ranked rows, of 4 responses"),
        ("ranked", [2, 4, 3], "3 ranked rows, of 2 to 4 responses"),
        ("ranked", [4, 3, 4], "3 ranked rows, of 3 to 4 responses"),
    ],
)
def test_the_report_says_how_many_are_desirable_or_how_long_the_lists_are(
    kind, raws, told, tokenizers, capsys
):
    made = []
    for raw in raws:
        if isinstance(raw, str):
            raw = DEMONSTRATION | {"label": raw == "yes"}
        if isinstance(raw, int):
            raw = RANKED | {"responses": RANKED["responses"][:raw], "scores": [9, 8, 7, 6][:raw]}
        made.append(raw)
    load(made, tokenizers("bos"), kind)
    first = capsys.readouterr().out.splitlines()[0]
    assert first == f"train      rows.jsonl: {told}; left out: none"


# -- a third response: what slic.py is regularised with


@pytest.mark.parametrize(
    "pairs, expected", [("best-worst", ["ad"]), ("adjacent", ["ab", "bc", "cd"]),
                        ("all", ["ab", "ac", "ad", "bc", "bd", "cd"])],
)  # fmt: skip
def test_every_pair_of_a_list_has_the_target(pairs, expected, tokenizers):
    tokenizer = tokenizers("bos")
    rows = load([RANKED | {"target": " b"}], tokenizer, pairs=pairs, targets=True)
    assert decoded(rows, tokenizer) == [
        ("<s>Why?", [f" {better}</s>", f" {worse}</s>", " b</s>"]) for better, worse in expected
    ]


def test_a_target_stands_behind_the_pair(tokenizers):
    tokenizer = tokenizers("bare-template")
    texts = TEXT_PAIR | {"target": " Yes."}
    assert decoded(load([texts], tokenizer, targets=True), tokenizer) == [
        ("<s>Why?", [" So.</s>", " No.</s>", " Yes.</s>"])
    ]
    assert decoded(load([texts], tokenizer), tokenizer) == [("<s>Why?", [" So.</s>", " No.</s>"])]
    own = TEXT_PAIR | {"target": " So."}  # the chosen answer may be the target
    assert len(load([own], tokenizer, targets=True).rows[0].responses) == 3
    answer = DIALOGUE_PAIR | {"target": [assistant("Yes.")]}
    expected = [(ASKED_TEXT, ["So.</s>", "No.</s>", "Yes.</s>"])]
    assert decoded(load([answer], tokenizer, targets=True), tokenizer) == expected


def test_a_target_of_a_ranked_list_may_be_a_whole_dialogue(tokenizers):
    tokenizer = tokenizers("bare-template")
    ranked = {"prompt": ASKED, "responses": [[assistant("b")], [assistant("c")]], "scores": [2, 1]}
    answer, whole = ([*opening, assistant("Yes.")] for opening in ([], ASKED))
    rows = [load([ranked | {"target": t}], tokenizer, targets=True) for t in (answer, whole)]
    assert decoded(rows[0], tokenizer) == decoded(rows[1], tokenizer)
    assert len(rows[0].rows[0].responses) == 3


def test_a_target_may_be_a_whole_dialogue_as_the_pair_is(tokenizers):
    """Written behind the prompt once more, it would move the end of the prompt for all three."""
    tokenizer = tokenizers("bare-template")
    raw = DIALOGUE_PAIR | {"target": [*ASKED, assistant("Yes.")]}
    expected = [(ASKED_TEXT, ["So.</s>", "No.</s>", "Yes.</s>"])]
    assert decoded(load([raw], tokenizer, targets=True), tokenizer) == expected


@pytest.mark.parametrize(
    "raw, reason",
    [
        (TEXT_PAIR, "no 'target'"),
        (TEXT_PAIR | {"target": None}, "no 'target'"),
        (RANKED, "no 'target'"),
        (TEXT_PAIR | {"target": " "}, "'target' is empty"),
        (TEXT_PAIR | {"target": 3}, "'target' must be a text or a list of messages with"),
        (TEXT_PAIR | {"target": [user("Why?")]}, "'target' must end with an assistant message"),
        (TEXT_PAIR | {"target": [assistant("Yes.")]}, "prompt and responses must all be texts or"),
        (
            DIALOGUE_PAIR | {"target": [user("Another?"), assistant("Yes.")]},
            "'target' does not go on from the prompt",
        ),
    ],
)
def test_a_target_that_is_not_there_or_not_of_a_kind(raw, reason, tokenizers):
    good = TEXT_PAIR | {"target": " Yes."} if "chosen" in raw else RANKED | {"target": " Yes."}
    with pytest.raises(common.UserError) as error:
        load([good, raw], tokenizers("bare-template"), targets=True)
    told = str(error.value).splitlines()
    assert told[0].startswith("1 of 2 rows of rows.jsonl cannot be used")
    assert told[1].startswith(f"  rows.jsonl:2: {reason}")
    rows = load([good, raw], tokenizers("bare-template"), targets=True, skip_bad_rows=True)
    assert len(rows) == 1


# -- every kind of file


def write(rows: list[dict], path: Path) -> Path:
    if path.suffix == ".jsonl":
        write_jsonl(path, rows)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    elif path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        with open(path, "w", newline="", encoding="utf-8") as f:
            writer = csv.DictWriter(f, rows[0])
            writer.writeheader()
            for row in rows:
                as_cell = {k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()}
                writer.writerow(as_cell)
    return path


FILE_ROWS = {
    "pair": (pair_rows(5), "pair"),
    "odd texts": (
        [{"prompt": 'a "b",\nc\tä 漢\u2028', "chosen": " 'x', \r\n y", "rejected": " {}[]"}] * 2,
        "pair",
    ),
    "ranked": ([RANKED, RANKED | {"prompt": "And?"}], "pair"),
    "labelled": (
        [
            {"prompt": "Why?", "completion": " So.", "label": True},
            {"prompt": "Why?", "completion": " No.", "label": False},
        ],
        "demonstration",
    ),
    "labels": (
        [
            {"prompt": "Why?", "completion": " So.", "label": True},
            {"prompt": "Why?", "completion": " No.", "label": False},
        ],
        "labelled",
    ),
    "lists": ([RANKED, RANKED | {"scores": [1, 2, 0.125, -3]}], "ranked"),
    "lists as labels": ([RANKED, RANKED | {"prompt": "And?"}], "labelled"),
    "pairs as lists": (pair_rows(3), "ranked"),
    "messages": ([{"messages": [*ASKED, assistant("So.")]}] * 2, "demonstration"),
    "dialogue pairs": (
        [{"chosen": [*ASKED, assistant("So.")], "rejected": [*ASKED, assistant("No.")]}],
        "pair",
    ),
    "text": ([{"text": "Why? So."}, {"text": "x, y"}], "demonstration"),
}


@pytest.mark.parametrize(
    "suffix, name",
    [
        (suffix, name)
        for suffix in (".json", ".parquet", ".csv")
        for name in FILE_ROWS
        if (suffix, name) != (".csv", "dialogue pairs")  # there, 'chosen' is a text
    ],
)
def test_each_kind_of_file_gives_the_same_rows(suffix, name, tokenizers):
    raw, kind = FILE_ROWS[name]
    tokenizer = tokenizers("chat")
    expected = load(write(raw, Path("rows.jsonl")), tokenizer, kind)
    assert len(expected)
    found = load(write(raw, Path(f"other{suffix}")), tokenizer, kind)
    assert ids_of(found) == ids_of(expected)
    assert scores_of(found) == scores_of(expected)


@pytest.mark.parametrize("suffix", [".json", ".parquet", ".csv"])
def test_targets_of_each_kind_of_file(suffix, tokenizers):
    tokenizer = tokenizers("bos")
    file = write([TEXT_PAIR | {"target": " Yes."}] * 2, Path(f"rows{suffix}"))
    expected = ("<s>Why?", [" So.</s>", " No.</s>", " Yes.</s>"])
    assert decoded(load(file, tokenizer, targets=True), tokenizer) == [expected] * 2
    without = write([TEXT_PAIR | {"target": ""}], Path(f"without{suffix}"))
    with pytest.raises(common.UserError, match="'target' is empty"):
        load(without, tokenizer, targets=True)


@pytest.mark.parametrize("cell, label", [("TRUE", 1.0), ("1", 1.0), ("False", 0.0), ("0", 0.0)])
def test_labels_of_a_csv(cell, label, tokenizers):
    Path("rows.csv").write_text(f"prompt,completion,label\nWhy?, So.,{cell}\n")
    assert scores_of(load(Path("rows.csv"), tokenizers("bos"), "labelled")) == [[label]]
    Path("rows.csv").write_text("prompt,completion,label\nWhy?, So.,good\n")
    with pytest.raises(common.UserError, match="rows.csv:2: no 'label'"):
        load(Path("rows.csv"), tokenizers("bos"), "labelled")


def test_a_folder_is_read_file_by_file_in_the_order_of_their_names(tokenizers):
    tokenizer, rows = tokenizers("bos"), pair_rows(8)
    folder = Path("folder")
    folder.mkdir()
    for name, part in {
        "b.json": rows[2:4], "a.jsonl": rows[:2], "c.parquet": rows[4:6], "d.csv": rows[6:],
    }.items():  # fmt: skip
        write(part, folder / name)
    (folder / "README.md").write_text("not rows")
    assert ids_of(load(folder, tokenizer)) == ids_of(load(rows, tokenizer))


def test_json_lines_may_have_blank_lines_and_another_name(tokenizers):
    tokenizer, rows = tokenizers("bos"), pair_rows(3)
    text = "\r\n\n".join(json.dumps(row) for row in rows)
    for name in ("a.jsonl", "a.json"):
        Path(name).write_bytes(text.encode())
        assert ids_of(load(Path(name), tokenizer)) == ids_of(load(rows, tokenizer))


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
def test_a_byte_order_mark_is_not_part_of_the_first_row(suffix, tokenizers):
    """Windows programs write one."""
    tokenizer, rows = tokenizers("bos"), pair_rows(3)
    path = write(rows, Path(f"rows{suffix}"))
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert ids_of(load(path, tokenizer)) == ids_of(load(rows, tokenizer))


# -- the end of the prompt


def test_prompt_and_responses_are_joined_as_ids(tokenizers):
    """'the c' + 'at' does not become 'the' + ' cat': both responses have the very same prompt."""
    tokenizer = tokenizers("bos")
    prompt, chosen, rejected = "the c", "at sat", "ar"
    apart = plain(tokenizer, prompt) + plain(tokenizer, chosen)
    assert plain(tokenizer, prompt + chosen) != apart, "the texts must merge, or nothing is tested"
    rows = load([{"prompt": prompt, "chosen": chosen, "rejected": rejected}], tokenizer)
    (row,) = rows.rows
    assert row.prompt.tolist() == tokenizer.bos + plain(tokenizer, prompt)
    assert row.responses[0].tolist() == plain(tokenizer, chosen) + [tokenizer.eos_token_id]
    assert row.responses[1].tolist() == plain(tokenizer, rejected) + [tokenizer.eos_token_id]
    micro = common.collate(rows, [0], CPU)
    n = len(row.prompt)
    assert micro.input_ids[0, :n].tolist() == micro.input_ids[1, :n].tolist() == row.prompt.tolist()


def test_a_template_is_split_where_generation_would_begin(tokenizers):
    tokenizer = tokenizers("chat")
    raw = {"chosen": [user("Why?"), assistant("at")], "rejected": [user("Why?"), assistant("ar")]}
    assert decoded(load([raw], tokenizer), tokenizer) == [
        (
            "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n",
            ["at<|im_end|>", "ar<|im_end|>"],
        )
    ]


def test_a_sample_is_asked_with_the_prompt(tokenizers):
    tokenizer = tokenizers("bos")
    (row,) = load([TEXT_PAIR], tokenizer).rows
    assert row.ask.tolist() == row.prompt.tolist()


# -- BOS


MESSAGE_PAIR = {
    "chosen": [user("Why?"), assistant("So.")],
    "rejected": [user("Why?"), assistant("No.")],
}


@pytest.mark.parametrize(
    "name, raw",
    [
        ("bos", TEXT_PAIR),
        ("bos", TEXT_PAIR | {"prompt": "<s>Why?"}),  # written out in the text
        ("bos", TEXT_PAIR | {"prompt": "<s><s>Why?"}),
        ("bos-template", MESSAGE_PAIR),  # the template writes it, and so would the tokenizer
        ("bare-template", MESSAGE_PAIR),  # the template does not
    ],
)
def test_exactly_one_bos(name, raw, tokenizers):
    tokenizer = tokenizers(name)
    assert tokenizer.bos == [tokenizer.bos_token_id]
    for prompt_too in (False, True):
        kind = "demonstration" if prompt_too else "pair"
        (row,) = load([raw], tokenizer, kind, prompt_too=prompt_too).rows
        for response in row.responses:
            whole = [*row.prompt.tolist(), *response.tolist()]
            assert whole[0] == tokenizer.bos_token_id
            assert whole.count(tokenizer.bos_token_id) == 1
        assert row.ask.tolist().count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("name, raw", [("pad-eos", TEXT_PAIR), ("chat", MESSAGE_PAIR)])
def test_no_bos_where_the_tokenizer_does_not_begin_with_one(name, raw, tokenizers):
    """GPT-2 has a BOS, the same token as its EOS, and never begins with it. Qwen has none."""
    tokenizer = tokenizers(name)
    assert tokenizer.bos == []
    (row,) = load([raw], tokenizer).rows
    text = (
        "Why?" if name == "pad-eos" else "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert row.prompt.tolist() == plain(tokenizer, text)


def test_text_begins_with_bos_or_its_own_first_token(tokenizers):
    """The first token has nothing before it, so it is read and not learnt."""
    for name in ("bos", "pad-eos"):
        tokenizer = tokenizers(name)
        for prompt_too in (False, True):
            (row,) = load(
                [{"text": "the cat"}], tokenizer, "demonstration", prompt_too=prompt_too
            ).rows
            whole = tokenizer.bos + plain(tokenizer, "the cat") + [tokenizer.eos_token_id]
            assert row.prompt.tolist() == whole[:1]
            assert row.responses[0].tolist() == whole[1:]


# -- EOS


@pytest.mark.parametrize(
    "name, raw, ending",
    [
        ("bos", TEXT_PAIR, ".</s>"),
        ("bos", {"prompt": "Why?", "chosen": " So.</s>", "rejected": " No.</s>"}, ".</s>"),
        ("bos", {"prompt": "Why?", "chosen": " So.</s>\n", "rejected": " No.</s> "}, ".</s>"),
        ("pad-eos", TEXT_PAIR, ".<|endoftext|>"),  # padding has the same id
        ("bare-template", MESSAGE_PAIR, ".</s>"),  # the template has ended the turn already
        ("tail", MESSAGE_PAIR, ".</s>"),  # and what it writes after the end is cut
        ("no-end", MESSAGE_PAIR, ".</s>"),
        ("chat", MESSAGE_PAIR, ".<|im_end|>"),
    ],
)
def test_eos_stands_exactly_once_at_the_end(name, raw, ending, tokenizers, capsys):
    tokenizer = tokenizers(name)
    (row,) = load([raw], tokenizer).rows
    for response in row.responses:
        assert tokenizer.decode(response).endswith(ending)
        assert response[-1] == tokenizer.eos_token_id
        assert (response == tokenizer.eos_token_id).sum() == 1
    assert "100.0% of responses end with EOS" in capsys.readouterr().out


def test_any_of_the_models_own_ends_is_an_end(tokenizers):
    """Llama 3 and Gemma end a turn with another token than the one that the tokenizer calls EOS."""
    tokenizer = tokenizers("chat", ("<|endoftext|>", "<|im_end|>"))
    tokenizer.eos_token = "<|endoftext|>"
    try:
        assert tokenizer.stop_ids == set(
            tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
        )
        rows = load([MESSAGE_PAIR], tokenizer)
        assert decoded(rows, tokenizer)[0][1] == ["So.<|im_end|>", "No.<|im_end|>"]
    finally:
        tokenizer.eos_token = "<|im_end|>"


def test_eos_is_a_target_also_where_padding_has_its_id(tokenizers):
    tokenizer = tokenizers("pad-eos")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    rows = load(pair_rows(6), tokenizer)
    micro = common.collate(rows, list(range(6)), CPU)
    assert (micro.targets == tokenizer.eos_token_id).sum() == 12
    assert len(micro.targets) == micro.lengths.sum() < micro.input_ids.numel()


# -- truncation


def test_a_long_prompt_keeps_bos_and_its_end(tokenizers, capsys):
    """The end of a prompt is the question."""
    tokenizer = tokenizers("bos")
    ids = plain(tokenizer, "zyxw" * 10)
    assert len(ids) == 40
    raw = {"prompt": "zyxw" * 10, "chosen": "abc", "rejected": "de"}
    (row,) = load([raw], tokenizer, max_length=20, max_prompt_length=12).rows
    assert row.prompt.tolist() == tokenizer.bos + ids[-11:]
    assert [tokenizer.decode(r) for r in row.responses] == ["abc</s>", "de</s>"]
    assert "1 prompts and 0 responses cut; 100.0% of responses" in capsys.readouterr().out
    pad_eos = tokenizers("pad-eos")
    (row,) = load([raw], pad_eos, max_length=20, max_prompt_length=12).rows
    assert row.prompt.tolist() == plain(pad_eos, "zyxw" * 10)[-12:]


def test_a_long_response_keeps_its_start_and_has_no_eos(tokenizers, capsys):
    tokenizer = tokenizers("bos")
    raw = {"prompt": "zyxw", "chosen": "zyxw" * 10, "rejected": "zx"}
    (row,) = load([raw], tokenizer, max_length=20, max_prompt_length=12).rows
    assert row.prompt.tolist() == tokenizer.bos + plain(tokenizer, "zyxw")
    assert row.responses[0].tolist() == plain(tokenizer, "zyxw" * 10)[:15]  # 20 less <s> and zyxw
    assert tokenizer.decode(row.responses[1]) == "zx</s>"
    assert "0 prompts and 1 responses cut; 50.0% of responses end with EOS" in (
        capsys.readouterr().out
    )


def test_prompt_and_response_are_both_cut_where_both_are_too_long(tokenizers, capsys):
    tokenizer = tokenizers("bos")
    raw = {"prompt": "zyxw" * 10, "chosen": "zyxw" * 10, "rejected": "xyzw" * 10}
    (row,) = load([raw], tokenizer, max_length=20, max_prompt_length=12).rows
    assert len(row.prompt) == 12 and [len(r) for r in row.responses] == [8, 8]
    assert tokenizer.eos_token_id not in np.concatenate(row.responses)
    assert (
        "1 prompts and 2 responses cut; 0.0% of responses end with EOS" in capsys.readouterr().out
    )


def test_a_row_that_fits_is_not_cut(tokenizers, capsys):
    """--max-prompt-length is for rows that are too long as a whole."""
    tokenizer = tokenizers("bos")
    raw = {"prompt": "zyxw" * 4, "chosen": "zy", "rejected": "x"}
    (row,) = load([raw], tokenizer, max_length=20, max_prompt_length=4).rows
    assert row.length() == 20 and len(row.prompt) == 17
    assert "0 prompts and 0 responses cut" in capsys.readouterr().out


def test_responses_that_cutting_makes_equal_are_left_out_and_counted(tokenizers, capsys):
    tokenizer = tokenizers("bos")
    raw = {"prompt": "zyxw", "chosen": "zyxw" * 9 + "z", "rejected": "zyxw" * 9 + "x"}
    rows = load([raw, TEXT_PAIR, raw], tokenizer, max_length=20, max_prompt_length=12)
    assert decoded(rows, tokenizer) == [("<s>Why?", [" So.</s>", " No.</s>"])]
    assert "3 pair rows; left out: 2 equal after cutting" in capsys.readouterr().out


Z, X = "zyxw" * 9 + "z", "zyxw" * 9 + "x"  # behind <s>zyxw, 15 of 20 tokens stay of them: the same


@pytest.mark.parametrize(
    "responses, scores, kept, lost",
    [
        ([Z, X, "ab"], [3, 2, 1], [("Z", 3.0), ("ab", 1.0)], "1 responses equal after cutting"),
        ([X, "ab", Z], [1, 2, 3], [("Z", 3.0), ("ab", 2.0)], "1 responses equal after cutting"),
        ([Z, X, "ab"], [2, 1, 3], [("ab", 3.0), ("Z", 2.0)], "1 responses equal after cutting"),
        (["ab", "de", Z], [2, 2, 3], [("Z", 3.0), ("ab", 2.0), ("de", 2.0)], "none"),
        # What is left cannot be told apart: the better of the two that became one is no better.
        ([Z, X, "ab"], [2, 1, 2], [], "1 equal after cutting"),
        ([Z, X], [2, 1], [], "1 equal after cutting"),
    ],
)
def test_of_answers_that_cutting_makes_equal_the_best_stays(
    responses, scores, kept, lost, tokenizers, capsys
):
    tokenizer = tokenizers("bos")
    raw = {"prompt": "zyxw", "responses": responses, "scores": scores}
    other = {"prompt": "b", "responses": ["d", "e"], "scores": [1, 0]}  # a row that stays
    rows = load([raw, other], tokenizer, "ranked", max_length=20, max_prompt_length=12)
    *first, last = scored(rows, tokenizer)
    assert last == ("<s>b", ["d</s>", "e</s>"], [1.0, 0.0])
    cut = {"Z": "zyxw" * 3 + "zyx", "ab": "ab</s>", "de": "de</s>"}
    expected = ("<s>zyxw", [cut[name] for name, _ in kept], [score for _, score in kept])
    assert first == ([expected] if kept else [])
    left_out = capsys.readouterr().out.splitlines()[0].split("left out: ")[1]
    assert left_out == lost or (not kept and left_out.endswith(lost))


def test_an_answer_that_cutting_made_another_is_not_desirable_and_undesirable(tokenizers, capsys):
    """A pair that --max-length makes equal says nothing, whatever method it is taken apart for."""
    tokenizer = tokenizers("bos")
    pair = {"prompt": "zyxw", "chosen": Z, "rejected": X}
    rows = load([pair, TEXT_PAIR], tokenizer, "labelled", max_length=20, max_prompt_length=12)
    assert scored(rows, tokenizer) == [
        ("<s>Why?", [" So.</s>"], [1.0]),
        ("<s>Why?", [" No.</s>"], [0.0]),
    ]
    assert "left out: 1 equal after cutting" in capsys.readouterr().out


@pytest.mark.parametrize("form", ["pair", "ranked"])
def test_a_question_taken_apart_stays_one_question_when_an_answer_is_too_long(form, tokenizers):
    """Only the longer of the two has to be cut. With two prompts the answers could be on both sides
    of the hold-out, and one be taken for an answer to another prompt.
    """
    tokenizer = tokenizers("bos")
    texts = {"prompt": "zyxw" * 3, "chosen": "ab", "rejected": "zyxw" * 5}
    if form == "ranked":
        texts |= {"responses": [texts["rejected"], texts["chosen"]], "scores": [1, 2]}
    rows = load([texts], tokenizer, "labelled", max_length=20, max_prompt_length=12)
    prompts = [row.prompt.tolist() for row in rows.rows]
    assert len(prompts) == 2 and prompts[0] == prompts[1]
    assert all(row.length() <= 20 for row in rows.rows)


# -- sft.py --train-on-prompt


def test_the_prompt_can_be_learnt_too(tokenizers):
    tokenizer = tokenizers("bos")
    raw = [{"prompt": "Why?", "completion": " So."}]
    (row,) = load(raw, tokenizer, "demonstration", prompt_too=True).rows
    assert tokenizer.decode(row.prompt) == "<s>"
    assert tokenizer.decode(row.responses[0]) == "Why? So.</s>"
    assert tokenizer.decode(row.ask) == "<s>Why?"  # a sample is still asked the question

    apart = load(raw, tokenizer, "demonstration").rows[0]
    assert row.responses[0].tolist() == [*apart.prompt.tolist()[1:], *apart.responses[0].tolist()]

    no_bos = tokenizers("pad-eos")
    (row,) = load(raw, no_bos, "demonstration", prompt_too=True).rows
    assert row.prompt.tolist() == plain(no_bos, "Why?")[:1]


def test_a_long_prompt_that_is_learnt_too_leaves_room_for_its_response(tokenizers, capsys):
    """Cut as everywhere: its end stays, and the response is what the row is there for."""
    tokenizer = tokenizers("bos")
    raw = [{"prompt": "zyxw" * 10, "completion": "abc"}]
    (row,) = load(
        raw, tokenizer, "demonstration", max_length=20, max_prompt_length=12, prompt_too=True
    ).rows
    assert [*row.prompt, *row.responses[0]] == [
        *tokenizer.bos, *plain(tokenizer, "zyxw" * 10)[-11:],
        *plain(tokenizer, "abc"), tokenizer.eos_token_id,
    ]  # fmt: skip
    assert "1 prompts and 0 responses cut; 100.0% of responses end" in capsys.readouterr().out


# -- held-out rows


def both_parts(path: Path, tokenizer, kind: str = "pair", **more):
    return common.load_rows(str(path), None, kind, tokenizer, 1000, 900, **more)


def test_a_twentieth_of_the_rows_is_held_out(tokenizers, capsys):
    rows = [{**row, "prompt": f"{i} {row['prompt']}"} for i, row in enumerate(pair_rows(200))]
    train, held_out = both_parts(write_jsonl(Path("rows.jsonl"), rows), tokenizers("bos"))
    assert (len(train), len(held_out)) == (190, 10)
    assert "held out   10 of these rows" in capsys.readouterr().out


def test_rows_of_one_prompt_are_on_one_side(tokenizers):
    """Otherwise held-out rows would have been seen."""
    rows = [{**row, "prompt": f"{i // 4}?"} for i, row in enumerate(pair_rows(400))]
    train, held_out = both_parts(write_jsonl(Path("rows.jsonl"), rows), tokenizers("bos"))
    prompts = [Counter(row.prompt.tobytes() for row in part.rows) for part in (train, held_out)]
    assert not prompts[0].keys() & prompts[1].keys()
    assert set(prompts[0].values()) == set(prompts[1].values()) == {4}
    assert len(train) + len(held_out) == 400 and 0 < len(held_out) <= 20


def test_the_same_prompts_are_held_out_whatever_the_order_of_the_file(tokenizers):
    rows = [{**row, "prompt": f"{i} {row['prompt']}"} for i, row in enumerate(pair_rows(100))]
    forth = both_parts(write_jsonl(Path("a.jsonl"), rows), tokenizers("bos"))[1]
    again = both_parts(write_jsonl(Path("a.jsonl"), rows), tokenizers("bos"))[1]
    back = both_parts(write_jsonl(Path("b.jsonl"), rows[::-1]), tokenizers("bos"))[1]
    assert ids_of(forth) == ids_of(again) == ids_of(back)[::-1]
    assert len(forth) == 5


def test_at_most_512_rows_are_held_out(tokenizers):
    rows = [{"prompt": str(i), "chosen": "a", "rejected": "b"} for i in range(10_300)]
    train, held_out = both_parts(write_jsonl(Path("rows.jsonl"), rows), tokenizers("bos"))
    assert (len(train), len(held_out)) == (10_300 - 512, 512)


@pytest.mark.parametrize("prompt_too", [False, True])
def test_demonstrations_are_held_out_by_their_question_too(prompt_too, tokenizers):
    """With --train-on-prompt every row's prompt is one BOS: that is not the question."""
    rows = [{"prompt": f"{i // 2}?", "completion": f" {i}"} for i in range(200)]
    path = write_jsonl(Path("rows.jsonl"), rows)
    train, held_out = both_parts(path, tokenizers("bos"), "demonstration", prompt_too=prompt_too)
    asked = [Counter(row.ask.tobytes() for row in part.rows) for part in (train, held_out)]
    assert 0 < len(held_out) <= 10
    assert not asked[0].keys() & asked[1].keys()
    assert set(asked[1].values()) == {2}


@pytest.mark.parametrize("long", [False, True], ids=["whole", "cut"])
@pytest.mark.parametrize("form", ["pair", "ranked", "labelled"])
def test_both_answers_to_a_question_are_on_one_side(form, long, tokenizers, capsys):
    """Taken apart, or given apart: also where one answer is so long that its prompt is cut."""
    tokenizer, raws = tokenizers("bos"), []
    for i in range(100):
        prompt, better, worse = "zyxw" * 8 + f" {i}?", " ab", " de" * 12 * long + " xy"
        if form == "pair":
            raws.append({"prompt": prompt, "chosen": better, "rejected": worse})
        elif form == "ranked":
            raws.append({"prompt": prompt, "responses": [worse, better], "scores": [1, 2]})
        else:
            for text, label in ((better, True), (worse, False)):
                raws.append({"prompt": prompt, "completion": text, "label": label})
    file = write_jsonl(Path("rows.jsonl"), raws)
    train, held_out = common.load_rows(str(file), None, "labelled", tokenizer, 60, 35)
    assert ("; 0 prompts and" in capsys.readouterr().out) == (not long)
    assert len(train) + len(held_out) == 200 and 0 < len(held_out) <= 10
    # The end of a prompt, which stays, is its number.
    sides = [
        Counter(tokenizer.decode(row.prompt).split(" ")[-1] for row in part.rows)
        for part in (train, held_out)
    ]
    assert not sides[0].keys() & sides[1].keys()
    assert set(sides[0].values()) == set(sides[1].values()) == {2}


def test_texts_are_held_out_too(tokenizers):
    rows = [{"text": f"{i} cats"} for i in range(200)]
    train, held_out = both_parts(
        write_jsonl(Path("rows.jsonl"), rows), tokenizers("bos"), "demonstration"
    )
    assert (len(train), len(held_out)) == (190, 10)


def test_nothing_is_held_out_of_a_handful_or_where_other_rows_are_named(tokenizers):
    tokenizer = tokenizers("bos")
    few, many = (write_jsonl(Path(f"{n}.jsonl"), pair_rows(n)) for n in (19, 100))
    train, held_out = both_parts(few, tokenizer)
    assert (len(train), len(held_out)) == (19, 0)
    train, held_out = common.load_rows(str(many), str(few), "pair", tokenizer, 1000, 900)
    assert (len(train), len(held_out)) == (100, 19)


# -- batches


def rows_of(*rows: tuple[list[int], ...]) -> common.Rows:
    """(prompt, response, response, ...) as ids."""
    parts = [[np.array(part, np.int32) for part in row] for row in rows]
    return common.Rows("made", [common.Row(p, list(k), p) for p, *k in parts])


def test_collate_by_hand():
    """Two prompts with two responses each; padding, 0, is on the right."""
    rows = rows_of(([1, 2], [3, 4], [5]), ([6], [7], [8, 9, 10]))
    micro = common.collate(rows, [0, 1], CPU)
    assert micro.input_ids.tolist() == [[1, 2, 3, 4], [1, 2, 5, 0], [6, 7, 0, 0], [6, 8, 9, 10]]
    assert micro.targets.tolist() == [3, 4, 5, 7, 8, 9, 10]
    assert micro.picked.tolist() == [1, 2, 5, 8, 12, 13, 14]  # what stands before each of them
    assert micro.shape == (2, 2, 3)
    assert micro.slots.tolist() == [0, 1, 3, 6, 9, 10, 11]  # lines of 3
    assert micro.lengths.tolist() == [[2, 1], [1, 3]]
    assert (micro.tokens, micro.filled) == (10, 13)  # a prompt of two responses is there twice
    assert micro.segments is None and micro.positions is None
    assert micro.ref_logps is None


def test_collate_by_hand_with_a_shared_prompt():
    """The same rows, each prompt once; positions go on from the prompt's end."""
    rows = rows_of(([1, 2], [3, 4], [5]), ([6], [7], [8, 9, 10]))
    micro = common.collate(rows, [0, 1], CPU, share_prompt=True)
    assert micro.input_ids.tolist() == [[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]]
    assert micro.segments.tolist() == [[0, 0, 1, 1, 2], [0, 1, 2, 2, 2]]
    assert micro.positions.tolist() == [[0, 1, 2, 3, 2], [0, 1, 1, 2, 3]]
    assert micro.targets.tolist() == [3, 4, 5, 7, 8, 9, 10]
    assert micro.picked.tolist() == [1, 2, 1, 5, 5, 7, 8]  # the prompt's end before both
    plain = common.collate(rows, [0, 1], CPU)
    assert micro.shape == plain.shape and torch.equal(micro.slots, plain.slots)
    assert torch.equal(micro.lengths, plain.lengths)
    assert micro.tokens == micro.filled == 10
    wide = common.collate(rows, [0, 1], CPU, share_prompt=True, multiple_of=4)
    assert wide.input_ids.shape == (2, 8) and wide.filled == 10
    assert wide.segments[:, 5:].unique().tolist() == [3]  # padding: a response that is not there
    assert wide.picked.tolist() == [1, 2, 1, 8, 8, 10, 11]


def test_padding_is_never_a_target():
    """Random rows: each target is predicted from the token before it, each response is whole."""
    rng = np.random.default_rng(0)
    made = [
        tuple(rng.integers(1, 50, rng.integers(1, 9)).tolist() for _ in range(1 + 3))
        for _ in range(40)
    ]
    rows = rows_of(*made)
    for indexes in ([0], [3, 1, 2], list(range(40))):
        micro = common.collate(rows, indexes, CPU)
        flat = micro.input_ids.flatten()
        seen = (flat > 0).long()  # the rows' ids are not 0, padding is
        assert torch.equal(flat[micro.picked + 1], micro.targets)
        assert (seen[micro.picked] == 1).all() and (seen[micro.picked + 1] == 1).all()
        assert len(micro.picked.unique()) == len(micro.picked) == micro.lengths.sum()
        batch, many, longest = micro.shape
        table = torch.zeros(batch * many * longest, dtype=torch.int64)
        table[micro.slots] = micro.targets
        for line, i in zip(table.view(batch, many, longest), indexes, strict=True):
            for slots, response in zip(line, made[i][1:], strict=True):
                assert slots[slots > 0].tolist() == response
        assert (
            micro.filled
            == seen.sum()
            == sum(len(made[i][0]) + len(response) for i in indexes for response in made[i][1:])
        )
        assert micro.tokens == sum(len(part) for i in indexes for part in made[i])
        # Behind one prompt: the same targets in the same slots, nothing but the rows' own tokens.
        shared = common.collate(rows, indexes, CPU, share_prompt=True)
        assert torch.equal(shared.targets, micro.targets) and torch.equal(shared.slots, micro.slots)
        here = shared.input_ids.flatten()
        assert shared.filled == shared.tokens == micro.tokens == (here > 0).sum()
        assert torch.equal(here[shared.picked], flat[micro.picked])


def test_rows_may_have_different_numbers_of_responses():
    """An absent response is a line of padding without a target."""
    rows = rows_of(([1, 2], [3], [4, 5], [6]), ([7], [8, 9]), ([1], [2], [3]))
    rows.ref_logps = torch.tensor(
        [[-1.0, -2.0, -3.0], [-4.0, torch.nan, torch.nan], [-5.0, -6.0, torch.nan]],
        dtype=torch.float64,
    )
    micro = common.collate(rows, [1, 0], CPU)
    assert micro.shape == (2, 3, 2)
    assert micro.lengths.tolist() == [[2, 0, 0], [1, 2, 1]]
    assert micro.targets.tolist() == [8, 9, 3, 4, 5, 6]
    assert torch.equal(micro.input_ids.flatten()[micro.picked + 1], micro.targets)
    assert micro.ref_logps.shape == micro.lengths.shape
    assert micro.ref_logps[:, 0].tolist() == [-4.0, -1.0]
    # The shape is this micro-batch's, also where another row of the data set has more responses.
    narrow = common.collate(rows, [1, 2], CPU)
    assert narrow.ref_logps.shape == narrow.lengths.shape == (2, 2)


def test_scores_stand_where_their_responses_do():
    """NaN where there is no such response, or no scores at all."""
    rows = rows_of(([1, 2], [3], [4, 5], [6]), ([7], [8, 9]), ([1], [2], [3]), ([1], [2]))
    for row, scores in zip(rows.rows, ([3.5, 2.0, -1.0], [0.0], [1e300, 0.0], None), strict=True):
        row.scores = None if scores is None else np.array(scores)
    micro = common.collate(rows, [1, 0, 3, 2], CPU)
    expected = [[0.0, None, None], [3.5, 2.0, -1.0], [None] * 3, [1e300, 0.0, None]]
    assert micro.scores.dtype == torch.float64 and micro.scores.shape == micro.lengths.shape
    found = [[None if x != x else x for x in line] for line in micro.scores.tolist()]
    assert found == expected
    shared = common.collate(rows, [1, 0, 3, 2], CPU, share_prompt=True)
    assert torch.equal(shared.scores.nan_to_num(9.0), micro.scores.nan_to_num(9.0))
    # The shape is this micro-batch's, also where another row of the data set has a longer list.
    narrow = common.collate(rows, [2, 1], CPU).scores
    assert narrow.shape == (2, 2) and narrow[0].tolist() == [1e300, 0.0]


def test_the_digest_knows_scores_and_their_places():
    def digest(*scores: list[float] | None) -> str:
        rows = rows_of(([1, 2], [3], [4]), ([7], [8], [9]))
        for row, of in zip(rows.rows, scores, strict=True):
            row.scores = None if of is None else np.array(of)
        return rows.digest()

    lists = [
        (None, None), ([1.0, 0.0], [1.0, 0.0]), ([1.0, 0.0], [1.0, 0.5]), ([0.0, 1.0], [1.0, 0.0]),
        ([1.0, 0.0], [0.0, 1.0]), ([1.0, 0.0], None), (None, [1.0, 0.0]),
        ([1.0, 0.0], [1.0, 1e-300]),
    ]  # fmt: skip
    digests = [digest(*scores) for scores in lists]
    assert len(set(digests)) == len(lists)
    assert digests == [digest(*scores) for scores in lists]


def test_micro_batches_hold_every_row_once_longest_together():
    lengths = [5, 9, 2, 9, 7, 1, 5]
    assert common.micro_batches(lengths, list(range(7)), 3) == [[1, 3, 4], [0, 6, 2], [5]]
    # Ties keep the order given, so the deal is a function of the order of rows alone.
    assert common.micro_batches(lengths, [6, 3, 0, 1], 2) == [[3, 1], [6, 0]]
    assert common.micro_batches(lengths, [], 2) == []


# -- which rows, when


def a_run(rows: common.Rows, seed: int = 0, world: int = 1, rank: int = 0, **flags) -> common.Run:
    values = {"batch_size": 8, "micro_batch_size": 2, "epochs": 3.0, "seed": seed}
    args = dpo.Args(output_dir="out", **(values | flags))
    run = common.Run(args, {"micro_batch_size": "command line"}, {}, Path(dpo.__file__))
    run.rank, run.world = rank, world
    run.plan(rows)
    return run


@pytest.fixture(scope="session")
def thirty() -> common.Rows:
    rng = np.random.default_rng(1)
    lengths = [(rng.integers(1, 20), rng.integers(1, 20)) for _ in range(30)]
    return rows_of(*(([i, i], [i] * a, [i] * b) for i, (a, b) in enumerate(lengths, 1)))


def flat(micros: list[list[int]]) -> list[int]:
    return [i for micro in micros for i in micro]


def test_every_row_is_learnt_from_once_an_epoch_and_a_last_short_batch_is_dropped(thirty):
    run = a_run(thirty)
    assert (run.steps_per_epoch, run.total_steps) == (3, 9)  # 30 rows, batches of 8
    for epoch in range(3):
        steps = [flat(run.step_rows(3 * epoch + at)) for at in range(3)]
        assert [len(step) for step in steps] == [8, 8, 8]
        assert len(set(sum(steps, []))) == 24
    whole = a_run(thirty, batch_size=10)
    assert sorted(sum((flat(whole.step_rows(at)) for at in range(3)), [])) == list(range(30))


def test_epochs_differ_in_order_and_in_what_they_drop(thirty):
    run = a_run(thirty)
    epochs = [[sorted(flat(run.step_rows(3 * e + at))) for at in range(3)] for e in range(3)]
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    dropped = [set(range(30)) - set(sum(epoch, [])) for epoch in epochs]
    assert len({frozenset(d) for d in dropped}) > 1


def test_the_order_is_a_function_of_seed_epoch_and_step_alone(thirty):
    run, other = a_run(thirty), a_run(thirty, seed=1)
    forth = [run.step_rows(step) for step in range(9)]
    torch.manual_seed(5)
    np.random.seed(5)
    again = a_run(thirty)
    back = [again.step_rows(step) for step in reversed(range(9))][::-1]
    assert forth == back
    assert forth != [other.step_rows(step) for step in range(9)]
    # Nor does it depend on how far the run goes.
    longer = a_run(thirty, epochs=5.0)
    assert [longer.step_rows(step) for step in range(9)] == forth


@pytest.mark.parametrize("world, micro", [(1, 8), (1, 1), (2, 4), (2, 1), (4, 2), (8, 1)])
def test_any_deal_has_the_same_rows_in_a_step(world, micro, thirty):
    one, dealt = a_run(thirty), a_run(thirty, world=world, micro_batch_size=micro)
    for step in range(9):
        micros = dealt.step_rows(step)
        assert sorted(flat(micros)) == sorted(flat(one.step_rows(step)))
        assert {len(m) for m in micros} == {micro}
        each = [micros[rank::world] for rank in range(world)]
        assert {len(part) for part in each} == {8 // (world * micro)}  # nobody waits for nobody
        rounds = [micros[at : at + world] for at in range(0, len(micros), world)]
        longest = [[max(dealt.lengths[i] for i in m) for m in part] for part in rounds]
        for at, part in enumerate(longest):  # to and fro
            assert part == sorted(part, reverse=at % 2 == 0)
        # Longest together: no round holds a row longer than the round before.
        for before, after in zip(rounds, rounds[1:]):  # noqa: B905 (one shorter by design)
            least = min(dealt.lengths[i] for i in flat(before))
            assert least >= max(dealt.lengths[i] for i in flat(after))


def test_processes_get_like_amounts_of_work(thirty):
    """Tokens of the busiest process over the mean: less than if the longest always went first."""
    run = a_run(thirty, world=2, micro_batch_size=1)
    there = run.step_rows(0)

    def busiest(micros):
        work = [sum(run.lengths[i] for i in flat(micros[rank::2])) for rank in range(2)]
        return max(work) / (sum(work) / 2)

    in_order = common.micro_batches(run.lengths, sorted(flat(there)), 1)
    assert busiest(there) < busiest(in_order)
    assert busiest(there) < 1.1


def lines(micro: common.Micro) -> list[tuple[int, ...]]:
    """What each sequence of a micro-batch holds, padding left off."""
    return [tuple(ids[ids > 0].tolist()) for ids in micro.input_ids]  # padding is 0


class PlainPolicy:
    """What a batch is laid out for: here, a sequence a response."""

    share_prompt, device = False, CPU
    config = SimpleNamespace(_attn_implementation="sdpa", hidden_size=8)


def through(run: common.Run, rows: common.Rows, start: int = 0) -> list[tuple]:
    """Per step: its number, its counts, and what this process got."""
    run.step, run.policy, seen = start, PlainPolicy(), []
    for batch in run.batches(rows):
        got = [line for micro in batch for line in lines(micro)]
        seen.append((batch.step, batch.prompts, batch.response_tokens, got))
        run.step += 1
    return seen


def test_processes_share_the_very_batches_of_one_process(thirty):
    alone = through(a_run(thirty), thirty)
    shared = [through(a_run(thirty, world=4, rank=rank), thirty) for rank in range(4)]
    assert len(alone) == 9
    for step, (number, prompts, tokens, got) in enumerate(alone):
        assert (number, prompts, len(got)) == (step, 8, 16)
        # Counts are of the whole step on every process: a loss is divided by them.
        assert {s[step][:3] for s in shared} == {(number, prompts, tokens)}
        assert sorted(sum((s[step][3] for s in shared), [])) == sorted(got)
        assert tokens == sum(len(line) - 2 for line in got)  # prompts here are 2 tokens


def test_the_mean_length_is_that_of_first_responses_by_hand():
    rows = rows_of(([1], [2] * 5, [3] * 50), ([1], [2] * 2), ([1], [2] * 4, [3]))
    assert common.mean_length(rows.rows) == 11 / 3
    assert common.mean_length(rows.rows[1:2]) == 2
    assert common.mean_length([]) == 0


@pytest.mark.parametrize("world, micro", [(1, 8), (1, 1), (2, 4), (2, 1), (4, 2)])
def test_every_micro_batch_knows_the_mean_length_of_the_whole_step(world, micro, thirty):
    """Of one, it would weigh a token by what happens to stand beside it."""
    means = []
    for rank in range(world):
        run = a_run(thirty, world=world, rank=rank, micro_batch_size=micro)
        run.step, run.policy, mine = 0, PlainPolicy(), []
        for batch in run.batches(thirty):
            mine.append({m.mean_length for m in batch})
            run.step += 1
        means.append(mine)
    run = a_run(thirty)
    first = [len(row.responses[0]) for row in thirty.rows]
    expected = [{sum(first[i] for i in flat(run.step_rows(step))) / 8} for step in range(9)]
    assert means == [expected] * world
    assert len(set.union(*expected)) > 1


@pytest.mark.parametrize("world", [1, 2])
def test_held_out_rows_know_the_mean_length_of_them_all(world, thirty, monkeypatch):
    monkeypatch.setattr(common, "beside", lambda name: None)  # no samples, no memory plan
    monkeypatch.setattr(common.dist, "all_reduce", lambda *_: None)  # processes in turn
    monkeypatch.setattr(common, "from_main", lambda make: make())
    held_out = common.Rows("held out", thirty.rows[:7])
    expected = sum(len(row.responses[0]) for row in held_out.rows) / 7
    met = []
    for rank in range(world):
        run = a_run(thirty, world=world, rank=rank)
        monkeypatch.setattr(run, "log", lambda *_, **__: None)
        run.step, run.bar, of_rank = 0, None, []

        def losses_of(micro, of_rank=of_rank):
            of_rank.append((micro.mean_length, micro.shape[0]))
            return None, {"loss": torch.zeros(micro.shape[0])}

        run.evaluate(losses_of, held_out, PlainPolicy(), None)
        met += of_rank
    assert {mean for mean, _ in met} == {expected}
    assert sum(many for _, many in met) == 7


def test_a_resumed_run_sees_the_batches_it_has_not_seen(thirty):
    whole = through(a_run(thirty), thirty)
    for start in (1, 4, 8):  # within the first epoch, the second, the last step
        assert through(a_run(thirty), thirty, start) == whole[start:]


def test_rows_that_the_reference_is_asked_for_come_in_the_micro_batches_of_the_first_epoch(thirty):
    run = a_run(thirty)
    used = run.used_rows(thirty)
    assert used[:12] == [micro for step in range(3) for micro in run.step_rows(step)]
    assert sorted(flat(used)) == list(range(30))
    short = a_run(thirty, max_steps=2)
    assert short.used_rows(thirty) == [m for step in range(2) for m in short.step_rows(step)]


def test_max_steps_goes_before_epochs(thirty):
    assert a_run(thirty, max_steps=5).total_steps == 5
    assert a_run(thirty, epochs=0.5, batch_size=2).total_steps == 7  # of 15 an epoch
