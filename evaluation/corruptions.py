"""The nineteen corruptions of CIFAR-10-C and ImageNet-C, to be drawn over any images.

D. Hendrycks and T. Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations",
ICLR 2019, https://arxiv.org/abs/1903.12261. Definitions and strengths are those of `make_cifar_c.py` in
https://github.com/hendrycks/robustness, implemented on whole batches with torch and Pillow.
Published numbers are comparable only with numbers for the published arrays: eleven of the nineteen are random, the
official script sets no seed, and `frost` is procedural here instead of the official photographs.

For other image sizes: the strengths are official at 32x32, and `at_size` multiplies every length in pixels (radii,
standard deviations of blurs, reaches, the grain of snow) by min(H, W) / 32, whole numbers rounded and at least 1.
White noise that is smoothed over a length is multiplied as well, since smoothing over f times the length divides it by
f. Strengths of noise, factors, qualities and shares of the side are not scaled. ImageNet-C's strengths are stronger.

Shape suffixes:
    B   images in the batch
    C   channels, 3 (red, green, blue)
    H, W   rows and columns of an image
    P   pixels of an image, H * W
Internally images are float64 in 0..1. HH and WW are matrices that act on the columns and on the rows of an image.
"""

import io
import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Generator, Tensor
from torch.nn import functional

SEVERITIES = (1, 2, 3, 4, 5)
SIDE = 32  # of the images that the strengths are official for
Border = Callable[[Tensor, int], Tensor]  # (index, size) -> the pixel of a line that replaces one beyond its ends


def corrupt(images_BCHW: Tensor, name: str, severity: int, generator: Generator) -> Tensor:
    """A corrupted copy of a uint8 batch; all draws come from `generator`, on the CPU as the images are.

    Raises ValueError for an unknown name, a severity that is not 1..5, and a batch that is not uint8 (B, 3, H, W).
    """
    if images_BCHW.dtype != torch.uint8 or images_BCHW.ndim != 4 or images_BCHW.shape[1] != 3:
        raise ValueError(f"need uint8 images (B, 3, H, W), got {images_BCHW.dtype} {tuple(images_BCHW.shape)}")
    if not images_BCHW.numel() or images_BCHW.device.type != "cpu":
        raise ValueError(f"need images on the CPU, got {tuple(images_BCHW.shape)} on {images_BCHW.device}")
    row = next((row for row in CORRUPTIONS if row.name == name), None)
    if row is None:
        raise ValueError(f"unknown corruption {name!r}; there are {', '.join(row.name for row in CORRUPTIONS)}")
    parameters = at_size(row, severity, *images_BCHW.shape[2:])
    drawn_from = {"generator": generator} if row.random else {}
    corrupted_BCHW = row.kernel(images_BCHW.double() / 255, *parameters, **drawn_from)
    # Truncated, not rounded, like the official arrays. The millionth absorbs differences in the last bit of a sum.
    return (corrupted_BCHW.clamp(0, 1) * 255 + 1e-6).to(torch.uint8)


def at_size(row: "Corruption", severity: int, height: int, width: int) -> tuple[float, ...]:
    """The parameters of `row` at a severity of 1..5, its lengths multiplied by min(height, width) / 32."""
    if severity not in SEVERITIES:
        raise ValueError(f"severity is 1, 2, 3, 4 or 5, not {severity!r}")
    official = row.severities[SEVERITIES.index(severity)]
    parameters = list(official if isinstance(official, tuple) else (official,))
    for i in row.lengths:
        length = parameters[i] * min(height, width) / SIDE
        parameters[i] = max(1, round(length)) if isinstance(parameters[i], int) else length
    return tuple(parameters)


def gaussian_noise(x_BCHW: Tensor, std: float, generator: Generator) -> Tensor:
    return x_BCHW + std * _normal(x_BCHW.shape, generator)


def shot_noise(x_BCHW: Tensor, photons: float, generator: Generator) -> Tensor:
    return torch.poisson(x_BCHW * photons, generator=generator) / photons


