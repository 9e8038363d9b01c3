"""The engine inside `optimizer.step()`: observe movement, let the update pass, enforce the mask.

One pre-hook and one post-hook on the optimizer. After every step a pruned weight is exactly 0,
whatever momentum and weight decay do. Steps are not counted here: a hook may fire more than once
per training step under other optimizers.
"""

import torch
from torch import nn

from pipeline.sparsity.movement import decay_per_step, observe_kept, observe_pruned
from pipeline.sparsity.state import SparsityState


class SparsityHooks:
    """Binds a `SparsityState` to the optimizer that trains the weights."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        weights: dict[str, nn.Parameter],
        state: SparsityState,
        half_life_steps: float,
    ):
        """Registers both hooks.

        Args:
            optimizer: The optimizer that holds the weights themselves (no flat copies).
            weights: Name to fp32 parameter.
            state: Masks and movement by the same names.
            half_life_steps: After how many steps an observation counts half.

        Raises:
            ValueError: The optimizer does not train one of the weights.
        """
        self.state = state
        self.decay = decay_per_step(half_life_steps)
        groups = {
            id(parameter): group
            for group in optimizer.param_groups
            for parameter in group["params"]
        }
        missing = [name for name, weight in weights.items() if id(weight) not in groups]
        if missing:
            raise ValueError(f"the optimizer does not train {missing[0]} ({len(missing)} in all)")
        self.weights = {name: (weight, groups[id(weight)]) for name, weight in weights.items()}
        self.handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    def remove(self) -> None:
        """Takes both hooks off the optimizer."""
        for handle in self.handles:
            handle.remove()

    @torch.no_grad()
    def _before_step(self, optimizer, args, kwargs) -> None:
        for name, (weight, _) in self.weights.items():
            if weight.grad is not None:
                observe_kept(self.state.movement[name], weight, weight.grad, self.decay)

    @torch.no_grad()
    def _after_step(self, optimizer, args, kwargs) -> None:
        for name, (weight, group) in self.weights.items():
            mask = self.state.masks[name]
            observe_pruned(self.state.movement[name], weight, mask, group["lr"])
            weight.mul_(mask)
