"""The directory of a run: checks before a start, its lock, its settings and its environment."""

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

AFFECTS_ROUNDING = ("torch", "device", "threads")  # entries of an environment


def check_run_directory(run: Path, config: Config, args: argparse.Namespace) -> None:
    """Raises UserError if a run would be overwritten or resumed with other settings. Changes nothing."""
    holds_run = (run / "config.yaml").exists()
    if not holds_run and (run / "checkpoints").is_dir():
        raise UserError(f"{run}: has checkpoints, but config.yaml is missing; restore a copy, or use another --name")
    if args.resume:
        if not holds_run:
            raise UserError(f"{run}: there is no run to resume; start one without --resume")
        if changes := changed_settings(load_config(run / "config.yaml", {}), config):
            raise UserError(
                f"{run}: cannot be resumed with other settings ({'; '.join(changes)})\n"
                "use its settings, or start another run with --name"
            )
    elif run.is_file() or (run.is_dir() and any(_files_of_a_run(run))):
        if not holds_run:
            raise UserError(f"{run}: exists and is not a run; choose another directory with --logdir or --name")
        if not args.overwrite:
            raise UserError(
                f"{run}: holds a run already; continue with --resume, restart with --overwrite, or use --name"
            )
        if nested := next((path.parent for path in run.rglob("config.yaml") if path.parent != run), None):
            raise UserError(f"{run}: cannot be overwritten, as it contains another run, {nested}; move that away")


@contextlib.contextmanager
def locked_run_directory(run: Path, config: Config, args: argparse.Namespace) -> Iterator[None]:
    """Create the directory if it is missing, and lock it. Raises UserError."""
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{run}: cannot be created ({error}); choose another directory with --logdir") from None
    with sole_writer(run, "choose another directory with --logdir or --name"):
        check_run_directory(run, config, args)  # again: another process may have written here since
        yield


def write_run_directory(run: Path, config: Config, device: torch.device, *, overwrite: bool) -> None:
    """Empty the directory if `overwrite`; write the settings and the environment of this start. Raises UserError."""
    try:
        # config.yaml, which marks a run, is deleted last and written first: a killed start leaves a run.
        for old in sorted(run.iterdir(), key=lambda path: path.name == "config.yaml") if overwrite else ():
            if old.name != RUN_LOCK:
                shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink()
    except OSError as error:
        raise UserError(f"{run}: cannot be emptied ({error}); choose another directory with --logdir") from None
    write_text(run / "config.yaml", to_yaml(config))
    path = run / "environment.json"
    try:
        starts = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
        if not has_shape(starts, [dict.fromkeys(AFFECTS_ROUNDING, object)]):
            raise ValueError("entries are missing or have the wrong type")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({first_line(error)}); restore a copy, or remove it") from None
    starts.append(environment(device))
    first, now = starts[0], starts[-1]
    for name in AFFECTS_ROUNDING:
        if first[name] != now[name]:
            warn(f"{run}: started with {name} {first[name]}, continues with {now[name]}: results may differ")
    write_text(path, json.dumps(starts, indent=2) + "\n")


def _files_of_a_run(run: Path) -> list[Path]:
    """The files in the directory, without those of a start that was killed before it wrote the settings."""
    return [path for path in run.iterdir() if path.name not in (RUN_LOCK, "config.yaml.part")]
