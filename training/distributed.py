"""The processes of a run: how they start, share the work and exchange values.

`torchrun` and `python -m torch.distributed.launch` start one process per device and set each one's rank in the
environment. A process that was started without them is a World of one.
"""

import contextlib
import ctypes
import functools
import hashlib
import math
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from utils import UserError, first_line, short_repr, warn

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
# How long a process waits for the others. A process that ends is noticed at once; one may be downloading tens of GB.
TIMEOUT = timedelta(hours=12)


@dataclass(frozen=True)
class World:
    """All processes of a run, seen from this one.

    devices: those of this process; several are used together through DataParallel.
    in_group: whether a launcher started this process, so that it trains with DistributedDataParallel, even if alone.
    """

    devices: tuple[torch.device, ...]
    rank: int = 0
    size: int = 1
    local_rank: int = 0
    in_group: bool = False

    @property
    def device(self) -> torch.device:
        return self.devices[0]

    @property
    def is_main(self) -> bool:
        """Whether this is the main process, which writes and prints."""
        return self.rank == 0

    def split_batch(self, images: int, micro_batches: int) -> list[range]:
        """This process's micro-batches, as ranges of a batch's images: all of the same size, at least one per process.

        Raises UserError, with the nearest number that can be split, if there is a remainder.
        """
        parts = max(micro_batches, self.size)
        processes = f"{self.size} process{'es' if self.size > 1 else ''}"
        if parts % self.size:
            raise UserError(
                f"accumulate: {micro_batches} micro-batches cannot be split over {processes}; the nearest number "
                f"that can is {_nearest_multiple(micro_batches, self.size)}"
            )
        if images % parts:
            raise UserError(
                f"batch_size: {images} images cannot be split over {processes} in {parts} equal parts; the nearest "
                f"number that can is {_nearest_multiple(images, parts)}"
            )
        size, own = images // parts, parts // self.size
        return [range(part * size, (part + 1) * size) for part in range(self.rank * own, (self.rank + 1) * own)]

    def wrap(self, model: nn.Module, amp_dtype: torch.dtype, image_size: int) -> nn.Module:
        """`model` for training on all devices of the run. The keys of `model.state_dict()` do not change.

        amp_dtype: of mixed precision, where it is enabled.
        """
        if self.in_group:
            device_ids = [self.device.index] if self.device.type == "cuda" else None
            wrapped = nn.parallel.DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True)
            # Statistics stay separate until `average_batchnorm`. (The constructor's argument is deprecated.)
            wrapped.broadcast_buffers = False
            # After its first backward pass it rebuilds its gradient buckets, which changes the rounding. With a pass
            # before the first step a resumed run rounds as the uninterrupted run.
            wrapped.eval()(torch.zeros(2, 3, image_size, image_size, device=self.device)).sum().backward()
            model.zero_grad(set_to_none=True)
            return wrapped
        if len(self.devices) > 1:
            print(
                f"training on {len(self.devices)} GPUs from one process (DataParallel); one process per GPU is faster: "
                f"torchrun --nproc_per_node {len(self.devices)} main.py ...",
                file=sys.stderr,
            )
        return self.on_all_devices(model, amp_dtype)

    def on_all_devices(self, model: nn.Module, amp_dtype: torch.dtype) -> nn.Module:
        """`model` for calls on all devices of this process."""
        if len(self.devices) == 1:
            return model
        return nn.DataParallel(_InPrecision(model, amp_dtype), [device.index for device in self.devices])

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of all processes' tensors, the same bits in each."""
        if self.in_group:
            tensor = tensor.clone()
            dist.all_reduce(tensor)
        return tensor

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean of all processes' tensors, the same bits in each."""
        return self.sum(tensor) / self.size

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, by rank, in every process."""
        values = [value] * self.size
        if self.in_group:
            dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: Any) -> Any:
        """The main process's value, in every process."""
        values = [value]
        if self.in_group:
            dist.broadcast_object_list(values)
        return values[0]

    @contextlib.contextmanager
    def main_process_first(self, needed: bool) -> Iterator[None]:
        """The main process runs the block first, then one process of each machine, then the others: for downloads.

        needed: if not, all run it at once.
        """
        turns, turn = (2, 0 if self.is_main else 1 if not self.local_rank else 2) if needed else (0, 0)
        for _ in range(turn):
            self.gather(None)
        yield
        for _ in range(turns - turn):
            self.gather(None)

    def require_equal(self, what: str, compute: Callable[[], Any]) -> None:
        """Raises UserError, in every process, if the computed values differ. A single process computes nothing."""
        values = self.gather(compute()) if self.in_group else []
        if values != values[:1] * len(values):
            other = next(rank for rank, found in enumerate(values) if found != values[0])
            raise UserError(f"{what} of process {other} differ from those of process 0")

    def average_batchnorm(self, model: nn.Module) -> None:
        """Replace the BatchNorm statistics, which each process took from its own images, by their mean."""
        if self.in_group:
            statistics = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
            # In float64 the mean of equal values is that value, so that a second call changes nothing.
            mean = self.mean(torch.cat([buffer.flatten().double() for buffer in statistics]))
            for buffer, values in zip(statistics, mean.split([b.numel() for b in statistics]), strict=True):
                buffer.copy_(values.view_as(buffer))


