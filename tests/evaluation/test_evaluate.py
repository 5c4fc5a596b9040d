"""Scores against counting by hand; checkpoints of ours and of others."""

import hashlib
import json
import os
import shutil
import signal
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ALONE, TINY, assert_refused, scripts_on_ranks

import evaluate
from config import Config
from dataloader import Normalise
from datasets.loading import load_test
from datasets.splits import ResidentSplit
from evaluation.corruptions import CORRUPTIONS
from evaluation.metrics import Scores
from evaluation.predict import predict, score
from models import build_model
from training.lock import sole_writer
from utils import load_tensors, sha256_of

CPU = torch.device("cpu")


class Oracle(torch.nn.Module):
    """Logits are read off the first pixel: its red value names the class that gets the highest."""

    def __init__(self, classes):
        super().__init__()
        self.classes = classes

    def forward(self, x):
        return F.one_hot((x[:, 0, 0, 0] * 255).round().long(), self.classes).float() * 3


def as_split(predicted, labels):
    images = torch.zeros(len(labels), 3, 4, 4, dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.tensor(predicted, dtype=torch.uint8)
    return ResidentSplit(images, torch.tensor(labels))


PLAIN = Normalise(Config(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)), CPU)


def test_counts_and_loss_by_hand():
    predicted, labels = [0, 1, 2, 3, 4, 5, 6, 6], [0, 1, 2, 3, 0, 0, 6, 6]
    scores = score(Oracle(7), as_split(predicted, labels), 7, PLAIN, ALONE)
    assert (scores.images, scores.top1_correct, scores.top1) == (8, 6, 0.75)
    assert scores.class_images == [3, 1, 1, 1, 0, 0, 2]
    assert scores.class_correct == [1, 1, 1, 1, 0, 0, 2]
    logits = F.one_hot(torch.tensor(predicted), 7).double() * 3
    assert scores.loss == pytest.approx(F.cross_entropy(logits, torch.tensor(labels)).item(), rel=1e-6)


def test_every_image_counts_once_at_any_batch_size():
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(10, (1003,), generator=g).tolist()
    predicted = torch.randint(10, (1003,), generator=g).tolist()
    expected = sum(a == b for a, b in zip(predicted, labels, strict=True))
    results = []
    for batch in (1003, 256, 17):
        predictions = predict(Oracle(10), as_split(predicted, labels), PLAIN, ALONE, batch=batch)
        results.append(Scores.of(predictions, 10))
    assert {(scores.images, scores.top1_correct) for scores in results} == {(1003, expected)}
    assert max(scores.loss for scores in results) - min(scores.loss for scores in results) < 1e-6


def test_top5_counts_the_five_highest_logits():
    class Ranking(torch.nn.Module):
        def forward(self, x):
            return -torch.arange(8.0).expand(len(x), 8)  # ranks the classes 0, 1, 2, ...

    scores = score(Ranking(), as_split([0] * 8, list(range(8))), 8, PLAIN, ALONE)
    assert (scores.top1_correct, scores.top5_correct) == (1, 5)
    assert score(Oracle(5), as_split([0, 1], [0, 1]), 5, PLAIN, ALONE).top5 is None


def test_scoring_leaves_the_model_as_it_was():
    model = build_model("wresnet10_1", 10).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    score(model, as_split([0, 1], [0, 1]), 10, PLAIN, ALONE)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.fixture(scope="module")
def trained_once(tmp_path_factory):
    return tmp_path_factory.mktemp("once") / "scored"


@pytest.fixture
def run(train, trained_once, tmp_path):
    """A run of three epochs, each test's own; trained by the first."""
    if trained_once.exists():
        return shutil.copytree(trained_once, tmp_path / "scored")
    run = train("scored", "eval_every=1")
    shutil.copytree(run, trained_once)
    return run


