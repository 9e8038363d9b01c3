"""A state is cut from whole masks, saved, and loaded only where it fits."""

import pytest
import torch
from safetensors.torch import load_file

from pipeline.sparsity.masks import unpack_mask
from pipeline.sparsity.state import Regrown, SparsityState
from pipeline.sparsity.storage import load_state, save_state
from tests.unit.hand_shards import cut_state, cut_weights, masks_of

SHAPES = {"a": (3, 5), "b": (2, 20), "c": (4, 4)}
FILE = "sparsity-00000-of-00001.safetensors"


def model(shapes=SHAPES):
    generator = torch.Generator().manual_seed(0)
    weights = {n: torch.randn(s, generator=generator) for n, s in shapes.items()}
    masks = {n: weight > 0 for n, weight in weights.items()}
    sharded = cut_weights(weights)
    return sharded, cut_state(masks, weights, sharded), masks


def test_masks_are_cut_by_the_shards():
    generator = torch.Generator().manual_seed(0)
    weights = {n: torch.randn(s, generator=generator) for n, s in SHAPES.items()}
    masks = {n: weight > 0 for n, weight in weights.items()}
    cuts = {"a": [0, 4, 15], "b": [0, 0, 40], "c": [0, 16, 16]}
    for rank, names in ((0, ["a", "c"]), (1, ["a", "b"])):
        sharded = cut_weights(weights, cuts, rank)
        state = SparsityState.from_masks(masks, sharded, torch.bfloat16)
        assert list(state.masks) == list(state.movement) == list(state.regrown) == names
        for name, mask in masks_of(state, sharded).items():
            start, stop = cuts[name][rank : rank + 2]
            assert torch.equal(mask, masks[name].flatten()[start:stop])
            assert state.masks[name].numel() == (stop - start + 7) // 8
            assert state.movement[name].dtype == torch.bfloat16
            assert not state.movement[name].any()


def test_sparsity_is_the_fraction_of_zeros():
    sharded, state, masks = model()
    zeros = sum(int((~mask).sum()) for mask in masks.values())
    assert state.sparsity(sharded) == pytest.approx(zeros / (15 + 40 + 16))


def test_four_bytes_and_a_bit_for_a_weight():
    weights = cut_weights({"a": torch.randn(1000, 1000)})
    masks = {"a": torch.ones(1000, 1000, dtype=torch.bool)}
    for dtype, expected in ((torch.float32, 4.125), (torch.bfloat16, 2.125)):
        state = SparsityState.from_masks(masks, weights, dtype)
        held = [*state.masks.values(), *state.movement.values()]
        held += [t for regrown in state.regrown.values() for t in (regrown.indices, regrown.steps)]
        assert sum(t.numel() * t.element_size() for t in held) / 1e6 == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_saved_is_loaded_bit_for_bit(tmp_path, dtype):
    sharded, state, masks = model()
    for name in SHAPES:
        state.movement[name] = state.movement[name].to(dtype)
    state.regrown["b"] = Regrown(
        torch.tensor([3, 17], dtype=torch.int32), torch.tensor([5, 9], dtype=torch.int32)
    )
    save_state(tmp_path, state, sharded)
    assert [path.name for path in tmp_path.iterdir()] == [FILE]
    loaded = load_state(tmp_path, sharded)
    for name, mask in masks.items():
        assert torch.equal(unpack_mask(loaded.masks[name], mask.shape), mask)
        assert loaded.movement[name].dtype == dtype
        assert torch.equal(loaded.movement[name], state.movement[name])
        for key in ("indices", "steps"):
            found, saved = (getattr(s.regrown[name], key) for s in (loaded, state))
            assert found.dtype == saved.dtype == torch.int32
            assert torch.equal(found, saved)


def test_a_state_of_another_model_is_refused_with_the_first_three_differences(tmp_path):
    sharded, state, _ = model()
    save_state(tmp_path, state, sharded)
    other, _, masks = model({"a": (5, 3), "b": (2, 20), "d": (1, 1), "e": (1, 2)})
    with pytest.raises(ValueError) as error:  # noqa: PT011
        load_state(tmp_path, other)
    message = str(error.value)
    assert "a is (3, 5) there and (5, 3) in the model; d is absent there" in message
    assert "e is absent there and (1, 2) in the model and 1 more" in message
    assert "c is" not in message
    with pytest.raises(ValueError, match=r"masks: not of this model: a is \(5, 3\) there"):
        SparsityState.from_masks(masks, sharded)


def test_sets_that_are_not_whole_are_refused_by_name(tmp_path):
    sharded, state, _ = model()
    with pytest.raises(ValueError, match="no sparsity-"):
        load_state(tmp_path, sharded)
    save_state(tmp_path, state, sharded)
    (tmp_path / FILE).rename(tmp_path / "sparsity-00000-of-00002.safetensors")
    with pytest.raises(ValueError, match=r"sparsity-00001-of-00002\.safetensors is missing"):
        load_state(tmp_path, sharded)
    (tmp_path / FILE).touch()
    with pytest.raises(ValueError, match="sets of 1 and 2"):
        load_state(tmp_path, sharded)


def test_a_set_that_leaves_elements_out_is_refused(tmp_path):
    weights = {"a": torch.randn(4, 5)}
    half = cut_weights(weights, {"a": [0, 8, 20]}, 0)
    save_state(tmp_path, cut_state({"a": weights["a"] > 0}, weights, half), half)
    with pytest.raises(ValueError, match="holds 8 of 20 elements of this rank's part of a"):
        load_state(tmp_path, cut_weights(weights))


def test_an_interrupted_save_leaves_the_old_file(tmp_path, monkeypatch):
    sharded, state, _ = model()
    save_state(tmp_path, state, sharded)
    before = load_file(tmp_path / FILE)
    state.movement["a"] += 1.0

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr("pipeline.sparsity.storage.os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        save_state(tmp_path, state, sharded)
    after = load_file(tmp_path / FILE)
    assert all(torch.equal(before[key], after[key]) for key in before)
    load_state(tmp_path, sharded)
