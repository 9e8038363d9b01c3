"""Mistakes of the user: status 2, one message with key, value and remedy, nothing lost on disk."""

import json
import shutil
from pathlib import Path

import pytest

from launch.train import main
from pipeline import lock, run
from pipeline.models.loading import load_model
from pipeline.models.paths import BUNDLED_MODEL

QUICKSTART = ["--config", "configs/quickstart.yaml"]


def refused(capsys, out, *arguments):
    """Runs in process, and gives the message of a run that must be refused before it begins."""
    status = main([*QUICKSTART, "--output_dir", str(out), *arguments])
    message = capsys.readouterr().err
    assert status == 2
    assert message.startswith("error: ")
    assert "Traceback" not in message
    return message


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch, pytestconfig):
    monkeypatch.chdir(pytestconfig.rootpath)


def test_missing_student_and_teacher(capsys, tmp_path):
    out = tmp_path / "run"
    assert "student.path: './nowhere'" in refused(capsys, out, "--student.path", "./nowhere")
    assert "teacher.path: './nowhere'" in refused(capsys, out, "--teacher.path", "./nowhere")
    assert not out.exists()


def truncate(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])


def test_a_stage_whose_student_is_not_there(capsys, tmp_path):
    out = tmp_path / "run"
    for stage in ("distill", "export"):
        message = refused(capsys, out, "--stages", stage, "--task.num_test", "2").splitlines()[-1]
        assert message.startswith(f"error: run.stages: {stage} needs a pruned student")
        assert f"set --stages prune,{stage}" in message
    assert {path.name for path in out.iterdir()} == {"exit_status"}


def of_another_family(folder):
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    (folder / "tokenizer.json").unlink()  # nor is its tokenizer one of ours


NO_MODEL = {
    "has no config.json": (
        lambda folder: (folder / "config.json").unlink(),
        "holds no config.json",
    ),
    "is of another family": (
        of_another_family,
        "is a 'gpt2' model; supported: llama",
    ),
    "has a list as config": (
        lambda folder: (folder / "config.json").write_text("[]"),
        "transformers could not load it",
    ),
    "has no weights": (lambda folder: (folder / "model.safetensors").unlink(), "holds no weights"),
    "is a packed export": (
        lambda folder: (folder / "model.safetensors").rename(folder / "packed.safetensors"),
        "holds no weights (model*.safetensors); set the folder that save_pretrained() wrote, of an "
        "export that of hf or narrow",
    ),
    "has half of its weights": (truncate, "transformers could not load it"),
    "has no tokenizer": (
        lambda folder: (folder / "tokenizer.json").unlink(),
        "transformers could not load it",
    ),
}


