"""The whole pipeline as its users start it: `accelerate launch launch/train.py`, real processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.models.loading import load_model
from pipeline.models.prunable import measured_sparsity

ROOT = Path(__file__).resolve().parents[2]
SMALL = {
    "task.num_train": 2000,
    "task.num_test": 100,
    "task.num_calibration": 64,
    "distill.rollouts": 512,
    "distill.max_steps": 20,
    "distill.per_device_train_batch_size": 16,
    "distill.save_steps": 5,
    "grpo.max_steps": 12,
    "grpo.per_device_train_batch_size": 16,
    "grpo.save_steps": 3,
    "grpo.logging_steps": 2,
}


def command(config, out, **overrides):
    arguments = [sys.executable, "-m", "accelerate.commands.launch", "launch/train.py"]
    arguments += ["--config", str(config), "--output_dir", str(out)]
    for key, value in (SMALL | overrides).items():
        arguments += [f"--{key}", str(value)]
    return arguments


def launch(config, out, timeout=300, **overrides):
    return subprocess.run(
        command(config, out, **overrides),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One small run of the quickstart."""
    out = tmp_path_factory.mktemp("runs") / "quickstart"
    done = launch("configs/quickstart.yaml", out)
    assert done.returncode == 0, done.stderr[-2000:]
    return out, done


def test_report_is_whole(finished):
    out, _ = finished
    report = json.loads((out / "report.json").read_text())
    names = {"teacher", "dense", "pruned", "distilled", "student"}
    assert names <= report["accuracy"].keys()
    assert names == report["accuracy"]["ci95"].keys()
    assert names <= report["perplexity"].keys()
    assert names - {"teacher"} == report["kl_to_teacher"].keys()
    assert report["kl_to_teacher"]["dense"] == pytest.approx(0.0, abs=1e-6)
    assert report["timing"].keys() == {"prune", "distill", "grpo"}
    assert all(value > 0 for value in report["timing"].values())
    assert report["refinement"][-1]["target"] == 0.9
    assert (out / "exit_status").read_text() == "0\n"


def test_student_is_an_ordinary_llama_with_the_zeros_asked_for(finished):
    out, _ = finished
    sparsity, per_layer = measured_sparsity(load_model(str(out / "grpo" / "model")))
    assert sparsity == pytest.approx(0.9, abs=1e-3)
    assert all(value == pytest.approx(0.9, abs=1e-2) for value in per_layer.values())
    assert json.loads((out / "report.json").read_text())["sparsity"]["measured"] == sparsity


def test_the_terminal_ends_with_a_table_and_how_to_try_it(finished):
    _, done = finished
    assert "student" in done.stdout
    assert "AutoModelForCausalLM.from_pretrained" in done.stdout


def test_the_same_command_again_skips_everything(finished):
    out, _ = finished
    before = (out / "grpo" / "stage.json").read_text()
    again = launch("configs/quickstart.yaml", out)
    assert again.returncode == 0
    assert "grpo: done before, skipped" in again.stderr
    assert (out / "grpo" / "stage.json").read_text() == before


def test_another_config_in_the_same_folder_is_refused_and_changes_nothing(finished):
    out, _ = finished
    before = {path: path.stat().st_mtime_ns for path in (out / "grpo").rglob("*")}
    refused = launch("configs/quickstart.yaml", out, **{"grpo.learning_rate": 0.1})
    assert "grpo.learning_rate: 0.0001 -> 0.1" in refused.stderr
    assert "--resume redo" in refused.stderr
    assert {path: path.stat().st_mtime_ns for path in (out / "grpo").rglob("*")} == before


def test_evaluate_alone_measures_any_model(finished, tmp_path):
    out, _ = finished
    done = subprocess.run(
        [
            sys.executable,
            "launch/train.py",
            "--stages",
            "evaluate",
            "--student.path",
            str(out / "grpo" / "model"),
            "--output_dir",
            str(tmp_path / "run"),
            "--task.num_test",
            "50",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["accuracy"]["num_prompts"] == 50
    assert "pruned" not in report["accuracy"]


def test_grpo_70_runs_with_only_paths_and_step_counts_changed(tmp_path):
    done = launch(
        "configs/grpo_70.yaml",
        tmp_path / "run",
        timeout=400,
        **{
            "student.path": "bundled",
            "teacher.path": "bundled",
            "task.path": "bundled",
            "calibration.source": "answers",  # with the instruction the teacher gets none right
        },
    )
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["sparsity"]["measured"] == pytest.approx(0.7, abs=1e-3)
