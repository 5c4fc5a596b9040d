"""From the settings to the splits of a data set.

A data set of arrays takes a function that opens it, a row of REGISTRY, and its name in config.DATASETS.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from config import Config
from datasets.download import Downloads, Remote
from datasets.folders import class_folders, find_folder, find_split, list_images
from datasets.imagefiles import CentreCrop, FileCheck, FitSquare, ImageFiles, RandomCrop
from datasets.shapes import CLASSES as SHAPE_CLASSES
from datasets.shapes import draw_shapes
from datasets.splits import ResidentSplit, Split, StreamedSplit
from utils import UserError, keyed_generator, short_repr, warn

PUBLIC = Downloads()  # missing files are downloaded from their public addresses
RGB = tuple[float, float, float]


class Arrays(NamedTuple):
    """A split of a data set: images uint8 (I, 3, H, W), labels int64 (I,), and the names of the classes."""

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]

    def take(self, indices: Tensor, device: torch.device, *, training: bool = False) -> Split:
        return ResidentSplit(self.images[indices].to(device), self.labels[indices])


class DataSet(NamedTuple):
    """A data set by name.

    mean, std: of red, green and blue in 0..1, for normalisation. test_images: what results.json calls its test images,
    "official" (the published ones), "embedded" (in this project) or "own". open_arrays: from the settings, "train" or
    "test", and where missing files come from; None: images in class folders, <dataroot>/<split>/<class>/.
    """

    mean: RGB
    std: RGB
    test_images: str
    open_arrays: Callable[[Config, str, Downloads], Arrays] | None


def open_shapes(config: Config, split: str, downloads: Downloads) -> Arrays:
    return Arrays(*draw_shapes(split, config.image_size), SHAPE_CLASSES)


def open_cifar(config: Config, split: str, downloads: Downloads) -> Arrays:
    from torchvision.datasets import CIFAR10, CIFAR100  # takes seconds

    kind, root = {"cifar10": CIFAR10, "cifar100": CIFAR100}[config.dataset], Path(config.dataroot)
    folder = find_folder(root, kind.base_folder, kind.meta["filename"])
    if folder is None:
        (folder,) = downloads.fetch_unpacked(Remote(kind.url, md5=kind.tgz_md5), root, (kind.base_folder,))
    kind = type(kind.__name__, (kind,), {"base_folder": folder.name})
    try:
        dataset = kind(folder.parent, train=split == "train")  # checks the md5 of every file
    except RuntimeError:
        raise UserError(
            f"{folder}: is incomplete or damaged; replace it with a correct copy, or rename it to download another"
        ) from None
    images = torch.from_numpy(dataset.data).permute(0, 3, 1, 2).contiguous()
    return Arrays(images, torch.tensor(dataset.targets), tuple(dataset.classes))


# CIFAR's are those that AutoAugment and the papers after it use.
CIFAR_STATISTICS = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
IMAGENET_STATISTICS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

REGISTRY = {
    "shapes": DataSet(*IMAGENET_STATISTICS, "embedded", open_shapes),
    "cifar10": DataSet(*CIFAR_STATISTICS, "official", open_cifar),
    "cifar100": DataSet(*CIFAR_STATISTICS, "official", open_cifar),
    "imagenet": DataSet(*IMAGENET_STATISTICS, "official", None),
    "folder": DataSet(*IMAGENET_STATISTICS, "own", None),
}


def statistics(name: str) -> tuple[RGB, RGB]:
    """Mean and standard deviation of red, green and blue, in 0..1, for the normalisation of a data set's images."""
    return REGISTRY[name].mean, REGISTRY[name].std


def source_of_test_images(name: str) -> str:
    """For results.json: "official", "embedded" or "own". ImageNet's are official only where their number is."""
    return REGISTRY[name].test_images


class Data(NamedTuple):
    """The splits of a run. `valid` is None where nothing is held out."""

    train: Split
    valid: Split | None
    test: Split
    classes: tuple[str, ...]

    def fingerprint(self) -> str:
        """A hash of all images and labels, which does not depend on where they are."""
        splits = [split and split.fingerprint() for split in (self.train, self.valid, self.test)]
        return hashlib.sha256(repr((self.classes, splits)).encode()).hexdigest()


def load_data(config: Config, device: torch.device, downloads: Downloads = PUBLIC) -> Data:
    """The splits that `config` asks for. Raises UserError for data that are missing, unreadable or too few."""
    source = _open(config, "train", downloads)
    test_source = _open(config, "test", downloads, source.classes)
    order = balanced_order(source.labels)
    sizes = f"{config.dataset}: train_size {config.train_size} and valid_size {config.valid_size}"
    if config.valid_size + (config.train_size or 1) > len(order):
        raise UserError(f"{sizes} ask for more than its {len(order)} training images")
    end = None if config.train_size is None else config.valid_size + config.train_size
    chosen = order[config.valid_size : end].sort().values
    counts = source.labels[chosen].bincount(minlength=len(source.classes))
    if not counts.all():
        raise UserError(f"{sizes} leave class {source.classes[int(counts.argmin())]!r} without training images")
    train = source.take(chosen, device, training=True)
    if len(train.labels) < config.batch_size:
        raise UserError(f"batch_size: {config.batch_size} is more than the {len(train.labels)} training images")
    valid = source.take(order[: config.valid_size].sort().values, device) if config.valid_size else None
    return Data(train, valid, test_source.take(torch.arange(len(test_source.labels)), device), source.classes)


def load_test(
    config: Config, device: torch.device, classes: tuple[str, ...] | None = None, downloads: Downloads = PUBLIC
) -> tuple[Split, tuple[str, ...]]:
    """The test split alone, labelled by position in `classes` where they are given, and its classes."""
    source = _open(config, "test", downloads, classes)
    return source.take(torch.arange(len(source.labels)), device), source.classes


