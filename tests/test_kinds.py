"""Every kind of row for every kind of method: what it becomes, what is left out, what is wrong."""

import copy

import pytest

from data.kinds import CONVERTIBLE, BadRow, convert, kind_of, rename


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def says(text: str) -> list[dict]:
    return [{"role": "assistant", "content": text}]


WHY = [user("Why?")]
ASKED = [user("Hello"), *says("Hi"), *WHY]
PAIR = {"prompt": "Why?", "chosen": " So.", "rejected": " No."}
TWO = {"prompt": "Why?", "responses": [" So.", " No."], "scores": [1.0, 0.0]}
RANKED = {"prompt": "Why?", "responses": [" b", " d", " a", " c"], "scores": [3, 1.5, 4, 2]}
DEMONSTRATION = {"prompt": "Why?", "completion": " So."}
LABELLED = DEMONSTRATION | {"label": False}
DIALOGUES = {"chosen": [*ASKED, *says("So.")], "rejected": [*ASKED, *says("Some.")]}
ANSWERS = {"chosen": says("So."), "rejected": says("No.")}
RANKED_DIALOGUES = {"prompt": ASKED, "responses": [says("b"), says("a")], "scores": [1, 2]}
EARLY = {name: [*says(name), user("And?"), *says("Yes.")] for name in ("chosen", "rejected")}
ALIKE = {name: [*says("Hm."), user("Well?"), *says(name)] for name in ("chosen", "rejected")}
WITH_IDS = {name: [m | {"id": name} for m in value] for name, value in DIALOGUES.items()}


