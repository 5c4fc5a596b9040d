"""Scores in words: of one checkpoint, of several, and of recorded runs beside the published numbers.

Numbers are per cent, means over runs with their sample standard deviation.
"""

import csv
import io
import itertools
import json
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from config import load_config, plain_values
from corruptions import SEVERITIES, STANDARD
from utils import UserError, in_a_line

FORMATS = ("table", "markdown", "json", "csv")
Result = Mapping[str, Any]  # the content of a results.json

# Operations of policies that resemble corruptions of the benchmark, so that it is not unseen by such policies.
RESEMBLING = ("Posterize", "Contrast", "Color", "Brightness", "Sharpness")


# What a results.json holds, as far as it is read here. KINDS: of a cell, and of the summary, of each kind of benchmark.
NUMBER = (int, float)
RESULT = {
    "checkpoint": str, "sha256": str, "model": str, "epoch": (int, type(None)), "precision": str, "config": dict,
    "benchmarks": dict,
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


class Published(NamedTuple):
    """Test errors (%): of the paper, of the re-implementation (best epoch on the test set), and of other methods."""

    paper: str = "-"
    reimplementation: str = "-"
    others: str = "-"


PUBLISHED = {  # by benchmark, data set trained on, and network
    ("clean", "cifar10", "wresnet28_10"): Published("1.90 +- 0.15", "2.35"),
    ("clean", "cifar10", "shakeshake26_2x32d"): Published("2.36 +- 0.10", "2.51"),
    ("clean", "cifar10", "shakeshake26_2x96d"): Published("1.85 +- 0.12", "2.43"),
    ("clean", "cifar10", "shakeshake26_2x112d"): Published("1.78 +- 0.05"),
    ("clean", "cifar10", "pyramid272_200"): Published("1.36 +- 0.06"),
    ("clean", "cifar100", "wresnet28_10"): Published("15.49 +- 0.18"),
    ("clean", "cifar100", "shakeshake26_2x96d"): Published("14.10 +- 0.15"),
    ("clean", "cifar100", "pyramid272_200"): Published("10.42 +- 0.20"),
    ("clean", "imagenet", "resnet50"): Published("20.60 +- 0.15"),
    ("clean", "imagenet", "resnet50d"): Published("20.00 +- 0.12"),
    ("clean", "imagenet", "resnet200"): Published("18.68 +- 0.18"),
    ("cifar10-c", "cifar10", "wresnet28_10"): Published("-", "10.41", "no augmentation 26.54"),
    ("cifar10-c", "cifar10", "shakeshake26_2x32d"): Published("-", "16.69"),
    ("cifar10-c", "cifar10", "wresnet40_2"): Published("-", "-", "AugMix with JSD 11.2"),
    ("imagenet-c", "imagenet", "resnet50"): Published("-", "-", "mCE: none 76.7, AugMix 65.3"),
}
POLICIES = {"controller": "learned", "random": "random", "none": "none"}


class Table(NamedTuple):
    """Rows of text under a header, with a title and remarks. indent: of the first column, by row, where it differs."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()


def report(results: Sequence[Result], form: str) -> str:
    """Scores of one checkpoint in full, or of several side by side with mean and standard deviation."""
    if form == "json":
        return json.dumps(results[0] if len(results) == 1 else list(results), indent=2)
    if form == "csv":
        return _csv(*_all_cells(results))
    tables = _in_full(results[0]) if len(results) == 1 else [_side_by_side(results)]
    return "\n\n".join(render(table, form) for table in tables)


def compare(paths: Iterable[Path], form: str) -> str:
    """Recorded results as rows of the README's table: runs that differ in nothing but the seed are one row.

    Published numbers stand beside official data alone, on networks that were trained on the data set itself. Raises
    UserError for a file that is no results.json.
    """
    entries = [
        (_row_key(result, name, noted), result, name, noted)
        for result in map(read_results, paths)
        for name, noted in result["benchmarks"].items()
        if noted["summary"]
    ]
    if not entries:
        raise UserError("--compare: none of the files holds a finished benchmark")
    rows, notes = [], {}
    for _, same in itertools.groupby(sorted(entries, key=lambda entry: entry[0]), key=lambda entry: entry[0]):
        _, results, names, noted = zip(*same, strict=True)
        rows.append(_row(results, names[0], noted))
        notes |= dict.fromkeys(_remarks(results[0], names[0], noted[0]))
    header = ("benchmark, network", "run", "policies", "images", "paper", "re-implementation", "others", "here", "runs")
    table = Table("Test errors (%)", header, rows, list(notes))
    if form == "json":
        return json.dumps([dict(zip(header, row, strict=True)) for row in rows], indent=2)
    return _csv(header, rows) if form == "csv" else render(table, form)


def read_results(path: Path) -> dict[str, Any]:
    """A results.json, or that of a run's directory. Raises UserError."""
    file = path / "results.json" if path.is_dir() else path
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file}: there is no such file; evaluate.py writes one beside each checkpoint") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read ({in_a_line(error)}); remove it or move it away") from None
    if not _has_shape(content, RESULT) or not all(map(_is_benchmark, content["benchmarks"].values())):
        raise UserError(f"{file}: holds no results of this version of evaluate.py; remove it or move it away")
    config = load_config(None, {field: (str(file), value) for field, value in content["config"].items()})
    return content | {"config": plain_values(config)}


