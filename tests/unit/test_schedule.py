"""The cubic schedule against values computed by hand."""

import pytest

from pipeline.sparsity.schedule import MAX_HALVINGS, RefinementSchedule, Waiting


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


def walk(schedule, choose, last_step=400):
    """(step, position) of each decision; `choose` says how often the stride is halved, or None."""
    waiting, decisions = Waiting(schedule=schedule), []
    for step in range(1, last_step):
        if waiting.is_due(step):
            waiting = waiting.decided(step, choose(step, waiting.halvings))
            decisions.append((step, waiting.position))
            entry = {"step": step, "waited": waiting.waited, "halvings": waiting.halvings}
            assert Waiting.after(schedule, [entry]) == waiting, "a decision says all there is"
    return decisions


@pytest.mark.parametrize("begin_step", [0, 7])
def test_a_schedule_that_never_waits_is_the_plain_one(begin_step):
    plain = schedule(begin_step=begin_step)
    expected = [(step, step) for step in range(1, 400) if plain.is_due(step)]
    assert walk(plain, lambda step, halvings: halvings) == expected


def test_waiting_shifts_all_later_targets():
    kept = walk(schedule(), lambda step, halvings: None if step == 60 else halvings)
    assert kept == [(30, 30), (60, 30), (90, 45), (120, 75), (145, 100)]


def test_half_a_step_shifts_by_half():
    halves = walk(schedule(), lambda step, halvings: halvings + (step == 60))
    assert halves == [(30, 30), (60, 45), (90, 75), (115, 100)]


def test_strides_get_shorter_where_it_stands_still_and_longer_again():
    chosen = []

    def choose(step, halvings):
        chosen.append(halvings)
        return {60: None, 90: None, 120: halvings + 1}.get(step, halvings)

    walked = walk(schedule(), choose)
    assert chosen[:6] == [0, 0, 1, 2, 2, 1]
    assert walked[:6] == [(30, 30), (60, 30), (90, 30), (120, 33.75), (150, 41.25), (180, 56.25)]


def test_refinements_stay_due_until_the_target_is_reached():
    stuck = walk(schedule(), lambda step, halvings: None if step > 30 else halvings, 300)
    assert stuck[1:] == [(step, 30) for step in range(60, 300, 30)]


def test_strides_do_not_halve_for_ever():
    waiting = Waiting(schedule=schedule(every_steps=1))
    for step in range(1, 3000):
        waiting = waiting.decided(step, None)
    assert waiting.halvings == MAX_HALVINGS
    assert waiting.ahead(3000, waiting.halvings) > waiting.position
