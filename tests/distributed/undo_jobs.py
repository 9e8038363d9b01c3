"""A refinement that is tried and taken back in the middle of training, inside a rank."""

from collections.abc import Iterator

import torch
from torch import Tensor

from pipeline.sparsity.hooks import SparsityHooks
from pipeline.sparsity.movement import MovementRule
from pipeline.sparsity.refine import RefinementRule, refine
from pipeline.sparsity.shards import ShardedWeights
from pipeline.sparsity.state import SparsityState
from pipeline.sparsity.undo import Undo
from tests.distributed.layouts import Training, training
from tests.distributed.shard_jobs import mask

RULE = RefinementRule(
    scope="model", score="mix", movement_weight=0.5, protect_steps=1, min_density=0.0
)
HOW = {"sparsity": 0.6, "regrow_fraction": 0.3, "step": 4}

Bits = dict[str, Tensor]
"""Name to a copy of a tensor's bits."""


def try_and_go_on(
    rank: int, world_size: int, layout: str, dtype: torch.dtype, tries: int
) -> tuple[list[str], list[str], int, Bits]:
    """Trains, refines `tries` times and takes it back, refines for good, trains on.

    Returns:
        What the first try changed, what differs once it is taken back, how many weights of all
        ranks it regrew, and all there is at the end.
    """
    changed, left, regrown, undo = [], [], 0, Undo()
    with training(rank, world_size, layout) as run:
        masks = {name: mask(name, shape) for name, shape in run.sharded.shapes.items()}
        state = SparsityState.from_masks(masks, run.sharded, dtype)
        hooks = SparsityHooks(run.sharded, state, MovementRule(half_life_steps=5.0, dtype=dtype))
        _train(run, hooks, range(3))
        refine(state, run.sharded, RULE, sparsity=0.5, regrow_fraction=0.2, step=3)
        _train(run, hooks, range(3, 4))
        _plant(run.sharded, state)
        before = everything(run, state)
        for _ in range(tries):
            regrown = refine(state, run.sharded, RULE, **HOW, undo=undo).regrown
            changed = changed or different(before, everything(run, state))
            undo.take_back(state, run.sharded)
            left = left or different(before, everything(run, state))
        refine(state, run.sharded, RULE, **HOW)
        _train(run, hooks, range(4, 6))
        hooks.remove()
        return changed, left, regrown, everything(run, state)


def different(before: Bits, after: Bits) -> list[str]:
    """Names whose bits differ."""
    return [name for name, bits in before.items() if not torch.equal(bits, after[name])]


def everything(run: Training, state: SparsityState) -> Bits:
    """Weights that compute, and masters, moments and state of this rank's shards.

    The padding between shards is left out: ZeRO-3 does not initialise it.
    """
    return dict(_everything(run, state))


def _everything(run: Training, state: SparsityState) -> Iterator[tuple[str, Tensor]]:
    for name, whole in run.whole_weights().items():
        yield f"computes {name}", _bits(whole)
    for name, shard in run.sharded.shards.items():
        yield f"master {name}", _bits(shard.weight)
        for key in ("exp_avg", "exp_avg_sq"):
            yield f"{key} {name}", _bits(run.sharded.moments(shard, key))
        yield f"mask {name}", state.masks[name].clone()
        yield f"movement {name}", _bits(state.movement[name])
        yield f"regrown {name}", state.regrown[name].indices.clone()
        yield f"regrown steps {name}", state.regrown[name].steps.clone()


def _bits(values: Tensor) -> Tensor:
    as_integers = {2: torch.int16, 4: torch.int32}[values.element_size()]
    return values.detach().clone().view(as_integers)


def _train(run: Training, hooks: SparsityHooks, steps: range) -> None:
    for step in steps:
        hooks.step = step
        run.step(step)


def _plant(weights: ShardedWeights, state: SparsityState) -> None:
    """A -0.0 among the kept weights of each shard: the lowest score, and pruned to 0.0."""
    for name, shard in weights.shards.items():
        kept = (state.masks[name][0] & 1).bool()
        shard.weight[0] = -0.0 if kept else 0.0
    weights.publish()
