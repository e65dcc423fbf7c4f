"""The embedded task: one tokenizer in two forms, a reward that is right, annotators as promised."""

import hashlib
import itertools
import json
import math
import os
import random
import re
import subprocess
import sys
import unicodedata
from collections import Counter

import pytest
from conftest import ROOT
from transformers import AutoTokenizer

import family
from family import NAMES, RELATIONS, SPECIAL, SYSTEMATIC, judge, reward, right_answer

# -- one vocabulary, two tokenizers


@pytest.fixture(scope="module")
def tiktoken_encoding():
    return family.encoding()


@pytest.fixture(scope="module")
def hf_tokenizer():
    return family.hf_tokenizer()


@pytest.fixture(scope="module")
def reloaded(tmp_path_factory):
    """As it lies beside a checkpoint."""
    folder = tmp_path_factory.mktemp("tokenizer")
    family.hf_tokenizer().save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


# What tokenizers differ in: line ends, spaces of all kinds, marks that combine, controls, joined
# emoji, letters that a case-insensitive [a-z] would match, and what looks like a special token.
ODD = [
    *("\r\n", "\n", "\r", "\t", "  ", "   ", "\u0085", "\u00a0", "\u2028", "\u2029", "\u3000"),
    *("\u200b", "\u200d", "\ufeff", "\x00", "\x1b", "\x1c", "\x7f", "\ufffd", "\uffff"),
    *("\ud7ff", "\ue000", "\U0010ffff"),  # next to what is no character
    *("e\u0301", "\u0301", "\u1100\u1161\u11a8", "\ufb01", "\u0130", "\u0131", "\u017f", "\u212a"),
    *("\u00df", "\u01c6", "\u00e9", "\u03a9", "\u4e2d\u6587", "\u0e44\u0e17\u0e22", "\u0928\u0940"),
    *("\U0001f469\u200d\U0001f467", "\U0001f1e9\U0001f1ea", "\u2764\ufe0f", "\u0661\u0662"),
    *("<|end|", "|>", "<|begin", "'s", "'S", "\u2019", "1,234.5", "_", "\\", "\u200f\u0639"),
]


def random_text(rng: random.Random) -> str:
    """Pieces of every kind, glued together without care."""

    def piece() -> str:
        match rng.randrange(7):
            case 0:
                return "".join(chr(rng.randrange(128)) for _ in range(rng.randint(1, 12)))
            case 1:  # any code point but halves of a surrogate pair, which are no text
                points = [rng.randrange(0x110000 - 0x800) for _ in range(rng.randint(1, 6))]
                return "".join(chr(p if p < 0xD800 else p + 0x800) for p in points)
            case 2:
                return "".join(rng.choices(ODD, k=rng.randint(1, 4)))
            case 3:  # words of the vocabulary without a space between them, cut, in another case
                words = "".join(
                    rng.choices(["", " ", "  "])[0] + rng.choice(family.WORDS) for _ in "1234"
                )
                start = rng.randrange(len(words))
                return rng.choice(
                    (words, words[start:], words.lower(), words.upper(), words.title())
                )
            case 4:
                return rng.choice(SPECIAL)
            case 5:
                text = unicodedata.normalize(
                    rng.choice(("NFD", "NFKD")), "\u00c5\u00f1\u00e7\ufb03 Zo\u00eb \ud55c\uae00"
                )
                return text[: rng.randint(1, len(text))]
            case _:
                return rng.choice(FAMILY_TEXTS)[rng.randrange(40) :][: rng.randint(1, 60)]

    return "".join(piece() for _ in range(rng.randint(1, 6)))


FAMILY_TEXTS = family.test_prompts(20)


