"""The engine on one shape: weights, gradients, a fused AdamW, masks and movement, all random.

Only prunable weights are there, so that nothing dilutes what the engine costs. Weights, gradients
and movement are normal, so that no score is tied; the masks are magnitude masks at `SPARSITY`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from launch.benchmarks.shapes import Shape
from pipeline.sparsity.hooks import SparsityHooks
from pipeline.sparsity.movement import MovementRule
from pipeline.sparsity.shards import ShardedWeights, plain_shards
from pipeline.sparsity.state import SparsityState
from pipeline.sparsity.threshold import masks_by_score

SPARSITY = 0.9
LEARNING_RATE = 1e-5


@dataclass
class Workbench:
    """What the measurements of one shape share."""

    weights: ShardedWeights
    masks: dict[str, Tensor]
    """Name to bool of the weight's shape, True = kept."""
    device: torch.device

    @property
    def num_weights(self) -> int:
        """Prunable weights."""
        return sum(shape.numel() for shape in self.weights.shapes.values())

    def state(self, dtype: torch.dtype = torch.float32) -> SparsityState:
        """Masks with movement that looks observed."""
        state = SparsityState.from_masks(self.masks, self.weights, dtype)
        for movement in state.movement.values():
            movement.normal_()
        return state

    def bind(self, rule: MovementRule, state: SparsityState) -> SparsityHooks:
        """The engine's hooks on the optimizer."""
        return SparsityHooks(self.weights, state, rule)


def build_workbench(shape: Shape) -> Workbench:
    """Random weights of a shape, and one optimizer step behind them."""
    device = torch.device(shape.device)
    torch.manual_seed(0)
    parameters = {}
    for name, size in shape.prunable_shapes().items():
        parameters[name] = nn.Parameter(torch.randn(size, device=device) * 0.02)
        parameters[name].grad = torch.randn(size, device=device) * 1e-3
    optimizer = torch.optim.AdamW(parameters.values(), lr=LEARNING_RATE, fused=True)
    optimizer.step()
    sizes = {name: parameter.detach().abs() for name, parameter in parameters.items()}
    masks = masks_by_score(sizes, SPARSITY, "matrix")
    return Workbench(plain_shards(parameters, optimizer), masks, device)
