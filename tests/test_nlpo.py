"""nlpo.py: the mask in plain floats, the same mask in sampling and training, and what PPO it is.

Whole runs, resumed and on several processes, are in test_online.py.
"""

import ast
import math
import random
from pathlib import Path
from types import SimpleNamespace

import online
import pytest
import torch
from conftest import ROOT, all_float64
from online import steps_of, train
from safetensors.torch import load_file
from test_losses import slopes
from test_online import farthest, log_of, losses_of, plain_logps, trained
from transformers import AutoModelForCausalLM

import common
import nlpo
from sampling import masked
from sampling.masked import MaskedPolicy, MaskingPolicy, packed, unpacked
from sampling.rollouts import Online

made, start_of = online.made, online.start_of  # fixtures


@pytest.fixture
def run(made, start_of, tmp_path, monkeypatch):
    """run(method, folder, **flags) -> the exit status of a run in this process."""
    monkeypatch.chdir(tmp_path)

    def go(method: str, folder: str, model: str = "llama", **flags) -> int:
        return train(method, made, start_of(model), folder, **flags)

    return go


# -- the mask and the loss, in plain floats


def allowed_by_loop(logits: list[float], top_p: float, temperature: float) -> set[int]:
    """Tokens, the likeliest first, until they have a probability of top_p together."""
    weights = [math.exp(x / temperature) for x in logits]
    found, mass = set(), 0.0
    for token in sorted(range(len(logits)), key=lambda token: -weights[token]):
        if mass >= top_p * math.fsum(weights):
            break
        found.add(token)
        mass += weights[token]
    return found


def loss_by_loop(logits, token, allowed, old_logp, A, clip, temperature) -> float:
    weights = {a: math.exp(logits[a] / temperature) for a in allowed}
    ratio = weights[token] / math.fsum(weights.values()) / math.exp(old_logp)
    return max(-A * ratio, -A * min(max(ratio, 1 - clip), 1 + clip))


def policy_with(kind: type, logits: torch.Tensor) -> common.Policy:
    """A policy that has these logits (N, V) at the response tokens of any batch."""
    head = torch.nn.Linear(logits.shape[1], logits.shape[1], bias=False).double()
    torch.nn.init.eye_(head.weight)
    policy = kind(SimpleNamespace(config=None, get_output_embeddings=lambda: head), torch.float64)
    policy.autocast = torch.no_grad if not logits.requires_grad else torch.enable_grad
    policy.hidden_states = lambda batch, positions: logits
    return policy


@pytest.mark.parametrize("at_once", (1, 3, 10**6))  # positions
@pytest.mark.parametrize("top_p, temperature", ((0.5, 1.0), (0.9, 0.7), (0.99, 2.0)))
def test_masked_logps_and_the_loss_are_the_equation(monkeypatch, at_once, top_p, temperature):
    """In value and gradient by every logit; those of masked tokens have none."""
    N, V, clip, rng = 14, 11, 0.2, random.Random(4)
    monkeypatch.setattr(masked, "MOST", at_once * V)
    of_mask, logits = ([[rng.gauss(0, 2) for _ in range(V)] for _ in range(N)] for _ in range(2))
    tokens, advantages = [rng.randrange(V) for _ in range(N)], [rng.gauss(0, 1) for _ in range(N)]
    # Outside of the mask is a token only if rounding put it there: it is allowed all the same.
    sets = [
        allowed_by_loop(x, top_p, temperature) | {y} for x, y in zip(of_mask, tokens, strict=True)
    ]
    old = [-1.0 + rng.gauss(0, 0.3) for _ in range(N)]
    every = torch.arange(N)
    batch = SimpleNamespace(
        targets=torch.tensor(tokens), target_positions=every, output_index=every,
        lengths=torch.full((1, 1), N), shape=(1, 1, N),
    )  # fmt: skip
    psi = policy_with(MaskingPolicy, torch.tensor(of_mask, dtype=torch.float64))
    bits, counts = psi(batch, temperature, top_p)
    x = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
    logps, mass = policy_with(MaskedPolicy, x)(batch, temperature, bits)
    assert [{i for i, a in enumerate(row) if a} for row in unpacked(bits, V).tolist()] == sets
    assert counts.flatten().tolist() == [len(s) for s in sets] and min(map(len, sets)) < V
    for found, row, kept in zip(mass.flatten().tolist(), logits, sets, strict=True):
        weights = [math.exp(y / temperature) for y in row]
        left = math.fsum(w for a, w in enumerate(weights) if a not in kept)
        assert found == pytest.approx(left / math.fsum(weights), abs=1e-14)
    column = [torch.tensor([y], dtype=torch.float64) for y in (old, advantages)]
    zeros = [torch.zeros(1, N, dtype=torch.float64)] * 3
    inside = torch.ones(1, N, dtype=torch.bool)
    losses, metrics = nlpo.nlpo_loss(logps[:, 0], *column, *zeros, inside, clip, 0.2, 0.1)
    losses.sum().backward()
    for i, row in enumerate(logits):
        rest = (tokens[i], sets[i], old[i], advantages[i], clip, temperature)
        assert losses[0, i].item() == pytest.approx(loss_by_loop(row, *rest), rel=1e-12)
        slope = slopes(lambda *z, rest=rest: loss_by_loop(z, *rest), row)
        assert x.grad[i].tolist() == pytest.approx(slope, rel=1e-6, abs=1e-8)
        assert not any(x.grad[i, a] for a in range(V) if a not in sets[i])
    assert 0 < metrics["policy/clipfrac"][0].sum() < N


