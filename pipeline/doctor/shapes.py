"""How large a model is, without its weights: config.json on the meta device, safetensors headers.

A folder that holds config.json and a tokenizer alone is enough to plan a run. Where there are
safetensors files too, the shapes in their headers are compared with those of config.json.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, PretrainedConfig

from pipeline.models.prunable import decoder_layers, prunable_weights

NO_WEIGHTS = "no weights there yet"


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Numbers of weights, and the widths that activations have."""

    num_weights: int
    num_prunable: int
    matrix_widths: int
    """Sum of rows and columns of all prunable matrices; times r the weights of LoRA adapters."""
    largest_layer: int
    """Weights of the largest decoder layer, embedding or head: what ZeRO-3 gathers at once."""
    num_layers: int
    hidden: int
    attention: int
    """Heads x width of a head."""
    key_value: int
    """The same of keys, or of values, which have fewer heads."""
    mlp: int
    vocabulary: int


def meta_model(config: PretrainedConfig) -> torch.nn.Module:
    """The model of a config with shapes and no storage."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def shape_of(model: torch.nn.Module) -> ModelShape:
    """Counts a Llama, which may be on the meta device.

    Raises:
        UserError: It has nothing to prune.
    """
    config = model.config
    prunable = prunable_weights(model)
    parts = [*decoder_layers(model), model.get_input_embeddings(), model.get_output_embeddings()]
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return ModelShape(
        num_weights=sum(p.numel() for p in model.parameters()),
        num_prunable=sum(p.numel() for p in prunable.values()),
        matrix_widths=sum(sum(p.shape) for p in prunable.values()),
        largest_layer=max(sum(p.numel() for p in part.parameters()) for part in parts),
        num_layers=len(decoder_layers(model)),
        hidden=config.hidden_size,
        attention=config.num_attention_heads * head,
        key_value=config.num_key_value_heads * head,
        mlp=config.intermediate_size,
        vocabulary=config.vocab_size,
    )


def weight_file_fault(model: torch.nn.Module, folder: Path) -> str | None:
    """What is wrong with the safetensors files of a local model; None where they fit.

    Args:
        model: On the meta device, from the folder's config.json.
        folder: The model's.

    Returns:
        `NO_WEIGHTS` where there is no such file, else the first fault.
    """
    files = sorted(folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            named = set(json.loads(index.read_text())["weight_map"].values())
        except (ValueError, KeyError, AttributeError):
            return f"{index.name} is no index of safetensors files"
        missing = sorted(named - {file.name for file in files})
        if missing:
            return f"{missing[0]}, which {index.name} names, is missing ({len(missing)} in all)"
    if not files:
        return NO_WEIGHTS
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as content:
                shapes |= {n: tuple(content.get_slice(n).get_shape()) for n in content.keys()}
        except (SafetensorError, OSError) as error:
            return f"{file.name} is not a whole safetensors file ({error})"
    for name, weight in model.named_parameters():
        if name not in shapes:
            return f"{name} is in none of its safetensors files"
        if shapes[name] != tuple(weight.shape):
            return f"{name} is {shapes[name]} there and {tuple(weight.shape)} by config.json"
    return None
