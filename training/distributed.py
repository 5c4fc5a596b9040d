"""The processes of a run: how they start, deal out the work, agree, and end.

`torchrun` and `python -m torch.distributed.launch` start one process per device and say in the environment who is who.
A process that was started without them is a World of one and shares nothing.
"""

import contextlib
import functools
import hashlib
import os
import select
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn

from training.signals import Terminated, signals_raise
from utils import UserError, keep_freed_memory

# How long a process waits for the others. One that ends is noticed at once; one may be fetching tens of GB.
PATIENCE = timedelta(hours=12)


@dataclass(frozen=True)
class World:
    """This process among all of a run. Several `devices`: one process feeds them all, by DataParallel.

    in_group: whether a launcher started it, so that it trains by DistributedDataParallel, even if it is the only one.
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
        """Whether this process is the one that writes and prints."""
        return self.rank == 0

    def deal(self, images: int, pieces: int) -> list[range]:
        """This process's pieces of a batch, in ranges of the batch's images: all pieces are equal, one each at least.

        Raises UserError, with the nearest number that can be dealt, where that does not come out even.
        """
        wanted, pieces = pieces, max(pieces, self.size)
        among = f"{self.size} process{'es' if self.size > 1 else ''}"
        if pieces % self.size:
            raise UserError(
                f"accumulate: {wanted} micro-batches cannot be dealt to {among}; the nearest number that can is "
                f"{_nearest_multiple(wanted, self.size)}"
            )
        if images % pieces:
            raise UserError(
                f"batch_size: {images} images cannot be dealt to {among} in {pieces} equal parts; the nearest number "
                f"that can is {_nearest_multiple(images, pieces)}"
            )
        size, own = images // pieces, pieces // self.size
        return [range(piece * size, (piece + 1) * size) for piece in range(self.rank * own, (self.rank + 1) * own)]

    def wrap(self, model: nn.Module, amp_dtype: torch.dtype, image_size: int) -> nn.Module:
        """`model` for training on all devices of the run; its own state-dict keys stay as they are.

        amp_dtype: of mixed precision, where that is switched on in a forward pass.
        """
        if self.in_group:
            device_ids = [self.device.index] if self.device.type == "cuda" else None
            wrapped = nn.parallel.DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True)
            wrapped.broadcast_buffers = (
                False  # each keeps its statistics until `average_batchnorm`; the argument is deprecated
            )
            # After its first backward pass it lays its sums of gradients out anew, and rounds them otherwise from then
            # on. A pass before the first step makes a resumed run round as the one that went on.
            wrapped.eval()(torch.zeros(2, 3, image_size, image_size, device=self.device)).sum().backward()
            model.zero_grad(set_to_none=True)
            return wrapped
        if len(self.devices) > 1:
            print(
                f"training on {len(self.devices)} GPUs from one process (DataParallel); a process for each is faster: "
                f"torchrun --nproc_per_node {len(self.devices)} main.py ...",
                file=sys.stderr,
            )
        return self.on_all_devices(model, amp_dtype)

    def on_all_devices(self, model: nn.Module, amp_dtype: torch.dtype) -> nn.Module:
        """`model` as it is called on all devices of this process."""
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
        """The leader's value, in every process."""
        values = [value]
        if self.in_group:
            dist.broadcast_object_list(values)
        return values[0]

    @contextlib.contextmanager
    def main_process_first(self, needed: bool) -> Iterator[None]:
        """The leader goes ahead, then one process of each machine, then the others: for what is fetched once.

        needed: otherwise all go at once.
        """
        turns, turn = (2, 0 if self.is_main else 1 if not self.local_rank else 2) if needed else (0, 0)
        for _ in range(turn):
            self.gather(None)
        yield
        for _ in range(turns - turn):
            self.gather(None)

    def require_equal(self, what: str, compute: Callable[[], Any]) -> None:
        """Raises UserError, in every process, unless all compute the same value; one alone computes nothing."""
        values = self.gather(compute()) if self.in_group else []
        if values != values[:1] * len(values):
            other = next(rank for rank, found in enumerate(values) if found != values[0])
            raise UserError(f"{what} of process {other} differ from those of process 0")

    def average_batchnorm(self, model: nn.Module) -> None:
        """Give all processes the mean of their BatchNorm statistics, which each has made of its own images."""
        if self.in_group:
            statistics = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
            # In float64 the mean of equal values is that value, so that a second time changes nothing.
            mean = self.mean(torch.cat([buffer.flatten().double() for buffer in statistics]))
            for buffer, values in zip(statistics, mean.split([b.numel() for b in statistics]), strict=True):
                buffer.copy_(values.view_as(buffer))


