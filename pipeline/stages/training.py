"""What the training stages share: the sparsity of the stage, resuming, and what is left on disk.

Every rank runs what is here; rank 0 writes the model and the JSON files.
"""

import json
import logging
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer

from pipeline.artifacts import MASK_FILE, RunFolder, write_json
from pipeline.config import END_FRACTION, TRAINING_STAGES, Config
from pipeline.errors import UserError
from pipeline.lock import check_lock
from pipeline.models.lora import LoraConfig, lora_config, lora_layers, merged_state_dict
from pipeline.ranks import is_main, on_main
from pipeline.sparsity.masks import save_masks
from pipeline.sparsity.movement import MovementRule
from pipeline.sparsity.refine import RefinementRule
from pipeline.sparsity.schedule import RefinementSchedule
from pipeline.sparsity.storage import save_state
from pipeline.stages.inputs import TaskInputs, save_model
from pipeline.stages.training_logs import LOG_FILE, finite_logs
from pipeline.stopping import Stopped, held, requested
from pipeline.training.arguments import forget_deepspeed
from pipeline.training.best_student import adopt_best, read_best
from pipeline.training.checkpoint import (
    check_whole,
    later_checkpoints,
    newest_whole_checkpoint,
    read_note,
)
from pipeline.training.heldout import HeldoutCallback
from pipeline.training.lora import LoraSparsityCallback
from pipeline.training.pace import Pace
from pipeline.training.probe import Probe, ProbePrompt
from pipeline.training.safe_loading import refuse_code
from pipeline.training.sparse_trainer import Sparsity, SparsityCallback
from pipeline.training.step_agreement import StepAgreement
from pipeline.training.verified_refinement import Verification

REFINEMENTS_FILE = "refinements.json"

logger = logging.getLogger(__name__)


def max_steps(config: Config, stage: str) -> int:
    """Optimizer steps of a training stage.

    Raises:
        UserError: The config does not say.
    """
    steps = getattr(config, stage).trl_values.get("max_steps", -1)
    if steps < 1:
        raise UserError(
            f"{stage}.max_steps: {steps}: the refinement schedule needs to know the number of "
            "optimizer steps; set it to at least 1"
        )
    return steps


def refining_stages(config: Config) -> list[str]:
    """The stages of this run in which the mask is refined, in order."""
    return [stage for stage in config.refine.stages if stage in config.run.stages]


def end_step(config: Config, folder: RunFolder) -> int:
    """The step at which `prune.sparsity` is reached.

    The one a stage of this run began with, if any: the schedule must not run backwards, neither
    when `max_steps` is raised nor when the stages run one command at a time.
    """
    records = [folder.record(stage) or {} for stage in config.refine.stages]
    recorded = [record["refine_end_step"] for record in records if "refine_end_step" in record]
    if recorded:
        return recorded[0]
    if config.refine.end_step is not None:
        return config.refine.end_step
    steps = sum(max_steps(config, stage) for stage in refining_stages(config))
    return max(1, round(END_FRACTION * steps))


def first_step(config: Config, folder: RunFolder, stage: str) -> int:
    """Optimizer steps of the refining stages before this one, in this command or earlier."""
    position, steps = TRAINING_STAGES.index(stage), 0
    for name in (n for n in config.refine.stages if TRAINING_STAGES.index(n) < position):
        record = folder.record(name)
        if record is not None and "max_steps" in record:  # else it kept its mask
            steps += record.get("steps", record["max_steps"])
        elif record is None and name in config.run.stages:
            steps += max_steps(config, name)
    return steps


