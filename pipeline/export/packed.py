"""Packed: one mask bit per prunable weight and the values that are kept, in one safetensors file.

    bits a prunable weight = 1 + (1 - sparsity) x bits of a value        90 % in bf16: 2.6 of 16

The file holds three flat tensors: `mask` (each matrix padded to whole bytes), `values` (row by row)
and `dense` (embeddings, norms, head), each in the order in which the model has its weights. Names
and shapes stand in the metadata once for all layers, so that headers stay small. A digest covers
the metadata, the tensors and config.json, which lies beside it: what was damaged, cut off or mixed
up is refused. Left out: the sign of a zero, and computing on the packed form (`load` unpacks).
"""

import hashlib
import json
import re
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import NoReturn

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from pipeline.artifacts import hash_file
from pipeline.errors import UserError
from pipeline.models.prunable import prunable_weights
from pipeline.sparsity.masks import pack_mask, unpack_mask

FILE = "packed.safetensors"
FORMAT = "mama-grpo packed"
VERSION = "1"
TENSORS = ("mask", "values", "dense")


@dataclass(frozen=True)
class PackedSize:
    """What packing gains."""

    file_bytes: int
    header_bytes: int
    """Of them, names, shapes and digests."""
    dense_bytes: int
    """All weights at the same dtype, without a header."""
    bits_per_prunable_weight: float
    prunable_ratio: float
    """Bits of a dense weight / bits_per_prunable_weight."""


@torch.no_grad()
def save(model: LlamaForCausalLM, folder: Path) -> None:
    """Writes `packed.safetensors` and the model's configs. All weights have one dtype.

    Args:
        model: On any device.
        folder: Exists.
    """
    prunable = prunable_weights(model)
    others = [p.flatten() for name, p in model.named_parameters() if name not in prunable]
    tensors = {
        "mask": torch.cat([pack_mask(weight != 0) for weight in prunable.values()]).cpu(),
        "values": torch.cat([weight[weight != 0] for weight in prunable.values()]).cpu(),
        "dense": torch.cat(others).cpu(),
    }
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "dtype": str(model.dtype).removeprefix("torch."),
        "shapes": _shapes(model),
    }
    metadata["sha256"] = _digest(metadata, tensors, folder)
    save_file(tensors, folder / FILE, metadata=metadata)


def load(folder: str | Path) -> LlamaForCausalLM:
    """The model that `save` was given, every weight as it was, in evaluation mode on the CPU.

    Raises:
        UserError: The folder holds no packed model, or one that is damaged or not of one piece.
    """
    folder = Path(folder)
    metadata, tensors = _read(folder)
    config = LlamaConfig.from_pretrained(folder)
    with torch.device("meta"):
        empty = LlamaForCausalLM(config)
    if metadata["shapes"] != _shapes(empty):
        _refuse(folder, f"the weights in {FILE} are not those of the Llama in config.json")
    model = LlamaForCausalLM.from_pretrained(
        None,
        config=config,
        state_dict=_unpack(empty, tensors, folder),
        dtype=tensors["dense"].dtype,
    )
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.eval()


def measure(folder: Path) -> PackedSize:
    """Bytes and bits of what `save` wrote."""
    _, tensors = _read(folder)
    with (folder / FILE).open("rb") as file:
        header_bytes = 8 + int.from_bytes(file.read(8), "little")
    config = LlamaConfig.from_pretrained(folder)
    with torch.device("meta"):
        numel = sum(
            weight.numel() for weight in prunable_weights(LlamaForCausalLM(config)).values()
        )
    value_bytes = tensors["values"].element_size()
    bits = 8 * (tensors["mask"].nbytes + tensors["values"].nbytes) / numel
    return PackedSize(
        file_bytes=(folder / FILE).stat().st_size,
        header_bytes=header_bytes,
        dense_bytes=numel * value_bytes + tensors["dense"].nbytes,
        bits_per_prunable_weight=bits,
        prunable_ratio=8 * value_bytes / bits,
    )


