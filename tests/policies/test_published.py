"""Augmentations as published: torchvision's classes on Pillow images, draw by draw, and AugMix by its recipe."""

import itertools
from fractions import Fraction

import numpy as np
import pytest
import torch
from conftest import LITTLE, files, final_state, lines, little_network, same
from PIL import Image, ImageOps
from torchvision import transforms
from torchvision.transforms import AutoAugmentPolicy, autoaugment

import main
from augmentations import Plan, _in_families, apply, portion, row_of
from config import PER_IMAGE, Config
from policies import build_policies
from policies.published import (
    STRENGTHS,
    AugMix,
    AutoAugmentPolicies,
    OperationDraws,
    RandAugment,
    TrivialAugment,
    augmix_loss,
    mix,
    trivial_space,
    usual_space,
)

SIZES = [(32, 32), (24, 40), (33, 33)]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def some_images(count, size, seed=0):
    return torch.randint(256, (count, 3, *size), dtype=torch.uint8, generator=generator(seed))


def to_pillow(image_CHW):
    return Image.fromarray(image_CHW.permute(1, 2, 0).numpy())


def from_pillow(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


class Scripted:
    """torch, as torchvision's module sees it, whose randint returns given numbers."""

    def __init__(self, numbers):
        self._numbers = iter(numbers)

    def __getattr__(self, name):
        return getattr(torch, name)

    def randint(self, *_, **__):
        return torch.tensor([next(self._numbers)])


def all_of(source):
    """Every operation at every strength with both signs."""
    counts = [len(one.values) for one in source.space((1, 1)).values()]
    every = [(o, s, sign) for o, count in enumerate(counts) for s in range(count) for sign in (False, True)]
    choice, strength, negative = (torch.tensor(column)[:, None] for column in zip(*every, strict=True))
    return OperationDraws(choice, strength, negative, torch.ones_like(negative))


def as_torchvision_draws(source, draws, b, K):
    """The numbers that torchvision draws for copy b, in its order."""
    ranges = list(source.space((1, 1)).values())
    for k in range(K):
        one = ranges[draws.choice_BK[b, k]]
        yield int(draws.choice_BK[b, k])
        if isinstance(source, TrivialAugment) and len(one.values) > 1:
            yield int(draws.strength_BK[b, k])
        if one.signed:
            yield int(draws.negative_BK[b, k])


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_trivialaugment_is_torchvisions(monkeypatch, size):
    source = TrivialAugment(3)
    check_against(source, transforms.TrivialAugmentWide(), all_of(source), size, monkeypatch)
    check_against(source, transforms.TrivialAugmentWide(), source.draw(60, generator()), size, monkeypatch)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("m", [0, 9, 17, 30])
def test_randaugment_is_torchvisions(monkeypatch, size, m):
    source = RandAugment(3, 2, m)
    theirs = transforms.RandAugment(2, m, STRENGTHS)
    check_against(RandAugment(3, 1, m), transforms.RandAugment(1, m, STRENGTHS), all_of(source), size, monkeypatch)
    check_against(source, theirs, source.draw(60, generator()), size, monkeypatch)


def check_against(source, theirs, draws, size, monkeypatch):
    B, K = draws.choice_BK.shape
    images = some_images(B, size)
    ours = apply(images, source.plan_of(draws, size))
    for b in range(B):
        monkeypatch.setattr(autoaugment, "torch", Scripted(as_torchvision_draws(source, draws, b, K)))
        expected = from_pillow(theirs(to_pillow(images[b])))
        assert torch.equal(ours[b], expected), [field[b].tolist() for field in draws]
    monkeypatch.undo()


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("learned_on", ["cifar10", "imagenet"])
def test_autoaugment_is_torchvisions(monkeypatch, size, learned_on):
    source = AutoAugmentPolicies(2, learned_on)
    theirs = transforms.AutoAugment(AutoAugmentPolicy(learned_on))
    every = list(itertools.product(range(25), (0.0, 1.0), (0.0, 1.0), (0, 1), (0, 1)))
    drawn = zip(*(one.tolist() for one in source.raw_draws(100, generator())), strict=True)
    every += [(r, *numbers, *coins) for r, numbers, coins in drawn]
    raw = (torch.tensor([row[i] for row in every]) for i in range(5))
    subpolicy_B, first, second, coin, other = raw
    numbers_BK, coins_BK = torch.stack((first, second), 1), torch.stack((coin, other), 1)
    images = some_images(len(every), size)
    ours = apply(images, source.plan_of(source.draws_of(subpolicy_B, numbers_BK, coins_BK), size))
    for b in range(len(every)):
        params = int(subpolicy_B[b]), numbers_BK[b], coins_BK[b]
        monkeypatch.setattr(theirs, "get_params", lambda _, params=params: params)
        assert torch.equal(ours[b], from_pillow(theirs(to_pillow(images[b])))), params


@pytest.mark.parametrize("size", [*SIZES, (224, 224)], ids=str)
def test_ranges_are_torchvisions(size):
    spaces = {
        "trivial": (trivial_space(size), transforms.TrivialAugmentWide()._augmentation_space(STRENGTHS)),
        "rand": (usual_space(STRENGTHS, size), transforms.RandAugment()._augmentation_space(STRENGTHS, size)),
        "auto": (usual_space(10, size), transforms.AutoAugment()._augmentation_space(10, size)),
    }
    for name, (ours, theirs) in spaces.items():
        given = {"Identity"} if name == "rand" else {"Invert"} if name == "auto" else set()
        assert [key for key in theirs if key not in given] == list(ours), "in the same order"
        for key, (values, signed) in ours.items():
            assert (torch.tensor(values) == theirs[key][0].float()).all(), key
            assert signed == theirs[key][1]


@pytest.mark.parametrize("policy", [policy for policy in PER_IMAGE if policy != "augmix"])
def test_each_copy_draws_with_the_published_probabilities(policy):
    source = build_policies(Config(policy=policy, M=4))
    source.resample(generator(), Fraction(0))
    images = some_images(1, (32, 32)).expand(500, -1, -1, -1).repeat_interleave(4, 0)
    plan = source.plan(500, (32, 32), generator(1))
    copies = apply(images, plan).unflatten(0, (500, 4))
    assert (copies[:, 0] != copies[:, 1]).flatten(1).any(1).double().mean() > 0.8
    B = 20_000
    draws = source.draw(B, generator(2))
    count = draws.choice_BK.flatten().bincount(minlength=14)
    if policy in ("trivialaugment", "randaugment"):
        assert (count / count.sum() - 1 / 14).abs().max() < 0.006
    assert draws.negative_BK.double().mean().item() == pytest.approx(0.5, abs=0.02)
    if policy.startswith("autoaugment"):
        table = transforms.AutoAugment(AutoAugmentPolicy(policy.removeprefix("autoaugment_"))).policies
        expected = sum(p for pair in table for _, p, _ in pair) / len(table) / 2
        assert draws.applied_BK.double().mean().item() == pytest.approx(expected, abs=0.01)
    record = source.update()
    assert (record["policies"], record["shares"], record["entropy"]) == ([], {}, 0.0)
    assert len(source.descriptions()) == 4


# AugMix


def bilinear(image, matrix):
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)


