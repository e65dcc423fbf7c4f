"""Kill runs with SIGKILL at random moments, start each again, compare it with an undisturbed run.

    python tests/kills.py --moments 20

Weights must be equal bit for bit and metrics line by line. It prints a line per method. Its exit
code is 1 if a run differs. Two runs at a time; about 10 seconds a moment.
"""

import argparse
import os
import random
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path += [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

from conftest import labelled_rows, make_checkpoint, pair_rows, start_script, write_jsonl  # noqa: E402
from whole_runs import assert_same_run  # noqa: E402

REWARD = """
def score(prompts, responses):
    return [sum(map(str.isalpha, text)) / max(1, len(text)) for text in responses]
"""
SHARED = (
    "--deterministic --dtype float32 --batch-size 8 --micro-batch-size 4 --max-steps 30 --lr 1e-3 "
    "--max-length 52 --max-prompt-length 40 --eval-every 10 --save-every 3"
)
OWN = {
    "dpo": "--optimizer adamw",
    "kto": "",
    "ppo": "--ppo-epochs 2 --temperature 1 --missing-eos keep",
}


def start(method: str, home: Path, name: str):
    data = home / ("labelled.jsonl" if method == "kto" else "pairs.jsonl")
    flags = f"{SHARED} {OWN[method]} --model {home / 'model'} --dataset {data}"
    flags += f" --output-dir {home / name} --cache-dir {home / name}-cache"
    flags += f" --reward {home / 'reward.py'}:score" if method == "ppo" else ""
    return start_script(f"{method}.py", *flags.split())


def finish(method: str, home: Path, name: str) -> None:
    process = start(method, home, name)
    _, errors = process.communicate()
    assert process.returncode == 0, errors


def kill(method: str, home: Path, name: str, share: float, seconds: float) -> str | None:
    """What is wrong with a run that was killed after a share of its time, counted from the moment
    at which its folder is there.
    """
    process = start(method, home, name)
    while not (home / name / "run.json").exists() and process.poll() is None:
        time.sleep(0.01)
    time.sleep(share * seconds)
    process.kill()
    process.communicate()
    steps = len(list((home / name).glob("checkpoint-*")))
    try:
        finish(method, home, name)
        assert_same_run(home / f"{method}-whole", home / name)
    except (AssertionError, OSError) as error:
        return f"{name}, killed at {share:.0%} with {steps} checkpoints: {str(error)[-300:]}"
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--moments", type=int, default=20)
    parser.add_argument("--methods", nargs="+", default=list(OWN), choices=list(OWN))
    args, failed = parser.parse_args(), False
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        home = Path(folder)
        make_checkpoint("llama", home / "model")
        write_jsonl(home / "pairs.jsonl", pair_rows(60))
        write_jsonl(home / "labelled.jsonl", labelled_rows(60))
        (home / "reward.py").write_text(REWARD)
        for method in args.methods:
            finish(method, home, f"{method}-whole")
            files = [home / f"{method}-whole" / name for name in ("run.json", "summary.txt")]
            seconds = files[1].stat().st_mtime - files[0].stat().st_mtime
            shares = [random.Random(f"{method} {i}").random() for i in range(args.moments)]
            names = [f"{method}-{i}" for i in range(args.moments)]
            wrong = pool.map(lambda *at: kill(method, home, *at, seconds), names, shares)  # noqa: B023
            wrong = [text for text in wrong if text]
            print(f"{method}: {args.moments - len(wrong)} of {args.moments}", *wrong, sep="\n  ")
            failed |= bool(wrong)
    return int(failed)


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.exit(main())