def _shapes(model: LlamaForCausalLM) -> str:
    """Names and shapes as JSON; the layers of a Llama are alike, so `*` stands for their index."""
    shapes = {
        re.sub(r"\.layers\.\d+\.", ".layers.*.", name): list(parameter.shape)
        for name, parameter in model.named_parameters()
    }
    return json.dumps({"layers": model.config.num_hidden_layers, **shapes}, separators=(",", ":"))


def _digest(metadata: dict[str, str], tensors: dict[str, Tensor], folder: Path) -> str:
    """SHA-256 of metadata, tensors and config.json, in hexadecimal."""
    others = {key: value for key, value in metadata.items() if key != "sha256"}
    head = [others, {n: [str(t.dtype), t.numel()] for n, t in tensors.items()}]
    digest = hashlib.sha256(json.dumps(head, sort_keys=True).encode())
    digest.update(hash_file(folder / "config.json").encode())
    for name in TENSORS:
        digest.update(tensors[name].view(torch.uint8).numpy())
    return digest.hexdigest()


def _read(folder: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors, whole and of one piece.

    Raises:
        UserError: They are not.
    """
    for name in (FILE, "config.json"):
        if not (folder / name).is_file():
            _refuse(folder, f"holds no {name}")
    try:
        with safe_open(folder / FILE, framework="pt") as file:
            metadata = file.metadata() or {}
            names = set(file.keys())
            tensors = {name: file.get_tensor(name) for name in TENSORS if name in names}
    except (SafetensorError, OSError) as error:
        _refuse(folder, f"{FILE} cannot be read ({error})")
    if metadata.get("format") != FORMAT or names != set(TENSORS):
        _refuse(folder, f"{FILE} is no packed model")
    if metadata.get("version") != VERSION:
        _refuse(folder, f"format version {metadata.get('version')!r}; this loader reads {VERSION}")
    if metadata.get("sha256") != _digest(metadata, tensors, folder):
        _refuse(folder, f"{FILE} or config.json was changed after they were written")
    return metadata, tensors


def _unpack(empty: LlamaForCausalLM, tensors: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """Name to weight, pruned ones 0. `empty`: the same model without its weights."""
    prunable = prunable_weights(empty)
    others = {n: p.shape for n, p in empty.named_parameters() if n not in prunable}
    mask_bytes = [-(-weight.numel() // 8) for weight in prunable.values()]
    if sum(mask_bytes) != len(tensors["mask"]):
        _refuse(folder, "there are not as many mask bits as weights")
    masks = {
        name: unpack_mask(bits, weight.shape)
        for (name, weight), bits in zip(
            prunable.items(), tensors["mask"].split(mask_bytes), strict=True
        )
    }
    values = _pieces(tensors["values"], [int(mask.sum()) for mask in masks.values()], folder)
    dense = _pieces(tensors["dense"], [shape.numel() for shape in others.values()], folder)
    weights = {}
    for (name, mask), kept in zip(masks.items(), values, strict=True):
        weights[name] = torch.zeros(mask.shape, dtype=kept.dtype)
        weights[name][mask] = kept
    for (name, shape), flat in zip(others.items(), dense, strict=True):
        weights[name] = flat.reshape(shape).clone()
    return weights


def _pieces(flat: Tensor, sizes: list[int], folder: Path) -> list[Tensor]:
    """Consecutive pieces of a flat tensor, which they fill."""
    if sum(sizes) != len(flat):
        _refuse(folder, "there are not as many values as the mask keeps")
    return [flat[start:end] for start, end in pairwise(accumulate(sizes, initial=0))]


def _refuse(folder: Path, why: str) -> NoReturn:
    raise UserError(
        f"packed model: {str(folder)!r}: {why}; give a folder that the stage export wrote, copied "
        "as a whole"
    )
