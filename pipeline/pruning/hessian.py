"""The Hessian of a layer's squared output error, damped, and the factor of its inverse.

    H = XᵀX + lambda I,   lambda = 0.01 * mean(diag XᵀX)

with the damping of SparseGPT (Frantar & Alistarh 2023, arXiv 2301.00774), whose H is twice this
one: a factor that cancels wherever it is used. lambda bounds the condition number by 1 + 100 in, so
that fp64 is safe for rank-deficient inputs and a single token; without any input H is I.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

DAMPING = 0.01
BLOCK_INPUTS = 512
"""Columns that are factorised together."""
SMALLEST_BLOCK = 256
"""Size at which a triangular matrix is inverted whole."""


class Hessian:
    """The damped Hessian of layers that share an input, and what is derived from it, each once."""

    def __init__(self, matrix: Tensor):
        """`matrix`: (in, in) fp64 H, positive definite; never changed."""
        self.matrix = matrix
        self._derived: dict[tuple, Any] = {}

    def derive(self, function: Callable, *arguments: Any) -> Any:
        """`function(H, *arguments)`, computed the first time; the arguments are hashable."""
        key = (function, *arguments)
        if key not in self._derived:
            self._derived[key] = function(self.matrix, *arguments)
        return self._derived[key]


def damping(second_moment: Tensor) -> Tensor:
    """lambda, a scalar: (in, in) XᵀX -> () of its dtype; 1 where all inputs are zero."""
    mean = DAMPING * second_moment.diagonal().mean()
    return torch.where(mean > 0, mean, 1.0)


def damped_hessian(second_moment: Tensor) -> Tensor:
    """H, a new tensor. (in, in) fp64 -> (in, in) fp64, positive definite."""
    hessian = second_moment.clone()
    hessian.diagonal().add_(damping(second_moment))
    return hessian


def inverse_factor(hessian: Tensor) -> Tensor:
    """The upper triangular U with positive diagonal and UᵀU = H⁻¹.

    H⁻¹ is never formed: with R upper triangular and H = R Rᵀ, U = R⁻¹.

    Args:
        hessian: (in, in) fp64, positive definite; overwritten.

    Returns:
        (in, in) fp64, in the memory of H.
    """
    _factorise(hessian)
    _invert_triangular(hessian)
    return hessian


def _factorise(matrix: Tensor) -> None:
    """Turns a positive definite matrix into its upper triangular R with R Rᵀ, in place.

    From the last block of columns to the first: what the columns after it explain is subtracted,
    and the block above the diagonal is divided by the one on it, whose R is its Cholesky factor
    under the reversed order of the inputs.
    """
    for stop in range(len(matrix), 0, -BLOCK_INPUTS):
        start = max(0, stop - BLOCK_INPUTS)
        columns, later = matrix[:stop, start:stop], matrix[:stop, stop:]
        columns.addmm_(later, later[start:].T, alpha=-1)
        corner = torch.linalg.cholesky(columns[start:].flip(0, 1)).flip(0, 1)
        columns[:start] = torch.linalg.solve_triangular(
            corner.T, columns[:start], upper=False, left=False
        )
        columns[start:] = corner
        matrix[stop:, start:stop] = 0.0


def _invert_triangular(upper: Tensor) -> None:
    """Inverts an upper triangular matrix in place, half by half.

    The inverse of [[A, B], [0, D]] is [[A⁻¹, -A⁻¹ B D⁻¹], [0, D⁻¹]]: a third of the work of solving
    for the identity, and nearly all of it in large blocks.
    """
    size = len(upper)
    if size <= SMALLEST_BLOCK:
        identity = torch.eye(size, dtype=upper.dtype, device=upper.device)
        upper.copy_(torch.linalg.solve_triangular(upper, identity, upper=True))
        return
    half = size // 2
    first, corner, second = upper[:half, :half], upper[:half, half:], upper[half:, half:]
    solved = torch.linalg.solve_triangular(first, corner, upper=True)
    torch.linalg.solve_triangular(second, solved.neg_(), upper=True, left=False, out=corner)
    _invert_triangular(first)
    _invert_triangular(second)
