"""Benchmarks besides the test set: corrupted, perturbed and newly collected images, and how they are scored.

    python robustness.py                                   # which there are, where they belong, which are there
    python robustness.py --make --load_conf confs/folder.yaml --dataroot mydata    # corruptions of your own images
    python evaluate.py --checkpoint FILE --benchmarks all

CIFAR-10-C, CIFAR-100-C, ImageNet-C (mean corruption error) and CIFAR-10-P, CIFAR-100-P (flip probability): Hendrycks
and Dietterich, ICLR 2019, arXiv 1903.12261. CIFAR-10.1 and ImageNet-V2: Recht et al., ICML 2019, arXiv 1902.10811.

Nothing is taken on trust: dtype, shape and counts of every array are checked, and its hash, which is the published one
or, where none is published, the one noted at first use. `source` says what the numbers are of: the "official" images, a
"subset" of them, images "generated" here, one's "own", or those "embedded" in the program.
"""

if __name__ == "__main__":
    from training.signals import begin

    begin()  # before all that takes its time to import

import argparse
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor

from config import DEFAULT_CONF, Config, add_setting_arguments, load_config, overrides_from
from datasets.download import Downloads, Ledger, Missing, Remote
from datasets.imagefiles import CentreCrop, ImageFiles
from datasets.loading import class_folders, image_files, list_images, load_test
from datasets.splits import MappedSplit, Readable, Split, StreamedSplit
from evaluation.corruptions import CORRUPTIONS, EXTRA, SEVERITIES, STANDARD
from evaluation.generated import MANIFEST, generated_folder, make, read_manifest, side_of_test_images
from training.exit import exit_with_status
from utils import (
    CommandLine,
    Table,
    UserError,
    did_you_mean,
    first_line,
    printable,
    render,
    require_file,
    short_repr,
    warn,
)

# Perturbations of the flip probability: the ten of the reference evaluation, in its order.
SEQUENCES = (
    "gaussian_noise", "shot_noise", "motion_blur", "zoom_blur", "spatter",
    "brightness", "translate", "rotate", "tilt", "scale",
)  # fmt: skip

# How many images the official sets hold: of a file of CIFAR-C, of a cell of ImageNet-C, and so on.
CIFAR_C_IMAGES, CIFAR_P_SEQUENCES, IMAGENET_IMAGES, IMAGENET_V2_IMAGES = 50_000, 10_000, 50_000, 10_000
IMAGENET_CLASSES = 1000
CLASSES = {"cifar10": 10, "cifar100": 100}  # of a family; ImageNet's may be a subset
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


class Subset(NamedTuple):
    """Images that are scored together. `part`: corruption or sequence; frames: of each of its sequences."""

    part: str
    severity: int | None
    images: int
    open: Callable[[], Readable]
    frames: int = 1


class Benchmark(NamedTuple):
    """A benchmark that is there and has been checked. fingerprint: tells its images from any others."""

    name: str
    kind: str  # "test set", "corruptions" or "perturbations"
    source: str  # "official", "subset", "generated", "own" or "embedded"
    checked_by: str
    fingerprint: str
    cells: tuple[Subset, ...]
    classes: tuple[str, ...] | None = None  # where the images' own folders say
    note: str = ""


@dataclass(frozen=True)
class LookOnly(Downloads):
    """For a folder that nobody has named but a checkpoint, which may be somebody else's: data that are there are used.

    Nothing is fetched, or unpacked. Raises Missing for what would have to be.
    """

    def fetch(self, remote: Remote, folder: Path) -> Path:
        if ".tar" in remote.name:  # there or not: whoever asks for one, unpacks it
            self._refuse(folder, f"the content of {remote.name}")
        if not (folder / remote.name).exists():
            self._refuse(folder, remote.name)
        return super().fetch(remote, folder)

    def fetch_unpacked(self, archive: Remote, folder: Path, holds: Sequence[str]) -> list[Path]:
        for name in holds:
            if not (folder / name).is_dir():
                self._refuse(folder, f"{name} of {archive.name}")
        return [folder / name for name in holds]

    def _refuse(self, folder: Path, what: str) -> NoReturn:
        raise Missing(
            f"{folder}: lacks {what}, and nothing is put there, for only the checkpoint says that data lie there\n"
            "say where they lie, or may be put, with --dataroot DIR"
        )