def pair(prompt, chosen, rejected, **more) -> list[dict]:
    return [{"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}]


def ranked(responses: str, scores: list[float]) -> list[dict]:
    return [{"prompt": "Why?", "responses": [" " + r for r in responses], "scores": scores}]


SPLIT = pair(ASKED, says("So."), says("Some."))  # by messages: "So" is no part of the prompt
EQUAL = ["all responses equal"]
CASES = [
    ("pair", PAIR, [PAIR]),
    ("pair", PAIR | {"id": 3, "target": "x"}, [PAIR]),
    ("pair", DIALOGUES, SPLIT),
    ("pair", WITH_IDS, SPLIT),  # other keys of messages
    ("pair", DIALOGUES | {"prompt": "Why?", "messages": [*ASKED, *says("So.")]}, SPLIT),
    ("pair", {name: WHY + EARLY[name] for name in EARLY}, pair(WHY, *EARLY.values())),
    ("pair", {"prompt": ASKED, **ANSWERS}, pair(ASKED, says("So."), says("No."))),
    ("pair", {"prompt": "Why?", **ANSWERS}, pair(WHY, says("So."), says("No."))),
    ("pair", {"prompt": WHY, **ALIKE},
     pair([*WHY, *says("Hm."), user("Well?")], says("chosen"), says("rejected"))),
    ("pair", RANKED, pair("Why?", " a", " d")),
    ("pair", RANKED_DIALOGUES, pair(ASKED, says("a"), says("b"))),
    ("demonstration", DEMONSTRATION, [DEMONSTRATION]),
    ("demonstration", {"messages": [*ASKED, *says("So.")], "prompt": "Why?"},
     [{"prompt": ASKED, "completion": says("So.")}]),
    ("demonstration", {"text": "Why? So."}, [{"prompt": "", "completion": "Why? So."}]),
    ("demonstration", LABELLED | {"label": True}, [DEMONSTRATION]),
    ("demonstration", LABELLED, ["labelled false"]),
    ("demonstration", PAIR, [DEMONSTRATION]),
    ("demonstration", RANKED, [DEMONSTRATION | {"completion": " a"}]),
    ("demonstration", RANKED | {"scores": [4, 1, 4, 4]}, [DEMONSTRATION | {"completion": " b"}]),
    ("demonstration", {"prompt": "Why?", "responses": [" So."], "scores": [0]}, [DEMONSTRATION]),
    ("labelled", LABELLED, [LABELLED]),
    ("labelled", PAIR, [TWO]),
    ("labelled", RANKED, [TWO | {"responses": [" a", " d"]}]),
    # The first of the best and the last of the worst.
    ("labelled", RANKED | {"scores": [-4, -9, -4, -9]}, [TWO | {"responses": [" b", " c"]}]),
    ("ranked", PAIR, [TWO]),
    ("ranked", RANKED, ranked("abcd", [4, 3, 2, 1.5])),
    ("ranked", RANKED | {"scores": [2, -1, 2, 2]}, ranked("bacd", [2, 2, 2, -1])),  # ties
    ("ranked", RANKED | {"responses": [" b", " a", " c", " b"]}, ranked("cba", [4, 3, 1.5])),
    ("ranked", RANKED | {"scores": [10**25, 1, 0, 2]}, ranked("bcda", [10**25, 2, 1, 0])),
    ("ranked", RANKED | {"scores": [2, 2, 2, 2]}, EQUAL),
    ("ranked", RANKED | {"responses": [" a"] * 4}, EQUAL),
    ("ranked", {"prompt": "a", "responses": ["b"], "scores": [1]}, EQUAL),
    ("prompt", {"prompt": "Why?"}, [{"prompt": "Why?"}]),
    ("prompt", PAIR, [{"prompt": "Why?"}]),
    ("prompt", DIALOGUES, [{"prompt": ASKED}]),
    ("prompt", RANKED | {"scores": [1, 1, 1, 1]}, [{"prompt": "Why?"}]),
    ("prompt", LABELLED, [{"prompt": "Why?"}]),
    ("prompt", DEMONSTRATION, [{"prompt": "Why?"}]),
    ("prompt", {"messages": [*ASKED, *says("a")]}, [{"prompt": ASKED}]),
    ("prompt", {"text": "a", "prompt": "Why?"}, [{"prompt": "Why?"}]),
    # Next to messages a text stays one: it is the assistant's.
    ("pair", PAIR | {"prompt": ASKED}, [PAIR | {"prompt": ASKED}]),
    ("ranked", TWO | {"prompt": ASKED}, [TWO | {"prompt": ASKED}]),
    ("labelled", LABELLED | {"prompt": ASKED}, [LABELLED | {"prompt": ASKED}]),
    ("ranked", TWO | {"responses": '[" So.", " No."]', "scores": "[1, 0]"}, [TWO]),  # a CSV
]  # fmt: skip


@pytest.mark.parametrize("kind, row, expected", CASES)
def test_convert(kind, row, expected):
    before = copy.deepcopy(row)
    made = convert(row, kind)
    assert made == expected and row == before
    for new in made:  # a converted row is converted to itself
        if isinstance(new, dict) and new["prompt"]:
            assert convert(new, kind) == [new]


def test_every_conversion_has_a_case():
    tested = {(kind, kind_of(row, kind)) for kind, row, _ in CASES}
    assert tested == {(kind, found) for kind, all_ in CONVERTIBLE.items() for found in all_}


@pytest.mark.parametrize(
    "pairs, responses, scores, expected",
    [
        ("best-worst", "abcd", [4, 3, 2, 1], "ad"),
        ("adjacent", "abcd", [4, 3, 2, 1], "ab bc cd"),
        ("all", "abcd", [4, 3, 2, 1], "ab ac ad bc bd cd"),
        # Of equally good responses none was preferred.
        ("best-worst", "abcd", [1, 1, 0, 0], "ad"),
        ("adjacent", "abcd", [1, 1, 0, 0], "bc"),
        ("all", "abcd", [1, 1, 0, 0], "ac ad bc bd"),
        # A text that is there twice counts once, with its best score.
        ("adjacent", "abca", [1, 3, 2, 4], "ab bc"),
        ("all", "abba", [4, 3, 2, 1], "ab"),
        ("all", "ab", [-2.5, -1], "ba"),
    ],
)
@pytest.mark.parametrize("target", [{}, {"target": " b"}])
def test_pairs_of_a_ranked_list(pairs, responses, scores, expected, target):
    row = {"prompt": "Why?", "responses": list(responses), "scores": scores, **target}
    made = convert(row, "pair", pairs, bool(target))
    assert made == [pair("Why?", *both, **target)[0] for both in expected.split()]
    assert convert(row | {"scores": [1] * len(scores)}, "pair", pairs) == EQUAL


@pytest.mark.parametrize(
    "row, target, expected",
    [
        (PAIR, " Yes.", " Yes."),
        (DIALOGUES, says("Yes."), says("Yes.")),
        (DIALOGUES, [*ASKED, *says("Yes.")], says("Yes.")),
        (RANKED_DIALOGUES, [*ASKED, *says("Yes.")], says("Yes.")),
        (PAIR, None, "no 'target'"),
        (RANKED, None, "no 'target'"),
        (PAIR, " ", "'target' is empty"),
        (PAIR, 3, "'target' must be a text or a list of messages with"),
        (PAIR, WHY, "'target' must end with an assistant message"),
        (DIALOGUES, [user("Who?"), *says("a")], "'target' does not continue the prompt"),
    ],
)
def test_target(row, target, expected):
    without = convert(row | {"target": target}, "pair")
    assert without == convert(row, "pair")
    try:
        made = convert(row | {"target": target}, "pair", with_target=True)
    except BadRow as error:
        assert str(error).startswith(expected)
    else:
        assert made == [new | {"target": expected} for new in without]


MESSAGES = "must be a text or a list of messages with 'role' and 'content'"
BAD = [
    ("labelled", DEMONSTRATION, "no column 'label' .*; demonstration rows are for sft.py"),
    ("ranked", LABELLED, "no column 'responses' and 'scores' .*; labelled rows are for kto.py"),
    ("pair", {"prompt": "a"}, "prompt rows are for ppo.py, nlpo.py, rloo.py, .* and raft.py"),
    ("prompt", {"text": "a"}, "text rows are for sft.py"),
    (
        "pair",
        {"prompt": "a", "win": "b", "lose": "c"},
        r"no column 'chosen' and 'rejected' \(columns: prompt, win, lose\); "
        "--columns chosen=NAME,rejected=NAME renames",
    ),
    ("pair", {"prompt": "a", "chosen": "b"}, r"no column 'rejected' \(columns: prompt, chosen\)"),
    ("demonstration", {"prompt": "a", "chosen": "b"}, "no column 'rejected'"),  # a pair serves too
    ("pair", {"prompt": "a", "responses": []}, "no column 'scores'"),
    ("labelled", {"prompt": "a", "label": True}, "no column 'completion'"),
    ("demonstration", {}, r"no column 'prompt' and 'completion' \(columns: none\)"),
    ("pair", PAIR | {"chosen": None}, "no 'chosen'"),
    ("labelled", LABELLED | {"label": None}, "no 'label'"),
    ("labelled", LABELLED | {"label": 2}, r"true or false \(or 1 or 0, yes or no\), this is 2"),
    ("labelled", LABELLED | {"label": "good"}, "this is 'good'"),
    ("labelled", LABELLED | {"label": [[]]}, r"this is \[\[\]\]"),
    ("prompt", {"prompt": "\ud83d"}, r"'prompt' has half a character \(a lone surrogate\)"),
    ("prompt", {"prompt": [{"from": "human", "value": "a\ud83d"}]}, "half a character"),
    ("pair", PAIR | {"prompt": " "}, "'prompt' is empty"),
    ("prompt", {"prompt": 3}, f"'prompt' {MESSAGES}"),
    ("prompt", {"prompt": [{"role": "user"}]}, MESSAGES),
    ("prompt", {"prompt": [user(3)]}, MESSAGES),
    # Responses, also those that the method does not read.
    ("labelled", LABELLED | {"completion": " "}, "'completion' is empty"),
    ("demonstration", PAIR | {"rejected": ""}, "'rejected' is empty"),
    ("labelled", PAIR | {"rejected": " So."}, "'chosen' and 'rejected' are the same"),
    ("pair", {"chosen": "a", "rejected": "b"}, "there must be a 'prompt'"),
    ("pair", DIALOGUES | {"chosen": "a"}, "must both be texts or both be lists of messages"),
    ("pair", DIALOGUES | {"chosen": ASKED}, "'chosen' must end with an assistant message"),
    ("pair", DIALOGUES | {"chosen": [*ASKED, *says(" ")]}, "that is not empty"),
    ("pair", {"chosen": says("a"), "rejected": says("b")}, "begin with other"),
    ("demonstration", {"messages": says("a")}, "two messages or more"),
    ("demonstration", {"messages": ASKED}, "must end with an assistant message"),
    ("demonstration", {"text": "\n"}, "'text' is empty"),
    ("demonstration", {"text": 3}, f"'text' {MESSAGES}"),
    ("ranked", RANKED | {"responses": "abcd"}, "must be lists"),
    ("ranked", RANKED | {"scores": [1, 2]}, "4 responses but 2 scores"),
    ("pair", RANKED | {"responses": ["a", " ", "b", "c"]}, "'responses' is empty"),
    ("labelled", RANKED | {"scores": [1, 2, 3, True]}, "a finite number, this is True"),
    ("pair", RANKED | {"scores": [1, 2, 3, "4"]}, "this is '4'"),
    ("ranked", RANKED | {"scores": [1, 2, 3, float("inf")]}, "this is inf"),
    ("ranked", RANKED | {"scores": [1, 2, 3, 10**400]}, "a score must be a finite number"),
]


@pytest.mark.parametrize("kind, row, reason", BAD)
def test_bad_row(kind, row, reason):
    with pytest.raises(BadRow, match=reason):
        convert(row, kind)


@pytest.mark.parametrize(
    "label, expected",
    [(x, True) for x in (True, 1, 1.0, "1", "true", " TRUE ", "Yes")]
    + [(x, False) for x in (False, 0, 0.0, "0", "false", "No")],
)
def test_labels(label, expected):
    (made,) = convert(LABELLED | {"label": label}, "labelled")
    assert made["label"] is expected


TURNS = [("system", "Be kind."), ("human", "Why?"), ("gpt", "So.")]
ALPACA = {"instruction": "Add.", "input": "1 2", "output": "3", "text": "..."}
RENAMED = [
    ("", "pair", PAIR, [PAIR]),
    ("prompt=q,chosen=a b", "pair", {"q": "Why?", "a b": " So.", "rejected": " No."}, [PAIR]),
    ("chosen=rejected,rejected=chosen", "pair", PAIR, pair("Why?", " No.", " So.")),
    ("prompt=q", "pair", PAIR | {"q": "Who?"}, [PAIR | {"prompt": "Who?"}]),
    ("", "demonstration", {"conversations": [{"from": r, "value": x} for r, x in TURNS]},
     [{"prompt": [user("Be kind.") | {"role": "system"}, *WHY], "completion": says("So.")}]),
    ("", "demonstration", {"conversations": [*WHY, *says("So.")]},
     [{"prompt": WHY, "completion": says("So.")}]),
    ("", "demonstration", ALPACA, [{"prompt": "Add.\n\n1 2", "completion": "3"}]),
    ("", "demonstration", ALPACA | {"input": ""}, [{"prompt": "Add.", "completion": "3"}]),
    ("", "prompt", {"instruction": "Add."}, [{"prompt": "Add."}]),
    ("", "pair", {"instruction": "Add.", "chosen": "3", "rejected": "4"}, pair("Add.", "3", "4")),
]  # fmt: skip


@pytest.mark.parametrize("columns, kind, row, expected", RENAMED)
def test_rename(columns, kind, row, expected):
    theirs = dict(part.split("=") for part in columns.split(",") if part)
    assert convert(rename(row, theirs), kind) == expected


def test_a_name_that_is_not_there():
    with pytest.raises(BadRow, match=r"--columns: no column 'q' \(columns: prompt, chosen, rej"):
        rename(PAIR, {"prompt": "q"})
    with pytest.raises(BadRow, match="'instruction' and 'input' must be texts"):
        rename({"instruction": 3}, {})