def stage_sparsity(
    config: Config,
    folder: RunFolder,
    stage: str,
    source: Path,
    verification: Verification | None = None,
) -> Sparsity:
    """Schedule and rules of one stage, whose masks come from the folder `source`."""
    refine = config.refine
    start = config.prune.sparsity if refine.start_sparsity is None else refine.start_sparsity
    earlier = _earlier_refinements(folder, stage)
    schedule = None
    if stage in refining_stages(config) and config.moves_mask:
        schedule = RefinementSchedule(
            start_sparsity=start,
            final_sparsity=config.prune.sparsity,
            begin_step=refine.begin_step,
            end_step=end_step(config, folder),
            every_steps=refine.every_steps,
            regrow_fraction=refine.regrow_fraction,
        )
    return Sparsity(
        source=source,
        schedule=schedule,
        rule=RefinementRule(
            scope=refine.scope,
            score=refine.score,
            movement_weight=refine.movement_weight,
            protect_steps=refine.protect_steps,
            min_density=refine.min_density,
        ),
        movement=MovementRule(
            kept=config.movement.kept,
            pruned=config.movement.pruned,
            half_life_steps=config.movement.half_life_steps,
            dtype=getattr(torch, config.movement.dtype),
        ),
        first_step=first_step(config, folder, stage),
        stage=stage,
        starts_final=start == config.prune.sparsity or _is_complete(config, folder, earlier),
        is_last=[stage] == refining_stages(config)[-1:],
        verification=verification,
        earlier=earlier,
    )


def _earlier_refinements(folder: RunFolder, stage: str) -> list[dict[str, Any]]:
    """What the training stages before this one did to the mask."""
    before = TRAINING_STAGES[: TRAINING_STAGES.index(stage)]
    paths = [folder.stage(name) / REFINEMENTS_FILE for name in before if folder.is_done(name)]
    lists = [json.loads(path.read_text()) for path in paths if path.exists()]
    return [entry for entries in lists for entry in entries]


def adapters(config: Config) -> LoraConfig | None:
    """The `peft_config` of a trainer; None for full training."""
    return None if config.lora.r is None else lora_config(r=config.lora.r, alpha=config.lora.alpha)


def _is_complete(config: Config, folder: RunFolder, refinements: list[dict[str, Any]]) -> bool:
    """Whether the schedule's last target was reached, late where it waited."""
    if not refinements:
        return False
    last = refinements[-1]
    return last["step"] - last.get("waited", 0) >= end_step(config, folder)


@dataclass(frozen=True)
class Training:
    """What a stage has trained."""

    steps: int
    """Optimizer steps, fewer than `max_steps` where it ended early."""
    student: dict[str, Any] | None
    """`step` and held-out `accuracy` of the student it left; None where it did not measure."""
    tokens: int = field(default=0, compare=False)
    """Prompts and completions that it was trained on, over all ranks, padding left out."""
    topology_changes: list[dict[str, Any]] = field(default_factory=list)
    """`step`, `before` and `after` of each time it went on under another layout."""


def train(
    config: Config,
    inputs: TaskInputs,
    trainer: Trainer,
    sparsity: Sparsity,
    out: Path,
    checkpoint: Path | None,
) -> Training:
    """Trains to the end, from a checkpoint where there is a whole one, and saves the student.

    The student saved is the last one, or under `evaluate.every_steps` the best one at the final
    sparsity, with the mask and the movement of its step.

    Args:
        config: Of the run.
        inputs: The task.
        trainer: A `SparseTrainer` whose output folder is `out`.
        sparsity: Masks of the stage before; replaced by the checkpoint's on resume.
        out: The stage's folder.
        checkpoint: Resume from this one; None takes the newest whole one, if any.

    Raises:
        Stopped: A signal asked for it; a checkpoint of the last step is there.
    """
    if checkpoint is None:
        checkpoint = newest_whole_checkpoint(out)
    else:
        check_whole(checkpoint)
        on_main(lambda: _set_later_aside(RunFolder(out.parent), checkpoint))
    if checkpoint is not None:
        trainer.accept_topology(checkpoint, read_note(checkpoint), sparsity.stage)
        on_main(lambda: refuse_code(checkpoint))
        logger.info("%s: resuming from %s", sparsity.stage, checkpoint)
        sparsity.resume(checkpoint)
    adapted = lora_layers(trainer.accelerator.unwrap_model(trainer.model))
    trainer.add_sparsity(sparsity, LoraSparsityCallback if adapted else SparsityCallback)
    trainer.add_callback(Pace(sparsity.stage, trainer.accelerator.num_processes))
    agreement = StepAgreement(config.run.save_minutes)
    trainer.add_callback(agreement)
    heldout = _heldout(config, inputs, trainer, out)
    if heldout is not None:
        heldout.resume(checkpoint)
        trainer.add_heldout(heldout)
    with held():
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        if agreement.stops:
            logger.info("%s: saved after step %d", sparsity.stage, trainer.state.global_step)
            raise Stopped(requested() or "another rank")
        best = _leave_student(trainer, sparsity, heldout, out)
    forget_deepspeed()
    return Training(
        trainer.state.global_step,
        best,
        int(trainer.state.num_input_tokens_seen),
        list(trainer.topology_changes),
    )


