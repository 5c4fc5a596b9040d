"""How fast ImageNet's images are read, compared with torchvision's usual way, in images per second and core.

    python benchmarks/loading.py                                    # generated JPEGs
    python benchmarks/loading.py --images data/imagenet/train --reads 2000 --workers 0 4 8 16

ours          datasets.imagefiles.ImageFiles with RandomCrop, as main.py reads images for training
torchvision   ImageFolder, RandomResizedCrop(224, bicubic), RandomHorizontalFlip, PILToTensor, through a DataLoader

Both read the same files in turn with the same number of worker processes (0: none), whose start is timed too. DIR holds
JPEGs, or class folders of them. An image is decoded once for all its M copies.
"""

import argparse
import itertools
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import Compose, InterpolationMode, PILToTensor, RandomHorizontalFlip, RandomResizedCrop

sys.path.insert(0, str(Path(__file__).parent.parent))

from measuring import Spread, cores, count, count_or_none, in_turn, parse, parser, publish, ratios

from config import Config
from datasets.imagefiles import ImageFiles, RandomCrop
from datasets.loading import class_folders
from evaluation.text_table import Table
from training.distributed import join
from training.exit import exit_with_status
from utils import UserError

DRAWN = ((500, 375), (375, 500), (500, 333), (640, 480))  # width and height, around ImageNet's usual ones


def main() -> None:
    args = parse_arguments()
    with join(args.device), tempfile.TemporaryDirectory() as folder:
        images = args.images or draw_jpegs(Path(folder) / "drawn", min(64, args.reads))
        theirs = in_class_folders(images, Path(folder) / "classes")
        theirs.transform = Compose(
            [
                RandomResizedCrop(args.size, interpolation=InterpolationMode.BICUBIC),
                RandomHorizontalFlip(),
                PILToTensor(),
            ]
        )
        rows = [measure(theirs, workers, args) for workers in args.workers]
    settings = {name: getattr(args, name) for name in ("reads", "size", "batch_size")}
    publish(args, [table(len(theirs), rows, args)], settings | {"images": str(args.images), "rows": rows})


def parse_arguments() -> argparse.Namespace:
    arguments = parser(__doc__)
    add = arguments.add_argument
    add("--images", type=Path, metavar="DIR", help="JPEGs, or class folders of them (default: generated ones)")
    add("--reads", type=count, default=512, help="images read in a turn (default: 512)")
    add("--size", type=count, default=224, help="side of the crops in pixels (default: 224)")
    add("--batch_size", type=count, default=32, help="images that a worker reads at a time (default: 32)")
    add("--workers", type=count_or_none, nargs="+", default=[0, cores()], help="(default: 0, and one per core)")
    return parse(arguments)


def draw_jpegs(folder: Path, number: int) -> Path:
    """Smooth noise with grain: files about as large as photographs of this size."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for file, size in zip(range(number), itertools.cycle(DRAWN)):
        coarse = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC)).astype(np.float32)
        grain = rng.normal(0, 12, smooth.shape[:2])[:, :, None]
        Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8)).save(folder / f"{file}.jpg", quality=90)
    return folder


def in_class_folders(images: Path, folder: Path) -> ImageFolder:
    """torchvision's data set of the class folders in `images`, or of `images` as one class. Raises UserError."""
    if not images.is_dir():
        raise UserError(f"--images {images}: there is no such folder")
    if not class_folders(images):
        folder.mkdir()
        (folder / "all").symlink_to(images.resolve(), target_is_directory=True)
        images = folder
    return ImageFolder(str(images))


def measure(theirs: ImageFolder, workers: int, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of both ways by turn, and torchvision's relative to ours."""
    ours = ImageFiles([Path(path) for path, _ in theirs.samples], RandomCrop(args.size, flip=True))
    order, epochs, pinned = torch.arange(args.reads) % len(ours), itertools.count(), args.device.startswith("cuda")

    def read_ours() -> None:
        for images, *_ in ours.batches(order.split(args.batch_size), next(epochs), workers, pinned=pinned):
            images.contiguous()  # as StreamedSplit does, and torchvision's loader has done

    def read_theirs() -> None:
        loader = DataLoader(theirs, args.batch_size, sampler=order.tolist(), num_workers=workers, pin_memory=pinned)
        for _ in loader:
            pass

    seconds = in_turn({"ours": read_ours, "torchvision": read_theirs}, args.repeats)
    return {"workers": workers, "seconds": seconds, "ratio": ratios(seconds["torchvision"], seconds["ours"])}


def table(files: int, rows: list[dict[str, Any]], args: argparse.Namespace) -> Table:
    cells, fastest, M = [], 0.0, Config().M
    for row in rows:
        busy = min(max(1, row["workers"]), cores())
        for name, seconds in row["seconds"].items():
            speed = Spread.of(seconds).per_second(args.reads)
            faster = row["ratio"].describe(".3f") if name == "ours" else ""
            each = f"{speed.median / busy:,.0f}"
            cells.append([str(row["workers"]), name, speed.describe(), each, faster])
        fastest = max(fastest, Spread.of(row["seconds"]["ours"]).per_second(args.reads).median)
    return Table(
        f"Reading {args.reads:,} images ({files:,} files) as crops of {args.size}x{args.size}",
        ["workers", "", "images/s", "images/s/core", "ours / torchvision"],
        cells,
        [f"An image is decoded once for all copies: with M = {M}, enough for {M * fastest:,.0f} copies a second."],
    )


if __name__ == "__main__":
    exit_with_status(main)
