"""Class folders as people have them: which files are images, what is skipped and said, where a data set is found."""

import os

import pytest
import torch
from conftest import ROOT
from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from config import Config
from dataloader import load_data
from datasets.download import Downloads, Missing
from datasets.folders import class_folders, find_folder, imagenet_classes, list_images
from datasets.imagefiles import IMAGE_SUFFIXES
from evaluation.benchmarks import BENCHMARKS, EvalRequest, find_spec
from utils import UserError

CPU = torch.device("cpu")


def fill(folder, count=3, suffix=".png"):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.new("RGB", (16, 16), (10 * i, 0, 0)).save(folder / f"{i}{suffix}")


@pytest.fixture
def root(tmp_path):
    """Two classes, four images each for training and two for testing."""
    for split, count in (("train", 4), ("test", 2)):
        for name in ("cats", "dogs"):
            fill(tmp_path / "data" / split / name, count)
    return tmp_path / "data"


def load(root, dataset="folder", **settings):
    if dataset == "imagenet":
        settings |= {"crop_padding": 0, "eval_view": (16, 16)}
    return load_data(
        Config(dataset=dataset, dataroot=str(root), image_size=16, batch_size=2, workers=0, **settings), CPU
    )


# Splits


@pytest.mark.parametrize("dataset", ["folder", "imagenet"])
@pytest.mark.parametrize("content", ["nothing", "images", "empty classes", "unlabelled images"])
def test_a_test_folder_without_classes_does_not_hide_val(root, dataset, content, capsys):
    (root / "test").rename(root / "val")
    (root / "test").mkdir()
    if content == "images":
        fill(root / "test", 12)
    elif content == "empty classes":
        (root / "test" / "cats").mkdir()
    elif content == "unlabelled images":
        fill(root / "test" / "unknown", 12)
    assert len(load(root, dataset).test.labels) == 4
    found = {
        "nothing": "no images and no class folders",
        "images": "12 images and no class folders",
        "empty classes": "no images, and none in its 1 class folders",
        "unlabelled images": "other classes",
    }
    assert f"warning: {root / 'test'} holds {found[content]}; val is used" in capsys.readouterr().err


@pytest.mark.parametrize("dataset", ["folder", "imagenet"])
def test_flat_validation_images_are_refused_with_the_way_to_sort_them(root, dataset):
    for name in ("cats", "dogs"):
        for image in (root / "test" / name).iterdir():
            image.rename(root / "test" / f"{name}_{image.name}")
        (root / "test" / name).rmdir()
    (root / "test").rename(root / "val")
    with pytest.raises(
        Missing, match=r"val holds 4 images and no class folders; images belong in .*val/<class>/\n.*val"
    ):
        load(root, dataset)


def test_flat_training_images_are_refused(tmp_path):
    fill(tmp_path / "train", 5)
    with pytest.raises(Missing, match=r"train holds 5 images and no class folders; images belong in .*train/<class>/$"):
        load(tmp_path)


def test_class_folders_without_splits_are_refused_with_the_way(root):
    (root / "train").rename(root.parent / "alone")
    with pytest.raises(
        Missing, match=r"alone: holds no folder train, but other folders with images; .*alone/train/<class>/"
    ):
        load(root.parent / "alone")


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is unreadable for root")
def test_a_folder_that_cannot_be_read_is_not_dropped(root):
    fill(root / "train" / "cats" / "more")
    (root / "train" / "cats" / "more").chmod(0)
    with pytest.raises(PermissionError):
        load(root)


def test_a_data_root_above_the_data_is_pointed_further_down(root):
    deeper = root.parent
    with pytest.raises(Missing, match=rf"holds no folder train, but {root}/train is one; pass --dataroot {root}$"):
        load(deeper)


# What is skipped


def test_images_are_those_of_torchvision_and_two_more_kinds():
    assert set(IMAGE_SUFFIXES) == {*IMG_EXTENSIONS, ".jfif", ".gif"}


def test_names_of_systems_and_hidden_ones_are_no_part_of_a_data_set(root, capsys):
    fill(root / "train" / "dogs" / "puppies" / "spring", 2, ".JPEG")
    expected = ImageFolder(root / "train")
    for name in ("__MACOSX", "lost+found", "@eaDir", "$RECYCLE.BIN", "System Volume Information", ".git"):
        fill(root / "train" / name)
        fill(root / "train" / "cats" / name)
    for name in ("._0.png", ".DS_Store", "Thumbs.db", "desktop.ini"):
        (root / "train" / "cats" / name).write_bytes(b"\0\5\26\7")
    names = class_folders(root / "train")
    assert names == tuple(expected.classes)
    listing = list_images(root / "train", {"cats": 0, "dogs": 1})
    assert list(zip(map(str, listing.paths), listing.labels.tolist(), strict=True)) == expected.samples
    assert listing.skipped is None
    assert len(load(root).train.labels) == 10
    assert "skipped" not in capsys.readouterr().err