def impulse_noise(x_BCHW: Tensor, amount: float, generator: Generator) -> Tensor:
    """Of all values, channels apart, half of `amount` become 1 and half 0."""
    draw_BCHW = _uniform(0, 1, x_BCHW.shape, generator)
    return torch.where(draw_BCHW < amount, (draw_BCHW < amount / 2).double(), x_BCHW)


def speckle_noise(x_BCHW: Tensor, std: float, generator: Generator) -> Tensor:
    return x_BCHW + x_BCHW * std * _normal(x_BCHW.shape, generator)


def gaussian_blur(x_BCHW: Tensor, std: float) -> Tensor:
    return _blurred(x_BCHW, std)


def defocus_blur(x_BCHW: Tensor, radius: float, smoothing: float) -> Tensor:
    """Correlate with a disc, itself smoothed by a Gaussian of three taps (at 32x32)."""
    taps = max(1, round(_scale(x_BCHW)))
    reach = math.ceil(radius) + taps
    line = torch.arange(-reach, reach + 1)
    disc = (line[:, None] ** 2 + line**2 <= radius**2).double()
    smooth = _line_filter(_gaussian(smoothing, taps), len(line), _nearest)
    left, size, right = torch.linalg.svd(smooth @ (disc / disc.sum()) @ smooth.T)  # a sum of separable kernels
    kept = size > 1e-12
    height, width = x_BCHW.shape[2:]
    pairs = [
        (_line_filter(down, height, _reflect_101), _line_filter(across, width, _reflect_101))
        for down, across in zip((left * size).T[kept], right[kept], strict=True)
    ]
    return _sum_of_products(x_BCHW, pairs)


def glass_blur(x_BCHW: Tensor, std: float, reach: int, times: int, generator: Generator) -> Tensor:
    """Blur, replace pixels by ones within reach, and blur again."""
    x_BCHW = (_blurred(x_BCHW, std) * 255 + 1e-6).floor() / 255
    B, C, height, width = x_BCHW.shape
    for _ in range(times):
        move_2BHW = torch.randint(-reach, reach, (2, B, height, width), generator=generator)
        source_BCP = _displaced(move_2BHW, reach).unsqueeze(1).expand(-1, C, -1)
        x_BCHW = x_BCHW.flatten(2).gather(2, source_BCP).view_as(x_BCHW)
    return _blurred(x_BCHW, std)


def _displaced(move_2BHW: Tensor, reach: int) -> Tensor:
    """The source of each pixel, (B, P), where from the last to the first each takes the value at (dy, dx) from it.

    Rows from H - reach down to reach + 1, and the same columns, take part. The official code is meant to exchange two
    values, but reads the second through a view of the first after overwriting it: in effect it copies.
    """
    height, width = move_2BHW.shape[2:]
    moves_HW = torch.zeros(height, width, dtype=torch.bool)
    moves_HW[reach + 1 : height - reach + 1, reach + 1 : width - reach + 1] = True
    place_P = torch.arange(height * width)
    taken_BP = place_P + ((move_2BHW[0] * width + move_2BHW[1]) * moves_HW).flatten(1)
    replaced_BP = taken_BP > place_P
    source_BP, going_BP = taken_BP, replaced_BP
    while going_BP.any():  # the value taken had been replaced before
        further_BP = taken_BP.gather(1, source_BP)
        going_BP, source_BP = going_BP & replaced_BP.gather(1, source_BP), torch.where(going_BP, further_BP, source_BP)
    return source_BP


def motion_blur(x_BCHW: Tensor, radius: int, std: float, generator: Generator) -> Tensor:
    return _moved(x_BCHW, radius, std, _uniform(-45, 45, len(x_BCHW), generator))


def zoom_blur(x_BCHW: Tensor, end: float) -> Tensor:
    """Mean of the image and of its enlargements by 1.00, 1.01, ..."""
    zooms = np.arange(1, end, 0.01).tolist()  # by rounding, 1.06, 1.11 and 1.26 are included
    height, width = x_BCHW.shape[2:]
    zoomed_BCHW = _sum_of_products(x_BCHW, ((_enlarging(height, zoom), _enlarging(width, zoom)) for zoom in zooms))
    return (x_BCHW + zoomed_BCHW) / (len(zooms) + 1)


