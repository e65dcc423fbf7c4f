"""The kernels of kernels/token_logps.py compile for A100 and H100, without a GPU and spills.

COMPILED lists what launches compile: kernel, types, constants, which arguments are multiples of 16
(the launcher detects that itself, and only then are loads wide), warps and stages. ptxas and
cuobjdump come with Triton. `python -m pytest tests/test_compiled.py -s` prints the table.
"""

import ast
import importlib.util
import itertools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
if importlib.util.find_spec("triton") is None:
    pytest.skip("no Triton here (it is for Linux)", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1: nothing is compiled", allow_module_level=True)

import triton  # noqa: E402
import triton.backends.nvidia  # noqa: E402
from triton import language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from kernels import token_logps  # noqa: E402

CUOBJDUMP = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}  # bytes that one block may have
TENSOR_CORES = {80: "HMMA", 90: "HGMMA"}
COLUMNS = ("registers", "stack", "shared", "spills", "wide")


def variant(kernel: JITFunction, dtype: str, **flags: bool) -> dict:
    pointers = {"targets": "*i64", "kept": dtype, "out": dtype}
    pointers["source"] = dtype if flags.get("KEPT") else "*fp32"
    pointers |= dict.fromkeys(("tile", "bias", "parts", "z_target", "row_stats"), "*fp32")
    integers = ("first", "tokens", "at", "width", "stride", "blocks", "keep")
    numbers = dict.fromkeys(integers, "i32")
    numbers |= {"kept_at": "i64", "source_at": "i64"}
    numbers |= dict.fromkeys(("scale", "softcap", "inverse_temperature"), "fp32")
    aligned = {*pointers, "kept_at", "source_at", "at", "width", "stride", "keep"}
    return {
        "kernel": kernel,
        "types": {n: t for n, t in (pointers | numbers).items() if n in kernel.arg_names},
        "constants": {"BLOCK": token_logps.BLOCK, **flags},
        "aligned": [name for name in kernel.arg_names if name in aligned],
        "num_warps": token_logps.WARPS,
        "num_stages": 3,
    }


COMPILED = []  # the kernels as they are launched
for dtype, on in itertools.product(("*bf16", "*fp32"), (False, True)):
    flags = dict(BIAS=on, SOFTCAP=on, ENTROPY=on)  # off as for Llama; all on
    COMPILED.append(variant(token_logps.fold_kernel, dtype, **flags))
    for kept in (True, False):
        COMPILED.append(variant(token_logps.dlogits_kernel, dtype, **flags, KEPT=kept))


def jit_of(kernel: Any) -> JITFunction:
    while not isinstance(kernel, JITFunction):  # what autotune and heuristics wrap
        kernel = kernel.fn
    return kernel


def title(entry: dict) -> str:
    """Kernel, element types, constants (of flags those that are on), warps."""
    types = dict.fromkeys(t for t in entry["types"].values() if t[0] == "*" and t != "*i64")
    constants = [
        name if value is True else f"{name}={value}"
        for name, value in entry["constants"].items()
        if value is not False
    ]
    words = [jit_of(entry["kernel"]).__name__, *types, *constants, f"{entry['num_warps']} warps"]
    return " ".join(words)


def compiled(entry: dict, capability: int, folder: Path) -> dict:
    """Registers, stack, shared memory and instructions of one kernel for one GPU architecture."""
    kernel, constants = jit_of(entry["kernel"]), entry["constants"]
    names = kernel.arg_names
    missing = set(names) - set(constants) - set(entry["types"])
    assert not missing, f"COMPILED has no type in {kernel.__name__} for {sorted(missing)}"
    source = ASTSource(
        fn=kernel,
        signature={n: "constexpr" if n in constants else entry["types"][n] for n in names},
        constexprs={(names.index(n),): value for n, value in constants.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in entry["aligned"]},
    )
    options = {"num_warps": entry["num_warps"], "num_stages": entry["num_stages"]}
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    cubin = folder / f"{kernel.__name__}.cubin"
    cubin.write_bytes(made.asm["cubin"])

    def dump(what: str) -> str:
        command = [CUOBJDUMP, what, cubin]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", dump("--dump-resource-usage")).groups()
    sass = dump("--dump-sass")
    return {
        "registers": int(registers),
        "stack": int(stack),
        "shared": made.metadata.shared,
        "spills": len(re.findall(r"\b(?:STL|LDL)\b", sass)),  # stores to and loads from the stack
        "wide": len(re.findall(r"\b(?:LDG|STG|LDGSTS)\S*\.128\b", sass)),  # 16 bytes a thread
        "sass": sass,
    }


def check(found: dict, entry: dict, capability: int) -> None:
    assert found["spills"] == 0, f"{found['spills']} spills"
    assert found["shared"] <= SHARED_MEMORY[capability]
    if "tl.dot" in jit_of(entry["kernel"]).src:
        assert TENSOR_CORES[capability] in found["sass"], "no tensor cores"


