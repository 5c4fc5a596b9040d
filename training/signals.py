"""Stop requests by Ctrl-C (SIGINT), SIGTERM or SIGUSR1: raised as an error, or noted until it is safe to stop.

Batch systems send SIGTERM or SIGUSR1 before a job's time is over (Slurm: --signal=USR1@120); both mean the same here.
Only modules that load fast are imported here: every script starts with `begin`.
"""

import contextlib
import importlib.util
import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

TERMINATING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))
SIGNALS = (signal.SIGINT, *TERMINATING)
REQUIRED = {  # module -> package
    "torch": "PyTorch", "torchvision": "torchvision", "numpy": "NumPy", "yaml": "PyYAML", "PIL": "Pillow",
    "tensorboard": "TensorBoard", "tqdm": "tqdm",
}  # fmt: skip


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGUSR1, as KeyboardInterrupt is Ctrl-C."""


class Stopped(Exception):
    """Training stopped after the signal of that number, and its state is saved."""

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


def begin() -> None:
    """To be called before the slow imports. Exits with status 2 if a required package is not installed.

    While the imports run, Ctrl-C ends the process without a traceback, and SIGUSR1 as SIGTERM does. If stdin, stdout or
    stderr is closed, it is replaced by the null device, so that no other file gets its descriptor. What stdout cannot
    encode, such as names of files that are not Unicode, is printed as escapes. matplotlib draws without a screen: a
    notebook's own backend, which its shell exports, may not be installed here.
    """
    os.environ["MPLBACKEND"] = "agg"
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 (open until the process ends)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # it is ignored in a shell's background jobs
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    if hasattr(signal, "SIGUSR1") and signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL:
        signal.signal(signal.SIGUSR1, _exit_as_terminated)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    for module, package in REQUIRED.items():
        if importlib.util.find_spec(module) is None:
            print(f"error: {package} is not installed; run: pip install -r requirements.txt", file=sys.stderr)
            sys.exit(2)


def _exit_as_terminated(*_: object) -> None:
    os._exit(128 + signal.SIGTERM)


@contextlib.contextmanager
def signals_raise() -> Iterator[Callable[[], None]]:
    """Inside, Ctrl-C raises KeyboardInterrupt, SIGTERM and SIGUSR1 Terminated, until the yielded function is called.

    After that these two, which launchers send more than once, are ignored, and Ctrl-C ends the process at once. Signals
    that are ignored, or have other handlers, do not change.
    """
    process = os.getpid()

    def terminate(number: int, _: FrameType | None) -> None:
        if os.getpid() == process:
            raise Terminated
        signal.signal(number, signal.SIG_DFL)  # a forked child
        os.kill(os.getpid(), number)

    def ignore_further_signals() -> None:
        for number in before:
            signal.signal(number, signal.SIG_DFL if number == signal.SIGINT else signal.SIG_IGN)

    raising = {signal.SIGINT: signal.default_int_handler} | dict.fromkeys(TERMINATING, terminate)
    before = {}
    if threading.current_thread() is threading.main_thread():  # other threads cannot set handlers
        ours = (signal.SIG_DFL, signal.default_int_handler, _exit_as_terminated)
        before = {number: signal.getsignal(number) for number in SIGNALS if signal.getsignal(number) in ours}
    for number in before:
        signal.signal(number, raising[number])
    try:
        yield ignore_further_signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class StopRequest:
    """Inside this context SIGINT, SIGTERM and SIGUSR1 are noted in `signum` instead of ending the process.

    A second Ctrl-C ends the process at once. Under torchrun, which repeats the Ctrl-C that the terminal has already
    sent to all processes, the third SIGINT does.

    message: returns the line to print to stderr at the first signal, given the signal's name.
    """

    def __init__(self, message: Callable[[str], str] | None = None):
        self.signum = 0
        self._message = message
        self._noted_interrupts = 2 if "TORCHELASTIC_RUN_ID" in os.environ else 1

    def __enter__(self) -> "StopRequest":
        self._process = os.getpid()
        in_main_thread = threading.current_thread() is threading.main_thread()
        numbers = [n for n in SIGNALS if in_main_thread and signal.getsignal(n) is not signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        if os.getpid() != self._process:  # a forked child, which the step under way still needs
            return
        if number == signal.SIGINT:
            self._noted_interrupts -= 1
            if self._noted_interrupts == 0:
                signal.signal(signal.SIGINT, signal.SIG_DFL)  # works even while C code keeps Python from running
        is_first = not self.signum
        self.signum = self.signum or number
        if is_first and self._message is not None:
            text = f"\n{self._message(signal.Signals(number).name)}\n"
            with contextlib.suppress(OSError):  # the reader, as `| tee`, may have ended by the same Ctrl-C
                os.write(2, text.encode())  # print() cannot be used: a signal may arrive inside another print()
