"""The teacher term as a reward and over the vocabulary, against textbook versions in fp64."""

import math

import pytest
import torch
from torch.nn import functional as F

from rewards.teacher_kl import merge_rest, sequence_rewards, vocabulary_kl


def distributions(num, vocab_size, *, seed, spread=3.0):
    logits = torch.randn(
        num, vocab_size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    return (spread * logits).log_softmax(-1)


def test_sequence_rewards_by_hand():
    student = torch.tensor([[-1.0, -2.0, -0.5], [-1.0, -9.0, 0.0]])
    teacher = torch.tensor([[-3.0, -1.0, -0.5], [-0.5, -1.0, -7.0]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    got = sequence_rewards(student, teacher, mask, clip=3.0)
    # -(2 - 1 + 0) / 3 and -(-0.5 - 3) / 2: -8 nats are clipped, and padding is no token.
    torch.testing.assert_close(got, torch.tensor([-1 / 3, 1.75]))


def test_sequence_reward_rises_with_a_token_the_teacher_likes_and_does_not_grow_with_length():
    student, teacher = -torch.ones(2, 4), -2 * torch.ones(2, 4)
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0]])
    before = sequence_rewards(student, teacher, mask, clip=5.0)
    assert before.tolist() == [-1.0, -1.0]
    teacher[0, 2] += 0.25
    after = sequence_rewards(student, teacher, mask, clip=5.0)
    assert (after - before).tolist() == pytest.approx([0.25 / 4, 0.0])


def test_sequence_rewards_without_difference_tokens_or_meaning():
    same = torch.tensor([[-1.0, -2.0], [-3.0, -math.inf]])
    mask = torch.tensor([[1, 1], [1, 0]])
    assert sequence_rewards(same, same.clone(), mask, clip=5.0).tolist() == [0.0, 0.0]
    teacher = torch.tensor([[-1.0, -2.0], [-3.5, math.nan]])
    assert sequence_rewards(same, teacher, mask, clip=5.0).tolist() == [0.0, -0.5]
    assert sequence_rewards(same, teacher, torch.zeros(2, 2), clip=5.0).tolist() == [0.0, 0.0]


def test_vocabulary_kl_is_torchs():
    student, teacher = distributions(6, 11, seed=0), distributions(6, 11, seed=1)
    options = {"reduction": "none", "log_target": True}
    forward = F.kl_div(student, teacher, **options).sum(-1)
    reverse = F.kl_div(teacher, student, **options).sum(-1)
    torch.testing.assert_close(vocabulary_kl(student, teacher, "forward"), forward)
    torch.testing.assert_close(vocabulary_kl(student, teacher, "reverse"), reverse)
    assert (forward - reverse).abs().max() > 0.1
    assert vocabulary_kl(student, student, "forward").tolist() == [0.0] * 6


def test_forward_kl_pulls_by_the_difference_of_probabilities():
    logits = torch.randn(4, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    teacher = distributions(4, 7, seed=1).requires_grad_()
    logits.requires_grad_()
    vocabulary_kl(logits.log_softmax(-1), teacher, "forward").sum().backward()
    torch.testing.assert_close(logits.grad, logits.detach().softmax(-1) - teacher.detach().exp())
    assert teacher.grad is None


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_merging_bounds_the_kl_from_below_and_is_exact_for_a_rest_of_one(direction):
    student, teacher = distributions(50, 9, seed=2), distributions(50, 9, seed=3)
    whole = vocabulary_kl(student, teacher, direction)
    last = torch.zeros(50, dtype=torch.float64)
    for k in range(1, 9):
        indices = teacher.topk(k).indices
        merged = [merge_rest(log_probs, indices) for log_probs in (student, teacher)]
        bound = vocabulary_kl(*merged, direction)
        assert (bound >= last - 1e-12).all(), "more buckets see more of the difference"
        assert (bound <= whole + 1e-12).all()
        last = bound
    torch.testing.assert_close(last, whole)
    cut = vocabulary_kl(*(log_probs[:, :3] for log_probs in merged), direction)
    assert ((cut < 0) | (cut > whole)).any(), "without the rest it is neither a KL nor a bound"


def test_merge_rest_keeps_the_order_and_a_tiny_rest():
    probabilities = torch.tensor([[0.5, 0.2, 0.3 - 3e-12, 1e-12, 2e-12]], dtype=torch.float64)
    got = merge_rest(probabilities.log().float(), torch.tensor([[2, 0, 1]])).exp()
    expected = torch.tensor([[0.3, 0.5, 0.2, 3e-12]])
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=0.0)
