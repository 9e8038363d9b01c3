"""When the mask is refined, and how sparse it is then.

Sparsity rises by the cubic schedule of gradual pruning (Zhu & Gupta 2017, arXiv 1710.01878, eq. 1);
the fraction of weights that regrow falls by a cosine to zero (RigL, arXiv 1911.11134,
section 3), so that the last mask is trained.

A schedule that waits (`Waiting`) lags behind the optimizer's steps: its position is the step minus
the steps waited so far. At a decision it may go on a whole stride, to where it would be on time
from now on, or half as far, or stand still; all later targets shift by what it did not go. Since a
stride that was too long once will be so again, strides halve after each standstill and double after
each whole one, up to the schedule's pace. Past `end_step` the mask is still refined every
`every_steps` until the last target is reached.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MAX_HALVINGS = 10
"""Of a stride: a thousandth of it changes next to nothing."""


@dataclass(frozen=True, kw_only=True)
class RefinementSchedule:
    """Refinements at `begin_step`, then every `every_steps`, and at `end_step`."""

    start_sparsity: float
    """Sparsity before `begin_step`, in [0, 1)."""
    final_sparsity: float
    """Sparsity from `end_step` on, in [0, 1)."""
    begin_step: int
    """First optimizer step after which the mask is refined."""
    end_step: int
    """Last one. Steps count across the stages that refine."""
    every_steps: int
    """Optimizer steps between two refinements."""
    regrow_fraction: float
    """Weights that regrow at `begin_step`, as a fraction of the kept ones."""

    def is_due(self, step: int) -> bool:
        """Whether the mask is refined after optimizer step `step` (the first step is 1)."""
        if not self.begin_step <= step <= self.end_step:
            return False
        return (step - self.begin_step) % self.every_steps == 0 or step == self.end_step

    def sparsity_at(self, step: int) -> float:
        """Target sparsity after step `step`: s_f + (s_0 - s_f) (1 - progress)^3."""
        remaining = 1.0 - self._progress(step)
        return self.final_sparsity + (self.start_sparsity - self.final_sparsity) * remaining**3

    def next_sparser(self, step: int, sparsity: float) -> int | None:
        """The first refinement due after `step` with at least this target; None if none has it."""
        later = range(max(step + 1, self.begin_step), self.end_step + 1)
        due = (s for s in later if self.is_due(s) and self.sparsity_at(s) >= sparsity)
        return next(due, None)

    def regrow_fraction_at(self, step: int) -> float:
        """Weights that regrow / kept weights: a/2 (1 + cos(pi progress)), 0 at the end."""
        if step >= self.end_step:
            return 0.0
        return 0.5 * self.regrow_fraction * (1.0 + math.cos(math.pi * self._progress(step)))

    def _progress(self, step: int) -> float:
        if self.end_step <= self.begin_step:
            return 1.0 if step >= self.end_step else 0.0
        return min(1.0, max(0.0, (step - self.begin_step) / (self.end_step - self.begin_step)))


@dataclass(frozen=True, kw_only=True)
class Waiting:
    """How far a schedule that waits has come."""

    schedule: RefinementSchedule
    waited: float = 0.0
    """Optimizer steps by which the targets are late."""
    decided_at: int | None = None
    """Step of the last decision; None: there was none yet."""
    halvings: int = 0
    """How often strides are halved."""

    @classmethod
    def after(
        cls, schedule: RefinementSchedule, decisions: Sequence[Mapping[str, Any]]
    ) -> "Waiting":
        """Goes on behind the last of some decisions: its `step`, `waited` and `halvings`.

        One of a stage that verified nothing has the step alone: it was on time.
        """
        if not decisions:
            return cls(schedule=schedule)
        last = decisions[-1]
        return cls(
            schedule=schedule,
            waited=last.get("waited", 0.0),
            decided_at=last["step"],
            halvings=last.get("halvings", 0),
        )

    @property
    def is_complete(self) -> bool:
        """Whether the last target is reached."""
        return self.decided_at is not None and self.position >= self.schedule.end_step

    @property
    def position(self) -> float:
        """Where in the schedule the present mask stands."""
        if self.decided_at is None:
            return self.schedule.begin_step
        return self.decided_at - self.waited

    def is_due(self, step: int) -> bool:
        """Whether a mask is chosen after optimizer step `step`."""
        schedule = self.schedule
        if step < schedule.begin_step or self.is_complete:
            return False
        on_grid = (step - schedule.begin_step) % schedule.every_steps == 0
        return on_grid or step - self.waited == schedule.end_step

    def ahead(self, step: int, halvings: int) -> float:
        """The position that a stride halved so many times leads to, after optimizer step `step`."""
        longest = min(step - self.waited, self.schedule.end_step) - self.position
        return self.position + longest / 2**halvings

    def decided(self, step: int, halvings: int | None) -> "Waiting":
        """After a decision at `step` for a stride halved so many times; None: to stand still."""
        position = self.position if halvings is None else self.ahead(step, halvings)
        if halvings is None:
            later = min(self.halvings + 1, MAX_HALVINGS)
        else:
            later = max(0, self.halvings - 1) if halvings == self.halvings else self.halvings
        return Waiting(
            schedule=self.schedule, waited=step - position, decided_at=step, halvings=later
        )
