"""SparseGPT against optimal brain surgery, whose inverse Hessian is recomputed for every column."""

import pytest
import torch

from pipeline.pruning.hessian import damped_hessian, inverse_factor
from pipeline.pruning.input_statistics import InputStatistics
from pipeline.pruning.sparsegpt import sparsegpt_weight

# (scope, sparsity)
TARGETS = [
    *(("matrix", sparsity) for sparsity in (0.3, 0.5, 0.7, 0.9)),
    *(("row", sparsity) for sparsity in (0.3, 0.5, 0.7, 0.9)),
    ("2:4", 0.5),
    ("4:8", 0.5),
    ("1:4", 0.75),
    ("2:3", 1 / 3),
]


def make_case(num_tokens=60, num_in=24, num_out=7, seed=0):
    """Correlated inputs with channels of different size, and a weight."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    inputs = draw(num_tokens, num_in) @ draw(num_in, num_in) * (1 + 3 * draw(num_in).abs()) + 0.5
    return inputs, draw(num_out, num_in)


def statistics_of(inputs):
    return InputStatistics(inputs.norm(dim=0), inputs.T @ inputs)


def prune(weight, inputs, scope, sparsity):
    return sparsegpt_weight(weight, statistics_of(inputs), sparsity, scope, "weight")


def textbook(weight, inputs, scope, sparsity, block):
    """The paper's algorithm, the slow way; H is twice ours, as the paper has it."""
    num_out, num_in = weight.shape
    hessian = 2 * inputs.T @ inputs
    dead = hessian.diagonal() == 0
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(num_in, dtype=weight.dtype)
    weight, mask = weight.clone(), torch.ones_like(weight, dtype=torch.bool)
    run = int(scope.split(":")[1]) if ":" in scope else block
    for column in range(num_in):
        inverse = torch.linalg.inv(hessian[column:, column:])
        if column % run == 0:
            stop = min(column + run, num_in)
            scores = torch.stack(
                [
                    weight[:, later] ** 2
                    / torch.linalg.inv(hessian[later:, later:])[0, 0]
                    * ~dead[later]
                    for later in range(column, stop)
                ],
                dim=1,
            )
            groups = scores.reshape(1, -1) if scope == "matrix" else scores
            size = num_out if scope == "matrix" else 1
            num_zeros = round(sparsity * (size * stop)) - round(sparsity * (size * column))
            chosen = torch.ones_like(groups, dtype=torch.bool)
            for group, scores_of_group in zip(chosen, groups, strict=True):
                group[scores_of_group.sort().indices[:num_zeros]] = False
            mask[:, column:stop] = chosen.reshape(num_out, stop - column)
        for row in range(num_out):
            if not mask[row, column]:
                weight[row, column:] -= weight[row, column] / inverse[0, 0] * inverse[0]
    return mask, weight * mask


