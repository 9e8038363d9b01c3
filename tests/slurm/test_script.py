"""What train.sbatch asks of the launcher and does with its end, on a real Slurm.

In the launcher's place stands a program that writes down how it was called, waits for a signal and
ends as it is told; whole runs are in `test_runs.py`.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest

from tests.slurm.cluster import SEARCH_PATH, Cluster

pytestmark = pytest.mark.slurm

ROOT = Path(__file__).resolve().parents[2]

LAUNCHER = f"""#!{sys.executable}
import json, os, pathlib, signal, sys, time
kept = ("SLURMD_NODENAME", "SLURM_RESTART_COUNT", "TRITON_CACHE_DIR")
call = {{"arguments": sys.argv[1:], "process": os.getpid()}}
call |= {{name: os.environ.get(name) for name in kept}}
written = pathlib.Path("calls", str(os.getpid()))
written.write_text(json.dumps(call))
written.rename(written.with_suffix(".json"))
while "vllm-serve" in sys.argv:
    time.sleep(0.05)
status = os.environ["ENDS_AGAIN" if os.environ.get("SLURM_RESTART_COUNT") else "ENDS"]
asked = []
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, lambda number, frame: asked.append(number))
while status == "75" and not asked:
    time.sleep(0.05)
if "--check" not in sys.argv:
    folder = pathlib.Path(sys.argv[sys.argv.index("--output_dir") + 1])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "exit_status").write_text(status)
sys.exit(status != "0")
"""


class Project:
    """A folder to submit from, with such a launcher."""

    def __init__(self, folder, slurm: Cluster):
        self.folder, self.slurm = folder, slurm
        (folder / "calls").mkdir(parents=True)
        (folder / "launch").symlink_to(ROOT / "launch")
        (folder / ".venv" / "bin").mkdir(parents=True)
        for name in ("accelerate", "trl"):
            program = folder / ".venv" / "bin" / name
            program.write_text(LAUNCHER)
            program.chmod(0o755)

    def submit(self, *options, arguments=("--output_dir", "a run"), **variables):
        """Returns the job's number."""
        return self.slurm.submit(
            *options,
            "launch/slurm/train.sbatch",
            *arguments,
            folder=self.folder,
            variables={"ENDS": "0", "ENDS_AGAIN": "0"} | variables,
        )

    def calls(self):
        """What the launchers wrote down, each with its options and their values."""
        calls = [json.loads(path.read_text()) for path in self.folder.glob("calls/*.json")]
        for call in calls:
            call |= {word: value for word, value in pairwise(call["arguments"]) if word[:2] == "--"}
        return calls


@pytest.fixture
def project(tmp_path, slurm):
    return Project(tmp_path / "my project", slurm)


def test_one_process_per_gpu_on_every_node(project):
    job = project.submit("--nodes=2", "--gpus-per-node=8")
    assert project.slurm.wait_for_end(job, 60)["JobState"] == "COMPLETED"
    first, second = sorted(project.calls(), key=lambda call: call["--machine_rank"])
    assert (first["--machine_rank"], second["--machine_rank"]) == ("0", "1")
    assert (first["SLURMD_NODENAME"], second["SLURMD_NODENAME"]) == ("node1", "node2")
    for call in (first, second):
        assert call["--config_file"] == "configs/accelerate/nodes_zero3.yaml"
        assert (call["--num_machines"], call["--num_processes"]) == ("2", "16")
        assert call["--main_process_ip"] == "127.0.0.1"
        assert call["--main_process_port"] == first["--main_process_port"]
        assert call["arguments"][-3:] == ["launch/train.py", "--output_dir", "a run"]
    assert first["TRITON_CACHE_DIR"] != second["TRITON_CACHE_DIR"]


def test_tasks_of_an_array_have_folders_and_ports_of_their_own(project):
    words = ("--config", "configs/grpo_%a.yaml", "--output_dir=runs/%a of %a", "--run.seed", "%a")
    array = project.submit("--array=3,70", arguments=words, ENDS="75")
    project.slurm.wait(lambda: len(project.calls()) == 2, "both tasks run")
    three, seventy = sorted(project.calls(), key=lambda call: int(call["--run.seed"]))
    assert three["--config"] == "configs/grpo_3.yaml"
    assert seventy["arguments"][-3] == "--output_dir=runs/70 of 70"
    assert seventy["--config_file"] == "configs/accelerate/single.yaml"
    assert three["--main_process_port"] != seventy["--main_process_port"]
    project.slurm.run("scancel", array)


def test_a_task_that_was_asked_to_stop_runs_again_and_the_others_are_left_alone(project):
    words = ("--output_dir", "runs/%a")
    array = project.submit("--array=1-2", arguments=words, ENDS="75")
    project.slurm.wait(lambda: len(project.calls()) == 2, "both tasks run")
    project.slurm.run("scancel", "--batch", "--signal=USR1", f"{array}_2")
    ended = project.slurm.wait_for_end(f"{array}_2", 60)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1")
    other = project.slurm.job(f"{array}_1")
    assert (other["JobState"], other["Restarts"]) == ("RUNNING", "0")
    assert "job requeued" not in (project.folder / f"slurm-{array}_1.out").read_text()
    said = (project.folder / f"slurm-{array}_2.out").read_text()
    assert f"runs/2 ended with 75: job {array}_2 requeued" in said
    project.slurm.run("scancel", array)


def test_a_run_that_its_user_has_to_mend_is_not_started_again(project):
    ended = project.slurm.wait_for_end(project.submit(ENDS="2"), 60)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "2:0", "0")


def test_a_crash_without_a_dead_node_is_not_started_again(project):
    ended = project.slurm.wait_for_end(project.submit("--nodes=2", ENDS="1"), 60)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "1:0", "0")


