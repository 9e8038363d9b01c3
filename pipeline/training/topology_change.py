"""A checkpoint goes on under another number of ranks, another ZeRO stage, or without DeepSpeed.

What belongs to a weight is carried over bit for bit: fp32 weights and moments
(`trained_shards.py`), masks and movement (`sparsity/storage.py`). So are scheduler, data order and
what was refined. A step must have as many rows as before, or it would be another run: where the
number of ranks changes, `per_device_train_batch_size` or `gradient_accumulation_steps` has to
change against it.

What belongs to a rank cannot be carried over where their number changes: random states, which are
drawn anew from seed, step and rank, and completions of a generation batch under way, which are
sampled anew. From there on a run that samples is another run, so checkpoint, stage record and
report say at which step the topology changed.
"""

import json
import logging
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, set_seed
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME

from pipeline.errors import UserError
from pipeline.ranks import raise_together, rank
from pipeline.training.safe_loading import allow_deepspeed
from pipeline.training.trained_shards import PLAIN, has_map, load_trained, trained_shards

READABLE = (PLAIN, "zero1", "zero2", "zero3")

logger = logging.getLogger(__name__)


def layout_of(trainer: Trainer) -> dict[str, Any]:
    """How the trainer cuts the optimizer's state: `engine` and `world_size`."""
    engine = PLAIN
    if trainer.is_deepspeed_enabled:
        engine = f"zero{trainer.accelerator.state.deepspeed_plugin.zero_stage}"
    return {"engine": engine, "world_size": trainer.accelerator.num_processes}


def batch_of(trainer: Trainer) -> dict[str, int]:
    """What a step and a generation hold over all ranks, in rows; and the steps accumulated."""
    args = trainer.args
    per_forward = args.per_device_train_batch_size * trainer.accelerator.num_processes
    batch = {
        "rows_per_step": per_forward * args.gradient_accumulation_steps,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
    }
    if hasattr(args, "steps_per_generation"):
        batch["rows_per_generation"] = per_forward * args.steps_per_generation
    return batch


def describe(layout: dict[str, Any]) -> str:
    """A layout in words."""
    count = layout["world_size"]
    return f"{layout['engine']} on {count} rank{'' if count == 1 else 's'}"


class AnyTopology:
    """Mixin for a trainer: resumes from a checkpoint of whatever layout."""

    topology_changes: tuple[dict[str, Any], ...] = ()
    """Of this stage so far: `step`, `before` and `after`, each a layout."""
    _recut_from: str | None = None
    """The engine that wrote the checkpoint, where this one cuts the optimizer's state otherwise."""
    _rows_moved: bool = False
    """Whether ranks see other rows than the checkpoint's did."""

    def accept_topology(self, checkpoint: Path, note: dict[str, Any], section: str) -> None:
        """Learns what has changed since a checkpoint, and whether this run can read it.

        Args:
            checkpoint: A whole one; nothing of it has been loaded.
            note: What `add_sparsity` wrote there: `layout`, `batch`, `topology_changes`.
            section: `distill`, `on_policy` or `grpo`, for messages.

        Raises:
            UserError: Says what to set.
        """
        before, after = note["layout"], layout_of(self)
        was, now = note.get("batch"), batch_of(self)
        self.topology_changes = tuple(note.get("topology_changes", ()))
        if before["engine"] != PLAIN and find_spec("deepspeed") is not None:
            allow_deepspeed()
        if was is not None:
            _check_rows(checkpoint, section, was, now, self)
            self._rows_moved = was != now
        if before == after and not self._rows_moved:
            return
        self._rows_moved |= before["world_size"] != after["world_size"]
        if before != after:
            _check_readable(checkpoint, before, after, self)
            self._recut_from = (
                None if before["engine"] == after["engine"] == PLAIN else before["engine"]
            )
        step = json.loads((checkpoint / TRAINER_STATE_NAME).read_text())["global_step"]
        change = {"step": step, "before": before, "after": after}
        self.topology_changes = (*self.topology_changes, change)
        logger.info(
            "%s: %s goes on under %s from step %d on; random numbers and completions are %s",
            section,
            describe(before),
            describe(after),
            step,
            "drawn anew" if self._rows_moved else "those of before",
        )

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        if self._recut_from is None:
            return super()._prepare_for_training(
                max_steps, train_dataloader, resume_from_checkpoint
            )
        found = super()._prepare_for_training(max_steps, train_dataloader, None)
        self._read(Path(resume_from_checkpoint), self._recut_from)
        return found

    def _read(self, checkpoint: Path, engine: str) -> None:
        """Weights, moments and scheduler of another layout."""
        failure = None
        weights = trained_shards(self)
        groups = weights.optimizer.param_groups
        state = torch.load(checkpoint / SCHEDULER_NAME, map_location="cpu", weights_only=True)
        try:
            load_trained(checkpoint, engine, weights)
            self.lr_scheduler.load_state_dict(_for_groups(checkpoint, state, len(groups)))
        except UserError as error:
            failure = error
        raise_together(failure)
        weights.publish()
        for group, rate in zip(groups, self.lr_scheduler.get_last_lr(), strict=True):
            group["lr"] = rate
        if self.is_deepspeed_enabled:
            self.model_wrapped.global_steps = self.state.global_step

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        if self._recut_from is None:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_rng_state(self, checkpoint):
        if not self._rows_moved:
            super()._load_rng_state(checkpoint)
        elif checkpoint is not None:
            set_seed((self.args.seed + 1_000_003 * self.state.global_step + rank()) % 2**32)


