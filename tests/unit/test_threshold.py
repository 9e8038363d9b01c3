"""The exact selection on one rank against sorting, by the textbook."""

import hashlib

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from pipeline.sparsity import threshold
from pipeline.sparsity.bits import bit_positions, bits_at, clear_bits, count_bits, set_bits
from pipeline.sparsity.groups import lowest_in_runs
from pipeline.sparsity.keys import hash_keys, key_value, order_keys
from pipeline.sparsity.masks import pack_mask
from pipeline.sparsity.threshold import mask_by_score, masks_by_score

INF = float("inf")


def sorted_mask(scores, num_zeros, ties, name):
    """Sorts by score, |tie| and hash, last key first: the reference."""
    order = hash_keys(name, torch.arange(len(scores))).argsort(stable=True)
    order = order[ties.abs()[order].argsort(stable=True)]
    order = order[scores[order].argsort(stable=True)]
    mask = torch.ones(len(scores), dtype=torch.bool)
    mask[order[:num_zeros]] = False
    return mask


@given(
    values=st.lists(st.sampled_from([-INF, -2.0, -1e-40, -0.0, 0.0, 1e-40, 1.0, 3e38, INF])),
    ties=st.integers(1, 4),
    fraction=st.floats(0, 1),
)
@example(values=[1.0] * 60, ties=1, fraction=0.5)
def test_prunes_exactly_the_lowest_also_with_ties(values, ties, fraction):
    score = torch.tensor(values)
    tie_break = torch.arange(len(values)) % ties - 1.0
    num_zeros = round(fraction * len(values))
    mask = mask_by_score(score, num_zeros, tie_break, "w")
    assert torch.equal(mask, sorted_mask(score, num_zeros, tie_break, "w"))
    assert int((~mask).sum()) == num_zeros


@pytest.mark.parametrize("levels", [3, 1000, 10**9])
@pytest.mark.parametrize("sparsity", [0.001, 0.5, 0.97])
def test_large_matrices_with_and_without_ties(levels, sparsity):
    generator = torch.Generator().manual_seed(0)
    shape = (700, 701)  # more than one chunk, and not divisible by 8
    score = (torch.randn(shape, generator=generator) * levels).round() / levels
    tie_break = torch.randn(shape, generator=generator)
    num_zeros = round(sparsity * score.numel())
    mask = mask_by_score(score, num_zeros, tie_break, "w")
    expected = sorted_mask(score.flatten(), num_zeros, tie_break.flatten(), "w")
    assert torch.equal(mask.flatten(), expected)


def test_the_threshold_is_that_of_kthvalue():
    score = torch.randn(300, 400)
    for num_zeros in (1, 7, 60_000, 119_999):
        mask = mask_by_score(score, num_zeros)
        kth = score.flatten().kthvalue(num_zeros).values
        assert torch.equal(mask, score > kth)


def test_a_sample_that_misleads_costs_time_and_nothing_else(monkeypatch):
    score = torch.rand(200_000)
    score[:: threshold.SAMPLE_STRIDE] += 10.0  # the sample sees the largest only
    mask = mask_by_score(score, 100_000)
    assert torch.equal(mask, score > score.kthvalue(100_000).values)


def test_equal_scores_of_a_large_matrix_are_ordered_in_bounded_pieces(monkeypatch):
    """More open elements than are remembered, on every level but the hash."""
    monkeypatch.setattr("pipeline.sparsity.candidates.CHUNK", 1 << 12)
    score = torch.zeros(100_003)
    mask = mask_by_score(score, 30_000, torch.ones_like(score), "name")
    assert torch.equal(mask, sorted_mask(score, 30_000, torch.ones_like(score), "name"))


def test_ties_are_ordered_by_the_tie_break():
    score = torch.zeros(2, 3)
    weight = torch.tensor([[0.1, -0.5, 0.3], [0.2, 0.6, 0.4]])
    mask = mask_by_score(score, 3, weight)
    assert mask.tolist() == [[False, True, False], [False, True, True]]


def test_full_ties_are_ordered_by_the_hash_of_the_name():
    masks = {name: mask_by_score(torch.ones(5000), 2500, None, name) for name in ("a", "b")}
    assert all(int(mask.sum()) == 2500 for mask in masks.values())
    assert 0.4 < (masks["a"] == masks["b"]).float().mean() < 0.6


def test_refuses_nan_and_counts_out_of_range():
    with pytest.raises(ValueError, match=r"1 values of layer\.q are NaN"):
        mask_by_score(torch.tensor([1.0, float("nan")]), 1, name="layer.q")
    with pytest.raises(ValueError, match="num_zeros: 3"):
        mask_by_score(torch.ones(2), 3)


