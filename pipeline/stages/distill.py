"""Stage 2: the student recovers on the teacher's own completions, before any RL.

RL on a freshly pruned student is dead: every completion is wrong and every group without variance.
"""

import logging
from pathlib import Path

from datasets import Dataset
from transformers import PreTrainedModel

from pipeline.artifacts import RunFolder
from pipeline.config import Config
from pipeline.ranks import on_main
from pipeline.rollouts import Rollout
from pipeline.stages.inputs import TaskInputs, open_student, open_teacher
from pipeline.stages.teacher_rollouts import cached_rollouts
from pipeline.stages.training import Training, adapters, stage_sparsity, train
from pipeline.stages.verification import open_verification
from pipeline.training.arguments import distill_arguments
from pipeline.training.distill_trainer import DistillTrainer

logger = logging.getLogger(__name__)


def run(
    config: Config, folder: RunFolder, inputs: TaskInputs, out: Path, checkpoint: Path | None = None
) -> Training:
    """Samples the teacher once, then distils with the mask on."""
    teacher = open_teacher(config)
    on_main(lambda: len(teacher_completions(config, folder, teacher, inputs)))
    rollouts = teacher_completions(config, folder, teacher, inputs)
    verification = open_verification(config, folder, "distill", inputs, teacher)
    arguments = distill_arguments(config, out)
    warn_of_cut_ends(rollouts, arguments.max_length)
    model, source = open_student(config, folder, "distill")
    trainer = DistillTrainer(
        model=model,
        args=arguments,
        train_dataset=as_dataset(rollouts),
        processing_class=inputs.tokenizer,
        peft_config=adapters(config),
        teacher=teacher,
        kl_weight=config.distill.kl_weight,
        ce_weight=config.distill.ce_weight,
        muon_learning_rate=config.distill.muon_learning_rate,
    )
    sparsity = stage_sparsity(config, folder, "distill", source, verification)
    return train(config, inputs, trainer, sparsity, out, checkpoint)


def teacher_completions(
    config: Config, folder: RunFolder, teacher: PreTrainedModel, inputs: TaskInputs
) -> list[Rollout]:
    """The completions to learn from: sampled at the first call, read from the run folder later."""
    return cached_rollouts(
        folder,
        "train",
        config,
        teacher,
        inputs,
        inputs.task.train,
        num_rollouts=config.distill.rollouts,
        temperature=config.distill.rollout_temperature,
        max_new_tokens=config.evaluate.max_new_tokens,
        progress="teacher completions",
    )


def warn_of_cut_ends(rollouts: list[Rollout], max_length: int | None) -> None:
    """Says how many completions TRL will cut, whose end the student then never learns.

    Args:
        rollouts: What it learns from.
        max_length: Most tokens of a prompt with its completion; None cuts nothing.
    """
    if max_length is None:
        return
    cut = sum(len(r.prompt_ids) + len(r.completion_ids) > max_length for r in rollouts)
    if cut:
        logger.warning(
            "distill: %d of %d teacher completions have more than distill.max_length, %d tokens "
            "with their prompt, and lose their end; set a larger one, or null",
            cut,
            len(rollouts),
            max_length,
        )


def as_dataset(rollouts: list[Rollout]) -> Dataset:
    """Prompt and completion as `input_ids`, the completion alone as `labels`."""
    return Dataset.from_dict(
        {
            "input_ids": [r.prompt_ids + r.completion_ids for r in rollouts],
            "labels": [[-100] * len(r.prompt_ids) + r.completion_ids for r in rollouts],
        }
    )
