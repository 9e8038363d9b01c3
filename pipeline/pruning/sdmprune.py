"""SDMPrune-style: whole MLP channels by what a self-distillation loss says about them.

A channel c is row c of gate, row c of up and column c of down. Its importance is the Taylor term
|g*w| of its weights, the three added entry by entry, over the hidden dimension j:

    I_c = sum over sequences n of mean over j of |G_cj + U_cj + D_jc|
    G = dL_n/dW_gate * W_gate, U and D the same for up and down
    L_n = KL_WEIGHT * KL(student || dense) + (1 - KL_WEIGHT) * cross-entropy

Both terms of L_n are summed over the sequence's scored tokens (nats, temperature 1). The student is
the dense model without the channels cut so far. Each layer first loses FIRST_CUT_SHARE of what it
is to lose: at the dense point the KL's gradient is zero, so the same loss ranks by cross-entropy
there. Then scores are taken anew, and the rest goes.

Source: the idea of SDMPrune (arXiv 2506.11120). Assumptions, because only the formula was at hand:
absolute values entry by entry and sequence by sequence; one cut by cross-entropy and one by the
mixed loss; as many channels in every layer, so that the result is an ordinary Llama; both constants
below.

Measured on a small arithmetic Llama, nats per token of KL to the dense model with 232, 200 and 176
of 288 channels, mean of three calibration seeds: 0.009, 0.19, 0.63; channels by the norm of their
weights 0.012, 0.16, 0.61. On one of the seeds: 0.011, 0.17, 0.65; with a first cut of 0.1 0.015,
0.19, 0.72, of 0.5 0.043, 0.38, 0.90; all in one cut 0.010, 0.17, 0.60. There the second scores do
not help: few sequences rule them. The top 5 % hold 16 % of the importance in the dense model, 23 %
after 6 channels a layer, 61 % after 30. The whole first-order term of a channel, absolute value
after the sum over j, with a first cut of 0.1: 0.011, 0.24, 0.75.

Memory: the MLP gradients of one layer at a time, logits of a few tokens at a time. Left out:
attention heads, biases, recovery training. `models/narrow.py` cuts the channels out.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from tqdm import tqdm
from transformers.models.llama import LlamaForCausalLM

from pipeline.errors import UserError
from pipeline.evaluation.agreement import kl_divergence
from pipeline.evaluation.completions import MAX_LOGITS
from pipeline.models.prunable import decoder_layers, prunable_weights
from pipeline.pruning.batches import IGNORED_LABEL, CalibrationBatch
from pipeline.pruning.calibration import PROGRESS_DELAY_SECONDS

FIRST_CUT_SHARE = 0.05
"""How much of a layer's cut cross-entropy chooses: small, the full loss is to choose most."""
KL_WEIGHT = 0.5
"""alpha: dense predictions and true tokens weigh the same."""


def sdmprune_masks(
    model: LlamaForCausalLM,
    batches: Sequence[CalibrationBatch],
    sparsity: float,
    *,
    width_multiple: int = 32,
    progress: str | None = None,
) -> dict[str, Tensor]:
    """Chooses the MLP channels to cut. The model stays as it is.

    Args:
        model: A dense Llama in evaluation mode.
        batches: Calibration set, with labels on the tokens to score. How it is cut into batches
            does not matter.
        sparsity: Fraction of zeros wanted among all prunable weights, attention included. The width
            of every MLP becomes the multiple of `width_multiple`, or the present width, whose
            sparsity is nearest; count the zeros in the masks to know it.
        width_multiple: What the new width is a multiple of.
        progress: Name of the progress bars over the batches, shown if they take longer than a few
            seconds; None shows none.

    Returns:
        Weight name to (out, in) bool, True = kept, on the model's device, in model order. All True
        in attention; rows of gate and up and columns of down are whole True or whole False.

    Raises:
        UserError: The sparsity needs fewer than `width_multiple` channels a layer, no token is
            scored, or a gradient is not finite.
    """
    width = mlp_width(model, sparsity, width_multiple)
    layers = decoder_layers(model)
    channels = layers[0].mlp.down_proj.in_features
    live = torch.ones(len(layers), channels, dtype=torch.bool, device=model.device)
    first = math.ceil(FIRST_CUT_SHARE * (channels - width))
    for num_cut in (first, channels - width - first):
        if num_cut:
            importance = channel_importance(model, batches, live, progress)
            order = importance.masked_fill(~live, math.inf).argsort(stable=True)
            live = live.scatter(1, order[:, :num_cut], False)
    masks = {name: torch.ones_like(w, dtype=bool) for name, w in prunable_weights(model).items()}
    for index, kept in enumerate(live):
        prefix = f"model.layers.{index}.mlp"
        masks[f"{prefix}.gate_proj.weight"] &= kept[:, None]
        masks[f"{prefix}.up_proj.weight"] &= kept[:, None]
        masks[f"{prefix}.down_proj.weight"] &= kept
    return masks


