"""Stop requests by Ctrl-C (SIGINT) or SIGTERM: raised as an error, or noted until it is safe to stop.

Only modules that load fast are imported here: every script starts with `begin`.
"""

import contextlib
import importlib.util
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
REQUIRED = {  # module -> package
    "torch": "PyTorch", "torchvision": "torchvision", "numpy": "NumPy", "yaml": "PyYAML", "PIL": "Pillow",
    "tensorboard": "TensorBoard", "tqdm": "tqdm",
}  # fmt: skip


class Terminated(KeyboardInterrupt):
    """SIGTERM, as KeyboardInterrupt is Ctrl-C."""


class Stopped(Exception):
    """Training stopped after the signal of that number, and its state is saved."""

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


def begin() -> None:
    """To be called before the slow imports. Exits with status 2 if a required package is not installed.

    While the imports run, Ctrl-C ends the process without a traceback. If stdin, stdout or stderr is closed, it is
    replaced by the null device, so that no other file gets its descriptor.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 (open until the process ends)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # it is ignored in a shell's background jobs
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    for module, package in REQUIRED.items():
        if importlib.util.find_spec(module) is None:
            print(f"error: {package} is not installed; run: pip install -r requirements.txt", file=sys.stderr)
            sys.exit(2)


@contextlib.contextmanager
def signals_raise() -> Iterator[Callable[[], None]]:
    """Inside, Ctrl-C raises KeyboardInterrupt and SIGTERM raises Terminated, until the yielded function is called.

    After that SIGTERM, which launchers send more than once, is ignored, and Ctrl-C ends the process at once. Signals
    that are ignored, or have other handlers, do not change.
    """
    process = os.getpid()

    def terminate(number: int, _: FrameType | None) -> None:
        if os.getpid() == process:
            raise Terminated
        signal.signal(number, signal.SIG_DFL)  # a forked child
        os.kill(os.getpid(), number)

    def ignore_further_signals() -> None:
        for number, handler in ((signal.SIGINT, signal.SIG_DFL), (signal.SIGTERM, signal.SIG_IGN)):
            if number in before:
                signal.signal(number, handler)

    raising = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: terminate}
    before = {}
    if threading.current_thread() is threading.main_thread():  # other threads cannot set handlers
        ours = (signal.SIG_DFL, signal.default_int_handler)
        before = {number: signal.getsignal(number) for number in SIGNALS if signal.getsignal(number) in ours}
    for number in before:
        signal.signal(number, raising[number])
    try:
        yield ignore_further_signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class StopRequest:
    """Inside this context SIGINT and SIGTERM are noted in `signum` instead of ending the process.

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
