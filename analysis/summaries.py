"""Summarise the finished runs of an experiment: runs.jsonl, summary.md and figures.

results/NAME/ holds all sizes of an experiment: a line of runs.jsonl names its size, summary.md has a part for each, and
the names of figures begin with it. Runs that are repeated replace the earlier ones of the same size, arm and seed.
"""

import dataclasses
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.figures import ByArm, entropies, errors, has_matplotlib, regime
from analysis.runs import read_lines
from analysis.specs import SCRIPTS, SIZES, Experiment, PlannedRun
from analysis.statistics import difference, verdict
from config import Config
from evaluation.results import read_results
from evaluation.text_table import Table, render
from policies import build_policies
from utils import UserError, write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FITTED = 0.95  # training accuracy from which on the augmented images count as fitted
SAMPLED = ("controller", "frozen", "random")  # sources of policies that have an entropy
RECORD = {
    "size": str, "conf": str, "arm": str, "seed": int, "settings": dict, "policy": str, "error": (int, float),
    "train_loss": (int, float), "train_top1": (int, float), "entropy": list, "collapsed": int, "intervals": int,
    "M": int, "epochs": int, "passes": int,
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
    done = {(one["arm"], one["seed"]) for one in ours}
    before = read_lines(folder / "runs.jsonl", RECORD)
    earlier = [one for one in before if one["size"] == experiment.size and (one["arm"], one["seed"]) not in done]
    now = {run.arm: _identity(run) for run in runs}
    changed = {
        one["arm"]
        for one in before
        if one["size"] == experiment.size and now.get(one["arm"]) != (one["conf"], one["settings"])
    }
    changed |= {arm for arm, (_, own) in now.items() if str(own.get("policy_from", "")).removeprefix("@") in changed}
    kept = [one for one in earlier if one["arm"] not in changed]
    if len(ours) < len(runs) and len(kept) < len(earlier):
        raise UserError(f"{folder}: holds results of other settings, which unfinished runs do not replace")
    arms = list(experiment.arms)
    ours = sorted([*kept, *ours], key=lambda one: (arms.index(one["arm"]), one["seed"]))
    others = [one for one in before if one["size"] != experiment.size]
    write_text(folder / "runs.jsonl", "".join(json.dumps(record) + "\n" for record in [*others, *ours]))
    lines = summary_lines(experiment, ours, command)
    if has_matplotlib():
        by_arm = runs_by_arm(ours)
        lines += _draw(experiment, "errors", errors(by_arm), "test errors, a line for each seed", folder)
        lines += _draw(experiment, "regime", regime(against_random(experiment, by_arm)), "when hardness pays", folder)
        lines += _draw(experiment, "entropy", entropies(by_arm), "entropy of the policies (band: all seeds)", folder)
    write_text(folder / "summary.md", _with_part(folder / "summary.md", experiment, "\n".join(lines)))


def _draw(experiment: Experiment, name: str, figure: "Figure | None", caption: str, folder: Path) -> list[str]:
    """Write a figure; returns the line of summary.md that shows it."""
    if figure is None:
        return []
    file, title = f"figures/{experiment.size}_{name}.png", f"{experiment.name}, {experiment.size}: {caption}"
    figure.axes[0].set_title(title, fontsize="medium", loc="left")
    figure.savefig(folder / file, dpi=110, metadata={"Software": None})
    return [f"![{title}]({file})\n"]


def _identity(run: PlannedRun) -> tuple[str, dict[str, Any]]:
    """Of an arm: its conf file, and its settings except those that do not affect the result."""
    conf = run.conf.resolve()
    free = {field.name for field in dataclasses.fields(Config) if field.metadata["may_change"]}
    own = {name: value for name, value in run.settings.items() if name not in ("seed", *free)}
    if run.source is not None:
        own["policy_from"] = f"@{run.source.name.rpartition('_')[0]}"
    return conf.relative_to(SCRIPTS).as_posix() if conf.is_relative_to(SCRIPTS) else conf.name, own


def record_of(run: PlannedRun, size: str) -> dict[str, Any]:
    """A line of runs.jsonl: numbers, settings and versions, without paths of the machine."""
    results, (conf, own) = read_results(run.directory), _identity(run)
    clean = results["benchmarks"]["clean"]
    (cell,), environment = clean["cells"], clean["environment"]
    metrics, times, policies = (
        read_lines(run.directory / f"{name}.jsonl") for name in ("metrics", "times", "policies")
    )
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
        "train_top1": round(statistics.fmean(one["train_top1"] for one in metrics[-max(1, len(metrics) // 10) :]), 5),
        "M": run.config.M,
        "epochs": run.config.epochs,
        "passes": run.config.passes * run.config.epochs,
        "seconds": round(sum(one["train_seconds"] + one["other_seconds"] for one in times), 1),
        "entropy": [round(one["entropy"] / largest, 4) for one in ended] if largest else [],
        "loss_spread": [round(one["loss_spread"], 4) for one in ended],
        "collapsed": sum(one["collapsed"] is not None for one in policies),
        "intervals": len(policies),
        "images": clean["source"],
        "sha256": results["sha256"],
        **{name: environment[name] for name in ("torch", "torchvision", "device", "threads", "git_revision")},
    }


def summary_lines(experiment: Experiment, records: Sequence[Mapping[str, Any]], command: str) -> list[str]:
    """The part of summary.md about one size: what was run, each arm's errors, and the differences seed by seed."""
    first, by_arm = records[0], runs_by_arm(records)
    changed = any(not text.startswith("dataroot=") for text in experiment.overrides)
    warning = "Settings were changed on the command line: the following note may not hold. " * changed
    confs: dict[str, list[str]] = {}
    for arm, of_arm in by_arm.items():
        confs.setdefault(next(iter(of_arm.values()))["conf"], []).append(arm)
    named = [f"`{conf}`" + f" ({', '.join(arms)})" * (len(confs) > 1) for conf, arms in confs.items()]
    shared = [f"{k} {v}" for k, v in first["settings"].items() if all(one["settings"].get(k) == v for one in records)]
    ran = "{device} (threads: {threads}), torch {torch}, revision {git_revision}"
    where = "; ".join(dict.fromkeys(ran.format(**one) for one in records))
    every = f"Every arm: {' or '.join(named)}{' with ' * bool(shared)}{', '.join(shared)}. Run on {where}."
    seeds = ", ".join(map(str, sorted({record["seed"] for record in records})))
    note = (
        f"Errors are of the last epoch on {describe_test_images(experiment, records)}; mean +- standard deviation over "
        f"seeds {seeds}. The train loss and accuracy are over augmented copies, the accuracy in the last tenth of the "
        "epochs. Passes: for each training image, a forward pass counts 1, a forward and backward pass 3. Entropy "
        "left: share of its maximum, at the end. Collapsed: share of the intervals."
    )
    header = (
        "arm", "M", "epochs", "passes", "test error (%)", "by seed", "train loss", "train accuracy", "entropy left",
        "collapsed",
    )  # fmt: skip
    rows = [_row(experiment, arm, list(of_arm.values())) for arm, of_arm in by_arm.items()]
    lines = [f"{warning}{experiment.note}", "", every, "", "```bash", command, "```", ""]
    lines += [render(Table("### Arms", header, rows, [note]), "markdown"), ""]
    return [*lines, *fitted_or_not(by_arm), *_comparisons(experiment, by_arm)]


def describe_test_images(experiment: Experiment, records: Sequence[Mapping[str, Any]]) -> str:
    """How many test images the arms were scored on and of which kind; of arms that are compared first."""
    compared = {arm for pair in experiment.compare for arm in pair}
    arms: dict[str, list[str]] = {}
    for one in sorted(records, key=lambda one: one["arm"] not in compared):
        points = f"one image is {100 / one['test_images']:.2g} points"
        kind = f"{one['test_images']:,} test images ({one['images']}), where {points}"
        arms.setdefault(kind, []).append(one["arm"])
    if len(arms) == 1:
        return next(iter(arms))
    return ", and ".join(f"{kind} ({', '.join(dict.fromkeys(names))})" for kind, names in arms.items())


def fitted_or_not(by_arm: ByArm) -> list[str]:
    """Whether the networks fitted random policies: only then can harder ones help. Nothing without such an arm."""
    lines = []
    for arm, of_arm in by_arm.items():
        runs = list(of_arm.values())
        if runs[0]["policy"] == "random":
            mean = statistics.fmean(one["train_top1"] for one in runs)
            fits = f"fitted random policies (from {FITTED:.0%} on)" if mean >= FITTED else (
                "did not fit random policies: at this length hardness was not put to the test"
            )  # fmt: skip
            lines.append(f"- {arm}: training accuracy {mean:.1%}; the network {fits}.")
    return [*lines, ""] if lines else []


def _row(experiment: Experiment, arm: str, runs: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    label = experiment.labels.get(arm) or ", ".join(f"{k} {v}" for k, v in experiment.arms[arm].items())
    errors = [100 * one["error"] for one in runs]
    entropies = [one["entropy"][-1] for one in runs if one["entropy"]]
    collapsed = sum(one["collapsed"] for one in runs) / sum(one["intervals"] for one in runs)
    return (
        f"**{arm}**: {label}" if label else f"**{arm}**",
        str(runs[0]["M"]),
        str(runs[0]["epochs"]),
        f"{runs[0]['passes']:,}",
        f"{statistics.fmean(errors):.2f}" + (f" +- {statistics.stdev(errors):.2f}" if len(errors) > 1 else ""),
        ", ".join(f"{error:.2f}" for error in errors),
        f"{statistics.fmean(one['train_loss'] for one in runs):.3f}",
        f"{statistics.fmean(one['train_top1'] for one in runs):.1%}",
        f"{statistics.fmean(entropies):.1%}" if entropies else "-",
        f"{collapsed:.0%}" if runs[0]["policy"] == "controller" else "-",
    )


def runs_by_arm(records: Sequence[Mapping[str, Any]]) -> ByArm:
    by_arm: dict[str, dict[int, Mapping[str, Any]]] = {}
    for record in records:
        by_arm.setdefault(record["arm"], {})[record["seed"]] = record
    return by_arm


def _comparisons(experiment: Experiment, by_arm: ByArm) -> list[str]:
    rows = []
    for first, second in experiment.compare:
        ours, theirs = by_arm.get(first, {}), by_arm.get(second, {})
        paired = [100 * (ours[seed]["error"] - theirs[seed]["error"]) for seed in ours if seed in theirs]
        if not paired:
            continue
        mean, half_width, pairs = difference(paired)
        width = f"+- {half_width:.2f}" if pairs > 1 else "-"
        says = verdict(paired, len(experiment.compare), (first, second)) if experiment.ranks else "none: too small"
        cost = f"{next(iter(ours.values()))['passes'] / next(iter(theirs.values()))['passes']:.2f}"
        rows.append((f"{first} - {second}", cost, str(pairs), f"{mean:+.2f}", width, says))
    header = ("arms", "cost", "pairs", "difference (points)", "95 % interval", "verdict")
    note = (
        "Differences of test errors seed by seed, below 0 where the first arm is better; intervals by Student's t. "
        "Cost: the first arm's passes relative to the second's. "
        f"The verdicts hold for the {len(rows)} comparisons together (Bonferroni)."
    )
    return [render(Table("### Differences", header, rows, [note]), "markdown"), ""] if rows else []


def against_random(experiment: Experiment, by_arm: ByArm) -> dict[str, list[tuple[float, float, float]]]:
    """For each group of arms, whose names end in _<number>, its comparisons with random policies.

    A comparison is the training accuracy under random policies, and the mean and half-width of the difference of the
    errors, all in per cent. Nothing unless random policies, with all copies kept, were used for several lengths.
    """
    points: dict[str, list[tuple[float, float, float]]] = {}
    controls = {second: _length(by_arm.get(second, {})) for _, second in experiment.compare}
    controls = {arm: epochs for arm, epochs in controls.items() if epochs is not None}
    for first, second in experiment.compare if len({*controls.values()}) > 1 else ():
        ours, theirs = by_arm.get(first, {}), by_arm.get(second, {})
        paired = [100 * (ours[seed]["error"] - theirs[seed]["error"]) for seed in ours if seed in theirs]
        if second in controls and paired:
            accuracy = 100 * statistics.fmean(one["train_top1"] for one in theirs.values())
            mean, half_width, _ = difference(paired)
            points.setdefault(first.rpartition("_")[0], []).append((accuracy, mean, half_width))
    return points


def _length(runs: Mapping[int, Mapping[str, Any]]) -> int | None:
    """The epochs of an arm with random policies and all copies kept; None for another."""
    return next(
        (one["epochs"] for one in runs.values() if one["policy"] == "random" and not one["settings"].get("keep")), None
    )


def _with_part(path: Path, experiment: Experiment, part: str) -> str:
    """The text of summary.md with this size's part replaced."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    parts = dict(one.split("\n", 1) for one in text.split("\n## ")[1:]) | {experiment.size: part}
    in_order = [f"## {size}\n\n{parts[size].strip()}\n" for size in SIZES if size in parts]
    return "\n".join((f"# {experiment.name}\n\n{experiment.question}\n", *in_order))
