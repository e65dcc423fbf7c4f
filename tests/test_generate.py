"""Sampling: a batch gives what each prompt gives alone, greedy is Transformers' greedy, and samples
follow the softmax.
"""

from contextlib import contextmanager

import numpy as np
import pytest
import torch
import transformers
from conftest import ARCHITECTURES

import common
from family import task
from sampling.generate import _draw, bytes_of, fitting, generate, text_of, top_p_tokens

VOCABULARY = 300  # ids that the models and the tokenizers of these tests both have
NEVER = frozenset([10_000])  # a stop id outside the vocabulary of 320


@pytest.fixture(scope="module")
def run():
    run = common.Processes()
    yield run
    run.stop_request.uninstall()  # pytest gets its signal handlers back


@pytest.fixture
def policy_of(checkpoints, run):
    def load(architecture: str, dtype: str = "float32") -> common.Policy:
        args = common.Args(model=str(checkpoints(architecture)), dtype=dtype)
        return common.load_policy(args, run)

    return load


def random_prompts(lengths=(3, 20, 1, 11, 20, 7, 40), seed: int = 0) -> list[np.ndarray]:
    """Prompts of very different lengths; sliding windows are 8."""
    rng = np.random.default_rng(seed)
    return [rng.integers(3, VOCABULARY, n).astype(np.int32) for n in lengths]


def lists(answers: list[np.ndarray]) -> list[list[int]]:
    return [answer.tolist() for answer in answers]


