"""Exact selection of the weights to prune: the k lowest scores, neither more nor fewer.

Equal scores are ordered by a tie-break (|w| by convention) and then by position, so a mask has
exactly the zeros that were asked for even when all scores are equal.
"""

import torch
from torch import Tensor


def mask_by_score(score: Tensor, num_zeros: int, tie_break: Tensor | None = None) -> Tensor:
    """Keeps all but the `num_zeros` lowest scores.

    Args:
        score: Any shape, any float dtype. High = keep.
        num_zeros: How many elements are pruned, 0 to `score.numel()`.
        tie_break: Same shape; orders equal scores, high = keep. Position orders the rest.

    Returns:
        Bool mask of the score's shape, True = kept, with exactly `num_zeros` False.

    Raises:
        ValueError: `num_zeros` is out of range or a score is NaN.
    """
    flat = score.detach().reshape(-1)
    if not 0 <= num_zeros <= flat.numel():
        raise ValueError(f"num_zeros: {num_zeros} is outside [0, {flat.numel()}]")
    if torch.isnan(flat).any():
        raise ValueError(f"score: {int(torch.isnan(flat).sum())} of {flat.numel()} values are NaN")
    if num_zeros == 0:
        return torch.ones_like(score, dtype=torch.bool)
    threshold = flat.kthvalue(num_zeros).values
    kept = flat > threshold
    tied = (flat == threshold).nonzero().squeeze(1)
    num_tied_kept = flat.numel() - num_zeros - int(kept.sum())
    if num_tied_kept > 0:
        if tie_break is not None:
            order = tie_break.detach().reshape(-1)[tied].sort(descending=True, stable=True).indices
            tied = tied[order]
        kept[tied[:num_tied_kept]] = True
    return kept.reshape(score.shape)


def masks_by_score(
    scores: dict[str, Tensor],
    sparsity: float,
    scope: str,
    tie_break: dict[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Masks of many matrices at one target sparsity.

    Args:
        scores: Name to score. High = keep.
        sparsity: Fraction of zeros, in [0, 1].
        scope: `matrix` prunes each matrix to the target, `model` ranks all weights together.
        tie_break: Name to tensor that orders equal scores.

    Returns:
        Name to bool mask, True = kept. Zeros: round(sparsity x elements) of each matrix, or of all.
    """
    if scope == "matrix":
        return {
            name: mask_by_score(
                score,
                round(sparsity * score.numel()),
                None if tie_break is None else tie_break[name],
            )
            for name, score in scores.items()
        }
    flat = concatenate(scores)
    mask = mask_by_score(
        flat,
        round(sparsity * flat.numel()),
        None if tie_break is None else concatenate({name: tie_break[name] for name in scores}),
    )
    return split_like(mask, scores)


def concatenate(tensors: dict[str, Tensor]) -> Tensor:
    """All elements as one flat tensor, in the dictionary's order."""
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors.values()])


def split_like(flat: Tensor, like: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `concatenate`: names and shapes from `like`, values from `flat`."""
    parts = flat.split([tensor.numel() for tensor in like.values()])
    return {
        name: part.reshape(tensor.shape)
        for (name, tensor), part in zip(like.items(), parts, strict=True)
    }
