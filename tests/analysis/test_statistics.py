"""Intervals against tables and simulation, and verdicts that say no more than the numbers do."""

import math

import numpy as np
import pytest

from analysis.statistics import difference, t_quantile, verdict

# Two-sided quantiles of Student's distribution, from printed tables.
TABLE = {(1, 0.95): 12.706, (2, 0.95): 4.303, (4, 0.95): 2.776, (9, 0.95): 2.262, (30, 0.95): 2.042, (4, 0.99): 4.604}


@pytest.mark.parametrize(("degrees", "confidence"), TABLE)
def test_quantiles_are_those_of_the_tables(degrees, confidence):
    assert t_quantile(degrees, confidence) == pytest.approx(TABLE[degrees, confidence], abs=0.001)


def test_many_degrees_are_the_normal_distribution():
    assert t_quantile(5000, 0.95) == pytest.approx(1.960, abs=0.002)


def test_an_interval_by_hand():
    mean, half_width, pairs = difference([1.0, 2.0, 6.0])
    assert (mean, pairs) == (3.0, 3)
    assert half_width == pytest.approx(4.303 * math.sqrt(7) / math.sqrt(3), rel=1e-3)
    assert difference([0.5]) == (0.5, math.inf, 1)
    assert difference([2.0, 2.0]) == (2.0, 0.0, 2)
    with pytest.raises(ValueError, match="no pairs"):
        difference([])


def test_intervals_hold_what_they_should_as_often_as_they_say():
    draws = np.random.default_rng(0).normal(1.0, 2.0, size=(400, 5)).tolist()
    held = [abs(mean - 1.0) <= half_width for mean, half_width, _ in map(difference, draws)]
    assert 0.92 < sum(held) / len(held) < 0.98


def test_verdicts():
    names = ("a", "b")
    clear = [-1.0, -1.1, -0.9, -1.05, -0.95]
    assert verdict(clear, 1, names) == "a is better than b"
    assert verdict([-d for d in clear], 1, names) == "b is better than a"
    assert verdict([0.1, -0.1, 0.2, -0.2, 0.05], 1, names) == "not told apart"
    assert verdict(clear[:3], 1, names) == "nothing: 3 pairs, 5 are the least"
    assert verdict(clear[:1], 1, names) == "nothing: 1 pair, 5 are the least"


def test_more_comparisons_ask_for_more():
    barely = [-1.0, -0.2, -0.7, -0.3, -0.8]
    mean, half_width, _ = difference(barely)
    assert abs(mean) > half_width
    assert verdict(barely, 1, ("a", "b")) == "a is better than b"
    assert verdict(barely, 40, ("a", "b")) == "not told apart"
