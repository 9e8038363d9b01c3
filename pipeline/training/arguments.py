"""From our config to TRL's argument classes. TRL's own names go through untouched."""

from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.integrations import unset_hf_deepspeed_config
from trl import DistillationConfig, GRPOConfig, SFTConfig

from pipeline.config import Config
from pipeline.errors import UserError
from pipeline.models.prompts import CHAT_TEMPLATE_ARGUMENTS
from pipeline.training.teacher_placement import placement_fault
from pipeline.training.topology import check_topology
from pipeline.training.trackers import run_name, tracker_faults


def distill_arguments(config: Config, output_dir: Path) -> SFTConfig:
    """TRL's arguments of the distill stage.

    Raises:
        UserError: TRL refuses a value.
    """
    return _build(SFTConfig, "distill", config, output_dir, {"remove_unused_columns": False})


def on_policy_arguments(config: Config, output_dir: Path) -> DistillationConfig:
    """TRL's arguments of the on_policy stage.

    Raises:
        UserError: TRL refuses a value.
    """
    owned = {"chat_template_kwargs": CHAT_TEMPLATE_ARGUMENTS}
    return _build(DistillationConfig, "on_policy", config, output_dir, owned)


def grpo_arguments(
    config: Config, output_dir: Path, reward_weights: list[float] | None = None
) -> GRPOConfig:
    """TRL's arguments of the grpo stage.

    Args:
        config: The run's config.
        output_dir: The stage's folder.
        reward_weights: One per reward function; None is 1 for each.

    Raises:
        UserError: TRL refuses a value.
    """
    owned = {
        "reward_weights": reward_weights,
        "chat_template_kwargs": CHAT_TEMPLATE_ARGUMENTS,
    }
    return _build(GRPOConfig, "grpo", config, output_dir, owned)


def check_trl_values(config: Config) -> None:
    """Builds the argument classes, so that a bad value is reported before any stage starts.

    Raises:
        UserError: Names every section that TRL refuses, with TRL's reason, what of the launcher's
            settings no sparse student can be trained with, and trackers that are not there.
    """
    faults = []
    muon = config.distill.muon_learning_rate is not None
    for stage, build, uses_muon in (
        ("distill", distill_arguments, muon),
        ("on_policy", on_policy_arguments, False),
        ("grpo", grpo_arguments, False),
    ):
        if stage in config.run.stages:
            try:
                arguments = build(config, Path("unused"))
                check_topology(stage, arguments, uses_muon)
            except UserError as error:
                faults.append(str(error))
            else:
                faults += _teacher_faults(config, stage, arguments)
                faults += tracker_faults(stage, arguments)
    forget_deepspeed()
    if faults:
        raise UserError("\n".join(faults))


def _teacher_faults(config: Config, stage: str, arguments: TrainingArguments) -> list[str]:
    """A placement that only ZeRO-3 has, found before the teacher is loaded."""
    if stage == "distill" or (stage == "grpo" and config.rewards.teacher_kl_weight == 0):
        return []
    values = config.teacher
    fault = placement_fault(values.placement, values.dtype, arguments.deepspeed_plugin)
    return [] if fault is None else [fault]


def forget_deepspeed() -> None:
    """Lets models load whole again.

    Once training arguments exist under ZeRO-3, transformers loads every model in pieces, and
    generation waits for all ranks. What rank 0 does alone, and the teacher, need neither.
    """
    unset_hf_deepspeed_config()


def _build(
    arguments_class: type, section: str, config: Config, output_dir: Path, owned: dict[str, Any]
) -> Any:
    values: dict[str, Any] = {
        "save_strategy": "steps",
        "report_to": "tensorboard",
        "run_name": run_name(output_dir.parent),
    }
    values |= getattr(config, section).trl_values
    values |= owned | {"output_dir": str(output_dir), "seed": config.run.seed}
    if not torch.accelerator.is_available():
        values["use_cpu"] = True
    try:
        return arguments_class(**values)
    except (ValueError, TypeError) as error:
        raise UserError(f"{section}: {error}") from error
