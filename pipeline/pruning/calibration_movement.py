"""Pre-training side movement: what the calibration loss says about each weight.

Movement (Sanh et al. 2020, arXiv 2005.07683, section 3) sums -g*w over training steps. At a dense
model no step is taken: there g is the gradient at the fixed weights, -g*w is the first-order change
of the loss when w is set to zero, and its sign cancels over the calibration set, because training
has already driven the mean gradient to about zero. So each sequence is counted on its own:

    M_ij = sum over sequences n of |g_ij^(n) * w_ij|,   g^(n) = d loss_n / dW

with loss_n the summed cross-entropy (nats) of sequence n's completion tokens. M does not depend on
how the set is cut into batches. One backward pass per sequence.

Memory: 4 bytes a weight for M, one sequence's activations, and one weight's gradient at a time,
which is used and dropped as soon as the backward pass has it.
"""

from collections.abc import Sequence

import torch
from torch.func import functional_call
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
    movement = {
        name: torch.zeros_like(weight, dtype=torch.float32)
        for name, weight in prunable_weights(model).items()
    }
    weights = _watched_weights(model, movement)
    sequences = [(batch, row) for batch in batches for row in range(len(batch.input_ids))]
    bar = {"desc": progress, "disable": progress is None, "delay": PROGRESS_DELAY_SECONDS}
    for batch, row in tqdm(sequences, **bar):
        _add_sequence(model, weights, batch, row)
    return movement


def _watched_weights(
    model: LlamaForCausalLM, movement: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Stand-ins for the prunable weights whose gradients go into `movement`.

    Returns:
        Name to stand-in, a leaf that shares the weight's memory.
    """
    leaves = {}
    for name, weight in prunable_weights(model).items():

        def add(leaf: torch.Tensor, total: torch.Tensor = movement[name]) -> None:
            total.add_((leaf.grad.float() * leaf.detach().float()).abs())
            leaf.grad = None

        leaves[name] = weight.detach().requires_grad_()
        leaves[name].register_post_accumulate_grad_hook(add)
    return leaves


def _add_sequence(
    model: LlamaForCausalLM, weights: dict[str, torch.Tensor], batch: CalibrationBatch, row: int
) -> None:
    """Runs one sequence, its padding cut off, with `weights` in the place of the model's own."""
    is_token = batch.attention_mask[row].bool()
    input_ids = batch.input_ids[row, is_token].to(model.device)
    labels = batch.labels[row, is_token].to(model.device)
    if not (labels[1:] != IGNORED_LABEL).any():
        return
    with torch.enable_grad():
        arguments = {"input_ids": input_ids[None], "use_cache": False}
        logits = functional_call(model, weights, kwargs=arguments).logits[0, :-1]
        loss = F.cross_entropy(
            logits.float(), labels[1:], ignore_index=IGNORED_LABEL, reduction="sum"
        )
        torch.autograd.backward(loss, inputs=list(weights.values()))
