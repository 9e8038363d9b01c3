"""Sparse work on packed bits: eight flags a byte, lowest bit first, as `pack_mask` writes them.

Bits past the last element are 0 and stay 0.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

from pipeline.sparsity.masks import unpack_mask

PIECE = 1 << 21
"""Elements whose few set bits are listed at once."""


def full_bits(numel: int, device: torch.device) -> Tensor:
    """uint8 (ceil(numel / 8),) with one set bit for each of `numel` elements."""
    bits = torch.full(((numel + 7) // 8,), 255, dtype=torch.uint8, device=device)
    if numel % 8:
        bits[-1] = (1 << numel % 8) - 1
    return bits


def count_bits(bits: Tensor) -> int:
    """How many bits of a uint8 tensor are set: sums of 2, 4 and 8 bits side by side in 64."""
    padded = bits if bits.numel() % 8 == 0 else pad(bits, (0, -bits.numel() % 8))
    words = padded.view(torch.int64)
    words = words - (words >> 1).bitwise_and_(0x5555555555555555)
    words = (words >> 2).bitwise_and_(0x3333333333333333) + words.bitwise_and_(0x3333333333333333)
    words = (words >> 4).add_(words).bitwise_and_(0x0F0F0F0F0F0F0F0F)
    return int(words.mul_(0x0101010101010101).bitwise_right_shift_(56).bitwise_and_(0xFF).sum())


def bit_positions(bits: Tensor) -> Tensor:
    """int64 (n,) positions of the set bits, ascending.

    Only bytes that are not 0 are unpacked: fast where few bits are set.
    """
    filled = bits.nonzero().squeeze(1)
    flags = unpack_mask(bits[filled], (8 * filled.numel(),)).nonzero().squeeze(1)
    return filled[flags >> 3] * 8 + (flags & 7)


def positions_in_pieces(bits: Tensor) -> Iterator[Tensor]:
    """`bit_positions` of `PIECE` elements at a time, so that the list stays short."""
    for start in range(0, 8 * bits.numel(), PIECE):
        yield bit_positions(bits[start // 8 : (start + PIECE) // 8]) + start


def bits_at(bits: Tensor, positions: Tensor) -> Tensor:
    """Bool (n,): whether the bit at each int64 position is set."""
    return ((bits[positions >> 3].long() >> (positions & 7)) & 1).bool()


def set_bits(bits: Tensor, positions: Tensor) -> None:
    """Sets bits that are 0 now, in place. `positions`: int64 (n,), each at most once."""
    bits.index_add_(0, positions >> 3, _bit_values(positions))


def clear_bits(bits: Tensor, positions: Tensor) -> None:
    """Clears bits that are 1 now, in place. `positions`: int64 (n,), each at most once."""
    bits.index_add_(0, positions >> 3, -_bit_values(positions))


def _bit_values(positions: Tensor) -> Tensor:
    """uint8 (n,): 1, 2, 4 ... 128. Each bit changes at most once, so adding modulo 256 is safe."""
    return (torch.ones_like(positions) << (positions & 7)).to(torch.uint8)
