"""SDMPrune's importance against a plain autograd loop, its masks, and the physical cut."""

import copy
import math
import re

import pytest
import torch
from transformers import LlamaForCausalLM

from pipeline.errors import UserError
from pipeline.models.narrow import narrow_llama
from pipeline.models.prunable import apply_masks, measured_sparsity, prunable_weights
from pipeline.pruning import sdmprune
from pipeline.pruning.batches import calibration_batches
from pipeline.pruning.sdmprune import (
    FIRST_CUT_SHARE,
    KL_WEIGHT,
    channel_importance,
    mlp_width,
    sdmprune_masks,
)
from tests.unit.pruning_models import PAD, make_batches, make_model, make_rows

CHANNELS = 48
LIKE_LLAMAS = [
    {"tie_word_embeddings": True},
    {"mlp_bias": True, "attention_bias": True},
    {"num_key_value_heads": 1, "head_dim": 16},
]


def mlp_parts(model, index):
    mlp = model.model.layers[index].mlp
    return mlp.gate_proj, mlp.up_proj, mlp.down_proj


@torch.no_grad()
def cut(model, live):
    """A copy whose dead channels are zeroed in the weights."""
    student = copy.deepcopy(model)
    for index, kept in enumerate(live):
        gate, up, down = mlp_parts(student, index)
        gate.weight.mul_(kept[:, None])
        up.weight.mul_(kept[:, None])
        down.weight.mul_(kept)
    return student


def textbook_importance(model, live):
    """Sequence by sequence, the loss and the three matrices written out."""
    student = cut(model, live)
    total = torch.zeros(live.shape, dtype=torch.float64)
    for prompt, completion in zip(*make_rows(), strict=True):
        ids = torch.tensor([prompt + completion])
        start = len(prompt) - 1
        log_p = student(ids).logits[0, start:-1].log_softmax(-1)
        log_q = model(ids).logits[0, start:-1].log_softmax(-1).detach()
        loss = 0.0
        for t, token in enumerate(completion):
            loss = loss - (1 - KL_WEIGHT) * log_p[t, token]
            loss = loss + KL_WEIGHT * (log_p[t].exp() * (log_p[t] - log_q[t])).sum()
        student.zero_grad()
        loss.backward()
        for index in range(len(live)):
            gate, up, down = (part.weight.grad * part.weight for part in mlp_parts(student, index))
            total[index] += (gate + up + down.T).abs().sum(1).detach() / gate.shape[1]
    return total


def state_of(model):
    return (
        {name: value.clone() for name, value in model.state_dict().items()},
        {name: p.requires_grad for name, p in model.named_parameters()},
        {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()},
        [name for name, m in model.named_modules() if m._forward_pre_hooks or m._forward_hooks],
    )


def assert_same_state(before, after):
    assert before[1] == after[1]
    assert before[3] == after[3]
    for first, second in ((before[0], after[0]), (before[2], after[2])):
        assert first.keys() == second.keys()
        for name, value in first.items():
            assert second[name] is None if value is None else torch.equal(value, second[name])


@pytest.mark.parametrize("changes", LIKE_LLAMAS)
@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_importance_is_the_textbooks(changes, batch_size):
    model = make_model(**changes)
    for num_dead in (0, 10):
        live = torch.ones(2, CHANNELS, dtype=torch.bool)
        live[0, :num_dead] = live[1, 20 : 20 + num_dead] = False
        found = channel_importance(model, make_batches(batch_size), live)
        torch.testing.assert_close(found, textbook_importance(model, live), rtol=1e-6, atol=1e-9)
        assert (found[~live] == 0).all()
        assert (found[live] > 0).all()


def test_masks_are_the_textbooks_two_cuts():
    model, width = make_model(), 16
    live = torch.ones(2, CHANNELS, dtype=torch.bool)
    first = math.ceil(FIRST_CUT_SHARE * (CHANNELS - width))
    assert 0 < first < 8
    for remaining in (CHANNELS - first, width):
        importance = textbook_importance(model, live)
        for layer in range(2):
            alive = [c for c in range(CHANNELS) if live[layer, c]]
            alive.sort(key=lambda c, row=importance[layer]: row[c])
            live[layer, alive[: len(alive) - remaining]] = False
    one_cut = textbook_importance(model, torch.ones_like(live)).argsort()[:, : CHANNELS - width]
    assert not torch.equal(live.logical_not().nonzero()[:, 1], one_cut.sort().values.flatten())

    masks = sdmprune_masks(model, make_batches(), 0.4, width_multiple=8)
    assert list(masks) == list(prunable_weights(model))
    for name, weight in prunable_weights(model).items():
        kept = live[int(name.split(".")[2])]
        expected = torch.ones_like(weight, dtype=torch.bool)
        if "down_proj" in name:
            expected &= kept
        elif "mlp" in name:
            expected &= kept[:, None]
        assert torch.equal(masks[name], expected), name


