"""Pruning a whole tiny Llama: counts, masks, redistribution, awkward inputs."""

import math
from itertools import product

import pytest
import torch

from pipeline.errors import UserError
from pipeline.models.prunable import prunable_weights
from pipeline.pruning.batches import calibration_batches
from pipeline.pruning.calibration import calibrate
from pipeline.pruning.calibration_movement import calibration_movement
from pipeline.pruning.methods import METHODS, REDISTRIBUTIONS, SCOPES, prune_model
from pipeline.pruning.redistribution import redistribute
from pipeline.pruning.sparsegpt import sparsegpt_weight
from pipeline.rules.prune import STRUCTURED, contradictions
from tests.unit.pruning_models import PAD, make_batches, make_model, make_rows

SINGLE_WEIGHTS = [method for method in METHODS if method not in STRUCTURED]
COMBINATIONS = [
    (method, redistribution, scope)
    for method in SINGLE_WEIGHTS
    for redistribution in REDISTRIBUTIONS
    for scope in SCOPES
    if not list(contradictions(method, scope, redistribution, "uniform"))
]
PAIRS = sorted({(method, redistribution) for method, redistribution, _ in COMBINATIONS})
PARTS = [parts for parts in product((True, False), repeat=3) if any(parts)]


def weights_of(model):
    return {name: weight.detach().clone() for name, weight in prunable_weights(model).items()}


def flat(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors.values()])


@torch.no_grad()
def logits_of(model, **arguments):
    return torch.cat(
        [
            model(torch.tensor([prompt + completion])).logits[0]
            for prompt, completion in zip(*make_rows(**arguments), strict=True)
        ]
    )


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.99])
@pytest.mark.parametrize(("method", "redistribution", "scope"), COMBINATIONS)
def test_zeros_are_exact(method, redistribution, scope, sparsity):
    model = make_model(torch.float32)
    masks = prune_model(
        model,
        make_batches(),
        method=method,
        sparsity=sparsity,
        scope=scope,
        redistribution=redistribution,
    )
    weights = weights_of(model)
    assert list(masks) == list(weights)
    assert all(mask.dtype == torch.bool for mask in masks.values())
    assert torch.equal(flat(weights) != 0, flat(masks))
    assert flat(weights).isfinite().all()
    if scope == "model":
        assert int((~flat(masks)).sum()) == round(sparsity * flat(masks).numel())
    elif scope == "row":
        for mask in masks.values():
            assert ((~mask).sum(1) == round(sparsity * mask.shape[1])).all()
    else:
        for mask in masks.values():
            assert int((~mask).sum()) == round(sparsity * mask.numel())


@pytest.mark.parametrize("scope", ["2:4", "4:8", "1:4"])
@pytest.mark.parametrize(("method", "redistribution"), PAIRS)
def test_n_of_every_m_inputs_are_kept(method, redistribution, scope):
    kept, length = map(int, scope.split(":"))
    model = make_model(torch.float32)
    masks = prune_model(
        model,
        make_batches(),
        method=method,
        sparsity=1 - kept / length,
        scope=scope,
        redistribution=redistribution,
    )
    assert torch.equal(flat(weights_of(model)) != 0, flat(masks))
    for mask in masks.values():
        assert (mask.reshape(-1, length).sum(1) == kept).all()


def test_least_squares_on_the_mask_of_sparsegpt_starts_from_the_dense_weights():
    name = "model.layers.0.self_attn.q_proj.weight"  # its inputs are those of the dense model
    models = {kind: make_model() for kind in ("none", "least_squares")}
    dense, found = weights_of(models["none"])[name], {}
    calibrate(
        make_model(), make_batches(), lambda n, _, seen: found.update({n: seen}), "cross_moment"
    )
    masks = {
        kind: prune_model(
            model, make_batches(), method="sparsegpt", sparsity=0.6, redistribution=kind
        )[name]
        for kind, model in models.items()
    }
    weights = {kind: weights_of(model)[name] for kind, model in models.items()}
    assert torch.equal(masks["none"], masks["least_squares"])
    _, own = sparsegpt_weight(dense, found[name], 0.6, "matrix", name)
    solved = redistribute(dense, masks["none"], "least_squares", found[name])
    torch.testing.assert_close(weights["none"], own)
    torch.testing.assert_close(weights["least_squares"], solved)
    assert not torch.allclose(own, solved)


