"""A run that was not evaluated has a page too: how it ended, what its stages left, what it cost."""

import json

import pytest

from pipeline.artifacts import RunFolder
from pipeline.config_loading import load_config
from pipeline.stages.inputs import open_task
from pipeline.stages.interim import write_interim
from pipeline.stages.measure import to_json
from pipeline.stopping import Stopped
from tests.unit.test_report import measurements

SMALL = {"task.num_train": 50, "task.num_test": 10, "distill.max_steps": 20, "grpo.max_steps": 9}


@pytest.fixture(scope="module")
def config():
    return load_config("configs/quickstart.yaml", SMALL)


@pytest.fixture(scope="module")
def inputs(config):
    return open_task(config)


@pytest.fixture
def folder(tmp_path):
    """Pruned, and broken off between two checkpoints of distill."""
    folder = RunFolder(tmp_path / "a_run")
    record = {"seconds": 5.0, "device": "cpu", "processes": 2, "peak_memory_bytes": 2**30}
    folder.write_record("prune", record | {"done": True})
    folder.write_record("distill", record | {"done": False})
    (folder.stage("prune") / "one_shot").mkdir()
    metrics = json.dumps(to_json(measurements(120, 1.25, 0.5)))
    (folder.stage("prune") / "one_shot" / "metrics.json").write_text(metrics)
    for step in (9, 10):
        log = [{"step": s, "loss": 1 / s, "kl": 1 / s, "sparsity": 0.5} for s in range(1, step)]
        checkpoint = folder.stage("distill") / f"checkpoint-{step}"
        checkpoint.mkdir()
        (checkpoint / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    return folder


def page_of(folder):
    assert not (folder.root / "report.json").exists()
    assert "<html" in (folder.root / "report.html").read_text()
    return (folder.root / "report.md").read_text()


def test_a_run_that_failed_midway(config, inputs, folder):
    write_interim(config, folder, inputs, ValueError("<script>no [memory]"))
    page = page_of(folder)
    assert r"**Failed in stage distill: ValueError: \<script\>no \[memory\]. Done: prune.**" in page
    assert "Sparsity 0.9 was asked for." in page
    assert "| pruned | 60.0 % [" in page
    assert "KL to the teacher goes from 1 to 0.111" in page
    assert "![KL to the teacher" in page
    assert "| prune | 5 s | 2 x cpu | 0.003 | - |" in page
    assert r"a\_run/prune/model" in page  # what there is to try so far
    assert "| `distill.max_steps` | 20 |" in page
    assert "<script>" not in (folder.root / "report.html").read_text()


def test_the_command_repeats_the_stages_of_earlier_commands_too(config, inputs, folder):
    later = load_config("configs/quickstart.yaml", SMALL | {"run.stages": ["distill", "grpo"]})
    for asked, stages in ((config, ""), (later, " --stages prune,distill,grpo")):
        write_interim(asked, folder, inputs, None)
        page = page_of(folder)
        command = f"accelerate launch launch/train.py --config {folder.root}/config.yaml{stages}\n"
        assert command in page
    assert "| Stages | prune, distill, grpo |" in page


def test_a_run_that_was_stopped(config, inputs, folder):
    write_interim(config, folder, inputs, Stopped("SIGTERM"))
    assert "Stopped by SIGTERM in stage distill; the same command goes on." in page_of(folder)


def test_a_sweep_points_to_its_own_page(inputs, tmp_path):
    config = load_config("configs/sweep.yaml", {})
    folder = RunFolder(tmp_path)
    folder.write_record("sweep", {"seconds": 9.0, "done": True})
    (folder.stage("sweep") / "table.html").touch()
    write_interim(config, folder, inputs, None)
    page = page_of(folder)
    assert "**Done: sweep.**" in page
    assert "[Methods side by side](sweep/table.html)" in page
    assert "No model of this run was measured." in page
    assert "was asked for" not in page
    assert '<a href="sweep/table.html">' in (folder.root / "report.html").read_text()


def test_a_finished_report_and_an_empty_folder_are_left_alone(config, inputs, folder, tmp_path):
    folder.write_record("evaluate", {"seconds": 1.0, "done": True})
    write_interim(config, folder, inputs, ValueError())
    assert not (folder.root / "report.md").exists()
    write_interim(config, RunFolder(tmp_path / "empty"), inputs, None)
    assert not (tmp_path / "empty").exists()


def test_trouble_with_the_page_is_a_line_in_the_log(config, inputs, folder, caplog):
    (folder.stage("distill") / "checkpoint-10" / "trainer_state.json").write_text("{")
    write_interim(config, folder, inputs, None)
    assert "no report.html" in caplog.text
