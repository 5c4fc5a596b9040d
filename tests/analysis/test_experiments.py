"""Experiments: what a file means, which runs are made and which are not, and what is kept of them."""

import contextlib
import json
import math
import os
import re
import shutil
import signal
import statistics
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import LITTLE, assert_refused, files, lines, little_network

import evaluate
import experiments
import main
import training.exit as exits
from analysis import figures, summaries
from analysis.runs import read_lines
from analysis.specs import FOLDER, SIZES, load_experiment, runs_of
from config import read_yaml
from evaluation import weights
from evaluation.results import read_results
from utils import UserError

NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
SIZES_OF = {name: [size for size in SIZES if size in read_yaml(FOLDER / f"{name}.yaml")["sizes"]] for name in NAMES}
SMALL = (
    "image_size=32",
    "epochs=2",
    "eval_every=2",
    "train_size=40",
    "batch_size=10",
    "policy_interval=2",
    "workers=0",
    *LITTLE,
)
TINY_SIZE = {"conf": "confs/demo.yaml", "seeds": [0], "note": "n"}
ARMS = {"source": {"policy": "controller"}, "frozen": {"policy": "frozen", "policy_from": "@source"}}


class InProcess:
    """Replaces subprocess.Popen: runs main.py or evaluate.py in this process, with a small network."""

    commands = ()

    def __init__(self, command, stdout, stderr, env):
        self.commands.append(command)
        entry = {"main.py": main.main, "evaluate.py": evaluate.main}[Path(command[1]).name]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", command[1:])
            patch.setattr(main, "build_model", little_network)
            patch.setattr(weights, "build_model", little_network)
            text = os.fdopen(os.dup(stdout.fileno()), "a")
            out, err = contextlib.redirect_stdout(text), contextlib.redirect_stderr(text)
            with text, out, err, pytest.raises(SystemExit) as leaving:
                exits.exit_with_status(entry)
        self.status = leaving.value.code

    def poll(self):
        return self.status

    def terminate(self):
        pass

    def wait(self):
        return self.status


@pytest.fixture
def in_process(monkeypatch):
    """Runs are made in this process, without figures; the list of their commands."""
    monkeypatch.setattr(InProcess, "commands", [])
    monkeypatch.setattr(experiments, "Popen", InProcess)
    monkeypatch.setattr(experiments, "POLL_SECONDS", 0)
    monkeypatch.setattr(summaries, "has_matplotlib", lambda: False)
    return InProcess.commands


@pytest.fixture
def experiment(script, tmp_path, monkeypatch):
    """experiment("controls", "--seeds", 0) -> Finished, with logs/ and results/ in tmp_path."""
    monkeypatch.chdir(tmp_path)
    return lambda name, *arguments: script("experiments.py", name, "--set", *SMALL, *arguments)


@pytest.fixture
def mine(experiment, tmp_path):
    """mine(*arguments): the same for mine.yaml, with two arms, one of which takes the other's policies."""
    write_experiment(tmp_path, sizes={"tiny": TINY_SIZE | {"ranks": False}})
    return lambda *arguments: experiment("mine.yaml", *arguments)


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    return tmp_path_factory.mktemp("finished")


@pytest.fixture
def finished(mine, in_process, tmp_path, template):
    """mine, after its runs with seeds 0 and 1; they are made once and copied."""
    for name in ("logs", "results"):
        if (template / name).exists():
            shutil.copytree(template / name, tmp_path / name)
    if not (template / "results").exists():
        assert mine("--seeds", 0, 1).status == 0
        for name in ("logs", "results"):
            shutil.copytree(tmp_path / name, template / name)
    del in_process[:]
    return mine


def write_experiment(folder, **changes):
    content = {"question": "?", "arms": ARMS, "compare": [["frozen", "source"]], "sizes": {"tiny": TINY_SIZE}}
    (folder / "mine.yaml").write_text(yaml.safe_dump(content | changes, sort_keys=False))


