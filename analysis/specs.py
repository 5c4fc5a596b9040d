"""An experiment as a file (confs/experiments/NAME.yaml): its arms and sizes, checked, and the runs to be made.

question: Do learned policies beat random ones at the same cost?
arms:                                       # by name, the settings in which they differ
  random: {policy: random}
  advaa: {policy: controller}
  transfer: {policy: frozen, policy_from: "@advaa"}       # the run of that arm with the same seed
labels: {advaa: as in the paper}            # of arms, for the summary; optional
compare: [[advaa, random]]
sizes:
  tiny:
    conf: confs/demo.yaml                   # an arm may name another
    seeds: [0, 1, 2]
    set: {epochs: 6}                        # settings of all arms
    arms: {random: {M: 1}}                  # settings of an arm at this size only
    note: Embedded shapes.                  # what the numbers can be compared with
    ranks: false                            # too small to say which arm is better; default: true
"""

import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config import Config, can_be_a_path, changed_settings, load_config, parse_overrides, read_yaml
from utils import UserError, did_you_mean, has_shape, printable, short_repr

SCRIPTS = Path(__file__).resolve().parent.parent
FOLDER = SCRIPTS / "confs" / "experiments"
SIZES = ("tiny", "small", "full")
SHAPE = {"question": str, "arms": dict, "compare": [list], "sizes": dict}
SIZE_SHAPE = {"conf": str, "seeds": [int], "note": str}
MAY_HAVE, MAY_BE = {"set": {}, "arms": {}, "ranks": True}, {"set": dict, "arms": dict, "ranks": bool}
KEYS, SIZE_KEYS = {*SHAPE, "labels"}, {*SIZE_SHAPE, "set", "arms", "ranks"}


@dataclass(frozen=True)
class Experiment:
    """An experiment at one of its sizes.

    arms: by name, the settings in which it differs. compare: pairs of arms. note: what its numbers can be compared
    with. ranks: False where it is too small to say which arm is better, however many seeds there are. overrides:
    settings of all arms, "setting=value", that replace the file's.
    """

    name: str
    question: str
    size: str
    conf: str
    seeds: tuple[int, ...]
    settings: dict[str, Any]
    arms: dict[str, dict[str, Any]]
    labels: dict[str, str]
    compare: tuple[tuple[str, str], ...]
    note: str
    ranks: bool
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class PlannedRun:
    """One arm with one seed. source: the run whose policies it takes, if any."""

    arm: str
    seed: int
    conf: Path
    settings: dict[str, Any]
    config: Config
    directory: Path
    source: Path | None

    @property
    def name(self) -> str:
        return self.directory.name

    def epochs_done(self) -> int:
        log = self.directory / "metrics.jsonl"
        return log.read_bytes().count(b"\n") if log.exists() else 0

    def is_trained(self) -> bool:
        """Whether the last epoch's checkpoint, which is written last, exists."""
        return any(self.directory.glob(f"checkpoints/epoch-{self.config.epochs:04d}-step-000000-*.pt"))

    def is_scored(self) -> bool:
        """Whether results.json holds the test error of the trained network."""
        if not (self.directory / "results.json").exists():
            return False
        from evaluation.results import read_results  # imports much that --help does not need

        results = read_results(self.directory)
        return results["epoch"] == self.config.epochs and bool(results["benchmarks"].get("clean", {}).get("summary"))

    def state(self) -> str:
        if self.is_scored():
            return "done"
        if self.is_trained():
            return "trained, not scored"
        started = (self.directory / "config.yaml").exists()
        return f"stopped after {self.epochs_done()} of {self.config.epochs} epochs" if started else "missing"

    def commands(self, launcher: Sequence[str], options: Sequence[str]) -> list[list[str]]:
        """The commands that are still to be run."""
        folder = ("--logdir", str(self.directory.parent), "--name", self.name)
        train = [*launcher, str(SCRIPTS / "main.py"), "--load_conf", str(self.conf), *folder, "--seed", str(self.seed)]
        if (self.directory / "config.yaml").exists():
            train.append("--resume")
        changes = [f"{name}={json.dumps(value)}" for name, value in self.settings.items() if name != "seed"]
        train += [*options, *(["--set", *changes] if changes else [])]
        score = [sys.executable, str(SCRIPTS / "evaluate.py"), "--checkpoint", str(self.directory / "model.pt")]
        score += [*options, *(("--dataroot", self.config.dataroot) if self.config.dataroot != "./data" else ())]
        return [score] if self.is_trained() else [train, score]


def load_experiment(
    name: str, size: str, seeds: Sequence[int] | None = None, overrides: Sequence[str] = ()
) -> Experiment:
    """confs/experiments/NAME.yaml, or the file of that name, at one of its sizes. Raises UserError."""
    path = _find_file(name)
    content = read_yaml(path)
    _check_file(path, content, size)
    of_size = content["sizes"][size]
    own = of_size.get("arms", {})
    _check_arms(path, content, size, own)
    return Experiment(
        path.stem,
        content["question"],
        size,
        of_size["conf"],
        tuple(seeds or of_size["seeds"]),
        dict(of_size.get("set", {})),
        {arm: {**settings, **own.get(arm, {})} for arm, settings in content["arms"].items()},
        {str(arm): str(label) for arm, label in content.get("labels", {}).items()},
        tuple((first, second) for first, second in content["compare"]),
        of_size["note"],
        of_size.get("ranks", True),
        tuple(overrides),
    )


