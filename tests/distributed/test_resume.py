"""Stopped and resumed on two ranks under ZeRO: the straight run bit for bit; no pickle is run."""

import pytest

from tests.distributed.resume_jobs import load_planted, stop_and_resume
from tests.distributed.workers import run_on_ranks

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize(
    ("layout", "stage"),
    [("zero2", "grpo"), ("zero3", "grpo"), ("zero2", "distill"), ("zero3", "on_policy")],
)
def test_a_run_resumed_on_two_ranks_is_the_straight_one(layout, stage, tmp_path):
    assert run_on_ranks(2, stop_and_resume, layout, stage, str(tmp_path)) == [[], []]
    if stage == "grpo":
        assert run_on_ranks(2, load_planted, layout, stage, str(tmp_path)) == [False, False]
