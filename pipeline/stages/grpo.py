"""Stage 4: TRL GRPO with verified rewards and the teacher's term, on the masked student."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import Dataset

from pipeline.artifacts import RunFolder
from pipeline.config import Config
from pipeline.data.tasks import Row
from pipeline.errors import UserError
from pipeline.stages.inputs import TaskInputs, open_student, open_teacher
from pipeline.stages.training import Training, adapters, stage_sparsity, train
from pipeline.stages.verification import open_verification
from pipeline.training.arguments import grpo_arguments
from pipeline.training.grpo_trainer import TeacherGRPOTrainer
from pipeline.training.watch import WatchCallback
from rewards.correctness import Verifier
from rewards.mix import build_rewards


def run(
    config: Config, folder: RunFolder, inputs: TaskInputs, out: Path, checkpoint: Path | None = None
) -> Training:
    """Trains with the reward mix of the config."""
    values = config.rewards
    functions, weights = reward_mix(config, inputs.verifier)
    teacher = open_teacher(config) if values.teacher_kl_weight > 0 else None
    verification = open_verification(config, folder, "grpo", inputs, teacher)
    arguments = grpo_arguments(config, out, weights)
    model, source = open_student(config, folder, "grpo")
    trainer = TeacherGRPOTrainer(
        model=model,
        reward_funcs=functions,
        args=arguments,
        train_dataset=as_dataset(inputs.task.train, inputs),
        processing_class=inputs.tokenizer,
        peft_config=adapters(config),
        teacher=teacher,
        num_masks=config.grpo.num_masks,
        sparsity_weight=values.sparsity_weight,
        **teacher_options(config),
    )
    in_reward = values.teacher_kl_place == "reward"
    watched_weight = 0.0 if in_reward else values.teacher_kl_weight
    trainer.add_callback(WatchCallback("grpo", config.grpo.on_trouble, watched_weight))
    sparsity = stage_sparsity(config, folder, "grpo", source, verification)
    return train(config, inputs, trainer, sparsity, out, checkpoint)


def reward_mix(config: Config, verifier: Verifier) -> tuple[list[Callable], list[float]]:
    """The reward functions of the config, and their weights.

    Raises:
        UserError: A function cannot be imported.
    """
    values = config.rewards
    try:
        return build_rewards(values.functions, values.weights, verifier, values.format_pattern)
    except ValueError as error:
        raise UserError(f"rewards.functions: {error}") from error


def teacher_options(config: Config) -> dict[str, Any]:
    """The trainer's keyword arguments for the teacher's term."""
    values = config.rewards
    return {
        "teacher_placement": config.teacher.placement,
        "teacher_kl_place": values.teacher_kl_place,
        "teacher_kl_weight": values.teacher_kl_weight,
        "teacher_kl_clip": values.teacher_kl_clip,
        "teacher_kl_direction": values.teacher_kl_direction,
        "teacher_kl_top_k": values.teacher_kl_top_k,
        "teacher_micro_batch_size": config.teacher.micro_batch_size,
    }


def as_dataset(rows: list[Row], inputs: TaskInputs) -> Dataset:
    """Formatted `prompt` and reference `answer`, as TRL and its reward functions take them."""
    return Dataset.from_dict(
        {
            "prompt": [inputs.format(row.prompt) for row in rows],
            "answer": [row.answer for row in rows],
        }
    )
