"""Stage 1: dense student -> masks and the weights that training starts from.

`one_shot/` holds the mask at the final target and what that student can do, measured here, also
when training starts less sparse (`refine.start_sparsity`). `model/` and `mask.safetensors` are what
the next stage starts from.
"""

import logging
from pathlib import Path

import torch
from transformers import PreTrainedModel

from pipeline.artifacts import MASK_FILE, RunFolder, write_json
from pipeline.config import Config
from pipeline.models.prunable import measured_sparsity, prunable_weights
from pipeline.pruning.batches import CalibrationBatch, calibration_batches
from pipeline.pruning.methods import prune_model
from pipeline.rollouts import generate
from pipeline.sparsity.masks import save_masks
from pipeline.stages.inputs import (
    TaskInputs,
    open_dense_student,
    open_teacher,
    save_model,
)
from pipeline.stages.measure import measure, teacher_answers, to_json

logger = logging.getLogger(__name__)


def run(config: Config, folder: RunFolder, inputs: TaskInputs, out: Path) -> None:
    """Prunes once at the final target, measures that, and saves the start of training."""
    teacher = open_teacher(config)
    student = open_dense_student(config)
    batches = _calibration(config, inputs, teacher)

    masks = _prune(student, batches, config, config.prune.sparsity)
    logger.info(
        "prune: %s, sparsity %.4f counted in the weights",
        config.prune.method,
        measured_sparsity(student)[0],
    )
    one_shot = out / "one_shot"
    one_shot.mkdir(parents=True, exist_ok=True)
    save_masks(one_shot / MASK_FILE, masks)
    answers = teacher_answers(folder, config, teacher, inputs)
    measurements = measure("pruned", student, config, inputs, teacher, answers)
    write_json(one_shot / "metrics.json", to_json(measurements))

    start = config.refine.start_sparsity
    if start is not None and start != config.prune.sparsity:
        student = open_dense_student(config)
        masks = _start_masks(student, batches, config, start)
    save_model(student, inputs.tokenizer, out)
    save_masks(out / MASK_FILE, masks)


def _calibration(
    config: Config, inputs: TaskInputs, teacher: PreTrainedModel
) -> list[CalibrationBatch]:
    """Calibration prompts with the task's answers or the teacher's greedy completions."""
    rows = inputs.task.calibration
    prompts = [inputs.encode(row.prompt) for row in rows]
    if config.calibration.source == "teacher":
        completions = generate(
            teacher,
            inputs.tokenizer,
            prompts,
            max_new_tokens=config.evaluate.max_new_tokens,
            batch_size=config.calibration.batch_size,
            progress="calibration completions",
        )
    else:
        end = [inputs.tokenizer.eos_token_id]
        completions = [
            inputs.tokenizer(row.answer, add_special_tokens=False)["input_ids"] + end
            for row in rows
        ]
    return calibration_batches(
        prompts,
        completions,
        pad_token_id=inputs.tokenizer.pad_token_id,
        batch_size=config.calibration.batch_size,
    )


def _prune(
    student: PreTrainedModel, batches: list[CalibrationBatch], config: Config, sparsity: float
) -> dict[str, torch.Tensor]:
    values = config.prune
    return prune_model(
        student,
        batches,
        method=values.method,
        sparsity=sparsity,
        scope=values.scope,
        redistribution=values.redistribution,
        activation=values.score_parts.activation,
        movement=values.score_parts.movement,
        seed=config.run.seed,
        progress="prune",
    )


def _start_masks(
    student: PreTrainedModel, batches: list[CalibrationBatch], config: Config, start: float
) -> dict[str, torch.Tensor]:
    """Masks at the sparsity training starts with; 0 leaves the student as it is."""
    if start == 0.0:
        return {
            name: torch.ones_like(weight, dtype=torch.bool)
            for name, weight in prunable_weights(student).items()
        }
    return _prune(student, batches, config, start)
