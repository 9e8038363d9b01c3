"""Any model by path, with all that `evaluate` can measure, offline."""

import json
import math
import shutil

import pytest
import torch

from launch.train import main
from pipeline.models.loading import load_model, load_tokenizer
from pipeline.models.paths import BUNDLED_MODEL
from tests.unit.test_harness import DOCUMENTS, write_task

TEXT = "05#38#14#08=121420 26@32@29@12=073756 60#16@43#38=244903 35#35#09@51=193229"
SEQ_LEN = 8


def plain_perplexity(folder, text: str) -> float:
    """Windows side by side, one at a time."""
    model, ids = load_model(folder), load_tokenizer(folder)(text)["input_ids"]
    nats = []
    for start in range(0, len(ids) - SEQ_LEN + 1, SEQ_LEN):
        window = torch.tensor([ids[start : start + SEQ_LEN]])
        with torch.no_grad():
            log_p = model(window).logits[0, :-1].log_softmax(-1)
        nats += [-log_p[i, token].item() for i, token in enumerate(window[0, 1:])]
    return math.exp(sum(nats) / len(nats))


def test_a_model_by_path_is_measured_by_the_shipped_config(tmp_path, monkeypatch, pytestconfig):
    monkeypatch.chdir(pytestconfig.rootpath)
    model, tasks, text = tmp_path / "some model", tmp_path / "tasks", tmp_path / "text.txt"
    shutil.copytree(BUNDLED_MODEL, model)
    tasks.mkdir()
    write_task(tasks, "toy")
    text.write_text(TEXT)
    values = {
        "student.path": model,
        "student.dtype": "float32",
        "teacher.path": "bundled",
        "teacher.dtype": "float32",
        "task.path": "bundled",
        "task.instruction": "''",
        "task.verifier": "exact",
        "task.num_test": 8,
        "evaluate.max_new_tokens": 8,
        "evaluate.zero_shot": "[toy]",
        "evaluate.zero_shot_path": tasks,
        "evaluate.text_path": text,
        "evaluate.text_subset": "null",
        "evaluate.text_split": "null",
        "evaluate.text_seq_len": SEQ_LEN,
        "evaluate.text_stride": SEQ_LEN,
        "evaluate.sampled_completions": 3,
        "evaluate.pass_at_k": "[1, 3]",
    }
    arguments = ["--config", "configs/zero_shot.yaml", "--output_dir", str(tmp_path / "run")]
    arguments += [part for key, value in values.items() for part in (f"--{key}", str(value))]
    assert main(arguments) == 0

    report = json.loads((tmp_path / "run" / "report.json").read_text())
    names = {"teacher", "student"}  # here two copies of one model
    for key in ("accuracy", "text_perplexity", "pass_at_k", "zero_shot"):
        assert report[key]["student"] == report[key]["teacher"], key
        assert names <= report[key].keys()
    assert report["kl_to_teacher"]["student"] == pytest.approx(0, abs=1e-6)
    assert report["text_perplexity"]["student"] == pytest.approx(
        plain_perplexity(str(model), TEXT), rel=1e-5
    )
    assert (report["text_perplexity"]["seq_len"], report["text_perplexity"]["stride"]) == (8, 8)
    assert report["zero_shot"]["student"]["toy"]["num_documents"] == len(DOCUMENTS)
    found = report["pass_at_k"]
    assert found["student"]["1"] <= found["student"]["3"] <= 1
    assert (found["num_prompts"], found["num_samples"]) == (8, 3)
    for name in ("report.md", "report.html"):
        page = (tmp_path / "run" / name).read_text()
        for wanted in ("pass@3", "Zero-shot tasks", "in windows of 8, 8 apart", "toy"):
            assert wanted in page, (name, wanted)
