"""Whole checkpoints: a folder counts only when its last file, the marker, is there.

transformers writes `checkpoint-N/` in place, so a crash can leave a part of one. Our marker is
written after everything else; a folder without it is named, left in place and never resumed from.
"""

import json
import logging
from pathlib import Path
from typing import Any

import torch

from pipeline.artifacts import MASK_FILE, write_json
from pipeline.errors import UserError
from pipeline.ranks import is_main, wait_for_all
from pipeline.sparsity.masks import load_masks
from pipeline.sparsity.shards import ShardedWeights
from pipeline.sparsity.state import SparsityState
from pipeline.sparsity.storage import FILE_PATTERN, load_state, save_state

MARKER_FILE = "sparsity.json"

logger = logging.getLogger(__name__)


def begin_checkpoint(checkpoint: Path) -> None:
    """Takes the marker of an older checkpoint of the same step away. Every rank calls it."""
    if is_main():
        (checkpoint / MARKER_FILE).unlink(missing_ok=True)
    wait_for_all()


def finish_checkpoint(
    checkpoint: Path,
    state: SparsityState,
    weights: ShardedWeights,
    refinements: list[dict[str, Any]],
    layout: dict[str, Any],
) -> None:
    """Adds masks, movement and, last, the marker to what transformers wrote. Every rank calls it.

    Args:
        checkpoint: `checkpoint-N/`.
        state: Masks and movement of this rank's shards.
        weights: The shards.
        refinements: What each refinement of this stage did so far.
        layout: How the optimizer's state is cut, see `check_layout`.
    """
    save_state(checkpoint, state, weights)
    wait_for_all()
    if is_main():
        write_json(checkpoint / MARKER_FILE, {"refinements": refinements, "layout": layout})
    wait_for_all()


def check_layout(checkpoint: Path, layout: dict[str, Any]) -> None:
    """Refuses a checkpoint whose optimizer state this run cannot read.

    Masks and movement are read by any number of ranks; weights and moments are saved by
    transformers and DeepSpeed, in one layout. Without DeepSpeed every rank has all of them.

    Args:
        checkpoint: A whole one.
        layout: `engine` (`plain` or `zero1` to `zero3`) and `world_size` of this run.

    Raises:
        UserError: They differ.
    """
    saved = json.loads((checkpoint / MARKER_FILE).read_text())["layout"]
    if saved == layout or saved["engine"] == layout["engine"] == "plain":
        return
    then, now = (f"{lay['engine']} on {lay['world_size']} ranks" for lay in (saved, layout))
    raise UserError(
        f"--output_dir: {checkpoint} was saved by {then}, and {now} cannot read its optimizer "
        "state; launch as before, or set another --output_dir"
    )


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


def load_refinements(checkpoint: Path) -> list[dict[str, Any]]:
    """The refinements that `finish_checkpoint` noted."""
    return json.loads((checkpoint / MARKER_FILE).read_text())["refinements"]


def newest_whole_checkpoint(folder: Path) -> Path | None:
    """The checkpoint with the highest step that was written to its end, or None."""
    checkpoints = sorted(
        (path for path in folder.glob("checkpoint-*") if path.name[11:].isdigit()),
        key=lambda path: int(path.name[11:]),
        reverse=True,
    )
    for checkpoint in checkpoints:
        if (checkpoint / MARKER_FILE).exists():
            return checkpoint
        logger.warning("%s is not whole (interrupted while saving); left in place", checkpoint)
    return None