def snow(x_BCHW: Tensor, *parameters: float, generator: Generator) -> Tensor:
    """Whiten the image, and add flakes twice, the second time turned by 180 degrees."""
    mean, std, grain, threshold, radius, blur, image_weight = parameters
    noise_B1HW = mean + std * _normal(x_BCHW[:, :1].shape, generator)
    angle_B = _uniform(-135, -45, len(x_BCHW), generator)
    flakes_B1HW = _streaks(noise_B1HW, grain, threshold, radius, blur, angle_B)
    red, green, blue = x_BCHW.split(1, dim=1)
    whitish_BCHW = x_BCHW.maximum(1.5 * (0.299 * red + 0.587 * green + 0.114 * blue) + 0.5)
    return image_weight * x_BCHW + (1 - image_weight) * whitish_BCHW + flakes_B1HW + flakes_B1HW.flip(2, 3)


def frost(x_BCHW: Tensor, image_weight: float, frost_weight: float, generator: Generator) -> Tensor:
    """Blend with ice: procedural, not the official photographs, whose licence is unknown; the weights are official.

    Needles in three directions 60 degrees apart on a bluish ground, more of both along the ridges of a plasma; the
    mean brightness of the ice is about 0.6.
    """
    B, _, height, width = x_BCHW.shape
    scale, angle_B = _scale(x_BCHW), _uniform(0, 60, B, generator)
    grain = max(1.3, 0.7 * scale)
    needles_B1HW = torch.zeros(B, 1, height, width, dtype=torch.float64)
    for turn in (0, 60, 120):
        noise_B1HW = _normal(needles_B1HW.shape, generator)
        streaks_B1HW = _streaks(noise_B1HW, grain, 1.2, max(1, round(6 * scale)), 4 * scale, angle_B + turn)
        needles_B1HW = needles_B1HW.maximum(streaks_B1HW)
    ridges_B1HW = 1 - (2 * _plasma(B, height, width, 2.0, generator) - 1).abs()
    ice_B1HW = (0.1 + 0.3 * ridges_B1HW + 2.5 * needles_B1HW * (0.3 + 0.7 * ridges_B1HW)).clamp(max=1)
    dark_C11, light_C11 = _colour(38, 64, 89), _colour(235, 247, 255)
    return image_weight * x_BCHW + frost_weight * (dark_C11 + ice_B1HW * (light_C11 - dark_C11))


def fog(x_BCHW: Tensor, thickness: float, decay: float, generator: Generator) -> Tensor:
    B, _, height, width = x_BCHW.shape
    brightest_B111 = x_BCHW.amax((1, 2, 3), keepdim=True)
    foggy_BCHW = x_BCHW + thickness * _plasma(B, height, width, decay, generator)
    return foggy_BCHW * brightest_B111 / (brightest_B111 + thickness)


def spatter(x_BCHW: Tensor, *parameters: float, generator: Generator) -> Tensor:
    """Drops where smoothed noise passes a threshold: of water, lit from the upper left, or of mud, which covers."""
    mean, std, blur, threshold, strength, mud = parameters
    noise_B1HW = std * _scale(x_BCHW) * _normal(x_BCHW[:, :1].shape, generator)
    drops_B1HW = mean + _blurred(noise_B1HW, blur)
    inside_B1HW = drops_B1HW > threshold
    if mud:
        cover_B1HW = _blurred(inside_B1HW.double(), strength * _scale(x_BCHW))
        cover_B1HW = torch.where(cover_B1HW < 0.8, 0, cover_B1HW)
        return x_BCHW * (1 - cover_B1HW) + cover_B1HW * _colour(63, 42, 20)
    drops_B1HW = torch.where(inside_B1HW, (drops_B1HW * 255).clamp(0, 255).floor(), 0)
    distance_B1HW = _distances(_edges(drops_B1HW), max(1, round(20 * _scale(x_BCHW))))
    depth_B1HW = _equalized(_box(distance_B1HW).floor())
    emboss = torch.tensor([[[[-2, -1, 0], [-1, 1, 1], [0, 1, 2]]]], dtype=torch.float64)
    light_B1HW = drops_B1HW * _box(functional.conv2d(_padded(depth_B1HW), emboss).clamp(0, 255)).round()
    brightest_B111 = light_B1HW.amax((2, 3), keepdim=True).clamp(min=1e-9)  # where there is no drop
    return x_BCHW + strength * light_B1HW / brightest_B111 * _colour(175, 238, 238)


