"""Tables of results: means over runs by hand, published numbers only where they are comparable, damaged files."""

import csv
import dataclasses
import json
import re

import pytest
from conftest import ROOT, assert_refused

import evaluation.tables as tables
from config import load_config, plain_values
from evaluation.corruptions import EXTRA, SEVERITIES, STANDARD

CONF = "cifar10/wresnet28x10_cifar10.yaml"
RESULTS_PAGE = next(page for page in (ROOT / "docs" / "results.md", ROOT / "README.md") if page.exists())


def result(
    error, corruption_error=None, *, seed=0, source="official", name="run", epoch=200, ours=True, conf=CONF, **settings
):
    """A results.json of WRN-28-10 on CIFAR-10 with the given error, and perhaps the same error in every corruption.

    conf: in confs/; the settings are those of the conf with the given ones changed.
    """
    config = dataclasses.replace(load_config(ROOT / "confs" / conf, {}), seed=seed, **settings)
    cell = {
        "part": "", "severity": None, "images": 1000, "correct": round(1000 * (1 - error)), "error": error,
        "loss": 0.25, "calibration_error": 0.03, "top1": 1 - error, "top5": 0.99, "class_images": [100] * 10,
        "class_correct": [round(100 * (1 - error))] * 10, "reliability": {}, "mistakes": [],
    }  # fmt: skip
    keys = ("error", "top1", "top5", "loss", "calibration_error")
    benchmarks = {"clean": record("test set", [cell], {key: cell[key] for key in keys}, source)}
    if corruption_error is not None:
        cells = [
            {"part": part, "severity": s, "images": 1000, "error": corruption_error + s / 100, "loss": 1.0,
             "calibration_error": 0.04}
            for part in (*STANDARD, *EXTRA)
            for s in SEVERITIES
        ]  # fmt: skip
        means = {
            "error": dict.fromkeys((*STANDARD, *EXTRA), corruption_error + 0.03),
            "mean_corruption_error": corruption_error + 0.03,
            "mean_calibration_error": 0.04,
        }
        benchmarks["cifar10-c"] = record("corruptions", cells, means, source)
    return {
        "checkpoint": f"logs/{name}_{seed}/model.pt", "sha256": f"{name} {seed} {settings}", "model": config.model,
        "epoch": epoch if ours else None, "seed": seed, "classes": None, "precision": "float32",
        "scored_with": {"dataset": "cifar10"}, "config": plain_values(config) if ours else None,
        "benchmarks": benchmarks,
    }  # fmt: skip


def record(kind, cells, summary, source):
    return {
        "kind": kind, "source": source, "checked_by": "md5", "note": "", "fingerprint": source, "classes": None,
        "environment": {}, "cells": cells, "summary": summary,
    }  # fmt: skip


@pytest.fixture
def written(tmp_path):
    def write(*results):
        paths = [tmp_path / f"{number}.json" for number in range(len(results))]
        for path, content in zip(paths, results, strict=True):
            path.write_text(json.dumps(content))
        return paths

    return write


def rows_of(text):
    return [
        [word.strip() for word in line.strip("| ").split("|")] for line in text.splitlines() if line.startswith("|")
    ]


def test_one_checkpoint_in_full():
    text = tables.report([result(0.05, 0.10)], "table")
    assert "logs/run_0/model.pt: wresnet28_10, after epoch 200 of 200, scored in float32" in text
    lines = text.splitlines()
    assert next(line for line in lines if line.startswith("clean  ")).split() == [
        "clean", "official", "(checked", "by", "md5)", "1,000", "5.00", "95.00", "99.00", "0.2500", "3.00"
    ]  # fmt: skip
    assert "cifar10-c: error (%) by severity, 95 x 1,000 images, official (checked by md5)" in text
    fog, mean, spatter = (next(line for line in lines if line.startswith(w)) for w in ("fog", "mean", "(spatter"))
    assert lines.index(fog) < lines.index(mean) < lines.index(spatter), "extra corruptions are listed separately"
    fog, mean = fog.split(), mean.split()
    assert fog == ["fog", "11.00", "12.00", "13.00", "14.00", "15.00", "13.00"]
    assert mean[-6:] == fog[1:]


