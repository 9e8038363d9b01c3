"""What every picture of a run shares: size, title, colours, axes of fractions.

Figures are made without pyplot, so nothing global is touched and no display is needed. Colours are
Okabe and Ito's, which the colour-blind tell apart. A PNG is 1000 pixels wide.
"""

from pathlib import Path
from textwrap import fill

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

BLUE, ORANGE, SKY, GREY = "#0072B2", "#D55E00", "#56B4E9", "#7F7F7F"
GREEN, PURPLE, AMBER, BLACK = "#009E73", "#CC79A7", "#E69F00", "#000000"
WIDTH_INCHES, DOTS_PER_INCH = 8.0, 125
TITLE_CHARACTERS = 84


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


def save_figure(figure: Figure, path: Path) -> None:
    """Writes the figure; the suffix of `path` chooses the format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def percent_axis(decimals: int = 0) -> PercentFormatter:
    """Tick labels of an axis of fractions."""
    return PercentFormatter(1, decimals=decimals, symbol=" %")
