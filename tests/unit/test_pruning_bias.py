"""Biases: never pruned, and one more kept weight of the redistribution."""

import pytest
import torch

from pipeline.models.prunable import decoder_layers, prunable_modules
from pipeline.pruning.batches import calibration_batches
from pipeline.pruning.calibration import calibrate
from pipeline.pruning.hessian import DAMPING
from pipeline.pruning.input_statistics import InputSums
from pipeline.pruning.methods import prune_model
from pipeline.pruning.redistribution import balanced_bias, redistribute
from tests.unit.pruning_models import PAD, make_batches, make_model, make_rows


def streams(num_tokens=40, num_inputs=6, seed=0):
    """Inputs of a pruned and of a dense layer, both with means far from 0."""
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(num_tokens, num_inputs, generator=generator, dtype=torch.float64) + 2
    noise = torch.randn(num_tokens, num_inputs, generator=generator, dtype=torch.float64)
    return dense + 0.3 * noise - 0.5, dense


def statistics_of(pruned, dense, num_parts=3):
    sums = InputSums("cross_moment", has_bias=True)
    for parts in zip(pruned.chunk(num_parts), dense.chunk(num_parts), strict=True):
        sums.add(*parts)
    return sums.statistics()


def test_weights_and_bias_together_are_the_damped_least_squares_solution():
    pruned, dense = streams()
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    bias = torch.randn(4, generator=generator, dtype=torch.float64)
    mask = torch.rand(4, 6, generator=generator) < 0.5
    statistics = statistics_of(pruned, dense)
    new_weight = redistribute(weight, mask, "least_squares", statistics.centred)
    new_bias = balanced_bias(bias, weight, new_weight, statistics)

    expected = solve_with_bias(pruned, dense @ weight.T + bias, weight, mask)
    torch.testing.assert_close((new_weight, new_bias), expected)


def solve_with_bias(inputs, target, weight, mask):
    """Weights (out, in) and biases (out,) by lstsq, row by row; the bias is not damped."""
    damp = (DAMPING * len(inputs) * inputs.var(0, correction=0).mean()).sqrt()
    new_weight, new_bias = torch.zeros_like(weight), torch.zeros_like(weight[:, 0])
    for row, kept in enumerate(mask):
        # Unknowns: the kept weights, then the bias.
        system = torch.cat([inputs[:, kept], torch.ones_like(inputs[:, :1])], 1)
        pull = damp * torch.eye(int(kept.sum()), 1 + int(kept.sum()), dtype=inputs.dtype)
        right = torch.cat([target[:, row], damp * weight[row, kept]])
        solution = torch.linalg.lstsq(torch.cat([system, pull]), right[:, None]).solution[:, 0]
        new_weight[row, kept], new_bias[row] = solution[:-1], solution[-1]
    return new_weight, new_bias


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


@pytest.mark.parametrize(
    ("scope", "redistribution"),
    [("matrix", "least_squares"), ("model", "least_squares"), ("matrix", "admm")],
)
@torch.no_grad()
def test_the_first_matrix_of_a_model_is_solved_together_with_its_bias(scope, redistribution):
    model, dense = biased_model(), decoder_layers(biased_model())[0].self_attn.q_proj
    first = decoder_layers(model)[0]
    ids = torch.tensor([token for p, c in zip(*make_rows(), strict=True) for token in p + c])
    inputs = first.input_layernorm(model.model.embed_tokens(ids))
    masks = prune_model(
        model,
        make_batches(),
        method="magnitude",
        sparsity=0.6,
        scope=scope,
        redistribution=redistribution,
    )
    mask = masks["model.layers.0.self_attn.q_proj.weight"]
    expected = solve_with_bias(inputs, dense(inputs), dense.weight, mask)
    found = first.self_attn.q_proj
    torch.testing.assert_close((found.weight.data, found.bias.data), expected)


@pytest.mark.parametrize("method", ["magnitude", "sparsegpt"])
def test_without_redistribution_biases_stay(method):
    model = biased_model()
    before = biases_of(model)
    prune_model(model, make_batches(), method=method, sparsity=0.6)
    assert all(torch.equal(a, b) for a, b in zip(before, biases_of(model), strict=True))


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_moments_about_the_means_are_those_of_the_tokens(batch_size):
    model, found, inputs = biased_model(), {}, {}
    hooks = [
        module.register_forward_pre_hook(
            lambda module, given: inputs.setdefault(module, []).append(given[0][0])
        )
        for layer in decoder_layers(model)
        for module in prunable_modules(layer).values()
    ]
    with torch.no_grad():
        for prompt, completion in zip(*make_rows(), strict=True):
            model(torch.tensor([prompt + completion]))
    for hook in hooks:
        hook.remove()
    calibrate(
        model, make_batches(batch_size), lambda _, m, seen: found.update({m: seen}), "cross_moment"
    )
    for module, statistics in found.items():
        tokens = torch.cat(inputs[module])
        centred = tokens - tokens.mean(0)
        torch.testing.assert_close(statistics.second_moment, tokens.T @ tokens)
        torch.testing.assert_close(statistics.pruned_mean, tokens.mean(0))
        for moment in (statistics.centred.second_moment, statistics.centred.cross_moment):
            torch.testing.assert_close(moment, centred.T @ centred)


@pytest.mark.parametrize("num_tokens", [1, 4])
@pytest.mark.parametrize(
    ("method", "redistribution"),
    [
        ("mama", "admm"),
        ("alps", "least_squares"),
        ("sparsegpt", "none"),
        ("magnitude", "least_squares"),
        ("magnitude", "proportional"),
    ],
)
def test_inputs_that_do_not_vary(method, redistribution, num_tokens):
    """In fp32, where moments less their means would be rounding errors."""
    model = biased_model().float()
    batches = calibration_batches(
        [[5]] * num_tokens, [[]] * num_tokens, pad_token_id=PAD, batch_size=1
    )
    dense = model(torch.tensor([[5]])).logits
    masks = prune_model(
        model,
        batches,
        method=method,
        sparsity=0.6,
        redistribution=redistribution,
        movement=False,
    )
    for layer in decoder_layers(model):
        for module in prunable_modules(layer).values():
            assert module.weight.isfinite().all()
            assert module.bias.isfinite().all()
    for name, mask in masks.items():
        assert torch.equal(model.get_parameter(name) != 0, mask)
    if redistribution != "none":  # the biases hold the one output there is
        torch.testing.assert_close(model(torch.tensor([[5]])).logits, dense, rtol=1e-3, atol=1e-3)
