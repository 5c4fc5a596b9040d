"""What reading from memory-mapped arrays adds to the model's own inference rate, and the memory that it takes.

    python benchmarks/scoring.py [--model wresnet40_2] [--images 10000] [--repeats 5] [--device cuda]

A file of noise in the layout of CIFAR-10-C, five severities of so many images, is scored cell by cell as evaluate.py
does, in turn with the same images at hand on the device. Medians over the repeats.
"""

import argparse
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from config import Config
from dataloader import MappedSplit, Normalise, ResidentSplit
from evaluate import predict
from models import build_model
from processes import exit_with_status, join


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="wresnet40_2")
    parser.add_argument("--images", type=int, default=10_000, help="of each severity")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device")
    args = parser.parse_args()
    with join(args.device) as world, tempfile.TemporaryDirectory() as folder:
        model = build_model(args.model, 10).to(world.device, memory_format=torch.channels_last)
        normalise = Normalise(Config(dataset="cifar10"), world.device)
        path, labels = Path(folder) / "noise.npy", torch.zeros(args.images, dtype=torch.long)
        np.save(path, np.random.default_rng(0).integers(0, 256, (5 * args.images, 32, 32, 3), dtype=np.uint8))
        mapped = [MappedSplit(path, severity * args.images, labels, world.device) for severity in range(5)]
        (images_NCHW, _) = next(mapped[0].batches([torch.arange(args.images)]))
        at_hand = ResidentSplit(images_NCHW.contiguous(), labels)
        predict(model, at_hand, normalise, world)
        before, seconds = peak_memory(), []
        for repeat in range(args.repeats):
            splits = (at_hand, mapped[repeat % 5])
            seconds.append([timed(predict, model, split, normalise, world) for split in splits])
        for name, values in zip(("at hand", "mapped"), zip(*seconds, strict=True), strict=True):
            rates = sorted(args.images / value for value in values)
            print(f"{name:<10}{statistics.median(rates):>10,.0f} images/s   ({rates[0]:,.0f} to {rates[-1]:,.0f})")
        added = statistics.median(with_reading / without - 1 for without, with_reading in seconds)
        print(f"reading adds {added:.1%}; peak memory {(peak_memory() - before) / 1e6:,.0f} MB above the model's")


def timed(function, *arguments) -> float:
    started = time.perf_counter()
    function(*arguments)  # ends by bringing the predictions to the CPU, which waits for the device
    return time.perf_counter() - started


def peak_memory() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


if __name__ == "__main__":
    exit_with_status(main)
