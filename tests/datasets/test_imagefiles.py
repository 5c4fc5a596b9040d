"""Image files: the usual views of ImageNet against torchvision's, and damaged files."""

import itertools
import json
import warnings

import numpy as np
import pytest
import torch
import torchvision.transforms as T
from conftest import TINY
from PIL import Image, ImageOps

import datasets.imagefiles as imagefiles
from config import Config
from datasets.imagefiles import CentreCrop, FileCheck, FitSquare, ImageFiles, RandomCrop
from datasets.loading import load_data, load_test
from datasets.splits import ResidentSplit, StreamedSplit
from utils import UserError, keyed_seed

CPU = torch.device("cpu")


def photograph(path, width=90, height=70, seed=0, **options):
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse.resize((width, height), Image.Resampling.BICUBIC).save(path, **options)
    return path


@pytest.mark.parametrize(("resize", "size"), [(256, 224), (320, 320), (48, 40)])
@pytest.mark.parametrize(("width", "height"), [(90, 70), (50, 333), (500, 375)])
def test_the_evaluation_view_equals_torchvision(tmp_path, resize, size, width, height):
    path = photograph(tmp_path / "a.jpg", width, height)
    theirs = T.Compose([T.Resize(resize, T.InterpolationMode.BICUBIC), T.CenterCrop(size), T.PILToTensor()])
    assert torch.equal(CentreCrop(resize, size)(path, seed=0), theirs(Image.open(path).convert("RGB")))


def test_the_training_crop_equals_torchvision(tmp_path):
    path = photograph(tmp_path / "a.jpg", 120, 80)
    crop = T.RandomResizedCrop(32, interpolation=T.InterpolationMode.BICUBIC)
    theirs = T.Compose([crop, T.RandomHorizontalFlip(), T.PILToTensor()])
    seen = []
    for seed in range(20):
        torch.manual_seed(seed)
        expected = theirs(Image.open(path).convert("RGB"))
        state = torch.get_rng_state()
        seen.append(RandomCrop(32, flip=True)(path, seed))
        assert torch.equal(seen[-1], expected)
        assert torch.equal(torch.get_rng_state(), state), "the default generator is left as it was"
    assert len({image.numpy().tobytes() for image in seen}) == 20


def test_a_crop_depends_only_on_seed_epoch_and_image(tmp_path):
    paths = [photograph(tmp_path / f"{i}.jpg", seed=i) for i in range(6)]
    files = ImageFiles(paths, RandomCrop(16, flip=True), seed=3)
    alone = [files[2, i][0] for i in range(6)]
    assert torch.equal(alone[4], RandomCrop(16, flip=True)(paths[4], keyed_seed(3, "crop", 2, 4)))
    for workers, indices in ((0, [[0, 1, 2], [3, 4, 5]]), (2, [[5], [4, 0], [1, 2, 3]])):
        batches = list(files.batches([torch.tensor(index) for index in indices], 2, workers))
        for index, (images, positions, reasons) in zip(indices, batches, strict=True):
            assert positions.tolist() == index
            assert reasons == [None] * len(index)
            assert torch.equal(images, torch.stack([alone[i] for i in index]))
    assert not torch.equal(files[1, 4][0], alone[4]), "another epoch, another crop"


@pytest.mark.parametrize("mode", ["L", "CMYK", "P", "1"])
def test_other_modes_are_converted_to_rgb(tmp_path, mode):
    image = Image.open(photograph(tmp_path / "rgb.png")).convert(mode)
    path = tmp_path / ("odd.jpg" if mode in ("L", "CMYK") else "odd.png")
    image.save(path)
    assert ImageFiles([path], FileCheck())[0, 0][2] is None
    expected = T.functional.pil_to_tensor(T.functional.center_crop(Image.open(path).convert("RGB"), 64))
    assert torch.equal(CentreCrop(70, 64)(path, seed=0), expected)


READERS = {"folder": FitSquare(16), "imagenet": CentreCrop(16, 16)}


