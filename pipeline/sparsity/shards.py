"""Where each prunable weight lives on this rank, as views into the fp32 tensors that are stepped.

A *shard* is a contiguous range of one weight's flattened elements. In plain torch and under DDP
the optimizer steps the parameters themselves, so a shard is the whole weight and every rank holds
all of them. Under ZeRO the optimizer steps flat fp32 partitions in which parts of many weights lie
side by side; `zero_shards.py` finds them there. Alignment padding belongs to no shard.

Everything that follows (movement, masks, thresholds) sees shards only and does not know how they
came to be. Layouts in which no such view exists are refused in `layouts.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from pipeline.sparsity.layouts import check_optimizer

FIRST_MOMENTS = ("exp_avg", "momentum_buffer")
"""What Adam, and SGD and Muon, call it."""


@dataclass(frozen=True, eq=False)
class Shard:
    """A contiguous range of one weight's flattened elements, as this rank's optimizer holds it."""

    name: str
    """The weight, as in the model's state dict."""
    shape: torch.Size
    """Shape of the whole weight."""
    offset: int
    """First element, in the flattened weight."""
    numel: int
    """Elements on this rank, at least 1."""
    flat: Tensor
    """fp32 tensor that the optimizer steps: the parameter itself, or ZeRO's flat partition."""
    start: int
    """First element, in `flat.view(-1)`."""

    @property
    def weight(self) -> Tensor:
        """(numel,) fp32 view of the master weight; writing to it changes what is trained."""
        return self.view(self.flat.data)

    @property
    def gradient(self) -> Tensor | None:
        """(numel,) view of the gradient; None outside the optimizer step, or if there is none."""
        return None if self.flat.grad is None else self.view(self.flat.grad)

    def view(self, flat: Tensor) -> Tensor:
        """(numel,) this shard's part of a tensor laid out like `flat`."""
        return flat.view(-1)[self.start : self.start + self.numel]


@dataclass
class ShardedWeights:
    """All shards of this rank, and what is needed to change them between two steps."""

    shards: dict[str, Shard]
    """Name to this rank's part, in model order; weights with no element here are absent."""
    shapes: dict[str, torch.Size]
    """Name to whole shape of every prunable weight, in model order, the same on every rank."""
    optimizer: torch.optim.Optimizer
    """The base optimizer, whose `step()` updates the flat tensors and fires the hooks."""
    group: ProcessGroup | None
    """Ranks that divide the elements among them; None where every rank holds all (plain, DDP)."""
    publish: Callable[[], None]
    """Copies fp32 values that were changed outside of a step to the weights that compute. Every
    rank of the group calls it."""

    param_group: dict[int, int] = field(default_factory=dict)
    """`id` of each flat tensor to the index of its parameter group. Taken from the optimizer where
    its groups list their tensors; under ZeRO-3 they do so only inside a step."""

    def __post_init__(self):
        """Completes `param_group`."""
        for index, group in enumerate(self.optimizer.param_groups):
            for flat in group["params"]:
                self.param_group.setdefault(id(flat), index)

    def moments(self, shard: Shard, key: str) -> Tensor | None:
        """(numel,) view of an optimizer moment (`exp_avg`, `exp_avg_sq`), None before it exists."""
        moment = self.optimizer.state.get(shard.flat, {}).get(key)
        return None if moment is None else shard.view(moment)

    def learning_rate(self, flat: Tensor) -> float:
        """The present learning rate of a flat tensor. To be called between steps."""
        return float(self.optimizer.param_groups[self.param_group[id(flat)]]["lr"])


def plain_shards(
    weights: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> ShardedWeights:
    """Shards where the optimizer steps the parameters themselves: one process, or DDP.

    Args:
        weights: Name to fp32 parameter, in model order.
        optimizer: Holds those very parameters.

    Raises:
        ValueError: The layout is refused, see `layouts.py`.
    """
    check_optimizer(optimizer, weights)
    return ShardedWeights(
        shards={
            name: Shard(name, weight.shape, 0, weight.numel(), weight, 0)
            for name, weight in weights.items()
        },
        shapes={name: weight.shape for name, weight in weights.items()},
        optimizer=optimizer,
        group=None,
        publish=lambda: None,
    )
