"""What training logged as curves over optimizer steps, and the axes they are drawn on.

One run's curves are drawn by `training_plots.py`, those of several by `run_curves.py`. Steps are
counted across stages: a stage begins where the one before it ended, in the longest run.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from matplotlib.axes import Axes

from pipeline.config import TRAINING_STAGES
from pipeline.evaluation.figures import GREY, percent_axis, plain_numbers

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
    "accuracy": ("accuracy on\nprobe prompts", dict.fromkeys(TRAINING_STAGES, "heldout_accuracy")),
    "sparsity": ("zeros among\nprunable weights", dict.fromkeys(TRAINING_STAGES, "sparsity")),
}
"""Quantity to axis label and the key it has in the log of each stage; top to bottom."""

FRACTIONS = ("dead groups", "accuracy", "sparsity")
AS_MEASURED = ("accuracy", "sparsity")
"""Not noisy, and drawn without a running mean."""
MIN_STAGE_WIDTH = 0.3
"""Of the picture, before the shares are made to add up to 1."""
MIN_LABELLED_WIDTH = 0.3
"""Of the picture, below which the middle of a stage has no label of its own."""
MAX_RATIO = 30
"""Of the largest value to the smallest, beyond which an axis is logarithmic."""

Log = Sequence[Mapping[str, float]]
"""Log history of a stage in order: mappings with `step` and any keys of `PANELS`."""


@dataclass(frozen=True)
class Curve:
    """One quantity in one stage of one run."""

    stage: str
    steps: list[float]
    """Counted across stages."""
    values: list[float]

    def points(self) -> Iterator[tuple[float, float]]:
        """Step and value, one after the other."""
        return zip(self.steps, self.values, strict=True)

    def smooth(self) -> list[float]:
        """Running mean over a tenth of the values, fewer at the ends."""
        reach = len(self.values) // 20
        windows = [self.values[max(0, i - reach) : i + reach + 1] for i in range(len(self.values))]
        return [sum(window) / len(window) for window in windows]


def stage_borders(runs: Sequence[Mapping[str, Log]]) -> tuple[dict[str, float], float]:
    """Where each stage begins, and where the last one ends.

    Args:
        runs: Stage to log, run by run; stages without an entry are left out.
    """
    starts, end = {}, 0
    for stage in TRAINING_STAGES:
        steps = [entry["step"] for logs in runs for entry in logs.get(stage, ())]
        if steps:
            starts[stage] = end
            end += max(steps)
    return starts, end


def quantity_curves(logs: Mapping[str, Log], name: str, starts: Mapping[str, float]) -> list[Curve]:
    """One curve for each stage that logged a quantity of `PANELS`."""
    keys = PANELS[name][1]
    found = [
        logged_curve(logs[stage], keys[stage], stage, start)
        for stage, start in starts.items()
        if stage in logs and stage in keys
    ]
    return [curve for curve in found if curve.steps]


def logged_curve(log: Log, key: str, stage: str, start: float) -> Curve:
    """Every value that a key of the log has."""
    entries = [entry for entry in log if key in entry]
    steps = [start + entry["step"] for entry in entries]
    return Curve(stage, steps, [entry[key] for entry in entries])


def is_same(losses: Sequence[Curve], divergences: Sequence[Curve]) -> bool:
    """Whether each loss is nothing but the KL of its step, which has a picture of its own."""
    kls = {step: kl for curve in divergences for step, kl in curve.points()}
    return all(
        abs(loss - kls.get(step, math.inf)) <= 1e-3 * abs(loss)
        for curve in losses
        for step, loss in curve.points()
    )


def mark_stages(axes: Axes, starts: Mapping[str, float], end: float) -> None:
    """Limits of the horizontal axis, and a line where a stage begins."""
    for start in list(starts.values())[1:]:
        axes.axvline(start, color=GREY, linestyle="--", linewidth=1)
    axes.set_xlim(0, end)
    axes.grid(alpha=0.3)


def name_stages(axes: Axes, starts: Mapping[str, float]) -> None:
    """The stages' names above the axes."""
    for stage, start in starts.items():
        axes.annotate(
            stage,
            (start, 1),
            (4, 2),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
        )


def share_width(axes: Axes, borders: Sequence[float]) -> list[float]:
    """Gives a short stage a part of the width in which it can be seen.

    Args:
        axes: Of a figure whose panels share the horizontal axis.
        borders: Steps at which stages begin, and the last one.

    Returns:
        The ticks: borders, and middles of stages where there is room for a label.
    """
    widths = np.diff(borders)
    shares = np.maximum(widths / max(1, borders[-1]), MIN_STAGE_WIDTH)
    places = np.concatenate([[0], np.cumsum(shares / shares.sum())])
    forward = partial(np.interp, xp=borders, fp=places)
    back = partial(np.interp, xp=places, fp=borders)
    axes.set_xscale("function", functions=(forward, back))
    middles = np.add(borders[:-1], widths // 2)[np.diff(places) >= MIN_LABELLED_WIDTH]
    ticks = sorted({*borders, *middles.tolist()})
    axes.set_xticks(ticks)
    return ticks


def scale_values(axes: Axes, name: str, values: Sequence[float]) -> None:
    """The vertical axis of a quantity: fractions from 0 to 1, wide ranges logarithmic."""
    axes.set_ylabel(PANELS[name][0])
    if name in FRACTIONS:
        axes.set_ylim(0, 1.02)
        axes.yaxis.set_major_formatter(percent_axis())
    elif name in ("loss", "KL to the teacher") and max(values) > MAX_RATIO * min(values) > 0:
        axes.set_yscale("log")
        plain_numbers(axes.yaxis)
    elif not any(values):
        axes.set_ylim(0, 1)
