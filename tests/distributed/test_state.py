"""State that changes the number of ranks and the sharding: bit for bit what was saved."""

import pytest
import torch

from tests.distributed.sparsity_jobs import SHAPES, gather, load, random_cuts, recorded, save
from tests.distributed.test_refine import join
from tests.distributed.workers import run_on_ranks

pytestmark = pytest.mark.distributed
KEYS = ("mask", "movement", "regrown")


@pytest.mark.parametrize(
    ("seed", "dtype"), [(0, torch.float32), (1, torch.bfloat16), (2, torch.float32)]
)
def test_two_ranks_to_one_to_three(tmp_path, seed, dtype):
    folders = [tmp_path / name for name in ("two", "one", "three")]
    for folder in folders:
        folder.mkdir()
    two, one, three = map(str, folders)
    saved = join(run_on_ranks(2, save, two, random_cuts(2, seed), dtype))
    single = join(run_on_ranks(1, load, two, None, one))
    triple = join(run_on_ranks(3, load, one, random_cuts(3, seed + 5), three))
    back = join(run_on_ranks(2, load, three, random_cuts(2, seed), None))
    for name in SHAPES:
        for key in KEYS:
            assert (saved[name][key] != 0).any()
            for found in (single, triple, back):
                assert found[name][key].dtype == saved[name][key].dtype
                assert torch.equal(found[name][key], saved[name][key]), (name, key)
    assert sorted(path.name for path in folders[0].iterdir()) == [
        "sparsity-00000-of-00002.safetensors",
        "sparsity-00001-of-00002.safetensors",
    ]
    assert [path.name for path in folders[1].iterdir()] == ["sparsity-00000-of-00001.safetensors"]


def test_where_every_rank_holds_all_the_first_writes_alone(tmp_path):
    run_on_ranks(2, save, str(tmp_path), None, torch.float32)
    assert [path.name for path in tmp_path.iterdir()] == ["sparsity-00000-of-00001.safetensors"]


def test_saving_again_on_fewer_ranks_leaves_one_set(tmp_path):
    for world_size in (3, 2):
        run_on_ranks(world_size, save, str(tmp_path), random_cuts(world_size, 1), torch.float32)
    assert len(list(tmp_path.iterdir())) == 2
    run_on_ranks(2, load, str(tmp_path), random_cuts(2, 2), None)


@pytest.mark.parametrize(("world_size", "seed"), [(1, None), (2, 0), (2, 2), (3, 3)])
def test_whole_masks_come_together_on_the_first_rank(world_size, seed):
    cuts = None if seed is None else random_cuts(world_size, seed)
    first, *others = run_on_ranks(world_size, gather, cuts)
    for name, values in recorded(11, 100.0).items():
        assert torch.equal(first[name], values > 0)
        assert all(masks[name] is None for masks in others)
