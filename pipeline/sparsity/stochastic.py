"""Stochastic rounding to bf16 that does not depend on how a weight is sharded.

    bf16(x) = truncate(bits(x) + r),  r uniform in [0, 2^16)

rounds x to one of its two neighbours, and to the larger one in magnitude with the probability of
its distance to the smaller one, so it is unbiased: E[bf16(x)] = x (Gupta et al. 2015,
arXiv 1502.02551, section 3). A number that is representable stays what it is. Without it an
accumulator in bf16 stops moving once an addend is below 1/512 of it.

r comes from no generator with a state but from a counter, the element's offset in the whole weight,
and a key, a digest of the weight's name and the step (the idea of Salmon et al. 2011, "Parallel
random numbers: as easy as 1, 2, 3"). Any rank that holds the element draws the same r:

    r = upper half of (offset x 0x9E3779B1 + key) mod 2^32

For each element r is uniform and independent from step to step, because the key is; that is what
an unbiased sum over steps needs. Within one step neighbours are spread evenly (a Weyl sequence)
rather than independent, which costs three operations an element instead of ten.
"""

import hashlib

import torch
from torch import Tensor

MULTIPLIER = 0x9E3779B1  # the odd number next to 2^32 / golden ratio


def rounding_key(name: str, step: int, stream: str) -> int:
    """32 bits that differ for every weight, step and use within a step."""
    digest = hashlib.blake2b(f"{name}\0{step}\0{stream}".encode(), digest_size=4)
    return int.from_bytes(digest.digest(), "little")


def phases(num_elements: int, device: torch.device) -> Tensor:
    """int32 (n,): 0, 1, 2, ... times the multiplier, modulo 2^32."""
    counter = torch.arange(num_elements, dtype=torch.int32, device=device)
    return counter.mul_(_signed(MULTIPLIER))


def random_bits(out: Tensor, phase: Tensor, key: int, offset: int) -> Tensor:
    """16 random bits for each of n elements.

    Args:
        out: int32 (n,), overwritten with values in [0, 2^16).
        phase: int32 (n,), from `phases`.
        key: From `rounding_key`.
        offset: Of the first element in the whole weight.

    Returns:
        `out`.
    """
    torch.add(phase, _signed(key + offset * MULTIPLIER), out=out)
    return out.bitwise_right_shift_(16).bitwise_and_(0xFFFF)


def round_to_bf16(target: Tensor, value: Tensor, bits: Tensor) -> None:
    """Writes a stochastically rounded value.

    Args:
        target: bf16 (n,), overwritten.
        value: fp32 (n,), finite; destroyed.
        bits: int32 (n,), from `random_bits`.
    """
    value.view(torch.int32).add_(bits).bitwise_and_(-(2**16))
    target.copy_(value)


def _signed(number: int) -> int:
    """A number modulo 2^32 as the signed one that an int32 tensor takes."""
    return (number + 2**31) % 2**32 - 2**31
