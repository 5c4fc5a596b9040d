"""Everything that changes during training, saved and restored together; and averages of the weights, a part of it."""

import contextlib
import copy
import itertools
import os
import shlex
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from augmentations import upload
from config import Config
from dataloader import Normalise, TrainLoader
from datasets.splits import Split
from models import build_model
from policies import build_policies
from policies.sources import LossSums, PolicySource
from training.distributed import World, digest
from training.health import CollapseCount, FiniteMonitor
from utils import UserError, first_line, keyed_generator, random_state, seed_default_generators, set_random_state


@dataclass
class EpochTotals:
    """Sums over the current epoch in this process."""

    loss_and_correct: Tensor  # sum of all losses and number of correct answers, float64 on the device
    copies: int = 0  # augmented images in these sums
    adversary: dict[str, float] = field(default_factory=dict)  # entropy and loss spread of the last interval
    seconds: dict[str, float] = field(default_factory=lambda: {"train": 0.0, "other": 0.0})  # wall-clock time


class WeightAverage:
    """A moving average of the network's weights and BatchNorm statistics, without gradient: to be scored (the setting
    `ema`), or as a teacher (`reward`, `keep_by`). Where their rates are equal, one object is both.

    Rewarded for the network's loss alone, an adversary may find operations that leave nothing to recognise. The teacher
    loses on those as much as the network does: its loss, subtracted from the reward, makes them worthless (Suzuki,
    "TeachAugment", CVPR 2022). Like the network a teacher judges in training mode, by the statistics of the batch:
    otherwise most of the difference between the two would be BatchNorm's.

    torch.optim.swa_utils.AveragedModel averages as well, but uploads its step count at every update, for which the host
    waits.

    model: the average; network: the same as called, on all devices of this process.

    rate: the share that a step keeps of the average; after t steps at most (1 + t) / (10 + t), since a young average
    consists of the network's random first weights. amp_dtype: see `World.wrap`.
    """

    def __init__(self, model: nn.Module, rate: float, world: World, amp_dtype: torch.dtype = torch.bfloat16):
        self.rate, self.steps = rate, 0
        self.model = copy.deepcopy(model).train().requires_grad_(False)
        self.network = world.on_all_devices(self.model, amp_dtype)

    @torch.no_grad()
    def follow(self, model: nn.Module) -> None:
        """Move towards the network as it is after a step."""
        self.steps += 1
        rate = min(self.rate, (1 + self.steps) / (10 + self.steps))
        pairs = list(zip(*(one.state_dict().values() for one in (self.model, model)), strict=True))
        averaged = [pair for pair in pairs if pair[0].is_floating_point()]
        get_ema_multi_avg_fn(rate)(*map(list, zip(*averaged, strict=True)), None)
        for own, current in pairs:
            if not own.is_floating_point():
                own.copy_(current)

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "model": self.model.state_dict()}

    def load_state_dict(self, state: dict[str, Any], buffers: dict[str, Tensor]) -> None:
        """buffers: those of this process, which replace the ones in `state`."""
        self.steps = state["steps"]
        self.model.load_state_dict(state["model"] | buffers)

    def buffers(self) -> dict[str, Tensor]:
        """The averages of BatchNorm's statistics, which differ between processes, on the CPU."""
        return {name: buffer.cpu() for name, buffer in self.model.named_buffers()}


