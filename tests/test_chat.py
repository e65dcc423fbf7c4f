"""chat.py: what the models see, what is shown, and the commands that a run ends with."""

import io
import itertools
import json
import re
import shlex
import shutil
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import CHAT, write_jsonl

import chat
import common
import evaluate
from family import task
from sampling import dialogue, score_model
from sampling.show import show
from training import finish
from training.errors import printable

pytestmark = pytest.mark.usefixtures("fresh_process")


def stdin(text: bytes | None) -> SimpleNamespace:
    """A pipe, or (None) a keyboard."""
    return SimpleNamespace(isatty=lambda: text is None, buffer=io.BytesIO(text or b""))


@pytest.fixture
def asked(monkeypatch) -> list[tuple]:
    """(prompt, answer) of every call of generate, as token ids."""
    calls, generate = [], dialogue.generate

    def recorded(policy, prompts, *how, **more):
        found = generate(policy, prompts, *how, **more)
        calls.append((prompts[0].tolist(), found[0].tolist()))
        return found

    monkeypatch.setattr(dialogue, "generate", recorded)
    return calls


@pytest.fixture
def talk(monkeypatch, capsys):
    """talk(*flags, typed=lines) -> what it printed."""

    def go(*flags, typed=(), piped: bytes | None = None) -> str:
        lines = iter(typed)

        def read(prompt: str) -> str:
            if (line := next(lines, None)) is None:
                raise EOFError
            return line

        monkeypatch.setattr("builtins.input", read)
        monkeypatch.setattr("sys.stdin", stdin(piped))
        words = ["--max-new-tokens", "6", "--dtype", "float32", *map(str, flags)]
        chat.main(common.parse(chat.Args, {}, "", words))
        return capsys.readouterr().out

    return go


@pytest.fixture
def templated(checkpoints) -> Path:
    """A model whose tokenizer and whose template both write a BOS."""
    folder = Path("templated").absolute()
    shutil.copytree(checkpoints("llama"), folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{{ bos_token }}" + CHAT
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 512}))
    return folder


@torch.no_grad()
def plain_logp(folder: Path, prompt: list[int], answer: list[int]) -> float:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].double()
    return logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).sum().item()


@pytest.mark.parametrize("with_template", [False, True])
def test_numbers_are_those_of_plain_transformers(with_template, templated, talk, asked):
    """A base model continues the text; with a template there is one BOS too."""
    other = Path("other")
    shutil.copytree(templated, other)
    model = transformers.AutoModelForCausalLM.from_pretrained(templated)
    torch.manual_seed(3)
    for p in model.parameters():
        p.data += 0.05 * torch.randn_like(p)
    model.save_pretrained(other)
    flags = ["--model", templated, "--against", other, "--temperature", 1]
    flags += [] if with_template else ["--chat-template", "none"]
    out = talk("the cat </s>", *flags)
    tokenizer = transformers.AutoTokenizer.from_pretrained(templated)
    if with_template:  # a special token in a message is text
        start = tokenizer("<s><|im_start|>user\nthe cat <", add_special_tokens=False).input_ids
        end = "/s><|im_end|>\n<|im_start|>assistant\n"
        expected = start + tokenizer(end, add_special_tokens=False).input_ids
    else:
        expected = tokenizer("the cat </s>").input_ids
    shown = re.findall(
        r"^-- (.*): (\d+) tokens, (ended|not ended), log-prob (\S+) \((\S+) per token\), "
        r"log-ratio to (.*) (\S+)$", out, re.M,
    )  # fmt: skip
    assert len(shown) == len(asked) == 2 and asked[0] != asked[1]
    for (prompt, answer), (name, n, ended, total, each, to, ratio), folders in zip(
        asked, shown, [(templated, other), (other, templated)], strict=True
    ):
        logps = [plain_logp(folder, prompt, answer) for folder in folders]
        assert prompt == expected and int(n) == len(answer)
        assert [name, to] == [*map(str, folders)]
        assert (ended == "ended") == (answer[-1] == tokenizer.eos_token_id)
        assert float(total) == pytest.approx(logps[0], abs=0.006)
        assert float(each) == pytest.approx(logps[0] / len(answer), abs=0.0006)
        assert float(ratio) == pytest.approx(logps[0] - logps[1], abs=0.012)


