"""An on-policy step is the same however many ranks share it, in every layout."""

import pytest

from tests.distributed.on_policy_jobs import gradient
from tests.distributed.workers import run_on_ranks

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The gradient of one process."""
    folder = tmp_path_factory.mktemp("on_policy")
    return run_on_ranks(1, gradient, "plain", "device", str(folder))[0]


@pytest.mark.parametrize(
    ("layout", "placement"),
    [("ddp", "device"), ("zero2", "device"), ("zero3", "device"), ("zero3", "zero3")],
)
def test_two_ranks_give_the_gradient_of_one(alone, tmp_path, layout, placement):
    together, _ = run_on_ranks(2, gradient, layout, placement, str(tmp_path))
    assert list(together) == list(alone)
    for name, expected in alone.items():
        error = (together[name] - expected).norm() / expected.norm()
        assert error < 1e-4, f"{name}: {float(error):.1e}"
