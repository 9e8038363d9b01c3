"""Rates of single matrices: OWL against a textbook version, the search against what it promises."""

import math
import random

import pytest
import torch

from pipeline.errors import UserError
from pipeline.models.prunable import prunable_weights
from pipeline.pruning.allocation import (
    MIN_DENSITY_SHARE,
    owl_rates,
    rates_by_outliers,
    uniform_rates,
)
from pipeline.pruning.allocation_levels import LevelSpace
from pipeline.pruning.allocation_search import search_rates
from pipeline.pruning.batches import IGNORED_LABEL, CalibrationBatch
from pipeline.pruning.dense_kl import DenseKl
from pipeline.pruning.matrix_pruner import MatrixPruner
from tests.unit.pruning_models import make_batches, make_model, make_rows

MAGNITUDE = MatrixPruner("magnitude", "matrix", "none")


def weights_of(model):
    return {name: weight.detach().clone() for name, weight in prunable_weights(model).items()}


def mean_rate(rates, model):
    sizes = {name: weight.numel() for name, weight in prunable_weights(model).items()}
    return sum(rate * sizes[name] for name, rate in rates.items()) / sum(sizes.values())


def with_outliers(model):
    """Each layer has another number of large weights."""
    with torch.no_grad():
        for index, layer in enumerate(model.model.layers):
            layer.mlp.up_proj.weight.view(-1)[: 7 * (index + 1)] *= 30
    return model


@torch.no_grad()
def textbook_inputs(model):
    """Name to (tokens, in) inputs of every linear layer, one sequence at a time."""
    seen = {name: [] for name in prunable_weights(model)}
    hooks = [
        model.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(
            lambda _, inputs, name=name: seen[name].append(inputs[0][0])
        )
        for name in seen
    ]
    for prompt, completion in zip(*make_rows(), strict=True):
        model(torch.tensor([prompt + completion]))
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(inputs) for name, inputs in seen.items()}


def textbook_owl(model, sparsity, factor, deviation):
    """The formula of the paper, layer by layer; sums in plain Python."""
    inputs, weights = textbook_inputs(model), weights_of(model)
    ratios, sizes = [], []
    for index in range(model.config.num_hidden_layers):
        scores = torch.cat(
            [
                (weight.abs() * inputs[name].square().sum(0).sqrt()).flatten()
                for name, weight in weights.items()
                if name.startswith(f"model.layers.{index}.")
            ]
        )
        ratios.append((scores > factor * scores.mean()).double().mean().item())
        sizes.append(len(scores))
    mean = sum(d * n for d, n in zip(ratios, sizes, strict=True)) / sum(sizes)
    largest = max(abs(d - mean) for d in ratios)
    return [sparsity - deviation * (d - mean) / largest for d in ratios]


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_owl_is_the_textbook(heads):
    model = with_outliers(make_model(num_hidden_layers=4, num_key_value_heads=heads))
    rates = owl_rates(model, make_batches(), 0.6, outlier_factor=4.0, max_deviation=0.1)
    expected = textbook_owl(model, 0.6, 4.0, 0.1)
    assert len(set(expected)) > 2
    assert list(rates) == list(prunable_weights(model))
    for name, rate in rates.items():
        assert rate == pytest.approx(expected[int(name.split(".")[2])], abs=1e-12)


def test_owl_changes_nothing_and_does_not_depend_on_the_cut():
    model = with_outliers(make_model(num_hidden_layers=3))
    before = weights_of(model)
    rates = [owl_rates(model, make_batches(batch_size=size), 0.7) for size in (1, 3, 7)]
    assert rates[0] == rates[1] == rates[2]
    assert all(torch.equal(before[name], w) for name, w in weights_of(model).items())


@pytest.mark.parametrize("sparsity", [0.0, 0.03, 0.5, 0.7, 0.99])
def test_owl_keeps_mean_and_bounds(sparsity):
    model = with_outliers(make_model(num_hidden_layers=4))
    rates = owl_rates(model, make_batches(), sparsity)
    assert mean_rate(rates, model) == pytest.approx(sparsity, abs=1e-14)
    room = min(0.08, sparsity, (1 - sparsity) * (1 - MIN_DENSITY_SHARE))
    furthest = max(abs(rate - sparsity) for rate in rates.values())
    assert furthest == pytest.approx(room, abs=1e-14)
    assert all(0.0 <= rate < 1.0 for rate in rates.values())


