"""A sweep as its users start it, cut short and started again, on the bundled model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
CONFIG = {
    "run": {"stages": ["sweep"]},
    "task": {"num_calibration": 16, "num_test": 40, "num_train": 200},
    "evaluate": {"max_new_tokens": 8},
    "distill": {
        "max_steps": 3,
        "rollouts": 64,
        "per_device_train_batch_size": 8,
        "bf16": False,
        "gradient_checkpointing": False,
        "save_strategy": "no",
    },
    "sweep": {
        "seeds": [1],
        "levels": [0.5, 0.9],
        "recover_levels": [0.9],
        "headline": "MAMA + LS",
        "rows": {
            "magnitude": {"method": "magnitude", "redistribution": "none"},
            "MAMA + LS": {"method": "mama"},
            "magnitude 2:4": {"method": "magnitude", "redistribution": "none", "scope": "2:4"},
            "SDMPrune-style": {"method": "sdmprune", "redistribution": "none"},
        },
    },
}


def sweep(out, **overrides):
    command = [sys.executable, "launch/train.py", "--config", str(out.parent / "sweep.yaml")]
    command += ["--output_dir", str(out)]
    for key, value in overrides.items():
        command += [f"--{key}", str(value)]
    return subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def cells_of(out):
    found = [json.loads(path.read_text()) for path in (out / "sweep" / "cells").glob("*.json")]
    return {(cell["row"], cell["sparsity"], cell["seed"]): cell for cell in found}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    (folder / "sweep.yaml").write_text(yaml.safe_dump(CONFIG, sort_keys=False))
    done = sweep(folder / "out")
    assert done.returncode == 0, done.stderr[-2000:]
    return folder / "out", done


def test_every_cell_is_pruned_and_those_asked_for_recovered(finished):
    out, done = finished
    cells = cells_of(out)
    assert cells.keys() == {
        ("magnitude", 0.5, 1),
        ("magnitude", 0.9, 1),
        ("MAMA + LS", 0.5, 1),
        ("MAMA + LS", 0.9, 1),
        ("magnitude 2:4", 0.5, 1),
        ("SDMPrune-style", 0.5, 1),
    }, "2:4 has one level, and MLP channels cannot give 0.9"
    for (row, level, _), cell in cells.items():
        near = 0.05 if row == "SDMPrune-style" else 1e-3
        assert cell["measured_sparsity"] == pytest.approx(level, abs=near)
        assert (cell["recovered"] is not None) == (level == 0.9)
        assert cell["pruned"]["kl"] > 0
    recovered = cells["magnitude", 0.9, 1]
    assert recovered["recovered"]["steps"] == 3
    assert recovered["recovered"]["kl"] < recovered["pruned"]["kl"]
    page = (out / "sweep" / "table.md").read_text()
    assert f"6 cells; tables and pictures: {out / 'sweep' / 'table.md'}" in done.stderr
    assert all(row in page for row in CONFIG["sweep"]["rows"])
    assert json.loads((out / "sweep" / "sweep.json").read_text())["cells"]


def test_it_goes_on_where_it_was(finished):
    out, _ = finished
    folder = out / "sweep" / "cells"
    lost = next(folder.glob("mama-ls-*-0.5-1.json"))
    lost.unlink()
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    wider = json.dumps(CONFIG["sweep"]["rows"] | {"random": {"method": "random"}})
    done = sweep(out, **{"sweep.rows": wider})
    assert done.returncode == 0, done.stderr[-2000:]
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert lost.exists()
    new = cells_of(out).keys()
    assert {("random", 0.5, 1), ("random", 0.9, 1), ("MAMA + LS", 0.5, 1)} <= new


def test_a_changed_key_runs_the_cells_it_concerns_again(finished):
    out, _ = finished
    old = cells_of(out)
    done = sweep(out, **{"distill.learning_rate": 1e-3, "sweep.levels": "[0.9]"})
    assert done.returncode == 0, done.stderr[-2000:]
    new = cells_of(out)
    assert new["magnitude", 0.9, 1]["depends_on"] != old["magnitude", 0.9, 1]["depends_on"]
    assert new["magnitude", 0.5, 1] == old["magnitude", 0.5, 1]


def test_mistakes_are_one_message(tmp_path):
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(CONFIG, sort_keys=False))
    rows = '{"a": {"method": "mamma"}, "b": {"method": "alps", "scope": "model"}}'
    done = sweep(tmp_path / "out", **{"sweep.rows": rows, "sweep.headline": "c"})
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    for part in ("sweep.rows.a.method: mamma", "sweep.rows.b.scope: model", "sweep.headline: c"):
        assert part in done.stderr
    assert not (tmp_path / "out").exists()