@dataclass
class TrainingState:
    """Everything that changes during training.

    parts: this process's micro-batches of a step, as ranges of the batch's N images.
    """

    config: Config
    world: World
    model: nn.Module
    trained: nn.Module  # the same model as called in training, on all devices of the run
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    policies: PolicySource
    teacher: WeightAverage | None
    ema: WeightAverage | None
    normalise: Normalise
    monitor: FiniteMonitor
    epoch_totals: EpochTotals
    parts: list[range]
    epoch: int = 0  # finished epochs
    step: int = 0  # finished steps of the next one
    best: float = 0.0  # best top-1 seen on the split that is scored during training; nothing is chosen by it
    collapse: CollapseCount = field(default_factory=CollapseCount)
    rewinds: int = 0  # times that the run was rewound to a checkpoint

    @classmethod
    def start(cls, config: Config, world: World, model: nn.Module) -> "TrainingState":
        optimizer = build_optimizer(model, config, fused=world.device.type != "cpu")
        amp_dtype = getattr(torch, config.amp_dtype)
        teacher = WeightAverage(model, config.teacher_rate, world, amp_dtype) if config.has_teacher else None
        ema = teacher if teacher and config.ema == teacher.rate else None
        if config.ema and not ema:
            ema = WeightAverage(model, config.ema, world, amp_dtype)
        scaler = torch.amp.GradScaler(world.device.type, enabled=config.amp and config.amp_dtype == "float16")
        policies, normalise = build_policies(config), Normalise(config, world.device)
        trained = world.wrap(model, amp_dtype, config.image_size)
        if config.compile:
            model.compile()  # in place: the state dict's keys stay as they are
        totals = EpochTotals(torch.zeros(2, dtype=torch.float64, device=world.device))
        monitor, parts = FiniteMonitor(world.device), world.split_batch(config.batch_size, config.accumulate)
        return cls(
            config, world, model, trained, optimizer, scaler, policies, teacher, ema, normalise, monitor, totals, parts
        )

    @property
    def averages(self) -> dict[str, WeightAverage]:
        """The different averages of the weights, by the name under which they are saved."""
        own_ema = None if self.ema is self.teacher else self.ema
        return {name: average for name, average in (("teacher", self.teacher), ("ema", own_ema)) if average}

    @property
    def micro_batches(self) -> int:
        """Micro-batches of this process in a step."""
        return len(self.parts)

    def loader(self, split: Split) -> TrainLoader:
        """The training images as the network is to see them."""
        return TrainLoader(split, self.config, self.policies, self.normalise, self.parts, self.keyed)

    def precision(self) -> torch.autocast:
        """Context for the forward pass in training: mixed precision or float32."""
        amp_dtype = getattr(torch, self.config.amp_dtype)
        return torch.autocast(self.world.device.type, amp_dtype, enabled=self.config.amp)

    def selection_draws(self) -> list[Tensor] | None:
        """For each micro-batch of this step what `chosen_copies` draws, (N, M); None where no copies are selected."""
        config = self.config
        if not config.selects:
            return None
        draws = self.keyed("keep", self.epoch, self.step)
        exponential_NM = torch.empty(config.batch_size, config.M).exponential_(generator=draws)
        return [upload(exponential_NM[part.start : part.stop], self.world.device) for part in self.parts]

    def end_epoch(self) -> None:
        self.epoch, self.step = self.epoch + 1, 0
        self.epoch_totals = EpochTotals(torch.zeros_like(self.epoch_totals.loss_and_correct))
        self.monitor.reset()

    def require_finite(self) -> None:
        """Raises NotFinite, in all processes, if a number of this epoch was not finite, or the network is not."""
        weights = itertools.chain(self.model.parameters(), self.model.buffers())
        self.monitor.require_finite(self.world, weights, max(0, self.step - 1))

    def state_dict(self) -> dict[str, Any]:
        """What all processes share, and under "ranks" what belongs to each. Must be called by all of them.

        Raises NotFinite for what must not be saved, and UserError where the processes are no longer equal.
        """
        self.require_finite()
        where = f"after epoch {self.epoch}, step {self.step}"
        self.world.require_equal(f"{where}: the weights", lambda: digest(list(self.model.parameters())))
        for name, average in self.averages.items():
            parameters = list(average.model.parameters())
            self.world.require_equal(f"{where}: the {name}", lambda parameters=parameters: digest(parameters))
        self.world.require_equal(f"{where}: the policies", lambda: digest(self.policies.state_dict()))
        loss_sums = self.policies.loss_sums
        own = {
            "devices": len(self.world.devices),
            "kind": self.world.device.type,
            "random": random_state(self.world.devices),
            "loss_sum_M": loss_sums.loss_sum_M.cpu(),
            "teacher_sum_M": loss_sums.teacher_sum_M.cpu(),
            "reward_sum_M": loss_sums.reward_sum_M.cpu(),
            "images": loss_sums.images,
            "teacher_buffers": {},
            **{f"{name}_buffers": average.buffers() for name, average in self.averages.items()},
            "loss_and_correct": self.epoch_totals.loss_and_correct.cpu(),
            "copies": self.epoch_totals.copies,
            "skipped": int(self.monitor.skipped),
            "buffers": {name: buffer.cpu() for name, buffer in self.model.named_buffers()},
        }
        return {
            "epoch": self.epoch,
            "step": self.step,
            "best": self.best,
            "collapse": list(self.collapse),
            "rewinds": self.rewinds,
            "epoch_totals": {"adversary": self.epoch_totals.adversary, "seconds": self.epoch_totals.seconds},
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "policies": self.policies.state_dict(),
            "teacher": None,
            **{name: average.state_dict() for name, average in self.averages.items()},
            "ranks": self.world.gather(own),
        }

    def fits(self, saved: dict[str, Any]) -> bool:
        """Whether a state is from as many processes and devices of the same kind: only then is it restored exactly."""
        first, kind = saved["ranks"][0], self.world.device.type
        shape = len(saved["ranks"]), first["devices"], first.get("kind", kind)
        return shape == (self.world.size, len(self.world.devices), kind)

    def load_state_dict(self, saved: dict[str, Any], run: Path) -> None:
        """Raises UserError when the checkpoint of `run` belongs to another network or other settings."""
        fused = self.optimizer.param_groups[0]["fused"]
        try:
            own = saved["ranks"][self.world.rank] if self.fits(saved) else self._share_of(saved)
            self.epoch, self.step, self.best = saved["epoch"], saved["step"], saved["best"]
            self.collapse, self.rewinds = CollapseCount(*saved["collapse"]), int(saved["rewinds"])
            self.model.load_state_dict(saved["model"] | own["buffers"])
            # The device, not the run, decides which kernels are used and where AdamW keeps its count of steps.
            groups = [group | {"fused": fused} for group in saved["optimizer"]["param_groups"]]
            self.optimizer.load_state_dict(saved["optimizer"] | {"param_groups": groups})
            self.scaler.load_state_dict(saved["scaler"])
            self.policies.load_state_dict(saved["policies"])
            self.policies.loss_sums = LossSums(*(own[name] for name in LossSums._fields))
            averages = {"teacher": saved["teacher"], "ema": saved.get("ema")}
            for name, average in self.averages.items():
                average.load_state_dict(averages[name], own.get(f"{name}_buffers", {}))
            sums = own["loss_and_correct"].to(self.world.device)
            self.epoch_totals = EpochTotals(sums, own["copies"], **saved["epoch_totals"])
            self.monitor.reset(own["skipped"])
            if own["random"]:
                set_random_state(own["random"], self.world.devices)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # whatever has another form than what was saved
            reason = first_line(error)
            raise UserError(f"{run}: its checkpoint does not fit the settings in its config.yaml ({reason})") from None

    def _share_of(self, saved: dict[str, Any]) -> dict[str, Any]:
        """This process's own part of a state that other processes wrote between two epochs.

        The loss sums of the current interval are divided equally; noise in the network is seeded again.
        """
        seed_default_generators(self.world.devices, self.config.seed, "noise", self.world.rank, saved["epoch"])
        ranks, size = saved["ranks"], self.world.size
        return {
            "loss_sum_M": sum(rank["loss_sum_M"] for rank in ranks) / size,
            "teacher_sum_M": sum(rank["teacher_sum_M"] for rank in ranks) / size,
            "reward_sum_M": sum(rank["reward_sum_M"] for rank in ranks) / size,
            "images": sum(rank["images"] for rank in ranks) / size,
            "loss_and_correct": torch.zeros(2, dtype=torch.float64),
            "copies": 0,
            "skipped": 0,
            "buffers": {},
            "random": {},
        }

    def keyed(self, *key: Any) -> torch.Generator:
        """The generator of the key's draws. After a second rewind they change: the same ones may fail again."""
        again = ("again", self.rewinds) if self.rewinds > 1 else ()
        return keyed_generator(self.config.seed, *key, *again)