def test_scope_matrix_prunes_each_and_scope_model_prunes_the_lowest_of_all():
    scores = {"a": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "b": torch.tensor([[5.0, 6.0]])}
    each = masks_by_score(scores, 0.5, "matrix")
    assert each["a"].tolist() == [[False, False], [True, True]]
    assert each["b"].tolist() == [[False, True]]
    together = masks_by_score(scores, 0.5, "model")
    assert together["a"].tolist() == [[False, False], [False, True]]
    assert together["b"].tolist() == [[True, True]]


def test_scope_row_prunes_each_row():
    score = torch.tensor([[1.0, 9.0, 5.0, 4.0], [8.0, 7.0, 2.0, 6.0]])
    mask = masks_by_score({"a": score}, 0.5, "row")["a"]
    assert mask.tolist() == [[False, True, True, False], [True, True, False, False]]


@pytest.mark.parametrize(("kept", "length"), [(2, 4), (1, 4), (4, 8), (3, 5)])
def test_scope_n_m_keeps_n_of_every_m(kept, length):
    score = torch.randn(30, 40)
    mask = masks_by_score({"a": score}, 1 - kept / length, f"{kept}:{length}")["a"]
    highest = score.reshape(-1, length).topk(kept).indices
    expected = torch.zeros(score.numel() // length, length).scatter(1, highest, 1.0).bool()
    assert torch.equal(mask.reshape(-1, length), expected)


@pytest.mark.parametrize(
    ("scope", "sparsity", "message"),
    [
        ("2:4", 0.6, "scope 2:4 makes it 0.5"),
        ("2:7", 5 / 7, "rows of a have 8 elements"),
        ("4:2", 0.5, "'4:2' is unknown"),
        ("column", 0.5, "'column' is unknown"),
    ],
)
def test_scopes_that_do_not_fit_are_refused(scope, sparsity, message):
    with pytest.raises(ValueError, match=message):
        masks_by_score({"a": torch.randn(4, 8)}, sparsity, scope)


@given(
    rows=st.integers(1, 6),
    length=st.integers(1, 12),
    data=st.data(),
)
def test_runs_are_decided_as_by_sorting(rows, length, data):
    values = st.lists(st.integers(-2, 2), min_size=rows * length, max_size=rows * length)
    score, ties = (torch.tensor(data.draw(values)).float().view(rows, -1) for _ in range(2))
    competing = torch.tensor(data.draw(values)).view(rows, -1) > -2
    wanted = torch.tensor(data.draw(st.lists(st.integers(0, 12), min_size=rows, max_size=rows)))
    first = torch.arange(rows) * length
    chosen = lowest_in_runs(score, ties.abs(), competing, wanted, "w", first)
    for row in range(rows):
        places = competing[row].nonzero().squeeze(1)
        order = hash_keys("w", places + first[row]).argsort()
        order = order[ties[row][places].abs()[order].argsort(stable=True)]
        order = order[score[row][places][order].argsort(stable=True)]
        expected = places[order[: int(wanted[row])]]
        assert sorted(chosen[row].nonzero().squeeze(1).tolist()) == sorted(expected.tolist())


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1))
def test_keys_are_in_the_order_of_the_values(values):
    values = torch.tensor(values)
    keys = order_keys(values)
    assert torch.equal(keys[:, None] < keys, values[:, None] < values)
    assert [key_value(int(key)) for key in keys] == values.tolist()


def test_the_hash_is_a_bijection_and_follows_the_name():
    places = torch.cat([torch.arange(200_000), 2**32 - 1 - torch.arange(200_000)])
    keys = hash_keys("layer.q", places)
    assert keys.unique().numel() == places.numel()
    assert 0 <= int(keys.min()) <= int(keys.max()) < 2**32
    seed = int.from_bytes(hashlib.sha256(b"layer.q").digest()[:4], "little")
    x = (seed ^ 5) & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    assert int(hash_keys("layer.q", torch.tensor([5]))) == x ^ (x >> 16)


@given(st.lists(st.booleans(), max_size=150), st.randoms())
def test_bits_are_counted_found_and_changed(flags, random):
    flags = torch.tensor(flags, dtype=torch.bool)
    bits = pack_mask(flags)
    assert count_bits(bits) == int(flags.sum())
    assert bit_positions(bits).tolist() == flags.nonzero().squeeze(1).tolist()
    everywhere = torch.arange(len(flags))
    assert torch.equal(bits_at(bits, everywhere), flags)
    some = everywhere[torch.tensor([random.random() < 0.5 for _ in flags], dtype=torch.bool)]
    set_bits(bits, some[~flags[some]])
    clear_bits(bits, some[flags[some]])
    flags[some] = ~flags[some]
    assert torch.equal(bits, pack_mask(flags))