class UnwrittenLedger(Ledger):
    """For such a folder: hashes are compared with those that are noted, and none is noted."""

    def _note(self, name: str, entry: dict[str, Any]) -> None:
        _say_that_nothing_is_noted(self.folder)


@cache
def _say_that_nothing_is_noted(folder: Path) -> None:
    warn(f"{folder}: no hashes are noted there, for only the checkpoint names it; if it is yours, say --dataroot DIR")


@dataclass(frozen=True)
class EvalRequest:
    """What opening a benchmark needs to know of the classifier and the machine. classes: None where nobody says."""

    config: Config
    classes: tuple[str, ...] | None
    num_classes: int
    device: torch.device
    downloads: Downloads

    @property
    def root(self) -> Path:
        return Path(self.config.dataroot)

    @property
    def ledger(self) -> Ledger:
        return (UnwrittenLedger if isinstance(self.downloads, LookOnly) else Ledger)(self.root)

    @cached_property
    def test_set(self) -> tuple[Split, tuple[str, ...]]:
        """The test split of the classifier's own data set, and its classes. Raises UserError for another number."""
        split, classes = load_test(self.config, self.device, self.classes, self.downloads)
        if len(classes) != self.num_classes:
            raise UserError(f"{self.config.dataset}: has {len(classes)} classes, and the classifier {self.num_classes}")
        return split, classes


class BenchmarkSpec(NamedTuple):
    """A benchmark by name. family: the data set whose classes it has; None: any. sign: what shows that it is there."""

    name: str
    family: str | None
    where: str  # below dataroot
    sign: str  # below that
    comes_from: str
    open: Callable[["BenchmarkSpec", EvalRequest], Benchmark]


def named(name: str) -> BenchmarkSpec:
    """Raises UserError for an unknown name."""
    for spec in BENCHMARKS:
        if spec.name == name:
            return spec
    names = [spec.name for spec in BENCHMARKS]
    raise UserError(f"--benchmarks: {name!r} is none of {', '.join(names)}, all{did_you_mean(name, names)}")


def fits(spec: BenchmarkSpec, request: EvalRequest) -> bool:
    """Whether the classifier is for the benchmark's classes: CIFAR-10's, from whatever files, are known by name."""
    if CLASSES.get(spec.family, request.num_classes) != request.num_classes:
        return False
    if spec.family in (None, request.config.dataset):
        return True
    return spec.family == "cifar10" and request.classes == CIFAR10_CLASSES and request.config.image_size == 32


def _open_clean(spec: BenchmarkSpec, request: EvalRequest) -> Benchmark:
    """The test set of the classifier's own data set."""
    split, classes = request.test_set
    images = len(split.labels)
    source, checked_by = {
        "shapes": ("embedded", "drawn by the program"),
        "folder": ("own", "decoding"),
        "imagenet": (_imagenet_source(images, IMAGENET_IMAGES, classes), "count"),
    }.get(request.config.dataset, ("official", "md5"))
    cell = Subset("", None, images, lambda: split)
    return Benchmark(spec.name, "test set", source, checked_by, split.fingerprint(), (cell,), classes)


