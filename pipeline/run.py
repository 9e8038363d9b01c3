"""Config -> run folder -> stages in order -> report. The same command goes on where it was.

Before a stage runs, its inputs (the config keys it reads and the hashes of its input files) are
compared with those it was begun with: same and done, it is skipped; same and not done, it resumes;
changed, it is refused or, with `--resume redo`, moved to `old/` and run again.

On many ranks, rank 0 alone decides, prunes, evaluates and writes records (`ranks.py`).
"""

import logging
import resource
import sys
import time
import warnings
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from pipeline.artifacts import (
    STAGES,
    RunFolder,
    changed_inputs,
    git_commit,
    hash_file,
    hash_json,
    installed_versions,
    write_text,
)
from pipeline.config import Config
from pipeline.config_loading import to_yaml
from pipeline.errors import UserError
from pipeline.lock import release_lock, take_lock
from pipeline.models.paths import resolve_model
from pipeline.ranks import is_main, join_ranks, on_main, stop_together, world_size
from pipeline.rules.batches import prompt_fault
from pipeline.stages import distill, evaluate, export, grpo, on_policy, prune, sweep
from pipeline.stages.inputs import (
    TaskInputs,
    check_models,
    check_teacher,
    device,
    model_fingerprint,
    open_task,
)
from pipeline.stages.interim import write_interim
from pipeline.stages.training import end_step, max_steps, refining_stages
from pipeline.stopping import STATUS, Stopped, acting
from pipeline.training.arguments import check_trl_values
from pipeline.training.safe_loading import force_safe_loading
from pipeline.training.trackers import keep_tracker_run, uses_tracker

ON_RANK_0 = {
    "prune": prune.run,
    "evaluate": evaluate.run,
    "export": export.run,
    "sweep": sweep.run,
}
ON_EVERY_RANK = {"distill": distill.run, "on_policy": on_policy.run, "grpo": grpo.run}

SECTIONS_READ = {
    "prune": ("student", "teacher", "task", "calibration", "prune"),
    "distill": ("teacher", "task", "distill", "movement", "refine", "lora"),
    "on_policy": ("teacher", "task", "on_policy", "movement", "refine"),
    "grpo": ("teacher", "task", "grpo", "rewards", "movement", "refine", "lora"),
    "evaluate": ("student", "teacher", "task", "evaluate"),
    "export": ("student", "teacher", "export"),
    "sweep": ("student", "teacher", "task", "calibration", "prune", "distill", "evaluate", "sweep"),
}
"""Config sections whose keys are inputs of a stage."""

_HELDOUT = (("evaluate", "every_steps"), ("evaluate", "patience"), ("evaluate", "max_new_tokens"))
KEYS_READ = {
    "prune": (("refine", "start_sparsity"), ("evaluate", "max_new_tokens")),
    "distill": (("prune", "sparsity"), *_HELDOUT),
    "on_policy": (("prune", "sparsity"), *_HELDOUT),
    "grpo": (("prune", "sparsity"), *_HELDOUT),
    "evaluate": (("prune", "sparsity"),),
    "export": (("prune", "method"), ("prune", "redistribution"), ("prune", "width_multiple")),
    "sweep": (),
}
"""Single keys of other sections that are inputs too."""

VERIFYING_KEYS = (
    ("rewards", "functions"),
    ("rewards", "weights"),
    ("rewards", "sparsity_weight"),
    ("rewards", "teacher_kl_weight"),
    ("evaluate", "max_new_tokens"),
)
"""Inputs too of the stages that train, under refine.verify."""

HARMLESS_KEYS = {
    "teacher.micro_batch_size",
    "teacher.placement",
    "calibration.batch_size",
    "evaluate.batch_size",
    "evaluate.zero_shot_batch_size",
    "grpo.on_trouble",
}
BATCH_KEYS = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "steps_per_generation",
)
"""How the rows of a step are shared out among ranks."""

