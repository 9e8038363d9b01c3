"""What vLLM is sent holds the zeros of the mask, in every layout. No vLLM runs here."""

import pytest

from pipeline.models.loading import load_tokenizer
from tests.distributed.vllm_jobs import send
from tests.distributed.workers import run_on_ranks
from tests.unit.tiny_models import tiny

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("layout", ["plain", "ddp", "zero2", "zero3"])
def test_after_every_change_of_the_mask_all_of_the_masked_weights_are_sent(layout, tmp_path):
    ranks = run_on_ranks(1 if layout == "plain" else 2, send, layout, str(tmp_path))
    model = tiny(load_tokenizer("bundled"), 0)
    shapes = {name: weight.shape for name, weight in model.named_parameters()}
    for sent, targets, prunable in ranks:
        assert len(targets) == 2
        for weights, target in zip(sent, [*targets, targets[-1]], strict=True):
            assert {name: weight.shape for name, weight in weights.items()} == shapes
            zeros = sum(int((weights[name] == 0).sum()) for name in prunable)
            total = sum(weights[name].numel() for name in prunable)
            assert zeros / total == pytest.approx(target, abs=1e-3)
