"""Products in reduced precision: their error, and what stays exact."""

import pytest
import torch

from pipeline.pruning.input_statistics import InputSums
from pipeline.pruning.reduced_products import reduced, reduced_product


def test_error_is_that_of_eight_bits():
    torch.manual_seed(0)
    left, right = torch.randn(40, 300), torch.randn(300, 50)
    exact = left.double() @ right.double()
    found = reduced_product(left, reduced(right))
    assert found.dtype == torch.float32
    assert (found - exact).norm() < 2**-7 * exact.norm()


def test_fp64_stays_exact():
    left, right = torch.randn(4, 30).double(), torch.randn(30, 5).double()
    assert torch.equal(reduced_product(left, reduced(right)), left @ right)


@pytest.mark.parametrize("block", [1, 5, 1024])
def test_moments_in_blocks(monkeypatch, block):
    monkeypatch.setattr("pipeline.pruning.input_statistics.BLOCK_INPUTS", block)
    inputs = torch.randn(50, 12).double()
    sums = InputSums("second_moment")
    sums.add(inputs)
    moment = sums.statistics().second_moment
    torch.testing.assert_close(moment, inputs.T @ inputs)
