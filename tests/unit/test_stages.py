"""The schedule of a run whose stages are started one command at a time."""

import pytest

from pipeline.artifacts import RunFolder
from pipeline.config_loading import load_config
from pipeline.stages.training import end_step, first_step, stage_sparsity

CONFIG = "configs/quickstart.yaml"
SHORT = {"distill.max_steps": 40, "grpo.max_steps": 20}


def test_a_later_command_goes_on_where_the_schedule_stood(tmp_path):
    folder = RunFolder.open(tmp_path)
    both = load_config(CONFIG, SHORT)
    assert first_step(both, folder, "distill") == 0
    assert first_step(both, folder, "grpo") == 40
    assert end_step(both, folder) == 36

    record = {"done": True, "max_steps": 40, "refine_end_step": 24}
    folder.write_record("distill", record)
    later = load_config(CONFIG, SHORT | {"run.stages": ["grpo", "evaluate"]})
    assert first_step(later, folder, "grpo") == 40
    assert end_step(later, folder) == 24
    sparsity = stage_sparsity(later, folder, "grpo", tmp_path)
    assert not any(sparsity.schedule.is_due(sparsity.first_step + step) for step in range(1, 21))


def test_grpo_alone_starts_its_own_schedule(tmp_path):
    folder = RunFolder.open(tmp_path)
    alone = load_config(CONFIG, SHORT | {"run.stages": ["prune", "grpo", "evaluate"]})
    sparsity = stage_sparsity(alone, folder, "grpo", tmp_path)
    assert sparsity.first_step == 0
    assert sparsity.schedule.sparsity_at(12) == pytest.approx(0.9)
