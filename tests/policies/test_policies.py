"""Plans made from policies: which operation reaches which copy, and whose loss is whose."""

import math
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from conftest import same

from augmentations import OPS, apply, row_of
from controller import Controller
from policies.learned import ControllerPolicies, FrozenPolicies
from policies.recorded import Recorded, RecordedPolicies
from policies.sources import PolicySource, RandomPolicies, Reward

SIZE = (32, 32)
NAMES = tuple(op.name for op in OPS)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def controller_policies(M=4, ops=NAMES, *, seed=0, **options):
    torch.manual_seed(seed)
    return ControllerPolicies(M, Controller(len(ops)), ops, 10, **{"lr": 0.01, "entropy_bonus": 1e-5} | options)


SOURCES = {
    "controller": controller_policies,
    "random": lambda M=4, ops=NAMES: RandomPolicies(M, 5, 2, ops),
    "none": lambda M=4, ops=NAMES: PolicySource(M),
    "recorded": lambda M=4: recorded(M),
    "frozen": lambda M=4: FrozenPolicies(M, controller_policies().controller, NAMES, 10),
}


@pytest.mark.parametrize("name", ["controller", "random"])
def test_every_copy_gets_a_subpolicy_of_its_own_policy(name):
    source = SOURCES[name]()
    source.resample(generator())
    N, M = 2000, source.M
    plan = source.plan(N, SIZE, generator(1))
    drawn = torch.zeros(M, source.Q)
    for m in range(M):
        subpolicies = source.op_MQK[m] * 10 + source.level_MQK[m]  # one number per operation and level
        for b in range(m, N * M, M):  # image-major: copy m of image n is number n * M + m
            op_K, magnitude_K = plan.op_BK[b], plan.magnitude_BK[b].abs()
            fits = [
                q
                for q in range(source.Q)
                if op_K.tolist() == source.op_MQK[m, q].tolist()
                and magnitude_K.tolist()
                == [OPS[o].magnitude(v) for o, v in zip(op_K, source.level_MQK[m, q].tolist(), strict=True)]
            ]
            assert fits
            drawn[m, fits[0]] += 1
        assert len(subpolicies.unique(dim=0)) == source.Q, "equal sub-policies would blur the counts"
    assert (drawn / N - 1 / source.Q).abs().max() < 0.05


def test_signs_are_a_fair_coin_for_signed_operations_alone():
    source = RandomPolicies(8, 5, 2, NAMES)
    source.resample(generator())
    plan = source.plan(4000, SIZE, generator(1))
    signed = torch.tensor([op.signed for op in OPS])[plan.op_BK]
    moved = plan.magnitude_BK != 0
    negative = plan.magnitude_BK < 0
    assert not negative[~signed].any()
    assert negative[signed & moved].double().mean().item() == pytest.approx(0.5, abs=0.02)


