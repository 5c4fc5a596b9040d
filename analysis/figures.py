"""The figures of a report, from plain numbers. Every axis is named, with its unit."""

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from torch import Tensor

from evaluation.plots import figure_class

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_POINTS = 120  # along an axis of time; more are averaged
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#000000", "#b8a800")
# Sixteen that can be told apart in a stack, neighbours by their lightness.
STACK = (
    "#1f77b4", "#aec7e8", "#d95f02", "#fdc086", "#1b7837", "#a6dba0", "#b2182b", "#f4a582",
    "#762a83", "#c2a5cf", "#8c510a", "#dfc27d", "#4d4d4d", "#bdbdbd", "#01665e", "#80cdc1",
)  # fmt: skip


class Curve(NamedTuple):
    """Of a run: (epoch, accuracy in per cent, loss) in training, and (epoch, accuracy in per cent) on other images."""

    name: str
    train: Sequence[tuple[float, float, float]]
    held_out: Sequence[tuple[float, float]]


def binned(intervals: Sequence[Any]) -> list[Sequence[Any]]:
    """The intervals in groups of as many, MOST_POINTS groups at most; the last may hold fewer."""
    size = -(-len(intervals) // MOST_POINTS)
    return [intervals[start : start + size] for start in range(0, len(intervals), size)]


def curves(of_runs: Sequence[Curve]) -> "Figure":
    figure = figure_class()(figsize=(11, 4.2), layout="constrained")
    loss, accuracy, held_out = figure.subplots(1, 3, sharex=True)
    for number, curve in enumerate(of_runs):
        style = {"color": COLOURS[number % 8], "linestyle": ("-", "--", ":")[number // 8 % 3], "label": curve.name}
        style["marker"] = "o" if len(curve.train) < 3 else None
        epochs, right, losses = zip(*curve.train, strict=True)
        loss.plot(epochs, losses, **style)
        accuracy.plot(epochs, right, **style)
        if curve.held_out:
            style["marker"] = "o" if len(curve.held_out) < 30 else None
            held_out.plot(*zip(*curve.held_out, strict=True), markersize=3.5, **style)
    loss.set(xlabel="epoch", ylabel="training loss (nats)", title="training loss, augmented images")
    accuracy.set(xlabel="epoch", ylabel="training accuracy (%)", title="training accuracy, augmented images")
    held_out.set(xlabel="epoch", ylabel="accuracy (%)", title="held-out or test accuracy")
    for axes in (loss, accuracy, held_out):
        axes.grid(alpha=0.3)
        axes.title.set_fontsize("medium")
    figure.legend(*loss.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def stacked(
    epochs: Sequence[float], keys: Sequence[Any], shares: Sequence[Sequence[float]], what: str, *, sequential: bool
) -> "Figure":
    """Shares in 0..1 of each key over the epochs, one upon the other, the first at the bottom; dotted: equal ones."""
    from matplotlib import colormaps

    figure = figure_class()(figsize=(9, 4.8), layout="constrained")
    axes = figure.subplots()
    colours = [STACK[number % len(STACK)] for number in range(len(keys))]
    if sequential:
        colours = [colormaps["viridis"](number / max(1, len(keys) - 1)) for number in range(len(keys))]
    if len(epochs) == 1:  # an area needs two points
        epochs, shares = [0.0, *epochs], [[*share, *share] for share in shares]
    percent = 100 * np.array(shares)
    names = [f"level {key}" if sequential else str(key) for key in keys]
    labels = [f"{name}  {share:.1f}" for name, share in zip(names, percent[:, -1], strict=True)]
    for even in 100 * np.arange(1, len(keys)) / len(keys):
        axes.axhline(even, color="black", linestyle=":", linewidth=0.8, alpha=0.6)
    axes.stackplot(epochs, percent, colors=colours, labels=labels, edgecolor="white", linewidth=0.3)
    axes.set(xlabel="epoch", ylabel=what, ylim=(0, 100), xlim=(epochs[0], epochs[-1]))
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) > 20:
        every = -(-len(labels) // 20)
        handles, labels = handles[::every], labels[::every]
    place = {"loc": "center left", "bbox_to_anchor": (1.01, 0.5), "frameon": False}
    axes.legend(handles[::-1], labels[::-1], title="at the end (%)", **place)
    return figure


def entropy(
    points: Sequence[tuple[float, float]], largest: float, alarm: float, collapsed: Sequence[float]
) -> "Figure":
    figure = figure_class()(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.axhline(largest, color="grey", linestyle="--", label=f"uniformly random: {largest:.1f}")
    if alarm:
        axes.axhline(alarm, color="#d55e00", linestyle=":", label=f"alarm: {alarm:.1f}")
    axes.plot(*zip(*points, strict=True), color=COLOURS[0], marker="o" if len(points) < 3 else None, label="policies")
    if collapsed:
        axes.plot(collapsed, [0] * len(collapsed), "|", color="#b2182b", markersize=14, label="collapsed")
    axes.set(xlabel="epoch", ylabel="entropy of a policy (nats)", ylim=(-0.02 * largest, 1.06 * largest))
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    return figure


def spread(rows: Sequence[tuple[float, float, float, float, float]]) -> "Figure":
    """rows: epoch, loss of the easiest policy, mean, loss of the hardest, standard deviation."""
    epochs, low, mean, high, deviation = (np.array(column, dtype=float) for column in zip(*rows, strict=True))
    figure = figure_class()(figsize=(9, 5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    marker = "o" if len(rows) < 3 else None
    above.fill_between(epochs, low, high, color=COLOURS[4], alpha=0.4, linewidth=0, label="easiest to hardest policy")
    above.plot(epochs, mean, color=COLOURS[0], marker=marker, label="mean of the policies")
    above.set(ylabel="network's loss (nats)")
    above.legend(frameon=False)
    below.plot(epochs, deviation, color=COLOURS[5], marker=marker)
    below.set(xlabel="epoch", ylabel="std of the policies'\nlosses (nats)")
    below.set_ylim(bottom=0)
    for axes in (above, below):
        axes.grid(alpha=0.3)
    return figure


def rows_of_images(rows: Sequence[tuple[str, Tensor]]) -> "Figure":
    """Each row's words above its images, uint8 (N, C, H, W)."""
    columns = len(rows[0][1])
    wrapped = [textwrap.wrap(words, 150) for words, _ in rows]
    heights = [1.25 + 0.2 * len(lines) for lines in wrapped]
    figure = figure_class()(figsize=(1.25 * columns, sum(heights)))
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


def operations(rows: Sequence[tuple[str, Sequence[str], Tensor]], levels: Sequence[int]) -> "Figure":
    """A row for each operation: its name, what it does at each of the levels, and an image after that, uint8."""
    figure = figure_class()(figsize=(1.3 * len(levels) + 1.4, 1.22 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), len(levels), squeeze=False)
    for axes_of_row, (name, captions, images_LCHW) in zip(grid, rows, strict=True):
        for axes, caption, image_CHW in zip(axes_of_row, captions, images_LCHW, strict=True):
            axes.imshow(image_CHW.permute(1, 2, 0).numpy(), interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            axes.set_title(caption, size=7.5, pad=2)
        axes_of_row[0].set_ylabel(name, rotation=0, ha="right", va="center", size=9)
    for axes, level in zip(grid[-1], levels, strict=True):
        axes.set_xlabel(f"level {level}")
    return figure


def heat_map(
    percent: Sequence[Sequence[float]], names: Sequence[str], levels: int, neutral: Sequence[float | None]
) -> "Figure":
    """Of each operation and level the share, in per cent; a ring at the neutral level."""
    values = np.array(percent)
    figure = figure_class()(figsize=(9.5, 1.6 + 0.36 * len(names)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(values, cmap="YlOrRd", vmin=0, aspect="auto")
    axes.set_yticks(range(len(names)), names)
    every = -(-levels // 20)
    axes.set_xticks(range(0, levels, every))
    axes.set(xlabel="level", ylabel="operation")
    if levels <= 12:
        for (row, column), value in np.ndenumerate(values):
            ink = "white" if value > 0.6 * values.max() else "black"
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=ink, size=8)
    marked = [(level, row) for row, level in enumerate(neutral) if level is not None]
    if marked:
        at, rows = np.array(marked).T
        axes.scatter(at, rows + 0.32, s=22, facecolors="none", edgecolors="#0072b2", linewidths=1.3)
    figure.colorbar(image, label="share of all operations (%)")
    return figure
