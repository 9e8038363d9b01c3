"""When the mask is refined, and how sparse it is then.

Sparsity rises by the cubic schedule of gradual pruning (Zhu & Gupta 2017, arXiv 1710.01878, eq. 1);
the fraction of weights that regrow falls by a cosine to zero (RigL, arXiv 1911.11134,
section 3), so that the last mask is trained.
"""

import math
from dataclasses import dataclass


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

    def regrow_fraction_at(self, step: int) -> float:
        """Weights that regrow / kept weights: a/2 (1 + cos(pi progress)), 0 at the end."""
        if step >= self.end_step:
            return 0.0
        return 0.5 * self.regrow_fraction * (1.0 + math.cos(math.pi * self._progress(step)))

    def _progress(self, step: int) -> float:
        if self.end_step <= self.begin_step:
            return 1.0 if step >= self.end_step else 0.0
        return min(1.0, max(0.0, (step - self.begin_step) / (self.end_step - self.begin_step)))
