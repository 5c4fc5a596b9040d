"""Every operation against Pillow, bit for bit; plans against one operation at a time."""

import math
import platform
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageOps

import augmentations
from augmentations import OPS, Op, Plan, apply, apply_op, row_of
from config import PAPER_OPS

# Pillow's builds for other machines may round a blend's product and sum once: see augmentations.py. There, a blend in
# numpy that rounds both is the reference.
PILLOW_ROUNDS_TWICE = platform.machine().lower() in ("x86_64", "amd64")
SIZES = [(32, 32), (17, 23), (23, 17), (224, 224), (1, 5), (2, 2)]  # rows, columns


def affine(image, matrix):
    return image.transform(image.size, Image.Transform.AFFINE, matrix)


def pillow_cutout(image, fraction, centre):
    if fraction == 0:
        return image
    width, height = image.size
    x, y, side = centre[0] * width, centre[1] * height, fraction * width
    x0, y0 = int(max(0, x - side / 2)), int(max(0, y - side / 2))
    image = image.copy()
    ImageDraw.Draw(image).rectangle((x0, y0, min(width, x0 + side), min(height, y0 + side)), (125, 123, 114))
    return image


def blend_rounded_twice(first, second, weight):
    first, second = np.asarray(first).astype(np.float32), np.asarray(second).astype(np.float32)
    product = np.float32(weight) * (second - first)
    return Image.fromarray((first + product).clip(0, 255).astype(np.uint8))


def blend(first, second, weight):
    return Image.blend(first, second, weight) if PILLOW_ROUNDS_TWICE else blend_rounded_twice(first, second, weight)


def enhance(image, kind, factor):
    enhancer = kind(image)
    return enhancer.enhance(factor) if PILLOW_ROUNDS_TWICE else blend(enhancer.degenerate, image, factor)


PILLOW = {
    "ShearX": lambda im, v, **_: affine(im, (1, v, 0, 0, 1, 0)),
    "ShearY": lambda im, v, **_: affine(im, (1, 0, 0, v, 1, 0)),
    "TranslateX": lambda im, v, **_: affine(im, (1, 0, v * im.size[0], 0, 1, 0)),
    "TranslateY": lambda im, v, **_: affine(im, (1, 0, 0, 0, 1, v * im.size[1])),
    "Rotate": lambda im, v, **_: im.rotate(v),
    "AutoContrast": lambda im, v, **_: ImageOps.autocontrast(im),
    "Invert": lambda im, v, **_: ImageOps.invert(im),
    "Equalize": lambda im, v, **_: ImageOps.equalize(im),
    "Solarize": lambda im, v, **_: ImageOps.solarize(im, v),
    "Posterize": lambda im, v, **_: ImageOps.posterize(im, int(v)),
    "Contrast": lambda im, v, **_: enhance(im, ImageEnhance.Contrast, v),
    "Color": lambda im, v, **_: enhance(im, ImageEnhance.Color, v),
    "Brightness": lambda im, v, **_: enhance(im, ImageEnhance.Brightness, v),
    "Sharpness": lambda im, v, **_: enhance(im, ImageEnhance.Sharpness, v),
    "Cutout": lambda im, v, centre, **_: pillow_cutout(im, v, centre),
    "SamplePairing": lambda im, v, partner, **_: blend(im, partner, v),
}
COMPARED = [op for op in OPS if op.name in PILLOW]
each_op = pytest.mark.parametrize("op", COMPARED, ids=lambda op: op.name)


def to_pillow(image_CHW):
    return Image.fromarray(image_CHW.permute(1, 2, 0).contiguous().numpy())


