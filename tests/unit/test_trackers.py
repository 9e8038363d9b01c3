"""A tracker's run is the run folder's: the same id after a restart, the user's own first."""

import os

import pytest

from pipeline.config_loading import load_config
from pipeline.errors import UserError
from pipeline.training.arguments import check_trl_values, distill_arguments
from pipeline.training.trackers import TRACKER_FILE, keep_tracker_run, tracker_id, uses_tracker

STEPS = {"distill.max_steps": 9, "grpo.max_steps": 9, "distill.bf16": False}


@pytest.fixture(autouse=True)
def no_wandb(monkeypatch):
    for name in ("WANDB_RUN_ID", "WANDB_RESUME"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def test_a_restart_has_the_id_of_before(tmp_path, monkeypatch):
    keep_tracker_run(tmp_path)
    first = os.environ["WANDB_RUN_ID"]
    assert os.environ["WANDB_RESUME"] == "allow"
    monkeypatch.delenv("WANDB_RUN_ID")
    keep_tracker_run(tmp_path)
    assert os.environ["WANDB_RUN_ID"] == first == tracker_id(tmp_path)
    monkeypatch.delenv("WANDB_RUN_ID")
    (tmp_path / "other").mkdir()
    keep_tracker_run(tmp_path / "other")
    assert os.environ["WANDB_RUN_ID"] != first


def test_the_users_own_run_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    monkeypatch.setenv("WANDB_RESUME", "must")
    keep_tracker_run(tmp_path)
    assert (os.environ["WANDB_RUN_ID"], os.environ["WANDB_RESUME"]) == ("mine", "must")


def test_the_name_holds_the_id(tmp_path):
    config = load_config(None, STEPS)
    assert distill_arguments(config, tmp_path / "distill").run_name is None
    keep_tracker_run(tmp_path)
    name = distill_arguments(config, tmp_path / "distill").run_name
    assert name == f"{tmp_path.name}-{tracker_id(tmp_path)}"
    own = load_config(None, STEPS | {"distill.run_name": "mine"})
    assert distill_arguments(own, tmp_path / "distill").run_name == "mine"
    assert (tmp_path / TRACKER_FILE).exists()


@pytest.mark.parametrize("report_to", ["tensorboard", "none", "all", []])
def test_trackers_that_are_there_are_not_refused(report_to):
    check_trl_values(load_config(None, STEPS | {"distill.report_to": report_to}))


@pytest.mark.parametrize(
    ("report_to", "wanted"), [("none", False), (["none"], False), ("wandb", True), (["x"], True)]
)
def test_only_where_something_is_reported(report_to, wanted):
    assert uses_tracker(load_config(None, STEPS | {"grpo.report_to": report_to})) == wanted
    assert not uses_tracker(load_config(None, STEPS))


def test_a_tracker_that_is_not_there_is_found_before_the_first_stage():
    config = load_config(None, STEPS | {"grpo.report_to": ["tensorboard", "wandbb", "dvclive"]})
    with pytest.raises(UserError) as caught:
        check_trl_values(config)
    assert str(caught.value).splitlines() == [
        "grpo.report_to: wandbb: no tracker that transformers knows; set wandb instead",
        "grpo.report_to: dvclive: not installed; pip install dvclive, or set tensorboard instead",
    ]
