"""Averages of the network's weights: scored, or as a teacher, its say in the reward and the collapse it prevents."""

import copy
import itertools
import json
from collections import Counter

import pytest
import torch
from conftest import (
    ALONE,
    LITTLE,
    TINY,
    Unkept,
    assert_refused,
    files,
    final_state,
    lines,
    little_network,
    same,
    scripts_on_ranks,
)
from torch import nn

import evaluation.weights as weights
import main
from config import Config
from datasets.splits import ResidentSplit
from policies.sources import RandomPolicies, Reward
from training.state import TrainingState, WeightAverage
from utils import load_tensors


def network():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 2))


@pytest.mark.parametrize("rate", [0.5, 0.999])
def test_the_teacher_averages_weights_and_statistics(rate):
    torch.manual_seed(0)
    model = network()
    teacher, expected = WeightAverage(model, rate, ALONE), copy.deepcopy(model.state_dict())
    for step in range(1, 30):
        with torch.no_grad():
            for value in model.state_dict().values():
                value.add_(torch.randn_like(value)) if value.is_floating_point() else value.add_(1)
        teacher.follow(model)
        keep = min(rate, (1 + step) / (10 + step))
        for name, value in model.state_dict().items():
            now = keep * expected[name] + (1 - keep) * value
            expected[name] = now if value.is_floating_point() else value.clone()
    torch.testing.assert_close(teacher.model.state_dict(), expected, rtol=1e-4, atol=1e-5)
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())


def test_the_reward_subtracts_lambda_times_the_teachers_loss():
    source = RandomPolicies(3, 1, 1, ("Rotate",), reward=Reward(teacher_weight=0.5))
    source.resample(torch.Generator())
    loss_NM, teacher_NM = torch.rand(2, 10, 3, generator=torch.Generator().manual_seed(0))
    for half in (slice(0, 4), slice(4, 10)):
        source.observe(loss_NM[half], teacher_NM[half])
    record = source.update()
    reward_M = (loss_NM - 0.5 * teacher_NM).double().mean(0)
    expected = (reward_M - reward_M.mean()) / (reward_M.std() + 1e-5)
    assert record["advantages"] == pytest.approx(expected.tolist(), rel=1e-5)
    assert record["losses"] == pytest.approx(loss_NM.mean(0).tolist())
    assert record["teacher_losses"] == pytest.approx(teacher_NM.mean(0).tolist())


