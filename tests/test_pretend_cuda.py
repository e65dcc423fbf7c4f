"""Training steps on a pretended GPU: no tensors of two devices meet, and the host seldom waits.

A `Pretended` tensor says that it is on cuda:0 and computes on the CPU. The tests start this file as
a script, because PyTorch looks for devices when it is imported. A GPU's speed, its memory and its
own kernels cannot be tested in this way.
"""

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# What PyTorch needs in order to believe in a device: streams for autograd, and that it exists.
GUARD = r"""
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

using c10::Device, c10::DeviceType, c10::Stream;
const Device GPU(DeviceType::CUDA, 0);
struct Guard final : c10::impl::DeviceGuardImplInterface {
  DeviceType type() const override { return GPU.type(); }
  Device exchangeDevice(Device) const override { return GPU; }
  Device getDevice() const override { return GPU; }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  Stream getStream(Device) const override { return Stream(Stream::DEFAULT, GPU); }
  Stream exchangeStream(Stream) const override { return Stream(Stream::DEFAULT, GPU); }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
};
namespace c10::impl { C10_REGISTER_GUARD_IMPL(CUDA, Guard) }

namespace at {
struct Hooks final : CUDAHooksInterface {
  Hooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
};
C10_REGISTER_TYPED_CLASS(CUDAHooksRegistry, "CUDAHooks", Hooks)
}
"""

PLAIN = ["--no-fused-logps", "--no-share-prompt"]
FP32 = ["--dtype", "float32"]  # else bfloat16
CASES = [("kto", FP32), ("kto", [*PLAIN, *FP32])]
CASES += [("pro", [*FP32, "--attn", "eager"]), ("pro", [*PLAIN, *FP32])]
CASES += [("dpo", []), ("dpo", PLAIN), ("kto", []), ("kto", PLAIN), ("sft", ["--attn", "eager"])]


@pytest.fixture(scope="module")
def results(checkpoints, tmp_path_factory) -> list[dict]:
    """What run_all() found, for every case."""
    import torch
    from conftest import labelled_rows, pair_rows, ranked_rows, write_jsonl

    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if torch.cuda.is_available() or not compiler or sys.platform != "linux":
        pytest.skip("needs a compiler, and a machine without a GPU")
    folder, home = tmp_path_factory.mktemp("pretended"), Path(torch.__file__).parent
    (folder / "guard.cpp").write_text(GUARD)
    headers = [f"-I{home}/include", f"-I{home}/include/torch/csrc/api/include"]
    libraries = [f"-L{home}/lib", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{home}/lib"]
    command = [compiler, "-std=c++20", "-shared", "-fPIC", "guard.cpp", "-o", "guard.so"]
    subprocess.run([*command, *headers, *libraries], cwd=folder, check=True)
    kinds = {"dpo": pair_rows, "kto": labelled_rows, "pro": ranked_rows, "sft": pair_rows}
    for method, make in kinds.items():
        write_jsonl(folder / f"{method}.jsonl", make(12))
    command = [sys.executable, __file__, str(checkpoints("llama"))]
    found = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "number", range(len(CASES)), ids=lambda i: " ".join([CASES[i][0], *CASES[i][1]])
)
def test_the_host_seldom_waits(number, results):
    """At most twice per micro-batch. Transformers waits once per forward pass, unless prompts are
    shared: it looks for several sequences in a row. kto.py has two forward passes.
    """
    waits = results[number]["waits"]
    assert len(waits) <= 2 * 2, waits


@pytest.mark.parametrize("number", (0, 2))
def test_optimisations_change_rounding_only(number, results):
    fast, plain = results[number : number + 2]
    assert plain["norm"] == pytest.approx(fast["norm"], rel=1e-5)


# -- the rest runs in the script


