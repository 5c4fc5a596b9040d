"""A corruption set of one's own images: drawn in the official layout, marked, checked, continued after a stop."""

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
from evaluation.generated import make
from utils import UserError, keyed_generator

QUIET = Downloads(allowed=False, quiet=True)
NAMES = [row.name for row in CORRUPTIONS]


@pytest.fixture
def images(tmp_path):
    """Two classes of small photographs of one's own, three each to test on."""
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


def test_a_set_is_in_the_official_layout_and_marked(images):
    folder = make(of_folder(images), QUIET)
    made = json.loads((folder / "generated.json").read_text())
    assert made["classes"] == ["cats", "dogs"]
    assert (made["images"], made["side"], made["seed"]) == (6, 32, 0)
    assert "not the official" in made["generated"]
    assert np.load(folder / "labels.npy").tolist() == [0, 0, 0, 1, 1, 1] * 5
    for name in NAMES:
        array = np.load(folder / f"{name}.npy")
        assert (array.dtype, array.shape) == (np.uint8, (30, 32, 32, 3))
    assert made["files"].keys() == {f"{name}.npy" for name in (*NAMES, "labels")}


def test_it_is_drawn_image_by_image_from_the_seed(images):
    config = of_folder(images)
    folder = make(config, QUIET)
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
    make(config, QUIET)
    assert {path.name: path.read_bytes() for path in folder.glob("*.npy")} == before
    for path in folder.iterdir():
        path.unlink()
    make(of_folder(images, seed=1), QUIET)
    same = {name for name in NAMES if (folder / f"{name}.npy").read_bytes() == before[f"{name}.npy"]}
    assert same == {row.name for row in CORRUPTIONS if not row.random}


def test_a_stopped_one_goes_on_with_what_is_lacking(images, tmp_path, monkeypatch):
    config, drawn = of_folder(images), []

    def stopping(images_BCHW, name, severity, generator):
        if (name, severity) == ("fog", 3):
            raise KeyboardInterrupt
        drawn.append(name)
        return corrupt(images_BCHW, name, severity, generator)

    monkeypatch.setattr(generated, "corrupt", stopping)
    with pytest.raises(KeyboardInterrupt):
        make(config, QUIET)
    folder = generated.generated_folder(config)
    assert {path.stem for path in folder.glob("*.npy")} == {"labels", *NAMES[: NAMES.index("fog")]}
    assert not list(folder.glob("*.part"))
    drawn.clear()
    monkeypatch.setattr(generated, "corrupt", lambda *a: drawn.append(a[1]) or corrupt(*a))
    make(config, QUIET)
    assert list(dict.fromkeys(drawn)) == NAMES[NAMES.index("fog") :]
    in_parts = {path.name: path.read_bytes() for path in folder.glob("*.npy")}
    folder.rename(tmp_path / "aside")
    make(config, QUIET)
    assert {path.name: path.read_bytes() for path in folder.glob("*.npy")} == in_parts


def test_another_set_is_not_written_over(images):
    folder = make(of_folder(images), QUIET)
    with pytest.raises(
        UserError, match="holds a set that differs in seed from what is asked for; remove it or move it"
    ):
        make(of_folder(images, seed=1), QUIET)
    (folder / "generated.json").write_text("{")
    with pytest.raises(UserError, match=r"generated.json: cannot be read"):
        make(of_folder(images), QUIET)
    (folder / "generated.json").unlink()
    with pytest.raises(UserError, match="holds arrays that were not drawn here"):
        make(of_folder(images), QUIET)


def test_a_full_disk_is_known_before(images, monkeypatch):
    monkeypatch.setattr(generated.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(UserError, match=r"needs .* GB and 0\.0 are free"):
        make(of_folder(images), QUIET)


def test_from_ones_own_images_to_the_table(script, images, tmp_path):
    mine = ("dataset=folder", f"dataroot={images}", "image_size=32", *TINY, "train_size=6", "batch_size=3", "epochs=1")
    assert script("main.py", "--logdir", tmp_path, "--name", "run", "--set", *mine).status == 0
    score = ("evaluate.py", "--logdir", tmp_path, "--name", "run", "--benchmarks", "clean", "generated-c")
    assert_refused(script(*score), "there are no generated corruptions", "python robustness.py --make")
    done = script("robustness.py", "--make", "--set", *mine)
    assert done.status == 0, done.err
    assert "generated, not official" in done.out
    done = script(*score)
    assert done.status == 0, done.err
    assert "generated-c: error (%) by severity, 95 x 6 images, generated (checked by SHA-256)" in done.out
    assert "frost is procedural; not comparable with published numbers" in done.out
    folder = images / "generated-c-folder"
    snow = (folder / "snow.npy").read_bytes()
    (folder / "snow.npy").write_bytes(snow[:-1] + bytes([snow[-1] ^ 1]))
    assert_refused(script(*score), "snow.npy: has another content than was published (sha256")
    assert script("robustness.py", "--make", "--set", *mine).status == 0
    assert (folder / "snow.npy").read_bytes() == snow, "drawn anew"
    assert script(*score).status == 0
    shutil.rmtree(folder)
    assert script("robustness.py", "--make", "--seed", 1, "--set", *mine).status == 0
    assert script(*score).status == 0, "another set in the place of one that was used"
    made = json.loads((folder / "generated.json").read_text())
    fog = made["files"].pop("fog.npy")
    (folder / "generated.json").write_text(json.dumps(made))
    assert_refused(script(*score), "fog has not been drawn yet", "python robustness.py --make")
    made["files"]["fog.npy"] = fog
    for key, value in (("classes", None), ("files", [1]), ("side", "32"), ("test_set", None)):
        (folder / "generated.json").write_text(json.dumps(made | {key: value}))
        assert_refused(script(*score), "generated.json: cannot be read")
    (folder / "generated.json").write_text(json.dumps(made))
    (images / "test" / "cats" / "2.png").unlink()
    assert_refused(script(*score), "was drawn of other test images than the present ones")
