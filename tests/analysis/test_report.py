"""The page of pictures: the numbers behind it, what it holds, and what it refuses."""

import base64
import json
import re
import shutil
from collections import Counter

import pytest
import torch
from conftest import LITTLE, assert_refused, lines, little_network

import analysis.figures as reportfigures
import main
import report
from analysis.page import levels_table, neutral_level
from augmentations import OPS
from utils import UserError, load_tensors, save_tensors

SMALL = ("ops=[Rotate, Solarize, Color]", "levels=4", "Q=2", "policy_interval=2", "controller_lr=0.1", *LITTLE)


@pytest.fixture
def little(train, monkeypatch):
    monkeypatch.setattr(main, "build_model", little_network)
    return lambda name, *said: train(name, *SMALL, *said)


def pairs_of(run):
    records = lines(run / "policies.jsonl")
    return [pair for record in records for policy in record["policies"] for sub in policy for pair in sub]


def test_shares_are_counted_over_groups_of_intervals(little):
    run = little("run")
    intervals = lines(run / "policies.jsonl")
    for place, keys in ((0, ["Rotate", "Solarize", "Color"]), (1, [0, 1, 2, 3])):
        (column,) = zip(*report.share_of([intervals], keys, place), strict=True)
        counted = Counter(pair[place] for pair in pairs_of(run))
        assert column == pytest.approx([counted[key] / counted.total() for key in keys])
    alone = report.share_of([intervals[:1], intervals[1:2]], [0, 1, 2, 3], 1)
    assert [sum(column) for column in zip(*alone, strict=True)] == pytest.approx([1, 1])


@pytest.mark.parametrize("count", [1, 7, 120, 121, 12_345])
def test_many_intervals_are_put_together(count):
    groups = reportfigures.binned(range(count))
    assert [one for group in groups for one in group] == list(range(count))
    assert len(groups) <= 120
    assert {len(group) for group in groups[:-1]} <= {len(groups[0])}


def test_beliefs_are_the_controllers_probabilities(little, monkeypatch):
    """Its weights are put to zero but for the heads' biases: every decision is drawn from their softmax."""
    run = little("run")
    content = load_tensors(run / "model.pt")
    for value in content["controller"].values():
        value.zero_()
    ops, levels = torch.tensor([0.0, 1.5, -1.0]), torch.tensor([0.5, 0.0, 2.0, -3.0])
    content["controller"]["op_head.bias"], content["controller"]["level_head.bias"] = ops, levels
    save_tensors(run / "model.pt", content)
    seen = {}
    monkeypatch.setattr(report.figures, "heat_map", lambda *told: seen.update(told=told))
    words = report.beliefs(report.read_run(run)).words
    percent, names, count, neutral = seen["told"]
    assert (names, count) == (["Rotate", "Solarize", "Color"], 4)
    torch.testing.assert_close(
        torch.tensor(percent), 100 * ops.softmax(0)[:, None] * levels.softmax(0), atol=1.6, rtol=0, check_dtype=False
    )
    assert neutral == [0.0, 3.0, pytest.approx(1.5)]
    assert "sampled from the controller as it is now" in words


def test_without_a_controller_the_last_records_stand_for_beliefs(little, monkeypatch):
    run = little("run", "policy=random")
    seen = {}
    monkeypatch.setattr(report.figures, "heat_map", lambda *told: seen.update(told=told))
    words = report.beliefs(report.read_run(run)).words
    counted = Counter(map(tuple, pairs_of(run)))
    percent, names, _, _ = seen["told"]
    for row, name in zip(percent, names, strict=True):
        assert row == pytest.approx([100 * counted[name, level] / counted.total() for level in range(4)])
    assert "for there is no controller to ask" in words


