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

    H⁻¹ is never formed: with P the reversal of the order of the inputs and P H P = L Lᵀ, the matrix
    R = P L P is upper triangular, H = R Rᵀ, and U = R⁻¹.

    Args:
        hessian: (in, in) fp64, positive definite.

    Returns:
        (in, in) fp64.
    """
    upper = torch.linalg.cholesky(hessian.flip(0, 1)).flip(0, 1)
    _invert_triangular(upper)
    return upper


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
