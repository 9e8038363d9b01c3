"""Movement and masks inside the optimizer step, against a textbook optimizer written out here."""

import math

import pytest
import torch
from torch import nn

from pipeline.sparsity import chunks
from pipeline.sparsity.hooks import SparsityHooks
from pipeline.sparsity.movement import KEPT_OBSERVATIONS, PRUNED_OBSERVATIONS, MovementRule
from pipeline.sparsity.shards import plain_shards
from pipeline.sparsity.state import SparsityState

LR, BETAS, EPS, DECAY, MOMENTUM, HALF_LIFE = 0.1, (0.9, 0.999), 1e-8, 0.01, 0.9, 3.0
START, KEPT = [0.5, -0.3, 0.7, 0.2, -0.05], [True, True, False, True, True]
GRADIENTS = [
    [0.2, -0.1, 0.4, 0.0, 0.3],
    [-0.3, 0.2, 0.1, 0.5, -0.9],
    [0.1, 0.1, -0.9, -0.2, -0.7],
    [0.6, -0.4, 0.3, 0.1, 0.8],
]


class Adamw:
    """Of one weight (Loshchilov & Hutter 2019, arXiv 1711.05101, algorithm 2)."""

    def __init__(self):
        self.m = self.v = self.steps = 0.0

    def update(self, w, g):
        self.steps += 1
        self.m = BETAS[0] * self.m + (1 - BETAS[0]) * g
        self.v = BETAS[1] * self.v + (1 - BETAS[1]) * g * g
        m_hat, v_hat = self.m / (1 - BETAS[0] ** self.steps), self.v / (1 - BETAS[1] ** self.steps)
        return w * (1 - LR * DECAY) - LR * m_hat / (math.sqrt(v_hat) + EPS)


class Sgd:
    """Of one weight, with momentum and L2 decay, as torch defines them."""

    def __init__(self):
        self.buffer = None

    def update(self, w, g):
        g = g + DECAY * w
        self.buffer = g if self.buffer is None else MOMENTUM * self.buffer + g
        return w - LR * self.buffer


def textbook(optimizer, kept_kind, pruned_kind):
    """Weights and movement after `GRADIENTS`, weight by weight, from the definitions alone."""
    weights, movement = [], []
    for i, (start, kept) in enumerate(zip(START, KEPT, strict=True)):
        rule, w, s = optimizer(), start if kept else 0.0, 0.0
        for gradient in GRADIENTS:
            g, before = gradient[i], w
            w = rule.update(w, g)
            seen = {
                "gradient": -g * before,
                "squared": (g * before) ** 2,
                "displacement": abs(w) - abs(before),
                "proposed": (w - before) / LR,
                "negative_gradient": -g,
            }[kept_kind if kept else pruned_kind]
            s = 0.5 ** (1 / HALF_LIFE) * s + seen
            w = w if kept else 0.0
        weights.append(w)
        movement.append(s)
    return weights, movement


def torch_optimizer(kind, parameters):
    if kind is Sgd:
        return torch.optim.SGD(parameters, lr=LR, momentum=MOMENTUM, weight_decay=DECAY)
    return torch.optim.AdamW(parameters, lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY)


def bind(weight, mask, optimizer=None, zero_pruned_gradients=False, **rule):
    optimizer = torch_optimizer(Adamw, [weight]) if optimizer is None else optimizer
    rule = MovementRule(**{"half_life_steps": HALF_LIFE} | rule)
    sharded = plain_shards({"w": weight}, optimizer)
    state = SparsityState.from_masks({"w": mask}, sharded, rule.dtype)
    hooks = SparsityHooks(sharded, state, rule, zero_pruned_gradients=zero_pruned_gradients)
    return optimizer, state, hooks


@pytest.mark.parametrize("kind", [Adamw, Sgd])
@pytest.mark.parametrize("kept", KEPT_OBSERVATIONS)
@pytest.mark.parametrize("pruned", PRUNED_OBSERVATIONS)
def test_every_observation_equals_the_textbook(kind, kept, pruned):
    weight = nn.Parameter(torch.tensor(START))
    optimizer = torch_optimizer(kind, [weight])
    _, state, _ = bind(weight, torch.tensor(KEPT), optimizer, kept=kept, pruned=pruned)
    for gradient in GRADIENTS:
        weight.grad = torch.tensor(gradient)
        optimizer.step()
    expected, movement = textbook(kind, kept, pruned)
    assert weight.tolist() == pytest.approx(expected, rel=1e-5)
    assert state.movement["w"].tolist() == pytest.approx(movement, rel=1e-5, abs=1e-7)


def test_a_weight_that_crosses_zero_counts_its_magnitudes():
    weight = nn.Parameter(torch.tensor([0.1]))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    _, state, _ = bind(weight, torch.tensor([True]), optimizer, kept="displacement")
    weight.grad = torch.tensor([0.4])
    optimizer.step()
    assert weight.item() == pytest.approx(-0.3)
    assert state.movement["w"].item() == pytest.approx(0.3 - 0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [8, 16, 1024])
