"""Paired differences of runs with equal seeds: confidence intervals, and the verdicts that they support.

Runs with one seed share the network's initial weights and the order of the images, so that their differences vary less
than the runs do. n pairs, differences d_1..d_n with mean and unbiased standard deviation s: the interval is
mean +- t s / sqrt(n), with t the quantile of Student's distribution with n - 1 degrees of freedom.
"""

import functools
import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

FEWEST = 5  # pairs: fewer cannot support the assumption behind the interval
CONFIDENCE = 0.95


class Difference(NamedTuple):
    """Mean difference and half the width of its interval, in the differences' unit; inf for a single pair."""

    mean: float
    half_width: float
    pairs: int


def difference(paired: Sequence[float], confidence: float = CONFIDENCE) -> Difference:
    """Of one or more paired differences. Raises ValueError for none."""
    if not paired:
        raise ValueError("no pairs")
    n, mean = len(paired), statistics.fmean(paired)
    if n == 1:
        return Difference(mean, math.inf, n)
    return Difference(mean, t_quantile(n - 1, confidence) * statistics.stdev(paired) / math.sqrt(n), n)


@functools.cache
def t_quantile(degrees: int, confidence: float) -> float:
    """t such that a variable of Student's distribution lies within -t..t with this probability.

    With t = sqrt(degrees) tan(a) the density becomes cos(a) ** (degrees - 1), which is integrated over 0..pi/2.
    """
    angle = np.linspace(0, math.pi / 2, 200_001)
    density = np.cos(angle) ** (degrees - 1)
    mass = np.concatenate(([0.0], np.cumsum((density[1:] + density[:-1]) / 2)))
    return math.sqrt(degrees) * math.tan(np.interp(confidence, mass / mass[-1], angle))


def verdict(paired: Sequence[float], comparisons: int, names: tuple[str, str]) -> str:
    """Which arm is better, from paired differences of errors, the first arm's minus the second's.

    comparisons: how many are made with the same runs. The probability that any of their verdicts names a difference
    that does not exist is at most 5 %: intervals are wider accordingly (Bonferroni).
    """
    first, second = names
    if len(paired) < FEWEST:
        return f"none: {len(paired)} pair{'s' * (len(paired) > 1)}, at least {FEWEST} are needed"
    mean, half_width, _ = difference(paired, 1 - (1 - CONFIDENCE) / comparisons)
    if abs(mean) <= half_width:
        return "no difference shown"
    better, worse = (first, second) if mean < 0 else (second, first)
    return f"{better} is better than {worse}"
