"""Scores and values of a model with a head that gives one number, against plain Transformers, one
response at a time; and everything else that can score, with all that can go wrong there.
"""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TOKENIZER_OF, make_config, make_tokenizer
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import common
from family import task
from sampling import rewards, score_model

ARCHITECTURES = ("llama", "gemma2", "gpt2", "qwen2")  # gpt2: padding is the end-of-sequence
CLOSE = {"rtol": 0, "atol": 1e-5}
BIAS = 0.375  # exact in any dtype
ROWS = [  # (prompt length, lengths of the responses)
    (6, (4, 9, 2, 5)), (15, (3,)), (2, (1, 12)), (10, (8, 2, 6)), (4, (5, 5, 1, 1)), (1, (1, 4)),
]  # fmt: skip


@pytest.fixture(scope="module")
def run():
    run = common.Processes()
    yield run
    run.stop_request.uninstall()  # pytest gets its signal handlers back


def make_reward_model(architecture: str, folder: Path, labels: int = 1, **more) -> Path:
    """Random weights; the scores have a standard deviation of about 2."""
    tokenizer = make_tokenizer(TOKENIZER_OF[architecture])
    config = make_config(architecture, tokenizer)
    config.num_labels = labels
    config.plainpref = {"base_model": architecture, "history": ["sft"], "score_bias": BIAS}
    for name, value in more.items():
        setattr(config, name, value)
    torch.manual_seed(11)
    model = AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():
        model.score.weight.normal_(std=0.4)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def reward_models(tmp_path_factory):
    """reward_models(architecture) -> a folder, made once."""
    base = tmp_path_factory.mktemp("reward-models")

    def get(architecture: str) -> Path:
        folder = base / architecture
        return folder if folder.exists() else make_reward_model(architecture, folder)

    return get


def load(folder: Path | str, run, dtype: str = "float32", frozen: bool = False, **more):
    args = common.Args(model=str(folder), dtype=dtype, **more)
    return score_model.load_score_model(args, run, name="model", frozen=frozen)


def load_reward(name: Path | str, tokenizer, run) -> rewards.Reward:
    return rewards.load_reward(str(name), tokenizer, common.Args(dtype="float32"), run)


def plain_model(folder):
    """As anyone loads it; without a padding token it reads the last token of a text, as it is."""
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    model.config.pad_token_id = None
    return model


@torch.no_grad()
def plain_score(model, *parts: list[int] | np.ndarray) -> float:
    """Of the joined ids, alone in their batch."""
    ids = torch.tensor([[int(i) for part in parts for i in part]])
    return model(input_ids=ids, use_cache=False).logits.item()


def random_rows(shapes, pad: int | None = None) -> list[common.Row]:
    """With `pad`, that id is inside prompts and responses."""
    rng, rows = np.random.default_rng(0), []
    for n, lengths in shapes:
        ids = [rng.integers(3, 300, length).astype(np.int32) for length in (n, *lengths)]
        for part in ids if pad is not None else ():
            part[1:-1:3] = pad
        rows.append(common.Row(ids[0], ids[1:], ids[0]))
    return rows


def collated(rows: list[common.Row], shared_for=None):
    """`shared_for`: the config of a model whose responses share their prompts."""
    return common.collate(rows, list(range(len(rows))), torch.device("cpu"), shared_for)