def test_sub_folders_and_rarer_suffixes_are_read(root):
    fill(root / "train" / "cats" / "camera 1" / "may", 5)
    Image.new("RGB", (16, 16)).save(root / "train" / "dogs" / "a.JFIF", format="JPEG")
    frames = [Image.new("P", (16, 16), colour) for colour in (1, 2, 3)]
    frames[0].putpalette([0, 0, 0, 0, 200, 0, 0, 0, 200, 200, 0, 0])
    frames[0].save(root / "train" / "dogs" / "b.gif", save_all=True, append_images=frames[1:])
    data = load(root)
    assert data.train.labels.bincount().tolist() == [9, 6]
    assert data.train.images[-1].flatten(1).unique(dim=1).flatten().tolist() == [0, 200, 0], "the first frame"


def test_other_files_are_counted_and_named_once_per_split(root, capsys):
    for name in ("a.txt", "b.txt", "c.heic"):
        (root / "train" / "cats" / name).write_bytes(b"")
    fill(root / "train", 2)
    (root / "train" / "dogs" / "gone").symlink_to("/nowhere/gone")
    assert len(load(root).train.labels) == 8
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "skipped" in line]
    assert line.startswith(f"warning: {root / 'train'}: skipped 6 files (")
    for words in ("2 images outside class folders", "2 .txt", "1 .heic", "1 without suffix", "first "):
        assert words in line


def test_links_to_nowhere_are_unreadable_images_or_refused_classes(root):
    image = root / "train" / "cats" / "0.png"
    image.unlink()
    image.symlink_to("/nowhere/0.png")
    with pytest.raises(
        UserError, match=r"1 of 8 images cannot be read, first .*is a link to /nowhere/0\.png, which is not"
    ):
        load(root)
    assert len(load(root, skip_unreadable=True).train.labels) == 7
    (root / "train" / "horses").symlink_to("/nowhere/horses")
    with pytest.raises(UserError, match=r"train/horses: is a link to nowhere; .*remove the link"):
        load(root)


def test_a_link_that_leads_up_is_not_followed_for_ever(root):
    (root / "train" / "cats" / "all").symlink_to(root / "train", target_is_directory=True)
    assert len(load(root).train.labels) == 8


# Where a data set is


@pytest.mark.parametrize(
    "place", ["CIFAR-10-C", "cifar-10-c", "Cifar10C", "CIFAR-10-C/CIFAR-10-C", "zips/cifar_10_c", "."]
)
def test_a_data_set_is_found_in_any_spelling_and_nearby(tmp_path, place):
    folder = tmp_path / "data" / place
    folder.mkdir(parents=True)
    (folder / "labels.npy").write_bytes(b"")
    found = find_folder(tmp_path / "data", "CIFAR-10-C", "labels.npy")
    assert found.resolve() == folder.resolve()
    assert find_folder(folder, "CIFAR-10-C", "labels.npy").resolve() == folder.resolve(), "the root itself"


def test_a_folder_of_that_name_is_taken_even_if_incomplete(tmp_path):
    assert find_folder(tmp_path / "none", "CIFAR-10-C", "labels.npy") is None
    (tmp_path / "CIFAR-100-C").mkdir()
    assert find_folder(tmp_path, "CIFAR-10-C", "labels.npy") is None
    (tmp_path / "cifar-10-c").mkdir()
    assert find_folder(tmp_path, "CIFAR-10-C", "labels.npy") == tmp_path / "cifar-10-c"


@pytest.mark.parametrize("spec", [spec for spec in BENCHMARKS if spec.family], ids=lambda spec: spec.name)
def test_a_benchmark_is_found_in_another_spelling(tmp_path, spec):
    assert spec.found_in(tmp_path) is None
    folder = tmp_path / spec.folder.lower().replace("-", "_")
    (folder / spec.marker).mkdir(parents=True)
    assert spec.found_in(tmp_path) == folder


def test_corruptions_that_are_incomplete_are_not_downloaded_beside(tmp_path):
    (tmp_path / "cifar-10-c").mkdir()
    (tmp_path / "cifar-10-c" / "fog.npy").write_bytes(b"")
    config = Config(dataset="cifar10", dataroot=str(tmp_path))
    request = EvalRequest(config, None, 10, CPU, Downloads(mirror="file:///nowhere"))
    with pytest.raises(
        Missing, match=r"cifar-10-c: lacks gaussian_noise\.npy, .*replace it .* or rename .*cifar-10-c to"
    ):
        find_spec("cifar10-c").open(find_spec("cifar10-c"), request)


def test_imagenet_classes_are_in_the_order_of_its_outputs(tmp_path):
    """The places of Imagenette's ten classes among the 1,000 are published with it."""
    places = {
        "n01440764": 0, "n02102040": 217, "n02979186": 482, "n03000684": 491, "n03028079": 497,
        "n03394916": 566, "n03417042": 569, "n03425413": 571, "n03445777": 574, "n03888257": 701,
    }  # fmt: skip
    for name in places:
        (tmp_path / name).mkdir()
    classes = imagenet_classes(tmp_path)
    assert len(classes) == 1000
    assert {name: classes.index(name) for name in places} == places
    assert list(classes) == sorted(set(classes))
    (tmp_path / "cats").mkdir()
    assert imagenet_classes(tmp_path) is None
    assert (ROOT / "datasets" / "imagenet_classes.txt").stat().st_size == 10_000
