"""The figures of a report, from plain numbers. Every axis has a name and a unit."""

import importlib.util
import textwrap
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_POINTS = 120  # along an axis of time; more are averaged
MOST_SHARES = 16  # points of a share over time: fewer points have more draws each, and a narrower range of chance
MOST_PANELS = 20
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#000000", "#b8a800")
FAVOURED = "#b2182b"


def has_matplotlib() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def new_figure(width: float, height: float, layout: str | None = "constrained") -> "Figure":
    """An empty figure, in inches. Matplotlib takes long to import, and most commands do not need it."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout=layout)


def line_style(number: int) -> dict[str, str]:
    """Of the number-th of several lines: colours that the colour-blind can tell apart (Okabe and Ito), then dashes."""
    count = len(COLOURS)
    return {"color": COLOURS[number % count], "linestyle": ("-", "--", ":")[number // count % 3]}


class Curve(NamedTuple):
    """Of a run: train (epoch, accuracy in per cent, loss), held_out (epoch, accuracy in per cent)."""

    name: str
    train: Sequence[tuple[float, float, float]]
    held_out: Sequence[tuple[float, float]]


def binned(intervals: Sequence[Any], most: int = MOST_POINTS) -> list[Sequence[Any]]:
    """The intervals in at most `most` groups of equal size; the last may be smaller."""
    size = -(-len(intervals) // most)
    return [intervals[start : start + size] for start in range(0, len(intervals), size)]


def curves(of_runs: Sequence[Curve]) -> "Figure":
    figure = new_figure(11, 4.2)
    loss, accuracy, held_out = figure.subplots(1, 3, sharex=True)
    for number, curve in enumerate(of_runs):
        style = {**line_style(number), "label": curve.name, "marker": "o" if len(curve.train) < 3 else None}
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


def share_panels(
    epochs: Sequence[float],
    names: Sequence[str],
    share_KT: Sequence[Sequence[float]],
    chance_T: Sequence[tuple[float, float]],
    favoured: Collection[str],
) -> "Figure":
    """A panel for each choice: its share of the draws in 0..1 over the epochs, and what chance would give (grey)."""
    shown = range(0, len(names), -(-len(names) // MOST_PANELS))
    columns = min(4 if len(shown) > 10 else 5, len(shown))
    rows = -(-len(shown) // columns)
    figure = new_figure(10, 0.7 + 1.45 * rows)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    low, high = (100 * np.array(bound) for bound in zip(*chance_T, strict=True))
    for axes, number in zip(grid.flat, shown, strict=False):
        is_favoured = names[number] in favoured
        axes.fill_between(epochs, low, high, color="#cccccc", linewidth=0)
        axes.axhline(100 / len(names), color="black", linestyle=":", linewidth=0.8)
        colour = FAVOURED if is_favoured else COLOURS[0]
        marker = "o" if len(epochs) < 30 else None
        axes.plot(epochs, 100 * np.array(share_KT[number]), color=colour, marker=marker, markersize=2.5, linewidth=1.2)
        style = {"color": FAVOURED, "fontweight": "bold"} if is_favoured else {}
        axes.set_title(names[number], size=9, pad=3, **style)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25)
    for axes in grid.flat[len(shown) :]:
        axes.axis("off")
    grid[0, 0].set_ylim(bottom=0)
    figure.supxlabel("epoch", size=9)
    figure.supylabel("share of the draws (%)", size=9)
    return figure


def entropy(points: Sequence[tuple[float, float]], limit: float, collapsed: Sequence[float]) -> "Figure":
    """points: (epoch, per cent of the maximal entropy). limit: below which it is a collapse, 0 for none."""
    lowest = min(value for _, value in points)
    zoomed = lowest > 80 and not collapsed  # on the whole axis a few per cent could not be seen
    bounds = (min(95, lowest - 1), 100.5) if zoomed else (-2, 106)
    figure = new_figure(9, 3.2)
    axes = figure.subplots()
    axes.axhline(100, color="grey", linestyle="--", label="uniformly random")
    if limit and not zoomed:
        axes.axhline(limit, color=COLOURS[5], linestyle=":", label="collapse")
    axes.plot(*zip(*points, strict=True), color=COLOURS[0], marker="o" if len(points) < 3 else None, label="policies")
    if collapsed:
        axes.plot(collapsed, [0] * len(collapsed), "|", color=FAVOURED, markersize=14, label="collapsed")
    axes.set(xlabel="epoch", ylabel="entropy (% of its maximum)", ylim=bounds)
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    return figure


def loss_spread(rows: Sequence[tuple[float, float, float, float, float]]) -> "Figure":
    """rows: epoch, loss of the easiest policy, mean, loss of the hardest, standard deviation."""
    epochs, low, mean, high, deviation = (np.array(column, dtype=float) for column in zip(*rows, strict=True))
    figure = new_figure(9, 5)
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
    """Rows of images, uint8 (N, C, H, W), each below its caption."""
    columns = len(rows[0][1])
    wrapped = [textwrap.wrap(caption, 150) for caption, _ in rows]
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


def operations(rows: Sequence[tuple[str, Sequence[str], Tensor]], levels: Sequence[int]) -> "Figure":
    """A row for each operation: its name, and for each level a caption and an image, uint8 (L, C, H, W)."""
    figure = new_figure(1.3 * len(levels) + 1.4, 1.22 * len(rows))
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
    percent: Sequence[Sequence[float]],
    names: Sequence[str],
    levels: int,
    neutral: Sequence[float | None],
    chance: tuple[float, float, float],
) -> "Figure":
    """Of each operation and level the share, in per cent; a ring at the neutral level.

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
    axes.set_xticks(range(0, levels, -(-levels // 20)))
    axes.set(xlabel="level", ylabel="operation")
    if levels <= 12:
        for (row, column), value in np.ndenumerate(values):
            far = abs(norm(value) - 0.5) > 0.35
            ink = "#888888" if inside[row, column] else "white" if far else "black"
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=ink, size=8)
    marked = [(level, row) for row, level in enumerate(neutral) if level is not None]
    if marked:
        at, rows = np.array(marked).T
        axes.scatter(at, rows + 0.32, s=22, facecolors="none", edgecolors="#333333", linewidths=1.1)
    figure.colorbar(image, label="share of all operations (%)", format="%.2g")
    return figure
