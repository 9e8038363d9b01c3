"""The loss of a batch does not depend on how many ranks share it."""

import pytest

from tests.distributed.distill_jobs import first_step
from tests.distributed.workers import run_on_ranks

pytestmark = pytest.mark.distributed


def test_two_ranks_log_the_loss_and_gradient_norm_of_one(tmp_path):
    (alone,) = run_on_ranks(1, first_step, str(tmp_path))
    together, _ = run_on_ranks(2, first_step, str(tmp_path))
    assert together["loss"] == pytest.approx(alone["loss"], rel=1e-3)  # logged to 4 digits
    assert together["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-3)
