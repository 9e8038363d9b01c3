"""Masks in one bit a weight: packed in memory beside each shard, and on disk by weight name."""

import json
import os
from functools import cache
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

BIT_VALUES = (1, 2, 4, 8, 16, 32, 64, 128)
GATHER_BITS = 0x0102040810204080


def pack_mask(mask: Tensor) -> Tensor:
    """Packs a bool mask of any shape into uint8 (ceil(numel / 8),), lowest bit first.

    Eight bools are read as one little-endian word; the product moves bit i to place 56 + i.
    """
    flags = torch.nn.functional.pad(mask.reshape(-1), (0, -mask.numel() % 8))
    return ((flags.view(torch.int64) * GATHER_BITS) >> 56).to(torch.uint8)


def unpack_mask(packed: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """The inverse of `pack_mask`: bool of the given shape, True = kept."""
    bits = byte_table(packed.device, 1, 0).index_select(0, packed.int()).view(torch.bool)
    return bits[: torch.Size(shape).numel()].reshape(shape)


@cache
def byte_table(device: torch.device, kept: int, pruned: int) -> Tensor:
    """What each packed byte means: int64 (256,), whose 8 bytes are its 8 bits, in order.

    One look-up a byte is the fastest way to unpack that torch offers on a CPU.

    Args:
        device: Where the table lives.
        kept: The byte, as a signed number, that stands for a set bit.
        pruned: The one that stands for a clear bit.
    """
    values = torch.arange(256).unsqueeze(1).bitwise_and(torch.tensor(BIT_VALUES))
    table = torch.where(values.ne(0), kept, pruned).to(torch.int8)
    return table.view(torch.int64).reshape(256).to(device)


def save_masks(path: Path, masks: dict[str, Tensor]) -> None:
    """Writes masks beside the target, then renames: the file is either old or whole."""
    shapes = {name: list(mask.shape) for name, mask in masks.items()}
    temporary = path.with_name(path.name + ".tmp")
    save_file(
        {name: pack_mask(mask).cpu() for name, mask in masks.items()},
        temporary,
        metadata={"shapes": json.dumps(shapes)},
    )
    os.replace(temporary, path)


def load_masks(path: Path) -> dict[str, Tensor]:
    """Reads what `save_masks` wrote: name to bool mask, True = kept."""
    with safe_open(path, framework="pt") as file:
        shapes = json.loads(file.metadata()["shapes"])
        return {name: unpack_mask(file.get_tensor(name), shapes[name]) for name in file.keys()}
