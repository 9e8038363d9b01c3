"""Splits are disjoint and stable; every fault of a task's source is one message with a remedy."""

import json
import os
import sys

import pytest

from pipeline.data.tasks import Row, load_task, split_of
from pipeline.errors import UserError

SPLITS = ("train", "calibration", "probe", "test")


def load(path, *, num=10_000, seed=0, **columns):
    return load_task(
        str(path),
        num_train=num,
        num_calibration=num,
        num_probe=num,
        num_test=num,
        seed=seed,
        **columns,
    )


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def rows(numbers, prefix="what is"):
    return [{"prompt": f"{prefix} {n}?", "answer": str(n)} for n in numbers]


@pytest.fixture
def datasets_cache(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()


# sha256sum of the prompt as a number, modulo 100. Fixed for ever: a changed split would train a
# new model on the test prompts of an old one.
BUCKETS = {7: 52, 44: 79, 35: 80, 39: 84, 22: 87, 12: 88, 16: 91, 21: 99}


def test_split_of_known_prompts():
    splits = [split_of(f"what is {n}?") for n in BUCKETS]
    assert splits == ["train"] * 2 + ["calibration"] * 2 + ["probe"] * 2 + ["test"] * 2


def test_shares_of_the_splits():
    counts = dict.fromkeys(SPLITS, 0)
    for n in range(20_000):
        counts[split_of(f"{n}")] += 1
    shares = [counts[split] / 20_000 for split in SPLITS]
    assert shares == pytest.approx([0.80, 0.05, 0.05, 0.10], abs=0.01)


def test_file_is_split_without_overlap_and_without_duplicates(tmp_path):
    records = rows(range(400))
    file = write_lines(tmp_path / "task.jsonl", records + records[:50])
    task = load(file)
    prompts = [row.prompt for split in SPLITS for row in getattr(task, split)]
    assert sorted(prompts) == sorted(record["prompt"] for record in records)
    for split in SPLITS:
        assert getattr(task, split)
        assert {split_of(row.prompt) for row in getattr(task, split)} == {split}
    assert all(row.answer in row.prompt for row in task.test)


def test_limits_seed_and_order_of_lines_leave_held_out_rows_alone(tmp_path):
    task = load(write_lines(tmp_path / "task.jsonl", rows(range(400))), seed=0)
    other = load(write_lines(tmp_path / "turned.jsonl", rows(range(399, -1, -1))), seed=1, num=9)
    assert other.test == task.test[:9]
    assert other.probe == task.probe[:9]
    assert other.train == task.train[::-1]


def test_seed_draws_calibration_rows_from_their_split(tmp_path):
    file = write_lines(tmp_path / "task.jsonl", rows(range(400)))
    draws = [load(file, seed=seed, num=9).calibration for seed in (0, 1, 0)]
    everything = load(file, seed=2).calibration
    assert draws[0] == draws[2] != draws[1]
    assert all(len(set(draw)) == 9 and set(draw) <= set(everything) for draw in draws)


def test_first_of_two_answers_counts(tmp_path):
    twice = [{"prompt": "what is 0?", "answer": "first"}, {"prompt": "what is 0?", "answer": "no"}]
    task = load(write_lines(tmp_path / "task.jsonl", twice + rows(range(1, 400))))
    found = [row for split in SPLITS for row in getattr(task, split) if row.prompt == "what is 0?"]
    assert found == [Row("what is 0?", "first")]


def test_columns_numbers_blank_lines_and_byte_order_mark(tmp_path):
    file = tmp_path / "task.json"
    lines = [json.dumps({"q": f"{n}\u2028+0", "a": n, "extra": None}) for n in range(300)]
    file.write_text("\ufeff" + "\n\n".join(lines), encoding="utf-8")
    task = load(file, prompt_column="q", answer_column="a")
    assert sum(len(getattr(task, split)) for split in SPLITS) == 300
    assert all(row.prompt == f"{row.answer}\u2028+0" for row in task.train)


FIRST = {"prompt": "1+1=", "answer": "2"}
BAD_LINES = {
    '{"prompt": "1": 2}': ("line 3 is not JSON", "column 15"),
    '{"prompt": "1+1=", "answer": "2"': ("line 3 is not JSON",),
    "[" * 100_000: ("line 3 is not JSON",),
    "1" * 5000: ("line 3 is not JSON",),
    '["1+1=", "2"]': ("line 3 is a list",),
    '{"prompt": "1+1="}': ("task.answer_column='answer'", "line 3", "it has prompt"),
    '{"question": "1+1=", "answer": "2"}': ("task.prompt_column='prompt'", "question, answer"),
    '{"prompt": 3, "answer": "2"}': ("task.prompt_column", "line 3", "must be text"),
    '{"prompt": "  ", "answer": "2"}': ("task.prompt_column", "line 3", "not empty"),
    '{"prompt": "1+1=", "answer": null}': ("task.answer_column", "line 3", "'None'"),
    '{"prompt": "1+1=", "answer": true}': ("task.answer_column", "line 3", "text or a number"),
    '{"prompt": "\\ud800", "answer": "2"}': ("task.prompt_column", "line 3", "ud800"),
}


@pytest.mark.parametrize("line", BAD_LINES, ids=range(len(BAD_LINES)))
def test_broken_line_is_named(tmp_path, line):
    file = tmp_path / "task.jsonl"
    file.write_text(f"{json.dumps(FIRST)}\n\n{line}\n")
    with pytest.raises(UserError) as caught:
        load(file)
    message = str(caught.value)
    assert all(part in message for part in (*BAD_LINES[line], "task.jsonl"))
    assert "\n" not in message
    assert len(message) < 500


def test_bytes_that_are_not_utf8(tmp_path):
    file = tmp_path / "task.jsonl"
    file.write_bytes(b'{"prompt": "\xff", "answer": "2"}\n')
    with pytest.raises(UserError, match="line 1 is not JSON"):
        load(file)


def test_empty_file(tmp_path):
    file = tmp_path / "task.jsonl"
    file.write_text("\n  \n")
    with pytest.raises(UserError, match=r"task\.jsonl.*no rows"):
        load(file)


def test_too_few_rows_for_four_splits(tmp_path):
    file = write_lines(tmp_path / "task.jsonl", [FIRST])
    with pytest.raises(UserError, match=r"1 distinct prompts leave no row for .*probe"):
        load(file)


@pytest.mark.parametrize("path", ["no/such/task.jsonl", "task.jsonl", "./gone", "/gone", "~/no/x"])
def test_missing_file(path):
    with pytest.raises(UserError, match=r"task\.path=.*no such file or folder.*Set it to"):
        load(path)


def test_unreadable_file():
    with pytest.raises(UserError, match=r"task\.path='/proc/self/mem': it cannot be read"):
        load("/proc/self/mem")


def test_folder_keeps_its_own_test_split(tmp_path, datasets_cache):
    folder = tmp_path / "task"
    folder.mkdir()
    write_lines(folder / "train.jsonl", rows(range(400)))
    write_lines(folder / "test.jsonl", rows([3, 3, 500, 501]))
    task = load(folder)
    assert {row.answer for row in task.test} == {"3", "500", "501"}
    assert len(task.test) == 3
    others = [row.answer for split in SPLITS[:3] for row in getattr(task, split)]
    assert sorted(others, key=int) == [str(n) for n in range(400) if n != 3]
    assert {split_of(row.prompt) for row in task.train} == {"train", "test"}


@pytest.mark.parametrize("split", ["test", "train"])
def test_folder_with_one_split_is_split_by_hash(tmp_path, datasets_cache, split):
    folder = tmp_path / "task"
    folder.mkdir()
    write_lines(folder / f"{split}.jsonl", rows(range(400)))
    task = load(folder)
    assert {split_of(row.prompt) for row in task.test} == {"test"}
    assert sum(len(getattr(task, split)) for split in SPLITS) == 400


def test_folder_without_the_column(tmp_path, datasets_cache):
    folder = tmp_path / "task"
    folder.mkdir()
    write_lines(folder / "train.jsonl", rows(range(3)))
    with pytest.raises(UserError, match=r"task\.prompt_column='question': row 0 of split train"):
        load(folder, prompt_column="question")


@pytest.mark.parametrize("content", [None, '{"prompt": '])
def test_folder_that_datasets_cannot_load(tmp_path, datasets_cache, content):
    folder = tmp_path / "task"
    folder.mkdir()
    if content:
        (folder / "train.jsonl").write_text(content)
    with pytest.raises(UserError, match=r"task\.path=.*cannot be loaded") as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_hub_dataset_without_network(monkeypatch, datasets_cache):
    import datasets
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"task\.path='a/b'.*HF_HUB_OFFLINE.*local file"):
        load("a/b", subset="main")


def test_reading_a_file_does_not_import_datasets(tmp_path):
    code = (
        "import sys; from pipeline.data.tasks import load_task; "
        "assert not {'datasets', 'torch'} & set(sys.modules)"
    )
    assert os.spawnl(os.P_WAIT, sys.executable, sys.executable, "-c", code) == 0


def test_bundled_task_is_disjoint_and_its_test_rows_ignore_the_seed():
    pytest.importorskip("pipeline.data.arithmetic")
    task, other = load("bundled", num=200, seed=1), load("bundled", num=200, seed=2)
    prompts = [row.prompt for split in SPLITS for row in getattr(task, split)]
    assert len(prompts) == len(set(prompts)) == 800
    for split in SPLITS:
        assert {split_of(row.prompt) for row in getattr(task, split)} == {split}
    assert task.test == other.test
    assert task.train != other.train
