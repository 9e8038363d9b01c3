"""Held-out accuracy in training: what is kept, when a stage ends, and that nothing else changes."""

import json
import logging
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from pipeline.artifacts import MASK_FILE
from pipeline.config_loading import load_config
from pipeline.models.loading import load_model, load_tokenizer
from pipeline.sparsity.masks import load_masks
from pipeline.stages.inputs import open_task
from pipeline.stages.training import Training, train
from pipeline.training.best_student import read_best
from pipeline.training.checkpoint import load_sparsity
from pipeline.training.heldout import Measurement, stale_measurements
from pipeline.training.probe import Probe
from tests.unit.test_training import distill_trainer, sparsity_of

CONFIG = "configs/quickstart.yaml"
SMALL = {
    "task.num_train": 50,
    "task.num_calibration": 8,
    "task.num_probe": 12,
    "task.num_test": 8,
    "evaluate.max_new_tokens": 3,
    "evaluate.batch_size": 5,
}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("bundled")


@pytest.fixture(scope="module")
def inputs():
    return open_task(load_config(CONFIG, SMALL))


class Snapshots(TrainerCallback):
    """Model, masks and movement after each step, once all that happens in it has."""

    def __init__(self, trainer):
        self.trainer, self.steps, self.trained = trainer, {}, []

    def on_step_end(self, args, state, control, **kwargs):
        self.trained.append(state.global_step)

    def on_train_end(self, args, state, control, **kwargs):
        self.on_step_begin(args, state, control)

    def on_step_begin(self, args, state, control, **kwargs):
        engine = self.trainer.sparsity
        self.steps[state.global_step] = (
            {
                name: weight.detach().clone()
                for name, weight in self.trainer.model.named_parameters()
            },
            dict(engine.state.whole_masks(engine.weights)),
            {name: movement.clone() for name, movement in engine.state.movement.items()},
        )


@pytest.fixture
def run(tokenizer, inputs, tmp_path, monkeypatch):
    """Trains a stage under hand-made accuracies, by step; None measures."""

    def run_stage(accuracies, max_steps=6, patience=None, end_step=2, every_steps=1, **schedule):
        config = load_config(
            CONFIG, SMALL | {"evaluate.every_steps": every_steps, "evaluate.patience": patience}
        )
        trainer = distill_trainer(tokenizer, tmp_path / "distill", max_steps)
        sparsity = sparsity_of(trainer.model, tmp_path / "prune", end_step=end_step, **schedule)
        sparsity.starts_final = False
        snapshots = Snapshots(trainer)
        trainer.add_callback(snapshots)
        if accuracies is not None:
            monkeypatch.setattr(
                Probe, "accuracy", lambda probe: accuracies[trainer.state.global_step - 1]
            )
        done = train(config, inputs, trainer, sparsity, tmp_path / "distill", None)
        trainer.trained = snapshots.trained
        return done, trainer, snapshots.steps

    return run_stage


def assert_left(stage, trainer, snapshot):
    """The stage's folder holds this student, and its masks and movement are of the same step."""
    weights, masks, movement = snapshot
    model = load_model(str(stage / "model"))
    for name, weight in model.named_parameters():
        assert torch.equal(weight, weights[name]), name
    saved = load_masks(stage / MASK_FILE)
    assert all(torch.equal(saved[name], mask) for name, mask in masks.items())
    state = load_sparsity(stage, trainer.sparsity.weights, torch.float32)
    assert all(torch.equal(state.movement[name], found) for name, found in movement.items())
    for name, mask in state.whole_masks(trainer.sparsity.weights):
        assert torch.equal(mask, masks[name])


def test_the_best_at_the_final_sparsity_is_left_and_of_equals_the_latest(run, tmp_path):
    """Step 1 is better still, but not as sparse as asked."""
    done, trainer, snapshots = run([0.9, 0.5, 0.7, 0.7, 0.6, 0.1])
    assert done == Training(6, {"step": 4, "accuracy": 0.7})
    stage = tmp_path / "distill"
    assert_left(stage, trainer, snapshots[4])
    assert_left(stage / "best", trainer, snapshots[4])
    logged = json.loads((stage / "log_history.json").read_text())
    found = [(log["step"], log["heldout_accuracy"]) for log in logged if "heldout_accuracy" in log]
    assert found == list(enumerate([0.9, 0.5, 0.7, 0.7, 0.6, 0.1], start=1))


def test_a_last_student_as_good_as_the_best_is_left(run, tmp_path):
    done, trainer, snapshots = run([0.1, 0.7, 0.7, 0.2, 0.2, 0.7])
    assert done.student == {"step": 6, "accuracy": 0.7}
    assert_left(tmp_path / "distill", trainer, snapshots[6])


