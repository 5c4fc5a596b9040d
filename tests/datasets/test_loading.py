"""From settings to splits: embedded shapes, class folders and CIFAR, against Pillow and the files' own content."""

import hashlib
import pickle
import re
import shutil
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

import config
import datasets.loading as loading
from config import Config
from datasets.download import Downloads, Missing
from datasets.loading import Arrays, DataSet, balanced_order, load_data, load_test
from datasets.shapes import CLASSES, draw_shapes
from datasets.splits import ResidentSplit, StreamedSplit
from utils import UserError

CPU = torch.device("cpu")


# Subsets


def test_the_first_n_images_are_balanced_for_every_n():
    labels = torch.cat([torch.zeros(50), torch.ones(30), torch.full((5,), 2)]).long()
    order = balanced_order(labels)
    assert order.sort().values.tolist() == list(range(85))
    for size in range(1, 16):
        counts = labels[order[:size]].bincount(minlength=3)
        assert counts.max() - counts.min() <= 1
    assert labels[order[:65]].bincount().tolist() == [30, 30, 5], "a small class gives all it has"


def test_held_out_and_training_images_are_balanced_and_disjoint():
    settings = {"model": "wresnet10_1", "dataset": "shapes", "valid_size": 100, "batch_size": 10}
    data = load_data(Config(**settings, train_size=200), CPU)
    assert data.train.labels.bincount().tolist() == [20] * 10
    assert data.valid.labels.bincount().tolist() == [10] * 10
    assert len(data.test.labels) == 2000
    rows = {image.numpy().tobytes() for image in data.train.images}
    assert len(rows) == 200
    assert not rows & {image.numpy().tobytes() for image in data.valid.images}
    larger = load_data(Config(**settings, train_size=300), CPU)
    assert torch.equal(larger.valid.images, data.valid.images), "train_size does not change what is held out"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"train_size": 3999, "valid_size": 2}, "ask for more than its 4000 training images"),
        ({"valid_size": 4000}, "ask for more than its 4000"),
        ({"train_size": 100, "batch_size": 128}, "batch_size: 128 is more than the 100 training images"),
    ],
)
def test_impossible_sizes_are_refused(settings, words):
    with pytest.raises(UserError, match=words):
        load_data(Config(dataset="shapes", **settings), CPU)


def test_shapes_are_always_the_same_and_the_test_split_is_harder():
    (train, train_labels), (test, test_labels) = draw_shapes("train"), draw_shapes("test")
    assert train.shape == (4000, 3, 32, 32)
    assert test.shape == (2000, 3, 32, 32)
    assert torch.equal(train, draw_shapes("train")[0])
    assert train_labels.bincount().tolist() == [400] * 10
    assert test_labels.bincount().tolist() == [200] * len(CLASSES)
    means = [images.float().mean((2, 3)).std(0).mean() for images in (train, test)]
    assert means[1] > 2 * means[0], "colours and light vary more"


# The registry


def test_the_registry_has_a_row_for_each_name_of_the_settings():
    assert tuple(loading.REGISTRY) == config.DATASETS
    assert loading.statistics("cifar100") == ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
    assert loading.statistics("folder") == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    sources = {name: loading.source_of_test_images(name) for name in ("shapes", "cifar10", "folder")}
    assert sources == {"shapes": "embedded", "cifar10": "official", "folder": "own"}


