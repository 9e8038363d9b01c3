"""Benchmarks: each measures our side and the reference in one run, alternating.

    python launch/benchmark.py --suite step        a GRPO step against TRL's own trainer
    python launch/benchmark.py --suite engine      the engine alone, by model shape
    python launch/benchmark.py --suite clipping    what the gradient norm does to movement
    python launch/benchmark.py --suite prune       one-shot methods on one layer, by shape
    python launch/benchmark.py --suite inference   every export beside the dense model
    python launch/benchmark.py --suite quality     one-shot methods on the bundled model
    python launch/benchmark.py --suite checkpoint  saving, resuming, and the time of --help

Each writes `results/benchmark_SUITE.json`: medians and quartiles, with hardware, date, versions and
commit. `OMP_NUM_THREADS` sets torch's threads.
"""

import argparse
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

# Python puts launch/ on the path, not its parent, which holds the packages of a plain clone.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.artifacts import git_commit, installed_versions, write_json
from pipeline.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs" / "benchmark"
SUITES = ("step", "engine", "clipping", "prune", "inference", "quality", "checkpoint")
BAD_INPUT = 2


def environment() -> dict:
    """What the figures depend on, and how busy the machine is before they are taken."""
    import torch

    processor = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(
            (v for k, _, v in (x.partition(": ") for x in lines) if "name" in k), processor
        )
    cores = len(os.sched_getaffinity(0))
    return {
        "date": time.strftime("%Y-%m-%d"),
        "hardware": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "processor": processor,
        "cores": {"machine": os.cpu_count(), "this_process": cores},
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "clock": "processor" if torch.get_num_threads() == 1 else "wall",
        "load_average_before": os.getloadavg()[0],
        "git_commit": git_commit(),
        "versions": installed_versions(),
    }


def measure(arguments: argparse.Namespace, save: Callable[[dict], None]) -> None:
    """Runs one suite and prints what it found; `save` keeps a result, or a part of one."""
    if arguments.suite == "step":
        from launch.benchmarks import step as suite  # trl takes seconds

        result = suite.run(arguments.config or CONFIGS / "engine.yaml", arguments.steps or 8)
    elif arguments.suite == "engine":
        from launch.benchmarks import engine as suite

        result = suite.run(arguments.config or CONFIGS / "engine.yaml")
    elif arguments.suite == "prune":
        from launch.benchmarks import prune as suite

        result = suite.run(arguments.config or CONFIGS / "prune.yaml", save)
    elif arguments.suite == "inference":
        from launch.benchmarks import inference as suite

        result = suite.run(arguments.config or CONFIGS / "inference.yaml", save)
    elif arguments.suite == "quality":
        from launch.benchmarks import quality as suite

        result = suite.run(arguments.config or CONFIGS / "quality.yaml")
    elif arguments.suite == "checkpoint":
        from launch.benchmarks import checkpoint as suite

        result = suite.run()
    else:
        from launch.benchmarks import clipping as suite

        result = suite.run(arguments.steps or 100)
    save(result)
    suite.show(result)


def main() -> int:
    """Runs one suite, prints it and writes it to `results/`. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--suite", choices=SUITES, required=True)
    parser.add_argument("--steps", type=int, help="of suites step (8) and clipping (100)")
    parser.add_argument(
        "--config",
        type=Path,
        help="shapes; default: configs/benchmark/SUITE.yaml, of suite step engine.yaml",
    )
    parser.add_argument("--output", type=Path, help="default: results/benchmark_SUITE.json")
    arguments = parser.parse_args()
    output = arguments.output or ROOT / "results" / f"benchmark_{arguments.suite}.json"
    started = time.perf_counter()
    conditions = {"suite": arguments.suite, **environment()}

    def save(result: dict) -> None:
        seconds = time.perf_counter() - started
        write_json(output, {**conditions, **result, "suite_seconds": seconds})

    try:
        measure(arguments, save)
    except UserError as error:
        print(error, file=sys.stderr)
        return BAD_INPUT
    return 0


if __name__ == "__main__":
    sys.exit(main())
