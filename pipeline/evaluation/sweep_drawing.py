"""The two drawings of a sweep: lines over the levels, or rows of points where there is one level.

Points are means over seeds, pale bars reach from the lowest seed to the highest, a hollow
marker is broken. What is not finite is left out, and so is a KL of 0, which no logarithm shows.
Levels are evenly spaced, for the interesting ones crowd near 1; a row that misses its level stands
at its measured sparsity between them. Where the controls would squeeze the other rows, the frame is
the others' and cuts the controls.
"""

import math
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, StrMethodFormatter

from pipeline.evaluation.figures import GREY, add_legend, new_figure, percent_axis, plain_text
from pipeline.evaluation.formats import percent
from pipeline.evaluation.sweep_cell_text import level_text, mean_text
from pipeline.evaluation.sweep_grid import Measure, SweepGrid
from pipeline.evaluation.sweep_styles import CONTROLS, row_styles

HOLLOW = "hollow: worse than a unigram model"
CUT = "controls beyond the frame"
MAX_SQUEEZE = 1.4
"""Controls may lengthen the axis by this factor before the frame cuts them."""
MARGIN = 0.04
"""Free part of the axis at either end."""


@dataclass(frozen=True)
class Point:
    """One row at one level, over its seeds."""

    index: int
    """Of the level."""
    place: float
    """Where it is drawn: at the index, or between two of them if the row misses its level."""
    mean: float
    low: float
    high: float
    is_broken: bool


Points = dict[str, list[Point]]
"""Row to its points, levels ascending, at least one."""


def row_points(grid: SweepGrid, measure: Measure, row: str, levels: list[float]) -> list[Point]:
    """What can be drawn of a row."""
    points = []
    for index, level in enumerate(levels):
        values = grid.values(measure, row, level).values()
        if not values or not all(map(math.isfinite, values)):
            continue
        if measure.key != "accuracy" and min(values) <= 0:
            continue
        place = float(index)
        if grid.is_off_level(row, level):
            place = _place_between(grid.measured_sparsity(row, level), levels)
        mean, is_broken = grid.mean(measure, row, level), grid.is_broken(measure, row, level)
        points.append(Point(index, place, mean, min(values), max(values), is_broken))
    return points


def _place_between(sparsity: float, levels: list[float]) -> float:
    """Index of a sparsity among the levels, as a fraction; beyond them at the outer pace."""
    if len(levels) == 1:
        return 0.0
    below = max(0, min(len(levels) - 2, sum(level <= sparsity for level in levels) - 1))
    return below + (sparsity - levels[below]) / (levels[below + 1] - levels[below])


def draw_levels(
    grid: SweepGrid,
    measure: Measure,
    points: Points,
    levels: list[float],
    *,
    title: str,
    label: str,
) -> Figure:
    """Levels across, one line a row; the legend at the side in the order of the lines."""
    figure, (axes,) = new_figure(title, max(5.0, 0.27 * len(points) + 1.4))
    styles, lines = row_styles(grid), {}
    for row, found in points.items():
        style = styles[row] if len(found) > 1 else {**styles[row], "ls": ""}
        places = [point.place for point in found]
        (lines[row],) = axes.plot(places, [point.mean for point in found], **style)
        lows, highs = [point.low for point in found], [point.high for point in found]
        axes.vlines(places, lows, highs, color=style["color"], alpha=0.4, lw=2.5)
        _draw_hollow(axes, [(p.place, p.mean) for p in found if p.is_broken], style)
    references = [
        (axes.axhline(value, color=GREY, ls=dashes, lw=1.2, zorder=1), name)
        for value, name, dashes in _references(grid, measure)
    ]
    is_cut = _scale(axes, "y", grid, measure, points, may_cut=True)
    axes.set_xticks(range(len(levels)), [level_text(level) for level in levels])
    axes.set_xlabel("sparsity, levels evenly spaced" + _remarks(points, is_cut))
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
    ordered = _top_down(points)
    add_legend(
        figure,
        [*((lines[row], plain_text(row)) for row in ordered), *references],
        loc="outside right center",
    )
    return figure


