"""One-shot pruning of a whole model: score, mask, redistribute.

    method            score (high = keep)                             compared in   file
    magnitude         |W|                                             matrix        magnitude.py
    negative_magnitude, random: controls                              matrix        magnitude.py
    wanda             |W| * activation norm                           row           wanda.py
    sparsegpt         W² / inverse Hessian, as compensated so far     matrix        sparsegpt.py
    mama              magnitude, activation norm, movement            matrix        mama.py

The third column is the default `scope`. Others: the whole `model`, an output `row`, or `N:M`, which
keeps N of every M consecutive inputs of a row. Scores that need activations come from the already
pruned earlier layers; when all matrices compete (`scope="model"`) every score must be known first,
and comes from the dense model.

Any method goes with any redistribution, but for SparseGPT, which has one of its own. Under `none`
its compensated weights stand, as in the paper; under `least_squares` only its mask is used, and the
kept weights are solved for from the dense ones ("SparseGPT mask + least squares"). `proportional`
is refused, and so is the scope `model`, for SparseGPT's scores mean something within a matrix only.
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
from pipeline.pruning.sparsegpt import sparsegpt_weight
from pipeline.pruning.wanda import wanda_score
from pipeline.sparsity.groups import parse_n_m, run_length
from pipeline.sparsity.threshold import masks_by_score

METHODS = ("magnitude", "wanda", "sparsegpt", "mama", "random", "negative_magnitude")
SCOPES = ("matrix", "model", "row")
"""Where weights are compared, beside `N:M`."""
REDISTRIBUTIONS = ("none", "proportional", "least_squares")


@torch.no_grad()
def prune_model(
    model: LlamaForCausalLM,
    batches: Sequence[CalibrationBatch],
    *,
    method: str,
    sparsity: float,
    scope: str | None = None,
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
        scope: `matrix` prunes each matrix to the target, `model` all of them together, `row` each
            output row, `N:M`, such as 2:4, keeps N of every M consecutive inputs of a row and needs
            sparsity 1 - N / M. None: `row` for wanda, `matrix` for the others.
        redistribution: One of `REDISTRIBUTIONS`.
        activation: Whether `mama` uses activation norms.
        movement: Whether `mama` uses calibration movement.
        seed: Of `random`.
        progress: Name of the progress bars, shown for what takes longer than a few seconds; None
            shows none.

    Returns:
        Weight name to (out, in) bool mask, True = kept, on the model's device. Zeros:
        round(sparsity x elements) of each matrix, of all, or of each row; M - N of each group.
        Pruned weights are exactly 0.

    Raises:
        UserError: An argument is outside its range, or the calibration set is unfit.
    """
    scope = scope or ("row" if method == "wanda" else "matrix")
    weights = {name: weight.detach() for name, weight in prunable_weights(model).items()}
    _check_arguments(method, sparsity, scope, redistribution, weights)
    if method == "sparsegpt":
        return _prune_by_sparsegpt(model, batches, sparsity, scope, redistribution, progress)
    use_activation = method == "wanda" or (method == "mama" and activation)
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

    needs = "input_norm" if redistribution == "none" else "cross_moment"
    calibrate(model, batches, prune, needs, progress)
    return masks


def _prune_by_sparsegpt(
    model: LlamaForCausalLM,
    batches: Sequence[CalibrationBatch],
    sparsity: float,
    scope: str,
    redistribution: str,
    progress: str | None,
) -> dict[str, Tensor]:
    """Prunes in place by SparseGPT, whose masks and weights come out together."""
    masks: dict[str, Tensor] = {}

    def prune(name: str, module: nn.Linear, statistics: InputStatistics) -> None:
        dense = module.weight
        masks[name], new_weight = sparsegpt_weight(dense, statistics, sparsity, scope, name)
        if redistribution != "none":
            new_weight = redistribute(dense, masks[name], redistribution, statistics)
        module.weight.copy_(new_weight)

    needs = "second_moment" if redistribution == "none" else "cross_moment"
    calibrate(model, batches, prune, needs, progress)
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
    if method == "wanda":
        return {name: wanda_score(weight, input_norms[name]) for name, weight in weights.items()}
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
        "input_norm",
        progress,
    )
    return norms


def _check_arguments(
    method: str, sparsity: float, scope: str, redistribution: str, weights: dict[str, Tensor]
) -> None:
    """Raises UserError for the first argument outside its range, or in contradiction to another."""
    for key, value, allowed in (
        ("method", method, METHODS),
        ("redistribution", redistribution, REDISTRIBUTIONS),
    ):
        if value not in allowed:
            raise UserError(f"prune.{key}: {value!r} is unknown; set one of {', '.join(allowed)}")
    if not 0.0 <= sparsity < 1.0:
        raise UserError(
            f"prune.sparsity: {sparsity} is outside [0, 1); set the fraction of weights to zero, "
            "such as 0.9"
        )
    if scope not in SCOPES:
        _check_n_m(scope, sparsity, weights)
    if method != "sparsegpt":
        return
    if scope == "model":
        raise UserError(
            "prune.scope: model: sparsegpt's scores mean something within a matrix only; set "
            "matrix, row or N:M instead"
        )
    if redistribution == "proportional":
        raise UserError(
            "prune.redistribution: proportional: sparsegpt moves pruned weights itself; set none, "
            "or least_squares on its mask, instead"
        )


def _check_n_m(scope: str, sparsity: float, weights: dict[str, Tensor]) -> None:
    """Raises UserError where `N:M` is not of that form, or does not fit sparsity or shapes."""
    try:
        kept, length = parse_n_m(scope)
        for name, weight in weights.items():
            run_length(scope, name, weight.shape)
    except ValueError as error:
        raise UserError(f"prune.{error}") from None
    if abs(sparsity - (1.0 - kept / length)) > 1e-6:
        raise UserError(
            f"prune.sparsity: {sparsity}: prune.scope {scope} keeps {kept} of every {length} "
            f"weights; set {1.0 - kept / length:.6g} instead"
        )
