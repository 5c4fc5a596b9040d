"""Pictures of scores: what they show is what was scored, with matplotlib and without."""

import pytest
import torch
from conftest import FIGURE_CLASS
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import evaluation.plots as pictures
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


def plain_test_set(mistakes=((3, 5, 0.9), (7, 1, 0.8))):
    benchmark = Benchmark("clean", "test set", "own", "", "", (Subset("", None, 10, lambda: SPLIT),), ("a",) * 10)
    bins = {"images": [0] * 14 + [10], "correct": [0] * 14 + [8], "confidence": [0.0] * 14 + [0.97]}
    wrong = [dict(zip(("image", "predicted", "confidence"), m, strict=True), label=m[0]) for m in mistakes]
    return benchmark, {"cells": [{"reliability": bins, "calibration_error": 0.17, "mistakes": wrong}]}


def perturbed():
    benchmark = Benchmark("cifar10-p", "perturbations", "official", "", "", ())
    return benchmark, {"cells": [], "summary": {"flip_probability": {"tilt": 0.25, "scale": 0.5}}}


@pytest.mark.parametrize("with_matplotlib", [True, False])
@pytest.mark.parametrize(
    ("made", "names"),
    [
        (corrupted, {"cifar10-c_error"}),
        (plain_test_set, {"clean_reliability", "clean_mistakes"}),
        (perturbed, {"cifar10-p_flips"}),
    ],
)
def test_tensorboard_gets_them_always_and_files_are_written_with_matplotlib(
    tmp_path, monkeypatch, with_matplotlib, made, names
):
    if with_matplotlib:
        monkeypatch.setattr(pictures, "figure_class", FIGURE_CLASS)
    pictures.draw_pictures(tmp_path / "evaluation", *made(), None)
    events = EventAccumulator(str(tmp_path / "evaluation")).Reload()
    assert set(events.Tags()["images"]) == names
    assert {tag.removesuffix("/text_summary") for tag in events.Tags()["tensors"]} == names
    assert {path.stem for path in (tmp_path / "evaluation").glob("*.png")} == (names if with_matplotlib else set())
    for path in (tmp_path / "evaluation").glob("*.png"):
        with Image.open(path) as image:
            assert min(image.size) > 200


def test_the_heat_map_shows_every_cell_as_a_percentage(with_axes):
    benchmark, noted = corrupted()
    (picture,) = pictures.pictures_of(benchmark, noted, None)
    (axes, _) = picture.figure().axes
    assert [label.get_text() for label in axes.get_yticklabels()] == [*STANDARD, *EXTRA]
    assert [text.get_text() for text in axes.texts] == [f"{100 * cell['error']:.1f}" for cell in noted["cells"]]
    assert "cifar10-c (subset)" in axes.get_title()
    plain = picture.plain()
    assert plain.shape == (3, 19 * 24, 5 * 24)
    lighter = plain.float().mean(0)[::24, ::24]
    assert (lighter[1:] < lighter[:-1]).all()
    assert (lighter[:, 1:] < lighter[:, :-1]).all()


def test_the_mistakes_are_the_images_that_were_mistaken(with_axes):
    benchmark, noted = plain_test_set()
    calibration, mistakes = pictures.pictures_of(benchmark, noted, [f"class{i}" for i in range(10)])
    (axes,) = mistakes.figure().axes
    for shown, image in zip(axes.images, (3, 7), strict=True):
        assert torch.equal(torch.from_numpy(shown.get_array().data).permute(2, 0, 1), IMAGES[image])
    assert axes.texts[0].get_text() == "is class3\ncalled class5\n90.0% sure"
    assert "1. is class3, called class5, 90.0% sure" in mistakes.words
    assert "calibration error 17.00%" in calibration.words
    heights = [bar.get_height() for bar in calibration.figure().axes[0].patches]
    assert heights == [0.0] * 14 + [0.8]


def test_without_mistakes_there_is_no_picture_of_them():
    assert [picture.name for picture in pictures.pictures_of(*plain_test_set(mistakes=()), None)] == ["reliability"]
