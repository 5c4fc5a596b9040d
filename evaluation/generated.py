"""Corruptions of your own test images, in the layout of CIFAR-10-C: drawn once, recorded with their hashes, read back.

The folder's generated.json records what was drawn from which images, and marks the set as generated, not official.
"""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from config import Config
from datasets.download import Downloads
from datasets.loading import balanced_order, load_test
from datasets.splits import ResidentSplit, Split
from evaluation.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from evaluation.predict import ImageProgress
from utils import (
    UserError,
    environment,
    first_line,
    has_shape,
    keyed_generator,
    sha256_of,
    write_atomically,
    write_text,
)

MANIFEST = "generated.json"
CHUNK = 250  # images that are drawn together: part of the key of their draws


def generated_folder(config: Config) -> Path:
    return Path(config.dataroot) / f"generated-c-{config.dataset}"


def image_side(config: Config, split: Split) -> int:
    """Of the test images, in pixels, as the classifier sees them."""
    if isinstance(split, ResidentSplit):
        return split.images.shape[-1]
    return config.eval_view[-1] if config.dataset == "imagenet" else config.image_size


@torch.inference_mode()
def draw_corruptions(
    config: Config, downloads: Downloads, classes: tuple[str, ...] | None = None, most: int | None = None
) -> Path:
    """Draw every corruption of the test images at five severities, in the layout of CIFAR-10-C; returns the folder.

    classes: of the classifier, where they are known. most: only that many images, balanced over the classes.
    A file is written completely or not at all, so that an interrupted call continues with the next file. Draws are
    keyed by seed, corruption, severity and chunk of images. Raises UserError where the folder holds another set, there
    are fewer images than `most`, or the disk is full.
    """
    folder = generated_folder(config)
    split, classes = load_test(config, torch.device("cpu"), classes, downloads)
    chosen = torch.arange(len(split.labels))
    if most is not None and most > len(chosen):
        raise UserError(f"--images {most}: there are only {len(chosen)} test images in {config.dataset}")
    if most is not None:
        chosen = balanced_order(split.labels)[:most].sort().values
    images, side = len(chosen), image_side(config, split)
    manifest = {
        "generated": "corruptions drawn by evaluate.py --make-corruptions, not the official images; "
        "frost is procedural",
        "test_set": split.fingerprint(),
        "dataset": config.dataset,
        "classes": list(classes),
        "images": images,
        "side": side,
        "seed": config.seed,
        "severities": {row.name: np.array(row.severities).tolist() for row in CORRUPTIONS},
    }
    files, drawn_with = _existing_files(folder, manifest), environment(torch.device("cpu"))
    rows = [row for row in CORRUPTIONS if f"{row.name}.npy" not in files]
    needed, free = len(rows) * 5 * images * side**2 * 3, shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(f"{folder}: needs {needed / 1e9:.1f} GB and {free / 1e9:.1f} are free; make room on that disk")

    def record(path: Path) -> None:
        files[path.name] = sha256_of(path)
        text = json.dumps(manifest | {"environment": drawn_with, "files": files}, indent=2)
        write_text(folder / MANIFEST, text + "\n")

    def draw(name: str, path: Path) -> None:
        header = {"descr": "|u1", "fortran_order": False, "shape": (5 * images, side, side, 3)}
        with path.open("wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            for severity in SEVERITIES:
                progress.begin(f"{name} {severity}")
                for number, (images_NCHW, _) in enumerate(split.batches(chosen.split(CHUNK))):
                    generator = keyed_generator(config.seed, "corruption", name, severity, number)
                    drawn_NCHW = corrupt(images_NCHW, name, severity, generator)
                    file.write(drawn_NCHW.permute(0, 2, 3, 1).contiguous().numpy().tobytes())
                    progress.update(len(drawn_NCHW))

    def save_labels(path: Path) -> None:
        with path.open("wb") as file:
            np.save(file, np.tile(split.labels[chosen].numpy(), 5))

    record(write_atomically(folder / "labels.npy", save_labels))
    progress = ImageProgress(len(rows) * 5 * images, shown=not downloads.quiet)
    try:
        for row in rows:
            record(write_atomically(folder / f"{row.name}.npy", partial(draw, row.name)))
    except KeyboardInterrupt as stop:
        raise type(stop)("complete files are kept; the same command continues with the rest") from None
    finally:
        progress.close()
    return folder


def _existing_files(folder: Path, manifest: dict[str, Any]) -> dict[str, str]:
    """Files of the same set that `folder` holds already, with their hashes. Raises UserError for another set."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be created ({error}); choose another place with --dataroot") from None
    if not (folder / MANIFEST).exists():
        if any(folder.glob("*.npy")):
            raise UserError(f"{folder}: holds arrays that were not drawn by this program; move them away")
        return {}
    before = read_manifest(folder)
    if other := [key for key, value in manifest.items() if key != "generated" and before.get(key) != value]:
        raise UserError(
            f"{folder}: holds a set that differs in {', '.join(other)} from the requested one; move it elsewhere"
        )
    present = {name: sha256 for name, sha256 in before["files"].items() if (folder / name).is_file()}
    return {name: sha256 for name, sha256 in present.items() if sha256_of(folder / name) == sha256}


def read_manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if not has_shape(manifest, {"test_set": str, "classes": [str], "side": int, "files": dict}):
            raise ValueError("entries are missing or of the wrong type")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{folder / MANIFEST}: cannot be read ({first_line(error)})\n"
            f"restore it, or move {folder} elsewhere and draw another set"
        ) from None
    return manifest
