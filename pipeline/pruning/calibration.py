"""The one calibration loop of all methods: layer by layer, each seeing the ones before it pruned.

The *pruned* stream is what the model computes so far, all earlier linear layers pruned. A second,
*dense* stream, what the untouched model computes, runs beside it only where something needs it. For
a linear layer with inputs X_p and X_d (tokens, in) of the two streams a method gets the norms of
X_p's channels (enough for a score), X_pᵀ X_p (for SparseGPT) and X_pᵀ X_d with both means (for a
redistribution against the dense output X_d Wᵀ), as much of it as it asks for. Inside a decoder
layer the order is q, k, v, then o, then gate, up, then down, each group seeing the groups before it
pruned. Padding is left out. Only one group's statistics exist at a time, and each stream costs one
forward pass.

Left out: moving hidden states or layers off the model's device, and several processes.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import repeat

import torch
from torch import nn
from tqdm import tqdm
from transformers.masking_utils import create_causal_mask
from transformers.models.llama import LlamaForCausalLM

from pipeline.errors import UserError
from pipeline.models.prunable import decoder_layers, prunable_modules, prunable_weights
from pipeline.pruning.batches import CalibrationBatch
from pipeline.pruning.hessian import damped_hessian, inverse_factor
from pipeline.pruning.layer_steps import SHARED_INPUT_GROUPS, layer_steps

PROGRESS_DELAY_SECONDS = 2.0

NEEDS = ("input_norm", "second_moment", "cross_moment")
"""Fields of `InputStatistics`; who needs one gets those before it too."""


@dataclass(frozen=True)
class InputStatistics:
    """What the calibration tokens say about the input of one linear layer. All fp64."""

    input_norm: torch.Tensor
    """(in,) L2 norm of each input channel over the tokens of the pruned stream."""
    second_moment: torch.Tensor | None = None
    """(in, in) X_pᵀ X_p, summed over tokens."""
    cross_moment: torch.Tensor | None = None
    """(in, in) X_pᵀ X_d, summed over tokens; row: pruned stream, column: dense stream."""
    pruned_mean: torch.Tensor | None = None
    """(in,) mean over the tokens of the pruned stream; comes with the cross moment."""
    dense_mean: torch.Tensor | None = None
    """(in,) the same of the dense stream."""
    num_tokens: int = 0
    """Tokens behind the sums; comes with the cross moment."""

    @cached_property
    def inverse_factor(self) -> torch.Tensor:
        """(in, in) U with UᵀU = H⁻¹, see `hessian.py`; modules that share an input share it."""
        return inverse_factor(damped_hessian(self.second_moment))

    @cached_property
    def centred(self) -> "InputStatistics":
        """The same with the moments about the means: what is left to weights beside a free bias."""
        outer = self.num_tokens * self.pruned_mean[:, None]
        return replace(
            self,
            second_moment=self.second_moment - outer * self.pruned_mean,
            cross_moment=self.cross_moment - outer * self.dense_mean,
        )


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
            statistics = _input_statistics(steps, streams, needs)
            if not statistics.input_norm.isfinite().all():
                raise UserError(
                    f"calibration: an input of {names[modules[group[0]].weight]} is not finite; "
                    "set student.dtype to float32 or use other calibration rows"
                )
            for local_name in group:
                module = modules[local_name]
                visit(names[module.weight], module, statistics)
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
) -> InputStatistics:
    """Takes every batch to the next group's input and sums its moments.

    Products are taken in fp32 (fp64 for a fp64 model) per batch and added up in fp64.
    """
    square_sum, second_moment, cross_moment = 0.0, 0.0, 0.0
    pruned_sum, dense_sum, num_tokens = 0.0, 0.0, 0
    for stream, (pruned, dense) in zip(streams, map(next, steps), strict=True):
        pruned = real_tokens(pruned, stream)
        if needs == "input_norm":
            square_sum = square_sum + pruned.square().sum(0).double()
            continue
        second_moment = second_moment + (pruned.T @ pruned).double()
        if needs == "cross_moment":
            dense = real_tokens(dense, stream)
            cross_moment = cross_moment + (pruned.T @ dense).double()
            pruned_sum = pruned_sum + pruned.double().sum(0)
            dense_sum = dense_sum + dense.double().sum(0)
            num_tokens += len(pruned)
    if needs == "input_norm":
        return InputStatistics(square_sum.sqrt())
    norm = second_moment.diagonal().sqrt()
    if needs == "second_moment":
        return InputStatistics(norm, second_moment)
    means = pruned_sum / num_tokens, dense_sum / num_tokens
    return InputStatistics(norm, second_moment, cross_moment, *means, num_tokens)


def real_tokens(inputs: torch.Tensor, stream: Stream) -> torch.Tensor:
    """(B, S, in) of a batch -> (tokens, in) without padding, fp32 or fp64."""
    return inputs[stream.is_token].to(torch.promote_types(inputs.dtype, torch.float32))
