"""The embedded task: two equal tokenizers, a correct reward, annotators as described."""

import hashlib
import itertools
import json
import math
import random
import re
from collections import Counter

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from family import model, task
from family.measure import measure, measure_scores
from family.model import SPECIAL
from family.task import NAMES, NOISE, RELATIONS, SYSTEMATIC, judge, reward, right_answer

# -- one vocabulary, two tokenizers


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """tiktoken's, and Hugging Face's, saved and loaded again."""
    folder = tmp_path_factory.mktemp("tokenizer")
    model.hf_tokenizer().save_pretrained(folder)
    return model.encoding(), AutoTokenizer.from_pretrained(folder)


# Where tokenizers differ: line ends, spaces, combining marks, joined emoji, letters that a
# case-insensitive [a-z] would match, and text that looks like a special token.
ODD = [
    *("\r\n", "\n", "\r", "\t", "   ", "\u0085", "\u00a0", "\u2028", "\u3000", "\u200b", "\ufeff"),
    *("\x00", "\x1c", "\x7f", "\uffff", "\ud7ff", "\ue000", "\U0010ffff", "e\u0301", "\ufb01"),
    *("\u0130", "\u0131", "\u017f", "\u212a", "\u4e2d\u6587", "\U0001f469\u200d\U0001f467"),
    *("<|end|", "|>", "<|begin", "'s", "'S", "\u2019", "1,234.5", "_", "\\", "\u200f\u0639"),
]


def test_equal_ids_for_any_text(tokenizers):
    """And every text can be decoded again."""
    rng, texts = random.Random(0), ["", *task.test_prompts(20)]
    words = [word[cut:] for word in (*model.WORDS, *texts) for cut in (0, 1, 2)]
    pieces = [*ODD, *SPECIAL, *words, *map(str.upper, words), *map(chr, range(128))]
    texts += ["".join(rng.choices(pieces, k=rng.randint(1, 12))) for _ in range(6000)]
    encoding, tokenizer = tokenizers
    ours = [encoding.encode(text, allowed_special="all") for text in texts]
    theirs = tokenizer(texts, add_special_tokens=False).input_ids
    for text, one, other in zip(texts, ours, theirs, strict=True):
        assert one == other, repr(text)
        assert encoding.decode(one) == tokenizer.decode(other) == text, repr(text)


def test_equal_ids_for_every_code_point(tokenizers):
    """Each character alone, between letters and after a space. (Planes 4 to 13 are empty.)"""
    encoding, tokenizer = tokenizers
    for start in (*range(0, 0x40000, 0x1000), 0xE0000, 0x10F000):
        points = [chr(p) for p in range(start, start + 0x1000) if not 0xD800 <= p < 0xE000]
        for text in ("".join(points), "a".join(points), " of ".join(points)):
            ids = tokenizer(text, add_special_tokens=False).input_ids
            assert encoding.encode(text) == ids, hex(start)


def test_tokens(tokenizers):
    """A word of the task is one token; a dialogue is BOS, then turns, with EOS after answers."""
    encoding, tokenizer = tokenizers
    words = {*NAMES, *" ".join(RELATIONS).split()}
    assert all(len(encoding.encode(f" {word}")) == 1 for word in words)
    assert len(tokenizer) == encoding.n_vocab
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == SPECIAL
    assert tokenizer.decode(tokenizer("Family").input_ids) == "<|begin|>Family"
    turns = [{"role": "user", "content": "Family."}, {"role": "assistant", "content": " Ada"}] * 2
    text = tokenizer.apply_chat_template(turns[:3], tokenize=False, add_generation_prompt=True)
    assert text == "<|begin|>Family. Ada<|end|>Family."


# -- the right answer, from an independent second definition