def test_a_teacher_equal_to_the_network_leaves_a_share_of_the_loss():
    """Both see the same copies in the same mode: the reward is (1 - teacher_weight) times the loss, exactly."""
    weight = {"reward": "teacher", "teacher_weight": 0.25}
    config = Config(model="wresnet10_1", M=3, batch_size=8, epochs=1, cutout=0, accumulate=2, **weight)
    state = TrainingState.start(config, ALONE, batchnorm_network())
    state.policies.resample(torch.Generator().manual_seed(0))
    before = copy.deepcopy(state.teacher.model.state_dict())
    images = torch.randint(256, (8, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    state.trained.train()
    _, micro_batches = next(state.loader(ResidentSplit(images, torch.arange(8) % 2)).steps(0))
    main.take_step(state, itertools.islice(micro_batches, 2), lr=0.1)
    sums = state.policies.loss_sums
    assert torch.equal(sums.teacher_sum_M, sums.loss_sum_M)
    assert torch.equal(sums.reward_sum_M - 0.25 * sums.teacher_sum_M, 0.75 * sums.loss_sum_M)
    moved = state.teacher.model.state_dict()
    assert not torch.equal(moved["1.running_mean"], before["1.running_mean"]), "it follows the network's, which moved"


def test_judging_leaves_the_running_statistics():
    config = Config(model="wresnet10_1", reward="teacher")
    state = TrainingState.start(config, ALONE, batchnorm_network())
    inputs, labels = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 2
    for network in (state.trained.train(), state.teacher.network):
        before = copy.deepcopy(network.state_dict())
        loss = main.judge(state, network, inputs, labels).loss_B
        assert same(network.state_dict(), before)
        expected = nn.functional.cross_entropy(copy.deepcopy(network).train()(inputs), labels, reduction="none")
        assert torch.equal(loss, expected.detach()), "training mode: the batch's own statistics"
        network(inputs)
        assert not same(network.state_dict(), before), "outside they move again"


def batchnorm_network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AvgPool2d(6), nn.Flatten(), nn.Linear(4, 2)
    )


def test_a_resumed_run_with_a_teacher_is_the_uninterrupted_one(train, monkeypatch):
    monkeypatch.setattr(main, "build_model", little_network)
    demanding = ("reward=teacher", "policy_interval=3", "controller_lr=0.05", "reward_ema=0.9", *LITTLE)
    demanding += (
        "reward_loss=nonsaturating",
        "keep=1",
        "keep_by=margin",
        "entropy_floor=0.99",
        "entropy_floor_end=0.8",
        "ema=0.9",
        "mixup=0.4",
        "cutmix=1",
    )
    whole = train("whole", *demanding)
    train("parts", *demanding, "--stop_epoch=1")
    parts = train("parts", *demanding, "--resume")
    assert files(parts) == files(whole)
    assert same(final_state(parts), final_state(whole))
    assert all(len(line["teacher_losses"]) == 2 for line in lines(whole / "policies.jsonl"))
    floors = [line["entropy_floor"] for line in lines(whole / "policies.jsonl")]
    assert floors == pytest.approx([0.99 - 0.19 * share for share in (0, 0.25, 0.5, 0.75)])
    plain = train("plain", *demanding[1 : 4 + len(LITTLE)])
    assert "teacher_losses" not in lines(plain / "policies.jsonl")[0]
    assert files(plain, "policies.jsonl") != files(whole, "policies.jsonl")


def test_the_average_is_the_teacher_where_their_rates_agree():
    def averages(**settings):
        config = Config(model="wresnet10_1", policy="controller", **settings)
        state = TrainingState.start(config, ALONE, batchnorm_network())
        return state.teacher, state.ema, list(state.averages)

    teacher, ema, saved = averages(reward="teacher", teacher_rate=0.99, ema=0.99)
    assert teacher is ema
    assert saved == ["teacher"]
    teacher, ema, saved = averages(reward="teacher", teacher_rate=0.99, ema=0.9)
    assert (teacher.rate, ema.rate, saved) == (0.99, 0.9, ["teacher", "ema"])
    assert averages(ema=0.9)[0] is None
    assert averages() == (None, None, [])


@pytest.mark.parametrize("settings", [(), ("reward=teacher", "teacher_rate=0.7")])
def test_averaged_weights_are_logged_saved_and_scored(train, script, monkeypatch, settings):
    """And change nothing else: neither the weights nor the policies."""
    monkeypatch.setattr(main, "build_model", little_network)
    run = train("averaged", "ema=0.7", "eval_every=1", *LITTLE[1:], *settings)
    plain = train("plain", "eval_every=1", *LITTLE[1:], *settings)
    content, before = load_tensors(run / "model.pt"), load_tensors(plain / "model.pt")
    assert same(content["model"], before["model"])
    assert files(run, "policies.jsonl") == files(plain, "policies.jsonl")
    assert "ema" not in before
    state = final_state(run)
    assert same(content["ema"], state["teacher" if settings else "ema"]["model"])
    assert not same(content["ema"], content["model"])
    monkeypatch.setattr(weights, "build_model", little_network)
    done = script("evaluate.py", "--checkpoint", run)
    assert done.status == 0, done.err
    assert "averaged weights" in done.out
    last = lines(run / "metrics.jsonl")[-1]
    for name, key in (("results.json", "test_top1"), ("results-ema.json", "test_ema_top1")):
        (cell,) = json.loads((run / name).read_text())["benchmarks"]["clean"]["cells"]
        assert cell["top1"] == last[key]
        (run / name).unlink()
    assert script("evaluate.py", "--checkpoint", run, "--ema").status == 0
    assert (run / "results-ema.json").exists()
    assert not (run / "results.json").exists()
    assert script("evaluate.py", "--checkpoint", run, "--no-ema", "--output", run / "other.json").status == 0
    assert not (run / "other-ema.json").exists()
    assert_refused(script("evaluate.py", "--checkpoint", plain, "--ema"), "holds no averaged weights; leave it out")


def test_two_processes_with_a_teacher_resume_exactly(tmp_path, monkeypatch):
    monkeypatch.setattr(main, "build_model", little_network)
    said = ("reward=teacher", "policy_interval=2", "controller_lr=0.05", "M=4", "epochs=2", "eval_every=2", *LITTLE)

    def train(name, *flags):
        told = ("--logdir", tmp_path, "--name", name, "--device", "cpu", *flags)
        ranks = scripts_on_ranks(2, "main.py", *told, "--set", *TINY, *said)
        assert [rank.status for rank in ranks] == [0, 0], ranks[0].err + ranks[1].err
        return tmp_path / name

    whole = train("whole")
    train("parts", "--stop_epoch=1")
    parts = train("parts", "--resume")
    assert files(parts) == files(whole)
    assert same(final_state(parts), final_state(whole))
    own = [rank["teacher_buffers"] for rank in final_state(whole)["ranks"]]
    assert own[0].keys() == own[1].keys()
    assert not same(*own), "statistics are each process's own; that the averages are equal is checked at every save"


@pytest.mark.parametrize(
    "how",
    [
        ("reward=teacher", "reward_loss=nonsaturating"),
        ("policy=random", "keep=2", "keep_by=weighted"),
        ("reward=teacher", "keep=2", "keep_by=margin", "entropy_floor=0.99"),
    ],
    ids=lambda how: " ".join(how),
)
def test_micro_batches_equal_processes(how, tmp_path, script, monkeypatch):
    """Rewards, selection and the controller do not depend on who judges a part of the batch, but for rounding."""
    monkeypatch.setattr(main, "build_model", little_network)
    said = ("--logdir", tmp_path, "--device", "cpu", "--set", *TINY, "M=4", "epochs=2", "valid_size=10")
    said += ("policy_interval=2", "controller_lr=0.05")
    ranks = scripts_on_ranks(2, "main.py", "--name", "two", *said, *how)
    assert [rank.status for rank in ranks] == [0, 0], ranks[0].err + ranks[1].err
    alone = script("main.py", "--name", "alone", *said, *how, "accumulate=2")
    assert alone.status == 0, alone.err
    both = (lines(tmp_path / name / "policies.jsonl") for name in ("two", "alone"))
    for of_two, of_one in zip(*both, strict=True):
        assert of_two["policies"] == of_one["policies"]
        for numbers in ("losses", "advantages", "teacher_losses"):
            assert of_two.get(numbers, []) == pytest.approx(of_one.get(numbers, []), rel=1e-4)
        assert of_two["entropy"] == pytest.approx(of_one["entropy"], rel=1e-6)
    assert sum(p["entropy"] for p in lines(tmp_path / "two" / "policies.jsonl")) > 0


OPERATIONS = ("ShearX", "TranslateX", "Rotate", "Sharpness", "AutoContrast")


def train_on_brightness(seed=0, **settings):
    """A problem with one operation that destroys the label, learned by a small network -> state, manager, images.

    The two classes are dark and bright; AutoContrast stretches every image to the full range, and the network sees
    nothing but mean colours: what is left to learn after it is nothing. The other operations hardly matter.
    """
    policies = {"M": 4, "Q": 1, "K": 1, "levels": 4, "policy_interval": 2, "controller_lr": 0.003, "ops": OPERATIONS}
    plain = {"cutout": 0, "crop_padding": 0, "flip": False, "batch_size": 64, "epochs": 150, "teacher_rate": 0.98}
    config = Config(model="wresnet10_1", seed=seed, **policies | plain | settings)
    labels, g = torch.arange(256) % 2, torch.Generator().manual_seed(0)
    noise = torch.randint(-40, 41, (256, 3, 8, 8), generator=g)
    split = ResidentSplit((70 + 110 * labels[:, None, None, None] + noise).to(torch.uint8), labels)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    state, manager = TrainingState.start(config, ALONE, model), Unkept()
    for _ in range(config.epochs):
        main.train_one_epoch(state, split, manager)
        state.end_epoch()
    return state, manager, split


def last_operations(reward, seed):
    """Shares of operations in the last 40 intervals, and the last losses."""
    _, manager, _ = train_on_brightness(seed, reward=reward)
    in_use = (policy for record in manager.intervals[-40:] for policy in record["policies"])
    drawn = Counter(name for policy in in_use for ((name, _),) in policy)
    return {name: drawn[name] / drawn.total() for name in OPERATIONS}, manager.intervals[-1]["losses"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 2])
