"""One linear layer at a time: from its input statistics to its mask and its new weight.

Methods that rank weights choose a mask by score, and a redistribution says what the kept weights
become; under `admm` both happen in turns. Solvers (SparseGPT, ALPS) find mask and weights together:
under `none` their own weights stand, as in their papers; under `least_squares` only the mask is
used, and the kept weights are solved for from the dense ones.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline.pruning.admm import admm_mask
from pipeline.pruning.alps import alps_weight
from pipeline.pruning.criteria import criterion_scores
from pipeline.pruning.input_statistics import InputStatistics
from pipeline.pruning.least_squares import least_squares_weight, normal_equations
from pipeline.pruning.mama import ACTIVATION_POWER, movement_factors
from pipeline.pruning.redistribution import redistribute
from pipeline.pruning.sparsegpt import sparsegpt_weight
from pipeline.sparsity.threshold import masks_by_score

SOLVERS = {"sparsegpt": sparsegpt_weight, "alps": alps_weight}
ADMM_POWERS = {"magnitude": 0.0, "wanda": 1.0, "mama": ACTIVATION_POWER}
"""Power of the input's norm in the score of the methods that go with ADMM."""


@dataclass(frozen=True)
class MatrixPruner:
    """Prunes matrix by matrix; what competes is a matrix, its rows, or N:M groups."""

    method: str
    """One of `SOLVERS` or `CRITERIA`."""
    scope: str
    """`matrix`, `row` or `N:M`."""
    redistribution: str
    """`none`, `proportional`, `least_squares` or `admm`."""
    magnitude: bool = True
    """Whether `mama` uses the magnitude."""
    activation: bool = True
    """Whether `mama` uses activation norms."""
    movement: dict[str, Tensor] | None = None
    """Name to (out, in) calibration movement, on any device, for `mama`."""
    seed: int = 0
    """Of `random`."""

    @property
    def uses_activation(self) -> bool:
        """Whether the score looks at what the layer reads."""
        return self.method == "wanda" or (self.method == "mama" and self.activation)

    @property
    def needs(self) -> str:
        """The last of the statistics it looks at, one of `calibration.NEEDS`."""
        if self.redistribution != "none":
            return "cross_moment"
        return "second_moment" if self.method in SOLVERS else "input_norm"

    @property
    def needs_calibration(self) -> bool:
        """Whether it looks at statistics at all."""
        return self.needs != "input_norm" or self.uses_activation

    def __call__(
        self, name: str, module: nn.Linear, statistics: InputStatistics | None, sparsity: float
    ) -> tuple[Tensor, Tensor]:
        """Prunes one layer; changes nothing in place.

        Args:
            name: The weight's name.
            module: With its dense weight (out, in).
            statistics: Of its input, as far as `needs` says.
            sparsity: Fraction of zeros, in [0, 1).

        Returns:
            Mask (out, in) bool, True = kept; new weight (out, in), exactly 0 where pruned.
        """
        weight = module.weight.detach()
        moments = statistics
        if module.bias is not None and self.redistribution != "none":
            moments = statistics.centred
        if self.redistribution == "admm":
            return self._by_admm(name, weight, moments, sparsity)
        if self.method in SOLVERS:
            solve = SOLVERS[self.method]
            mask, new_weight = solve(weight, statistics, sparsity, self.scope, name)
            if self.redistribution == "none":
                return mask, new_weight
        else:
            mask = self._mask_by_score(name, weight, statistics, sparsity)
        return mask, redistribute(weight, mask, self.redistribution, moments)

    def _mask_by_score(
        self, name: str, weight: Tensor, statistics: InputStatistics | None, sparsity: float
    ) -> Tensor:
        norms = {name: statistics.input_norm} if self.uses_activation else None
        scores = criterion_scores(
            self.method, {name: weight}, norms, self.movement, self.seed, self.magnitude
        )
        return masks_by_score(scores, sparsity, self.scope, {name: weight})[name]

    def _by_admm(
        self, name: str, weight: Tensor, statistics: InputStatistics, sparsity: float
    ) -> tuple[Tensor, Tensor]:
        """ADMM whose projections compare by the method's score, then least squares."""
        power = ADMM_POWERS[self.method] if self.uses_activation else 0.0
        factors = None
        if self.method == "mama" and self.movement is not None:
            factors = movement_factors({name: self.movement[name].to(weight.device)})[name]
        equations = normal_equations(weight, statistics)
        mask = admm_mask(
            weight, *equations, sparsity, self.scope, name, power=power, multiplier=factors
        )
        new_weight = least_squares_weight(weight, mask, *equations)
        return mask, torch.where(mask, new_weight, 0.0).to(weight.dtype)
