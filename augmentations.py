"""The sixteen operations of Adversarial AutoAugment, batched, and equal to Pillow bit for bit.

A `Plan` says which operation happens to which image and how strongly; `apply` carries it out on a whole
uint8 batch, on any device. Nothing here draws a random number, so a plan can be logged and replayed. The
module needs torch alone and can be lifted into any other project.

"Equal to Pillow" holds for Pillow >= 7.0 on x86-64, for eager tensors. `torch.compile`, and Pillow's own
builds for other machines, may contract a product and a sum into one rounding and so differ in a rare last bit.

Shape suffixes:
    B   images in the batch (with M copies of each of N images: B = N * M)
    C   channels, 3 (red, green, blue)
    H, W   rows and columns of an image
    K   positions of a plan, executed in order
    P   pixels of an image, H * W
Digits are sizes: BC256 is a table of 256 entries per image and channel, 6B six numbers per image.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Plan(NamedTuple):
    """All that happens to a batch of B images in K positions. Tensors live on the CPU.

    op_BK: int64, a row of `OPS`; -1 leaves the image as it is.
    magnitude_BK: float64, in the unit of the row, sign included; ignored where the row has no magnitude.
    partner_BK: int64, which image of the batch, as it was before the plan, SamplePairing blends in.
    centre_BK2: float64, centre of the Cutout operation as fractions of width and height.
    The last two may be left out where no operation of the plan needs them.
    """

    op_BK: Tensor
    magnitude_BK: Tensor
    partner_BK: Tensor | None = None
    centre_BK2: Tensor | None = None


def apply(images_BCHW: Tensor, plan: Plan, others: Tensor | None = None) -> Tensor:
    """Carry out `plan` on a uint8 batch; returns a new uint8 batch of the same shape on the same device.

    others: further images, uint8 (_, 3, H, W), that only serve as partners: partner B + i is others[i].

    Images are sorted by operation, so that each operation present runs once per position. Which rows go where
    is known on the CPU: choosing them never waits for the device.

    Raises ValueError for a batch that is not uint8 (B, 3, H, W), for a plan of another size or with rows that are not
    in `OPS`, and for one that lacks the partners or centres that its operations need.
    """
    _check_images(images_BCHW)
    op_BK = plan.op_BK
    if op_BK.shape[0] != images_BCHW.shape[0] or plan.magnitude_BK.shape != op_BK.shape:
        raise ValueError(
            f"plan is for {tuple(op_BK.shape)} (images, positions) with magnitudes {tuple(plan.magnitude_BK.shape)}; "
            f"the batch has {images_BCHW.shape[0]} images"
        )
    if op_BK.numel() and not -1 <= op_BK.min() <= op_BK.max() < len(OPS):
        raise ValueError(f"op_BK holds {op_BK.min()}..{op_BK.max()}; rows are 0..{len(OPS) - 1}, and -1 for none")
    out_BCHW = images_BCHW.clone()
    partners_BCHW = images_BCHW if others is None else torch.cat((images_BCHW, others))
    for k in range(op_BK.shape[1]):
        order_B = op_BK[:, k].argsort(stable=True)
        counts = (op_BK[:, k] + 1).bincount(minlength=len(OPS) + 1).tolist()
        groups = out_BCHW.index_select(0, upload(order_B, images_BCHW.device)).split(counts)
        members = order_B.split(counts)
        done = [groups[0]] + [
            _run(op, group, partners_BCHW, plan, members_of_op, k)
            for op, group, members_of_op in zip(OPS, groups[1:], members[1:], strict=True)
            if len(members_of_op)
        ]
        out_BCHW = torch.cat(done).index_select(0, upload(order_B.argsort(), images_BCHW.device))
    return out_BCHW


def portion(plan: Plan, start: int, stop: int) -> tuple[Plan, Tensor]:
    """The plan of images start..stop-1 of a batch alone, and the numbers of the images outside that they need.

    It is run as `apply(images[start:stop], part, others=images[outside])`.
    """
    part = Plan(*(None if field is None else field[start:stop] for field in plan))
    if part.partner_BK is None:
        return part, torch.empty(0, dtype=torch.long)
    pairing = torch.tensor([row for row, op in enumerate(OPS) if op.needs == "partner"])
    inside_BK = (part.partner_BK >= start) & (part.partner_BK < stop)
    needed_BK = torch.isin(part.op_BK, pairing) & ~inside_BK
    outside = part.partner_BK[needed_BK].unique()
    place_BK = stop - start + torch.searchsorted(outside, part.partner_BK)
    partner_BK = torch.where(inside_BK, part.partner_BK - start, torch.where(needed_BK, place_BK, 0))
    return part._replace(partner_BK=partner_BK), outside


def apply_op(
    images_BCHW: Tensor, name: str, magnitude_B: Tensor, *, partner: Tensor | None = None, centre: Tensor | None = None
) -> Tensor:
    """Run the operation called `name` on a uint8 batch, with one magnitude per image, sign included.

    partner: (B, C, H, W) uint8, for SamplePairing. centre: (B, 2) fractions of width and height, for Cutout.
    Raises ValueError for an unknown name, a wrong batch, or a missing partner or centre.
    """
    _check_images(images_BCHW)
    op = OPS[row_of(name)]
    extra = {None: (), "partner": (partner,), "centre": (centre,)}[op.needs]
    if any(e is None for e in extra):
        raise ValueError(f"{name} needs {op.needs}=")
    magnitude_B = torch.as_tensor(magnitude_B, dtype=torch.float64, device="cpu")
    if magnitude_B.shape != images_BCHW.shape[:1]:
        raise ValueError(f"{name}: {tuple(magnitude_B.shape)} magnitudes for {images_BCHW.shape[0]} images")
    return op.kernel(images_BCHW, magnitude_B, *extra)


def row_of(name: str) -> int:
    """Index in `OPS` of the operation called `name`. Raises ValueError for an unknown one."""
    for row, op in enumerate(OPS):
        if op.name == name:
            return row
    raise ValueError(f"unknown operation {name!r}; there are {', '.join(op.name for op in OPS)}")


def gather_pixels(images_BCHW: Tensor, x_BHW: Tensor, y_BHW: Tensor) -> Tensor:
    """Fetch for every output pixel the input pixel at (x, y), black where that lies outside.

    x_BHW, y_BHW: int64 indices, each broadcastable to (B, H, W) of the output.
    """
    height, width = images_BCHW.shape[-2:]
    inside_BHW = ((x_BHW >= 0) & (x_BHW < width)) & ((y_BHW >= 0) & (y_BHW < height))
    index_BHW = torch.where(inside_BHW, y_BHW * width + x_BHW, 0)
    index_BCP = index_BHW.flatten(1).unsqueeze(1).expand(-1, images_BCHW.shape[1], -1)
    pixels_BCHW = images_BCHW.flatten(2).gather(2, index_BCP).unflatten(2, index_BHW.shape[1:])
    return pixels_BCHW * inside_BHW.unsqueeze(1)


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a small CPU tensor to the device, from pinned memory, without waiting for it."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def _check_images(images_BCHW: Tensor) -> None:
    if images_BCHW.dtype != torch.uint8 or images_BCHW.ndim != 4 or images_BCHW.shape[1] != 3:
        raise ValueError(f"need uint8 images (B, 3, H, W), got {images_BCHW.dtype} {tuple(images_BCHW.shape)}")


def _run(op: "Op", group_BCHW: Tensor, partners_BCHW: Tensor, plan: Plan, members: Tensor, k: int) -> Tensor:
    """Run `op` on the images `members` as they are at position k; partners_BCHW: all, as they were before the plan."""
    extra = []
    if op.needs == "partner":
        if plan.partner_BK is None:
            raise ValueError(f"{op.name} is in the plan, but its partner_BK is missing")
        extra = [partners_BCHW.index_select(0, upload(plan.partner_BK[members, k], partners_BCHW.device))]
    elif op.needs == "centre":
        if plan.centre_BK2 is None:
            raise ValueError(f"{op.name} is in the plan, but its centre_BK2 is missing")
        extra = [plan.centre_BK2[members, k]]
    return op.kernel(group_BCHW, plan.magnitude_BK[members, k], *extra)


def _per_image(values_B: Tensor, like_BCHW: Tensor, dtype: torch.dtype) -> Tensor:
    """One value per image, on the images' device, shaped to broadcast against (B, C, H, W)."""
    return upload(values_B.to(dtype), like_BCHW.device).view(-1, 1, 1, 1)


