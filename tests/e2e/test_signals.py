"""A run that is stopped by signals, stage by stage, and started again each time."""

import signal
import subprocess
import sys
import time

from tests.e2e.test_pipeline import ROOT, command, launch

STOPS = (
    ("prune: begins", signal.SIGTERM),
    ("distill: begins", signal.SIGINT),
    ("grpo: begins", signal.SIGUSR1),
)


def test_a_run_stopped_in_each_stage_ends_with_75_and_then_as_an_undisturbed_one(tmp_path):
    out = tmp_path / "run"
    unlaunched = [sys.executable, *command("configs/quickstart.yaml", out)[3:]]
    for message, number in STOPS:  # to the run itself: SIGTERM ends accelerate's launcher
        process = subprocess.Popen(
            unlaunched,
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=_hear_interrupts,
        )
        for line in process.stderr:
            if message in line:
                time.sleep(1.0)
                process.send_signal(number)
                break
        rest = process.stderr.read()
        assert process.wait(timeout=200) == 75, rest
        assert f"stopped by {number.name}; run the same command again" in rest
        assert "Traceback" not in rest
        assert (out / "exit_status").read_text() == "75\n"
    done = launch("configs/quickstart.yaml", out)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (out / "exit_status").read_text() == "0\n"
    assert (out / "report.json").exists()


def _hear_interrupts():
    """A test run in the background may have been told to ignore them, and children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
