"""The sparsity bonus by hand."""

import pytest
import torch

from rewards.sparsity import sparsity_bonuses


def test_a_right_answer_earns_the_sparsity_of_its_mask_and_a_wrong_one_nothing():
    correct = torch.tensor([True, False, True, False])
    sparsity = torch.tensor([0.9, 0.9, 0.5, 0.5])
    assert sparsity_bonuses(correct, sparsity, 0.2).tolist() == pytest.approx([0.18, 0, 0.1, 0])
    assert sparsity_bonuses(correct, 0.5, 2.0).tolist() == [1.0, 0.0, 1.0, 0.0]