HARMLESS_PREFIXES = ("logging_", "log_", "report_to", "disable_tqdm", "save_", "run_name", "hub_")
HARMLESS_PREFIXES += ("vllm_server_", "vllm_group_port")  # another node after a requeue
"""Keys that change no result: a stage with results does not mind them."""

logger = logging.getLogger(__name__)


def run(config: Config, *, output_dir: Path, resume: str = "auto") -> None:
    """Runs every stage of the config that is not done yet.

    Args:
        config: Checked configuration.
        output_dir: The run folder.
        resume: `auto`, `redo`, `never`, or the path of a checkpoint folder to resume from.

    Raises:
        UserError: Bad input, or a folder whose stages were made by another config.
        Stopped: A signal asked for it; the run folder is as a resumed run needs it.
    """
    quiet_libraries()
    force_safe_loading()
    check_trl_values(config)
    inputs = open_inputs(config)
    check_models(config)
    fault = prompt_fault(config, len(inputs.task.train))
    if fault is not None:
        raise UserError(fault)
    join_ranks()
    folder = on_main(partial(RunFolder.open, output_dir))
    owner = on_main(partial(take_lock, folder.root))
    _log_to(folder.root / "log")
    status = 1
    try:
        if is_main():
            (folder.root / "exit_status").unlink(missing_ok=True)
        with acting(alone=world_size() == 1):
            checkpoint = _checkpoint(folder, resume)
            on_main(partial(_settle, config, folder, resume))
            _run_and_tell(config, folder, inputs, checkpoint)
        status = 0
    except UserError:
        status = 2
        raise
    except Stopped as stop:
        status = STATUS
        logger.info("stopped by %s; run the same command again to go on", stop)
        raise
    finally:
        if is_main():
            _leave_status(folder, status)
            release_lock(folder.root, owner)


def _leave_status(folder: RunFolder, status: int) -> None:
    """Writes `exit_status`; on a disk without space what ended the run stays the one message."""
    try:
        write_text(folder.root / "exit_status", f"{status}\n")
    except OSError as error:
        logger.warning("%s: no exit_status: %s", folder.root, error)


def _run_and_tell(
    config: Config, folder: RunFolder, inputs: TaskInputs, checkpoint: Path | None
) -> None:
    """Runs the stages, and leaves a page also where none of them made the report."""
    error = None
    try:
        _run_stages(config, folder, inputs, checkpoint)
    except BaseException as found:
        error = found
        raise
    finally:
        if is_main():
            write_interim(config, folder, inputs, error)


def _run_stages(
    config: Config, folder: RunFolder, inputs: TaskInputs, checkpoint: Path | None
) -> None:
    """Runs what is not done, in order."""
    if is_main():
        write_text(folder.root / "config.yaml", to_yaml(config))
        if uses_tracker(config):
            keep_tracker_run(folder.root)
    for stage in config.run.stages:
        stop_together()
        if on_main(partial(_is_current, stage, config, folder)):
            logger.info("%s: done before, skipped", stage)
            continue
        record = on_main(partial(_begin, stage, config, folder))
        started = time.monotonic()
        out = folder.stage(stage)
        if stage in ON_EVERY_RANK:
            from_here = checkpoint if checkpoint and checkpoint.parent.name == stage else None
            record |= asdict(ON_EVERY_RANK[stage](config, folder, inputs, out, from_here))
        else:
            on_main(partial(ON_RANK_0[stage], config, folder, inputs, out))
        seconds = record["seconds"] + time.monotonic() - started
        on_main(partial(_finish, stage, folder, record, seconds))
    logger.info("%s: %s", folder.root, ", ".join(f"{s} done" for s in config.run.stages))


