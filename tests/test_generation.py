"""Sampling: a batch gives what each prompt gives alone, greedy is Transformers' greedy, and samples
follow the softmax.
"""

import signal

import numpy as np
import pytest
import torch
import transformers
from conftest import ARCHITECTURES

import common
from generation import generate, text_of

VOCABULARY = 300  # ids that the tests' models and tokenizers both have
NEVER = frozenset([10_000])  # a stop id beyond the vocabulary of 320
DTYPES = ("float32", "float64")


# -- helpers


@pytest.fixture(scope="module")
def run():
    """One process; pytest gets its signal handlers back."""
    run = common.Processes()
    yield run
    for number, handler in run.handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def policy_of(checkpoints, run):
    return lambda architecture, dtype: common.load_policy(
        str(checkpoints(architecture)), dtype, run
    )


def random_prompts(lengths=(3, 20, 1, 11, 20, 7, 40), seed: int = 0) -> list[np.ndarray]:
    """Prompts of very different lengths; windows are 8."""
    rng = np.random.default_rng(seed)
    return [rng.integers(3, VOCABULARY, n).astype(np.int32) for n in lengths]


def lists(answers: list[np.ndarray]) -> list[list[int]]:
    return [answer.tolist() for answer in answers]


def next_token_probabilities(policy, ids: np.ndarray, temperature: float) -> np.ndarray:
    with torch.no_grad():
        logits = policy(input_ids=torch.tensor([ids.tolist()]), use_cache=False).logits[0, -1]
    return (logits.double() / temperature).softmax(-1).numpy()


def chi_square(counts: np.ndarray, expected: np.ndarray) -> tuple[float, float]:
    """Pearson's statistic and what it may be at most; what is expected fewer than 5 times is one
    class.

    The statistic has the mean `classes - 1` and twice that as variance; 5 standard deviations.
    """
    rare = expected < 5
    counts = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    free = len(counts) - 1
    return ((counts - expected) ** 2 / expected).sum(), free + 5 * (2 * free) ** 0.5


