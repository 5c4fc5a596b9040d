"""Benchmarks from arrays and trees made here, in the official layout: counted, checked, scored, fetched and damaged."""

import hashlib
import itertools
import json
import subprocess
import sys
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ALONE, ROOT, assert_refused, on_ranks
from PIL import Image

import evaluation.benchmarks as benchmarks
import evaluation.metrics as metrics
from config import Config
from dataloader import Normalise
from datasets.download import Downloads, Missing, Remote
from evaluation.benchmarks import SEQUENCES, EvalRequest, find_spec, fits
from evaluation.corruptions import EXTRA, SEVERITIES, STANDARD
from evaluation.predict import predict
from models import build_model
from utils import UserError, load_tensors

CPU = torch.device("cpu")
IMAGES = 20  # of a severity
PLAIN = Normalise(Config(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)), CPU)


class Oracle(torch.nn.Module):
    """Calls the class that the first pixel's red value names, with probability near 1."""

    def forward(self, x):
        return 30 * torch.nn.functional.one_hot((x[:, 0, 0, 0] * 255).round().long(), 10).float()


def labelled(shape, first_pixel, seed=0):
    """Noise of the given shape (..., 32, 32, 3), each image's class written into its first pixel."""
    images = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    images[..., 0, 0, 0] = first_pixel
    return images


@pytest.fixture
def cifar_c(tmp_path):
    """CIFAR-10-C with twenty images of each severity, balanced over ten classes, whose first pixel tells the class."""
    folder = tmp_path / "CIFAR-10-C"
    folder.mkdir()
    labels = np.tile(np.arange(IMAGES) % 10, 5).astype(np.uint8)
    for seed, name in enumerate((*STANDARD, *EXTRA)):
        np.save(folder / f"{name}.npy", labelled((5 * IMAGES, 32, 32, 3), labels, seed))
    np.save(folder / "labels.npy", labels)
    return folder


