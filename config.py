"""Every setting of a run: default, meaning, unit and range. default < conf file < command line.

The defaults are the paper's for CIFAR. A conf file under confs/ holds only what differs.
"""

import argparse
import dataclasses
import itertools
import math
import os
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from augmentations import OPS
from models import check_model
from utils import UserError, did_you_mean, first_line, printable, read_text, short_repr, warn

ROOT = Path(__file__).resolve().parent
DEFAULT_CONF = ROOT / "confs" / "demo.yaml"
# The paper's, in its order. Operations added to augmentations.OPS are used if a conf names them.
PAPER_OPS = (
    "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "AutoContrast", "Invert", "Equalize",
    "Solarize", "Posterize", "Contrast", "Color", "Brightness", "Sharpness", "Cutout", "SamplePairing",
)  # fmt: skip
DATASETS = ("shapes", "cifar10", "cifar100", "imagenet", "folder")
FROM_A_FILE = ("recorded", "frozen")
PER_IMAGE = ("trivialaugment", "randaugment", "autoaugment_cifar10", "autoaugment_imagenet", "augmix")
REWARD_LOSSES = ("cross_entropy", "nonsaturating")
KEEP_BY = ("loss", "weighted", "random", "margin")
OF_CONTROLLER = ("entropy_floor", "entropy_floor_end")  # refused with another source
POLICIES = ("controller", "random", "none", *FROM_A_FILE, *PER_IMAGE)
LONGEST_CONF = 65536  # bytes; a conf with every setting and its documentation has a tenth of that
LARGEST = 1e9  # number in a conf: far beyond any use, and no arithmetic overflows


def setting(default: Any, doc: str, *, low=None, high=None, above=None, choices=(), may_change=False) -> Any:
    """A field with its one-line documentation and the values that it may have.

    low, high: smallest and largest number; above: it must be larger. may_change: also in a resumed run.
    """
    allowed = ", ".join(choices)
    if above is not None:
        allowed = f"above {above}"
    elif low is not None:
        allowed = f"at least {low}" if high is None else f"{low} to {high}"
    doc = f"{doc} [{allowed}]" if allowed else doc
    rules = {"low": low, "high": high, "above": above, "choices": choices}
    return dataclasses.field(default=default, metadata={"doc": doc, "may_change": may_change, **rules})


def _problem(field: dataclasses.Field, value: Any) -> str | None:
    """What is wrong with a setting's value, or with an item of it; None if nothing is."""
    low, high, above, choices = (field.metadata[rule] for rule in ("low", "high", "above", "choices"))
    if choices and value not in choices:
        return f"is not one of {', '.join(choices)}"
    for number in value if isinstance(value, tuple) else (value,):
        if not isinstance(number, (int, float)):
            continue
        if isinstance(number, float) and not math.isfinite(number):
            return "is not finite"
        if above is not None and number <= above:
            return f"must be above {above}"
        if low is not None and number < low:
            return f"must be at least {low}{', or null' if field.default is None else ''}"
        if high is not None and number > high:
            return f"is not between {low} and {high}"
        if high is None and abs(number) > LARGEST:
            return "is larger than 1e9"
    return None