class AsyncMax:
    """The largest of each of a few numbers over all processes, as of the call before: none waits for the slowest.

    One process alone has its numbers at once.
    """

    def __init__(self, world: World):
        self._world = world
        self._under_way: tuple[Tensor, dist.Work] | None = None

    def __call__(self, *own: int) -> list[int]:
        """To be called by all processes, with as many numbers each time; returns the same in all of them."""
        if not self._world.in_group:
            return list(own)
        before = self.settle() or [0] * len(own)
        numbers = torch.tensor(own)
        self._under_way = numbers, dist.all_reduce(numbers, dist.ReduceOp.MAX, async_op=True)
        return before

    def settle(self) -> list[int]:
        """Wait for what is under way; empty where nothing is. Afterwards it is forgotten."""
        if self._under_way is None:
            return []
        numbers, work = self._under_way
        work.wait()
        self._under_way = None
        return numbers.tolist()


@contextlib.contextmanager
def join(device_name: str | None) -> Iterator[World]:
    """Meet the other processes of the run, if there are any, each on its own device. Raises UserError."""
    size = _number("WORLD_SIZE", 1)
    local_rank = _number("LOCAL_RANK", 0)
    devices = _devices(device_name, local_rank, alone="LOCAL_RANK" not in os.environ)
    if devices[0].type == "cuda":
        torch.cuda.set_device(devices[0])
    else:
        keep_freed_memory()
    if size == 1 and not dist.is_torchelastic_launched():
        yield World(devices)
        return
    store, rank, size = _meeting_point()
    on_cuda = devices[0].type == "cuda"
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_cuda else "gloo",
        store=dist.PrefixStore("run", store),
        rank=rank,
        world_size=size,
        timeout=PATIENCE,
        device_id=devices[0] if on_cuda else None,
    )
    yield World(devices, rank, size, local_rank, in_group=True)
    dist.destroy_process_group()  # not after an error: it may wait for processes that no longer answer


class _InPrecision(nn.Module):
    """A module as DataParallel has to call it: its threads know that autocast is on, but not in which precision."""

    def __init__(self, module: nn.Module, amp_dtype: torch.dtype):
        super().__init__()
        self.module, self.amp_dtype = module, amp_dtype

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, self.amp_dtype, enabled=torch.is_autocast_enabled(x.device.type)):
            return self.module(x)


def each_waits_for_the_last(model: nn.Module, last: bool) -> contextlib.AbstractContextManager:
    """For one of several backward passes of a step: gradients travel between processes with the last one only."""
    waits = isinstance(model, nn.parallel.DistributedDataParallel) and not last
    return model.no_sync() if waits else contextlib.nullcontext()


def digest(state: Any) -> str:
    """SHA-256, in hex, of all that a nested state holds."""
    if isinstance(state, Tensor):
        content = state.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    elif isinstance(state, dict):
        content = repr([(key, digest(value)) for key, value in state.items()]).encode()
    elif isinstance(state, (list, tuple)):
        content = repr([digest(value) for value in state]).encode()
    else:
        content = repr(state).encode()
    return hashlib.sha256(content).hexdigest()


def exit_with_status(main: Callable[[], None]) -> NoReturn:
    """Run a script's main(): status 0; 2 for what the user can mend; 130 after Ctrl-C, 143 after SIGTERM; 141 where
    nobody reads what is printed, as behind `| head`. No traceback in any of them.

    Files and memory are the user's to mend as well: a full disk, a missing permission, a batch too large. Of several
    processes the first to fail speaks; the others, which fail in its wake, end in silence.
    """
    with signals_raise() as enough:
        try:
            try:
                main()
                status = 0
            except SystemExit as leaving:  # after --help
                status = leaving.code
            sys.stdout.flush()
        except (Exception, KeyboardInterrupt) as error:
            enough()
            status = _tell(error)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # the interpreter would try again when it ends, and fail with a traceback
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    leave(status)


