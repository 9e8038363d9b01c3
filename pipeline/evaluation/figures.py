"""What every picture of a run shares: size, title, colours, and the forms in which it is kept.

Figures are made without pyplot, so nothing global is touched and no display is needed. Colours are
Okabe and Ito's, which the colour-blind tell apart; on a dark page the same hues are lighter. A PNG
is 1000 pixels wide and has its title in it; the SVGs leave the title to the page around them.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter, PercentFormatter, StrMethodFormatter
from matplotlib.transforms import Bbox

BLUE, ORANGE, SKY, GREY = "#0072B2", "#D55E00", "#56B4E9", "#7F7F7F"
GREEN, PURPLE, AMBER, BLACK = "#009E73", "#CC79A7", "#E69F00", "#000000"
CELL_DARK, CELL_LIGHT = "#010101", "#FEFEFE"
"""Ink on a coloured cell: the same on every page."""
DARK_PAGE = {
    "#000000": "#E6E4DF",
    "#ffffff": "#16181B",
    BLUE: "#5AA9E6",
    ORANGE: "#F28B45",
    SKY: "#4580A8",
    GREY: "#9A9FA5",
    GREEN: "#2FC29A",
}
"""A colour on a light page to the one that takes its place on a dark one."""
WIDTH_INCHES, NARROW_INCHES, DOTS_PER_INCH = 8.0, 3.75, 125
LEGEND_CHARACTERS, LEGEND_LINE_INCHES = 30, 0.2
NARROW_TICKS = 4
TITLE_CHARACTERS, NARROW_LABEL_CHARACTERS = 84, 40


@dataclass(frozen=True)
class Picture:
    """One drawing, in the forms that a report needs."""

    title: str
    """The sentence a reader should take away; also its caption."""
    png: bytes
    wide: str
    """SVG of a light page, transparent, 8 inches wide."""
    narrow: str
    """The same drawn again for the width of a telephone."""


def new_figure(
    title: str, height_inches: float, rows: int = 1, columns: int = 1, sharex: bool = False
) -> tuple[Figure, list[Axes]]:
    """A titled figure and its axes, row by row."""
    figure = Figure((WIDTH_INCHES, height_inches), DOTS_PER_INCH, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)
    lines = fill(title.replace(" %", "\N{NO-BREAK SPACE}%"), TITLE_CHARACTERS)
    figure.suptitle(lines, x=0.015, ha="left", fontsize=12)
    grid = figure.subplots(rows, columns, sharex=sharex, squeeze=False)
    for axes in grid.flat:
        axes.spines[["top", "right"]].set_visible(False)
    return figure, list(grid.flat)


def finish(figure: Figure, title: str) -> Picture:
    """Draws a figure in every form; it is of no use afterwards.

    Args:
        figure: From `new_figure`.
        title: The same as there.
    """
    png = io.BytesIO()
    figure.savefig(png, format="png")
    width, height = figure.get_size_inches()
    (heading,) = figure.texts
    below_heading = heading.get_window_extent().y0 / figure.dpi
    heading.remove()
    figure.set_layout_engine("none")  # the axes stay where the layout has put them
    wide = _svg(figure, Bbox([[0, 0], [width, below_heading]]))
    figure.set_layout_engine("constrained", w_pad=0.04, h_pad=0.04)
    for legend in figure.legends:
        legend.set_loc("outside lower center")
        names = "\n".join(text.get_text() for text in legend.get_texts())
        height += LEGEND_LINE_INCHES * len(names.splitlines())
    figure.set_size_inches(NARROW_INCHES, height)
    for axes in figure.axes:
        label = fill(axes.get_xlabel(), NARROW_LABEL_CHARACTERS)
        axes.set_xlabel(label, ha="right", x=1)  # below long names too, not only below the axes
        if axes.get_xscale() == "log":
            axes.xaxis.set_major_locator(LogLocator(numticks=NARROW_TICKS))
    return Picture(title, png.getvalue(), wide, _svg(figure))


def _svg(figure: Figure, part: Bbox | None = None) -> str:
    """The figure, or a part of it in inches; the same bytes for the same figure."""
    text = io.StringIO()
    with rc_context({"svg.hashsalt": "picture"}):
        figure.savefig(
            text, format="svg", transparent=True, bbox_inches=part, metadata={"Date": None}
        )
    return text.getvalue()[text.getvalue().index("<svg") :]


def for_dark_page(svg: str) -> str:
    """An SVG of `Picture` in the colours of a dark page."""
    for light, dark in DARK_PAGE.items():
        svg = svg.replace(light.lower(), dark.lower())
    # What matplotlib draws in black has no colour of its own and takes the root's.
    return svg.replace("<svg ", f'<svg fill="{DARK_PAGE["#000000"].lower()}" ', 1)


def write_picture(picture: Picture, path: Path) -> None:
    """Writes the PNG, making its folder where needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(picture.png)


def add_legend(figure: Figure, entries: Sequence[tuple[Line2D, str]], **where) -> None:
    """A legend outside the axes, which `finish` puts below them on a telephone.

    Args:
        figure: From `new_figure`.
        entries: Lines and their names, as `plain_text` gives them.
        where: `loc`, `ncols`.
    """
    handles, labels = zip(*entries, strict=True)
    figure.legend(handles, labels, frameon=False, fontsize=9, handlelength=3.5, **where)


def plain_text(name: str) -> str:
    """A user's name for something on a few lines, its signs no mathematics."""
    return fill(name, LEGEND_CHARACTERS).replace("$", r"\$")


def plain_numbers(axis: Axis) -> None:
    """Labels the decades of a logarithmic axis without exponents where they are short."""
    axis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    axis.set_minor_formatter(NullFormatter())


def percent_axis(decimals: int = 0) -> PercentFormatter:
    """Tick labels of an axis of fractions."""
    return PercentFormatter(1, decimals=decimals, symbol=" %")
