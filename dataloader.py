"""Data sets and what every image goes through besides the policy: crop and flip before it, normalise and Cutout after.

Small sets stay on the device as uint8; a batch is an index. ImageNet's images are cropped as worker processes decode
them. The order of the images and all draws are keyed by (seed, purpose, epoch or step) for the whole batch: a resumed
run sees what an uninterrupted one would have seen, and several processes see what one would.

Shape suffixes: N distinct images of a batch, M copies of each; B = N * M, image-major (copy m of image n stands at
n * M + m); C channels, H rows, W columns.
"""

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
import torchvision
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from augmentations import gather_rows, piece_size, upload
from config import Config
from datasets.download import Downloads, Missing, Remote, unpack
from datasets.imagefiles import IMAGE_SUFFIXES, CentreCrop, FileCheck, FitSquare, ImageFiles, RandomCrop
from datasets.shapes import CLASSES as SHAPE_CLASSES
from datasets.shapes import draw_shapes
from training.signals import leave_signals_to_the_parent
from utils import UserError, keyed_generator, shown, warn

# Mean and standard deviation of red, green and blue. CIFAR's are those that the paper's line of work uses.
CIFAR_STATISTICS = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
IMAGENET_STATISTICS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

PUBLIC = Downloads()  # from the public addresses, where something is missing
PIECE = 256  # images that a worker reads at a time and hands over through shared memory: large batches are put together


