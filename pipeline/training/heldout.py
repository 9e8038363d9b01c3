"""Held-out accuracy while a stage trains: measured, logged, the best student kept, an early end.

Every `every_steps` optimizer steps, and at the stage's end, the student answers the probe prompts
greedily. The test prompts stay unseen, so choosing by this accuracy does not flatter the report.

The best student is the one with the highest accuracy among the measurements under the final
sparsity; of equals the latest. An earlier student has more weights, and is no result.

With `patience` the stage ends after that many measurements in a row without a higher accuracy,
counted from the first one under its last mask: a schedule that is not done never ends early. The
learning rate of a stage ended early is wherever `lr_scheduler_type` had brought it by then: one
that falls to 0 over `max_steps` has not fallen, and the last student may be noisier than the one of
the whole stage. The best student is kept, and a constant rate does not have the question.

A checkpoint carries the measurements and the best student so far.
"""

import json
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from transformers import Trainer, TrainerCallback, TrainerControl

from pipeline.artifacts import write_json
from pipeline.ranks import is_main, on_main, wait_for_all
from pipeline.training.best_student import copy_best, read_best, write_best

KEY = "heldout_accuracy"
"""In the log."""
FILE = "heldout.json"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Measurement:
    """One look at the probe prompts."""

    step: int
    """Optimizer steps of the stage so far."""
    accuracy: float
    """Fraction of right greedy answers, in [0, 1]."""
    is_last_mask: bool
    """Whether the stage's schedule was done."""
    is_final_sparsity: bool
    """Whether the mask had `prune.sparsity`."""


def stale_measurements(measurements: list[Measurement]) -> int:
    """Measurements under the last mask since the one with the highest accuracy, the first of it."""
    counted = [found.accuracy for found in measurements if found.is_last_mask]
    return len(counted) - 1 - counted.index(max(counted)) if counted else 0


class HeldoutCallback(TrainerCallback):
    """Measures, logs, keeps the best and ends the stage early; the last callback of a step."""

    def __init__(
        self,
        trainer: Trainer,
        *,
        folder: Path,
        every_steps: int,
        patience: int | None,
        measure: Callable[[], float],
        save: Callable[[Path], None],
    ):
        """Adds to a `SparseTrainer`.

        Args:
            trainer: It has its sparsity already.
            folder: The stage's.
            every_steps: Optimizer steps between two measurements.
            patience: Measurements without a better one that end the stage; None never does.
            measure: Accuracy in [0, 1], the same on every rank, all of which call it. It leaves
                model and random state as they were.
            save: Writes the student of now into a folder; every rank calls it.
        """
        self.trainer = trainer
        self.folder = folder
        self.every_steps = every_steps
        self.patience = patience
        self.measure = measure
        self.save = save
        self.measurements: list[Measurement] = []

    @property
    def is_over(self) -> bool:
        """Whether the stage ends early."""
        return self.patience is not None and stale_measurements(self.measurements) >= self.patience

    def on_step_end(self, args, state, control, **kwargs):
        """Measures when it is time, and at the last step."""
        is_last = state.global_step >= state.max_steps
        if state.global_step % self.every_steps and not is_last:
            return
        sparsity = self.trainer.sparsity
        found = Measurement(
            state.global_step, self.measure(), sparsity.is_last_mask, sparsity.is_final_sparsity
        )
        self.measurements.append(found)
        self._log(found, control)
        best = on_main(partial(read_best, self.folder))
        if found.is_final_sparsity and (best is None or found.accuracy >= best["accuracy"]):
            write_best(self.folder, self.save, found.step, found.accuracy)
        if self.is_over and not is_last:
            logger.info(
                "%s: ends at step %d of %d: nothing better within evaluate.patience, %d",
                sparsity.sparsity.stage,
                state.global_step,
                state.max_steps,
                self.patience,
            )
            control.should_training_stop = True
            control.should_save = args.save_strategy == "steps"

    def _log(self, found: Measurement, control: TrainerControl) -> None:
        is_due = control.should_log
        Trainer.log(self.trainer, {KEY: found.accuracy})  # TRL's own would empty its metrics
        control.should_log = is_due  # a log of the same step would be left out
        logger.info(
            "%s: step %d: held-out accuracy %.4f at sparsity %.4f",
            self.trainer.sparsity.sparsity.stage,
            found.step,
            found.accuracy,
            self.trainer.sparsity.measured,
        )

    def keep(self, checkpoint: Path) -> None:
        """Adds the measurements and the best student to a checkpoint. Every rank calls it."""

        def write() -> None:
            write_json(checkpoint / FILE, [asdict(found) for found in self.measurements])
            copy_best(self.folder, checkpoint)

        on_main(write)

    def resume(self, checkpoint: Path | None) -> None:
        """Takes them from a checkpoint; None begins anew. Every rank calls it."""
        self.measurements = []
        if checkpoint is not None and (checkpoint / FILE).exists():
            entries = json.loads((checkpoint / FILE).read_text())
            self.measurements = [Measurement(**entry) for entry in entries]
        if is_main():
            copy_best(checkpoint, self.folder)
        wait_for_all()
