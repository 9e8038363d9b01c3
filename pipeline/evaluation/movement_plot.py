"""The picture of movement: how it is spread over the kept weights, and over the pruned ones.

As in `plots.py`, what is drawn is plain data.
"""

import itertools
import math
from collections.abc import Mapping, Sequence

import torch

from pipeline.evaluation.figures import (
    BLUE,
    ORANGE,
    Picture,
    finish,
    new_figure,
    percent_axis,
    plain_numbers,
)
from pipeline.evaluation.formats import percent

_KEPT_SIGNS = {"positive": "away from zero", "negative": "towards zero"}
_PRUNED_SIGNS = {"positive": "upwards", "negative": "downwards"}
MOVEMENT_LABELS = {
    "gradient": ("kept weights: size of accumulated $-g\\,w$\n(units of the loss", _KEPT_SIGNS),
    "squared": (
        "kept weights: accumulated $(g\\,w)^2$\n(squared units of the loss",
        {"positive": "moved"},
    ),
    "displacement": ("kept weights: size of accumulated $\\Delta|w|$\n(units of w", _KEPT_SIGNS),
    "proposed": (
        "pruned weights: size of accumulated update\n(multiples of the learning rate",
        _PRUNED_SIGNS,
    ),
    "negative_gradient": (
        "pruned weights: size of accumulated $-g$\n(units of the gradient",
        _PRUNED_SIGNS,
    ),
}
"""What was observed to its axis label, but for the scale, and to what a sign means there."""

MOVEMENT_DECADES, MOVEMENT_BINS = 6, 48


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


def plot_movement(histograms: Mapping[str, Mapping]) -> Picture:
    """Movement of the kept weights beside that of the pruned ones; their units differ.

    Args:
        histograms: Observation of the kept weights, then of the pruned ones, to what
            `movement_histogram` returns.
    """
    title = _movement_title(*next(iter(histograms.items())))
    figure, all_axes = new_figure(title, 3 * len(histograms), rows=len(histograms))
    for axes, (observation, histogram) in zip(all_axes, histograms.items(), strict=True):
        label, meanings = MOVEMENT_LABELS[observation]
        num_weights = _num_weights(histogram)
        for sign, colour, style in (("positive", BLUE, "-"), ("negative", ORANGE, "--")):
            if sign == "negative" and observation == "squared":
                continue
            shares = [count / num_weights for count in histogram[sign]]
            legend = f"{meanings[sign]} ({percent(sum(shares))})"
            axes.stairs(shares, histogram["edges"], color=colour, ls=style, lw=2, label=legend)
        axes.plot([], [], " ", label=f"never moved ({percent(histogram['zero'] / num_weights)})")
        axes.set_xscale("log")
        plain_numbers(axes.xaxis)
        axes.set_xlabel(f"{label}, log scale)")
        axes.margins(y=0.65)  # room for the legend
        axes.set_ylim(bottom=0)
        axes.set_ylabel("share of the\nweights in each bin")
        axes.yaxis.set_major_formatter(percent_axis(decimals=1))
        axes.grid(alpha=0.3)
        axes.legend(loc="upper left", frameon=False, handlelength=1)
    return finish(figure, title)


def _num_weights(histogram: Mapping) -> int:
    """At least 1, so that shares of no weights are 0."""
    return max(1, sum(histogram["positive"]) + sum(histogram["negative"]) + histogram["zero"])


def _movement_title(observation: str, kept: Mapping) -> str:
    if observation == "squared":
        return f"Half of the squared movement is in {percent(_half(kept))} of the kept weights"
    away, towards = (sum(kept[sign]) / _num_weights(kept) for sign in ("positive", "negative"))
    return (
        f"Training pushes {percent(away)} of the kept weights away from zero, "
        f"{percent(towards)} towards it"
    )


def _half(histogram: Mapping) -> float:
    """Fraction of the weights, largest values first, that hold half of the sum, to a bin."""
    edges, counts = histogram["edges"], histogram["positive"]
    middles = [math.sqrt(low * high) for low, high in itertools.pairwise(edges)]
    masses = [count * middle for count, middle in zip(counts, middles, strict=True)]
    held = weights = 0
    for count, mass in zip(reversed(counts), reversed(masses), strict=True):
        if held >= sum(masses) / 2:
            break
        held, weights = held + mass, weights + count
    return weights / _num_weights(histogram)
