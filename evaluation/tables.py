"""Tables of scores: of one checkpoint, of several, and of recorded runs beside the published numbers.

Numbers are per cent, means over runs with their sample standard deviation.
"""

import csv
import dataclasses
import io
import itertools
import json
import operator
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from config import FROM_A_FILE, PER_IMAGE, ROOT, Config, load_config, plain_values
from evaluation.benchmarks import BENCHMARKS
from evaluation.corruptions import SEVERITIES, STANDARD
from evaluation.generated import generated_folder
from evaluation.results import read_results
from evaluation.text_table import Table, render
from utils import UserError, printable

FORMATS = ("table", "markdown", "json", "csv")
Result = Mapping[str, Any]  # the content of a results.json

# Operations that resemble corruptions of the benchmarks: policies with them have seen such images in training.
RESEMBLING = ("Posterize", "Contrast", "Color", "Brightness", "Sharpness")


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
    ("cifar10-c", "cifar10", "resnext29_4x32d"): Published("-", "-", "AugMix with JSD 10.9"),
    ("imagenet-c", "imagenet", "resnet50"): Published("-", "-", "mCE: none 76.7, AugMix 65.3"),
}
TRANSFERRED = {  # the same, with the policies that ResNet-50 has learned on ImageNet
    ("clean", "cifar10", "wresnet28_10"): Published("2.45 +- 0.13"),
    ("clean", "cifar100", "wresnet28_10"): Published("16.48 +- 0.15"),
    ("clean", "imagenet", "resnet50d"): Published("20.20 +- 0.05"),
    ("clean", "imagenet", "resnet200"): Published("19.05 +- 0.10"),
}
# Settings that say how a run is computed, not what; besides those that may change in a resumed run.
FREE = ("seed", "amp", "amp_dtype", "tf32", "deterministic", "accumulate", "eval_every", "ema")


def report(results: Sequence[Result], form: str) -> str:
    """Scores of one checkpoint in full, or of several side by side with mean and standard deviation.

    Those of averaged weights come after the others, in tables of their own.
    """
    if form == "json":
        return json.dumps(results[0] if len(results) == 1 else list(results), indent=2)
    if form == "csv":
        return _csv(*_all_cells(results))
    tables = []
    for of_averages in (False, True):
        own = [result for result in results if _is_average(result) == of_averages]
        tables += _full_tables(own[0]) if len(own) == 1 else [_side_by_side(own)] if own else []
    return "\n\n".join(render(table, form) for table in tables)


def compare(paths: Iterable[Path], form: str) -> str:
    """Recorded results as rows of a table: runs that differ in the seed alone are one row.

    Published numbers are shown only beside runs with the settings of the conf for them. Raises UserError for a file
    that is not a results.json.
    """
    different = {  # copies of a result count once
        (_row_key(result, name, record), result["sha256"]): (result, name, record)
        for result in map(read_results, paths)
        for name, record in result["benchmarks"].items()
        if record["summary"]
    }
    entries = [(key, *found) for (key, _), found in different.items()]
    if not entries:
        raise UserError("--compare: none of the files holds a finished benchmark")
    rows, notes = [], {}
    by_key = operator.itemgetter(0)
    for _, same in itertools.groupby(sorted(entries, key=by_key), by_key):
        _, results, names, records = zip(*same, strict=True)
        rows.append(_row(results, names[0], records))
        notes |= dict.fromkeys(_notes(results[0], names[0], records[0]))
        _, differences = _published(results[0], names[0], records[0])
        if differences:
            run = Path(results[0]["checkpoint"]).parent.name
            notes[f"{names[0]}, {run}: no published number, since the run {differences}."] = None
    header = ("benchmark, network", "run", "policies", "images", "paper", "re-implementation", "others", "here", "runs")
    table = Table("Per cent; several runs: mean and standard deviation", header, rows, list(notes))
    if form == "json":
        return json.dumps([dict(zip(header, row, strict=True)) for row in rows], indent=2)
    return _csv(header, rows) if form == "csv" else render(table, form)


