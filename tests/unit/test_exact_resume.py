"""A run stopped after a step and resumed is the straight one, bit for bit."""

import pytest

from tests.unit.resumable_runs import STAGES, VERIFIED, differences, run

STOPS = (1, 4, 6)
"""Inside a pass over the data, at the end of one, and after one; of grpo inside a batch too."""


@pytest.mark.parametrize(("stage", "stops"), [*((s, STOPS) for s in STAGES), (VERIFIED, (2,))])
def test_a_run_resumed_after_a_step_is_the_straight_one(stage, stops, tmp_path):
    straight = run(stage, tmp_path / "straight", tmp_path / "prune", save_strategy="no")
    saved = run(stage, tmp_path / "saved", tmp_path / "prune")
    assert differences(straight, saved) == [], "saving changes nothing"
    assert len({step["step"] for step in straight[1]}) > 3
    assert {step["accepted"] for step in straight[1]} == {True, stage != VERIFIED}
    found = {}
    for step in stops:
        checkpoint = tmp_path / "saved" / f"checkpoint-{step}"
        resumed = run(
            stage, tmp_path / f"{step}", tmp_path / "prune", checkpoint, save_strategy="no"
        )
        found[step] = differences(straight, resumed)
    assert {step: names for step, names in found.items() if names} == {}
