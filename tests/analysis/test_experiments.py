"""Experiments: what a file stands for, what is run and what is not, and what is kept."""

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
from conftest import LITTLE, ROOT, assert_refused, files, lines, little_network

import evaluate
import experiments
import main
from analysis.specs import FOLDER, SIZES, load_experiment, runs_of
from analysis.summaries import read_records
from evaluation.results import read_results
from training.exit import exit_with_status
from utils import UserError

NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
SMALL = ("epochs=2", "eval_every=2", "train_size=40", "batch_size=10", "policy_interval=2", "workers=0", *LITTLE)


class InProcess:
    """In the place of subprocess.Popen: runs one of our scripts here, with a little network, before it returns."""

    commands = ()

    def __init__(self, command, stdout, stderr, env):
        self.commands.append(command)
        entry = {"main.py": main.main, "evaluate.py": evaluate.main}[Path(command[1]).name]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", command[1:])
            patch.setattr(main, "build_model", little_network)
            patch.setattr(evaluate, "build_model", little_network)
            text = os.fdopen(os.dup(stdout.fileno()), "a")
            out, err = contextlib.redirect_stdout(text), contextlib.redirect_stderr(text)
            with text, out, err, pytest.raises(SystemExit) as leaving:
                exit_with_status(entry)
        self.status = leaving.value.code

    def poll(self):
        return self.status

    def terminate(self):
        pass

    def wait(self):
        return self.status


@pytest.fixture
def in_process(monkeypatch):
    monkeypatch.setattr(InProcess, "commands", [])
    monkeypatch.setattr(experiments, "Popen", InProcess)
    monkeypatch.setattr(experiments, "SECONDS_BETWEEN_LOOKS", 0)
    return InProcess.commands


@pytest.fixture
def experiment(script, tmp_path):
    """experiment("controls", "--seeds", 0) -> Finished, with runs and results below tmp_path."""
    places = ("--logdir", tmp_path / "logs", "--results", tmp_path / "results")
    return lambda *arguments: script("experiments.py", "--set", *SMALL, *places, *arguments)


@pytest.fixture
def mine(experiment, tmp_path):
    """mine(*arguments): the same for a file of one's own, with two arms, of which one takes from the other."""
    arms = {"source": {"policy": "controller"}, "frozen": {"policy": "frozen", "policy_from": "@source"}}
    tiny = TINY_SIZE | {"ranks": False}
    content = {"question": "?", "arms": arms, "compare": [["frozen", "source"]], "sizes": {"tiny": tiny}}
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return lambda *arguments: experiment(path, *arguments)


def test_there_are_the_experiments_that_the_readme_names():
    assert {"M", "collapse", "controls", "sensitivity", "transfer"} <= set(NAMES)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in readme for name in NAMES)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", NAMES)
def test_every_size_of_every_experiment_can_be_run(name, size, tmp_path):
    one = load_experiment(name, size)
    assert len(one.seeds) >= 3
    one = load_experiment(name, size, [7])
    runs = list(runs_of(one, tmp_path))
    assert len(runs) == len(one.arms)
    assert len({run.directory for run in runs}) == len(runs)
    assert one.compare
    assert one.ranks is (size != "tiny"), "three tiny runs rank nothing"
    if size == "tiny":
        assert {run.config.dataset for run in runs} == {"shapes"}, "nothing to download"
    if name != "M":
        seen = {run.config.M * run.config.epochs for run in runs if run.arm != "source"}
        assert len(seen) == 1, "as many images for every arm"


@pytest.mark.parametrize("name", [name for name in NAMES if name != "sensitivity"])
def test_small_experiments_make_as_many_updates_as_they_say(name, tmp_path):
    """At the paper's rate a controller does not leave the uniform distribution in some dozens of updates."""
    one = load_experiment(name, "small", [0])
    (said,) = re.findall(r"in (\d+) updates", one.note)
    for run in runs_of(one, tmp_path):
        config = run.config
        if config.policy == "controller":
            steps = (config.train_size or 50_000) // config.batch_size * config.epochs
            assert math.ceil(steps / config.policy_interval) == int(said) >= 150


