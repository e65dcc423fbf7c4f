"""Log-probs of responses against plain Transformers: one text at a time through the whole model,
log_softmax in float64, picked by hand. Windows of Gemma 2 and Mistral are shorter than the texts.
"""

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from conftest import ARCHITECTURES, all_float64

import common
from kernels import head, shared_prompt

VOCABULARY, EOS = 300, 1  # ids that the tests' models have
CPU = torch.device("cpu")
SMALL = {
    "vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 48, "eos_token_id": EOS, "bos_token_id": 0,
    "pad_token_id": 2, "initializer_range": 0.1, "max_position_embeddings": 128,
}  # fmt: skip
SCALED = {  # they scale logits, residuals and embeddings
    "cohere": lambda: transformers.CohereConfig(logit_scale=0.3, **SMALL),
    "granite": lambda: transformers.GraniteConfig(
        logits_scaling=3.0, residual_multiplier=0.5, embedding_multiplier=2.0, **SMALL
    ),
}
NAMES = (*ARCHITECTURES, *SCALED)
TINY = {"vocab_size": 320, "hidden_size": 32, "initializer_range": 0.3}
STRANGE = {  # one derives a window from the index, one positions, one takes no positions
    "gpt_neo": lambda: transformers.GPTNeoConfig(
        num_layers=2, attention_types=[[["global", "local"], 1]], num_heads=4,
        window_size=8, max_position_embeddings=128, **TINY,
    ),
    "bloom": lambda: transformers.BloomConfig(n_layer=2, n_head=4, **TINY),
    "mamba": lambda: transformers.MambaConfig(num_hidden_layers=2, **TINY),
}  # fmt: skip


@pytest.fixture(scope="session")
def models(checkpoints, tmp_path_factory):
    """models(name) -> a folder, made once."""
    made = {}

    def get(name: str):
        if name in ARCHITECTURES:
            return checkpoints(name)
        if name not in made:
            torch.manual_seed(1)
            config = (SCALED | STRANGE)[name]()
            made[name] = tmp_path_factory.mktemp("models") / name
            transformers.AutoModelForCausalLM.from_config(config).save_pretrained(made[name])
        return made[name]

    return get


def load(folder, dtype="float64", lengths=None, device=CPU, frozen=False, **flags) -> common.Policy:
    run = SimpleNamespace(rank=0, world=1, in_step=False, device=device, lengths=lengths)
    args = SimpleNamespace(model=str(folder), dtype=dtype, **flags)
    return common.load_policy(args, run, frozen=frozen)


def plain_model(folder, dtype: torch.dtype = torch.float64):
    """As Transformers loads it, with eager attention, which is the definition."""
    how = {"dtype": torch.float32, "attn_implementation": "eager"}
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **how).to(dtype).eval()


# Lengths of a prompt and of its responses: K is 3, 1, 2 and 4; windows are 8.
RAGGED = ((5, (9, 3, 4)), (17, (1,)), (1, (30, 2)), (24, (6, 6, 1, 12)))


def random_rows(shapes=RAGGED, seed: int = 0) -> list[common.Row]:
    """Rows of random tokens; responses end with EOS."""
    rng = np.random.default_rng(seed)
    rows = []
    for length, lengths in shapes:
        prompt, *responses = (rng.integers(3, VOCABULARY, n) for n in (length, *lengths))
        for response in responses:
            response[-1] = EOS
        rows.append(common.Row(prompt, responses, prompt))
    return rows


def batch_of(policy, rows, shared: bool, indexes=None) -> common.MicroBatch:
    indexes = indexes or list(range(len(rows)))
    return common.collate(rows, indexes, CPU, policy.config if shared else None)


def plain_logps(model, row: common.Row, k: int = 0, temperature: float = 1.0) -> torch.Tensor:
    """(T,) of one response, alone, from the logits of the whole text."""
    ids = [*row.prompt.tolist(), *row.responses[k].tolist()]
    logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    logps = logits.log_softmax(-1)
    return torch.stack([logps[t - 1, ids[t]] for t in range(len(row.prompt), len(ids))])


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_close(ours: dict, theirs: dict) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-9, msg=name)