@contextlib.contextmanager
def batch_statistics(network: nn.Module) -> Iterator[None]:
    """In training mode, BatchNorm normalises by the batch as always, but its running statistics stay as they are."""
    norms = [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for module in norms:
        module.track_running_stats = False
    try:
        yield
    finally:
        for module in norms:
            module.track_running_stats = True


def build_optimizer(model: nn.Module, config: Config, *, fused: bool) -> torch.optim.Optimizer:
    """SGD or AdamW as the config says. fused: all parameters in one kernel, no wait for float16's scaler; for CUDA."""
    common = {"lr": config.lr, "weight_decay": config.weight_decay, "fused": fused or None}
    if config.optimizer == "adamw":
        return torch.optim.AdamW(model.parameters(), **common)
    optimizer = torch.optim.SGD(model.parameters(), momentum=config.momentum, nesterov=config.nesterov, **common)
    if fused and config.momentum:
        for parameter in model.parameters():  # a first step that the scaler skips would leave it uninitialised
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def check_support(config: Config, world: World) -> None:
    """Raises UserError for settings that these devices or files cannot carry out. Nothing is changed or loaded yet."""
    world.split_batch(config.batch_size, config.accumulate)
    if config.policy_from:
        build_policies(config)
    if config.amp and config.amp_dtype == "float16" and world.device.type != "cuda":
        raise UserError(f"amp_dtype: float16 needs CUDA, and this run is on {world.device}; use amp_dtype: bfloat16")
    if config.compile and len(world.devices) > 1:
        raise UserError(
            f"compile: needs one process per GPU; start with torchrun --nproc_per_node {len(world.devices)}, or name "
            "one with --device cuda:0"
        )
    if config.compile and world.device.type == "cpu":
        compiler = os.environ.get("CXX") or {"win32": "cl", "darwin": "clang++"}.get(sys.platform, "g++")
        if shutil.which(shlex.split(compiler)[0]) is None:
            raise UserError(
                f"compile: needs a C++ compiler, and there is no {compiler}; install one, or name it in CXX"
            )
    _check_batchnorm(config, world)


def _check_batchnorm(config: Config, world: World) -> None:
    """Raises UserError if BatchNorm would see a single value: one copy in a pass, one pixel in the last layers."""
    part = world.split_batch(config.batch_size, config.accumulate)[0]
    if len(part) * (config.keep or config.M) > len(world.devices):
        return
    with torch.device("meta"):  # shapes alone
        model = build_model(config.model, 10, **config.model_options()).train()
        try:
            model(torch.empty(1, 3, config.side, config.side))
        except ValueError as error:
            if "more than 1 value" in str(error):
                raise UserError(
                    f"{config.model}: at {config.side} pixels its BatchNorm needs at least two copies in each pass, "
                    "and there is one; set a larger batch_size or M, or a smaller accumulate"
                ) from None
        except RuntimeError:  # a network that cannot run on shapes alone is left to the first step
            pass