# Geometry. Pillow maps output pixels to input pixels and takes the nearest; outside is black.


def shear_x(images_BCHW: Tensor, slope_B: Tensor) -> Tensor:
    """`Image.transform(size, AFFINE, (1, slope, 0, 0, 1, 0))`: about the top left corner."""
    one, zero = torch.ones_like(slope_B), torch.zeros_like(slope_B)
    return _affine(images_BCHW, torch.stack((one, slope_B, zero, zero, one, zero)))


def shear_y(images_BCHW: Tensor, slope_B: Tensor) -> Tensor:
    """`Image.transform(size, AFFINE, (1, 0, 0, slope, 1, 0))`: about the top left corner."""
    one, zero = torch.ones_like(slope_B), torch.zeros_like(slope_B)
    return _affine(images_BCHW, torch.stack((one, zero, zero, slope_B, one, zero)))


def translate_x(images_BCHW: Tensor, fraction_B: Tensor) -> Tensor:
    """`Image.transform(size, AFFINE, (1, 0, fraction * width, 0, 1, 0))`: positive moves the content left."""
    height, width = images_BCHW.shape[-2:]
    x_BW = upload(_translated(fraction_B * width, width), images_BCHW.device)
    return gather_pixels(images_BCHW, x_BW[:, None, :], torch.arange(height, device=images_BCHW.device)[None, :, None])