def open_stripes(config, split, downloads):
    images = torch.zeros(8, 3, 8, 8, dtype=torch.uint8)
    images[4:, :, ::2] = 255
    return Arrays(images, torch.arange(8) // 4, ("plain", "stripes"))


def with_stripes(**settings):
    """A config whose data set is one that config.DATASETS does not have."""
    config = Config(**settings)
    object.__setattr__(config, "dataset", "stripes")
    return config


def test_a_data_set_of_arrays_takes_a_function_and_a_row(monkeypatch):
    monkeypatch.setitem(loading.REGISTRY, "stripes", DataSet((0.5,) * 3, (0.5,) * 3, "own", open_stripes))
    data = load_data(with_stripes(batch_size=4, valid_size=2), CPU)
    assert data.classes == ("plain", "stripes")
    assert [split.labels.tolist() for split in data[:3]] == [[0] * 3 + [1] * 3, [0, 1], [0] * 4 + [1] * 4]
    assert loading.statistics("stripes") == ((0.5,) * 3, (0.5,) * 3)


@pytest.mark.parametrize(
    "change",
    [
        {"images": torch.zeros(8, 3, 8, 8)},
        {"images": torch.zeros(8, 8, 8, 3, dtype=torch.uint8)},
        {"images": torch.zeros(7, 3, 8, 8, dtype=torch.uint8)},
        {"labels": torch.arange(8)},
        {"labels": torch.zeros(8)},
    ],
)
def test_arrays_of_another_kind_are_refused(monkeypatch, change):
    row = loading.REGISTRY["shapes"]._replace(open_arrays=lambda *a: open_stripes(*a)._replace(**change))
    monkeypatch.setitem(loading.REGISTRY, "shapes", row)
    with pytest.raises(UserError, match=r"dataset: shapes: needs images uint8 \(I, 3, H, W\), labels int64"):
        load_data(Config(dataset="shapes"), CPU)


# Class folders


@pytest.fixture
def folder(tmp_path):
    """Two classes of images of several sizes and modes: 6 + 6 for training, 2 + 2 for testing."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("test", 2)):
        for name in ("cats", "dogs"):
            directory = tmp_path / split / name
            directory.mkdir(parents=True)
            for i in range(count):
                shape = [(16, 16, 3), (20, 31, 3), (40, 25)][i % 3]
                image = Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8))
                image.save(directory / f"{i}.png")
            (directory / "notes.txt").write_text("no image")
    return tmp_path


def folder_config(root, **settings):
    defaults = {"dataset": "folder", "dataroot": str(root), "image_size": 16, "batch_size": 2, "workers": 0}
    return Config(**defaults | settings)


def test_folder_images_are_scaled_and_centre_cropped_by_pillow(folder):
    data = load_data(folder_config(folder), CPU)
    assert data.classes == ("cats", "dogs")
    assert data.train.labels.tolist() == [0] * 6 + [1] * 6
    for i, (name, size) in enumerate([("0.png", None), ("1.png", (20, 31)), ("2.png", (40, 25))]):
        image = Image.open(folder / "train" / "cats" / name).convert("RGB")
        ours = data.train.images[i].permute(1, 2, 0).numpy()
        if size is None:
            assert np.array_equal(ours, np.array(image))
        else:
            short = min(size)
            box = ((size[1] - short) / 2, (size[0] - short) / 2, (size[1] + short) / 2, (size[0] + short) / 2)
            assert np.array_equal(ours, np.array(image.resize((16, 16), Image.Resampling.BICUBIC, box=box)))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")  # torch's own forks
def test_streamed_and_resident_splits_give_the_same_batches(folder, workers):
    resident = load_data(folder_config(folder, workers=workers), CPU)
    streamed = load_data(folder_config(folder, workers=workers, resident_gb=1e-9), CPU)
    assert isinstance(resident.train, ResidentSplit)
    assert isinstance(streamed.train, StreamedSplit)
    indices = [torch.tensor([3, 1, 8]), torch.tensor([0, 11])]
    before = torch.get_rng_state()
    for ours, theirs in zip(streamed.train.batches(indices), resident.train.batches(indices), strict=True):
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(ours[1], theirs[1])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("resident_gb", [1.0, 1e-9])
def test_unreadable_images_are_named_and_skipped_only_when_asked(folder, resident_gb, capsys):
    (folder / "train" / "cats" / "1.png").write_bytes(b"not an image")
    content = (folder / "train" / "dogs" / "3.png").read_bytes()
    (folder / "train" / "dogs" / "3.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(
        UserError, match=r"2 of 12 images cannot be read, first .*cats.1\.png[^\n]*\n.*skip_unreadable=true"
    ):
        load_data(folder_config(folder, resident_gb=resident_gb), CPU)
    data = load_data(folder_config(folder, resident_gb=resident_gb, skip_unreadable=True), CPU)
    assert data.train.labels.tolist() == [0] * 5 + [1] * 5
    assert "warning: skipped 2 of 12 images, first " in capsys.readouterr().err
    ((images, labels),) = data.train.batches([torch.arange(10)])
    assert len(images) == len(labels) == 10
    assert torch.equal(images[1], load_data(folder_config(folder, skip_unreadable=True), CPU).train.images[1])


def test_the_test_split_may_be_called_val_and_lack_classes(folder):
    (folder / "test").rename(folder / "val")
    shutil.rmtree(folder / "val" / "cats")
    assert load_data(folder_config(folder), CPU).test.labels.tolist() == [1, 1]
    split, classes = load_test(folder_config(folder), CPU, ("cats", "dogs"))
    assert (split.labels.tolist(), classes) == ([1, 1], ("cats", "dogs"))


def test_folders_that_are_no_data_set_are_refused(folder, tmp_path):
    train = folder / "train"
    with pytest.raises(UserError, match=r"nowhere: holds no folder train; images belong in .*nowhere/train/<class>/"):
        load_data(folder_config(tmp_path / "nowhere"), CPU)
    (folder / "test" / "horses").mkdir()
    with pytest.raises(UserError, match="class 'horses' is not among the 2 classes"):
        load_data(folder_config(folder), CPU)
    (folder / "test" / "horses").rmdir()
    for image in sorted((train / "dogs").glob("*.png"))[1:]:
        image.unlink()
    with pytest.raises(UserError, match="valid_size 2 leave class 'dogs' without training images"):
        load_data(folder_config(folder, valid_size=2), CPU)
    for image in (train / "cats").iterdir():
        image.rename(image.with_suffix(".txt"))
    with pytest.raises(UserError, match=r"cats: holds no images \(.*\.png"):
        load_data(folder_config(folder), CPU)
    shutil.rmtree(train / "cats")
    with pytest.raises(UserError, match="holds 1 class folders; a classifier needs at least two"):
        load_data(folder_config(folder), CPU)


@pytest.mark.parametrize("load", [load_data, load_test])
def test_a_data_root_one_folder_too_deep_is_told_apart(folder, monkeypatch, load):
    above = f"is the folder of a split; pass the folder above it: --dataroot {folder}$"
    with pytest.raises(Missing, match=above):
        load(folder_config(folder / "train"), CPU)
    monkeypatch.chdir(folder / "test")
    with pytest.raises(Missing, match=above):
        load(folder_config("."), CPU)


# CIFAR, from archives in the official layout made here


@pytest.fixture
def cifar_root(tmp_path, monkeypatch):
    """A small archive in the layout of CIFAR-10, and its content in made/."""
    from torchvision.datasets import CIFAR10

    folder = tmp_path / "made" / CIFAR10.base_folder
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)

    def write(name, content):
        (folder / name).write_bytes(pickle.dumps(content))
        return name, hashlib.md5((folder / name).read_bytes()).hexdigest()

    def batch(count):
        return {"data": rng.integers(0, 256, (count, 3072), dtype=np.uint8), "labels": [i % 10 for i in range(count)]}

    names = [f"class{i}" for i in range(10)]
    monkeypatch.setattr(CIFAR10, "train_list", [list(write("data_batch_1", batch(40)))])
    monkeypatch.setattr(CIFAR10, "test_list", [list(write("test_batch", batch(20)))])
    meta = dict(zip(("filename", "md5"), write("batches.meta", {"label_names": names}), strict=True), key="label_names")
    monkeypatch.setattr(CIFAR10, "meta", meta)
    archive = tmp_path / "cifar.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, CIFAR10.base_folder)
    monkeypatch.setattr(CIFAR10, "url", archive.as_uri())
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    return tmp_path


def cifar_config(cifar_root):
    return Config(dataset="cifar10", dataroot=str(cifar_root / "data"), batch_size=10)


def test_cifar_is_downloaded_checked_and_read_in_colour_planes(cifar_root):
    data = load_data(cifar_config(cifar_root), CPU)
    assert data.classes == tuple(f"class{i}" for i in range(10))
    stored = pickle.loads((cifar_root / "made" / "cifar-10-batches-py" / "test_batch").read_bytes())
    assert torch.equal(data.test.images, torch.from_numpy(stored["data"]).view(20, 3, 32, 32))
    assert data.test.labels.tolist() == stored["labels"]
    assert data.train.images.shape == (40, 3, 32, 32)
    assert sorted(path.name for path in (cifar_root / "data").iterdir()) == ["cifar-10-batches-py"]


def test_cifar_that_is_there_is_read_without_downloads(cifar_root):
    nothing = (Downloads(allowed=False), Downloads(only_checkpoint=True))
    (cifar_root / "data").mkdir()
    for downloads, words in zip(
        nothing, ["cifar.tar.gz: is missing\ndownload", "lacks cifar-10-batches-py of"], strict=True
    ):
        with pytest.raises(Missing, match=words):
            load_data(cifar_config(cifar_root), CPU, downloads)
    shutil.copy(cifar_root / "cifar.tar.gz", cifar_root / "data")
    with pytest.raises(Missing, match=r"lacks cifar-10-batches-py of cifar.tar.gz; nothing is downloaded there"):
        load_data(cifar_config(cifar_root), CPU, nothing[1])
    for downloads in nothing:
        assert len(load_data(cifar_config(cifar_root), CPU, downloads).test.labels) == 20


def test_cifar_that_cannot_be_downloaded_is_taken_by_hand(cifar_root):
    folder, address = cifar_root / "data", (cifar_root / "cifar.tar.gz").as_uri()
    (cifar_root / "mirror").mkdir()
    (cifar_root / "mirror" / "cifar.tar.gz").write_bytes(b"something else")
    message = rf"has md5 .*\ndownload {re.escape(address)} by hand into {folder}, or name a mirror"
    with pytest.raises(Missing, match=message):
        load_data(cifar_config(cifar_root), CPU, Downloads(mirror=(cifar_root / "mirror").as_uri()))
    assert list(folder.iterdir()) == []
    shutil.copy(cifar_root / "cifar.tar.gz", folder)
    assert len(load_data(cifar_config(cifar_root), CPU, Downloads(allowed=False)).test.labels) == 20


def test_damaged_files_of_cifar_are_named(cifar_root):
    config = cifar_config(cifar_root)
    load_data(config, CPU)
    folder = cifar_root / "data" / "cifar-10-batches-py"
    (folder / "test_batch").write_bytes(b"flipped")
    with pytest.raises(UserError, match=f"{re.escape(str(folder))}: is incomplete or damaged; replace it with"):
        load_data(config, CPU)
    folder.rename(folder.with_name("damaged"))
    assert len(load_data(config, CPU).test.labels) == 20


@pytest.mark.parametrize("root", ["data/cifar-10-batches-py", "data", "."])
def test_cifar_is_found_nearby_and_not_downloaded_again(cifar_root, root):
    load_data(cifar_config(cifar_root), CPU)
    config = Config(dataset="cifar10", dataroot=str(cifar_root / root), batch_size=10)
    (cifar_root / "made").rename(cifar_root / "elsewhere")
    shutil.rmtree(cifar_root / "elsewhere")
    assert len(load_data(config, CPU, Downloads(allowed=False)).test.labels) == 20
