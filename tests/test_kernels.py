"""kernels/token_logps.py against float64: values and gradients, in plain torch and in Triton.

The rule for errors: no larger than that of the plain way in the same dtype, against float64 from
the same inputs. "Larger" means more than twice the plain way's worst, since how rounding happens to
fall differs, plus one rounding of the largest value. The tests whose names have `agrees` run a
second time under Triton's interpreter, in a process of its own: the switch must be on before Triton
is imported.
"""

import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from torch import Tensor

import kernels.token_logps as kernels
from kernels.token_logps import reference, token_logps

OPTIONS = {
    "plain": {},
    "bias": dict(bias=True),
    "softcap": dict(softcap=30.0, scale=1.3),
    "temperature": dict(temperature=0.7, scale=0.8, bias=True),
    "entropy": dict(entropy=True, temperature=1.4),
    "everything": dict(softcap=5.0, scale=0.6, temperature=1.3, bias=True, entropy=True),
}
# How much of the exponentials. "some" goes both ways, which is all that is run under the
# interpreter: a row of a block takes milliseconds there.
KEEP = {"some": 0.5} if kernels.INTERPRETED else {"none": 0.0, "some": 0.5, "all": 1.0}
DRAWS = 2 if kernels.INTERPRETED else 4


@pytest.fixture
def small(monkeypatch):
    """Slices, blocks and tiles so small that small inputs have several of each."""
    block = 128 if kernels.INTERPRETED else 64
    for name, value in {"SLICE": 4 * block, "BLOCK": block, "TILE": 2**13}.items():
        monkeypatch.setattr(kernels, name, value)


