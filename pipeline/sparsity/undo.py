"""Takes a refinement back: everything it changed is again what it was, bit for bit.

A candidate mask is judged in the place of the present one, because there is no memory for a second
model. `refine` notes the weights that change side, and what belongs to them, before it changes
anything:

    undo = Undo()
    refine(state, weights, rule, ..., undo=undo)
    ...                                 the weights that compute carry the candidate mask
    undo.take_back(state, weights)      before the next optimizer step

Noted of a shard are its changed positions, one bit a weight, and for each weight that changed side
its value, its movement and its first moment: 8 bytes + movement's 4 or 2. The values are copied as
they are, so -0.0 and NaN come back as such. A refinement bound for good needs no record, and one
that was taken back is made again by the same arguments: `refine` draws nothing at random.

Left out: steps in between, after which the values would no longer be those that were noted.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from pipeline.sparsity.bits import positions_in_pieces
from pipeline.sparsity.shards import FIRST_MOMENTS, Shard, ShardedWeights
from pipeline.sparsity.state import Regrown, SparsityState


@dataclass(frozen=True)
class _Change:
    """What one shard held before."""

    changed: Tensor
    """Packed bits of the weights that changed side, n of them."""
    values: list[Tensor]
    """(n,) each, of the tensors of `_touched`, in the order of positions."""
    regrown: Regrown


@dataclass
class Undo:
    """The record of one refinement, of this rank's shards."""

    _changes: dict[str, _Change] = field(default_factory=dict)

    @torch.no_grad()
    def note(
        self, state: SparsityState, weights: ShardedWeights, shard: Shard, changed: Tensor
    ) -> None:
        """Notes one shard before it is changed. `changed`: packed bits of what changes side."""
        tensors = _touched(state, weights, shard)
        parts: list[list[Tensor]] = [[] for _ in tensors]
        for positions in positions_in_pieces(changed):
            for part, tensor in zip(parts, tensors, strict=True):
                part.append(tensor.index_select(0, positions))
        values = [torch.cat(part) for part in parts]
        self._changes[shard.name] = _Change(changed, values, state.regrown[shard.name])

    @torch.no_grad()
    def take_back(self, state: SparsityState, weights: ShardedWeights) -> None:
        """Restores masks, weights, movement, moments and notes, and publishes the weights.

        Every rank calls it, once, with no optimizer step since the refinement. The record is empty
        afterwards and can be used again.
        """
        for name, change in self._changes.items():
            tensors, start = _touched(state, weights, weights.shards[name]), 0
            for positions in positions_in_pieces(change.changed):
                stop = start + positions.numel()
                for tensor, values in zip(tensors, change.values, strict=True):
                    tensor.index_copy_(0, positions, values[start:stop])
                start = stop
            state.masks[name] ^= change.changed
            state.regrown[name] = change.regrown
        self._changes.clear()
        weights.publish()


def _touched(state: SparsityState, weights: ShardedWeights, shard: Shard) -> list[Tensor]:
    """(numel,) views of all that a refinement may write to."""
    moments = [weights.moments(shard, key) for key in FIRST_MOMENTS]
    present = [moment for moment in moments if moment is not None]
    return [shard.weight, state.movement[shard.name], *present]
