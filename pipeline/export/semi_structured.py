"""2:4, at most two kept weights in every four neighbours of a row: what GPUs multiply faster.

The file is `packed.py`'s, which is as small as the hardware's own layout: 4 bits and two values for
every four weights. It is written anywhere; `load` turns it into torch's
`to_sparse_semi_structured` tensors, which exist on NVIDIA GPUs of compute capability 8.0 or newer.
There a product of many rows, such as a prompt, can gain; at decode it is bound by bytes.
"""

from pathlib import Path

import torch
from torch import nn
from torch.sparse import to_sparse_semi_structured
from transformers import LlamaForCausalLM

from pipeline.errors import UserError
from pipeline.export import packed
from pipeline.models.prunable import decoder_layers, prunable_modules, prunable_weights

MIN_CAPABILITY = (8, 0)
ROW_MULTIPLE, COLUMN_MULTIPLE = 32, 64
"""What torch's kernels want of a matrix; others stay dense."""


def prepare(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """The model itself, if every prunable matrix is 2:4 and in bf16.

    Raises:
        UserError: One is not; it names the first row.
    """
    if model.dtype != torch.bfloat16:
        raise UserError(
            f"export.dtype: {str(model.dtype).removeprefix('torch.')}: torch's 2:4 products, for "
            "the format semi_structured, are in 16 bits; set bfloat16"
        )
    for name, weight in prunable_weights(model).items():
        rows, columns = weight.shape
        if columns % 4:
            raise UserError(
                f"export.formats: semi_structured: {name} has {columns} columns, which is no "
                "multiple of 4; leave semi_structured out"
            )
        kept = (weight != 0).view(rows, -1, 4).sum(2)
        unfit = (kept > 2).nonzero()
        if len(unfit):
            row, group = unfit[0].tolist()
            raise UserError(
                f"export.formats: semi_structured: {name}: row {row} keeps {kept[row, group]} of "
                f"columns {4 * group} to {4 * group + 3}, and 2:4 allows 2; prune with prune.scope "
                "2:4, or leave semi_structured out"
            )
    return model


def missing() -> str | None:
    """Why 2:4 products cannot be had on this machine; None where they can."""
    if torch.version.cuda is None or not torch.cuda.is_available():
        return "there is no NVIDIA GPU"
    capability = torch.cuda.get_device_capability()
    if capability < MIN_CAPABILITY:
        return "the GPU has compute capability {}.{}, below 8.0".format(*capability)
    return None


def load(folder: str | Path) -> LlamaForCausalLM:
    """The model that was saved, on the GPU, its matrices 2:4, in evaluation mode.

    Raises:
        UserError: As `packed.load`, or the machine has no such GPU.
    """
    why = missing()
    if why:
        raise UserError(
            f"semi_structured model: {str(folder)!r}: {why}; load it where there is an NVIDIA GPU "
            "of compute capability 8.0 or newer, or with pipeline.export.packed.load"
        )
    return to_semi_structured(packed.load(folder).to("cuda"))


@torch.no_grad()
def to_semi_structured(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """Makes every 2:4 matrix on the GPU semi-structured where its shape allows it."""
    for layer in decoder_layers(model):
        for module in prunable_modules(layer).values():
            rows, columns = module.weight.shape
            if rows % ROW_MULTIPLE == 0 and columns % COLUMN_MULTIPLE == 0:
                weight = to_sparse_semi_structured(module.weight.detach())
                module.weight = nn.Parameter(weight, requires_grad=False)
    return model
