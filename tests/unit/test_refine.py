"""Refinement on cases computed by hand, and against a textbook version on whole weights."""

import pytest
import torch

from pipeline.sparsity.keys import hash_keys
from pipeline.sparsity.refine import RefinementRule, refine
from pipeline.sparsity.state import Regrown
from tests.unit.hand_shards import cut_state, cut_weights, masks_of


def rule(**changes):
    values = {
        "scope": "matrix",
        "score": "magnitude",
        "movement_weight": 0.5,
        "protect_steps": 0,
        "min_density": 0.0,
    }
    return RefinementRule(**(values | changes))


def bind(weights, masks, movement, **moments):
    sharded = cut_weights(weights, moments=moments)
    return sharded, cut_state(masks, movement, sharded)


def one_matrix():
    """Kept 0.9, -0.1, 0.5, 0.3; two pruned, with proposed updates -4 and 1."""
    weights = {"w": torch.tensor([[0.9, -0.1, 0.0], [0.5, 0.3, 0.0]])}
    masks = {"w": torch.tensor([[True, True, False], [True, True, False]])}
    movement = {"w": torch.tensor([[0.1, 0.2, -4.0], [-0.3, 0.4, 1.0]])}
    ones = {"w": torch.ones(2, 3)}
    return bind(weights, masks, movement, exp_avg=ones, exp_avg_sq=ones)


def mask_of(state, weights, name="w"):
    return masks_of(state, weights)[name].int().tolist()


def test_sparser_prunes_the_smallest_magnitudes():
    weights, state = one_matrix()
    done = refine(state, weights, rule(), sparsity=4 / 6, regrow_fraction=0.0, step=5)
    assert mask_of(state, weights) == [1, 0, 0, 1, 0, 0]
    assert weights.shards["w"].weight.tolist() == [pytest.approx(0.9), 0.0, 0.0, 0.5, 0.0, 0.0]
    assert (done.pruned, done.regrown, done.survived) == (2, 0, 0)


def test_regrowth_brings_back_the_largest_proposed_update_and_prunes_as_many():
    weights, state = one_matrix()
    published = []
    weights.publish = lambda: published.append(weights.shards["w"].weight.clone())
    done = refine(state, weights, rule(), sparsity=2 / 6, regrow_fraction=0.25, step=5)
    assert mask_of(state, weights) == [1, 0, 1, 1, 1, 0]
    assert (done.pruned, done.regrown, done.survived) == (1, 1, 1)
    assert state.regrown["w"].indices.tolist() == [2]
    assert state.regrown["w"].steps.tolist() == [5]
    assert state.movement["w"].tolist() == pytest.approx([0.1, 0.0, 0.0, -0.3, 0.4, 1.0])
    assert [weight[1].item() for weight in published] == [0.0], "zeros are there when published"
    shard = weights.shards["w"]
    assert weights.moments(shard, "exp_avg").tolist() == [1, 1, 0, 1, 1, 1]
    assert weights.moments(shard, "exp_avg_sq").tolist() == [1] * 6
    padding = torch.ones_like(shard.flat, dtype=torch.bool)
    padding[shard.start : shard.start + shard.numel] = False
    assert (shard.flat[padding] == 7e7).all(), "what lies around a shard is not ours"


def test_movement_score_prunes_what_moves_towards_zero():
    weights, state = one_matrix()
    refine(state, weights, rule(score="movement"), sparsity=0.5, regrow_fraction=0.0, step=5)
    assert mask_of(state, weights) == [1, 1, 0, 0, 1, 0]


def test_fisher_score_weighs_by_the_second_moment():
    weights, state = one_matrix()
    shard = weights.shards["w"]
    weights.moments(shard, "exp_avg_sq")[:] = torch.tensor([0.01, 100.0, 1.0, 1.0, 1.0, 1.0])
    refine(state, weights, rule(score="fisher"), sparsity=0.5, regrow_fraction=0.0, step=5)
    assert mask_of(state, weights) == [0, 1, 0, 1, 1, 0]


def test_a_freshly_regrown_weight_is_protected_for_some_steps():
    for step, kept in ((12, 1), (15, 0)):
        weights, state = one_matrix()
        indices = torch.tensor([1], dtype=torch.int32)
        state.regrown["w"] = Regrown(indices, torch.tensor([10], dtype=torch.int32))
        protects = rule(protect_steps=5)
        done = refine(state, weights, protects, sparsity=0.5, regrow_fraction=0.0, step=step)
        assert mask_of(state, weights)[1] == kept
        assert done.survived == kept
        assert state.regrown["w"].indices.tolist() == [1] * kept


