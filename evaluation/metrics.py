"""From the predictions for each image to the reported numbers; pure functions.

Shape suffixes: I images of a split, V sequences of T frames.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

BINS = 15  # of the calibration error
MISTAKES = 24  # kept for a test set, the most confident first

# Error of AlexNet on ImageNet-C, mean over the severities, by which the mean corruption error is normalised. Its keys
# are the fifteen standard corruptions, which the means are taken over.
ALEXNET_ERROR = {
    "gaussian_noise": 0.886428, "shot_noise": 0.894468, "impulse_noise": 0.922640, "defocus_blur": 0.819880,
    "glass_blur": 0.826268, "motion_blur": 0.785948, "zoom_blur": 0.798360, "snow": 0.866816, "frost": 0.826572,
    "fog": 0.819324, "brightness": 0.564592, "contrast": 0.853204, "elastic_transform": 0.646056,
    "pixelate": 0.717840, "jpeg_compression": 0.606500,
}  # fmt: skip


class Predictions(NamedTuple):
    """A classifier's output for each image of a split, on the CPU. label_I is -1 where there is no label."""

    label_I: Tensor
    predicted_I: Tensor
    confidence_I: Tensor  # probability of the predicted class, float64
    loss_I: Tensor  # cross-entropy in nats, float64
    in_top5_I: Tensor  # whether the label is among the five most probable classes

    @property
    def correct_I(self) -> Tensor:
        return self.predicted_I == self.label_I


@dataclass(frozen=True)
class Scores:
    """Counts over exactly the images of a split; loss is the mean cross-entropy in nats."""

    images: int
    top1_correct: int
    top5_correct: int | None  # None with five classes or fewer
    loss: float
    class_images: list[int]
    class_correct: list[int]

    @classmethod
    def of(cls, predictions: Predictions, num_classes: int) -> "Scores":
        correct_I, label_I = predictions.correct_I, predictions.label_I
        return cls(
            images=len(label_I),
            top1_correct=int(correct_I.sum()),
            top5_correct=int(predictions.in_top5_I.sum()) if num_classes > 5 else None,
            loss=predictions.loss_I.mean().item(),
            class_images=label_I.bincount(minlength=num_classes).tolist(),
            class_correct=label_I[correct_I].bincount(minlength=num_classes).tolist(),
        )

    @property
    def top1(self) -> float:
        return self.top1_correct / self.images

    @property
    def top5(self) -> float | None:
        return None if self.top5_correct is None else self.top5_correct / self.images


def measure(kind: str, predictions: Predictions, num_classes: int, *, part: str, frames: int) -> dict[str, Any]:
    """The scores of a subset of a benchmark of this kind, as in results.json: counts, and shares in 0..1."""
    if kind == "perturbations":
        return measure_sequences(predictions.predicted_I.view(-1, frames), part)
    scores, reliability = Scores.of(predictions, num_classes), reliability_bins(predictions)
    record = {
        "correct": scores.top1_correct,
        "error": (scores.images - scores.top1_correct) / scores.images,
        "loss": scores.loss,
        "calibration_error": calibration_error(reliability),
    }
    if kind == "corruptions":
        return record
    return record | {
        "top1": scores.top1,
        "top5": scores.top5,
        "class_images": scores.class_images,
        "class_correct": scores.class_correct,
        "reliability": reliability,
        "mistakes": most_confident_mistakes(predictions),
    }


def is_below_chance(scores: Mapping[str, Any]) -> bool:
    """Whether a test set has fewer right answers than guessing among its classes gives, by 4 standard deviations."""
    images = [count for count in scores.get("class_images", ()) if count]
    if len(images) < 2:
        return False
    chance = 1 / len(images)
    return scores["correct"] < sum(images) * chance - 4 * math.sqrt(sum(images) * chance * (1 - chance))


