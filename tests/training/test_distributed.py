"""Several processes do what one would: the same draws, the same losses, the same scores."""

import itertools
import json
import os
import platform
import re
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from conftest import (
    ALONE,
    ROOT,
    TINY,
    Unkept,
    assert_refused,
    final_state,
    free_port,
    launch,
    lines,
    on_ranks,
    same,
    scripts_on_ranks,
)
from PIL import Image
from torch import nn

import main
import training.distributed as processes
import training.state as trainingstate
from config import Config
from dataloader import Normalise
from datasets.splits import ResidentSplit
from evaluation.predict import score
from models import build_model
from policies.sources import RandomPolicies
from training.distributed import AsyncMax, World, digest
from utils import UserError, keyed_seed, load_tensors

CPU = torch.device("cpu")


def all_well(ranks):
    for rank, done in enumerate(ranks):
        assert done.status == 0, (rank, done.err)
    return [done.result for done in ranks]


# Micro-batches


@pytest.mark.parametrize(("images", "pieces", "size"), [(12, 1, 1), (12, 4, 1), (12, 1, 4), (12, 6, 2), (2048, 64, 8)])
def test_a_batch_is_split_into_equal_parts(images, pieces, size):
    dealt = [World((CPU,), rank, size).split_batch(images, pieces) for rank in range(size)]
    assert list(itertools.chain.from_iterable(itertools.chain.from_iterable(dealt))) == list(range(images))
    parts = [part for own in dealt for part in own]
    assert {len(part) for part in parts} == {images // max(pieces, size)}
    assert {len(own) for own in dealt} == {max(1, pieces // size)}


@pytest.mark.parametrize(
    ("images", "pieces", "size", "words"),
    [
        (130, 1, 4, "batch_size: 130 images cannot be split over 4 processes in 4 equal parts; .* is 132$"),
        (129, 1, 4, "batch_size: 129 .* is 128$"),
        (2, 1, 8, "batch_size: 2 .* is 8$"),
        (100, 8, 1, "batch_size: 100 images cannot be split over 1 process in 8 equal parts; .* is 104$"),
        (128, 8, 3, "accumulate: 8 micro-batches cannot be split over 3 processes; the nearest number that can is 9$"),
    ],
)
def test_uneven_splits_are_refused_with_the_nearest_number(images, pieces, size, words):
    with pytest.raises(UserError, match=words):
        World((CPU,), 0, size).split_batch(images, pieces)


def test_uneven_micro_batches_are_refused_before_training(script, tmp_path):
    done = script("main.py", "--logdir", tmp_path / "logs", "--set", *TINY, "accumulate=3")
    assert_refused(done, "batch_size: 10 images", "the nearest number that can is 9")
    assert not (tmp_path / "logs").exists()


# One step


class FixedNorms(nn.Module):
    """A wide ResNet whose BatchNorm stays in evaluation mode, so that images do not depend on their neighbours."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.network = build_model("wresnet10_1", 10)

    def forward(self, x):
        return self.network(x)

    def train(self, mode=True):
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.training = False
        return self


def first_step(world, accumulate=1, policy="random"):
    """Losses by policy, gradients and statistics of one step on 24 images."""
    config = Config(
        model="wresnet10_1", dataset="shapes", batch_size=24, M=4, epochs=1, policy=policy, accumulate=accumulate
    )
    g = torch.Generator().manual_seed(3)
    split = ResidentSplit(torch.randint(256, (24, 3, 32, 32), dtype=torch.uint8, generator=g), torch.arange(24) % 10)
    state = trainingstate.TrainingState.start(config, world, FixedNorms())
    metrics = main.train_one_epoch(state, split, manager := Unkept())
    (record,) = manager.intervals
    return record["losses"], metrics, {name: p.grad for name, p in state.model.named_parameters()}


def test_parts_give_the_losses_and_gradients_of_the_batch():
    """All sixteen operations, so that images are paired across the parts."""
    losses, metrics, gradients = first_step(ALONE)
    in_parts = [
        first_step(ALONE, accumulate=4),
        *all_well(on_ranks(2, first_step)),
        *all_well(on_ranks(3, first_step, 6)),
    ]
    assert len(in_parts) == 6
    for other_losses, other_metrics, other_gradients in in_parts:
        assert other_losses == pytest.approx(losses, rel=1e-6)
        assert other_metrics == pytest.approx(metrics, rel=1e-6)
        for name, gradient in gradients.items():
            torch.testing.assert_close(other_gradients[name], gradient, atol=1e-6, rtol=1e-4)


def test_partners_come_from_the_images_that_were_read():
    """A process that reads only its own images pairs them among themselves: 4 of 12, at places 4 to 7."""
    policies = RandomPolicies(3, 2, 2, ("SamplePairing",))
    policies.resample(torch.Generator().manual_seed(0))
    plan = policies.plan(12, (32, 32), torch.Generator().manual_seed(1), groups=3)
    image, partner = torch.arange(36)[:, None] // 3, plan.partner_BK // 3
    assert torch.equal(partner // 4, (image // 4).expand_as(partner)), "of the same third"
    assert (partner != image).all()
    assert torch.equal(plan.partner_BK % 3, (torch.arange(36)[:, None] % 3).expand_as(partner)), "in the same copy"


# Whole runs


@pytest.fixture
def train_ranks(tmp_path):
    """train_ranks(2, "name", "lr=0.2", "--resume") -> the run's directory, trained by that many processes."""

    def run(size, name, *arguments):
        settings = [word for word in arguments if not str(word).startswith("-")]
        flags = [word for word in arguments if str(word).startswith("-")]
        done = scripts_on_ranks(
            size, "main.py", "--logdir", tmp_path, "--name", name, *flags, "--set", *TINY, *settings
        )
        all_well(done)
        assert all(not rank.out for rank in done[1:]), "only the main process prints"
        assert all(not rank.err for rank in done), [rank.err for rank in done]
        return tmp_path / name

    return run


def test_two_processes_train_as_one_with_two_micro_batches(train, train_ranks):
    settings = ("policy_interval=3", "controller_lr=0.05", "mixup=0.4", "cutmix=1", "ema=0.9")
    one, two = train("one", "accumulate=2", *settings), train_ranks(2, "two", *settings)
    for ours, theirs in zip(lines(two / "metrics.jsonl"), lines(one / "metrics.jsonl"), strict=True):
        for name in ("train_loss", "train_top1", "lr", "entropy"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5)
    for ours, theirs in zip(lines(two / "policies.jsonl"), lines(one / "policies.jsonl"), strict=True):
        assert ours["policies"] == theirs["policies"]
        assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-5)
    for kind in ("model", "ema"):
        weights, expected = (load_tensors(run / "model.pt")[kind] for run in (two, one))
        assert weights.keys() == expected.keys()
        for name in weights:
            if "running" not in name and "tracked" not in name:  # each process has statistics of its own images
                torch.testing.assert_close(weights[name], expected[name], atol=1e-5, rtol=1e-4)
    assert len(list(two.glob("events*"))) == 1


# Noise in the network, and intervals that end in the middle of epochs: state that each process has of its own.
DEMANDING = ("dropout=0.1", "policy_interval=3", "controller_lr=0.05", "mixup=0.4", "cutmix=1", "ema=0.9")


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_a_run_on_several_processes_resumes_exactly(train_ranks, size):
    settings = (*DEMANDING, "batch_size=12")
    whole = train_ranks(size, "whole", *settings)
    train_ranks(size, "resumed", *settings, "--stop_epoch=1")
    resumed = train_ranks(size, "resumed", *settings, "--resume")
    for name in ("metrics.jsonl", "policies.jsonl"):
        assert (resumed / name).read_bytes() == (whole / name).read_bytes()
    assert same(final_state(resumed), final_state(whole))
    ranks = final_state(whole)["ranks"]
    assert len(ranks) == size
    assert not same(ranks[0]["random"], ranks[1]["random"]), "each process has noise of its own"


def test_another_number_of_processes_is_refused_at_resumption(script, train_ranks, tmp_path):
    run = train_ranks(2, "two", "--stop_epoch=1")
    before = final_state(run)
    done = script("main.py", "--logdir", tmp_path, "--name", "two", "--resume", "--set", *TINY)
    assert_refused(done, "was trained by 2 processes on 1 cpu devices each", "not by 1 on 1 cpu", "--resume-elastic")
    assert same(final_state(run), before)


@pytest.fixture
def photographs(tmp_path):
    """A small tree in ImageNet's layout: two classes, 12 images each for training and 5 for validation."""
    g = torch.Generator().manual_seed(0)
    for split, name, i in itertools.product(("train", "val"), ("n01", "n02"), range(12)):
        if split == "train" or i < 5:
            path = tmp_path / "data" / split / name / f"{i}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = torch.randint(256, (5, 6, 3), dtype=torch.uint8, generator=g).numpy()
            Image.fromarray(pixels).resize((60 + i, 50)).save(path)
    return tmp_path / "data"


PHOTOGRAPHS = ("dataset=imagenet", "image_size=32", "eval_view=[36,32]", "crop_padding=0", "cutout=0", "train_size=20")


@pytest.mark.slow
def test_two_processes_stream_the_images_that_one_does(script, photographs, tmp_path):
    """With all operations, so that images are paired, and mixed; without a resumption, and with one."""
    said = ("--dataroot", photographs, "--logdir", tmp_path, "--set", *TINY, *PHOTOGRAPHS, "mixup=0.4", "cutmix=1")
    assert script("main.py", "--name", "one", *said, "accumulate=2").status == 0
    all_well(scripts_on_ranks(2, "main.py", "--name", "two", *said))
    all_well(scripts_on_ranks(2, "main.py", "--name", "parts", "--stop_epoch", 1, *said))
    all_well(scripts_on_ranks(2, "main.py", "--name", "parts", "--resume", *said))
    one, two, parts = (lines(tmp_path / name / "policies.jsonl") for name in ("one", "two", "parts"))
    assert two == parts
    assert [line["losses"] for line in two] == [pytest.approx(line["losses"], rel=1e-5) for line in one]


def scores_of(world, count):
    g = torch.Generator().manual_seed(1)
    split = ResidentSplit(
        torch.randint(256, (count, 3, 8, 8), dtype=torch.uint8, generator=g), torch.arange(count) % 10
    )
    torch.manual_seed(0)
    model = build_model("wresnet10_1", 10)
    for buffer in model.buffers():
        if buffer.is_floating_point():
            nn.init.uniform_(buffer, 0.5, 1.5)
    nn.init.normal_(model.classifier.bias)  # no two logits are equal
    return score(model, split, 10, Normalise(Config(), CPU), world), model, split


@pytest.mark.parametrize("count", [1003, 100])
def test_scores_are_the_same_for_any_number_of_processes(count):
    alone, model, split = scores_of(ALONE, count)
    with torch.no_grad():
        guesses = model.eval()(Normalise(Config(), CPU)(split.images)).argmax(1)
    assert alone.images == count
    assert alone.top1_correct == (guesses == split.labels).sum()
    assert sum(alone.class_images) == count
    for size in (2, 3):
        for scores, *_ in all_well(on_ranks(size, scores_of, count)):
            assert scores == alone


@pytest.mark.slow
def test_scores_are_equal_from_one_and_three_processes(script, train_ranks, tmp_path):
    run = train_ranks(2, "two", "eval_every=1")
    last = lines(run / "metrics.jsonl")[-1]
    results = []
    for size in (1, 3):
        output = tmp_path / f"{size}.json"
        said = ("--checkpoint", run / "model.pt", "--output", output)
        done = scripts_on_ranks(size, "evaluate.py", *said)
        all_well(done)
        assert all(not rank.out for rank in done[1:])
        results.append(json.loads(output.read_text()))
    assert [result["benchmarks"]["clean"].pop("environment")["processes"] for result in results] == [1, 3]
    for result in results:
        del result["benchmarks"]["clean"]["finished"], result["benchmarks"]["clean"]["cells"][0]["seconds"]
    assert results[0] == results[1]
    summary = results[0]["benchmarks"]["clean"]["summary"]
    assert (summary["top1"], summary["loss"]) == (last["test_top1"], last["test_loss"])


@pytest.mark.slow
def test_mixed_precision_keeps_the_keys_of_the_weights(train, train_ranks):
    plain, mixed = (
        train("plain", "epochs=1"),
        train_ranks(2, "mixed", "epochs=1", "amp=true", "batch_size=8", "accumulate=4"),
    )
    weights, expected = (load_tensors(run / "model.pt")["model"] for run in (mixed, plain))
    assert weights.keys() == expected.keys()
    assert all(weights[name].dtype == expected[name].dtype for name in weights)
    assert lines(mixed / "metrics.jsonl")[0]["train_loss"] == pytest.approx(2.4, abs=0.3)


@pytest.mark.slow
@pytest.mark.skipif(not any(os.access(f"{folder}/g++", os.X_OK) for folder in os.get_exec_path()), reason="needs g++")
def test_a_compiled_network_trains_alike_and_keeps_the_keys(script, tmp_path):
    said = ("--logdir", tmp_path, "--set", *TINY, "epochs=2", "eval_every=1")
    for name, setting in (("plain", "compile=false"), ("compiled", "compile=true")):
        command = [sys.executable, "main.py", "--name", name, *map(str, said), setting]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    weights, expected = (load_tensors(tmp_path / name / "model.pt")["model"] for name in ("compiled", "plain"))
    assert weights.keys() == expected.keys()
    ours, theirs = (lines(tmp_path / name / "metrics.jsonl")[0] for name in ("compiled", "plain"))
    assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-3)


def test_one_process_uses_all_gpus_of_a_machine(script, monkeypatch, tmp_path, train):
    """DataParallel, which falls back on its module where there is no GPU: everything but the GPUs' own work."""
    plain = train("plain")
    monkeypatch.setattr(processes, "_devices", lambda name, local_rank, alone: (CPU, torch.device("cuda:1")))
    monkeypatch.setattr(main, "seed_default_generators", lambda devices, *key: torch.manual_seed(keyed_seed(*key)))
    monkeypatch.setattr(trainingstate, "random_state", lambda devices: {"cpu": torch.get_rng_state(), "cuda": []})
    said = ("--logdir", tmp_path, "--name", "parallel", "--set", *TINY)
    done = script("main.py", *said)
    assert done.status == 0, done.err
    assert "training on 2 GPUs from one process (DataParallel)" in done.err
    assert "faster: torchrun --nproc_per_node 2 main.py" in done.err
    assert same(load_tensors(tmp_path / "parallel" / "model.pt")["model"], load_tensors(plain / "model.pt")["model"])
    refused = script("main.py", *said[:3], "compiled", *said[4:], "compile=true")
    assert_refused(refused, "compile: needs one process per GPU", "--nproc_per_node 2")


# Agreement


def test_batchnorm_statistics_are_averaged():
    def average_batchnorm(world):
        model = nn.BatchNorm2d(2)
        model.running_mean.fill_(world.rank)
        model.running_var.copy_(torch.tensor([1.0, 2.0]) * (1 + world.rank))
        world.average_batchnorm(model)
        return model.running_mean.tolist(), model.running_var.tolist(), model.num_batches_tracked.item()

    assert all_well(on_ranks(3, average_batchnorm)) == [([1.0, 1.0], [2.0, 4.0], 0)] * 3


def test_statistics_stay_apart_until_they_are_averaged():
    """Through DistributedDataParallel; the running mean after two steps is by hand."""

    def two_steps(world):
        norm = nn.BatchNorm2d(3)
        wrapped = world.wrap(norm, torch.bfloat16, image_size=8).train()
        for step in (1.0, 2.0):
            wrapped(torch.full((2, 3, 2, 2), step * (1 + world.rank))).sum().backward()
        own = norm.running_mean[0].item()
        world.average_batchnorm(norm)
        return own, norm.running_mean[0].item()

    by_hand = 0.9 * 0.1 * 1 + 0.1 * 2
    results = all_well(on_ranks(2, two_steps))
    assert [own for own, _ in results] == pytest.approx([by_hand, 2 * by_hand])
    assert [mean for _, mean in results] == pytest.approx([1.5 * by_hand] * 2)


@pytest.mark.parametrize("size", [1, 3])
def test_all_processes_see_a_maximum_at_the_same_call(size):
    """Process r notices r at its call r; the others know it one call later, and nobody waits for the slowest."""

    def notice(world):
        maximum = AsyncMax(world)
        seen = [maximum(10 * world.rank * (call == world.rank), call) for call in range(5)]
        return seen, maximum.settle(), maximum.settle()

    results = all_well(on_ranks(size, notice))
    known = [[0, 0], [0, 0], [10, 1], [20, 2], [0, 3]] if size == 3 else [[0, call] for call in range(5)]
    assert [seen for seen, _, _ in results] == [known] * size
    assert [(last, nothing) for _, last, nothing in results] == [([0, 4] if size == 3 else [], [])] * size


@pytest.mark.parametrize("what", ["weights", "policies"])
def test_processes_that_differ_are_stopped(what):
    def drift(world):
        config = Config(model="wresnet10_1", dataset="shapes", batch_size=10, M=2, epochs=1)
        torch.manual_seed(0)
        state = trainingstate.TrainingState.start(config, world, build_model("wresnet10_1", 10))
        state.state_dict()
        if world.rank == 1:
            changed = state.model.classifier.bias if what == "weights" else state.policies.controller.op_head.bias
            with torch.no_grad():
                changed[0] += 1e-6
        with pytest.raises(UserError) as error:
            state.state_dict()
        return str(error.value)

    (message,) = set(all_well(on_ranks(2, drift)))
    assert message == f"after epoch 0, step 0: the {what} of process 1 differ from those of process 0"


def test_a_digest_tells_any_change():
    state = {"a": torch.arange(6.0).view(2, 3), "b": [torch.tensor(3), 4, "five"], "c": None}
    known = digest(state)
    assert digest({"a": state["a"].clone(), "b": list(state["b"]), "c": None}) == known
    changed = [
        state | {"a": state["a"] + torch.tensor([0, 0, 1e-6])},
        state | {"b": [torch.tensor(3), 4, "six"]},
        state | {"d": None},
        {"a": state["a"], "B": state["b"], "c": None},
    ]
    assert len({known, *map(digest, changed)}) == 5
    transposed = torch.arange(6.0).view(2, 3).contiguous(memory_format=torch.contiguous_format).T
    assert digest(transposed) == digest(transposed.contiguous())


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"WORLD_SIZE": "many"}, ["WORLD_SIZE: 'many' in the environment is not a number", "torchrun"]),
        ({"WORLD_SIZE": "2"}, ["WORLD_SIZE is set, but not RANK, MASTER_ADDR, MASTER_PORT", "torchrun"]),
        ({"WORLD_SIZE": "2", "RANK": "x"}, ["RANK: 'x' in the environment is not a number"]),
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "x"}, ["LOCAL_RANK: 'x' in the environment is not a number"]),
    ],
)
def test_an_incomplete_environment_is_refused(script, monkeypatch, tmp_path, variables, words):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert_refused(script("main.py", "--logdir", tmp_path), *words)