def test_partners_are_other_images_in_the_same_policys_copy():
    source = RandomPolicies(3, 5, 2, ("SamplePairing",))
    source.resample(generator())
    N, M = 5, 3
    plan = source.plan(N, SIZE, generator(1))
    own = torch.arange(N * M)[:, None]
    assert (plan.partner_BK // M != own // M).all()
    assert (plan.partner_BK % M == own % M).all()
    assert plan.partner_BK.min() >= 0
    assert plan.partner_BK.max() < N * M
    alone = source.plan(1, SIZE, generator(1))
    images = torch.randint(256, (M, 3, 8, 8), dtype=torch.uint8, generator=generator(2))
    assert torch.equal(alone.partner_BK, torch.arange(M)[:, None].expand(M, 2))
    assert torch.equal(apply(images, alone), images), "a single image is its own partner"


def test_centres_are_in_the_image():
    source = RandomPolicies(4, 5, 2, NAMES)
    source.resample(generator())
    centre = source.plan(500, SIZE, generator(1)).centre_BK2
    assert 0 <= centre.min() < 0.01
    assert 0.99 < centre.max() < 1


def test_no_policy_leaves_images_alone():
    source = SOURCES["none"]()
    source.resample(generator())
    images = torch.randint(256, (8, 3, 9, 7), dtype=torch.uint8, generator=generator())
    assert torch.equal(apply(images, source.plan(2, SIZE, generator(1))), images)
    source.observe(torch.ones(2, 4))
    record = source.update()
    assert record["policies"] == [[[]] * 5] * 4
    assert record["shares"] == {}


@pytest.mark.parametrize("name", ["controller", "random"])
def test_a_subset_of_operations_by_name(name):
    source = SOURCES[name](ops=("Rotate", "Invert"))
    source.resample(generator())
    assert set(source.op_MQK.flatten().tolist()) == {row_of("Rotate"), row_of("Invert")}
    source.observe(torch.rand(3, 4, generator=generator()))
    record = source.update()
    assert {name for policy in record["policies"] for sub in policy for name, _ in sub} == {"Rotate", "Invert"}
    assert record["entropy"] == pytest.approx(10 * (math.log(2) + math.log(10)), abs=0.05)
    assert sum(record["shares"]["operations"].values()) == pytest.approx(1)
    assert sum(record["shares"]["levels"].values()) == pytest.approx(1)


def test_descriptions_give_magnitudes():
    source = RandomPolicies(1, 2, 2, NAMES)
    source.op_MQK = torch.tensor([[[row_of("Rotate"), row_of("Invert")], [row_of("Solarize"), row_of("Contrast")]]])
    source.level_MQK = torch.tensor([[[2, 7], [9, 0]]])
    assert source.descriptions() == ["Rotate ±6.67 then Invert or Solarize 256 then Contrast 0.1"]
    assert source.by_name() == [[[("Rotate", 2), ("Invert", 7)], [("Solarize", 9), ("Contrast", 0)]]]
    assert PolicySource(1, 2).descriptions() == ["as it is"]


@pytest.mark.parametrize("name", SOURCES)
def test_the_mean_of_the_policies_losses_is_the_batchs(name):
    source = SOURCES[name]()
    source.resample(generator())
    N, M = 6, source.M
    logits_BC = torch.randn(N * M, 10, generator=generator(1))
    labels_B = torch.arange(N).repeat_interleave(M)
    source.observe(F.cross_entropy(logits_BC, labels_B, reduction="none").view(N, M))
    whole = F.cross_entropy(logits_BC, labels_B)
    record = source.update()
    assert sum(record["losses"]) / M == pytest.approx(whole.item(), rel=1e-6)
    by_hand = [F.cross_entropy(logits_BC[m::M], torch.arange(N)).item() for m in range(M)]
    assert record["losses"] == pytest.approx(by_hand, rel=1e-6)
    assert record["loss_spread"] == pytest.approx(torch.tensor(by_hand).std().item(), rel=1e-5)


def test_losses_are_averaged_over_one_intervals_images():
    source = SOURCES["random"]()
    for start in (1.0, 5.0):
        source.resample(generator())
        source.observe(torch.full((2, 4), start))
        source.observe(torch.full((3, 4), start + 1))
        assert source.update()["losses"] == pytest.approx([start + 0.6] * 4, rel=1e-12)


def test_reward_ema_weights_late_steps_more():
    """Two policies: one whose loss falls during the interval, and one whose loss rises."""
    loss_TM = torch.stack((torch.linspace(2, 0, 50), torch.linspace(0, 1.5, 50)), dim=1)
    found = {}
    for ema in (0.0, 0.9):
        source = RandomPolicies(2, 1, 1, ("Rotate",), reward=Reward(ema=ema))
        source.resample(generator())
        for loss_M in loss_TM:
            source.observe(loss_M.expand(7, 2))
        found[ema] = source.update()
    weight_T = 0.9 ** torch.arange(49, -1, -1)
    expected = (weight_T[:, None] * loss_TM).sum(0) / weight_T.sum()
    assert found[0.9]["losses"] == pytest.approx(expected.tolist(), rel=1e-5)
    assert found[0.0]["losses"] == pytest.approx(loss_TM.mean(0).tolist(), rel=1e-6)
    assert found[0.0]["advantages"][0] > 0 > found[0.9]["advantages"][0]


@pytest.mark.parametrize("name", ["controller", "random"])
def test_a_share_of_the_copies_stays_clean(name):
    source = SOURCES[name]()
    source.resample(generator())
    source.clean_share = 0.25
    plan = source.plan(1000, SIZE, generator(1))
    clean_B = (plan.op_BK == -1).all(1)
    assert torch.equal((plan.op_BK == -1).any(1), clean_B), "all of a copy's operations, or none"
    assert clean_B.double().mean().item() == pytest.approx(0.25, abs=0.02)
    by_policy = clean_B.view(1000, 4).double().mean(0)
    assert (by_policy - 0.25).abs().max() < 0.05
    assert not torch.equal(clean_B.view(1000, 4)[:, 0], clean_B.view(1000, 4)[:, 1])


def recorded(M, P=3, R=4, levels=10):
    """Policy p of interval r is one operation, row p, at level r."""
    op_RPQK = torch.arange(P).view(1, P, 1, 1).expand(R, P, 1, 1)
    level_RPQK = torch.arange(R).view(R, 1, 1, 1).expand(R, P, 1, 1)
    return RecordedPolicies(M, Recorded(op_RPQK, level_RPQK, levels))


def test_a_record_is_replayed_by_share_of_the_run():
    source = recorded(M=3)
    for steps in (4, 7, 12, 1000):
        for step in range(steps):
            source.resample(generator(), Fraction(step, steps))
            assert source.level_MQK.unique().tolist() == [4 * step // steps]
            assert source.op_MQK.flatten().tolist() == [0, 1, 2], "with M = P all are used in order"


def test_recorded_policies_are_drawn_equally_often():
    for M, counts in ((2, {0, 1}), (7, {2, 3})):
        source, drawn = recorded(M), torch.zeros(3)
        for interval in range(300):
            source.resample(generator(interval))
            times = source.op_MQK.flatten().bincount(minlength=3)
            assert set(times.tolist()) == counts
            drawn += times
        assert (drawn / drawn.sum() - 1 / 3).abs().max() < 0.05


def test_a_frozen_controller_is_sampled_and_not_trained():
    torch.manual_seed(0)
    controller = Controller(3, 4, Q=2, K=2)
    with torch.no_grad():
        controller.op_head.bias.copy_(torch.tensor([0.0, 2.0, 0.0]))
    before = {name: value.clone() for name, value in controller.state_dict().items()}
    source = FrozenPolicies(4, controller, ("Rotate", "Cutout", "Invert"), 4)
    drawn = []
    for interval in range(100):
        source.resample(generator(interval))
        drawn.append(source.op_MQK)
        source.observe(torch.rand(5, 4, generator=generator(interval)))
        record = source.update()
    assert not source.learns
    assert same(source.controller.state_dict(), before)
    share = (torch.stack(drawn) == row_of("Cutout")).double().mean().item()
    assert share == pytest.approx(math.e**2 / (math.e**2 + 2), abs=0.05)
    assert 0 < record["entropy"] < source.largest_entropy


@pytest.mark.parametrize("name", SOURCES)
def test_an_interval_continues_from_a_saved_state(name):
    torch.manual_seed(5)
    losses = torch.rand(3, 2, 4)
    whole, first, second = SOURCES[name](), SOURCES[name](), SOURCES[name]()
    for source in (whole, first):
        source.resample(generator())
        source.observe(losses[0])
        source.update()
        source.resample(generator(1))
        source.observe(losses[1])
    second.load_state_dict(first.state_dict())
    second.loss_sums = first.loss_sums
    for source in (whole, second):
        source.observe(losses[2])
    assert whole.update() == second.update()
    whole.resample(generator(2))
    second.resample(generator(2))
    assert same(whole.state_dict(), second.state_dict())