def test_controls_are_those_that_a_claim_needs(tmp_path):
    for size in SIZES:
        runs = {run.arm: run.config for run in runs_of(load_experiment("controls", size, [0]), tmp_path)}
        policies = {arm: (config.policy, config.reward) for arm, config in runs.items()}
        assert policies == {
            "none": ("none", "loss"),
            "random": ("random", "loss"),
            "trivialaugment": ("trivialaugment", "loss"),
            "advaa": ("controller", "loss"),
            "advaa_teacher": ("controller", "teacher"),
            "equal_compute": ("none", "loss"),
        }
        alike = [config for arm, config in runs.items() if arm != "equal_compute"]
        assert len({(c.M, c.epochs, c.batch_size, c.lr, c.model) for c in alike}) == 1
        assert (runs["equal_compute"].M, runs["equal_compute"].epochs) == (1, alike[0].M * alike[0].epochs)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "transfer" else pytest.mark.slow) for name in NAMES]
)
def test_an_experiment_is_run_scored_summed_up_and_not_run_again(experiment, in_process, tmp_path, name):
    done = experiment(name, "--seeds", 0, 1)
    assert done.status == 0, done.err
    one = load_experiment(name, "tiny", [0, 1], SMALL)
    runs = list(runs_of(one, tmp_path / "logs"))
    assert all(run.is_scored() for run in runs)
    assert len(in_process) == 2 * len(runs)
    records = read_records(tmp_path / "results" / name / "runs.jsonl")
    assert [(record["arm"], record["seed"]) for record in records] == [(a, s) for a in one.arms for s in (0, 1)]
    for record in records:
        (run,) = (run for run in runs if (run.arm, run.seed) == (record["arm"], record["seed"]))
        assert record["error"] == read_results(run.directory)["benchmarks"]["clean"]["cells"][0]["error"]
        assert record["train_loss"] == lines(run.directory / "metrics.jsonl")[-1]["train_loss"]
        assert str(tmp_path) not in json.dumps(record), "no path of this machine"
    summary = (tmp_path / "results" / name / "summary.md").read_text()
    for arm in one.arms:
        errors = [100 * record["error"] for record in records if record["arm"] == arm]
        assert f"{statistics.fmean(errors):.2f} +- {statistics.stdev(errors):.2f}" in summary
    first, second = one.compare[0]
    error = {(record["arm"], record["seed"]): 100 * record["error"] for record in records}
    mean = statistics.fmean(error[first, seed] - error[second, seed] for seed in (0, 1))
    assert f"| {first} - {second} | 2 | {mean:+.2f} | +- " in summary
    assert summary.count("nothing: too small") == len(one.compare)
    assert "train_size 40" in summary, "what was said for all arms"
    assert "`confs/demo.yaml`" in summary
    assert f"python experiments.py {name} --set epochs=2" in summary
    assert "Settings were changed on the command line" in summary

    again = experiment(name, "--seeds", 0, 1)
    assert (again.status, len(in_process)) == (0, 2 * len(runs)), "nothing is run twice"
    assert (tmp_path / "results" / name / "summary.md").read_text() == summary


def test_what_has_stopped_is_gone_on_with_and_what_is_trained_is_scored_alone(experiment, in_process, tmp_path, script):
    only = ("transfer", "--seeds", 0)
    assert experiment(*only).status == 0
    (tmp_path / "whole").mkdir()
    folder = tmp_path / "logs" / "transfer-tiny"
    whole = {run.name: files(run) for run in folder.iterdir() if run.is_dir()}
    del in_process[:]
    for run in ("random_0", "frozen_0"):
        shutil.rmtree(folder / run)
    (folder / "direct_0" / "results.json").unlink()
    listed = experiment(*only, "--list")
    assert [line.strip() for line in listed.out.splitlines() if line.startswith("  ") and line[2] != " "] == [
        "source_0: done",
        "direct_0: trained, not scored",
        "random_0: missing",
        "frozen_0: missing",
        "recorded_0: done",
    ]
    assert in_process == []
    (command,) = (line for line in listed.out.splitlines() if "--name random_0" in line)
    stopped = command.split("main.py ")[1].replace("'", "").replace('"', "").split()
    assert InProcess(["python", str(ROOT / "main.py"), *stopped, "--stop_epoch=1"], *streams(tmp_path), {}).status == 0
    del in_process[:]
    assert "random_0: stopped after 1 of 2 epochs" in experiment(*only, "--list").out
    assert experiment(*only).status == 0
    assert [(Path(command[1]).name, "--resume" in command) for command in in_process] == [
        ("evaluate.py", False),
        ("main.py", True),
        ("evaluate.py", False),
        ("main.py", False),
        ("evaluate.py", False),
    ]
    assert {run.name: files(run) for run in folder.iterdir() if run.is_dir()} == whole


