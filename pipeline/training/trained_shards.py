"""Where each trained weight lies in what an optimizer saved, so that any other layout can read it.

transformers and DeepSpeed save fp32 weights and moments as their layout cuts them: by parameter, or
as flat partitions that say nothing of names. DeepSpeed reads them again in that layout only, or
after a conversion by hand. So every rank adds a map, `trained-RANK-of-RANKS.json`: name to shape,
and to this rank's shard (`sparsity/shards.py`) of the weight as

    [number of the flat tensor, first element there, first element in the weight, elements]

A rank of another layout looks up which saved ranges overlap its own shards and copies those alone,
from files that are mapped into memory and not read whole. Nothing is computed, so after gathering
weights and moments are bit for bit what was saved.

Left out: optimizers with state that is not one number for each weight (Adafactor), refused.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch import distributed as dist
from transformers import Trainer

from pipeline.errors import UserError
from pipeline.sparsity.layouts import check_optimizer
from pipeline.sparsity.shards import Shard, ShardedWeights, plain_shards

MAP_NAME = "trained-{rank:05d}-of-{world_size:05d}.json"
MAP_PATTERN = "trained-*.json"
PLAIN = "plain"


def shards_of(trainer: Trainer, weights: dict[str, nn.Parameter]) -> ShardedWeights:
    """Where the trainer's optimizer holds some weights.

    Raises:
        ValueError: In a place where no mask can be enforced; says which setting to change.
    """
    if trainer.is_deepspeed_enabled:
        from pipeline.sparsity.zero_shards import zero_shards  # deepspeed takes seconds

        return zero_shards(trainer.model_wrapped, weights)
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    check_optimizer(optimizer, weights)
    return plain_shards(weights, optimizer)


def trained_shards(trainer: Trainer) -> ShardedWeights:
    """All that the trainer's optimizer steps: prunable or not, adapters too."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    return shards_of(trainer, {n: w for n, w in model.named_parameters() if w.requires_grad})


def save_map(checkpoint: Path, weights: ShardedWeights) -> None:
    """Writes this rank's map; where every rank holds all, the first writes alone."""
    rank, world_size = 0, 1
    if weights.group is not None:
        rank, world_size = dist.get_rank(weights.group), weights.group.size()
    elif dist.is_initialized() and dist.get_rank() != 0:
        return
    number = {flat: index for index, flat in enumerate(weights.param_group)}
    shards = {s.name: [number[id(s.flat)], s.start, s.offset, s.numel] for s in _all(weights)}
    shapes = {name: list(shape) for name, shape in weights.shapes.items()}
    path = checkpoint / MAP_NAME.format(rank=rank, world_size=world_size)
    path.write_text(json.dumps({"shapes": shapes, "shards": shards}))


def has_map(checkpoint: Path) -> bool:
    """Whether another layout can read it."""
    return any(checkpoint.glob(MAP_PATTERN))


@torch.no_grad()
def load_trained(checkpoint: Path, engine: str, weights: ShardedWeights) -> None:
    """Copies weights and moments of any layout to where this one has them; then `publish` them.

    Args:
        checkpoint: A whole one with maps.
        engine: That wrote it: `plain`, or `zero1` to `zero3`.
        weights: All trained ones, of the layout of now.

    Raises:
        UserError: It is of another model, or its optimizer's state is not one number a weight.
    """
    ranks = [_open_rank(checkpoint, engine, path) for path in sorted(checkpoint.glob(MAP_PATTERN))]
    shapes = {name: list(shape) for name, shape in weights.shapes.items()}
    if shapes != ranks[0].shapes:
        raise UserError(f"--output_dir: {checkpoint} is of another model; set another --output_dir")
    found: dict[int, dict[str, Any]] = {}
    for shard in _all(weights):
        state = found.setdefault(id(shard.flat), {})
        for piece in _pieces(shard, ranks):
            shard.weight[piece.target] = piece.rank.weight(shard.name, piece.flat)[piece.source]
            _add_state(checkpoint, shard, state, piece)
    flats = {id(shard.flat): shard.flat for shard in _all(weights)}
    for key, state in found.items():
        group = weights.optimizer.param_groups[weights.param_group[key]]
        weights.optimizer.state[flats[key]] = _as_kept(weights.optimizer, group, flats[key], state)