class AsyncMax:
    """The maximum of integers over all processes, one call late, so that no process waits for the slowest.

    A single process gets its own integers at once.
    """

    def __init__(self, world: World):
        self._world = world
        self._pending: tuple[Tensor, dist.Work] | None = None

    def __call__(self, *own: int) -> list[int]:
        """The maxima of the integers of the previous call. All processes must call it, with as many each time."""
        if not self._world.in_group:
            return list(own)
        previous = self.settle() or [0] * len(own)
        numbers = torch.tensor(own)
        self._pending = numbers, dist.all_reduce(numbers, dist.ReduceOp.MAX, async_op=True)
        return previous

    def settle(self) -> list[int]:
        """Wait for the pending maxima and return them; empty if there are none."""
        if self._pending is None:
            return []
        numbers, work = self._pending
        work.wait()
        self._pending = None
        return numbers.tolist()


@contextlib.contextmanager
def join(device_name: str | None, *, keep_memory: bool = True) -> Iterator[World]:
    """Connect to the other processes of the run, if there are any, each on its own device. Raises UserError.

    keep_memory: on the CPU, see `keep_freed_memory`.
    """
    size = _number("WORLD_SIZE", 1)
    local_rank = _number("LOCAL_RANK", 0)
    devices = _devices(device_name, local_rank, alone="LOCAL_RANK" not in os.environ)
    if devices[0].type == "cuda":
        torch.cuda.set_device(devices[0])
    elif keep_memory:
        keep_freed_memory()
    if size == 1 and not dist.is_torchelastic_launched():
        yield World(devices)
        return
    store, rank = _all_met(size), _number("RANK", 0)
    on_cuda = devices[0].type == "cuda"
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_cuda else "gloo",
        store=dist.PrefixStore("run", store),
        rank=rank,
        world_size=size,
        timeout=TIMEOUT,
        device_id=devices[0] if on_cuda else None,
    )
    yield World(devices, rank, size, local_rank, in_group=True)
    dist.destroy_process_group()  # not after an error: it may wait for processes that have ended


class _InPrecision(nn.Module):
    """A module for DataParallel, whose threads know that autocast is enabled, but not its precision."""

    def __init__(self, module: nn.Module, amp_dtype: torch.dtype):
        super().__init__()
        self.module, self.amp_dtype = module, amp_dtype

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, self.amp_dtype, enabled=torch.is_autocast_enabled(x.device.type)):
            return self.module(x)


def gradients_synchronised(model: nn.Module, on: bool) -> contextlib.AbstractContextManager:
    """Whether a backward pass inside sums gradients over processes: only the last one of a step has to."""
    off = isinstance(model, nn.parallel.DistributedDataParallel) and not on
    return model.no_sync() if off else contextlib.nullcontext()


def digest(state: Any) -> str:
    """SHA-256, in hex, of a nested state."""
    if isinstance(state, Tensor):
        content = state.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    elif isinstance(state, dict):
        content = repr([(key, digest(value)) for key, value in state.items()]).encode()
    elif isinstance(state, (list, tuple)):
        content = repr([digest(value) for value in state]).encode()
    else:
        content = repr(state).encode()
    return hashlib.sha256(content).hexdigest()


