"""Runs killed at a point end as an undisturbed one, bit for bit; `make soak` tries many more."""

import signal

import pytest

from tests.soak.faults import try_damage, try_fault

KILLS = (
    "grpo:1:step:rank0:KILL",
    "distill:1:step:launcher:KILL",
    "distill:4:rename:group:KILL",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of all runs; the undisturbed one is made once."""
    return tmp_path_factory.mktemp("kills")


@pytest.mark.parametrize("fault", KILLS)
def test_a_killed_run_loses_nothing(fault, folder):
    found = try_fault(folder, fault, ranks=1)
    assert found["first"] == -signal.SIGKILL
    assert found["differing"] == []
    if "launcher" in fault:
        assert found["left_status"] == "75", "its worker saved and stopped"


def test_a_bit_flipped_in_the_newest_checkpoint_costs_that_checkpoint_alone(folder):
    assert try_damage(folder, "bit-flipped")["differing"] == []
