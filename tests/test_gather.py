"""kernels/gather_log_softmax.py against float64: its plain torch, its kernels under Triton's
interpreter (this file once more, in a process of its own), its kernels on a GPU (-m gpu).

The truth is the same formula in float64 on the same inputs, and the largest error may be that of
the plain `reference` and two steps of fp32: the same few operations in another order.
"""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from kernels import gather_log_softmax as file
from kernels.gather_log_softmax import IGNORED, gather_log_softmax, reference

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_gpu])]
on_every_device = pytest.mark.parametrize("device", DEVICES)
plain_only = pytest.mark.skipif(file.INTERPRETED, reason="about the plain torch code")


def problem(shape, dtype=torch.float32, device="cpu", location=0.0, spread=5.0):
    """logits (..., V) with a gradient, targets (...,), weights (...,) to sum the log-probs with."""
    numbers = torch.Generator().manual_seed(sum(shape))
    logits = torch.randn(shape, generator=numbers) * spread + location
    targets = torch.randint(0, shape[-1], shape[:-1], generator=numbers)
    weights = torch.randn(shape[:-1], generator=numbers)
    return logits.to(device, dtype).requires_grad_(), targets.to(device), weights.to(device)


def both(function, logits, targets, weights, temperature):
    """(log-probs, gradient of their weighted sum) of one way to compute them."""
    logps = function(logits, targets, temperature)
    (grad,) = torch.autograd.grad(logps, logits, weights.to(logps.dtype))
    return logps.detach(), grad


def compare(logits, targets, weights, temperature=1.0):
    """Value and gradient: no further from float64 than the reference. Returns them."""
    exact = logits.detach().double().requires_grad_()
    truth = both(reference, exact, targets, weights, temperature)
    plain = both(reference, logits, targets, weights, temperature)
    ours = both(gather_log_softmax, logits, targets, weights, temperature)
    assert ours[0].dtype == torch.promote_types(logits.dtype, torch.float32)
    assert ours[1].dtype == logits.dtype and ours[1].shape == logits.shape
    for what, true, other, own in zip(("value", "gradient"), truth, plain, ours, strict=True):
        if not true.numel():
            continue
        errors = [(x.double() - true).abs().max().item() for x in (own, other)]
        step = torch.finfo(torch.promote_types(own.dtype, torch.float32)).eps
        if file.INTERPRETED and own.dtype == torch.bfloat16:
            step = torch.finfo(own.dtype).eps / 2  # the interpreter cuts fp32 to bf16, no rounding
        allowed = errors[1] + 2 * step * true.abs().max().item()
        assert errors[0] <= allowed, f"{what}: {errors[0]:.2e}, plain {errors[1]:.2e}"
    return ours


SHAPES = [(1, 47), (255, 123), (31, 1001), (3, 50257), (47,), (2, 5, 123), (2, 3, 4, 9), (1, 1)]


@on_every_device
@pytest.mark.parametrize("location", (0.0, -100.0))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_further_from_float64_than_the_reference(shape, dtype, location, device):
    if file.INTERPRETED and shape == (255, 123) and (dtype != torch.float32 or location):
        pytest.skip("255 programs, one after the other: seconds")
    compare(*problem(shape, dtype, device, location), temperature=0.7 if location else 1.0)


@on_every_device
@pytest.mark.parametrize("place", (0, 46, "last", "largest"))
def test_targets_at_the_edges(place, device):
    logits, targets, weights = problem((7, 1001), device=device)
    places = {"last": 1000, "largest": logits.detach().argmax(-1)}
    targets[:] = torch.as_tensor(places.get(place, place), device=device)
    compare(logits, targets, weights)


