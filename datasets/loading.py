"""From the settings to the splits of a data set: embedded shapes, CIFAR, or images in class folders."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torchvision
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from config import Config
from datasets.download import Downloads, Missing, Remote, unpack
from datasets.imagefiles import (
    IMAGE_SUFFIXES,
    CentreCrop,
    FileCheck,
    FitSquare,
    ImageFiles,
    RandomCrop,
    leave_signals_to_the_parent,
)
from datasets.shapes import CLASSES as SHAPE_CLASSES
from datasets.shapes import draw_shapes
from datasets.splits import ResidentSplit, Split, StreamedSplit
from utils import UserError, keyed_generator, short_repr, warn

PUBLIC = Downloads()  # from the public addresses, where something is missing


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


def load_data(config: Config, device: torch.device, downloads: Downloads = PUBLIC) -> Data:
    """The splits that `config` asks for. What `downloads` says of bars goes for warnings too.

    Raises UserError for data that is missing, unreadable or too small.
    """
    source = _open(config, "train", downloads)
    test_source = _open(config, "test", downloads, source.classes)
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


def source_of_test_images(name: str) -> str:
    """For results.json: "official", "embedded" or "own". ImageNet's are official only where their number is."""
    return {"shapes": "embedded", "cifar10": "official", "cifar100": "official", "imagenet": "official"}.get(
        name, "own"
    )


def balanced_order(labels: Tensor) -> Tensor:
    """Indices of all images in an order whose every beginning is as balanced over the classes as the set allows.

    It is the same for every seed: which images are held out, and which are trained on, belongs to the problem.
    """
    shuffled = torch.randperm(len(labels), generator=keyed_generator("subset"))
    by_class = shuffled[labels[shuffled].argsort(stable=True)]
    counts = labels.bincount()
    rank_within_class = torch.arange(len(labels)) - (counts.cumsum(0) - counts)[labels[by_class]]
    return by_class[rank_within_class.argsort(stable=True)]


@dataclass
class _ArraySource:
    """A data set that comes as arrays."""

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]

    def take(self, indices: Tensor, device: torch.device, *, training: bool = False) -> Split:
        return ResidentSplit(self.images[indices].to(device), self.labels[indices])


@dataclass
class _FolderSource:
    """A data set that comes as files, <dataroot>/<split>/<class>/*."""

    paths: list[Path]
    labels: Tensor
    classes: tuple[str, ...]
    config: Config
    quiet: bool

    def take(self, indices: Tensor, device: torch.device, *, training: bool = False) -> Split:
        """Files that cannot be read are known before training: ImageNet's from a look, others by being decoded."""
        config, paths = self.config, [self.paths[i] for i in indices]
        if config.dataset == "imagenet":
            read = RandomCrop(config.image_size, config.flip) if training else CentreCrop(*config.eval_view)
            images, reasons = None, self._check(paths)
        else:
            read = FitSquare(config.image_size)
            images, reasons = self._decode(ImageFiles(paths, read))
        readable = torch.tensor([reason is None for reason in reasons])
        if not readable.all() and not config.skip_unreadable:
            raise UserError(
                f"{(~readable).sum()} of {len(paths)} images cannot be read, first {next(filter(None, reasons))}\n"
                "mend or remove them, or leave them out with --set skip_unreadable=true"
            )
        if not readable.any():
            raise UserError(f"{config.dataroot}: none of the {len(paths)} images can be read")
        if not readable.all() and not self.quiet:
            warn(f"left out {(~readable).sum()} of {len(paths)} images, first {next(filter(None, reasons))}")
        labels = self.labels[indices][readable]
        if images is not None:
            return ResidentSplit(images[readable].to(device), labels)
        paths = [path for path, reason in zip(paths, reasons, strict=True) if reason is None]
        files = ImageFiles(paths, read, config.seed, substitute=training)
        return StreamedSplit(files, labels, device, config.workers)

    def _check(self, paths: list[Path]) -> list[str | None]:
        """For each file why it cannot be read, as far as a quick look tells."""
        reasons: list[str | None] = []
        if not self.config.check_files:
            return [None] * len(paths)
        loader = DataLoader(
            FileCheck(paths),
            256,
            num_workers=self.config.workers,
            collate_fn=list,
            worker_init_fn=leave_signals_to_the_parent,
            generator=torch.Generator(),
        )
        with self._bar("checking", len(paths)) as bar:
            for reasons_of_batch in loader:
                reasons += reasons_of_batch
                bar.update(len(reasons_of_batch))
        return reasons

    def _decode(self, files: ImageFiles) -> tuple[Tensor | None, list[str | None]]:
        """All images, or None if they are too many to keep, and for each file why it cannot be read."""
        keep = len(files) * 3 * files.read.size**2 <= self.config.resident_gb * 1e9
        kept = torch.empty(len(files) if keep else 0, 3, files.read.size, files.read.size, dtype=torch.uint8)
        reasons: list[str | None] = []
        with self._bar("reading", len(files)) as bar:
            for images, _, reasons_of_batch in files.batches(
                torch.arange(len(files)).split(64), 0, self.config.workers
            ):
                if keep:
                    kept[len(reasons) : len(reasons) + len(images)] = images
                reasons += reasons_of_batch
                bar.update(len(images))
        return kept if keep else None, reasons

    def _bar(self, doing: str, images: int) -> tqdm:
        hidden = True if self.quiet else None  # None: where stderr is no terminal
        return tqdm(total=images, desc=f"{doing} {self.config.dataroot}", unit="image", disable=hidden, leave=False)


