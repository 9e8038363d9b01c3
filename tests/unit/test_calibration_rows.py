"""Where calibration rows come from, on the bundled task and its teacher."""

from dataclasses import replace

import pytest
import torch

from pipeline.artifacts import RunFolder
from pipeline.config_loading import load_config
from pipeline.errors import UserError
from pipeline.rollouts import load_rollouts
from pipeline.stages.calibration import calibration_set
from pipeline.stages.inputs import open_task, open_teacher
from pipeline.stages.teacher_rollouts import cached_rollouts

ROWS = {"task.num_calibration": 6, "task.num_train": 50, "task.num_test": 5}
IGNORED = -100


@pytest.fixture(scope="module")
def teacher():
    return open_teacher(load_config("configs/quickstart.yaml", ROWS))


def rows_of(folder, teacher, **changes):
    """Token ids without padding, and the scored part of each row."""
    config = load_config("configs/quickstart.yaml", ROWS | changes)
    inputs = open_task(config)
    batches = calibration_set(config, RunFolder.open(folder), inputs, teacher)
    rows = []
    for batch in batches:
        for ids, mask, labels in zip(*batch, strict=True):
            rows.append((ids[mask.bool()].tolist(), labels[labels != IGNORED].tolist()))
    return rows, inputs


def test_rollouts_are_right_answers_sampled_once(tmp_path, teacher):
    rows, inputs = rows_of(tmp_path, teacher, **{"calibration.source": "rollouts"})
    prompts = {tuple(inputs.encode(row.prompt)): row.answer for row in inputs.task.calibration}
    assert len(rows) == len(prompts) == 6
    for ids, completion in rows:
        prompt = tuple(ids[: -len(completion)])
        assert inputs.verifier(
            inputs.tokenizer.decode(completion, skip_special_tokens=True), prompts[prompt]
        )
    path = tmp_path / "rollouts" / "calibration.jsonl"
    written = path.stat().st_mtime_ns
    provenance, rollouts = load_rollouts(path)
    assert provenance["verified"]
    assert provenance["temperature"] == 1.0
    assert len(rollouts) == 6
    assert rows_of(tmp_path, teacher)[0] == rows
    assert path.stat().st_mtime_ns == written
    rows_of(tmp_path, teacher, **{"calibration.temperature": 0.5})
    assert path.stat().st_mtime_ns != written, "completions of another temperature were used"


def test_rollouts_of_other_rows_tokens_or_teacher_files_are_not_used(tmp_path, teacher):
    config = load_config("configs/quickstart.yaml", ROWS)
    folder, inputs = RunFolder.open(tmp_path), open_task(config)
    rows, path = inputs.task.calibration, tmp_path / "rollouts" / "some.jsonl"

    def is_used(inputs, rows):
        written = path.stat().st_mtime_ns if path.exists() else None
        values = {"num_rollouts": 3, "temperature": 0.0, "max_new_tokens": 2, "progress": "some"}
        cached_rollouts(folder, "some", config, teacher, inputs, rows, **values)
        return path.stat().st_mtime_ns == written

    assert not is_used(inputs, rows)
    assert is_used(inputs, rows)
    assert not is_used(inputs, rows[::-1])
    longer = replace(inputs, encode=lambda prompt: inputs.encode(f"00{prompt}"))
    assert not is_used(longer, rows[::-1])
    folder.write_record("prune", {"inputs": {"files of teacher.path": {"a": "1"}}})
    assert not is_used(longer, rows[::-1])
    assert is_used(longer, rows[::-1])


def test_a_teacher_without_right_answers_is_refused(tmp_path, teacher):
    wrong = {"task.verifier": "numeric", "evaluate.max_new_tokens": 1}
    broken = open_teacher(load_config("configs/quickstart.yaml", ROWS))
    for parameter in broken.parameters():
        parameter.data.zero_()
    with pytest.raises(UserError, match=r"calibration.source: rollouts: .* none of 6 .*; set answ"):
        rows_of(tmp_path, broken, **wrong)


def test_answers_and_prompts(tmp_path, teacher):
    rows, inputs = rows_of(tmp_path, teacher, **{"calibration.source": "answers"})
    end = inputs.tokenizer.eos_token_id
    for (ids, completion), row in zip(rows, inputs.task.calibration, strict=True):
        assert ids == inputs.encode(row.prompt) + completion
        assert completion == inputs.tokenizer(row.answer)["input_ids"] + [end]
    rows, inputs = rows_of(tmp_path, teacher, **{"calibration.source": "prompts"})
    for (ids, scored), row in zip(rows, inputs.task.calibration, strict=True):
        assert ids == inputs.encode(row.prompt)
        assert scored == ids[1:], "all tokens but the first are scored"
    assert not (tmp_path / "rollouts").exists()


def test_text_is_cut_into_pieces_that_the_seed_draws(tmp_path, teacher):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{n % 61:02d}" for n in torch.arange(600).mul(37).tolist()))
    changes = {
        "calibration.source": "text",
        "calibration.text_path": str(text),
        "calibration.seq_len": 20,
    }
    rows, inputs = rows_of(tmp_path, teacher, **changes)
    tokens = inputs.tokenizer(text.read_text())["input_ids"]
    assert len(rows) == 6
    for ids, scored in rows:
        assert len(ids) == 20
        assert scored == ids[1:]
        assert any(tokens[i : i + 20] == ids for i in range(len(tokens)))
    assert rows_of(tmp_path, teacher, **changes)[0] == rows
    assert rows_of(tmp_path, teacher, **changes | {"run.seed": 7})[0] != rows