@pytest.fixture
def weights(tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "theirs.pth"
    torch.save(build_model("wresnet10_1", 10).state_dict(), path)
    return path


def request(root, dataset="cifar10", num_classes=10, classes=None, **settings):
    config = Config(dataset=dataset, dataroot=str(root), crop_padding=0, workers=0, **settings)
    return EvalRequest(config, classes, num_classes, CPU, Downloads(allowed=False, quiet=True))


def opened(name, asked):
    spec = find_spec(name)
    return spec.open(spec, asked)


def scored(model, benchmark, world=ALONE, **options):
    """Records of all cells, as evaluate.py makes them."""
    return [
        {"part": c.part}
        | metrics.measure(
            benchmark.kind, predict(model, c.open(), PLAIN, world, **options), 10, part=c.part, frames=c.frames
        )
        for c in benchmark.subsets
    ]


# Corruptions in arrays


def test_every_subset_is_a_fifth_of_its_file(cifar_c, tmp_path):
    benchmark = opened("cifar10-c", request(tmp_path))
    assert [(c.part, c.severity) for c in benchmark.subsets] == [
        (n, s) for n in (*STANDARD, *EXTRA) for s in SEVERITIES
    ]
    assert {c.images for c in benchmark.subsets} == {IMAGES}
    assert benchmark.source == "subset", "fewer than the official 50,000"
    for cell in benchmark.subsets[3:70:11]:
        file = np.load(cifar_c / f"{cell.part}.npy")[(cell.severity - 1) * IMAGES : cell.severity * IMAGES]
        ((images, labels),) = cell.open().batches([torch.arange(IMAGES)])
        assert np.array_equal(images.permute(0, 2, 3, 1).numpy(), file)
        assert labels.tolist() == [i % 10 for i in range(IMAGES)]


def test_errors_by_hand(cifar_c, tmp_path):
    """In fog of severity s, s of the twenty images show another class; in snow's last, all do."""
    for name, wrong in (("fog", (1, 2, 3, 4, 5)), ("snow", (0, 0, 0, 0, 20))):
        images = np.load(cifar_c / f"{name}.npy")
        for severity, count in zip(SEVERITIES, wrong, strict=True):
            start = (severity - 1) * IMAGES
            images[start : start + count, 0, 0, 0] = (images[start : start + count, 0, 0, 0] + 1) % 10
        np.save(cifar_c / f"{name}.npy", images)
    benchmark = opened("cifar10-c", request(tmp_path))
    found = metrics.summarise(benchmark.name, benchmark.kind, scored(Oracle(), benchmark))
    assert found["error"]["fog"] == pytest.approx((1 + 2 + 3 + 4 + 5) / 100)
    assert found["error"]["snow"] == pytest.approx(20 / 100)
    assert found["mean_corruption_error"] == pytest.approx((0.15 + 0.20) / 15)
    assert sum(error == 0.0 for error in found["error"].values()) == 17


def predictions_of_some(world, root):
    torch.manual_seed(0)
    model = build_model("wresnet10_1", 10)
    found = []
    for benchmark in (opened("cifar10-c", request(root)), opened("cifar10-p", request(root))):
        some = benchmark._replace(subsets=benchmark.subsets[::7])
        found += scored(model, some, world, batch=8)
    return found


def test_scores_do_not_depend_on_the_number_of_processes(cifar_c, cifar_p, tmp_path):
    alone = predictions_of_some(ALONE, tmp_path)
    for size in (2, 3):
        ranks = on_ranks(size, predictions_of_some, tmp_path)
        assert all(rank.result == alone for rank in ranks), [rank.err for rank in ranks]


def test_losses_do_not_depend_on_the_batch_size(cifar_c, tmp_path):
    torch.manual_seed(0)
    model = build_model("wresnet10_1", 10)
    benchmark = opened("cifar10-c", request(tmp_path))
    some = benchmark._replace(subsets=benchmark.subsets[::20])
    whole, pieces = scored(model, some, batch=IMAGES), scored(model, some, batch=7)
    assert [cell["correct"] for cell in whole] == [cell["correct"] for cell in pieces]
    assert [cell["loss"] for cell in whole] == pytest.approx([cell["loss"] for cell in pieces], abs=1e-6)


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("fog", np.zeros((100, 32, 32, 3), np.float32), "fog.npy: holds float32 of shape .* expected uint8 of shape"),
        ("fog", np.zeros((100, 3, 32, 32), np.uint8), r"fog.npy: holds uint8 of shape \(100, 3, 32, 32\); expected"),
        ("fog", np.zeros((99, 32, 32, 3), np.uint8), r"fog.npy: .*\(99, 32, 32, 3\); expected .*\(5 n, 32, 32, 3\)"),
        ("fog", np.zeros((50, 32, 32, 3), np.uint8), "fog.npy: holds 50 images, gaussian_noise.npy 100"),
        ("fog", np.zeros((0, 32, 32, 3), np.uint8), "fog.npy: holds uint8 of shape"),
        ("fog", np.array([{"a": 1}], dtype=object), "fog.npy: cannot be read as an array"),
        ("fog", np.asfortranarray(np.zeros((100, 32, 32, 3), np.uint8)), "fog.npy: is stored in column order"),
        ("labels", np.zeros(99, np.uint8), r"labels.npy: holds uint8 of shape \(99,\); expected 100 whole numbers"),
        ("labels", np.zeros(100, np.float32), "labels.npy: holds float32"),
        ("labels", np.full(100, 10, np.uint8), "labels.npy: holds labels 10..10; there are 10 classes"),
        ("labels", (np.arange(100) % 7).astype(np.uint8), "labels.npy: the five severities have different labels"),
    ],
)  # fmt: skip
def test_arrays_of_a_wrong_dtype_or_shape_are_refused(cifar_c, tmp_path, file, content, words):
    np.save(cifar_c / f"{file}.npy", content)
    with pytest.raises(UserError, match=words):
        opened("cifar10-c", request(tmp_path))


