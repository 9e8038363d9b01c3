"""What the engine tells the trackers beside TRL's own metrics, since the last log.

    refine/pruned, refine/regrown, refine/survived   weights, over all ranks
    movement/kept_p10, _p50, _p90, movement/pruned_p10, ...   quantiles of its size
    engine/seconds_per_step   time of the host in hooks and refinements

Quantiles are of at most 4,096 weights, evenly spaced over what this rank holds, so they need no
communication; only the first rank's are logged. On a GPU, whose kernels run by themselves, the time
is that of launching them and of what refinement waits for.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from pipeline.sparsity.state import SparsityState

SAMPLED_WEIGHTS = 4096
QUANTILES = {"p10": 0.1, "p50": 0.5, "p90": 0.9}


class EngineMetrics:
    """Adds up between two logs."""

    def __init__(self):
        """Nothing has happened."""
        self.seconds = 0.0
        self.steps = 0
        self.refined: dict[str, float] = {}

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Counts the time of the block."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - started

    def count_refinement(self, entry: Mapping[str, Any]) -> None:
        """Adds what a refinement did, if it was accepted; `survived` is of the last one."""
        if not entry["accepted"]:
            return
        for key in ("pruned", "regrown"):
            name = f"refine/{key}"
            self.refined[name] = self.refined.get(name, 0) + entry[key]
        self.refined["refine/survived"] = entry["survived"]

    def take(self) -> dict[str, float]:
        """What was added up, which then begins anew."""
        taken = dict(self.refined)
        if self.steps:
            taken["engine/seconds_per_step"] = self.seconds / self.steps
        self.seconds, self.steps, self.refined = 0.0, 0, {}
        return taken


@torch.no_grad()
def movement_quantiles(state: SparsityState) -> dict[str, float]:
    """Quantiles of the size of this rank's movement, of kept and of pruned weights.

    Args:
        state: Of this rank's shards.
    """
    total = sum(movement.numel() for movement in state.movement.values())
    stride = max(1, -(-total // SAMPLED_WEIGHTS))
    sampled = [_every(stride, state.movement[name], state.masks[name]) for name in state.movement]
    if not sampled:
        return {}
    sizes, kept = (torch.cat(parts).cpu() for parts in zip(*sampled, strict=True))
    return {
        f"movement/{side}_{name}": chosen.quantile(quantile).item()
        for side, chosen in (("kept", sizes[kept]), ("pruned", sizes[~kept]))
        for name, quantile in QUANTILES.items()
        if chosen.numel()
    }


def _every(stride: int, movement: Tensor, packed: Tensor) -> tuple[Tensor, Tensor]:
    """Size of the movement and whether it is kept, of every `stride`-th weight of a shard."""
    places = torch.arange(0, movement.numel(), stride, device=movement.device)
    bits = packed[places >> 3] >> (places & 7).to(torch.uint8)
    return movement[places].abs().float(), (bits & 1).bool()
