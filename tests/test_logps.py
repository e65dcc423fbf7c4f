"""Response log-probs against the plain way: one text at a time through the whole model, log_softmax
in float64, picked by hand.

For every architecture, forward and backward, with Gemma 2's and Mistral's windows shorter than the
texts.
"""

import math
import os
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import ARCHITECTURES

import common

VOCABULARY = 300  # ids that the tests' models and tokenizers both have
EOS = 1
CPU = torch.device("cpu")


# -- helpers


class OneProcess:
    """What `load_policy` asks of a run."""

    device, world = CPU, 1


def load(folder, dtype: str = "float64", **how) -> torch.nn.Module:
    return common.load_policy(str(folder), dtype, OneProcess(), **how)


def reference_model(folder, dtype: torch.dtype, **changes):
    """As plain Transformers loads it, with eager attention, which is the definition."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", **changes
    )
    return model.to(dtype).eval()


@contextmanager
def all_float64():
    """Transformers computes norms and the eager softmax in fp32 even in a float64 model, so nothing
    below 1e-7 could be seen. In here what is float64 stays float64, in the reference and in what
    is tested.
    """
    to, softmax = torch.Tensor.to, F.softmax

    def stays(tensor: torch.Tensor, dtype: torch.dtype | None) -> bool:
        return tensor.dtype == torch.float64 and dtype == torch.float32

    def new_to(self, *args, **more):
        asked = more.get("dtype", args[0] if args else None)
        return self if stays(self, asked) else to(self, *args, **more)

    def new_softmax(input, dim=None, dtype=None, **more):
        return softmax(input, dim=dim, dtype=None if stays(input, dtype) else dtype, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "to", new_to)
        patch.setattr(torch.Tensor, "float", lambda self: new_to(self, torch.float32))
        patch.setattr(F, "softmax", new_softmax)
        yield


# Lengths of a prompt and of its responses: K is 3, 1, 2 and 4; windows are 8.
RAGGED = ((5, (9, 3, 4)), (17, (1,)), (1, (30, 2)), (24, (6, 6, 1, 12)))
PAIRS = ((6, (9, 4)), (30, (1, 7)), (2, (3, 20)), (11, (5, 5)))


def random_rows(shapes, seed: int = 0) -> list[common.Row]:
    """Rows of random tokens; responses end with EOS."""
    rng = np.random.default_rng(seed)
    rows = []
    for prompt_length, lengths in shapes:
        prompt = rng.integers(3, VOCABULARY, prompt_length).astype(np.int32)
        responses = [rng.integers(3, VOCABULARY, n).astype(np.int32) for n in lengths]
        for response in responses:
            response[-1] = EOS
        rows.append(common.Row(prompt, responses, prompt))
    return rows


def collated(
    rows: list[common.Row], indexes: list[int] | None = None, shared: bool = False
) -> common.Micro:
    indexes = indexes or list(range(len(rows)))
    return common.collate(common.Rows("test", rows), indexes, CPU, shared)


LAYOUTS = pytest.mark.parametrize("shared", (False, True), ids=("plain", "shared"))
HEADS = pytest.mark.parametrize("fused", (False, True), ids=("logits", "fused"))


def plain_token_logps(model, prompt: np.ndarray, response: np.ndarray) -> torch.Tensor:
    """(T,) from the logits of the whole text, alone in its batch."""
    ids = [*prompt.tolist(), *response.tolist()]
    logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    logps = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    return torch.stack([logps[t - 1, ids[t]] for t in range(len(prompt), len(ids))])


def plain(model, rows: list[common.Row]) -> dict[tuple[int, int], torch.Tensor]:
    """(b, k) -> (T,)"""
    return {
        (b, k): plain_token_logps(model, row.prompt, response)
        for b, row in enumerate(rows)
        for k, response in enumerate(row.responses)
    }


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


# -- every architecture


@LAYOUTS
@HEADS
@pytest.mark.parametrize("shapes", (PAIRS, RAGGED), ids=("pairs", "ragged"))
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_equal_to_one_at_a_time(architecture, shapes, fused, shared, checkpoints):
    """Every token's log-prob, the sums, the lengths, and gradients by every parameter."""
    rows = random_rows(shapes)
    policy = load(checkpoints(architecture), fused_logps=fused)
    assert policy.share_prompt  # all of them can
    truth = reference_model(checkpoints(architecture), torch.float64)
    with all_float64():
        expected = plain(truth, rows)
        by_token = common.response_token_logps(policy, collated(rows, shared=shared))
        sums, lengths = common.response_logps(policy, collated(rows, shared=shared))
        many, longest = max(k for _, k in expected) + 1, max(map(len, expected.values()))
        assert by_token.shape == (len(rows), many, longest)
        assert sums.shape == lengths.shape == (len(rows), many)
        weights = torch.linspace(-1.0, 2.0, many * len(rows)).double().view(len(rows), many)
        total = torch.zeros(())
        for b in range(len(rows)):
            for k in range(many):
                there = expected.get((b, k), torch.zeros(0))  # what is absent counts as empty
                n = len(there)
                torch.testing.assert_close(
                    by_token[b, k, :n], there.to(by_token), rtol=0, atol=1e-9
                )
                assert not by_token[b, k, n:].any()
                assert sums[b, k].item() == pytest.approx(there.sum().item(), abs=1e-9)
                assert lengths[b, k] == n
                total = total + weights[b, k] * there.sum()
        (weights * sums).sum().backward()  # another weight for every response
        total.backward()
    ours, theirs = gradients(policy), gradients(truth)
    assert ours.keys() == theirs.keys() == dict(policy.named_parameters()).keys()
    for name in theirs:
        assert theirs[name].any(), name
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-9, msg=name)


