"""The physical cut: an ordinary dense Llama without the channels and heads that contribute nothing.

Channel c of an MLP adds down[:, c] * act(gate[c] . x + b_c) * (up[c] . x + d_c) to the output; b
and d are 0 in a model without MLP biases. It adds exactly nothing, whatever x is, if one of these
holds:

- column c of down is zero,
- row c of up is zero and d_c = 0,
- row c of gate is zero and act(b_c) = 0, as act(0) is for silu.

Query head h of key-value group g adds sum_d o[:, h, d] * (attention-weighted v[g, d]): exactly
nothing if, for each d, the column of o is zero or row d of v and its bias are. A group goes when
all its heads are dead; in the groups that stay, dead heads go as long as all have as many left.

An ordinary Llama has one MLP width, one number of groups and one of heads a group, so the layer
that needs most decides; where that is more than a layer's own, zeros of that layer stay. What is
left out moves nothing but the order of summation: logits are equal to rounding.

Left out: channels that add a constant, which could move into a bias of down; single dimensions of a
head, which rotary embeddings tie to all others; whole blocks.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.models.llama import LlamaForCausalLM

from pipeline.models.prunable import decoder_layers


@dataclass(frozen=True)
class Sizes:
    """What a Llama needs once the dead parts are out, and which layer decides it."""

    intermediate_size: int
    num_key_value_heads: int
    num_attention_heads: int
    widest_mlp: int
    """Index of the layer with the most live MLP channels."""
    widest_attention: int
    """The same for live heads."""

    def are_those_of(self, model: LlamaForCausalLM) -> bool:
        """Whether nothing can be cut out of the model."""
        config = model.config
        return (self.intermediate_size, self.num_key_value_heads, self.num_attention_heads) == (
            config.intermediate_size,
            config.num_key_value_heads,
            config.num_attention_heads,
        )


def needed_sizes(model: LlamaForCausalLM, *, width_multiple: int = 32) -> Sizes:
    """The sizes that hold every live part of every layer.

    Args:
        model: A pruned Llama, its pruned weights zero.
        width_multiple: The MLP width is the next multiple of it, unless that is more than the
            present one.
    """
    layers = decoder_layers(model)
    channels = [int(_live_channels(layer.mlp).sum()) for layer in layers]
    heads = [_live_heads(layer.self_attn) for layer in layers]
    groups = [int(live.any(1).sum()) for live in heads]
    heads_a_group = [int(live.sum(1).max()) for live in heads]
    num_groups, num_heads_a_group = max(1, *groups), max(1, *heads_a_group)
    most = max(1, *channels)
    return Sizes(
        intermediate_size=min(
            -(-most // width_multiple) * width_multiple, model.config.intermediate_size
        ),
        num_key_value_heads=num_groups,
        num_attention_heads=num_groups * num_heads_a_group,
        widest_mlp=_argmax(channels),
        widest_attention=_argmax([a * b for a, b in zip(groups, heads_a_group, strict=True)]),
    )


@torch.no_grad()
def narrow_llama(model: LlamaForCausalLM, *, width_multiple: int = 32) -> LlamaForCausalLM:
    """Cuts the MLP channels and attention heads that contribute nothing out of a copy.

    Args:
        model: A pruned Llama, its pruned weights zero. Stays as it is.
        width_multiple: As in `needed_sizes`.

    Returns:
        A new Llama, its dtype, device, biases and tied embeddings as before, its config with the
        new sizes. Nothing to cut: a copy.
    """
    sizes = needed_sizes(model, width_multiple=width_multiple)
    replaced: dict[int, nn.Parameter] = {}
    for layer in decoder_layers(model):
        _cut_mlp(replaced, layer.mlp, sizes)
        _cut_attention(replaced, layer.self_attn, sizes)
    narrow = copy.deepcopy(model, replaced)
    config = narrow.config
    config.intermediate_size = sizes.intermediate_size
    config.num_key_value_heads = sizes.num_key_value_heads
    config.num_attention_heads = sizes.num_attention_heads
    for layer in decoder_layers(narrow):
        layer.mlp.intermediate_size = sizes.intermediate_size
        layer.self_attn.num_key_value_groups = (
            sizes.num_attention_heads // sizes.num_key_value_heads
        )
        for module in layer.modules():
            if isinstance(module, nn.Linear):
                module.out_features, module.in_features = module.weight.shape
    return narrow


def _cut_mlp(replaced: dict[int, nn.Parameter], mlp: nn.Module, sizes: Sizes) -> None:
    kept = _live_first(_live_channels(mlp), sizes.intermediate_size)
    _cut_rows(replaced, mlp.gate_proj, kept)
    _cut_rows(replaced, mlp.up_proj, kept)
    _replace(replaced, mlp.down_proj.weight, 1, kept)


def _cut_attention(replaced: dict[int, nn.Parameter], attention: nn.Module, sizes: Sizes) -> None:
    live = _live_heads(attention)
    heads_a_group = sizes.num_attention_heads // sizes.num_key_value_heads
    groups = _live_first(live.any(1), sizes.num_key_value_heads)
    heads = torch.stack(
        [group * live.shape[1] + _live_first(live[group], heads_a_group) for group in groups]
    ).flatten()
    query, key_value = (_rows(index, attention.head_dim) for index in (heads, groups))
    _cut_rows(replaced, attention.q_proj, query)
    _cut_rows(replaced, attention.k_proj, key_value)
    _cut_rows(replaced, attention.v_proj, key_value)
    _replace(replaced, attention.o_proj.weight, 1, query)


def _live_channels(mlp: nn.Module) -> Tensor:
    """(channels,) bool: False where a channel of a `LlamaMLP` adds nothing to any output."""
    gate, up, down = mlp.gate_proj, mlp.up_proj, mlp.down_proj
    at_zero = torch.zeros_like(gate.weight[:, 0]) if gate.bias is None else gate.bias
    gate_is_zero = (gate.weight == 0).all(1) & (mlp.act_fn(at_zero) == 0)
    return ~(gate_is_zero | ~_live_rows(up) | (down.weight == 0).all(0))


def _live_heads(attention: nn.Module) -> Tensor:
    """(key-value heads, query heads of each) bool: False where a head adds nothing."""
    size = attention.head_dim
    values = _live_rows(attention.v_proj).view(-1, 1, size)
    outputs = (attention.o_proj.weight != 0).any(0)
    return (values & outputs.view(len(values), -1, size)).any(-1)


def _live_rows(module: nn.Linear) -> Tensor:
    """(out,) bool: False where an output is zero whatever the input."""
    live = (module.weight != 0).any(1)
    return live if module.bias is None else live | (module.bias != 0)


def _live_first(live: Tensor, number: int) -> Tensor:
    """`number` indices in their own order: the live ones, and as many dead ones as it takes."""
    return live.int().argsort(descending=True, stable=True)[:number].sort().values


def _rows(heads: Tensor, size: int) -> Tensor:
    """Indices of the rows of a projection that belong to heads."""
    return (heads[:, None] * size + torch.arange(size, device=heads.device)).flatten()


def _cut_rows(replaced: dict[int, nn.Parameter], module: nn.Linear, kept: Tensor) -> None:
    _replace(replaced, module.weight, 0, kept)
    if module.bias is not None:
        _replace(replaced, module.bias, 0, kept)


def _replace(
    replaced: dict[int, nn.Parameter], parameter: nn.Parameter, dim: int, kept: Tensor
) -> None:
    """Notes that a copy of `parameter` holds only the `kept` indices of `dim`."""
    narrow = nn.Parameter(parameter.index_select(dim, kept), parameter.requires_grad)
    replaced[id(parameter)] = narrow


def _argmax(values: Sequence[int]) -> int:
    return max(range(len(values)), key=values.__getitem__)