def test_pieces_do_not_show(monkeypatch, dtype, size):
    def run():
        torch.manual_seed(0)
        weight = nn.Parameter(torch.randn(9, 11))
        optimizer, state, hooks = bind(weight, torch.rand(9, 11) > 0.5, dtype=dtype)
        for step in range(3):
            hooks.step = step
            weight.grad = torch.randn(9, 11)
            optimizer.step()
        return weight.detach(), state.movement["w"]

    expected = run()
    monkeypatch.setattr(chunks, "CPU_ELEMENTS", size)
    assert all(torch.equal(a, b) for a, b in zip(run(), expected, strict=True))


def test_a_pruned_weight_is_zero_after_every_one_of_fifty_steps():
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(7, 9))
    mask = torch.rand(7, 9) > 0.5
    optimizer, _, _ = bind(weight, mask)
    for _ in range(50):
        weight.grad = torch.randn(7, 9)
        optimizer.step()
        assert (weight[~mask] == 0).all()
        assert not torch.signbit(weight[~mask]).any()
        assert (weight[mask] != 0).all()


def test_binding_zeroes_what_the_mask_prunes():
    weight = nn.Parameter(torch.ones(5))
    bind(weight, torch.tensor(KEPT))
    assert weight.tolist() == [1, 1, 0, 1, 1]


def test_moments_of_pruned_weights_live_and_never_move_a_kept_one():
    torch.manual_seed(0)
    start, mask = torch.randn(64), torch.rand(64) > 0.5
    masked, alone = nn.Parameter(start.clone()), nn.Parameter(start[mask].clone())
    optimizer, _, _ = bind(masked, mask)
    reference = torch_optimizer(Adamw, [alone])
    for _ in range(10):
        masked.grad = torch.randn(64)
        alone.grad = masked.grad[mask].clone()
        optimizer.step()
        reference.step()
    assert torch.allclose(masked[mask], alone, rtol=1e-6)
    assert (optimizer.state[masked]["exp_avg"][~mask] != 0).all()


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


@pytest.mark.parametrize(
    ("kept", "pruned", "factors"),
    [
        ("gradient", "negative_gradient", (0.25, 0.25)),
        ("squared", "negative_gradient", (0.0625, 0.25)),
        ("displacement", "proposed", (1.0, 1.0)),
    ],
)
def test_what_the_clipping_norm_does_to_an_observation(kept, pruned, factors):
    """Every step is cut to a quarter, as a norm that includes pruned positions may do."""
    found = []
    for clipped in (False, True):
        weight, mask = nn.Parameter(torch.tensor(START)), torch.tensor(KEPT)
        optimizer, state, _ = bind(weight, mask, kept=kept, pruned=pruned)
        for gradient in GRADIENTS:
            weight.grad = torch.tensor(gradient)
            norm = weight.grad.norm()
            if clipped:
                nn.utils.clip_grad_norm_([weight], float(norm) / 4)
            optimizer.step()
        movement = state.movement["w"]
        found.append(torch.stack([movement[mask].norm(), movement[~mask].norm()]))
    ratios = (found[1] / found[0]).tolist()
    assert ratios == pytest.approx(factors, rel=0.05)


def test_muon_goes_where_it_would_without_the_pruned_gradients_which_are_observed_all_the_same():
    generator = torch.Generator().manual_seed(3)
    start, mask = (
        torch.randn(6, 4, generator=generator),
        torch.rand(6, 4, generator=generator) > 0.5,
    )
    gradients = torch.randn(3, 6, 4, generator=generator)
    found = {}
    for hidden in (True, False):  # by the hooks, or before they could see them
        weight = nn.Parameter(start * mask)
        optimizer = torch.optim.Muon([weight], lr=0.1)
        rule = {"pruned": "negative_gradient", "zero_pruned_gradients": hidden}
        _, state, _ = bind(weight, mask, optimizer, **rule)
        for gradient in gradients:
            weight.grad = gradient.clone() if hidden else gradient * mask
            optimizer.step()
        found[hidden] = weight.detach(), state.movement["w"].view(6, 4)
    assert torch.equal(found[True][0], found[False][0])
    assert torch.equal(found[True][1][mask], found[False][1][mask])
    assert (found[True][1][~mask] != 0).all()
    assert not found[False][1][~mask].any()


def test_a_weight_without_gradient_is_neither_observed_nor_touched():
    weight = nn.Parameter(torch.tensor(START))
    optimizer, state, _ = bind(weight, torch.tensor(KEPT))
    weight.grad = torch.ones(5)
    optimizer.step()
    before = state.movement["w"].clone(), weight.detach().clone()
    weight.grad = None
    optimizer.step()
    assert torch.equal(state.movement["w"], before[0])
    assert torch.equal(weight, before[1])


def test_a_kept_weight_gone_bad_does_not_spoil_its_neighbours():
    weight = nn.Parameter(torch.tensor(START))
    optimizer, state, _ = bind(weight, torch.tensor(KEPT), pruned="negative_gradient")
    weight.grad = torch.tensor([float("inf"), 0.1, 0.2, 0.3, 0.4])
    optimizer.step()
    assert weight[2] == 0
    assert state.movement["w"].isfinite().tolist() == [False, True, True, True, True]


