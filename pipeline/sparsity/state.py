"""What the engine knows of each prunable weight: its mask and its movement, by weight name."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from pipeline.sparsity.masks import load_masks, save_masks

MASK_FILE = "mask.safetensors"
MOVEMENT_FILE = "movement.safetensors"


@dataclass
class SparsityState:
    """Masks and movement of one model; tensors have the weight's shape and device."""

    masks: dict[str, Tensor]
    """Name to bool mask, True = kept."""
    movement: dict[str, Tensor]
    """Name to fp32: the accumulated -g*w of a kept weight, the accumulated proposed update in
    units of the learning rate of a pruned one. Zeroed when the weight changes side."""
    regrown_step: dict[str, Tensor]
    """Name to int32: the step at which a weight last regrew, -1 for never."""

    @classmethod
    def from_masks(cls, masks: dict[str, Tensor]) -> "SparsityState":
        """Masks with nothing observed yet."""
        return cls(
            masks=masks,
            movement={
                name: torch.zeros(mask.shape, device=mask.device) for name, mask in masks.items()
            },
            regrown_step={
                name: torch.full(mask.shape, -1, dtype=torch.int32, device=mask.device)
                for name, mask in masks.items()
            },
        )

    @property
    def sparsity(self) -> float:
        """Fraction of pruned weights, in [0, 1]."""
        total = sum(mask.numel() for mask in self.masks.values())
        return 1.0 - sum(int(mask.sum()) for mask in self.masks.values()) / total

    def save(self, folder: Path) -> None:
        """Writes `mask.safetensors` and `movement.safetensors`, each beside its target first."""
        save_masks(folder / MASK_FILE, self.masks)
        tensors = {}
        for name in self.masks:
            tensors[f"movement/{name}"] = self.movement[name].cpu()
            tensors[f"regrown_step/{name}"] = self.regrown_step[name].cpu()
        temporary = folder / f"{MOVEMENT_FILE}.tmp"
        save_file(tensors, temporary)
        os.replace(temporary, folder / MOVEMENT_FILE)

    @classmethod
    def load(cls, folder: Path) -> "SparsityState":
        """Reads what `save` wrote; without a movement file nothing was observed yet."""
        state = cls.from_masks(load_masks(folder / MASK_FILE))
        if (folder / MOVEMENT_FILE).exists():
            with safe_open(folder / MOVEMENT_FILE, framework="pt") as file:
                for name in state.masks:
                    state.movement[name] = file.get_tensor(f"movement/{name}")
                    state.regrown_step[name] = file.get_tensor(f"regrown_step/{name}")
        return state

    def to(self, device: torch.device) -> "SparsityState":
        """Moves every tensor to a device, in place."""
        for tensors in (self.masks, self.movement, self.regrown_step):
            for name, tensor in tensors.items():
                tensors[name] = tensor.to(device)
        return self