def test_several_checkpoints_side_by_side():
    errors = (0.05, 0.07, 0.06)
    text = tables.report([result(e, e, seed=i) for i, e in enumerate(errors)], "markdown")
    rows = {row[0]: row[1:] for row in rows_of(text)}
    assert rows["clean (official) error"] == ["5.00", "7.00", "6.00", "6.00 +- 1.00"]
    assert rows["cifar10-c (official) mean corruption error"] == ["8.00", "10.00", "9.00", "9.00 +- 1.00"]
    assert rows["cifar10-c (official) fog"][-1] == "9.00 +- 1.00"
    assert "run 2: logs/run_1/model.pt" in text


def test_other_sources_get_their_own_rows():
    text = tables.report([result(0.05), result(0.07, source="subset", seed=1)], "markdown")
    rows = {row[0]: row[1:] for row in rows_of(text)}
    assert rows["clean (official) error"] == ["5.00", "-", "5.00"]
    assert rows["clean (subset) error"] == ["-", "7.00", "7.00"]


def test_json_is_the_file_and_csv_has_a_row_for_each_cell():
    one = result(0.05, 0.10)
    assert json.loads(tables.report([one], "json")) == one
    assert len(json.loads(tables.report([one, one], "json"))) == 2
    rows = list(csv.DictReader(tables.report([one], "csv").splitlines()))
    assert len(rows) == 96
    assert (rows[0]["benchmark"], float(rows[0]["error"]), rows[0]["severity"]) == ("clean", 0.05, "")
    assert (rows[3]["part"], rows[3]["severity"], float(rows[3]["error"])) == (STANDARD[0], "3", 0.13)
    assert all(None not in row for row in rows)


def test_seeds_share_a_row_beside_the_published_numbers(written):
    paths = written(*(result(e, e, seed=i) for i, e in enumerate((0.020, 0.030))))
    text = tables.compare(paths, "markdown")
    rows = {row[0]: row for row in rows_of(text)}
    assert rows["clean (cifar10), wresnet28_10: error"] == [
        "clean (cifar10), wresnet28_10: error", "run", "learned, M = 8", "official, 1,000", "1.90 +- 0.15", "2.35", "-",
        "2.50 +- 0.71", "2",
    ]  # fmt: skip
    corrupted = rows["cifar10-c (cifar10), wresnet28_10: mean corruption error"]
    assert corrupted[4:] == ["-", "10.41", "no augmentation 26.54", "5.50 +- 0.71", "2"]
    assert "the policies hold Posterize, Contrast, Color, Brightness, Sharpness, which resemble corruptions" in text


@pytest.mark.parametrize(
    "other",
    [
        {"source": "subset"},
        {"source": "generated"},
        {"M": 1},
        {"epochs": 1, "epoch": 1, "schedule": "cosine", "milestones": ()},
        {"K": 1},
        {"batch_size": 64},
        {"cutout": 0},
        {"lr": 0.05},
        {"ops": ("ShearX", "Rotate")},
        {"dropout": 0.3},
        {"mean": (0.5, 0.5, 0.5)},
        {"train_size": 1000},
        {"valid_size": 5000},
        {"skip_unreadable": True},
        {"dataset": "folder"},
        {"policy": "none"},
        {"policy": "trivialaugment"},
        {"reward": "teacher"},
        {"logit_bound": 2.5},
        {"entropy_bonus": 0.03},
        {"policy": "recorded", "policy_from": "mine.yaml"},
        {"optimizer": "adamw"},
        {"epoch": 100},
        {"ours": False},
    ],
)
def test_published_numbers_need_comparable_runs(written, other):
    text = tables.compare(written(result(0.02), result(0.04, seed=1, **other)), "markdown")
    rows = rows_of(text)[2:]
    assert len(rows) == 2, "never averaged"
    published = {row[7]: row[4:7] for row in rows}
    assert published == {"2.00": ["1.90 +- 0.15", "2.35", "-"], "4.00": ["-", "-", "-"]}


