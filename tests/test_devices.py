"""No step waits for its device, checked without a GPU; and complete runs on a GPU, in the tests marked cuda.

A tensor on torch's meta device has no values: reading one raises an error, as does an operation that mixes it with CPU
tensors. `Watched` adds what torch accepts there: copies to the device for which the host waits, and CPU indices.
"""

import dataclasses
import functools
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from subprocess import DEVNULL, PIPE

import pytest
import torch
import torch.nn.functional as F
from conftest import LAUNCHERS, ROOT, TINY, Unkept, files, final_state, lines, little_network, no_waits, same
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import main
import policies
import training.state as trainingstate
from augmentations import Augment
from config import PER_IMAGE, POLICIES, Config, plain_values
from dataloader import Normalise
from datasets.splits import ResidentSplit
from evaluation.predict import predict
from models import build_model
from policies.learned import fresh_controller
from training.distributed import World
from utils import save_tensors

META, CPU = torch.device("meta"), torch.device("cpu")
N, STEPS = 8, 2
NO_VALUES = pytest.raises((RuntimeError, NotImplementedError), match="meta tensor")


class Watched(TorchDispatchMode):
    """Raises AssertionError for operations that mix devices, and for copies to the device that the host waits for."""

    COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)

    def __init__(self, pinned):
        super().__init__()
        self.pinned = pinned

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        unknown = function is torch.ops.aten._fused_sgd_.default  # to the meta device
        out = None if unknown else function(*args, **kwargs)
        tensors = [one for one in tree_leaves((args, kwargs, out)) if isinstance(one, Tensor)]
        if not function.name().startswith("aten::_fused"):  # otherwise a single number may come from the CPU
            tensors = [one for one in tensors if one.ndim]
        if len({one.device.type for one in tensors}) > 1:
            assert function in self.COPIES, f"{function} mixes devices"
            source = next(one for one in tensors if one.device == CPU)
            waits = not (kwargs.get("non_blocking") or args[2:3] == (True,))
            assert not waits, f"a tensor {tuple(source.shape)} is copied to the device while the host waits"
            assert any(source is one for one in self.pinned), f"a tensor {tuple(source.shape)} is not pinned"
        return out


class Autocast(TorchFunctionMode):
    """Replaces torch.autocast, which does not support the meta device: convolutions and products in `dtype`."""

    def __init__(self, _device_type, dtype=None, enabled=True):
        super().__init__()
        self.dtype = dtype if enabled else None

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if self.dtype and function in (F.conv2d, F.linear):
            args = [one.to(self.dtype) if isinstance(one, Tensor) else one for one in args]
        return function(*args, **(kwargs or {}))