def _begin(stage: str, config: Config, folder: RunFolder) -> dict[str, Any]:
    """Writes the record of a stage that begins or goes on."""
    old = folder.record(stage) or {}
    record: dict[str, Any] = {
        "stage": stage,
        "inputs": stage_inputs(stage, config, folder),
        "config_hash": hash_json(config.model_dump()),
        "versions": installed_versions(),
        "git_commit": git_commit(),
        "seed": config.run.seed,
        "device": device().type,
        "processes": world_size() if stage in ON_EVERY_RANK else 1,
        "seconds": old.get("seconds", 0.0),
        "done": False,
    }
    if stage in refining_stages(config):
        record["refine_end_step"] = end_step(config, folder)
        record["max_steps"] = max_steps(config, stage)
    folder.write_record(stage, record)
    logger.info("%s: %s", stage, "resumed" if old else "begins")
    return record


def _finish(stage: str, folder: RunFolder, record: dict[str, Any], seconds: float) -> None:
    """Writes the record of a stage that is done."""
    record |= {
        "outputs": _hashes(folder.stage(stage)),
        "seconds": seconds,
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "done": True,
    }
    folder.write_record(stage, record)
    logger.info("%s: done in %.0f s", stage, record["seconds"])


def stage_inputs(stage: str, config: Config, folder: RunFolder) -> dict[str, Any]:
    """What a stage's result depends on: dotted config keys and hashes of files."""
    keys: dict[str, Any] = {"run.seed": config.run.seed}
    for section in SECTIONS_READ[stage]:
        for key, value in getattr(config, section).model_dump().items():
            name = f"{section}.{key}"
            if name not in HARMLESS_KEYS and not key.startswith(HARMLESS_PREFIXES):
                keys[name] = value
    verifies = stage in ON_EVERY_RANK and config.refine.verify
    for section, key in KEYS_READ[stage] + (VERIFYING_KEYS if verifies else ()):
        keys[f"{section}.{key}"] = getattr(getattr(config, section), key)
    if stage in ("prune", "sweep"):
        for role in ("student", "teacher"):
            keys[f"files of {role}.path"] = model_fingerprint(getattr(config, role).path)
    earlier = STAGES[: STAGES.index(stage)]
    keys["files of earlier stages"] = {
        name: (folder.record(name) or {}).get("outputs") for name in earlier if folder.is_done(name)
    }
    return keys


def _settle(config: Config, folder: RunFolder, resume: str) -> None:
    """Makes sure that no stage with results was made by another config; `redo` moves such away."""
    _check_origin(config, folder)
    stage = stage_to_redo(config, folder, resume)
    if stage is not None:
        later = [name for name in STAGES[STAGES.index(stage) :] if folder.stage(name).exists()]
        logger.info("moved %s to %s", ", ".join(later), folder.move_to_old(later))


def _check_origin(config: Config, folder: RunFolder) -> None:
    """Keeps the model that a command names apart from the students of another one.

    Raises:
        UserError: The folder's student was pruned from another model and is not pruned anew.
    """
    record = None if "prune" in config.run.stages else folder.record("prune")
    pruned = (record or {}).get("inputs", {}).get("student.path", config.student.path)
    if pruned != config.student.path:
        raise UserError(
            f"student.path: {config.student.path!r}: {folder.root} holds students pruned from "
            f"{pruned!r}; set another --output_dir to measure this model, or that student.path"
        )


def stage_to_redo(config: Config, folder: RunFolder, resume: str) -> str | None:
    """The first stage whose results were made by another config, under `redo`; else None.

    Raises:
        UserError: One was and `resume` does not allow to redo it; nothing on disk has changed.
    """
    begun = [stage for stage in STAGES if folder.record(stage)]
    if resume == "never" and begun:
        raise UserError(
            f"--output_dir: {folder.root} already holds {', '.join(begun)} and --resume is never; "
            "set another --output_dir, or --resume auto to go on"
        )
    to_run: list[str] = []
    for stage in config.run.stages:
        record = folder.record(stage)
        if record is None:
            to_run.append(stage)
            continue
        changes = changed_inputs(
            _comparable(record["inputs"], stage, record["done"]),
            _comparable(stage_inputs(stage, config, folder), stage, record["done"]),
        )
        if to_run and stage in ON_EVERY_RANK:
            changes.append(f"its student: before {', '.join(to_run)} -> after")
        if not changes:
            continue
        if resume != "redo":
            raise UserError(
                f"{stage}: {folder.root} holds results of another config ({'; '.join(changes)}); "
                "set another --output_dir, or --resume redo to move this stage and the later ones "
                f"to {folder.root / 'old'} and run them again"
            )
        return stage
    return None


