"""The wish that a run stop, by Ctrl-C (SIGINT) or SIGTERM: noted, and heeded where nothing is lost."""

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(Exception):
    """Work has been stopped as it was wished, by the signal of that number; what was done is saved."""

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class Wish:
    """While it is entered, SIGINT and SIGTERM are noted in `signum` instead of ending the process.

    A second Ctrl-C ends it at once, whatever it is doing. A launcher (torchrun) hands on the Ctrl-C that the terminal
    has sent to all already, so that each press arrives twice: under one, the third signal ends it.

    says: what is to be written to stderr when the first one comes, given its name; nothing where it is None.
    """

    def __init__(self, says: Callable[[str], str] | None = None):
        self.signum = 0
        self._says = says
        self._left = 2 if "TORCHELASTIC_RUN_ID" in os.environ else 1  # times that SIGINT is borne

    def __enter__(self) -> "Wish":
        self._process = os.getpid()
        of_the_main_thread = threading.current_thread() is threading.main_thread()  # no other may handle signals
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS if of_the_main_thread}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        if os.getpid() != self._process:  # one that decodes images, and is needed until the step is finished
            return
        if number == signal.SIGINT:
            self._left -= 1
            if self._left == 0:
                signal.signal(signal.SIGINT, signal.SIG_DFL)  # which works even where Python does not get its turn
        if not self.signum and self._says is not None:
            # print() is not for signal handlers: the process may be in the middle of one.
            os.write(2, f"\n{self._says(signal.Signals(number).name)}\n".encode())
        self.signum = self.signum or number