def _leave_student(
    trainer: Trainer, sparsity: Sparsity, heldout: HeldoutCallback | None, out: Path
) -> dict[str, Any] | None:
    """Writes what the stage leaves. Returns `step` and `accuracy` of the best student, if any."""
    on_main(partial(check_lock, out))
    best = None if heldout is None else on_main(lambda: read_best(out))
    if best is None:
        save_student(trainer, out)

    def leave() -> None:
        if best is not None:
            adopt_best(out)
        write_json(out / REFINEMENTS_FILE, sparsity.refinements)
        write_json(out / LOG_FILE, [finite_logs(logs) for logs in trainer.state.log_history])

    on_main(leave)
    return best


def _set_later_aside(folder: RunFolder, checkpoint: Path) -> None:
    """Moves later checkpoints to `old/`: the next start would go on from them instead."""
    later = later_checkpoints(checkpoint)
    if later:
        names = [f"{path.parent.name}/{path.name}" for path in later]
        logger.info("moved %s to %s", ", ".join(names), folder.move_to_old(names))


def _heldout(
    config: Config, inputs: TaskInputs, trainer: Trainer, out: Path
) -> HeldoutCallback | None:
    """What measures while the stage trains; None where `evaluate.every_steps` is not set."""
    values = config.evaluate
    if values.every_steps is None:
        return None
    probe = Probe(
        trainer,
        [ProbePrompt(inputs.encode(row.prompt), row.answer) for row in inputs.task.probe],
        inputs.verifier,
        max_new_tokens=values.max_new_tokens,
        batch_size=values.batch_size,
    )
    return HeldoutCallback(
        trainer,
        folder=out,
        every_steps=values.every_steps,
        patience=values.patience,
        measure=probe.accuracy,
        save=lambda folder: save_student(trainer, folder),
    )


def save_student(trainer: Trainer, folder: Path) -> None:
    """Writes model, masks and movement of now into a folder. Every rank calls it.

    Args:
        trainer: A `SparseTrainer` in training, or after it.
        folder: It exists.
    """
    engine = trainer.sparsity
    _save_model(trainer, folder)
    save_state(folder, engine.state_now(), engine.weights)
    masks = dict(engine.state.whole_masks(engine.weights))
    if is_main():
        save_masks(folder / MASK_FILE, masks)


def _save_model(trainer: Trainer, out: Path) -> None:
    """Gathers the weights where they are in pieces, merges adapters, and writes them once."""
    state_dict = None
    if trainer.is_deepspeed_enabled:
        state_dict = trainer.accelerator.get_state_dict(trainer.deepspeed)
    if is_main():
        model = trainer.accelerator.unwrap_model(trainer.model)
        if lora_layers(model):
            state_dict = merged_state_dict(model, state_dict or model.state_dict())
            model = model.get_base_model()
        save_model(model, trainer.processing_class, out, state_dict)
