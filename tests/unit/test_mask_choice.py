"""Which mask is bound: cases by hand."""

import pytest
import torch

from pipeline.evaluation.intervals import paired_difference_interval, paired_reward_interval
from pipeline.training.mask_choice import JudgedMask, MaskReward, choose_mask

N = 256


def mask(sparsity, num_right, log_prob=-0.1, first=0):
    """Right on `num_right` prompts from `first` on; every other prompt has a completion."""
    correct = torch.zeros(N, dtype=torch.bool)
    correct[first : first + num_right] = True
    has_completion = torch.arange(N) % 2 == 0
    log_probs = torch.where(has_completion, log_prob, 0.0)
    return JudgedMask(sparsity, correct, log_probs, has_completion)


def test_the_interval_of_rewards_is_that_of_answers_where_only_answers_count():
    generator = torch.Generator().manual_seed(0)
    for accuracy in (0.02, 0.5, 0.9):
        first = (torch.rand(50, generator=generator) < accuracy).tolist()
        second = (torch.rand(50, generator=generator) < accuracy + 0.05).tolist()
        differences = [float(a) - float(b) for a, b in zip(first, second, strict=True)]
        expected = paired_difference_interval(first, second)
        assert paired_reward_interval(differences, 1.0) == pytest.approx(expected)
        scaled = paired_reward_interval([3 * d for d in differences], 3.0)
        assert scaled == pytest.approx([3 * bound for bound in expected])


def test_the_reward_is_the_formula():
    reward = MaskReward(correctness_weight=2.0, sparsity_weight=0.5, teacher_kl_weight=0.3)
    found = reward.of(mask(0.8, 64, log_prob=-0.7))
    assert found == pytest.approx(2.0 * 0.25 + 0.5 * 0.25 * 0.8 - 0.3 * 0.7)
    assert MaskReward().of(mask(0.8, 64, log_prob=-0.7)) == 0.25


def test_noise_neither_refuses_a_mask_nor_makes_the_schedule_slower():
    present, full, half = mask(0.7, 200), mask(0.8, 196), mask(0.75, 201)
    assert choose_mask(present, [half, full], MaskReward()) == 1


def test_what_is_shown_to_lose_is_refused_and_half_a_step_may_be_allowed():
    present, full, half = mask(0.7, 200), mask(0.8, 150), mask(0.75, 198)
    assert choose_mask(present, [full, half], MaskReward()) == 1
    assert choose_mask(present, [full, mask(0.75, 160)], MaskReward()) is None
    assert choose_mask(present, [full], MaskReward(tolerance=0.3)) == 0, "tolerated"


def test_a_loss_in_log_probability_refuses_where_the_teacher_counts():
    present, worse = mask(0.7, 200, -0.1), mask(0.8, 200, -0.3)
    assert choose_mask(present, [worse], MaskReward()) == 0
    assert choose_mask(present, [worse], MaskReward(teacher_kl_weight=0.5)) is None


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_mask_that_breaks_the_model_is_refused(value):
    present, broken = mask(0.7, 0), mask(0.99, 0, value)
    assert choose_mask(present, [broken], MaskReward(teacher_kl_weight=0.5)) is None


def test_the_bonus_changes_which_mask_wins():
    present, full, half = mask(0.5, 200), mask(0.8, 170), mask(0.6, 200)
    arguments = {"tolerance": 0.2}
    assert choose_mask(present, [full, half], MaskReward(**arguments)) == 1
    assert choose_mask(present, [full, half], MaskReward(sparsity_weight=2.0, **arguments)) == 0


def test_at_equal_sparsity_the_higher_reward_wins():
    present = mask(0.7, 200)
    assert choose_mask(present, [mask(0.8, 199), mask(0.8, 201)], MaskReward()) == 1
    assert choose_mask(present, [mask(0.8, 201), mask(0.8, 199)], MaskReward()) == 0