def identities(records):
    return [(one["arm"], one["seed"], one["error"]) for one in records]


@pytest.mark.parametrize(("name", "size"), [(name, size) for name in NAMES for size in SIZES_OF[name]])
def test_every_size_of_every_experiment_can_be_run(name, size, tmp_path):
    assert len(load_experiment(name, size).seeds) >= 3
    one = load_experiment(name, size, [7])
    runs = list(runs_of(one, tmp_path))
    assert len(runs) == len({run.directory for run in runs}) == len(one.arms)
    assert one.compare
    if size == "tiny":
        assert {run.config.dataset for run in runs} == {"shapes"}, "nothing to download"
    cost = {run.arm: run.config.passes * run.config.epochs for run in runs}
    if name not in ("M", "collapse"):
        for first, second in one.compare:
            assert cost[first] == pytest.approx(cost[second], rel=0.01), "compared at equal cost"
    if name in ("regime", "budget", "selection", "controls"):
        policy = {run.arm: run.config.policy for run in runs}
        harder = {run.arm for run in runs if run.config.entropy_floor not in (0, 1) or run.config.selects}
        for control in ("random", "trivialaugment"):
            compared = {first for first, second in one.compare if policy[second] == control}
            assert harder - {"by_chance"} <= compared | {"by_chance"}, f"every adversary beside {control}"


@pytest.mark.parametrize("name", ["M", "collapse", "controls", "transfer"])
def test_small_sizes_make_as_many_updates_as_they_state(name, tmp_path):
    """At the paper's rate a controller does not leave the uniform distribution in some dozens of updates."""
    one = load_experiment(name, "small", [0])
    (stated,) = re.findall(r"in (\d+) updates", one.note)
    for run in runs_of(one, tmp_path):
        config = run.config
        if config.policy == "controller":
            steps = (config.train_size or 50_000) // config.batch_size * config.epochs
            updates = math.ceil(steps / config.policy_interval)
            assert updates == int(stated) >= 150 or (run.arm == "advaa_teacher" and updates >= 150)


@pytest.mark.parametrize("size", SIZES)
def test_controls_are_those_that_a_claim_needs(size, tmp_path):
    runs = {run.arm: run.config for run in runs_of(load_experiment("controls", size, [0]), tmp_path)}
    assert {arm: (config.policy, config.reward) for arm, config in runs.items()} == {
        "none": ("none", "loss"),
        "random": ("random", "loss"),
        "trivialaugment": ("trivialaugment", "loss"),
        "advaa": ("controller", "loss"),
        "advaa_teacher": ("controller", "teacher"),
        "held": ("controller", "loss"),
        "selected": ("random", "loss"),
        "equal_compute": ("none", "loss"),
    }
    assert len({(c.batch_size, c.lr, c.model) for c in runs.values()}) == 1
    assert len({(c.M, c.epochs) for c in runs.values() if c.passes == 3 * c.M > 3}) == 1
    assert (runs["equal_compute"].M, runs["equal_compute"].epochs) == (1, runs["none"].M * runs["none"].epochs)
    assert (runs["advaa"].entropy_floor, runs["held"].entropy_floor_end) == (0, 0.8)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["transfer", "selection", "controls"])
