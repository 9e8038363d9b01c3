"""The exact threshold against sorting."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.sparsity.threshold import mask_by_score, masks_by_score


@given(
    values=st.lists(st.integers(-3, 3), min_size=1, max_size=60),
    fraction=st.floats(0, 1),
)
def test_prunes_exactly_the_lowest_also_with_ties(values, fraction):
    score = torch.tensor(values, dtype=torch.float32)
    num_zeros = round(fraction * len(values))
    mask = mask_by_score(score, num_zeros)
    assert int((~mask).sum()) == num_zeros
    assert sorted(score[mask].tolist()) == sorted(values)[num_zeros:]


def test_ties_are_ordered_by_the_tie_break():
    score = torch.zeros(2, 3)
    weight = torch.tensor([[0.1, 0.5, 0.3], [0.2, 0.6, 0.4]])
    mask = mask_by_score(score, 3, weight)
    assert mask.tolist() == [[False, True, False], [False, True, True]]


def test_equal_scores_and_ties_keep_the_first_positions():
    assert mask_by_score(torch.ones(5), 3).tolist() == [True, True, False, False, False]


def test_refuses_nan_and_counts_out_of_range():
    with pytest.raises(ValueError, match="1 of 2 values are NaN"):
        mask_by_score(torch.tensor([1.0, float("nan")]), 1)
    with pytest.raises(ValueError, match="num_zeros: 3"):
        mask_by_score(torch.ones(2), 3)


def test_scope_matrix_prunes_each_and_scope_model_prunes_the_lowest_of_all():
    scores = {"a": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "b": torch.tensor([[5.0, 6.0]])}
    each = masks_by_score(scores, 0.5, "matrix")
    assert each["a"].tolist() == [[False, False], [True, True]]
    assert each["b"].tolist() == [[False, True]]
    together = masks_by_score(scores, 0.5, "model")
    assert together["a"].tolist() == [[False, False], [False, True]]
    assert together["b"].tolist() == [[True, True]]
