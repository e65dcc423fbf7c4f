"""The embedded task: questions about a family, with a true reward that is known.

A small family is described in sentences; a question asks for a relation; the answer is a list of
names:

    Family: Ada: partner of Ben, parent of Cid and Dora. Ben: partner of Ada. Cid: child of Ada and
    Ben, partner of Eva, parent of Finn. ... Who are the aunts and uncles of Finn?
     Dora

Why a task of our own: the true reward of any answer can be computed (`reward`), so it can be
*shown* that preference learning helps, on a laptop, without a judge, a download or a licence.
Everything else is made as people make it:

- Demonstrations come from annotators whose mistakes are systematic (`demonstrate`): most of them
  answer a neighbouring relation, or count the asker among the siblings. A model fine-tuned on them
  (sft.py) is most confidently wrong exactly there, so preference learning has something to teach
  beyond sharpening what is already the favourite answer.
- Comparisons are four samples of that fine-tuned model itself, scored by a noisy annotator
  (`judge`): Gumbel noise on the true reward, which makes the ranking a Plackett-Luce draw and every
  pair in it a Bradley-Terry draw.

Everything is a function of (seed, split, index). A family belongs to the train or the test split by
a hash of its description, so the two are disjoint whatever is generated.

    python family.py show                       # a few rows of every kind
    python sft.py && python family.py judge --model runs/sft     # how tiny/ was made
"""

import hashlib
import itertools
import json
import math
import random
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

# One token each, with the space before it: every name in the text is " Name".
NAMES = (
    "Ada Adam Alma Amir Anna Arno Asa Ben Bela Bea Boris Carl Cara Cid Clara Cleo Dan Dara David "
    "Dina Dora Edgar Edith Elena Elias Emil Emma Erik Eva Ezra Fay Felix Finn Flora Fred Gaia "
    "Georg Gina Greta Gus Hana Hans Hedy Hugo Ida Igor Ines Iris Ivan Jack Jana Jean Joel Jonas "
    "Judith Julia Kai Karl Kate Kira Lara Lea Leo Lena Lina Lou Luca Luis Maja Marc Maria Max Mia "
    "Mila Nadia Nils Nina Noah Nora Olga Oleg Omar Oscar Otto Paul Petra Pia Rafa Rita Rosa Ruth "
    "Sam Sara Selma Sofia Sven Tara Theo Tilda Timo Tom Uma Una Vera Viktor Wanda Will Yara Yuri "
    "Zara Zoe"
).split()

FACTS = (("child", "parents"), ("partner", "partner"))  # word in a description, relation
RELATIONS = (
    "parents",
    "children",
    "partner",
    "siblings",
    "grandparents",
    "grandchildren",
    "aunts and uncles",
    "nieces and nephews",
    "cousins",
)


@dataclass(frozen=True)
class Family:
    couples: tuple[
        tuple[str, str, tuple[str, ...]], ...
    ]  # (parent, parent, their children), oldest couple first

    def describe(self) -> str:
        """One sentence a person. Much of it can be told from what was said before, so that reading
        descriptions already teaches to look names up."""
        sentences = []
        for person in self.people():
            facts = {word: self.answer(relation, person) for word, relation in FACTS}
            if any(person == a for a, _, _ in self.couples):  # said once a couple
                facts["parent"] = self.answer("children", person)
            told = ", ".join(f"{word} of {' and '.join(x)}" for word, x in facts.items() if x)
            sentences.append(f" {person}: {told}.")
        return "Family:" + "".join(sentences)

    def people(self) -> list[str]:
        return list(dict.fromkeys(name for a, b, kids in self.couples for name in (a, b, *kids)))

    def answer(self, relation: str, person: str) -> list[str]:
        """The right names, in the order in which the description introduces them."""
        parents = [p for a, b, kids in self.couples if person in kids for p in (a, b)]
        if relation == "parents":
            names = parents
        elif relation == "children":
            names = [kid for a, b, kids in self.couples if person in (a, b) for kid in kids]
        elif relation == "partner":
            names = [b if person == a else a for a, b, _ in self.couples if person in (a, b)]
        elif relation == "siblings":
            names = [
                kid
                for _, _, kids in self.couples
                if person in kids
                for kid in kids
                if kid != person
            ]
        else:
            first, then = {
                "grandparents": ("parents", "parents"),
                "grandchildren": ("children", "children"),
                "aunts and uncles": ("parents", "siblings"),  # by blood, not by marriage
                "nieces and nephews": ("siblings", "children"),
                "cousins": ("aunts and uncles", "children"),
            }[relation]
            names = [
                name for near in self.answer(first, person) for name in self.answer(then, near)
            ]
        place = {name: i for i, name in enumerate(self.people())}
        return sorted(set(names), key=place.__getitem__)