def draw_one_level(
    grid: SweepGrid,
    measure: Measure,
    points: Points,
    levels: list[float],
    *,
    title: str,
    label: str,
) -> Figure:
    """Rows down, in their order, each a point with its number."""
    figure, (axes,) = new_figure(title, 0.35 * len(points) + 1.9)
    styles = row_styles(grid)
    for index, (row, (point,)) in enumerate(points.items()):
        style = {**styles[row], "ls": "", "ms": 9}
        axes.plot([point.low, point.high], [index, index], color=style["color"], lw=3, alpha=0.4)
        axes.plot(point.mean, index, **style)
        _draw_hollow(axes, [(point.mean, index)] * point.is_broken, style)
        text = mean_text(measure, point.mean)
        axes.annotate(
            text,
            (point.high, index),
            (9, 0),
            textcoords="offset points",
            va="center",
            bbox={"color": "white", "pad": 1, "alpha": 0.85},
        )
    references = [
        (axes.axvline(value, color=GREY, ls=dashes, lw=1.2, zorder=1), name)
        for value, name, dashes in _references(grid, measure)
    ]
    _scale(axes, "x", grid, measure, points, may_cut=False)
    axes.set_yticks(range(len(points)), [plain_text(row) for row in points])
    axes.set_ylim(len(points) - 0.4, -0.6)
    axes.set_xlabel(f"{label}, at {percent(levels[0])} sparsity{_remarks(points, False)}")
    axes.grid(axis="y", alpha=0.3)
    if references:
        add_legend(figure, references, loc="outside lower right", ncols=2)
    return figure


def _draw_hollow(axes: Axes, places: list[tuple[float, float]], style: dict) -> None:
    for x, y in places:
        axes.plot(x, y, **{**style, "ls": ""}, mfc="white")


def _remarks(points: Points, is_cut: bool) -> str:
    """A second line of the label below, for what needs a word."""
    is_any_broken = any(point.is_broken for found in points.values() for point in found)
    remarks = [HOLLOW] * is_any_broken + [CUT] * is_cut
    return f"\n({'; '.join(remarks)})" if remarks else ""


def _references(grid: SweepGrid, measure: Measure) -> list[tuple[float, str, str]]:
    """Value, name and dashes of the models that a picture shows as straight lines."""
    dense = grid.reference["dense"].get(measure.key) if measure.key != "kl" else None
    unigram = grid.unigram(measure) if "perplexity" in measure.key else None
    found = ((dense, "dense model", ":"), (unigram, "unigram model", "--"))
    return [
        (value, f"{name} ({mean_text(measure, value)})", dashes)
        for value, name, dashes in found
        if value is not None
    ]


def _scale(
    axes: Axes, side: str, grid: SweepGrid, measure: Measure, points: Points, *, may_cut: bool
) -> bool:
    """Scale and bounds of axis `side`: logarithmic beyond a factor of 10, but for accuracy.

    Returns:
        Whether controls were cut.
    """
    straight = [value for value, _, _ in _references(grid, measure)]
    usual = [r for r in points if grid.settings[r]["method"] not in CONTROLS] or list(points)
    of_all, of_usual = (_extent(points, rows, straight) for rows in (points, usual))
    is_log = measure.key != "accuracy" and of_all[1] > 10 * of_all[0]
    if measure.key == "accuracy":
        getattr(axes, f"{side}axis").set_major_formatter(percent_axis())
    elif is_log:
        getattr(axes, f"set_{side}scale")("log")
        getattr(axes, f"{side}axis").set_major_formatter(StrMethodFormatter("{x:,g}"))
        getattr(axes, f"{side}axis").set_minor_formatter(NullFormatter())
    to_axis = math.log10 if is_log else float
    (low, high), (usual_low, usual_high) = (
        [to_axis(bound) for bound in extent] for extent in (of_all, of_usual)
    )
    is_cut = may_cut and high - low > MAX_SQUEEZE * (usual_high - usual_low) > 0
    if is_cut:
        low, high = usual_low, usual_high
    margin = MARGIN * (high - low) or 0.1
    right = 3 * margin if side == "x" else margin
    bounds = low - margin, high + right
    getattr(axes, f"set_{side}lim")([10**b for b in bounds] if is_log else bounds)
    return is_cut


def _extent(points: Points, rows: list[str], straight: list[float]) -> tuple[float, float]:
    """Lowest and highest of what is drawn of the rows, and of the straight lines."""
    lows = [point.low for row in rows for point in points[row]]
    highs = [point.high for row in rows for point in points[row]]
    return min(lows + straight), max(highs + straight)


def _top_down(points: Points) -> list[str]:
    """Rows in the order of their lines at the last level with a sound row; others behind."""
    indices = [p.index for found in points.values() for p in found if not p.is_broken]
    last = max(indices or [found[-1].index for found in points.values()])
    means = {row: {p.index: p.mean for p in found}.get(last) for row, found in points.items()}
    here = sorted((r for r in points if means[r] is not None), key=means.get, reverse=True)
    return here + [row for row in points if means[row] is None]
