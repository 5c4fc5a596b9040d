"""The sixteen operations of Adversarial AutoAugment, batched, and equal to Pillow bit for bit.

For another training loop, `Augment` is a transform: each image of a batch gets random operations of its own.

Beneath it, a `Plan` says which operation is applied to which image and how strongly; `apply` executes it on a whole
uint8 batch, on any device. Only `Augment` draws random numbers, so a plan can be logged and replayed. The module needs
only torch and can be copied into any other project.

"Equal to Pillow" holds for Pillow >= 7.0 on x86-64, for eager tensors. `torch.compile`, and Pillow's builds for other
machines, may round a product and a sum once instead of twice, which can change the last bit of a value.

A new operation is a kernel and a row at the end of `OPS`. `_in_families` runs a kernel that is in no family by itself.

Shape suffixes:
    B   images in the batch (with M copies of each of N images: B = N * M)
    C   channels, 3 (red, green, blue)
    H, W   rows and columns of an image
    K   positions of a plan, executed in order
    N   distinct images that B copies are made of
    P   pixels of an image, H * W
    S   sub-policies to draw from
    U   distinct magnitudes in a group
Digits are sizes: BC256 is a table of 256 entries per image and channel, 6B six numbers per image.
"""

import difflib
import functools
import json
import math
import reprlib
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.utils.data import get_worker_info

CACHED_VALUES = 2**19  # bytes of images that fit a processor's cache
LARGEST_SCRATCH, MOST_VIEWS = 2**26, 1000  # bytes that a thread keeps under a name, and their shapes; see `_scratch`
# Index tables of shears and rotations are cached for levels (ten with two signs) and small images: at most 64 tables of
# 9 bytes per pixel, 75 MB.
TABLES, TABLED_MAGNITUDES, TABLED_PIXELS = 64, 20, 2**17
GREY = (125, 123, 114)  # Cutout's fill in AutoAugment
LARGEST_MAGNITUDE = 1e9  # far beyond any use; all index arithmetic is exact up to there


class Plan(NamedTuple):
    """The operations on a batch of B images in K positions. Tensors are on the CPU.

    op_BK: int64, a row of `OPS`; -1 leaves the image as it is.
    magnitude_BK: float64, in the unit of the row, sign included; ignored where the row has no magnitude.
    partner_BK: int64, the image of the batch, as it was before the plan, that SamplePairing blends in.
    centre_BK2: float64, centre of the Cutout operation as fractions of width and height.
    The last two may be None where no operation of the plan needs them.
    bilinear: shears and rotations interpolate between pixels, as Pillow's with BILINEAR, instead of taking the nearest.
    """

    op_BK: Tensor
    magnitude_BK: Tensor
    partner_BK: Tensor | None = None
    centre_BK2: Tensor | None = None
    bilinear: bool = False


def _on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """Plans are made and read on the CPU, also where torch.set_default_device names another device."""

    @functools.wraps(function)
    def with_cpu_as_default(*args: Any, **options: Any) -> Any:
        if torch.get_default_device().type == "cpu":
            return function(*args, **options)
        with torch.device("cpu"):
            return function(*args, **options)

    return with_cpu_as_default


@_on_cpu
def apply(images_BCHW: Tensor, plan: Plan, others: Tensor | None = None) -> Tensor:
    """Execute `plan` on a uint8 batch; returns a new uint8 batch of the same shape on the same device.

    others: further images, uint8 (_, 3, H, W), used only as partners: partner B + i is others[i].

    On the CPU each operation present is called once per position, with its images; on other devices all images pass
    through a few families of operations. Which image goes where is known on the CPU: nothing waits for the device.

    Raises ValueError for a batch that is not uint8 (B, 3, H, W), a plan of another size, rows that are not in `OPS`,
    magnitudes that are not finite, and missing partners or centres; TypeError for a plan's field of a wrong dtype.
    """
    _check_images(images_BCHW)
    _check_dtypes(plan)
    plan = plan._replace(magnitude_BK=plan.magnitude_BK.double())
    partners_BCHW = images_BCHW if others is None else torch.cat((images_BCHW, others))
    _check_plan(plan, len(images_BCHW), len(partners_BCHW))
    run = _in_groups if images_BCHW.device.type == "cpu" else _in_families
    return run(images_BCHW.contiguous(), plan, partners_BCHW)


def portion(plan: Plan, start: int, stop: int) -> tuple[Plan, Tensor]:
    """The plan of images start..stop-1 of a batch, and the numbers of the images outside that they need as partners.

    Execute it with `apply(images[start:stop], part, others=images[outside])`.
    """
    part = Plan(*(field[start:stop] if isinstance(field, Tensor) else field for field in plan))
    if part.partner_BK is None:
        return part, torch.empty(0, dtype=torch.long)
    inside_BK = (part.partner_BK >= start) & (part.partner_BK < stop)
    needed_BK = _needing("partner", part.op_BK) & ~inside_BK
    outside = part.partner_BK[needed_BK].unique()
    place_BK = stop - start + torch.searchsorted(outside, part.partner_BK)
    partner_BK = torch.where(inside_BK, part.partner_BK - start, torch.where(needed_BK, place_BK, 0))
    return part._replace(partner_BK=partner_BK), outside


def apply_op(
    images_BCHW: Tensor, name: str, magnitude_B: Tensor, *, partner: Tensor | None = None, centre: Tensor | None = None
) -> Tensor:
    """Run the operation called `name` on a uint8 batch, with one magnitude per image, sign included.

    partner: (B, C, H, W) uint8, for SamplePairing. centre: (B, 2) fractions of width and height, for Cutout.
    Raises ValueError for an unknown name, a wrong batch, a magnitude that is not finite, or a missing partner or
    centre.
    """
    _check_images(images_BCHW)
    op = OPS[row_of(name)]
    extra = {None: (), "partner": (partner,), "centre": (centre,)}[op.needs]
    if any(e is None for e in extra):
        raise ValueError(f"{name} needs {op.needs}=")
    magnitude_B = torch.as_tensor(magnitude_B, dtype=torch.float64, device="cpu")
    if magnitude_B.shape != images_BCHW.shape[:1]:
        raise ValueError(f"{name}: {tuple(magnitude_B.shape)} magnitudes for {images_BCHW.shape[0]} images")
    if op.low is not None:
        _check_magnitudes(name, magnitude_B)
    return op.kernel(images_BCHW.contiguous(), magnitude_B, *extra)


def row_of(name: str) -> int:
    """Index in `OPS` of the operation called `name`. Raises ValueError for an unknown one."""
    for row, op in enumerate(OPS):
        if op.name == name:
            return row
    raise ValueError(f"unknown operation {name!r}; there are {', '.join(op.name for op in OPS)}")


def _check_images(images_BCHW: Tensor) -> None:
    if images_BCHW.dtype != torch.uint8 or images_BCHW.ndim != 4 or images_BCHW.shape[1] != 3:
        raise ValueError(f"need uint8 images (B, 3, H, W), got {images_BCHW.dtype} {tuple(images_BCHW.shape)}")


def _check_dtypes(plan: Plan) -> None:
    rows, numbers = (torch.int64,), (torch.float64, torch.float32, torch.int64)
    dtypes = {"op_BK": rows, "magnitude_BK": numbers, "partner_BK": (*rows, None), "centre_BK2": (*numbers, None)}
    for name, allowed in dtypes.items():
        field = getattr(plan, name)
        if (field if field is None else getattr(field, "dtype", "")) not in allowed:
            found = field.dtype if isinstance(field, Tensor) else type(field).__name__
            raise TypeError(f"plan.{name} must be a tensor of {allowed[0]}, not {found}")