def brightness(x_BCHW: Tensor, added: float) -> Tensor:
    """Add to the V of HSV: all three channels are multiplied, and black becomes grey."""
    value_B1HW = x_BCHW.amax(1, keepdim=True)
    brighter_B1HW = (value_B1HW + added).clamp(max=1)
    return torch.where(value_B1HW > 0, x_BCHW * (brighter_B1HW / value_B1HW), brighter_B1HW)


def contrast(x_BCHW: Tensor, factor: float) -> Tensor:
    """Towards the mean of each channel."""
    mean_BC11 = x_BCHW.mean((2, 3), keepdim=True)
    return (x_BCHW - mean_BC11) * factor + mean_BC11


def saturate(x_BCHW: Tensor, factor: float, added: float) -> Tensor:
    """Multiply the S of HSV and add to it. Grey has the hue 0 and turns red, as in the official code."""
    low_B1HW, value_B1HW = x_BCHW.aminmax(dim=1, keepdim=True)
    chroma_B1HW = value_B1HW - low_B1HW
    red_C11 = torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64)[:, None, None]
    hue_BCHW = torch.where(chroma_B1HW > 0, (value_B1HW - x_BCHW) / chroma_B1HW, red_C11)  # the channels' share in S
    saturation_B1HW = torch.where(value_B1HW > 0, chroma_B1HW / value_B1HW, 0)
    return value_B1HW * (1 - (saturation_B1HW * factor + added).clamp(0, 1) * hue_BCHW)


def elastic_transform(x_BCHW: Tensor, strength: float, smoothing: float, jitter: float, generator: Generator) -> Tensor:
    """An affine map by three points, then a small move of each pixel; all three parameters are shares of the side."""
    B, _, height, width = x_BCHW.shape
    side = min(height, width)
    x, y, third = width // 2, height // 2, max(1, side // 3)
    from_32 = torch.tensor([[x + third, y + third], [x + third, y - third], [x - third, y - third]]).double()
    to_B32 = from_32 + _uniform(-jitter * side, jitter * side, (B, 3, 2), generator)
    matrix_B32 = torch.linalg.solve(torch.cat((to_B32, torch.ones(B, 3, 1)), 2), from_32.expand(B, 3, 2))
    row_HW, column_HW = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    grid_HW3 = torch.stack((column_HW, row_HW, torch.ones_like(row_HW)), 2).double()
    x_BHW, y_BHW = (grid_HW3 @ matrix_B32[:, None]).unbind(3)
    x_BCHW = _sampled(x_BCHW, y_BHW, x_BHW, _reflect_101)
    move_B2HW = _uniform(-1, 1, (B, 2, height, width), generator) * strength * side * _scale(x_BCHW)
    dx_BHW, dy_BHW = _blurred(move_B2HW, smoothing * side, _reflect, truncate=3).unbind(1)
    return _sampled(x_BCHW, row_HW + dy_BHW, column_HW + dx_BHW, _reflect)


def pixelate(x_BCHW: Tensor, factor: float) -> Tensor:
    """`Image.resize` with BOX to the share `factor` of each side, and back."""

    def resized(image: Image.Image) -> Image.Image:
        width, height = image.size
        small = image.resize((max(1, int(width * factor)), max(1, int(height * factor))), Image.Resampling.BOX)
        return small.resize(image.size, Image.Resampling.BOX)

    return _with_pillow(x_BCHW, resized)


def jpeg_compression(x_BCHW: Tensor, quality: int) -> Tensor:
    """`Image.save` as JPEG, and read it back."""

    def compressed(image: Image.Image) -> Image.Image:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=quality)
        return Image.open(file)

    return _with_pillow(x_BCHW, compressed)