def test_a_run_is_found_and_scored_as_in_training(script, run, tmp_path):
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    for arguments in (
        ("--logdir", tmp_path, "--name", "scored"),
        ("--checkpoint", run / "model.pt"),
        ("--checkpoint", run),
    ):
        done = script("evaluate.py", *arguments)
        assert done.status == 0, done.err
        results = json.loads((run / "results.json").read_text())
        clean = results["benchmarks"]["clean"]
        (cell,) = clean["cells"]
        assert (cell["images"], cell["top1"], cell["loss"]) == (2000, last["test_top1"], last["test_loss"])
        assert (results["epoch"], results["seed"], results["precision"]) == (3, 0, "float32")
        assert results["sha256"] == sha256_of(run / "model.pt")
        assert clean["source"] == "embedded"
        assert torch.__version__.startswith(clean["environment"]["torch"])
        assert sum(cell["class_correct"]) == round(cell["top1"] * 2000)
        assert cell["class_images"] == [200] * 10
        assert f"{100 * cell['top1']:.2f}" in done.out
        assert "crescent" in done.out
        (run / "results.json").unlink()


def test_the_three_arguments_of_training_find_the_run(script, tmp_path):
    (tmp_path / "my.yaml").write_text("\n".join(word.replace("=", ": ") for word in TINY) + "\ndataset: shapes\n")
    same_three = ("--load_conf", tmp_path / "my.yaml", "--logdir", tmp_path / "logs", "--seed", 5)
    assert script("main.py", *same_three).status == 0
    assert script("evaluate.py", *same_three).status == 0
    assert json.loads((tmp_path / "logs" / "my_5" / "results.json").read_text())["config"]["seed"] == 5


@pytest.mark.parametrize("wrap", [
    lambda weights: weights,
    lambda weights: {f"module.{name}": value for name, value in weights.items()},
    lambda weights: {"state_dict": {f"_orig_mod.module.{name}": value for name, value in weights.items()}, "epoch": 3},
])  # fmt: skip
def test_state_dicts_of_other_programs_are_scored(script, run, tmp_path, wrap):
    weights = load_tensors(run / "model.pt")["model"]
    torch.save(wrap(weights), tmp_path / "theirs.pth")
    as_trained = ("--load_conf", "confs/demo.yaml", "--set", "image_size=8")
    done = script("evaluate.py", "--model", "wresnet10_1", "--weights", tmp_path / "theirs.pth", *as_trained)
    assert done.status == 0, done.err
    results = json.loads((tmp_path / "theirs.pth.results.json").read_text())
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert results["benchmarks"]["clean"]["summary"]["top1"] == last["test_top1"]


def test_scores_belong_to_the_recorded_hash(script, run, tmp_path, monkeypatch):
    """A run that is still trained may replace its model.pt between the two."""
    load = torch.load

    def replaced(file, **options):
        content = load(file, **options)
        other = tmp_path / "other.pt"
        torch.save(content | {"epoch": 99}, other)
        other.rename(run / "model.pt")
        return content

    before = (run / "model.pt").read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(torch, "load", replaced)
        assert script("evaluate.py", "--checkpoint", run / "model.pt").status == 0
    scored = json.loads((run / "results.json").read_text())
    assert scored["sha256"] == hashlib.sha256(before).hexdigest()
    assert scored["epoch"] != 99


