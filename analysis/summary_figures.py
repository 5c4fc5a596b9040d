"""The figures of an experiment's summary: test errors, and the policies' entropy."""

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.figures import line_style, new_figure
from analysis.specs import Experiment

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ByArm = Mapping[str, Mapping[int, Mapping[str, Any]]]  # lines of runs.jsonl by arm and seed


def draw(experiment: Experiment, by_arm: ByArm, folder: Path) -> list[tuple[str, str]]:
    """Write the figures of one size; returns the name and the caption of each."""
    drawn = []
    for name, figure, caption in (
        ("errors", errors(by_arm), "test errors, a line for each seed"),
        ("entropy", entropies(by_arm), "entropy of the policies (band: all seeds)"),
    ):
        if figure is not None:
            file, title = f"{experiment.size}_{name}.png", f"{experiment.name}, {experiment.size}: {caption}"
            figure.axes[0].set_title(title, fontsize="medium", loc="left")
            figure.savefig(folder / file, dpi=110, metadata={"Software": None})
            drawn.append((file, title))
    return drawn


def errors(by_arm: ByArm) -> "Figure":
    """Every run as a dot, runs of one seed joined by a line, means as bars."""
    figure = new_figure(7.5, 1.2 + 0.42 * len(by_arm))
    axes, arms = figure.subplots(), list(by_arm)
    seeds = sorted({seed for of_arm in by_arm.values() for seed in of_arm})
    for number, seed in enumerate(seeds):
        points = [(100 * by_arm[arm][seed]["error"], row) for row, arm in enumerate(arms) if seed in by_arm[arm]]
        style = {**line_style(number), "marker": "o", "linewidth": 0.5, "markersize": 5}
        axes.plot(*zip(*points, strict=True), **style, label=f"seed {seed}")
    for row, arm in enumerate(arms):
        mean = statistics.fmean(100 * one["error"] for one in by_arm[arm].values())
        axes.plot((mean, mean), (row - 0.28, row + 0.28), color="black", linewidth=2.5, zorder=3)
    axes.set_yticks(range(len(arms)), arms)
    axes.invert_yaxis()
    axes.set(xlabel="test error (%), lower is better; black: mean")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return figure


def entropies(by_arm: ByArm) -> "Figure | None":
    """The policies' entropy, mean and range over the seeds; None where no policy is sampled."""
    shown = {arm: [one["entropy"] for one in of_arm.values()] for arm, of_arm in by_arm.items()}
    shown = {arm: curves for arm, curves in shown.items() if all(curves)}
    if not shown:
        return None
    figure = new_figure(7.5, 4)
    axes = figure.subplots()
    for number, (arm, curves) in enumerate(shown.items()):
        style = line_style(number)
        over_time = [[100 * value for value in values] for values in zip(*curves, strict=True)]
        share = [100 * (epoch + 1) / len(over_time) for epoch in range(len(over_time))]
        axes.plot(share, [statistics.fmean(values) for values in over_time], **style, label=arm)
        lowest, highest = ([extreme(values) for values in over_time] for extreme in (min, max))
        axes.fill_between(share, lowest, highest, color=style["color"], alpha=0.12, linewidth=0)
    axes.set(xlabel="share of the training (%)", ylabel="entropy of a policy\n(% of its maximum)", ylim=(0, 104))
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return figure
