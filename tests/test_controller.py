"""The policy network against the formulas of the paper."""

import itertools
import math

import numpy as np
import pytest
import torch

from config import PAPER_OPS
from controller import Controller, advantage, policy_loss, reinforce
from policies.learned import ControllerPolicies


def all_decisions(Q, ops, levels):
    """Every policy of Q sub-policies with one operation each, as (op_MQK, level_MQK)."""
    table = list(itertools.product(*[range(ops), range(levels)] * Q))
    decisions = torch.tensor(table).view(len(table), Q, 1, 2)
    return decisions[..., 0], decisions[..., 1]


@pytest.mark.parametrize("recurrence", ["policy", "subpolicy"])
def test_probabilities_sum_to_one_and_give_the_entropy(recurrence):
    torch.manual_seed(0)
    controller = Controller(3, 2, Q=2, K=1, recurrence=recurrence, hidden=5, embedding=4)
    with torch.no_grad():
        for parameter in controller.parameters():
            parameter.mul_(20)  # far from uniform
        log_prob, entropy = controller.log_prob(*all_decisions(2, 3, 2))
    p = log_prob.double().exp()
    assert p.sum().item() == pytest.approx(1, abs=1e-5)
    assert (p * entropy).sum().item() == pytest.approx(-(p * p.log()).sum().item(), abs=1e-4)
    assert p.max() > 2 * p.min()


@pytest.mark.parametrize("recurrence", ["policy", "subpolicy"])
def test_samples_follow_the_probabilities_of_log_prob(recurrence):
    torch.manual_seed(0)
    controller = Controller(2, 2, Q=1, K=1, recurrence=recurrence, hidden=5, embedding=4)
    with torch.no_grad():
        for parameter in controller.parameters():
            parameter.mul_(10)
    op, level, log_prob, entropy = controller.sample(20000, torch.Generator().manual_seed(1))
    again = controller.log_prob(op, level)
    torch.testing.assert_close(again, (log_prob, entropy))
    seen = torch.bincount((op * 2 + level).flatten(), minlength=4) / 20000
    expected = controller.log_prob(*all_decisions(1, 2, 2))[0].exp()
    torch.testing.assert_close(seen, expected, atol=0.015, rtol=0)


@pytest.mark.parametrize("recurrence", ["policy", "subpolicy"])
def test_entropy_at_the_start_is_that_of_uniform_decisions(recurrence):
    torch.manual_seed(0)
    op, level, log_prob, entropy = Controller(16, recurrence=recurrence).sample(8)
    assert op.shape == level.shape == (8, 5, 2)
    uniform = 10 * (math.log(16) + math.log(10))
    assert uniform == pytest.approx(50.75, abs=0.01)
    assert (entropy - uniform).abs().max() < 0.05
    assert (log_prob + uniform).abs().max() < 1.0
    assert (op.max(), level.max()) <= (torch.tensor(15), torch.tensor(9))


def test_subpolicies_are_independent_only_when_the_state_is_reset():
    torch.manual_seed(0)
    for recurrence, independent in (("subpolicy", True), ("policy", False)):
        controller = Controller(4, 3, Q=3, K=2, recurrence=recurrence)
        op, level, log_prob, _ = controller.sample(16)
        reordered, _ = controller.log_prob(op.flip(1), level.flip(1))
        assert torch.allclose(reordered, log_prob, atol=1e-5) is independent


def test_advantage_is_the_normalised_loss():
    losses = np.array([0.3, 1.2, 0.8, 2.5])
    expected = (losses - losses.mean()) / (losses.std(ddof=1) + 1e-5)
    np.testing.assert_allclose(advantage(torch.tensor(losses)).numpy(), expected, rtol=1e-12)
    assert torch.equal(advantage(torch.tensor([1.0])), torch.zeros(1))
    assert torch.equal(advantage(torch.ones(3)), torch.zeros(3))


