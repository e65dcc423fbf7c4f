"""What goes wrong at the keyboard, and exactly what each mistake prints.

    pytest tests/test_inputs.py -s          # shows all of it

Every case runs a script with a user's flags in a folder with `model`, a tiny Llama without a chat
template, and `rows.jsonl`, 40 good pairs, of which line 3 is often put wrong. Loading a model fails
the test: a mistake is told before.
"""

import contextlib
import gc
import io
import json
import re
import shutil
import signal
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import tyro
from conftest import ROOT, make_tokenizer, pair_rows, run_script, write_jsonl

import common
import cpo
import dpo
import ipo
import kto
import listwise_dpo
import orpo
import pro
import rrhf
import sft
import simpo
import slic

SCRIPTS = {
    "dpo": dpo,
    "sft": sft,
    "cpo": cpo,
    "simpo": simpo,
    "slic": slic,
    "ipo": ipo,
    "orpo": orpo,
    "kto": kto,
    "pro": pro,
    "listwise_dpo": listwise_dpo,
    "rrhf": rrhf,
}
FLAGS = {
    "--model": "model", "--dataset": "rows.jsonl", "--output-dir": "out", "--batch-size": "4",
    "--max-length": "64", "--max-prompt-length": "40", "--max-steps": "2", "--dtype": "float32",
}  # fmt: skip


class ModelLoaded(AssertionError):
    """Whatever is wrong with the input should have been said before."""


@pytest.fixture
def no_model(monkeypatch):
    def refuse(*args, **more):
        raise ModelLoaded

    monkeypatch.setattr(common, "load_policy", refuse)


@pytest.fixture(autouse=True)
def _user_folder(tmp_path, monkeypatch, checkpoints):
    """A folder with a model and good rows."""
    monkeypatch.chdir(tmp_path)
    Path("model").symlink_to(checkpoints("llama"))
    write_jsonl(Path("rows.jsonl"), pair_rows(40))