def test_the_extremes_are_those_by_loss(little, monkeypatch):
    run = little("run", "M=8")
    seen = {}
    monkeypatch.setattr(report.figures, "rows_of_images", lambda rows: seen.update(rows=rows))
    one = report.read_run(run)
    report.extremes(one, None)
    losses = sorted(lines(run / "policies.jsonl")[-1]["losses"], reverse=True)
    words = [row[0] for row in seen["rows"]]
    assert words[0] == "as they are"
    assert [float(re.search(r"loss ([\d.]+):", text)[1]) for text in words[1:]] == [
        pytest.approx(loss, abs=6e-4) for loss in (*losses[:3], *losses[-3:])
    ]
    assert [text.split(",")[0] for text in words[1:]] == ["hardest"] * 3 + ["easiest"] * 3
    originals = seen["rows"][0][1]
    assert all(images.shape == originals.shape for _, images in seen["rows"])
    assert any(not torch.equal(images, originals) for _, images in seen["rows"][1:])


def test_images_that_are_not_at_hand_are_replaced_and_it_is_said(little, tmp_path):
    config = report.read_run(little("run")).config
    _, origin = report.some_images(config, None)
    assert origin == "the run's training images"
    elsewhere = report.dataclasses.replace(config, dataset="cifar10", dataroot=str(tmp_path / "none"))
    images, origin = report.some_images(elsewhere, None)
    assert images.shape == (8, 3, 32, 32)
    assert "embedded shapes, for cifar10's images are not at hand" in origin
    assert not (tmp_path / "none").exists(), "nothing is fetched"


def test_the_meaning_of_levels():
    table = levels_table()
    assert all(f"<td>{op.name}</td>" in table for op in OPS)
    assert "<td>Rotate</td><td>±0</td><td>±30</td><td>0</td><td>degrees</td>" in table
    assert "<td>Solarize</td><td>0</td><td>256</td><td>9</td><td>threshold</td>" in table
    assert "<td>Color</td><td>0.1</td><td>1.9</td><td>between 4 and 5</td>" in table
    for op in OPS:
        level = neutral_level(op.name, 10)
        if level is not None and level == int(level):
            assert op.magnitude(int(level)) == op.neutral


def test_every_axis_is_named(with_axes):
    curve = reportfigures.Curve("run", [(1, 20.0, 2.0), (2, 30.0, 1.5), (3, 40.0, 1.0)], [(3, 35.0)])
    made = [
        reportfigures.curves([curve._replace(name=f"run {n}") for n in range(10)]),
        reportfigures.stacked([1, 2, 3], ["a", "b"], [[0.5, 0.6, 0.7], [0.5, 0.4, 0.3]], "share (%)", sequential=False),
        reportfigures.stacked([1], list(range(30)), [[1 / 30]] * 30, "share (%)", sequential=True),
        reportfigures.operations([("a", ["x", "y"], torch.zeros(2, 3, 4, 4, dtype=torch.uint8))], [0, 9]),
        reportfigures.entropy([(1, 40.0), (2, 5.0)], 50.0, 12.5, [2.0]),
        reportfigures.spread([(1, 1.0, 1.5, 2.0, 0.3), (2, 0.9, 1.0, 1.2, 0.1)]),
    ]
    for figure in made:
        axes = figure.axes
        assert axes[0].get_ylabel()
        assert axes[-1].get_xlabel()
        assert all(one.get_ylabel() for one in axes if one.get_yticks().size)
    heat = reportfigures.heat_map([[1.0, 2.0], [3.0, 4.0]], ["a", "b"], 2, [0.0, None])
    assert (heat.axes[0].get_xlabel(), heat.axes[0].get_ylabel()) == ("level", "operation")
    assert heat.axes[1].get_ylabel() == "share of all operations (%)"


@pytest.fixture
def page(script, tmp_path):
    """page(run, ...) -> the text of the page."""

    def make(*runs, out="page"):
        done = script("report.py", *runs, "--output", tmp_path / out)
        assert done.status == 0, done.err
        return (tmp_path / out / "report.html").read_text(encoding="utf-8")

    return make


