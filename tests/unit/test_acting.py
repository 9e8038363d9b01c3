"""Which reward terms act, on batches small enough to work out on paper."""

import math

import pytest
import torch

from rewards.acting import ACTS, group_advantages, influences

CORRECT = torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0])
MASK = torch.ones(8, 3, dtype=torch.long)


def test_advantages_of_a_group_of_two_by_hand():
    rewards = torch.tensor([[1.0], [0.0], [3.0], [3.0]])
    got = group_advantages(rewards, [2.0], 2)
    half = 1.0 / (math.sqrt(2) + 1e-4)  # rewards 2 and 0: mean 1, sample deviation sqrt 2
    torch.testing.assert_close(got, torch.tensor([half, -half, 0.0, 0.0]))
    got = group_advantages(rewards, [2.0], 2, "none")
    torch.testing.assert_close(got, torch.tensor([1.0, -1.0, 0.0, 0.0]))


def test_advantages_of_a_group_of_four_by_hand():
    rewards = torch.tensor([[1.0, 0.0], [0.0, 0.4], [0.0, 0.8], [1.0, 0.0]])
    total = [1.0, 0.2, 0.4, 1.0]  # weights 1 and 0.5; mean 0.65
    centred = [0.35, -0.45, -0.25, 0.35]
    spread = math.sqrt(sum(c * c for c in centred) / 3)
    assert sum(total) / 4 == pytest.approx(0.65)
    expected = torch.tensor([c / (spread + 1e-4) for c in centred])
    torch.testing.assert_close(group_advantages(rewards, [1.0, 0.5], 4), expected)
    torch.testing.assert_close(group_advantages(rewards, [1.0, 0.5], 4, "batch"), expected)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_a_constant_and_a_multiple_do_not_act(scale):
    constant, multiple = torch.full((8,), 0.1), 0.7 * CORRECT  # 4 x 0.1 / 4 is not quite 0.1
    for other in (constant, multiple):
        found = influences(
            {"correctness": CORRECT, "bonus": other},
            {"correctness": 1.0, "bonus": 3.0},
            4,
            MASK,
            scale_rewards=scale,
        )
        assert 0 <= found["bonus"] < 1e-6
        assert (found["correctness"] == 1.0) == (other is constant)


def test_a_term_that_differs_inside_a_group_acts_by_its_angle():
    length = torch.tensor([0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    found = influences(
        {"correctness": CORRECT, "length": length},
        {"correctness": 1.0, "length": 0.5},
        4,
        MASK,
        scale_rewards="none",
    )
    # Group 1: (1, .5, 0, 0) - 3/8 against (1, 0, 0, 0) - 1/4; group 2 is the same in both.
    one = torch.tensor([5 / 8, 1 / 8, -3 / 8, -3 / 8, 0.5, 0.5, -0.5, -0.5])
    two = torch.tensor([3 / 4, -1 / 4, -1 / 4, -1 / 4, 0.5, 0.5, -0.5, -0.5])
    cosine = torch.dot(one, two) / (one.norm() * two.norm())
    assert found["length"] == pytest.approx(1 - cosine.item(), abs=1e-6)
    assert found["length"] > ACTS


def test_a_token_term_acts_and_padding_does_not_count():
    term = torch.zeros(8, 3)
    term[0, 1], term[5, 2] = 0.8, 99.0
    mask = MASK.clone()
    mask[5, 2] = 0
    found = influences({"c": CORRECT}, {"c": 1.0}, 4, mask, {"teacher": term})
    plain = (group_advantages(CORRECT[:, None], [1.0], 4)[:, None] * mask).flatten()
    moved = plain.clone()
    moved[1] += 0.8
    cosine = torch.dot(plain, moved) / (plain.norm() * moved.norm())
    assert found["teacher"] == pytest.approx(1 - cosine.item(), abs=1e-6)


def test_dead_groups_are_left_out_and_a_lone_term_acts_fully():
    dead = torch.cat([CORRECT[:4], torch.ones(4)])
    other = torch.tensor([0.0, 0.3, 0.1, 0.0, 0.0, 0.0, 0.0, 0.0])
    weights = {"c": 1.0, "o": 1.0}
    both = influences({"c": dead, "o": other}, weights, 4, MASK)
    alone = influences({"c": dead[:4], "o": other[:4]}, weights, 4, MASK[:4])
    assert both == pytest.approx(alone)
    assert influences({"c": CORRECT}, {"c": 1.0}, 4, MASK) == {"c": 1.0}
    # Where every answer is wrong, the token term is all there is.
    term = {"teacher": torch.ones(8, 3) * 0.1}
    wrong = influences({"c": torch.zeros(8)}, {"c": 1.0}, 4, MASK, term)
    assert wrong == {"c": 0.0, "teacher": 1.0}


def test_what_cannot_be_judged_is_refused():
    with pytest.raises(ValueError, match="no group of the recorded batch has an advantage"):
        influences({"c": torch.ones(8)}, {"c": 1.0}, 4, MASK)
    with pytest.raises(ValueError, match="not finite"):
        influences({"c": CORRECT * torch.nan}, {"c": 1.0}, 4, MASK)
    with pytest.raises(ValueError, match="8 completions do not make groups of 3"):
        influences({"c": CORRECT}, {"c": 1.0}, 3, MASK)
