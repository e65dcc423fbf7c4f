"""Make the files of the embedded task.

    python sft.py                                   # trains the model of family/tiny
    python -m family.build judge --model runs/sft   # copies it, samples from it, scores the samples
    python -m family.build show                     # prints a few rows of every kind

family/preferred is `python listwise_dpo.py --max-steps 700 --lr 1e-4`, rounded to bfloat16.
"""

import itertools
import json
import random
import shutil
from pathlib import Path

import numpy as np

import common
from family import task
from family.measure import MAX_NEW_TOKENS
from sampling import generate

MODEL_FILES = (
    "config.json generation_config.json model.safetensors tokenizer.json tokenizer_config.json "
    "chat_template.jinja"
).split()


def judge_samples(model: str = "runs/sft", output_dir: str = "family/tiny", prompts: int = 12_000):
    """Copy a model and write four samples per prompt, scored by the noisy annotator, as Parquet."""
    from pyarrow import Table, parquet

    for name in MODEL_FILES:
        shutil.copyfile(Path(model) / name, Path(output_dir) / name)
    run = common.Processes()
    tokenizer = common.load_tokenizer(model)
    policy = common.load_policy(common.Args(model=model, dtype="float32"), run)
    for split, n in (("train", prompts), ("test", 512)):
        texts = [task.prompt_of(*drawn[:3]) for drawn in task.take(n, 2, split)]
        ids = [np.array(tokenizer(text).input_ids, np.int32) for text in texts]
        samples = []
        for k in range(4):
            answers = generate.generate(
                policy, ids, tokenizer.stop_ids, MAX_NEW_TOKENS, temperature=1.0, seed=k, run=run,
                label=f"{split} {k + 1}",
            )  # fmt: skip
            samples.append([generate.text_of(answer, tokenizer) for answer in answers])
        rng = random.Random(f"judge-{split}")
        judged = []
        for text, responses in zip(texts, zip(*samples, strict=True), strict=True):
            scores = [round(score, 3) for score in task.judge(text, responses, rng)]
            if all(response.strip() for response in responses):  # an empty answer makes a bad row
                judged.append({"prompt": text, "responses": responses, "scores": scores})
        file = Path(output_dir) / f"judged-{split}.parquet"
        table = Table.from_pylist(judged)
        parquet.write_table(table, file, compression="zstd", compression_level=19)
        print(f"{file}: {len(judged):,} prompts, {file.stat().st_size / 1e6:.2f} MB", flush=True)


def show(n: int = 3) -> None:
    """Print a few rows of every kind."""
    for kind in ("demonstration", "ranked", "pair"):
        dataset = "family:off-policy" if kind == "pair" else "family"
        print(f"\n{dataset}, {kind}")
        for _, row in itertools.islice(task.rows(dataset, "train", kind), n):
            print(json.dumps(row))


if __name__ == "__main__":
    import tyro

    tyro.extras.subcommand_cli_from_dict({"show": show, "judge": judge_samples})
