"""Sampling: a batch gives what each prompt gives alone, greedy is Transformers' greedy, and samples
follow the softmax.
"""

import math
import signal
from contextlib import contextmanager, nullcontext

import numpy as np
import pytest
import torch
import transformers
from conftest import ARCHITECTURES

import common
import family
import generation
from generation import _draw, generate, text_of

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
    if rare.any():
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


# Of the embedded model, float32, temperature 1, seed 1: each answer up to its end.
USUAL = [
    " Jonas",
    " Erik",
    " Clara, Gina",
    " Cid, Gina",
    " Gus",
    " Ida",
    " Joel, Lou",
    " Jonas",
    " Mila",
    " Rosa, Bea, Asa",
    " Luis, Dora, Omar",
    " Lena, Erik",
    " Sven, Dara, Jack",
    " Luis",
    " Tilda",
    " Viktor",
    " Judith, Amir, Felix",
    " Olga, Una",
    " Erik, Nora",
    " Ines, Theo, Pia",
    " Lou",
    " Yuri, Una",
    " Erik",
    " Omar",
]


def test_samples_are_those_that_they_were(run):
    """Results that were published came from these: a prompt's one sample is that of its own stream
    of uniforms, whatever else generate has learned since.
    """
    tokenizer = common.load_tokenizer("tiny", 1)
    policy = common.load_policy("tiny", "float32", run)
    prompts = [np.array(tokenizer(x).input_ids, np.int32) for x in family.test_prompts(24)]
    answers = generate(policy, prompts, tokenizer.stop_ids, 16, 1.0, 1, run)
    assert [text_of(answer, tokenizer) for answer in answers] == USUAL


# -- several samples a prompt


@contextmanager
def passes_of(policy):
    """A list that grows by (rows, columns, real tokens, whether it is the first) with each forward
    pass.
    """
    seen = []

    def look(module, args, inputs):
        first, ids = inputs["past_key_values"] is None, inputs["input_ids"]
        real = int(inputs["attention_mask"].sum()) if first else ids.numel()
        seen.append((*ids.shape, real, first))

    handle = policy.register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sample_k_depends_neither_on_the_number_of_samples_nor_on_the_batch(
    architecture, policy_of, run
):
    """Copies of a cache are what a prompt of its own would have left there, windows included."""
    policy, prompts = policy_of(architecture, "float64"), random_prompts()
    stops = frozenset(range(0, 320, 12))

    def sample(samples: int, size: int = 256) -> list[list[list[int]]]:
        made = lists(generate(policy, prompts, stops, 12, 1.0, 5, run, size, samples=samples))
        assert len(made) == samples * len(prompts)
        return [made[i * samples : (i + 1) * samples] for i in range(len(prompts))]

    expected = sample(5)
    assert [len({tuple(answer) for answer in of}) for of in expected] == [5] * len(prompts)
    assert len({len(answer) for of in expected for answer in of}) > 5  # they end here and there
    for samples, size in ((5, 1), (5, 12), (3, 256), (2, 7), (1, 256)):
        assert sample(samples, size) == [of[:samples] for of in expected]


def test_samples_share_the_prefill(policy_of, run):
    """A prompt's tokens go through the model once, however many samples it has."""
    policy, prompts = policy_of("llama", "float32"), random_prompts()
    for samples, size, parts in ((1, 256, 1), (16, 256, 1), (4, 8, 4), (9, 4, 7)):
        with passes_of(policy) as passes:
            generate(policy, prompts, NEVER, 3, 1.0, 0, run, size, samples=samples)
        prefills = [p for p in passes if p[3]]
        assert len(prefills) == parts
        assert sum(rows for rows, *_ in prefills) == len(prompts)
        assert sum(real for _, _, real, _ in prefills) == sum(map(len, prompts))
        later = [p for p in passes if not p[3]]
        assert sum(rows for rows, *_ in later) == 2 * samples * len(prompts)
        # A batch has as many sequences as were asked for, and at least all of one prompt.
        assert max(rows for rows, *_ in later) <= max(size, samples)
        assert {columns for _, columns, _, _ in later} == {1}


@pytest.mark.parametrize("samples", (1, 6))
def test_rows_that_have_ended_are_not_computed(samples, policy_of, run):
    policy, prompts = policy_of("mistral", "float32"), random_prompts()
    stops = frozenset(range(0, 320, 8))
    with passes_of(policy) as passes:
        answers = generate(policy, prompts, stops, 20, 1.0, 2, run, samples=samples)
    assert len({len(answer) for answer in answers}) > 3
    going_on = [  # those that have drawn t tokens, no end among them
        sum(len(a) > t or (len(a) == t and int(a[-1]) not in stops) for a in answers)
        for t in range(1, 20)
    ]
    assert [rows for rows, _, _, first in passes if not first] == [n for n in going_on if n]


def test_streams_of_samples(policy_of, run):
    """Each (seed, prompt, sample) has its own; prompts may be numbered from elsewhere."""
    policy, (prompt,) = policy_of("llama", "float64"), random_prompts((6,))
    sample = lambda n, seed, **more: lists(  # noqa: E731
        generate(policy, [prompt] * n, NEVER, 12, 1.0, seed, run, **more)
    )
    drawn = sample(4, 1, samples=4) + sample(4, 2, samples=4)
    assert len({tuple(answer) for answer in drawn}) == 32
    assert sample(2, 1, samples=4, first=2) == drawn[8:16]
    assert sample(1, 1, first=3) == drawn[12:13]