def test_runs_are_made_scored_and_summarised_once(experiment, in_process, tmp_path, name):
    assert experiment(name, "--seeds", 0, 1).status == 0
    one = load_experiment(name, "tiny", [0, 1], SMALL)
    runs = list(runs_of(one, Path("logs")))
    assert all(run.is_scored() for run in runs)
    assert len(in_process) == 2 * len(runs)
    folder = tmp_path / "results" / name
    records = read_lines(folder / "runs.jsonl")
    assert [(record["arm"], record["seed"]) for record in records] == [(a, s) for a in one.arms for s in (0, 1)]
    for record in records:
        (run,) = (run for run in runs if (run.arm, run.seed) == (record["arm"], record["seed"]))
        assert record["error"] == read_results(run.directory)["benchmarks"]["clean"]["cells"][0]["error"]
        assert record["passes"] == 2 * run.config.passes
        assert record["train_loss"] == lines(run.directory / "metrics.jsonl")[-1]["train_loss"]
        assert str(tmp_path) not in json.dumps(record), "no path of this machine"
    summary = (folder / "summary.md").read_text()
    for arm in one.arms:
        errors = [100 * record["error"] for record in records if record["arm"] == arm]
        assert f"{statistics.fmean(errors):.2f} +- {statistics.stdev(errors):.2f}" in summary
    first, second = one.compare[0]
    error = {(record["arm"], record["seed"]): record["error"] for record in records}
    mean = statistics.fmean(100 * (error[first, seed] - error[second, seed]) for seed in (0, 1))
    passes = {record["arm"]: record["passes"] for record in records}
    assert f"| {first} - {second} | {passes[first] / passes[second]:.2f} | 2 | {mean:+.2f} | +- " in summary
    assert summary.count("none: 2 pairs" if one.ranks else "none: too small") == len(one.compare)
    assert "train_size 40" in summary
    assert f"\npython experiments.py {name} --set {' '.join(SMALL)} --seeds 0 1\n" in summary, "as it was typed"
    assert "Settings were changed on the command line" in summary

    again = experiment(name, "--seeds", 0, 1)
    assert (again.status, len(in_process)) == (0, 2 * len(runs)), "nothing is run twice"
    assert (folder / "summary.md").read_text() == summary


def synthetic_records():
    """Of an experiment of two lengths: under random policies 80 and 97 % training accuracy, errors by seed."""
    errors = {"random_1": (50, 52), "held_1": (51, 54), "random_2": (20, 22), "held_2": (17, 18)}
    return {
        arm: {
            seed: {
                "arm": arm,
                "seed": seed,
                "error": error / 100,
                "policy": arm.split("_")[0].replace("held", "controller"),
                "train_top1": (0.8 if arm.endswith("1") else 0.97) + (0.01 if seed else -0.01),
                "passes": 12,
                "epochs": 12 if arm.endswith("1") else 24,
                "settings": {},
            }
            for seed, error in enumerate(of_arm)
        }
        for arm, of_arm in errors.items()
    }


def test_differences_against_how_well_random_policies_are_fitted():
    one = load_experiment("regime", "tiny", [0, 1])
    (points,) = summaries.against_random(one, synthetic_records()).values()
    halves = [12.706 * statistics.stdev(d) / math.sqrt(2) for d in ((1, 2), (-3, -4))]
    assert [point for three in points for point in three] == pytest.approx(
        [80, 1.5, halves[0], 97, -3.5, halves[1]], rel=1e-3
    )
    figure = figures.regime({"held": points})
    (line,) = (line for line in figure.axes[0].lines if line.get_marker() == "o")
    assert line.get_ydata().tolist() == pytest.approx([1.5, -3.5])
    assert figures.regime({}) is None
    assert summaries.against_random(load_experiment("controls", "tiny"), synthetic_records()) == {}


def test_sentences_about_images_come_from_the_arms_that_are_compared():
    """At full size the policies come from a run on ImageNet, and the arms that are compared are scored on CIFAR-10."""
    one = load_experiment("transfer", "full")
    arms = {"source": 50_000, "direct": 10_000, "random": 10_000, "frozen": 10_000}
    records = [{"arm": arm, "test_images": images, "images": "official"} for arm, images in arms.items()]
    assert summaries.describe_test_images(one, records) == (
        "10,000 test images (official), where one image is 0.01 points (direct, random, frozen), and "
        "50,000 test images (official), where one image is 0.002 points (source)"
    )
    alike = summaries.describe_test_images(one, records[1:])
    assert alike == "10,000 test images (official), where one image is 0.01 points"


