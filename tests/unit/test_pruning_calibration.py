"""The calibration loop and the calibration movement against plain whole-model runs."""

import weakref

import pytest
import torch

from pipeline.errors import UserError
from pipeline.models.prunable import prunable_weights
from pipeline.pruning.batches import calibration_batches
from pipeline.pruning.calibration import calibrate
from pipeline.pruning.calibration_movement import calibration_movement
from pipeline.pruning.input_statistics import NEEDS, InputSums
from pipeline.pruning.layer_steps import SHARED_INPUT_GROUPS, layer_steps
from tests.unit.pruning_models import PAD, make_batches, make_model, make_rows


def collect(model, batches, needs="cross_moment"):
    statistics = {}
    calibrate(model, batches, lambda name, _, found: statistics.update({name: found}), needs)
    return statistics


@torch.no_grad()
def plain_inputs(model, name):
    """(tokens, in) inputs of one linear layer, each sequence run alone through the whole model."""
    captured = []
    module = model.get_submodule(name.removesuffix(".weight"))
    handle = module.register_forward_pre_hook(lambda _, inputs: captured.append(inputs[0][0]))
    for prompt, completion in zip(*make_rows(), strict=True):
        model(torch.tensor([prompt + completion]))
    handle.remove()
    return torch.cat(captured)


def test_batches_are_left_padded_and_score_the_completion_only():
    first, second = calibration_batches(
        [[5, 6, 7], [8], [9]], [[1, 2], [3], [4, 4]], pad_token_id=PAD, batch_size=2
    )
    assert first.input_ids.tolist() == [[5, 6, 7, 1, 2], [0, 0, 0, 8, 3]]
    assert first.attention_mask.tolist() == [[1, 1, 1, 1, 1], [0, 0, 0, 1, 1]]
    assert first.labels.tolist() == [[-100, -100, -100, 1, 2], [-100, -100, -100, -100, 3]]
    assert second.input_ids.tolist() == [[9, 4, 4]]


@pytest.mark.parametrize(
    ("attention", "dtype"), [("sdpa", torch.float64), ("eager", torch.float32)]
)
@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_statistics_of_an_untouched_model(batch_size, attention, dtype):
    model = make_model(dtype, attn_implementation=attention)
    statistics = collect(model, make_batches(batch_size))
    assert list(statistics) == list(prunable_weights(model))
    for name, found in statistics.items():
        inputs = plain_inputs(model, name).double()
        tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {}
        torch.testing.assert_close(found.second_moment, inputs.T @ inputs, **tolerance)
        torch.testing.assert_close(found.cross_moment, inputs.T @ inputs, **tolerance)
        torch.testing.assert_close(found.input_norm, inputs.norm(dim=0), **tolerance)


def test_later_layers_see_earlier_ones_pruned_and_the_dense_stream_does_not():
    model, dense = make_model(), make_model()
    statistics = {}

    def halve_weights(name, module, found):
        statistics[name] = found
        module.weight[:, ::2] = 0.0

    calibrate(model, make_batches(), halve_weights, "cross_moment")
    for name, found in statistics.items():
        # The pruned model's own inputs: what came before this layer was pruned when it was visited.
        pruned_inputs, dense_inputs = plain_inputs(model, name), plain_inputs(dense, name)
        torch.testing.assert_close(found.second_moment, pruned_inputs.T @ pruned_inputs)
        torch.testing.assert_close(found.cross_moment, pruned_inputs.T @ dense_inputs)


@pytest.mark.parametrize("needs", NEEDS)
def test_only_what_is_needed_is_computed_in_one_forward_pass_a_stream(needs):
    model, calls = make_model(), []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.register_forward_hook(lambda *_, name=name: calls.append(name))
    everything = collect(model, make_batches())
    calls.clear()
    batches = make_batches()
    found = collect(model, batches, needs)
    num_streams = 2 if needs == "cross_moment" else 1  # hooks are copied with the dense layer
    for name in prunable_weights(model):
        assert calls.count(name.removesuffix(".weight")) == num_streams * len(batches)
        for field in NEEDS:
            computed = getattr(found[name], field)
            if NEEDS.index(field) <= NEEDS.index(needs):
                torch.testing.assert_close(computed, getattr(everything[name], field))
            else:
                assert computed is None