def leave(status: Any) -> NoReturn:
    """End this process. One of several does without the interpreter's farewell, in the middle of which a thread of
    gloo's that drops its last tensor would abort it.
    """
    if _meeting_point.cache_info().currsize and isinstance(status, int):
        os._exit(status)
    sys.exit(status)


def _tell(error: BaseException) -> int:
    """Say what ends this process, if it is the one to speak; returns the exit status. What is no user's to mend is
    raised again.
    """
    speaks = _first_to_fail()
    status, message = 2, ""
    if isinstance(error, KeyboardInterrupt):
        status, word = (143, "terminated") if isinstance(error, Terminated) else (130, "\ninterrupted")  # after ^C
        message = "; ".join(filter(None, (word, str(error))))
    elif isinstance(error, BrokenPipeError) and _nobody_reads():
        return 141
    elif speaks:
        message = _describe(error)
    if speaks:
        # Names of files and folders may be somebody else's, and a terminal obeys what is not printable.
        message = "".join(c if c == "\n" or c.isprintable() else repr(c)[1:-1] for c in message)
        with contextlib.suppress(BrokenPipeError):
            print(message, file=sys.stderr, flush=True)
    return status


def _nobody_reads() -> bool:
    """Whether stdout is a pipe that has been closed at its other end."""
    try:
        pipe = select.poll()
        pipe.register(sys.stdout.fileno(), 0)  # what is wrong with it is told unasked
        return bool(pipe.poll(0))
    except (AttributeError, OSError):  # no pipe, or a system that has no poll
        return False


def _describe(error: BaseException) -> str:
    """A message for what the user can mend; anything else is raised again."""
    where = f"process {os.environ['RANK']}: " if os.environ.get("RANK", "0") != "0" else ""
    if isinstance(error, (UserError, OSError, UnicodeError)):
        return f"error: {where}{error}"
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(error):
        return f"error: {where}out of memory; a smaller model or fewer images at a time need less"
    if "timed out" in str(error).lower() and isinstance(error, (dist.DistError, RuntimeError)):
        return f"error: {where}has waited {PATIENCE} for another process, in vain; is that one stuck?"
    if isinstance(error, dist.DistError) or "closed by peer" in str(error):
        return f"error: {where}another process has ended without a word; was it killed, or out of memory?"
    if "DataLoader worker" in str(error):
        return f"error: {where}a process that decodes images was killed; fewer workers need less (shared) memory"
    raise error


def _first_to_fail() -> bool:
    """Whether this process is to speak. Where nobody can be asked it is, unless there once was somebody to ask:
    then the process that kept the count has ended, and somebody has spoken.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return True
    try:
        return _meeting_point()[0].add("failures", 1) == 1
    except (UserError, OSError, RuntimeError, ValueError):
        return _meeting_point.cache_info().currsize == 0


@functools.cache
def _meeting_point() -> tuple[dist.Store, int, int]:
    """The store that all processes of the run share, this one's rank, and their number. Raises UserError."""
    _number("RANK", 0)
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UserError(f"WORLD_SIZE is set, but not {', '.join(missing)}; start the processes with torchrun")
    return next(iter(dist.rendezvous("env://")))


def _devices(name: str | None, local_rank: int, *, alone: bool) -> tuple[torch.device, ...]:
    """The named device, or else CUDA where there is one: all GPUs for a process alone, or that of the local rank."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type not in ("cpu", "cuda") or (device.type == "cpu" and device.index):
            raise RuntimeError("there are cpu, cuda, cuda:0, cuda:1, ...")
        if device.type == "cuda" and device.index is None:
            indices = range(torch.cuda.device_count() or 1) if alone else [local_rank]
            devices = tuple(torch.device("cuda", index) for index in indices)
        elif alone or device.type == "cpu":
            devices = (device,)
        else:
            raise RuntimeError("each process takes the GPU of its own number; say cuda")
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