@pytest.fixture
def watched(monkeypatch):
    """Prepare the meta device for training; returns the mode that watches it."""
    pinned = []

    def pin_memory(tensor):
        pinned.append(tensor.clone())
        return pinned[-1]

    monkeypatch.setattr(Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(torch, "autocast", Autocast)
    optimizer = sys.modules["torch.optim.optimizer"]  # torch.optim hides it
    monkeypatch.setattr(optimizer, "_get_fused_kernels_supported_devices", lambda: ["cpu", "meta"])
    return lambda: Watched(pinned)


class Paused(Exception):
    pass


class Steps(Unkept):
    """Counts steps; raises Paused after one, or makes torch raise where the host waits for CUDA."""

    def __init__(self, pause_after=None, watch_after=None):
        super().__init__()
        self.steps, self.pause_after, self.watch_after = 0, pause_after, watch_after

    def after_step(self):
        self.steps += 1
        if self.steps == self.pause_after:
            raise Paused
        if self.steps == self.watch_after:
            torch.cuda.set_sync_debug_mode("error")


def configure(**settings):
    return Config(**{"dataset": "shapes", "M": 3, "batch_size": N, "epochs": 2, "policy_interval": 20} | settings)


def start(config, device, build=little_network):
    model = build(config.model, 10, **config.model_options()).to(device, memory_format=torch.channels_last)
    return trainingstate.TrainingState.start(config, World((device,)), model)


def images_on(device, steps=STEPS):
    images = torch.zeros(steps * N, 3, 32, 32, dtype=torch.uint8, device=device)
    return ResidentSplit(images, torch.arange(steps * N) % 10)


NETWORKS = ("wresnet10_1", "shakeshake8_2x4d", "pyramid20_12", "resnet18", "resnet50d")
FLOAT16 = {"amp": True, "amp_dtype": "float16"}
SETTINGS = [
    *({"policy": policy} for policy in POLICIES),
    {"policy": "augmix", "jsd": 12.0, "crop_per_copy": False},
    {"reward": "teacher"},
    {"reward": "teacher", "reward_ema": 0.9, "clean_share": 0.3, "amp": True},
    *({"model": model} for model in NETWORKS),
    {"model": "wresnet10_1", "amp": True},
    {"accumulate": 2},
    {"dropout": 0.1, "cutout": 0, "label_smoothing": 0.1, "grad_clip": 1.0, "crop_per_copy": False},
    {"momentum": 0.0, "nesterov": False},
    {"optimizer": "adamw"},
    {"amp": True},
    FLOAT16,
    {"accumulate": 2, **FLOAT16, "optimizer": "adamw", "grad_clip": 1.0},
]


def named(settings):
    return "-".join(f"{name}={value}" for name, value in settings.items())


@pytest.fixture
def policies_from(tmp_path):
    """A file for each source of policies that needs one."""
    recorded, learned = tmp_path / "recorded.json", tmp_path / "model.pt"
    recorded.write_text('{"policies": [[[["Rotate", 3], ["Invert", 0]]], [[["SamplePairing", 9], ["Cutout", 9]]]]}')
    config = configure()
    save_tensors(learned, {"config": plain_values(config), "controller": fresh_controller(config).state_dict()})
    return {"recorded": str(recorded), "frozen": str(learned)}


@pytest.mark.parametrize("settings", SETTINGS, ids=named)
def test_no_step_waits_for_its_device(settings, watched, policies_from):
    if settings.get("policy") in policies_from:
        settings = settings | {"policy_from": policies_from[settings["policy"]]}
    build = build_model if "model" in settings else little_network
    state, manager = start(configure(**settings), META, build), Steps()
    with watched(), NO_VALUES:  # the end of the epoch reads them
        main.train_one_epoch(state, images_on(META), manager)
    assert manager.steps == STEPS
    assert state.epoch_totals.copies == STEPS * N * 3
    on = {
        one.device for one in tree_leaves([state.optimizer.state, state.policies.loss_sums]) if isinstance(one, Tensor)
    }
    assert on == {META}


@pytest.mark.filterwarnings("ignore:.*copying from a non-meta parameter")
@pytest.mark.parametrize(
    "settings", [{}, {"optimizer": "adamw"}, {"reward": "teacher", "accumulate": 2}, FLOAT16], ids=named
)
def test_no_step_waits_after_resuming(settings, watched):
    """From a state of the CPU in the middle of an epoch and of an interval."""
    config = configure(**settings)
    before = start(dataclasses.replace(config, amp=False), CPU)
    with pytest.raises(Paused):
        main.train_one_epoch(before, images_on(CPU), Steps(pause_after=1))
    saved = before.state_dict() | {"scaler": torch.amp.GradScaler("cpu").state_dict() if config.amp else {}}
    state, manager = start(config, META), Steps()
    state.load_state_dict(saved, Path("run"))
    with watched(), NO_VALUES:
        main.train_one_epoch(state, images_on(META), manager)
    assert manager.steps == STEPS - 1


TRANSFORMS = {
    "random": Augment,
    "policies": lambda **options: Augment([[("Rotate", 3, 0.5), ("Equalize", 0)], [("SamplePairing", 2)]], **options),
    **{name: functools.partial(policies.transform, name) for name in PER_IMAGE},
}


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_a_transform_does_not_wait_for_its_device(name, dtype, watched):
    transform, images_BCHW = TRANSFORMS[name](float_images="round"), torch.empty(N, 3, 16, 16, dtype=dtype, device=META)
    with watched():
        augmented_BCHW = transform(images_BCHW)
    assert (augmented_BCHW.device, augmented_BCHW.dtype) == (META, dtype)


@pytest.mark.cuda
@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_transform_on_the_device_equals_the_cpu(name, device):
    images_BCHW = torch.randint(256, (N, 3, 16, 16), dtype=torch.uint8)
    alike = [TRANSFORMS[name](generator=torch.Generator().manual_seed(1)) for _ in range(2)]
    on_cpu, on_device = alike[0](images_BCHW), images_BCHW.to(device)
    with no_waits(device):
        augmented_BCHW = alike[1](on_device)
    assert (augmented_BCHW.cpu().int() - on_cpu.int()).abs().max() <= (1 if name == "augmix" else 0)


@pytest.mark.parametrize(("model", "bfloat16"), [*((model, True) for model in NETWORKS), ("wresnet10_1", False)])
def test_no_scored_batch_waits_for_its_device(model, bfloat16, watched):
    network, scored = build_model(model, 10).to(META), []
    list(network.modules())[-1].register_forward_hook(lambda *_: scored.append(1))
    with watched(), NO_VALUES:  # the end reads the predictions
        predict(network, images_on(META), Normalise(configure(), META), World((META,)), batch=N, bfloat16=bfloat16)
    assert len(scored) == STEPS


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (lambda cpu, meta: meta + cpu, "device"),
        (lambda cpu, meta: meta[cpu.long()], "mixes devices"),
        (lambda cpu, meta: cpu.to(META), "the host waits"),
        (lambda cpu, meta: meta.copy_(cpu), "the host waits"),
        (lambda cpu, meta: cpu.to(META, non_blocking=True), "not pinned"),
        (lambda cpu, meta: cpu.pin_memory().to(META), "the host waits"),
        (lambda cpu, meta: float(meta.sum()), "meta tensor"),
    ],
)
def test_a_wait_is_noticed(fault, words, watched):
    cpu, meta = torch.zeros(4), torch.zeros(4, device=META)
    with watched():
        cpu.pin_memory().to(META, non_blocking=True)
    with watched(), pytest.raises((AssertionError, RuntimeError), match=words):
        fault(cpu, meta)


