"""The cubic schedule against values computed by hand."""

import pytest

from pipeline.sparsity.schedule import RefinementSchedule, Waiting


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


def walk(schedule, bind, last_step=400):
    """(step, position) of each decision; `bind` chooses from where it is and where it could go."""
    waiting, decisions = Waiting(schedule=schedule), []
    for step in range(1, last_step):
        if waiting.is_due(step):
            position = bind(waiting.position, waiting.next_position(step), step)
            waiting = waiting.decided(step, position)
            decisions.append((step, position))
            again = Waiting.after(schedule, [{"step": step, "waited": waiting.waited}])
            assert again == waiting, "a decision says all there is to know"
    return decisions


@pytest.mark.parametrize("begin_step", [0, 7])
def test_a_schedule_that_never_waits_is_the_plain_one(begin_step):
    plain = schedule(begin_step=begin_step)
    expected = [(step, step) for step in range(1, 400) if plain.is_due(step)]
    assert walk(plain, lambda here, there, step: there) == expected


def test_waiting_shifts_all_later_targets():
    kept = walk(schedule(), lambda here, there, step: here if step in (60, 90) else there)
    assert kept == [(30, 30), (60, 30), (90, 30), (120, 60), (150, 90), (160, 100)]


def test_half_a_step_shifts_by_half():
    halves = walk(
        schedule(), lambda here, there, step: (here + there) // 2 if step == 60 else there
    )
    assert halves == [(30, 30), (60, 45), (90, 75), (115, 100)]


def test_refinements_stay_due_until_the_target_is_reached():
    stuck = walk(schedule(), lambda here, there, step: here if here == 30 else there, 300)
    assert stuck[1:] == [(step, 30) for step in range(60, 300, 30)]
