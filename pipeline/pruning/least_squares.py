"""Least-squares redistribution: the kept weights that reproduce the dense layer's output best.

For each row w of a linear layer with kept support S, damped towards the dense weights:

    min over w' with support S of ||X_p w' - X_d w||² + lambda ||w' - w||²
    <=>  H_SS w'_S = b_S,   H = X_pᵀ X_p + lambda I,   b = X_pᵀ X_d w + lambda w

lambda = 0.01 * mean(diag X_pᵀ X_p), see `hessian.py`. The problem on a fixed support, and conjugate
gradients projected on the supports of all rows at once, are those of ALPS (Meng et al. 2024, arXiv
2406.07831), with one change: the target is the dense model's output on the dense model's inputs, so
each layer also mends what earlier layers lost. Biases cancel: the layer keeps its own. The damping
leaves kept weights of dead input channels at their dense value, makes a single token enough, and an
unpruned layer with dense inputs stays as it is.

Rows with few kept weights are factorised (batched Cholesky), wide ones go to the conjugate
gradients. All in fp64.
"""

import torch
from torch import Tensor

from pipeline.pruning.calibration import InputStatistics
from pipeline.pruning.hessian import damped_hessian, damping

MAX_DIRECT_SUPPORT = 1024
"""Largest number of kept weights in a row that is factorised."""
MAX_BATCH_ELEMENTS = 2**24
"""fp64 elements of gathered systems in memory at once (128 MiB)."""


def normal_equations(weight: Tensor, statistics: InputStatistics) -> tuple[Tensor, Tensor]:
    """The damped normal equations of every row of a linear layer.

    Args:
        weight: (out, in) dense weight.
        statistics: Of the layer's input.

    Returns:
        H (in, in) and b of every row (out, in), both fp64.
    """
    dense = weight.detach().double()
    target = dense @ statistics.cross_moment.T + damping(statistics.second_moment) * dense
    return damped_hessian(statistics.second_moment), target


def least_squares_weight(weight: Tensor, mask: Tensor, hessian: Tensor, target: Tensor) -> Tensor:
    """Solves for the kept weights of every row.

    Args:
        weight: (out, in) dense weight, the first guess where the solver needs one.
        mask: (out, in) bool, True = kept.
        hessian: (in, in) fp64 H, positive definite.
        target: (out, in) fp64, row b of each row's normal equations.

    Returns:
        (out, in) fp64, exactly zero where the mask is False.
    """
    if int(mask.sum(1).max()) <= MAX_DIRECT_SUPPORT:
        return solve_by_cholesky(hessian, target, mask)
    return solve_by_conjugate_gradients(hessian, target, mask, start=weight.double())


def solve_by_cholesky(hessian: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Solves H_SS w_S = b_S for every row by gathering its support.

    Args:
        hessian: (in, in) fp64 H, positive definite.
        target: (out, in) fp64, row b of each system.
        mask: (out, in) bool, the support S of each row.

    Returns:
        (out, in) fp64, zero off the support.
    """
    solution = torch.zeros_like(target)
    num_kept = mask.sum(1)
    rows = num_kept.argsort(descending=True, stable=True)
    rows = rows[: int((num_kept > 0).sum())]
    while len(rows):
        width = int(num_kept[rows[0]])
        num_rows = max(1, MAX_BATCH_ELEMENTS // width**2)
        chunk, rows = rows[:num_rows], rows[num_rows:]
        # A row with fewer kept weights than the widest is filled up with an identity block.
        support = mask[chunk].int().argsort(dim=1, descending=True, stable=True)[:, :width]
        is_kept = mask[chunk].gather(1, support)
        system = hessian[support[:, :, None], support[:, None, :]]
        both = is_kept[:, :, None] & is_kept[:, None, :]
        system = torch.where(both, system, torch.eye(width).to(system))
        right = torch.where(is_kept, target[chunk].gather(1, support), 0.0)
        kept = torch.cholesky_solve(right[:, :, None], torch.linalg.cholesky(system)).squeeze(2)
        solution[chunk] = torch.zeros_like(target[chunk]).scatter(1, support, kept)
    return solution


def solve_by_conjugate_gradients(
    hessian: Tensor,
    target: Tensor,
    mask: Tensor,
    start: Tensor,
    tolerance: float = 1e-8,
    max_steps: int = 1000,
) -> Tensor:
    """Solves H_SS w_S = b_S for all rows at once, residuals projected on the supports.

    Preconditioned by the diagonal of H.

    Args:
        hessian: (in, in) fp64 H, positive definite.
        target: (out, in) fp64, row b of each system.
        mask: (out, in) bool, the support S of each row.
        start: (out, in) fp64 first guess.
        tolerance: Largest residual norm of a row, relative to its target's, at which to stop.
        max_steps: Stops here at the latest.

    Returns:
        (out, in) fp64, zero off the support.
    """
    solution = start * mask
    residual = (target - solution @ hessian) * mask
    limit = tolerance * (target * mask).norm(dim=1)
    inverse_diagonal = 1.0 / hessian.diagonal()
    preconditioned = residual * inverse_diagonal
    direction = preconditioned
    product = (residual * preconditioned).sum(1)
    for _ in range(max_steps):
        if (residual.norm(dim=1) <= limit).all():
            break
        image = (direction @ hessian) * mask
        step = _ratio(product, (direction * image).sum(1))
        solution = solution + step[:, None] * direction
        residual = residual - step[:, None] * image
        preconditioned = residual * inverse_diagonal
        product, old_product = (residual * preconditioned).sum(1), product
        direction = preconditioned + _ratio(product, old_product)[:, None] * direction
    return solution


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Quotient, 0 where a row has converged exactly and the denominator is 0."""
    return torch.where(denominator > 0, numerator / denominator, 0.0)