@dataclass(frozen=True)
class Config:
    """A run's settings. Raises ConfigError for an invalid value."""

    # Network and data
    model: str = setting("wresnet28_10", "network, by name: see models/__init__.py")
    dropout: float = setting(0.0, "dropout probability inside the network's blocks", low=0, high=0.999)
    dataset: str = setting("cifar10", "shapes: embedded; folder: images in class folders", choices=DATASETS)
    dataroot: str = setting("./data", "folder of the data set; CIFAR is downloaded to it", may_change=True)
    image_size: int = setting(32, "shapes, folder: side of the images; imagenet: of crops (pixels)", low=8, high=16384)
    eval_view: tuple[int, ...] = setting((256, 224), "imagenet: shorter side of scaled test images; side of the crop")
    train_size: int | None = setting(None, "train on this many images, balanced over the classes; null: all", low=1)
    valid_size: int = setting(0, "hold out this many training images, balanced over the classes, for the log", low=0)
    check_files: bool = setting(
        True, "imagenet: check image files before training; folder always does", may_change=True
    )
    skip_unreadable: bool = setting(False, "folder, imagenet: skip unreadable images instead of refusing to start")
    resident_gb: float = setting(
        8.0, "folder: larger splits (GB decoded) are not kept in memory", above=0, may_change=True
    )
    workers: int = setting(2, "folder, imagenet: processes that decode images", low=0, high=1024, may_change=True)

    # Every copy of an image, besides the policy
    crop_padding: int = setting(4, "random crop after zero padding of this many pixels; 0: no crop", low=0, high=16384)
    flip: bool = setting(True, "horizontal flip with probability one half")
    crop_per_copy: bool = setting(True, "draw crop and flip for each copy; false, and imagenet: once per image")
    cutout: int = setting(16, "side in pixels of the square that Cutout blanks last; 0: none", low=0, high=16384)
    mean: tuple[float, ...] | None = setting(None, "mean of red, green, blue, in 0..1; null: the data set's")
    std: tuple[float, ...] | None = setting(None, "standard deviation, likewise")

    # The adversary
    policy: str = setting("controller", "source of policies: see docs/policies.md", choices=POLICIES)
    policy_from: str | None = setting(None, "recorded: a file of policies or a run; frozen: a run", may_change=True)
    M: int = setting(8, "policies in use at a time; every image of a batch is seen once per policy", low=1, high=10000)
    keep: int | None = setting(None, "train on this many of an image's M copies; null: on all", low=1)
    keep_by: str = setting(
        "weighted", "keep: largest losses, drawn by loss, at random, largest loss less the teacher's", choices=KEEP_BY
    )
    Q: int = setting(5, "sub-policies of a policy; every image draws one", low=1, high=1000)
    K: int = setting(2, "operations of a sub-policy, applied in order", low=1, high=1000)
    ops: tuple[str, ...] = setting(PAPER_OPS, "operations that policies may use, by name")
    levels: int = setting(10, "strengths of an operation", low=2, high=1000)
    policy_interval: int | None = setting(None, "steps between two updates of the policies; null: an epoch", low=1)
    recurrence: str = setting("policy", "span of the controller's LSTM state", choices=("policy", "subpolicy"))
    controller_lr: float = setting(0.00035, "learning rate of the controller (Adam)", above=0)
    entropy_bonus: float = setting(0.00001, "weight of the controller's entropy in its objective", low=0)
    logit_bound: float = setting(0.0, "c > 0 bounds the controller's logits, c * tanh(logits / c); 0: unbounded", low=0)
    entropy_floor: float = setting(
        0.0, "least share of its largest entropy that the controller keeps; 1: random policies", low=0, high=1
    )
    entropy_floor_end: float | None = setting(
        None, "the floor at the end of the run, approached linearly; null: it stays", low=0, high=1
    )
    reward: str = setting(
        "loss", "the network's loss; teacher: less teacher_weight times a teacher's", choices=("loss", "teacher")
    )
    teacher_weight: float = setting(1.0, "lambda, weight of the teacher's loss in the reward", low=0)
    teacher_rate: float = setting(0.999, "share of the averaged teacher that a step keeps", low=0, high=0.9999999)
    reward_loss: str = setting(
        "cross_entropy", "of the network in the reward; nonsaturating: log(1 - p_label)", choices=REWARD_LOSSES
    )
    reward_ema: float = setting(0.0, "moving average of an interval's losses; 0: mean", low=0, high=0.9999999)
    divide_by_std: bool = setting(True, "divide the rewards' distances from their mean by their standard deviation")
    clean_share: float = setting(0.0, "probability that a copy is not given its policy's operations", low=0, high=1)
    randaugment_n: int = setting(2, "randaugment: operations applied to an image", low=1, high=100)
    randaugment_m: int = setting(9, "randaugment: their strength", low=0, high=30)
    jsd: float = setting(0.0, "augmix: weight of the divergence between an image's M copies; 0: none", low=0)
    collapse_entropy: float = setting(
        0.25, "report entropy below this share of its maximum as a collapse; 0: never", low=0, high=1, may_change=True
    )

    # Optimisation of the network
    batch_size: int = setting(128, "N, distinct images per step over all processes; a step sees M * N", low=1)
    accumulate: int = setting(1, "micro-batches of a step over all processes, each of which takes at least one", low=1)
    epochs: int = setting(200, "passes over the training images", low=1)
    optimizer: str = setting("sgd", "of the network; adamw decouples weight decay", choices=("sgd", "adamw"))
    lr: float = setting(0.1, "learning rate at the start", above=0)
    momentum: float = setting(0.9, "momentum of SGD", low=0, high=0.999)
    nesterov: bool = setting(True, "Nesterov's momentum")
    weight_decay: float = setting(0.0005, "L2 penalty, on all parameters", low=0)
    schedule: str = setting("cosine", "of the learning rate: to zero, or at milestones", choices=("cosine", "step"))
    milestones: tuple[int, ...] = setting((), "step schedule: epochs at whose start the learning rate drops")
    gamma: float = setting(0.2, "step schedule: factor at each milestone", above=0)
    warmup_epochs: float = setting(0.0, "epochs of linear warm-up before the schedule's full rate", low=0)
    mixup: float = setting(0.0, "mix copies of the same policy: alpha of the Beta distribution; 0: none", low=0)
    cutmix: float = setting(0.0, "exchange a rectangle between them, likewise; with both, a fair coin per step", low=0)
    ema: float = setting(0.0, "also average the weights: share that a step keeps; 0: no average", low=0, high=0.9999999)
    label_smoothing: float = setting(0.0, "share of the target spread over all classes", low=0, high=0.999)
    grad_clip: float = setting(0.0, "largest norm of the gradient; 0: no clipping", low=0)

    # How it runs
    seed: int = setting(0, "of every random draw", low=0, high=2**63 - 1)
    amp: bool = setting(False, "mixed precision")
    amp_dtype: str = setting("bfloat16", "float16: CUDA only, with loss scaling", choices=("bfloat16", "float16"))
    tf32: bool = setting(True, "CUDA: TensorFloat-32 in what is not in mixed precision: faster; scores never use it")
    compile: bool = setting(False, "compile the network (torch.compile): slow to start, then faster", may_change=True)
    deterministic: bool = setting(False, "CUDA: same seed, same bits, at some cost in speed; the CPU always is")
    eval_every: int = setting(1, "epochs between two scorings for the log (held-out part, else test set)", low=1)
    checkpoint_every: int | None = setting(
        1000, "steps between checkpoints within an epoch (each ends with one); null: none", low=1, may_change=True
    )
    on_nonfinite: str = setting(
        "stop", "on a NaN loss or gradient; rewind: to the last checkpoint", choices=("stop", "rewind"), may_change=True
    )

    def __post_init__(self):
        alone = ((field.name, _problem(field, getattr(self, field.name))) for field in dataclasses.fields(self))
        rules = itertools.chain(self._data_rules(), self._policy_rules(), self._schedule_rules())
        for field, problem in itertools.chain(alone, ((field, problem) for ok, field, problem in rules if not ok)):
            if problem:
                raise ConfigError(field, f"{field}: {short_repr(getattr(self, field))} {problem}")
        try:
            check_model(self.model, **self.model_options())
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:  # the last two: too large to exist
            raise ConfigError("model", f"model: {first_line(error)}") from None

    def _data_rules(self) -> Iterator[tuple[bool, str, str]]:
        """(whether it holds, field to name, problem) for each rule about the data and the network."""
        small = "is for small images; those of imagenet are cropped as they are read: set it to 0"
        view = len(self.eval_view) == 2 and 8 <= self.eval_view[1] <= self.eval_view[0] <= 16384
        yield can_be_a_path(self.dataroot), "dataroot", "cannot be the name of a folder"
        yield self.dataset != "shapes" or self.image_size <= 64, "image_size", "is too large for shapes: 8 to 64"
        yield view, "eval_view", "must be two numbers between 8 and 16384, the second not the larger"
        yield self.crop_padding == 0 or not self.cropped_when_read, "crop_padding", small
        for field in ("mean", "std"):
            three = getattr(self, field) is None or len(getattr(self, field)) == 3
            yield three, field, "must be three numbers, for red, green and blue"
        yield self.std is None or min(self.std) >= 1e-6, "std", "must be above 0 (at least 1e-6)"
        yield len(self.model) <= 60, "model", "is too long for the name of a network"

    def _policy_rules(self) -> Iterator[tuple[bool, str, str]]:
        """As `_data_rules`, about the source of policies."""
        known, from_file, mixes = [op.name for op in OPS], self.policy in FROM_A_FILE, self.policy == "augmix"
        no_file = f"has no meaning with policy: {self.policy}; it is for {' and '.join(FROM_A_FILE)}"
        one_crop = self.jsd == 0 or self.cropped_when_read or not self.crop_per_copy
        yield not from_file or self.policy_from is not None, "policy", "needs policy_from, a run or file of policies"
        yield from_file or self.policy_from is None, "policy_from", no_file
        yield can_be_a_path(self.policy_from or ""), "policy_from", "cannot be the name of a file"
        yield self.jsd == 0 or (mixes and self.M > 1), "jsd", "needs policy: augmix and M of at least 2"
        yield one_crop, "jsd", "compares copies of one crop: set crop_per_copy to false"
        yield not (mixes and self.clean_share), "clean_share", "is not for augmix, which mixes in the clean image"
        learns, floors = self.policy == "controller", (self.entropy_floor, self.entropy_floor_end or 0.0)
        for field, floor in zip(OF_CONTROLLER, floors, strict=True):
            yield learns or not floor, field, f"needs policies that learn, policy: controller, not {self.policy}"
        unmixed = "does not go with jsd, which compares copies of one image"
        yield not (self.mixup and self.jsd), "mixup", unmixed
        yield not (self.cutmix and self.jsd), "cutmix", unmixed
        yield self.keep is None or self.keep <= self.M, "keep", f"is more than the M = {self.M} copies of an image"
        yield self.keep is None or not self.jsd, "keep", "does not go with jsd, which compares all M copies of an image"
        yield self.keep_by != "margin" or self.reward == "teacher", "keep_by", "needs a teacher; set reward: teacher"
        yield bool(self.ops), "ops", "must name at least one operation; for none at all, set policy: none"
        yield len(set(self.ops)) == len(self.ops), "ops", "names an operation twice"
        for name in self.ops:
            if name not in known:
                yield False, "ops", f"names an unknown operation {short_repr(name)}{did_you_mean(name, known)}"

    def _schedule_rules(self) -> Iterator[tuple[bool, str, str]]:
        """As `_data_rules`, about the optimisation."""
        rising = all(a < b for a, b in itertools.pairwise((0, *self.milestones, self.epochs)))
        without = f"without them: --set epochs={self.epochs} schedule=cosine milestones=[]"
        yield self.nesterov is False or self.momentum > 0, "nesterov", "needs momentum above 0"
        yield self.warmup_epochs < self.epochs, "warmup_epochs", f"must be below epochs ({self.epochs})"
        yield rising, "milestones", f"must rise and lie between 0 and epochs ({self.epochs}); {without}"
        yield self.schedule != "step" or bool(self.milestones), "schedule", "needs milestones, where the rate drops"

    @property
    def cropped_when_read(self) -> bool:
        """Whether an image comes from its file already cropped and flipped, once for all its copies."""
        return self.dataset == "imagenet"

    @property
    def side(self) -> int:
        """Height and width of the training images as the network sees them, in pixels."""
        return 32 if self.dataset.startswith("cifar") else self.image_size

    @property
    def has_teacher(self) -> bool:
        """Whether a moving average of the network judges the copies: for the reward, or for the selection."""
        return self.reward == "teacher" and (self.policy == "controller" or (self.selects and self.keep_by == "margin"))

    @property
    def selects(self) -> bool:
        """Whether the network is trained on some of an image's copies only."""
        return self.keep is not None and self.keep < self.M

    @property
    def passes(self) -> int:
        """What an image costs in a step: 1 for each copy's forward pass, 3 for a forward and backward pass."""
        judged = self.M * (self.selects + self.has_teacher)
        return judged + 3 * (self.keep if self.selects else self.M)

    @property
    def fetches_data(self) -> bool:
        """Whether the data set is downloaded where it is missing."""
        return self.dataset.startswith("cifar")

    def model_options(self) -> dict[str, Any]:
        """Options for `models.build_model`: those that differ from the family's own defaults."""
        return {"dropout": self.dropout} if self.dropout else {}