WEIGHTS = torch.linspace(-1.0, 2.0, 16, dtype=torch.float64).view(4, 4)  # one per response
LAYOUTS = pytest.mark.parametrize("shared", (False, True), ids=("plain", "shared"))


# -- every architecture


@pytest.mark.parametrize("name", NAMES)
def test_equal_to_one_at_a_time(name, models):
    """Every token's log-prob and the gradient by every parameter, at two temperatures: in both
    layouts, with the fused head and without, with every attention that has a backward pass here.
    """
    rows, truth = random_rows(), plain_model(models(name))
    policies = [
        load(models(name), **flags) for flags in ({}, {"fused_logps": False, "attn": "eager"})
    ]
    for temperature in (1.0, 0.7):
        truth.zero_grad()
        with all_float64():
            expected = torch.zeros(4, 4, 30, dtype=torch.float64)
            lengths = torch.zeros(4, 4, dtype=torch.int64)
            for b, row in enumerate(rows):
                for k in range(len(row.responses)):
                    logps = plain_logps(truth, row, k, temperature)
                    expected[b, k, : len(logps)], lengths[b, k] = logps, len(logps)
            (WEIGHTS * expected.sum(-1)).sum().backward()
        theirs = gradients(truth)
        assert all(gradient.any() for gradient in theirs.values())
        for policy in policies:
            assert policy.share_prompt  # all of these can
            for shared in (False, True):
                policy.zero_grad()
                batch = batch_of(policy, rows, shared)
                with all_float64():
                    found = policy(batch, temperature)  # (B, K, T)
                    sums = common.response_logps(policy, batch, temperature)  # (B, K)
                    (WEIGHTS * sums).sum().backward()
                torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
                torch.testing.assert_close(sums, expected.sum(-1), rtol=0, atol=1e-9)
                assert torch.equal(batch.lengths, lengths)
                ours = {n.removeprefix("lm."): g for n, g in gradients(policy).items()}
                assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
@pytest.mark.parametrize("name", ("llama", "gemma2", "gpt2", "cohere"))
def test_low_precision_is_no_worse_than_plain(name, dtype, models):
    """Root mean square error over some hundred tokens against float64; a factor of 1.5 for how
    rounding happens to fall.
    """
    rows = random_rows(((6, (9, 4)), (30, (1, 7)), (2, (3, 20)), (11, (5, 5))) * 4)
    responses = [(b, k) for b in range(len(rows)) for k in range(2)]

    def all_logps(model) -> torch.Tensor:
        return torch.cat([plain_logps(model, rows[b], k) for b, k in responses]).double()

    with torch.no_grad():
        with all_float64():
            truth = all_logps(plain_model(models(name)))
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            naive = all_logps(plain_model(models(name), torch.float32))
        for fused in (True, False):
            policy = load(models(name), dtype, fused_logps=fused)
            assert policy.share_prompt
            for shared in (False, True):
                logps = policy(batch_of(policy, rows, shared))
                assert logps.dtype == torch.float32
                ours = [logps[b, k, : len(rows[b].responses[k])] for b, k in responses]
                error = (torch.cat(ours).double() - truth).square().mean().sqrt()
                assert 0 < error <= 1.5 * (naive - truth).square().mean().sqrt()


@LAYOUTS
@pytest.mark.parametrize("name", ("llama", "gemma2", "gpt2", "mistral"))
def test_padding_and_neighbours_change_nothing(name, shared, models):
    rows, policy = random_rows(), load(models(name))
    with torch.no_grad(), all_float64():
        alone = [policy(batch_of(policy, rows, shared, [b])) for b in range(4)]
        for order in ([3, 1, 0], [2, 0], [0, 0]):
            together = policy(batch_of(policy, rows, shared, order))
            for found, b in zip(together, order, strict=True):
                _, K, T = alone[b].shape
                torch.testing.assert_close(found[:K, :T], alone[b][0], rtol=0, atol=1e-9)
        batch = batch_of(policy, rows, shared)
        expected, padding = policy(batch), batch.input_ids == 0  # random tokens are 3 or more
        assert padding.any()
        noise = torch.randint_like(batch.input_ids, 3, VOCABULARY)
        batch.input_ids = torch.where(padding, noise, batch.input_ids)
        torch.testing.assert_close(policy(batch), expected, rtol=0, atol=1e-9)


