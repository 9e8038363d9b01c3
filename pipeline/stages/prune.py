"""Stage 1: dense student -> masks and the weights that training starts from.

`one_shot/` holds the mask at the final target and what that student can do, measured here, also
when training starts less sparse (`refine.start_sparsity`). `model/` and `mask.safetensors` are what
the next stage starts from. After `sdmprune`, `one_shot/model/` is the student with the pruned MLP
channels cut out: dense, narrower, and the same in its answers.
"""

import logging
import time
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from pipeline.artifacts import MASK_FILE, RunFolder, write_json
from pipeline.config import Config
from pipeline.evaluation.report import Measurements
from pipeline.lock import check_lock
from pipeline.models.narrow import narrow_llama
from pipeline.models.prunable import measured_sparsity, prunable_weights
from pipeline.pruning.batches import CalibrationBatch
from pipeline.pruning.methods import prune_model
from pipeline.sparsity.masks import save_masks
from pipeline.stages.calibration import calibration_set
from pipeline.stages.inputs import (
    TaskInputs,
    open_dense_student,
    open_teacher,
    save_model,
)
from pipeline.stages.measure import measure, reference_completions, to_json

MAX_KEPT_ZEROS = 0.01
"""Share of the kept weights from which zeros among them are worth a warning."""

logger = logging.getLogger(__name__)


class OneShot(NamedTuple):
    """A student pruned once at `prune.sparsity`, and what it can do."""

    student: PreTrainedModel
    masks: dict[str, torch.Tensor]
    """Weight name to (out, in) bool, True = kept."""
    sparsity: float
    """Counted in the weights."""
    seconds: float
    """Of pruning, calibration passes included."""
    measurements: Measurements
    batches: list[CalibrationBatch]
    """What it was calibrated on."""


def run(config: Config, folder: RunFolder, inputs: TaskInputs, out: Path) -> None:
    """Prunes once at the final target, measures that, and saves the start of training."""
    student, masks, sparsity, seconds, measurements, batches = one_shot(config, folder, inputs)
    pruned = out / "one_shot"
    check_lock(pruned)
    pruned.mkdir(parents=True, exist_ok=True)
    save_masks(pruned / MASK_FILE, masks)
    if config.prune.method == "sdmprune":
        narrow = narrow_llama(student, width_multiple=config.prune.width_multiple)
        save_model(narrow, inputs.tokenizer, pruned)
    metrics = {"sparsity": sparsity, "prune_seconds": seconds, **to_json(measurements)}
    write_json(pruned / "metrics.json", metrics)

    start = config.refine.start_sparsity
    if start is not None and start != config.prune.sparsity:
        student = open_dense_student(config)
        masks = _start_masks(student, batches, config, start)
    save_start(student, masks, inputs, out)


def one_shot(
    config: Config,
    folder: RunFolder,
    inputs: TaskInputs,
    compare_with: PreTrainedModel | None = None,
) -> OneShot:
    """Prunes the dense student at the final target and measures it; saves nothing of it.

    Args:
        config: Says how.
        folder: Keeps the teacher's completions.
        inputs: The task.
        compare_with: The model that KL is taken to; None is the teacher.
    """
    teacher = open_teacher(config)
    student = open_dense_student(config)
    batches = calibration_set(config, folder, inputs, teacher)
    started = time.monotonic()
    masks = _prune(student, batches, config, config.prune.sparsity)
    seconds = time.monotonic() - started
    sparsity = measured_sparsity(student)[0]
    logger.info("prune: %s, sparsity %.4f counted in the weights", config.prune.method, sparsity)
    pairs = reference_completions(folder, config, teacher, inputs)
    measurements = measure("pruned", student, config, inputs, compare_with or teacher, pairs)
    return OneShot(student, masks, sparsity, seconds, measurements, batches)


def save_start(
    student: PreTrainedModel, masks: dict[str, torch.Tensor], inputs: TaskInputs, out: Path
) -> None:
    """Writes what the next stage starts from."""
    save_model(student, inputs.tokenizer, out)
    save_masks(out / MASK_FILE, masks)


def _prune(
    student: PreTrainedModel, batches: list[CalibrationBatch], config: Config, sparsity: float
) -> dict[str, torch.Tensor]:
    values = config.prune
    masks = prune_model(
        student,
        batches,
        method=values.method,
        sparsity=sparsity,
        scope=values.scope,
        redistribution=values.redistribution,
        allocation=values.allocation,
        search_evaluations=values.search_evaluations,
        width_multiple=values.width_multiple,
        magnitude=values.score_parts.magnitude,
        activation=values.score_parts.activation,
        movement=values.score_parts.movement,
        seed=config.run.seed,
        progress="prune",
    )
    _warn_of_kept_zeros(student, masks)
    return masks


def _warn_of_kept_zeros(student: PreTrainedModel, masks: dict[str, torch.Tensor]) -> None:
    """Of a student that came with zeros in other places than the mask has them."""
    weights = prunable_weights(student)
    num_kept = sum(int(mask.sum()) for mask in masks.values())
    zeros = sum(
        int((mask.to(weights[name].device) & (weights[name] == 0)).sum())
        for name, mask in masks.items()
    )
    if zeros > MAX_KEPT_ZEROS * num_kept:
        logger.warning(
            "prune: %.0f %% of the kept weights are zero already: the student came with zeros, and "
            "this mask does not follow them; one that does: prune.method: magnitude, prune.scope: "
            "model, prune.redistribution: none",
            100 * zeros / num_kept,
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
