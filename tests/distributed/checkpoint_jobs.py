"""Checkpoints that several ranks write and read together, inside a rank."""

from pathlib import Path

from pipeline.errors import UserError
from pipeline.lock import LOCK_FILE, release_lock, take_lock
from pipeline.ranks import any_rank, is_main, wait_for_all
from pipeline.training.best_student import write_best
from pipeline.training.checkpoint import new_checkpoint, newest_whole_checkpoint


def save(rank, world_size, stage, steps):
    """Each rank writes a file of its own into every checkpoint."""
    for step in steps:
        with new_checkpoint(Path(stage), step, 2) as folder:
            (folder / f"rank-{rank}").write_bytes(bytes([rank]) * 1000)


def newest(rank, world_size, stage):
    """What this rank resumes from."""
    found = newest_whole_checkpoint(Path(stage))
    return found and found.name


def agree(rank, world_size, flags):
    """`flags`: of each rank."""
    return any_rank(*flags[rank])


def save_checkpoint(stage, fill):
    """The first."""
    with new_checkpoint(stage, 1, None) as folder:
        fill(folder)


def save_best(stage, fill):
    """The best student of the first step."""
    write_best(stage, fill, 1, 0.5)


def save_without_the_lock(rank, world_size, run):
    """What this rank is told of each save whose lock was lost before it, or meanwhile."""
    lock, told = Path(run, LOCK_FILE), []

    def lose(folder=None):
        if is_main():
            lock.unlink(missing_ok=True)
        wait_for_all()

    for save in (save_checkpoint, save_best):
        for is_early in (True, False):
            owner = take_lock(lock.parent) if is_main() else None
            if is_early:
                lose()
            try:
                save(lock.parent / "grpo", lose)
            except UserError as error:
                told.append(str(error))
            if is_main():
                release_lock(lock.parent, owner)
    return told
