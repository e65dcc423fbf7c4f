"""What training changed, measured with the true reward of the embedded task.

`sample(which, texts, temperature, seed, label, samples=1)` returns the answers (token ids, up to
MAX_NEW_TOKENS of them) and their texts: `samples` per prompt, consecutively. `which` is "start",
the model before training, or "policy", the trained one. Under torchrun every process makes the same
calls in the same order.
"""

import itertools
import random
from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor

from family import task

MAX_NEW_TOKENS = 16

Sample = Callable[..., tuple[list[np.ndarray], list[str]]]


def measure(
    sample: Sample,
    log_ratios: Callable[[list[str], list[np.ndarray]], Tensor],  # (n,) log policy(y|x)/start(y|x)
    n: int,
) -> dict[str, float]:
    """Compare the policy with the model it started from, on n fixed unseen prompts."""
    texts = task.test_prompts(n)

    def rewards_of(which, temperature, seed, label) -> tuple[list[np.ndarray], np.ndarray]:
        answers, written = sample(which, texts, temperature, seed, label)
        return answers, np.array(task.reward(texts, written))

    first, before = rewards_of("start", 1.0, 1, "start, sampled")
    last, after = rewards_of("policy", 1.0, 2, "policy, sampled")
    kl = log_ratios(texts, last)
    return {
        "prompts": n,
        "sampled/before": before.mean(),
        "sampled/after": after.mean(),
        "greedy/before": rewards_of("start", 0.0, 0, "start, greedy")[1].mean(),
        "greedy/after": rewards_of("policy", 0.0, 0, "policy, greedy")[1].mean(),
        "cooled/before": rewards_of("start", 0.5, 3, "start at half the temperature")[1].mean(),
        "win_rate": ((after > before) + 0.5 * (after == before)).mean(),
        "kl": kl.mean().item(),
        "kl_error": kl.std().item() / n**0.5,
        "length/before": np.mean([len(ids) for ids in first]),
        "length/after": np.mean([len(ids) for ids in last]),
    }


def measure_scores(
    sample: Sample,
    score: Callable[[list[str], list[np.ndarray]], Sequence[float]],  # prompts, answers -> scores
    n: int,
) -> dict[str, float]:
    """Measure a reward model on n fixed unseen prompts, with four answers of the starting model to
    each, judged with the same noise as its training data.

    Not even the true reward predicts a noisy judge: its accuracy is the ceiling (up to luck). Equal
    rewards count as half.
    """
    texts = task.test_prompts(n)
    answers, written = sample("start", texts, 1.0, 4, "answers", samples=4)
    prompts = [text for text in texts for _ in range(4)]
    scores = score(prompts, answers)
    rewards = task.reward(prompts, written)

    def ordered(values: Sequence[float], better: int, worse: int) -> float:
        return float(values[better] > values[worse]) + 0.5 * (values[better] == values[worse])

    by_model, by_reward, against_reward = [], [], []  # one entry per pair
    for i, text in enumerate(texts):
        group = range(4 * i, 4 * i + 4)
        judged = task.judge(text, [written[j] for j in group], random.Random(f"measured-{i}"))
        judged = dict(zip(group, judged, strict=True))
        for a, b in itertools.combinations(group, 2):
            if written[a] == written[b]:
                continue
            better, worse = (a, b) if judged[a] > judged[b] else (b, a)
            by_model.append(ordered(scores, better, worse))
            by_reward.append(ordered(rewards, better, worse))
            if rewards[a] != rewards[b]:
                better, worse = (a, b) if rewards[a] > rewards[b] else (b, a)
                against_reward.append(ordered(scores, better, worse))
    accuracy, ceiling = sum(by_model) / len(by_model), sum(by_reward) / len(by_reward)
    return {
        "prompts": n,
        "pairs": len(by_model),
        "accuracy": accuracy,
        "ceiling": ceiling,
        "share": (accuracy - 0.5) / (ceiling - 0.5),
        "true_accuracy": sum(against_reward) / len(against_reward),
        "mean_score": float(np.mean(scores)),
    }
