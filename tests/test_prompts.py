"""Rows without answers, for methods that sample theirs: whatever has a prompt gives it."""

import random
from pathlib import Path

import pytest
from conftest import pair_rows, write_jsonl
from test_data import (
    _here,  # noqa: F401 (used by its name)
    assistant,
    decoded,
    ids_of,
    load,
    plain,
    tokenizers,  # noqa: F401
    user,
)

import common

ASKED = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"  # as an answer begins
SYSTEM = {"role": "system", "content": "Be brief."}
GOOD, POOR = [assistant("So.")], [assistant("No.")]
DIALOGUE = [user("Hm?"), assistant("Yes?"), user("Why?")]

ROWS = {  # a row, its tokenizer, and the prompt that it gives
    "a prompt alone": ({"prompt": "Why?"}, "bos", "<s>Why?"),
    "a prompt alone, no BOS": ({"prompt": "Why?"}, "pad-eos", "Why?"),
    "a prompt alone, in messages": ({"prompt": [user("Why?")]}, "chat", ASKED),
    "a prompt with other columns": ({"prompt": "Why?", "id": 7, "answer": None}, "bos", "<s>Why?"),
    "a pair": ({"prompt": "Why?", "chosen": " So.", "rejected": " No."}, "bos", "<s>Why?"),
    "a pair of whole dialogues": (
        {"chosen": [user("Why?"), *GOOD], "rejected": [user("Why?"), *POOR]}, "chat", ASKED,
    ),
    "a pair of longer dialogues": (
        {"chosen": DIALOGUE + GOOD, "rejected": DIALOGUE + POOR}, "chat",
        "<|im_start|>user\nHm?<|im_end|>\n<|im_start|>assistant\nYes?<|im_end|>\n" + ASKED,
    ),
    "a pair that goes on from its prompt": (
        {"prompt": [SYSTEM, user("Why?")], "chosen": GOOD, "rejected": POOR}, "chat",
        "<|im_start|>system\nBe brief.<|im_end|>\n" + ASKED,
    ),
    "a ranked list": (
        {"prompt": "Why?", "responses": [" So.", " No."], "scores": [2, 1]}, "bos", "<s>Why?",
    ),
    "a list of equals": (  # says nothing of its answers, but can be asked
        {"prompt": "Why?", "responses": [" So.", " No."], "scores": [1, 1]}, "bos", "<s>Why?",
    ),
    "a desirable answer": (
        {"prompt": "Why?", "completion": " So.", "label": True}, "bos", "<s>Why?",
    ),
    "an undesirable answer": (
        {"prompt": [user("Why?")], "completion": POOR, "label": False}, "chat", ASKED,
    ),
    "a demonstration": ({"prompt": "Why?", "completion": " So."}, "bos", "<s>Why?"),
    "messages": ({"messages": [user("Why?"), *GOOD]}, "chat", ASKED),
    "messages of several turns": (
        {"messages": [*DIALOGUE, *GOOD]}, "chat",
        "<|im_start|>user\nHm?<|im_end|>\n<|im_start|>assistant\nYes?<|im_end|>\n" + ASKED,
    ),
    "a BOS that is written out": ({"prompt": "<s>Why?"}, "bos", "<s>Why?"),
    "messages, BOS in the template": ({"prompt": [user("Why?")]}, "bos-template", None),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_every_kind_of_row_gives_its_prompt(name, tokenizers):  # noqa: F811
    raw, kind, expected = ROWS[name]
    tokenizer = tokenizers(kind)
    (row,) = load([raw], tokenizer, "prompt").rows
    if expected is None:
        expected = tokenizer.apply_chat_template(
            raw["prompt"], tokenize=False, add_generation_prompt=True
        )
        assert expected.startswith("<s>")
    assert tokenizer.decode(row.prompt) == expected
    assert row.responses == [] and row.scores is None
    assert row.ask is row.prompt and row.prompt.dtype == "int32"
    assert row.length() == row.tokens() == len(row.prompt)


REFUSED = {
    "a text": (
        {"text": "The cat sat."}, "bos",
        "holds text rows; needed are prompt rows (prompt) or any others that have one",
    ),
    "an empty prompt": ({"prompt": " "}, "bos", "'prompt' is empty"),
    "a prompt that is a number": (
        {"prompt": 7}, "bos",
        "'prompt' must be a text or a list of messages with 'role' and 'content'",
    ),
    "null": ({"prompt": None}, "bos", "no 'prompt'"),
    "half a character": (
        {"prompt": "a \ud800"}, "bos", "a text holds half a character (a lone surrogate)",
    ),
    "messages for a tokenizer without a template": (
        {"prompt": [user("Why?")]}, "bos",
        "a list of messages, but this model's tokenizer has no chat template",
    ),
    "messages without an answer": (
        {"messages": [user("Why?")]}, "chat",
        "'messages' must end with an assistant message that is not empty",
    ),
    "dialogues that share nothing": (
        {"chosen": [user("Why?"), *GOOD], "rejected": [user("When?"), *POOR]}, "chat",
        "'chosen' and 'rejected' begin with other messages, and have no 'prompt'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_gives_no_prompt(name, tokenizers):  # noqa: F811
    raw, kind, reason = REFUSED[name]
    with pytest.raises(common.UserError) as error:
        load([raw], tokenizers(kind), "prompt")
    assert str(error.value).splitlines()[1:] == [f"  rows.jsonl:1: {reason}"]


def test_equal_prompts_are_asked_once(tokenizers, capsys):  # noqa: F811
    """A pair a line is how most sets hold several answers to a prompt."""
    raws = [{"prompt": p, "chosen": f" {i}", "rejected": " no"} for i, p in enumerate("abacab")]
    rows = load(raws, tokenizers("bos"), "prompt")
    assert decoded(rows, tokenizers("bos")) == [("<s>a", []), ("<s>b", []), ("<s>c", [])]
    report = capsys.readouterr().out.splitlines()
    assert report[0] == (
        "train      rows.jsonl: 6 pair rows -> 3 prompts; "
        "left out: 3 with a prompt that was there before"
    )
    assert report[1] == "           tokens (median/95 %/max): prompt 2/2/2; 0 cut"
    assert report[2].split() == ["first", "row:", "<s>a"]


def test_prompts_that_cutting_makes_equal_are_asked_once_too(tokenizers, capsys):  # noqa: F811
    raws = [{"prompt": f"{i}" + "zyxw" * 10} for i in range(3)] + [{"prompt": "zyxw"}]
    rows = load(raws, tokenizers("bos"), "prompt", 20, 12)
    assert [len(row.prompt) for row in rows.rows] == [12, 5]
    report = capsys.readouterr().out
    assert "4 prompt rows; left out: 2 with a prompt that was there before" in report
    assert "; 3 cut" in report


@pytest.mark.parametrize("kind", ["bos", "pad-eos"])
def test_a_long_prompt_keeps_bos_and_its_end(kind, tokenizers, capsys):  # noqa: F811
    """Also where it would fit by itself: the room for an answer is the same for all."""
    tokenizer = tokenizers(kind)
    ids = plain(tokenizer, "zyxw" * 4)
    assert len(ids) == 16
    raws = [{"prompt": "zyxw" * 4}, {"prompt": "zyxw"}]
    row, whole = load(raws, tokenizer, "prompt", 20, 12).rows
    assert row.prompt.tolist() == tokenizer.bos + ids[len(tokenizer.bos) - 12 :]
    assert len(row.prompt) == 12
    assert whole.prompt.tolist() == tokenizer.bos + plain(tokenizer, "zyxw")
    assert "; 1 cut" in capsys.readouterr().out


def test_end_of_takes_lists_and_arrays(tokenizers):  # noqa: F811
    import numpy as np

    for kind, expected in (("bos", [0, 8, 9]), ("pad-eos", [7, 8, 9])):
        tokenizer = tokenizers(kind)
        assert tokenizer.bos == [0] * (kind == "bos")
        ids = [0, 5, 6, 7, 8, 9]
        assert common.end_of(ids, 3, tokenizer) == expected
        cut = common.end_of(np.array(ids, np.int32), 3, tokenizer)
        assert cut.tolist() == expected and cut.dtype == np.int32
        assert common.end_of(ids, 6, tokenizer) == ids


def test_a_prompt_that_is_bos_alone(tokenizers):  # noqa: F811
    """How a model is asked to write from nothing."""
    rows = load([{"prompt": "<s>"}, {"prompt": "Why?"}], tokenizers("bos"), "prompt")
    assert decoded(rows, tokenizers("bos")) == [("<s>", []), ("<s>Why?", [])]


# -- held-out prompts, digest


def numbered(n: int) -> list[dict]:
    return [row | {"prompt": f"{i} {row['prompt']}"} for i, row in enumerate(pair_rows(n))]


def both_parts(raws: list[dict], tokenizer, kind: str = "prompt", cut=(60, 40)):
    file = write_jsonl(Path("rows.jsonl"), raws)
    return common.load_rows(str(file), None, kind, tokenizer, *cut)


@pytest.mark.parametrize("kind", ["bos", "pad-eos"])
def test_held_out_prompts_are_those_of_the_other_methods(kind, tokenizers):  # noqa: F811
    """What a reward model was measured on is not what a policy then learns on."""
    tokenizer, raws = tokenizers(kind), numbered(200)
    train, held_out = both_parts(raws, tokenizer)
    assert (len(train), len(held_out)) == (190, 10)
    pairs = both_parts(raws, tokenizer, "pair")
    for prompts, others in zip((train, held_out), pairs, strict=True):
        assert [x.prompt.tolist() for x in prompts.rows] == [x.prompt.tolist() for x in others.rows]
    shuffled = random.Random(0).sample(raws, len(raws))
    again = both_parts(shuffled + shuffled, tokenizer)[1]
    assert {x.prompt.tobytes() for x in again.rows} == {x.prompt.tobytes() for x in held_out.rows}


def test_a_file_of_held_out_prompts(tokenizers, capsys):  # noqa: F811
    some, others = (write_jsonl(Path(f"{i}.jsonl"), numbered(n)) for i, n in enumerate((5, 3)))
    train, held_out = common.load_rows(str(some), str(others), "prompt", tokenizers("bos"), 60, 40)
    assert (len(train), len(held_out)) == (5, 3)
    assert "test       1.jsonl: 3 pair rows -> 3 prompts" in capsys.readouterr().out


def test_the_digest_knows_every_prompt_and_their_order(tokenizers):  # noqa: F811
    def digest(*texts: str) -> str:
        return load([{"prompt": t} for t in texts], tokenizers("bos"), "prompt").digest()

    assert digest("a", "b") == digest("a", "b") == digest("a", "b", "a")
    different = [digest("a", "b"), digest("b", "a"), digest("a"), digest("a", "c"), digest("ab")]
    assert len(set(different)) == len(different)


# -- large sets


@pytest.mark.parametrize("kind", ["bos", "chat"])
def test_many_prompts_are_made_once_and_kept(kind, tokenizers, monkeypatch, capsys):  # noqa: F811
    tokenizer, raws = tokenizers(kind), numbered(40) + numbered(5)
    if kind == "chat":
        raws = [{"prompt": [user(row["prompt"])]} for row in raws]
    else:
        raws[7]["prompt"] = "<s>" + raws[7]["prompt"]
    raws[9]["prompt"] = raws[9]["prompt"] * 9  # cut
    few = write_jsonl(Path("few.jsonl"), raws[:1])
    file = write_jsonl(Path("rows.jsonl"), raws)

    def read(kind: str = "prompt") -> tuple[common.Rows, list[str], str]:
        rows = common.load_rows(str(file), str(few), kind, tokenizer, 60, 40)[0]
        lines = capsys.readouterr().out.splitlines()
        how = "".join(line for line in lines if line.startswith("tokens"))
        return rows, [line for line in lines if not line.startswith("tokens")], how

    small, report, how = read()
    assert not how and len(small) == 40
    assert "left out: 5 with a prompt that was there before" in report[0]
    assert "; 0 cut" not in report[1]
    monkeypatch.setattr(common, "MANY_ROWS", 30)
    monkeypatch.setattr(common, "CHUNK", 7)  # equal prompts are chunks apart
    for told in ("tokens     by ", "tokens     from runs/.cache/tokens-"):
        large, the_same, how = read()
        assert how.startswith(told), how
        assert ids_of(large) == ids_of(small) and the_same == report
        assert all(row.ask is row.prompt and row.responses == [] for row in large.rows)
        assert large.digest() == small.digest() and large.tail == small.tail
    if kind == "bos":  # for another method the same file has other tokens
        assert read("pair")[2].startswith("tokens     by ")