@LAYOUTS
@HEADS
@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_low_precision_is_no_worse_than_plain(architecture, dtype, fused, shared, checkpoints):
    """Against float64 truth, the error is that of a plain forward pass in the same precision.

    Root mean squares over some hundred tokens; a factor of 1.5 for how rounding happens to fall.
    """
    rows = random_rows(PAIRS * 4)
    policy = load(checkpoints(architecture), dtype, fused_logps=fused)
    assert policy.share_prompt  # in low precision as well
    low = reference_model(checkpoints(architecture), torch.float32)
    with torch.no_grad():
        with all_float64():
            truth = plain(reference_model(checkpoints(architecture), torch.float64), rows)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            naive = plain(low, rows)
        logps = common.response_token_logps(policy, collated(rows, shared=shared))
    assert logps.dtype == torch.float32
    ours = {(b, k): logps[b, k, : len(y)] for (b, k), y in truth.items()}

    def error(found: dict) -> float:
        differences = torch.cat([found[key].double() - truth[key] for key in truth])
        return differences.square().mean().sqrt().item()

    assert 0 < error(ours) <= 1.5 * error(naive)


@LAYOUTS
@pytest.mark.parametrize("dtype", ("float64", "float32", "bfloat16"))
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_padding_beyond_a_window_leaves_gradients_finite(architecture, dtype, shared, checkpoints):
    """A padding position whose whole window is padding has nothing to attend to. Its NaN would not
    be seen in a log-prob, only in the gradient.
    """
    rows = random_rows(((3, (2, 60)), (3, (2, 2))))
    policy = load(checkpoints(architecture), dtype)
    sums, _ = common.response_logps(policy, collated(rows, shared=shared))
    sums.sum().backward()
    assert sums.isfinite().all()
    for name, gradient in gradients(policy).items():
        assert gradient.isfinite().all(), name


