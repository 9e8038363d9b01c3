"""What all ranks agree on after each optimizer step: whether a checkpoint is due by the clock.

Clocks of ranks differ, and a checkpoint is written by all of them, so they ask each other; one
small all-reduce on the CPU.
"""

import time

from transformers import TrainerCallback

from pipeline.ranks import any_rank, is_main


class StepAgreement(TrainerCallback):
    """Asks for a checkpoint when the last one is old enough."""

    def __init__(self, save_minutes: float | None):
        """`save_minutes`: by rank 0's clock, since the last checkpoint; None leaves it to steps."""
        self.save_minutes = save_minutes
        self._saved = time.monotonic()

    def on_train_begin(self, args, state, control, **kwargs):
        """Starts the clock."""
        self._saved = time.monotonic()

    def on_step_end(self, args, state, control, **kwargs):
        """Agrees with the other ranks."""
        minutes = (time.monotonic() - self._saved) / 60
        is_due = self.save_minutes is not None and minutes >= self.save_minutes and is_main()
        (is_due,) = any_rank(is_due)
        if is_due:
            control.should_save = True

    def on_save(self, args, state, control, **kwargs):
        """Starts the clock anew, whatever the checkpoint was due to."""
        self._saved = time.monotonic()
