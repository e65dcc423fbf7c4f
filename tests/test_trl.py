"""dpo.py against Hugging Face TRL's DPOTrainer: the same rows in the same order, the same losses.

TRL gets texts, so it tokenises, joins, pads, masks, asks its reference and steps by its own code.
"""

import math
import signal

import pytest
from conftest import pair_rows, write_jsonl

import common
import dpo

STEPS, BATCH, MICRO, LENGTH = 5, 8, 4, 64
LR, BETA, CLIP = 5e-4, 0.1, 2.0


@pytest.fixture(autouse=True)
def _own_signal_handlers():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def losses_here(start, dataset, held_out, monkeypatch) -> tuple[list[dict], list[int]]:
    """The metrics of every step, and the rows in the order in which they were used."""
    runs, open_run = [], common.start

    def keep(*args):
        runs.append(open_run(*args))
        return runs[-1]

    monkeypatch.setattr(common, "start", keep)
    monkeypatch.setattr(common, "beside", lambda module: None)  # no curves, no samples
    logged = []
    monkeypatch.setattr(common.Run, "log", lambda run, record, **more: logged.append(record | more))
    dpo.main(
        dpo.Args(
            model=str(start), dataset=str(dataset), eval_dataset=str(held_out), output_dir="here",
            beta=BETA, lr=LR, schedule="constant", warmup_ratio=0.0, optimizer="adamw",
            weight_decay=0.0, max_grad_norm=CLIP, dtype="float32", batch_size=BATCH,
            micro_batch_size=MICRO, max_steps=STEPS, max_length=LENGTH, max_prompt_length=40,
        )
    )  # fmt: skip
    steps = [record for record in logged if "lr" in record]
    micros = [micro for step in range(STEPS) for micro in runs[0].step_rows(step)]
    assert {len(micro) for micro in micros} == {MICRO}
    return steps, [row for micro in micros for row in micro]


def losses_of_trl(start, rows) -> list[dict]:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    config = DPOConfig(
        output_dir="trl", report_to="none", logging_steps=1, save_strategy="no", disable_tqdm=True,
        beta=BETA, learning_rate=LR, lr_scheduler_type="constant", warmup_steps=0,
        optim="adamw_torch", weight_decay=0.0, max_grad_norm=CLIP, bf16=False, use_cpu=True,
        gradient_checkpointing=False, disable_dropout=True, per_device_train_batch_size=MICRO,
        gradient_accumulation_steps=BATCH // MICRO, max_steps=STEPS, max_length=LENGTH,
        train_sampling_strategy="sequential",
    )  # fmt: skip
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(start),
        ref_model=AutoModelForCausalLM.from_pretrained(start),
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(start),
    )
    trainer.train()
    return [entry for entry in trainer.state.log_history if "rewards/margins" in entry]


@pytest.mark.filterwarnings("ignore::FutureWarning")  # names of TRL's that Transformers will drop
def test_losses_agree_with_trl(checkpoints, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    start, rows = checkpoints("llama"), pair_rows(STEPS * BATCH)
    dataset = write_jsonl(tmp_path / "pairs.jsonl", rows)
    held_out = write_jsonl(tmp_path / "held-out.jsonl", pair_rows(MICRO, seed=1))
    ours, order = losses_here(start, dataset, held_out, monkeypatch)
    theirs = losses_of_trl(start, [rows[i] for i in order])

    print("\nstep   loss here    TRL's loss   difference   gradient norms")
    for a, b in zip(ours, theirs, strict=True):
        difference = a["loss"] - b["loss"]
        norms = f"{a['grad_norm']:.6f} {b['grad_norm']:.6f}"
        print(f"{a['step']:4}   {a['loss']:.8f}   {b['loss']:.8f}   {difference:+.1e}     {norms}")
    assert sorted(order) == list(range(len(rows)))  # no row twice, none left out
    assert ours[0]["loss"] == pytest.approx(math.log(2), abs=1e-6, rel=0)
    assert ours[-1]["loss"] < 0.5  # it has learnt, so the steps matter, not only the first loss
    norms = [step["grad_norm"] for step in ours]
    assert min(norms) < CLIP < max(norms)  # some gradients were clipped, some were not
    for a, b in zip(ours, theirs, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5, rel=0)
        for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"):
            assert a[name] == pytest.approx(b[name], abs=1e-5, rel=0), name
