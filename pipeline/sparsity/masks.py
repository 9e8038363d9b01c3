"""Masks on disk: one bit a weight, by weight name, in safetensors."""

import json
import os
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

BIT_VALUES = (1, 2, 4, 8, 16, 32, 64, 128)


def pack_mask(mask: Tensor) -> Tensor:
    """Packs a bool mask of any shape into uint8 (ceil(numel / 8),), lowest bit first."""
    bits = mask.reshape(-1).to(torch.uint8)
    bits = torch.nn.functional.pad(bits, (0, -bits.numel() % 8)).reshape(-1, 8)
    return (bits * torch.tensor(BIT_VALUES, dtype=torch.uint8, device=mask.device)).sum(
        1, dtype=torch.uint8
    )


def unpack_mask(packed: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """The inverse of `pack_mask`: bool of the given shape, True = kept."""
    bits = packed.unsqueeze(1).bitwise_and(
        torch.tensor(BIT_VALUES, dtype=torch.uint8, device=packed.device)
    )
    return bits.ne(0).reshape(-1)[: torch.Size(shape).numel()].reshape(shape)


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
