"""The picture of the way there: loss, reward, accuracy and sparsity over optimizer steps.

As in `plots.py`, every function draws one file and returns its title.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.evaluation.figures import (
    BLUE,
    GREY,
    SKY,
    new_figure,
    percent_axis,
    save_figure,
)
from pipeline.evaluation.formats import number, percent

PANELS = (
    ("loss", ("distill", "on_policy"), "distillation loss\n(nats per token)"),
    ("reward", ("grpo",), "mean reward\nper completion"),
    ("heldout_accuracy", ("distill", "on_policy", "grpo"), "accuracy on\nprobe prompts"),
    ("sparsity", ("distill", "on_policy", "grpo"), "zeros among\nprunable weights"),
)
"""Log key, the stages in which it is drawn, axis label; top to bottom."""

FRACTIONS = ("heldout_accuracy", "sparsity")

Curve = tuple[list[float], list[float]]


def plot_training(logs: Mapping[str, Sequence[Mapping[str, float]]], *, path: Path) -> str:
    """Loss, reward, held-out accuracy and sparsity over optimizer steps, counted across the stages.

    Args:
        logs: Stage (`distill`, `on_policy`, `grpo`) to its log history in order: mappings with
            `step` and any of `loss`, `reward`, `heldout_accuracy`, `sparsity`. At least one value
            in all.
        path: File to write.
    """
    starts, end = {}, 0
    for stage, log in logs.items():
        starts[stage] = end
        end += max((entry["step"] for entry in log), default=0)
    curves = {
        key: [_curve(logs[stage], key, starts[stage]) for stage in stages if stage in logs]
        for key, stages, _ in PANELS
    }
    panels = [(key, label) for key, _, label in PANELS if any(xs for xs, _ in curves[key])]
    title = _training_title({key: curves[key] for key, _ in panels})
    figure, all_axes = new_figure(title, 1.6 * len(panels) + 1, rows=len(panels), sharex=True)
    for axes, (key, label) in zip(all_axes, panels, strict=True):
        for xs, ys in curves[key]:
            if key == "heldout_accuracy":
                axes.plot(xs, ys, "o", color=BLUE, markersize=4)
            elif key != "sparsity":
                axes.plot(xs, ys, color=SKY, linewidth=1)
                ys = _running_mean(ys, len(ys) // 20)
            axes.plot(xs, ys, color=BLUE, linewidth=2)
        for start in list(starts.values())[1:]:
            axes.axvline(start, color=GREY, linestyle="--", linewidth=1)
        if key in FRACTIONS:
            axes.set_ylim(0, 1.02)
            axes.yaxis.set_major_formatter(percent_axis())
        values = [y for _, ys in curves[key] for y in ys]
        if key == "loss" and max(values) > 30 * min(values) > 0:
            axes.set_yscale("log")
        axes.set(ylabel=label, xlim=(0, end))
        axes.grid(alpha=0.3)
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
    save_figure(figure, path)
    return title


def _curve(log: Sequence[Mapping[str, float]], key: str, start: float) -> Curve:
    entries = [entry for entry in log if key in entry]
    return [start + entry["step"] for entry in entries], [entry[key] for entry in entries]


def _running_mean(values: Sequence[float], reach: int) -> list[float]:
    """Mean over `reach` neighbours on each side, fewer at the ends."""
    windows = [values[max(0, i - reach) : i + reach + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def _training_title(curves: Mapping[str, Sequence[Curve]]) -> str:
    changes = []
    for key, show in (("reward", number), ("loss", number), ("sparsity", percent)):
        found = [ys for _, ys in curves.get(key, []) if ys]
        stages = found[-1:] if key == "loss" else found  # one stage's is no loss of another
        values = [y for ys in stages for y in ys]
        if values and not (key == "loss" and changes):
            smooth = values if key == "sparsity" else _running_mean(values, len(values) // 20)
            changes.append(f"{key} goes from {show(smooth[0])} to {show(smooth[-1])}")
    return " while ".join(changes).capitalize()