def pretend(waits: list[str]) -> None:
    """Install the device. `waits` gets a line for everything that makes the host wait."""
    import ctypes
    import traceback

    ctypes.CDLL(f"{os.getcwd()}/guard.so")  # before PyTorch has looked for devices
    import torch
    from torch import Tensor
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves, tree_map

    data_dependent = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2")

    def wait(what: str) -> None:
        lines = traceback.extract_stack()
        ours = [f for f in lines if str(ROOT) in f.filename and f.filename != __file__]
        waits.append(f"{what}: {ours[-1].filename}:{ours[-1].lineno} {ours[-1].line}")

    class Pretended(Tensor):
        __torch_function__ = torch._C._disabled_torch_function_impl

        @staticmethod
        def __new__(cls, inner: Tensor):
            layout = {"strides": inner.stride(), "storage_offset": inner.storage_offset()}
            layout |= {"dtype": inner.dtype, "device": torch.device("cuda", 0)}
            return Tensor._make_wrapper_subclass(cls, inner.size(), **layout)

        def __init__(self, inner: Tensor):
            self.inner = inner

        @classmethod
        def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
            return dispatch(op, args, kwargs or {})

        def tolist(self) -> list:
            return self.cpu().tolist()

    class Everywhere(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            return dispatch(op, args, kwargs or {})

    def dispatch(op, args: tuple, kwargs: dict):
        name = op._schema.name.split("::")[1]
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        ours = [x for x in tensors if isinstance(x, Pretended)]
        others = [x for x in tensors if not isinstance(x, Pretended)]
        to = torch.device(kwargs["device"]).type if kwargs.get("device") else None
        if not ours and to != "cuda":
            return op(*args, **kwargs)
        indexes = name.startswith("index")  # by a mask, or by a tensor on the CPU
        if ours and any(x.dim() for x in others) and not indexes and "copy" not in name:
            raise RuntimeError(f"{op}: tensors on cuda:0 and on the CPU")
        moved = name == "_to_copy" and to and to != ("cuda" if ours else "cpu")
        pinned = kwargs.get("non_blocking") and hasattr(args[0], "pinned")
        copied = (moved and not pinned) or (name == "copy_" and others)
        masked = indexes and (others or any(x.dtype == torch.bool for x in tensors[1:]))
        if name in data_dependent or copied or masked:
            wait(name)
        kwargs = kwargs | ({"device": "cpu"} if to else {})
        plain = tree_map(lambda x: x.inner if isinstance(x, Pretended) else x, (args, kwargs))
        result = op(*plain[0], **plain[1])
        written = {id(x.inner): x for x in ours} if op._schema.is_mutable else {}

        def wrap(x):
            if isinstance(x, Tensor):
                return written[id(x)] if id(x) in written else Pretended(x)
            return x

        return result if to == "cpu" else tree_map(wrap, result)

    def pin_memory(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor.pinned = True
        return tensor

    def made_on_cpu(make):
        def there(*args, device=None, **kwargs):
            made = make(*args, **kwargs)
            return made if device is None else made.to(device)

        return there

    Tensor.pin_memory = pin_memory
    with torch.device("cpu"):  # remembers which functions it applies to, before they are replaced
        torch.empty(0)
    torch.tensor, torch.as_tensor = made_on_cpu(torch.tensor), made_on_cpu(torch.as_tensor)
    facts = {"is_available": True, "is_bf16_supported": True, "max_memory_allocated": 0}
    facts |= {"get_device_name": "pretended", "set_device": None, "_lazy_init": None}
    for name, value in facts.items():
        setattr(torch.cuda, name, lambda *args, value=value, **kwargs: value)
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    torch.autograd.set_multithreading_enabled(False)  # other threads would not see the mode
    from torch.optim import optimizer
    from torch.utils import _foreach_utils

    for module in (optimizer, _foreach_utils):
        module._foreach_supported_types.append(Pretended)
    Everywhere().__enter__()


def run_all(model: str) -> None:
    """One step of two micro-batches of every case. Prints its waits up to the clipping, and
    the norm of its gradients.
    """
    waits, found = [], []
    pretend(waits)
    import torch

    import common

    with pytest.raises(RuntimeError, match="on cuda:0 and on the CPU"):
        torch.ones(2, device="cuda").add(torch.ones(2))
    steps = common.Run.steps

    def counted(*args):
        for step in steps(*args):
            waits.clear()
            yield step

    def clipped(*args):
        made = [*waits]
        found.append({"waits": made, "norm": float(norm := clip(*args))})
        return norm

    clip, common.clip_gradients, common.Run.steps = common.clip_gradients, clipped, counted
    for name in ("evaluate", "finish", "save"):
        setattr(common.Run, name, lambda *args: None)
    for method, flags in CASES:
        module = importlib.import_module(method)
        values = {"model": model, "dataset": f"{method}.jsonl", "output_dir": f"out{len(found)}"}
        values |= {"batch_size": 8, "micro_batch_size": 4, "max_steps": 1}
        values |= {"max_length": 96, "max_prompt_length": 64}
        words = [f"--{key.replace('_', '-')}={value}" for key, value in values.items()]
        module.main(common.parse(module.Args, module.PRESETS, "", [*words, *flags]))
    print(json.dumps(found))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    run_all(sys.argv[1])
