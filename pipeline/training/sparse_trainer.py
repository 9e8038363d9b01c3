"""What a sparse student adds to any TRL trainer: hooks, refinement on a schedule, checkpoints.

`SparseTrainer` is mixed into a trainer class; `Sparsity` says what it does. Once the optimizer
exists, the callback finds the fp32 master weights in it, on one process, under DDP or DeepSpeed
ZeRO-1, 2 and 3. Refinement happens right after the optimizer step, so the weights that generate
next already carry the new mask.
"""

import logging
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transformers import ProgressCallback, Trainer, TrainerCallback
from transformers.integrations import TensorBoardCallback

from pipeline.errors import UserError
from pipeline.models.prunable import prunable_weights
from pipeline.ranks import raise_together
from pipeline.sparsity.hooks import SparsityHooks
from pipeline.sparsity.movement import MovementRule
from pipeline.sparsity.refine import Refinement, RefinementRule, refine
from pipeline.sparsity.schedule import RefinementSchedule, Waiting
from pipeline.sparsity.shards import ShardedWeights
from pipeline.sparsity.state import SparsityState
from pipeline.training.checkpoint import (
    add_sparsity,
    load_sparsity,
    new_checkpoint,
    read_note,
)
from pipeline.training.engine_metrics import EngineMetrics, movement_quantiles
from pipeline.training.exact_resume import load_buffer, repeat_draws, save_buffer
from pipeline.training.heldout import HeldoutCallback
from pipeline.training.muon import MuonAdamW
from pipeline.training.progress import StageProgress
from pipeline.training.safe_loading import allow_deepspeed, force_safe_loading
from pipeline.training.skipped_steps import SkippedSteps
from pipeline.training.topology_change import AnyTopology, batch_of, layout_of
from pipeline.training.trained_shards import save_map, shards_of, trained_shards
from pipeline.training.verified_refinement import Verification, VerifiedRefinement

logger = logging.getLogger(__name__)


@dataclass
class Sparsity:
    """Where masks and movement of a stage come from, and the rules that change them."""

    source: Path
    """Folder of the stage before, or a checkpoint of this one."""
    schedule: RefinementSchedule | None
    """None: the mask is fixed in this stage."""
    rule: RefinementRule
    movement: MovementRule
    first_step: int
    """Steps of earlier stages that refine; the schedule counts across them."""
    stage: str
    starts_final: bool = True
    """Whether the masks at `source` have the final sparsity already."""
    is_last: bool = True
    """Whether no later stage refines."""
    verification: Verification | None = None
    """How candidate masks are judged; None: the schedule's mask is bound unseen."""
    earlier: list[dict[str, Any]] = field(default_factory=list)
    """Refinements of the stages before, behind which a schedule that waits goes on."""
    refinements: list[dict[str, Any]] = field(default_factory=list)

    def resume(self, checkpoint: Path) -> None:
        """Takes masks, movement and the list of refinements from a checkpoint."""
        self.source = checkpoint
        self.refinements = read_note(checkpoint)["refinements"]


def find_shards(trainer: Trainer) -> ShardedWeights:
    """Where the trainer's optimizer holds every prunable weight.

    Raises:
        ValueError: In a place where no mask can be enforced; says which setting to change.
    """
    return shards_of(trainer, prunable_weights(trainer.accelerator.unwrap_model(trainer.model)))


