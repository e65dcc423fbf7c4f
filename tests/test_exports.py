"""Answers for AlpacaEval, MT-Bench, comet-score and sacrebleu, and the scores that come back."""

import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from conftest import write_jsonl

import common
import evaluate
from evaluation import exports
from evaluation.scores import read_scores

pytestmark = pytest.mark.usefixtures("fresh_process")

ALPACA = [{"instruction": f"the cat {word}", "dataset": "own"} for word in "sat ran on off".split()]
MT_BENCH = [
    {"question_id": 7, "category": "writing", "turns": ["the cat", "and the dog"]},
    {"question_id": 9, "category": "math", "turns": ["two cats?"]},
    {"question_id": 8, "category": "other", "turns": ["a mat", "a red one", "why?"]},
    {"question_id": 6, "category": "stem", "turns": ["the sun", "and rain"]},
]
LINES = [
    {"prompt": "German: the cat\n", "source": "the cat\r\n sat", "completion": " die Katze\nsass "},
    {"prompt": "the dog", "completion": "der Hund"},
]
OUTPUTS = {"alpaca_eval": "out.json", "mt_bench": "out.jsonl", "lines": "out"}
ROWS = {"alpaca_eval": ALPACA, "mt_bench": MT_BENCH, "lines": LINES}


@pytest.fixture
def go(checkpoints):
    """go(format, **flags) -> what was written."""

    def run(kind: str, **flags) -> list[dict]:
        write_jsonl(Path("q.jsonl"), ROWS[kind])
        usual = {"model": str(checkpoints("qwen2")), "prompts": "q.jsonl", "output": OUTPUTS[kind]}
        usual |= {"dtype": "float32", "max_new_tokens": 6, "export": kind}
        evaluate.main(evaluate.Args(**usual | flags))
        if kind == "alpaca_eval":
            return json.loads(Path("out.json").read_text())
        return [*map(json.loads, Path("out.jsonl").open())] if kind == "mt_bench" else []

    return run


@pytest.fixture
def calls(monkeypatch) -> list[tuple]:
    """(prompts, temperature, answers) of every call of generate."""
    found, generate = [], exports.generate

    def recorded(policy, prompts, stops, most, temperature, *how, **more):
        made = generate(policy, prompts, stops, most, temperature, *how, **more)
        found.append(([x.tolist() for x in prompts], temperature, made))
        return made

    monkeypatch.setattr(exports, "generate", recorded)
    return found


@torch.no_grad()
def greedy(folder: Path, question: str, most: int = 6) -> str:
    """By plain Transformers: the chat template, one token after the other."""
    messages = [{"role": "user", "content": question}]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids, made = tokenizer(text, return_tensors="pt").input_ids, []
    while len(made) < most and tokenizer.eos_token_id not in made:
        made.append(int(model(ids).logits[0, -1].argmax()))
        ids = torch.cat([ids, torch.tensor([made[-1:]])], 1)
    return tokenizer.decode([x for x in made if x != tokenizer.eos_token_id]).strip()


def test_alpaca_eval(go, checkpoints, capsys):
    folder = checkpoints("qwen2")
    answers = [greedy(folder, row["instruction"]) for row in ALPACA]
    more = [{"generator": "qwen2", "output": answer} for answer in answers]
    assert go("alpaca_eval") == [a | b for a, b in zip(ALPACA, more, strict=True)]
    out = capsys.readouterr().out
    assert re.search(r"4 questions; \d answers have no end \(--max-new-tokens 6", out)
    assert "alpaca_eval --model_outputs out.json" in out


def test_mt_bench(go, checkpoints, calls):
    """A later turn sees the model's own answers; the category sets the temperature."""
    rows, tokenizer = go("mt_bench"), common.load_tokenizer(str(checkpoints("qwen2")))
    assert [row["question_id"] for row in rows] == [7, 9, 8, 6]
    for row, question in zip(rows, MT_BENCH, strict=True):
        assert row.keys() == {"question_id", "answer_id", "model_id", "choices", "tstamp"}
        (choice,) = row["choices"]
        assert (row["model_id"], choice["index"]) == ("out", 0)
        assert len(choice["turns"]) == len(question["turns"])
    assert len({row["answer_id"] for row in rows}) == 4
    # turn 1 of writing and other (0.7), of math, of stem; turn 2; turn 3
    sizes = [(len(prompts), temperature) for prompts, temperature, _ in calls]
    assert sizes == [(2, 0.7), (1, 0.0), (1, 0.1), (2, 0.7), (1, 0.1), (1, 0.7)]
    messages = []
    for said, answer in zip(MT_BENCH[2]["turns"], rows[2]["choices"][0]["turns"], strict=True):
        messages += [{"role": "user", "content": said}, {"role": "assistant", "content": answer}]
    text = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(calls[-1][0][0]) == text
    assert rows[1]["choices"][0]["turns"] == [greedy(checkpoints("qwen2"), "two cats?")]


