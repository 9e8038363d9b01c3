"""What a weight is worth when the mask is refined. High = keep.

- `magnitude`: |w| (Han et al. 2015, arXiv 1506.02626).
- `movement`: the accumulated -g*w, positive when training moves the weight away from zero
  (Sanh et al. 2020, arXiv 2005.07683, section 4).
- `mix`: (1 - a) * rank(|w|) + a * rank(movement), ranks in (0, 1] among the kept weights that are
  compared. The two have different units, ranks have none.
"""

import torch
from torch import Tensor


def normalised_ranks(values: Tensor) -> Tensor:
    """Ranks of a flat tensor divided by its length: lowest 1/n, highest 1. Ties by position."""
    ranks = torch.empty_like(values, dtype=torch.float32)
    order = values.sort(stable=True).indices
    ranks[order] = torch.arange(
        1, values.numel() + 1, dtype=torch.float32, device=values.device
    ) / max(1, values.numel())
    return ranks


def keep_score(kind: str, weight: Tensor, movement: Tensor, movement_weight: float) -> Tensor:
    """Scores of the kept weights that are compared with each other.

    Args:
        kind: `magnitude`, `movement` or `mix`.
        weight: (n,) the kept weights.
        movement: (n,) their accumulated -g*w.
        movement_weight: a of `mix`, in [0, 1].

    Returns:
        (n,) fp32.

    Raises:
        ValueError: `kind` needs movement and none was observed (all zeros).
    """
    if kind == "magnitude":
        return weight.abs().float()
    if movement.numel() and not movement.any():
        raise ValueError(
            f"refine.score: {kind!r} needs movement and none was observed yet; set "
            "refine.begin_step to at least 1"
        )
    if kind == "movement":
        return movement.float()
    return (1.0 - movement_weight) * normalised_ranks(weight.abs()) + (
        movement_weight * normalised_ranks(movement)
    )
