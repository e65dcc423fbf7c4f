"""Mistakes that a newcomer makes, and the words that the message must have. One line each, without
a traceback, and without a folder for a run that did not begin.
"""

import json
import re
import shlex
from importlib import import_module
from pathlib import Path

import matplotlib
import pytest

import common
from training import errors, report

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

pytestmark = pytest.mark.usefixtures("fresh_process")
PAIR = '{"prompt": "a", "chosen": "b", "rejected": "c"}\n'
WRONG_FLAGS = [  # command, words of the message
    ("dpo.py --learning_rate 1e-4", "--learning_rate: use --lr (python dpo.py --help"),
    ("dpo.py --model_name_or_path=gpt2", "use --model"),
    ("dpo.py --per_device_train_batch_size 4", "use --micro-batch-size"),
    ("dpo.py --gradient-accumulation-steps 4", "use --batch-size, which counts"),
    ("dpo.py --num_train_epochs 1", "use --epochs"),
    ("dpo.py --dataset_name tldr", "use --dataset"),
    ("dpo.py --lr_scheduler_type cosine", "use --schedule"),
    ("dpo.py --bf16", "use --dtype bfloat16"),
    ("dpo.py --save_steps 10", "use --save-every"),
    ("dpo.py --eval_steps 10", "use --eval-every"),
    ("dpo.py --logging_steps 10", "there is no such flag: every step is logged"),
    ("dpo.py --report_to wandb", "use --track"),
    ("dpo.py --optim adamw_torch", "use --optimizer"),
    ("dpo.py --use_peft --lora_r 8", "use --lora-rank 16"),
    ("dpo.py --loss_type ipo", "every loss is a script"),
    ("grpo.py --num_generations 8", "use --samples"),
    ("grpo.py --max_completion_length 8", "use --max-length, minus --max-prompt-length"),
    ("grpo.py --beta 0.1", "use --kl-coef"),
    ("dpo.py --num_generations 8", "--num_generations: there is no such flag"),
    ("dpo.py --bta 0.1", "did you mean --beta?"),
    ("dpo.py --rank 8", "did you mean --lora-rank?"),
    ("dpo.py --no-fused-logp", "did you mean --no-fused-logps?"),
    ("dpo.py rows.jsonl", "use --dataset rows.jsonl"),
    ("sft.py --lr 1e-4 tldr", "use --dataset tldr"),
    ("sft.py runs/sft", "use --model runs/sft"),
    ("dpo.py --fsdp True", "True: --fsdp takes no value, --no-fsdp turns it off"),
    ("dpo.py --fsdp=True", "--fsdp takes no value"),
    ("dpo.py --dataset rows.jsonl more.jsonl", "more.jsonl: belongs to no flag"),
    ("dpo.py --lr fast", "--lr"),
    ("dpo.py --batch-size 1.5", "--batch-size"),
    ("dpo.py --schedule cosin", "cosine"),
    ("dpo.py --lr", "Missing value for argument '--lr'"),
    ("dpo.py --model", "Missing value for argument '--model'"),
    ("evaluate.py --learning_rate 1", "--learning_rate: there is no such flag"),
    ("compare.py --methods dop", "dpo"),
]
WRONG_VALUES = [
    ("dpo.py --epochs 0", "--epochs must be positive"),
    ("dpo.py --lr -1", "--lr must be a finite number and not negative"),
    ("dpo.py --lr nan", "--lr must be a finite number"),
    ("dpo.py --batch-size 0", "--batch-size must be positive"),
    ("dpo.py --warmup-ratio 1", "--warmup-ratio must be in [0, 1)"),
    ("dpo.py --beta 0", "--beta must be positive"),
    ("dpo.py --max-length 50 --max-prompt-length 60", "leaves no room for a response"),
    ("dpo.py --soup-weight 2", "--soup-weight must be in [0, 1]"),
    ("dpo.py --model gpt2", "--dataset is required"),
    ("dpo.py --model ./nosuch --dataset rows.jsonl", "there is no such folder"),
    ("dpo.py --model empty --dataset rows.jsonl", "no config.json in empty"),
    ("dpo.py --model broken --dataset rows.jsonl", "config.json is not JSON"),
    ("dpo.py --ref-model runs/nosuch", "--ref-model runs/nosuch: there is no such folder"),
    ("dpo.py --output-dir rows.jsonl", "is a file"),
    ("dpo.py --output-dir broken", "is not empty and holds no run"),
    ("dpo.py --max-length 5000", "takes at most"),
    ("grpo.py --model gpt2 --dataset rows.jsonl", "--reward is needed"),
    ("grpo.py --samples 1", "--samples must be 2 or more"),
    ("grpo.py --reward judge.py", "judge.py:NAME"),
    ("grpo.py --reward judge.py:score", "there is no file judge.py"),
    ("evaluate.py --model gpt2", "--dataset is needed"),
    ("compare.py --model gpt2", "--model and --dataset belong together"),
    ("dpo.py --dataset nosuch.jsonl", "there is no such file"),
    ("dpo.py --dataset empty", "file in this folder"),
    ("dpo.py --dataset notes.txt", "the name must end with one of .jsonl"),
    ("dpo.py --dataset rows.jsonl --eval-dataset nosuch.csv", "there is no such file"),
]
ROWS = [  # command, the content of its rows.jsonl, words of the message
    ("dpo.py", "", "rows.jsonl: no usable row"),
    ("dpo.py", '[{"prompt": "a"}]', "a JSON array, not a row per line: name it .json"),
    ("dpo.py", PAIR + "{'prompt': 1}\n", "rows.jsonl:2: not JSON"),
    ("dpo.py", "\xff\n", "rows.jsonl:1: not UTF-8"),
    ("dpo.py", PAIR.replace('"b"', '""'), "'chosen' is empty"),
    ("dpo.py", PAIR.replace('"b"', '"c"'), "'chosen' and 'rejected' are the same"),
    ("dpo.py", PAIR.replace('"b"', '["b"]'), "'chosen' must be a text or a list of messages"),
    ("dpo.py", PAIR.replace('"c"', "null"), "no 'rejected'"),
    ("dpo.py", PAIR.replace("chosen", "good") * 40, "40 of 40 rows: no column 'chosen' (columns: "),
    ("dpo.py", PAIR.replace("chosen", "good"), "--columns chosen=NAME renames"),
    ("dpo.py --columns chosen=good", PAIR, "--columns: no column 'good'"),
    ("dpo.py --columns chosen", PAIR, "--columns chosen: must be OURS=THEIRS"),
    ("dpo.py --skip-bad-rows", "{}\n{}\n", "2 of 2 rows"),
    ("dpo.py", '{"prompt": "a", "completion": "b"}\n', "demonstration rows are for sft.py"),
    ("dpo.py", '{"prompt": "a", "completion": "b", "label": 1}\n', "labelled rows are for kto.py"),
    ("dpo.py --batch-size 64", PAIR * 3, "at most 3 (training rows), got 64"),
    ("kto.py", '{"prompt": "a", "completion": "b"}\n', "no column 'label'"),
    ("kto.py", '{"prompt": "a", "completion": "b", "label": "so"}\n', "or 1 or 0, yes or no"),
    ("pro.py", '{"prompt": "a", "responses": ["x", "y"]}\n', "no column 'scores'"),
    ("pro.py", '{"prompt": "a", "responses": ["x", "y"], "scores": [1]}\n', "but 1 scores"),
    (
        "pro.py",
        '{"prompt": "a", "responses": ["x", "y"], "scores": [1, 1]}\n',
        "all responses equal",
    ),
    (
        "sft.py",
        '{"messages": [{"role": "user", "content": "x"}]}\n',
        "end with an assistant message",
    ),
]