def _is_benchmark(noted: Any) -> bool:
    if not _has_shape(noted, BENCHMARK) or noted["kind"] not in KINDS:
        return False
    cell, summary = KINDS[noted["kind"]]
    finished = bool(noted["cells"]) and _has_shape(noted["summary"], summary)
    return _has_shape(noted["cells"], [cell]) and (noted["summary"] is None or finished)


def _has_shape(value: Any, shape: Any) -> bool:
    """shape: a type or several, a list with the shape of all items, or a dict with those of the keys that must be."""
    if isinstance(shape, dict):
        return isinstance(value, dict) and all(k in value and _has_shape(value[k], of) for k, of in shape.items())
    if isinstance(shape, list):
        return isinstance(value, list) and all(_has_shape(item, shape[0]) for item in value)
    return isinstance(value, shape)


def headline(name: str, summary: Mapping[str, Any]) -> float:
    """The one number that a benchmark is quoted by, an error in 0..1."""
    by_kind = ("mce", "mean_corruption_error", "mean_flip_probability", "error")
    return next(summary[key] for key in by_kind if key in summary)


def _in_full(result: Result) -> list[Table]:
    trained = f", after epoch {result['epoch']} of {result['config']['epochs']}" if result["epoch"] is not None else ""
    title = f"{result['checkpoint']}: {result['model']}{trained}, scored in {result['precision']}"
    rows, tables = [], []
    for name, noted in result["benchmarks"].items():
        if noted["kind"] == "test set":
            (cell,) = noted["cells"]
            top5 = "-" if cell["top5"] is None else _percent(cell["top5"])
            numbers = (_percent(cell["error"]), _percent(cell["top1"]), top5, f"{cell['loss']:.4f}")
            rows.append((name, noted["source"], f"{cell['images']:,}", *numbers, _percent(cell["calibration_error"])))
            tables.append(_by_class(result, name, noted))
        else:
            tables.append(_by_severity(name, noted) if noted["kind"] == "corruptions" else _by_sequence(name, noted))
    if rows:
        header = ("test set", "source", "images", "error", "top-1", "top-5", "loss", "calibration error")
        tables.insert(0, Table(title, header, rows))
    else:
        tables[0] = tables[0]._replace(title=f"{title}\n\n{tables[0].title}")
    tables[-1] = tables[-1]._replace(notes=[*tables[-1].notes, *_all_remarks(result)])
    return tables


