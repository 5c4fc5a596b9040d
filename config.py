"""Every setting of a run: default, meaning, unit and checks. default < conf file < command line.

The defaults are the paper's for CIFAR. A conf file under confs/ holds only what differs.
"""

import argparse
import dataclasses
import itertools
import math
import os
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from augmentations import OPS
from models import check_model
from utils import UserError, did_you_mean, first_line, printable, require_file, short_repr

ALL_OPS = tuple(op.name for op in OPS)
DEFAULT_CONF = Path(__file__).parent / "confs" / "demo.yaml"
DATASETS = ("shapes", "cifar10", "cifar100", "imagenet", "folder")
FROM_A_FILE = ("recorded", "frozen")
PER_IMAGE = ("trivialaugment", "randaugment", "autoaugment_cifar10", "autoaugment_imagenet", "augmix")
POLICIES = ("controller", "random", "none", *FROM_A_FILE, *PER_IMAGE)
LONGEST_CONF = 65536  # bytes; all settings with all that is said of them here are a tenth of it


def setting(default: Any, doc: str, *, may_change: bool = False) -> Any:
    """A field with its one-line description. `may_change`: a resumed run may have another value."""
    return dataclasses.field(default=default, metadata={"doc": doc, "may_change": may_change})


@dataclass(frozen=True)
class Config:
    """A run's settings. Raises ConfigError for a value that cannot be."""

    # What is learned from what
    model: str = setting("wresnet28_10", "network, by name: see models/__init__.py")
    dropout: float = setting(0.0, "dropout probability inside the network's blocks")
    dataset: str = setting(
        "cifar10", "shapes (embedded), cifar10, cifar100, imagenet or folder (images in class folders)"
    )
    dataroot: str = setting("./data", "where the data set lies, or is downloaded to", may_change=True)
    image_size: int = setting(
        32, "folder: images are scaled and cut at the centre to this many pixels a side; imagenet: side of random crops"
    )
    eval_view: tuple[int, ...] = setting(
        (256, 224), "imagenet: test images are scaled to this shorter side, then cut at the centre to this side"
    )
    train_size: int | None = setting(None, "train on this many images, balanced over the classes; null: all")
    valid_size: int = setting(0, "hold out this many training images, balanced over the classes, for the log's scores")
    check_files: bool = setting(
        True, "imagenet: look for damaged files before training; folder does so always", may_change=True
    )
    skip_unreadable: bool = setting(False, "folder, imagenet: leave out unreadable images instead of refusing to start")
    resident_gb: float = setting(
        8.0, "folder: a split larger than this once decoded (GB) is read anew each epoch, not kept", may_change=True
    )
    workers: int = setting(2, "folder, imagenet: processes that decode images", may_change=True)

    # What every copy of an image goes through besides the policy
    crop_padding: int = setting(4, "random crop after zero padding of this many pixels; 0: no crop")
    flip: bool = setting(True, "horizontal flip with probability one half")
    crop_per_copy: bool = setting(
        True, "draw crop and flip for each copy; false, and imagenet: once per image, for all"
    )
    cutout: int = setting(16, "side in pixels of the square that Cutout blanks last; 0: none")
    mean: tuple[float, ...] | None = setting(
        None, "of red, green, blue for normalisation, in 0..1; null: the data set's usual"
    )
    std: tuple[float, ...] | None = setting(None, "likewise the standard deviation")

    # The adversary
    policy: str = setting(
        "controller",
        "source of policies: controller (learned); random or none (controls); recorded (a file's) or frozen (another "
        "run's controller); trivialaugment, randaugment, autoaugment_cifar10, autoaugment_imagenet, augmix (per image)",
    )
    policy_from: str | None = setting(
        None,
        "recorded: file of policies, or a run whose record is replayed; frozen: a run, or its model.pt",
        may_change=True,  # it may have moved: what was read is in the checkpoint
    )
    M: int = setting(8, "policies in use at a time; every image of a batch is seen once per policy")
    Q: int = setting(5, "sub-policies of a policy; every image draws one")
    K: int = setting(2, "operations of a sub-policy, applied in order")
    ops: tuple[str, ...] = setting(ALL_OPS, "operations that policies may use, by name")
    levels: int = setting(10, "strengths of an operation")
    policy_interval: int | None = setting(None, "steps between two updates of the policies; null: an epoch")
    recurrence: str = setting(
        "policy", "the controller's state is carried through a policy, or starts anew per subpolicy"
    )
    controller_lr: float = setting(0.00035, "learning rate of the controller (Adam)")
    entropy_bonus: float = setting(0.00001, "weight of the controller's entropy in its objective")
    logit_bound: float = setting(0.0, "c > 0 bounds the controller's logits, c * tanh(logits / c); 0: unbounded")
    reward: str = setting(
        "loss", "the controller's: loss (of the network), or teacher (less teacher_weight times that of a teacher)"
    )
    teacher_weight: float = setting(1.0, "lambda, of the teacher's loss in the reward")
    teacher_rate: float = setting(0.999, "of the teacher, a moving average of the network: what a step keeps of it")
    reward_ema: float = setting(
        0.0, "rate of a moving average over the interval's steps, in the place of the mean loss; 0: the mean"
    )
    divide_by_std: bool = setting(True, "divide the rewards' distances from their mean by their standard deviation")
    clean_share: float = setting(0.0, "probability that a copy is left without the operations of its policy")
    randaugment_n: int = setting(2, "randaugment: operations applied to an image")
    randaugment_m: int = setting(9, "randaugment: their strength, 0..30")
    jsd: float = setting(
        0.0, "augmix: weight of the divergence between an image's M copies, whose first is then clean; 0: none"
    )
    collapse_entropy: float = setting(
        0.25, "alarm when the controller's entropy is below this share of its maximum; 0: never", may_change=True
    )

    # Optimisation of the network
    batch_size: int = setting(128, "N, distinct images per step over all processes; a step sees M * N")
    accumulate: int = setting(
        1, "micro-batches that a step's images are dealt into, over all processes; each takes at least one"
    )
    epochs: int = setting(200, "passes over the training images")
    optimizer: str = setting("sgd", "of the network: sgd, or adamw (whose weight decay is decoupled)")
    lr: float = setting(0.1, "learning rate at the start")
    momentum: float = setting(0.9, "momentum of SGD")
    nesterov: bool = setting(True, "Nesterov's momentum")
    weight_decay: float = setting(0.0005, "L2 penalty, on all parameters")
    schedule: str = setting("cosine", "learning rate: cosine (to zero, per step) or step (at the milestones)")
    milestones: tuple[int, ...] = setting((), "step schedule: epochs at whose start the learning rate drops")
    gamma: float = setting(0.2, "step schedule: factor at each milestone")
    warmup_epochs: float = setting(0.0, "epochs of linear warm-up before the schedule's full rate")
    label_smoothing: float = setting(0.0, "share of the target spread over all classes")
    grad_clip: float = setting(0.0, "largest norm of the gradient; 0: no clipping")

    # How it runs
    seed: int = setting(0, "of every random draw")
    amp: bool = setting(False, "mixed precision")
    amp_dtype: str = setting("bfloat16", "of mixed precision: bfloat16, or float16 (CUDA only, with loss scaling)")
    tf32: bool = setting(True, "CUDA: TensorFloat-32 in what is not in mixed precision: faster; scores never use it")
    compile: bool = setting(False, "compile the network (torch.compile): slow to start, then faster", may_change=True)
    deterministic: bool = setting(False, "CUDA: same seed, same bits, at some cost in speed; the CPU always is")
    eval_every: int = setting(1, "epochs between two scorings for the log (held-out part, else test set)")
    checkpoint_every: int | None = setting(
        1000, "steps between two checkpoints within an epoch, besides the one at its end; null: none", may_change=True
    )
    on_nonfinite: str = setting(
        "stop",
        "after a loss or gradient that is not finite: stop, or rewind to the last checkpoint, twice at most",
        may_change=True,
    )

    def __post_init__(self):
        def require(ok: bool, field: str, what: str) -> None:
            if not ok:
                raise ConfigError(field, f"{field}: {short_repr(getattr(self, field))} {what}")

        def one_of(field: str, *choices: str) -> None:
            require(getattr(self, field) in choices, field, f"is not one of {', '.join(choices)}")

        def between(low: float, high: float, *fields: str) -> None:
            for field in fields:
                require(low <= getattr(self, field) <= high, field, f"is not between {low:g} and {high:g}")

        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            numbers = value if isinstance(value, tuple) else (value,)
            require(all(not isinstance(v, float) or math.isfinite(v) for v in numbers), field.name, "is not finite")

        require(can_be_a_path(self.dataroot), "dataroot", "cannot be the name of a folder")
        one_of("dataset", *DATASETS)
        one_of("policy", *POLICIES)
        one_of("reward", "loss", "teacher")
        one_of("optimizer", "sgd", "adamw")
        one_of("recurrence", "policy", "subpolicy")
        one_of("schedule", "cosine", "step")
        one_of("amp_dtype", "bfloat16", "float16")
        one_of("on_nonfinite", "stop", "rewind")
        for field in ("M", "Q", "K", "batch_size", "accumulate", "epochs", "eval_every"):
            require(getattr(self, field) >= 1, field, "must be at least 1")
        for field in ("train_size", "policy_interval", "checkpoint_every"):
            require(getattr(self, field) is None or getattr(self, field) >= 1, field, "must be at least 1, or null")
        for field in ("valid_size", "workers", "crop_padding", "cutout", "weight_decay", "warmup_epochs", "grad_clip"):
            require(getattr(self, field) >= 0, field, "must not be negative")
        for field in ("entropy_bonus", "seed", "logit_bound", "teacher_weight", "jsd"):
            require(getattr(self, field) >= 0, field, "must not be negative")
        for field in ("lr", "controller_lr", "gamma", "resident_gb"):
            require(getattr(self, field) > 0, field, "must be above 0")
        between(0, 0.999, "dropout", "momentum", "label_smoothing")
        between(0, 1, "clean_share")
        between(0, 0.9999999, "teacher_rate", "reward_ema")
        between(0, 30, "randaugment_m")
        between(1, 100, "randaugment_n")
        between(0, 1, "collapse_entropy")
        between(8, 16384, "image_size")
        resize_and_crop = len(self.eval_view) == 2 and 8 <= self.eval_view[1] <= self.eval_view[0] <= 16384
        require(resize_and_crop, "eval_view", "must be two numbers between 8 and 16384, the second not the larger")
        require(
            self.crop_padding == 0 or not self.cropped_when_read,
            "crop_padding",
            "is for small images; those of imagenet are cropped as they are read: set it to 0",
        )
        for field, value in vars(self).items():  # far beyond any use, and before anything overflows
            numbers = value if isinstance(value, tuple) else (value,)
            require(all(isinstance(v, str) or abs(v or 0) <= 1e9 for v in numbers), field, "is larger than 1e9")
        between(1, 1000, "Q", "K")
        between(1, 10000, "M")
        between(0, 1024, "workers")
        between(0, 16384, "crop_padding", "cutout")
        require(self.levels <= 1000, "levels", "must be at most 1000")
        require(self.levels >= 2, "levels", "must be at least 2: the first is the weakest, the last the strongest")
        require(self.nesterov is False or self.momentum > 0, "nesterov", "needs momentum above 0")
        require(self.warmup_epochs < self.epochs, "warmup_epochs", f"must be below epochs ({self.epochs})")
        require(
            all(a < b for a, b in itertools.pairwise((0, *self.milestones, self.epochs))),
            "milestones",
            f"must rise and lie between 0 and epochs ({self.epochs})",
        )
        require(self.schedule != "step" or bool(self.milestones), "schedule", "needs milestones, where the rate drops")
        for field in ("mean", "std"):
            value = getattr(self, field)
            require(value is None or len(value) == 3, field, "must be three numbers, for red, green and blue")
        require(self.std is None or min(self.std) >= 1e-6, "std", "must be above 0 (at least 1e-6)")
        takes_file = self.policy in FROM_A_FILE
        require(
            not takes_file or self.policy_from is not None,
            "policy",
            "needs policy_from, the run or file that its policies come from",
        )
        require(
            takes_file or self.policy_from is None,
            "policy_from",
            f"has no meaning with policy: {self.policy}; it is for {' and '.join(FROM_A_FILE)}",
        )
        require(can_be_a_path(self.policy_from or ""), "policy_from", "cannot be the name of a file")
        mixes = self.policy == "augmix"
        require(self.jsd == 0 or (mixes and self.M > 1), "jsd", "needs policy: augmix and M of at least 2")
        require(
            self.jsd == 0 or self.cropped_when_read or not self.crop_per_copy,
            "jsd",
            "compares copies of one crop: set crop_per_copy to false",
        )
        require(
            not (mixes and self.clean_share), "clean_share", "is not for augmix, which mixes the clean image in itself"
        )
        require(bool(self.ops), "ops", "must name at least one operation; for none at all, set policy: none")
        require(len(set(self.ops)) == len(self.ops), "ops", "names an operation twice")
        for name in self.ops:
            require(
                name in ALL_OPS, "ops", f"names an unknown operation {short_repr(name)}{did_you_mean(name, ALL_OPS)}"
            )
        require(len(self.model) <= 60, "model", "is too long for the name of a network")
        try:
            check_model(self.model, **self.model_options())
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:  # the last two: too large to exist
            raise ConfigError("model", f"model: {first_line(error)}") from None

    @property
    def cropped_when_read(self) -> bool:
        """Whether an image comes from its file already cropped and flipped, once for all its copies."""
        return self.dataset == "imagenet"

    @property
    def has_teacher(self) -> bool:
        """Whether a moving average of the network has a say in the reward."""
        return self.reward == "teacher" and self.policy == "controller"

    @property
    def fetches_data(self) -> bool:
        """Whether the data set is downloaded where it is missing."""
        return self.dataset.startswith("cifar")

    def model_options(self) -> dict[str, Any]:
        """Options for `models.build_model`: those that differ from the family's own defaults."""
        return {"dropout": self.dropout} if self.dropout else {}


