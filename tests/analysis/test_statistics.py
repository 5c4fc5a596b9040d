"""Intervals against tables and simulation, and verdicts that claim no more than the numbers show."""

import math

import numpy as np
import pytest

from analysis.statistics import difference, t_quantile, verdict

# Two-sided quantiles of Student's distribution, from printed tables.
TABLE = {(1, 0.95): 12.706, (2, 0.95): 4.303, (4, 0.95): 2.776, (9, 0.95): 2.262, (30, 0.95): 2.042, (4, 0.99): 4.604}
TABLE[5000, 0.95] = 1.960  # the normal distribution


@pytest.mark.parametrize(("degrees", "confidence"), TABLE)
def test_quantiles_equal_those_of_printed_tables(degrees, confidence):
    assert t_quantile(degrees, confidence) == pytest.approx(TABLE[degrees, confidence], abs=0.001)


def test_an_interval_by_hand():
    mean, half_width, pairs = difference([1.0, 2.0, 6.0])
    assert (mean, pairs) == (3.0, 3)
    assert half_width == pytest.approx(4.303 * math.sqrt(7) / math.sqrt(3), rel=1e-3)
    assert difference([0.5]) == (0.5, math.inf, 1)
    assert difference([2.0, 2.0]) == (2.0, 0.0, 2)
    with pytest.raises(ValueError, match="no pairs"):
        difference([])


def test_intervals_contain_the_mean_as_often_as_they_claim():
    draws = np.random.default_rng(0).normal(1.0, 2.0, size=(400, 5)).tolist()
    held = [abs(mean - 1.0) <= half_width for mean, half_width, _ in map(difference, draws)]
    assert 0.92 < sum(held) / len(held) < 0.98


def test_verdicts():
    names = ("a", "b")
    clear = [-1.0, -1.1, -0.9, -1.05, -0.95]
    assert verdict(clear, 1, names) == "a is better than b"
    assert verdict([-d for d in clear], 1, names) == "b is better than a"
    assert verdict([0.1, -0.1, 0.2, -0.2, 0.05], 1, names) == "no difference shown"
    assert verdict(clear[:3], 1, names) == "none: 3 pairs, at least 5 are needed"
    assert verdict(clear[:1], 1, names) == "none: 1 pair, at least 5 are needed"


def test_more_comparisons_need_a_clearer_difference():
    barely = [-1.0, -0.2, -0.7, -0.3, -0.8]
    mean, half_width, _ = difference(barely)
    assert abs(mean) > half_width
    assert verdict(barely, 1, ("a", "b")) == "a is better than b"
    assert verdict(barely, 40, ("a", "b")) == "no difference shown"
