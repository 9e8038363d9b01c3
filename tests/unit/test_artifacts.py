"""The run folder: atomic writes, records, moves; the commit that made it."""

import os
import subprocess

import pytest

from pipeline import artifacts
from pipeline.artifacts import (
    RunFolder,
    changed_inputs,
    git_commit,
    hash_json,
    replaced_folder,
    write_json,
)
from pipeline.errors import UserError
from pipeline.lock import LOCK_FILE, release_lock, take_lock
from pipeline.rollouts import save_rollouts


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"value": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"value": float("nan")})
    assert path.read_text() == '{\n  "value": 1\n}\n'


def test_a_failed_folder_leaves_the_old_folder(tmp_path):
    target = tmp_path / "model"
    with replaced_folder(target) as folder:
        (folder / "weights").write_text("old")
    with pytest.raises(ZeroDivisionError), replaced_folder(target) as folder:
        (folder / "weights").write_text(f"new {1 / 0}")
    assert (target / "weights").read_text() == "old"


def test_nothing_is_written_where_another_process_is_at_work_by_now(tmp_path):
    folder = RunFolder.open(tmp_path / "run")
    owner = take_lock(folder.root)
    folder.write_record("prune", {"done": False})

    def lose_the_lock_meanwhile():
        with replaced_folder(folder.root / "model"):
            (folder.root / LOCK_FILE).unlink()

    for write in (
        lose_the_lock_meanwhile,
        lambda: replaced_folder(folder.root / "one_shot").__enter__(),
        lambda: folder.write_record("prune", {"done": True}),
        lambda: save_rollouts(folder.root / "rollouts.jsonl", [], {}),
    ):
        with pytest.raises(UserError, match="saves nothing more"):
            write()
    assert sorted(path.name for path in folder.root.iterdir()) == ["model.tmp", "prune"]
    assert not folder.is_done("prune")
    release_lock(folder.root, owner)


def test_records_and_moves(tmp_path):
    folder = RunFolder.open(tmp_path / "run")
    assert folder.record("prune") is None
    folder.write_record("prune", {"done": True})
    folder.write_record("grpo", {"done": False})
    assert folder.is_done("prune")
    assert not folder.is_done("grpo")
    first = folder.move_to_old(["grpo"])
    folder.write_record("grpo", {"done": True})
    second = folder.move_to_old(["grpo"])
    assert first != second
    assert (first / "grpo" / "stage.json").exists()
    assert (second / "grpo" / "stage.json").exists()
    assert folder.is_done("prune")


def test_a_damaged_record_is_named(tmp_path):
    folder = RunFolder.open(tmp_path / "run")
    folder.write_record("prune", {"done": True})
    path = folder.stage("prune") / "stage.json"
    path.write_text(path.read_text()[:-3])
    with pytest.raises(UserError, match=f"^--output_dir: {path} is damaged .*; delete it"):
        folder.is_done("prune")


def test_asking_for_the_commit_leaves_the_repository_alone(tmp_path, monkeypatch):
    """Else a run that is stopped meanwhile leaves `index.lock` behind."""
    file, index = tmp_path / "pipeline" / "artifacts.py", tmp_path / ".git" / "index"
    file.parent.mkdir()
    file.write_text("")
    who = ("-c", "user.name=a", "-c", "user.email=a@b")
    for words in (("init", "-q"), ("add", "."), (*who, "commit", "-qm", "first")):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    os.utime(file, (1, 1))  # git status would write down the new time
    before = index.read_bytes()
    monkeypatch.setattr(artifacts, "__file__", str(file))
    commit = git_commit()
    assert len(commit) == 40
    assert index.read_bytes() == before
    file.write_text("changed")
    assert git_commit() == f"{commit}+changes"


def test_a_file_in_the_way_is_refused(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(UserError, match="--output_dir"):
        RunFolder.open(tmp_path / "run")


def test_changed_inputs_name_key_and_both_values():
    assert changed_inputs({"a": 1, "b": 2}, {"a": 1, "b": 3, "c": 4}) == [
        "b: 2 -> 3",
        "c: None -> 4",
    ]


def test_hash_does_not_depend_on_the_order_of_keys():
    assert hash_json({"a": 1, "b": [2]}) == hash_json({"b": [2], "a": 1}) != hash_json({"a": 2})
