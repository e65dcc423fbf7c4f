"""The embedded task: questions about a family, with a true reward that can be computed.

Sentences describe a small family; a question asks for a relation; the answer is a list of names:

    Family: Ada: partner of Ben, parent of Cid and Dora. Ben: partner of Ada. Cid: child of Ada and
    Ben, partner of Eva, parent of Finn. ... Who are the aunts and uncles of Finn?
     Dora

The true reward of any answer is known (`reward`), so a laptop can show that preference learning
helps, without a judge, a download or a licence. The data are made the way people make them:

- Annotators write demonstrations and make systematic mistakes (`demonstrate`): most of them answer
  a neighbouring relation, or count the person asked about among the siblings. A model fine-tuned
  on them (sft.py) is most confidently wrong exactly there. Preference learning can fix this; merely
  sharpening the model's favourite answers cannot.
- Comparisons are four samples of that fine-tuned model, scored by a noisy annotator (`judge`):
  Gumbel noise on the true reward makes a ranking a Plackett-Luce draw, and each of its pairs a
  Bradley-Terry draw.

Everything is a function of (seed, split, index). A hash of its description assigns each family to
the train or the test split, so the two never overlap.
"""

import hashlib
import itertools
import math
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

# Each is one token, together with the space before it: every name in the text is " Name".
NAMES = (
    "Ada Adam Alma Amir Anna Arno Asa Ben Bela Bea Boris Carl Cara Cid Clara Cleo Dan Dara David "
    "Dina Dora Edgar Edith Elena Elias Emil Emma Erik Eva Ezra Fay Felix Finn Flora Fred Gaia "
    "Georg Gina Greta Gus Hana Hans Hedy Hugo Ida Igor Ines Iris Ivan Jack Jana Jean Joel Jonas "
    "Judith Julia Kai Karl Kate Kira Lara Lea Leo Lena Lina Lou Luca Luis Maja Marc Maria Max Mia "
    "Mila Nadia Nils Nina Noah Nora Olga Oleg Omar Oscar Otto Paul Petra Pia Rafa Rita Rosa Ruth "
    "Sam Sara Selma Sofia Sven Tara Theo Tilda Timo Tom Uma Una Vera Viktor Wanda Will Yara Yuri "
    "Zara Zoe"
).split()

COMPOSED = {  # relations in two steps
    "grandparents": ("parents", "parents"),
    "grandchildren": ("children", "children"),
    "aunts and uncles": ("parents", "siblings"),  # by blood, not by marriage
    "nieces and nephews": ("siblings", "children"),
    "cousins": ("aunts and uncles", "children"),
}
RELATIONS = ("parents", "children", "partner", "siblings", *COMPOSED)


@dataclass(frozen=True)
class Family:
    couples: tuple[
        tuple[str, str, tuple[str, ...]], ...
    ]  # (parent, parent, children), oldest first

    def describe(self) -> str:
        """One sentence per person. Much of a description follows from the sentences before, so
        learning to read descriptions already teaches to look names up.
        """
        sentences = []
        for person in self.people():
            facts = {"child": self.answer("parents", person)}
            facts["partner"] = self.answer("partner", person)
            if any(person == a for a, _, _ in self.couples):  # said once per couple
                facts["parent"] = self.answer("children", person)
            parts = [f"{word} of {' and '.join(names)}" for word, names in facts.items() if names]
            sentences.append(f" {person}: {', '.join(parts)}.")
        return "Family:" + "".join(sentences)

    def people(self) -> list[str]:
        return list(dict.fromkeys(name for a, b, kids in self.couples for name in (a, b, *kids)))

    def answer(self, relation: str, person: str) -> list[str]:
        """The right names, in the order in which the description introduces them."""
        sibships = [(a, b, kids) for a, b, kids in self.couples if person in kids]
        own = [couple for couple in self.couples if person in couple[:2]]
        if relation == "parents":
            names = [parent for a, b, _ in sibships for parent in (a, b)]
        elif relation == "children":
            names = [kid for _, _, kids in own for kid in kids]
        elif relation == "partner":
            names = [b if person == a else a for a, b, _ in own]
        elif relation == "siblings":
            names = [kid for _, _, kids in sibships for kid in kids if kid != person]
        else:
            first, then = COMPOSED[relation]
            names = [
                name for near in self.answer(first, person) for name in self.answer(then, near)
            ]
        return sorted(set(names), key=self.people().index)


