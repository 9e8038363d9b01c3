"""Runs of each stage that are stopped and resumed under ZeRO, inside a rank."""

import pickle
from pathlib import Path

import pytest
import torch
from torch import distributed as dist

from pipeline.errors import UserError
from pipeline.training.safe_loading import refuse_code
from tests.distributed.grpo_jobs import deepspeed_arguments, forget_engine
from tests.unit.resumable_runs import differences, run
from tests.unit.test_safe_loading import Planted

STOP = 3
"""In the middle of a generation batch of grpo."""


def stop_and_resume(rank, world_size, layout, stage, folder) -> list[str]:
    """What differs between a straight run and one resumed after `STOP`."""
    folder = Path(folder)
    options = {"world_size": world_size, **deepspeed_arguments(layout)}
    forget_engine()
    straight = run(stage, folder / "run", folder / f"prune-{rank}", save_steps=STOP, **options)
    forget_engine()
    checkpoint = folder / "run" / f"checkpoint-{STOP}"
    again = folder / "again", folder / f"prune-{rank}", checkpoint
    resumed = run(stage, *again, save_strategy="no", **options)
    forget_engine()
    return differences(straight, resumed)


def load_planted(rank, world_size, layout, stage, folder) -> bool:
    """Loads what `stop_and_resume` saved, with code planted in each rank's optimizer state.

    Returns:
        Whether the code ran.
    """
    folder = Path(folder)
    checkpoint = folder / "run" / f"checkpoint-{STOP}"
    refuse_code(checkpoint)
    dist.barrier()
    if rank == 0:
        for path in checkpoint.rglob("*optim_states.pt"):
            torch.save({"optimizer_state_dict": Planted(folder / "ran")}, path)
    dist.barrier()
    with pytest.raises(UserError, match=r"optim_states\.pt holds .*pathlib"):
        refuse_code(checkpoint)
    options = {"world_size": world_size, **deepspeed_arguments(layout)}
    with pytest.raises(pickle.UnpicklingError):
        run(stage, folder / "third", folder / f"prune-{rank}", checkpoint, **options)
    forget_engine()
    return (folder / "ran").exists()