BILINEAR = {
    "ShearX": (lambda image, m: bilinear(image, (1, m, 0, 0, 1, 0)), [-0.9, -0.3, -0.07, 0.0, 0.013, 0.09, 0.3]),
    "ShearY": (lambda image, m: bilinear(image, (1, 0, 0, m, 1, 0)), [-0.9, -0.3, -0.07, 0.0, 0.013, 0.09, 0.3]),
    "TranslateX": (lambda image, m: bilinear(image, (1, 0, m * image.width, 0, 1, 0)), [-2.0, -1.0, 0.0, 1.0]),
    "TranslateY": (lambda image, m: bilinear(image, (1, 0, 0, 0, 1, m * image.height)), [-2.0, -1.0, 0.0, 1.0]),
    "Rotate": (lambda image, m: image.rotate(m, Image.Resampling.BILINEAR), [-30, -9, -1, 0, 0.3, 7, 9, 45, 90, 180]),
}


@pytest.mark.parametrize("run", [apply, lambda images, plan: _in_families(images, plan, images)], ids=["cpu", "cuda"])
@pytest.mark.parametrize("size", [(32, 32), (24, 41), (2, 3), (1, 1), (64, 64)], ids=str)
def test_bilinear_geometry_is_pillows(run, size):
    for name, (pillows, magnitudes) in BILINEAR.items():
        images = some_images(len(magnitudes), size)
        op = torch.full((len(magnitudes), 1), row_of(name))
        plan = Plan(op, torch.tensor(magnitudes, dtype=torch.float64)[:, None], bilinear=True)
        for ours, image, magnitude in zip(run(images, plan), images, magnitudes, strict=True):
            assert torch.equal(ours, from_pillow(pillows(to_pillow(image), magnitude))), (name, magnitude)


