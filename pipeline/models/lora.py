"""LoRA students: peft's adapters on every prunable projection, with the product masked.

peft makes and names the factors, freezes the rest, and saves and loads adapters; only the forward
pass of its linear layer is ours (`sparsity/low_rank.py`), because peft's own computes with pruned
weights as if they were kept, and its merge fills them in.

The base weight never changes while adapters train. So with adapters disabled the model is exactly
the student that the stage began with: what TRL takes for the reference of `beta`.

The mask is replicated: one bit a weight on every rank, also where ZeRO-3 cuts the base weight.
"""

from peft import LoraConfig, PeftModel
from peft.tuners.lora import Linear
from torch import Tensor, nn

from pipeline.models.prunable import PRUNABLE_PROJECTIONS, decoder_layers
from pipeline.sparsity.bits import full_bits
from pipeline.sparsity.low_rank import MaskedLowRankLinear, effective_weight

ADAPTER = "default"
PREFIX = "base_model.model."
"""What peft puts before the model's own names."""


class MaskedLoraLinear(Linear):
    """peft's LoRA layer over `nn.Linear`, computing with mask * (W + s B A)."""

    mask: Tensor
    """uint8 (ceil(out * in / 8),), packed, set = kept; all are until a mask is bound."""

    def __init__(self, *args, **kwargs):
        """As peft calls it."""
        super().__init__(*args, **kwargs)
        numel = self.in_features * self.out_features
        self.mask = full_bits(numel, self.base_layer.weight.device)

    @property
    def factors(self) -> tuple[nn.Parameter, nn.Parameter, nn.Parameter]:
        """W (out, in), A (r, in), B (out, r); in pieces under ZeRO-3."""
        return (
            self.base_layer.weight,
            self.lora_A[ADAPTER].weight,
            self.lora_B[ADAPTER].weight,
        )

    @property
    def scale(self) -> float:
        """The factor s = alpha / r."""
        return self.scaling[ADAPTER]

    def forward(self, hidden: Tensor, *args, **kwargs) -> Tensor:
        """(..., in) to (..., out); with adapters disabled the base layer alone."""
        if self.disable_adapters:
            return self.base_layer(hidden)
        assert self.active_adapters == [ADAPTER], "a second adapter has no mask"
        return MaskedLowRankLinear.apply(
            hidden, *self.factors, self.mask, self.scale, self.base_layer.bias
        )

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refused: peft would merge the product without its mask. See `merged_state_dict`."""
        raise NotImplementedError("a masked adapter is merged by merged_state_dict")


def lora_config(*, r: int, alpha: float) -> LoraConfig:
    """Adapters on every prunable projection, for the `peft_config` of a TRL trainer.

    A trainer that is given a model with adapters instead takes them for pretrained ones, and under
    `beta` adds a second set as the reference. B starts at 0, so the function does not change.

    Args:
        r: Rank of the product.
        alpha: The product counts alpha / r.
    """
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=r,
        lora_alpha=alpha,
        lora_dropout=0.0,
        bias="none",
        target_modules=list(PRUNABLE_PROJECTIONS),
    )
    config._register_custom_module({nn.Linear: MaskedLoraLinear})
    return config


def lora_layers(model: nn.Module) -> dict[str, MaskedLoraLinear]:
    """The adapted layers of a model, by the name their weight has in an ordinary Llama.

    Returns:
        In model order; empty for a model without adapters.
    """
    if not isinstance(model, PeftModel):
        return {}
    return {
        f"model.layers.{index}.{name}.weight": module
        for index, layer in enumerate(decoder_layers(model.get_base_model()))
        for name, module in layer.named_modules()
        if isinstance(module, MaskedLoraLinear)
    }


def adapters_disabled(model: nn.Module) -> bool:
    """Whether a model computes without its adapters now; False for one that has none."""
    return any(layer.disable_adapters for layer in lora_layers(model).values())


def merged_state_dict(model: PeftModel, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of an ordinary Llama that computes what the trained model computes.

    Every adapted weight is formed as in the forward pass, on the same device, and rounded to the
    base weight's type; its zeros are those of the mask, exactly.

    Args:
        model: Gives masks and scale.
        state_dict: Its whole state dict, gathered where it was in pieces.

    Returns:
        Name, as it was without adapters, to tensor.
    """
    merged = {
        key.removeprefix(PREFIX).replace(".base_layer.", "."): tensor
        for key, tensor in state_dict.items()
        if ".lora_" not in key
    }
    for name, layer in lora_layers(model).items():
        path = PREFIX + name.removesuffix(".weight")
        keys = ("base_layer", f"lora_A.{ADAPTER}", f"lora_B.{ADAPTER}")
        factors = [state_dict[f"{path}.{key}.weight"] for key in keys]
        base = factors[0]
        moved = [factor.to(layer.mask.device) for factor in factors]
        merged[name] = effective_weight(*moved, layer.scale, layer.mask).to(base.device, base.dtype)
    return merged