@dataclass
class _SavedRank:
    """What one rank saved."""

    shapes: dict[str, list[int]]
    shards: dict[str, list[int]]
    states: dict[int, dict[str, Any]]
    flats: list[Tensor] | None = None
    """None under plain torch, where weights lie in the model's own files."""
    files: dict[str, Path] = field(default_factory=dict)
    """Name in those files to the file."""

    def weight(self, name: str, flat: int) -> Tensor:
        """The flat fp32 tensor that holds a weight, (n,)."""
        if self.flats is not None:
            return self.flats[flat].view(-1)
        key = name if name in self.files else name.replace(".default.", ".")  # as peft saves it
        with safe_open(self.files[key], framework="pt") as file:
            return file.get_tensor(key).view(-1)


@dataclass(frozen=True)
class _Piece:
    """A range of a shard, and where it was saved."""

    rank: _SavedRank
    flat: int
    source: slice
    target: slice


def _all(weights: ShardedWeights) -> Iterator[Shard]:
    yield from weights.shards.values()


def _open_rank(checkpoint: Path, engine: str, map_path: Path) -> _SavedRank:
    saved = json.loads(map_path.read_text())
    if engine == PLAIN:
        states = _load(checkpoint / "optimizer.pt")["state"]
        files = {}
        for path in [*checkpoint.glob("model*.safetensors"), *checkpoint.glob("adapter_*.saf*")]:
            with safe_open(path, framework="pt") as file:
                files |= dict.fromkeys(file.keys(), path)
        return _SavedRank(saved["shapes"], saved["shards"], states, files=files)
    rank = int(map_path.name.split("-")[1])
    (path,) = checkpoint.glob(f"global_step*/*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    optimizer = _load(path)["optimizer_state_dict"]
    if engine == "zero3":
        flats, states = optimizer["fp32_flat_groups"], optimizer["optimizer_state_dict"]["state"]
    else:
        flats = optimizer["single_partition_of_fp32_groups"]
        states = optimizer["base_optimizer_state"]["state"]
    return _SavedRank(saved["shapes"], saved["shards"], states, flats)


def _load(path: Path) -> dict[str, Any]:
    return torch.load(path, map_location="cpu", mmap=True, weights_only=True)


def _pieces(shard: Shard, ranks: list[_SavedRank]) -> Iterator[_Piece]:
    """What of a shard each rank saved; together all of it."""
    covered = 0
    for rank in (rank for rank in ranks if shard.name in rank.shards):
        flat, start, offset, numel = rank.shards[shard.name]
        first, last = max(shard.offset, offset), min(shard.offset + shard.numel, offset + numel)
        if first < last:
            covered += last - first
            source = slice(start + first - offset, start + last - offset)
            yield _Piece(rank, flat, source, slice(first - shard.offset, last - shard.offset))
    assert covered == shard.numel, f"{shard.name}: {covered} of {shard.numel} elements were saved"


def _add_state(checkpoint: Path, shard: Shard, state: dict[str, Any], piece: _Piece) -> None:
    """Copies a range of every moment; what is one number for all weights has to agree."""
    size = piece.rank.weight(shard.name, piece.flat).numel()
    for key, value in piece.rank.states.get(piece.flat, {}).items():
        if isinstance(value, Tensor) and value.dim() > 0:
            if value.numel() < size:
                raise UserError(
                    f"--output_dir: {checkpoint}: the optimizer's {key} is not one number for each "
                    "weight, so no other layout can read it; launch as before, or set another "
                    "--output_dir"
                )
            if key not in state:
                state[key] = torch.zeros_like(shard.flat.data, dtype=value.dtype)
            shard.view(state[key])[piece.target] = value.view(-1)[piece.source]
        elif value is not None and state.setdefault(key, float(value)) != float(value):
            raise UserError(
                f"--output_dir: {checkpoint}: {shard.name} was stepped another number of times "
                "than its neighbours, which one flat tensor cannot hold; launch as before, or set "
                "another --output_dir"
            )


def _as_kept(
    optimizer: torch.optim.Optimizer, group: dict[str, Any], flat: Tensor, state: dict[str, Any]
) -> dict[str, Any]:
    """Numbers of steps as this optimizer keeps them: torch's as tensors, DeepSpeed's as ints."""
    is_torch = type(optimizer).__module__.startswith("torch.optim")
    device = flat.device if group.get("fused") or group.get("capturable") else "cpu"

    def kept(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value
        return torch.tensor(value, device=device) if is_torch else int(value)

    return {key: kept(value) for key, value in state.items()}