# -- greedy


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_is_that_of_transformers(architecture, checkpoints, policy_of, run):
    """Left padding, positions and the cache are right, also beyond a sliding window."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        checkpoints(architecture), dtype=torch.float32, attn_implementation="eager"
    )
    prompts = random_prompts()
    ours = generate(policy_of(architecture), prompts, NEVER, 24, 0.0, 0, run)
    assert len({tuple(answer) for answer in lists(ours)}) > len(prompts) / 2  # not a constant
    for prompt, answer in zip(prompts, ours, strict=True):
        ids = torch.tensor([prompt.tolist()])
        theirs = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=24,
            eos_token_id=sorted(NEVER), pad_token_id=0,
        )  # fmt: skip
        assert theirs[0, len(prompt) :].tolist() == answer.tolist()


def test_stops_at_any_of_several_ids(policy_of, run):
    """Each row ends with its own first stop token; the others go on, and none is affected."""
    policy, prompts = policy_of("llama", "float64"), random_prompts()
    uncut = lists(generate(policy, prompts, NEVER, 24, 0.0, 0, run))
    stops = frozenset([uncut[0][5], uncut[1][2], uncut[3][0]])
    cut = lists(generate(policy, prompts, stops, 24, 0.0, 0, run))
    for long, short in zip(uncut, cut, strict=True):
        ends = [i for i, token in enumerate(long) if token in stops]
        assert short == (long[: ends[0] + 1] if ends else long)
    assert len({len(answer) for answer in cut}) >= 3
    assert [lists(generate(policy, [p], stops, 24, 0.0, 0, run))[0] for p in prompts] == cut
    assert lists(generate(policy, prompts, NEVER, 4, 0.0, 0, run)) == [x[:4] for x in uncut]


def test_what_cannot_be_asked(policy_of, run):
    policy = policy_of("llama")
    with pytest.raises(ValueError, match="ask for one"):
        generate(policy, random_prompts(), NEVER, 4, 0.0, 0, run, samples=2)
    assert generate(policy, [], NEVER, 4, 1.0, 0, run, samples=3) == []


# -- samples


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_sample_depends_on_its_prompt_seed_and_number_only(architecture, policy_of, run):
    """Not on the batch size, the number of samples, or the other prompts; windows included."""
    policy, prompts = policy_of(architecture, "float64"), random_prompts()
    stops = frozenset(range(0, 320, 12))

    def sample(samples: int, size: int = 256, prompts=prompts) -> list[list[list[int]]]:
        made = lists(generate(policy, prompts, stops, 12, 1.0, 5, run, size, samples=samples))
        assert len(made) == samples * len(prompts)
        return [made[i * samples : (i + 1) * samples] for i in range(len(prompts))]

    expected = sample(5)
    assert [len({tuple(answer) for answer in of}) for of in expected] == [5] * len(prompts)
    assert len({len(answer) for of in expected for answer in of}) > 5  # they end here and there
    for samples, size in ((5, 1), (5, 12), (3, 256), (2, 7), (1, 256), (1, 2)):
        assert sample(samples, size) == [of[:samples] for of in expected]
    others = random_prompts((30, 2, 9, 1, 1, 25, 3), seed=1)
    for i in (0, 3, 6):
        mixed = [*others[:i], prompts[i], *others[i + 1 :]]
        assert sample(5, prompts=mixed)[i] == expected[i]


@pytest.mark.parametrize("temperature", (1.0, 0.25))
def test_samples_follow_the_softmax(temperature, policy_of, run):
    """By chi-square: Pearson's statistic is at most its mean plus five standard deviations. Tokens
    that are expected fewer than 5 times form one class.
    """
    n = 6000
    policy, (prompt,) = policy_of("llama"), random_prompts((5,))
    tokens = np.concatenate(generate(policy, [prompt] * n, NEVER, 1, temperature, 3, run, 3000))
    with torch.no_grad():
        logits = policy.lm(input_ids=torch.tensor([prompt.tolist()])).logits[0, -1].double()

    def distance(at: float) -> float:
        expected, counts = n * (logits / at).softmax(-1).numpy(), np.bincount(tokens, minlength=320)
        rare = expected < 5
        expected = np.append(expected[~rare], expected[rare].sum())
        counts = np.append(counts[~rare], counts[rare].sum())
        free = len(counts) - 1
        return (((counts - expected) ** 2 / expected).sum() - free) / (2 * free) ** 0.5

    assert distance(temperature) < 5 < distance(0.6)


# Of the embedded model, float32, temperature 1, seed 1: each answer up to its end.
PUBLISHED = """Jonas|Erik|Clara, Gina|Cid, Gina|Gus|Ida|Joel, Lou|Jonas|Mila|Rosa, Bea, Asa|
Luis, Dora, Omar|Lena, Erik|Sven, Dara, Jack|Luis|Tilda|Viktor|Judith, Amir, Felix|Olga, Una|
Erik, Nora|Ines, Theo, Pia|Lou|Yuri, Una|Erik|Omar""".replace("\n", "").split("|")


def test_samples_are_those_that_they_were(run):
    """Published results came from these samples."""
    tokenizer = common.load_tokenizer("tiny")
    policy = common.load_policy(common.Args(dtype="float32"), run)
    prompts = [np.array(tokenizer(x).input_ids, np.int32) for x in task.test_prompts(24)]
    answers = generate(policy, prompts, tokenizer.stop_ids, 16, 1.0, 1, run)
    assert [text_of(answer, tokenizer).strip() for answer in answers] == PUBLISHED


# -- what is computed


@contextmanager
def passes_of(policy):
    """A list of (rows, columns, real tokens, whether it is the first) of each forward pass."""
    seen = []

    def look(module, args, inputs):
        first, ids = not inputs["past_key_values"].get_seq_length(), inputs["input_ids"]
        real = int(inputs["attention_mask"].sum()) if first else ids.numel()
        seen.append((*ids.shape, real, first))

    handle = policy.lm.register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


@pytest.mark.parametrize("samples, size, parts", [(1, 256, 1), (16, 256, 1), (4, 8, 4), (9, 4, 7)])
def test_a_prompt_is_computed_once_and_an_ended_row_not_at_all(
    samples, size, parts, policy_of, run
):
    policy, prompts = policy_of("mistral"), random_prompts()
    stops = frozenset(range(0, 320, 8))
    with passes_of(policy) as passes:
        answers = generate(policy, prompts, stops, 20, 1.0, 2, run, size, samples=samples)
    assert len({len(answer) for answer in answers}) > 3
    prefills = [p for p in passes if p[3]]
    assert len(prefills) == parts
    assert sum(real for _, _, real, _ in prefills) == sum(map(len, prompts))
    later = [p for p in passes if not p[3]]
    assert {columns for _, columns, _, _ in later} == {1}
    assert max(rows for rows, *_ in later) <= max(size, samples)
    # Each pass computes a token of every row that has not ended.
    assert sum(rows for rows, *_ in later) == sum(map(len, answers)) - len(answers)


@pytest.mark.parametrize("architecture", ("llama", "gemma2", "gpt2"))
@pytest.mark.parametrize("dtype", ("bfloat16", "float64"))
def test_the_cache_has_the_compute_dtype(architecture, dtype, policy_of, run):
    policy, caches = policy_of(architecture, dtype), []
    policy.lm.register_forward_pre_hook(
        lambda lm, args, inputs: caches.append(inputs["past_key_values"]), with_kwargs=True
    )
    generate(policy, random_prompts(), NEVER, 3, 1.0, 0, run)
    for layer in caches[0].layers:
        assert {layer.keys.dtype, layer.values.dtype} == {getattr(torch, dtype)}


def test_long_sequences_are_sampled_in_small_batches(policy_of):
    policy = policy_of("llama")
    assert bytes_of(policy, 2000) - bytes_of(policy, 1000) == 1000 * 2 * 2 * 2 * 8 * 4
    assert fitting(policy, 10**15) == 1


@pytest.mark.parametrize("architecture", ("llama", "gemma2"))
def test_flex_attention_is_not_used_for_sampling(architecture, policy_of, run):
    policy, prompts = policy_of(architecture), random_prompts()
    usual = policy.lm.config._attn_implementation
    expected = lists(generate(policy, prompts, NEVER, 3, 0.0, 0, run))
    policy.lm.set_attn_implementation("flex_attention")
    seen = []
    policy.lm.register_forward_pre_hook(
        lambda lm, _: seen.append(lm.config._attn_implementation) or None
    )
    assert lists(generate(policy, prompts, NEVER, 3, 0.0, 0, run)) == expected
    assert set(seen) == {usual}
    assert policy.lm.config._attn_implementation == "flex_attention"


# -- top-k and the uniform number


def test_top_k_of_one_is_greedy_and_of_all_is_no_limit(policy_of, run):
    policy, prompts = policy_of("qwen2", "float64"), random_prompts()
    greedy = lists(generate(policy, prompts, NEVER, 8, 0.0, 0, run))
    assert lists(generate(policy, prompts, NEVER, 8, 1.0, 5, run, top_k=1)) == greedy
    usual = lists(generate(policy, prompts, NEVER, 8, 1.0, 5, run))
    for k in (0, 320, 1000):
        assert lists(generate(policy, prompts, NEVER, 8, 1.0, 5, run, top_k=k)) == usual


EVERY_UNIFORM = torch.tensor([i / 512 for i in range(512)] + [1 - 2.0**-53], dtype=torch.float64)


@pytest.mark.parametrize(
    "k, allowed", [(1, [1]), (2, [1, 2, 4, 6]), (5, [1, 2, 4, 6, 7]), (0, [0, 1, 2, 3, 4, 6, 7])]
)
def test_tokens_that_tie_with_the_kth_are_drawn_too(k, allowed):
    """The smallest and the largest number that a generator can give select tokens like any other,
    and never one that top-k leaves out.
    """
    logits = torch.tensor([[1.0, 3.0, 2.0, 0.0, 2.0, -9.0, 2.0, 1.5]])
    drawn = _draw(logits.repeat(len(EVERY_UNIFORM), 1), 1.0, k, EVERY_UNIFORM[:, None])
    assert drawn.unique().tolist() == allowed
    assert drawn[0] == allowed[0] and drawn[-1] == allowed[-1]


@pytest.mark.parametrize("k", (0, 5))
def test_a_token_is_found_by_inverting_the_cumulative_distribution(k):
    """Of the row's own logits, at its own uniform, among its own k most likely tokens."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50, 40, generator=generator)
    uniforms = torch.rand(50, 1, dtype=torch.float64, generator=generator)
    together = _draw(logits.clone(), 0.7, k, uniforms)
    for row, uniform, token in zip(logits.double(), uniforms, together, strict=True):
        weights = (row / 0.7).exp()
        kept = sorted(row.argsort(descending=True)[: k or 40].tolist())
        cumulative = (weights[kept] / weights[kept].sum()).cumsum(0)
        assert token == kept[int((cumulative <= uniform).sum())]


