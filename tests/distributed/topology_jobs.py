"""Runs that are saved under one layout and resumed under another, inside a rank."""

from pathlib import Path
from types import SimpleNamespace

import torch
from torch import distributed as dist
from transformers import TrainerCallback

from pipeline.sparsity.masks import unpack_mask
from pipeline.training.trained_shards import trained_shards
from tests.distributed.grpo_jobs import deepspeed_arguments, forget_engine
from tests.unit.resumable_runs import run

STOP = 3
"""In the middle of a generation batch of grpo."""


def train(rank, world_size, layout, stage, folder, checkpoint=None, **arguments):
    """Trains a stage of `resumable_runs` under a layout.

    Returns:
        On rank 0 `state` (whole tensors and numbers by name, after `STOP` or as they were loaded),
        `weights` and `refinements` at the end, and `changes`. None elsewhere.
    """
    folder, seen = Path(folder), SimpleNamespace(state=None, trainer=None)

    class Keep(TrainerCallback):
        def __init__(self, trainer):
            seen.trainer = trainer

        def on_train_begin(self, args, state, control, **kwargs):
            if checkpoint is not None:
                seen.state = whole_state(seen.trainer)

        def on_step_end(self, args, state, control, **kwargs):
            if checkpoint is None and state.global_step == STOP:
                seen.state = whole_state(seen.trainer)

    folder.mkdir(parents=True, exist_ok=True)  # also where this rank is the first
    forget_engine()
    found, refinements, _ = run(
        stage,
        folder / layout,
        folder / f"prune-{rank}",
        None if checkpoint is None else Path(checkpoint),
        world_size=world_size,
        callbacks=[Keep],
        **({"save_steps": STOP} if checkpoint is None else {"save_strategy": "no"}),
        **deepspeed_arguments(layout),
        **arguments,
    )
    forget_engine()
    if rank != 0:
        return None
    weights = {name: tensor for name, tensor in found.items() if name.startswith("weight ")}
    return {
        "state": seen.state,
        "weights": weights,
        "refinements": refinements,
        "changes": list(seen.trainer.topology_changes),
    }


def whole_state(trainer):
    """All that a run goes on from, gathered: weights, moments, masks, movement, and rates."""
    sharded, engine = trained_shards(trainer), trainer.sparsity
    parts = []
    for shard in sharded.shards.values():
        parts.append(("weight", shard.name, shard.offset, shard.weight.clone()))
        for key, value in sharded.optimizer.state[shard.flat].items():
            if isinstance(value, torch.Tensor) and value.dim() > 0:
                value = shard.view(value).clone()
                parts.append((key, shard.name, shard.offset, value))
            else:
                parts.append((key, shard.name, None, float(value)))
    for shard in engine.weights.shards.values():
        mask = unpack_mask(engine.state.masks[shard.name], (shard.numel,))
        parts.append(("mask", shard.name, shard.offset, mask))
        movement = engine.state.movement[shard.name].clone()
        parts.append(("movement", shard.name, shard.offset, movement))
        regrown = engine.state.regrown[shard.name]
        steps = torch.zeros(shard.numel, dtype=torch.int32)
        steps[regrown.indices.long()] = regrown.steps
        parts.append(("regrown", shard.name, shard.offset, steps))
    if sharded.group is not None:
        everyone = [None] * sharded.group.size()
        dist.all_gather_object(everyone, parts, group=sharded.group)
        parts = [part for rank in everyone for part in rank]
    state = {"rates": [group["lr"] for group in trainer.optimizer.param_groups]}
    for kind, name, offset, value in sorted(parts, key=lambda part: part[2] or 0):
        key = f"{kind} {name}"
        if offset is None:
            assert state.setdefault(key, value) == value
        else:
            state[key] = torch.cat([state[key], value]) if key in state else value
    return state
