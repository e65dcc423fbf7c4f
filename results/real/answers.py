"""results/real/answers.md: what evaluate.py showed of each method's answers.

    python -m results.real.answers

reads the logs of compare.py, runs/real/<method>-s0.log.

Copyright (c) 2026 the plainpref authors. MIT licence.
"""

import re
from pathlib import Path

from compare import METHODS
from evaluation.study import read_rows

FOLDER = Path("results/real")
HEAD = """# Answers before and after

The first three held-out prompts, sampled at temperature 1, from the logs of `evaluate.py`; answers
end at 40 tokens. Numbers are VADER's score.
"""


def shown(log: Path) -> list[tuple[str, list[str]]]:
    """Each question, and its answers by the method and by the start, with their scores."""
    lines = log.read_text(encoding="utf-8").splitlines()
    text = "\n".join(
        x for x in lines if not re.match(r"(log-probs|sampling|answers,) .*(it|/it)", x)
    )
    found = []
    for part in re.findall(
        r"question \d, answers sampled: (.*?)(?=\nquestion \d|\na: )", text, re.S
    ):
        question = re.search(r"<\|im_start\|>user\n(.*?)<\|im_end\|>", part, re.S)[1]
        answers = re.split(r"\n-- \S+: \d+ tokens, reward (-?[\d.]+)\n", part)[1:]
        scores, texts = answers[0::2], [" ".join(x.split()) for x in answers[1::2]]
        pairs = zip(scores, texts, strict=True)
        found.append((question, [f"({float(score):.2f}): {x}" for score, x in pairs]))
    return found


def main() -> None:
    done = {row.get("method") for row in read_rows(FOLDER) if row["default"]}
    logs = {name: shown(Path(f"runs/real/{name}-s0.log")) for name in METHODS if name in done}
    text = HEAD
    for i, (question, (_, start)) in enumerate(next(iter(logs.values()))):
        text += f"\n**{question}**\n\n- the start {start}\n"
        for name, found in logs.items():
            assert found[i][0] == question and found[i][1][1] == start
            text += f"- `{name}` {found[i][1][0]}\n"
    (FOLDER / "answers.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
