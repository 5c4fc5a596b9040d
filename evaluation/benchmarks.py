"""Benchmarks besides the test set: corrupted, perturbed and newly collected images, and how they are opened.

CIFAR-10-C, CIFAR-100-C, ImageNet-C (mean corruption error) and CIFAR-10-P, CIFAR-100-P (flip probability): Hendrycks
and Dietterich, ICLR 2019, arXiv 1903.12261. CIFAR-10.1 and ImageNet-V2: Recht et al., ICML 2019, arXiv 1902.10811.

At every opening the dtype, shape and number of all images are checked, and their hash where one is published. `source`
says which images the numbers are for: the "official" ones, a "subset" of them, images "generated" by this project, the
user's "own", or those "embedded" in the program.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from config import Config
from datasets.download import Downloads, Missing, Remote
from datasets.folders import Listing, class_folders, find_folder, find_split, imagenet_classes, list_images
from datasets.imagefiles import CentreCrop, ImageFiles
from datasets.loading import load_test, source_of_test_images
from datasets.splits import MappedSplit, Readable, Split, StreamedSplit
from evaluation.corruptions import CORRUPTIONS, EXTRA, SEVERITIES, STANDARD
from evaluation.generated import MANIFEST, generated_folder, image_side, read_manifest
from utils import UserError, did_you_mean, first_line, printable, require_file, sha256_of, short_repr, warn

# Perturbations of the flip probability: the ten of the reference evaluation, in its order.
SEQUENCES = (
    "gaussian_noise", "shot_noise", "motion_blur", "zoom_blur", "spatter",
    "brightness", "translate", "rotate", "tilt", "scale",
)  # fmt: skip

# Images of the official sets: in a file of CIFAR-C, in a subset of ImageNet-C, and so on.
CIFAR_C_IMAGES, CIFAR_P_SEQUENCES, IMAGENET_IMAGES, IMAGENET_V2_IMAGES = 50_000, 10_000, 50_000, 10_000
IMAGENET_CLASSES = 1000
CLASSES = {"cifar10": 10, "cifar100": 100}  # of a family; ImageNet's may be a subset
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


class Subset(NamedTuple):
    """Images that are scored together. part: corruption or kind of sequence; frames: of each sequence."""

    part: str
    severity: int | None
    images: int
    open: Callable[[], Readable]
    frames: int = 1


class Benchmark(NamedTuple):
    """A benchmark whose files are there and have been checked. fingerprint: a hash that identifies its images."""

    name: str
    kind: str  # "test set", "corruptions" or "perturbations"
    source: str  # "official", "subset", "generated", "own" or "embedded"
    checked_by: str
    fingerprint: str
    subsets: tuple[Subset, ...]
    classes: tuple[str, ...] | None = None  # where the images' folders name them
    note: str = ""


@dataclass(frozen=True)
class EvalRequest:
    """What opening a benchmark depends on besides its files. classes: None for weights that do not name them."""

    config: Config
    classes: tuple[str, ...] | None
    num_classes: int
    device: torch.device
    downloads: Downloads

    @property
    def root(self) -> Path:
        return Path(self.config.dataroot)

    @cached_property
    def test_set(self) -> tuple[Split, tuple[str, ...]]:
        """The test split of the classifier's data set, and its classes. Raises UserError for a wrong number of them."""
        classes = self.classes
        in_folders = self.config.dataset in ("imagenet", "folder")
        if classes is None and self.num_classes == IMAGENET_CLASSES and in_folders:
            classes = imagenet_classes(find_split(self.root, "test")[0])  # all, where the folders are some of them
        split, classes = load_test(self.config, self.device, classes, self.downloads)
        if len(classes) != self.num_classes:
            is_imagenets = self.num_classes == IMAGENET_CLASSES
            remedy = "; name the class folders as ImageNet does, n01440764, ..." if is_imagenets else ""
            raise UserError(
                f"{self.config.dataset}: has {len(classes)} classes, and the classifier {self.num_classes}{remedy}"
            )
        return split, classes