def test_what_differs_from_the_conf_is_listed(written):
    changed = result(0.04, 0.1, seed=1, M=1, batch_size=64, cutout=0)
    scored = result(0.05, seed=2) | {"scored_with": {"dataset": "cifar10", "eval_view": [320, 288]}}
    foreign, early = result(0.06, name="theirs", ours=False), result(0.07, name="early", epoch=100)
    of_random = result(0.08, name="random", policy="random")
    text = tables.compare(written(changed, scored, foreign, early, of_random), "markdown")
    assert {row[4] for row in rows_of(text)[2:]} == {"-"}
    start = "no published number, since the run differs from confs/cifar10/wresnet28x10_cifar10.yaml in"
    for words in (
        f"clean, run_1: {start} cutout 0 instead of 16, M 1 instead of 8, batch_size 64 instead of 128.",
        f"cifar10-c, run_1: {start} cutout 0 instead of 16",
        f"clean, run_2: {start} eval_view [320, 288] instead of [256, 224].",
        f"clean, theirs_0: {start} training settings, which are not known.",
        f"clean, early_0: {start} epoch 100 instead of 200.",
        f"clean, random_0: {start} policy random instead of controller.",
    ):
        assert words in text


def test_each_conf_has_its_own_published_numbers(written):
    runs = (
        result(0.02, 0.1, name="wrn40", conf="cifar10/wresnet40x2_cifar10.yaml", M=8),
        result(0.03, 0.1, name="augmix", conf="cifar10/augmix_wresnet40x2_cifar10.yaml", epoch=100),
        result(0.04, name="shake", conf="cifar10/shake26_2x32d_cifar10.yaml", epoch=600, amp=True, seed=4, workers=9),
    )
    rows = {(row[0].partition(" ")[0], row[1]): row[4:7] for row in rows_of(tables.compare(written(*runs), "markdown"))}
    assert rows["cifar10-c", "wrn40"] == rows["cifar10-c", "augmix"] == ["-", "-", "AugMix with JSD 11.2"]
    assert rows["clean", "shake"] == ["2.36 +- 0.10", "2.51", "-"]


def test_transferred_policies_have_their_own_published_number(written):
    for policy, source, expected in (
        ("frozen", "logs/resnet50_0", "2.45 +- 0.13"),
        ("recorded", "elsewhere/resnet50_3", "2.45 +- 0.13"),
        ("frozen", "logs/wresnet40x2_cifar10_0", "-"),
        ("recorded", "resnet50.json", "-"),
    ):
        transferred = result(0.03, policy=policy, policy_from=source)
        row = rows_of(tables.compare(written(transferred), "markdown"))[2]
        assert row[2:6] == [f"{policy} from {source}, M = 8", "official, 1,000", expected, "-"]


def test_runs_with_other_settings_are_other_rows(written):
    text = tables.compare(written(result(0.02), result(0.03, lr=0.05), result(0.05, policy="none", seed=1)), "markdown")
    rows = rows_of(text)[2:]
    assert sorted(row[7] for row in rows) == ["2.00", "3.00", "5.00"]
    assert {row[2] for row in rows} == {"learned, M = 8", "none, M = 8"}


def test_irrelevant_differences_share_a_row_and_copies_count_once(written):
    one, other = result(0.02), result(0.04, seed=1, workers=7, dataroot="elsewhere")
    (row,) = rows_of(tables.compare(written(one, other, one), "markdown"))[2:]
    assert row[7:] == ["3.00 +- 1.41", "2"]


def test_other_weights_images_and_precisions_get_their_own_rows(written):
    foreign = [result(e, ours=False, name=name) for e, name in ((0.02, "a"), (0.03, "b"))]
    rows = rows_of(tables.compare(written(*foreign), "markdown"))[2:]
    assert [row[7:] for row in rows] == [["2.00", "1"], ["3.00", "1"]]
    for change in ({"precision": "bfloat16"}, {"epoch": 100}, {"scored_with": {"dataset": "cifar10", "mean": [0.5]}}):
        rows = rows_of(tables.compare(written(result(0.02), result(0.03, seed=1) | change), "markdown"))[2:]
        assert len(rows) == 2, change
    moved = result(0.03, seed=1)
    moved["benchmarks"]["clean"]["fingerprint"] = "other images"
    assert len(rows_of(tables.compare(written(result(0.02), moved), "markdown"))) == 4
    text = tables.report([result(0.02), moved], "markdown")
    assert [row[1:] for row in rows_of(text) if row[0] == "clean (official) error"] == [
        ["2.00", "-", "2.00"], ["-", "3.00", "3.00"]
    ]  # fmt: skip


