"""Asking the model in the middle of training: the answers of a plain loop, and no trace."""

import random

import numpy
import pytest
import torch
from transformers import TrainerCallback

from pipeline.data.tasks import Row
from pipeline.evaluation.accuracy import greedy_accuracy
from pipeline.evaluation.completions import completion_batches
from pipeline.evaluation.perplexity import token_nll
from pipeline.models.loading import load_tokenizer
from pipeline.training.probe import Probe
from tests.unit.probe_prompts import prompts_for, short_distillation
from tests.unit.recorded_grpo import recorded_trainer
from tests.unit.tiny_models import tiny


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("bundled")


def exact(completion, answer):
    return float(completion == answer)


def drawing(completion, answer):
    """A verifier that draws from every generator there is."""
    random.random(), numpy.random.rand(), torch.rand(1)
    return exact(completion, answer)


def probe_of(trainer, prompts, verifier=exact):
    return Probe(trainer, prompts, verifier, max_new_tokens=4, batch_size=3)


def test_answers_and_log_probabilities_are_those_of_a_plain_loop(tokenizer, tmp_path):
    trainer = recorded_trainer(tokenizer, tmp_path, teacher=None)
    prompts = prompts_for(tokenizer)
    probe = probe_of(trainer, prompts)
    encoded = {str(index): prompt.prompt_ids for index, prompt in enumerate(prompts)}
    expected = greedy_accuracy(
        tiny(tokenizer, 0),
        tokenizer,
        [Row(str(index), prompt.answer) for index, prompt in enumerate(prompts)],
        encoded.__getitem__,
        exact,
        max_new_tokens=4,
        batch_size=1,
    )
    assert probe.correct().tolist() == expected.correct
    assert probe.accuracy() == pytest.approx(expected.accuracy)
    assert 0 < expected.accuracy < 1

    nats = probe.log_probs()
    for prompt, found in zip(prompts, nats.tolist(), strict=True):
        if prompt.completion_ids is None:
            assert found == 0.0
            continue
        (batch,) = completion_batches([(prompt.prompt_ids, prompt.completion_ids)], 1)
        mean = -token_nll(tiny(tokenizer, 0), batch).mean().item()
        assert found == pytest.approx(mean, rel=1e-4)


def test_no_trace_is_left(tokenizer, tmp_path):
    trainer = recorded_trainer(tokenizer, tmp_path, teacher=None, gradient_checkpointing=True)
    model = trainer.model
    model.gradient_checkpointing_enable(trainer.args.gradient_checkpointing_kwargs)
    model.train()
    model.model.layers[1].mlp.eval()
    model.config.use_cache = False
    probe = probe_of(trainer, prompts_for(tokenizer), drawing)

    def state():
        return {
            "python": random.getstate(),
            "numpy": numpy.random.get_state()[1].tolist(),
            "torch": torch.get_rng_state().tolist(),
            "modes": [module.training for module in model.modules()],
            "checkpointing": model.is_gradient_checkpointing,
            "generation": model.generation_config.to_dict(),
            "trainer's": trainer.generation_config.to_dict(),
            "use_cache": model.config.use_cache,
            "gradients": [weight.requires_grad for weight in model.parameters()],
        }

    before = state()
    probe.correct()
    probe.log_probs()
    after = state()
    assert [key for key in before if before[key] != after[key]] == []
    assert before["checkpointing"]
    assert set(before["modes"]) == {True, False}


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_a_run_that_was_asked_ends_as_one_that_was_not(tokenizer, tmp_path, gradient_checkpointing):
    ends, answers = [], []
    for asks in (False, True):
        trainer = short_distillation(
            tokenizer, tmp_path, gradient_checkpointing=gradient_checkpointing
        )
        probe = probe_of(trainer, prompts_for(tokenizer), drawing)

        class Asks(TrainerCallback):
            def on_step_end(self, args, state, control, probe=probe, **kwargs):
                answers.append((probe.accuracy(), probe.log_probs().sum().item()))

        if asks:
            trainer.add_callback(Asks())
        trainer.train()
        ends.append([w.detach().clone() for w in trainer.model.parameters()])
    assert len(set(answers)) == 3, "the model changes, and so do its answers"
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