def relatives_in(description: str):
    """(people, stated facts, relations as functions: is y one of x's?), from `child of` alone."""
    order, stated = [], set()  # (Ada, "partner", Ben), as written
    for sentence in description.removeprefix("Family: ").removesuffix(".").split(". "):
        person, facts = sentence.split(": ")
        order.append(person)
        for fact in facts.split(", "):
            word, others = fact.split(" of ")
            stated |= {(person, word, other) for other in others.split(" and ")}
    parents = {x: {y for y in order if (x, "child", y) in stated} for x in order}
    are = {
        "parents": lambda x, y: y in parents[x],
        "children": lambda x, y: x in parents[y],
        "partner": lambda x, y: x != y and {x, y} in parents.values(),
        "siblings": lambda x, y: x != y and bool(parents[x] & parents[y]),
        "grandparents": lambda x, y: any(are["parents"](p, y) for p in parents[x]),
        "grandchildren": lambda x, y: are["grandparents"](y, x),
        "aunts and uncles": lambda x, y: any(are["siblings"](p, y) for p in parents[x]),
        "nieces and nephews": lambda x, y: are["aunts and uncles"](y, x),
        "cousins": lambda x, y: any(are["aunts and uncles"](x, p) for p in parents[y]),
    }
    return order, stated, are


def test_descriptions_and_right_answers():
    """A description is true and complete, and both definitions give the same answers."""
    count = Counter()
    for one, *_ in task.take(200, 3, "train"):
        order, stated, are = relatives_in(one.describe())
        assert order == one.people()
        assert 6 <= len(set(order)) == len(order) <= 14
        words = {"child": "parents", "parent": "children", "partner": "partner"}
        assert all(are[words[word]](x, y) for x, word, y in stated)
        for x, y in itertools.permutations(order, 2):
            assert ((x, "child", y) in stated) == are["parents"](x, y)
            assert ((x, "partner", y) in stated) == are["partner"](x, y)
        for relation, x in itertools.product(RELATIONS, order):
            prompt = task.prompt_of(one, relation, x)
            expected = [y for y in order if are[relation](x, y)]
            assert one.answer(relation, x) == right_answer(prompt) == expected, prompt
            count[relation] += bool(expected)
    assert all(count[relation] > 100 for relation in RELATIONS), count


COUSINS = (
    "Family: Ada: partner of Ben, parent of Cid and Dora. Ben: partner of Ada. "
    "Cid: child of Ada and Ben, partner of Eva, parent of Finn. Dora: child of Ada and Ben, "
    "partner of Gus, parent of Hana and Ida. Eva: partner of Cid. Finn: child of Cid and Eva. "
    "Gus: partner of Dora. Hana: child of Dora and Gus. Ida: child of Dora and Gus. "
    "Who are the cousins of Finn?"
)


def test_questions_by_hand():
    assert right_answer(COUSINS) == ["Hana", "Ida"]
    aunts = right_answer(COUSINS.replace("cousins", "aunts and uncles"))
    assert aunts == ["Dora"]  # not Gus, an uncle by marriage
    for prompt in ("", "Who are the parents of Ada?", "Family: Ada: partner of Ben.", "1 + 1 = ?"):
        with pytest.raises(ValueError, match="not a question"):
            right_answer(prompt)


# Right are Hana and Ida.
REWARDS = {" Hana, Ida": 1.0, " Ida, Hana": 1.0, " Gus": 0.0}
REWARDS |= {" Hana": 2 * 1 / (1 + 2)}  # precision 1, recall 1/2
REWARDS |= {" Hana, Ida, Gus": 2 * 2 / (3 + 2)}
REWARDS |= {" Hana, Hana": 2 * 1 / (2 + 2)}  # listed twice, right once
# Not a list of names: halved. "Ida." and " Hana" are not names.
REWARDS |= {"Hana, Ida": 0.5, " Hana, Ida.": 0.5 * 2 * 1 / (2 + 2)}
REWARDS |= {" Hana, Ida, 7": 0.5 * 2 * 2 / (3 + 2), " Hana, Ida, ": 0.5 * 2 * 2 / (3 + 2)}
REWARDS |= {" Hana, Ida\n": 0.5 * 2 * 1 / (2 + 2), "  Hana, Ida": 0.5 * 2 * 1 / (2 + 2)}
REWARDS |= dict.fromkeys((" Hana and Ida", " hana, ida", "", " ", ",", " Hana<|end|>"), 0.0)


def test_reward_by_hand():
    assert reward([COUSINS] * len(REWARDS), list(REWARDS)) == pytest.approx([*REWARDS.values()])


