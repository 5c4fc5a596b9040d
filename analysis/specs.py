"""An experiment as a file, checked, and the runs to be made. docs/experiments.md describes the format."""

import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config import Config, changed_settings, find_conf, load_config, parse_overrides, read_yaml
from utils import UserError, did_you_mean, has_shape, short_repr

SCRIPTS = Path(__file__).resolve().parent.parent
FOLDER = SCRIPTS / "confs" / "experiments"
SIZES = ("tiny", "small", "full")
SHAPE = {"question": str, "arms": dict, "compare": [[str]], "sizes": dict, "labels": dict}
SIZE_SHAPE = {"conf": str, "seeds": [int], "note": str, "set": dict, "arms": dict, "ranks": bool}


@dataclass(frozen=True)
class Experiment:
    """An experiment at one of its sizes. overrides: "setting=value" for all arms, instead of the file's."""

    name: str
    question: str
    size: str
    conf: str
    seeds: tuple[int, ...]
    settings: dict[str, Any]
    arms: dict[str, dict[str, Any]]
    labels: dict[str, str]
    compare: Sequence[Sequence[str]]
    note: str
    ranks: bool
    overrides: Sequence[str]


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
        if not (self.directory / "config.yaml").exists():
            return "missing"
        log = self.directory / "metrics.jsonl"
        done = log.read_bytes().count(b"\n") if log.exists() else 0
        return f"stopped after {done} of {self.config.epochs} epochs"

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
    path = Path(name) if name.endswith(".yaml") else FOLDER / f"{name}.yaml"
    if not path.exists():
        known = experiment_names()
        raise UserError(f"{short_repr(name)}: unknown experiment{did_you_mean(path.stem, known)} ({', '.join(known)})")
    content = {"labels": {}, **read_yaml(path)}
    _check(path, content, SHAPE, "labels is")
    if size not in content["sizes"]:
        raise UserError(f"{path}: has no size {size}; it has {', '.join(map(str, content['sizes']))}")
    of_size = content["sizes"][size]
    if isinstance(of_size, dict):
        of_size = {"set": {}, "arms": {}, "ranks": True, **of_size}
    _check(f"{path}: size {size}", of_size, SIZE_SHAPE, "set, arms and ranks are")
    if not are_seeds(of_size["seeds"]):
        raise UserError(f"{path}: size {size}: seeds: must be different whole numbers, 0 or above")
    arms, own = content["arms"], of_size["arms"]
    for arm, settings in (*arms.items(), *own.items()):
        if not re.fullmatch(r"\w{1,60}", str(arm)) or not isinstance(settings, dict) or arm not in arms:
            raise UserError(
                f"{path}: arm {short_repr(arm)}: needs a name of letters and digits, listed in arms, and settings"
            )
    if not all(len(pair) == 2 and set(pair) <= set(arms) for pair in content["compare"]):
        raise UserError(f"{path}: compare: every entry must be a pair of arms")
    return Experiment(
        path.stem,
        content["question"],
        size,
        of_size["conf"],
        tuple(seeds or of_size["seeds"]),
        of_size["set"],
        {arm: {**settings, **own.get(arm, {})} for arm, settings in arms.items()},
        content["labels"],
        content["compare"],
        of_size["note"],
        of_size["ranks"],
        overrides,
    )


def experiment_names() -> list[str]:
    return sorted(file.stem for file in FOLDER.glob("*.yaml"))


def _check(where: str | Path, content: Any, shape: dict[str, Any], optional: str) -> None:
    """Raises UserError where a part of the file does not have this shape, or has another key."""
    if not has_shape(content, shape):
        raise UserError(f"{where}: needs {', '.join(shape)} ({optional} optional), as in confs/experiments/")
    if unknown := sorted(map(str, set(content) - set(shape))):
        raise UserError(f"{where}: unknown key {short_repr(unknown[0])}{did_you_mean(unknown[0], shape)}")


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
            conf = find_conf(str(settings.pop("conf", experiment.conf)))
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