def test_gradient_is_the_reinforce_estimate():
    torch.manual_seed(0)
    controller = Controller(3, 2, Q=2, K=1)
    op, level, _, _ = controller.sample(4)
    advantage_M = torch.tensor([1.0, -0.5, 0.0, -0.5])
    policy_loss(*controller.log_prob(op, level), advantage_M, entropy_bonus=0.0).backward()
    weight = controller.op_head.weight
    descent = weight.grad.clone()
    ascent = torch.zeros_like(descent)
    for m in range(4):
        weight.grad = None
        controller.log_prob(op[m : m + 1], level[m : m + 1])[0].sum().backward()
        ascent += advantage_M[m] * weight.grad / 4
    torch.testing.assert_close(descent, -ascent, atol=1e-7, rtol=1e-4)


def test_the_policy_with_the_higher_loss_becomes_more_likely():
    torch.manual_seed(0)
    controller = Controller()
    optimizer = torch.optim.Adam(controller.parameters(), lr=0.00035)
    op, level, before, _ = controller.sample(2)
    reinforce(controller, optimizer, op, level, torch.tensor([0.5, 2.5]), entropy_bonus=0.0)
    after, _ = controller.log_prob(op, level)
    assert after[1] - before[1] > 0 > after[0] - before[0]


def test_the_entropy_bonus_raises_entropy():
    torch.manual_seed(0)
    controller = Controller(4, 4, Q=1, K=1)
    with torch.no_grad():
        for parameter in controller.parameters():
            parameter.mul_(20)
    optimizer = torch.optim.Adam(controller.parameters(), lr=0.01)
    op, level, _, before = controller.sample(8)
    for _ in range(20):
        reinforce(controller, optimizer, op, level, torch.ones(8), entropy_bonus=1.0)
    assert (controller.log_prob(op, level)[1] > before).all()


def test_a_single_policy_takes_no_step():
    torch.manual_seed(0)
    controller = Controller()
    before = {name: value.clone() for name, value in controller.state_dict().items()}
    optimizer = torch.optim.Adam(controller.parameters(), lr=0.1)
    op, level, _, _ = controller.sample(1)
    advantage_M, entropy_M = reinforce(controller, optimizer, op, level, torch.tensor([3.0]), entropy_bonus=1.0)
    assert advantage_M.tolist() == [0.0]
    assert torch.isfinite(entropy_M).all()
    assert all(torch.equal(value, before[name]) for name, value in controller.state_dict().items())


@pytest.mark.parametrize("recurrence", ["policy", "subpolicy"])
def test_a_rewarded_operation_becomes_dominant(recurrence):
    torch.manual_seed(0)
    controller = Controller(16, Q=2, recurrence=recurrence)
    optimizer = torch.optim.Adam(controller.parameters(), lr=0.01)
    generator = torch.Generator().manual_seed(0)
    rewarded = 3
    for _ in range(150):
        op, level, _, _ = controller.sample(8, generator)
        loss_M = (op == rewarded).float().mean((1, 2))
        reinforce(controller, optimizer, op, level, loss_M, entropy_bonus=1e-5)
    share = (controller.sample(200, generator).op_MQK == rewarded).float().mean()
    assert share > 0.9


def test_bounded_logits_bound_every_probability():
    """As above, but no probability leaves what a bound of 1 allows: e^1 / (e^1 + 15 e^-1) at most."""
    torch.manual_seed(0)
    controller, generator = Controller(16, Q=2, logit_bound=1.0), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(controller.parameters(), lr=0.005)
    for _ in range(200):
        op, level, _, _ = controller.sample(8, generator)
        reinforce(controller, optimizer, op, level, (op == 3).float().mean((1, 2)), entropy_bonus=0.0)
    op, _, _, entropy = controller.sample(400, generator)
    share, most = (op == 3).float().mean().item(), math.e / (math.e + 15 / math.e)
    assert 0.2 < share < most + 0.03
    bound = 4 * min_entropy(16, most) + 4 * min_entropy(10, math.e / (math.e + 9 / math.e))
    assert entropy.mean() > bound


def min_entropy(choices, most):
    """Entropy of a distribution in which one choice has probability `most` and the others are equally likely."""
    rest = (1 - most) / (choices - 1)
    return -most * math.log(most) - (choices - 1) * rest * math.log(rest)