def _by_class(result: Result, name: str, noted: Mapping[str, Any]) -> Table:
    """Top-1 by class; of more than twenty classes the ten with the most errors."""
    (cell,) = noted["cells"]
    names = noted["classes"] or result["classes"] or [f"class {i}" for i in range(len(cell["class_images"]))]
    rows = [
        (correct / images, class_name, images)
        for class_name, images, correct in zip(names, cell["class_images"], cell["class_correct"], strict=True)
        if images
    ]
    title = f"{name}, by class"
    if len(rows) > 20:
        title = f"{name}, the ten weakest of {len(rows)} classes"
        rows = sorted(rows)[:10]
    return Table(title, ("class", "top-1", "images"), [(c, _percent(share), f"{n:,}") for share, c, n in rows])


def _by_severity(name: str, noted: Mapping[str, Any]) -> Table:
    cells = {(cell["part"], cell["severity"]): cell["error"] for cell in noted["cells"]}
    summary, images = noted["summary"], noted["cells"][0]["images"]
    rows = [
        (part, *(_percent(cells[part, severity]) for severity in SEVERITIES), _percent(mean))
        for part, mean in summary["error"].items()
    ]
    counted = [row for row in rows if row[0] in STANDARD]
    means = [
        sum(cells[part, severity] for part in summary["error"] if part in STANDARD) / len(STANDARD)
        for severity in SEVERITIES
    ]
    mean_row = ("mean of the fifteen", *map(_percent, means), _percent(summary["mean_corruption_error"]))
    extra = [(f"({row[0]})", *row[1:]) for row in rows if row[0] not in STANDARD]
    notes = ["In brackets: extra corruptions, not in the mean."] if extra else []
    notes.append(f"Mean calibration error {_percent(summary['mean_calibration_error'])}.")
    if "mce" in summary:
        notes.append(f"mCE, normalised by AlexNet: {_percent(summary['mce'])}.")
    title = f"{name}: error (%) by severity, {len(noted['cells'])} x {images:,} images, {_origin(noted)}"
    return Table(title, ("corruption", *map(str, SEVERITIES), "mean"), [*counted, mean_row, *extra], notes)


def _by_sequence(name: str, noted: Mapping[str, Any]) -> Table:
    rows = [
        (cell["part"], f"{cell['sequences']:,}", str(cell["frames"]), _percent(cell["flip_probability"]))
        for cell in noted["cells"]
    ]
    mean = ("mean", "", "", _percent(noted["summary"]["mean_flip_probability"]))
    header = ("perturbation", "sequences", "frames", "flip probability")
    return Table(f"{name}: flip probability (%), {_origin(noted)}", header, [*rows, mean])


def _origin(noted: Mapping[str, Any]) -> str:
    return f"{noted['source']} data (checked by {noted['checked_by']})"


def _side_by_side(results: Sequence[Result]) -> Table:
    quantities = [_quantities(result) for result in results]
    names = dict.fromkeys(name for of_run in quantities for name in of_run)
    rows = [
        (name, *(_percent(of_run[name]) if name in of_run else "-" for of_run in quantities), _over_runs(values))
        for name in names
        for values in [[of_run[name] for of_run in quantities if name in of_run]]
    ]
    notes = [f"run {i}: {result['checkpoint']}" for i, result in enumerate(results, start=1)]
    notes += dict.fromkeys(itertools.chain.from_iterable(map(_all_remarks, results)))
    header = ("per cent", *(f"run {i}" for i in range(1, len(results) + 1)), "mean +- std")
    return Table(f"{len(results)} checkpoints, scored in {results[0]['precision']}", header, rows, notes)


def _quantities(result: Result) -> dict[str, float]:
    """Name with the source of its images -> share; so that numbers of different sources stand in different rows."""
    quantities = {}
    for name, noted in result["benchmarks"].items():
        prefix = f"{name} ({noted['source']})"
        for key, value in noted["summary"].items():
            if isinstance(value, dict):
                quantities |= {f"{prefix} {part}": of_part for part, of_part in value.items()}
            elif value is not None and key not in ("top1", "loss"):
                quantities[f"{prefix} {key.replace('_', ' ')}"] = value
    return quantities


