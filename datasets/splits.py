"""Splits of a data set, read in batches: on the device, mapped from a .npy file, or decoded by worker processes.

Each split has `labels` (int64, on the CPU), and `batches`: for each index tensor in turn (images uint8 (N, 3, H, W),
labels int64 (N,)) on the device; `epoch` is a key of the random draws made while an image is read. `fingerprint` is a
hash of the images, their labels and order; `resident` says whether every image is on the device.

Shape suffixes: N images of a batch; C channels, H rows, W columns.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from augmentations import upload
from datasets.imagefiles import ImageFiles
from utils import UserError, warn

PIECE = 256  # images that a worker reads and passes on through shared memory at a time; larger batches are joined


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
    """The images from number `first` on of a .npy file, uint8 (..., H, W, 3), read from the disk when needed.

    Leading axes, such as frames of a sequence, are flattened. A label of -1 means that there is none.
    """

    path: Path
    first: int
    labels: Tensor
    device: torch.device

    def batches(self, indices: Sequence[Tensor], epoch: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        mapped = np.lib.format.open_memmap(self.path, mode="r")
        images = mapped.reshape(-1, *mapped.shape[-3:])
        for index in indices:
            images_NHWC = torch.from_numpy(np.asarray(images[(index + self.first).numpy()]))  # copies only these
            yield upload(images_NHWC, self.device).permute(0, 3, 1, 2), upload(self.labels[index], self.device)


@dataclass
class StreamedSplit:
    """Images that worker processes decode each time they are needed."""

    files: ImageFiles
    labels: Tensor
    device: torch.device
    workers: int
    resident = False

    def batches(self, indices: Sequence[Tensor], epoch: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        pieces = [index.split(PIECE) for index in indices]
        loaded = self.files.batches(sum(pieces, ()), epoch, self.workers, pinned=self.device.type == "cuda")
        for pieces_of_batch in pieces:
            images, labels = zip(*(self._on_device(*next(loaded)) for _ in pieces_of_batch), strict=True)
            yield torch.cat(images), torch.cat(labels)

    def _on_device(self, images: Tensor, positions: Tensor, reasons: list[str | None]) -> tuple[Tensor, Tensor]:
        for position, reason in zip(positions.tolist(), reasons, strict=True):
            if reason and position < 0:
                raise UserError(f"an image cannot be read: {reason}")
            if reason:
                warn(f"an image cannot be read and is replaced by the next one: {reason}")
        images = images.to(self.device, non_blocking=True).contiguous()  # workers stack NHWC
        return images, upload(self.labels[positions], self.device)

    def fingerprint(self) -> str:
        files = [(path.parent.name, path.name, path.stat().st_size) for path in self.files.paths]
        return hashlib.sha256(repr(files).encode() + self.labels.numpy().tobytes()).hexdigest()


Split = ResidentSplit | StreamedSplit
Readable = Split | MappedSplit