@pytest.mark.parametrize(("method", "redistribution"), PAIRS)
def test_the_dense_stream_runs_only_for_a_redistribution(method, redistribution):
    model, calls = make_model(), []
    model.model.layers[1].mlp.down_proj.register_forward_hook(lambda *_: calls.append(1))
    batches = make_batches()
    prune_model(
        model,
        batches,
        method=method,
        sparsity=0.5,
        redistribution=redistribution,
        movement=False,
    )
    scored = ("wanda", "sparsegpt", "alps", "mama")
    num_streams = 2 if redistribution != "none" else int(method in scored)
    assert len(calls) == num_streams * len(batches)


@pytest.mark.parametrize(
    ("method", "redistribution", "factorise", "allocation"),
    [
        ("mama", "admm", "linalg.eigh", "uniform"),
        ("alps", "none", "linalg.eigh", "uniform"),
        ("sparsegpt", "none", "linalg.cholesky", "uniform"),
        ("sparsegpt", "none", "linalg.cholesky", "search"),
    ],
)
def test_layers_that_share_an_input_share_its_factor(
    monkeypatch, method, redistribution, factorise, allocation
):
    sizes, original = [], torch.linalg.eigh if "eigh" in factorise else torch.linalg.cholesky

    def counted(matrix):
        sizes.append(matrix.dim() == 2 and len(matrix))
        return original(matrix)

    monkeypatch.setattr(f"torch.{factorise}", counted)
    prune_model(
        make_model(),
        make_batches(),
        method=method,
        sparsity=0.6,
        redistribution=redistribution,
        allocation=allocation,
        search_evaluations=1,
    )
    passes = 1 if allocation == "uniform" else 2  # a database of all levels comes before
    assert [size for size in sizes if size] == [32, 32, 32, 48] * 2 * passes


@pytest.mark.parametrize("method", SINGLE_WEIGHTS)
def test_each_method_has_its_own_scope(method):
    scope = "row" if method == "wanda" else "matrix"
    arguments = {"method": method, "sparsity": 0.7}
    own = prune_model(make_model(), make_batches(), **arguments)
    named = prune_model(make_model(), make_batches(), scope=scope, **arguments)
    assert torch.equal(flat(own), flat(named))


@pytest.mark.parametrize("scope", ["matrix", "row"])
@pytest.mark.parametrize("method", SINGLE_WEIGHTS)
def test_zeros_are_exact_when_all_weights_are_equal(method, scope):
    model = make_model()
    for weight in prunable_weights(model).values():
        weight.data.fill_(0.25)
    masks = prune_model(model, make_batches(), method=method, sparsity=0.7, scope=scope)
    for mask in masks.values():
        parts = mask if scope == "row" else mask.reshape(1, -1)
        assert ((~parts).sum(1) == round(0.7 * parts.shape[1])).all()
    assert torch.equal(flat(weights_of(model)) != 0, flat(masks))


def test_magnitude_keeps_the_largest_of_each_matrix_and_needs_no_calibration():
    model = make_model()
    dense = weights_of(model)
    masks = prune_model(model, [], method="magnitude", sparsity=0.75)
    for name, weight in dense.items():
        num_kept = weight.numel() - round(0.75 * weight.numel())
        largest = weight.abs().flatten().argsort(descending=True)[:num_kept]
        expected = torch.zeros(weight.numel(), dtype=torch.bool)
        expected[largest] = True
        assert torch.equal(masks[name].flatten(), expected)
        assert torch.equal(weights_of(model)[name], weight * masks[name])


def test_model_scope_compares_all_weights():
    model = make_model()
    dense = flat(weights_of(model)).abs()
    masks = prune_model(model, [], method="magnitude", sparsity=0.75, scope="model")
    assert dense[flat(masks)].min() >= dense[~flat(masks)].max()


def test_negative_magnitude_keeps_the_smallest():
    model = make_model()
    dense = weights_of(model)
    masks = prune_model(model, [], method="negative_magnitude", sparsity=0.5)
    for name, weight in dense.items():
        assert weight.abs()[masks[name]].max() <= weight.abs()[~masks[name]].min()