def benchmark_table(config: Config) -> Table:
    """All benchmarks besides the test set, where they belong, and which of them are there."""
    rows = []
    for spec in BENCHMARKS[1:]:
        root = Path(config.dataroot)
        folder = generated_folder(config) if spec.name == "generated-c" else spec.found_in(root) or root / spec.folder
        found = "yes" if (folder / spec.marker).exists() else "no"
        rows.append((spec.name, spec.family or "any", found, str(folder), spec.origin))
    header = ("benchmark", "classes of", "found", "folder", "origin")
    return Table(f"Benchmarks, and which of them are in {config.dataroot}", header, rows)


def headline(summary: Mapping[str, Any]) -> tuple[str, float]:
    """The main number of a benchmark, in 0..1, and its name."""
    key = next(key for key in ("mce", "mean_corruption_error", "mean_flip_probability", "error") if key in summary)
    return "mCE" if key == "mce" else key.replace("_", " "), summary[key]


def _full_tables(result: Result) -> list[Table]:
    trained = f", after epoch {result['epoch']} of {result['config']['epochs']}" if result["config"] else ""
    averaged = ", averaged weights" if _is_average(result) else ""
    title = f"{result['checkpoint']}: {result['model']}{trained}{averaged}, scored in {result['precision']}"
    rows, tables = [], []
    for name, record in result["benchmarks"].items():
        if record["kind"] == "test set":
            (cell,) = record["cells"]
            top5 = "-" if cell["top5"] is None else _percent(cell["top5"])
            numbers = (_percent(cell["error"]), _percent(cell["top1"]), top5, f"{cell['loss']:.4f}")
            rows.append((name, _source(record), f"{cell['images']:,}", *numbers, _percent(cell["calibration_error"])))
            tables.append(_by_class(result, name, record))
        else:
            tables.append(_by_severity(name, record) if record["kind"] == "corruptions" else _by_sequence(name, record))
    if rows:
        header = ("test set", "data", "images", "error", "top-1", "top-5", "loss", "calibration error")
        tables.insert(0, Table(title, header, rows))
    else:
        tables[0] = tables[0]._replace(title=f"{title}\n\n{tables[0].title}")
    tables[-1] = tables[-1]._replace(notes=[*tables[-1].notes, *_all_notes(result)])
    return tables


def _by_class(result: Result, name: str, record: Mapping[str, Any]) -> Table:
    """Top-1 by class; of more than twenty classes the ten with the most errors."""
    (cell,) = record["cells"]
    names = record["classes"] or result["classes"] or [f"class {i}" for i in range(len(cell["class_images"]))]
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


def _by_severity(name: str, record: Mapping[str, Any]) -> Table:
    errors = {(cell["part"], cell["severity"]): cell["error"] for cell in record["cells"]}
    summary, images = record["summary"], record["cells"][0]["images"]
    counted, extra = [], []
    for part, mean in summary["error"].items():
        shares = (*(errors[part, severity] for severity in SEVERITIES), mean)
        label, rows = (part, counted) if part in STANDARD else (f"({part})", extra)
        rows.append((label, *map(_percent, shares)))
    means = [sum(errors[part, severity] for part in STANDARD) / len(STANDARD) for severity in SEVERITIES]
    counted.append(("mean of the fifteen", *map(_percent, (*means, summary["mean_corruption_error"]))))
    notes = ["In brackets: extra corruptions, not in the mean."] if extra else []
    notes.append(f"Mean calibration error {_percent(summary['mean_calibration_error'])}.")
    if "mce" in summary:
        notes.append(f"mCE, normalised by AlexNet: {_percent(summary['mce'])}.")
    title = f"{name}: error (%) by severity, {len(record['cells'])} x {images:,} images, {_source(record)}"
    return Table(title, ("corruption", *map(str, SEVERITIES), "mean"), [*counted, *extra], notes)


def _by_sequence(name: str, record: Mapping[str, Any]) -> Table:
    rows = [
        (cell["part"], f"{cell['sequences']:,}", str(cell["frames"]), _percent(cell["flip_probability"]))
        for cell in record["cells"]
    ]
    mean = ("mean", "", "", _percent(record["summary"]["mean_flip_probability"]))
    header = ("perturbation", "sequences", "frames", "flip probability")
    return Table(f"{name}: flip probability (%), {_source(record)}", header, [*rows, mean])


