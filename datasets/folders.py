"""Class folders: which files are images of which class, what is skipped, and where a data set is below a folder.

Class folders are read as by torchvision's ImageFolder: sub-folders of a class belong to it, links are followed.
"""

import os
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from datasets.download import Missing
from datasets.imagefiles import IMAGE_SUFFIXES
from utils import UserError, printable

# Made by macOS, Windows, Linux and network storages beside people's files; like hidden names never part of a data set.
SYSTEM_NAMES = {
    "__macosx", "$recycle.bin", "system volume information", "thumbs.db", "desktop.ini", "lost+found", "@eadir",
    "#recycle",
}  # fmt: skip
SPLITS = {"train": ("train",), "test": ("test", "val", "valid", "validation")}
UNPACK_IMAGENET = (
    "for ImageNet, torchvision.datasets.ImageNet(DIR, split='val') unpacks the original archives into class folders"
)


class Listing(NamedTuple):
    """The images of class folders. skipped: for a warning, how many other files there are; None without any."""

    paths: list[Path]
    labels: Tensor
    skipped: str | None


def list_images(folder: Path, label_of: Mapping[str, int]) -> Listing:
    """The images of the named class folders of `folder`, sorted within each. Raises UserError for a class without."""
    paths, labels = [], []
    skipped = [name for name, is_folder in _entries(folder) if not is_folder]
    for name, label in label_of.items():
        files = list(_files_below(folder / name))
        images = [Path(file) for file in files if _is_image(file)]
        if not images:
            raise UserError(f"{folder / name}: holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
        skipped += [os.path.relpath(file, folder) for file in files if not _is_image(file)]
        paths += images
        labels += [label] * len(images)
    return Listing(paths, torch.tensor(labels), _describe_skipped(folder, skipped))


def class_folders(folder: Path) -> tuple[str, ...]:
    """Names of the folders in `folder`, sorted, without hidden ones and those of systems.

    Raises UserError for a link to nowhere, which may have been a class.
    """
    names = []
    for name, is_folder in _entries(folder):
        if is_folder:
            names.append(name)
        elif not _is_image(name) and not (folder / name).exists():
            raise UserError(f"{folder / name}: is a link to nowhere; make its target available, or remove the link")
    return tuple(sorted(names))


def imagenet_classes(folder: Path) -> tuple[str, ...] | None:
    """ImageNet's 1,000 classes in the order of its classifiers' outputs, if the folders in `folder` are some of them.

    Their names are WordNet's numbers of nouns ("wnids"), sorted; kept in imagenet_classes.txt.
    """
    classes = tuple(Path(__file__).with_name("imagenet_classes.txt").read_text(encoding="ascii").split())
    return classes if set(class_folders(folder)) <= {*classes} else None


def find_split(root: Path, split: str, classes: Collection[str] | None = None) -> tuple[Path, str | None]:
    """The folder of the "train" or "test" images, the first of the usual names with images in class folders.

    classes: those that it should have some of, if any folder has. Also returned is, for a warning, what the folders
    before it hold; None without any. Raises Missing, which says what is there.
    """
    names = SPLITS[split]
    folders = [root / name for name in names if (root / name).is_dir()]
    filled = [folder for folder in folders if any(map(_is_image, _files_in_classes(folder)))]
    good = next((folder for folder in filled if classes is None or {*class_folders(folder)} & {*classes}), None)
    good = good or next(iter(filled), None)
    others = folders[: folders.index(good)] if good else folders
    found = " and ".join(f"{folder} holds {_describe_content(folder)}" for folder in others)
    if good:
        return good, f"{found}; {good.name} is used" if others else None
    if folders:
        flat = f"\n{UNPACK_IMAGENET}" if split == "test" and any(map(_loose_images, folders)) else ""
        raise Missing(f"{found}; images belong in {folders[0]}/<class>/{flat}")
    full = root.resolve()
    if root.is_dir() and full.name in (*SPLITS["train"], *SPLITS["test"]):
        raise Missing(f"{root}: is the folder of a split; pass the folder above it: --dataroot {full.parent}")
    lacks = f"{root}: holds no folder {' or '.join(names[:2])}"
    if below := _find_below(root, names):
        raise Missing(f"{lacks}, but {below} is one; pass --dataroot {below.parent}")
    if root.is_dir() and any(map(_is_image, _files_in_classes(root))):
        lacks += (
            f", but other folders with images; if they are classes, move a part of each to {root / names[0]}/<class>/"
        )
        raise Missing(f"{lacks} and the rest to {root / SPLITS['test' if split == 'train' else 'train'][0]}/<class>/")
    raise Missing(f"{lacks}; images belong in {root / names[0]}/<class>/")


def find_folder(root: Path, name: str, marker: str) -> Path | None:
    """The folder of a data set, recognised by its name in any spelling and by the file or folder `marker` in it.

    It may be below `root`, one folder deeper, or `root` itself, whatever its name if the marker is an array. A folder
    of that name without the marker counts, too, so that nothing is downloaded beside it. None if there is none.
    """
    children = _folders_in(root)
    deeper = [folder for child in children for folder in _folders_in(child)]
    named = [folder for folder in (root / name, root.resolve(), *children, *deeper) if folder.is_dir()]
    named = [folder for folder in named if _plain(folder.name) == _plain(name)]
    unnamed = [root] if marker.endswith(".npy") else []
    return next((folder for folder in (*named, *unnamed) if (folder / marker).exists()), next(iter(named), None))


def _entries(folder: Path) -> list[tuple[str, bool]]:
    """(name, whether it is a folder) of all that is in `folder`, without hidden names and those of systems."""
    with os.scandir(folder) as entries:
        return [(entry.name, entry.is_dir()) for entry in entries if not _is_hidden(entry.name)]


def _folders_in(folder: Path) -> list[Path]:
    """The folders in `folder`, sorted; none where it is not there or cannot be read."""
    try:
        return sorted(folder / name for name, is_folder in _entries(folder) if is_folder)
    except OSError:
        return []


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in SYSTEM_NAMES


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES)