@LAYOUTS
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_batch_mates_and_padding_change_nothing(architecture, shared, checkpoints):
    rows = random_rows(RAGGED)
    policy = load(checkpoints(architecture))
    with torch.no_grad(), all_float64():
        alone = [common.response_token_logps(policy, collated(rows, [b], shared)) for b in range(4)]
        for order in ([0, 1, 2, 3], [3, 1, 0], [2, 0], [0, 0]):
            together = common.response_token_logps(policy, collated(rows, order, shared))
            for place, b in enumerate(order):
                _, many, longest = alone[b].shape
                found = together[place, :many, :longest]
                torch.testing.assert_close(found, alone[b][0], rtol=0, atol=1e-9)
        # What stands in the padding is never looked at.
        micro = collated(rows, shared=shared)
        expected, _ = common.response_logps(policy, micro)
        padding = torch.ones_like(micro.input_ids, dtype=torch.bool)
        for b, row in enumerate(rows):
            if shared:
                padding[b, : row.tokens()] = False
                continue
            for k, response in enumerate(row.responses):
                padding[b * micro.shape[1] + k, : len(row.prompt) + len(response)] = False
        assert padding.any() and (~padding).sum() == micro.filled
        noise = torch.randint_like(micro.input_ids, 3, VOCABULARY)
        micro.input_ids = torch.where(padding, noise, micro.input_ids)
        found, _ = common.response_logps(policy, micro)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def test_which_tokens_count(checkpoints):
    """The prompt is read and not counted; EOS is counted like any other token."""
    policy = load(checkpoints("llama"))
    row = random_rows(((6, (5, 3)),))[0]
    with torch.no_grad(), all_float64():
        sums, lengths = common.response_logps(policy, collated([row]))
        # The chain rule: a response whose first tokens are moved to the prompt loses their part.
        begin, rest = row.responses[0][:2], row.responses[0][2:]
        moved = common.Row(np.concatenate([row.prompt, begin]), [rest, rest], row.ask)
        part, part_lengths = common.response_logps(policy, collated([moved]))
        first = plain_token_logps(policy, row.prompt, row.responses[0])[:2].sum()
        assert sums[0, 0].item() == pytest.approx((part[0, 0] + first).item(), abs=1e-9)
        assert lengths.tolist() == [[5, 3]] and part_lengths.tolist() == [[3, 3]]
        # Without its EOS a response is more likely, by exactly EOS's log-prob.
        short = common.Row(row.prompt, [row.responses[0][:-1]], row.ask)
        without, _ = common.response_logps(policy, collated([short]))
        end = plain_token_logps(policy, row.prompt, row.responses[0])[-1]
        assert sums[0, 0].item() == pytest.approx((without[0, 0] + end).item(), abs=1e-9)


@LAYOUTS
@pytest.mark.parametrize(
    "architecture, change",
    [
        ("gemma2", {"attn_logit_softcapping": None}),
        ("gemma2", {"final_logit_softcapping": None}),
        ("gemma2", {"sliding_window": 64}),
        ("mistral", {"sliding_window": 64}),
    ],
)
def test_windows_and_softcaps_are_felt(architecture, change, shared, checkpoints):
    """The tests above would see a softcap or a window that was left out."""
    rows = random_rows(((30, (12, 9)),))
    policy = load(checkpoints(architecture))
    without = reference_model(checkpoints(architecture), torch.float64, **change)
    with torch.no_grad():
        found = common.response_token_logps(policy, collated(rows, shared=shared))[0, 1, :9]
        other = plain(without, rows)[0, 1]
    assert (found - other).abs().max() > 1e-5


