"""Scores as pictures: error by corruption and severity, confidence against accuracy, and the surest mistakes.

With matplotlib they have axes and words, and are written as PNG. TensorBoard gets them always; without matplotlib as
plain fields of colour, whose meaning stands in its text tab.
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torchvision.utils import make_grid

from evaluation.benchmarks import Benchmark
from evaluation.corruptions import SEVERITIES

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Picture(NamedTuple):
    """The same content as a figure and as plain colours, uint8 (3, H, W)."""

    name: str
    figure: Callable[[], "Figure"]
    plain: Callable[[], Tensor]
    words: str


@cache
def figure_class() -> "type[Figure] | None":
    """Matplotlib's class of figures, or None without it. It takes long to import, and training does not need it."""
    try:
        return importlib.import_module("matplotlib.figure").Figure
    except ImportError:
        return None


def draw_pictures(folder: Path, benchmark: Benchmark, noted: Mapping[str, Any], classes: Sequence[str] | None) -> None:
    """The pictures of a finished benchmark, of which results.json says `noted`, in `folder`: PNG and TensorBoard's."""
    folder.mkdir(parents=True, exist_ok=True)
    writer = SummaryWriter(str(folder))
    for picture in pictures_of(benchmark, noted, classes or benchmark.classes):
        name = f"{benchmark.name}_{picture.name}"
        if figure_class() is None:
            image_CHW = picture.plain()
        else:
            picture.figure().savefig(folder / f"{name}.png", dpi=130)
            image_CHW = torch.from_numpy(np.array(Image.open(folder / f"{name}.png").convert("RGB"))).permute(2, 0, 1)
        writer.add_image(name, image_CHW)
        writer.add_text(name, picture.words)
    writer.close()


def pictures_of(benchmark: Benchmark, noted: Mapping[str, Any], classes: Sequence[str] | None) -> list[Picture]:
    """What there is to see of a benchmark: shares of its cells, or for a test set calibration and mistakes."""
    title = f"{benchmark.name} ({benchmark.source})"
    if benchmark.kind == "corruptions":
        of_cell = {(cell["part"], cell["severity"]): cell["error"] for cell in noted["cells"]}
        share = {part: [of_cell[part, severity] for severity in SEVERITIES] for part in noted["summary"]["error"]}
        return [_shares("error", share, [f"severity {s}" for s in SEVERITIES], f"{title}: error")]
    if benchmark.kind == "perturbations":
        share = {part: [value] for part, value in noted["summary"]["flip_probability"].items()}
        return [_shares("flips", share, [""], f"{title}: flip probability")]
    (cell,) = noted["cells"]
    return [_calibration(cell, title), *([_mistakes(benchmark, cell, classes, title)] if cell["mistakes"] else [])]


def _shares(name: str, share: Mapping[str, Sequence[float]], columns: Sequence[str], title: str) -> Picture:
    table = torch.tensor(list(share.values()))
    words = f"{title}; rows: {', '.join(share)}; columns: {', '.join(columns)}; white is 0, dark 100 %"
    return Picture(name, partial(heat_map, table, list(share), columns, title), partial(fields, table), words)


def _calibration(cell: Mapping[str, Any], title: str) -> Picture:
    bins = cell["reliability"]
    words = f"{title}: accuracy by confidence; calibration error {cell['calibration_error']:.2%}"
    return Picture("reliability", partial(reliability, bins, words), partial(columns_of_bins, bins), words)


def _mistakes(benchmark: Benchmark, cell: Mapping[str, Any], classes: Sequence[str] | None, title: str) -> Picture:
    mistakes = cell["mistakes"]
    positions = torch.tensor([mistake["image"] for mistake in mistakes])
    images_NCHW = next(benchmark.cells[0].open().batches([positions]))[0].cpu()
    captions = [_describe(mistake, classes) for mistake in mistakes]
    title = f"{title}: the {len(mistakes)} most confident mistakes"
    words = "\n".join([title, "", *(f"{number}. {caption}" for number, caption in enumerate(captions, start=1))])
    figure = partial(gallery, images_NCHW, captions, title)
    return Picture("mistakes", figure, partial(make_grid, images_NCHW, nrow=6), words)


