"""The formats by name, and the proof that one of them loads as what it was written from."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import LlamaForCausalLM

from pipeline.export import hugging_face, packed


@dataclass(frozen=True)
class Format:
    """How a model is written and loaded again."""

    save: Callable[[LlamaForCausalLM, Path], None]
    load: Callable[[str | Path], LlamaForCausalLM]
    loading_lines: tuple[str, ...]
    """Python that loads it from the folder `path`, for the model card."""


FORMATS = {
    "hf": Format(
        hugging_face.save,
        hugging_face.load,
        (
            "from transformers import AutoModelForCausalLM",
            'model = AutoModelForCausalLM.from_pretrained(path, dtype="auto")',
        ),
    ),
    "packed": Format(
        packed.save,
        packed.load,
        ("from pipeline.export import packed", "model = packed.load(path)"),
    ),
}


def differing_weights(model: LlamaForCausalLM, other: LlamaForCausalLM) -> list[str]:
    """Names of weights that only one model has, or that differ in type, shape or any value."""
    ours, theirs = dict(model.named_parameters()), dict(other.named_parameters())
    return sorted(ours.keys() ^ theirs.keys()) + [
        name
        for name in ours.keys() & theirs.keys()
        if ours[name].dtype != theirs[name].dtype or not torch.equal(ours[name], theirs[name])
    ]


@torch.inference_mode()
def same_logits(
    model: LlamaForCausalLM, other: LlamaForCausalLM, prompts: Sequence[Sequence[int]]
) -> bool:
    """Whether two models give each prompt (token ids) the same logits, bit for bit.

    Weights mapped from a file may lie at any address, and a matrix product may add up in another
    order there; both models are compared on weights at the allocator's addresses.
    """
    for parameter in [*model.parameters(), *other.parameters()]:
        parameter.data = parameter.data.clone()
    return all(
        torch.equal(model(ids).logits, other(ids).logits)
        for ids in (torch.tensor([prompt]) for prompt in prompts)
    )
