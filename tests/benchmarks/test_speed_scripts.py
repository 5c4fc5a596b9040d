"""Every benchmark runs in tiny sizes, and its JSON file and its table agree.

The per-image pipeline for comparison makes the same inputs from the same draws.
"""

import json
import os
import platform
import random
import re
import statistics
import subprocess
import sys

import augment
import epoch
import loading
import pytest
import scoring
import signals as costs_of_sources
import step
import torch
from conftest import ALONE, ROOT
from parts import libraries
from parts.perimage import ImageDraws, Operation, PillowPipeline
from PIL import Image

import training.state as trainingstate
from augmentations import OPS, apply
from benchmarks import controller as dynamics
from config import Config
from datasets.splits import ResidentSplit
from models import build_model
from policies import build_policies
from training.exit import exit_with_status
from utils import UserError, keyed_generator

TINY = ("model=wresnet10_1", "train_size=40", "batch_size=10", "M=2", "eval_every=2")


@pytest.fixture
def benchmark(monkeypatch, tmp_path, capsys):
    """Run a benchmark in this process -> (the cells of every line of its tables, what it measured)."""
    monkeypatch.chdir(ROOT)

    def run(script, *arguments):
        output = tmp_path / "measured.json"
        words = [*arguments, "--threads", 1, "--device", "cpu", "--output", output]
        monkeypatch.setattr(sys, "argv", [f"benchmarks/{script.__name__}.py", *map(str, words)])
        script.main()
        content, printed = json.loads(output.read_text()), capsys.readouterr().out
        assert content["environment"]["threads"] == 1
        assert f"written to {output}" in printed
        return [re.split(" {2,}", line.strip()) for line in printed.splitlines()], content["measured"]

    return run


def rows_of(table, *names):
    """The rows that begin with these cells."""
    return [row for row in table if row[: len(names)] == list(names)]


def median_ratio(seconds, to):
    assert all(s > 0 for s in (*seconds, *to))
    return statistics.median(s / t for s, t in zip(seconds, to, strict=True))


def test_scoring_is_measured(benchmark):
    table, measured = benchmark(scoring, "--model", "wresnet10_1", "--images", 20, "--repeats", 2)
    seconds = measured["seconds"]
    for name in ("in memory", "mapped"):
        ((_, rate),) = rows_of(table, name)
        assert rate.split()[0] == f"{20 / statistics.median(seconds[name]):,.0f}"
    assert measured["ratio"] == median_ratio(seconds["mapped"], seconds["in memory"])
    assert any(line[0].startswith(f"reading adds {measured['ratio'] - 1:.1%}") for line in table)


def test_augmentation_is_compared_with_others(benchmark):
    few = ("--sizes", 32, 80, "--images", 4, 2, "--M", 2, "--repeats", 2, "--workers", 0)
    table, measured = benchmark(augment, *few)
    assert measured["N"] == {"32": 4, "80": 2}
    ours, pillow, torchvision = "batched, here", "per image, Pillow", "groups, torchvision"
    works = ["operations", "and normalised", "all, shared crops", "all, own crops", *(op.name for op in OPS[:16])]
    for size, expected in ((32, works), (80, works[:2] + works[4:])):
        rows = {(row["work"], row["way"]): row for row in measured["rows"] if row["size"] == size}
        assert {work for work, _ in rows} == {*expected, "transforms"}
        assert rows["transforms", "apply, the plan is ready"]["to_reference"] == [1.0, 1.0, 1.0]
        transforms = {way for work, way in rows if work == "transforms"}
        assert {"Augment", "RandAugment: torchvision, image by image, no workers"} < transforms
        for work in expected:
            assert rows[work, pillow]["to_reference"] == [1.0, 1.0, 1.0]
            rates = {way: rows[work, way]["images_per_second"][0] for way in (ours, pillow)}
            assert min(rates.values()) > 0
            low, high = rows[work, ours]["to_reference"][1:]
            assert low <= rows[work, ours]["to_reference"][0] <= high
            assert work.startswith("all") or rows[work, torchvision]["to_reference"][0] > 0
            if work in works[:4]:
                shown = [row for row in rows_of(table, work, ours) if row[2].split()[0] == f"{rates[ours]:,.0f}"]
                assert shown, (work, rates)
            else:
                microseconds = [f"{1e6 / rates[way]:,.1f}" for way in (ours, pillow)]
                assert microseconds in [row[1:3] for row in rows_of(table, work)]


