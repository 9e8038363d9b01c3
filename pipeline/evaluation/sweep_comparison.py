"""The headline row of a sweep against each other row, paired over calibration seeds.

With h_i and r_i the headline's and the other row's values of seed i, both finite,

    ratio        exp(mean(log(h_i / r_i)))
    difference   d = mean(d_i), d_i = r_i - h_i, or h_i - r_i where higher is better
    error        s(d_i) / sqrt(n), s the sample standard deviation

so that a positive difference speaks for the headline row. It wins where all d_i are positive and
d > 2 errors, loses where all are negative and -d > 2 errors, and else it is undecided. With three
seeds this is a modest test: normal differences of mean 0 pass it in 18 % of cases, half of them on
each side. One verdict is a hint; the same verdict at many levels is more.

No claim is made from fewer than three seeds (two would pass without any effect in 30 % of cases),
where the other row is broken or not finite, or where the two measured sparsities differ. A headline
row that is broken while the other is not can still lose, and does where all its seeds and none of
the other's are not finite.

A row is compared with the headline row if both have the same N:M pattern or none; otherwise with
the row that has the headline's settings and its own pattern, if the sweep has one.
"""

import math
import statistics
from dataclasses import dataclass
from enum import Enum

from pipeline.evaluation.sweep_grid import SPARSITY_TOLERANCE, Measure, SweepGrid

MIN_SEEDS = 3
"""Paired seeds that a verdict needs."""


class Verdict(Enum):
    """What a comparison says of the headline row."""

    WINS = "wins"
    LOSES = "loses"
    UNDECIDED = "undecided"
    NO_CLAIM = "no claim"


@dataclass(frozen=True)
class Comparison:
    """The headline row, or its peer, against another row at one level."""

    verdict: Verdict
    num_seeds: int
    """Seeds that both have."""
    ratio: float | None = None
    """Headline / other, geometric mean; None where a value is 0 or not finite."""
    difference: float | None = None
    """Mean advantage of the headline, in units of the measure; None where one is not finite."""
    standard_error: float | None = None
    """Of the difference; None for one seed."""


def peer(grid: SweepGrid, row: str) -> str | None:
    """The row that stands for the headline in a comparison with `row`; None if there is none."""
    headline = grid.headline_row
    if headline not in grid.rows or grid.pattern(row) == grid.pattern(headline):
        return headline if headline in grid.rows else None
    wanted = {**grid.settings[headline], "scope": None}
    alike = [r for r in grid.rows if {**grid.settings[r], "scope": None} == wanted]
    return next((r for r in alike if grid.pattern(r) == grid.pattern(row)), None)


def compare(grid: SweepGrid, measure: Measure, row: str, level: float) -> Comparison | None:
    """The comparison with `row` at one level; None where the two share no seed, or are one row."""
    headline = peer(grid, row)
    if headline in (None, row):
        return None
    own, other = (grid.values(measure, name, level) for name in (headline, row))
    seeds = [seed for seed in own if seed in other]
    if not seeds:
        return None
    own_values, other_values = [own[seed] for seed in seeds], [other[seed] for seed in seeds]
    if not all(map(math.isfinite, [*own_values, *other_values])):
        only_own_fails = min(own_values) == math.inf > max(other_values)
        verdict = Verdict.LOSES if only_own_fails and len(seeds) > 1 else Verdict.NO_CLAIM
        return Comparison(_permitted(verdict, grid, measure, headline, row, level), len(seeds))
    sign = -1 if measure.lower_is_better else 1
    advantages = [sign * (h - r) for h, r in zip(own_values, other_values, strict=True)]
    difference = statistics.fmean(advantages)
    error = statistics.stdev(advantages) / math.sqrt(len(seeds)) if len(seeds) > 1 else None
    return Comparison(
        _permitted(_verdict(advantages, difference, error), grid, measure, headline, row, level),
        len(seeds),
        _ratio(own_values, other_values),
        difference,
        error,
    )


def _verdict(advantages: list[float], difference: float, error: float | None) -> Verdict:
    if error is None or len(advantages) < MIN_SEEDS:
        return Verdict.NO_CLAIM
    if min(advantages) > 0 and difference > 2 * error:
        return Verdict.WINS
    if max(advantages) < 0 and -difference > 2 * error:
        return Verdict.LOSES
    return Verdict.UNDECIDED


def _permitted(
    verdict: Verdict, grid: SweepGrid, measure: Measure, headline: str, row: str, level: float
) -> Verdict:
    """The verdict, or none where the two models may not be compared."""
    own, other = (grid.measured_sparsity(name, level) for name in (headline, row))
    if grid.is_broken(measure, row, level) or abs(own - other) > SPARSITY_TOLERANCE:
        return Verdict.NO_CLAIM
    return verdict


def _ratio(own: list[float], other: list[float]) -> float | None:
    if min(*own, *other) <= 0:
        return None
    return math.exp(statistics.fmean(math.log(h / r) for h, r in zip(own, other, strict=True)))