def from_pillow(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def with_pillow(name, images_BCHW, magnitude_B, partner, centre):
    return torch.stack(
        [
            from_pillow(PILLOW[name](to_pillow(i), float(v), partner=to_pillow(p), centre=c.tolist()))
            for i, v, p, c in zip(images_BCHW, magnitude_B, partner, centre, strict=True)
        ]
    )


def assert_equals_pillow(name, ours, expected):
    differing = (ours != expected).count_nonzero()
    assert differing == 0, f"{name}: {differing} values differ"


def sample_images(height, width, seed=0):
    """Real-looking, noisy, constant, two-valued and one-pixel-outlier images, uint8 (B, 3, H, W)."""
    g = torch.Generator().manual_seed(seed)
    noise = torch.randint(0, 256, (3, height, width), generator=g, dtype=torch.uint8)
    scene = from_pillow(to_pillow(noise).filter(ImageFilter.GaussianBlur(max(1, height // 12))))
    ramp = torch.linspace(20, 230, height * width).view(1, height, width)
    scene = (
        ((scene.float() - 128) * 3 + ramp + torch.tensor([0.0, 15.0, -25.0])[:, None, None])
        .clamp(5, 250)
        .to(torch.uint8)
    )
    constant = torch.tensor([7, 128, 255], dtype=torch.uint8)[:, None, None].expand(3, height, width)
    two_valued = torch.where(noise[:1] < 90, 30, 55).to(torch.uint8).expand(3, height, width)
    outlier = constant.clone()
    outlier[:, height // 2, width // 3] = torch.tensor([255, 0, 1], dtype=torch.uint8)
    black, white = torch.zeros_like(noise), torch.full_like(noise, 255)
    return torch.stack([scene, noise, constant, two_valued, outlier, black, white])


def inputs_at(height, width, op):
    """Every sample image at every level and both signs, with partners and centres."""
    images = sample_images(height, width)
    signs = (1.0, -1.0) if op.signed else (1.0,)
    values = torch.tensor([sign * op.magnitude(level) for level in range(10) for sign in signs], dtype=torch.float64)
    g = torch.Generator().manual_seed(1)
    centre = torch.rand(len(values) * len(images), 2, generator=g, dtype=torch.float64)
    centre[:2] = torch.tensor([[0.0, 0.0], [0.999, 0.999]])
    return (
        images.repeat(len(values), 1, 1, 1),
        values.repeat_interleave(len(images)),
        images.roll(1, 0).repeat(len(values), 1, 1, 1),
        centre,
    )


def run_op(op, images, magnitude, partner, centre):
    return apply_op(images, op.name, magnitude, partner=partner, centre=centre)


def run_in_families(op, images, magnitude, partner, centre):
    """The operation as `apply` runs it on CUDA."""
    op_B1, partner_B1 = torch.full((len(images), 1), row_of(op.name)), torch.arange(len(images))[:, None] + len(images)
    plan = Plan(op_B1, magnitude[:, None], partner_B1, centre[:, None])
    return augmentations._in_families(images, plan, torch.cat((images, partner)))


WAYS = pytest.mark.parametrize("run", [run_op, run_in_families], ids=["alone", "in families"])


def test_every_operation_has_a_pillow_reference():
    missing = [op.name for op in OPS if op.name not in PILLOW]
    assert not missing, f"no Pillow reference for {', '.join(missing)}: add it to PILLOW"


def test_the_first_rows_are_the_papers_in_its_order():
    assert tuple(op.name for op in OPS[:16]) == PAPER_OPS
    assert [(op.low, op.high) for op in OPS[:16]] == [
        (0, 0.3), (0, 0.3), (0, 0.45), (0, 0.45), (0, 30), (None, None), (None, None), (None, None), (0, 256), (4, 8),
        (0.1, 1.9), (0.1, 1.9), (0.1, 1.9), (0.1, 1.9), (0, 0.2), (0, 0.4),
    ]  # fmt: skip
    assert [op.signed for op in OPS[:16]] == [True] * 5 + [False] * 11


@WAYS
@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"{s[0]}x{s[1]}")
@each_op
def test_equals_pillow_at_every_level_and_sign(op, size, run):
    images, magnitude, partner, centre = inputs_at(*size, op)
    before = images.clone()
    ours = run(op, images, magnitude, partner, centre)
    assert_equals_pillow(op.name, ours, with_pillow(op.name, images, magnitude, partner, centre))
    assert ours.dtype == torch.uint8
    assert torch.equal(images, before), "the input was written to"


@each_op
def test_a_batch_equals_its_images_one_at_a_time(op):
    images, magnitude, partner, centre = inputs_at(17, 23, op)
    alone = [
        run_op(op, images[i : i + 1], magnitude[i : i + 1], partner[i : i + 1], centre[i : i + 1])
        for i in range(len(images))
    ]
    assert torch.equal(run_op(op, images, magnitude, partner, centre), torch.cat(alone))


@WAYS
@pytest.mark.parametrize("op", [op for op in COMPARED if op.low is not None], ids=lambda op: op.name)
@given(data=st.data())
def test_equals_pillow_at_any_magnitude_and_size(op, run, data):
    height, width = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40))
    images = sample_images(height, width, data.draw(st.integers(0, 1000)))
    magnitudes = st.floats(-op.high if op.signed else op.low, op.high)
    magnitude = torch.tensor(
        data.draw(st.lists(magnitudes, min_size=len(images), max_size=len(images))), dtype=torch.float64
    )
    centre = torch.rand(len(images), 2, generator=torch.Generator().manual_seed(height), dtype=torch.float64)
    partner = images.flip(0)
    ours = run(op, images, magnitude, partner, centre)
    assert_equals_pillow(op.name, ours, with_pillow(op.name, images, magnitude, partner, centre))


@pytest.mark.parametrize("degrees", [90.0, 180.0, 270.0, 360.0, -180.0, 720.0, 1e-17])
def test_rotate_equals_pillow_at_right_angles(degrees):
    images = sample_images(24, 24)
    magnitude = torch.full((len(images),), degrees, dtype=torch.float64)
    assert_equals_pillow(
        "Rotate",
        apply_op(images, "Rotate", magnitude),
        with_pillow("Rotate", images, magnitude, images, magnitude[:, None]),
    )


@WAYS
@pytest.mark.parametrize("name", ["TranslateX", "TranslateY"])
def test_translations_skip_a_pixel_where_pillows_sum_rounds_up(name, run):
    images, op = sample_images(32, 32), OPS[row_of(name)]
    offset = 0.5 - 2.0**-53  # + 0.5 is below 1, and + 1 is 2
    magnitude = torch.full((len(images),), offset / 32, dtype=torch.float64)
    assert augmentations._translated(magnitude * 32, 32)[0, :3].tolist() == [0, 2, 3]
    ours = run(op, images, magnitude, images, torch.zeros(len(images), 2))
    assert_equals_pillow(name, ours, with_pillow(name, images, magnitude, images, torch.zeros(len(images), 2)))


@pytest.mark.parametrize("name", ["ShearX", "ShearY", "Rotate"])
@pytest.mark.parametrize("number", [augmentations.TABLED_MAGNITUDES, 3 * augmentations.TABLES])
def test_more_magnitudes_than_tables_are_cached_for(name, number):
    images = sample_images(11, 14).repeat(number // 7 + 1, 1, 1, 1)[:number]
    magnitude = torch.linspace(-0.5, 0.5, number, dtype=torch.float64) * OPS[row_of(name)].high
    expected = with_pillow(name, images, magnitude, images, magnitude[:, None])
    for _ in range(2):
        assert_equals_pillow(name, apply_op(images, name, magnitude), expected)


def test_tables_of_large_images_are_not_cached():
    image = torch.zeros(1, 3, 370, 370, dtype=torch.uint8)
    augmentations._sources.cache_clear()
    apply_op(image[..., :360, :360], "Rotate", torch.tensor([10.0]))
    assert augmentations._sources.cache_info().currsize == 1
    apply_op(image, "Rotate", torch.tensor([10.0]))
    assert augmentations._sources.cache_info().currsize == 1


@each_op
def test_any_memory_layout_gives_the_same(op):
    images, magnitude, partner, centre = inputs_at(17, 17, op)
    expected = run_op(op, images, magnitude, partner, centre)
    channels_last = images.contiguous(memory_format=torch.channels_last)
    assert torch.equal(run_op(op, channels_last, magnitude, partner, centre), expected)
    transposed = images.transpose(2, 3).contiguous().transpose(2, 3)
    assert torch.equal(run_op(op, transposed, magnitude, partner, centre), expected)
    plan = Plan(torch.full((len(images), 1), row_of(op.name)), magnitude[:, None], None, centre[:, None])
    if op.needs != "partner":
        assert torch.equal(apply(transposed, plan), expected)


@WAYS
@each_op
def test_an_empty_batch_gives_an_empty_batch(op, run):
    none = torch.zeros(0, 3, 8, 8, dtype=torch.uint8)
    assert run(op, none, torch.zeros(0, dtype=torch.float64), none, torch.zeros(0, 2)).shape == none.shape


@pytest.mark.parametrize("run", ["_in_groups", "_in_families"])
def test_unused_partners_are_ignored(run):
    images = sample_images(9, 9)[:4]
    plan = Plan(torch.tensor([[15], [0], [-1], [6]]), torch.full((4, 1), 0.25, dtype=torch.float64))
    expected = apply(images, plan._replace(partner_BK=torch.tensor([[1], [0], [0], [0]])))
    plan = plan._replace(partner_BK=torch.tensor([[1], [-1], [99], [0]]))
    assert torch.equal(apply(images, plan), expected)
    assert torch.equal(getattr(augmentations, run)(images, plan, images), expected)


@each_op
def test_a_result_stays_when_the_operation_runs_again(op):
    first, second = inputs_at(12, 10, op), inputs_at(20, 16, op)
    with torch.inference_mode():  # what it leaves behind must serve outside of it
        run_op(op, *second)
    result = run_op(op, *first)
    expected = result.clone()
    run_op(op, *(first[0].flip(0), *first[1:]))
    run_op(op, *second)
    assert_equals_pillow(op.name, result, expected)


def test_threads_do_not_share_scratch_memory():
    images = sample_images(24, 24).repeat(40, 1, 1, 1)
    plans = [random_plan(len(images), 2, seed) for seed in range(4)]
    expected = [apply(images, plan) for plan in plans]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            for ours, alone in zip(pool.map(apply, [images] * 4, plans), expected, strict=True):
                assert torch.equal(ours, alone)


@pytest.mark.parametrize("op", [op for op in COMPARED if op.neutral is not None], ids=lambda op: op.name)
def test_neutral_magnitude_changes_nothing(op):
    images = sample_images(17, 23)
    magnitude = torch.full((len(images),), op.neutral, dtype=torch.float64)
    assert torch.equal(run_op(op, images, magnitude, images.flip(0), torch.full((len(images), 2), 0.5)), images)


def random_plan(batch, positions, seed=0):
    g = torch.Generator().manual_seed(seed)
    op_BK = torch.randint(-1, 16, (batch, positions), generator=g)
    levels = torch.randint(0, 10, (batch, positions), generator=g)
    sign = torch.randint(0, 2, (batch, positions), generator=g) * 2 - 1
    magnitude_BK = torch.tensor(
        [
            [OPS[o].magnitude(level) for o, level in zip(*row, strict=True)]
            for row in zip(op_BK.tolist(), levels.tolist(), strict=True)
        ],
        dtype=torch.float64,
    )
    magnitude_BK = torch.where(torch.tensor([op.signed for op in OPS])[op_BK], sign * magnitude_BK, magnitude_BK)
    partner_BK = torch.randint(0, batch, (batch, positions), generator=g)
    return Plan(op_BK, magnitude_BK, partner_BK, torch.rand(batch, positions, 2, generator=g, dtype=torch.float64))


def plan_with_pillow(images, plan):
    """One operation on one image at a time."""
    out = images.clone()
    for b, k in np.ndindex(*plan.op_BK.shape):
        if plan.op_BK[b, k] >= 0:
            name, one = augmentations.OPS[plan.op_BK[b, k]].name, slice(b, b + 1)
            partner = images[plan.partner_BK[one, k]]
            out[b] = with_pillow(name, out[one], plan.magnitude_BK[one, k], partner, plan.centre_BK2[one, k])[0]
    return out


@pytest.mark.parametrize(
    ("run", "cached"), [("_in_groups", 2**19), ("_in_groups", 3000), ("_in_groups", 1), ("_in_families", 2**19)]
)
@pytest.mark.parametrize("positions", [0, 1, 2, 3])
def test_a_plan_is_its_operations_in_order(positions, run, cached, monkeypatch):
    monkeypatch.setattr(augmentations, "CACHED_VALUES", cached)
    images = sample_images(17, 23).repeat(12, 1, 1, 1)
    plan = random_plan(len(images), positions)
    expected, before = plan_with_pillow(images, plan), images.clone()
    ours = getattr(augmentations, run)(images, plan, images)
    assert_equals_pillow("plan", ours, expected)
    assert torch.equal(images, before)


def test_pillows_blend_rounds_product_and_sum(record_property):
    """On other processors than x86-64 the differences are recorded only."""
    first, second = (to_pillow(image) for image in sample_images(64, 64)[:2])
    differing = sum(
        (np.asarray(Image.blend(first, second, weight)) != np.asarray(blend_rounded_twice(first, second, weight))).sum()
        for weight in np.linspace(-0.5, 2, 101)
    )
    record_property("values in which Pillow's blend differs from two roundings", int(differing))
    assert differing == 0 or not PILLOW_ROUNDS_TWICE


def soften(images_BCHW, strength_B):
    return augmentations.sharpness(images_BCHW, 1 - strength_B)


def average(images_BCHW, weight_B, partner_BCHW):
    return augmentations.sample_pairing(images_BCHW, weight_B, partner_BCHW)


NEW_OPS = (Op("Soften", soften, 0.0, 1.0), Op("Average", average, 0.0, 0.5, needs="partner"))


@pytest.mark.parametrize("run", ["_in_groups", "_in_families"])
def test_new_operations_need_a_kernel_and_a_row_only(run, monkeypatch):
    """Two operations in no family, before, after and between others in a plan, against Pillow."""
    monkeypatch.setattr(augmentations, "OPS", (*OPS, *NEW_OPS))
    monkeypatch.setitem(PILLOW, "Soften", lambda im, v, **_: enhance(im, ImageEnhance.Sharpness, 1 - v))
    monkeypatch.setitem(PILLOW, "Average", PILLOW["SamplePairing"])
    images = sample_images(17, 23).repeat(12, 1, 1, 1)
    plan = random_plan(len(images), 3)
    new_BK = torch.randint(2, plan.op_BK.shape, generator=torch.Generator().manual_seed(2)).bool()
    strength_BK = torch.rand(plan.op_BK.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    op_BK = torch.where(new_BK, len(OPS) + (strength_BK < 0.5).long(), plan.op_BK)
    plan = plan._replace(op_BK=op_BK, magnitude_BK=torch.where(new_BK, strength_BK, plan.magnitude_BK))
    ours = getattr(augmentations, run)(images, plan, images)
    assert_equals_pillow("plan", ours, plan_with_pillow(images, plan))


@pytest.mark.cuda
@pytest.mark.parametrize("size", [(32, 32), (17, 23)], ids=str)
@each_op
def test_an_operation_on_the_device_equals_pillow(op, size, device):
    images, magnitude, partner, centre = inputs_at(*size, op)
    expected = with_pillow(op.name, images, magnitude, partner, centre)
    on_device = images.to(device), magnitude, partner.to(device), centre
    assert_equals_pillow("alone", run_op(op, *on_device).cpu(), expected)
    partner_B1 = torch.arange(len(images), 2 * len(images))[:, None]
    plan = Plan(torch.full((len(images), 1), row_of(op.name)), magnitude[:, None], partner_B1, centre[:, None])
    assert_equals_pillow("in a plan", apply(images.to(device), plan, partner.to(device)).cpu(), expected)


@pytest.mark.cuda
@pytest.mark.parametrize("bilinear", [False, True])
def test_a_plan_on_the_device_equals_the_cpu(bilinear, device, monkeypatch):
    monkeypatch.setattr(augmentations, "OPS", (*OPS, *NEW_OPS))
    images = sample_images(32, 32).repeat(64, 1, 1, 1)
    plan = random_plan(len(images), 2)._replace(bilinear=bilinear)
    plan = plan._replace(op_BK=torch.where(torch.arange(len(images))[:, None] % 10 == 0, len(OPS), plan.op_BK))
    assert torch.equal(apply(images.to(device), plan).cpu(), apply(images, plan))


IMAGES = sample_images(8, 8)  # seven


def plan_of(name, magnitude=1.0, **fields):
    plan = Plan(torch.full((7, 1), row_of(name)), torch.full((7, 1), magnitude, dtype=torch.float64))
    return plan._replace(**fields)


@pytest.mark.parametrize(
    ("images", "name", "magnitudes", "message"),
    [
        (IMAGES.float(), "Invert", torch.zeros(7), "need uint8 images"),
        (IMAGES[:, :1], "Invert", torch.zeros(7), r"\(B, 3, H, W\)"),
        (IMAGES, "Twirl", torch.zeros(7), "unknown operation 'Twirl'"),
        (IMAGES, "SamplePairing", torch.zeros(7), "SamplePairing needs partner="),
        (IMAGES, "Invert", torch.zeros(2), r"\(2,\) magnitudes"),
        *((IMAGES, "Rotate", torch.full((7,), value), "not a magnitude for Rotate") for value in (math.nan, -1e10)),
    ],
)
def test_bad_batches_are_refused(images, name, magnitudes, message):
    with pytest.raises(ValueError, match=message):
        apply_op(images, name, magnitudes)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (random_plan(8, 2), "the batch has 7 images"),
        (Plan(torch.zeros(7, dtype=torch.int64), torch.zeros(7)), "the batch has 7 images"),
        (plan_of("Cutout"), "Cutout is in the plan, but its centre_BK2 is missing"),
        (plan_of("SamplePairing"), "SamplePairing is in the plan, but its partner_BK is missing"),
        (plan_of("SamplePairing", partner_BK=torch.full((7, 1), 7)), r"partner_BK holds 7\.\.7; there are 7 images"),
        (plan_of("SamplePairing", math.inf), "inf is not a magnitude for SamplePairing"),
        (
            plan_of("Rotate", op_BK=torch.full((7, 1), 999)),
            rf"999\.\.999; rows are 0\.\.{len(OPS) - 1}, and -1 for none",
        ),
    ],
)
def test_bad_plans_are_refused(plan, message):
    with pytest.raises(ValueError, match=message):
        apply(IMAGES, plan)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"op_BK": torch.zeros(7, 1)}, r"plan\.op_BK must be a tensor of torch\.int64, not torch\.float32"),
        ({"op_BK": [[0]] * 7}, r"plan\.op_BK must be a tensor of torch\.int64, not list"),
        ({"magnitude_BK": None}, r"plan\.magnitude_BK must be a tensor of torch\.float64, not NoneType"),
        ({"partner_BK": torch.zeros(7, 1)}, r"plan\.partner_BK must be a tensor of torch\.int64, not torch\.float32"),
        (
            {"centre_BK2": torch.zeros(7, 1, 2).bool()},
            r"plan\.centre_BK2 must be a tensor of torch\.float64, not torch",
        ),
    ],
)
def test_plans_of_a_wrong_dtype_are_refused_by_field(fields, message):
    with pytest.raises(TypeError, match=message):
        apply(IMAGES, plan_of("Rotate", **fields))
