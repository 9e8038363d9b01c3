"""The sparsity bonus: a right answer is worth more under a sparser mask.

    completion   bonus = weight * s   if it is right and was sampled under a mask of sparsity s
                         0            if it is wrong
    mask         bonus = weight * accuracy * s, the mean of the above over its completions

Gated by correctness, or the sparsest mask would win with nothing but noise. In a group whose
completions all come from one mask s is the same for all, so the bonus is a constant times
correctness, which `scale_rewards` divides away again: there it cannot act. It acts where masks are
compared: in the choice between candidate masks, and in groups sampled under two of them.
"""

import torch
from torch import Tensor


def sparsity_bonuses(correct: Tensor, sparsity: Tensor | float, weight: float) -> Tensor:
    """The bonus of each completion.

    Args:
        correct: Bool (B,), whether the verifier gave full marks.
        sparsity: Of the mask each was sampled under, (B,) or one for all, in [0, 1].
        weight: Reward per unit of sparsity.

    Returns:
        fp32 (B,), in units of reward.
    """
    return weight * correct.float() * torch.as_tensor(sparsity, device=correct.device).float()
