"""Warm-up, on-policy distillation and GRPO in one run that keeps the best student of each phase."""

import json
import subprocess
import sys

import pytest
import torch

from pipeline.artifacts import MASK_FILE
from pipeline.models.loading import load_model
from pipeline.models.prunable import measured_sparsity, prunable_weights
from pipeline.sparsity.masks import load_masks
from tests.e2e.test_pipeline import ROOT, SMALL

PHASES = ("distill", "on_policy", "grpo")
VALUES = SMALL | {
    "run.stages": "[prune, distill, on_policy, grpo, evaluate]",
    "task.num_test": 40,
    "task.num_probe": 20,
    "prune.sparsity": 0.5,
    "refine.start_sparsity": 0.3,
    "refine.stages": "[distill, on_policy]",
    "refine.every_steps": 4,
    "refine.end_step": 24,
    "on_policy.max_steps": 12,
    "on_policy.per_device_train_batch_size": 16,
    "on_policy.max_completion_length": 8,
    "on_policy.learning_rate": 1e-4,
    "on_policy.bf16": "false",
    "on_policy.gradient_checkpointing": "false",
    "on_policy.save_steps": 4,
    "evaluate.every_steps": 2,
    "evaluate.patience": 2,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "phases"
    arguments = [sys.executable, "launch/train.py", "--config", "configs/quickstart.yaml"]
    arguments += ["--output_dir", str(out)]
    for key, value in VALUES.items():
        arguments += [f"--{key}", str(value)]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    return out, done


def measured(out, stage):
    logged = json.loads((out / stage / "log_history.json").read_text())
    return {e["step"]: e["heldout_accuracy"] for e in logged if "heldout_accuracy" in e}


def test_each_phase_is_measured_and_leaves_its_best_student(run):
    out, done = run
    report = json.loads((out / "report.json").read_text())
    assert list(report["heldout"]) == ["on_policy", "grpo"], "distill ends on the way"
    for stage, kept in report["heldout"].items():
        accuracies = measured(out, stage)
        if stage == "on_policy":  # after distill's 20 steps the mask is final from step 4 on
            accuracies = {step: value for step, value in accuracies.items() if step >= 4}
        best = max(accuracies.values())
        assert kept["accuracy"] == best
        assert kept["step"] == max(s for s, value in accuracies.items() if value == best)
        assert kept["steps"] == max(accuracies)
        assert f"Stage {stage} left its student of step {kept['step']}" in done.stdout
    assert list(measured(out, "distill")) == list(range(2, 21, 2)), "no patience on the way"
    assert {"distilled", "on_policy", "student"} <= report["accuracy"].keys()
    assert [entry["stage"] for entry in report["refinement"]][-1] == "on_policy"
    assert report["refinement"][-1]["step"] == 24


def test_every_student_fits_its_mask_and_the_last_is_as_sparse_as_asked(run):
    out, _ = run
    for stage in PHASES:
        masks = load_masks(out / stage / MASK_FILE)
        for name, weight in prunable_weights(load_model(str(out / stage / "model"))).items():
            assert not weight[~masks[name]].any(), (stage, name)
    final = load_masks(out / "on_policy" / MASK_FILE)
    assert all(torch.equal(masks[name], mask) for name, mask in final.items())
    assert measured_sparsity(load_model(str(out / "grpo" / "model")))[0] == pytest.approx(0.5, 1e-3)
