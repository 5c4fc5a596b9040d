"""Several processes do what one would: the same draws, the same losses, the same scores; and they end together."""

import functools
import itertools
import json
import multiprocessing
import os
import platform
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import (
    ALONE,
    ROOT,
    TINY,
    Unkept,
    _start,
    assert_refused,
    final_state,
    free_port,
    launch,
    lines,
    on_ranks,
    same,
    scripts_on_ranks,
    start_ranks,
)
from PIL import Image
from torch import nn

import main
import training.distributed as processes
import training.exit as exits
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


# Dealing


@pytest.mark.parametrize(("images", "pieces", "size"), [(12, 1, 1), (12, 4, 1), (12, 1, 4), (12, 6, 2), (2048, 64, 8)])
def test_every_image_is_dealt_once_in_equal_pieces(images, pieces, size):
    dealt = [World((CPU,), rank, size).split_batch(images, pieces) for rank in range(size)]
    assert list(itertools.chain.from_iterable(itertools.chain.from_iterable(dealt))) == list(range(images))
    parts = [part for own in dealt for part in own]
    assert {len(part) for part in parts} == {images // max(pieces, size)}
    assert {len(own) for own in dealt} == {max(1, pieces // size)}


@pytest.mark.parametrize(
    ("images", "pieces", "size", "words"),
    [
        (130, 1, 4, "batch_size: 130 images cannot be dealt to 4 processes in 4 equal parts; .* is 132$"),
        (129, 1, 4, "batch_size: 129 .* is 128$"),
        (2, 1, 8, "batch_size: 2 .* is 8$"),
        (100, 8, 1, "batch_size: 100 images cannot be dealt to 1 process in 8 equal parts; .* is 104$"),
        (128, 8, 3, "accumulate: 8 micro-batches cannot be dealt to 3 processes; the nearest number that can is 9$"),
    ],
)
def test_what_cannot_be_dealt_is_refused_with_the_nearest_that_can(images, pieces, size, words):
    with pytest.raises(UserError, match=words):
        World((CPU,), 0, size).split_batch(images, pieces)


def test_micro_batches_that_do_not_come_out_even_are_refused_before_anything_is_written(script, tmp_path):
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


def test_micro_batches_and_processes_give_the_losses_and_gradients_of_the_whole_batch():
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


def test_the_copies_made_in_parts_are_those_of_the_whole_batch():
    """To the bit, with partners inside and outside the part, for any cut."""
    config = Config(M=3, batch_size=12, ops=("SamplePairing", "Rotate", "Cutout"), policy="random", Q=2)
    g = torch.Generator().manual_seed(0)
    images = torch.randint(256, (12, 3, 16, 16), dtype=torch.uint8, generator=g)
    state = trainingstate.TrainingState.start(config, ALONE, nn.Linear(1, 1))
    state.policies.resample(g)
    draws = main.draw(state, images, "train", 0, N=12)
    every = range(12)
    whole = main.augment(state, images, every, draws, every)
    for start, stop in ((0, 12), (0, 5), (5, 6), (6, 12)):
        part = main.augment(state, images, every, draws, range(start, stop))
        assert torch.equal(part, whole[start * 3 : stop * 3])


def test_partners_come_from_the_images_at_hand():
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
        assert all(not rank.out for rank in done[1:]), "only the leader prints"
        assert all(not rank.err for rank in done), [rank.err for rank in done]
        return tmp_path / name

    return run


def test_two_processes_train_as_one_with_two_micro_batches(train, train_ranks):
    settings = ("policy_interval=3", "controller_lr=0.05")
    one, two = train("one", "accumulate=2", *settings), train_ranks(2, "two", *settings)
    for ours, theirs in zip(lines(two / "metrics.jsonl"), lines(one / "metrics.jsonl"), strict=True):
        for name in ("train_loss", "train_top1", "lr", "entropy"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5)
    for ours, theirs in zip(lines(two / "policies.jsonl"), lines(one / "policies.jsonl"), strict=True):
        assert ours["policies"] == theirs["policies"]
        assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-5)
    weights, expected = (load_tensors(run / "model.pt")["model"] for run in (two, one))
    assert weights.keys() == expected.keys()
    for name in weights:
        if "running" not in name and "tracked" not in name:  # each process has statistics of its own images
            torch.testing.assert_close(weights[name], expected[name], atol=1e-5, rtol=1e-4)
    assert len(list(two.glob("events*"))) == 1


# Noise in the network, and intervals that end in the middle of epochs: state that each process has of its own.
DEMANDING = ("dropout=0.1", "policy_interval=3", "controller_lr=0.05")


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
    assert_refused(done, "was trained by 2 processes on 1 devices each", "not by 1 on 1", "--resume-elastic")
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
def test_images_that_are_streamed_are_read_alike_by_one_process_and_by_two(script, photographs, tmp_path):
    """Without SamplePairing, whose partners are the process's own; without a resumption, and with one."""
    ops = "ops=[ShearX, Rotate, Invert, Cutout]"
    said = ("--dataroot", photographs, "--logdir", tmp_path, "--set", *TINY, *PHOTOGRAPHS, ops)
    assert script("main.py", "--name", "one", *said, "accumulate=2").status == 0
    all_well(scripts_on_ranks(2, "main.py", "--name", "two", *said))
    all_well(scripts_on_ranks(2, "main.py", "--name", "parts", "--stop_epoch", 1, *said))
    all_well(scripts_on_ranks(2, "main.py", "--name", "parts", "--resume", *said))
    one, two, parts = (lines(tmp_path / name / "policies.jsonl") for name in ("one", "two", "parts"))
    assert two == parts
    assert [line["losses"] for line in two] == [pytest.approx(line["losses"], rel=1e-5) for line in one]


def test_what_is_found_in_the_files_is_said_once(photographs, tmp_path):
    damaged = photographs / "train" / "n01" / "3.JPEG"
    damaged.write_bytes(damaged.read_bytes()[:400])
    said = (
        "--dataroot",
        photographs,
        "--logdir",
        tmp_path,
        "--set",
        *TINY,
        *PHOTOGRAPHS,
        "train_size=24",
        "skip_unreadable=true",
    )
    done = scripts_on_ranks(2, "main.py", "--stop_epoch", 1, *said)
    all_well(done)
    assert "skipped 1 of 24 images" in done[0].err
    assert done[1].err == ""


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
def test_a_checkpoint_of_two_processes_is_scored_alike_by_one_and_three(script, train_ranks, tmp_path):
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
def test_mixed_precision_keeps_the_keys_on_two_processes_in_micro_batches(train, train_ranks):
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


def test_a_machine_with_several_gpus_is_used_whole_by_one_process(script, monkeypatch, tmp_path, train):
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


def test_statistics_of_batchnorm_are_evened_out():
    def average_batchnorm(world):
        model = nn.BatchNorm2d(2)
        model.running_mean.fill_(world.rank)
        model.running_var.copy_(torch.tensor([1.0, 2.0]) * (1 + world.rank))
        world.average_batchnorm(model)
        return model.running_mean.tolist(), model.running_var.tolist(), model.num_batches_tracked.item()

    assert all_well(on_ranks(3, average_batchnorm)) == [([1.0, 1.0], [2.0, 4.0], 0)] * 3


def test_a_process_keeps_the_statistics_of_its_images_until_they_are_evened_out():
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


@pytest.mark.parametrize("size", [2, 3])
def test_evening_out_twice_changes_nothing_more(size):
    """For an epoch that is ended again because its evaluation was stopped. Three float32 values may not add up."""

    def average_batchnorm(world):
        norm = nn.BatchNorm2d(1000)
        norm.running_mean = torch.rand(1000, generator=torch.Generator().manual_seed(world.rank))
        world.average_batchnorm(norm)
        once = norm.running_mean.clone()
        world.average_batchnorm(norm)
        return once, norm.running_mean

    for once, twice in all_well(on_ranks(size, average_batchnorm)):
        assert torch.equal(once, twice)


@pytest.mark.parametrize("size", [1, 3])
def test_what_one_process_has_noticed_all_know_at_the_same_call(size):
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
def test_processes_that_have_ceased_to_be_equal_are_stopped(what):
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


# Ends


def test_an_error_of_one_process_ends_all_with_its_message():
    def fail_in_one(world):
        if world.rank == 1:
            raise UserError("the disk of this machine is full")
        world.gather("waiting for the other")

    def run():
        exits.exit_with_status(lambda: fail_joined())

    def fail_joined():
        with processes.join("cpu") as world:
            fail_in_one(world)

    done = start_ranks(3, run)
    assert [rank.status for rank in done] == [2, 2, 2]
    assert "".join(rank.err for rank in done) == "error: process 1: the disk of this machine is full\n"


def test_an_error_that_all_processes_meet_is_said_once(tmp_path):
    done = scripts_on_ranks(3, "main.py", "--logdir", tmp_path / "logs", "--set", *TINY)
    assert [rank.status for rank in done] == [2, 2, 2]
    (message,) = filter(None, (rank.err for rank in done))
    assert "batch_size: 10 images cannot be dealt to 3 processes" in message
    done = scripts_on_ranks(2, "main.py", "--ampp")
    (message,) = filter(None, (rank.err for rank in done))
    assert "did you mean --amp?" in message
    assert not (tmp_path / "logs").exists()


def test_a_killed_process_ends_the_others_in_one_line():
    def run():
        exits.exit_with_status(joined)

    def joined():
        with processes.join("cpu") as world:
            if world.rank == 1:
                time.sleep(0.5)
                raise SystemExit(9)  # without a word to the others
            world.gather("waiting for the other")

    first, second = start_ranks(2, run)
    assert second.status == 9
    assert first.status == 2
    assert first.err == "error: another process has ended without a word; was it killed, or out of memory?\n"


def test_a_process_whose_leader_is_gone_ends_in_silence(monkeypatch, capsys):
    """Without a launcher the first process keeps the store, which ends with it."""

    class Gone:
        def add(self, *_):
            raise torch.distributed.DistNetworkError("Connection reset by peer")

    @functools.cache
    def met():
        return Gone(), 1, 2

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(processes, "_meeting_point", met)
    met()
    with pytest.raises(SystemExit) as leaving:
        exits.exit_with_status(lambda: met()[0].add("something", 1))
    assert leaving.value.code == 2
    assert capsys.readouterr().err == ""


FORKING = multiprocessing.get_context("fork")
STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143}
WORD = {signal.SIGINT: "\ninterrupted", signal.SIGTERM: "terminated"}


@pytest.fixture
def end(tmp_path):
    """How a process ends whose main() this is, and what it writes to stderr: end(function) -> (status, text).

    out: descriptor for its stdout. before: to be called first.
    """

    def run(function, out=None, before=lambda: None):
        def start():
            os.dup2(os.open(tmp_path / "stderr", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
            sys.stderr = os.fdopen(2, "w", buffering=1)
            if out is not None:
                os.dup2(out, 1)
                sys.stdout = os.fdopen(1, "w")
            os.chdir(ROOT)
            before()
            exits.exit_with_status(function)

        process = FORKING.Process(target=start)
        _start(process)
        process.join(100)
        ended, status = not process.is_alive(), process.exitcode
        process.kill()
        assert ended, "goes on"
        return status, (tmp_path / "stderr").read_text()

    return run


def send(number, to=None):
    """A signal, which has arrived when this returns."""
    os.kill(to or os.getpid(), number)
    time.sleep(0)


def wait():
    """For a signal; one that comes just before a sleep does not cut it short."""
    while True:
        time.sleep(0.01)


@pytest.mark.parametrize("number", STATUS)
def test_ctrl_c_and_sigterm_end_alike(end, number):
    def describe():
        try:
            send(number)
        except KeyboardInterrupt as stop:
            raise type(stop)("all is kept") from None

    assert end(lambda: send(number)) == (STATUS[number], f"{WORD[number]}\n")
    assert end(describe) == (STATUS[number], f"{WORD[number]}; all is kept\n")


@pytest.mark.parametrize("number", STATUS)
def test_signals_are_as_before_afterwards(number, capsys):
    before = [signal.getsignal(each) for each in STATUS]
    with pytest.raises(SystemExit) as leaving:
        exits.exit_with_status(lambda: send(number))
    assert leaving.value.code == STATUS[number]
    assert capsys.readouterr().err == f"{WORD[number]}\n"
    assert [signal.getsignal(each) for each in STATUS] == before


@pytest.mark.parametrize("number", STATUS)
def test_a_signal_that_is_ignored_stays_so(end, number):
    """As SIGINT is in the background of a shell, and all are by nohup."""
    assert end(lambda: send(number), before=lambda: signal.signal(number, signal.SIG_IGN)) == (0, "")


@pytest.mark.parametrize("number", STATUS)
def test_one_more_ctrl_c_ends_what_is_put_in_order(end, number):
    def never_ready():
        try:
            send(number)
        finally:
            send(signal.SIGINT)
            wait()

    assert end(never_ready) == (130, "\ninterrupted\n")


def test_ctrl_c_while_an_error_is_told_ends_in_silence(end, monkeypatch):
    monkeypatch.setattr(processes, "_first_to_fail", lambda: send(signal.SIGINT))

    def fail():
        raise UserError("nobody will know")

    assert end(fail) == (-signal.SIGINT, "")


def test_sigterm_while_an_error_is_told_changes_nothing(end, monkeypatch):
    """As torchrun sends it to the others when one has failed."""
    monkeypatch.setattr(processes, "_first_to_fail", lambda: send(signal.SIGTERM) or True)

    def fail():
        raise UserError("all will know")

    assert end(fail) == (2, "error: all will know\n")


def test_a_child_ends_as_if_nothing_were_set(end):
    def main():
        child = os.fork()
        if not child:
            send(signal.SIGTERM)
            os._exit(0)
        print(os.WTERMSIG(os.waitpid(child, 0)[1]), file=sys.stderr)

    assert end(main) == (0, f"{int(signal.SIGTERM)}\n")


def test_a_script_may_run_in_another_thread(capsys):
    with ThreadPoolExecutor(1) as pool, pytest.raises(SystemExit) as leaving:
        pool.submit(exits.exit_with_status, lambda: None).result()
    assert leaving.value.code == 0


@pytest.fixture
def closed():
    """A pipe that nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    yield writing
    os.close(writing)


@pytest.mark.parametrize("flushed", [False, True])
def test_a_pipe_that_nobody_reads_ends_in_silence(end, closed, flushed):
    """`| head`: at the end, or at once as with PYTHONUNBUFFERED."""
    assert end(lambda: print("something", flush=flushed), out=closed) == (141, "")


def test_help_that_nobody_reads_ends_in_silence(end, closed):
    def show():
        print("usage:")
        raise SystemExit(0)

    assert end(show, out=closed) == (141, "")


def test_a_message_that_nobody_reads_ends_in_silence(end, closed):
    """`2>&1 | head`."""

    def fail():
        raise UserError("nobody will know")

    assert end(fail, before=lambda: os.dup2(closed, 2)) == (2, "")


def test_another_broken_pipe_is_told(end, closed):
    assert end(lambda: os.write(closed, b"x")) == (2, "error: [Errno 32] Broken pipe\n")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_output_that_fills_a_disk_is_told(end):
    full = os.open("/dev/full", os.O_WRONLY)
    assert end(lambda: print("something"), out=full) == (2, "error: [Errno 28] No space left on device\n")
    os.close(full)


@pytest.mark.slow
def test_a_script_leaves_nothing_for_the_interpreter_to_complain_of(closed):
    """What a process of its own still says when it ends, after everything."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(
        [sys.executable, "evaluate.py", "--list"],
        cwd=ROOT,
        env=environment,
        stdout=closed,
        stderr=subprocess.PIPE,
        check=False,
    )
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.parametrize("script", ["main.py", "evaluate.py"])
def test_ctrl_c_in_the_first_seconds_ends_in_silence(start_process, monkeypatch, tmp_path, script):
    """While torch is imported: here one that never gets ready."""
    (tmp_path / "torch.py").write_text("print('importing', flush=True)\nimport time\ntime.sleep(1000)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    process = start_process(script)
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=100) == ("", "")
    assert process.returncode == -signal.SIGINT


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"WORLD_SIZE": "many"}, ["WORLD_SIZE: 'many' in the environment is not a number", "torchrun"]),
        ({"WORLD_SIZE": "2"}, ["WORLD_SIZE is set, but not RANK, MASTER_ADDR, MASTER_PORT", "torchrun"]),
        ({"WORLD_SIZE": "2", "RANK": "x"}, ["RANK: 'x' in the environment is not a number"]),
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "x"}, ["LOCAL_RANK: 'x' in the environment is not a number"]),
    ],
)
def test_a_half_made_environment_is_refused(script, monkeypatch, tmp_path, variables, words):
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
def test_an_error_ends_a_launched_run_and_leaves_nothing_behind(tmp_path):
    """The leader cannot write; the other process waits for it in vain, and is ended."""
    (tmp_path / "file").write_text("")
    port = free_port()
    said = ("main.py", "--logdir", tmp_path / "file", "--set", *TINY)
    process = launch("torchrun", port, tmp_path / "strict", *said)
    _, err = process.communicate(timeout=300)
    assert process.returncode != 0
    assert len(re.findall(r"^error: .*", err, re.MULTILINE)) == 1
    assert "cannot be made" in err
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
    with socket.socket() as again:
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        again.bind(("127.0.0.1", port))


@pytest.mark.slow
def test_ctrl_c_ends_a_launched_run_and_its_epochs_are_kept(tmp_path):
    said = ("main.py", "--logdir", tmp_path, "--name", "stopped", "--set", *TINY, "epochs=500")
    process = launch("torchrun", free_port(), tmp_path / "strict", *said)
    assert process.stdout.readline().startswith("epoch 1/500")
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
def test_on_the_cpu_freed_memory_serves_again():
    done = subprocess.run([sys.executable, "-c", PAGE_FAULTS], cwd=ROOT, check=True, capture_output=True, text=True)
    first, again, takes_large_thresholds = map(int, done.stdout.split())
    if not takes_large_thresholds:
        pytest.skip("this glibc takes no threshold above 32 MB, which the 120 MB here exceed")
    assert first > 20 * max(1, again), "the pages of 120 MB are not asked for twice"
