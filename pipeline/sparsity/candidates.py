"""Elements of one shard that compete for selection, and which of them are decided.

Two packed bits an element say where it stands: chosen, or still open. All work is done in chunks
of `CHUNK` elements, so temporaries stay small whatever the shard's size. Positions and keys of the
open elements are remembered where they are few, and made anew chunk by chunk where they are many.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from pipeline.sparsity.bits import (
    bit_positions,
    bits_at,
    clear_bits,
    count_bits,
    full_bits,
    set_bits,
)
from pipeline.sparsity.keys import hash_keys, order_keys
from pipeline.sparsity.masks import pack_mask

CHUNK = 1 << 18
"""Elements worked on at once: few enough for the cache, many enough to hide Python; with 2^20 the
allocator gives temporaries back to the system and page faults take over. Divisible by 8, so that
chunks begin at a byte of packed bits."""
FEW = 16
"""Open elements are few up to this part of the shard: at most one byte a weight to remember."""
DIGIT_BITS = 8
LEVELS = 4
"""What orders elements, one after the other: score, |w|, hash, number of the name."""

Values = Callable[[Tensor | slice], Tensor]
"""Local positions, int64 (n,) or a slice, to fp32 (n,). The arithmetic is elementwise, and each
operation one that IEEE 754 rounds exactly, so it gives the same bits wherever a shard begins."""


@dataclass(eq=False)
class Candidates:
    """The elements of one shard that compete in one group."""

    group: int
    """Number of the group, the same on every rank."""
    name: str
    """The weight's name."""
    index: int
    """The name's number in the model, the same on every rank."""
    offset: int
    """The shard's first element in the flattened weight."""
    numel: int
    """Elements of the shard, competing or not."""
    device: torch.device
    score: Values
    """What is ranked; the lowest are selected."""
    magnitude: Values
    """|w|, which orders equal scores."""
    eligible: Tensor | None = None
    """Packed bits of the elements that compete; None: all."""
    chosen: Tensor = field(init=False)
    """Packed bits of the elements that are selected."""
    open: Tensor = field(init=False)
    """Packed bits of the elements that are not decided yet; out of date once `_known` is set."""
    num_open: int | None = field(init=False, default=None)
    """How many bits of `open` are set, once counted."""
    _known: tuple[Tensor, dict[int, Tensor]] | None = field(init=False, default=None)
    """Local positions of the open elements, and their keys by level, where they are few."""

    def __post_init__(self):
        """Opens every element that competes."""
        if self.eligible is None:
            self.eligible = full_bits(self.numel, self.device)
        self.reset()

    def reset(self, *, take: bool | None = None) -> None:
        """Decides that all elements are selected (True) or none (False), or opens all (None)."""
        nothing = torch.zeros_like(self.eligible)
        self.chosen = self.eligible.clone() if take else nothing
        self.open = self.eligible.clone() if take is None else nothing.clone()
        self._known = self.num_open = None

    def count_open(self) -> int:
        """How many elements are not decided."""
        if self.num_open is None:
            self.num_open = count_bits(self.open)
        return self.num_open

    def sampled(self, stride: int, groups: Sequence[int]) -> list["Candidates"]:
        """The competing elements whose place in the whole weight `stride` divides.

        Returns:
            The same sample for each of the groups.
        """
        start = -self.offset % stride
        positions = torch.arange(start, max(start, self.numel), stride, device=self.device)
        scores = self.score(slice(start, None, stride))[bits_at(self.eligible, positions)]
        samples = [
            replace(self, group=group, offset=0, numel=scores.numel(), eligible=None)
            for group in groups
        ]
        positions, keys = torch.arange(scores.numel(), device=self.device), order_keys(scores)
        for sample in samples:
            sample._known = (positions, {0: keys})
        return samples

    def split(self, low: float, high: float) -> int:
        """Selects competing elements below `low` and leaves those up to `high` open.

        Returns:
            How many scores of the shard are NaN.
        """
        flags = torch.empty(min(CHUNK, self.numel), device=self.device)
        largest = []
        for start in range(0, self.numel, CHUNK):
            stop, part = min(start + CHUNK, self.numel), slice(start // 8, (start + CHUNK) // 8)
            score = self.score(slice(start, stop))
            largest.append(score.amax())
            eligible = self.eligible[part]
            # A float result and one conversion are three times as fast as a bool result.
            below = pack_mask(torch.lt(score, low, out=flags[: stop - start]).bool()) & eligible
            up_to = pack_mask(torch.le(score, high, out=flags[: stop - start]).bool()) & eligible
            self.chosen[part] = below
            self.open[part] = up_to ^ below
        self._known = self.num_open = None
        if not largest or not torch.stack(largest).isnan().any():
            return 0
        return sum(
            int(self.score(slice(start, min(start + CHUNK, self.numel))).isnan().sum())
            for start in range(0, self.numel, CHUNK)
        )

    def count(self, level: int, low: int, shift: int) -> Tensor:
        """int64 (256,): how many open elements have each digit (key - low) >> shift."""
        counts = torch.zeros(1 << DIGIT_BITS, dtype=torch.int64, device=self.device)
        for _, keys in self._open_keys(level):
            counts += torch.bincount((keys - low) >> shift, minlength=1 << DIGIT_BITS)
        return counts

    def narrow(self, level: int, low: int, high: int, *, take_equal: bool) -> None:
        """Decides open elements by their keys.

        Those below `low` are selected, those from `high` on are not; those between stay open, or
        are selected on request.
        """
        for positions, keys in self._open_keys(level):
            set_bits(self.chosen, positions[keys < (high if take_equal else low)])
            left = (keys >= low) & (keys < (low if take_equal else high))
            if self._known is None:
                clear_bits(self.open, positions[~left])
                self.num_open = None
            else:
                self._known = (positions[left], {level: keys[left]})

    def _open_keys(self, level: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Local positions of the open elements and their keys of a level, int64 (n,) each."""
        if self._known is None and self.count_open() <= max(CHUNK, self.numel // FEW):
            self._known = (bit_positions(self.open), {})
        if self._known is None:
            for start in range(0, self.numel, CHUNK):
                positions = bit_positions(self.open[start // 8 : (start + CHUNK) // 8]) + start
                yield positions, self._keys(level, positions)
            return
        positions, keys = self._known
        if level not in keys:
            keys[level] = self._keys(level, positions)
        yield positions, keys[level]

    def _keys(self, level: int, positions: Tensor) -> Tensor:
        """int64 (n,) keys of a level, in [0, 2^32)."""
        if level == 0:
            return order_keys(self.score(positions))
        if level == 1:
            return order_keys(self.magnitude(positions))
        if level == 2:
            return hash_keys(self.name, positions + self.offset)
        return torch.full_like(positions, self.index)