# -- where a score is read


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_scores_and_values_are_those_of_plain_transformers(architecture, reward_models, run):
    """A score is read at the last token of a response, a value before each token, wherever they are
    and whatever is around them.
    """
    folder = reward_models(architecture)
    model, truth = load(folder, run), plain_model(folder)
    assert model.score_bias == BIAS
    rows = random_rows(ROWS, 0 if architecture == "gpt2" else 2)
    expected = [plain_score(truth, r.prompt, y) - BIAS for r in rows for y in r.responses]
    expected = torch.tensor(expected)
    assert expected.std() > 0.5  # no two responses could be swapped
    for shared_for in (None, model.config):
        batch = collated(rows, shared_for)
        scores = model(batch)  # (B, K)
        assert scores.dtype == torch.float32 and scores.shape == batch.lengths.shape
        torch.testing.assert_close(scores[batch.lengths > 0], expected, **CLOSE)
        values = model(batch, per_token=True)  # (B, K, T)
        assert values.shape == batch.shape
        for b, row in enumerate(rows):
            for k, y in enumerate(row.responses):
                assert (values[b, k, len(y) :] == 0).all()
                for t in {0, len(y) // 2, len(y) - 1}:
                    value = plain_score(truth, row.prompt, y[:t]) - BIAS
                    assert values[b, k, t].item() == pytest.approx(value, abs=1e-5)


def test_a_language_model_gets_a_head_that_depends_on_the_seed_alone(checkpoints, run, capsys):
    heads = []
    for drawn_before, seed in ((0, 5), (3, 5), (0, 6)):
        torch.manual_seed(drawn_before)
        model = load(checkpoints("llama"), run)
        assert model.score_bias == 0 and model.lm.score.bias is None
        score_model.fresh_head(model, 0.25, seed)
        heads.append(model.lm.score.weight.detach().clone())
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
    assert torch.cat(heads[1:]).std() == pytest.approx(0.25, rel=0.3)  # of 64 numbers
    truth = AutoModelForCausalLM.from_pretrained(checkpoints("llama"))
    body = dict(model.lm.base_model.named_parameters())
    assert all(torch.equal(body[n], p) for n, p in truth.base_model.named_parameters())
    assert "newly initialized" not in "".join(capsys.readouterr())


@torch.no_grad()
def test_a_frozen_model(reward_models, run):
    """Matrices of layers in 16 bits, the rest as it was: its scores are close to exact ones."""
    batch = collated(random_rows(ROWS))
    exact, low = (load(reward_models("gpt2"), run, x, frozen=True) for x in ("float32", "bfloat16"))
    for name, p in low.lm.named_parameters():
        wide = p.dim() == 1 or ".h." not in name  # norms, embeddings and the head
        assert p.dtype == (torch.float32 if wide else torch.bfloat16), name
    errors = (low(batch) - exact(batch))[batch.lengths > 0]
    assert errors.dtype == torch.float32 and 1e-4 < errors.std() < 5e-2


def test_labels(checkpoints, reward_models, tmp_path, run):
    assert score_model.labels_of(str(checkpoints("llama"))) == 0
    assert score_model.labels_of(str(reward_models("llama"))) == 1
    assert score_model.labels_of(str(make_reward_model("llama", tmp_path / "two", 2))) == 2
    with pytest.raises(common.UserError, match="tiny-untrained"):
        load("tiny-untrained", run)


@pytest.mark.parametrize("vocabulary", (320, None))
def test_padding_is_never_an_end(vocabulary, tmp_path, run):
    """GPT-2 pads with its EOS: the tokenizer gets another token, in an unused row of the embeddings
    or in a new one.
    """
    vocabulary = vocabulary or len(make_tokenizer("pad-eos"))
    make_reward_model("gpt2", tmp_path, vocab_size=vocabulary)
    model, tokenizer = load(tmp_path, run), common.load_tokenizer(str(tmp_path))
    before = model.lm.get_input_embeddings().weight.detach().clone()
    for _ in range(2):  # the second call changes nothing
        score_model.give_pad_token(model, tokenizer)
        new = tokenizer.pad_token_id
        assert new == model.config.pad_token_id == len(tokenizer) - 1
        assert new not in tokenizer.stop_ids and tokenizer.eos_token_id in tokenizer.stop_ids
    after = model.lm.get_input_embeddings().weight
    assert len(after) == model.config.vocab_size == max(vocabulary, new + 1)
    assert torch.equal(after[: len(before)], before) and after.requires_grad
    # A policy with the tokenizer as it was can be scored by this model: only padding was added.
    assert rewards.reads_tokens_of(tokenizer, common.load_tokenizer(str(tmp_path)))


# -- a reward model as --reward

PROMPTS = ["the cat sat?", "and then ü?", "far off", "a mat and the other cat ran into wood?"]
ANSWERS = [" on the mat", " another warm dog", " no", " so"]
ENDED = [True, True, False, True]


def as_ids(prompts: list[str], answers: list[str], tokenizer, ended: list[bool] = ENDED):
    """(prompts, responses) as a policy samples them."""
    encode = lambda text: tokenizer(text, add_special_tokens=False).input_ids  # noqa: E731
    ends = [[tokenizer.eos_token_id] * end for end in ended]
    return (
        [np.array(tokenizer.bos + encode(text), np.int32) for text in prompts],
        [np.array(encode(text) + e, np.int32) for text, e in zip(answers, ends, strict=False)],
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_ids_are_scored_as_they_were_sampled(architecture, reward_models, run):
    folder = reward_models(architecture)
    tokenizer = common.load_tokenizer(str(folder))
    reward = load_reward(folder, tokenizer, run)
    assert not any(p.requires_grad for p in reward.model.parameters())
    assert reward.values_from == str(folder)
    prompts, answers = as_ids(PROMPTS, ANSWERS, tokenizer)
    answers[0] = np.array([260, 5, 6, 5], np.int32)  # not the ids that its text would have
    scores = reward(prompts, answers)
    assert scores.dtype == torch.float64 and scores.shape == (4,) and not scores.requires_grad
    truth = plain_model(folder)
    expected = [plain_score(truth, p, y) - BIAS for p, y in zip(prompts, answers, strict=True)]
    assert scores.tolist() == pytest.approx(expected, abs=1e-5)


def test_scores_do_not_depend_on_who_else_is_scored(reward_models, run):
    """Also where responses share a prompt."""
    folder = reward_models("gemma2")
    reward = load_reward(folder, common.load_tokenizer(str(folder)), run)
    rows = random_rows([(2 + i % 17, (1 + i * 7 % 23,)) for i in range(40)])
    prompts, answers = [rows[i // 3].prompt for i in range(40)], [row.responses[0] for row in rows]
    assert len(rows) > score_model.SCORED_AT_ONCE
    scores = reward(prompts, answers)
    alone = torch.cat([reward(prompts[i : i + 1], answers[i : i + 1]) for i in range(40)])
    torch.testing.assert_close(alone, scores, **CLOSE)


@pytest.mark.parametrize("policy, theirs", [("qwen2", "llama"), ("llama", "qwen2")])
def test_another_tokenizer_reads_the_text(policy, theirs, reward_models, run, capsys):
    folder = reward_models(theirs)
    tokenizer, its = (common.load_tokenizer(str(reward_models(x))) for x in (policy, theirs))
    reward = load_reward(folder, tokenizer, run)
    assert "has another tokenizer" in capsys.readouterr().out and reward.values_from is None
    questions, answers = list(PROMPTS), [*ANSWERS[:3], ""]  # the last one ended at once
    if policy == "qwen2":
        questions[0] = tokenizer.apply_chat_template(
            [{"role": "user", "content": "Why?"}], tokenize=False, add_generation_prompt=True
        )
    scores = reward(*as_ids(questions, answers, tokenizer))
    truth, (prompts, responses) = plain_model(folder), as_ids(questions, answers, its)
    expected = [plain_score(truth, p, y) - BIAS for p, y in zip(prompts, responses, strict=True)]
    assert scores.tolist() == pytest.approx(expected, abs=1e-5)


def test_a_score_that_is_not_finite(reward_models, run):
    folder = str(reward_models("llama"))
    reward = load_reward(folder, tokenizer := common.load_tokenizer(folder), run)
    with torch.no_grad():
        reward.model.lm.score.weight[:] = math.inf
    with pytest.raises(common.UserError, match=f"--reward {folder} gave .* not finite, for row 1"):
        reward(*as_ids(PROMPTS, ANSWERS, tokenizer))


# -- a@b: what a language model has learned from preferences


@torch.no_grad()
def plain_logp(folder, prompt: np.ndarray, response: np.ndarray) -> float:
    """log pi(response | prompt), by plain Transformers."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    ids = torch.from_numpy(np.concatenate([prompt, response]).astype(np.int64))[None]
    logps = model(ids).logits[0].double().log_softmax(-1)
    return sum(float(logps[i - 1, ids[0, i]]) for i in range(len(prompt), ids.shape[1]))


@pytest.mark.parametrize("architecture, beta", (("llama", 0.25), ("gpt2", None)))
def test_two_language_models(architecture, beta, checkpoints, tmp_path, run, capsys):
    """beta, as config.json has it, times the log-ratio."""
    start, learned = checkpoints(architecture), tmp_path / "learned"
    model = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32)
    torch.manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    if beta:
        model.config.plainpref = {"base_model": "a", "history": ["dpo"], "beta": beta}
    model.save_pretrained(learned)
    AutoTokenizer.from_pretrained(start).save_pretrained(learned)
    tokenizer = common.load_tokenizer(str(start))
    reward = load_reward(f"{learned}@{start}", tokenizer, run)
    prompts, answers = as_ids(PROMPTS, ANSWERS, tokenizer)
    expected = [
        (beta or 1.0) * (plain_logp(learned, x, y) - plain_logp(start, x, y))
        for x, y in zip(prompts, answers, strict=True)
    ]
    assert max(map(abs, expected)) > 1e-2
    torch.testing.assert_close(reward(prompts, answers).tolist(), expected, rtol=0, atol=5e-5)
    assert reward.values_from is None
    assert f"{beta or 1.0} times the log-ratio" in capsys.readouterr().out
    with pytest.raises(common.UserError, match="the two models have different tokenizers"):
        load_reward(f"{learned}@{checkpoints('qwen2')}", tokenizer, run)


# -- the embedded task, and functions


def test_family(run, capsys):
    tokenizer, questions = common.load_tokenizer("tiny"), task.test_prompts(4)
    reward = load_reward("family", tokenizer, run)
    assert "the true reward of the embedded task" in capsys.readouterr().out
    answers = [" Ada", " Ben and Cid", " none", ""]
    scores = reward(*as_ids(questions, answers, tokenizer))
    assert scores.tolist() == task.reward(questions, answers)


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def tokenizer(reward_models):
    return common.load_tokenizer(str(reward_models("llama")))


def of_file(source: str, tokenizer, run, name: str = "score") -> rewards.Reward:
    Path("mine.py").write_text(source)
    return load_reward(f"mine.py:{name}", tokenizer, run)


def test_a_function_gets_texts(here, reward_models, run):
    """No BOS, no end; what a template wrote stays. All rows in one call. Data classes work."""
    tokenizer = common.load_tokenizer(str(reward_models("qwen2")))
    source = """
from __future__ import annotations
from dataclasses import dataclass

@dataclass
class Judge:
    weight: float

    def __call__(self, prompts, responses):
        self.seen = (prompts, responses)
        return (len(p) + self.weight * len(y) for p, y in zip(prompts, responses, strict=True))

score = Judge(0.125)
"""
    reward = of_file(source, tokenizer, run)
    answers = [" on the mat", " ü\n", "", " so"]
    questions = ["<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n", *PROMPTS[1:]]
    scores = reward(*as_ids(questions, answers, tokenizer))
    assert reward.function.seen == (questions, answers)
    expected = [len(p) + len(y) / 8 for p, y in zip(questions, answers, strict=True)]
    assert scores.tolist() == expected and scores.dtype == torch.float64


ROW_1 = "row 1 of 4: prompt ...'the cat sat?', response ' on the mat'"
ROW_3 = "row 3 of 4: prompt ...'far off', response ' no'"
MISTAKES = {  # what the function returns -> what the user reads
    "__import__('sys').exit(0)": f"raised SystemExit: 0, at {ROW_1}",
    "[1, 2, float('nan'), 4]": f"gave nan, which is not finite, for {ROW_3}",
    "[1, 2]": "returned 2 scores for 4 rows",
    "1.0": "must return a list of numbers, this is a float",
    "['good'] * 4": "must return a list of numbers, this is a list",
    "__import__('torch').zeros(4, 2)": "must return a list of numbers, this is a Tensor",
    "[1 / (len(y) - 3) for y in responses]": (
        f"raised ZeroDivisionError: division by zero, at {ROW_3}"
    ),
    "responses[0].missing": (
        f"raised AttributeError: 'str' object has no attribute 'missing', at {ROW_1}"
    ),
    "[1] if len(responses) == 1 else {}['together']": (
        "raised KeyError: 'together', on 4 rows together, on none of them alone"
    ),
}


@pytest.mark.parametrize("returned", MISTAKES)
def test_what_a_function_can_do_wrong(returned, here, tokenizer, run):
    source = f"def score(prompts, responses):\n    return {returned}\n"
    with pytest.raises(common.UserError) as error:
        of_file(source, tokenizer, run)(*as_ids(PROMPTS, ANSWERS, tokenizer))
    assert str(error.value) == f"--reward mine.py:score {MISTAKES[returned]}"


# -- what --reward cannot be

NAMES = {  # before anything is loaded
    "none.py:score": "--reward none.py:score: there is no file none.py",
    "mine.py": "--reward mine.py: which function of it? mine.py:NAME",
    "./nowhere": "--reward ./nowhere: there is no such folder",
    "empty": "--reward empty: no config.json in empty",
    "tiny@runs/none": "--reward runs/none: there is no such folder",
    "runs/none@tiny": "--reward runs/none: there is no such folder",
}


@pytest.mark.parametrize("reward", NAMES)
def test_what_reward_cannot_be(reward, here):
    Path("mine.py").write_text("def score(prompts, responses): return [0.0] * len(prompts)\n")
    Path("empty").mkdir()
    with pytest.raises(common.UserError) as error:
        rewards.check_reward(reward)
    assert str(error.value).startswith(NAMES[reward])
    for possible in ("family", "mine.py:score", "tiny@tiny-preferred", "somebody/reward-model"):
        rewards.check_reward(possible)


@pytest.mark.parametrize(
    "source, message",
    [
        ("score = 0.5", "there is no function score in mine.py"),
        ("raise SystemExit(0)", "importing it raised SystemExit: 0"),
        ("import nowhere", "importing it raised ModuleNotFoundError: No module named "),
        ("def score(:", "importing it raised SyntaxError: "),
    ],
)
def test_a_file_without_the_function(source, message, here, tokenizer, run):
    with pytest.raises(common.UserError) as error:
        of_file(source, tokenizer, run)
    assert str(error.value).startswith(f"--reward mine.py:score: {message}")


def test_models_that_are_no_reward_models(here, checkpoints, tokenizer, run):
    """A language model, two labels, and an encoder, whose head is of another kind."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=320, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, num_labels=1, max_position_embeddings=64,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(here / "bert")
    make_tokenizer("bos").save_pretrained(here / "bert")
    for folder, text in (
        (checkpoints("llama"), "not a reward model, .*this has 0.*a@b"),
        (make_reward_model("llama", here / "2", 2), "not a reward model, .*this has 2"),
        (here / "bert", "BertForSequenceClassification is not a decoder with a linear head"),
    ):
        with pytest.raises(common.UserError, match=f"{folder}.*{text}"):
            load_reward(folder, tokenizer, run)