class Readable(Protocol):
    """Images and labels, ready to be read in batches."""

    labels: Tensor  # int64, on the CPU

    def batches(self, indices: Sequence[Tensor], epoch: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """(images uint8 (N, 3, H, W), labels int64 (N,)) on the device, for each index tensor in turn.

        epoch: key of whatever is drawn while an image is read.
        """
        ...


class Split(Readable, Protocol):
    """Part of a data set."""

    resident: bool  # every image is at hand at no cost

    def fingerprint(self) -> str:
        """A hash that tells this split from one with other images, labels or order."""
        ...


@dataclass
class ResidentSplit:
    """Images that live on the device."""

    images: Tensor
    labels: Tensor
    resident = True

    def batches(self, indices: Sequence[Tensor], epoch: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        labels_on_device = upload(self.labels, self.images.device)
        for index in indices:
            index = upload(index, self.images.device)
            yield self.images.index_select(0, index), labels_on_device.index_select(0, index)

    def fingerprint(self) -> str:
        return hashlib.sha256(self.images.cpu().numpy().tobytes() + self.labels.numpy().tobytes()).hexdigest()


@dataclass
class MappedSplit:
    """Images first..last of a .npy file, uint8 (..., H, W, 3), read from the disk when they are wanted.

    Leading axes, such as frames of a sequence, are counted through. A label of -1 says that there is none.
    """

    path: Path
    first: int
    labels: Tensor
    device: torch.device

    def batches(self, indices: Sequence[Tensor], epoch: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        mapped = np.lib.format.open_memmap(self.path, mode="r")
        images = mapped.reshape(-1, *mapped.shape[-3:])
        for index in indices:
            images_NHWC = torch.from_numpy(np.asarray(images[(index + self.first).numpy()]))  # copies these alone
            yield upload(images_NHWC, self.device).permute(0, 3, 1, 2), upload(self.labels[index], self.device)


@dataclass
class StreamedSplit:
    """Images that are decoded anew by worker processes whenever they are wanted."""

    files: "ImageFiles"
    labels: Tensor
    device: torch.device
    workers: int
    resident = False

    def batches(self, indices: Sequence[Tensor], epoch: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        pieces = [index.split(PIECE) for index in indices]
        reading = self.files.batches(sum(pieces, ()), epoch, self.workers, pinned=self.device.type == "cuda")
        for pieces_of_batch in pieces:
            images, labels = zip(*(self._on_device(*next(reading)) for _ in pieces_of_batch), strict=True)
            yield torch.cat(images), torch.cat(labels)

    def _on_device(self, images: Tensor, positions: Tensor, reasons: list[str | None]) -> tuple[Tensor, Tensor]:
        for position, reason in zip(positions.tolist(), reasons, strict=True):
            if reason and position < 0:
                raise UserError(f"an image cannot be read: {reason}")
            if reason:
                warn(f"an image cannot be read, the next one takes its place: {reason}")
        images = images.to(self.device, non_blocking=True).contiguous()  # workers hand over NHWC
        return images, upload(self.labels[positions], self.device)

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


class Crops(NamedTuple):
    """For each of B copies, where it lies in the zero-padded image (x and y in pixels), and whether it is mirrored."""

    shift_B2: Tensor
    flipped_B1: Tensor


def draw_crops(N: int, config: Config, generator: torch.Generator) -> Crops | None:
    """Crops of the M copies of N images, each copy's own or its image's; None where there is nothing to do."""
    if config.cropped_when_read or not (config.crop_padding or config.flip):
        return None
    M = config.M if config.crop_per_copy else 1
    shift_B2 = torch.randint(-config.crop_padding, config.crop_padding + 1, (N * M, 2), generator=generator)
    flipped_B1 = torch.randint(2, (N * M, 1), generator=generator).bool() & config.flip
    return Crops(*(drawn.repeat_interleave(config.M // M, 0) for drawn in (shift_B2, flipped_B1)))


def make_copies(images_NCHW: Tensor, copies_B: Tensor, M: int, crops: Crops | None, first: int = 0) -> Tensor:
    """The copies of the given numbers (copy m of image n is n * M + m), cropped and flipped.

    first: number of the image that images_NCHW begins with. crops: of all copies of the batch.
    """
    image_B = copies_B // M - first
    if crops is None:
        return images_NCHW.index_select(0, upload(image_B, images_NCHW.device))
    return crop_and_flip(images_NCHW, image_B, Crops(*(drawn[copies_B] for drawn in crops)))


def crop_and_flip(images_NCHW: Tensor, image_B: Tensor, crops: Crops) -> Tensor:
    """Of each image_B[b] a crop of the same size after zero padding, then a horizontal flip where that was drawn."""
    x_B1, y_B1 = crops.shift_B2.split(1, dim=1)
    y_BH = torch.arange(images_NCHW.shape[2]) + y_B1
    # The mirror image of a crop is a crop of the mirror image, from as far on the other side.
    return gather_rows(images_NCHW, image_B, y_BH, torch.where(crops.flipped_B1, -x_B1, x_B1), crops.flipped_B1[:, 0])


class Normalise:
    """Images of 0..255 to the network's float32: value / 255, minus the mean, over the standard deviation, by channel.

    Where a pixel is blanked, a negative value leaves -0.0, which is 0 to all that follows.
    """

    def __init__(self, config: Config, device: torch.device):
        usual = CIFAR_STATISTICS if config.dataset.startswith("cifar") else IMAGENET_STATISTICS
        self.mean_C11 = torch.tensor(config.mean or usual[0], device=device)[:, None, None]
        self.std_C11 = torch.tensor(config.std or usual[1], device=device)[:, None, None]

    def __call__(self, images_BCHW: Tensor, kept_B1HW: Tensor | None = None) -> Tensor:
        """(B, C, H, W) in the channels_last memory format. kept_B1HW: 0 blanks a pixel, see `cutout_mask`."""
        inputs_BCHW = torch.empty_like(images_BCHW, dtype=torch.float32, memory_format=torch.channels_last)
        size = piece_size(images_BCHW)
        for start in range(0, len(images_BCHW), size):
            part = slice(start, start + size)
            values = images_BCHW[part].to(torch.float32, copy=True).div_(255).sub_(self.mean_C11).div_(self.std_C11)
            inputs_BCHW[part] = values if kept_B1HW is None else values.mul_(kept_B1HW[part])
        return inputs_BCHW


def draw_centres(B: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    """A random pixel (x, y) of each of B images, int64 (B, 2)."""
    x_B1 = torch.randint(width, (B, 1), generator=generator)
    y_B1 = torch.randint(height, (B, 1), generator=generator)
    return torch.cat((x_B1, y_B1), dim=1)


def cutout_mask(side: int, centre_B2: Tensor, height: int, width: int, device: torch.device) -> Tensor | None:
    """Cutout (DeVries and Taylor, 2017): float32 (B, 1, H, W), 0 in a square around the given pixel, 1 elsewhere.

    The square may reach over the border. side: in pixels; 0 blanks nothing: None.
    """
    if side == 0:
        return None
    x_B1, y_B1 = centre_B2.split(1, dim=1)
    column_BW = (torch.arange(width) < x_B1 - side // 2) | (torch.arange(width) >= x_B1 + (side + 1) // 2)
    row_BH = (torch.arange(height) < y_B1 - side // 2) | (torch.arange(height) >= y_B1 + (side + 1) // 2)
    column_BW, row_BH = (upload(outside, device).float() for outside in (column_BW, row_BH))
    return torch.maximum(row_BH[:, :, None], column_BW[:, None, :])[:, None]


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
    return next(f"{shown(a)} instead of {shown(b)}" for a, b in zip(found, expected, strict=True) if a != b)
