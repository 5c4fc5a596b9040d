"""Data sets, subsets and the fixed part of the augmentation, against Pillow, torchvision and NumPy."""

import functools
import hashlib
import http.server
import itertools
import os
import pickle
import re
import shutil
import sys
import tarfile
import threading

import numpy as np
import pytest
import torch
import torchvision.transforms as T
from PIL import Image
from test_download import killed_before_step, serving, start_forked, wait_until

import datasets.download as download
from augmentations import row_of
from config import Config
from dataloader import (
    Normalise,
    TrainLoader,
    crop_and_flip,
    cutout_mask,
    draw_centres,
    draw_crops,
    epoch_batches,
    make_copies,
)
from datasets.download import Downloads
from datasets.loading import balanced_order, load_data, load_test
from datasets.shapes import CLASSES, draw_shapes
from datasets.splits import ResidentSplit, StreamedSplit
from policies import build_policies
from policies.sources import PolicySource
from utils import UserError, keyed_generator

CPU = torch.device("cpu")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def noise(count, height=12, width=16):
    return torch.randint(1, 256, (count, 3, height, width), dtype=torch.uint8, generator=generator(9))


# Subsets and order


def test_every_beginning_of_the_order_is_balanced():
    labels = torch.cat([torch.zeros(50), torch.ones(30), torch.full((5,), 2)]).long()
    order = balanced_order(labels)
    assert order.sort().values.tolist() == list(range(85))
    for size in range(1, 16):
        counts = labels[order[:size]].bincount(minlength=3)
        assert counts.max() - counts.min() <= 1
    assert labels[order[:65]].bincount().tolist() == [30, 30, 5], "a small class gives what it has"


def test_an_epoch_is_a_permutation_in_whole_batches():
    batches = epoch_batches(103, 10, seed=0, epoch=0)
    assert [len(batch) for batch in batches] == [10] * 10
    assert len(torch.cat(batches).unique()) == 100
    assert torch.equal(torch.cat(batches), torch.cat(epoch_batches(103, 10, seed=0, epoch=0)))
    for other in (epoch_batches(103, 10, seed=1, epoch=0), epoch_batches(103, 10, seed=0, epoch=1)):
        assert not torch.equal(torch.cat(batches), torch.cat(other))


def test_held_out_and_training_images_are_balanced_and_apart():
    config = Config(model="wresnet10_1", dataset="shapes", train_size=200, valid_size=100, batch_size=10)
    data = load_data(config, CPU)
    assert data.train.labels.bincount().tolist() == [20] * 10
    assert data.valid.labels.bincount().tolist() == [10] * 10
    assert len(data.test.labels) == 2000
    rows = {image.numpy().tobytes() for image in data.train.images}
    assert len(rows) == 200
    assert not rows & {image.numpy().tobytes() for image in data.valid.images}
    larger = load_data(Config(dataset="shapes", train_size=300, valid_size=100, batch_size=10), CPU)
    assert torch.equal(larger.valid.images, data.valid.images), "what is held out does not depend on what is trained on"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"train_size": 5000}, "ask for more than its 4000 training images"),
        ({"train_size": 3999, "valid_size": 2}, "ask for more than its 4000"),
        ({"valid_size": 4000}, "ask for more than its 4000"),
        ({"train_size": 100, "batch_size": 128}, "batch_size: 128 is more than the 100 training images"),
    ],
)
def test_impossible_sizes_are_refused(settings, words):
    with pytest.raises(UserError, match=words):
        load_data(Config(dataset="shapes", **settings), CPU)


# Crop, flip, normalise, Cutout


