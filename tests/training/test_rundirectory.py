"""Run directories: mistakes give exit status 2 and one or two lines, and nothing is lost."""

import json

import pytest
import torch
import yaml
from conftest import ROOT, TINY, assert_refused, files, final_state, lines
from PIL import Image

import main
import training.rundirectory as rundirectory
import training.state as trainingstate
from training.checkpoint import Checkpoints
from utils import environment


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--", "amp"], ["did you mean --amp?"]),
        (["--load-conf", "x"], ["unknown argument --load-conf", "did you mean --load_conf?"]),
        (["amp"], ["unknown argument amp"]),
        (["--M", "0"], ["--M: M: 0 must be at least 1"]),
        (["--M"], ["argument --M: expected one argument"]),
        (["--stop_epoch", "0"], ["--stop_epoch: 0 must be at least 1"]),
        (["--stop_epoch", "x"], ["argument --stop_epoch: invalid int value"]),
        (["--load_conf", "confs/none.yaml"], ["confs/none.yaml: there is no such conf file", "confs/"]),
        (["--device", "tpu"], ["--device tpu: cannot be used here"]),
        (["--resume", "--overwrite"], ["--resume and --overwrite exclude each other"]),
        (["--resume"], ["there is no run to resume"]),
        (["--set", "dataset=folder", "--dataroot", "/nowhere"], ["/nowhere: holds no folder train"]),
        (["--set", "model=resnet9000"], ["--set: model: the depth of a ResNet is 18,", "not 9000"]),
        (["--logdir", "caf\udce9"], ["--logdir 'caf\\udce9': is not encoded in UTF-8; choose another name"]),
        (["--set", "compile=true", "--device", "cpu"], ["compile: needs a C++ compiler, and there is no g+++"]),
        (["--set", "model=resnet50", "batch_size=1", "M=1"], ["resnet50: at 16 pixels", "two copies"]),
        (["--set", "train_size=10"], ["batch_size: 50 is more than the 10 training images"]),
        (["--set", "amp=true", "amp_dtype=float16", "--device", "cpu"], ["float16 needs CUDA", "bfloat16"]),
    ],
)  # fmt: skip
def test_mistakes_are_refused_before_anything_is_written(script, tmp_path, monkeypatch, arguments, words):
    monkeypatch.setenv("CXX", "g+++ -O1")  # a compiler that is not here
    assert_refused(script("main.py", "--logdir", tmp_path / "logs", *arguments), *words)
    assert not (tmp_path / "logs").exists()


