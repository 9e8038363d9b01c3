"""Runs killed at a point end as an undisturbed one, bit for bit; `make soak` tries many more.

So does a run that is started a second time while its first start lives on, given up by Slurm.
"""

import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from pipeline.lock import release_lock, take_lock
from tests.soak.faults import try_damage, try_fault, undisturbed
from tests.soak.runs import differences, fork, log_of, result

KILLS = (
    "grpo:1:step:rank0:KILL",
    "distill:1:step:launcher:KILL",
    "distill:4:rename:group:KILL",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of all runs; the undisturbed one is made once."""
    return tmp_path_factory.mktemp("kills")


@pytest.mark.parametrize("fault", KILLS)
def test_a_killed_run_loses_nothing(fault, folder):
    found = try_fault(folder, fault, ranks=1)
    assert found["first"] == -signal.SIGKILL
    assert found["differing"] == []
    if "launcher" in fault:
        assert found["left_status"] == "75", "its worker saved and stopped"


def test_a_bit_flipped_in_the_newest_checkpoint_costs_that_checkpoint_alone(folder):
    assert try_damage(folder, "bit-flipped")["differing"] == []


def files(out):
    """When each file was written, and its size; TensorBoard's belong to one process each."""
    found = {path: path.stat() for path in out.rglob("*") if path.is_file()}
    return {
        str(path): (stat.st_mtime_ns, stat.st_size)
        for path, stat in found.items()
        if "tensorboard" not in path.parts
    }


def test_a_run_that_was_taken_over_ends_at_its_next_save_and_touches_nothing(folder):
    out, job = folder / "taken", {"SLURM_JOB_ID": "7"}
    expected = undisturbed(folder, 1)
    with ThreadPoolExecutor() as pool:
        given_up = pool.submit(fork, out, "distill:3:step:rank0:WAIT", **job)
        try:
            while not (log_of(out).exists() and "fault: " in log_of(out).read_text()):
                assert not given_up.done()
                time.sleep(0.1)
            assert fork(out, SLURM_RESTART_COUNT="1", **job) == 0
            owner = take_lock(out)
            left = files(out)
        finally:
            (folder / "go_on").touch()
        assert given_up.result() == 2
    assert files(out) == left
    release_lock(out, owner)
    message = f"error: --output_dir: {out / 'lock'} names process {owner.process} on "
    assert log_of(out).read_text().count(message) == 1
    assert "Traceback" not in log_of(out).read_text()
    assert differences(result(out), expected) == []