def test_reward_is_one_for_the_right_answer_alone():
    for one, relation, person, _ in task.take(500, 0, "test"):
        right = one.answer(relation, person)
        others = [name for name in one.people() if name not in right]
        answers = [right, right[1:], right + others[:1], right + right[:1], others[:1]]
        prompts = [task.prompt_of(one, relation, person)] * 5
        best, *less = reward(prompts, [task.write(names) for names in answers])
        assert best == 1.0 and all(0.0 <= score < 1.0 for score in less)
    with pytest.raises(ValueError):
        reward([COUSINS], [])


# -- rows


DIGESTS = {  # of the first 200 rows
    ("family", "train"): "f9701f27a8e6b012",
    ("family", "test"): "7e37b7ed12233657",
    ("family:off-policy", "train"): "3115b3444e49d2de",
    ("family:off-policy", "test"): "b37976a7c81a6c20",
}


@pytest.mark.parametrize("dataset, split", DIGESTS)
def test_rows_are_a_function_of_dataset_and_split(dataset, split):
    """Not of other random draws or of PYTHONHASHSEED, nor of the version of this code."""
    rows = list(itertools.islice(task.rows(dataset, split, "demonstration"), 200))
    digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    assert digest[:16] == DIGESTS[dataset, split]


def test_no_family_is_in_both_splits():
    """With any seed: demonstrations and measured questions never share a family."""
    described = {
        split: {one.describe() for seed in range(3) for one, *_ in task.take(n, seed, split)}
        for split, n in (("train", 1000), ("test", 150))
    }
    assert not described["train"] & described["test"]