@pytest.mark.parametrize("library", ["torchvision", "kornia"])
def test_other_libraries_apply_every_operation(library):
    pytest.importorskip(library)
    work = augment.prepare(augment.build_config(32, 8), 32, 40, torch.device("cpu"))
    assert set(work.plan.op_BK.unique().tolist()) == set(range(16))
    done = getattr(libraries, f"with_{library}")(work.copies_BCHW, work.plan)
    assert done.dtype == torch.uint8
    assert done.shape == work.copies_BCHW.shape
    difference = (done.int() - apply(work.copies_BCHW, work.plan).int()).abs().float().mean()
    assert difference < 20, "of 255: the same kind of work"


def test_different_results_are_not_compared(monkeypatch):
    monkeypatch.setattr(augment, "apply", lambda images, plan: 255 - images)
    with pytest.raises(UserError, match="values differ from Pillow's: not the same work"):
        augment.require_equal_to_pillow(augment.prepare(augment.build_config(32, 2), 32, 4, torch.device("cpu")))


SCRIPTS = sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py") if "__main__" in path.read_text())
SMALL_STEPS = ("--set", "model=wresnet10_1", "--images", 4, "--steps", 1, "--workers", 1)


def test_a_controllers_collapse_is_followed(benchmark, tmp_path, monkeypatch):
    monkeypatch.setattr(dynamics, "NOISES", (0.0, 0.2))
    table, measured = benchmark(dynamics, "--updates", 3, "--seeds", 2, "--plot", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000
    assert list(measured["entropy"]) == [f"noise {n}" + h for h in ("", ", held at 90%") for n in (0.0, 0.2)]
    for name, curves in measured["entropy"].items():
        assert [len(curve) for curve in curves] == [3, 3]
        assert all(0.99 < share <= 1 for curve in curves for share in curve), "random at the start"
        assert rows_of(table, name)[0][1:3] == ["never and never", "never and never"]
    assert dynamics.within([[1.0, 0.9, 0.5], [1.0, 1.0, 1.0]], 0.95) == "1 and never"


def test_half_of_the_copies_cost_their_passes(benchmark):
    few = ("--repeats", 1, "--steps", 1, "--set", "model=wresnet10_1", "batch_size=4", "M=4")
    table, measured = benchmark(costs_of_sources, *few)
    passes = measured["passes"]
    assert (passes["controller"], passes["controller, reward: teacher"]) == (12, 16)
    assert (passes["random, 2 of 4 kept"], passes["random, 2 of 4 kept by margin"]) == (10, 14)
    assert {row[0]: row[1] for row in table if row[0] in passes} == {name: str(n) for name, n in passes.items()}


def test_a_training_step_is_measured_at_every_size(benchmark):
    table, measured = benchmark(step, *SMALL_STEPS, "--M", 1, 2, "--repeats", 2)
    assert [(size["M"], size["N"], size["image_size"]) for size in measured["sizes"]] == [(1, 4, 16), (2, 4, 16)]
    for size in measured["sizes"]:
        (row,) = rows_of(table, str(size["M"]), "4", "16")
        ways = ("policies", "limit", "per image")
        assert [len(size["seconds"][way]) for way in ways] == [2, 2, 2]
        assert [cell.split()[0] for cell in row[3:6]] == [
            f"{1000 * statistics.median(size['seconds'][way]):.1f}" for way in ways
        ]
        for way, cell in zip(("policies", "per image"), row[6:8], strict=True):
            assert size["ratio"][way] == pytest.approx(median_ratio(size["seconds"][way], size["seconds"]["limit"]))
            assert cell.split()[0] == f"{size['ratio'][way]:.3f}"
        assert row[8:] == ["-"], "no waits on the CPU"
        assert size["waits"] is None


@pytest.mark.slow
def test_memory_of_a_step_is_measured(benchmark):
    table, measured = benchmark(step, *SMALL_STEPS, "--M", 2, "--repeats", 1, "--memory")
    ((_, *_, peak, above),) = rows_of(table, "2", "4", "16")
    memory = measured["sizes"][0]["memory"]
    assert peak == f"{memory['policies'] / 1e6:,.0f}"
    assert above == f"{(memory['policies'] - memory['limit']) / 1e6:,.0f}"
    assert min(memory.values()) > 50e6, "torch alone takes more"


@pytest.mark.parametrize(
    ("script", "arguments", "words"),
    [
        (step, ["--M", "0"], "argument --M: '0' is not a whole number of at least 1"),
        (step, ["--set", "M=4"], "--set M: is measured for each of --M"),
        (step, ["--set", "epochz=4"], "unknown setting 'epochz'; did you mean epochs?"),
        (step, ["--threads", "99999999"], "--threads: 99999999 is more than 1024"),
        (step, ["--output", "."], "--output .: cannot be written to"),
        (augment, ["--images", "5"], "--images: needs a number for each of --sizes"),
        (augment, ["--sizes", "8", "8"], "--images: needs a number for each of --sizes, [8, 8], all of them different"),
        (augment, ["--sizes", "8", "--images", "5000"], "--images: 5000 is more than the 4000 shapes there are"),
        (augment, ["--device", "banana"], "--device banana"),
        (loading, ["--device", "banana"], "--device banana"),
        (loading, ["--images", "nowhere"], "--images nowhere: there is no such folder"),
        (epoch, ["--epochs", "1"], "--epochs: 1 must be at least 2"),
    ],
)
def test_wrong_arguments_are_refused(monkeypatch, tmp_path, capsys, script, arguments, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"benchmarks/{script.__name__}.py", *arguments])
    with pytest.raises(SystemExit) as leaving:
        exit_with_status(script.main)
    assert leaving.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