class ConfigError(UserError):
    """An invalid setting; `field` is its name."""

    def __init__(self, field: str, message: str):
        super().__init__(message)
        self.field = field


def load_config(conf_file: Path | None, overrides: dict[str, tuple[str, Any]]) -> Config:
    """Defaults, then the conf file, then `overrides`: field -> (where it was given, value).

    Raises UserError, naming the place, the field, the value and the remedy.
    """
    given = {}
    if conf_file is not None:
        given = {field: (str(conf_file), value) for field, value in read_yaml(conf_file).items()}
    given |= overrides
    if "entropy_floor" in overrides or overrides.get("policy", (None, "controller"))[1] != "controller":
        # A conf's floor is for the conf's controller, and its end for the conf's start.
        given = {field: value for field, value in given.items() if field not in OF_CONTROLLER or field in overrides}
    types_ = typing.get_type_hints(Config)
    values = {}
    for field, (where, value) in given.items():
        if field not in types_:
            raise UserError(f"{where}: unknown setting {short_repr(field)}{did_you_mean(field, types_)}")
        try:
            values[field] = _convert(value, types_[field])
        except ValueError as error:
            problem = f"{where}: {field}: {short_repr(value)} is not {error}"
            if str(error) == "a list" and isinstance(value, str):
                problem += f"; write {field}{'=' if where.startswith('--') else ': '}[{printable(value, 80)}]"
            raise UserError(problem) from None
    try:
        return Config(**values)
    except ConfigError as error:
        where = given.get(error.field, (conf_file or "defaults", None))[0]
        raise ConfigError(error.field, f"{where}: {error}") from None


