"""What reading memory-mapped arrays adds to the time of scoring, and the memory it takes.

    python benchmarks/scoring.py [--model wresnet40_2] [--images 10000] [--repeats 5] [--device cuda]

A file of noise in the layout of CIFAR-10-C, five severities of --images each, is scored as evaluate.py does, in turn
with the same images in memory on the device.
"""

import itertools
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from measuring import Spread, count, in_turn, parse, parser, peak_memory, publish, ratios

from config import Config
from dataloader import Normalise
from datasets.splits import MappedSplit, ResidentSplit
from evaluation.predict import predict
from evaluation.text_table import Table
from models import build_model
from training.distributed import join
from training.exit import exit_with_status


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--model", default="wresnet40_2")
    arguments.add_argument("--images", type=count, default=10_000, help="of each severity")
    args = parse(arguments)
    with join(args.device) as world, tempfile.TemporaryDirectory() as folder:
        config = Config(dataset="cifar10", model=args.model)
        model = build_model(config.model, 10).to(world.device, memory_format=torch.channels_last)
        normalise = Normalise(config, world.device)
        path, labels = Path(folder) / "noise.npy", torch.zeros(args.images, dtype=torch.long)
        np.save(path, np.random.default_rng(0).integers(0, 256, (5 * args.images, 32, 32, 3), dtype=np.uint8))
        mapped = [MappedSplit(path, severity * args.images, labels, world.device) for severity in range(5)]
        (images_NCHW, _) = next(mapped[0].batches([torch.arange(args.images)]))
        in_memory, severities = ResidentSplit(images_NCHW.contiguous(), labels), itertools.cycle(mapped)
        predict(model, in_memory, normalise, world)
        before = peak_memory()
        cases = {
            "in memory": lambda: predict(model, in_memory, normalise, world),
            "mapped": lambda: predict(model, next(severities), normalise, world),
        }
        seconds = in_turn(cases, args.repeats, world.device)
        above = peak_memory() - before
    rows = [[name, Spread.of(seconds[name]).per_second(args.images).describe()] for name in cases]
    ratio = ratios(seconds["mapped"], seconds["in memory"]).median
    notes = [f"reading adds {ratio - 1:.1%}; peak memory {above / 1e6:,.0f} MB above the model's"]
    table = Table(f"Scoring {args.model}, {args.images:,} images at a time", ["", "images/s"], rows, notes)
    measured = {"model": args.model, "images": args.images, "seconds": seconds, "ratio": ratio, "memory": above}
    publish(args, [table], measured)


if __name__ == "__main__":
    exit_with_status(main)
