"""Masks and state on disk."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.sparsity.masks import load_masks, pack_mask, save_masks, unpack_mask
from pipeline.sparsity.state import SparsityState


@given(st.lists(st.booleans(), max_size=70))
def test_packing_keeps_every_bit_in_an_eighth_of_the_bytes(bits):
    mask = torch.tensor(bits, dtype=torch.bool)
    packed = pack_mask(mask)
    assert packed.numel() == -(-len(bits) // 8)
    assert unpack_mask(packed, mask.shape).tolist() == bits


def test_lowest_bit_is_the_first_weight():
    assert pack_mask(torch.tensor([True, False, False, True])).tolist() == [1 + 8]


def test_masks_come_back_by_name_and_shape(tmp_path):
    masks = {"a": torch.rand(5, 7) > 0.5, "b": torch.rand(3) > 0.5}
    save_masks(tmp_path / "mask.safetensors", masks)
    loaded = load_masks(tmp_path / "mask.safetensors")
    assert loaded.keys() == masks.keys()
    assert all(torch.equal(loaded[name], masks[name]) for name in masks)
    assert [path.name for path in tmp_path.iterdir()] == ["mask.safetensors"]


def test_state_comes_back_bit_for_bit(tmp_path):
    state = SparsityState.from_masks({"a": torch.rand(4, 6) > 0.5})
    state.movement["a"].normal_()
    state.regrown_step["a"][1, 2] = 17
    state.save(tmp_path)
    loaded = SparsityState.load(tmp_path)
    for kind in ("masks", "movement", "regrown_step"):
        assert torch.equal(getattr(loaded, kind)["a"], getattr(state, kind)["a"])


def test_a_mask_alone_is_a_state_that_has_observed_nothing(tmp_path):
    mask = torch.tensor([[True, False], [True, True]])
    save_masks(tmp_path / "mask.safetensors", {"a": mask})
    state = SparsityState.load(tmp_path)
    assert state.sparsity == 0.25
    assert not state.movement["a"].any()
    assert (state.regrown_step["a"] == -1).all()