@on_every_device
def test_a_confident_target_keeps_its_digits(device):
    """1 - p of 4e-2 down to 3e-13, where fp32 has only p = 1: value and gradient must shrink with
    it. The reference is off by all of it; ours by the rounding of the exponents, up to 33.
    """
    logits, targets, _ = problem((9, 47), device=device, spread=0.1)
    with torch.no_grad():
        logits[torch.arange(9, device=device), targets] = torch.arange(7.0, 35.0, 3.2).to(device)
    ones = torch.ones(9, device=device)
    # In float64, and without the 1: 1 + 3e-13 has lost its digits there too.
    exact = logits.detach().double()
    z = exact.gather(1, targets[:, None])
    others = exact.scatter(1, targets[:, None], -torch.inf).sub(z).exp().sum(1)  # e^-z_y times
    truth = -others.log1p(), others / (1 + others)

    def worst(function):
        logps, grad = both(function, logits, targets, ones, 1.0)
        found = logps, grad.gather(1, targets[:, None])[:, 0]
        errors = [(a.double() - b) / b for a, b in zip(found, truth, strict=True)]
        return torch.stack(errors).abs().max().item()

    assert truth[1].max() < 0.1 and truth[1].min() < 1e-12
    assert worst(reference) > 0.99
    assert worst(gather_log_softmax) < 33 * torch.finfo(torch.float32).eps


@on_every_device
def test_ignored_targets_cost_nothing_and_give_nothing(device):
    logits, targets, weights = problem((2, 6, 123), device=device)
    targets[0, :4] = IGNORED
    targets[1, 5] = IGNORED
    with torch.no_grad():  # what stands there must not matter
        logits[0, 0], logits[0, 1], logits[0, 2] = float("nan"), float("-inf"), float("inf")
    logps, grad = both(gather_log_softmax, logits, targets, weights, 1.0)
    ignored = targets == IGNORED
    assert (logps[ignored] == 0).all() and (grad[ignored] == 0).all()
    kept = logits.detach()[~ignored].requires_grad_()
    alone = compare(kept, targets[~ignored], weights[~ignored])
    assert torch.equal(logps[~ignored], alone[0]) and torch.equal(grad[~ignored], alone[1])
    targets[:] = IGNORED
    logps, grad = both(gather_log_softmax, logits, targets, weights, 1.0)
    assert not logps.any() and not grad.any()


@on_every_device
def test_a_row_without_weight_is_not_read_in_backward(device):
    """As a loss masks its prompts: 0 times the log-prob."""
    logits, targets, weights = problem((4, 123), device=device)
    with torch.no_grad():
        logits[1] = float("nan")
    weights[1] = 0.0
    _, grad = both(gather_log_softmax, logits, targets, weights, 1.0)
    assert not grad[1].any() and grad.isfinite().all()