def _plain(name: str) -> str:
    return "".join(filter(str.isalnum, name.lower()))


def _files_below(folder: Path) -> Iterator[str]:
    """Paths of the files in `folder` and below, without hidden ones and those of systems, in torchvision's order."""
    for where, names in sorted(_walk(folder)):
        yield from (os.path.join(where, name) for name in sorted(names) if not _is_hidden(name))


def _walk(folder: Path) -> Iterator[tuple[str, list[str]]]:
    def stop(error: OSError) -> NoReturn:  # a folder that cannot be read would be dropped without a word
        raise error

    for where, folders, names in os.walk(folder, onerror=stop, followlinks=True):
        folders[:] = [name for name in folders if not _is_hidden(name) and not _leads_up(Path(where) / name)]
        yield where, names


def _leads_up(folder: Path) -> bool:
    """Whether it is a link to a folder that it is in, which could be followed for ever."""
    return folder.is_symlink() and folder.parent.resolve().is_relative_to(folder.resolve())


def _files_in_classes(folder: Path) -> Iterator[str]:
    for name, is_folder in _entries(folder):
        if is_folder:
            for where, names in _walk(folder / name):
                yield from (os.path.join(where, file) for file in names if not _is_hidden(file))


def _loose_images(folder: Path) -> int:
    return sum(not is_folder and _is_image(name) for name, is_folder in _entries(folder))


def _describe_content(folder: Path) -> str:
    loose, classes = _loose_images(folder), sum(is_folder for _, is_folder in _entries(folder))
    images = f"{loose:,} images" if loose else "no images"
    if not classes:
        return f"{images} and no class folders"
    if any(map(_is_image, _files_in_classes(folder))):
        return "other classes"
    return f"{images}, and none in its {classes} class folders"


def _describe_skipped(folder: Path, skipped: list[str]) -> str | None:
    if not skipped:
        return None
    kinds = Counter("images outside class folders" if _is_image(file) else Path(file).suffix for file in skipped)
    kinds = ", ".join(f"{count} {printable(kind, 40) or 'without suffix'}" for kind, count in kinds.most_common(4))
    files = "1 file" if len(skipped) == 1 else f"{len(skipped):,} files"
    return f"{folder}: skipped {files} ({kinds}), first {printable(skipped[0])}"


def _find_below(root: Path, names: tuple[str, ...], levels: int = 4) -> Path | None:
    """A folder of one of these names at most so many levels below `root`, where there are few folders to look into."""
    level = [root]
    for _ in range(levels):
        level = [below for folder in level for below in _folders_in(folder)][:100]
        if found := next((folder for folder in level if folder.name in names), None):
            return found
    return None