@contextlib.contextmanager
def as_a_process():
    """What ends with a process: its signal handlers, and the lock on its folder."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        gc.collect()


def words_of(flags: dict[str, str]) -> list[str]:
    return [word for pair in flags.items() for word in pair]


def run(script: str, *flags: str, **changed: str) -> tuple[int, str, str]:
    """(exit status, stdout, stderr) of a script with FLAGS and these, in this process."""
    method, out, err = SCRIPTS[script], io.StringIO(), io.StringIO()
    words = words_of(FLAGS | {common.flag(name): value for name, value in changed.items()})
    status = 0
    with as_a_process(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            method.main(tyro.cli(method.Args, args=[*words, *flags]))
        except SystemExit as stop:
            status = stop.code
        except common.UserError as error:
            common._show_user_errors(type(error), error, None)  # as Python does before it leaves
            status = 1
    return status, out.getvalue(), err.getvalue()


def show(title: str, printed: str) -> None:
    """For `pytest -s`."""
    print(f"\n--- {title}\n{printed}", end="")


PAIR = {"prompt": "Why?", "chosen": " So.", "rejected": " No."}
RANKED = {"prompt": "Why?", "responses": [" a", " b"], "scores": [1, 2]}
LABELLED = {"prompt": "Why?", "completion": " So.", "label": True}
MESSAGES = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]


# -- a row that cannot be used

BAD_ROWS = {  # line 3 -> what is printed of it
    "not JSON": (
        b'{"prompt": "Why?", "chosen" " So."}',
        "not JSON (Expecting ':' delimiter: line 1 column 29 (char 28))",
    ),
    "not UTF-8": (
        '{"prompt": "Où ?", "chosen": " a", "rejected": " b"}'.encode("latin-1"),
        "not UTF-8 (invalid start byte at byte 13)",
    ),
    "not an object": ([PAIR], "a row must be an object, this is a list"),
    "a column is missing": ({"prompt": "Why?", "chosen": " So."}, "no 'rejected'"),
    "a column is null": (PAIR | {"chosen": None}, "no 'chosen'"),
    "no prompt": (
        {"chosen": " So.", "rejected": " No."},
        "'chosen' and 'rejected' are texts, so there must be a 'prompt'",
    ),
    "a wrong type": (
        PAIR | {"chosen": 7},
        "'chosen' must be a text or a list of messages with 'role' and 'content'",
    ),
    "a wrong type of prompt": (
        PAIR | {"prompt": {"text": "Why?"}},
        "'prompt' must be a text or a list of messages with 'role' and 'content'",
    ),
    "an empty prompt": (PAIR | {"prompt": ""}, "'prompt' is empty"),
    "an empty response": (PAIR | {"rejected": " \n"}, "'rejected' is empty"),
    "equal responses": (
        PAIR | {"rejected": PAIR["chosen"]},
        "'chosen' and 'rejected' are the same",
    ),
    "an end in the middle": (
        PAIR | {"chosen": " So.</s> And so on."},
        "an end-of-sequence token stands in the middle of a response",
    ),
    "half a character": (  # half of an emoji, as cut by a program that counts in UTF-16
        b'{"prompt": "Why?", "chosen": " \\ud83d", "rejected": " No."}',
        "a text holds half a character (a lone surrogate)",
    ),
    "messages without a template": (
        {"chosen": MESSAGES, "rejected": [MESSAGES[0], {"role": "assistant", "content": "No."}]},
        "a list of messages, but this model's tokenizer has no chat template",
    ),
    "a text and messages": (
        PAIR | {"chosen": MESSAGES},
        "'chosen' and 'rejected' must both be texts or both be lists of messages",
    ),
    "messages, then texts": (
        PAIR | {"prompt": MESSAGES[:1]},
        "prompt and responses must all be texts or all be lists of messages",
    ),
    "no answer at the end": (
        PAIR | {"chosen": MESSAGES[:1], "rejected": MESSAGES},
        "'chosen' must end with an assistant message that is not empty",
    ),
    "dialogues with nothing in common": (
        {"chosen": MESSAGES, "rejected": [{"role": "user", "content": "Who?"}, MESSAGES[1]]},
        "'chosen' and 'rejected' begin with other messages, and have no 'prompt'",
    ),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row(name, no_model):
    line, reason = BAD_ROWS[name]
    lines = [json.dumps(row).encode() for row in pair_rows(40)]
    lines[2] = line if isinstance(line, bytes) else json.dumps(line).encode()
    Path("rows.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    status, _, printed = run("dpo")
    show(name, printed)
    assert status == 1
    assert printed == (
        "error: 1 of 40 rows of rows.jsonl cannot be used (--skip-bad-rows goes on without them):\n"
        f"  rows.jsonl:3: {reason}\n"
    )


# Rows of other kinds, in a file that holds nothing else, so that a kind is found from the columns.
OTHER_BAD_ROWS = {
    "scores that are not numbers": (
        "dpo", RANKED, b'{"prompt": "Why?", "responses": [" a", " b"], "scores": [1, NaN]}',
        "a score must be a finite number, this is nan",
    ),
    "an infinite score": (
        "dpo", RANKED, b'{"prompt": "Why?", "responses": [" a", " b"], "scores": [1, -Infinity]}',
        "a score must be a finite number, this is -inf",
    ),
    "a score as text": (
        "dpo", RANKED, RANKED | {"scores": [1, "2"]},
        "a score must be a finite number, this is '2'",
    ),
    "a score of true": (
        "dpo", RANKED, RANKED | {"scores": [1, True]},
        "a score must be a finite number, this is True",
    ),
    "lengths that do not match": (
        "dpo", RANKED, RANKED | {"scores": [1, 2, 3]}, "2 responses but 3 scores",
    ),
    "no responses": (
        "dpo", RANKED, RANKED | {"responses": [], "scores": []}, "0 responses but 0 scores",
    ),
    "responses that are no list": (
        "dpo", RANKED, RANKED | {"responses": " a"}, "'responses' and 'scores' must be lists",
    ),
    "an empty response among several": (
        "dpo", RANKED, RANKED | {"responses": [" a", ""]}, "'responses' is empty",
    ),
    "a label that is no yes or no": (
        "sft", LABELLED, LABELLED | {"label": "good"},
        "'label' must be true or false, this is 'good'",
    ),
    "an empty completion": (
        "sft", {"prompt": "Why?", "completion": " So."}, {"prompt": "Why?", "completion": ""},
        "'completion' is empty",
    ),
    "a text, then messages": (
        "sft", {"prompt": "Why?", "completion": " So."},
        {"prompt": "Why?", "completion": MESSAGES[1:]},
        "prompt and responses must all be texts or all be lists of messages",
    ),
    "texts and messages": (
        "dpo", RANKED, RANKED | {"responses": [" a", MESSAGES[1:]]},
        "prompt and responses must all be texts or all be lists of messages",
    ),
    "a label that is a number": (
        "kto", LABELLED, LABELLED | {"label": 1}, "'label' must be true or false, this is 1",
    ),
    "a label that is missing": ("kto", LABELLED, LABELLED | {"label": None}, "no 'label'"),
    "a list without scores": ("pro", RANKED, RANKED | {"scores": None}, "no 'scores'"),
    "one score too many": (
        "listwise_dpo", RANKED, RANKED | {"scores": [1, 2, 3]}, "2 responses but 3 scores",
    ),
    "equal answers taken apart": (
        "kto", PAIR, PAIR | {"rejected": PAIR["chosen"]},
        "'chosen' and 'rejected' are the same",
    ),
    "an empty text": ("sft", {"text": "Why?"}, {"text": "\t"}, "'text' is empty"),
    "a text that is none": (
        "sft", {"text": "Why?"}, {"text": 7}, "'text' must be a text, this is a int",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHER_BAD_ROWS)
def test_a_bad_row_of_another_kind(name, no_model):
    script, good, bad, reason = OTHER_BAD_ROWS[name]
    bad = bad if isinstance(bad, bytes) else json.dumps(bad).encode()
    lines = [json.dumps(good).encode()] * 2 + [bad] + [json.dumps(good).encode()] * 7
    Path("rows.jsonl").write_bytes(b"\n".join(lines))
    status, _, printed = run(script)
    show(name, printed)
    assert status == 1
    assert printed == (
        "error: 1 of 10 rows of rows.jsonl cannot be used (--skip-bad-rows goes on without them):\n"
        f"  rows.jsonl:3: {reason}\n"
    )


ALL_BAD = {
    "columns of no kind": (
        "dpo", {"question": "Why?", "answer": "So."},
        "has the columns question, answer; known rows have: prompt, responses, scores; "
        "chosen, rejected; prompt, completion, label; prompt, completion; messages; text; prompt",
    ),
    "demonstrations for dpo.py": (
        "dpo", {"prompt": "Why?", "completion": " So."},
        "holds demonstration rows; needed are pair rows (chosen, rejected) or ranked ones",
    ),
    "demonstrations for kto.py": (
        "kto", {"prompt": "Why?", "completion": " So."},
        "holds demonstration rows; needed are labelled rows (prompt, completion, label), pairs or "
        "ranked ones",
    ),
    "labelled rows for pro.py": (
        "pro", LABELLED,
        "holds labelled rows; needed are ranked rows (prompt, responses, scores) or pairs",
    ),
    "labelled rows for listwise_dpo.py": (
        "listwise_dpo", LABELLED,
        "holds labelled rows; needed are ranked rows (prompt, responses, scores) or pairs",
    ),
    "labelled rows for cpo.py": (
        "cpo", LABELLED,
        "holds labelled rows; needed are pair rows (chosen, rejected) or ranked ones",
    ),
    "messages without a template for sft.py": (
        "sft", {"messages": MESSAGES},
        "a list of messages, but this model's tokenizer has no chat template",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ALL_BAD)
def test_the_first_ten_bad_rows_are_named_and_the_rest_counted(name, no_model):
    script, row, reason = ALL_BAD[name]
    write_jsonl(Path("rows.jsonl"), [row] * 1013)
    status, _, printed = run(script)
    show(name, printed)
    assert status == 1
    assert printed.splitlines() == [
        "error: 1,013 of 1,013 rows of rows.jsonl cannot be used (--skip-bad-rows goes on without "
        "them):",
        *(f"  rows.jsonl:{number}: {reason}" for number in range(1, 11)),
        "  ... and 1,003 more",
    ]


def test_a_row_of_another_kind_of_file_is_named_too(no_model):
    import pyarrow
    import pyarrow.parquet

    rows = [PAIR, PAIR | {"rejected": None}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), "rows.parquet")
    Path("rows.json").write_text(json.dumps([PAIR, 7]))
    # The second row of this one ends in line 3.
    text = 'prompt,chosen,rejected\nWhy?,"two\nlines",No\nWhy?,So\nWhy?,So,\n'
    Path("rows.csv").write_text(text)
    for file, rows, reasons in (
        ("rows.parquet", "1 of 2", ["row 2: no 'rejected'"]),
        ("rows.json", "1 of 2", ["row 2: a row must be an object, this is a int"]),
        (
            "rows.csv",
            "2 of 3",
            ["4: another number of cells than the header's 3", "5: 'rejected' is empty"],
        ),
    ):
        status, _, printed = run("dpo", dataset=file, output_dir=f"out-{file}")
        show(f"bad rows in {file}", printed)
        assert status == 1
        assert printed.splitlines() == [
            f"error: {rows} rows of {file} cannot be used (--skip-bad-rows goes on without them):",
            *(f"  {file}:{reason}" for reason in reasons),
        ]


def test_a_row_of_a_folder_is_named_by_its_file(no_model):
    Path("folder").mkdir()
    write_jsonl(Path("folder/a.jsonl"), [PAIR] * 20)
    write_jsonl(Path("folder/b.jsonl"), [PAIR, PAIR | {"chosen": ""}])
    status, _, printed = run("dpo", dataset="folder")
    show("a bad row in a folder", printed)
    assert status == 1
    assert printed.splitlines()[1:] == ["  folder/b.jsonl:2: 'chosen' is empty"]


def test_a_bad_row_of_the_held_out_file_is_named_too(no_model):
    write_jsonl(Path("other.jsonl"), [PAIR, PAIR | {"chosen": ""}])
    status, _, printed = run("dpo", eval_dataset="other.jsonl")
    show("a bad row of --eval-dataset", printed)
    assert status == 1
    assert printed.startswith("error: 1 of 2 rows of other.jsonl cannot be used")


TARGETS = {
    "no column": (PAIR, {}, "no 'target'"),
    "no column beside a list": (RANKED, {}, "no 'target'"),
    "null": (PAIR, {"target": None}, "no 'target'"),
    "empty": (PAIR, {"target": " "}, "'target' is empty"),
    "a number": (
        PAIR, {"target": 7},
        "'target' must be a text or a list of messages with 'role' and 'content'",
    ),
    "messages beside texts": (
        PAIR, {"target": MESSAGES[1:]},
        "prompt and responses must all be texts or all be lists of messages",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TARGETS)
def test_a_target_that_is_asked_for(name, no_model):
    good, column, reason = TARGETS[name]
    rows = [good | {"target": " Well."}] * 2 + [good | column] + [good | {"target": " Oh."}] * 7
    write_jsonl(Path("rows.jsonl"), rows)
    status, _, printed = run("slic", "--regularise-on", "target")
    show(f"--regularise-on target, {name}", printed)
    assert status == 1
    assert printed == (
        "error: 1 of 10 rows of rows.jsonl cannot be used (--skip-bad-rows goes on without them):\n"
        f"  rows.jsonl:3: {reason}\n"
    )


def test_a_target_that_is_not_asked_for_is_not_read(no_model):
    write_jsonl(Path("rows.jsonl"), [PAIR | {"target": 7}] * 10 + [PAIR] * 10)
    with pytest.raises(ModelLoaded):
        run("slic")


def test_bad_rows_can_be_left_out_and_are_counted(no_model):
    bad = [b"{", b"{", json.dumps(PAIR | {"chosen": ""}).encode()]
    good = [json.dumps(row).encode() for row in pair_rows(40)]
    Path("rows.jsonl").write_bytes(b"\n".join([good[0], *bad, *good[1:]]))
    with (
        as_a_process(),
        contextlib.redirect_stdout(io.StringIO()) as out,
        pytest.raises(ModelLoaded),
    ):
        dpo.main(tyro.cli(dpo.Args, args=[*words_of(FLAGS), "--skip-bad-rows"]))
    report = next(line for line in out.getvalue().splitlines() if line.startswith("train "))
    show("--skip-bad-rows", report + "\n")
    assert report.startswith("train      rows.jsonl: 43 pair rows")
    assert "left out: 3 bad (rows.jsonl:2: not JSON (" in report and report.endswith(", ...)")


def test_nothing_left_is_an_error_also_where_bad_rows_are_skipped(no_model):
    write_jsonl(Path("rows.jsonl"), [PAIR | {"chosen": ""}] * 3)
    status, _, printed = run("dpo", "--skip-bad-rows")
    show("--skip-bad-rows, and nothing is left", printed)
    assert (status, printed) == (
        1,
        "error: rows.jsonl: no usable row (3 read, 3 of them bad)\n",
    )


# -- files, models, flags, counts


@dataclass
class Mistake:
    flags: dict[str, str]  # instead of those of FLAGS
    printed: str  # after "error: "; a regular expression where it begins with "~"
    files: dict[str, bytes] = field(default_factory=dict)
    script: str = "dpo"


OFFLINE = (
    "there is no such folder, and {0} is not in the cache, and the Hugging Face hub is out of "
    "reach; a folder with config.json, *.safetensors and tokenizer files serves too "
    "(`hf download {0} --local-dir DIR` makes one where there is a network)"
)
MISTAKES = {
    # data files
    "an empty file": Mistake(
        {}, "rows.jsonl: no usable row (0 read, 0 of them bad)", {"rows.jsonl": b""}
    ),
    "no such file": Mistake(
        {"dataset": "data/rows.jsonl"}, "data/rows.jsonl: there is no such file or folder"
    ),
    "no such folder": Mistake({"dataset": "./data"}, "./data: there is no such file or folder"),
    "an unknown extension": Mistake(
        {"dataset": "rows.txt"},
        "rows.txt: the name must end with one of .jsonl, .json, .parquet, .csv",
        {"rows.txt": b"{}"},
    ),
    "a folder without rows": Mistake(
        {"dataset": "folder"},
        "folder: no .jsonl, .json, .parquet, .csv file in this folder",
        {"folder/README.md": b""},
    ),
    "a broken .json": Mistake(
        {"dataset": "rows.json"},
        "rows.json: not JSON (Expecting ',' delimiter: line 1 column 4 (char 3))",
        {"rows.json": b"[1 2]"},
    ),
    "a .json that is not UTF-8": Mistake(
        {"dataset": "rows.json"},
        "~rows.json: not JSON \\('utf-8' codec can't decode byte 0xe4 in position 2: .*\\)",
        {"rows.json": b'["\xe4"]'},
    ),
    "not a Parquet file": Mistake(
        {"dataset": "rows.parquet"},
        "~rows.parquet: not a Parquet file \\(.*magic bytes.*\\)",
        {"rows.parquet": b"prompt,chosen,rejected\n"},
    ),
    "a .csv that is not UTF-8": Mistake(
        {"dataset": "rows.csv"},
        "~rows.csv: not UTF-8 \\(.*\\)",
        {"rows.csv": "prompt,chosen,rejected\nOù ?, a, b\n".encode("latin-1")},
    ),
    "no held-out file": Mistake(
        {"eval_dataset": "other.jsonl"}, "other.jsonl: there is no such file or folder"
    ),
    "a dataset that is not here, offline": Mistake(
        {"dataset": "nobody/nothing"},
        "nobody/nothing: there is no such file or folder, and nobody/nothing is not in the cache, "
        "and the Hugging Face hub is out of reach; a file serves too: .jsonl, .json, .parquet or "
        ".csv, or a folder of them (README.md lists the columns)",
    ),
    # models
    "no such model folder": Mistake(
        {"model": "runs/sft"}, "--model runs/sft: there is no such folder"
    ),
    "no such model folder, absolute": Mistake(
        {"model": "/no/such/model"}, "--model /no/such/model: there is no such folder"
    ),
    "a folder without config.json": Mistake(
        {"model": "folder"},
        "--model folder: no config.json in folder. Is this a folder that a run saved?",
        {"folder/model.safetensors": b""},
    ),
    "a config.json that is not JSON": Mistake(
        {"model": "folder"},
        "--model folder: folder/config.json is not JSON",
        {"folder/config.json": b"{"},
    ),
    "a model that is not here, offline": Mistake(
        {"model": "nobody/nothing"},
        f"--model nobody/nothing: {OFFLINE.format('nobody/nothing')}",
    ),
    "a short name, offline": Mistake(
        {"model": "gemma-2-2b"},
        f"--model gemma-2-2b: {OFFLINE.format('google/gemma-2-2b')}",
    ),
    "more tokens than the model has positions": Mistake(
        {"max_length": "512"}, "--max-length 512: model takes 128 tokens at most"
    ),
    "no such reference": Mistake(
        {"ref_model": "./nowhere"}, "--ref-model ./nowhere: there is no such folder"
    ),
    "half a soup": Mistake(
        {"ref_model": "model+./nowhere"}, "--ref-model ./nowhere: there is no such folder"
    ),
    # flags
    "--beta 0": Mistake(
        {"beta": "0"}, "--beta must be positive, --label-smoothing in [0, 0.5), --gamma 0 or more"
    ),
    "--label-smoothing 0.5": Mistake(
        {"label_smoothing": "0.5"},
        "--beta must be positive, --label-smoothing in [0, 0.5), --gamma 0 or more",
    ),
    "--batch-size 0": Mistake({"batch_size": "0"}, "--batch-size must be 1 or more, got 0"),
    "--micro-batch-size 0": Mistake(
        {"micro_batch_size": "0"}, "--micro-batch-size must be 1 or more, got 0"
    ),
    "--max-steps 0": Mistake({"max_steps": "0"}, "--max-steps must be 1 or more, got 0"),
    "--save-every -1": Mistake({"save_every": "-1"}, "--save-every must be 0 or more, got -1"),
    "--lr 0": Mistake({"lr": "0"}, "--lr must be positive, got 0.0"),
    "--lr nan": Mistake({"lr": "nan"}, "--lr must be positive, got nan"),
    "--warmup-ratio 1": Mistake({"warmup_ratio": "1"}, "--warmup-ratio must be in [0, 1), got 1.0"),
    "--soup-weight 2": Mistake({"soup_weight": "2"}, "--soup-weight must be in [0, 1], got 2.0"),
    "--seed -1": Mistake({"seed": "-1"}, "--seed must be 0 or more, got -1"),
    "no room for a response": Mistake(
        {"max_prompt_length": "64"},
        "--max-prompt-length 64 leaves no room for a response in --max-length 64",
    ),
    **{
        f"{script} {flag} {value}": Mistake({flag[2:]: value}, printed, script=script)
        for script, printed, flags in (
            (
                "cpo",
                "--beta must be positive, --nll-weight 0 or more",
                [("--beta", "0"), ("--nll-weight", "-1")],
            ),
            (
                "simpo",
                "--beta must be positive, --gamma-beta-ratio and --nll-weight 0 or more",
                [("--gamma-beta-ratio", "-0.5"), ("--nll-weight", "nan")],
            ),
            (
                "slic",
                "--beta must be positive, --delta and --target-weight 0 or more",
                [("--delta", "-1"), ("--target-weight", "-0.1")],
            ),
            (
                "kto",
                "--beta must be positive, the two weights 0 or more",
                [("--desirable-weight", "-1"), ("--undesirable-weight", "nan")],
            ),
            (
                "pro",
                "--sft-weight must be 0 or more, --score-scale positive",
                [("--sft-weight", "-1"), ("--score-scale", "0")],
            ),
            ("listwise_dpo", "--beta must be positive", [("--beta", "0")]),
            ("ipo", "--beta must be positive", [("--beta", "nan")]),
            ("orpo", "--odds-weight must be 0 or more", [("--odds-weight", "-1")]),
            (
                "rrhf",
                "--sft-weight and --margin must be 0 or more",
                [("--sft-weight", "nan"), ("--margin", "-1")],
            ),
        )
        for flag, value in flags
    },
    "a reference that nobody asks": Mistake(
        {"ref_model": "model"},
        "--ref-model needs --reference-normalised",
        script="slic",
    ),
    **{
        f"no such reference for {script}": Mistake(
            {"ref_model": "./nowhere"},
            "--ref-model ./nowhere: there is no such folder",
            script=script,
        )
        for script in ("kto", "listwise_dpo")
    },
    # counts
    **{
        f"an empty file for {script}": Mistake(
            {},
            "rows.jsonl: no usable row (0 read, 0 of them bad)",
            {"rows.jsonl": b""},
            script,
        )
        for script in ("kto", "pro")
    },
    **{
        f"nothing but ties for {script}": Mistake(
            {},
            "rows.jsonl: no usable row (1 read, 0 of them bad)",
            {"rows.jsonl": json.dumps(RANKED | {"scores": [1, 1]}).encode() + b"\n"},
            script,
        )
        for script in ("kto", "pro")
    },
    "one prompt for all of kto's rows": Mistake(
        {},
        "all rows have the same prompt, and KTO's z0 needs an answer to another one",
        {
            "rows.jsonl": b"".join(
                json.dumps(LABELLED | {"completion": f" {n}", "label": n % 2 == 0}).encode() + b"\n"
                for n in range(20)
            )
        },
        "kto",
    ),
    "one prompt for all pairs of kto": Mistake(
        {"eval_dataset": "other.jsonl"},
        "all rows have the same prompt, and KTO's z0 needs an answer to another one",
        {
            "rows.jsonl": (json.dumps(PAIR).encode() + b"\n") * 5,
            "other.jsonl": json.dumps(PAIR | {"prompt": "Who?"}).encode(),
        },
        "kto",
    ),
    "fewer rows than a batch": Mistake(
        {"batch_size": "64"}, "38 training rows are less than one --batch-size 64"
    ),
    "a micro-batch that does not fit": Mistake(
        {"batch_size": "12", "micro_batch_size": "5"},
        "--micro-batch-size 5 does not divide a process's 12 rows of a step; 1, 2, 3, 4, 6, 12 do",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake(name, no_model, monkeypatch):
    """What HF_HUB_OFFLINE=1 does, for the two libraries that read it when they are imported."""
    import datasets
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    mistake = MISTAKES[name]
    for file, content in mistake.files.items():
        Path(file).parent.mkdir(exist_ok=True)
        Path(file).write_bytes(content)
    status, _, printed = run(mistake.script, **mistake.flags)
    show(name, printed)
    assert status == 1
    if mistake.printed.startswith("~"):
        assert re.fullmatch(f"error: {mistake.printed[1:]}\n", printed)
    else:
        assert printed == f"error: {mistake.printed}\n"


@pytest.mark.parametrize("script", ["dpo", "sft"])  # these flags are the same ones in all files
@pytest.mark.parametrize(
    "flags, said",
    [
        (["--learning-rate", "1"], "Unrecognized options: --learning-rate, 1"),
        (["--schedule", "warm"], "'constant' 'linear' 'cosine'"),
        (["--dtype", "int8"], "'bfloat16' 'float32' 'float64'"),
        (["--resume", "always"], "'auto' 'never'"),
        (["--lr", "high"], "could not convert string to float: 'high'"),
        (["--batch-size", "2.5"], "invalid literal for int() with base 10: '2.5'"),
        (["--lr"], "Missing value for argument '--lr'"),
    ],
)
def test_a_flag_that_is_none(script, flags, said, no_model):
    """The parser's own words, wrapped to the screen: the flag, and what it takes (in any order)."""
    status, _, printed = run(script, *flags)
    show(f"{script}.py {' '.join(flags)}", printed)
    assert status == 2
    assert flags[0] in printed
    words = " ".join(printed.split())
    assert said in words or all(value in words for value in said.split())
    assert not Path("out").exists()