def heat_map(share: Tensor, rows: Sequence[str], columns: Sequence[str], title: str) -> "Figure":
    """A table of shares in 0..1, coloured, with each as a percentage."""
    figure = figure_class()(figsize=(3.2 + 0.85 * len(columns), 1.2 + 0.32 * len(rows)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(100 * share.numpy(), cmap="YlOrRd", vmin=0, vmax=100, aspect="auto")
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_title(title)
    for (row, column), value in np.ndenumerate(share.numpy()):
        ink = "white" if value > 0.6 else "black"
        axes.text(column, row, f"{100 * value:.1f}", ha="center", va="center", color=ink)
    figure.colorbar(image, label="per cent")
    return figure


def reliability(bins: Mapping[str, Sequence[float]], title: str) -> "Figure":
    """Accuracy of each bin of confidence beside the diagonal of a calibrated classifier, and how full the bins are."""
    images = np.array(bins["images"])
    accuracy = np.array(bins["correct"]) / images.clip(min=1)
    edges = np.linspace(0, 1, len(images) + 1)
    figure = figure_class()(figsize=(5.5, 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    above.bar(edges[:-1], accuracy, width=edges[1], align="edge", edgecolor="black", label="accuracy in the bin")
    above.plot((0, 1), (0, 1), "--", color="grey", label="calibrated")
    above.set(ylabel="share correct", ylim=(0, 1), xlim=(0, 1))
    above.set_title(title.replace("; ", "\n"), fontsize="medium")
    above.legend(loc="upper left")
    below.bar(edges[:-1], images, width=edges[1], align="edge", color="lightgrey", edgecolor="black")
    below.set(xlabel="confidence: probability given to the predicted class", ylabel="images")
    return figure


def gallery(images_NCHW: Tensor, captions: Sequence[str], title: str, in_a_row: int = 6) -> "Figure":
    """Images with a caption of three lines above each."""
    height, width = images_NCHW.shape[2:]
    rows, gap = -(-len(captions) // in_a_row), 0.4 * height
    figure = figure_class()(figsize=(12, 0.6 + 12 * rows * (height + gap) / (in_a_row * width)), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title)
    axes.axis("off")
    for position, (image_CHW, caption) in enumerate(zip(images_NCHW, captions, strict=True)):
        left, top = position % in_a_row * 1.05 * width, position // in_a_row * (height + gap)
        axes.imshow(image_CHW.permute(1, 2, 0).numpy(), extent=(left, left + width, top + height, top))
        axes.text(
            left + width / 2,
            top - 0.03 * height,
            caption.replace(", ", "\n"),
            ha="center",
            size="small",
            parse_math=False,
        )
    axes.set(xlim=(0, 1.05 * width * min(in_a_row, len(captions))), ylim=(rows * (height + gap) - gap, -gap))
    return figure


def fields(share: Tensor, side: int = 24) -> Tensor:
    """A table of shares in 0..1 as squares, from white to dark red."""
    white, dark = torch.tensor([255.0, 255.0, 255.0]), torch.tensor([128.0, 0.0, 38.0])
    colour_CHW = (white + share[..., None].float() * (dark - white)).permute(2, 0, 1).to(torch.uint8)
    return colour_CHW.repeat_interleave(side, 1).repeat_interleave(side, 2)


def columns_of_bins(bins: Mapping[str, Sequence[float]], height: int = 300, width: int = 20) -> Tensor:
    """Accuracy of each bin of confidence as a column, on the line of a calibrated classifier."""
    images, correct = (torch.tensor(bins[name]) for name in ("images", "correct"))
    line = 1 - (torch.arange(height) + 0.5) / height
    accuracy_W = (correct / images.clamp(min=1)).repeat_interleave(width)
    diagonal_W = (torch.arange(len(accuracy_W)) + 0.5) / len(accuracy_W)
    image_CHW = torch.where(line[:, None] <= accuracy_W, 110, 255).to(torch.uint8).repeat(3, 1, 1)
    image_CHW[:, (line[:, None] - diagonal_W).abs() < 1.0 / height] = 0
    return image_CHW


def _describe(mistake: Mapping[str, Any], classes: Sequence[str] | None) -> str:
    label, predicted = (classes[mistake[key]] if classes else f"class {mistake[key]}" for key in ("label", "predicted"))
    return f"is {label}, called {predicted}, {mistake['confidence']:.1%} sure"