def experiment_names() -> list[str]:
    return sorted(file.stem for file in FOLDER.glob("*.yaml"))


def _find_file(name: str) -> Path:
    path = Path(name) if name.endswith(".yaml") else FOLDER / f"{name}.yaml"
    if path.exists():
        return path
    if name.endswith(".yaml") and (FOLDER / path.name).exists():
        raise UserError(f"{printable(name)}: was not found; write {path.stem}, or confs/experiments/{path.name}")
    known = experiment_names()
    raise UserError(f"{short_repr(name)}: unknown experiment{did_you_mean(name, known)} ({', '.join(known)})")


def _check_file(path: Path, content: Any, size: str) -> None:
    if not has_shape(content, SHAPE) or not content["arms"]:
        raise UserError(f"{path}: needs {', '.join(SHAPE)}; confs/experiments/controls.yaml is an example")
    if "words" in content:
        raise UserError(f"{path}: the key 'words' is now called 'labels'")
    if unknown := sorted(map(str, set(content) - KEYS)):
        raise UserError(f"{path}: unknown key {short_repr(unknown[0])}{did_you_mean(unknown[0], KEYS)}")
    if size not in content["sizes"]:
        raise UserError(f"{path}: has no size {size}; it has {', '.join(map(str, content['sizes']))}")
    of_size = content["sizes"][size]
    if not has_shape(of_size, SIZE_SHAPE) or set(of_size) - SIZE_KEYS or not has_shape({**MAY_HAVE, **of_size}, MAY_BE):
        raise UserError(f"{path}: size {size}: needs {', '.join(SIZE_SHAPE)}; set, arms and ranks are optional")
    if not are_seeds(of_size["seeds"]):
        seeds = short_repr(of_size["seeds"])
        raise UserError(f"{path}: size {size}: seeds: {seeds} must be different whole numbers, 0 or above")


def _check_arms(path: Path, content: dict[str, Any], size: str, own: dict[str, Any]) -> None:
    arms = content["arms"]
    if not has_shape(content.get("labels", {}), dict):
        raise UserError(f"{path}: labels: must map arms to texts")
    for arm, settings in (*arms.items(), *own.items()):
        if not isinstance(arm, str) or not re.fullmatch(r"\w{1,60}", arm) or not has_shape(settings, dict):
            raise UserError(
                f"{path}: arm {short_repr(arm)}: needs a name of letters and digits, and a mapping of settings"
            )
        if arm not in arms:
            raise UserError(f"{path}: size {size}: there is no arm {short_repr(arm)}{did_you_mean(arm, arms)}")
    for pair in content["compare"]:
        if len(pair) != 2 or not has_shape(pair, [str]) or not set(pair) <= set(arms):
            raise UserError(f"{path}: compare: every entry must be a pair of arms")


def find_conf(conf: Any, where: str) -> Path:
    """A conf file named in an experiment: in the working directory or else in the project's directory."""
    if not isinstance(conf, str) or not can_be_a_path(conf) or len(conf) > 250:
        raise UserError(f"{where}: conf: {short_repr(conf)} is not a file name")
    return Path(conf) if Path(conf).exists() else SCRIPTS / conf


def are_seeds(seeds: Sequence[int]) -> bool:
    """Whether these are one or more different whole numbers, 0 or above."""
    return bool(seeds) and all(type(seed) is int and seed >= 0 for seed in seeds) and len({*seeds}) == len(seeds)


def runs_of(experiment: Experiment, logdir: Path) -> Iterator[PlannedRun]:
    """The runs of an experiment, seed by seed, with all their settings checked.

    Raises UserError for invalid settings, and for a directory that holds a run with other settings.
    """
    folder = logdir / f"{experiment.name}-{experiment.size}"
    overrides = {field: value for field, (_, value) in parse_overrides(experiment.overrides).items()}
    for seed in experiment.seeds:
        for number, (arm, own) in enumerate(experiment.arms.items()):
            settings = {**experiment.settings, **own, **overrides}
            where = f"experiment {experiment.name}, {experiment.size}, arm {arm}"
            conf = find_conf(settings.pop("conf", experiment.conf), where)
            source = None
            if str(settings.get("policy_from")).startswith("@"):
                name = settings["policy_from"][1:]
                if name not in list(experiment.arms)[:number]:
                    raise UserError(f"{where}: @{name} is not an earlier arm")
                source = folder / f"{name}_{seed}"
                settings["policy_from"] = str(source)
            settings["seed"] = seed
            config = load_config(conf, {field: (where, value) for field, value in settings.items()})
            run = PlannedRun(arm, seed, conf, settings, config, folder / f"{arm}_{seed}", source)
            before = run.directory / "config.yaml"
            old = load_config(before, {}) if before.exists() else config
            changes = changed_settings(old, config)
            if source is not None and old.policy_from != config.policy_from:
                changes.append(f"policy_from: {old.policy_from} -> {config.policy_from}")
            if changes:
                raise UserError(
                    f"{run.directory}: holds a run with other settings ({'; '.join(changes)})\n"
                    "move it elsewhere, or choose another --logdir"
                )
            yield run