@pytest.mark.parametrize("batch, fits", [("6", "4 or 8"), ("3", "4")])
def test_a_batch_that_cannot_be_dealt_to_the_processes(batch, fits, no_model, monkeypatch):
    plan = common.Run.plan

    def plan_of_four(run, train):
        run.world = 4
        plan(run, train)

    monkeypatch.setattr(common.Run, "plan", plan_of_four)
    status, _, printed = run("dpo", batch_size=batch)
    show(f"--batch-size {batch} and 4 processes", printed)
    assert status == 1
    assert printed == (f"error: --batch-size {batch} cannot be dealt to 4 processes; {fits} can\n")


def test_a_micro_batch_that_nobody_asked_for_is_made_to_fit(no_model):
    """Only what is on the command line can be wrong: SETTINGS say 8, and a step has 12 prompts."""
    with pytest.raises(ModelLoaded):
        run("dpo", batch_size="12")


def test_kto_says_how_the_weights_stand_to_the_labels(no_model):
    """30 desirable and 10 undesirable: advised are weights that make it 1 to 1.5."""
    rows = [
        {"prompt": row["prompt"], "completion": row["chosen"], "label": n % 4 > 0}
        for n, row in enumerate(pair_rows(40))
    ]
    write_jsonl(Path("rows.jsonl"), rows)
    held_out = [{"prompt": "Why?", "completion": " So.", "label": True}]
    write_jsonl(Path("other.jsonl"), held_out)
    for weights, told in (
        (["--undesirable-weight", "2.5"], "1.20"),
        (["--desirable-weight", "0"], "0.00"),
        (["--undesirable-weight", "0"], "infinite: nothing undesirable counts"),
    ):
        with contextlib.redirect_stdout(io.StringIO()) as out, pytest.raises(ModelLoaded):
            words = words_of(FLAGS | {"--eval-dataset": "other.jsonl"})
            with as_a_process():
                kto.main(tyro.cli(kto.Args, args=[*words, *weights]))
        line = next(line for line in out.getvalue().splitlines() if line.startswith("weights"))
        show(f"kto.py {' '.join(weights)}", line + "\n")
        assert line == (
            "weights    desirable to undesirable, by weight times count: "
            f"{told} (advised: 1 to 1.5)"
        )


