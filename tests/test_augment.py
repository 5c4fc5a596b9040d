"""The transform for other training loops, compared with plans, torchvision's Compose and a DataLoader's workers."""

import json
import pickle

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

import policies
from augmentations import OPS, Augment, apply, row_of
from config import PER_IMAGE

SUBPOLICIES = [[("Rotate", 3), ("Invert", 0, 0.25)], [("Solarize", 2.5)], []]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def images(count=64, size=(16, 20), seed=0):
    return torch.randint(256, (count, 3, *size), dtype=torch.uint8, generator=seeded(seed))


@pytest.mark.parametrize("options", [{}, {"policies": SUBPOLICIES}, {"ops": ["ShearX", "Cutout"], "num_ops": 3}])
def test_it_is_the_plan_engine_on_its_draws(options):
    plan = Augment(**options, generator=seeded(1)).plan(64, (16, 20))
    augmented = Augment(**options, generator=seeded(1))(images())
    assert torch.equal(augmented, apply(images(), plan))
    assert not torch.equal(augmented, images())


def test_random_operations_levels_and_signs_are_uniform():
    plan = Augment(levels=5, num_ops=2, generator=seeded()).plan(16000, (8, 8))
    assert plan.op_BK.shape == (16000, 2)
    shares = plan.op_BK.flatten().bincount(minlength=len(OPS)) / plan.op_BK.numel()
    assert (shares - 1 / len(OPS)).abs().max() < 0.005
    for name in ("Rotate", "Solarize", "Contrast"):
        op = OPS[row_of(name)]
        drawn = plan.magnitude_BK[plan.op_BK == row_of(name)]
        assert set(drawn.abs().tolist()) == {op.magnitude(level, 5) for level in range(5)}
        assert (drawn < 0).double().mean() == pytest.approx(0.4 if op.signed else 0, abs=0.05)  # level 0 has no sign
        assert drawn.abs().unique(return_counts=True)[1].min() > len(drawn) / 5 * 0.85
    assert (plan.partner_BK != torch.arange(16000)[:, None]).all()
    assert plan.centre_BK2.mean((0, 1)).tolist() == pytest.approx([0.5, 0.5], abs=0.01)


def test_subpolicies_and_probabilities_are_drawn_as_given():
    plan = Augment(SUBPOLICIES, generator=seeded()).plan(9000, (8, 8))
    rotated_B, inverted_B = plan.op_BK[:, 0] == row_of("Rotate"), plan.op_BK[:, 1] == row_of("Invert")
    assert rotated_B.double().mean() == pytest.approx(1 / 3, abs=0.02)
    assert inverted_B[rotated_B].double().mean() == pytest.approx(0.25, abs=0.03)
    assert not inverted_B[~rotated_B].any()
    assert (plan.op_BK == -1).all(1).double().mean() == pytest.approx(1 / 3, abs=0.02)
    assert set(plan.magnitude_BK[plan.op_BK == row_of("Solarize")].tolist()) == {2.5 / 9 * 256}
    assert set(plan.magnitude_BK[rotated_B, 0].tolist()) == {10.0, -10.0}


def test_lists_and_files_of_every_form_are_the_same(tmp_path):
    as_lists = json.loads(json.dumps(SUBPOLICIES))
    forms = {"flat.json": as_lists, "policies.json": [as_lists[:2], as_lists[2:]], "run.jsonl": None}
    expected = Augment(SUBPOLICIES, levels=10, generator=seeded()).plan(500, (8, 8))
    for name, content in forms.items():
        lines = [json.dumps({"policies": [[[["Color", 1]]]]}), json.dumps({"policies": [as_lists], "levels": 10})]
        (tmp_path / name).write_text(json.dumps(content) if content else "\n".join(lines) + "\n", encoding="utf-8")
        plan = Augment.from_file(tmp_path / name, generator=seeded()).plan(500, (8, 8))
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(plan[:4], expected[:4], strict=True))
    (tmp_path / "levels.json").write_text(json.dumps({"policies": [[["Rotate", 4]]], "levels": 5}), encoding="utf-8")
    assert Augment.from_file(tmp_path / "levels.json").plan(1, (8, 8)).magnitude_BK.abs().item() == 30


