"""Plumbing that names nothing of the science: errors for users, the command line, keyed randomness, the environment."""

import argparse
import difflib
import hashlib
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

import torch


class UserError(Exception):
    """Something the user can mend: one or two lines that say what, where and the remedy."""


def exit_with_status(main: Callable[[], None]) -> NoReturn:
    """Run a script's main(): status 0; 2 for what the user can mend; 130 after Ctrl-C. No traceback in any of them.

    Files and memory are the user's to mend as well: a full disk, a missing permission, a batch too large.
    """
    try:
        main()
    except (UserError, OSError, UnicodeError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "allocate memory" not in str(error):
            raise
        print("error: out of memory; a smaller model or fewer images at a time need less", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as interrupt:
        print(f"\ninterrupted{'; ' if str(interrupt) else ''}{interrupt}", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)


class CommandLine(argparse.ArgumentParser):
    """An argument parser whose errors are one line with a guess at what was meant."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def parse_args(self, args=None, namespace=None):  # type: ignore[override]
        words = sys.argv[1:] if args is None else list(args)
        if "--" in words:
            following = words[words.index("--") + 1 :]
            flag = f"--{following[0]}" if following else ""
            self.error(f"'--' stands alone{f'; did you mean {flag}?' if flag in self._option_string_actions else ''}")
        known, unknown = self.parse_known_args(words, namespace)
        if unknown:
            flag = unknown[0].split("=")[0]
            self.error(f"unknown argument {unknown[0]}{did_you_mean(flag, self._option_string_actions)}")
        return known

    def error(self, message: str) -> NoReturn:
        print(f"error: {message} (python {self.prog} --help lists the arguments)", file=sys.stderr)
        sys.exit(2)


def did_you_mean(word: Any, known: Iterable[str]) -> str:
    """A question to append to an error message, empty if nothing known is close."""
    close = difflib.get_close_matches(str(word), list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)


def keyed_seed(*key: Any) -> int:
    """A seed that is a function of the key alone: keyed_seed(seed, "crop", epoch, step)."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:4], "little")


def keyed_generator(*key: Any) -> torch.Generator:
    """A CPU generator seeded by the key, so that no draw depends on which draws came before it."""
    return torch.Generator().manual_seed(keyed_seed(*key))


def choose_device(name: str | None) -> torch.device:
    """The named device, or CUDA where there is one. Raises UserError for one that this machine lacks."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type not in ("cpu", "cuda") or (device.type == "cpu" and device.index):
            raise RuntimeError("there are cpu, cuda, cuda:0, cuda:1, ...")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: cannot be used here ({str(error).splitlines()[0]})") from None
    return device


def seed_everything(seed: int, device: torch.device, deterministic: bool) -> None:
    """Seed the default generators, which the networks' own noise draws from, and choose exact or fast CUDA kernels."""
    torch.manual_seed(keyed_seed(seed, "network"))
    if deterministic and device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = device.type == "cuda" and not deterministic


def random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """State of the default generators, to be put back by `set_random_state`."""
    state = {"cpu": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def set_random_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def environment(device: torch.device, packages: Iterable[str] = ("torch", "torchvision", "numpy", "pillow")) -> dict:
    """What a result depends on besides its settings: versions, device, threads, git revision, command."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        **{package: metadata.version(package) for package in packages},
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{device.type} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "git_revision": _git_revision(),
        "command": shlex.join(["python", *sys.argv]),
    }


def _git_revision() -> str | None:
    """Revision of the source, with '+' appended if files differ from it; None outside a checkout."""
    try:
        git = ["git", "-C", str(Path(__file__).parent)]
        revision = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        changes = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True, check=True
        ).stdout
        return revision + ("+" if changes.strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return None
