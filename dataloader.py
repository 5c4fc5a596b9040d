"""Data sets and what every image goes through besides the policy: crop and flip before it, normalise and Cutout after.

Small sets stay on the device as uint8; a batch is an index. The order of the images and all draws are keyed by (seed,
purpose, epoch, step), so that a resumed run sees what an uninterrupted one would have seen.

Shape suffixes: N distinct images of a batch, M copies of each; B = N * M, image-major (copy m of image n stands at
n * M + m); C channels, H rows, W columns.
"""

import hashlib
import os
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
import torchvision
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.datasets.utils import download_url
from tqdm import tqdm

from augmentations import gather_pixels, upload
from config import Config
from shapes import CLASSES as SHAPE_CLASSES
from shapes import draw_shapes
from utils import UserError, keyed_generator, warn

# Mean and standard deviation of red, green and blue. CIFAR's are those that the paper's line of work uses.
CIFAR_STATISTICS = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
IMAGENET_STATISTICS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
IMAGE_SUFFIXES = frozenset(torchvision.datasets.folder.IMG_EXTENSIONS)


class Split(Protocol):
    """Part of a data set, ready to be read in batches."""

    labels: Tensor  # int64, on the CPU

    def batches(self, indices: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """(images uint8 (N, 3, H, W), labels int64 (N,)) on the device, for each index tensor in turn."""
        ...

    def fingerprint(self) -> str:
        """A hash that tells this split from one with other images, labels or order."""
        ...


@dataclass
class ResidentSplit:
    """Images that live on the device."""

    images: Tensor
    labels: Tensor

    def batches(self, indices: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        labels_on_device = self.labels.to(self.images.device)
        for index in indices:
            index = upload(index, self.images.device)
            yield self.images.index_select(0, index), labels_on_device.index_select(0, index)

    def fingerprint(self) -> str:
        return hashlib.sha256(self.images.cpu().numpy().tobytes() + self.labels.numpy().tobytes()).hexdigest()


@dataclass
class StreamedSplit:
    """Images that are decoded anew by worker processes whenever they are wanted."""

    files: "ImageFiles"
    labels: Tensor
    device: torch.device
    workers: int

    def batches(self, indices: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        loader = torch.utils.data.DataLoader(
            self.files,
            batch_sampler=[index.tolist() for index in indices],
            num_workers=self.workers,
            collate_fn=_collate,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # otherwise the loader draws from the default generator
        )
        for index, (images, reasons) in zip(indices, loader, strict=True):
            if any(reasons):
                raise UserError(f"an image became unreadable during the run: {next(filter(None, reasons))}")
            yield images.to(self.device, non_blocking=True), upload(self.labels[index], self.device)

    def fingerprint(self) -> str:
        files = [(path.parent.name, path.name, path.stat().st_size) for path in self.files.paths]
        return hashlib.sha256(repr(files).encode() + self.labels.numpy().tobytes()).hexdigest()


class Data(NamedTuple):
    """What a run reads. `valid` is None where nothing is held out."""

    train: Split
    valid: Split | None
    test: Split
    classes: tuple[str, ...]

    def fingerprint(self) -> str:
        """A hash that tells these data from any others, wherever they lie."""
        splits = [split and split.fingerprint() for split in (self.train, self.valid, self.test)]
        return hashlib.sha256(repr((self.classes, splits)).encode()).hexdigest()


def load_data(config: Config, device: torch.device) -> Data:
    """The splits that `config` asks for. Raises UserError for data that is missing, unreadable or too small."""
    source = _open(config, "train")
    test_source = _open(config, "test", source.classes)
    order = balanced_order(source.labels)
    if config.valid_size + (config.train_size or 1) > len(order):
        raise UserError(
            f"{config.dataset}: train_size {config.train_size} and valid_size {config.valid_size} "
            f"ask for more than its {len(order)} training images"
        )
    end = None if config.train_size is None else config.valid_size + config.train_size
    chosen = order[config.valid_size : end].sort().values
    counts = source.labels[chosen].bincount(minlength=len(source.classes))
    if not counts.all():
        name = source.classes[int(counts.argmin())]
        raise UserError(
            f"{config.dataset}: train_size {config.train_size} and valid_size {config.valid_size} "
            f"leave class {name!r} without training images"
        )
    train = source.take(chosen, device)
    if len(train.labels) < config.batch_size:
        raise UserError(f"batch_size: {config.batch_size} is more than the {len(train.labels)} training images")
    valid = source.take(order[: config.valid_size].sort().values, device) if config.valid_size else None
    return Data(train, valid, test_source.take(torch.arange(len(test_source.labels)), device), source.classes)


def load_test(
    config: Config, device: torch.device, classes: tuple[str, ...] | None = None
) -> tuple[Split, tuple[str, ...]]:
    """The test split alone, labelled by position in `classes` where they are given, and its classes."""
    source = _open(config, "test", classes)
    return source.take(torch.arange(len(source.labels)), device), source.classes


def balanced_order(labels: Tensor) -> Tensor:
    """Indices of all images in an order whose every beginning is as balanced over the classes as the set allows.

    It is the same for every seed: which images are held out, and which are trained on, belongs to the problem.
    """
    shuffled = torch.randperm(len(labels), generator=keyed_generator("subset"))
    by_class = shuffled[labels[shuffled].argsort(stable=True)]
    counts = labels.bincount()
    rank_within_class = torch.arange(len(labels)) - (counts.cumsum(0) - counts)[labels[by_class]]
    return by_class[rank_within_class.argsort(stable=True)]


def epoch_batches(images: int, batch_size: int, seed: int, epoch: int) -> tuple[Tensor, ...]:
    """Indices of the epoch's batches, all of one size: a remainder is left out, another one each epoch."""
    order = torch.randperm(images, generator=keyed_generator(seed, "order", epoch))
    return order[: images // batch_size * batch_size].split(batch_size)


def make_copies(images_NCHW: Tensor, M: int, config: Config, generator: torch.Generator) -> Tensor:
    """M copies of each image, image-major, cropped and flipped each by itself or as its image was."""
    if not config.crop_per_copy:
        return crop_and_flip(images_NCHW, config.crop_padding, config.flip, generator).repeat_interleave(M, 0)
    return crop_and_flip(images_NCHW.repeat_interleave(M, 0), config.crop_padding, config.flip, generator)


def crop_and_flip(images_BCHW: Tensor, padding: int, flip: bool, generator: torch.Generator) -> Tensor:
    """A random crop of the same size after zero padding, then a horizontal flip for one half; drawn per image."""
    batch, _, height, width = images_BCHW.shape
    shift_B2 = torch.randint(-padding, padding + 1, (batch, 2), generator=generator)
    flipped_B1 = torch.randint(2, (batch, 1), generator=generator).bool() & flip
    column_W = torch.arange(width)
    x_BW = torch.where(flipped_B1, width - 1 - column_W, column_W) + shift_B2[:, :1]
    y_BH = torch.arange(height) + shift_B2[:, 1:]
    x_BW, y_BH = (upload(index, images_BCHW.device) for index in (x_BW, y_BH))
    return gather_pixels(images_BCHW, x_BW[:, None, :], y_BH[:, :, None])


class Normalise:
    """uint8 (B, C, H, W) -> float32: value / 255, minus the mean, over the standard deviation, channel by channel."""

    def __init__(self, config: Config, device: torch.device):
        usual = CIFAR_STATISTICS if config.dataset.startswith("cifar") else IMAGENET_STATISTICS
        self.mean_C11 = torch.tensor(config.mean or usual[0], device=device)[:, None, None]
        self.std_C11 = torch.tensor(config.std or usual[1], device=device)[:, None, None]

    def __call__(self, images_BCHW: Tensor) -> Tensor:
        return images_BCHW.float().div_(255).sub_(self.mean_C11).div_(self.std_C11)


def cutout(inputs_BCHW: Tensor, side: int, generator: torch.Generator) -> Tensor:
    """Cutout (DeVries and Taylor, 2017): a square around a random pixel is set to 0, the mean; drawn per image.

    The square may reach over the border. side: in pixels; 0 blanks nothing.
    """
    batch, _, height, width = inputs_BCHW.shape
    x_B1 = torch.randint(width, (batch, 1), generator=generator)
    y_B1 = torch.randint(height, (batch, 1), generator=generator)
    column_BW = (torch.arange(width) >= x_B1 - side // 2) & (torch.arange(width) < x_B1 + (side + 1) // 2)
    row_BH = (torch.arange(height) >= y_B1 - side // 2) & (torch.arange(height) < y_B1 + (side + 1) // 2)
    column_BW, row_BH = (upload(inside, inputs_BCHW.device) for inside in (column_BW, row_BH))
    return inputs_BCHW.masked_fill((row_BH[:, :, None] & column_BW[:, None, :])[:, None], 0.0)


class ImageFiles(torch.utils.data.Dataset):
    """Image files as uint8 tensors (3, size, size), each with the reason why it cannot be read, if so."""

    def __init__(self, paths: Sequence[Path], size: int):
        self.paths, self.size = paths, size

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, str | None]:
        path = self.paths[index]
        try:
            return read_image(path, self.size), None
        except Exception as error:  # a decoder meets damage in its own way: OSError, SyntaxError, struct.error, ...
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            return torch.zeros(3, self.size, self.size, dtype=torch.uint8), f"{path} ({reason})"


def read_image(path: Path, size: int) -> Tensor:
    """Decode to uint8 RGB (3, size, size): upright, scaled (bicubic) until it covers the square, cut at the centre."""
    with Image.open(path) as image:
        upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I"):  # 16 bits a channel: convert() would clip at 255
        upright = Image.fromarray((np.asarray(upright) / 257).round().clip(0, 255).astype(np.uint8))
    if upright.mode == "F":
        raise ValueError("floating-point values without a known range")
    upright = upright.convert("RGB")
    if upright.size != (size, size):
        upright = ImageOps.fit(upright, (size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(upright)).permute(2, 0, 1)


@dataclass
class _ArraySource:
    """A data set that comes as arrays."""

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]

    def take(self, indices: Tensor, device: torch.device) -> Split:
        return ResidentSplit(self.images[indices].to(device), self.labels[indices])


@dataclass
class _FolderSource:
    """A data set that comes as files, <dataroot>/<split>/<class>/*."""

    paths: list[Path]
    labels: Tensor
    classes: tuple[str, ...]
    config: Config

    def take(self, indices: Tensor, device: torch.device) -> Split:
        """Every file is decoded once, now: unreadable ones are known before training, the others kept if they fit."""
        config = self.config
        files = ImageFiles([self.paths[i] for i in indices], config.image_size)
        keep = len(files) * 3 * config.image_size**2 <= config.resident_gb * 1e9
        kept = torch.empty(len(files) if keep else 0, 3, config.image_size, config.image_size, dtype=torch.uint8)
        reasons: list[str | None] = []
        loader = torch.utils.data.DataLoader(
            files, 64, num_workers=config.workers, collate_fn=_collate, generator=torch.Generator()
        )
        with tqdm(total=len(files), desc=f"reading {config.dataroot}", unit="image", disable=None, leave=False) as bar:
            for images, reasons_of_batch in loader:
                if keep:
                    kept[len(reasons) : len(reasons) + len(images)] = images
                reasons += reasons_of_batch
                bar.update(len(images))
        readable = torch.tensor([reason is None for reason in reasons])
        if not readable.all() and not config.skip_unreadable:
            raise UserError(
                f"{(~readable).sum()} of {len(files)} images cannot be read, first {next(filter(None, reasons))}\n"
                "mend or remove them, or leave them out with --set skip_unreadable=true"
            )
        if not readable.any():
            raise UserError(f"{config.dataroot}: none of the {len(files)} images can be read")
        if not readable.all():
            warn(f"left out {(~readable).sum()} of {len(files)} images, first {next(filter(None, reasons))}")
        labels = self.labels[indices][readable]
        if keep:
            return ResidentSplit(kept[readable].to(device), labels)
        files.paths = [path for path, reason in zip(files.paths, reasons, strict=True) if reason is None]
        return StreamedSplit(files, labels, device, config.workers)


def _open(config: Config, split: str, classes: tuple[str, ...] | None = None) -> _ArraySource | _FolderSource:
    """The "train" or "test" split of the data set, labelled by position in `classes` where they are given."""
    if config.dataset == "folder":
        source = _open_folder(config, split, classes)
    elif config.dataset == "shapes":
        source = _ArraySource(*draw_shapes(split), SHAPE_CLASSES)
    else:
        source = _open_cifar(config, split)
    if classes is not None and classes != source.classes:
        raise UserError(
            f"{config.dataset}: its classes are not those expected: {_first_difference(source.classes, classes)}"
        )
    return source


def _open_cifar(config: Config, split: str) -> _ArraySource:
    kind = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[config.dataset]
    root = Path(config.dataroot)
    try:
        try:
            dataset = kind(root, train=split == "train")  # checks the md5 of every file
        except RuntimeError:  # not there, or not whole
            download_url(kind.url, root, kind.filename, kind.tgz_md5)
            with tarfile.open(root / kind.filename) as archive:
                archive.extractall(root, filter="data")
            dataset = kind(root, train=split == "train")
    except (OSError, RuntimeError, tarfile.TarError) as error:  # no network, cut short, wrong md5
        raise UserError(
            f"{config.dataset}: is not in {root} and cannot be fetched ({str(error).splitlines()[0]})\n"
            f"fetch {kind.url} by hand and put it into {root}, or name its place with --dataroot"
        ) from None
    images = torch.from_numpy(dataset.data).permute(0, 3, 1, 2).contiguous()
    return _ArraySource(images, torch.tensor(dataset.targets), tuple(dataset.classes))


def _open_folder(config: Config, split: str, classes: tuple[str, ...] | None) -> _FolderSource:
    root = Path(config.dataroot)
    names = ("train",) if split == "train" else ("test", "val")
    folder = next((root / name for name in names if (root / name).is_dir()), None)
    if folder is None:
        raise UserError(f"{root}: holds no folder {' or '.join(names)}; images belong in {root / names[0]}/<class>/")
    found = tuple(
        sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    )
    if classes is None and len(found) < 2:
        raise UserError(f"{folder}: holds {len(found)} class folders; a classifier needs at least two")
    if unknown := set(found) - set(classes or found):
        raise UserError(f"{folder}: class {min(unknown)!r} is not among the {len(classes or ())} classes trained on")
    classes = classes or found
    paths, labels = [], []
    for name in found:
        files = sorted(p for p in (folder / name).iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
        if not files:
            raise UserError(f"{folder / name}: holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
        paths += files
        labels += [classes.index(name)] * len(files)
    return _FolderSource(paths, torch.tensor(labels), classes, config)


def _collate(results: list[tuple[Tensor, str | None]]) -> tuple[Tensor, list[str | None]]:
    images, reasons = zip(*results, strict=True)
    return torch.stack(images), list(reasons)


def _first_difference(found: Sequence[str], expected: Sequence[str]) -> str:
    if len(found) != len(expected):
        return f"{len(found)} instead of {len(expected)}"
    return next(f"{a!r} instead of {b!r}" for a, b in zip(found, expected, strict=True) if a != b)
