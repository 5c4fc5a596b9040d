"""The directory of a run: whose it is, what it says of itself, and who may write there."""

import argparse
import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch

from config import Config, changed_settings, load_config, to_yaml
from training.lock import RUN_LOCK, sole_writer
from utils import UserError, environment, first_line, has_shape, warn, write_text

THAT_ROUND = ("torch", "device", "threads")  # of an environment: with others, numbers are rounded otherwise


def check_run_directory(run: Path, config: Config, args: argparse.Namespace) -> None:
    """Refuse to write over a run, or to resume one that was another. Nothing is changed yet."""
    holds_run = (run / "config.yaml").exists()
    if not holds_run and (run / "checkpoints").is_dir():
        raise UserError(
            f"{run}: has checkpoints, but not their config.yaml; put a copy back, or choose another place with --name"
        )
    if args.resume:
        if not holds_run:
            raise UserError(f"{run}: there is no run to resume; leave out --resume to start one")
        if changes := changed_settings(load_config(run / "config.yaml", {}), config):
            raise UserError(
                f"{run}: cannot be resumed with other settings ({'; '.join(changes)})\n"
                "ask for the settings it has, or start another run with --name"
            )
    elif run.is_file() or (run.is_dir() and any(_not_of_a_start(run))):
        if not holds_run:
            raise UserError(f"{run}: exists and is not a run; choose another place with --logdir or --name")
        if not args.overwrite:
            raise UserError(
                f"{run}: holds a run already; go on with --resume, start anew with --overwrite, or use --name"
            )
        if nested := next((path.parent for path in run.rglob("config.yaml") if path.parent != run), None):
            raise UserError(f"{run}: cannot be overwritten, for another run lies below it, in {nested}; move that away")


@contextlib.contextmanager
def held(run: Path, config: Config, args: argparse.Namespace) -> Iterator[None]:
    """Make the directory where it is missing, and let nobody else write there meanwhile. Raises UserError."""
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{run}: cannot be made ({error}); choose another place with --logdir") from None
    with sole_writer(run, "choose another place with --logdir or --name"):
        check_run_directory(run, config, args)  # again: another may have been here in between
        yield


def write_run_directory(run: Path, config: Config, device: torch.device, *, afresh: bool) -> None:
    """Empty the directory if `afresh`; write the settings, and where and with what this start computes."""
    try:
        # config.yaml, which says that this is a run, goes last and comes first: killed in between, it still is one.
        for old in sorted(run.iterdir(), key=lambda path: path.name == "config.yaml") if afresh else ():
            if old.name != RUN_LOCK:
                shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink()
    except OSError as error:
        raise UserError(f"{run}: cannot be emptied ({error}); choose another place with --logdir") from None
    write_text(run / "config.yaml", to_yaml(config))
    path = run / "environment.json"
    try:
        starts = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
        if not has_shape(starts, [dict.fromkeys(THAT_ROUND, object)]):
            raise ValueError("entries are missing or of another kind")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({first_line(error)}); put a copy back, or remove it") from None
    starts.append(environment(device))
    first, now = starts[0], starts[-1]
    for name in THAT_ROUND:
        if first[name] != now[name]:
            warn(f"{run}: began with {name} {first[name]}, goes on with {now[name]}: not bit for bit the same")
    write_text(path, json.dumps(starts, indent=2) + "\n")


def _not_of_a_start(run: Path) -> list[Path]:
    """What lies in the directory besides what a start leaves that is killed before it has written the settings."""
    return [path for path in run.iterdir() if path.name not in (RUN_LOCK, "config.yaml.part")]