class BenchmarkSpec(NamedTuple):
    """A benchmark by name. family: the data set whose classes it has; None: any."""

    name: str
    family: str | None
    folder: str  # below dataroot
    marker: str  # a file or folder in it that shows that the benchmark is there
    origin: str
    open: Callable[["BenchmarkSpec", EvalRequest], Benchmark]

    def found_in(self, root: Path) -> Path | None:
        """Its folder where it is there already, also in another spelling, one folder deeper, or as `root` itself."""
        return find_folder(root, self.folder, self.marker)


def find_spec(name: str) -> BenchmarkSpec:
    """Raises UserError for an unknown name."""
    specs = {spec.name: spec for spec in BENCHMARKS}
    if name not in specs:
        raise UserError(f"--benchmarks: {name!r} is none of {', '.join(specs)}, all{did_you_mean(name, specs)}")
    return specs[name]


def fits(spec: BenchmarkSpec, request: EvalRequest) -> bool:
    """Whether the classifier has the benchmark's classes. CIFAR-10's are recognised by name in any data set."""
    if CLASSES.get(spec.family, request.num_classes) != request.num_classes:
        return False
    if spec.family in (None, request.config.dataset):
        return True
    return spec.family == "cifar10" and request.classes == CIFAR10_CLASSES and request.config.image_size == 32


def _open_clean(spec: BenchmarkSpec, request: EvalRequest) -> Benchmark:
    """The test set of the classifier's data set."""
    split, classes = request.test_set
    source, images = source_of_test_images(request.config.dataset), len(split.labels)
    checked_by = {"official": "md5", "embedded": "drawn by the program"}.get(source, "decoding")
    if request.config.dataset == "imagenet":
        source, checked_by = _imagenet_source(images, IMAGENET_IMAGES, classes), "count"
    subset = Subset("", None, images, lambda: split)
    return Benchmark(spec.name, "test set", source, checked_by, split.fingerprint(), (subset,), classes)


def _open_corruption_arrays(
    spec: BenchmarkSpec, request: EvalRequest, *, archive: Remote, md5: Mapping[str, str]
) -> Benchmark:
    """CIFAR-10-C and CIFAR-100-C: a file per corruption, uint8 (5 n, 32, 32, 3), one severity after another."""
    folder = spec.found_in(request.root)
    if folder is None:
        (folder,) = request.downloads.fetch_unpacked(archive, request.root, (spec.folder,))
    remedy = f"replace it with a correct copy, or rename {folder} to download another"
    subsets, files = _corruption_subsets(folder, request, 32, remedy)
    source, checked_by = "subset", "shape"
    if 5 * subsets[0].images == CIFAR_C_IMAGES:
        source, checked_by = "official", "md5"
        for path in files:
            with path.open("rb") as file:
                found = hashlib.file_digest(file, partial(hashlib.md5, usedforsecurity=False)).hexdigest()
            if found != md5[path.stem]:
                raise UserError(f"{path}: has md5 {found} instead of {md5[path.stem]}\n{remedy}")
    fingerprint = _digest([sha256_of(path) for path in files])
    return Benchmark(spec.name, "corruptions", source, checked_by, fingerprint, subsets)


def _open_generated(spec: BenchmarkSpec, request: EvalRequest) -> Benchmark:
    """The corruptions of the classifier's test images that `evaluate.py --make-corruptions` has drawn."""
    folder = generated_folder(request.config)
    remedy = f"draw them with: python evaluate.py --make-corruptions --dataroot {request.root} and the run's settings"
    if not (folder / MANIFEST).is_file():
        raise Missing(f"{folder}: there are no generated corruptions; {remedy}")
    manifest = read_manifest(folder)
    if missing := [row.name for row in CORRUPTIONS if f"{row.name}.npy" not in manifest["files"]]:
        raise Missing(f"{folder}: {missing[0]} has not been drawn yet; {remedy}")
    split, classes = request.test_set
    if manifest["test_set"] != split.fingerprint():
        raise UserError(
            f"{folder}: was drawn from other test images than the present ones; move it elsewhere, and {remedy}"
        )
    subsets, files = _corruption_subsets(folder, request, image_side(request.config, split), remedy)
    for path in files:
        if sha256_of(path) != manifest["files"][path.name]:
            raise UserError(f"{path}: has changed since it was drawn\n{remedy}")
    note = "generated from this test set; frost is procedural; not comparable with published numbers"
    fingerprint = _digest(sorted(manifest["files"].values()))
    return Benchmark(spec.name, "corruptions", "generated", "SHA-256", fingerprint, subsets, classes, note)


