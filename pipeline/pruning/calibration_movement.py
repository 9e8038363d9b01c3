"""Pre-training side movement: what the calibration loss says about each weight.

Movement (Sanh et al. 2020, arXiv 2005.07683, section 3) sums -g*w over training steps. At a dense
model no step is taken: there g is the gradient at the fixed weights, -g*w is the first-order change
of the loss when w is set to zero, and its sign cancels over the calibration set, because training
has already driven the mean gradient to about zero. So each sequence is counted on its own:

    M_ij = sum over sequences n of |g_ij^(n) * w_ij|,   g^(n) = d loss_n / dW

with loss_n the summed cross-entropy (nats) of sequence n's completion tokens. M does not depend on
how the set is cut into batches. One backward pass per sequence.
"""

from collections.abc import Sequence

import torch
from torch.nn import functional as F
from tqdm import tqdm
from transformers.models.llama import LlamaForCausalLM

from pipeline.errors import UserError
from pipeline.models.prunable import prunable_weights
from pipeline.pruning.batches import IGNORED_LABEL, CalibrationBatch
from pipeline.pruning.calibration import PROGRESS_DELAY_SECONDS


def calibration_movement(
    model: LlamaForCausalLM, batches: Sequence[CalibrationBatch], progress: str | None = None
) -> dict[str, torch.Tensor]:
    """Accumulates |g*w| of every prunable weight over the calibration sequences.

    Args:
        model: In evaluation mode; its gradients and `requires_grad` flags are left as they are.
        batches: The calibration set, with labels on completion tokens.
        progress: Name of a progress bar over the sequences, shown if they take longer than a few
            seconds; None shows none.

    Returns:
        Weight name to (out, in) fp32, >= 0.

    Raises:
        UserError: No token of the calibration set is scored.
    """
    if not any((batch.labels[:, 1:] != IGNORED_LABEL).any() for batch in batches):
        raise UserError(
            "calibration.source: the calibration rows have no completion tokens, so there is no "
            "movement; set rows with answers, or prune.score_parts.movement to false"
        )
    weights = prunable_weights(model)
    movement = {name: torch.zeros_like(w, dtype=torch.float32) for name, w in weights.items()}
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        for parameter in flags:
            parameter.requires_grad_(False)
        for weight in weights.values():
            weight.requires_grad_(True)
        sequences = [(batch, row) for batch in batches for row in range(len(batch.input_ids))]
        bar = {"desc": progress, "disable": progress is None, "delay": PROGRESS_DELAY_SECONDS}
        for batch, row in tqdm(sequences, **bar):
            _add_sequence(movement, model, weights, batch, row)
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
    return movement


def _add_sequence(movement, model, weights, batch: CalibrationBatch, row: int) -> None:
    """Adds |g*w| of one sequence, its padding cut off."""
    is_token = batch.attention_mask[row].bool()
    input_ids = batch.input_ids[row, is_token].to(model.device)
    labels = batch.labels[row, is_token].to(model.device)
    if not (labels[1:] != IGNORED_LABEL).any():
        return
    with torch.enable_grad():
        logits = model(input_ids[None], use_cache=False).logits[0, :-1]
        loss = F.cross_entropy(
            logits.float(), labels[1:], ignore_index=IGNORED_LABEL, reduction="sum"
        )
        gradients = torch.autograd.grad(loss, list(weights.values()))
    for total, weight, gradient in zip(movement.values(), weights.values(), gradients, strict=True):
        total.add_((gradient.float() * weight.detach().float()).abs())