def test_checkpoints_that_cannot_be_scored(script, run, tmp_path):
    model = run / "model.pt"
    assert_refused(
        script("evaluate.py", "--logdir", tmp_path, "--name", "none"), "none/model.pt: there is no such", str(run)
    )
    assert_refused(script("evaluate.py", "--checkpoint", tmp_path / "x.pt"), "x.pt: there is no such checkpoint")
    assert_refused(
        script("evaluate.py", "--checkpoint", model, "--load_conf", "confs/cifar10/wresnet28x10_cifar10.yaml"),
        "is a wresnet10_1 for shapes", "asks for a wresnet28_10 for cifar10",
    )  # fmt: skip
    named = ("--logdir", tmp_path, "--name", "scored", "--load_conf", "confs/cifar10/wresnet28x10_cifar10.yaml")
    assert_refused(script("evaluate.py", *named), "is a wresnet10_1 for shapes", "asks for a wresnet28_10 for cifar10")
    lost = ("--checkpoint", model, "--output", tmp_path / "missing" / "results.json")
    assert_refused(script("evaluate.py", *lost), "missing/results.json: there is no directory")
    (tmp_path / "broken.pt").write_bytes(model.read_bytes()[:1000])
    assert_refused(
        script("evaluate.py", "--checkpoint", tmp_path / "broken.pt"), "broken.pt: cannot be read as a checkpoint"
    )
    for content in (b"Some text.", b"\x00" * 100):
        (tmp_path / "other.txt").write_bytes(content)
        done = script("evaluate.py", "--checkpoint", tmp_path / "other.txt")
        assert_refused(done, "other.txt: cannot be read as a checkpoint (it was not written by torch.save)")
    torch.save(load_tensors(model)["model"], tmp_path / "plain.pt")
    assert_refused(script("evaluate.py", "--checkpoint", tmp_path / "plain.pt"), "is not a model.pt", "--weights")
    of_demo = ("--load_conf", "confs/demo.yaml")
    wrong = ("--model", "wresnet16_1", "--weights", tmp_path / "plain.pt", *of_demo)
    assert_refused(script("evaluate.py", *wrong), "plain.pt: does not fit wresnet16_1 with 10 classes", "is missing")
    for key, value in (("config", 3), ("classes", None), ("model", []), ("epoch", "last")):
        torch.save(load_tensors(model) | {key: value}, tmp_path / "odd.pt")
        assert_refused(script("evaluate.py", "--checkpoint", tmp_path / "odd.pt"), "odd.pt: is not a model.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    assert_refused(
        script("evaluate.py", "--model", "wresnet10_1", "--weights", tmp_path / "list.pt", *of_demo),
        "does not hold a state dict",
    )
    assert_refused(script("evaluate.py", "--model", "wresnet10_1"), "--model and --weights go together")
    assert_refused(script("evaluate.py", "--set", "lr=x"), "--set: lr: 'x' is not a number")
    assert not list(tmp_path.rglob("*results.json"))


def test_plots_that_fail_do_not_lose_the_scores(script, run, monkeypatch):
    def fail(*_):
        raise RuntimeError("no font")

    monkeypatch.setattr(evaluate, "draw_plots", fail)
    done = script("evaluate.py", "--checkpoint", run / "model.pt")
    assert (done.status, "plots of clean cannot be drawn (no font)" in done.err) == (0, True)
    assert "crescent" in done.out
    (run / "results.json").unlink()


def test_classes_with_any_name_are_trained_scored_and_shown(script, train, with_axes, tmp_path, own_images):
    """Not UTF-8, without a glyph in the font of the plots, and with control characters."""
    names = (b"caf\xe9", "\u732b".encode(), b"a\x1b[31m")
    for split in ("train", "test"):
        for name in names:
            shutil.copytree(own_images / split / "cats", own_images / split / os.fsdecode(name))
    run = train("odd", "dataset=folder", "image_size=16", "--dataroot=" + str(own_images), "epochs=1", "eval_every=1")
    done = script("evaluate.py", "--checkpoint", run, "--dataroot", own_images)
    assert done.status == 0, done.err
    assert not [line for line in done.err.splitlines() if "warning" in line or "Glyph" in line]
    drawn = {path.name for path in (run / "evaluation").glob("*.png")}
    assert drawn == {"clean_reliability.png", "clean_mistakes.png"}
    done = script("report.py", run)
    assert done.status == 0, done.err


def test_weights_of_other_classes_are_refused(script, run, tmp_path):
    content = load_tensors(run / "model.pt")
    content["classes"] = content["classes"][::-1]
    torch.save(content, tmp_path / "other.pt")
    assert_refused(script("evaluate.py", "--checkpoint", tmp_path / "other.pt"), "its classes are not those expected")


# Several subsets, several checkpoints


@pytest.fixture
def corrupted(script, tmp_path, run):
    """A generated corruption set of the embedded test images, cut down to ten of them."""
    folder = tmp_path / "data" / "generated-c-shapes"
    folder.mkdir(parents=True)
    split, classes = load_test(Config(dataset="shapes", image_size=8), CPU)
    rng = np.random.default_rng(0)
    np.save(folder / "labels.npy", np.tile(split.labels[:10].numpy(), 5))
    for row in CORRUPTIONS:
        noise = rng.integers(0, 60, (50, 8, 8, 3), dtype=np.uint8)
        np.save(folder / f"{row.name}.npy", noise + 150)
    files = {path.name: sha256_of(path) for path in folder.glob("*.npy")}
    made = {"test_set": split.fingerprint(), "classes": list(classes), "side": 8, "files": files}
    (folder / "generated.json").write_text(json.dumps(made))
    return ("evaluate.py", "--checkpoint", run / "model.pt", "--dataroot", folder.parent, "--benchmarks", "generated-c")


