"""The fixed part of the augmentation and the order of the images, against Pillow, torchvision and NumPy."""

import itertools
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms as T
from PIL import Image
from torchvision.transforms import v2

from augmentations import row_of
from config import Config
from dataloader import (
    Normalise,
    TrainLoader,
    crop_and_flip,
    cutmix,
    cutout_mask,
    draw_centres,
    draw_crops,
    draw_mixing,
    epoch_batches,
    make_copies,
)
from datasets.splits import ResidentSplit
from policies import build_policies
from policies.answers import Answers, MixedLabels
from policies.sources import PolicySource, RandomPolicies
from utils import keyed_generator

CPU = torch.device("cpu")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def noise(count, height=12, width=16):
    return torch.randint(1, 256, (count, 3, height, width), dtype=torch.uint8, generator=generator(9))


# Order


def test_an_epoch_is_a_permutation_in_whole_batches():
    batches = epoch_batches(103, 10, seed=0, epoch=0)
    assert [len(batch) for batch in batches] == [10] * 10
    assert len(torch.cat(batches).unique()) == 100
    assert torch.equal(torch.cat(batches), torch.cat(epoch_batches(103, 10, seed=0, epoch=0)))
    for other in (epoch_batches(103, 10, seed=1, epoch=0), epoch_batches(103, 10, seed=0, epoch=1)):
        assert not torch.equal(torch.cat(batches), torch.cat(other))


# Crop, flip, normalise, Cutout


def test_crops_and_flips_are_copies_of_padded_windows():
    images, padding = noise(1500), 3
    config = Config(M=1, crop_padding=padding)
    ours = crop_and_flip(images, torch.arange(1500), draw_crops(len(images), config, generator()))
    padded = np.pad(images.numpy(), ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    seen = set()
    for image, window in zip(padded, ours.numpy(), strict=True):
        fits = [
            (dy, dx, flipped)
            for dy in range(2 * padding + 1)
            for dx in range(2 * padding + 1)
            for flipped in (False, True)
            if np.array_equal(window, image[:, dy : dy + 12, dx : dx + 16][:, :, :: -1 if flipped else 1])
        ]
        assert len(fits) == 1
        seen |= set(fits)
    assert len(seen) == 98, "all 49 shifts occur, flipped and not"


def test_crop_and_flip_can_be_switched_off():
    images = noise(50)
    assert draw_crops(50, Config(crop_padding=0, flip=False), generator()) is None
    assert draw_crops(50, Config(dataset="imagenet", crop_padding=0), generator()) is None, "cropped when read"
    flipped = crop_and_flip(images, torch.arange(50), draw_crops(50, Config(M=1, crop_padding=0), generator()))
    is_same = (flipped == images).flatten(1).all(1)
    is_mirrored = (flipped == images.flip(3)).flatten(1).all(1)
    assert (is_same ^ is_mirrored).all()
    assert 10 < is_same.sum() < 40


def test_copies_are_image_major_and_drawn_each_or_once():
    images = noise(6)
    every = torch.arange(24)

    def copies(**settings):
        return make_copies(images, every, 4, draw_crops(6, Config(M=4, **settings), generator()))

    assert torch.equal(copies(crop_padding=0, flip=False), images.repeat_interleave(4, 0))
    shared = copies(crop_per_copy=False).view(6, 4, -1)
    assert (shared == shared[:, :1]).all()
    each = copies(crop_per_copy=True).view(6, 4, -1)
    assert not (each == each[:, :1]).all()


def test_any_copies_can_be_made_from_the_images_at_hand():
    images, crops = noise(6), draw_crops(6, Config(M=4), generator())
    every = make_copies(images, torch.arange(24), 4, crops)
    some = torch.tensor([17, 8, 23, 8])
    assert torch.equal(make_copies(images[2:], some, 4, crops, first=2), every[some])


def test_copies_made_in_parts_are_those_of_the_whole_batch():
    """To the bit, with SamplePairing's partners inside and outside the part, for any cut."""
    config = Config(M=3, batch_size=12, ops=("SamplePairing", "Rotate", "Cutout"), policy="random", Q=2)
    split = ResidentSplit(noise(12, 16, 16), torch.arange(12) % 10)
    policies = build_policies(config)
    policies.resample(generator())

    def inputs(*parts):
        loader = TrainLoader(split, config, policies, Normalise(config, CPU), parts, keyed_generator)
        ((_, micro_batches),) = loader.steps(0)
        return [torch.cat(tensors) for tensors in zip(*micro_batches, strict=True)]

    images_BCHW, labels_B = inputs(range(12))
    assert torch.equal(labels_B, labels_B[::3].repeat_interleave(3)), "copies of an image stand together"
    for cuts in ((0, 5, 12), (0, 5, 6, 12)):
        parts_BCHW, parts_B = inputs(*(range(*pair) for pair in itertools.pairwise(cuts)))
        assert torch.equal(parts_BCHW, images_BCHW)
        assert torch.equal(parts_B, labels_B)


def test_a_step_is_drawn_from_the_policies_in_use_when_it_is_taken():
    config = Config(M=2, batch_size=4, policy="none", crop_padding=0, flip=False, cutout=0)
    split, policies = ResidentSplit(noise(8), torch.arange(8)), PolicySource(2, 1, 1)
    loader = TrainLoader(split, config, policies, Normalise(config, CPU), [range(4)], keyed_generator)
    for step, micro_batches in loader.steps(0, first=1):
        policies.op_MQK[:] = row_of("Invert")
        ((inputs_BCHW, labels_B),) = micro_batches
        assert step == 1
        images_NCHW = split.images[epoch_batches(8, 4, config.seed, 0)[1]]
        expected_NCHW = Normalise(config, CPU)(255 - images_NCHW)
        torch.testing.assert_close(inputs_BCHW, expected_NCHW.repeat_interleave(2, 0), atol=0, rtol=0)
        assert labels_B.tolist() == epoch_batches(8, 4, config.seed, 0)[1].repeat_interleave(2).tolist()


def test_normalise_equals_torchvision():
    images = noise(4)
    config = Config(dataset="cifar10")
    reference = T.Compose([T.ToTensor(), T.Normalize((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))])
    expected = torch.stack([reference(Image.fromarray(image.permute(1, 2, 0).numpy())) for image in images])
    assert torch.equal(Normalise(config, CPU)(images), expected)
    custom = Normalise(Config(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)), CPU)(images)
    assert torch.equal(custom, images / 255)