def recipe(image, chain, size):
    """One chain by the recipe, on a Pillow image. chain: (operation, level of 0..10, negative)."""
    for name, level, negative in chain:
        sign = -1 if negative else 1
        match name:
            case "AutoContrast":
                image = ImageOps.autocontrast(image)
            case "Equalize":
                image = ImageOps.equalize(image)
            case "Posterize":
                image = ImageOps.posterize(image, 4 - int(level * 4 / 10))
            case "Rotate":
                image = image.rotate(sign * int(level * 30 / 10), resample=Image.Resampling.BILINEAR)
            case "Solarize":
                image = ImageOps.solarize(image, 256 - int(level * 256 / 10))
            case "ShearX":
                image = bilinear(image, (1, sign * level * 0.3 / 10, 0, 0, 1, 0))
            case "ShearY":
                image = bilinear(image, (1, 0, 0, sign * level * 0.3 / 10, 1, 0))
            case "TranslateX":
                image = bilinear(image, (1, 0, sign * int(level * size[1] / 3 / 10), 0, 1, 0))
            case "TranslateY":
                image = bilinear(image, (1, 0, 0, 0, 1, sign * int(level * size[0] / 3 / 10)))
    return image


@pytest.mark.parametrize("size", [(32, 32), (20, 47)], ids=str)
def test_chains_of_augmix_are_the_recipes(size, monkeypatch):
    """The draws are read where they are turned into magnitudes."""
    source, noted = AugMix(2), []
    magnitudes = source._magnitudes
    monkeypatch.setattr(source, "_magnitudes", lambda *drawn: noted.append(drawn) or magnitudes(*drawn))
    plan = source.plan(60, size, generator())
    choice_BWK, level_BWK, negative_BWK, _ = noted[0]
    images = some_images(120, size)
    copies = images.repeat_interleave(4, 0)
    views = apply(copies, plan).unflatten(0, (120, 4))
    assert torch.equal(views.flatten(0, 1), _in_families(copies, plan, copies)), "on other devices"
    applied_BWK = plan.op_BK.unflatten(0, (120, 4))[:, 1:] >= 0
    seen = set()
    for b in range(120):
        assert torch.equal(views[b, 0], images[b]), "the first view is the image itself"
        for w in range(3):
            depth = int(applied_BWK[b, w].sum())
            assert applied_BWK[b, w].tolist() == [k < depth for k in range(3)]
            drawn = (choice_BWK[b, w], level_BWK[b, w], negative_BWK[b, w])
            chain = [(AugMix.OPS[o], v, n) for o, v, n in zip(*(d.tolist() for d in drawn), strict=True)][:depth]
            assert torch.equal(views[b, 1 + w], from_pillow(recipe(to_pillow(images[b]), chain, size))), chain
            seen |= {name for name, _, _ in chain}
    assert seen == set(AugMix.OPS)
    assert 0.1 <= level_BWK.min() < 0.2
    assert 2.9 < level_BWK.max() <= 3.0
    depths = applied_BWK.sum(2).flatten().bincount(minlength=4)
    assert depths[0] == 0
    assert (depths[1:] / 360 - 1 / 3).abs().max() < 0.1


@pytest.mark.parametrize(("dataset", "severity"), [("cifar10", 3), ("imagenet", 1)])
def test_augmix_is_as_strong_as_its_authors_code(dataset, severity):
    source = build_policies(Config(dataset=dataset, policy="augmix", crop_padding=0, M=2))
    plan = source.plan(500, (32, 32), torch.Generator().manual_seed(0))
    angles = plan.magnitude_BK[plan.op_BK == row_of("Rotate")].abs()
    assert angles.max() == 3 * severity - 1, "whole degrees below a share of 30"