def without_times(file):
    content = json.loads(file.read_text())
    for record in content["benchmarks"].values():
        del record["finished"], record["environment"]["command"]
        for cell in record["cells"]:
            del cell["seconds"]
    return content


def test_an_interrupted_evaluation_continues(script, corrupted, run, monkeypatch):
    assert script(*corrupted).status == 0
    whole = without_times(run / "results.json")
    (run / "results.json").unlink()
    scored = []

    def stopping(*arguments, **options):
        if len(scored) == 7:
            raise KeyboardInterrupt
        scored.append(arguments[1])
        return predict(*arguments, **options)

    monkeypatch.setattr(evaluate, "predict", stopping)
    done = script(*corrupted)
    assert done.status == 130
    assert "the same command continues with the rest" in done.err
    assert len(json.loads((run / "results.json").read_text())["benchmarks"]["generated-c"]["cells"]) == 7
    scored[:] = [None] * 8  # and no more stops
    done = script(*corrupted)
    assert done.status == 0, done.err
    assert len(scored) == 8 + 95 - 7
    assert without_times(run / "results.json") == whole
    assert script(*corrupted).out == done.out
    assert len(scored) == 8 + 95 - 7, "nothing was lacking"
    assert script(*corrupted, "--overwrite").status == 0
    assert len(scored) == 8 + 95 - 7 + 95


def wait_for_a_cell(process, run):
    for _ in range(12_000):
        if (run / "results.json").exists() or process.poll() is not None:
            return
        time.sleep(0.01)


@pytest.mark.slow
def test_sigterm_keeps_finished_scores(script, start_process, corrupted, run):
    """In a process of its own, which keeps all others from the file as long as it lives."""
    process = start_process(*corrupted, "--batch_size", 1, "--benchmarks", "generated-c", "clean")
    wait_for_a_cell(process, run)
    refused = script(*corrupted)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    said = "terminated; finished scores are saved; the same command continues with the rest\n"
    assert (process.returncode, out, err) == (143, "", said)
    assert_refused(refused, f"{run / 'results.json'}: is being written by process {process.pid} on ", "--output")
    assert not (run / "results.json.lock").exists()
    kept = json.loads((run / "results.json").read_text())["benchmarks"]["generated-c"]["cells"]
    assert len(kept) >= 1
    done = script(*corrupted)
    assert done.status == 0, done.err
    cells = json.loads((run / "results.json").read_text())["benchmarks"]["generated-c"]["cells"]
    assert len(cells) == 95
    assert cells[: len(kept)] == kept


@pytest.mark.parametrize("of", [{0, 1}, *(pytest.param({rank}, marks=pytest.mark.slow) for rank in (0, 1))])
def test_sigterm_of_several_processes_is_reported_once(corrupted, run, monkeypatch, of):
    """They all get it from a launcher; or one does by itself, and the other fails in its wake."""
    scored = []

    def stopping(*arguments, **options):
        if len(scored) == 3 and arguments[3].rank in of:
            os.kill(os.getpid(), signal.SIGTERM)
        scored.append(arguments)
        return predict(*arguments, **options)

    monkeypatch.setattr(evaluate, "predict", stopping)
    done = scripts_on_ranks(2, *corrupted)
    assert [rank.status for rank in done] == [143 if number in of else 2 for number in (0, 1)]
    said = "terminated; finished scores are saved; the same command continues with the rest\n"
    assert "".join(rank.err for rank in done) == said
    assert len(json.loads((run / "results.json").read_text())["benchmarks"]["generated-c"]["cells"]) == 3
    assert not (run / "results.json.lock").exists()