def test_crops_and_flips_are_copies_of_padded_windows():
    images, padding = noise(1500), 3
    config = Config(M=1, crop_padding=padding)
    ours = crop_and_flip(images, torch.arange(1500), draw_crops(len(images), config, generator()))
    padded = np.pad(images.numpy(), ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    seen = set()
    for image, window in zip(padded, ours.numpy(), strict=True):
        fits = [
            (dy, dx, flipped)
            for dy in range(2 * padding + 1)
            for dx in range(2 * padding + 1)
            for flipped in (False, True)
            if np.array_equal(window, image[:, dy : dy + 12, dx : dx + 16][:, :, :: -1 if flipped else 1])
        ]
        assert len(fits) == 1
        seen |= set(fits)
    assert len(seen) == 98, "all 49 shifts occur, flipped and not"


def test_crop_and_flip_can_be_switched_off():
    images = noise(50)
    assert draw_crops(50, Config(crop_padding=0, flip=False), generator()) is None
    assert draw_crops(50, Config(dataset="imagenet", crop_padding=0), generator()) is None, "cropped when read"
    flipped = crop_and_flip(images, torch.arange(50), draw_crops(50, Config(M=1, crop_padding=0), generator()))
    is_same = (flipped == images).flatten(1).all(1)
    is_mirrored = (flipped == images.flip(3)).flatten(1).all(1)
    assert (is_same ^ is_mirrored).all()
    assert 10 < is_same.sum() < 40


def test_copies_are_image_major_and_drawn_each_or_once():
    images = noise(6)
    every = torch.arange(24)

    def copies(**settings):
        return make_copies(images, every, 4, draw_crops(6, Config(M=4, **settings), generator()))

    assert torch.equal(copies(crop_padding=0, flip=False), images.repeat_interleave(4, 0))
    shared = copies(crop_per_copy=False).view(6, 4, -1)
    assert (shared == shared[:, :1]).all()
    each = copies(crop_per_copy=True).view(6, 4, -1)
    assert not (each == each[:, :1]).all()


def test_any_copies_can_be_made_from_the_images_at_hand():
    images, crops = noise(6), draw_crops(6, Config(M=4), generator())
    every = make_copies(images, torch.arange(24), 4, crops)
    some = torch.tensor([17, 8, 23, 8])
    assert torch.equal(make_copies(images[2:], some, 4, crops, first=2), every[some])


def test_copies_made_in_parts_are_those_of_the_whole_batch():
    """To the bit, with SamplePairing's partners inside and outside the part, for any cut."""
    config = Config(M=3, batch_size=12, ops=("SamplePairing", "Rotate", "Cutout"), policy="random", Q=2)
    split = ResidentSplit(noise(12, 16, 16), torch.arange(12) % 10)
    policies = build_policies(config)
    policies.resample(generator())

    def inputs(*parts):
        loader = TrainLoader(split, config, policies, Normalise(config, CPU), parts, keyed_generator)
        ((_, micro_batches),) = loader.steps(0)
        return [torch.cat(tensors) for tensors in zip(*micro_batches, strict=True)]

    images_BCHW, labels_B = inputs(range(12))
    assert torch.equal(labels_B, labels_B[::3].repeat_interleave(3)), "copies of an image stand together"
    for cuts in ((0, 5, 12), (0, 5, 6, 12)):
        parts_BCHW, parts_B = inputs(*(range(*pair) for pair in itertools.pairwise(cuts)))
        assert torch.equal(parts_BCHW, images_BCHW)
        assert torch.equal(parts_B, labels_B)


def test_a_step_is_drawn_from_the_policies_in_use_when_it_is_taken():
    config = Config(M=2, batch_size=4, policy="none", crop_padding=0, flip=False, cutout=0)
    split, policies = ResidentSplit(noise(8), torch.arange(8)), PolicySource(2, 1, 1)
    loader = TrainLoader(split, config, policies, Normalise(config, CPU), [range(4)], keyed_generator)
    for step, micro_batches in loader.steps(0, first=1):
        policies.op_MQK[:] = row_of("Invert")
        ((inputs_BCHW, labels_B),) = micro_batches
        assert step == 1
        images_NCHW = split.images[epoch_batches(8, 4, config.seed, 0)[1]]
        expected_NCHW = Normalise(config, CPU)(255 - images_NCHW)
        torch.testing.assert_close(inputs_BCHW, expected_NCHW.repeat_interleave(2, 0), atol=0, rtol=0)
        assert labels_B.tolist() == epoch_batches(8, 4, config.seed, 0)[1].repeat_interleave(2).tolist()


def test_normalise_equals_torchvision():
    images = noise(4)
    config = Config(dataset="cifar10")
    reference = T.Compose([T.ToTensor(), T.Normalize((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))])
    expected = torch.stack([reference(Image.fromarray(image.permute(1, 2, 0).numpy())) for image in images])
    assert torch.equal(Normalise(config, CPU)(images), expected)
    custom = Normalise(Config(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)), CPU)(images)
    assert torch.equal(custom, images / 255)