def test_less_sparse_regrows_and_prunes_nothing():
    weights, state = one_matrix()
    done = refine(state, weights, rule(), sparsity=1 / 6, regrow_fraction=0.0, step=5)
    assert mask_of(state, weights) == [1, 1, 1, 1, 1, 0]
    assert (done.pruned, done.regrown) == (0, 1)


def two_matrices():
    weights = {"a": torch.tensor([0.1, 0.2, 0.3, 0.4]), "b": torch.tensor([1.0, 2.0, 3.0, 4.0])}
    weights = {name: weight[None] for name, weight in weights.items()}
    masks = {n: torch.ones(1, 4, dtype=torch.bool) for n in weights}
    return bind(weights, masks, {n: torch.zeros(1, 4) for n in weights})


def test_scope_model_lets_all_weights_compete():
    weights, state = two_matrices()
    refine(state, weights, rule(scope="model"), sparsity=0.5, regrow_fraction=0.0, step=1)
    assert mask_of(state, weights, "a") == [0, 0, 0, 0]
    assert mask_of(state, weights, "b") == [1, 1, 1, 1]


def test_each_matrix_keeps_its_floor():
    weights, state = two_matrices()
    floor = rule(scope="model", min_density=0.25)
    done = refine(state, weights, floor, sparsity=0.5, regrow_fraction=0.0, step=1)
    assert mask_of(state, weights, "a") == [0, 0, 0, 1]
    assert mask_of(state, weights, "b") == [0, 1, 1, 1]
    assert done.pruned == 4


@pytest.mark.parametrize("min_density", [0.0, 0.15, 0.3])
def test_floors_equal_one_threshold_capped_in_every_matrix(min_density):
    """Raising one threshold until enough are gone, each matrix losing at most what may go."""
    generator = torch.Generator().manual_seed(0)
    weights = {
        f"w{i}": torch.randn(7, 9 + i, generator=generator) * 3.0 ** (i % 5) for i in range(8)
    }
    total = sum(w.numel() for w in weights.values())
    everything = torch.cat([w.abs().flatten() for w in weights.values()]).sort().values
    for sparsity in (0.3, 0.5, 0.65):
        masks = {n: torch.ones_like(w, dtype=torch.bool) for n, w in weights.items()}
        sharded, state = bind(weights, masks, weights)
        floor = rule(scope="model", min_density=min_density)
        refine(state, sharded, floor, sparsity=sparsity, regrow_fraction=0.0, step=1)
        for threshold in everything:
            lost = {
                n: min(
                    int((w.abs() <= threshold).sum()), w.numel() - round(min_density * w.numel())
                )
                for n, w in weights.items()
            }
            if sum(lost.values()) >= round(sparsity * total):
                break
        for name, mask in masks_of(state, sharded).items():
            expected = torch.ones(mask.numel(), dtype=torch.bool)
            expected[weights[name].flatten().abs().argsort()[: lost[name]]] = False
            assert torch.equal(mask, expected)


def test_a_target_that_cannot_be_reached_is_an_error_and_changes_nothing():
    weights, state = two_matrices()
    before = weights.shards["a"].flat.clone()
    for scope in ("model", "matrix", "row"):
        state.regrown["b"] = Regrown(
            torch.arange(4, dtype=torch.int32), torch.ones(4, dtype=torch.int32)
        )
        tight = rule(scope=scope, min_density=0.5, protect_steps=9)
        with pytest.raises(ValueError, match=r"refine\..*protect_steps.*sparsity 0\.7500"):
            refine(state, weights, tight, sparsity=0.75, regrow_fraction=0.0, step=1)
    assert torch.equal(weights.shards["a"].flat, before)
    assert mask_of(state, weights, "a") == [1, 1, 1, 1]


def test_scores_that_are_nan_are_refused_by_name():
    for scope in ("matrix", "model", "row"):
        weights, state = one_matrix()
        state.movement["w"][2] = float("nan")
        with pytest.raises(ValueError, match="values of w are NaN"):
            refine(state, weights, rule(scope=scope), sparsity=0.5, regrow_fraction=0.25, step=1)


