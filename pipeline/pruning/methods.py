"""One-shot pruning of a whole model: share out the zeros, score, mask, redistribute.

    method            what is kept                                    compared in   file
    magnitude         large |W|                                       matrix        magnitude.py
    negative_magnitude, random: controls                              matrix        magnitude.py
    wanda             large |W| * activation norm                     row           wanda.py
    sparsegpt         large W² / inverse Hessian, as compensated      matrix        sparsegpt.py
    alps              what ADMM keeps of the layer's least squares    matrix        alps.py
    mama              by magnitude, activation norm, movement         matrix        mama.py
    sdmprune          MLP channels by Taylor importance               model         sdmprune.py
    block_entropy     blocks that raise the hidden state's entropy    model         block_entropy.py

The third column is the default `scope`. Others: the whole `model`, an output `row`, or `N:M`, which
keeps N of every M consecutive inputs of a row. Scores that need activations come from the already
pruned earlier layers; when all matrices compete (`scope="model"`) every score must be known first,
and comes from the dense model. The last two methods are structured: they choose whole channels or
blocks, so they reach only some sparsities, and the nearest one counts.

Any method goes with any redistribution, but for the solvers, SparseGPT and ALPS, which have one of
their own (`matrix_pruner.py`): they refuse `proportional`, and the scope `model`, for their scores
mean something within a matrix only.

Movement waits in the host's memory until its matrix is pruned. Left out: a frugal scope `model`; it
holds the scores of all weights at once, and under MAMA sorts their movement.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers.models.llama import LlamaForCausalLM

from pipeline.errors import UserError
from pipeline.models.prunable import apply_masks, prunable_weights
from pipeline.pruning.allocation import owl_rates, uniform_rates
from pipeline.pruning.allocation_search import search_rates
from pipeline.pruning.batches import CalibrationBatch
from pipeline.pruning.block_entropy import block_masks
from pipeline.pruning.calibration import calibrate
from pipeline.pruning.calibration_movement import calibration_movement
from pipeline.pruning.criteria import CRITERIA, criterion_scores
from pipeline.pruning.input_statistics import InputStatistics
from pipeline.pruning.matrix_pruner import SOLVERS, MatrixPruner
from pipeline.pruning.redistribution import balanced_bias, redistribute
from pipeline.pruning.sdmprune import sdmprune_masks
from pipeline.rules.prune import STRUCTURED, contradictions
from pipeline.sparsity.groups import parse_n_m, run_length
from pipeline.sparsity.threshold import masks_by_score

METHODS = (*CRITERIA, *SOLVERS, *STRUCTURED)
SCOPES = ("matrix", "model", "row")
"""Where weights are compared, beside `N:M`."""
REDISTRIBUTIONS = ("none", "proportional", "least_squares", "admm")
ALLOCATIONS = ("uniform", "owl", "search")
"""How the zeros are shared out among the matrices, where each has its own."""


@torch.no_grad()
def prune_model(
    model: LlamaForCausalLM,
    batches: Sequence[CalibrationBatch],
    *,
    method: str,
    sparsity: float,
    scope: str | None = None,
    redistribution: str = "none",
    allocation: str = "uniform",
    search_evaluations: int = 64,
    width_multiple: int = 32,
    magnitude: bool = True,
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
        scope: `matrix` prunes each matrix to its rate, `model` all of them together, `row` each
            output row, `N:M`, such as 2:4, keeps N of every M consecutive inputs of a row and needs
            sparsity 1 - N / M. None: the method's default.
        redistribution: One of `REDISTRIBUTIONS`.
        allocation: One of `ALLOCATIONS`: the rate of each matrix, under scope `matrix` or `row`.
        search_evaluations: Budget of `search`, see `allocation_search.py`.
        width_multiple: Of the MLP width that `sdmprune` leaves.
        magnitude: Whether `mama` uses the magnitude.
        activation: Whether `mama` uses activation norms.
        movement: Whether `mama` uses calibration movement.
        seed: Of `random` and `search`.
        progress: Name of the progress bars, shown for what takes longer than a few seconds; None
            shows none.

    Returns:
        Weight name to (out, in) bool mask, True = kept, on the model's device. Zeros:
        round(rate x elements) of each matrix, of all, or of each row; M - N of each group; whole
        channels or blocks under a structured method. Pruned weights are exactly 0.

    Raises:
        UserError: An argument is outside its range, a weight is not finite, or the calibration set
            is unfit.
    """
    scope = scope or default_scope(method)
    weights = {name: weight.detach() for name, weight in prunable_weights(model).items()}
    _check_arguments(method, sparsity, scope, redistribution, allocation, weights)
    _check_finite(weights)
    moved = None
    if method == "mama" and movement:
        moved = calibration_movement(model, batches, progress)
        moved = {name: total.cpu() for name, total in moved.items()}
    pruner = MatrixPruner(method, scope, redistribution, magnitude, activation, moved, seed)
    if scope == "model":
        if method == "sdmprune":
            masks = sdmprune_masks(
                model, batches, sparsity, width_multiple=width_multiple, progress=progress
            )
        elif method == "block_entropy":
            masks = block_masks(model, batches, sparsity, progress=progress)
        else:
            masks = _masks_by_one_threshold(model, batches, pruner, weights, sparsity, progress)
        _redistribute_under(model, batches, masks, redistribution, progress)
        return masks
    rates = uniform_rates(weights, sparsity)
    if allocation == "owl":
        rates = owl_rates(model, batches, sparsity, progress=progress)
    elif allocation == "search":
        budget = {"num_evaluations": search_evaluations, "seed": seed}
        rates = search_rates(model, batches, pruner, sparsity, **budget, progress=progress).rates
    return _prune_by_matrix(model, batches, pruner, rates, progress)


