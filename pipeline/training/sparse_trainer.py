"""What a sparse student adds to any TRL trainer: hooks, refinement on a schedule, checkpoints.

`SparseTrainer` is mixed into a trainer class; `Sparsity` holds everything it needs. Refinement
happens right after the optimizer step, so the weights that generate next already carry the new
mask. One process without DeepSpeed: the optimizer holds the weights themselves.
"""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, ProgressCallback, TrainerCallback

from pipeline.models.prunable import apply_masks, prunable_weights
from pipeline.sparsity.hooks import SparsityHooks
from pipeline.sparsity.refine import RefinementRule, refine
from pipeline.sparsity.schedule import RefinementSchedule
from pipeline.sparsity.state import SparsityState
from pipeline.training.checkpoint import finish_checkpoint, load_refinements
from pipeline.training.progress import StageProgress

logger = logging.getLogger(__name__)


@dataclass
class Sparsity:
    """Masks and movement of one stage, and the rules that change them."""

    state: SparsityState
    schedule: RefinementSchedule | None
    """None: the mask is fixed in this stage."""
    rule: RefinementRule
    half_life_steps: float
    first_step: int
    """Steps of earlier stages that refine; the schedule counts across them."""
    stage: str
    refinements: list[dict[str, Any]] = field(default_factory=list)

    def load(self, checkpoint: Path) -> None:
        """Takes masks, movement and the list of refinements from a checkpoint."""
        self.state = SparsityState.load(checkpoint)
        self.refinements = load_refinements(checkpoint)


class SparsityCallback(TrainerCallback):
    """Binds masks and movement to the optimizer and refines the mask on schedule."""

    def __init__(self, model: PreTrainedModel, sparsity: Sparsity):
        """`model`: the student, whose prunable weights the optimizer trains."""
        self.weights = prunable_weights(model)
        self.model = model
        self.sparsity = sparsity
        self.optimizer: torch.optim.Optimizer | None = None
        self.hooks: SparsityHooks | None = None

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
        """Registers the hooks on the optimizer that updates the weights."""
        self.optimizer = getattr(optimizer, "optimizer", optimizer)
        self.sparsity.state.to(next(iter(self.weights.values())).device)
        apply_masks(self.model, self.sparsity.state.masks)
        self.bind()

    def bind(self) -> None:
        """Puts the hooks on the optimizer."""
        self.hooks = SparsityHooks(
            self.optimizer, self.weights, self.sparsity.state, self.sparsity.half_life_steps
        )

    def on_step_end(self, args, state, control, **kwargs):
        """Refines the mask when the schedule says so."""
        sparsity = self.sparsity
        step = sparsity.first_step + state.global_step
        if sparsity.schedule is None or not sparsity.schedule.is_due(step):
            return
        target = sparsity.schedule.sparsity_at(step)
        done, grown = refine(
            sparsity.state,
            self.weights,
            sparsity.rule,
            sparsity=target,
            regrow_fraction=sparsity.schedule.regrow_fraction_at(step),
            step=step,
        )
        for name, mask in grown.items():
            self._clear_momentum(name, mask)
        sparsity.refinements.append(
            {
                "stage": sparsity.stage,
                "step": step,
                "target": target,
                "pruned": done.pruned,
                "regrown": done.regrown,
                "survived": done.survived,
                "accepted": True,
            }
        )

    def on_train_end(self, args, state, control, **kwargs):
        """Takes the hooks off."""
        self.hooks.remove()

    def _clear_momentum(self, name: str, grown: torch.Tensor) -> None:
        """A regrown weight starts with m = 0 and keeps v.

        With both cleared, Adam's first update would be about three learning rates.
        """
        moments = self.optimizer.state.get(self.weights[name], {})
        if "exp_avg" in moments:
            moments["exp_avg"].masked_fill_(grown, 0.0)


class SparseTrainer:
    """Mixin for a TRL trainer; call `add_sparsity` before `train`."""

    sparsity: Sparsity

    def add_sparsity(self, sparsity: Sparsity) -> SparsityCallback:
        """Makes the trainer keep and refine the masks. Returns the callback that does it."""
        self.sparsity = sparsity
        callback = SparsityCallback(self.accelerator.unwrap_model(self.model), sparsity)
        self.add_callback(callback)
        if not self.args.disable_tqdm:
            self.remove_callback(ProgressCallback)
            self.add_callback(StageProgress(sparsity.stage))
        return callback

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Adds `sparsity`, the fraction of pruned weights, to what the trainer logs."""
        super().log({**logs, "sparsity": self.sparsity.state.sparsity}, *args, **kwargs)

    def _save_checkpoint(self, model, trial):
        super()._save_checkpoint(model, trial)
        checkpoint = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        finish_checkpoint(checkpoint, self.sparsity.state, self.sparsity.refinements)
