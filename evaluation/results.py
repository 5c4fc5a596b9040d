"""results.json: the scores of a checkpoint, saved after every subset, and checked when they are read.

The file records what was scored and how, and under "benchmarks" for each one where its images come from, its "cells",
one for each subset that has been scored (a test set, a corruption at a severity, or a kind of sequence), and, once all
subsets have been scored, their means.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from config import load_config, plain_values
from evaluation.corruptions import STANDARD
from evaluation.metrics import summarise
from utils import UserError, first_line, has_shape, warn, write_text

if TYPE_CHECKING:
    from evaluation.benchmarks import Benchmark, Subset  # slow to import; who only reads results does not need them

# Scores computed with other versions of these, or on another device, are computed again.
VERSIONS = ("torch", "torchvision", "numpy", "pillow", "device")

# Fields of a Benchmark that its record repeats.
COPIED = ("kind", "source", "checked_by", "note", "fingerprint", "classes")

# The entries of a results.json that are read here. KINDS: those of a cell and of the summary, by kind of benchmark.
NUMBER = (int, float)
RESULT = {
    "checkpoint": str, "sha256": str, "model": str, "epoch": (int, type(None)), "precision": str,
    "scored_with": {"dataset": str}, "config": (dict, type(None)), "benchmarks": dict,
}  # fmt: skip
BENCHMARK = {
    "kind": str, "source": str, "checked_by": str, "note": str, "fingerprint": str, "environment": dict, "cells": list,
    "summary": (dict, type(None)),
}  # fmt: skip
CELL = {"part": str, "severity": (int, type(None)), "images": int}
SCORED = CELL | {"error": NUMBER, "loss": NUMBER, "calibration_error": NUMBER}
KINDS = {
    "test set": (SCORED | {"top1": NUMBER, "class_images": [int], "class_correct": [int]}, {"error": NUMBER}),
    "corruptions": (SCORED, {"error": dict.fromkeys(STANDARD, NUMBER), "mean_corruption_error": NUMBER}),
    "perturbations": (CELL | {"flip_probability": NUMBER}, {"mean_flip_probability": NUMBER}),
}


@dataclass
class Results:
    """The content of a results.json, the same in every process; the main process writes it after every subset."""

    file: Path
    head: dict[str, Any]
    environment: dict[str, Any]
    writes: bool
    benchmarks: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def plots(self) -> Path:
        """The folder of plots and TensorBoard events: "evaluation" beside results.json, or NAME.evaluation."""
        name = self.file.stem.removesuffix("results")
        return self.file.with_name(f"{name.removesuffix('.')}.evaluation" if name else "evaluation")

    def take_over(self, requested: Sequence["Benchmark"], *, overwrite: bool, replace: bool) -> None:
        """Keep the file's scores with the same checkpoint, precision and settings, and for the same images.

        overwrite: score the requested benchmarks again in any case. replace: scores of weights that no longer exist may
        be lost. Raises UserError where other scores would be lost, and where the file cannot be written.
        """
        if not os.access(self.file.parent, os.W_OK):
            raise UserError(f"{self.file}: cannot be written there; name another place with --output")
        if not self.file.exists():
            return
        remedy = "name another file with --output, or replace it with --overwrite"
        try:
            before = read_results(self.file)
        except UserError as error:
            if overwrite:
                return
            raise UserError(f"{error}\n{remedy}") from None
        differing = [key for key in ("sha256", "precision", "scored_with") if before[key] != self.head[key]]
        if "sha256" in differing and replace:
            warn(f"{self.file}: holds scores of earlier weights; it is replaced")
        elif differing and not overwrite:
            raise UserError(f"{self.file}: holds scores with another {' and '.join(differing)}\n{remedy}")
        if not differing:
            current = {benchmark.name: benchmark for benchmark in requested}
            self.benchmarks = {
                name: record
                for name, record in before["benchmarks"].items()
                if name not in current or (not overwrite and self._is_valid(record, current[name]))
            }

    def share(self, benchmarks: dict[str, dict[str, Any]], requested: Sequence["Benchmark"]) -> None:
        """Take the scores that the main process has kept, and add an empty record for each other benchmark."""
        self.benchmarks = benchmarks
        for benchmark in requested:
            copied = {name: getattr(benchmark, name) for name in COPIED}
            empty = copied | {"environment": self.environment, "cells": [], "summary": None, "finished": None}
            self.benchmarks.setdefault(benchmark.name, empty)

    def of(self, benchmark: "Benchmark") -> dict[str, Any]:
        return self.benchmarks[benchmark.name]

    def unscored(self, benchmark: "Benchmark") -> "list[Subset]":
        scored = {(cell["part"], cell["severity"]) for cell in self.of(benchmark)["cells"]}
        return [subset for subset in benchmark.subsets if (subset.part, subset.severity) not in scored]

    def add(self, benchmark: "Benchmark", subset: "Subset", scores: dict[str, Any], seconds: float) -> None:
        """Record a subset's scores; after a benchmark's last subset, also its means and the time of day."""
        record = self.of(benchmark)
        cell = {"part": subset.part, "severity": subset.severity, "images": subset.images}
        record["cells"].append(cell | scores | {"seconds": round(seconds, 3)})
        if not self.unscored(benchmark):
            record["summary"] = summarise(benchmark.name, benchmark.kind, record["cells"])
            record["finished"] = datetime.now(UTC).isoformat(timespec="seconds")
        if self.writes:
            write_text(self.file, json.dumps(self.head | {"benchmarks": self.benchmarks}, indent=2) + "\n")

    def _is_valid(self, record: dict[str, Any], benchmark: "Benchmark") -> bool:
        """Whether it is for the same images and versions and, unless it is complete, scored by the same source."""
        must_be_same = VERSIONS if record["summary"] else (*VERSIONS, "git_revision")
        same = all(record["environment"].get(key) == self.environment[key] for key in must_be_same)
        return same and record["fingerprint"] == benchmark.fingerprint


def read_results(path: Path) -> dict[str, Any]:
    """The content of a results.json, or of the one in a run directory. Raises UserError."""
    file = path / "results.json" if path.is_dir() else path
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file}: there is no such file; evaluate.py writes one beside each checkpoint") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: cannot be read as results of evaluate.py ({first_line(error)})") from None
    if not has_shape(content, RESULT) or not all(map(_is_benchmark, content["benchmarks"].values())):
        raise UserError(f"{file}: does not hold results of this version of evaluate.py")
    if content["config"] is not None:
        config = load_config(None, {field: (str(file), value) for field, value in content["config"].items()})
        content["config"] = plain_values(config)
    return content


def _is_benchmark(record: Any) -> bool:
    if not has_shape(record, BENCHMARK) or record["kind"] not in KINDS:
        return False
    cell, summary = KINDS[record["kind"]]
    is_complete = bool(record["cells"]) and has_shape(record["summary"], summary)
    return has_shape(record["cells"], [cell]) and (record["summary"] is None or is_complete)
