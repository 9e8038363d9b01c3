"""A whole on_policy stage that keeps its best student, inside a rank."""

from pathlib import Path
from typing import Any
from unittest import mock

from torch import Tensor
from transformers import TrainerCallback

from pipeline.config_loading import load_config
from pipeline.models.prunable import prunable_weights
from pipeline.stages.inputs import open_task
from pipeline.stages.training import train
from pipeline.training.probe import Probe
from tests.distributed.grpo_jobs import deepspeed_arguments, forget_engine
from tests.unit.recorded_on_policy import on_policy_trainer
from tests.unit.test_training import sparsity_of

SMALL = {
    "task.num_train": 50,
    "task.num_calibration": 8,
    "task.num_probe": 7,
    "task.num_test": 8,
    "evaluate.max_new_tokens": 3,
    "evaluate.every_steps": 1,
}


class Snapshots(TrainerCallback):
    """Whole weights on rank 0 after each step, once all that happens in it has."""

    def __init__(self, trainer):
        self.trainer, self.steps = trainer, {}

    def on_step_begin(self, args, state, control, **kwargs):
        found = self.trainer.accelerator.get_state_dict(self.trainer.model_wrapped) or {}
        self.steps[state.global_step] = {n: w.clone().cpu() for n, w in found.items()}


def stage(rank, world_size, layout, folder, accuracies) -> tuple[Any, dict[int, Any], list[float]]:
    """Trains as long as there are hand-made accuracies.

    Args:
        rank: Of this process.
        world_size: Ranks.
        layout: `ddp`, `zero2` or `zero3`.
        folder: Of the run.
        accuracies: After each step.

    Returns:
        What the stage says, whole weights by step (on rank 0), and the real accuracies.
    """
    forget_engine()
    out = Path(folder) / "on_policy"
    config = load_config("configs/quickstart.yaml", SMALL)
    inputs = open_task(config)
    trainer = on_policy_trainer(
        inputs.tokenizer,
        out,
        max_steps=len(accuracies),
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        per_device_train_batch_size=2,
        save_strategy="steps",
        save_steps=2,
        **deepspeed_arguments(layout),
    )
    assert prunable_weights(trainer.model)
    sparsity = sparsity_of(trainer.model, Path(folder) / f"prune-{rank}", end_step=2)
    sparsity.stage, sparsity.starts_final = "on_policy", False
    snapshots = Snapshots(trainer)
    trainer.add_callback(snapshots)
    real, ask = [], Probe.accuracy

    def accuracy(probe: Probe) -> float:
        real.append(ask(probe))
        return accuracies[trainer.state.global_step - 1]

    with mock.patch.object(Probe, "accuracy", accuracy):
        done = train(config, inputs, trainer, sparsity, out, None)
    if trainer.is_deepspeed_enabled:
        trainer.deepspeed.destroy()
    forget_engine()
    return done, snapshots.steps if rank == 0 else {}, real


def unwrapped(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names as in the model itself."""
    return {name.removeprefix("module."): weight for name, weight in weights.items()}
