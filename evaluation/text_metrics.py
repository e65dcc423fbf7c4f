"""Answers against reference texts: chrF and BLEU (sacrebleu), ROUGE-L (rouge-score).

chrF and BLEU are corpus scores, without an interval. ROUGE-L is the mean over rows of the F-measure
of the longest common subsequence of words; rouge-score knows only the letters a to z and digits.
"""

from importlib.metadata import version

import numpy as np

from evaluation.estimates import Estimate, Table, means


def load_metrics(tokenize: str) -> tuple:
    try:
        from rouge_score.rouge_scorer import RougeScorer
        from sacrebleu.metrics import BLEU, CHRF
    except ImportError:
        raise ValueError("--text-metrics: pip install sacrebleu rouge-score") from None
    if tokenize not in BLEU.TOKENIZERS:
        raise ValueError(f"--bleu-tokenize must be one of {', '.join(BLEU.TOKENIZERS)}")
    return CHRF(), BLEU(tokenize=tokenize), RougeScorer(["rougeL"])


def compare_texts(
    table: Table, mode: str, sides: list[list[str]], references: list[str], tokenize: str
) -> list[str]:
    """Add the scores (0 to 100) of one or two sides; return how to reproduce them."""
    chrf, bleu, rouge = load_metrics(tokenize)
    # As in the files of sacrebleu's command line, a text is one line.
    *lines, right = ([" ".join(x.split()) for x in texts] for texts in (*sides, references))
    for name, metric in (("chrf", chrf), ("bleu", bleu)):
        scores = [metric.corpus_score(answers, [right]).score for answers in lines]
        table[f"{mode}/{name}"] = [Estimate(score) for score in scores]
    rows = [[rouge.score(*pair)["rougeL"] for pair in zip(right, x, strict=True)] for x in lines]
    table[f"{mode}/rouge_l"] = means(*(np.array([100 * s.fmeasure for s in x]) for x in rows))
    how = f"rougeL|F1|stemmer:no|rouge-score:{version('rouge-score')}"
    return [str(chrf.get_signature()), str(bleu.get_signature()), how]