def test_a_run_that_was_killed_before_its_last_checkpoint_is_not_taken_for_trained(mine, in_process, tmp_path):
    assert mine().status == 0
    run = tmp_path / "logs" / "mine-tiny" / "source_0"
    whole = files(run, "metrics.jsonl", "policies.jsonl", "model.pt")
    (run / "results.json").unlink()
    (last,) = run.glob("checkpoints/epoch-0002-*")
    last.unlink()
    assert "source_0: stopped after 2 of 2 epochs" in mine("--list").out
    assert mine().status == 0
    assert files(run, "metrics.jsonl", "policies.jsonl", "model.pt") == whole


def streams(tmp_path):
    log = (tmp_path / "log").open("ab")
    return log, log


def test_more_seeds_join_those_that_are_there_and_other_sizes_stay(mine, in_process, tmp_path):
    mine()
    results = tmp_path / "results" / "mine"
    text = (results / "runs.jsonl").read_text()
    other = json.dumps(json.loads(text.splitlines()[0]) | {"size": "small"})
    (results / "runs.jsonl").write_text(f"{other}\n{text}")
    summary = (results / "summary.md").read_text()
    (results / "summary.md").write_text(f"{summary}\n## small\n\nas it was\n")
    assert mine("--seeds", 1).status == 0
    records = read_records(results / "runs.jsonl")
    assert records[0]["size"] == "small"
    assert [record["seed"] for record in records[1:]] == [0, 1] * 2
    assert "over seeds 0, 1" in (results / "summary.md").read_text()
    assert (results / "summary.md").read_text().endswith("## small\n\nas it was\n")


@pytest.mark.slow
def test_figures_are_drawn_where_they_can_be(experiment, in_process, tmp_path, with_axes):
    assert experiment("transfer", "--seeds", 0, 1).status == 0
    figures = tmp_path / "results" / "transfer" / "figures"
    assert {path.name for path in figures.iterdir()} == {f"tiny_{n}.png" for n in ("errors", "differences", "entropy")}
    summary = (tmp_path / "results" / "transfer" / "summary.md").read_text()
    assert all(f"(figures/{path.name})" in summary for path in figures.iterdir())


