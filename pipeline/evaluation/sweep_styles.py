"""How the rows of a sweep look in its pictures.

Colour says the method: blue and thick the headline row, sky the other rows of its method, grey and
thin the controls, one colour for each further method, from the fifth on one for all. Line and
marker tell rows of one colour apart.
"""

from typing import Any

from pipeline.evaluation.figures import AMBER, BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, SKY
from pipeline.evaluation.sweep_grid import SweepGrid

CONTROLS = ("random", "negative_magnitude")
"""Methods that nobody would use; they show how bad it can get."""
METHOD_COLOURS = (ORANGE, GREEN, PURPLE, AMBER, BLACK)
LINE_STYLES = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def row_styles(grid: SweepGrid) -> dict[str, dict[str, Any]]:
    """Row to the look of its line, as matplotlib's `Line2D` takes it."""
    method_of = {row: settings["method"] for row, settings in grid.settings.items()}
    colours = dict.fromkeys(CONTROLS, GREY)
    if grid.headline_row in method_of:
        colours[method_of[grid.headline_row]] = SKY
    others = [method for method in dict.fromkeys(method_of.values()) if method not in colours]
    for i, method in enumerate(others):
        colours[method] = METHOD_COLOURS[min(i, len(METHOD_COLOURS) - 1)]
    styles, num_rows = {}, dict.fromkeys(colours.values(), 0)
    for row, method in method_of.items():
        if row == grid.headline_row:
            styles[row] = {"color": BLUE, "lw": 4, "ls": "-", "marker": "o", "ms": 8, "zorder": 2.5}
            continue
        colour = colours[method]
        turn = num_rows[colour]
        num_rows[colour] += 1
        styles[row] = {
            "color": colour,
            "lw": 1 if colour == GREY else 1.6,
            "ls": LINE_STYLES[turn % len(LINE_STYLES)],
            "marker": MARKERS[turn % len(MARKERS)],
            "ms": 5.5,
            "zorder": 2 if colour == GREY else 3,
        }
    return styles
