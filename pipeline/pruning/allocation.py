"""How the zeros of a whole model are shared out among its weight matrices: uniform, and OWL.

OWL (Yin et al. 2023, arXiv 2310.05175) prunes decoder layers with many outliers less:

    D_l = share of layer l's scores |W_ij| * ||X_j||_2 that exceed M times the layer's mean score
    S_l = S - c (D_l - D),   c > 0 such that the furthest layer lies at S +- lambda

The scores are Wanda's, of all matrices of a layer together, with the activations of the dense
model. D is the mean of D_l over the weights, so that the mean of S_l is S. All matrices of a layer
get S_l.

At high targets S +- lambda would empty a layer, or leave [0, 1). lambda is then cut: to S, and to
half of the density 1 - S, so that every matrix keeps at least half of the target's density.

M and lambda are the paper's as far as known. The scaling is our reading of "mean-centred, within
S +- lambda". Left out: rates that differ inside a layer.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers.models.llama import LlamaForCausalLM

from pipeline.models.prunable import decoder_layers, prunable_modules, prunable_weights
from pipeline.pruning.batches import CalibrationBatch
from pipeline.pruning.calibration import calibrate
from pipeline.pruning.wanda import wanda_score

OUTLIER_FACTOR = 5.0
"""M: a score is an outlier above so many means."""
MAX_DEVIATION = 0.08
"""lambda: largest difference between a layer's sparsity and the model's."""
MIN_DENSITY_SHARE = 0.5
"""Every matrix keeps at least this share of the target's density."""


def uniform_rates(weights: Mapping[str, Tensor], sparsity: float) -> dict[str, float]:
    """Weight name to the same sparsity for all."""
    return dict.fromkeys(weights, sparsity)


def owl_rates(
    model: LlamaForCausalLM,
    batches: Sequence[CalibrationBatch],
    sparsity: float,
    *,
    outlier_factor: float = OUTLIER_FACTOR,
    max_deviation: float = MAX_DEVIATION,
    progress: str | None = None,
) -> dict[str, float]:
    """Sparsity of every matrix by the outliers of its decoder layer. The model stays as it is.

    Args:
        model: A dense Llama in evaluation mode.
        batches: The calibration set. How it is cut into batches does not matter.
        sparsity: Of all prunable weights together, in [0, 1).
        outlier_factor: M.
        max_deviation: lambda, at least 0.
        progress: Name of a progress bar over the layers; None shows none.

    Returns:
        Weight name to sparsity in [0, 1), in model order. The mean over weights is `sparsity`.

    Raises:
        UserError: The calibration set is unfit.
    """
    norms: dict[str, Tensor] = {}
    calibrate(
        model,
        batches,
        lambda name, _, statistics: norms.update({name: statistics.input_norm}),
        "input_norm",
        progress,
    )
    names = {weight: name for name, weight in prunable_weights(model).items()}
    layers = [
        {names[module.weight]: module.weight for module in prunable_modules(layer).values()}
        for layer in decoder_layers(model)
    ]
    rates = rates_by_outliers(
        [outlier_ratio(layer, norms, outlier_factor) for layer in layers],
        [sum(weight.numel() for weight in layer.values()) for layer in layers],
        sparsity,
        max_deviation,
    )
    return {name: rate for layer, rate in zip(layers, rates, strict=True) for name in layer}


def outlier_ratio(
    weights: Mapping[str, Tensor], input_norms: Mapping[str, Tensor], outlier_factor: float
) -> float:
    """D of one decoder layer. One matrix's scores are in memory at a time.

    Args:
        weights: Name to (out, in) weight of the layer's matrices.
        input_norms: Name to (in,) L2 norms of the matrix's input channels.
        outlier_factor: M.

    Returns:
        Share of scores above M times their mean, in [0, 1).
    """
    size = sum(weight.numel() for weight in weights.values())
    total = sum(
        wanda_score(weight, input_norms[name]).sum(dtype=torch.float64).item()
        for name, weight in weights.items()
    )
    limit = outlier_factor * total / size
    num_outliers = sum(
        int((wanda_score(weight, input_norms[name]) > limit).sum())
        for name, weight in weights.items()
    )
    return num_outliers / size


def rates_by_outliers(
    ratios: Sequence[float], sizes: Sequence[int], sparsity: float, max_deviation: float
) -> list[float]:
    """S of each layer: the more outliers, the less is pruned.

    Args:
        ratios: D of each layer.
        sizes: Prunable weights of each layer.
        sparsity: Of all layers together, in [0, 1).
        max_deviation: lambda, cut where the target leaves no room for it.

    Returns:
        One sparsity per layer, in [0, 1); all equal where the ratios are.
    """
    assert 0.0 <= sparsity < 1.0
    if min(ratios) == max(ratios):
        return [sparsity] * len(ratios)
    room = min(max_deviation, sparsity, (1.0 - MIN_DENSITY_SHARE) * (1.0 - sparsity))
    mean = sum(r * size for r, size in zip(ratios, sizes, strict=True)) / sum(sizes)
    scale = room / max(abs(ratio - mean) for ratio in ratios)
    return [max(0.0, sparsity - scale * (ratio - mean)) for ratio in ratios]
