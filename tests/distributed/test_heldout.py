"""The best student of a stage on many ranks: one whole folder, the student of one step."""

import pytest
import torch

from pipeline.artifacts import MASK_FILE
from pipeline.models.loading import load_model
from pipeline.models.prunable import prunable_weights
from pipeline.sparsity.masks import load_masks
from pipeline.sparsity.storage import saved_movement
from pipeline.stages.training import Training
from tests.distributed.heldout_jobs import stage, unwrapped
from tests.distributed.workers import run_on_ranks

pytestmark = pytest.mark.distributed


def assert_holds(folder, weights):
    model = load_model(str(folder / "model"))
    for name, weight in model.named_parameters():
        assert torch.equal(weight, unwrapped(weights)[name]), name
    masks, pruned = load_masks(folder / MASK_FILE), 0
    for name, weight in prunable_weights(model).items():
        assert not weight[~masks[name]].any(), name
        pruned += int((~masks[name]).sum())
    assert sum(int((~mask).sum()) for *_, mask, _ in saved_movement(folder)) == pruned > 0


@pytest.mark.parametrize("layout", ["zero2", "zero3"])
def test_ranks_leave_the_best_student_and_go_on_from_a_checkpoint_with_it(layout, tmp_path):
    accuracies = [0.9, 0.2, 0.6, 0.1]
    (done, weights, real), (other, _, real_too) = run_on_ranks(
        2, stage, layout, str(tmp_path), accuracies
    )
    assert done == other == Training(4, {"step": 3, "accuracy": 0.6})
    assert real == real_too
    out = tmp_path / "on_policy"
    assert_holds(out, weights[3])
    assert_holds(out / "best", weights[3])
    assert_holds(out / "checkpoint-4" / "best", weights[3])
    if layout == "zero2":
        (done, _, _), _ = run_on_ranks(2, stage, layout, str(tmp_path), [*accuracies, 0.5])
        assert done == Training(5, {"step": 3, "accuracy": 0.6})
        assert_holds(out, weights[3])
    assert not list(out.rglob("*.tmp"))