def test_operations_that_resemble_corruptions_are_noted(written):
    apart = ("ShearX", "Rotate", "Cutout")
    assert "resemble" not in tables.compare(written(result(0.02, 0.1, ops=apart)), "table")
    assert "resemble" not in tables.compare(written(result(0.02, 0.1, policy="none")), "table")
    assert "hold Posterize, which" in tables.compare(written(result(0.02, 0.1, policy="augmix")), "table")
    assert "hold Posterize, Contrast" in tables.compare(written(result(0.02, 0.1, policy="randaugment")), "table")
    assert "hold Color, which" in tables.compare(written(result(0.02, 0.1, ops=(*apart, "Color"))), "table")
    assert "resemble" not in tables.compare(written(result(0.02)), "table"), "the clean test set"


def test_compare_on_the_command_line(script, written, tmp_path):
    (path,) = written(result(0.02))
    done = script("evaluate.py", "--compare", path)
    assert done.status == 0, done.err
    assert rows_of(done.out)[2][7] == "2.00"
    assert json.loads(tables.compare([path], "json"))[0]["here"] == "2.00"
    assert next(csv.DictReader(tables.compare([path], "csv").splitlines()))["paper"] == "1.90 +- 0.15"
    path.rename(tmp_path / "results.json")
    assert script("evaluate.py", "--compare", tmp_path).out == done.out, "a run directory"
    assert_refused(script("evaluate.py", "--compare", tmp_path / "none.json"), "none.json: there is no such file")
    for content, words in (
        ("{", "other.json: cannot be read as results"),
        ("[]", "does not hold results"),
        ('{"benchmarks": {}}', "does not hold results"),
        (json.dumps(result(0.02) | {"benchmarks": {"clean": {"kind": "test set"}}}), "does not hold results"),
        (json.dumps(result(0.02) | {"benchmarks": {"clean": 3}}), "does not hold results"),
        (json.dumps(result(0.02) | {"config": {"lr": "fast"}}), "other.json: lr: 'fast' is not a number"),
        (json.dumps(result(0.02) | {"benchmarks": {}}), "none of the files holds a finished benchmark"),
    ):
        (tmp_path / "other.json").write_text(content)
        assert_refused(script("evaluate.py", "--compare", tmp_path / "other.json"), words)


def test_published_corruption_errors():
    """AugMix's page and RobustBench, for CIFAR-10-C; the re-implementation's page; Hendrycks' leaderboard."""
    assert {key: value for key, value in tables.PUBLISHED.items() if key[0] != "clean"} == {
        ("cifar10-c", "cifar10", "wresnet28_10"): ("-", "10.41", "no augmentation 26.54"),
        ("cifar10-c", "cifar10", "shakeshake26_2x32d"): ("-", "16.69", "-"),
        ("cifar10-c", "cifar10", "wresnet40_2"): ("-", "-", "AugMix with JSD 11.2"),
        ("cifar10-c", "cifar10", "resnext29_4x32d"): ("-", "-", "AugMix with JSD 10.9"),
        ("imagenet-c", "imagenet", "resnet50"): ("-", "-", "mCE: none 76.7, AugMix 65.3"),
    }


def test_published_errors_are_those_of_the_results_page():
    page = RESULTS_PAGE.read_text(encoding="utf-8")
    confs = sorted(path for path in (ROOT / "confs").glob("*/*.yaml") if path.parent.name != "experiments")
    assert len(confs) >= 16
    for conf in confs:
        (row,) = re.findall(rf"^\|.*\]\((?:\.\./)?{conf.relative_to(ROOT).as_posix()}\).*$", page, re.MULTILINE)
        paper, reimplementation = (word.strip() for word in row.split("|")[3:5])
        config = load_config(conf, {})
        table = tables.TRANSFERRED if config.policy == "frozen" else tables.PUBLISHED
        published = table.get(("clean", config.dataset, config.model), tables.Published())
        assert (published.paper, published.reimplementation) == (paper.split(" / ")[0], reimplementation), conf