def translate_y(images_BCHW: Tensor, fraction_B: Tensor) -> Tensor:
    """`Image.transform(size, AFFINE, (1, 0, 0, 0, 1, fraction * height))`: positive moves the content up."""
    height, width = images_BCHW.shape[-2:]
    y_BH = upload(_translated(fraction_B * height, height), images_BCHW.device)
    return gather_pixels(images_BCHW, torch.arange(width, device=images_BCHW.device)[None, None, :], y_BH[:, :, None])


def rotate(images_BCHW: Tensor, degrees_B: Tensor) -> Tensor:
    """`Image.rotate(degrees)`: counter-clockwise about the centre, same size."""
    height, width = images_BCHW.shape[-2:]
    # Python's own cos and decimal rounding, as in Pillow: torch's may differ in the last bit. There are few angles.
    angles, which_B = degrees_B.unique(return_inverse=True)
    matrices = torch.tensor([_rotation(angle, width, height) for angle in angles.tolist()], dtype=torch.float64)
    return _affine(images_BCHW, matrices.view(-1, 6)[which_B].T)


def _rotation(degrees: float, width: int, height: int) -> tuple[float, ...]:
    """The output-to-input matrix that `Image.rotate` makes."""
    radians = -math.radians(degrees % 360.0)
    cos, sin = round(math.cos(radians), 15), round(math.sin(radians), 15)
    x, y = width / 2, height / 2
    return cos, sin, cos * -x + sin * -y + x, -sin, cos, -sin * -x + cos * -y + y


def _affine(images_BCHW: Tensor, matrix_6B: Tensor) -> Tensor:
    """Nearest neighbour through (x, y) -> (a x + b y + c, d x + e y + f), in Pillow's 16.16 fixed point."""
    height, width = images_BCHW.shape[-2:]
    a, b, c, d, e, f = matrix_6B
    starts_and_steps = torch.stack((c + a * 0.5 + b * 0.5, a, b, f + d * 0.5 + e * 0.5, d, e))
    fixed_6B = upload((starts_and_steps * 65536.0 + 0.5).floor().long(), images_BCHW.device)
    x0, x_per_x, x_per_y, y0, y_per_x, y_per_y = fixed_6B[:, :, None, None]
    column = torch.arange(width, device=images_BCHW.device)
    row = torch.arange(height, device=images_BCHW.device)[:, None]
    return gather_pixels(
        images_BCHW, (x0 + row * x_per_y + column * x_per_x) >> 16, (y0 + row * y_per_y + column * y_per_x) >> 16
    )


def _translated(offset_B: Tensor, size: int) -> Tensor:
    """Source index of each of `size` pixels in a line moved by offset_B pixels (fractions allowed)."""
    steps_BS = torch.ones(len(offset_B), size, dtype=torch.float64)
    steps_BS[:, 0] = offset_B + 0.5
    return steps_BS.cumsum(1).floor().long()  # summed pixel by pixel, as Pillow does, so that rounding is the same


# Tone: every pixel by itself, or by a table made from its image's histogram.


def autocontrast(images_BCHW: Tensor, _: Tensor) -> Tensor:
    """`ImageOps.autocontrast(image)`: stretch each channel to 0..255, in float64 and in Pillow's order."""
    low_BC1, high_BC1 = (pixels.double() for pixels in images_BCHW.flatten(2).aminmax(dim=2, keepdim=True))
    span_BC1 = high_BC1 - low_BC1
    scale_BC1 = torch.full_like(span_BC1, 255.0) / span_BC1  # 255.0 / span would multiply by a rounded reciprocal
    value_256 = torch.arange(256, dtype=torch.float64, device=images_BCHW.device)
    table_BC256 = (value_256 * scale_BC1 + -low_BC1 * scale_BC1).clamp(0, 255)
    return _look_up(images_BCHW, torch.where(span_BC1 > 0, table_BC256, value_256))