def make_family(rng: random.Random) -> Family:
    """Three generations, sometimes four; 6 to 14 people."""
    names = iter(rng.sample(NAMES, 20))
    couples = []

    def couple(one: str, kids: int) -> tuple[str, ...]:
        pair = [one, next(names)]
        rng.shuffle(pair)  # the order of the two carries no information
        children = tuple(next(names) for _ in range(kids))
        couples.append((pair[0], pair[1], children))
        return children

    second = couple(next(names), rng.choice((2, 2, 2, 3)))
    third = couple(second[0], rng.choice((1, 2)))
    if rng.random() < 0.75:
        third += couple(second[1], rng.choice((1, 2)))
    if rng.random() < 0.2:
        couple(rng.choice(third), rng.choice((1, 2)))
    return Family(tuple(couples))


def questions(seed: int, split: str) -> Iterator[tuple[Family, str, str, random.Random]]:
    """Endless (family, relation, person, rng) of a split; one question per family. Relations are
    drawn uniformly; a family that has no such relative is left out.
    """
    for index in itertools.count():
        rng = random.Random(f"family-{seed}-{split}-{index}")
        family = make_family(rng)
        is_test = hashlib.sha256(family.describe().encode()).digest()[0] < 26  # a tenth of all
        if is_test != (split == "test"):
            continue
        relation = rng.choice(RELATIONS)
        people = [person for person in family.people() if family.answer(relation, person)]
        if people:
            yield family, relation, rng.choice(people), rng


def question(relation: str, person: str) -> str:
    return f" Who {'is' if relation == 'partner' else 'are'} the {relation} of {person}?"


def prompt_of(family: Family, relation: str, person: str) -> str:
    return family.describe() + question(relation, person)


def write(names: list[str]) -> str:
    """A response, with the space that separates it from the prompt."""
    return " " + ", ".join(names)


# -------------------------------------------------------------------------------------------------
# The annotators: demonstrations with systematic mistakes

# Per relation: how often annotators make the mistake, and what they answer instead. The
# alternatives are tried in turn until one is not empty.
SYSTEMATIC = {
    "grandparents": (0.6, ("parents",)),
    "grandchildren": (0.6, ("children",)),
    "cousins": (0.6, ("siblings", "aunts and uncles")),
    "nieces and nephews": (0.6, ("children", "siblings")),
    "siblings": (0.6, ("with the asker",)),
}
RANDOM_MISTAKES = 0.10  # in addition: a name dropped, added or swapped


def demonstrate(family: Family, relation: str, person: str, rng: random.Random) -> list[str]:
    """What one annotator writes."""
    names = family.answer(relation, person)
    rate, alternatives = SYSTEMATIC.get(relation, (0.0, ()))
    if rng.random() < rate:
        for other in alternatives:
            wrong = [*names, person] if other == "with the asker" else family.answer(other, person)
            if wrong:
                names = sorted(wrong, key=family.people().index)
                break
    if rng.random() < RANDOM_MISTAKES:
        names = _corrupted(names, family, rng)
    return names


def _corrupted(names: list[str], family: Family, rng: random.Random) -> list[str]:
    others = [name for name in family.people() if name not in names]
    at = rng.randrange(len(names))
    kinds = ["swap", "add"] if len(names) == 1 else ["swap", "add", "drop"]
    match rng.choice(kinds) if others else "drop":
        case "swap":
            return [*names[:at], rng.choice(others), *names[at + 1 :]]
        case "add":
            return [*names, rng.choice(others)]
        case _:
            return [*names[:at], *names[at + 1 :]]


# -------------------------------------------------------------------------------------------------
# The true reward, and a noisy annotator who ranks by it

_CHILD = re.compile(r" (\w+): child of (\w+ and \w+)")
_QUESTION = re.compile(r" Who (?:is|are) the ([a-z ]+) of (\w+)\?$")