def test_inside_compose_it_does_what_it_does_outside():
    picture = Image.frombytes("RGB", (20, 16), bytes(images(1).numpy().tobytes()))
    as_tensor, as_image = v2.PILToTensor()(picture), v2.ToImage()(picture)
    alone = Augment(generator=seeded())(as_tensor)
    assert torch.equal(v2.Compose([v2.PILToTensor(), Augment(generator=seeded())])(picture), alone)
    both = v2.Compose([v2.ToImage(), Augment(generator=seeded())])(picture, 7)
    assert type(both[0]) is tv_tensors.Image
    assert torch.equal(both[0], alone)
    assert both[1] == 7
    flip_and_scale = [v2.RandomHorizontalFlip(p=1), Augment(generator=seeded()), v2.ToDtype(torch.float32, scale=True)]
    scaled = v2.Compose(flip_and_scale)(as_image)
    assert type(scaled) is tv_tensors.Image
    assert torch.equal(scaled.mul(255).round(), Augment(generator=seeded())(as_tensor.flip(2)).float())


def test_a_batch_in_compose_keeps_its_labels():
    labels = torch.arange(64)
    batch, kept = v2.Compose([Augment(generator=seeded()), v2.ToDtype(torch.float32, scale=True)])(images(), labels)
    assert torch.equal(batch.mul(255).round().to(torch.uint8), Augment(generator=seeded())(images()))
    assert kept is labels
    with pytest.raises(ValueError, match="moves images only, not Mask"):
        Augment()(images(), tv_tensors.Mask(images()[:, 0]))


@pytest.mark.parametrize("name", [None, "randaugment", "augmix"])
def test_a_default_device_changes_nothing(name):
    def augmented(batch):
        transform = Augment(SUBPOLICIES) if name is None else policies.transform(name)
        transform.generator = draws
        return transform(batch)

    batch, draws = images(), seeded()
    expected = augmented(batch)
    draws = seeded()
    with torch.device("meta"):
        assert torch.equal(augmented(batch), expected)


class Augmented(Dataset):
    def __init__(self, transform):
        self.transform = transform

    def __len__(self):
        return 12

    def __getitem__(self, position):
        return self.transform(images(1)[0])


@pytest.mark.parametrize("generator", [None, seeded(5)])
def test_workers_have_streams_of_their_own_that_repeat(generator):
    def epoch(seed):
        loader = DataLoader(Augmented(Augment(generator=generator)), 3, num_workers=2, generator=seeded(seed))
        return torch.cat(list(loader))

    first = epoch(0)
    assert torch.equal(first, epoch(0)), "the loader's seed decides"
    assert not torch.equal(first, epoch(1))
    batches = first.unflatten(0, (4, 3))  # from the two workers in turn
    assert not torch.equal(batches[0], batches[1])