@pytest.fixture(params=READERS)
def read(request, recwarn):
    """Both readers, without a warning: read(path) -> uint8 (3, 16, 16)."""
    yield lambda path: READERS[request.param](path, seed=0)
    assert not recwarn.list


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "P bytes", "RGB", "L", "1"])
def test_transparency_is_laid_on_white(tmp_path, read, mode):
    """A left half that is black and opaque, a right half that is black and transparent, and in RGBA a grey stripe."""
    alpha = np.zeros((16, 16), np.uint8)
    alpha[:, :8], alpha[0] = 255, 51 if mode in ("RGBA", "LA") else alpha[1]
    expected = np.where(alpha == 255, 0, 255 - alpha)
    if mode in ("RGBA", "LA"):
        black = Image.new("RGB" if mode == "RGBA" else "L", (16, 16))
        black.putalpha(Image.fromarray(alpha))
        black.save(tmp_path / "a.png")
    elif mode.startswith("P"):
        palette = Image.fromarray(np.where(alpha == 255, 1, 0).astype(np.uint8), "P")
        palette.putpalette([0] * 768)
        palette.save(tmp_path / "a.png", transparency=bytes([0, 255]) if mode == "P bytes" else 0)
    else:  # a colour that stands for transparent: red, or white
        colour = {"RGB": (255, 0, 0), "L": 200, "1": 1}[mode]
        image = Image.new(mode, (16, 16))
        image.paste(colour, (8, 0, 16, 16))
        image.save(tmp_path / "a.png", transparency=255 if mode == "1" else colour)
    assert np.array_equal(read(tmp_path / "a.png").numpy(), np.broadcast_to(expected, (3, 16, 16)))


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_sixteen_bit_images_are_scaled_to_eight(tmp_path, read, suffix):
    ramp = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
    Image.fromarray(ramp).save(tmp_path / f"a.{suffix}")
    assert np.array_equal(read(tmp_path / f"a.{suffix}").numpy(), np.broadcast_to(ramp // 257, (3, 16, 16)))


@pytest.mark.parametrize(("kind", "words"), [(np.float32, "floating-point values"), (np.int32, "32-bit values")])
def test_values_without_a_known_range_are_refused_by_name(tmp_path, read, kind, words):
    Image.fromarray(np.linspace(0, 1, 256).reshape(16, 16).astype(kind)).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match=f"{words} without a known range"):
        read(tmp_path / "a.tif")
    assert words in ImageFiles([tmp_path / "a.tif"], FileCheck())[0, 0][2], "found before training, too"


@pytest.mark.parametrize("damaged", [False, True])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_are_turned_upright_whatever_else_exif_holds(tmp_path, read, orientation, damaged):
    picture = Image.new("RGB", (16, 16))
    picture.paste((255, 255, 255), (0, 0, 16, 8))
    picture.paste((255, 255, 255), (0, 0, 4, 16))
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif[0x010F] = "maker"
    content = exif.tobytes()
    if damaged:  # a tag that points behind the end
        content = content.replace(b"\x0f\x01\x02\x00\x06\x00\x00\x00", b"\x0f\x01\x02\x00\xff\xff\xff\x7f")
        content = content.replace(b"\x01\x0f\x00\x02\x00\x00\x00\x06", b"\x01\x0f\x00\x02\x7f\xff\xff\xff")
        assert content != exif.tobytes()
    picture.save(tmp_path / "a.jpg", exif=content, quality=95)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        decoded = Image.open(tmp_path / "a.jpg").convert("RGB")
        undamaged = Image.Exif()
        undamaged[0x0112] = orientation
        decoded.info["exif"] = undamaged.tobytes()
        expected = np.asarray(ImageOps.exif_transpose(decoded))
    assert np.array_equal(read(tmp_path / "a.jpg").permute(1, 2, 0).numpy(), expected)


def test_the_quick_check_finds_damage_and_decodes_few_files(tmp_path, monkeypatch):
    whole = photograph(tmp_path / "whole.jpg")
    content = whole.read_bytes()
    cases = {
        "whole.jpg": (content, None),
        "trailing.jpg": (content + b"\0" * 500, None),
        "cut.jpg": (content[: len(content) // 2], "truncated"),
        "text.jpg": (b"no image", "cannot identify"),
        "empty.jpg": (b"", "cannot identify"),
        "whole.png": (photograph(tmp_path / "b.png").read_bytes(), None),
        "cut.png": ((tmp_path / "b.png").read_bytes()[:-300], "truncated"),
        "other.bmp": (photograph(tmp_path / "c.bmp").read_bytes(), None),
    }
    for name, (data, _) in cases.items():
        (tmp_path / name).write_bytes(data)
    decoded, decode = [], imagefiles.read_rgb
    monkeypatch.setattr(imagefiles, "read_rgb", lambda path: (decoded.append(path.name), decode(path))[1])
    paths = [tmp_path / name for name in [*cases, "missing.jpg"]]
    checked = ImageFiles(paths, FileCheck())
    for path, reason in zip(paths, [checked[0, i][2] for i in range(len(paths))], strict=True):
        expected = cases.get(path.name, (None, "No such file"))[1]
        assert (reason is None) if expected is None else (str(path) in reason and expected in reason), (path, reason)
    assert decoded == ["trailing.jpg", "cut.jpg", "cut.png", "other.bmp"]


# The data set


@pytest.fixture
def tree(tmp_path):
    """Two classes with eight images each for training, three each for validation."""
    for split, count in (("train", 8), ("val", 3)):
        for c, i in itertools.product(range(2), range(count)):
            photograph(tmp_path / "data" / split / f"n0{c}" / f"{i}.JPEG", 40 + i, 50, seed=10 * c + i)
    return tmp_path / "data"


def imagenet(tree, **settings):
    plain = {"dataset": "imagenet", "dataroot": str(tree), "image_size": 24, "eval_view": (28, 24), "crop_padding": 0}
    return Config(**plain | {"batch_size": 4, "workers": 0} | settings)


def test_only_training_images_are_cropped_at_random(tree):
    data = load_data(imagenet(tree, valid_size=4), CPU)
    assert isinstance(data.train, StreamedSplit)
    assert data.classes == ("n00", "n01")
    assert [len(split.labels) for split in (data.train, data.valid, data.test)] == [12, 4, 6]
    index = [torch.arange(4)]
    for split, epochs_agree in ((data.train, False), (data.valid, True), (data.test, True)):
        (first,), (second,) = (list(split.batches(index, epoch)) for epoch in (0, 1))
        assert first[0].shape == (4, 3, 24, 24)
        assert first[0].dtype == torch.uint8
        assert torch.equal(first[0], second[0]) is epochs_agree
    ((images, labels),) = data.test.batches([torch.tensor([5, 0])])
    assert labels.tolist() == [1, 0]
    assert torch.equal(images[0], CentreCrop(28, 24)(tree / "val" / "n01" / "2.JPEG", seed=0))


def test_damaged_files_are_named_before_training_or_skipped(tree, capsys):
    damaged = tree / "train" / "n01" / "3.JPEG"
    damaged.write_bytes(damaged.read_bytes()[:400])
    with pytest.raises(
        UserError, match=r"1 of 16 images cannot be read, first .*n01.3\.JPEG .*\n.*skip_unreadable=true"
    ):
        load_data(imagenet(tree), CPU)
    data = load_data(imagenet(tree, skip_unreadable=True), CPU)
    assert data.train.labels.tolist() == [0] * 8 + [1] * 7
    assert "warning: skipped 1 of 16 images, first " in capsys.readouterr().err


def test_an_unchecked_damaged_training_image_is_replaced(tree, capsys):
    damaged = tree / "train" / "n00" / "7.JPEG"  # the last of its class
    damaged.write_bytes(damaged.read_bytes()[:400])
    data = load_data(imagenet(tree, check_files=False), CPU)
    ((images, labels),) = data.train.batches([torch.tensor([6, 7])], epoch=1)
    assert labels.tolist() == [0, 1], "the label goes with the image"
    draws = keyed_seed(0, "crop", 1, 7)
    assert torch.equal(images[1], RandomCrop(24, flip=True)(tree / "train" / "n01" / "0.JPEG", draws))
    assert "warning: an image cannot be read and is replaced by the next one: " in capsys.readouterr().err
    (tree / "train" / "n01" / "0.JPEG").write_bytes(b"")
    with pytest.raises(UserError, match=r"an image cannot be read: .*n00.7\.JPEG"):
        list(data.train.batches([torch.tensor([6, 7])]))


def test_test_images_are_never_replaced(tree):
    split, _ = load_test(imagenet(tree, check_files=False), CPU)
    (tree / "val" / "n00" / "1.JPEG").write_bytes(b"")
    with pytest.raises(UserError, match=r"an image cannot be read: .*n00.1\.JPEG"):
        list(split.batches([torch.arange(6)]))


def test_a_streamed_image_that_is_damaged_later_is_replaced(tree, capsys):
    config = Config(dataset="folder", dataroot=str(tree), image_size=24, batch_size=4, workers=0, resident_gb=1e-9)
    data = load_data(config, CPU)
    assert not isinstance(data.train, ResidentSplit)
    (tree / "train" / "n00" / "2.JPEG").write_bytes(b"")
    ((images, labels),) = data.train.batches([torch.tensor([2, 3])])
    assert labels.tolist() == [0, 0]
    assert torch.equal(images[0], images[1])
    assert "is replaced by the next one" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")  # torch's own forks
def test_an_imagenet_run_resumes_exactly_and_is_scored_twice(script, tree, tmp_path):
    settings = ("dataset=imagenet", "image_size=32", "eval_view=[36,32]", "crop_padding=0", "cutout=0", "workers=2")
    said = ("--dataroot", tree, "--logdir", tmp_path, "--set", *TINY, "train_size=16", "batch_size=8", *settings)
    for name, *flags in (["whole"], ["parts", "--stop_epoch", 1], ["parts", "--resume"]):
        done = script("main.py", "--name", name, *flags, *said)
        assert done.status == 0, done.err
    for file in ("metrics.jsonl", "policies.jsonl"):
        assert (tmp_path / "parts" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    model = tmp_path / "whole" / "model.pt"
    last = json.loads((tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()[-1])
    assert script("evaluate.py", "--checkpoint", model).status == 0
    results = json.loads((tmp_path / "whole" / "results.json").read_text())
    (cell,) = results["benchmarks"]["clean"]["cells"]
    assert (cell["images"], cell["top1"], cell["loss"]) == (6, last["test_top1"], last["test_loss"])
    larger = script("evaluate.py", "--checkpoint", model, "--set", "eval_view=[64,64]", "--overwrite")
    assert larger.status == 0
    other = json.loads((tmp_path / "whole" / "results.json").read_text())
    assert other["scored_with"]["eval_view"] == [64, 64]
    assert other["benchmarks"]["clean"]["summary"]["loss"] != cell["loss"]