def test_truncated_missing_and_changed_files_are_noticed(cifar_c, tmp_path):
    fingerprint = opened("cifar10-c", request(tmp_path)).fingerprint
    whole = (cifar_c / "frost.npy").read_bytes()
    for content in (whole[:5000], whole[:20], b"", b"PK\x03\x04" + whole):
        (cifar_c / "frost.npy").write_bytes(content)
        with pytest.raises(UserError, match=r"frost.npy: cannot be read as an array"):
            opened("cifar10-c", request(tmp_path))
    (cifar_c / "frost.npy").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert opened("cifar10-c", request(tmp_path)).fingerprint != fingerprint
    (cifar_c / "frost.npy").unlink()
    with pytest.raises(UserError, match=r"CIFAR-10-C: lacks frost.npy"):
        opened("cifar10-c", request(tmp_path))


def test_extra_corruptions_may_be_absent(cifar_c, tmp_path):
    for name in EXTRA:
        (cifar_c / f"{name}.npy").unlink()
    assert [c.part for c in opened("cifar10-c", request(tmp_path)).subsets[::5]] == list(STANDARD)


def test_official_files_must_have_the_published_md5(cifar_c, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmarks, "CIFAR_C_IMAGES", 5 * IMAGES)
    with pytest.raises(UserError, match=r"gaussian_noise.npy: has md5 .* instead of ecaf8b9a2399ff"):
        opened("cifar10-c", request(tmp_path))
    files = [*cifar_c.glob("*.npy")]
    hashes = {path.stem: hashlib.md5(path.read_bytes()).hexdigest() for path in files}
    monkeypatch.setitem(benchmarks.CIFAR10_C.keywords, "md5", hashes)
    benchmark = opened("cifar10-c", request(tmp_path))
    assert (benchmark.source, benchmark.checked_by) == ("official", "md5")


def test_the_published_hashes_are_unchanged():
    hashes = [*benchmarks.CIFAR10_C.keywords["md5"].values(), *benchmarks.CIFAR100_C.keywords["md5"].values()]
    archives = [benchmarks.CIFAR10_C.keywords["archive"], benchmarks.CIFAR100_C.keywords["archive"]]
    archives += benchmarks.IMAGENET_C.keywords["archives"]
    everything = "\n".join([*hashes, *(f"{a.url} {a.size} {a.md5}" for a in archives)])
    # Of the list as it was once compared with the published one: no digit changes unseen.
    assert (
        hashlib.sha256(everything.encode()).hexdigest()
        == "5754321474aa044a406fa491469fe7e41b30a81d16c824029577292573f62d2d"
    )


# From the address to the table


@pytest.fixture
def published(cifar_c, tmp_path, monkeypatch):
    """CIFAR-10-C.tar in the official layout, at an address that replaces the public one."""
    archive = tmp_path / "public" / "CIFAR-10-C.tar"
    archive.parent.mkdir()
    with tarfile.open(archive, "w") as tar:
        tar.add(cifar_c, "CIFAR-10-C")
    remote = Remote(archive.as_uri(), archive.stat().st_size, hashlib.md5(archive.read_bytes()).hexdigest())
    monkeypatch.setitem(benchmarks.CIFAR10_C.keywords, "archive", remote)
    return archive


def test_from_the_public_address_to_the_table(script, published, weights, tmp_path):
    root = tmp_path / "data"
    command = ("evaluate.py", "--model", "wresnet10_1", "--weights", weights, "--benchmarks", "cifar10-c")
    assert_refused(script(*command, "--dataroot", root, "--no-download"), "CIFAR-10-C.tar: is ", "by hand", str(root))
    done = script(*command, "--dataroot", root)
    assert done.status == 0, done.err
    assert "95 x 20 images, subset (checked by shape)" in done.out
    results = json.loads((tmp_path / "theirs.pth.results.json").read_text())["benchmarks"]["cifar10-c"]
    assert len(results["cells"]) == 95
    assert f"{100 * results['summary']['mean_corruption_error']:.2f}" in done.out
    for cell in results["cells"][::13]:  # against the model itself, image by image
        model = build_model("wresnet10_1", 10).eval()
        model.load_state_dict(load_tensors(weights))
        file = np.load(root / "CIFAR-10-C" / f"{cell['part']}.npy")
        images = torch.from_numpy(file[(cell["severity"] - 1) * IMAGES : cell["severity"] * IMAGES]).permute(0, 3, 1, 2)
        with torch.no_grad():
            logits = model(Normalise(Config(dataset="cifar10"), CPU)(images))
        assert cell["correct"] == int((logits.argmax(1) == torch.arange(IMAGES) % 10).sum())
    assert not (root / "CIFAR-10-C.tar").exists(), "a downloaded archive is removed after unpacking"
    published.unlink()
    again = script(*command, "--dataroot", root)
    assert (again.status, again.out) == (0, done.out), again.err