def make_family(rng: random.Random) -> Family:
    """Three generations, sometimes four; 6 to 14 people."""
    names = iter(rng.sample(NAMES, 20))
    couples = []

    def couple(one: str, kids: int) -> tuple[str, ...]:
        pair = [one, next(names)]
        rng.shuffle(pair)  # who is named first says nothing
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


# What annotators answer instead, for a relation, and how often. Each alternative is tried in turn
# until one is not empty.
SYSTEMATIC = {
    "grandparents": (0.6, ("parents",)),
    "grandchildren": (0.6, ("children",)),
    "cousins": (0.6, ("siblings", "aunts and uncles")),
    "nieces and nephews": (0.6, ("children", "siblings")),
    "siblings": (0.6, ("with the asker",)),
}
RANDOM_MISTAKES = 0.10  # besides: somebody dropped, added or swapped


def demonstrate(family: Family, relation: str, person: str, rng: random.Random) -> list[str]:
    """What one annotator writes down."""
    names = family.answer(relation, person)
    rate, instead = SYSTEMATIC.get(relation, (0.0, ()))
    if rng.random() < rate:
        for other in instead:
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


def write(names: list[str]) -> str:
    """A response, with the space that separates it from the prompt."""
    return " " + ", ".join(names)


def questions(seed: int, split: str) -> Iterator[tuple[Family, str, str, random.Random]]:
    """Endless (family, relation, person, rng) of a split; one question a family, every relation
    equally often.
    """
    index = 0
    while True:
        rng = random.Random(f"family-{seed}-{split}-{index}")
        index += 1
        family = make_family(rng)
        is_test = (
            hashlib.sha256(family.describe().encode()).digest()[0] < 26
        )  # a tenth of all families
        if is_test != (split == "test"):
            continue
        relation = rng.choice(RELATIONS)
        asked = [person for person in family.people() if family.answer(relation, person)]
        if asked:
            yield family, relation, rng.choice(asked), rng


def question(relation: str, person: str) -> str:
    return f" Who {'is' if relation == 'partner' else 'are'} the {relation} of {person}?"


def prompt_of(family: Family, relation: str, person: str) -> str:
    return family.describe() + question(relation, person)


_CHILD = re.compile(r" (\w+): child of (\w+ and \w+)")
_QUESTION = re.compile(r" Who (?:is|are) the ([a-z ]+) of (\w+)\?$")


def right_answer(prompt: str) -> list[str]:
    """Read the family back from the text, so that an answer can be judged with nothing but its
    prompt.
    """
    children: dict[tuple[str, ...], list[str]] = {}
    for child, parents in _CHILD.findall(prompt):
        children.setdefault(tuple(parents.split(" and ")), []).append(child)
    couples = tuple((a, b, tuple(kids)) for (a, b), kids in children.items())
    asked = _QUESTION.search(prompt)
    if not couples or not asked or asked[1] not in RELATIONS:
        raise ValueError(f"not a question of the family task: {prompt!r}")
    return Family(couples).answer(asked[1], asked[2])


def reward(prompts: list[str], responses: list[str]) -> list[float]:
    """The true reward, in [0, 1]: F1 of the listed names against the right ones.

    A repeated name counts as listed twice and right once; text that is not a list of names halves
    what is left.
    """
    scores = []
    for prompt, response in zip(prompts, responses, strict=True):
        right = set(right_answer(prompt))
        listed = response.removeprefix(" ").split(", ")
        hits = len(right.intersection(listed))
        well_formed = response.startswith(" ") and all(
            re.fullmatch("[A-Z][a-z]+", name) for name in listed
        )
        scores.append(2 * hits / (len(listed) + len(right)) * (1.0 if well_formed else 0.5))
    return scores


NOISE = 0.15  # P(a preferred to b) = sigmoid((reward_a - reward_b) / NOISE)