def test_planted_dead_channels_go_first():
    model = make_model(torch.float32)
    planted = [[3, 7, 11, 20, 21, 30, 40, 47], [0, 1, 2, 9, 25, 33, 41, 46]]
    with torch.no_grad():
        for index, channels in enumerate(planted):
            _, up, down = mlp_parts(model, index)
            down.weight[:, channels[:4]] = 0.0
            up.weight[channels[4:]] = 0.0
    masks = sdmprune_masks(model, make_batches(), 0.1, width_multiple=8)
    for index, channels in enumerate(planted):
        mask = masks[f"model.layers.{index}.mlp.down_proj.weight"]
        assert (~mask).all(0).nonzero().flatten().tolist() == channels


def test_logits_a_few_at_a_time_give_the_same(monkeypatch):
    model, live = make_model(), torch.ones(2, CHANNELS, dtype=torch.bool)
    live[:, ::5] = False
    expected = channel_importance(model, make_batches(), live)
    monkeypatch.setattr(sdmprune, "MAX_LOGITS", 2 * 23)
    torch.testing.assert_close(channel_importance(model, make_batches(), live), expected)


def test_batch_split_does_not_matter():
    model = make_model(torch.float32)
    one, other = (sdmprune_masks(model, make_batches(n), 0.3, width_multiple=8) for n in (1, 100))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("width_multiple", [5, 8, 32])
def test_width_is_the_nearest_multiple_and_sparsity_is_counted(width_multiple):
    model = make_model()
    share = 3 * 32 * CHANNELS / (3 * 32 * CHANNELS + 2 * 32 * 32 + 2 * 16 * 32)
    for sparsity in (0.0, 0.01, 0.07, 0.2):
        width = mlp_width(model, sparsity, width_multiple)
        assert width == CHANNELS or width % width_multiple == 0
        error = abs(share * (1 - width / CHANNELS) - sparsity)
        for other in (*range(width_multiple, CHANNELS, width_multiple), CHANNELS):
            assert error <= abs(share * (1 - other / CHANNELS) - sparsity) + 1e-12
        pruned = make_model()
        masks = sdmprune_masks(pruned, make_batches(), sparsity, width_multiple=width_multiple)
        apply_masks(pruned, masks)
        assert measured_sparsity(pruned)[0] == pytest.approx(share * (1 - width / CHANNELS))
        assert narrow_llama(pruned, width_multiple=1).config.intermediate_size == width


def test_more_than_the_mlps_hold_is_refused_with_the_largest_value():
    model = make_model()
    with pytest.raises(UserError, match=r"prune\.sparsity: 0\.55.*set at most") as error:
        sdmprune_masks(model, make_batches(), 0.55, width_multiple=8)
    largest = float(re.search(r"at most ([\d.]+)", str(error.value))[1])
    assert mlp_width(model, largest, 8) == 8
    with pytest.raises(UserError, match=r"set at most 0\.0, or a smaller prune\.width"):
        mlp_width(model, 0.1, 64)


@pytest.mark.parametrize("fails", [False, True])
def test_model_is_left_as_it_was(fails):
    model = make_model()
    model.model.embed_tokens.requires_grad_(False)
    model(torch.tensor([[1, 2, 3]])).logits.sum().backward()
    batches = make_batches()
    if fails:
        batches[1].input_ids[0, -1] = 1000  # no such token: the forward pass raises
    before = state_of(model)
    if fails:
        with pytest.raises(IndexError):
            sdmprune_masks(model, batches, 0.3, width_multiple=8)
    else:
        sdmprune_masks(model, batches, 0.3, width_multiple=8)
    assert_same_state(before, state_of(model))


def test_unfit_calibration_is_refused():
    unscored = calibration_batches([[5, 6]], [[]], pad_token_id=PAD, batch_size=1)
    with pytest.raises(UserError, match=r"calibration\.source.*no completion tokens"):
        sdmprune_masks(make_model(), unscored, 0.3, width_multiple=8)
    model = make_model()
    model.model.layers[1].input_layernorm.weight.data[0] = float("inf")
    with pytest.raises(UserError, match="not finite"):
        sdmprune_masks(model, make_batches(), 0.3, width_multiple=8)


def logits_of(model):
    with torch.no_grad():
        return model(
            torch.randint(1, 23, (4, 9), generator=torch.Generator().manual_seed(1))
        ).logits


