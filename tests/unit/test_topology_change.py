"""What a checkpoint may go on under, and the one message where it may not."""

import json
from types import SimpleNamespace

import pytest

from pipeline.errors import UserError
from pipeline.training.topology_change import AnyTopology, _for_groups, batch_of, layout_of

ZERO_2 = {"engine": "zero2", "world_size": 2}


def trainer(zero=None, ranks=1, per_device=8, accumulation=1, generation=None, fp16=False, **ds):
    """A run that accepts a checkpoint or does not: its settings, and nothing that trains."""
    made = AnyTopology()
    made.is_deepspeed_enabled = zero is not None
    made.args = SimpleNamespace(
        per_device_train_batch_size=per_device, gradient_accumulation_steps=accumulation, fp16=fp16
    )
    if generation is not None:
        made.args.steps_per_generation = generation
    plugin = SimpleNamespace(zero_stage=zero, deepspeed_config=ds)
    made.accelerator = SimpleNamespace(
        num_processes=ranks, state=SimpleNamespace(deepspeed_plugin=plugin)
    )
    return made


def accept(before, after, folder, missing=(), **changes):
    """Has `after` look at a checkpoint of `before`."""
    for name in {"trained-00000-of-00001.json", "scheduler.pt"} - set(missing):
        (folder / name).touch()
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 7}))
    note = {"layout": layout_of(before), "batch": batch_of(before)} | changes
    after.accept_topology(folder, note, "grpo")
    return after


def test_the_same_layout_changes_nothing(tmp_path):
    same = accept(trainer(2, 2), trainer(2, 2), tmp_path, missing=["scheduler.pt"])
    assert same.topology_changes == ()
    assert (same._recut_from, same._rows_moved) == (None, False)


@pytest.mark.parametrize(
    ("before", "after", "recut_from", "moved"),
    [
        (trainer(), trainer(2, 2, 4), "plain", True),
        (trainer(2, 2, 4), trainer(3, 2, 4), "zero2", False),
        (trainer(3, 2, 4), trainer(), "zero3", True),
        (trainer(), trainer(None, 2, 2, 2), None, True),
        (trainer(), trainer(None, 1, 4, 2), None, True),
    ],
)
def test_what_is_read_anew(before, after, recut_from, moved, tmp_path):
    accept(before, after, tmp_path)
    assert (after._recut_from, after._rows_moved) == (recut_from, moved)
    (change,) = after.topology_changes
    assert change == {"step": 7, "before": layout_of(before), "after": layout_of(after)}


def test_changes_add_up(tmp_path):
    earlier = [{"step": 3, "before": ZERO_2, "after": layout_of(trainer())}]
    again = accept(trainer(), trainer(1), tmp_path, topology_changes=earlier)
    assert [change["step"] for change in again.topology_changes] == [3, 7]


@pytest.mark.parametrize(
    ("after", "remedy"),
    [
        (trainer(2, 2, 8), "16 on 2 ranks from here on; set grpo.per_device_train_batch_size 4"),
        (trainer(None, 4, 8), "32 on 4 ranks from here on; set grpo.per_device_train_batch_size 2"),
        (trainer(None, 2, 8, 8), "to numbers whose product is 8 / 2"),
        (trainer(None, 3, 8), "set a number of ranks that divides 8"),
        (trainer(None, 2, 4, generation=4), "set grpo.steps_per_generation 2"),
    ],
)
def test_another_number_of_rows_is_refused_with_numbers_that_work(after, remedy, tmp_path):
    generation = 2 if hasattr(after.args, "steps_per_generation") else None
    with pytest.raises(UserError, match="was saved by a run ") as refused:
        accept(trainer(generation=generation), after, tmp_path)
    assert remedy in str(refused.value)


@pytest.mark.parametrize(
    ("after", "missing", "why"),
    [
        (trainer(2), ["trained-00000-of-00001.json"], "an older version wrote it"),
        (trainer(None, 2, 4), ["trained-00000-of-00001.json"], "an older version wrote it"),
        (trainer(2), ["scheduler.pt"], "an optimizer or a scheduler of its own"),
        (trainer(2, optimizer={}), [], "an optimizer or a scheduler of its own"),
        (trainer(2, fp16=True), [], "the loss scale of fp16"),
        (trainer(0), [], "zero0 keeps its optimizer's state"),
    ],
)
def test_what_would_be_carried_over_in_part_is_refused(after, missing, why, tmp_path):
    with pytest.raises(UserError, match="was saved by plain on 1 rank, and") as refused:
        accept(trainer(), after, tmp_path, missing)
    assert why in str(refused.value)
    assert str(refused.value).endswith("launch as before, or set another --output_dir")


def test_a_schedule_fits_groups_that_deepspeed_leaves_out(tmp_path):
    state = {"base_lrs": [0.1, 0.1], "_last_lr": [0.05, 0.05], "last_epoch": 3}
    assert _for_groups(tmp_path, state, 2) == state
    assert _for_groups(tmp_path, state, 1) == {
        "base_lrs": [0.1],
        "_last_lr": [0.05],
        "last_epoch": 3,
    }
    with pytest.raises(UserError, match="differ in their learning rates"):
        _for_groups(tmp_path, state | {"base_lrs": [0.1, 0.2]}, 1)
