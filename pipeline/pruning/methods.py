"""One-shot pruning of a whole model: score, mask, redistribute.

    method            score (high = keep)                                             file
    magnitude         |W|                                                             magnitude.py
    negative_magnitude, random: controls                                              magnitude.py
    mama              magnitude, activation norm, calibration movement                mama.py

Any method goes with any redistribution. Scores that need activations come from the already pruned
earlier layers when each matrix is pruned to the target by itself; when all matrices compete
(`scope="model"`) every score must be known first, and comes from the dense model.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers.models.llama import LlamaForCausalLM

from pipeline.errors import UserError
from pipeline.models.prunable import apply_masks, prunable_weights
from pipeline.pruning.batches import CalibrationBatch
from pipeline.pruning.calibration import InputStatistics, calibrate
from pipeline.pruning.calibration_movement import calibration_movement
from pipeline.pruning.magnitude import magnitude_score, negative_magnitude_score, random_score
from pipeline.pruning.mama import mama_scores
from pipeline.pruning.redistribution import redistribute
from pipeline.sparsity.threshold import masks_by_score

METHODS = ("magnitude", "mama", "random", "negative_magnitude")
SCOPES = ("matrix", "model")
REDISTRIBUTIONS = ("none", "proportional", "least_squares")


@torch.no_grad()
def prune_model(
    model: LlamaForCausalLM,
    batches: Sequence[CalibrationBatch],
    *,
    method: str,
    sparsity: float,
    scope: str = "matrix",
    redistribution: str = "none",
    activation: bool = True,
    movement: bool = True,
    seed: int = 0,
    progress: str | None = None,
) -> dict[str, Tensor]:
    """Prunes the model in place.

    Args:
        model: A dense Llama in evaluation mode.
        batches: Calibration set; may be empty when neither score nor redistribution needs one.
        method: One of `METHODS`.
        sparsity: Fraction of zeros among the prunable weights, in [0, 1).
        scope: `matrix` prunes each matrix to the target, `model` all of them together.
        redistribution: One of `REDISTRIBUTIONS`.
        activation: Whether `mama` uses activation norms.
        movement: Whether `mama` uses calibration movement.
        seed: Of `random`.
        progress: Name of the progress bars, shown for what takes longer than a few seconds; None
            shows none.

    Returns:
        Weight name to (out, in) bool mask, True = kept, on the model's device. Zeros:
        round(sparsity x elements) of each matrix, or of all. Pruned weights are exactly 0.

    Raises:
        UserError: An argument is outside its range, or the calibration set is unfit.
    """
    _check_arguments(method, sparsity, scope, redistribution)
    weights = {name: weight.detach() for name, weight in prunable_weights(model).items()}
    use_activation = method == "mama" and activation
    use_movement = method == "mama" and movement
    moved = calibration_movement(model, batches, progress) if use_movement else None

    def masks_of(names: Sequence[str], norms: dict[str, Tensor] | None) -> dict[str, Tensor]:
        chosen = {name: weights[name] for name in names}
        tie_break = {name: weight.abs() for name, weight in chosen.items()}
        scores = _scores(method, chosen, norms, moved, seed)
        return masks_by_score(scores, sparsity, scope, tie_break)

    masks: dict[str, Tensor] = {}
    if scope == "model" or not use_activation:
        norms = _dense_input_norms(model, batches, progress) if use_activation else None
        competing = [list(weights)] if scope == "model" else [[name] for name in weights]
        for names in competing:
            masks.update(masks_of(names, norms))

    if masks and redistribution == "none":
        apply_masks(model, masks)
        return masks

    def prune(name: str, module: nn.Linear, statistics: InputStatistics) -> None:
        if name not in masks:
            masks.update(masks_of([name], {name: statistics.input_norm}))
        module.weight.copy_(redistribute(module.weight, masks[name], redistribution, statistics))

    calibrate(model, batches, prune, progress)
    return masks


def _scores(
    method: str,
    weights: dict[str, Tensor],
    input_norms: dict[str, Tensor] | None,
    movement: dict[str, Tensor] | None,
    seed: int,
) -> dict[str, Tensor]:
    """Scores of weights that compete with each other, by method. High = keep."""
    if method == "mama":
        return mama_scores(weights, input_norms, movement)
    if method == "random":
        return {name: random_score(weight, name, seed) for name, weight in weights.items()}
    score = magnitude_score if method == "magnitude" else negative_magnitude_score
    return {name: score(weight) for name, weight in weights.items()}


def _dense_input_norms(
    model: LlamaForCausalLM, batches: Sequence[CalibrationBatch], progress: str | None
) -> dict[str, Tensor]:
    """(in,) L2 norms of every prunable layer's input channels in the model as it is."""
    norms: dict[str, Tensor] = {}
    calibrate(
        model,
        batches,
        lambda name, _, statistics: norms.update({name: statistics.input_norm}),
        progress,
    )
    return norms


def _check_arguments(method: str, sparsity: float, scope: str, redistribution: str) -> None:
    """Raises UserError for the first argument outside its range."""
    for key, value, allowed in (
        ("method", method, METHODS),
        ("scope", scope, SCOPES),
        ("redistribution", redistribution, REDISTRIBUTIONS),
    ):
        if value not in allowed:
            raise UserError(f"prune.{key}: {value!r} is unknown; set one of {', '.join(allowed)}")
    if not 0.0 <= sparsity < 1.0:
        raise UserError(
            f"prune.sparsity: {sparsity} is outside [0, 1); set the fraction of weights to zero, "
            "such as 0.9"
        )
