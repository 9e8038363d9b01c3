"""Log-probabilities of a model that samples in the student's place; no vLLM runs here."""

import copy
import inspect
from types import SimpleNamespace

import pytest
import torch
from trl import GRPOTrainer

from pipeline.errors import UserError
from pipeline.models.loading import load_tokenizer
from pipeline.models.prunable import prunable_weights
from pipeline.training.sampler_check import check_sampler
from tests.unit.recorded_grpo import trainer_with_teacher
from tests.unit.tiny_models import tiny


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("bundled")


def sampled(tokenizer, sampler):
    """Tokens that a model samples, with its log-probabilities and those of the pruned student."""
    student = pruned(tiny(tokenizer, 0))
    torch.manual_seed(0)
    tokens = torch.randint(5, 60, (8, 1))
    for _ in range(6):
        scores = sampler(tokens).logits[:, -1].softmax(-1)
        tokens = torch.cat([tokens, torch.multinomial(scores, 1)], dim=1)
    log_probs = [
        model(tokens).logits[:, :-1].log_softmax(-1).gather(2, tokens[:, 1:, None])[..., 0].detach()
        for model in (student, sampler)
    ]
    return {
        "old_per_token_logps": log_probs[0],
        "sampling_per_token_logps": log_probs[1],
        "completion_mask": torch.ones_like(tokens[:, 1:]),
    }


def pruned(model):
    model = copy.deepcopy(model)
    for weight in prunable_weights(model).values():
        weight.data[weight.abs() < weight.abs().median()] = 0.0
    return model


def arguments(**values):
    plain = {"top_p": 1.0, "top_k": 0, "min_p": None, "repetition_penalty": 1.0}
    return SimpleNamespace(**plain | values)


def test_the_dense_model_in_the_students_place_is_found(tokenizer, tmp_path, monkeypatch):
    output = sampled(tokenizer, tiny(tokenizer, 0))
    monkeypatch.setattr(GRPOTrainer, "_generate_and_score_completions", lambda *_: output)
    trainer = trainer_with_teacher(tokenizer, tmp_path, "advantage")
    with pytest.raises(UserError, match=r"^grpo\.use_vllm: true: .* nats per token .* set false$"):
        trainer._generate_and_score_completions([])
    check_sampler(arguments(top_k=5), output)
    output.pop("sampling_per_token_logps")
    check_sampler(arguments(), output)


def test_the_student_itself_passes_in_bf16_and_with_values_missing(tokenizer):
    output = sampled(tokenizer, pruned(tiny(tokenizer, 0)).bfloat16())
    output["sampling_per_token_logps"][0, 0] = torch.nan
    output["sampling_per_token_logps"][1, 1:] = -99.0
    output["completion_mask"][1, 1:] = 0
    check_sampler(arguments(), output)


def test_trl_hands_over_both_log_probabilities():
    source = inspect.getsource(GRPOTrainer._generate_and_score_completions)
    for name in ("sampling_per_token_logps", "old_per_token_logps"):
        assert f'output["{name}"] = {name}' in source
