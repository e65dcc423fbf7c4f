"""chrF and BLEU are what sacrebleu's own command line prints; ROUGE-L is a longest common
subsequence that can be found by trying all.
"""

import ast
import inspect
import json
import math
import os
import random
import re
import subprocess
import sys
from itertools import combinations

import pytest
import sacrebleu
from conftest import text
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU, CHRF

import common
import textmetrics

ANSWERS = [
    " The cat sat on a mat, and then another.",
    "Die Katze saß auf der Matte – «nicht» im Haus.",
    "",
    "it's 3.5 %  of the\tbig red dog's (warm) wood.\nA second line\r\nand a third.",
    "a list: one-\ntwo, one & two < three",
    "全然 違う 文章です。",
]
REFERENCES = [
    "The cat sat on the mat and then another one.",
    "Die Katze saß auf der Matte, nicht im Haus!",
    "Nobody wrote this.",
    "It's 3.5% of the big dog's warm wood. A second line and a third one.",
    "a list: one-two, one & two < three",
    "完全に違う文章です。",
]


def corpus(n: int, seed: int) -> tuple[list[str], list[str]]:
    """Answers that share words with their references; some are empty."""
    rng = random.Random(seed)
    references = [text(rng, 1, 12) for _ in range(n)]
    answers = [
        " ".join(word for word in (right + " " + text(rng, 0, 4)).split() if rng.random() < 0.7)
        for right in references
    ]
    return answers, references