def warn_of_settings(config: Config, args: argparse.Namespace) -> None:
    """Warn about settings that are allowed, but probably a mistake."""
    side = config.side
    if config.cutout >= side:
        warn(f"cutout: {config.cutout} of {side} pixels blank most of an image; set it to {side // 2} or less")
    if 2 * config.crop_padding >= side:
        limit = f"set it to {side // 8} or less"
        warn(f"crop_padding: {config.crop_padding} of {side} pixels can shift half an image out of view; {limit}")
    if args.load_conf is None and "dataset" in parse_overrides(args.set):
        demo = f"{config.model}, train_size {config.train_size}, {config.epochs} epochs, ..."
        warn(f"no --load_conf: all other settings are those of confs/demo.yaml ({demo})")


def add_arguments(parser: argparse.ArgumentParser, *, several_seeds: bool = False) -> None:
    """Arguments that select a run, or one for each of several seeds, and the device."""
    add_setting_arguments(parser, several_seeds=several_seeds)
    add = parser.add_argument
    add("--logdir", type=Path, default=Path("./logs"), metavar="DIR", help="where runs are kept (default: %(default)s)")
    add("--name", help="the run's directory below logdir (default: the conf file's name and the seed)")
    add("--device", help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")


def add_setting_arguments(parser: argparse.ArgumentParser, *, several_seeds: bool = False) -> None:
    """Arguments for settings, and for downloads of missing data."""
    add = parser.add_argument
    fields = dataclasses.fields(Config)
    settings = (f"  {f.name} = {_as_yaml(f.default)}\n      {f.metadata['doc']}" for f in fields)
    parser.epilog = "\n".join(("settings, in conf files and for --set:", *settings))
    parser.settings = [field.name for field in fields]
    add("--load_conf", type=find_conf, metavar="FILE", help="conf file (default: confs/demo.yaml)")
    add("--seed", nargs="+" if several_seeds else None, help="seed of every random draw")
    add("--dataroot", metavar="DIR", help="folder of the data set")
    add("--set", nargs="+", default=[], action="extend", metavar="SETTING=VALUE", help="any setting of config.py")
    add("--data-url", "--data_url", metavar="URL", help="fetch missing data from this folder (http, https or file)")
    add("--no-download", "--no_download", action="store_true", help="fetch nothing: say what is missing")


def overrides_from(args: argparse.Namespace) -> dict[str, tuple[str, Any]]:
    """Settings given on the command line: field -> (where, value). Raises UserError for a malformed --set."""
    given = parse_overrides(args.set)
    for field in ("M", "seed", "amp", "dataroot"):
        value = getattr(args, field, None)
        if value not in (None, False):
            given[field] = (f"--{field}", value)
    return given


def parse_overrides(words: Sequence[str]) -> dict[str, tuple[str, Any]]:
    """What `--set setting=value ...` gives: field -> ("--set", value). Raises UserError for a malformed word."""
    given = {}
    for word in words:
        field, equals, text = word.partition("=")
        if not equals:
            raise UserError(f"--set {printable(word)}: write it as setting=value")
        try:
            given[field] = ("--set", yaml.load(text, _Loader))
        except Exception:  # PyYAML's constructors raise more than YAMLError
            raise UserError(f"--set {printable(word)}: the value cannot be read") from None
    return given


def find_conf(name: str) -> Path:
    """A conf file named from the working directory or, if it is not there, from the project's."""
    path = Path(name)
    return path if path.exists() or not (ROOT / path).exists() else ROOT / path


def stays_below(path: str) -> bool:
    """Whether a path, without looking at the disk, is the working directory or below it."""
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
    """<logdir>/<conf name>_<seed>, or <logdir>/<name>. Raises UserError for a name that is not one below logdir.

    Also for a name that is not Unicode, which TensorBoard needs.
    """
    for flag, text in (("--logdir", str(args.logdir)), ("--name", args.name or "")):
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise UserError(f"{flag} {short_repr(text)}: is not encoded in UTF-8; choose another name")
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
    """YAML of plain values. Refuses repeated keys, and '<<': ten lines of those can fill any memory."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Called for every mapping; the inherited method expands '<<'."""
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                raise _Refused(None, None, "'<<' has no meaning in a conf file", key.start_mark)
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in lines:
                problem = f"{short_repr(key.value)} is given on line {lines[key.value]} already"
                raise _Refused(None, None, problem, key.start_mark)
            lines[key.value] = key.start_mark.line + 1


class _Refused(yaml.MarkedYAMLError):
    """Valid YAML that a conf file may not use."""


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a conf file, or in another one of at most LONGEST_CONF bytes. Raises UserError."""
    try:
        text = read_text(path, LONGEST_CONF)
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such conf file; see confs/") from None
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
    """`value` as the declared type. Raises ValueError with what it should have been."""
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
    # YAML reads 5e-4 as a text, so texts may be numbers.
    if isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            number = kind(value)
        except (ValueError, OverflowError):
            number = None
        if number is not None and (kind is float or isinstance(value, str) or number == value):
            return number
    raise ValueError("a whole number" if kind is int else "a number")