def test_a_mirror_replaces_the_public_address(published, tmp_path, monkeypatch):
    right = benchmarks.CIFAR10_C.keywords["archive"]
    asked = replace(request(tmp_path / "data"), downloads=Downloads(published.parent.as_uri(), quiet=True))
    for remote in (Remote(right.url, None, "0" * 32), Remote("file:///nowhere/CIFAR-10-C.tar", right.size, right.md5)):
        monkeypatch.setitem(benchmarks.CIFAR10_C.keywords, "archive", remote)
        if remote.md5 == right.md5:
            assert opened("cifar10-c", asked).subsets[0].images == IMAGES
        else:
            with pytest.raises(UserError, match=r"CIFAR-10-C.tar: .* md5"):
                opened("cifar10-c", asked)
            assert not (tmp_path / "data" / "CIFAR-10-C").exists()


# Perturbations


@pytest.fixture
def cifar_p(tmp_path):
    """CIFAR-10-P with four sequences of five frames, six of rotate; all frames of a sequence show its class."""
    folder = tmp_path / "CIFAR-10-P"
    folder.mkdir()
    for seed, name in enumerate(SEQUENCES):
        frames = 6 if name == "rotate" else 5
        np.save(folder / f"{name}.npy", labelled((4, frames, 32, 32, 3), np.arange(4)[:, None], seed))
    return folder


def test_flips_of_arrays_by_hand(cifar_p, tmp_path):
    for name in ("gaussian_noise", "brightness"):
        frames = np.load(cifar_p / f"{name}.npy")
        frames[1, 2, 0, 0, 0] = 7  # another class in the middle frame alone
        np.save(cifar_p / f"{name}.npy", frames)
    benchmark = opened("cifar10-p", request(tmp_path))
    records = scored(Oracle(), benchmark, batch=3)  # batches that end within sequences
    flips = {record["part"]: record["flips"] for record in records}
    assert flips == dict.fromkeys(SEQUENCES, 0) | {"gaussian_noise": 1, "brightness": 2}
    found = metrics.summarise(benchmark.name, benchmark.kind, records)
    assert found["flip_probability"]["gaussian_noise"] == 1 / 16
    assert found["flip_probability"]["brightness"] == 2 / 16
    assert found["mean_flip_probability"] == pytest.approx((1 / 16 + 2 / 16) / 10)
    assert [record["frames"] for record in records] == [6 if name == "rotate" else 5 for name in SEQUENCES]


def test_missing_or_wrong_perturbations_are_named(cifar_p, tmp_path):
    with pytest.raises(Missing, match=r"CIFAR-100-P: lacks gaussian_noise.npy.*\n.*by hand from https://drive"):
        opened("cifar100-p", request(tmp_path, "cifar100", 100))
    np.save(cifar_p / "tilt.npy", np.zeros((4, 1, 32, 32, 3), np.uint8))
    with pytest.raises(UserError, match=r"tilt.npy: holds .*expected uint8 of shape \(sequences, frames, 32, 32, 3\)"):
        opened("cifar10-p", request(tmp_path))
    np.save(cifar_p / "tilt.npy", np.zeros((3, 5, 32, 32, 3), np.uint8))
    with pytest.raises(UserError, match=r"CIFAR-10-P: its files hold different numbers of sequences \(3, 4\)"):
        opened("cifar10-p", request(tmp_path))
    (cifar_p / "tilt.npy").unlink()
    with pytest.raises(UserError, match=r"CIFAR-10-P: lacks tilt.npy\n"):
        opened("cifar10-p", request(tmp_path))


# Shifted test sets


