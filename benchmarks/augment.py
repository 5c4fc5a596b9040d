"""Images per second through policies of two operations, compared with Pillow, torchvision and kornia.

    python benchmarks/augment.py                         # 32x32 (N = 128) and 224x224 (N = 32), M = 8, one thread
    python benchmarks/augment.py --threads 2 --sizes 32 --images 128
    python benchmarks/augment.py --device cuda

They take turns in one run: the batched operations of augmentations.py; Pillow, image by image in one process
(parts/perimage.py); torchvision.transforms.v2 on groups of equal operation and magnitude, and kornia if it is
installed (parts/libraries.py). First the batched results are compared with Pillow's: they must be equal.

operations          uint8 copies through a plan
and normalised      the same, to normalised float32 in the channels_last memory format
all, shared crops   from N images: draws, copies, crop and flip (the same for all copies of an image), operations,
                    normalisation, Cutout
all, own crops      the same, with a crop and flip for each copy
transforms          for other training loops (parts/transforms.py): `Augment`, which draws a plan for each batch,
                    compared with `apply` on plans that are ready; RandAugment from here, from torchvision in a
                    DataLoader's worker processes, and from kornia

All of it runs in a process with the system's own allocator, as other people's programs do; main.py's processes keep
freed memory, which makes large results cheaper.

The images are the embedded shapes, enlarged where needed; policies and draws are random, as in training.
"""

import argparse
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from measuring import Spread, count, count_or_none, in_turn, parse, parser, publish, ratios
from parts import libraries
from parts.perimage import Operation, PillowPipeline, run
from parts.transforms import READY, transforms
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional as on_pillow

from augmentations import OPS, Plan, apply, apply_op, family_settings, through_families
from config import PAPER_OPS, Config
from dataloader import Normalise, cutout_mask, draw_centres, draw_crops, make_copies
from datasets.shapes import COUNTS, draw_shapes
from evaluation.text_table import Table
from policies import build_policies
from policies.sources import PolicySource
from training.distributed import join
from training.exit import exit_with_status
from utils import UserError, keyed_generator

OURS, PILLOW, TORCHVISION, KORNIA = "batched, here", "per image, Pillow", "groups, torchvision", "batched, kornia"
GRAPH = "batched, here, as a CUDA graph"
Ways = Mapping[str, Callable[[], Any]]


class Work(NamedTuple):
    """N images, their M copies and a plan for them, also in the form that Pillow needs."""

    config: Config
    policies: PolicySource
    images_NCHW: Tensor
    copies_BCHW: Tensor
    plan: Plan
    pillow_B: list[Image.Image]
    operations_BK: list[list[Operation]]


class Row(NamedTuple):
    """One way to do some work on images of this size: its rate, and that as a multiple of the reference's.

    The reference is Pillow or, among transforms, `apply` with a plan that is ready.
    """

    size: int
    work: str
    way: str
    images_per_second: Spread
    to_reference: Spread


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--sizes", type=count, nargs="+", default=[32, 224], help="sides of the images, in pixels")
    arguments.add_argument("--images", type=count, nargs="+", default=[128, 32], help="N for each of the sizes")
    arguments.add_argument("--M", type=count, default=8)
    arguments.add_argument("--workers", type=count_or_none, default=2, help="of the DataLoader with torchvision's")
    arguments.set_defaults(threads=1)
    args = parse(arguments)
    if len(args.sizes) != len(args.images) or len(set(args.sizes)) < len(args.sizes):
        raise UserError(f"--images: needs a number for each of --sizes, {args.sizes}, all of them different")
    if max(args.images) > COUNTS["train"]:
        raise UserError(f"--images: {max(args.images)} is more than the {COUNTS['train']} shapes there are")
    with join(args.device, keep_memory=False) as world:
        measure_all(args, world.device)


