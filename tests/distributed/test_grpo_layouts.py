"""A GRPO step with a teacher term is the same however many ranks share it, in every layout."""

import pytest
import torch

from tests.distributed.grpo_jobs import PLACES, gradients
from tests.distributed.workers import run_on_ranks

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The gradients of one process."""
    folder = tmp_path_factory.mktemp("grpo")
    return run_on_ranks(1, gradients, "plain", "device", str(folder))[0]


def test_every_place_has_a_gradient_of_its_own(alone):
    assert list(alone) == list(PLACES)
    heads = [found["lm_head.weight"] for found in alone.values()]
    for index, head in enumerate(heads):
        assert head.norm() > 0.1
        for other in heads[:index]:
            assert (head - other).norm() > 0.01


@pytest.mark.parametrize(
    ("layout", "placement"),
    [("ddp", "device"), ("zero2", "cpu"), ("zero3", "device"), ("zero3", "zero3")],
)
def test_two_ranks_give_the_gradients_of_one(alone, tmp_path, layout, placement):
    together, _ = run_on_ranks(2, gradients, layout, placement, str(tmp_path))
    for place, expected in alone.items():
        assert list(together[place]) == list(expected)
        for name, gradient in expected.items():
            error = (together[place][name] - gradient).norm() / gradient.norm()
            assert error < 1e-4, f"{place}, {name}: {float(error):.1e}"
        assert all(torch.isfinite(gradient).all() for gradient in together[place].values())