@pytest.mark.parametrize("block", [1, 5, 8, 128])
@pytest.mark.parametrize(("scope", "sparsity"), TARGETS)
def test_masks_and_weights_are_the_textbooks(monkeypatch, scope, sparsity, block):
    monkeypatch.setattr("pipeline.pruning.sparsegpt.BLOCK_COLUMNS", block)
    inputs, weight = make_case()
    mask, new_weight = prune(weight, inputs, scope, sparsity)
    expected_mask, expected_weight = textbook(weight, inputs, scope, sparsity, block)
    assert torch.equal(mask, expected_mask)
    torch.testing.assert_close(new_weight, expected_weight, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(("scope", "sparsity"), [("matrix", 0.6), ("row", 0.6), ("2:4", 0.5)])
def test_more_columns_than_a_block_in_fp32(scope, sparsity):
    inputs, weight = make_case(400, 152, 6)
    mask, new_weight = prune(weight.float(), inputs, scope, sparsity)
    expected_mask, expected_weight = textbook(
        weight.float().double(), inputs, scope, sparsity, block=128
    )
    assert new_weight.dtype == torch.float32
    assert torch.equal(mask, expected_mask)
    torch.testing.assert_close(new_weight.double(), expected_weight, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sparsity", [0.0, 0.123, 0.5, 0.777, 0.99])
@pytest.mark.parametrize("scope", ["matrix", "row"])
def test_the_number_of_zeros_is_exact_over_many_blocks(monkeypatch, scope, sparsity):
    monkeypatch.setattr("pipeline.pruning.sparsegpt.BLOCK_COLUMNS", 7)
    inputs, weight = make_case(num_in=53, num_out=9)
    mask, new_weight = prune(weight, inputs, scope, sparsity)
    assert torch.equal(new_weight != 0, mask)
    if scope == "row":
        assert ((~mask).sum(1) == round(sparsity * 53)).all()
    else:
        assert int((~mask).sum()) == round(sparsity * 53 * 9)


def test_one_weight_in_two_by_hand():
    # H = [[2, 1], [1, 2]] up to the damping; without it pruning w_1 = 1 moves w_2 by 1/2.
    moment = torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
    statistics = InputStatistics(moment.diagonal().sqrt(), moment)
    weight = torch.tensor([[1.0, 10.0]], dtype=torch.float64)
    mask, new_weight = sparsegpt_weight(weight, statistics, 0.5, "matrix", "weight")
    assert mask.tolist() == [[False, True]]
    assert new_weight[0].tolist() == pytest.approx([0.0, 10.0 + 1.0 / 2.02])


@pytest.mark.parametrize("block", [1, 3, 512])
def test_the_factor_of_the_inverse(monkeypatch, block):
    monkeypatch.setattr("pipeline.pruning.hessian.BLOCK_INPUTS", block)
    inputs, _ = make_case()
    hessian = damped_hessian(inputs.T @ inputs)
    expected = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    factor = inverse_factor(hessian)
    torch.testing.assert_close(factor, expected, rtol=1e-8, atol=1e-10)
    assert torch.equal(factor, factor.triu())


@pytest.mark.parametrize(("scope", "sparsity"), [("matrix", 0.6), ("row", 0.6), ("2:4", 0.5)])
def test_the_output_is_closer_than_with_the_mask_alone(scope, sparsity):
    inputs, weight = make_case()
    mask, new_weight = prune(weight, inputs, scope, sparsity)
    alone = (inputs @ (weight * mask - weight).T).norm()
    assert (inputs @ (new_weight - weight).T).norm() < 0.8 * alone


@pytest.mark.parametrize(
    "kind", ["one_token", "few_tokens", "constant", "repeated_channel", "tiny"]
)
@pytest.mark.parametrize(("scope", "sparsity"), [("matrix", 0.7), ("row", 0.7), ("2:4", 0.5)])
def test_rank_deficient_inputs(scope, sparsity, kind):
    inputs, weight = make_case()
    if kind in ("one_token", "few_tokens"):
        inputs = inputs[: 1 if kind == "one_token" else 5]
    elif kind == "constant":
        inputs = torch.full_like(inputs, 0.5)
    elif kind == "repeated_channel":
        inputs[:, 1::2] = inputs[:, ::2]
    else:
        inputs = inputs * 1e-12
    mask, new_weight = prune(weight, inputs, scope, sparsity)
    expected_mask, expected_weight = textbook(weight, inputs, scope, sparsity, block=128)
    assert torch.equal(mask, expected_mask)
    torch.testing.assert_close(new_weight, expected_weight, rtol=1e-6, atol=1e-7)
    mask, new_weight = prune(weight.float(), inputs.float(), scope, sparsity)
    assert new_weight.isfinite().all()
    assert torch.equal(new_weight != 0, mask)


@pytest.mark.parametrize("scope", ["matrix", "row"])
def test_weights_of_dead_inputs_go_first_and_the_rest_is_as_without_them(scope):
    inputs, weight = make_case()
    inputs[:, [3, 4, 17]] = 0.0
    weight[:, [3, 4, 17]] *= 1e3  # which damping alone would keep
    mask, new_weight = prune(weight, inputs, scope, 0.5)
    assert not mask[:, [3, 4, 17]].any()
    expected_mask, expected_weight = textbook(weight, inputs, scope, 0.5, block=128)
    assert torch.equal(mask, expected_mask)
    torch.testing.assert_close(new_weight, expected_weight, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("scope", ["matrix", "2:4"])
def test_without_any_input_kept_weights_stay(scope):
    inputs, weight = make_case()
    mask, new_weight = prune(weight, 0 * inputs, scope, 0.5)
    assert int(mask.sum()) == weight.numel() // 2
    assert torch.equal(new_weight, weight * mask)
    if scope == "matrix":
        assert weight.abs()[mask].min() >= weight.abs()[~mask].max()


@pytest.mark.parametrize("num_out", [1, 7])
def test_the_dense_weight_and_the_statistics_are_left_alone(num_out):
    inputs, weight = make_case(num_out=num_out)
    statistics, dense = statistics_of(inputs), weight.clone()
    moment = statistics.second_moment.clone()
    first = sparsegpt_weight(weight, statistics, 0.5, "matrix", "weight")
    again = sparsegpt_weight(weight, statistics, 0.5, "matrix", "weight")
    assert torch.equal(weight, dense)
    assert torch.equal(statistics.second_moment, moment)
    assert torch.equal(first[1], again[1])
