"""Refinement: old mask + scores + target sparsity -> new mask. Some weights pruned, some regrown.

Kept and pruned weights are ranked apart, because their scores have different units:

    n_regrow = round(regrow_fraction x kept now), the largest |accumulated proposed update|
    n_prune  = n_regrow + (zeros wanted - zeros now), the lowest keep score

The fraction is of the kept weights, as in RigL (arXiv 1911.11134): a tenth of the zeros would at
sparsity 0.9 replace nine tenths of what is left.

A weight that regrew less than `protect_steps` ago is not pruned. Each matrix keeps at least
`min_density` of its weights.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.sparsity.scores import keep_score
from pipeline.sparsity.state import SparsityState
from pipeline.sparsity.threshold import concatenate, mask_by_score, split_like


@dataclass(frozen=True, kw_only=True)
class RefinementRule:
    """How weights are chosen; when and how many is the schedule's."""

    scope: str
    """`matrix`: each matrix has the target sparsity; `model`: all weights compete."""
    score: str
    """`magnitude`, `movement` or `mix`, see `sparsity/scores.py`."""
    movement_weight: float
    """Share of movement in `mix`, in [0, 1]."""
    protect_steps: int
    """Steps during which a regrown weight is not pruned."""
    min_density: float
    """Fraction of its weights that each matrix keeps at least, in [0, 1]."""


@dataclass(frozen=True)
class Refinement:
    """What one refinement did, in weights."""

    pruned: int
    regrown: int
    survived: int
    """Of the weights that ever regrew, those that are kept now."""


@torch.no_grad()
def refine(
    state: SparsityState,
    weights: dict[str, Tensor],
    rule: RefinementRule,
    *,
    sparsity: float,
    regrow_fraction: float,
    step: int,
) -> tuple[Refinement, dict[str, Tensor]]:
    """Refines the masks of a state in place and zeroes newly pruned weights and their movement.

    Args:
        state: Masks, movement and regrowth steps; changed in place.
        weights: Name to weight; newly pruned ones are set to 0, regrown ones start at 0.
        rule: How weights are chosen.
        sparsity: Wanted fraction of zeros afterwards, in [0, 1].
        regrow_fraction: Weights that regrow, as a fraction of the kept ones, in [0, 1].
        step: The present step, for protection.

    Returns:
        The counts, and name to bool of the weights that regrew (their optimizer state needs care).
    """
    groups = [[name] for name in weights] if rule.scope == "matrix" else [list(weights)]
    grown: dict[str, Tensor] = {}
    num_pruned = num_regrown = 0
    for names in groups:
        new_masks = _refine_group(
            {name: state.masks[name] for name in names},
            {name: weights[name].detach() for name in names},
            {name: state.movement[name] for name in names},
            {name: state.regrown_step[name] for name in names},
            rule,
            sparsity,
            regrow_fraction,
            step,
        )
        for name, new in new_masks.items():
            old = state.masks[name]
            grown[name] = new & ~old
            num_pruned += int((old & ~new).sum())
            num_regrown += int(grown[name].sum())
            state.movement[name].masked_fill_(old ^ new, 0.0)
            state.regrown_step[name].masked_fill_(grown[name], step)
            state.masks[name] = new
            weights[name].mul_(new)
    survived = sum(
        int(((state.regrown_step[name] >= 0) & mask).sum()) for name, mask in state.masks.items()
    )
    return Refinement(num_pruned, num_regrown, survived), grown


def _refine_group(
    masks: dict[str, Tensor],
    weights: dict[str, Tensor],
    movement: dict[str, Tensor],
    regrown_step: dict[str, Tensor],
    rule: RefinementRule,
    sparsity: float,
    regrow_fraction: float,
    step: int,
) -> dict[str, Tensor]:
    """New masks of weights that compete with each other."""
    mask, weight, moved = concatenate(masks), concatenate(weights), concatenate(movement)
    kept, pruned = mask.nonzero().squeeze(1), (~mask).nonzero().squeeze(1)
    zeros_wanted = round(sparsity * mask.numel())
    num_regrow = min(round(regrow_fraction * kept.numel()), pruned.numel())
    num_regrow = max(num_regrow, pruned.numel() - zeros_wanted)
    num_prune = num_regrow + zeros_wanted - pruned.numel()

    score = keep_score(rule.score, weight[kept], moved[kept], rule.movement_weight)
    regrown_at = concatenate(regrown_step)[kept]
    protected = (regrown_at >= 0) & (step - regrown_at < rule.protect_steps)
    protected |= _floor(masks, kept, score, rule.min_density)
    num_prune = min(num_prune, int((~protected).sum()))
    num_regrow = num_prune - (zeros_wanted - pruned.numel())
    if num_regrow < 0:
        raise ValueError(
            f"refine.min_density: {rule.min_density} and refine.protect_steps: "
            f"{rule.protect_steps} leave too few weights to reach sparsity {sparsity:.4f} at step "
            f"{step}; lower one of them"
        )
    stays = mask_by_score(score.masked_fill(protected, torch.inf), num_prune, weight[kept].abs())
    grows = ~mask_by_score(-moved[pruned].abs(), num_regrow)
    new = mask.clone()
    new[kept] = stays
    new[pruned] = grows
    return split_like(new, masks)


def _floor(masks: dict[str, Tensor], kept: Tensor, score: Tensor, min_density: float) -> Tensor:
    """Bool over the kept weights: those every matrix keeps whatever the others score."""
    protected = torch.zeros_like(score, dtype=torch.bool)
    if len(masks) == 1 or min_density == 0.0:
        return protected
    counts = [int(mask.sum()) for mask in masks.values()]
    for mask, part, count in zip(
        masks.values(),
        torch.arange(kept.numel(), device=kept.device).split(counts),
        counts,
        strict=True,
    ):
        num_floor = min(count, round(min_density * mask.numel()))
        protected[part] = mask_by_score(score[part], count - num_floor)
    return protected
