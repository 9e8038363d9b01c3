"""The one calibration loop: layer by layer, dense and pruned activations side by side.

Two streams run through the decoder layers. The *dense* stream is what the untouched model computes,
the *pruned* stream what the model computes so far, all earlier linear layers pruned. For a linear
layer with inputs X_d and X_p (tokens, in) of the two streams a method gets X_pᵀ X_p and X_pᵀ X_d,
which is all that a score, or a redistribution against the dense output X_d Wᵀ, needs. Inside a
decoder layer the order is q, k, v, then o, then gate, up, then down, each group seeing the groups
before it pruned. Padding is left out. Only one group's statistics exist at a time.

Left out: moving hidden states or layers off the model's device, and several processes.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from tqdm import tqdm
from transformers.masking_utils import create_causal_mask
from transformers.models.llama import LlamaForCausalLM

from pipeline.errors import UserError
from pipeline.models.prunable import decoder_layers, prunable_modules, prunable_weights
from pipeline.pruning.batches import CalibrationBatch

PROGRESS_DELAY_SECONDS = 2.0

SHARED_INPUT_GROUPS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
"""Linear layers of a Llama decoder layer that read the same input, in the order of the forward."""


@dataclass(frozen=True)
class InputStatistics:
    """What the calibration tokens say about the input of one linear layer. All fp64."""

    second_moment: torch.Tensor
    """(in, in) X_pᵀ X_p, summed over tokens."""
    cross_moment: torch.Tensor
    """(in, in) X_pᵀ X_d, summed over tokens; row: pruned stream, column: dense stream."""

    @property
    def input_norm(self) -> torch.Tensor:
        """(in,) L2 norm of each input channel over the tokens of the pruned stream."""
        return self.second_moment.diagonal().sqrt()


@dataclass
class _Stream:
    """One batch on its way through the decoder layers."""

    dense: torch.Tensor
    """(B, S, hidden) input of the next layer in the dense model."""
    pruned: torch.Tensor
    """(B, S, hidden) input of the next layer in the pruned model."""
    is_token: torch.Tensor
    """(B, S) bool, False = padding."""
    layer_arguments: dict
    """What a decoder layer needs beside its hidden states."""


@torch.no_grad()
def calibrate(
    model: LlamaForCausalLM,
    batches: Sequence[CalibrationBatch],
    visit: Callable[[str, nn.Linear, InputStatistics], None],
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
        progress: Name of a progress bar over the layers, shown if they take longer than a few
            seconds; None shows none.

    Raises:
        UserError: There is no calibration token, or an activation is not finite.
    """
    if not any(batch.attention_mask.any() for batch in batches):
        raise UserError("task.num_calibration: there is no calibration token; set at least 1 row")
    names = {weight: name for name, weight in prunable_weights(model).items()}
    streams = [_first_layer_input(model, batch) for batch in batches]
    bar = {"desc": progress, "disable": progress is None, "delay": PROGRESS_DELAY_SECONDS}
    for layer in tqdm(decoder_layers(model), **bar):
        dense_layer = copy.deepcopy(layer)
        modules = prunable_modules(layer)
        for group in SHARED_INPUT_GROUPS:
            statistics = _input_statistics(layer, dense_layer, group[0], streams)
            if not statistics.second_moment.isfinite().all():
                raise UserError(
                    f"calibration: an input of {names[modules[group[0]].weight]} is not finite; "
                    "set student.dtype to float32 or use other calibration rows"
                )
            for local_name in group:
                module = modules[local_name]
                visit(names[module.weight], module, statistics)
        for stream in streams:
            stream.dense = dense_layer(stream.dense, **stream.layer_arguments)
            stream.pruned = layer(stream.pruned, **stream.layer_arguments)


def _first_layer_input(model: LlamaForCausalLM, batch: CalibrationBatch) -> _Stream:
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
    return _Stream(hidden, hidden, attention_mask.bool(), layer_arguments)


def _position_ids(attention_mask: torch.Tensor) -> torch.Tensor:
    """Positions that count from 0 at each sequence's first token. (B, S) int64 -> (B, S) int64."""
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)


def _input_statistics(
    layer: nn.Module, dense_layer: nn.Module, local_name: str, streams: Sequence[_Stream]
) -> InputStatistics:
    """Sums the moments of one linear layer's inputs over all batches.

    Products are taken in fp32 (fp64 for a fp64 model) per batch and added up in fp64.
    """
    second_moment, cross_moment = 0.0, 0.0
    for stream in streams:
        pruned = _module_input(layer, local_name, stream.pruned, stream)
        dense = _module_input(dense_layer, local_name, stream.dense, stream)
        second_moment = second_moment + (pruned.T @ pruned).double()
        cross_moment = cross_moment + (pruned.T @ dense).double()
    return InputStatistics(second_moment, cross_moment)


def _module_input(
    layer: nn.Module, local_name: str, hidden: torch.Tensor, stream: _Stream
) -> torch.Tensor:
    """Runs a decoder layer and returns the (tokens, in) input of one of its linear layers."""
    with _captured_input(layer.get_submodule(local_name)) as captured:
        layer(hidden, **stream.layer_arguments)
    inputs = captured[0][stream.is_token]
    return inputs.to(torch.promote_types(inputs.dtype, torch.float32))


@contextmanager
def _captured_input(module: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Collects what the module is called with while the context is open."""
    captured: list[torch.Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, inputs: captured.append(inputs[0]))
    try:
        yield captured
    finally:
        handle.remove()
