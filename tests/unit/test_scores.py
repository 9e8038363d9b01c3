"""Scores against textbook versions on whole weights, and ranks against sorting."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.sparsity.keys import order_keys
from pipeline.sparsity.scores import (
    LOW_BITS,
    RANK_BITS,
    SCORES,
    RankTable,
    keep_scores,
    normalised_ranks,
)
from tests.unit.hand_shards import cut_state, cut_weights

SHAPES = {"a": (30, 41), "b": (17, 23)}


def model(seed=0):
    """Whole weights, masks, movement and second moments; pruned weights are 0."""
    generator = torch.Generator().manual_seed(seed)

    def draw(scale):
        return {n: torch.randn(s, generator=generator) * scale for n, s in SHAPES.items()}

    masks = {n: values > -0.3 for n, values in draw(1.0).items()}
    weights = {n: w * masks[n] for n, w in draw(0.02).items()}
    return weights, masks, draw(1e-3), {n: v.square() for n, v in draw(1e-4).items()}


def scores(kind, weights, masks, movement, second, together=False, movement_weight=0.25):
    sharded = cut_weights(weights, moments={"exp_avg_sq": second})
    state = cut_state(masks, movement, sharded)
    functions = keep_scores(
        kind, sharded, state, movement_weight=movement_weight, together=together
    )
    return {n: function(slice(None)).reshape(SHAPES[n]) for n, function in functions.items()}


def table_of(values):
    bins = order_keys(values) >> LOW_BITS
    return RankTable(torch.bincount(bins, minlength=1 << RANK_BITS))


def test_magnitude_movement_and_fisher_are_the_formulas():
    weights, masks, movement, second = model()
    for name in SHAPES:
        textbook = {
            "magnitude": weights[name].abs(),
            "movement": movement[name],
            "fisher": (weights[name].double().square() * second[name].double()).sqrt().float(),
        }
        for kind, expected in textbook.items():
            found = scores(kind, weights, masks, movement, second)[name]
            torch.testing.assert_close(found, expected, rtol=3e-7, atol=0.0)


@pytest.mark.parametrize("together", [False, True])
def test_mix_adds_ranks_among_the_kept_weights_that_are_compared(together):
    weights, masks, movement, second = model()
    found = scores("mix", weights, masks, movement, second, together)
    groups = [list(SHAPES)] if together else [[name] for name in SHAPES]
    for names in groups:
        kept = {n: masks[n] for n in names}
        sizes = torch.cat([weights[n][kept[n]].abs() for n in names])
        moved = torch.cat([movement[n][kept[n]] for n in names])
        exact = 0.75 * normalised_ranks(sizes) + 0.25 * normalised_ranks(moved)
        mixed = torch.cat([found[n][kept[n]] for n in names])
        share = [float(table_of(values).share.max()) for values in (sizes, moved)]
        bound = 0.75 * share[0] + 0.25 * share[1] + 1e-6
        assert (mixed - exact).abs().max() <= bound
        assert (mixed - exact).abs().mean() < 0.01


@given(
    st.lists(
        st.floats(-(2.0**90), 2.0**90, width=32) | st.sampled_from([0.0, 1.0]),
        min_size=1,
        max_size=80,
    )
)
def test_a_rank_differs_from_the_exact_one_by_at_most_its_bins_share(values):
    values = torch.tensor(values)
    table = table_of(values)
    ranks = table(values)
    error = (ranks - normalised_ranks(values)).abs()
    assert (error <= table.share[order_keys(values) >> LOW_BITS] + 1e-6).all()
    assert (ranks >= 0).all()
    assert (ranks <= 1).all()
    order = values.argsort()
    assert (ranks[order].diff() >= -1e-6).all(), "ranks rise with the values"


@pytest.mark.parametrize("draw", [torch.randn, torch.rand])
def test_ranks_of_smooth_values_are_close(draw):
    values = draw(200_000)
    error = (table_of(values)(values) - normalised_ranks(values)).abs()
    assert error.max() < 2e-3


def test_a_score_has_the_same_bits_wherever_a_shard_begins():
    weights, masks, movement, second = model()
    sharded = cut_weights(weights, moments={"exp_avg_sq": second})
    state = cut_state(masks, movement, sharded)
    for kind in SCORES:
        functions = keep_scores(kind, sharded, state, movement_weight=0.3, together=True)
        for function in functions.values():
            whole = function(slice(None))
            for start, stop in ((1, 40), (13, 300), (7, 8)):
                assert torch.equal(function(slice(start, stop)), whole[start:stop])
            some = torch.tensor([5, 0, 77, 300])
            assert torch.equal(function(some), whole[some])


def test_exact_ranks_of_whole_tensors():
    assert normalised_ranks(torch.tensor([3.0, 1.0, 2.0, 9.0])).tolist() == [0.75, 0.25, 0.5, 1.0]


def test_what_cannot_be_scored_is_refused():
    weights, masks, movement, second = model()
    nothing = {n: torch.where(masks[n], 0.0, 1.0) for n in SHAPES}
    for kind in ("movement", "mix"):
        with pytest.raises(ValueError, match=f"'{kind}' needs movement and none was observed"):
            scores(kind, weights, masks, nothing, second)
    with pytest.raises(ValueError, match="'taylor' is unknown"):
        scores("taylor", weights, masks, movement, second)
    sharded = cut_weights(weights)
    state = cut_state(masks, movement, sharded)
    with pytest.raises(ValueError, match="second moment exp_avg_sq, which a does not have"):
        keep_scores("fisher", sharded, state, movement_weight=0.0, together=False)
    masks["b"][0, 0], movement["b"][0, 0] = True, float("nan")
    with pytest.raises(ValueError, match="1 values of b's movement are NaN"):
        scores("mix", weights, masks, movement, second)
