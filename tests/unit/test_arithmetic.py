"""The bundled task and its Llama: what design section 8 asks of them."""

import re

import pytest
import torch

from pipeline.data.arithmetic import generate_rows, solve
from pipeline.data.tasks import load_task
from pipeline.evaluation.accuracy import greedy_accuracy
from pipeline.models.loading import load_model, load_tokenizer
from pipeline.models.paths import BUNDLED_MODEL
from pipeline.models.prunable import prunable_weights
from pipeline.pruning.methods import prune_model
from rewards.correctness import exact


def test_chains_worked_out_by_hand():
    # 2@3: 8 + 2 * 9 + 3 = 29; 29#1: 1 + 841 + 29 = 871 = 14 * 61 + 17; 17@0: 17^3 = 80 * 61 + 33
    assert solve("02@03#01@00=") == "291733"


def test_rows_are_reproducible_distinct_and_of_their_split():
    rows = generate_rows(300, 5, "test")
    assert rows == generate_rows(300, 5, "test")
    assert len({prompt for prompt, _ in rows}) == 300
    others = {
        p for split in ("train", "calibration", "probe") for p, _ in generate_rows(300, 5, split)
    }
    assert not others & {prompt for prompt, _ in rows}
    assert all(re.fullmatch(r"\d\d([@#]\d\d){3}=", prompt) for prompt in others)


def test_files_are_small_and_the_sizes_within_the_design():
    assert (BUNDLED_MODEL / "model.safetensors").stat().st_size <= 6_000_000
    model = load_model("bundled")
    assert sum(p.numel() for p in model.parameters()) <= 1_500_000
    assert model.config.num_key_value_heads < model.config.num_attention_heads


@pytest.fixture(scope="module")
def accuracy():
    torch.set_num_threads(2)
    tokenizer = load_tokenizer("bundled")
    rows = load_task(
        "bundled", num_train=1, num_calibration=1, num_probe=1, num_test=2000, seed=0
    ).test

    def measure(model):
        return greedy_accuracy(
            model,
            tokenizer,
            rows,
            lambda prompt: tokenizer(prompt)["input_ids"],
            exact,
            max_new_tokens=6,
            batch_size=500,
        ).accuracy

    return measure


def test_the_dense_llama_answers_and_magnitude_at_nine_tenths_does_not(accuracy):
    model = load_model("bundled")
    assert accuracy(model) >= 0.95
    masks = prune_model(model, [], method="magnitude", sparsity=0.9)
    assert masks.keys() == prunable_weights(model).keys()
    assert accuracy(model) < 0.2