def _open_corruption_arrays(
    spec: BenchmarkSpec, request: EvalRequest, *, archive: Remote, md5: Mapping[str, str]
) -> Benchmark:
    """CIFAR-10-C and CIFAR-100-C: a file per corruption, uint8 (5 n, 32, 32, 3), one severity after another."""
    (folder,) = request.downloads.fetch_unpacked(archive, request.root, (spec.where,))
    cells, files = _corruption_cells(
        folder, request, 32, "put a copy back, or remove the folder to have it fetched anew"
    )
    official = 5 * cells[0].images == CIFAR_C_IMAGES
    ledger = request.ledger
    hashes = [ledger.check(path, md5=md5[path.stem] if official else None) for path in files]
    source, checked_by = ("official", "md5") if official else ("subset", "SHA-256 at first use")
    return Benchmark(spec.name, "corruptions", source, checked_by, _digest(hashes), cells)


def _open_generated(spec: BenchmarkSpec, request: EvalRequest) -> Benchmark:
    """What `--make` has drawn of the classifier's own test images."""
    folder = generated_folder(request.config)
    how = f"draw them with: python robustness.py --make --dataroot {request.root} and the conf or settings of the run"
    if not (folder / MANIFEST).is_file():
        raise Missing(f"{folder}: there are no generated corruptions; {how}")
    made = read_manifest(folder)
    lacking = [row.name for row in CORRUPTIONS if f"{row.name}.npy" not in made["files"]]
    if lacking:
        raise Missing(f"{folder}: {lacking[0]} has not been drawn yet; {how}")
    split, classes = request.test_set
    if made["test_set"] != split.fingerprint():
        raise UserError(f"{folder}: was drawn of other test images than the present ones; remove it, and {how}")
    cells, files = _corruption_cells(folder, request, side_of_test_images(request.config), how)
    ledger = request.ledger
    for path in files:
        ledger.check(path, sha256=made["files"][path.name])
    note = "generated from this test set; frost is procedural; not comparable with published numbers"
    fingerprint = _digest(sorted(made["files"].values()))
    return Benchmark(spec.name, "corruptions", "generated", "SHA-256", fingerprint, cells, classes, note)


def _open_perturbation_arrays(spec: BenchmarkSpec, request: EvalRequest, *, drive: str) -> Benchmark:
    """CIFAR-10-P and CIFAR-100-P: a file per perturbation, uint8 (V, T, 32, 32, 3), T as the file says."""
    folder = request.root / spec.where
    missing = [f"{name}.npy" for name in SEQUENCES if not (folder / f"{name}.npy").is_file()]
    if missing:
        raise Missing(
            f"{folder}: lacks {', '.join(missing)}\n"
            f"{spec.name} lies in a shared drive, without hashes: fetch them by hand from {drive} into {folder}"
        )
    cells, hashes, counts = [], [], set()
    ledger = request.ledger
    for name in SEQUENCES:
        path = folder / f"{name}.npy"
        expected = "(sequences, frames, 32, 32, 3), frames at least 2"
        videos, frames, *_ = _array(path, expected, lambda shape: len(shape) == 5 and shape[1] > 1)
        hashes.append(ledger.check(path))
        counts.add(videos)
        no_labels = torch.full((videos * frames,), -1)
        split = partial(MappedSplit, path, 0, no_labels, request.device)
        cells.append(Subset(name, None, videos * frames, split, frames))
    if len(counts) > 1:
        found = ", ".join(map(str, sorted(counts)))
        raise UserError(f"{folder}: its files hold different numbers of sequences ({found})")
    source = "official" if counts == {CIFAR_P_SEQUENCES} else "subset"
    return Benchmark(spec.name, "perturbations", source, "shape, SHA-256 at first use", _digest(hashes), tuple(cells))


