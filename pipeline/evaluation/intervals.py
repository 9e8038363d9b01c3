"""How far a measured accuracy, and a comparison of two, could be off: 95 % confidence intervals.

One accuracy is `k` correct of `n` prompts; its interval is Wilson's (1927), which stays inside
[0, 1] and is right near the edges, where the textbook `p +- 1.96 sqrt(p (1 - p) / n)` is not.

The mean of values in [0, 1], one of each prompt (pass@k), has the interval of Agresti and Coull
(1998), American Statistician 52, 119-126, "add two successes and two failures", carried over:
mean and variance of the n values with 0, 0, 1 and 1 beside them. Where all values are 0 or 1 it is
theirs.

Two models that answer the same prompts are paired: with `n_first` prompts that only the first
answers, `n_second` only the second, and `z = 1.96`,

    difference   d = a - b with a = (n_first + 1) / (n + 2), b = (n_second + 1) / (n + 2),
                 d +- z sqrt((a + b - d^2) / (n + 2))
    ratio        [low_1 / high_2, high_1 / low_2], the two models' Wilson intervals over the prompts
                 that either answers, with z shrunk to the standard error of the log ratio

The first is Bonett and Price (2012), J. Educ. Behav. Stat. 37, 479-488; the second Bonett and Price
(2006), Statistics in Medicine 25, 3039-3047. Both are recommended for paired proportions by
Fagerland, Lydersen and Laake (2014), Statistics in Medicine 33, 2850-2875. They are closed forms:
no resampling and no seed, and still an honest width when the models agree on every prompt, where
a bootstrap's is zero. Only the 95 % level is given.

The first carries over to rewards per prompt: to n paired differences come +u and -u, u being what
one right answer is worth, and mean and variance are those of all n + 2.
"""

import math
from collections.abc import Sequence

Interval = tuple[float, float]

Z95 = 1.959963984540054
"""97.5 % quantile of the standard normal distribution."""


def wilson_interval(num_successes: int, num_trials: int, z: float = Z95) -> Interval:
    """Wilson's score interval of a proportion.

    Args:
        num_successes: Correct answers, in [0, num_trials].
        num_trials: Prompts, at least 1.
        z: Half-width in standard errors.

    Returns:
        Low and high, both in [0, 1].

    Raises:
        ValueError: The counts are not such counts.
    """
    if not 0 <= num_successes <= num_trials or num_trials == 0:
        raise ValueError(f"{num_successes} of {num_trials} is no proportion: it needs trials >= 1")
    z2 = z * z
    denominator = num_trials + z2
    centre = (num_successes + z2 / 2) / denominator
    num_failures = num_trials - num_successes
    half = z * math.sqrt(num_successes * num_failures / num_trials + z2 / 4) / denominator
    low = 0.0 if num_successes == 0 else centre - half
    high = 1.0 if num_failures == 0 else centre + half
    return low, high


def mean_interval(values: Sequence[float]) -> Interval:
    """95 % interval of a mean of fractions.

    Args:
        values: (n,) One fraction in [0, 1] of each prompt.

    Returns:
        Low and high, both in [0, 1].

    Raises:
        ValueError: There are no values.
    """
    if len(values) == 0:
        raise ValueError("a mean needs at least one prompt, got none")
    n = len(values) + 4
    mean = (sum(values) + 2) / n
    variance = (sum(value * value for value in values) + 2) / n - mean * mean
    half = Z95 * math.sqrt(max(0.0, variance) / n)
    return max(0.0, mean - half), min(1.0, mean + half)


def paired_difference_interval(first: Sequence[bool], second: Sequence[bool]) -> Interval:
    """95 % interval of `accuracy(first) - accuracy(second)` on the same prompts.

    Args:
        first: (n,) Whether the first model answered each prompt.
        second: (n,) The second model, the same prompts in the same order.

    Returns:
        Low and high, both in [-1, 1].

    Raises:
        ValueError: The lists are empty or of different length.
    """
    _, only_first, only_second = _paired_counts(first, second)
    n = len(first) + 2
    a, b = (only_first + 1) / n, (only_second + 1) / n
    half = Z95 * math.sqrt((a + b - (a - b) ** 2) / n)
    return max(-1.0, a - b - half), min(1.0, a - b + half)


def paired_reward_interval(differences: Sequence[float], unit: float) -> Interval:
    """95 % interval of a mean difference in reward on the same prompts.

    With `unit` 1 and differences of right answers it is `paired_difference_interval`.

    Args:
        differences: (n,) Reward of the first model minus that of the second, prompt by prompt.
        unit: Reward of one right answer, at least 0.

    Returns:
        Low and high; NaN where a difference is.

    Raises:
        ValueError: There are no differences.
    """
    if len(differences) == 0:
        raise ValueError("paired rewards need at least one prompt, got none")
    n = len(differences) + 2
    mean = sum(differences) / n
    variance = (sum(d * d for d in differences) + 2 * unit * unit) / n - mean * mean
    half = Z95 * math.sqrt(max(0.0, variance) / n) if math.isfinite(variance) else math.nan
    return mean - half, mean + half


def paired_ratio_interval(first: Sequence[bool], second: Sequence[bool]) -> Interval:
    """95 % interval of `accuracy(first) / accuracy(second)` on the same prompts.

    Args:
        first: (n,) Whether the first model answered each prompt.
        second: (n,) The second model, the same prompts in the same order.

    Returns:
        Low and high, both >= 0.

    Raises:
        ValueError: The lists are empty or of different length, or the second model answers nothing,
            so that the ratio has no value.
    """
    both, only_first, only_second = _paired_counts(first, second)
    num_first, num_second = both + only_first, both + only_second
    if num_second == 0:
        raise ValueError("the second model answers no prompt: a ratio to its accuracy has no value")
    num_either = both + only_first + only_second
    error_of_ratio = math.sqrt(
        (only_first + only_second + 2) / ((num_first + 1) * (num_second + 1))
    )
    errors_of_parts = sum(
        math.sqrt((1 - (k + 1) / (num_either + 2)) / (k + 1)) for k in (num_first, num_second)
    )
    z = Z95 * error_of_ratio / errors_of_parts
    low_first, high_first = wilson_interval(num_first, num_either, z)
    low_second, high_second = wilson_interval(num_second, num_either, z)
    return low_first / high_second, high_first / low_second


def _paired_counts(first: Sequence[bool], second: Sequence[bool]) -> tuple[int, int, int]:
    """Prompts answered by both, by the first alone, by the second alone."""
    if len(first) != len(second) or len(first) == 0:
        raise ValueError(
            f"paired answers need the same prompts, at least one: got {len(first)} and "
            f"{len(second)}"
        )
    pairs = [(bool(a), bool(b)) for a, b in zip(first, second, strict=True)]
    return pairs.count((True, True)), pairs.count((True, False)), pairs.count((False, True))