def test_the_summary_says_whether_random_policies_were_fitted():
    lines = summaries.fitted_or_not(synthetic_records())
    assert lines[:2] == [
        "- random_1: training accuracy 80.0%; the network did not fit random policies: at this length hardness was not "
        "put to the test.",
        "- random_2: training accuracy 97.0%; the network fitted random policies (from 95% on).",
    ]
    assert summaries.fitted_or_not({"held": {0: {"policy": "controller", "train_top1": 1.0}}}) == []


def test_stopped_runs_are_resumed_and_trained_ones_only_scored(finished, in_process, tmp_path):
    folder = tmp_path / "logs" / "mine-tiny"
    whole = {run.name: files(run) for run in folder.iterdir() if run.is_dir()}
    for run in ("source_1", "frozen_1"):
        shutil.rmtree(folder / run)
    (folder / "frozen_0" / "results.json").unlink()
    listed = finished("--seeds", 0, 1, "--list").out
    assert re.findall(r"^  (\w+: .*)", listed, re.MULTILINE) == [
        "source_0: done",
        "frozen_0: trained, not scored",
        "source_1: missing",
        "frozen_1: missing",
    ]
    assert in_process == []
    (command,) = (line for line in listed.splitlines() if "--name source_1" in line)
    words = command.split("main.py ")[1].replace("'", "").replace('"', "").split()
    with (tmp_path / "log").open("ab") as log:
        InProcess(["python", "main.py", *words, "--stop_epoch=1"], log, log, {})
    del in_process[:]
    assert "source_1: stopped after 1 of 2 epochs" in finished("--seeds", 0, 1, "--list").out
    assert finished("--seeds", 0, 1).status == 0
    assert [(Path(command[1]).name, "--resume" in command) for command in in_process] == [
        ("evaluate.py", False),
        ("main.py", True),
        ("evaluate.py", False),
        ("main.py", False),
        ("evaluate.py", False),
    ]
    assert {run.name: files(run) for run in folder.iterdir() if run.is_dir()} == whole


def test_a_run_without_its_last_checkpoint_is_resumed(finished, tmp_path):
    run = tmp_path / "logs" / "mine-tiny" / "source_0"
    whole = files(run, "metrics.jsonl", "policies.jsonl", "model.pt")
    (run / "results.json").unlink()
    (last,) = run.glob("checkpoints/epoch-0002-*")
    last.unlink()
    assert "source_0: stopped after 2 of 2 epochs" in finished("--list").out
    assert finished().status == 0
    assert files(run, "metrics.jsonl", "policies.jsonl", "model.pt") == whole


def test_other_seeds_and_other_sizes_are_kept(finished, tmp_path):
    results = tmp_path / "results" / "mine"
    text = (results / "runs.jsonl").read_text()
    other = json.dumps(json.loads(text.splitlines()[0]) | {"size": "small"})
    (results / "runs.jsonl").write_text(f"{other}\n{text}")
    summary = (results / "summary.md").read_text()
    (results / "summary.md").write_text(f"{summary}\n## small\n\nas it was\n")
    assert finished("--seeds", 1).status == 0
    records = read_lines(results / "runs.jsonl")
    assert records[0]["size"] == "small"
    assert [record["seed"] for record in records[1:]] == [0, 1] * 2
    summary = (results / "summary.md").read_text()
    assert "over seeds 0, 1" in summary
    assert summary.endswith("## small\n\nas it was\n")


