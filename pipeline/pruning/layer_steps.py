"""A Llama decoder layer, run step by step: it stops wherever linear layers read their input.

A caller that prunes those linear layers before it goes on gets the outputs of the pruned ones, and
the whole layer costs one forward pass, however often it stops.

Left out: key-value caches, attention weights as an output, dropout.
"""

from collections.abc import Iterator

import torch
from torch import nn

SHARED_INPUT_GROUPS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
"""Linear layers of a Llama decoder layer that read the same input, in the order of the forward."""


def layer_steps(
    layer: nn.Module, hidden: torch.Tensor, layer_arguments: dict
) -> Iterator[torch.Tensor]:
    """Runs a decoder layer as far as each group's input.

    Args:
        layer: A `LlamaDecoderLayer` in evaluation mode. Its weights may change between two steps.
        hidden: (B, S, hidden) input of the layer.
        layer_arguments: What its attention needs beside: mask, positions, rotary embeddings.

    Yields:
        The input (B, S, in) of each of `SHARED_INPUT_GROUPS`, then the layer's output
        (B, S, hidden).
    """
    attention, mlp = layer.self_attn, layer.mlp
    inputs = layer.input_layernorm(hidden)
    yield inputs
    inputs = _heads(attention, inputs, layer_arguments)
    yield inputs
    hidden = hidden + attention.o_proj(inputs)
    inputs = layer.post_attention_layernorm(hidden)
    yield inputs
    inputs = mlp.act_fn(mlp.gate_proj(inputs)) * mlp.up_proj(inputs)
    yield inputs
    yield hidden + mlp.down_proj(inputs)


def _heads(attention: nn.Module, inputs: torch.Tensor, layer_arguments: dict) -> torch.Tensor:
    """The attention's (B, S, heads x head size), before its output projection."""
    projection, attention.o_proj = attention.o_proj, nn.Identity()
    try:
        return attention(hidden_states=inputs, **layer_arguments)[0]
    finally:
        attention.o_proj = projection
