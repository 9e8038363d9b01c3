"""Cache-sized pieces of a shard, and the few buffers that one piece needs.

torch runs an elementwise operation over its whole operands before the next one starts, so a chain
of them over a large tensor reads it from memory again and again. Over a piece that stays in the
cache only the first operation pays for memory. It also means that nothing of a weight's size is
ever allocated.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.sparsity.masks import byte_table
from pipeline.sparsity.stochastic import phases, random_bits, round_to_bf16

CPU_ELEMENTS = 2**18
"""Measured at 125M weights, one thread, 1 MiB L2 and 32 MiB L3: both hooks take 150 ms with 2^16
elements, 136 with 2^17, 128 with 2^18, 137 with 2^20."""
ACCELERATOR_ELEMENTS = 2**24
"""Not measured. 64 MiB a buffer; one operation then takes ten times what its launch does."""


class Piece(NamedTuple):
    """A part of one shard; every tensor has n elements but `mask`."""

    offset: int
    """First element, in the flattened weight."""
    weight: Tensor
    """fp32 (n,), view."""
    gradient: Tensor
    """(n,), view."""
    movement: Tensor
    """fp32 or bf16 (n,), view."""
    mask: Tensor
    """uint8 (ceil(n / 8),), view."""


class Chunks:
    """Walks over shards piece by piece, with buffers of one piece's size."""

    def __init__(self, device: torch.device, largest_shard: int, movement_dtype: torch.dtype):
        """Allocates the buffers: 5.5 bytes an element of a piece, 17.5 with bf16 movement.

        Args:
            device: Of the shards.
            largest_shard: Elements of the largest one; no piece is larger.
            movement_dtype: fp32 or bf16.
        """
        limit = CPU_ELEMENTS if device.type == "cpu" else ACCELERATOR_ELEMENTS
        self.size = min(limit, -(-largest_shard // 8) * 8)
        self._table = byte_table(device, 0, -1)
        self._bytes = torch.empty(self.size // 8, dtype=torch.int32, device=device)
        self._words = torch.empty(self.size // 8, dtype=torch.int64, device=device)
        self._bits = torch.empty(self.size, dtype=torch.int32, device=device)
        if movement_dtype == torch.bfloat16:
            self._movement = torch.empty(self.size, device=device)
            self._random = torch.empty(self.size, dtype=torch.int32, device=device)
            self._phase = phases(self.size, device)

    def pieces(
        self, offset: int, weight: Tensor, gradient: Tensor, movement: Tensor, mask: Tensor
    ) -> Iterator[Piece]:
        """The pieces of one shard, in order.

        Args:
            offset: Of the shard's first element in the flattened weight.
            weight: fp32 (n,).
            gradient: (n,).
            movement: fp32 or bf16 (n,).
            mask: uint8 (ceil(n / 8),), packed.
        """
        return map(
            Piece,
            range(offset, offset + weight.numel(), self.size),
            weight.split(self.size),
            gradient.split(self.size),
            movement.split(self.size),
            mask.split(self.size // 8),
        )

    def pruned_part(self, values: Tensor, mask: Tensor) -> Tensor:
        """The values of pruned weights and 0 for kept ones, whatever those are, NaN included.

        Args:
            values: fp32 (n,).
            mask: uint8 (ceil(n / 8),), packed.

        Returns:
            fp32 (n,), valid until the next call.
        """
        return (
            self._pruned_bits(values.numel(), mask)
            .bitwise_and_(values.view(torch.int32))
            .view(torch.float32)
        )

    def zero_pruned(self, values: Tensor, mask: Tensor) -> Tensor:
        """Sets the values of pruned weights to exactly 0, in place, and returns what they were.

        Arguments and result as for `pruned_part`.
        """
        part = self.pruned_part(values, mask)
        values.view(torch.int32).bitwise_xor_(part.view(torch.int32))
        return part

    def magnitude(self, weight: Tensor) -> Tensor:
        """|w|, fp32 (n,), valid until the next call."""
        return torch.abs(weight, out=self._bits.view(torch.float32)[: weight.numel()])

    def product(self, one: Tensor, other: Tensor) -> Tensor:
        """Elementwise, fp32 (n,), valid until the next call."""
        return torch.mul(one, other, out=self._bits.view(torch.float32)[: one.numel()])

    def load(self, movement: Tensor) -> Tensor:
        """Movement in fp32 (n,): the tensor itself, or a copy in a buffer if it is bf16."""
        if movement.dtype == torch.float32:
            return movement
        return self._movement[: movement.numel()].copy_(movement)

    def store(self, movement: Tensor, value: Tensor, key: int, offset: int) -> None:
        """Writes back what `load` gave, rounded stochastically if it is bf16.

        Args:
            movement: fp32 or bf16 (n,), as given to `load`.
            value: fp32 (n,), as it returned.
            key: From `rounding_key`.
            offset: Of the piece in the flattened weight.
        """
        if movement.dtype == torch.float32:
            return
        n = movement.numel()
        bits = random_bits(self._random[:n], self._phase[:n], key, offset)
        round_to_bf16(movement, value, bits)

    def _pruned_bits(self, n: int, mask: Tensor) -> Tensor:
        """int32 (n,): all ones where the weight is pruned, 0 where it is kept."""
        index, words = self._bytes[: mask.numel()], self._words[: mask.numel()]
        torch.index_select(self._table, 0, index.copy_(mask), out=words)
        return self._bits[:n].copy_(words.view(torch.int8)[:n])