# The launchers


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "launch"])
def test_both_launchers_start_the_same_run(train_ranks, tmp_path, launcher):
    expected = train_ranks(2, "expected", "epochs=1")
    said = ("main.py", "--logdir", tmp_path, "--name", launcher, "--set", *TINY, "epochs=1")
    process = launch(launcher, free_port(), tmp_path / "strict", *said)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert out.count("epoch 1/1, loss ") == 1
    assert (tmp_path / launcher / "policies.jsonl").read_bytes() == (expected / "policies.jsonl").read_bytes()
    assert "Error" not in err


@pytest.mark.slow
def test_an_error_ends_a_launched_run_completely(tmp_path):
    """The main process cannot write; the other process is ended while it waits."""
    (tmp_path / "file").write_text("")
    port = free_port()
    said = ("main.py", "--logdir", tmp_path / "file", "--set", *TINY)
    process = launch("torchrun", port, tmp_path / "strict", *said)
    _, err = process.communicate(timeout=300)
    assert process.returncode != 0
    assert len(re.findall(r"^error: .*", err, re.MULTILINE)) == 1
    assert "cannot be created" in err
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
    with socket.socket() as again:
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        again.bind(("127.0.0.1", port))


@pytest.mark.slow
def test_ctrl_c_ends_a_launched_run_and_its_epochs_are_kept(tmp_path):
    said = ("main.py", "--logdir", tmp_path, "--name", "stopped", "--set", *TINY, "epochs=500")
    process = launch("torchrun", free_port(), tmp_path / "strict", *said)
    assert any(line.startswith("epoch 1/500") for line in process.stdout)
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=300)
    assert process.returncode != 0
    assert final_state(tmp_path / "stopped")["epoch"] >= 1
    for _ in range(100):
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    pytest.fail("processes are left")


PAGE_FAULTS = """
import ctypes, resource, torch
from training.distributed import M_MMAP_THRESHOLD, join
def faults_of_allocating():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(30_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
with join("cpu"):
    faults = [faults_of_allocating() for _ in range(20)]
print(faults[0], faults[-1], ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**30))
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="no glibc")
def test_freed_memory_is_reused_on_the_cpu():
    done = subprocess.run([sys.executable, "-c", PAGE_FAULTS], cwd=ROOT, check=True, capture_output=True, text=True)
    first, again, takes_large_thresholds = map(int, done.stdout.split())
    if not takes_large_thresholds:
        pytest.skip("this glibc takes no threshold above 32 MB, which the 120 MB here exceed")
    assert first > 20 * max(1, again), "the pages of 120 MB are not asked for twice"