def test_a_tokenizer_without_an_end(no_model, checkpoints):
    Path("folder").mkdir()
    for file in checkpoints("llama").iterdir():
        shutil.copy(file, "folder")
    tokenizer = make_tokenizer("bos")
    tokenizer.eos_token = None
    tokenizer.save_pretrained("folder")
    status, _, printed = run("dpo", model="folder")
    show("a tokenizer without an end", printed)
    assert status == 1
    assert printed == ("error: the tokenizer of folder has no end-of-sequence token\n")


# -- the output folder: nothing in it is ever lost


def contents(folder: str | Path) -> dict[str, bytes]:
    files = (path for path in Path(folder).rglob("*") if path.is_file())
    return {str(p.relative_to(folder)): p.read_bytes() for p in files if p.name != ".lock"}


@pytest.fixture(scope="module")
def finished(checkpoints, tmp_path_factory) -> Path:
    """The folder of a run of two steps."""
    home = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        patch.setattr(common, "beside", lambda module: None)  # no curves, no samples
        Path("model").symlink_to(checkpoints("llama"))
        write_jsonl(Path("rows.jsonl"), pair_rows(40))
        status, out, err = run("dpo")
    assert (status, err.count("error")) == (0, 0), out + err
    return home / "out"


@pytest.fixture
def out(finished) -> Path:
    shutil.copytree(finished, "out")
    return Path("out")


