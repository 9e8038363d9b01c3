"""A grid's cells are real runs; what is there is not run again."""

import json
import os
import subprocess
import sys

import yaml

from tests.e2e.test_pipeline import ROOT, SMALL

STAGES = ["prune", "distill", "evaluate"]


def test_cells_are_measured_once_and_a_failed_run_is_named(tmp_path):
    grid = {
        "title": "two rows",
        "config": "configs/quickstart.yaml",
        "keys": SMALL | {"run.stages": STAGES, "distill.max_steps": 4, "distill.rollouts": 64},
        "levels": {0.75: {}},
        "seeds": [5],
        "headline": "moving",
        "rows": {
            "moving": {"refine.every_steps": 1},
            "fixed": {"refine.start_sparsity": None, "refine.regrow_fraction": 0},
        },
    }
    grid["keys"] = {k: v for k, v in grid["keys"].items() if not k.startswith("grpo")}
    assert run(tmp_path, grid).returncode == 0
    found = json.loads((tmp_path / "out/grid.json").read_text())
    assert [cell["row"] for cell in found["cells"]] == ["moving", "fixed"]
    for cell in found["cells"]:
        assert abs(cell["measured_sparsity"] - 0.75) < 1e-3
        assert 0 <= cell["recovered"]["accuracy"] <= 1
        assert 0 < cell["recovered"]["kl"] < cell["pruned"]["kl"]
    again = run(tmp_path, grid)
    assert again.returncode == 0
    assert again.stdout == ""
    grid["rows"] = {"moving": {"distill.lr_scheduler_type": "none of them"}}
    failed = run(tmp_path, grid)
    assert failed.returncode == 2
    assert failed.stderr.startswith("error: moving at 0.75, seed 5: failed; see ")
    assert "Traceback" not in failed.stderr


def run(folder, grid):
    config = folder / "grid.yaml"
    config.write_text(yaml.safe_dump(grid, sort_keys=False))
    words = ["--config", str(config), "--output_dir", str(folder / "out"), "--jobs", "2"]
    return subprocess.run(
        [sys.executable, "launch/grid.py", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
