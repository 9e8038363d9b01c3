"""The trainers around TRL: losses against textbook versions, masks kept, resume exact."""

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import GRPOConfig, SFTConfig

from pipeline.artifacts import MASK_FILE
from pipeline.errors import UserError
from pipeline.models.loading import load_tokenizer
from pipeline.models.prunable import measured_sparsity, prunable_weights
from pipeline.models.teacher import completion_log_probs
from pipeline.sparsity.masks import save_masks
from pipeline.sparsity.movement import MovementRule
from pipeline.sparsity.refine import RefinementRule
from pipeline.sparsity.schedule import RefinementSchedule
from pipeline.training.checkpoint import newest_whole_checkpoint
from pipeline.training.distill_trainer import DistillTrainer, forward_kl
from pipeline.training.grpo_trainer import TeacherGRPOTrainer
from pipeline.training.sparse_trainer import Sparsity
from tests.unit.tiny_models import tiny

CPU = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none"}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("bundled")


def sparsity_of(model, folder, **schedule):
    masks = {n: torch.ones_like(w, dtype=torch.bool) for n, w in prunable_weights(model).items()}
    folder.mkdir(exist_ok=True)
    save_masks(folder / MASK_FILE, masks)
    values = {
        "start_sparsity": 0.0,
        "final_sparsity": 0.75,
        "begin_step": 0,
        "end_step": 4,
        "every_steps": 1,
        "regrow_fraction": 0.2,
    }
    return Sparsity(
        source=folder,
        schedule=RefinementSchedule(**(values | schedule)),
        rule=RefinementRule(
            scope="matrix", score="magnitude", movement_weight=0.5, protect_steps=0, min_density=0.0
        ),
        movement=MovementRule(half_life_steps=5.0),
        first_step=0,
        stage="distill",
    )


def grpo_trainer(tokenizer, tmp_path, *, teacher, weight, **arguments):
    values = {
        "output_dir": str(tmp_path),
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 4,
        "max_steps": 3,
        "beta": 0.0,
        "learning_rate": 1e-2,
        "save_strategy": "no",
    }
    trainer = TeacherGRPOTrainer(
        model=tiny(tokenizer, 0),
        reward_funcs=[lambda completions, **_: [float(len(c) % 2) for c in completions]],
        args=GRPOConfig(**(CPU | values | arguments)),
        train_dataset=Dataset.from_dict({"prompt": ["12@35=", "12@35#47="] * 8}),
        processing_class=tokenizer,
        teacher=teacher,
        teacher_kl_weight=weight,
        teacher_kl_clip=2.0,
    )
    trainer.add_sparsity(sparsity_of(trainer.model, tmp_path / "prune"))
    return trainer


def recorded_batch(trainer, teacher):
    """Two completions of different length; the second prompt is padded on the left."""
    batch = {
        "prompt_ids": torch.tensor([[5, 13, 7, 15], [0, 0, 9, 15]]),
        "prompt_mask": torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]]),
        "completion_ids": torch.tensor([[11, 12, 1], [8, 1, 0]]),
        "completion_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
        "advantages": torch.tensor([0.7, -0.7]),
        "num_items_in_batch": torch.tensor(5),
        "row": torch.tensor([0, 1]),
    }
    batch["teacher_log_probs"] = completion_log_probs(
        teacher,
        torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1),
        torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1),
        3,
        micro_batch_size=1,
    )
    return batch


def token_log_prob(model, prompt, completion, index):
    logits = model(torch.tensor([prompt + completion[:index]])).logits[0, -1]
    return logits.log_softmax(-1)[completion[index]]


def test_loss_gradient_is_the_textbook_policy_gradient_with_a_teacher_term(tokenizer, tmp_path):
    teacher = tiny(tokenizer, 1)
    trainer = grpo_trainer(tokenizer, tmp_path, teacher=teacher, weight=0.3, loss_type="dapo")
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    trainer._compute_loss(trainer.model, recorded_batch(trainer, teacher)).backward()
    gradient = trainer.model.lm_head.weight.grad.clone()

    model, loss = tiny(tokenizer, 0), 0.0
    for prompt, completion, group in (([5, 13, 7, 15], [11, 12, 1], 0.7), ([9, 15], [8, 1], -0.7)):
        for index in range(len(completion)):
            student = token_log_prob(model, prompt, completion, index)
            nats = (student - token_log_prob(teacher, prompt, completion, index)).detach()
            loss = loss - (group - 0.3 * nats.clamp(-2.0, 2.0)) * student / 5
    loss.backward()
    assert torch.allclose(gradient, model.lm_head.weight.grad, atol=1e-6)


def test_a_teacher_equal_to_the_student_changes_nothing(tokenizer, tmp_path):
    gradients = []
    for weight in (0.0, 5.0):
        trainer = grpo_trainer(tokenizer, tmp_path, teacher=tiny(tokenizer, 0), weight=weight)
        trainer.current_gradient_accumulation_steps = 1
        trainer.model.train()
        trainer._compute_loss(trainer.model, recorded_batch(trainer, trainer.teacher)).backward()
        gradients.append(trainer.model.lm_head.weight.grad)
    assert torch.allclose(*gradients, atol=1e-6)


def test_grpo_trains_through_trl_and_reaches_the_target_sparsity(tokenizer, tmp_path):
    trainer = grpo_trainer(tokenizer, tmp_path, teacher=tiny(tokenizer, 1), weight=1.0, max_steps=4)
    trainer.train()
    assert measured_sparsity(trainer.model)[0] == pytest.approx(0.75, abs=1e-3)
    logged = [entry for entry in trainer.state.log_history if "teacher_kl" in entry]
    assert trainer.sparsity.sparsity.refinements[0]["regrown"] == 0, "nothing to regrow when dense"
    assert any(entry["regrown"] > 0 for entry in trainer.sparsity.sparsity.refinements)
    assert logged or trainer.args.logging_steps > 4