def _open_perturbation_arrays(spec: BenchmarkSpec, request: EvalRequest, *, drive: str) -> Benchmark:
    """CIFAR-10-P and CIFAR-100-P: a file per perturbation, uint8 (V, T, 32, 32, 3); T differs between the files."""
    folder = spec.found_in(request.root) or request.root / spec.folder
    if missing := [f"{name}.npy" for name in SEQUENCES if not (folder / f"{name}.npy").is_file()]:
        raise Missing(
            f"{folder}: lacks {', '.join(missing)}\n"
            f"{spec.name} is in a shared drive: download its files by hand from {drive} into {folder}"
        )
    subsets, counts = [], set()
    for name in SEQUENCES:
        path = folder / f"{name}.npy"
        expected = "(sequences, frames, 32, 32, 3), frames at least 2"
        videos, frames, *_ = _array(path, expected, lambda shape: len(shape) == 5 and shape[1] > 1)
        counts.add(videos)
        split = partial(MappedSplit, path, 0, torch.full((videos * frames,), -1), request.device)
        subsets.append(Subset(name, None, videos * frames, split, frames))
    if len(counts) > 1:
        found = ", ".join(map(str, sorted(counts)))
        raise UserError(f"{folder}: its files hold different numbers of sequences ({found})")
    source = "official" if counts == {CIFAR_P_SEQUENCES} else "subset"
    fingerprint = _digest([sha256_of(folder / f"{name}.npy") for name in SEQUENCES])
    return Benchmark(spec.name, "perturbations", source, "shape", fingerprint, tuple(subsets))


def _open_array_test_set(
    spec: BenchmarkSpec, request: EvalRequest, *, images: Remote, labels: Remote, count: int
) -> Benchmark:
    """CIFAR-10.1: uint8 (n, 32, 32, 3) and integer labels; no hashes are published."""
    folder = spec.found_in(request.root) or request.root / spec.folder
    image_file, label_file = (request.downloads.fetch(remote, folder) for remote in (images, labels))
    _array(image_file, f"({count}, 32, 32, 3)", lambda s: len(s) == 4 and s[0] == count)
    label_I = _labels(label_file, count, request.num_classes)
    subset = Subset("", None, count, partial(MappedSplit, image_file, 0, label_I, request.device))
    fingerprint = _digest([sha256_of(path) for path in (image_file, label_file)])
    return Benchmark(spec.name, "test set", "official", "shape", fingerprint, (subset,))


def _open_imagenet_c(
    spec: BenchmarkSpec, request: EvalRequest, *, archives: Mapping[Remote, tuple[str, ...]]
) -> Benchmark:
    """ImageNet-C: <corruption>/<severity>/<class>/*.JPEG, stored at 224x224 and scored as stored.

    The archives have hashes; unpacked files are checked by their number. The extra four, 15 GB, are not downloaded.
    """
    root = spec.found_in(request.root) or request.root / spec.folder
    found: dict[str, Path] = {}
    for archive, holds in archives.items():
        found |= zip(holds, request.downloads.fetch_unpacked(archive, root, holds), strict=True)
    found |= {name: root / name for name in EXTRA if (root / name).is_dir()}
    classes = request.classes or class_folders(root / STANDARD[0] / str(SEVERITIES[0]))
    subsets, listing = [], hashlib.sha256()
    for name, folder in found.items():
        for severity in SEVERITIES:
            tree = folder / str(severity)
            if not tree.is_dir():
                raise Missing(f"{tree}: is missing; restore it, or rename {folder} to download another")
            if class_folders(tree) != classes or len(classes) != request.num_classes:
                raise UserError(f"{tree}: its classes are not the {request.num_classes} of the classifier")
            files = _names_and_sizes(tree, classes, request)
            listing.update(repr((name, severity, sorted(files))).encode())
            split = partial(_streamed, tree, classes, CentreCrop(224, 224), request)
            subsets.append(Subset(name, severity, len(files), split))
    fewest = min(subsets, key=lambda subset: subset.images)
    most = max(subset.images for subset in subsets)
    if fewest.images != most:
        raise UserError(f"{root / fewest.part / str(fewest.severity)}: holds {fewest.images} images, others {most}")
    source = _imagenet_source(most, IMAGENET_IMAGES, classes)
    return Benchmark(spec.name, "corruptions", source, "count", listing.hexdigest(), tuple(subsets), classes)


