"""The physical cut: an ordinary dense Llama without the MLP channels that contribute nothing.

Channel c of an MLP adds down[:, c] * act(gate[c] . x + b_c) * (up[c] . x + d_c) to the output; b
and d are 0 in a model without MLP biases. It adds exactly nothing, whatever x is, if one of these
holds:

- column c of down is zero,
- row c of up is zero and d_c = 0,
- row c of gate is zero and act(b_c) = 0, as act(0) is for silu.

An ordinary Llama has one MLP width, so every layer keeps as many channels as the layer that needs
most; where that is more than a layer's own, zeros of that layer stay. What is left out moves
nothing but the order of summation: logits are equal to rounding.

Left out: channels that add a constant, which could move into a bias of down; whole blocks; heads.
"""

import copy

import torch
from torch import Tensor, nn
from transformers.models.llama import LlamaForCausalLM

from pipeline.models.prunable import decoder_layers


@torch.no_grad()
def narrow_mlp(model: LlamaForCausalLM, *, width_multiple: int = 32) -> LlamaForCausalLM:
    """Cuts the MLP channels that contribute nothing out of a copy.

    Args:
        model: A pruned Llama, its pruned weights zero. Stays as it is.
        width_multiple: The new width is the next multiple of it, unless that is more than the
            present width.

    Returns:
        A new Llama, its dtype, device, biases and tied embeddings as before, its
        `config.intermediate_size` the new width. Nothing to cut: a copy.
    """
    mlps = [layer.mlp for layer in decoder_layers(model)]
    live = [_live_channels(mlp) for mlp in mlps]
    most = max(1, *(int(channels.sum()) for channels in live))
    width = min(-(-most // width_multiple) * width_multiple, mlps[0].down_proj.in_features)
    replaced: dict[int, nn.Parameter] = {}
    for mlp, is_live in zip(mlps, live, strict=True):
        # Live channels first, as many dead ones as it takes, then back into their old order.
        kept = is_live.int().argsort(descending=True, stable=True)[:width].sort().values
        for module in (mlp.gate_proj, mlp.up_proj):
            _replace(replaced, module.weight, 0, kept)
            if module.bias is not None:
                _replace(replaced, module.bias, 0, kept)
        _replace(replaced, mlp.down_proj.weight, 1, kept)
    narrow = copy.deepcopy(model, replaced)
    narrow.config.intermediate_size = width
    for layer in decoder_layers(narrow):
        layer.mlp.intermediate_size = width
        layer.mlp.gate_proj.out_features = layer.mlp.up_proj.out_features = width
        layer.mlp.down_proj.in_features = width
    return narrow


def _live_channels(mlp: nn.Module) -> Tensor:
    """(channels,) bool: False where a channel of a `LlamaMLP` adds nothing to any output."""
    gate, up, down = mlp.gate_proj, mlp.up_proj, mlp.down_proj
    at_zero = torch.zeros_like(gate.weight[:, 0]) if gate.bias is None else gate.bias
    gate_is_zero = (gate.weight == 0).all(1) & (mlp.act_fn(at_zero) == 0)
    up_is_zero = (up.weight == 0).all(1)
    if up.bias is not None:
        up_is_zero &= up.bias == 0
    return ~(gate_is_zero | up_is_zero | (down.weight == 0).all(0))


def _replace(
    replaced: dict[int, nn.Parameter], parameter: nn.Parameter, dim: int, kept: Tensor
) -> None:
    """Notes that a copy of `parameter` holds only the `kept` indices of `dim`."""
    narrow = nn.Parameter(parameter.index_select(dim, kept), parameter.requires_grad)
    replaced[id(parameter)] = narrow
