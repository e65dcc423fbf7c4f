"""dpo.py, cpo.py, simpo.py and kto.py against Hugging Face TRL's DPOTrainer, CPOTrainer (its losses
"sigmoid" and "simpo") and KTOTrainer: the same rows in the same order, the same losses.

TRL gets texts, so it tokenises, joins, pads, masks, asks its reference and steps by its own code.
The losses alone, of the same log-probs, are in test_trl_losses.py.
"""

import math
from types import ModuleType, SimpleNamespace

import pytest
import torch
from conftest import all_float64, pair_rows, write_jsonl

import common
import cpo
import dpo
import kto
import simpo
from training import finish

STEPS, BATCH, MICRO, LENGTH = 5, 8, 4, 64
LR, CLIP = 5e-4, 2.0
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # names that Transformers will drop
    pytest.mark.filterwarnings("ignore:You are importing from 'trl.experimental'"),
]


@pytest.fixture(autouse=True)
def runs(fresh_process, monkeypatch) -> list[common.Run]:
    """The runs that were started, which log in memory and leave no report."""
    started, init = [], common.Run.__init__

    def start(run, args):
        started.append(run)
        run.logged = []
        init(run, args)

    monkeypatch.setattr(common.Run, "__init__", start)
    monkeypatch.setattr(common.Run, "log", lambda run, record: run.logged.append(record))
    monkeypatch.setattr(finish, "finish", lambda *_: None)
    return started


def losses_here(
    method: ModuleType, start, dataset, held_out, runs, dtype="float32", **knobs
) -> tuple[list[dict], list[int]]:
    """The metrics of every step, and the rows in the order in which they were used."""
    method.main(
        method.Args(
            model=str(start), dataset=str(dataset), eval_dataset=str(held_out), output_dir="here",
            lr=LR, schedule="constant", warmup_ratio=0.0, optimizer="adamw", weight_decay=0.0,
            max_grad_norm=CLIP, dtype=dtype, batch_size=BATCH, micro_batch_size=MICRO,
            max_steps=STEPS, max_length=LENGTH, max_prompt_length=40, **knobs,
        )
    )  # fmt: skip
    steps = [record for record in runs[0].logged if "lr" in record]
    micros = [micro for step in range(STEPS) for micro in runs[0].step_rows(step)]
    assert {len(micro) for micro in micros} == {MICRO}
    return steps, [row for micro in micros for row in micro]


