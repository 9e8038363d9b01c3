"""`table.md`: what a sweep measured, one table for each question, in the shape of the paper's.

The paper (Jiang, Fu and Zhang, Improved Methods for Model Pruning and Distillation) has perplexity
by pruning level for |weights| against -|weights| (table 1) and by level for each method (table 2),
levels down, methods across. Both are here, beside KL and accuracy with methods down, a comparison
with the headline row paired over seeds, and what recovery and pruning cost.

Everything comes in as plain data: the cells of the stage `sweep`, each

    {row, prune: {method, redistribution, scope, ...}, sparsity, seed, measured_sparsity,
     prune_seconds, pruned: {accuracy, kl, top1, perplexity, text_perplexity},
     recovered: null or the same and {steps, seconds}}

A table whose numbers nobody measured is left out. What the marks mean stands under each table.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from pipeline.evaluation.figures import Picture
from pipeline.evaluation.formats import number, percent
from pipeline.evaluation.markdown import code_block, escape, picture_link, table
from pipeline.evaluation.page import write_page
from pipeline.evaluation.summary import NOT_MEASURED
from pipeline.evaluation.sweep_cell_text import (
    cell_text,
    level_text,
    marks,
    mean_text,
)
from pipeline.evaluation.sweep_comparison_tables import comparison_tables
from pipeline.evaluation.sweep_grid import (
    ACCURACY,
    KL,
    PERPLEXITY,
    RECOVERED_ACCURACY,
    RECOVERED_KL,
    TEXT_PERPLEXITY,
    Measure,
    SweepGrid,
)
from pipeline.evaluation.sweep_plots import plot_sweep

OWN_PLACE = ("title", "command", "headline_row")
"""Keys of the description that the page shows elsewhere than in its table."""


def write_sweep_report(
    folder: Path,
    cells: Sequence[Mapping[str, Any]],
    reference: Mapping[str, Any],
    description: Mapping[str, Any],
) -> None:
    """Writes `table.md`, `table.html` and `plots/*.png`.

    Args:
        folder: Made if missing.
        cells: In the order in which rows shall stand; those of an unfinished sweep will do.
        reference: `dense`, the dense model's numbers; `unigram_perplexity` and
            `unigram_text_perplexity`, null where unknown; `num_prompts`, `num_tokens`,
            `perplexity_on`.
        description: `title`, `command`, `headline_row`, and whatever else a reader shall know.
    """
    folder.mkdir(parents=True, exist_ok=True)
    grid = SweepGrid(cells, reference, description["headline_row"])
    pictures = plot_sweep(grid)
    text = render_page(grid, description, pictures)
    write_page(folder / "table.md", text, dict(pictures.values()))


def render_page(
    grid: SweepGrid, description: Mapping[str, Any], pictures: Mapping[Measure, tuple[str, Picture]]
) -> str:
    """The text of `table.md`; `pictures` as `plot_sweep` returns them, possibly none."""
    sections = [
        f"# {escape(description['title'])}",
        *_facts(grid, description),
        *_by_row(grid, KL, "KL to the dense model", pictures),
        *_by_level(grid, PERPLEXITY, f"Perplexity of {grid.reference['perplexity_on']}", pictures),
        *_by_level(grid, TEXT_PERPLEXITY, "Perplexity of text from elsewhere", pictures),
        *_by_row(grid, ACCURACY, "Accuracy, one-shot", pictures),
        *comparison_tables(grid, KL),
        *_by_row(grid, RECOVERED_ACCURACY, "Accuracy after recovery", pictures),
        *_recovery_cost(grid),
        *_by_row(grid, RECOVERED_KL, "KL to the dense model after recovery", pictures),
        *comparison_tables(grid, RECOVERED_ACCURACY),
        *_pruning_cost(grid),
        "## How to run it again",
        code_block(description["command"], "sh"),
    ]
    return "\n\n".join(sections) + "\n"


def _facts(grid: SweepGrid, description: Mapping[str, Any]) -> list[str]:
    others = {key: value for key, value in description.items() if key not in OWN_PLACE}
    rows = [[key.replace("_", " "), _fact(value)] for key, value in others.items()]
    seeds = f"{len(grid.seeds)} calibration seeds ({', '.join(map(str, grid.seeds))})"
    reference = grid.reference
    return [
        table([["what", "value"], *rows]),
        f"{len(grid.rows)} rows at {len(grid.levels)} sparsity levels, "
        f"{'one calibration seed' if len(grid.seeds) == 1 else seeds}. All on the same "
        f"{reference['num_prompts']:,} prompts and {reference['num_tokens']:,} tokens. "
        "Sparsity: fraction of zeros among the prunable weights.",
    ]


def _fact(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else escape(str(value))


SENTENCES = {
    KL: "KL(dense model || pruned model), nats per token; lower is better.",
    ACCURACY: "Greedy answers that are right, in percent of the prompts; higher is better.",
    PERPLEXITY: "Perplexity per token after one-shot pruning, no recovery; lower is better.",
    TEXT_PERPLEXITY: "The same on text that neither training nor calibration saw.",
    RECOVERED_KL: "KL(dense model || recovered model), nats per token; lower is better.",
    RECOVERED_ACCURACY: (
        "Greedy answers that are right after the recovery, in percent of the prompts; every row "
        "with its own mask held fixed; higher is better."
    ),
}


def _by_row(
    grid: SweepGrid, measure: Measure, title: str, pictures: Mapping[Measure, tuple[str, Picture]]
) -> list[str]:
    """A section of tables by row, the N:M rows in one of their own."""
    rows = grid.rows_with(measure)
    if not rows:
        return []
    sentence = f"{SENTENCES[measure]} {_averaging(grid)}"
    if measure.key == "accuracy" and grid.reference["dense"].get("accuracy") is not None:
        sentence += f" The dense model: {percent(grid.reference['dense']['accuracy'])}."
    return [
        f"## {title}",
        sentence,
        *_picture(pictures, measure),
        *(part for group in grid.row_groups(rows) for part in row_table(grid, measure, group)),
    ]


def row_table(
    grid: SweepGrid, measure: Measure, rows: Sequence[str], levels: Sequence[float] | None = None
) -> list[str]:
    """A table of means and spreads, rows down and levels across, and what its marks mean.

    Args:
        grid: The cells.
        measure: What is shown.
        rows: In this order.
        levels: None for all at which it was measured.
    """
    levels = levels or grid.levels_with(measure, rows)
    best = {level: grid.best_rows(measure, level, rows) for level in levels}
    body = [
        [escape(row), *(cell_text(grid, measure, row, s, row in best[s]) for s in levels)]
        for row in rows
    ]
    return [
        table([["method", *map(level_text, levels)], *body]),
        *marks(grid, measure, rows, levels, any(best.values())),
    ]


def _averaging(grid: SweepGrid) -> str:
    if len(grid.seeds) == 1:
        return "One seed."
    return f"Mean ± standard deviation over {len(grid.seeds)} seeds."


def _by_level(
    grid: SweepGrid, measure: Measure, title: str, pictures: Mapping[Measure, tuple[str, Picture]]
) -> list[str]:
    """The paper's table 2, and its table 1 where both rows of it were measured."""
    rows = grid.rows_with(measure)
    if not rows:
        return []
    over = "" if len(grid.seeds) == 1 else f" Mean over {len(grid.seeds)} seeds."
    unigram = grid.unigram(measure)
    known = "" if unigram is None else f" A unigram model has {number(unigram)}."
    sections = [
        f"## {escape(title)}",
        f"{SENTENCES[measure]} Shaped as the paper's table 2, level 0.00 the dense model."
        f"{over}{known}",
        *_picture(pictures, measure),
        *(part for group in grid.row_groups(rows) for part in _level_table(grid, measure, group)),
    ]
    pair = [row for row in _paper_pair(grid) if row in rows]
    if len(pair) == 2:
        sections += [
            "### By |weights| and by -|weights|",
            "Shaped as the paper's table 1: the smallest weights pruned first, or the largest.",
            *_level_table(grid, measure, pair),
        ]
    return sections


