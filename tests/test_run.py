"""From the command line: train, resume and score a tiny run."""

import pytest
from conftest import assert_refused, files, final_state, lines, same

from evaluation.results import read_results


def test_a_run_is_trained_resumed_exactly_and_scored(script, train):
    settings = ("dropout=0.1", "policy_interval=3", "controller_lr=0.05")
    whole = train("whole", *settings)
    assert [line["epoch"] for line in lines(whole / "metrics.jsonl")] == [1, 2, 3]
    stopped = train("resumed", "--stop_epoch=1", *settings)
    assert len(lines(stopped / "metrics.jsonl")) == 1
    resumed = train("resumed", "--resume", *settings)
    assert files(resumed) == files(whole)
    assert same(final_state(resumed), final_state(whole))

    done = script("evaluate.py", "--checkpoint", whole / "model.pt")
    assert done.status == 0, done.err
    (cell,) = read_results(whole)["benchmarks"]["clean"]["cells"]
    assert cell["error"] == pytest.approx(1 - lines(whole / "metrics.jsonl")[-1]["test_top1"])


def test_an_existing_run_is_not_overwritten(script, train, tmp_path):
    run = train("run", "epochs=1", "eval_every=1")
    before = files(run)
    assert_refused(script("main.py", "--logdir", tmp_path, "--name", "run"), "--resume", "--overwrite")
    assert files(run) == before
