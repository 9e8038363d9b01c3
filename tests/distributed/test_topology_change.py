"""A checkpoint of one layout goes on under another: the same state bit for bit, the same run."""

import pytest
import torch

from tests.distributed.topology_jobs import STOP, train
from tests.distributed.workers import run_on_ranks

pytestmark = pytest.mark.distributed

PLAIN, DDP = ("plain", 1), ("ddp", 2)
ZERO_1, ZERO_2, ZERO_3 = ("zero1", 1), ("zero2", 2), ("zero3", 2)
CHANGES = [
    (PLAIN, ZERO_2),
    (PLAIN, ZERO_3),
    (ZERO_2, PLAIN),
    (ZERO_3, PLAIN),
    (ZERO_2, ZERO_3),
    (ZERO_3, ZERO_2),
    (ZERO_2, ZERO_1),
]


def on(layout, *arguments):
    """What rank 0 of a layout returns; plain torch trains in this process."""
    name, world_size = layout
    if name == "plain":
        return train(0, 1, name, *arguments)
    return run_on_ranks(world_size, train, name, *arguments)[0]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Straight runs of distill, each with a checkpoint after `STOP`."""
    folder = tmp_path_factory.mktemp("saved")
    return {
        layout: (folder, on(layout, "distill", str(folder))) for layout in (PLAIN, ZERO_2, ZERO_3)
    }


@pytest.mark.parametrize(
    ("before", "after"), CHANGES, ids=lambda layout: "x".join(map(str, layout))
)
def test_state_is_carried_over_bit_for_bit_and_training_follows(before, after, saved, tmp_path):
    folder, straight = saved[before]
    checkpoint = folder / before[0] / f"checkpoint-{STOP}"
    resumed = on(after, "distill", str(tmp_path), str(checkpoint))
    check_state(before, after, straight, resumed)
    for name, weight in straight["weights"].items():
        gap = (weight - resumed["weights"][name]).abs()
        assert (gap > 1e-4).float().mean() < 1e-3, name


@pytest.mark.parametrize(("before", "after"), [(PLAIN, DDP), (ZERO_3, ZERO_2)])
def test_a_run_that_samples_goes_on(before, after, tmp_path):
    """From the middle of a generation batch, whose completions two ranks cannot take from one."""
    straight = on(before, "grpo", str(tmp_path / "before"))
    checkpoint = tmp_path / "before" / before[0] / f"checkpoint-{STOP}"
    check_state(
        before, after, straight, on(after, "grpo", str(tmp_path / "after"), str(checkpoint))
    )


def check_state(before, after, straight, resumed):
    """What was loaded is what was saved; the change was noted, and the schedule held."""
    assert resumed["state"].keys() == straight["state"].keys()
    assert {key.split()[0] for key in straight["state"]} >= {
        "exp_avg",
        "exp_avg_sq",
        "step",
        "mask",
    }
    differing = [
        key
        for key, value in straight["state"].items()
        if not torch.equal(torch.as_tensor(value), torch.as_tensor(resumed["state"][key]))
    ]
    assert differing == []
    (change,) = resumed["changes"]
    assert change["step"] == STOP
    for (name, world_size), layout in ((before, change["before"]), (after, change["after"])):
        engine = "plain" if name == "ddp" else name
        assert layout == {"engine": engine, "world_size": world_size}
    assert [r["step"] for r in resumed["refinements"]] == [
        r["step"] for r in straight["refinements"]
    ]
