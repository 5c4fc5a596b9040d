"""Whether results on a device are exact: every operation compared with Pillow, and the tests marked cuda.

Shape suffixes: B images; C, H, W as usual.
"""

import contextlib
import io
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.datasets import CIFAR10

sys.path.insert(0, str(Path(__file__).parent.parent))

from augment import to_pillow
from measuring import LONGEST_REPORT, ROOT, Report
from parts.perimage import OPERATIONS, Operation, run

from augmentations import OPS, Op, Plan, apply, apply_op
from datasets.imagefiles import IMAGE_SUFFIXES, FitSquare, ImageFiles
from datasets.shapes import draw_shapes
from utils import UserError, keyed_generator

TESTS = ROOT / "tests"


def compare_with_pillow(dataroot: Path | None, side: int, device: torch.device) -> tuple[str, dict[str, Any]]:
    """How many values differ from Pillow's, over all levels and signs of the operations in parts/perimage.py."""
    images_BCHW, where = some_images(dataroot, side)
    compared = [op for op in OPS if op.name in OPERATIONS]
    differing = {op.name: sum(differences(op, images_BCHW, device)) for op in compared}
    variants = sum(len(magnitudes_of(op)) for op in compared)
    values, wrong = variants * images_BCHW.numel(), sum(differing.values())
    measured = {"images": len(images_BCHW), "of": where, "variants": variants, "values": values}
    return f"{wrong:,} of {values:,} values differ", measured | {"differing": {k: v for k, v in differing.items() if v}}


def magnitudes_of(op: Op) -> list[float]:
    """At every level, with both signs where the operation is signed; [0.0] for one without levels."""
    levels = [op.magnitude(level) for level in range(10)] if op.low is not None else [0.0]
    return [sign * magnitude for magnitude in levels for sign in ((1, -1) if op.signed else (1,))]


def differences(op: Op, images_BCHW: Tensor, device: torch.device) -> Iterator[int]:
    """How many values on the device differ from Pillow's, for each magnitude."""
    B, on_device, pillow_B = len(images_BCHW), images_BCHW.to(device), [to_pillow(one) for one in images_BCHW]
    partner_B1, centre_B12 = torch.arange(B).roll(1)[:, None], torch.rand(B, 1, 2, generator=keyed_generator("centre"))
    for magnitude in magnitudes_of(op):
        magnitude_B1 = torch.full((B, 1), magnitude, dtype=torch.float64)
        plan = Plan(torch.full((B, 1), OPS.index(op)), magnitude_B1, partner_B1, centre_B12.double())
        needed = {"partner": on_device.roll(1, 0), "centre": plan.centre_BK2[:, 0]}
        alone = apply_op(on_device, op.name, magnitude_B1[:, 0], **({op.needs: needed[op.needs]} if op.needs else {}))
        extra_B = {"partner": pillow_B[-1:] + pillow_B[:-1], "centre": plan.centre_BK2[:, 0].tolist()}.get(op.needs)
        theirs_B = [
            run(image, [Operation(op.name, magnitude, extra_B and extra_B[b])]) for b, image in enumerate(pillow_B)
        ]
        expected_BCHW = torch.from_numpy(np.stack([np.asarray(image) for image in theirs_B])).permute(0, 3, 1, 2)
        wrong = (alone.cpu() != expected_BCHW) | (apply(on_device, plan).cpu() != expected_BCHW)
        yield int(wrong.sum())


def some_images(dataroot: Path | None, side: int, count: int = 8) -> tuple[Tensor, str]:
    """uint8 (count, 3, side, side), and what kind of images they are."""
    if dataroot is None:
        images_BCHW, where = draw_shapes("test")[0][:count], "embedded shapes"
    elif is_cifar10(dataroot):
        images_BCHW = torch.from_numpy(CIFAR10(dataroot, train=False).data[:count]).permute(0, 3, 1, 2)
        where = "real images"
    else:
        files = sorted(path for path in dataroot.glob("train/*/*") if path.suffix.lower() in IMAGE_SUFFIXES)
        chosen = files[:: max(1, len(files) // count)][:count]
        if not chosen:
            raise UserError(f"{dataroot / 'train'}: holds no images in class folders")
        reading = ImageFiles(chosen, FitSquare(side)).batches([torch.arange(len(chosen))], 0, 0)
        return next(iter(reading))[0].contiguous(), "real images"
    if images_BCHW.shape[-1] != side:
        images_BCHW = F.interpolate(images_BCHW.float(), (side, side), mode="bilinear").to(torch.uint8)
    return images_BCHW.contiguous(), where


def is_cifar10(root: Path) -> bool:
    return (root / "cifar-10-batches-py").is_dir()


def run_marked_tests(device: str, report: Report) -> None:
    """Run the tests marked cuda on the device and report each."""
    try:
        import pytest
    except ImportError:
        report("tests", "skipped, pytest is not installed (requirements-dev.txt)", failed="pytest is not installed")
        return
    files = [str(file) for file in sorted(TESTS.rglob("test_*.py")) if "mark.cuda" in file.read_text(encoding="utf-8")]
    # A warning of another version, or a file that cannot be imported, must not stop the other tests.
    words = ["-m", "cuda", "--device", device, "-W", "default", "--continue-on-collection-errors", *files]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        status = pytest.main(["-q", "-p", "no:cacheprovider", *words], plugins=[Outcomes(report)])
    if status == pytest.ExitCode.INTERRUPTED:
        raise KeyboardInterrupt
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        reason = f"pytest ended with status {int(status)}"
        report("tests", f"failed: {reason}", failed=reason, report=printed.getvalue()[-LONGEST_REPORT:])


class Outcomes:
    """A pytest plugin that reports every test when it ends, and prints those that do not pass."""

    def __init__(self, report: Report):
        self.report = report

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            self._send(report, took=round(report.duration, 1))

    def pytest_collectreport(self, report: Any) -> None:
        if report.outcome == "failed":
            self._send(report)

    def _send(self, report: Any, **measured: Any) -> None:
        if report.outcome == "failed":
            reasons = re.findall(r"^E +(.+)$", report.longreprtext, re.MULTILINE)
            measured["failed"] = reasons[0] if reasons else report.longreprtext.splitlines()[-1]
            measured["report"] = report.longreprtext[-LONGEST_REPORT:]
        words = "" if report.outcome == "passed" else report.outcome
        self.report(report.nodeid.removeprefix("tests/"), words, outcome=report.outcome, **measured)
