"""The formats by name, and the proof that one of them loads as what it was written from."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from pipeline.export import csr, hugging_face, narrow, packed, semi_structured

TOLERANCE = 1e-4
"""Most that logits may differ where sums have another order, in fp32, of the largest logit."""


@dataclass(frozen=True)
class Format:
    """How a model is written and loaded again."""

    save: Callable[[LlamaForCausalLM, Path], None]
    load: Callable[[str | Path], LlamaForCausalLM]
    """What the export is checked by; runs on a CPU."""
    loading_lines: tuple[str, ...]
    """Python that loads it from the folder `path`, for the model card."""
    exact: bool = True
    """Whether the logits are the student's bit for bit; otherwise to `TOLERANCE`."""


_TRANSFORMERS = (
    "from transformers import AutoModelForCausalLM",
    'model = AutoModelForCausalLM.from_pretrained(path, dtype="auto")',
)


def _own(module: str) -> tuple[str, str]:
    return f"from pipeline.export import {module}", f"model = {module}.load(path)"


FORMATS = {
    "hf": Format(hugging_face.save, hugging_face.load, _TRANSFORMERS),
    "packed": Format(packed.save, packed.load, _own("packed")),
    "csr": Format(packed.save, csr.load, _own("csr"), exact=False),
    "semi_structured": Format(packed.save, packed.load, _own("semi_structured")),
    "narrow": Format(hugging_face.save, hugging_face.load, _TRANSFORMERS, exact=False),
}


def prepared(name: str, student: LlamaForCausalLM, *, width_multiple: int) -> LlamaForCausalLM:
    """The model that a format writes: the student itself, or its narrower copy.

    Args:
        name: One of `FORMATS`.
        student: With its pruned weights zero.
        width_multiple: `prune.width_multiple`, for narrow.

    Raises:
        UserError: The format does not fit the mask.
    """
    if name == "csr":
        return csr.prepare(student)
    if name == "semi_structured":
        return semi_structured.prepare(student)
    if name == "narrow":
        return narrow.prepare(student, width_multiple=width_multiple)
    return student


def differing_weights(model: LlamaForCausalLM, other: LlamaForCausalLM) -> list[str]:
    """Names of weights that only one model has, or that differ in type, shape or any value."""
    ours, theirs = _weights(model), _weights(other)
    return sorted(ours.keys() ^ theirs.keys()) + [
        name
        for name in ours.keys() & theirs.keys()
        if ours[name].dtype != theirs[name].dtype or not torch.equal(ours[name], theirs[name])
    ]


def _weights(model: LlamaForCausalLM) -> dict[str, Tensor]:
    sparse = {
        f"{name}.weight": module.dense_weight()
        for name, module in model.named_modules()
        if isinstance(module, csr.CsrLinear)
    }
    return dict(model.named_parameters()) | sparse


@torch.inference_mode()
def same_logits(
    model: LlamaForCausalLM, other: LlamaForCausalLM, prompts: Sequence[Sequence[int]]
) -> bool:
    """Whether two models give each prompt (token ids) the same logits, bit for bit."""
    reallocate(model)
    reallocate(other)
    return all(
        torch.equal(model(ids).logits, other(ids).logits)
        for ids in (torch.tensor([prompt]) for prompt in prompts)
    )


@torch.inference_mode()
def logits_difference(
    model: LlamaForCausalLM, other: LlamaForCausalLM, prompts: Sequence[Sequence[int]]
) -> tuple[float, float]:
    """The largest difference of any logit of any prompt, and the largest logit of `model`.

    The models may differ in dtype and device.
    """
    reallocate(model)
    reallocate(other)
    differences, largest = [], []
    for ids in (torch.tensor([prompt]) for prompt in prompts):
        ours, theirs = (m(ids.to(m.device)).logits.float().cpu() for m in (model, other))
        differences.append(float((ours - theirs).abs().max()))
        largest.append(float(ours.abs().max()))
    return max(differences), max(largest)


def reallocate(model: LlamaForCausalLM) -> None:
    """Moves weights on the CPU to addresses of the allocator.

    Weights mapped from a file may lie at any address, where a matrix product may add up in another
    order.
    """
    for parameter in model.parameters():
        if parameter.device.type == "cpu":
            parameter.data = parameter.data.clone()
