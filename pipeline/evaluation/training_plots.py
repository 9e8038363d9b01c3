"""Pictures of the way there: loss, reward, accuracy, sparsity over steps; movement of the weights.

As in `plots.py`, every function draws one file and returns its title.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from pipeline.evaluation.figures import (
    BLUE,
    GREY,
    ORANGE,
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

MOVEMENT_LABELS = {
    "kept": (
        "kept weights: size of accumulated $-g\\,w$\n(units of the loss, log scale)",
        {"positive": "away from zero", "negative": "towards zero"},
    ),
    "pruned": (
        "pruned weights: size of accumulated update\n(multiples of the learning rate, log scale)",
        {"positive": "upwards", "negative": "downwards"},
    ),
}
"""Side of the mask to its axis label and to what a sign means there."""

MOVEMENT_DECADES, MOVEMENT_BINS = 6, 48

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


def movement_histogram(tensors: Sequence[torch.Tensor]) -> dict[str, list[float] | int]:
    """Counts of accumulated movement in logarithmic bins, signs apart: plain data for the plot.

    Args:
        tensors: Movement of any shape, floating point, all in one unit.

    Returns:
        `edges`: 49 absolute values over the 6 decades below the largest, ascending; `positive` and
        `negative`: 48 counts each, smaller absolute values falling into the first; `zero`: how
        many never moved.
    """
    largest = max((tensor.abs().max().item() for tensor in tensors if tensor.numel()), default=0.0)
    edges = (largest or 1.0) * torch.logspace(
        -MOVEMENT_DECADES, 0, MOVEMENT_BINS + 1, dtype=torch.float64
    )
    positive = negative = torch.zeros(MOVEMENT_BINS, dtype=torch.int64)
    for tensor in tensors:
        positive = positive + _count(tensor[tensor > 0], edges)
        negative = negative + _count(-tensor[tensor < 0], edges)
    return {
        "edges": edges.tolist(),
        "positive": positive.tolist(),
        "negative": negative.tolist(),
        "zero": sum(int((tensor == 0).sum()) for tensor in tensors),
    }


def _count(values: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
    bins = torch.bucketize(values.double().cpu(), edges[1:-1], right=True)
    return torch.bincount(bins, minlength=MOVEMENT_BINS)


def plot_movement(histograms: Mapping[str, Mapping], *, path: Path) -> str:
    """Movement of the kept weights beside that of the pruned ones; their units differ.

    Args:
        histograms: `kept` and `pruned` to what `movement_histogram` returns.
        path: File to write.
    """
    title = _movement_title(histograms["kept"])
    figure, all_axes = new_figure(title, 4, columns=len(histograms))
    for axes, (side, histogram) in zip(all_axes, histograms.items(), strict=True):
        label, meanings = MOVEMENT_LABELS[side]
        num_weights = _num_weights(histogram)
        for sign, colour, style in (("positive", BLUE, "-"), ("negative", ORANGE, "--")):
            shares = [count / num_weights for count in histogram[sign]]
            legend = f"{meanings[sign]} ({percent(sum(shares))})"
            axes.stairs(shares, histogram["edges"], color=colour, ls=style, lw=2, label=legend)
        axes.plot([], [], " ", label=f"never moved ({percent(histogram['zero'] / num_weights)})")
        axes.set_xscale("log")
        axes.set_xlabel(label)
        axes.margins(y=0.35)
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(percent_axis(decimals=1))
        axes.grid(alpha=0.3)
        axes.legend(loc="upper left", frameon=False, handlelength=1)
    all_axes[0].set_ylabel("share of the weights in each bin")
    save_figure(figure, path)
    return title


def _num_weights(histogram: Mapping) -> int:
    """At least 1, so that shares of no weights are 0."""
    return max(1, sum(histogram["positive"]) + sum(histogram["negative"]) + histogram["zero"])


def _movement_title(kept: Mapping) -> str:
    away, towards = (sum(kept[sign]) / _num_weights(kept) for sign in ("positive", "negative"))
    return (
        f"Training pushes {percent(away)} of the kept weights away from zero, "
        f"{percent(towards)} towards it"
    )
