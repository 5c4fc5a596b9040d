"""results.json: what has been scored of a checkpoint, kept on disk cell by cell, and read back with care.

A file says at its head what was scored and how, and under "benchmarks" for each one where its images come from, its
cells (a test set, or a corruption at a severity, or a kind of sequence) and, when all are there, their means.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from config import load_config, plain_values
from evaluation.benchmarks import Benchmark, Subset
from evaluation.corruptions import STANDARD
from evaluation.metrics import summarise
from utils import UserError, first_line, has_shape, warn, write_text

# Scores of other versions of these, or on another device, are not those of now.
VERSIONS = ("torch", "torchvision", "numpy", "pillow", "device")

# What a results.json holds, as far as it is read here. KINDS: of a cell, and of the summary, of each kind of benchmark.
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
    """The content of a results.json, the same in every process; one of them writes it after every cell."""

    file: Path
    head: dict[str, Any]
    environment: dict[str, Any]
    writes: bool
    benchmarks: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def pictures(self) -> Path:
        """Where pictures and TensorBoard's events go: "evaluation" beside results.json, named alike beside others."""
        name = self.file.stem.removesuffix("results")
        return self.file.with_name(f"{name.removesuffix('.')}.evaluation" if name else "evaluation")

    def take_over(self, asked: Sequence[Benchmark], *, overwrite: bool, replace: bool) -> None:
        """Keep what the file says of the same checkpoint, precision and settings, and is still true of those asked for.

        overwrite: score anew what is asked for, whatever the file says. replace: scores of weights that are no longer
        there may go. Raises UserError where other scores would be lost, and where the file cannot be written.
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
            warn(f"{self.file}: is of other weights, gone since; it is written anew")
        elif differing and not overwrite:
            raise UserError(f"{self.file}: holds scores with another {' and '.join(differing)}\n{remedy}")
        if not differing:
            current = {benchmark.name: benchmark for benchmark in asked}
            self.benchmarks = {
                name: noted
                for name, noted in before["benchmarks"].items()
                if name not in current or (not overwrite and self._still_true(noted, current[name]))
            }

    def share(self, benchmarks: dict[str, dict[str, Any]], asked: Sequence[Benchmark]) -> None:
        """Begin with what another process has taken over, and with room for what is asked for."""
        self.benchmarks = benchmarks
        for benchmark in asked:
            self.benchmarks.setdefault(benchmark.name, self._empty(benchmark))

    def of(self, benchmark: Benchmark) -> dict[str, Any]:
        return self.benchmarks[benchmark.name]

    def lacking(self, benchmark: Benchmark) -> list[Subset]:
        """The cells that have not been scored."""
        scored = {(cell["part"], cell["severity"]) for cell in self.of(benchmark)["cells"]}
        return [cell for cell in benchmark.cells if (cell.part, cell.severity) not in scored]

    def add(self, benchmark: Benchmark, record: dict[str, Any], seconds: float) -> None:
        """Note a cell; after a benchmark's last one, its means and the time of day."""
        noted = self.of(benchmark)
        noted["cells"].append(record | {"seconds": round(seconds, 3)})
        if not self.lacking(benchmark):
            noted["summary"] = summarise(benchmark.name, benchmark.kind, noted["cells"])
            noted["finished"] = datetime.now(UTC).isoformat(timespec="seconds")
        if self.writes:
            write_text(self.file, json.dumps(self.head | {"benchmarks": self.benchmarks}, indent=2) + "\n")

    def _still_true(self, noted: dict[str, Any], benchmark: Benchmark) -> bool:
        """Of the same images and versions; and, as long as cells are lacking, scored by the same source."""
        must_be_same = VERSIONS if noted["summary"] else (*VERSIONS, "git_revision")
        same = all(noted["environment"].get(key) == self.environment[key] for key in must_be_same)
        return same and noted["fingerprint"] == benchmark.fingerprint

    def _empty(self, benchmark: Benchmark) -> dict[str, Any]:
        return {
            "kind": benchmark.kind,
            "source": benchmark.source,
            "checked_by": benchmark.checked_by,
            "note": benchmark.note,
            "fingerprint": benchmark.fingerprint,
            "classes": benchmark.classes,
            "environment": self.environment,
            "cells": [],
            "summary": None,
            "finished": None,
        }


def read_results(path: Path) -> dict[str, Any]:
    """A results.json, or that of a run's directory. Raises UserError."""
    file = path / "results.json" if path.is_dir() else path
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file}: there is no such file; evaluate.py writes one beside each checkpoint") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: cannot be read as results of evaluate.py ({first_line(error)})") from None
    if not has_shape(content, RESULT) or not all(map(_is_benchmark, content["benchmarks"].values())):
        raise UserError(f"{file}: holds no results of this version of evaluate.py")
    if content["config"] is not None:
        config = load_config(None, {field: (str(file), value) for field, value in content["config"].items()})
        content["config"] = plain_values(config)
    return content


def _is_benchmark(noted: Any) -> bool:
    if not has_shape(noted, BENCHMARK) or noted["kind"] not in KINDS:
        return False
    cell, summary = KINDS[noted["kind"]]
    finished = bool(noted["cells"]) and has_shape(noted["summary"], summary)
    return has_shape(noted["cells"], [cell]) and (noted["summary"] is None or finished)
