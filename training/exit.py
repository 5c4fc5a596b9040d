"""How a script ends: its exit status and, on failure, one message without a traceback."""

import contextlib
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from training.distributed import has_looked_for_others, is_first_to_fail
from training.signals import Terminated, signals_raise
from utils import UserError

USER_ERROR, INTERRUPTED, BROKEN_PIPE, TERMINATED = 2, 130, 141, 143


def exit_with_status(main: Callable[[], None]) -> NoReturn:
    """Run a script's main() and end the process, with status 0 or that of SystemExit.

    2: user errors, which include file errors (a full disk, a missing permission) and too little memory. 130: Ctrl-C;
    143: SIGTERM, SIGUSR1. 141: the reader of stdout has gone, as with `| head`; without a message. Of several processes
    only the first to fail prints. Other errors, which are bugs, are raised.
    """
    with signals_raise() as ignore_further_signals:
        try:
            try:
                main()
                status = 0
            except SystemExit as end:  # after --help
                status = end.code
            sys.stdout.flush()
        except (Exception, KeyboardInterrupt) as error:
            ignore_further_signals()
            status, message = _status_and_message(error)
            is_first = is_first_to_fail(patience=0.0 if isinstance(error, KeyboardInterrupt) else 10.0)
            if is_first and message is None:
                raise
            if is_first and message:
                # File names may hold control characters, which a terminal would obey.
                message = "".join(c if c == "\n" or c.isprintable() else repr(c)[1:-1] for c in message)
                with contextlib.suppress(BrokenPipeError):
                    print(message, file=sys.stderr, flush=True)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # the interpreter would flush again at its end and print a traceback
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    leave(status)


def leave(status: Any) -> NoReturn:
    """End this process; with other processes skip the interpreter's clean-up, in which gloo's threads may abort."""
    if has_looked_for_others() and isinstance(status, int):
        os._exit(status)
    sys.exit(status)


def _status_and_message(error: BaseException) -> tuple[int, str | None]:
    """The message is empty if nothing is to be printed, and None if the error is a bug."""
    rank = os.environ.get("RANK", "0")
    start = "error: " if rank == "0" else f"error: process {rank}: "
    text = str(error)
    if isinstance(error, Terminated):
        return TERMINATED, "; ".join(filter(None, ("terminated", text)))
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, "; ".join(filter(None, ("\ninterrupted", text)))  # below the terminal's ^C
    if isinstance(error, BrokenPipeError):
        return BROKEN_PIPE, ""
    if isinstance(error, (UserError, OSError, UnicodeError)):
        return USER_ERROR, f"{start}{text}"
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in text:
        return USER_ERROR, f"{start}out of memory; use a smaller model or batch_size, or a larger accumulate"
    if isinstance(error, dist.DistError) or any(words in text for words in ("closed by peer", "Timed out waiting")):
        return USER_ERROR, f"{start}another process ended or does not answer; was it killed, or out of memory?"
    if "DataLoader worker" in text:
        return USER_ERROR, f"{start}a process that decodes images was killed; fewer workers need less (shared) memory"
    return USER_ERROR, None
