"""However many ranks share the prompts, in every layout, the answers are those of one process."""

import pytest
import torch

from tests.distributed.probe_jobs import ask, ask_alone
from tests.distributed.workers import run_on_ranks

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("layout", ["ddp", "zero2", "zero3"])
def test_ranks_share_the_prompts_and_leave_no_trace(layout, tmp_path):
    first, second = run_on_ranks(2, ask, layout, str(tmp_path))
    unasked = run_on_ranks(2, ask, layout, str(tmp_path), False)[0][1]
    seen, weights = first
    assert all(torch.equal(weights[name], unasked[name]) for name in unasked)
    for (answers, nats), (others, other_nats) in zip(seen, second[0], strict=True):
        assert answers == others
        assert torch.equal(nats, other_nats)
    ((correct, expected),) = run_on_ranks(1, ask_alone, weights, str(tmp_path))
    answers, nats = seen[-1]
    assert answers == correct
    assert {True, False} == set(correct)
    torch.testing.assert_close(nats, expected)
    assert len({nats.sum().item() for _, nats in seen}) == 3
