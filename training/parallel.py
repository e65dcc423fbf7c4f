"""Several processes, as torchrun starts them: exchanges, and signals that stop a run."""

import hashlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from training import errors

MAIN_PROCESS = os.environ.get("RANK", "0") == "0"
errors.install()


class SayHandler(logging.Handler):
    """Show what modules report under the header that they belong to."""

    def emit(self, record: logging.LogRecord) -> None:
        print(f"{'':<11}{errors.escaped(record.getMessage())}", flush=True)


logging.getLogger("plainpref").addHandler(SayHandler())
logging.getLogger("plainpref").setLevel(logging.INFO if MAIN_PROCESS else logging.ERROR)


class LogLines:
    """Whole lines for a log file, where tqdm would write carriage returns."""

    def write(self, text: str) -> None:
        if text := text.strip():
            print(text, file=sys.stderr, flush=True)

    def flush(self) -> None:
        pass


def progress_bar(over: Any, label: str, **more: Any) -> Any:
    """On a terminal a bar; in a log file a line every 20 seconds."""
    from tqdm import tqdm

    how = {"mininterval": 0.2, "delay": 0.2, "leave": False, "dynamic_ncols": True}
    if not sys.stderr.isatty():
        line = "{desc:<10} {n_fmt} of {total_fmt}, {rate_fmt}{postfix}, {remaining} left"
        how |= {"mininterval": 20.0, "delay": 20.0, "miniters": 1, "bar_format": line}
        how |= {"file": LogLines(), "position": 0}
    return tqdm(over, label, disable=not MAIN_PROCESS, **how | more)


def hash_of(*numbers: int) -> int:
    """One seed from several numbers."""
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:6], "little")


class Processes:
    """This process and its peers."""

    def __init__(self) -> None:
        errors.guard_output()
        self.device, self.default_dtype = torch.device("cpu"), "float32"
        if torch.cuda.is_available():
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            torch.cuda.set_device(self.device)
            # cuDNN attention, PyTorch's first choice on H100 and B200, makes a plan for each shape,
            # which takes about a second. The next choice, flash attention, does not.
            torch.backends.cuda.enable_cudnn_sdp(False)
            if torch.cuda.is_bf16_supported(including_emulation=False):
                self.default_dtype = "bfloat16"
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
            backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
            # Hours, because one process may tokenise or write a checkpoint while the others wait.
            dist.init_process_group(backend, timeout=timedelta(hours=2))
        self.rank = int(os.environ.get("RANK", "0"))
        self.world = dist.get_world_size() if dist.is_initialized() else 1
        self.in_step = False  # with --fsdp every process takes part in every forward pass
        self.stop_request = StopRequest()

    def share(self, items: list, label: str) -> Iterator[tuple[Any, bool]]:
        """This process's part of a list as (item, True). `(item, False)` is a dummy forward pass
        that keeps FSDP ranks in step.
        """
        for start in progress_bar(range(0, len(items), self.world), label):
            mine = start + self.rank < len(items)
            if mine or self.in_step:
                yield items[start + self.rank if mine else start], mine
            self.stop_if_asked()

    def stop_if_asked(self) -> None:
        """Stop every process if one received a signal; a run saves first."""
        number = self.stop_request.number
        if sum_over_processes(torch.tensor(number)):
            if self.stop_request.save:
                self.stop_request.save()
            stop()
            raise SystemExit(128 + (number or signal.SIGTERM))

    def peak_memory(self) -> float:
        """GiB: of the GPU if there is one, else of this process."""
        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated() / 2**30
        try:
            import resource
        except ImportError:  # Windows
            return 0.0
        unit = 2**30 if sys.platform == "darwin" else 2**20
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit

    def print(self, text: str) -> None:
        """A line that does not break a progress bar."""
        from tqdm import tqdm

        if MAIN_PROCESS:
            tqdm.write(text)
            sys.stdout.flush()


def within(seconds: float, call: Callable[[], Any]) -> Any:
    """What `call` returns, or TimeoutError. (A socket's own timeout begins anew with each byte.)"""
    future: Future = Future()

    def work() -> None:
        try:
            future.set_result(call())
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()  # the process does not wait for it
    return future.result(seconds)


def stop() -> None:
    if dist.is_initialized():
        dist.barrier()  # torchrun ends all processes as soon as one has left
        dist.destroy_process_group()


def from_main(make: Callable[[], Any]) -> Any:
    """Run `make` on the main process only; every process gets its result or its error."""
    result = [None, None]
    if MAIN_PROCESS:
        try:
            result[0] = make()
        except (ValueError, OSError) as error:
            result[1] = errors.message_of(error)
    if dist.is_initialized():
        dist.broadcast_object_list(result, 0)
    if result[1] is not None:
        raise ValueError(result[1])
    return result[0]


def sum_over_processes(tensor: Tensor) -> Tensor:
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def broadcast(tensors: list[Tensor]) -> None:
    """Give every process the main process's tensors."""
    for tensor in tensors if dist.is_initialized() else ():
        dist.broadcast(tensor, 0)


def snake_order(parts: list, world: int) -> list:
    """Micro-batches come sorted by length, and process r takes every world-th. In snake order
    (1 2 3 4, 4 3 2 1, ...) every process gets a similar share of long rows.
    """
    rounds = [parts[start : start + world] for start in range(0, len(parts), world)]
    return [part for i, turn in enumerate(rounds) for part in (turn[::-1] if i % 2 else turn)]


class Stopped(SystemExit):
    """A signal ends the process at once."""


class StopRequest:
    """SIGTERM, SIGHUP or Ctrl-C: a run stops after its current step, once it can save."""

    def __init__(self) -> None:
        self.number, self.time = 0, 0.0
        self.save: Callable[[], None] | None = None  # set as soon as there is something to save
        hangup = getattr(signal, "SIGHUP", signal.SIGTERM)  # Windows has none
        ignored = signal.getsignal(hangup) == signal.SIG_IGN  # by nohup
        numbers = {signal.SIGTERM, signal.SIGINT} | (set() if ignored else {hangup})
        self.old_handlers = {number: signal.signal(number, self.receive) for number in numbers}

    def receive(self, number: int, frame: Any) -> None:
        # A launcher may repeat a signal at once. A user who repeats it later means "now".
        repeated = self.number and time.monotonic() - self.time > 3
        if repeated or not self.save:
            raise Stopped(128 + number)
        self.number, self.time = number, self.time or time.monotonic()

    def uninstall(self) -> None:
        for number, handler in self.old_handlers.items():
            signal.signal(number, handler)