def test_rates_fall_with_outliers_and_weigh_layers_by_size():
    ratios, sizes = [0.01, 0.04, 0.02], [100, 300, 1000]
    rates = rates_by_outliers(ratios, sizes, 0.7, 0.08)
    assert rates[0] > rates[2] > rates[1]
    assert sum(r * n for r, n in zip(rates, sizes, strict=True)) == pytest.approx(0.7 * 1400)
    assert rates[1] == pytest.approx(0.62)
    assert (rates[0] - rates[2]) / (rates[2] - rates[1]) == pytest.approx(0.5)


def test_equal_layers_are_pruned_alike():
    assert rates_by_outliers([0.1] * 3, [7, 11, 13], 0.7, 0.08) == [0.7] * 3
    weights = prunable_weights(make_model())
    assert uniform_rates(weights, 0.4) == dict.fromkeys(weights, 0.4)


def test_dense_kl_is_the_textbook_and_ignores_the_cut():
    model = make_model()
    prompts, completions = make_rows()
    both = [DenseKl(model, make_batches(batch_size=size)) for size in (2, 7)]
    dense = [model(torch.tensor([p + c])).logits[0] for p, c in zip(*make_rows(), strict=True)]
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(0.3)
    expected, num_tokens = {}, 0
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        old, new = dense[row].softmax(-1), model(torch.tensor([prompt + completion])).logits[0]
        kl = (old * (old.log() - new.log_softmax(-1))).sum(-1)[len(prompt) - 1 : -1]
        expected[row], num_tokens = kl.sum().item(), num_tokens + len(completion)
    for kl in both:
        assert kl.num_tokens == num_tokens
        assert kl.nats(range(7)) == pytest.approx(expected, rel=1e-4)
        assert kl.nats([5, 2]) == pytest.approx({2: expected[2], 5: expected[5]}, rel=1e-4)
    assert min(expected.values()) > 1e-4


def test_the_first_token_and_rows_without_labels_are_not_scored():
    batch = make_batches(batch_size=7)[0]
    labels = torch.where(batch.attention_mask.bool(), batch.input_ids, IGNORED_LABEL)
    labels[3] = IGNORED_LABEL
    kl = DenseKl(make_model(), [CalibrationBatch(batch.input_ids, batch.attention_mask, labels)])
    lengths = batch.attention_mask.sum(1).tolist()
    assert kl.num_rows == 6
    assert kl.num_tokens == sum(lengths) - lengths[3] - 6
    assert set(kl.nats(range(6)).values()) == {0.0}


@pytest.mark.parametrize("sparsity", [0.0, 0.02, 0.5, 0.9, 0.99])
@pytest.mark.parametrize(
    "sizes", [(1, 1, 1, 1), (4, 1, 1, 4, 14, 14, 14), (10, 10, 27, 27, 27), (3, 7, 8)]
)
def test_every_mutant_has_the_wanted_zeros(sizes, sparsity):
    weights = {str(i): torch.empty(100 * size) for i, size in enumerate(sizes)}
    space, rng = LevelSpace.around(weights, sparsity), random.Random(0)
    candidate, seen = space.uniform, set()
    for _ in range(300):
        candidate = space.mutant(candidate, rng) or candidate
        seen.add(candidate)
        rates = space.rates_of(candidate)
        zeros = sum(rate * weights[name].numel() for name, rate in rates.items())
        assert zeros == pytest.approx(sparsity * 100 * sum(sizes), rel=1e-12)
        assert all(0.0 <= rate < 1.0 for rate in rates.values())
    assert (len(seen) == 1) if sparsity == 0 else (len(seen) > 5)
    assert len({candidate[-1] for candidate in seen}) > 1 or sparsity == 0


def search(model, *, pruner=MAGNITUDE, sparsity=0.6, num_evaluations=20, seed=0, batch_size=3):
    return search_rates(
        model,
        make_batches(batch_size=batch_size, num_rows=16),
        pruner,
        sparsity,
        num_evaluations=num_evaluations,
        seed=seed,
    )