def test_cifar10_1(tmp_path):
    folder = tmp_path / "CIFAR-10.1"
    folder.mkdir()
    for version, count in (("v4", 2021), ("v6", 2000)):
        labels = np.arange(count, dtype=np.int32) % 10
        np.save(folder / f"cifar10.1_{version}_data.npy", labelled((count, 32, 32, 3), labels))
        np.save(folder / f"cifar10.1_{version}_labels.npy", labels)
        benchmark = opened(f"cifar10.1-{version}", request(tmp_path))
        (record,) = scored(Oracle(), benchmark)
        assert (benchmark.subsets[0].images, record["error"], record["top5"]) == (count, 0.0, 1.0)
        assert record["class_images"] == [len(labels[labels == c]) for c in range(10)]
    data = folder / "cifar10.1_v6_data.npy"
    images = np.load(data)
    np.save(data, images[:1999])
    with pytest.raises(UserError, match=r"v6_data.npy: holds .*\(1999, 32, 32, 3\); expected"):
        opened("cifar10.1-v6", request(tmp_path))
    data.unlink()
    with pytest.raises(Missing, match=r"v6_data.npy: is missing\ndownload https://raw"):
        opened("cifar10.1-v6", request(tmp_path))


def photographs(folder, count, shade, size=224):
    folder.mkdir(parents=True)
    for i in range(count):
        Image.new("RGB", (size, size), (shade, i, 0)).save(folder / f"{i}.png")


class RedShade(torch.nn.Module):
    """Calls class c where the red value is 20 c."""

    def forward(self, x):
        return 30 * torch.nn.functional.one_hot((x[:, 0].mean((1, 2)) * 255 / 20).round().long(), 12).float()


def test_class_folders_of_imagenet_v2_are_numbers(tmp_path):
    """Twelve classes, so that sorting as text would put 10 and 11 after 1."""
    folder = tmp_path / "imagenetv2-top-images-format-val"
    for label in range(12):
        photographs(folder / str(label), 2, 20 * label)
    (folder / "3" / "notes.txt").write_text("no image")
    benchmark = opened("imagenet-v2-top-images", request(tmp_path, "imagenet", 12))
    assert (benchmark.source, benchmark.subsets[0].images) == ("subset", 24)
    predictions = predict(RedShade(), benchmark.subsets[0].open(), PLAIN, ALONE)
    assert predictions.correct_I.all()
    assert predictions.label_I.bincount().tolist() == [2] * 12
    (folder / "11").rename(folder / "12")
    with pytest.raises(UserError, match=r"its class folders are not 0\.\.11"):
        opened("imagenet-v2-top-images", request(tmp_path, "imagenet", 12))


@pytest.mark.parametrize(
    ("name", "number", "count"),
    [("imagenet-v2-top-images", "IMAGENET_V2_IMAGES", 24), ("cifar10-p", "CIFAR_P_SEQUENCES", 4)],
)
def test_without_a_hash_official_sets_are_recognised_by_size(cifar_p, tmp_path, monkeypatch, name, number, count):
    """ImageNet's have a thousand classes besides."""
    for label in range(12):
        photographs(tmp_path / "imagenetv2-top-images-format-val" / str(label), 2, 20 * label, size=8)
    asked = request(tmp_path, "imagenet", 12) if name.startswith("imagenet") else request(tmp_path)
    for images, classes, source in ((count, 12, "official"), (count + 1, 12, "subset"), (count, 13, "subset")):
        monkeypatch.setattr(benchmarks, number, images)
        monkeypatch.setattr(benchmarks, "IMAGENET_CLASSES", classes)
        if classes == 12 or name.startswith("imagenet"):
            assert opened(name, asked).source == source