def balanced_order(labels: Tensor) -> Tensor:
    """Indices of all images, ordered so that the first n are as balanced over the classes as possible, for every n.

    The order is the same for every seed: which images are held out and trained on is part of the problem.
    """
    shuffled = torch.randperm(len(labels), generator=keyed_generator("subset"))
    by_class = shuffled[labels[shuffled].argsort(stable=True)]
    counts = labels.bincount()
    rank_within_class = torch.arange(len(labels)) - (counts.cumsum(0) - counts)[labels[by_class]]
    return by_class[rank_within_class.argsort(stable=True)]


@dataclass
class _FolderSource:
    """A split whose images are files, <dataroot>/<split>/<class>/*."""

    paths: list[Path]
    labels: Tensor
    classes: tuple[str, ...]
    config: Config
    quiet: bool

    def take(self, indices: Tensor, device: torch.device, *, training: bool = False) -> Split:
        """The given images, without unreadable ones: ImageNet's files are checked, others decoded, all at once."""
        config, paths = self.config, [self.paths[i] for i in indices]
        images, reasons = None, [None] * len(paths)
        if config.dataset == "imagenet":
            read = RandomCrop(config.image_size, config.flip) if training else CentreCrop(*config.eval_view)
            if config.check_files:
                _, reasons = self._read("checking", ImageFiles(paths, FileCheck()), keep=False)
        else:
            read = FitSquare(config.image_size)
            fits = len(paths) * 3 * read.size**2 <= config.resident_gb * 1e9
            images, reasons = self._read("reading", ImageFiles(paths, read), keep=fits)
        readable = torch.tensor([reason is None for reason in reasons])
        if not readable.all():
            self._report(int((~readable).sum()), len(paths), next(filter(None, reasons)))
        labels = self.labels[indices][readable]
        if images is not None:
            return ResidentSplit(images[readable].to(device), labels)
        paths = [path for path, reason in zip(paths, reasons, strict=True) if reason is None]
        files = ImageFiles(paths, read, config.seed, substitute=training)
        return StreamedSplit(files, labels, device, config.workers)

    def _read(self, title: str, files: ImageFiles, *, keep: bool) -> tuple[Tensor | None, list[str | None]]:
        """All images where they are to be kept, and for each file why it cannot be read, or None."""
        size = files.read.size
        images = torch.empty(len(files), 3, size, size, dtype=torch.uint8) if keep else None
        reasons: list[str | None] = []
        shown = {"unit": "image", "disable": self.quiet or None}  # None: hidden except on a terminal
        with tqdm(desc=f"{title} {self.config.dataroot}", total=len(files), leave=False, **shown) as bar:
            indices = torch.arange(len(files)).split(64)
            for batch, _, reasons_of_batch in files.batches(indices, 0, self.config.workers):
                if images is not None:
                    images[len(reasons) : len(reasons) + len(batch)] = batch
                reasons += reasons_of_batch
                bar.update(len(batch))
        return images, reasons

    def _report(self, unreadable: int, total: int, first: str) -> None:
        """Raises UserError for unreadable images, unless they may be skipped and others are left."""
        if not self.config.skip_unreadable:
            raise UserError(
                f"{unreadable} of {total} images cannot be read, first {first}\n"
                "repair them or move them elsewhere, or skip them with --set skip_unreadable=true"
            )
        if unreadable == total:
            raise UserError(f"{self.config.dataroot}: none of the {total} images can be read")
        if not self.quiet:
            warn(f"skipped {unreadable} of {total} images, first {first}")


def _open(
    config: Config, split: str, downloads: Downloads, classes: tuple[str, ...] | None = None
) -> "Arrays | _FolderSource":
    """The "train" or "test" split of the data set, labelled by position in `classes` where they are given."""
    if open_arrays := REGISTRY[config.dataset].open_arrays:
        source = open_arrays(config, split, downloads)
        _check_arrays(config.dataset, source)
    else:
        source = _open_folder(config, split, classes, downloads.quiet)
    if classes is not None and classes != source.classes:
        found, expected = next(pair for pair in zip_longest(source.classes, classes) if pair[0] != pair[1])
        different = f"{short_repr(found)} instead of {short_repr(expected)}"
        raise UserError(f"{config.dataset}: its classes are not those expected: {different}")
    return source


def _check_arrays(name: str, arrays: Arrays) -> None:
    images, labels, classes = arrays
    good_images = images.dtype == torch.uint8 and images.ndim == 4 and images.shape[1] == 3 and len(images)
    good_labels = labels.dtype == torch.int64 and labels.shape == images.shape[:1]
    if not (good_images and good_labels and 0 <= labels.min() <= labels.max() < len(classes)):
        raise UserError(
            f"dataset: {name}: needs images uint8 (I, 3, H, W), labels int64 (I,) of 0..{len(classes) - 1}; got "
            f"{images.dtype} {tuple(images.shape)}, {labels.dtype} {tuple(labels.shape)}"
        )


def _open_folder(config: Config, split: str, classes: tuple[str, ...] | None, quiet: bool) -> _FolderSource:
    folder, replaced = find_split(Path(config.dataroot), split, classes)
    found = class_folders(folder)
    if classes is None and len(found) < 2:
        raise UserError(f"{folder}: holds {len(found)} class folders; a classifier needs at least two")
    if unknown := set(found) - set(classes or found):
        raise UserError(f"{folder}: class {min(unknown)!r} is not among the {len(classes or ())} classes trained on")
    classes = classes or found
    paths, labels, skipped = list_images(folder, {name: classes.index(name) for name in found})
    for message in filter(None, () if quiet else (replaced, skipped)):
        warn(message)
    return _FolderSource(paths, labels, classes, config, quiet)
