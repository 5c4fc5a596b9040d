"""Summarise the finished runs of an experiment: runs.jsonl, summary.md and figures.

results/NAME/ holds all sizes of an experiment: a line of runs.jsonl names its size, summary.md has a part for each, and
the names of figures begin with it. Runs that are repeated replace the earlier ones of the same size, arm and seed.
"""

import dataclasses
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from analysis.figures import has_matplotlib
from analysis.specs import SCRIPTS, Experiment, PlannedRun
from analysis.statistics import difference, verdict
from analysis.summary_figures import ByArm, draw, paired_differences, runs_by_arm
from config import Config
from evaluation.results import read_results
from evaluation.text_table import Table, render
from policies import build_policies
from utils import UserError, first_line, has_shape, write_text

SAMPLED = ("controller", "frozen", "random")  # sources of policies that have an entropy
NUMBER = (int, float)
RECORD = {
    "size": str, "conf": str, "arm": str, "seed": int, "settings": dict, "policy": str, "error": NUMBER,
    "test_images": int, "train_loss": NUMBER, "seconds": NUMBER, "entropy": list, "collapsed": int, "M": int,
    "epochs": int, "torch": str, "device": str, "git_revision": (str, type(None)),
}  # fmt: skip


def write_summary(experiment: Experiment, runs: Sequence[PlannedRun], folder: Path, command: str) -> None:
    """Write runs.jsonl, summary.md and figures of one size: of the runs that have been scored, and of earlier ones.

    command: the one that was typed, shown in summary.md. Raises UserError where the files cannot be written, and where
    unfinished runs would replace results of other settings.
    """
    try:
        (folder / "figures").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made ({error.strerror}); choose another place with --results") from None
    ours = [record_of(run, experiment.size) for run in runs if run.is_scored()]
    before = read_records(folder / "runs.jsonl")
    others = [one for one in before if one["size"] != experiment.size]
    place = {arm: number for number, arm in enumerate(experiment.arms)}
    now = {run.arm: _identity(run, experiment.size) for run in runs}
    kept = _still_valid(before, ours, now)
    replaced = {(one["arm"], one["seed"]) for one in before if one["size"] == experiment.size and one not in kept}
    if len(ours) < len(runs) and replaced - {(one["arm"], one["seed"]) for one in ours}:
        raise UserError(f"{folder}: holds results of other settings, which unfinished runs do not replace")
    ours = sorted([*kept, *ours], key=lambda one: (place[one["arm"]], one["seed"]))
    write_text(folder / "runs.jsonl", "".join(json.dumps(record) + "\n" for record in [*others, *ours]))
    figures = draw(experiment, ours, folder / "figures") if has_matplotlib() else []
    images = [f"![{caption}](figures/{name})\n" for name, caption in figures]
    part = "\n".join((*summary_lines(experiment, ours, command), *images))
    write_text(folder / "summary.md", _with_part(folder / "summary.md", experiment, part))


def _identity(run: PlannedRun, size: str) -> tuple[str, str, dict[str, Any]]:
    """Of an arm: the size, its conf file, and its settings except those that do not affect the result."""
    conf = run.conf.resolve()
    free = {field.name for field in dataclasses.fields(Config) if field.metadata["may_change"]}
    own = {name: value for name, value in run.settings.items() if name not in ("seed", *free)}
    if run.source is not None:
        own["policy_from"] = f"@{run.source.name.rpartition('_')[0]}"
    return size, conf.relative_to(SCRIPTS).as_posix() if conf.is_relative_to(SCRIPTS) else conf.name, own


def _still_valid(
    before: Sequence[Mapping[str, Any]],
    ours: Sequence[Mapping[str, Any]],
    now: Mapping[str, tuple[str, str, dict[str, Any]]],
) -> list[Mapping[str, Any]]:
    """Earlier lines of runs other than ours, of arms whose settings have not changed."""
    done = {(one["arm"], one["seed"]) for one in ours}
    same = [one for one in before if now.get(one["arm"]) == (one["size"], one.get("conf"), one["settings"])]
    there = done | {(one["arm"], one["seed"]) for one in same}
    sources = {arm: str(settings.get("policy_from", "")) for arm, (_, _, settings) in now.items()}

    def has_its_source(one: Mapping[str, Any]) -> bool:
        source = sources[one["arm"]]
        return not source.startswith("@") or (source[1:], one["seed"]) in there

    return [one for one in same if (one["arm"], one["seed"]) not in done and has_its_source(one)]


def record_of(run: PlannedRun, size: str) -> dict[str, Any]:
    """A line of runs.jsonl: numbers, settings and versions, without paths of the machine."""
    results, (_, conf, own) = read_results(run.directory), _identity(run, size)
    (cell,) = results["benchmarks"]["clean"]["cells"]
    metrics, times, policies = (_lines(run.directory / f"{name}.jsonl") for name in ("metrics", "times", "policies"))
    environment = results["benchmarks"]["clean"]["environment"]
    ended = [one for one in metrics if "entropy" in one]  # the epochs in which an interval ended
    largest = build_policies(run.config).largest_entropy if run.config.policy in SAMPLED else 0.0
    return {
        "size": size,
        "arm": run.arm,
        "seed": run.seed,
        "conf": conf,
        "settings": own,
        "policy": run.config.policy,
        "error": cell["error"],
        "test_images": cell["images"],
        "train_loss": metrics[-1]["train_loss"],
        "train_top1": metrics[-1]["train_top1"],
        "M": run.config.M,
        "epochs": run.config.epochs,
        "seconds": round(sum(one["train_seconds"] + one["other_seconds"] for one in times), 1),
        "entropy": [round(one["entropy"] / largest, 4) for one in ended] if largest else [],
        "loss_spread": [round(one["loss_spread"], 4) for one in ended],
        "collapsed": sum(one["collapsed"] is not None for one in policies),
        "intervals": len(policies),
        "images": results["benchmarks"]["clean"]["source"],
        "sha256": results["sha256"],
        **{name: environment[name] for name in ("torch", "torchvision", "device", "threads", "git_revision")},
    }


