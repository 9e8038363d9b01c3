"""Who imports whom: rooms know only the rooms below them, and other people's code has its places.

The tables below are the house; the source of every file is read with `ast`, lazy imports included.
Left out: modules named by a string, such as a user's own reward.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

LEVELS = (  # imports run downwards only; rooms on one level do not know each other
    ("launch",),
    ("pipeline.doctor",),
    ("pipeline.run",),
    ("pipeline.stages",),
    ("pipeline.pruning", "pipeline.training", "pipeline.export"),
    ("pipeline.evaluation",),
    ("pipeline.rollouts",),
    ("pipeline.models",),
    (
        "pipeline.sparsity",
        "pipeline.data",
        "pipeline.artifacts",
        "pipeline.config",
        "pipeline.ranks",
        "rewards",
    ),
    ("pipeline.lock", "pipeline.disk_faults"),
    ("pipeline.errors", "pipeline.stopping"),
)
SAME_ROOM = {  # files of pipeline/ that belong to the room of config.py
    f"pipeline.{name}": "pipeline.config"
    for name in (
        "config_keys",
        "config_loading",
        "config_yaml",
        "rules",
        "trl_keys",
    )
}
ONLY_IN = {  # package: where it may be imported
    "trl": (
        "pipeline.training",
        "pipeline.stages.distill",
        "pipeline.stages.grpo",
        "launch.benchmarks.step",
    ),
    "deepspeed": ("pipeline.training", "pipeline.sparsity.zero_shards"),
    "peft": ("pipeline.models",),
    "lm_eval": ("pipeline.evaluation.harness",),
}
MAY_IMPORT = {  # room: all it may import from other people
    "pipeline.sparsity": {"torch", "safetensors", "deepspeed"},
    "rewards": {"torch", "math_verify"},
    "pipeline.errors": set(),
    "pipeline.stopping": set(),
    "pipeline.config": {"annotated_types", "pydantic", "pydantic_core", "yaml"},
    "pipeline.artifacts": set(),
    "pipeline.lock": set(),
    "pipeline.disk_faults": set(),
    "pipeline.ranks": {"torch", "accelerate"},
}


def module_of(path: Path) -> str:
    """`pipeline/models/loading.py` is `pipeline.models.loading`; a package is its folder."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str | None:
    """The room a module of ours belongs to; None for other people's."""
    head = ".".join(module.split(".")[:2])
    head = SAME_ROOM.get(head, head)
    return next((r for level in LEVELS for r in level if f"{head}.".startswith(f"{r}.")), None)


def level_of(room: str) -> int:
    """0 is the top."""
    return next(depth for depth, level in enumerate(LEVELS) if room in level)


def imported_modules(module: str, source: str) -> set[str]:
    """Every module a file imports, also inside functions; `from a import b` gives `a.b`."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = module.split(".")[: -node.level] if node.level else []
            base = ".".join([*package, *filter(None, [node.module])])
            found |= {f"{base}.{alias.name}" for alias in node.names}
    return found


def violations(module: str, source: str) -> list[str]:
    """What a file imports although its room must not."""
    room = room_of(module)
    if module == "pipeline":
        return ["pipeline/__init__.py holds code"] if source.strip() else []
    if room is None:
        return [f"{module} belongs to no room"]
    return [
        f"{module} imports {name}: {fault}"
        for name in sorted(imported_modules(module, source))
        for fault in faults(module, room, name)
    ]


def faults(module: str, room: str, name: str) -> Iterator[str]:
    """What is wrong with one import of a module that lives in `room`."""
    package, target = name.split(".")[0], room_of(name)
    if package in ("pipeline", "launch", "rewards"):
        if target is None:
            yield "it belongs to no room"
        elif room == "rewards" and target != "rewards":
            yield "rewards stand alone"
        elif target != room and level_of(target) <= level_of(room):
            yield "it is not below"
        return
    places = ONLY_IN.get(package)
    if places and not any(f"{module}.".startswith(f"{place}.") for place in places):
        yield f"only {', '.join(places)} may"
    if room in MAY_IMPORT and package not in MAY_IMPORT[room] | sys.stdlib_module_names:
        yield f"{room} must do without"


def test_imports_run_downwards():
    folders = [ROOT / name for name in ("launch", "pipeline", "rewards")]
    files = [path for folder in folders for path in folder.rglob("*.py")]
    found = [line for path in files for line in violations(module_of(path), path.read_text())]
    assert found == []
    assert len(files) > 30, "the rooms moved, and this test looks at nothing"


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("pipeline.models.loading", "from pipeline.evaluation.accuracy import greedy_accuracy"),
        ("pipeline.models.loading", "from ..stages import prune"),
        ("pipeline.models.loading", "def f():\n    import pipeline.stages.prune"),
        ("pipeline.models.loading", "from pipeline import run"),
        ("pipeline.models.loading", "import pipeline"),
        ("pipeline.models.loading", "import launch.train"),
        ("pipeline.pruning.mama", "from pipeline.training.arguments import grpo_arguments"),
        ("pipeline.data.tasks", "from pipeline.config import Config"),
        ("pipeline.artifacts", "from pipeline import trl_keys"),
        ("pipeline.stages.prune", "from trl import GRPOConfig"),
        ("launch.benchmark", "import trl"),
        ("launch.benchmarks.engine", "import trl"),
        ("pipeline.pruning.mama", "import trl"),
        ("pipeline.stages.grpo", "import deepspeed"),
        ("pipeline.sparsity.shards", "import deepspeed"),
        ("pipeline.training.grpo_trainer", "from peft import LoraConfig"),
        ("pipeline.sparsity.masks", "import transformers"),
        ("pipeline.config", "import torch"),
        ("pipeline.artifacts", "import torch"),
        ("rewards.mix", "from pipeline.errors import UserError"),
        ("rewards.mix", "import transformers"),
        ("pipeline.helpers", "import os"),
        ("pipeline", "import pipeline.errors"),
    ],
)
def test_planted_import_is_caught(module, line):
    assert violations(module, line)


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("pipeline.models.loading", "from pipeline.errors import UserError"),
        ("pipeline.models.loading", "from . import prompts"),
        ("pipeline.stages.grpo", "from trl import GRPOConfig"),
        ("pipeline.sparsity.zero_shards", "import deepspeed"),
        ("pipeline.config_loading", "from pipeline.trl_keys import REFUSED"),
        ("rewards.correctness", "from math_verify import parse"),
        ("launch.train", "from pipeline.run import run"),
    ],
)
def test_allowed_import_passes(module, line):
    assert violations(module, line) == []


def test_command_line_starts_without_torch():
    code = "import sys, launch.train; print([m for m in ('torch', 'trl') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr
