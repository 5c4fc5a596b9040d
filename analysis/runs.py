"""Read run directories: what a run recorded, and what its policies favour now."""

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from augmentations import OPS
from config import Config, load_config
from policies.learned import read_controller
from policies.preferences import favoured, verdict
from utils import UserError, has_shape, keyed_generator, printable, warn

SAMPLED = 2000  # policies sampled from a controller to see what it favours
RECENT = 20  # last intervals that are counted where no controller can be read
NUMBER = (int, float)
METRICS = {"epoch": int, "step": int, "train_loss": NUMBER, "train_top1": NUMBER}
INTERVAL = {
    "step": int, "policies": [[[[(str, int)]]]], "losses": [NUMBER], "entropy": NUMBER, "collapsed": (str, type(None)),
}  # fmt: skip


@dataclass(frozen=True)
class RunRecord:
    """The content of a run directory, of finished and unfinished runs alike."""

    directory: Path
    config: Config
    metrics: list[dict[str, Any]]
    intervals: list[dict[str, Any]]
    seconds: float

    @property
    def has_policies(self) -> bool:
        """Whether operations are recorded: not for policy "none", nor for policies drawn for each image."""
        return bool(drawn_pairs(self.intervals[-1:]))

    @property
    def ops(self) -> list[str]:
        """The operations that could be drawn, in the order of OPS; for policies from a file those that were drawn."""
        known = set(self.config.ops)
        if self.config.policy not in ("controller", "random"):
            known = {name for name, _ in drawn_pairs(self.intervals)}
        return [op.name for op in OPS if op.name in known]

    @property
    def levels(self) -> int:
        return self.intervals[0].get("levels", self.config.levels)

    @property
    def entropy_share(self) -> float | None:
        """The policies' mean entropy in the last interval, as a share of the maximum; None where there is none."""
        maximum = self.maximal_entropy
        return self.intervals[-1]["entropy"] / maximum if maximum and self.intervals else None

    @property
    def maximal_entropy(self) -> float | None:
        """Of a policy whose decisions are uniformly random, in nats; None for policies that are not sampled here."""
        own = self.config
        if own.policy not in ("controller", "random"):
            return None
        return own.Q * own.K * (math.log(len(own.ops)) + math.log(own.levels)) or None

    @property
    def floors(self) -> list[float]:
        """The least share of its maximal entropy that the controller kept in each interval; none without a floor."""
        return [one["entropy_floor"] for one in self.intervals if "entropy_floor" in one]

    @property
    def collapsed_intervals(self) -> int:
        return sum(one["collapsed"] is not None for one in self.intervals)

    @property
    def held_out(self) -> list[tuple[int, float]]:
        """(epoch, accuracy in 0..1) on held-out or test images, of the epochs in which it was measured."""
        scores = [(one["epoch"], one.get("valid_top1", one.get("test_top1"))) for one in self.metrics]
        return [(epoch, score) for epoch, score in scores if score is not None]

    def epochs(self, intervals: Sequence[Mapping[str, Any]]) -> list[float]:
        """Where intervals end, in epochs."""
        steps_per_epoch = self.metrics[-1]["step"] / self.metrics[-1]["epoch"]
        return [interval["step"] / steps_per_epoch for interval in intervals]


def read_run(directory: Path) -> RunRecord:
    """Raises UserError for a directory that is not a run's, and for a run that has not finished an epoch."""
    if not (directory / "config.yaml").exists():
        raise UserError(f"{directory}: is not the directory of a run (config.yaml is missing); name one below logs/")
    config = load_config(directory / "config.yaml", {})
    metrics = read_lines(directory / "metrics.jsonl", METRICS)
    if not metrics:
        raise UserError(f"{directory}: has not finished an epoch yet; there is nothing to show")
    times = read_lines(directory / "times.jsonl")
    seconds = sum(one.get("train_seconds", 0.0) + one.get("other_seconds", 0.0) for one in times)
    return RunRecord(directory, config, metrics, read_lines(directory / "policies.jsonl", INTERVAL), seconds)


