"""The picture of the way there: what training logged over optimizer steps, one panel a quantity.

Rewards are shown by term, beside their weighted sum. A dead group is one whose completions all have
the same reward, from which GRPO learns nothing. Only panels with data are drawn.
"""

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes

from pipeline.evaluation.figures import (
    AMBER,
    BLUE,
    GREEN,
    GREY,
    PURPLE,
    SKY,
    Picture,
    finish,
    new_figure,
)
from pipeline.evaluation.formats import number, percent
from pipeline.evaluation.training_curves import (
    AS_MEASURED,
    PANELS,
    Curve,
    Log,
    is_same,
    logged_curve,
    mark_stages,
    name_stages,
    quantity_curves,
    scale_values,
    share_width,
    stage_borders,
)

TERM_COLOURS = (GREEN, PURPLE, AMBER, GREY)


def plot_training(logs: Mapping[str, Log]) -> Picture:
    """What was logged over optimizer steps, counted across the stages.

    Args:
        logs: Stage (`distill`, `on_policy`, `grpo`) to its log history. At least one value in all.
    """
    starts, end = stage_borders([logs])
    curves = {name: quantity_curves(logs, name, starts) for name in PANELS}
    if is_same(curves["loss"], curves["KL to the teacher"]):
        curves["loss"] = []
    curves = {name: found for name, found in curves.items() if found}
    title = _title(curves)
    figure, all_axes = new_figure(title, 1.6 * len(curves) + 1, rows=len(curves), sharex=True)
    for axes, (name, found) in zip(all_axes, curves.items(), strict=True):
        _draw(axes, name, found)
        if name == "reward":
            _draw_terms(axes, logs["grpo"], starts["grpo"])
        mark_stages(axes, starts, end)
    share_width(all_axes[0], [*starts.values(), end])
    name_stages(all_axes[0], starts)
    figure.align_ylabels()
    all_axes[-1].set_xlabel("optimizer step, counted across stages")
    return finish(figure, title)


def _draw(axes: Axes, name: str, curves: Sequence[Curve]) -> None:
    for curve in curves:
        ys = curve.values
        if name == "accuracy":
            axes.plot(curve.steps, ys, "o", color=BLUE, markersize=4)
        elif name not in AS_MEASURED:
            axes.plot(curve.steps, ys, color=SKY, linewidth=1)
            ys = curve.smooth()
        axes.plot(curve.steps, ys, color=BLUE, linewidth=2)
    scale_values(axes, name, [y for curve in curves for y in curve.values])


def _draw_terms(axes: Axes, log: Log, start: float) -> None:
    """The reward's terms, where there is more than one, and a legend."""
    keys = dict.fromkeys(key for entry in log for key in entry)
    terms = [key for key in keys if key.startswith("rewards/") and key.endswith("/mean")]
    if len(terms) < 2:
        return
    axes.lines[-1].set_label("weighted sum")
    for index, key in enumerate(terms):
        curve = logged_curve(log, key, "grpo", start)
        label = key.removeprefix("rewards/").removesuffix("/mean").replace("$", r"\$")
        colour = TERM_COLOURS[index % len(TERM_COLOURS)]
        axes.plot(curve.steps, curve.smooth(), color=colour, lw=1.5, ls="--", label=label)
    axes.legend(frameon=False, fontsize=8, ncols=2)


def _title(curves: Mapping[str, Sequence[Curve]]) -> str:
    """First and last of the reward, or else of the last stage's loss or KL, and of the sparsity."""
    changes = []
    for name in ("reward", "loss", "KL to the teacher"):
        if curves.get(name) and not changes:
            smooth = curves[name][-1].smooth()  # one stage's loss is no loss of another
            changes.append(f"{name} goes from {number(smooth[0])} to {number(smooth[-1])}")
    if "sparsity" in curves:
        values = [y for curve in curves["sparsity"] for y in curve.values]
        changes.append(f"sparsity goes from {percent(values[0])} to {percent(values[-1])}")
    title = " while ".join(changes)
    return title[:1].upper() + title[1:]