def test_only_the_papers_reward_picks_what_destroys_the_label(seed):
    papers, losses = last_operations("loss", seed)
    assert papers["AutoContrast"] > 0.95
    assert min(losses) > 0.6, "the network is left with guessing between two classes, ln 2 = 0.69"
    teachers, losses = last_operations("teacher", seed)
    assert teachers["AutoContrast"] < 0.5
    assert min(losses) < 0.1


@pytest.mark.slow
def test_a_floor_holds_for_two_thousand_updates():
    state, manager, _ = train_on_brightness(entropy_floor=0.8, epochs=500, policy_interval=1)
    shares = [record["entropy"] / state.policies.largest_entropy for record in manager.intervals]
    assert len(shares) == 2000
    reached = next(update for update, share in enumerate(shares) if share < 0.81)
    assert reached < 500
    assert max(shares[reached:]) < 0.81
    assert min(shares) > 0.79
    in_use = (policy for record in manager.intervals[-400:] for policy in record["policies"])
    drawn = Counter(name for policy in in_use for ((name, _),) in policy)
    assert drawn.most_common(1)[0][0] == "AutoContrast", "it does its worst within the floor"
    assert min(manager.intervals[-1]["losses"]) < 0.1, "and the network still learns"


def test_clean_copies_teach_despite_a_destructive_policy():
    right = {}
    for share in (0.0, 0.25):
        settings = {"policy": "random", "ops": ("AutoContrast",), "epochs": 20, "lr": 0.05}
        state, _, split = train_on_brightness(clean_share=share, **settings)
        images = state.normalise(split.images)
        right[share] = (state.model(images).argmax(1) == split.labels).double().mean().item()
    assert right[0.0] < 0.8
    assert right[0.25] > 0.95