def test_a_conversation(templated, talk, asked, monkeypatch):
    """It is remembered until /new. What failed, or was stopped, is not part of it."""
    recorded = dialogue.generate

    def sometimes(*how, **more):
        if len(asked) == 2 and not stopped:
            stopped.append(True)
            raise SystemExit(130)  # Ctrl-C
        return recorded(*how, **more)

    stopped = []
    monkeypatch.setattr(dialogue, "generate", sometimes)
    typed = ["one", "", "cat " * 600, "two", "lost", "three", "/new", "four", "/quit", "five"]
    out = talk("--model", templated, "--system", "be brief", typed=typed)
    assert "error: the prompt is empty" in out and out.count("stopped") == 1
    assert re.search(r"error: the prompt has \d+ tokens; .* takes at most 512", out)
    tokenizer = transformers.AutoTokenizer.from_pretrained(templated)
    said = [tokenizer.decode(prompt) for prompt, _ in asked]
    users = [re.findall(r"user\n(.*?)<\|im_end", text) for text in said]
    assert users == [["one"], ["one", "two"], ["one", "two", "three"], ["four"]]
    assert all(text.count("be brief") == text.count("<s>") == 1 for text in said)
    first = tokenizer.decode([i for i in asked[0][1] if i != tokenizer.eos_token_id])
    assert f"assistant\n{first}<|im_end|>\n<|im_start|>user\ntwo" in said[1]
    talk("five", "six", "--model", templated)  # prompts of the command line are separate
    assert "five" not in tokenizer.decode(asked[-1][0])


def test_a_base_model_has_no_conversation(checkpoints, talk, asked):
    talk("--model", checkpoints("llama"), typed=["the cat", "a mat"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoints("llama"))
    assert [prompt for prompt, _ in asked] == tokenizer(["the cat", "a mat"]).input_ids


def test_two_tokenizers(checkpoints, talk, asked):
    out = talk("the cat", "--model", checkpoints("llama"), "--against", checkpoints("qwen2"))
    assert "two different ones: there are no log-ratios" in out and "log-ratio to" not in out
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoints("qwen2"))
    expected = "<|im_start|>user\nthe cat<|im_end|>\n<|im_start|>assistant\n"
    assert asked[1][0] == tokenizer(expected).input_ids


def test_a_run_without_a_template_stays_without(templated, talk, asked):
    record = {"arguments": {"chat_template": "none"}, "source": {"dpo.py": ""}}
    (templated / "run.json").write_text(json.dumps(record))
    talk("the cat", "--model", templated)
    tokenizer = transformers.AutoTokenizer.from_pretrained(templated)
    assert asked[0][0] == tokenizer("the cat").input_ids


MESSAGES = [{"role": "user", "content": "b"}]


@pytest.mark.parametrize(
    "words, piped, prompts",
    [
        (["a", "b c"], None, ["a", "b c"]),
        ([], None, None),
        ([], "a\n\n  \nb\u00e9\n".encode(), ["a", "bé"]),
        (["--file", "some.txt"], None, ["a", "b"]),
        (["--file", "some.jsonl"], None, ["a", MESSAGES]),
    ],
)
def test_where_prompts_come_from(words, piped, prompts, monkeypatch):
    monkeypatch.setattr("sys.stdin", stdin(piped))
    Path("some.txt").write_bytes(b"\xef\xbb\xbfa\r\nb")  # as Windows writes it
    write_jsonl(Path("some.jsonl"), [{"prompt": "a", "chosen": "x"}, {"prompt": MESSAGES}])
    assert chat.prompts_of(common.parse(chat.Args, {}, "", words)) == prompts


WRONG = [
    (["--file", "gone.txt"], "--file gone.txt: there is no such file"),
    (["--file", "gone.jsonl"], "gone.jsonl: there is no such file"),
    (["--file", "empty.txt"], "empty.txt has no prompt"),
    (["--file", "latin.txt"], "latin.txt: not UTF-8, at byte 1"),
    (["--file", "rows.jsonl"], "rows.jsonl:1: no column 'prompt'"),
    ([""], "the prompt is empty"),
    (["a", "--model", "empty"], "--model empty: no config.json in"),
    (["a", "--against", "runs/gone"], "--against runs/gone: there is no such folder"),
    (["a", "--temperature", "nan"], "--temperature must be"),
    (["a", "--max-new-tokens", "0"], "--max-new-tokens 1 or more"),
    (["a", "--model", "LLAMA", "--system", "b"], "--system: .* without a chat template"),
    ([], "the pipe has no prompt"),
]