def measure_all(args: argparse.Namespace, device: torch.device) -> None:
    tables, measured = [], {"M": args.M, "N": dict(zip(args.sizes, args.images, strict=True)), "rows": []}
    for size, N in zip(args.sizes, args.images, strict=True):
        work = prepare(build_config(size, args.M), size, N, device)
        require_equal_to_pillow(work)
        rows, alone, how = [], [], (args.repeats, device)
        for name, ways in works(work).items():
            rows += measure(size, name, ways, N * args.M, *how)
        group = min(N * args.M, max(2, N * args.M // len(OPS)))  # about as many as share an operation in a plan
        for name in PAPER_OPS:
            alone += measure(size, name, of_one(work, name, group), group, *how)
        transformed = measure(size, "transforms", transforms(work.copies_BCHW, device, args.workers), N * args.M, *how)
        tables += [works_table(size, N, args.M, rows), operations_table(size, group, alone)]
        tables.append(transforms_table(size, N * args.M, transformed))
        measured["rows"] += [row._asdict() for row in rows + alone + transformed]
    publish(args, tables, measured)


def build_config(size: int, M: int) -> Config:
    """As for CIFAR, or for large images as for ImageNet, which are cropped and flipped when they are read."""
    if size <= 64:
        return Config(dataset="cifar10", M=M, policy="random")
    return Config(dataset="imagenet", crop_padding=0, M=M, policy="random")


def prepare(config: Config, size: int, N: int, device: torch.device) -> Work:
    policies = build_policies(config)
    policies.resample(keyed_generator("benchmark", "policies"))
    plan = policies.plan(N, (size, size), keyed_generator("benchmark", "plan"))
    images_NCHW = draw_shapes("train")[0][:N]
    if size != images_NCHW.shape[-1]:
        images_NCHW = F.interpolate(images_NCHW.float(), (size, size), mode="bilinear").to(torch.uint8)
    copies_BCHW = images_NCHW.repeat_interleave(config.M, 0)
    pillow_B = [to_pillow(image_CHW) for image_CHW in copies_BCHW]
    operations_BK = for_pillow(plan, pillow_B)
    return Work(config, policies, images_NCHW.to(device), copies_BCHW.to(device), plan, pillow_B, operations_BK)


def to_pillow(image_CHW: Tensor) -> Image.Image:
    return Image.fromarray(image_CHW.permute(1, 2, 0).contiguous().numpy())


def for_pillow(plan: Plan, images_B: list[Image.Image]) -> list[list[Operation]]:
    """The operations that the plan has for each image."""

    def operation(b: int, k: int) -> Operation:
        op = OPS[plan.op_BK[b, k]]
        extra = {"partner": images_B[plan.partner_BK[b, k]], "centre": plan.centre_BK2[b, k].tolist()}
        return Operation(op.name, plan.magnitude_BK[b, k].item(), extra.get(op.needs))

    B, K = plan.op_BK.shape
    return [[operation(b, k) for k in range(K) if plan.op_BK[b, k] >= 0] for b in range(B)]


def require_equal_to_pillow(work: Work) -> None:
    results = [apply(work.copies_BCHW, work.plan)]
    if work.copies_BCHW.device.type == "cuda":
        results.append(as_graph(work.copies_BCHW, work.plan)())
    theirs = [run(image, operations) for image, operations in zip(work.pillow_B, work.operations_BK, strict=True)]
    theirs_BCHW = torch.stack([on_pillow.pil_to_tensor(image) for image in theirs])
    if differing := sum((ours_BCHW.cpu() != theirs_BCHW).sum() for ours_BCHW in results):
        raise UserError(f"{differing:,} values differ from Pillow's: not the same work (see README.md, Exactness)")


def works(work: Work) -> dict[str, Ways]:
    """By name of the work, the ways to do it."""
    config, copies_BCHW, plan = work.config, work.copies_BCHW, work.plan
    normalise = Normalise(config, copies_BCHW.device)
    mean, std = normalise.mean_C11.flatten().tolist(), normalise.std_C11.flatten().tolist()
    todo = list(zip(work.pillow_B, work.operations_BK, strict=True))

    def input_of(image: Image.Image) -> Tensor:
        return on_pillow.normalize(on_pillow.to_tensor(image), mean, std, inplace=True)

    found: dict[str, Ways] = {
        "operations": operations(work),
        "and normalised": {
            OURS: lambda: normalise(apply(copies_BCHW, plan)),
            PILLOW: lambda: for_network(torch.stack([input_of(run(image, operations)) for image, operations in todo])),
            TORCHVISION: lambda: for_network(
                libraries.normalise(libraries.with_torchvision(copies_BCHW, plan), mean, std)
            ),
        },
    }
    if copies_BCHW.device.type == "cuda":
        found["operations"][GRAPH] = as_graph(copies_BCHW, plan)
    if not config.cropped_when_read:
        found["all, shared crops"] = from_images(work, normalise, crop_per_copy=False)
        found["all, own crops"] = from_images(work, normalise, crop_per_copy=True)
    return found


def operations(work: Work) -> dict[str, Callable[[], Any]]:
    """The ways to apply the plan alone, uint8 in and out."""
    copies_BCHW, plan, todo = work.copies_BCHW, work.plan, list(zip(work.pillow_B, work.operations_BK, strict=True))
    ways = {
        OURS: lambda: apply(copies_BCHW, plan),
        PILLOW: lambda: [run(image, operations) for image, operations in todo],
        TORCHVISION: lambda: libraries.with_torchvision(copies_BCHW, plan),
    }
    return ways | ({KORNIA: lambda: libraries.with_kornia(copies_BCHW, plan)} if libraries.kornia else {})


def for_network(inputs_BCHW: Tensor) -> Tensor:
    """In the channels_last memory format, which the batched way writes directly."""
    return inputs_BCHW.contiguous(memory_format=torch.channels_last)


def from_images(work: Work, normalise: Normalise, *, crop_per_copy: bool) -> Ways:
    images_NCHW, policies = work.images_NCHW, work.policies
    N, _, height, width = images_NCHW.shape
    M, device = work.config.M, images_NCHW.device
    config = Config(dataset="cifar10", M=M, crop_per_copy=crop_per_copy, policy="random")
    per_image = PillowPipeline(config, policies, images_NCHW.permute(0, 2, 3, 1).contiguous().cpu().numpy(), [0] * N)
    draws = keyed_generator("benchmark", "draws")

    def batched() -> Tensor:
        crops, plan = draw_crops(N, config, draws), policies.plan(N, (height, width), draws)
        kept_B1HW = cutout_mask(config.cutout, draw_centres(N * M, height, width, draws), height, width, device)
        return normalise(apply(make_copies(images_NCHW, torch.arange(N * M), M, crops), plan), kept_B1HW)

    return {OURS: batched, PILLOW: lambda: for_network(torch.cat([per_image[n, n][0] for n in range(N)]))}


def as_graph(copies_BCHW: Tensor, plan: Plan) -> Callable[[], Tensor]:
    """`apply` on the device as a CUDA graph, for plans with the same operations at the same positions.

    Each call overwrites the result of the one before.
    """
    settings_KSB, present = family_settings(plan, *copies_BCHW.shape[-2:])
    images_BCHW, on_device_KSB = copies_BCHW.clone(), settings_KSB.to(copies_BCHW.device)
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()

    def run_positions() -> Tensor:
        out_BCHW = images_BCHW
        for settings_SB, kernels in zip(on_device_KSB, present, strict=True):
            out_BCHW = through_families(out_BCHW, settings_SB, kernels, images_BCHW)
        return out_BCHW

    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run_positions()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        result_BCHW = run_positions()

    def play() -> Tensor:
        settings_KSB, _ = family_settings(plan, *copies_BCHW.shape[-2:])
        on_device_KSB.copy_(settings_KSB.pin_memory(), non_blocking=True)
        images_BCHW.copy_(copies_BCHW)
        graph.replay()
        return result_BCHW

    return play


def of_one(work: Work, name: str, group: int) -> Ways:
    """One operation on `group` copies, at random levels and signs."""
    op, draws = OPS[PAPER_OPS.index(name)], keyed_generator("benchmark", name)
    levels, coins = (torch.randint(high, (group,), generator=draws).tolist() for high in (10, 2))
    magnitudes = [
        op.magnitude(level) * (-1 if op.signed and coin else 1) for level, coin in zip(levels, coins, strict=True)
    ]
    magnitude_B1 = torch.tensor(magnitudes, dtype=torch.float64)[:, None]
    partner_B1 = torch.randint(group, (group, 1), generator=draws)
    centre_B12 = torch.rand(group, 1, 2, dtype=torch.float64, generator=draws)
    plan = Plan(torch.full((group, 1), PAPER_OPS.index(name)), magnitude_B1, partner_B1, centre_B12)
    needed = {"partner": work.copies_BCHW[partner_B1[:, 0]], "centre": centre_B12[:, 0]}
    extra = {op.needs: needed[op.needs]} if op.needs else {}
    copies_BCHW, todo = work.copies_BCHW[:group], for_pillow(plan, work.pillow_B[:group])
    ways = {
        OURS: lambda: apply_op(copies_BCHW, name, magnitude_B1[:, 0], **extra),
        PILLOW: lambda: [run(image, operations) for image, operations in zip(work.pillow_B, todo, strict=False)],
        TORCHVISION: lambda: libraries.with_torchvision(copies_BCHW, plan),
    }
    return ways | ({KORNIA: lambda: libraries.with_kornia(copies_BCHW, plan)} if libraries.kornia else {})


def measure(size: int, work: str, ways: Ways, images: int, repeats: int, device: torch.device) -> list[Row]:
    seconds = in_turn(ways, repeats, device)
    reference = PILLOW if PILLOW in seconds else READY
    return [
        Row(size, work, way, Spread.of(took).per_second(images), ratios(seconds[reference], took))
        for way, took in seconds.items()
    ]


def works_table(size: int, N: int, M: int, rows: list[Row]) -> Table:
    cells = []
    for _, work, way, rate, to_reference in rows:
        microseconds = f"{1e6 / rate.median:,.1f}"
        cells.append((work, way, rate.describe(), microseconds, to_reference.describe(".2f")))
    title = f"{size}x{size}, N = {N} images, M = {M}: copies per second; medians (lowest to highest)"
    return Table(title, ("work", "way", "images/s", "us/image", "times Pillow's"), cells)


def transforms_table(size: int, B: int, rows: list[Row]) -> Table:
    cells = [
        (way, rate.describe(), f"{1e6 / rate.median:,.1f}", f"{1 / speed.median:.3f}")
        for _, _, way, rate, speed in rows
    ]
    header = ("transform", "images/s", "us/image", "time, of a ready plan's")
    return Table(f"{size}x{size}, {B:,} images at a time: transforms for other training loops", header, cells)


def operations_table(size: int, group: int, rows: list[Row]) -> Table:
    ways = [way for way in (OURS, PILLOW, TORCHVISION, KORNIA) if any(row.way == way for row in rows)]
    microseconds = {(row.work, row.way): f"{1e6 / row.images_per_second.median:,.1f}" for row in rows}
    cells = [(name, *(microseconds[name, way] for way in ways)) for name in PAPER_OPS]
    return Table(f"{size}x{size}, {group} images at a time: microseconds per image", ("operation", *ways), cells)


if __name__ == "__main__":
    exit_with_status(main)