def _comparable(inputs: dict[str, Any], stage: str, done: bool) -> dict[str, Any]:
    """Inputs whose change is a conflict.

    `max_steps` of an unfinished stage may be raised, and its batch shared out in another way
    (`training/topology_change.py` counts the rows); report and export are made anew when a stage
    before them has run since, and a sweep knows which of its cells a change concerns.
    """
    if stage == "sweep":
        return {}
    ignored = set() if done else {f"{stage}.{key}" for key in ("max_steps", *BATCH_KEYS)}
    if stage in ("evaluate", "export"):
        ignored.add("files of earlier stages")
    return {key: value for key, value in inputs.items() if key not in ignored}


def _is_current(stage: str, config: Config, folder: RunFolder) -> bool:
    """Whether a stage is done and nothing it reads has changed since."""
    record = folder.record(stage)
    return bool(
        record and record["done"] and record["inputs"] == stage_inputs(stage, config, folder)
    )


def _checkpoint(folder: RunFolder, resume: str) -> Path | None:
    """The checkpoint that `--resume PATH` names.

    Raises:
        UserError: It is not a folder of an unfinished stage of this run.
    """
    if resume in ("auto", "redo", "never"):
        return None
    path = Path(resume).resolve()
    stage = path.parent.name
    if path.parent.parent != folder.root.resolve() or stage not in ON_EVERY_RANK:
        raise UserError(
            f"--resume: {resume!r} is not a checkpoint of this run; set a folder such as "
            f"{folder.stage('grpo') / 'checkpoint-100'}"
        )
    if folder.is_done(stage):
        raise UserError(f"--resume: {stage} is done in {folder.root}; set --resume auto or redo")
    return path


def open_inputs(config: Config) -> TaskInputs:
    """Opens task and tokenizers, so that bad input is reported before the run folder is made.

    Raises:
        UserError: A path is wrong, a task file is broken, or the tokenizers differ.
    """
    resolve_model(config.teacher.path, "teacher.path")
    inputs = open_task(config)
    if config.run.stages != ["evaluate"]:
        check_teacher(config, inputs.tokenizer)
    return inputs


def _hashes(folder: Path) -> dict[str, str]:
    """Hashes of what later stages read: the model's weights, the mask, and what was measured."""
    files = [*folder.glob("model/*.safetensors"), *folder.glob("mask.safetensors")]
    files += folder.glob("metrics.json")
    return {str(file.relative_to(folder)): hash_file(file) for file in sorted(files)}


def quiet_libraries() -> None:
    """Keeps the terminal for what a user acts on.

    No bars for files of a second, no notices about names that TRL uses and transformers renames, or
    that DeepSpeed uses and torch renames.
    """
    disable_progress_bar()
    for module in ("transformers", "torch.distributed"):
        warnings.filterwarnings("ignore", category=FutureWarning, module=module)


class _AboveBars(logging.StreamHandler):
    """Writes above the progress bars that are open, not behind them."""

    def emit(self, record: logging.LogRecord) -> None:
        """Takes the bars away for the time of one message."""
        with tqdm.external_write_mode(file=self.stream):
            super().emit(record)


def _log_to(path: Path) -> None:
    """Sends the pipeline's log to the terminal and, appended, to the run folder; rank 0 only."""
    handlers: list[logging.Handler] = [_AboveBars(sys.stderr)]
    if is_main():
        handlers.append(logging.FileHandler(path, delay=True))
    logging.basicConfig(
        level=logging.WARNING if is_main() else logging.ERROR,
        format="%(asctime)s %(message)s",
        datefmt="%H:%M:%S",
        handlers=handlers,
        force=True,
    )
    logging.getLogger("pipeline").setLevel(logging.INFO if is_main() else logging.ERROR)
