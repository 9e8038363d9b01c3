"""The cells of a sweep as a grid: rows (methods) x levels (sparsities), some seeds in each place.

    mean      over the seeds of a place; infinite as soon as one of them is not finite
    spread    sample standard deviation over those seeds
    broken    mean perplexity above a unigram model's, which knows only how often each token occurs
    best      of a level: the row with the best mean among those that are neither broken nor at
              another sparsity than the level's, ties included; N:M rows by themselves

A place without cells is one that cannot be reached, such as 2:4 at another level than 0.5. Cells
come from a sweep that may not have ended, so places may differ in their seeds.
"""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SPARSITY_TOLERANCE = 0.005
"""A measured sparsity this far from another one is called different."""


@dataclass(frozen=True)
class Measure:
    """One number of every cell."""

    key: str
    """Its name in the cell."""
    state: str = "pruned"
    """Measured on the one-shot model, or on the `recovered` one."""
    lower_is_better: bool = True


KL = Measure("kl")
PERPLEXITY = Measure("perplexity")
TEXT_PERPLEXITY = Measure("text_perplexity")
ACCURACY = Measure("accuracy", lower_is_better=False)
RECOVERED_KL = Measure("kl", "recovered")
RECOVERED_ACCURACY = Measure("accuracy", "recovered", lower_is_better=False)

NULL_IS_INFINITE = ("kl", "perplexity")
"""Keys whose null was measured and is not finite; another null was not measured."""


class SweepGrid:
    """Rows in the order of the cells, levels ascending, and what was measured where they meet."""

    def __init__(
        self, cells: Sequence[Mapping], reference: Mapping[str, Any], headline_row: str
    ) -> None:
        """Sorts the cells into their places.

        Args:
            cells: As `write_sweep_report` takes them, at most one for each row, level and seed.
            reference: Likewise.
            headline_row: The row that claims are made for.
        """
        self.reference = reference
        self.headline_row = headline_row
        self.rows = list(dict.fromkeys(cell["row"] for cell in cells))
        self.levels = sorted({cell["sparsity"] for cell in cells})
        self.seeds = sorted({cell["seed"] for cell in cells})
        self.settings = {row: _settings(row, cells) for row in self.rows}
        self._places: dict[tuple[str, float], dict[int, Mapping]] = {}
        for cell in cells:
            place = self._places.setdefault((cell["row"], cell["sparsity"]), {})
            assert cell["seed"] not in place, f"two cells of {cell['row']} with one seed"
            place[cell["seed"]] = cell

    def cells(self, row: str, level: float | None = None) -> list[Mapping]:
        """Cells of a row, at one level or at all of them."""
        levels = self.levels if level is None else [level]
        return [cell for s in levels for cell in self._places.get((row, s), {}).values()]

    def values(self, measure: Measure, row: str, level: float) -> dict[int, float]:
        """Seed to value, seeds ascending; infinite where not finite, absent where not measured."""
        found = {}
        for seed, cell in sorted(self._places.get((row, level), {}).items()):
            state = cell.get(measure.state)
            if state is None or measure.key not in state:
                continue
            value = state[measure.key]
            if value is not None:
                found[seed] = value
            elif measure.key in NULL_IS_INFINITE:
                found[seed] = math.inf
        return found

    def mean(self, measure: Measure, row: str, level: float) -> float | None:
        """Over the seeds; None where nothing was measured."""
        values = self.values(measure, row, level).values()
        return sum(values) / len(values) if values else None

    def spread(self, measure: Measure, row: str, level: float) -> float | None:
        """Sample standard deviation; None for fewer than two seeds or a value not finite."""
        values = self.values(measure, row, level).values()
        if len(values) < 2 or not all(map(math.isfinite, values)):
            return None
        return statistics.stdev(values)

    def rows_with(self, measure: Measure) -> list[str]:
        """Rows in which it was measured at any level."""
        return [r for r in self.rows if any(self.values(measure, r, s) for s in self.levels)]

    def levels_with(self, measure: Measure, rows: Iterable[str]) -> list[float]:
        """Levels at which it was measured for any of the rows."""
        rows = list(rows)
        return [s for s in self.levels if any(self.values(measure, r, s) for r in rows)]

    def measured_sparsity(self, row: str, level: float) -> float:
        """Mean over the cells of a place, of which there is at least one."""
        return statistics.fmean(cell["measured_sparsity"] for cell in self.cells(row, level))

    def is_off_level(self, row: str, level: float) -> bool:
        """Whether the measured sparsity is another one than asked for."""
        return abs(self.measured_sparsity(row, level) - level) > SPARSITY_TOLERANCE

    def unigram(self, measure: Measure) -> float | None:
        """The unigram model's perplexity on the text of the measure; None where unknown."""
        is_text = measure.key == "text_perplexity"
        return self.reference.get("unigram_text_perplexity" if is_text else "unigram_perplexity")

    def is_broken(self, measure: Measure, row: str, level: float) -> bool:
        """Whether the model measured here is worse than a unigram model, where that is known."""
        key = "text_perplexity" if measure.key == "text_perplexity" else "perplexity"
        unigram = self.unigram(measure)
        perplexity = self.mean(Measure(key, measure.state), row, level)
        return unigram is not None and perplexity is not None and perplexity > unigram

    def pattern(self, row: str) -> str | None:
        """`2:4` and the like; None for a row without such a pattern."""
        scope = self.settings[row].get("scope")
        return scope if scope and ":" in scope else None

    def row_groups(self, rows: Iterable[str]) -> list[list[str]]:
        """Rows without an N:M pattern, then those with one, which have few levels."""
        rows = list(rows)
        groups = (
            [row for row in rows if self.pattern(row) is None],
            [row for row in rows if self.pattern(row) is not None],
        )
        return [group for group in groups if group]

    def best_rows(self, measure: Measure, level: float, rows: Iterable[str]) -> set[str]:
        """The best among `rows` that may be compared; none where all are equal."""
        groups: dict[str | None, dict[str, float]] = {}
        for row in rows:
            mean = self.mean(measure, row, level)
            if mean is None or not math.isfinite(mean):
                continue
            if not (self.is_broken(measure, row, level) or self.is_off_level(row, level)):
                groups.setdefault(self.pattern(row), {})[row] = mean
        choose = min if measure.lower_is_better else max
        return {
            row
            for means in groups.values()
            if len(set(means.values())) > 1
            for row, mean in means.items()
            if mean == choose(means.values())
        }


def _settings(row: str, cells: Sequence[Mapping]) -> dict[str, Any]:
    """What the row sets under `prune`, its sparsity left out."""
    prune = next(cell["prune"] for cell in cells if cell["row"] == row)
    return {key: value for key, value in prune.items() if key != "sparsity"}