@pytest.mark.parametrize("bound", [0.0, 2.0])
@pytest.mark.parametrize("recurrence", ["policy", "subpolicy"])
def test_a_held_controller_keeps_its_entropy_and_its_order(recurrence, bound):
    torch.manual_seed(0)
    controller = Controller(4, 3, Q=2, K=1, recurrence=recurrence, logit_bound=bound)
    with torch.no_grad():
        for parameter in controller.parameters():
            parameter.mul_(8)  # some 84 % of the maximal entropy are left
    heads = [p.clone() for p in (*controller.op_head.parameters(), *controller.level_head.parameters())]
    lstm = controller.lstm.weight_hh.clone()
    assert controller.hold_entropy(0.0) < 0.86
    share = controller.hold_entropy(0.9)
    assert 0.9 <= share <= 0.901
    sampled = controller.sample(4000, torch.Generator().manual_seed(1))
    exact = -sampled.log_prob_M.mean().item() / (2 * math.log(4 * 3))  # entropy = -E log p
    assert exact == pytest.approx(0.9, abs=0.02)
    now = [*controller.op_head.parameters(), *controller.level_head.parameters()]
    factor = (now[0] / heads[0]).median().item()
    assert 0 < factor < 1
    for new, old in zip(now, heads, strict=True):
        torch.testing.assert_close(new, factor * old, rtol=1e-4, atol=1e-6)
    assert torch.equal(controller.lstm.weight_hh, lstm)
    assert controller.hold_entropy(0.9) == share, "nothing changes where the floor is kept"


def test_held_at_one_a_controller_samples_uniformly():
    torch.manual_seed(0)
    controller = Controller(4, 3, Q=1, K=1)
    controller.hold_entropy(1.0)
    op, level, log_prob, _ = controller.sample(20000, torch.Generator().manual_seed(1))
    assert (log_prob + math.log(12)).abs().max() < 1e-6
    seen = torch.bincount((op * 3 + level).flatten(), minlength=12) / 20000
    assert (seen - 1 / 12).abs().max() < 0.01


@pytest.mark.slow
def test_the_floor_holds_for_two_thousand_updates():
    """A reward without noise, under which the paper's controller collapses within some dozens of updates."""
    held = learned(updates=2000, floor=0.9)
    reached = next(update for update, share in enumerate(held) if share < 0.905)
    assert reached < 200
    assert min(held) > 0.895, "a mean over four sampled policies, which vary around the floor"
    assert max(held[reached:]) < 0.91
    assert learned(updates=300, floor=0.0)[-1] < 0.5, "the levels earn nothing and stay random"


def learned(updates, floor):
    """Shares of the maximal entropy of the sampled policies, rewarded for the share of one operation."""
    torch.manual_seed(0)
    controller, g = Controller(Q=2, K=1), torch.Generator().manual_seed(0)
    source = ControllerPolicies(
        4, controller, PAPER_OPS, 10, lr=0.0035, entropy_bonus=1e-5, entropy_floors=(floor, floor)
    )
    shares = []
    for _ in range(updates):
        source.resample(g)
        source.observe((source.op_MQK == source.rows[4]).double().mean((1, 2))[None])
        shares.append(source.update()["entropy"] / source.largest_entropy)
    return shares


def test_without_the_division_small_differences_have_no_effect():
    """Rewards a thousandth apart: divided, they outweigh the entropy bonus, undivided they do not."""
    entropies = {}
    for divide_by_std in (True, False):
        torch.manual_seed(0)
        controller, generator = Controller(4, 2, Q=1, K=1), torch.Generator().manual_seed(0)
        optimizer = torch.optim.Adam(controller.parameters(), lr=0.01)
        for _ in range(150):
            op, level, _, entropy_M = controller.sample(8, generator)
            reward_M = 0.001 * (op == 2).float().mean((1, 2))
            reinforce(controller, optimizer, op, level, reward_M, 0.05, divide_by_std=divide_by_std)
        entropies[divide_by_std] = entropy_M.mean().item()
    largest = math.log(4) + math.log(2)
    assert entropies[True] < 0.5 * largest
    assert entropies[False] > 0.95 * largest
    losses = torch.tensor([1.0, 2.0, 6.0])
    assert advantage(losses, divide_by_std=False).tolist() == [-2.0, -1.0, 3.0]


def test_an_unknown_recurrence_is_refused():
    with pytest.raises(ValueError, match="'policy' or 'subpolicy', not 'never'"):
        Controller(recurrence="never")
