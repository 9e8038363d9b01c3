"""Bytes that one refinement hands to collectives, counted on two real gloo ranks.

Every operation of torch's process groups goes through the dispatcher, as `c10d::...`, so a
dispatch mode sees all of them; counted are the bytes of their tensors on one rank. (A ring
all-reduce of n bytes over N ranks sends 2 (N - 1) / N n from each.) All weights lie in one flat
tensor that is cut in the middle, as ZeRO cuts it.

Left out: `publish`, by which ZeRO copies fp32 weights to those that compute after a refinement. It
is the copy that follows every optimizer step anyway, and it is of the model's size.
"""

import math
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import multiprocessing, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from launch.benchmarks.refinement import REGROW_FRACTION, refinement_rule
from launch.benchmarks.shapes import Shape
from launch.benchmarks.workbench import SPARSITY
from pipeline.sparsity.refine import refine
from pipeline.sparsity.shards import Shard, ShardedWeights
from pipeline.sparsity.state import SparsityState
from pipeline.sparsity.threshold import masks_by_score

NUM_RANKS = 2
FIRST_BITS = 0x38000000
"""Bits of 2^-15."""


def most_bytes(num_matrices: int, scope: str, tied: bool) -> int:
    """The most that one refinement hands to collectives, whatever the number of weights.

    Counters are int64. G groups are ranked, the kept and the pruned side of each matrix or of the
    model: two rounds of 2 G x 256 for the sample, four of G x 256 for the elements, and four for
    each of three levels of ties. A round less is sent where the sample's bracket is narrow. Under
    `model` one more counter a matrix looks for the floor, which no matrix reaches here.
    """
    groups = 2 * (num_matrices if scope == "matrix" else 1)
    rounds = 2 * 2 + 4 + 12 * tied
    matrices = 3 + (scope == "model")
    return 8 * (rounds * groups * 256 + 3 * groups + matrices * num_matrices + 3)


class Communicated(TorchDispatchMode):
    """Counts collectives and their bytes while it is on."""

    calls = 0
    num_bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        """Counts what belongs to a process group, and runs everything."""
        if function.namespace == "c10d":
            self.calls += 1
            tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
            self.num_bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return function(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Case:
    """One model, scope and kind of scores."""

    name: str
    shapes: dict[str, torch.Size]
    scope: str
    tied: bool
    """No pruned weight ever moved: all are tied and the hash has to choose. Else no two scores are
    equal."""


def communication(shapes: dict[str, Shape]) -> list[dict]:
    """Runs every case on two ranks and reports what rank 0 counted."""
    sizes = {name: shape.prunable_shapes() for name, shape in shapes.items()}
    cases = [
        Case(name, size, scope, tied)
        for scope, tied in (("matrix", False), ("model", False), ("matrix", True))
        for name, size in sizes.items()
    ]
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(_serve, (Path(folder), cases), nprocs=NUM_RANKS)
        return torch.load(Path(folder) / "found.pt")


def _serve(rank: int, folder: Path, cases: list[Case]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=NUM_RANKS
    )
    found = [_count(case, rank) for case in cases]
    if rank == 0:
        torch.save(found, folder / "found.pt")
    dist.destroy_process_group()


def _count(case: Case, rank: int) -> dict:
    weights, state = _half(case, rank)
    with Communicated() as communicated:
        done = refine(
            state,
            weights,
            refinement_rule(case.scope),
            sparsity=SPARSITY,
            regrow_fraction=REGROW_FRACTION,
            step=1,
        )
    return {
        "shape": case.name,
        "scope": case.scope,
        "tied": case.tied,
        "num_matrices": len(case.shapes),
        "num_weights": sum(shape.numel() for shape in case.shapes.values()),
        "regrown": done.regrown,
        "collectives": communicated.calls,
        "bytes": communicated.num_bytes,
        "most_bytes": most_bytes(len(case.shapes), case.scope, case.tied),
    }


def distinct(shapes: dict[str, torch.Size]) -> dict[str, torch.Tensor]:
    """Positive fp32 values in random order of which no two are equal: successive bit patterns."""
    sizes = [shape.numel() for shape in shapes.values()]
    bits = torch.randperm(sum(sizes), dtype=torch.int32) + FIRST_BITS
    parts = bits.view(torch.float32).split(sizes)
    return {name: part.view(shapes[name]) for name, part in zip(shapes, parts, strict=True)}


def _half(case: Case, rank: int) -> tuple[ShardedWeights, SparsityState]:
    """This rank's half of random weights, the same whole on both."""
    torch.manual_seed(0)
    whole = distinct(case.shapes)
    moved = torch.cat([values.flatten() for values in distinct(case.shapes).values()])
    masks = masks_by_score(whole, SPARSITY, "matrix")
    flattened = torch.cat([(w * masks[name]).flatten() for name, w in whole.items()])
    part = math.ceil(flattened.numel() / NUM_RANKS)
    begin, end = rank * part, min((rank + 1) * part, flattened.numel())
    flat, shards, place = nn.Parameter(flattened[begin:end].clone()), {}, 0
    for name, shape in case.shapes.items():
        first, last = max(place, begin), min(place + shape.numel(), end)
        if first < last:
            shards[name] = Shard(name, shape, first - place, last - first, flat, first - begin)
        place += shape.numel()
    weights = ShardedWeights(
        shards, case.shapes, torch.optim.AdamW([flat]), dist.group.WORLD, lambda: None
    )
    state = SparsityState.from_masks(masks, weights)
    if not case.tied:
        for name, shard in shards.items():
            state.movement[name].copy_(moved[begin + shard.start :][: shard.numel])
    return weights, state
