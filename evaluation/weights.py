"""Weights to score: a model.pt of main.py, or a state dict from any other program."""

import argparse
import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from config import DEFAULT_CONF, Config, load_config, overrides_from, run_directory, stays_below
from evaluation.benchmarks import find_spec
from models import build_model
from utils import UserError, has_shape, load_hashed, printable

# The settings that scores depend on. They may be changed when a checkpoint is scored; all others are the training's.
SCORING = ("model", "dropout", "dataset", "image_size", "eval_view", "skip_unreadable", "mean", "std")
MODEL_FILE = {"model": dict, "classes": [str], "config": dict, "epoch": int}


@dataclass(frozen=True)
class Classifier:
    """Weights to score, with the network and the data set they are for.

    config: the settings to score with. trained_with: those of the training; like epoch and classes it is None for a
    file that was not written by main.py. only_checkpoint: only the file names config.dataroot, and it is outside the
    working directory: nothing may be written there.
    """

    file: Path
    sha256: str
    weights: dict[str, Tensor]
    config: Config
    num_classes: int
    classes: tuple[str, ...] | None = None
    trained_with: Config | None = None
    epoch: int | None = None
    only_checkpoint: bool = False

    def build(self) -> nn.Module:
        """The network with the weights, on the CPU. Raises UserError where they do not fit."""
        options = self.config.model_options()
        with torch.device("meta"):  # the settings come from the file, too: they may ask for more than any memory
            expected = build_model(self.config.model, self.num_classes, **options).state_dict()
        found = {name: tuple(value.shape) for name, value in self.weights.items()}
        problems = [f"{printable(name, 80)} is unknown" for name in found if name not in expected]
        for name, value in expected.items():
            if name not in found:
                problems.append(f"{name} is missing")
            elif found[name] != tuple(value.shape):
                problems.append(f"{name} is {found[name]} instead of {tuple(value.shape)}")
        if problems:
            more = f" and {len(problems) - 2} more" if len(problems) > 2 else ""
            raise UserError(
                f"{self.file}: does not fit {self.config.model} with {self.num_classes} classes: "
                f"{'; '.join(problems[:2])}{more}"
            )
        model = build_model(self.config.model, self.num_classes, **options)
        model.load_state_dict(self.weights)
        return model


def load_classifiers(args: argparse.Namespace) -> Iterator[Classifier]:
    """Every classifier that the command line names: by files, or by the arguments of runs. Raises UserError."""
    for file in dict.fromkeys(args.checkpoint or args.weights or [None]):
        for seed in dict.fromkeys(args.seed or [None]):
            own_args = argparse.Namespace(**vars(args) | {"seed": seed})
            yield load_state_dict(own_args, file) if args.weights else load_checkpoint(own_args, file)


def load_checkpoint(args: argparse.Namespace, file: Path | None) -> Classifier:
    """The model.pt of main.py at `file`, which may be its run directory; None: that of the run of these arguments.

    Raises UserError.
    """
    overrides = overrides_from(args)
    requested = load_config(args.load_conf or DEFAULT_CONF, overrides) if args.load_conf or not file else None
    by_name = file is not None or args.name is not None
    if file is None or file.is_dir():
        file = (file or run_directory(args, requested)) / "model.pt"
    if not file.exists():
        raise UserError(f"{file}: there is no such checkpoint; {_existing_checkpoints(args.logdir)}")
    content, sha256 = _load(file)
    if not has_shape(content, MODEL_FILE) or not _is_state_dict(content["model"]) or content["epoch"] < 0:
        raise UserError(
            f"{file}: is not a model.pt of main.py; score other state dicts with --model NAME --weights FILE"
        )
    settings = {field: (str(file), value) for field, value in content["config"].items()}
    trained_with = load_config(None, settings)
    may_differ = {field.name for field in dataclasses.fields(Config) if field.metadata["may_change"]} | {*SCORING}
    config = load_config(None, settings | {field: value for field, value in overrides.items() if field in may_differ})
    if by_name and args.load_conf and (requested.model, requested.dataset) != (config.model, config.dataset):
        raise UserError(
            f"{file}: is a {config.model} for {config.dataset}, but {args.load_conf} asks for "
            f"a {requested.model} for {requested.dataset}; leave out --load_conf, or name another checkpoint"
        )
    classes = tuple(content["classes"])
    only_checkpoint = "dataroot" not in overrides and not stays_below(config.dataroot)
    return Classifier(
        file, sha256, content["model"], config, len(classes), classes, trained_with, content["epoch"], only_checkpoint
    )


def load_state_dict(args: argparse.Namespace, file: Path) -> Classifier:
    """A state dict, also nested in a training checkpoint or saved from a wrapped module. Raises UserError."""
    overrides = overrides_from(args) | {"model": ("--model", args.model)}
    families = {find_spec(name).family for name in args.benchmarks if name != "all"} - {None}
    conf = args.load_conf
    if conf is None and "dataset" not in overrides:
        if len(families) != 1:
            raise UserError(f"{file}: name the data set it is for, with --load_conf or --set dataset=NAME")
        overrides = {"dataset": ("--benchmarks", families.pop())} | overrides
    if conf is None:
        overrides = {"crop_padding": ("--benchmarks", 0)} | overrides  # for training; not every data set allows it
    config = load_config(conf, overrides)
    content, sha256 = _load(file)
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not _is_state_dict(content):
        raise UserError(f"{file}: does not hold a state dict (names with tensors)")
    weights = {re.sub(r"^((module|_orig_mod)\.)+", "", name): value for name, value in content.items()}
    return Classifier(file, sha256, weights, config, _number_of_classes(weights, config))


def _load(file: Path) -> tuple[Any, str]:
    """The content of a file written by torch.save, and its SHA-256. Raises UserError."""
    if file.is_file():
        with file.open("rb") as opened:
            if not opened.read(2).startswith((b"PK", b"\x80")):  # a zip archive, or a pickle
                raise UserError(f"{file}: cannot be read as a checkpoint (it was not written by torch.save)")
    return load_hashed(file)


def _existing_checkpoints(logdir: Path) -> str:
    runs = sorted(str(path.parent) for path in logdir.glob("*/model.pt"))
    return f"runs with one: {', '.join(runs)}" if runs else "train one with main.py, or name a file with --checkpoint"


def _number_of_classes(weights: dict[str, Tensor], config: Config) -> int:
    """The size of the bias that grows with the number of classes, or 10 where it is missing."""
    with torch.device("meta"):
        two, three = (build_model(config.model, classes, **config.model_options()).state_dict() for classes in (2, 3))
    bias = next(name for name in two if two[name].shape != three[name].shape and two[name].ndim == 1)
    return len(weights[bias]) if bias in weights and weights[bias].ndim == 1 else 10


def _is_state_dict(content: Any) -> bool:
    """Whether it holds tensors by name, with values that can be loaded."""
    return (
        isinstance(content, dict)
        and bool(content)
        and all(isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items())
        and not any(v.is_meta or v.layout != torch.strided or v.is_complex() for v in content.values())
    )
