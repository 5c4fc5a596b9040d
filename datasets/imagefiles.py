"""Image files: checked for damage, decoded by worker processes, cropped as they are read.

torchvision takes seconds to import, so that it is imported where it is used.
"""

import contextlib
import os
import signal
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from utils import first_line, keyed_seed, printable, require_file

# torchvision's, and two more
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".jfif", ".gif")
# The formats of these suffixes, whichever a file has. Pillow passes some others to programs that run code.
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")
# Ways in which Pillow turns pixels upright, by the value of the EXIF tag for the orientation.
ORIENTATION, UPRIGHT = (
    0x0112,
    {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    },
)


@dataclass
class ImageFiles(Dataset):
    """Image files, read by (epoch, position): the image, its position, and why it could not be read, or None.

    read: from a path and a seed for its random draws to uint8 (3, size, size). substitute: an unreadable file is
    replaced by the next one, with that one's position. Without a replacement the image is black, at position -1.
    """

    paths: Sequence[Path]
    read: "FileCheck | RandomCrop | CentreCrop | FitSquare"
    seed: int = 0
    substitute: bool = False

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int, str | None]:
        epoch, requested = key
        draws, reason = keyed_seed(self.seed, "crop", epoch, requested), None
        for position in (requested, (requested + 1) % len(self)) if self.substitute else (requested,):
            try:
                return self.read(self.paths[position], draws), position, reason
            except Exception as error:  # damage raises many types: OSError, SyntaxError, struct.error, ...
                reason = reason or f"{printable(str(self.paths[position]), 1000)} ({first_line(error)})"
        return torch.zeros(3, self.read.size, self.read.size, dtype=torch.uint8), -1, reason

    def batches(
        self, indices: Sequence[Tensor], epoch: int, workers: int, *, pinned: bool = False
    ) -> Iterator[tuple[Tensor, Tensor, list[str | None]]]:
        """(images (N, 3, size, size), positions (N,), reasons) for each index tensor in turn; pinned for a GPU."""
        yield from DataLoader(
            self,
            batch_sampler=[[(epoch, position) for position in index.tolist()] for index in indices],
            num_workers=workers,
            collate_fn=_collate,
            pin_memory=pinned,
            worker_init_fn=_leave_signals_to_parent,
            generator=torch.Generator(),  # otherwise the loader draws from the default generator
        )


@dataclass(frozen=True)
class FileCheck:
    """A quick check of a file's header and last bytes; the file is decoded only where these do not tell. No image."""

    size = 0

    def __call__(self, path: Path, seed: int) -> Tensor:
        with open_image(path) as image:
            mark = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}.get(image.format)
            if mark:
                image.fp.seek(-min(64, path.stat().st_size), os.SEEK_END)
            is_usual = image.mode in ("RGB", "RGBA", "L", "P", "CMYK")  # others may have no range that is known
            if mark is None or mark not in image.fp.read() or not is_usual:
                read_rgb(path)
        return torch.empty(3, 0, 0, dtype=torch.uint8)


@dataclass(frozen=True)
class RandomCrop:
    """The usual crop for training on ImageNet: 8 to 100 % of the area, 3:4 to 4:3, scaled (bicubic); flipped or not."""

    size: int
    flip: bool

    def __call__(self, path: Path, seed: int) -> Tensor:
        from torchvision.transforms import InterpolationMode, RandomResizedCrop
        from torchvision.transforms import functional as F

        image, crop = read_rgb(path), RandomResizedCrop(self.size, interpolation=InterpolationMode.BICUBIC)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            image = crop(image)
            flipped = self.flip and torch.rand(()) < 0.5
        return F.pil_to_tensor(F.hflip(image) if flipped else image)


@dataclass(frozen=True)
class CentreCrop:
    """The usual view for evaluation on ImageNet: the shorter side scaled to `resize` (bicubic), cut at the centre."""

    resize: int
    size: int

    def __call__(self, path: Path, seed: int) -> Tensor:
        from torchvision.transforms import InterpolationMode
        from torchvision.transforms import functional as F

        image = F.resize(read_rgb(path), self.resize, InterpolationMode.BICUBIC)
        return F.pil_to_tensor(F.center_crop(image, self.size))


@dataclass(frozen=True)
class FitSquare:
    """Scaled (bicubic) until it covers the square, cut at the centre; for training and evaluation alike."""

    size: int

    def __call__(self, path: Path, seed: int) -> Tensor:
        image = read_rgb(path)
        if image.size != (self.size, self.size):
            image = ImageOps.fit(image, (self.size, self.size), Image.Resampling.BICUBIC)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


@contextlib.contextmanager
def open_image(path: Path) -> Iterator[Image.Image]:
    """An image file, not decoded yet.

    Raises OSError for what is not a file, DecompressionBombWarning above 89 million pixels, ValueError for a very
    narrow image, and what Pillow raises.
    """
    require_file(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about damaged metadata, which are not used
        # Pillow only prints this warning; such an image takes a worker at least a quarter of a GB.
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(path, formats=FORMATS) as image:
            if max(image.size) > 1000 * min(image.size):  # scaled to a shorter side of 256, 1 by 100,000 takes 26 GB
                raise ValueError(f"is too narrow: {image.width} by {image.height} pixels")
            yield image


def read_rgb(path: Path) -> Image.Image:
    """Decode the (first) image of a file to RGB, upright, transparency on white, whatever the file's own colours are.

    16 bits are scaled to 8. Raises ValueError for values whose range is not known, and what `open_image` raises.
    """
    with open_image(path) as image:
        image.load()
        rgb = image if image.mode == "RGB" and not image.has_transparency_data else _to_rgb(image)
        with contextlib.suppress(Exception):  # damaged metadata raise many types; the pixels are good
            if (way := UPRIGHT.get(image.getexif().get(ORIENTATION))) is not None:
                rgb = rgb.transpose(way)
        return rgb


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
        kind = "floating-point" if image.mode == "F" else "32-bit"
        raise ValueError(f"{kind} values without a known range; save it with 8 or 16 bits")
    if image.mode.startswith("I"):  # 16 bits, which convert() would cut off at 255
        values = np.asarray(image).astype(np.int64)
        values[values == image.info.get("transparency", -1)] = 65535  # a shade that stands for transparent
        return Image.fromarray((values / 257).round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _collate(results: list[tuple[Tensor, int, str | None]]) -> tuple[Tensor, Tensor, list[str | None]]:
    images, positions, reasons = zip(*results, strict=True)
    # Stacking in Pillow's memory order (NHWC) is ten times as fast.
    images_NHWC = torch.stack([image.permute(1, 2, 0) for image in images])
    return images_NHWC.permute(0, 3, 1, 2), torch.tensor(positions), list(reasons)


def _leave_signals_to_parent(_: int = 0) -> None:
    """In a worker process: ignore SIGINT, SIGUSR1, and SIGTERM once, so that the main process can finish and save.

    All reach the whole process group. A second SIGTERM, which the main process sends to a stuck worker, ends it.
    """
    for name in ("SIGINT", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
