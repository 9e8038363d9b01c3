"""The gradient of one on-policy step on recorded completions, inside a rank."""

from torch import Tensor

from pipeline.models.loading import load_tokenizer
from tests.distributed.grpo_jobs import deepspeed_arguments, forget_engine
from tests.unit.recorded_on_policy import COMPLETIONS, RecordedTrainer, on_policy_trainer
from tests.unit.tiny_models import tiny
from tests.unit.unchecked import Unchecked


def gradient(rank, world_size, layout, placement, folder) -> dict[str, Tensor]:
    """Weight name to gradient, as a step of plain gradient descent at rate 1 shows it.

    Args:
        rank: Of this process.
        world_size: Ranks; the completions have other lengths on each.
        layout: `ddp`, `zero2` or `zero3`; with one rank also `plain`.
        placement: Of the teacher.
        folder: For TRL.
    """
    forget_engine()
    tokenizer = load_tokenizer("bundled")
    student = tiny(tokenizer, 0)
    before = {name: weight.detach().clone() for name, weight in student.named_parameters()}
    trainer = on_policy_trainer(
        tokenizer,
        folder,
        trainer_class=RecordedTrainer,
        model=student,
        options={"teacher_placement": placement},
        beta=0.3,
        per_device_train_batch_size=len(COMPLETIONS) // world_size // 2,
        gradient_accumulation_steps=2,
        optim="sgd",
        learning_rate=1.0,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        **deepspeed_arguments(layout),
    )
    trainer.sparsity = trainer.skipped_steps = Unchecked()
    trainer.train()
    assert trainer.accelerator.num_processes == world_size
    if trainer.is_deepspeed_enabled:
        after = trainer.accelerator.get_state_dict(trainer.deepspeed) or {}
        trainer.deepspeed.destroy()
    else:
        after = trainer.accelerator.unwrap_model(trainer.model).state_dict()
    forget_engine()
    return {name: before[name] - weight.cpu() for name, weight in after.items()}
