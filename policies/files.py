"""From the settings to a source of policies, and what sources take from files: recorded policies, learned controllers.

A file of policies is YAML or JSON: a list of policies, or a mapping that holds it under "policies" and, unless it is
10, the number of "levels". A policy is a list of sub-policies, each a list of [operation, level]. A line of a run's
policies.jsonl is such a mapping; the whole file is a sequence of them.

    policies:
      - [[[Rotate, 3], [Invert, 0]], [[Solarize, 2]]]     # two sub-policies, of which every image draws one
      - [[[ShearX, 9]], [[Cutout, 4], [Equalize, 0]]]
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from torch import Tensor

from augmentations import OPS, row_of
from config import Config, load_config
from controller import Controller
from policies.published import AugMix, AutoAugmentPolicies, RandAugment, TrivialAugment
from policies.sources import ControllerPolicies, FrozenPolicies, PolicySource, RandomPolicies, RecordedPolicies, Reward
from utils import (
    UserError,
    did_you_mean,
    first_line,
    has_shape,
    keyed_seed,
    load_tensors,
    printable,
    require_file,
    short_repr,
)

LONGEST_FILE = 2**26  # bytes of policies.jsonl: 200 intervals of the paper's shape are half a million
LONGEST_YAML = 2**20  # PyYAML takes a minute for a few of these
MOST_OPERATIONS = 10**6  # of all policies of a file


class Recorded(NamedTuple):
    """P policies of each of R intervals: rows of OPS, -1 for none, and levels, int64 (R, P, Q, K)."""

    op_RPQK: Tensor
    level_RPQK: Tensor
    levels: int


def build_policies(config: Config) -> PolicySource:
    """The source that the config asks for. Raises UserError for files that are not what it takes them for."""
    M, shape = config.M, (config.M, config.Q, config.K)
    weight = config.teacher_weight if config.has_teacher else 0.0
    reward = Reward(weight, config.reward_ema, config.divide_by_std)
    options = {"clean_share": config.clean_share, "reward": reward}
    match config.policy:
        case "controller":
            controller = fresh_controller(config)
            learning = {"lr": config.controller_lr, "entropy_bonus": config.entropy_bonus}
            return ControllerPolicies(M, controller, config.ops, config.levels, **learning, **options)
        case "random":
            return RandomPolicies(*shape, config.ops, config.levels, **options)
        case "none":
            return PolicySource(*shape, **options)
        case "recorded":
            return RecordedPolicies(M, *read_policies(Path(config.policy_from)), **options)
        case "frozen":
            return FrozenPolicies(M, *read_controller(Path(config.policy_from)), **options)
        case "trivialaugment":
            return TrivialAugment(M, **options)
        case "randaugment":
            return RandAugment(M, config.randaugment_n, config.randaugment_m, **options)
        case "autoaugment_cifar10" | "autoaugment_imagenet":
            return AutoAugmentPolicies(M, config.policy.removeprefix("autoaugment_"), **options)
        case "augmix":
            return AugMix(M, clean_first=config.jsd > 0, **options)
    raise ValueError(f"unknown source of policies {config.policy!r}")


def fresh_controller(config: Config) -> Controller:
    """A controller as the config says, its weights drawn from the seed, whatever else has been drawn before."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(keyed_seed(config.seed, "controller"))  # manual_seed reaches other devices
        return Controller(
            len(config.ops),
            config.levels,
            config.Q,
            config.K,
            recurrence=config.recurrence,
            logit_bound=config.logit_bound,
        )


