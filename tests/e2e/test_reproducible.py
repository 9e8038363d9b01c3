"""The same seed gives the same run on a CPU, bit for bit, and every record says how it was made."""

import json
import random

import numpy
import pytest
import torch
from safetensors.torch import load_file

from pipeline.artifacts import PACKAGES
from pipeline.config_loading import load_config
from pipeline.run import run

SMALL = {
    "task.num_train": 200,
    "task.num_test": 20,
    "task.num_calibration": 16,
    "task.num_probe": 16,
    "distill.rollouts": 64,
    "distill.max_steps": 11,
    "distill.per_device_train_batch_size": 8,
    "grpo.max_steps": 3,
    "grpo.per_device_train_batch_size": 16,
    "refine.every_steps": 2,
}
STAGES = ("prune", "distill", "grpo", "evaluate")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, pytestconfig):
    """Two runs of one seed, and one of another. What the process drew before must not matter."""
    folders = {}
    for number, (name, seed) in enumerate({"one": 7, "two": 7, "other": 8}.items()):
        for draw in (torch.manual_seed, random.seed, numpy.random.seed):
            draw(number)
        config = load_config(pytestconfig.rootpath / "configs/quickstart.yaml", SMALL)
        seeded = config.run.model_copy(update={"seed": seed})
        folders[name] = tmp_path_factory.mktemp(name)
        run(config.model_copy(update={"run": seeded}), output_dir=folders[name])
    return folders


def tensors(folder, stage):
    """Weights and mask that a stage left."""
    files = sorted((folder / stage).glob("*/*.safetensors"))
    files += sorted((folder / stage).glob("*.safetensors"))
    found = {f"{file.name} {name}": t for file in files for name, t in load_file(file).items()}
    assert found
    return found


@pytest.mark.parametrize("stage", ["prune", "distill", "grpo"])
def test_the_same_seed_leaves_the_same_bits(runs, stage):
    one, two, other = (tensors(runs[name], stage) for name in ("one", "two", "other"))
    assert one.keys() == two.keys()
    assert [name for name in one if not torch.equal(one[name], two[name])] == []
    assert any(not torch.equal(one[name], other[name]) for name in one if name in other)


def test_the_same_seed_measures_the_same(runs):
    parts = ("sparsity", "accuracy", "perplexity", "kl_to_teacher", "refinement")
    one, two = (json.loads((runs[name] / "report.json").read_text()) for name in ("one", "two"))
    assert {part: one[part] for part in parts} == {part: two[part] for part in parts}


def test_every_record_says_how_it_was_made(runs):
    for stage in STAGES:
        record = json.loads((runs["one"] / stage / "stage.json").read_text())
        assert record["seed"] == 7
        assert record["versions"].keys() <= {"python", *PACKAGES}
        assert {"python", "torch", "trl"} <= record["versions"].keys()
        assert len(record["config_hash"]) == 64
        assert record["git_commit"] is None or len(record["git_commit"].split("+")[0]) == 40


def test_the_log_says_what_a_stage_costs(runs):
    log = (runs["one"] / "log").read_text()
    (line,) = (line for line in log.splitlines() if "process-hours" in line)
    assert "distill: " in line  # grpo takes fewer than ten steps
    assert "for 11 steps, " in line
    assert line.endswith("tokens a second")