@pytest.mark.parametrize("side", [0, 1, 5, 8])
def test_cutout_blanks_one_square_that_may_reach_over_the_border(side):
    images, normalise = noise(3000), Normalise(Config(), CPU)
    kept = cutout_mask(side, draw_centres(3000, 12, 16, generator()), 12, 16, CPU)
    inputs, before = normalise(images, kept), normalise(images)
    blank = (inputs != before).any(1)
    assert (inputs[blank[:, None].expand_as(inputs)] == 0).all()
    full = blank.sum((1, 2)) == side * side
    assert (blank.sum((1, 2)) <= side * side).all()
    for image in blank[blank.any(2).any(1)]:
        rows, columns = image.any(1).nonzero().flatten(), image.any(0).nonzero().flatten()
        box = image[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        assert box.all()
        assert max(box.shape) <= side
    assert full.any()
    assert blank.any(0).all() or side == 0, "every pixel can be blanked"


@pytest.mark.parametrize(("images", "size"), [(24, 3), (24, 1), (10, 2), (128, 4), (7, 1)])
def test_partners_of_streamed_images_do_not_depend_on_processes(images, size):
    """Where no group of the batch is cut; whatever that number is, a partner is another image of the same part."""
    config = Config(model="wresnet10_1", batch_size=images, M=2, ops=("SamplePairing",))
    streamed = SimpleNamespace(resident=False)
    plans = []
    for parts in (1, size):
        policies = RandomPolicies(2, 2, 2, ("SamplePairing",))
        policies.resample(torch.Generator().manual_seed(0))
        loader = TrainLoader(streamed, config, policies, None, [range(images)], lambda *key: keyed_generator(1, *key))
        read = torch.zeros(images // parts, 3, 8, 8, dtype=torch.uint8)
        plans.append(loader.draw(read, "train", 0, images).plan)
    assert torch.equal(*(plan.partner_BK for plan in plans))
    image, partner = torch.arange(2 * images)[:, None] // 2, plans[0].partner_BK // 2
    assert (image != partner).all()
    part = images // size
    assert torch.equal(image.expand_as(partner) // part, partner // part)


# mixup and CutMix


def loaded(parts, split, policies, **settings):
    """The inputs and labels of a step, a pair for each part."""
    config = Config(M=3, batch_size=12, policy="random", **settings)
    loader = TrainLoader(split, config, policies, Normalise(config, CPU), parts, keyed_generator)
    ((_, micro_batches),) = loader.steps(0)
    return list(micro_batches)


@pytest.fixture
def random_policies():
    policies = build_policies(Config(M=3, policy="random"))
    policies.resample(generator())
    return policies


@pytest.mark.parametrize(("settings", "theirs"), [({"mixup": 0.4}, v2.MixUp), ({"cutmix": 1.0}, v2.CutMix)])
def test_mixing_equals_torchvisions_for_each_policy(settings, theirs, random_policies, monkeypatch):
    split = ResidentSplit(noise(12, 16, 16), torch.arange(12) % 10)
    ((plain_BCHW, labels_B),) = loaded([range(12)], split, random_policies)
    ((mixed_BCHW, mixed_labels),) = loaded([range(12)], split, random_policies, **settings)
    mixing = draw_mixing(Config(**settings), 16, 16, keyed_generator("mixing", 0).initial_seed())
    assert mixed_labels.share == mixing.share
    transform = theirs(num_classes=10)
    drawn = {"lam": mixing.share, "box": mixing.box, "lam_adjusted": mixing.share, "batch_size": 12}
    monkeypatch.setattr(transform, "make_params", lambda _: drawn)
    logits_BC = torch.randn(36, 10, generator=generator())
    answers = Answers.of(logits_BC, mixed_labels, Config(label_smoothing=0.1))
    for m in range(3):
        expected_BCHW, targets_BC = transform(plain_BCHW[m::3], labels_B[m::3])
        assert torch.equal(mixed_BCHW[m::3], expected_BCHW)
        loss_B = F.cross_entropy(logits_BC[m::3], targets_BC, reduction="none", label_smoothing=0.1)
        torch.testing.assert_close(answers.loss_B[m::3], loss_B)
        torch.testing.assert_close(answers.reward_B[m::3], loss_B)
        assert torch.equal(answers.right_B[m::3], logits_BC[m::3].argmax(1) == targets_BC.argmax(1))


def test_the_nonsaturating_reward_of_mixed_labels_is_their_mean():
    logits_BC, labels = torch.randn(6, 4), MixedLabels(torch.arange(6) % 4, torch.arange(6) % 3, 0.3)
    reward_B = Answers.of(logits_BC, labels, Config(reward_loss="nonsaturating")).reward_B
    p_BC, b = logits_BC.softmax(1), torch.arange(6)
    expected_B = 0.3 * torch.log1p(-p_BC[b, labels.first_B]) + 0.7 * torch.log1p(-p_BC[b, labels.second_B])
    torch.testing.assert_close(reward_B, expected_B)


def test_boxes_equal_torchvisions(monkeypatch):
    """For the same share and pixel, in corners and in the middle, on an image that is not square."""

    class Scripted:
        """torch, as torchvision's module sees it, whose randint returns the pixel."""

        def __getattr__(self, name):
            return getattr(torch, name)

        def randint(self, *_, **__):
            return torch.tensor([next(pixel)])

    monkeypatch.setattr(sys.modules[v2.CutMix.__module__], "torch", Scripted())
    transform = v2.CutMix(num_classes=2)
    for share, x, y in itertools.product((0.0, 0.01, 0.37, 0.9, 1.0), (0, 11, 19), (0, 5, 11)):
        transform._dist, pixel = SimpleNamespace(sample=lambda _, share=share: share), iter((x, y))
        theirs = transform.make_params([noise(2, 12, 20)])
        assert cutmix(share, x, y, 12, 20) == (pytest.approx(theirs["lam_adjusted"]), theirs["box"])


@pytest.mark.parametrize("settings", [{"mixup": 0.4}, {"cutmix": 1.0}])
def test_parts_are_mixed_as_the_whole_batch(settings, random_policies):
    split = ResidentSplit(noise(12, 16, 16), torch.arange(12) % 10)
    ((whole_BCHW, whole),) = loaded([range(12)], split, random_policies, **settings)
    for cuts in ((0, 5, 12), (0, 1, 2, 12)):
        parts = loaded([range(*pair) for pair in itertools.pairwise(cuts)], split, random_policies, **settings)
        assert torch.equal(torch.cat([inputs for inputs, _ in parts]), whole_BCHW)
        assert torch.equal(torch.cat([labels.second_B for _, labels in parts]), whole.second_B)
        assert torch.equal(torch.cat([labels.first_B for _, labels in parts]), whole.first_B)


def test_streamed_images_are_mixed_within_their_groups(random_policies):
    """Groups of six of twelve: the first image of a group is mixed with its last, in any part."""

    class Streamed(ResidentSplit):
        resident = False

    split = Streamed(noise(12, 16, 16), torch.arange(12))
    for parts in ([range(12)], [range(6), range(6, 12)], [range(3), range(3, 9), range(9, 12)]):
        labels = [labels for _, labels in loaded(parts, split, random_policies, mixup=1.0)]
        own, partner = (torch.cat([one[k] for one in labels])[::3] for k in (0, 1))
        order = own.tolist()
        assert partner.tolist() == [order[n // 6 * 6 + (n - 1) % 6] for n in range(12)]


def test_shares_follow_the_beta_distribution_of_alpha():
    """Mean 1/2 and variance 1 / (4 (2 alpha + 1)); with both settings, every other step has a box."""
    for alpha in (0.2, 1.0, 5.0):
        config = Config(mixup=alpha)
        shares = torch.tensor([draw_mixing(config, 32, 32, seed).share for seed in range(4000)])
        assert shares.mean().item() == pytest.approx(0.5, abs=0.03)
        assert shares.var().item() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.08)
    config = Config(mixup=1.0, cutmix=1.0)
    without_a_box = sum(draw_mixing(config, 32, 32, seed).box is None for seed in range(1000))
    assert without_a_box == pytest.approx(500, abs=60)
    assert draw_mixing(Config(), 32, 32, 0) is None
