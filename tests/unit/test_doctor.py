"""`--check`: what it prints, what it refuses, and that it leaves no trace."""

import json
import os
import shutil

import pytest
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from launch.train import main
from pipeline.artifacts import RunFolder
from pipeline.config_loading import load_config
from pipeline.doctor import check as doctor
from pipeline.doctor.disk import checkpoints_kept, nearest_existing
from pipeline.models.paths import BUNDLED_MODEL
from pipeline.stages.provenance import stage_inputs

SMALL_TASK = ["--task.num_train", "64", "--task.num_test", "32"]


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch, pytestconfig):
    monkeypatch.chdir(pytestconfig.rootpath)


def check(capsys, out, *arguments, config="configs/quickstart.yaml"):
    """Status, output and message of `--check`."""
    given = ["--config", config, "--output_dir", str(out), "--check", *SMALL_TASK, *arguments]
    status = main(given)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def model_folder(path, change=None, **config):
    """The bundled tokenizer with another config.json and no weights."""
    shutil.copytree(BUNDLED_MODEL, path, ignore=shutil.ignore_patterns("*.safetensors"))
    if config:
        LlamaConfig(**config).save_pretrained(path)
    return path


def test_the_bundled_run_is_planned_and_nothing_is_written(capsys, tmp_path):
    before = sorted(os.listdir("runs")) if os.path.isdir("runs") else None
    status, out, err = check(capsys, tmp_path / "run")
    assert (status, err) == (0, "")
    assert "64 train" in out
    assert "120 steps of 128 sequences" in out
    rows = [line for line in out.splitlines() if line.startswith((">", "  plain", "  ZeRO"))]
    assert len(rows) == 8
    assert rows[0].startswith("> plain  1 rank")
    assert list(tmp_path.iterdir()) == []
    assert (sorted(os.listdir("runs")) if os.path.isdir("runs") else None) == before


def test_a_large_llama_is_planned_from_its_config_alone(capsys, tmp_path):
    student = model_folder(
        tmp_path / "student",
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    )
    models = ["--student.path", str(student), "--teacher.path", str(student)]
    status, out, err = check(capsys, tmp_path / "run", *models)
    assert (status, err) in ((0, ""), (2, err))  # a small disk is a fault here
    assert "8.03 B weights, 6.98 B prunable, 32 layers, 128256 tokens" in out
    assert "no weights there yet" in out
    assert ", in GB, by arithmetic" in out


def test_faults_of_weights_folder_and_batches_come_together(capsys, tmp_path):
    student = tmp_path / "student"
    shutil.copytree(BUNDLED_MODEL, student)
    weights = load_file(student / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(weights | {name: weights[name][:8].clone()}, student / "model.safetensors")
    (tmp_path / "run").write_text("mine")
    more = ["--student.path", str(student), "--grpo.gradient_accumulation_steps", "8"]
    status, out, err = check(capsys, tmp_path / "run", *more)
    assert status == 2
    assert "memory of one rank" in out
    assert f"student.path: '{student}': {name} is (8, " in err
    assert "cannot be written" in err
    assert "grpo.generation_batch_size: 1024: asks for 128 prompts" in err
    assert "to 512 or less" in err
    assert (tmp_path / "run").read_text() == "mine"


@pytest.mark.parametrize("damage", ["truncated", "missing shard", "missing weight"])
def test_damaged_weight_files_are_named(tmp_path, damage):
    folder = tmp_path / "model"
    shutil.copytree(BUNDLED_MODEL, folder)
    file = folder / "model.safetensors"
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:1000])
    elif damage == "missing shard":
        index = {"weight_map": {"lm_head.weight": "model-00002.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        weights = load_file(file)
        save_file({n: w for n, w in weights.items() if "layers.1" not in n}, file)
    model = doctor.meta_model(LlamaConfig.from_pretrained(folder))
    fault = doctor.weight_file_fault(model, folder)
    said = {"truncated": "whole", "missing shard": "is missing", "missing weight": "layers.1"}
    assert said[damage] in fault


def test_whole_files_have_no_fault():
    model = doctor.meta_model(LlamaConfig.from_pretrained(BUNDLED_MODEL))
    assert doctor.weight_file_fault(model, BUNDLED_MODEL) is None


def test_results_of_another_config_are_refused_and_redo_only_said(capsys, tmp_path):
    config = load_config("configs/quickstart.yaml", {"task.num_train": 64, "task.num_test": 32})
    folder = RunFolder(tmp_path / "run")
    inputs = stage_inputs("prune", config, folder)
    folder.write_record("prune", {"inputs": inputs, "done": True, "outputs": {}})
    assert check(capsys, folder.root)[0] == 0
    status, _, err = check(capsys, folder.root, "--prune.method", "wanda")
    assert status == 2
    assert "prune.method: 'mama' -> 'wanda'" in err
    status, out, _ = check(capsys, folder.root, "--prune.method", "wanda", "--resume", "redo")
    assert status == 0
    assert "would move prune" in out
    assert [path.name for path in folder.root.iterdir()] == ["prune"]


def test_a_disk_without_room_is_a_fault(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "free_bytes", lambda folder: 1_000_000)
    status, out, err = check(capsys, tmp_path / "run")
    assert status == 2
    assert "1 MB free" in out
    assert "save_total_limit" in err


def test_evaluation_alone_has_no_table(capsys, tmp_path):
    status, out, _ = check(capsys, tmp_path / "run", "--stages", "evaluate")
    assert status == 0
    assert "memory" not in out


def test_where_a_folder_would_be_made(tmp_path):
    assert nearest_existing(tmp_path / "a" / "b") == tmp_path
    assert nearest_existing(tmp_path) == tmp_path


@pytest.mark.parametrize(
    ("steps", "every", "limit", "kept"), [(100, 10, 2, 3), (100, 60, None, 2), (100, 0.5, 5, 2)]
)
def test_checkpoints_at_once(steps, every, limit, kept):
    from transformers import TrainingArguments

    arguments = TrainingArguments(
        "unused", max_steps=steps, save_steps=every, save_total_limit=limit, use_cpu=True
    )
    assert checkpoints_kept(arguments) == kept