@pytest.mark.parametrize("what", NO_MODEL)
def test_a_folder_that_is_no_model(capsys, tmp_path, what):
    folder = tmp_path / "model-403"  # no status of the Hub's
    shutil.copytree(BUNDLED_MODEL, folder)
    spoil, says = NO_MODEL[what]
    spoil(folder)
    message = refused(
        capsys, tmp_path / "run", "--stages", "evaluate", "--student.path", str(folder)
    )
    assert message.startswith(f"error: student.path: '{folder}'")
    assert says in message
    assert len(message.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_a_model_whose_weights_do_not_fit_its_config(capsys, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(BUNDLED_MODEL, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 8}))
    arguments = ["--stages", "evaluate", "--student.path", str(folder), "--task.num_test", "2"]
    assert main([*arguments, "--output_dir", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: student.path: '{folder}': transformers could not load it")


def test_a_text_shorter_than_one_window(capsys, tmp_path):
    text = tmp_path / "short.txt"
    text.write_text("05#38=")
    arguments = ["--evaluate.text_path", str(text), "--evaluate.text_seq_len", "512"]
    message = refused(capsys, tmp_path / "run", *arguments)
    assert message.startswith(f"error: evaluate.text_path: '{text}': its text has 4 tokens")
    assert len(message.splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_zero_shot_task_that_does_not_exist(capsys, tmp_path):
    message = refused(capsys, tmp_path / "run", "--evaluate.zero_shot", "[piqq]")
    assert message.startswith("error: evaluate.zero_shot: 'piqq': ")
    assert "Set piqa" in message
    assert len(message.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_a_folder_of_tasks_that_is_none(capsys, tmp_path):
    arguments = ["--evaluate.zero_shot", "[mine]", "--evaluate.zero_shot_path", "./nowhere"]
    message = refused(capsys, tmp_path / "run", *arguments)
    assert message.startswith("error: evaluate.zero_shot_path: './nowhere' is no folder")


def test_broken_line_of_a_task_file_is_named(capsys, tmp_path):
    task = tmp_path / "task.jsonl"
    task.write_text('{"prompt": "1+1=", "answer": "2"}\n{"prompt": "1+2=", "answer"\n')
    message = refused(capsys, tmp_path / "run", "--task.path", str(task))
    assert "line 2" in message
    assert not (tmp_path / "run").exists()


def test_tokenizers_that_differ(capsys, tmp_path):
    teacher = tmp_path / "teacher"
    shutil.copytree(BUNDLED_MODEL, teacher)
    content = json.loads((teacher / "tokenizer.json").read_text())
    vocab = content["model"]["vocab"]
    vocab["@"], vocab["#"] = vocab["#"], vocab["@"]
    (teacher / "tokenizer.json").write_text(json.dumps(content))
    message = refused(capsys, tmp_path / "run", "--teacher.path", str(teacher))
    assert "different tokenizers" in message
    assert not (tmp_path / "run").exists()


def test_heads_that_differ(capsys, tmp_path):
    teacher = tmp_path / "teacher"
    shutil.copytree(BUNDLED_MODEL, teacher)
    model = load_model(str(teacher))
    size = model.config.vocab_size
    model.resize_token_embeddings(80)
    model.save_pretrained(teacher)
    message = refused(capsys, tmp_path / "run", "--teacher.path", str(teacher))
    assert f"teacher.path: the heads of student and teacher have {size} and 80 entries" in message
    assert not (tmp_path / "run").exists()


def test_a_padding_token_without_an_embedding(capsys, tmp_path):
    student = tmp_path / "student"
    shutil.copytree(BUNDLED_MODEL, student)
    content = json.loads((student / "config.json").read_text())
    (student / "config.json").write_text(json.dumps(content | {"vocab_size": 0}))
    message = refused(capsys, tmp_path / "run", "--student.path", str(student))
    assert "has no embedding for its padding token" in message
    assert not (tmp_path / "run").exists()


def test_a_verifier_that_fits_no_answer(capsys, tmp_path):
    message = refused(capsys, tmp_path / "run", "--task.verifier", "tests.e2e.test_bad_input:never")
    assert "does not accept the answer" in message


def never(completion, answer):
    """A verifier that no answer satisfies."""
    return 0.0


def test_an_output_folder_that_is_a_file(capsys, tmp_path):
    (tmp_path / "run").write_text("mine")
    assert "cannot be written" in refused(capsys, tmp_path / "run")
    assert (tmp_path / "run").read_text() == "mine"


def test_a_value_that_trl_refuses(capsys, tmp_path):
    message = refused(capsys, tmp_path / "run", "--grpo.log_completions_hub_repo", "a/b")
    assert message.startswith("error: grpo: ")
    assert not (tmp_path / "run").exists()


def test_an_export_that_does_not_fit_the_mask(capsys, tmp_path):
    values = ["--stages", "prune,export", "--export.formats", "[semi_structured]"]
    message = refused(capsys, tmp_path / "run", *values)
    assert "export.formats: [semi_structured]: semi_structured needs a 2:4 mask" in message
    assert not (tmp_path / "run").exists()


def test_fewer_prompts_than_a_batch_asks_for(capsys, tmp_path):
    message = refused(capsys, tmp_path / "run", "--task.num_train", "15")
    assert message.startswith("error: grpo.generation_batch_size: 128: asks for 16 prompts")
    assert "to 120 or less" in message
    assert not (tmp_path / "run").exists()


def test_a_second_run_into_one_folder_is_refused_and_touches_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "WAIT_SECONDS", 0.0)
    (tmp_path / "exit_status").write_text("75\n")
    owner = lock.take_lock(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    message = refused(capsys, tmp_path)
    assert f"is in use by process {owner.process} on {owner.host}" in message
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_run_that_is_refused_later_gives_its_lock_back(capsys, tmp_path):
    (tmp_path / "prune").mkdir()
    (tmp_path / "prune" / "stage.json").write_text('{"inputs": {}, "done": true}')
    assert "results of another config" in refused(capsys, tmp_path)
    assert not (tmp_path / "lock").exists()


def test_a_disk_that_is_full_outside_a_checkpoint(capsys, tmp_path, monkeypatch):
    def fill(*_):
        Path("/dev/full").write_text("a")

    monkeypatch.setitem(run.ON_RANK_0, "prune", fill)
    arguments = ["--stages", "prune", "--output_dir", str(tmp_path / "run")]
    assert main([*QUICKSTART, *arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith(f"error: --output_dir: {tmp_path / 'run'}: no space left")
    assert not any("Traceback" in line for line in lines)
    assert (tmp_path / "run" / "exit_status").read_text() == "2\n"