@pytest.mark.parametrize("side", [0, 1, 5, 8])
def test_cutout_blanks_one_square_that_may_reach_over_the_border(side):
    images, normalise = noise(3000), Normalise(Config(), CPU)
    kept = cutout_mask(side, draw_centres(3000, 12, 16, generator()), 12, 16, CPU)
    inputs, before = normalise(images, kept), normalise(images)
    blank = (inputs != before).any(1)
    assert (inputs[blank[:, None].expand_as(inputs)] == 0).all()
    full = blank.sum((1, 2)) == side * side
    assert (blank.sum((1, 2)) <= side * side).all()
    for image in blank[blank.any(2).any(1)]:
        rows, columns = image.any(1).nonzero().flatten(), image.any(0).nonzero().flatten()
        box = image[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        assert box.all()
        assert max(box.shape) <= side
    assert full.any()
    assert blank.any(0).all() or side == 0, "every pixel can be blanked"


# Embedded shapes


def test_shapes_are_always_the_same_and_the_test_split_is_harder():
    (train, train_labels), (test, test_labels) = draw_shapes("train"), draw_shapes("test")
    assert train.shape == (4000, 3, 32, 32)
    assert test.shape == (2000, 3, 32, 32)
    assert torch.equal(train, draw_shapes("train")[0])
    assert train_labels.bincount().tolist() == [400] * 10
    assert test_labels.bincount().tolist() == [200] * len(CLASSES)
    means = [images.float().mean((2, 3)).std(0).mean() for images in (train, test)]
    assert means[1] > 2 * means[0], "colours and light vary more"


# Folders of images


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


def test_sixteen_bit_images_are_scaled_to_eight(folder):
    ramp = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
    Image.fromarray(ramp).save(folder / "train" / "cats" / "0.png")
    image = load_data(folder_config(folder), CPU).train.images[0]
    assert np.array_equal(image.numpy(), np.broadcast_to((ramp // 257).astype(np.uint8), (3, 16, 16)))


def test_a_class_is_never_held_out_whole(folder):
    for image in sorted((folder / "train" / "dogs").glob("*.png"))[1:]:
        image.unlink()
    with pytest.raises(UserError, match="valid_size 2 leave class 'dogs' without training images"):
        load_data(folder_config(folder, valid_size=2), CPU)


def test_photographs_taken_sideways_are_turned_upright(folder):
    path = folder / "train" / "cats" / "0.jpg"
    picture = Image.new("RGB", (16, 16))
    picture.paste((255, 255, 255), (0, 0, 16, 8))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    picture.save(path, exif=exif, quality=95)
    image = load_data(folder_config(folder), CPU).train.images[0]
    assert image[:, :, 10:].min() > 200
    assert image[:, :, :6].max() < 50


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
def test_unreadable_images_are_named_counted_and_left_out_only_when_told(folder, resident_gb, capsys):
    (folder / "train" / "cats" / "1.png").write_bytes(b"not an image")
    whole = (folder / "train" / "dogs" / "3.png").read_bytes()
    (folder / "train" / "dogs" / "3.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(
        UserError, match=r"2 of 12 images cannot be read, first .*cats.1\.png[^\n]*\n.*skip_unreadable=true"
    ):
        load_data(folder_config(folder, resident_gb=resident_gb), CPU)
    data = load_data(folder_config(folder, resident_gb=resident_gb, skip_unreadable=True), CPU)
    assert data.train.labels.tolist() == [0] * 5 + [1] * 5
    assert "warning: left out 2 of 12 images, first " in capsys.readouterr().err
    ((images, labels),) = data.train.batches([torch.arange(10)])
    assert len(images) == len(labels) == 10
    assert torch.equal(images[1], load_data(folder_config(folder, skip_unreadable=True), CPU).train.images[1])


def test_a_split_may_be_called_val_and_need_not_hold_every_class(folder):
    (folder / "test").rename(folder / "val")
    for image in (folder / "val" / "cats").glob("*"):
        image.unlink()
    (folder / "val" / "cats").rmdir()
    assert load_data(folder_config(folder), CPU).test.labels.tolist() == [1, 1]
    split, classes = load_test(folder_config(folder), CPU, ("cats", "dogs"))
    assert (split.labels.tolist(), classes) == ([1, 1], ("cats", "dogs"))


def test_folders_that_make_no_data_set_are_refused(folder, tmp_path):
    with pytest.raises(UserError, match="nowhere: holds no folder train"):
        load_data(folder_config(tmp_path / "nowhere"), CPU)
    (folder / "test" / "horses").mkdir()
    with pytest.raises(UserError, match="class 'horses' is not among the 2 classes"):
        load_data(folder_config(folder), CPU)
    (folder / "test" / "horses").rmdir()
    for image in (folder / "train" / "cats").iterdir():
        image.rename(image.with_suffix(".txt"))
    with pytest.raises(UserError, match=r"cats: holds no images \(.*\.png"):
        load_data(folder_config(folder), CPU)
    for image in (folder / "train" / "cats").iterdir():
        image.unlink()
    (folder / "train" / "cats").rmdir()
    with pytest.raises(UserError, match="holds 1 class folders; a classifier needs at least two"):
        load_data(folder_config(folder), CPU)


# CIFAR, from archives in the official layout made here


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def cifar_root(tmp_path, monkeypatch):
    """A small archive in the layout of CIFAR-10, served from this machine instead of the public address."""
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
    train_list, test_list = [list(write("data_batch_1", batch(40)))], [list(write("test_batch", batch(20)))]
    meta = dict(zip(("filename", "md5"), write("batches.meta", {"label_names": names}), strict=True), key="label_names")
    archive = tmp_path / "cifar.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, CIFAR10.base_folder)
    handler = functools.partial(QuietHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        for attribute, value in {
            "train_list": train_list,
            "test_list": test_list,
            "meta": meta,
            "url": f"http://127.0.0.1:{server.server_port}/cifar.tar.gz",
            "tgz_md5": hashlib.md5(archive.read_bytes()).hexdigest(),
        }.items():
            monkeypatch.setattr(CIFAR10, attribute, value)
        thread = threading.Thread(target=functools.partial(server.serve_forever, poll_interval=0.01))
        thread.start()
        yield tmp_path
        server.shutdown()
        thread.join()


def test_cifar_is_fetched_checked_and_read_in_colour_planes(cifar_root):
    config = Config(dataset="cifar10", dataroot=str(cifar_root / "data"), batch_size=10)
    (cifar_root / "data" / "cifar-10-batches-py").mkdir(parents=True)  # left by an extraction cut short
    data = load_data(config, CPU)
    assert data.classes == tuple(f"class{i}" for i in range(10))
    stored = pickle.loads((cifar_root / "made" / "cifar-10-batches-py" / "test_batch").read_bytes())
    assert torch.equal(data.test.images, torch.from_numpy(stored["data"]).view(20, 3, 32, 32))
    assert data.test.labels.tolist() == stored["labels"]
    assert data.train.images.shape == (40, 3, 32, 32)


def test_cifar_that_is_there_is_read_without_a_network(cifar_root, monkeypatch):
    config = Config(dataset="cifar10", dataroot=str(cifar_root / "data"), batch_size=10)
    load_data(config, CPU)
    monkeypatch.setattr("torchvision.datasets.CIFAR10.url", "http://127.0.0.1:9/")
    assert len(load_data(config, CPU).test.labels) == 20


@pytest.fixture
def misbehaving(cifar_root, monkeypatch):
    """A server that has the same archive, and sends it as its script says; nothing is waited for between tries."""
    with serving((cifar_root / "cifar.tar.gz").read_bytes()) as server:
        monkeypatch.setattr("torchvision.datasets.CIFAR10.url", f"http://127.0.0.1:{server.server_port}/cifar.tar.gz")
        monkeypatch.setenv("no_proxy", "*")
        monkeypatch.setattr(download, "STALL", 0.3)
        monkeypatch.setattr(download.time, "sleep", lambda _: None)
        yield server


@pytest.mark.parametrize(
    "script", [["cut"], ["stalled"], ["cut", "stalled", 503, "cut"], ["too long"], ["without length"]]
)
def test_cifar_comes_whole_from_a_server_that_fails(cifar_root, misbehaving, script):
    misbehaving.script = script
    data = load_data(Config(dataset="cifar10", dataroot=str(cifar_root / "data"), batch_size=10), CPU)
    assert (len(data.train.labels), len(data.test.labels)) == (40, 20)
    assert misbehaving.sent == len(misbehaving.content)
    assert sorted(path.name for path in (cifar_root / "data").iterdir()) == ["cifar-10-batches-py", "cifar.tar.gz"]


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ([403], "403 Forbidden"),
        (["too short"], "what came from there has md5"),
        (["wrongly"], "what came from there has md5"),
        (["a page"], "what came from there has md5"),
        (["cut", *[503] * 4], "503 Service Unavailable"),
    ],
)
def test_cifar_that_does_not_come_is_to_be_fetched_by_hand(cifar_root, misbehaving, script, words):
    """And then is taken from where it was to be put; what has come before a failure is gone on with otherwise."""
    misbehaving.script, folder = list(script), cifar_root / "data"
    config = Config(dataset="cifar10", dataroot=str(folder), batch_size=10)
    address = f"http://127.0.0.1:{misbehaving.server_port}/cifar.tar.gz"
    message = f"{re.escape(address)}: {words}.*\nfetch {re.escape(address)} by hand and put it into {folder}, or"
    with pytest.raises(UserError, match=message):
        load_data(config, CPU)
    part = ["cifar.tar.gz.part"] * (script[0] == "cut")
    assert [path.name for path in folder.iterdir()] == part
    if not part:
        shutil.copy(cifar_root / "cifar.tar.gz", folder)
    assert len(load_data(config, CPU).test.labels) == 20
    assert misbehaving.ranges[len(script) :] == [f"bytes={len(misbehaving.content) // 2}-"] * len(part)


def test_cifar_is_fetched_once_by_two_that_want_it(cifar_root, misbehaving, tmp_path):
    pytest.importorskip("fcntl")
    config = Config(dataset="cifar10", dataroot=str(cifar_root / "data"), batch_size=10)

    def load(number):
        os.dup2(os.open(tmp_path / f"stderr{number}", os.O_WRONLY | os.O_CREAT), 2)
        sys.stderr = os.fdopen(2, "w", buffering=1)
        assert len(load_data(config, CPU).test.labels) == 20

    misbehaving.script = ["after a sign"]
    processes = [start_forked(functools.partial(load, number)) for number in range(2)]
    said = [tmp_path / f"stderr{number}" for number in range(2)]
    waiting = f"warning: {cifar_root / 'data'}: waiting for another process that is fetching or unpacking there\n"
    wait_until(lambda: any(file.exists() and file.read_text() == waiting for file in said))
    misbehaving.sign.set()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert misbehaving.ranges == [None]


@pytest.mark.parametrize("begun", [False, True])
def test_cifar_is_never_taken_for_whole_when_the_one_that_fetched_it_was_killed(cifar_root, begun):
    """At any step, into an empty folder or over the files of an older copy."""
    config = Config(dataset="cifar10", dataroot=str(cifar_root / "data"), batch_size=10)
    downloads = Downloads(mirror=cifar_root.as_uri(), quiet=True)
    made = {path.name: path.read_bytes() for path in (cifar_root / "made" / "cifar-10-batches-py").iterdir()}
    folder, on, killed = cifar_root / "data" / "cifar-10-batches-py", True, 0
    while on:
        if begun:
            folder.mkdir(parents=True)
            for name in ("data_batch_1", "test_batch"):
                (folder / name).write_bytes(b"old")
        on = killed_before_step(killed + 1, lambda: load_data(config, CPU, downloads))
        killed += on
        assert len(load_data(config, CPU, downloads).test.labels) == 20
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == made
        shutil.rmtree(cifar_root / "data")
    assert killed > 5


def test_a_cifar_archive_with_wrong_content_is_refused(cifar_root, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.CIFAR10.tgz_md5", "0" * 32)
    with pytest.raises(UserError, match=r"cifar.tar.gz: what came from there has md5 .*\nfetch .* by hand"):
        load_data(Config(dataset="cifar10", dataroot=str(cifar_root / "data")), CPU)
