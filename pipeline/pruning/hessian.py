"""The Hessian of a layer's squared output error, damped, and the factor of its inverse.

    H = XᵀX + lambda I,   lambda = 0.01 * mean(diag XᵀX)

with the damping of SparseGPT (Frantar & Alistarh 2023, arXiv 2301.00774), whose H is twice this
one: a factor that cancels wherever it is used. lambda bounds the condition number by 1 + 100 in, so
that fp64 is safe for rank-deficient inputs and a single token; without any input H is I.
"""

import torch
from torch import Tensor

DAMPING = 0.01


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
    identity = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
    return torch.linalg.solve_triangular(upper, identity, upper=True)