def test_random_depends_on_seed_and_name_only():
    masks = [
        prune_model(make_model(**changes), [], method="random", sparsity=0.5, seed=seed)
        for changes, seed in (({}, 1), ({}, 1), ({"num_hidden_layers": 1}, 1), ({}, 2))
    ]
    assert torch.equal(flat(masks[0]), flat(masks[1]))
    assert all(torch.equal(masks[0][name], mask) for name, mask in masks[2].items())
    assert not torch.equal(flat(masks[0]), flat(masks[3]))
    assert not torch.equal(
        *(masks[0][f"model.layers.0.mlp.{n}_proj.weight"] for n in ("gate", "up"))
    )


@pytest.mark.parametrize(("magnitude", "activation", "movement"), PARTS)
def test_mama_score_of_the_first_matrix_against_the_formula(magnitude, activation, movement):
    model, name = make_model(), "model.layers.0.self_attn.q_proj.weight"
    weight = weights_of(model)[name]
    term = weight.abs() if magnitude else torch.ones_like(weight)
    if activation:
        ids = [torch.tensor(p + c) for p, c in zip(*make_rows(), strict=True)]
        hidden = model.model.layers[0].input_layernorm(model.model.embed_tokens(torch.cat(ids)))
        term = term * hidden.detach().square().sum(0) ** 0.25

    score = term.flatten()
    if movement:
        moved = calibration_movement(model, make_batches())[name].flatten()
        rank = (moved[:, None] >= moved[None, :]).double().mean(1)
        score = score * (rank + 0.05) ** 0.5
    masks = prune_model(
        model,
        make_batches(),
        method="mama",
        sparsity=0.6,
        magnitude=magnitude,
        activation=activation,
        movement=movement,
    )
    kept = masks[name].flatten()
    assert score[kept].min() >= score[~kept].max() * (1 - 1e-6)


@pytest.mark.parametrize(
    ("method", "redistribution", "scope"),
    [case for case in COMBINATIONS if case[0] in ("wanda", "sparsegpt", "mama")],
)
def test_how_the_set_is_cut_into_batches_and_padded_does_not_matter(method, redistribution, scope):
    pruned = []
    for batch_size in (1, 3, 100):
        model = make_model()
        masks = prune_model(
            model,
            make_batches(batch_size),
            method=method,
            sparsity=0.7,
            scope=scope,
            redistribution=redistribution,
        )
        pruned.append((flat(masks), flat(weights_of(model))))
    for masks, weights in pruned[1:]:
        assert torch.equal(masks, pruned[0][0])
        torch.testing.assert_close(weights, pruned[0][1], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True},
        {"num_key_value_heads": 1},
        {"num_key_value_heads": 4},
        {"attention_bias": True, "mlp_bias": True},
    ],
)
def test_least_squares_brings_the_outputs_closer_to_the_dense_model(changes):
    error = {}
    for redistribution in REDISTRIBUTIONS:
        model = make_model(torch.float32, **changes)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.5)
        dense_logits = logits_of(model, seed=1)
        others = {n: p.clone() for n, p in model.named_parameters() if "proj." not in n}
        prune_model(
            model,
            make_batches(num_rows=60),
            method="magnitude",
            sparsity=0.5,
            redistribution=redistribution,
        )
        error[redistribution] = (logits_of(model, seed=1) - dense_logits).square().mean()
        for name, parameter in model.named_parameters():
            if name in others:
                assert torch.equal(parameter, others[name]), name
    assert error["least_squares"] < 0.8 * error["none"]


