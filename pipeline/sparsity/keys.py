"""32-bit keys: integers in the order of fp32 values, and a hash that orders what is equal.

- The bits of an IEEE 754 number, read as an integer, are in the order of the numbers when the sign
  bit is flipped for positive and all bits for negative ones (Herf 2001, "Radix tricks").
- The hash of an element depends on its weight's name and its place in the whole weight, never on
  the rank that holds it. For one name it is a bijection of the place, so two elements of a weight
  never share a hash: xor-shifts and odd factors can be undone (the "lowbias32" constants of
  Wellons 2018, "Prospecting for Hash Functions").

Keys are int64 tensors with values in [0, 2^32): torch has no full set of unsigned operations.
"""

import hashlib
import struct

import torch
from torch import Tensor

KEY_BITS = 32
MAX_ELEMENTS = 2**KEY_BITS
"""Elements of one weight, for which the hash is a bijection."""

_MASK = 2**KEY_BITS - 1
_SIGN = 2**31


def order_keys(values: Tensor) -> Tensor:
    """Keys in the order of the values. -0.0 counts as 0.0; NaN has no place.

    Args:
        values: (n,) fp32.

    Returns:
        int64 (n,) in [0, 2^32).
    """
    bits = (values + 0.0).view(torch.int32)  # turns -0.0 into 0.0
    return (bits ^ ((bits >> 31) & (_SIGN - 1))).long() + _SIGN


def key_value(key: int) -> float:
    """The fp32 value of a key, as a Python float; infinite where the key lies beyond all values."""
    bits = key ^ _SIGN if key >= _SIGN else key ^ _MASK
    value = struct.unpack("<f", struct.pack("<I", bits))[0]
    if value != value:
        return float("inf") if key >= _SIGN else float("-inf")
    return value


def hash_keys(name: str, places: Tensor) -> Tensor:
    """Hashes that order elements with nothing else to tell them apart.

    Args:
        name: The weight's name.
        places: int64 (n,) positions in the whole flattened weight, below 2^32.

    Returns:
        int64 (n,) in [0, 2^32); distinct for distinct places of one name.
    """
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
    keys = places ^ seed
    keys = ((keys ^ (keys >> 16)) * 0x7FEB352D) & _MASK
    keys = ((keys ^ (keys >> 15)) * 0x846CA68B) & _MASK
    return keys ^ (keys >> 16)
