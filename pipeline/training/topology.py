"""Launcher settings that contradict the sparsity engine or the config, refused at start.

The engine itself checks again what it finds (`sparsity/layouts.py`); here nothing has run yet, so
nobody waits for a pruned model to learn that it cannot be trained.
"""

import copy
import os
import re
from typing import Any

from accelerate.utils import DistributedType
from pydantic import ValidationError
from transformers import TrainingArguments
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

from pipeline.errors import UserError

LOW_BIT = ("8bit", "4bit", "bnb")
LAYERWISE = "layerwise"


def check_topology(section: str, arguments: TrainingArguments, uses_muon: bool) -> None:
    """Refuses what could not train a sparse student.

    Args:
        section: `distill`, `on_policy` or `grpo`.
        arguments: Of that stage; they know what the launcher set up.
        uses_muon: Whether matrices are trained with Muon.

    Raises:
        UserError: Every fault, one a line.
    """
    faults = [
        *_optimizer_faults(section, arguments.optim.value),
        *_precision_faults(section, arguments),
    ]
    if arguments.distributed_state.distributed_type == DistributedType.FSDP:
        faults.append(
            "distributed_type: FSDP: torch shards the weights in a layout of its own; launch with "
            "DEEPSPEED and zero_stage 1, 2 or 3 (configs/accelerate/gpu_zero2.yaml)"
        )
    if arguments.n_gpu > 1:
        faults.append(
            f"num_processes: 1: one process sees {arguments.n_gpu} GPUs and transformers would "
            "copy the model to all of them in every step; launch one process per GPU "
            f"(accelerate launch --multi_gpu --num_processes {arguments.n_gpu}), or set "
            "CUDA_VISIBLE_DEVICES=0"
        )
    plugin = arguments.deepspeed_plugin
    if plugin is not None:
        faults += _zero_faults(plugin.hf_ds_config.config.get("zero_optimization", {}))
        if not faults:
            faults += _mismatches(section, arguments)
        if uses_muon:
            faults.append(
                f"{section}.muon_learning_rate: DeepSpeed's flat partitions hold no matrices to "
                f"orthogonalise; set null, and {section}.learning_rate for all weights"
            )
    if faults:
        raise UserError("\n".join(faults))


def _optimizer_faults(section: str, name: str) -> list[str]:
    if any(part in name for part in LOW_BIT):
        why = "its moments are stored in a few bits, so those of a regrown weight cannot be cleared"
    elif LAYERWISE in name:
        why = "it steps inside backward, where no hook can enforce the mask"
    else:
        return []
    return [f"{section}.optim: {name}: {why}; set adamw_torch_fused"]


def _precision_faults(section: str, arguments: TrainingArguments) -> list[str]:
    """The launcher's precision holds where the config switches its own off: then it says why."""
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launched == "no" or arguments.bf16 or arguments.fp16:
        return []
    return [
        f"{section}.bf16: false: the launcher's mixed_precision {launched} would compute in it all "
        f"the same; set {section}.bf16: true, or mixed_precision: 'no' in the accelerate config, "
        "instead"
    ]


def _mismatches(section: str, arguments: TrainingArguments) -> list[str]:
    """Numbers that a DeepSpeed file fixes and the config says otherwise.

    transformers compares them too, once the stage begins, after hours of other stages.
    """
    values = copy.deepcopy(arguments.deepspeed_plugin.hf_ds_config.config)
    theirs = HfTrainerDeepSpeedConfig(values)
    theirs.trainer_config_process(arguments)
    faults = []
    for text in theirs.mismatches:
        there, value, key, wanted = re.fullmatch(r"- ds (\S+)=(.*) vs hf (.+)=(.*)", text).groups()
        faults.append(
            f"deepspeed_config.{there}: {value}: {section} has {key} {wanted} on "
            f"{arguments.world_size} ranks; set auto, or {wanted}, instead"
        )
    return faults


def _zero_faults(values: dict[str, Any]) -> list[str]:
    from deepspeed.runtime.zero.config import get_zero_config  # deepspeed takes seconds

    from pipeline.sparsity.layouts import check_zero_config

    known = {key: value for key, value in values.items() if value != "auto"}
    try:
        check_zero_config(get_zero_config({"zero_optimization": known}))
    except ValidationError as error:
        return [f"deepspeed_config.zero_optimization: {e['msg']}" for e in error.errors()]
    except ValueError as error:
        return str(error).splitlines()
    return []
