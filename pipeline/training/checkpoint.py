"""Whole checkpoints: a folder counts only when its last file, the marker, is there.

transformers writes `checkpoint-N/` in place, so a crash can leave a part of one. Our marker is
written after everything else; a folder without it is named, left in place and never resumed from.
"""

import json
import logging
from pathlib import Path
from typing import Any

from pipeline.artifacts import write_json
from pipeline.sparsity.state import SparsityState

MARKER_FILE = "sparsity.json"

logger = logging.getLogger(__name__)


def finish_checkpoint(
    checkpoint: Path, state: SparsityState, refinements: list[dict[str, Any]]
) -> None:
    """Adds masks, movement and, last, the marker to what transformers wrote.

    Args:
        checkpoint: `checkpoint-N/`.
        state: Masks and movement by weight name.
        refinements: What each refinement of this stage did so far.
    """
    state.save(checkpoint)
    write_json(checkpoint / MARKER_FILE, {"refinements": refinements})


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
