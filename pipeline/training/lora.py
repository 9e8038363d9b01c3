"""Masks and movement of a LoRA student in any TRL trainer.

The frozen base weights have no place in the optimizer, so no hook on it could reach them. The mask
is bound to the adapted layers instead, whose forward pass computes with it, and movement is read
from the factors whenever the mask is refined (`sparsity/low_rank_refine.py`).

On one process and under DDP every rank has all masks and movement; under ZeRO the ranks share them.
Under ZeRO-3 an adapted layer is one leaf: DeepSpeed gathers W, A and B when its forward or backward
pass begins, and reduces the gradients of a leaf once that of its input is known. So the embeddings,
though frozen, hand on outputs that need a gradient, or the first layer would be reduced too early.

The factors that are read are those that compute: bf16 under DeepSpeed's bf16.

A checkpoint holds what TRL and DeepSpeed save of the adapters, masks and movement, and in
`lora.safetensors` the factors of the last refinement, from which the next movement counts.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch import distributed as dist
from transformers import Trainer

from pipeline.models.lora import MaskedLoraLinear, lora_layers
from pipeline.ranks import is_main
from pipeline.sparsity.low_rank_refine import (
    Factors,
    ProductMovement,
    product_shards,
    refine_products,
    whole_masks,
)
from pipeline.sparsity.refine import Refinement
from pipeline.sparsity.shards import ShardedWeights
from pipeline.sparsity.state import SparsityState
from pipeline.training.sparse_trainer import Sparsity, SparsityCallback

NOTE_FILE = "lora.safetensors"


class LoraSparsityCallback(SparsityCallback):
    """Binds masks to adapted layers, reads movement from their factors, refines on schedule."""

    movement: ProductMovement

    def __init__(self, trainer: Trainer, sparsity: Sparsity):
        """`trainer`: a `SparseTrainer` given a `lora_config`, before DeepSpeed takes it."""
        super().__init__(trainer, sparsity)
        model = trainer.accelerator.unwrap_model(trainer.model)
        self.layers = lora_layers(model)
        if _stage(trainer) == 3:
            from deepspeed.utils import set_z3_leaf_modules  # deepspeed takes seconds

            set_z3_leaf_modules(model, [MaskedLoraLinear])
            model.enable_input_require_grads()

    def find_weights(self) -> ShardedWeights:
        """An even cut of the adapted weights; all of them without ZeRO."""
        shapes = {
            name: torch.Size((layer.out_features, layer.in_features))
            for name, layer in self.layers.items()
        }
        optimizer = self.trainer.optimizer
        while hasattr(optimizer, "optimizer"):  # accelerate's wrapper, and DeepSpeed's
            optimizer = optimizer.optimizer
        group = dist.group.WORLD if _stage(self.trainer) else None
        return product_shards(shapes, optimizer, group, self.trainer.accelerator.device)

    def bind(self) -> None:
        """Gives every layer its mask, and notes where its factors are."""
        step, previous = self._load_note(self.step)
        self.movement = ProductMovement(
            self.weights, self.state, self.sparsity.movement, self._read, step, previous
        )
        self._share_masks()

    def on_step_begin(self, args, state, control, **kwargs):
        """Nothing is observed inside a step."""

    def refine(self, sparsity: float, regrow_fraction: float, step: int) -> Refinement:
        """Refines the masks and gives them to the layers."""
        done = refine_products(
            self.movement,
            self.sparsity.rule,
            sparsity=sparsity,
            regrow_fraction=regrow_fraction,
            step=step,
        )
        self._share_masks()
        return done

    def on_train_end(self, args, state, control, **kwargs):
        """Nothing was put on the optimizer."""

    def state_now(self) -> SparsityState:
        """With the movement of the steps since the last refinement."""
        return self.movement.observed(self.step)

    def save(self, checkpoint: Path) -> None:
        """Writes the factors from which the next movement counts, which all ranks have alike."""
        if not is_main():
            return
        tensors = {}
        for name, (lora_a, lora_b) in self.movement.previous.items():
            tensors |= {f"A/{name}": lora_a.cpu(), f"B/{name}": lora_b.cpu()}
        save_file(tensors, checkpoint / NOTE_FILE, {"step": str(self.movement.step)})

    def _load_note(self, step: int) -> tuple[int, dict[str, tuple[Tensor, Tensor]] | None]:
        path = self.sparsity.source / NOTE_FILE
        if not path.exists():  # the stage begins, with fresh adapters
            return step, None
        device = self.trainer.accelerator.device
        with safe_open(path, framework="pt") as file:
            previous = {
                name: tuple(file.get_tensor(f"{key}/{name}").to(device) for key in ("A", "B"))
                for name in self.layers
            }
            return int(file.metadata()["step"]), previous

    def _share_masks(self) -> None:
        for name, mask in whole_masks(self.weights, self.state):
            self.layers[name].mask = mask.to(self.trainer.accelerator.device)

    @contextmanager
    def _read(self, name: str) -> Iterator[Factors]:
        layer = self.layers[name]
        gathered = nullcontext()
        if hasattr(layer.factors[0], "ds_id"):
            import deepspeed  # takes seconds

            gathered = deepspeed.zero.GatheredParameters(list(layer.factors))
        with gathered:
            yield Factors(*layer.factors, layer.scale)


def _stage(trainer: Trainer) -> int:
    """DeepSpeed's ZeRO stage; 0 without DeepSpeed."""
    if not trainer.is_deepspeed_enabled:
        return 0
    return trainer.accelerator.state.deepspeed_plugin.zero_stage
