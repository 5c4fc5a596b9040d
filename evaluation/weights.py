"""Weights to score: a model.pt of main.py, or a state dict from any other program.

Of other programs' files, what torch's own strict load takes is taken, and what is plainly the same: under another name,
inside wrappers that prefix every name, with counters that are no weights. Nothing in a file is executed.
"""

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
from utils import UserError, first_line, has_shape, load_hashed, printable, sha256_of, warn

# The settings that scores depend on. They may be changed when a checkpoint is scored; all others are the training's.
SCORING = ("model", "dropout", "dataset", "image_size", "eval_view", "skip_unreadable", "mean", "std")
MODEL_FILE = {"model": dict, "classes": [str], "config": dict, "epoch": int}

# Names under which programs keep the weights, in the order of preference, and a part of those of moving averages.
USUAL_NAMES = ("", "state_dict", "model_state_dict", "model", "net", "network", "module", "params", "weights")
AVERAGED = re.compile(r"(?<![a-z])(ema|swa)(?![a-z])|averag", re.IGNORECASE)
COUNTERS = ("n_averaged", "total_ops", "total_params")  # of torch.optim.swa_utils and of thop
# Beginnings of files that are no checkpoints: what they are, and the remedy.
OTHER_FILES = (
    (b"", "is empty; copy or download it again"),
    (b"version https://git-lfs", "is a Git LFS pointer, not the file itself; fetch that with: git lfs pull"),
    (b"\x1f\x8b", "is compressed by gzip; unpack it with gunzip"),
    (b"BZh", "is compressed by bzip2; unpack it with bunzip2"),
    (b"\xfd7zXZ", "is compressed by xz; unpack it with unxz"),
    (b"<", "is a web page; download the file itself"),
)


@dataclass(frozen=True)
class Classifier:
    """Weights to score, with the network and the data set they are for.

    config: the settings to score with. trained_with: those of the training; like epoch and classes it is None for a
    file that was not written by main.py. averaged: whether the weights are the average that a run keeps beside its
    own (the setting `ema`). only_checkpoint: only the file names config.dataroot, and it is outside the
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
    averaged: bool = False
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
    """Every classifier that the command line names: by files, or by the arguments of runs. Raises UserError.

    Of a run that keeps an average of its weights, both are scored, or the one that --ema or --no-ema picks.
    """
    for file in dict.fromkeys(args.checkpoint or args.weights or [None]):
        for seed in dict.fromkeys(args.seed or [None]):
            own_args = argparse.Namespace(**vars(args) | {"seed": seed})
            if args.weights:
                yield load_state_dict(own_args, file)
            else:
                yield from load_checkpoint(own_args, file)


def load_checkpoint(args: argparse.Namespace, file: Path | None) -> Iterator[Classifier]:
    """The weights in the model.pt of main.py at `file`, which may be its run directory, and their average.

    file: None for that of the run of these arguments. Raises UserError.
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
    has_average = _is_state_dict(content.get("ema"))
    if args.ema and not has_average:
        raise UserError(f"--ema: {file} holds no averaged weights; leave it out, or train with --set ema=0.999")
    for averaged in (False, True) if has_average else (False,):
        if args.ema in (None, averaged) or not has_average:
            weights, epoch = content["ema" if averaged else "model"], content["epoch"]
            yield Classifier(
                file, sha256, weights, config, len(classes), classes, trained_with, epoch, averaged, only_checkpoint
            )


def load_state_dict(args: argparse.Namespace, file: Path) -> Classifier:
    """A state dict, also nested in a training checkpoint, or saved from a wrapped module. Raises UserError."""
    overrides = overrides_from(args) | {"model": ("--model", args.model)}
    families = {find_spec(name).family for name in args.benchmarks if name != "all"} - {None}
    conf = args.load_conf
    if conf is None and "dataset" not in overrides:
        if len(families) != 1:
            raise UserError(f"{file}: name the data set it is for, with --load_conf or --set dataset=NAME")
        overrides = {"dataset": ("--benchmarks", families.pop())} | overrides
    if conf is None:
        overrides = {"crop_padding": ("--benchmarks", 0)} | overrides  # for training; not every data set allows it
    classifier, mean_and_std = read_state_dict(file, load_config(conf, overrides), averaged=bool(args.ema))
    own = {name: value for name, value in mean_and_std.items() if name not in overrides}
    if not own:
        return classifier
    values = " and ".join(f"{name} {[round(v, 4) for v in value]}" for name, value in own.items())
    warn(f"{file}: its own normalisation is used, {values}")
    return dataclasses.replace(classifier, config=dataclasses.replace(classifier.config, **own))


def read_state_dict(
    file: Path, config: Config, *, averaged: bool = False
) -> tuple[Classifier, dict[str, tuple[float, ...]]]:
    """A file's weights for the network of the config, and mean and std where the file has them. Raises UserError."""
    content, sha256 = _load(file)
    options = config.model_options()
    with torch.device("meta"):
        two, three = (build_model(config.model, classes, **options).state_dict() for classes in (2, 3))
    weights, mean_and_std = _unwrapped(_choose(_state_dicts(content), file, averaged=averaged), two)
    # The bias that grows with the number of classes; where it is missing, `build` says so.
    bias = weights.get(next(name for name in two if two[name].shape != three[name].shape and two[name].ndim == 1))
    classes = len(bias) if bias is not None and bias.ndim == 1 else 10
    return Classifier(file, sha256, weights, config, classes), mean_and_std