def test_a_run_is_neither_written_over_nor_resumed_as_another(script, train, tmp_path):
    run = train("kept", "--stop_epoch=1")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    again = ("--logdir", tmp_path, "--name", "kept", "--set", *TINY)
    assert_refused(script("main.py", *again), "holds a run already", "--resume", "--overwrite", "--name")
    assert_refused(
        script("main.py", "--resume", *again, "lr=0.3", "M=3"),
        "lr: 0.1 -> 0.3",
        "M: 2 -> 3",
        "start another run with --name",
    )
    assert_refused(script("main.py", "--overwrite", *again, "dataset=folder", "dataroot=/nowhere"), "/nowhere")
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_only_runs_are_deleted_by_overwrite(script, train, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.txt").write_text("years of work")
    refused = script("main.py", "--logdir", tmp_path, "--name", "thesis", "--overwrite", "--set", *TINY)
    assert_refused(refused, "exists and is not a run")
    assert (tmp_path / "thesis" / "chapter1.txt").exists()
    run = train("kept", "--stop_epoch=1")
    (run / "results.json").write_text("{}")
    train("kept", "--overwrite", "--stop_epoch=2")
    assert not (run / "results.json").exists()
    assert len(lines(run / "metrics.jsonl")) == 2


def test_data_path_and_workers_may_change_on_resumption(train):
    train("moved", "--stop_epoch=1")
    run = train("moved", "--resume", "dataroot=elsewhere", "workers=3")
    assert len(lines(run / "metrics.jsonl")) == 3
    assert yaml.safe_load((run / "config.yaml").read_text())["dataroot"] == "elsewhere"


@pytest.mark.parametrize("change", ["image removed", "image replaced", "class renamed", "test image removed"])
@pytest.mark.parametrize("resident_gb", [1, 1e-9])
def test_a_run_is_not_resumed_with_other_images(script, own_images, tmp_path, change, resident_gb):
    said = ("--logdir", tmp_path, "--name", "own", "--dataroot", own_images, "--set", *TINY)
    said += ("dataset=folder", "image_size=16", "train_size=18", f"resident_gb={resident_gb}")
    assert script("main.py", "--stop_epoch", 1, *said).status == 0
    cats = own_images / "train" / "cats"
    if change == "image removed":
        (cats / "3.png").unlink()
    elif change == "image replaced":
        for image in cats.iterdir():
            Image.new("RGB", (16, 16)).save(image)
    elif change == "class renamed":
        for split in ("train", "test"):
            (own_images / split / "cats").rename(own_images / split / "birds")
    else:
        (own_images / "test" / "dogs" / "0.png").unlink()
    assert_refused(script("main.py", "--resume", *said), "cannot be resumed", "not those it began with")


def test_a_run_is_resumed_with_the_same_images_elsewhere(script, own_images, tmp_path):
    said = ("--logdir", tmp_path, "--name", "own", "--set", *TINY, "dataset=folder", "image_size=16", "train_size=18")
    assert script("main.py", "--dataroot", own_images, "--stop_epoch", 1, *said).status == 0
    own_images.rename(tmp_path / "moved")
    assert script("main.py", "--dataroot", tmp_path / "moved", "--resume", *said).status == 0
    assert len(lines(tmp_path / "own" / "metrics.jsonl")) == 3


def test_own_images_train_with_the_command_of_the_readme(script, own_images, tmp_path):
    command = "python main.py --load_conf confs/folder.yaml --dataroot mydata"
    assert command in (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    arguments = command.replace("mydata", str(own_images)).split()[2:]
    smaller = ("--logdir", tmp_path, "--set", "model=wresnet10_1", "batch_size=10", "epochs=1", "workers=0")
    done = script("main.py", *arguments, *smaller)
    assert done.status == 0, done.err
    assert (tmp_path / "folder_0" / "model.pt").exists()


def test_the_last_interval_may_be_shorter_and_is_logged(train):
    run = train("intervals", "policy_interval=5")
    assert [line["step"] for line in lines(run / "policies.jsonl")] == [5, 10, 12]
    run = train("long", "policy_interval=1000")
    (line,) = lines(run / "policies.jsonl")
    assert (line["step"], len(line["losses"])) == (12, 2)


def test_every_start_is_recorded_and_a_new_machine_warned_of(train, script, tmp_path, monkeypatch):
    run = train("noted", "--stop_epoch=1")
    monkeypatch.setattr(rundirectory, "environment", lambda device: environment(device) | {"threads": 77})
    done = script("main.py", "--resume", "--logdir", tmp_path, "--name", "noted", "--set", *TINY)
    assert done.status == 0
    assert "warning: " in done.err
    assert "continues with 77: results may differ" in done.err
    first, second = json.loads((run / "environment.json").read_text())
    assert first["torch"] == torch.__version__.split("+")[0] or first["torch"] == torch.__version__
    assert second["threads"] == 77
    assert "--resume" in second["command"]


def test_a_log_that_lost_lines_is_refused(train, script, tmp_path):
    run = train("lost", "--stop_epoch=2")
    (run / "metrics.jsonl").write_text("")
    refused = script("main.py", "--resume", "--logdir", tmp_path, "--name", "lost", "--set", *TINY)
    assert_refused(refused, "metrics.jsonl: is shorter than when the checkpoint was written")
    (run / "metrics.jsonl").unlink()
    policies = files(run, "policies.jsonl")
    refused = script("main.py", "--resume", "--logdir", tmp_path, "--name", "lost", "--set", *TINY)
    assert_refused(refused, "metrics.jsonl: is shorter than when the checkpoint was written")
    assert not (run / "metrics.jsonl").exists()
    assert files(run, "policies.jsonl") == policies


@pytest.mark.parametrize("content", ['[{"torch": 1}]', "[" * 100000, "no"])
def test_a_damaged_environment_is_named(train, script, tmp_path, content):
    run = train("kept", "--stop_epoch=1")
    (run / "environment.json").write_text(content)
    before = files(run)
    refused = script("main.py", "--resume", "--logdir", tmp_path, "--name", "kept", "--set", *TINY)
    assert_refused(refused, "environment.json: cannot be read", "restore a copy, or remove it")
    assert files(run) == before


def test_a_run_without_its_config_is_still_a_run(train, script, tmp_path):
    run = train("kept", "--stop_epoch=1")
    (run / "config.yaml").unlink()
    for flag in ("--resume", "--overwrite"):
        refused = script("main.py", flag, "--logdir", tmp_path, "--name", "kept", "--set", *TINY)
        assert_refused(refused, "has checkpoints, but config.yaml is missing", "restore a copy")


def test_a_run_below_another_is_not_overwritten_with_it(train, script, tmp_path):
    train("outer", "--stop_epoch=1")
    inner = train("outer/inner", "--stop_epoch=1")
    refused = script("main.py", "--overwrite", "--logdir", tmp_path, "--name", "outer", "--set", *TINY)
    assert_refused(refused, "contains another run", str(inner))
    assert (inner / "config.yaml").exists()


def test_all_checkpoints_damaged(script, train, tmp_path):
    run = train("gone", "--stop_epoch=2")
    for checkpoint in (run / "checkpoints").iterdir():
        checkpoint.write_bytes(checkpoint.read_bytes()[:-1])
    metrics = files(run)
    refused = script("main.py", "--resume", "--logdir", tmp_path, "--name", "gone", "--set", *TINY)
    assert refused.status == 2
    assert "none of the 2 checkpoints is intact" in refused.err
    assert files(run) == metrics


def test_checkpoints_that_are_not_this_runs(script, train, tmp_path):
    run = train("odd", "--stop_epoch=1")
    said = ("--resume", "--logdir", tmp_path, "--name", "odd", "--set", *TINY)
    (run / "checkpoints" / "epoch-0007-0123456789abcdef.pt").mkdir()
    (run / "checkpoints" / "epoch-0008-0123456789abcdef.pt").symlink_to("nowhere")
    before = final_state(run)
    (run / "config.yaml").write_text((run / "config.yaml").read_text().replace("wresnet10_1", "wresnet16_1"))
    assert_refused(script("main.py", *said, "model=wresnet16_1"), "does not fit the settings in its config.yaml")
    Checkpoints(run / "checkpoints").save({"epoch": 9, "step": 0, "somebody": "else's"})
    assert_refused(script("main.py", *said, "model=wresnet16_1"), "epoch-0009-", "is not a checkpoint")
    assert before["epoch"] == 1


def test_out_of_memory_is_said_in_a_line(script, monkeypatch, tmp_path):
    def too_much(*_, **__):
        return torch.empty(2**60, dtype=torch.uint8)

    monkeypatch.setattr(main, "build_model", too_much)
    assert_refused(script("main.py", "--logdir", tmp_path / "logs", "--set", *TINY), "out of memory")
    assert not (tmp_path / "logs").exists()


def test_a_directory_that_cannot_be_made(script, tmp_path):
    (tmp_path / "file").write_text("")
    refused = script("main.py", "--logdir", tmp_path / "file", "--set", *TINY)
    assert_refused(refused, "cannot be created", "--logdir")


def test_another_kind_of_device_is_refused_at_resumption(script, monkeypatch, tmp_path, train):
    """A run that CUDA has trained, of which only the checkpoint is made up."""
    state_dict = trainingstate.TrainingState.state_dict

    def from_cuda(self):
        state = state_dict(self)
        assert state["ranks"][0]["kind"] == "cpu"
        return state | {"ranks": [state["ranks"][0] | {"kind": "cuda"}]}

    with monkeypatch.context() as patched:
        patched.setattr(trainingstate.TrainingState, "state_dict", from_cuda)
        train("moved", "optimizer=adamw", "lr=0.01", "--stop_epoch=1")
    again = ("--logdir", tmp_path, "--name", "moved", "--set", *TINY, "optimizer=adamw", "lr=0.01")
    refused = script("main.py", "--resume", *again)
    assert_refused(refused, "on 1 cuda devices each", "not by 1 on 1 cpu", "--resume-elastic")
    done = script("main.py", "--resume-elastic", *again)
    assert done.status == 0, done.err
    assert "with other devices: the result will differ" in done.err
