"""Bytes of engine state a weight, counted in the tensors themselves."""

import torch

from launch.benchmarks.workbench import SPARSITY, Workbench
from pipeline.sparsity.state import SparsityState

MASK_GOAL = 1 / 8
REGROWN_BYTES = 8
"""Position and step of a kept weight that once regrew, int32 each."""


def state_bytes(bench: Workbench, refined: SparsityState) -> dict:
    """Masks and movement a weight, and what is noted of regrown ones.

    Args:
        bench: The weights.
        refined: Its state after a refinement that regrew some.
    """

    def per_weight(tensors) -> float:
        return sum(t.numel() * t.element_size() for t in tensors) / bench.num_weights

    def held(state: SparsityState) -> float:
        return per_weight([*state.masks.values(), *state.movement.values()])

    noted = [t for r in refined.regrown.values() for t in (r.indices, r.steps)]
    return {
        "float32": held(refined),
        "bfloat16": held(bench.state(torch.bfloat16)),
        "regrown_after_one_refinement": per_weight(noted),
        "regrown_at_most": REGROWN_BYTES * (1 - SPARSITY),
    }
