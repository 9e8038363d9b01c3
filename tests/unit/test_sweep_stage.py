"""Sweeps of a cell or none, in this process."""

import json

import pytest
import torch

from pipeline.artifacts import RunFolder
from pipeline.config_loading import load_config
from pipeline.errors import UserError
from pipeline.evaluation.agreement import agreement_with_teacher
from pipeline.lock import LOCK_FILE, release_lock, take_lock
from pipeline.models.loading import load_model, load_tokenizer
from pipeline.stages import sweep
from pipeline.stages.inputs import open_task, open_teacher
from pipeline.stages.measure import reference_completions

SMALL_TASK = {"task.num_calibration": 2, "task.num_train": 20, "task.num_test": 6}


def test_kl_is_to_the_dense_student_when_the_teacher_is_another_model(tmp_path):
    other = load_model("bundled")
    with torch.no_grad():
        other.model.layers[1].mlp.down_proj.weight.mul_(0.5)
    other.save_pretrained(tmp_path / "teacher")
    load_tokenizer("bundled").save_pretrained(tmp_path / "teacher")
    config = load_config(
        "configs/sweep.yaml",
        {
            "teacher.path": str(tmp_path / "teacher"),
            **SMALL_TASK,
            "sweep.rows": {"magnitude": {"method": "magnitude", "redistribution": "none"}},
            "sweep.headline": "magnitude",
            "sweep.levels": [0.0, 0.5],
            "sweep.seeds": [1],
        },
    )
    folder, inputs = RunFolder.open(tmp_path / "run"), open_task(config)
    sweep.run(config, folder, inputs, folder.stage("sweep"))
    found = json.loads((folder.stage("sweep") / "sweep.json").read_text())
    assert found["description"]["teacher"] == str(tmp_path / "teacher")
    assert found["reference"]["dense"]["kl"] == pytest.approx(0, abs=1e-7)
    unpruned, pruned = (cell["pruned"]["kl"] for cell in found["cells"])
    assert unpruned == pytest.approx(0, abs=1e-7)
    pairs = reference_completions(folder, config, open_teacher(config), inputs)
    to_teacher = agreement_with_teacher(load_model("bundled"), other, pairs, batch_size=8)
    assert to_teacher.kl > 1e-3
    assert pruned > 1e-3


def test_a_sweep_without_any_cell_is_refused(tmp_path):
    config = load_config(
        "configs/sweep.yaml",
        {
            **SMALL_TASK,
            "sweep.rows": {"SDMPrune-style": {"method": "sdmprune", "redistribution": "none"}},
            "sweep.headline": None,
            "sweep.levels": [0.95],
            "sweep.seeds": [1],
        },
    )
    folder = RunFolder.open(tmp_path / "run")
    with pytest.raises(UserError, match=r"sweep\.levels: \[0\.95\]: no row"):
        sweep.run(config, folder, open_task(config), folder.stage("sweep"))


def test_a_run_taken_over_within_a_cell_is_no_fault_of_its_row(tmp_path, monkeypatch):
    config = load_config("configs/sweep.yaml", SMALL_TASK | {"sweep.seeds": [1]})
    folder = RunFolder.open(tmp_path / "run")
    owner = take_lock(folder.root)

    def lose_the_lock_meanwhile(row, work, *_):
        (folder.root / LOCK_FILE).unlink()
        work.write_record("prune", {})

    monkeypatch.setattr(sweep.prune, "one_shot", lose_the_lock_meanwhile)
    with pytest.raises(UserError, match=r"^--output_dir: .* is gone, so another start"):
        sweep._cells_of_seed(config, 1, "", None, folder.stage("sweep"))
    release_lock(folder.root, owner)
