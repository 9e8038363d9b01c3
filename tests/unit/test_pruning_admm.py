"""ADMM masks: against a textbook loop, against magnitude, and what the multiplier does."""

import pytest
import torch

from pipeline.pruning.admm import FIRST_RHO, GROWTH, MAX_STEPS, STEPS_PER_RHO, admm_mask
from pipeline.pruning.alps import alps_weight
from pipeline.pruning.hessian import Hessian, damped_hessian
from pipeline.pruning.input_statistics import InputStatistics
from pipeline.pruning.least_squares import least_squares_weight


def problem(seed=0, num_outputs=12, num_inputs=16, num_tokens=80):
    """Correlated inputs of unequal size, and a dense weight, in fp64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    inputs = normal(num_tokens, num_inputs) @ normal(num_inputs, num_inputs)
    return normal(num_outputs, num_inputs), inputs * torch.linspace(0.2, 3, num_inputs)


def statistics_of(inputs):
    return InputStatistics(inputs.norm(dim=0), inputs.T @ inputs)


def keep_largest(score, sparsity, scope):
    """The textbook projection: sort and cut."""
    if scope == "2:4":
        groups = score.view(len(score), -1, 4)
        kept = torch.zeros_like(groups, dtype=torch.bool)
        return kept.scatter(2, groups.topk(2).indices, True).view_as(score)
    if scope == "row":
        num_kept = score.shape[1] - round(sparsity * score.shape[1])
        return torch.zeros_like(score, dtype=torch.bool).scatter(
            1, score.topk(num_kept).indices, True
        )
    num_kept = score.numel() - round(sparsity * score.numel())
    flat = torch.zeros(score.numel(), dtype=torch.bool)
    flat[score.flatten().topk(num_kept).indices] = True
    return flat.view_as(score)


def textbook(weight, hessian, target, sparsity, scope, power, multiplier):
    """The three steps with a plain inverse, in unscaled weights with a scaled penalty."""
    mean = hessian.diagonal().mean()
    scale = (hessian.diagonal() / mean) ** (power / 2)
    penalty = mean * torch.diag(scale**2)
    factor = 1.0 if multiplier is None else multiplier
    solution = weight.clone()
    mask = keep_largest((solution * scale).abs() * factor, sparsity, scope)
    sparse, dual, rho, settled = solution * mask, torch.zeros_like(weight), FIRST_RHO, mask
    num_kept = int(mask.sum())
    for step in range(1, MAX_STEPS + 1):
        inverse = torch.linalg.inv(hessian + rho * penalty)
        solution = (target + (rho * sparse - dual) @ penalty) @ inverse
        values = solution + dual / rho
        mask = keep_largest((values * scale).abs() * factor, sparsity, scope)
        sparse = values * mask
        dual = dual + rho * (solution - sparse)
        if step % STEPS_PER_RHO == 0:
            changed = int((mask ^ settled).sum()) / num_kept
            if changed == 0:
                break
            settled = mask
            rho *= next(growth for least, growth in GROWTH if changed >= least)
    return mask


@pytest.mark.parametrize("scope", ["matrix", "row", "2:4"])
@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("with_multiplier", [False, True])
def test_against_the_textbook(scope, power, with_multiplier):
    for seed in range(3):
        weight, inputs = problem(seed)
        hessian = damped_hessian(inputs.T @ inputs)
        target = weight @ hessian
        multiplier = torch.rand(weight.shape, dtype=torch.float64) + 0.5
        multiplier = multiplier if with_multiplier else None
        mask = admm_mask(
            weight, Hessian(hessian), target, 0.5, scope, "w", power=power, multiplier=multiplier
        )
        expected = textbook(weight, hessian, target, 0.5, scope, power, multiplier)
        assert torch.equal(mask, expected)


def loss(weight, mask, hessian, target):
    """The quadratic objective at its least-squares weights, without its constant."""
    best = least_squares_weight(weight, mask, Hessian(hessian), target)
    return float(((best @ hessian) * best - 2 * best * target).sum())


@pytest.mark.parametrize("sparsity", [0.5, 0.75, 0.9])
def test_masks_lose_less_than_those_of_magnitude_and_wanda(sparsity):
    for seed in range(4):
        weight, inputs = problem(seed, 24, 32, 200)
        hessian = damped_hessian(inputs.T @ inputs)
        target = weight @ hessian
        mask = admm_mask(weight, Hessian(hessian), target, sparsity, "matrix", "w")
        found = loss(weight, mask, hessian, target)
        for score in (weight.abs(), weight.abs() * inputs.norm(dim=0)):
            mask = keep_largest(score, sparsity, "matrix")
            assert found < loss(weight, mask, hessian, target)


@pytest.mark.parametrize("sparsity", [0.5, 0.9])
def test_reduced_products_find_masks_as_good(monkeypatch, sparsity):
    weight, inputs = problem(0, 48, 96, 300)
    hessian = damped_hessian(inputs.T @ inputs)
    target = weight @ hessian
    arguments = weight.float(), Hessian(hessian), target.float(), sparsity, "matrix", "w"
    exact = loss(weight, admm_mask(*arguments), hessian, target)
    none = float((weight * target).sum())
    monkeypatch.setattr("pipeline.pruning.admm.MAX_EXACT_INPUTS", 0)
    reduced = loss(
        weight, admm_mask(*arguments[:1], Hessian(hessian), *arguments[2:]), hessian, target
    )
    assert reduced + none == pytest.approx(exact + none, rel=0.02)


def test_the_multiplier_decides_where_it_is_strong():
    weight, inputs = problem()
    hessian = damped_hessian(inputs.T @ inputs)
    multiplier = torch.full_like(weight, 1e-6)
    multiplier[:, ::2] = 1.0
    arguments = (weight, Hessian(hessian), weight @ hessian, 0.5, "matrix", "w")
    mask = admm_mask(*arguments, multiplier=multiplier)
    assert mask[:, ::2].all()
    assert not mask[:, 1::2].any()


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.99])
def test_counts_and_degenerate_inputs(sparsity):
    weight, inputs = problem(num_tokens=1)
    inputs[:, 3] = 0.0
    mask, new_weight = alps_weight(weight, statistics_of(inputs), sparsity, "matrix", "w")
    assert int((~mask).sum()) == round(sparsity * weight.numel())
    assert new_weight.isfinite().all()
    assert torch.equal(new_weight != 0, mask)


def test_alps_weights_are_the_least_squares_of_the_pruned_stream():
    weight, inputs = problem()
    statistics = statistics_of(inputs)
    mask, new_weight = alps_weight(weight, statistics, 0.6, "matrix", "w")
    hessian = damped_hessian(statistics.second_moment)
    for row in range(len(weight)):
        kept = mask[row]
        right = (hessian @ weight[row])[kept]
        solution = torch.linalg.solve(hessian[kept][:, kept], right)
        torch.testing.assert_close(new_weight[row, kept], solution)