def test_a_tensor_left_on_the_cpu_is_noticed(watched):
    state, manager = start(configure(), META), Steps()
    state.normalise.mean_C11 = torch.zeros(3, 1, 1)
    with watched(), pytest.raises((AssertionError, RuntimeError), match="device"):
        main.train_one_epoch(state, images_on(META), manager)
    assert manager.steps == 0


@pytest.mark.cuda
@pytest.mark.parametrize("settings", SETTINGS, ids=named)
def test_no_step_waits_for_the_device(settings, device, policies_from):
    if settings.get("policy") in policies_from:
        settings = settings | {"policy_from": policies_from[settings["policy"]]}
    state = start(configure(**settings), device, build_model if "model" in settings else little_network)
    manager = Steps(watch_after=1 if device.type == "cuda" else None)
    waits = pytest.raises(RuntimeError, match="called a synchronizing") if device.type == "cuda" else nullcontext()
    try:
        with waits:  # the end of the epoch does
            main.train_one_epoch(state, images_on(device), manager)
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    assert manager.steps == STEPS


DEMANDING = ("dropout=0.1", "policy_interval=3", "controller_lr=0.05")
# The network may not resolve the machine's name.
TORCHRUN = (*LAUNCHERS["torchrun"], "--nproc_per_node=1", "--standalone", "--local-addr=127.0.0.1")
TIMEOUT = 300  # seconds, many times what each of these runs takes
# By name: the launcher, settings, and the flags of each start.
RUNS = {
    "whole": ((sys.executable,), DEMANDING, [()]),
    "again": ((sys.executable,), DEMANDING, [()]),
    "resumed": ((sys.executable,), DEMANDING, [("--stop_epoch=1",), ("--resume",)]),
    "launched": (TORCHRUN, DEMANDING, [()]),
    "plain": ((sys.executable,), (), [()]),
    "scaled": ((sys.executable,), ("amp=true", "amp_dtype=float16"), [()]),
    "compiled": ((sys.executable,), ("compile=true",), [()]),
}


@pytest.fixture(scope="module")
def run(device, tmp_path_factory):
    """run(name) -> the directory of one of RUNS, which run at the same time, since starting takes longest."""
    logdir, processes = tmp_path_factory.mktemp("runs"), []

    def execute(name):
        starter, settings, starts = RUNS[name]
        alone = device.type == "cuda" and starter is not TORCHRUN
        own = f"cuda:{device.index or 0}" if alone else device.type
        for flags in starts:
            words = [*starter, str(ROOT / "main.py"), "--device", own, "--logdir", str(logdir), "--name", name, *flags]
            words += ["--set", *TINY, "deterministic=true", *settings]
            one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
            process = subprocess.Popen(words, cwd=ROOT, env=one_thread, stdout=DEVNULL, stderr=PIPE, text=True)
            processes.append(process)
            _, err = process.communicate(timeout=TIMEOUT)
            assert process.returncode == 0, err
        return logdir / name

    pool = ThreadPoolExecutor(min(len(RUNS), os.cpu_count()))
    results = {name: pool.submit(execute, name) for name in RUNS}
    yield lambda name: results[name].result()
    pool.shutdown(wait=False, cancel_futures=True)
    for process in processes:
        process.kill()


@pytest.mark.cuda
@pytest.mark.parametrize("other", ["again", "resumed"])
def test_a_deterministic_run_gives_the_same_bits(other, run):
    assert files(run(other)) == files(run("whole"))
    assert same(final_state(run(other)), final_state(run("whole")))


def losses(directory):
    return [line["train_loss"] for line in lines(directory / "metrics.jsonl")]


@pytest.mark.cuda
def test_one_process_in_a_group_trains_as_one_without(run):
    """Over NCCL on CUDA, over gloo on the CPU."""
    assert losses(run("launched")) == pytest.approx(losses(run("whole")), rel=1e-5)


@pytest.mark.cuda
def test_a_compiled_network_learns_as_an_uncompiled_one(run):
    assert losses(run("compiled")) == pytest.approx(losses(run("plain")), rel=1e-2)


@pytest.mark.cuda
def test_float16_learns_as_float32(run, device):
    if device.type != "cuda":
        pytest.skip("float16 needs CUDA")
    skipped = sum(line["skipped_steps"] for line in lines(run("scaled") / "metrics.jsonl"))
    assert skipped <= 3, "of 12, until the scale fits"
    assert losses(run("scaled")) == pytest.approx(losses(run("plain")), rel=5e-2 if skipped else 5e-3)
