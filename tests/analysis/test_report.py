"""The report: the numbers behind it, what the page says and contains, and what it refuses."""

import base64
import dataclasses
import json
import re
import shutil
from collections import Counter

import pytest
import torch
from conftest import LITTLE, TINY, assert_refused, lines, little_network

import main
from analysis import figures, sections
from analysis.runs import draw_counts, drawn_pairs, final_draws, read_run, run_names, run_verdict
from augmentations import OPS
from utils import UserError, load_tensors, save_tensors

SMALL = ("ops=[Rotate, Solarize, Color]", "levels=4", "Q=2", "policy_interval=2", *LITTLE)
SMALL += ("controller_lr=0.1", "logit_bound=0", "image_size=32")


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def little(script, monkeypatch, template, tmp_path):
    """little(name, *arguments): the directory of a small run; runs with equal arguments are made once and copied."""
    monkeypatch.setattr(main, "build_model", little_network)

    def run(name, *arguments):
        flags = [word for word in arguments if word.startswith("-")]
        settings = [word for word in arguments if not word.startswith("-")]
        place = template / re.sub(r"\W", "_", "-".join(("run", *arguments)))
        if not place.exists():
            done = script(
                "main.py", "--logdir", template, "--name", place.name, *flags, "--set", *TINY, *SMALL, *settings
            )
            assert done.status == 0, done.err
        return shutil.copytree(place, tmp_path / name)

    return run


def pairs_of(run):
    return [
        tuple(pair)
        for record in lines(run / "policies.jsonl")
        for policy in record["policies"]
        for sub in policy
        for pair in sub
    ]


