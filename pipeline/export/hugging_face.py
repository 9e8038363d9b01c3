"""Hugging Face: an ordinary model folder, zeros and all: any software loads it, none gains."""

from pathlib import Path

from transformers import LlamaForCausalLM


def save(model: LlamaForCausalLM, folder: Path) -> None:
    """Writes configs and safetensors."""
    model.save_pretrained(folder)


def load(folder: str | Path) -> LlamaForCausalLM:
    """The model as transformers loads it, in the dtype it was saved in, in evaluation mode."""
    return LlamaForCausalLM.from_pretrained(folder, dtype="auto", use_safetensors=True).eval()
