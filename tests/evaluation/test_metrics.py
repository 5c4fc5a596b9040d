"""Numbers of the benchmarks against values worked out by hand."""

import pytest
import torch

import evaluation.metrics as metrics
from evaluation.corruptions import EXTRA, SEVERITIES, STANDARD
from evaluation.metrics import (
    Predictions,
    measure,
    measure_sequences,
    most_confident_mistakes,
    reliability_bins,
    summarise,
)


def predictions(label, predicted, confidence=None, loss=None):
    label, predicted = torch.tensor(label), torch.tensor(predicted)
    confidence = torch.tensor(confidence or [0.5] * len(label), dtype=torch.float64)
    loss = torch.tensor(loss or [1.0] * len(label), dtype=torch.float64)
    return Predictions(label, predicted, confidence, loss, predicted == label)


def test_flips_by_hand():
    frames = torch.tensor([[1, 1, 2, 1], [3, 3, 3, 3], [0, 1, 2, 0]])
    successive = measure_sequences(frames, "zoom_blur")
    assert (successive["sequences"], successive["frames"], successive["comparisons"]) == (3, 4, 9)
    assert successive["flips"] == 2 + 0 + 3
    assert successive["flip_probability"] == 5 / 9
    against_first = measure_sequences(frames, "gaussian_noise")
    assert against_first["flips"] == 1 + 0 + 2, "noise is compared with the first frame"
    assert measure_sequences(frames, "shot_noise") == against_first


def test_a_cell_of_corrupted_images_by_hand():
    said = predictions([0, 1, 2, 2], [0, 1, 0, 1], loss=[0.5, 1.0, 2.0, 4.5])
    record = measure("corruptions", said, 3, part="fog", frames=1)
    assert (record["correct"], record["error"], record["loss"]) == (2, 0.5, 2.0)
    assert record["calibration_error"] == 0.0, "half sure and right in half of the cases"


def test_calibration_error_by_hand():
    """Two images in the bin (0.6, 0.667], one right; two in (0.933, 1], both right; one at 1/15, the lowest's end."""
    said = predictions([0, 0, 0, 0, 0], [0, 1, 0, 0, 1], [0.61, 0.65, 0.95, 1.0, 1 / 15])
    bins = reliability_bins(said)
    assert [(i, n) for i, n in enumerate(bins["images"]) if n] == [(0, 1), (9, 2), (14, 2)]
    assert [bins["correct"][i] for i in (0, 9, 14)] == [0, 1, 2]
    expected = (1 * (1 / 15) + 2 * abs(0.5 - 0.63) + 2 * abs(1.0 - 0.975)) / 5
    assert metrics.calibration_error(bins) == pytest.approx(expected)
    always_wrong = reliability_bins(predictions([0, 1], [1, 0], [1.0, 1.0]))
    assert metrics.calibration_error(always_wrong) == 1.0


def test_mistakes_are_listed_from_the_surest(monkeypatch):
    said = predictions([0, 1, 2, 0], [0, 2, 0, 1], [0.99, 0.4, 0.9, 0.6])
    assert most_confident_mistakes(said) == [
        {"image": 2, "label": 2, "predicted": 0, "confidence": 0.9},
        {"image": 3, "label": 0, "predicted": 1, "confidence": 0.6},
        {"image": 1, "label": 1, "predicted": 2, "confidence": 0.4},
    ]
    monkeypatch.setattr(metrics, "MISTAKES", 1)
    assert [mistake["image"] for mistake in most_confident_mistakes(said)] == [2]
    assert most_confident_mistakes(predictions([0], [0])) == []


def cells_with(error_of):
    return [
        {"part": name, "severity": s, "error": error_of(name, s), "calibration_error": 0.1}
        for name in (*STANDARD, *EXTRA)
        for s in SEVERITIES
    ]


def test_the_mean_leaves_the_extra_corruptions_out():
    found = summarise("cifar10-c", "corruptions", cells_with(lambda name, s: 1.0 if name in EXTRA else s / 10))
    assert found["mean_corruption_error"] == pytest.approx(0.3)
    assert found["error"]["fog"] == pytest.approx(0.3)
    assert found["error"]["spatter"] == 1.0
    assert found["mean_calibration_error"] == pytest.approx(0.1)
    assert "mce" not in found, "CIFAR's is not normalised"


def test_imagenets_mce_is_one_for_alexnet_and_by_hand_for_another():
    of_alexnet = metrics.ALEXNET_ERROR
    assert tuple(of_alexnet) == STANDARD
    alexnet = summarise("imagenet-c", "corruptions", cells_with(lambda name, s: of_alexnet.get(name, 0)))
    assert alexnet["mce"] == pytest.approx(1.0)
    assert alexnet["mean_corruption_error"] == pytest.approx(0.7890, abs=5e-5), "as published for AlexNet"
    half_noise = {"gaussian_noise": 0.443214, "shot_noise": 0.447234, "impulse_noise": 0.461320}
    error = of_alexnet | half_noise
    found = summarise("imagenet-c", "corruptions", cells_with(lambda name, s: error.get(name, 0) * s / 3))
    assert found["mce"] == pytest.approx((3 * 0.5 + 12) / 15)


def test_the_mean_flip_probability_is_over_the_sequences():
    cells = [{"part": name, "severity": None, "flip_probability": p} for name, p in (("a", 0.1), ("b", 0.4))]
    assert summarise("cifar10-p", "perturbations", cells) == {
        "flip_probability": {"a": 0.1, "b": 0.4},
        "mean_flip_probability": 0.25,
    }