class SparsityCallback(TrainerCallback):
    """Binds masks and movement to the optimizer and refines the mask on schedule."""

    weights: ShardedWeights
    state: SparsityState
    hooks: SparsityHooks

    def __init__(self, trainer: Trainer, sparsity: Sparsity):
        """`trainer`: a `SparseTrainer`, whose optimizer need not exist yet."""
        self.trainer = trainer
        self.sparsity = sparsity
        self.measured = 0.0
        self.metrics = EngineMetrics()
        self.verified = None
        if sparsity.verification is not None and sparsity.schedule is not None:
            self.verified = VerifiedRefinement(
                trainer, sparsity.verification, sparsity.schedule, sparsity.rule, sparsity.stage
            )

    def on_train_begin(self, args, state, control, **kwargs):
        """Registers the hooks on the optimizer that updates the weights."""
        failure = None
        try:
            self.weights = self.find_weights()
            self.state = load_sparsity(
                self.sparsity.source, self.weights, self.sparsity.movement.dtype
            )
        except (UserError, ValueError) as error:
            failure = error
        raise_together(failure)
        self.bind()
        self.measured = self.state.sparsity(self.weights)

    @property
    def step(self) -> int:
        """Optimizer steps so far, counted across the stages that refine."""
        return self.sparsity.first_step + self.trainer.state.global_step

    @property
    def is_last_mask(self) -> bool:
        """Whether no refinement of this stage's schedule is to come."""
        schedule = self.sparsity.schedule
        if self.verified is not None:
            return self._waiting().is_complete
        return schedule is None or self.step >= schedule.end_step

    @property
    def is_final_sparsity(self) -> bool:
        """Whether the masks have the sparsity that the whole run is after."""
        sparsity = self.sparsity
        return sparsity.starts_final or (sparsity.schedule is not None and self.is_last_mask)

    def find_weights(self) -> ShardedWeights:
        """This rank's shards of the prunable weights."""
        return find_shards(self.trainer)

    def take_metrics(self) -> dict[str, float]:
        """What the engine did since the last log, for the trackers."""
        return {
            "sparsity": self.measured,
            **self.metrics.take(),
            **movement_quantiles(self.state),
        }

    def bind(self) -> None:
        """Puts the hooks on the optimizer."""
        self.hooks = SparsityHooks(
            self.weights,
            self.state,
            self.sparsity.movement,
            zero_pruned_gradients=isinstance(self.weights.optimizer, MuonAdamW),
            timed=self.metrics.timed,
        )

    def on_step_begin(self, args, state, control, **kwargs):
        """Tells the hooks which step comes, from 1."""
        self.hooks.step = self.step + 1

    def on_step_end(self, args, state, control, **kwargs):
        """Refines the mask when the schedule says so."""
        sparsity, step = self.sparsity, self.step
        refine_at = self._refine if self.verified is None else self._refine_verified
        self.metrics.steps += 1
        try:
            with self.metrics.timed():
                entry = None if sparsity.schedule is None else refine_at(step)
        except ValueError as error:
            raise UserError(str(error)) from error
        if entry is not None:
            self.metrics.count_refinement(entry)
            self.measured = self.state.sparsity(self.weights)
            sparsity.refinements.append({"stage": sparsity.stage, "step": step, **entry})
            self.trainer.weights_changed()

    def _refine(self, step: int) -> dict[str, Any] | None:
        """Binds the schedule's mask. Returns what was done, None where nothing was due."""
        sparsity = self.sparsity
        if not sparsity.schedule.is_due(step):
            return None
        target = sparsity.schedule.sparsity_at(step)
        done = self.refine(target, sparsity.schedule.regrow_fraction_at(step), step)
        return {"target": target, **asdict(done), "accepted": True}

    def _refine_verified(self, step: int) -> dict[str, Any] | None:
        """Binds the best mask, if any is good enough. Returns what was done."""
        waiting = self._waiting()
        if not waiting.is_due(step):
            return None
        return self.verified.decide(self.state, self.weights, waiting, step)

    def position(self, step: int) -> int:
        """Where the schedule stands after a step: behind it by what it has waited."""
        return step if self.verified is None else math.floor(step - self._waiting().waited)

    def refine(self, sparsity: float, regrow_fraction: float, step: int) -> Refinement:
        """Refines the masks once, see `sparsity/refine.py`."""
        return refine(
            self.state,
            self.weights,
            self.sparsity.rule,
            sparsity=sparsity,
            regrow_fraction=regrow_fraction,
            step=step,
        )

    def state_now(self) -> SparsityState:
        """What a stage leaves of masks and movement. Every rank calls it."""
        return self.state

    def save(self, checkpoint: Path) -> None:
        """Adds what else a resumed run needs to a checkpoint. Every rank calls it."""

    def on_train_end(self, args, state, control, **kwargs):
        """Takes the hooks off, and says so where a schedule that waited is not done."""
        self.hooks.remove()
        sparsity, schedule = self.sparsity, self.sparsity.schedule
        if self.verified is None or not sparsity.is_last:
            return
        if schedule.sparsity_at(self._waiting().position) < schedule.final_sparsity:
            logger.warning(
                "%s: ends at sparsity %.4f, short of prune.sparsity %.4f: the sparser masks lost "
                "more than refine.tolerance, or there were too few steps; train longer, set "
                "refine.tolerance or rewards.sparsity_weight higher, or refine.verify: false",
                sparsity.stage,
                self.measured,
                schedule.final_sparsity,
            )

    def _waiting(self) -> Waiting:
        """How far the schedule has come, from all decisions so far."""
        sparsity = self.sparsity
        return Waiting.after(sparsity.schedule, [*sparsity.earlier, *sparsity.refinements])