def test_same_ids_for_any_text(tiktoken_encoding, hf_tokenizer, reloaded):
    """tiktoken, the Hugging Face tokenizer, and the saved one; and every text comes back."""
    rng = random.Random(0)
    texts = ["", " ", *ODD, *SPECIAL, *FAMILY_TEXTS, *(random_text(rng) for _ in range(6000))]
    assert any(token in text for token in SPECIAL for text in texts[-6000:])
    ours = [tiktoken_encoding.encode(text, allowed_special="all") for text in texts]
    for tokenizer in (hf_tokenizer, reloaded):
        theirs = tokenizer(texts, add_special_tokens=False).input_ids
        for text, one, other in zip(texts, ours, theirs, strict=True):
            assert one == other, repr(text)
            assert tokenizer.decode(other) == text, repr(text)
    for text, ids in zip(texts, ours, strict=True):
        assert tiktoken_encoding.decode(ids) == text, repr(text)


def test_every_code_point(tiktoken_encoding, hf_tokenizer):
    """Each character alone, between letters and after a space. (Planes 4 to 13 are empty.)"""
    for start in (*range(0, 0x40000, 0x1000), 0xE0000, 0x10F000):
        points = [chr(p) for p in range(start, start + 0x1000) if not 0xD800 <= p < 0xE000]
        for text in ("".join(points), "a".join(points), " of ".join(points)):
            ids = tiktoken_encoding.encode(text)
            assert ids == hf_tokenizer(text, add_special_tokens=False).input_ids, hex(start)


def test_ids_stand_for_the_same_bytes(tiktoken_encoding, hf_tokenizer, reloaded):
    assert len(hf_tokenizer) == len(reloaded) == tiktoken_encoding.n_vocab
    for token in SPECIAL:
        number = tiktoken_encoding.encode_single_token(token)
        assert hf_tokenizer.convert_tokens_to_ids(token) == number
        assert reloaded.convert_tokens_to_ids(token) == number
    for number in range(256, tiktoken_encoding.n_vocab):  # those below are single bytes
        text = tiktoken_encoding.decode([number])
        assert hf_tokenizer.decode([number]) == reloaded.decode([number]) == text


def test_words_of_the_task_are_one_token(tiktoken_encoding):
    for name in (*NAMES, *" ".join(RELATIONS).split()):
        assert len(tiktoken_encoding.encode(f" {name}")) == 1
    assert len(set(NAMES)) == len(NAMES)


def test_special_tokens(hf_tokenizer, reloaded):
    """BOS at the beginning, once; a dialogue is its turns one after another, answers with EOS."""
    bos, eos, pad = SPECIAL
    turns = [
        {"role": "user", "content": "Family: Ada. Who?"},
        {"role": "assistant", "content": " Ada"},
        {"role": "user", "content": " Who is?"},
    ]
    for tokenizer in (hf_tokenizer, reloaded):
        assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (bos, eos, pad)
        assert tokenizer.decode(tokenizer("Family").input_ids) == bos + "Family"
        shown = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        assert shown == f"{bos}Family: Ada. Who? Ada{eos} Who is?"


# -- the right answer, by a second definition that shares nothing with the first


class Relatives:
    """Who is what to whom, read from the sentences, by who is whose child and nothing else."""

    def __init__(self, prompt: str):
        description = prompt[prompt.index("Family:") : prompt.index(" Who ")]
        self.parents_of: dict[str, set[str]] = {}
        self.order = []
        self.stated: set[tuple[str, str, str]] = set()  # (Ada, "partner", Ben), as it is written
        for sentence in description.removeprefix("Family: ").removesuffix(".").split(". "):
            person, facts = sentence.split(": ")
            self.order.append(person)
            for fact in facts.split(", "):
                word, others = fact.split(" of ")
                for other in others.split(" and "):
                    self.stated.add((person, word, other))
        for person in self.order:
            told = {o for p, word, o in self.stated if (p, word) == (person, "child")}
            self.parents_of[person] = told

    def everybody(self, holds) -> set[str]:
        return {person for person in self.order if holds(person)}

    def are(self, relation: str, x: str, y: str) -> bool:
        """Is y among the `relation` of x?"""
        parents = self.parents_of
        match relation:
            case "parents":
                return y in parents[x]
            case "children":
                return x in parents[y]
            case "partner":
                return x != y and any({x, y} == both for both in parents.values())
            case "siblings":
                return x != y and bool(parents[x] & parents[y])
            case "grandparents":
                return any(self.are("parents", p, y) for p in parents[x])
            case "grandchildren":
                return self.are("grandparents", y, x)
            case "aunts and uncles":
                return any(self.are("siblings", p, y) for p in parents[x])
            case "nieces and nephews":
                return self.are("aunts and uncles", y, x)
            case "cousins":
                return any(self.are("siblings", p, q) for p in parents[x] for q in parents[y])
        raise AssertionError(relation)

    def answer(self, relation: str, x: str) -> list[str]:
        """In the order of the description."""
        return [y for y in self.order if self.are(relation, x, y)]


