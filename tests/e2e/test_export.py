"""A whole run that ends in exports, from the command line."""

import json
import subprocess
import sys

from pipeline.export import csr, packed
from pipeline.export.formats import differing_weights
from pipeline.models.loading import load_model
from pipeline.models.prunable import measured_sparsity
from tests.e2e.test_pipeline import ROOT

VALUES = {
    "run.stages": "[prune, evaluate, export]",
    "refine.start_sparsity": "null",
    "export.dtype": "bfloat16",
    "export.formats": "[hf, packed, csr, narrow]",
    "task.num_train": 64,
    "task.num_test": 40,
    "task.num_calibration": 64,
}


def test_the_student_is_exported_small_and_the_same(tmp_path):
    out = tmp_path / "run"
    arguments = [sys.executable, "launch/train.py", "--config", "configs/quickstart.yaml"]
    arguments += ["--output_dir", str(out)]
    for key, value in VALUES.items():
        arguments += [f"--{key}", str(value)]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    student = load_model(str(out / "prune" / "model"), dtype="bfloat16")
    ordinary = load_model(str(out / "export" / "hf"), dtype="bfloat16")
    unpacked = packed.load(out / "export" / "packed")
    assert differing_weights(student, ordinary) == []
    assert differing_weights(student, unpacked) == []
    sparse = csr.load(out / "export" / "csr")
    assert differing_weights(student, sparse) == []
    assert any(isinstance(module, csr.CsrLinear) for module in sparse.modules())
    narrow = load_model(str(out / "export" / "narrow"), dtype="bfloat16")
    assert narrow.config.intermediate_size < student.config.intermediate_size
    sparsity, _ = measured_sparsity(unpacked)
    report = json.loads((out / "report.json").read_text())
    assert sparsity == report["sparsity"]["measured"]
    assert json.loads((out / "export" / "export.json").read_text())["packed"]["prunable_ratio"] > 6
    card = (out / "export" / "packed" / "README.md").read_text()
    assert f"Sparsity {sparsity:.4f}" in card
    assert "| student | " in card