def test_a_stage_that_does_not_reach_the_final_sparsity_leaves_its_last_student(run, tmp_path):
    done, trainer, snapshots = run([0.9, 0.5, 0.7, 0.7, 0.6, 0.1], end_step=9, patience=1)
    assert done == Training(6, None)
    assert_left(tmp_path / "distill", trainer, snapshots[6])
    assert not (tmp_path / "distill" / "best").exists()


def test_measured_are_every_nth_step_and_the_last(run, tmp_path, caplog):
    caplog.set_level(logging.INFO, "pipeline")
    run([0.25] * 5, max_steps=5, every_steps=2)
    said = [r.getMessage() for r in caplog.records if "held-out" in r.getMessage()]
    assert [line.split(":")[1] for line in said] == [" step 2", " step 4", " step 5"]
    assert said[0] == "distill: step 2: held-out accuracy 0.2500 at sparsity 0.7500"


def test_patience_ends_a_stage_under_its_last_mask_only(run, tmp_path):
    """Before step 3 the mask is not the last; .5 and .5 after .5 bring nothing better."""
    done, trainer, snapshots = run(
        [0.9, 0.8, 0.5, 0.5, 0.5, 0.6, 0.7, 0.8], max_steps=8, end_step=3, patience=2
    )
    assert done == Training(5, {"step": 5, "accuracy": 0.5})
    assert trainer.trained == [1, 2, 3, 4, 5]
    assert_left(tmp_path / "distill", trainer, snapshots[5])
    assert (tmp_path / "distill" / "checkpoint-5" / "sparsity.json").exists()


def test_a_stage_that_was_over_when_the_run_was_cut_short_trains_no_further(run, tmp_path):
    """The record of the stage is what is missing; its last checkpoint is there."""
    accuracies = [0.9, 0.8, 0.5, 0.4, 0.4, 0.6, 0.7, 0.8]
    for max_steps, patience, last in ((8, 2, 5), (5, None, 5)):
        values = {"max_steps": max_steps, "end_step": 3, "patience": patience}
        first, _, snapshots = run(accuracies, **values)
        again, trainer, _ = run(accuracies, **values)
        assert first == again == Training(last, {"step": 3, "accuracy": 0.5})
        assert trainer.trained == []
        assert_left(tmp_path / "distill", trainer, snapshots[3])
        (tmp_path / "distill").rename(tmp_path / f"distill-{max_steps}")


@pytest.mark.parametrize(("best", "from_start"), [(2, False), (3, False), (6, False), (4, True)])
def test_a_resumed_stage_leaves_the_student_of_the_straight_one(run, tmp_path, best, from_start):
    """A better student after the checkpoint, of a run that was cut short, is forgotten."""
    accuracies = [0.3] * 6
    accuracies[best - 1] = 0.8
    _, _, snapshots = run(accuracies)
    straight = load_file(tmp_path / "distill" / "model" / "model.safetensors")
    (tmp_path / "distill").rename(tmp_path / "straight")

    run([*accuracies[:3], 0.9, 0.95], max_steps=5)
    assert read_best(tmp_path / "distill")["step"] == 5
    (tmp_path / "distill" / "checkpoint-5").rename(tmp_path / "lost")
    if from_start:
        shutil.rmtree(tmp_path / "distill" / "checkpoint-3")
    done, trainer, _ = run(accuracies)
    assert done.student == {"step": best, "accuracy": 0.8}
    resumed = load_file(tmp_path / "distill" / "model" / "model.safetensors")
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    assert_left(tmp_path / "distill", trainer, snapshots[best])


def test_a_stage_that_measures_trains_as_one_that_does_not(run, inputs, tokenizer, tmp_path):
    """Real answers to the probe prompts, never to the test prompts."""
    _, trainer, snapshots = run(None, end_step=9, every_steps=2)
    measured = [log for log in trainer.state.log_history if "heldout_accuracy" not in log]
    (tmp_path / "distill").rename(tmp_path / "measured")
    silent = distill_trainer(tokenizer, tmp_path / "distill", 6)
    config = load_config(CONFIG, SMALL)
    sparsity = sparsity_of(silent.model, tmp_path / "prune", end_step=9)
    assert train(config, inputs, silent, sparsity, tmp_path / "distill", None) == Training(6, None)
    for name, weight in silent.model.named_parameters():
        assert torch.equal(weight, snapshots[6][0][name]), name
    keys = ("step", "loss", "kl", "grad_norm", "sparsity")
    assert [[log.get(key) for key in keys] for log in measured] == [
        [log.get(key) for key in keys] for log in silent.state.log_history
    ]


def test_stale_measurements_by_hand():
    def stale(*accuracies, before=()):
        early = [Measurement(0, value, False, False) for value in before]
        return stale_measurements(early + [Measurement(0, v, True, True) for v in accuracies])

    assert stale(before=(0.9, 0.1, 0.1)) == 0
    assert stale(0.5) == 0
    assert stale(0.5, 0.5, 0.4) == 2
    assert stale(0.5, 0.4, 0.6) == 0
    assert stale(0.5, 0.5, before=(0.9,)) == 1