def _open_imagenet_v2(spec: BenchmarkSpec, request: EvalRequest, *, archive: Remote) -> Benchmark:
    """ImageNet-V2: class folders "0".."999", in the order of their numbers: 10 comes after 9, not after 1."""
    folder = spec.found_in(request.root)
    if folder is None:
        (folder,) = request.downloads.fetch_unpacked(archive, request.root, (spec.folder,))
    names = tuple(map(str, range(request.num_classes)))
    if set(class_folders(folder)) != set(names):
        raise UserError(f"{folder}: its class folders are not 0..{request.num_classes - 1}")
    files = _names_and_sizes(folder, names, request)
    view = CentreCrop(*request.config.eval_view)
    subset = Subset("", None, len(files), partial(_streamed, folder, names, view, request))
    source, fingerprint = _imagenet_source(len(files), IMAGENET_V2_IMAGES, names), _digest(sorted(files))
    return Benchmark(spec.name, "test set", source, "count", fingerprint, (subset,))


def _streamed(tree: Path, classes: Sequence[str], view: CentreCrop, request: EvalRequest) -> StreamedSplit:
    paths, labels, _ = _list_images(tree, classes)
    return StreamedSplit(ImageFiles(paths, view), labels, request.device, request.config.workers)


def _names_and_sizes(tree: Path, classes: Sequence[str], request: EvalRequest) -> list[tuple[str, str, int]]:
    """(class, file name, bytes) of each image; warns of other files."""
    paths, _, skipped = _list_images(tree, classes)
    if skipped and not request.downloads.quiet:
        warn(skipped)
    return [(path.parent.name, path.name, path.stat().st_size) for path in paths]


def _list_images(tree: Path, classes: Sequence[str]) -> Listing:
    return list_images(tree, {name: label for label, name in enumerate(classes)})


def _imagenet_source(images: int, official: int, classes: Sequence[str]) -> str:
    return "official" if (images, len(classes)) == (official, IMAGENET_CLASSES) else "subset"


def _corruption_subsets(
    folder: Path, request: EvalRequest, side: int, remedy: str
) -> tuple[tuple[Subset, ...], list[Path]]:
    """Subsets of all corruptions in `folder`, with the extra ones that are there, and the files they are read from."""
    names = [*STANDARD, *(name for name in EXTRA if (folder / f"{name}.npy").is_file())]
    if missing := [f"{name}.npy" for name in (*STANDARD, "labels") if not (folder / f"{name}.npy").is_file()]:
        raise Missing(f"{folder}: lacks {', '.join(missing)}; {remedy}")
    files = [folder / f"{name}.npy" for name in names]
    expected = f"(5 n, {side}, {side}, 3)"
    lengths = {path: _array(path, expected, lambda s: len(s) == 4 and s[0] % 5 == 0, side)[0] for path in files}
    length = lengths[files[0]]
    if other := next((path for path in files if lengths[path] != length), None):
        raise UserError(f"{other}: holds {lengths[other]} images, {files[0].name} {length}")
    label_file = folder / "labels.npy"
    label_5I = _labels(label_file, length, request.num_classes).view(5, -1)
    if not (label_5I == label_5I[0]).all():
        raise UserError(f"{label_file}: the five severities have different labels; each fifth must repeat the first")
    images = length // 5
    subsets = tuple(
        Subset(path.stem, s, images, partial(MappedSplit, path, (s - 1) * images, label_5I[0], request.device))
        for path in files
        for s in SEVERITIES
    )
    return subsets, [*files, label_file]


def _array(path: Path, expected: str, is_shape: Callable[[tuple], bool], side: int = 32) -> tuple[int, ...]:
    """Shape of the uint8 images in a .npy file. Raises UserError that names the file."""
    array = _mapped(path)
    shape = array.shape
    if array.dtype != np.uint8 or not is_shape(shape) or shape[-3:] != (side, side, 3) or not array.size:
        raise UserError(f"{path}: holds {_dtype_and_shape(array)}; expected uint8 of shape {expected}")
    if not array.flags.c_contiguous:
        raise UserError(f"{path}: is stored in column order; save it again with numpy.ascontiguousarray")
    return shape


