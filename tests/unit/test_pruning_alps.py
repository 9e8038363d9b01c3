"""ALPS against lstsq, against all supports of one row, and on awkward inputs."""

from itertools import combinations

import pytest
import torch

from pipeline.pruning.alps import alps_weight
from pipeline.pruning.hessian import DAMPING
from pipeline.pruning.input_statistics import InputStatistics
from pipeline.pruning.least_squares import least_squares_weight, normal_equations
from pipeline.pruning.magnitude import magnitude_score
from pipeline.pruning.sparsegpt import sparsegpt_weight
from pipeline.sparsity.threshold import masks_by_score

# (scope, sparsity)
TARGETS = [
    *(("matrix", sparsity) for sparsity in (0.3, 0.5, 0.7, 0.9)),
    ("row", 0.5),
    ("row", 0.7),
    ("2:4", 0.5),
    ("4:8", 0.5),
]


def make_case(num_tokens=60, num_in=24, num_out=7, seed=0):
    """Correlated inputs of two streams with channels of different size, and a weight."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    inputs = draw(num_tokens, num_in) @ draw(num_in, num_in) * (1 + 3 * draw(num_in).abs()) + 0.5
    return inputs, inputs + draw(num_tokens, num_in), draw(num_out, num_in)


def statistics_of(inputs, dense_inputs=None):
    cross_moment = None if dense_inputs is None else inputs.T @ dense_inputs
    return InputStatistics(inputs.norm(dim=0), inputs.T @ inputs, cross_moment)


def prune(weight, inputs, scope, sparsity):
    return alps_weight(weight, statistics_of(inputs), sparsity, scope, "weight")


def least_squares(weight, mask, inputs, targets):
    """Argmin on each row's support of the damped squared error, by lstsq."""
    damping = DAMPING * inputs.square().sum(0).mean()
    solution = torch.zeros_like(weight)
    for row, kept in enumerate(mask):
        if kept.any():
            ridge = damping.sqrt() * torch.eye(int(kept.sum()), dtype=torch.float64)
            left = torch.cat([inputs[:, kept], ridge])
            right = torch.cat([targets[:, row], damping.sqrt() * weight[row, kept]])
            solution[row, kept] = torch.linalg.lstsq(left, right[:, None]).solution[:, 0]
    return solution


def error(solution, weight, inputs, targets):
    """What is minimised: squared output error, damped towards the dense weight."""
    damping = DAMPING * inputs.square().sum(0).mean()
    fit = (inputs @ solution.T - targets).square().sum()
    return float(fit + damping * (solution - weight).square().sum())


@pytest.mark.parametrize(("scope", "sparsity"), TARGETS)
def test_alps_solves_for_the_dense_layer_on_the_inputs_of_the_pruned_model(scope, sparsity):
    inputs, _, weight = make_case()
    mask, new_weight = prune(weight, inputs, scope, sparsity)
    solution = least_squares(weight, mask, inputs, inputs @ weight.T)
    torch.testing.assert_close(new_weight, solution, rtol=1e-7, atol=1e-8)
    assert torch.equal(new_weight != 0, mask)


def test_the_unit_of_an_input_does_not_change_the_mask(monkeypatch):
    monkeypatch.setattr("pipeline.pruning.hessian.DAMPING", 1e-9)
    inputs, _, weight = make_case()
    units = torch.logspace(-1, 1, 24, dtype=torch.float64)
    mask, _ = prune(weight, inputs, "matrix", 0.6)
    assert torch.equal(prune(weight / units, inputs * units, "matrix", 0.6)[0], mask)


def test_supports_of_one_row_are_among_the_best_of_all():
    num_better = []
    for seed in range(8):
        inputs, _, weight = make_case(num_in=12, num_out=1, seed=seed)
        targets = inputs @ weight.T
        _, new_weight = prune(weight, inputs, "matrix", 7 / 12)
        found = error(new_weight, weight, inputs, targets)
        errors = []
        for kept in combinations(range(12), 5):
            mask = torch.zeros(1, 12, dtype=torch.bool)
            mask[0, list(kept)] = True
            solution = least_squares(weight, mask, inputs, targets)
            errors.append(error(solution, weight, inputs, targets))
        num_better.append(sum(other < found * (1 - 1e-9) for other in errors))
    assert len(errors) == 792
    assert sum(num_better) < 0.02 * 8 * 792