def read_lines(path: Path, shape: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """Records of a jsonl file, none if it is missing. An incomplete last line, which a run may be writing, is ignored.

    Raises UserError where a record does not have this shape.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
        records = [json.loads(line) for line in lines]
    except (OSError, ValueError, RecursionError):
        records = None
    if not has_shape(records, [shape or {}]):
        raise UserError(
            f"{path}: is damaged, or was written by another version; restore it from a copy or move it away"
        )
    return records


def run_names(runs: Sequence[RunRecord]) -> list[str]:
    """The names of their directories, with the folder above where two are equal."""
    parts = [run.directory.resolve().parts for run in runs]
    names = [path[-1] for path in parts]
    return [printable("/".join(path[-2:] if names.count(path[-1]) > 1 else path[-1:]), 80) for path in parts]


def drawn_pairs(intervals: Iterable[Mapping[str, Any]]) -> list[tuple[str, int]]:
    """Every (operation, level) of the policies. Policies that an interval has from the one before count once."""
    pairs, before = [], None
    for interval in intervals:
        if interval["policies"] != before:
            pairs += [(op, round(level)) for policy in interval["policies"] for sub in policy for op, level, *_ in sub]
        before = interval["policies"]
    return pairs


def draw_counts(pairs: Iterable[tuple[str, int]], run: RunRecord, kind: str) -> dict[str, int]:
    """How often each of the "operations" or of the "levels" was drawn, those never drawn included."""
    if kind == "operations":
        counted = Counter(name for name, _ in pairs)
        return {name: counted[name] for name in run.ops}
    counted = Counter(level for _, level in pairs)
    return {f"level {level}": counted[level] for level in range(run.levels)}


def final_draws(run: RunRecord) -> tuple[list[tuple[str, int]], str]:
    """What the controller draws now, sampled from it; where none can be read, what was drawn last. And which it is."""
    if (run.directory / "model.pt").exists() and run.config.policy == "controller":
        try:
            controller, ops, _ = read_controller(run.directory)
        except UserError as error:
            warn(str(error))
        else:
            decisions = controller.sample(SAMPLED, keyed_generator("report", "beliefs"))
            drawn = zip(decisions.op_MQK.flatten().tolist(), decisions.level_MQK.flatten().tolist(), strict=True)
            pairs = [(ops[op], level) for op, level in drawn]
            return (
                pairs,
                f"in {SAMPLED:,} policies ({len(pairs):,} operations) sampled from the controller as it is now",
            )
    pairs = drawn_pairs(run.intervals[-RECENT:])
    return pairs, f"in the {len(pairs):,} operations of the last {min(RECENT, len(run.intervals))} intervals"


def run_verdict(run: RunRecord) -> str:
    """What the run's policies did, in one or two sentences."""
    policy = run.config.policy
    if not run.has_policies:
        how = "It uses no policies" if policy == "none" else "Its operations are drawn for each image"
        return f"{how}: there are no preferences to look for."
    counts = draw_counts(final_draws(run)[0], run, "operations")
    if policy == "controller":
        text = verdict(run.entropy_share or 0.0, counts, run.floors[-1] if run.floors else 0.0)
        if run.collapsed_intervals:
            text += f" It was collapsed in {run.collapsed_intervals} of {len(run.intervals)} intervals."
        return text
    says = "no operation is drawn more often than chance explains"
    if found := favoured(counts):
        named = ", ".join(f"{one.name} ({100 * one.share:.1f} %)" for one in found)
        says = f"more often than chance ({100 * found[0].chance:.2f} %) explains: {named}"
        says += " (chance alone causes this in one of twenty runs)" * (policy == "random")
    kind = "uniformly random" if policy == "random" else f"taken from {policy} policies"
    return f"The policies are {kind}: {says}."
