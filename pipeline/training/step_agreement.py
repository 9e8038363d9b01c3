"""What all ranks agree on after each optimizer step: to save by the clock, to save and stop.

Clocks of ranks differ and signals reach them at different steps, but a checkpoint is written by all
of them. So they ask each other: one small all-reduce on the CPU.
"""

import time

from transformers import TrainerCallback

from pipeline.ranks import any_rank, is_main
from pipeline.stopping import requested


class StepAgreement(TrainerCallback):
    """Asks for a checkpoint when the last one is old enough, or any rank was asked to stop."""

    stops = False
    """Whether training ended because it was asked to."""

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
        is_due, self.stops = any_rank(is_due, requested() is not None)
        if is_due or self.stops:
            control.should_save = True
        if self.stops:
            control.should_training_stop = True

    def on_save(self, args, state, control, **kwargs):
        """Starts the clock anew, whatever the checkpoint was due to."""
        self._saved = time.monotonic()