@pytest.mark.parametrize("words, message", WRONG, ids=[" ".join(words) for words, _ in WRONG])
def test_what_cannot_work(words, message, talk, checkpoints):
    Path("empty").mkdir()
    Path("empty.txt").write_text("\n")
    Path("latin.txt").write_bytes(b"a\xe9b")
    Path("rows.jsonl").write_text('{"question": "a"}\n')
    words = [str(checkpoints("llama")) if word == "LLAMA" else word for word in words]
    with pytest.raises(ValueError, match=message):
        talk(*words, piped=None if words else b"")


def test_messages_need_a_template(talk, checkpoints):
    write_jsonl(Path("rows.jsonl"), [{"prompt": MESSAGES}])
    with pytest.raises(ValueError, match="has no chat template"):
        talk("--file", "rows.jsonl", "--model", checkpoints("llama"))


def test_nothing_reaches_the_terminal_raw():
    assert printable("a\tb\n\x1b[2J\u202eé\x00", "\n\t") == "a\tb\n\\x1b[2J\\u202eé\\x00"


@pytest.mark.parametrize(
    "columns, text, two_columns", [(120, "a b", 1), (80, "a b", 0), (120, "中", 0)]
)
def test_side_by_side_if_there_is_room(columns, text, two_columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(columns))
    show([("one", "1 token", f"{text}\n" + "word " * 40), ("two", "2 tokens", "c")])
    lines = capsys.readouterr().out.splitlines()
    assert ("| -- two" in lines[0]) == bool(two_columns)
    assert all(len(line) <= columns for line in lines) or not two_columns


def test_tiny_says_what_it_knows(talk, asked):
    """Its example works as a prompt."""
    out = talk(typed=[])
    example = re.search(r"it knows one task: (Family: .*\?)$", out, re.M)[1]
    talk("--temperature", "0", piped=example.encode())
    tokenizer = common.load_tokenizer("tiny")
    assert re.fullmatch(r"( [A-Z]\w+,?)+", tokenizer.decode(asked[0][1][:-1]))


@pytest.mark.parametrize("script", ["dpo", "sft", "reward_model"])
def test_what_a_run_says_to_do_next_works(script, talk, monkeypatch):
    every = task.rows
    monkeypatch.setattr(task, "rows", lambda *which: itertools.islice(every(*which), 40))
    for module in (finish, score_model):
        monkeypatch.setattr(module, "FAMILY_PROMPTS", 8)
    module = import_module(script)
    words = ["--max-steps", "1", "--batch-size", "8"]
    module.main(common.parse(module.Args, module.PRESETS, "", words))
    (summary,) = Path("runs").glob("*/summary.txt")
    commands = [shlex.split(x) for x in re.split(r"\n {12}|\nnext {8}", summary.read_text())]
    commands = [words[1:] for words in commands if words[0] == "python"]
    named = [Path(words[0]).stem for words in commands]
    assert named == {"dpo": ["chat", "evaluate"], "sft": ["chat", "evaluate", "dpo"],
                     "reward_model": ["evaluate", "ppo"]}[script]  # fmt: skip
    for file, *flags in commands:
        assert Path(file).is_file()
        module = import_module(Path(file).stem)
        if module is chat:
            out = talk(*flags, piped=task.test_prompts(1)[0].encode())
            assert ("log-ratio to tiny" in out) == (script == "dpo")  # sft.py starts from nothing
        elif module is evaluate:
            args = common.parse(evaluate.Args, {"tiny": evaluate.TINY}, "", flags)
            args.prompts = 8
            assert evaluate.main(args)["arguments"]["dataset"].startswith("family")
        else:
            args = common.parse(module.Args, module.PRESETS, "", flags)
            assert args.dataset.startswith("family") and str(summary.parent) in flags


def test_next_commands_repeat_what_the_user_gave(tmp_path):
    from training.report import next_commands

    folder = tmp_path / "my run"
    folder.mkdir()
    arguments = {"dataset": "my rows.jsonl", "max_length": 64, "lr": 1e-3}
    (folder / "run.json").write_text(json.dumps({"arguments": arguments, "from": [*arguments]}))
    evaluated, learned = next_commands(folder, "reward_model", "org/name")
    same = ["--model", "org/name", "--reward", str(folder)]
    assert shlex.split(evaluated)[2:] == same
    assert shlex.split(learned)[2:] == [*same, "--dataset=my rows.jsonl", "--max-length=64"]
    assert "--against" not in next_commands(folder, "dpo", "org/name")[0]
    assert next_commands(folder, "sft", "org/name")[-1].endswith("--dataset PAIRS.jsonl")
