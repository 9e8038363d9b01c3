"""What a run leaves on disk, and whether it can be written there. Nothing is created.

Of N weights, P prunable, c bytes of the type that computes (`memory.py`):

    model            4 N, student.dtype bfloat16 2 N; after prune and after every training stage
    masks, movement  (4 + 1/8) P, movement.dtype bfloat16 (2 + 1/8) P; the same places, checkpoints
    checkpoint       plain: 12 N (weights, two moments), ZeRO: (c + 12) N
    best student     model, masks and movement once more, with evaluate.every_steps

A stage keeps `save_total_limit` checkpoints, all where that is null, and has one more while it
saves. Left out: rollouts, pictures and reports, which take some megabytes, and downloads.
"""

import math
import os
import shutil
from pathlib import Path
from typing import Any

from pipeline.config import Config
from pipeline.doctor.shapes import ModelShape


def checkpoints_kept(arguments: Any) -> int:
    """How many checkpoints of one stage exist at once, the one being written included."""
    if str(arguments.save_strategy.value) == "no":
        return 0
    steps, every = max(1, arguments.max_steps), arguments.save_steps
    every = max(1, round(every if every >= 1 else every * steps))
    written = math.ceil(steps / every)
    return min(written, (arguments.save_total_limit or written) + 1)


def run_bytes(
    config: Config, shape: ModelShape, arguments: dict[str, Any], *, is_zero: bool
) -> float:
    """What a run leaves on disk.

    Args:
        config: Of the run.
        shape: Of the student.
        arguments: Training stage to TRL's arguments.
        is_zero: Whether DeepSpeed writes the checkpoints.
    """
    size, prunable = shape.num_weights, shape.num_prunable
    model = (2 if config.student.dtype == "bfloat16" else 4) * size
    sparsity = ((2 if config.movement.dtype == "bfloat16" else 4) + 1 / 8) * prunable
    trained = size if config.lora.r is None else config.lora.r * shape.matrix_widths
    measures = config.evaluate.every_steps is not None
    total = model + 2 * prunable / 8 if "prune" in config.run.stages else 0.0
    for values in arguments.values():
        weights = (2 if values.bf16 else 4) if is_zero else 4
        whole = (weights + (12 if is_zero else 8)) * trained + sparsity
        whole += model + sparsity if measures else 0
        total += checkpoints_kept(values) * whole + model + sparsity
        total += model + sparsity if measures else 0
    return total


def existing_bytes(folder: Path) -> int:
    """Size of the files that a folder already holds."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def nearest_existing(folder: Path) -> Path:
    """The folder itself, or the parent in which it would be made."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return folder


def free_bytes(folder: Path) -> int:
    """Free for this user where the folder is or would be."""
    return shutil.disk_usage(nearest_existing(folder)).free


def permission_fault(folder: Path) -> str | None:
    """Why a folder cannot be written or made; None where it can."""
    place = nearest_existing(folder)
    if not place.is_dir():
        return f"{place} is a file"
    if not os.access(place, os.W_OK | os.X_OK):
        return f"{place} does not let you write"
    return None