def _source(record: Mapping[str, Any]) -> str:
    return f"{record['source']} (checked by {record['checked_by']})"


def _side_by_side(results: Sequence[Result]) -> Table:
    """A column for each checkpoint, and a row for each quantity of the same images."""
    quantities = [_quantities(result) for result in results]
    rows = []
    for key in dict.fromkeys(key for of_run in quantities for key in of_run):
        values = [of_run[key] for of_run in quantities if key in of_run]
        of_runs = (_percent(of_run[key]) if key in of_run else "-" for of_run in quantities)
        rows.append((key[0], *of_runs, _over_runs(values)))
    notes = [f"run {i}: {result['checkpoint']}" for i, result in enumerate(results, start=1)]
    notes += dict.fromkeys(itertools.chain.from_iterable(map(_all_notes, results)))
    header = ("per cent", *(f"run {i}" for i in range(1, len(results) + 1)), "mean +- std")
    what = "checkpoints, averaged weights" if _is_average(results[0]) else "checkpoints"
    return Table(f"{len(results)} {what}, scored in {results[0]['precision']}", header, rows, notes)


def _quantities(result: Result) -> dict[tuple[str, str], float]:
    """(name with the source of its images, fingerprint of the images) -> share."""
    quantities = {}
    for name, record in result["benchmarks"].items():
        prefix = f"{name} ({record['source']})"
        for key, value in record["summary"].items():
            if isinstance(value, dict):
                quantities |= {(f"{prefix} {part}", record["fingerprint"]): share for part, share in value.items()}
            elif value is not None and key not in ("top1", "loss"):
                quantities[f"{prefix} {key.replace('_', ' ')}", record["fingerprint"]] = value
    return quantities


def _over_runs(values: Sequence[float]) -> str:
    if len(values) == 1:
        return _percent(values[0])
    return f"{_percent(statistics.mean(values))} +- {_percent(statistics.stdev(values))}"


def _row_key(result: Result, name: str, record: Mapping[str, Any]) -> tuple[str, ...]:
    """Equal for results that may be averaged: on the same images, from runs that differ in the seed alone."""
    if result["config"] is None:
        trained = result["sha256"]
    else:
        own = {field.name for field in dataclasses.fields(Config) if field.metadata["may_change"]} | {"seed"}
        settings = {key: value for key, value in result["config"].items() if key not in own}
        trained = json.dumps([settings, result["epoch"]])
    scored = json.dumps([result["scored_with"], result["precision"], record["source"], record["fingerprint"]])
    return name, result["scored_with"]["dataset"], result["model"], trained, scored


def _published(result: Result, name: str, record: Mapping[str, Any]) -> tuple[Published, str | None]:
    """The published numbers to be shown beside a run: those of the conf that it equals in all settings that matter.

    Also, for a note, where the run differs from the nearest conf with such a number; None where it does not.
    """
    if record["source"] != "official":
        return Published(), None
    nearest = None
    trained_on = result["config"]["dataset"] if result["config"] else result["scored_with"]["dataset"]
    for conf, config in _confs(trained_on):
        table = TRANSFERRED if config.policy in FROM_A_FILE else PUBLISHED
        published = table.get((name, config.dataset, config.model))
        if published is None or config.model != result["model"]:
            continue
        differences = _differences(result, config)
        if not differences:
            return published, None
        if nearest is None or len(differences) < len(nearest[1]):
            nearest = conf, differences
    if nearest is None:
        return Published(), None
    conf, differences = nearest
    more = f" and {len(differences) - 8} more" if len(differences) > 8 else ""
    return Published(), f"differs from {conf.relative_to(ROOT)} in {', '.join(differences[:8])}{more}"


@cache
def _confs(dataset: str) -> tuple[tuple[Path, Config], ...]:
    return tuple((conf, load_config(conf, {})) for conf in sorted((ROOT / "confs").glob(f"{dataset}/*.yaml")))


def _differences(result: Result, conf: Config) -> list[str]:
    """What a run has otherwise than a conf: "setting value instead of value"."""
    if result["config"] is None:
        return ["training settings, which are not known"]
    free = {field.name for field in dataclasses.fields(Config) if field.metadata["may_change"]} | {*FREE}
    found, expected = ({**settings} for settings in (result["config"], plain_values(conf)))
    for settings in (found, expected):
        if settings["policy"] in FROM_A_FILE:  # which of the two the paper means is not known
            source = Path(settings["policy_from"])
            run = re.sub(r"_\d+$", "", source.name)
            settings |= {"policy": " or ".join(FROM_A_FILE), "policies of": run if not source.suffix else source.name}
    differing = [key for key in expected if key not in free and found.get(key) != expected[key]]
    pairs = {key: (found.get(key), expected[key]) for key in differing}
    scored = {key: value for key, value in result["scored_with"].items() if key in expected}
    pairs |= {key: (value, expected[key]) for key, value in scored.items() if value != expected[key]}
    if _is_average(result):
        pairs["weights"] = "averaged", "last"
    if result["epoch"] != found["epochs"]:
        pairs["epoch"] = result["epoch"], found["epochs"]
    return [f"{key} {_brief(ours)} instead of {_brief(theirs)}" for key, (ours, theirs) in pairs.items()]


def _is_average(result: Result) -> bool:
    return result["scored_with"].get("weights") == "averaged"


def _brief(value: Any) -> str:
    return printable("null" if value is None else str(value), 40)


def _row(results: Sequence[Result], name: str, records: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    result, config = results[0], results[0]["config"]
    trained_on = config["dataset"] if config else result["scored_with"]["dataset"]
    published, _ = _published(result, name, records[0])
    quantity, _ = headline(records[0]["summary"])
    return (
        f"{name} ({trained_on}), {result['model']}: {quantity}",
        (re.sub(r"_\d+$", "", Path(result["checkpoint"]).parent.name) if config else result["checkpoint"])
        + (" (averaged weights)" if _is_average(result) else ""),
        _policy_name(config) if config else "-",
        f"{records[0]['source']}, {records[0]['cells'][0]['images']:,}",
        *published,
        _over_runs([headline(record["summary"])[1] for record in records]),
        str(len(results)),
    )


def _policy_name(config: Mapping[str, Any]) -> str:
    name = "learned" if config["policy"] == "controller" else config["policy"]
    origin = f" from {printable(config['policy_from'], 60)}" if config["policy_from"] else ""
    return f"{name}{origin}, M = {config['M']}"


def _all_notes(result: Result) -> list[str]:
    notes = (_notes(result, name, record) for name, record in result["benchmarks"].items())
    return list(dict.fromkeys(itertools.chain.from_iterable(notes)))


def _notes(result: Result, name: str, record: Mapping[str, Any]) -> list[str]:
    """Notes that qualify a number."""
    notes = [f"{name}: {record['note']}."] if record.get("note") else []
    config = result["config"] or {"policy": "none"}
    if config["policy"] in PER_IMAGE:
        operations = ("Posterize",) if config["policy"] == "augmix" else RESEMBLING
    else:
        operations = () if config["policy"] == "none" else config["ops"]
    overlap = [op for op in RESEMBLING if op in operations]
    if record["kind"] == "corruptions" and overlap:
        notes.append(
            f"{name}: the policies hold {', '.join(overlap)}, which resemble corruptions; AugMix leaves out contrast, "
            "colour, brightness and sharpness. Train without them (ops) for a comparison."
        )
    return notes


def _percent(share: float) -> str:
    return f"{100 * share:.2f}"


def _all_cells(results: Sequence[Result]) -> tuple[list[str], list[list[Any]]]:
    """Header and rows: a row for each cell, a column for each plain number."""
    cells = [
        {
            "checkpoint": result["checkpoint"],
            "weights": result["scored_with"].get("weights", "last"),
            "benchmark": name,
            "source": record["source"],
            **cell,
        }
        for result in results
        for name, record in result["benchmarks"].items()
        for cell in record["cells"]
    ]
    plain = (key for cell in cells for key, value in cell.items() if not isinstance(value, (list, dict)))
    header = list(dict.fromkeys(plain))
    return header, [[cell.get(name, "") for name in header] for cell in cells]


def _csv(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    return text.getvalue().rstrip("\n")
