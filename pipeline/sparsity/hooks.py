"""The engine inside `optimizer.step()`: observe movement, let the update pass, enforce the mask.

One pre-hook and one post-hook on the base optimizer, over this rank's shards. After every step a
pruned weight is exactly 0, whatever momentum and weight decay do; its moments are left alone, and
an elementwise optimizer never moves a kept weight by them. One that mixes the weights of a matrix
does (`training/muon.py`): from it the gradients of pruned weights are kept back once observed.
Nothing is communicated: the copy of fp32 weights to those that compute, which follows every step
anyway, carries the zeros.

Under ZeRO the hooks fire once for every parameter group or sub-group, so they look at the tensors
that the optimizer holds at that moment and never count steps. A weight without a gradient is not
stepped and not observed. A skipped step must not reach the optimizer: gradients that are not
finite would stay in the accumulator (DeepSpeed skips by itself; the trainer does otherwise).

Memory traffic a weight and step, `gradient` with `proposed` in fp32: w, g, S read and S written
before the update, w and S read and written after it, 1 bit of mask: 32 bytes, beside 28 for a
fused AdamW. Read in pieces that stay in the cache (`chunks.py`).
"""

from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from pipeline.sparsity import movement as observations
from pipeline.sparsity.chunks import Chunks
from pipeline.sparsity.movement import MovementRule
from pipeline.sparsity.shards import Shard, ShardedWeights
from pipeline.sparsity.state import SparsityState
from pipeline.sparsity.stochastic import rounding_key


class SparsityHooks:
    """Binds a `SparsityState` to the optimizer that trains the weights."""

    def __init__(
        self,
        weights: ShardedWeights,
        state: SparsityState,
        rule: MovementRule,
        *,
        zero_pruned_gradients: bool = False,
        timed: Callable[[], AbstractContextManager] = nullcontext,
    ):
        """Zeroes what the mask prunes, everywhere, and registers both hooks.

        Every rank calls it, because the zeros are published.

        Args:
            weights: This rank's shards.
            state: Their masks and movement; the movement is observed in place.
            rule: What is observed.
            zero_pruned_gradients: Whether the optimizer gets gradients of kept weights alone. What
                it then proposes for pruned ones says nothing of them.
            timed: Entered around all that a hook does.

        Raises:
            ValueError: The state does not fit the shards, or its movement not the rule.
        """
        _check_fit(weights, state, rule)
        self.state = state
        self.rule = rule
        self.zero_pruned_gradients = zero_pruned_gradients
        self._timed = timed
        self.step = 0
        """The trainer's step, which the trainer sets. Only stochastic rounding reads it."""
        self._shards: dict[int, list[Shard]] = defaultdict(list)
        self._chunks: dict[torch.device, Chunks] = {}
        for shard in weights.shards.values():
            self._shards[id(shard.flat)].append(shard)
        for device in {shard.flat.device for shard in weights.shards.values()}:
            sizes = [s.numel for s in weights.shards.values() if s.flat.device == device]
            self._chunks[device] = Chunks(device, max(sizes), rule.dtype)
        self._zero_pruned(weights)
        self._handles = [
            weights.optimizer.register_step_pre_hook(self._before_step),
            weights.optimizer.register_step_post_hook(self._after_step),
        ]

    def remove(self) -> None:
        """Takes both hooks off the optimizer."""
        for handle in self._handles:
            handle.remove()

    @torch.no_grad()
    def _before_step(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        with self._timed():
            for group in optimizer.param_groups:
                for flat in group["params"]:
                    for shard in self._observed(flat):
                        self._observe_before(shard)

    @torch.no_grad()
    def _after_step(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        with self._timed():
            for group in optimizer.param_groups:
                for flat in group["params"]:
                    for shard in self._observed(flat):
                        self._observe_after(shard, float(group["lr"]))

    def _observed(self, flat: Tensor) -> list[Shard]:
        return [] if flat.grad is None else self._shards.get(id(flat), [])

    def _observe_before(self, shard: Shard) -> None:
        rule, chunks = self.rule, self._chunks[shard.flat.device]
        decay, key = rule.decay, self._rounding_key(shard, "before")
        for offset, weight, gradient, stored, mask in self._pieces(shard):
            movement = chunks.load(stored)
            movement.mul_(decay)
            if rule.kept == "gradient":
                observations.observe_gradient(movement, weight, gradient)
            elif rule.kept == "squared":
                observations.observe_squared(movement, chunks.product(gradient, weight))
            else:
                observations.subtract_magnitude(movement, chunks.magnitude(weight))
            if rule.pruned == "negative_gradient":
                pruned = chunks.pruned_part(gradient, mask)
                observations.observe_negative_gradient(movement, pruned)
            chunks.store(stored, movement, key, offset)
            if self.zero_pruned_gradients:
                chunks.zero_pruned(gradient, mask)

    def _observe_after(self, shard: Shard, learning_rate: float) -> None:
        rule, chunks = self.rule, self._chunks[shard.flat.device]
        key = self._rounding_key(shard, "after")
        for offset, weight, _, stored, mask in self._pieces(shard):
            proposed = chunks.zero_pruned(weight, mask)
            if rule.pruned == "proposed":
                movement = chunks.load(stored)
                observations.observe_proposed(movement, proposed, learning_rate)
                chunks.store(stored, movement, key, offset)
            if rule.kept == "displacement":
                observations.add_magnitude(stored, chunks.magnitude(weight))

    def _pieces(self, shard: Shard):
        return self._chunks[shard.flat.device].pieces(
            shard.offset,
            shard.weight,
            shard.gradient,
            self.state.movement[shard.name],
            self.state.masks[shard.name],
        )

    def _rounding_key(self, shard: Shard, stream: str) -> int:
        return rounding_key(shard.name, self.step, stream)

    @torch.no_grad()
    def _zero_pruned(self, weights: ShardedWeights) -> None:
        for shard in weights.shards.values():
            chunks, mask = self._chunks[shard.flat.device], self.state.masks[shard.name]
            pieces = zip(shard.weight.split(chunks.size), mask.split(chunks.size // 8), strict=True)
            for weight, packed in pieces:
                chunks.zero_pruned(weight, packed)
        weights.publish()


def _check_fit(weights: ShardedWeights, state: SparsityState, rule: MovementRule) -> None:
    """Refuses a state of other shards before a step reads it."""
    for name, shard in weights.shards.items():
        if name not in state.movement or state.movement[name].shape != (shard.numel,):
            raise ValueError(f"state: {name}: no movement of this rank's {shard.numel} elements")
        if state.movement[name].dtype != rule.dtype:
            raise ValueError(
                f"movement.dtype: {rule.dtype}, but the state of {name} holds "
                f"{state.movement[name].dtype}; set that"
            )
        if state.masks[name].shape != (-(-shard.numel // 8),):
            raise ValueError(f"state: {name}: no packed mask of {shard.numel} elements")