# -- a mask: the top-p tokens of another policy


@pytest.mark.parametrize(
    "top_p, allowed",
    [(0.1, [1]), (0.4, [1]), (0.41, [1, 2]), (0.69, [1, 2]), (0.71, [1, 2, 0, 4]), (1.0, range(6))],
)
@pytest.mark.parametrize("temperature", (1.0, 0.5))
def test_top_p_is_the_smallest_set(top_p, allowed, temperature):
    """The likeliest tokens until they have this probability together; ties stay together."""
    shares = torch.tensor([[0.1, 0.4, 0.3, 0.05, 0.1, 0.05]], dtype=torch.float64)
    for dtype in (torch.float32, torch.float64):
        found = top_p_tokens((temperature * shares.log() + 3).to(dtype), top_p - 1e-7, temperature)
        assert found.nonzero()[:, 1].tolist() == sorted(allowed)


@pytest.mark.parametrize("architecture", ("mistral", "gpt2"))
def test_a_mask_limits_what_is_drawn(architecture, policy_of, run):
    """Every token is in the top p of the masking policy after the same tokens, by Transformers; it
    is the one at its uniform number among these. Ended rows leave both caches.
    """
    policy, masking = (policy_of(architecture, "float64") for _ in range(2))
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in masking.lm.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=draw, dtype=p.dtype))
    prompts, stops, samples, outside = random_prompts(), frozenset(range(0, 320, 9)), 3, 0
    how = {"samples": samples, "masking": masking, "top_p": 0.7}
    answers = generate(policy, prompts, stops, 9, 0.8, 5, run, 12, **how)
    assert len({len(answer) for answer in answers}) > 3
    for i, answer in enumerate(answers):
        prompt = prompts[i // samples]
        numbers = np.random.default_rng([5, i // samples, i % samples]).random(9)
        ids = torch.tensor([[*prompt.tolist(), *answer.tolist()]])
        with torch.no_grad():
            both = [m.lm(input_ids=ids).logits[0, len(prompt) - 1 : -1] for m in (policy, masking)]
        for token, uniform, logits, of_mask in zip(answer, numbers, *both, strict=False):
            allowed = top_p_tokens(of_mask[None], 0.7, 0.8)[0].nonzero()[:, 0]
            cumulative = (logits[allowed] / 0.8).softmax(-1).cumsum(0)
            assert token == allowed[int((cumulative <= uniform).sum())]
            outside += int((logits / 0.8).softmax(-1).cumsum(0).gt(uniform).nonzero()[0]) != token
    assert outside  # without the mask there would be other tokens


def test_a_mask_that_allows_all_changes_nothing(policy_of, run):
    policy, prompts = policy_of("qwen2", "float64"), random_prompts()
    usual = lists(generate(policy, prompts, NEVER, 8, 1.0, 5, run, samples=2))
    how = {"samples": 2, "masking": policy, "top_p": 1 - 1e-13}
    assert lists(generate(policy, prompts, NEVER, 8, 1.0, 5, run, **how)) == usual
    greedy = lists(generate(policy, prompts, NEVER, 8, 0.0, 5, run))
    how["top_p"] = 1e-9  # the likeliest token alone
    assert lists(generate(policy, prompts, NEVER, 8, 1.0, 5, run, **how))[::2] == greedy
