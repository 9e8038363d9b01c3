"""No file of a checkpoint runs code when it is loaded.

Optimizer, scheduler and random states are pickles, and a pickle can call any function. torch loads
them as plain data (`weights_only`) unless the caller asks otherwise, as DeepSpeed does; an
environment variable overrules it for the whole process. What torch does not take for data is then
refused: DeepSpeed's own few classes, declared safe here, excepted.

`refuse_code` looks before anything is loaded, so that all ranks end with one message: it lists the
names in each pickle without running it. That is a courtesy; what protects is the loading itself.

Left out: `training_args.bin`, which transformers writes and nothing reads.
"""

import os
import pickle
from pathlib import Path

import torch
from transformers.trainer_pt_utils import safe_globals

from pipeline.errors import UserError

SUFFIXES = {".bin", ".pt", ".pth"}
NEVER_READ = "training_args.bin"


def force_safe_loading() -> None:
    """Makes every `torch.load` of this process, and of its children, one of plain data."""
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    os.environ.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None)


def allow_deepspeed() -> None:
    """Declares safe what DeepSpeed's checkpoints hold besides tensors and numbers."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    torch.serialization.add_safe_globals(
        [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]
    )


def refuse_code(checkpoint: Path) -> None:
    """Refuses a checkpoint with a pickle that is more than data.

    Args:
        checkpoint: Of any layout; nothing in it is loaded.

    Raises:
        UserError: Names the file and what it would call.
    """
    for path in sorted(checkpoint.rglob("*")):
        if path.suffix not in SUFFIXES or path.name == NEVER_READ:
            continue
        try:
            with safe_globals():  # numpy's random state
                names = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
        except (ValueError, RuntimeError, EOFError, IndexError, pickle.UnpicklingError):
            names = ["something torch.save does not write"]
        if names:
            raise UserError(
                f"--output_dir: {path} holds {', '.join(names[:3])}, which is code and not a "
                f"trainer's state, so nothing of {checkpoint.name} was loaded; delete that folder "
                "to go on from the checkpoint before it"
            )