def judge(prompt: str, responses: Sequence[str], rng: random.Random) -> list[float]:
    """Noisy scores whose order is a Plackett-Luce draw on the true reward."""
    gumbel = [-math.log(-math.log(1.0 - rng.random() * (1 - 1e-12) - 5e-13)) for _ in responses]
    return [
        r / NOISE + g
        for r, g in zip(reward([prompt] * len(responses), list(responses)), gumbel, strict=True)
    ]


# -----------------------------------------------------------------------------------------------
# Rows, in the columns that common.py reads

TINY = Path(__file__).resolve().parent / "tiny"
MODEL_FILES = """config.json generation_config.json model.safetensors tokenizer.json
tokenizer_config.json chat_template.jinja""".split()
DEMONSTRATIONS = {"train": 20_000, "test": 512}  # families, four questions each
OFF_POLICY = {"train": 12_000, "test": 512}


def rows(dataset: str, split: str, kind: str) -> Iterator[tuple[str, dict]]:
    """(where, row): demonstrations for sft.py; else judged samples of the fine-tuned `tiny`.

    `family:off-policy` has pairs that the policy would not have written: the right answer against a
    corrupted one, for comparison.
    """
    _, _, variant = dataset.partition(":")
    if variant not in ("", "off-policy"):
        raise ValueError(f"{dataset}: the embedded task has family and family:off-policy")
    if variant == "off-policy":
        for i, (family, relation, person, rng) in enumerate(_take(OFF_POLICY[split], 0, split)):
            right = family.answer(relation, person)
            yield (
                f"{dataset} {split} {i}",
                {
                    "prompt": prompt_of(family, relation, person),
                    "chosen": write(right),
                    "rejected": write(_corrupted(right, family, rng)),
                },
            )
    elif kind == "demonstration":
        for i, (family, relation, person, rng) in enumerate(_take(DEMONSTRATIONS[split], 0, split)):
            yield f"{dataset} {split} {i}", {"messages": _dialogue(family, relation, person, rng)}
    else:
        import pyarrow.parquet

        file = TINY / f"judged-{split}.parquet"
        for i, row in enumerate(pyarrow.parquet.read_table(file).to_pylist(), 1):
            yield f"{file}:row {i}", row


def _take(n: int, seed: int, split: str) -> Iterator[tuple[Family, str, str, random.Random]]:
    return itertools.islice(questions(seed, split), n)


def _dialogue(family: Family, relation: str, person: str, rng: random.Random) -> list[dict]:
    """Four questions about one family: a description is long, so it should teach more than once."""
    asked, messages = [(relation, person)], []
    for _ in range(3):
        relation = rng.choice(RELATIONS)
        people = [p for p in family.people() if family.answer(relation, p)]
        fresh = [p for p in people if (relation, p) not in asked]
        if fresh:
            asked.append((relation, rng.choice(fresh)))
    for i, (relation, person) in enumerate(asked):
        text = question(relation, person) if i else prompt_of(family, relation, person)
        answer = write(demonstrate(family, relation, person, rng))
        messages += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
    return messages


def test_prompts(n: int) -> list[str]:
    """The same unseen questions for every model that is measured."""
    return [prompt_of(*asked[:3]) for asked in _take(n, 1, "test")]


# -----------------------------------------------------------------------------------------------
# Tokenizer and model: byte-level, every word of the closed vocabulary a token