def _state_dicts(content: Any, where: str = "", depth: int = 0) -> dict[str, dict[str, Tensor]]:
    """The state dicts in a file, by where they are: "" for the file itself, "model", "model.state_dict", ..."""
    if _is_state_dict(content):
        return {where: content}
    found = {}
    if isinstance(content, dict) and depth < 3:
        for key, value in content.items():
            if isinstance(key, str) and "optim" not in key:  # its moments have the names of weights
                found |= _state_dicts(value, f"{where}.{key}" if where else key, depth + 1)
    return found


def _choose(found: dict[str, dict[str, Tensor]], file: Path, *, averaged: bool) -> dict[str, Tensor]:
    """The state dict to score, raw or averaged. Raises UserError where there is none, or none to be preferred."""
    if not found:
        raise UserError(f"{file}: does not hold a state dict (names with tensors)")
    averages = [where for where in found if AVERAGED.search(where)]
    raw = [where for where in found if where not in averages]
    if averaged and not averages:
        raise UserError(f"--ema: {file} holds no averaged weights, only {_listed(raw)}; leave it out")
    candidates = averages if averaged else raw or averages
    candidates.sort(key=_rank)
    if len(candidates) > 1 and _rank(candidates[0]) == _rank(candidates[1]):
        raise UserError(f"{file}: holds several state dicts ({_listed(candidates)}); save the one to score alone")
    chosen = candidates[0]
    if raw and averages:
        other = f"those of {_listed(raw)} without --ema" if averaged else f"those of {_listed(averages)} with --ema"
        warn(f"{file}: the weights of {_listed([chosen])} are scored, {other}")
    return found[chosen]


def _rank(where: str) -> list[int]:
    return [USUAL_NAMES.index(name) if name in USUAL_NAMES else len(USUAL_NAMES) for name in where.split(".")]


def _listed(places: list[str]) -> str:
    return printable(", ".join(f"'{where}'" for where in places[:4]), 160)


def _unwrapped(
    weights: dict[str, Tensor], expected: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, tuple[float, ...]]]:
    """The weights with the network's own names, and mean and std where they hold a layer that normalises.

    expected: the network's state dict, for any number of classes.
    """
    weights = {name.replace("_orig_mod.", ""): value for name, value in weights.items()}
    last = {name: name.rpartition(".")[2] for name in weights if name not in expected}
    weights = {name: value for name, value in weights.items() if last.get(name) not in COUNTERS}
    mean_and_std = {}
    for setting, names in (("mean", ("mean", "mu")), ("std", ("std", "sigma"))):
        layers = [name for name in weights if last.get(name) in names and weights[name].numel() == 3]
        if len(layers) == 1:
            mean_and_std[setting] = tuple(weights.pop(layers[0]).flatten().tolist())
    while not weights.keys() & expected.keys():
        prefixes = {name.partition(".")[0] for name in weights}
        if len(prefixes) != 1 or not all("." in name for name in weights):
            break
        weights = {name.partition(".")[2]: value for name, value in weights.items()}
    for name, value in expected.items():
        if name.endswith("num_batches_tracked"):  # which older versions of torch did not save
            found = weights.get(name, torch.zeros(()))
            weights[name] = (found[0] if found.shape == (1,) else found).to(value.dtype)
    return weights, mean_and_std


def _load(file: Path) -> tuple[Any, str]:
    """The content of a file of torch.save or of safetensors, and its SHA-256. Raises UserError."""
    if file.is_file():
        with file.open("rb") as opened:
            head = opened.read(64)
        for start, problem in OTHER_FILES:
            if head.lstrip().startswith(start) if start else not head:
                raise UserError(f"{file}: {problem}")
        if head[8:10] == b'{"':
            return _load_safetensors(file)
        if not head.startswith((b"PK", b"\x80")):  # a zip archive, or a pickle
            raise UserError(f"{file}: cannot be read as a checkpoint (it was not written by torch.save)")
    return load_hashed(file)


def _load_safetensors(file: Path) -> tuple[dict[str, Tensor], str]:
    try:
        from safetensors.torch import load_file
    except ImportError:
        raise UserError(f"{file}: needs the package safetensors; run: pip install safetensors") from None
    try:
        return load_file(file), sha256_of(file)
    except Exception as error:  # SafetensorError, and what tensors of odd types raise
        raise UserError(f"{file}: cannot be read as safetensors ({first_line(error)})") from None


def _existing_checkpoints(logdir: Path) -> str:
    runs = sorted(str(path.parent) for path in logdir.glob("*/model.pt"))
    return f"runs with one: {', '.join(runs)}" if runs else "train one with main.py, or name a file with --checkpoint"


def _is_state_dict(content: Any) -> bool:
    """Whether it holds tensors by name, with values that can be loaded."""
    return (
        isinstance(content, dict)
        and bool(content)
        and all(isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items())
        and not any(v.is_meta or v.layout != torch.strided or v.is_complex() for v in content.values())
    )
