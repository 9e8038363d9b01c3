"""Layouts the engine cannot serve, refused by name at start, each with its remedy.

The engine needs fp32 master weights that stay in one place, are stepped by one optimizer through
`torch.optim.Optimizer.step` (whose hooks it uses), and are copied to the weights that compute by a
routine it can call. A layout in which one of these fails would train on without a mask, so it is
an error, never a warning. MiCS needs no line here: DeepSpeed 0.19 refuses it itself.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

FOREIGN_OPTIMIZERS = ("bitsandbytes", "torchao")
LOW_PRECISION = (torch.float16, torch.bfloat16)


def check_optimizer(
    optimizer: torch.optim.Optimizer | Any, weights: dict[str, nn.Parameter]
) -> None:
    """Refuses what plain torch or DDP cannot serve.

    Args:
        optimizer: The one that steps the weights.
        weights: Name to parameter, every prunable weight.

    Raises:
        ValueError: FSDP, an 8-bit or hookless optimizer, low-precision or untrained weights.
    """
    sharded = [name for name, weight in weights.items() if _is_sharded_by_torch(weight)]
    if sharded:
        raise ValueError(
            f"distributed_type: FSDP: {sharded[0]} is sharded by torch, whose optimizer steps no "
            "flat fp32 tensor of known layout; set DEEPSPEED with zero_stage 1, 2 or 3"
        )
    package = type(optimizer).__module__.split(".")[0]
    if package in FOREIGN_OPTIMIZERS:
        raise ValueError(
            f"optim: {type(optimizer).__name__} of {package}: its moments are stored in a format "
            "of their own, often 8-bit, so those of a regrown weight cannot be cleared; set "
            "adamw_torch_fused"
        )
    if not hasattr(optimizer, "register_step_post_hook"):
        raise ValueError(
            f"optim: {type(optimizer).__name__} is no torch.optim.Optimizer: its step fires no "
            "hooks, so pruned weights would come back; set adamw_torch_fused"
        )
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    missing = [name for name, weight in weights.items() if id(weight) not in trained]
    if missing:
        raise ValueError(f"the optimizer does not train {missing[0]} ({len(missing)} in all)")
    low = [name for name, weight in weights.items() if weight.dtype in LOW_PRECISION]
    if low:
        raise ValueError(
            f"{low[0]} is trained in {weights[low[0]].dtype}: an update of 1e-6 vanishes there and "
            "movement with it; load the model in float32 (bf16: true then computes in bf16), or "
            "train under DeepSpeed with bf16, which keeps fp32 master weights"
        )


def check_zero_config(zero: Any, precision: tuple[Any, ...] = ()) -> None:
    """Refuses what DeepSpeed's ZeRO can do and the engine cannot follow.

    Args:
        zero: The `DeepSpeedZeroConfig`.
        precision: The fp16 and bf16 sections of the same config.

    Raises:
        ValueError: Every fault, one a line.
    """
    faults = [*_zero_faults(zero), *_precision_faults(precision)]
    if faults:
        raise ValueError("\n".join(faults))


def _zero_faults(zero: Any) -> Iterator[str]:
    offload, offload_params = zero.offload_optimizer, zero.offload_param
    if offload is not None and offload.device != "none":
        key = "deepspeed_config.zero_optimization.offload_optimizer"
        if offload.ratio < 1.0:
            yield (
                f"{key}.ratio: {offload.ratio}: a second optimizer that fires no hooks steps a "
                "part of the weights; set 1.0"
            )
        if offload.device == "nvme":
            yield f"{key}.device: nvme: master weights leave memory between steps; set cpu"
        if offload.super_offload:
            yield (
                f"{key}.super_offload: true: another process steps the weights, without hooks; "
                "set false"
            )
    if offload_params is not None and offload_params.device == "nvme":
        yield (
            "deepspeed_config.zero_optimization.offload_param.device: nvme: weights leave memory, "
            "so a new mask cannot be written to them; set cpu"
        )
    if zero.zero_hpz_partition_size > 1:
        yield (
            f"deepspeed_config.zero_optimization.zero_hpz_partition_size: "
            f"{zero.zero_hpz_partition_size} (hpZ): a second copy of the weights would keep those "
            "that the mask prunes; set 1"
        )
    if zero.zenflow is not None:
        yield (
            "deepspeed_config.zero_optimization.zenflow: it steps the important gradients in an "
            "optimizer of its own; leave it out"
        )
    if zero.zero_quantized_weights:
        yield (
            "deepspeed_config.zero_optimization.zero_quantized_weights: true: the weights that "
            "compute are not the masters rounded; set false"
        )


def _precision_faults(precision: tuple[Any, ...]) -> Iterator[str]:
    for section in precision:
        for key in ("fp16_master_weights_and_grads", "bf16_master_weights_and_grads"):
            if section.enabled and getattr(section, key, False):
                yield (
                    f"deepspeed_config.{key[:4]}.{key}: true: an update of 1e-6 vanishes in 16-bit "
                    "master weights and movement with it; set false"
                )


def _is_sharded_by_torch(weight: nn.Parameter) -> bool:
    """FSDP2 and tensor parallel weights are DTensors; FSDP1 marks what it flattens."""
    return isinstance(weight, DTensor) or getattr(weight, "_fsdp_flattened", False)