def some_families(n: int) -> list[family.Family]:
    rng = random.Random(1)
    return [family.make_family(rng) for _ in range(n)]


def test_right_answer_of_every_question():
    """Read back from the text, equal to the family's own answer and to the second definition."""
    asked = Counter()
    for one in some_families(200):
        relatives = Relatives(family.prompt_of(one, "parents", one.people()[0]))
        assert relatives.order == one.people()
        for relation, person in itertools.product(RELATIONS, one.people()):
            prompt = family.prompt_of(one, relation, person)
            expected = relatives.answer(relation, person)
            assert one.answer(relation, person) == expected, prompt
            assert right_answer(prompt) == expected, prompt
            asked[relation] += bool(expected)
    assert all(asked[relation] > 100 for relation in RELATIONS), asked


def test_what_a_description_says_is_true_and_enough():
    for one in some_families(300):
        relatives = Relatives(family.prompt_of(one, "parents", one.people()[0]))
        words = {"child": "parents", "parent": "children", "partner": "partner"}
        for person, word, other in relatives.stated:
            assert relatives.are(words[word], person, other)
        # Every child-of and every partner-of is said, on both sides.
        for x, y in itertools.permutations(relatives.order, 2):
            assert ((x, "child", y) in relatives.stated) == relatives.are("parents", x, y)
            assert ((x, "partner", y) in relatives.stated) == relatives.are("partner", x, y)
        assert 6 <= len(relatives.order) <= 14
        assert len(set(relatives.order)) == len(relatives.order)


def test_an_example_by_hand():
    """The family of the docstring, a little larger."""
    prompt = (
        "Family: Ada: partner of Ben, parent of Cid and Dora. Ben: partner of Ada. "
        "Cid: child of Ada and Ben, partner of Eva, parent of Finn. Dora: child of Ada and Ben, "
        "partner of Gus, parent of Hana and Ida. Eva: partner of Cid. Finn: child of Cid and Eva. "
        "Gus: partner of Dora. Hana: child of Dora and Gus. Ida: child of Dora and Gus."
    )
    for question, names in {
        "are the parents of Finn": ["Cid", "Eva"],
        "are the children of Gus": ["Hana", "Ida"],
        "is the partner of Gus": ["Dora"],
        "are the siblings of Ida": ["Hana"],
        "are the grandparents of Finn": ["Ada", "Ben"],
        "are the grandchildren of Ben": ["Finn", "Hana", "Ida"],
        "are the aunts and uncles of Finn": ["Dora"],  # not Gus, who is one by marriage
        "are the nieces and nephews of Dora": ["Finn"],
        "are the cousins of Hana": ["Finn"],
        "are the cousins of Finn": ["Hana", "Ida"],
        "are the siblings of Finn": [],
    }.items():
        assert right_answer(f"{prompt} Who {question}?") == names


@pytest.mark.parametrize(
    "prompt", ("", "Who are the parents of Ada?", "Family: Ada: partner of Ben.", "1 + 1 = ?")
)
def test_another_prompt_is_refused(prompt):
    with pytest.raises(ValueError, match="not a question"):
        right_answer(prompt)


# -- the reward

