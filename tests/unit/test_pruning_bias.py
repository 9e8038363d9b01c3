"""Biases: never pruned, and one more kept weight of the redistribution."""

import pytest
import torch

from pipeline.models.prunable import decoder_layers, prunable_modules
from pipeline.pruning.calibration import InputStatistics, calibrate
from pipeline.pruning.hessian import damping
from pipeline.pruning.methods import prune_model
from pipeline.pruning.redistribution import balanced_bias, redistribute
from tests.unit.pruning_models import make_batches, make_model


def streams(num_tokens=40, num_inputs=6, seed=0):
    """Inputs of a pruned and of a dense layer, both with means far from 0."""
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(num_tokens, num_inputs, generator=generator, dtype=torch.float64) + 2
    noise = torch.randn(num_tokens, num_inputs, generator=generator, dtype=torch.float64)
    return dense + 0.3 * noise - 0.5, dense


def statistics_of(pruned, dense):
    return InputStatistics(
        pruned.norm(dim=0),
        pruned.T @ pruned,
        pruned.T @ dense,
        pruned.mean(0),
        dense.mean(0),
        len(pruned),
    )


def test_weights_and_bias_together_are_the_damped_least_squares_solution():
    pruned, dense = streams()
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    bias = torch.randn(4, generator=generator, dtype=torch.float64)
    mask = torch.rand(4, 6, generator=generator) < 0.5
    statistics = statistics_of(pruned, dense)
    new_weight = redistribute(weight, mask, "least_squares", statistics.centred)
    new_bias = balanced_bias(bias, weight, new_weight, statistics)

    damp = damping(statistics.centred.second_moment).sqrt()
    target = dense @ weight.T + bias
    for row in range(4):
        kept = mask[row]
        # Unknowns: the kept weights, then the bias, which is not damped.
        system = torch.cat([pruned[:, kept], torch.ones(len(pruned), 1)], 1)
        pull = torch.cat([damp * torch.eye(int(kept.sum())), torch.zeros(int(kept.sum()), 1)], 1)
        right = torch.cat([target[:, row], damp * weight[row, kept]])
        solution = torch.linalg.lstsq(torch.cat([system, pull]), right[:, None]).solution[:, 0]
        torch.testing.assert_close(new_weight[row, kept], solution[:-1])
        torch.testing.assert_close(new_bias[row], solution[-1])


@pytest.mark.parametrize("kind", ["proportional", "least_squares"])
def test_mean_output_stays_dense(kind):
    pruned, dense = streams(seed=3)
    weight = torch.randn(5, 6, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    bias = torch.arange(5.0, dtype=torch.float64)
    mask = weight.abs() > 0.7
    statistics = statistics_of(pruned, dense)
    new_weight = redistribute(weight, mask, kind, statistics.centred)
    new_bias = balanced_bias(bias, weight, new_weight, statistics)
    mean = (pruned @ new_weight.T + new_bias).mean(0)
    torch.testing.assert_close(mean, (dense @ weight.T + bias).mean(0))


def biased_model():
    model = make_model(attention_bias=True, mlp_bias=True)
    generator = torch.Generator().manual_seed(2)
    for layer in decoder_layers(model):
        for module in prunable_modules(layer).values():
            module.bias.data.normal_(generator=generator)
    return model


def biases_of(model):
    return [
        module.bias.detach().clone()
        for layer in decoder_layers(model)
        for module in prunable_modules(layer).values()
    ]


@pytest.mark.parametrize("scope", ["matrix", "model"])
@pytest.mark.parametrize("method", ["magnitude", "mama"])
def test_mean_outputs_of_a_pruned_model_stay_dense(method, scope):
    """Fails where the bias is solved on other moments than the weights."""
    means = {}
    for pruned in (False, True):
        model = biased_model()
        if pruned:
            prune_model(
                model,
                make_batches(),
                method=method,
                sparsity=0.6,
                scope=scope,
                redistribution="least_squares",
            )
        means[pruned] = {}

        def visit(name, module, statistics, found=means[pruned]):
            found[name] = module(statistics.pruned_mean)

        calibrate(model, make_batches(), visit, "cross_moment")
    for name, mean in means[False].items():
        torch.testing.assert_close(means[True][name], mean)


@pytest.mark.parametrize("method", ["magnitude", "sparsegpt"])
def test_without_redistribution_biases_stay(method):
    model = biased_model()
    before = biases_of(model)
    prune_model(model, make_batches(), method=method, sparsity=0.6)
    assert all(torch.equal(a, b) for a, b in zip(before, biases_of(model), strict=True))