def _level_table(grid: SweepGrid, measure: Measure, rows: Sequence[str]) -> list[str]:
    """Levels down, rows across, means; the dense model first."""
    levels = grid.levels_with(measure, rows)
    best = {level: grid.best_rows(measure, level, rows) for level in levels}
    dense = mean_text(measure, grid.reference["dense"].get(measure.key))
    body = [
        [
            level_text(level),
            *(
                cell_text(grid, measure, r, level, r in best[level], with_spread=False)
                for r in rows
            ),
        ]
        for level in levels
    ]
    header = ["pruning level", *map(escape, rows)]
    return [
        table([header, [level_text(0.0), *[dense] * len(rows)], *body]),
        *marks(grid, measure, rows, levels, any(best.values())),
    ]


def _paper_pair(grid: SweepGrid) -> list[str]:
    """The rows by |weights| and by -|weights| that change no kept weight, one of each."""
    pair = []
    for method in ("magnitude", "negative_magnitude"):
        wanted = [
            row
            for row in grid.rows
            if grid.settings[row]["method"] == method
            and grid.settings[row]["redistribution"] == "none"
            and grid.pattern(row) is None
        ]
        pair += wanted[:1]
    return pair


def _picture(pictures: Mapping[Measure, tuple[str, Picture]], measure: Measure) -> list[str]:
    if measure not in pictures:
        return []
    path, picture = pictures[measure]
    return [picture_link(path, picture)]


def _recovery_cost(grid: SweepGrid) -> list[str]:
    rows = []
    for row in grid.rows_with(RECOVERED_ACCURACY):
        recovered = [cell["recovered"] for cell in grid.cells(row) if cell.get("recovered")]
        steps = sorted({entry["steps"] for entry in recovered})
        shown = " to ".join(f"{count:,}" for count in dict.fromkeys([steps[0], steps[-1]]))
        rows.append([escape(row), shown, number(median(e["seconds"] for e in recovered))])
    if not rows:
        return []
    return [
        "Optimizer steps of one recovery, and its seconds, the median over levels and seeds:",
        table([["method", "steps", "seconds"], *rows]),
    ]


def _pruning_cost(grid: SweepGrid) -> list[str]:
    rows = []
    for row in grid.rows:
        seconds = [c["prune_seconds"] for c in grid.cells(row) if c["prune_seconds"] is not None]
        rows.append([escape(row), number(median(seconds)) if seconds else NOT_MEASURED])
    if not rows:
        return []
    return [
        "## Seconds of pruning",
        "One pruning of the whole model, calibration passes included: the median over levels and "
        "seeds.",
        table([["method", "seconds"], *rows]),
    ]
