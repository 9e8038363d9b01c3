"""Candidates of the allocation search: one level per matrix, their zeros always the target's.

Level k of matrix i, with n_i weights, keeps more than the target's share of them for k > 0:

    rate_i(k) = S - k * STEP * min(S, 1 - S) * u_i * n_min / n_i,   u_i = floor(n_i / n_min)

So a level is worth u_i equal units of kept weights, and the weighted mean of the rates is S where
sum_i k_i u_i = 0. A mutant keeps that sum: it moves a matrix by one level and others the other way.
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

STEP = 0.3
"""Kept weights of one level, relative to the smaller of the target's kept and pruned share."""
LEVELS = range(-3, 5)
"""Levels of a matrix; 0 is uniform."""
MAX_EXCHANGES = 3
"""Exchanges of a mutant, fewer more often."""

Candidate = tuple[int, ...]
"""The level of every matrix, in model order."""


@dataclass(frozen=True)
class LevelSpace:
    """The levels of every matrix and what they are worth."""

    names: list[str]
    """Weight names, in model order."""
    units: list[int]
    """Units of kept weights that a level of each matrix is worth."""
    rates: list[dict[int, float]]
    """Level to sparsity in [0, 1) of each matrix; level 0 alone where the target is 0."""

    @classmethod
    def around(cls, weights: Mapping[str, Tensor], sparsity: float) -> "LevelSpace":
        """Levels around the same sparsity for all, in [0, 1)."""
        assert 0.0 <= sparsity < 1.0
        sizes = [weight.numel() for weight in weights.values()]
        units = [size // min(sizes) for size in sizes]
        unit = STEP * min(sparsity, 1.0 - sparsity) * min(sizes)
        rates = []
        for size, number in zip(sizes, units, strict=True):
            own = {level: sparsity - level * unit * number / size for level in LEVELS}
            rates.append({k: rate for k, rate in own.items() if k == 0 or 0.0 <= rate != sparsity})
        return cls(list(weights), units, rates)

    @property
    def uniform(self) -> Candidate:
        """The candidate that prunes every matrix alike."""
        return (0,) * len(self.names)

    def rates_of(self, candidate: Candidate) -> dict[str, float]:
        """Weight name to sparsity."""
        return {
            name: own[level]
            for name, own, level in zip(self.names, self.rates, candidate, strict=True)
        }

    def mutant(self, parent: Candidate, rng: random.Random) -> Candidate | None:
        """A candidate some exchanges away; None where the draw finds no balance."""
        levels = list(parent)
        for _ in range(min(rng.randint(1, MAX_EXCHANGES), rng.randint(1, MAX_EXCHANGES))):
            sign = rng.choice((-1, 1))
            first = self._move(levels, sign, max(self.units), rng)
            owed = 0 if first is None else self.units[first]
            while owed:
                moved = self._move(levels, -sign, owed, rng)
                if moved is None:
                    return None
                owed -= self.units[moved]
        return tuple(levels)

    def _move(self, levels: list[int], sign: int, max_units: int, rng: random.Random) -> int | None:
        """Moves a matrix worth at most `max_units` by one level, in place; returns which."""
        movable = [
            i
            for i, (level, unit) in enumerate(zip(levels, self.units, strict=True))
            if unit <= max_units and level + sign in self.rates[i]
        ]
        if not movable:
            return None
        moved = rng.choice(movable)
        levels[moved] += sign
        return moved