def read_controller(path: Path) -> tuple[Controller, tuple[str, ...], int]:
    """The controller that a run has learned, its operations and its number of levels.

    path: the run's directory, or its model.pt. Raises UserError.
    """
    file = path / "model.pt" if path.is_dir() else path
    if not file.exists():
        raise UserError(f"{file}: there is no such file to take a controller from; policy_from names a finished run")
    content = load_tensors(file)
    if not has_shape(content, {"config": dict, "controller": dict}):
        policy = content["config"].get("policy") if has_shape(content, {"config": dict}) else None
        what = f"was trained with policy: {short_repr(policy)}" if policy else "is no model.pt of main.py"
        raise UserError(f"{file}: holds no controller, it {what}; take a run with policy: controller")
    config = load_config(None, {field: (str(file), value) for field, value in content["config"].items()})
    controller = fresh_controller(config)
    try:
        controller.load_state_dict(content["controller"])
    except (RuntimeError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: its controller does not fit its settings ({first_line(error)})") from None
    if not all(parameter.isfinite().all() for parameter in controller.parameters()):
        raise UserError(f"{file}: its controller holds values that are not finite numbers")
    return controller.requires_grad_(False), config.ops, config.levels


def read_policies(path: Path) -> Recorded:
    """The policies of a file, or those that a run has recorded (its directory, or its policies.jsonl).

    Raises UserError, naming file, place and remedy, for what is not as this module's page says.
    """
    file = path / "policies.jsonl" if path.is_dir() else path
    return recorded(_read_intervals(file), file)


def recorded(intervals: Sequence[Mapping[str, Any]], file: Path) -> Recorded:
    """What was read from `file` for each interval, looked at closely. Raises UserError as `read_policies` does."""
    levels = intervals[0].get("levels", 10)
    if type(levels) is not int or not 2 <= levels <= 1000:
        raise UserError(f"{file}: levels: {short_repr(levels)} is not a whole number between 2 and 1000")
    reader = _Reader(file, levels)
    for interval in intervals:
        if interval.get("levels", 10) != levels:
            raise UserError(f"{file}: its lines differ in the number of levels; they cannot be of one run")
        reader.add(interval)
    return reader.recorded()


class _Reader:
    """Policies as they are read, all of one shape, and of a bounded number, whatever a small file stands for."""

    def __init__(self, file: Path, levels: int):
        self.file, self.levels = file, levels
        self._intervals: list[list] = []
        self._operations = 0

    def add(self, interval: Mapping[str, Any]) -> None:
        policies = interval.get("policies")
        if not isinstance(policies, list) or not policies:
            raise self._wrong("", policies, "is no list of policies")
        read = [self._policy(policy, f"policy {number}") for number, policy in enumerate(policies, start=1)]
        first = self._intervals[0] if self._intervals else read
        if len(read) != len(first):
            what = f"policies on a line, where the first line has {len(first)}: all must have as many"
            raise self._wrong("", len(read), what)
        for number, policy in enumerate(read, start=1):
            if len(policy) != len(first[0]):
                what = f"sub-policies, where the first policy has {len(first[0])}: all must have as many"
                raise self._wrong(f"policy {number}", len(policy), what)
        self._intervals.append(read)

    def _policy(self, policy: Any, where: str) -> list[list[tuple[int, int]]]:
        if not isinstance(policy, list) or not policy:
            raise self._wrong(where, policy, "is no list of sub-policies")
        return [self._subpolicy(one, f"{where}, sub-policy {q}") for q, one in enumerate(policy, start=1)]

    def _subpolicy(self, subpolicy: Any, where: str) -> list[tuple[int, int]]:
        if not isinstance(subpolicy, list):
            raise self._wrong(where, subpolicy, "is no list of [operation, level]")
        self._operations += len(subpolicy) + 1
        if self._operations > MOST_OPERATIONS:
            raise UserError(f"{self.file}: holds more than {MOST_OPERATIONS:,} operations; use fewer policies")
        return [self._operation(one, where) for one in subpolicy]

    def _operation(self, pair: Any, where: str) -> tuple[int, int]:
        if not isinstance(pair, list) or len(pair) != 2:
            raise self._wrong(where, pair, "is not [operation, level]")
        name, level = pair
        if name not in (known := [op.name for op in OPS]):
            raise self._wrong(where, name, f"is no operation{did_you_mean(name, known)}")
        if type(level) is not int or not 0 <= level < self.levels:
            raise self._wrong(where, level, f"is no level: 0 to {self.levels - 1}")
        return row_of(name), level

    def recorded(self) -> Recorded:
        lengths = [len(sub) for policies in self._intervals for policy in policies for sub in policy]
        K, nothing = max(1, *lengths), (-1, 0)
        if len(lengths) * K > 2 * MOST_OPERATIONS:
            raise UserError(f"{self.file}: its sub-policies are of too different lengths, up to {K:,} operations")
        padded = [
            [[[*sub, *[nothing] * (K - len(sub))] for sub in policy] for policy in policies]
            for policies in self._intervals
        ]
        return Recorded(*torch.tensor(padded).unbind(-1), self.levels)

    def _wrong(self, where: str, value: Any, what: str) -> UserError:
        place = ": ".join(filter(None, (str(self.file), where)))
        return UserError(f"{place}: {short_repr(value)} {what}")


def _read_intervals(file: Path) -> list[dict[str, Any]]:
    """What a file holds for each of its intervals, not yet looked at."""
    try:
        require_file(file)
        longest = LONGEST_FILE if file.suffix in (".jsonl", ".json") else LONGEST_YAML
        with file.open("rb") as opened:
            data = opened.read(longest + 1)
        if len(data) > longest:
            raise OSError(f"is longer than {longest:,} bytes")
        text = data.decode("utf-8")
        if file.suffix == ".jsonl":
            content = [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            content = [json.loads(text) if file.suffix == ".json" else yaml.load(text, yaml.SafeLoader)]
    except FileNotFoundError:
        raise UserError(f"{file}: there is no such file of policies; policy_from names one, or a run") from None
    except Exception as error:  # PyYAML's constructors raise more than YAMLError
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        reason = f"line {mark.line + 1}: {printable(str(problem))}" if mark and problem else first_line(error)
        raise UserError(f"{file}: cannot be read as a file of policies ({reason})") from None
    intervals = [{"policies": one} if isinstance(one, list) else one for one in content]
    if not intervals or not all(isinstance(one, dict) for one in intervals):
        raise UserError(f"{file}: holds no policies; sources.py shows what it should look like")
    return intervals