@LAYOUTS
@pytest.mark.parametrize("dtype", ("float64", "bfloat16"))
@pytest.mark.parametrize("name", ("gemma2", "mistral"))
def test_padding_beyond_a_window_leaves_gradients_finite(name, dtype, shared, models):
    """A padding position whose window is all padding attends to nothing. A NaN there would not
    show in a log-prob, only in the gradient.
    """
    policy = load(models(name), dtype)
    rows = random_rows(((3, (2, 60)), (3, (2, 2))))
    common.response_logps(policy, batch_of(policy, rows, shared)).sum().backward()
    assert all(gradient.isfinite().all() for gradient in gradients(policy).values())


# -- one prompt for all of its responses


# In the second case d is 3 positions after a. So is e by its index, but it is 2 by its position.
@pytest.mark.parametrize("window, line_of_d", [(None, "abcd"), (3, "bcd")])
def test_the_mask_by_hand(window, line_of_d):
    """Prompt a b, responses c d and e, padding: who attends to whom."""
    from torch.nn.attention.flex_attention import create_mask

    segments, positions = torch.tensor([[0, 0, 1, 1, 2, 3]]), torch.tensor([[0, 1, 2, 3, 2, 0]])
    config = SimpleNamespace(_attn_implementation="sdpa", sliding_window=window)
    mask = shared_prompt.attention_mask(segments, positions, config, torch.float64)[0, 0] == 0
    seen = ["".join(c for c, m in zip("abcde.", line, strict=True) if m) for line in mask]
    assert seen == ["a", "ab", "abc", line_of_d, "abe", "ab."]
    config._attn_implementation = "flex_attention"
    blocks = shared_prompt.attention_mask(segments, positions, config, torch.float64)
    assert torch.equal(create_mask(blocks.mask_mod, 1, None, 6, 6, "cpu")[0, 0], mask)


@pytest.mark.parametrize("name", STRANGE)
def test_a_model_that_cannot_share(name, models, caplog):
    policy = load(models(name), "float32", lengths=[40])
    assert not policy.share_prompt
    assert caplog.text.count("the prompt goes through the model once for every response") == 1
    load(models(name), "float32", share_prompt=False)
    assert caplog.text.count("once for every response") == 1  # not asked for, not missed
    if name == "gpt_neo":  # rows of 8 tokens do not reach beyond its window
        assert load(models(name), "float32", lengths=[4, 8]).share_prompt


def test_sharing_is_used_where_it_costs_less(models):
    policy = load(models("llama"))
    for *shape, shared in ((40, (5, 5), True), (2, (60, 60), False), (40, (5,), False)):
        batch = common.collate_for(policy, random_rows([shape]), [0])
        assert (batch.segments is not None) == shared


@pytest.mark.parametrize(
    "name, attn, found",
    [
        ("llama", "auto", "sdpa"), ("llama", "eager", "eager"), ("gemma2", "auto", "eager"),
        ("tiny-untrained", "auto", "sdpa"), ("tiny-untrained", "eager", "eager"),
        ("gemma2", "sdpa", "--attn sdpa would leave out this model's softcap"),
        ("llama", "flex_attention", "--attn flex_attention has no backward pass outside of CUDA"),
        ("tiny-untrained", "flex_attention", "--attn flex_attention has no backward pass"),
    ],
)  # fmt: skip
def test_attention(name, attn, found, models):
    folder = name if name.startswith("tiny") else models(name)
    if found.startswith("--"):
        with pytest.raises(ValueError, match=found):
            load(folder, attn=attn)
    else:
        assert load(folder, attn=attn).config._attn_implementation == found


# -- the last layer


@pytest.mark.parametrize(
    "change", (lambda x: 5 * torch.tanh(x / 5), lambda x: x * 1.1, lambda x: x + x.cos() / 9)
)
def test_an_unknown_head_is_refused(change, models, monkeypatch):
    """A model that does more to its logits than its config says in a way we know."""
    forward = transformers.LlamaForCausalLM.forward

    def changed(*args, **more):
        out = forward(*args, **more)
        out.logits = change(out.logits)
        return out

    monkeypatch.setattr(transformers.LlamaForCausalLM, "forward", changed)
    for dtype in ("float32", "bfloat16"):
        with pytest.raises(ValueError, match="output layer of LlamaForCausalLM does more than"):
            load(models("llama"), dtype)
    monkeypatch.undo()
    policy = load(models("llama"))
    policy.lm.lm_head = torch.nn.Sequential(policy.lm.lm_head)
    with pytest.raises(ValueError, match="the output layer is a Sequential, not a plain linear"):
        head.check(policy)


