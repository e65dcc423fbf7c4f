"""Answers against reference texts: chrF and BLEU by sacrebleu, ROUGE-L by rouge-score.

    chrF, BLEU    of the whole set: n-grams are counted in every row, summed, and scored once. What
                  is returned beside the score are the counts of each row, so that a bootstrap can
                  sum those of the rows that it drew, and score that
    ROUGE-L       F-measure of the longest common subsequence of words; the mean over the rows

Imported by evaluate.py for rows that have references. Both packages are optional: nothing is
imported from them before a metric is asked for. The signature that comes with a number says what it
takes to get the same one; give both.

1. A text is one line, as in the files of sacrebleu's command line: line breaks and runs of spaces
   become one space, and a space at either end goes.
2. BLEU depends on how text is cut into words. sacrebleu's default, 13a, is of no use for Chinese
   (`zh`), Japanese (`ja-mecab`) and Korean (`ko-mecab`). chrF counts characters and needs none.
3. rouge-score knows the letters a to z and digits alone: in other scripts every word is lost.
"""

from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import numpy as np

from common import UserError

PACKAGES = {"chrf": "sacrebleu", "bleu": "sacrebleu", "rouge_l": "rouge-score"}
Statistics = list[list[int]]  # (N, ...) counts of each row


def check(names: list[str], tokenize: str = "13a") -> None:
    """Named before anything is loaded."""
    for name in names:
        if name not in PACKAGES:
            raise UserError(f"{name} is no text metric; these are: {', '.join(PACKAGES)}")
        package = PACKAGES[name]
        if find_spec(package.replace("-", "_")) is None:
            raise UserError(f"{name} needs {package}: pip install {package}")
    if "bleu" in names:
        _metric("bleu", tokenize)


def chrf(answers: list[str], references: list[str]) -> tuple[float, Statistics, str]:
    """The score of all rows in 0 to 100, the counts of each row, sacrebleu's signature."""
    return _corpus_score(_metric("chrf"), answers, references)


def bleu(
    answers: list[str], references: list[str], tokenize: str = "13a"
) -> tuple[float, Statistics, str]:
    """The same."""
    return _corpus_score(_metric("bleu", tokenize), answers, references)


def rouge_l(
    answers: list[str], references: list[str], stemmer: bool = False
) -> tuple[float, list[float], str]:
    """The mean over the rows in 0 to 100, that of each row, how it was counted. `stemmer`: cooked
    is cook, as in the tables of some papers; off is the package's default.
    """
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=stemmer)
    pairs = zip(answers, references, strict=True)
    scores = [100 * scorer.score(right, answer)["rougeL"].fmeasure for answer, right in pairs]
    how = f"rougeL|F1|stemmer:{'yes' if stemmer else 'no'}|rouge-score:{version('rouge-score')}"
    return sum(scores) / len(scores), scores, how


def resampled(name: str, statistics: list, indexes: Any) -> float:
    """The score of a set made of these rows, one as often as its index occurs. For a bootstrap,
    make an array of `statistics` once.
    """
    drawn = np.asarray(statistics)[np.asarray(indexes)]  # (n,) or (n, counts)
    if name == "rouge_l":
        return float(drawn.mean())
    return _metric(name)._compute_score_from_stats(drawn.sum(0).tolist()).score


def _metric(name: str, tokenize: str = "13a") -> Any:
    from sacrebleu.metrics import BLEU, CHRF

    if name == "chrf":
        return CHRF()
    if tokenize not in BLEU.TOKENIZERS:
        raise UserError(f"{tokenize} is no tokenizer; sacrebleu has {', '.join(BLEU.TOKENIZERS)}")
    try:
        return BLEU(tokenize=tokenize)
    except (ImportError, RuntimeError) as error:  # Japanese and Korean need a package each
        raise UserError(f"BLEU's tokenizer {tokenize}: {' '.join(str(error).split())}") from None


def _corpus_score(
    metric: Any, answers: list[str], references: list[str]
) -> tuple[float, Statistics, str]:
    """Counts of a row are not part of sacrebleu's documented interface, but its own bootstrap goes
    by these two methods too; the tests hold them against corpus_score.
    """
    if len(answers) != len(references):
        raise ValueError(f"{len(answers)} answers and {len(references)} references")
    lines, right = ([" ".join(text.split()) for text in texts] for texts in (answers, references))
    statistics = metric._extract_corpus_statistics(lines, [right])
    score = metric.corpus_score(lines, [right]).score
    return score, statistics, str(metric.get_signature())
