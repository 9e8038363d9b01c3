"""Redistribution against textbook solutions computed row by row."""

import pytest
import torch

from pipeline.pruning.calibration import InputStatistics
from pipeline.pruning.hessian import DAMPING
from pipeline.pruning.least_squares import solve_by_cholesky, solve_by_conjugate_gradients
from pipeline.pruning.redistribution import redistribute

KINDS = ("none", "proportional", "least_squares")


def make_case(num_tokens=50, num_in=12, num_out=9, sparsity=0.6, seed=0):
    """Inputs of two streams, a dense weight and a mask with supports of different sizes."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    mixing = draw(num_in, num_in)
    pruned_inputs = draw(num_tokens, num_in) @ mixing + 0.3
    dense_inputs = pruned_inputs + 0.2 * draw(num_tokens, num_in)
    weight = draw(num_out, num_in)
    mask = torch.rand((num_out, num_in), generator=generator) >= sparsity
    return pruned_inputs, dense_inputs, weight, mask


def statistics_of(pruned_inputs, dense_inputs):
    return InputStatistics(
        input_norm=pruned_inputs.norm(dim=0),
        second_moment=pruned_inputs.T @ pruned_inputs,
        cross_moment=pruned_inputs.T @ dense_inputs,
    )


def damped_lstsq(left, right, anchor, damping):
    """Argmin over x of |left x - right|² + damping |x - anchor|²."""
    ridge = damping.sqrt() * torch.eye(len(anchor), dtype=torch.float64)
    left, right = torch.cat([left, ridge]), torch.cat([right, damping.sqrt() * anchor])
    return torch.linalg.lstsq(left, right[:, None]).solution[:, 0]


def damping_of(inputs):
    return DAMPING * inputs.square().sum(0).mean()


@pytest.mark.parametrize("num_tokens", [1, 5, 50])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9])
def test_least_squares_matches_lstsq_on_the_support(num_tokens, sparsity):
    pruned_inputs, dense_inputs, weight, mask = make_case(num_tokens, sparsity=sparsity)
    mask[0] = True
    mask[1] = False
    expected = torch.zeros_like(weight)
    for row, (dense_row, kept) in enumerate(zip(weight, mask, strict=True)):
        if kept.any():
            expected[row, kept] = damped_lstsq(
                pruned_inputs[:, kept],
                dense_inputs @ dense_row,
                dense_row[kept],
                damping_of(pruned_inputs),
            )
    statistics = statistics_of(pruned_inputs, dense_inputs)
    solution = redistribute(weight, mask, "least_squares", statistics)
    torch.testing.assert_close(solution, expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("num_tokens", [1, 50])
def test_proportional_is_the_best_factor_per_row(num_tokens):
    pruned_inputs, dense_inputs, weight, mask = make_case(num_tokens)
    mask[1] = False
    expected = torch.zeros_like(weight)
    for row, (dense_row, kept) in enumerate(zip(weight, mask, strict=True)):
        if kept.any():
            kept_row = dense_row * kept
            norm = kept_row.norm()
            factor = damped_lstsq(
                (pruned_inputs @ kept_row)[:, None],
                dense_inputs @ dense_row,
                torch.ones(1, dtype=torch.float64),
                damping_of(pruned_inputs) * norm**2,
            )
            expected[row] = factor * kept_row
    statistics = statistics_of(pruned_inputs, dense_inputs)
    solution = redistribute(weight, mask, "proportional", statistics)
    torch.testing.assert_close(solution, expected, rtol=1e-8, atol=1e-9)


def test_proportional_by_hand():
    # One token: kept weights give 1 * 2 + 2 * 1 = 4, the pruned one 3 * 4 = 12.
    weight = torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64)
    inputs = torch.tensor([[2.0, 1.0, 4.0]], dtype=torch.float64)
    damping = 0.01 * (4.0 + 1.0 + 16.0) / 3
    factor = (4.0 * 16.0 + 5.0 * damping) / (4.0 * 4.0 + 5.0 * damping)
    mask = torch.tensor([[True, True, False]])
    solution = redistribute(weight, mask, "proportional", statistics_of(inputs, inputs))
    torch.testing.assert_close(solution, factor * weight * mask)


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.95])
def test_conjugate_gradients_agree_with_cholesky(sparsity):
    pruned_inputs, dense_inputs, weight, mask = make_case(200, 40, 30, sparsity)
    mask[0] = False
    hessian = pruned_inputs.T @ pruned_inputs + 5.0 * torch.eye(40, dtype=torch.float64)
    target = weight @ (dense_inputs.T @ pruned_inputs)
    direct = solve_by_cholesky(hessian, target, mask)
    iterative = solve_by_conjugate_gradients(hessian, target, mask, start=weight)
    torch.testing.assert_close(iterative, direct, rtol=1e-6, atol=1e-7)
    assert (iterative[~mask] == 0).all()


@pytest.mark.parametrize("limit", ["MAX_BATCH_ELEMENTS", "MAX_DIRECT_SUPPORT"])
def test_how_the_rows_are_solved_does_not_change_the_solution(monkeypatch, limit):
    pruned_inputs, dense_inputs, weight, mask = make_case()
    statistics = statistics_of(pruned_inputs, dense_inputs)
    expected = redistribute(weight, mask, "least_squares", statistics)
    monkeypatch.setattr(f"pipeline.pruning.least_squares.{limit}", 1)
    solution = redistribute(weight, mask, "least_squares", statistics)
    torch.testing.assert_close(solution, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_pruned_and_dense_inputs_give_the_dense_weight(kind):
    inputs, _, weight, mask = make_case()
    solution = redistribute(weight, torch.ones_like(mask), kind, statistics_of(inputs, inputs))
    torch.testing.assert_close(solution, weight)


def test_least_squares_leaves_kept_weights_of_dead_input_channels():
    inputs, _, weight, mask = make_case()
    inputs[:, [2, 5]] = 0.0
    mask[:, 2] = True
    solution = redistribute(weight, mask, "least_squares", statistics_of(inputs, inputs))
    torch.testing.assert_close(solution[:, 2], weight[:, 2])
    assert solution.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_all_inputs_zero_is_plain_pruning(kind):
    inputs, _, weight, mask = make_case()
    statistics = statistics_of(0 * inputs, 0 * inputs)
    torch.testing.assert_close(redistribute(weight, mask, kind, statistics), weight * mask)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_stays_and_zeros_are_exact(kind, dtype):
    pruned_inputs, dense_inputs, weight, mask = make_case()
    mask[3] = False
    statistics = statistics_of(pruned_inputs, dense_inputs)
    new_weight = redistribute(weight.to(dtype), mask, kind, statistics)
    assert new_weight.dtype == dtype
    assert new_weight.isfinite().all()
    assert torch.equal(new_weight != 0, mask)


def test_each_kind_reproduces_the_output_better_than_the_one_before():
    inputs, _, weight, mask = make_case(sparsity=0.5)
    statistics = statistics_of(inputs, inputs)
    errors = [
        (inputs @ (redistribute(weight, mask, kind, statistics) - weight).T).norm()
        for kind in KINDS
    ]
    assert errors[1] < 0.99 * errors[0]
    assert errors[2] < 0.9 * errors[1]
