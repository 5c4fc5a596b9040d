"""Which operations a source of policies favours beyond what chance explains.

The null hypothesis: every draw is uniformly random over the C choices, so that a choice is drawn Binomial(n, 1/C) times
in n draws. All tails are exact sums of binomial probabilities, and all C choices are tested together (Bonferroni).
"""

import bisect
import functools
import math
from collections.abc import Mapping
from typing import NamedTuple

SIGNIFICANCE = 0.05
LEAST_RATIO = 1.2  # a controller's random initial weights alone raise a share by up to a tenth, as many draws reveal
HELD = 0.005  # above the floor: so near to it the entropy counts as held there
UNMOVED = 0.995  # share of the maximal entropy above which a controller without a favourite counts as unmoved


class Preference(NamedTuple):
    """share: of the draws, 0..1. chance: the share that uniform draws would give, 0..1."""

    name: str
    share: float
    chance: float


def favoured(counts: Mapping[str, int], comparisons: int | None = None) -> list[Preference]:
    """What was drawn more often than chance and random initial weights explain, the most frequent first.

    counts: draws of every choice, those never drawn included. comparisons: how many choices are tested together, the
    number of counts by default. With uniform draws the probability of naming anything is at most 5 %.
    """
    draws, choices = sum(counts.values()), len(counts)
    limit = SIGNIFICANCE / (comparisons or max(1, choices))
    found = [
        Preference(name, count / draws, 1 / choices)
        for name, count in counts.items()
        if count * choices >= LEAST_RATIO * max(1, draws) and upper_tail(count, draws, 1 / choices) <= limit
    ]
    return sorted(found, key=lambda one: -one.share)


def verdict(entropy_share: float, counts: Mapping[str, int], floor: float = 0.0, most: int = 3) -> str:
    """One sentence about a controller.

    entropy_share: its entropy as a share of the maximum. counts: as in favoured. floor: least share it may have.
    """
    left, found = f"{100 * entropy_share:.1f} % of its maximal entropy is left", favoured(counts)
    if floor and entropy_share < floor + HELD:
        left += f", where it is held (entropy_floor {floor:.3g})"
    if not found:
        moved = "has not moved yet" if entropy_share >= UNMOVED else "has moved"
        return f"The controller {moved}: {left}, and no operation is drawn more often than chance explains."
    named = [f"{one.name} ({100 * one.share:.1f} %)" for one in found[:most]]
    more = f" and {len(found) - most} more" if len(found) > most else ""
    return (
        f"The controller has moved: {left}; it favours {', '.join(named)}{more}, "
        f"where chance gives {100 * found[0].chance:.2f} %."
    )


@functools.cache
def chance_range(draws: int, choices: int, comparisons: int = 1) -> tuple[float, float]:
    """The shares, 0..1, between which the share of one of `choices` is in uniform draws with at least 95 % probability.

    comparisons: of so many shares, all are within the range with that probability (Bonferroni).
    """
    if draws < 1 or choices < 2:
        return 0.0, 1.0
    limit, p = SIGNIFICANCE / 2 / comparisons, 1 / choices
    most = _largest(draws, p, limit)
    fewest = draws - _largest(draws, 1 - p, limit)
    return fewest / draws, most / draws


def _largest(draws: int, p: float, limit: float) -> int:
    """The smallest count that is exceeded with a probability of at most `limit`."""
    counts, mean = range(draws + 1), math.floor(draws * p)
    return bisect.bisect_left(counts, True, lo=mean, key=lambda count: upper_tail(count + 1, draws, p) <= limit)


def upper_tail(count: int, draws: int, p: float) -> float:
    """The probability of `count` or more successes in so many draws, each of probability p in (0, 1)."""
    total = 0.0
    for k in range(count, draws + 1):
        log_ways = math.lgamma(draws + 1) - math.lgamma(k + 1) - math.lgamma(draws - k + 1)
        term = math.exp(log_ways + k * math.log(p) + (draws - k) * math.log1p(-p))
        total += term
        if k > draws * p and term <= 1e-17 * total:
            break
    return min(1.0, total)