@on_every_device
@pytest.mark.parametrize("vocab", (123, 9000))  # 9000: three blocks, and splits of V
def test_masked_vocabulary(vocab, device):
    """-inf: no probability, no gradient, no NaN, also where whole blocks have nothing else."""
    logits, targets, weights = problem((6, vocab), device=device)
    with torch.no_grad():
        logits[:, vocab // 20 :] = float("-inf")
        logits[3, : vocab // 2] = float("-inf")
        logits[3, vocab - 4 :] = 1.0
        targets[:] = 2
        targets[3] = vocab - 1
        targets[4] = vocab // 2  # a target without probability: log 0
    weights[4] = 0.0
    logps, grad = both(gather_log_softmax, logits, targets, weights, 1.0)
    assert logps[4] == float("-inf") and not logps.isnan().any() and not grad.isnan().any()
    assert (grad[logits.detach() == float("-inf")] == 0).all()
    rows = torch.tensor([0, 1, 2, 3, 5], device=device)
    compare(logits.detach()[rows].requires_grad_(), targets[rows], weights[rows])
    # A row with nothing else has no distribution, and no number that would hide it.
    nothing = torch.full((1, vocab), float("-inf"), device=device)
    assert (
        gather_log_softmax(nothing, targets[:1]).isnan() and reference(nothing, targets[:1]).isnan()
    )


@on_every_device
@pytest.mark.parametrize(
    "cut",
    (
        lambda x: x[:, :-1, :-5],  # as logits[:, :-1]: no (A*B, V) view, row stride not V
        lambda x: x[1, 1:, 3:],  # rows at odd addresses
        lambda x: x[:, ::2],
        lambda x: x[None, :, 1:],
        lambda x: x.transpose(0, 1),
        lambda x: x.transpose(1, 2),  # the last dimension is not dense: copied
        lambda x: x[:1].expand(3, -1, -1),
        lambda x: x[None, :, 1:, None, 2:],  # more than three dimensions
    ),
)
def test_strided_logits(cut, device):
    """Slices equal their copies bit for bit, and the gradient arrives where they were cut from."""
    whole, _, _ = problem((2, 5, 41), device=device)
    slice_ = cut(whole)
    _, targets, weights = problem(tuple(slice_.shape), device=device)
    results = []
    for part in (slice_, slice_.contiguous()):
        logps = gather_log_softmax(part, targets, 1.3)
        results.append((logps, torch.autograd.grad(logps, whole, weights)[0]))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    compare(slice_.detach().requires_grad_(), targets, weights, 1.3)


@on_every_device
def test_no_rows(device):
    for shape in ((0, 47), (2, 0, 47), (0, 3, 47)):
        logits, targets, weights = problem(shape, device=device)
        logps, grad = both(gather_log_softmax, logits, targets, weights, 1.0)
        assert logps.shape == shape[:-1] and grad.shape == shape


@on_every_device
def test_twice_and_bit_for_bit(device):
    """retain_graph; and the same bits again, with few rows (V is split) and with many."""
    for shape in ((2, 20_000), (40, 300)):
        logits, targets, _ = problem(shape, torch.bfloat16, device)
        logps = gather_log_softmax(logits, targets)
        first, second = (
            torch.autograd.grad(logps.sum(), logits, retain_graph=True)[0] for _ in range(2)
        )
        assert torch.equal(first, second) and first.any()
        assert torch.equal(logps, gather_log_softmax(logits, targets.int()))
        assert not gather_log_softmax(logits.detach(), targets).requires_grad


@on_every_device
def test_how_rows_stand_in_the_batch_does_not_matter(device):
    """One row, few and many are split differently: no more than rounding may come of it."""
    logits, targets, weights = problem((64, 5000), device=device)
    together = compare(logits, targets, weights)
    alone = compare(logits.detach()[:1].requires_grad_(), targets[:1], weights[:1])
    step = 4 * torch.finfo(torch.float32).eps
    assert torch.allclose(together[0][:1], alone[0], rtol=step, atol=0)
    assert torch.allclose(together[1][:1], alone[1], rtol=8 * step, atol=1e-12)


def test_gradcheck():
    logits, targets, _ = problem((2, 3, 7), torch.float64)
    targets[0, 1] = IGNORED
    assert torch.autograd.gradcheck(lambda z: gather_log_softmax(z, targets, 0.7), logits)
    compare(*problem((5, 123), torch.float64), temperature=1.7)


@plain_only
@on_every_device
@pytest.mark.parametrize("dynamic", (False, True))
def test_one_node_under_compile(dynamic, device):
    logits, targets, weights = problem((2, 9, 123), torch.bfloat16, device)

    def loss(logits, targets):
        return (gather_log_softmax(logits[:, :-1], targets[:, 1:], 0.9) * weights[:, 1:]).sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for _ in range(2):
        expected, found = loss(logits, targets), compiled(logits, targets)
        assert torch.equal(found, expected)
        grads = [torch.autograd.grad(x, logits)[0] for x in (expected, found)]
        assert torch.equal(*grads)


@plain_only
def test_registered_as_torch_expects():
    """Shapes and strides of the fake, no aliases, autograd: what opcheck looks at."""
    logits, targets, weights = problem((2, 3, 11))
    torch.library.opcheck(file.forward, (logits, targets, 0.7))
    with torch.no_grad():
        outputs = file.forward(logits, targets, 0.7)
        torch.library.opcheck(file.backward, (weights, logits.detach(), targets, *outputs[1:], 0.7))


def test_wrong_input_is_refused():
    logits, targets, _ = problem((3, 47))
    with pytest.raises(ValueError, match=r"\(3, 47\).*\(2,\)"):
        gather_log_softmax(logits, targets[:2])
    for temperature in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="temperature"):
            gather_log_softmax(logits, targets, temperature)
    for outside in (47, -1):
        targets[1] = outside
        if file.INTERPRETED:  # as on a GPU: no error to raise, so a NaN that no loss survives
            logps = gather_log_softmax(logits, targets)
            assert logps.isnan().tolist() == [False, True, False]
        else:
            with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
                gather_log_softmax(logits, targets)


def bytes_taken(function) -> tuple[int, int]:
    """(most that was allocated at once, what is left of it after the call), of CPU tensors."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        kept = function()  # alive until the profile ends
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    del kept
    return most, now


@plain_only
@pytest.mark.parametrize("shape", ((500, 8192), (4, 130, 8192)), ids=str)
def test_memory(shape, monkeypatch):
    """Bytes a bf16 logit, beside a chunk: forward 0, kept 0, backward the 2 of the gradient. And
    what the docstring says of the reference: 8, 4 and 12.
    """
    monkeypatch.setattr(file, "CHUNK", 2**16)
    logits, targets, _ = problem(shape, torch.bfloat16)
    per_logit = {}
    for function in (gather_log_softmax, reference):
        logps = []
        forward = bytes_taken(lambda: logps.append(function(logits, targets)))  # noqa: B023
        backward = bytes_taken(lambda: torch.autograd.grad(logps[0].sum(), logits))  # noqa: B023
        # What forward left is still there while backward runs; it is freed on the way.
        peaks = (forward[0], forward[1], forward[1] + backward[0])
        per_logit[function] = [x / logits.numel() for x in peaks]
    # Two chunks: the next is made before the last one is let go. And some numbers a row.
    little = (2 * 4 * file.CHUNK + 100 * targets.numel()) / logits.numel()
    assert little < 0.2
    forward, kept, backward = per_logit[gather_log_softmax]
    assert forward < little and kept < little / 4 and backward < 2 + little
    assert [round(x) for x in per_logit[reference]] == [8, 4, 12]


def test_which_code_runs():
    logits = torch.zeros(2, 3)
    assert file.on_triton(logits) == file.INTERPRETED
    assert not file.on_triton(logits.double())
    assert bool(file.COMPILED) == (file.triton is not None)


@plain_only
@pytest.mark.skipif(sys.platform == "win32", reason="TRITON_INTERPRET is for Linux")
def test_kernels_under_the_interpreter():
    """All of the above with the kernels, in a process of its own: Triton reads the variable once,
    when it is imported.
    """
    if importlib.util.find_spec("triton") is None:
        pytest.skip("no Triton here")
    import numpy
    import triton

    old = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7)
    if old and tuple(map(int, numpy.__version__.split(".")[:2])) >= (2, 4):
        pytest.skip("the interpreter of Triton before 3.7 has no loops with NumPy from 2.4 on")
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    if done.returncode:
        pytest.fail(f"with TRITON_INTERPRET=1:\n{done.stdout[-6000:]}{done.stderr[-2000:]}", False)


@pytest.mark.gpu
@needs_gpu
def test_more_than_two_to_the_31_logits():
    """Offsets beyond 2^31 in forward and backward: the last row, alone, gives the same."""
    rows, vocab = 2**31 // 50257 + 8, 50257
    if torch.cuda.mem_get_info()[0] < 5 * rows * vocab:
        pytest.skip("takes 11 GB")
    logits = torch.empty(rows, vocab, dtype=torch.bfloat16, device="cuda").normal_()
    targets = torch.full((rows,), IGNORED, device="cuda")
    targets[-3:] = torch.tensor([0, 17, vocab - 1])
    logits.requires_grad_()
    logps = gather_log_softmax(logits, targets)
    (grad,) = torch.autograd.grad(logps.sum(), logits)
    exact = logits.detach()[-3:].double().requires_grad_()
    truth = reference(exact, targets[-3:])
    (true_grad,) = torch.autograd.grad(truth.sum(), exact)
    assert torch.allclose(logps[-3:].double(), truth, rtol=1e-6, atol=0)
    assert torch.allclose(grad[-3:].double(), true_grad, rtol=2**-8, atol=1e-12)
    assert not logps[:-3].any() and not grad[:5].any() and not grad[-9:-3].any()


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("vocab", (32_000, 50_257))
def test_memory_on_a_gpu(vocab):
    logits, targets, _ = problem((512, vocab), torch.bfloat16, "cuda")
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    logps = gather_log_softmax(logits, targets)
    assert torch.cuda.max_memory_allocated() - before < 2**20
    (grad,) = torch.autograd.grad(logps.sum(), logits)
    assert torch.cuda.max_memory_allocated() - before < 2 * logits.numel() + 2**20
    assert grad.any()