def _open(
    config: Config, split: str, downloads: Downloads, classes: tuple[str, ...] | None = None
) -> _ArraySource | _FolderSource:
    """The "train" or "test" split of the data set, labelled by position in `classes` where they are given."""
    if config.dataset in ("folder", "imagenet"):
        source = _open_folder(config, split, classes, downloads.quiet)
    elif config.dataset == "shapes":
        source = _ArraySource(*draw_shapes(split), SHAPE_CLASSES)
    else:
        source = _open_cifar(config, split, downloads)
    if classes is not None and classes != source.classes:
        raise UserError(
            f"{config.dataset}: its classes are not those expected: {_first_difference(source.classes, classes)}"
        )
    return source


def _open_cifar(config: Config, split: str, downloads: Downloads) -> _ArraySource:
    kind = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[config.dataset]
    root = Path(config.dataroot)
    try:
        dataset = kind(root, train=split == "train")  # checks the md5 of every file
    except RuntimeError:  # not there, or not whole
        unpack(downloads.fetch(Remote(kind.url, md5=kind.tgz_md5), root), root, quiet=downloads.quiet)
        dataset = kind(root, train=split == "train")
    images = torch.from_numpy(dataset.data).permute(0, 3, 1, 2).contiguous()
    return _ArraySource(images, torch.tensor(dataset.targets), tuple(dataset.classes))


def _open_folder(config: Config, split: str, classes: tuple[str, ...] | None, quiet: bool) -> _FolderSource:
    root = Path(config.dataroot)
    names = ("train",) if split == "train" else ("test", "val")
    folder = next((root / name for name in names if (root / name).is_dir()), None)
    if folder is None:
        raise Missing(f"{root}: holds no folder {' or '.join(names)}; images belong in {root / names[0]}/<class>/")
    found = class_folders(folder)
    if classes is None and len(found) < 2:
        raise UserError(f"{folder}: holds {len(found)} class folders; a classifier needs at least two")
    if unknown := set(found) - set(classes or found):
        raise UserError(f"{folder}: class {min(unknown)!r} is not among the {len(classes or ())} classes trained on")
    classes = classes or found
    paths, labels = list_images(folder, {name: classes.index(name) for name in found})
    return _FolderSource(paths, labels, classes, config, quiet)


def class_folders(folder: Path) -> tuple[str, ...]:
    """Names of the folders in `folder`, sorted; hidden ones are passed over."""
    return tuple(sorted(e.name for e in os.scandir(folder) if os.path.isdir(e) and not e.name.startswith(".")))


def list_images(folder: Path, label_of: Mapping[str, int]) -> tuple[list[Path], Tensor]:
    """The image files in the named class folders, sorted within each, and their labels. Raises UserError for none."""
    paths, labels = [], []
    for name, label in label_of.items():
        files = sorted(folder / name / entry.name for entry in image_files(folder / name))
        if not files:
            raise UserError(f"{folder / name}: holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
        paths += files
        labels += [label] * len(files)
    return paths, torch.tensor(labels)


def image_files(folder: Path) -> list[os.DirEntry]:
    """The image files in `folder`, known by their names, in no order."""
    entries = os.scandir(folder)
    with_suffix = (e for e in entries if os.path.splitext(e.name)[1].lower() in IMAGE_SUFFIXES)
    # e.is_file() asks the disk about links alone, and raises for one that leads to itself.
    return [e for e in with_suffix if (os.path.isfile(e) if e.is_symlink() else e.is_file())]


def _first_difference(found: Sequence[str], expected: Sequence[str]) -> str:
    if len(found) != len(expected):
        return f"{len(found)} instead of {len(expected)}"
    return next(f"{short_repr(a)} instead of {short_repr(b)}" for a, b in zip(found, expected, strict=True) if a != b)
