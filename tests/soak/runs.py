"""Tiny runs of the pipeline as real processes, and what they end with.

`launch` starts one with `accelerate launch`, as users do; `fork` in a process that has imported the
libraries already, which is all that it saves: what dies there is a real process too. Two ranks
train under ZeRO-2.
"""

import hashlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
DOOR, FAULTY = "launch/train.py", "tests/soak/faulty_train.py"
SMALL = {
    "task.num_train": 200,
    "task.num_test": 20,
    "task.num_calibration": 16,
    "task.num_probe": 16,
    "distill.rollouts": 64,
    "distill.max_steps": 6,
    "distill.save_steps": 2,
    "distill.per_device_train_batch_size": 8,
    "grpo.max_steps": 4,
    "grpo.save_steps": 2,
    "grpo.per_device_train_batch_size": 16,
    "refine.every_steps": 2,
}
TWO_RANKS = {
    "distill.muon_learning_rate": "null",
    "distill.per_device_train_batch_size": 4,
    "grpo.per_device_train_batch_size": 8,
}
REPORTED = ("sparsity", "accuracy", "perplexity", "kl_to_teacher", "refinement")
SECONDS = 1200
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "MPLBACKEND": "agg",
    "TOKENIZERS_PARALLELISM": "false",
}


def arguments(out: Path, ranks: int) -> list[str]:
    """The command line behind `launch/train.py`."""
    values = SMALL | (TWO_RANKS if ranks > 1 else {})
    options = [part for key, value in values.items() for part in (f"--{key}", str(value))]
    return ["--config", "configs/quickstart.yaml", "--output_dir", str(out), *options]


def launch(out: Path, fault: str | None = None, ranks: int = 1) -> int:
    """Runs to the end of every process that was started. Returns the launcher's exit status.

    Processes whose launcher is gone hold the pipe of their output open, so its end is theirs.
    """
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    if ranks > 1:
        topology = [
            "--main_process_port",
            "0",
            "--config_file",
            "configs/accelerate/cpu_zero2.yaml",
        ]
        command += topology
    command += [DOOR if fault is None else FAULTY, *arguments(out, ranks)]
    environment = os.environ | ENVIRONMENT | {"PYTHONPATH": str(ROOT), "FAULT": fault or ""}
    with log_of(out).open("ab") as log:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        for line in process.stdout:
            log.write(line)
    return process.wait(timeout=SECONDS)


def fork(out: Path, fault: str | None = None, ranks: int = 1, **variables: str) -> int:
    """The same without a launcher, on one rank, with more variables in its environment."""
    assert ranks == 1
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pipeline.run", "trl.trainer.grpo_trainer"])
    process = context.Process(
        target=_run, args=(arguments(out, 1), fault, str(log_of(out)), variables)
    )
    process.start()
    process.join(SECONDS)
    assert process.exitcode is not None, f"still running after {SECONDS} s: {out}"
    return process.exitcode


def _run(argv: list[str], fault: str | None, log: str, variables: dict[str, str]) -> None:
    with open(log, "ab") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore it
    os.chdir(ROOT)
    os.environ |= ENVIRONMENT | variables
    sys.argv[1:] = argv
    torch.set_num_threads(1)
    if fault is None:
        from launch.train import main
    else:
        os.environ["FAULT"] = fault
        from tests.soak.faulty_train import main
    sys.exit(main(argv))


def log_of(out: Path) -> Path:
    """All that a run's processes said, beside its folder."""
    out.parent.mkdir(parents=True, exist_ok=True)
    return out.with_name(out.name + ".log")


def result(out: Path) -> dict[str, str]:
    """Digests of every tensor that the stages left, and what the report says."""
    found = {}
    for stage in ("prune", "distill", "grpo"):
        for path in sorted((out / stage).glob("model/*.safetensors")) + sorted(
            (out / stage).glob("*.safetensors")
        ):
            for name, tensor in load_file(path).items():
                data = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
                found[f"{stage}/{path.name}/{name}"] = hashlib.sha256(data).hexdigest()
    report = json.loads((out / "report.json").read_text())
    return found | {part: json.dumps(report[part], sort_keys=True) for part in REPORTED}


def differences(one: dict[str, str], other: dict[str, str]) -> list[str]:
    """What two results do not have alike."""
    return sorted(key for key in one.keys() | other.keys() if one.get(key) != other.get(key))