def with_records(run, change):
    """Replace the records of policies.jsonl by change(record)."""
    records = [change(record) for record in lines(run / "policies.jsonl")]
    (run / "policies.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def with_biases(run, ops, levels):
    """Give the run a controller whose every decision is drawn from the softmax of these logits."""
    content = load_tensors(run / "model.pt")
    for value in content["controller"].values():
        value.zero_()
    content["controller"]["op_head.bias"], content["controller"]["level_head.bias"] = ops, levels
    save_tensors(run / "model.pt", content)


def test_shares_are_counted_over_groups_of_intervals(little):
    directory = little("run")
    run, pairs = read_run(directory), pairs_of(directory)
    operations, levels = (draw_counts(drawn_pairs(run.intervals), run, kind) for kind in ("operations", "levels"))
    assert operations == {key: Counter(name for name, _ in pairs)[key] for key in ("Rotate", "Solarize", "Color")}
    assert levels == {f"level {key}": Counter(level for _, level in pairs)[key] for key in range(4)}
    twice = drawn_pairs([run.intervals[0], run.intervals[0]])
    assert len(twice) == len(pairs) / len(run.intervals), "policies that are kept for two intervals are drawn once"


@pytest.mark.parametrize("count", [1, 7, 120, 121, 12_345])
def test_many_intervals_are_grouped(count):
    groups = figures.binned(range(count))
    assert [one for group in groups for one in group] == list(range(count))
    assert len(groups) <= figures.MOST_POINTS
    assert {len(group) for group in groups[:-1]} <= {len(groups[0])}


def test_final_draws_have_the_controllers_probabilities(little):
    directory = little("run")
    run = read_run(directory)
    logits = {"operations": torch.tensor([0.0, 1.5, -1.0]), "levels": torch.tensor([0.5, 0.0, 2.0, -3.0])}
    with_biases(directory, *logits.values())
    pairs, origin = final_draws(run)
    for kind, of_kind in logits.items():
        shares = [count / len(pairs) for count in draw_counts(pairs, run, kind).values()]
        assert shares == pytest.approx(of_kind.softmax(0), abs=0.02)
    assert "sampled from the controller as it is now" in origin
    (directory / "model.pt").unlink()
    pairs, origin = final_draws(run)
    assert pairs == pairs_of(directory), "without a controller, the last records"
    assert "of the last 6 intervals" in origin


def test_a_moved_controller_is_named_with_what_it_favours(little):
    run = little("run")
    with_biases(run, torch.tensor([0.0, 1.5, -1.0]), torch.zeros(4))
    maximum = read_run(run).maximal_entropy
    with_records(run, lambda record: record | {"collapsed": None, "entropy": 0.9 * maximum})
    text = run_verdict(read_run(run))
    assert text.startswith("The controller has moved: 90.0 % of its maximal entropy is left; it favours Solarize (7")
    assert text.endswith("where chance gives 33.33 %.")
    with_records(run, lambda record: record | {"entropy_floor": 0.9})
    held = run_verdict(read_run(run))
    assert "90.0 % of its maximal entropy is left, where it is held (entropy_floor 0.9); it favours Solarize" in held


def test_a_controller_that_draws_uniformly_has_not_moved(little):
    run = little("run")
    with_biases(run, torch.zeros(3), torch.zeros(4))
    maximum = read_run(run).maximal_entropy
    with_records(run, lambda record: record | {"collapsed": None, "entropy": maximum})
    assert run_verdict(read_run(run)).startswith("The controller has not moved yet: 100.0 %")


def test_random_policies_differ_from_chance_in_nothing(little):
    run = read_run(little("run", "policy=random"))
    assert run_verdict(run) == (
        "The policies are uniformly random: no operation is drawn more often than chance explains."
    )
    pairs, origin = final_draws(run)
    images = [sections.shares(run, pairs, kind) for kind in ("operations", "levels")]
    captions = [image.caption for image in (*images, sections.preferences_now(run, pairs, origin))]
    assert "None of the operations differs from chance now." in captions[0]
    assert "None of the levels differs from chance now." in captions[1]
    assert "no cell differs from chance" in captions[2]


def test_the_heat_map_shows_cells_inside_chance_as_the_uniform_share():
    figure = figures.heat_map([[20.0, 26.0], [24.0, 30.0]], ["a", "b"], (22.0, 25.0, 28.0))
    image = figure.axes[0].images[0]
    assert image.get_array().tolist() == [[20.0, 25.0], [25.0, 30.0]]
    assert image.cmap(image.norm(25.0))[:3] == pytest.approx((0.97, 0.97, 0.97), abs=0.01)


def test_the_extremes_are_those_by_loss(little, monkeypatch):
    run = little("run", "M=8")
    seen = {}
    monkeypatch.setattr(sections.figures, "rows_of_images", lambda rows: seen.update(rows=rows))
    sections.extremes(read_run(run), None)
    losses = sorted(lines(run / "policies.jsonl")[-1]["losses"], reverse=True)
    captions = [row[0] for row in seen["rows"]]
    assert captions[0] == "unchanged"
    assert [float(re.search(r"loss ([\d.]+):", text)[1]) for text in captions[1:]] == [
        pytest.approx(loss, abs=6e-4) for loss in (*losses[:3], *losses[-3:])
    ]
    assert [text.split(",")[0] for text in captions[1:]] == ["hardest"] * 3 + ["easiest"] * 3
    originals = seen["rows"][0][1]
    assert all(images.shape == originals.shape for _, images in seen["rows"])
    assert any(not torch.equal(images, originals) for _, images in seen["rows"][1:])


def test_missing_images_are_replaced_by_shapes(little, tmp_path):
    config = read_run(little("run")).config
    assert sections.some_images(config, None)[1] == "the run's training images"
    elsewhere = dataclasses.replace(config, dataset="cifar10", dataroot=str(tmp_path / "none"))
    images, origin = sections.some_images(elsewhere, None)
    assert images.shape == (8, 3, 32, 32)
    assert "embedded shapes, because cifar10 was not found" in origin
    assert not (tmp_path / "none").exists(), "nothing is fetched"


def test_the_gallery_says_what_levels_mean():
    captions = {op.name: sections.operation_caption(op) for op in OPS}
    assert captions["Rotate"] == "Rotate: ±0 to ±30 degrees, no change at level 0"
    assert captions["Solarize"] == "Solarize: 0 to 256 threshold, no change at level 9"
    assert captions["Color"] == "Color: 0.1 to 1.9 factor, no change at level 4.5"
    assert captions["Invert"] == "Invert: the same at every level"


def test_long_and_wide_figures_can_be_drawn():
    points = [(1, 20.0), (2, 30.0), (3, 40.0)]
    made = [
        figures.curves({f"run {n}": (points, points, points[:1]) for n in range(10)}),
        figures.share_panels([1], [{f"level {n}": 1 for n in range(30)}], {"level 2"}),
        figures.entropy([(1, 80.0), (2, 10.0)], [2.0], [(1, 50.0), (2, 5.0)]),
    ]
    for figure in made:
        figure.canvas.draw()
    assert len([axes for axes in made[1].axes if axes.get_title()]) <= figures.MOST_PANELS


@pytest.fixture
def page(script, tmp_path):
    """page(run, ...) -> the text of the page."""

    def make(*runs, out="page"):
        done = script("report.py", *runs, "--output", tmp_path / out)
        assert done.status == 0, done.err
        return (tmp_path / out / "report.html").read_text(encoding="utf-8")

    return make


def test_the_page_is_complete_and_safe(little, page, tmp_path):
    text = page(little("<script>alert(1)<"))
    images = sorted((tmp_path / "page").glob("*.png"))
    assert {path.stem for path in images} == {"1_curves", "3_operations"} | {
        f"2_{name}" for name in ("entropy", "operations", "levels", "preferences", "spread", "policies")
    }
    assert {base64.b64encode(path.read_bytes()).decode() for path in images} == set(
        re.findall(r"data:image/png;base64,([^\"]+)\"", text)
    )
    assert "http" not in re.sub(r"base64,[^\"]+", "", text)
    assert "<script" not in text
    assert "&lt;script&gt;alert(1)&lt;" in text
    titles = re.findall(r"<h2[^>]*>(.*?)</h2>", text)
    assert [title.split()[0] for title in titles] == ["Verdict", "Curves", "Policies", "What"], "the gallery is last"
    assert text.index('class="verdict"') < text.index("<th>final accuracy</th>") < text.index("<img")


@pytest.mark.slow
def test_a_page_of_several_runs_is_the_same_every_time(little, page, tmp_path):
    kinds = ("controller", "random", "none", "trivialaugment")
    runs = [little(policy, f"policy={policy}") for policy in kinds]
    first, second = page(*runs), page(*runs, out="again")
    assert first == second
    for path in (tmp_path / "page").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()
    assert "<td>policy</td><td>controller</td><td>random</td><td>none</td><td>trivialaugment</td>" in first
    assert first.count("there is no policy to show") == 2
    for number, count in enumerate((0, 1, 6, 6, 1, 1, 1)):
        assert len(list((tmp_path / "page").glob(f"{number}_*.png"))) == count


def test_equal_names_are_told_apart_by_their_folders(little, tmp_path):
    run = little("one")
    for folder in ("a", "b"):
        shutil.copytree(run, tmp_path / folder / "one")
    runs = [read_run(tmp_path / folder / "one") for folder in ("a", "b")]
    assert run_names([*runs, read_run(little("two"))]) == ["a/one", "b/one", "two"]


@pytest.mark.slow
def test_an_unfinished_run_and_a_long_one_can_be_shown(little, page):
    run = little("run", "--stop_epoch=2")
    (run / "model.pt").write_bytes(b"of no use")
    for name in ("metrics.jsonl", "policies.jsonl"):
        with (run / name).open("a") as file:
            file.write('{"epoch": 3, "cut sho')
    text = page(run)
    assert "The run is not finished: 2 of 3 epochs are done." in text
    assert "operations of the last 4 intervals" in text
    for name, count in (("metrics.jsonl", 200), ("policies.jsonl", 1000)):
        records = [json.loads(line) for line in (run / name).read_text().split("\n")[:-1]]
        steps = 2000 // count
        again = [records[n % len(records)] | {"epoch": n + 1, "step": steps * (n + 1)} for n in range(count)]
        (run / name).write_text("".join(json.dumps(one) + "\n" for one in again))
    assert "A point is the mean of 63 intervals" in page(run)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metrics.jsonl", "{}\n", "metrics.jsonl: is damaged"),
        ("metrics.jsonl", "{\n", "metrics.jsonl: is damaged"),
        ("metrics.jsonl", "", "has not finished an epoch yet"),
        ("config.yaml", None, "is not the directory of a run"),
    ],
)
def test_what_is_not_a_run_is_refused(little, script, tmp_path, name, content, message):
    run = little("run")
    (run / name).unlink() if content is None else (run / name).write_text(content)
    assert_refused(script("report.py", run, "--output", tmp_path / "page"), message)
    assert not (tmp_path / "page").exists()


def test_without_matplotlib_it_says_what_to_install(script, tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "has_matplotlib", lambda: False)
    assert_refused(script("report.py", tmp_path), "report.py needs matplotlib: pip install -r requirements-dev.txt")


def test_damaged_policies_are_refused(little):
    run = little("run")
    with_records(run, lambda record: record | {"policies": [[["Rotate", 1]]] * 2})
    with pytest.raises(UserError, match=r"policies.jsonl: is damaged"):
        read_run(run)


def test_a_run_without_a_finished_interval_has_a_report(little, script, tmp_path):
    run = little("run", "--stop_epoch=1", "policy_interval=1000")
    assert lines(run / "policies.jsonl") == []
    done = script("report.py", run, "--output", tmp_path / "page")
    assert done.status == 0, done.err
    assert (tmp_path / "page" / "report.html").exists()