def test_a_copy_for_another_process_does_the_same():
    for transform in (Augment(SUBPOLICIES), *map(policies.transform, PER_IMAGE)):
        copy = pickle.loads(pickle.dumps(transform))
        transform(images(4))
        for one in (transform, copy):
            one.generator = seeded(3)
        assert torch.equal(copy(images()), transform(images()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_floats_are_rounded_to_bytes_and_returned_as_floats(dtype):
    as_bytes = Augment(generator=seeded())(images())
    floats = (images().float() / 255).to(dtype)
    augmented = Augment(generator=seeded(), float_images="round")(floats)
    assert augmented.dtype == dtype
    assert torch.equal(augmented, (as_bytes.float() / 255).to(dtype))
    assert torch.equal(Augment([[]], float_images="round")(floats), floats), "without operations, nothing changes"


BAD_IMAGES = {
    "a sample": ({}, {"image": images()}, "takes tensors, not dict; call it on the images"),
    "floats": ({}, images().float() / 255, "set float_images='round'"),
    "floats of bytes": ({"float_images": "round"}, images().float(), "takes floats in 0..1; divide bytes by 255"),
    "not a number": ({"float_images": "round"}, torch.full((2, 3, 8, 8), torch.nan), "takes floats in 0..1"),
    "integers": ({"float_images": "round"}, images().int(), "takes uint8 images, not torch.int32"),
    "grey": ({}, images()[:, :1], r"not \(64, 1, 16, 20\); grey images need their channel three times"),
    "one grey": ({}, images()[0, :1], r"not \(1, 16, 20\)"),
    "channels last": ({}, images().permute(0, 2, 3, 1), r"images \(B, 3, H, W\) or \(3, H, W\), not"),
    "Pillow": ({}, Image.new("RGB", (8, 8)), r"not Image; put torchvision.transforms.v2.PILToTensor\(\) before it"),
}


@pytest.mark.parametrize("what", BAD_IMAGES)
def test_other_images_are_refused_with_the_remedy(what):
    options, wrong, words = BAD_IMAGES[what]
    with pytest.raises(ValueError, match=words) as refusal:
        Augment(**options)(wrong)
    assert "\n" not in str(refusal.value)


BAD_OPTIONS = {
    "operation": (
        {"policies": [[("Rotate", 1)], [("Rotat", 1)]]},
        "sub-policy 2: 'Rotat' is no operation; did you mean",
    ),
    "far away": ({"policies": [[("XYZ", 1)]]}, "'XYZ' is no operation; there are ShearX, ShearY"),
    "level": ({"policies": [[("Rotate", 9.5)]]}, "9.5 is no level: 0 to 9"),
    "probability": ({"policies": [[("Rotate", 1, 1.2)]]}, "1.2 is no probability: 0 to 1"),
    "text": ({"policies": [[("Rotate", 1, "0.5x")]]}, "'0.5x' is no probability"),
    "no list": ({"policies": 5}, "5 is no list of sub-policies"),
    "no sub-policy": ({"policies": ["Rotate"]}, "'Rotate' is no list of sub-policies"),
    "an operation": ({"policies": [("Rotate", 1)]}, r"'Rotate' is not \[operation, level\]"),
    "empty": ({"policies": []}, "there are no policies"),
    "both": ({"policies": SUBPOLICIES, "ops": ["Rotate"]}, "with policies, leave it out"),
    "no ops": ({"ops": []}, "ops must name at least one operation"),
    "unknown op": ({"ops": ["Rotat"]}, "unknown operation 'Rotat'"),
    "levels": ({"levels": 1}, "levels is a whole number of 2 to 1000, not 1"),
    "num_ops": ({"num_ops": 0}, "num_ops is a whole number of 1 to 1000, not 0"),
    "floats": ({"float_images": "yes"}, "float_images is None or 'round', not 'yes'"),
}


@pytest.mark.parametrize("what", BAD_OPTIONS)
def test_wrong_options_are_refused_by_name(what):
    options, words = BAD_OPTIONS[what]
    with pytest.raises(ValueError, match=words):
        Augment(**options)


def test_a_generator_of_another_device_is_refused(monkeypatch):
    class OnCuda:
        device = torch.device("cuda")

    with pytest.raises(ValueError, match="generator is on cuda; draws are made on the CPU"):
        Augment(generator=OnCuda())


def test_wrong_files_are_refused_by_name(tmp_path):
    for content, words in (
        ("policies:\n  - x", "mine.json: is not JSON"),
        ("[" * 10**5, "is not JSON"),
        ('{"policies": [], "levels": 10}', "there are no policies"),
        ('{"policies": [[["Rotate", 1]]], "levels": 1e9}', "levels is a whole number"),
        ('[[["Rotate", 1, 1.2]]]', "mine.json: sub-policy 1: 1.2 is no probability"),
    ):
        (tmp_path / "mine.json").write_text(content, encoding="utf-8")
        with pytest.raises(ValueError, match=words):
            Augment.from_file(tmp_path / "mine.json")


def test_what_is_printed_says_what_it_does():
    assert repr(Augment()) == "Augment(16 operations, num_ops=2, levels=10)"
    assert repr(Augment(SUBPOLICIES, levels=11, float_images="round")) == (
        "Augment(3 sub-policies of up to 2 operations, levels=11, float_images='round')"
    )
    assert "one of 14 operations at one of 31 strengths" in repr(policies.transform("trivialaugment"))


@pytest.mark.parametrize("name", PER_IMAGE)
def test_a_published_augmentation_is_its_source_on_every_image(name):
    transform = policies.transform(name, generator=seeded(2))
    source, draws = policies.transform(name).source, seeded(2)
    plan = source.plan(64, (16, 20), draws)
    expected = apply(images().repeat_interleave(source.views, 0), plan)
    if source.views > 1:
        weight_BV = source.weights(64, draws)
        expected = (expected.unflatten(0, (64, -1)) * weight_BV[..., None, None, None]).sum(1)
    assert (transform(images()).float() - expected.float()).abs().max() <= 0.5001
    assert transform(images(1)[0]).shape == (3, 16, 20)


def test_settings_of_a_published_augmentation_are_its_configs():
    transform = policies.transform("randaugment", randaugment_n=4, randaugment_m=30)
    assert transform.plan(5, (8, 8)).op_BK.shape == (5, 4)
    assert policies.transform("augmix", dataset="imagenet").source.severity == 1
    with pytest.raises(ValueError, match="'trivial' is no published augmentation; did you mean trivialaugment"):
        policies.transform("trivial")
    with pytest.raises(ValueError, match="'fast' is no published augmentation; there are trivialaugment, randaugment"):
        policies.transform("fast")
    with pytest.raises(Exception, match="randaugment_m: 31 is not between 0 and 30"):
        policies.transform("randaugment", randaugment_m=31)
