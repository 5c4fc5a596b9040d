"""What a run of each conf costs in GPU-hours and memory: computed, not measured.

    python benchmarks/cost.py

GPU-hours: the FLOPs of an image, forward and backward, by torch's FLOP counter (a multiply-add is two), times M copies,
training images and epochs, over what one GPU does in an hour at an assumed share of its peak. Narrow networks reach a
smaller share, wide ones a larger one: this is an order of magnitude.

Activations: what a micro-batch keeps for its backward pass, in bfloat16. Weights, gradients and momentum (12 bytes per
parameter) and the temporary memory of the backward pass come on top.
"""

import sys
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from config import Config, load_config  # noqa: E402 (found by the line above)
from models import build_model  # noqa: E402
from training.exit import exit_with_status  # noqa: E402
from utils import CommandLine  # noqa: E402

GPU, PEAK, SHARE = "A100", 312e12, 0.2  # bfloat16 without sparsity, in FLOP/s
TRAINING_IMAGES = {"cifar10": 50_000, "cifar100": 50_000, "imagenet": 1_281_167}
CLASSES = {"cifar10": 10, "cifar100": 100, "imagenet": 1000}


class Cost(NamedTuple):
    """FLOPs of one image, forward and backward; images with all copies; hours of one GPU; bytes of activations."""

    flops_per_image: float
    images: int
    gpu_hours: float
    activations: float


def cost(config: Config) -> Cost:
    with torch.device("meta"):
        model = build_model(config.model, CLASSES[config.dataset], **config.model_options())
        batch = torch.empty(2, 3, config.image_size, config.image_size)
    kept = {}

    def note(saved: torch.Tensor) -> torch.Tensor:
        if not isinstance(saved, torch.nn.Parameter):
            kept[saved.untyped_storage()._cdata] = saved.untyped_storage().nbytes()
        return saved

    with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(note, lambda saved: saved):
        model(batch).sum().backward()
    flops = counter.get_total_flops() / len(batch)
    images = config.M * TRAINING_IMAGES[config.dataset] * config.epochs
    bytes_per_image = sum(kept.values()) / len(batch) / 2  # the meta tensors are float32
    activations = bytes_per_image * config.M * config.batch_size / config.accumulate
    return Cost(flops, images, flops * images / (PEAK * SHARE) / 3600, activations)


def published_confs() -> list[Path]:
    """The conf files of the results table."""
    return [path for dataset in CLASSES for path in sorted((ROOT / "confs" / dataset).glob("*.yaml"))]


def describe(hours: float) -> str:
    """Two significant digits."""
    return f"{float(f'{hours:.2g}'):,g}"


def main() -> None:
    CommandLine(prog="benchmarks/cost.py", description=__doc__).parse_args()
    print(f"GPU-hours of one {GPU} at {SHARE:.0%} of {PEAK / 1e12:.0f} TFLOP/s (computed, not measured)\n")
    print(f"{'conf':<40}{'GFLOP/image':>12}{'images':>18}{'GPU-hours':>12}{'activations':>14}")
    for path in published_confs():
        flops, images, hours, activations = cost(load_config(path, {}))
        name = path.relative_to(ROOT / "confs").as_posix()
        numbers = f"{flops / 1e9:>12.1f}{images:>18,}{describe(hours):>12}{activations / 1e9:>11.1f} GB"
        print(f"{name:<40}{numbers}", flush=True)


if __name__ == "__main__":
    exit_with_status(main)
