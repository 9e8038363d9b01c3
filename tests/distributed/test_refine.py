"""Refinement on real ranks: every number and every bit as on one rank, whatever the sharding."""

import pytest
import torch

from tests.distributed.sparsity_jobs import SHAPES, random_cuts, refinements, refused
from tests.distributed.workers import run_on_ranks

pytestmark = pytest.mark.distributed

CASES = [
    ("matrix", "magnitude", 20.0),
    ("matrix", "movement", 20.0),
    ("matrix", "fisher", 1e9),
    ("matrix", "mix", 1e9),
    ("model", "magnitude", 1e9),
    ("model", "mix", 20.0),
    ("row", "magnitude", 20.0),
    ("row", "mix", 1e9),
]


def join(parts):
    joined = {}
    for name in SHAPES:
        pieces = sorted((part[name] for part in parts if name in part), key=lambda piece: piece[0])
        joined[name] = {
            key: torch.cat([values[key] for _, values in pieces]) for key in pieces[0][1]
        }
    return joined


@pytest.mark.parametrize(("scope", "score", "levels"), CASES)
def test_any_sharding_refines_as_one_rank(scope, score, levels):
    rule = {"scope": scope, "score": score, "min_density": 0.1}
    ((counts, sparsities, reference),) = run_on_ranks(1, refinements, None, rule, levels)
    expected = join([reference])
    assert all(regrown > 0 and survived > 0 for _, regrown, survived in counts[1:4])
    for world_size, seed in ((2, 0), (2, 2), (3, 3)):
        cuts = random_cuts(world_size, seed)
        results = run_on_ranks(world_size, refinements, cuts, rule, levels)
        for found_counts, found_sparsities, _ in results:
            assert found_counts == counts
            assert found_sparsities == sparsities
        found = join([result[2] for result in results])
        for name in SHAPES:
            for key, values in expected[name].items():
                assert torch.equal(found[name][key], values), (world_size, seed, name, key)


def test_ranks_that_hold_everything_refine_alike_without_a_word():
    rule = {"scope": "matrix", "score": "magnitude", "min_density": 0.0}
    results = run_on_ranks(2, refinements, None, rule, 1e9)
    (reference,) = run_on_ranks(1, refinements, None, rule, 1e9)
    for counts, sparsities, held in results:
        assert (counts, sparsities) == reference[:2]
        for name in SHAPES:
            assert torch.equal(held[name][1]["mask"], reference[2][name][1]["mask"])


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("nan", "1 values of c are NaN"),
        ("nan row", "values of c are NaN"),
        ("movement", "none was observed"),
        ("fisher", "needs the optimizer's second moment"),
    ],
)
def test_every_rank_refuses_what_one_rank_sees(what, message):
    for found in run_on_ranks(2, refused, what, random_cuts(2, 1)):
        assert message in found
