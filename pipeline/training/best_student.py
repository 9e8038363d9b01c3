"""The best student of a stage on disk: `best/`, whole or not at all, and a copy in each checkpoint.

`best/` holds what a stage leaves of its student (`model/`, `mask.safetensors`,
`sparsity-*.safetensors`, all of one step), and `best.json`: `step` and `accuracy`. A checkpoint
holds the `best/` of its step, so that a run resumed from it forgets a later one. Copies are hard
links where the file system has them: none of these files is ever changed in place.
"""

import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

from pipeline.artifacts import replaced_folder, write_json
from pipeline.lock import check_lock
from pipeline.ranks import is_main, on_main, wait_for_all

FOLDER = "best"
RECORD_FILE = "best.json"


def write_best(stage: Path, save: Callable[[Path], None], step: int, accuracy: float) -> None:
    """Replaces `best/`. Every rank calls it.

    Args:
        stage: The stage's folder.
        save: Writes the student of now into a folder that exists; every rank calls it.
        step: Optimizer steps of the stage so far.
        accuracy: Measured now, in [0, 1].

    Raises:
        UserError: Another process has taken the run over.
    """
    on_main(partial(check_lock, stage))
    temporary = stage / f"{FOLDER}.tmp"
    if is_main():
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    wait_for_all()
    save(temporary)
    wait_for_all()
    on_main(partial(write_json, temporary / RECORD_FILE, {"step": step, "accuracy": accuracy}))
    if is_main():
        shutil.rmtree(stage / FOLDER, ignore_errors=True)
        os.replace(temporary, stage / FOLDER)
    wait_for_all()


def read_best(folder: Path) -> dict | None:
    """`step` and `accuracy` of the best student of a stage or a checkpoint; None without one."""
    path = folder / FOLDER / RECORD_FILE
    return json.loads(path.read_text()) if path.exists() else None


def copy_best(source: Path | None, target: Path) -> None:
    """Makes the `best/` of one folder that of another; one without, or None, takes it away."""
    if source is not None and (source / FOLDER).is_dir():
        _link_tree(source / FOLDER, target / FOLDER)
    else:
        shutil.rmtree(target / FOLDER, ignore_errors=True)


def adopt_best(stage: Path) -> None:
    """Makes the best student the stage's own: model, mask and the state the next stage reads."""
    for path in stage.glob("sparsity-*.safetensors"):
        path.unlink()
    for path in (stage / FOLDER).iterdir():
        if path.is_dir():
            _link_tree(path, stage / path.name)
        elif path.name != RECORD_FILE:
            temporary = stage / f"{path.name}.tmp"
            temporary.unlink(missing_ok=True)
            _link(str(path), str(temporary))
            os.replace(temporary, stage / path.name)
            temporary.unlink(missing_ok=True)  # rename does nothing between links to one file


def _link_tree(source: Path, target: Path) -> None:
    with replaced_folder(target) as temporary:
        shutil.copytree(source, temporary, copy_function=_link, dirs_exist_ok=True)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