class Problem:
    """Inputs in a dtype, and the gradient that comes back for log-probs and entropies."""

    def __init__(
        self, shape, dtype, seed=0, bias=False, entropy=False, device="cpu", around=0.0, **how
    ):
        tokens, size, vocab = shape
        generator = torch.Generator().manual_seed(seed)
        draw = lambda *sizes: torch.randn(*sizes, generator=generator)  # noqa: E731
        hidden, weight = draw(tokens, size), draw(vocab, size) * 2.5 / size**0.5
        if around:  # the last state is a constant that moves all logits there
            hidden[:, -1], weight[:, -1] = 8.0, around / 8 + 0.02 * weight[:, -1]
        inputs = [hidden, weight] + ([draw(vocab)] if bias else [])
        self.inputs = [x.to(device, dtype) for x in inputs]
        self.targets = torch.randint(vocab, (tokens,), generator=generator)
        if tokens > 3:
            self.targets[1], self.targets[2] = -100, vocab - 1
        self.targets = self.targets.to(device)
        self.grads = [draw(tokens).to(device) for _ in range(1 + entropy)]
        self.entropy, self.how = entropy, how

    def plain(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        hidden, weight, *bias = inputs
        return reference(hidden, weight, self.targets, *bias, **self.how)[: 1 + self.entropy]

    def ours(self, *inputs: Tensor, keep: str | None = None) -> tuple[Tensor, ...]:
        hidden, weight, *bias = inputs
        how = self.how | {"entropy": self.entropy}
        if keep is not None:
            logits = kernels.padded(len(weight)) * len(hidden)
            itemsize = kernels.compute_dtype(hidden).itemsize
            how["keep_bytes"] = int(KEEP[keep] * logits * itemsize)
        found = token_logps(hidden, weight, self.targets, *bias, **how)
        return found if self.entropy else (found,)

    def solve(self, way, dtype=None, **more) -> list[Tensor]:
        """[log-probs, entropies if asked, gradients of hidden, weight, bias], in float64."""
        inputs = [x.detach().to(dtype or x.dtype).requires_grad_() for x in self.inputs]
        outputs = way(*inputs, **more)
        torch.autograd.backward(outputs, [g.to(outputs[0].dtype) for g in self.grads])
        for x in inputs:
            assert x.grad.dtype == x.dtype and x.grad.shape == x.shape
        return [x.detach().double() for x in (*outputs, *(x.grad for x in inputs))]


def assert_as_good(problems: list[Problem], **more) -> None:
    """Ours is no further from float64 than the plain way, the worst of several draws."""
    solved = []
    for p in problems:
        solved.append((p.solve(p.plain, torch.float64), p.solve(p.plain), p.solve(p.ours, **more)))
    dtype = problems[0].inputs[0].dtype
    for i in range(len(solved[0][0])):
        plain, ours = (
            max((solution[way][i] - solution[0][i]).abs().max().item() for solution in solved)
            for way in (1, 2)
        )
        # Log-probs and entropies are fp32 whatever the inputs are; gradients are as the inputs.
        last = torch.finfo(torch.float32 if i < len(problems[0].grads) else dtype).eps
        rounding = last / 2 * max(solution[0][i].abs().max().item() for solution in solved)
        assert ours <= 2 * plain + rounding, f"output {i}: {ours:.1e} against {plain:.1e}"


# -- in plain torch, and again under the interpreter


@pytest.mark.parametrize("keep", KEEP)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_agrees_with_float64(small, dtype, options, keep):
    problems = [Problem((7, 33, 301), dtype, seed, **OPTIONS[options]) for seed in range(DRAWS)]
    assert_as_good(problems, keep=keep)


@pytest.mark.parametrize(
    "shape", [(1, 3, 47), (5, 7, 64), (2, 16, 257), (255, 507, 123), (31, 129, 1001)], ids=str
)
def test_shape_agrees(small, shape):
    for dtype in (torch.bfloat16, torch.float32)[: 1 if shape[0] > 30 else 2]:
        draws = range(8 if shape[0] < 8 else 1)
        assert_as_good([Problem(shape, dtype, seed, bias=True) for seed in draws])


@pytest.mark.parametrize("around", [-110.0, -60.0])
def test_gradient_of_low_logits_agrees(small, around):
    for dtype in (torch.float32, torch.bfloat16):
        for keep in KEEP:
            problems = [Problem((4, 33, 301), dtype, seed, around=around) for seed in range(DRAWS)]
            assert_as_good(problems, keep=keep)


@pytest.mark.parametrize("around", [0.0, -60.0, -110.0])
def test_a_response_in_bf16_agrees_to_1e4_nats(small, around):
    problem = Problem((40, 64, 500), torch.bfloat16, around=around)
    truth, plain = (problem.plain(*(x.to(d) for x in problem.inputs))[0].double().sum() for d in
                    (torch.float64, torch.bfloat16))  # fmt: skip
    ours = problem.ours(*problem.inputs)[0].double().sum()
    print(f"\nlogits around {around:.0f}: off by {(ours - truth).abs():.1e} nats in 40 tokens,",
          f"plain bf16 by {(plain - truth).abs():.1e}")  # fmt: skip
    assert (ours - truth).abs() < 1e-4


@pytest.mark.parametrize("keep", KEEP)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_gradient_of_a_likely_target_agrees(small, dtype, keep):
    """Some p between 0.999 and 0.99999: what is left of the target's gradient is 1 - p."""
    for lift in (14.0, 16.0, 18.0):
        problem = Problem((1, 33, 301), dtype, bias=True)
        problem.inputs[1] *= 0.1
        problem.inputs[2].zero_()[problem.targets] = lift
        truth, ours = problem.solve(problem.plain, torch.float64), problem.solve(
            problem.ours, keep=keep
        )  # fmt: skip
        assert 0.999 < truth[0].exp() < 1
        true, found = (solved[-1][problem.targets] for solved in (truth, ours))
        # 1 - p to the last place of p: what fp32 can know of it; then a rounding to the dtype.
        fp32, last = torch.finfo(torch.float32).eps, torch.finfo(dtype).eps
        assert (found - true).abs() <= 2 * fp32 * problem.grads[0].abs() + last * true.abs()


@pytest.mark.parametrize("keep", KEEP)
def test_targets_all_equal_last_or_ignored_agree(small, keep):
    for target in (7, 300):
        problems = [Problem((6, 33, 301), torch.float32, seed) for seed in range(DRAWS)]
        for problem in problems:
            problem.targets.fill_(target)
        assert_as_good(problems, keep=keep)
    problem = Problem((6, 33, 301), torch.float32, entropy=True, bias=True)
    problem.targets.fill_(-100)
    assert all(x.eq(0).all() for x in problem.solve(problem.ours, keep=keep))


@pytest.mark.parametrize("keep", KEEP)
def test_forbidden_tokens_agree(small, keep):
    """A bias of -inf over whole blocks, and a block of which one token is left."""
    problems = [Problem((6, 33, 301), torch.float32, seed, bias=True) for seed in range(DRAWS)]
    for problem in problems:
        problem.inputs[2][:70] = problem.inputs[2][128:255] = -torch.inf
        problem.targets.fill_(300)
    assert_as_good(problems, keep=keep)
    problem = problems[0]
    problem.entropy, problem.grads = True, problem.grads * 2
    values = problem.ours(*problem.inputs)
    truth = problem.inputs[2].isfinite() & True
    logits = torch.nn.functional.linear(*problem.inputs).double()[:, truth]  # those that are left
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    assert (values[1] - entropy).abs().max() < 1e-5
    assert all(x.isfinite().all() for x in problem.solve(problem.ours, keep=keep))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_scoring_and_training_agree_to_the_bit(small, dtype):
    """The reference is asked without gradients: were its log-probs others than the policy's in
    their last bits, the first loss would not be ln 2.
    """
    problem = Problem((37, 48, 1001), dtype)
    with torch.no_grad():
        scored = problem.ours(*problem.inputs)[0].double()
    for keep in KEEP:
        assert torch.equal(scored, problem.solve(problem.ours, keep=keep)[0])


def test_no_tokens_agree(small):
    problem = Problem((0, 33, 301), torch.float32, entropy=True, bias=True)
    *outputs, hidden, weight, bias = problem.solve(problem.ours)
    assert [x.shape for x in outputs] == [(0,), (0,)] and hidden.shape == (0, 33)
    assert weight.shape == (301, 33) and weight.eq(0).all() and bias.eq(0).all()


@pytest.mark.parametrize("keep", KEEP)
def test_frozen_parts_agree(small, keep):
    """What needs no gradient gets none, and the rest is what it was."""
    problem = Problem((13, 33, 301), torch.float32, bias=True, softcap=4.0)
    full = problem.solve(problem.ours, keep=keep)[1:]
    for wanted in ((0,), (1,), (2,), (0, 2)):
        inputs = [x.clone().requires_grad_(i in wanted) for i, x in enumerate(problem.inputs)]
        problem.ours(*inputs, keep=keep)[0].backward(problem.grads[0])
        for i, x in enumerate(inputs):
            assert (x.grad is not None) == (i in wanted)
            assert x.grad is None or torch.equal(x.grad.double(), full[i])


@pytest.mark.parametrize("keep", KEEP)
def test_backward_twice_agrees(small, keep):
    problem = Problem((13, 33, 301), torch.float32, **OPTIONS["everything"])
    inputs = [x.clone().requires_grad_() for x in problem.inputs]
    outputs = problem.ours(*inputs, keep=keep)
    torch.autograd.backward(outputs, problem.grads, retain_graph=True)
    once = [x.grad.clone() for x in inputs]
    torch.autograd.backward(outputs, problem.grads)
    assert all(torch.equal(x.grad, 2 * first) for x, first in zip(inputs, once, strict=True))
    again = problem.solve(problem.ours, keep=keep)  # and the same bits in another run
    assert all(torch.equal(a, b.double()) for a, b in zip(again, [*outputs, *once], strict=True))


def test_strided_inputs_agree(small):
    problem = Problem((12, 32, 301), torch.float32, bias=True)
    expected = problem.solve(problem.ours)
    hidden, weight, bias = problem.inputs
    every_other = lambda x: torch.stack([x, 0 * x], 1)[:, 0]  # noqa: E731
    strided = [hidden.T.contiguous().T, weight.repeat(1, 2)[:, :32], every_other(bias)]
    problem.targets = every_other(problem.targets)
    assert not any(x.is_contiguous() for x in (*strided, problem.targets))
    leaves = [x.detach().requires_grad_() for x in strided]
    (logps,) = problem.ours(*leaves)
    logps.backward(*problem.grads)
    for found, true in zip([logps, *(x.grad for x in leaves)], expected, strict=True):
        torch.testing.assert_close(found.double(), true, rtol=1e-5, atol=1e-6)  # other products


def test_one_gradient_alone_agrees(small):
    """Entropies may be asked for and not used, and the other way round."""
    problem = Problem((5, 33, 301), torch.float64, entropy=True)
    inputs = [x.requires_grad_() for x in problem.inputs]
    for i in (0, 1):
        true, found = (
            torch.autograd.grad(way(*inputs)[i].sum(), inputs)
            for way in (problem.plain, problem.ours)
        )
        torch.testing.assert_close(found, true)


def test_next_to_another_package_called_kernels(tmp_path):
    """Hugging Face publishes one, which Transformers imports if it is installed."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("theirs = True\n")
    code = (
        "import kernels, common, training.model; assert kernels.theirs; "
        "from kernels import head; assert common.optional_module('kernels.head') is head"
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_under_the_interpreter():
    """The tests above that have `agree` in their name, with Triton's kernels on CPU tensors."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", __file__, "-q", "-k", "agree", "-W", "ignore"]
    command += ["-p", "no:cacheprovider"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


# -- in plain torch only


@pytest.mark.parametrize("keep", KEEP)
@pytest.mark.parametrize("options", OPTIONS)
def test_gradient_in_float64(small, options, keep):
    problem = Problem((5, 6, 301), torch.float64, **OPTIONS[options])
    problem.targets[3:] = -100
    inputs = [x.requires_grad_() for x in problem.inputs]
    assert torch.autograd.gradcheck(lambda *x: problem.ours(*x, keep=keep), inputs, fast_mode=True)
    for found, true in zip(problem.solve(problem.ours), problem.solve(problem.plain), strict=True):
        torch.testing.assert_close(found, true)  # 1e-7 of it: nothing goes through fp32


def test_as_an_operation_of_torch(small):
    problem = Problem((5, 6, 301), torch.float32, bias=True)
    hidden, weight, bias = (x.requires_grad_() for x in problem.inputs)
    # scale, softcap, temperature, entropy, keep_bytes: some bytes of what is kept nobody writes,
    # and this compares all.
    how = (1.0, 0.0, 1.0, True, 0)
    arguments = (hidden, weight, problem.targets, bias, *how)
    torch.library.opcheck(torch.ops.plainpref.token_logps.default, arguments)


def test_compiled_whole(small):
    problem = Problem((5, 33, 301), torch.float32, bias=True, entropy=True, softcap=4.0)

    def step(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
        logps, entropies = token_logps(2 * hidden, weight, targets, bias, 4.0, entropy=True)
        return (logps + 0.1 * entropies).sum()

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for tokens in (5, 4, 3):  # from the second length on, with a length unknown
        grads = []
        for way in (step, compiled):
            inputs = [x.clone().requires_grad_() for x in problem.inputs]
            way(inputs[0][:tokens], *inputs[1:], problem.targets[:tokens]).backward()
            grads.append([x.grad for x in inputs])
        torch.testing.assert_close(grads[0], grads[1])


def test_autocast(small):
    """fp32 states and weights under autocast: as from bf16 states, gradients in fp32."""
    problem = Problem((9, 33, 301), torch.float32, bias=True)
    inputs = [x.requires_grad_() for x in problem.inputs]
    with torch.autocast("cpu", torch.bfloat16):
        (logps,) = problem.ours(*inputs)
    logps.backward(*problem.grads)  # outside, as is usual
    rounded = [inputs[0].detach().bfloat16().float(), *(x.detach() for x in inputs[1:])]
    rounded = [x.requires_grad_() for x in rounded]
    (expected,) = problem.ours(*rounded)
    expected.backward(*problem.grads)
    assert logps.dtype == torch.float32 and torch.equal(logps, expected)
    assert torch.equal(inputs[1].grad, rounded[1].grad)
    assert torch.equal(inputs[0].grad, rounded[0].grad.bfloat16().float())


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_mixed_dtypes(small, hidden_dtype, weight_dtype):
    problem = Problem((9, 33, 301), torch.float64)
    dtypes = (hidden_dtype, weight_dtype)
    problem.inputs = [x.to(d) for x, d in zip(problem.inputs, dtypes, strict=True)]
    truth, ours = problem.solve(problem.plain, torch.float64), problem.solve(problem.ours)
    for true, found, dtype in zip(truth, ours, (torch.float32, *dtypes), strict=True):
        last = max(torch.finfo(dtype).eps, 1e-6)  # a rounding to its dtype, or fp32 products
        assert (found - true).abs().max() <= last * true.abs().max()


def test_scoring_keeps_nothing(small, monkeypatch):
    kept = []
    room = kernels.room_to_keep
    monkeypatch.setattr(kernels, "room_to_keep", lambda *x: kept.append(room(*x)) or kept[-1])
    problem = Problem((9, 33, 3001), torch.float32)
    with torch.no_grad():
        problem.inputs[0].requires_grad_()
        problem.ours(*problem.inputs)
    problem.ours(*(x.detach() for x in problem.inputs))
    assert kept == [0, 0]
    problem.ours(*problem.inputs)
    assert kept[2] > 0


def test_a_target_that_is_no_token_is_loud(small):
    problem = Problem((9, 33, 301), torch.float32)
    problem.targets[4:6] = torch.tensor([301, -1])
    (logps,) = problem.ours(*problem.inputs)
    assert logps.isnan().nonzero().flatten().tolist() == [4, 5]


# -- on a GPU, at real shapes and sizes of slices

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
REAL = {
    "gpt2": ((320, 768, 50257), {}),
    "gemma2": ((64, 2304, 256000), dict(softcap=30.0)),
    "llama": ((1000, 1024, 32000), dict(entropy=True, temperature=0.7)),
    "long": ((8192, 512, 50257), dict(bias=True)),
    "one": ((1, 768, 50257), dict(entropy=True, softcap=30.0)),
}


@pytest.mark.gpu
@cuda
@pytest.mark.parametrize("keep", [None, "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", REAL)
def test_on_a_gpu(name, dtype, keep):
    shape, options = REAL[name]
    problem = Problem(shape, dtype, device="cuda", **options)
    assert_as_good([problem], keep=keep)
    once, again = (problem.solve(problem.ours, keep=keep) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    with torch.no_grad():
        assert torch.equal(problem.ours(*problem.inputs)[0].double(), once[0])


@pytest.mark.gpu
@cuda
@pytest.mark.parametrize("around", [0.0, -60.0, -110.0])
def test_a_response_in_bf16_on_a_gpu(around):
    problem = Problem((40, 768, 50257), torch.bfloat16, around=around, device="cuda")
    (truth,) = problem.plain(*(x.double() for x in problem.inputs))
    assert (problem.ours(*problem.inputs)[0].double() - truth).sum().abs() < 1e-4


@pytest.mark.gpu
@cuda
def test_memory_on_a_gpu():
    problem = Problem((8192, 512, 50257), torch.bfloat16, device="cuda")
    inputs = [x.requires_grad_() for x in problem.inputs]
    for keep_bytes, most in ((0, 0.2), (None, 0.75)):  # of the logits in fp32
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        token_logps(*inputs, problem.targets, keep_bytes=keep_bytes).sum().backward()
        extra = torch.cuda.max_memory_allocated() - before
        assert extra < most * 8192 * 50257 * 4
        inputs[0].grad = inputs[1].grad = None


@pytest.mark.gpu
@cuda
def test_compiled_and_autocast_on_a_gpu():
    problem = Problem((300, 768, 50257), torch.float32, device="cuda")
    grads = []
    for way in (token_logps, torch.compile(token_logps, fullgraph=True)):
        inputs = [x.clone().requires_grad_() for x in problem.inputs]
        with torch.autocast("cuda", torch.bfloat16):
            logps = way(*inputs, problem.targets)
        logps.backward(*problem.grads)
        grads.append([logps.detach(), *(x.grad for x in inputs)])
    assert all(x.dtype == torch.float32 for x in grads[0])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