def _check_plan(plan: Plan, images: int, partners: int) -> None:
    op_BK = plan.op_BK
    if op_BK.ndim != 2 or op_BK.shape[0] != images or plan.magnitude_BK.shape != op_BK.shape:
        raise ValueError(
            f"plan is for {tuple(op_BK.shape)} (images, positions) with magnitudes {tuple(plan.magnitude_BK.shape)}; "
            f"the batch has {images} images"
        )
    if op_BK.numel() and not -1 <= op_BK.min() <= op_BK.max() < len(OPS):
        raise ValueError(f"op_BK holds {op_BK.min()}..{op_BK.max()}; rows are 0..{len(OPS) - 1}, and -1 for none")
    for row in op_BK[~(plan.magnitude_BK.abs() <= LARGEST_MAGNITUDE)].unique().tolist():
        if row >= 0 and OPS[row].low is not None:
            _check_magnitudes(OPS[row].name, plan.magnitude_BK[op_BK == row])
    for what, field in (("partner", "partner_BK"), ("centre", "centre_BK2")):
        needing_BK = _needing(what, op_BK)
        if getattr(plan, field) is None and needing_BK.any():
            raise ValueError(f"{OPS[op_BK[needing_BK][0]].name} is in the plan, but its {field} is missing")
    if plan.partner_BK is not None:
        partner = plan.partner_BK[_needing("partner", op_BK)]
        if ((partner < 0) | (partner >= partners)).any():
            raise ValueError(
                f"partner_BK holds {partner.min()}..{partner.max()}; there are {partners} images to choose"
            )


def _needing(what: str, op_BK: Tensor) -> Tensor:
    return torch.isin(op_BK, torch.tensor([row for row, op in enumerate(OPS) if op.needs == what]))


def _check_magnitudes(name: str, magnitudes: Tensor) -> None:
    wrong = ~(magnitudes.abs() <= LARGEST_MAGNITUDE)
    if wrong.any():
        raise ValueError(f"{magnitudes[wrong][0]} is not a magnitude for {name}: it must be finite and at most 1e9")


def _in_groups(images_BCHW: Tensor, plan: Plan, partners_BCHW: Tensor) -> Tensor:
    """`apply` on the CPU: images sorted by operation, so that each operation present is called once per position.

    A group that is too large for the processor's cache is processed in pieces.
    """
    size, K = piece_size(images_BCHW), plan.op_BK.shape[1]
    result_BCHW, other_BCHW = torch.empty_like(images_BCHW), _scratch("batch", images_BCHW)
    place_B = torch.arange(len(images_BCHW))  # of each image in the order of the last position
    for k in range(K):
        order_B = plan.op_BK[:, k].argsort(stable=True)
        counts = (plan.op_BK[:, k] + 1).bincount(minlength=len(OPS) + 1).tolist()
        sorted_BCHW, done = result_BCHW if (K - k) % 2 == 0 else other_BCHW, 0
        for op, members in zip((None, *OPS), order_B.split(counts), strict=True):
            for numbers in members.split(size) if len(members) else ():
                group_BCHW = _selected("group", images_BCHW, place_B.index_select(0, numbers))
                if op:
                    group_BCHW = _run(op, group_BCHW, partners_BCHW, plan, numbers, k)
                sorted_BCHW[done : done + len(numbers)] = group_BCHW
                done += len(numbers)
        images_BCHW, place_B = sorted_BCHW, order_B.argsort()
    return torch.index_select(images_BCHW, 0, place_B, out=result_BCHW)


def _run(op: "Op", images_BCHW: Tensor, partners_BCHW: Tensor, plan: Plan, numbers: Tensor, k: int) -> Tensor:
    """Run `op` on images_BCHW, which have these numbers in the batch, at position k."""
    if plan.bilinear and op.kernel in _MATRICES:
        matrix_6B = _matrices(_MATRICES[op.kernel], plan.magnitude_BK[numbers, k], *images_BCHW.shape[-2:])
        return _interpolated(images_BCHW, matrix_6B)
    extra = []
    if op.needs == "partner":
        extra = [_selected("partner", partners_BCHW, upload(plan.partner_BK[numbers, k], partners_BCHW.device))]
    elif op.needs == "centre":
        extra = [plan.centre_BK2[numbers, k]]
    return op.kernel(images_BCHW, plan.magnitude_BK[numbers, k], *extra)