def read_records(path: Path) -> list[dict[str, Any]]:
    """The lines of a runs.jsonl; empty if there is no file. Raises UserError."""
    if not path.exists():
        return []
    try:
        records = _lines(path)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{path}: cannot be read ({first_line(error)}); restore it from a copy, or move it elsewhere"
        ) from None
    if not has_shape(records, [RECORD]):
        raise UserError(f"{path}: was not written by experiments.py; move it elsewhere")
    return records


def summary_lines(experiment: Experiment, records: Sequence[Mapping[str, Any]], command: str) -> list[str]:
    """The part of summary.md about one size: what was run, each arm's errors, and the differences seed by seed."""
    first, by_arm = records[0], runs_by_arm(records)
    others = [f"`{conf}` ({', '.join(arms)})" for conf, arms in _arms_by_conf(records).items() if conf != first["conf"]]
    settings = [record["settings"] for record in records]
    shared = [f"{k} {v}" for k, v in settings[0].items() if all(k in one and one[k] == v for one in settings)]
    ran = "{device} (threads: {threads}), torch {torch}, revision {git_revision}"
    where = "; ".join(dict.fromkeys(ran.format(**one) for one in records))
    overrides = [text for text in experiment.overrides if not text.startswith("dataroot=")]
    changed = "Settings were changed on the command line: the following note may not hold. " if overrides else ""
    confs = " or ".join([f"`{first['conf']}`", *others])
    every = f"Every arm: {confs}{' with ' * bool(shared)}{', '.join(shared)}. Run on {where}."
    lines = [f"{changed}{experiment.note}", "", every, ""]
    lines += ["```bash", command, "```", ""]
    rows = [_row(experiment, arm, of_arm) for arm, of_arm in by_arm.items()]
    header = ("arm", "M", "epochs", "test error (%)", "by seed", "train loss", "entropy left", "collapsed")
    seeds = ", ".join(map(str, sorted({record["seed"] for record in records})))
    notes = [
        f"Errors are of the last epoch on {first['test_images']:,} test images ({first['images']}), where one image is "
        f"{100 / first['test_images']:.2g} points; mean +- standard deviation over seeds {seeds}. The train loss is "
        "over augmented copies. Entropy left: share of its maximum, at the end. Collapsed: share of the intervals.",
    ]
    lines += [render(Table("### Arms", header, rows, notes), "markdown"), ""]
    return [*lines, *_comparisons(experiment, by_arm)]


def _row(experiment: Experiment, arm: str, of_arm: Mapping[int, Mapping[str, Any]]) -> tuple[str, ...]:
    runs = list(of_arm.values())
    label = experiment.labels.get(arm) or ", ".join(f"{k} {v}" for k, v in experiment.arms[arm].items())
    entropies = [one["entropy"][-1] for one in runs if one["entropy"]]
    collapsed = sum(one["collapsed"] for one in runs) / sum(one["intervals"] for one in runs)
    return (
        f"**{arm}**: {label}" if label else f"**{arm}**",
        str(runs[0]["M"]),
        str(runs[0]["epochs"]),
        over_seeds([100 * one["error"] for one in runs]),
        ", ".join(f"{100 * one['error']:.2f}" for one in runs),
        f"{statistics.fmean(one['train_loss'] for one in runs):.3f}",
        f"{statistics.fmean(entropies):.1%}" if entropies else "-",
        f"{collapsed:.0%}" if runs[0]["policy"] == "controller" else "-",
    )


def _comparisons(experiment: Experiment, by_arm: ByArm) -> list[str]:
    rows = []
    for first, second in experiment.compare:
        paired = paired_differences(by_arm, first, second)
        if not paired:
            continue
        mean, half_width, pairs = difference(paired)
        width = f"+- {half_width:.2f}" if pairs > 1 else "-"
        says = verdict(paired, len(experiment.compare), (first, second)) if experiment.ranks else "none: too small"
        rows.append((f"{first} - {second}", str(pairs), f"{mean:+.2f}", width, says))
    header = ("arms", "pairs", "difference (points)", "95 % interval", "verdict")
    note = (
        "Differences of test errors seed by seed, below 0 where the first arm is better; intervals by Student's t. "
        f"The verdicts hold for the {len(rows)} comparisons together (Bonferroni)."
    )
    return [render(Table("### Differences", header, rows, [note]), "markdown"), ""] if rows else []


def over_seeds(values: Sequence[float]) -> str:
    spread = f" +- {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.2f}{spread}"


def _arms_by_conf(records: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    arms: dict[str, list[str]] = {}
    for record in records:
        of_conf = arms.setdefault(record["conf"], [])
        if record["arm"] not in of_conf:
            of_conf.append(record["arm"])
    return arms


def _with_part(path: Path, experiment: Experiment, part: str) -> str:
    """The text of summary.md with this size's part replaced."""
    parts = {}
    if path.exists():
        for text in path.read_text(encoding="utf-8").split("\n## ")[1:]:
            size, _, rest = text.partition("\n")
            parts[size] = rest.strip("\n")
    parts[experiment.size] = part.strip("\n")
    in_order = [size for size in ("tiny", "small", "full") if size in parts]
    text = "\n\n".join(f"## {size}\n\n{parts[size]}" for size in in_order)
    return f"# {experiment.name}\n\n{experiment.question}\n\n{text}\n"


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
