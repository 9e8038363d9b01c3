"""The headline row of a sweep against each other row, as Markdown: sentence, table, rules."""

from collections import Counter
from collections.abc import Sequence

from pipeline.evaluation.formats import number
from pipeline.evaluation.markdown import escape, table
from pipeline.evaluation.summary import NOT_MEASURED
from pipeline.evaluation.sweep_cell_text import (
    BROKEN,
    NOT_FINITE,
    level_text,
    seeds_text,
    with_error,
)
from pipeline.evaluation.sweep_comparison import MIN_SEEDS, Comparison, Verdict, compare, peer
from pipeline.evaluation.sweep_grid import Measure, SweepGrid

Comparisons = dict[tuple[str, float], Comparison]
"""By row and level."""

VERDICT_TEXTS = {
    Verdict.WINS: "**wins**",
    Verdict.LOSES: "**loses**",
    Verdict.UNDECIDED: "undecided",
    Verdict.NO_CLAIM: "no claim",
}


def comparison_tables(grid: SweepGrid, measure: Measure) -> list[str]:
    """A section on KL or accuracy; empty where there is nothing to compare."""
    comparisons = _comparisons(grid, measure, grid.rows, grid.levels)
    if not comparisons:
        return []
    rows = dict.fromkeys(row for row, _ in comparisons)
    state = ", recovered" if measure.state == "recovered" else ""
    name = escape(grid.headline_row)
    return [
        f"## {name} against each row{state}",
        _summary(name, comparisons),
        *(_table(grid, measure, group, comparisons) for group in grid.row_groups(rows)),
        _rules(grid, measure, name),
    ]


def against_table(
    grid: SweepGrid, measure: Measure, rows: Sequence[str], levels: Sequence[float]
) -> str:
    """The headline row against these rows, rows down and levels across."""
    comparisons = _comparisons(grid, measure, rows, levels)
    return _table(grid, measure, list(dict.fromkeys(row for row, _ in comparisons)), comparisons)


def _comparisons(
    grid: SweepGrid, measure: Measure, rows: Sequence[str], levels: Sequence[float]
) -> Comparisons:
    return {
        (row, level): compared
        for row in rows
        for level in levels
        if (compared := compare(grid, measure, row, level)) is not None
    }


def _table(grid: SweepGrid, measure: Measure, rows: Sequence[str], comparisons: Comparisons) -> str:
    """Rows down, the levels that any of them has across."""
    levels = [s for s in grid.levels if any((row, s) in comparisons for row in rows)]
    body = [
        [_name(grid, row), *(_cell(grid, measure, row, s, comparisons) for s in levels)]
        for row in rows
    ]
    return table([["against", *map(level_text, levels)], *body])


def _name(grid: SweepGrid, row: str) -> str:
    """The row, and who stands for the headline where that is another one."""
    headline = peer(grid, row)
    if headline == grid.headline_row:
        return escape(row)
    return f"{escape(row)} (compared: {escape(headline)})"


def _cell(
    grid: SweepGrid,
    measure: Measure,
    row: str,
    level: float,
    comparisons: Comparisons,
) -> str:
    compared = comparisons.get((row, level))
    if compared is None:
        return NOT_MEASURED
    mark = f" {BROKEN}" if grid.is_broken(measure, row, level) else ""
    numbers = _numbers(measure, compared)
    if compared.num_seeds < len(grid.seeds):
        numbers += f"<br>{seeds_text(compared.num_seeds)}"
    if compared.num_seeds < MIN_SEEDS and compared.verdict is Verdict.NO_CLAIM:
        return numbers + mark
    return f"{VERDICT_TEXTS[compared.verdict]}{mark}<br>{numbers}"


def _numbers(measure: Measure, compared: Comparison) -> str:
    """KL: ratio and difference; accuracy: difference in points of percent."""
    if compared.difference is None:
        return NOT_FINITE
    if compared.standard_error is not None:
        text = with_error(measure, compared.difference, compared.standard_error, sign="+")
    elif measure.key == "accuracy":
        text = f"{100 * compared.difference:+.1f} %"
    else:
        text = ("+" if compared.difference > 0 else "") + number(compared.difference)
    if measure.key == "accuracy" or compared.ratio is None:
        return text
    return f"{number(compared.ratio)} ({text})"


def _summary(name: str, comparisons: Comparisons) -> str:
    if all(compared.num_seeds < MIN_SEEDS for compared in comparisons.values()):
        return (
            f"Fewer than {MIN_SEEDS} seeds: no claim is made of {name}; the table shows what was "
            "measured."
        )
    counts = Counter(compared.verdict for compared in comparisons.values())
    return (
        f"Of {len(comparisons)} comparisons {name} wins {counts[Verdict.WINS]} and loses "
        f"{counts[Verdict.LOSES]}; {counts[Verdict.UNDECIDED]} are undecided, and of "
        f"{counts[Verdict.NO_CLAIM]} no claim is made."
    )


def _rules(grid: SweepGrid, measure: Measure, name: str) -> str:
    """What the numbers are, and when a verdict falls."""
    if measure.key == "accuracy":
        numbers = f"Points of percent: accuracy of {name} minus that of the row"
    else:
        numbers = (
            f"KL of {name} / KL of the row, geometric mean over seeds, and in brackets KL of the "
            f"row minus KL of {name}, nats per token"
        )
    notes = [f"{numbers}. Paired over seeds; positive differences speak for {name}."]
    if len(grid.seeds) > 1:
        notes += [
            "± standard error of the mean difference. Wins or loses: all seeds have one sign and "
            "the mean is more than two standard errors from 0. With three seeds, differences "
            "without any effect pass this in 18 % of cases: one verdict is a hint, a row of them "
            "is more.",
            f"No claim: fewer than {MIN_SEEDS} seeds, a row that is broken ({BROKEN}) or not "
            "finite, or measured sparsities more than 0.005 apart.",
        ]
    left_out = [row for row in grid.rows if peer(grid, row) is None]
    if left_out:
        notes.append(
            f"Not compared, for want of {name} with the same N:M pattern: "
            f"{', '.join(map(escape, left_out))}."
        )
    return "\n".join(f"- {note}" for note in notes)
