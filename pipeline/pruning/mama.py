"""MAMA's step 1: which weights to prune, by magnitude and movement before any training step.

    s_ij = |W_ij| * ||X_j||_2 ^ 0.5 * (rank(M_ij) + 0.05) ^ 0.5

- ||X_j||_2 is the norm of input channel j over the calibration tokens. Power 1 is the score of
  Wanda (Sun et al. 2023, arXiv 2306.11695), power 0.5 that of RIA (Zhang et al. 2024,
  "Plug-and-Play", ICLR).
- M_ij is the calibration movement, |g*w| summed over sequences (`calibration_movement.py`). Its
  rank among the weights that compete, in (0, 1], stands for it, because its values span many orders
  of magnitude.

Each of the three factors can be switched off. Under the redistribution `admm` W_ij is not the dense
weight but what it has become so far (`admm.py`): there the score chooses and the redistribution
moves, in turns.

The powers were chosen on one small arithmetic Llama (0.3 M weights) by the KL to the dense model;
RESULTS.md has what each part adds, and the sums of ranks tried before.
"""

import torch
from torch import Tensor

from pipeline.pruning.magnitude import magnitude_score
from pipeline.sparsity.scores import normalised_ranks
from pipeline.sparsity.threshold import concatenate, split_like

ACTIVATION_POWER = 0.5
MOVEMENT_POWER = 0.5
MOVEMENT_OFFSET = 0.05
"""Keeps the least moved weights in the running."""


def mama_scores(
    weights: dict[str, Tensor],
    input_norms: dict[str, Tensor] | None,
    movement: dict[str, Tensor] | None,
    magnitude: bool = True,
) -> dict[str, Tensor]:
    """Scores of weights that compete with each other. High = keep.

    Args:
        weights: Name to (out, in) dense weight.
        input_norms: Name to (in,) L2 norms of the input channels; None switches activation off.
        movement: Name to (out, in) calibration movement, on any device; None switches it off.
        magnitude: False switches magnitude off; at least one of the three is on.

    Returns:
        Name to (out, in) fp32.
    """
    assert magnitude or input_norms is not None or movement is not None, "nothing to score by"
    scores = {
        name: magnitude_score(weight) if magnitude else torch.ones_like(weight).float()
        for name, weight in weights.items()
    }
    if input_norms is not None:
        scores = {
            name: score * input_norms[name].pow(ACTIVATION_POWER).float()
            for name, score in scores.items()
        }
    if movement is not None:
        factors = movement_factors({n: movement[n].to(w.device) for n, w in weights.items()})
        scores = {name: score * factors[name] for name, score in scores.items()}
    return scores


def movement_factors(movement: dict[str, Tensor]) -> dict[str, Tensor]:
    """The part that movement has in the score of weights that compete with each other.

    Args:
        movement: Name to (out, in) calibration movement.

    Returns:
        Name to (out, in) fp32, positive.
    """
    ranks = normalised_ranks(concatenate(movement))
    return split_like((ranks + MOVEMENT_OFFSET) ** MOVEMENT_POWER, movement)