def test_statistics_of_one_input_exist_at_a_time(monkeypatch):
    made, left = [], []

    class Watched(InputSums):
        def __init__(self, *arguments):
            left.append(sum(reference() is not None for reference in made))
            super().__init__(*arguments)

    monkeypatch.setattr("pipeline.pruning.calibration.InputSums", Watched)
    visit = lambda name, module, found: made.append(weakref.ref(found))  # noqa: E731
    calibrate(make_model(), make_batches(), visit, "cross_moment")
    assert len(made) == 14
    assert left == [0] * 8


@pytest.mark.parametrize(
    "changes",
    [
        {"attn_implementation": "sdpa", "attention_bias": True, "mlp_bias": True},
        {"attn_implementation": "eager", "num_key_value_heads": 1, "head_dim": 16},
    ],
)
def test_the_steps_of_a_layer_are_its_forward(changes):
    model = make_model(torch.float32, **changes)
    layer, captured = model.model.layers[0], {}
    for group in SHARED_INPUT_GROUPS:
        for name in group:
            layer.get_submodule(name).register_forward_pre_hook(
                lambda _, inputs, name=name: captured.setdefault(name, inputs[0])
            )
    hidden = torch.randn(3, 5, 32)
    positions = torch.arange(5)[None]
    arguments = {
        "attention_mask": torch.zeros(3, 1, 5, 5),
        "position_ids": positions,
        "position_embeddings": model.model.rotary_emb(hidden, position_ids=positions),
    }
    with torch.no_grad():
        expected = layer(hidden, **arguments)
        *inputs, output = layer_steps(layer, hidden, arguments)
    assert torch.equal(output, expected)
    for group, found in zip(SHARED_INPUT_GROUPS, inputs, strict=True):
        assert all(torch.equal(found, captured[name]) for name in group)


def test_not_finite_activations_are_refused_by_name():
    model = make_model()
    model.model.layers[1].input_layernorm.weight.data[0] = float("inf")
    with pytest.raises(UserError, match=r"layers\.1\.self_attn\.q_proj\.weight is not finite"):
        collect(model, make_batches())


def test_an_empty_calibration_set_is_refused():
    with pytest.raises(UserError, match=r"task\.num_calibration"):
        collect(make_model(), [])


@pytest.mark.parametrize("batch_size", [1, 3, 100])
@pytest.mark.parametrize("tied", [True, False])
def test_movement_is_the_sum_of_each_sequences_absolute_gradient_times_weight(batch_size, tied):
    model = make_model(tie_word_embeddings=tied)
    expected = {name: torch.zeros_like(w) for name, w in prunable_weights(model).items()}
    for prompt, completion in zip(*make_rows(), strict=True):
        ids = torch.tensor([prompt + completion])
        labels = torch.tensor([[-100] * len(prompt) + completion])
        model.zero_grad()
        # The model's own loss is a mean over scored tokens.
        (model(ids, labels=labels).loss * len(completion)).backward()
        for name, weight in prunable_weights(model).items():
            expected[name] += (weight.grad * weight).abs().detach()
    found = calibration_movement(model, make_batches(batch_size))
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(found[name].double(), expected[name], rtol=1e-5, atol=1e-6)


def test_movement_leaves_gradients_and_flags_alone():
    model = make_model()
    model.requires_grad_(False)
    model.lm_head.weight.requires_grad_(True)
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    calibration_movement(model, make_batches())
    assert [n for n, p in model.named_parameters() if p.grad is not None] == ["lm_head.weight"]
    assert torch.equal(model.lm_head.weight.grad, torch.ones_like(model.lm_head.weight))
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["lm_head.weight"]


def test_movement_without_completion_tokens_is_refused():
    batches = calibration_batches([[5, 6]], [[]], pad_token_id=PAD, batch_size=1)
    with pytest.raises(UserError, match="no completion tokens"):
        calibration_movement(make_model(), batches)
