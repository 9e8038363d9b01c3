"""Intervals against published values, their defining equations and exact enumeration."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.evaluation.intervals import (
    mean_interval,
    paired_difference_interval,
    paired_ratio_interval,
    wilson_interval,
)

Z = 1.959963984540054


def answers(both: int, only_first: int, only_second: int, neither: int):
    """Two answer lists with these counts."""
    first = [True] * both + [True] * only_first + [False] * only_second + [False] * neither
    second = [True] * both + [False] * only_first + [True] * only_second + [False] * neither
    return first, second


def test_wilson_matches_values_computed_by_hand():
    # 8 of 10: centre (8 + z^2/2) / (10 + z^2) = 9.92073 / 13.84146, half-width
    # z sqrt(8 * 2 / 10 + z^2 / 4) / (10 + z^2) = 3.13585 / 13.84146.
    assert wilson_interval(8, 10) == pytest.approx((0.490162, 0.943318), abs=1e-6)
    assert wilson_interval(0, 10) == pytest.approx((0.0, Z**2 / (10 + Z**2)), abs=1e-12)
    assert wilson_interval(10, 10) == pytest.approx((10 / (10 + Z**2), 1.0), abs=1e-12)


@given(st.integers(1, 3000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_bounds_lie_z_standard_errors_from_the_estimate(counts):
    successes, trials = counts
    for bound in wilson_interval(successes, trials):
        assert 0 <= bound <= 1
        error = math.sqrt(bound * (1 - bound) / trials)
        assert abs(successes / trials - bound) == pytest.approx(Z * error, abs=1e-9)


def test_interval_of_a_mean_is_agresti_and_coull_s_where_it_is_a_proportion():
    # 8 of 10: (8 + 2) / (10 + 4), half-width z sqrt(p (1 - p) / 14).
    p = 10 / 14
    half = Z * math.sqrt(p * (1 - p) / 14)
    assert mean_interval([1.0] * 8 + [0.0] * 2) == pytest.approx((p - half, p + half))


@given(st.lists(st.floats(0, 1), min_size=1, max_size=50))
def test_interval_of_a_mean_holds_it_and_mirrors(values):
    low, high = mean_interval(values)
    assert 0 <= low <= sum(values) / len(values) + 1e-12
    assert sum(values) / len(values) - 1e-12 <= high <= 1
    mirrored = mean_interval([1 - value for value in values])
    assert mirrored == pytest.approx((1 - high, 1 - low))


@pytest.mark.parametrize("probabilities", [(0.2, 0.5, 0.3), (0.02, 0.03, 0.95), (0.6, 0.3, 0.1)])
def test_interval_of_a_mean_covers_the_truth_as_often_as_it_says(probabilities):
    """Exact: every count of prompts with pass@k 0, 1/2 and 1."""
    n, truth, covered = 40, probabilities[1] / 2 + probabilities[2], 0.0
    for none in range(n + 1):
        for half in range(n + 1 - none):
            counts = (none, half, n - none - half)
            chance = math.factorial(n)
            for count, p in zip(counts, probabilities, strict=True):
                chance *= p**count / math.factorial(count)
            low, high = mean_interval([0.0] * none + [0.5] * half + [1.0] * counts[2])
            covered += chance * (low <= truth <= high)
    assert 0.94 < covered < 0.995


def test_paired_difference_matches_values_computed_by_hand():
    # Table 1, 1 / 7, 12 (Bentur et al. 2009, in Fagerland et al. 2014): a = 2/23, b = 8/23,
    # d = -6/23, se = sqrt((10/23 - 36/529) / 23) = 0.126273.
    interval = paired_difference_interval(*answers(1, 1, 7, 12))
    assert interval == pytest.approx((-0.508360, -0.013379), abs=1e-6)


def test_paired_ratio_matches_values_computed_by_hand():
    # The same table: 2 and 8 of the 9 prompts that either answers. z shrinks by
    # sqrt(10 / 27) / (sqrt((1 - 3/11) / 3) + sqrt((1 - 9/11) / 9)), to 1.8799.
    z2 = (Z * math.sqrt(10 / 27) / (math.sqrt(8 / 33) + math.sqrt(2 / 99))) ** 2
    half_first = math.sqrt(z2) * math.sqrt(14 / 9 + z2 / 4)
    half_second = math.sqrt(z2) * math.sqrt(8 / 9 + z2 / 4)
    low = (2 + z2 / 2 - half_first) / (8 + z2 / 2 + half_second)
    high = (2 + z2 / 2 + half_first) / (8 + z2 / 2 - half_second)
    assert math.sqrt(z2) == pytest.approx(1.8799, abs=1e-4)
    assert paired_ratio_interval(*answers(1, 1, 7, 12)) == pytest.approx((low, high), abs=1e-12)


@pytest.mark.parametrize(
    "probabilities", [(0.8, 0.05, 0.1, 0.05), (0.4, 0.2, 0.1, 0.3), (0.9, 0.02, 0.05, 0.03)]
)
def test_paired_intervals_cover_the_truth_as_often_as_they_say(probabilities):
    """Exact: sums the probability of every table of 40 prompts whose interval holds the truth."""
    n = 40
    both, only_first, only_second, _ = probabilities
    difference = only_first - only_second
    ratio = (both + only_first) / (both + only_second)
    covered = {"difference": 0.0, "ratio": 0.0}
    for i in range(n + 1):
        for j in range(n + 1 - i):
            for k in range(n + 1 - i - j):
                counts = (i, j, k, n - i - j - k)
                log_probability = math.lgamma(n + 1) + sum(
                    count * math.log(p) - math.lgamma(count + 1)
                    for count, p in zip(counts, probabilities, strict=True)
                )
                if log_probability < -16:
                    continue
                lists = answers(*counts)
                low, high = paired_difference_interval(*lists)
                covered["difference"] += math.exp(log_probability) * (low <= difference <= high)
                low, high = paired_ratio_interval(*lists)
                covered["ratio"] += math.exp(log_probability) * (low <= ratio <= high)
    assert 0.94 < covered["difference"] < 0.998
    assert 0.94 < covered["ratio"] < 0.998


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_exchanging_the_models_mirrors_the_intervals(pairs):
    first, second = ([pair[side] for pair in pairs] for side in (0, 1))
    low, high = paired_difference_interval(first, second)
    assert paired_difference_interval(second, first) == pytest.approx((-high, -low))
    assert low <= (sum(first) - sum(second)) / len(pairs) <= high
    if any(first) and any(second):
        low, high = paired_ratio_interval(first, second)
        assert paired_ratio_interval(second, first) == pytest.approx((1 / high, 1 / low))
        assert low <= sum(first) / sum(second) <= high


def test_models_that_agree_on_every_prompt_still_have_a_width():
    same = [True] * 90 + [False] * 10
    low, high = paired_difference_interval(same, same)
    assert -0.05 < low < 0 < high < 0.05
    low, high = paired_ratio_interval(same, same)
    assert 0.95 < low < 1 < high < 1.05


@pytest.mark.parametrize(
    "call",
    [
        lambda: wilson_interval(0, 0),
        lambda: wilson_interval(3, 2),
        lambda: mean_interval([]),
        lambda: paired_difference_interval([], []),
        lambda: paired_ratio_interval([True], [True, False]),
        lambda: paired_ratio_interval([True, False], [False, False]),
    ],
)
def test_counts_without_an_interval_are_refused(call):
    with pytest.raises(ValueError, match=r"proportion|same prompts|no value|at least one"):
        call()