def test_a_folder_with_other_things_is_refused(no_model):
    Path("out").mkdir()
    Path("out/thesis.txt").write_text("Once upon a time")
    status, _, printed = run("dpo")
    show("--output-dir that holds other things", printed)
    assert status == 1
    assert printed == (
        "error: out is not empty and holds no run of ours. Choose another --output-dir\n"
    )
    assert contents("out") == {"thesis.txt": b"Once upon a time"}


def test_a_run_json_of_another_program_is_refused(no_model):
    Path("out").mkdir()
    for text in ('{"loss": 0.1}', "[]", "not JSON"):
        Path("out/run.json").write_text(text)
        status, _, printed = run("dpo")
        show(f"--output-dir with a run.json {text}", printed)
        assert status == 1
        assert printed == (
            "error: out is not empty and holds no run of ours. Choose another --output-dir\n"
        )
        assert contents("out") == {"run.json": text.encode()}


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_a_file_as_output_folder_is_refused(resume, no_model):
    Path("out").write_text("Once upon a time")
    status, _, printed = run("dpo", resume=resume)
    show(f"--output-dir that is a file, --resume {resume}", printed)
    assert status == 1
    assert printed == "error: --output-dir out is a file\n"
    assert Path("out").read_text() == "Once upon a time"


def test_another_run_is_refused_and_what_differs_is_named(out, no_model):
    before = contents(out)
    status, _, printed = run("dpo", lr="0.001", beta="0.2", max_steps="5")
    show("--output-dir of another run", printed)
    assert status == 1
    assert printed == (
        "error: out holds another run: --beta was 0.5, now 0.2; --lr was 1e-06, now 0.001; "
        "--max-steps was 2, now 5. --resume never starts a new folder beside it, --output-dir "
        "names another one\n"
    )
    assert contents(out) == before


