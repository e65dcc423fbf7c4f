"""Scores and values of a model with a head that gives one number, against plain Transformers, one
answer at a time; and whatever else can score, with all that can go wrong there.
"""

import math
import random
import signal
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TOKENIZER_OF, make_config, make_tokenizer
from test_logps import PAIRS, RAGGED, random_rows
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import common
import family
import scoring

ARCHITECTURES = ("llama", "gemma2", "gpt2", "qwen2")  # gpt2: padding is the end-of-sequence
CLOSE = {"rtol": 0, "atol": 1e-5}
BIAS = 0.375  # exact in any dtype


# -- helpers


@pytest.fixture(scope="module")
def run():
    """One process; pytest gets its signal handlers back."""
    run = common.Processes()
    yield run
    for number, handler in run.handlers.items():
        signal.signal(number, handler)


def make_reward_model(architecture: str, folder: Path, labels: int = 1, **more) -> Path:
    """Random weights; its scores are spread by about 2."""
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
    made: dict[str, Path] = {}

    def get(architecture: str) -> Path:
        if architecture not in made:
            folder = tmp_path_factory.mktemp("reward-models") / architecture
            made[architecture] = make_reward_model(architecture, folder)
        return made[architecture]

    return get


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


def rows_with_padding_inside(shapes, pad: int) -> list[common.Row]:
    """The padding id stands in every prompt and in every answer that is long enough."""
    rows = random_rows(shapes)
    for row in rows:
        for ids in (row.prompt, *row.responses):
            ids[len(ids) // 2 : len(ids) - 1] = np.where(
                np.arange(len(ids) // 2, len(ids) - 1) % 3 == 0, pad, ids[len(ids) // 2 : -1]
            )
            if len(ids) > 2:
                ids[1] = pad
    return rows


def collated(rows: list[common.Row], shared: bool = False, multiple_of: int = 1) -> common.Micro:
    data = common.Rows("test", rows)
    return common.collate(data, list(range(len(rows))), torch.device("cpu"), shared, multiple_of)


# -- where a score is read


@pytest.mark.parametrize("shapes", (PAIRS, RAGGED), ids=("pairs", "ragged"))
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_scores_are_those_of_plain_transformers(architecture, shapes, reward_models, run):
    """At the last token of each answer, wherever it stands and whatever is around it."""
    folder = reward_models(architecture)
    model, truth = (
        scoring.load_score_model(str(folder), "float32", run, name="m"),
        plain_model(folder),
    )
    assert model.share_prompt and model.score_bias == BIAS
    rows = rows_with_padding_inside(shapes, 0 if architecture == "gpt2" else 2)
    expected = [[plain_score(truth, r.prompt, y) - BIAS for y in r.responses] for r in rows]
    flat = torch.tensor([score for row in expected for score in row])
    assert flat.std() > 0.5  # no two answers could be exchanged
    for shared in (False, True):
        micro = collated(rows, shared)
        scores = scoring.response_scores(model, micro)  # (B, K)
        assert scores.dtype == torch.float32 and scores.shape == micro.lengths.shape
        torch.testing.assert_close(scores[micro.lengths > 0], flat, **CLOSE)
        more = collated(rows, shared, 64)  # padding on the right
        assert more.input_ids.shape[1] > micro.input_ids.shape[1]
        torch.testing.assert_close(
            scoring.response_scores(model, more)[micro.lengths > 0], flat, **CLOSE
        )
    plain = collated(rows)
    for k in range(plain.shape[1]):
        there = plain.lengths[:, k] > 0
        column = scoring.response_scores(model, plain.column(k))[:, 0]
        wanted = [row[k] for row in expected if len(row) > k]
        torch.testing.assert_close(column[there], torch.tensor(wanted), **CLOSE)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_the_value_of_a_token_is_read_before_it(architecture, reward_models, run):
    """What was known when it was chosen: of the first one, the prompt."""
    folder = reward_models(architecture)
    model, truth = (
        scoring.load_score_model(str(folder), "float32", run, name="m"),
        plain_model(folder),
    )
    rows = rows_with_padding_inside(RAGGED, 2)
    for shared in (False, True):
        micro = collated(rows, shared)
        values = scoring.token_values(model, micro)  # (B, K, T)
        assert values.shape == micro.shape
        for b, row in enumerate(rows):
            for k in range(micro.shape[1]):
                y = row.responses[k].tolist() if k < len(row.responses) else []
                assert (values[b, k, len(y) :] == 0).all()
                for t in {0, len(y) // 2, len(y) - 1} if y else ():
                    expected = plain_score(truth, row.prompt, y[:t]) - BIAS
                    assert values[b, k, t].item() == pytest.approx(expected, abs=1e-5)


def test_gradients_reach_the_answer_alone(reward_models, run):
    """The score of one answer does not depend on the others behind the same prompt."""
    model = scoring.load_score_model(str(reward_models("llama")), "float32", run, name="m")
    micro = collated(random_rows(((4, (3, 5)),)), shared=True)
    ids = model.get_input_embeddings()(micro.input_ids).detach().requires_grad_(True)
    model.get_input_embeddings().register_forward_hook(lambda *_: ids)
    scoring.response_scores(model, micro)[0, 1].backward()
    reached = (ids.grad[0] != 0).any(-1).tolist()
    assert reached == [True] * 4 + [False] * 3 + [True] * 5


def test_a_language_model_gets_a_head_that_depends_on_the_seed_alone(checkpoints, run, capsys):
    import transformers

    heads = []
    for drawn_before, seed in ((0, 5), (3, 5), (0, 6)):
        torch.manual_seed(drawn_before)
        model = scoring.load_score_model(str(checkpoints("llama")), "float32", run, name="m")
        assert model.score_bias == 0 and model.score.bias is None
        scoring.fresh_head(model, 0.25, seed)
        heads.append(model.score.weight.detach().clone())
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
    draws = torch.cat(heads[1:]).flatten()  # 64 of them
    assert draws.std() == pytest.approx(0.25, rel=0.3) and abs(draws.mean()) < 0.1
    scoring.fresh_head(model, 0.0, 6)
    assert (model.score.weight == 0).all()
    truth = transformers.AutoModelForCausalLM.from_pretrained(checkpoints("llama"))
    body = dict(model.base_model.named_parameters())
    assert all(torch.equal(body[n], p) for n, p in truth.base_model.named_parameters())
    assert "newly initialized" not in "".join(capsys.readouterr())


def test_adapters_begin_beside_the_head_that_was_saved(reward_models, run):
    """To the last bit: it is trained whole, so it is not rounded as what is frozen is."""
    folder = reward_models("llama")
    model = scoring.load_score_model(
        str(folder), "bfloat16", run, "auto", False, True, False, False, False, 4, name="value"
    )
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in model.named_parameters() if ".lora_" in n} | {"score.weight"}
    assert model.score.weight.dtype == torch.float32
    assert torch.equal(model.score.weight, plain_model(folder).score.weight)


def test_the_untrained_model_has_no_answers_to_compare(run):
    with pytest.raises(common.UserError, match="tiny-untrained"):
        scoring.load_score_model("tiny-untrained", "float32", run, name="m")


def test_labels(checkpoints, reward_models, tmp_path):
    assert scoring.labels_of(str(checkpoints("llama"))) == 0
    assert scoring.labels_of(str(reward_models("llama"))) == 1
    assert scoring.labels_of(str(make_reward_model("llama", tmp_path / "two", 2))) == 2


# -- padding that other libraries look for


@pytest.mark.parametrize("spare", (True, False))
def test_padding_is_never_an_end(spare, tmp_path, run):
    """GPT-2 pads with its end: it gets a token of its own, in a spare row or in a new one."""
    vocabulary = 320 if spare else len(make_tokenizer("pad-eos"))
    make_reward_model("gpt2", tmp_path / "m", vocab_size=vocabulary)
    model = scoring.load_score_model(str(tmp_path / "m"), "float32", run, name="m")
    tokenizer = common.load_tokenizer(str(tmp_path / "m"), 64)
    before = model.get_input_embeddings().weight.detach().clone()
    rows = random_rows(PAIRS)
    for row in rows:
        row.responses = [ids % 200 for ids in row.responses]
        row.prompt = row.prompt % 200
    micro = collated(rows)
    scores = scoring.response_scores(model, micro)
    scoring.give_pad_token(model, tokenizer)
    new = tokenizer.pad_token_id
    assert new == model.config.pad_token_id == len(tokenizer) - 1
    assert new not in tokenizer.stop_ids and tokenizer.eos_token_id in tokenizer.stop_ids
    after = model.get_input_embeddings().weight
    assert len(after) == model.config.vocab_size == max(vocabulary, new + 1)
    assert torch.equal(after[: len(before)], before) and after.requires_grad
    assert len(after) == len(before) or (after[new] == 0).all()
    assert torch.equal(scoring.response_scores(model, micro), scores)
    scoring.give_pad_token(model, tokenizer)  # has one now
    assert tokenizer.pad_token_id == new

    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    other = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved").eval()
    ids = torch.tensor([[5, 6, 7, 0], [8, 0, new, new]])  # 0 is the end
    with torch.no_grad():
        padded = other(input_ids=ids, attention_mask=(ids != new).long()).logits[:, 0]
    truth = plain_model(tmp_path / "saved")
    alone = [plain_score(truth, [5, 6, 7, 0]), plain_score(truth, [8, 0])]
    torch.testing.assert_close(padded, torch.tensor(alone), **CLOSE)


def test_a_padding_token_of_its_own_is_kept(reward_models, run):
    model = scoring.load_score_model(str(reward_models("llama")), "float32", run, name="m")
    tokenizer = common.load_tokenizer(str(reward_models("llama")), 64)
    scoring.give_pad_token(model, tokenizer)
    assert tokenizer.pad_token == "<pad>" and model.config.pad_token_id == tokenizer.pad_token_id
    assert len(model.get_input_embeddings().weight) == 320


def test_a_score_bias_stands_in_the_config(reward_models, checkpoints, run):
    model = scoring.load_score_model(str(reward_models("llama")), "float32", run, name="m")
    scoring.set_score_bias(model, -1.5, "other")
    assert model.config.plainpref["history"] == ["sft"]  # what it was made from stays
    assert model.config.plainpref["base_model"] == "llama"
    assert model.config.plainpref["score_bias"] == model.score_bias == -1.5
    model = scoring.load_score_model(str(checkpoints("llama")), "float32", run, name="m")
    scoring.set_score_bias(model, 2.0, "gemma-2-2b")
    new = {"base_model": "gemma-2-2b", "history": [], "score_bias": 2.0}
    assert model.config.plainpref == new


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_a_model_that_is_only_asked(architecture, reward_models, run):
    """Matrices in 16 bits, everything else as it was; no gradients. Its scores are about as far
    from exact ones as those of autocast, which has the whole matrices beside it.
    """
    folder, micro = str(reward_models(architecture)), collated(random_rows(RAGGED + PAIRS))
    exact, cast, low = (
        scoring.load_score_model(folder, dtype, run, name="m")
        for dtype in ("float32", "bfloat16", "bfloat16")
    )
    scoring.freeze(low)
    for name, p in low.named_parameters():
        wide = p.dim() == 1 or name == "score.weight"  # norms and biases are vectors
        assert p.dtype == (torch.float32 if wide else torch.bfloat16), name
        assert not p.requires_grad
    there = micro.lengths > 0
    expected, by_cast, scores = (
        scoring.response_scores(model, micro)[there] for model in (exact, cast, low)
    )
    assert scores.dtype == torch.float32
    errors = [(x - expected).square().mean().sqrt() / expected.std() for x in (by_cast, scores)]
    assert 1e-4 < errors[1] < min(2e-2, 1.5 * errors[0])
    same = scoring.freeze(exact)
    assert {p.dtype for p in same.parameters()} == {torch.float32}


# -- a reward model as --reward


def tokens(texts: list[str], tokenizer, end: bool | list[bool] = False) -> list[np.ndarray]:
    ends = end if isinstance(end, list) else [end] * len(texts)
    found = []
    for text, ended in zip(texts, ends, strict=True):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        found.append(np.array(ids + [tokenizer.eos_token_id] * ended, np.int32))
    return found


def asked(texts: list[str], tokenizer) -> list[np.ndarray]:
    """Prompts, with BOS where the model has one."""
    bos = np.array(tokenizer.bos, np.int32)
    return [np.concatenate([bos, ids]) for ids in tokens(texts, tokenizer)]


PROMPTS = ["the cat sat?", "and then ü?", "far off", "a mat and the other cat ran into wood?"]
ANSWERS = [" on the mat", " another warm dog", " no", " so"]
ENDED = [True, True, False, True]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_ids_are_scored_as_they_were_sampled(architecture, reward_models, run, monkeypatch):
    folder = reward_models(architecture)
    tokenizer = common.load_tokenizer(str(folder), 64)
    reward = scoring.load_reward(str(folder), tokenizer, run, "float32")
    assert reward.same_tokens and not any(p.requires_grad for p in reward.model.parameters())
    monkeypatch.setattr(reward, "as_its_tokens", None)  # never asked
    prompts, answers = asked(PROMPTS, tokenizer), tokens(ANSWERS, tokenizer, ENDED)
    # An answer in other tokens than its text would have.
    answers[0] = np.array([*tokens([" on"], tokenizer)[0], *tokens([" the mat"], tokenizer)[0][:1]])
    scores = reward(prompts, answers)
    assert scores.dtype == torch.float64 and scores.shape == (4,) and not scores.requires_grad
    truth = plain_model(folder)
    expected = [plain_score(truth, p, y) - BIAS for p, y in zip(prompts, answers, strict=True)]
    assert scores.tolist() == pytest.approx(expected, abs=1e-5)


def test_a_policy_without_the_padding_token_of_its_reward_model(tmp_path, run):
    """The one thing that reward_model.py may add to a tokenizer makes it no other one."""
    make_reward_model("gpt2", tmp_path / "policy")
    tokenizer = common.load_tokenizer(str(tmp_path / "policy"), 64)
    theirs = common.load_tokenizer(str(tmp_path / "policy"), 64)
    model = scoring.load_score_model(str(tmp_path / "policy"), "float32", run, name="m")
    scoring.give_pad_token(model, theirs)
    model.save_pretrained(tmp_path / "reward")
    theirs.save_pretrained(tmp_path / "reward")
    reward = scoring.load_reward(str(tmp_path / "reward"), tokenizer, run, "float32")
    assert reward.same_tokens


def test_scores_do_not_depend_on_who_else_is_scored(reward_models, run):
    folder = str(reward_models("gemma2"))
    tokenizer = common.load_tokenizer(folder, 64)
    reward = scoring.load_reward(folder, tokenizer, run, "float32")
    rows = random_rows([(2 + i % 17, (1 + i * 7 % 23,)) for i in range(40)])
    prompts, answers = [row.prompt for row in rows], [row.responses[0] for row in rows]
    assert len(rows) > scoring.SCORED_AT_ONCE
    scores = reward(prompts, answers)
    backwards = reward(prompts[::-1], answers[::-1]).flip(0)
    alone = torch.cat([reward(prompts[i : i + 1], answers[i : i + 1]) for i in range(0, 40, 3)])
    torch.testing.assert_close(backwards, scores, **CLOSE)
    torch.testing.assert_close(alone, scores[::3], **CLOSE)
    assert scores.std() > 0.3


@pytest.mark.parametrize("policy, theirs", [("qwen2", "llama"), ("llama", "qwen2")])
def test_another_tokenizer_reads_the_text(policy, theirs, reward_models, run, capsys):
    """The text that the policy saw and wrote, in the tokens of the reward model."""
    folder = reward_models(theirs)
    tokenizer = common.load_tokenizer(str(reward_models(policy)), 64)
    its = common.load_tokenizer(str(folder), 64)
    capsys.readouterr()
    reward = scoring.load_reward(str(folder), tokenizer, run, "float32")
    told = capsys.readouterr().out
    assert "has another tokenizer: reads the text of prompts and answers" in told
    assert ("as the policy's chat template wrote it" in told) == (policy == "qwen2")
    questions = list(PROMPTS)
    if policy == "qwen2":
        questions[0] = tokenizer.apply_chat_template(
            [{"role": "user", "content": "Why?"}], tokenize=False, add_generation_prompt=True
        )
    answers = [*ANSWERS[:3], ""]  # ended at once
    scores = reward(asked(questions, tokenizer), tokens(answers, tokenizer, ENDED))
    truth, expected = plain_model(folder), []
    for question, answer, ended in zip(questions, answers, ENDED, strict=True):
        ids = [*its.bos, *its(question, add_special_tokens=False).input_ids]
        ids += its(answer, add_special_tokens=False).input_ids + [its.eos_token_id] * ended
        expected.append(plain_score(truth, ids) - BIAS)
    assert scores.tolist() == pytest.approx(expected, abs=1e-5)


def test_a_text_that_is_too_long_for_the_reward_model(reward_models, run, tmp_path):
    """BOS, the end of the prompt and the answer stay."""
    folder = make_reward_model("llama", tmp_path / "short", max_position_embeddings=16)
    tokenizer, its = (common.load_tokenizer(str(f), 1) for f in (reward_models("qwen2"), folder))
    reward = scoring.load_reward(str(folder), tokenizer, run, "float32")
    prompts, answers = ["zyxw" * 5, "zyxw"], [" abc", "zyxw" * 9]
    given = asked(prompts, tokenizer), tokens(answers, tokenizer, [True, False])
    seen = reward.as_its_tokens(*given)
    plain = [its(text, add_special_tokens=False).input_ids for text in (*prompts, *answers)]
    answer = [*plain[2], its.eos_token_id]
    assert seen[0][0].tolist() == its.bos + plain[0][len(answer) - 15 :]
    assert seen[1][0].tolist() == answer
    assert (seen[0][1].tolist(), seen[1][1].tolist()) == (its.bos, plain[3][:15])
    truth = plain_model(folder)
    expected = [plain_score(truth, p, y) - BIAS for p, y in zip(*seen, strict=True)]
    assert reward(*given).tolist() == pytest.approx(expected, abs=1e-5)


def test_a_model_that_gives_no_number(reward_models, run):
    folder = str(reward_models("llama"))
    tokenizer = common.load_tokenizer(folder, 64)
    reward = scoring.load_reward(folder, tokenizer, run, "float32")
    given = asked(PROMPTS, tokenizer), tokens(ANSWERS, tokenizer, True)
    with torch.no_grad():
        reward.model.score.weight[:] = math.inf
    with pytest.raises(common.UserError) as error:
        reward(*given)
    assert str(error.value) in [
        f"--reward {folder} gave {number}, which is no finite number, for row 1 of 4: "
        "prompt ...'the cat sat?', response ' on the mat'"
        for number in ("nan", "inf", "-inf")
    ]


# -- the embedded task, and functions


def test_family(run, capsys):
    import family

    tokenizer = common.load_tokenizer("tiny", 160)
    reward = scoring.load_reward("family", tokenizer, run, "float32")
    assert "family: the true reward" in capsys.readouterr().out
    prompts = family.test_prompts(6)
    answers = [" Ada", " Ben and Cid", " none", "", " Eva", " Fay Gus"]
    scores = reward(asked(prompts, tokenizer), tokens(answers, tokenizer, True))
    assert scores.tolist() == family.reward(prompts, answers)
    assert len(set(scores.tolist())) > 1


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def of_file(source: str, tokenizer, run, name: str = "score") -> scoring.Reward:
    Path("mine.py").write_text(source)
    return scoring.load_reward(f"mine.py:{name}", tokenizer, run, "float32")


@pytest.fixture(scope="module")
def bos_tokenizer(reward_models):
    return common.load_tokenizer(str(reward_models("llama")), 64)


@pytest.mark.parametrize("policy", ("llama", "qwen2", "gpt2"))
def test_a_function_gets_texts(policy, here, reward_models, run, capsys):
    """No BOS, no end; what a template wrote stays. All rows in one call."""
    tokenizer = common.load_tokenizer(str(reward_models(policy)), 64)
    source = """
seen = []
def score(prompts, responses):
    seen.append((prompts, responses))
    return [len(p) + len(y) / 8 for p, y in zip(prompts, responses, strict=True)]
"""
    reward = of_file(source, tokenizer, run)
    assert "score of mine.py, called by the main process" in capsys.readouterr().out
    questions, answers = list(PROMPTS), [" on the mat", " ü\n", "", " so"]
    if policy == "qwen2":
        questions[1] = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    scores = reward(asked(questions, tokenizer), tokens(answers, tokenizer, ENDED))
    (call,) = reward.function.__globals__["seen"]
    assert call == (questions, answers)
    assert type(call[0]) is type(call[1]) is list and {type(t) for t in call[0]} == {str}
    expected = [len(p) + len(y) / 8 for p, y in zip(questions, answers, strict=True)]
    assert scores.tolist() == expected and scores.dtype == torch.float64


@pytest.mark.parametrize(
    "given",
    [
        "[1, 2.5, True, -3]",
        "(1, 2.5, 1, -3)",
        "__import__('numpy').array([1, 2.5, 1, -3])",
        "__import__('torch').tensor([1, 2.5, 1, -3])",
        "__import__('torch').tensor([[1], [2.5], [1], [-3]])",
        "(x for x in [1, 2.5, 1, -3])",
    ],
)
def test_numbers_come_in_many_forms(given, here, bos_tokenizer, run):
    reward = of_file(f"def score(prompts, responses):\n    return {given}\n", bos_tokenizer, run)
    scores = reward(asked(PROMPTS, bos_tokenizer), tokens(ANSWERS, bos_tokenizer, ENDED))
    assert scores.tolist() == [1, 2.5, 1, -3] and not scores.requires_grad


ROW_3 = "row 3 of 4: prompt ...'far off', response ' no'"
NOT_FINITE = "which is no finite number, for " + ROW_3
MISTAKES = {  # what the function does with its rows, and what is said
    "NaN": ("[1, 2, float('nan'), 4]", f"gave nan, {NOT_FINITE}"),
    "inf": ("[1, 2, float('-inf'), float('nan')]", f"gave -inf, {NOT_FINITE}"),
    "too few": ("[1, 2]", "gave 2 scores for 4 rows"),
    "too many": ("[1] * 5", "gave 5 scores for 4 rows"),
    "a number": ("1.0", "must give a list of numbers, this is a float"),
    "nothing": ("None", "must give a list of numbers, this is a NoneType"),
    "texts": ("['good'] * 4", "must give a list of numbers, this is a list"),
    "a dict": ("dict.fromkeys(responses, 1.0)", "must give a list of numbers, this is a dict"),
    "a matrix": (
        "__import__('torch').zeros(4, 2)", "must give a list of numbers, this is a Tensor",
    ),
    "more than a number can hold": (
        "[1, 2, 10**400, 4]", "must give a list of numbers, this is a list",
    ),
    "an exception of one row": (
        "[1 / (len(y) - 3) for y in responses]",
        f"raised ZeroDivisionError: division by zero, at {ROW_3}",
    ),
    "an exception while it gives them": (
        "(1 / (len(y) - 3) for y in responses)",
        f"raised ZeroDivisionError: division by zero, at {ROW_3}",
    ),
    "an exception of all rows": (
        "responses[0].missing",
        "raised AttributeError: 'str' object has no attribute 'missing', at "
        "row 1 of 4: prompt ...'the cat sat?', response ' on the mat'",
    ),
    "an exception without words": (
        "next(iter(()))",
        "raised StopIteration: StopIteration, at "
        "row 1 of 4: prompt ...'the cat sat?', response ' on the mat'",
    ),
    "an exception of none alone": (
        "[1] if len(responses) == 1 else {}['together']",
        "raised KeyError: 'together', on 4 rows together, on none of them alone",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_what_a_function_can_do_wrong(name, here, bos_tokenizer, run):
    given, said = MISTAKES[name]
    reward = of_file(f"def score(prompts, responses):\n    return {given}\n", bos_tokenizer, run)
    with pytest.raises(common.UserError) as error:
        reward(asked(PROMPTS, bos_tokenizer), tokens(ANSWERS, bos_tokenizer, ENDED))
    assert str(error.value) == f"--reward mine.py:score {said}"


def test_a_long_row_is_named_by_the_end_of_its_prompt(here, bos_tokenizer, run):
    source = "def score(prompts, responses):\n    return [float('nan')]\n"
    reward = of_file(source, bos_tokenizer, run)
    with pytest.raises(common.UserError) as error:
        reward(asked(["zyxw" * 90], bos_tokenizer), tokens(["x\n" * 90], bos_tokenizer, True))
    assert str(error.value).endswith(
        f"for row 1 of 1: prompt ...{'zyxw' * 20!r}, response {chr(10).join('x' * 40) + chr(10)!r}"
    )


@pytest.mark.parametrize("name", ["mine.py", "common.py"])
def test_a_file_may_hold_what_a_module_may(name, here, bos_tokenizer, run):
    """Data classes look for their module by its name; and it may be the name of one of ours."""
    source = """
from __future__ import annotations
from dataclasses import dataclass

@dataclass
class Judge:
    weight: float

    def __call__(self, prompts: list[str], responses: list[str]) -> list[float]:
        return [self.weight] * len(prompts)

score = Judge(0.5)
"""
    Path(name).write_text(source)
    reward = scoring.load_reward(f"{name}:score", bos_tokenizer, run, "float32")
    assert reward(asked(["a"], bos_tokenizer), tokens(["b"], bos_tokenizer)).tolist() == [0.5]
    assert sys.modules["common"] is common


# -- what --reward cannot be, named before anything is loaded

NAMES = {
    "no such file": ("none.py:score", "--reward none.py:score: there is no file none.py"),
    "a file alone": ("mine.py", "--reward mine.py: which function of it? mine.py:NAME"),
    "no name": ("mine.py:", "--reward mine.py:: '' is no name of a function"),
    "not a name": ("mine.py:1+1", "--reward mine.py:1+1: '1+1' is no name of a function"),
    "no such folder": ("./nowhere", "--reward ./nowhere: there is no such folder"),
    "no such run": ("runs/none", "--reward runs/none: there is no such folder"),
    "a folder that is no model": (
        "empty",
        "--reward empty: no config.json in empty. Is this a folder that a run saved?",
    ),
}


@pytest.mark.parametrize("name", NAMES)
def test_what_reward_cannot_be(name, here, bos_tokenizer, run):
    reward, said = NAMES[name]
    Path("mine.py").write_text("def score(prompts, responses): return [0.0] * len(prompts)\n")
    Path("empty").mkdir()
    with pytest.raises(common.UserError) as error:
        scoring.check_reward(reward)
    assert str(error.value) == said


def test_what_reward_can_be(here, reward_models):
    Path("mine.py").write_text("")
    for reward in ("family", "mine.py:score", str(reward_models("llama")), "somebody/reward-model"):
        scoring.check_reward(reward)


@pytest.mark.parametrize(
    "source, name, said",
    [
        ("", "score", "there is no function score in mine.py"),
        ("score = 0.5", "score", "there is no function score in mine.py"),
        ("import nowhere", "score", "importing it raised ModuleNotFoundError: No module named "),
        ("def score(:", "score", "importing it raised SyntaxError: "),
        ("1 / 0", "score", "importing it raised ZeroDivisionError: division by zero"),
    ],
)
def test_a_file_without_the_function(source, name, said, here, bos_tokenizer, run):
    with pytest.raises(common.UserError) as error:
        of_file(source, bos_tokenizer, run, name)
    assert str(error.value).startswith(f"--reward mine.py:{name}: {said}")


def test_models_that_are_no_reward_models(here, checkpoints, bos_tokenizer, run):
    for folder, labels in (
        (checkpoints("llama"), 0),
        (make_reward_model("llama", here / "2", 2), 2),
    ):
        with pytest.raises(common.UserError) as error:
            scoring.load_reward(str(folder), bos_tokenizer, run, "float32")
        assert str(error.value) == (
            f"--reward {folder}: not a reward model, which is an AutoModelForSequence"
            f"Classification with one label (this has {labels}); reward_model.py makes one"
            + "; or two language models a@b"
            * (labels == 0)
        )


def test_a_model_that_is_not_here(bos_tokenizer, run, monkeypatch):
    """The flag that is to blame is named, also by what looks for it on the hub."""
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for name in ("./nowhere", "nobody/nothing"):
        with pytest.raises(common.UserError) as error:
            scoring.load_reward(name, bos_tokenizer, run, "float32")
        assert str(error.value).startswith(f"--reward {name}: there is no such folder")


def test_a_row_that_is_scored_alone_is_not_moved_by_the_layout(reward_models, run):
    """`column` of a micro-batch has the ends of its own answers."""
    model = scoring.load_score_model(str(reward_models("llama")), "float32", run, name="m")
    micro = collated(random_rows(PAIRS))
    whole = scoring.response_scores(model, micro)
    wrong = replace(micro, ends=micro.ends - 1)
    assert (scoring.response_scores(model, wrong) - whole).abs().min() > 1e-3


# -- a@b: what a language model has learned from preferences


@torch.no_grad()
def plain_logp(folder, prompt: np.ndarray, answer: np.ndarray) -> float:
    """log pi(answer | prompt), by plain Transformers."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    ids = torch.from_numpy(np.concatenate([prompt, answer]).astype(np.int64))[None]
    logps = model(ids).logits[0].double().log_softmax(-1)
    at = range(len(prompt) - 1, ids.shape[1] - 1)
    return sum(float(logps[i, ids[0, i + 1]]) for i in at)


def preferred(start: Path, folder: Path, beta: float | None) -> Path:
    """What dpo.py might have left: other weights, and its beta in the config."""
    model = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32)
    torch.manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    if beta is not None:
        model.config.plainpref = {"base_model": "a", "history": ["dpo"], "beta": beta}
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(start).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("beta", (0.25, None))
@pytest.mark.parametrize("architecture", ("llama", "gpt2"))
def test_two_language_models(architecture, beta, checkpoints, tmp_path, run, capsys):
    """beta times the log-ratio; nothing a value network could begin from."""
    start = checkpoints(architecture)
    learned = preferred(start, tmp_path / "learned", beta)
    tokenizer = common.load_tokenizer(str(start), 1)
    reward = scoring.load_reward(f"{learned}@{start}", tokenizer, run, "float32")
    prompts = asked(["the cat?", "a dog ran far off?"], tokenizer)
    answers = tokens([" yes", " no the mat"], tokenizer, end=[True, False])
    expected = [
        (beta or 1.0) * (plain_logp(learned, x, y) - plain_logp(start, x, y))
        for x, y in zip(prompts, answers, strict=True)
    ]
    assert max(map(abs, expected)) > 1e-2
    torch.testing.assert_close(reward(prompts, answers).tolist(), expected, rtol=0, atol=2e-5)
    assert reward.values_from is None
    assert f"{beta or 1.0} times the log-ratio" in capsys.readouterr().out


def test_a_model_against_itself_scores_nothing(checkpoints, run):
    start = checkpoints("llama")
    tokenizer = common.load_tokenizer(str(start), 1)
    reward = scoring.load_reward(f"{start}@{start}", tokenizer, run, "float32")
    scores = reward(asked(["the cat?"], tokenizer), tokens([" yes"], tokenizer))
    assert scores.tolist() == [0.0]


def test_the_embedded_reward_knows_better_than_chance(run):
    """On 64 unseen questions: of two samples that differ in true reward it prefers the better."""
    tokenizer = common.load_tokenizer("tiny", 1)
    reward = scoring.load_reward("tiny-preferred@tiny", tokenizer, run, "float32")
    rng, prompts, answers, better = random.Random(0), [], [], []
    for text in family.test_prompts(64):
        names = text.split("?")[0].split()[-1]  # who asks is in no right answer
        right = family.write(family.right_answer(text))
        wrong = " " + rng.choice([n for n in (names, "Zoe") if n not in right])
        for answer, good in ((right, True), (wrong, False)):
            prompts.append(np.array(tokenizer(text).input_ids, np.int32))
            ids = tokenizer(answer, add_special_tokens=False).input_ids
            answers.append(np.array([*ids, tokenizer.eos_token_id], np.int32))
            better.append(good)
    scores = reward(prompts, answers)
    assert (scores[0::2] > scores[1::2]).double().mean() > 0.65


def test_two_models_of_which_one_is_not_there(here, checkpoints):
    start = checkpoints("llama")
    for name in (f"{start}@runs/none", f"runs/none@{start}"):
        with pytest.raises(common.UserError, match="--reward runs/none: there is no such folder"):
            scoring.check_reward(name)


def test_an_encoder_is_no_reward_model(run, tmp_path):
    """Its head is of another kind, and it would read what comes after."""
    from transformers import BertConfig, BertForSequenceClassification

    tokenizer = make_tokenizer("bos")
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, num_labels=1, max_position_embeddings=64,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(common.UserError, match="no decoder with a linear head.*file.py:function"):
        scoring.load_reward(str(tmp_path), tokenizer, run, "float32")
