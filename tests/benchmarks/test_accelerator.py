"""benchmarks/accelerator.py on the CPU: its parts, its file of results, kills and wrong arguments."""

import json
import operator
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import accelerator
import augment
import exactness
import pytest
import torch
from conftest import ALONE, ROOT

from analysis.specs import load_experiment, runs_of
from augmentations import OPS
from config import Config
from evaluation.text_table import render
from training.exit import exit_with_status
from utils import UserError

CPU = torch.device("cpu")
COMMAND = (sys.executable, str(ROOT / "benchmarks" / "accelerator.py"), "--device", "cpu")


def places(folder):
    return "--results", str(folder / "results"), "--logdir", str(folder / "logs")


def kept_in(folder):
    (file,) = (folder / "results" / "speed").glob("*.json")
    return json.loads(file.read_text())


@pytest.mark.slow
def test_the_command_runs_every_part_on_the_cpu(tmp_path):
    """As many parts as the time allows."""
    done = subprocess.run([*COMMAND, "--minutes", "1", *places(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    content = kept_in(tmp_path)
    unreached = {part for part in accelerator.PARTS if f"{part}: not started, no time is left" in done.stdout}
    assert set(content["parts"]) == accelerator.PARTS.keys() - unreached
    assert "exactness" in content["parts"]
    for part in content["parts"].values():
        assert not [one for one in part["results"].values() if "failed" in one]
        assert all(part["machine"][name] for name in ("torch", "torchvision", "pillow", "processor", "command"))
    for table in accelerator.tables(content):
        assert render(table, "markdown") in done.stdout


@pytest.fixture
def reported():
    """reported(part, settings) -> what the part reports, by name."""

    def run(part, settings):
        results = {}
        part(settings, ALONE, lambda name, words, **measured: results.update({name: measured}))
        return json.loads(json.dumps(results))

    return run


ON_CPU = accelerator.Settings("cpu", None, Path("results"), Path("logs"))


def test_steps_are_measured(reported):
    results = reported(accelerator.step, ON_CPU)
    assert results["matrix product"]["flops_per_second"] > 0
    steps = [one for one in results.values() if "model" in one]
    assert [(one["M"], one["N"], one["waits"]) for one in steps] == [(2, 8, None), (2, 4, None)]
    for one in steps:
        policies, bare = one["seconds"]["policies"], one["seconds"]["bare"]
        assert one["ratio"][0] == pytest.approx(statistics.median(map(operator.truediv, policies, bare)))
        assert one["copies_per_second"] == pytest.approx(one["M"] * one["N"] / statistics.median(policies))
    table = accelerator.PARTS["step"].table(results)
    assert [row[-4] for row in table.rows] == [f"{one['flops_per_second'] / 1e12:,.3g}" for one in steps]


def test_operations_are_compared_with_others(reported):
    results = reported(accelerator.operations, ON_CPU)
    rows = accelerator.PARTS["operations"].table(results).rows
    ways = (augment.OURS, augment.PILLOW, augment.TORCHVISION)
    assert {(row[0], row[2]) for row in rows} >= {(side, way) for side in ("32x32", "224x224") for way in ways}
    assert len({(row[0], row[2]) for row in rows}) == len(rows)


def test_an_epoch_and_settings_are_measured(reported, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: None)  # slow, and tested elsewhere
    monkeypatch.setattr(accelerator.os, "environ", dict(os.environ))
    results = reported(accelerator.epoch, ON_CPU)
    assert results["epoch"]["copies_per_second"] == pytest.approx(40 * 2 / results["epoch"]["seconds"])
    for setting in ("deterministic", "compile"):
        seconds = results[setting]["seconds"]
        ratios = map(operator.truediv, seconds[setting], seconds["plain"])
        assert results[setting]["ratio"][0] == pytest.approx(statistics.median(ratios))
    assert len(accelerator.PARTS["epoch"].table(results).rows) == 3


@pytest.mark.slow
def test_a_killed_command_keeps_its_results(tmp_path):
    command = [*COMMAND, "--minutes", "60", "--parts", "exactness", *places(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    folder = tmp_path / "results" / "speed"
    while not any("Pillow, 32x32" in file.read_text() for file in folder.glob("*.json")):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = kept_in(tmp_path)["parts"]["exactness"]
    assert not kept["whole"]
    assert kept["results"]["Pillow, 32x32"]["values"] > 0


@pytest.mark.slow
def test_a_stopped_command_names_its_file_of_results(tmp_path):
    command = [*COMMAND, "--parts", "operations", *places(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert "operations: 32x32" in process.stdout.readline()
    process.terminate()
    _, err = process.communicate()
    assert process.returncode == 143, err
    assert err.strip().startswith("terminated; the results so far are in")
    assert f"32x32, {augment.TORCHVISION}" in kept_in(tmp_path)["parts"]["operations"]["results"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--device", "cuda:99"], "--device cuda:99: cannot be used here"),
        (["--device", "banana"], "--device cpu runs everything in small sizes"),
        (["--device", "cpu", "--minutes", "0"], "'0' is not a number of minutes above 0"),
        (["--device", "cpu", "--minutes", "nan"], "'nan' is not a number of minutes above 0"),
        (["--device", "cpu", "--dataroot", "nowhere"], "--dataroot nowhere: has neither train/<class>/* nor"),
        (["--device", "cpu", "--dataroot", "."], "has neither train/<class>/* nor"),
        (["--device", "cpu", "--parts", "speed"], "argument --parts: invalid choice: 'speed'"),
        (["--device", "cpu", "--results", "/dev/null"], "/dev/null/speed/"),
    ],
)
def test_wrong_arguments_are_refused(arguments, words, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["benchmarks/accelerator.py", *arguments])
    with pytest.raises(SystemExit) as leaving:
        exit_with_status(accelerator.main)
    assert leaving.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line
    assert not list(tmp_path.iterdir())


HERE = {"device": "cpu x86_64", "processor": "Some CPU (R) 3.2"}


def test_a_damaged_file_of_results_is_refused_and_kept(tmp_path):
    path = tmp_path / "some-cpu-r-3-2.json"
    for text in ("{", "[]", '{"parts": 3}'):
        path.write_text(text)
        with pytest.raises(UserError, match=r"some-cpu-r-3-2\.json: cannot be used"):
            accelerator.ResultsFile(tmp_path, HERE)
        assert path.read_text() == text


def test_a_part_replaces_only_its_own_results(tmp_path):
    for parts in (("step", "epoch"), ("step",)):
        kept = accelerator.ResultsFile(tmp_path, HERE | {"torch": str(len(parts))})
        for part in parts:
            kept.begin(part)
            kept.add(part, f"of {len(parts)}", {})
            kept.end(part, whole=True)
    parts = json.loads(kept.path.read_text())["parts"]
    assert {part: (list(of["results"]), of["machine"]["torch"]) for part, of in parts.items()} == {
        "step": (["of 1"], "1"),
        "epoch": (["of 2"], "2"),
    }


def test_values_that_differ_from_pillow_are_counted(monkeypatch):
    images, _ = exactness.some_images(None, 32)
    assert images.shape == (8, 3, 32, 32)
    assert sum(sum(exactness.differences(op, images, CPU)) for op in OPS[:16]) == 0
    original = exactness.apply_op

    def off_by_one(images_BCHW, *arguments, **extra):
        result_BCHW = original(images_BCHW, *arguments, **extra)
        result_BCHW[0, 0, 0, 0] ^= 1
        return result_BCHW

    monkeypatch.setattr(exactness, "apply_op", off_by_one)
    (rotate,) = (op for op in OPS if op.name == "Rotate")
    assert list(exactness.differences(rotate, images, CPU)) == [1] * 20, "ten levels, two signs"


def test_real_images_are_used_where_given(own_images):
    images, where = exactness.some_images(own_images, 24, count=4)
    assert (images.shape, where) == ((4, 3, 24, 24), "real images")
    assert len({image.numpy().tobytes() for image in images}) == 4


def test_the_controls_train_on_the_images_given(own_images, tmp_path):
    changes = accelerator.data_settings(own_images)
    runs = list(runs_of(load_experiment("controls", "small", [0], changes), tmp_path))
    assert {(run.config.dataset, run.config.dataroot, run.config.image_size) for run in runs} == {
        ("folder", str(own_images), 32)
    }
    (tmp_path / "cifar" / "cifar-10-batches-py").mkdir(parents=True)
    changes = accelerator.data_settings(tmp_path / "cifar")
    assert {run.config.dataset for run in runs_of(load_experiment("controls", "small", [0], changes), tmp_path)} == {
        "cifar10"
    }


def test_runs_are_reported_once_they_are_scored(monkeypatch):
    scored, reported, told = set(), [], set()
    runs = [
        SimpleNamespace(
            arm=arm,
            directory=arm,
            config=Config(),
            is_scored=lambda arm=arm: arm in scored,
            state=lambda: "missing",
        )
        for arm in ("none", "random")
    ]
    results = {"benchmarks": {"clean": {"cells": [{"error": 0.25, "images": 100}]}}}
    monkeypatch.setattr(accelerator, "read_results", lambda directory: results)

    def report(name, words, **measured):
        reported.append((name, words))

    accelerator.report_runs(runs, told, report)
    assert reported == []
    scored.add("none")
    accelerator.report_runs(runs, told, report)
    accelerator.report_runs(runs, told, report, unfinished=True)
    assert reported == [("none", "test error 25.00%"), ("random", "missing")]


def test_training_sees_only_the_chosen_device(monkeypatch):
    def visible(device):
        return accelerator.environment_for(torch.device(device))["CUDA_VISIBLE_DEVICES"]

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert (visible("cpu"), visible("cuda:1")) == ("", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert (visible("cuda:0"), visible("cuda:1")) == ("5", "7")


def test_failures_are_noted_below_their_table():
    results = {
        "Pillow, 32x32": {"values": 1000, "differing": {"Rotate": 3}, "images": 8, "of": "real images"},
        "test_x.py::test_it_holds[a]": {"outcome": "passed"},
        "test_x.py::test_it_holds[b]": {"outcome": "failed", "failed": "AssertionError: no"},
    }
    content = {
        "parts": {
            "exactness": {"whole": True, "results": results},
            "epoch": {"whole": False, "results": {"epoch": {"failed": "out of memory"}}},
        }
    }
    exactness, epoch = accelerator.tables(content)
    assert [row[1] for row in exactness.rows] == ["3 of 1,000 values differ", "1 passed, 1 failed"]
    assert exactness.notes == ["test_x.py::test_it_holds[b]: failed (AssertionError: no)"]
    assert (epoch.rows, epoch.notes) == (
        [],
        ["epoch: failed (out of memory)", "Cut short: not everything was measured."],
    )


def test_the_page_on_speed_has_every_gpu():
    """The tables of every card in results/speed are in docs/speed.md; without one it says so."""
    speed = (ROOT / "docs" / "speed.md").read_text(encoding="utf-8")
    contents = [json.loads(path.read_text(encoding="utf-8")) for path in (ROOT / "results" / "speed").glob("*.json")]
    cards = [
        content
        for content in contents
        if any("driver" in part["machine"] for part in content.get("parts", {}).values())
    ]
    assert ("On a GPU: not measured yet" in speed) is (not cards)
    assert all(content["device"] in speed for content in cards)
    for table in (table for content in cards for table in accelerator.tables(content)):
        assert render(table, "markdown") in speed
