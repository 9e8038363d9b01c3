"""The picture of movement against magnitude: of weights kept, of those that came back, and pruned.

For weights of like size in the dense student: the median of how far training moved them, and the
range of the middle 80 %. Kept and pruned weights are observed in different units, and have a panel
each. Pairs are counted on a logarithmic grid, so one pass over the weights is enough and the
figures are exact to a bin, a sixteenth of a decade. What never moved lies in the lowest bin.
"""

from collections.abc import Iterable, Mapping

import torch
from matplotlib.axes import Axes
from torch import Tensor

from pipeline.evaluation.figures import (
    BLUE,
    GREEN,
    ORANGE,
    Picture,
    finish,
    new_figure,
    plain_numbers,
)
from pipeline.evaluation.formats import percent
from pipeline.evaluation.movement_plot import MOVEMENT_DECADES, MOVEMENT_LABELS

LOWEST_DECADE, DECADES, BINS_PER_DECADE = -24, 32, 16
BINS = DECADES * BINS_PER_DECADE
QUANTILES = (0.1, 0.5, 0.9)
MIN_SHARE, MIN_WEIGHTS = 0.002, 10
"""Of a class of weights: columns with less are not drawn."""
SIDES = {"kept": BLUE, "came back": GREEN, "pruned": ORANGE}


def count_pairs(pairs: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Counts weights by size and by movement.

    Args:
        pairs: Sizes and movement of some weights, two tensors (n,) on the CPU, of any sign.

    Returns:
        int64 (512, 512): sizes down, absolute movement across.
    """
    counts = torch.zeros(BINS * BINS, dtype=torch.int64)
    for sizes, movement in pairs:
        counts += torch.bincount(_bin(sizes) * BINS + _bin(movement), minlength=BINS * BINS)
    return counts.view(BINS, BINS)


def _bin(values: Tensor) -> Tensor:
    places = (values.abs().double().log10() - LOWEST_DECADE) * BINS_PER_DECADE
    return places.clamp(0, BINS - 1).long()


def rank_correlation(counts: Tensor) -> float | None:
    """Spearman's, of what `count_pairs` returns; None where one of the two does not vary."""
    total = counts.sum()
    ranks = []
    for dimension in (1, 0):
        marginal = counts.sum(dimension).double()
        ranks.append(marginal.cumsum(0) - marginal / 2 - total / 2)
    by_size, by_movement = (c.double() @ r.square() for c, r in _marginals(counts, ranks))
    if by_size * by_movement == 0:
        return None
    covariance = ranks[0] @ counts.double() @ ranks[1]
    return (covariance / (by_size * by_movement).sqrt()).item()


def _marginals(counts: Tensor, ranks: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    return [(counts.sum(1), ranks[0]), (counts.sum(0), ranks[1])]


def plot_magnitude(counts: Mapping[str, Tensor], *, kept: str, pruned: str) -> Picture:
    """Draws movement over magnitude.

    Args:
        counts: `kept`, `came back` and `pruned`, each from `count_pairs`; the first two apart.
        kept: What was observed of kept weights (`movement.kept`).
        pruned: Of pruned ones.
    """
    title = _title(counts)
    figure, (upper, lower) = new_figure(title, 6, rows=2, sharex=True)
    for axes, names, observed in (
        (upper, ("kept", "came back"), kept),
        (lower, ("pruned",), pruned),
    ):
        for name in names:
            _draw(axes, name, counts[name])
        label = MOVEMENT_LABELS[observed][0].partition(": ")[2]
        axes.set(xscale="log", yscale="log", ylabel=f"{label})")
        plain_numbers(axes.xaxis)
        plain_numbers(axes.yaxis)
        axes.grid(alpha=0.3)
        if axes.lines:
            low, high = axes.get_ylim()
            axes.set_ylim(bottom=max(low, high / 10**MOVEMENT_DECADES))
            axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1))
    lower.set_xlabel("size of the weight in the dense student")
    return finish(figure, title)


def _draw(axes: Axes, name: str, counts: Tensor) -> None:
    """Median and middle 80 % of the movement in each column that holds enough weights."""
    totals = counts.sum(1)
    columns = (totals >= max(MIN_WEIGHTS, MIN_SHARE * totals.sum())).nonzero().squeeze(1)
    if columns.numel() == 0:
        return
    shares = counts[columns].cumsum(1) / totals[columns, None]
    low, middle, high = (_value((shares < q).sum(1)).tolist() for q in QUANTILES)
    sizes = _value(columns).tolist()
    label = f"{name}: {int(totals.sum()):,} weights"
    axes.plot(sizes, middle, color=SIDES[name], lw=2, label=label)
    axes.fill_between(sizes, low, high, color=SIDES[name], alpha=0.2, lw=0)


def _value(bins: Tensor) -> Tensor:
    """The middle of bins."""
    return 10 ** ((bins.double() + 0.5) / BINS_PER_DECADE + LOWEST_DECADE)


def _title(counts: Mapping[str, Tensor]) -> str:
    kept, back = int(counts["kept"].sum()), int(counts["came back"].sum())
    share = percent(back / max(1, kept + back))
    title = f"{share} of the kept weights had been pruned and came back"
    correlation = rank_correlation(counts["kept"] + counts["came back"])
    if correlation is None:
        return title
    return f"{title}; movement goes with magnitude at a rank correlation of {correlation:.2f}"