def test_another_method_in_the_same_folder_is_refused(out, no_model):
    before = contents(out)
    status, _, printed = run("sft")
    show("--output-dir of another method", printed)
    assert status == 1
    assert printed == "error: out holds a run of dpo.py; --output-dir names another\n"
    assert contents(out) == before


def test_a_run_of_other_source_is_refused(out, no_model):
    record = json.loads((out / "run.json").read_text())
    record["source"]["common.py"] = "0" * 64
    (out / "run.json").write_text(json.dumps(record))
    before = contents(out)
    status, _, printed = run("dpo")
    show("--output-dir of a run of other source", printed)
    assert status == 1
    assert printed == (
        "error: out holds another run: common.py has changed since. --resume never starts a new "
        "folder beside it, --output-dir names another one\n"
    )
    assert contents(out) == before


def test_never_resuming_begins_beside_what_is_there(out, no_model):
    before = contents(out)
    for number in (2, 3):
        with contextlib.suppress(ModelLoaded):
            run("dpo", lr="0.001", resume="never")
        assert (Path(f"out-{number}") / "run.json").is_file()
    assert contents(out) == before


def test_a_finished_run_says_so_again_and_changes_nothing(out, no_model):
    before = contents(out)
    status, printed, _ = run("dpo")
    show("a finished run", printed)
    assert status == 0
    assert (out / "summary.txt").read_text() in printed
    assert printed.endswith(
        "This run is finished. To run it again beside the old one: --resume never\n"
    )
    assert contents(out) == before


