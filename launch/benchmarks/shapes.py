"""Model shapes of the suites: YAML to Llamas with random weights."""

from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import ConfigDict
from transformers import LlamaConfig, LlamaForCausalLM

from launch.typed_yaml import Kind, read_typed
from pipeline.models.prunable import prunable_weights


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A Llama, and one training step of it."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int = 4
    num_key_value_heads: int = 4
    vocab_size: int = 128
    device: str = "cpu"
    """Where it is timed."""
    batch_size: int | None = None
    """Completions in one training step; None: no training step is timed."""
    sequence_length: int | None = None
    """Tokens of each."""
    share_goal: float | None = None
    """Most that the engine should add to a training step, as a fraction of it."""

    def model(self, device: torch.device | str) -> LlamaForCausalLM:
        """The Llama, in fp32; on the device `meta` it has shapes and no values."""
        config = LlamaConfig(
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_key_value_heads,
            vocab_size=self.vocab_size,
            max_position_embeddings=self.sequence_length or 128,
            tie_word_embeddings=True,
        )
        with torch.device(device):
            return LlamaForCausalLM(config)

    def prunable_shapes(self) -> dict[str, torch.Size]:
        """Name to shape of every prunable weight, in model order."""
        return {name: w.shape for name, w in prunable_weights(self.model("meta")).items()}


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """What the suite measures."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    shapes: dict[str, Shape]
    """Timed."""
    communication: dict[str, Shape]
    """Only the bytes sent are counted."""


def load_shapes(path: Path, kind: type[Kind] = Shapes) -> Kind:
    """Reads a suite's YAML, as `read_typed` does."""
    return read_typed(path, kind, "shapes")