def command_line(tmp_path, answers: list[str], references: list[str], *flags: str):
    """As somebody would do it: a text a line in two files."""
    for name, texts in (("ref.txt", references), ("hyp.txt", answers)):
        lines = [re.sub(r"\s+", " ", one) for one in texts]
        (tmp_path / name).write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "sacrebleu", "ref.txt", "-i", "hyp.txt", *flags],
        cwd=tmp_path, env=os.environ | {"PYTHONUTF8": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("rows", ["hand-written", "random"])
def test_every_digit_and_the_signature_of_the_command_line(rows, tmp_path):
    answers, references = (ANSWERS, REFERENCES) if rows == "hand-written" else corpus(40, seed=1)
    flags = ("-m", "bleu", "chrf", "-w", "6")
    told = json.loads(command_line(tmp_path, answers, references, *flags))
    assert [one["name"] for one in told] == ["BLEU", "chrF2"]
    for one, metric in zip(told, (textmetrics.bleu, textmetrics.chrf), strict=True):
        score, statistics, signature = metric(answers, references)
        assert 5 < score < 95
        assert f"{score:.6f}" == f"{one['score']:.6f}"
        assert signature == one["signature"]
        assert f"version:{sacrebleu.__version__}" in signature
        assert len(statistics) == len(answers)
    bare = json.loads(command_line(tmp_path, answers, references, *flags, "-b"))
    assert bare == [float(f"{one['score']:.6f}") for one in told]


@pytest.mark.parametrize("tokenize", ["zh", "char", "intl", "none"])
def test_other_ways_to_cut_words(tokenize, tmp_path):
    out = command_line(tmp_path, ANSWERS, REFERENCES, "-m", "bleu", "-w", "6", "-tok", tokenize)
    score, _, signature = textmetrics.bleu(ANSWERS, REFERENCES, tokenize)
    assert f"{score:.6f}" == f"{json.loads(out)['score']:.6f}"
    assert f"|tok:{tokenize}|" in signature and signature == json.loads(out)["signature"]


@pytest.mark.parametrize("name", ["bleu", "chrf"])
def test_a_resampled_set_scores_as_that_set(name):
    """Counts of rows are no documented part of sacrebleu: its documented score is the judge."""
    answers, references = corpus(30, seed=2)
    answers, references = answers + ANSWERS, references + REFERENCES
    score, statistics, _ = getattr(textmetrics, name)(answers, references)
    statistics = json.loads(json.dumps(statistics))  # what stands in a file is as good
    everything = range(len(answers))
    assert textmetrics.resampled(name, statistics, everything) == score
    rng = random.Random(3)
    seen = set()
    for _ in range(50):
        drawn = rng.choices(everything, k=rng.randint(1, len(answers)))
        lines = [" ".join(answers[i].split()) for i in drawn]
        right = [" ".join(references[i].split()) for i in drawn]
        expected = {"bleu": BLEU, "chrf": CHRF}[name]().corpus_score(lines, [right]).score
        assert textmetrics.resampled(name, statistics, drawn) == pytest.approx(expected, abs=1e-12)
        seen.add(round(expected, 6))
    assert len(seen) > 40


def test_bleu_by_hand():
    """8 of 9 words, 6 of 8 pairs, 4 of 7 triples, 2 of 6 fours are right; 9 words against 10."""
    score, statistics, _ = textmetrics.bleu(
        ["the cat sat on a mat and then ran"], ["the cat sat on the mat and then ran off"]
    )
    assert statistics == [[9, 10, 8, 6, 4, 2, 9, 8, 7, 6]]
    mean = (8 / 9 * 6 / 8 * 4 / 7 * 2 / 6) ** (1 / 4)
    assert score == pytest.approx(100 * math.exp(1 - 10 / 9) * mean)


def longest_common(a: list[str], b: list[str]) -> int:
    """By trying every choice of words of a, the longest first."""
    for n in range(len(a), 0, -1):
        for chosen in combinations(a, n):
            rest = iter(b)
            if all(word in rest for word in chosen):
                return n
    return 0


def test_rouge_l_by_trying_all_subsequences():
    answers, references = corpus(40, seed=4)
    answers = [" ".join(answer.split()[:9]) for answer in answers]
    score, each, how = textmetrics.rouge_l(answers, references)
    for answer, right, found in zip(answers, references, each, strict=True):
        common_words = longest_common(answer.split(), right.split())
        precision = common_words / max(1, len(answer.split()))
        recall = common_words / len(right.split())
        f1 = 2 * precision * recall / (precision + recall) if common_words else 0.0
        assert found == pytest.approx(100 * f1)
    assert score == pytest.approx(sum(each) / len(each))
    assert how.startswith("rougeL|F1|stemmer:no|rouge-score:0.")


@pytest.mark.parametrize("stemmer", [False, True])
def test_rouge_l_is_that_of_the_package(stemmer):
    answers = [*ANSWERS, "He cooked dinners"]
    references = [*REFERENCES, "he cooks dinner"]
    score, each, how = textmetrics.rouge_l(answers, references, stemmer)
    scorer = RougeScorer(["rougeL"], use_stemmer=stemmer)
    pairs = zip(references, answers, strict=True)
    assert each == [100 * scorer.score(*pair)["rougeL"].fmeasure for pair in pairs]
    assert each[-1] == pytest.approx(100 if stemmer else 100 / 3)
    assert each[2] == each[5] == 0.0  # nothing written; no letter that it knows
    assert f"stemmer:{'yes' if stemmer else 'no'}" in how
    assert textmetrics.resampled("rouge_l", each, [0, 0, 3]) == (2 * each[0] + each[3]) / 3


@pytest.mark.parametrize("name", ["chrf", "bleu", "rouge_l"])
def test_empty_answers(name):
    metric = getattr(textmetrics, name)
    score, statistics, _ = metric(["", "  \n"], ["a cat", "a dog"])
    assert score == 0.0 and len(statistics) == 2
    assert textmetrics.resampled(name, statistics, [1, 1]) == 0.0
    score, statistics, _ = metric(["", "the cat sat on the mat"], ["", "the cat sat on the mat"])
    assert score == pytest.approx(50.0 if name == "rouge_l" else 100.0)
    assert textmetrics.resampled(name, statistics, [1]) == pytest.approx(100.0)
    with pytest.raises(ValueError):
        metric(["a cat"], ["a cat", "a dog"])


@pytest.mark.parametrize("name", ["chrf", "bleu", "rouge_l"])
def test_a_missing_package_is_told_with_the_command_that_brings_it(name, monkeypatch):
    package = "rouge-score" if name == "rouge_l" else "sacrebleu"
    textmetrics.check([name])
    monkeypatch.setattr(textmetrics, "find_spec", lambda module: None)
    with pytest.raises(common.UserError, match=f"{name} needs {package}: pip install {package}$"):
        textmetrics.check([name])


def test_what_does_not_exist_is_told():
    textmetrics.check([])
    textmetrics.check(["chrf", "bleu", "rouge_l"])
    with pytest.raises(common.UserError, match="meteor is no text metric; these are: chrf, bleu"):
        textmetrics.check(["meteor"])
    with pytest.raises(common.UserError, match="nosuch is no tokenizer; sacrebleu has none, zh"):
        textmetrics.check(["bleu"], "nosuch")


def test_nothing_is_imported_before_it_is_asked_for():
    """evaluate.py works without the two packages."""
    top = ast.parse(inspect.getsource(textmetrics)).body
    named = {alias.name for node in top if isinstance(node, ast.Import) for alias in node.names}
    named |= {node.module for node in top if isinstance(node, ast.ImportFrom)}
    assert named == {"importlib.metadata", "importlib.util", "typing", "numpy", "common"}