def test_unknown_values_of_the_rule_are_refused():
    with pytest.raises(ValueError, match=r"refine\.scope: '2:4' is unknown; set one of matrix"):
        rule(scope="2:4")
    with pytest.raises(ValueError, match=r"refine\.score: 'taylor'"):
        rule(score="taylor")


def textbook(weight, mask, moved, sparsity, regrow_fraction, name):
    """One group by sorting everything: what is pruned and what regrows, flat."""
    weight, mask, moved = weight.flatten(), mask.flatten(), moved.flatten()
    hashes = hash_keys(name, torch.arange(mask.numel()))
    kept, zeros = mask.nonzero().squeeze(1), (~mask).nonzero().squeeze(1)
    more = round(sparsity * mask.numel()) - len(zeros)
    num_regrow = max(min(round(regrow_fraction * len(kept)), len(zeros)), -more)

    def lowest(places, score, count):
        order = hashes[places].argsort()
        return places[order[score[places][order].argsort(stable=True)][:count]]

    new = mask.clone()
    new[lowest(kept, weight.abs(), num_regrow + more)] = False
    new[lowest(zeros, -moved.abs(), num_regrow)] = True
    return new


@pytest.mark.parametrize("scope", ["matrix", "row"])
def test_a_schedule_of_refinements_equals_the_textbook(scope):
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (17, 13), "b": (40, 40), "c": (3, 100)}
    whole = {n: torch.randn(s, generator=generator) for n, s in shapes.items()}
    masks = {n: torch.ones(s, dtype=torch.bool) for n, s in shapes.items()}
    zeros = {n: torch.zeros(s) for n, s in shapes.items()}
    sharded, state = bind(whole, masks, zeros, exp_avg=whole)
    for step, sparsity in enumerate((0.2, 0.5, 0.77, 0.77, 0.9, 0.85), 1):
        moved = {n: torch.randn(s, generator=generator).mul(2).round() for n, s in shapes.items()}
        for name, shard in sharded.shards.items():
            state.movement[name].copy_(moved[name].flatten())
            noise = torch.randn(shard.numel, generator=generator) * 0.1
            shard.weight.add_(noise * masks[name].flatten())
        weights = {n: s.weight.clone().view(s.shape) for n, s in sharded.shards.items()}
        done = refine(
            state, sharded, rule(scope=scope), sparsity=sparsity, regrow_fraction=0.2, step=step
        )
        found = masks_of(state, sharded)
        changes = torch.zeros(2)
        for name, shape in shapes.items():
            if scope == "matrix":
                args = weights[name], masks[name], moved[name], sparsity, 0.2, name
                expected = textbook(*args)
            else:
                expected = rows_textbook(weights[name], masks[name], moved[name], sparsity, name)
            assert torch.equal(found[name], expected)
            old = masks[name].flatten()
            changes += torch.tensor([(old & ~expected).sum(), (~old & expected).sum()])
            changed = old ^ expected
            assert not state.movement[name][changed].any()
            assert torch.equal(state.movement[name][~changed], moved[name].flatten()[~changed])
            assert not sharded.shards[name].weight[~expected].any()
            masks[name] = expected.view(shape)
        assert [done.pruned, done.regrown] == changes.tolist()
    for name, regrown in state.regrown.items():
        assert masks[name].flatten()[regrown.indices.long()].all()
        assert (regrown.indices.diff() > 0).all()
        assert not sharded.moments(sharded.shards[name], "exp_avg")[regrown.indices.long()].any()


def rows_textbook(weight, mask, moved, sparsity, name):
    """Each row by itself; the hash still counts places in the whole weight."""
    rows = []
    for row in range(len(mask)):
        places = torch.arange(mask.shape[1]) + row * mask.shape[1]
        rank = hash_keys(name, places).argsort().argsort().double()
        more = round(sparsity * mask.shape[1]) - int((~mask[row]).sum())
        grow = max(min(round(0.2 * int(mask[row].sum())), int((~mask[row]).sum())), -more)

        def lowest(side, score, count, rank=rank):
            order = sorted(side.nonzero().squeeze(1).tolist(), key=lambda i: (score[i], rank[i]))
            return order[:count]

        new = mask[row].clone()
        new[lowest(mask[row], weight[row].abs().tolist(), grow + more)] = False
        new[lowest(~mask[row], (-moved[row].abs()).tolist(), grow)] = True
        rows.append(new)
    return torch.cat(rows)
