"""Least-squares redistribution: the kept weights that reproduce the dense layer's output best.

For each row w of a linear layer with kept support S, damped towards the dense weights:

    min over w' with support S of ||X_p w' - X_d w||² + lambda ||w' - w||²
    <=>  H_SS w'_S = b_S,   H = X_pᵀ X_p + lambda I,   b = X_pᵀ X_d w + lambda w

lambda = 0.01 * mean(diag X_pᵀ X_p), see `hessian.py`. The problem on a fixed support is that of
ALPS (Meng et al. 2024, arXiv 2406.07831), with one change: the target is the dense model's output
on the dense model's inputs, so each layer also mends what earlier layers lost. A bias is solved for
beside them on centred moments (`redistribution.py`). The damping leaves kept weights of dead input
channels at their dense value, makes a single token enough, and an unpruned layer with dense inputs
stays as it is.

Rows that all have one support, as in an unpruned or a structured layer, share one Cholesky factor.
Of the others those with few kept weights get a factor each, in batches; wide ones go to conjugate
gradients (`conjugate_gradients.py`). Factors are in fp64, what all rows go through together, b and
the conjugate gradients, in fp32 (fp64 for a fp64 model).
"""

import torch
from torch import Tensor

from pipeline.pruning.conjugate_gradients import solve_by_conjugate_gradients, split_hessian
from pipeline.pruning.hessian import Hessian, damping
from pipeline.pruning.input_statistics import InputStatistics

MAX_DIRECT_INPUTS = 384
"""Rows of layers with at most so many inputs get a factor each, however many weights they keep."""
DIRECT_SUPPORT = 1.8
"""Most kept weights of a row with a factor of its own in larger layers, in units of inputs to the
power of 2/3: where a factor (cubic) takes as long as conjugate gradients (quadratic)."""
MAX_BATCH_ELEMENTS = 2**21
"""fp64 elements of gathered systems in memory at once (16 MiB)."""


def normal_equations(weight: Tensor, statistics: InputStatistics) -> tuple[Hessian, Tensor]:
    """The damped normal equations of every row of a linear layer.

    Args:
        weight: (out, in) dense weight.
        statistics: Of the layer's input.

    Returns:
        H, and b of every row (out, in) fp32, or fp64 if the weight is.
    """
    dense = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    target = dense @ statistics.cross_moment.T.to(dense.dtype)
    target += damping(statistics.second_moment).to(dense.dtype) * dense
    return statistics.hessian, target


def least_squares_weight(weight: Tensor, mask: Tensor, hessian: Hessian, target: Tensor) -> Tensor:
    """Solves for the kept weights of every row.

    Args:
        weight: (out, in) dense weight, the first guess where the solver needs one.
        mask: (out, in) bool, True = kept.
        hessian: H.
        target: (out, in) fp32 or fp64, row b of each row's normal equations.

    Returns:
        (out, in) of the target's dtype, exactly zero where the mask is False.
    """
    if torch.equal(mask, mask[:1].expand_as(mask)):
        return solve_by_shared_cholesky(hessian.matrix, target, mask[0])
    is_small = mask.sum(1) <= _max_direct_support(mask.shape[1])
    solution = torch.empty_like(target)
    solution[is_small] = solve_by_cholesky(hessian.matrix, target[is_small], mask[is_small])
    if not is_small.all():
        wide = ~is_small
        split = hessian.derive(split_hessian, target.dtype)
        solution[wide] = solve_by_conjugate_gradients(
            split, target[wide], mask[wide], start=weight[wide]
        )
    return solution


def _max_direct_support(num_inputs: int) -> int:
    """Most kept weights of a row that gets a factor of its own."""
    if num_inputs <= MAX_DIRECT_INPUTS:
        return num_inputs
    return int(DIRECT_SUPPORT * num_inputs ** (2 / 3))


def solve_by_shared_cholesky(hessian: Tensor, target: Tensor, support: Tensor) -> Tensor:
    """Solves H_SS w_S = b_S for rows that have one support.

    Args:
        hessian: (in, in) fp64 H, positive definite.
        target: (out, in), row b of each system.
        support: (in,) bool S.

    Returns:
        (out, in) of the target's dtype, zero off the support.
    """
    factor = torch.linalg.cholesky(hessian[support][:, support])
    kept = torch.cholesky_solve(target[:, support].T.double(), factor).T
    solution = torch.zeros_like(target)
    solution[:, support] = kept.to(target.dtype)
    return solution


def solve_by_cholesky(hessian: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Solves H_SS w_S = b_S for every row by gathering its support.

    Args:
        hessian: (in, in) fp64 H, positive definite.
        target: (out, in), row b of each system.
        mask: (out, in) bool, the support S of each row.

    Returns:
        (out, in) of the target's dtype, zero off the support.
    """
    solution = torch.zeros_like(target)
    num_kept = mask.sum(1)
    rows = num_kept.argsort(descending=True, stable=True)
    rows = rows[: int((num_kept > 0).sum())]
    while len(rows):
        width = int(num_kept[rows[0]])
        num_rows = max(1, MAX_BATCH_ELEMENTS // width**2)
        chunk, rows = rows[:num_rows], rows[num_rows:]
        support = mask[chunk].int().argsort(dim=1, descending=True, stable=True)[:, :width]
        is_kept = mask[chunk].gather(1, support)
        places = support[:, :, None] * len(hessian) + support[:, None, :]
        system = hessian.view(-1).index_select(0, places.view(-1)).view(places.shape)
        # A row with fewer kept weights than the widest is filled up with an identity block.
        system.mul_(is_kept[:, :, None]).mul_(is_kept[:, None, :])
        system.diagonal(dim1=1, dim2=2).add_(~is_kept)
        right = (target[chunk].gather(1, support) * is_kept)[:, :, None].double()
        kept = torch.cholesky_solve(right, torch.linalg.cholesky(system)).squeeze(2)
        solution[chunk] = torch.zeros_like(target[chunk]).scatter(1, support, kept.to(target.dtype))
    return solution
