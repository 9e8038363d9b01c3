"""Curves of several runs over each other: one small picture a quantity, one line a run.

Stages stand beside each other, each as wide as the longest run needs, so that the same step of the
same stage is at the same place in every run. Pale lines are what was logged, strong ones its
running mean. Colour and dashes change together, so a line that lies on another one is seen.

Left out: completion length and the single terms of the reward, which each run's own report has.
"""

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from pipeline.evaluation.figures import (
    AMBER,
    BLACK,
    BLUE,
    GREEN,
    ORANGE,
    PURPLE,
    Picture,
    add_legend,
    finish,
    new_figure,
    plain_text,
)
from pipeline.evaluation.formats import number, percent
from pipeline.evaluation.training_curves import (
    AS_MEASURED,
    FRACTIONS,
    Curve,
    Log,
    is_same,
    mark_stages,
    name_stages,
    quantity_curves,
    scale_values,
    share_width,
    stage_borders,
)

QUANTITIES = ("accuracy", "reward", "KL to the teacher", "loss", "dead groups", "sparsity")
"""Of `PANELS`, in the order of the page."""
NAMES = {"accuracy": "accuracy on probe prompts"}
"""Those that a title calls by more than their name."""
COLOURS = (BLUE, ORANGE, GREEN, PURPLE, AMBER, BLACK)
LINE_STYLES = ("-", "--", ":", "-.")
MAX_NAMED_RUNS = 3
"""In a title; of more runs it names the lowest and the highest."""

RunCurves = dict[str, list[Curve]]
"""Run to its curves, one for each stage that logged the quantity; at least one run."""


def plot_runs(logs: Mapping[str, Mapping[str, Log]]) -> dict[str, Picture]:
    """One picture for each quantity that any run has logged.

    Args:
        logs: Run to its training stages to their log histories.

    Returns:
        Pictures by the path that a page gives them.
    """
    starts, end = stage_borders(list(logs.values()))
    styles = {
        run: {"color": COLOURS[i % len(COLOURS)], "ls": LINE_STYLES[i % len(LINE_STYLES)]}
        for i, run in enumerate(logs)
    }
    return {
        f"curves/{name.replace(' ', '_')}.png": _plot(name, curves, starts, end, styles)
        for name, curves in overlaid_curves(logs, starts).items()
    }


def overlaid_curves(
    logs: Mapping[str, Mapping[str, Log]], starts: Mapping[str, float]
) -> dict[str, RunCurves]:
    """Quantity to the curves of every run that logged it.

    Args:
        logs: As in `plot_runs`.
        starts: Stage to the step at which it begins, from `stage_borders`.
    """
    found = {
        name: {
            run: curves
            for run, stages in logs.items()
            if (curves := quantity_curves(stages, name, starts))
        }
        for name in QUANTITIES
    }
    divergences = found["KL to the teacher"]
    if all(is_same(curves, divergences.get(run, [])) for run, curves in found["loss"].items()):
        del found["loss"]
    return {name: runs for name, runs in found.items() if runs}


def _plot(
    name: str,
    curves: RunCurves,
    starts: Mapping[str, float],
    end: float,
    styles: Mapping[str, Mapping[str, str]],
) -> Picture:
    title = _title(name, curves, starts)
    figure, (axes,) = new_figure(title.replace("$", r"\$"), max(2.6, 0.27 * len(curves) + 1.4))
    lines = [(_draw(axes, name, found, styles[run]), run) for run, found in curves.items()]
    add_legend(figure, [(line, plain_text(run)) for line, run in lines], loc="outside right center")
    scale_values(axes, name, [y for found in curves.values() for c in found for y in c.values])
    mark_stages(axes, starts, end)
    name_stages(axes, starts)
    _count_steps(axes, [*starts.values(), end])
    return finish(figure, title)


def _draw(axes: Axes, name: str, curves: Sequence[Curve], style: Mapping[str, str]) -> Line2D:
    """Returns the last of the run's lines."""
    for curve in curves:
        ys = curve.values
        if name not in AS_MEASURED:
            axes.plot(curve.steps, ys, color=style["color"], lw=1, alpha=0.3)
            ys = curve.smooth()
        marker = "o" if name == "accuracy" else ""
        (line,) = axes.plot(curve.steps, ys, **style, lw=2, marker=marker, ms=4, clip_on=False)
    return line


def _count_steps(axes: Axes, borders: Sequence[float]) -> None:
    """Ticks counted from where each stage begins, its last step among them."""
    ticks = share_width(axes, borders)
    starts = [max((start for start in borders if start < tick), default=0) for tick in ticks]
    labels = [f"{tick - start:,g}" for tick, start in zip(ticks, starts, strict=True)]
    axes.set_xticks(ticks, labels)
    axes.set_xlabel("optimizer step of each stage")


def _title(name: str, curves: RunCurves, starts: Mapping[str, float]) -> str:
    """What the runs logged last, in the last stage that two of them have."""
    show = percent if name in FRACTIONS else number
    lasts: dict[str, dict[str, float]] = {}
    for run, found in curves.items():
        for curve in found:
            values = curve.values if name in AS_MEASURED else curve.smooth()
            lasts.setdefault(curve.stage, {})[run] = values[-1]
    stage = max(lasts, key=lambda stage: (len(lasts[stage]) > 1, starts[stage]))
    last, between = lasts[stage], ""
    if len(last) > MAX_NAMED_RUNS:
        ranked = sorted(last, key=last.get)
        last, between = {run: last[run] for run in (ranked[0], ranked[-1])}, "between "
    *said, end = (f"{show(value)} in {run}" for run, value in last.items())
    what = NAMES.get(name, name)
    listed = f"{', '.join(said)} and {end}" if said else end
    return f"{what[:1].upper()}{what[1:]}, last logged in {stage}: {between}{listed}"