def is_first_to_fail(patience: float) -> bool:
    """Whether no other process of the run has failed before; to be asked once.

    patience: seconds to wait for the others, if they have not met yet.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return True
    try:
        return _meeting_point(patience).add("failures", 1) == 1
    except (UserError, OSError, RuntimeError, ValueError):
        return not has_met_others()  # else the process that kept the count has ended, and printed


def has_met_others() -> bool:
    """Whether this process has been one of several."""
    return _all_met.cache_info().currsize > 0


def has_looked_for_others() -> bool:
    """Whether there may be a thread that still waits for other processes."""
    return _search.cache_info().currsize > 0


@functools.cache
def _all_met(size: int) -> dist.Store:
    """The store that all processes of the run share, once all are there. Raises UserError."""
    store = _meeting_point()
    store.add("arrived", 1)
    while store.add("arrived", 0) < size:
        if store.add("failures", 0):
            raise UserError("another process ended before all had started")
        time.sleep(0.05)
    return store


def _meeting_point(patience: float = math.inf) -> dist.Store:
    """The store that all processes of the run share. A signal can end the wait, in which a thread does the waiting.

    patience: seconds. Raises TimeoutError, and UserError for what the environment says wrong.
    """
    found = _search()
    began, told = time.monotonic(), False
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    while not found:
        waited = time.monotonic() - began
        if waited >= patience:
            raise TimeoutError
        if waited > 20 and not told:
            told = True
            warn(f"waiting for the other processes at {place}; Ctrl-C ends this one")
        time.sleep(0.05)
    if isinstance(found[0], dist.Store):
        return dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", found[0])
    if "EADDRINUSE" in str(found[0]) or "in use" in str(found[0]):
        raise UserError(f"MASTER_PORT: {place} is in use by another program; choose another port with --master_port")
    raise UserError(f"the processes did not meet at {place} ({first_line(found[0])}); were all of them started?")


@functools.cache
def _search() -> list[dist.Store | Exception]:
    """Start to connect to the store; returns a list that will receive the store or an error. Raises UserError."""
    _number("RANK", 0)
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UserError(f"WORLD_SIZE is set, but not {', '.join(missing)}; start the processes with torchrun")
    host, port = os.environ["MASTER_ADDR"], _number("MASTER_PORT", 0)
    if not 0 < port < 2**16:
        raise UserError(f"MASTER_PORT: {port} is not the number of a port (1 to 65535)")
    try:
        socket.getaddrinfo(host, port)
    except (OSError, UnicodeError) as error:
        raise UserError(
            f"MASTER_ADDR: {short_repr(host)} is not known on this machine ({first_line(error)}); "
            "name the machine of the first process, or its IP address"
        ) from None
    found: list[dist.Store | Exception] = []

    def search() -> None:
        try:
            found.append(next(iter(dist.rendezvous("env://")))[0])
        except Exception as error:
            found.append(error)

    threading.Thread(target=search, daemon=True).start()
    return found


def _devices(name: str | None, local_rank: int, *, alone: bool) -> tuple[torch.device, ...]:
    """The named device or, by default, CUDA if available: all GPUs for a single process, else one by local rank."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type not in ("cpu", "cuda") or (device.type == "cpu" and device.index):
            raise RuntimeError("known: cpu, cuda, cuda:0, cuda:1, ...")
        if device.type == "cuda" and device.index is None:
            indices = range(torch.cuda.device_count() or 1) if alone else [local_rank]
            devices = tuple(torch.device("cuda", index) for index in indices)
        elif alone or device.type == "cpu":
            devices = (device,)
        else:
            raise RuntimeError("each process uses the GPU of its local rank; use --device cuda")
        torch.empty(1, device=devices[0])
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: cannot be used here ({str(error).splitlines()[0]})") from None
    return devices


def _number(variable: str, default: int) -> int:
    """A whole number from the environment. Raises UserError."""
    text = os.environ.get(variable) or str(default)
    if not text.isdecimal():
        raise UserError(f"{variable}: {text!r} in the environment is not a number; start the processes with torchrun")
    return int(text)


def _nearest_multiple(number: int, of: int) -> int:
    return max(of, (number + of // 2) // of * of)


def keep_freed_memory() -> None:
    """Let this process reuse the memory that it frees; no effect without glibc.

    Otherwise every large tensor of a step on the CPU takes new pages from the system, which are cleared one by one.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        # Older glibc accepts at most 32 MB. If it accepts neither, leave both thresholds alone.
        if any(mallopt(M_MMAP_THRESHOLD, size) for size in (2**30, 2**25)):
            mallopt(M_TRIM_THRESHOLD, -1)