def test_all_processes_end_if_the_main_one_is_refused(corrupted, run):
    with sole_writer(run / "results.json", ""):
        done = scripts_on_ranks(2, *corrupted)
    assert [rank.status for rank in done] == [2, 2]
    assert done[1].err == ""
    assert_refused(done[0], f"results.json: is being written by process {os.getpid()} on ")
    assert not (run / "results.json").exists()


def test_a_results_file_has_one_writer_at_a_time(script, run, tmp_path):
    """The run itself may still be trained, other files be written, and results be compared."""
    asked = ("evaluate.py", "--checkpoint", run / "model.pt")
    other = ("--output", tmp_path / "other.json")
    with sole_writer(run, ""):
        assert script(*asked).status == 0
    before = (run / "results.json").read_bytes()
    with sole_writer(run / "results.json", ""):
        refused = script(*asked, "--overwrite")
        assert_refused(refused, f"results.json: is being written by process {os.getpid()} on ", "name another file")
        assert script("evaluate.py", "--compare", run).status == 0
        assert script(*asked, *other).status == 0
        with sole_writer(tmp_path / "other.json", ""):
            assert_refused(script(*asked, *other), f"other.json: is being written by process {os.getpid()}")
    assert (run / "results.json").read_bytes() == before
    assert not list(run.rglob("*.lock"))
    assert script(*asked, "--overwrite").status == 0