def test_weights_of_augmix_follow_beta_and_dirichlet():
    weight_BV = AugMix(1).weights(20_000, generator())
    assert weight_BV.dtype == torch.float32
    torch.testing.assert_close(weight_BV.sum(1), torch.ones(20_000))
    m = 1 - weight_BV[:, 0]
    assert (m.mean().item(), m.var().item()) == pytest.approx((1 / 2, 1 / 12), abs=0.005)
    w = weight_BV[:, 1:] / m[:, None]
    assert w.mean(0).tolist() == pytest.approx([1 / 3] * 3, abs=0.01)
    assert w.var(0).tolist() == pytest.approx([1 / 18] * 3, abs=0.003), "of Dirichlet(1, 1, 1)"
    clean = AugMix(3, clean_first=True).weights(10, generator())
    assert (clean[::3] == torch.tensor([1.0, 0, 0, 0])).all()
    assert (clean[1::3, 0] < 1).all()


def test_a_mixture_by_hand():
    views, weight_BV = some_images(8, (5, 6)), AugMix(2).weights(1, generator())
    mixed = mix(views, weight_BV)
    expected = (views.unflatten(0, (2, 4)).double() * weight_BV.double()[..., None, None, None]).sum(1)
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed.double(), expected, atol=1e-4, rtol=1e-6)


def test_the_loss_of_augmix_by_hand():
    logits_BC = torch.randn(12, 5, generator=generator()).mul(3).requires_grad_()
    labels_B = torch.arange(4).repeat_interleave(3)
    loss_B = torch.nn.functional.cross_entropy(logits_BC, labels_B, reduction="none")
    loss = augmix_loss(loss_B, logits_BC, 3, 12.0)
    p = np.exp(logits_BC.detach().numpy().astype(np.float64))
    p = (p / p.sum(1, keepdims=True)).reshape(4, 3, 5)
    mean = p.mean(1, keepdims=True)
    divergence = (p * np.log(p / mean)).sum(2).mean(1).mean()
    expected = -np.log(p[np.arange(4), 0, np.arange(4)]).mean() + 12 * divergence
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    loss.backward()
    assert (logits_BC.grad.abs().sum(1) > 0).all(), "all copies are learned from"
    same_B = torch.zeros(3, 5, requires_grad=True)
    assert augmix_loss(torch.ones(3), same_B, 3, 12.0).item() == pytest.approx(1.0), "equal copies do not diverge"


def test_a_portion_of_views_is_the_same_as_in_the_whole():
    source, images = AugMix(3), some_images(6, (16, 16)).repeat_interleave(12, 0)
    plan = source.plan(6, (16, 16), generator())
    part, outside = portion(plan, 24, 48)
    assert part.bilinear
    assert len(outside) == 0
    assert torch.equal(apply(images[24:48], part), apply(images, plan)[24:48])


@pytest.fixture
def little(train, monkeypatch):
    monkeypatch.setattr(main, "build_model", little_network)
    return lambda name, *settings: train(name, *LITTLE, *settings)


@pytest.mark.parametrize(
    "settings", [(p,) for p in PER_IMAGE] + [("augmix", "jsd=12", "crop_per_copy=false", "M=3")], ids=str
)
def test_whole_runs(little, settings):
    policy, *others = settings
    run = little("run", f"policy={policy}", *others)
    records = lines(run / "policies.jsonl")
    assert all(record["policies"] == [] for record in records)
    assert len(records[0]["losses"]) == (3 if others else 2)
    assert lines(run / "metrics.jsonl")[-1]["train_loss"] > 0
    little("parts", f"policy={policy}", *others, "--stop_epoch=1")
    parts = little("parts", f"policy={policy}", *others, "--resume")
    assert files(parts) == files(run)
    assert same(final_state(parts), final_state(run))


def test_with_jsd_only_the_first_copy_is_clean():
    config = Config(
        policy="augmix", jsd=12, crop_per_copy=False, M=3, cutout=0, crop_padding=0, flip=False, model="wresnet10_1"
    )
    policies, images = build_policies(config), some_images(4, (32, 32))
    plan, weight_BV = policies.plan(4, (32, 32), generator()), policies.weights(4, generator(1))
    mixed = mix(apply(images.repeat_interleave(12, 0), plan), weight_BV).unflatten(0, (4, 3))
    assert torch.equal(mixed[:, 0], images.float())
    assert (mixed[:, 1] != images).any()
    assert (mixed[:, 2] != mixed[:, 1]).any()
    assert policies.descriptions()[0] == "as it is"
