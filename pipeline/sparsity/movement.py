"""Movement: what training does to each weight, read inside the optimizer step.

A weight is either kept or pruned, so one fp32 accumulator serves both:

- kept: S <- d S - g w, the first-order score of movement pruning (Sanh et al. 2020,
  arXiv 2005.07683, eq. 3 and 4). g is the gradient the optimizer sees: averaged, unscaled and
  clipped.
- pruned: S <- d S + dw / lr, the update the optimizer proposes for it, in units of the learning
  rate. It shows where, and how persistently, training wants the weight to be.

d = 2^(-1 / half-life) forgets: an observation counts half after `half_life_steps`.
"""

from torch import Tensor


def decay_per_step(half_life_steps: float) -> float:
    """The factor d by which an accumulator shrinks each step."""
    return 0.5 ** (1.0 / half_life_steps)


def observe_kept(movement: Tensor, weight: Tensor, gradient: Tensor, decay: float) -> None:
    """Before the update: decays the accumulator and adds -g*w, in place.

    A pruned weight is 0, so this adds nothing to it. All tensors have the weight's shape.
    """
    movement.mul_(decay).addcmul_(gradient, weight, value=-1.0)


def observe_pruned(movement: Tensor, weight: Tensor, mask: Tensor, learning_rate: float) -> None:
    """After the update, before the mask: adds what the optimizer proposed for pruned weights.

    A pruned weight was 0 before the update, so its value now is the proposal. A learning rate of 0
    proposes nothing.
    """
    if learning_rate > 0.0:
        movement.add_(weight.masked_fill(mask, 0.0), alpha=1.0 / learning_rate)