def test_lines(go, capsys):
    go("lines")
    src, hyp, ref = (Path(f"out/{side}.txt").read_text() for side in ("src", "hyp", "ref"))
    assert (src, ref) == ("the cat sat\nthe dog\n", "die Katze sass\nder Hund\n")
    assert hyp.count("\n") == 2
    assert re.search(r"lines +[234] segments had line breaks", capsys.readouterr().out)


@pytest.mark.parametrize("kind", ["alpaca_eval", "mt_bench"])
def test_a_killed_export_continues(kind, go, calls, monkeypatch):
    output, recorded = Path(OUTPUTS[kind]), exports.generate
    expected = go(kind, batch_size=2)
    many, partial = len(calls), Path(f"{output}.partial")
    output.unlink()
    calls.clear()

    def killed(*how, **more):
        if more["first"] >= 2:
            raise KeyboardInterrupt
        return recorded(*how, **more)

    monkeypatch.setattr(exports, "generate", killed)
    with pytest.raises(KeyboardInterrupt):
        go(kind, batch_size=2)
    assert partial.exists() and not output.exists()
    monkeypatch.setattr(exports, "generate", recorded)
    for flags in ({"seed": 5}, {"max_new_tokens": 7}):  # not those of the answers that are there
        with pytest.raises(ValueError, match=f"partial is of an export with other {[*flags][0]}"):
            go(kind, **flags)
    found = go(kind, batch_size=2)
    drop = lambda rows: [row | {"tstamp": 0} for row in rows]  # noqa: E731
    assert drop(found) == drop(expected) and len(calls) == many and not partial.exists()


def test_a_long_conversation_ends_at_the_models_limit(go, capsys):
    """128 tokens: the first answer has less room than asked for, the second none."""
    write_jsonl(Path("long.jsonl"), [MT_BENCH[1] | {"turns": ["cat " * 25, "cat " * 40]}])
    (row,) = go("mt_bench", max_new_tokens=100, prompts="long.jsonl")
    first, second = row["choices"][0]["turns"]
    assert first and not second
    assert "2 answers have no end" in capsys.readouterr().out


WRONG = [
    ("mt_bench", {"prompts": "gone.jsonl"}, "--prompts must be a file"),
    ("mt_bench", {"prompts": 8}, "--prompts must be a file"),
    ("alpaca_eval", {}, "needs --output NAME.json"),
    ("lines", {"output": None}, "needs --output NAME"),
    ("lines", {"output": "gone/out"}, "gone: there is no such folder"),
    ("lines", {"output": "here"}, "here exists, and nothing is written over"),
    ("lines", {"best_of": 2}, "--best-of"),
    ("mt_bench", {"model": "llama"}, "MT-Bench needs a chat template"),
    ("mt_bench", {"chat_template": "none"}, "MT-Bench needs a chat template"),
    ("mt_bench", {"model": "runs/gone"}, "--model runs/gone: there is no such folder"),
    ("mt_bench", {"prompts": "a.jsonl"}, "a.jsonl:2: no 'turns', which mt_bench needs"),
    ("mt_bench", {"prompts": "b.jsonl"}, "b.jsonl:1: not for mt_bench (no texts to ask"),
    ("mt_bench", {"prompts": "c.jsonl"}, "c.jsonl:1: not for mt_bench (not JSON"),
    ("mt_bench", {"prompts": "d.jsonl"}, "d.jsonl: there is no question"),
    ("lines", {"prompts": "a.jsonl"}, "a.jsonl:1: no 'prompt', which lines needs"),
    ("out.jsonl", {}, "--export must be rows, alpaca_eval, mt_bench, lines (--output FILE)"),
    ("rows", {"output": None, "dataset": "family"}, "--export and --output FILE belong together"),
    (None, {"output": None, "dataset": "family"}, "--prompts q.jsonl: a file is for --export"),
]