# -- one prompt for all of its responses: which attention, when, and when not


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("attn", ("eager", "sdpa", "flex_attention"))
def test_every_attention_gives_the_same(architecture, attn, checkpoints, monkeypatch):
    """Shared with each kind of attention against plain rows with the model's usual one.

    flex_attention has no backward pass on a CPU, and is left uncompiled here.
    """
    if (architecture, attn) in (("gemma2", "sdpa"), ("gpt2", "flex_attention")):
        pytest.skip("Transformers refuses it")
    from torch.nn.attention import flex_attention as torch_flex
    from transformers.integrations import flex_attention as hf_flex

    monkeypatch.setattr(torch_flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(
        hf_flex,
        "compile_friendly_flex_attention",
        lambda *qkv, training, **more: torch_flex.flex_attention(*qkv, **more),
    )
    rows, policy = random_rows(RAGGED), load(checkpoints(architecture))
    backward, flex = attn != "flex_attention", attn == "flex_attention"
    weights = torch.linspace(-1.0, 2.0, 16, dtype=torch.float64).view(4, 4)
    sums, grads = {}, {}
    for shared in (False, True):
        if shared:
            policy.set_attn_implementation(attn)
        length = 128 if shared and flex else 1  # what its blocks divide
        micro = common.collate(common.Rows("", rows), [0, 1, 2, 3], CPU, shared, length)
        policy.zero_grad()
        with all_float64(), torch.set_grad_enabled(backward):
            sums[shared], _ = common.response_logps(policy, micro)
        if backward:
            (weights * sums[shared]).sum().backward()
        grads[shared] = {name: g.clone() for name, g in gradients(policy).items()}
    torch.testing.assert_close(sums[True], sums[False], rtol=0, atol=1e-6 if flex else 1e-9)
    assert bool(grads[True]) == backward
    for name, gradient in grads[False].items():
        torch.testing.assert_close(grads[True][name], gradient, rtol=0, atol=1e-9, msg=name)


@pytest.mark.parametrize(
    "window, expected",
    [
        (None, ["a", "ab", "abc", "abcd", "abe", "ab."]),
        # d is 3 positions after a. So is e by its index, but it is 2 by its position.
        (3, ["a", "ab", "abc", "bcd", "abe", "ab."]),
    ],
)
def test_the_mask_by_hand(window, expected, checkpoints):
    """Prompt a b, responses c d and e, padding: who sees whom. flex too."""
    from torch.nn.attention.flex_attention import create_mask

    policy = load(checkpoints("llama"))
    row = common.Row(np.array([3, 4]), [np.array([5, 6]), np.array([7])], np.array([3, 4]))
    micro = common.collate(common.Rows("", [row]), [0], CPU, True, 6)
    mask = common._shared_mask(policy, micro, window)
    seen = [[c for c, m in zip("abcde.", line, strict=True) if m == 0] for line in mask[0, 0]]
    assert ["".join(line) for line in seen] == expected
    policy.config._attn_implementation = "flex_attention"
    blocks = common._shared_mask(policy, micro, window)
    dense = create_mask(blocks.mask_mod, 1, None, 6, 6, "cpu")
    assert torch.equal(dense[0, 0], mask[0, 0] == 0)


def test_attention_that_cannot_be_is_refused_before_anything_is_loaded(checkpoints, monkeypatch):
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", None)
    with pytest.raises(common.UserError, match="--attn flex_attention.*CUDA"):
        load(checkpoints("llama"), attn="flex_attention")
    with pytest.raises(common.UserError, match="--attn sdpa.*softcap"):
        load(checkpoints("gemma2"), attn="sdpa")


def test_attention_that_a_model_does_not_have_is_refused_by_name(checkpoints, monkeypatch):
    """As on CUDA, where --attn flex_attention gets as far as Transformers, which has none there."""
    monkeypatch.setattr(common, "_attention_for", lambda config, attn, device: attn)
    with pytest.raises(common.UserError, match="--attn flex_attention: .*gpt2 cannot take it"):
        load(checkpoints("gpt2"), attn="flex_attention")


def test_attention_of_the_embedded_model(checkpoints):
    assert load("tiny-untrained").config._attn_implementation == "sdpa"
    assert load("tiny-untrained", attn="eager").config._attn_implementation == "eager"
    with pytest.raises(common.UserError, match="CUDA"):
        load("tiny-untrained", attn="flex_attention")


def test_attention_asked_for_is_the_one_that_is_used(checkpoints):
    implementation = lambda policy: policy.config._attn_implementation  # noqa: E731
    assert implementation(load(checkpoints("llama"))) == "sdpa"
    assert implementation(load(checkpoints("llama"), attn="eager")) == "eager"
    assert implementation(load(checkpoints("gemma2"))) == "eager"


@pytest.fixture(scope="session")
def strange(tmp_path_factory):
    """Models that read positions or windows off the index, and one that wants no positions."""
    from transformers import AutoModelForCausalLM as Auto

    small = {"vocab_size": 320, "eos_token_id": 1, "bos_token_id": 0}
    configs = {
        "gpt_neo": transformers.GPTNeoConfig(
            hidden_size=32, num_layers=2, attention_types=[[["global", "local"], 1]],
            num_heads=4, window_size=8, max_position_embeddings=128, **small,
        ),
        "bloom": transformers.BloomConfig(hidden_size=32, n_layer=2, n_head=4, **small),
        "mamba": transformers.MambaConfig(hidden_size=32, num_hidden_layers=2, **small),
    }  # fmt: skip
    folders = {}
    for name, config in configs.items():
        folders[name] = tmp_path_factory.mktemp("strange") / name
        torch.manual_seed(1)
        config.initializer_range = 0.3
        Auto.from_config(config).save_pretrained(folders[name])
    return folders


@pytest.mark.parametrize("name", ("gpt_neo", "bloom", "mamba"))
def test_a_model_that_cannot_share_gets_plain_rows_and_a_line_says_so(name, strange, capsys):
    policy = load(strange[name], "float32")
    assert not policy.share_prompt
    assert capsys.readouterr().out.count("a prompt goes through the model once for every") == 1
    rows = common.Rows("", random_rows(((9, (4, 3)),)))
    assert common.collate_for(policy, rows, [0]).segments is None
    load(strange[name], "float32", share_prompt=False)
    assert "once for every" not in capsys.readouterr().out  # not asked for, not missed


def test_the_probe_is_as_long_as_the_longest_row(checkpoints, strange):
    """GPT-Neo's window of 8 is not felt in rows of 8 tokens: there it may share."""

    class Short(OneProcess):
        lengths = [4, 8]

    assert common.load_policy(str(strange["gpt_neo"]), "float32", Short()).share_prompt


def test_sharing_is_chosen_where_it_costs_less(checkpoints):
    policy = load(checkpoints("llama"))  # hidden 32: a key looked at is dear
    layout = lambda *shape: (  # noqa: E731
        common.collate_for(policy, common.Rows("", random_rows((shape,))), [0]).segments
    )
    assert layout(40, (5, 5)) is not None  # a long prompt
    assert layout(2, (60, 60)) is None  # hardly a prompt
    assert layout(40, (5,)) is None  # nobody to share with
    policy.share_prompt = False
    assert layout(40, (5, 5)) is None


def test_an_adapter_on_the_head_is_refused(checkpoints):
    """PEFT's wrapper has a `weight`, that of the layer below the adapter."""

    class Adapted(torch.nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base_layer, self.weight, self.bias = base, base.weight, base.bias

        def forward(self, x):
            return self.base_layer(x)

    policy = load(checkpoints("llama"))
    policy.lm_head = Adapted(policy.lm_head)
    with pytest.raises(common.UserError, match="Adapted.*adapter"):
        common.response_logps(policy, collated(random_rows(PAIRS)))


# -- the last layer, by hand

HIDDEN = ((0.5, -1.0, 2.0), (0.0, 3.0, -0.25))
WEIGHT = ((1.0, 0.0, 0.5), (-0.5, 2.0, 0.0), (0.25, -0.75, 1.5), (0.0, 0.0, -1.0))
BIAS = (0.1, -0.2, 0.3, 0.4)
TARGETS = (2, 1)


@HEADS
@pytest.mark.parametrize("temperature", (1.0, 0.7))
@pytest.mark.parametrize("scale", (1.0, 0.0625))
@pytest.mark.parametrize("softcap", (None, 1.5))
@pytest.mark.parametrize("bias", (None, BIAS))
def test_token_logps_by_hand(bias, softcap, scale, temperature, fused):
    """Scale, then softcap, then temperature, as the models themselves do; in plain floats."""
    tensor = lambda x: torch.tensor(x, dtype=torch.float64)  # noqa: E731
    head = common.Head(tensor(WEIGHT), None if bias is None else tensor(bias), softcap, scale)
    hidden, targets = tensor(HIDDEN), torch.tensor(TARGETS)
    found = common.token_logps(hidden, head, targets, temperature, fused)
    for h, target, logp in zip(HIDDEN, TARGETS, found.tolist(), strict=True):
        logits = []
        for w, b in zip(WEIGHT, bias or (0.0,) * 4, strict=True):
            x = (sum(p * q for p, q in zip(h, w, strict=True)) + b) * scale
            x = softcap * math.tanh(x / softcap) if softcap else x
            logits.append(x / temperature)
        expected = logits[target] - math.log(sum(map(math.exp, logits)))
        assert logp == pytest.approx(expected, rel=1e-12)


def test_token_logps_are_fp32_whatever_goes_in():
    """A bf16 log-softmax has two to three digits, less than a preference is worth."""
    hidden, weight = torch.randn(6, 8).bfloat16(), torch.randn(50, 8).bfloat16()
    targets = torch.arange(6)
    head = common.Head(weight, None, None, 1.0)
    # One rounding for each of 50 exponentials and sums, relative to values of about 10.
    bound = 50 * 10 * torch.finfo(torch.float32).eps
    logits = {  # as the plain product gives it in bf16, and exact
        False: F.linear(hidden, weight).double(),
        True: F.linear(hidden.double(), weight.double()),
    }
    for fused in (False, True):
        logps = common.token_logps(hidden, head, targets, fused=fused)
        assert logps.dtype == torch.float32
        expected = logits[fused].log_softmax(-1)[range(6), targets]
        assert (logps - expected).abs().max() < bound


# -- a head that does something unknown


def _softcapped(logits):
    return 5 * torch.tanh(logits / 5)


@pytest.mark.parametrize(
    "more", (_softcapped, lambda x: x * 1.1, lambda x: x + torch.linspace(0, 0.1, x.shape[-1]))
)
@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_an_unknown_head_is_refused(more, dtype, checkpoints, monkeypatch):
    """A model that does more to its logits than its config says in a way we know."""
    forward = transformers.LlamaForCausalLM.forward

    def changed(self, *args, **kwargs):
        out = forward(self, *args, **kwargs)
        out.logits = more(out.logits)
        return out

    load(checkpoints("llama"), dtype)
    monkeypatch.setattr(transformers.LlamaForCausalLM, "forward", changed)
    with pytest.raises(common.UserError, match="LlamaForCausalLM"):
        load(checkpoints("llama"), dtype)


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_a_softcap_under_another_name_is_refused(dtype, checkpoints, monkeypatch):
    """As if Gemma 2's config called it something else."""
    head_of = common.head_of
    monkeypatch.setattr(common, "head_of", lambda policy: replace(head_of(policy), softcap=None))
    with pytest.raises(common.UserError, match="Gemma2ForCausalLM"):
        load(checkpoints("gemma2"), dtype)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # a newer name, which 5.17 does not have
@pytest.mark.parametrize("architecture", ("llama", "gemma2", "gpt2"))
def test_gradient_checkpointing_sees_the_same_mask(architecture, checkpoints):
    """The body computed a second time in the backward pass, behind a shared prompt as well."""
    policy, micro = load(checkpoints(architecture)), collated(random_rows(RAGGED), shared=True)
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            policy.train()  # only then; these models' dropout is set to 0
            for module in policy.modules():
                if isinstance(module, torch.nn.Dropout):
                    module.p = 0.0
            policy.gradient_checkpointing_enable({"use_reentrant": False})
        policy.zero_grad()
        sums, _ = common.response_logps(policy, micro)
        sums.square().sum().backward()
        found.append({name: g.clone() for name, g in gradients(policy).items()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=0, atol=1e-9, msg=name)


# -- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
@pytest.mark.parametrize("attn", ("auto", "eager", "sdpa", "flex_attention"))
@pytest.mark.parametrize("architecture", ("llama", "gemma2", "mistral", "qwen3"))
def test_sharing_on_a_gpu(architecture, attn, dtype, checkpoints):
    """Shared and plain rows, forward and backward, as `--attn` and `--dtype` give them."""
    if (architecture, attn) == ("gemma2", "sdpa"):
        pytest.skip("refused")

    class Gpu(OneProcess):
        device = torch.device("cuda")

    policy = common.load_policy(str(checkpoints(architecture)), dtype, Gpu(), attn)
    assert policy.share_prompt
    flex = attn == "flex_attention"
    weights = torch.linspace(-1.0, 2.0, 16, device="cuda").view(4, 4)
    sums, grads = [], []
    for shared in (False, True):
        rows = common.Rows("", random_rows(RAGGED))
        length = 128 if shared and flex else 1
        micro = common.collate(rows, [0, 1, 2, 3], policy.device, shared, length)
        policy.zero_grad()
        sums.append(common.response_logps(policy, micro)[0])
        (weights * sums[-1]).sum().backward()
        grads.append({name: g.clone() for name, g in gradients(policy).items()})
    # Of sums of up to 30 log-probs of about 6 nats, and of their gradients' norms.
    close = {"float32": 1e-4, "bfloat16": 3e-2}[dtype]
    assert ((sums[0] - sums[1]).abs() <= close * (1 + sums[0].abs())).all()
    for name, gradient in grads[0].items():
        assert (grads[1][name] - gradient).norm() <= 5 * close * (gradient.norm() + 1e-3), name


# -- kernels/


def test_kernels_are_found_beside_a_package_of_that_name(tmp_path):
    """Hugging Face publishes one called `kernels`, which Transformers imports where it is there."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("theirs = True\n")
    code = (
        "import kernels, common; ours = common.beside('kernels.token_logps'); "
        "assert kernels.theirs and common.beside('kernels.token_logps') is ours; "
        "print(ours.__file__)"
    )
    path = os.pathsep.join([str(tmp_path), str(common.HERE)])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": path},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == str(common.HERE / "kernels" / "token_logps.py"), done.stderr


def test_without_kernels_the_plain_version_serves(checkpoints, monkeypatch, tmp_path):
    policy, micro = load(checkpoints("gemma2"), "float32"), collated(random_rows(PAIRS))
    fused, _ = common.response_logps(policy, micro)
    monkeypatch.setattr(common, "HERE", tmp_path)
    plain, _ = common.response_logps(policy, micro)
    assert common.beside("kernels.token_logps") is None
    torch.testing.assert_close(fused, plain, rtol=0, atol=1e-4)
