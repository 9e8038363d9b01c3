"""What the engine knows of each prunable weight: its mask and its movement, by weight name.

Each rank holds this of its own shards (`shards.py`): one bit and one accumulator a weight, 4 + 1/8
bytes, or 2 + 1/8 in bf16. That a kept weight once regrew is noted for those few weights alone.
`storage.py` keeps a state on disk.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.sparsity.bits import count_bits
from pipeline.sparsity.collectives import all_reduce_sum, communication_device
from pipeline.sparsity.masks import pack_mask, unpack_mask
from pipeline.sparsity.shards import Shard, ShardedWeights


@dataclass
class Regrown:
    """The kept weights of one shard that once regrew."""

    indices: Tensor
    """int32 (n,) local positions, ascending; int64 in shards of 2^31 elements and more."""
    steps: Tensor
    """int32 (n,) the step at which each regrew last."""

    @classmethod
    def none(cls, shard: Shard) -> "Regrown":
        """No weight of a shard regrew yet."""
        device = shard.flat.device
        return cls(
            torch.empty(0, dtype=index_dtype(shard.numel), device=device),
            torch.empty(0, dtype=torch.int32, device=device),
        )


@dataclass
class SparsityState:
    """Masks and movement of this rank's shards, by weight name; tensors lie beside the shards."""

    masks: dict[str, Tensor]
    """Name to uint8 (ceil(numel / 8),) of the shard, packed by `pack_mask`, set = kept."""
    movement: dict[str, Tensor]
    """Name to fp32 or bf16 (numel,) of the shard; zeroed when the weight changes side."""
    regrown: dict[str, Regrown]

    @classmethod
    def from_masks(
        cls,
        masks: dict[str, Tensor],
        weights: ShardedWeights,
        movement_dtype: torch.dtype = torch.float32,
    ) -> "SparsityState":
        """Cuts whole masks into this rank's shards, with nothing observed yet.

        Args:
            masks: Name to bool mask of the weight's shape, True = kept.
            weights: The shards.
            movement_dtype: fp32 or bf16.

        Raises:
            ValueError: Names or shapes are not those of the weights.
        """
        check_same_weights({name: mask.shape for name, mask in masks.items()}, weights, "masks")
        state = cls({}, {}, {})
        for name, shard in weights.shards.items():
            part = masks[name].reshape(-1)[shard.offset : shard.offset + shard.numel]
            device = shard.flat.device
            state.masks[name] = pack_mask(part.to(device))
            state.movement[name] = torch.zeros(shard.numel, dtype=movement_dtype, device=device)
            state.regrown[name] = Regrown.none(shard)
        return state

    def sparsity(self, weights: ShardedWeights) -> float:
        """Fraction of pruned weights over all ranks, in [0, 1]. Every rank calls it."""
        kept = sum(count_bits(mask) for mask in self.masks.values())
        total = sum(shape.numel() for shape in weights.shapes.values())
        return 1.0 - int(all_reduce_sum(torch.tensor([kept]), weights.group)) / total

    def whole_masks(self, weights: ShardedWeights) -> Iterator[tuple[str, Tensor | None]]:
        """Gathers the masks weight by weight, one bit an element. Every rank walks through it.

        Yields:
            Name and, on the group's first rank, bool mask of the weight's shape on the CPU; None on
            others.
        """
        for name, shape in weights.shapes.items():
            shard = weights.shards.get(name)
            if weights.group is None:
                yield name, unpack_mask(self.masks[name], shape).cpu()
                continue
            parts = _gather_masks(name, shard, self.masks.get(name), weights)
            if parts is None:
                yield name, None
                continue
            whole = torch.zeros(shape.numel(), dtype=torch.bool)
            for offset, part in parts:
                whole[offset : offset + part.numel()] = part
            yield name, whole.reshape(shape)


def index_dtype(numel: int) -> torch.dtype:
    """The smallest integers that count a shard's elements."""
    return torch.int32 if numel < 2**31 else torch.int64


def check_same_weights(shapes: dict[str, torch.Size], weights: ShardedWeights, what: str) -> None:
    """Refuses names or shapes that are not the model's.

    Raises:
        ValueError: Says the first three differences.
    """
    differences = [
        f"{name} is {_shape_text(shapes.get(name))} there and {_shape_text(wanted)} in the model"
        for name in dict.fromkeys([*weights.shapes, *shapes])
        if (wanted := weights.shapes.get(name)) != shapes.get(name)
    ]
    if differences:
        more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
        raise ValueError(f"{what}: not of this model: {'; '.join(differences[:3])}{more}")


def _shape_text(shape: torch.Size | None) -> str:
    return "absent" if shape is None else str(tuple(shape))


def _gather_masks(
    name: str, shard: Shard | None, mask: Tensor | None, weights: ShardedWeights
) -> list[tuple[int, Tensor]] | None:
    """Every rank's offset and bool part of one weight on the group's first rank; None elsewhere."""
    group = weights.group
    device = communication_device(group)
    span = torch.zeros(2, dtype=torch.int64, device=device)
    if shard is not None:
        span = torch.tensor([shard.offset, shard.numel], device=device)
    first = dist.get_rank(group) == 0
    world_size = dist.get_world_size(group)
    spans = [torch.empty_like(span) for _ in range(world_size)]
    dist.all_gather(spans, span, group=group)
    num_bytes = max((int(numel) + 7) // 8 for _, numel in spans)
    sent = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    if mask is not None:
        sent[: mask.numel()] = mask
    received = [torch.empty_like(sent) for _ in range(world_size)] if first else None
    dist.gather(sent, received, group=group, group_dst=0)
    if received is None:
        return None
    return [
        (int(offset), unpack_mask(bits.cpu(), (int(numel),)))
        for (offset, numel), bits in zip(spans, received, strict=True)
    ]