def test_imagenet_c_is_scored_by_class_folders_as_stored(tmp_path):
    root, names = tmp_path / "ImageNet-C", ("n0", "n1")
    for corruption, severity, (label, name) in itertools.product(STANDARD, SEVERITIES, enumerate(names)):
        photographs(root / corruption / str(severity) / name, 2, 20 * label, size=32)
    pixels = np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(root / "fog" / "1" / "n1" / "0.png")
    asked = request(tmp_path, "imagenet", 2)
    benchmark = opened("imagenet-c", asked)
    assert len(benchmark.subsets) == 75
    assert {subset.images for subset in benchmark.subsets} == {4}
    assert benchmark.classes == names
    assert predict(RedShade(), benchmark.subsets[20].open(), PLAIN, ALONE).correct_I.all()
    subsets = {(subset.part, subset.severity): subset for subset in benchmark.subsets}
    ((images, labels),) = subsets["fog", 1].open().batches([torch.tensor([2])])
    assert np.array_equal(images[0].permute(1, 2, 0).numpy(), pixels)
    assert labels.tolist() == [1]
    (root / "snow" / "2" / "n0" / "0.png").write_bytes(b"")
    assert opened("imagenet-c", asked).fingerprint != benchmark.fingerprint
    with pytest.raises(UserError, match="an image cannot be read"):
        next(subsets["snow", 2].open().batches([torch.tensor([0])]))
    with pytest.raises(UserError, match=r"its classes are not the 1000 of the classifier"):
        opened("imagenet-c", request(tmp_path, "imagenet", 1000))
    (root / "fog" / "3" / "n0" / "0.png").unlink()
    with pytest.raises(UserError, match=r"fog/3: holds 3 images, others 4"):
        opened("imagenet-c", asked)
    (root / "fog" / "3").rename(root / "fog" / "6")
    with pytest.raises(UserError, match=r"fog/3: is missing"):
        opened("imagenet-c", asked)
    (root / "fog").rename(tmp_path / "fog")
    with pytest.raises(Missing, match=r"weather.tar: is missing\ndownload https://zenodo.org/records/2235448"):
        opened("imagenet-c", asked)


# Which fit


def test_which_benchmarks_fit_which_classifier():
    def fitting(config, classes=None, num_classes=None):
        number = num_classes or len(classes or benchmarks.CLASSES.get(config.dataset, 1) * [0])
        asked = EvalRequest(config, classes, number, CPU, Downloads())
        return {spec.name for spec in benchmarks.BENCHMARKS if fits(spec, asked)}

    any_data = {"clean", "generated-c"}
    of_cifar10 = any_data | {"cifar10-c", "cifar10-p", "cifar10.1-v4", "cifar10.1-v6"}
    assert fitting(Config(dataset="cifar10")) == of_cifar10
    assert fitting(Config(dataset="cifar10"), num_classes=100) == any_data
    assert fitting(Config(dataset="folder"), benchmarks.CIFAR10_CLASSES) == of_cifar10
    assert fitting(Config(dataset="folder", image_size=64), benchmarks.CIFAR10_CLASSES) == any_data
    assert fitting(Config(dataset="folder"), ("cats", "dogs")) == any_data
    assert fitting(Config(dataset="cifar100")) == any_data | {"cifar100-c", "cifar100-p"}
    of_imagenet = {name for name in fitting(Config(dataset="imagenet", crop_padding=0)) if name.startswith("imagenet")}
    assert len(of_imagenet) == 4


def test_unsuitable_and_unknown_benchmarks_are_refused(script, weights):
    plain = ("evaluate.py", "--model", "wresnet10_1", "--weights", weights)
    assert_refused(script(*plain, "--benchmarks", "cifar-c"), "'cifar-c' is none of clean, cifar10-c", "did you mean")
    assert_refused(
        script(*plain, "--set", "dataset=cifar10", "--benchmarks", "cifar100-c"),
        "cifar100-c: needs a classifier for cifar100's classes", "10 classes of cifar10; those that fit are clean",
    )  # fmt: skip
    assert_refused(script(*plain, "--benchmarks", "all", "clean"), "'all' cannot be combined")


