"""Which weights of a Llama can be pruned: the linear layers inside its decoder layers.

Embeddings, norms and `lm_head` are never pruned. The choice is made here and nowhere else; a model
in which it finds nothing is refused.
"""

import torch
from torch import nn

from pipeline.errors import UserError

PRUNABLE_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder layers of a `LlamaForCausalLM`, first to last."""
    return model.model.layers


def prunable_modules(layer: nn.Module) -> dict[str, nn.Linear]:
    """The prunable linear modules of one decoder layer.

    Returns:
        Local name (`self_attn.q_proj`) to module, in the order in which the layer applies them.
    """
    return {
        name: module
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear) and name.rsplit(".", 1)[-1] in PRUNABLE_PROJECTIONS
    }


def prunable_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every prunable weight of the model.

    Returns:
        Name as in the state dict (`model.layers.0.self_attn.q_proj.weight`) to parameter of shape
        (out, in), in model order.

    Raises:
        UserError: The model holds no such weight.
    """
    weights = {
        f"model.layers.{index}.{name}.weight": module.weight
        for index, layer in enumerate(decoder_layers(model))
        for name, module in prunable_modules(layer).items()
    }
    if not weights:
        raise UserError(
            f"student.path: {type(model).__name__} has no linear layers named "
            f"{', '.join(PRUNABLE_PROJECTIONS)}; set a Llama model"
        )
    return weights


def count_zeros(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Zeros and elements of every prunable weight, counted in the weights themselves."""
    return {
        name: (int((weight == 0).sum()), weight.numel())
        for name, weight in prunable_weights(model).items()
    }


def measured_sparsity(model: nn.Module) -> tuple[float, dict[str, float]]:
    """Sparsity counted in the weights themselves, never taken from a mask.

    Returns:
        Sparsity of all prunable weights together, and of each by name. Both in [0, 1].
    """
    zeros = count_zeros(model)
    total = sum(zero for zero, _ in zeros.values()) / sum(numel for _, numel in zeros.values())
    return total, {name: zero / numel for name, (zero, numel) in zeros.items()}


@torch.no_grad()
def apply_masks(model: nn.Module, masks: dict[str, torch.Tensor]) -> None:
    """Zeroes every pruned weight in place. `masks`: name to bool (out, in), True = kept."""
    weights = prunable_weights(model)
    for name, mask in masks.items():
        weights[name].mul_(mask.to(weights[name].device))
