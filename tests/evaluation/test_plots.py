"""Plots of scores: they show what was scored."""

import sys
from functools import cache

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import evaluation.plots as plots
from datasets.splits import ResidentSplit
from evaluation.benchmarks import Benchmark, Subset
from evaluation.corruptions import EXTRA, SEVERITIES, STANDARD

IMAGES = torch.randint(256, (10, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
SPLIT = ResidentSplit(IMAGES, torch.arange(10))


def corrupted():
    benchmark = Benchmark("cifar10-c", "corruptions", "subset", "md5", "", ())
    cells = [
        {"part": part, "severity": s, "error": (row + s) / 30}
        for row, part in enumerate((*STANDARD, *EXTRA))
        for s in SEVERITIES
    ]
    return benchmark, {"cells": cells, "summary": {"error": dict.fromkeys((*STANDARD, *EXTRA), 0.1)}}


def scored_test_set(mistakes=((3, 5, 0.9), (7, 1, 0.8))):
    benchmark = Benchmark("clean", "test set", "own", "", "", (Subset("", None, 10, lambda: SPLIT),), ("a",) * 10)
    bins = {"images": [0] * 14 + [10], "correct": [0] * 14 + [8], "confidence": [0.0] * 14 + [0.97]}
    wrong = [dict(zip(("image", "predicted", "confidence"), m, strict=True), label=m[0]) for m in mistakes]
    return benchmark, {"cells": [{"reliability": bins, "calibration_error": 0.17, "mistakes": wrong}]}


def perturbed():
    benchmark = Benchmark("cifar10-p", "perturbations", "official", "", "", ())
    return benchmark, {"cells": [], "summary": {"flip_probability": {"tilt": 0.25, "scale": 0.5}}}


@pytest.mark.parametrize(
    ("made", "names"),
    [
        (corrupted, {"cifar10-c_error"}),
        (scored_test_set, {"clean_reliability", "clean_mistakes"}),
        (perturbed, {"cifar10-p_flips"}),
    ],
)
def test_plots_are_png_files_and_tensorboard_images(tmp_path, made, names):
    plots.draw_plots(tmp_path / "evaluation", *made(), None)
    events = EventAccumulator(str(tmp_path / "evaluation")).Reload()
    assert set(events.Tags()["images"]) == names
    assert {tag.removesuffix("/text_summary") for tag in events.Tags()["tensors"]} == names
    for name in names:
        with Image.open(tmp_path / "evaluation" / f"{name}.png") as image:
            assert min(image.size) > 200


def test_without_matplotlib_plots_are_skipped(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr(plots, "figure_class", cache(plots.figure_class.__wrapped__))
    for name in ("a", "b"):
        plots.draw_plots(tmp_path / name, *perturbed(), None)
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr().err.count("no plots are drawn, since matplotlib is not installed") == 1


def test_the_heat_map_shows_every_error():
    benchmark, record = corrupted()
    ((_, figure, _),) = plots.plots_of(benchmark, record, None)
    (axes, _) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == [*STANDARD, *EXTRA]
    assert [text.get_text() for text in axes.texts] == [f"{100 * cell['error']:.1f}" for cell in record["cells"]]
    assert "cifar10-c (subset)" in axes.get_title()


def test_the_gallery_shows_the_mistaken_images():
    benchmark, record = scored_test_set()
    calibration, mistakes = plots.plots_of(benchmark, record, [f"class{i}" for i in range(10)])
    (axes,) = mistakes[1].axes
    for shown, image in zip(axes.images, (3, 7), strict=True):
        assert torch.equal(torch.from_numpy(shown.get_array().data).permute(2, 0, 1), IMAGES[image])
    assert axes.texts[0].get_text() == "is class3\ncalled class5\n90.0% sure"
    assert "1. is class3, called class5, 90.0% sure" in mistakes[2]
    assert "calibration error 17.00%" in calibration[2]
    heights = [bar.get_height() for bar in calibration[1].axes[0].patches]
    assert heights == [0.0] * 14 + [0.8]


def test_without_mistakes_there_is_no_gallery():
    assert [name for name, *_ in plots.plots_of(*scored_test_set(mistakes=()), None)] == ["reliability"]
