"""ALPS-style: a mask by ADMM, then the kept weights by least squares (arXiv 2406.07831).

As in the paper the target is the dense layer's output on the inputs of the pruned model, X_p Wᵀ,
and inputs are rescaled to one norm, so that the projection compares |w| * ||X_j||. The kept weights
are solved for exactly (`least_squares.py`), where the paper stops conjugate gradients early. What
else is assumed stands in `admm.py`; only the abstract and the formulas were at hand, and no
fidelity is claimed. It is the rival of our own method, and as strong as we could make it: without
the rescaling it is about as good.
"""

import torch
from torch import Tensor

from pipeline.pruning.admm import admm_mask
from pipeline.pruning.input_statistics import InputStatistics
from pipeline.pruning.least_squares import least_squares_weight


def alps_weight(
    weight: Tensor, statistics: InputStatistics, sparsity: float, scope: str, name: str
) -> tuple[Tensor, Tensor]:
    """Mask and weight of a linear layer.

    Args:
        weight: (out, in) dense weight.
        statistics: Of the layer's input, with its second moment.
        sparsity: Fraction of zeros, in [0, 1).
        scope: `matrix`, `row`, or `N:M` with in a multiple of M and sparsity 1 - N / M.
        name: The weight's name, which orders equal values.

    Returns:
        Bool mask (out, in), True = kept; and the weight (out, in) in its dtype, exactly 0 where the
        mask is False.
    """
    hessian = statistics.hessian
    dtype = torch.promote_types(weight.dtype, torch.float32)
    target = (weight.double() @ hessian.matrix).to(dtype)
    mask = admm_mask(weight, hessian, target, sparsity, scope, name, power=1.0)
    new_weight = least_squares_weight(weight, mask, hessian, target)
    return mask, torch.where(mask, new_weight, 0.0).to(weight.dtype)
