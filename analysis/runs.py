"""Read run directories: what a run recorded, and what its policies favour now.

Shape suffixes: R intervals, P policies, Q sub-policies, K operations of one, D operations drawn.
"""

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from augmentations import OPS, row_of
from config import Config, load_config
from policies.learned import read_controller
from policies.preferences import Preference, favoured, verdict
from policies.recorded import recorded
from utils import UserError, has_shape, keyed_generator, printable, warn

SAMPLED = 2000  # policies sampled from a controller to see what it favours
RECENT = 20  # last intervals that are counted where no controller can be read
NUMBER = (int, float)
METRICS = {"epoch": int, "step": int, "train_loss": NUMBER, "train_top1": NUMBER}
INTERVAL = {
    "step": int, "policies": list, "losses": [NUMBER], "entropy": NUMBER, "loss_spread": NUMBER,
    "collapsed": (str, type(None)),
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
    def name(self) -> str:
        return printable(self.directory.resolve().name, 80)

    @property
    def has_policies(self) -> bool:
        """Whether operations are recorded: not for policy "none", nor for policies drawn for each image."""
        return bool(self.intervals) and any(
            subpolicy for policy in self.intervals[-1]["policies"] for subpolicy in policy
        )

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
    def collapsed_intervals(self) -> int:
        return sum(one["collapsed"] is not None for one in self.intervals)

    @property
    def final_accuracy(self) -> float | None:
        """The last one measured on held-out or test images, 0..1; None where nothing was scored yet."""
        scores = [held_out_accuracy(one) for one in self.metrics]
        return next((score for score in reversed(scores) if score is not None), None)

    def epochs(self, intervals: Sequence[Mapping[str, Any]]) -> list[float]:
        """Where intervals end, in epochs."""
        steps_per_epoch = self.metrics[-1]["step"] / self.metrics[-1]["epoch"]
        return [interval["step"] / steps_per_epoch for interval in intervals]


class Draws(NamedTuple):
    """Operations and levels that a run's policies hold now: (operation, level) pairs counted, and how they were got."""

    pairs: Counter
    ops: list[str]
    levels: int
    origin: str

    @property
    def total(self) -> int:
        return self.pairs.total()

    @property
    def op_counts(self) -> dict[str, int]:
        return {name: sum(self.pairs[name, level] for level in range(self.levels)) for name in self.ops}

    @property
    def level_counts(self) -> dict[str, int]:
        return {f"level {level}": sum(self.pairs[name, level] for name in self.ops) for level in range(self.levels)}


def held_out_accuracy(epoch: Mapping[str, Any]) -> float | None:
    return epoch.get("valid_top1", epoch.get("test_top1"))


def read_run(directory: Path) -> RunRecord:
    """Raises UserError for a directory that is not a run's, and for a run that has not finished an epoch."""
    if not (directory / "config.yaml").exists():
        raise UserError(f"{directory}: is not the directory of a run (config.yaml is missing); name one below logs/")
    config = load_config(directory / "config.yaml", {})
    metrics = _read_lines(directory / "metrics.jsonl", METRICS)
    if not metrics:
        raise UserError(f"{directory}: has not finished an epoch yet; there is nothing to show")
    intervals = _read_lines(directory / "policies.jsonl", INTERVAL)
    for interval in intervals:
        if interval["policies"]:  # the list is empty where policies are drawn for each image
            recorded([interval], directory / "policies.jsonl")
    times = _read_lines(directory / "times.jsonl", {})
    seconds = sum(one.get("train_seconds", 0.0) + one.get("other_seconds", 0.0) for one in times)
    return RunRecord(directory, config, metrics, intervals, seconds)


def _read_lines(path: Path, shape: dict[str, Any]) -> list[dict[str, Any]]:
    """Records of a jsonl file. An incomplete last line, which a run may be writing, is ignored."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
        records = [json.loads(line) for line in lines]
    except (OSError, ValueError, RecursionError):
        raise UserError(f"{path}: is damaged; restore it from a copy") from None
    if not has_shape(records, [shape]):
        raise UserError(f"{path}: was written by another version of main.py, or is damaged")
    return records


def run_names(runs: Sequence[RunRecord]) -> list[str]:
    """The names of their directories, with the folder above where two are equal."""
    names = [run.name for run in runs]
    above = [printable(run.directory.resolve().parent.name, 80) for run in runs]
    return [f"{a}/{name}" if names.count(name) > 1 else name for a, name in zip(above, names, strict=True)]


def drawn_pairs(intervals: Iterable[Mapping[str, Any]]) -> list[tuple[str, int]]:
    """Every (operation, level) of the policies. Policies that an interval has from the one before count once."""
    pairs, before = [], None
    for interval in intervals:
        if interval["policies"] != before:
            pairs += [tuple(pair) for policy in interval["policies"] for sub in policy for pair in sub]
        before = interval["policies"]
    return pairs


def final_draws(run: RunRecord) -> Draws:
    """What the controller draws now, sampled from it; where none can be read, what was drawn last."""
    if (run.directory / "model.pt").exists() and run.config.policy == "controller":
        try:
            controller, ops, levels = read_controller(run.directory)
        except UserError as error:
            warn(str(error))
        else:
            decisions = controller.sample(SAMPLED, keyed_generator("report", "beliefs"))
            drawn = zip(decisions.op_MQK.flatten().tolist(), decisions.level_MQK.flatten().tolist(), strict=True)
            pairs = Counter((ops[op], level) for op, level in drawn)
            origin = f"in {SAMPLED:,} policies ({pairs.total():,} operations) sampled from the controller as it is now"
            return Draws(pairs, sorted(ops, key=row_of), levels, origin)
    pairs = Counter(drawn_pairs(run.intervals[-RECENT:]))
    count = min(RECENT, len(run.intervals))
    origin = f"in the {pairs.total():,} operations of the last {count} intervals"
    return Draws(pairs, run.ops, run.levels, origin)


def run_verdict(run: RunRecord) -> str:
    """What the run's policies did, in one or two sentences."""
    if not run.has_policies:
        how = "It uses no policies" if run.config.policy == "none" else "Its operations are drawn for each image"
        return f"{how}: there are no preferences to look for."
    draws = final_draws(run)
    if run.config.policy == "controller":
        text = verdict(run.entropy_share or 0.0, draws.op_counts)
        if run.collapsed_intervals:
            text += f" It was collapsed in {run.collapsed_intervals} of {len(run.intervals)} intervals."
        return text
    found = favoured(draws.op_counts)
    kind = "uniformly random" if run.config.policy == "random" else f"taken from {run.config.policy} policies"
    named = preferences_text(found)
    by_chance = " (chance alone causes this in one of twenty runs)" if found and run.config.policy == "random" else ""
    return f"The policies are {kind}: {named or 'no operation is drawn more often than chance explains'}{by_chance}."


def preferences_text(found: Sequence[Preference], most: int = 5) -> str:
    """Favoured choices with their shares; empty where there are none."""
    if not found:
        return ""
    named = ", ".join(f"{one.name} ({100 * one.share:.1f} %)" for one in found[:most])
    more = f" and {len(found) - most} more" if len(found) > most else ""
    return f"more often than chance ({100 * found[0].chance:.2f} %) explains: {named}{more}"
