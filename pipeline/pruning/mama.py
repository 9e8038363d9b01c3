"""MAMA's step 1: which weights to prune, by magnitude and movement before any training step.

    s_ij = rank(|W_ij| * ||X_j||_2 ^ 0.5) + 0.25 * rank(M_ij)

- ||X_j||_2 is the norm of input channel j over the calibration tokens. Power 1 is the score of
  Wanda (Sun et al. 2023, arXiv 2306.11695), power 0.5 that of RIA (Zhang et al. 2024,
  "Plug-and-Play", ICLR). Without activation the first term is rank(|W_ij|), without magnitude
  rank(||X_j||_2), without both it is left out.
- M_ij is the calibration movement, |g*w| summed over sequences (`calibration_movement.py`). Without
  movement the second term is left out.

Ranks lie in (0, 1] and are taken over the weights that compete with each other (one matrix, or the
whole model), because the two terms have different units.

Power and weight were measured with least squares on one small arithmetic Llama (0.3 M weights).
KL to the dense model at 0.9 and 0.95, nats per token, mean of three calibration seeds: 0.27 and
2.63; magnitude alone 0.43 and 3.37; without movement 0.36 and 3.14; without activation 0.26 and
3.24; power and weight 1: 0.42 and 3.31.
"""

import torch
from torch import Tensor

from pipeline.pruning.magnitude import magnitude_score
from pipeline.sparsity.scores import normalised_ranks
from pipeline.sparsity.threshold import concatenate, split_like

ACTIVATION_POWER = 0.5
MOVEMENT_WEIGHT = 0.25


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
        movement: Name to (out, in) calibration movement; None switches movement off.
        magnitude: False switches magnitude off; at least one of the three is on.

    Returns:
        Name to (out, in) fp32.
    """
    assert magnitude or input_norms is not None or movement is not None, "nothing to score by"
    if not magnitude and input_norms is None:
        return {name: movement[name] for name in weights}
    scores = {
        name: magnitude_score(weight) if magnitude else torch.ones_like(weight).float()
        for name, weight in weights.items()
    }
    if input_norms is not None:
        scores = {
            name: score * input_norms[name].pow(ACTIVATION_POWER).float()
            for name, score in scores.items()
        }
    if movement is None:
        return scores
    first = normalised_ranks(concatenate(scores))
    second = normalised_ranks(concatenate({name: movement[name] for name in scores}))
    return split_like(first + MOVEMENT_WEIGHT * second, scores)
