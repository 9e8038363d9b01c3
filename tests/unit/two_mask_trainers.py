"""GRPO trainers of a tiny masked student that sample groups under two masks."""

import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from pipeline.artifacts import MASK_FILE
from pipeline.models.prunable import prunable_weights
from pipeline.sparsity.masks import save_masks
from pipeline.sparsity.movement import MovementRule
from pipeline.sparsity.refine import RefinementRule
from pipeline.sparsity.schedule import RefinementSchedule
from pipeline.sparsity.threshold import masks_by_score
from pipeline.training.grpo_trainer import TeacherGRPOTrainer
from pipeline.training.sparse_trainer import Sparsity
from rewards.correctness import Correctness
from tests.unit.tiny_models import tiny

PROMPTS = ["12@35=", "12@35#47=", "05#44=", "60@01="]
PRESENT, FINAL, END_STEP = 0.5, 0.75, 10
RULE = RefinementRule(
    scope="matrix", score="magnitude", movement_weight=0.0, protect_steps=0, min_density=0.0
)
GREEDY = {"top_k": 1}
"""Sampling in which nothing is left to chance, so that masks and layouts can be compared."""


def schedule(**changes):
    """From PRESENT to FINAL in one refinement."""
    values = {
        "start_sparsity": PRESENT,
        "final_sparsity": FINAL,
        "begin_step": END_STEP - 1,
        "end_step": END_STEP,
        "every_steps": 5,
        "regrow_fraction": 0.0,
    }
    return RefinementSchedule(**(values | changes))


def is_right(completion, answer):
    """Verifier: what a random model gets right half the time."""
    return float(sum(map(ord, completion)) % 2 == 0)


class Replay(GRPOTrainer):
    """Below our trainer in the order of methods: answers with completions that were recorded."""

    recorded: list | None = None
    """B completions; None samples. Odd rows are asked for first."""

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        if self.recorded is None:
            return super()._generate_single_turn(prompt_ids, *args, **kwargs)
        if len(prompt_ids) == len(self.recorded):
            return self.recorded, None
        self.asked = not getattr(self, "asked", False)
        return self.recorded[1::2] if self.asked else self.recorded[::2], None


class TwoMaskTrainer(TeacherGRPOTrainer, Replay):
    """Keeps the batches that it has scored."""

    def _generate_and_score_completions(self, inputs):
        batch = super()._generate_and_score_completions(inputs)
        self.scored = [*getattr(self, "scored", []), batch]
        return batch


def two_mask_trainer(
    tokenizer, folder, *, weight=1.0, plan=None, options=None, verifier=is_right, **arguments
):
    """A trainer whose student carries a magnitude mask of sparsity PRESENT; not trained yet.

    `plan` is the schedule, `options` are those of the trainer, `arguments` those of `GRPOConfig`.
    """
    model = tiny(tokenizer, 0)
    magnitudes = {name: w.detach().abs() for name, w in prunable_weights(model).items()}
    values = {
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 4,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "beta": 0.0,
        "shuffle_dataset": False,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
    }
    trainer = TwoMaskTrainer(
        model=model,
        reward_funcs=[Correctness(verifier)],
        args=GRPOConfig(output_dir=str(folder), **(values | arguments)),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS * 4, "answer": [""] * 16}),
        processing_class=tokenizer,
        **({"num_masks": 2, "sparsity_weight": weight} | (options or {})),
    )
    trainer.model.train()
    if trainer.accelerator.is_main_process:
        save_masks(folder / MASK_FILE, masks_by_score(magnitudes, PRESENT, "matrix"))
    trainer.accelerator.wait_for_everyone()
    trainer.add_sparsity(
        Sparsity(
            source=folder,
            schedule=plan or schedule(),
            rule=RULE,
            movement=MovementRule(half_life_steps=5.0),
            first_step=0,
            stage="grpo",
        )
    )
    return trainer


def sparser_model(trainer, sparsity=FINAL):
    """A copy of the student with the smallest weights of each matrix set to 0, by sorting."""
    model = tiny(trainer.processing_class, 0)
    model.load_state_dict(trainer.model.state_dict())
    for weight in prunable_weights(model).values():
        order = weight.data.abs().flatten().argsort()
        weight.data.view(-1)[order[: round(sparsity * order.numel())]] = 0.0
    return model


def rows(group_size=4, num_prompts=2):
    """What TRL is given: the prompts of one batch, a group's beside each other."""
    return [{"prompt": p, "answer": ""} for p in PROMPTS[:num_prompts] for _ in range(group_size)]


def log_probs(model, batch):
    """(B, T) of a batch of TRL's, with one forward pass of another model."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    num_completion = batch["completion_ids"].size(1)
    with torch.no_grad():
        logits = model(ids, mask).logits[:, -num_completion - 1 : -1].log_softmax(-1)
    return logits.gather(-1, batch["completion_ids"].unsqueeze(-1)).squeeze(-1)
