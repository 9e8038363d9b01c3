"""A small model and every way of training it that the engine serves, built inside a rank."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from pipeline.sparsity.shards import ShardedWeights, plain_shards
from pipeline.sparsity.zero_shards import zero_shards

LEARNING_RATE, WEIGHT_DECAY, MAX_NORM = 1e-2, 0.1, 1.0
BATCH_SIZE = 12  # over all ranks; divisible by 1, 2 and 3
NAN_BATCH = -1  # the recorded batch whose last row, on the last rank, is not finite

OFFLOAD = {"offload_optimizer": {"device": "cpu", "pin_memory": False}}
OFFLOAD_ALL = OFFLOAD | {"offload_param": {"device": "cpu", "pin_memory": False}}
BF16 = {"bf16": {"enabled": True}}
FP32_ACCUMULATION = BF16 | {"data_types": {"grad_accum_dtype": "fp32"}}

LAYOUTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "ddp": {},
    "zero0": {"zero_optimization": {"stage": 0}},
    "zero1": {"zero_optimization": {"stage": 1}},
    "zero1-bf16": {"zero_optimization": {"stage": 1}, **BF16},
    "zero1-bf16-fp32-accumulation": {"zero_optimization": {"stage": 1}, **FP32_ACCUMULATION},
    "zero1-offload": {"zero_optimization": {"stage": 1, **OFFLOAD}},
    "zero2": {"zero_optimization": {"stage": 2}},
    "zero2-bf16": {"zero_optimization": {"stage": 2}, **BF16},
    "zero2-reordered": {"zero_optimization": {"stage": 2, "round_robin_gradients": True}},
    "zero2-aligned": {"zero_optimization": {"stage": 2, "parameter_alignment": True}},
    "zero2-bf16-offload": {"zero_optimization": {"stage": 2, **OFFLOAD}, **BF16},
    "zero2-checkpointing": {"zero_optimization": {"stage": 2}},
    "zero3": {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}},
    "zero3-persistent": {"zero_optimization": {"stage": 3}},
    "zero3-bf16": {
        "zero_optimization": {
            "stage": 3,
            "stage3_param_persistence_threshold": 20,
            "sub_group_size": 40,
        },
        **BF16,
    },
    "zero3-sub-groups": {"zero_optimization": {"stage": 3, "sub_group_size": 40}},
    "zero3-offload": {"zero_optimization": {"stage": 3, **OFFLOAD}},
    "zero3-bf16-offload-all": {
        "zero_optimization": {
            "stage": 3,
            "stage3_param_persistence_threshold": 0,
            **OFFLOAD_ALL,
        },
        **BF16,
    },
    "zero3-checkpointing": {
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}
    },
}


class SmallModel(nn.Module):
    """Odd sizes, so that no cut falls evenly; two weights with fewer elements than some worlds."""

    def __init__(self):
        """The same weights on every rank."""
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        sizes = ((7, 13), (13, 5), (5, 2), (2, 2), (2, 1), (1, 1), (1, 3))
        self.layers = nn.ModuleList(nn.Linear(a, b, bias=b != 1) for a, b in sizes)
        self.checkpointing = False
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, 7) to (B, 3)."""
        for layer in self.layers:
            if self.checkpointing:
                hidden = checkpoint(_apply, layer, hidden, use_reentrant=False)
            else:
                hidden = _apply(layer, hidden)
        return hidden


def _apply(layer: nn.Linear, hidden: Tensor) -> Tensor:
    return F.softplus(layer(hidden))


@dataclass
class Training:
    """One model in training, whatever the layout."""

    model: nn.Module
    weights: dict[str, nn.Parameter]
    """Every matrix, by name."""
    sharded: ShardedWeights
    engine: Any
    """DeepSpeed's or DDP's wrapper, or the model itself."""
    optimizer: torch.optim.Optimizer | None
    """None: the engine steps."""
    rank: int
    world_size: int

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights that compute."""
        return next(iter(self.weights.values())).dtype

    def step(self, index: int) -> None:
        """One optimizer step on this rank's part of recorded batch number `index`."""
        inputs, targets = (part.chunk(self.world_size)[self.rank] for part in batch(index))
        outputs = self.engine(inputs.to(self.dtype))
        loss = F.mse_loss(outputs.float(), targets)
        if self.optimizer is None:
            self.engine.backward(loss)
            self.engine.step()
            return
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), MAX_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def whole_weights(self) -> dict[str, Tensor]:
        """The weights that compute, as this rank sees them, whole."""
        weights = self.weights
        if not any(hasattr(weight, "ds_id") for weight in weights.values()):
            return {name: weight.detach().clone() for name, weight in weights.items()}
        with deepspeed.zero.GatheredParameters(list(weights.values())):
            return {name: weight.detach().clone() for name, weight in weights.items()}


def batch(index: int) -> tuple[Tensor, Tensor]:
    """Recorded inputs (12, 7) and targets (12, 3)."""
    generator = torch.Generator().manual_seed(100 + index)
    inputs = torch.randn(BATCH_SIZE, 7, generator=generator)
    if index == NAN_BATCH:
        inputs[-1] = torch.nan
    return inputs, torch.randn(BATCH_SIZE, 3, generator=generator)


def matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name to weight matrix. To be called before DeepSpeed: ZeRO-3 leaves parameters no shape."""
    return {name: p for name, p in model.named_parameters() if p.ndim == 2}


def adam_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Two parameter groups, as transformers makes them: biases without weight decay."""
    return [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]


@contextmanager
def training(rank: int, world_size: int, layout: str) -> Iterator[Training]:
    """Builds the small model in a layout of `LAYOUTS` and takes it down again."""
    model = SmallModel()
    model.checkpointing = layout.endswith("checkpointing")
    with train_as(layout, model, matrices(model), rank, world_size) as run:
        yield run


@contextmanager
def train_as(
    layout: str,
    model: nn.Module,
    weights: dict[str, nn.Parameter],
    rank: int,
    world_size: int,
    max_norm: float = MAX_NORM,
) -> Iterator[Training]:
    """Puts a model into a layout of `LAYOUTS`, with `weights` as its prunable ones.

    DeepSpeed clips gradients to `max_norm`, 0 for not at all; elsewhere the caller does.
    """
    if layout in ("plain", "ddp"):
        engine = nn.parallel.DistributedDataParallel(model) if layout == "ddp" else model
        optimizer = torch.optim.AdamW(adam_groups(model), lr=LEARNING_RATE)
        sharded = plain_shards(weights, optimizer)
        yield Training(model, weights, sharded, engine, optimizer, rank, world_size)
        return
    config = LAYOUTS[layout] | {"gradient_clipping": max_norm}
    engine = deepspeed_engine(model, world_size, config)
    try:
        sharded = zero_shards(engine, weights)
        yield Training(model, weights, sharded, engine, None, rank, world_size)
    finally:
        engine.destroy()


def deepspeed_engine(
    model: nn.Module, world_size: int, config: dict[str, Any]
) -> deepspeed.DeepSpeedEngine:
    """A DeepSpeed engine with AdamW; the base optimizer is CPU Adam where states are offloaded."""
    offloads = "offload_optimizer" in config["zero_optimization"]
    adam = deepspeed.ops.adam.DeepSpeedCPUAdam if offloads else torch.optim.AdamW
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=adam(adam_groups(model), lr=LEARNING_RATE),
        config={
            "train_batch_size": BATCH_SIZE,
            "train_micro_batch_size_per_gpu": BATCH_SIZE // world_size,
            "gradient_clipping": MAX_NORM,
            **config,
        },
    )
    return engine
