"""The cubic schedule against values computed by hand."""

import pytest

from pipeline.sparsity.schedule import RefinementSchedule


def schedule(**changes):
    values = {
        "start_sparsity": 0.0,
        "final_sparsity": 0.8,
        "begin_step": 0,
        "end_step": 100,
        "every_steps": 30,
        "regrow_fraction": 0.2,
    }
    return RefinementSchedule(**(values | changes))


def test_is_due_every_k_steps_and_at_the_end():
    assert [step for step in range(1, 200) if schedule().is_due(step)] == [30, 60, 90, 100]
    assert [s for s in range(1, 50) if schedule(begin_step=7, end_step=40).is_due(s)] == [7, 37, 40]


def test_sparsity_rises_by_the_cubic_and_stays():
    assert schedule().sparsity_at(0) == 0.0
    assert schedule().sparsity_at(50) == pytest.approx(0.8 - 0.8 * 0.5**3)
    assert schedule(start_sparsity=0.5).sparsity_at(75) == pytest.approx(0.8 - 0.3 * 0.25**3)
    assert schedule().sparsity_at(100) == schedule().sparsity_at(1000) == 0.8


def test_regrowth_falls_by_a_cosine_to_zero():
    assert schedule().regrow_fraction_at(0) == pytest.approx(0.2)
    assert schedule().regrow_fraction_at(50) == pytest.approx(0.1)
    assert schedule().regrow_fraction_at(100) == 0.0
