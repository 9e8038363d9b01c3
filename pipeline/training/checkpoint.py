"""Whole checkpoints: written beside, flushed, listed in a manifest, renamed, and then rotated.

transformers writes the parts of `checkpoint-N/` one after the other, and deletes older checkpoints
before ours is whole. So it is given `_saving/checkpoint-N/` to write to, where it finds nothing to
delete. The rename comes after the last byte has reached the disk (`manifest.py`), rotation last.
A crash or a full disk at any point leaves all earlier checkpoints as they were.

Resuming takes the newest checkpoint all of whose files have the size and checksum of the manifest.
A broken one is named and left in place, also by rotation, until its step is saved again. Those
written before there were manifests count as broken too: a stage that has only such begins anew.
"""

import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from pipeline.artifacts import MASK_FILE, write_json
from pipeline.disk_faults import is_full
from pipeline.errors import UserError
from pipeline.lock import check_lock
from pipeline.ranks import is_main, on_main, wait_for_all
from pipeline.sparsity.masks import load_masks
from pipeline.sparsity.shards import ShardedWeights
from pipeline.sparsity.state import SparsityState
from pipeline.sparsity.storage import FILE_PATTERN, load_state, save_state
from pipeline.training.manifest import find_fault, flush, quick_fault, write_manifest

STATE_FILE = "sparsity.json"
TEMPORARY = "_saving"
PREFIX = "checkpoint-"

logger = logging.getLogger(__name__)


@contextmanager
def new_checkpoint(stage: Path, step: int, limit: int | None) -> Iterator[Path]:
    """Gives a folder that becomes `checkpoint-N/` when the block ends. Every rank calls it.

    Args:
        stage: The stage's folder.
        step: N, optimizer steps so far.
        limit: Checkpoints kept, this one included; None keeps all.

    Raises:
        UserError: The disk is full, nothing but the new checkpoint is lost; or another process has
            taken the run over, whose files are left alone.
    """
    on_main(partial(check_lock, stage))
    folder = stage / TEMPORARY / f"{PREFIX}{step}"
    try:
        if is_main():
            shutil.rmtree(folder.parent, ignore_errors=True)
            folder.mkdir(parents=True)
        wait_for_all()
        yield folder
        wait_for_all()
        write_manifest(folder)
    except (OSError, RuntimeError, SafetensorError) as error:
        if not is_full(error, stage):
            raise
        free = shutil.disk_usage(stage).free
        shutil.rmtree(folder.parent, ignore_errors=True)
        message = (
            f"--output_dir: {stage}: no space left for {folder.name} ({free:,} bytes are free); "
            "earlier checkpoints are whole; make room and run the same command again to go on"
        )
        if not is_main():  # rank 0 may wait for this one until the launcher ends it
            logger.error("error: %s", message)
        raise UserError(message) from error
    if is_main():
        _put_in_place(folder, stage / folder.name)
        _rotate(stage, step, limit)
    wait_for_all()


def _put_in_place(folder: Path, target: Path) -> None:
    """Renames; a broken checkpoint of the same step makes way."""
    if target.exists():
        os.replace(target, folder.with_name("replaced"))
    os.replace(folder, target)
    flush(target.parent)
    shutil.rmtree(folder.parent)


def _rotate(stage: Path, step: int, limit: int | None) -> None:
    """Deletes the oldest checkpoints up to this step, as long as `limit` whole ones stay.

    Renamed first, so that one half deleted is not met as a broken one.
    """
    if not limit:
        return
    earlier = [path for path in _checkpoints(stage) if _step(path) <= step]
    for path in [path for path in earlier if quick_fault(path) is None][limit:]:
        (stage / TEMPORARY).mkdir(exist_ok=True)
        os.replace(path, stage / TEMPORARY / path.name)
    shutil.rmtree(stage / TEMPORARY, ignore_errors=True)


def add_sparsity(
    checkpoint: Path,
    state: SparsityState,
    weights: ShardedWeights,
    note: dict[str, Any],
) -> None:
    """Adds masks and movement to what transformers wrote. Every rank calls it.

    Args:
        checkpoint: What `new_checkpoint` gave.
        state: Masks and movement of this rank's shards.
        weights: The shards.
        note: `refinements`, what each of this stage did so far, and what `topology_change.py` has
            to know: `layout`, `batch`, `topology_changes`.
    """
    save_state(checkpoint, state, weights)
    on_main(partial(write_json, checkpoint / STATE_FILE, note))


def load_sparsity(
    source: Path, weights: ShardedWeights, movement_dtype: torch.dtype
) -> SparsityState:
    """Masks and movement of this rank's shards, from a checkpoint or the folder of a stage.

    After the prune stage there are masks alone: nothing was observed yet.

    Args:
        source: The folder.
        weights: The shards, of any number of ranks.
        movement_dtype: fp32 or bf16, where nothing was observed yet.

    Raises:
        ValueError: The folder holds the state of another model, or a part of one.
    """
    if any(FILE_PATTERN.fullmatch(path.name) for path in source.iterdir()):
        return load_state(source, weights)
    return SparsityState.from_masks(load_masks(source / MASK_FILE), weights, movement_dtype)


def read_note(checkpoint: Path) -> dict[str, Any]:
    """What `add_sparsity` noted."""
    return json.loads((checkpoint / STATE_FILE).read_text())


def newest_whole_checkpoint(stage: Path) -> Path | None:
    """The whole checkpoint with the highest step, or None. Every rank calls it."""
    found = on_main(lambda: _checkpoints(stage))
    for checkpoint in found:
        fault = find_fault(checkpoint)
        if fault is None:
            return checkpoint
        logger.warning("%s is not whole (%s); left in place", checkpoint, fault)
    if found:
        logger.warning("%s has no whole checkpoint; the stage begins anew", stage)
    return None


def check_whole(checkpoint: Path) -> None:
    """Reads all of a checkpoint that was asked for. Every rank calls it.

    Raises:
        UserError: It is broken.
    """
    fault = find_fault(checkpoint)
    if fault is not None:
        raise UserError(f"--resume: {checkpoint} is not whole ({fault}); set --resume auto")


def later_checkpoints(checkpoint: Path) -> list[Path]:
    """Those of the same stage with a higher step, whole or not."""
    return [path for path in _checkpoints(checkpoint.parent) if _step(path) > _step(checkpoint)]


def _checkpoints(stage: Path) -> list[Path]:
    """Whole or not, the newest first."""
    found = [path for path in stage.glob(f"{PREFIX}*") if path.name[len(PREFIX) :].isdigit()]
    return sorted(found, key=_step, reverse=True)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name[len(PREFIX) :])
