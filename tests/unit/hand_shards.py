"""Shards made by hand: any cut of any weights into contiguous ranges, with padding between them."""

import torch
from torch import Tensor

from pipeline.sparsity.masks import unpack_mask
from pipeline.sparsity.shards import Shard, ShardedWeights
from pipeline.sparsity.state import SparsityState

PADDING = 3
"""Elements of garbage before each shard in the flat tensor."""


def cut_weights(
    weights: dict[str, Tensor],
    cuts: dict[str, list[int]] | None = None,
    rank: int = 0,
    group=None,
    moments: dict[str, dict[str, Tensor]] | None = None,
) -> ShardedWeights:
    """One rank's shards of whole weights.

    Args:
        weights: Name to fp32 weight.
        cuts: Name to world size + 1 borders; None: this rank holds all.
        rank: Which ranges are this rank's.
        group: The ranks.
        moments: `exp_avg` and the like, each name to tensor of the weight's shape.
    """
    ranges = {
        name: (0, weight.numel()) if cuts is None else (cuts[name][rank], cuts[name][rank + 1])
        for name, weight in weights.items()
    }

    def flatten(tensors: dict[str, Tensor]) -> Tensor:
        pieces = [torch.full((PADDING,), 7e7)]
        for name, (start, stop) in ranges.items():
            pieces += [tensors[name].detach().reshape(-1)[start:stop], torch.full((PADDING,), 7e7)]
        return torch.cat(pieces).clone()

    flat = torch.nn.Parameter(flatten(weights))
    optimizer = torch.optim.AdamW([flat])
    optimizer.state[flat] = {key: flatten(values) for key, values in (moments or {}).items()}
    shards, place = {}, PADDING
    for name, (start, stop) in ranges.items():
        if stop > start:
            shape = weights[name].shape
            shards[name] = Shard(name, shape, start, stop - start, flat, place)
        place += stop - start + PADDING
    return ShardedWeights(
        shards=shards,
        shapes={name: weight.shape for name, weight in weights.items()},
        optimizer=optimizer,
        group=group,
        publish=lambda: None,
    )


def cut_state(
    masks: dict[str, Tensor], movement: dict[str, Tensor], weights: ShardedWeights
) -> SparsityState:
    """A state of whole masks and movement on one rank's shards."""
    state = SparsityState.from_masks(masks, weights)
    for name, shard in weights.shards.items():
        part = movement[name].reshape(-1)[shard.offset : shard.offset + shard.numel]
        state.movement[name].copy_(part)
    return state


def masks_of(state: SparsityState, weights: ShardedWeights) -> dict[str, Tensor]:
    """Name to bool (numel,) of this rank's shards."""
    return {n: unpack_mask(state.masks[n], (s.numel,)) for n, s in weights.shards.items()}