def test_two_runs_in_one_folder_are_refused(out, no_model):
    fcntl = pytest.importorskip("fcntl")
    before = contents(out)
    with open(out / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        status, _, printed = run("dpo")
    show("another process is at work", printed)
    assert (status, printed) == (1, "error: another process is training in out\n")
    assert contents(out) == before


@pytest.mark.parametrize("mistake", [{"beta": "0"}, {"dataset": "nowhere.jsonl"}])
def test_a_mistake_does_not_occupy_the_folder(mistake, no_model):
    """The command that mends it may name the same one: no step was made, so nothing is lost."""
    status, _, printed = run("dpo", **mistake)
    assert status == 1
    with pytest.raises(ModelLoaded):
        run("dpo")


# -- several processes


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags, told",
    [
        ({"dataset": "nowhere.jsonl"}, "nowhere.jsonl: there is no such file"),
        ({"batch_size": "0"}, "--batch-size must be 1 or more, got 0"),
        ({"schedule": "warm"}, "invalid choice 'warm'"),
    ],
)
def test_several_processes_say_it_once(flags, told, tmp_path):
    """Also where the one that prints is the last to know: torchrun ends all when one has ended."""
    (tmp_path / "slow_main_process.py").write_text(
        "import os, runpy, sys, time\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "if os.environ.get('RANK') == '0':\n"
        "    time.sleep(3)\n"
        f"runpy.run_path({str(ROOT / 'dpo.py')!r}, run_name='__main__')\n"
    )
    words = words_of(FLAGS | {common.flag(name): value for name, value in flags.items()})
    status, out, err = run_script("slow_main_process.py", *words, processes=2, cwd=tmp_path)
    printed = out + err
    ours = "".join(line + "\n" for line in printed.splitlines() if told in line)
    show(f"two processes: {' '.join(words[-2:])}", ours)
    assert status != 0
    assert printed.count(told) == 1
    assert "UserError" not in printed  # torchrun's own traceback is all there is


@pytest.mark.slow
def test_a_process_of_its_own_exits_with_1_and_no_traceback(tmp_path):
    """As a user starts it: the same words as in this process, and nothing else on stderr."""
    status, _, err = run_script("dpo.py", "--batch-size", "0", "--output-dir", tmp_path / "out")
    assert (status, err) == (1, "error: --batch-size must be 1 or more, got 0\n")
