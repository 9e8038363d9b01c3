"""Small runs of each training stage that can be stopped after any step, and what they end with.

Seven steps go more than once over the data, refine the mask in most steps, and leave completions of
one generation batch for later steps where the stage can (grpo). `VERIFIED` is grpo with all that
decides over a mask: groups under two masks, refinement verified by reward, squared movement ranked
over the whole model.
"""

import random
from dataclasses import replace

import numpy as np
import torch
from datasets import Dataset
from trl import DistillationConfig, GRPOConfig, SFTConfig

from pipeline.models.loading import load_tokenizer
from pipeline.sparsity.movement import MovementRule
from pipeline.training.checkpoint import read_note
from pipeline.training.distill_trainer import DistillTrainer
from pipeline.training.grpo_trainer import TeacherGRPOTrainer
from pipeline.training.mask_choice import MaskReward
from pipeline.training.on_policy_trainer import OnPolicyTrainer
from pipeline.training.verified_refinement import Verification
from rewards.correctness import Correctness
from tests.unit.test_training import sparsity_of
from tests.unit.tiny_models import tiny
from tests.unit.verified_runs import own_answers

STEPS = 7
STAGES = ("distill", "on_policy", "grpo")
VERIFIED = "grpo, verified"
PROMPTS = ["12@35=", "12@35#47=", "3@5=", "3@5#1=", "4@5=", "4@5#1=", "7@7=", "8@1="]


def prefers_even(completions, **_):
    """A reward that groups differ in."""
    return [float(len(text) % 2) for text in completions]


def is_even(completion, answer):
    """Verifier: what a random model gets right half the time."""
    return float(sum(map(ord, completion)) % 2 == 0)


def trainer_of(stage, out, world_size=1, **arguments):
    """A trainer of `STEPS` steps in each of which two micro-batches are accumulated."""
    tokenizer = load_tokenizer("bundled")
    values = {
        "output_dir": str(out),
        "max_steps": STEPS,
        "per_device_train_batch_size": 4 // world_size,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "linear",
        "save_steps": 1,
        "logging_steps": 2,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
    }
    common = {
        "model": tiny(tokenizer, 0),
        "processing_class": tokenizer,
        "teacher": tiny(tokenizer, 1),
    }
    if stage == "distill":
        rows = [[5 + i, 13, 7, *range(20, 21 + i % 5), 1] for i in range(20)]
        trainer = DistillTrainer(
            args=SFTConfig(**(values | arguments)),
            train_dataset=Dataset.from_dict(
                {"input_ids": rows, "labels": [[-100] * 3 + row[3:] for row in rows]}
            ),
            kl_weight=1.0,
            ce_weight=0.5,
            **common,
        )
    elif stage == "on_policy":
        trainer = OnPolicyTrainer(
            args=DistillationConfig(max_completion_length=4, **(values | arguments)),
            train_dataset=Dataset.from_dict({"prompt": PROMPTS * 2}),
            **common,
        )
    else:
        values |= {"num_generations": 2, "steps_per_generation": 4, "num_iterations": 2}
        if stage == VERIFIED:
            common |= {"num_masks": 2, "sparsity_weight": 1.0}
        trainer = TeacherGRPOTrainer(
            args=GRPOConfig(max_completion_length=4, **(values | arguments)),
            reward_funcs=[Correctness(is_even) if stage == VERIFIED else prefers_even],
            train_dataset=Dataset.from_dict({"prompt": PROMPTS, "answer": [""] * len(PROMPTS)}),
            teacher_kl_weight=0.5,
            **common,
        )
    return trainer


def verified(sparsity, tokenizer):
    """The same from 0 to 75 %, by squared movement over the whole model, each mask verified."""
    verification = Verification(
        prompts=own_answers(tokenizer),
        verifier=lambda completion, answer: float(completion == answer),
        reward=MaskReward(sparsity_weight=1.0, teacher_kl_weight=0.5),
        max_new_tokens=4,
        batch_size=16,
    )
    return replace(
        sparsity,
        rule=replace(sparsity.rule, scope="model", score="movement"),
        movement=MovementRule(kept="squared", half_life_steps=5.0),
        verification=verification,
    )


def run(stage, out, prune, checkpoint=None, world_size=1, callbacks=(), **arguments):
    """Trains to the end, from a checkpoint if one is given.

    `callbacks` are made with the trainer, and hear of each event after its own.

    Returns:
        Weights by name (on rank 0 under ZeRO), this rank's masks and movement, the refinements, and
        the random numbers that come next.
    """
    trainer = trainer_of(stage, out, world_size, **arguments)
    sparsity = sparsity_of(trainer.model, prune, end_step=6)
    sparsity.stage = stage
    if stage == VERIFIED:
        sparsity = verified(sparsity, trainer.processing_class)
    if checkpoint is not None:
        trainer.accept_topology(checkpoint, read_note(checkpoint), stage)
        sparsity.resume(checkpoint)
        random.random(), np.random.rand(), torch.rand(())  # another process drew others before
    callback = trainer.add_sparsity(sparsity)
    for kind in callbacks:
        trainer.add_callback(kind(trainer))
    trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    if trainer.is_deepspeed_enabled:
        weights = trainer.accelerator.get_state_dict(trainer.deepspeed) or {}
        trainer.deepspeed.destroy()
    else:
        weights = trainer.model.state_dict()
    found = {f"weight {name}": tensor.clone() for name, tensor in weights.items()}
    found |= {f"mask {name}": mask for name, mask in callback.state.masks.items()}
    found |= {f"movement {name}": tensor for name, tensor in callback.state.movement.items()}
    next_numbers = [random.random(), float(np.random.rand()), float(torch.rand(()))]
    return found, sparsity.refinements, next_numbers


def differences(first, second):
    """Names of what two runs do not have bit for bit alike."""
    names = [name for name in first[0] if not torch.equal(first[0][name], second[0][name])]
    names += ["refinements"] * (first[1] != second[1])
    return names + ["random numbers"] * (first[2] != second[2])
