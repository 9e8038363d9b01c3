"""Movement: what training does to each weight, read inside the optimizer step.

A weight is either kept or pruned, so one accumulator S serves both. Each step

    S <- d S + observation,   d = 2^(-1 / half-life)

so that an observation counts half after `half_life_steps`. Kept and pruned observations have
different units and are never ranked against each other. S is set to 0 when a weight changes side.

The gradient g is the one the optimizer sees: averaged over ranks, unscaled, and clipped by
c = min(1, max_norm / |g|), where the norm includes the gradients of pruned weights, which do not
train. A step that is clipped counts c times as much in `gradient` and `negative_gradient`, and c^2
times in `squared`;
`displacement` and `proposed` read what the optimizer makes of it, and Adam's update hardly changes
when all gradients of many steps are scaled alike.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

KEPT_OBSERVATIONS = ("gradient", "squared", "displacement")
PRUNED_OBSERVATIONS = ("proposed", "negative_gradient")
DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True, kw_only=True)
class MovementRule:
    """What is observed, for how long it counts, and how it is stored."""

    kept: str = "gradient"
    """One of `KEPT_OBSERVATIONS`."""
    pruned: str = "proposed"
    """One of `PRUNED_OBSERVATIONS`."""
    half_life_steps: float
    """After how many optimizer steps an observation counts half."""
    dtype: torch.dtype = torch.float32
    """fp32: 4 bytes a weight. bf16: 2 bytes, rounded stochastically (`stochastic.py`)."""

    def __post_init__(self):
        """Checks the values.

        Raises:
            ValueError: One is unknown, or the two do not go together.
        """
        for key, known in (("kept", KEPT_OBSERVATIONS), ("pruned", PRUNED_OBSERVATIONS)):
            if getattr(self, key) not in known:
                raise ValueError(
                    f"movement.{key}: {getattr(self, key)!r} is unknown; set one of "
                    + ", ".join(known)
                )
        if not self.half_life_steps > 0:
            raise ValueError(
                f"movement.half_life_steps: {self.half_life_steps} forgets everything at once; "
                "set more than 0"
            )
        if self.dtype not in DTYPES:
            raise ValueError(f"movement.dtype: {self.dtype}; set float32 or bfloat16")
        if self.kept == "displacement" and self.dtype == torch.bfloat16:
            raise ValueError(
                "movement.dtype: bfloat16: 'displacement' is a difference of two magnitudes, of "
                "which bf16 keeps nothing; set float32, or movement.kept: gradient"
            )

    @property
    def decay(self) -> float:
        """The factor d by which the accumulator shrinks each step."""
        return 0.5 ** (1.0 / self.half_life_steps)


def observe_gradient(movement: Tensor, weight: Tensor, gradient: Tensor) -> None:
    """Kept weights, before the update: S += -g w.

    Positive when the gradient pushes the weight away from zero; to first order the loss that
    setting it to zero would cost. Sanh et al. 2020, arXiv 2005.07683, eq. 3 and 4, where S is the
    sum over training (with a learning rate of its own, constant here). A pruned weight is 0 and
    adds nothing. All tensors fp32 (n,); in place.
    """
    movement.addcmul_(gradient, weight, value=-1.0)


def observe_squared(movement: Tensor, product: Tensor) -> None:
    """Kept weights, before the update: S += (g w)^2.

    To first order the square of the loss that setting the weight to zero would cost, batch by batch
    (Molchanov et al. 2019, arXiv 1906.10771, eq. 8), and w^2 times the diagonal of the empirical
    Fisher matrix, the cost to second order (LeCun et al. 1989, "Optimal Brain Damage"). Unlike the
    signed sum of `observe_gradient` it stays where a weight has come to rest: there -g*w has mean
    zero, and its square still says how much the loss depends on the weight. A pruned weight is 0
    and adds nothing. `product` is g w; both tensors fp32 (n,), in place.
    """
    movement.addcmul_(product, product)


def subtract_magnitude(movement: Tensor, magnitude: Tensor) -> None:
    """Kept weights, `displacement`, first half, before the update: S -= |w|.

    Together with `add_magnitude` S += |w after| - |w before|: how far the step moved the weight
    along sign(w), away from zero if positive. The criterion "magnitude increase" of Zhou et al.
    2019, arXiv 1905.01067, section 2, with a half-life. A weight that crosses zero from a to -b
    counts b - a, not its path b + a.

    No copy of w is kept between the halves, so S passes through S - |w|, and a step leaves an
    error of up to 2^-24 (|S| + |w|) in each half: 1e-9 at |w| = 0.01, a thousandth of an update of
    1e-6. All tensors fp32 (n,); in place.
    """
    movement.sub_(magnitude)


def add_magnitude(movement: Tensor, magnitude: Tensor) -> None:
    """Kept weights, `displacement`, second half, after the update and the mask: S += |w|."""
    movement.add_(magnitude)


def observe_proposed(movement: Tensor, proposed: Tensor, learning_rate: float) -> None:
    """Pruned weights, after the update and before the mask: S += dw / lr.

    A pruned weight was 0, so what the optimizer made of it is its proposed update dw (weight decay
    has no part in it). In units of the learning rate, so that a schedule does not weigh steps. Its
    moments are kept for this purpose: under Adam S is how persistently training wants the weight,
    and in which direction. Ours; its gradient twin is `observe_negative_gradient`. A learning rate
    of 0 proposes nothing.

    Args:
        movement: fp32 (n,), in place.
        proposed: fp32 (n,) the update of pruned weights, 0 for kept ones.
        learning_rate: Of this step.
    """
    if learning_rate > 0.0:
        movement.add_(proposed, alpha=1.0 / learning_rate)


def observe_negative_gradient(movement: Tensor, gradient: Tensor) -> None:
    """Pruned weights, before the update: S += -g.

    Its magnitude is the growth criterion of RigL (Evci et al. 2020, arXiv 1911.11134, section 3,
    step 4), accumulated as in sparse momentum (Dettmers & Zettlemoyer 2019, arXiv 1907.04840,
    section 3). Signed: a gradient that only flickers cancels.

    Args:
        movement: fp32 (n,), in place.
        gradient: fp32 (n,) of pruned weights, 0 for kept ones.
    """
    movement.sub_(gradient)