def piece_size(images_BCHW: Tensor) -> int:
    """How many of these images to process at a time: on the CPU as many as fit its cache."""
    if images_BCHW.device.type != "cpu" or not images_BCHW.numel():
        return max(1, len(images_BCHW))
    return max(1, CACHED_VALUES * len(images_BCHW) // images_BCHW.numel())


class _Memory(threading.local):
    """Of each thread: one-dimensional tensors by name, and views of them by name and shape."""

    def __init__(self):
        self.flat: dict[str, Tensor] = {}
        self.views: dict[tuple[str, tuple[int, ...]], Tensor] = {}


_MEMORY = _Memory()


def _scratch(name: str, like: Tensor, dtype: torch.dtype | None = None, shape: Sequence[int] | None = None) -> Tensor:
    """Uninitialised memory for intermediate values, like torch.empty_like; not for results.

    On the CPU each thread keeps it under the name, for one dtype, and the next call with that name gets it again: the
    system clears the pages of new memory one by one, which takes as long as the arithmetic.
    """
    shape, dtype = tuple(shape or like.shape), dtype or like.dtype
    if not like.is_cpu:
        return torch.empty(shape, dtype=dtype, device=like.device)
    view = _MEMORY.views.get((name, shape))
    return _new_scratch(name, shape, dtype) if view is None else view


def _new_scratch(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """For the first use of a shape. The view is kept, since making one takes as long as a small operation."""
    flat, views, size = _MEMORY.flat, _MEMORY.views, math.prod(shape)
    if size * dtype.itemsize > LARGEST_SCRATCH:
        return torch.empty(shape, dtype=dtype)
    with torch.inference_mode(False):  # what is made in that mode could not be written to outside of it
        if len(views) == MOST_VIEWS or len(flat.get(name, ())) < size:
            views.clear()  # they would keep what is too small now
        if name not in flat or len(flat[name]) < size:
            flat[name] = torch.empty(size + size // 4, dtype=dtype)  # groups vary in size
        return views.setdefault((name, shape), flat[name][:size].view(shape))


def _selected(name: str, images_BCHW: Tensor, numbers: Tensor) -> Tensor:
    """The images of these numbers, in scratch memory."""
    out = _scratch(name, images_BCHW, shape=(len(numbers), *images_BCHW.shape[1:]))
    return torch.index_select(images_BCHW, 0, numbers, out=out)


def _wide(images_BCHW: Tensor, name: str = "wide") -> Tensor:
    """As float32, in scratch memory."""
    return _scratch(name, images_BCHW, torch.float32).copy_(images_BCHW)


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a small CPU tensor to the device through pinned memory, without waiting for it."""
    if device.type == "cpu" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def _per_image(values_B: Tensor, like_BCHW: Tensor, dtype: torch.dtype) -> Tensor:
    """One value per image, on the images' device, shaped to broadcast against (B, C, H, W)."""
    return upload(values_B.to(dtype), like_BCHW.device).view(-1, 1, 1, 1)


# Geometry. Pillow maps output pixels to input pixels and takes the nearest; outside is black.


def shear_x(images_BCHW: Tensor, slope_B: Tensor) -> Tensor:
    """`Image.transform(size, AFFINE, (1, slope, 0, 0, 1, 0))`: about the top left corner."""
    height, width = images_BCHW.shape[-2:]
    x0_B1, _, x_per_y_B1, *_ = _fixed_point(_shear_x_matrix, slope_B, width, height)[..., None]
    row_1H = torch.arange(height)[None]
    return gather_rows(images_BCHW, torch.arange(len(slope_B)), row_1H, (x0_B1 + row_1H * x_per_y_B1) >> 16)


def shear_y(images_BCHW: Tensor, slope_B: Tensor) -> Tensor:
    """`Image.transform(size, AFFINE, (1, 0, 0, slope, 1, 0))`: about the top left corner."""
    return _affine(images_BCHW, _shear_y_matrix, slope_B)


def translate_x(images_BCHW: Tensor, fraction_B: Tensor) -> Tensor:
    """`Image.transform(size, AFFINE, (1, 0, fraction * width, 0, 1, 0))`: positive moves the content left."""
    height, width = images_BCHW.shape[-2:]
    x_BW = _translated(fraction_B * width, width)
    shift_B1 = x_BW[:, :1]
    if torch.equal(x_BW - shift_B1, torch.arange(width).expand_as(x_BW)):
        return gather_rows(images_BCHW, torch.arange(len(x_BW)), torch.arange(height)[None], shift_B1)
    # Where Pillow's running sum rounds up within a line, a pixel is skipped.
    x_BW = upload(x_BW, images_BCHW.device)
    return _gather_pixels(images_BCHW, x_BW[:, None, :], torch.arange(height, device=x_BW.device)[None, :, None])


def translate_y(images_BCHW: Tensor, fraction_B: Tensor) -> Tensor:
    """`Image.transform(size, AFFINE, (1, 0, 0, 0, 1, fraction * height))`: positive moves the content up."""
    height = images_BCHW.shape[-2]
    y_BH = _translated(fraction_B * height, height)
    return gather_rows(images_BCHW, torch.arange(len(y_BH)), y_BH, torch.zeros(1, 1, dtype=torch.int64))


def rotate(images_BCHW: Tensor, degrees_B: Tensor) -> Tensor:
    """`Image.rotate(degrees)`: counter-clockwise about the centre, same size."""
    return _affine(images_BCHW, _rotation_matrix, degrees_B)


def gather_rows(
    images_NCHW: Tensor, image_B: Tensor, row_BH: Tensor, shift_BH: Tensor, mirrored_B: Tensor | None = None
) -> Tensor:
    """Assemble B images from whole rows: row y of image b is row row_BH[b, y] of image image_B[b].

    It is read from column shift_BH[b, y] on; outside is black. mirrored_B: bool, whether an image is read flipped.
    All but the images are on the CPU, int64; row_BH and shift_BH broadcast to (B, H).

    Much faster than pixel by pixel: with enough black around them, rows are W bytes that are copied at once.
    """
    C, H, W = images_NCHW.shape[1:]
    if not len(image_B) or not W:
        return images_NCHW.new_empty(len(image_B), C, row_BH.shape[1], W)
    if mirrored_B is not None and mirrored_B.any():
        image_B = image_B + len(images_NCHW) * mirrored_B
        images_NCHW = torch.cat((images_NCHW, images_NCHW.flip(3)))
    shift_BH = shift_BH.clamp(-W, W)
    margin = int(shift_BH.abs().max())  # left of each row, and so right of the one before it
    row_step, channel_step = margin + W, (H + 2) * (margin + W)
    padded = _scratch("padded", images_NCHW, shape=(len(images_NCHW) * C * channel_step + margin,)).zero_()
    rows_NCHW = padded[: len(padded) - margin].view(-1, C, H + 2, row_step)[:, :, 1:-1, margin:]
    rows_NCHW.copy_(images_NCHW)
    start_BH = image_B[:, None] * (C * channel_step) + (row_BH.clamp(-1, H) + 1) * row_step + (shift_BH + margin)
    channel_C1 = torch.arange(0, C * channel_step, channel_step, device=images_NCHW.device)[:, None]
    start_BCH = upload(start_BH, images_NCHW.device)[:, None] + channel_C1
    windows = padded.as_strided((len(padded) - W + 1, W), (1, 1))
    return windows.index_select(0, start_BCH.view(-1)).view(*start_BCH.shape, W)


def _interpolated(images_BCHW: Tensor, matrix_6B: Tensor) -> Tensor:
    """`Image.transform(size, AFFINE, matrix, BILINEAR)`, in float64 and in Pillow's order.

    matrix_6B: output to input, float64, on the images' device. Neighbours beyond the border are those on it.
    """
    height, width = images_BCHW.shape[-2:]
    a, b, c, d, e, f = matrix_6B[:, :, None, None]
    column_W = torch.arange(width, dtype=torch.float64, device=images_BCHW.device) + 0.5
    row_H1 = torch.arange(height, dtype=torch.float64, device=images_BCHW.device)[:, None] + 0.5
    x_BHW, y_BHW = a * column_W + b * row_H1 + c, d * column_W + e * row_H1 + f
    inside_BHW = (x_BHW >= 0) & (x_BHW < width) & (y_BHW >= 0) & (y_BHW < height)
    left_BHW, top_BHW = (x_BHW - 0.5).floor(), (y_BHW - 0.5).floor()
    over_BHW, down_BHW = x_BHW - 0.5 - left_BHW, y_BHW - 0.5 - top_BHW

    def neighbour(x_BHW: Tensor, y_BHW: Tensor) -> Tensor:
        index_BHW = (y_BHW.clamp(0, height - 1) * width + x_BHW.clamp(0, width - 1)).long()
        index_BCP = index_BHW.flatten(1)[:, None].expand(-1, images_BCHW.shape[1], -1)
        return images_BCHW.flatten(2).gather(2, index_BCP).view_as(images_BCHW).double()

    def between(first: Tensor, second: Tensor, weight_BHW: Tensor) -> Tensor:
        return first + (second - first) * weight_BHW[:, None]

    upper = between(neighbour(left_BHW, top_BHW), neighbour(left_BHW + 1, top_BHW), over_BHW)
    lower = between(neighbour(left_BHW, top_BHW + 1), neighbour(left_BHW + 1, top_BHW + 1), over_BHW)
    return between(upper, lower, down_BHW).to(torch.uint8) * inside_BHW[:, None]


def _matrices(matrix_of: Callable[..., tuple[float, ...]], magnitude_B: Tensor, height: int, width: int) -> Tensor:
    """float64 (6, B)."""
    rows = [matrix_of(magnitude, width, height) for magnitude in magnitude_B.tolist()]
    return torch.tensor(rows, dtype=torch.float64).view(-1, 6).T


def _shear_x_matrix(slope: float, width: int, height: int) -> tuple[float, ...]:
    return 1.0, slope, 0.0, 0.0, 1.0, 0.0


def _shear_y_matrix(slope: float, width: int, height: int) -> tuple[float, ...]:
    return 1.0, 0.0, 0.0, slope, 1.0, 0.0


def _rotation_matrix(degrees: float, width: int, height: int) -> tuple[float, ...]:
    """The output-to-input matrix of `Image.rotate`, with Python's cos: torch's may differ in the last bit."""
    radians = -math.radians(degrees % 360.0)
    cos, sin = round(math.cos(radians), 15), round(math.sin(radians), 15)
    x, y = width / 2, height / 2
    return cos, sin, cos * -x + sin * -y + x, -sin, cos, -sin * -x + cos * -y + y


def _fixed_point(matrix_of: Callable[..., tuple[float, ...]], magnitude_B: Tensor, width: int, height: int) -> Tensor:
    """(x, y) -> (a x + b y + c, d x + e y + f) in Pillow's 16.16 fixed point, int64 (6, B).

    The x to fetch for the output pixel at column 0 and row 0, its steps per column and per row; then the same of y.
    """
    magnitude_U, which_B = magnitude_B.unique(return_inverse=True)
    fixed_U6 = []
    for magnitude in magnitude_U.tolist():
        a, b, c, d, e, f = matrix_of(magnitude, width, height)
        starts_and_steps = (c + a * 0.5 + b * 0.5, a, b, f + d * 0.5 + e * 0.5, d, e)
        fixed_U6.append([math.floor(value * 65536.0 + 0.5) for value in starts_and_steps])
    return torch.tensor(fixed_U6, dtype=torch.int64).view(-1, 6)[which_B].T


def _affine(images_BCHW: Tensor, matrix_of: Callable[..., tuple[float, ...]], magnitude_B: Tensor) -> Tensor:
    """Nearest neighbour through the matrices of the magnitudes."""
    height, width = images_BCHW.shape[-2:]
    fixed_6B = _fixed_point(matrix_of, magnitude_B, width, height)
    fixed_B6 = list(map(tuple, fixed_6B.T.tolist()))
    tabled = 0 < len(set(fixed_B6)) <= TABLED_MAGNITUDES and height * width <= TABLED_PIXELS
    if images_BCHW.device.type != "cpu" or not tabled:
        return _through(images_BCHW, upload(fixed_6B, images_BCHW.device))
    sources = [_sources(*fixed, height, width) for fixed in fixed_B6]
    index, inside = zip(*sources, strict=True)
    index_BP = torch.stack(index, out=_scratch("index", index[0], shape=(len(index), height * width)))
    inside_BP = torch.stack(inside)
    return _gather_flat(images_BCHW, index_BP, inside_BP).view_as(images_BCHW)


@functools.lru_cache(maxsize=TABLES)
def _sources(*fixed_height_width: int) -> tuple[Tensor, Tensor]:
    """Index and inside of `_flat_index` for every pixel, cached because there are few levels."""
    *fixed, height, width = fixed_height_width
    x_1HW, y_1HW = _coordinates(torch.tensor(fixed)[:, None], height, width)
    index_1HW, inside_1HW = _flat_index(x_1HW, y_1HW, height, width)
    return index_1HW.flatten(), inside_1HW.flatten()


def _through(images_BCHW: Tensor, fixed_6B: Tensor) -> Tensor:
    return _gather_pixels(images_BCHW, *_coordinates(fixed_6B, *images_BCHW.shape[-2:]))


def _coordinates(fixed_6B: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """x and y, (B, H, W) each, of the pixel to fetch for each pixel, on the device of fixed_6B."""
    x0, x_per_x, x_per_y, y0, y_per_x, y_per_y = fixed_6B[:, :, None, None]
    column = torch.arange(width, device=fixed_6B.device)
    row = torch.arange(height, device=fixed_6B.device)[:, None]
    return (x0 + row * x_per_y + column * x_per_x) >> 16, (y0 + row * y_per_y + column * y_per_x) >> 16


def _gather_pixels(images_BCHW: Tensor, x_BHW: Tensor, y_BHW: Tensor) -> Tensor:
    """Fetch for every output pixel the input pixel at (x, y), black where that is outside.

    x_BHW, y_BHW: int64 indices, each broadcastable to (B, H, W) of the output.
    """
    index_BHW, inside_BHW = _flat_index(x_BHW, y_BHW, *images_BCHW.shape[-2:])
    return _gather_flat(images_BCHW, index_BHW.flatten(1), inside_BHW.flatten(1)).unflatten(2, index_BHW.shape[1:])


def _flat_index(x: Tensor, y: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Index of the pixel at (x, y) in a flattened image, and whether it is inside; 0 where it is not."""
    inside = ((x >= 0) & (x < width)) & ((y >= 0) & (y < height))
    return torch.where(inside, y * width + x, 0), inside


def _gather_flat(images_BCHW: Tensor, index_BP: Tensor, inside_BP: Tensor) -> Tensor:
    index_BCP = index_BP[:, None].expand(-1, images_BCHW.shape[1], -1)
    return images_BCHW.flatten(2).gather(2, index_BCP).mul_(inside_BP.view(torch.uint8)[:, None])


def _translated(offset_B: Tensor, size: int) -> Tensor:
    """Source index of each of `size` pixels in a line moved by offset_B pixels (fractions allowed)."""
    steps_BS = torch.ones(len(offset_B), size, dtype=torch.float64)
    steps_BS[:, 0] = offset_B + 0.5
    return steps_BS.cumsum(1).floor().long()  # summed pixel by pixel, as Pillow does, so that rounding is the same


# Tone: a function of each pixel, possibly through a table made from its image's histogram.


def autocontrast(images_BCHW: Tensor, _: Tensor) -> Tensor:
    """`ImageOps.autocontrast(image)`: stretch each channel to 0..255, in float64 and in Pillow's order."""
    return _look_up(_as_index(images_BCHW), _autocontrast_table(images_BCHW)).view_as(images_BCHW)


def invert(images_BCHW: Tensor, _: Tensor) -> Tensor:
    """`ImageOps.invert(image)`."""
    return 255 - images_BCHW


def equalize(images_BCHW: Tensor, _: Tensor) -> Tensor:
    """`ImageOps.equalize(image)`: flatten each channel's histogram."""
    pixels_BCP = _as_index(images_BCHW)
    return _look_up(pixels_BCP, _equalize_table(images_BCHW, pixels_BCP)).view_as(images_BCHW)


def solarize(images_BCHW: Tensor, threshold_B: Tensor) -> Tensor:
    """`ImageOps.solarize(image, threshold)`: invert what is not below the threshold."""
    threshold_B = threshold_B.ceil().clamp(0, 256)
    threshold = _per_image(threshold_B.clamp(max=255), images_BCHW, torch.uint8)
    some = _per_image((threshold_B < 256) * 255, images_BCHW, torch.uint8)
    # torch compares with one value per image twenty times more slowly than it takes a maximum
    not_below = torch.maximum(images_BCHW, threshold) == images_BCHW
    return not_below.view(torch.uint8).neg_().bitwise_and_(some).bitwise_xor_(images_BCHW)


def posterize(images_BCHW: Tensor, bits_B: Tensor) -> Tensor:
    """`ImageOps.posterize(image, int(bits))`: keep the upper 0..8 bits."""
    return images_BCHW & _per_image(_kept_bits(bits_B), images_BCHW, torch.uint8)


def _kept_bits(bits_B: Tensor) -> Tensor:
    return (255 << (8 - bits_B.long())) & 255


def _autocontrast_table(images_BCHW: Tensor) -> Tensor:
    """float64 (B, C, 256), to be truncated to integers."""
    pixels_BCP = images_BCHW.flatten(2)
    low_BC1, high_BC1 = pixels_BCP.amin(2, keepdim=True).double(), pixels_BCP.amax(2, keepdim=True).double()
    span_BC1 = high_BC1 - low_BC1
    scale_BC1 = torch.full_like(span_BC1, 255.0) / span_BC1  # 255.0 / span would multiply by a rounded reciprocal
    value_256 = torch.arange(256, dtype=torch.float64, device=images_BCHW.device)
    table_BC256 = (value_256 * scale_BC1 + -low_BC1 * scale_BC1).clamp_(0, 255)
    return torch.where(span_BC1 > 0, table_BC256, value_256)


def _equalize_table(images_BCHW: Tensor, pixels_BCP: Tensor) -> Tensor:
    """float64 (B, C, 256), to be truncated to integers. pixels_BCP: int64."""
    ones_BCP = _scratch("ones", pixels_BCP, torch.int32).fill_(1)
    histogram_BC256 = ones_BCP.new_zeros(*pixels_BCP.shape[:2], 256).scatter_add_(2, pixels_BCP, ones_BCP)
    brightest_BC1 = images_BCHW.flatten(2).amax(2, keepdim=True).long()
    step_BC1 = (pixels_BCP.shape[2] - histogram_BC256.gather(2, brightest_BC1)) // 255
    below_BC256 = histogram_BC256.cumsum(2, dtype=torch.int32) - histogram_BC256
    table_BC256 = (below_BC256 + step_BC1 // 2).double().div_(step_BC1).clamp_(0, 255)
    value_256 = torch.arange(256, dtype=torch.float64, device=pixels_BCP.device)
    return torch.where(step_BC1 > 0, table_BC256, value_256)


def _as_index(images_BCHW: Tensor) -> Tensor:
    """The values as int64 (B, C, P), in scratch memory."""
    return _scratch("index", images_BCHW, torch.int64).copy_(images_BCHW).flatten(2)


def _look_up(pixels_BCP: Tensor, table_BC256: Tensor) -> Tensor:
    """`Image.point`: replace each value by its entry, truncated to an integer. pixels_BCP: int64."""
    return table_BC256.to(torch.uint8).gather(2, pixels_BCP)


# Blends of an image with something else, in float32. Sums of whole numbers below 2 ** 24 are exact there.


def contrast(images_BCHW: Tensor, factor_B: Tensor) -> Tensor:
    """`ImageEnhance.Contrast(image).enhance(factor)`: away from, or towards, the mean grey."""
    wide_BCHW = _wide(images_BCHW)
    return _blend(_mean(_grey(wide_BCHW)), wide_BCHW, factor_B)


def color(images_BCHW: Tensor, factor_B: Tensor) -> Tensor:
    """`ImageEnhance.Color(image).enhance(factor)`: away from, or towards, grey."""
    wide_BCHW = _wide(images_BCHW)
    return _blend(_grey(wide_BCHW), wide_BCHW, factor_B)


def brightness(images_BCHW: Tensor, factor_B: Tensor) -> Tensor:
    """`ImageEnhance.Brightness(image).enhance(factor)`: away from, or towards, black."""
    return _cut(_wide(images_BCHW).mul_(_per_image(factor_B, images_BCHW, torch.float32)))


def sharpness(images_BCHW: Tensor, factor_B: Tensor) -> Tensor:
    """`ImageEnhance.Sharpness(image).enhance(factor)`: away from, or towards, `ImageFilter.SMOOTH`."""
    wide_BCHW = _wide(images_BCHW)
    return _blend(_smooth(images_BCHW, wide_BCHW), wide_BCHW, factor_B)


def cutout(images_BCHW: Tensor, fraction_B: Tensor, centre_B2: Tensor) -> Tensor:
    """A rectangle of side fraction * width around the centre, as `ImageDraw.rectangle` fills it.

    Its corners are truncated to integers and both belong to it; outside the image there is nothing to fill. A fraction
    of 0 changes nothing.
    """
    box_4B = _box(fraction_B, centre_B2, *images_BCHW.shape[-2:])
    return _fill(images_BCHW, upload(box_4B, images_BCHW.device))


def sample_pairing(images_BCHW: Tensor, weight_B: Tensor, partner_BCHW: Tensor) -> Tensor:
    """`Image.blend(image, partner, weight)`: the weight is the partner's."""
    return _blend(_wide(images_BCHW), _wide(partner_BCHW, "wide partner"), weight_B)


def _blend(first: Tensor, second: Tensor, weight_B: Tensor) -> Tensor:
    """`Image.blend`, also beyond 0..1: first + weight * (second - first), truncated. Overwrites `second`.

    The product and the sum are rounded separately; they must stay two operations (no lerp, no addcmul).
    """
    return _cut(second.sub_(first).mul_(_per_image(weight_B, second, torch.float32)).add_(first))


def _cut(values: Tensor) -> Tensor:
    """float32, which is overwritten, to uint8; through int16, which is twice as fast on the CPU."""
    return _scratch("cut", values, torch.int16).copy_(values.clamp_(0, 255)).to(torch.uint8)


def _grey(wide_BCHW: Tensor) -> Tensor:
    """`Image.convert("L")` of a float32 image: whole numbers, (B, 1, H, W)."""
    red, green, blue = wide_BCHW.split(1, dim=1)
    weighted = (
        torch.mul(red, 19595, out=_scratch("grey", red)).add_(green, alpha=38470).add_(blue, alpha=7471).add_(32768)
    )
    return weighted.mul_(2.0**-16).floor_()


def _mean(grey_B1HW: Tensor) -> Tensor:
    """Mean of each image of whole numbers, half rounded up."""
    pixels = math.prod(grey_B1HW.shape[2:])
    sum_B111 = grey_B1HW.sum(3, keepdim=True).long().sum(2, keepdim=True)
    return ((2 * sum_B111 + pixels) // (2 * pixels)).float()


def _smooth(images_BCHW: Tensor, wide_BCHW: Tensor) -> Tensor:
    """`Image.filter(ImageFilter.SMOOTH)`: weights 1 around 5, over 13, rounded; the border is unchanged.

    images_BCHW, wide_BCHW: the same as uint8 and as float32. The sums run over the whole batch as one line; those that
    cross an edge of an image belong to its border, which is restored.
    """
    height, width = images_BCHW.shape[-2:]
    smooth_BCHW = _scratch("smooth", wide_BCHW).copy_(wide_BCHW)
    if height > 2 and width > 2 and len(images_BCHW):
        line = _scratch("line", images_BCHW, torch.int16).copy_(images_BCHW).view(-1)
        columns = _scratch("columns", line, shape=(len(line) - 2 * width,))
        torch.add(line[: -2 * width], line[width:-width], out=columns).add_(line[2 * width :])
        weighted = _scratch("weighted", line, shape=(len(columns) - 2,))
        torch.add(columns[:-2], columns[1:-1], out=weighted).add_(columns[2:])
        weighted.add_(line[width + 1 : -width - 1], alpha=4)
        # No sum of 13 bytes over 13 is within 1/26 of a half: the rounding of 1/13 cannot matter.
        smooth_BCHW.view(-1)[width + 1 : -width - 1].copy_(weighted).mul_(1 / 13).add_(0.5).floor_()
        for border in ((..., 0, slice(None)), (..., -1, slice(None)), (..., 0), (..., -1)):
            smooth_BCHW[border] = wide_BCHW[border]
    return smooth_BCHW


def _box(fraction_B: Tensor, centre_B2: Tensor, height: int, width: int) -> Tensor:
    """Cutout's left, top, right and bottom, int64 (4, B), all inclusive; right and bottom are -1 for no box."""
    side_B = fraction_B * width
    size_2 = torch.tensor([width, height], dtype=torch.float64)
    corner_B2 = (centre_B2.double().cpu() * size_2 - side_B[:, None] / 2).clamp(min=0).floor()
    far_B2 = torch.minimum(size_2, corner_B2 + side_B[:, None]).floor()
    far_B2[side_B <= 0] = -1
    return torch.cat((corner_B2.T, far_B2.T)).long()


def _fill(images_BCHW: Tensor, box_4B: Tensor) -> Tensor:
    height, width = images_BCHW.shape[-2:]
    left, top, right, bottom = box_4B[:, :, None, None, None]
    column = torch.arange(width, device=images_BCHW.device)
    row = torch.arange(height, device=images_BCHW.device)[:, None]
    across_B11W = ((column >= left) & (column <= right)).view(torch.uint8).neg_()  # 255 inside
    down_B1H1 = ((row >= top) & (row <= bottom)).view(torch.uint8).neg_()
    fill_C11 = torch.stack([images_BCHW.new_full((1, 1), value) for value in GREY])
    # image where outside, fill where inside; torch.where takes twice as long
    difference_BCHW = (images_BCHW ^ fill_C11).bitwise_and_(across_B11W).bitwise_and_(down_B1H1)
    return difference_BCHW.bitwise_xor_(images_BCHW)


# The same in families, for devices on which a launch costs more than the arithmetic: every image passes through each
# family once per position, with settings that change nothing unless its operation belongs to that family.


class _Settings(NamedTuple):
    """Parameters of each family for each of B images at one position, float64."""

    affine_6B: Tensor  # as `_fixed_point` gives it
    box_4B: Tensor  # as `_box` gives it
    op_1B: Tensor  # row of OPS, -1 for a kernel in no family
    threshold_1B: Tensor  # values from here on are inverted; 256: none
    kept_1B: Tensor  # bits
    weight_1B: Tensor
    partner_1B: Tensor
    matrix_6B: Tensor  # as `_matrices` gives it; (0, B) unless the plan is bilinear


def _in_families(images_BCHW: Tensor, plan: Plan, partners_BCHW: Tensor) -> Tensor:
    """`apply` on CUDA: one upload, then a few kernels of fixed shapes. A family that no image needs is skipped.

    A kernel in no family runs by itself, on its images.
    """
    settings_KSB, present = family_settings(plan, *images_BCHW.shape[-2:])
    settings_KSB, out_BCHW = upload(settings_KSB, images_BCHW.device), images_BCHW.clone()
    for k, (settings_SB, kernels) in enumerate(zip(settings_KSB, present, strict=True)):
        out_BCHW = through_families(out_BCHW, settings_SB, kernels, partners_BCHW, bilinear=plan.bilinear)
        for row, numbers in _members(plan.op_BK[:, k]):
            if OPS[row].kernel not in _FAMILIES:
                index = upload(numbers, images_BCHW.device)
                group_BCHW = out_BCHW.index_select(0, index)
                out_BCHW.index_copy_(0, index, _run(OPS[row], group_BCHW, partners_BCHW, plan, numbers, k))
    return out_BCHW


def _members(op_B: Tensor) -> list[tuple[int, Tensor]]:
    """The rows of `OPS` at a position, each with the numbers of its images."""
    return [(row, (op_B == row).nonzero()[:, 0]) for row in op_B.unique().tolist() if row >= 0]


def family_settings(plan: Plan, height: int, width: int) -> tuple[Tensor, list[set[Callable[..., Tensor]]]]:
    """The parameters for `through_families` at each position of a plan, float64 on the CPU, and its kernels."""
    positions = range(plan.op_BK.shape[1])
    settings = [torch.cat(_settings(plan, k, height, width)) for k in positions]  # rows as in _Settings
    present = [{OPS[row].kernel for row, _ in _members(plan.op_BK[:, k])} for k in positions]
    return torch.stack(settings) if settings else torch.empty(0), present


def through_families(
    images_BCHW: Tensor,
    settings_SB: Tensor,
    kernels: set[Callable[..., Tensor]],
    partners_BCHW: Tensor,
    *,
    bilinear: bool = False,
) -> Tensor:
    """One position of a plan on the device: fixed shapes, no wait; a CUDA graph can hold it for equal `kernels`.

    Kernels in no family are skipped.
    """
    settings = _Settings(*settings_SB.split((6, 4, 1, 1, 1, 1, 1, len(settings_SB) - 15)))
    if kernels & (_GEOMETRY - _MATRICES.keys() if bilinear else _GEOMETRY):
        images_BCHW = _through(images_BCHW, settings.affine_6B.long())
    if bilinear and kernels & _MATRICES.keys():
        images_BCHW = _interpolated(images_BCHW, settings.matrix_6B)
    if kernels & _TONES:
        images_BCHW = _toned(images_BCHW, settings, kernels)
    if kernels & _BLENDS:
        images_BCHW = _blended(images_BCHW, settings, kernels, partners_BCHW)
    if cutout in kernels:
        images_BCHW = _fill(images_BCHW, settings.box_4B.long())
    return images_BCHW


def _settings(plan: Plan, k: int, height: int, width: int) -> _Settings:
    op_B, magnitude_B = plan.op_BK[:, k], plan.magnitude_BK[:, k]
    one_1B = torch.ones_like(magnitude_B)[None]
    settings = _Settings(
        affine_6B=torch.tensor([32768.0, 65536.0, 0.0, 32768.0, 0.0, 65536.0])[:, None] * one_1B,
        box_4B=-one_1B.repeat(4, 1),
        op_1B=-one_1B,
        threshold_1B=256 * one_1B,
        kept_1B=255 * one_1B,
        weight_1B=0 * one_1B,
        partner_1B=0 * one_1B,
        matrix_6B=torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 0.0] if plan.bilinear else [])[:, None] * one_1B,
    )
    for row, numbers in _members(op_B):
        kernel, magnitudes = OPS[row].kernel, magnitude_B[numbers]
        settings.op_1B[:, numbers] = _ROW.get(kernel, -1)
        if kernel in _MATRICES and plan.bilinear:
            settings.matrix_6B[:, numbers] = _matrices(_MATRICES[kernel], magnitudes, height, width)
        elif kernel is translate_x:
            settings.affine_6B[:2, numbers] = _start_and_step(_translated(magnitudes * width, width)).double()
        elif kernel is translate_y:
            settings.affine_6B[3::2, numbers] = _start_and_step(_translated(magnitudes * height, height)).double()
        elif kernel in _MATRICES:
            settings.affine_6B[:, numbers] = _fixed_point(_MATRICES[kernel], magnitudes, width, height).double()
        elif kernel is invert:
            settings.threshold_1B[:, numbers] = 0.0
        elif kernel is solarize:
            settings.threshold_1B[:, numbers] = magnitudes
        elif kernel is posterize:
            settings.kept_1B[:, numbers] = _kept_bits(magnitudes).double()
        elif kernel in _BLENDS:
            settings.weight_1B[:, numbers] = magnitudes
            if kernel is sample_pairing:
                settings.partner_1B[:, numbers] = plan.partner_BK[numbers, k].double()
        elif kernel is cutout:
            settings.box_4B[:, numbers] = _box(magnitudes, plan.centre_BK2[numbers, k], height, width).double()
    return settings


def _start_and_step(source_BS: Tensor) -> Tensor:
    """The source indices that `_translated` gives, in 16.16 fixed point: int64 (2, B).

    They rise by one or, where Pillow's sum rounds up, once by two: each step adds 1/65536, which carries there.
    """
    size = source_BS.shape[1]
    before_B = (source_BS - source_BS[:, :1] == torch.arange(size)).sum(1)
    first_B = source_BS[:, 0].clamp(-(2**31), 2**31)
    return torch.stack((first_B * 65536 + 65536 - before_B, torch.full_like(before_B, 65537)))


def _toned(images_BCHW: Tensor, settings: _Settings, kernels: set[Callable[..., Tensor]]) -> Tensor:
    """Every operation of tone as a table."""
    pixels_BCP, op_B11 = _as_index(images_BCHW), settings.op_1B.view(-1, 1, 1)
    value_256 = torch.arange(256, device=images_BCHW.device)
    table_BC256 = torch.where(value_256 < settings.threshold_1B.view(-1, 1, 1), value_256, 255 - value_256)
    table_BC256 = (table_BC256 & settings.kept_1B.long().view(-1, 1, 1)).expand(-1, images_BCHW.shape[1], -1)
    if autocontrast in kernels:
        table_BC256 = torch.where(op_B11 == _ROW[autocontrast], _autocontrast_table(images_BCHW), table_BC256)
    if equalize in kernels:
        table_BC256 = torch.where(op_B11 == _ROW[equalize], _equalize_table(images_BCHW, pixels_BCP), table_BC256)
    return _look_up(pixels_BCP, table_BC256).view_as(images_BCHW)


def _blended(
    images_BCHW: Tensor, settings: _Settings, kernels: set[Callable[..., Tensor]], partners_BCHW: Tensor
) -> Tensor:
    """All blends in one: first and second image of each blend are chosen by the image's operation."""
    op_B111 = settings.op_1B.view(-1, 1, 1, 1)
    first = second = wide_BCHW = images_BCHW.float()
    if kernels & {contrast, color}:
        grey_B1HW = _grey(wide_BCHW)
        first = torch.where(op_B111 == _ROW[color], grey_B1HW, first)
        first = torch.where(op_B111 == _ROW[contrast], _mean(grey_B1HW), first)
    if brightness in kernels:
        first = torch.where(op_B111 == _ROW[brightness], 0.0, first)
    if sharpness in kernels:
        first = torch.where(op_B111 == _ROW[sharpness], _smooth(images_BCHW, wide_BCHW), first)
    if sample_pairing in kernels:
        partner_BCHW = partners_BCHW.index_select(0, settings.partner_1B[0].long())
        second = torch.where(op_B111 == _ROW[sample_pairing], partner_BCHW, second)
    return _blend(first, second, settings.weight_1B[0])


_MATRICES = {shear_x: _shear_x_matrix, shear_y: _shear_y_matrix, rotate: _rotation_matrix}
_GEOMETRY = {*_MATRICES, translate_x, translate_y}
_TONES = {autocontrast, invert, equalize, solarize, posterize}
_BLENDS = {contrast, color, brightness, sharpness, sample_pairing}
_FAMILIES = _GEOMETRY | _TONES | _BLENDS | {cutout}


class Op(NamedTuple):
    """One operation: kernel(images_BCHW, magnitude_B[, what it `needs`]) -> images_BCHW, pure.

    low, high: magnitude at the first and the last level, in `unit`; None for operations without a magnitude.
    signed: a fair coin per image negates the magnitude.
    neutral: the magnitude that changes nothing, None if there is none.
    needs: "partner" (images_BCHW) or "centre" (fractions, (B, 2)) for kernels with a third argument.
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


# The order is the controller's index and part of every checkpoint and log: new operations go at the end.
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

_ROW = {op.kernel: row for row, op in enumerate(OPS) if op.kernel in _FAMILIES}


# For other training loops.


def read_operation(entry: Any, levels: int) -> tuple[int, float, float]:
    """(row of `OPS`, level, probability) of [operation, level] or [operation, level, probability].

    A level is a number from 0 to levels - 1, not necessarily whole; a probability is 1 where it is missing. Raises
    ValueError for anything else.
    """
    if not isinstance(entry, (list, tuple)) or len(entry) not in (2, 3):
        raise ValueError(f"{reprlib.repr(entry)} is not [operation, level] or [operation, level, probability]")
    (name, level), probability = entry[:2], entry[2] if len(entry) == 3 else 1
    names = [op.name for op in OPS]
    if name not in names:
        close = difflib.get_close_matches(str(name)[:40], names, n=1)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(names)}"
        raise ValueError(f"{reprlib.repr(name)} is no operation; {hint}")
    for what, value, most in (("level", level, levels - 1), ("probability", probability, 1)):
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value <= most:
            raise ValueError(f"{reprlib.repr(value)} is no {what}: 0 to {most}")
    return names.index(name), level, probability


class Augment(nn.Module):
    """Applies random operations to each image: its own operations, strengths and signs, for the whole batch at once.

        augment = Augment()                                                # two of the sixteen operations
        augment = Augment([[("Rotate", 3), ("Invert", 0, 0.5)], [("Solarize", 2)]])
        augment = Augment.from_file("logs/demo_0/policies.jsonl")          # what a run has learned
        images = augment(images)                                           # uint8 (B, 3, H, W), on any device

    Each image draws one sub-policy, a list of operations that are applied in order: of `policies`, a list of
    sub-policies or of lists of them; without it, `num_ops` uniformly random operations of `ops` (all of `OPS`) at
    uniformly random levels of 0 to `levels` - 1. An operation is (name, level) or (name, level, probability of being
    applied). Signed operations are negated with probability one half. SamplePairing blends in another image of the same
    batch; a single image would be its own partner, which changes nothing.

    Call it on images (B, 3, H, W) or on one image (3, H, W), uint8, in a loop or inside torchvision.transforms.v2's
    Compose, before or after batches are collated; after is many times faster. Further arguments, such as labels, are
    returned as they are. Nothing waits for a GPU.

    float_images: None refuses images that are not uint8; "round" also takes floats in 0..1, which are rounded to whole
        bytes and returned as floats. On the CPU values outside 0..1 are refused, on other devices, where looking at
        them would wait, they are clamped.
    generator: of the random draws, on the CPU; None: torch's default. The worker processes of a DataLoader always use
        their own default generator, which torch seeds differently in each.

    PIL images are refused, because Pillow is not needed here; `v2.PILToTensor()` converts them. Raises ValueError.
    """

    @_on_cpu
    def __init__(
        self,
        policies: Sequence[Any] | None = None,
        *,
        ops: Sequence[str] | None = None,
        levels: int = 10,
        num_ops: int = 2,
        float_images: str | None = None,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        if float_images not in (None, "round"):
            raise ValueError(f"float_images is None or 'round', not {float_images!r}")
        if generator is not None and generator.device.type != "cpu":
            raise ValueError(f"generator is on {generator.device}; draws are made on the CPU: torch.Generator()")
        for name, number, least in (("levels", levels, 2), ("num_ops", num_ops, 1)):
            if type(number) is not int or not least <= number <= 1000:
                raise ValueError(f"{name} is a whole number of {least} to 1000, not {reprlib.repr(number)}")
        if policies is not None and ops is not None:
            raise ValueError("ops is for random sub-policies; with policies, leave it out")
        self.levels, self.num_ops, self.float_images, self.generator = levels, num_ops, float_images, generator
        self._signed_O = torch.tensor([op.signed for op in OPS])
        self._subpolicies = None if policies is None else _subpolicies(policies, levels)
        rows = [row_of(name) for name in ([op.name for op in OPS] if ops is None else ops)]
        if not rows:
            raise ValueError("ops must name at least one operation")
        table = [[OPS[row].magnitude(level, levels) for level in range(levels)] for row in rows]
        self._rows, self._magnitude_OL = torch.tensor(rows), torch.tensor(table, dtype=torch.float64)

    @classmethod
    def from_file(cls, file: str | Path, **options: Any) -> Self:
        """With the sub-policies of a file: JSON, or a run's policies.jsonl, of which the last line is used.

        The file holds a list as `policies`, or a mapping with it under "policies" and the number of "levels" (10).
        options: float_images and generator. Raises ValueError for another content, OSError where it cannot be read.
        """
        text = Path(file).read_text(encoding="utf-8").strip()
        try:
            content = json.loads(text.splitlines()[-1] if text and Path(file).suffix == ".jsonl" else text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file}: is not JSON ({error})") from None
        content = content if isinstance(content, dict) else {"policies": content}
        try:
            return cls(content.get("policies", ()), levels=content.get("levels", 10), **options)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None

    @_on_cpu
    def forward(self, images: Tensor, *others: Any) -> Any:
        """The augmented images, like `images`; with `others`, a tuple of them and the others."""
        if not isinstance(images, Tensor):
            is_pillow = type(images).__module__.startswith("PIL.")
            remedy = "put torchvision.transforms.v2.PILToTensor() before it" if is_pillow else "call it on the images"
            raise ValueError(f"Augment takes tensors, not {type(images).__name__}; {remedy}")
        for other in others:
            if isinstance(other, Tensor) and type(other) is not Tensor:
                raise ValueError(
                    f"Augment moves images only, not {type(other).__name__}, which would no longer fit them"
                )
        result = self._augmented(images.as_subclass(Tensor))
        if type(images) is not Tensor:
            result = result.as_subclass(type(images))
        return (result, *others) if others else result

    @_on_cpu
    def plan(self, B: int, size: tuple[int, int]) -> Plan:
        """Draws the operations on B images of (H, W)."""
        draws = self._generator()
        if self._subpolicies is None:
            choice_BK = torch.randint(len(self._rows), (B, self.num_ops), generator=draws)
            op_BK = self._rows[choice_BK]
            magnitude_BK = self._magnitude_OL[choice_BK, torch.randint(self.levels, op_BK.shape, generator=draws)]
        else:
            number_B = torch.randint(len(self._subpolicies.op_SK), (B,), generator=draws)
            op_BK, magnitude_BK, probability_BK = (field[number_B] for field in self._subpolicies)
            op_BK = op_BK.masked_fill(torch.rand(op_BK.shape, generator=draws) >= probability_BK, -1)
        negative_BK = torch.randint(2, op_BK.shape, generator=draws).bool() & self._signed_O[op_BK]
        partner_BK = (torch.arange(B)[:, None] + torch.randint(1, max(2, B), op_BK.shape, generator=draws)) % max(1, B)
        centre_BK2 = torch.rand(*op_BK.shape, 2, dtype=torch.float64, generator=draws)
        return Plan(op_BK, torch.where(negative_BK, -magnitude_BK, magnitude_BK), partner_BK, centre_BK2)

    def transform(self, images_BCHW: Tensor) -> Tensor:
        """Draws a plan and executes it on a uint8 batch (B, 3, H, W)."""
        return apply(images_BCHW, self.plan(len(images_BCHW), tuple(images_BCHW.shape[-2:])))

    def extra_repr(self) -> str:
        what = f"{len(self._rows)} operations, num_ops={self.num_ops}"
        if self._subpolicies is not None:
            what = "{} sub-policies of up to {} operations".format(*self._subpolicies.op_SK.shape)
        return f"{what}, levels={self.levels}" + (", float_images='round'" if self.float_images else "")

    def _generator(self) -> torch.Generator:
        return self.generator if self.generator is not None and get_worker_info() is None else torch.default_generator

    def _augmented(self, images: Tensor) -> Tensor:
        if images.ndim not in (3, 4) or images.shape[-3] != 3:
            raise ValueError(
                f"Augment takes images (B, 3, H, W) or (3, H, W), not {tuple(images.shape)}; grey images need "
                "their channel three times"
            )
        if images.ndim == 3:
            return self._augmented(images[None])[0]
        if images.dtype == torch.uint8:
            return self.transform(images)
        if not images.is_floating_point() or self.float_images is None:
            raise ValueError(
                f"Augment takes uint8 images, not {images.dtype}; put it before ToDtype, or for floats in 0..1 set "
                "float_images='round'"
            )
        rounded_BCHW = (images.float() * 255).round_()
        if images.device.type == "cpu" and not ((rounded_BCHW >= 0) & (rounded_BCHW <= 255)).all():
            raise ValueError("Augment takes floats in 0..1; divide bytes by 255, and normalise afterwards")
        return (self.transform(rounded_BCHW.clamp_(0, 255).to(torch.uint8)) / 255).to(images.dtype)


class _SubPolicies(NamedTuple):
    """S sub-policies of up to K operations: rows of OPS, -1 for none, unsigned magnitudes, and probabilities."""

    op_SK: Tensor
    magnitude_SK: Tensor
    probability_SK: Tensor


def _subpolicies(policies: Sequence[Any], levels: int) -> _SubPolicies:
    """Raises ValueError, with the number of the sub-policy, for an operation of another form."""
    read = []
    for number, entries in enumerate(_flat(policies), start=1):
        try:
            operations = [read_operation(entry, levels) for entry in entries]
        except ValueError as error:
            raise ValueError(f"sub-policy {number}: {error}") from None
        read.append([(row, OPS[row].magnitude(level, levels), p) for row, level, p in operations])
    if not read:
        raise ValueError("there are no policies")
    K = max(1, *map(len, read))
    padded = torch.tensor([[*one, *[(-1, 0.0, 1.0)] * (K - len(one))] for one in read], dtype=torch.float64)
    op_SK, magnitude_SK, probability_SK = padded.unbind(-1)
    return _SubPolicies(op_SK.long(), magnitude_SK, probability_SK)


def _flat(policies: Sequence[Any]) -> Iterator[Sequence[Any]]:
    """The sub-policies of a list of them, or of a list of policies."""
    for entry in [policies, *policies] if isinstance(policies, (list, tuple)) else [policies]:
        if not isinstance(entry, (list, tuple)):
            raise ValueError(f"{reprlib.repr(entry)} is no list of sub-policies, or of operations [operation, level]")
    for entry in policies:
        is_policy = bool(entry) and all(isinstance(one, (list, tuple)) for one in entry)
        if is_policy and all(isinstance(operation, (list, tuple)) for one in entry for operation in one):
            yield from entry
        else:
            yield entry