def right_answer(prompt: str) -> list[str]:
    """Parse the family from the prompt, so that judging an answer needs nothing else."""
    children: dict[tuple[str, ...], list[str]] = {}
    for child, parents in _CHILD.findall(prompt):
        children.setdefault(tuple(parents.split(" and ")), []).append(child)
    couples = tuple((a, b, tuple(kids)) for (a, b), kids in children.items())
    found = _QUESTION.search(prompt)
    if not couples or not found or found[1] not in RELATIONS:
        raise ValueError(f"not a question of the family task: {prompt!r}")
    return Family(couples).answer(found[1], found[2])


def reward(prompts: list[str], responses: list[str]) -> list[float]:
    """The true reward, in [0, 1]: F1 of the listed names against the right ones.

    A name listed twice counts twice as listed and once as right. The score is halved if the
    response is not a well-formed list of names.
    """
    scores = []
    for prompt, response in zip(prompts, responses, strict=True):
        right = set(right_answer(prompt))
        listed = response.removeprefix(" ").split(", ")
        hits = len(right.intersection(listed))
        names_only = all(re.fullmatch("[A-Z][a-z]+", name) for name in listed)
        well_formed = response.startswith(" ") and names_only
        scores.append(2 * hits / (len(listed) + len(right)) * (1.0 if well_formed else 0.5))
    return scores


NOISE = 0.15  # P(a preferred to b) = sigmoid((reward_a - reward_b) / NOISE)


def judge(prompt: str, responses: Sequence[str], rng: random.Random) -> list[float]:
    """Noisy scores whose order is a Plackett-Luce draw on the true reward."""
    gumbel = [-math.log(-math.log(1.0 - rng.random() * (1 - 1e-12) - 5e-13)) for _ in responses]
    rewards = reward([prompt] * len(responses), list(responses))
    return [r / NOISE + g for r, g in zip(rewards, gumbel, strict=True)]


# -------------------------------------------------------------------------------------------------
# Rows, in the columns of their kind

TINY = Path(__file__).resolve().parent / "tiny"
DEMONSTRATIONS = {"train": 20_000, "test": 512}  # families, up to four questions each
OFF_POLICY = {"train": 12_000, "test": 512}


def rows(dataset: str, split: str, kind: str) -> Iterator[tuple[str, dict]]:
    """(where, row): demonstrations for sft.py; for all other kinds judged samples of `tiny`.

    `family:off-policy` has pairs that the policy would not have written: the right answer and a
    corrupted one. It is there to compare with on-policy pairs.
    """
    _, _, variant = dataset.partition(":")
    if variant not in ("", "off-policy"):
        raise ValueError(f"{dataset}: the embedded task has family and family:off-policy")
    if variant == "off-policy":
        for i, (family, relation, person, rng) in enumerate(take(OFF_POLICY[split], 0, split)):
            right = family.answer(relation, person)
            row = {
                "prompt": prompt_of(family, relation, person),
                "chosen": write(right),
                "rejected": write(_corrupted(right, family, rng)),
            }
            yield f"{dataset} {split} {i}", row
    elif kind == "demonstration":
        for i, (family, relation, person, rng) in enumerate(take(DEMONSTRATIONS[split], 0, split)):
            yield f"{dataset} {split} {i}", {"messages": _dialogue(family, relation, person, rng)}
    else:
        import pyarrow.parquet

        file = TINY / f"judged-{split}.parquet"
        for i, row in enumerate(pyarrow.parquet.read_table(file).to_pylist(), 1):
            yield f"{file}:row {i}", row


def take(n: int, seed: int, split: str) -> Iterator[tuple[Family, str, str, random.Random]]:
    return itertools.islice(questions(seed, split), n)


def _dialogue(family: Family, relation: str, person: str, rng: random.Random) -> list[dict]:
    """Up to four questions about one family: a description is long and should teach more than
    once.
    """
    chosen, messages = [(relation, person)], []
    for _ in range(3):
        relation = rng.choice(RELATIONS)
        people = [p for p in family.people() if family.answer(relation, p)]
        fresh = [p for p in people if (relation, p) not in chosen]
        if fresh:
            chosen.append((relation, rng.choice(fresh)))
    for i, (relation, person) in enumerate(chosen):
        text = question(relation, person) if i else prompt_of(family, relation, person)
        answer = write(demonstrate(family, relation, person, rng))
        messages += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
    return messages


def test_prompts(n: int) -> list[str]:
    """Unseen questions, the same for every model that is measured."""
    return [prompt_of(*drawn[:3]) for drawn in take(n, 1, "test")]