SPLIT = r" ?[A-Za-z]+|[^A-Za-z]"  # no \s or \w: two regex engines must agree on any Unicode text
SPECIAL = ("<|begin|>", "<|end|>", "<|pad|>")
WORDS = sorted(
    {
        "child",
        "parent",
        "and",
        "Who",
        "is",
        "are",
        "the",
        "of",
        *NAMES,
        *" ".join(RELATIONS).split(),
    }
)
TEMPLATE = (  # turns stand one after another, an answer with its end
    "{{ bos_token }}{% for m in messages %}{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)


def encoding():
    """The tiktoken encoding."""
    import tiktoken

    words = [b"Family", *(f" {word}".encode() for word in WORDS)]
    tokens = [bytes([byte]) for byte in range(256)] + words
    return tiktoken.Encoding(
        "plainpref-family",
        pat_str=SPLIT,
        mergeable_ranks={token: rank for rank, token in enumerate(tokens)},
        special_tokens={token: len(tokens) + i for i, token in enumerate(SPECIAL)},
    )


def hf_tokenizer():
    """The same as an ordinary Hugging Face tokenizer: the very same ids for any text."""
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        pre_tokenizers,
        processors,
    )
    from transformers import PreTrainedTokenizerFast

    source = encoding()
    ranks = {source.decode_single_token_bytes(i): i for i in range(source.n_vocab - len(SPECIAL))}
    spelled = {token: "".join(map(_visible, token)) for token in ranks}
    # tiktoken takes a piece whole if it is a token, else merges neighbours whose join is one,
    # lowest rank first. That is every split of every token as a merge, in the order of ranks.
    merges = [
        (spelled[token[:at]], spelled[token[at:]])
        for token in ranks
        for at in range(1, len(token))
        if token[:at] in ranks and token[at:] in ranks
    ]
    vocabulary = {spelled[token]: rank for token, rank in ranks.items()}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    begin = SPECIAL[0]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A",
        pair=f"{begin} $A $B",
        special_tokens=[(begin, source.encode_single_token(begin))],
    )
    bos, eos, pad = SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def _visible(byte: int) -> str:
    """How byte-level tokenizers spell a byte in their vocabulary: itself if it can be seen, else
    the next free character from U+0100 on."""
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return (
        chr(byte)
        if byte in seen
        else chr(0x100 + [b for b in range(256) if b not in seen].index(byte))
    )


