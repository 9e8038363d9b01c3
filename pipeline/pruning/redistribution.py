"""MAMA's step 2: what the pruned weights contributed is moved onto kept weights of the same row.

- `none`: the kept weights stay.
- `proportional`: every kept weight of a row takes a share of the pruned ones' contribution in
  proportion to its own size, w'_S = c * w_S. With H and b the damped normal equations of
  `least_squares.py`, whose entries weigh each weight by its input's activations,

      c = (w_S . b_S) / (w_Sᵀ H_SS w_S)

  is the one factor per row that brings the row's output closest to the dense one. As long as
  earlier layers are dense it is 1 + (w_Sᵀ H_SP w_P) / (w_Sᵀ H_SS w_S): kept plus pruned
  contribution over kept contribution, P being the pruned weights.
- `least_squares`: every kept weight gets a value of its own, see `least_squares.py`.

**Biases.** The paper counts biases among its indicators. A bias, where a layer has one, is never
pruned; it takes part here as one more kept weight, whose input is always 1. Solving for it together
with the others means solving for the weights on centred moments (`InputStatistics.centred`), and
then

    b' = b + mean(X_d) Wᵀ - mean(X_p) W'ᵀ

so that the mean output stays the dense one. Under `none` biases stay as they are.

Left out: keeping each row's output at the mean input, that is moving sum_P w_p mean(x_p) onto the
kept weights. The inputs of a Llama's linear layers have means near zero, so few kept weights take
large changes: worse than no redistribution from 70 % sparsity up on a small arithmetic Llama.
"""

import torch
from torch import Tensor

from pipeline.pruning.hessian import Hessian
from pipeline.pruning.input_statistics import InputStatistics
from pipeline.pruning.least_squares import least_squares_weight, normal_equations


def redistribute(
    weight: Tensor, mask: Tensor, kind: str, statistics: InputStatistics | None
) -> Tensor:
    """The weight of a linear layer after redistribution and pruning.

    Args:
        weight: (out, in) dense weight: the pruned weights still have their values, for the sum over
            weights already set to zero is zero.
        mask: (out, in) bool, True = kept.
        kind: `none`, `proportional` or `least_squares`.
        statistics: Of the layer's input, centred where it has a bias; None is enough for `none`.

    Returns:
        (out, in) in the weight's dtype, exactly zero where the mask is False.
    """
    new_weight = weight.detach()
    if kind != "none":
        solve = proportional_weight if kind == "proportional" else least_squares_weight
        hessian, target = normal_equations(weight, statistics)
        new_weight = solve(new_weight, mask, hessian, target).to(weight.dtype)
    return torch.where(mask, new_weight, 0.0)


def balanced_bias(
    bias: Tensor, weight: Tensor, new_weight: Tensor, statistics: InputStatistics
) -> Tensor:
    """The bias that keeps a layer's mean output at the dense layer's.

    Args:
        bias: (out,) dense bias.
        weight: (out, in) dense weight.
        new_weight: (out, in) weight after redistribution and pruning.
        statistics: Of the layer's input, with both means.

    Returns:
        (out,) in the bias's dtype.
    """
    lost = weight.double() @ statistics.dense_mean - new_weight.double() @ statistics.pruned_mean
    return (bias.double() + lost).to(bias.dtype)


def proportional_weight(weight: Tensor, mask: Tensor, hessian: Hessian, target: Tensor) -> Tensor:
    """Scales each row's kept weights by the factor that fits the dense output best.

    Args:
        weight: (out, in) dense weight.
        mask: (out, in) bool, True = kept.
        hessian: H.
        target: (out, in) fp32 or fp64, row b of each row's normal equations.

    Returns:
        (out, in) fp64, zero where the mask is False.
    """
    kept = weight.double() * mask
    power = ((kept @ hessian.matrix) * kept).sum(1)
    factor = torch.where(power > 0, (target * kept).sum(1) / power, 0.0)
    return factor[:, None] * kept
