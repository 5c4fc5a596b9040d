"""Corruptions of your own images: in the official layout, marked as generated, checked, continued after a stop."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import TINY, assert_refused
from PIL import Image

import evaluation.generated as generated
from config import Config
from datasets.download import Downloads
from evaluation.corruptions import CORRUPTIONS, corrupt
from evaluation.generated import draw_corruptions
from utils import UserError, keyed_generator

QUIET = Downloads(allowed=False, quiet=True)
NAMES = [row.name for row in CORRUPTIONS]


@pytest.fixture
def images(tmp_path):
    """Two classes of small photographs, three each to test on."""
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in ("cats", "dogs"):
            for i in range(3):
                path = tmp_path / "mine" / split / name / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                coarse = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
                coarse.resize((40, 36), Image.Resampling.BICUBIC).save(path)
    return tmp_path / "mine"


def of_folder(root, **settings):
    return Config(dataset="folder", dataroot=str(root), model="wresnet10_1", workers=0, **settings)


def test_the_layout_is_official_and_the_manifest_is_not(images):
    folder = draw_corruptions(of_folder(images), QUIET)
    made = json.loads((folder / "generated.json").read_text())
    assert made["classes"] == ["cats", "dogs"]
    assert (made["images"], made["side"], made["seed"]) == (6, 32, 0)
    assert "not the official" in made["generated"]
    assert np.load(folder / "labels.npy").tolist() == [0, 0, 0, 1, 1, 1] * 5
    for name in NAMES:
        array = np.load(folder / f"{name}.npy")
        assert (array.dtype, array.shape) == (np.uint8, (30, 32, 32, 3))
    assert made["files"].keys() == {f"{name}.npy" for name in (*NAMES, "labels")}


def test_draws_depend_on_the_seed_and_the_images_alone(images):
    config = of_folder(images)
    folder = draw_corruptions(config, QUIET)
    plain = torch.stack([
        torch.from_numpy(np.array(Image.open(path).resize((32, 32), Image.Resampling.BICUBIC, box=(2, 0, 38, 36))))
        for path in sorted((images / "test").rglob("*.png"))
    ]).permute(0, 3, 1, 2)  # fmt: skip
    for name, severity in (("contrast", 1), ("gaussian_noise", 3), ("frost", 5)):
        expected = corrupt(plain, name, severity, keyed_generator(0, "corruption", name, severity, 0))
        found = np.load(folder / f"{name}.npy")[(severity - 1) * 6 : severity * 6]
        assert np.array_equal(found, expected.permute(0, 2, 3, 1).numpy())
    before = {path.name: path.read_bytes() for path in folder.glob("*.npy")}
    for path in folder.iterdir():
        path.unlink()
    draw_corruptions(config, QUIET)
    assert {path.name: path.read_bytes() for path in folder.glob("*.npy")} == before
    for path in folder.iterdir():
        path.unlink()
    draw_corruptions(of_folder(images, seed=1), QUIET)
    same = {name for name in NAMES if (folder / f"{name}.npy").read_bytes() == before[f"{name}.npy"]}
    assert same == {row.name for row in CORRUPTIONS if not row.random}


def test_an_interrupted_set_is_completed(images, tmp_path, monkeypatch):
    config, drawn = of_folder(images), []

    def stopping(images_BCHW, name, severity, generator):
        if (name, severity) == ("fog", 3):
            raise KeyboardInterrupt
        drawn.append(name)
        return corrupt(images_BCHW, name, severity, generator)

    monkeypatch.setattr(generated, "corrupt", stopping)
    with pytest.raises(KeyboardInterrupt):
        draw_corruptions(config, QUIET)
    folder = generated.generated_folder(config)
    assert {path.stem for path in folder.glob("*.npy")} == {"labels", *NAMES[: NAMES.index("fog")]}
    assert not list(folder.glob("*.part"))
    drawn.clear()
    monkeypatch.setattr(generated, "corrupt", lambda *a: drawn.append(a[1]) or corrupt(*a))
    draw_corruptions(config, QUIET)
    assert list(dict.fromkeys(drawn)) == NAMES[NAMES.index("fog") :]
    in_parts = {path.name: path.read_bytes() for path in folder.glob("*.npy")}
    folder.rename(tmp_path / "aside")
    draw_corruptions(config, QUIET)
    assert {path.name: path.read_bytes() for path in folder.glob("*.npy")} == in_parts


def test_another_set_is_not_overwritten(images):
    folder = draw_corruptions(of_folder(images), QUIET)
    with pytest.raises(UserError, match="holds a set that differs in seed from the requested one"):
        draw_corruptions(of_folder(images, seed=1), QUIET)
    (folder / "generated.json").write_text("{")
    with pytest.raises(UserError, match=r"generated.json: cannot be read"):
        draw_corruptions(of_folder(images), QUIET)
    (folder / "generated.json").unlink()
    with pytest.raises(UserError, match="holds arrays that were not drawn by this program"):
        draw_corruptions(of_folder(images), QUIET)


def test_a_full_disk_is_noticed_before_drawing(images, monkeypatch):
    monkeypatch.setattr(generated.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(UserError, match=r"needs .* GB and 0\.0 are free"):
        draw_corruptions(of_folder(images), QUIET)


def test_a_set_of_an_earlier_version_is_resumed(images):
    """Its manifest names the program that drew it in other words."""
    folder = draw_corruptions(of_folder(images), QUIET)
    fog = (folder / "fog.npy").read_bytes()
    manifest = json.loads((folder / "generated.json").read_text())
    earlier = "corruptions drawn by robustness.py --make, not the official images; frost is procedural"
    (folder / "generated.json").write_text(json.dumps(manifest | {"generated": earlier}))
    (folder / "fog.npy").unlink()
    draw_corruptions(of_folder(images), QUIET)
    assert (folder / "fog.npy").read_bytes() == fog


def test_a_number_of_images_is_balanced_over_the_classes(images):
    whole = draw_corruptions(of_folder(images), QUIET)
    contrast = np.load(whole / "contrast.npy")[:6]
    with pytest.raises(UserError, match="differs in images from the requested one"):
        draw_corruptions(of_folder(images), QUIET, most=4)
    shutil.rmtree(whole)
    part = draw_corruptions(of_folder(images), QUIET, most=4)
    assert json.loads((part / "generated.json").read_text())["images"] == 4
    assert np.load(part / "labels.npy").tolist() == [0, 0, 1, 1] * 5
    drawn = [image.tobytes() for image in np.load(part / "contrast.npy")[:4]]
    positions = [[image.tobytes() for image in contrast].index(image) for image in drawn]
    assert positions == sorted(set(positions)), "without a random draw, an image is corrupted as in the whole set"
    with pytest.raises(UserError, match="--images 7: there are only 6 test images in folder"):
        draw_corruptions(of_folder(images), QUIET, most=7)


def test_from_your_own_images_to_the_table(script, images, tmp_path):
    settings = ("dataset=folder", f"dataroot={images}", "image_size=32", *TINY, "train_size=6", "batch_size=3")
    assert (
        script("main.py", "--logdir", tmp_path, "--name", "run", "--seed", 3, "--set", *settings, "epochs=1").status
        == 0
    )
    draw = ("evaluate.py", "--make-corruptions", "--checkpoint", tmp_path / "run")
    score = ("evaluate.py", "--checkpoint", tmp_path / "run", "--benchmarks", "clean", "generated-c")
    assert_refused(script(*draw), "only the checkpoint names it", "--dataroot DIR")
    assert_refused(script(*score), "there are no generated corruptions", "python evaluate.py --make-corruptions")
    done = script(*draw, "--dataroot", images)
    assert done.status == 0, done.err
    assert "generated, not official" in done.out
    folder = images / "generated-c-folder"
    assert json.loads((folder / "generated.json").read_text())["seed"] == 0, "not the run's"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert script("evaluate.py", "--make-corruptions", "--set", *settings).status == 0, "the same set"
    assert {name: (folder / name).read_bytes() for name in before if name.endswith(".npy")}.items() <= before.items()
    done = script(*score)
    assert done.status == 0, done.err
    assert "generated-c: error (%) by severity, 95 x 6 images, generated (checked by SHA-256)" in done.out
    assert "frost is procedural; not comparable with published numbers" in done.out
    snow = before["snow.npy"]
    (folder / "snow.npy").write_bytes(snow[:-1] + bytes([snow[-1] ^ 1]))
    assert_refused(script(*score), "snow.npy: has changed since it was drawn")
    assert script(*draw, "--dataroot", images).status == 0
    assert (folder / "snow.npy").read_bytes() == snow, "drawn again"
    manifest = json.loads((folder / "generated.json").read_text())
    without_fog = {name: sha256 for name, sha256 in manifest["files"].items() if name != "fog.npy"}
    (folder / "generated.json").write_text(json.dumps(manifest | {"files": without_fog}))
    assert_refused(script(*score), "fog has not been drawn yet", "python evaluate.py --make-corruptions")
    for key, value in (("classes", None), ("files", [1]), ("side", "32"), ("test_set", None)):
        (folder / "generated.json").write_text(json.dumps(manifest | {key: value}))
        assert_refused(script(*score), "generated.json: cannot be read")
    (folder / "generated.json").write_text(json.dumps(manifest))
    (images / "test" / "cats" / "2.png").unlink()
    assert_refused(script(*score), "was drawn from other test images than the present ones")
