"""Movement and masks inside the optimizer step, against a textbook AdamW written out here."""

import math

import pytest
import torch
from torch import nn

from pipeline.sparsity.hooks import SparsityHooks
from pipeline.sparsity.state import SparsityState

LR, BETAS, EPS, DECAY = 0.1, (0.9, 0.999), 1e-8, 0.01


def textbook(weights, masks, gradients, half_life):
    """AdamW (Loshchilov & Hutter, algorithm 2), the mask and both movements, weight by weight."""
    w, m, v = list(weights), [0.0] * len(weights), [0.0] * len(weights)
    movement = [0.0] * len(weights)
    factor = 0.5 ** (1 / half_life)
    for step, gradient in enumerate(gradients, 1):
        for i, g in enumerate(gradient):
            movement[i] = factor * movement[i] - g * w[i]
            new = w[i] * (1 - LR * DECAY)
            m[i] = BETAS[0] * m[i] + (1 - BETAS[0]) * g
            v[i] = BETAS[1] * v[i] + (1 - BETAS[1]) * g * g
            m_hat, v_hat = m[i] / (1 - BETAS[0] ** step), v[i] / (1 - BETAS[1] ** step)
            new -= LR * m_hat / (math.sqrt(v_hat) + EPS)
            if not masks[i]:
                movement[i] += new / LR
                new = 0.0
            w[i] = new
    return w, movement


def bind(weight, mask, half_life=3.0):
    optimizer = torch.optim.AdamW([weight], lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY)
    state = SparsityState.from_masks({"w": mask})
    return optimizer, state, SparsityHooks(optimizer, {"w": weight}, state, half_life)


def test_three_steps_equal_the_textbook():
    weight = nn.Parameter(torch.tensor([0.5, -0.3, 0.0, 0.2], dtype=torch.float64))
    mask = torch.tensor([True, True, False, True])
    gradients = [[0.2, -0.1, 0.4, 0.0], [-0.3, 0.2, 0.1, 0.5], [0.1, 0.1, -0.9, -0.2]]
    optimizer, state, _ = bind(weight, mask)
    state.movement["w"] = state.movement["w"].double()
    for gradient in gradients:
        weight.grad = torch.tensor(gradient, dtype=torch.float64)
        optimizer.step()
    expected, movement = textbook([0.5, -0.3, 0.0, 0.2], mask.tolist(), gradients, 3.0)
    assert weight.tolist() == pytest.approx(expected, rel=1e-12)
    assert state.movement["w"].tolist() == pytest.approx(movement, rel=1e-12)


def test_a_pruned_weight_is_zero_after_every_one_of_fifty_steps():
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(8, 8))
    mask = torch.rand(8, 8) > 0.5
    weight.data.mul_(mask)
    optimizer, _, _ = bind(weight, mask)
    for _ in range(50):
        weight.grad = torch.randn(8, 8)
        optimizer.step()
        assert (weight[~mask] == 0).all()
        assert (weight[mask] != 0).all()


def test_minus_g_times_w_is_the_gradient_of_a_mask_score():
    """Sanh et al. 2020, eq. 3: with a straight-through mask, -dL/dS = -(dL/dW) W."""
    weight = nn.Parameter(torch.tensor([0.5, -2.0]))
    inputs = torch.tensor([[1.0, 2.0], [0.5, -1.0]])
    optimizer, state, _ = bind(weight, torch.tensor([True, True]))
    (inputs @ weight).square().sum().backward()
    score = torch.ones(2, requires_grad=True)
    (inputs @ (weight.detach() * score)).square().sum().backward()
    optimizer.step()
    assert torch.allclose(state.movement["w"], -score.grad)


def test_removed_hooks_do_nothing():
    weight = nn.Parameter(torch.ones(2))
    optimizer, state, hooks = bind(weight, torch.tensor([True, False]))
    hooks.remove()
    weight.grad = torch.ones(2)
    optimizer.step()
    assert (weight != 0).all()
    assert not state.movement["w"].any()


def test_a_weight_that_is_not_trained_is_refused():
    optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(1))])
    state = SparsityState.from_masks({"w": torch.ones(2, dtype=torch.bool)})
    with pytest.raises(ValueError, match="does not train w"):
        SparsityHooks(optimizer, {"w": nn.Parameter(torch.ones(2))}, state, 1.0)