@pytest.mark.parametrize("size", (1, 7, 8, 9, 320))
def test_bits(size):
    allowed = torch.rand(5, size, generator=torch.Generator().manual_seed(size)) < 0.5
    assert packed(allowed).shape == (5, -(-size // 8))
    assert torch.equal(unpacked(packed(allowed), size), allowed)


def test_the_rest_is_ppo():
    """So the tests of ppo.py are about nlpo.py too."""

    def functions(name: str) -> dict[str, str]:
        body = ast.parse((ROOT / f"{name}.py").read_text().replace(f"{name}_loss", "the_loss")).body
        return {n.name: ast.unparse(n) for n in body if isinstance(n, ast.FunctionDef)}

    ours, theirs = functions("nlpo"), functions("ppo")
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name] != theirs[name]] == ["main"]


# -- whole runs

BOTH = {"minibatches": 2, "max_steps": 3, "mask_every": 1, "eval_every": 0}


def test_top_p_of_1_is_ppo(run, monkeypatch):
    """Bit for bit, and no masking policy is loaded."""
    monkeypatch.setattr(masked, "top_p_tokens", lambda *_: pytest.fail("a mask"))
    flags = {k: x for k, x in BOTH.items() if k != "mask_every"} | {"temperature": 0.7}
    assert run("ppo", "ppo", **flags) == 0 and run("nlpo", "nlpo", top_p=1.0, **flags) == 0
    assert farthest(trained("ppo"), trained("nlpo")) == 0 and log_of("ppo") == log_of("nlpo")


@pytest.mark.parametrize("architecture", ("llama", "gemma2", "gpt2"))
def test_a_mask_that_allows_all_is_ppo(run, architecture):
    """Up to rounding: sampling, log-probs and gradients go through the mask."""
    flags = BOTH | {"dtype": "float64", "temperature": 0.7}
    with all_float64():
        assert run("nlpo", "nlpo", architecture, top_p=1 - 1e-13, **flags) == 0
        del flags["mask_every"]
        assert run("ppo", "ppo", architecture, **flags) == 0
    assert {step["nlpo/allowed_tokens"] for step in steps_of("nlpo")} == {320}
    nlpos, ppos = load_file(trained("nlpo")), load_file(trained("ppo"))
    assert max((nlpos[name] - x).abs().max() for name, x in ppos.items()) < 1e-9


