"""What a training step costs: with policies, on ready inputs, and fed by a per-image pipeline.

    python benchmarks/step.py                                                 # confs/demo.yaml, on the CPU too
    python benchmarks/step.py --load_conf confs/cifar10/wresnet40x2_cifar10.yaml --amp --M 1 2 4 8 16 --memory
    python benchmarks/step.py --load_conf confs/cifar10/wresnet28x10_cifar10.yaml --amp --M 8 --images 32 64 128
    python benchmarks/step.py --load_conf confs/imagenet/resnet50.yaml --amp --set accumulate=1 \\
        --M 8 --images 32 --image_sizes 128 224
    torchrun --nproc_per_node 8 benchmarks/step.py --load_conf ... --amp      # each process takes its share

policies    as main.py trains: images by index, draws, crop, flip, operations, normalisation, Cutout, learning
limit       the same learning from inputs that are on the device already
per image   the same learning from inputs that worker processes make image by image (parts/perimage.py)

The three take turns, and ratios are of measurements of the same turn. The workers of the per-image pipeline are started
and have filled their queues before it is timed. The images are noise, since only their size affects the speed. The
policies are drawn once, from the conf's source; no files are read (loading.py measures that).

waits: how often the host waits for the GPU in a step with policies. --memory measures the peak memory of the first two
ways, each in its own process.

Shape suffixes as in main.py: N images of a batch, M copies of each; B = N * M, image-major.
"""

import argparse
import dataclasses
import functools
import itertools
import multiprocessing
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parent.parent))

from cost import CLASSES
from measuring import Spread, cores, count, host_waits, parse, parser, peak_memory, publish, ratios, take_turns, timed
from parts.perimage import PillowPipeline

import main as training
from config import DEFAULT_CONF, Config, add_setting_arguments, load_config, overrides_from, plain_values
from datasets.splits import ResidentSplit
from evaluation.text_table import Table
from models import build_model
from training.distributed import World, join
from training.exit import exit_with_status
from training.state import TrainingState, check_support
from utils import UserError, choose_kernels, keyed_generator, keyed_seed, seed_default_generators

WAYS = ("policies", "limit", "per image")
AHEAD = 2  # batches that each worker of the per-image pipeline prepares in advance: the DataLoader's default


class StepTimes(NamedTuple):
    """The measurements of one size: seconds per step by way and turn, peak memory in bytes by way, waits per step."""

    config: Config
    seconds: dict[str, list[float]]
    memory: dict[str, float]
    waits: float | None

    def ratio(self, way: str) -> Spread:
        """Its seconds relative to the limit's."""
        return ratios(self.seconds[way], self.seconds["limit"])