@pytest.mark.slow
def test_scores_of_other_inputs_are_not_reused(script, corrupted, run, tmp_path):
    def of(file):
        record = json.loads(file.read_text())["benchmarks"]
        return {name: [cell["loss"] for cell in record["cells"]] for name, record in record.items()}

    def losses(*more):
        done = script(*corrupted, *more)
        assert done.status == 0, done.err
        return of(run / "results.json")["generated-c"]

    first = losses()
    assert script("evaluate.py", "--checkpoint", run / "model.pt").status == 0
    assert of(run / "results.json").keys() == {"generated-c", "clean"}, "what was scored before is kept"
    assert of(run / "results.json")["generated-c"] == first
    assert_refused(script(*corrupted, "--amp"), "holds scores with another precision", "--output")
    assert_refused(script(*corrupted, "--set", "mean=[0,0,0]"), "holds scores with another scored_with")
    assert script(*corrupted, "--set", "lr=3", "policy=none").status == 0
    said = json.loads((run / "results.json").read_text())["config"]
    assert (said["lr"], said["policy"]) == (0.1, "controller"), "those of the training"
    assert of(run / "results.json")["generated-c"] == first
    assert script(*corrupted, "--amp", "--output", tmp_path / "bfloat16.json").status == 0
    assert json.loads((tmp_path / "bfloat16.json").read_text())["precision"] == "bfloat16"
    bfloat16 = of(tmp_path / "bfloat16.json")["generated-c"]
    assert bfloat16 != first
    assert bfloat16 == pytest.approx(first, rel=0.05)
    assert script("evaluate.py", "--checkpoint", run / "model.pt", "--overwrite").status == 0
    assert of(run / "results.json")["generated-c"] == first, "that was not asked to be scored again"
    content = load_tensors(run / "model.pt")
    content["model"]["classifier.bias"] += torch.arange(10.0)
    torch.save(content, run / "model.pt")
    assert script(*corrupted, "--output", tmp_path / "bfloat16.json").status == 2
    assert "holds scores of earlier weights" in script(*corrupted).err
    assert losses() != first
    folder = tmp_path / "data" / "generated-c-shapes"
    np.save(folder / "fog.npy", np.load(folder / "fog.npy") // 2)
    made = json.loads((folder / "generated.json").read_text())
    made["files"]["fog.npy"] = sha256_of(folder / "fog.npy")
    (folder / "generated.json").write_text(json.dumps(made))
    before = of(run / "results.json")["generated-c"]
    after = losses()
    assert [a != b for a, b in zip(after, before, strict=True)] == [
        row.name == "fog" for row in CORRUPTIONS for _ in range(5)
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("key", "finished"), [("pillow", True), ("git_revision", False)])
def test_scores_of_other_versions_are_not_reused(script, corrupted, run, key, finished):
    assert script(*corrupted).status == 0
    content = json.loads((run / "results.json").read_text())
    record = content["benchmarks"]["generated-c"]
    record["environment"][key] = "other"
    for cell in record["cells"]:
        cell["loss"] = -1.0
    if not finished:
        record["summary"], record["cells"] = None, record["cells"][:3]
    (run / "results.json").write_text(json.dumps(content))
    assert script(*corrupted).status == 0
    cells = json.loads((run / "results.json").read_text())["benchmarks"]["generated-c"]["cells"]
    assert len(cells) == 95
    assert all(cell["loss"] > 0 for cell in cells)


def test_missing_plots_are_drawn_again(script, run, with_axes):
    asked = ("evaluate.py", "--checkpoint", run / "model.pt")
    assert script(*asked).status == 0
    shutil.rmtree(run / "evaluation")
    assert script(*asked).status == 0
    assert {path.name for path in (run / "evaluation").glob("*.png")} == {"clean_mistakes.png", "clean_reliability.png"}


def test_each_checkpoint_has_its_own_results_file(script, run, tmp_path):
    shutil.copy(run / "model.pt", run / "other.pt")
    done = script("evaluate.py", "--checkpoint", run / "model.pt", run / "other.pt", run / "other.pt")
    assert done.status == 0, done.err
    assert done.out.startswith("2 checkpoints")
    assert (run / "results.json").exists()
    assert (run / "other.pt.results.json").exists()
    output = tmp_path / "mine.json"
    output.write_text('{"notes": "of another kind"}')
    to_file = ("evaluate.py", "--checkpoint", run, "--output", output)
    assert_refused(script(*to_file), "mine.json: does not hold results")
    assert output.read_text() == '{"notes": "of another kind"}'
    assert script(*to_file, "--overwrite").status == 0
    assert json.loads(output.read_text())["benchmarks"]["clean"]["cells"][0]["images"] == 2000


@pytest.mark.slow
def test_several_seeds_and_several_files(script, tmp_path):
    (tmp_path / "my.yaml").write_text("\n".join(word.replace("=", ": ") for word in TINY) + "\ndataset: shapes\n")
    of_conf = ("--load_conf", tmp_path / "my.yaml", "--logdir", tmp_path / "logs")
    for seed in (0, 1):
        assert script("main.py", *of_conf, "--seed", seed).status == 0
    done = script("evaluate.py", *of_conf, "--seed", 0, 1, "--format", "csv")
    assert done.status == 0, done.err
    assert len(done.out.splitlines()) == 3
    runs = [tmp_path / "logs" / f"my_{seed}" for seed in (0, 1)]
    errors = [
        100 * json.loads((r / "results.json").read_text())["benchmarks"]["clean"]["summary"]["error"] for r in runs
    ]
    done = script("evaluate.py", "--checkpoint", *(r / "model.pt" for r in runs))
    (line,) = (line for line in done.out.splitlines() if line.startswith("clean (embedded) error"))
    *of_runs, mean, _, std = line.split()[3:]
    assert of_runs == [f"{error:.2f}" for error in errors]
    assert float(mean) == pytest.approx(sum(errors) / 2, abs=0.006)
    assert float(std) == pytest.approx(abs(errors[0] - errors[1]) / 2**0.5, abs=0.006)
    assert f"{mean} +- {std}" in script("evaluate.py", "--compare", *runs).out
    assert_refused(script("evaluate.py", *of_conf, "--seed", 0, 2), "my_2/model.pt: there is no such checkpoint")
    assert_refused(script("evaluate.py", *of_conf, "--seed", 0, 1, "--output", tmp_path / "x.json"), "names one file")
    assert_refused(
        script("evaluate.py", *of_conf, "--seed", 0, 1, "--name", "x"), "several seeds find runs by their conf"
    )
    assert_refused(script("evaluate.py", *of_conf, "--batch_size", 0), "--batch_size: 0 must be at least 1")
    assert_refused(script("evaluate.py", "--output", tmp_path), "name a file ending in .json")
    assert_refused(script("evaluate.py", "--output", tmp_path / "model.pt"), "name a file ending in .json")
    assert_refused(script("evaluate.py", "--compare", *runs, "--checkpoint", runs[0]), "--compare: scores nothing")
