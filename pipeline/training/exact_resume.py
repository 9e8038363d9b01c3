"""What a resumed run needs besides transformers' state to be the same run, bit for bit.

transformers restores weights, optimizer, scheduler and each rank's random states, and skips the
batches that were used. Two things of TRL's are lost, and kept here:

    buffer  completions of a generation batch that later steps train on, where steps_per_generation
            is above gradient_accumulation_steps or num_iterations above 1, and the count of
            micro-steps that says where in it training stands; in `generation-RANK.pt`
    order   of prompts from the second pass over them on: TRL's sampler draws each pass from one
            generator, which a resumed run begins anew, so the draws of earlier passes are repeated

The buffer is this rank's: under another number of ranks its batch is sampled anew
(`topology_change.py`). Left out: sums that only the log shows, which begin anew.
"""

from pathlib import Path

import torch
from torch.utils.data import Sampler
from transformers import Trainer

from pipeline.ranks import rank

FILE_NAME = "generation-{rank:05d}.pt"


def save_buffer(trainer: Trainer, checkpoint: Path) -> None:
    """Writes this rank's buffer and count, where the trainer generates. Every rank calls it."""
    if hasattr(trainer, "_buffered_inputs"):
        state = {
            "step": trainer._step,
            "accumulation": trainer.args.gradient_accumulation_steps,
            "buffer": trainer._buffered_inputs,
        }
        if trainer._step % generate_every(trainer) == 0:
            state["buffer"] = None
        torch.save(state, checkpoint / FILE_NAME.format(rank=rank()))


def load_buffer(trainer: Trainer, checkpoint: Path, *, sample_anew: bool = False) -> None:
    """Puts back what `save_buffer` wrote. Every rank calls it.

    Args:
        trainer: Before its training begins.
        checkpoint: Resumed from.
        sample_anew: Leave the buffer, and count micro-steps as this run accumulates them.
    """
    if not hasattr(trainer, "_buffered_inputs"):
        return
    device = trainer.accelerator.device
    state = torch.load(
        checkpoint / FILE_NAME.format(rank=0 if sample_anew else rank()),
        map_location="cpu" if device.type == "cpu" else device,  # torch knows no cpu:0 here
        weights_only=True,
    )
    if sample_anew:
        accumulation = trainer.args.gradient_accumulation_steps
        trainer._step = state["step"] * accumulation // state["accumulation"]
    else:
        trainer._step, trainer._buffered_inputs = state["step"], state["buffer"]


def generate_every(trainer: Trainer) -> int:
    """Micro-steps from one generation to the next, as TRL counts them."""
    if hasattr(trainer, "num_iterations"):  # GRPO; distillation generates for each optimizer step
        return trainer.args.steps_per_generation * trainer.num_iterations
    return trainer.args.gradient_accumulation_steps


def repeat_draws(sampler: Sampler, num_passes: int) -> None:
    """Brings TRL's `RepeatSampler` to where it is after passes over the data; others know it."""
    if hasattr(sampler, "repeat_count") and sampler.shuffle:
        for _ in range(num_passes):
            torch.randperm(sampler.num_samples, generator=sampler.generator)