def test_a_crash_beside_a_server_is_not_started_again(project):
    job = project.submit("--nodes=2", "--gpus-per-node=8", VLLM_MODEL="a model", ENDS="1")
    ended = project.slurm.wait_for_end(job, 60)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "1:0", "0")


def test_a_start_that_slurm_gave_up_leaves_the_next_one_alone(project):
    slurm = project.slurm
    job = project.submit(ENDS="75", ENDS_AGAIN="75")
    slurm.wait(lambda: len(project.calls()) == 1, "it runs")
    (first,) = project.calls()
    node = first["SLURMD_NODENAME"]
    sruns = [process for process in slurm.processes(node) if process.name() == "srun"]
    for process in sruns:  # as if the network were down
        process.suspend()
    slurm.kill_daemon(node)
    slurm.wait(lambda: len(project.calls()) == 2, "it runs again on the other node", 90)
    os.kill(first["process"], signal.SIGTERM)
    slurm.wait((project.folder / "a run" / "exit_status").exists, "the first launcher has ended")
    for process in sruns:
        process.kill()
    slurm.wait(lambda: not slurm.processes(node), "the first start has ended", 90)
    time.sleep(1)
    again = slurm.job(job)
    assert (again["JobState"], again["Restarts"]) == ("RUNNING", "1")
    slurm.run("scancel", job)
    slurm.start_node(node)
    slurm.wait(lambda: set(slurm.node_states().values()) == {"idle"}, "all nodes are idle")


DEAF = """#!/bin/sh
echo >>"asked-$SLURM_JOB_ID"
[ "$(wc -l <"asked-$SLURM_JOB_ID")" -gt "$FAILURES" ] && exec {squeue} "$@"
exit 1
"""


def test_a_job_goes_on_when_slurm_answers_again_and_is_left_alone_where_it_never_does(project):
    squeue = project.folder / ".venv" / "bin" / "squeue"
    squeue.write_text(DEAF.format(squeue=shutil.which("squeue", path=SEARCH_PATH)))
    squeue.chmod(0o755)
    soon, never = (
        project.submit(arguments=("--output_dir", failures), ENDS="75", FAILURES=failures)
        for failures in ("1", "9")
    )
    project.slurm.wait(lambda: len(project.calls()) == 2, "both jobs run")
    for job in (soon, never):
        project.slurm.run("scancel", "--batch", "--signal=USR1", job)
    ended = project.slurm.wait_for_end(soon, 90)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1")
    ended = project.slurm.wait_for_end(never, 90)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "75:0", "0")


def test_an_old_exit_status_does_not_count(project):
    (project.folder / "a run").mkdir()
    (project.folder / "a run" / "exit_status").write_text("75\n")
    words = ("--output_dir", "a run", "--check")
    ended = project.slurm.wait_for_end(project.submit(arguments=words, ENDS="2"), 60)
    assert (ended["JobState"], ended["ExitCode"]) == ("FAILED", "1:0")


def test_a_job_that_its_user_cancels_saves_and_stays_cancelled(project):
    job = project.submit(ENDS="75")
    project.slurm.wait(lambda: bool(project.calls()), "it runs")
    project.slurm.run("scancel", job)
    ended = project.slurm.wait_for_end(job, 60)
    time.sleep(1)
    assert (ended["JobState"], project.slurm.job(job)["Restarts"]) == ("CANCELLED", "0")
    assert (project.folder / "a run" / "exit_status").read_text() == "75"


def test_the_last_node_serves_with_vllm(project):
    """How it is placed and what both sides are told; no vLLM runs here."""
    job = project.submit("--nodes=2", "--gpus-per-node=8", VLLM_MODEL="a model")
    project.slurm.wait_for_end(job, 60)
    trainer, server = sorted(project.calls(), key=lambda call: call["SLURMD_NODENAME"])
    assert server["SLURMD_NODENAME"] == "node2"
    assert server["arguments"][:3] == ["vllm-serve", "--model", "a model"]
    assert server["--tensor_parallel_size"] == "8"
    assert trainer["SLURMD_NODENAME"] == "node1"
    assert (trainer["--num_machines"], trainer["--num_processes"]) == ("1", "8")
    assert trainer["--grpo.use_vllm"] == "true"
    assert trainer["--grpo.vllm_mode"] == "server"
    assert trainer["--grpo.vllm_server_host"] == "127.0.0.1"
    assert trainer["--grpo.vllm_server_port"] == server["--port"]
    ports = {trainer[f"--{name}"] for name in ("main_process_port", "grpo.vllm_group_port")}
    assert len(ports) == 2


def test_a_server_without_a_node_of_its_own(project):
    ended = project.slurm.wait_for_end(project.submit(VLLM_MODEL="a model"), 60)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "2:0", "0")
    said = (project.folder / f"slurm-{ended['JobId']}.out").read_text()
    assert said.startswith("error: VLLM_MODEL: ")


def test_started_without_sbatch(project):
    script = ["bash", "launch/slurm/train.sbatch", "--output_dir", "a run"]
    environment = {key: v for key, v in os.environ.items() if not key.startswith("SLURM")}
    done = subprocess.run(
        script, cwd=project.folder, env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert "submit it with sbatch" in done.stderr


def test_submitted_from_elsewhere(tmp_path, slurm):
    script = ROOT / "launch" / "slurm" / "train.sbatch"
    job = slurm.submit(str(script), folder=tmp_path, variables={})
    assert slurm.wait_for_end(job, 60)["ExitCode"] == "2:0"
    assert "run sbatch in the repository" in (tmp_path / f"slurm-{job}.out").read_text()
