"""The same masks on real ranks whatever the sharding, and equal to sorting on one."""

import pytest
import torch

from pipeline.sparsity.threshold import masks_by_score
from tests.distributed.sparsity_jobs import (
    SHAPES,
    bytes_sent,
    random_cuts,
    recorded,
    select,
    whole,
)
from tests.distributed.workers import run_on_ranks

pytestmark = pytest.mark.distributed

CASES = [(1, 1, 0.5), (2, 0, 0.5), (2, 1, 30.0), (3, 2, 0.5), (3, 3, 1e9)]
"""World size, cut, and the fineness of the scores: few levels make many ties."""
SCOPES = [("matrix", 0.7), ("model", 0.7), ("row", 0.4), ("model", 0.001)]


def selected(world_size, seed, scores, ties, scope, sparsity, shift=0):
    cuts = random_cuts(world_size, seed)
    return whole(run_on_ranks(world_size, select, scores, ties, scope, sparsity, cuts, shift))


@pytest.mark.parametrize(("world_size", "seed", "levels"), CASES)
def test_any_sharding_selects_what_one_rank_selects(world_size, seed, levels):
    scores, ties = recorded(5, levels), recorded(6, 2.0)
    for scope, sparsity in SCOPES:
        expected = masks_by_score(scores, sparsity, scope, ties)
        found = selected(world_size, seed, scores, ties, scope, sparsity)
        for name in SHAPES:
            assert torch.equal(found[name], expected[name].flatten()), (scope, name)


@pytest.mark.parametrize(("world_size", "seed"), [(1, 1), (2, 2), (3, 3)])
def test_the_threshold_is_that_of_kthvalue_on_the_concatenation(world_size, seed):
    scores = recorded(7, 1e9)
    everything = torch.cat([values.flatten() for values in scores.values()])
    for sparsity in (0.001, 0.5, 0.99):
        found = selected(world_size, seed, scores, scores, "model", sparsity)
        kth = everything.kthvalue(round(sparsity * everything.numel())).values
        assert torch.equal(torch.cat(list(found.values())), everything > kth)


@pytest.mark.parametrize("world_size", [2, 3])
def test_groups_of_n_m_are_cut_by_borders_and_put_together(world_size):
    scores = recorded(5, 3.0)
    for seed, kept, length in ((2, 2, 4), (3, 1, 4), (4, 3, 6), (5, 11, 12)):
        shapes = {n: s for n, s in SHAPES.items() if s[-1] % length == 0}
        scores = {n: values for n, values in recorded(5, 3.0).items() if n in shapes}
        args = 1 - kept / length, f"{kept}:{length}"
        expected = masks_by_score(scores, *args, scores)
        found = selected(world_size, seed, scores, scores, args[1], args[0])
        assert all(torch.equal(found[n], expected[n].flatten()) for n in shapes)


@pytest.mark.parametrize(("world_size", "value"), [(2, -0.0), (3, 0.0), (3, 1.5)])
def test_equal_scores_are_split_alike_and_exactly(world_size, value):
    scores = {name: torch.full(shape, value) for name, shape in SHAPES.items()}
    total = sum(values.numel() for values in scores.values())
    for scope in ("matrix", "model", "row"):
        expected = masks_by_score(scores, 0.5, scope)
        for seed in (0, 2):
            found = selected(world_size, seed, scores, scores, scope, 0.5)
            assert all(torch.equal(found[n], expected[n].flatten()) for n in SHAPES)
        if scope == "model":
            assert sum(int((~mask).sum()) for mask in found.values()) == round(total / 2)


def test_an_offset_that_is_off_by_one_shows():
    """The planted fault: only ties see the offset, so the scores have many."""
    scores, ties = recorded(5, 0.5), {n: torch.ones(shape) for n, shape in SHAPES.items()}
    expected = masks_by_score(scores, 0.5, "model", ties)
    right, wrong = (selected(2, 1, scores, ties, "model", 0.5, shift) for shift in (0, 1))
    assert all(torch.equal(right[n], expected[n].flatten()) for n in SHAPES)
    assert any(not torch.equal(wrong[n], expected[n].flatten()) for n in SHAPES)


def test_the_bytes_sent_do_not_grow_with_the_model():
    small, large = (run_on_ranks(2, bytes_sent, rows) for rows in (100, 1600))
    assert small[0] == small[1]
    assert large[0] <= small[0] + 256 * 8, "one round more at most"
    assert large[0] < 20_000