@pytest.mark.parametrize("temperature", (1.0, 0.7))
def test_the_mask_of_training_is_that_of_sampling(run, start_of, monkeypatch, temperature):
    """In the second step the policy is not the masking policy. What was sampled is in the mask,
    by plain Transformers; log-probs are renormalised; and ratios of the first update are 1.
    """
    seen, watch, given = [], Online.watch, losses_of(monkeypatch, "nlpo")

    def keep(self, rollout, **more):
        lm = AutoModelForCausalLM.from_pretrained(start_of("llama"))
        lm.load_state_dict(self.policy.lm.state_dict())
        seen.append((rollout, lm))
        watch(self, rollout, **more)

    monkeypatch.setattr(Online, "watch", keep)
    flags = {"max_steps": 2, "mask_every": 5, "lr": 1e-2, "temperature": temperature}
    assert run("nlpo", "out", top_p=0.6, **flags) == 0
    (_, psi), (rollout, pi) = seen
    moved, outside = 0.0, 0
    for i, row in enumerate(rollout.rows):
        prompt, response = (torch.from_numpy(x).long() for x in (row.prompt, row.responses[0]))
        with torch.no_grad():
            both = [
                lm(torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1]
                for lm in (psi, pi)
            ]
            expected = plain_logps(pi, row, temperature)
        assert rollout.logps[i, : len(response)].tolist() == pytest.approx(expected, abs=1e-4)
        for t, (of_mask, logits) in enumerate(zip(*both, strict=True)):
            allowed = sorted(allowed_by_loop(of_mask.tolist(), 0.6, temperature))
            assert int(response[t]) in allowed
            share = (logits / temperature).softmax(-1)[allowed].sum().log().item()
            assert float(rollout.masked_logps[i, t]) == pytest.approx(expected[t] - share, abs=1e-4)
            of_pi = allowed_by_loop(logits.tolist(), 0.6, temperature)
            outside += not set(allowed) <= of_pi
        moved = max(moved, float((both[0] - both[1]).abs().max()))
    assert moved > 0.5 and outside  # the policies differ, and their sets too
    for step in (given[:4], given[4:]):  # 2 epochs of 2 micro-batches
        same = [torch.equal(x[0][x[6]], x[1][x[6]]) for x in step]
        assert same == [True, True, False, False]
    first = steps_of("out")[0]
    assert first["objective/kl"] == 0 and 1 < first["nlpo/allowed_tokens"] < 320
    entropy = -rollout.masked_logps.sum(1).mean()
    assert steps_of("out")[1]["objective/entropy"] == pytest.approx(float(entropy), rel=1e-6)


def test_the_masking_policy_is_renewed_and_saved(run, start_of):
    """With --mask-every 2: the start, the policy after step 2, and still that one after step 3."""
    flags = {"max_steps": 3, "save_every": 1, "keep_last": 3, "eval_every": 0}
    assert run("nlpo", "out", top_p=0.8, mask_every=2, **flags) == 0

    def weights(step: int, name: str) -> dict[str, torch.Tensor]:
        start = f"weight|{name}.lm."
        tensors = load_file(trained("out", step))
        return {k.removeprefix(start): x for k, x in tensors.items() if k.startswith(start)}

    start = load_file(start_of("llama") / "model.safetensors")
    for step, expected in ((1, start), (2, weights(2, "policy")), (3, weights(2, "policy"))):
        found = weights(step, "masking")
        assert found and all(torch.equal(x, expected[name]) for name, x in found.items())
        assert any(not torch.equal(x, weights(3, "policy")[name]) for name, x in found.items())
    assert not any(key.startswith("exp_avg|masking") for key in load_file(trained("out", 3)))


def test_with_adapters(run, tmp_path):
    """The masking policy has its own: only these are saved and renewed."""
    assert run("nlpo", "out", lora_rank=4, lr=1e-2, max_steps=2, top_p=0.8, mask_every=2) == 0
    tensors = load_file(trained("out", 2))
    copies = [key for key in tensors if key.startswith("weight|masking")]
    assert copies and all(".lora_" in key for key in copies)
    assert all(torch.equal(tensors[k], tensors[k.replace("masking", "policy")]) for k in copies)
    assert Path("out/adapter/adapter_model.safetensors").is_file()


@pytest.mark.parametrize("flags", ({"top_p": 1.1}, {"top_p": 0.0}, {"mask_every": 0}), ids=str)
def test_what_cannot_work_is_refused(run, monkeypatch, flags):
    monkeypatch.setattr(common, "load_tokenizer", lambda *_: pytest.fail("loaded"))
    with pytest.raises(ValueError, match="--(top-p|mask-every) "):
        run("nlpo", "out", **flags)