@pytest.fixture
def fresh(monkeypatch, tmp_path_factory):
    """An empty compilation cache, so that nothing from an earlier run is used."""
    folder = tmp_path_factory.mktemp("compiled")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(folder / "cache"))
    # A later Triton changes this default, which determines how many roundings a kernel has.
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    return folder


@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_every_kernel_compiles_and_fits(capability, fresh):
    print(f"\nTriton {triton.__version__}, sm_{capability}")
    print(f"{'':<76}" + " ".join(f"{column:>9}" for column in COLUMNS))
    wrong = []
    for entry in COMPILED:
        found = compiled(entry, capability, fresh)
        print(f"{title(entry):<76}" + " ".join(f"{found[column]:>9}" for column in COLUMNS))
        try:
            check(found, entry, capability)
        except AssertionError as error:
            wrong.append(f"{title(entry)}: {error}")
    assert not wrong, "\n".join(wrong)


def is_jit(function: ast.AST) -> bool:
    """A function under @triton.jit, or under @triton.jit(...)."""
    named = [d.func if isinstance(d, ast.Call) else d for d in function.decorator_list]
    return any(ast.unparse(name) in ("triton.jit", "jit") for name in named)


def kernels_of(source: str) -> set[str]:
    """Jitted functions that are launched, f[grid](...), and those that no other one calls."""
    tree = ast.parse(source)
    jitted = {n.name: n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and is_jit(n)}
    calls = [
        node.func.id
        for function in jitted.values()
        for node in ast.walk(function)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    ]
    launched = {
        node.func.value.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Subscript)
        and isinstance(node.func.value, ast.Name)
    }
    return {name for name in jitted if name in launched or name not in calls}


def test_no_kernel_is_forgotten():
    listed = {jit_of(entry["kernel"]).__name__ for entry in COMPILED}
    assert listed == kernels_of(Path(token_logps.__file__).read_text())


def test_kernels_are_distinguished_from_helpers():
    source = """
if triton is not None:
    @triton.jit
    def helper(x): return x
    @triton.jit
    def kernel(x): helper(x)
    @triton.jit(do_not_specialize=["x"])
    def launched(x): return helper(x)
    @triton.autotune(configs=[], key=[])
    @triton.jit
    def both(x): launched(x)
    @triton.jit
    def behind_a_name(x): pass
def run(x):
    kernel[(1,)](x, num_warps=1)
    launched[lambda meta: (1,)](x)
    both[(1,)](x)
    (behind_a_name if x else kernel)[(1,)](x)
"""
    assert kernels_of(source) == {"kernel", "launched", "both", "behind_a_name"}


@triton.jit
def greedy_kernel(x, y, N: tl.constexpr):
    """More numbers alive at once than one warp has registers for."""
    i = tl.arange(0, N)
    row = tl.load(x + i)
    tl.store(y + i, row / tl.sum(row, 0))


@triton.jit
def product_kernel(x, y, N: tl.constexpr, PRECISION: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tile = tl.load(x + at)
    tl.store(y + at, tl.dot(tile, tile, input_precision=PRECISION))


def probe(kernel: JITFunction, dtype: str, warps: int, **constants: int | str) -> dict:
    return {
        "kernel": kernel, "types": {"x": dtype, "y": "*fp32"}, "constants": constants,
        "aligned": ["x", "y"], "num_warps": warps, "num_stages": 1,
    }  # fmt: skip


@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_the_check_can_fail(capability, fresh):
    """Spills, too much shared memory and idle tensor cores are detected."""
    spilling = probe(greedy_kernel, "*fp32", 1, N=16384)  # 512 numbers a thread, 255 registers
    found = compiled(spilling, capability, fresh)
    assert found["stack"] > 0
    with pytest.raises(AssertionError, match="spills"):
        check(found, spilling, capability)

    good = probe(product_kernel, "*bf16", 4, N=64, PRECISION="tf32")
    found = compiled(good, capability, fresh)
    check(found, good, capability)
    with pytest.raises(AssertionError):
        check(found | {"shared": SHARED_MEMORY[capability] + 1}, good, capability)
    idle = probe(product_kernel, "*fp32", 4, N=16, PRECISION="ieee")  # they have no fp32
    with pytest.raises(AssertionError, match="tensor cores"):
        check(compiled(idle, capability, fresh), idle, capability)


@pytest.mark.slow
def test_with_the_triton_of_older_torch(tmp_path):
    """Triton 3.6, which comes with torch 2.11: all of the above again, in a separate process."""
    if triton.__version__.startswith("3.6."):
        pytest.skip("it is the installed version")
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(tmp_path)]
    env = os.environ | {"PIP_CONSTRAINT": ""}
    subprocess.run([*install, "triton==3.6.0"], check=True, env=env)
    env |= {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    shutil.rmtree(tmp_path)  # half a gigabyte
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "Triton 3.6.0, sm_90" in done.stdout
