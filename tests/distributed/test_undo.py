"""A refinement that is taken back leaves no trace, in any layout."""

import pytest
import torch

from tests.distributed.undo_jobs import different, try_and_go_on
from tests.distributed.workers import run_on_ranks

pytestmark = pytest.mark.distributed

KINDS = ("computes", "master", "exp_avg", "mask", "movement", "regrown", "regrown steps")


@pytest.mark.parametrize(
    ("layout", "world_size", "dtype"),
    [
        ("plain", 1, torch.float32),
        ("ddp", 2, torch.float32),
        ("zero1", 2, torch.float32),
        ("zero2-bf16", 2, torch.bfloat16),
        ("zero3", 2, torch.float32),
        ("zero3-bf16", 2, torch.bfloat16),
    ],
)
def test_a_refinement_taken_back_leaves_every_bit_as_it_was(layout, world_size, dtype):
    tried = run_on_ranks(world_size, try_and_go_on, layout, dtype, 2)
    untried = run_on_ranks(world_size, try_and_go_on, layout, dtype, 0)
    touched = {name for changed, *_ in tried for name in changed}
    assert all(any(name.startswith(kind) for name in touched) for kind in KINDS), touched
    for (_, left, regrown, end), (*_, expected) in zip(tried, untried, strict=True):
        assert left == []
        assert regrown > 0
        assert different(expected, end) == [], "the run goes on as if nothing had been tried"