def _over_runs(values: Sequence[float]) -> str:
    if len(values) == 1:
        return _percent(values[0])
    return f"{_percent(statistics.mean(values))} +- {_percent(statistics.stdev(values))}"


def _row_key(result: Result, name: str, noted: Mapping[str, Any]) -> tuple[str, ...]:
    """Equal for results that may be averaged: of the same benchmark and images, settings and precision."""
    settings = {key: value for key, value in result["config"].items() if key not in ("seed", "dataroot")}
    ours = result["epoch"] is not None
    network = (result["config"]["dataset"], result["model"])
    return (name, *network, noted["source"], noted["fingerprint"], result["precision"], str(ours), json.dumps(settings))


def _row(results: Sequence[Result], name: str, noted: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    config = results[0]["config"]
    ours = results[0]["epoch"] is not None
    comparable = noted[0]["source"] == "official" and config["train_size"] is None and ours
    published = PUBLISHED.get((name, config["dataset"], results[0]["model"]), Published())
    images = noted[0]["cells"][0]["images"]
    trained_on = {"folder": "own images", "shapes": "embedded shapes"}.get(config["dataset"], config["dataset"])
    return (
        f"{name} ({trained_on}), {results[0]['model']}",
        re.sub(r"_\d+$", "", Path(results[0]["checkpoint"]).parent.name) if ours else results[0]["checkpoint"],
        f"{POLICIES[config['policy']]}, M = {config['M']}" if ours else "-",
        f"{noted[0]['source']}, {images:,}",
        *(published if comparable else Published()),
        _over_runs([headline(name, of_run["summary"]) for of_run in noted]),
        str(len(results)),
    )


def _all_remarks(result: Result) -> list[str]:
    remarks = (_remarks(result, name, noted) for name, noted in result["benchmarks"].items())
    return list(dict.fromkeys(itertools.chain.from_iterable(remarks)))


def _remarks(result: Result, name: str, noted: Mapping[str, Any]) -> list[str]:
    """What must be said beside a number."""
    remarks = [f"{name}: {noted['note']}."] if noted.get("note") else []
    config = result["config"]
    overlap = [op for op in RESEMBLING if op in config["ops"]]
    if noted["kind"] == "corruptions" and result["epoch"] is not None and config["policy"] != "none" and overlap:
        remarks.append(
            f"{name}: the policies hold {', '.join(overlap)}, which resemble corruptions; AugMix leaves out such "
            "operations. Train without them (ops) for a comparison."
        )
    return remarks


def _percent(share: float) -> str:
    return f"{100 * share:.2f}"


def _all_cells(results: Sequence[Result]) -> tuple[list[str], list[list[Any]]]:
    """Header and rows: a row for each cell, a column for each plain number."""
    cells = [
        {"checkpoint": result["checkpoint"], "benchmark": name, "source": noted["source"], **cell}
        for result in results
        for name, noted in result["benchmarks"].items()
        for cell in noted["cells"]
    ]
    plain = (key for cell in cells for key, value in cell.items() if not isinstance(value, (list, dict)))
    header = list(dict.fromkeys(plain))
    return header, [[cell.get(name, "") for name in header] for cell in cells]


def _csv(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    return text.getvalue().rstrip("\n")


def render(table: Table, form: str = "table") -> str:
    """A table as aligned text or as Markdown."""
    if form == "markdown":
        lines = [f"| {' | '.join(row)} |" for row in (table.header, ["---"] * len(table.header), *table.rows)]
        return "\n".join([table.title, "", *lines, *(f"\n{note}" for note in table.notes)])
    columns = []
    for header, *cells in zip(table.header, *table.rows, strict=True):
        width = max(map(len, (header, *cells)))
        of_numbers = all(re.fullmatch(r"[-+.,\d ]*", cell) for cell in cells)
        columns.append([cell.rjust(width) if of_numbers else cell.ljust(width) for cell in (header, *cells)])
    lines = ("  ".join(row).rstrip() for row in zip(*columns, strict=True))
    return "\n".join([table.title, "", *lines, *table.notes])
