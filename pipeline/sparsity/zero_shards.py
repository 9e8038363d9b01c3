"""Shards under DeepSpeed ZeRO, read from the engine's optimizer (DeepSpeed 0.19).

Each stage cuts in its own way, and each knows the way best itself:

- ZeRO-1 and 2: the weights of a parameter group become views into one flat buffer, which is cut
  into equal parts, one a rank; the fp32 partition is a copy of this rank's part. A weight may live
  on one rank only. ZeRO-1 in bf16 with fp32 gradient accumulation is another class
  (`BF16_Optimizer`) with the same layout. Where a weight starts is read from its memory, because
  DeepSpeed's own `_hp_mapping` is wrong under `round_robin_gradients`: it forgets the reordering.
- ZeRO-3: every weight is cut into equal parts, one a rank, the last ones padded or all padding;
  the parts of a *sub-group* of weights lie end to end in one flat tensor. The optimizer steps one
  sub-group after the other, and between steps its parameter groups are empty.

What the optimizer steps is fp32; `publish` copies it to the bf16 (or fp32) weights that compute
with the routines DeepSpeed itself runs at the end of a step.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from deepspeed import DeepSpeedEngine
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, nn
from torch import distributed as dist

from pipeline.sparsity.layouts import check_zero_config
from pipeline.sparsity.shards import Shard, ShardedWeights, plain_shards


def zero_shards(engine: DeepSpeedEngine, weights: dict[str, nn.Parameter]) -> ShardedWeights:
    """Maps every prunable weight to its part of this rank's fp32 partition.

    Args:
        engine: An initialised engine, any ZeRO stage; with stage 0 only in fp32.
        weights: Name to parameter of the engine's module, in model order.

    Raises:
        ValueError: The layout is refused, see `layouts.py`, or a weight is not trained.
    """
    config = engine._config
    check_zero_config(config.zero_config, (config.float16_config, config.bfloat16_config))
    zero = engine.optimizer
    if zero is engine.basic_optimizer:
        return plain_shards(weights, zero)
    if isinstance(zero, DeepSpeedZeroOptimizer_Stage3):
        flats = zero.fp32_partitioned_groups_flat
        shards = {name: _shard_stage_3(zero, name, weight) for name, weight in weights.items()}
        shapes = {name: weight.ds_shape for name, weight in weights.items()}
        group_of = [zero.sub_group_to_group_id[index] for index in range(len(flats))]
        publish = _publish_stage_3(zero)
    elif isinstance(zero, DeepSpeedZeroOptimizer | BF16_Optimizer):
        groups = _flat_groups(zero)
        flats = [group.partition for group in groups]
        shards = {name: _shard_stage_1_and_2(groups, name, w) for name, w in weights.items()}
        shapes = {name: weight.shape for name, weight in weights.items()}
        group_of = list(range(len(flats)))
        publish = zero.update_lp_params
    else:
        raise ValueError(
            f"deepspeed_config.zero_optimization.stage: {config.zero_optimization_stage}: "
            f"{type(zero).__name__} has no map of its fp32 master weights; set 1, 2 or 3"
        )
    _check_base_optimizer(zero.optimizer)
    return ShardedWeights(
        shards={name: shard for name, shard in shards.items() if shard is not None},
        shapes=shapes,
        optimizer=zero.optimizer,
        group=zero.dp_process_group,
        publish=publish,
        param_group={id(flat): index for flat, index in zip(flats, group_of, strict=True)},
    )


class _FlatGroup(NamedTuple):
    """One parameter group under ZeRO-1 or 2."""

    members: set[int]
    """`id` of each weight in it."""
    buffer: Tensor
    """Flat, of all ranks' parts; the weights are views into it."""
    partition: Tensor
    """fp32 copy of this rank's part."""
    begin: int
    """First element of this rank's part, in the buffer."""


def _flat_groups(zero: DeepSpeedZeroOptimizer | BF16_Optimizer) -> list[_FlatGroup]:
    if isinstance(zero, BF16_Optimizer):
        weights, buffers = zero.bf16_groups, zero.bf16_groups_flat
        partitions = zero.fp32_groups_flat_partition
    else:
        weights, buffers = zero.bit16_groups, zero.bit16_groups_flat
        partitions = zero.single_partition_of_fp32_groups
    ranks = [dist.get_rank(group) for group in zero.real_dp_process_group]
    return [
        _FlatGroup({id(weight) for weight in members}, buffer, partition, rank * partition.numel())
        for members, buffer, partition, rank in zip(
            weights, buffers, partitions, ranks, strict=True
        )
    ]


def _shard_stage_1_and_2(groups: list[_FlatGroup], name: str, weight: nn.Parameter) -> Shard | None:
    group = next((group for group in groups if id(weight) in group.members), None)
    if group is None:
        raise ValueError(f"the optimizer does not train {name}")
    begins_at = (weight.data_ptr() - group.buffer.data_ptr()) // weight.element_size()
    first = max(begins_at, group.begin)
    last = min(begins_at + weight.numel(), group.begin + group.partition.numel())
    if first >= last:
        return None
    return Shard(
        name, weight.shape, first - begins_at, last - first, group.partition, first - group.begin
    )


def _shard_stage_3(
    zero: DeepSpeedZeroOptimizer_Stage3, name: str, weight: nn.Parameter
) -> Shard | None:
    if zero.get_param_id(weight) not in zero.grad_position:
        raise ValueError(f"the optimizer does not train {name}")
    sub_group, start, padded = zero.grad_position[zero.get_param_id(weight)]
    offset = padded * zero._get_param_partition_rank(weight)
    numel = min(padded, weight.ds_numel - offset)
    if numel <= 0:
        return None
    flat = zero.fp32_partitioned_groups_flat[sub_group]
    return Shard(name, weight.ds_shape, offset, numel, flat, start)


def _publish_stage_3(zero: DeepSpeedZeroOptimizer_Stage3) -> Callable[[], None]:
    @torch.no_grad()
    def publish() -> None:
        zero._partition_all_parameters()  # no gathered weight keeps an old value
        for sub_group in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(sub_group)
        if zero.persistent_parameters:  # small weights stay gathered between steps
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)

    return publish


def _check_base_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Refuses an optimizer that hides the gradient from the hooks, or fires none."""
    if type(optimizer).__name__ == "MuonWithAuxAdam":
        raise ValueError(
            "deepspeed_config.optimizer.type: Muon: at the hooks the gradient has been replaced by "
            "the update; set AdamW"
        )
    if not hasattr(optimizer, "register_step_post_hook"):
        raise ValueError(
            f"deepspeed_config.optimizer.type: {type(optimizer).__name__} is no "
            "torch.optim.Optimizer: its step fires no hooks; set AdamW"
        )
