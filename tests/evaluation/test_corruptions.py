"""Every corruption against its definition in Pillow, scipy or colorsys, or against its statistics."""

import colorsys
import io
import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from scipy import ndimage

from evaluation.corruptions import (
    CORRUPTIONS,
    EXTRA,
    SEVERITIES,
    STANDARD,
    _displaced,
    _distances,
    _edges,
    _equalized,
    _moved,
    _plasma,
    _reflect,
    _reflect_101,
    _sampled,
    _streaks,
    at_size,
    corrupt,
)

BY_NAME = {row.name: row for row in CORRUPTIONS}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def sample_images(height, width):
    """Two scenes, noise, a constant, black, white and a two-valued image, uint8 (B, 3, H, W)."""
    noise = torch.randint(0, 256, (3, 3, height, width), generator=generator(), dtype=torch.uint8)
    scenes = []
    for image, blur in ((noise[0], 2), (noise[1], 6)):
        smooth = Image.fromarray(image.permute(1, 2, 0).numpy()).filter(ImageFilter.GaussianBlur(blur))
        smooth = torch.from_numpy(np.array(smooth)).permute(2, 0, 1).float()
        ramp = torch.linspace(-60, 60, width) + torch.tensor([10.0, -15.0, -30.0])[:, None, None]
        scenes.append(((smooth - 128) * 2 * blur + 110 + ramp).clamp(0, 255).to(torch.uint8))
    constant = torch.tensor([7, 128, 254], dtype=torch.uint8)[:, None, None].expand(3, height, width)
    black, white = torch.zeros_like(noise[0]), torch.full_like(noise[0], 255)
    two_valued = torch.where(noise[2, :1] < 90, 30, 200).to(torch.uint8).expand(3, height, width)
    return torch.stack([*scenes, noise[2], constant, black, white, two_valued])


def grey(level, count=48, side=32):
    return torch.full((count, 3, side, side), level, dtype=torch.uint8)


def spread(name, severity, level):
    """Mean and standard deviation, in 0..1, of a corrupted grey image; corrected for truncation by half a level."""
    corrupted = corrupt(grey(level), name, severity, generator()).double()
    return ((corrupted.mean() + 0.5) / 255).item(), (corrupted.std() / 255).item()


def with_pillow(change):
    return lambda x, c: (
        np.stack([np.asarray(change(Image.fromarray((i * 255).round().astype(np.uint8)), c)) for i in x]) / 255
    )


def pixelated(image, c):
    width, height = image.size
    return image.resize((int(width * c), int(height * c)), Image.Resampling.BOX).resize(
        (width, height), Image.Resampling.BOX
    )


def as_jpeg(image, c):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=c)
    return Image.open(file)


def in_hsv(change):
    def changed(x, c):
        pixels = [colorsys.hsv_to_rgb(*change(*colorsys.rgb_to_hsv(*rgb), c)) for rgb in x.reshape(-1, 3)]
        return np.array(pixels).reshape(x.shape)

    return changed


def defocused(x, c):
    """On the official grid of 17x17 pixels, or as many times that as the image is larger than 32."""
    scale = min(x.shape[1:3]) // 32
    radius, std = c[0] * scale, c[1] * scale
    yy, xx = np.mgrid[-8 * scale : 8 * scale + 1, -8 * scale : 8 * scale + 1]
    disc = ((xx**2 + yy**2) <= radius**2).astype(float)
    weights = np.exp(-(np.arange(-scale, scale + 1) ** 2) / (2 * std**2))
    weights /= weights.sum()
    kernel = ndimage.correlate1d(ndimage.correlate1d(disc / disc.sum(), weights, 0), weights, 1)
    return ndimage.correlate(x, kernel[None, :, :, None], mode="mirror")


