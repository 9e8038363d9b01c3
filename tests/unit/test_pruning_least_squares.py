"""Redistribution against textbook solutions computed row by row."""

import pytest
import torch

from pipeline.pruning.conjugate_gradients import solve_by_conjugate_gradients, split_hessian
from pipeline.pruning.hessian import DAMPING
from pipeline.pruning.input_statistics import InputStatistics
from pipeline.pruning.least_squares import normal_equations, solve_by_cholesky
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


def correlated_case(num_tokens, num_in, num_out, sparsity, decay, seed=0):
    """Inputs with a power-law spectrum and a few large channels; rows of different sparsity."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    spectrum = torch.arange(1, num_in + 1, dtype=torch.float64) ** (-decay / 2)
    inputs = (draw(num_tokens, num_in) * spectrum) @ torch.linalg.qr(draw(num_in, num_in)).Q
    inputs = inputs * draw(num_in).exp()
    keep = (1 - sparsity) * (0.5 + torch.rand((num_out, 1), generator=generator))
    mask = torch.rand((num_out, num_in), generator=generator) < keep
    return inputs, inputs + 0.1 * inputs.std() * draw(*inputs.shape), draw(num_out, num_in), mask


def solve_rows_by_conjugate_gradients(monkeypatch, from_support=0, num_inputs=256):
    """Where rows of this size would be factorised: those above a support are not."""
    monkeypatch.setattr("pipeline.pruning.least_squares.MAX_DIRECT_INPUTS", 0)
    unit = num_inputs ** (2 / 3)
    monkeypatch.setattr(
        "pipeline.pruning.least_squares.DIRECT_SUPPORT", (from_support + 0.5) / unit
    )


def objective(solution, inputs, dense_inputs, weight):
    """What least squares minimises."""
    fit = (inputs @ solution.double().T - dense_inputs @ weight.T).square().sum()
    return fit + damping_of(inputs) * (solution - weight).square().sum()


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.95])
def test_conjugate_gradients_agree_with_cholesky(monkeypatch, sparsity):
    monkeypatch.setattr("pipeline.pruning.conjugate_gradients.TOLERANCE", 1e-20)
    pruned_inputs, dense_inputs, weight, mask = make_case(200, 40, 30, sparsity)
    mask[0] = False
    hessian = pruned_inputs.T @ pruned_inputs + 5.0 * torch.eye(40, dtype=torch.float64)
    target = weight @ (dense_inputs.T @ pruned_inputs)
    direct = solve_by_cholesky(hessian, target, mask)
    split = split_hessian(hessian, torch.float64)
    iterative = solve_by_conjugate_gradients(split, target, mask, start=weight)
    torch.testing.assert_close(iterative, direct, rtol=1e-8, atol=1e-9)
    assert (iterative[~mask] == 0).all()


def test_the_hessian_is_split_and_not_changed():
    inputs, _, _, _ = correlated_case(600, 200, 1, 0.5, decay=1.0)
    hessian = inputs.T @ inputs + torch.eye(200, dtype=torch.float64)
    kept = hessian.clone()
    split = split_hessian(hessian, torch.float64)
    assert torch.equal(hessian, kept)
    scaled = split.product(torch.eye(200, dtype=torch.float64))
    torch.testing.assert_close(scaled * split.scale * split.scale[:, None], hessian)
    values = torch.linalg.eigvalsh(scaled)
    rank = len(split.excess)
    assert rank == 20
    found = torch.linalg.eigvalsh(scaled - split.rest)[-rank:]
    torch.testing.assert_close(found[10:], values[-10:] - split.level, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(("decay", "most_steps"), [(0.0, 8), (1.0, 12), (1.5, 16)])
@pytest.mark.parametrize("sparsity", [0.5, 0.7, 0.9])
def test_conjugate_gradients_reach_the_minimum_in_few_steps(
    monkeypatch, decay, most_steps, sparsity
):
    solve_rows_by_conjugate_gradients(monkeypatch)
    monkeypatch.setattr("pipeline.pruning.conjugate_gradients.MAX_STEPS", most_steps)
    inputs, dense_inputs, weight, mask = correlated_case(2000, 256, 40, sparsity, decay)
    mask[3] = False
    statistics = statistics_of(inputs, dense_inputs)
    hessian, target = normal_equations(weight, statistics)
    best = objective(solve_by_cholesky(hessian.matrix, target, mask), inputs, dense_inputs, weight)
    found = redistribute(weight.float(), mask, "least_squares", statistics)
    assert torch.equal(found != 0, mask)
    excess = objective(found, inputs, dense_inputs, weight) / best - 1
    assert excess < 1e-3


@pytest.mark.parametrize("num_tokens", [1, 50])
def test_conjugate_gradients_with_fewer_tokens_than_inputs(monkeypatch, num_tokens):
    solve_rows_by_conjugate_gradients(monkeypatch)
    inputs, dense_inputs, weight, mask = correlated_case(num_tokens, 256, 40, 0.7, decay=1.0)
    statistics = statistics_of(inputs, dense_inputs)
    hessian, target = normal_equations(weight, statistics)
    exact = solve_by_cholesky(hessian.matrix, target, mask)
    found = redistribute(weight.float(), mask, "least_squares", statistics)
    best, reached, alone = (
        objective(solution, inputs, dense_inputs, weight)
        for solution in (exact, found, weight * mask)
    )
    assert reached - best < 1e-2 * (alone - best)


def test_wide_and_narrow_rows_are_solved_side_by_side(monkeypatch):
    inputs, dense_inputs, weight, mask = correlated_case(2000, 256, 40, 0.6, decay=1.0)
    statistics = statistics_of(inputs, dense_inputs)
    expected = redistribute(weight, mask, "least_squares", statistics)
    monkeypatch.setattr("pipeline.pruning.conjugate_gradients.TOLERANCE", 1e-20)
    monkeypatch.setattr("pipeline.pruning.conjugate_gradients.ROWS_AT_ONCE", 7)
    solve_rows_by_conjugate_gradients(monkeypatch, from_support=100)
    assert 5 < int((mask.sum(1) <= 100).sum()) < 35
    found = redistribute(weight, mask, "least_squares", statistics)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


def test_products_in_reduced_precision_leave_the_setting_alone():
    torch.set_float32_matmul_precision("highest")
    split = split_hessian(torch.eye(8, dtype=torch.float64), torch.float32)
    split.product(torch.ones(3, 8))
    assert torch.get_float32_matmul_precision() == "highest"


def test_rows_with_one_support_share_a_factor(monkeypatch):
    pruned_inputs, dense_inputs, weight, mask = make_case()
    mask[:] = mask[2]
    statistics = statistics_of(pruned_inputs, dense_inputs)
    hessian, target = normal_equations(weight, statistics)
    expected = solve_by_cholesky(hessian.matrix, target, mask)
    monkeypatch.delattr("pipeline.pruning.least_squares.solve_by_cholesky")
    found = redistribute(weight, mask, "least_squares", statistics)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_batches_of_rows_do_not_change_the_solution(monkeypatch):
    pruned_inputs, dense_inputs, weight, mask = make_case()
    statistics = statistics_of(pruned_inputs, dense_inputs)
    expected = redistribute(weight, mask, "least_squares", statistics)
    monkeypatch.setattr("pipeline.pruning.least_squares.MAX_BATCH_ELEMENTS", 1)
    solution = redistribute(weight, mask, "least_squares", statistics)
    torch.testing.assert_close(solution, expected, rtol=1e-10, atol=1e-12)


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