def _open_array_test_set(
    spec: BenchmarkSpec, request: EvalRequest, *, images: Remote, labels: Remote, count: int
) -> Benchmark:
    """CIFAR-10.1: uint8 (n, 32, 32, 3) and integer labels; no hashes are published."""
    folder = request.root / spec.where
    image_file, label_file = (request.downloads.fetch(remote, folder) for remote in (images, labels))
    shape = _array(image_file, f"({count}, 32, 32, 3)", lambda s: len(s) == 4 and s[0] == count)
    label_I = _labels(label_file, shape[0], request.num_classes)
    ledger = request.ledger
    hashes = [ledger.check(path) for path in (image_file, label_file)]
    cell = Subset("", None, count, partial(MappedSplit, image_file, 0, label_I, request.device))
    return Benchmark(spec.name, "test set", "official", "shape, SHA-256 at first use", _digest(hashes), (cell,))


def _open_imagenet_c(
    spec: BenchmarkSpec, request: EvalRequest, *, archives: Mapping[Remote, tuple[str, ...]]
) -> Benchmark:
    """ImageNet-C: <corruption>/<severity>/<class>/*.JPEG, stored at 224x224 and scored as they are.

    The archives have hashes; unpacked files are known by names and sizes. The extra four, 15 GB, are not fetched.
    """
    place = request.root / spec.where
    found: dict[str, Path] = {}
    for archive, holds in archives.items():
        found |= zip(holds, request.downloads.fetch_unpacked(archive, place, holds), strict=True)
    found |= {name: place / name for name in EXTRA if (place / name).is_dir()}
    classes = request.classes or class_folders(place / STANDARD[0] / str(SEVERITIES[0]))
    cells, listing = [], hashlib.sha256()
    for name, folder in found.items():
        for severity in SEVERITIES:
            tree = folder / str(severity)
            if not tree.is_dir():
                raise Missing(f"{tree}: is missing; remove {folder} to have it fetched anew")
            if class_folders(tree) != classes or len(classes) != request.num_classes:
                raise UserError(f"{tree}: its classes are not the {request.num_classes} of the classifier")
            files = [(c, file.name, file.stat().st_size) for c in classes for file in image_files(tree / c)]
            listing.update(repr((name, severity, sorted(files))).encode())
            split = partial(_streamed, tree, classes, CentreCrop(224, 224), request)
            cells.append(Subset(name, severity, len(files), split))
    fewest = min(cells, key=lambda cell: cell.images)
    most = max(cell.images for cell in cells)
    if fewest.images != most:
        raise UserError(f"{place / fewest.part / str(fewest.severity)}: holds {fewest.images} images, others {most}")
    source = _imagenet_source(most, IMAGENET_IMAGES, classes)
    return Benchmark(spec.name, "corruptions", source, "count", listing.hexdigest(), tuple(cells), classes)


def _open_imagenet_v2(spec: BenchmarkSpec, request: EvalRequest, *, archive: Remote) -> Benchmark:
    """ImageNet-V2: class folders "0".."999", which are numbers: 10 comes after 9, not after 1."""
    (folder,) = request.downloads.fetch_unpacked(archive, request.root, (spec.where,))
    names = tuple(map(str, range(request.num_classes)))
    if set(class_folders(folder)) != set(names):
        raise UserError(f"{folder}: its class folders are not 0..{request.num_classes - 1}")
    images = sum(len(image_files(folder / name)) for name in names)
    view = CentreCrop(*request.config.eval_view)
    cell = Subset("", None, images, partial(_streamed, folder, names, view, request))
    source = _imagenet_source(images, IMAGENET_V2_IMAGES, names)
    fingerprint = request.ledger.check(folder)
    return Benchmark(spec.name, "test set", source, "count, SHA-256 at first use", fingerprint, (cell,))


def _streamed(tree: Path, classes: Sequence[str], view: CentreCrop, request: EvalRequest) -> StreamedSplit:
    paths, labels = list_images(tree, {name: label for label, name in enumerate(classes)})
    return StreamedSplit(ImageFiles(paths, view), labels, request.device, request.config.workers)


def _imagenet_source(images: int, official: int, classes: Sequence[str]) -> str:
    return "official" if (images, len(classes)) == (official, IMAGENET_CLASSES) else "subset"


