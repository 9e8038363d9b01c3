"""Which layout needs how much memory: one row for each, of the training stage that needs most.

    total = weights + gradients + optimizer + movement + teacher + max(pass, sampling)

`pass` is activations, logits, autocast's bf16 copy of the weights and the teacher's forward pass;
sampling and training take turns.
"""

import os
from dataclasses import dataclass
from typing import Any

import torch

from pipeline.config import Config
from pipeline.doctor.activations import (
    Pass,
    activation_bytes,
    logit_bytes,
    sampling_bytes,
    teacher_pass_bytes,
)
from pipeline.doctor.memory import LAYOUTS, States, teacher_bytes, training_states
from pipeline.doctor.shapes import ModelShape


@dataclass(frozen=True, kw_only=True)
class Launch:
    """How this process was started."""

    layout: str
    """One of `LAYOUTS`."""
    num_ranks: int
    offload: bool
    """Whether ZeRO keeps the optimizer on the host."""
    device: str
    """`cpu`, `cuda` and so on."""

    @classmethod
    def of(cls, arguments: Any) -> "Launch":
        """Reads a stage's training arguments, which know what the launcher set up."""
        plugin, offload, stage = arguments.deepspeed_plugin, None, 0
        if plugin is not None:
            zero = plugin.hf_ds_config.config.get("zero_optimization", {})
            stage = int(zero.get("stage", plugin.zero_stage))
            offload = (zero.get("offload_optimizer") or {}).get("device")
        return cls(
            layout=LAYOUTS[stage],
            num_ranks=arguments.world_size,
            offload=offload == "cpu",
            device=arguments.device.type,
        )


@dataclass(frozen=True, kw_only=True)
class Row:
    """Bytes of one rank in one layout."""

    layout: str
    num_ranks: int
    states: States
    teacher: float
    training: float
    """Of one forward and backward pass."""
    sampling: float
    teacher_on_host: float

    @property
    def total(self) -> float:
        """On the device, at most."""
        states = self.states
        fixed = states.weights + states.gradients + states.optimizer + states.sparsity
        return fixed + self.teacher + max(self.training, self.sampling)

    @property
    def host(self) -> float:
        """In the host's memory, of each rank."""
        return self.states.host + self.teacher_on_host


def pass_of(config: Config, stage: str, arguments: Any, longest_prompt: int) -> Pass:
    """What goes through the student at once in a training stage."""
    sequences = arguments.per_device_train_batch_size
    if stage == "distill":
        limit = arguments.max_length or longest_prompt + config.evaluate.max_new_tokens
        prompt = min(longest_prompt, limit - 1)
        completion = min(config.evaluate.max_new_tokens, limit - prompt)
    else:
        prompt, completion = longest_prompt, arguments.max_completion_length
    batches = {"distill": 0, "grpo": getattr(arguments, "steps_per_generation", 1) or 1}
    return Pass(
        sequences=sequences,
        sampled=sequences * batches.get(stage, 1),
        prompt=prompt,
        completion=completion,
        checkpointing=arguments.gradient_checkpointing,
        beside_teacher=stage == "distill",
    )


def memory_row(
    config: Config,
    stage: str,
    arguments: Any,
    work: Pass,
    shapes: dict[str, ModelShape],
    layout: str,
    num_ranks: int,
    offload: bool,
) -> Row:
    """One layout's memory in one stage.

    Args:
        config: Of the run.
        stage: `distill`, `on_policy` or `grpo`.
        arguments: TRL's, of that stage.
        work: Its pass.
        shapes: Of `student` and, where the stage has one, `teacher`.
        layout: One of `LAYOUTS`.
        num_ranks: R.
        offload: Whether ZeRO keeps the optimizer on the host.
    """
    student, teacher, plain = shapes["student"], shapes.get("teacher"), layout == "plain"
    half = arguments.bf16 or arguments.fp16
    precision = ("autocast" if plain else "bf16") if half else "fp32"
    states = training_states(
        student,
        layout,
        num_ranks,
        half=half,
        offload=offload,
        muon=stage == "distill" and config.distill.muon_learning_rate is not None,
        movement_bytes=2 if config.movement.dtype == "bfloat16" else 4,
        lora_rank=config.lora.r,
    )
    training = activation_bytes(student, work, precision) + logit_bytes(student, work)
    training += 2 * student.num_weights if precision == "autocast" else 0
    placement = "device" if stage == "distill" else config.teacher.placement
    if placement == "zero3" and layout != "ZeRO-3":
        placement = "device"
    held = (0.0, 0.0)
    if teacher is not None:
        held = teacher_bytes(teacher, num_ranks, dtype=config.teacher.dtype, placement=placement)
        sequences = config.teacher.micro_batch_size if stage == "grpo" else work.sequences
        training += teacher_pass_bytes(teacher, sequences, work) if placement != "cpu" else 0
    uses_vllm = getattr(arguments, "use_vllm", False)
    return Row(
        layout=layout,
        num_ranks=num_ranks,
        states=states,
        teacher=held[0],
        training=training,
        sampling=0.0 if uses_vllm else sampling_bytes(student, work, precision),
        teacher_on_host=held[1],
    )


def available_memory(launch: Launch) -> tuple[float, float]:
    """Bytes for one rank: on its device, and of the host."""
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / local_ranks
    if launch.device != "cuda":
        return host, host
    return float(torch.cuda.get_device_properties(0).total_memory), host