def default_scope(method: str) -> str:
    """Where a method compares weights when nothing else is asked for."""
    if method in STRUCTURED:
        return "model"
    return "row" if method == "wanda" else "matrix"


def _prune_by_matrix(
    model: LlamaForCausalLM,
    batches: Sequence[CalibrationBatch],
    pruner: MatrixPruner,
    rates: dict[str, float],
    progress: str | None,
) -> dict[str, Tensor]:
    """Prunes every matrix at its own rate, in place, first layer to last."""
    masks: dict[str, Tensor] = {}

    def prune(name: str, module: nn.Linear, statistics: InputStatistics | None) -> None:
        masks[name], new_weight = pruner(name, module, statistics, rates[name])
        _replace_weight(module, new_weight, pruner.redistribution, statistics)

    if pruner.needs_calibration:
        calibrate(model, batches, prune, pruner.needs, progress)
    else:
        for name in rates:
            prune(name, model.get_submodule(name.removesuffix(".weight")), None)
    return masks


def _masks_by_one_threshold(
    model: LlamaForCausalLM,
    batches: Sequence[CalibrationBatch],
    pruner: MatrixPruner,
    weights: dict[str, Tensor],
    sparsity: float,
    progress: str | None,
) -> dict[str, Tensor]:
    """Masks of matrices that all compete with each other, scored on the dense model."""
    norms: dict[str, Tensor] | None = None
    if pruner.uses_activation:
        norms = {}
        calibrate(
            model,
            batches,
            lambda name, _, statistics: norms.update({name: statistics.input_norm}),
            "input_norm",
            progress,
        )
    scores = criterion_scores(
        pruner.method, weights, norms, pruner.movement, pruner.seed, pruner.magnitude
    )
    return masks_by_score(scores, sparsity, "model", weights)


def _redistribute_under(
    model: LlamaForCausalLM,
    batches: Sequence[CalibrationBatch],
    masks: dict[str, Tensor],
    redistribution: str,
    progress: str | None,
) -> None:
    """Redistributes and prunes in place under masks that are known."""
    if redistribution == "none":
        apply_masks(model, masks)
        return

    def prune(name: str, module: nn.Linear, statistics: InputStatistics) -> None:
        used = statistics if module.bias is None else statistics.centred
        new_weight = redistribute(module.weight, masks[name], redistribution, used)
        _replace_weight(module, new_weight, redistribution, statistics)

    calibrate(model, batches, prune, "cross_moment", progress)


def _replace_weight(
    module: nn.Linear,
    new_weight: Tensor,
    redistribution: str,
    statistics: InputStatistics | None,
) -> None:
    """Puts a new weight into a linear layer; a bias takes part in the redistribution."""
    if module.bias is not None and redistribution != "none":
        module.bias.copy_(balanced_bias(module.bias, module.weight, new_weight, statistics))
    module.weight.copy_(new_weight)


def _check_arguments(
    method: str,
    sparsity: float,
    scope: str,
    redistribution: str,
    allocation: str,
    weights: dict[str, Tensor],
) -> None:
    """Raises UserError for the first argument outside its range, or in contradiction to another."""
    for key, value, allowed in (
        ("method", method, METHODS),
        ("redistribution", redistribution, REDISTRIBUTIONS),
        ("allocation", allocation, ALLOCATIONS),
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
    for key, value, why, remedy in contradictions(method, scope, redistribution, allocation):
        raise UserError(f"prune.{key}: {value}: {why}; {remedy}")


def _check_finite(weights: dict[str, Tensor]) -> None:
    """Raises UserError for the first weight that no score can rank."""
    for name, weight in weights.items():
        if not weight.isfinite().all():
            raise UserError(
                f"student.path: {name} holds values that are not finite; set a model without such"
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