def test_the_page_holds_everything_and_is_safe(little, page, tmp_path, with_axes):
    run = little("<script>alert(1)<")
    text = page(run)
    pictures = sorted((tmp_path / "page").glob("*.png"))
    assert {path.stem for path in pictures} == {"0_operations", "1_curves"} | {
        f"2_{name}" for name in ("operations", "levels", "entropy", "spread", "policies", "beliefs")
    }
    assert {base64.b64encode(path.read_bytes()).decode() for path in pictures} == set(
        re.findall(r"data:image/png;base64,([^\"]+)\"", text)
    )
    assert "http" not in re.sub(r"base64,[^\"]+", "", text)
    assert "<script" not in text
    assert "&lt;script&gt;alert(1)&lt;" in text


@pytest.mark.slow
def test_a_page_of_several_runs_is_the_same_every_time(little, page, tmp_path, with_axes):
    kinds = ("controller", "random", "none", "trivialaugment")
    runs = [little(policy, f"policy={policy}") for policy in kinds]
    first, second = page(*runs), page(*runs, out="again")
    assert first == second
    for path in (tmp_path / "page").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()
    assert all(f">{policy}</a>" in first for policy in kinds)
    assert "<td>policy</td><td>controller</td><td>random</td><td>none</td><td>trivialaugment</td>" in first
    assert first.count("there is no policy to show") == 2
    for number, count in enumerate((1, 1, 6, 6, 1, 1)):
        assert len(list((tmp_path / "page").glob(f"{number}_*.png"))) == count


def test_runs_of_the_same_name_are_told_apart(little, tmp_path):
    run = little("one")
    for folder in ("a", "b"):
        shutil.copytree(run, tmp_path / folder / "one")
    runs = [report.read_run(tmp_path / folder / "one") for folder in ("a", "b")]
    assert report.names_of([*runs, report.read_run(little("two"))]) == ["a/one", "b/one", "two"]


@pytest.mark.slow
def test_a_run_under_way_is_shown_as_far_as_it_is(little, page, with_axes):
    run = little("run", "--stop_epoch=2")
    (run / "model.pt").write_bytes(b"of no use")
    for name in ("metrics.jsonl", "policies.jsonl"):
        with (run / name).open("a") as file:
            file.write('{"epoch": 3, "cut sho')
    text = page(run)
    assert "It is under way, or has stopped: 2 of 3 epochs are done." in text
    assert "for there is no controller to ask" in text


@pytest.mark.slow
def test_a_long_run_of_the_papers_shape_can_be_shown(little, page, tmp_path, with_axes):
    """Two hundred epochs, a thousand intervals: the record of a short run, over and over."""
    run = little("run")
    for name, count in (("metrics.jsonl", 200), ("policies.jsonl", 1000)):
        records = lines(run / name)
        steps = 2000 // count
        again = [records[n % len(records)] | {"epoch": n + 1, "step": steps * (n + 1)} for n in range(count)]
        (run / name).write_text("".join(json.dumps(one) + "\n" for one in again))
    assert "each point the mean of 9 intervals" in page(run)


def test_what_is_no_run_is_refused(little, script, tmp_path, with_axes):
    run = little("run")
    for change, words in (
        (lambda: (run / "metrics.jsonl").write_text("{}\n"), "metrics.jsonl: is not of this version"),
        (lambda: (run / "metrics.jsonl").write_text("{\n"), "metrics.jsonl: is damaged"),
        (lambda: (run / "metrics.jsonl").write_text(""), "has not finished an epoch yet"),
        (lambda: (run / "config.yaml").unlink(), "is no run's directory"),
        (lambda: shutil.rmtree(run), "is no run's directory"),
    ):
        change()
        assert_refused(script("report.py", run, "--output", tmp_path / "page"), words)
        assert not (tmp_path / "page").exists()


def test_without_matplotlib_it_says_what_to_install(little, script, tmp_path):
    assert_refused(script("report.py", little("run")), "pip install -r requirements-dev.txt")


def test_losses_of_a_damaged_record_are_refused(little, tmp_path):
    run = little("run")
    records = lines(run / "policies.jsonl")
    records[-1]["policies"][0][0][0] = ["Rotat", 1]
    (run / "policies.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    with pytest.raises(UserError, match="'Rotat' is no operation; did you mean Rotate"):
        report.read_run(run)