def test_a_pruned_weight_is_zero_even_if_its_update_is_not_finite():
    weight = nn.Parameter(torch.tensor(START))
    optimizer, _, _ = bind(weight, torch.tensor(KEPT))
    weight.grad = torch.tensor([0.1, 0.1, float("nan"), 0.1, 0.1])
    optimizer.step()
    assert weight[2] == 0


def test_a_learning_rate_of_zero_proposes_nothing():
    weight = nn.Parameter(torch.tensor(START))
    optimizer, state, _ = bind(weight, torch.tensor(KEPT))
    optimizer.param_groups[0]["lr"] = 0.0
    weight.grad = torch.ones(5)
    optimizer.step()
    assert state.movement["w"][2] == 0
    assert state.movement["w"].isfinite().all()


def test_bf16_movement_follows_fp32_where_plain_rounding_stands_still():
    """1000 addends of 1e-3 on an accumulator of 1: each is below half a unit in the last place."""
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        weight = nn.Parameter(torch.ones(2000))
        optimizer = torch.optim.SGD([weight], lr=0.0)
        mask = torch.ones(2000, dtype=torch.bool)
        _, state, hooks = bind(weight, mask, optimizer, half_life_steps=1e9, dtype=dtype)
        state.movement["w"].fill_(1.0)
        for step in range(1000):
            hooks.step = step
            weight.grad = torch.full((2000,), -1e-3)
            optimizer.step()
        found[dtype] = state.movement["w"].float()
    assert found[torch.float32].mean() == pytest.approx(2.0, rel=1e-3)
    assert found[torch.bfloat16].mean() == pytest.approx(2.0, rel=5e-3)
    independent = 2**-7 * math.sqrt(1000 * 0.128 * 0.872)  # a draw a step, of one unit each
    assert found[torch.bfloat16].std() == pytest.approx(independent, rel=0.15)
    stuck = torch.ones(1, dtype=torch.bfloat16)
    assert (stuck + torch.tensor([1e-3], dtype=torch.bfloat16)).item() == 1.0


def test_hooks_that_fire_more_often_than_steps_observe_each_tensor_once():
    """As under ZeRO: one call of the base optimizer for every parameter group."""
    first, second = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([{"params": [first]}, {"params": [second]}], lr=0.1)
    shards = plain_shards({"a": first, "b": second}, optimizer)
    masks = {name: torch.ones(3, dtype=torch.bool) for name in "ab"}
    state = SparsityState.from_masks(masks, shards)
    SparsityHooks(shards, state, MovementRule(half_life_steps=HALF_LIFE))
    first.grad, second.grad = torch.ones(3), torch.full((3,), 2.0)
    groups = optimizer.param_groups
    for group in groups:
        optimizer.param_groups = [group]
        optimizer.step()
    assert state.movement["a"].tolist() == [-1.0] * 3
    assert state.movement["b"].tolist() == [-2.0] * 3


def test_removed_hooks_do_nothing():
    weight = nn.Parameter(torch.ones(2))
    optimizer, state, hooks = bind(weight, torch.tensor([True, False]))
    hooks.remove()
    weight.grad = torch.ones(2)
    optimizer.step()
    assert (weight != 0).all()
    assert not state.movement["w"].any()


def test_a_step_allocates_nothing_of_a_weights_size(monkeypatch):
    monkeypatch.setattr(chunks, "CPU_ELEMENTS", 64)
    weight = nn.Parameter(torch.randn(100, 100))
    optimizer, _, hooks = bind(weight, torch.rand(100, 100) > 0.5)
    weight.grad = torch.randn(100, 100)
    with torch.profiler.profile(profile_memory=True) as profile:
        hooks._before_step(optimizer, (), {})
        hooks._after_step(optimizer, (), {})
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert largest < weight.numel()


@pytest.mark.parametrize(
    ("masks", "movement", "message"),
    [
        ({}, {}, "w: no movement of this rank's 5 elements"),
        ({"w": torch.zeros(1, dtype=torch.uint8)}, {"w": torch.zeros(4)}, "no movement of this"),
        ({"w": torch.zeros(2, dtype=torch.uint8)}, {"w": torch.zeros(5)}, "no packed mask of 5"),
        (
            {"w": torch.zeros(1, dtype=torch.uint8)},
            {"w": torch.zeros(5, dtype=torch.bfloat16)},
            "holds torch.bfloat16; set that",
        ),
    ],
)
def test_a_state_of_other_shards_is_refused(masks, movement, message):
    weight = nn.Parameter(torch.tensor(START))
    shards = plain_shards({"w": weight}, torch_optimizer(Adamw, [weight]))
    with pytest.raises(ValueError, match=message):
        SparsityHooks(shards, SparsityState(masks, movement, {}), MovementRule(half_life_steps=1.0))