@pytest.mark.parametrize(
    ("method", "redistribution"), [pair for pair in PAIRS if pair[0] in ("mama", "sparsegpt")]
)
def test_nothing_pruned_leaves_the_model_as_it_is(method, redistribution):
    model = make_model()
    dense = flat(weights_of(model))
    prune_model(model, make_batches(), method=method, sparsity=0.0, redistribution=redistribution)
    torch.testing.assert_close(flat(weights_of(model)), dense, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(("method", "redistribution"), PAIRS)
def test_one_calibration_token(method, redistribution):
    model = make_model()
    batches = calibration_batches([[5]], [[]], pad_token_id=PAD, batch_size=1)
    masks = prune_model(
        model,
        batches,
        method=method,
        sparsity=0.9,
        redistribution=redistribution,
        movement=False,
    )
    assert flat(weights_of(model)).isfinite().all()
    assert torch.equal(flat(weights_of(model)) != 0, flat(masks))


@pytest.mark.parametrize(("method", "redistribution"), PAIRS)
def test_dead_input_channels(method, redistribution):
    model = make_model()
    model.model.layers[0].input_layernorm.weight.data[3:9] = 0.0
    model.model.layers[1].post_attention_layernorm.weight.data.zero_()
    masks = prune_model(
        model, make_batches(), method=method, sparsity=0.8, redistribution=redistribution
    )
    assert flat(weights_of(model)).isfinite().all()
    assert torch.equal(flat(weights_of(model)) != 0, flat(masks))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("method", SINGLE_WEIGHTS)
def test_a_weight_that_is_not_finite_is_named(method, value):
    model = make_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[2, 3] = value
    with pytest.raises(UserError, match=r"^student\.path: model\.layers\.1\.mlp\.up_proj\.weight"):
        prune_model(model, make_batches(), method=method, sparsity=0.5)


@pytest.mark.parametrize("method", ["mama", "wanda", "sparsegpt"])
def test_weights_of_dead_channels_go_first_under_activation(method):
    model = make_model()
    model.model.layers[0].input_layernorm.weight.data[3:9] = 0.0
    masks = prune_model(model, make_batches(), method=method, sparsity=0.5, movement=False)
    assert not masks["model.layers.0.self_attn.q_proj.weight"][:, 3:9].any()


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"method": "magnitudes"}, "prune.method"),
        ({"scope": "layer"}, "prune.scope: 'layer' is unknown; set matrix, model, row or N:M"),
        ({"scope": "4:2"}, "prune.scope"),
        ({"scope": "5:10"}, r"prune.scope: 5:10: rows of model\..*q_proj.weight have 32 elements"),
        ({"scope": "1:4"}, "prune.sparsity: 0.5: .* keeps 1 of every 4 weights; set 0.75"),
        ({"method": "sparsegpt", "scope": "model"}, "prune.scope: model: .*; set matrix, row"),
        (
            {"method": "sparsegpt", "redistribution": "proportional"},
            "prune.redistribution: proportional: .*; set none, or least_squares",
        ),
        ({"redistribution": "lsq"}, "prune.redistribution"),
        ({"sparsity": 1.0}, "prune.sparsity"),
        ({"sparsity": -0.1}, "prune.sparsity"),
    ],
)
def test_arguments_out_of_range_are_named(changes, key):
    arguments = {"method": "magnitude", "sparsity": 0.5, **changes}
    with pytest.raises(UserError, match=key):
        prune_model(make_model(), [], **arguments)


@pytest.mark.parametrize(
    ("method", "redistribution"),
    [
        ("mama", "least_squares"),
        ("mama", "admm"),
        ("alps", "none"),
        ("wanda", "none"),
        ("sparsegpt", "none"),
    ],
)
def test_bfloat16_model(method, redistribution):
    model = make_model(torch.bfloat16, num_hidden_layers=1)
    masks = prune_model(
        model, make_batches(), method=method, sparsity=0.9, redistribution=redistribution
    )
    assert all(weight.dtype == torch.bfloat16 for weight in weights_of(model).values())
    assert torch.equal(flat(weights_of(model)) != 0, flat(masks))


@pytest.mark.parametrize("redistribution", ["none", "proportional", "least_squares"])
@pytest.mark.parametrize(("method", "sparsity"), [("sdmprune", 0.3), ("block_entropy", 0.4)])
def test_structured_methods_take_whole_channels_or_blocks(method, sparsity, redistribution):
    model = make_model(torch.float32)
    masks = prune_model(
        model,
        make_batches(),
        method=method,
        sparsity=sparsity,
        redistribution=redistribution,
        width_multiple=8,
    )
    weights = weights_of(model)
    assert torch.equal(flat(weights) != 0, flat(masks))
    assert float((flat(weights) == 0).float().mean()) == pytest.approx(sparsity, abs=0.12)
    for layer in range(2):
        name = f"model.layers.{layer}.mlp.{{}}_proj.weight".format
        gate, up, down = (masks[name(part)] for part in ("gate", "up", "down"))
        assert torch.equal(gate, up)
        assert torch.equal(gate, down.T)
        assert all(row.all() or not row.any() for row in gate)


@pytest.mark.parametrize("method", ["sdmprune", "block_entropy"])
def test_structured_methods_choose_over_the_model(method):
    with pytest.raises(UserError, match=f"prune.scope: matrix: {method} chooses"):
        prune_model(make_model(), make_batches(), method=method, sparsity=0.3, scope="matrix")