def test_greedy_has_one_sample(policy_of, run):
    with pytest.raises(ValueError, match="ask for one"):
        generate(policy_of("llama", "float32"), random_prompts(), NEVER, 4, 0.0, 0, run, samples=2)


def test_no_prompts_no_answers(policy_of, run):
    assert generate(policy_of("llama", "float32"), [], NEVER, 4, 1.0, 0, run, samples=3) == []


# -- top-k


def test_top_k_is_the_softmax_of_the_k_likeliest(policy_of, run):
    """Their probabilities in proportion; nothing else is ever drawn."""
    n, k, temperature = 4000, 7, 0.25
    policy, (prompt,) = policy_of("llama", "float32"), random_prompts((5,))
    samples = generate(policy, [prompt], NEVER, 1, temperature, 3, run, samples=n, top_k=k)
    probabilities = next_token_probabilities(policy, prompt, temperature)
    likeliest = np.argsort(-probabilities)[:k]
    counts = np.bincount(np.concatenate(samples), minlength=320)
    assert set(counts.nonzero()[0].tolist()) == set(likeliest.tolist())
    counts, allowed = counts[likeliest], probabilities[likeliest]
    found, most = chi_square(counts, n * allowed / allowed.sum())
    assert found < most
    # It would be seen if the temperature were left out.
    allowed = allowed**temperature
    found, most = chi_square(counts, n * allowed / allowed.sum())
    assert found > most


def test_top_k_of_one_is_greedy_and_of_all_is_no_limit(policy_of, run):
    policy, prompts = policy_of("qwen2", "float64"), random_prompts()
    greedy = lists(generate(policy, prompts, NEVER, 8, 0.0, 0, run))
    assert lists(generate(policy, prompts, NEVER, 8, 1.0, 5, run, top_k=1)) == greedy
    usual = lists(generate(policy, prompts, NEVER, 8, 1.0, 5, run))
    for k in (0, 320, 1000):
        assert lists(generate(policy, prompts, NEVER, 8, 1.0, 5, run, top_k=k)) == usual


@pytest.mark.parametrize("k, allowed", ((1, [1]), (2, [1, 2]), (3, [1, 2, 4]), (4, [1, 2, 4, 6])))
def test_ties_at_the_border_of_top_k(k, allowed):
    """Exactly k, the lower id first, and the last of them even for the largest uniform."""
    logits = torch.tensor([[1.0, 3.0, 2.0, 0.0, 2.0, -5.0, 2.0, 1.5]])
    uniforms = torch.cat([torch.arange(0, 1, 1 / 512), torch.tensor([1 - 2.0**-53])])
    uniforms = uniforms.double()[:, None]
    drawn = _draw(logits.expand(len(uniforms), -1), 1.0, k, uniforms)
    assert drawn.unique().tolist() == allowed
    assert drawn[0] == allowed[0] and drawn[-1] == allowed[-1]


def test_top_k_on_rows_of_their_own(policy_of, run):
    """Each row has its own k likeliest tokens: nothing is shared over the batch."""
    torch.manual_seed(0)
    logits, uniforms = torch.randn(50, 40), torch.rand(50, 1, dtype=torch.float64)
    together = _draw(logits, 0.7, 5, uniforms)
    for i in range(50):
        values = [math.exp(x / 0.7) for x in logits[i].double().tolist()]
        kept = sorted(sorted(range(40), key=lambda j: -values[j])[:5])  # noqa: B023
        at, total = 0.0, sum(values[j] for j in kept)
        for token in kept:
            at += values[token] / total
            if at > float(uniforms[i]):
                break
        assert int(together[i]) == token


# -- what is shown


def test_speed_is_shown(policy_of, run, monkeypatch):
    """On the bar of run.share: tokens drawn so far, of all processes."""
    shown = []

    class Bar:
        def set_postfix_str(self, text, refresh):
            shown.append(text)

    class Shown:
        world, rank = 1, 0
        inner_bar = Bar()
        share = staticmethod(lambda parts, label: ((part, True) for part in parts))

    clock = iter([10.0, 12.0, 14.0])
    monkeypatch.setattr(generation.time, "perf_counter", lambda: next(clock))
    policy, prompts = policy_of("llama", "float32"), random_prompts((3, 4, 5, 6))
    generate(policy, prompts, NEVER, 100, 1.0, 0, Shown(), 10, samples=5)
    assert shown == ["500 tok/s", "500 tok/s"]  # 1,000 tokens in 2 s, then 2,000 in 4 s


def test_what_a_spread_model_costs_is_said_once(policy_of, run, monkeypatch, capsys):
    policy, prompts = policy_of("llama", "bfloat16"), random_prompts((3, 4))
    generate(policy, prompts, NEVER, 2, 1.0, 0, run)
    assert "more there" not in capsys.readouterr().out  # it is not spread
    monkeypatch.setattr(common, "weights_together", lambda policy: nullcontext())
    first = next(policy.parameters())
    first.full_tensor = lambda: first  # what tells a spread weight
    monkeypatch.setattr(policy, "compute_dtype", torch.bfloat16)
    numbers = sum(p.numel() for p in policy.parameters())
    monkeypatch.setattr(generation, "GIB", numbers * 2 / 1.5)  # so that it is seen in two digits
    for _ in range(2):
        generate(policy, prompts, NEVER, 2, 1.0, 0, run)
    out = capsys.readouterr().out
    assert out.count("more there") == 1
    assert "sampling   all weights together on each process: 1.50 GiB more there\n" in out


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
