"""On-policy distillation through TRL: the loss by hand, KL falls, masks hold, resume is exact."""

import pytest
import torch
from transformers import TrainerCallback

from pipeline.errors import UserError
from pipeline.models.loading import load_tokenizer
from pipeline.models.prunable import prunable_weights
from pipeline.sparsity.masks import unpack_mask
from pipeline.training.checkpoint import newest_whole_checkpoint
from tests.unit.recorded_on_policy import COMPLETIONS, RecordedTrainer, on_policy_trainer
from tests.unit.test_training import sparsity_of
from tests.unit.tiny_models import tiny


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("bundled")


def log_probs(model, tokenizer):
    """Log-probabilities over the vocabulary at every recorded token (N, V), one forward each."""
    rows = []
    for prompt, completion in COMPLETIONS.items():
        ids = tokenizer(prompt)["input_ids"]
        for index in range(len(completion)):
            logits = model(torch.tensor([ids + completion[:index]])).logits[0, -1]
            rows.append(logits.log_softmax(-1))
    return torch.stack(rows)


def kl(p, q):
    return (p.exp() * (p - q)).sum(-1).mean()


@pytest.mark.parametrize("beta", [0.0, 1.0, 0.3])
def test_the_gradient_is_that_of_the_divergence_over_all_completion_tokens(
    tokenizer, tmp_path, beta
):
    """Two micro-batches make one step, as plain gradient descent at rate 1 shows it."""
    trainer = on_policy_trainer(
        tokenizer,
        tmp_path,
        trainer_class=RecordedTrainer,
        beta=beta,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        optim="sgd",
        learning_rate=1.0,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
    )
    trainer.add_sparsity(sparsity_of(trainer.model, tmp_path / "prune", begin_step=99))
    before = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
    trainer.train()

    student = tiny(tokenizer, 0)
    q, p = log_probs(student, tokenizer), log_probs(tiny(tokenizer, 1), tokenizer).detach()
    middle = (beta * p.exp() + (1 - beta) * q.exp()).log()
    expected = {0.0: kl(p, q), 1.0: kl(q, p)}.get(
        beta, beta * kl(p, middle) + (1 - beta) * kl(q, middle)
    )
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected.item(), rel=1e-4)
    expected.backward()
    after = trainer.model.state_dict()
    for name, weight in student.named_parameters():
        torch.testing.assert_close(before[name] - after[name], weight.grad, atol=1e-5, rtol=1e-3)


def test_kl_to_the_teacher_falls_and_the_mask_holds_after_every_step(tokenizer, tmp_path):
    trainer = on_policy_trainer(
        tokenizer,
        tmp_path,
        max_steps=30,
        learning_rate=2e-2,
        beta=0.0,
        per_device_train_batch_size=8,
    )
    callback = trainer.add_sparsity(sparsity_of(trainer.model, tmp_path / "prune"))
    broken, kls = [], []
    teacher = log_probs(trainer.teacher_model, tokenizer).detach()

    class EveryStep(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            with torch.no_grad():
                kls.append(kl(teacher, log_probs(trainer.model, tokenizer)).item())
            for name, weight in prunable_weights(trainer.model).items():
                mask = unpack_mask(callback.state.masks[name], weight.shape)
                broken.extend([name] if weight[~mask].any() else [])

    trainer.add_callback(EveryStep())
    trainer.train()
    assert not broken
    assert callback.measured == pytest.approx(0.75, abs=1e-3)
    assert any(entry["regrown"] > 0 for entry in callback.sparsity.refinements)
    assert kls[-1] < 0.7 * kls[4]
    assert all(weight.grad is None for weight in trainer.teacher_model.parameters())
    assert not trainer.teacher_model.training


def test_every_completion_is_the_students_own(tokenizer, tmp_path):
    """A student that always ends at once never writes anything else."""
    student = tiny(tokenizer, 0)
    student.lm_head.bias = torch.nn.Parameter(torch.zeros(len(tokenizer)))
    student.lm_head.bias.data[tokenizer.eos_token_id] = 1e4
    trainer = on_policy_trainer(tokenizer, tmp_path, model=student)
    batch = trainer._generate_and_score_completions([{"prompt": "12@35="}] * 4)
    assert batch["completion_ids"].tolist() == [[tokenizer.eos_token_id]] * 4


def test_bf16_is_the_type_both_models_compute_in(tokenizer, tmp_path):
    losses = {}
    for bf16, expected in ((False, torch.float32), (True, torch.bfloat16)):
        trainer = on_policy_trainer(
            tokenizer,
            tmp_path,
            trainer_class=RecordedTrainer,
            bf16=bf16,
            gradient_checkpointing=True,
            learning_rate=0.0,
        )
        trainer.add_sparsity(sparsity_of(trainer.model, tmp_path / "prune", begin_step=99))
        types = []
        for model in (trainer.model, trainer.teacher_model):
            model.model.layers[1].mlp.up_proj.register_forward_hook(
                lambda module, given, out, types=types: types.append(out.dtype)
            )
        trainer.train()
        assert types == [expected] * 3, "student, teacher, and the student again in backward"
        losses[bf16] = trainer.state.log_history[0]["loss"]
    assert losses[True] == pytest.approx(losses[False], rel=0.05)
    assert losses[True] != losses[False]


def test_a_resumed_run_ends_bit_identical_to_the_straight_one(tokenizer, tmp_path):
    ends = {}
    for name, stops in (("straight", (6,)), ("resumed", (3, 6))):
        for steps in stops:
            trainer = on_policy_trainer(
                tokenizer,
                tmp_path / name,
                max_steps=steps,
                learning_rate=1e-2,
                lr_scheduler_type="constant",
                shuffle_dataset=True,
                per_device_train_batch_size=2,
                gradient_accumulation_steps=2,
                save_strategy="steps",
                save_steps=3,
            )
            sparsity = sparsity_of(trainer.model, tmp_path / "prune", end_step=5)
            checkpoint = newest_whole_checkpoint(tmp_path / name)
            if checkpoint is not None:
                sparsity.resume(checkpoint)
            callback = trainer.add_sparsity(sparsity)
            trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        ends[name] = (trainer.model.state_dict(), callback.state, sparsity.refinements)
    (straight, first, log), (resumed, second, second_log) = ends["straight"], ends["resumed"]
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    assert all(torch.equal(first.movement[n], second.movement[n]) for n in first.masks)
    assert log == second_log


def test_zero3_without_zero3_is_refused(tokenizer, tmp_path):
    with pytest.raises(UserError, match=r"^teacher\.placement: zero3: .*set device or cpu instead"):
        on_policy_trainer(tokenizer, tmp_path, options={"teacher_placement": "zero3"})
