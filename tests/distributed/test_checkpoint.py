"""Checkpoints that several ranks write and read together."""

import json

import pytest

from pipeline.training.manifest import MANIFEST_FILE
from tests.distributed.checkpoint_jobs import agree, newest, save, save_without_the_lock
from tests.distributed.workers import run_on_ranks

pytestmark = pytest.mark.distributed


def test_the_manifest_covers_what_all_ranks_wrote_and_all_choose_alike(tmp_path):
    run_on_ranks(2, save, str(tmp_path), [1, 2, 3])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-3"]
    files = json.loads((tmp_path / "checkpoint-3" / MANIFEST_FILE).read_text())["files"]
    assert list(files) == ["rank-0", "rank-1"]
    assert run_on_ranks(2, newest, str(tmp_path)) == ["checkpoint-3"] * 2
    (tmp_path / "checkpoint-3" / "rank-1").write_bytes(b"x" * 1000)
    assert run_on_ranks(2, newest, str(tmp_path)) == ["checkpoint-2"] * 2
    (tmp_path / "checkpoint-2" / "rank-0").unlink()
    assert run_on_ranks(2, newest, str(tmp_path)) == [None] * 2


def test_no_rank_saves_once_another_process_is_at_work_in_the_folder(tmp_path):
    (tmp_path / "grpo").mkdir()
    told, told_too = run_on_ranks(2, save_without_the_lock, str(tmp_path))
    assert told == told_too
    assert [f"{tmp_path}/lock is gone" in message for message in told] == [True] * 4
    assert sorted(path.name for path in tmp_path.glob("grpo/*")) == ["_saving", "best.tmp"]


def test_a_flag_of_any_rank_is_seen_by_all():
    flags = [[False, True, False], [False, False, True]]
    assert run_on_ranks(2, agree, flags) == [[False, True, True]] * 2