def untrained_model():
    """A Llama of about a million parameters with random weights (from torch's global generator)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    vocabulary = encoding()
    bos, eos, pad = (vocabulary.encode_single_token(token) for token in SPECIAL)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary.n_vocab,
            hidden_size=128,
            intermediate_size=320,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            initializer_range=0.06,  # the usual 0.02 takes much longer to learn to copy names
            bos_token_id=bos,
            eos_token_id=eos,
            pad_token_id=pad,
        )
    )


# -----------------------------------------------------------------------------------------------
# What training changed, in the true reward

MAX_NEW_TOKENS = 16


def measure(run, policy, start, tokenizer, n: int) -> dict[str, float]:
    """The policy against the model it started from, on n fixed unseen prompts."""
    import torch

    import common
    import generation

    texts = test_prompts(n)
    prompts = [np.array(tokenizer(text).input_ids, np.int32) for text in texts]

    def answers(model, temperature, seed, label):
        made = generation.generate(
            model, prompts, tokenizer.stop_ids, MAX_NEW_TOKENS, temperature, seed, run, label=label
        )
        return made, np.array(reward(texts, [generation.text_of(ids, tokenizer) for ids in made]))

    first, before = answers(start, 1.0, 1, "start, sampled")
    last, after = answers(policy, 1.0, 2, "policy, sampled")
    seen = common.Rows(
        "samples", [common.Row(p, [y], p) for p, y in zip(prompts, last, strict=True)]
    )
    log_ratios = torch.zeros(n, dtype=torch.float64)
    with torch.no_grad():
        parts = common.micro_batches([row.length() for row in seen.rows], range(n), 256)
        for part, mine in run.share(parts, "KL"):
            micro = common.collate(seen, part, run.device)
            ratio = common.response_logps(policy, micro)[0] - common.response_logps(start, micro)[0]
            if mine:
                log_ratios[part] = ratio[:, 0].double().cpu()
    if run.world > 1:
        torch.distributed.all_reduce(log_ratios)
    return {
        "prompts": n,
        "sampled/before": before.mean(),
        "sampled/after": after.mean(),
        "greedy/before": answers(start, 0.0, 0, "start, greedy")[1].mean(),
        "greedy/after": answers(policy, 0.0, 0, "policy, greedy")[1].mean(),
        "cooled/before": answers(start, 0.5, 3, "start at half the temperature")[1].mean(),
        "win_rate": ((after > before) + 0.5 * (after == before)).mean(),
        "kl": log_ratios.mean().item(),
        "kl_error": log_ratios.std().item() / n**0.5,
        "length/before": np.mean([len(ids) for ids in first]),
        "length/after": np.mean([len(ids) for ids in last]),
    }


def measure_scores(run, model, start, tokenizer, n: int) -> dict[str, float]:
    """A reward model on n fixed unseen prompts, four answers of the starting model to each, judged
    as noisily as what it learned from. The true reward's own accuracy is what can be reached at
    most (but for luck); equal rewards count as half.
    """
    import generation
    import scoring

    texts = test_prompts(n)
    prompts = [np.array(tokenizer(text).input_ids, np.int32) for text in texts]
    made = generation.generate(
        start, prompts, tokenizer.stop_ids, MAX_NEW_TOKENS, 1.0, 4, run, label="answers", samples=4
    )
    asked = [i for i in range(n) for _ in range(4)]
    reward_model = scoring.Reward("the trained model", tokenizer, run)
    reward_model.model = model
    scores = reward_model([prompts[i] for i in asked], made).tolist()
    answers = [generation.text_of(ids, tokenizer) for ids in made]
    true = reward([texts[i] for i in asked], answers)
    pairs, right, ceiling, known, truly = 0, 0.0, 0.0, 0, 0.0
    half = lambda a, b: float(a > b) + 0.5 * (a == b)  # noqa: E731
    for i in range(n):
        at = range(4 * i, 4 * i + 4)
        judged = judge(texts[i], [answers[j] for j in at], random.Random(f"measured-{i}"))
        judged = dict(zip(at, judged, strict=True))
        for a, b in itertools.combinations(at, 2):
            if answers[a] == answers[b]:
                continue
            a, b = (a, b) if judged[a] > judged[b] else (b, a)
            pairs += 1
            right += half(scores[a], scores[b])
            ceiling += half(true[a], true[b])
            if true[a] != true[b]:
                known += 1
                better, worse = (a, b) if true[a] > true[b] else (b, a)
                truly += half(scores[better], scores[worse])
    accuracy, ceiling = right / pairs, ceiling / pairs
    return {
        "prompts": n,
        "pairs": pairs,
        "accuracy": accuracy,
        "ceiling": ceiling,
        "share": (accuracy - 0.5) / (ceiling - 0.5),
        "true_accuracy": truly / known,
        "mean_score": float(np.mean(scores)),
    }


def judge_samples(model: str = "runs/sft", output_dir: str = "tiny", prompts: int = 12_000) -> None:
    """Four samples a prompt of a model, scored by the noisy annotator, as Parquet, beside a copy of
    that model.
    """
    import pyarrow
    import pyarrow.parquet

    import common
    import generation

    for name in MODEL_FILES:
        shutil.copyfile(Path(model) / name, Path(output_dir) / name)
    run = common.Processes()
    tokenizer = common.load_tokenizer(model, 1)
    policy = common.load_policy(model, "float32", run)
    for split, n in (("train", prompts), ("test", 512)):
        texts = [prompt_of(*asked[:3]) for asked in _take(n, 2, split)]
        ids = [np.array(tokenizer(text).input_ids, np.int32) for text in texts]
        samples = []
        for k in range(4):
            made = generation.generate(
                policy,
                ids,
                tokenizer.stop_ids,
                MAX_NEW_TOKENS,
                1.0,
                k,
                run,
                label=f"{split} {k + 1}",
            )
            samples.append([generation.text_of(answer, tokenizer) for answer in made])
        rng = random.Random(f"judge-{split}")
        judged = []
        for text, responses in zip(texts, zip(*samples, strict=True), strict=True):
            scores = [round(score, 3) for score in judge(text, responses, rng)]
            if all(response.strip() for response in responses):  # an empty answer makes a bad row
                judged.append({"prompt": text, "responses": responses, "scores": scores})
        file = Path(output_dir) / f"judged-{split}.parquet"
        table = pyarrow.Table.from_pylist(judged)
        pyarrow.parquet.write_table(table, file, compression="zstd", compression_level=19)
        print(f"{file}: {len(judged):,} prompts, {file.stat().st_size / 1e6:.2f} MB", flush=True)


def show(n: int = 3) -> None:
    """A few rows of every kind."""
    for dataset, kind in (
        ("family", "demonstration"), ("family", "ranked"), ("family:off-policy", "pair"),
    ):  # fmt: skip
        print(f"\n{dataset}, {kind}")
        for _, row in itertools.islice(rows(dataset, "train", kind), n):
            print(json.dumps(row))


if __name__ == "__main__":
    import tyro

    tyro.extras.subcommand_cli_from_dict({"show": show, "judge": judge_samples})