def invert(images_BCHW: Tensor, _: Tensor) -> Tensor:
    """`ImageOps.invert(image)`."""
    return 255 - images_BCHW


def equalize(images_BCHW: Tensor, _: Tensor) -> Tensor:
    """`ImageOps.equalize(image)`: flatten each channel's histogram, all in integers."""
    pixels_BCP = images_BCHW.flatten(2).long()
    histogram_BC256 = pixels_BCP.new_zeros(*pixels_BCP.shape[:2], 256).scatter_add_(
        2, pixels_BCP, torch.ones_like(pixels_BCP)
    )
    brightest_BC1 = histogram_BC256.gather(2, pixels_BCP.amax(2, keepdim=True))
    step_BC1 = (pixels_BCP.shape[2] - brightest_BC1) // 255
    below_BC256 = histogram_BC256.cumsum(2) - histogram_BC256
    table_BC256 = ((below_BC256 + step_BC1 // 2) // step_BC1.clamp(min=1)).clamp(max=255)
    return _look_up(images_BCHW, torch.where(step_BC1 > 0, table_BC256, torch.arange(256, device=images_BCHW.device)))


def solarize(images_BCHW: Tensor, threshold_B: Tensor) -> Tensor:
    """`ImageOps.solarize(image, threshold)`: invert what is not below the threshold."""
    return torch.where(
        images_BCHW < _per_image(threshold_B.ceil(), images_BCHW, torch.int16), images_BCHW, 255 - images_BCHW
    )


def posterize(images_BCHW: Tensor, bits_B: Tensor) -> Tensor:
    """`ImageOps.posterize(image, int(bits))`: keep the upper 0..8 bits."""
    return images_BCHW & _per_image((255 << (8 - bits_B.long())) & 255, images_BCHW, torch.uint8)


def _look_up(images_BCHW: Tensor, table_BC256: Tensor) -> Tensor:
    """`Image.point`: replace each value by its entry, which is cut to an integer."""
    return table_BC256.to(torch.uint8).gather(2, images_BCHW.flatten(2).long()).view_as(images_BCHW)


# Blends of an image with something else.


def contrast(images_BCHW: Tensor, factor_B: Tensor) -> Tensor:
    """`ImageEnhance.Contrast(image).enhance(factor)`: away from, or towards, the mean grey."""
    grey_B1HW = _grey(images_BCHW)
    pixels = grey_B1HW[0].numel()
    mean_B111 = (2 * grey_B1HW.sum((1, 2, 3), keepdim=True) + pixels) // (2 * pixels)  # half rounds up
    return _blend(mean_B111, images_BCHW, factor_B)


def color(images_BCHW: Tensor, factor_B: Tensor) -> Tensor:
    """`ImageEnhance.Color(image).enhance(factor)`: away from, or towards, grey."""
    return _blend(_grey(images_BCHW), images_BCHW, factor_B)


def brightness(images_BCHW: Tensor, factor_B: Tensor) -> Tensor:
    """`ImageEnhance.Brightness(image).enhance(factor)`: away from, or towards, black."""
    return _blend(torch.zeros_like(images_BCHW), images_BCHW, factor_B)


def sharpness(images_BCHW: Tensor, factor_B: Tensor) -> Tensor:
    """`ImageEnhance.Sharpness(image).enhance(factor)`: away from, or towards, `ImageFilter.SMOOTH`."""
    return _blend(_smooth(images_BCHW), images_BCHW, factor_B)


def cutout(images_BCHW: Tensor, fraction_B: Tensor, centre_B2: Tensor) -> Tensor:
    """A rectangle of side fraction * width around the centre, as `ImageDraw.rectangle` fills it.

    Its corners are cut to integers and both belong to it; what lies outside the image is left out. A fraction
    of 0 changes nothing. The grey is AutoAugment's.
    """
    height, width = images_BCHW.shape[-2:]
    side_B = fraction_B * width
    size_2 = torch.tensor([width, height], dtype=torch.float64)
    corner_B2 = (centre_B2.double().cpu() * size_2 - side_B[:, None] / 2).clamp(min=0).floor()
    far_B2 = torch.minimum(size_2, corner_B2 + side_B[:, None]).floor()
    far_B2[side_B <= 0] = -1
    x0, y0 = (_per_image(corner, images_BCHW, torch.int64) for corner in corner_B2.T)
    x1, y1 = (_per_image(far, images_BCHW, torch.int64) for far in far_B2.T)
    column = torch.arange(width, device=images_BCHW.device)
    row = torch.arange(height, device=images_BCHW.device)[:, None]
    inside_B1HW = (column >= x0) & (column <= x1) & (row >= y0) & (row <= y1)
    fill_C11 = upload(torch.tensor([125, 123, 114], dtype=torch.uint8), images_BCHW.device)[:, None, None]
    return torch.where(inside_B1HW, fill_C11, images_BCHW)


def sample_pairing(images_BCHW: Tensor, weight_B: Tensor, partner_BCHW: Tensor) -> Tensor:
    """`Image.blend(image, partner, weight)`: the weight is the partner's."""
    return _blend(images_BCHW, partner_BCHW, weight_B)


def _blend(first: Tensor, second: Tensor, weight_B: Tensor) -> Tensor:
    """`Image.blend`, also beyond 0..1: first + weight * (second - first), in float32, cut to an integer.

    The product and the sum are rounded apart; they must stay two operations (no lerp, no addcmul).
    """
    weighted = _per_image(weight_B, second, torch.float32) * (second.short() - first.short())
    return (first + weighted).clamp_(0, 255).to(torch.uint8)


def _grey(images_BCHW: Tensor) -> Tensor:
    """`Image.convert("L")`, int32 (B, 1, H, W)."""
    red, green, blue = images_BCHW.int().split(1, dim=1)
    return (19595 * red + 38470 * green + 7471 * blue + 32768) >> 16


def _smooth(images_BCHW: Tensor) -> Tensor:
    """`Image.filter(ImageFilter.SMOOTH)`: weights 1 around 5, over 13, rounded; the border stays as it is."""
    wide_BCHW = images_BCHW.short()
    rows = wide_BCHW[..., :-2, :] + wide_BCHW[..., 1:-1, :] + wide_BCHW[..., 2:, :]
    weighted = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * wide_BCHW[..., 1:-1, 1:-1]
    smooth_BCHW = images_BCHW.clone()
    smooth_BCHW[..., 1:-1, 1:-1] = (2 * weighted + 13) // 26
    return smooth_BCHW


class Op(NamedTuple):
    """One operation: kernel(images_BCHW, magnitude_B[, what it `needs`]) -> images_BCHW, pure.

    low, high: magnitude at the first and the last level, in `unit`; None where there is none.
    signed: a fair coin per image negates the magnitude.
    neutral: the magnitude that changes nothing, None where there is no such magnitude.
    needs: "partner" (images_BCHW) or "centre" (fractions, (B, 2)) for the kernels with a third argument.
    """

    name: str
    kernel: Callable[..., Tensor]
    low: float | None = None
    high: float | None = None
    unit: str = ""
    signed: bool = False
    neutral: float | None = None
    needs: str | None = None

    def magnitude(self, level: int, levels: int = 10) -> float:
        """Unsigned magnitude at `level` of 0..levels-1, 0.0 where there is none. The form matters at ties."""
        if self.low is None or self.high is None:
            return 0.0
        return self.low + (level / (levels - 1)) * (self.high - self.low)


# The order is the controller's index and so part of every checkpoint and log.
OPS: tuple[Op, ...] = (
    Op("ShearX", shear_x, 0.0, 0.3, "slope", signed=True, neutral=0.0),
    Op("ShearY", shear_y, 0.0, 0.3, "slope", signed=True, neutral=0.0),
    Op("TranslateX", translate_x, 0.0, 0.45, "fraction of width", signed=True, neutral=0.0),
    Op("TranslateY", translate_y, 0.0, 0.45, "fraction of height", signed=True, neutral=0.0),
    Op("Rotate", rotate, 0.0, 30.0, "degrees", signed=True, neutral=0.0),
    Op("AutoContrast", autocontrast),
    Op("Invert", invert),
    Op("Equalize", equalize),
    Op("Solarize", solarize, 0.0, 256.0, "threshold", neutral=256.0),
    Op("Posterize", posterize, 4.0, 8.0, "bits kept", neutral=8.0),
    Op("Contrast", contrast, 0.1, 1.9, "factor", neutral=1.0),
    Op("Color", color, 0.1, 1.9, "factor", neutral=1.0),
    Op("Brightness", brightness, 0.1, 1.9, "factor", neutral=1.0),
    Op("Sharpness", sharpness, 0.1, 1.9, "factor", neutral=1.0),
    Op("Cutout", cutout, 0.0, 0.2, "fraction of width", neutral=0.0, needs="centre"),
    Op("SamplePairing", sample_pairing, 0.0, 0.4, "weight of the partner", neutral=0.0, needs="partner"),
)
