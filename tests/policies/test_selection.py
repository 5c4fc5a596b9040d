"""Which copies are trained on, and what the reward is made of, against the formulas."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import ALONE, Unkept

import main
from config import Config
from datasets.splits import ResidentSplit
from models import build_model
from policies.answers import Answers
from policies.selection import chosen_copies
from training.state import TrainingState


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def exponential(N, M):
    return torch.empty(N, M).exponential_(generator=generator(3))


def test_the_largest_losses_and_margins_are_kept():
    loss_NM, teacher_NM = torch.rand(2, 50, 5, generator=generator())
    for rule, rank_NM in (("loss", loss_NM), ("margin", loss_NM - teacher_NM)):
        chosen = chosen_copies(rule, 2, exponential(50, 5), loss_NM, teacher_NM).view(50, 2)
        for n, rank_M in enumerate(rank_NM.tolist()):
            best = sorted(range(5), key=lambda m: -rank_M[m])[:2]
            assert chosen[n].tolist() == sorted(n * 5 + m for m in best)


def test_random_copies_are_equally_frequent():
    chosen = chosen_copies("random", 2, exponential(20000, 4), torch.rand(20000, 4)).view(-1, 2) % 4
    pairs = torch.bincount(chosen[:, 0] * 4 + chosen[:, 1], minlength=16).view(4, 4) / 20000
    expected = torch.full((4, 4), 1 / 6).triu(1)
    torch.testing.assert_close(pairs, expected, atol=0.012, rtol=0)


def test_weighted_copies_are_drawn_without_replacement():
    """The probability of a pair: its first is drawn by its share, its second by its share of what is left."""
    weights = (0.1, 0.4, 1.0, 2.5)
    total = sum(weights)
    expected = torch.zeros(4, 4)
    for a, b in itertools.permutations(range(4), 2):
        expected[min(a, b), max(a, b)] += weights[a] / total * weights[b] / (total - weights[a])
    loss_NM = torch.tensor(weights).expand(40000, 4)
    chosen = chosen_copies("weighted", 2, exponential(40000, 4), loss_NM).view(-1, 2) % 4
    pairs = torch.bincount(chosen[:, 0] * 4 + chosen[:, 1], minlength=16).view(4, 4) / 40000
    torch.testing.assert_close(pairs, expected, atol=0.01, rtol=0)


def test_losses_of_zero_can_still_be_drawn():
    chosen = chosen_copies("weighted", 2, exponential(3, 4), torch.zeros(3, 4))
    assert chosen.view(3, 2).diff(dim=1).min() > 0


def state_for(**settings):
    config = Config(model="wresnet10_1", policy="random", M=4, batch_size=6, epochs=1, cutout=0, **settings)
    torch.manual_seed(0)
    state = TrainingState.start(config, ALONE, build_model("wresnet10_1", 2))
    state.policies.resample(generator())
    state.trained.train()
    images = torch.randint(256, (12, 3, 8, 8), dtype=torch.uint8, generator=generator())
    split = ResidentSplit(images, torch.arange(12) % 2)
    _, micro_batches = next(state.loader(split).steps(0))
    return state, [(inputs.clone(), labels) for inputs, labels in micro_batches], split


@pytest.mark.parametrize("rule", ["loss", "weighted", "random"])
def test_a_step_on_kept_copies_is_a_step_on_their_mean_loss(rule):
    state, batches, _ = state_for(keep=2, keep_by=rule, accumulate=2)
    reference = build_model("wresnet10_1", 2)
    reference.load_state_dict(state.model.state_dict())
    draws = state.selection_draws()
    with torch.no_grad():
        losses = [F.cross_entropy(reference.train()(x), y, reduction="none").view(3, 4) for x, y in batches]
    reference.load_state_dict(state.model.state_dict())  # the running statistics have not seen all copies
    optimizer = torch.optim.SGD(reference.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    for (inputs, labels), loss_NM, drawn in zip(batches, losses, draws, strict=True):
        kept = chosen_copies(rule, 2, drawn, loss_NM)
        assert len(kept) == 6
        (F.cross_entropy(reference(inputs[kept]), labels[kept]) / 2).backward()
    optimizer.step()
    loss, right = main.take_step(state, iter(batches), 0.1).tolist()
    torch.testing.assert_close(dict(state.model.state_dict()), dict(reference.state_dict()))
    assert loss == pytest.approx(sum(of.sum().item() for of in losses)), "of all copies"
    assert 0 <= right <= 24
    expected = torch.cat(losses).double().sum(0)
    torch.testing.assert_close(state.policies.loss_sums.loss_sum_M, expected)


def test_keeping_all_copies_is_no_selection():
    after = []
    for settings in ({}, {"keep": 4}):
        state, _, split = state_for(**settings)
        main.train_one_epoch(state, split, Unkept())
        after.append(state.model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(after[0].values(), after[1].values(), strict=True))


def test_selection_works_in_mixed_precision():
    state, batches, _ = state_for(keep=1, amp=True)
    before = [p.clone() for p in state.model.parameters()]
    main.take_step(state, iter(batches), 0.1)
    assert any(not torch.equal(a, b) for a, b in zip(before, state.model.parameters(), strict=True))
    assert all(p.isfinite().all() for p in state.model.parameters())


@pytest.mark.parametrize(
    ("settings", "passes"),
    [
        ({}, 12),
        ({"keep": 2}, 10),
        ({"keep": 4}, 12),
        ({"reward": "teacher"}, 16),
        ({"keep": 2, "keep_by": "margin", "reward": "teacher", "policy": "random"}, 14),
        ({"reward": "teacher", "policy": "random"}, 12),
        ({"keep": 1, "policy": "none"}, 7),
    ],
)
def test_the_cost_in_passes(settings, passes):
    """A forward pass counts 1, a forward and backward pass 3; M = 4."""
    assert Config(M=4, **settings).passes == passes


def test_the_nonsaturating_reward_is_the_log_of_what_is_left():
    logits, labels = torch.randn(40, 7, generator=generator()).double(), torch.arange(40) % 7
    config = Config(reward_loss="nonsaturating")
    answers = Answers.of(logits, labels, config)
    p = logits.softmax(1)[torch.arange(40), labels]
    torch.testing.assert_close(answers.reward_B, (1 - p).log())
    torch.testing.assert_close(answers.loss_B, -p.log())
    assert answers.right_B.tolist() == (logits.argmax(1) == labels).tolist()
    order = answers.loss_B.argsort()
    assert (answers.reward_B[order].diff() >= 0).all(), "harder copies earn more"
    sure = Answers.of(torch.tensor([[90.0, 0.0, 0.0]]), torch.tensor([0]), config)
    assert sure.reward_B.item() == pytest.approx(math.log(2) - 90), "where 1 - p is 0 in float32"


def test_the_reward_is_of_the_network_and_the_loss_stays_logged():
    state, batches, _ = state_for(reward_loss="nonsaturating")
    main.take_step(state, iter(batches), 0.1)
    sums = state.policies.loss_sums
    assert (sums.reward_sum_M < 0).all()
    assert (sums.loss_sum_M > 0).all()
    record = state.policies.update()
    mean_M = sums.reward_sum_M / 6
    expected = (mean_M - mean_M.mean()) / (mean_M.std() + 1e-5)
    assert record["advantages"] == pytest.approx(expected.tolist(), rel=1e-5)
    assert record["losses"] == pytest.approx((sums.loss_sum_M / 6).tolist())
