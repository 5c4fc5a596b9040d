"""From finished runs of an experiment to what is kept of them: runs.jsonl, summary.md and figures.

results/NAME/ holds all sizes of an experiment: a line of runs.jsonl says of which size it is, summary.md has a part for
each, and figures are named by it. A size that is run again takes the place of what was there of the same seeds.
"""

import dataclasses
import json
import shlex
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.specs import SCRIPTS, Experiment, Run
from analysis.statistics import difference, verdict
from config import Config
from evaluation.plots import figure_class
from evaluation.results import read_results
from evaluation.text_table import Table, render
from policies import build_policies
from utils import UserError, first_line, has_shape, write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#000000", "#b8a800")
UNCERTAIN = ("controller", "frozen", "random")  # sources of policies that have an entropy
NUMBER = (int, float)
RECORD = {
    "size": str, "conf": str, "arm": str, "seed": int, "settings": dict, "policy": str, "error": NUMBER,
    "test_images": int, "train_loss": NUMBER, "seconds": NUMBER, "entropy": list, "collapsed": int, "M": int,
    "epochs": int, "torch": str, "device": str, "git_revision": (str, type(None)),
}  # fmt: skip


def sum_up(experiment: Experiment, runs: Sequence[Run], folder: Path) -> None:
    """Write what is kept of an experiment at one of its sizes: of the runs that have been scored, and of earlier ones.

    Raises UserError where that cannot be, and where unfinished runs would replace results of other settings.
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
    kept = _still_true(before, ours, now)
    replaced = {(one["arm"], one["seed"]) for one in before if one["size"] == experiment.size and one not in kept}
    if len(ours) < len(runs) and replaced - {(one["arm"], one["seed"]) for one in ours}:
        raise UserError(f"{folder}: holds results of other settings, which unfinished runs do not replace")
    ours = sorted([*kept, *ours], key=lambda one: (place[one["arm"]], one["seed"]))
    write_text(folder / "runs.jsonl", "".join(json.dumps(record) + "\n" for record in [*others, *ours]))
    figures = draw(experiment, ours, folder / "figures") if figure_class() else []
    part = "\n".join((*describe(experiment, ours), *(f"![{words}](figures/{name})\n" for name, words in figures)))
    write_text(folder / "summary.md", _with_part(folder / "summary.md", experiment, part))


def _identity(run: Run, size: str) -> tuple[str, str, dict[str, Any]]:
    """Of an arm: the size, its conf file, and its settings but for those that do not matter to the result."""
    conf = run.conf.resolve()
    free = {field.name for field in dataclasses.fields(Config) if field.metadata["may_change"]}
    own = {name: value for name, value in run.settings.items() if name not in ("seed", *free)}
    if run.source is not None:
        own["policy_from"] = f"@{run.source.name.rpartition('_')[0]}"
    return size, conf.relative_to(SCRIPTS).as_posix() if conf.is_relative_to(SCRIPTS) else conf.name, own


def _still_true(
    before: Sequence[Mapping[str, Any]],
    ours: Sequence[Mapping[str, Any]],
    now: Mapping[str, tuple[str, str, dict[str, Any]]],
) -> list[Mapping[str, Any]]:
    """Earlier lines of other runs than ours, whose arms are as they are now."""
    done = {(one["arm"], one["seed"]) for one in ours}
    same = [one for one in before if now.get(one["arm"]) == (one["size"], one.get("conf"), one["settings"])]
    there = done | {(one["arm"], one["seed"]) for one in same}
    sources = {arm: str(settings.get("policy_from", "")) for arm, (_, _, settings) in now.items()}

    def has_its_source(one: Mapping[str, Any]) -> bool:
        source = sources[one["arm"]]
        return not source.startswith("@") or (source[1:], one["seed"]) in there

    return [one for one in same if (one["arm"], one["seed"]) not in done and has_its_source(one)]


def record_of(run: Run, size: str) -> dict[str, Any]:
    """What is kept of a run: numbers, settings and versions, and no path of the machine it ran on."""
    results, (_, conf, own) = read_results(run.directory), _identity(run, size)
    (cell,) = results["benchmarks"]["clean"]["cells"]
    metrics, times, policies = (_lines(run.directory / f"{name}.jsonl") for name in ("metrics", "times", "policies"))
    environment = results["benchmarks"]["clean"]["environment"]
    ended = [one for one in metrics if "entropy" in one]  # the epochs in which an interval ended
    largest = build_policies(run.config).largest_entropy if run.config.policy in UNCERTAIN else 0.0
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
    """The lines of a runs.jsonl; none where there is no file. Raises UserError."""
    if not path.exists():
        return []
    try:
        records = _lines(path)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({first_line(error)}); put a copy back, or move it away") from None
    if not has_shape(records, [RECORD]):
        raise UserError(f"{path}: holds lines of another kind; move it away")
    return records


def describe(experiment: Experiment, records: Sequence[Mapping[str, Any]]) -> list[str]:
    """The part of summary.md about one size: what was run, each arm's errors, and the differences seed by seed."""
    first, by_arm = records[0], _by_arm(records)
    others = [f"`{conf}` ({', '.join(arms)})" for conf, arms in _arms_by_conf(records).items() if conf != first["conf"]]
    settings = [record["settings"] for record in records]
    shared = [f"{k} {v}" for k, v in settings[0].items() if all(k in one and one[k] == v for one in settings)]
    ran = "{device} (threads: {threads}), torch {torch}, revision {git_revision}"
    where = "; ".join(dict.fromkeys(ran.format(**one) for one in records))
    told = [word for word in experiment.said if not word.startswith("dataroot=")]  # which is this machine's own
    size = ["--size", experiment.size] if experiment.size != "tiny" else []
    command = shlex.join(["python", "experiments.py", experiment.name, *size, *(["--set", *told] if told else [])])
    changed = "Settings were changed on the command line: what follows may not hold. " if told else ""
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
        "over augmented copies. Entropy left: of the policies' largest, at the end. Collapsed: share of the intervals.",
    ]
    lines += [render(Table("### Arms", header, rows, notes), "markdown"), ""]
    return [*lines, *_comparisons(experiment, by_arm)]