def test_forward_kl_against_a_sum_by_hand():
    student, teacher = torch.tensor([[0.0, 1.0]]), torch.tensor([[2.0, 0.0]])
    p, q = teacher.softmax(-1)[0], student.softmax(-1)[0]
    expected = sum(p[i] * (p[i].log() - q[i].log()) for i in range(2))
    assert forward_kl(student, teacher).item() == pytest.approx(expected.item())
    assert forward_kl(teacher, teacher).item() == pytest.approx(0.0, abs=1e-7)


def distill_trainer(tokenizer, out, max_steps):
    rows = [([5, 13, 7, 15], [11, 12, 1]), ([9, 15], [8, 1])] * 16
    dataset = Dataset.from_dict(
        {
            "input_ids": [prompt + completion for prompt, completion in rows],
            "labels": [[-100] * len(prompt) + completion for prompt, completion in rows],
        }
    )
    trainer = DistillTrainer(
        model=tiny(tokenizer, 0),
        args=SFTConfig(
            **CPU,
            output_dir=str(out),
            max_steps=max_steps,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            save_steps=3,
            logging_steps=1,
        ),
        train_dataset=dataset,
        processing_class=tokenizer,
        teacher=tiny(tokenizer, 1),
        kl_weight=1.0,
        ce_weight=0.5,
    )
    return trainer


@pytest.mark.parametrize("chunk", [1, 2, 1000])
def test_distill_loss_is_the_mean_over_completion_tokens(tokenizer, tmp_path, chunk):
    trainer = distill_trainer(tokenizer, tmp_path, 1)
    model, teacher = trainer.model.eval(), trainer.teacher
    weights = dict(model.named_parameters())
    expected, count = 0.0, 0
    for prompt, completion in (([5, 13, 7, 15], [11, 12, 1]), ([9, 15], [8, 1])):
        for index, token in enumerate(completion):
            ids = torch.tensor([prompt + completion[:index]])
            log_q, log_p = (m(ids).logits[0, -1].log_softmax(-1) for m in (model, teacher))
            expected += (log_p.exp() * (log_p - log_q)).sum() - 0.5 * log_q[token]
            count += 1
    gradients = torch.autograd.grad(expected / count, weights.values())
    model.lm_head.max_logits = chunk * model.config.vocab_size  # tokens of a chunk
    batch = trainer.data_collator([trainer.train_dataset[0], trainer.train_dataset[1]])
    loss = trainer.compute_loss(model, dict(batch))
    loss.backward()
    assert loss.item() == pytest.approx((expected / count).item(), rel=1e-5)
    for (name, weight), gradient in zip(weights.items(), gradients, strict=True):
        torch.testing.assert_close(weight.grad, gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_a_resumed_run_ends_bit_identical_to_the_straight_one(tokenizer, tmp_path):
    ends = {}
    for name, stops in (("straight", (6,)), ("resumed", (3, 6))):
        for steps in stops:
            trainer = distill_trainer(tokenizer, tmp_path / name, steps)
            sparsity = sparsity_of(trainer.model, tmp_path / "prune", end_step=5)
            checkpoint = newest_whole_checkpoint(tmp_path / name)
            assert (checkpoint is not None) == (steps != stops[0])
            if checkpoint is not None:
                sparsity.resume(checkpoint)
            callback = trainer.add_sparsity(sparsity)
            trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        ends[name] = (trainer.model.state_dict(), callback.state, sparsity.refinements)
    (straight, first, log), (resumed, second, second_log) = ends["straight"], ends["resumed"]
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    assert all(torch.equal(first.movement[n], second.movement[n]) for n in first.masks)
    assert log == second_log


class NotFinite:
    """Makes the gradient of one weight NaN in chosen training steps."""

    def __init__(self, trainer, name, steps):
        self.trainer, self.steps = trainer, steps
        dict(trainer.model.named_parameters())[name].register_hook(self)

    def __call__(self, gradient):
        bad = self.trainer.state.global_step + 1 in self.steps
        return gradient * float("nan") if bad else gradient


def test_a_step_without_a_finite_gradient_changes_nothing_and_is_counted(tokenizer, tmp_path):
    trainer = distill_trainer(tokenizer, tmp_path, 3)
    callback = trainer.add_sparsity(sparsity_of(trainer.model, tmp_path / "prune", begin_step=99))
    NotFinite(trainer, "model.layers.1.mlp.up_proj.weight", {2})
    seen = []

    class Snapshots(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            weights = [w.detach().clone() for w in trainer.model.parameters()]
            seen.append(weights + [m.clone() for m in callback.state.movement.values()])

    trainer.add_callback(Snapshots())
    trainer.train()
    first, second, third = seen
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(second, third, strict=True))
    assert trainer.skipped_steps.count == 1
    assert all(torch.isfinite(tensor).all() for tensor in third)


@pytest.mark.parametrize("max_norm", [1.0, 0.0])
def test_three_in_a_row_stop_the_run_and_name_the_weight(tokenizer, tmp_path, max_norm):
    trainer = distill_trainer(tokenizer, tmp_path, 8)
    trainer.args.max_grad_norm = max_norm
    trainer.add_sparsity(sparsity_of(trainer.model, tmp_path / "prune"))
    NotFinite(trainer, "model.layers.1.mlp.up_proj.weight", {1, 2, 4, 5, 6})
    named = r"gradient of model\.layers\.1\.mlp\.up_proj\.weight is not finite at step 6"
    with pytest.raises(UserError, match=named):
        trainer.train()
    assert trainer.skipped_steps.count == 5
