"""Pictures of a sweep: KL, perplexity and accuracy against sparsity, and what their titles claim.

As in `plots.py`, a title is the sentence that a reader should take away. It sets the headline row
against the rows of other methods (against all rows where there are none), and counts the levels at
which its mean is the best: those where at least one of them is neither broken nor at another
sparsity than the level's. N:M rows are compared with the same pattern only, and have no place among
the lines over levels, for each has one level.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from pipeline.evaluation import figures
from pipeline.evaluation.formats import percent
from pipeline.evaluation.sweep_cell_text import mean_text
from pipeline.evaluation.sweep_drawing import draw_levels, draw_one_level, row_points
from pipeline.evaluation.sweep_grid import (
    ACCURACY,
    KL,
    PERPLEXITY,
    RECOVERED_ACCURACY,
    TEXT_PERPLEXITY,
    Measure,
    SweepGrid,
)


@dataclass(frozen=True)
class Picture:
    """How one measure is drawn."""

    measure: Measure
    file_name: str
    name: str
    """In a sentence."""
    label: str
    """Of its axis."""


PICTURES = (
    Picture(KL, "kl.png", "KL to the dense model", "KL to the dense model (nats per token)"),
    Picture(PERPLEXITY, "perplexity.png", "perplexity", "perplexity per token"),
    Picture(
        TEXT_PERPLEXITY,
        "text_perplexity.png",
        "perplexity on out-of-domain text",
        "perplexity per token of out-of-domain text",
    ),
    Picture(ACCURACY, "accuracy.png", "accuracy", "greedy accuracy"),
    Picture(
        RECOVERED_ACCURACY,
        "accuracy_recovered.png",
        "accuracy after recovery",
        "greedy accuracy after recovery",
    ),
)


def plot_sweep(grid: SweepGrid) -> dict[Measure, tuple[str, figures.Picture]]:
    """Draws every measure that has a number to draw.

    Returns:
        Measure to the picture and its path, relative to the page.
    """
    drawn = {}
    for picture in PICTURES:
        measure = picture.measure
        levels = grid.levels_with(measure, grid.rows)
        rows = grid.rows_with(measure)
        rows = grid.row_groups(rows)[0] if len(levels) > 1 else rows
        points = {row: row_points(grid, measure, row, levels) for row in rows}
        points = {row: found for row, found in points.items() if found}
        if points:
            title = picture_title(grid, picture, points, levels)
            draw = draw_levels if len(levels) > 1 else draw_one_level
            figure = draw(grid, measure, points, levels, title=title, label=picture.label)
            drawn[measure] = (f"plots/{picture.file_name}", figures.finish(figure, title))
    return drawn


def picture_title(
    grid: SweepGrid, picture: Picture, rows: Iterable[str], levels: list[float]
) -> str:
    """The sentence over a picture of these rows and levels."""
    measure, headline = picture.measure, grid.headline_row
    if headline not in rows:
        return f"{picture.name[0].upper()}{picture.name[1:]} by method and sparsity"
    rivals, kind = _rivals(grid, rows)
    if len(levels) == 1:
        return _title_of_one_level(grid, picture, rivals, kind, levels[0])
    measured = [level for level in levels if grid.values(measure, headline, level)]
    fair = {level: _sound_means(grid, measure, rivals, level) for level in measured}
    fair = {level: means for level, means in fair.items() if means}
    if not fair:
        return f"{headline} has no other {kind} to compare its {picture.name} with"
    num_won = sum(
        _is_better(measure, grid.mean(measure, headline, level), means)
        for level, means in fair.items()
    )
    rank = "lower" if measure.lower_is_better else "higher"
    which = "" if len(fair) == len(levels) else " that carry a claim"
    return (
        f"{headline} has a {rank} {picture.name} than every other {kind} at {num_won} of the "
        f"{len(fair)} sparsity levels{which}"
    )


def _rivals(grid: SweepGrid, rows: Iterable[str]) -> tuple[list[str], str]:
    """Rows that the headline row is set against, and what to call one of them."""
    headline = grid.headline_row
    others = [r for r in rows if r != headline and grid.pattern(r) == grid.pattern(headline)]
    method = grid.settings[headline]["method"]
    foreign = [row for row in others if grid.settings[row]["method"] != method]
    return (foreign, "method") if foreign else (others, "row")


def _sound_means(
    grid: SweepGrid, measure: Measure, rows: Iterable[str], level: float
) -> dict[str, float]:
    """Finite means of the rows that are neither broken nor at another sparsity."""
    means = {row: grid.mean(measure, row, level) for row in rows}
    return {
        row: mean
        for row, mean in means.items()
        if mean is not None
        and math.isfinite(mean)
        and not grid.is_broken(measure, row, level)
        and not grid.is_off_level(row, level)
    }


def _is_better(measure: Measure, own: float, means: dict[str, float]) -> bool:
    if measure.lower_is_better:
        return own < min(means.values())
    return own > max(means.values())


def _title_of_one_level(
    grid: SweepGrid, picture: Picture, rivals: list[str], kind: str, level: float
) -> str:
    measure, headline = picture.measure, grid.headline_row
    own = mean_text(measure, grid.mean(measure, headline, level))
    title = f"At {percent(level)} sparsity the {picture.name} of {headline} is {own}"
    means = _sound_means(grid, measure, rivals, level)
    if means:
        best = (min if measure.lower_is_better else max)(means, key=means.get)
        title += f", that of {best}, the best other {kind}, {mean_text(measure, means[best])}"
    return title
