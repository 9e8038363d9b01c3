"""What the ranks do in `test_shards.py`, and the checker that looks at all ranks together."""

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from pipeline.sparsity.hooks import SparsityHooks
from pipeline.sparsity.movement import MovementRule
from pipeline.sparsity.shards import ShardedWeights, plain_shards
from pipeline.sparsity.state import SparsityState
from pipeline.sparsity.zero_shards import zero_shards
from tests.distributed.layouts import (
    NAN_BATCH,
    SmallModel,
    batch,
    deepspeed_engine,
    matrices,
    training,
)


@dataclass
class RankView:
    """What one rank holds and sees."""

    parts: dict[str, tuple[int, Tensor]]
    """Name to first element and fp32 values of the shard, or of something laid out like it."""
    whole: dict[str, Tensor]
    """Name to the weight that computes, whole."""
    is_divided: bool
    """Whether the ranks divide the elements, or each holds all."""
    outputs: Tensor | None = None
    """Of a forward pass of this rank, by the engine."""


def check_tiling(views: list[RankView]) -> None:
    """Every element of every weight lies in exactly one shard, with the weight's own value.

    Args:
        views: One a rank; where the elements are not divided each rank is checked alone.

    Raises:
        AssertionError: Names the weight.
    """
    for group in [views] if views[0].is_divided else [[view] for view in views]:
        for name, whole in group[0].whole.items():
            count = torch.zeros(whole.numel(), dtype=torch.int)
            tiled = torch.full((whole.numel(),), torch.nan)
            for offset, values in (view.parts[name] for view in group if name in view.parts):
                end = offset + values.numel()
                assert 0 <= offset < end <= whole.numel(), f"{name}: [{offset}, {end}) is outside"
                count[offset:end] += 1
                tiled[offset:end] = values
            assert (count == 1).all(), f"{name}: elements are held {count.unique().tolist()} times"
            difference = (tiled.to(whole.dtype) != whole.reshape(-1)).sum()
            assert difference == 0, f"{name}: {int(difference)} elements differ"
    for view in views[1:]:
        for name, whole in view.whole.items():
            assert torch.equal(whole, views[0].whole[name]), f"{name}: ranks compute differently"


def join(views: list[RankView]) -> dict[str, Tensor]:
    """Name to flat whole tensor, put together from the parts."""
    views = views if views[0].is_divided else views[:1]
    joined = {name: torch.zeros(whole.numel()) for name, whole in views[0].whole.items()}
    for view in views:
        for name, (offset, values) in view.parts.items():
            joined[name][offset : offset + values.numel()] = values
    return joined


def read(rank: int, world_size: int, layout: str, start_shift: int = 0) -> RankView:
    """The shards of a fresh model. `start_shift` moves one view, as an off-by-one would."""
    with training(rank, world_size, layout) as run:
        if start_shift:
            name, shard = next((n, s) for n, s in run.sharded.shards.items() if s.numel > 2)
            shard = replace(shard, start=shard.start + start_shift, numel=shard.numel - 1)
            run.sharded.shards[name] = shard
        assert list(run.sharded.shapes.items()) == [
            (name, torch.Size(getattr(w, "ds_shape", w.shape))) for name, w in run.weights.items()
        ]
        return RankView(_values(run.sharded), run.whole_weights(), _is_divided(run.sharded))


def write(rank: int, world_size: int, layout: str) -> RankView:
    """Three steps, then every rank fills its shards with `ramp` and publishes; then a forward."""
    with training(rank, world_size, layout) as run:
        for index in range(3):
            run.step(index)
        for position, name in enumerate(run.sharded.shapes):
            if name in run.sharded.shards:
                shard = run.sharded.shards[name]
                shard.weight.copy_(ramp(position, shard.offset, shard.numel))
        run.sharded.publish()
        whole = run.whole_weights()
        with torch.no_grad():
            outputs = run.engine(batch(0)[0].to(run.dtype)).float()
        run.step(3)  # publishing leaves the engine able to train
        return RankView(_values(run.sharded), whole, _is_divided(run.sharded), outputs)


def ramp(position: int, offset: int, numel: int) -> Tensor:
    """Values that tell weight and element apart, most of them not representable in bf16."""
    return (position + 1) * 0.1 + torch.arange(offset, offset + numel) * 1e-4


def train(
    rank: int, world_size: int, layout: str, num_steps: int, rule: MovementRule
) -> tuple[RankView, RankView]:
    """Trains under a mask. Returns the weights and the movement afterwards.

    Raises:
        AssertionError: A pruned weight is not 0 after some step.
    """
    with training(rank, world_size, layout) as run:
        masks = {name: mask(name, shape) for name, shape in run.sharded.shapes.items()}
        state = SparsityState.from_masks(masks, run.sharded, rule.dtype)
        hooks = SparsityHooks(run.sharded, state, rule)
        for index in range(num_steps):
            hooks.step = index
            run.step(index)
            for name, whole in run.whole_weights().items():
                assert not whole[~masks[name]].any(), f"{name}, step {index}: a zero is gone"
        whole = run.whole_weights()
        divided = _is_divided(run.sharded)
        moved = {
            name: (run.sharded.shards[name].offset, movement.float())
            for name, movement in state.movement.items()
        }
        learning_rates = [run.sharded.learning_rate(s.flat) for s in run.sharded.shards.values()]
        assert set(learning_rates) == {1e-2}
        hooks.remove()
        return RankView(_values(run.sharded), whole, divided), RankView(moved, whole, divided)


def skip(rank: int, world_size: int, layout: str) -> bool:
    """Whether gradients that are not finite leave weights and movement alone."""
    with training(rank, world_size, layout) as run:
        masks = {name: mask(name, shape) for name, shape in run.sharded.shapes.items()}
        state = SparsityState.from_masks(masks, run.sharded)
        SparsityHooks(run.sharded, state, MovementRule(half_life_steps=5.0))
        run.step(0)
        weights, movement = run.whole_weights(), copy.deepcopy(state.movement)
        run.step(NAN_BATCH)
        same = all(torch.equal(w, weights[name]) for name, w in run.whole_weights().items())
        same &= all(torch.equal(m, movement[name]) for name, m in state.movement.items())
        run.step(1)
        assert any(not torch.equal(m, movement[name]) for name, m in state.movement.items())
        return same


def refuse(rank: int, world_size: int, config: dict[str, Any], frozen: bool = False) -> str:
    """What `zero_shards` says to an engine it cannot serve."""
    model = SmallModel()
    model.layers[3].weight.requires_grad_(not frozen)
    weights = matrices(model)
    engine = deepspeed_engine(model, world_size, config)
    try:
        zero_shards(engine, weights)
    except ValueError as error:
        return str(error)
    finally:
        engine.destroy()
    return "served"


def refuse_fsdp(rank: int, world_size: int) -> str:
    """What `plain_shards` says to weights that torch has sharded."""
    model = fully_shard(SmallModel(), mesh=init_device_mesh("cpu", (world_size,)))
    try:
        plain_shards(matrices(model), torch.optim.AdamW(model.parameters()))
    except ValueError as error:
        return str(error)
    return "served"


def mask(name: str, shape: torch.Size) -> Tensor:
    """A bool mask that prunes about half of a weight, the same on every rank."""
    generator = torch.Generator().manual_seed(sum(name.encode()))
    return torch.rand(shape, generator=generator) > 0.5


def _values(sharded: ShardedWeights) -> dict[str, tuple[int, Tensor]]:
    return {name: (s.offset, s.weight.clone()) for name, s in sharded.shards.items()}


def _is_divided(sharded: ShardedWeights) -> bool:
    return sharded.group is not None
