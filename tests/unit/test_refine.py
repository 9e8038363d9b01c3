"""Refinement on cases computed by hand."""

import pytest
import torch

from pipeline.sparsity.refine import RefinementRule, refine
from pipeline.sparsity.scores import keep_score, normalised_ranks
from pipeline.sparsity.state import SparsityState


def rule(**changes):
    values = {
        "scope": "matrix",
        "score": "magnitude",
        "movement_weight": 0.5,
        "protect_steps": 0,
        "min_density": 0.0,
    }
    return RefinementRule(**(values | changes))


def one_matrix():
    """Kept 0.9, -0.1, 0.5, 0.3; two pruned, with proposed updates -4 and 1."""
    weights = {"w": torch.tensor([[0.9, -0.1, 0.0], [0.5, 0.3, 0.0]])}
    state = SparsityState.from_masks(
        {"w": torch.tensor([[True, True, False], [True, True, False]])}
    )
    state.movement["w"] = torch.tensor([[0.1, 0.2, -4.0], [-0.3, 0.4, 1.0]])
    return weights, state


def test_sparser_prunes_the_smallest_magnitudes():
    weights, state = one_matrix()
    done, _ = refine(state, weights, rule(), sparsity=4 / 6, regrow_fraction=0.0, step=5)
    assert state.masks["w"].tolist() == [[True, False, False], [True, False, False]]
    assert weights["w"].tolist() == [[pytest.approx(0.9), 0.0, 0.0], [0.5, 0.0, 0.0]]
    assert (done.pruned, done.regrown) == (2, 0)


def test_regrowth_brings_back_the_largest_proposed_update_and_prunes_as_many():
    weights, state = one_matrix()
    done, grown = refine(state, weights, rule(), sparsity=2 / 6, regrow_fraction=0.25, step=5)
    assert state.masks["w"].tolist() == [[True, False, True], [True, True, False]]
    assert grown["w"].tolist() == [[False, False, True], [False, False, False]]
    assert (done.pruned, done.regrown, done.survived) == (1, 1, 1)
    assert state.regrown_step["w"][0, 2] == 5
    changed = state.movement["w"][0, 1:].tolist()
    assert changed == [0.0, 0.0], "movement restarts when a weight changes side"
    assert state.movement["w"][1, 2] == 1.0


def test_movement_score_prunes_what_moves_towards_zero():
    weights, state = one_matrix()
    refine(state, weights, rule(score="movement"), sparsity=0.5, regrow_fraction=0.0, step=5)
    assert state.masks["w"].tolist() == [[True, True, False], [False, True, False]]


def test_a_freshly_regrown_weight_is_protected_for_some_steps():
    for step, kept in ((12, True), (15, False)):
        weights, state = one_matrix()
        state.regrown_step["w"][0, 1] = 10
        refine(state, weights, rule(protect_steps=5), sparsity=0.5, regrow_fraction=0.0, step=step)
        assert bool(state.masks["w"][0, 1]) is kept


def two_matrices():
    weights = {"a": torch.tensor([0.1, 0.2, 0.3, 0.4]), "b": torch.tensor([1.0, 2.0, 3.0, 4.0])}
    state = SparsityState.from_masks({n: torch.ones(4, dtype=torch.bool) for n in weights})
    return weights, state


def test_scope_model_lets_all_weights_compete():
    weights, state = two_matrices()
    refine(state, weights, rule(scope="model"), sparsity=0.5, regrow_fraction=0.0, step=1)
    assert not state.masks["a"].any()
    assert state.masks["b"].all()


def test_each_matrix_keeps_its_floor():
    weights, state = two_matrices()
    floor = rule(scope="model", min_density=0.25)
    refine(state, weights, floor, sparsity=0.5, regrow_fraction=0.0, step=1)
    assert state.masks["a"].tolist() == [False, False, False, True]
    assert state.masks["b"].tolist() == [False, True, True, True]


def test_a_target_that_cannot_be_reached_is_an_error():
    weights, state = two_matrices()
    floor = rule(scope="model", min_density=0.5)
    with pytest.raises(ValueError, match=r"refine\.min_density: 0\.5"):
        refine(state, weights, floor, sparsity=0.75, regrow_fraction=0.0, step=1)


def test_random_matrices_get_exactly_the_zeros_asked_for():
    generator = torch.Generator().manual_seed(0)
    weights = {n: torch.randn(17, 13, generator=generator) for n in "abc"}
    state = SparsityState.from_masks({n: torch.ones(17, 13, dtype=torch.bool) for n in weights})
    for step, sparsity in enumerate((0.2, 0.5, 0.77, 0.9), 1):
        for name in weights:
            state.movement[name] += torch.randn(17, 13, generator=generator)
            weights[name] += 0.01 * torch.randn(17, 13, generator=generator)
            weights[name] *= state.masks[name]
        refine(state, weights, rule(score="mix"), sparsity=sparsity, regrow_fraction=0.2, step=step)
        for mask in state.masks.values():
            assert int((~mask).sum()) == round(sparsity * 17 * 13)


def test_ranks_and_mix():
    assert normalised_ranks(torch.tensor([3.0, 1.0, 2.0, 9.0])).tolist() == [0.75, 0.25, 0.5, 1.0]
    weight, movement = torch.tensor([-2.0, 1.0]), torch.tensor([-1.0, 5.0])
    assert keep_score("mix", weight, movement, 0.25).tolist() == [0.75 + 0.125, 0.375 + 0.25]


def test_movement_that_was_never_observed_is_refused():
    with pytest.raises(ValueError, match="none was observed"):
        keep_score("movement", torch.ones(3), torch.zeros(3), 0.5)