# -- wrappers of layers, and files that were not copied


@pytest.mark.slow
@LAYOUTS
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_compiled_layers_take_every_width(name, shared, models, monkeypatch):
    """All layers share one graph with gradients and one without, whatever the batch and the width;
    a batch of one sequence has its own. A graph per width or layer would compile for minutes.
    """
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    policy, plain = (load(models(name), "float32", compile=on) for on in (True, False))
    for seed, n in enumerate((4, 2, 1, 3)):
        shapes = [(length + 3 * seed, lengths) for length, lengths in RAGGED[:n]]
        batches = [batch_of(x, random_rows(shapes), shared) for x in (policy, plain)]
        found, expected = (model(x) for model, x in zip((policy, plain), batches, strict=True))
        torch.testing.assert_close(found, expected)
        found.sum().backward()
        with torch.no_grad():
            policy(batches[0])
    assert len(graphs) <= 4, f"{len(graphs)} graphs"


@LAYOUTS
@pytest.mark.parametrize("name", ("llama", "gemma2", "gpt2"))  # GPT-2's config has dropout
@pytest.mark.parametrize("compiled", (False, True))
def test_wrapped_layers_have_the_same_gradients(name, compiled, shared, models, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    found = []
    for flags in ({}, {"compile": compiled, "gradient_checkpointing": True}):
        policy = load(models(name), **flags)
        sums = common.response_logps(policy, batch_of(policy, random_rows(), shared))
        (WEIGHTS * sums).sum().backward()
        found.append(gradients(policy))
    assert_close(found[1], found[0])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_frozen_model_in_bfloat16_gives_the_same_numbers(name, models):
    """So the KL of a policy that has learned nothing is exactly 0."""
    policy, reference = (load(models(name), "bfloat16", frozen=frozen) for frozen in (False, True))
    assert reference.lm.base_model.get_input_embeddings().weight.dtype == torch.float32
    assert any(p.dtype == torch.bfloat16 for p in reference.parameters())
    batch = batch_of(policy, random_rows(), False)
    assert torch.equal(policy(batch), reference(batch))


@pytest.mark.parametrize("name", ("llama", "gemma2"))
def test_without_kernels(name, models, monkeypatch, tmp_path):
    policy, rows = load(models(name)), random_rows()
    expected = policy(batch_of(policy, rows, False), 0.7)
    monkeypatch.setattr(common, "HERE", tmp_path)
    assert common.optional_module("kernels.head") is None
    found = policy(common.collate_for(policy, rows, [0, 1, 2, 3]), 0.7)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)


# -- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
@pytest.mark.parametrize("attn", ("auto", "eager", "sdpa", "flex_attention"))
@pytest.mark.parametrize("name", ("llama", "gemma2", "mistral", "qwen3"))
def test_sharing_on_a_gpu(name, attn, dtype, models):
    if (name, attn) == ("gemma2", "sdpa"):
        pytest.skip("refused")
    policy = load(models(name), dtype, device=torch.device("cuda"), attn=attn)
    rows, sums, grads = random_rows(), [], []
    for config in (None, policy.config):
        policy.zero_grad()
        batch = common.collate(rows, [0, 1, 2, 3], policy.lm.device, config)
        sums.append(common.response_logps(policy, batch))
        (WEIGHTS.to(sums[-1]) * sums[-1]).sum().backward()
        grads.append(gradients(policy))
    # Relative to sums of up to 30 log-probs of about 6 nats, and to the gradients' norms.
    close = {"float32": 1e-4, "bfloat16": 3e-2}[dtype]
    assert ((sums[0] - sums[1]).abs() <= close * (1 + sums[0].abs())).all()
    for name, gradient in grads[0].items():
        assert (grads[1][name] - gradient).norm() <= 5 * close * (gradient.norm() + 1e-3), name
