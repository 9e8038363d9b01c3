"""Whole runs under Slurm, disturbed in every way a job can be: they end as if nothing had happened.

The shipped script, `accelerate launch` and the bundled model, on one node and on two; the bits of
weights, masks and report are compared with those of a job that nothing disturbed.
"""

import itertools
import json
import sys
import sysconfig
import time
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import get_default_build_root

from tests.e2e.test_reproducible import tensors
from tests.slurm.cluster import Cluster

pytestmark = [pytest.mark.slurm, pytest.mark.distributed, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 600
POLLS_BETWEEN_LOOKS = 10
ENDED = ("COMPLETED", "FAILED", "TIMEOUT", "NODE_FAIL")
REPORTED = ("sparsity", "accuracy", "perplexity", "kl_to_teacher", "refinement")
SMALL = {
    "task.num_train": 200,
    "task.num_test": 20,
    "task.num_calibration": 16,
    "task.num_probe": 16,
    "distill.rollouts": 64,
    "distill.max_steps": 40,
    "distill.per_device_train_batch_size": 8,
    "distill.save_steps": 10,
    "distill.muon_learning_rate": "null",
    "grpo.max_steps": 20,
    "grpo.per_device_train_batch_size": 16,
    "grpo.save_steps": 5,
    "refine.every_steps": 4,
}
STAGES = {1: ("prune", "distill", "grpo"), 2: ("prune", "distill")}
"""Stages that leave a model, by number of nodes: two cost twice the time."""


class Runs:
    """Jobs of one project, whose path has spaces."""

    def __init__(self, slurm: Cluster, folder: Path):
        self.slurm, self.folder = slurm, folder / "my project"
        self.folder.mkdir()
        for name in ("launch", "configs"):
            (self.folder / name).symlink_to(ROOT / name)

    def submit(self, name: str, nodes: int, *options: str) -> str:
        """Returns the number of a job whose run folder is `runs/NAME`."""
        words = ["--config", "configs/quickstart.yaml", "--output_dir", f"runs/{name}"]
        words += ["--stages", ",".join([*STAGES[nodes], "evaluate"])]
        for key, value in SMALL.items():
            words += [f"--{key}", str(value)]
        programs = f"{sysconfig.get_path('scripts')}:{self.slurm.environment['PATH']}"
        python = f"py{sys.version_info.major}{sys.version_info.minor}{sys.abiflags}"
        variables = {
            "PATH": programs,
            "OMP_NUM_THREADS": "1",
            "TORCH_EXTENSIONS_DIR": f"{get_default_build_root()}/{python}_cpu",  # built before
        }
        if nodes > 1:
            variables["TOPOLOGY"] = "configs/accelerate/cpu_zero2.yaml"
        script = ["launch/slurm/train.sbatch", *words]
        options = (f"--nodes={nodes}", *options)
        return self.slurm.submit(*options, *script, folder=self.folder, variables=variables)

    def out(self, name: str) -> Path:
        """A run folder."""
        return self.folder / "runs" / name

    def said(self, job: str) -> str:
        """What a job printed."""
        path = self.folder / f"slurm-{job}.out"
        return path.read_text() if path.exists() else ""

    def wait(self, is_so, what: str, job: str) -> None:
        """Waits, but not for a job that has ended."""
        polls = itertools.count(1)

        def is_so_or_over() -> bool:
            if next(polls) % POLLS_BETWEEN_LOOKS == 0:
                assert self.slurm.job(job)["JobState"] not in ENDED, self.said(job)
            return is_so()

        self.slurm.wait(is_so_or_over, what, SECONDS)

    def wait_for_checkpoint(self, name: str, stage: str, job: str, beyond: int = 0) -> int:
        """Waits for a checkpoint past a step. Returns its step."""

        def newest() -> int:
            found = self.out(name).glob(f"{stage}/checkpoint-*/manifest.json")
            return max((int(path.parent.name.partition("-")[2]) for path in found), default=0)

        self.wait(lambda: newest() > beyond, f"{name}: a checkpoint of {stage}", job)
        return newest()

    def wait_for_restart(self, job: str, number: int) -> None:
        """Waits until Slurm has requeued a job so many times."""
        self.wait(lambda: int(self.slurm.job(job)["Restarts"]) >= number, "it is requeued", job)

    def wait_for_end(self, job: str) -> None:
        """Waits for a job to end well."""
        ended = self.slurm.wait_for_end(job, SECONDS)
        assert ended["JobState"] == "COMPLETED", self.said(job)

    def assert_same_end(self, one: str, two: str, nodes: int) -> None:
        """Compares weights, masks and reports of two runs, bit for bit."""
        first, second = (json.loads((self.out(n) / "report.json").read_text()) for n in (one, two))
        assert {key: first[key] for key in REPORTED} == {key: second[key] for key in REPORTED}
        for stage in STAGES[nodes]:
            left, right = tensors(self.out(one), stage), tensors(self.out(two), stage)
            assert left.keys() == right.keys()
            assert [name for name in left if not torch.equal(left[name], right[name])] == []


@pytest.fixture(scope="module")
def runs(slurm, tmp_path_factory):
    return Runs(slurm, tmp_path_factory.mktemp("slurm"))


@pytest.fixture(scope="module")
def undisturbed(runs):
    """A job for each number of nodes, whose run is called so; they may not have ended yet."""
    return {n: runs.submit(f"undisturbed {n}", n, "--time=60") for n in STAGES}


def wait_for_tick(slurm: Cluster, seconds: float) -> None:
    """Until so long before Slurm looks at time limits, which it does every 30 seconds."""
    time.sleep((slurm.started - time.monotonic() - seconds) % 30)


def test_one_node_whose_time_is_over_and_that_is_requeued_and_asked_to_stop(runs, undisturbed):
    slurm, name = runs.slurm, "one node"
    wait_for_tick(slurm, 10)
    job = runs.submit(name, 1, "--time=1", "--signal=B:USR1@30")
    runs.wait_for_restart(job, 1)
    slurm.run("scontrol", "update", f"JobId={job}", "TimeLimit=60")
    runs.wait_for_checkpoint(name, "distill", job)
    slurm.run("scontrol", "requeue", job)
    runs.wait_for_restart(job, 2)
    runs.wait_for_checkpoint(name, "grpo", job)
    slurm.run("scancel", "--batch", "--signal=USR1", job)
    runs.wait_for_end(job)
    assert "DUE TO JOB REQUEUE" in runs.said(job)
    assert "resumed" in (runs.out(name) / "log").read_text()
    runs.wait_for_end(undisturbed[1])
    runs.assert_same_end("undisturbed 1", name, 1)


def test_two_nodes_asked_to_stop_and_then_one_of_them_dies(runs, undisturbed):
    slurm, name = runs.slurm, "two nodes"
    runs.wait_for_end(undisturbed[2])  # it compiles what a killed job would leave half done
    job = runs.submit(name, 2, "--time=60")
    step = runs.wait_for_checkpoint(name, "distill", job)
    slurm.run("scancel", "--batch", "--signal=USR1", job)
    runs.wait_for_restart(job, 1)
    assert "ended with 75: job" in runs.said(job)
    runs.wait_for_checkpoint(name, "distill", job, beyond=step + 1)
    slurm.kill_node("node2")
    runs.wait_for_restart(job, 2)
    slurm.start_node("node2")
    runs.wait_for_end(job)
    runs.assert_same_end("undisturbed 2", name, 2)