def test_all_skips_what_is_missing_or_incomplete(script, cifar_c, cifar_p, weights, tmp_path):
    (cifar_p / "tilt.npy").unlink()
    (tmp_path / "CIFAR-10.1").mkdir()
    np.save(tmp_path / "CIFAR-10.1" / "cifar10.1_v6_data.npy", labelled((2000, 32, 32, 3), np.zeros(2000)))
    np.save(tmp_path / "CIFAR-10.1" / "cifar10.1_v6_labels.npy", np.zeros(2000, np.int32))
    plain = ("evaluate.py", "--model", "wresnet10_1", "--weights", weights, "--set", "dataset=cifar10")
    done = script(*plain, "--benchmarks", "all", "--dataroot", tmp_path, "--no-download")
    assert done.status == 0, done.err
    assert "cifar10-p is skipped: " in done.err
    assert "lacks tilt.npy" in done.err
    skipped = {line.split()[1] for line in done.err.splitlines() if "is skipped" in line}
    assert skipped == {"clean", "cifar10-p", "cifar10.1-v4", "generated-c"}
    found = json.loads((tmp_path / "theirs.pth.results.json").read_text())["benchmarks"]
    assert found.keys() == {"cifar10-c", "cifar10.1-v6"}
    assert "official (checked by shape)" in done.out
    (tmp_path / "file").write_bytes(b"")
    done = script(*plain, "--benchmarks", "all", "--dataroot", tmp_path / "file")
    assert done.status == 2
    assert done.err.count("is skipped") == 6
    assert "none that fits" in done.err.splitlines()[-1]


def test_weights_need_a_data_set_of_their_classes(script, tmp_path, weights):
    assert_refused(script("evaluate.py", "--model", "wresnet10_1", "--weights", weights), "name the data set it is for")
    torch.save(build_model("wresnet10_1", 12).state_dict(), tmp_path / "twelve.pth")
    twelve = ("evaluate.py", "--model", "wresnet10_1", "--weights", tmp_path / "twelve.pth")
    assert_refused(script(*twelve, "--set", "dataset=shapes"), "shapes: has 10 classes, and the classifier 12")
    assert_refused(script(*twelve, "--benchmarks", "cifar10-c"), "this one is for 12 classes of cifar10")


def test_outputs_that_are_not_finite_are_refused(script, cifar_c, weights, tmp_path):
    broken = load_tensors(weights)
    broken["classifier.bias"][3] = float("nan")
    torch.save(broken, tmp_path / "broken.pth")
    command = ("evaluate.py", "--model", "wresnet10_1", "--weights", tmp_path / "broken.pth")
    done = script(*command, "--benchmarks", "cifar10-c", "--dataroot", tmp_path)
    assert_refused(done, "cifar10-c gaussian_noise 1: the network gives values that are not finite")
    assert not (tmp_path / "broken.pth.results.json").exists()


def test_the_list_shows_which_benchmarks_are_there(script, cifar_c, tmp_path):
    done = script("evaluate.py", "--list", "--dataroot", tmp_path)
    assert done.status == 0, done.err
    rows = {line.split()[0]: line.split() for line in done.out.splitlines() if line}
    assert rows["cifar10-c"][2] == "yes"
    assert rows["cifar100-c"][2] == "no"
    assert rows["generated-c"][2] == "no"
    assert rows.keys() >= {spec.name for spec in benchmarks.BENCHMARKS if spec.name != "clean"}


@pytest.mark.slow
def test_official_sizes_are_scored_in_little_memory(tmp_path):
    """1.5 GB of images, in files full of holes: scored within a process that may not grow by a fifth of that."""
    code = f"""
import resource, sys
sys.path.insert(0, {str(ROOT)!r})
import numpy as np, torch
from config import Config
from dataloader import Normalise
from datasets.splits import MappedSplit
from evaluation.predict import predict
from training.distributed import World

cpu = torch.device("cpu")
model = torch.nn.Sequential(torch.nn.AvgPool2d(32), torch.nn.Flatten(), torch.nn.Linear(3, 10))
normalise, labels = Normalise(Config(), cpu), torch.zeros(10_000, dtype=torch.long)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
for number in range(10):
    path = {str(tmp_path)!r} + f"/{{number}}.npy"
    np.lib.format.open_memmap(path, "w+", np.uint8, (50_000, 32, 32, 3)).flush()
    for severity in range(5):
        predict(model, MappedSplit(path, severity * 10_000, labels, cpu), normalise, World((cpu,)))
        before = peak() if (number, severity) == (0, 0) else before
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 300
