"""The wish that a process stop, by Ctrl-C (SIGINT) or SIGTERM: raised as an error, or noted and heeded when it is safe.

Nothing is imported here that takes time: scripts begin with this.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Terminated(KeyboardInterrupt):
    """By SIGTERM, as KeyboardInterrupt is by Ctrl-C."""


class Stopped(Exception):
    """Work has been stopped as it was wished, by the signal of that number; what was done is saved."""

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


def begin() -> None:
    """For the seconds that a script's imports take, Ctrl-C ends it in silence: there is nothing to keep yet.

    Where stdin, stdout or stderr was closed before the start, what is written there goes nowhere, and no file gets its
    number by chance.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 (for as long as it runs)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # in the background of a shell it is ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextlib.contextmanager
def signals_raise() -> Iterator[Callable[[], None]]:
    """Meanwhile Ctrl-C raises KeyboardInterrupt, and SIGTERM Terminated, until what is given is called.

    From then on SIGTERM, which launchers repeat, is ignored, and Ctrl-C ends the process at once. Signals that are
    ignored, or handled by others, stay as they are.
    """
    process = os.getpid()

    def terminate(number: int, _: FrameType | None) -> None:
        if os.getpid() == process:
            raise Terminated
        signal.signal(number, signal.SIG_DFL)  # a child that was forked
        os.kill(os.getpid(), number)

    def enough() -> None:
        for number, handler in ((signal.SIGINT, signal.SIG_DFL), (signal.SIGTERM, signal.SIG_IGN)):
            if number in before:
                signal.signal(number, handler)

    raising = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: terminate}
    before = {}
    if threading.current_thread() is threading.main_thread():  # no other may handle signals
        ours = (signal.SIG_DFL, signal.default_int_handler)
        before = {number: signal.getsignal(number) for number in SIGNALS if signal.getsignal(number) in ours}
    for number in before:
        signal.signal(number, raising[number])
    try:
        yield enough
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class StopRequest:
    """While it is entered, SIGINT and SIGTERM are noted in `signum` instead of ending the process.

    A second Ctrl-C ends it at once, whatever it is doing. A launcher (torchrun) hands on the Ctrl-C that the terminal
    has sent to all already, so that each press arrives twice: under one, the third signal ends it.

    says: what is to be written to stderr when the first one comes, given its name; nothing where it is None.
    """

    def __init__(self, says: Callable[[str], str] | None = None):
        self.signum = 0
        self._says = says
        self._left = 2 if "TORCHELASTIC_RUN_ID" in os.environ else 1  # times that SIGINT is borne

    def __enter__(self) -> "StopRequest":
        self._process = os.getpid()
        of_the_main_thread = threading.current_thread() is threading.main_thread()
        numbers = [n for n in SIGNALS if of_the_main_thread and signal.getsignal(n) is not signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        if os.getpid() != self._process:  # a child that was forked, and is needed until the step is finished
            return
        if number == signal.SIGINT:
            self._left -= 1
            if self._left == 0:
                signal.signal(signal.SIGINT, signal.SIG_DFL)  # which works even where Python does not get its turn
        first, self.signum = not self.signum, self.signum or number
        if first and self._says is not None:
            words = f"\n{self._says(signal.Signals(number).name)}\n"
            with contextlib.suppress(OSError):  # who reads it, as `| tee`, may have ended by the same Ctrl-C
                os.write(2, words.encode())  # the process may be in the middle of a print()