def kl_at(model, rates):
    """KL on the calibration rows of the dense model, each matrix cut by magnitude."""
    kl = DenseKl(model, make_batches(num_rows=16))
    with torch.no_grad():
        for name, weight in prunable_weights(model).items():
            zeros = weight.abs().flatten().argsort()[: round(rates[name] * weight.numel())]
            weight.view(-1)[zeros] = 0
    return sum(kl.nats(range(kl.num_rows)).values()) / kl.num_tokens


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.99])
def test_search_keeps_its_promises(sparsity):
    model = make_model(num_hidden_layers=3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = search(model, sparsity=sparsity)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert list(result.rates) == list(prunable_weights(model))
    assert mean_rate(result.rates, model) == pytest.approx(sparsity, abs=1e-14)
    assert 1 <= result.num_evaluations <= 20
    falling = [result.kl_uniform, *result.kl_best]
    assert falling == sorted(falling, reverse=True)
    # What is stitched from the dense model by magnitude is what magnitude pruning makes of it.
    uniform = uniform_rates(result.rates, sparsity)
    assert kl_at(make_model(num_hidden_layers=3), uniform) == pytest.approx(falling[0], rel=1e-4)
    final = kl_at(make_model(num_hidden_layers=3), result.rates)
    assert final == pytest.approx(falling[-1], rel=1e-4)
    assert final < 0.95 * falling[0] or sparsity == 0


def test_search_prunes_a_layer_without_effect():
    model = make_model()
    idle = model.model.layers[0]
    with torch.no_grad():
        idle.self_attn.o_proj.weight.mul_(1e-5)
        idle.mlp.down_proj.weight.mul_(1e-5)
    result = search(model, num_evaluations=40)
    first, second = (
        {name: rate for name, rate in result.rates.items() if f"layers.{layer}." in name}
        for layer in range(2)
    )
    sizes = {name: weight.numel() for name, weight in prunable_weights(model).items()}
    mean = sum(rate * sizes[name] for name, rate in first.items()) / sum(map(sizes.get, first))
    assert mean > 0.75
    assert max(second.values()) <= 0.6
    assert result.kl_best[-1] < 0.4 * result.kl_uniform


@pytest.mark.parametrize("num_evaluations", [1, 2, 3, 7])
def test_budget_counts_every_row(num_evaluations, monkeypatch):
    rows = []
    nats = DenseKl.nats
    monkeypatch.setattr(DenseKl, "nats", lambda self, part: rows.extend(part) or nats(self, part))
    result = search(make_model(), num_evaluations=num_evaluations)
    assert result.num_evaluations == len(rows) / 16 <= num_evaluations
    assert num_evaluations - result.num_evaluations < 1
    assert bool(result.kl_best) == (num_evaluations > 1)


def test_search_repeats_itself_and_hears_the_seed():
    model = make_model()
    first, again, other = search(model), search(model), search(model, seed=1)
    assert first == again
    assert first.rates != other.rates
    assert search(model, batch_size=16).rates == first.rates


@pytest.mark.parametrize(
    "pruner",
    [
        MatrixPruner("wanda", "row", "none"),
        MatrixPruner("magnitude", "matrix", "least_squares"),
        MatrixPruner("sparsegpt", "matrix", "none"),
    ],
)
def test_search_with_any_pruner_and_biases(pruner):
    model = make_model(attention_bias=True, mlp_bias=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = search(model, pruner=pruner, num_evaluations=12)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert result.kl_best[-1] < result.kl_uniform
    balanced = pruner.redistribution != "none"
    assert result.kl_uniform < (0.5 if balanced else math.inf)


def test_weights_come_back_after_an_exception(monkeypatch):
    model, calls, nats = make_model(), [], DenseKl.nats

    def fail_later(self, rows):
        calls.append(1)
        if len(calls) == 5:
            raise RuntimeError("no memory")
        return nats(self, rows)

    before = weights_of(model)
    monkeypatch.setattr(DenseKl, "nats", fail_later)
    with pytest.raises(RuntimeError, match="no memory"):
        search(model)
    assert all(torch.equal(before[name], w) for name, w in weights_of(model).items())


def test_a_broken_candidate_never_wins():
    class Broken(MatrixPruner):
        def __call__(self, name, module, statistics, sparsity):
            mask, weight = super().__call__(name, module, statistics, sparsity)
            return mask, weight if sparsity == 0.6 else weight * math.nan

    result = search(make_model(), pruner=Broken("magnitude", "matrix", "none"))
    assert set(result.rates.values()) == {0.6}
    assert result.kl_best[-1] == result.kl_uniform < math.inf


def test_bad_input_is_named():
    with pytest.raises(UserError, match=r"prune\.search_evaluations: 0"):
        search(make_model(), num_evaluations=0)
    unscored = [
        batch._replace(labels=torch.full_like(batch.labels, IGNORED_LABEL))
        for batch in make_batches()
    ]
    with pytest.raises(UserError, match=r"calibration\.source"):
        search_rates(make_model(), unscored, MAGNITUDE, 0.5, num_evaluations=2, seed=0)
