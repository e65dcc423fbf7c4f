"""Default hyperparameters: the presets of every method file, and how flags override them."""

import dataclasses
from importlib import import_module

import pytest
import torch
from test_shape import METHODS
from transformers import get_inverse_sqrt_schedule

import common
import cpo
import dpo

TINY = {  # shared by all methods, except for what stands below
    "batch_size": 16, "micro_batch_size": 16, "max_steps": 300, "schedule": "linear",
    "warmup_ratio": 0.05, "optimizer": "adamw", "weight_decay": 0.0, "max_grad_norm": 1.0,
    "max_length": 160, "max_prompt_length": 128, "dataset": "family", "lora_rank": 0,
}  # fmt: skip
SAMPLED = {"reward": "tiny-preferred@tiny", "temperature": 1.0, "max_length": 176}
SAMPLED |= {"max_prompt_length": 160}
ONLINE = SAMPLED | {"gold_reward": "family", "kl_coef": 0.1, "max_steps": 30}
OWN = {
    "sft": {
        "train_on_prompt": True, "lr": 2e-3, "epochs": 3.0, "max_steps": None, "warmup_ratio": 0.02,
        "schedule": "cosine", "max_length": 320, "max_prompt_length": 240,
    },
    "reward_model": {
        "lr": 5e-4, "epochs": 1.0, "max_steps": None, "schedule": "cosine", "max_length": 176,
        "max_prompt_length": 160, "dataset": "family:off-policy",
    },
    "dpo": {"beta": 0.3, "lr": 2e-4, "label_smoothing": 0.0, "gamma": 0.0},
    "ipo": {"beta": 0.25, "lr": 2e-4, "per_token": True},
    "cpo": {"beta": 0.1, "nll_weight": 0.05, "lr": 6e-4},
    "orpo": {"odds_weight": 4.0, "lr": 2e-4, "max_steps": 900},
    "simpo": {"beta": 2.0, "gamma_beta_ratio": 2.0, "nll_weight": 0.0, "lr": 4e-4},
    "slic": {"beta": 1.0, "delta": 5.0, "target_weight": 0.1, "lr": 4e-4},
    "kto": {"beta": 0.3, "lr": 1e-4},
    "pro": {"sft_weight": 0.002, "score_scale": 0.03, "lr": 3e-4},
    "listwise_dpo": {"beta": 0.2, "lr": 3e-4},
    "rrhf": {"sft_weight": 0.1, "margin": 4.0, "lr": 3e-4},
    "ppo": ONLINE | {
        "ppo_epochs": 2, "minibatches": 2, "lr": 3e-4, "batch_size": 128, "micro_batch_size": 32,
    },
    "nlpo": ONLINE | {
        "top_p": 0.9, "mask_every": 5, "ppo_epochs": 2, "minibatches": 2, "lr": 3e-4,
        "batch_size": 128, "micro_batch_size": 32,
    },
    "rloo": ONLINE | {
        "samples": 4, "batch_epochs": 1, "minibatches": 1, "lr": 1e-3, "batch_size": 32,
        "micro_batch_size": 32,
    },
    "grpo": ONLINE | {
        "samples": 8, "normalise": "grpo", "clip_high": 0.2, "batch_epochs": 1, "minibatches": 1,
        "lr": 4e-4,
    },
    "raft": ONLINE | {
        "samples": 16, "batch_epochs": 2, "minibatches": 4, "lr": 3e-4, "batch_size": 64,
        "max_steps": 20,
    },
    "rso": SAMPLED | {
        "sampling_beta": 0.1, "gamma": 1.0, "samples": 16, "accepted": 4, "top_k": 0,
        "prompts": 2000, "lr": 2e-4,
    },
}  # fmt: skip
PRESETS = [(name, model) for name in METHODS for model in import_module(name).PRESETS]


@pytest.mark.parametrize("method", METHODS)
def test_tiny(method):
    """The embedded task's settings, tuned for this repository; results/ was measured with them."""
    module = import_module(method)
    found = dataclasses.asdict(module.Args(**module.PRESETS["tiny"]))
    expected = TINY | OWN[method]
    assert {name: found[name] for name in expected} == expected


@pytest.mark.parametrize("method, model", PRESETS)
def test_a_preset_is_sane(method, model):
    module = import_module(method)
    preset = module.PRESETS[model]
    assert model == model.lower()
    defaults = dataclasses.asdict(module.Args())
    assert [name for name, value in preset.items() if defaults[name] == value] == []  # or leave out
    args = module.Args(**preset)
    assert args.lr > 0 and args.epochs > 0 and 0 <= args.warmup_ratio < 1
    assert args.batch_size % args.micro_batch_size == 0
    assert 0 < args.max_prompt_length < args.max_length
    assert args.max_grad_norm >= 0 and args.lora_rank >= 0 and args.weight_decay >= 0


@pytest.mark.parametrize("warmup", (0, 10))
def test_inverse_square_root_is_that_of_transformers(warmup):
    """Ours reaches the full rate in the last step of the warm-up, theirs one step later."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = get_inverse_sqrt_schedule(optimizer, num_warmup_steps=warmup).lr_lambdas[0]
    ours = [common.lr_factor("inverse-sqrt", warmup / 200, 200, i) for i in range(200)]
    assert ours == pytest.approx([theirs(i + 1) for i in range(200)])


def test_flags_override_presets():
    def parse(*argv):
        return common.parse(cpo.Args, cpo.PRESETS, cpo.__doc__, list(argv))

    assert parse().nll_weight == 0.05 and parse("--nll-weight", "1").nll_weight == 1.0
    assert parse("--model", "haoranxu/ALMA-13B").lora_rank == 16
    assert parse("--model", "alma-13b", "--lora-rank", "0").lora_rank == 0
    assert parse("--model", "some/other").lr == cpo.Args.lr
    assert parse().max_steps == 300 and parse("--epochs", "2").max_steps is None
    assert parse("--epochs", "2", "--max-steps", "5").max_steps == 5


def test_help_shows_the_numbers_of_a_run(capsys):
    for argv, lr in (["--help"], "0.0002"), (["--model", "gemma-2-2b", "--help"], "1e-07"):
        with pytest.raises(SystemExit):
            common.parse(dpo.Args, dpo.PRESETS, dpo.__doc__, argv)
        assert f"(default: {lr})" in capsys.readouterr().out
