"""The gradient of one GRPO step with a teacher term on recorded completions, inside a rank."""

import os

import torch
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor
from transformers.integrations import unset_hf_deepspeed_config

from pipeline.models.chunked_head import chunked_head
from pipeline.models.loading import load_tokenizer
from tests.unit.recorded_grpo import recorded_trainer
from tests.unit.tiny_models import tiny
from tests.unit.unchecked import Unchecked

BATCH_SIZE = 8  # completions of the step, over all ranks: two prompts, four completions each
PLACES = {
    "advantage": {},
    "reward": {},
    "loss": {"teacher_kl_direction": "reverse"},
    "loss-top-k": {"teacher_kl_top_k": 5},
}


def gradients(rank, world_size, layout, placement, folder) -> dict[str, dict[str, Tensor]]:
    """Place to weight name to gradient, as a step of plain gradient descent at rate 1 shows it.

    Args:
        rank: Of this process.
        world_size: Ranks; the completions have other lengths on each.
        layout: `ddp`, `zero2` or `zero3`; with one rank also `plain`.
        placement: Of the teacher.
        folder: For TRL.
    """
    found = {place: _gradient(world_size, layout, placement, folder, place) for place in PLACES}
    return found if rank == 0 else {}


def _gradient(world_size, layout, placement, folder, place) -> dict[str, Tensor]:
    forget_engine()
    tokenizer = load_tokenizer("bundled")
    student = tiny(tokenizer, 0)
    before = {name: weight.detach().clone() for name, weight in student.named_parameters()}
    trainer = recorded_trainer(
        tokenizer,
        folder,
        model=student,
        teacher=tiny(tokenizer, 1),
        options={
            "teacher_kl_place": place.split("-")[0],
            "teacher_kl_weight": 0.7,
            "teacher_placement": placement,
            "teacher_micro_batch_size": 3,
        }
        | PLACES[place],
        per_device_train_batch_size=BATCH_SIZE // world_size // 2,
        gradient_accumulation_steps=2,
        optim="sgd",
        learning_rate=1.0,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        **deepspeed_arguments(layout),
    )
    two_tokens = 2 * len(tokenizer)  # so that the ranks need different numbers of chunks
    for model in (trainer.model, getattr(trainer.teacher, "module", trainer.teacher)):
        chunked_head(model).max_logits = two_tokens
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


def deepspeed_arguments(layout: str) -> dict:
    """What `GRPOConfig` needs for a layout."""
    if not layout.startswith("zero"):
        return {}
    zero = {
        "stage": int(layout.removeprefix("zero")),
        "stage3_param_persistence_threshold": 0,
        "stage3_gather_16bit_weights_on_model_save": True,
    }
    automatic = (
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "gradient_clipping",
    )
    return {
        "deepspeed": {
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            **dict.fromkeys(automatic, "auto"),
        }
    }


def forget_engine() -> None:
    """Lets the next trainer of this process choose its layout anew."""
    unset_hf_deepspeed_config()
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        del os.environ[name]
    torch.manual_seed(0)