def _corruption_cells(
    folder: Path, request: EvalRequest, side: int, remedy: str
) -> tuple[tuple[Subset, ...], list[Path]]:
    """Cells of all corruptions in `folder`, the extra ones where they are there, and the files they are read from."""
    names = [*STANDARD, *(name for name in EXTRA if (folder / f"{name}.npy").is_file())]
    lacking = [f"{name}.npy" for name in (*STANDARD, "labels") if not (folder / f"{name}.npy").is_file()]
    if lacking:
        raise Missing(f"{folder}: lacks {', '.join(lacking)}; {remedy}")
    files = [folder / f"{name}.npy" for name in names]
    expected = f"(5 n, {side}, {side}, 3)"
    lengths = {path: _array(path, expected, lambda s: len(s) == 4 and s[0] % 5 == 0, side)[0] for path in files}
    length = lengths[files[0]]
    for path, other in lengths.items():
        if other != length:
            raise UserError(f"{path}: holds {other} images, {files[0].name} {length}")
    label_file = folder / "labels.npy"
    label_5I = _labels(label_file, length, request.num_classes).view(5, -1)
    if not (label_5I == label_5I[0]).all():
        raise UserError(f"{label_file}: the five severities have different labels; each fifth must repeat the first")
    images = length // 5
    cells = tuple(
        Subset(path.stem, s, images, partial(MappedSplit, path, (s - 1) * images, label_5I[0], request.device))
        for path in files
        for s in SEVERITIES
    )
    return cells, [*files, label_file]


def _array(path: Path, expected: str, is_shape: Callable[[tuple], bool], side: int = 32) -> tuple[int, ...]:
    """Shape of the uint8 images in a .npy file. Raises UserError that names the file."""
    array = _mapped(path)
    shape = array.shape
    if array.dtype != np.uint8 or not is_shape(shape) or shape[-3:] != (side, side, 3) or not array.size:
        raise UserError(f"{path}: holds {_kind(array)}; expected uint8 of shape {expected}")
    if not array.flags.c_contiguous:
        raise UserError(f"{path}: lies in column order; save it anew with numpy.ascontiguousarray")
    return shape


def _labels(path: Path, count: int, num_classes: int) -> Tensor:
    """The labels in a .npy file, int64. Raises UserError that names the file."""
    labels = _mapped(path)
    if labels.dtype.kind not in "iu" or labels.shape != (count,):
        raise UserError(f"{path}: holds {_kind(labels)}; expected {count} whole numbers")
    if not 0 <= labels.min() <= labels.max() < num_classes:
        raise UserError(f"{path}: holds labels {labels.min()}..{labels.max()}; there are {num_classes} classes")
    return torch.from_numpy(labels.astype(np.int64))


def _kind(array: np.ndarray) -> str:
    return f"{printable(str(array.dtype), 80)} of shape {short_repr(array.shape)}"


def _mapped(path: Path) -> np.ndarray:
    try:
        require_file(path)
        with path.open("rb") as file:
            version = np.lib.format.read_magic(file)
        if version != (1, 0):  # as numpy writes whatever is no record; later ones may have headers of GBs
            raise ValueError(f"has version {version} of the format; save it anew with numpy.save")
        with np.errstate(over="ignore"):  # of sizes that cannot be; they are refused all the same
            return np.lib.format.open_memmap(path, mode="r")
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file") from None
    except Exception as error:  # damage shows in many ways: ValueError, EOFError, SyntaxError, ...
        raise UserError(f"{path}: cannot be read as an array ({first_line(error)})") from None


def _digest(content: Any) -> str:
    return hashlib.sha256(repr(content).encode()).hexdigest()


def _zenodo(record: int, name: str, md5: str, size: int | None = None) -> Remote:
    return Remote(f"https://zenodo.org/records/{record}/files/{name}", size, md5)


