"""A sparsity state on disk: one safetensors file a rank, by weight name and offset, not by rank.

`sparsity-00000-of-00002.safetensors` holds one rank's shards: `mask/NAME` packed bits,
`movement/NAME` as it is in memory, `regrown/NAME` local positions and `regrown_steps/NAME`. Its
metadata give whole shapes, and offset and size of each shard. Any number of ranks with any sharding
reads them again, only the ranges it needs, and has bit for bit what was saved. Where every rank
holds all (plain, DDP) the first one writes alone.
"""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from pipeline.sparsity.masks import pack_mask, unpack_mask
from pipeline.sparsity.shards import Shard, ShardedWeights
from pipeline.sparsity.state import Regrown, SparsityState, check_same_weights, index_dtype

FILE_NAME = "sparsity-{rank:05d}-of-{world_size:05d}.safetensors"
FILE_PATTERN = re.compile(r"sparsity-(\d{5})-of-(\d{5})\.safetensors")


def save_state(folder: Path, state: SparsityState, weights: ShardedWeights) -> None:
    """Writes this rank's file beside its target, then renames. Every rank calls it.

    Files of another number of ranks are removed once all are written.

    Args:
        folder: The same for all ranks; it exists.
        state: Masks, movement and regrown weights of the shards.
        weights: The shards.
    """
    group = weights.group
    rank, world_size = (0, 1) if group is None else (dist.get_rank(group), group.size())
    if group is None and dist.is_initialized() and dist.get_rank() != 0:
        return
    tensors: dict[str, Tensor] = {}
    for name in weights.shards:
        tensors[f"mask/{name}"] = state.masks[name].cpu()
        tensors[f"movement/{name}"] = state.movement[name].cpu()
        tensors[f"regrown/{name}"] = state.regrown[name].indices.cpu()
        tensors[f"regrown_steps/{name}"] = state.regrown[name].steps.cpu()
    metadata = {
        "shapes": json.dumps({name: list(shape) for name, shape in weights.shapes.items()}),
        "shards": json.dumps({s.name: [s.offset, s.numel] for s in weights.shards.values()}),
    }
    path = folder / FILE_NAME.format(rank=rank, world_size=world_size)
    temporary = path.with_name(path.name + ".tmp")
    save_file(tensors, temporary, metadata)
    os.replace(temporary, path)
    if group is not None:
        dist.barrier(group)
    if rank == 0:
        for other in folder.iterdir():
            match = FILE_PATTERN.fullmatch(other.name)
            if match and int(match[2]) != world_size:
                other.unlink()


def load_state(folder: Path, weights: ShardedWeights) -> SparsityState:
    """Reads what `save_state` wrote into this rank's shards, whatever they are.

    Args:
        folder: Holds the whole set of files.
        weights: The shards of now.

    Raises:
        ValueError: A file of the set is missing or there is more than one set, the state is of
            another model, or the files leave elements out.
    """
    state = SparsityState({}, {}, {})
    files = [safe_open(path, framework="pt") for path in _whole_set(folder)]
    layouts = [
        {key: json.loads(file.metadata()[key]) for key in ("shapes", "shards")} for file in files
    ]
    for layout in layouts:
        shapes = {name: torch.Size(shape) for name, shape in layout["shapes"].items()}
        check_same_weights(shapes, weights, str(folder))
    for name, shard in weights.shards.items():
        found = [
            (file, *layout["shards"][name])
            for file, layout in zip(files, layouts, strict=True)
            if name in layout["shards"]
        ]
        _load_shard(folder, state, shard, [part for part in found if _overlap(shard, *part[1:])])
    return state


def saved_movement(folder: Path) -> Iterator[tuple[str, int, Tensor, Tensor]]:
    """Reads movement without a model, piece by piece.

    Args:
        folder: Holds the whole set of files.

    Yields:
        Of one saved shard: the weight's name, the shard's offset in it in elements, mask, bool
        (n,), True = kept, and movement (n,).
    """
    for path in _whole_set(folder):
        with safe_open(path, framework="pt") as file:
            for name, (offset, _) in json.loads(file.metadata()["shards"]).items():
                movement = file.get_tensor(f"movement/{name}")
                mask = unpack_mask(file.get_tensor(f"mask/{name}"), movement.shape)
                yield name, offset, mask, movement


def _whole_set(folder: Path) -> list[Path]:
    """The files of the state, of rank 0 first."""
    matches = [FILE_PATTERN.fullmatch(path.name) for path in folder.iterdir()]
    sizes = sorted({int(match[2]) for match in matches if match})
    if len(sizes) != 1:
        found = f"sets of {' and '.join(map(str, sizes))}" if sizes else "no"
        raise ValueError(f"{folder}: {found} sparsity-*.safetensors there; one whole set is needed")
    paths = [folder / FILE_NAME.format(rank=rank, world_size=sizes[0]) for rank in range(sizes[0])]
    missing = [path.name for path in paths if not path.exists()]
    if missing:
        raise ValueError(
            f"{folder}: {missing[0]} is missing ({len(missing)} of {len(paths)} files are)"
        )
    return paths


def _overlap(shard: Shard, offset: int, numel: int) -> int:
    """Elements that a shard shares with a saved range of the same weight."""
    return max(0, min(shard.offset + shard.numel, offset + numel) - max(shard.offset, offset))


def _load_shard(folder: Path, state: SparsityState, shard: Shard, found: list) -> None:
    """Puts one shard together from the saved ranges (file, offset, numel) that overlap it."""
    found = sorted(found, key=lambda part: part[1])
    covered = sum(_overlap(shard, offset, numel) for _, offset, numel in found)
    if covered != shard.numel:
        raise ValueError(
            f"{folder}: holds {covered} of {shard.numel} elements of this rank's part of "
            f"{shard.name}; it was not saved whole"
        )
    name, masks, movement, indices, steps = shard.name, [], [], [], []
    for file, offset, numel in found:
        start = max(shard.offset - offset, 0)
        stop = min(shard.offset + shard.numel - offset, numel)
        first_byte = start // 8
        packed = file.get_slice(f"mask/{name}")[first_byte : (stop + 7) // 8]
        masks.append(unpack_mask(packed, (stop - 8 * first_byte,))[start - 8 * first_byte :])
        movement.append(file.get_slice(f"movement/{name}")[start:stop])
        positions = file.get_tensor(f"regrown/{name}").long()
        inside = (positions >= start) & (positions < stop)
        indices.append(positions[inside] + offset - shard.offset)
        steps.append(file.get_tensor(f"regrown_steps/{name}")[inside])
    device = shard.flat.device
    state.masks[name] = pack_mask(torch.cat(masks)).to(device)
    state.movement[name] = torch.cat(movement).to(device)
    state.regrown[name] = Regrown(
        torch.cat(indices).to(device, index_dtype(shard.numel)), torch.cat(steps).to(device)
    )
