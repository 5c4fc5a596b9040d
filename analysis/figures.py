"""The figures of reports and summaries, from plain numbers. Every axis has a name and a unit."""

import importlib
import textwrap
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from policies.preferences import chance_range

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_POINTS = 120  # along an axis of time; more are averaged
MOST_SHARES = 16  # points of a share over time: fewer points have more draws each, and a narrower range of chance
MOST_PANELS = 20
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#000000", "#b8a800")
FAVOURED = "#b2182b"
ByArm = Mapping[str, Mapping[int, Mapping[str, Any]]]  # lines of runs.jsonl by arm and seed


def has_matplotlib() -> bool:
    try:
        importlib.import_module("matplotlib.figure")
    except Exception:  # whatever a broken installation raises
        return False
    return True


def new_figure(width: float, height: float, layout: str | None = "constrained") -> "Figure":
    """An empty figure, in inches. Matplotlib takes long to import, and most commands do not need it."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout=layout)


def line_style(number: int) -> dict[str, str]:
    """Of the number-th of several lines: colours that the colour-blind can tell apart (Okabe and Ito), then dashes."""
    count = len(COLOURS)
    return {"color": COLOURS[number % count], "linestyle": ("-", "--", ":")[number // count % 3]}


def binned(intervals: Sequence[Any], most: int = MOST_POINTS) -> list[Sequence[Any]]:
    """The intervals in at most `most` groups of equal size; the last may be smaller."""
    size = -(-len(intervals) // most)
    return [intervals[start : start + size] for start in range(0, len(intervals), size)]


def _plot(axes: Any, epochs: Sequence[float], values: Sequence[float], **style: Any) -> None:
    """A line, with markers where there are few points."""
    axes.plot(epochs, values, marker="o" if len(epochs) < 30 else None, markersize=2.5, **style)
    axes.grid(alpha=0.3)


def curves(runs: Mapping[str, Sequence[Sequence[tuple[float, float]]]]) -> "Figure":
    """Of each run three curves of (epoch, value): training loss, training and held-out accuracy in per cent."""
    figure = new_figure(11, 4.2)
    panels = figure.subplots(1, 3, sharex=True)
    for number, (name, of_run) in enumerate(runs.items()):
        for axes, points in zip(panels, of_run, strict=True):
            if points:
                _plot(axes, *zip(*points, strict=True), **line_style(number), label=name)
    panels[0].set(xlabel="epoch", ylabel="training loss (nats)")
    panels[1].set(xlabel="epoch", ylabel="training accuracy (%)")
    panels[2].set(xlabel="epoch", ylabel="held-out or test accuracy (%)")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def share_panels(epochs: Sequence[float], counts_T: Sequence[Mapping[str, int]], favoured: Collection[str]) -> "Figure":
    """A panel for each choice: its share of the draws over the epochs, and what chance would give (grey)."""
    names = list(counts_T[0])
    shown = names[:: -(-len(names) // MOST_PANELS)]
    columns = min(4 if len(shown) > 10 else 5, len(shown))
    rows = -(-len(shown) // columns)
    figure = new_figure(10, 0.7 + 1.45 * rows)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    draws_T = np.array([sum(counts.values()) for counts in counts_T])
    low_T, high_T = 100 * np.array([chance_range(draws, len(names)) for draws in draws_T.tolist()]).T
    for axes, name in zip(grid.flat, shown, strict=False):
        style = {"color": FAVOURED, "fontweight": "bold"} if name in favoured else {}
        axes.fill_between(epochs, low_T, high_T, color="#cccccc", linewidth=0)
        axes.axhline(100 / len(names), color="black", linestyle=":", linewidth=0.8)
        share_T = 100 * np.array([counts[name] for counts in counts_T]) / np.maximum(1, draws_T)
        _plot(axes, epochs, share_T, color=style.get("color", COLOURS[0]), linewidth=1.2)
        axes.set_title(name, size=9, pad=3, **style)
        axes.tick_params(labelsize=8)
    for axes in grid.flat[len(shown) :]:
        axes.axis("off")
    grid[0, 0].set_ylim(bottom=0)
    figure.supxlabel("epoch", size=9)
    figure.supylabel("share of the draws (%)", size=9)
    return figure


def entropy(
    points: Sequence[tuple[float, float]], collapsed: Sequence[float], floor: Sequence[tuple[float, float]] = ()
) -> "Figure":
    """points, floor: (epoch, per cent of the maximal entropy). collapsed: the epochs in which it was."""
    figure = new_figure(9, 3.2)
    axes = figure.subplots()
    axes.axhline(100, color="grey", linestyle="--", label="uniformly random")
    _plot(axes, *zip(*points, strict=True), color=COLOURS[0], label="policies")
    if floor:
        axes.plot(*zip(*floor, strict=True), color="black", linestyle=":", label="floor")
    if collapsed:
        axes.plot(collapsed, [0] * len(collapsed), "|", color=FAVOURED, markersize=14, label="collapsed")
    lowest = min(value for _, value in (*points, *floor))  # on the whole axis a few per cent could not be seen
    axes.set(xlabel="epoch", ylabel="entropy (% of its maximum)", ylim=(min(95, lowest - 2), 101))
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    return figure


def loss_spread(rows: Sequence[tuple[float, float, float, float]]) -> "Figure":
    """rows: epoch, loss of the easiest policy, mean, loss of the hardest."""
    epochs, low, mean, high = np.array(rows).T
    figure = new_figure(9, 3.2)
    axes = figure.subplots()
    axes.fill_between(epochs, low, high, color=COLOURS[4], alpha=0.4, linewidth=0, label="easiest to hardest policy")
    _plot(axes, epochs, mean, color=COLOURS[0], label="mean of the policies")
    axes.set(xlabel="epoch", ylabel="network's loss (nats)")
    axes.legend(frameon=False)
    return figure


def rows_of_images(rows: Sequence[tuple[str, Tensor]]) -> "Figure":
    """Rows of images, uint8 (N, C, H, W), each below its caption."""
    columns = len(rows[0][1])
    wrapped = [textwrap.wrap(caption, 18 * columns) for caption, _ in rows]
    heights = [1.25 + 0.2 * len(lines) for lines in wrapped]
    figure = new_figure(1.25 * columns, sum(heights), layout=None)
    top = 1.0
    for (_, images_NCHW), lines, height in zip(rows, wrapped, heights, strict=True):
        share, text = height / sum(heights), 0.2 * len(lines) / sum(heights)
        figure.text(0.01, top - 0.03 / sum(heights), "\n".join(lines), va="top", size=8.5, parse_math=False)
        for column, image_CHW in enumerate(images_NCHW):
            box = (0.01 + 0.985 * column / columns, top - share, 0.96 / columns, share - text - 0.08 / sum(heights))
            axes = figure.add_axes(box)
            axes.imshow(image_CHW.permute(1, 2, 0).numpy(), interpolation="nearest")
            axes.axis("off")
        top -= share
    return figure


def heat_map(percent: Sequence[Sequence[float]], names: Sequence[str], chance: tuple[float, float, float]) -> "Figure":
    """Of each operation and level the share, in per cent.

    chance: the lowest, the uniform and the highest share that chance explains; shares between them are white.
    """
    from matplotlib.colors import TwoSlopeNorm

    low, uniform, high = chance
    values = np.array(percent)
    inside = (values >= low) & (values <= high)
    figure = new_figure(9.5, 1.6 + 0.36 * len(names))
    axes = figure.subplots()
    norm = TwoSlopeNorm(uniform, 0, max(2 * uniform, values.max()))
    image = axes.imshow(np.where(inside, uniform, values), cmap="RdBu_r", norm=norm, aspect="auto")
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="level", ylabel="operation")
    if values.shape[1] <= 12:
        for (row, column), value in np.ndenumerate(values):
            far = abs(norm(value) - 0.5) > 0.35
            ink = "#888888" if inside[row, column] else "white" if far else "black"
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=ink, size=8)
    figure.colorbar(image, label="share of all operations (%)", format="%.2g")
    return figure


def errors(by_arm: ByArm) -> "Figure":
    """Every run as a dot, runs of one seed joined by a line, means as bars."""
    figure = new_figure(7.5, 1.2 + 0.42 * len(by_arm))
    axes, arms = figure.subplots(), list(by_arm)
    for number, seed in enumerate(sorted({seed for of_arm in by_arm.values() for seed in of_arm})):
        points = [(100 * by_arm[arm][seed]["error"], row) for row, arm in enumerate(arms) if seed in by_arm[arm]]
        style = {**line_style(number), "marker": "o", "linewidth": 0.5, "markersize": 5}
        axes.plot(*zip(*points, strict=True), **style, label=f"seed {seed}")
    means = [100 * np.mean([one["error"] for one in of_arm.values()]) for of_arm in by_arm.values()]
    axes.scatter(means, range(len(arms)), marker="|", s=400, color="black", linewidth=2.5, zorder=3, label="mean")
    axes.set_yticks(range(len(arms)), arms)
    axes.invert_yaxis()
    axes.set(xlabel="test error (%), lower is better")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return figure


def regime(groups: Mapping[str, Sequence[tuple[float, float, float]]]) -> "Figure | None":
    """Of each group, differences from random policies against how well those are fitted; None without any.

    A point is (training accuracy under random policies, difference of the errors, half the width of its interval), all
    in per cent.
    """
    if not groups:
        return None
    figure = new_figure(7.5, 4)
    axes = figure.subplots()
    axes.axhline(0, color="black", linewidth=0.8)
    axes.axvline(95, color="grey", linestyle=":", label="fitted")
    for number, (name, points) in enumerate(groups.items()):
        accuracy, mean, half_width = np.array(sorted(points)).T
        shift = 0.15 * (number - (len(groups) - 1) / 2)  # so that intervals do not cover each other
        finite = np.where(np.isfinite(half_width), half_width, 0)
        axes.errorbar(accuracy + shift, mean, finite, **line_style(number), marker="o", capsize=3, label=name)
    axes.set(
        xlabel="training accuracy under random policies (%)",
        ylabel="test error minus that of\nrandom policies (points)",
    )
    axes.grid(alpha=0.3)
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
        percent = 100 * np.array(list(zip(*curves, strict=True)))  # a row for each time, a column for each seed
        share = 100 * np.arange(1, len(percent) + 1) / len(percent)
        style = line_style(number)
        axes.plot(share, percent.mean(1), **style, label=arm)
        axes.fill_between(share, percent.min(1), percent.max(1), color=style["color"], alpha=0.12, linewidth=0)
    axes.set(xlabel="share of the training (%)", ylabel="entropy of a policy\n(% of its maximum)", ylim=(0, 104))
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return figure