def _hash_of_files(*md5: str) -> dict[str, str]:
    return dict(zip((*STANDARD, *EXTRA, "labels"), md5, strict=True))


CIFAR10_C = partial(
    _open_corruption_arrays,
    archive=_zenodo(2535967, "CIFAR-10-C.tar", "56bf5dcef84df0e2308c6dcbcbbd8499", 2_918_471_680),
    md5=_hash_of_files(
        "ecaf8b9a2399ffeda7680934c33405fd", "3a7239bb118894f013d9bf1984be7f11", "2090e01c83519ec51427e65116af6b1a",
        "7d1322666342a0702b1957e92f6254bc", "7361fb4019269e02dbf6925f083e8629", "fffa5f852ff7ad299cfe8a7643f090f4",
        "6ea8e63f1c5cdee1517533840641641b", "bb238de8555123da9c282dea23bd6e55", "31f6ab3bce1d9934abfb0cc13656f141",
        "7b397314b5670f825465fbcd1f6e9ccd", "0a81ef75e0b523c3383219c330a85d48", "3c8262171c51307f916c30a3308235a8",
        "9421657c6cd452429cf6ce96cc412b5f", "0f14f7e2db14288304e1de10df16832f", "2b9cc4c864e0193bb64db8d7728f8187",
        "ef00b87611792b00df09c0b0237a1e30", "c33370155bc9b055fb4a89113d3c559d", "8a5a3903a7f8f65b59501a6093b4311e",
        "1cfae0964219c5102abbb883e538cc56", "c439b113295ed5254878798ffe28fd54",
    ),
)  # fmt: skip
CIFAR100_C = partial(
    _open_corruption_arrays,
    archive=_zenodo(3555552, "CIFAR-100-C.tar", "11f0ed0f1191edbf9fa23466ae6021d3", 2_918_473_216),
    md5=_hash_of_files(
        "ecc4d366eac432bdf25c024086f5e97d", "b0a1fa6e1e465a747c1b204b1914048a", "3b3c210ddfa0b5cb918ff4537a429fef",
        "d923e3d9c585a27f0956e2f2ad832564", "0bf384f38e5ccbf8dd479d9059b913e1", "732a7e2e54152ff97c742d4c388c5516",
        "0204613400c034a81c4830d5df81cb82", "0237be164583af146b7b144e73b43465", "3a39c6823bdfaa0bf8b12fe7004b8117",
        "4efc7ebd5e82b028bdbe13048e3ea564", "f22d7195aecd6abb541e27fca230c171", "322bb385f1d05154ee197ca16535f71e",
        "a0792bd6581f6810878be71acedfc65a", "96c00c60f144539e14cffb02ddbd0640", "c851b7f1324e1d2ffddeb76920576d11",
        "e3f215b1a0f9fd9fd6f0d1cf94a7ce99", "5204ba0d557839772ef5a4196a052c3e", "12ccf41d62564d36e1f6a6ada5022728",
        "c0697e9fdd646916a61e9c312c77bf6b", "bb4026e9ce52996b95f439544568cdb2",
    ),
)  # fmt: skip
IMAGENET_C = partial(
    _open_imagenet_c,
    archives={
        _zenodo(2235448, "noise.tar", "e80562d7f6c3f8834afb1ecf27252745"): STANDARD[0:3],
        _zenodo(2235448, "blur.tar", "2d8e81fdd8e07fef67b9334fa635e45c"): STANDARD[3:7],
        _zenodo(2235448, "weather.tar", "33ffea4db4d93fe4a428c40a6ce0c25d"): STANDARD[7:11],
        _zenodo(2235448, "digital.tar", "89157860d7b10d5797849337ca2e5c03"): STANDARD[11:15],
    },
)