def _check_rows(
    checkpoint: Path, section: str, was: dict[str, int], now: dict[str, int], trainer: Trainer
) -> None:
    rows, accumulated = was["rows_per_step"], now["gradient_accumulation_steps"]
    ranks = trainer.accelerator.num_processes
    if now["rows_per_step"] != rows:
        each, rest = divmod(rows, ranks * accumulated)
        remedy = f"{section}.per_device_train_batch_size {each}"
        if rest or not each:
            remedy = (
                f"{section}.per_device_train_batch_size and {section}.gradient_accumulation_steps "
                f"to numbers whose product is {rows} / {ranks}"
            )
            if rows % ranks:
                remedy = f"a number of ranks that divides {rows}"
        raise UserError(
            f"--output_dir: {checkpoint} was saved by a run with {rows} rows in each step, and "
            f"there would be {now['rows_per_step']} on {ranks} ranks from here on; set {remedy}"
        )
    if was.get("rows_per_generation") != now.get("rows_per_generation"):
        wanted = was["rows_per_generation"] * accumulated // rows
        raise UserError(
            f"--output_dir: {checkpoint} was saved by a run that samples "
            f"{was['rows_per_generation']} completions at a time, and it would be "
            f"{now['rows_per_generation']} from here on; set {section}.steps_per_generation "
            f"{wanted}"
        )


def _check_readable(
    checkpoint: Path, before: dict[str, Any], after: dict[str, Any], trainer: Trainer
) -> None:
    """Refuses what would be carried over in part only."""
    engines = before["engine"], after["engine"]
    unknown = [engine for engine in engines if engine not in READABLE]
    if unknown:
        why = f"{unknown[0]} keeps its optimizer's state where no other layout can read it"
    elif not has_map(checkpoint):
        why = "an older version wrote it, without the map of its weights that others need"
    elif engines == (PLAIN, PLAIN):
        return
    elif find_spec("deepspeed") is None:
        why = "deepspeed is not installed here, and its files hold classes of its own"
    elif not (checkpoint / SCHEDULER_NAME).exists() or _has_own_scheduler(trainer):
        why = (
            "deepspeed_config has an optimizer or a scheduler of its own, whose state DeepSpeed "
            "alone can read"
        )
    elif getattr(trainer.args, "use_adaptive_entropy", False):
        why = (
            "TRL reads the coefficient of use_adaptive_entropy with its own optimizer's state alone"
        )
    elif trainer.args.fp16:
        why = "the loss scale of fp16 belongs to one layout (bf16 has none)"
    else:
        return
    raise UserError(
        f"--output_dir: {checkpoint} was saved by {describe(before)}, and {describe(after)} cannot "
        f"read it: {why}; launch as before, or set another --output_dir"
    )


def _for_groups(checkpoint: Path, state: dict[str, Any], count: int) -> dict[str, Any]:
    """A scheduler's state for so many parameter groups: DeepSpeed leaves out those without weights.

    Raises:
        UserError: Their number changes, and they are not all alike.
    """
    lists = {key: value for key, value in state.items() if isinstance(value, list)}
    if all(len(values) == count for values in lists.values()):
        return state
    if any(value != values[0] for values in lists.values() for value in values):
        raise UserError(
            f"--output_dir: {checkpoint}: its groups of weights differ in their learning rates, "
            f"and their number would be {count} from here on; launch as before, or set another "
            "--output_dir"
        )
    return state | {key: values[:1] * count for key, values in lists.items()}


def _has_own_scheduler(trainer: Trainer) -> bool:
    if not trainer.is_deepspeed_enabled:
        return False
    config = trainer.accelerator.state.deepspeed_plugin.deepspeed_config
    return "optimizer" in config or "scheduler" in config