def _row(experiment: Experiment, arm: str, of_arm: Mapping[int, Mapping[str, Any]]) -> tuple[str, ...]:
    runs = list(of_arm.values())
    words = experiment.words.get(arm) or ", ".join(f"{k} {v}" for k, v in experiment.arms[arm].items())
    entropies = [one["entropy"][-1] for one in runs if one["entropy"]]
    collapsed = sum(one["collapsed"] for one in runs) / sum(one["intervals"] for one in runs)
    return (
        f"**{arm}**: {words}" if words else f"**{arm}**",
        str(runs[0]["M"]),
        str(runs[0]["epochs"]),
        over_seeds([100 * one["error"] for one in runs]),
        ", ".join(f"{100 * one['error']:.2f}" for one in runs),
        f"{statistics.fmean(one['train_loss'] for one in runs):.3f}",
        f"{statistics.fmean(entropies):.1%}" if entropies else "-",
        f"{collapsed:.0%}" if runs[0]["policy"] == "controller" else "-",
    )


def _comparisons(experiment: Experiment, by_arm: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> list[str]:
    rows = []
    for first, second in experiment.compare:
        paired = paired_differences(by_arm, first, second)
        if not paired:
            continue
        mean, half_width, pairs = difference(paired)
        width = f"+- {half_width:.2f}" if pairs > 1 else "-"
        says = verdict(paired, len(experiment.compare), (first, second)) if experiment.ranks else "nothing: too small"
        rows.append((f"{first} - {second}", str(pairs), f"{mean:+.2f}", width, says))
    header = ("arms", "pairs", "difference (points)", "95 % interval", "what it says")
    note = (
        "Differences of test errors seed by seed, below 0 where the first arm is better; intervals by Student's t. "
        f"What it says holds for the {len(rows)} comparisons together (Bonferroni)."
    )
    return [render(Table("### Differences", header, rows, [note]), "markdown"), ""] if rows else []


def paired_differences(by_arm: Mapping[str, Mapping[int, Mapping[str, Any]]], first: str, second: str) -> list[float]:
    """Of the test errors in percentage points, for each seed that both arms have."""
    ours, theirs = by_arm.get(first, {}), by_arm.get(second, {})
    return [100 * (ours[seed]["error"] - theirs[seed]["error"]) for seed in ours if seed in theirs]


def over_seeds(values: Sequence[float]) -> str:
    spread = f" +- {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.2f}{spread}"


def draw(experiment: Experiment, records: Sequence[Mapping[str, Any]], folder: Path) -> list[tuple[str, str]]:
    """The figures of one size; returns their names, each with what it shows in words."""
    by_arm = _by_arm(records)
    figures = {
        "errors": (errors(by_arm), "test errors, a line for each seed"),
        "differences": (differences(experiment, by_arm), "paired differences of the test errors"),
        "entropy": (entropies(by_arm), "entropy of the policies (band: all seeds)"),
    }
    drawn = []
    for name, (figure, words) in figures.items():
        if figure is not None:
            file = f"{experiment.size}_{name}.png"
            figure.axes[0].set_title(f"{experiment.name}, {experiment.size}: {words}", fontsize="medium", loc="left")
            figure.savefig(folder / file, dpi=110, metadata={"Software": None})
            drawn.append((file, f"{experiment.name}, {experiment.size}: {words}"))
    return drawn


def errors(by_arm: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> "Figure":
    """Every run as a dot, runs of a seed joined, and the means as bars."""
    figure = figure_class()(figsize=(7.5, 1.2 + 0.42 * len(by_arm)), layout="constrained")
    axes, arms = figure.subplots(), list(by_arm)
    seeds = sorted({seed for of_arm in by_arm.values() for seed in of_arm})
    for seed, style in zip(seeds, _styles(len(seeds)), strict=True):
        points = [(100 * by_arm[arm][seed]["error"], row) for row, arm in enumerate(arms) if seed in by_arm[arm]]
        axes.plot(*zip(*points, strict=True), **style, marker="o", linewidth=0.5, markersize=5, label=f"seed {seed}")
    for row, arm in enumerate(arms):
        mean = statistics.fmean(100 * one["error"] for one in by_arm[arm].values())
        axes.plot((mean, mean), (row - 0.28, row + 0.28), color="black", linewidth=2.5, zorder=3)
    axes.set_yticks(range(len(arms)), arms)
    axes.invert_yaxis()
    axes.set(xlabel="test error (%), lower is better; black: mean")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return figure


def differences(experiment: Experiment, by_arm: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> "Figure | None":
    """Each comparison's mean difference with its interval; none where no arm has two seeds."""
    found = [
        (f"{a} - {b}", difference(paired))
        for a, b in experiment.compare
        if (paired := paired_differences(by_arm, a, b))
    ]
    found = [(words, one) for words, one in found if one.pairs > 1]
    if not found:
        return None
    figure = figure_class()(figsize=(7.5, 1.2 + 0.4 * len(found)), layout="constrained")
    axes = figure.subplots()
    for row, (_, one) in enumerate(found):
        axes.errorbar(one.mean, row, xerr=one.half_width, fmt="o", color="#0b3c5d", capsize=4)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(found)), [words for words, _ in found])
    axes.set_ylim(len(found) - 0.5, -0.5)
    axes.set(xlabel="difference of test errors (points), left of 0 the first arm is better; 95 % intervals")
    axes.grid(axis="x", alpha=0.3)
    return figure


def entropies(by_arm: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> "Figure | None":
    """The policies' entropy, mean over the seeds with the range between the seeds; none where no policy is drawn."""
    shown = {arm: [one["entropy"] for one in of_arm.values()] for arm, of_arm in by_arm.items()}
    shown = {arm: curves for arm, curves in shown.items() if all(curves)}
    if not shown:
        return None
    figure = figure_class()(figsize=(7.5, 4), layout="constrained")
    axes = figure.subplots()
    for (arm, curves), style in zip(shown.items(), _styles(len(shown)), strict=True):
        over_time = [[100 * value for value in values] for values in zip(*curves, strict=True)]
        share = [100 * (epoch + 1) / len(over_time) for epoch in range(len(over_time))]
        axes.plot(share, [statistics.fmean(values) for values in over_time], **style, label=arm)
        lowest, highest = ([extreme(values) for values in over_time] for extreme in (min, max))
        axes.fill_between(share, lowest, highest, color=style["color"], alpha=0.12, linewidth=0)
    axes.set(xlabel="share of the training (%)", ylabel="entropy of a policy\n(% of the largest)", ylim=(0, 104))
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return figure


def _styles(count: int) -> list[dict[str, str]]:
    """So many kinds of lines that can be told apart, by the colour-blind too (Okabe and Ito's colours)."""
    return [
        {"color": COLOURS[number % len(COLOURS)], "linestyle": ("-", "--", ":")[number // len(COLOURS) % 3]}
        for number in range(count)
    ]


def _arms_by_conf(records: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    arms: dict[str, list[str]] = {}
    for record in records:
        of_conf = arms.setdefault(record["conf"], [])
        if record["arm"] not in of_conf:
            of_conf.append(record["arm"])
    return arms


def _by_arm(records: Sequence[Mapping[str, Any]]) -> dict[str, dict[int, Mapping[str, Any]]]:
    by_arm: dict[str, dict[int, Mapping[str, Any]]] = {}
    for record in records:
        by_arm.setdefault(record["arm"], {})[record["seed"]] = record
    return by_arm


def _with_part(path: Path, experiment: Experiment, part: str) -> str:
    """summary.md with this size's part in the place of the one before."""
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