def _cifar10_1(version: str, count: int, bytes_of_labels: int) -> BenchmarkSpec:
    address = "https://raw.githubusercontent.com/modestyachts/CIFAR-10.1/master/datasets/cifar10.1"
    images = Remote(f"{address}_{version}_data.npy")
    labels = Remote(f"{address}_{version}_labels.npy", bytes_of_labels)
    opened = partial(_open_array_test_set, images=images, labels=labels, count=count)
    return BenchmarkSpec(f"cifar10.1-{version}", "cifar10", "CIFAR-10.1", images.name, images.url, opened)


def _imagenet_v2(variant: str) -> BenchmarkSpec:
    archive = Remote(f"https://huggingface.co/datasets/vaishaal/ImageNetV2/resolve/main/imagenetv2-{variant}.tar.gz")
    where = f"imagenetv2-{variant}-format-val"
    opened = partial(_open_imagenet_v2, archive=archive)
    return BenchmarkSpec(f"imagenet-v2-{variant}", "imagenet", where, "0", archive.url, opened)


def _cifar_p(classes: int, drive: str) -> BenchmarkSpec:
    address = f"https://drive.google.com/drive/folders/{drive}"
    opened = partial(_open_perturbation_arrays, drive=address)
    where, sign = f"CIFAR-{classes}-P", f"{SEQUENCES[0]}.npy"
    return BenchmarkSpec(f"cifar{classes}-p", f"cifar{classes}", where, sign, f"by hand: {address}", opened)


BENCHMARKS = (
    BenchmarkSpec("clean", None, "", "", "the data set's own test split", _open_clean),
    BenchmarkSpec("cifar10-c", "cifar10", "CIFAR-10-C", "labels.npy", CIFAR10_C.keywords["archive"].url, CIFAR10_C),
    _cifar_p(10, "1dY1_zeRyjMKdfmMbQ_uK8O1i0MVI9UbZ"),
    _cifar10_1("v4", 2021, 8212),
    _cifar10_1("v6", 2000, 8128),
    BenchmarkSpec(
        "cifar100-c", "cifar100", "CIFAR-100-C", "labels.npy", CIFAR100_C.keywords["archive"].url, CIFAR100_C
    ),
    _cifar_p(100, "1Tpssw4Vn6X_4hmIW8KK5LzkKCZpAaae8"),
    BenchmarkSpec(
        "imagenet-c", "imagenet", "ImageNet-C", STANDARD[-1], "https://zenodo.org/records/2235448", IMAGENET_C
    ),
    _imagenet_v2("matched-frequency"),
    _imagenet_v2("threshold0.7"),
    _imagenet_v2("top-images"),
    BenchmarkSpec(
        "generated-c", None, "generated-c-<dataset>", MANIFEST, "python robustness.py --make", _open_generated
    ),
)


def main() -> None:
    args = parse_arguments()
    config = load_config(args.load_conf or DEFAULT_CONF, overrides_from(args))
    if args.make:
        folder = make(config, Downloads(args.data_url, not args.no_download))
        print(f"{folder}: {len(CORRUPTIONS)} corruptions at five severities, generated, not official")
        print("score a classifier of these classes: python evaluate.py --checkpoint FILE --benchmarks generated-c")
        return
    rows = []
    for spec in BENCHMARKS[1:]:
        where = generated_folder(config) if spec.name == "generated-c" else Path(config.dataroot) / spec.where
        there = "yes" if (where / spec.sign).exists() else "no"
        rows.append((spec.name, spec.family or "any", there, str(where), spec.comes_from))
    header = ("benchmark", "classes of", "there", "lies in", "comes from")
    print(render(Table(f"Benchmarks, and what of them is in {config.dataroot}", header, rows)))


def parse_arguments() -> argparse.Namespace:
    parser = CommandLine(prog="robustness.py", description=__doc__)
    add_setting_arguments(parser)
    parser.add_argument(
        "--make", action="store_true", help="draw the corruptions of the conf's test images, below its dataroot"
    )
    return parser.parse_args()


if __name__ == "__main__":
    exit_with_status(main)