def measure_sequences(predicted_VT: Tensor, perturbation: str) -> dict[str, Any]:
    """Flip probability (arXiv 1903.12261, section 4.2): the share of V * (T - 1) comparisons where the class changes.

    Frames are compared with the previous one, or for noise, whose frames are independent, with the first.
    """
    reference = predicted_VT[:, :1] if "noise" in perturbation else predicted_VT[:, :-1]
    changed = predicted_VT[:, 1:] != reference
    sequences, frames = predicted_VT.shape
    return {
        "sequences": sequences,
        "frames": frames,
        "comparisons": changed.numel(),
        "flips": int(changed.sum()),
        "flip_probability": int(changed.sum()) / changed.numel(),
    }


def reliability_bins(predictions: Predictions) -> dict[str, list[float]]:
    """Images, correct predictions and mean confidence in each of BINS equal intervals (low, high] of confidence."""
    bin_I = (predictions.confidence_I * BINS).ceil().long().clamp(1, BINS) - 1
    images = bin_I.bincount(minlength=BINS)
    confidence = bin_I.bincount(predictions.confidence_I, minlength=BINS) / images.clamp(min=1)
    correct = bin_I[predictions.correct_I].bincount(minlength=BINS)
    return {"images": images.tolist(), "correct": correct.tolist(), "confidence": confidence.tolist()}


def calibration_error(reliability: Mapping[str, Sequence[float]]) -> float:
    """Expected calibration error (Guo et al., ICML 2017, equation 3): mean gap of accuracy and confidence."""
    bins = zip(reliability["images"], reliability["correct"], reliability["confidence"], strict=True)
    return sum(abs(correct - confidence * images) for images, correct, confidence in bins) / sum(reliability["images"])


def most_confident_mistakes(predictions: Predictions) -> list[dict[str, Any]]:
    """The wrong predictions of highest confidence: position in the split, label, predicted class, confidence."""
    wrong = (~predictions.correct_I).nonzero().flatten()
    first = wrong[predictions.confidence_I[wrong].argsort(descending=True, stable=True)][:MISTAKES].tolist()
    label_I, predicted_I, confidence_I = predictions.label_I, predictions.predicted_I, predictions.confidence_I
    return [
        {"image": i, "label": int(label_I[i]), "predicted": int(predicted_I[i]), "confidence": float(confidence_I[i])}
        for i in first
    ]


def summarise(name: str, kind: str, cells: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The means that are reported for a benchmark, in 0..1; cells: as in results.json."""
    if kind == "test set":
        (cell,) = cells
        return {name: cell[name] for name in ("error", "top1", "top5", "loss", "calibration_error")}
    if kind == "perturbations":
        by_sequence = mean_by_part(cells, "flip_probability")
        mean = sum(by_sequence.values()) / len(by_sequence)
        return {"flip_probability": by_sequence, "mean_flip_probability": mean}
    error, calibration = mean_by_part(cells, "error"), mean_by_part(cells, "calibration_error")
    means = {
        "error": error,
        "mean_corruption_error": sum(error[part] for part in ALEXNET_ERROR) / len(ALEXNET_ERROR),
        "mean_calibration_error": sum(calibration[part] for part in ALEXNET_ERROR) / len(ALEXNET_ERROR),
    }
    if name == "imagenet-c":  # normalised by AlexNet's errors (section 4.1 of 1903.12261); on CIFAR it is not
        means["mce"] = sum(error[part] / of_alexnet for part, of_alexnet in ALEXNET_ERROR.items()) / len(ALEXNET_ERROR)
    return means


def mean_by_part(cells: Sequence[Mapping[str, Any]], quantity: str) -> dict[str, float]:
    """Mean of a quantity over the cells of each part (the severities of a corruption), in the order of the cells."""
    by_part: dict[str, list[float]] = {}
    for cell in cells:
        by_part.setdefault(cell["part"], []).append(cell[quantity])
    return {part: sum(values) / len(values) for part, values in by_part.items()}