# -- greedy


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_batch_gives_what_each_prompt_gives_alone(architecture, dtype, policy_of, run):
    """Padding on the left, positions and the cache are right, also beyond a sliding window."""
    policy, prompts = policy_of(architecture, dtype), random_prompts()
    together = generate(policy, prompts, NEVER, 24, 0.0, 0, run)
    alone = [generate(policy, [prompt], NEVER, 24, 0.0, 0, run)[0] for prompt in prompts]
    assert lists(together) == lists(alone)
    assert {len(answer) for answer in together} == {24}
    # Not a constant, which would be equal whatever was wrong.
    assert len({tuple(answer) for answer in lists(together)}) > len(prompts) / 2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_token_at_a_time_is_the_whole_text_at_once(architecture, dtype, policy_of, run):
    """No cache, no padding: the likeliest token after everything before it."""
    policy, prompts = policy_of(architecture, dtype), random_prompts((2, 30))
    for prompt, answer in zip(
        prompts, generate(policy, prompts, NEVER, 20, 0.0, 0, run), strict=True
    ):
        text = np.concatenate([prompt, answer])
        with torch.no_grad():
            logits = policy(input_ids=torch.tensor([text.tolist()]), use_cache=False).logits[0]
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == answer.tolist()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_is_that_of_transformers(architecture, checkpoints, policy_of, run):
    """The saved model in the hands of plain Transformers says the same."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        checkpoints(architecture), dtype=torch.float32, attn_implementation="eager"
    )
    prompts = random_prompts()
    ours = generate(policy_of(architecture, "float32"), prompts, NEVER, 24, 0.0, 0, run)
    for prompt, answer in zip(prompts, ours, strict=True):
        ids = torch.tensor([prompt.tolist()])
        theirs = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=24,
            eos_token_id=sorted(NEVER), pad_token_id=0,
        )  # fmt: skip
        assert theirs[0, len(prompt) :].tolist() == answer.tolist()


def test_bfloat16_is_no_other_sequence(policy_of, run):
    """Under autocast too a batch gives tokens of the vocabulary, as many as asked for."""
    answers = generate(policy_of("llama", "bfloat16"), random_prompts(), NEVER, 6, 0.0, 0, run)
    assert {len(answer) for answer in answers} == {6}
    assert all(0 <= token < 320 for answer in answers for token in answer)


# -- where a response ends


def test_stops_at_any_of_several_ids(policy_of, run):
    """Each row at its own first stop, which stays at its end; the others go on."""
    policy, prompts = policy_of("llama", "float64"), random_prompts()
    whole = lists(generate(policy, prompts, NEVER, 24, 0.0, 0, run))
    stops = frozenset([whole[0][5], whole[1][2], whole[3][0]])
    cut = lists(generate(policy, prompts, stops, 24, 0.0, 0, run))
    lengths = set()
    for long, short in zip(whole, cut, strict=True):
        ends = [i for i, token in enumerate(long) if token in stops]
        assert short == (long[: ends[0] + 1] if ends else long)
        lengths.add(len(short))
    assert len(lengths) >= 3  # so rows did end at different places
    # A row alone ends there too: what it gets is not moved by those that ended before it.
    alone = [lists(generate(policy, [p], stops, 24, 0.0, 0, run))[0] for p in prompts]
    assert alone == cut


def test_max_new_tokens(policy_of, run):
    policy, prompts = policy_of("gpt2", "float32"), random_prompts((4, 9))
    long = lists(generate(policy, prompts, NEVER, 9, 0.0, 0, run))
    for n in (1, 4):
        assert lists(generate(policy, prompts, NEVER, n, 0.0, 0, run)) == [x[:n] for x in long]


def test_text_of_leaves_out_the_end(checkpoints):
    tokenizer = common.load_tokenizer(str(checkpoints("qwen2")), 64)
    ids = tokenizer(" the cat", add_special_tokens=False).input_ids
    for end in ([], [tokenizer.eos_token_id]):
        assert text_of(np.array(ids + end, np.int32), tokenizer) == " the cat"


# -- samples


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_sample_does_not_depend_on_its_batch(architecture, policy_of, run):
    """Nor on the batch size, nor on what the other prompts are."""
    policy, prompts = policy_of(architecture, "float64"), random_prompts()
    sample = lambda prompts, size: lists(generate(policy, prompts, NEVER, 12, 1.0, 5, run, size))  # noqa: E731
    expected = sample(prompts, 256)
    for size in (1, 2, 3):
        assert sample(prompts, size) == expected
    others = random_prompts((30, 2, 9, 1, 1, 25, 3), seed=1)
    for i in (0, 3, 6):
        assert sample([*others[:i], prompts[i], *others[i + 1 :]], 256)[i] == expected[i]


def test_seeds(policy_of, run):
    """The same seed gives the same samples, another one others; rows of one prompt differ."""
    policy = policy_of("llama", "float32")
    prompts = random_prompts((6,)) * 8
    torch.manual_seed(0)
    first = lists(generate(policy, prompts, NEVER, 12, 1.0, 1, run))
    torch.manual_seed(1)  # not where they come from
    again = lists(generate(policy, prompts, NEVER, 12, 1.0, 1, run))
    other = lists(generate(policy, prompts, NEVER, 12, 1.0, 2, run))
    assert first == again
    assert len({tuple(answer) for answer in first + other}) == 16


@pytest.mark.parametrize("temperature", (1.0, 0.25))
def test_samples_follow_the_softmax(temperature, policy_of, run):
    """The first token, and the second given the likeliest first, by chi-square."""
    n = 6000
    policy, (prompt,) = policy_of("llama", "float32"), random_prompts((5,))
    samples = np.stack(generate(policy, [prompt] * n, NEVER, 2, temperature, 3, run, 3000))
    first = next_token_probabilities(policy, prompt, temperature)
    counts = np.bincount(samples[:, 0], minlength=320)
    found, most = chi_square(counts, n * first)
    assert found < most
    # It would be seen if the temperature were left out.
    found, most = chi_square(counts, n * next_token_probabilities(policy, prompt, 0.6))
    assert found > most
    likeliest = counts.argmax()
    given = samples[samples[:, 0] == likeliest, 1]
    second = next_token_probabilities(policy, np.append(prompt, likeliest), temperature)
    # Every token is expected rarely, so a class is a tenth of them, sorted by probability.
    tenth = np.minimum(np.argsort(np.argsort(second)) * 10 // len(second), 9)
    expected = np.bincount(tenth, second, 10) * len(given)
    found, most = chi_square(np.bincount(tenth[given], minlength=10), expected)
    assert len(given) > 5 and found < most


def test_the_uniform_is_inverted_without_a_gap(policy_of, run, monkeypatch):
    """The smallest and the largest number that a generator can give are tokens like any other."""

    class Uniform:
        def __init__(self, value):
            self.value = value

        def random(self, n):
            return np.full(n, self.value)

    policy, (prompt,) = policy_of("llama", "float32"), random_prompts((5,))
    for value, token in ((0.0, 0), (1 - 2.0**-53, 319)):
        monkeypatch.setattr(np.random, "default_rng", lambda seed, value=value: Uniform(value))
        assert lists(generate(policy, [prompt], NEVER, 1, 1.0, 0, run)) == [[token]]


@pytest.mark.parametrize("architecture", ("llama", "gemma2"))
def test_flex_attention_is_put_aside_while_sampling_and_put_back(architecture, policy_of, run):
    policy, prompts = policy_of(architecture, "float32"), random_prompts()
    usual = policy.config._attn_implementation
    expected = generate(policy, prompts, NEVER, 3, 0.0, 0, run)
    policy.set_attn_implementation("flex_attention")
    seen, forward = [], policy.forward

    def look(**more):
        seen.append(policy.config._attn_implementation)
        return forward(**more)

    policy.forward = look
    assert lists(generate(policy, prompts, NEVER, 3, 0.0, 0, run)) == lists(expected)
    assert set(seen) == {usual}
    assert policy.config._attn_implementation == "flex_attention"
