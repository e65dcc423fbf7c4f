"""Two more rows for results/real/hh: dpo.py with adapters, and TRL's DPOTrainer as dpo.py is set.

    pip install 'trl>=1.16,<2' accelerate
    python -m results.real.others

With --train this file is the trainer of TRL's row: the same rows, settings and schedule as dpo.py
in settings-hh.json (TRL draws the rows in another order), and the model's folder in the end.
"""

import json
import math
import os
import platform
import resource
from dataclasses import dataclass
from pathlib import Path

import common
import compare
from training.run_folder import git_commit

SETTINGS = Path("results/real/settings-hh.json")


@dataclass
class Args:
    train: str | None = None  # folder of TRL's model
    model: str = "smollm2"
    dataset: str = "hh-train.jsonl"
    name: str = "real/hh"  # of the study that gets the rows


def train(args: Args) -> None:
    import transformers
    from datasets import load_dataset
    from trl import DPOConfig, DPOTrainer

    ours = json.loads(SETTINGS.read_text())
    ours = ours["all"] | ours["dpo"]
    warmup = math.ceil(ours["warmup_ratio"] * ours["max_steps"])
    config = DPOConfig(
        output_dir=f"{args.train}.trl", per_device_train_batch_size=ours["micro_batch_size"],
        gradient_accumulation_steps=ours["batch_size"] // ours["micro_batch_size"],
        max_steps=ours["max_steps"], learning_rate=ours["lr"], beta=ours["beta"],
        lr_scheduler_type=ours["schedule"], warmup_steps=warmup, weight_decay=0.0,
        max_grad_norm=ours["max_grad_norm"], max_length=ours["max_length"], bf16=True,
        use_cpu=True, gradient_checkpointing=False, save_strategy="no", report_to="none",
        logging_steps=1, seed=0,
    )  # fmt: skip
    trainer = DPOTrainer(
        model=transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype="float32"),
        args=config, train_dataset=load_dataset("json", data_files=args.dataset, split="train"),
        processing_class=transformers.AutoTokenizer.from_pretrained(args.model),
    )  # fmt: skip
    trainer.train()
    trainer.save_model(args.train)
    folder, memory = Path(args.train), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    hardware = f"{platform.machine()}, {os.cpu_count()} cores"
    facts = {"commit": git_commit(), "source": "", "hardware": hardware}
    (folder / "run.json").write_text(json.dumps(facts))
    lines = [*trainer.state.log_history, {"peak_memory_gib": memory}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def main(args: Args) -> None:
    if args.train:
        return train(args)
    study = compare.Args(
        methods=("dpo",), seeds=(0,), sweep=("none",), model=args.model, dataset=args.dataset,
        settings=str(SETTINGS), name=args.name, prompts=128,
    )  # fmt: skip
    plain = next(row for row in compare.plan(study) if row["name"] == "dpo-s0")
    results, runs = Path("results", args.name), Path("runs", args.name)
    for folder in (runs, results / "rows"):
        folder.mkdir(parents=True, exist_ok=True)
    for name, command in (
        ("dpo-lora16", f"{plain['command']} --lora-rank 16".replace("--lr 2e-05", "--lr 0.0002")),
        ("dpo-trl", f"python -m results.real.others --train runs/{args.name}/dpo-s0"),
    ):
        row = plain | {"method": name, "command": command}
        row = json.loads(json.dumps(row).replace("dpo-s0", name))
        if not (results / "rows" / f"{name}.json").is_file():
            print(row["command"], flush=True)
            compare.make(row, results, runs)


if __name__ == "__main__":
    main(common.parse(Args, {}, __doc__))
