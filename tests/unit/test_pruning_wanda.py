"""Wanda by hand, and N:M patterns against all choices there are."""

from itertools import combinations

import pytest
import torch

from pipeline.models.prunable import prunable_weights
from pipeline.pruning.methods import prune_model
from pipeline.pruning.wanda import wanda_score
from pipeline.sparsity.threshold import masks_by_score
from tests.unit.pruning_models import make_batches, make_model, make_rows

NAME = "model.layers.0.self_attn.q_proj.weight"


def first_inputs(model):
    """(tokens, in) inputs of the first matrix, which no pruning changes."""
    ids = [torch.tensor(p + c) for p, c in zip(*make_rows(), strict=True)]
    hidden = model.model.layers[0].input_layernorm(model.model.embed_tokens(torch.cat(ids)))
    return hidden.detach()


def test_by_hand():
    weight = torch.tensor([[4.0, -3.0, 2.0, 1.0], [0.1, 0.2, -0.3, 0.4]])
    # Channels of norm 5, 0, sqrt(2), 10.
    inputs = torch.tensor([[3.0, 0.0, 1.0, 6.0], [4.0, 0.0, -1.0, 8.0]])
    score = wanda_score(weight, inputs.norm(dim=0))
    expected = [[20.0, 0.0, 2.0 * 2**0.5, 10.0], [0.5, 0.0, 0.3 * 2**0.5, 4.0]]
    torch.testing.assert_close(score, torch.tensor(expected))
    # Per row: the second row keeps half of its weights though all of its scores are low.
    (mask,) = masks_by_score({"w": score}, 0.5, "row", {"w": weight}).values()
    assert mask.tolist() == [[True, False, False, True], [True, False, False, True]]


def test_the_first_matrix_of_a_model_against_the_formula():
    model = make_model()
    weight = dict(model.named_parameters())[NAME].detach().clone()
    score = weight.abs() * first_inputs(model).square().sum(0).sqrt()
    masks = prune_model(model, make_batches(), method="wanda", sparsity=0.75)
    for row, kept in zip(score, masks[NAME], strict=True):
        assert int(kept.sum()) == 8
        assert row[kept].min() > row[~kept].max()
    assert torch.equal(dict(model.named_parameters())[NAME], weight * masks[NAME])


@torch.no_grad()
def run_alone(model, name):
    """(tokens, in) inputs of a matrix in the model as it is, each sequence by itself."""
    seen = []
    hook = model.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0][0])
    )
    for prompt, completion in zip(*make_rows(), strict=True):
        model(torch.tensor([prompt + completion]))
    hook.remove()
    return torch.cat(seen)


@pytest.mark.parametrize("heads", [1, 2, 4])
@torch.no_grad()
def test_a_whole_model_against_the_textbook(heads):
    """Matrix after matrix: run the model as pruned so far, score, cut each row."""
    model = make_model(num_key_value_heads=heads)
    textbook = make_model(num_key_value_heads=heads)
    masks = prune_model(model, make_batches(), method="wanda", sparsity=0.625)
    for name, weight in prunable_weights(textbook).items():
        score = weight.abs() * run_alone(textbook, name).square().sum(0).sqrt()
        kept = score.shape[1] - round(0.625 * score.shape[1])
        expected = torch.zeros_like(score, dtype=torch.bool)
        expected.scatter_(1, score.topk(kept).indices, True)
        assert torch.equal(masks[name], expected), name
        weight.mul_(expected)


def test_later_layers_are_scored_behind_pruned_earlier_ones():
    masks = {
        redistribution: prune_model(
            make_model(),
            make_batches(),
            method="wanda",
            sparsity=0.75,
            redistribution=redistribution,
        )
        for redistribution in ("none", "least_squares")
    }
    first, last = NAME, list(masks["none"])[-1]
    assert torch.equal(masks["none"][first], masks["least_squares"][first])
    assert not torch.equal(masks["none"][last], masks["least_squares"][last])


@pytest.mark.parametrize(("kept", "length"), [(2, 4), (4, 8), (1, 4), (3, 4)])
@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_the_kept_of_each_group_are_the_best_of_all_choices(method, kept, length):
    model = make_model()
    score = dict(model.named_parameters())[NAME].detach().abs()
    if method == "wanda":
        score = score * first_inputs(model).norm(dim=0)
    mask = prune_model(
        model,
        make_batches(),
        method=method,
        sparsity=1 - kept / length,
        scope=f"{kept}:{length}",
    )[NAME]
    groups, masks = score.reshape(-1, length), mask.reshape(-1, length)
    best = torch.stack(
        [groups[:, list(choice)].sum(1) for choice in combinations(range(length), kept)]
    ).amax(0)
    torch.testing.assert_close((groups * masks).sum(1), best)
    assert (masks.sum(1) == kept).all()
