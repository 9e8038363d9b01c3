"""The choice of a refinement under scope `matrix` or `model`: exact thresholds over all ranks.

Both sides of all matrices are selected in one go. Under `model` each matrix keeps a floor of its
weights: where the common threshold takes more, the matrix loses the lowest it may lose, and the
others make up for it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.sparsity.bits import count_bits, full_bits
from pipeline.sparsity.candidates import Candidates, Values
from pipeline.sparsity.collectives import all_reduce_sum
from pipeline.sparsity.scores import magnitude
from pipeline.sparsity.shards import ShardedWeights
from pipeline.sparsity.state import SparsityState
from pipeline.sparsity.threshold import select_lowest


@dataclass(frozen=True)
class Sides:
    """What is ranked on either side of this rank's masks, by weight name."""

    state: SparsityState
    weights: ShardedWeights
    keep: dict[str, Values]
    """Score of kept weights; the lowest are pruned."""
    stay: dict[str, Values]
    """Score of pruned weights; the lowest regrow."""
    free: dict[str, Tensor]
    """Packed bits of the kept weights that may be pruned now."""


def choose_by_threshold(
    sides: Sides, sparsity: float, regrow_fraction: float, min_density: float | None
) -> dict[str, Tensor]:
    """Chooses the weights that change side. Every rank calls it.

    Args:
        sides: The scores.
        sparsity: Wanted fraction of zeros of each matrix, or of all, in [0, 1].
        regrow_fraction: Weights that regrow, as a fraction of the kept ones.
        min_density: None: each matrix by itself. Else all compete, and each matrix keeps at least
            this fraction of its weights.

    Returns:
        Name to packed bits of the weights that change side.

    Raises:
        ValueError: A score is NaN, or too few weights may be pruned.
    """
    weights = sides.weights
    names = list(weights.shapes)
    sizes = torch.tensor([shape.numel() for shape in weights.shapes.values()])
    kept, free = _count(sides)
    may_go = free
    group_of = torch.arange(len(names)) if min_density is None else torch.zeros_like(sizes)
    if min_density is not None:
        floor = (min_density * sizes.double()).round().long()
        may_go = torch.minimum(free, (kept - floor).clamp(min=0))
    totals = torch.zeros(4, int(group_of.max()) + 1, dtype=torch.int64)
    totals.index_add_(1, group_of, torch.stack([sizes, kept, may_go, free]))
    counts = [
        how_many(*numbers, sparsity, regrow_fraction)
        for numbers in zip(*totals[:3].tolist(), strict=True)
    ]
    if any(num_regrow < 0 for _, num_regrow in counts):
        raise ValueError(
            f"refine.min_density: {min_density} and refine.protect_steps leave too few weights to "
            f"reach sparsity {sparsity:.4f}; lower one of them"
        )
    groups = group_of.tolist()
    pruning = _candidates(sides, groups, sides.keep, sides.free)
    regrowing, wanted, competing = [], [num_prune for num_prune, _ in counts], totals[3].tolist()
    if any(num_regrow for _, num_regrow in counts):
        zeros = {
            name: mask ^ full_bits(weights.shards[name].numel, mask.device)
            for name, mask in sides.state.masks.items()
        }
        groups = [len(counts) + group for group in groups]
        regrowing = _candidates(sides, groups, sides.stay, zeros)
        wanted += [num_regrow for _, num_regrow in counts]
        competing += (totals[0] - totals[1]).tolist()
    select_lowest(pruning + regrowing, wanted, competing, names, weights.group)
    if min_density is not None:
        _respect_floor(pruning, wanted[0], free, may_go, weights)
    changed = {part.name: part.chosen for part in pruning}
    for part in regrowing:
        changed[part.name] |= part.chosen
    return changed


def how_many(
    numel: int, kept: int, may_go: int, sparsity: float, regrow_fraction: float
) -> tuple[int, int]:
    """How many weights of a group to prune and to regrow.

    Args:
        numel: Weights of the group.
        kept: Of these, kept now.
        may_go: Of these, those that may be pruned.
        sparsity: Wanted fraction of zeros.
        regrow_fraction: Weights that regrow, as a fraction of the kept ones, if enough may go.

    Returns:
        Both counts; the second is negative where the sparsity is out of reach.
    """
    zeros = numel - kept
    more_zeros = round(sparsity * numel) - zeros
    num_regrow = max(min(round(regrow_fraction * kept), zeros), -more_zeros)
    num_prune = min(num_regrow + more_zeros, may_go)
    return num_prune, num_prune - more_zeros


def _count(sides: Sides) -> tuple[Tensor, Tensor]:
    """int64 (names,) each, over all ranks: kept weights, and those of them that may be pruned."""
    counts = torch.zeros(2, len(sides.weights.shapes), dtype=torch.int64)
    for index, name in enumerate(sides.weights.shapes):
        if name in sides.free:
            mask, free = sides.state.masks[name], sides.free[name]
            counts[0, index] = count_bits(mask)
            counts[1, index] = counts[0, index] if free is mask else count_bits(free)
    kept, free = all_reduce_sum(counts, sides.weights.group)
    return kept, free


def _candidates(
    sides: Sides, groups: list[int], scores: dict[str, Values], eligible: dict[str, Tensor]
) -> list[Candidates]:
    """This rank's part of one side; `groups` by name number."""
    return [
        Candidates(
            group=groups[index],
            name=name,
            index=index,
            offset=shard.offset,
            numel=shard.numel,
            device=shard.flat.device,
            score=scores[name],
            magnitude=magnitude(shard),
            eligible=eligible[name],
        )
        for index, name in enumerate(sides.weights.shapes)
        if (shard := sides.weights.shards.get(name)) is not None
    ]


def _respect_floor(
    pruning: list[Candidates], num_prune: int, free: Tensor, may_go: Tensor, weights: ShardedWeights
) -> None:
    """Selects again where a matrix lost more weights than may go.

    Such a matrix loses the lowest that may go, and the others are selected anew for the rest. Their
    threshold only rises, so this ends, with one threshold for all matrices above their floor.

    Args:
        pruning: All kept weights, selected as one group; their choice is changed.
        num_prune: How many weights are pruned over all.
        free: int64 (names,): how many competed in each matrix.
        may_go: int64 (names,): the most each matrix may lose.
        weights: For names and ranks.
    """
    names = list(weights.shapes)
    full = torch.zeros(len(names), dtype=torch.bool)
    while True:
        lost = torch.zeros(len(names), dtype=torch.int64)
        for part in pruning:
            lost[part.index] += count_bits(part.chosen)
        over = all_reduce_sum(lost, weights.group) > may_go
        if not over.any():
            return
        again = [part for part in pruning if not full[part.index]]
        full |= over
        for part in again:
            part.group = 1 + part.index if over[part.index] else 0
        rest = num_prune - int(may_go[full].sum())
        wanted = [rest, *torch.where(over, may_go, 0).tolist()]
        sizes = [int(free[~full].sum()), *torch.where(over, free, 0).tolist()]
        select_lowest(again, wanted, sizes, names, weights.group)