# The cousins of Finn are Hana and Ida.
COUSINS = (
    "Family: Ada: partner of Ben, parent of Cid and Dora. Ben: partner of Ada. Cid: child of Ada "
    "and Ben, partner of Eva, parent of Finn. Dora: child of Ada and Ben, partner of Gus, parent "
    "of Hana and Ida. Gus: partner of Dora. Finn: child of Cid and Eva. Hana: child of Dora and "
    "Gus. Ida: child of Dora and Gus. Who are the cousins of Finn?"
)


@pytest.mark.parametrize(
    "response, expected",
    [
        (" Hana, Ida", 1.0),
        (" Ida, Hana", 1.0),  # a set
        (" Hana", 2 * 1 / (1 + 2)),  # precision 1, recall 1/2
        (" Hana, Ida, Gus", 2 * 2 / (3 + 2)),
        (" Hana, Gus", 2 * 1 / (2 + 2)),
        (" Gus", 0.0),
        (" Hana, Hana", 2 * 1 / (2 + 2)),  # listed twice, right once
        (" Hana, Ida, Ida, Ida", 2 * 2 / (4 + 2)),
        # Not a list of names: half of what is left.
        ("Hana, Ida", 0.5),  # no space that separates it from the prompt
        (" Hana, Ida.", 0.5 * 2 * 1 / (2 + 2)),  # "Ida." is nobody
        (" Hana, Ida, 7", 0.5 * 2 * 2 / (3 + 2)),
        (" Hana, Ida, ", 0.5 * 2 * 2 / (3 + 2)),
        (" Hana, Ida\n", 0.5 * 2 * 1 / (2 + 2)),
        (" Hana and Ida", 0.0),
        (" hana, ida", 0.0),
        ("  Hana, Ida", 0.5 * 2 * 1 / (2 + 2)),  # " Hana" is nobody
        ("", 0.0),
        (" ", 0.0),
        (",", 0.0),
        (" Hana<|end|>", 0.0),
    ],
)
def test_reward_by_hand(response, expected):
    assert reward([COUSINS], [response]) == [pytest.approx(expected, abs=1e-15)]


def test_reward_is_one_for_the_right_answer_alone():
    for one in some_families(50):
        for relation, person in itertools.product(RELATIONS, one.people()):
            right = one.answer(relation, person)
            if right:
                prompt = family.prompt_of(one, relation, person)
                others = [name for name in one.people() if name not in right]
                answers = [right, right[1:], right + others[:1], right + right[:1], others[:1]]
                scores = reward([prompt] * 5, [family.write(names) for names in answers])
                assert scores[0] == 1.0
                assert all(0.0 <= score < 1.0 for score in scores[1:])


def test_reward_takes_lists_of_equal_length():
    assert reward([], []) == []
    with pytest.raises(ValueError):
        reward([COUSINS], [])


# -- rows


def take(split: str, n: int, seed: int = 0) -> list[tuple]:
    return [asked[:3] for asked in itertools.islice(family.questions(seed, split), n)]


def digest(dataset: str, split: str, n: int = 200) -> str:
    rows = itertools.islice(family.rows(dataset, split, "demonstration"), n)
    return hashlib.sha256(json.dumps(list(rows)).encode()).hexdigest()


def test_rows_are_a_function_of_the_seed():
    """Whatever else was drawn before, and in another process, where sets have another order."""
    for dataset, split in itertools.product(("family", "family:off-policy"), ("train", "test")):
        first = digest(dataset, split)
        random.seed(1)
        assert digest(dataset, split) == first
    code = (
        "import hashlib, itertools, json, family\n"
        "rows = itertools.islice(family.rows('family', 'train', 'demonstration'), 200)\n"
        "print(hashlib.sha256(json.dumps(list(rows)).encode()).hexdigest())"
    )
    for hash_seed in ("1", "2"):
        env = os.environ | {"PYTHONHASHSEED": hash_seed}
        printed = subprocess.check_output(
            [sys.executable, "-c", code], cwd=ROOT, env=env, text=True
        )
        assert printed.strip() == digest("family", "train")


def test_seeds_and_splits_differ():
    assert take("train", 20) == take("train", 20)
    assert take("train", 20) != take("train", 20, seed=1)
    assert take("train", 20) != take("test", 20)
    assert family.test_prompts(30)[:10] == family.test_prompts(10)