def _labels(path: Path, count: int, num_classes: int) -> Tensor:
    """The labels in a .npy file, int64. Raises UserError that names the file."""
    labels = _mapped(path)
    if labels.dtype.kind not in "iu" or labels.shape != (count,):
        raise UserError(f"{path}: holds {_dtype_and_shape(labels)}; expected {count} whole numbers")
    if not 0 <= labels.min() <= labels.max() < num_classes:
        raise UserError(f"{path}: holds labels {labels.min()}..{labels.max()}; there are {num_classes} classes")
    return torch.from_numpy(labels.astype(np.int64))


def _dtype_and_shape(array: np.ndarray) -> str:
    return f"{printable(str(array.dtype), 80)} of shape {short_repr(array.shape)}"


def _mapped(path: Path) -> np.ndarray:
    try:
        require_file(path)
        with path.open("rb") as file:
            version = np.lib.format.read_magic(file)
        if version != (1, 0):  # numpy's for all arrays but records; later versions allow headers of gigabytes
            raise ValueError(f"has version {version} of the format; save it again with numpy.save")
        with np.errstate(over="ignore"):  # impossible sizes are refused by open_memmap
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


def _cifar_c(classes: int, opened: partial) -> BenchmarkSpec:
    url = opened.keywords["archive"].url
    return BenchmarkSpec(f"cifar{classes}-c", f"cifar{classes}", f"CIFAR-{classes}-C", "labels.npy", url, opened)


def _cifar_p(classes: int, drive: str) -> BenchmarkSpec:
    address = f"https://drive.google.com/drive/folders/{drive}"
    opened = partial(_open_perturbation_arrays, drive=address)
    folder, marker = f"CIFAR-{classes}-P", "tilt.npy"  # no file of another benchmark has this name
    return BenchmarkSpec(f"cifar{classes}-p", f"cifar{classes}", folder, marker, f"by hand: {address}", opened)


def _cifar10_1(version: str, count: int, bytes_of_labels: int) -> BenchmarkSpec:
    address = "https://raw.githubusercontent.com/modestyachts/CIFAR-10.1/master/datasets/cifar10.1"
    images = Remote(f"{address}_{version}_data.npy")
    labels = Remote(f"{address}_{version}_labels.npy", bytes_of_labels)
    opened = partial(_open_array_test_set, images=images, labels=labels, count=count)
    return BenchmarkSpec(f"cifar10.1-{version}", "cifar10", "CIFAR-10.1", images.name, images.url, opened)


def _imagenet_v2(variant: str) -> BenchmarkSpec:
    archive = Remote(f"https://huggingface.co/datasets/vaishaal/ImageNetV2/resolve/main/imagenetv2-{variant}.tar.gz")
    folder = f"imagenetv2-{variant}-format-val"
    opened = partial(_open_imagenet_v2, archive=archive)
    return BenchmarkSpec(f"imagenet-v2-{variant}", "imagenet", folder, "0", archive.url, opened)


_ZENODO_C, _MAKE = "https://zenodo.org/records/2235448", "python evaluate.py --make-corruptions"
BENCHMARKS = (
    BenchmarkSpec("clean", None, "", "", "the data set's own test split", _open_clean),
    _cifar_c(10, CIFAR10_C),
    _cifar_p(10, "1dY1_zeRyjMKdfmMbQ_uK8O1i0MVI9UbZ"),
    _cifar10_1("v4", 2021, 8212),
    _cifar10_1("v6", 2000, 8128),
    _cifar_c(100, CIFAR100_C),
    _cifar_p(100, "1Tpssw4Vn6X_4hmIW8KK5LzkKCZpAaae8"),
    BenchmarkSpec("imagenet-c", "imagenet", "ImageNet-C", STANDARD[-1], _ZENODO_C, IMAGENET_C),
    _imagenet_v2("matched-frequency"),
    _imagenet_v2("threshold0.7"),
    _imagenet_v2("top-images"),
    BenchmarkSpec("generated-c", None, "generated-c-<dataset>", MANIFEST, _MAKE, _open_generated),
)
