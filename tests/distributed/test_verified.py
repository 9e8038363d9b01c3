"""All ranks make the same decisions, in every layout, and a refused mask leaves no trace."""

import pytest
import torch

from tests.distributed.verified_jobs import decide
from tests.distributed.workers import run_on_ranks

pytestmark = pytest.mark.distributed

HOLDS = {"final_sparsity": 0.01, "end_step": 4}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The decisions of one process about masks that hold."""
    folder = tmp_path_factory.mktemp("alone")
    return run_on_ranks(1, decide, "plain", str(folder), HOLDS)[0][0]


@pytest.mark.parametrize("layout", ["zero2", "zero3"])
def test_ranks_decide_alike_and_take_refused_masks_back(alone, layout, tmp_path):
    refused = run_on_ranks(2, decide, layout, str(tmp_path), {})
    untouched = run_on_ranks(2, decide, layout, str(tmp_path), None)
    for (decisions, found), (_, expected) in zip(refused, untouched, strict=True):
        assert [entry["accepted"] for entry in decisions] == [True, False, False, False]
        assert decisions == refused[0][0]
        assert [name for name in expected if not torch.equal(expected[name], found[name])] == []

    first, second = run_on_ranks(2, decide, layout, str(tmp_path), HOLDS)
    assert first[0] == second[0]
    for key in ("step", "target", "accepted", "waited", "pruned"):
        assert [e[key] for e in first[0]] == [e[key] for e in alone], key
    for entry, expected in zip(first[0], alone, strict=True):
        assert entry["reward_after"] == pytest.approx(expected["reward_after"])