def test_no_family_is_in_both_splits():
    """Whatever the seed, so neither do demonstrations meet the questions that are measured."""
    described = {
        split: {one.describe() for seed in range(3) for one, _, _ in take(split, n, seed)}
        for split, n in (("train", 1000), ("test", 150))
    }
    assert not described["train"] & described["test"]
    trained = itertools.islice(family.rows("family", "train", "demonstration"), 1000)
    texts = [row["messages"][0]["content"].split(" Who ")[0] for _, row in trained]
    assert not set(texts) & {prompt.split(" Who ")[0] for prompt in family.test_prompts(200)}


def test_questions_have_answers_and_all_relations():
    asked = take("train", 2000)
    assert all(one.answer(relation, person) for one, relation, person in asked)
    share = Counter(relation for _, relation, _ in asked)
    assert share.keys() == set(RELATIONS)
    # A family without, say, cousins is left out, so not exactly equal; none is rare.
    assert min(share.values()) > 2000 / len(RELATIONS) / 2


def test_demonstrations_are_dialogues():
    for _, row in itertools.islice(family.rows("family", "train", "demonstration"), 200):
        roles = [message["role"] for message in row["messages"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        first, *more = [m["content"] for m in row["messages"] if m["role"] == "user"]
        description = first[: first.index(" Who ")]
        for question in (first[len(description) :], *more):
            assert right_answer(description + question)
        assert len({first[len(description) :], *more}) == 1 + len(more)  # none is asked twice


def test_off_policy_pairs_are_right_against_wrong():
    for _, row in itertools.islice(family.rows("family:off-policy", "train", "pair"), 500):
        assert reward([row["prompt"]], [row["chosen"]]) == [1.0]
        assert reward([row["prompt"]], [row["rejected"]])[0] < 1.0


def test_an_unknown_variant_is_refused():
    with pytest.raises(ValueError, match="off-policy"):
        next(family.rows("family:of-policy", "train", "pair"))


# -- the annotators


def five_deviations(p: float, n: int) -> float:
    """How far a share of n independent draws may be from its probability."""
    return 5 * math.sqrt(p * (1 - p) / n)


def demonstrations(n: int) -> dict[str, list[tuple[list[str], list[str], str]]]:
    """Relation -> (what was written, what is right, how the two are related)."""
    found: dict[str, list] = {relation: [] for relation in RELATIONS}
    for one, relation, person, rng in itertools.islice(family.questions(0, "train"), n):
        right = one.answer(relation, person)
        written = family.demonstrate(one, relation, person, rng)
        neighbours = [
            sorted([*right, person], key=one.people().index)
            if other == "with the asker"
            else one.answer(other, person)
            for other in SYSTEMATIC.get(relation, (0.0, ()))[1]
        ]
        promised = next((names for names in neighbours if names), None)
        kind = {True: "right"}.get(written == right, "promised" if written == promised else "other")
        found[relation].append((written, right, kind))
    return found


def test_mistakes_are_systematic_where_promised():
    """Most annotators answer the neighbouring relation: the likeliest demonstration is wrong.

    Elsewhere they are right but for random slips.
    """
    slips = family.RANDOM_MISTAKES
    for relation, made in demonstrations(9000).items():
        kinds = Counter(kind for _, _, kind in made)
        n, (rate, _) = len(made), SYSTEMATIC.get(relation, (0.0, ()))
        # Without a slip it is one or the other. A slip may end anywhere: to drop the asker from
        # the siblings mends that mistake.
        for kind, p in (("right", (1 - rate) * (1 - slips)), ("promised", rate * (1 - slips))):
            share = kinds[kind] / n
            assert share >= p - five_deviations(p, n), (relation, kinds)
            assert share <= p + rate * slips + five_deviations(p, n), (relation, kinds)
        if relation in SYSTEMATIC:
            assert kinds["promised"] > n / 2, (relation, kinds)


def test_demonstrations_are_well_formed():
    for relation, made in demonstrations(2000).items():
        for written, _, _ in made:
            assert written and set(written) <= set(NAMES), relation
            assert re.fullmatch(r" [A-Z][a-z]+(, [A-Z][a-z]+)*", family.write(written))


ANSWERS = (" Hana, Ida", " Hana, Ida, Gus", " Hana", " Gus")


def test_judges_prefer_as_bradley_and_terry():
    """P(a before b) = sigmoid((reward_a - reward_b) / NOISE), for every pair of a ranked list."""
    n, rng = 20_000, random.Random(0)
    rewards = reward([COUSINS] * 4, list(ANSWERS))
    scores = [judge(COUSINS, list(ANSWERS), rng) for _ in range(n)]
    for a, b in itertools.combinations(range(4), 2):
        p = 1 / (1 + math.exp(-(rewards[a] - rewards[b]) / family.NOISE))
        share = sum(row[a] > row[b] for row in scores) / n
        assert abs(share - p) < five_deviations(p, n), (ANSWERS[a], ANSWERS[b])
    # Plackett-Luce: the first place goes by softmax, and so does the second among those left.
    weights = [math.exp(r / family.NOISE) for r in rewards]
    ranked = Counter(tuple(sorted(range(4), key=lambda i: -row[i])[:2]) for row in scores)
    for first, second in itertools.permutations(range(4), 2):
        p = weights[first] / sum(weights) * weights[second] / (sum(weights) - weights[first])
        assert abs(ranked[first, second] / n - p) < five_deviations(p, n), (first, second)


def test_equal_answers_are_a_coin():
    n, rng = 10_000, random.Random(0)
    scores = [judge(COUSINS, [" Hana", " Ida"], rng) for _ in range(n)]
    share = sum(a > b for a, b in scores) / n
    assert abs(share - 0.5) < five_deviations(0.5, n)


def test_judging_is_a_function_of_its_generator():
    one, other = (judge(COUSINS, list(ANSWERS), random.Random(seed)) for seed in (1, 2))
    assert one == judge(COUSINS, list(ANSWERS), random.Random(1))
    assert one != other and all(map(math.isfinite, one))


# -- the model


def test_untrained_model(hf_tokenizer):
    """About a million parameters, and the ids of its tokenizer."""
    model = family.untrained_model()
    assert 0.5e6 < sum(p.numel() for p in model.parameters()) < 2e6
    config = model.config
    assert config.vocab_size == len(hf_tokenizer)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == tuple(
        hf_tokenizer.convert_tokens_to_ids(list(SPECIAL))
    )


# -- tiny/, which is committed


def test_the_judged_samples_belong_to_the_questions_that_the_code_makes_today():
    """If random numbers or texts drift, tiny/ no longer fits family.py, and says nothing itself."""
    for split, n in (("train", 11_000), ("test", 500)):
        rows = [row for _, row in family.rows("family", split, "ranked")]
        assert len(rows) >= n
        made = {family.prompt_of(*asked[:3]) for asked in itertools.islice(asks(split), 300)}
        judged = {row["prompt"] for row in rows[:300]}
        assert len(judged - made) <= 3  # a prompt with an empty sample is left out
        for row in rows[:300]:
            assert len(row["responses"]) == len(row["scores"]) == 4
            assert all(response.strip() for response in row["responses"])


def asks(split: str):
    return family.questions(2, split)


def test_the_committed_model_has_the_tokenizer_and_shape_that_the_code_makes_today():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    saved, made = AutoTokenizer.from_pretrained(family.TINY), family.hf_tokenizer()
    text = family.test_prompts(1)[0]
    assert saved(text).input_ids == made(text).input_ids
    assert saved.chat_template == made.chat_template
    policy = AutoModelForCausalLM.from_pretrained(family.TINY)
    shapes = {name: t.shape for name, t in policy.state_dict().items()}
    assert shapes == {name: t.shape for name, t in family.untrained_model().state_dict().items()}
    assert sum(path.stat().st_size for path in family.TINY.iterdir()) < 5e6