TINY_SIZE = {"conf": "confs/demo.yaml", "seeds": [0], "note": "n"}
BAD = {
    "nothing": ({}, "lacks one of question, arms, compare, sizes"),
    "unknown": ({"arm": {}}, "unknown entry 'arm'; did you mean arms?"),
    "size": ({"sizes": {"small": {}}}, "has no size tiny; it has small"),
    "of size": ({"sizes": {"tiny": {"conf": "confs/demo.yaml"}}}, "size tiny: needs conf, seeds, note"),
    "no seeds": ({"sizes": {"tiny": TINY_SIZE | {"seeds": []}}}, "seeds: [] are not different numbers"),
    "seeds twice": ({"sizes": {"tiny": TINY_SIZE | {"seeds": [1, 1]}}}, "seeds: [1, 1] are not different numbers"),
    "true as a seed": ({"sizes": {"tiny": TINY_SIZE | {"seeds": [True]}}}, "seeds: [True] are not different"),
    "set": ({"sizes": {"tiny": TINY_SIZE | {"set": ["lr"]}}}, "and may have set, arms and ranks"),
    "own arms": ({"sizes": {"tiny": TINY_SIZE | {"arms": 3}}}, "and may have set, arms and ranks"),
    "ranks": ({"sizes": {"tiny": TINY_SIZE | {"ranks": "no"}}}, "and may have set, arms and ranks"),
    "words": ({"words": ["a"]}, "words: is no mapping"),
    "arm": ({"arms": {"a b": {}}}, "arm 'a b': needs a plain name"),
    "no settings": ({"arms": {"a": 5}}, "arm 'a': needs a plain name, a text, and settings in a mapping"),
    "pair": ({"compare": [["a", "c"]]}, "compare: every entry is a pair of arms"),
    "setting": ({"arms": {"a": {"polcy": "none"}, "b": {}}}, "arm a: unknown setting 'polcy'; did you mean policy?"),
    "value": ({"arms": {"a": {"lr": -1}, "b": {}}}, "arm a: lr: -1.0 must be above 0"),
    "later": ({"arms": {"a": {"policy": "frozen", "policy_from": "@b"}, "b": {}}}, "arm a: @b is no arm before it"),
    "no text": ({"arms": {False: {}, "b": {}}}, "arm False: needs a plain name, a text"),
    "conf of a number": ({"arms": {"a": {"conf": 5}, "b": {}}}, "conf: 5 cannot be the name of a file"),
    "conf of a nul": ({"arms": {"a": {"conf": "a\0b"}, "b": {}}}, "conf: 'a\\x00b' cannot be the name of a file"),
    "long conf": ({"arms": {"a": {"conf": "x" * 5000}, "b": {}}}, "cannot be the name of a file"),
    "conf": ({"arms": {"a": {"conf": "confs/none.yaml"}, "b": {}}}, "there is no such conf file"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_file_that_cannot_be_is_refused_before_anything_runs(script, tmp_path, what, in_process):
    change, words = BAD[what]
    content = {"question": "?", "arms": {"a": {}, "b": {}}, "compare": [["a", "b"]], "sizes": {"tiny": TINY_SIZE}}
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(content | change if change else {}))
    done = script("experiments.py", path, "--logdir", tmp_path / "logs", "--results", tmp_path / "results")
    assert_refused(done, words)
    assert in_process == []
    assert [item.name for item in tmp_path.iterdir()] == ["mine.yaml"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("control",), "there is no such experiment; did you mean controls? (M, collapse, controls"),
        (("controls", "--seeds", "1", "1"), "must be different numbers"),
        (("controls", "--jobs", "0"), "--jobs: 0 must be at least 1"),
        (("controls", "--sice", "tiny"), "did you mean --size?"),
        (("controls", "--size", "huge"), "invalid choice"),
        (("controls", "--set", "lr"), "write it as setting=value"),
    ],
)
def test_mistakes_on_the_command_line(script, arguments, words):
    assert_refused(script("experiments.py", *arguments), words)


def test_a_run_with_other_settings_is_not_taken_for_it(mine, in_process, tmp_path):
    assert mine().status == 0
    done = mine("--set", "lr=0.3")
    assert_refused(done, "source_0: holds a run with other settings (lr: 0.1 -> 0.3)", "choose another --logdir")


def test_a_run_that_takes_its_policies_from_another_source_than_before_is_not_taken_for_it(mine, in_process, tmp_path):
    assert mine().status == 0
    path = tmp_path / "mine.yaml"
    path.write_text(
        path.read_text().replace("source:", "origin:").replace("@source", "@origin").replace("- source", "- origin")
    )
    assert_refused(mine(), "frozen_0: holds a run with other settings (policy_from: ", "origin_0")


def test_epochs_in_which_no_interval_ends_are_passed_over(mine, in_process, tmp_path):
    """An epoch has four steps here, an interval six."""
    done = mine("--set", "policy_interval=6")
    assert done.status == 0, done.err
    source, _ = read_records(tmp_path / "results" / "mine" / "runs.jsonl")
    metrics = lines(tmp_path / "logs" / "mine-tiny" / "source_0" / "metrics.jsonl")
    assert ["entropy" in one for one in metrics] == [False, True]
    assert len(source["entropy"]) == len(source["loss_spread"]) == 1


