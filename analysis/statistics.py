"""Paired differences of runs that share their seeds: intervals of confidence, and what they allow to be said.

Runs of one seed share the network's first weights and the order of the images, so that their differences vary less than
they do. n pairs, differences d_1..d_n with mean and unbiased standard deviation s: the interval is
mean +- t s / sqrt(n), with t the quantile of Student's distribution with n - 1 degrees of freedom.
"""

import functools
import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

FEWEST = 5  # pairs: below, the interval rests on an assumption that so few cannot support
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
    """What paired differences of errors, the first arm's less the second's, allow to be said.

    comparisons: how many are drawn from the same runs. All their verdicts together are wrong about a difference that
    is not there with a probability of 5 % at most: each interval is as much wider (Bonferroni).
    """
    first, second = names
    if len(paired) < FEWEST:
        return f"nothing: {len(paired)} pair{'s' * (len(paired) > 1)}, {FEWEST} are the least"
    mean, half_width, _ = difference(paired, 1 - (1 - CONFIDENCE) / comparisons)
    if abs(mean) <= half_width:
        return "not told apart"
    better, worse = (first, second) if mean < 0 else (second, first)
    return f"{better} is better than {worse}"