class ConfigError(UserError):
    """A setting that cannot be; `field` is its name."""

    def __init__(self, field: str, message: str):
        super().__init__(message)
        self.field = field


def load_config(conf_file: Path | None, overrides: dict[str, tuple[str, Any]]) -> Config:
    """Defaults, then the conf file, then `overrides`: field -> (where it was said, value).

    Raises UserError, naming the place, the field, the value and the remedy.
    """
    said = {}
    if conf_file is not None:
        said = {field: (str(conf_file), value) for field, value in read_yaml(conf_file).items()}
    said |= overrides
    types_ = typing.get_type_hints(Config)
    values = {}
    for field, (where, value) in said.items():
        if field not in types_:
            raise UserError(f"{where}: unknown setting {short_repr(field)}{did_you_mean(field, types_)}")
        try:
            values[field] = _convert(value, types_[field])
        except ValueError as error:
            raise UserError(f"{where}: {field}: {short_repr(value)} is not {error}") from None
    try:
        return Config(**values)
    except ConfigError as error:
        where = said.get(error.field, (conf_file or "defaults", None))[0]
        raise ConfigError(error.field, f"{where}: {error}") from None


def add_arguments(parser: argparse.ArgumentParser, *, several_seeds: bool = False) -> None:
    """The arguments that say which run is meant and where it computes; or which runs, one of each seed."""
    add_setting_arguments(parser, several_seeds=several_seeds)
    add = parser.add_argument
    add("--logdir", type=Path, default=Path("./logs"), metavar="DIR", help="where runs are kept (default: %(default)s)")
    add("--name", help="the run's directory below logdir (default: the conf file's name and the seed)")
    add("--device", help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")


def add_setting_arguments(parser: argparse.ArgumentParser, *, several_seeds: bool = False) -> None:
    """The arguments that give settings, and say how data that are missing may be fetched."""
    add = parser.add_argument
    fields = dataclasses.fields(Config)
    settings = (f"  {f.name} = {_as_yaml(f.default)}\n      {f.metadata['doc']}" for f in fields)
    parser.epilog = "\n".join(("settings, in conf files and for --set:", *settings))
    add("--load_conf", type=Path, metavar="FILE", help="conf file (default: confs/demo.yaml)")
    add("--seed", nargs="+" if several_seeds else None, help="seed of every random draw")
    add("--dataroot", metavar="DIR", help="where the data set lies")
    add("--set", nargs="+", default=[], action="extend", metavar="SETTING=VALUE", help="any setting of config.py")
    add("--data-url", "--data_url", metavar="URL", help="fetch missing data from this folder (http, https or file)")
    add("--no-download", "--no_download", action="store_true", help="fetch nothing: say what is missing")


def overrides_from(args: argparse.Namespace) -> dict[str, tuple[str, Any]]:
    """Settings said on the command line: field -> (where, value).

    Raises UserError for a malformed --set. A conf may be somebody else's: unless the command line says where data lie,
    or are to be put, raises UserError for one that names a place outside the working directory, too.
    """
    said = parse_overrides(args.set)
    for field in ("M", "seed", "amp", "dataroot"):
        value = getattr(args, field, None)
        if value not in (None, False):
            said[field] = (f"--{field}", value)
    if args.load_conf and "dataroot" not in said:
        dataroot = read_yaml(args.load_conf).get("dataroot")
        if isinstance(dataroot, str) and not stays_below(dataroot):
            raise UserError(
                f"{args.load_conf}: dataroot: {short_repr(dataroot)} leads out of the working directory\n"
                "data may be put there only if the command line says so: --dataroot DIR"
            )
    return said


def parse_overrides(words: Sequence[str]) -> dict[str, tuple[str, Any]]:
    """What `--set setting=value ...` says: field -> ("--set", value). Raises UserError for a malformed word."""
    said = {}
    for word in words:
        field, equals, text = word.partition("=")
        if not equals:
            raise UserError(f"--set {printable(word)}: write it as setting=value")
        try:
            said[field] = ("--set", yaml.load(text, _Loader))
        except Exception:  # PyYAML's constructors raise more than YAMLError
            raise UserError(f"--set {printable(word)}: the value cannot be read") from None
    return said


def stays_below(path: str) -> bool:
    """Whether a path leads, by its words alone, to the working directory or below it."""
    if not can_be_a_path(path) or Path(path).anchor:
        return False
    first, _, _ = os.path.normpath(path).partition(os.sep)
    return first != os.pardir and not first.startswith("~")


def can_be_a_path(text: str) -> bool:
    """Whether a text could name a file on some system: without a NUL, and in Unicode."""
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeError:  # half of a surrogate pair, which YAML lets a text hold
        return False


def run_directory(args: argparse.Namespace, config: Config) -> Path:
    """<logdir>/<conf name>_<seed>, or <logdir>/<name>. Raises UserError for a name that is not one below logdir."""
    if args.name is None:
        return args.logdir / f"{(args.load_conf or DEFAULT_CONF).stem}_{config.seed}"
    if not stays_below(args.name) or os.path.normpath(args.name) == os.curdir:
        raise UserError(f"--name {short_repr(args.name)}: names no directory below {args.logdir}; choose a plain name")
    return args.logdir / args.name


def to_yaml(config: Config) -> str:
    """All settings as a conf file that reads back to the same Config."""
    return yaml.safe_dump(plain_values(config), sort_keys=False, default_flow_style=None, width=100)


def plain_values(config: Config) -> dict[str, Any]:
    """All settings as values that YAML, JSON and checkpoints hold: tuples become lists."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(config).items()}


def changed_settings(old: Config, new: Config) -> list[str]:
    """Settings in which two configs differ and that a resumed run must share, as 'name: old -> new'."""
    return [
        f"{field.name}: {printable(str(getattr(old, field.name)))} -> {printable(str(getattr(new, field.name)))}"
        for field in dataclasses.fields(Config)
        if getattr(old, field.name) != getattr(new, field.name) and not field.metadata["may_change"]
    ]


def _as_yaml(value: Any) -> str:
    plain = list(value) if isinstance(value, tuple) else value
    return yaml.safe_dump(plain, default_flow_style=True, width=1000).splitlines()[0]


class _Loader(yaml.SafeLoader):
    """YAML of plain values. Refuses what is said twice, and '<<': ten lines of those can fill any memory."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Called for every mapping; the inherited one is what carries out '<<'."""
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                raise _Refused(None, None, "'<<' has no meaning in a conf file", key.start_mark)
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in lines:
                problem = f"{short_repr(key.value)} has been said on line {lines[key.value]} already"
                raise _Refused(None, None, problem, key.start_mark)
            lines[key.value] = key.start_mark.line + 1


class _Refused(yaml.MarkedYAMLError):
    """Is YAML, but not for us."""


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a conf file, or in another one of at most LONGEST_CONF bytes. Raises UserError."""
    try:
        require_file(path)
        with path.open("rb") as file:
            data = file.read(LONGEST_CONF + 1)
        if len(data) > LONGEST_CONF:
            raise OSError(f"is longer than {LONGEST_CONF} bytes")
        text = data.decode("utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such conf file; those that exist are under confs/") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a conf file ({first_line(error)})") from None
    try:
        content = yaml.load(text, _Loader)
    except Exception as error:  # YAMLError, and what PyYAML's constructors raise: ValueError, RecursionError, ...
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = printable(str(getattr(error, "problem", None) or first_line(error)))
        problem = problem if isinstance(error, _Refused) else f"is not YAML ({problem})"
        raise UserError(f"{path}{line}: {problem}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{path}: a conf file holds lines of the form 'setting: value'")
    return content


def _convert(value: Any, kind: Any) -> Any:
    """`value` as the declared type. Raises ValueError with the words for what it should have been."""
    if isinstance(kind, types.UnionType):
        (kind,) = (k for k in typing.get_args(kind) if k is not types.NoneType)
        return None if value is None else _convert(value, kind)
    if typing.get_origin(kind) is tuple:
        (item, _) = typing.get_args(kind)
        if not isinstance(value, (list, tuple)):
            raise ValueError("a list")
        return tuple(_convert(v, item) for v in value)
    if kind is bool:
        if isinstance(value, bool):
            return value
        raise ValueError("true or false")
    if kind is str:
        if isinstance(value, str):
            return value
        raise ValueError("a text; put it in quotes" if value is not None else "a text")
    # YAML reads 5e-4 as a text: numbers are taken from texts too.
    if isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            number = kind(value)
        except (ValueError, OverflowError):
            number = None
        if number is not None and (kind is float or isinstance(value, str) or number == value):
            return number
    raise ValueError("a whole number" if kind is int else "a number")