@pytest.mark.parametrize("sparsity", [0.5, 0.7, 0.9])
def test_the_error_is_lower_than_sparsegpts_and_that_of_other_masks(sparsity):
    inputs, _, weight = make_case(400, 96, 40)
    targets, statistics = inputs @ weight.T, statistics_of(inputs, inputs)
    equations = normal_equations(weight, statistics)
    _, ours = alps_weight(weight, statistics, sparsity, "matrix", "weight")
    _, sparsegpt = sparsegpt_weight(weight, statistics, sparsity, "matrix", "weight")
    score = magnitude_score(weight) * statistics.input_norm.float()
    wanda = masks_by_score({"weight": score}, sparsity, "matrix")["weight"]
    others = [sparsegpt, least_squares_weight(weight, wanda, *equations)]
    for other in others:
        assert error(ours, weight, inputs, targets) < 0.9 * error(other, weight, inputs, targets)


@pytest.mark.parametrize("sparsity", [0.0, 0.123, 0.5, 0.777, 0.99])
@pytest.mark.parametrize("scope", ["matrix", "row"])
def test_the_number_of_zeros_is_exact(scope, sparsity):
    inputs, _, weight = make_case(num_in=53, num_out=9)
    mask, new_weight = prune(weight, inputs, scope, sparsity)
    assert torch.equal(new_weight != 0, mask)
    if scope == "row":
        assert ((~mask).sum(1) == round(sparsity * 53)).all()
    else:
        assert int((~mask).sum()) == round(sparsity * 53 * 9)
    if sparsity == 0:
        torch.testing.assert_close(new_weight, weight)


@pytest.mark.parametrize(
    "kind", ["one_token", "few_tokens", "constant", "repeated_channel", "tiny"]
)
@pytest.mark.parametrize(("scope", "sparsity"), [("matrix", 0.7), ("row", 0.7), ("2:4", 0.5)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rank_deficient_inputs(scope, sparsity, kind, dtype):
    inputs, _, weight = make_case()
    if kind in ("one_token", "few_tokens"):
        inputs = inputs[: 1 if kind == "one_token" else 5]
    elif kind == "constant":
        inputs = torch.full_like(inputs, 0.5)
    elif kind == "repeated_channel":
        inputs[:, 1::2] = inputs[:, ::2]
    else:
        inputs = inputs * 1e-12
    mask, new_weight = prune(weight.to(dtype), inputs, scope, sparsity)
    assert new_weight.dtype == dtype
    assert new_weight.isfinite().all()
    assert torch.equal(new_weight != 0, mask)
    solution = least_squares(weight.to(dtype).double(), mask, inputs, inputs @ weight.T)
    tolerance = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 2e-2}[dtype]
    if dtype == torch.bfloat16:
        targets = inputs @ weight.to(dtype).double().T
        solution = least_squares(weight.to(dtype).double(), mask, inputs, targets)
    torch.testing.assert_close(new_weight.double(), solution, rtol=tolerance, atol=tolerance)


def test_weights_of_dead_inputs_go_first():
    inputs, _, weight = make_case()
    inputs[:, [3, 4, 17]] = 0.0
    mask, new_weight = prune(weight, inputs, "matrix", 0.5)
    assert not mask[:, [3, 4, 17]].any()
    assert new_weight.isfinite().all()


@pytest.mark.parametrize("scope", ["matrix", "2:4"])
def test_without_any_input_large_weights_stay_as_they_are(scope):
    inputs, _, weight = make_case()
    mask, new_weight = prune(weight, 0 * inputs, scope, 0.5)
    assert int(mask.sum()) == weight.numel() // 2
    torch.testing.assert_close(new_weight, weight * mask)
    if scope == "matrix":
        largest = weight.square().flatten().sort().values[weight.numel() // 2 :].sum()
        assert weight.square()[mask].sum() > 0.99 * largest


def test_the_dense_weight_and_the_statistics_are_left_alone():
    inputs, _, weight = make_case()
    statistics, dense = statistics_of(inputs), weight.clone()
    moment = statistics.second_moment.clone()
    first = alps_weight(weight, statistics, 0.5, "matrix", "weight")
    again = alps_weight(weight, statistics, 0.5, "matrix", "weight")
    assert torch.equal(weight, dense)
    assert torch.equal(statistics.second_moment, moment)
    assert torch.equal(first[1], again[1])
