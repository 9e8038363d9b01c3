"""Which of several masks to train on: rewards verified on the probe prompts, compared in pairs.

The reward of a mask is what `rewards` says of the student under it, in units of reward:

    R = w_c accuracy + w_s accuracy sparsity + w_t mean log p_student(teacher's completion)

w_c is the weight of `correctness` in the mix (1 where the mix has none), w_s
`rewards.sparsity_weight`, w_t `rewards.teacher_kl_weight`. Accuracy is of greedy answers. The last
mean is in nats per token over verified completions of the teacher; it is -KL(teacher || student) on
them up to the teacher's own entropy, which is the same for every mask and leaves no difference.

Noise is larger than what masks differ by, so differences count only where they are shown: with R as
a mean over prompts, the 95 % interval of the mean paired difference (Bonett and Price, see
`evaluation/intervals.py`) decides.

    refused     R(proposal) - R(present) is shown to be below -tolerance x w_c
    bound       of the others the sparsest, unless it is shown to have less reward than the best;
                at equal sparsity the one with more
    kept        the present mask, where all are refused

So a proposal need not be shown to be harmless, which would take more prompts than a run can ask:
where a tenth of the answers change and the tolerance is 0.02, 256 prompts show a loss of 6 points,
2,000 one of 3.5. Losses too small to be seen can add up, unless training repairs them: ten steps of
the bundled task made good 2 to 3 points, hence the default.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.evaluation.intervals import Interval, paired_reward_interval
from rewards.sparsity import sparsity_bonuses


@dataclass(frozen=True, eq=False)
class JudgedMask:
    """What the student did under a mask, on n probe prompts."""

    sparsity: float
    """Fraction of zeros among the prunable weights."""
    correct: Tensor
    """Bool (n,): whether each greedy answer is right."""
    log_probs: Tensor
    """(n,) nats per token of the teacher's completions; 0 where there is none."""
    has_completion: Tensor
    """Bool (n,)."""


@dataclass(frozen=True, kw_only=True)
class MaskReward:
    """The weights of the reward above."""

    correctness_weight: float = 1.0
    """Per unit of accuracy."""
    sparsity_weight: float = 0.0
    """Per unit of accuracy x sparsity."""
    teacher_kl_weight: float = 0.0
    """Per nat."""
    tolerance: float = 0.02
    """Accuracy that a new mask may lose, in [0, 1)."""

    def of_prompts(self, mask: JudgedMask) -> Tensor:
        """float64 (n,) rewards of a mask, prompt by prompt; R is their mean."""
        correct = mask.correct.double()
        bonus = sparsity_bonuses(mask.correct, mask.sparsity, self.sparsity_weight).double()
        reward = self.correctness_weight * correct + bonus
        num_completions = int(mask.has_completion.sum())
        if self.teacher_kl_weight == 0 or num_completions == 0:
            return reward
        share = len(correct) / num_completions
        nats = torch.where(mask.has_completion, mask.log_probs.double(), 0.0)
        return reward + self.teacher_kl_weight * share * nats

    def of(self, mask: JudgedMask) -> float:
        """R."""
        return self.of_prompts(mask).mean().item()

    def difference(self, first: JudgedMask, second: JudgedMask) -> Interval:
        """95 % interval of R(first) - R(second)."""
        differences = (self.of_prompts(first) - self.of_prompts(second)).tolist()
        sparsity = max(first.sparsity, second.sparsity)
        return paired_reward_interval(
            differences, abs(self.correctness_weight) + self.sparsity_weight * sparsity
        )


def choose_mask(
    present: JudgedMask, proposals: Sequence[JudgedMask], reward: MaskReward
) -> int | None:
    """The number of the proposal to bind, or None where the present mask is kept."""
    lowest = -reward.tolerance * abs(reward.correctness_weight)
    allowed = [
        index
        for index, proposal in enumerate(proposals)
        if reward.difference(proposal, present)[1] >= lowest  # False where a reward is NaN
        and math.isfinite(reward.of(proposal))
    ]
    if not allowed:
        return None
    best = max(allowed, key=lambda index: reward.of(proposals[index]))
    as_good = [
        index
        for index in allowed
        if index == best or reward.difference(proposals[index], proposals[best])[1] >= 0
    ]
    return max(as_good, key=lambda i: (proposals[i].sparsity, reward.of(proposals[i])))