class SparseTrainer(AnyTopology):
    """Mixin for a TRL trainer; call `add_sparsity` before `train`."""

    sparsity: SparsityCallback
    heldout: HeldoutCallback | None = None
    _saving_in: Path | None = None

    def add_sparsity(
        self, sparsity: Sparsity, kind: type[SparsityCallback] = SparsityCallback
    ) -> SparsityCallback:
        """Makes the trainer keep and refine the masks. Returns the callback that does it."""
        self.sparsity = kind(self, sparsity)
        self.add_callback(self.sparsity)
        self.skipped_steps = SkippedSteps(self.accelerator.unwrap_model(self.model), sparsity.stage)
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
                folder = Path(self.args.output_dir)
                callback.logging_dir = str(folder.parent / "tensorboard" / folder.name)
        if not self.args.disable_tqdm:
            self.remove_callback(ProgressCallback)
            self.add_callback(StageProgress(sparsity.stage))
        return self.sparsity

    def weights_changed(self) -> None:
        """Has vLLM load the weights again, which it does by itself only after a step."""
        if hasattr(self, "_last_loaded_step"):
            self._last_loaded_step = -1

    def add_heldout(self, heldout: HeldoutCallback) -> None:
        """Makes the trainer measure held-out accuracy; after `add_sparsity`."""
        self.heldout = heldout
        self.add_callback(heldout)

    def train(self, resume_from_checkpoint: str | None = None, **kwargs):
        """Trains; whatever ends it, the next message starts on a line of its own."""
        force_safe_loading()
        if self.is_deepspeed_enabled:
            allow_deepspeed()
        if resume_from_checkpoint is not None:
            load_buffer(self, Path(resume_from_checkpoint), sample_anew=self._rows_moved)
        try:
            return super().train(resume_from_checkpoint, **kwargs)
        finally:
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, StageProgress):
                    callback.close()

    def _get_train_sampler(self, *args, **kwargs):
        self._train_sampler = super()._get_train_sampler(*args, **kwargs)
        return self._train_sampler

    def _run_epoch(self, *args, **kwargs):
        """Nothing after a stage's last checkpoint, where transformers takes one more step."""
        if kwargs["resume_from_checkpoint"] and kwargs["epoch"] == kwargs["epochs_trained"]:
            repeat_draws(self._train_sampler, kwargs["epochs_trained"])
        has_ended = self.state.global_step >= self.state.max_steps
        if has_ended or (self.heldout is not None and self.heldout.is_over):
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Adds what the engine did, and the number of skipped steps, to the log."""
        logs = {**logs, **self.sparsity.take_metrics()}
        if self.skipped_steps.count:
            logs["skipped_steps"] = self.skipped_steps.count
        super().log(logs, *args, **kwargs)

    def _get_grad_norm(self, model, grad_norm=None):
        """Drops gradients that are not finite, so that the optimizer skips the step."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        value = math.nan if norm is None else float(norm)
        usable = self.skipped_steps.check(value, self.state.global_step + 1)
        if not usable and not self.is_deepspeed_enabled:
            for parameter in model.parameters():
                parameter.grad = None
        return norm

    def _save_checkpoint(self, model, trial):
        out, push = Path(self.args.output_dir), self.args.push_to_hub
        with new_checkpoint(out, self.state.global_step, self.args.save_total_limit) as folder:
            self._saving_in, self.args.push_to_hub = folder.parent, False
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._saving_in, self.args.push_to_hub = None, push
            if self.heldout is not None:
                self.heldout.keep(folder)
            save_buffer(self, folder)
            callback = self.sparsity
            callback.save(folder)
            save_map(folder, trained_shards(self))
            note = {
                "refinements": callback.sparsity.refinements,
                "layout": layout_of(self),
                "batch": batch_of(self),
                "topology_changes": self.topology_changes,
            }
            add_sparsity(folder, callback.state, callback.weights, note)
        if push:
            self._push_from_checkpoint(str(out / folder.name))

    def _get_output_dir(self, trial):
        """Where transformers puts and rotates checkpoints: while one is written, beside."""
        return str(self._saving_in or super()._get_output_dir(trial))