def _with_pillow(x_BCHW: Tensor, function: Callable[[Image.Image], Image.Image]) -> Tensor:
    images_BHWC = (x_BCHW * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
    changed_BHWC = np.stack([np.asarray(function(Image.fromarray(image))) for image in images_BHWC])
    return torch.from_numpy(changed_BHWC).permute(0, 3, 1, 2).double() / 255


def _scale(x_BCHW: Tensor) -> float:
    return min(x_BCHW.shape[2:]) / SIDE


def _normal(shape: Iterable[int], generator: Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _uniform(low: float, high: float, shape: int | Iterable[int], generator: Generator) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float64)


def _colour(red: int, green: int, blue: int) -> Tensor:
    return torch.tensor([red, green, blue], dtype=torch.float64)[:, None, None] / 255


def _nearest(index: Tensor, size: int) -> Tensor:
    """a a | a b c | c c"""
    return index.clamp(0, size - 1)


def _reflect(index: Tensor, size: int) -> Tensor:
    """b a | a b c | c b"""
    index = index % (2 * size)
    return index.minimum(2 * size - 1 - index)


def _reflect_101(index: Tensor, size: int) -> Tensor:
    """c b | a b c | b a"""
    index = index % max(1, 2 * size - 2)
    return index.minimum(2 * size - 2 - index)


def _sum_of_products(x_BCHW: Tensor, pairs_HH_WW: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Filter columns by the first and rows by the second matrix of each pair; the sum over the pairs."""
    total_BCHW = torch.zeros_like(x_BCHW)
    for matrix_HH, matrix_WW in pairs_HH_WW:
        total_BCHW += matrix_HH @ (x_BCHW @ matrix_WW.T)
    return total_BCHW


def _line_filter(weights: Tensor, size: int, border: Border) -> Tensor:
    """The matrix that correlates a line of `size` pixels with an odd number of weights."""
    reach = len(weights) // 2
    source = border(torch.arange(size)[:, None] + torch.arange(-reach, reach + 1), size)
    return torch.zeros(size, size, dtype=torch.float64).scatter_add_(1, source, weights.expand(size, -1))


def _enlarging(size: int, zoom: float) -> Tensor:
    """The matrix that enlarges the middle of a line of `size` pixels to the whole, as `scipy.ndimage.zoom`, order 1."""
    cropped = math.ceil(size / zoom)
    enlarged = round(cropped * zoom)
    start, trimmed = (size - cropped) // 2, (enlarged - size) // 2
    position = (trimmed + torch.arange(size)).double() * ((cropped - 1) / max(1, enlarged - 1))
    low = position.long().clamp(0, max(0, cropped - 2))
    source = start + torch.stack((low, (low + 1).clamp(max=cropped - 1)), 1)
    weights = torch.stack((1 - (position - low), position - low), 1)
    return torch.zeros(size, size, dtype=torch.float64).scatter_add_(1, source, weights)


def _gaussian(std: float, reach: int) -> Tensor:
    weights = torch.exp(-0.5 * (torch.arange(-reach, reach + 1).double() / max(std, 1e-9)) ** 2)
    return weights / weights.sum()


def _blurred(x_BCHW: Tensor, std: float, border: Border = _nearest, truncate: float = 4) -> Tensor:
    """`scipy.ndimage.gaussian_filter` of each channel."""
    weights = _gaussian(std, int(truncate * std + 0.5))
    height, width = x_BCHW.shape[2:]
    return _sum_of_products(x_BCHW, [(_line_filter(weights, height, border), _line_filter(weights, width, border))])


def _moved(x_BCHW: Tensor, radius: int, std: float, angle_B: Tensor) -> Tensor:
    """ImageMagick's motion blur with repeated edges: half a Gaussian along the angle (degrees); rounded to 8 bits."""
    tap_T = torch.arange(2 * radius + 1).double()
    weight_T = torch.exp(-0.5 * (tap_T / std) ** 2)
    weight_T /= weight_T.sum()
    angle_B1 = angle_B.deg2rad()[:, None]
    dx_BT, dy_BT = ((tap_T * direction - 0.5).ceil().long() for direction in (angle_B1.cos(), angle_B1.sin()))
    C, height, width = x_BCHW.shape[1:]
    moved_BCP, x_BCP = torch.zeros_like(x_BCHW).flatten(2), x_BCHW.flatten(2)
    for t, weight in enumerate(weight_T.tolist()):
        row_BH = _nearest(torch.arange(height) + dy_BT[:, t, None], height)
        column_BW = _nearest(torch.arange(width) + dx_BT[:, t, None], width)
        index_BP = (row_BH[:, :, None] * width + column_BW[:, None, :]).flatten(1)
        moved_BCP.add_(x_BCP.gather(2, index_BP[:, None].expand(-1, C, -1)), alpha=weight)
    return (moved_BCP.view_as(x_BCHW) * 255).round() / 255


def _streaks(noise_B1HW: Tensor, grain: float, threshold: float, radius: int, blur: float, angle_B: Tensor) -> Tensor:
    """Noise above a threshold, enlarged to grains of `grain` pixels, cut to 8 bits and blurred along the angle."""
    height, width = noise_B1HW.shape[2:]
    enlarging = (_enlarging(height, max(1.0, grain)), _enlarging(width, max(1.0, grain)))
    grains_B1HW = _sum_of_products(noise_B1HW, [enlarging])
    grains_B1HW = torch.where(grains_B1HW < threshold, 0, grains_B1HW.clamp(0, 1))
    return _moved((grains_B1HW * 255).floor() / 255, radius, blur, angle_B)


def _plasma(B: int, height: int, width: int, decay: float, generator: Generator) -> Tensor:
    """Clouds in 0..1, (B, 1, H, W): diamonds and squares on a map that wraps around, halved down to pixels.

    Each new point is the mean of its four neighbours plus noise of +-100², divided by decay² after each halving.
    """
    size = 1 << max(1, max(height, width) - 1).bit_length()
    map_BHW = torch.zeros(B, size, size, dtype=torch.float64)
    step, wibble = size, 100.0

    def new(sum_of_four: Tensor) -> Tensor:
        return sum_of_four / 4 + wibble * _uniform(-wibble, wibble, sum_of_four.shape, generator)

    while step >= 2:
        half = step // 2
        corner = map_BHW[:, ::step, ::step]
        pair = corner + corner.roll(-1, 1)
        middle = map_BHW[:, half::step, half::step] = new(pair + pair.roll(-1, 2))
        map_BHW[:, ::step, half::step] = new(corner + corner.roll(-1, 2) + middle + middle.roll(1, 1))
        map_BHW[:, half::step, ::step] = new(corner + corner.roll(-1, 1) + middle + middle.roll(1, 2))
        step, wibble = half, wibble / decay
    map_BHW -= map_BHW.amin((1, 2), keepdim=True)
    map_BHW /= map_BHW.amax((1, 2), keepdim=True)
    return map_BHW[:, None, :height, :width]


def _sampled(x_BCHW: Tensor, y_BHW: Tensor, x_BHW: Tensor, border: Border) -> Tensor:
    """The images between their pixels, at (y, x), bilinear."""
    C, height, width = x_BCHW.shape[1:]
    sampled_BCP, x_BCP = 0, x_BCHW.flatten(2)
    for row_BHW in (y_BHW.floor(), y_BHW.floor() + 1):
        for column_BHW in (x_BHW.floor(), x_BHW.floor() + 1):
            weight_BHW = (1 - (y_BHW - row_BHW).abs()) * (1 - (x_BHW - column_BHW).abs())
            index_BHW = border(row_BHW.long(), height) * width + border(column_BHW.long(), width)
            index_BCP = index_BHW.flatten(1)[:, None].expand(-1, C, -1)
            sampled_BCP = sampled_BCP + weight_BHW.flatten(1)[:, None] * x_BCP.gather(2, index_BCP)
    return sampled_BCP.unflatten(2, y_BHW.shape[1:])


def _padded(x_B1HW: Tensor) -> Tensor:
    """One more pixel on each side, by reflection."""
    for dim in (2, 3):
        size = x_B1HW.shape[dim]
        x_B1HW = x_B1HW.index_select(dim, _reflect_101(torch.arange(-1, size + 1), size))
    return x_B1HW


def _box(x_B1HW: Tensor) -> Tensor:
    return functional.avg_pool2d(_padded(x_B1HW), 3, stride=1)


def _distances(to_B1HW: Tensor, most: int) -> Tensor:
    """Euclidean distance of every pixel to the nearest one that is true, at most `most`: columns first, then rows."""
    square_B1HW = torch.where(to_B1HW, 0.0, float(most**2)).double()
    for dim in (2, 3):
        line_B1HW, size = square_B1HW.clone(), square_B1HW.shape[dim]
        for d in range(1, min(most, size)):
            near, far = (square_B1HW.narrow(dim, start, size - d) for start in (0, d))
            near.copy_(near.minimum(line_B1HW.narrow(dim, d, size - d) + d**2))
            far.copy_(far.minimum(line_B1HW.narrow(dim, 0, size - d) + d**2))
    return square_B1HW.sqrt()


def _edges(grey_B1HW: Tensor, threshold: float = 150) -> Tensor:
    """`cv2.Canny` with one threshold: gradients steeper than both neighbours along their direction."""
    sobel = torch.tensor([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]], dtype=torch.float64)
    framed_B1HW = functional.pad(grey_B1HW, (1, 1, 1, 1), mode="replicate")
    dx_B1HW, dy_B1HW = functional.conv2d(framed_B1HW, torch.stack((sobel, sobel.T))[:, None]).split(1, dim=1)
    steep_B1HW, (height, width) = dx_B1HW.abs() + dy_B1HW.abs(), grey_B1HW.shape[2:]
    framed_B1HW = functional.pad(steep_B1HW, (1, 1, 1, 1))
    # Angles in eighths of a turn: 0 across, 1 down to the right, 2 down, 3 down to the left.
    turn_B1HW = (torch.atan2(dy_B1HW, dx_B1HW) / (math.pi / 4)).round() % 4
    edges_B1HW = torch.zeros_like(steep_B1HW, dtype=torch.bool)
    for turn, (dy, dx) in enumerate(((0, 1), (1, 1), (1, 0), (1, -1))):
        before, after = (framed_B1HW[:, :, 1 + y :, 1 + x :][:, :, :height, :width] for y, x in ((-dy, -dx), (dy, dx)))
        edges_B1HW |= (turn_B1HW == turn) & (steep_B1HW > before) & (steep_B1HW >= after)
    return edges_B1HW & (steep_B1HW > threshold)


def _equalized(grey_B1HW: Tensor) -> Tensor:
    """Whole numbers of 0..255, spread so that each is the share of the pixels up to it, without the darkest ones."""
    grey_BP = grey_B1HW.flatten(1).long()
    count_B256 = grey_BP.new_zeros(len(grey_BP), 256).scatter_add_(1, grey_BP, torch.ones_like(grey_BP))
    up_to_B256 = count_B256.cumsum(1)
    darkest_B1 = up_to_B256.gather(1, grey_BP.amin(1, keepdim=True))
    others_B1 = (grey_BP.shape[1] - darkest_B1).clamp(min=1)
    table_B256 = ((up_to_B256 - darkest_B1) * (255 / others_B1)).round()
    return table_B256.gather(1, grey_BP).view_as(grey_B1HW).double()


class Corruption(NamedTuple):
    """One corruption: kernel(x_BCHW, *parameters[, generator]) -> x_BCHW, pure; x and result float64, about 0..1.

    severities: the official parameters at 32x32 of severities 1..5, in the order that `parameters` names.
    lengths: indices of the parameters that are lengths in pixels.
    random: whether the kernel takes the generator.
    extra: one of the four for validation, which are not in the mean over the fifteen.
    """

    name: str
    kernel: Callable[..., Tensor]
    severities: tuple[float | tuple[float, ...], ...]
    parameters: str
    lengths: tuple[int, ...] = ()
    random: bool = False
    extra: bool = False


CORRUPTIONS: tuple[Corruption, ...] = (
    Corruption("gaussian_noise", gaussian_noise, (0.04, 0.06, 0.08, 0.09, 0.10), "std", random=True),
    Corruption("shot_noise", shot_noise, (500, 250, 100, 75, 50), "photons where it is white", random=True),
    Corruption("impulse_noise", impulse_noise, (0.01, 0.02, 0.03, 0.05, 0.07), "share of the values", random=True),
    Corruption("defocus_blur", defocus_blur, ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1.0, 0.2), (1.5, 0.1)),
               "radius, std of the smoothing", lengths=(0, 1)),
    Corruption("glass_blur", glass_blur, ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
               "std of the blurs, reach, times", lengths=(0, 1), random=True),
    Corruption("motion_blur", motion_blur, ((6, 1.0), (6, 1.5), (6, 2.0), (8, 2.0), (9, 2.5)),
               "radius, std", lengths=(0, 1), random=True),
    Corruption("zoom_blur", zoom_blur, (1.06, 1.11, 1.16, 1.21, 1.26), "end of the zooms"),
    Corruption("snow", snow, ((0.1, 0.2, 1.0, 0.6, 8, 3.0, 0.95), (0.1, 0.2, 1.0, 0.5, 10, 4.0, 0.9),
                              (0.15, 0.3, 1.75, 0.55, 10, 4.0, 0.9), (0.25, 0.3, 2.25, 0.6, 12, 6.0, 0.85),
                              (0.3, 0.3, 1.25, 0.65, 14, 12.0, 0.8)),
               "mean, std, grain, threshold of the noise; radius, std of the motion; weight of the image",
               lengths=(2, 4, 5), random=True),
    Corruption("frost", frost, ((1.0, 0.2), (1.0, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)),
               "weights of image and frost", random=True),
    Corruption("fog", fog, ((0.2, 3.0), (0.5, 3.0), (0.75, 2.5), (1.0, 2.0), (1.5, 1.75)),
               "thickness, decay of the detail", random=True),
    Corruption("brightness", brightness, (0.05, 0.1, 0.15, 0.2, 0.3), "added to V"),
    Corruption("contrast", contrast, (0.75, 0.5, 0.4, 0.3, 0.15), "factor"),
    Corruption("elastic_transform", elastic_transform, ((0.0, 0.0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06),
                                                        (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)),
               "strength, its smoothing, jitter of the points, as shares of the side", random=True),
    Corruption("pixelate", pixelate, (0.95, 0.9, 0.85, 0.75, 0.65), "share of the side"),
    Corruption("jpeg_compression", jpeg_compression, (80, 65, 58, 50, 40), "quality"),
    Corruption("speckle_noise", speckle_noise, (0.06, 0.1, 0.12, 0.16, 0.2), "std", random=True, extra=True),
    Corruption("gaussian_blur", gaussian_blur, (0.4, 0.6, 0.7, 0.8, 1.0), "std", lengths=(0,), extra=True),
    Corruption("spatter", spatter, ((0.62, 0.1, 0.7, 0.7, 0.5, 0), (0.65, 0.1, 0.8, 0.7, 0.5, 0),
                                    (0.65, 0.3, 1.0, 0.69, 0.5, 0), (0.65, 0.1, 0.7, 0.69, 0.6, 1),
                                    (0.65, 0.1, 0.5, 0.68, 0.6, 1)),
               "mean, std, blur, threshold of the noise; strength of water or blur of mud; 1 if mud",
               lengths=(2,), random=True, extra=True),
    Corruption("saturate", saturate, ((0.3, 0.0), (0.1, 0.0), (1.5, 0.0), (2.0, 0.1), (2.5, 0.2)),
               "factor of S, added to S", extra=True),
)  # fmt: skip
STANDARD = tuple(row.name for row in CORRUPTIONS if not row.extra)  # the fifteen that the mean is over
EXTRA = tuple(row.name for row in CORRUPTIONS if row.extra)  # reported separately