def main() -> None:
    args = parse_arguments()
    configs = requested_sizes(args)
    with join(args.device) as world:
        for config in configs:
            check_support(config, world)
        if args.memory and world.size > 1:
            raise UserError("--memory: measures one process; start it without torchrun")
        args.workers = args.workers or max(1, cores() // world.size)
        rows = [measure(config, args, world) for config in configs]
        if world.is_main:
            conf = (args.load_conf or DEFAULT_CONF).stem
            publish(args, [table(conf, rows, args)], as_measured(rows, args))


def parse_arguments() -> argparse.Namespace:
    arguments = parser(__doc__)
    add_setting_arguments(arguments)
    add = arguments.add_argument
    add("--amp", action="store_true", help="mixed precision")
    add("--M", dest="policies", type=count, nargs="+", default=[1, 2, 4, 8, 16], help="copies of each image")
    add("--images", type=count, nargs="+", metavar="N", help="of a batch (default: the conf's batch_size)")
    add("--image_sizes", type=count, nargs="+", metavar="SIDE", help="in pixels (default: the conf's image_size)")
    add("--steps", type=count, default=5, help="of each way in a turn (default: %(default)s)")
    add("--workers", type=count, help="of each process's per-image pipeline (default: one per core)")
    add("--memory", action="store_true", help="also measure peak memory")
    return parse(arguments)


def requested_sizes(args: argparse.Namespace) -> list[Config]:
    """A config for each size. Raises UserError."""
    overrides = overrides_from(args)
    if stated := {"M", "batch_size", "image_size"} & set(overrides):
        raise UserError(f"--set {min(stated)}: is measured for each of --M, --images and --image_sizes; set it there")
    config = load_config(args.load_conf or DEFAULT_CONF, overrides)
    sizes = itertools.product(
        args.image_sizes or [config.image_size], args.images or [config.batch_size], args.policies
    )
    return [dataclasses.replace(config, M=M, batch_size=N, image_size=side) for side, N, M in sizes]


def measure(config: Config, args: argparse.Namespace, world: World) -> StepTimes:
    memory = {way: peak_alone(config, way, args) for way in WAYS[:2]} if args.memory else {}
    steps = Steps(config, world)
    ways = {
        "policies": functools.partial(timed_steps, steps, steps.with_policies, args.steps),
        "limit": functools.partial(timed_steps, steps, steps.with_ready_inputs, args.steps),
        "per image": per_image(steps, args.steps, args.workers),
    }
    seconds = {way: [took / args.steps for took in turns] for way, turns in take_turns(ways, args.repeats).items()}
    waits = host_waits(lambda: [steps.take(steps.with_policies()) for _ in range(args.steps)], world.device)
    return StepTimes(config, seconds, memory, None if waits is None else waits / args.steps)


class Steps:
    """Training steps on noise, as main.train_one_epoch takes them, from given inputs."""

    def __init__(self, config: Config, world: World):
        choose_kernels(world.device, config.deterministic, config.tf32)
        seed_default_generators(world.devices, config.seed, "network")
        self.classes = CLASSES.get(config.dataset, 10)
        model = build_model(config.model, self.classes, **config.model_options())
        model = model.to(world.device, memory_format=torch.channels_last)
        self.config, self.world = config, world
        self.state = TrainingState.start(config, world, model)
        self.state.trained.train()
        self.state.policies.resample(keyed_generator(config.seed, "policies", 0))
        self.micro_batches = world.split_batch(config.batch_size, config.accumulate)
        self.own = range(self.micro_batches[0].start, self.micro_batches[-1].stop)
        self.taken = itertools.count()
        images_NCHW, labels_N = self.noise()
        self.split = ResidentSplit(images_NCHW.to(world.device), labels_N)
        self.loader = self.state.loader(self.split)

    def noise(self) -> tuple[Tensor, Tensor]:
        """uint8 (N, C, H, W) and labels (N,), on the CPU."""
        N, side, draws = self.config.batch_size, self.config.image_size, keyed_generator("noise")
        images_NCHW = torch.randint(256, (N, 3, side, side), dtype=torch.uint8, generator=draws)
        return images_NCHW, torch.randint(self.classes, (N,), generator=draws)

    def take(self, inputs: Iterable[tuple[Tensor, Tensor]]) -> None:
        training.take_step(self.state, inputs, self.config.lr)

    def with_policies(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The micro-batches of a step, as main.train_one_epoch makes them."""
        ((images_NCHW, labels_N),) = self.split.batches([torch.arange(self.config.batch_size)])
        return self.loader.micro_batches(images_NCHW, labels_N, next(self.taken))

    @functools.cached_property
    def ready_inputs(self) -> tuple[Tensor, Tensor]:
        """A micro-batch of inputs on the device."""
        B, side, device = len(self.micro_batches[0]) * self.config.M, self.config.image_size, self.world.device
        inputs_BCHW = torch.randn(B, 3, side, side, device=device).contiguous(memory_format=torch.channels_last)
        return inputs_BCHW, torch.randint(self.classes, (B,), device=device)

    def with_ready_inputs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The micro-batches of a step, from tensors that exist already."""
        return itertools.repeat(self.ready_inputs, len(self.micro_batches))

    def from_workers(self, copies_NMCHW: Tensor, labels_N: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """The micro-batches of a step, from a batch that workers have made on the CPU."""
        for micro in self.micro_batches:
            own = slice(micro.start - self.own.start, micro.stop - self.own.start)
            inputs_BCHW = copies_NMCHW[own].flatten(0, 1).to(self.world.device, non_blocking=True)
            labels_B = labels_N[own].to(self.world.device, non_blocking=True).repeat_interleave(self.config.M)
            yield inputs_BCHW.contiguous(memory_format=torch.channels_last), labels_B


def timed_steps(steps: Steps, inputs: Callable[[], Iterable[tuple[Tensor, Tensor]]], number: int) -> float:
    """Seconds of `number` steps, each from new inputs.

    On CUDA another step comes first: as in training, the host prepares a step while the GPU works on the last one.
    """
    if steps.world.device.type != "cuda":
        return timed(lambda: [steps.take(inputs()) for _ in range(number)])
    steps.take(inputs())
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(number):
        steps.take(inputs())
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000


def per_image(steps: Steps, number: int, workers: int) -> Callable[[], float]:
    """A function that feeds `number` steps from the per-image pipeline and returns their seconds.

    Untimed steps before them fill the pipeline, and as many batches after them are thrown away, so that what the
    workers prepare in advance cancels out.
    """
    images_NCHW, labels_N = steps.noise()
    images_NHWC, ahead = images_NCHW.permute(0, 2, 3, 1).contiguous().numpy(), workers * AHEAD
    data = PillowPipeline(steps.config, steps.state.policies, images_NHWC, labels_N.tolist())
    keys = [[(n, keyed_seed("image", step, n)) for n in steps.own] for step in range(ahead + 1 + number + ahead)]
    loader = DataLoader(
        data,
        batch_sampler=keys,
        num_workers=workers,
        prefetch_factor=AHEAD,
        persistent_workers=True,
        pin_memory=steps.world.device.type == "cuda",
        generator=torch.Generator(),  # otherwise the loader draws from the default generator
    )

    def seconds() -> float:
        reading = iter(loader)
        for batch in itertools.islice(reading, ahead):
            steps.take(steps.from_workers(*batch))
        took = timed_steps(steps, lambda: steps.from_workers(*next(reading)), number)
        for _ in reading:
            pass
        return took

    return seconds


def peak_alone(config: Config, way: str, args: argparse.Namespace) -> float:
    """Peak memory in bytes of a process that takes three steps in one way."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(peak_of_steps, config, way, args.device, args.threads).result()


def peak_of_steps(config: Config, way: str, device: str, threads: int | None) -> float:
    if threads:
        torch.set_num_threads(threads)
    with join(device) as world:
        steps = Steps(config, world)
        timed_steps(steps, {"policies": steps.with_policies, "limit": steps.with_ready_inputs}[way], 3)
        return peak_memory(world.device)


def table(conf: str, rows: list[StepTimes], args: argparse.Namespace) -> Table:
    header = ["M", "N", "side", *(f"{way}, ms" for way in WAYS), "policies / limit", "per image / limit", "waits"]
    header += ["peak, MB", "above the limit's"] if args.memory else []
    policies, per_image = (Spread.of([row.ratio(way).median for row in rows]) for way in ("policies", "per image"))
    notes = [
        f"A step with policies takes {policies.low:.3f} to {policies.high:.3f} times as long as the limit, one fed "
        f"image by image {per_image.low:.3f} to {per_image.high:.3f} times ({args.workers} worker processes)."
    ]
    return Table(f"A training step of {conf}, median (lowest to highest)", header, [cells(row) for row in rows], notes)


def cells(row: StepTimes) -> list[str]:
    config = row.config
    words = [str(number) for number in (config.M, config.batch_size, config.image_size)]
    for way in WAYS:
        words.append(Spread.of([1000 * s for s in row.seconds[way]]).describe(".1f"))
    for way in ("policies", "per image"):
        words.append(row.ratio(way).describe(".3f"))
    words.append("-" if row.waits is None else f"{row.waits:g}")
    if row.memory:
        peak, limit = (row.memory[way] / 1e6 for way in ("policies", "limit"))
        words += [f"{peak:,.0f}", f"{peak - limit:,.0f}"]
    return words


def as_measured(rows: list[StepTimes], args: argparse.Namespace) -> dict[str, Any]:
    sizes = [
        {
            "M": row.config.M,
            "N": row.config.batch_size,
            "image_size": row.config.image_size,
            "seconds": row.seconds,
            "ratio": {way: row.ratio(way).median for way in ("policies", "per image")},
            "waits": row.waits,
            "memory": row.memory,
        }
        for row in rows
    ]
    return {"settings": plain_values(rows[0].config), "steps": args.steps, "workers": args.workers, "sizes": sizes}


if __name__ == "__main__":
    exit_with_status(main)