def test_lines_of_other_seeds_go_with_their_source(mine, in_process, tmp_path):
    assert mine("--seeds", 0, 1).status == 0
    results = tmp_path / "results" / "mine" / "runs.jsonl"
    changed = [record | ({"settings": {}} if record["arm"] == "source" else {}) for record in read_records(results)]
    results.write_text("".join(json.dumps(record) + "\n" for record in changed))
    assert mine("--seeds", 1).status == 0
    assert [(record["arm"], record["seed"]) for record in read_records(results)] == [("source", 1), ("frozen", 1)]


def test_a_run_that_fails_is_named_with_what_it_said(mine, in_process, tmp_path, monkeypatch):
    monkeypatch.setattr(
        main, "check_support", lambda *_: (_ for _ in ()).throw(UserError("no such device\nuse another"))
    )
    done = mine()
    assert_refused(done, "source_0: main.py ended with status 2", "use another", "source_0.log")


@pytest.fixture
def frozen_fails(monkeypatch):
    original = main.check_support

    def unsupported(config, world):
        if config.policy == "frozen":
            raise UserError("no such device")
        return original(config, world)

    return lambda: monkeypatch.setattr(main, "check_support", unsupported)


def test_runs_that_have_ended_are_summed_up_though_another_fails(mine, in_process, tmp_path, frozen_fails):
    frozen_fails()
    done = mine()
    assert_refused(done, "frozen_0: main.py ended with status 2")
    assert "summary.md (1 of 2 runs)" in done.out
    records = read_records(tmp_path / "results" / "mine" / "runs.jsonl")
    assert [record["arm"] for record in records] == ["source"]


def test_earlier_results_outlast_an_interrupted_repetition(mine, in_process, tmp_path, frozen_fails):
    assert mine("--seeds", 0, 1).status == 0
    kept = tmp_path / "results" / "mine" / "runs.jsonl"
    before = read_records(kept)
    shutil.rmtree(tmp_path / "logs")
    frozen_fails()
    assert mine("--seeds", 0).status == 2
    assert [(one["arm"], one["seed"], one["error"]) for one in read_records(kept)] == [
        (one["arm"], one["seed"], one["error"]) for one in before
    ]


def test_unfinished_runs_do_not_replace_results_of_other_settings(mine, in_process, tmp_path, frozen_fails):
    assert mine("--seeds", 0, 1).status == 0
    kept = tmp_path / "results" / "mine" / "runs.jsonl"
    before = kept.read_bytes()
    shutil.rmtree(tmp_path / "logs")
    frozen_fails()
    done = mine("--seeds", 0, "--set", "lr=0.05")
    assert done.status == 2
    assert "warning: " in done.err
    assert "holds results of other settings, which unfinished runs do not replace" in done.err
    assert "frozen_0: main.py ended with status 2" in done.err
    assert kept.read_bytes() == before


def test_what_is_kept_and_damaged_is_not_written_over(mine, in_process, tmp_path):
    kept = tmp_path / "results" / "mine" / "runs.jsonl"
    kept.parent.mkdir(parents=True)
    for text, words in (("{", "cannot be read"), ('{"size": "tiny"}\n', "holds lines of another kind")):
        kept.write_text(text)
        assert_refused(mine(), "runs.jsonl", words)
        assert kept.read_text() == text


@pytest.mark.slow
def test_stopped_by_ctrl_c_it_goes_on_to_the_same_end(start_process, tmp_path):
    """Real processes, two at a time, both of which are saved."""
    arms = {"learned": {"policy": "controller"}, "random": {"policy": "random"}}
    content = {"question": "?", "arms": arms, "compare": [], "sizes": {"tiny": TINY_SIZE}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(content))
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
    assert "the runs under way are saved; the same command goes on" in err
    assert "Traceback" not in err
    second = start_process(*command, *places("parts"))
    assert second.wait() == 0, second.communicate()
    for run in ("learned_0", "random_0"):
        ours, theirs = (tmp_path / name / "logs" / "mine-tiny" / run for name in ("parts", "whole"))
        assert files(ours) == files(theirs), run