def test_figures_are_drawn_with_matplotlib(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(summaries, "has_matplotlib", lambda: True)
    assert finished("--seeds", 0, 1).status == 0
    drawn = tmp_path / "results" / "mine" / "figures"
    assert {path.name for path in drawn.iterdir()} == {f"tiny_{n}.png" for n in ("errors", "entropy")}
    summary = (tmp_path / "results" / "mine" / "summary.md").read_text()
    assert all(f"(figures/{path.name})" in summary for path in drawn.iterdir())


def in_tiny(**changes):
    return {"sizes": {"tiny": TINY_SIZE | changes}}


BAD = [
    ({"question": 1}, "needs question, arms, compare, sizes"),
    ({"arm": {}}, "unknown key 'arm'; did you mean arms?"),
    ({"labels": ["a"]}, "needs question, arms"),
    ({"sizes": {"small": {}}}, "has no size tiny; it has small"),
    ({"sizes": {"tiny": {"conf": "confs/demo.yaml"}}}, "size tiny: needs conf, seeds, note"),
    (in_tiny(seeds=[]), "seeds: must be different whole numbers"),
    (in_tiny(seeds=[1, 1]), "seeds: must be different whole numbers"),
    (in_tiny(seeds=[True]), "seeds: must be different whole numbers"),
    (in_tiny(set=["lr"]), "set, arms and ranks are optional"),
    ({"arms": {"a b": {}}}, "arm 'a b': needs a name of letters and digits"),
    ({"arms": {"a": 5}}, "arm 'a': needs a name of letters and digits"),
    ({"compare": [["a", "c"]]}, "compare: every entry must be a pair of arms"),
    ({"arms": {"a": {"polcy": "none"}, "b": {}}}, "arm a: unknown setting 'polcy'; did you mean policy?"),
    ({"arms": {"a": {"lr": -1}, "b": {}}}, "arm a: lr: -1.0 must be above 0"),
    ({"arms": {"a": {"policy": "frozen", "policy_from": "@b"}, "b": {}}}, "arm a: @b is not an earlier arm"),
    ({"arms": {"a": {"conf": 5}, "b": {}}}, "5: there is no such conf file"),
    ({"arms": {"a": {"conf": "confs/none.yaml"}, "b": {}}}, "confs/none.yaml"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_an_invalid_file_is_refused_before_anything_runs(experiment, tmp_path, change, message, in_process):
    write_experiment(tmp_path, **({"arms": {"a": {}, "b": {}}, "compare": [["a", "b"]]} | change))
    assert_refused(experiment("mine.yaml"), message)
    assert in_process == []
    assert [item.name for item in tmp_path.iterdir()] == ["mine.yaml"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("control",), "unknown experiment; did you mean controls? (M, budget, collapse, controls"),
        (("experiments/controls.yaml",), "unknown experiment; did you mean controls?"),
        (("controls", "--seeds", "1", "1"), "must be different numbers"),
        (("controls", "--jobs", "0"), "--jobs: 0 must be at least 1"),
        (("controls", "--sice", "tiny"), "did you mean --size?"),
        (("controls", "--size", "huge"), "invalid choice"),
        (("controls", "--set", "lr"), "write it as setting=value"),
    ],
)
def test_mistakes_on_the_command_line(script, arguments, message):
    assert_refused(script("experiments.py", *arguments), message)


def test_a_run_with_other_settings_is_refused(finished, tmp_path):
    done = finished("--set", "lr=0.3")
    assert_refused(done, "source_0: holds a run with other settings (lr: 0.02 -> 0.3)", "choose another --logdir")
    path = tmp_path / "mine.yaml"
    path.write_text(path.read_text().replace("source", "origin"))
    assert_refused(finished(), "frozen_0: holds a run with other settings (policy_from: ", "origin_0")


def test_epochs_without_the_end_of_an_interval_have_no_entropy(mine, in_process, tmp_path):
    """An epoch has four steps here, an interval six."""
    assert mine("--set", "policy_interval=6").status == 0
    source, _ = read_lines(tmp_path / "results" / "mine" / "runs.jsonl")
    metrics = lines(tmp_path / "logs" / "mine-tiny" / "source_0" / "metrics.jsonl")
    assert ["entropy" in one for one in metrics] == [False, True]
    assert len(source["entropy"]) == len(source["loss_spread"]) == 1


def test_results_are_dropped_with_their_source(finished, tmp_path):
    results = tmp_path / "results" / "mine" / "runs.jsonl"
    changed = [record | ({"settings": {}} if record["arm"] == "source" else {}) for record in read_lines(results)]
    results.write_text("".join(json.dumps(record) + "\n" for record in changed))
    assert finished("--seeds", 1).status == 0
    assert [(record["arm"], record["seed"]) for record in read_lines(results)] == [("source", 1), ("frozen", 1)]


@pytest.fixture
def frozen_fails(monkeypatch):
    """The arm "frozen" cannot be run."""
    original = main.check_support

    def unsupported(config, world):
        if config.policy == "frozen":
            raise UserError("no such device\nuse another")
        return original(config, world)

    monkeypatch.setattr(main, "check_support", unsupported)


def test_finished_runs_are_summarised_if_another_fails(mine, in_process, tmp_path, frozen_fails):
    done = mine()
    assert_refused(done, "frozen_0: main.py failed with status 2", "use another", "frozen_0.log")
    assert "summary.md (1 of 2 runs)" in done.out
    assert [record["arm"] for record in read_lines(tmp_path / "results" / "mine" / "runs.jsonl")] == ["source"]


def test_an_interrupted_repetition_keeps_earlier_results(finished, tmp_path, frozen_fails):
    kept = tmp_path / "results" / "mine" / "runs.jsonl"
    before = kept.read_bytes()
    shutil.rmtree(tmp_path / "logs")
    done = finished("--seeds", 0, "--set", "lr=0.05")
    assert done.status == 2
    assert "warning: " in done.err
    assert "holds results of other settings, which unfinished runs do not replace" in done.err
    assert "frozen_0: main.py failed with status 2" in done.err
    assert kept.read_bytes() == before
    shutil.rmtree(tmp_path / "logs")
    records = read_lines(kept)
    assert finished("--seeds", 0).status == 2
    assert identities(read_lines(kept)) == identities(records)


@pytest.mark.parametrize("text", ["{\n", '{"size": "tiny"}\n'])
def test_damaged_results_are_not_overwritten(finished, tmp_path, text):
    kept = tmp_path / "results" / "mine" / "runs.jsonl"
    kept.write_text(text)
    assert_refused(finished(), "runs.jsonl: is damaged")
    assert kept.read_text() == text


@pytest.mark.slow
def test_after_ctrl_c_the_same_command_ends_with_the_same_files(start_process, tmp_path):
    """Real processes, two at a time, both of which are saved."""
    arms = {"learned": {"policy": "controller"}, "random": {"policy": "random"}}
    write_experiment(tmp_path, arms=arms, compare=[])
    small = ("--set", "train_size=60", "batch_size=10", "epochs=3", "eval_every=3")
    command = ("experiments.py", tmp_path / "mine.yaml", "--jobs", 2, *small)

    def places(name):
        return ("--logdir", tmp_path / name / "logs", "--results", tmp_path / name / "results")

    whole = start_process(*command, *places("whole"))
    assert whole.wait() == 0, whole.communicate()
    first = start_process(*command, *places("parts"))
    log = tmp_path / "parts" / "logs" / "mine-tiny" / "random_0" / "metrics.jsonl"
    while not (log.exists() and log.stat().st_size):
        assert first.poll() is None
        time.sleep(0.05)
    first.send_signal(signal.SIGINT)
    status, err = first.wait(), first.communicate()[1]
    assert status == 130, err
    assert "the runs in progress are saved; the same command continues" in err
    assert "Traceback" not in err
    second = start_process(*command, *places("parts"))
    assert second.wait() == 0, second.communicate()
    for run in ("learned_0", "random_0"):
        ours, theirs = (tmp_path / name / "logs" / "mine-tiny" / run for name in ("parts", "whole"))
        assert files(ours) == files(theirs), run