def test_demonstrations_are_dialogues():
    for _, row in itertools.islice(task.rows("family", "train", "demonstration"), 200):
        roles = [message["role"] for message in row["messages"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        description, *questions = re.split(r"(?= Who )", "".join(
            m["content"] for m in row["messages"] if m["role"] == "user"))  # fmt: skip
        assert len(set(questions)) == len(questions) == len(roles) / 2
        assert all(right_answer(description + question) for question in questions)


def test_off_policy_pairs_are_right_against_wrong():
    for _, row in itertools.islice(task.rows("family:off-policy", "train", "pair"), 500):
        good, bad = reward([row["prompt"]] * 2, [row["chosen"], row["rejected"]])
        assert bad < good == 1.0
    with pytest.raises(ValueError, match="off-policy"):
        next(task.rows("family:of-policy", "train", "pair"))


# -- the annotators


def five_deviations(p: float, n: int) -> float:
    """How far the frequency in n independent draws may be from its probability."""
    return 5 * math.sqrt(p * (1 - p) / n)


def test_mistakes_are_systematic():
    """Most annotators answer the neighbouring relation, so the likeliest demonstration is wrong.
    For other relations they are right up to random mistakes.
    """
    made = {relation: Counter() for relation in RELATIONS}
    for one, relation, person, rng in task.take(9000, 0, "train"):
        right = one.answer(relation, person)
        written = task.demonstrate(one, relation, person, rng)
        assert re.fullmatch(r" [A-Z][a-z]+(, [A-Z][a-z]+)*", task.write(written))
        _, neighbours = SYSTEMATIC.get(relation, (0.0, ()))
        if relation == "siblings":
            expected = sorted([*right, person], key=one.people().index)
        else:
            expected = next(filter(None, (one.answer(x, person) for x in neighbours)), None)
        kind = "right" if written == right else "systematic" if written == expected else "random"
        made[relation][kind] += 1
    for relation, kinds in made.items():
        n, (rate, _) = kinds.total(), SYSTEMATIC.get(relation, (0.0, ()))
        assert n > 9000 / len(RELATIONS) / 2  # roughly: not every family has cousins
        # A random mistake may lead anywhere: dropping the asker from the siblings is right again.
        for kind, share in (("right", 1 - rate), ("systematic", rate)):
            p = share * (1 - task.RANDOM_MISTAKES)
            most = p + rate * task.RANDOM_MISTAKES
            around = five_deviations(p, n)
            assert p - around <= kinds[kind] / n <= most + around, (relation, kinds)
        assert relation not in SYSTEMATIC or kinds["systematic"] > n / 2, (relation, kinds)


ANSWERS = (" Hana, Ida", " Hana, Ida, Gus", " Hana", " Gus")


def test_judge_is_bradley_terry_and_plackett_luce():
    n, rng = 20_000, random.Random(0)
    rewards = reward([COUSINS] * 4, list(ANSWERS))
    scores = [judge(COUSINS, list(ANSWERS), rng) for _ in range(n)]
    assert scores[0] == judge(COUSINS, ANSWERS, random.Random(0)) != scores[1]
    for a, b in itertools.combinations(range(4), 2):
        p = 1 / (1 + math.exp(-(rewards[a] - rewards[b]) / NOISE))
        share = sum(row[a] > row[b] for row in scores) / n
        assert abs(share - p) < five_deviations(p, n), (ANSWERS[a], ANSWERS[b])
    # The first place is a softmax, and so is the second among those left.
    weights = [math.exp(r / NOISE) for r in rewards]
    ranked = Counter(tuple(sorted(range(4), key=lambda i: -row[i])[:2]) for row in scores)
    for first, second in itertools.permutations(range(4), 2):
        p = weights[first] / sum(weights) * weights[second] / (sum(weights) - weights[first])
        assert abs(ranked[first, second] / n - p) < five_deviations(p, n), (first, second)


def test_measure_with_known_answers():
    """The policy is always right, the start never."""
    calls = []

    def sample(which, texts, temperature, seed, label, samples=1):
        calls.append((which, temperature, seed))
        answers = right_answer if which == "policy" else lambda text: ["Nobody"]
        return [np.arange(len(which))] * len(texts), [task.write(answers(text)) for text in texts]

    log_ratios = torch.tensor([1.0, 2.0, 3.0, 6.0], dtype=torch.float64)
    found = measure(sample, lambda texts, answers: log_ratios, 4)
    assert found == pytest.approx({
        "prompts": 4, "sampled/before": 0, "sampled/after": 1, "greedy/before": 0,
        "greedy/after": 1, "cooled/before": 0, "win_rate": 1, "kl": 3,
        "kl_error": math.sqrt(14 / 3) / 2, "length/before": 5, "length/after": 6,
    })  # fmt: skip
    assert len({seed for *_, seed in calls}) == 4  # the greedy calls need none


@pytest.mark.parametrize("sign", (1, 0, -1))
def test_measure_scores_with_a_known_model(sign):
    """The true reward reaches the ceiling; a constant is right half the time."""

    def sample(which, texts, temperature, seed, label, samples):
        rng = random.Random(seed)
        texts = [text for text in texts for _ in range(samples)]
        written = [task.write(rng.sample([*right_answer(text), "Bo"], 2)) for text in texts]
        return written, written

    def score(prompts, answers):
        return [0.25 + sign * r for r in reward(prompts, answers)]

    found = measure_scores(sample, score, 60)
    assert found["prompts"] == 60 and 60 < found["pairs"] < 6 * 60 and 0.6 < found["ceiling"] < 1
    assert found["share"] == pytest.approx(sign, abs=1e-12)
    assert found["accuracy"] == pytest.approx(0.5 + sign * (found["ceiling"] - 0.5))
    assert found["true_accuracy"] == pytest.approx((1 + sign) / 2)
    assert sign or found["mean_score"] == 0.25


def test_committed_files_fit_the_code():
    """If random numbers or texts changed, family/tiny would silently no longer fit task.py."""
    for split, n in (("train", 11_000), ("test", 500)):
        rows = [row for _, row in task.rows("family", split, "ranked")]
        made = {task.prompt_of(*drawn[:3]) for drawn in task.take(300, 2, split)}
        assert len(rows) >= n
        assert len({row["prompt"] for row in rows[:300]} - made) <= 3  # without empty samples
    saved, made = AutoTokenizer.from_pretrained(task.TINY), model.hf_tokenizer()
    assert saved.backend_tokenizer.to_str() == made.backend_tokenizer.to_str()
    assert saved.chat_template == made.chat_template == model.TEMPLATE
    policy, untrained = AutoModelForCausalLM.from_pretrained(task.TINY), model.untrained_model()
    shapes = [{name: t.shape for name, t in m.state_dict().items()} for m in (policy, untrained)]
    assert shapes[0] == shapes[1] and 0.5e6 < untrained.num_parameters() < 2e6
    config = untrained.config
    ids = [config.bos_token_id, config.eos_token_id, config.pad_token_id]
    assert ids == made.convert_tokens_to_ids(list(SPECIAL)) and config.vocab_size == len(made)
    assert sum(path.stat().st_size for path in task.TINY.iterdir()) < 5e6
