"""Masks in one bit a weight, in memory and on disk."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.sparsity.masks import byte_table, load_masks, pack_mask, save_masks, unpack_mask


@given(st.lists(st.booleans(), max_size=70))
def test_packing_keeps_every_bit_in_an_eighth_of_the_bytes(bits):
    mask = torch.tensor(bits, dtype=torch.bool)
    packed = pack_mask(mask)
    assert packed.numel() == -(-len(bits) // 8)
    assert unpack_mask(packed, mask.shape).tolist() == bits


def test_lowest_bit_is_the_first_weight():
    assert pack_mask(torch.tensor([True, False, False, True])).tolist() == [1 + 8]


def test_every_byte_means_its_bits():
    table = byte_table(torch.device("cpu"), 5, -7).view(torch.int8).reshape(256, 8)
    for byte in range(256):
        assert table[byte].tolist() == [5 if byte >> bit & 1 else -7 for bit in range(8)]


def test_unpacked_masks_are_bools_of_the_shape():
    mask = torch.rand(5, 7) > 0.5
    unpacked = unpack_mask(pack_mask(mask), mask.shape)
    assert unpacked.dtype == torch.bool
    assert torch.equal(unpacked, mask)
    assert torch.equal(~unpacked, ~mask), "any byte but 0 and 1 would not negate as a bool"


def test_masks_come_back_by_name_and_shape(tmp_path):
    masks = {"a": torch.rand(5, 7) > 0.5, "b": torch.rand(3) > 0.5}
    save_masks(tmp_path / "mask.safetensors", masks)
    loaded = load_masks(tmp_path / "mask.safetensors")
    assert loaded.keys() == masks.keys()
    assert all(torch.equal(loaded[name], masks[name]) for name in masks)
    assert [path.name for path in tmp_path.iterdir()] == ["mask.safetensors"]
