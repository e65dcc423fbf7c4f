"""The sentiment task of results/real: its parts do not overlap, and its files are what it makes."""

import importlib.util
import json

import pytest
from conftest import ROOT

HERE = ROOT / "results" / "real"
spec = importlib.util.spec_from_file_location("sentiment", HERE / "sentiment.py")
task = importlib.util.module_from_spec(spec)
spec.loader.exec_module(task)


def rows_of(name: str) -> list[dict]:
    return [json.loads(line) for line in (HERE / name).read_text("utf-8").splitlines()]


def test_no_topic_is_in_two_parts():
    topics = [topic.strip() for topic in task.TOPICS]
    assert len(set(topics)) == len(topics) == sum(len(topics[part]) for part in task.PARTS.values())
    for part, of_part in task.PARTS.items():
        for prompt in task.prompts(part):
            assert max((x for x in topics if x in prompt), key=len) in topics[of_part]


def test_the_committed_files():
    for part in task.PARTS:
        assert [row["prompt"] for row in rows_of(f"prompts-{part}.jsonl")] == task.prompts(part)
    for part in ("train", "test"):
        rows = rows_of(f"samples-{part}.jsonl")
        assert [row["prompt"] for row in rows] == task.prompts(part)
        assert all(1 <= len(row["responses"]) == len(row["scores"]) <= 4 for row in rows)


def test_the_scores_are_vaders():
    pytest.importorskip("vaderSentiment")
    for row in rows_of("samples-test.jsonl")[:50]:
        assert task.score([row["prompt"]] * len(row["scores"]), row["responses"]) == row["scores"]


def test_measures():
    prompts = ["Describe cold coffee in a single sentence.", "Write one sentence about potholes."]
    answers = ["Coffee is great, great, great, great!", "Nice roads have none."]
    assert task.on_topic(prompts, answers) == [1, 0]
    assert task.hacked(prompts, answers) == [1, 0]
    assert task.distinct_2(prompts, answers) == [3 / 5, 1]