@pytest.mark.parametrize("changes", LIKE_LLAMAS)
def test_narrow_model_is_the_masked_model(changes, tmp_path):
    model = make_model(**changes)
    apply_masks(model, sdmprune_masks(model, make_batches(), 0.37, width_multiple=8))
    width = mlp_width(model, 0.37, 8)
    before = state_of(model)
    narrow = narrow_llama(model, width_multiple=8)
    assert_same_state(before, state_of(model))
    assert model.config.intermediate_size == CHANNELS
    assert narrow.config.intermediate_size == width < CHANNELS
    assert isinstance(narrow, LlamaForCausalLM)
    assert not narrow.training
    expected = logits_of(model)
    torch.testing.assert_close(logits_of(narrow), expected, rtol=0.0, atol=1e-10)
    assert not {p.data_ptr() for p in narrow.parameters()} & {
        p.data_ptr() for p in model.parameters()
    }

    narrow.save_pretrained(tmp_path)
    loaded, report = LlamaForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float64, output_loading_info=True
    )
    assert not any(report.values()), report
    assert loaded.config.intermediate_size == width
    assert torch.equal(logits_of(loaded), logits_of(narrow))
    assert sum(p.numel() for p in loaded.parameters()) < sum(p.numel() for p in model.parameters())
    for index in range(2):
        for part, twin in zip(mlp_parts(narrow, index), mlp_parts(loaded, index), strict=True):
            assert (part.in_features, part.out_features) == (twin.in_features, twin.out_features)
            assert part.weight.shape == (part.out_features, part.in_features)


@torch.no_grad()
def test_a_channel_is_dead_only_if_its_output_is_zero_whatever_the_input():
    model = make_model(mlp_bias=True, num_hidden_layers=1)
    gate, up, down = mlp_parts(model, 0)
    for part in (gate, up, down):
        part.bias.normal_()
    down.weight[:, 0] = 0.0  # dead, whatever the biases
    up.weight[1], up.bias[1] = 0.0, 0.0  # dead
    gate.weight[2], gate.bias[2] = 0.0, 0.0  # dead, since silu(0) = 0
    up.weight[3] = 0.0  # up's bias passes the gate on
    gate.weight[4] = 0.0  # a constant gate lets up through
    gate.weight[5], up.weight[5] = 0.0, 0.0  # a constant, but not zero
    up.bias[6] = 0.0  # up still has its row
    gate.weight[7, :9] = up.weight[7, 9:] = down.weight[1:, 7] = 0.0  # sparse, not dead
    narrow = narrow_llama(model, width_multiple=1)
    kept = mlp_parts(narrow, 0)
    assert torch.equal(kept[0].weight, gate.weight[3:])
    assert torch.equal(kept[0].bias, gate.bias[3:])
    assert torch.equal(kept[1].weight, up.weight[3:])
    assert torch.equal(kept[1].bias, up.bias[3:])
    assert torch.equal(kept[2].weight, down.weight[:, 3:])
    assert torch.equal(kept[2].bias, down.bias)
    torch.testing.assert_close(logits_of(narrow), logits_of(model), rtol=0.0, atol=1e-10)


@pytest.mark.parametrize(("activation", "width"), [("relu", CHANNELS - 1), ("sigmoid", CHANNELS)])
@torch.no_grad()
def test_a_constant_gate_is_judged_by_its_activation(activation, width):
    model = make_model(mlp_bias=True, num_hidden_layers=1, hidden_act=activation)
    gate, up, _ = mlp_parts(model, 0)
    up.bias.normal_()
    gate.weight[:2], gate.bias[0], gate.bias[1] = 0.0, -3.0, 3.0
    narrow = narrow_llama(model, width_multiple=1)
    assert narrow.config.intermediate_size == width
    torch.testing.assert_close(logits_of(narrow), logits_of(model), rtol=0.0, atol=1e-10)


@pytest.mark.parametrize(
    ("width_multiple", "width"), [(1, 41), (8, 48), (32, 48), (10, 48), (42, 42)]
)
@torch.no_grad()
def test_the_layer_with_most_channels_sets_the_width(width_multiple, width):
    model = make_model()
    mlp_parts(model, 0)[2].weight[:, 2:40] = 0.0
    mlp_parts(model, 1)[1].weight[5:12] = 0.0
    narrow = narrow_llama(model, width_multiple=width_multiple)
    assert narrow.config.intermediate_size == width
    torch.testing.assert_close(logits_of(narrow), logits_of(model), rtol=0.0, atol=1e-10)


@torch.no_grad()
def test_nothing_to_cut_is_a_copy_and_no_live_channel_leaves_one():
    model = make_model(torch.bfloat16)
    same = narrow_llama(model)
    assert same is not model
    assert same.config.intermediate_size == CHANNELS
    assert all(torch.equal(v, same.state_dict()[k]) for k, v in model.state_dict().items())
    for index in range(2):
        mlp_parts(model, index)[2].weight.zero_()
    narrow = narrow_llama(model, width_multiple=1)
    assert narrow.config.intermediate_size == 1
    assert narrow.dtype == torch.bfloat16
    assert torch.equal(logits_of(narrow), logits_of(model))
