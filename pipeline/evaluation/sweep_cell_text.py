"""How a sweep's tables write one place of the grid, and the notes under a table that explain it.

    0.217 ± 0.009 † (at 0.472; 2 seeds)

mean, spread rounded like the mean, broken, measured sparsity where it is not the level's, and how
many seeds where not all of the sweep's are there. Bold: the best of its level.
"""

import math
from collections.abc import Sequence

from pipeline.evaluation.formats import number, percent, perplexity_text
from pipeline.evaluation.summary import NOT_MEASURED
from pipeline.evaluation.sweep_grid import Measure, SweepGrid

NOT_FINITE = "not finite"
BROKEN = "†"


def level_text(level: float) -> str:
    """Two decimals as in the paper, more where the level has them."""
    return max(f"{level:.2f}", f"{level:g}", key=len)


def mean_text(measure: Measure, mean: float | None) -> str:
    """One number without a spread; perplexities as `perplexity_text`."""
    if mean is None:
        return NOT_MEASURED
    if not math.isfinite(mean):
        return NOT_FINITE
    if measure.key == "accuracy":
        return percent(mean)
    return (perplexity_text if "perplexity" in measure.key else number)(mean)


def seeds_text(number_of_seeds: int) -> str:
    """`1 seed`, `2 seeds`."""
    return f"{number_of_seeds} seed{'s' * (number_of_seeds > 1)}"


def with_error(measure: Measure, mean: float, error: float, sign: str = "") -> str:
    """Mean ± error, both rounded at the third digit of the larger; accuracies in percent.

    Args:
        measure: Accuracies are fractions, one decimal of a percent.
        mean: Finite.
        error: Finite, not negative.
        sign: `+` writes the plus of positive means.
    """
    if measure.key == "accuracy":
        return f"{100 * mean:{sign}.1f} ± {100 * error:.1f} %"
    size = max(abs(mean), error)
    if 0 < size < 1e-4:
        return f"{mean:{sign}.2e} ± {error:.0e}"
    digits_before = math.floor(math.log10(size)) + 1 if size else 1
    decimals = max(0, 3 - digits_before)
    return f"{mean:{sign},.{decimals}f} ± {error:,.{decimals}f}"


def cell_text(
    grid: SweepGrid,
    measure: Measure,
    row: str,
    level: float,
    is_best: bool,
    *,
    with_spread: bool = True,
) -> str:
    """What a table shows where `row` and `level` meet."""
    values = grid.values(measure, row, level)
    if not values:
        return NOT_MEASURED
    mean, spread = grid.mean(measure, row, level), grid.spread(measure, row, level)
    is_pair = with_spread and spread is not None
    text = with_error(measure, mean, spread) if is_pair else mean_text(measure, mean)
    if is_best:
        text = f"**{text}**"
    if grid.is_broken(measure, row, level):
        text += f" {BROKEN}"
    remarks = []
    if grid.is_off_level(row, level):
        remarks.append(f"at {grid.measured_sparsity(row, level):.3f}")
    if len(values) < len(grid.seeds):
        remarks.append(seeds_text(len(values)))
    return f"{text} ({'; '.join(remarks)})" if remarks else text


def marks(
    grid: SweepGrid, measure: Measure, rows: Sequence[str], levels: Sequence[float], has_best: bool
) -> list[str]:
    """A list of notes on the marks that a table over these rows and levels has."""
    places = [(r, s) for r in rows for s in levels if grid.values(measure, r, s)]
    has_patterns = any(grid.pattern(row) for row in rows)
    notes = []
    if has_best:
        notes.append(f"Bold: the best of its level{' and pattern' if has_patterns else ''}.")
    if any(grid.is_broken(measure, row, level) for row, level in places):
        notes.append(
            f"{BROKEN} broken: worse than a unigram model, whose perplexity is "
            f"{number(grid.unigram(measure))}; shown, but no claim is made of it."
        )
    if any(grid.is_off_level(row, level) for row, level in places):
        notes.append("(at ...): the sparsity that was measured, where the level cannot be met.")
    if any(math.isinf(grid.mean(measure, row, level)) for row, level in places):
        notes.append(f"{NOT_FINITE.capitalize()}: for at least one seed.")
    if len(places) < len(rows) * len(levels):
        notes.append(f"`{NOT_MEASURED}`: not reachable, or not measured.")
    return ["\n".join(f"- {note}" for note in notes)] if notes else []