def message(command: str, capsys) -> tuple[int, str]:
    """The exit status of a command, and what it says on stderr."""
    script, *words = shlex.split(command)
    module = import_module(script.removesuffix(".py"))
    presets = getattr(module, "PRESETS", {"tiny": getattr(module, "TINY", {})})
    try:
        module.main(common.parse(module.Args, presets, module.__doc__, words))
    except SystemExit as stop:
        return stop.code, capsys.readouterr().err
    except Exception as error:  # as sys.excepthook does
        capsys.readouterr()
        errors.show(type(error), error, error.__traceback__)
        return 1, capsys.readouterr().err
    raise AssertionError(f"{command} did something")


@pytest.fixture
def files():
    Path("rows.jsonl").write_text(PAIR * 3)
    Path("notes.txt").touch()
    Path("empty").mkdir()
    Path("broken").mkdir()
    Path("broken/config.json").write_text("{")


@pytest.mark.parametrize("command, words", WRONG_FLAGS)
def test_a_wrong_flag(command, words, capsys):
    status, text = message(command, capsys)
    assert status == 2 and words in text
    assert text.startswith("error: ") and text.count("\n") == 1


@pytest.mark.parametrize("command, words", WRONG_VALUES)
def test_a_wrong_value(command, words, capsys, files):
    status, text = message(command, capsys)
    assert status == 1 and words in text
    assert text.startswith("error: ") and text.count("\n") == 1


@pytest.mark.parametrize("command, content, words", ROWS)
def test_wrong_rows(command, content, words, capsys):
    Path("rows.jsonl").write_text(content, encoding="latin-1")
    status, text = message(f"{command} --dataset rows.jsonl", capsys)
    assert status == 1 and words in text and text.startswith("error: ")


# -- what a finished run shows


def test_columns_of_the_closing_block_never_touch():
    values = (0.5, -123456.7891, 1e12, None)
    for label in ("loss", "a label " * 9):
        for before in values:
            for after in values:
                line = report._line(label, before, after)
                found = [label.strip(), *(f"{x:.3f}" for x in (before, after) if x is not None)]
                assert re.split(" {2,}", line.strip())[: len(found)] == found


def test_the_curves(tmp_path, monkeypatch):
    steps = [{"step": s, "lr": s / 90, "loss": s % 2, "rewards/chosen": 1.0} for s in range(1, 91)]
    steps = [step | {"rewards/rejected": 0.0, "kl": None} for step in steps]
    lines = [{"step": 0, "eval/loss": 0.7}, *steps]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setattr(pyplot, "close", lambda figure: None)
    report.curves(tmp_path, "a run", 38)
    figure = pyplot.gcf()
    loss, rewards, lr = (axis for axis in figure.axes if axis.get_title())
    titles = [axis.get_title() for axis in (loss, rewards, lr)]
    assert titles == ["loss", "rewards/chosen, rewards/rejected", "lr"]
    assert [text.get_text() for text in rewards.get_legend().texts] == titles[1].split(", ")
    assert "38 held-out rows" in loss.get_xlabel()
    assert len(lr.lines[1].get_xdata()) == 90 and len(loss.lines[1].get_xdata()) == 88  # smoothed
    assert all(tick == int(tick) for tick in lr.get_xticks())
    monkeypatch.undo()
    pyplot.close(figure)