def mlp_width(model: LlamaForCausalLM, sparsity: float, width_multiple: int) -> int:
    """The width of all MLPs whose sparsity is nearest to the target.

    Args:
        model: Any Llama.
        sparsity: Fraction of zeros wanted among all prunable weights.
        width_multiple: The width is a multiple of it, or the present width.

    Raises:
        UserError: Even `width_multiple` channels a layer are too many.
    """
    weights = prunable_weights(model)
    mlp_share = sum(w.numel() for name, w in weights.items() if ".mlp." in name)
    mlp_share /= sum(w.numel() for w in weights.values())
    channels = decoder_layers(model)[0].mlp.down_proj.in_features
    widths = [*range(width_multiple, channels, width_multiple), channels]
    reached = {width: mlp_share * (1.0 - width / channels) for width in widths}
    largest = round(reached[widths[0]], 4)
    if sparsity > largest:
        raise UserError(
            f"prune.sparsity: {sparsity}: the MLPs hold {mlp_share:.4f} of the prunable weights, "
            f"and {widths[0]} of {channels} channels must stay in each; set at most {largest}, or "
            "a smaller prune.width_multiple"
        )
    return min(widths, key=lambda width: abs(reached[width] - sparsity))


def channel_importance(
    model: LlamaForCausalLM,
    batches: Sequence[CalibrationBatch],
    live: Tensor,
    progress: str | None = None,
) -> Tensor:
    """I_c of every MLP channel; high = keep.

    Args:
        model: The dense model, in evaluation mode.
        batches: Calibration set, with labels on the tokens to score.
        live: (layers, channels) bool, False where the student has lost the channel already.
        progress: Name of a progress bar over the sequences; None shows none.

    Returns:
        (layers, channels) fp64, >= 0; 0 where `live` is False.

    Raises:
        UserError: No token is scored, or a gradient is not finite.
    """
    if not any((batch.labels[:, 1:] != IGNORED_LABEL).any() for batch in batches):
        raise UserError(
            "calibration.source: the calibration rows have no completion tokens, so MLP channels "
            "have no importance; set rows with answers"
        )
    importance = torch.zeros(live.shape, dtype=torch.float64, device=live.device)
    weights = _watched_weights(model, importance)
    sequences = [(batch, row) for batch in batches for row in range(len(batch.input_ids))]
    bar = {"desc": progress, "disable": progress is None, "delay": PROGRESS_DELAY_SECONDS}
    for batch, row in tqdm(sequences, **bar):
        is_token = batch.attention_mask[row].bool()
        input_ids = batch.input_ids[row, is_token].to(model.device)
        labels = batch.labels[row, is_token].to(model.device)
        if (labels[1:] != IGNORED_LABEL).any():
            _backward(model, weights, live, input_ids, labels)
    if not importance.isfinite().all():
        raise UserError(
            "calibration: a gradient of the MLP channels is not finite; set student.dtype to "
            "float32 or use other calibration rows"
        )
    return importance


