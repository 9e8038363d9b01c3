"""Groups under two masks are the same however many ranks share them, in every layout."""

import pytest
import torch

from tests.distributed.two_mask_jobs import two_steps
from tests.distributed.workers import run_on_ranks

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process does."""
    return run_on_ranks(1, two_steps, "plain", str(tmp_path_factory.mktemp("masks")))[0]


def test_the_two_masks_answer_differently_and_the_bonus_acts(alone):
    for batch in alone["batches"]:
        assert [sparser for _, sparser, _, _ in batch] == [False, True] * 4
        assert any(batch[row][0] != batch[row + 1][0] for row in range(0, 8, 2))
    first, second = alone["logs"]
    assert first["masks/present/sparsity"] < second["masks/present/sparsity"]
    assert second["masks/present/sparsity"] < second["masks/sparser/sparsity"]
    assert list(alone["acts"]) == ["correctness", "sparsity", "teacher_kl"]
    assert min(alone["acts"].values()) >= 1e-3
    assert sum(weight.norm() for weight in alone["moved"].values()) > 0.01


@pytest.mark.parametrize("layout", ["ddp", "zero2", "zero3"])
def test_two_ranks_do_what_one_does(alone, tmp_path, layout):
    ranks = run_on_ranks(2, two_steps, layout, str(tmp_path))
    for step, expected in enumerate(alone["batches"]):
        together = [row for rank in ranks for row in rank["batches"][step]]
        for (ids, sparser, advantage, old), (*same, gains, before) in zip(
            together, expected, strict=True
        ):
            assert [ids, sparser] == same
            assert advantage == pytest.approx(gains, abs=1e-5)
            assert old == pytest.approx(before, abs=1e-4)
    for rank in ranks:
        assert rank["acts"] == pytest.approx(alone["acts"], rel=1e-3)
        for ours, theirs in zip(rank["logs"], alone["logs"], strict=True):
            assert ours == pytest.approx(theirs, abs=1e-5)
    for name, moved in alone["moved"].items():
        torch.testing.assert_close(ranks[0]["moved"][name], moved, atol=1e-5, rtol=1e-3)
    assert all(torch.equal(ranks[0]["masks"][name], mask) for name, mask in alone["masks"].items())
    assert not any(ranks[0]["alive"].values())
