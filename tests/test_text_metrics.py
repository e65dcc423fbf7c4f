"""chrF, BLEU and ROUGE-L: known values, and the options of sacrebleu that are used."""

import math

import pytest

pytest.importorskip("sacrebleu")
pytest.importorskip("rouge_score")

from evaluation import text_metrics  # noqa: E402

ANSWERS = ["the cat sat on a mat\nand then ran ", "", "它 in 3.5 % of the dog's wood"]
REFERENCES = ["the cat sat on the mat and then ran off", "nobody", "它们 in 3.5% of the dog's wood"]


def test_known_values():
    """8 of 9 words, 6 of 8 pairs, 4 of 7 triples, 2 of 6 fours are right; 9 words against 10."""
    table: dict = {}
    text_metrics.compare_texts(table, "m", [ANSWERS[:1]], REFERENCES[:1], "13a")
    mean = (8 / 9 * 6 / 8 * 4 / 7 * 2 / 6) ** (1 / 4)
    assert table["m/bleu"][0].value == pytest.approx(100 * math.exp(1 - 10 / 9) * mean)
    # The longest common subsequence has 8 words.
    f1 = 2 * (8 / 9) * (8 / 10) / (8 / 9 + 8 / 10)
    assert table["m/rouge_l"][0].value == pytest.approx(100 * f1)


def test_two_sides_and_signatures():
    table: dict = {}
    signatures = text_metrics.compare_texts(table, "m", [REFERENCES, ANSWERS], REFERENCES, "zh")
    for name in ("chrf", "bleu", "rouge_l"):
        ours, theirs = table[f"m/{name}"][:2]
        assert ours.value == pytest.approx(100) and 0 < theirs.value < 95
    change = table["m/rouge_l"][2]  # the mean over rows has an interval
    assert change.low < change.value < change.high and change.n == 3
    assert "|nc:6|nw:0|" in signatures[0] and "|tok:zh|" in signatures[1]
    assert signatures[2].startswith("rougeL|F1|stemmer:no|rouge-score:")


def test_an_unknown_tokenizer_and_a_missing_package(monkeypatch):
    with pytest.raises(ValueError, match="--bleu-tokenize must be one of .*13a"):
        text_metrics.load_metrics("nosuch")
    monkeypatch.setitem(__import__("sys").modules, "sacrebleu.metrics", None)
    with pytest.raises(ValueError, match="pip install sacrebleu rouge-score"):
        text_metrics.load_metrics("13a")
