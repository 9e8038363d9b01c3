"""The lock of a run folder: one owner, stale ones taken over by one only, others' left alone."""

import json
import os
import subprocess
import sys
import threading
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from pipeline import lock
from pipeline.errors import UserError
from pipeline.lock import (
    LOCK_FILE,
    Owner,
    check_lock,
    is_taken_over,
    release_lock,
    take_lock,
)

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(lock, "WAIT_SECONDS", 0.2)
    monkeypatch.setattr(lock, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(lock, "_taken", {})
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)


def hold(folder, **changes):
    """A lock of this process, with changes, as another run would have left it."""
    owner = replace(Owner.me(), **changes)
    (folder / LOCK_FILE).write_text(json.dumps(asdict(owner)))
    return owner


def ended_process():
    """Number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_the_lock_names_its_owner_and_goes(tmp_path):
    owner = take_lock(tmp_path)
    held = json.loads((tmp_path / LOCK_FILE).read_text())
    assert (held["process"], held["host"]) == (os.getpid(), owner.host)
    release_lock(tmp_path, owner)
    assert list(tmp_path.iterdir()) == []


def test_a_live_process_keeps_its_lock(tmp_path):
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys; from pathlib import Path; from pipeline.lock import take_lock\n"
            "take_lock(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()",
            str(tmp_path),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=ROOT,
        text=True,
    )
    try:
        assert holder.stdout.readline() == "held\n"
        before = (tmp_path / LOCK_FILE).read_bytes()
        with pytest.raises(UserError, match=f"in use by process {holder.pid} on"):
            take_lock(tmp_path)
        assert (tmp_path / LOCK_FILE).read_bytes() == before
        holder.kill()
        os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)  # dead, not yet reaped
        assert take_lock(tmp_path).process == os.getpid()
    finally:
        holder.kill()
        holder.wait()


@pytest.mark.parametrize("gone", ["ended", "number used again"])
def test_a_stale_lock_of_this_host_is_taken_over(tmp_path, gone, caplog):
    changes = {"process": ended_process()} if gone == "ended" else {"started": "1"}
    hold(tmp_path, **changes)
    assert take_lock(tmp_path).started == Owner.me().started
    assert "its owner is gone" in caplog.text


def test_another_host_cannot_be_judged(tmp_path):
    owner = hold(tmp_path, host="elsewhere", process=ended_process())
    with pytest.raises(UserError, match="on elsewhere since"):
        take_lock(tmp_path)
    assert Owner(**json.loads((tmp_path / LOCK_FILE).read_text())) == owner


@pytest.mark.parametrize(("job", "restarts", "is_stale"), [("7", 0, True), ("7", 1, False)])
def test_a_requeued_job_takes_over_from_the_node_it_was_on(
    tmp_path, monkeypatch, job, restarts, is_stale
):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    hold(tmp_path, host="elsewhere", job=job, restarts=restarts)
    if is_stale:
        assert take_lock(tmp_path).restarts == 1
    else:
        with pytest.raises(UserError, match="elsewhere"):
            take_lock(tmp_path)


def test_an_owner_that_is_still_ending_is_waited_for(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(lock, "WAIT_SECONDS", 60.0)
    owner = hold(tmp_path, host="elsewhere")
    said = threading.Event()
    monkeypatch.setattr(lock.time, "sleep", lambda seconds: said.set())
    ending = threading.Thread(target=lambda: said.wait() and release_lock(tmp_path, owner))
    ending.start()
    assert take_lock(tmp_path).host == Owner.me().host
    ending.join()
    assert "waiting 60 s for it to end" in caplog.text


@pytest.mark.parametrize("content", ["", '{"host": "x"', "[1]"])
def test_a_lock_that_was_never_written_is_taken_over(tmp_path, content):
    (tmp_path / LOCK_FILE).write_text(content)
    assert take_lock(tmp_path).process == os.getpid()


def test_a_lock_that_cannot_be_removed_is_refused(tmp_path):
    (tmp_path / LOCK_FILE).mkdir()  # no user can open this one; root could, one of another user
    with pytest.raises(UserError, match=f"cannot be removed; or .*, delete {tmp_path}/lock"):
        take_lock(tmp_path)


def test_a_lock_that_changed_hands_is_left(tmp_path):
    mine = take_lock(tmp_path)
    theirs = hold(tmp_path, host="elsewhere")
    release_lock(tmp_path, mine)
    assert lock._read(tmp_path / LOCK_FILE) == theirs


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"host": "elsewhere"}, "lock names process .* on elsewhere since"),
        ({"process": 1}, "lock names process 1 on"),
        ({"started": "1"}, "lock names process"),
        (None, "lock is gone"),
        ("", "lock names a process that has not said its name"),
    ],
)
def test_whose_lock_was_taken_over_may_not_write_there(tmp_path, change, said):
    run, other = tmp_path / "run", tmp_path / "other"
    run.mkdir(), other.mkdir()
    mine = take_lock(run)
    check_lock(run / "grpo" / "checkpoint-1")
    if isinstance(change, dict):
        hold(run, **change)
    elif change is None:
        (run / LOCK_FILE).unlink()
    else:
        (run / LOCK_FILE).write_text(change)
    left = {path: path.read_bytes() for path in run.iterdir()}
    with pytest.raises(UserError, match=f"--output_dir: {run}/{said}.*saves nothing more"):
        check_lock(run / "grpo" / "checkpoint-1")
    assert is_taken_over(run)
    check_lock(other / "file")
    release_lock(run, mine)
    assert {path: path.read_bytes() for path in run.iterdir()} == left
    check_lock(run / "file")


def test_a_folder_of_a_run_on_another_disk_is_the_runs_all_the_same(tmp_path):
    run, scratch = tmp_path / "run", tmp_path / "scratch"
    run.mkdir(), scratch.mkdir()
    (run / "grpo").symlink_to(scratch)
    (tmp_path / "link").symlink_to(run)
    mine = take_lock(run)
    hold(run, host="elsewhere")
    for path in (run / "grpo" / "checkpoint-1", tmp_path / "link" / "log"):
        with pytest.raises(UserError, match="saves nothing more"):
            check_lock(path)
    release_lock(run, mine)


def test_who_comes_late_to_a_stale_lock_leaves_the_new_one(tmp_path):
    stale = hold(tmp_path, process=ended_process())
    owner = take_lock(tmp_path)  # another that has seen it stale
    assert not lock._remove_stale(tmp_path / LOCK_FILE, stale)
    assert lock._read(tmp_path / LOCK_FILE) == owner


def test_of_many_that_find_a_stale_lock_one_gets_it(tmp_path):
    code = (
        "import sys; from pathlib import Path; from pipeline import lock\n"
        "lock.WAIT_SECONDS, lock.POLL_SECONDS = 0.5, 0.01\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "try: lock.take_lock(Path(sys.argv[1])); print('got it', flush=True)\n"
        "except lock.UserError: print('refused', flush=True)\n"
        "sys.stdin.readline()"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": ROOT}
    processes = [subprocess.Popen(command, **pipes) for _ in range(6)]
    try:
        assert {process.stdout.readline() for process in processes} == {"ready\n"}
        hold(tmp_path, process=ended_process())
        for process in processes:
            process.stdin.write("\n")
            process.stdin.flush()
        said = [process.stdout.readline() for process in processes]
    finally:
        for process in processes:
            process.communicate("\n")
    assert sorted(said) == ["got it\n"] + ["refused\n"] * 5