def zoomed(image, zoom):
    for axis, size in enumerate(image.shape[:2]):
        crop = math.ceil(size / zoom)
        image = np.take(image, np.arange(crop) + (size - crop) // 2, axis)
    return ndimage.zoom(image, (zoom, zoom, 1), order=1)


def zoom_blurred(x, c):
    height, width = x.shape[1:3]
    zooms = np.arange(1, c, 0.01)
    total = x.copy()
    for zoom in zooms:
        for image, sum_of_zoomed in zip(x, total, strict=True):
            large = zoomed(image, zoom)
            top, left = (large.shape[0] - height) // 2, (large.shape[1] - width) // 2
            sum_of_zoomed += large[top : top + height, left : left + width]
    return total / (len(zooms) + 1)


# name -> function(x_BHWC in 0..1, official parameters) -> x_BHWC
DEFINITIONS = {
    "defocus_blur": defocused,
    "zoom_blur": zoom_blurred,
    "brightness": in_hsv(lambda h, s, v, c: (h, s, min(v + c, 1))),
    "contrast": lambda x, c: (x - x.mean((1, 2), keepdims=True)) * c + x.mean((1, 2), keepdims=True),
    "pixelate": with_pillow(pixelated),
    "jpeg_compression": with_pillow(as_jpeg),
    "gaussian_blur": lambda x, c: ndimage.gaussian_filter(
        x, (0, *[c * min(x.shape[1:3]) / 32] * 2, 0), mode="nearest", truncate=4
    ),
    "saturate": in_hsv(lambda h, s, v, c: (h, min(max(s * c[0] + c[1], 0), 1), v)),
}
EXACT = [name for name in BY_NAME if name in DEFINITIONS]


def test_the_corruptions_are_the_published_ones():
    assert STANDARD == (
        "gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur", "zoom_blur",
        "snow", "frost", "fog", "brightness", "contrast", "elastic_transform", "pixelate", "jpeg_compression",
    )  # fmt: skip
    assert EXTRA == ("speckle_noise", "gaussian_blur", "spatter", "saturate")
    assert (*STANDARD, *EXTRA) == tuple(BY_NAME)
    assert {row.name for row in CORRUPTIONS if not row.random} == set(DEFINITIONS)


@pytest.mark.parametrize("size", [(32, 32), (32, 47), (64, 64)], ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("name", EXACT)
def test_equals_its_definition_within_one_grey_level(name, size):
    images = sample_images(*size)
    x = images.permute(0, 2, 3, 1).double().numpy() / 255
    for severity in SEVERITIES:
        expected = DEFINITIONS[name](x, BY_NAME[name].severities[severity - 1])
        expected = np.floor(expected.clip(0, 1) * 255 + 1e-6)
        ours = corrupt(images, name, severity, generator()).permute(0, 2, 3, 1).double().numpy()
        assert np.abs(ours - expected).max() <= 1
        assert (ours != expected).mean() < 1e-3


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (2, 2), (23, 17), (224, 224)], ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("name", BY_NAME)
def test_any_image_size_works_and_the_input_is_unchanged(name, size):
    images = sample_images(*size)[:2]
    before = images.clone()
    for severity in (1, 5):
        corrupted = corrupt(images, name, severity, generator())
        assert (corrupted.shape, corrupted.dtype) == (images.shape, torch.uint8)
        assert torch.equal(images, before)


@pytest.mark.parametrize("name", BY_NAME)
def test_draws_come_from_the_generator_alone(name):
    images = sample_images(32, 32)
    for severity in SEVERITIES:
        g = generator(1)
        corrupted = corrupt(images, name, severity, g)
        assert torch.equal(corrupt(images, name, severity, generator(1)), corrupted)
        random = BY_NAME[name].random
        assert torch.equal(g.get_state(), generator(1).get_state()) != random
        assert torch.equal(corrupt(images, name, severity, generator(2)), corrupted) != random


@pytest.mark.parametrize("name", EXACT)
def test_a_batch_equals_its_images_one_at_a_time(name):
    images = sample_images(33, 40)
    alone = [corrupt(image[None], name, 4, generator()) for image in images]
    assert torch.equal(corrupt(images, name, 4, generator()), torch.cat(alone))


@pytest.mark.parametrize("severity", SEVERITIES)
def test_noise_has_the_spread_of_its_formula(severity):
    def parameter(name):
        return BY_NAME[name].severities[severity - 1]

    level, x = 120, 120 / 255
    for name, std in (
        ("gaussian_noise", parameter("gaussian_noise")),
        ("shot_noise", math.sqrt(x / parameter("shot_noise"))),
        ("speckle_noise", x * parameter("speckle_noise")),
    ):
        assert spread(name, severity, level) == pytest.approx((x, std), rel=0.02), name


@pytest.mark.parametrize("severity", SEVERITIES)
def test_impulses_are_half_salt_half_pepper(severity):
    corrupted = corrupt(grey(120), "impulse_noise", severity, generator())
    half = BY_NAME["impulse_noise"].severities[severity - 1] / 2
    tolerance = 5 * math.sqrt(half / corrupted.numel())
    assert (corrupted == 255).double().mean().item() == pytest.approx(half, abs=tolerance)
    assert (corrupted == 0).double().mean().item() == pytest.approx(half, abs=tolerance)
    assert set(corrupted.unique().tolist()) == {0, 120, 255}
    assert (corrupted[:, 0] != corrupted[:, 1]).any(), "the channels are drawn separately"


KEEPING_CONSTANTS = (
    "defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "gaussian_blur",
    "contrast", "elastic_transform", "pixelate",
)  # fmt: skip


@pytest.mark.parametrize("name", KEEPING_CONSTANTS)
def test_blurs_and_displacements_keep_a_constant_image(name):
    images = torch.stack([torch.full((3, 40, 33), level, dtype=torch.uint8) for level in (0, 1, 77, 128, 254, 255)])
    for severity in SEVERITIES:
        assert torch.equal(corrupt(images, name, severity, generator()), images)


def displaced_in_turn(moves, reach):
    """The loop of the official code, over one image of pixel numbers."""
    _, height, width = moves.shape
    image = np.arange(height * width).reshape(height, width)
    for h in range(height - reach, reach, -1):
        for w in range(width - reach, reach, -1):
            image[h, w] = image[h + moves[0, h, w], w + moves[1, h, w]]
    return image.ravel()


@pytest.mark.parametrize(("height", "width", "reach"), [(32, 32, 1), (19, 24, 2), (24, 19, 4), (5, 6, 2), (2, 2, 1)])
def test_glass_blur_displaces_like_the_official_loop(height, width, reach):
    moves = torch.randint(-reach, reach, (2, 3, height, width), generator=generator())
    expected = [displaced_in_turn(moves[:, b].numpy(), reach) for b in range(3)]
    assert np.array_equal(_displaced(moves, reach).numpy(), expected)


@pytest.mark.parametrize("angle", [0.0, 30.0, -45.0, -90.0, -135.0, 17.3])
def test_motion_blur_of_a_point_is_its_taps(angle):
    x = torch.zeros(1, 1, 41, 41, dtype=torch.float64)
    x[0, 0, 20, 20] = 1
    expected = np.zeros((41, 41))
    weights = np.exp(-(np.arange(13) ** 2) / (2 * 2.5**2))
    for i, weight in enumerate(weights / weights.sum()):
        dx = math.ceil(i * math.cos(math.radians(angle)) - 0.5)
        dy = math.ceil(i * math.sin(math.radians(angle)) - 0.5)
        expected[20 - dy, 20 - dx] += weight
    blurred = _moved(x, 6, 2.5, torch.tensor([angle], dtype=torch.float64))[0, 0].numpy()
    assert np.abs(blurred - expected).max() <= 0.5001 / 255


@pytest.mark.parametrize(("border", "mode"), [(_reflect, "reflect"), (_reflect_101, "mirror")])
def test_sampling_equals_scipy_far_beyond_the_edges(border, mode):
    x = torch.rand(2, 3, 7, 9, generator=generator(), dtype=torch.float64)
    at = torch.rand(2, 2, 5, 6, generator=generator(1), dtype=torch.float64) * 40 - 15
    expected = [
        [ndimage.map_coordinates(channel, where, order=1, mode=mode) for channel in image]
        for image, where in zip(x.numpy(), at.numpy(), strict=True)
    ]
    assert _sampled(x, at[:, 0], at[:, 1], border).numpy() == pytest.approx(np.array(expected))


def test_elastic_transform_of_no_strength_is_affine():
    row, column = torch.meshgrid(torch.arange(96), torch.arange(96), indexing="ij")
    place = (torch.stack((row, column, row * 0)) * 2).to(torch.uint8)[None]
    inner = (slice(32, 64), slice(32, 64))  # pixels from beyond the edges do not reach it
    design = np.stack([row[inner].ravel(), column[inner].ravel(), np.ones(32 * 32)], 1)
    for seed in range(5):
        moved = corrupt(place, "elastic_transform", 1, generator(seed))[0].double().numpy() / 2
        for channel in moved[:2]:
            fit, *_ = np.linalg.lstsq(design, channel[inner].ravel(), rcond=None)
            assert np.abs(design @ fit - channel[inner].ravel()).max() < 0.6
            everywhere = row.numpy() * fit[0] + column.numpy() * fit[1] + fit[2]
            assert np.abs(channel - (95 - np.abs(95 - np.abs(everywhere)))).max() < 1.2
        assert np.abs(moved[:2, 48, 48] - 48).max() < 2 * 0.08 * 96
        assert np.abs(moved[:2, 48, 48] - 48).max() > 0.5


@pytest.mark.parametrize("side", [32, 96])
def test_elastic_transform_scales_with_the_image(side):
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    place = torch.stack((row, column, row * 0)).double().expand(16, -1, -1, -1)
    moved = BY_NAME["elastic_transform"].kernel(place, 0.1, 0.03, 0.0, generator=generator())
    margin = side // 8
    shift = (moved - place)[:, :2, margin:-margin, margin:-margin] / side
    # Uniform noise in -1..1 has the deviation 1 / sqrt(3); a Gaussian of deviation s divides it by 2 sqrt(pi) s.
    assert shift.std().item() == pytest.approx(0.1 / math.sqrt(3) / (2 * math.sqrt(math.pi) * 0.03 * 32), rel=0.05)
    assert shift.mean().item() == pytest.approx(0, abs=2e-3)


def test_fog_keeps_the_brightest_value():
    images = torch.zeros(4, 3, 32, 64, dtype=torch.uint8)
    images[..., ::2] = 250
    for severity in SEVERITIES:
        thickness, _ = BY_NAME["fog"].severities[severity - 1]
        foggy = corrupt(images, "fog", severity, generator()).double()
        assert foggy.max() <= 250
        top = 250 / 255
        fog_on_black = foggy[..., 1::2] / 255 * (top + thickness) / (top * thickness)
        assert torch.equal(foggy[:, 0], foggy[:, 1])
        assert 0 <= fog_on_black.min() < fog_on_black.max() <= 1
        fading = (foggy[..., ::2].mean() - foggy[..., 1::2].mean()).item() / 250
        assert fading == pytest.approx(top / (top + thickness), abs=0.02)


def beyond_mean_of_four(plasma, step):
    """How far points between those `step` apart are from the mean of their four neighbours, around the edges."""
    grid = plasma[:, 0, :: step // 2, :: step // 2].numpy()
    straight = grid - sum(np.roll(grid, shift, axis) for shift in (-1, 1) for axis in (1, 2)) / 4
    across = grid - sum(np.roll(grid, (down, right), (1, 2)) for down in (-1, 1) for right in (-1, 1)) / 4
    return across[:, 1::2, 1::2], straight[:, ::2, 1::2], straight[:, 1::2, ::2]


@pytest.mark.parametrize("decay", [1.75, 2.0, 3.0])
def test_plasma_noise_decays_with_each_halving(decay):
    plasma = _plasma(1, 256, 256, decay, generator())
    assert plasma.min() == 0
    assert plasma.max() == 1
    fine, coarse = beyond_mean_of_four(plasma, 2), beyond_mean_of_four(plasma, 4)
    for stray, stray_before in zip(fine, coarse, strict=True):
        assert stray_before.std() / stray.std() == pytest.approx(decay**2, rel=0.03)
        assert np.abs(stray).max() / stray.std() == pytest.approx(math.sqrt(3), rel=0.02)  # uniform
        assert stray.std() == pytest.approx(fine[0].std(), rel=0.02)
    assert torch.equal(_plasma(2, 20, 33, 2.0, generator()), _plasma(2, 64, 64, 2.0, generator())[..., :20, :33])


def test_snow_lightens_in_vertical_streaks():
    images = sample_images(32, 32)
    for severity in SEVERITIES:
        assert (corrupt(images, "snow", severity, generator()) >= images).all()
    flakes = corrupt(grey(0, count=64), "snow", 5, generator())[:, 0].double()
    assert flakes.diff(dim=1).abs().mean() < 0.7 * flakes.diff(dim=2).abs().mean()
    assert torch.equal(flakes, flakes.flip(1, 2))


def test_snow_without_flakes_whitens():
    x = torch.rand(2, 3, 8, 8, generator=generator(), dtype=torch.float64)
    snowy = BY_NAME["snow"].kernel(x, 0.0, 0.0, 1.0, 0.5, 8, 3.0, 0.8, generator=generator())
    grey_BHW = torch.tensordot(torch.tensor([0.299, 0.587, 0.114]).double(), x, dims=([0], [1]))
    assert torch.allclose(snowy, 0.8 * x + 0.2 * x.maximum(1.5 * grey_BHW[:, None] + 0.5), atol=1e-6)


@pytest.mark.parametrize("grain", [1.0, 1.75, 2.25, 4.0])
def test_flakes_are_enlarged_noise_above_a_threshold(grain):
    noise = 0.3 + 0.6 * torch.randn(3, 1, 32, 32, generator=generator(), dtype=torch.float64)
    flakes = _streaks(noise, grain, 0.55, 0, 1.0, torch.zeros(3, dtype=torch.float64))  # radius 0: not drawn out
    for image, ours in zip(noise[:, 0, :, :, None].numpy(), flakes[:, 0].numpy(), strict=True):
        large = zoomed(image, grain)[..., 0]
        trim = (len(large) - 32) // 2
        expected = large[trim : trim + 32, trim : trim + 32]
        expected = np.where(expected < 0.55, 0, expected.clip(0, 1))
        assert np.abs(ours * 255 - np.floor(expected * 255)).max() <= 1.001
        assert ((ours > 0) == (expected > 0)).all()


@pytest.mark.parametrize("side", [32, 128])
def test_frost_is_light_and_bluish_ice(side):
    for severity in SEVERITIES:
        weight, frost_weight = BY_NAME["frost"].severities[severity - 1]
        icy = corrupt(grey(60, 8, side), "frost", severity, generator()).double() / 255
        ice = (icy - weight * 60 / 255) / frost_weight
        red, green, blue = ice.mean((0, 2, 3))
        assert 0.4 < red < green < blue < 0.9
        assert (icy.mean((1, 2, 3)) > 60 / 255).all()
        assert ice.std() > 0.08


def test_water_lightens_and_mud_covers():
    images = sample_images(64, 64)[:2].repeat(8, 1, 1, 1)
    for severity in SEVERITIES:
        spattered = corrupt(images, "spatter", severity, generator())
        changed = (spattered != images).any(1).double().mean()
        assert 0.001 < changed < 0.6
        on_black = corrupt(images * 0, "spatter", severity, generator()).amax((0, 2, 3)).tolist()
        if severity < 4:
            assert (spattered >= images).all()
            assert on_black == [87, 119, 119]  # half of the colour of water, where it shines most
        else:
            assert on_black == pytest.approx([63, 42, 20], abs=1)
            on_white = corrupt(images * 0 + 255, "spatter", severity, generator())[:, 0]
            assert on_white[on_white < 255].max() <= 0.2 * 255 + 0.8 * 63  # thinner mud is cut off


@pytest.mark.parametrize(("severity", "brighter", "lit"), [(1, 1.16, 0.026), (2, 3.08, 0.066), (3, 7.39, 0.184)])
def test_water_is_as_strong_as_with_the_functions_of_opencv(severity, brighter, lit):
    """Mean brightening in levels, and share of pixels lit, of 1,000 black images by the official recipe with OpenCV."""
    row, black = BY_NAME["spatter"], torch.zeros(600, 3, 32, 32, dtype=torch.float64)
    drawn = row.kernel(black, *row.severities[severity - 1], generator=generator())
    assert 255 * drawn.mean().item() == pytest.approx(brighter, rel=0.08)
    assert (drawn > 0).any(1).double().mean().item() == pytest.approx(lit, rel=0.08)


def test_edges_are_between_areas_at_their_upper_left_side():
    """Of two equally steep pixels across an edge Canny keeps the left one, or the upper one."""
    square = torch.zeros(1, 1, 9, 9, dtype=torch.float64)
    square[..., 3:6, 3:6] = 200
    found = _edges(square)[0, 0]
    assert found[4].nonzero().flatten().tolist() == [2, 5]
    assert found[:, 4].nonzero().flatten().tolist() == [2, 5]
    assert not _edges(square / 8).any(), "too faint"


def test_distances_equal_scipy():
    points = torch.rand(4, 1, 23, 31, generator=generator()) < torch.tensor([0.005, 0.02, 0.2, 1.0]).view(4, 1, 1, 1)
    points[0, 0, 3, 4] = True
    for most in (3, 20):
        expected = [np.minimum(ndimage.distance_transform_edt(~image), most) for image in points[:, 0].numpy()]
        assert _distances(points, most)[:, 0].numpy() == pytest.approx(np.array(expected))
    assert (_distances(torch.zeros(1, 1, 5, 5, dtype=torch.bool), 20) == 20).all()


def test_equalizing_follows_the_cumulative_histogram():
    images = sample_images(16, 16)[:, :1]
    for image, ours in zip(images, _equalized(images.double()), strict=True):
        values = image.numpy()
        darkest = (values == values.min()).sum()
        up_to = (values.ravel() <= values[..., None]).sum(-1)
        expected = (up_to - darkest) / max(1, values.size - darkest) * 255
        assert np.abs(ours.numpy() - expected).max() <= 0.5001


def test_lengths_grow_with_the_image():
    def parameters(name, severity, *size):
        return at_size(BY_NAME[name], severity, *size)

    assert parameters("glass_blur", 5, 32, 32) == (0.4, 1, 2)
    assert parameters("glass_blur", 5, 224, 300) == (pytest.approx(2.8), 7, 2)
    assert parameters("glass_blur", 5, 8, 8) == (0.1, 1, 2)
    assert parameters("motion_blur", 5, 64, 48) == (14, 3.75)  # round(13.5) is even
    assert parameters("snow", 1, 64, 64) == (0.1, 0.2, 2.0, 0.6, 16, 6.0, 0.95)
    assert parameters("defocus_blur", 4, 224, 224) == (7.0, pytest.approx(1.4))
    assert parameters("jpeg_compression", 1, 224, 224) == (80,)
    assert parameters("spatter", 5, 64, 64) == (0.65, 0.1, 1.0, 0.68, 0.6, 1)


def test_wrong_arguments_are_refused():
    images = sample_images(8, 8)
    with pytest.raises(ValueError, match="unknown corruption 'rain'; there are gaussian_noise, shot_noise"):
        corrupt(images, "rain", 1, generator())
    for severity in (0, 6, 2.5, "3", None):
        with pytest.raises(ValueError, match="severity is 1, 2, 3, 4 or 5, not"):
            corrupt(images, "fog", severity, generator())
    for wrong in (images.float(), images[0], images[:, :1], images.permute(0, 2, 3, 1)):
        with pytest.raises(ValueError, match=r"need uint8 images \(B, 3, H, W\), got"):
            corrupt(wrong, "fog", 1, generator())
    for wrong in (images[:0], images.to("meta")):
        with pytest.raises(ValueError, match="need images on the CPU, got"):
            corrupt(wrong, "fog", 1, generator())


def test_the_strengths_are_the_official_ones():
    """`make_cifar_c.py`, written down again, severities 1 to 5."""
    assert {row.name: row.severities for row in CORRUPTIONS} == {
        "gaussian_noise": (0.04, 0.06, 0.08, 0.09, 0.10), "shot_noise": (500, 250, 100, 75, 50),
        "impulse_noise": (0.01, 0.02, 0.03, 0.05, 0.07), "speckle_noise": (0.06, 0.1, 0.12, 0.16, 0.2),
        "gaussian_blur": (0.4, 0.6, 0.7, 0.8, 1.0), "zoom_blur": (1.06, 1.11, 1.16, 1.21, 1.26),
        "glass_blur": ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
        "defocus_blur": ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
        "motion_blur": ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
        "snow": ((0.1, 0.2, 1, 0.6, 8, 3, 0.95), (0.1, 0.2, 1, 0.5, 10, 4, 0.9), (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
                 (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85), (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8)),
        "frost": ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)),
        "fog": ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)), "brightness": (0.05, 0.1, 0.15, 0.2, 0.3),
        "contrast": (0.75, 0.5, 0.4, 0.3, 0.15), "pixelate": (0.95, 0.9, 0.85, 0.75, 0.65),
        "elastic_transform": ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05),
                              (0.1, 0.03, 0.03)),
        "jpeg_compression": (80, 65, 58, 50, 40),
        "spatter": ((0.62, 0.1, 0.7, 0.7, 0.5, 0), (0.65, 0.1, 0.8, 0.7, 0.5, 0), (0.65, 0.3, 1, 0.69, 0.5, 0),
                    (0.65, 0.1, 0.7, 0.69, 0.6, 1), (0.65, 0.1, 0.5, 0.68, 0.6, 1)),
        "saturate": ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2)),
    }  # fmt: skip