def _watched_weights(model: LlamaForCausalLM, importance: Tensor) -> dict[str, Tensor]:
    """Stand-ins for the MLP weights that turn their gradients into importance.

    Args:
        model: The stand-ins share its memory; its own weights get no gradient.
        importance: (layers, channels) fp64. A backward pass adds to it layer by layer, as soon as
            a layer's three gradients are there, and frees them.

    Returns:
        Name within `model.model` to stand-in, a leaf.
    """
    leaves = {}
    for index, layer in enumerate(decoder_layers(model)):
        three = {
            name: layer.mlp.get_submodule(name).weight.detach().requires_grad_()
            for name in ("gate_proj", "up_proj", "down_proj")
        }

        def reduce(_: Tensor, three=three, total=importance[index]) -> None:
            if any(weight.grad is None for weight in three.values()):
                return
            gate, up, down = (w.grad.float() * w.detach().float() for w in three.values())
            total.add_((gate + up + down.T).abs().mean(1))
            for weight in three.values():
                weight.grad = None

        for name, weight in three.items():
            weight.register_post_accumulate_grad_hook(reduce)
            leaves[f"layers.{index}.mlp.{name}.weight"] = weight
    return leaves


def _backward(
    model: LlamaForCausalLM,
    weights: dict[str, Tensor],
    live: Tensor,
    input_ids: Tensor,
    labels: Tensor,
) -> None:
    """The backward pass of one sequence's loss, from `input_ids` and `labels` (S,) to `weights`."""
    is_scored = labels[1:] != IGNORED_LABEL

    def predicting_states(parameters: dict[str, Tensor]) -> Tensor:
        arguments = {"input_ids": input_ids[None], "use_cache": False}
        hidden = functional_call(model.model, parameters, kwargs=arguments).last_hidden_state
        return hidden[0, :-1][is_scored]

    with torch.no_grad():
        dense_states = predicting_states({})
    with torch.enable_grad(), _without_channels(model, live):
        states = predicting_states(weights)
    gradient = _loss_gradient(model.lm_head, states.detach(), dense_states, labels[1:][is_scored])
    torch.autograd.backward(states, gradient, inputs=list(weights.values()))


@contextmanager
def _without_channels(model: LlamaForCausalLM, live: Tensor) -> Iterator[None]:
    """The student: meanwhile only `live` channels (layers, channels) reach the MLPs' outputs."""
    handles = [
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, inputs, kept=kept: inputs[0] * kept)
        for layer, kept in zip(decoder_layers(model), live, strict=True)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _loss_gradient(
    head: nn.Linear, states: Tensor, dense_states: Tensor, targets: Tensor
) -> Tensor:
    """Gradient of L_n by the states that predict the scored tokens.

    Args:
        head: The output head.
        states: (tokens, hidden) of the student.
        dense_states: (tokens, hidden) of the dense model.
        targets: (tokens,) int64, the scored tokens.

    Returns:
        (tokens, hidden) in the states' dtype.
    """
    gradients = []
    size = max(1, MAX_LOGITS // head.out_features)
    chunks = zip(states.split(size), dense_states.split(size), targets.split(size), strict=True)
    for chunk, dense_chunk, labels in chunks:
        chunk.requires_grad_()
        with torch.enable_grad():
            logits = _logits(head, chunk)
            nll = F.cross_entropy(logits, labels, reduction="sum")
            divergence = kl_divergence(logits, _logits(head, dense_chunk)).sum()
            loss = KL_WEIGHT * divergence + (1.0 - KL_WEIGHT) * nll
            gradients += torch.autograd.grad(loss, chunk)
    return torch.cat(gradients)


def _logits(head: nn.Linear, states: Tensor) -> Tensor:
    """(n, hidden) -> (n, V) fp32 or fp64."""
    logits = head(states)
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