@pytest.mark.parametrize("kind, flags, words", WRONG, ids=[words for *_, words in WRONG])
def test_what_cannot_work_is_refused(kind, flags, words, checkpoints, monkeypatch):
    monkeypatch.setattr(common, "load_policy", lambda *a, **k: pytest.fail("too late"))
    write_jsonl(Path("q.jsonl"), MT_BENCH)
    write_jsonl(Path("a.jsonl"), [MT_BENCH[0], {"question_id": 1, "category": "math"}])
    write_jsonl(Path("b.jsonl"), [MT_BENCH[0] | {"turns": ["the cat", " "]}])
    Path("c.jsonl").write_text("{")
    Path("d.jsonl").write_text("")
    Path("here").mkdir()
    flags = {"prompts": "q.jsonl", "output": "out.jsonl", "export": kind} | flags
    flags["model"] = flags.get("model", "qwen2")
    if flags["model"] in ("qwen2", "llama"):
        flags["model"] = str(checkpoints(flags["model"]))
    with pytest.raises(ValueError, match=re.escape(words)):
        evaluate.main(evaluate.Args(**flags))
    assert not [*Path().glob("*out*")] and not any(Path("here").iterdir())


LEADERBOARD = """,win_rate,standard_error,n_total,length_controlled_winrate,lc_standard_error
gpt4_turbo,50.0,0.0,805,50.0,
dpo,25.0,2.0,100,30.0,1.0
"""
JUDGED = [("dpo", 1, 1, 8), ("dpo", 2, 1, 4), ("dpo", 1, 2, 6), ("dpo", 2, 2, -1), ("sft", 1, 1, 3)]
JUDGED = [dict(zip(("model", "question_id", "turn", "score"), x, strict=True)) for x in JUDGED]
SEGMENTS = {"runs/dpo/hyp.txt": [{"src": "a", "mt": "b", "ref": "c", "COMET": x} for x in (0.5, 1)]}
TASK = {"alias": "t", "acc,none": 0.5, "acc_stderr,none": 0.1, "f1,strict": 0.25}
TASK |= {"f1_stderr,strict": "N/A"}
HARNESS = {"results": {"arc": TASK}, "n-samples": {"arc": {"effective": 4}}}
TOOLS = {
    "leaderboard.csv": LEADERBOARD,
    "gpt-4_single.jsonl": "".join(json.dumps(row) + "\n" for row in JUDGED),
    "comet.json": json.dumps(SEGMENTS),
    "results.json": json.dumps(HARNESS | {"model_name": "runs/dpo"}),
}
EXPECTED = {  # value, low, high, n
    "alpaca_eval/win_rate": (25, 21.08, 28.92, 100),
    "alpaca_eval/length_controlled": (30, 28.04, 31.96, 100),
    "mt_bench/score": (6, 4, 7, 2),  # two questions: 8, 6 and 4
    "mt_bench/turn_1": (6, 4, 8, 2),
    "mt_bench/turn_2": (6, None, None, 1),
    "comet": (0.75, 0.5, 1, 2),
    "arc/acc": (0.5, 0.304, 0.696, 4),
    "arc/f1,strict": (0.25, None, None, 4),
}


def test_scores_come_back(capsys):
    """Those of --model, in the table and in the record that --json has."""
    for name, content in TOOLS.items():
        Path(name).write_text(content)
    Path("dpo.json").write_text(json.dumps({"measured": {"greedy/reward": {"value": 1}}}))
    found = evaluate.main(evaluate.Args(model="runs/dpo", scores=tuple(TOOLS), json="dpo.json"))[
        "measured"
    ]
    assert json.loads(Path("dpo.json").read_text())["measured"] == found
    assert found.pop("greedy/reward") == {"value": 1} and found.keys() == EXPECTED.keys()
    for name, numbers in EXPECTED.items():
        assert [*found[name].values()] == [x if x is None else pytest.approx(x) for x in numbers]
    assert (
        "| alpaca_eval/win_rate               | 25.000 [21.080, 28.920]" in capsys.readouterr().out
    )
    other = read_scores("leaderboard.csv")["gpt4_turbo"]["alpaca_eval/win_rate"]
    assert (other.value, other.low) == (50, None)  # a standard error of 0 is no certainty


@pytest.mark.parametrize("name", TOOLS)
def test_scores_that_are_not_there(name):
    Path(name).write_text(TOOLS[name])
    Path(f"bad-{name}").write_text(TOOLS[name].replace("score", "scare").replace("r", "rr")[:-9])
    with pytest.raises(ValueError, match=f"--scores bad-{name}: not of a tool that is known"):
        read_scores(f"bad-{name}")
    args = evaluate.Args(model="runs/gone", scores=(name,))
    if name in ("leaderboard.csv", "gpt-4_single.jsonl"):  # of several models
        with pytest.raises(ValueError, match=f"--scores {name}: has .*dpo.*, not --model gone"):
            evaluate.main(args)
    else:
        assert evaluate.main(args)["measured"]
