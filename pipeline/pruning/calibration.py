"""The one calibration loop of all methods: layer by layer, each seeing the ones before it pruned.

The *pruned* stream is what the model computes so far, all earlier linear layers pruned. A second,
*dense* stream, what the untouched model computes, runs beside it only where something needs it. For
a linear layer with inputs X_p and X_d (tokens, in) of the two streams a method gets the norms of
X_p's channels (enough for a score), X_pᵀ X_p (for SparseGPT) and X_pᵀ X_d (for a redistribution
against the dense output X_d Wᵀ), as much of it as it asks for (`input_statistics.py`). Inside a
decoder layer the order is q, k, v, then o, then gate, up, then down, each group seeing the groups
before it pruned. Padding is left out. Each stream costs one forward pass.

Memory beside the model: one group's statistics at a time, and for every calibration token and
stream its hidden state twice and the input of one layer, 2 hidden + intermediate numbers in the
model's dtype; for 128 x 2,048 tokens of an 8B Llama in bf16 12 GB a stream.

Left out: moving hidden states or layers off the model's device, and several processes.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat

import torch
from torch import nn
from tqdm import tqdm
from transformers.masking_utils import create_causal_mask
from transformers.models.llama import LlamaForCausalLM

from pipeline.errors import UserError
from pipeline.models.prunable import decoder_layers, prunable_modules, prunable_weights
from pipeline.pruning.batches import CalibrationBatch
from pipeline.pruning.input_statistics import InputStatistics, InputSums
from pipeline.pruning.layer_steps import SHARED_INPUT_GROUPS, layer_steps

PROGRESS_DELAY_SECONDS = 2.0


@dataclass
class Stream:
    """One batch on its way through the decoder layers."""

    pruned: torch.Tensor
    """(B, S, hidden) input of the next layer in the pruned model."""
    dense: torch.Tensor | None
    """(B, S, hidden) input of the next layer in the dense model; None: not needed."""
    is_token: torch.Tensor
    """(B, S) bool, False = padding."""
    layer_arguments: dict
    """What a decoder layer needs beside its hidden states."""


@torch.no_grad()
def calibrate(
    model: LlamaForCausalLM,
    batches: Sequence[CalibrationBatch],
    visit: Callable[[str, nn.Linear, InputStatistics], None],
    needs: str,
    progress: str | None = None,
) -> None:
    """Calls `visit` once for every prunable linear layer, first to last.

    Args:
        model: In evaluation mode. Tied and untied embeddings, grouped-query attention and biases
            are all fine.
        batches: The calibration set. How it is cut into batches does not matter.
        visit: Gets the weight's name, its module and its input statistics, and may change the
            weight in place; what comes later sees the change in its pruned stream. The statistics
            may be shared by several modules: they must not be changed.
        needs: One of `NEEDS`, the last of the statistics that `visit` looks at; the others are not
            computed. `cross_moment` alone runs the dense stream.
        progress: Name of a progress bar over the layers, shown if they take longer than a few
            seconds; None shows none.

    Raises:
        UserError: There is no calibration token, or an activation is not finite.
    """
    if not any(batch.attention_mask.any() for batch in batches):
        raise UserError("task.num_calibration: there is no calibration token; set at least 1 row")
    names = {weight: name for name, weight in prunable_weights(model).items()}
    streams = [first_layer_input(model, batch, needs) for batch in batches]
    bar = {"desc": progress, "disable": progress is None, "delay": PROGRESS_DELAY_SECONDS}
    for layer in tqdm(decoder_layers(model), **bar):
        dense_layer = copy.deepcopy(layer) if needs == "cross_moment" else None
        steps = [_steps(layer, dense_layer, stream) for stream in streams]
        modules = prunable_modules(layer)
        for group in SHARED_INPUT_GROUPS:
            has_bias = any(modules[local_name].bias is not None for local_name in group)
            statistics = _input_statistics(steps, streams, needs, has_bias)
            if not statistics.input_norm.isfinite().all():
                raise UserError(
                    f"calibration: an input of {names[modules[group[0]].weight]} is not finite; "
                    "set student.dtype to float32 or use other calibration rows"
                )
            for local_name in group:
                module = modules[local_name]
                visit(names[module.weight], module, statistics)
            del statistics  # before the next group's are summed
        for stream, (pruned, dense) in zip(streams, map(next, steps), strict=True):
            stream.pruned, stream.dense = pruned, dense


def first_layer_input(model: LlamaForCausalLM, batch: CalibrationBatch, needs: str) -> Stream:
    """Embeds a batch and prepares the causal mask and rotary embeddings as `LlamaModel` does."""
    input_ids, attention_mask = (tensor.to(model.device) for tensor in batch[:2])
    hidden = model.model.embed_tokens(input_ids)
    position_ids = _position_ids(attention_mask)
    causal_mask = create_causal_mask(
        config=model.config,
        inputs_embeds=hidden,
        attention_mask=attention_mask,
        past_key_values=None,
        position_ids=position_ids,
    )
    layer_arguments = {
        "attention_mask": causal_mask,
        "position_ids": position_ids,
        "position_embeddings": model.model.rotary_emb(hidden, position_ids=position_ids),
    }
    dense = hidden if needs == "cross_moment" else None
    return Stream(hidden, dense, attention_mask.bool(), layer_arguments)


def _position_ids(attention_mask: torch.Tensor) -> torch.Tensor:
    """Positions that count from 0 at each sequence's first token. (B, S) int64 -> (B, S) int64."""
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)


def _steps(
    layer: nn.Module, dense_layer: nn.Module | None, stream: Stream
) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    """What the pruned and the dense layer compute from one batch, step by step."""
    pruned = layer_steps(layer, stream.pruned, stream.layer_arguments)
    if dense_layer is None:
        return zip(pruned, repeat(None))
    return zip(pruned, layer_steps(dense_layer, stream.dense, stream.layer_arguments), strict=True)


def _input_statistics(
    steps: Sequence[Iterator[tuple[torch.Tensor, torch.Tensor | None]]],
    streams: Sequence[Stream],
    needs: str,
    has_bias: bool,
) -> InputStatistics:
    """Takes every batch to the next group's input and adds it up."""
    sums = InputSums(needs, has_bias)
    for stream, (pruned, dense) in zip(streams, map(next, steps), strict=True):
        both = (pruned,) if dense is None else (pruned, dense)
        sums.add(*(real_tokens(inputs, stream) for inputs in both))
    return sums.statistics()


def real_tokens(inputs: torch.Tensor, stream: Stream) -> torch.Tensor:
    """(B, S, in) of a batch -> (tokens, in) without padding, fp32 or fp64."""
    return inputs[stream.is_token].to(torch.promote_types(inputs.dtype, torch.float32))