def losses_of_trl(name: str, start, rows, micro=MICRO, dtype=torch.float32, **knobs) -> list[dict]:
    """What TRL's trainer `name` logs in every step."""
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl.experimental import cpo as experimental

    home = experimental if name == "CPO" else trl
    config = getattr(home, f"{name}Config")(
        output_dir="trl", report_to="none", logging_steps=1, save_strategy="no", disable_tqdm=True,
        learning_rate=LR, lr_scheduler_type="constant", warmup_steps=0, optim="adamw_torch",
        weight_decay=0.0, max_grad_norm=CLIP, bf16=False, use_cpu=True,
        gradient_checkpointing=False, disable_dropout=True, per_device_train_batch_size=micro,
        gradient_accumulation_steps=BATCH // micro, max_steps=STEPS, max_length=LENGTH,
        train_sampling_strategy="sequential", **knobs,
    )  # fmt: skip

    def load() -> torch.nn.Module:
        return AutoModelForCausalLM.from_pretrained(start).to(dtype)

    trainer = getattr(home, f"{name}Trainer")(
        model=load(),
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(start),
        **({} if name == "CPO" else {"ref_model": load()}),
    )
    losses, compute_loss = [], trainer.compute_loss

    def keep(*args, **more):
        loss = compute_loss(*args, **more)
        losses.append(float(loss.detach()))
        return loss

    trainer.compute_loss = keep
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    for step, entry in enumerate(steps):
        # Transformers adds up a step's losses in fp32, in a float64 model too.
        parts = losses[step * BATCH // micro : (step + 1) * BATCH // micro]
        assert entry["loss"] == pytest.approx(sum(parts) / len(parts), rel=1e-6)
        entry["loss"] = sum(parts) / len(parts)
    assert len(losses) == STEPS * BATCH // micro
    return steps


def show(ours: list[dict], theirs: list[dict]) -> None:
    print("\nstep   loss here    TRL's loss   difference   gradient norms")
    for a, b in zip(ours, theirs, strict=True):
        difference = a["loss"] - b["loss"]
        norms = f"{a['grad_norm']:.6f} {b['grad_norm']:.6f}"
        print(f"{a['step']:4}   {a['loss']:.8f}   {b['loss']:.8f}   {difference:+.1e}     {norms}")


def labelled_rows(n: int, seed: int = 0) -> list[dict]:
    """One answer of each pair: twice the desirable one, twice the other."""
    return [
        {
            "prompt": row["prompt"],
            "completion": row["rejected" if i & 2 else "chosen"],
            "label": not i & 2,
        }
        for i, row in enumerate(pair_rows(n, seed))
    ]


@pytest.fixture
def mismatched_by_trl(monkeypatch, runs) -> list[int]:
    """kto.py takes the mismatched answers that TRL takes: of the row before, around a circle, in
    blocks of a step's rows. (Its own are a permutation of all rows, the same for any batch size.)
    Returns the rows in TRL's order, once the script has run.
    """
    order, mismatch = [], kto.mismatch

    def rotate(rows, givers, seed, max_length):
        mismatched = mismatch(rows, givers, seed, max_length)
        if rows is not givers:  # held-out rows
            return mismatched
        runs[0].plan(rows)  # the steps' rows depend on the seed only
        for step in range(STEPS):
            block = [i for part in runs[0].step_rows(step) for i in part]
            for at, i in enumerate(block):
                mismatched[i].responses = rows[block[at - 1]].responses
            order.extend(block)
        return mismatched

    monkeypatch.setattr(kto, "mismatch", rotate)
    return order


@pytest.fixture
def plain_head_in_trl(monkeypatch) -> None:
    """The head that TRL's DPO and KTO trainers share adds up in fp32 whatever it gets, so in
    float64 nothing below 1e-7 could be seen. This is its definition. (CPOTrainer has its own.)
    """
    import trl.trainer.utils

    def apply(hidden, weight, bias, targets, temperature, chunk, softcap, scale, outputs):
        assert (bias, temperature, softcap, scale) == (None, 1.0, None, 1.0)
        logps = (hidden @ weight.T).log_softmax(-1).gather(1, targets[:, None])[:, 0]  # (N,)
        unused = torch.zeros_like(logps)  # entropies and the like, for TRL's plots
        return logps, unused, unused, unused, unused.bool()

    kernel = SimpleNamespace(apply=apply)
    monkeypatch.setattr(trl.trainer.utils, "_ChunkedLogProbFunction", kernel)


# Script, its knobs, TRL's trainer, its knobs, and the metrics that mean the same in both.
KTO = {"beta": 0.25, "desirable_weight": 1.3}
# TRL's simpo_gamma is absolute: beta * gamma_beta_ratio.
SIMPO = {"beta": 2.0, "gamma_beta_ratio": 0.8}
SIMPO_IN_TRL = {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.6}
ACCURACY = "rewards/accuracies"
REWARDS = "rewards/chosen rewards/rejected rewards/margins rewards/accuracies".split()
LOGPS = ["logps/chosen", "logps/rejected"]
CASES = {
    "dpo": (dpo, {"beta": 0.1}, "DPO", {"beta": 0.1}, REWARDS + LOGPS),
    "cpo": (
        cpo, {"beta": 0.1, "nll_weight": 0.7}, "CPO", {"beta": 0.1, "cpo_alpha": 0.7},
        REWARDS + LOGPS + ["nll_loss"],
    ),
    # TRL logs the means over tokens as logps for this loss, and an nll_loss of 0 without its term.
    "simpo": (simpo, SIMPO, "CPO", SIMPO_IN_TRL | {"cpo_alpha": 0.0}, REWARDS),
    "cpo-simpo": (
        simpo, SIMPO | {"nll_weight": 0.3}, "CPO", SIMPO_IN_TRL | {"cpo_alpha": 0.3},
        REWARDS + ["nll_loss"],
    ),
    "kto": (kto, KTO, "KTO", KTO, REWARDS[:2] + LOGPS),
}  # fmt: skip


@pytest.fixture
def both(checkpoints, tmp_path, runs, mismatched_by_trl):
    """both(case, ...): the steps here, TRL's steps, and the rows in the order of these steps."""

    def run(case: str, trl_micro: int, dtype: str = "float32"):
        method, knobs, trainer, trl_knobs, _ = CASES[case]
        make_rows = labelled_rows if method is kto else pair_rows
        start, rows = checkpoints("llama"), make_rows(STEPS * BATCH)
        dataset = write_jsonl(tmp_path / "rows.jsonl", rows)
        held_out = write_jsonl(tmp_path / "held-out.jsonl", make_rows(MICRO, seed=1))
        ours, order = losses_here(method, start, dataset, held_out, runs, dtype, **knobs)
        order = mismatched_by_trl or order
        assert sorted(order) == list(range(len(rows)))  # no row twice, none left out
        rows = [rows[i] for i in order]
        dtype = getattr(torch, dtype)
        theirs = losses_of_trl(trainer, start, rows, trl_micro, dtype, **trl_knobs)
        show(ours, theirs)
        if method is dpo:  # before the first step all pairs are ties: TRL counts them as wrong
            assert (ours[0].pop(ACCURACY), theirs[0].pop(ACCURACY)) == (0.5, 0.0)
            ours[0][ACCURACY] = theirs[0][ACCURACY] = 0.5
        return ours, theirs, rows

    return run


@pytest.mark.parametrize(("case", "trl_micro"), (("dpo", MICRO), ("kto", BATCH)))
def test_losses_agree_with_trl(case, trl_micro, both):
    """In fp32, with nothing of TRL's replaced. (CPOTrainer is left as it is in float64, too.)"""
    ours, theirs, rows = both(case, trl_micro)
    first = math.log(2)
    if case == "kto":  # sigmoid(0) = 1/2, of the mean weight
        weights = [KTO["desirable_weight"] if row["label"] else 1.0 for row in rows[:BATCH]]
        first = sum(weights) / BATCH / 2
    assert ours[0]["loss"] == pytest.approx(first, abs=1e-6, rel=0)
    assert theirs[0]["loss"] == pytest.approx(first, abs=1e-6, rel=0)
    assert ours[-1]["loss"] < 0.75 * first  # it has learnt, so the steps matter, not only the first
    norms = [step["grad_norm"] for step in ours]
    assert min(norms) < CLIP < max(norms)  # some gradients were clipped, some were not
    # From the second step on AdamW has magnified the rounding of small gradients; 4e-7 was seen.
    for a, b in zip(ours, theirs, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5, rel=0)
        for name in set(CASES[case][-1]) - set(LOGPS):
            assert a[name] == pytest.approx(b[name], abs=1e-5, rel=0), name


@pytest.mark.parametrize("case", CASES)
def test_to_the_last_digits(case, both, plain_head_in_trl):
    """In float64, where rounding needs no tolerance to speak of: losses differ by some 1e-15. (In
    fp32 a sum of a hundred nats has steps of 8e-6; those of cpo.py, of 9.4, differed by 1.1e-6.)

    A step is two micro-batches here and one in TRL: its NLL is a mean over the tokens of a
    micro-batch, and its z0 over the answers of one, where ours are means over the step. With two
    micro-batches there too, CPO's losses differ by 4e-3 in the first step and 1e-2 in the fifth.
    """
    with all_float64():
        ours, theirs, _ = both(case, BATCH, "float64")
    assert ours[-1]["loss"] < 0.95 * ours[0]["loss"]
    _, _, trainer, _, names = CASES[case]
    digits = 1e-6 if trainer == "CPO" else 1e-9  # CPOTrainer averages what it logs in fp32
    for a, b in zip(ours, theirs, strict=True):
        for name in ("loss", "grad_norm"):
            assert a[name] == pytest.approx(b[name], rel=1e-9, abs=0), name
        for name in names:
            assert a[name] == pytest.approx(b[name], rel=digits, abs=digits), name
        if case == "kto":  # TRL logs z0, kto.py the mean before it is clamped
            assert max(0.0, a["kl"]) == pytest.approx(b["kl"], rel=1e-9, abs=1e-9)
    if case == "kto":
        assert min(step["kl"] for step in ours) < -0.1  # both sides of the clamp
        assert max(step["kl"] for step in ours) > 0.1