def test_a_run_is_measured_by_parts(benchmark):
    table, measured = benchmark(epoch, "--epochs", 2, "--no_starts", "--set", *TINY)
    parts, (whole,) = measured["parts"], measured["seconds_by_parts"]
    assert len(measured["seconds"]) == 1
    assert all(taken[0] > 0 for taken in parts.values()), parts
    assert sum(taken[0] for taken in parts.values()) == pytest.approx(whole)
    for part, (taken,) in parts.items():
        ((_, seconds, share),) = rows_of(table, part)
        assert (seconds.split()[0], share) == (f"{taken:.3f}", f"{100 * taken / whole:.1f}")
    overhead = sum(parts[part][0] for part in ("controller", "logging", "checkpoints"))
    assert measured["overhead"] == pytest.approx(overhead / (whole - parts["scoring"][0]))
    assert measured["starts"] == {}


def test_starting_is_measured(monkeypatch):
    monkeypatch.setattr(epoch, "STARTS", {name: ["-c", "pass"] for name in ("main", "import torch")})
    starts = epoch.measure_starts(repeats=1)
    for (name, words, ratio), (seconds,) in zip(epoch.table_of_starts(starts).rows, starts.values(), strict=True):
        assert words.split()[0] == f"{seconds:.2f}"
        assert name in starts
        assert ratio.split()[0] == f"{seconds / starts['import torch'][0]:.2f}"


def test_reading_images_is_measured_with_and_without_workers(benchmark):
    few = ("--reads", 4, "--batch_size", 2, "--size", 16, "--repeats", 1)
    table, measured = benchmark(loading, *few, "--workers", 0, 1)
    assert [row["workers"] for row in measured["rows"]] == [0, 1]
    for row in measured["rows"]:
        seconds, workers = row["seconds"], str(row["workers"])
        ((*_, ours, _, ratio),) = rows_of(table, workers, "ours")
        ((*_, theirs, _),) = rows_of(table, workers, "torchvision")
        assert ours.split()[0] == f"{4 / seconds['ours'][0]:,.0f}"
        assert theirs.split()[0] == f"{4 / seconds['torchvision'][0]:,.0f}"
        assert row["ratio"][0] == median_ratio(seconds["torchvision"], seconds["ours"])
        assert ratio.split()[0] == f"{row['ratio'][0]:.3f}"


def per_image(images_NCHW, **settings):
    config = Config(**{"model": "wresnet10_1", "policy": "random", "batch_size": len(images_NCHW)} | settings)
    policies = build_policies(config)
    policies.resample(keyed_generator("policies"))
    images_NHWC = images_NCHW.permute(0, 2, 3, 1).contiguous().numpy()
    return PillowPipeline(config, policies, images_NHWC, list(range(len(images_NCHW))))


def noise(N, height=32, width=32):
    coarse = torch.randint(256, (N, 3, 6, 6), generator=keyed_generator("noise")).float()
    fine = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    return fine.round().to(torch.uint8)


@pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="Pillow may round a blend otherwise")
@pytest.mark.parametrize("size", [(32, 32), (17, 23)], ids=["square", "oblong"])
def test_per_image_inputs_equal_the_batched_ones(size):
    N, M, images_NCHW = 24, 4, noise(24, *size)
    pipeline = per_image(images_NCHW, M=M, Q=4, cutout=9)
    state = trainingstate.TrainingState.start(pipeline.config, ALONE, build_model("wresnet10_1", 10))
    every_row = torch.cat([torch.randperm(16, generator=keyed_generator(half)) for half in range(2)])
    state.policies.op_MQK = every_row.view(M, 4, 2)
    state.policies.level_MQK = torch.randint(10, (M, 4, 2), generator=keyed_generator("levels"))
    loader = state.loader(ResidentSplit(images_NCHW, torch.arange(N)))
    draws = loader.draw(images_NCHW, "train", 0, N)
    assert set(draws.plan.op_BK.unique().tolist()) == set(range(16))
    ((expected_BCHW, _),) = loader.micro_batches(images_NCHW, torch.arange(N), 0)

    def of_copy(b, operations=()):
        shift, (flipped,) = draws.crops.shift_B2[b].tolist(), draws.crops.flipped_B1[b].tolist()
        return ImageDraws(shift, flipped, operations, draws.centre_B2[b].tolist())

    def original(b):
        return Image.fromarray(pipeline.images[b // M])

    def operation(b, k):
        op = OPS[draws.plan.op_BK[b, k]]
        partner = int(draws.plan.partner_BK[b, k])
        extra = {
            "partner": pipeline.crop_and_flip(original(partner), of_copy(partner)),
            "centre": draws.plan.centre_BK2[b, k].tolist(),
        }
        return Operation(op.name, draws.plan.magnitude_BK[b, k].item(), extra.get(op.needs))

    for b in range(N * M):
        ours_CHW = pipeline.make_copy(original(b), of_copy(b, [operation(b, k) for k in range(2)]))
        assert torch.equal(ours_CHW, expected_BCHW[b]), b


def test_per_image_draws_depend_on_the_seed_only():
    pipeline = per_image(noise(8), M=3)
    copies_MCHW, label = pipeline[5, 7]
    assert (copies_MCHW.shape, copies_MCHW.dtype, label) == ((3, 3, 32, 32), torch.float32, 5)
    assert torch.equal(copies_MCHW, pipeline[5, 7][0])
    assert not torch.equal(copies_MCHW, pipeline[5, 8][0])
    for each_its_own in (True, False):
        plain = per_image(noise(8), M=3, policy="none", cutout=0, crop_per_copy=each_its_own)
        copies = [plain[position, 0][0] for position in range(8)]
        alike = all(torch.equal(one, first) for first, *others in copies for one in others)
        assert alike is not each_its_own


def test_per_image_operations_have_a_random_sign():
    pipeline, rng = per_image(noise(4), M=1, Q=1, K=1, ops=("Rotate",)), random.Random(0)
    (((op, magnitude),),) = pipeline.policies_MQK[0]
    drawn = {pipeline.draw_operation(rng, op, magnitude) for _ in range(50)}
    assert magnitude > 0
    assert drawn == {Operation("Rotate", magnitude), Operation("Rotate", -magnitude)}


# Runs the scripts one after the other, each with the modules and the path of a new process.
HELP = """import contextlib, runpy, sys
path = list(sys.path)
for script in sys.argv[1:]:
    sys.path[:] = [script.rpartition("/")[0], *path[1:]]
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None) or ""
        if file.startswith(ROOT) and not file.startswith(sys.prefix):
            del sys.modules[name]
    sys.argv = [script, "--help"]
    with contextlib.suppress(SystemExit):
        runpy.run_path(script, run_name="__main__")
"""


@pytest.mark.slow
def test_every_script_starts_from_any_directory(tmp_path):
    scripts = [str(ROOT / "benchmarks" / f"{script}.py") for script in SCRIPTS]
    code = HELP.replace("ROOT", repr(f"{ROOT}/"))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", code, *scripts]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    assert [f"usage: benchmarks/{script}.py" in done.stdout for script in SCRIPTS] == [True] * len(SCRIPTS)
