"""Entropy of the residual stream against numpy's histogram, and which blocks are dropped for it."""

import re
import weakref
from itertools import pairwise

import numpy as np
import pytest
import torch

from pipeline.errors import UserError
from pipeline.models.prunable import apply_masks, measured_sparsity, prunable_weights
from pipeline.pruning.block_entropy import NUM_BINS, block_masks, entropy_increases
from pipeline.pruning.calibration import real_tokens
from tests.unit.pruning_models import make_batches, make_model, make_rows

BLOCKS = [f"model.layers.{i}.{block}" for i in range(2) for block in ("self_attn", "mlp")]


@torch.no_grad()
def residual_states(model):
    """The residual stream (tokens, hidden) before the first block and after each block."""
    captured = {}
    handles = []
    layers = model.model.layers
    points = [norm for x in layers for norm in (x.input_layernorm, x.post_attention_layernorm)]
    for number, module in enumerate([*points, model.model.norm]):
        handles.append(
            module.register_forward_pre_hook(
                lambda _, inputs, n=number: captured.setdefault(n, []).append(inputs[0][0])
            )
        )
    for prompt, completion in zip(*make_rows(), strict=True):
        model(torch.tensor([prompt + completion]))
    for handle in handles:
        handle.remove()
    return [torch.cat(captured[number]).numpy() for number in sorted(captured)]


def numpy_increase(before, after):
    """Channel by channel, both states in the same bins."""
    increases = []
    for old, new in zip(before.T, after.T, strict=True):
        both = np.concatenate([old, new])
        entropies = []
        for values in (old, new):
            counts, _ = np.histogram(values, NUM_BINS, range=(both.min(), both.max()))
            p = counts[counts > 0] / len(values)
            entropies.append(-(p * np.log(p)).sum())
        increases.append(entropies[1] - entropies[0])
    return np.mean(increases)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
@pytest.mark.parametrize("changes", [{}, {"attention_bias": True, "mlp_bias": True}])
def test_increases_are_those_of_a_plain_histogram(batch_size, changes):
    model = make_model(**changes)
    states = residual_states(model)
    found = entropy_increases(model, make_batches(batch_size))
    assert list(found) == BLOCKS
    for value, pair in zip(found.values(), pairwise(states), strict=True):
        assert value == pytest.approx(numpy_increase(*pair), abs=1e-12)


@pytest.mark.parametrize("planted", ["self_attn.o_proj", "mlp.down_proj"])
@pytest.mark.parametrize("layer", [0, 1])
def test_a_planted_identity_block_adds_nothing_and_is_dropped_first(planted, layer):
    model = make_model()
    model.model.layers[layer].get_submodule(planted).weight.data.zero_()
    block = f"model.layers.{layer}.{planted.split('.')[0]}"
    increases = entropy_increases(model, make_batches())
    assert increases.pop(block) == 0.0
    assert min(increases.values()) > 0.0
    share = 0.2 if "attn" in planted else 0.3
    for name, mask in block_masks(model, make_batches(), share).items():
        assert mask.any() == mask.all() == (not name.startswith(f"{block}."))


def test_a_channel_that_never_changes_has_no_entropy():
    model = make_model()
    model.model.embed_tokens.weight.data[:, 5] = 1.0
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data[5] = layer.mlp.down_proj.weight.data[5] = 0.0
    states = residual_states(model)
    assert all((state[:, 5] == 1.0).all() for state in states)
    found = entropy_increases(model, make_batches())
    assert found[BLOCKS[0]] == pytest.approx(numpy_increase(states[0], states[1]), abs=1e-12)


def test_blocks_go_in_order_and_the_nearest_total_is_taken():
    dense = make_model()
    increases = entropy_increases(dense, make_batches())
    order = sorted(increases, key=increases.get)
    share = {block: 0.2 if "attn" in block else 0.3 for block in order}  # 3072 and 4608 of 15360
    totals = [sum(share[block] for block in order[:n]) for n in (1, 2, 3)]
    for sparsity in (*np.arange(totals[0], totals[-1], 0.06), totals[-1]):
        masks = block_masks(dense, make_batches(), float(sparsity))
        assert list(masks) == list(prunable_weights(dense))
        dropped = {name.rsplit(".", 2)[0] for name, mask in masks.items() if not mask.all()}
        assert dropped == set(order[: len(dropped)])
        assert all(mask.any() == mask.all() for mask in masks.values())
        pruned = make_model()
        apply_masks(pruned, masks)
        reached = measured_sparsity(pruned)[0]
        assert reached == pytest.approx(totals[len(dropped) - 1])
        assert all(abs(reached - sparsity) <= abs(t - sparsity) + 1e-9 for t in totals)


def test_a_dropped_block_lets_the_residual_pass():
    model = make_model()
    masks = block_masks(model, make_batches(), 0.5)
    apply_masks(model, masks)
    dropped = {name.rsplit(".", 2)[0] for name, mask in masks.items() if not mask.any()}
    assert dropped
    for block, (before, after) in zip(BLOCKS, pairwise(residual_states(model)), strict=True):
        assert np.array_equal(before, after) == (block in dropped)


def test_zero_keeps_everything_without_calibration():
    assert all(mask.all() for mask in block_masks(make_model(), [], 0.0).values())


@pytest.mark.parametrize("sparsity", [0.05, 0.95])
def test_what_whole_blocks_cannot_reach_is_refused_with_the_nearest_value(sparsity):
    model = make_model()
    with pytest.raises(UserError, match=rf"prune\.sparsity: {sparsity}: .*set a value") as error:
        block_masks(model, make_batches(), sparsity)
    smallest, largest = map(
        float, re.search(r"reaches ([\d.]+) to ([\d.]+)", str(error.value)).groups()
    )
    nearest = smallest if sparsity < 0.5 else largest
    masks = block_masks(model, make_batches(), nearest)
    zeros = sum(int((~mask).sum()) for mask in masks.values())
    assert zeros / sum(mask.numel() for mask in masks.values()) == pytest.approx(nearest, abs=1e-4)


def test_model_is_left_as_it_was():
    model = make_model(torch.float32)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    block_masks(model, make_batches(), 0.5)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_unfit_calibration_is_refused():
    with pytest.raises(UserError, match=r"task\.num_calibration"):
        block_masks(make_model(), [], 0.5)
    model = make_model()
    model.model.layers[1].input_layernorm.weight.data[0] = float("inf")
    with pytest.raises(UserError, match=r"model\.layers\.1\.self_attn is not finite"):
        block_masks(model, make_batches(), 0.5)


def test_hidden_states_of_one_batch_exist_at_a_time(monkeypatch):
    made, most = [], []

    def watched(residual, stream):
        tokens = real_tokens(residual, stream)
        made.append(weakref.ref(tokens))
        most.append(sum(reference() is not None for reference in made))
        return tokens

    monkeypatch.setattr("pipeline.pruning.block_entropy.real_tokens", watched)
    entropy_increases(make_model(), make_batches(batch_size=1))
    assert len(made) == 2 * 3 * 2 * 7, "two passes, three states, two layers, seven batches"
    assert max(most) == 3


def test_tokens_counted_in_parts_are_the_same(monkeypatch):
    expected = entropy_increases(make_model(), make_batches())
    monkeypatch.setattr("pipeline.pruning.block_entropy.TOKENS_AT_ONCE", 5)
    assert entropy_increases(make_model(), make_batches()) == expected
