"""The picture of the way there: what training logged over optimizer steps, one panel a quantity.

Rewards are shown by term, beside their weighted sum. A dead group is one whose completions all have
the same reward, from which GRPO learns nothing. Only panels with data are drawn.
"""

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
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
    percent_axis,
    plain_numbers,
)
from pipeline.evaluation.formats import number, percent

PANELS = {
    "loss": ("distillation loss\n(nats per token)", {"distill": "loss", "on_policy": "loss"}),
    "KL to the teacher": (
        "KL to the teacher\n(nats per token)",
        {"distill": "kl", "grpo": "teacher_kl"},
    ),
    "reward": ("mean reward\nper completion", {"grpo": "reward"}),
    "dead groups": ("dead groups", {"grpo": "frac_reward_zero_std"}),
    "length": (
        "completion length\n(tokens)",
        {"on_policy": "completions/mean_length", "grpo": "completions/mean_length"},
    ),
    "accuracy": (
        "accuracy on\nprobe prompts",
        dict.fromkeys(("distill", "on_policy", "grpo"), "heldout_accuracy"),
    ),
    "sparsity": (
        "zeros among\nprunable weights",
        dict.fromkeys(("distill", "on_policy", "grpo"), "sparsity"),
    ),
}
"""Quantity to axis label and the key it has in the log of each stage; top to bottom."""

FRACTIONS = ("dead groups", "accuracy", "sparsity")
TERM_COLOURS = (GREEN, PURPLE, AMBER, GREY)
MIN_STAGE_WIDTH = 0.3
"""Of the picture, before the shares are made to add up to 1."""
MAX_RATIO = 30
"""Of the largest value to the smallest, beyond which an axis is logarithmic."""

Log = Sequence[Mapping[str, float]]
Curve = tuple[list[float], list[float]]


def plot_training(logs: Mapping[str, Log]) -> Picture:
    """What was logged over optimizer steps, counted across the stages.

    Args:
        logs: Stage (`distill`, `on_policy`, `grpo`) to its log history in order: mappings with
            `step` and any keys of `PANELS`. At least one value in all.
    """
    starts, end = {}, 0
    for stage, log in logs.items():
        starts[stage] = end
        end += max((entry["step"] for entry in log), default=0)
    curves = {name: _curves(logs, name, starts) for name in PANELS}
    if _is_same(curves["loss"], curves["KL to the teacher"]):
        curves["loss"] = []
    curves = {name: found for name, found in curves.items() if found}
    title = _title(curves)
    figure, all_axes = new_figure(title, 1.6 * len(curves) + 1, rows=len(curves), sharex=True)
    for axes, (name, found) in zip(all_axes, curves.items(), strict=True):
        _draw(axes, name, found)
        if name == "reward":
            _draw_terms(axes, logs["grpo"], starts["grpo"])
        for start in list(starts.values())[1:]:
            axes.axvline(start, color=GREY, linestyle="--", linewidth=1)
        axes.set(ylabel=PANELS[name][0], xlim=(0, end))
        axes.grid(alpha=0.3)
    _share_width(all_axes[0], [*starts.values(), end])
    for stage, start in starts.items():
        all_axes[0].annotate(
            stage,
            (start, 1),
            (4, 2),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
        )
    figure.align_ylabels()
    all_axes[-1].set_xlabel("optimizer step, counted across stages")
    return finish(figure, title)


def _share_width(axes: Axes, borders: Sequence[float]) -> None:
    """Gives a short stage a part of the width in which it can be seen.

    Args:
        axes: Of a figure whose panels share the horizontal axis.
        borders: Steps at which stages begin, and the last one.
    """
    widths = np.diff(borders)
    shares = np.maximum(widths / max(1, borders[-1]), MIN_STAGE_WIDTH)
    places = np.concatenate([[0], np.cumsum(shares / shares.sum())])
    forward = partial(np.interp, xp=borders, fp=places)
    back = partial(np.interp, xp=places, fp=borders)
    axes.set_xscale("function", functions=(forward, back))
    middles = np.add(borders[:-1], widths / 2)
    axes.set_xticks(sorted([*borders, *middles]))


def _curves(logs: Mapping[str, Log], name: str, starts: Mapping[str, float]) -> list[Curve]:
    """One curve for each stage that logged the quantity."""
    keys = PANELS[name][1]
    found = [_curve(log, keys[s], starts[s]) for s, log in logs.items() if s in keys]
    return [curve for curve in found if curve[0]]


def _curve(log: Log, key: str, start: float) -> Curve:
    entries = [entry for entry in log if key in entry]
    return [start + entry["step"] for entry in entries], [entry[key] for entry in entries]


def _is_same(losses: Sequence[Curve], divergences: Sequence[Curve]) -> bool:
    """Whether the loss is nothing but the KL of a panel below."""
    return len(losses) == 1 and any(
        steps == losses[0][0]
        and all(abs(a - b) <= 1e-3 * abs(b) for a, b in zip(losses[0][1], values, strict=True))
        for steps, values in divergences
    )


def _draw(axes: Axes, name: str, curves: Sequence[Curve]) -> None:
    for xs, ys in curves:
        if name == "accuracy":
            axes.plot(xs, ys, "o", color=BLUE, markersize=4)
        elif name != "sparsity":
            axes.plot(xs, ys, color=SKY, linewidth=1)
            ys = _running_mean(ys, len(ys) // 20)
        axes.plot(xs, ys, color=BLUE, linewidth=2)
    values = [y for _, ys in curves for y in ys]
    if name in FRACTIONS:
        axes.set_ylim(0, 1.02)
        axes.yaxis.set_major_formatter(percent_axis())
    elif name in ("loss", "KL to the teacher") and max(values) > MAX_RATIO * min(values) > 0:
        axes.set_yscale("log")
        plain_numbers(axes.yaxis)


def _draw_terms(axes: Axes, log: Log, start: float) -> None:
    """The reward's terms, where there is more than one, and a legend."""
    keys = dict.fromkeys(key for entry in log for key in entry)
    terms = [key for key in keys if key.startswith("rewards/") and key.endswith("/mean")]
    if len(terms) < 2:
        return
    axes.lines[-1].set_label("weighted sum")
    for index, key in enumerate(terms):
        xs, ys = _curve(log, key, start)
        label = key.removeprefix("rewards/").removesuffix("/mean").replace("$", r"\$")
        colour = TERM_COLOURS[index % len(TERM_COLOURS)]
        axes.plot(xs, _running_mean(ys, len(ys) // 20), color=colour, lw=1.5, ls="--", label=label)
    axes.legend(frameon=False, fontsize=8, ncols=2)


def _running_mean(values: Sequence[float], reach: int) -> list[float]:
    """Mean over `reach` neighbours on each side, fewer at the ends."""
    windows = [values[max(0, i - reach) : i + reach + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def _title(curves: Mapping[str, Sequence[Curve]]) -> str:
    """First and last of the reward, or else of the last stage's loss or KL, and of the sparsity."""
    changes = []
    for name in ("reward", "loss", "KL to the teacher"):
        if curves.get(name) and not changes:
            values = curves[name][-1][1]  # one stage's loss is no loss of another
            smooth = _running_mean(values, len(values) // 20)
            changes.append(f"{name} goes from {number(smooth[0])} to {number(smooth[-1])}")
    if "sparsity" in curves:
        values = [y for _, ys in curves["sparsity"] for y in ys]
        changes.append(f"sparsity goes from {percent(values[0])} to {percent(values[-1])}")
    title = " while ".join(changes)
    return title[:1].upper() + title[1:]
