"""Masks by ADMM: which weights to keep while what they carry is being moved.

A mask chosen by the dense weights cannot know what the kept weights will become. The alternating
direction method of multipliers chooses both together. For all rows of a linear layer at once

    min over W', D of ||X_p W'ᵀ - X_d Wᵀ||² + lambda ||W' - W||²,   W' = D, D with the wanted zeros

with H and B the damped normal equations of `least_squares.py`, it repeats

    W' <- (B + rho D - V) (H + rho I)⁻¹
    D  <- W' + V / rho, but for the wanted zeros where |W' + V / rho| * multiplier is smallest
    V  <- V + rho (W' - D)

and raises rho until the mask stays. One eigendecomposition of H, shared by the layers that read one
input, makes every step two products with its eigenvectors. Larger layers take them in bfloat16 or
TF32: with 768 inputs of power-law spectra the least-squares objective under the mask then ends
within 0.15 % of the one after exact products, as often below it as above.

This is the first half of ALPS (Meng et al. 2024, arXiv 2406.07831); new here are the target, which
is the dense model's output on the dense model's inputs, and the multiplier, by which a score of the
weights takes part in every projection. The kept weights are then solved for by least squares.

Weights are scaled by diag(H)^(power / 2) inside, so that power 0 compares |w|, power 1 |w| times
the norm of its input.

Assumptions where the paper's text was not at hand: the start D = the mask of |W|, rho and its
schedule. A slower schedule finds slightly better masks.
"""

import torch
from torch import Tensor

from pipeline.pruning.hessian import Hessian
from pipeline.pruning.reduced_products import reduced, reduced_product
from pipeline.sparsity.threshold import masks_by_score

FIRST_RHO = 0.1
"""Of mean(diag H)."""
STEPS_PER_RHO = 3
MAX_EXACT_INPUTS = 384
"""Layers with more inputs take eigenpairs in fp32 and products in reduced precision."""
MAX_STEPS = 300
GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))
"""Growth of rho by how much of the mask has changed since the last one, of the kept weights."""


def admm_mask(
    weight: Tensor,
    hessian: Hessian,
    target: Tensor,
    sparsity: float,
    scope: str,
    name: str,
    *,
    power: float = 0.0,
    multiplier: Tensor | None = None,
    max_steps: int = MAX_STEPS,
) -> Tensor:
    """The mask that ADMM settles on.

    Args:
        weight: (out, in) dense weight.
        hessian: H.
        target: (out, in) row b of each row's normal equations.
        sparsity: Fraction of zeros, in [0, 1).
        scope: `matrix`, `row` or `N:M`.
        name: The weight's name, which orders equal values.
        power: Of the input's norm in the comparison.
        multiplier: (out, in), positive, of |w| in the comparison; None is 1.
        max_steps: Where it ends though the mask still changes.

    Returns:
        (out, in) bool, True = kept, with the zeros that the scope asks for.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    mean, scale, eigenvalues, vectors = hessian.derive(_scaled_eigenpairs, power, dtype)
    rotated_target = (target.to(dtype) / mean / scale) @ vectors
    factor = vectors if len(vectors) <= MAX_EXACT_INPUTS else reduced(vectors)

    def project(values: Tensor) -> Tensor:
        score = values.abs() if multiplier is None else values.abs() * multiplier
        return masks_by_score({name: score}, sparsity, scope, {name: values})[name]

    solution = weight.detach().to(dtype) * scale
    mask = project(solution)
    sparse, dual, rho = solution * mask, torch.zeros_like(solution), FIRST_RHO
    settled, num_kept = mask, max(1, int(mask.sum()))
    for step in range(1, max_steps + 1):
        rotated = rotated_target + reduced_product(rho * sparse - dual, factor)
        solution = reduced_product(rotated / (eigenvalues + rho), factor.T)
        values = solution + dual / rho
        mask = project(values)
        sparse = values * mask
        dual += rho * (solution - sparse)
        if step % STEPS_PER_RHO == 0:
            changed = int((mask != settled).sum()) / num_kept
            if changed == 0:
                break
            settled = mask
            rho *= next(growth for least, growth in GROWTH if changed >= least)
    return mask


def _scaled_eigenpairs(hessian: Tensor, power: float, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """H's mean diagonal (), the scale of the inputs (in,), and the eigenpairs of H under both.

    Args:
        hessian: (in, in) fp64 H, positive definite.
        power: Of the input's norm in the scale.
        dtype: Of the results; the decomposition is in fp64 up to `MAX_EXACT_INPUTS`.
    """
    mean = hessian.diagonal().mean()
    scale = (hessian.diagonal() / mean) ** (power / 2)
    scaled = hessian / mean / scale / scale[:, None]
    if len(scaled) > MAX_EXACT_INPUTS:
        scaled = scaled.to(dtype)
    eigenvalues, vectors = torch.linalg.eigh(scaled)
    return tuple(values.to(dtype) for values in (mean, scale, eigenvalues, vectors))
