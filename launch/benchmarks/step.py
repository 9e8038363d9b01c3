"""The step suite: what mask and movement add to a GRPO step of the quickstart.

One trainer; its hooks are on in every second step, so both sides see the same model, prompts and
machine. Refinement steps are timed apart, because they come once in `refine.every_steps`.
"""

import statistics
import tempfile
import time
from pathlib import Path

import torch
from transformers import TrainerCallback

from pipeline.artifacts import MASK_FILE
from pipeline.config_loading import load_config
from pipeline.models.prunable import apply_masks, prunable_weights
from pipeline.sparsity.masks import save_masks
from pipeline.sparsity.movement import MovementRule
from pipeline.sparsity.refine import RefinementRule, refine
from pipeline.sparsity.threshold import masks_by_score
from pipeline.stages.grpo import as_dataset
from pipeline.stages.inputs import open_dense_student, open_task, open_teacher
from pipeline.training.arguments import grpo_arguments
from pipeline.training.grpo_trainer import TeacherGRPOTrainer
from pipeline.training.sparse_trainer import Sparsity
from rewards.mix import build_rewards

ROOT = Path(__file__).resolve().parents[2]
WARM_UP_STEPS = 6


class AlternatingHooks(TrainerCallback):
    """Switches the engine on in even steps and off in odd ones, and times every step in seconds."""

    def __init__(self, sparsity_callback):
        """`sparsity_callback`: what `add_sparsity` returned."""
        self.sparsity_callback = sparsity_callback
        self.seconds: dict[bool, list[float]] = {True: [], False: []}

    def on_step_begin(self, args, state, control, **kwargs):
        """Sets the hooks for the coming step and starts the clock."""
        self.with_engine = state.global_step % 2 == 0
        callback = self.sparsity_callback
        callback.hooks.remove()
        if self.with_engine:
            callback.bind()
        self.started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        """Notes the time once the machine is warm."""
        if state.global_step > WARM_UP_STEPS:
            self.seconds[self.with_engine].append(time.perf_counter() - self.started)


def magnitude_masks(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Magnitude masks at sparsity 0.9, so that both kinds of weights are there."""
    return masks_by_score({n: w.detach().abs() for n, w in weights.items()}, 0.9, "matrix")


def run(num_steps: int) -> dict:
    """Medians in seconds of a GRPO step with and without mask and movement, and of a refinement."""
    config = load_config(ROOT / "configs" / "quickstart.yaml", {"grpo.max_steps": num_steps})
    inputs = open_task(config)
    functions, weights = build_rewards(["correctness"], None, inputs.verifier)
    student = open_dense_student(config)
    masks = magnitude_masks(prunable_weights(student))
    apply_masks(student, masks)
    rule = RefinementRule(
        scope="matrix", score="magnitude", movement_weight=0.5, protect_steps=20, min_density=0.0
    )
    with tempfile.TemporaryDirectory() as folder:
        save_masks(Path(folder) / MASK_FILE, masks)
        trainer = TeacherGRPOTrainer(
            model=student,
            reward_funcs=functions,
            args=grpo_arguments(config, Path(folder), weights),
            train_dataset=as_dataset(inputs.task.train, inputs),
            processing_class=inputs.tokenizer,
            teacher=open_teacher(config),
            teacher_kl_weight=config.rewards.teacher_kl_weight,
        )
        sparsity_callback = trainer.add_sparsity(
            Sparsity(
                source=Path(folder),
                schedule=None,
                rule=rule,
                movement=MovementRule(half_life_steps=config.movement.half_life_steps),
                first_step=0,
                stage="grpo",
            )
        )
        timer = AlternatingHooks(sparsity_callback)
        trainer.add_callback(timer)
        trainer.train()
    refinements = []
    for _ in range(7):
        started = time.perf_counter()
        refine(
            sparsity_callback.state,
            sparsity_callback.weights,
            rule,
            sparsity=0.9,
            regrow_fraction=0.1,
            step=10**6,
        )
        refinements.append(time.perf_counter() - started)
    ratios = [a / b for a, b in zip(timer.seconds[True], timer.seconds[False], strict=False)]
    quartiles = statistics.quantiles(ratios, n=4)
    return {
        "with_engine_seconds": statistics.median(timer.seconds[True]),
        "without_engine_seconds": statistics.median(timer.seconds[False]),
        "ratio": statistics.median(timer.seconds[True]) / statistics.median(timer.seconds[False]),
        "paired_ratio_quartiles": [quartiles[0], quartiles[2]],
        "refinement_seconds": statistics.median(refinements),
        "num_pairs": len(ratios),
    }


def show(result: dict) -> None:
    """Prints the medians."""
    print(
        f"GRPO step {result['with_engine_seconds']:.3f} s with mask and movement, "
        f"{result['without_engine_seconds']:.3f} s without: ratio {result['ratio']:.3f} "
        f"(quartiles of pairs {result['paired_ratio_quartiles'][0]:.3f} to "
        f"{result['paired_ratio_quartiles'][1]:.3f}); a refinement takes "
        f"{result['refinement_seconds']:.3f} s"
    )
