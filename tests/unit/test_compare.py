"""Runs beside each other: numbers, paired differences, keys that differ, folders that are none."""

import json

import pytest
import yaml

from launch.compare import main
from pipeline.artifacts import RunFolder
from pipeline.evaluation.intervals import paired_difference_interval
from tests.unit.test_report import full_report, measurements

CONFIG = {"run": {"seed": 42}, "task": {"path": "bundled"}, "prune": {"sparsity": 0.9}}


def write_run(root, config=CONFIG, num_correct=186, is_done=True, logs=None):
    """A run folder as far as a comparison reads it; `logs` is the log history of stage distill."""
    folder = RunFolder(root)
    folder.write_record("prune", {"done": True})
    folder.write_record("evaluate", {"done": is_done})
    student = measurements(num_correct, 1.09, None)
    report = full_report(
        models={"student": student, "dense": measurements(193, 1.04, 0.0)},
        cost={"prune": {"device": "cpu", "processes": 1, "device_hours": 0.5, "tokens": 1234}},
    )
    (root / "report.json").write_text(json.dumps(report))
    correct = {"student": {"accuracy": {"correct": student.accuracy.correct}}}
    (folder.stage("evaluate") / "metrics.json").write_text(json.dumps(correct))
    (root / "config.yaml").write_text(yaml.safe_dump(config))
    if logs is not None:
        folder.stage("distill").mkdir()
        (folder.stage("distill") / "log_history.json").write_text(json.dumps(logs))
    return str(root)


def lines_of(capsys):
    """First words of each printed line, up to two spaces, to the line."""
    printed = capsys.readouterr().out.splitlines()
    return {line.split("  ")[0]: line for line in printed}


def test_numbers_stand_beside_each_other(tmp_path, capsys):
    sparser = CONFIG | {"prune": {"sparsity": 0.95, "scope": "row"}}
    one, two = write_run(tmp_path / "one"), write_run(tmp_path / "two", sparser, num_correct=150)
    assert main([one, two]) == 0
    lines = lines_of(capsys)
    assert lines["run"].split() == ["run", "one", "two"]
    assert "93.0 % [" in lines["accuracy, student"]
    assert "75.0 % [" in lines["accuracy, student"]
    assert "accuracy, teacher" not in lines
    lists = [[i < n for i in range(200)] for n in (150, 186)]
    low, high = paired_difference_interval(*lists)
    difference = f"-18.0 points [{100 * low:+.1f}, {100 * high:+.1f}]"
    assert lines["student minus that of one"].endswith(difference)
    assert lines["KL to teacher, student"].split()[-4:] == ["not", "finite", "not", "finite"]
    assert lines["tokens trained on"].split()[-2:] == ["1,234", "1,234"]
    assert lines["prune.sparsity"].split() == ["prune.sparsity", "0.9", "0.95"]
    assert lines["prune.scope"].split() == ["prune.scope", "not", "set", "row"]
    assert "run.seed" not in lines


@pytest.mark.parametrize(
    ("change", "told"),
    [({"task": {"path": "other.jsonl"}}, ", other prompts"), ({"run": {"seed": 1}}, "]")],
)
def test_only_students_of_the_same_prompts_are_paired(tmp_path, capsys, change, told):
    one, two = write_run(tmp_path / "one"), write_run(tmp_path / "two", CONFIG | change)
    assert main([one, two]) == 0
    assert lines_of(capsys)["student minus that of one"].endswith(told)


def test_pass_at_k_and_zero_shot_scores_stand_beside_each_other(tmp_path, capsys):
    one, two = write_run(tmp_path / "one"), write_run(tmp_path / "two")
    score = {"metric": "acc", "value": 0.5, "stderr": 0.01, "num_documents": 99, "num_fewshot": 0}
    found = {
        "pass_at_k": {"student": {"1": 0.5, "8": 0.75}, "ci95": {"student": {"8": [0.7, 0.8]}}},
        "zero_shot": {"student": {"piqa": score}, "dense": {"race": score | {"stderr": None}}},
    }
    found["pass_at_k"]["ci95"]["student"]["1"] = [0.4, 0.6]
    report = json.loads((tmp_path / "two" / "report.json").read_text())
    (tmp_path / "two" / "report.json").write_text(json.dumps(report | found))
    assert main([one, two]) == 0
    lines = lines_of(capsys)
    wanted = {
        "pass@1, student": "- 50.0 % [40.0, 60.0]",
        "pass@8, student": "- 75.0 % [70.0, 80.0]",
        "piqa, student": "- 50.00 ± 1.00 %",
        "race, dense": "- 50.00 %",
    }
    found = {name: " ".join(lines[name].removeprefix(name).split()) for name in wanted}
    assert found == wanted
    assert "race, student" not in lines


def test_an_unfinished_run_is_shown_with_what_it_has(tmp_path, capsys):
    one, two = write_run(tmp_path / "one"), write_run(tmp_path / "two", is_done=False)
    record = {"done": True, "seconds": 75.0, "seed": 7}
    RunFolder(tmp_path / "two").write_record("prune", record)
    RunFolder(tmp_path / "two").write_record("evaluate", record | {"done": False, "seconds": 5.0})
    assert main([one, two]) == 0
    lines = lines_of(capsys)
    assert lines["time"].endswith("1 min 20 s")
    assert lines["seed"].split()[-1] == "7"
    assert lines["stages"].endswith("prune, evaluate (not done)")
    assert lines["accuracy, student"].endswith("-")
    assert "All config keys are the same." in lines


def test_the_page_has_the_same_and_nothing_of_a_name_is_live(tmp_path, capsys):
    runs = [write_run(tmp_path / name) for name in ("<script>", "b|c")]
    assert main([*runs, "--html", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "93.0 % [" in page
    assert "b|c" in page
    assert "<picture>" not in page


def test_the_page_shows_the_curves_of_all_runs_also_of_an_unfinished_one(tmp_path, capsys):
    logs = [{"step": step, "sparsity": 0.5} for step in (1, 2)]
    done = write_run(tmp_path / "done", logs=logs)
    stopped = write_run(tmp_path / "stopped", is_done=False)
    for step in (9, 10):
        checkpoint = tmp_path / "stopped" / "distill" / f"checkpoint-{step}"
        checkpoint.mkdir(parents=True)
        history = {"log_history": [{"step": step, "sparsity": step / 100, "kl": None}]}
        (checkpoint / "trainer_state.json").write_text(json.dumps(history))
    assert main([done, stopped, "--html", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert "Sparsity, last logged in distill: 50.0\N{NO-BREAK SPACE}% in done and 10.0" in page
    assert page.count("<picture>") == 1


def test_runs_of_one_name_are_told_apart(tmp_path, capsys):
    runs = [write_run(tmp_path / folder / "run") for folder in ("a", "b")]
    assert main(runs) == 0
    assert lines_of(capsys)["run"].split() == ["run", *runs]


@pytest.mark.parametrize("fault", ["alone", "missing", "empty", "broken", "broken log"])
def test_bad_input_is_one_message(tmp_path, capsys, fault):
    good = write_run(tmp_path / "good")
    bad = tmp_path / "bad"
    if fault == "broken":
        write_run(bad)
        (bad / "report.json").write_text("{")
    elif fault == "broken log":
        write_run(bad, logs=[])
        (bad / "distill" / "log_history.json").write_text("[")
    elif fault == "empty":
        bad.mkdir()
    assert main([good] if fault == "alone" else [good, str(bad)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: RUN: ")
    assert error.count("\n") == 1
