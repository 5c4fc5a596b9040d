"""Preferences against exact binomial tails and simulated draws."""

from fractions import Fraction
from math import comb

import numpy as np
import pytest
import torch

from controller import Controller
from policies.preferences import Preference, chance_range, favoured, upper_tail, verdict


def exact_tail(count, draws, p):
    p = Fraction(p)
    return float(sum(comb(draws, k) * p**k * (1 - p) ** (draws - k) for k in range(count, draws + 1)))


@pytest.mark.parametrize(("count", "draws", "p"), [(0, 5, 0.5), (3, 10, 0.25), (40, 80, 1 / 16), (90, 800, 1 / 16)])
def test_tails_are_those_of_the_binomial_distribution(count, draws, p):
    assert upper_tail(count, draws, p) == pytest.approx(exact_tail(count, draws, p), rel=1e-9)


@pytest.mark.parametrize(("draws", "choices", "comparisons"), [(20, 4, 1), (80, 16, 1), (80, 16, 16)])
def test_the_chance_range_is_the_narrowest_of_its_level(draws, choices, comparisons):
    low, high = (round(share * draws) for share in chance_range(draws, choices, comparisons))
    limit = 0.025 / comparisons
    assert exact_tail(high + 1, draws, 1 / choices) <= limit < exact_tail(high, draws, 1 / choices)
    assert 1 - exact_tail(low, draws, 1 / choices) <= limit < 1 - exact_tail(low + 1, draws, 1 / choices)


def test_uniform_draws_favour_nothing_in_19_of_20_runs():
    names = [f"op{number}" for number in range(16)]
    draws = np.random.default_rng(0).multinomial(800, [1 / 16] * 16, size=400).tolist()
    assert sum(bool(favoured(dict(zip(names, counts, strict=True)))) for counts in draws) <= 0.05 * 400


def test_initial_weights_are_no_preference_however_many_draws():
    torch.manual_seed(0)
    for seed in range(6):
        drawn = Controller().sample(2000, torch.Generator().manual_seed(seed)).op_MQK.flatten()
        assert favoured(dict(enumerate(torch.bincount(drawn, minlength=16).tolist()))) == []


def test_what_is_drawn_more_often_than_chance_is_named():
    counts = {"a": 60, "b": 400, "c": 140, "d": 200}
    assert favoured(counts) == [Preference("b", 0.5, 0.25)]
    assert favoured({"a": 400, "b": 0, "c": 0, "d": 400}) == [("a", 0.5, 0.25), ("d", 0.5, 0.25)]
    assert favoured({"a": 2, "b": 1}) == favoured({"a": 0, "b": 0}) == favoured({}) == favoured({"a": 9}) == []


def test_the_verdict_names_favourites_or_says_that_there_are_none():
    even = dict.fromkeys("abcd", 100)
    assert verdict(0.9999, even).startswith("The controller has not moved yet: 100.0 % of its maximal entropy is left")
    assert verdict(0.97, even).startswith("The controller has moved: 97.0 %")
    skewed = verdict(0.95, even | {"a": 200})
    assert "it favours a (40.0 %), where chance gives 25.00 %." in skewed
    assert verdict(0.95, dict.fromkeys("abcde", 100) | dict.fromkeys("fghijk", 0)).count("and 2 more") == 1
