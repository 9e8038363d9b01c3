"""The whole pipeline on two DeepSpeed ranks, as its users start it."""

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

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

OVERRIDES = SMALL | {
    "distill.muon_learning_rate": "null",
    "task.num_test": 50,
    "refine.every_steps": 4,
    "movement.dtype": "bfloat16",
}


def launch(topology, out, **overrides):
    """Ranks meet at a free port, so that two test runs on one machine do not."""
    arguments = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
    arguments += ["--config_file", f"configs/accelerate/{topology}.yaml", "launch/train.py"]
    arguments += ["--config", "configs/quickstart.yaml", "--output_dir", str(out)]
    for key, value in (OVERRIDES | overrides).items():
        arguments += [f"--{key}", str(value)]
    return subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=900)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One small run of the quickstart under ZeRO-2 and one under ZeRO-3."""
    folder = tmp_path_factory.mktemp("ranks")
    for topology in ("cpu_zero2", "cpu_zero3"):
        done = launch(topology, folder / topology)
        assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("topology", ["cpu_zero2", "cpu_zero3"])
def test_every_stage_runs_and_the_student_is_as_sparse_as_asked(runs, topology):
    out = runs / topology
    student = load_model(str(out / "grpo" / "model"))
    assert measured_sparsity(student)[0] == pytest.approx(0.9, abs=1e-4)
    masks = load_masks(out / "grpo" / MASK_FILE)
    for name, weight in prunable_weights(student).items():
        assert not weight[~masks[name]].any()
    report = json.loads((out / "report.json").read_text())
    assert [entry["step"] for entry in report["refinement"]] == [4, 8, 12, 16, 19]
    assert sum(entry["regrown"] for entry in report["refinement"]) > 0
    assert (out / "exit_status").read_text() == "0\n"


def test_both_topologies_train_the_same_student(runs):
    """Distillation samples nothing; only the order of sums differs between the two."""
    two, three = (runs / topology / "distill" for topology in ("cpu_zero2", "cpu_zero3"))
    masks = load_masks(two / MASK_FILE), load_masks(three / MASK_FILE)
    differing = sum(int((masks[0][name] != masks[1][name]).sum()) for name in masks[0])
    assert differing <= 1e-3 * sum(mask.numel() for mask in masks[0].values())
    weights = (prunable_weights(load_model(str(path / "model"))) for path in (two, three))
    for (name, first), second in zip(next(weights).items(), next(weights).values(), strict=True):
        both = masks[0][name] & masks[1][name]
        assert torch.allclose(first[both], second[both], rtol=1e-3, atol=1e-4), name


def test_a_lora_student_generates_and_trains_in_pieces(tmp_path):
    out = tmp_path / "run"
    done = launch(
        "cpu_zero3",
        out,
        **{
            "run.stages": "[prune, grpo]",
            "lora.r": 2,
            "movement.kept": "displacement",
            "movement.pruned": "proposed",
            "movement.dtype": "float32",
            "grpo.max_steps": 5,
            "refine.every_steps": 2,
        },
    )
    assert done.returncode == 0, done.stderr[-3000:]
    student, pruned = (load_model(str(out / stage / "model")) for stage in ("grpo", "prune"))
    assert measured_sparsity(student)[0] == pytest.approx(0.9, abs=1e-4)
    masks, before = load_masks(out / "grpo" / MASK_FILE), prunable_weights(pruned)
    for name, weight in prunable_weights(student).items():
        assert not weight[~masks[name]].any()
        assert not torch.equal(weight[masks[name]], before[name][masks[name]]), "it was trained"
    assert (out / "grpo" / "checkpoint-3" / "adapter_model.safetensors").exists()
    assert not list((out / "grpo" / "checkpoint-3").glob("model*.safetensors"))


def test_checkpoints_say_which_layout_can_read_them(runs):
    for topology, engine in (("cpu_zero2", "zero2"), ("cpu_zero3", "zero3")):
        marker = next((runs / topology / "distill").glob("checkpoint-*/sparsity.json"))
        assert json.loads(marker.read_text())["layout"] == {"engine": engine, "world_size": 2}


def test_two_ranks_that_train_nothing(tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            "2",
            "launch/train.py",
            "--stages",
            "evaluate",
            "--student.path",
            "bundled",
            "--task.num_test",
            "20",
            "--output_dir",
            str(tmp_path / "run"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "run" / "report.json").read_text())["accuracy"]["student"] == 1.0


def test_muon_is_refused_with_its_remedy(tmp_path):
    done = launch("cpu_zero2", tmp_path / "run", **{"distill.muon_learning_rate": 0.01})
    assert done.returncode == 1
    (message,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert "distill.muon_learning_rate: DeepSpeed" in message
    assert "set null" in message
    assert not (tmp_path / "run").exists(), "nothing has run"


def test_a_run_that_diverges_stops_and_names_a_weight(tmp_path):
    done = launch("cpu_zero3", tmp_path / "run", **{"distill.learning_rate": 1e30})
    assert done.returncode == 1
    (message,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert "distill.learning_rate: the gradient of model." in message
    assert "the third in a row" in message
    assert "Traceback" not in done.stderr.partition("torch/distributed/elastic")[0]
    assert (tmp_path / "run" / "exit_status").read_text() == "2\n"
