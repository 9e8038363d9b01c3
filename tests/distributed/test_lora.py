"""LoRA students on two ranks: the layout changes neither masks nor weights, nor does a stop."""

import pytest
import torch

from pipeline.models.loading import load_model, load_tokenizer
from pipeline.models.prunable import apply_masks, prunable_weights
from pipeline.sparsity.masks import load_masks, save_masks, unpack_mask
from pipeline.sparsity.storage import saved_movement
from pipeline.stages.training import Training
from tests.distributed.lora_jobs import ADAM, IDS, SGD, cut, stage
from tests.distributed.workers import run_on_ranks
from tests.unit.tiny_models import tiny

pytestmark = pytest.mark.distributed
LAST_STEP = 6


@pytest.fixture(scope="module")
def prune(tmp_path_factory):
    """A folder as stage prune leaves it: half of the weights, at random."""
    folder = tmp_path_factory.mktemp("prune")
    model = tiny(load_tokenizer("bundled"), 0)
    generator = torch.Generator().manual_seed(2)
    masks = {
        name: torch.rand(weight.shape, generator=generator) < 0.5
        for name, weight in prunable_weights(model).items()
    }
    apply_masks(model, masks)
    model.save_pretrained(folder / "model")
    save_masks(folder / "mask.safetensors", masks)
    return folder


@pytest.fixture(scope="module")
def alone(prune, tmp_path_factory):
    """One process: what it found, and the folder of its stage."""
    out = tmp_path_factory.mktemp("plain")
    (parts,) = run_on_ranks(1, stage, "plain", str(prune), str(out), SGD, (LAST_STEP,))
    return parts[-1], out


def check_saved(found, out, tolerance=1e-6):
    """The saved model is an ordinary Llama with the masks' zeros and the trained one's logits."""
    saved, masks = load_model(str(out / "model"), dtype=found["dtype"]), found["masks"]
    final = load_masks(out / "mask.safetensors")
    for name, weight in prunable_weights(saved).items():
        assert torch.equal(unpack_mask(masks[name], weight.shape), final[name])
        assert not weight[~final[name]].any(), name
    assert (saved(IDS).logits.float() - found["logits"]).abs().max() <= tolerance


def test_masks_are_cut_evenly_at_bytes_and_put_together_again():
    shapes = {"a": (1, 3), "b": (5, 7), "c": (16, 16), "d": (3, 11)}
    generator = torch.Generator().manual_seed(3)
    masks = {name: torch.rand(shape, generator=generator) < 0.5 for name, shape in shapes.items()}
    (first, together), (second, also) = run_on_ranks(2, cut, masks)
    assert first == {"a": (0, 3), "b": (0, 24), "c": (0, 128), "d": (0, 24)}
    assert second == {"b": (24, 11), "c": (128, 128), "d": (24, 9)}
    for name, mask in masks.items():
        assert torch.equal(unpack_mask(together[name], mask.shape), mask)
        assert torch.equal(together[name], also[name])


def test_one_process_saves_what_it_trained(alone):
    found, out = alone
    check_saved(found | {"dtype": "float32"}, out)
    assert sum(entry["regrown"] for entry in found["refinements"]) > 0
    start = tiny(load_tokenizer("bundled"), 0)(IDS).logits
    assert (start - found["logits"]).abs().max() > 0.1


@pytest.mark.parametrize("layout", ["ddp", "zero2", "zero3", "zero3-checkpointing-measured"])
def test_two_ranks_train_the_student_of_one(prune, alone, tmp_path, layout):
    expected, expected_out = alone
    ranks = run_on_ranks(2, stage, layout, str(prune), str(tmp_path), SGD, (LAST_STEP,))
    first, second = (parts[-1] for parts in ranks)
    for name, mask in expected["masks"].items():
        assert torch.equal(first["masks"][name], mask), name
        assert torch.equal(second["masks"][name], mask), name
        for found, wanted in zip(first["factors"][name], expected["factors"][name], strict=True):
            assert (found - wanted).norm() <= 1e-4 * wanted.norm(), name
    assert first["refinements"] == second["refinements"] == expected["refinements"]
    check_saved(first | {"dtype": "float32"}, tmp_path)
    best = {"step": LAST_STEP, "accuracy": 0.0} if "measured" in layout else None
    assert first["done"] == second["done"] == Training(LAST_STEP, best)
    movement, wanted = (
        torch.cat([values for *_, values in saved_movement(out)])
        for out in (tmp_path, expected_out)
    )
    assert movement.numel() == wanted.numel()
    assert (movement.abs().sum() - wanted.abs().sum()).abs() <= 1e-3 * wanted.abs().sum()


@pytest.mark.parametrize("layout", ["zero2", "zero3"])
def test_a_resumed_run_ends_bit_identical_to_the_straight_one(prune, tmp_path, layout):
    ends = []
    for name, stops in (("straight", (LAST_STEP,)), ("resumed", (4, LAST_STEP))):
        (tmp_path / name).mkdir()
        out = str(tmp_path / name)
        ends.append(run_on_ranks(2, stage, layout, str(prune), out, ADAM, stops)[0][-1])
    straight, resumed = ends
    assert straight["refinements"] == resumed["refinements"]
    assert torch.equal(straight["logits"], resumed["logits"])
    for name, mask in straight["masks"].items():
        assert torch.equal(mask, resumed["masks"][name])
        for one, other in zip(straight["factors"][name], resumed["factors"][name], strict=True):
            assert torch.equal(one, other)
    first, second = (list(saved_movement(tmp_path / name)) for name in ("straight", "resumed"))
    assert all(torch.equal(a, b) for (*_, a), (*_, b) in zip(first, second, strict=True))


@pytest.mark.parametrize(("before", "after"), [("plain", "zero3"), ("zero2", "plain")])
def test_a_student_goes_on_under_another_layout(prune, alone, tmp_path, before, after):
    expected, _ = alone
    for layout, stop in ((before, 4), (after, LAST_STEP)):
        ranks = 1 if layout == "plain" else 2
        found = run_on_ranks(ranks, stage, layout, str(prune), str(tmp_path), SGD, (stop,))[0][-1]
    assert [change["step"] for change in found["done"].topology_changes] == [4]
    assert found["refinements"] == expected["refinements"]
    for name, factors in expected["factors"].items():
        assert torch.equal(found["masks"][name], expected["masks"][name])
        for one, wanted in zip(found["factors"][name], factors, strict=True):
            assert (one - wanted).norm() <= 1e-4 * wanted.norm(), name


@pytest.mark.parametrize("layout", ["zero2-bf16", "zero3-persistent-bf16"])
def test_in_bf16_the_saved_model_computes_what_the_trained_one_does(prune, tmp_path, layout):
    ranks = run_on_ranks(2, stage, layout, str(prune), str(tmp_path), ADAM, (LAST_STEP,))
    found = ranks[0][-1]
    assert found["refinements"][-1]["step"] == 5
    check_saved(found | {"dtype": "bfloat16"}, tmp_path, tolerance=0.0)
