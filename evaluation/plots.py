"""Plots of scores: error by corruption and severity, confidence against accuracy, and the most confident mistakes.

They are written as PNG and for TensorBoard. Without matplotlib there are none.
"""

import importlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from evaluation.corruptions import SEVERITIES
from utils import warn

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from evaluation.benchmarks import Benchmark


@cache
def figure_class() -> "type[Figure] | None":
    """Matplotlib's class of figures, or None without it. It takes long to import, and training does not need it."""
    try:
        return importlib.import_module("matplotlib.figure").Figure
    except Exception:  # whatever a broken installation raises
        warn("no plots are drawn, since matplotlib is not installed (pip install matplotlib)")
        return None


def draw_plots(folder: Path, benchmark: "Benchmark", record: Mapping[str, Any], classes: Sequence[str] | None) -> None:
    """Write the plots of a finished benchmark, from its record in results.json, to `folder`: PNG and TensorBoard."""
    if figure_class() is None:
        return
    from torch.utils.tensorboard import SummaryWriter  # takes seconds

    folder.mkdir(parents=True, exist_ok=True)
    writer = SummaryWriter(str(folder))
    for kind, figure, text in plots_of(benchmark, record, classes or benchmark.classes):
        name = f"{benchmark.name}_{kind}"
        figure.savefig(folder / f"{name}.png", dpi=130)
        writer.add_image(name, np.asarray(Image.open(folder / f"{name}.png").convert("RGB")), dataformats="HWC")
        writer.add_text(name, text)
    writer.close()


def plots_of(
    benchmark: "Benchmark", record: Mapping[str, Any], classes: Sequence[str] | None
) -> Iterator[tuple[str, "Figure", str]]:
    """Name, figure and text: for corruptions and perturbations a table of shares, for a test set calibration and
    mistakes.
    """
    title = f"{benchmark.name} ({benchmark.source})"
    if benchmark.kind != "test set":
        if benchmark.kind == "corruptions":
            name, columns, quantity = "error", [f"severity {s}" for s in SEVERITIES], "error"
            errors = {(cell["part"], cell["severity"]): cell["error"] for cell in record["cells"]}
            share = {part: [errors[part, severity] for severity in SEVERITIES] for part in record["summary"]["error"]}
        else:
            name, columns, quantity = "flips", [""], "flip probability"
            share = {part: [value] for part, value in record["summary"]["flip_probability"].items()}
        text = f"{title}: {quantity} (%); rows: {', '.join(share)}; columns: {', '.join(columns)}"
        yield name, heat_map(torch.tensor(list(share.values())), list(share), columns, f"{title}: {quantity}"), text
        return
    (cell,) = record["cells"]
    text = f"{title}: accuracy by confidence; calibration error {cell['calibration_error']:.2%}"
    yield "reliability", reliability(cell["reliability"], text), text
    if mistakes := cell["mistakes"]:
        positions = torch.tensor([mistake["image"] for mistake in mistakes])
        images_NCHW = next(benchmark.subsets[0].open().batches([positions]))[0].cpu()
        captions = [_caption(mistake, classes) for mistake in mistakes]
        title = f"{title}: the {len(captions)} most confident mistakes"
        text = "\n".join([title, "", *(f"{number}. {caption}" for number, caption in enumerate(captions, start=1))])
        yield "mistakes", gallery(images_NCHW, captions, title), text


def _caption(mistake: Mapping[str, Any], classes: Sequence[str] | None) -> str:
    names = (classes[mistake[key]] if classes else f"class {mistake[key]}" for key in ("label", "predicted"))
    label, predicted = map(drawable, names)
    return f"is {label}, called {predicted}, {mistake['confidence']:.1%} sure"


def drawable(text: str) -> str:
    """Text without what is not Unicode or has no glyph in matplotlib's own font: escapes instead."""
    from matplotlib.font_manager import findfont, get_font

    font = get_font(findfont("DejaVu Sans"))
    return "".join(c if font.get_char_index(ord(c)) else ascii(c)[1:-1] for c in text)


def heat_map(share: Tensor, rows: Sequence[str], columns: Sequence[str], title: str) -> "Figure":
    """A coloured table of shares in 0..1, each printed as a percentage."""
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
    """Accuracy by confidence, with the diagonal of a calibrated classifier, and the number of images in each bin."""
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
        text = caption.replace(", ", "\n")
        axes.text(left + width / 2, top - 0.03 * height, text, ha="center", size="small", parse_math=False)
    axes.set(xlim=(0, 1.05 * width * min(in_a_row, len(captions))), ylim=(rows * (height + gap) - gap, -gap))
    return figure
